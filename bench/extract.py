"""
Extraction on real pages: ours beside trafilatura, resiliparse and plain lxml text (report section 2.1).

The report's complaint is that common extractors lose equations and code. The markup of the pages is the truth: each
<pre> is a code block, each element of class `math` (Sphinx, Jupyter Book, pandoc) a formula, each plain <p> a
paragraph; the words of the site's menus must not appear. Give a folder of saved pages, for example a checkout of a
documentation site. trafilatura and resiliparse are compared when they are installed
(pip install trafilatura lxml_html_clean resiliparse).

    python bench/extract.py FOLDER        # a table and out/bench/extract.json

The last line is the share of code blocks that ours keeps, divided by the share that trafilatura keeps. Expect 1.7 on 70
pages of the SciPy lecture notes (docs/data.md).
"""
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lxml.html

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configurator  # noqa: E402
from configurator import UserError  # noqa: E402
from data.extract import extract  # noqa: E402
from data.jsonl import whole_file  # noqa: E402

PARSER = lxml.html.HTMLParser(encoding="utf-8")
MENU = ["Previous topic", "Next topic", "Show Source", "Quick search", "Created using Sphinx", "Table of Contents"]
SPECIAL = ".//*[contains(@class,'math')] | .//code | .//tt | .//sup | .//sub | .//img | .//br"


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("folder",)
    folder: str = ""                      # folder of .html files, searched with all folders below it
    out: str = "out/bench/extract.json"   # the numbers


def extractors() -> dict[str, tuple[str, Callable[[bytes], str]]]:
    """name -> (version, function from the bytes of a page to its text)."""
    found = {"ours": ("", extract), "lxml text": (lxml.__version__, plain_lxml)}
    try:
        import trafilatura
        found["trafilatura"] = (
            trafilatura.__version__,
            lambda raw: trafilatura.extract(raw, output_format="markdown", favor_recall=True) or "")
    except ImportError:
        print("trafilatura is not installed: left out")
    try:
        import resiliparse
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree
        found["resiliparse"] = (
            getattr(resiliparse, "__version__", ""),
            lambda raw: extract_plain_text(HTMLTree.parse_from_bytes(raw), main_content=True))
    except ImportError:
        print("resiliparse is not installed: left out")
    return found


def plain_lxml(raw: bytes) -> str:
    """All text of the page, menus included."""
    return lxml.html.document_fromstring(raw, parser=PARSER).text_content()


def squeeze(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())


def truth(raw: bytes) -> dict[str, list[str]]:
    """Code blocks, code lines with their indentation, formulas without delimiters, paragraphs of the main part."""
    root = lxml.html.document_fromstring(raw, parser=PARSER)
    main = root.xpath("//div[@role='main'] | //div[@class='body'] | //main | //article")
    if not main:
        return {"code blocks": [], "code lines": [], "formulas": [], "paragraphs": []}
    blocks = [pre.text_content() for pre in main[0].iter("pre")
              if not pre.xpath("ancestor::td[contains(@class,'linenos')]")]
    blocks = ["\n".join(line.rstrip() for line in b.split("\n")).strip("\n") for b in blocks]
    maths = [squeeze(m.text_content()) for m in main[0].xpath(".//*[contains(concat(' ', @class, ' '), ' math ')]")]
    paragraphs = [squeeze(p.text_content()) for p in main[0].iter("p") if not p.xpath(SPECIAL)]
    return {"code blocks": [b for b in blocks if b],
            "code lines": [line for b in blocks for line in b.split("\n") if line.startswith("    ")],
            "formulas": [re.sub(r"^\\[(\[]|\\[)\]]$", "", m).strip() for m in maths],
            "paragraphs": [p for p in paragraphs if len(p) > 40]}


def count_kept(text: str, wanted: dict[str, list[str]]) -> dict[str, int]:
    """How many of each kind are in the text: code exactly, formulas and paragraphs up to white space."""
    loose = squeeze(text)
    text = re.sub(r"[ \xa0]+$", "", text, flags=re.M)    # blanks at the end of a line do not count
    return {kind: sum((s in text) if kind.startswith("code") else (squeeze(s) in loose) for s in items)
            for kind, items in wanted.items()}


def main(cfg: Config) -> None:
    pages = [p.read_bytes() for p in sorted(Path(cfg.folder).rglob("*.htm*"))]
    if not pages:
        raise UserError(f"{cfg.folder}: no .html file there")
    out = configurator.writable(cfg.out)
    truths = [truth(raw) for raw in pages]
    total = {kind: sum(len(t[kind]) for t in truths) for kind in truths[0]}
    print(f"{len(pages)} pages: " + ", ".join(f"{n:,} {kind}" for kind, n in total.items()))
    results = {}
    for name, (version, function) in extractors().items():
        seconds = []
        for _ in range(3):                               # the median of three passes over all pages
            start = time.perf_counter()
            texts = [function(raw) for raw in pages]
            seconds.append(time.perf_counter() - start)
        kept = [count_kept(text, t) for text, t in zip(texts, truths, strict=True)]
        row = {kind: sum(k[kind] for k in kept) / max(1, n) for kind, n in total.items()}
        row["pages with menu words"] = sum(any(w in text for w in MENU) for text in texts) / len(pages)
        rate = len(pages) / statistics.median(seconds)
        results[name] = {"version": version, **row, "pages_per_second": rate}
        print(f"{name:<12}" + "".join(f"{kind} {100 * v:.1f}%  " for kind, v in row.items()) + f"{rate:,.0f} pages/s")
    other = "trafilatura" if "trafilatura" in results else "lxml text"
    ratio = results["ours"]["code blocks"] / max(1e-9, results[other]["code blocks"])
    with whole_file(out) as f:
        json.dump({"ratio": ratio, "against": other, "command": " ".join(["python", *sys.argv]), "pages": len(pages),
                   "python": platform.python_version(), "threads": 1, "results": results}, f, indent=1)
    print(f"ratio (code blocks kept verbatim, ours / {other}): {ratio:.2f}")


if __name__ == "__main__":
    configurator.run(main, Config)
