"""
Python programming problems with a ladder of tests: the tiny world's stand-in for the report's 30K code problems
(sections 3.2 and 3.3.1).

A problem is a list function made of clauses, "keep only even numbers; cap every number at 8; return the sum", and its
golden solution has one line per clause. The inputs of its tests are chosen by how many clauses MATTER on them: a clause
matters if leaving it out changes the result. On inputs of difficulty 0 no clause matters, so even a careless program
passes; difficulty 2 needs at least two clauses. Every program that forgets one clause fails some test, so passing all
tests means that the program is right.

    python -m data.tiny.code         # prints two problems with their tests
"""
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from configurator import UserError
from data.problems import Problem, Test, identity, split_of


@dataclass(frozen=True)
class Clause:
    """One step of a program, and the ways to ask for it."""
    line: str                    # its line in the golden solution
    wordings: tuple[str, ...]    # one of them stands in the question


def filters(rng: random.Random) -> list[Clause]:
    """Clauses that change the list, with random constants."""
    k, cap, first = rng.randint(1, 6), rng.randint(4, 9), rng.randint(2, 5)
    return [
        Clause("xs = [x for x in xs if x % 2 == 0]", ("keep only even numbers", "drop the odd numbers")),
        Clause(f"xs = [x for x in xs if x > {k}]", (f"keep only numbers above {k}", f"drop numbers up to {k}")),
        Clause("xs = [x for x in xs if x != 0]", ("drop zeros", "remove every zero")),
        Clause("xs = [abs(x) for x in xs]", ("make every number positive", "take absolute values")),
        Clause(f"xs = [min(x, {cap}) for x in xs]", (f"cap every number at {cap}", f"limit numbers to {cap}")),
        Clause(f"xs = xs[:{first}]", (f"keep the first {first}", f"take only the first {first} numbers")),
        Clause("xs = xs[::2]", ("keep every second number", "take every other number")),
        Clause(f"xs = [x + {k} for x in xs]", (f"add {k} to every number", f"increase each number by {k}")),
    ]


CORES = [                        # what a program returns
    Clause("sum(xs)", ("return the sum", "return the total")),
    Clause("len(xs)", ("return the count", "return how many are left")),
    Clause("max(xs, default=0)", ("return the largest or 0", "return the maximum or 0")),
    Clause("min(xs, default=0)", ("return the smallest or 0", "return the minimum or 0")),
    Clause("sorted(xs)", ("return them sorted", "return them in order")),
    Clause("xs[::-1]", ("return them reversed", "return them backwards")),
]
NUMBERS, LENGTHS = tuple(range(-9, 13)), range(1, 9)          # of random test inputs


def source(clauses: list[Clause], core: Clause) -> str:
    """The program: a function f(xs) with one line per clause."""
    return "def f(xs):\n" + "".join(f"    {c.line}\n" for c in clauses) + f"    return {core.line}"


def compiled(program: str) -> Callable:
    """The function f of a program. Only for programs of this file; what a model writes runs in judge/."""
    scope: dict = {}
    exec(program, scope)
    return scope["f"]


def random_program(rng: random.Random, level: int | None = None) -> tuple[list[Clause], Clause]:
    """(level clauses that change the list, the core); level 1..4 at random when it is None."""
    level = level or rng.randint(1, 4)
    return rng.sample(filters(rng), level), rng.choice(CORES)


def problem(rng: random.Random, level: int | None = None, tests: int = 0) -> Problem | None:
    """
    One problem with `level` clauses that change the list, at random when None. tests: how many tests, 0 for pages and
    SFT, which need none. None when no set of inputs tells every careless program from the golden one.
    """
    clauses, core = random_program(rng, level)
    program = source(clauses, core)
    ladder = make_tests(rng, clauses, core, tests) if tests else ()
    if ladder is None:
        return None
    question = "Given a list xs: " + "; ".join(rng.choice(c.wordings) for c in [*clauses, core]) + "."
    return Problem(identity(program), "code", question, len(clauses), tests=ladder,
                   solution=f"```python\n{program}\n```",
                   reasoning="\n".join(f"{i}. {c.line}" for i, c in enumerate(clauses, 1)))


def make_tests(rng: random.Random, clauses: list[Clause], core: Clause, n: int) -> tuple[Test, ...] | None:
    """
    About n tests, a third of each difficulty: on difficulty 0 no clause matters, on 1 exactly one, on 2 more (one, when
    the program has only one). None when they would let a constant or careless program pass.
    """
    golden = compiled(source(clauses, core))
    mutants = [compiled(source(clauses[:i] + clauses[i + 1:], core)) for i in range(len(clauses))]
    inputs: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}           # by difficulty
    share = {0: n // 3, 1: n // 3 if len(clauses) > 1 else 0}
    share[2] = n - share[0] - share[1]
    edges = [[], [0], [-3, 0, 5], [2, 2, 2]]                 # boundary inputs come first
    pick = rng.choice                                        # the same numbers as randint, in less time
    for t in range(60 * n):                                  # programs of clauses never change their argument
        xs = edges[t] if t < len(edges) else [pick(NUMBERS) for _ in range(pick(LENGTHS))]
        expected = golden(xs)
        matters = sum([mutant(xs) != expected for mutant in mutants])
        bucket = inputs[0 if matters == 0 else 1 if matters == 1 and len(clauses) > 1 else 2]
        if xs not in bucket and len(bucket) < n:
            bucket.append(xs)
            if all(len(inputs[difficulty]) >= least for difficulty, least in share.items()):
                break
    chosen = []
    for difficulty, bucket in inputs.items():
        chosen += [(xs, difficulty) for xs in bucket[:n // 3 if difficulty < 2 else n - len(chosen)]]
    caught = [any(m(xs) != golden(xs) for xs, _ in chosen) for m in mutants]
    results = {json.dumps(golden(xs)) for xs, _ in chosen}
    if not all(caught) or len(results) < 4 or len(chosen) < 2 * n // 3:
        return None
    return tuple(Test("call", json.dumps([xs]), json.dumps(golden(xs)), difficulty) for xs, difficulty in chosen)


def problems(n: int, split: str, seed: int, levels: tuple[int, ...] = (2, 3, 4), tests: int = 12) -> list[Problem]:
    """n different problems of one split, with tests. UserError when there are not n different ones."""
    rng, found, tries = random.Random(f"code {split} {seed}"), {}, 0
    while len(found) < n:
        state, level = rng.getstate(), rng.choice(levels)
        tries += 1
        if tries > 1000 + 200 * n:
            raise UserError(f"only {len(found)} different code problems of levels {levels} in {split}, {n} wanted")
        key = identity(source(*random_program(rng, level)))  # the identity first: making tests takes long
        if split_of(key) != split or key in found:
            continue
        rng.setstate(state)
        rng.choice(levels)
        p = problem(rng, level, tests)
        if p is not None:
            found[p.id] = p
    return list(found.values())


if __name__ == "__main__":
    for p in problems(2, "train", 0, levels=(2, 3)):
        tests = (f"  difficulty {t.difficulty}  f({t.input[1:-1]}) == {t.expected}" for t in p.tests)
        print(p.question, p.solution, *tests, sep="\n")
