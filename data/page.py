"""
A web page as a list of its elements in document order, cleaned and measured; data/extract.py chooses from it.

Every node knows where its inside ends, so each step of extraction is one pass over a list: no recursion, and time in
proportion to the page, however it is nested.
"""
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import lxml.etree
import lxml.html
from lxml.html import HtmlElement

PARSER = lxml.etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)
MANY = 50_000                             # tags; a page has one in 30 characters, a bomb one in 4
DEEPEST = 2040                            # libxml2 drops what is nested deeper than 2,048
# our own marks, what XML does not have, soft hyphens and spaces without width
UNSEEN = re.compile("[\ue000-\ue005\x00-\x08\x0b\x0e-\x1f\xad\u200b\ufeff\ufffe\uffff\ud800-\udfff]")
BLOCKS = set("p div section article main h1 h2 h3 h4 h5 h6 ul ol table blockquote header figure dl body details form "
             "nav footer aside center fieldset address hr dialog figcaption".split())
LINES = {"li", "tr", "dt", "dd", "caption", "option"}


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


# ---- parsing --------------------------------------------------------------------------------------------------------

def parse(html: str, counts: Counter) -> Page:
    """The page as a list of elements, cleaned of what no browser shows."""
    html = UNSEEN.sub("", html)
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
    name = lambda node: f"{node.get('class', '')} {node.get('id', '')} {node.get('role', '')}"[:300].strip()
    names = [name(node) if node.keys() else "" for node in nodes]
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
    control = code < 0x20 and code not in (9, 10, 13) or code == 0x7f
    none = 0xd800 <= code < 0xe006 or code & 0xfffe == 0xfffe or code > 0x10ffff
    return "" if control or none else match[0]


# ---- measuring ------------------------------------------------------------------------------------------------------

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
