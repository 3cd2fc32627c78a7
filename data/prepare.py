"""
Everything the tiny run reads, from one seed (report sections 2.1, 3.1, 3.2).

    python -m data.prepare                     # out/tiny: shards, problems, SFT samples

    problems/test.jsonl      held out by identity: what eval.py measures
    problems/valid.jsonl     held out by identity: curves during RL
    problems/rl_all.jsonl    training problems of RL, code with a ladder of tests; rl_data.py filters them
    sft.jsonl                chat samples, maths with worked reasoning
    data/<source>            token shards for the stages' mixtures: web, maths, code, books, synth
    data/valid/<source>      documents kept back for the validation loss

The crawl goes through the same extraction, dedup, tagging and decontamination as a real one (data/corpus.py). Maths
pages answer some of their problems in steps, the others in one go; forum answers to code problems are sometimes
careless, as on the real web: that mixture is what RL later finds better ways in. Synthetic reasoning (`synth`: maths
with its steps inside <think>, code as the program alone) is for stage 3 only, as in the report.

Differs from the report: the reasoning is written by the problem generators, not by a stronger model.
"""
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import configurator
from configurator import UserError
from data import corpus
from data.jsonl import write_jsonl
from data.problems import PLAIN, Problem, identity, messages, response, split_of, write_problems
from data.shards import write_source
from data.tiny import code, maths
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    out: str = "out/tiny"                 # everything goes below this folder
    tokenizer: str = "tiny"               # "tiny" (embedded) or a folder
    seed: int = 1                         # world, pages, problems; the recipe was chosen on this one (docs/lab_log.md)
    pages: int = 5000                     # original pages of the crawl
    books: int = 150                      # long documents, for the long-context stage
    book_words: int = 500                 # words in each
    maths_problems: int = 20_000          # worked on pages, training split
    code_problems: int = 8_000            # worked on pages, training split
    steps_share: float = 0.9              # share of maths pages' problems that show their steps
    careless_share: float = 0.35          # share of code pages' answers that forget something
    tables: int = 500                     # pages of number facts
    synth: int = 3_000                    # synthetic reasoning answers for stage 3, half maths, half code
    sft: int = 4_000                      # chat samples, half maths, half code
    rl_maths: int = 800                   # RL training problems; code, whose reward is dense, needs fewer
    rl_code: int = 400                    # the same, with tests
    test: int = 300                       # held-out problems of each kind, eval.py
    valid: int = 48                       # held-out problems of each kind, RL curves
    tests: int = 12                       # unit tests per code problem
    valid_share: float = 0.04             # share of documents kept back for the validation loss
    threads: int = 1                      # torch threads (the tagger)

    def __post_init__(self):
        configurator.at_least(self, 1, "book_words", "maths_problems", "code_problems", "synth", "sft", "rl_maths",
                              "rl_code", "test", "valid", "tests", "threads")
        configurator.at_least(self, 0, "books", "tables")
        configurator.at_least(self, 20, "pages")
        for name in ("steps_share", "careless_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} = {getattr(self, name)} should be in [0, 1]")
        if not 0 < self.valid_share < 1:
            raise UserError(f"valid_share = {self.valid_share} should be above 0 and below 1")


GENERATORS = {"maths": maths, "code": code}


def training(kind: str, n: int, rng: random.Random) -> list[Problem]:
    """n problems of the training split, repeats allowed (a crawl repeats itself); without tests."""
    found = []
    while len(found) < n:
        p = GENERATORS[kind].problem(rng)
        if split_of(p.id) == "train":
            found.append(p)
    return found


def page_answer(p: Problem, rng: random.Random, cfg: Config) -> str:
    """What a web page answers: maths with or without steps, code right or careless."""
    if p.kind == "maths":
        steps = p.reasoning.replace("\n", ", ") + ". " if rng.random() < cfg.steps_share else ""
        return steps + p.solution
    if rng.random() >= cfg.careless_share:
        return p.solution
    lines = p.solution.split("\n")
    body = [i for i, line in enumerate(lines) if line.startswith("    xs = ")]
    if rng.random() < 0.7:
        del lines[rng.choice(body)]                              # a clause forgotten
    else:
        last = len(lines) - 2                                    # another return than asked for
        lines[last] = f"    return {rng.choice(code.CORES).line}"
    return "\n".join(lines)


def heldout(kind: str, split: str, n: int, cfg: Config) -> list[Problem]:
    more = {"tests": cfg.tests} if kind == "code" else {}
    return GENERATORS[kind].problems(n, split, cfg.seed, **more)


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out)
    tokenizer = Tokenizer.load(cfg.tokenizer)
    rng = random.Random(f"prepare {cfg.seed}")

    # ---- problems: three disjoint splits by identity ---------------------------------------------------------------
    held = {split: {kind: heldout(kind, split, n, cfg) for kind in GENERATORS}
            for split, n in (("test", cfg.test), ("valid", cfg.valid))}
    for split, kinds in held.items():
        write_problems(out / f"problems/{split}.jsonl", kinds["maths"] + kinds["code"])
    rl = [*maths.problems(cfg.rl_maths, "train", cfg.seed),
          *code.problems(cfg.rl_code, "train", cfg.seed, tests=cfg.tests)]
    write_problems(out / "problems/rl_all.jsonl", rl)
    print(f"problems: {2 * cfg.test} test, {2 * cfg.valid} valid, {len(rl)} for RL")

    # ---- chat samples for SFT ------------------------------------------------------------------------------------
    samples = training("maths", cfg.sft // 2, rng) + training("code", cfg.sft // 2, rng)
    rng.shuffle(samples)
    write_jsonl(out / "sft.jsonl", ({"id": p.id, "source": p.kind, "messages": messages(p, answer(p))}
                                    for p in samples))

    # ---- documents: the crawl through the pipeline, books, synthetic reasoning -------------------------------------
    pages = {kind: [(p.question, page_answer(p, rng, cfg)) for p in training(kind, n, rng)]
             for kind, n in (("maths", cfg.maths_problems), ("code", cfg.code_problems))}
    secret = {kind: [(p.question, p.solution) for split in held.values() for p in split[kind]] for kind in GENERATORS}
    made = corpus.build(pages, secret, cfg.seed, cfg.pages, cfg.books, cfg.book_words)
    print(made.table())
    documents = dict(made.documents)
    documents["maths"] = documents["maths"] + [maths.table(rng) for _ in range(cfg.tables)]
    documents["synth"] = [f"{PLAIN.format(question=p.question)} {answer(p)}"
                          for kind in GENERATORS for p in training(kind, cfg.synth // 2, rng)]

    # ---- shards ---------------------------------------------------------------------------------------------------
    for name, texts in documents.items():
        ids = [np.array(tokenizer.encode(text) + [tokenizer.eos_id]) for text in texts]
        # by content, so that copies of a document stay on one side
        kept_back = [int(identity(text), 16) % 10_000 < 10_000 * cfg.valid_share for text in texts]
        for folder, wanted in ((out / "data", False), (out / "data/valid", True)):
            part = [x for x, back in zip(ids, kept_back, strict=True) if back == wanted]
            if not part:
                raise UserError(f"source {name!r} has no document for {folder}: raise pages or valid_share")
            write_source(str(folder), name, part, tokenizer.vocab_size)
            if not wanted:
                print(f"  {name:8} {len(part):7,} documents {sum(map(len, part)):10,} tokens")


def answer(p: Problem) -> str:
    """The reference answer with its reasoning; code answers go straight to the program."""
    return response(p, think=p.kind == "maths")


if __name__ == "__main__":
    configurator.run(main, Config)
