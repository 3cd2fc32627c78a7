"""
The RL problem set: the filters of report section 3.2, and test difficulty (3.3.1) from answers of several models.

    python eval.py --ckpt=out/tiny/base --problems=out/tiny/problems/rl_all.jsonl --samples=4 --temperature=1 \\
        --top_p=1 --out=out/tiny/difficulty/base.json          # also writes base_answers.jsonl beside it
    python eval.py --ckpt=out/tiny/sft --problems=out/tiny/problems/rl_all.jsonl --samples=4 --temperature=1 \\
        --top_p=1 --out=out/tiny/difficulty/sft.json
    python -m data.rl_problems
    python -m data.rl_problems config/mimo_7b_problems.py   # real sets: all filters

In this order; each reason counts only problems that the filters before it kept:

    held out, copy   n-gram decontamination and deduplication (data/filters.py); with `heldout` and `dedup`
    reference        nobody can match it: an answer that cannot be read, an output beyond the judge's limit
    golden           the golden solution does not pass its tests; with `golden`
    unsolved         maths that the strong model never solves; code without a golden solution of which no test passes in
                     any of its answers; with `strong`
    too easy         maths that the last model of `answers` (the SFT model) solves in more than 90% of its answers, and
                     code that it solves every time

The counts are printed, and written to NAME_filters.json beside the set with the ids. Proofs, multiple choice and
problems without tests go before, in data/hub.py. Then the pass rate of every unit test over all answers of all models,
and exact one-dimensional k-means over the rates of a problem's tests: easy, medium and hard (Fig. 5) are difficulty 0,
1 and 2. The report is silent on the clustering; its Fig. 5 fits edges near 0.3 and 0.7. An answer without a program
passes no test. The report draws 16 answers per problem.

Expect about seven eighths of the tiny world's 1,200 RL problems to be kept, within five seconds.
"""
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import configurator
from configurator import UserError
from data.filters import check_references, copies, golden_faults
from data.jsonl import line_of, read_jsonl, whole_file
from data.problems import Problem, read_problems, write_problems
from judge import Judge
from reward import difficulty_levels, estimate_pass_rates, extract_program

REASONS = ("held out", "copy", "reference", "golden", "unsolved", "too easy")
ANSWERS = ["out/tiny/difficulty/base_answers.jsonl", "out/tiny/difficulty/sft_answers.jsonl"]


@dataclass(frozen=True)
class Config:
    problems: str = "out/tiny/problems/rl_all.jsonl"      # every RL problem
    out: str = "out/tiny/problems/rl.jsonl"               # those that are kept, their tests with estimated difficulty
    answers: list[str] = field(default_factory=ANSWERS.copy)   # eval.py's answers files, the SFT model's last
    kinds: list[Literal["maths", "code"]] = ("maths", "code")   # the others are left out before all filters
    max_maths_rate: float = 0.9                           # maths solved more often than this is dropped [paper 3.2]
    max_code_rate: float = 1.0                            # code solved this often or more is dropped [paper 3.2]
    levels: int = 3                                       # difficulty levels of the tests of a problem [paper Fig. 5]
    rules_only: bool = False                              # stop before the filters that read answers (unsolved, too
                                                          # easy): what is left is for the models to answer
    heldout: str = ""                                     # evaluation problems, .jsonl; "" = none
    dedup: bool = False                                   # drop copies; not in the tiny world, which repeats itself
    golden: bool = False                                  # golden solutions have to pass their tests
    strong: str = ""                                      # answers file of a strong model; "" = none
    max_faults: float = 0.05                              # more unmatched references than this end the run [ours]
    judge_workers: int = 2                                # sandboxed test runners, for the golden solutions

    def __post_init__(self):
        configurator.at_least(self, 1, "levels", "judge_workers")
        for name in ("max_maths_rate", "max_code_rate", "max_faults"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} = {getattr(self, name)} should be in [0, 1]")
        if not self.answers:
            raise UserError("answers = []: difficulty is estimated from the answers of at least one model")


def read_answers(path: str) -> dict[str, list[dict]]:
    """An answers file of eval.py. -> problem id -> its graded answers. UserError with file and line for other rows."""
    found: dict[str, list[dict]] = {}
    right = "eval.py writes such files"
    for n, row in read_jsonl(path, right):
        with line_of(path, n, right):
            answers = row["answers"]
            if not isinstance(answers, list) or not answers:
                raise UserError(f"problem {row['id']} has no answers")
            if not all(isinstance(a["verdicts"], list) and isinstance(a["passed"], bool) for a in answers):
                raise UserError("each answer needs passed (a bool) and verdicts (a list)")
            found[row["id"]] = answers
    return found


def with_difficulty(problem: Problem, answers: list[dict], k: int) -> Problem:
    """The same problem with the difficulty of its tests, 0 (easiest) to k - 1, from their pass rates in the answers."""
    n = len(problem.tests)
    table = [a["verdicts"] if len(a["verdicts"]) == n else ["RE"] * n for a in answers]
    levels = difficulty_levels(estimate_pass_rates(table), k)
    tests = tuple(replace(test, difficulty=level) for test, level in zip(problem.tests, levels, strict=True))
    return replace(problem, tests=tests)


# ---- the filters: each gives the reason why a problem goes, "" if it stays ------------------------------------------

def by_rules(problems: list[Problem], cfg: Config) -> list[str]:
    """held out, copy, reference, golden. UserError if more than cfg.max_faults have a reference nobody can match."""
    heldout = [p.question for p in read_problems(cfg.heldout)] if cfg.heldout else []
    reasons = copies([p.question for p in problems], heldout) if heldout or cfg.dedup else [""] * len(problems)
    if not cfg.dedup:
        reasons = ["" if reason == "copy" else reason for reason in reasons]
    faults = check_references(cfg.problems, problems, cfg.max_faults)
    reasons = [reason or fault and "reference" for reason, fault in zip(reasons, faults, strict=True)]
    if cfg.golden:
        with Judge(workers=cfg.judge_workers) as judge:
            faults = golden_faults([p for p, reason in zip(problems, reasons, strict=True) if not reason], judge)
        reasons = ["golden" if p.id in faults else reason for p, reason in zip(problems, reasons, strict=True)]
    return reasons


def by_strong_model(problem: Problem, answers: list[dict]) -> str:
    """unsolved: too hard, or its answer or tests are wrong. A code problem with a golden solution stays [paper 3.2]."""
    if problem.kind == "maths":
        return "" if any(a["passed"] for a in answers) else "unsolved"
    golden = extract_program(problem.solution) if problem.solution else None
    return "" if golden or any("AC" in a["verdicts"] for a in answers) else "unsolved"


def by_pass_rate(problem: Problem, answers: list[dict], cfg: Config) -> str:
    """too easy, by the answers of the SFT model."""
    rate = sum(a["passed"] for a in answers) / len(answers)
    easy = rate > cfg.max_maths_rate if problem.kind == "maths" else rate >= cfg.max_code_rate
    return "too easy" if easy else ""


def main(cfg: Config) -> None:
    """Read problems and answers, filter, estimate difficulty, write the RL problem set."""
    problems = [p for p in read_problems(cfg.problems) if p.kind in cfg.kinds]
    files = [] if cfg.rules_only else [*cfg.answers, *([cfg.strong] if cfg.strong else [])]
    models = [read_answers(path) for path in files]
    kept, spread, gone = [], Counter(), {}
    for p, reason in zip(problems, by_rules(problems, cfg), strict=True):
        missing = [path for path, found in zip(files, models, strict=True) if p.id not in found]
        if missing and not reason:
            raise UserError(f"{missing[0]} has no answers to problem {p.id} of {cfg.problems}")
        if not reason and len(models) > len(cfg.answers):
            reason = by_strong_model(p, models[-1][p.id])
        if not reason and models:
            reason = by_pass_rate(p, models[len(cfg.answers) - 1][p.id], cfg)
        if reason:
            gone.setdefault(reason, []).append(p)
            continue
        if p.kind == "code" and models:
            p = with_difficulty(p, [a for found in models[:len(cfg.answers)] for a in found[p.id]], cfg.levels)
            spread[len({t.difficulty for t in p.tests})] += 1
        kept.append(p)
    counts = {reason: {kind: n for kind in ("maths", "code") if (n := sum(p.kind == kind for p in gone[reason]))}
              for reason in REASONS if reason in gone}
    words = "; ".join(f"{reason}: " + ", ".join(f"{n} {kind}" for kind, n in by_kind.items())
                      for reason, by_kind in counts.items())
    if not kept:
        raise UserError(f"{cfg.problems}: nothing is left for RL ({words})")
    write_problems(cfg.out, kept)
    summary = {"read": len(problems), "kept": len(kept), "dropped": counts,
               "ids": {reason: [p.id for p in some] for reason, some in gone.items()}, "config": asdict(cfg)}
    with whole_file(Path(cfg.out).with_name(f"{Path(cfg.out).stem}_filters.json")) as f:
        json.dump(summary, f, indent=1)
    print(f"{len(kept)} of {len(problems)} problems kept in {cfg.out}; {words or 'none dropped'}"
          + ("" if cfg.rules_only else "; code problems by number of difficulty levels: "
             + ", ".join(f"{k}: {spread[k]}" for k in sorted(spread))))


if __name__ == "__main__":
    configurator.run(main, Config)
