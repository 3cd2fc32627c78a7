"""
The RL problem set: pass-rate filters and test difficulty, from answers of several models (report sections 3.2, 3.3.1).

    python eval.py --ckpt=out/tiny/base --problems=out/tiny/problems/rl_all.jsonl --samples=4 --temperature=1 \\
        --top_p=1 --out=out/tiny/difficulty/base.json          # also writes base_answers.jsonl beside it
    python eval.py --ckpt=out/tiny/sft --problems=out/tiny/problems/rl_all.jsonl --samples=4 --temperature=1 \\
        --top_p=1 --out=out/tiny/difficulty/sft.json
    python -m data.rl_problems

Filters, by the last of the answers files (the SFT model's): a maths problem that it solves in more than 90% of its
answers is dropped, and a code problem that it solves every time. Then the pass rate of every unit test over all answers
of all models, and exact one-dimensional k-means over the rates of a problem's tests: easy, medium and hard (Fig. 5) are
difficulty 0, 1 and 2. The report is silent on the clustering; its Fig. 5 fits edges near 0.3 and 0.7. An answer without
a program passes no test. Unlike us, the report draws 16 answers per problem, and also drops what strong models never
solve.

Expect about seven eighths of the tiny world's 1,200 RL problems to be kept, within five seconds.
"""
from collections import Counter
from dataclasses import dataclass, field, replace

import configurator
from configurator import UserError
from data.jsonl import line_of, read_jsonl
from data.problems import Problem, read_problems, write_problems
from reward import difficulty_levels, estimate_pass_rates

ANSWERS = ["out/tiny/difficulty/base_answers.jsonl", "out/tiny/difficulty/sft_answers.jsonl"]


@dataclass(frozen=True)
class Config:
    problems: str = "out/tiny/problems/rl_all.jsonl"      # every RL problem
    out: str = "out/tiny/problems/rl.jsonl"               # those that are kept, their tests with estimated difficulty
    answers: list[str] = field(default_factory=ANSWERS.copy)   # eval.py's answers files, the SFT model's last
    max_maths_rate: float = 0.9                           # maths solved more often than this is dropped [paper 3.2]
    max_code_rate: float = 1.0                            # code solved this often or more is dropped [paper 3.2]
    levels: int = 3                                       # difficulty levels of the tests of a problem [paper Fig. 5]

    def __post_init__(self):
        configurator.at_least(self, 1, "levels")
        for name in ("max_maths_rate", "max_code_rate"):
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


def main(cfg: Config) -> None:
    """Read problems and answers, filter, estimate difficulty, write the RL problem set."""
    problems = read_problems(cfg.problems)
    models = [read_answers(path) for path in cfg.answers]
    kept, dropped, spread = [], Counter(), Counter()
    for p in problems:
        missing = [path for path, found in zip(cfg.answers, models, strict=True) if p.id not in found]
        if missing:
            raise UserError(f"{missing[0]} has no answers to problem {p.id} of {cfg.problems}")
        last = models[-1][p.id]
        rate = sum(a["passed"] for a in last) / len(last)
        if rate > cfg.max_maths_rate if p.kind == "maths" else rate >= cfg.max_code_rate:
            dropped[p.kind] += 1
            continue
        if p.kind == "code":
            p = with_difficulty(p, [a for found in models for a in found[p.id]], cfg.levels)
            spread[len({t.difficulty for t in p.tests})] += 1
        kept.append(p)
    if not kept:
        raise UserError(f"{cfg.problems}: the SFT model solves every problem, nothing is left for RL")
    write_problems(cfg.out, kept)
    print(f"{len(kept)} of {len(problems)} problems kept in {cfg.out}; too easy: "
          + ", ".join(f"{dropped[k]} {k}" for k in ("maths", "code"))
          + "; code problems by number of difficulty levels: " + ", ".join(f"{k}: {spread[k]}" for k in sorted(spread)))


if __name__ == "__main__":
    configurator.run(main, Config)
