"""
Word problems of one or two steps with small numbers, for models that solve too few of GSM8K's to learn from them by RL
(results/real). No part of the tiny world: its own problems are in maths.py.

A problem's identity is its arithmetic, not the story around it: "12 + 7 - 4" is in one split alone.

    python -m data.tiny.words out/real/problems         # train.jsonl, valid.jsonl, test.jsonl
"""
import random
from dataclasses import dataclass
from pathlib import Path

import configurator
from configurator import UserError
from data.problems import Problem, different, identity, write_problems

NAMES = ["Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Leo", "Maria", "Tom"]
THINGS = ["apples", "books", "coins", "eggs", "flowers", "marbles", "oranges", "pencils", "shells", "stamps"]
BOXES = ["bags", "baskets", "boxes"]
TOP = 20                                 # largest sum; factors are at most 9


@dataclass(frozen=True)
class Config:
    out: str = ""                         # folder to write
    train: int = 600                      # problems to train on, of one step and of two
    valid: int = 40                       # to choose configurations by
    test: int = 200                       # to report
    seed: int = 1                         # of the stories and of which problems

    POSITIONAL = ("out",)

    def __post_init__(self):
        configurator.at_least(self, 1, "train", "valid", "test")


def main(cfg: Config) -> None:
    """Write the three files."""
    if not cfg.out:
        raise UserError("out is missing: python -m data.tiny.words FOLDER")
    for split in ("train", "valid", "test"):
        found = problems(getattr(cfg, split), split, cfg.seed)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_problems(f"{cfg.out}/{split}.jsonl", found)
        print(f"{cfg.out}/{split}.jsonl: {len(found)} problems, e.g. {found[-1].question!r} -> {found[-1].answer}")


def problem(rng: random.Random, level: int) -> Problem:
    """One problem: a sum, a difference or a product, and at level 2 a sum or a difference on top of it."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    kind = rng.choice("+-*")
    a, b = rng.randint(2, TOP - 2), rng.randint(2, 9)
    if kind == "+":
        a = min(a, TOP - b)
        value, story = a + b, f"{name} has {a} {thing} and buys {b} more."
    elif kind == "-":
        a = max(a, b + 1)
        value, story = a - b, f"{name} has {a} {thing} and gives away {b}."
    else:
        a = rng.randint(2, 9)
        value, story = a * b, f"{name} has {a} {rng.choice(BOXES)} with {b} {thing} in each."
    text = f"{a}{kind}{b}"
    if level == 2:
        up = value < 3 or rng.random() < 0.5
        c = rng.randint(2, 9) if up else rng.randint(1, min(9, value - 1))
        value += c if up else -c
        text += f"{'+' if up else '-'}{c}"
        story += f" Then {name} {'finds' if up else 'loses'} {c}."
    question = f"{story} How many {thing} does {name} have now?"
    return Problem(identity(f"words {text}"), "maths", question, level, answer=str(value),
                   reasoning=f"{text}={value}", solution=f"The answer is \\boxed{{{value}}}.")


def problems(n: int, split: str, seed: int) -> list[Problem]:
    """n different problems of one split; of level 1 there are few. UserError when there are not n."""
    rng = random.Random(f"words {split} {seed}")
    return different(n, split, lambda: problem(rng, rng.choice((1, 2))), "word problems")


if __name__ == "__main__":
    configurator.run(main, Config)
