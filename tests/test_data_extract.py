"""
Extraction: small pages for each class of content that gets lost elsewhere, and the whole tiny web against its truth.

    python tests/test_data_extract.py       # the feature table of docs/data.md: ours beside lxml's text_content
"""
import random
import sys
from collections import Counter
from pathlib import Path

import lxml.html
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.charset import decode  # noqa: E402
from data.extract import extract  # noqa: E402
from data.tiny import web  # noqa: E402
from data.tiny.pages import problem_text  # noqa: E402

FRAME = ("<html><head><title>t</title><style>b{{}}</style><script>var tracker=1;</script></head><body>"
         "<nav><a href=/>Front</a> <a href=/x>Archive</a></nav><div class='cookie-banner'>Accept cookies</div>"
         "{}<footer>Imprint 2020</footer></body></html>")
EVERY_PAGE_GOES = ["tracker", "Archive", "Accept cookies", "Imprint"]

# (name, body, strings that must stay, strings that must go)
FEATURES = [
    ("TeX in text",
     r"<article><p>Let \(a+b\) be</p><p>\[ x^2 = y \]</p><p>and $\frac{1}{2}$.</p></article>",
     ["$a+b$", "$$ x^2 = y $$", r"$\frac{1}{2}$"],
     [r"\(", r"\["]),
    ("MathJax 2 scripts with drawn twins",
     "<main><p>The sum <span class='MathJax_Preview'></span><span class='MathJax'>S = 1 1 - q</span>"
     r"<script type='math/tex'>S = \frac{1}{1-q}</script> holds.</p>"
     "<p><script type='math/tex; mode=display'>a < b</script></p></main>",
     [r"The sum $S = \frac{1}{1-q}$ holds.", "$$a < b$$"],
     ["1 1 - q"]),
    ("MathML with and without annotation",
     "<article><p>So <math><mfrac><mn>1</mn><mi>n</mi></mfrac><mo>+</mo><msup><mi>x</mi><mn>2</mn></msup></math> and "
     "<math><semantics><mi>q</mi><annotation encoding='application/x-tex'>{\\displaystyle \\sqrt{q}}</annotation>"
     "</semantics></math> and <math><msqrt><mi>y</mi></msqrt></math>.</p></article>",
     [r"$\frac{1}{n} + x^{2}$", r"$\sqrt{q}$", r"$\sqrt{y}$"],
     ["displaystyle"]),
    ("KaTeX, MathJax 3, images, sup and sub",
     "<article><p>A <span class='katex'><span class='katex-mathml'><math><semantics><mi>E</mi><annotation "
     "encoding='application/x-tex'>E = mc^2</annotation></semantics></math></span><span class='katex-html'>Emc2</span>"
     "</span>, B <mjx-container class='MathJax'><mjx-math>glyphs</mjx-math><mjx-assistive-mml><math><mi>z</mi></math>"
     "</mjx-assistive-mml></mjx-container>, C <img src='https://latex.codecogs.com/gif.latex?k%5E2'>, "
     "D <img class='latex' alt='\\pi r^2' src='p.png'>, x<sup>10</sup>, a<sub>i</sub></p></article>",
     ["A $E = mc^2$,", "B $z$,", "C $k^2$,", r"D $\pi r^2$,", "x^{10}", "a_i"],
     ["Emc2", "glyphs"]),
    ("code: spans, line-number tables, one row a line, br",
     "<main><h1>Code</h1><pre><code class='hljs language-python'><span class='k'>def</span> f():\n    return 1 &lt; 2\n"
     "</code></pre><table class='highlighttable'><tr><td class='linenos'><pre>101\n102</pre></td><td class='code'>"
     "<div class='highlight'><pre>if x:\n        y = 1\n</pre></div></td></tr></table><table><tr>"
     "<td class='blob-num'>201</td><td class='blob-code'>for i in z:</td></tr><tr><td class='blob-num'>202</td>"
     "<td class='blob-code'>    print(i)</td></tr></table><pre>one<br>  two</pre><p>Use <code>len(x)</code>.</p>"
     "</main>",
     ["```python\ndef f():\n    return 1 < 2\n```", "if x:\n        y = 1", "for i in z:\n    print(i)", "one\n  two",
      "`len(x)`", "# Code"],
     ["101", "102", "201", "202"]),
    ("questions and answers",
     "<header><h1>How to add?</h1></header><main><h1>How to add?</h1><div class='q'><div class='vote'>17 votes</div>"
     "<div itemprop='text'><p>I have two numbers.</p></div><div class='post-menu'>Improve this question</div></div>"
     "<div class='a'><div itemprop='text'><p>Use plus:</p><pre>a + b</pre></div><div class='user-info'>ann 4,210</div>"
     "</div><div class='related'>Linked questions</div></main>",
     ["# How to add?", "I have two numbers.", "Use plus:\n```\na + b\n```"],
     ["17 votes", "Improve this", "4,210", "Linked questions"]),
    ("forum thread",
     "<div id='page'><h1>Help</h1><div class='post'><div class='postprofile profile'>Posts: 99</div>"
     "<div class='postbody'>First<br>second line</div><div class='signature'>Sent from my stove</div></div>"
     "<div class='post'><div class='postbody'>Answer with $x=2$</div></div></div>",
     ["# Help", "First\nsecond line", "Answer with $x=2$"],
     ["Posts: 99", "stove"]),
    ("plain page with a link farm",
     "<div class='content'><h1>Title</h1><p>A long paragraph with <a href=/l>one link</a> in it.</p>"
     "<ul><li>first</li><li>second</li></ul><table><tr><td>k</td><td>v</td></tr></table></div>"
     "<div><a href=/1>Shoes</a> <a href=/2>Hats</a> <a href=/3>Coats</a></div><div class='ad-box'>Buy gold</div>",
     ["A long paragraph with one link in it.", "- first\n- second", "k | v"],
     ["Shoes", "Hats", "Coats", "Buy gold"]),
]


@pytest.mark.parametrize("name,body,keep,gone", FEATURES, ids=[f[0] for f in FEATURES])
def test_feature(name, body, keep, gone):
    """Every string in its final form is there, nothing of the twins, gutters and boilerplate is."""
    text = extract(FRAME.format(body))
    assert [s for s in keep if s not in text] == []
    assert [s for s in gone + EVERY_PAGE_GOES if s in text] == []


def test_worked_example():
    """
    <p>a <script math/tex>b</script><br>c</p><pre>d</pre><p>e</p>: a break stays a line, a fence hugs the line above,
    paragraphs are an empty line apart.
    """
    html = "<p>a <script type='math/tex'>b</script><br>c</p><pre>d</pre><p>e</p>"
    assert extract(html) == "a $b$\nc\n```\nd\n```\n\ne"


def test_three_forms_of_one_formula():
    """MathJax 3 as a judge site serves it: glyphs, assistive MathML and the TeX for copying. One of them is left."""
    html = ("<p>An integer <mjx-container class='MathJax' jax='CHTML'><mjx-math class='MJX-TEX'>glyph</mjx-math>"
            "<mjx-assistive-mml display='inline'><math><mn>100</mn><mtext> </mtext><mn>000</mn></math>"
            "</mjx-assistive-mml><span aria-hidden='true' class='no-mathjax mjx-copytext'>$100\\ 000$</span>"
            "</mjx-container>.</p>")
    assert extract(html) == "An integer $100\\ 000$."


def test_menu_that_names_a_formula_goes():
    """A table of contents full of links goes although a formula stands in it; a page in a page leaves no title."""
    menu = "<div class='toc'><h4><math><mi>n</mi></math>-groups</h4>"
    menu += "<a href=/x>homotopy theory</a> " * 5 + "</div>"
    inner = "<html><head><title>Contents</title></head><body><p>Text.</p></body></html>"
    assert extract(f"<body><h1>Name</h1>{menu}<div>{inner}</div></body>") == "# Name\n\nText."


def test_boilerplate_with_protected_text_stays():
    """A block called 'related' goes, unless it holds a formula: losing maths is worse than keeping a menu line."""
    page = "<body><p>Text</p><div class='related'>{}</div></body>"
    assert extract(page.format("see also")) == "Text"
    assert "$x$" in extract(page.format("see <script type='math/tex'>x</script>"))


@pytest.mark.parametrize("bad", [
    "", "   ", "<", "<html></html>", b"\xff\xfe\x00", "\ue000 7\ue001", "<p>\ue00099\ue001</p>", "<!-- x -->",
    "<nav>a</nav>tail&#1;", "\uffff", "half \ud83d", "<frameset><frame></frameset>", "<math>", "<pre>",
    "<table><td class=code>", "<script type='math/mml'>", "<img class=tex>", b"\x80" * 99, "<mmultiscripts>",
    "&#99999999999;"])
def test_hostile_input_gives_text_not_an_error(bad):
    """Empty pages, broken bytes and pages that hold our own placeholder marks (an index out of range otherwise)."""
    assert isinstance(extract(bad), str)


# ---- whole pages must not vanish ------------------------------------------------------------------------------------

STORY = ["The first paragraph tells of a river, of the bridge over it, and of a town on its other side.",
         "The second paragraph goes on with the tale, and it has about as many words as the first one.",
         "The third ends it, since every tale has an end somewhere, and this one ends in the town."]
TEXT = "\n\n".join(STORY)
BODY = "".join(f"<p>{line}</p>" for line in STORY)


@pytest.mark.parametrize("tag", [
    "form id='aspnetForm'", "div class='Page-ad-margins'", "div class='content-with-sidebar-wrp'",
    "div class='l-sidebar-fixed l-article-body-segment'", "div class='main-content-wrap has-section-nav'",
    "div class='td-transition-content-and-menu'", "section class='non-ad-column-l'", "header", "footer", "aside", "nav",
    "noscript", "button", "div hidden", "div style='display: none'", "div id='comments'", "div class='shareContent'"])
def test_a_container_with_the_page_in_it_stays(tag):
    """Whatever its tag or class: a rule that would take most of the page's prose is refused, and that is counted."""
    counts = Counter()
    page = f"<body><div class='menu'><a href=/>Front</a></div><{tag}>{BODY}</{tag.split()[0]}></body>"
    assert extract(page, counts=counts) == TEXT
    assert sum(counts.values()) >= 1


def test_several_deletions_may_not_take_the_page():
    """Six parts that each look like boilerplate and are each small enough to go: the page is taken with fewer rules."""
    counts = Counter()
    parts = "".join(f"<div class='related'><p>{i} {line}</p></div>" for i in range(2) for line in STORY)
    text = extract(f"<body>{parts}<p>Short.</p></body>", counts=counts)
    assert all(f"{i} {line}" in text for i in range(2) for line in STORY)
    assert counts["too little left, taken with rules: careful"] == 1


@pytest.mark.parametrize("page,wanted", [
    (f"<article>{BODY}</article>" + "<div class='comment-body'>Yes, that is so.</div>" * 2, [TEXT]),
    (f"<article>Teaser</article><div>{BODY}</div>", [TEXT]),
    ("".join(f"<article><p>{line}</p></article>" for line in STORY), STORY),
    (f"<div class='comments'>{BODY}</div><div class='comment'>{BODY.replace('river', 'lake')}</div>",
     ["river", "lake"]),
    (f"<table><tr class='player-1'><td>Ann</td><td>7</td></tr></table>{BODY}", ["Ann | 7", TEXT]),
], ids=["article and comments", "teaser", "three articles", "only comments", "row with a name"])
def test_nothing_is_chosen_over_the_rest_of_the_page(page, wanted):
    """The choice of an article, of posts or of a part never drops what holds much of the page."""
    text = extract(f"<body>{page}</body>")
    assert [w for w in wanted if w not in text] == []


def test_title_and_lead_come_with_the_article():
    """The paragraph between the title and the article's text is part of it; menus and teasers around are not."""
    page = (f"<body><nav><a href=/>Front</a></nav><h1>A tale</h1><div class='lead'><p>{STORY[0]}</p></div>"
            f"<div class='entry-content'>{BODY}<p><a href=/x>Read our other tale</a></p></div>"
            f"<div class='sidebar'><p>Not this one.</p></div></body>")
    assert extract(page) == f"# A tale\n\n{STORY[0]}\n\n{TEXT}"


def test_comments_under_an_article_go_unless_they_hold_a_formula():
    """Readers' comments are no text of the article; with a formula in them they are what we are looking for."""
    page = f"<article>{BODY * 2}</article><div id='comments'><p>I do not think that this is a true one. {{}}</p></div>"
    assert "true one" not in extract(page.format(""))
    assert "true one. $x$" in extract(page.format("<script type='math/tex'>x</script>"))


# ---- formulas and code ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mathml,tex", [
    ("<mroot><mi>x</mi><mn>3</mn></mroot>", r"\sqrt[3]{x}"),
    ("<mo>(</mo><mfrac linethickness='0'><mi>n</mi><mi>k</mi></mfrac><mo>)</mo>", r"\binom{n}{k}"),
    ("<mfenced><mfrac linethickness='0pt'><mi>n</mi><mi>k</mi></mfrac></mfenced>", r"\binom{n}{k}"),
    ("<mover accent='true'><mi>x</mi><mo>˙</mo></mover>", r"\dot{x}"),
    ("<mover><mi>v</mi><mo>→</mo></mover>", r"\vec{v}"),
    ("<mover><mrow><mi>A</mi><mi>B</mi></mrow><mo>¯</mo></mover>", r"\overline{AB}"),
    ("<munder><mi>lim</mi><mrow><mi>x</mi><mo>→</mo><mn>0</mn></mrow></munder>", r"\lim_{x \to 0}"),
    ("<munderover><mo>∑</mo><mi>i</mi><mi>n</mi></munderover><mi>i</mi>", r"\sum_{i}^{n}i"),
    ("<mfenced><mi>a</mi><mi>b</mi></mfenced>", "(a,b)"),
    ("<mfenced open='[' close=')' separators=';'><mi>a</mi><mi>b</mi></mfenced>", "[a;b)"),
    ("<mo>(</mo><mtable><mtr><mtd><mi>a</mi></mtd><mtd><mi>b</mi></mtd></mtr></mtable><mo>)</mo>",
     r"\begin{pmatrix} a & b \end{pmatrix}"),
    ("<mtable><mtr><mtd><mi>a</mi></mtd></mtr><mtr><mtd><mi>b</mi></mtd></mtr></mtable>",
     r"\begin{matrix} a \\ b \end{matrix}"),
    ("<mo>{</mo><mtable><mtr><mtd><mn>1</mn></mtd><mtd><mtext>if odd</mtext></mtd></mtr></mtable>",
     r"\begin{cases} 1 & \text{if odd} \end{cases}"),
    ("<msup><msup><mi>x</mi><mn>2</mn></msup><mn>3</mn></msup>", "{x^{2}}^{3}"),
    ("<msup><mi>f</mi><mo>′</mo></msup><mo>(</mo><mi>x</mi><mo>)</mo>", "f'(x)"),
    ("<mi>π</mi><mi>r</mi>", r"\pi r"),
    ("<mi mathvariant='double-struck'>R</mi><mo>∋</mo><mi>sin</mi><mi>α</mi>", r"\mathbb{R} \ni \sin \alpha"),
    ("<mmultiscripts><mi>X</mi><mi>a</mi><none/><mprescripts/><mn>3</mn><none/></mmultiscripts>", "{}_{3}X_{a}"),
    ("<mi>x</mi><mspace width='1em'/><mi>y</mi>", "x y"),
    ("<menclose notation='updiagonalstrike'><mi>x</mi></menclose>", r"\cancel{x}"),
    ("<unheard><mi>x</mi></unheard>", "x")])
def test_mathml_keeps_its_meaning(mathml, tex):
    """Roots, binomials, accents, limits, fences, tables; with a namespace in front of the tags too."""
    assert extract(f"<p><math>{mathml}</math></p>") == f"${tex}$"
    prefixed = mathml.replace("</", "</m:").replace("<m", "<m:m").replace("<n", "<m:n").replace("<u", "<m:u")
    assert extract(f"<p><m:math>{prefixed}</m:math></p>") == f"${tex}$"


def test_a_formula_of_wikipedia_comes_once():
    """Hidden MathML and the fallback image, in the desktop's and the mobile site's form; the image alone too."""
    tree = ("<span style='display: none;' class='mwe-math-mathml-inline'><math><semantics><mi>x</mi><annotation "
            "encoding='application/x-tex'>{\\displaystyle x}</annotation></semantics></math></span>")
    image = "<img class='mwe-math-fallback-image-inline' alt='{\\displaystyle x}' src='/render/svg/1'>"
    for inside in (tree + image, f"{tree}<noscript>{image}</noscript>", image):
        assert extract(f"<p>So <span class='mwe-math-element'>{inside}</span> is.</p>") == "So $x$ is."


def test_other_sources_of_tex():
    """data-tex, an image of LaTeX2HTML, math/mml scripts, <br> in an alt text, kramdown's CDATA marks."""
    for html, tex in [("<span data-tex='a+b'>drawn</span>", "$a+b$"), ("<img alt='$a$' src='img1.png'>", "$a$"),
                      ("<script type='math/mml'><math><mi>q</mi></math></script>", "$q$"),
                      ("<img class='tex' alt='a<br />b'>", "$a b$"),
                      ("<script type='math/tex'>% <![CDATA[\na %]]></script>", "$a$")]:
        assert extract(f"<p>x {html} y</p>") == f"x {tex} y"


@pytest.mark.parametrize("html,code", [
    ("<pre><div class='line'>if x:</div><div class='line'>    y</div></pre>", "if x:\n    y"),
    ("<pre><ol><li>if x:</li><li>    y</li></ol></pre>", "if x:\n    y"),
    ("<pre><div>a\n</div><div>\n</div><div>b\n</div></pre>", "a\n\nb"),
    ("<pre><span class='lineno'>1</span></pre><pre><button>Copy</button>a</pre>", "a"),
    ("<code>a\n  b\n  c</code>", "a\n  b\n  c")], ids=["div", "li", "empty line", "button", "code alone"])
def test_code_lines(html, code):
    """One element a line, copy buttons, <code> of several lines without a <pre>."""
    assert f"```\n{code}\n```" in extract(f"<body>{html}</body>")


def test_code_and_formulas_outside_the_article_are_not_lost():
    """An article that holds most of the prose, but not the examples after it, is not the whole choice."""
    page = f"<body><div class='entry-content'>{BODY * 3}</div><div class='more'><pre>x = 1</pre></div></body>"
    assert "x = 1" in extract(page)


# ---- charsets -------------------------------------------------------------------------------------------------------

SPEECH = {"cp1251": ("windows-1251", "Сегодня мы посчитаем простые числа и решим задачу."),
          "gbk": ("gb2312", "今天我们学习如何计算素数，并解决一些简单的数学问题。"),
          "shift_jis": ("Shift_JIS", "今日は素数の計算方法を学び、簡単な問題を解きます。"),
          "euc_jp": ("EUC-JP", "今日は素数の計算方法を学び、簡単な問題を解きます。"),
          "big5": ("Big5", "今天我們學習如何計算質數，並解決一些簡單的數學問題。"),
          "latin-1": ("iso-8859-1", "Die Straße nach Köln führt über die Brücke, die Männer zählen."),
          "cp1252": ("iso-8859-1", "Der “Preis” für die Brücke beträgt 7 €, sagt man in Köln."),
          "koi8-r": ("koi8-r", "Сегодня мы посчитаем простые числа и решим задачу.")}


@pytest.mark.parametrize("name", SPEECH)
def test_charsets(name):
    """By <meta>, by the older <meta http-equiv>, by the header, and by a guess where nothing is declared."""
    label, text = SPEECH[name]
    page = f"<html><head>{{}}</head><body><p>{text}</p></body></html>"
    for head in (f"<meta charset='{label}'>",
                 f"<meta http-equiv='Content-Type' content='text/html; charset={label}'>"):
        assert extract(page.format(head).encode(name)) == text
    assert extract(page.format("").encode(name), charset=label) == text
    assert extract(page.format("").encode(name)) == text


def test_charsets_that_lie():
    """A mark beats all, valid UTF-8 and UTF-16 beat what is declared, an impossible declaration is passed over."""
    text = SPEECH["cp1251"][1]
    wrong = f"<meta charset='iso-8859-1'><p>{text}</p>"
    for raw in (wrong.encode(), wrong.encode("utf-8-sig"), wrong.encode("utf-16"), wrong.encode("utf-16-le"),
                f"<meta charset=utf-8><p>{text}</p>".encode("cp1251"),
                f"<meta charset=nonsense><p>{text}</p>".encode("cp1251")):
        assert extract(raw) == text
    cut = ("<p>" + text).encode()[:-1] + b"\xd0"                # a page cut inside a letter stays UTF-8
    assert extract(cut).startswith(text[:-1])
    assert decode(b"\xff\xfe") == "" and isinstance(decode(bytes(range(256))), str)


# ---- hostile pages --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth", [300, 1500, 3000, 30_000])
def test_depth(depth):
    """Nothing is cut where libxml2 stops, neither inside nor behind the nest."""
    text = extract("<div>" * depth + f"<p>{STORY[0]}</p>" + "</div>" * depth + f"<p>{STORY[1]}</p>")
    assert STORY[0] in text and STORY[1] in text


@pytest.mark.parametrize("post", [
    "<div class='postbody'>{}</div>", "<div class='post'><font size=2><p>{}</p></div>",
    "<table><tr><td><b>ann<td><div class='post_message'>{}</div></table>", "<article class='message'>{}</article>",
    "<li class='comment'><blockquote>{}</li>", "<form><div itemprop='text'>{}</div></form>"])
def test_a_thread_of_600_posts(post):
    """Every post comes, in order, with unclosed tags as old boards have them."""
    said = [f"Post number {i} says that {i * 7} is what comes out of it, and why." for i in range(600)]
    text = extract("<body><h1>Help</h1>" + "".join(post.format(line) for line in said) + "</body>")
    places = [text.find(line) for line in said]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize("pattern", [
    "\\[", "\\(", "<code>x</code>", "<div class='postbody'>w w</div>", "<a href=x>link</a> ", "<sup>",
    "<table><tr><td class='code'>", "<span class='mwe-math-element'>", "<img class=tex alt=x>", "<!--", "&#xE000;",
    "\\\\["])
def test_work_grows_with_the_page_and_not_faster(pattern):
    """Function calls, counted, for one size and four times it: a test of time would depend on the machine."""
    def calls(size: int) -> int:
        n = 0

        def count(*_):
            nonlocal n
            n += 1
        sys.setprofile(count)
        try:
            extract("<div>" * 50 + pattern * (size // len(pattern)))
        finally:
            sys.setprofile(None)
        return n
    assert calls(96_000) <= 4.6 * calls(24_000) + 5_000


def test_entities_and_marks():
    """No entity smuggles in a control character, a lone surrogate or our own marks; cp1252's numbers are read."""
    assert extract("<p>a&#1;b&#xD800;c&#xFFFE;d&#xE000;7&#xE001;&#27;</p>") == "abcd7"
    assert extract("<p>&#147;q&#148; so\xadft</p>") == "“q” soft"
    assert extract("<p>a</p><?php x ?><!-- y -->") == "a"


def test_tiny_web_comes_out_exactly():
    """
    600 pages in every layout and encoding, with problems of every shape: extraction equals the truth, and each given
    problem stands in some page character for character.
    """
    r = random.Random(0)
    maths, code = [], []
    for _ in range(300):
        a, b = r.randrange(1000), r.randrange(1000)
        step = f"  {a} < {b} & $\\frac{{{a}}}{{{b + 1}}}$\n\nso `{a}`"
        maths.append((f"Is {a} less than {b}?", f"{step}\nThe answer is \\boxed{{\\frac{{{a}}}{{2}}}}."))
        body = f"def f(xs):\n    xs = [x for x in xs if x < {a}]\n    return sum(xs) & {b}"
        solution = f"```python\n{body}\n```\nIt keeps {a}." if a % 2 else f"First.\n\n```python\n{body}\n```"
        code.append((f"Filter by {a}, mask {b}.", solution))
    pages = web.crawl(3, 600, {"maths": maths, "code": code})
    texts = [extract(p.html) for p in pages]
    assert [p.url for p, t in zip(pages, texts, strict=True) if p.text != t] == []
    everything = "\n\n".join(texts)
    assert [q for q, s in maths + code if problem_text(q, s) not in everything] == []
    assert {p.domain for p in pages} == set(web.SHARES)


def table() -> None:
    """Strings kept and leaked by page kind, ours and lxml's text_content (spaces compared loosely for lxml)."""
    total = [0] * 4
    print(f"{'page':<55}{'kept: ours':>12}{'lxml':>7}{'leaked: ours':>14}{'lxml':>7}")
    for name, body, keep, gone in FEATURES:
        html, gone = FRAME.format(body), gone + EVERY_PAGE_GOES
        ours, lxmls = extract(html), lxml.html.document_fromstring(html).text_content()
        row = [sum(s in ours for s in keep), sum(s in lxmls for s in keep), sum(s in ours for s in gone),
               sum(s in lxmls for s in gone)]
        total = [a + b for a, b in zip(total, row, strict=True)]
        print(f"{name:<55}{f'{row[0]}/{len(keep)}':>12}{row[1]:>7}{f'{row[2]}/{len(gone)}':>14}{row[3]:>7}")
    kept, leaked = sum(len(f[2]) for f in FEATURES), sum(len(f[3]) + len(EVERY_PAGE_GOES) for f in FEATURES)
    print(f"{'all':<55}{f'{total[0]}/{kept}':>12}{total[1]:>7}{f'{total[2]}/{leaked}':>14}{total[3]:>7}")


if __name__ == "__main__":
    table()
