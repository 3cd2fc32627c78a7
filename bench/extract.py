"""
Extraction on real pages: ours beside trafilatura, resiliparse and plain lxml text (report section 2.1).

The report's complaint is that common extractors lose equations and code. A folder is one of four kinds of page set, all
of them public, none of them written for this project:

    ground-truth.json + html/ID.html.gz    scrapinghub/article-extraction-benchmark: the article as text
    NAME/source.html + NAME/expected.html  test/test-pages of mozilla/readability: the article as HTML
    evaldata.json + cache/, eval/          tests of adbar/trafilatura: sentences that must and must not be there
    any .html files                        the truth is the markup of the page: TeX in annotations, scripts, images and
                                           text, <pre> blocks, and for Sphinx pages each element of class `math`

    python bench/extract.py "FOLDER, FOLDER, ..."             # a table per set and out/bench/extract.json
    python bench/extract.py FOLDER --half=report              # only the half on which no threshold was chosen
    python bench/extract.py hostile                           # CPU seconds for 1 MB of each hostile pattern

Articles are compared by words in fours, as the scrapinghub benchmark does; a page is lost when less than .3 of them (or
no wanted sentence) is there. trafilatura and resiliparse are compared when they are installed
(pip install trafilatura lxml_html_clean resiliparse). docs/data.md has the numbers to expect.
"""
import gzip
import hashlib
import json
import platform
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import lxml.html

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configurator  # noqa: E402
from configurator import UserError  # noqa: E402
from data.charset import decode  # noqa: E402
from data.extract import extract  # noqa: E402
from data.jsonl import whole_file  # noqa: E402

# lines that are never part of a text, in the languages of the four sets; a whole line must be one of them
BOILERPLATE = set("""log in|login|sign in|sign up|register|share|share this|tweet|facebook|twitter|pinterest|whatsapp|
linkedin|email|print|menu|search|home|reply|subscribe|newsletter|advertisement|skip to content|skip to main content|
read more|related articles|related posts|privacy policy|terms of service|terms of use|contact us|cookie policy|
all rights reserved|back to top|follow us|leave a comment|leave a reply|cancel reply|improve this answer|follow|
improve this question|previous topic|next topic|show source|quick search|created using sphinx|table of contents|anzeige|
teilen|drucken|impressum|datenschutz|anmelden|suche|startseite|mehr zum thema|compartir|inicio|iniciar sesión|partager|
accueil|se connecter""".replace("\n", "").split("|"))
# 1 MB of each should take less than 2 s; {n} is a number, a line break here none
HOSTILE = r"""\[|\(|\\[|$|$$|$x|`|\begin{|\frac{|<code>x</code>|<pre>x|<div class='postbody'>w w</div>|<div>|</div>|<p>|
<p>x|<br>|<b>|<b><i>|<font size={n}>x|<a href=x>link</a> |<a href={n}>|<sup>|<sub>2|<li>|<ul><li>x|<dl><dt>a<dd>b|
<table>|<table><tr><td>x|<table><tr><td class='code'>|<tr><td>{n}|<span class='mwe-math-element'>|<span class=katex>|
<math>|<span class=MathJax>x|<math><mi>x|<math><mfrac><mi>a</mi>|<mrow>|<annotation encoding='application/x-tex'>x|
<style>x</style>|<script type='math/tex'>x</script>|<script>|<img class=tex alt=x>|<img alt='\frac{1}{2}'>|<!--|
<!-- x -->|<![CDATA[|<?php |&#xE000;|&amp;|&#{n};|&|<|<<|< a|<a b=|<x y{n}=1>|<select><option>{n}|<form>|<iframe>|
<svg><path d='M'>|<h1>{n}</h1>|<col>|<article>x y z. |<section><p>x y z w v.</p>|<nav>x|<nav><p>a b c. </p>|
<div class='comment'>{n}|<div class=sidebar>x y z</div>|<div class='post'><p>word {n}</p></div>|<blockquote>|
<p>x</p><aside>|<meta charset=x>|<body>|<html>|<title>|<textarea>|<td>|<noscript>|<template>|x|x |é|漢|word{n} |.|<hr>|
<p style='display:none'>x|<div hidden>x|<image>|<p align=center>{n}<center>
""".replace("\n", "").split("|") + ["\n", "\r\n \t", "\x00", "\ufeff", "\u202e", "- item\n"]
SPECIAL = ".//*[contains(@class,'math')] | .//code | .//tt | .//sup | .//sub | .//img | .//br"


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("folders",)
    folders: str = ""                                # one folder, or several with commas between them; or "hostile"
    half: Literal["all", "dev", "report"] = "all"    # by a hash of the page's name: thresholds were chosen on "dev"
    passes: int = 1                                  # over all pages; the median is the speed
    out: str = "out/bench/extract.json"              # the numbers


@dataclass
class Page:
    """One page and what is known of it; a kind of truth that the set does not have is empty."""
    name: str
    raw: bytes
    article: str = ""                                    # the text that an extractor should find
    wanted: list[str] = field(default_factory=list)      # sentences that must be there
    unwanted: list[str] = field(default_factory=list)    # sentences that must not
    markup: dict[str, list[str]] = field(default_factory=dict)   # kind -> formulas or code that must be there


# ---- page sets ------------------------------------------------------------------------------------------------------

def pages_of(folder: Path) -> Iterator[Page]:
    """The pages of one set; the kind of set is seen by its files. UserError when there is no page."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / "ground-truth.json").is_file():
        for name, truth in json.loads((folder / "ground-truth.json").read_text(encoding="utf-8")).items():
            yield Page(name, gzip.decompress((folder / f"html/{name}.html.gz").read_bytes()), truth["articleBody"])
    elif (folder / "evaldata.json").is_file():
        for truth in json.loads((folder / "evaldata.json").read_text(encoding="utf-8")).values():
            path = next((p for d in ("cache", "eval") if (p := folder / d / truth["file"]).is_file()), None)
            if path:
                yield Page(path.name, path.read_bytes(), wanted=truth["with"], unwanted=truth["without"])
    elif gold := sorted(folder.rglob("expected.html")):
        for path in gold:
            yield Page(path.parent.name, (path.parent / "source.html").read_bytes(), plain_lxml(path.read_bytes()))
    else:
        for path in sorted(folder.rglob("*.htm*")):
            raw = path.read_bytes()
            yield Page(path.name, raw, markup=truth_of_markup(raw))


def in_half(page: Page, half: str) -> bool:
    """Whether the page belongs to the half asked for; a pure function of its name."""
    return half == "all" or (hashlib.sha256(page.name.encode()).digest()[0] % 2 == 0) == (half == "dev")


def truth_of_markup(raw: bytes) -> dict[str, list[str]]:
    """kind -> what the page's own markup says must be in the text; formulas without their delimiters."""
    root = parse(raw)
    blocks = [code_of(pre) for pre in root.iter("pre") if not pre.xpath("ancestor::td[contains(@class,'linenos')]")]
    images = [squeeze(re.sub(r"<br\s*/?>", " ", img.get("alt"))) for img in root.xpath(
        "//img[contains(@src,'latex') or contains(@class,'latex') or contains(@class,'tex')][@alt]")
        if not img.xpath("ancestor::*[contains(@class,'mwe-math')]")]
    notes = [re.sub(r"^\{\\displaystyle (.*)\}$", r"\1", squeeze(note.text_content()))
             for note in root.xpath("//annotation[contains(@encoding,'tex')]")]
    sphinx = [squeeze(m.text_content()) for m in root.xpath("//*[contains(concat(' ',@class,' '),' math ')]")
              if not m.xpath("descendant::*[self::script or self::math or self::img]")]
    scripts = [squeeze(s.text or "") for s in root.xpath("//script[starts-with(@type,'math/tex')]")]
    for node in root.xpath("//script | //style | //pre | //code | //noscript | //head | //textarea"):
        node.drop_tree()
    delimiters = r"\$\$([^$]{3,1000})\$\$|\\\((.{1,500}?)\\\)|\\\[(.{1,1000}?)\\\]"
    delimited = re.findall(delimiters, root.text_content(), re.S)
    main = root.xpath("//div[@role='main'] | //div[@class='body'] | //main | //article") or [root]
    paragraphs = [squeeze(p.text_content()) for p in main[0].iter("p") if not p.xpath(SPECIAL)]
    lines = [line for block in blocks for line in block.split("\n")]
    found = {"annotations": notes, "TeX images": images, "TeX scripts": scripts,
             "TeX in text": [squeeze("".join(groups)) for groups in delimited],
             "class math": [re.sub(r"^\\[(\[]|\\[)\]]$", "", m).strip() for m in sphinx],
             "code blocks": blocks, "code lines": [s for s in lines if re.match(r"(?:    |\t)\s*\S", s)],
             "paragraphs": [p for p in paragraphs if len(p) > 40]}
    return {kind: [item for item in items if item.strip()] for kind, items in found.items()}


def parse(raw: bytes) -> lxml.html.HtmlElement:
    """The tree of a page; an empty one for a page that is none."""
    parser = lxml.html.HTMLParser(encoding="utf-8", huge_tree=True)
    return lxml.html.document_fromstring(decode(raw).replace("\0", "").encode() or b"<p></p>", parser=parser)


def code_of(pre: lxml.html.HtmlElement) -> str:
    """The characters of a <pre>, blanks at the ends of its lines and empty lines around it removed."""
    for line in pre.xpath(".//br | .//div[following-sibling::*] | .//li[following-sibling::*]"):
        if not (line.tail or "").startswith("\n") and not line.text_content().endswith("\n"):
            line.tail = "\n" + (line.tail or "")
    return "\n".join(line.rstrip() for line in pre.text_content().replace("\xa0", " ").split("\n")).strip("\n")


# ---- extractors -----------------------------------------------------------------------------------------------------

def extractors() -> dict[str, tuple[str, Callable[[bytes], str]]]:
    """name -> (version, function from the bytes of a page to its text)."""
    found = {"ours": ("", extract)}
    try:
        import trafilatura
        found["trafilatura"] = (trafilatura.__version__, lambda raw: trafilatura.extract(raw) or "")
        found["trafilatura recall"] = (trafilatura.__version__, lambda raw: trafilatura.extract(
            raw, output_format="markdown", favor_recall=True) or "")
    except ImportError:
        print("trafilatura is not installed: left out")
    try:
        import resiliparse
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import detect_encoding
        from resiliparse.parse.html import HTMLTree
        found["resiliparse"] = (getattr(resiliparse, "__version__", ""), lambda raw: extract_plain_text(
            HTMLTree.parse_from_bytes(raw, detect_encoding(raw)), main_content=True))
    except ImportError:
        print("resiliparse is not installed: left out")
    return found | {"lxml text": (lxml.__version__, plain_lxml)}


def plain_lxml(raw: bytes) -> str:
    """All text of the page, menus included; blocks are lines."""
    root = parse(raw)
    for node in root.xpath("//script | //style | //head"):
        node.drop_tree()
    for node in list(root.iter("p", "div", "li", "br", "td", "h1", "h2", "h3", "tr", "pre", "blockquote")):
        mark = node.makeelement("br")
        mark.text = "\n"
        node.append(mark)
    return root.text_content()


# ---- scores ---------------------------------------------------------------------------------------------------------

def squeeze(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())


def fours(text: str) -> Counter:
    """How often each four words in a row stand in the text."""
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[i:i + 4]) for i in range(max(1, len(words) - 3))) if words else Counter()


def overlap(gold: str, text: str) -> tuple[float, float]:
    """(precision, recall) of the words in fours; a text without words has precision 1 and recall 0."""
    a, b = fours(gold), fours(text)
    both = sum((a & b).values())
    return both / max(1, sum(b.values())) if b else 1.0, both / max(1, sum(a.values()))


def kept_of(text: str, wanted: dict[str, list[str]]) -> dict[str, int]:
    """How many of each kind are in the text: code exactly, formulas and paragraphs up to white space."""
    loose = "".join(text.split())
    text = re.sub(r"[ \xa0]+$", "", text, flags=re.M).replace("\xa0", " ")
    return {kind: sum((s in text) if kind.startswith("code") else ("".join(s.split()) in loose) for s in items)
            for kind, items in wanted.items()}


def score(pages: list[Page], texts: list[str]) -> tuple[dict[str, float], set[str]]:
    """(the row of one extractor, names of the pages that it lost whole)."""
    row: dict[str, float] = {"empty": sum(not t.strip() for t in texts)}
    lost, marked = set(), [(p, t) for p, t in zip(pages, texts, strict=True) if p.article]
    if marked:
        pairs = [overlap(p.article, t) for p, t in marked]
        lost |= {p.name for (p, _), (_, recall) in zip(marked, pairs, strict=True) if recall < 0.3}
        row["precision"] = statistics.mean(p for p, _ in pairs)
        row["recall"] = statistics.mean(r for _, r in pairs)
        row["F1"] = 2 * row["precision"] * row["recall"] / max(1e-9, row["precision"] + row["recall"])
    marked = [(p, squeeze(t)) for p, t in zip(pages, texts, strict=True) if p.wanted or p.unwanted]
    if marked:
        hits = [[squeeze(s) in t for s in p.wanted] for p, t in marked]
        lost |= {p.name for (p, _), h in zip(marked, hits, strict=True) if h and not any(h)}
        good, wanted = sum(map(sum, hits)), sum(map(len, hits))
        bad = sum(squeeze(s) in t for p, t in marked for s in p.unwanted)
        row |= {"wanted kept": good / wanted, "unwanted leaked": bad / sum(len(p.unwanted) for p, _ in marked),
                "F1": 2 * good / max(1, wanted + good + bad)}
    kinds = next((list(p.markup) for p in pages if p.markup), [])
    kept = [kept_of(t, p.markup) for p, t in zip(pages, texts, strict=True)] if kinds else []
    for kind in kinds:
        total = sum(len(p.markup[kind]) for p in pages)
        if total:
            row[f"{kind} of {total:,}"] = sum(k[kind] for k in kept)
    lines = [sum(" ".join(re.findall(r"\w+", line)).lower() in BOILERPLATE for line in t.split("\n")) for t in texts]
    return row | {"lost": len(lost), "boilerplate lines": sum(lines), "pages with any": sum(map(bool, lines))}, lost


def measure(pages: list[Page], passes: int) -> dict[str, dict]:
    """extractor -> its row; "alone" counts the pages that ours loses and every peer keeps."""
    rows, lost = {}, {}
    for name, (version, function) in extractors().items():
        seconds = []
        for _ in range(passes):
            start = time.process_time()
            texts = [function(page.raw) for page in pages]
            seconds.append(time.process_time() - start)
        row, lost[name] = score(pages, texts)
        rows[name] = {"version": version, **row, "pages/s": len(pages) / max(1e-9, statistics.median(seconds))}
    peers = [name for name in rows if name not in ("ours", "lxml text")]
    alone = {n for n in lost["ours"] if peers and not any(n in lost[peer] for peer in peers)}
    rows["ours"] |= {"lost alone": len(alone), "names of these": sorted(alone)}
    return rows


def table(rows: dict[str, dict]) -> str:
    """One line a number, one column an extractor."""
    keys = [k for k in rows["ours"] if k not in ("version", "names of these")]
    form = lambda v: "" if v is None else f"{v:.3f}" if isinstance(v, float) and v < 10 else f"{v:,.0f}"
    lines = [f"{'':<26}" + "".join(f"{name:>20}" for name in rows)]
    lines += [f"{k:<26}" + "".join(f"{form(row.get(k)):>20}" for row in rows.values()) for k in keys]
    return "\n".join(lines + [f"  lost alone: {name}" for name in rows["ours"]["names of these"]])


def hostile_seconds(size: int = 1_000_000) -> dict[str, float]:
    """Pattern -> CPU seconds of our extractor for `size` bytes of it, alone and below 50 nested elements: the worse."""
    worst = {}
    for pattern in HOSTILE:
        body = "".join(pattern.replace("{n}", str(i)) for i in range(size // len(pattern.encode())))[:size]
        for page in (body, "<div>" * 50 + body):
            start = time.process_time()
            extract(page)
            worst[pattern] = max(worst.get(pattern, 0.0), time.process_time() - start)
    return dict(sorted(worst.items(), key=lambda pair: -pair[1]))


def main(cfg: Config) -> None:
    if cfg.folders == "hostile":
        seconds = hostile_seconds()
        print("\n".join(f"{s:6.2f} s  {pattern!r}" for pattern, s in list(seconds.items())[:12]))
        print(f"{len(seconds)} patterns of 1 MB, {sum(s > 2 for s in seconds.values())} above 2 s of CPU time")
        with whole_file(configurator.writable(cfg.out)) as f:
            json.dump({"command": "python bench/extract.py hostile", "seconds": seconds}, f, indent=1)
        return
    out, results = configurator.writable(cfg.out), {}
    for folder in [Path(word.strip()) for word in cfg.folders.split(",")]:
        pages = [page for page in pages_of(folder) if in_half(page, cfg.half)]
        if not pages:
            raise UserError(f"{folder}: no .html file there")
        results[str(folder)] = {"pages": len(pages), "rows": measure(pages, cfg.passes)}
        print(f"\n{folder}: {len(pages)} pages ({cfg.half})\n{table(results[str(folder)]['rows'])}")
    with whole_file(out) as f:
        json.dump({"command": " ".join(["python bench/extract.py", *sys.argv[1:]]), "python": platform.python_version(),
                   "threads": 1, "results": results}, f, indent=1)


if __name__ == "__main__":
    configurator.run(main, Config)
