"""
Extraction: eight hand-made pages of the kinds that lose content elsewhere, and the whole tiny web against its truth.

    python tests/test_data_extract.py       # the feature table of docs/data.md: ours beside lxml's text_content
"""
import random
import sys
from pathlib import Path

import lxml.html
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
    "", "   ", "<", "<html></html>", b"\xff\xfe\x00", "\ue000 7\ue001", "<p>\ue00099\ue001</p>"])
def test_hostile_input_gives_text_not_an_error(bad):
    """Empty pages, broken bytes and pages that hold our own placeholder marks (an index out of range otherwise)."""
    assert isinstance(extract(bad), str)


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
