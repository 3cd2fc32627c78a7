"""A small crawl of the invented world as HTML, with the truth about every page beside it.

Report section 2.1 starts from web dumps: good pages in many encodings, and advertisements, job posts, news,
mirrors and near-copies around them. Here each page is first a list of content blocks (data/tiny/pages.py);
`plain` gives the text a perfect extractor would find, `render` hides it in a layout (menus, side bars, cookie
banners) and a formula or code encoding. So extraction, dedup and tagging are tested against a known truth.

Worked problems come from outside as (question, solution) strings and must come out of extraction exactly:
    Problem: {question}\nSolution: {solution}      (a solution that starts with a code fence on the next line)

Try:  python -m data.tiny.web        # prints two pages: HTML, then the text that should come out
"""

import html
import math
import random
import re
import urllib.parse
from dataclasses import dataclass, replace

from data.tiny.pages import SIMPLE, forum, lesson, near_copy, plain, problem
from data.tiny.world import REGIONS, make_world

# share of each kind among the original pages [ours]; copies and URL variants come on top
SHARES = {
    "encyclopedia": 0.22,
    "maths": 0.27,
    "code": 0.21,
    "forum": 0.10,
    "news": 0.08,
    "ads": 0.06,
    "jobs": 0.04,
    "shallow": 0.02,
}
# an answer mark: \\boxed{...} with one level of braces inside
BOXED = r"\\boxed\{(?:[^{}$\n]|\{[^{}$\n]*\})*\}"
# of the original pages: fetched again under another address, mirrored, and holding a held-out problem [ours]
URL_VARIANTS, MIRRORS, LEAKS = 0.08, 0.08, 0.01
HOSTS = {
    "encyclopedia": ["wiki.ard", "atlas.brn"],
    "maths": ["sums.edu", "numberclub.ard"],
    "code": ["learnpy.dov", "snippets.cel"],
    "forum": ["ask.est", "boards.frn"],
    "news": ["daily.ard"],
    "ads": ["deals.brn"],
    "jobs": ["work.cel"],
    "shallow": ["links.dov"],
}


@dataclass(frozen=True)
class Page:
    """One fetched page. text: what a perfect extractor finds. copy_of: the index of the original, -1 for an
    original. domain, quality 0-3, depth 0-3 (reasoning), ad 0-3: what a teacher would say of it. leak:
    holds a held-out problem."""

    url: str
    html: str
    text: str
    domain: str
    quality: int
    depth: int
    ad: int
    copy_of: int = -1
    leak: bool = False


# ---- formulas and code in the ways of real pages


def to_mathml(tex: str) -> str:
    """The few TeX forms our prose uses (numbers, letters, + - = \\times, \\frac, ^{}) as MathML."""
    out, names = [], {"\\times": "×", "\\div": "÷", "-": "−"}
    for tok in re.findall(
        r"\\frac\{[^{}]*\}\{[^{}]*\}|\w\^\{\w+\}|\\boxed\{[^{}]*\}|\\\w+|\d+|[a-zA-Z]|[^\s\w]", tex
    ):
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
    """One formula in one of the encodings of the web; the drawn twins hold garbled text that must not come
    out."""
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


def exact_mathml(tex: str) -> bool:
    """Prose formulas survive MathML without annotation exactly; anything richer keeps its TeX source."""
    return bool(
        re.fullmatch(
            r"(?:\\frac\{\w+\}\{\w+\}|[a-z]\^\{\w+\}|\d+|[a-z])(?: (?:\\times|[+\-=]) "
            r"(?:\\frac\{\w+\}\{\w+\}|[a-z]\^\{\w+\}|\d+|[a-z]))*",
            tex,
        )
    )


def inline(text: str, way: str) -> str:
    """Text with $TeX$, bare \\boxed{} and `code` -> HTML; line breaks, doubled and leading spaces survive
    as <br> and nbsp."""
    out = []
    for part in re.split(rf"(\$[^$\n]+\$|{BOXED}|`[^`\n]+`)", text):
        if (
            part.startswith("$")
            and part.endswith("$")
            and len(part) > 2
            and part[1:2] != " "
            and "  " not in part
        ):
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
    """A code block as sites show it: plain, hljs spans, a Pygments table with line numbers, one row a line,
    <br> in <pre>."""
    e = html.escape(source, quote=False)
    lines = e.split("\n")
    if way == "hljs":
        e = re.sub(r"\b(def|return|for|in|if|else|while)\b", r"<span class='hljs-keyword'>\1</span>", e)
        return f"<pre><code class='hljs language-python'>{e}\n</code></pre>"
    if way == "pygments":
        numbers = "\n".join(str(i + 1) for i in range(len(lines)))
        return (
            "<table class='highlighttable'><tr>"
            f"<td class='linenos'><div class='linenodiv'><pre>{numbers}</pre></div></td>"
            f"<td class='code'><div class='highlight language-python'><pre>{e}\n</pre></div></td>"
            "</tr></table>"
        )
    if way == "rows":
        return (
            "<table class='highlight language-python'>"
            + "".join(
                f"<tr><td class='blob-num'>{i + 1}</td><td class='blob-code'>{line}</td></tr>"
                for i, line in enumerate(lines)
            )
            + "</table>"
        )
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
            user = r.choice(["mira", "finn", "otter9", "hal"])
            meta = f"<div class='user-info'>{user} said on day {r.randrange(30)}</div>"
            meta += f"<div class='vote'>{r.randrange(40)} votes</div>" if r.random() < 0.5 else ""
            out.append(
                f"<div class='post'>{meta}<div class='{{post}}'>{blocks_html(body, r, maths, code)}</div>"
                "<div class='signature'>all sums are fun</div>"
                "<div class='post-menu'><a>share</a> <a>edit</a></div></div>"
            )
        else:
            out.append(inline(body, maths) if kind == "tight" else f"<{kind}>{inline(body, maths)}</{kind}>")
    return "\n".join(out)


def render(blocks: list, r: random.Random) -> str:
    """Blocks -> a page: one of three site layouts, one formula encoding, one code encoding, boilerplate all
    around."""
    maths = r.choice(["tex", "mathml", "annotated", "mathjax2", "mathjax3", "katex", "image"])
    code = r.choice(["plain", "hljs", "pygments", "rows", "br"])
    body = blocks_html(blocks, r, maths, code).replace(
        "{post}", r.choice(["postbody", "s-prose", "comment-body"])
    )
    title = next((b[1] for b in blocks if b[0] == "h1"), "Page")
    links = "".join(
        f"<a href='/{w}'>{w}</a> "
        for w in r.sample(["home", "about", "shop", "login", "help", "forum", "news"], 4)
    )
    side = "".join(f"<li><a href='/p{r.randrange(99)}'>{x}</a></li>" for x in r.sample(REGIONS, 3))
    banner = (
        "<div class='cookie-banner'>We use cookies to make this site better. <button>Accept</button></div>"
    )
    advert = "<div class='ad-box'>Buy now and save half of the price.</div>" if r.random() < 0.5 else ""
    head = (
        f"<!doctype html><html><head><title>{html.escape(title)}</title><style>p {{ margin: 1em }}</style>"
        "<script>track('visit');</script></head><body>"
    )
    foot = "<footer>All rights reserved. Contact us. Terms of use.</footer></body></html>"
    kind = r.randrange(3)
    if kind == 0:
        return (
            f"{head}<nav>{links}</nav><article>{body}</article>"
            f"<aside><h3>Related pages</h3><ul>{side}</ul></aside>"
            f"{advert}{banner}{foot}"
        )
    if kind == 1:
        return (
            f"{head}<header><p>The site of good pages</p></header>"
            f"<div class='sidebar'><ul>{side}</ul></div>{banner}"
            f"<main>{advert}<div class='breadcrumb'><a>home</a> &gt; <a>pages</a></div>{body}</main>{foot}"
        )
    return (
        f"{head}<div id='menu'>{links}</div><div class='content'>{body}{advert}</div>"
        f"<div><a href='/a'>next page</a> <a href='/b'>last page</a> <a href='/c'>top</a></div>{banner}{foot}"
    )


# ---- the crawl


def deal(r: random.Random, items: list, slots: int) -> list[list]:
    """Spreads all items over the slots, about evenly; order shuffled by r. deal([1,2,3], 2) -> e.g. [[3,
    1], [2]]."""
    order = r.sample(items, len(items))
    hands = [order[i::slots] for i in range(slots)]
    return r.sample(hands, slots)


def variant(url: str, r: random.Random) -> str:
    """The same address written in another way; data.dedup.canonical_url gives both the same key."""
    return r.choice(
        [
            url + "/",
            url.replace("http://", "https://www."),
            url + "?utm_source=mail",
            url + "#top",
            url + "/index.html",
            url.replace("http://", "HTTP://").replace(".", ".", 1) + "?fbclid=x1",
        ]
    )


def with_copies(r: random.Random, made: list[tuple[Page, list]]) -> list[Page]:
    """The pages, then second fetches under other addresses, then mirrors; copy_of is the index in `made`."""
    out = [p for p, _ in made]
    for _ in range(round(URL_VARIANTS * len(made))):  # the same page fetched again under another address
        i = r.randrange(len(made))
        out.append(replace(made[i][0], url=variant(made[i][0].url, r), copy_of=i))
    for n in range(round(MIRRORS * len(made))):  # another host, another layout, almost the same words
        i = r.randrange(len(made))
        page, blocks = made[i]
        blocks = near_copy(r, blocks)
        out.append(
            replace(
                page,
                url=f"http://mirror{n % 7}.frn/{n}",
                html=render(blocks, r),
                text=plain(blocks),
                copy_of=i,
            )
        )
    return out


def crawl(
    seed: int,
    pages: int,
    problems: dict[str, list[tuple[str, str]]],
    leaks: dict[str, list] | None = None,
    per_page: int = 4,
) -> list[Page]:
    """`pages` original pages plus copies, in crawl order (shuffled). Every problem given is on some maths,
    code or forum page.

    problems: {"maths": [(question, solution)], "code": [...]}; leaks: the same for held-out problems,
    planted on 1% of the pages so that decontamination has something to find. per_page: problems on a maths or
    code page at most, on average; many problems make more such pages than `pages` plans. 0 = longer pages."""
    w, r = make_world(seed), random.Random(f"crawl/{seed}")
    plan = [kind for kind, share in SHARES.items() for _ in range(round(share * pages))]
    plan = plan[:pages] + ["encyclopedia"] * (pages - len(plan))
    threads = {"maths": round(0.04 * pages), "code": round(0.03 * pages)}  # forum pages that hold a problem
    hands = {}
    for domain, n in threads.items():
        given = problems.get(domain, [])
        r.shuffle(given := list(given))
        on_threads = given[:n] if len(given) > n else []
        if given and domain not in plan:
            raise ValueError(
                f"crawl of {pages} pages has no {domain} page to hold the problems: take 20 or more"
            )
        rest = given[len(on_threads) :]
        plan += [domain] * (math.ceil(len(rest) / per_page) - plan.count(domain) if per_page else 0)
        hands[domain] = (deal(r, rest, max(1, plan.count(domain))), [[p] for p in on_threads])
    made = []
    for i, kind in enumerate(plan):
        domain, leak = kind, False
        if kind in ("maths", "code"):
            mine = hands[kind][0].pop()
            blocks, scores = lesson(r, kind, mine)
        elif kind == "forum":
            domain = next((d for d in threads if hands[d][1]), "forum")
            mine = hands[domain][1].pop() if domain != "forum" else []
            blocks, scores = forum(w, r, domain, mine)
        else:
            blocks, scores = SIMPLE[kind](w, r)
        if leaks and domain in ("maths", "code") and r.random() < LEAKS and leaks.get(domain):
            given = problem(*r.choice(leaks[domain]))
            blocks, leak = blocks + ([("post", given)] if kind == "forum" else given), True
        url = f"http://{r.choice(HOSTS[kind])}/{kind}/{i}"
        made.append(
            (Page(url, render(blocks, r), plain(blocks), domain, *map(int, scores), leak=leak), blocks)
        )
    out = with_copies(r, made)
    order = r.sample(range(len(out)), len(out))
    where = {old: new for new, old in enumerate(order)}
    return [replace(out[i], copy_of=where[out[i].copy_of] if out[i].copy_of >= 0 else -1) for i in order]


if __name__ == "__main__":
    sample = {
        "maths": [("Compute 17 + 25.", "7 + 5 = 12.\n1 + 1 + 2 = 4.\nThe answer is \\boxed{42}.")],
        "code": [("Return the sum of xs.", "```python\ndef f(xs):\n    return sum(xs)\n```")],
    }
    for page in [p for p in crawl(0, 60, sample) if "Problem:" in p.text][:2]:
        print(page.url, page.html, "", page.text, sep="\n", end="\n\n")
