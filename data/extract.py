"""HTML to text that keeps what reasoning data is made of: formulas, code with its indentation, forum threads.

Report section 2.1: common extractors lose equations and snippets, so MiMo wrote its own for maths, code and
forum pages. This is such an extractor on lxml alone. The order matters: (1) delete the drawn twins of
formulas, (2) hold formulas and code as placeholders, (3) remove boilerplate unless it holds one, (4) choose
posts or the article, (5) render, (6) restore. Left out against the report: PDF; against larger extractors:
AsciiMath, custom MathJax delimiters, nested tables.

    python -m data.extract page.html        # prints the text
    1,000 to 2,000 small pages a second on one slow core; docs/data.md compares it with plain lxml text
"""

import re
import sys
from urllib.parse import parse_qs, unquote, urlsplit

import lxml.etree
import lxml.html

# one character each, from the private use area: placeholder borders, then the three kinds of line break
OPEN, CLOSE, PARA, LINE, FENCE, BR = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004", "\ue005"
PARSER = lxml.etree.HTMLParser(encoding="utf-8", remove_comments=True)
LANGUAGES = set("python c cpp java javascript js rust go bash sql html json text".split())
DROP_TAGS = set("script style nav footer aside form button noscript iframe svg select head title".split())
BOILER = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navigation|skip-?nav|menu|sidebar|footer|cookies?|banner|share|social|"
    r"breadcrumbs?|related|ads?|advert|promo|sponsor|newsletter|signature|votes?|tags|user-?info|profile|"
    r"subscribe|popup|pager|toc|edit-?link|post-?menu|reputation|timestamp)(?:$|[\s_-])",
    re.I,
)
POST = re.compile(r"(?:^|\s)(?:postbody|post-text|post-content|comment-body|s-prose|message-body)(?:$|\s)")
GUTTER = re.compile(
    r"(?:^|\s)(?:linenos?|linenodiv|blob-num|line-numbers?-rows|gutter|hljs-ln-numbers|copy-?button)(?:$|\s)"
)
TWIN = re.compile(r"(?:^|\s)(?:MathJax(?:_\w+)?|katex-html|MJX_Assistive_MathML)(?:$|\s)")
BLOCKS = set(
    (
        "p div section article main h1 h2 h3 h4 h5 h6 ul ol table blockquote header figure dl body details"
    ).split()
)
SYMBOLS = {
    "×": "\\times",
    "÷": "\\div",
    "·": "\\cdot",
    "−": "-",
    "≤": "\\le",
    "≥": "\\ge",
    "≠": "\\ne",
    "π": "\\pi",
    "∑": "\\sum",
    "∫": "\\int",
    "∞": "\\infty",
    "≡": "\\equiv",
    "→": "\\to",
    "\u2062": "",
    "\u2061": "",
}


# ---- formulas


def mathml_to_tex(node) -> str:
    """MathML element -> TeX. <mfrac><mn>1</mn><mi>x</mi></mfrac> -> \\frac{1}{x}; <msup> -> x^{2}; unknown
    tags: children."""
    tag = node.tag.rsplit(":")[-1] if isinstance(node.tag, str) else ""
    kids = [mathml_to_tex(k) for k in node if isinstance(k.tag, str) and "annotation" not in k.tag]
    text = (node.text or "").strip()
    if tag in ("mi", "mn", "mo", "mtext"):
        text = SYMBOLS.get(text, text)
        operator = tag == "mo" and text not in "()[]|,!'"  # "a + b", but "f(x)"
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
    """TeX -> how it stands in the text. A lone \\boxed{...} is the mark of an answer and stays bare, as
    verifiers read it."""
    tex = " ".join(tex.split())
    if re.fullmatch(r"\\boxed\{(?:[^{}]|\{[^{}]*\})*\}", tex):
        return tex
    return f"$${tex}$$" if display else f"${tex}$"


def displayed(node) -> bool:
    """Whether a formula has a line of its own: <math display=block>, the wrappers of KaTeX and MathJax 3."""
    near = [node, *list(node.iterancestors())[:4]]
    return any(n.get("display") in ("block", "true") or "katex-display" in n.get("class", "") for n in near)


def formula(node) -> str | None:
    """The TeX of a <script type=math/tex>, <math> or formula image, with dollars; None when the node is
    none of these."""
    if node.tag == "script":
        kind = node.get("type", "")
        return dollars(node.text or "", "mode=display" in kind) if kind.startswith("math/tex") else None
    if node.tag == "math":
        for note in node.iter("annotation"):  # KaTeX, MathJax and Wikipedia keep the TeX source here
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


# ---- code


def code_text(node) -> str:
    """The characters of a code element; <br> is a line break, gutters (line numbers) are left out."""
    if not isinstance(node.tag, str) or GUTTER.search(node.get("class", "")):
        return ""
    parts = ["\n" if node.tag == "br" else node.text or ""]
    for kid in node:
        parts += [code_text(kid), kid.tail or ""]
    return "".join(parts)


def language(node) -> str:
    """Language named in the classes of the element, its <code> child or its parents; white-listed, as
    'code' is no language."""
    for el in [*node.iter("table", "div", "pre", "code"), *list(node.iterancestors())[:3]]:
        for word in re.split(r"[\s_]+", el.get("class", "")):
            word = re.sub(r"^(?:language|lang|highlight-source|brush:?|source)-?", "", word).lower()
            if word in LANGUAGES:
                return word
    return ""


def fence(node, lines: str) -> str:
    body = "\n".join(line.rstrip() for line in lines.replace("\xa0", " ").split("\n")).strip("\n")
    return f"```{language(node)}\n{body}\n```"


# ---- the tree


def replace(node, text: str) -> None:
    """Puts text in the place of the element; lxml keeps the text after an element in its tail, so that has
    to move too."""
    parent, before = node.getparent(), node.getprevious()
    text += node.tail or ""
    if before is not None:
        before.tail = (before.tail or "") + text
    else:
        parent.text = (parent.text or "") + text
    parent.remove(node)


def twins(root) -> list:
    """Step 1: drawn forms of formulas. MathJax 3 keeps up to three forms; the TeX for copying is best."""
    drawn = []
    for node in root.iter():
        if node.tag == "mjx-container":
            copy = any("mjx-copytext" in el.get("class", "") for el in node.iter("span"))
            drawn += [el for el in node if el.tag == "mjx-math" or (copy and el.tag == "mjx-assistive-mml")]
        elif isinstance(node.tag, str) and TWIN.search(node.get("class", "")):
            drawn.append(node)
    return drawn


def hold(root, kept: list[str]) -> None:
    """Step 2: formulas and code become placeholders OPEN n CLOSE; nothing after this can break them."""

    def put(node, text, block=False):
        mark = f"{OPEN}{len(kept)}{CLOSE}"
        kept.append(text)
        replace(node, f"{FENCE}{mark}{FENCE}" if block else mark)

    for node in list(root.iter("table")):  # line-number tables: a Pygments cell or one row per line
        if node.getparent() is None:
            continue
        rows = [
            c for c in node.iter("td") if re.search(r"(?:^|\s)(?:blob-code|hljs-ln-code)", c.get("class", ""))
        ]
        cells = [
            c
            for c in node.iter("td")
            if re.search(r"(?:^|\s)(?:code|rouge-code)(?:$|\s)", c.get("class", ""))
        ]
        if rows:
            put(node, fence(node, "\n".join(code_text(c).strip("\n") for c in rows)), block=True)
        elif cells:
            put(
                node,
                fence(node, "\n".join(code_text(pre) for c in cells for pre in (c.findall(".//pre") or [c]))),
                block=True,
            )
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


def link_share(node) -> float:
    """Share of the text that is links, 0 for fewer than three links. Over .7: a menu, whatever its class."""
    links = node.findall(".//a")
    if len(links) < 3:
        return 0.0
    size = lambda el: len("".join("".join(el.itertext()).split()))
    return sum(map(size, links)) / max(1, size(node))


def drop_boilerplate(root) -> None:
    """Step 3. Elements that hold protected text stay, whatever they are called, unless half of their text is
    links (a menu may name a formula); so does a header inside an article."""
    blocks = ("div", "ul", "ol", "table", "section")
    for node in list(root.iter(*blocks, "header", "span", "p", "h2", "h3", "a", "td", *DROP_TAGS)):
        if node.getparent() is None:
            continue
        named = BOILER.search(f"{node.get('class', '')} {node.get('id', '')} {node.get('role', '')}")
        header = node.tag == "header" and not any(a.tag in ("article", "main") for a in node.iterancestors())
        named = named or header or node.tag in DROP_TAGS or "hidden" in node.attrib
        if not named and not (node.tag in blocks and link_share(node) > 0.7):
            continue
        protected = OPEN in "".join(node.itertext()) and node.tag not in ("script", "style", "head")
        if not protected or (named and link_share(node) > 0.5):
            replace(node, " ")


def choose(root) -> list:
    """Step 4: the title and the posts of a thread; else the article; else the body."""
    posts = [
        n
        for n in root.iter()
        if n.get("itemprop") in ("text", "articleBody") or POST.search(n.get("class", ""))
    ]
    posts = [p for p in posts if not any(a in posts for a in p.iterancestors())]
    if len(posts) >= 2:
        return [*list(root.iter("h1"))[:1], *posts]
    main = [n for n in root.iter() if n.tag in ("article", "main") or n.get("role") == "main"]
    return main[:1] or [root]


def render(node, out: list[str]) -> None:
    """Step 5: text with break marks; layout() turns the marks into newlines."""
    edge = PARA if node.tag in BLOCKS else LINE if node.tag in ("li", "tr", "dt", "dd") else ""
    out += [
        edge,
        "# " if node.tag == "h1" else "## " if node.tag in ("h2", "h3") else "- " if node.tag == "li" else "",
        BR if node.tag == "br" else node.text or "",
    ]
    for kid in node:
        if isinstance(kid.tag, str):
            render(kid, out)
            out.append(" | " if kid.tag in ("td", "th") and kid.getnext() is not None else "")
        out.append(kid.tail or "")
    out.append(edge)


def breaks(match: re.Match) -> str:
    """A run of break marks -> newlines: two between blocks, one before a fence or beside a list item, one
    for each <br>."""
    run, brs = match.group().strip(), match.group().count(BR)
    if run.endswith(FENCE) or (FENCE in run and PARA not in run):
        return "\n" * min(2, brs + 1)
    return "\n" * min(2, 2 if PARA in run else brs + (LINE in run))


def layout(text: str) -> str:
    text = re.sub(r"[ \t\r\n\f]+", " ", text)  # HTML white space; a no-break space is text and survives
    text = re.sub(f" ?[{PARA}{LINE}{FENCE}{BR}][ {PARA}{LINE}{FENCE}{BR}]*", breaks, text)
    text = re.sub(r"\\\(([^\n]{1,1000}?)\\\)", r"$\1$", text)  # one way to write TeX in the corpus, not three
    text = re.sub(r"\\\[(.{1,2000}?)\\\]", r"$$\1$$", text)
    return text.replace("\xa0", " ").strip()


def extract(html: str | bytes) -> str:
    """Main text of a page: paragraphs apart by an empty line, `# title`, fenced code, $TeX$; '' for a page
    without text.

    Source: report 2.1. Bytes that are not UTF-8 are read with replacement characters, as a crawl holds such
    pages."""
    html = html.decode("utf-8", "replace") if isinstance(html, bytes) else html
    html = re.sub("[\ue000-\ue005\x00-\x08\x0b\x0e-\x1f]", "", html)  # nobody else may write our marks
    if not html.strip():
        return ""
    root = lxml.html.document_fromstring(html.encode("utf-8", "replace"), parser=PARSER)
    root = root.find("body") if root.find("body") is not None else root
    for node in twins(root):
        if node.getparent() is not None:
            replace(node, "")
    kept: list[str] = []
    hold(root, kept)
    drop_boilerplate(root)
    out: list[str] = []
    for part in choose(root):
        out.append(PARA)
        render(part, out)
        out.append(PARA)
    text = layout("".join(out))
    for _ in range(3):  # a formula may sit in a placeholder's own text
        text = re.sub(f"{OPEN}(\\d+){CLOSE}", lambda m: kept[int(m.group(1))], text)
    return text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m data.extract page.html")
    with open(sys.argv[1], "rb") as f:
        print(extract(f.read()))
