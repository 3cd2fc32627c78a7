"""
Problems with a checkable answer: what SFT explains, RL practises and eval.py measures (report sections 3.1, 3.2).

One record serves maths (a rule-checkable final answer) and code (tests that the judge runs). Files are JSONL, one
problem a line. A model meets a problem in two forms: PLAIN, the text form that the pre-training pages use (base models,
RL-Zero), and `messages`, the chat form (SFT, RL).
"""
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
            raise ValueError(f"problem {self.id}: a code problem needs tests (field 'tests' is empty)")
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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    with open(tmp, "w", encoding="utf-8") as f:
        for p in problems:
            f.write(json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n")
    tmp.replace(path)


def read_problems(path: str | Path) -> list[Problem]:
    """Raises ValueError with file and line for a line that is no problem, FileNotFoundError when there is no file."""
    return list(_lines(Path(path)))


def _lines(path: Path) -> Iterator[Problem]:
    fields = {f.name for f in dataclasses.fields(Problem)}
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                row = json.loads(line.decode("utf-8"))
                extra = set(row) - fields
                if extra:
                    raise ValueError(f"unknown field {sorted(extra)[0]!r}, known are {', '.join(sorted(fields))}")
                row["tests"] = tuple(Test(**t) for t in row.get("tests", ()))
                problem = Problem(**row)
                if problem.kind == "code" and not problem.tests:
                    raise ValueError(f"problem {problem.id} has no tests")
            except (ValueError, TypeError, AttributeError) as e:
                raise ValueError(f"{path}, line {n}: {e}") from None
            yield problem
