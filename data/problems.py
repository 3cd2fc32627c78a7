"""
Problems with a checkable answer: what SFT explains, RL practises and eval.py measures (report sections 3.1, 3.2).

One record serves maths (a rule-checkable final answer) and code (tests that the judge runs). Files are JSONL, one
problem a line. A model meets a problem in two forms: PLAIN, the text form that the pre-training pages use (base models,
RL-Zero), and `messages`, the chat form (SFT, RL).
"""
import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.jsonl import line_of, read_jsonl, write_jsonl
from judge import Test

PLAIN = "Problem: {question}\nSolution:"     # what a base model continues, up to the end of the document


@dataclass(frozen=True)
class Problem:
    id: str                                 # hash of the problem's identity, the same for every wording of it
    kind: Literal["maths", "code"]
    question: str                           # what is asked, plain text
    level: int = 1                          # difficulty: operations (maths) or clauses (code)
    answer: str = ""                        # maths: the reference answer
    tests: tuple[Test, ...] = ()            # code: each with its difficulty level
    entry: str = "f"                        # code: the function that call tests call
    reasoning: str = ""                     # worked steps, for SFT and pages; "" when there are none
    solution: str = ""                      # the answer as a model should write it: \boxed{..} or a fenced program

    def __post_init__(self):
        if self.kind == "code" and not self.tests and not self.solution:
            raise ValueError(f"problem {self.id} has no tests; a code problem needs at least one")
        if self.kind == "maths" and not self.answer:
            raise ValueError(f"problem {self.id}: a maths problem needs an answer (field 'answer' is empty)")


def identity(canonical: str) -> str:
    """16 hex digits of a canonical form; the same in every process and Python version."""
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


def split_of(problem_id: str) -> Literal["train", "valid", "test"]:
    """By identity, never by draw: 80% train, 5% valid, 15% test. Two wordings of one problem fall on the same side."""
    bucket = int(problem_id, 16) % 100
    return "test" if bucket < 15 else "valid" if bucket < 20 else "train"


def response(p: Problem, think: bool) -> str:
    """The reference response. think: the steps inside <think>, as SFT data and RL answers have them."""
    if think:
        return f"<think>\n{p.reasoning}\n</think>\n\n{p.solution}"
    return p.solution


def messages(p: Problem, answer: str | None = None) -> list[dict[str, str]]:
    """The chat form; with `answer` the assistant's turn is there too."""
    chat = [{"role": "user", "content": p.question}]
    return chat if answer is None else chat + [{"role": "assistant", "content": answer}]


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """JSONL, atomically: a reader never sees half a file."""
    write_jsonl(path, map(dataclasses.asdict, problems))


def read_problems(path: str | Path) -> list[Problem]:
    """
    ValueError names file and line of what is no problem (a field of another type or unknown, no tests, an id that came
    before), and a file without any; OSError if it cannot be read.
    """
    found: dict[str, tuple[int, Problem]] = {}
    for n, row in read_jsonl(path):
        with line_of(path, n):
            problem = parsed(row)
            if problem.id in found:
                raise ValueError(f"problem {problem.id} stands in line {found[problem.id][0]} already; ids should "
                                 "be unique")
        found[problem.id] = n, problem
    if not found:
        raise ValueError(f"{path}: no problems in it; `python -m data.prepare` and data/hub.py write such files")
    return [problem for _, problem in found.values()]


def parsed(row: dict) -> Problem:
    """A line of a problems file -> Problem. ValueError or TypeError in words."""
    fields = {f.name: f for f in dataclasses.fields(Problem)}
    if extra := sorted(set(row) - set(fields)):
        raise ValueError(f"unknown field {extra[0]!r}, known are {', '.join(fields)}")
    if lacking := [k for k in ("id", "kind", "question") if k not in row]:
        raise ValueError(f"no field {lacking[0]!r}; a problem needs id, kind, question, and an answer or tests")
    for key, value in row.items():
        right = {"level": int, "tests": list}.get(key, str)
        if type(value) is not right:
            raise ValueError(f"{key} = {value!r} should be {right.__name__}")
    if row["kind"] not in ("maths", "code"):
        raise ValueError(f"kind = {row['kind']!r} should be 'maths' or 'code'")
    if not row["question"].strip():
        raise ValueError(f"problem {row['id']} has no question")
    problem = Problem(**row | {"tests": tuple(Test(**t) for t in row.get("tests", ()))})
    if problem.kind == "code":
        if not problem.tests:
            raise ValueError(f"problem {problem.id} has no tests; a code problem needs at least one")
        if len({t.kind for t in problem.tests}) > 1:
            raise ValueError(f"problem {problem.id}: its tests should be all 'call' or all 'stdio'")
        if problem.tests[0].kind == "call" and not problem.entry:
            raise ValueError(f"problem {problem.id}: call tests need `entry`, the function to call")
    return problem
