"""
Problems with a checkable answer: what SFT explains, RL practises and eval.py measures (report sections 3.1, 3.2).

One record serves maths (a final answer that rules can check) and code (tests that the judge runs). Files are JSONL, one
problem per line; data/prepare.py and data/hub.py write them. A model meets a problem in two forms: PLAIN, as in the
pages of pre-training (base models, RL-Zero), and messages(), as in a chat (SFT, RL).

    python -c "from data.problems import read_problems; print(read_problems('out/tiny/problems/rl_all.jsonl')[0])"
"""
import ast
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configurator import UserError
from data.jsonl import line_of, strict_json, write_jsonl
from data.published import problem_line
from data.readers import table_rows
from data.text import shown

if TYPE_CHECKING:
    from tokenizer import Tokenizer  # for annotations only: it imports numpy, which the workers of judge/maths.py spare

PLAIN = "Problem: {question}\nSolution:"     # what a base model continues, up to the end of the document


@dataclass(frozen=True)
class Test:
    """
    One unit test of a code problem. UserError if a field has another type, or is not what its kind says.

    stdio   a whole program: what it reads, and what it should print
    call    one call of the entry: input is a list (or tuple) of arguments, expected the value that should come back.
            Both are JSON as text, or else Python as text: '[(1, 2), {3}]', "Counter('aab')". JSON has no tuples: where
            both are JSON a tuple that comes back counts as a list
    check   code with assert in it, as MBPP and HumanEval publish it: input calls the function by its name or as
            `candidate`; expected is ""
    """
    __test__ = False                        # not a class for pytest
    kind: Literal["stdio", "call", "check"]
    input: str
    expected: str = ""
    difficulty: int = 0                     # level from 0 = easiest (reward.difficulty_levels)

    def __post_init__(self):
        if self.kind not in ("stdio", "call", "check"):
            raise UserError(f"test kind {self.kind!r}: should be 'check', 'stdio' or 'call'")
        for name, right in (("input", str), ("expected", str), ("difficulty", int)):
            if type(getattr(self, name)) is not right:
                raise UserError(f"test {name} {getattr(self, name)!r:.60}: should be {right.__name__}"
                                + (", JSON as text" if self.kind == "call" and right is str else ""))
        if self.kind == "check":
            try:
                ast.parse(self.input)
            except (SyntaxError, ValueError, RecursionError) as error:
                raise UserError(f"check {self.input[:60]!r}: not Python ({error})") from None
            if self.expected or not self.input.strip():
                raise UserError(f"check {self.input[:60]!r}: input should be code, and expected empty")
        elif self.kind == "call":
            self.value("expected")
            arguments, from_json = self.value("input")
            if from_json and not isinstance(arguments, list):
                raise UserError(f"call test input {self.input[:60]!r}: should be a JSON list of arguments")
            if not from_json and not isinstance(arguments, (ast.List, ast.Tuple)):
                raise UserError(f"call test input {self.input[:60]!r}: should be a list of arguments")

    def value(self, name: Literal["input", "expected"]) -> tuple[object, bool]:
        """A field of a call test -> (value, True) from JSON, (ast.expr, False) from Python. UserError for neither."""
        text = getattr(self, name)
        try:
            return strict_json(text), True
        except ValueError as error:
            try:
                body = ast.parse(text.strip(), mode="eval").body
                names = {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}
                if names & {"NaN", "Infinity", "true", "false", "null"}:        # JSON with a fault in it
                    raise ValueError
                return body, False
            except (SyntaxError, ValueError, RecursionError):
                raise UserError(f"call test {self.input[:50]!r}, {self.expected[:50]!r}: {error}") from None


@dataclass(frozen=True)
class Limits:
    """What a problem demands of its judge; None leaves it to the judge. UserError for a value out of range."""
    seconds: float | None = None            # processor time per test, on the reference machine (judge/box.py)
    memory_mb: int | None = None            # address space of a program
    output_kb: int | None = None            # of each stream of a program
    tolerance: float | None = None          # by which floats may differ; in stdio tests, numbers in the text

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value < float("inf")
                                      or value == 0 and field.name != "tolerance"):
                raise UserError(f"limits: {field.name} = {value!r} should be a number above 0")


@dataclass(frozen=True)
class Problem:
    """One problem, maths or code. UserError if it cannot be graded (no answer, no tests)."""
    id: str                                 # hash of the problem's identity, the same for every wording of it
    kind: Literal["maths", "code"]
    question: str                           # what is asked, plain text
    level: int = 1                          # size of the problem: operations (maths) or clauses (code)
    answer: str = ""                        # maths: the reference answer
    tests: tuple[Test, ...] = ()            # code
    entry: str = "f"                        # code: the function that call tests call
    reasoning: str = ""                     # worked steps, for SFT and pages; "" when there are none
    solution: str = ""                      # the answer as a model should write it: \boxed{..} or a fenced program
    limits: Limits = Limits()               # code: time, memory, output and tolerance, where they are not the judge's

    def __post_init__(self):
        if self.kind == "code" and not self.tests and not self.solution:
            raise UserError(f"problem {self.id} has no tests; a code problem needs at least one")
        if self.kind == "maths" and not self.answer:
            raise UserError(f"problem {self.id}: a maths problem needs an answer (field 'answer' is empty)")


def identity(canonical: str) -> str:
    """16 hex digits from a canonical form of a problem; the same in every process and Python version."""
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


def split_of(problem_id: str) -> Literal["train", "valid", "test"]:
    """By identity, never by chance: 80% train, 5% valid, 15% test. Two wordings of one problem get the same split."""
    bucket = int(problem_id, 16) % 100
    return "test" if bucket < 15 else "valid" if bucket < 20 else "train"


def different(n: int, split: str, draw: Callable[[], Problem], what: str) -> list[Problem]:
    """n different problems of one split, in the order of draw()'s calls. UserError when there are not n `what`."""
    found: dict[str, Problem] = {}
    for _ in range(1001 + 200 * n):
        if len(found) == n:
            return list(found.values())
        p = draw()
        if split_of(p.id) == split:
            found.setdefault(p.id, p)
    raise UserError(f"only {len(found)} different {what} in {split}, {n} wanted")


def response(p: Problem, think: bool) -> str:
    """The reference response; with think, its steps stand in <think> before it, as in SFT data and RL answers."""
    if think:
        return f"<think>\n{p.reasoning}\n</think>\n\n{p.solution}"
    return p.solution


def messages(p: Problem, answer: str | None = None) -> list[dict[str, str]]:
    """The chat form: the user's turn, and the assistant's with `answer` if that is given."""
    chat = [{"role": "user", "content": p.question}]
    return chat if answer is None else chat + [{"role": "assistant", "content": answer}]


def prompt_ids(tokenizer: "Tokenizer", problem: Problem, chat: bool) -> list[int]:
    """Token ids of the prompt: the chat template for models that had SFT, PLAIN for base models."""
    if chat:
        return tokenizer.chat(messages(problem), add_generation_prompt=True)[0]
    return tokenizer.encode(PLAIN.format(question=problem.question))


def stop_ids(tokenizer: "Tokenizer", chat: bool) -> tuple[int, ...]:
    """
    Token ids that end an answer: both end tokens, since a base model ends its document and a chat model its turn. A
    base model may also continue with the next problem of the page: the first token of "Problem:" ends its answer, as
    stop words do in few-shot evaluation.
    """
    ends = tokenizer.eos_id, tokenizer.im_end_id
    return ends if chat else (*ends, tokenizer.encode(PLAIN)[0])


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write a problems file, atomically: a reader never sees half a file."""
    write_jsonl(path, map(to_row, problems))


def to_row(problem: Problem) -> dict:
    """The object of its line; from_row reads it."""
    fields = dataclasses.asdict(problem)
    limits = {name: value for name, value in fields.pop("limits").items() if value is not None}
    return fields | ({"limits": limits} if limits else {})


def read_problems(path: str | Path) -> list[Problem]:
    """
    All problems of a file: our own lines, or GSM8K, MATH, MBPP or HumanEval as published (data/published.py), in any
    form of a table that data/readers.py reads. UserError names file and line of a problem that is not one (an unknown
    field, a field of another type, no tests, an id that came before), and a file without problems. Published rows that
    cannot become problems are left out and counted on stderr, repeated ones are left out. OSError if the file cannot
    be opened.
    """
    found: dict[str, tuple[int, Problem]] = {}
    left_out: list[str] = []
    for file, n, row in table_rows(path):
        with line_of(file, n):
            try:
                line = problem_line(row)
            except UserError as e:
                left_out.append(f"{n}: {e}")
                continue
            problem = from_row(row if line is None else line | {"id": identity(line["question"])})
            if problem.id in found and line is None:
                raise UserError(f"problem {problem.id} is in line {found[problem.id][0]} too; ids should be unique")
        found.setdefault(problem.id, (n, problem))
    if left_out:
        print(shown(f"{path}: {len(left_out)} of {len(left_out) + len(found)} problems left out, the first in row "
                    f"{left_out[0]}", lines=False), file=sys.stderr)
    if not found:
        raise UserError(f"{path}: no problems in it; `python -m data.prepare` and data/hub.py write such files")
    return [problem for _, problem in found.values()]


def from_row(row: dict) -> Problem:
    """
    The object of one line of a problems file -> Problem. UserError that names what is wrong; TypeError for an unknown
    field of a test.
    """
    fields = {f.name: f for f in dataclasses.fields(Problem)}
    if extra := sorted(set(row) - set(fields)):
        raise UserError(f"unknown field {extra[0]!r}, known are {', '.join(fields)}")
    if lacking := [k for k in ("id", "kind", "question") if k not in row]:
        raise UserError(f"no field {lacking[0]!r}; a problem needs id, kind, question, and an answer or tests")
    for key, value in row.items():
        right = {"level": int, "tests": list, "limits": dict}.get(key, str)
        if type(value) is not right:
            raise UserError(f"{key} = {value!r} should be {right.__name__}")
    if row["kind"] not in ("maths", "code"):
        raise UserError(f"kind = {row['kind']!r} should be 'maths' or 'code'")
    if not row["question"].strip():
        raise UserError(f"problem {row['id']} has no question")
    limits = row.get("limits", {})
    if extra := sorted(set(limits) - {f.name for f in dataclasses.fields(Limits)}):
        raise UserError(f"unknown limit {extra[0]!r}")
    problem = Problem(**row | {"tests": tuple(Test(**t) for t in row.get("tests", ())), "limits": Limits(**limits)})
    if problem.kind == "code":
        if not problem.tests:
            raise UserError(f"problem {problem.id} has no tests; a code problem needs at least one")
        if len({t.kind for t in problem.tests}) > 1:
            raise UserError(f"problem {problem.id}: its tests should be all 'call' or all 'stdio' or all 'check'")
        if problem.tests[0].kind != "stdio" and not problem.entry:
            raise UserError(f"problem {problem.id}: {problem.tests[0].kind} tests need `entry`, the function to call")
    return problem
