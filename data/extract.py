"""
HTML to text that keeps what reasoning data is made of: formulas, code with its indentation, forum threads.

Report section 2.1: common extractors lose equations and snippets, so MiMo wrote its own for maths, code and forum
pages. This is such an extractor on lxml alone. The order matters:

    1  hold formulas and code: their text is fixed before anything is removed; what a browser draws beside it goes
    2  measure every element: how much text, how much of it links, how much prose
    3  remove boilerplate, unless it holds a formula or code, or too much of the page's prose
    4  choose the posts of a thread, or the smallest element that holds the article
    5  render as text; when little of the page's prose is left, once more with the careful rules off

The page is a list of elements in document order with the end of each (`Page`): every step is one pass over it, and so
takes time in proportion to the page, however it is nested. Formulas: data/formulas.py. Charsets: data/charset.py.
Not covered, against the report: PDF; against larger extractors: AsciiMath, custom MathJax delimiters.

    python -m data.extract page.html        # prints the text, and on stderr what was counted

docs/data.md compares it with other extractors on four public page sets.
"""
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import lxml.etree
import lxml.html
from lxml.html import HtmlElement

import configurator
from data.charset import decode
from data.formulas import formula, name_of

# one character each, from the private use area: the borders of a placeholder, then the four kinds of break
OPEN, CLOSE, PARA, LINE, FENCE, BR = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004", "\ue005"
PARSER = lxml.etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)
MANY = 50_000                             # tags; a page has one in 30 characters, a bomb one in 4
DEEPEST = 2040                            # libxml2 drops what is nested deeper than 2,048
LANGUAGES = set("python c cpp java javascript js rust go bash sql html json text".split())
NEVER = set("script style svg iframe select head title template textarea object canvas datalist".split())
CHROME = set("nav footer aside form button noscript dialog".split())
BLOCKS = set("p div section article main h1 h2 h3 h4 h5 h6 ul ol table blockquote header figure dl body details form "
             "nav footer aside center fieldset address hr dialog figcaption".split())
CONTAINERS = set("div section article main td table tbody tr form center".split())
LINES = {"li", "tr", "dt", "dd", "caption", "option"}
# words in class, id or role: of boilerplate, of the posts of a thread, of line numbers, of drawn formulas
BOILERPLATE = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navigation|skip-?nav|menu|sidebar|footer|cookies?|banner|share|sharing|sharedaddy|social|"
    r"breadcrumbs?|related|ads?|advert|advertisement|promo|promotion|sponsor|sponsored|newsletter|signature|votes?|tags|"
    r"user-?info|profile|subscribe|subscription|popup|modal|overlay|pager|pagination|toc|edit-?link|editsection|"
    r"post-?menu|reputation|timestamp|recommended|recommendations?|trending|popular|most-?read|outbrain|taboola|"
    r"byline|author|author-?(?:box|bio|info)|meta|login|signup|sr-only|visually-?hidden|screen-?reader-?text|"
    r"donate|consent|gdpr|player|gallery|carousel|slideshow|disclaimer|copyright|read-?more|see-?also-?box|"
    r"jp-relatedposts|more-?stories|likes?|reactions?|rating|toolbar|masthead|topbar)(?:$|[\s_-])", re.I)
COMMENTS = re.compile(
    r"(?:^|\s)(?:comments?|comment-?list|comments?[-_]?(?:area|section|container|wrapper|block|box)|respond|disqus_thread|"
    r"disqus|discussion)(?:$|\s)", re.I)
ARTICLE = re.compile(
    r"(?:^|[\s_-])(?:article|story|entry|post|blog|news|page|main)[_-]{0,2}(?:body|content|text|inner)(?:$|[\s_-])|"
    r"(?:^|\s)(?:content|article|story|hentry|entry)(?:$|\s)", re.I)
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")              # relatedLinks -> related-Links
STRONG = re.compile(r"(?:^|[\s_-])(?:article|story|entry|post)[_-]{0,2}(?:body|content|text)(?:$|[\s_-])", re.I)
POST = re.compile(r"(?:^|\s)(?:postbody|post-text|post-content|comment-body|s-prose|message-body)(?:$|\s)")
GUTTER = re.compile(
    r"(?:^|\s)(?:linenos?|linenodiv|blob-num|line-numbers?-rows|gutter|hljs-ln-numbers|copy-?button)(?:$|\s)")
TWIN = re.compile(r"(?:^|\s)(?:MathJax(?:_\w+)?|katex-html|MJX_Assistive_MathML)(?:$|\s)")
HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)
PHRASE = re.compile(
    r"[\W_]*(?:log ?in|sign ?in|sign ?up|log ?out|register|subscribe|share(?: (?:this|on|it)(?: \w+)?)?|tweet|reply|print|email|"
    r"home|menu|search|close|comments?|advert(?:isement)?|newsletter|follow(?: us)?|like|facebook|twitter|whatsapp|pinterest|"
    r"linkedin|read more|see also|skip to (?:main )?content|related (?:articles|posts|stories|topics)|back to top|(?:leave|post|add)"
    r" a (?:comment|reply)|cancel reply|(?:privacy|cookie) policy|terms of (?:use|service)|contact us|all rights reserved|"
    r"anzeige|werbung|teilen|drucken|impressum|datenschutz|anmelden|suche|startseite|kommentare?|mehr zum thema|"
    r"compartir|publicidad|inicio|partager|publicité|accueil|imprimer)[\W_]*", re.I)
CODE_ROW = re.compile(r"(?:^|\s)(?:blob-code|hljs-ln-code)")                # a cell with one line of code
CODE_CELL = re.compile(r"(?:^|\s)(?:code|rouge-code|crayon-code)(?:$|\s)")  # a cell with all lines, beside the numbers


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("page",)
    page: str = ""                        # an HTML file


@dataclass
class Page:
    """A page's elements in document order, and what the steps find out about each. Node i holds nodes[i + 1:end[i]]."""
    nodes: list[HtmlElement]
    tags: list[str]
    names: list[str]                                         # what the page calls the element: class, id and role
    parent: list[int]
    end: list[int]
    held: dict[int, str] = field(default_factory=dict)       # node -> its text: formulas and code
    blocks: set[int] = field(default_factory=set)            # held nodes with a line of their own
    gone: dict[int, str] = field(default_factory=dict)       # removed with all inside -> what stands there instead
    own: list[int] = field(default_factory=list)             # characters of its first text, and of the text behind it
    after: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)           # the block whose text this is
    linked: list[bool] = field(default_factory=list)         # inside a link
    size: list[int] = field(default_factory=list)            # characters of text
    links: list[int] = field(default_factory=list)           # of these in links
    prose: list[int] = field(default_factory=list)           # of these in paragraphs
    comments: list[int] = field(default_factory=list)        # nodes that hold readers' comments and stay
    anchors: list[int] = field(default_factory=list)         # number of links
    kept: list[int] = field(default_factory=list)            # number of held nodes
    floor: int = 60                                          # characters from which a block counts as prose

    def outermost(self, start: int = 0) -> Iterator[int]:
        """The node and all inside it, in order; what is held or gone comes without what is inside it."""
        i, stop, end, held, gone = start, self.end[start], self.end, self.held, self.gone
        while i < stop:
            yield i
            i = end[i] if i in held or i in gone else i + 1

    def walk(self, start: int) -> Iterator[tuple[bool, int]]:
        """(True, i) where node i opens, (False, i) where it closes; not into what is held or gone."""
        opened: list[int] = []
        for i in self.outermost(start):
            while opened and self.end[opened[-1]] <= i:
                yield False, opened.pop()
            yield True, i
            opened.append(i)
        while opened:
            yield False, opened.pop()


# thresholds, chosen on one half of four public page sets (bench/extract.py --half=dev); docs/data.md has the other half
SPARED = 0.25       # an element with more of the page's prose than this is not removed for its tag or name
LINKED = 0.5        # ... unless more of its text than this is links
MENU = 0.7          # share of links over which a block is a menu, whatever its name
HOLDS = 0.6         # share of the prose that the chosen part must hold
ENOUGH = 0.3        # with less of the prose than this in the end, the careful rules are tried
NAMED = 0.5         # ... if its name says article and no other's does
THREAD = 0.75       # share of the prose that the posts of a thread must hold
RATHER = 0.5        # comments go when the rest has this share
LITTLE = 200        # characters of prose below which an element is no article
ALONE = 0.1         # share of the prose that the only element called article-body, entry-content ... must hold
LEAD = 0.5          # of the chosen part's prose may stand between the title and it
PRECIOUS = 0.9      # share of the formulas and code that the chosen part must hold
TEASER = 0.8        # share of links over which a paragraph only points elsewhere
DESCEND = 0.85      # a child with this share of the prose takes its parent's place


def extract(html: str | bytes, charset: str = "", counts: Counter | None = None) -> str:
    """
    The main text of a page: paragraphs with an empty line between them, `# title`, fenced code, $TeX$; "" for a page
    without text. Never raises.

    charset   what the HTTP header says, for bytes; data/charset.py decides
    counts    grows by what happened: how often a rule was refused, or a page was taken whole
    """
    counts = Counter() if counts is None else counts
    page = parse(decode(html, charset) if isinstance(html, bytes) else html, counts)
    hold(page)
    weigh(page)
    measure(page)
    if not page.prose[0]:                                # a page of short lines only: all its text counts
        page.floor = 1
        measure(page)
    fixed, total, best = dict(page.gone), page.prose[0], (0, "")
    for rules in ("all", "careful", "none"):
        page.gone = dict(fixed)
        refused = drop_boilerplate(page, rules)
        parts = main_parts(page)
        found = sum(page.prose[part] for part in parts)
        if found > 2 * best[0] or not best[1]:           # fewer rules only when they find far more
            best = (found, render(page, parts))
            counts.update(refused)
            if rules != "all" and best[1]:
                counts[f"rules left too little, taken with rules: {rules}"] += 1
        if best[1] and (best[0] >= ENOUGH * total or page.floor == 1):
            break
    return best[1]


# ---- the page -------------------------------------------------------------------------------------------------------

def parse(html: str, counts: Counter) -> Page:
    """The page as a list of elements, cleaned of what no browser shows."""
    html = re.sub("[\ue000-\ue005\x00-\x08\x0b\x0e-\x1f\xad\u200b\ufeff\ufffe\uffff\ud800-\udfff]", "", html)    # ours, and what XML has not
    html = re.sub(r"&#(?:(\d{1,9})|[xX]([0-9a-fA-F]{1,8}));?", entity, html)
    if html.count("<") > MANY and html.count("<") * 8 > len(html):
        counts["hardly anything but tags: taken as one paragraph"] += 1
        html = re.sub(r"<[^<>]*>", " ", html)
    page = listed(html)
    if page is None:
        counts["nested too deep: inline tags removed"] += 1
        page = listed(re.sub(r"</?(?:font|b|i|u|s|em|strong|span|small|big|center|tt)\b[^<>]*>", "", html, flags=re.I))
    if page is None:
        counts["nested too deep: taken as paragraphs"] += 1
        page = listed(re.sub(r"<[a-z][^<>]*>", "<p>", html, flags=re.I))
    return page


def listed(html: str) -> Page | None:
    """The elements of the body in document order. None when they are nested so deep that libxml2 drops some."""
    root = tree(html)
    body = root.find("body")
    nodes = [node for node in (root if body is None else body).iter() if isinstance(node.tag, str)]
    place = {node: i for i, node in enumerate(nodes)}
    parent = [0, *(place[node.getparent()] for node in nodes[1:])]
    end, depth = list(range(1, len(nodes) + 1)), [0] * len(nodes)
    for i in range(1, len(nodes)):
        depth[i] = depth[parent[i]] + 1
    if max(depth) >= DEEPEST:
        return None
    for i in range(len(nodes) - 1, 0, -1):
        end[parent[i]] = max(end[parent[i]], end[i])
    names = [f"{n.get('class', '')} {n.get('id', '')} {n.get('role', '')}"[:300].strip() if n.keys() else "" for n in nodes]
    return Page(nodes, [node.tag for node in nodes], names, parent, end)


def tree(html: str) -> HtmlElement:
    """lxml's tree, an empty one for a page without an element."""
    try:
        return lxml.html.document_fromstring(html.encode("utf-8", "replace"), parser=PARSER)
    except lxml.etree.LxmlError:
        return lxml.html.document_fromstring("<p></p>")


def entity(match: re.Match) -> str:
    """A numeric entity as a browser reads it: &#146; is cp1252's quote; none gives a control character or our marks."""
    code = int(match[1]) if match[1] else int(match[2], 16)
    if 0x80 <= code < 0xa0:
        return bytes([code]).decode("cp1252", "ignore")
    bad = code < 0x20 and code not in (9, 10, 13) or 0xd800 <= code < 0xe006 or code & 0xfffe == 0xfffe or code > 0x10ffff
    return "" if bad or code == 0x7f else match[0]


# ---- formulas and code ----------------------------------------------------------------------------------------------

def hold(page: Page) -> None:
    """
    Step 1: the text of every formula and code element is fixed, in page.held. No later step can break it. What a
    browser draws beside the source of a formula is gone.
    """
    drop_twins(page)
    code_tables(page)
    for i in page.outermost():
        node, tag = page.nodes[i], page.tags[i]
        if i in page.held or i in page.gone:
            continue
        if tag == "pre":
            drop_gutters(page, i)
            put(page, i, fence(page, i, code_text(page, i)), block=True)
        elif tag in ("code", "tt", "kbd"):
            drop_gutters(page, i)
            text = code_text(page, i).strip("\n")
            block = text.count("\n") > 1 and tag == "code"     # several lines: a block whose <pre> is missing
            put(page, i, fence(page, i, text) if block else f"`{text.strip()}`" if text.strip() else "", block)
        elif tag.endswith("math") or node.keys() and (tex := formula(node)):
            put(page, i, formula(node) if tag.endswith("math") else tex)
        elif tag in NEVER:
            page.gone[i] = " "
    for i in page.outermost():                           # after the formulas, which may stand inside
        if page.tags[i] in ("sup", "sub") and i not in page.held and i not in page.gone:
            text, mark = "".join(text_of(page, i)).strip(), "^" if page.tags[i] == "sup" else "_"
            put(page, i, mark + (text if len(text) == 1 else f"{{{text}}}") if text else "")


def put(page: Page, i: int, text: str, block: bool = False) -> None:
    """Fixes the text of node i."""
    page.held[i] = text
    if block:
        page.blocks.add(i)


def drop_twins(page: Page) -> None:
    """Drawn forms of formulas. MathJax 3 keeps up to three forms; the TeX for copying is the best of them."""
    i, nodes, tags = 0, page.nodes, page.tags
    while i < len(nodes):
        name, last = page.names[i], page.end[i]
        inside, drawn = range(i + 1, last), None
        if tags[i] == "mjx-container":
            copied = any("mjx-copytext" in page.names[j] for j in inside)
            twice = copied or any(name_of(nodes[j]) == "math" for j in inside)
            drawn = [j for j in inside if tags[j] == "mjx-assistive-mml" and copied
                     or tags[j] in ("mjx-math", "svg") and twice]
        elif "mwe-math-element" in name and last - i < 5000 and any(name_of(nodes[j]) == "math" for j in inside):
            drawn = [j for j in inside if tags[j] in ("img", "meta")]        # Wikipedia: MathML and its image
        elif name and TWIN.search(name) and i and last - i < 2000:
            drawn = [i]
        page.gone |= {j: "" for j in drawn or []}
        i = i + 1 if drawn is None else last


def code_tables(page: Page) -> None:
    """Tables that show code with line numbers: one cell beside the numbers (Pygments), or one row per line."""
    table, cells, done = [-1] * len(page.nodes), {}, 0
    for i, tag in enumerate(page.tags):
        table[i] = i if tag == "table" else table[page.parent[i]]
        if tag == "td" and table[i] >= 0 and (CODE_ROW.search(page.names[i]) or CODE_CELL.search(page.names[i])):
            cells.setdefault(table[i], []).append(i)
    for i in sorted(cells):
        if i < done:                                     # inside such a table
            continue
        drop_gutters(page, i)
        rows = [c for c in cells[i] if CODE_ROW.search(page.names[c])]
        pres = [j for c in cells[i] for j in [k for k in range(c, page.end[c]) if page.tags[k] == "pre"] or [c]]
        text = "\n".join(code_text(page, j).strip("\n") if rows else code_text(page, j) for j in rows or pres)
        put(page, i, fence(page, i, text), block=True)
        done = page.end[i]


def drop_gutters(page: Page, start: int) -> None:
    """Line numbers and copy buttons inside a code element are gone."""
    page.gone |= {i: "" for i in range(start + 1, page.end[start])
                  if page.tags[i] == "button" or GUTTER.search(page.names[i])}


def text_of(page: Page, start: int) -> Iterator[str]:
    """The pieces of text inside a node, in order."""
    for opens, i in page.walk(start):
        if opens and i not in page.gone:
            yield page.held.get(i, page.nodes[i].text or "")
        elif not opens and i != start:
            yield page.nodes[i].tail or ""


def code_text(page: Page, start: int) -> str:
    """The characters of a code element; <br> is a line break, and so are the borders of blocks: <div class=line>."""
    parts: list[str] = []
    border = begun = written = False                     # a block ends or begins here; the line has more than blanks
    for opens, i in page.walk(start):
        node = page.nodes[i]
        text = node.tail if not opens and i != start else node.text if opens and i not in page.gone else ""
        text = "\n" if opens and node.tag == "br" else text or ""
        block = i != start and (node.tag in BLOCKS or node.tag in LINES)
        if block and not opens and page.end[i] == i + 1 and not node.text:
            text = "\n" + text                          # an empty line
        border, begun = border or block, begun or block and opens
        if text:
            if written and (begun or border and not text.startswith("\n")):
                parts.append("\n")
            parts.append(text)
            line = text.rpartition("\n")[2]
            border, begun, written = False, False, bool(line.strip()) or written and "\n" not in text
    return "".join(parts)


def language(page: Page, start: int) -> str:
    """
    The language that a class of the element, of its <code> child or of a parent names; "" if none. Only LANGUAGES
    count: a class "code" names no language.
    """
    around = [start]
    while len(around) < 4 and around[-1]:
        around.append(page.parent[around[-1]])
    inside = [i for i in range(start, page.end[start]) if page.tags[i] in ("table", "div", "pre", "code")]
    for i in [*inside, *around[1:]]:
        for word in re.split(r"[\s_]+", page.nodes[i].get("class", "")):
            word = re.sub(r"^(?:language|lang|highlight-source|brush:?|source)-?", "", word).lower()
            if word in LANGUAGES:
                return word
    return ""


def fence(page: Page, start: int, code: str) -> str:
    """A fenced block with the code of the element; blanks at the ends of its lines are removed."""
    body = "\n".join(line.rstrip() for line in code.replace("\xa0", " ").split("\n")).strip("\n")
    return f"```{language(page, start)}\n{body}\n```" if body.strip() else ""


# ---- what is text, and what is boilerplate --------------------------------------------------------------------------

def weigh(page: Page) -> None:
    """What measure() adds up, which does not change when elements go: lengths of texts, their blocks, their links."""
    held, blocks = page.held, page.blocks
    for i, (node, tag, p) in enumerate(zip(page.nodes, page.tags, page.parent, strict=True)):
        page.own.append(weight(held[i] if i in held else node.text))
        page.after.append(weight(node.tail))
        border = i == 0 or tag in BLOCKS or tag in LINES or tag == "td" or i in blocks
        page.block.append(i if border else page.block[p])
        page.linked.append(tag == "a" or i > 0 and page.linked[p])


def weight(text: str | None) -> int:
    """Length without the blanks around; a Han character is half a word, and counts for two."""
    text = text.strip() if text else ""
    return len(text) if text.isascii() or max(text) < "\u2e80" else 2 * len(text)


def measure(page: Page) -> None:
    """Step 2: size, links, prose, anchors and kept of every node, without what is gone."""
    n, parent, gone, held = len(page.nodes), page.parent, page.gone, page.held
    size, links, prose, anchors, kept, run, run_links = ([0] * n for _ in range(7))
    dead = [False] * n                                   # inside what is gone or held
    for i, (own, after, block, linked, p) in enumerate(
            zip(page.own, page.after, page.block, page.linked, parent, strict=True)):
        dead[i] = i > 0 and (dead[p] or p in held or p in gone)
        if dead[i]:
            continue
        if i not in gone:
            size[i] += own
            run[block] += own
            anchors[i] = int(page.tags[i] == "a")
            kept[i] = int(i in held)
            if linked:
                links[i] += own
                run_links[block] += own
        if i and after:
            size[p] += after
            run[page.block[p]] += after
            if page.linked[p]:
                links[p] += after
                run_links[page.block[p]] += after
    for i in range(n):                                   # run: text between the borders of one block
        if run[i] >= page.floor and run_links[i] < run[i] / 2:
            prose[i] = run[i] - run_links[i]
    for i in range(n - 1, 0, -1):
        if size[i]:
            p = parent[i]
            size[p] += size[i]
            links[p] += links[i]
            prose[p] += prose[i]
            anchors[p] += anchors[i]
            kept[p] += kept[i]
    page.size, page.links, page.prose, page.anchors, page.kept = size, links, prose, anchors, kept


def link_share(page: Page, i: int) -> float:
    """Share of the text that is links, 0 for fewer than three links."""
    return page.links[i] / max(1, page.size[i]) if page.anchors[i] >= 3 else 0.0


def drop_boilerplate(page: Page, rules: str) -> Counter:
    """
    Step 3. -> how often each rule was refused. An element that holds a formula or code stays, whatever its class,
    unless half of its text is links (a menu may name a formula). So does one with much of the page's prose.
    """
    refused, article, comments = Counter(), -1, named_comments(page) if rules == "all" else []
    total = page.prose[0] - sum(page.prose[i] for i in comments)
    for i in page.outermost():
        if i == 0 or i in page.held or i in page.gone or rules == "none":
            continue
        if page.tags[i] in ("article", "main"):
            article = max(article, page.end[i])
        rule = boilerplate(page, i, rules, inside_article=i < article)
        if not rule or page.kept[i] and (rule == "links" or link_share(page, i) <= LINKED):
            continue
        much = page.prose[i] > (SPARED if page.floor > 1 else 0.5) * max(1, total)
        if much and (rule == "links" or link_share(page, i) <= LINKED):
            refused[f"not removed, much of the page: {rule}"] += 1
            continue
        page.gone[i] = " "
    measure(page)
    page.comments = comments
    if comments and page.prose[0] - sum(page.prose[i] for i in comments) >= RATHER * page.prose[0]:
        page.comments = [i for i in comments if page.kept[i]]
        page.gone |= {i: " " for i in comments if not page.kept[i]}
        measure(page)
    elif comments:
        refused["not removed, much of the page: comments"] += 1
    return refused


def named_comments(page: Page) -> list[int]:
    """The outermost elements that are called comments."""
    found: list[int] = []
    for i in page.outermost():
        if i and (not found or i >= page.end[found[-1]]) and page.names[i] and COMMENTS.search(page.names[i]):
            found.append(i)
    return found


def boilerplate(page: Page, i: int, rules: str, inside_article: bool) -> str:
    """The rule by which node i is boilerplate, "" by none."""
    node, tag = page.nodes[i], page.tags[i]
    if tag in CHROME or (tag == "header" and not inside_article):
        return "tag"
    if node.get("hidden") is not None or HIDDEN.search(node.get("style", "")[:1000]):
        return "hidden"
    if rules == "all" and page.names[i] and tag not in ("body", "main", "article") and is_boilerplate(page.names[i]):
        return "name"
    if tag in ("div", "ul", "ol", "table", "section") and link_share(page, i) > MENU:
        return "links"
    if tag in ("p", "div", "h4", "h5", "h6") and page.anchors[i] and page.links[i] > TEASER * page.size[i]:
        return "links"
    return ""


@lru_cache(maxsize=10_000)
def is_boilerplate(name: str) -> bool:
    """Whether a class, id or role says boilerplate; relatedLinks is read as related-Links."""
    return bool(BOILERPLATE.search(CAMEL.sub("-", name)))


def main_parts(page: Page) -> list[int]:
    """Step 4: the title and the posts of a thread; else the smallest element that holds most of the prose."""
    total, posts, headings, hints, strong = page.prose[0], [], [], [], []
    for i in page.outermost():
        tag, name = page.tags[i], page.names[i]
        if i in page.gone or i in page.held:
            continue
        if tag == "h1":
            headings.append(i)
        prop = page.nodes[i].get("itemprop")
        if prop == "text" or name and POST.search(name):
            if not posts or i >= page.end[posts[-1]]:
                posts.append(i)
        if tag in ("article", "main") or prop == "articleBody" or name.endswith(" main"):
            hints.append(i)
        if (prop == "articleBody" or name and STRONG.search(name)) and page.prose[i] >= LITTLE and (
                not strong or i >= page.end[strong[-1]]):
            strong.append(i)
    strong = [i for i in strong if not any(c <= i < page.end[c] for c in page.comments)]
    if len(posts) >= 2 and sum(page.prose[p] for p in posts) >= THREAD * total:
        apart = [h for h in [*hints, *strong] if not any(h <= p < page.end[h] or p <= h < page.end[p] for p in posts)]
        return [*headings[:1], *apart[:1], *posts]       # readers' comments under an article: the article too
    if len(strong) == 1 and page.prose[strong[0]] >= ALONE * (total - sum(page.prose[c] for c in page.comments)) \
            and page.kept[strong[0]] + sum(page.kept[c] for c in page.comments) >= PRECIOUS * page.kept[0]:
        inside = lambda c: strong[0] <= c < page.end[strong[0]] or c <= strong[0] < page.end[c]
        return with_lead(page, strong[0]) + [c for c in page.comments if not inside(c)]
    hints = [h for h in hints if page.prose[h] >= HOLDS * total and page.kept[h] >= PRECIOUS * page.kept[0]]
    if not total:
        return [max(hints, key=lambda h: page.size[h])] if hints else [0]
    best = hints[-1] if hints else 0
    while True:
        kids, j = [], best + 1
        while j < page.end[best]:
            kids.append(j)
            j = page.end[j]
        kids.sort(key=lambda k: -page.prose[k])
        if not kids or page.tags[kids[0]] not in CONTAINERS or kids[0] in page.held:
            return with_lead(page, best)
        share = page.prose[kids[0]] / page.prose[best]
        rival = any(page.prose[k] > 0.1 * page.prose[best] and ARTICLE.search(page.names[k]) for k in kids[1:])
        named = ARTICLE.search(page.names[kids[0]]) and not rival
        if share < (NAMED if named else DESCEND) or page.kept[kids[0]] < PRECIOUS * page.kept[best]:
            return with_lead(page, best)
        best = kids[0]


def with_lead(page: Page, best: int) -> list[int]:
    """The chosen element, after the title and the first paragraphs that stand between the title and it."""
    titles = [i for i in page.outermost() if i < best and page.tags[i] == "h1" and i not in page.gone]
    article = [i for i in page.outermost() if i < best < page.end[i] and page.tags[i] == "article"]
    start = (titles[-1:] or article[-1:] or [best])[0]
    found, i = titles[-1:], start + 1
    if titles: i = page.end[start]
    while i < best:
        if page.end[i] > best and i not in page.gone:                            # around the chosen element
            i += 1
            continue
        if page.prose[i] and i not in page.gone:
            found.append(i)
        i = page.end[i]
    return [*found, best] if sum(page.prose[i] for i in found) <= LEAD * page.prose[best] else [best]


# ---- the text -------------------------------------------------------------------------------------------------------

def render(page: Page, parts: list[int]) -> str:
    """Step 5: the text of these parts."""
    pieces, texts = [], []
    for part in parts:
        pieces.append(PARA)
        for opens, i in page.walk(part):
            if opens:
                open_tag(page, i, pieces, texts)
            else:
                close_tag(page, i, pieces)
                pieces.append((page.nodes[i].tail or "") if i != part else "")
        pieces.append(PARA)
    text = "\n".join(s for s in layout("".join(pieces)).split("\n") if len(s) > 60 or not PHRASE.fullmatch(s))
    return re.sub(f"{OPEN}(\\d+){CLOSE}", lambda m: texts[int(m.group(1))], re.sub("\n{3,}", "\n\n", text)).strip()


def open_tag(page: Page, i: int, pieces: list[str], texts: list[str]) -> None:
    """What stands before the children of an element."""
    tag = page.nodes[i].tag
    if i in page.gone:
        pieces.append(page.gone[i])
    elif i in page.held:
        if page.held[i]:
            mark = f"{OPEN}{len(texts)}{CLOSE}"
            texts.append(page.held[i])
            pieces.append(f"{FENCE}{mark}{FENCE}" if i in page.blocks else mark)
    else:
        start = "# " if tag == "h1" else "## " if tag in ("h2", "h3") else "- " if tag == "li" else ""
        pieces += [edge(tag), start, BR if tag == "br" else page.nodes[i].text or ""]


def close_tag(page: Page, i: int, pieces: list[str]) -> None:
    """What stands after the children of an element."""
    node = page.nodes[i]
    if i not in page.gone and i not in page.held:
        pieces.append(edge(node.tag))
        pieces.append(" | " if node.tag in ("td", "th") and node.getnext() is not None else "")


def edge(tag: str) -> str:
    """The break mark at both ends of an element."""
    return PARA if tag in BLOCKS else LINE if tag in LINES else ""


def layout(text: str) -> str:
    """Break marks -> newlines; white space as HTML means it; \\(TeX\\) and \\[TeX\\] -> dollars."""
    text = re.sub(r"[ \t\r\n\f]+", " ", text)            # HTML white space; a no-break space is text and stays
    text = re.sub(f" ?[{PARA}{LINE}{FENCE}{BR}][ {PARA}{LINE}{FENCE}{BR}]*", newlines, text)
    text = re.sub(r"(?<!\\)\\\(((?:[^\\\n]|\\[^()\n]){1,1000})\\\)", r"$\1$", text)    # one way to write TeX, not three
    text = re.sub(r"(?<!\\)\\\[((?:[^\\\n]|\\[^\[\]\n]){1,2000})\\\]", r"$$\1$$", text)
    return text.replace("\xa0", " ").strip()


def newlines(match: re.Match) -> str:
    """A run of break marks -> newlines: two between blocks, one before a fence or at a list item, one for each <br>."""
    run, brs = match.group().strip(), match.group().count(BR)
    if run.endswith(FENCE) or (FENCE in run and PARA not in run):
        return "\n" * min(2, brs + 1)
    return "\n" * min(2, 2 if PARA in run else brs + (LINE in run))


def main(cfg: Config) -> None:
    counts = Counter()
    print(extract(Path(cfg.page).read_bytes(), counts=counts))
    for what, n in counts.items():
        print(f"{n} x {what}", file=sys.stderr)


if __name__ == "__main__":
    configurator.run(main, Config)
