"""
The corpus pipeline, from fetched pages to weighted plain-text documents, with a count after every step (report 2.1).

    pages -> URL dedup -> extract -> MinHash dedup -> tag -> rebalance by tags -> decontaminate -> documents by source

This is the tiny world's crawl, in memory; data/build.py takes real corpora of any size through the same steps. The
sources are what the stages of pre-training mix: web, maths, code, books. Not done, against the report: PDF parsing,
language models as taggers.

    python -m data.corpus --pages=6000          # prints the table of steps; 6 to 10 s on one slow core
"""
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import torch
from lxml import html
from tqdm import tqdm

import configurator
from configurator import UserError
from data import tag as tagging
from data.decontaminate import build_index, contaminated, cut
from data.dedup import canonical_url, near_duplicates
from data.extract import extract
from data.problems import Problem
from data.tiny import code, maths, probes, web
from data.tiny.pages import problem_text
from data.tiny.world import make_world

SOURCES = ("web", "maths", "code", "books")
SOURCE_OF = {"maths": "maths", "code": "code", "books": "books"}     # domain -> source; every other domain is web
Pairs = dict[str, list[tuple[str, str]]]                             # {"maths": [(question, solution)], "code": [...]}


@dataclass(frozen=True)
class Config:
    pages: int = 6000                     # original pages of the crawl
    maths: int = 3000                     # training problems in maths on these pages
    code: int = 2000                      # training problems in code
    seed: int = 0                         # of the world, the pages and the problems

    def __post_init__(self):
        configurator.at_least(self, 20, "pages")
        configurator.at_least(self, 1, "maths", "code")
        configurator.at_least(self, 0, "seed")


@dataclass
class Record:
    """One document on its way through the pipeline. The caller gives html or text."""
    url: str                             # or another name of it
    html: str | bytes = ""
    text: str = ""
    charset: str = ""                    # of html that is bytes, what the HTTP header says
    ref: int = -1                        # the caller's own number for it
    tags: tagging.Tags | None = None     # None until it is tagged


@dataclass
class Corpus:
    """What the pipeline made, and what it counted on the way."""
    documents: dict[str, list[str]]                         # source -> texts
    funnel: list[tuple[str, int, int, float]]               # (step, records in, records out, seconds)
    accuracy: dict[str, float] = field(default_factory=dict)   # of the tagger on held-out labels, {} without one
    notes: dict[str, float] = field(default_factory=dict)   # what `measure` found

    def table(self) -> str:
        """All of it as text for the screen."""
        lines = [f"{'step':<34}{'in':>9}{'out':>9}{'seconds':>9}"]
        lines += [f"{step:<34}{n:>9,}{m:>9,}{s:>9.2f}" for step, n, m, s in self.funnel]
        lines += [f"  {source:<12}{len(texts):>8,} documents {sum(map(len, texts)) / 1e6:>8.2f} MB"
                  for source, texts in self.documents.items()]
        if self.accuracy:
            values = (f"{k} {v:.3f}" if k != "n" else f"n {v:.0f}" for k, v in self.accuracy.items())
            lines.append("tagger, held-out: " + ", ".join(values))
        return "\n".join(lines + [f"{k}: {v:,.4g}" for k, v in self.notes.items()])


# ---- the pipeline ---------------------------------------------------------------------------------------------------

def clean(records: Iterable[Record], heldout: list[str], tagger: tagging.Tagger | None,
          teacher: Callable[[list[Record]], list[tagging.Tags]] | None = None,
          cut_out: bool = False, without: Collection[str] = ()) -> tuple[list[Record], list, dict[str, float]]:
    """
    Records -> (the records kept, repeated by weight; the steps as in Corpus.funnel; accuracy of the tagger).

    heldout   texts of evaluation sets, which no document may hold
    tagger    a trained one. None with a teacher: one is trained here on at most 2,000 records. None without a teacher:
              every record is kept once, untagged
    cut_out   take out the paragraph with the overlap and keep the rest of the document, instead of dropping it
    without   steps to leave out, for comparison: "extract" (all text of a page then), "dedup", "rebalance"
    """
    funnel, records = [], list(records)
    clock = time.perf_counter()

    def step(name: str, kept: list) -> list:
        nonlocal clock
        now = time.perf_counter()
        funnel.append((name, len(records), len(kept), now - clock))
        clock = now
        return kept

    first = {}
    for record in records:                       # over the whole crawl: the first fetch is the one kept
        first.setdefault("dedup" not in without and canonical_url(record.url) or id(record), record)
    records = step("URL dedup", list(first.values()))
    counts = Counter()
    for record in tqdm(records, desc="extract", unit="page", leave=False, disable=None):
        record.text = record.text or (html.fromstring(record.html).text_content() if "extract" in without else
                                      extract(record.html, record.charset, counts))
        record.html = ""
    records = step("extract (empty pages out)", [r for r in records if r.text])
    funnel += [(f"  {what}", funnel[-1][1], n, 0.0) for what, n in counts.items()]
    root = range(len(records)) if "dedup" in without else near_duplicates([r.text for r in records])
    kept = [r for i, r in enumerate(records) if root[i] == i]
    records = step("MinHash dedup, exact Jaccard >= .7", kept)
    accuracy = put_tags(records, tagger, teacher)
    step("tag", records)
    for domain in tagging.DOMAINS:
        group = [r for r in records if r.tags and r.tags.domain == domain]
        if group and "rebalance" not in without:
            funnel.append((f"  rebalance {domain}", len(group), sum(map(copies, group)), 0.0))
    if "rebalance" not in without:
        records = step("rebalance by tags (with repeats)", [r for r in records for _ in range(copies(r))])
    index = build_index(heldout)
    bad = contaminated([r.text for r in records], index)
    if cut_out:
        for record in {id(r): r for r, hit in zip(records, bad, strict=True) if hit}.values():
            record.text = cut(record.text, index)
        step("decontaminate (16-gram, paragraphs)", kept := [r for r in records if r.text])
    else:
        kept = step("decontaminate (16-gram)", [r for r, hit in zip(records, bad, strict=True) if not hit])
    return kept, funnel, accuracy


def put_tags(records: list[Record], tagger: tagging.Tagger | None,
             teacher: Callable[[list[Record]], list[tagging.Tags]] | None) -> dict[str, float]:
    """
    Sets record.tags of every record. With a teacher and no tagger, one is trained on the records with the lowest hashes
    of their addresses. On one thread, so that sums are added in one order and the corpus is the same on every machine.
    -> accuracy on held-out labels, {} when nothing was trained.
    """
    accuracy, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if tagger is None and teacher is not None and len(records) >= 10:
            chosen = sorted(records, key=lambda r: tagging.unit(r.url, "teacher"))[:2000]
            tagger, accuracy = tagging.train([r.text for r in chosen], teacher(chosen))
        if tagger is not None:
            for record, tags in zip(records, tagging.tag(tagger, [r.text for r in records]), strict=True):
                record.tags = tags
    finally:
        torch.set_num_threads(threads)
    return accuracy


def copies(record: Record) -> int:
    """How often the record is written into the corpus; once when it has no tags."""
    return tagging.copies(record.url, tagging.weight(record.tags)) if record.tags else 1


# ---- the tiny world's corpus ----------------------------------------------------------------------------------------

def build(problems: Pairs, heldout: Pairs | None = None, seed: int = 0, pages: int = 6000, books: int = 120,
          book_words: int = 600, without: Collection[str] = ()) -> Corpus:
    """
    The tiny world's corpus. A pure function of its arguments, the same in every process.

    problems     training problems; each is put on some page
    heldout      the same of validation and test; some are planted on 1% of the maths and code pages, and no document of
                 the corpus may hold one
    pages        original pages of the crawl. 1.16 times as many are fetched, and more when there are so many problems
                 that maths and code pages are added (data/tiny/web.py)
    books        long documents of book_words words
    without      steps to leave out (clean)

    UserError for a source that is neither maths nor code, and when the crawl is too small for the problems.
    """
    heldout = heldout or {}
    for name, pairs in {"problems": problems, "heldout": heldout}.items():
        if unknown := set(pairs) - {"maths", "code"}:
            raise UserError(f"{name}: unknown source {sorted(unknown)[0]!r}, must be maths or code")
    start = time.perf_counter()
    crawled = web.crawl(seed, pages, problems, heldout)
    funnel = [("crawl", sum(p.copy_of < 0 for p in crawled), len(crawled), time.perf_counter() - start)]
    records = [Record(p.url, html=p.html, ref=i) for i, p in enumerate(crawled)]
    truth = [tagging.Tags(p.domain, p.quality, p.depth, p.ad) for p in crawled]
    questions = [question for pairs in heldout.values() for question, _ in pairs]
    teacher = lambda sample: [truth[r.ref] for r in sample]
    kept, steps, accuracy = clean(records, questions, None, teacher, cut_out=True, without=without)

    start = time.perf_counter()
    documents: dict[str, list[str]] = {source: [] for source in SOURCES}
    for record in kept:
        documents[SOURCE_OF.get(record.tags.domain, "web") if record.tags else "web"].append(record.text)
    documents["books"] += probes.books(make_world(seed), seed, books, book_words)
    funnel += [*steps, ("books", books, len(documents["books"]), time.perf_counter() - start)]
    return Corpus(documents, funnel, accuracy, measure(crawled, kept, problems, questions))


def measure(crawled: list[web.Page], kept: list[Record], problems: Pairs, heldout: list[str]) -> dict[str, float]:
    """
    What the known truth says about the pipeline: copies and planted problems that got through, training problems that
    are still there word for word. By plain string search, so that it does not share a mistake with the hashes.
    """
    family: dict[int, int] = {}
    for i in {r.ref for r in kept}:
        original = crawled[i].copy_of if crawled[i].copy_of >= 0 else i
        family[original] = family.get(original, 0) + 1
    text = "\n\n".join(dict.fromkeys(r.text for r in kept))
    truth = [set(crawled[r.ref].text.split("\n\n")) for r in kept]
    exact = sum(set(r.text.split("\n\n")) <= t for r, t in zip(kept, truth, strict=True))
    leaks = [r for r in kept if crawled[r.ref].leak]
    notes = {"copies left over": sum(n - 1 for n in family.values()),
             "leaks left over": sum(any(f"Problem: {q}\n" in r.text for q in heldout) for r in leaks),
             "documents whose paragraphs are all as on the page, share": exact / max(1, len(kept))}
    for kind, pairs in problems.items():
        sample = pairs[::max(1, len(pairs) // 500)]
        found = sum(problem_text(*pair) in text for pair in sample)
        notes[f"{kind} problems found verbatim, share of {len(sample)} tried"] = found / max(1, len(sample))
    return notes


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    training = {"maths": pairs_of(maths.problems(cfg.maths, "train", cfg.seed)),
                "code": pairs_of(code.problems(cfg.code, "train", cfg.seed, tests=0))}
    heldout = {"maths": pairs_of(maths.problems(200, "test", cfg.seed)),
               "code": pairs_of(code.problems(200, "test", cfg.seed, tests=0))}
    print(build(training, heldout, cfg.seed, cfg.pages).table())
    print(f"total: {time.perf_counter() - start:.1f} s")


def pairs_of(problems: list[Problem]) -> list[tuple[str, str]]:
    """Problems -> (question, worked solution)."""
    return [(p.question, f"{p.reasoning}\n{p.solution}".strip()) for p in problems]


if __name__ == "__main__":
    configurator.run(main, Config)
