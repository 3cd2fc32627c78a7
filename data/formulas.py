"""
Formulas of web pages as TeX: from MathML, scripts, images, data attributes (report section 2.1).

A page shows one formula in up to three forms. data/extract.py finds the elements and deletes the drawn forms; here is
what each of the others means. Without a TeX source in the page, MathML is translated element by element.

    mathml_to_tex(<mfrac><mn>1</mn><mi>x</mi></mfrac>) -> \\frac{1}{x}
"""
import re
import unicodedata
from urllib.parse import parse_qs, unquote

import lxml.etree
import lxml.html
from lxml.html import HtmlElement

# what Unicode writes in <mo> and <mi>; Greek letters come by their Unicode names
SYMBOLS = {
    "×": r"\times", "÷": r"\div", "·": r"\cdot", "⋅": r"\cdot", "−": "-", "±": r"\pm", "∓": r"\mp", "∗": "*",
    "≤": r"\le", "≥": r"\ge", "≠": r"\ne", "≈": r"\approx", "≡": r"\equiv", "∼": r"\sim", "≅": r"\cong",
    "∝": r"\propto",
    "≪": r"\ll", "≫": r"\gg", "⩽": r"\le", "⩾": r"\ge", "∣": r"\mid", "∤": r"\nmid", "∥": r"\parallel", "⊥": r"\perp",
    "∑": r"\sum", "∏": r"\prod", "∐": r"\coprod", "∫": r"\int", "∬": r"\iint", "∭": r"\iiint", "∮": r"\oint",
    "⋃": r"\bigcup", "⋂": r"\bigcap", "⨁": r"\bigoplus", "⨂": r"\bigotimes", "√": r"\surd", "∞": r"\infty",
    "∂": r"\partial", "∇": r"\nabla", "∈": r"\in", "∉": r"\notin", "∋": r"\ni", "⊂": r"\subset", "⊆": r"\subseteq",
    "⊃": r"\supset", "⊇": r"\supseteq", "∪": r"\cup", "∩": r"\cap", "∖": r"\setminus", "∅": r"\emptyset",
    "∀": r"\forall", "∃": r"\exists", "¬": r"\neg", "∧": r"\wedge", "∨": r"\vee", "⊕": r"\oplus", "⊗": r"\otimes",
    "→": r"\to", "←": r"\leftarrow", "↔": r"\leftrightarrow", "⇒": r"\Rightarrow", "⇐": r"\Leftarrow", "↦": r"\mapsto",
    "⇔": r"\Leftrightarrow", "⟹": r"\implies", "⟺": r"\iff", "↑": r"\uparrow", "↓": r"\downarrow", "∘": r"\circ",
    "…": r"\ldots", "⋯": r"\cdots", "⋮": r"\vdots", "⋱": r"\ddots", "⟨": r"\langle", "⟩": r"\rangle", "⌊": r"\lfloor",
    "⌋": r"\rfloor", "⌈": r"\lceil", "⌉": r"\rceil", "‖": r"\|", "ℏ": r"\hbar", "ℓ": r"\ell", "ℝ": r"\mathbb{R}",
    "ℕ": r"\mathbb{N}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "△": r"\triangle", "∠": r"\angle",
    "′": "'", "″": "''", "ϵ": r"\epsilon", "ϕ": r"\phi", "ϑ": r"\vartheta", "ς": r"\varsigma", "ϱ": r"\varrho",
    "{": r"\{", "}": r"\}", "%": r"\%", "#": r"\#", "&": r"\&", "$": r"\$", "\u2061": "", "\u2062": "", "\u2063": "",
    "\u2064": "", "\xa0": " ", "ı": r"\imath", "ȷ": r"\jmath", "⋆": r"\star", "†": r"\dagger"}
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp lim sup inf max min det gcd "
                "deg dim ker arg Pr limsup liminf".split())
ACCENTS = {"˙": "dot", ".": "dot", "¨": "ddot", "^": "hat", "ˆ": "hat", "\u0302": "hat", "~": "tilde", "˜": "tilde",
           "∼": "tilde", "¯": "bar", "‾": "bar", "\u0304": "bar", "-": "bar", "_": "bar", "→": "vec", "⃗": "vec",
           "ˇ": "check", "˘": "breve", "´": "acute", "`": "grave", "⏞": "overbrace", "\u0307": "dot", "\u0308": "ddot"}
UNDER = {"_": "underline", "̲": "underline", "¯": "underline", "‾": "underline", "⏟": "underbrace"}
LIMITS = {r"\sum", r"\prod", r"\coprod", r"\int", r"\iint", r"\oint", r"\bigcup", r"\bigcap", r"\bigoplus",
          r"\bigotimes",
          r"\lim", r"\max", r"\min", r"\sup", r"\inf", r"\limsup", r"\liminf", r"\det", r"\gcd", r"\Pr"}
ALPHABETS = {"bold": "mathbf", "double-struck": "mathbb", "script": "mathcal", "fraktur": "mathfrak",
             "sans-serif": "mathsf", "monospace": "mathtt", "bold-italic": "boldsymbol"}
MATRICES = {("(", ")"): "pmatrix", ("[", "]"): "bmatrix", ("|", "|"): "vmatrix", (r"\{", r"\}"): "Bmatrix"}
DEEP = 150              # MathML nested deeper is no formula that anybody wrote: its characters are kept


# ---- MathML -> TeX --------------------------------------------------------------------------------------------------

def mathml_to_tex(node: HtmlElement) -> str:
    """MathML -> TeX: <mfrac><mn>1</mn><mi>x</mi></mfrac> -> \\frac{1}{x}. An unknown tag gives its children."""
    depth = {node: 0}
    for inner in node.iterdescendants():
        depth[inner] = depth[inner.getparent()] + 1
        if depth[inner] > DEEP:
            return "".join(node.itertext())
    return convert(node).strip()


def name_of(node: HtmlElement) -> str:
    """The tag without a namespace: "mrow" of m:mrow; "" for what is no element."""
    return node.tag.rsplit(":")[-1] if isinstance(node.tag, str) else ""


def convert(node: HtmlElement) -> str:
    """mathml_to_tex without the limit on depth."""
    tag = name_of(node)
    children = [k for k in node if name_of(k) and not name_of(k).startswith("annotation")]
    if tag in ("mi", "mn", "mo", "mtext", "ms"):
        return token(node, tag, "".join(node.itertext()))
    if tag == "mtable":
        return table(node, "aligned" if "right" in node.get("columnalign", "") else "matrix")
    if tag in ("mmultiscripts", "mphantom", "mspace", "maction", "mfenced"):
        return special(node, tag, children)
    kids = [convert(k).strip() for k in children]
    a, b, c = (kids + ["", "", ""])[:3]
    if tag == "mfrac" and len(kids) == 2:
        bar = node.get("linethickness", "1").strip().rstrip("ptxem%") not in ("0", "0.0")
        return f"\\frac{{{a}}}{{{b}}}" if bar else f"{{{a} \\atop {b}}}"
    if tag in ("msup", "msub") and len(kids) == 2:
        return based(a) + (b if tag == "msup" and set(b) == {"'"} else f"{'^' if tag == 'msup' else '_'}{{{b}}}")
    if tag in ("msubsup", "munderover") and len(kids) == 3:
        return f"{based(a)}_{{{b}}}^{{{c}}}"
    if tag in ("munder", "mover") and len(kids) == 2:
        mark = "".join(children[1].itertext()).strip()
        accent = (ACCENTS if tag == "mover" else UNDER).get(mark)
        if accent:
            return f"\\{'overline' if accent == 'bar' and len(a) > 1 and a[0] != chr(92) else accent}{{{a}}}"
        if a in LIMITS or a.startswith(("\\underbrace", "\\overbrace")):
            return f"{a}{'^' if tag == 'mover' else '_'}{{{b}}}"
        return f"\\{'overset' if tag == 'mover' else 'underset'}{{{b}}}{{{a}}}"
    if tag == "mroot" and len(kids) == 2:
        return f"\\sqrt[{b}]{{{a}}}"
    if tag == "msqrt":
        return f"\\sqrt{{{row(children)}}}"
    if tag == "menclose":
        kind = node.get("notation", "box")
        command = "cancel" if "strike" in kind else "overline" if kind == "top" else "underline" if kind == "bottom" \
            else "sqrt" if kind == "radical" else "boxed"
        return f"\\{command}{{{row(children)}}}"
    return row(children) if children else (node.text or "").strip()


def token(node: HtmlElement, tag: str, text: str) -> str:
    """A leaf: a number, an identifier, an operator with blanks around it (but "f(x)"), or words."""
    if tag in ("mtext", "ms"):
        return f"\\text{{{text.strip()}}}" if re.search(r"\w{2}", text) else symbols(text)
    text = text.strip()
    if tag == "mi" and text in FUNCTIONS:
        return f"\\{text} "
    alphabet = ALPHABETS.get(node.get("mathvariant", ""))
    if alphabet and text:
        return f"\\{alphabet}{{{symbols(text)}}}"
    if tag == "mi" and len(text) > 1 and text.isascii() and text.isalpha():
        return f"\\mathrm{{{text}}}"
    if tag == "mo" and text in FUNCTIONS:
        return f"\\{text} "
    text = symbols(text)
    return f" {text} " if tag == "mo" and text not in "()[]|,!'" and text not in ("\\{", "\\}") else text


def symbols(text: str) -> str:
    """Characters -> TeX commands; what TeX reads as a letter stays."""
    return spaced([SYMBOLS.get(c) if c in SYMBOLS else greek(c) if "\u0370" <= c <= "\u03ff" else c for c in text])


def greek(letter: str) -> str:
    """A Greek letter's command; capitals that look Latin have none in TeX."""
    words = unicodedata.name(letter, "").replace("LAMDA", "LAMBDA").split()
    if len(words) != 4 or words[-1] == "OMICRON":
        return letter
    name = words[-1].lower()
    if words[1] == "SMALL":
        return f"\\{name}"
    known = name in ("gamma", "delta", "theta", "lambda", "xi", "pi", "sigma", "upsilon", "phi", "psi", "omega")
    return f"\\{name.capitalize()}" if known else letter


def spaced(parts: list[str]) -> str:
    """The parts in a row, with a blank where a command would run into a letter: \\pi r, not \\pir."""
    out = ""
    for part in parts:
        out += " " + part if part[:1].isalpha() and re.search(r"\\[A-Za-z]+$", out) else part
    return out


def based(base: str) -> str:
    """The base of an exponent, in braces if it has one already."""
    return f"{{{base}}}" if re.search(r"[\^_]", base) else base


def row(children: list[HtmlElement]) -> str:
    """Elements in a row. Brackets around a table or around a fraction without a bar belong to it: pmatrix, \\binom."""
    parts, i = [], 0
    texts = [convert(k) for k in children]
    single = [inner(k) for k in children]
    while i < len(children):
        left = texts[i].strip()
        core = single[i + 1] if i + 1 < len(children) else None
        right = texts[i + 2].strip() if i + 2 < len(children) else ""
        kind = name_of(core) if core is not None else ""
        if kind == "mtable" and (left, right) in MATRICES:
            parts.append(table(core, MATRICES[left, right]))
            i += 3
        elif kind == "mtable" and left == "\\{" and not right:
            parts.append(table(core, "cases"))
            i += 2 + (i + 2 < len(children))
        elif kind == "mfrac" and (left, right) == ("(", ")") and " \\atop " in texts[i + 1]:
            parts.append("\\binom" + "".join(f"{{{convert(k).strip()}}}" for k in core))
            i += 3
        else:
            parts.append(texts[i])
            i += 1
    return spaced(parts).strip()


def inner(node: HtmlElement) -> HtmlElement:
    """The only thing inside wrappers: the <mtable> of <mrow><mstyle><mtable>."""
    while name_of(node) in ("mrow", "mstyle", "mpadded", "semantics") and len(node) == 1:
        node = node[0]
    return node


def table(node: HtmlElement, environment: str) -> str:
    """<mtable> -> \\begin{matrix} a & b \\\\ c & d \\end{matrix}; the label of a labelled row is left out."""
    rows = []
    for line in node:
        cells = [convert(c).strip() for c in line if name_of(c) == "mtd"]
        rows.append(" & ".join(cells[name_of(line) == "mlabeledtr" and len(cells) > 1:]))
    return f" \\begin{{{environment}}} " + " \\\\ ".join(rows) + f" \\end{{{environment}}} "


def special(node: HtmlElement, tag: str, children: list[HtmlElement]) -> str:
    """The elements that are more than their children in a row."""
    if tag == "mfenced":
        marks = "".join(node.get("separators", ",").split()) or " "
        parts = [convert(k).strip() for k in children]
        round_ = (node.get("open", "("), node.get("close", ")")) == ("(", ")")
        if round_ and len(children) == 1 and name_of(inner(children[0])) == "mfrac" and " \\atop " in parts[0]:
            return "\\binom" + "".join(f"{{{convert(k).strip()}}}" for k in inner(children[0]))
        text = "".join(p + (symbols(marks[min(i, len(marks) - 1)]) if i < len(parts) - 1 else "")
                       for i, p in enumerate(parts))
        return symbols(node.get("open", "(")) + text + symbols(node.get("close", ")"))
    if tag == "maction":
        return convert(children[0]) if children else ""
    if tag == "mmultiscripts":
        names = [name_of(k) for k in children]
        cut = names.index("mprescripts") if "mprescripts" in names else len(names)
        kids = ["" if name in ("none", "mprescripts") else convert(k).strip()
                for k, name in zip(children, names, strict=True)]
        pairs = lambda items: "".join(
            (f"_{{{items[i]}}}" if items[i] else "") + (f"^{{{items[i + 1]}}}" if items[i + 1:i + 2] > [""] else "")
            for i in range(0, len(items), 2))
        before = pairs(kids[cut + 1:])
        return ("{}" + before if before else "") + (kids[0] if kids else "") + pairs(kids[1:cut])
    return " " if tag == "mspace" else ""


# ---- the formula of an element --------------------------------------------------------------------------------------

def dollars(tex: str, display: bool = False) -> str:
    """
    TeX in the form it has in our text, $TeX$ or $$TeX$$; "" for none. A lone \\boxed{...} marks an answer and gets no
    dollars, since verifiers look for it in this form.
    """
    tex = " ".join(tex.split())
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(tex) > len(opening + closing) and tex.startswith(opening) and tex.endswith(closing):
            display = display or opening in ("$$", "\\[")
            tex = tex[len(opening):-len(closing)].strip()
            break
    if re.fullmatch(r"\\boxed\{(?:[^{}]|\{[^{}]*\})*\}", tex):
        return tex
    return "" if not tex else f"$${tex}$$" if display else f"${tex}$"


def bare(tex: str) -> str:
    """TeX without what was added for the page: {\\displaystyle ...}, comment lines of kramdown, <br> in an alt text."""
    tex = re.sub(r"%\s*<!\[CDATA\[|%\s*\]\]>", "", re.sub(r"<br\s*/?>", " ", tex)).strip()
    return re.sub(r"^\{\\displaystyle (.*)\}$", r"\1", tex, flags=re.S)


def displayed(node: HtmlElement) -> bool:
    """Whether a formula has a line of its own: <math display=block>, the wrappers of KaTeX and MathJax 3."""
    near = [node]
    while len(near) < 5 and near[-1].getparent() is not None:
        near.append(near[-1].getparent())
    return any(n.get("display") in ("block", "true") or "katex-display" in n.get("class", "") for n in near)


def formula(node: HtmlElement) -> str:
    """The TeX of a <script type=math/tex>, <math>, formula image or data-tex, with dollars; "" for other elements."""
    tag = name_of(node)
    if tag == "script":
        kind = node.get("type", "").lower()
        if kind.startswith("math/mml"):
            tree = lxml.html.fragment_fromstring(node.text or "", create_parent="math")
            return dollars(mathml_to_tex(tree), "display" in kind)
        return dollars(bare(node.text or ""), "mode=display" in kind) if kind.startswith("math/tex") else ""
    if tag == "math":
        for note in node.iter():                         # KaTeX, MathJax and Wikipedia keep the TeX source here
            if name_of(note) == "annotation" and "tex" in note.get("encoding", "").lower():
                return dollars(bare("".join(note.itertext())), displayed(node))
        return dollars(bare(node.get("alttext", "")) or mathml_to_tex(node), displayed(node))
    if tag == "img":
        return dollars(bare(image_tex(node)))
    for name in ("data-tex", "data-latex", "data-math"):
        if node.get(name):
            return dollars(bare(node.get(name)), displayed(node))
    return ""


def image_tex(node: HtmlElement) -> str:
    """The TeX of an image: in its address, or in its alt text when a class or dollars say that this is TeX."""
    src, alt = node.get("src", "") or node.get("data-src", ""), node.get("alt", "").strip()
    if re.search(r"codecogs|latex\.php|(?:mathtex|mimetex)\.cgi|[?&](?:latex|tex|cht=tx.*chl)=", src):
        query = src.partition("?")[2]
        fields = parse_qs(query, max_num_fields=100) if query.count("&") < 100 else {}
        return alt or (fields.get("latex") or fields.get("tex") or fields.get("chl") or [unquote(query)])[0]
    if re.search(r"(?:^|\s)(?:tex|latex|mwe-math\S*|ql-img\S*|Formula|equation)(?:$|\s)", node.get("class", "")):
        return alt or node.get("title", "")
    return alt if re.fullmatch(r"\$.+\$|\\\(.+\\\)|\\\[.+\\\]|\\begin\{.+", alt, flags=re.S) else ""
