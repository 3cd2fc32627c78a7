"""
Python programming problems with a ladder of tests: the tiny world's stand-in for the report's 30K code problems
(sections 3.2 and 3.3.1).

A problem is a list function made of clauses, "keep only even numbers; cap every number at 8; return the sum", and its
golden solution has one line per clause. The inputs of its tests are chosen by how many clauses MATTER on them (leaving
the clause out changes the result): on level-0 inputs even a careless program passes, level-2 inputs need every clause.
Every program that forgets one clause fails some test, so that the tests are worth passing.

    python -m data.tiny.code         # prints two problems with their tests
"""
import json
import random
from dataclasses import dataclass

from data.problems import Problem, Test, identity, split_of


@dataclass(frozen=True)
class Clause:
    line: str                    # its line(s) in the golden solution
    wordings: tuple[str, ...]    # ways of saying it


def filters(rng: random.Random) -> list[Clause]:
    """Clauses that change the list, with their constants drawn."""
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


CORES = [
    Clause("sum(xs)", ("return the sum", "return the total")),
    Clause("len(xs)", ("return the count", "return how many are left")),
    Clause("max(xs, default=0)", ("return the largest or 0", "return the maximum or 0")),
    Clause("min(xs, default=0)", ("return the smallest or 0", "return the minimum or 0")),
    Clause("sorted(xs)", ("return them sorted", "return them in order")),
    Clause("xs[::-1]", ("return them reversed", "return them backwards")),
]


NUMBERS, LENGTHS = tuple(range(-9, 13)), range(1, 9)          # of random test inputs


def source(clauses: list[Clause], core: Clause) -> str:
    return "def f(xs):\n" + "".join(f"    {c.line}\n" for c in clauses) + f"    return {core.line}"


def compiled(program: str):
    """Only for programs that this file wrote; what a model writes runs in judge.py's sandbox."""
    scope: dict = {}
    exec(program, scope)
    return scope["f"]


def draw(rng: random.Random, level: int | None = None) -> tuple[list[Clause], Clause]:
    level = level or rng.randint(1, 4)
    return rng.sample(filters(rng), level), rng.choice(CORES)


def spell(rng: random.Random, clauses: list[Clause], core: Clause) -> str:
    said = [rng.choice(c.wordings) for c in [*clauses, core]]
    return "Given a list xs: " + "; ".join(said) + "."


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


def problem(rng: random.Random, level: int | None = None, tests: int = 0) -> Problem | None:
    """
    One problem with `level` filter clauses; tests = how many tests (0 for pages and SFT, which need none).
    None when no set of inputs tells every careless program from the golden one.
    """
    clauses, core = draw(rng, level)
    program = source(clauses, core)
    ladder = make_tests(rng, clauses, core, tests) if tests else ()
    if ladder is None:
        return None
    question = spell(rng, clauses, core)
    return Problem(identity(program), "code", question, len(clauses), tests=ladder, solution=fenced(program),
                   reasoning="\n".join(f"{i}. {c.line}" for i, c in enumerate(clauses, 1)))


def make_tests(rng: random.Random, clauses: list[Clause], core: Clause, n: int) -> tuple[Test, ...] | None:
    golden = compiled(source(clauses, core))
    mutants = [compiled(source(clauses[:i] + clauses[i + 1:], core)) for i in range(len(clauses))]
    by_level: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    share = {0: n // 3, 1: n // 3 if len(clauses) > 1 else 0}        # a third each, level 1 empty for one clause
    share[2] = n - share[0] - share[1]
    edges = [[], [0], [-3, 0, 5], [2, 2, 2]]                 # boundary inputs come first
    pick = rng.choice                                        # what randint draws, for less
    for t in range(60 * n):                                  # programs of clauses never change their argument
        xs = edges[t] if t < len(edges) else [pick(NUMBERS) for _ in range(pick(LENGTHS))]
        right = golden(xs)
        matters = sum([mutant(xs) != right for mutant in mutants])
        bucket = by_level[0 if matters == 0 else 1 if matters == 1 and len(clauses) > 1 else 2]
        if xs not in bucket and len(bucket) < n:
            bucket.append(xs)
            if all(len(by_level[level]) >= most for level, most in share.items()):
                break
    chosen = []
    for level, bucket in by_level.items():
        chosen += [(xs, level) for xs in bucket[:n // 3 if level < 2 else n - len(chosen)]]
    caught = [any(m(xs) != golden(xs) for xs, _ in chosen) for m in mutants]
    results = {json.dumps(golden(xs)) for xs, _ in chosen}
    if not all(caught) or len(results) < 4 or len(chosen) < 2 * n // 3:
        return None                                          # a constant or careless program would pass
    return tuple(Test("call", json.dumps([xs]), json.dumps(golden(xs)), level) for xs, level in chosen)


def problems(n: int, split: str, seed: int, levels: tuple[int, ...] = (2, 3, 4), tests: int = 12) -> list[Problem]:
    """n different problems of one split, with tests. Raises ValueError when the space is too small for n."""
    rng, found, tries = random.Random(f"code {split} {seed}"), {}, 0
    while len(found) < n:
        state, level = rng.getstate(), rng.choice(levels)
        tries += 1
        if tries > 1000 + 200 * n:
            raise ValueError(f"only {len(found)} different code problems of levels {levels} in {split}, {n} wanted")
        key = identity(source(*draw(rng, level)))            # cheap look at the identity before tests are made
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
        tests = (f"  level {t.difficulty}  f({t.input[1:-1]}) == {t.expected}" for t in p.tests)
        print(p.question, p.solution, *tests, sep="\n")
