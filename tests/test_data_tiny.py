"""The tiny world's problems: right answers, splits by identity, ladders of tests that catch careless programs."""
import json
import random
import re
from fractions import Fraction
from functools import partial

import pytest

from configurator import UserError
from data.problems import identity, split_of
from data.tiny import code, maths, words
from reward import difficulty_levels, math_reward


def worth(text):
    """The value of an expression in the problems' notation."""
    return Fraction(eval(re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"Fraction(\1,\2)", text), {"Fraction": Fraction}))


@pytest.mark.parametrize(("kind", "level"), [(maths.short, 0), *((kind, n) for kind in maths.KINDS for n in (1, 2, 3))])
def test_every_step_and_answer_is_right(kind, level):
    rng = random.Random(level)
    for _ in range(100 if level else 1000):
        canonical, question, steps, answer = kind(rng, level)
        for step in steps:
            left, right = step.split("=")
            assert worth(left) == worth(right), (question, step)
        name, expression = canonical.split(" ", 1)
        if name in ("short", "chain", "product", "fraction"):
            assert worth(expression) == worth(answer), question
        elif name == "remainder":
            total, m = expression.split(" by ")
            assert worth(total) % int(m) == int(answer), question
        else:
            put = partial(re.sub, r"(\d*)x", lambda m, x=answer: f"({m[1] or 1}*{x})")     # 3x -> (3*answer)
            left, right = map(put, expression.split("="))
            assert worth(left) == worth(right), question
        assert math_reward("<think>\n" + "\n".join(steps) + f"\n</think>\n\n\\boxed{{{answer}}}", answer) == 1.0


@pytest.mark.parametrize("generator", [maths, code])
def test_splits_are_disjoint_by_identity_and_deterministic(generator):
    test, train = generator.problems(40, "test", 1), generator.problems(60, "train", 1)
    assert {split_of(p.id) for p in test} == {"test"} and {split_of(p.id) for p in train} == {"train"}
    assert not {p.id for p in test} & {p.id for p in train}
    assert len({p.id for p in test}) == 40
    assert generator.problems(40, "test", 1) == test
    assert generator.problems(40, "test", 2) != test


def test_what_a_newcomer_types_first_is_trained_and_stays_out_of_the_averages():
    """
    "What is 3+4?" and its like, in the forms people type; two wordings of one sum are one problem, on one side of the
    border. One training problem in ten; the held-out sets of the demo's table have none.
    """
    rng = random.Random(1)
    drawn = [maths.problem(rng) for _ in range(20_000)]
    short = [p for p in drawn if p.level == 0]
    assert abs(len(short) / len(drawn) - 0.1) < 0.01
    for p in short:
        a, sign, b = re.search(r"(\d+) ?([-+*]) ?(\d+)", p.question).groups()
        assert p.id == identity(f"short {a}{sign}{b}"), p.question
    for form in (r"What is \d\+\d\?", r"\d \+ \d = \?", r"What is \d\d - \d\?", r"Compute \d\*\d\.", r"\d \* \d",
                 r"How much is \d\+\d\?", r"\d-\d=\?"):
        assert any(re.fullmatch(form, p.question) for p in short), form
    held = maths.problems(30, "test", 1, levels=(0,))
    assert {p.level for p in held} == {0} and {split_of(p.id) for p in held} == {"test"}
    assert min(p.level for p in maths.problems(100, "test", 1)) == 1


def test_a_wording_never_changes_the_identity():
    rng = random.Random(0)
    ids = {}
    for _ in range(4000):
        p = maths.problem(rng, 1)
        numbers = "".join(re.findall(r"[\d+\-*/]+", p.question)) if "has" not in p.question else None
        if numbers:
            ids.setdefault((p.question.split()[0] in ("What", "Compute"), numbers), set()).add(p.id)
    same = [v for (plain, _), v in ids.items() if plain]
    assert same and all(len(v) == 1 for v in same)


def test_code_tests_are_right_and_catch_every_forgotten_clause():
    for p in code.problems(40, "test", 3, levels=(2, 3)):
        program = p.solution.removeprefix("```python\n").removesuffix("\n```")
        golden = code.compiled(program)
        calls = [(json.loads(t.input)[0], json.loads(t.expected)) for t in p.tests]
        assert all(golden(list(xs)) == want for xs, want in calls)
        lines = program.split("\n")
        for i, line in enumerate(lines):
            if line.startswith("    xs = "):
                careless = code.compiled("\n".join(lines[:i] + lines[i + 1:]))
                assert any(careless(list(xs)) != want for xs, want in calls), (p.question, line)
        assert len({json.dumps(want) for _, want in calls}) >= 4, "a constant program passes too much"


def test_the_ladder_orders_tests_by_difficulty():
    """On average a careless program passes more level-0 tests than level-2 tests."""
    passed = {0: [], 2: []}
    rng = random.Random(5)
    for p in code.problems(30, "train", 4, levels=(3,)):
        lines = p.solution.split("\n")[1:-1]
        body = [i for i, line in enumerate(lines) if line.startswith("    xs = ")]
        drop = rng.choice(body)
        careless = code.compiled("\n".join(lines[:drop] + lines[drop + 1:]))
        for t in p.tests:
            if t.difficulty in passed:
                passed[t.difficulty].append(careless(json.loads(t.input)[0]) == json.loads(t.expected))
    easy, hard = (sum(v) / len(v) for v in passed.values())
    assert easy > hard + 0.2, (easy, hard)
    assert difficulty_levels([easy, hard], 2) == [0, 1]


def test_word_problems(monkeypatch):
    """The story, read again, gives the answer and the one step; no arithmetic stands in two splits."""
    seen = {}
    for split in ("train", "valid", "test"):
        for p in words.problems(60, split, seed=3):
            n = [int(x) for x in re.findall(r"\d+", p.question)]
            value = n[0] * n[1] if "in each" in p.question else n[0] + n[1] if "buys" in p.question else n[0] - n[1]
            if len(n) == 3:
                value += n[2] if "finds" in p.question else -n[2]
            assert (len(n), value, int(worth(p.reasoning.split("=")[0]))) == (p.level + 1, int(p.answer), int(p.answer))
            assert value >= 1 and math_reward(p.solution, p.answer) == 1.0
            seen.setdefault(p.reasoning, set()).add(split)
    assert len(seen) == 180 and all(len(splits) == 1 for splits in seen.values())
    assert words.problems(60, "test", seed=3) == words.problems(60, "test", seed=3)
    monkeypatch.setattr(words, "problem", lambda *_: p)
    with pytest.raises(UserError, match="only 1 different word problems in test, 2 wanted"):
        words.problems(2, "test", seed=3)
