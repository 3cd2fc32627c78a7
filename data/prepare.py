"""
All data of the tiny run, made from one seed (report sections 2.1, 3.1, 3.2).

    python -m data.prepare                     # writes shards, problems and SFT samples to out/tiny in half a minute

    problems/test.jsonl      held out by identity: what eval.py measures
    problems/valid.jsonl     held out by identity: the curves during RL
    problems/short.jsonl     held out by identity: one operation, "What is 12 - 5?"; not in the demo's averages
    problems/rl_all.jsonl    training problems of RL, code with a ladder of tests; data.rl_problems filters them
    sft.jsonl                chat samples, maths with worked reasoning
    data/<source>            token shards for the mixtures of the stages: web, maths, code, books, synth
    data/valid/<source>      documents kept back for the validation loss

The crawl goes through the same extraction, dedup, tagging and decontamination as a real one (data/corpus.py). Maths
pages answer most of their problems in steps and the others with the result alone; forum answers to code problems are
sometimes careless, as on the real web. So the base model knows good and bad ways to answer, and RL can raise the share
of the good ones. Synthetic reasoning (source `synth`: maths with its steps inside <think>, code as the program alone)
is for stage 3 only, as in the report.

Differs from the report: the problem generators write the reasoning, not a stronger model.
"""
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import configurator
from configurator import UserError
from data import corpus
from data.jsonl import write_jsonl
from data.problems import PLAIN, Problem, identity, messages, response, split_of, write_problems
from data.shards import write_source
from data.tiny import code, maths, probes
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    out: str = "out/tiny"                 # folder for all that is written
    tokenizer: str = "tiny"               # "tiny" (embedded) or a folder with tokenizer files
    seed: int = 1                         # world, pages, problems; the recipe was chosen on this one (docs/lab_log.md)
    pages: int = 5000                     # original pages of the crawl
    books: int = 150                      # long documents, for the long-context stage
    book_words: int = 500                 # words in each
    maths_problems: int = 20_000          # worked problems on pages, training split
    code_problems: int = 8_000            # worked problems on pages, training split
    steps_share: float = 0.9              # share of the maths problems on pages that show their steps
    careless_share: float = 0.35          # share of the code answers on pages that have a mistake
    tables: int = 500                     # pages of number facts
    synth: int = 3_000                    # synthetic reasoning answers for stage 3, half maths, half code
    recall: int = 0                       # documents that say numbers and repeat them: source `recall` (Fig. 4)
    sft: int = 4_000                      # chat samples, half maths, half code
    rl_maths: int = 800                   # RL training problems; code, whose reward is dense, needs fewer
    rl_code: int = 400                    # the same, with tests
    test: int = 300                       # held-out problems of each kind, eval.py
    valid: int = 48                       # held-out problems of each kind, RL curves
    tests: int = 12                       # unit tests per code problem
    without: list[Literal["extract", "dedup", "rebalance"]] = ()   # steps of the corpus pipeline to leave out
    valid_share: float = 0.04             # share of documents kept back for the validation loss
    threads: int = 1                      # torch threads (the tagger)

    def __post_init__(self):
        configurator.at_least(self, 1, "book_words", "maths_problems", "code_problems", "synth", "sft", "rl_maths",
                              "rl_code", "test", "valid", "tests", "threads")
        configurator.at_least(self, 0, "books", "tables", "recall", "seed")
        configurator.at_least(self, 20, "pages")
        for name in ("steps_share", "careless_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} = {getattr(self, name)} should be in [0, 1]")
        if not 0 < self.valid_share < 1:
            raise UserError(f"valid_share = {self.valid_share} should be above 0 and below 1")


GENERATORS = {"maths": maths, "code": code}


def training(kind: str, n: int, rng: random.Random) -> list[Problem]:
    """n problems of the training split, without tests. A problem may occur twice, as in a real crawl."""
    problems = []
    while len(problems) < n:
        p = GENERATORS[kind].problem(rng)
        if split_of(p.id) == "train":
            problems.append(p)
    return problems


def heldout(kind: str, split: str, n: int, cfg: Config) -> list[Problem]:
    """n different problems of the split "test" or "valid", code with unit tests."""
    tests = {"tests": cfg.tests} if kind == "code" else {}
    return GENERATORS[kind].problems(n, split, cfg.seed, **tests)


def reference_response(p: Problem) -> str:
    """The right response to a problem: maths with its reasoning inside <think>, code as the program alone."""
    return response(p, think=p.kind == "maths")


def page_answer(p: Problem, rng: random.Random, cfg: Config) -> str:
    """The answer on a web page: maths with or without steps, code right or careless."""
    if p.kind == "maths":
        steps = p.reasoning.replace("\n", ", ") + ". " if rng.random() < cfg.steps_share else ""
        return steps + p.solution
    if rng.random() >= cfg.careless_share:
        return p.solution
    lines = p.solution.split("\n")
    body = [i for i, line in enumerate(lines) if line.startswith("    xs = ")]
    if rng.random() < 0.7:
        del lines[rng.choice(body)]                              # one step of the program is missing
    else:
        last = len(lines) - 2                                    # it returns something else than the problem asks for
        lines[last] = f"    return {rng.choice(code.CORES).line}"
    return "\n".join(lines)


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out)
    tokenizer = Tokenizer.load(cfg.tokenizer)
    rng = random.Random(f"prepare {cfg.seed}")

    # ---- problems: three disjoint splits by identity ----------------------------------------------------------------
    held = {split: {kind: heldout(kind, split, n, cfg) for kind in GENERATORS}
            for split, n in (("test", cfg.test), ("valid", cfg.valid))}
    for split, kinds in held.items():
        write_problems(out / f"problems/{split}.jsonl", kinds["maths"] + kinds["code"])
    write_problems(out / "problems/short.jsonl", maths.problems(min(cfg.test, 30), "test", cfg.seed, levels=(0,)))
    rl = [*maths.problems(cfg.rl_maths, "train", cfg.seed, levels=maths.TRAINED),
          *code.problems(cfg.rl_code, "train", cfg.seed, tests=cfg.tests)]
    write_problems(out / "problems/rl_all.jsonl", rl)
    print(f"problems: {2 * cfg.test} test, {2 * cfg.valid} valid, {len(rl)} for RL")

    # ---- chat samples for SFT ---------------------------------------------------------------------------------------
    samples = training("maths", cfg.sft // 2, rng) + training("code", cfg.sft // 2, rng)
    rng.shuffle(samples)
    write_jsonl(out / "sft.jsonl", ({"id": p.id, "source": p.kind, "messages": messages(p, reference_response(p))}
                                    for p in samples))

    # ---- documents: the crawl through the pipeline, books, synthetic reasoning --------------------------------------
    pages = {kind: [(p.question, page_answer(p, rng, cfg)) for p in training(kind, n, rng)]
             for kind, n in (("maths", cfg.maths_problems), ("code", cfg.code_problems))}
    held_pairs = {kind: [(p.question, p.solution) for split in held.values() for p in split[kind]]
                  for kind in GENERATORS}
    crawl = corpus.build(pages, held_pairs, cfg.seed, cfg.pages, cfg.books, cfg.book_words,
                         cfg.without)
    print(crawl.table())
    documents = dict(crawl.documents)
    documents["maths"] = documents["maths"] + [maths.table(rng) for _ in range(cfg.tables)]
    documents["synth"] = [f"{PLAIN.format(question=p.question)} {reference_response(p)}"
                          for kind in GENERATORS for p in training(kind, cfg.synth // 2, rng)]

    if cfg.recall:
        documents["recall"] = [probes.recall(cfg.seed * 1_000_000 + i) for i in range(cfg.recall)]

    # ---- shards -----------------------------------------------------------------------------------------------------
    for name, texts in documents.items():
        ids = [np.array(tokenizer.encode(text) + [tokenizer.eos_id]) for text in texts]
        # chosen by content, so that all copies of a document are on one side
        kept_back = [int(identity(text), 16) % 10_000 < 10_000 * cfg.valid_share for text in texts]
        for folder, wanted in ((out / "data", False), (out / "data/valid", True)):
            part = [x for x, back in zip(ids, kept_back, strict=True) if back == wanted]
            if not part:
                raise UserError(f"source {name!r} has no document for {folder}: raise pages or valid_share")
            write_source(str(folder), name, part, tokenizer.vocab_size, tokenizer=tokenizer.fingerprint)
            if not wanted:
                print(f"  {name:8} {len(part):7,} documents {sum(map(len, part)):10,} tokens")


if __name__ == "__main__":
    configurator.run(main, Config)
