"""
HTML to text that keeps what reasoning data is made of: formulas, code with its indentation, forum threads.

Report section 2.1: common extractors lose equations and snippets, so MiMo wrote its own for maths, code and forum
pages. This is such an extractor on lxml alone. The order matters:

    1  delete the drawn twins of formulas (what a browser shows beside the TeX source)
    2  put placeholders in the place of formulas and code
    3  remove boilerplate, unless it holds a placeholder
    4  choose the posts of a thread, or the article
    5  render as text
    6  put formulas and code back

Not covered, against the report: PDF; against larger extractors: AsciiMath, custom MathJax delimiters, nested tables.

    python -m data.extract page.html        # prints the text

1,000 to 2,000 small pages a second on one slow core; docs/data.md compares it with other extractors.
"""
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import lxml.etree
import lxml.html
from lxml.html import HtmlElement

import configurator

# one character each, from the private use area: the borders of a placeholder, then the four kinds of break
OPEN, CLOSE, PARA, LINE, FENCE, BR = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004", "\ue005"
PARSER = lxml.etree.HTMLParser(encoding="utf-8", remove_comments=True)
LANGUAGES = set("python c cpp java javascript js rust go bash sql html json text".split())
DROP_TAGS = set("script style nav footer aside form button noscript iframe svg select head title".split())
BLOCKS = set("p div section article main h1 h2 h3 h4 h5 h6 ul ol table blockquote header figure dl body "
             "details".split())
SYMBOLS = {"×": "\\times", "÷": "\\div", "·": "\\cdot", "−": "-", "≤": "\\le", "≥": "\\ge", "≠": "\\ne", "π": "\\pi",
           "∑": "\\sum", "∫": "\\int", "∞": "\\infty", "≡": "\\equiv", "→": "\\to", "\u2062": "", "\u2061": ""}
# words in class, id or role: of boilerplate, of the posts of a thread, of line numbers, of drawn formulas
BOILERPLATE = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navigation|skip-?nav|menu|sidebar|footer|cookies?|banner|share|social|"
    r"breadcrumbs?|related|ads?|advert|promo|sponsor|newsletter|signature|votes?|tags|user-?info|profile|"
    r"subscribe|popup|pager|toc|edit-?link|post-?menu|reputation|timestamp)(?:$|[\s_-])", re.I)
POST = re.compile(r"(?:^|\s)(?:postbody|post-text|post-content|comment-body|s-prose|message-body)(?:$|\s)")
GUTTER = re.compile(
    r"(?:^|\s)(?:linenos?|linenodiv|blob-num|line-numbers?-rows|gutter|hljs-ln-numbers|copy-?button)(?:$|\s)")
TWIN = re.compile(r"(?:^|\s)(?:MathJax(?:_\w+)?|katex-html|MJX_Assistive_MathML)(?:$|\s)")


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("page",)
    page: str = ""                        # an HTML file


def extract(html: str | bytes) -> str:
    """
    The main text of a page: paragraphs with an empty line between them, `# title`, fenced code, $TeX$; "" for a page
    without text. Bytes that are not UTF-8 become replacement characters: a crawl holds such pages.
    """
    html = html.decode("utf-8", "replace") if isinstance(html, bytes) else html
    html = re.sub("[\ue000-\ue005\x00-\x08\x0b\x0e-\x1f]", "", html)     # a page must not hold our own marks
    if not html.strip():
        return ""
    root = lxml.html.document_fromstring(html.encode("utf-8", "replace"), parser=PARSER)
    root = root.find("body") if root.find("body") is not None else root
    for node in twins(root):
        if node.getparent() is not None:
            replace(node, "")
    held: list[str] = []
    hold(root, held)
    drop_boilerplate(root)
    pieces: list[str] = []
    for part in main_parts(root):
        pieces.append(PARA)
        render(part, pieces)
        pieces.append(PARA)
    text = layout("".join(pieces))
    for _ in range(3):                                   # the text of a placeholder may hold a placeholder itself
        text = re.sub(f"{OPEN}(\\d+){CLOSE}", lambda m: held[int(m.group(1))], text)
    return text


# ---- formulas -------------------------------------------------------------------------------------------------------

def mathml_to_tex(node: HtmlElement) -> str:
    """MathML -> TeX: <mfrac><mn>1</mn><mi>x</mi></mfrac> -> \\frac{1}{x}. An unknown tag gives its children."""
    tag = node.tag.rsplit(":")[-1] if isinstance(node.tag, str) else ""
    kids = [mathml_to_tex(k) for k in node if isinstance(k.tag, str) and "annotation" not in k.tag]
    text = (node.text or "").strip()
    if tag in ("mi", "mn", "mo", "mtext"):
        text = SYMBOLS.get(text, text)
        operator = tag == "mo" and text not in "()[]|,!'"        # "a + b", but "f(x)"
        return f" {text} " if operator else text
    if tag == "mfrac" and len(kids) == 2:
        return f"\\frac{{{kids[0].strip()}}}{{{kids[1].strip()}}}"
    if tag in ("msup", "msub", "munder", "mover") and len(kids) == 2:
        return f"{kids[0].strip()}{'^' if tag in ('msup', 'mover') else '_'}{{{kids[1].strip()}}}"
    if tag in ("msubsup", "munderover") and len(kids) == 3:
        return f"{kids[0].strip()}_{{{kids[1].strip()}}}^{{{kids[2].strip()}}}"
    if tag == "msqrt":
        return f"\\sqrt{{{''.join(kids).strip()}}}"
    if tag == "menclose":
        return f"\\boxed{{{''.join(kids).strip()}}}"
    if tag == "mtr":
        return " & ".join(k.strip() for k in kids) + " \\\\ "
    return (text if not kids else "") + "".join(kids)


def dollars(tex: str, display: bool = False) -> str:
    """
    TeX in the form it has in our text, $TeX$ or $$TeX$$. A lone \\boxed{...} marks an answer and gets no dollars, since
    verifiers look for it in this form.
    """
    tex = " ".join(tex.split())
    if re.fullmatch(r"\\boxed\{(?:[^{}]|\{[^{}]*\})*\}", tex):
        return tex
    return f"$${tex}$$" if display else f"${tex}$"


def displayed(node: HtmlElement) -> bool:
    """Whether a formula has a line of its own: <math display=block>, the wrappers of KaTeX and MathJax 3."""
    near = [node, *list(node.iterancestors())[:4]]
    return any(n.get("display") in ("block", "true") or "katex-display" in n.get("class", "") for n in near)


def formula(node: HtmlElement) -> str | None:
    """The TeX of a <script type=math/tex>, <math> or image of a formula, with dollars; None for any other element."""
    if node.tag == "script":
        kind = node.get("type", "")
        return dollars(node.text or "", "mode=display" in kind) if kind.startswith("math/tex") else None
    if node.tag == "math":
        for note in node.iter("annotation"):             # KaTeX, MathJax and Wikipedia keep the TeX source here
            if "tex" in note.get("encoding", ""):
                tex = re.sub(r"^\{\\displaystyle (.*)\}$", r"\1", (note.text or "").strip(), flags=re.S)
                return dollars(tex, displayed(node))
        return dollars(node.get("alttext") or mathml_to_tex(node), displayed(node))
    if node.tag == "img":
        src, alt = node.get("src", ""), node.get("alt", "")
        if "codecogs" in src or "latex.php" in src:
            query = urlsplit(src).query
            return dollars(alt or (parse_qs(query).get("latex") or [unquote(query)])[0])
        if re.search(r"(?:^|\s)(?:tex|latex|mwe-math\S*)(?:$|\s)", node.get("class", "")):
            return dollars(alt)
    return None


# ---- code -----------------------------------------------------------------------------------------------------------

def code_text(node: HtmlElement) -> str:
    """The characters of a code element; <br> is a line break, gutters (line numbers) are left out."""
    if not isinstance(node.tag, str) or GUTTER.search(node.get("class", "")):
        return ""
    parts = ["\n" if node.tag == "br" else node.text or ""]
    for kid in node:
        parts += [code_text(kid), kid.tail or ""]
    return "".join(parts)


def language(node: HtmlElement) -> str:
    """
    The language that a class of the element, of its <code> child or of a parent names; "" if none. Only LANGUAGES
    count: a class "code" names no language.
    """
    for element in [*node.iter("table", "div", "pre", "code"), *list(node.iterancestors())[:3]]:
        for word in re.split(r"[\s_]+", element.get("class", "")):
            word = re.sub(r"^(?:language|lang|highlight-source|brush:?|source)-?", "", word).lower()
            if word in LANGUAGES:
                return word
    return ""


def fence(node: HtmlElement, code: str) -> str:
    """A fenced block with the code of the element; blanks at the ends of its lines are removed."""
    body = "\n".join(line.rstrip() for line in code.replace("\xa0", " ").split("\n")).strip("\n")
    return f"```{language(node)}\n{body}\n```"


# ---- the tree -------------------------------------------------------------------------------------------------------

def replace(node: HtmlElement, text: str) -> None:
    """
    Puts text in the place of the element. lxml keeps the text that follows an element in its `tail`, which has to stay
    in the tree when the element goes.
    """
    parent, before = node.getparent(), node.getprevious()
    text += node.tail or ""
    if before is not None:
        before.tail = (before.tail or "") + text
    else:
        parent.text = (parent.text or "") + text
    parent.remove(node)


def twins(root: HtmlElement) -> list[HtmlElement]:
    """Step 1: drawn forms of formulas. MathJax 3 keeps up to three forms; the TeX for copying is the best of them."""
    drawn = []
    for node in root.iter():
        if node.tag == "mjx-container":
            copy = any("mjx-copytext" in el.get("class", "") for el in node.iter("span"))
            drawn += [el for el in node if el.tag == "mjx-math" or (copy and el.tag == "mjx-assistive-mml")]
        elif isinstance(node.tag, str) and TWIN.search(node.get("class", "")):
            drawn.append(node)
    return drawn


def hold(root: HtmlElement, held: list[str]) -> None:
    """
    Step 2: formula or code number n becomes the placeholder OPEN n CLOSE, and its text is appended to `held`. No later
    step can break it.
    """
    def put(node: HtmlElement, text: str, block: bool = False) -> None:
        mark = f"{OPEN}{len(held)}{CLOSE}"
        held.append(text)
        replace(node, f"{FENCE}{mark}{FENCE}" if block else mark)

    for node in list(root.iter("table")):                # code with line numbers
        if node.getparent() is None:
            continue
        rows = list(cells(node, r"(?:^|\s)(?:blob-code|hljs-ln-code)"))         # one row per line
        code = list(cells(node, r"(?:^|\s)(?:code|rouge-code)(?:$|\s)"))        # one cell beside the numbers (Pygments)
        if rows:
            put(node, fence(node, "\n".join(code_text(c).strip("\n") for c in rows)), block=True)
        elif code:
            blocks = [code_text(pre) for c in code for pre in (c.findall(".//pre") or [c])]
            put(node, fence(node, "\n".join(blocks)), block=True)
    for node in list(root.iter("pre")):
        put(node, fence(node, code_text(node)), block=True)
    for node in list(root.iter("code", "tt", "kbd")):
        put(node, f"`{code_text(node).strip()}`")
    for node in list(root.iter("script", "math", "img")):
        text = formula(node) if node.getparent() is not None else None
        if text:
            put(node, text)
    for node in list(root.iter("sup", "sub")):
        text = "".join(node.itertext()).strip()
        if text:
            put(node, ("^" if node.tag == "sup" else "_") + (text if len(text) == 1 else f"{{{text}}}"))


def cells(table: HtmlElement, classes: str) -> Iterator[HtmlElement]:
    """The <td> of a table whose class matches."""
    return (c for c in table.iter("td") if re.search(classes, c.get("class", "")))


def link_share(node: HtmlElement) -> float:
    """Share of the text that is links, 0 for fewer than three links. Over .7 it is a menu, whatever its class."""
    links = node.findall(".//a")
    if len(links) < 3:
        return 0.0
    size = lambda el: len("".join("".join(el.itertext()).split()))
    return sum(map(size, links)) / max(1, size(node))


def drop_boilerplate(root: HtmlElement) -> None:
    """
    Step 3. An element that holds a placeholder stays, whatever its class, unless half of its text is links (a menu may
    name a formula). A header inside an article stays too.
    """
    blocks = ("div", "ul", "ol", "table", "section")
    for node in list(root.iter(*blocks, "header", "span", "p", "h2", "h3", "a", "td", *DROP_TAGS)):
        if node.getparent() is None:
            continue
        named = BOILERPLATE.search(f"{node.get('class', '')} {node.get('id', '')} {node.get('role', '')}")
        header = node.tag == "header" and not any(a.tag in ("article", "main") for a in node.iterancestors())
        named = named or header or node.tag in DROP_TAGS or "hidden" in node.attrib
        if not named and not (node.tag in blocks and link_share(node) > 0.7):
            continue
        protected = OPEN in "".join(node.itertext()) and node.tag not in ("script", "style", "head")
        if not protected or (named and link_share(node) > 0.5):
            replace(node, " ")


def main_parts(root: HtmlElement) -> list[HtmlElement]:
    """Step 4: the title and the posts of a thread; else the article; else the body."""
    posts = [n for n in root.iter() if n.get("itemprop") in ("text", "articleBody") or POST.search(n.get("class", ""))]
    posts = [p for p in posts if not any(a in posts for a in p.iterancestors())]
    if len(posts) >= 2:
        return [*list(root.iter("h1"))[:1], *posts]
    articles = [n for n in root.iter() if n.tag in ("article", "main") or n.get("role") == "main"]
    return articles[:1] or [root]


# ---- the text -------------------------------------------------------------------------------------------------------

def render(node: HtmlElement, pieces: list[str]) -> None:
    """Step 5: appends the element's text with break marks, which layout() turns into newlines."""
    edge = PARA if node.tag in BLOCKS else LINE if node.tag in ("li", "tr", "dt", "dd") else ""
    start = "# " if node.tag == "h1" else "## " if node.tag in ("h2", "h3") else "- " if node.tag == "li" else ""
    pieces += [edge, start, BR if node.tag == "br" else node.text or ""]
    for kid in node:
        if isinstance(kid.tag, str):
            render(kid, pieces)
            pieces.append(" | " if kid.tag in ("td", "th") and kid.getnext() is not None else "")
        pieces.append(kid.tail or "")
    pieces.append(edge)


def layout(text: str) -> str:
    """Break marks -> newlines; white space as HTML means it; \\(TeX\\) and \\[TeX\\] -> dollars."""
    text = re.sub(r"[ \t\r\n\f]+", " ", text)            # HTML white space; a no-break space is text and stays
    text = re.sub(f" ?[{PARA}{LINE}{FENCE}{BR}][ {PARA}{LINE}{FENCE}{BR}]*", newlines, text)
    text = re.sub(r"\\\(([^\n]{1,1000}?)\\\)", r"$\1$", text)    # one way to write TeX in the corpus, not three
    text = re.sub(r"\\\[(.{1,2000}?)\\\]", r"$$\1$$", text)
    return text.replace("\xa0", " ").strip()


def newlines(match: re.Match) -> str:
    """A run of break marks -> newlines: two between blocks, one before a fence or at a list item, one for each <br>."""
    run, brs = match.group().strip(), match.group().count(BR)
    if run.endswith(FENCE) or (FENCE in run and PARA not in run):
        return "\n" * min(2, brs + 1)
    return "\n" * min(2, 2 if PARA in run else brs + (LINE in run))


def main(cfg: Config) -> None:
    print(extract(Path(cfg.page).read_bytes()))


if __name__ == "__main__":
    configurator.run(main, Config)
