"""
HTML to text that keeps what reasoning data is made of: formulas, code with its indentation, forum threads.

Report section 2.1: common extractors lose equations and snippets, so MiMo wrote its own for maths, code and forum
pages. This is such an extractor on lxml alone. The order matters:

    1  hold formulas and code: their text is fixed before anything is removed; what a browser draws beside it goes
    2  measure every element: how much text, how much of it links, how much prose
    3  remove boilerplate, unless it holds a formula or code, or too much of the page's prose
    4  choose the posts of a thread, or the smallest element that holds the article
    5  render as text; when too little of the page's prose is left, again with fewer rules

The page as a list and its measures: data/page.py; formulas: data/formulas.py; charsets: data/charset.py. Every deletion
looks at how much of the page it takes, and whatever is refused or undone is counted.
Not covered, against the report: PDF; against larger extractors: AsciiMath, custom MathJax delimiters.

    python -m data.extract page.html        # prints the text, and on stderr what was counted

docs/data.md compares it with other extractors on four public page sets.
"""
import re
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import configurator
from data.charset import decode
from data.formulas import formula, name_of
from data.page import BLOCKS, LINES, Page, measure, parse, weigh
from data.text import for_stdout

# one character each, from the private use area: the borders of a placeholder, then the four kinds of break
OPEN, CLOSE, PARA, LINE, FENCE, BR = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004", "\ue005"
LANGUAGES = set("python c cpp java javascript js rust go bash sql html json text".split())
NEVER = set("script style svg iframe select head title template textarea object canvas datalist".split())
CHROME = set("nav footer aside form button noscript dialog".split())
NOT_NAMED = set("main article table tbody tr".split())       # a row of class "player-7" is a row
CONTAINERS = set("div section article main td table tbody tr form center".split())
# words in class, id or role: of boilerplate, of the posts of a thread, of line numbers, of drawn formulas
BOILERPLATE = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navigation|skip-?nav|menu|sidebar|footer|cookies?|banner|share|sharing|sharedaddy|"
    r"social|breadcrumbs?|related|ads?|advert|advertisement|promo|promotion|sponsor|sponsored|newsletter|signature|votes?|"
    r"tags|user-?info|profile|subscribe|subscription|popup|modal|overlay|pager|pagination|toc|edit-?link|editsection|"
    r"post-?menu|reputation|timestamp|recommended|recommendations?|trending|popular|most-?read|outbrain|taboola|"
    r"byline|author|author-?(?:box|bio|info)|meta|login|signup|sr-only|visually-?hidden|screen-?reader-?text|"
    r"donate|consent|gdpr|(?:video|audio|media)-?player|gallery|carousel|slideshow|disclaimer|copyright|read-?more|see-?also-?box|"
    r"jp-relatedposts|more-?stories|likes?|reactions?|rating|toolbar|masthead|topbar)(?:$|[\s_-])", re.I)
COMMENTS = re.compile(
    r"(?:^|\s)(?:comments?|comment-?list|comments?[-_]?(?:area|section|container|wrapper|block|box)|respond|"
    r"disqus_thread|disqus|discussion)(?:$|\s)", re.I)
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
# a line that is nothing but a button's label or a heading of what was removed
PHRASE = re.compile(
    r"[\W_]*(?:log ?in|sign ?in|sign ?up|log ?out|register|subscribe|share(?: (?:this|on|it)(?: \w+)?)?|tweet|reply|"
    r"print|email|home|menu|search|close|comments?|advert(?:isement)?|newsletter|follow(?: us)?|like|facebook|twitter|"
    r"whatsapp|pinterest|linkedin|read more|see also|skip to (?:main )?content|related (?:articles|posts|stories)|"
    r"back to top|(?:leave|post|add) a (?:comment|reply)|cancel reply|(?:privacy|cookie) policy|"
    r"terms of (?:use|service)|contact us|all rights reserved|improve this (?:answer|question)|"
    r"anzeige|werbung|teilen|drucken|impressum|datenschutz|anmelden|suche|startseite|kommentare?|mehr zum thema|"
    r"compartir|publicidad|inicio|partager|publicité|accueil|imprimer)[\W_]*", re.I)
CODE_ROW = re.compile(r"(?:^|\s)(?:blob-code|hljs-ln-code)")                # a cell with one line of code
CODE_CELL = re.compile(r"(?:^|\s)(?:code|rouge-code|crayon-code)(?:$|\s)")  # a cell with all lines, beside the numbers


# Thresholds, chosen on one half of four public page sets (bench/extract.py --half=dev); numbers of the other half are
# in docs/data.md. Prose: text in blocks of 60 characters or more, less than half of it links.
SPARED = 0.25       # an element with more of the page's prose than this is not removed
LINKED = 0.5        # share of links over which a menu that names a formula goes all the same
MENU = 0.7          # share of links over which a block is a menu, whatever its name
TEASER = 0.8        # share of links over which a paragraph only points elsewhere
RATHER = 0.5        # readers' comments go when the rest has this share of the prose
THREAD = 0.75       # share of the prose that the posts of a thread must hold
LITTLE = 200        # characters of prose below which an element is no article
ALONE = 0.1         # share of the prose that the only element called article-body, entry-content ... must hold
HOLDS = 0.6         # share of the prose that an <article> or <main> must hold
DESCEND = 0.85      # a child with this share of the prose takes its parent's place ...
NAMED = 0.5         # ... or with this share, if its name says article and no other's does
PRECIOUS = 0.9      # share of the formulas and code that the chosen part must hold
LEAD = 0.5          # of the chosen part's prose may stand between the title and it
ENOUGH = 0.3        # with less of the prose than this in the end, the page is tried with fewer rules


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("page",)
    page: str = ""                        # an HTML file


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
    for rules in ("all", "careful", "none")[:3 if page.floor > 1 else 2]:
        page.gone = dict(fixed)
        refused = drop_boilerplate(page, rules)
        parts = main_parts(page)
        found = sum(page.prose[part] for part in parts)
        if found > 2 * best[0] or not best[1]:           # fewer rules only when they find far more
            best = (found, render(page, parts))
            counts.update(refused)
            if rules != "all" and best[1]:
                counts[f"too little left, taken with rules: {rules}"] += 1
        if best[1] and (best[0] >= ENOUGH * total or page.floor == 1):
            break
    if best[0] < total / 2 and page.floor > 1:
        counts["chosen part with under half of the prose"] += 1
    return best[1]


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
        elif "mwe-math-element" in name:                 # Wikipedia: MathML and its image, or the image alone
            twice = any(name_of(nodes[j]) == "math" for j in inside)
            drawn = [j for j in inside if tags[j] in ("img", "meta") and twice]
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
        if page.floor == 1 and (page.tags[i] == "nav" or link_share(page, i) > LINKED):
            much = False                                 # on a page of short lines a menu may be the most of it
        if much:
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
    if rules == "all" and page.names[i] and tag not in NOT_NAMED and is_boilerplate(page.names[i]):
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
    """
    Step 4: the title and the posts of a thread; else the only element that is called an article's text; else the
    smallest element that holds most of the prose, with what leads to it. Formulas and code are not left out by this.
    """
    titles, posts, articles, texts = [], [], [], []
    for i in page.outermost():
        tag, name, prop = page.tags[i], page.names[i], page.nodes[i].get("itemprop")
        if i in page.gone or i in page.held:
            continue
        if tag == "h1":
            titles.append(i)
        if prop == "text" or name and POST.search(name):
            posts += [i] if not posts or i >= page.end[posts[-1]] else []
        if tag in ("article", "main") or prop == "articleBody" or name.endswith(" main"):
            articles.append(i)
        if (prop == "articleBody" or name and STRONG.search(name)) and page.prose[i] >= LITTLE:
            texts += [i] if not texts or i >= page.end[texts[-1]] else []
    if len(posts) >= 2 and sum(page.prose[p] for p in posts) >= THREAD * page.prose[0]:
        # readers' comments under an article: the article too, as the element outside the posts with most prose
        outside = (i for i in page.outermost() if not overlaps(page, i, posts))
        apart = max(outside, key=lambda i: page.prose[i], default=0)
        article = [apart] if page.prose[apart] >= min(LITTLE, page.prose[0] / 10) and apart not in titles else []
        return [*titles[:1], *article, *posts]
    texts = [i for i in texts if not overlaps(page, i, page.comments)]
    if len(texts) == 1 and page.kept[texts[0]] + sum(page.kept[c] for c in page.comments) >= PRECIOUS * page.kept[0] \
            and page.prose[texts[0]] >= ALONE * (page.prose[0] - sum(page.prose[c] for c in page.comments)):
        return with_lead(page, texts[0]) + page.comments
    articles = [i for i in articles if page.prose[i] >= HOLDS * page.prose[0]
                and page.kept[i] >= PRECIOUS * page.kept[0]]
    if not page.prose[0]:
        return articles[:1] or [0]
    return with_lead(page, smallest(page, articles[-1] if articles else 0))


def overlaps(page: Page, i: int, others: list[int]) -> bool:
    """Whether node i lies in one of these nodes, or one in it. They are in order, and none lies in another."""
    k = bisect(others, i)
    return k > 0 and page.end[others[k - 1]] > i or k < len(others) and others[k] < page.end[i]


def smallest(page: Page, best: int) -> int:
    """From an element down to the smallest one inside that still holds most of its prose and its formulas."""
    while True:
        children, j = [], best + 1
        while j < page.end[best]:
            children.append(j)
            j = page.end[j]
        first, *rest = sorted(children, key=lambda k: -page.prose[k]) or [best]
        if first in page.held or page.tags[first] not in CONTAINERS or first == best:
            return best
        rival = any(page.prose[k] > 0.1 * page.prose[best] and ARTICLE.search(page.names[k]) for k in rest)
        need = NAMED if ARTICLE.search(page.names[first]) and not rival else DESCEND
        if page.prose[first] < need * page.prose[best] or page.kept[first] < PRECIOUS * page.kept[best]:
            return best
        best = first


def with_lead(page: Page, best: int) -> list[int]:
    """The chosen element, after the title and the first paragraphs that stand between the title and it."""
    before = [i for i in page.outermost() if i < best and i not in page.gone]
    titles = [i for i in before if page.tags[i] == "h1"][-1:]
    article = [i for i in before if page.tags[i] == "article" and best < page.end[i]][-1:]
    found = list(titles)
    i = page.end[titles[0]] if titles else article[0] + 1 if article else best
    while i < best:
        if page.end[i] > best and i not in page.gone:    # it lies around the chosen element
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
    print(for_stdout(extract(Path(cfg.page).read_bytes(), counts=counts)))
    for what, n in counts.items():
        print(f"{n} x {what}", file=sys.stderr)


if __name__ == "__main__":
    configurator.run(main, Config)
