"""The corpus pipeline from fetched pages to weighted plain-text documents, with a count after every step
(report 2.1).

    pages -> URL dedup -> extract -> MinHash dedup -> tag -> rebalance by tags -> decontaminate -> documents
    per source
The tiny world's crawl and a real one (data/hub.py) go through the same `clean`. Sources are what the stages
of pre-training mix: web, maths, code, books. Left out against the report: PDF parsing, language models as
taggers.

    python -m data.corpus --pages=6000          # prints the funnel; 6 to 10 s on one slow core
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from configurator import UserError
from data import tag as tagging
from data.decontaminate import build_index, contaminated, cut
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


def clean(
    records: Iterable[Record],
    heldout: list[str],
    tagger: tagging.Tagger | None,
    quiet: bool = True,
    teacher: Callable | None = None,
    cut_out: bool = False,
) -> tuple[list[Record], list, dict]:
    """Records -> (records kept, with repeats by weight; funnel; tagger accuracy).

    heldout: evaluation texts no document may hold. cut_out: take out the paragraph with the overlap and keep
    the rest of the document, instead of dropping it. tagger: a trained one; None with a `teacher` (list of
    records -> list of Tags) trains one here on at most 2,000 records; None without a teacher keeps every
    record once, untagged."""
    funnel, records = [], list(records)
    clock = time.perf_counter()

    def step(name: str, kept: list) -> list:
        nonlocal clock
        now = time.perf_counter()
        funnel.append((name, len(records), len(kept), now - clock))
        clock = now
        return kept

    first = {}
    for rec in records:
        first.setdefault(canonical_url(rec.url), rec)  # global: the first fetch of an address wins
    records = step("URL dedup", list(first.values()))
    for rec in tqdm(records, desc="extract", unit="page", leave=False, disable=True if quiet else None):
        rec.text = rec.text or extract(rec.html)
        rec.html = ""
    records = step("extract (empty pages out)", [r for r in records if r.text])
    root = near_duplicates([r.text for r in records])
    kept = [r for i, r in enumerate(records) if root[i] == i]
    records = step("MinHash dedup, exact Jaccard >= .7", kept)
    report = put_tags(records, tagger, teacher)
    step("tag", records)
    for domain in tagging.DOMAINS:
        group = [r for r in records if r.tags and r.tags.domain == domain]
        if group:
            funnel.append((f"  rebalance {domain}", len(group), sum(map(wanted, group)), 0.0))
    records = step("rebalance by tags (with repeats)", [r for r in records for _ in range(wanted(r))])
    index = build_index(heldout)
    bad = contaminated([r.text for r in records], index)
    if cut_out:
        for rec in {id(r): r for r, hit in zip(records, bad, strict=True) if hit}.values():
            rec.text = cut(rec.text, index)
        step("decontaminate (16-gram, paragraphs)", kept := [r for r in records if r.text])
    else:
        kept = step("decontaminate (16-gram)", [r for r, hit in zip(records, bad, strict=True) if not hit])
    return kept, funnel, report


def put_tags(
    records: list[Record], tagger: tagging.Tagger | None, teacher: Callable | None
) -> dict[str, float]:
    """Tags in place; with a teacher and no tagger, trains one on the records with the lowest id hashes. One
    thread, so that sums are added in one order and the corpus is the same on every machine. -> held-out
    accuracy, {} if none."""
    report, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if tagger is None and teacher is not None and len(records) >= 10:
            chosen = sorted(records, key=lambda r: tagging.unit(r.url, "teacher"))[:2000]
            tagger, report = tagging.train([r.text for r in chosen], teacher(chosen))
        if tagger is not None:
            for rec, tags in zip(records, tagging.tag(tagger, [r.text for r in records]), strict=True):
                rec.tags = tags
    finally:
        torch.set_num_threads(threads)
    return report


def wanted(rec: Record) -> int:
    return tagging.copies(rec.url, tagging.weight(rec.tags)) if rec.tags else 1


def build(
    problems: dict[str, list[tuple[str, str]]],
    heldout: dict[str, list[tuple[str, str]]] | None = None,
    seed: int = 0,
    pages: int = 6000,
    books: int = 120,
    book_words: int = 600,
    quiet: bool = False,
    per_page: int = 4,
) -> Corpus:
    """The tiny world's corpus. A pure function of its arguments, the same in every process.

    problems: {"maths": [(question, solution)], "code": [...]}: training problems; each is put on some page.
    heldout: the same of validation and test; planted on 1% of the maths and code pages, and no document may
    hold one. pages: original pages of the crawl. 1.16 times as many are fetched, and more again when the
    problems do not fit with per_page (0 = any number) on a maths or code page. books: long documents of
    book_words words. ValueError for a source that is neither maths nor code."""
    heldout = heldout or {}
    for name, given in {"problems": problems, "heldout": heldout}.items():
        if unknown := set(given) - {"maths", "code"}:
            raise UserError(f"{name}: unknown source {sorted(unknown)[0]!r}, must be maths or code")
    t = time.perf_counter()
    crawled = web.crawl(seed, pages, problems, heldout, per_page)
    funnel = [("crawl", sum(p.copy_of < 0 for p in crawled), len(crawled), time.perf_counter() - t)]
    records = [Record(p.url, html=p.html, ref=i) for i, p in enumerate(crawled)]
    truth = [tagging.Tags(p.domain, p.quality, p.depth, p.ad) for p in crawled]
    questions = [q for pairs in heldout.values() for q, _ in pairs]
    teacher = lambda sample: [truth[r.ref] for r in sample]
    kept, steps, report = clean(records, questions, None, quiet, teacher, cut_out=True)

    t = time.perf_counter()
    documents: dict[str, list[str]] = {source: [] for source in SOURCES}
    for rec in kept:
        documents[SOURCE_OF.get(rec.tags.domain, "web") if rec.tags else "web"].append(rec.text)
    documents["books"] += probes.books(make_world(seed), seed, books, book_words)
    funnel += [*steps, ("books", books, len(documents["books"]), time.perf_counter() - t)]
    corpus = Corpus(documents, funnel, report)
    corpus.notes = measure(crawled, kept, problems, questions)
    return corpus


def measure(
    crawled: list[web.Page], kept: list[Record], problems: dict, heldout: list[str]
) -> dict[str, float]:
    """What the known truth says about the pipeline: copies and leaks that got through, problems that survived
    verbatim. By plain string search, so that it does not share a mistake with the hashes."""
    family: dict[int, int] = {}
    for i in {r.ref for r in kept}:
        original = crawled[i].copy_of if crawled[i].copy_of >= 0 else i
        family[original] = family.get(original, 0) + 1
    text = "\n\n".join(dict.fromkeys(r.text for r in kept))
    truth = [set(crawled[r.ref].text.split("\n\n")) for r in kept]
    exact = sum(set(r.text.split("\n\n")) <= t for r, t in zip(kept, truth, strict=True))
    leaks = [r for r in kept if crawled[r.ref].leak]
    notes = {
        "copies left over": sum(n - 1 for n in family.values()),
        "leaks left over": sum(any(f"Problem: {q}\n" in r.text for q in heldout) for r in leaks),
        "documents whose paragraphs are all as on the page, share": exact / max(1, len(kept)),
    }
    for kind, pairs in problems.items():
        asked = pairs[:: max(1, len(pairs) // 500)]
        found = sum(content.block_text(*pair) in text for pair in asked)
        notes[f"{kind} problems found verbatim, share of {len(asked)} asked"] = found / max(1, len(asked))
    return notes


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
    if args.pages < 20 or args.maths < 1 or args.code < 1:
        raise SystemExit(f"corpus error: pages = {args.pages} should be at least 20, maths = {args.maths} and code = "
                         f"{args.code} at least 1")
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
