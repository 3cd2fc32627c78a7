r"""
One normal form for maths answers (report section 3.2): the reference and what a model put into its box go through the
same rules, and only then are they compared.

    normalise(r"x = 1{,}080\text{ dollars}")      # Answer(text="1080", name="x", value=Fraction(1080), ...)

A rule takes off what does not change the value: fonts, spaces, dollar signs, units, `x =`, "the answer is". What is
then a number gets an exact value, so 2\frac12, 5/2 and 2.5 are one answer; products, powers and sums get none, because
`17*23` only restates a question. Lists are split, each item normalised by itself. Everything else stays LaTeX, for
Math-Verify (judge/maths.py). Written for texts of up to reward.MAX_ANSWER characters, which it reads in milliseconds.
"""
import re
from dataclasses import dataclass, replace
from fractions import Fraction


@dataclass(frozen=True)
class Answer:
    """An answer in normal form."""
    text: str                               # LaTeX without name, unit, percent sign and clothes
    name: str = ""                          # what stood before `=`, \in or \equiv: x, f(2), AB
    percent: bool = False                   # a percent sign was taken off; value is a hundredth of what is in text
    behind: str = ""                        # modulus of \pmod{7}, or am, pm of a time of day
    value: Fraction | None = None           # exact, if it is a plain number
    items: tuple["Answer", ...] = ()        # of a list, else ()
    brackets: str = ""                      # around the list: "()", "[)", "{}", ...; "" for none


# ---- the rules for the whole text -----------------------------------------------------------------------------------

CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ", "∞": r"\infty ",
    "°": r"^\circ ", "√": r"\sqrt ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^2", "³": "^3", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "∈": r"\in ", "±": r"\pm ", "⁄": "/",
    "θ": r"\theta ", "≡": r"\equiv ", "，": ",", "\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,",
    **dict.fromkeys("€£¥₹¢", ""),
})
GROUPED = r"(?<![0-9.,])[0-9]{1,3}(?:%s[0-9]{3})+(?![0-9])"          # 1{,}234: three digits behind each separator
PERCENT = "%s(?:per ?cent(?:age)?|pct)(?: points?)?%s"
FONT = (r"\\(?:math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|text(?:bf|rm|normal|it|sf|tt|up)?|mbox|hbox)"
        r" *\{([^{}]*)\}")
# (a character that the text must hold, pattern, replacement); in this order
RULES = [(needs, re.compile(pattern), by) for needs, pattern, by in (
    ("\\", r"(?<!\\)\\[\[\]()]|\\(?:euro|pounds?)(?![a-zA-Z])", ""),                               # \(5\) -> 5
    ("$", r"\\\$", ""), ("$", r"\$", " "),                                                          # \$5, $5$ -> 5
    ("*", r"\*\*", ""),                                                                            # **5** -> 5
    ("\\", r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![a-zA-Z]) *\.?", ""),     # \left( -> (; \leftarrow stays
    ("\\", r"\\(?:(?:display|text|script)style|[lL]arge|LARGE|[hH]uge|small|normalsize|bf|rm|it|tt|sf|em)(?![a-zA-Z])",
     ""),                                                                                          # \Large 5 -> 5
    ("{", GROUPED % r"\{,\}", lambda m: m[0].replace("{,}", "")),                                  # 1{,}234 -> 1234
    ("\\", GROUPED % r",?\\[,;:!]", lambda m: re.sub("[^0-9]", "", m[0])),                         # 1\,234 -> 1234
    ("\\", r"\\!|\\(?:negthinspace|limits)(?![a-zA-Z])", ""),
    ("\\", r"(?<!\\)\\(?:[,;:> ]|(?:q?quad|enspace|thinspace|hfill)(?![a-zA-Z]))", " "),           # 5\quad, 5\,cm
    ("~", "~", " "), (" ", " +", " "),
    ("\\", r"\\(?:[dtc]|nice|s)frac(?![a-zA-Z])", r"\\frac"),
    ("\\", r"\\math(?:rm|bf|it|sf) ([a-zA-Z])(?![a-zA-Z])", r"\1"),
    (":", r"\{:\}", ":"), ("\\", r"\\colon(?![a-zA-Z])", ":"),                                     # 2{:}3 -> 2:3
    ("", r"(?i)(?:(?<=:[0-9][0-9]) ?(?:\\text *\{ ?)?|(?<=[0-9]) ?\\text *\{ ?|(?<=[0-9]) )"
     r"([ap])\.? ?m\.?(?![a-z]) ?\}?",
     lambda m: rf"\text{{{m[1].lower()}m}}"),                                                      # 3:45 a.m.
    ("mod", r"\(? ?(?:\\(?:text|mathrm) *\{)? ?(?<![a-z\\])mod ?\}? ?([0-9]+) ?\)?", r"\\pmod{\1}"),
    ("\\", FONT, lambda m: font(m[1])),                                    # \mathbf{24} -> 24, \mathrm{cm} -> \text{cm}
    ("\\", r"\\frac *(?:\{([^{}]*)\}|([0-9a-zA-Z])) *(?:\{([^{}]*)\}|([0-9a-zA-Z]))",            # \frac1{2}, \frac 1 2
     lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}"),
    ("\\", r"\{([^{}\\]*)\\over(?![a-zA-Z])([^{}\\]*)\}|^([^{}\\]*)\\over(?![a-zA-Z])([^{}\\]*)$",
     lambda m: rf"\frac{{{(m[1] or m[3] or '').strip()}}}{{{(m[2] or m[4] or '').strip()}}}"),     # 1\over 2
    ("{", r"(?<![a-zA-Z_^}\]\\])\{ *([0-9.]+|\\text\{[^{}]*\}) *\}", r"\1"),                       # {1}/{2} -> 1/2
    ("{", r"([_^]) ?\{ ?([0-9a-zA-Z]) ?\}", r"\1\2"),                                              # x^{2} -> x^2
    ("%", r"\\?%(?: points?(?![a-zA-Z]))?", r"\\%"),
    ("p", PERCENT % (r"\\text\{ ?", r" ?\}") + "|" + PERCENT % ("(?<![a-zA-Z])", "(?![a-zA-Z])"), r"\\%"),
    ("\\", r"\\(?:color|textcolor) *\{[a-z]+\}", ""), ("\\", r"\\lbrace(?![a-zA-Z])", r"\\{"),
    ("\\", r"\\rbrace(?![a-zA-Z])", r"\\}"),
    ("\\", r"\\lt(?![a-zA-Z])", "<"), ("\\", r"\\gt(?![a-zA-Z])", ">"),
    ("\\", r"\\(g|l)eq(?:slant)?(?![a-zA-Z])", r"\\\1e"),
    ("\\", r"\\varnothing(?![a-zA-Z])|\\text\{(?:the )?empty set\}", r"\\emptyset"),
    ("\\", r"\\mathbb *([A-Z])", r"\\mathbb{\1}"),
    ("\\", r"\\R(?![a-zA-Z])|\\text\{(?:all )?real numbers\}|^all real numbers$", r"\\mathbb{R}"),
    ("\\", r"\\(sqrt|overline) *([0-9a-zA-Z])", r"\\\1{\2}"),
)]
PREFIX = re.compile(r"(?:\\text\{ ?)?(?:the )?(?:final |correct )?answer(?: is|:| =)+ ?\}? *|(?:=|\\approx) ?"
                    r"|(?:US|USD|Rs\.?) ?(?=[0-9.])", re.I)


def font(inside: str) -> str:
    r"""
    What is left of \text{inside} and its like: `24`, ` \%` and single letters are mathematics, "and" and "or" separate
    items, all else is a word or a unit and stays \text{..}.
    """
    word = inside.strip().removesuffix(".")
    if re.fullmatch(r",? ?(?:and|or),?", word):
        return f" {word.strip(', ')} "
    if re.fullmatch("[A-Z](?: ?, ?[A-Z])+", word):                              # choices: A, C
        return word
    unit = word[:1].isalpha() and (len(word) > 1 or word in UNITS or word in "NJWVAKltc")
    return rf"\text{{{word}}}" if unit and not re.search(r"[=0-9]{2}|[=(]", word) else f" {inside} "


def clean(text: str) -> str:
    """The text after all RULES: the same mathematics, in fewer spellings."""
    text = " ".join((text if text.isascii() else text.translate(CHARACTERS)).split())
    for needs, pattern, by in RULES:
        if needs in text:
            text = pattern.sub(by, text)
    return " ".join(text.split()).replace(" ^", "^")


# ---- brackets and lists ---------------------------------------------------------------------------------------------

SPLIT = re.compile(r"\\?[{([\])}]|[,;]| (?:and|or)(?= )|\\[a-zA-Z]+|\\.")


def split(text: str) -> list[str]:
    """Items between the commas, semicolons, `and` and `or` that stand outside all brackets."""
    items, depth, begin = [], 0, 0
    for m in SPLIT.finditer(text):
        mark = m[0].removeprefix("\\") if m[0][-1] in "{([])}" else m[0]
        depth += (mark in "{([") - (mark in "])}") if len(mark) == 1 else 0
        if depth == 0 and mark.strip() in (",", ";", "and", "or"):
            items.append(text[begin:m.start()])
            begin = m.end()
    items = [item.strip() for item in (*items, text[begin:])]
    return [item for item in items if item] if re.search(r", ?(?:and|or) ", text) else items


def outer(text: str) -> tuple[str, str] | None:
    r"""(inside, brackets) if one pair of brackets spans the text: `[0, 1)` -> ("0, 1", "[)"). \{..\} gives "{}"."""
    m = re.fullmatch(r"(\\\{|[{([])(.*?)(\\\}|[])}])", text, re.S)
    if not m:
        return None
    depth = 1
    for mark in re.finditer(r"\\?[{([\])}]", m[2]):
        depth += 1 if mark[0][-1] in "{([" else -1
        if depth == 0:
            return None                                     # (1)(2)
    return (m[2].strip(), m[1][-1] + m[3][-1]) if depth == 1 else None


THOUSANDS = re.compile(GROUPED % "," + "(?!,[0-9])")


def bracketed(match: re.Match) -> bool:
    """Whether the match stands inside round, square or set brackets: there `1,234` is a pair, not a number."""
    before = match.string[:match.start()]
    return any(before.count(left) > before.count(right) for left, right in ("()", "[]", (r"\{", r"\}")))


# ---- units and names ------------------------------------------------------------------------------------------------

UNITS = set("""m g s h L cm mm km dm nm kg lb lbs oz ft in yd mi ml mL cl hr hrs min sec ms mph kph kmh Hz kW
    cc sq cu day men way ways deg rad ton box cup egg pie car cow hen dog cat toy pen bag gal mile bit pts
    USD""".split())
CONNECTING = {"per", "of", "a", "the"}
# words that change a value, or are not a unit
NOT_UNITS = set("""and or not than minus plus times mod modulo choose over squared cubed factorial half halves third
    thirds fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths dozen hundred thousand million
    billion trillion percent negative below sqrt root log exp sin cos tan pi infinity infty inf is are if base divided
    multiplied equals power am pm""".split())
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
EXPONENT = r"(?:\^(?:\{ ?-?[0-9] ?\}|-?[0-9]))?"
UNIT_TAIL = re.compile(rf" ?(?:[/.]|\\cdot)? ?\\text\{{([^{{}}]*)\}}{EXPONENT}$")
DEGREES = re.compile(r" ?(?:\^ ?\{? ?\\circ ?\}?|\\degree)(?: ?[CF]| ?\\text\{[CF]\})?$|(?<=[0-9])(?:''|[\"'])$")
UNIT_FRACTION = re.compile(rf" ?\\frac\{{ ?\\text\{{[^{{}}]*\}} ?\}}\{{ ?\\text\{{[^{{}}]*\}}{EXPONENT} ?\}}$")
BARE_UNIT = re.compile(r"((?:[^a-zA-Z\\]|\\(?:frac|times|cdot|overline)(?![a-zA-Z]))*)([a-zA-Z][a-zA-Z.'/ ^{}0-9-]*)")
BEHIND = re.compile(r" ?\(? ?\\[pb]?mod(?![a-zA-Z]) *\{?([0-9a-z]+)\}? ?\)?$| ?\\text\{([ap]m)\}$")


def without_unit(text: str) -> str:
    r"""The text without a unit at its end: `12\pi\text{ cm}^2` -> `12\pi`, `24 square miles` -> `24`."""
    while True:
        m = DEGREES.search(text) or UNIT_FRACTION.search(text)
        if not m and (at := text.rfind(r"\text{")) >= 0:
            m = UNIT_TAIL.search(text, max(0, at - 8))
            if m and NOT_UNITS & set(re.findall("[a-z]+", m[1].lower())):
                m = None
        head = text[:m.start()] if m else ""
        if not m and text[-1:].isalnum() and (m := BARE_UNIT.fullmatch(text)):
            head, words = m[1], re.findall("[A-Za-z]+", m[2])
            known = len(words) < 6 and not CONNECTING.issuperset(words) and all(
                w in UNITS | CONNECTING or len(w) > 3 and w.lower() not in NOT_UNITS for w in words)
            apart = head.endswith(" ") or len(words[0]) > 1 and words[0] in UNITS       # 24 m, 24cm; but not 24m
            tail = re.sub(rf"(?<=[a-zA-Z]){EXPONENT}", "", m[2])
            if not known or not apart or not head or re.search(r"[0-9^{}]", tail) or number(head.rstrip()) is None:
                return text
        head = head.rstrip()
        if not m or not head or head[-1] in "=<>+*^_,(-/":
            return text
        text = head


GREEK = (r"\\(?:(?:var)?(?:alpha|beta|gamma|delta|epsilon|theta|kappa|rho|phi|sigma)|[zx]i|z?eta|iota|lambda|mu|nu|tau"
         r"|chi|psi|omega|ell|angle|triangle|Delta|Gamma|Omega|Phi|Sigma|Theta|Lambda)(?![a-zA-Z])")
LETTERS = rf"(?:[a-zA-Z]|{GREEK}|['! ]|\\(?:text|overline|vec|hat|bar) ?\{{[^{{}}=]*\}})+"
NAME = re.compile(rf" ?({LETTERS}(?:_ ?(?:[0-9a-zA-Z]|\{{[^{{}}=]*\}}))?[' ]*(?:\([^()=]*\)|\[[^][=]*\])?"
                  r"|\|[^|=]+\||\([a-z, ]+\)) ?(?:=|(?<=[a-z) ])\\(?:in|equiv|approx)(?![a-zA-Z])) ?(?=[^= ])")


# ---- numbers --------------------------------------------------------------------------------------------------------

DIGITS = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
SIGNED = rf"(?:[+-]?{DIGITS}|\([+-]?{DIGITS}\))"
NUMBER = re.compile(
    rf"([+-]?)(?:(?P<whole>[0-9]+)(?:(?=\\frac)|_))?"
    rf"(?:\\frac\{{(?P<a>{SIGNED})\}}\{{(?P<b>{SIGNED})\}}|(?P<c>{SIGNED})/(?P<d>{SIGNED})"
    rf"|(?P<x>{DIGITS})(?:(?:\\times|\\cdot|\*)10\^(?:\{{(?P<e>[+-]?[0-9]{{1,3}})\}}|(?P<f>[0-9])))?"
    r"|(?P<y>[0-9]*\.[0-9]*)\\overline\{(?P<repeat>[0-9]+)\})", re.ASCII)
PLAIN = re.compile(r"-?[0-9]{1,100}(?:\.[0-9]{1,100})?", re.ASCII)
MIXED = re.compile(r"(?<=[0-9]) (?=[0-9]+ ?/ ?[0-9]+$)")


def number(text: str) -> Fraction | None:
    r"""
    Exact value of a plain number: integer, decimal, a/b, \frac{a}{b}, mixed 2\frac{1}{2}, 1.5\times10^3, repeating
    0.\overline{3}; else None.

    No product, power or sum is plain: `17*23`, `2^5`, `17\cdot10`, `--5` and `1 2` are None.
    """
    text = MIXED.sub("_", text)
    if len(text) > 4000 or re.search(r"[0-9.] +[0-9.]", text):
        return None
    sign, inner = 1, re.fullmatch(r"([+-]?) ?\(([^()+-]*)\)", text)             # -(3/4)
    if inner:
        sign, text = -1 if inner[1] == "-" else 1, inner[2]
    m = NUMBER.fullmatch(text.replace(" ", ""))
    if not m:
        return None
    value = lambda part: Fraction(part.strip("()"))
    if m["x"]:
        result, power = Fraction(m["x"]), m["e"] or m["f"]
        if power and not 1 <= result < 10:
            return None                                     # 17\cdot10^2 is a product
        result *= Fraction(10) ** int(power or 0)
    elif m["repeat"]:
        places, n = len(m["y"].partition(".")[2]), len(m["repeat"])
        result = Fraction(m["y"].rstrip(".") or 0) + Fraction(int(m["repeat"]), (10 ** n - 1) * 10 ** places)
    else:
        top, bottom = value(m["a"] or m["c"]), value(m["b"] or m["d"])
        if not bottom:
            return None
        result = top / bottom
    if m["whole"]:
        if m["x"] or m["repeat"] or not 0 < result < 1:
            return None                                     # 2\frac{5}{3} is a product
        result += int(m["whole"])
    return sign * (-result if m[1] == "-" else result)


MAX_DEPTH = 6               # brackets and clothes around each other that are looked into


# ---- all together ---------------------------------------------------------------------------------------------------

def normalise(text: str) -> Answer:
    """The normal form of an answer."""
    if PLAIN.fullmatch(text):                               # nine of ten: no rule would change it
        return Answer(text, value=Fraction(text))
    return parse(clean(text))


def parse(text: str, depth: int = 0) -> Answer:
    """Answer of a text that went through clean(). depth: brackets around it; inside of them `1,234` is a pair."""
    text = text.strip().rstrip("." if text.endswith("\\}") else ".\\ ")
    for _ in range(MAX_DEPTH):                              # clothes around the whole
        before = text
        text = text[m.end():].strip() if (m := PREFIX.match(text)) else text
        boxed = re.fullmatch(r"\\(?:boxed|fbox|underline) ?(\{.*\})", text, re.S)
        pair = outer(boxed[1] if boxed else text)
        if pair and (boxed or pair[1] == "{}" and text[0] == "{" or pair[1] == "()" and len(split(pair[0])) == 1):
            text = pair[0]
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`":
            text = text[1:-1].strip()
        if text == before:
            break
    if not depth and "," in text:
        text = THOUSANDS.sub(lambda m: m[0] if bracketed(m) else m[0].replace(",", ""), text)
    pair = outer(text)
    listing = depth < MAX_DEPTH and pair and pair[1] in ("()", "[]", "[)", "(]", "{}")
    if listing and (pair[1] == "{}" or len(split(pair[0])) > 1):
        return listed([parse(item, depth + 1) for item in split(pair[0])], pair[1])
    parts = split(text)
    if not depth and all(intervals := [interval(part) for part in parts]):
        return intervals[0] if len(parts) == 1 else Answer(r"\cup".join(i.text for i in intervals), intervals[0].name)
    if len(parts) > 1 and all(parts):
        return listed([item for part in parts for item in spread(one(part, depth))], "")
    items = spread(one(text, depth))
    return listed(items, "") if len(items) > 1 else items[0]


BOUND = r"(?P<%s>[^<>=]+?) ?(?P<%s><|>|\\[lg]e(?![a-z])) ?"
INEQUALITY = re.compile(rf"(?:{BOUND % ('low', 'left')})?(?P<name>[a-zA-Z])(?: ?(?P<right><|>|\\[lg]e(?![a-z])) ?"
                        r"(?P<high>[^<>=]+))?")


def interval(text: str) -> Answer | None:
    r"""x\ge1, 5<x and -2<x\le7 as the intervals [1,\infty), (5,\infty) and (-2,7], if the bounds are plain numbers."""
    m = INEQUALITY.fullmatch(text)
    if not m or not m["left"] and not m["right"]:
        return None
    low, left, right, high = m["low"], m["left"], m["right"], m["high"]
    signs = {sign for sign in (left, right) if sign}
    if signs <= {">", r"\ge"}:
        low, left, right, high = high, right, left, low
    elif not signs <= {"<", r"\le"}:
        return None
    if any(bound and number(bound) is None for bound in (low, high)):
        return None
    ends = ("[" if left in (r"\le", r"\ge") else "(") + ("]" if right in (r"\le", r"\ge") else ")")
    return replace(listed([one(low or r"-\infty", 1), one(high or r"\infty", 1)], ends), name=m["name"])


def listed(items: list[Answer], brackets: str) -> Answer:
    """A list of answers as one answer; a name that all items share is the list's."""
    names = {item.name for item in items}
    name = names.pop() if len(names) == 1 else ""
    shown = [item.text if name or not item.name else f"{item.name}={item.text}" for item in items]
    left, right = (rf"\{brackets[0]}", rf"\{brackets[1]}") if brackets == "{}" else (brackets[:1], brackets[1:])
    return Answer(left + ", ".join(shown) + right, name, items=tuple(items), brackets=brackets)


def spread(answer: Answer) -> list[Answer]:
    r"""`1\pm\sqrt2` as the two answers that it is; any other answer as it is."""
    if answer.text.count(r"\pm") != 1 or r"\mp" in answer.text:
        return [answer]
    plus, minus = (re.sub(r" ?\\pm ?", sign, answer.text) for sign in "+-")
    return [one(f"{answer.name}={t}" if answer.name else t) for t in (plus.removeprefix("+"), minus)]


def one(text: str, depth: int = 0) -> Answer:
    """Answer of an item of a list, or of a text without a list: name, modulus, percent sign and unit are taken off."""
    name = behind = ""
    percent = False
    for _ in range(MAX_DEPTH):
        before = text
        if not name and (m := NAME.match(text)) and "=" not in text[m.end():]:      # a chain x=y=2 keeps its parts
            name, text = m[1].strip(), text[m.end():].strip()
            if depth < MAX_DEPTH and (pair := outer(text)) and len(split(pair[0])) > 1:
                return replace(parse(text, depth + 1), name=name)                           # x\in(-2,7)
        if m := BEHIND.search(text):
            behind, text = m[1] or m[2], text[:m.start()].strip()
        if not percent and text.endswith(r"\%") and len(text) > 2:
            percent, text = True, text[:-2].strip()
        text = without_unit(text)
        pair = outer(text)
        if pair and (pair[1] == "()" and len(split(pair[0])) == 1 or pair[1] == "{}" and text[0] == "{"):
            text = pair[0]
        if text == before:
            break
    if m := re.fullmatch(r"(.*?) ?(?:\\text\{)?(hundred|thousand|million|billion|trillion)\}?", text):
        value = number(m[1])
        value = None if value is None else value * 10 ** POWERS[m[2]]
    else:
        value = number(text)
    if value is not None and percent:
        value /= 100
    text = re.sub(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) |(?<=[0-9]) (?=[a-z](?![a-zA-Z]))", "", text)
    return Answer(text, name.replace(" ", ""), percent, behind, value)


# ---- the comparison -------------------------------------------------------------------------------------------------

def same(reference: Answer, given: Answer) -> bool | None:
    r"""
    Whether two answers are equal, as far as rules can tell; None where only Math-Verify can.

    A number wants a plain number, a list of numbers a list of plain numbers, so that no reference of this kind is ever
    paid by a formula that restates the question. By hand: 28\% and 0.28 are equal, so are 28\% and 28, and 12.5\% and
    12.5; 0.28 and 0.28\% are not.
    """
    if reference.name and given.name and reference.name != given.name:
        return False                                        # y = 2 does not answer x = 2
    if reference.behind and given.behind and reference.behind != given.behind:
        return False
    if reference.value is not None:
        left, _, right = given.text.partition("=")
        named = re.search("[a-zA-Z]", re.sub(r"\\(?:times|cdot|frac|sqrt|div|text)(?![a-zA-Z])", "", left))
        if named and right and "=" not in right:
            given = one(right)                              # m+n=35, \gcd(a,b)=6; but not 17\times23=391
        return equal_numbers(reference, given)
    if reference.items and all(item.value is not None for item in reference.items):
        if given.items and all(item.value is not None for item in given.items):
            return equal_lists(reference, given)
        if len(reference.items) == 1 and given.value is not None:
            return equal_numbers(reference.items[0], given)                 # 2 for \{2\}
        return None if re.search(r"\\[lg]e|[<>]|\\in", given.text) and reference.brackets else False
    if given.percent != reference.percent:
        return False
    if given.text == reference.text:
        return True
    words = [WORDS.fullmatch(answer.text) for answer in (reference, given)]
    if all(words):
        reference_words, given_words = (ARTICLE.sub("", " ".join((m[1] or m[2]).lower().split())) for m in words)
        if reference_words == given_words:
            return True
        if words[0][1] or len(reference_words) > 4:         # Math-Verify multiplies letters: Tuesday = Tuseday
            return False
    if all(re.fullmatch(r"[0-9A-Za-z]+_[0-9]+|[0-9A-Za-z]+_\{[0-9]+\}", a.text) for a in (reference, given)):
        return False                                        # 204_5 and 204_6: Math-Verify overlooks the base
    # Math-Verify takes the last side of a chain of equations, and merges equal items of a list: refuse both here
    if given.text.count("=") > max(1, reference.text.count("=")):
        return False
    if given.items and not given.brackets:
        keys = [item.value if item.value is not None else item.text for item in given.items]
        if len(set(keys)) < len(keys) or len(keys) != len(reference.items):
            return False
    return None


ARTICLE = re.compile("^(?:the|an?|on|in|at) (?=..)")
WORDS = re.compile(r"\\text\{([A-Za-z][A-Za-z' -]+)\}|([A-Za-z][A-Za-z' -]{2,})")


def equal_numbers(reference: Answer, given: Answer) -> bool:
    """Exact; a percent sign on one side only is forgiven for a whole number of percent, and from 10% on."""
    if given.value is None or reference.value is None:
        return False
    if reference.percent == given.percent or reference.value == given.value:
        return reference.value == given.value
    a, b = ((answer.value * 100 if answer.percent else answer.value) for answer in (reference, given))
    return a == b and (a.denominator == 1 or abs(a) >= 10)


def equal_lists(reference: Answer, given: Answer) -> bool:
    """Two lists of numbers. In order where one stands in ( ) or [ ], or where its items have names of their own."""
    mine, theirs = list(reference.items), list(given.items)
    kinds = {reference.brackets, given.brackets} - {""}
    if len(mine) != len(theirs) or len(kinds) > 1:
        return False
    if all(item.name for item in mine) and all(item.name for item in theirs):
        mine, theirs = (sorted(items, key=lambda item: (item.name, item.value)) for items in (mine, theirs))
        if [item.name for item in mine] != [item.name for item in theirs]:
            return False
    elif kinds <= {"{}"} and len({item.name for item in (*mine, *theirs)} - {""}) < 2:
        mine, theirs = (sorted(items, key=lambda item: item.value) for items in (mine, theirs))
    return all(equal_numbers(a, b) for a, b in zip(mine, theirs, strict=True))
