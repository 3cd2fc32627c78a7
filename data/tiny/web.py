"""
A small crawl of the invented world as HTML, with the truth about every page beside it.

Report section 2.1 starts from web dumps: good pages in many encodings, and advertisements, job posts, news, mirrors and
near-copies around them. Here each page is first a list of content blocks (data/tiny/pages.py); `text_of` gives the text
that a perfect extractor would find, `render` hides the blocks in a layout (menus, side bars, cookie banners) and in one
encoding of formulas and code. So extraction, dedup and tagging are tested against a known truth.

Worked problems are given as (question, solution) and must come out of extraction exactly, in the form

    Problem: {question}
    Solution: {solution}      (a solution that starts with a code fence begins on the next line)

    python -m data.tiny.web        # prints two pages: HTML, then the text that should come out
"""
import html
import math
import random
import re
import urllib.parse
from dataclasses import dataclass, replace

from configurator import UserError
from data.tiny.pages import SIMPLE, forum, lesson, near_copy, problem_blocks, text_of
from data.tiny.world import REGIONS, make_world

# share of each kind among the original pages [ours]; copies and second fetches are added to them
SHARES = {"encyclopedia": 0.22, "maths": 0.27, "code": 0.21, "forum": 0.10, "news": 0.08, "ads": 0.06, "jobs": 0.04,
          "shallow": 0.02}
# of the original pages: fetched again under another address, mirrored, and holding a held-out problem [ours]
URL_VARIANTS, MIRRORS, LEAKS = 0.08, 0.08, 0.01
PER_PAGE = 4                 # problems on a maths or code page, on average at most [ours]
# an answer mark: \boxed{...} with one level of braces inside
BOXED = r"\\boxed\{(?:[^{}$\n]|\{[^{}$\n]*\})*\}"
HOSTS = {"encyclopedia": ["wiki.ard", "atlas.brn"], "maths": ["sums.edu", "numberclub.ard"],
         "code": ["learnpy.dov", "snippets.cel"], "forum": ["ask.est", "boards.frn"], "news": ["daily.ard"],
         "ads": ["deals.brn"], "jobs": ["work.cel"], "shallow": ["links.dov"]}


@dataclass(frozen=True)
class Page:
    """One fetched page with the truth about it. The tags are what a teacher would give it."""
    url: str
    html: str
    text: str                # what a perfect extractor finds
    domain: str              # tag: one of data.tag.DOMAINS
    quality: int             # tag, 0 to 3
    depth: int               # tag: of the reasoning, 0 to 3
    ad: int                  # tag, 0 to 3
    copy_of: int = -1        # the index of the original page, -1 for an original
    leak: bool = False       # holds a held-out problem


# ---- formulas and code as real pages have them ----------------------------------------------------------------------

def to_mathml(tex: str) -> str:
    """The few TeX forms that our prose uses (numbers, letters, + - = \\times, \\frac, ^{}) as MathML."""
    out, names = [], {"\\times": "×", "\\div": "÷", "-": "−"}
    row = lambda s: f"<mrow>{to_mathml(s)}</mrow>"
    pattern = r"\\frac\{[^{}]*\}\{[^{}]*\}|\w\^\{\w+\}|\\boxed\{[^{}]*\}|\\\w+|\d+|[a-zA-Z]|[^\s\w]"
    for token in re.findall(pattern, tex):
        if m := re.fullmatch(r"\\frac\{(.*)\}\{(.*)\}", token):
            out.append(f"<mfrac>{row(m[1])}{row(m[2])}</mfrac>")
        elif m := re.fullmatch(r"(\w)\^\{(.*)\}", token):
            out.append(f"<msup>{row(m[1])}{row(m[2])}</msup>")
        elif m := re.fullmatch(r"\\boxed\{(.*)\}", token):
            out.append(f"<menclose notation='box'>{row(m[1])}</menclose>")
        else:
            tag = "mn" if token.isdigit() else "mi" if token.isalpha() else "mo"
            out.append(f"<{tag}>{html.escape(names.get(token, token))}</{tag}>")
    return "".join(out)


def exact_mathml(tex: str) -> bool:
    """True when MathML without annotation gives exactly this TeX back; richer formulas keep their TeX source."""
    term = r"(?:\\frac\{\w+\}\{\w+\}|[a-z]\^\{\w+\}|\d+|[a-z])"
    return bool(re.fullmatch(rf"{term}(?: (?:\\times|[+\-=]) {term})*", tex))


def encode_formula(tex: str, way: str) -> str:
    """
    One formula in one of the web's seven encodings. Drawn twins hold garbled text, which an extractor must not return.
    """
    e, drawn = html.escape(tex), html.escape(re.sub(r"[\\{}^]", " ", tex))
    tree = f"<math>{to_mathml(tex)}</math>"
    source = f"<annotation encoding='application/x-tex'>{e}</annotation>"
    note = f"<math><semantics><mrow>{to_mathml(tex)}</mrow>{source}</semantics></math>"
    return {
        "tex": "\\(" + e + "\\)",
        "mathml": tree if exact_mathml(tex) else note,
        "annotated": note,
        "mathjax2": f"<span class='MathJax_Preview'></span><span class='MathJax'><nobr>{drawn}</nobr></span>"
                    f"<script type='math/tex'>{tex}</script>",
        "mathjax3": f"<mjx-container class='MathJax'><mjx-math aria-hidden='true'>{drawn}</mjx-math>"
                    f"<mjx-assistive-mml>{note}</mjx-assistive-mml></mjx-container>",
        "katex": f"<span class='katex'><span class='katex-mathml'>{note}</span>"
                 f"<span class='katex-html' aria-hidden='true'>{drawn}</span></span>",
        "image": f"<img class='tex' src='/latex.php?latex={urllib.parse.quote(tex)}' alt='{e}'>",
    }[way]


def inline(text: str, way: str) -> str:
    """
    Text with $TeX$, bare \\boxed{} and `code` -> HTML. Line breaks, doubled and leading spaces survive as <br> and
    no-break spaces.
    """
    out = []
    for part in re.split(rf"(\$[^$\n]+\$|{BOXED}|`[^`\n]+`)", text):
        tex = part.startswith("$") and part.endswith("$") and len(part) > 2 and part[1:2] != " "
        if tex and "  " not in part:
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
    """
    A code block as sites show it: plain, hljs spans, a Pygments table with line numbers, one table row per line, or
    <br> in <pre>.
    """
    e = html.escape(source, quote=False)
    lines = e.split("\n")
    if way == "hljs":
        e = re.sub(r"\b(def|return|for|in|if|else|while)\b", r"<span class='hljs-keyword'>\1</span>", e)
        return f"<pre><code class='hljs language-python'>{e}\n</code></pre>"
    if way == "pygments":
        numbers = "\n".join(str(i + 1) for i in range(len(lines)))
        return ("<table class='highlighttable'><tr>"
                f"<td class='linenos'><div class='linenodiv'><pre>{numbers}</pre></div></td>"
                f"<td class='code'><div class='highlight language-python'><pre>{e}\n</pre></div></td></tr></table>")
    if way == "rows":
        rows = (f"<tr><td class='blob-num'>{i + 1}</td><td class='blob-code'>{line}</td></tr>"
                for i, line in enumerate(lines))
        return "<table class='highlight language-python'>" + "".join(rows) + "</table>"
    if way == "br":
        return "<pre class='brush: python'>" + "<br>".join(lines) + "</pre>"
    return f"<pre><code class='language-python'>{e}</code></pre>"


# ---- a page ---------------------------------------------------------------------------------------------------------

def blocks_html(blocks: list, r: random.Random, maths: str, code: str) -> str:
    """Blocks -> HTML in these encodings; the class of a post is left open as {post}."""
    out = []
    for kind, body in blocks:
        if kind == "code":
            out.append(encode_code(body, code))
        elif kind == "ul":
            out.append("<ul>" + "".join(f"<li>{inline(x, maths)}</li>\n" for x in body) + "</ul>")
        elif kind == "post":
            user = r.choice(["mira", "finn", "otter9", "hal"])
            meta = f"<div class='user-info'>{user} said on day {r.randrange(30)}</div>"
            meta += f"<div class='vote'>{r.randrange(40)} votes</div>" if r.random() < 0.5 else ""
            out.append(f"<div class='post'>{meta}<div class='{{post}}'>{blocks_html(body, r, maths, code)}</div>"
                       "<div class='signature'>all sums are fun</div>"
                       "<div class='post-menu'><a>share</a> <a>edit</a></div></div>")
        else:
            out.append(inline(body, maths) if kind == "tight" else f"<{kind}>{inline(body, maths)}</{kind}>")
    return "\n".join(out)


def render(blocks: list, r: random.Random) -> str:
    """Blocks -> a page: one of three layouts, one formula encoding, one code encoding, boilerplate all around."""
    maths = r.choice(["tex", "mathml", "annotated", "mathjax2", "mathjax3", "katex", "image"])
    code = r.choice(["plain", "hljs", "pygments", "rows", "br"])
    body = blocks_html(blocks, r, maths, code).replace("{post}", r.choice(["postbody", "s-prose", "comment-body"]))
    title = next((b[1] for b in blocks if b[0] == "h1"), "Page")
    menu = r.sample(["home", "about", "shop", "login", "help", "forum", "news"], 4)
    links = "".join(f"<a href='/{w}'>{w}</a> " for w in menu)
    side = "".join(f"<li><a href='/p{r.randrange(99)}'>{x}</a></li>" for x in r.sample(REGIONS, 3))
    banner = "<div class='cookie-banner'>We use cookies to make this site better. <button>Accept</button></div>"
    advert = "<div class='ad-box'>Buy now and save half of the price.</div>" if r.random() < 0.5 else ""
    head = (f"<!doctype html><html><head><title>{html.escape(title)}</title><style>p {{ margin: 1em }}</style>"
            "<script>track('visit');</script></head><body>")
    foot = "<footer>All rights reserved. Contact us. Terms of use.</footer></body></html>"
    kind = r.randrange(3)
    if kind == 0:
        return (f"{head}<nav>{links}</nav><article>{body}</article>"
                f"<aside><h3>Related pages</h3><ul>{side}</ul></aside>{advert}{banner}{foot}")
    if kind == 1:
        return (f"{head}<header><p>The site of good pages</p></header>"
                f"<div class='sidebar'><ul>{side}</ul></div>{banner}"
                f"<main>{advert}<div class='breadcrumb'><a>home</a> &gt; <a>pages</a></div>{body}</main>{foot}")
    return (f"{head}<div id='menu'>{links}</div><div class='content'>{body}{advert}</div>"
            f"<div><a href='/a'>next page</a> <a href='/b'>last page</a> <a href='/c'>top</a></div>{banner}{foot}")


# ---- the crawl ------------------------------------------------------------------------------------------------------

def crawl(seed: int, pages: int, problems: dict[str, list[tuple[str, str]]],
          leaks: dict[str, list[tuple[str, str]]] | None = None) -> list[Page]:
    """
    `pages` original pages plus copies, in the order of the crawl (shuffled).

    problems   {"maths": [(question, solution)], "code": [...]}; each is on some maths, code or forum page. Maths and
               code pages are added when there would be more than PER_PAGE problems on each
    leaks      the same for held-out problems; planted on 1% of the pages, for decontamination to find

    UserError when the crawl has no page of a kind that has problems.
    """
    w, r = make_world(seed), random.Random(f"crawl/{seed}")
    plan = [kind for kind, share in SHARES.items() for _ in range(round(share * pages))]
    plan = plan[:pages] + ["encyclopedia"] * (pages - len(plan))
    on_pages, on_threads = {}, {}                    # domain -> problems of each page, or thread, that is still to come
    for domain, threads in {"maths": round(0.04 * pages), "code": round(0.03 * pages)}.items():
        pairs = list(problems.get(domain, []))
        r.shuffle(pairs)
        if pairs and domain not in plan:
            raise UserError(f"crawl of {pages} pages has no {domain} page to hold the problems: take 20 or more")
        n = threads if len(pairs) > threads else 0
        on_threads[domain], rest = [[p] for p in pairs[:n]], pairs[n:]
        plan += [domain] * (math.ceil(len(rest) / PER_PAGE) - plan.count(domain))
        on_pages[domain] = spread(r, rest, max(1, plan.count(domain)))
    originals = []
    for i, kind in enumerate(plan):
        domain, leak = kind, False
        if kind in ("maths", "code"):
            blocks, scores = lesson(r, kind, on_pages[kind].pop())
        elif kind == "forum":
            domain = next((d for d in on_threads if on_threads[d]), "forum")
            blocks, scores = forum(w, r, domain, on_threads[domain].pop() if domain != "forum" else [])
        else:
            blocks, scores = SIMPLE[kind](w, r)
        if leaks and domain in ("maths", "code") and r.random() < LEAKS and leaks.get(domain):
            secret = problem_blocks(*r.choice(leaks[domain]))
            blocks, leak = blocks + ([("post", secret)] if kind == "forum" else secret), True
        url = f"http://{r.choice(HOSTS[kind])}/{kind}/{i}"
        page = Page(url, render(blocks, r), text_of(blocks), domain, *map(int, scores), leak=leak)
        originals.append((page, blocks))
    fetched = with_copies(r, originals)
    order = r.sample(range(len(fetched)), len(fetched))
    place = {old: new for new, old in enumerate(order)} | {-1: -1}
    return [replace(fetched[i], copy_of=place[fetched[i].copy_of]) for i in order]


def spread(r: random.Random, items: list, groups: int) -> list[list]:
    """All items in `groups` lists of about equal length, shuffled: [1, 2, 3] and 2 -> e.g. [[3, 1], [2]]."""
    order = r.sample(items, len(items))
    lists = [order[i::groups] for i in range(groups)]
    return r.sample(lists, groups)


def with_copies(r: random.Random, originals: list[tuple[Page, list]]) -> list[Page]:
    """The (page, blocks) given, then second fetches under other addresses, then mirrors; copy_of: index of the page."""
    pages = [p for p, _ in originals]
    for _ in range(round(URL_VARIANTS * len(originals))):
        i = r.randrange(len(originals))
        pages.append(replace(originals[i][0], url=variant(originals[i][0].url, r), copy_of=i))
    for n in range(round(MIRRORS * len(originals))):         # another host, another layout, almost the same words
        i = r.randrange(len(originals))
        page, blocks = originals[i]
        blocks = near_copy(r, blocks)
        pages.append(replace(page, url=f"http://mirror{n % 7}.frn/{n}", html=render(blocks, r), text=text_of(blocks),
                             copy_of=i))
    return pages


def variant(url: str, r: random.Random) -> str:
    """The same address in another spelling; data.dedup.canonical_url gives both the same key."""
    return r.choice([
        url + "/",
        url.replace("http://", "https://www."),
        url + "?utm_source=mail",
        url + "#top",
        url + "/index.html",
        url.replace("http://", "HTTP://") + "?fbclid=x1",
    ])


if __name__ == "__main__":
    examples = {"maths": [("Compute 17 + 25.", "7 + 5 = 12.\n1 + 1 + 2 = 4.\nThe answer is \\boxed{42}.")],
                "code": [("Return the sum of xs.", "```python\ndef f(xs):\n    return sum(xs)\n```")]}
    for page in [p for p in crawl(0, 60, examples) if "Problem:" in p.text][:2]:
        print(page.url, page.html, "", page.text, sep="\n", end="\n\n")
