"""A small crawl of the invented world as HTML, with the truth about every page beside it.

Report section 2.1 starts from web dumps: good pages in many encodings, and advertisements, job posts, news, mirrors and
near-copies around them. Here each page is first a list of content blocks; `plain` gives the text a perfect extractor
would find, `render` hides it in a layout (menus, side bars, cookie banners) and a formula or code encoding. So extraction,
dedup and tagging are tested against a known truth.

Worked problems come from outside as (question, solution) strings and must come out of extraction character for character:
    Problem: {question}\nSolution: {solution}            (a solution that starts with a code fence follows on the next line)

Try:  python -m data.tiny.web        # prints two pages: HTML, then the text that should come out
"""
import html
import random
import re
import urllib.parse
from dataclasses import dataclass, replace

from data.tiny.world import CROPS, FOODS, MONTHS, REGIONS, RIVERS, TRADES, World, distance, make_world, say

# share of each kind among the original pages [ours]; copies and URL variants come on top
SHARES = {"encyclopedia": .22, "maths": .27, "code": .21, "forum": .10, "news": .08, "ads": .06, "jobs": .04, "shallow": .02}
URL_VARIANTS, MIRRORS, LEAKS = .08, .08, .01      # of the original pages; data.md measured a crawl with 8% and 8%
HOSTS = {"encyclopedia": ["wiki.ard", "atlas.brn"], "maths": ["sums.edu", "numberclub.ard"], "code": ["learnpy.dov", "snippets.cel"],
         "forum": ["ask.est", "boards.frn"], "news": ["daily.ard"], "ads": ["deals.brn"], "jobs": ["work.cel"], "shallow": ["links.dov"]}


@dataclass(frozen=True)
class Page:
    """One fetched page. text: what a perfect extractor finds. copy_of: the index of the original, -1 for an original.
    domain, quality 0-3, depth 0-3 (reasoning), ad 0-3: what a teacher would say of it. leak: holds a held-out problem."""
    url: str
    html: str
    text: str
    domain: str
    quality: int
    depth: int
    ad: int
    copy_of: int = -1
    leak: bool = False


# ---- content blocks ---------------------------------------------------------------------------------------------------
# ("h1", text)  ("p", text)  ("tight", text after a code block)  ("ul", [text])  ("code", lines)  ("post", [blocks])  ; text may hold $TeX$, `code`, **bold**, newlines

def block_text(question: str, solution: str) -> str:
    """The text of one worked problem, the shape the base model is prompted with."""
    return f"Problem: {question}\nSolution:{chr(10) if solution.startswith('```') else ' '}{solution}"


def problem(question: str, solution: str) -> list:
    """A worked problem as blocks: fenced parts become code blocks, the text between them paragraphs."""
    parts = re.split(r"(?:^|\n)```(?:python)?\n(.*?)\n```(?=\n|$)\n?", block_text(question, solution), flags=re.S)
    blocks = [("code", part) if i % 2 else ("tight" if i else "p", part) for i, part in enumerate(parts)]
    return [b for b in blocks if b[0] == "code" or b[1]]


def plain(blocks: list) -> str:
    """The text a perfect extractor returns for these blocks."""
    out = ""
    for kind, body in blocks:
        text = {"h1": lambda b: f"# {b}", "p": str, "tight": str, "ul": lambda b: "\n".join(f"- {x}" for x in b),
                "code": lambda b: f"```python\n{b}\n```", "post": plain}[kind](body)
        out += ("\n" if kind in ("code", "tight") else "\n\n") * bool(out) + text
    return out


# ---- formulas and code in the ways of real pages -------------------------------------------------------------------------

def to_mathml(tex: str) -> str:
    """The few TeX forms our prose uses (numbers, letters, + - = \\times, \\frac, ^{}) as MathML."""
    out, names = [], {"\\times": "×", "\\div": "÷", "-": "−"}
    for tok in re.findall(r"\\frac\{[^{}]*\}\{[^{}]*\}|\w\^\{\w+\}|\\boxed\{[^{}]*\}|\\\w+|\d+|[a-zA-Z]|[^\s\w]", tex):
        leaf = lambda s: "<mrow>" + "".join(to_mathml(s)) + "</mrow>"
        if m := re.fullmatch(r"\\frac\{(.*)\}\{(.*)\}", tok):
            out.append(f"<mfrac>{leaf(m[1])}{leaf(m[2])}</mfrac>")
        elif m := re.fullmatch(r"(\w)\^\{(.*)\}", tok):
            out.append(f"<msup>{leaf(m[1])}{leaf(m[2])}</msup>")
        elif m := re.fullmatch(r"\\boxed\{(.*)\}", tok):
            out.append(f"<menclose notation='box'>{leaf(m[1])}</menclose>")
        else:
            tag = "mn" if tok.isdigit() else "mi" if tok.isalpha() else "mo"
            out.append(f"<{tag}>{html.escape(names.get(tok, tok))}</{tag}>")
    return "".join(out)


def encode_formula(tex: str, way: str) -> str:
    """One formula in one of the encodings of the web; the drawn twins hold garbled text that must not come out."""
    e, drawn = html.escape(tex), html.escape(re.sub(r"[\\{}^]", " ", tex))
    tree = f"<math>{to_mathml(tex)}</math>"
    note = f"<math><semantics><mrow>{to_mathml(tex)}</mrow><annotation encoding='application/x-tex'>{e}</annotation></semantics></math>"
    return {"tex": "\\(" + e + "\\)", "mathml": tree if exact_mathml(tex) else note, "annotated": note,
            "mathjax2": f"<span class='MathJax_Preview'></span><span class='MathJax'><nobr>{drawn}</nobr></span>"
                        f"<script type='math/tex'>{tex}</script>",
            "mathjax3": f"<mjx-container class='MathJax'><mjx-math aria-hidden='true'>{drawn}</mjx-math>"
                        f"<mjx-assistive-mml>{note}</mjx-assistive-mml></mjx-container>",
            "katex": f"<span class='katex'><span class='katex-mathml'>{note}</span>"
                     f"<span class='katex-html' aria-hidden='true'>{drawn}</span></span>",
            "image": f"<img class='tex' src='/latex.php?latex={urllib.parse.quote(tex)}' alt='{html.escape(tex)}'>"}[way]


def exact_mathml(tex: str) -> bool:
    """Prose formulas survive MathML without annotation exactly; anything richer keeps its TeX source."""
    return bool(re.fullmatch(r"(?:\\frac\{\w+\}\{\w+\}|[a-z]\^\{\w+\}|\d+|[a-z])(?: (?:\\times|[+\-=]) "
                             r"(?:\\frac\{\w+\}\{\w+\}|[a-z]\^\{\w+\}|\d+|[a-z]))*", tex))


def inline(text: str, way: str) -> str:
    """Text with $TeX$, bare \\boxed{} and `code` -> HTML; line breaks, doubled and leading spaces survive as <br> and nbsp."""
    out = []
    for part in re.split(r"(\$[^$\n]+\$|\\boxed\{[^{}$\n]*\}|`[^`\n]+`)", text):
        if part.startswith("$") and part.endswith("$") and len(part) > 2 and part[1:2] != " " and "  " not in part:
            out.append(encode_formula(part[1:-1], way))
        elif part.startswith("\\boxed{") and way != "tex" and "  " not in part:
            out.append(encode_formula(part, way))
        elif part.startswith("`") and part.endswith("`") and len(part) > 2:
            out.append(f"<code>{html.escape(part[1:-1], quote=False)}</code>")
        else:
            part = re.sub(r"(?m)^ | (?= )| $", "\xa0", html.escape(part, quote=False))
            out.append(part.replace("\n", "<br>\n"))
    return "".join(out)


def encode_code(source: str, way: str) -> str:
    """A code block as sites show it: plain, hljs spans, a Pygments table with line numbers, one row a line, <br> in <pre>."""
    e = html.escape(source, quote=False)
    lines = e.split("\n")
    if way == "hljs":
        e = re.sub(r"\b(def|return|for|in|if|else|while)\b", r"<span class='hljs-keyword'>\1</span>", e)
        return f"<pre><code class='hljs language-python'>{e}\n</code></pre>"
    if way == "pygments":
        numbers = "\n".join(str(i + 1) for i in range(len(lines)))
        return (f"<table class='highlighttable'><tr><td class='linenos'><div class='linenodiv'><pre>{numbers}</pre></div></td>"
                f"<td class='code'><div class='highlight language-python'><pre>{e}\n</pre></div></td></tr></table>")
    if way == "rows":
        return "<table class='highlight language-python'>" + "".join(
            f"<tr><td class='blob-num'>{i + 1}</td><td class='blob-code'>{line}</td></tr>" for i, line in enumerate(lines)) + "</table>"
    if way == "br":
        return "<pre class='brush: python'>" + "<br>".join(lines) + "</pre>"
    return f"<pre><code class='language-python'>{e}</code></pre>"


def blocks_html(blocks: list, r: random.Random, maths: str, code: str) -> str:
    out = []
    for kind, body in blocks:
        if kind == "code":
            out.append(encode_code(body, code))
        elif kind == "ul":
            out.append("<ul>" + "".join(f"<li>{inline(x, maths)}</li>\n" for x in body) + "</ul>")
        elif kind == "post":
            meta = f"<div class='user-info'>{r.choice(['mira', 'finn', 'otter9', 'hal'])} said on day {r.randrange(30)}</div>"
            meta += f"<div class='vote'>{r.randrange(40)} votes</div>" if r.random() < .5 else ""
            out.append(f"<div class='post'>{meta}<div class='{{post}}'>{blocks_html(body, r, maths, code)}</div>"
                       f"<div class='signature'>all sums are fun</div><div class='post-menu'><a>share</a> <a>edit</a></div></div>")
        else:
            out.append(inline(body, maths) if kind == "tight" else f"<{kind}>{inline(body, maths)}</{kind}>")
    return "\n".join(out)


def render(blocks: list, r: random.Random) -> str:
    """Blocks -> a page: one of three site layouts, one formula encoding, one code encoding, boilerplate all around."""
    maths = r.choice(["tex", "mathml", "annotated", "mathjax2", "mathjax3", "katex", "image"])
    code = r.choice(["plain", "hljs", "pygments", "rows", "br"])
    body = blocks_html(blocks, r, maths, code).replace("{post}", r.choice(["postbody", "s-prose", "comment-body"]))
    title = next((b[1] for b in blocks if b[0] == "h1"), "Page")
    links = "".join(f"<a href='/{w}'>{w}</a> " for w in r.sample(["home", "about", "shop", "login", "help", "forum", "news"], 4))
    side = "".join(f"<li><a href='/p{r.randrange(99)}'>{x}</a></li>" for x in r.sample(REGIONS, 3))
    banner = "<div class='cookie-banner'>We use cookies to make this site better. <button>Accept</button></div>"
    advert = "<div class='ad-box'>Buy now and save half of the price.</div>" if r.random() < .5 else ""
    head = (f"<!doctype html><html><head><title>{html.escape(title)}</title><style>p {{ margin: 1em }}</style>"
            "<script>track('visit');</script></head><body>")
    foot = "<footer>All rights reserved. Contact us. Terms of use.</footer></body></html>"
    kind = r.randrange(3)
    if kind == 0:
        return (f"{head}<nav>{links}</nav><article>{body}</article><aside><h3>Related pages</h3><ul>{side}</ul></aside>"
                f"{advert}{banner}{foot}")
    if kind == 1:
        return (f"{head}<header><p>The site of good pages</p></header><div class='sidebar'><ul>{side}</ul></div>{banner}"
                f"<main>{advert}<div class='breadcrumb'><a>home</a> &gt; <a>pages</a></div>{body}</main>{foot}")
    return (f"{head}<div id='menu'>{links}</div><div class='content'>{body}{advert}</div>"
            f"<div><a href='/a'>next page</a> <a href='/b'>last page</a> <a href='/c'>top</a></div>{banner}{foot}")


# ---- what the pages say -----------------------------------------------------------------------------------------------

def encyclopedia(w: World, r: random.Random):
    name = r.choice(sorted(w.things))
    kind, facts = w.things[name]
    chosen = r.sample(facts, max(1, len(facts) - r.randrange(2)))
    chosen.sort(key=facts.index)
    if r.random() < .12:                                           # a stub: little to learn, a shallow page
        return [("h1", name), ("p", f"{say(r, name, chosen[0])} This page is short. You can help us to make it better.")], (1, 0, 0)
    more = []
    for fact in chosen:                                            # follow one fact to the thing that it names
        links = [v for v in fact[1:] if v in w.things and v != name]
        more += [(v, r.choice(w.things[v][1])) for v in links if r.random() < .6]
    blocks = [("h1", name if kind != "animal" else f"The {name}"), ("p", " ".join(say(r, name, f) for f in chosen))]
    if more:
        blocks.append(("p", " ".join(say(r, v, f) for v, f in more)))
    depth = 1
    if kind in ("town", "river") and r.random() < .6:              # two facts and a difference: one step of reasoning
        river = name if kind == "river" else facts[0][1]
        i, j = r.sample(range(3), 2)
        blocks.append(("p", way_between(w, r, river, i, j)))
        depth = 2
    if kind == "region":
        blocks.append(("ul", [say(r, t, w.things[t][1][0]) for t in w.towns if w.things[t][1][0][2] == name]))
    return blocks, (2 + (len(chosen) + len(more) > 4), depth, 0)


def way_between(w: World, r: random.Random, river: str, i: int, j: int) -> str:
    s, t, m, n = distance(w, river, i, j)
    return r.choice([f"{s} is at mile {m} and {t} is at mile {n} of the {river}. ${m} - {n} = {m - n}$. The way is {m - n} miles.",
                     f"How far is it from {t} to {s}? On the {river} {s} is at mile {m} and {t} is at mile {n}. "
                     f"So the way is ${m} - {n} = {m - n}$ miles."])


def maths_topic(r: random.Random) -> tuple[str, str]:
    """(title, a short explanation with a small formula) of one topic."""
    a, b, c = r.randrange(2, 60), r.randrange(2, 60), r.randrange(2, 10)
    x, k = r.randrange(2, 13), r.randrange(2, 7)
    topics = [
        ("Adding numbers", f"To add two numbers, add the ones, then the tens, and so on. Here is a small case: ${a} + {b} = {a + b}$."),
        ("Sums of many numbers", f"Add the numbers from left to right. ${a} + {b} = {a + b}$ and ${a + b} + {c} = {a + b + c}$."),
        ("Taking away", f"To take a number away is to go back on the line. ${a + b} - {a} = {b}$, because ${a} + {b} = {a + b}$."),
        ("Times tables", f"A product is a sum of equal numbers. ${c} \\times {x} = {c * x}$ is {c} times {x}."),
        ("Long products", f"Split the number into tens and ones. ${10 * k} \\times {c} = {10 * k * c}$ and ${x} \\times {c} = {x * c}$. "
                          f"Then add: ${10 * k * c} + {x * c} = {10 * k * c + x * c}$."),
        ("Equations", f"Do the same on both sides. If ${k}x + {b} = {k * x + b}$, take {b} away: ${k}x = {k * x}$. "
                      f"Then divide by {k}: $x = {x}$."),
        ("Fractions", f"Divide the top and the bottom by the same number. $\\frac{{{x * k}}}{{{c * k}}} = \\frac{{{x}}}{{{c}}}$, "
                      f"because both can be divided by {k}."),
        ("The greatest common divisor", f"Take the rest again and again. {c * k} and {c * (k + 1)} have the rest {c}. "
                                        f"{c} divides both, so the greatest common divisor is {c}."),
        ("The rest of a division", f"Divide and keep the rest. {a} divided by {c} is {a // c} and the rest is {a % c}, "
                                   f"because ${c} \\times {a // c} + {a % c} = {a}$."),
        ("Powers", f"A power is a product of equal numbers. $x^{{2}} = x \\times x$, so with $x = {x}$ we get {x * x}."),
    ]
    return r.choice(topics)


def code_topic(r: random.Random) -> tuple[str, str, str]:
    """(title, explanation, snippet) of one topic; every snippet runs."""
    xs = [r.randrange(-9, 10) for _ in range(r.randrange(3, 6))]
    k = r.randrange(2, 8)
    topics = [
        ("Lists in Python", "A list holds many values. The first has the index 0.", f"xs = {xs}\nprint(xs[0])  # {xs[0]}"),
        ("The sum of a list", "The function `sum` adds all numbers of a list.", f"xs = {xs}\nprint(sum(xs))  # {sum(xs)}"),
        ("The largest number", "The function `max` finds the largest number, `min` the smallest.",
         f"xs = {xs}\nprint(max(xs), min(xs))  # {max(xs)} {min(xs)}"),
        ("A loop", "A `for` loop visits each value of a list. The body stands four spaces to the right.",
         f"total = 0\nfor x in {xs}:\n    total = total + x\nprint(total)  # {sum(xs)}"),
        ("Keep some numbers", "A list comprehension makes a new list. The part after `if` says which values to keep.",
         f"xs = {xs}\nxs = [x for x in xs if x > {k}]\nprint(xs)  # {[x for x in xs if x > k]}"),
        ("Change each number", "A list comprehension can change each value.",
         f"xs = {xs}\nprint([x * {k} for x in xs])  # {[x * k for x in xs]}"),
        ("Sort a list", "The function `sorted` gives a new list in order. The old list stays as it is.",
         f"xs = {xs}\nprint(sorted(xs))  # {sorted(xs)}"),
        ("Write a function", "A function starts with `def`. It gives its value back with `return`.",
         f"def f(x):\n    return x + {k}\n\nprint(f({xs[0]}))  # {xs[0] + k}"),
        ("Choose with if", "With `if` and `else` a program takes one of two ways.",
         f"def f(xs):\n    if not xs:\n        return {k}\n    return len(xs)\n\nprint(f({xs}))  # {len(xs)}"),
        ("The first numbers", "A slice takes a part of a list. `xs[:2]` holds the first two values, `xs[::2]` every second one.",
         f"xs = {xs}\nprint(xs[:2], xs[::2])  # {xs[:2]} {xs[::2]}"),
    ]
    return r.choice(topics)


INTRO = ["Here is a problem with its solution.", "Let us try one.", "Now an example.", "Read the problem, then the steps.",
         "This one was asked in class.", "We go step by step."]
OUTRO = ["Check the answer before you go on.", "Try it again without help.", "Can you see why each step is right?",
         "The next page has more.", "Take your time with each step."]


def lesson(r: random.Random, domain: str, problems: list):
    """A maths or code page: a short explanation, then worked problems with ordinary prose around some of them."""
    if domain == "maths":
        title, text = maths_topic(r)
        blocks = [("h1", title), ("p", text)]
    else:
        title, text, snippet = code_topic(r)
        blocks = [("h1", title), ("p", text), ("code", snippet)]
    if len(problems) > 1 and r.random() < .5:                      # some pages are only a list of problems
        blocks = [("h1", r.choice(["Worked problems", "More problems", "Practice"]))]
    for question, solution in problems:
        blocks += [("p", r.choice(INTRO))] if r.random() < .3 else []
        blocks += problem(question, solution)
    blocks += [("p", r.choice(OUTRO))] if r.random() < .2 else []
    return blocks, (3 if problems else 2, 3 if problems else 2, 0)


def forum(w: World, r: random.Random, domain: str, problems: list):
    """A thread: question, answers, thanks. On the world (two facts and a step), or on a maths or code problem."""
    hello = r.choice(["Hi all.", "Hello.", "I am new here.", "Good day."])
    thanks = r.choice(["Thank you, that helps.", "Now I see it. Thanks.", "I got the same answer."])
    if problems:
        what = {"maths": "sum", "code": "program"}[domain]
        ask = f"{hello} I do not know how to start with this {what}. Who can show me the steps?"
        posts = [[("p", ask)], problem(*problems[0]), [("p", thanks)]]
        return [("h1", f"Help with a {what}")] + [("post", p) for p in posts], (3, 3, 0)
    if r.random() < .6:
        river = r.choice(RIVERS)
        i, j = r.sample(range(3), 2)
        s, t, _, _ = distance(w, river, i, j)
        ask, answer, depth = f"How far is {t} from {s}?", way_between(w, r, river, i, j), 2
    else:
        p = r.choice(w.people)
        facts = {f[0]: f for f in w.things[p][1]}
        year, age = facts["died"][1:]
        ask, depth = f"How old was {p}?", 2
        answer = f"{say(r, p, facts['born'])} {p} died in {year}. ${year} - {year - age} = {age}$. So {p} was {age} years old."
    posts = [[("p", f"{hello} {ask}")], [("p", answer)], [("p", thanks)]]
    return [("h1", ask)] + [("post", p) for p in posts], (2, depth, 0)


def news(w: World, r: random.Random):
    town, other = r.sample(w.towns, 2)
    person, product, crop = r.choice(w.people), r.choice([t[0] for t in TRADES.values()]), r.choice(CROPS)
    day = f"day {r.randrange(1, 29)} of {r.choice(MONTHS)}"
    lines = [f"There was rain in {town} on {day}.", f"The market of {town} was full on {day}.", f"A new bridge was opened in {town}.",
             f"The price of {crop} went up by {r.randrange(2, 30)} coins.", f"{r.randrange(2, 90)} people came from {other}.",
             f"People say that {product} will cost more.", f"The road to {other} is closed.", "More news will follow.",
             f"A fire at the house of {person} was put out.", "No one was hurt."]
    return [("h1", f"News from {town}"), ("p", " ".join(r.sample(lines, r.randrange(3, 6))))], (1, 0, r.random() < .2)


def ads(w: World, r: random.Random):
    product, town = r.choice([t[0] for t in TRADES.values()]), r.choice(w.towns)
    lines = [f"Buy the best {product} in {town}!", f"Only {r.randrange(2, 40)} coins today!", "Call now!", f"Save {r.randrange(10, 70)} coins!",
             f"New {product} every day!", "Do not wait!", f"Free {r.choice(FOODS)} with each order!", "This offer ends soon!"]
    return [("h1", f"Best {product}"), ("p", " ".join(r.sample(lines, r.randrange(3, 7))))], (0, 0, 3)


def jobs(w: World, r: random.Random):
    trade, town = r.choice(list(TRADES)), r.choice(w.towns)
    lines = [f"The pay is {r.randrange(5, 60)} coins a day.", f"You must know how to use a {TRADES[trade][2]}.", "Food and a bed are free.",
             f"Work starts in {r.choice(MONTHS)}.", f"Write to {r.choice(w.people)}.", f"We need {r.randrange(2, 9)} strong people."]
    return ([("h1", f"Work for a {trade}"), ("p", f"We look for a {trade} in {town}. " + " ".join(r.sample(lines, r.randrange(2, 5))))],
            (1, 0, 1))


def shallow(w: World, r: random.Random):
    words = r.sample(["best", "page", "top", "list", "new", "free", "click", "here", "more", "good", "news", "links", "win"], 9)
    return [("h1", "Welcome"), ("p", " ".join(words * 2)), ("p", f"Page {r.randrange(999)} of {r.randrange(999)}.")], (0, 0, r.randrange(3))


# ---- the crawl --------------------------------------------------------------------------------------------------------

def deal(r: random.Random, items: list, slots: int) -> list[list]:
    """Spreads all items over the slots, about evenly; order shuffled by r. deal([1,2,3], 2) -> e.g. [[3, 1], [2]]."""
    order = r.sample(items, len(items))
    hands = [order[i::slots] for i in range(slots)]
    return r.sample(hands, slots)


def near_copy(r: random.Random, blocks: list, world: World) -> list:
    """What a mirror does: a line (or post) of its own on top or below, sometimes one sentence of the prose lost; problems untouched."""
    out = list(blocks)
    for i, (kind, body) in enumerate(out):
        sentences = re.split(r"(?<=\.) ", body) if kind == "p" and not body.startswith("Problem") and "\n" not in body else []
        if len(sentences) > 5 and r.random() < .3:
            sentences.pop(r.randrange(len(sentences)))
            out[i] = ("p", " ".join(sentences))
            break
    own = ("p", r.choice(["Copied with thanks.", "First seen on another site.", "Saved page."]))
    if any(kind == "post" for kind, _ in out):
        return out + [("post", [own])]
    return out[:1] + [own] + out[1:] if r.random() < .5 else out + [own]


def variant(url: str, r: random.Random) -> str:
    """The same address written in another way; data.dedup.canonical_url gives both the same key."""
    return r.choice([url + "/", url.replace("http://", "https://www."), url + "?utm_source=mail", url + "#top", url + "/index.html",
                     url.replace("http://", "HTTP://").replace(".", ".", 1) + "?fbclid=x1"])


def crawl(seed: int, pages: int, problems: dict[str, list[tuple[str, str]]], leaks: dict[str, list] | None = None) -> list[Page]:
    """`pages` original pages plus copies, in crawl order (shuffled). Every problem given is on some maths, code or forum page.

    problems: {"maths": [(question, solution)], "code": [...]}; leaks: the same for held-out problems, planted on 1% of
    the pages so that decontamination has something to find. Pages get longer when problems are many: about
    len(problems) / (0.3 * pages) on each.
    """
    w, r = make_world(seed), random.Random(f"crawl/{seed}")
    plan = [kind for kind, share in SHARES.items() for _ in range(round(share * pages))]
    plan += ["encyclopedia"] * (pages - len(plan))
    threads = {"maths": round(.04 * pages), "code": round(.03 * pages)}          # forum pages that hold a problem
    hands = {}
    for domain, n in threads.items():
        given = problems.get(domain, [])
        r.shuffle(given := list(given))
        on_threads = given[:n] if len(given) > n else []
        lessons = deal(r, given[len(on_threads):], max(1, plan.count(domain)))
        hands[domain] = (lessons, [[p] for p in on_threads])
    made = []
    for i, kind in enumerate(plan[:pages]):
        domain, leak = kind, False
        if kind in ("maths", "code"):
            mine = hands[kind][0].pop()
            blocks, scores = lesson(r, kind, mine)
        elif kind == "forum":
            domain = next((d for d in threads if hands[d][1]), "forum")
            mine = hands[domain][1].pop() if domain != "forum" else []
            blocks, scores = forum(w, r, domain, mine)
        else:
            blocks, scores = globals()[kind](w, r)
        if leaks and domain in ("maths", "code") and r.random() < LEAKS and leaks.get(domain):
            blocks, leak = blocks + problem(*r.choice(leaks[domain])), True
        url = f"http://{r.choice(HOSTS[kind])}/{kind}/{i}"
        made.append((Page(url, render(blocks, r), plain(blocks), domain, *map(int, scores), leak=leak), blocks))
    out = [p for p, _ in made]
    for _ in range(round(URL_VARIANTS * pages)):                   # the same page fetched again under another address
        i = r.randrange(pages)
        out.append(replace(made[i][0], url=variant(made[i][0].url, r), copy_of=i))
    for n in range(round(MIRRORS * pages)):                        # another host, another layout, almost the same words
        i = r.randrange(pages)
        page, blocks = made[i]
        blocks = near_copy(r, blocks, w)
        out.append(replace(page, url=f"http://mirror{n % 7}.frn/{n}", html=render(blocks, r), text=plain(blocks), copy_of=i))
    order = r.sample(range(len(out)), len(out))
    where = {old: new for new, old in enumerate(order)}
    return [replace(out[i], copy_of=where[out[i].copy_of] if out[i].copy_of >= 0 else -1) for i in order]


if __name__ == "__main__":
    sample = {"maths": [("Compute 17 + 25.", "7 + 5 = 12, carry 1.\n1 + 2 + 1 = 4.\nThe answer is \\boxed{42}.")] * 9,
              "code": [("Return the sum of xs.", "```python\ndef f(xs):\n    return sum(xs)\n```")] * 9}
    for page in [p for p in crawl(0, 60, sample) if p.domain in ("maths", "code")][:2]:
        print(page.url, page.html, "", page.text, sep="\n", end="\n\n")
