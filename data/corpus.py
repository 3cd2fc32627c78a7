"""The corpus pipeline from fetched pages to weighted plain-text documents, with a count after every step
(report 2.1).

    pages -> URL dedup -> extract -> MinHash dedup -> tag -> rebalance by tags -> decontaminate -> documents
    per source
The tiny world's crawl and a real one (data/hub.py) go through the same `clean`. Sources are what the stages
of pre-training mix: web, maths, code, books. Left out against the report: PDF parsing, language models as
taggers.

    python -m data.corpus --pages=6000          # prints the funnel; about 10 s on one slow core
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from data import tag as tagging
from data.decontaminate import contaminated
from data.dedup import canonical_url, near_duplicates
from data.extract import extract
from data.tiny import code, maths, probes, web
from data.tiny import pages as content
from data.tiny.world import make_world

SOURCES = ("web", "maths", "code", "books")
SOURCE_OF = {"maths": "maths", "code": "code", "books": "books"}  # every other domain is web


@dataclass
class Record:
    """One document on its way. Either html or text is given; ref: the caller's number, kept through the
    pipeline."""

    url: str
    html: str = ""
    text: str = ""
    ref: int = -1
    tags: tagging.Tags | None = None


@dataclass
class Corpus:
    """documents: source -> texts. funnel: (step, records in, records out, seconds). tagger: held-out
    accuracy, {} without."""

    documents: dict[str, list[str]]
    funnel: list[tuple[str, int, int, float]]
    tagger: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)

    def table(self) -> str:
        lines = [f"{'step':<34}{'in':>9}{'out':>9}{'seconds':>9}"]
        lines += [f"{step:<34}{n:>9,}{m:>9,}{s:>9.2f}" for step, n, m, s in self.funnel]
        size = {s: sum(map(len, d)) for s, d in self.documents.items()}
        lines += [
            f"  {s:<12}{len(d):>8,} documents {size[s] / 1e6:>8.2f} MB" for s, d in self.documents.items()
        ]
        if self.tagger:
            lines.append(
                "tagger, held-out: "
                + ", ".join(f"{k} {v:.3f}" if k != "n" else f"n {v:.0f}" for k, v in self.tagger.items())
            )
        return "\n".join(lines + [f"{k}: {v:,.4g}" for k, v in self.notes.items()])


def bar(items: list, name: str, quiet: bool):
    return tqdm(
        items, desc=name, unit="page", leave=False, disable=True if quiet else None
    )  # None: off when not a terminal


def clean(
    records: Iterable[Record],
    heldout: list[str],
    tagger: tagging.Tagger | None,
    quiet: bool = True,
    teacher=None,
) -> tuple[list[Record], list, dict]:
    """Records -> (records kept, with repeats by weight; funnel; tagger accuracy).

    heldout: evaluation texts no document may hold. tagger: a trained one; None with a `teacher` (list of
    records -> list of Tags) trains one here on at most 2,000 records; None without a teacher keeps every
    record once, untagged."""
    funnel, records, report = [], list(records), {}

    def step(name: str, kept: list, n: int, since: float) -> list:
        funnel.append((name, n, len(kept), time.perf_counter() - since))
        return kept

    t, n = time.perf_counter(), len(records)
    first = {}
    for rec in records:
        first.setdefault(canonical_url(rec.url), rec)  # global: the first fetch of an address wins
    records = step("URL dedup", list(first.values()), n, t)

    t, n = time.perf_counter(), len(records)
    for rec in bar(records, "extract", quiet):
        rec.text = rec.text or extract(rec.html)
        rec.html = ""
    records = step("extract (empty pages out)", [r for r in records if r.text], n, t)

    t, n = time.perf_counter(), len(records)
    root = near_duplicates([r.text for r in records])
    records = step(
        "MinHash dedup, exact Jaccard >= .7", [r for i, r in enumerate(records) if root[i] == i], n, t
    )

    t, n = time.perf_counter(), len(records)
    if tagger is None and teacher is not None and len(records) >= 10:
        sample = sorted(records, key=lambda r: tagging.unit(r.url, "teacher"))[:2000]
        tagger, report = tagging.train([r.text for r in sample], teacher(sample))
    if tagger is not None:
        for rec, tags in zip(records, tagging.tag(tagger, [r.text for r in records]), strict=True):
            rec.tags = tags
    funnel.append(("tag", n, n, time.perf_counter() - t))

    t = time.perf_counter()
    if tagger is not None:
        for domain in tagging.DOMAINS:
            group = [r for r in records if r.tags.domain == domain]
            if group:
                funnel.append((f"  rebalance {domain}", len(group), sum(wanted(r) for r in group), 0.0))
        records = [r for r in records for _ in range(wanted(r))]
    records = step("rebalance by tags (with repeats)", records, n, t)

    t, n = time.perf_counter(), len(records)
    bad = contaminated([r.text for r in records], heldout)
    records = step("decontaminate (16-gram)", [r for i, r in enumerate(records) if not bad[i]], n, t)
    return records, funnel, report


def wanted(rec: Record) -> int:
    return tagging.copies(rec.url, tagging.weight(rec.tags))


def build(
    problems: dict[str, list[tuple[str, str]]],
    heldout: dict[str, list[tuple[str, str]]] | None = None,
    seed: int = 0,
    pages: int = 6000,
    books: int = 120,
    book_words: int = 600,
    quiet: bool = False,
) -> Corpus:
    """The tiny world's corpus. A pure function of its arguments, the same in every process.

    problems: {"maths": [(question, solution)], "code": [...]}: training problems; every one is put on some
    page. heldout: the same of validation and test; planted on 1% of the maths and code pages, and no
    document may hold one. pages: original pages of the crawl (about 1.16 times as many are fetched); books:
    long documents, book_words each."""
    heldout = heldout or {}
    for name, given in {"problems": problems, "heldout": heldout}.items():
        if unknown := set(given) - {"maths", "code"}:
            raise ValueError(f"{name}: unknown source {sorted(unknown)[0]!r}, must be maths or code")
    t = time.perf_counter()
    crawled = web.crawl(seed, pages, problems, heldout)
    funnel = [("crawl", pages, len(crawled), time.perf_counter() - t)]
    records = [Record(p.url, html=p.html, ref=i) for i, p in enumerate(crawled)]
    truth = [tagging.Tags(p.domain, p.quality, p.depth, p.ad) for p in crawled]
    questions = [q for pairs in heldout.values() for q, _ in pairs]
    kept, steps, report = clean(
        records, questions, None, quiet, teacher=lambda sample: [truth[r.ref] for r in sample]
    )

    t = time.perf_counter()
    documents: dict[str, list[str]] = {source: [] for source in SOURCES}
    for rec in kept:
        documents[SOURCE_OF.get(rec.tags.domain, "web") if rec.tags else "web"].append(rec.text)
    documents["books"] += probes.books(make_world(seed), seed, books, book_words)
    funnel += [*steps, ("books", books, len(documents["books"]), time.perf_counter() - t)]
    corpus = Corpus(documents, funnel, report)
    corpus.notes = measure(crawled, {r.ref for r in kept}, kept, problems)
    return corpus


def measure(crawled: list[web.Page], refs: set[int], kept: list[Record], problems: dict) -> dict[str, float]:
    """What the known truth says about the pipeline: copies and leaks that got through, problems that
    survived verbatim."""
    family: dict[int, int] = {}
    for i in refs:
        original = crawled[i].copy_of if crawled[i].copy_of >= 0 else i
        family[original] = family.get(original, 0) + 1
    text = "\n\n".join(dict.fromkeys(r.text for r in kept))
    every = [block for pairs in problems.values() for block in pairs]
    verbatim = sum(content.block_text(*block) in text for block in every[:: max(1, len(every) // 500)])
    asked = len(every[:: max(1, len(every) // 500)])
    exact = sum(r.text == crawled[r.ref].text for r in kept)
    return {
        "copies left over": sum(n - 1 for n in family.values()),
        "leaks left over": sum(crawled[i].leak for i in refs),
        "share of documents extracted exactly": exact / max(1, len(kept)),
        "share of given problems found verbatim (500 asked)": verbatim / max(1, asked),
    }


def documents(cfg) -> dict[str, list[str]]:
    """For a script's config: any object with problems, heldout, seed, pages, books, book_words. -> source
    -> texts."""
    return build(cfg.problems, cfg.heldout, cfg.seed, cfg.pages, cfg.books, cfg.book_words).documents


def main() -> None:
    parser = argparse.ArgumentParser(description="build the tiny world's corpus and print the funnel")
    parser.add_argument("--pages", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--maths", type=int, default=3000, help="training problems in maths")
    parser.add_argument("--code", type=int, default=2000, help="training problems in code")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    pairs = lambda ps: [(p.question, f"{p.reasoning}\n{p.solution}".strip()) for p in ps]
    train = {
        "maths": pairs(maths.problems(args.maths, "train", args.seed)),
        "code": pairs(code.problems(args.code, "train", args.seed, tests=0)),
    }
    heldout = {
        "maths": pairs(maths.problems(200, "test", args.seed)),
        "code": pairs(code.problems(200, "test", args.seed, tests=0)),
    }
    print(build(train, heldout, args.seed, args.pages).table())
    print(f"total: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
