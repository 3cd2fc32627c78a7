"""Rewards: difficulty levels and schemes, answers inside responses, maths checking and its workers."""

import itertools
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import maths_answers
import pytest

from judge import Verdict, maths
from judge.answers import normalise
from reward import (
    difficulty_levels,
    difficulty_reward,
    estimate_pass_rates,
    extract_program,
    last_boxed,
    math_reward,
    plain_number,
)

ROOT = Path(maths.ROOT)

TOWER = r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}"


@pytest.fixture(scope="module", autouse=True)
def no_worker_is_left():
    yield
    running = list(maths._workers)
    maths.close()
    assert not maths._workers and all(worker.poll() is not None for worker in running)


# ---- difficulty reward ----------------------------------------------------------------------------------------------

def test_known_answers():
    """Levels 0 0 1 1 2, tests passed 1 1 1 0 1. Equal scores 1/3: vanilla 0; strict 1/3 (level 1 is
    incomplete, so level 2 does not count); soft 1/3 + 1/2 * 1/3 + 1/3 = 5/6. Scores 1 2 5 (sum 8): strict
    1/8, soft (1+1+5)/8 = 7/8."""
    levels, passed = [0, 0, 1, 1, 2], [1, 1, 1, 0, 1]
    assert difficulty_reward(passed, levels, "vanilla") == 0
    assert difficulty_reward(passed, levels, "strict") == pytest.approx(1 / 3)
    assert difficulty_reward(passed, levels, "soft") == pytest.approx(5 / 6)
    assert difficulty_reward(passed, levels, "strict", [1, 2, 5]) == pytest.approx(1 / 8)
    assert difficulty_reward(passed, levels, "soft", [1, 2, 5]) == pytest.approx(7 / 8)


def cases(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        size = rng.randint(1, 9)
        levels = [rng.randint(0, rng.randint(0, 4)) for _ in range(size)]
        passed = [rng.random() < rng.choice((0.2, 0.6, 0.95)) for _ in range(size)]
        scores = [rng.uniform(0.1, 3) for _ in set(levels)] if rng.random() < 0.5 else None
        yield rng, passed, levels, scores


def test_reward_properties():
    """For 500 random cases: in [0, 1]; vanilla <= strict <= soft; 1 if and only if all pass; order is
    irrelevant; one more passed test never lowers any scheme and always raises soft."""
    for rng, passed, levels, scores in cases(500):
        r = {s: difficulty_reward(passed, levels, s, scores) for s in ("vanilla", "strict", "soft")}
        assert 0 <= r["vanilla"] <= r["strict"] <= r["soft"] <= 1
        assert all((value == 1) == all(passed) for value in r.values())
        order = rng.sample(range(len(passed)), len(passed))
        for scheme, value in r.items():
            assert difficulty_reward([passed[i] for i in order], [levels[i] for i in order], scheme, scores) == value
        for i in (i for i, p in enumerate(passed) if not p):
            more = passed[:i] + [True] + passed[i + 1 :]
            for scheme, value in r.items():
                assert difficulty_reward(more, levels, scheme, scores) >= value
            assert difficulty_reward(more, levels, "soft", scores) > r["soft"]


def test_a_level_counts_once_whatever_its_number_of_tests():
    """The points of a level do not grow with its tests: 99 easy tests and one hard one are half each."""
    passed, levels = [True] * 99 + [False], [0] * 99 + [1]
    assert difficulty_reward(passed, levels, "strict") == difficulty_reward(passed, levels, "soft") == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], "soft"), "not 0"),
        (([True], [0, 1], "soft"), "1 results for 2 levels"),
        (([True], [0], "hard"), "'vanilla', 'strict' or 'soft'"),
        (([True], [0], "soft", [1, 2]), "1 positive numbers"),
        (([True], [0], "soft", [0.0]), "positive"),
        (([True], [0], "soft", [float("nan")]), "positive"),
    ],
)
def test_bad_rewards_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        difficulty_reward(*arguments)


# ---- difficulty levels ----------------------------------------------------------------------------------------------

def spread(groups):
    return sum(sum((x - sum(g) / len(g)) ** 2 for x in g) for g in groups if g)


def test_levels_against_brute_force():
    """Of all ways to cut the sorted rates into k intervals, the dynamic programme finds the best."""
    rng = random.Random(1)
    for _ in range(200):
        rates = [rng.randint(0, 8) / 8 for _ in range(rng.randint(1, 10))]
        k = rng.randint(1, 4)
        levels = difficulty_levels(rates, k)
        values = sorted(set(rates), reverse=True)
        parts = min(k, len(values))
        cuts = [(0, *c, len(values)) for c in itertools.combinations(range(1, len(values)), parts - 1)]
        best = min(spread([[x for x in rates if x in values[a:b]] for a, b in itertools.pairwise(c)]) for c in cuts)
        groups = [[x for x, at in zip(rates, levels, strict=True) if at == c] for c in range(parts)]
        assert sorted(set(levels)) == list(range(parts))
        assert spread(groups) == pytest.approx(best, abs=1e-12)
        for (x, a), (y, b) in itertools.combinations(zip(rates, levels, strict=True), 2):
            assert (x == y) <= (a == b) and (x > y) <= (a <= b)  # no tie is split, no easier test is higher


def test_levels_by_hand():
    """.95 .9 | .5 .45 | .1 .05: the gaps are obvious. Two distinct rates make two levels, one makes one."""
    assert difficulty_levels([0.05, 0.9, 0.5, 0.1, 0.95, 0.45]) == [2, 0, 1, 2, 0, 1]
    assert difficulty_levels([0.2, 0.8, 0.8, 0.2]) == [1, 0, 0, 1]
    assert difficulty_levels([0.3, 0.3]) == [0, 0]
    assert difficulty_levels([1.0, 0.0, 0.5], k=2) in ([0, 1, 0], [0, 1, 1])
    for bad in ([], [1.2], [float("nan")]):
        with pytest.raises(ValueError, match="in \\[0, 1\\]"):
            difficulty_levels(bad)
    with pytest.raises(ValueError, match="k = 0"):
        difficulty_levels([0.5], k=0)


def test_pass_rates():
    """Three solutions, two tests: 2/3 and 1/3. A judge error counts neither way: 1/2 and 0/1."""
    assert estimate_pass_rates([[True, False], [True, True], [False, False]]) == pytest.approx([2 / 3, 1 / 3])
    assert estimate_pass_rates([["AC", "WA"], ["TLE", "JE"]]) == [0.5, 0.0]
    assert estimate_pass_rates([[Verdict("AC", 0.1)], [Verdict("RE", 0.1)]]) == [0.5]
    for bad, message in (([], "a row"), ([[True], []], "equal length"), ([["JE"]], "no verdict")):
        with pytest.raises(ValueError, match=message):
            estimate_pass_rates(bad)


# ---- what stands in a response --------------------------------------------------------------------------------------

PROGRAM = "def f(xs):\n    return xs\n"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (f"```python\n{PROGRAM}```", PROGRAM),
        (f"<think>\n```python\nwrong\n```\n</think>\nSo:\n\n```python\n{PROGRAM}```\nDone.", PROGRAM),
        (f"```\nfirst\n```\n```py\n{PROGRAM}```", PROGRAM),
        (f"  ```python\n{PROGRAM}  ```  ", PROGRAM),
        (PROGRAM, PROGRAM),
        (f"<think>short</think>\n\n{PROGRAM}", PROGRAM),
        (f"import math\n\n{PROGRAM}", f"import math\n\n{PROGRAM}"),
        (f"<think>\n```python\n{PROGRAM}```", None),
        (f"<think>a</think> b <think>\n```python\n{PROGRAM}```", None),
        (f"```python\n{PROGRAM}", None),
        (f"```python\n{PROGRAM}```\n```python\nunfinished", PROGRAM),
        ("I define nothing", None),
        ("define f", None),
        ("", None),
    ],
)
def test_extract_program(response, program):
    assert extract_program(response) == program


FENCE = "```"
STDIO = "n = int(input())\nprint(n * n)\n"
DOCUMENTED = f'def f(xs):\n    """\n    {FENCE}\n    f([1])\n    {FENCE}\n    """\n    return xs\n'
QUOTED = f"x = \"'''\"\n{PROGRAM}"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (f"{FENCE}python\n{PROGRAM}{FENCE}\nOutput:\n{FENCE}\n5\n{FENCE}", PROGRAM),
        (f"{FENCE}python\n{PROGRAM}{FENCE}\nRun it:\n{FENCE}bash\npython3 main.py < in.txt\n{FENCE}", PROGRAM),
        (f"{FENCE}python\n{PROGRAM}{FENCE}\nIn C++:\n{FENCE}cpp\nint main() {{ return 0; }}\n{FENCE}", PROGRAM),
        (f"{FENCE}python\ndraft\n{FENCE}\nBetter:\n{FENCE}\n{STDIO}{FENCE}", STDIO),
        (f"1. Write:\n\n   {FENCE}python\n   def f(xs):\n       return xs\n   {FENCE}", PROGRAM),
        (f"- {FENCE}py\n  def f(xs):\n      return xs\n  {FENCE}", PROGRAM),
        (f"{FENCE}python\n    def f(xs):\n        return xs\n{FENCE}", PROGRAM),
        (f"{FENCE}python\n{DOCUMENTED}{FENCE}", DOCUMENTED),
        (f"{FENCE}python\n{QUOTED}{FENCE}", QUOTED),
        (f"````python\n{PROGRAM}````", PROGRAM),
        (f"~~~python\n{PROGRAM}~~~", PROGRAM),
        (f"{FENCE}markdown\n{FENCE}python\n{PROGRAM}{FENCE}\n{FENCE}", PROGRAM),
        (f"{FENCE}python\n{PROGRAM}{FENCE} That is all.", PROGRAM),
        (f"{FENCE}python\nunfinished\n{FENCE}python\n{PROGRAM}{FENCE}", PROGRAM),
        (f"{FENCE}Python 3\n{PROGRAM}{FENCE}", PROGRAM),
        (f"{FENCE}cpp\nint main() {{ return 0; }}\n{FENCE}", None),
        (STDIO, STDIO),
        ("# squares\n" + STDIO, "# squares\n" + STDIO),
        ("@cache\n" + PROGRAM, "@cache\n" + PROGRAM),
        ("class Solution:\n    def f(self, xs):\n        return xs\n",) * 2,
        ("import sys\nfor line in sys.stdin:\n    print(line)\n",) * 2,
        ("# Answer\n\nThe answer is 5.", None),
        ("for example, this: it works", None),
    ],
)
def test_the_last_block_that_is_python(response, program):
    assert extract_program(response) == program


@pytest.mark.parametrize(
    ("response", "box"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{41} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> two", None),
        (r"<think>\boxed{1}", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1", None),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed {1}", None),
        ("42", None),
    ],
)
def test_last_boxed(response, box):
    assert last_boxed(response) == box


@pytest.mark.parametrize(
    "hostile",
    ["```a\n" * 40000, "for" + " in" * 60000, "<think>" * 40000, "\\boxed{" * 40000, "{" * 200000, "`" * 200000],
)
def test_hostile_text_takes_linear_time(hostile):
    """A regular expression takes minutes on 40,000 open fences; twenty texts of each kind pass unnoticed."""
    for _ in range(20):
        assert extract_program(hostile) is None and last_boxed(hostile) is None


# ---- maths: the exact path ------------------------------------------------------------------------------------------

RIGHT = [
    ("391", "391"), ("391", " 391 "), ("391", "391."), ("391", "$391$"), ("1234", "1,234"),
    ("1234", "1{,}234"), ("1234", r"1\,234"), ("0.5", r"\frac{1}{2}"), (r"\frac{1}{2}", ".5"),
    ("1/2", r"\dfrac12"), ("-0.5", r"-\frac12"),
    ("-5", "- 5"), ("5", "+5"), ("5", "x = 5"), ("x=5", "5"), ("7", r"\theta = 7"), ("60", r"60^\circ"),
    ("50", r"50\%"), ("3", r"3 \text{ apples}"), ("2", "2.0"), ("12", r"f(2) = 12"), ("0", "-0"),
    (r"\frac{-3}{4}", "-0.75"),
]  # fmt: skip
WRONG = [
    ("391", "17*23"), ("391", r"17 \times 23"), ("391", r"17\cdot23"), ("391", "400-9"), ("391", "391+0"),
    ("8", "2^3"), ("5", "--5"), ("5", "-5"), ("-5", "5"), ("5", "- - 5"), ("12", "1 2"), ("391", "39 1"),
    ("2", "a=b=2"), ("0.001", "0.0010001"), ("7/3", "2.3333"), ("x=2", "y=2"), ("1", "1, 2"), ("1", r"\{1\}"),
    ("5", r"\sqrt{25}"), ("5", ""), ("5", "five"), ("5", "5 or 6"), ("2", r"\frac{4}{0}"), ("5", "\u0665"),
    ("100", "1e2"), ("391", "391" * 100), ("2", "2,"), ("1234", "1,23,4"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "box"), RIGHT)
def test_numbers_that_are_paid(answer, box):
    before = maths.counts["worker"]
    assert math_reward(f"<think>so</think> \\boxed{{{box}}}", answer) == 1.0
    assert maths.counts["worker"] == before  # the exact path decides


@pytest.mark.parametrize(("answer", "box"), WRONG)
def test_numbers_that_are_not_paid(answer, box):
    before = maths.counts["worker"]
    assert math_reward(f"<think>so</think> \\boxed{{{box}}}", answer) == 0.0
    assert maths.counts["worker"] == before


@pytest.mark.parametrize("difference", maths_answers.RIGHT)
def test_right_answers_in_other_words_are_paid(difference):
    pytest.importorskip("math_verify")
    for answer, box in maths_answers.RIGHT[difference]:
        assert math_reward(f"\\boxed{{{box}}}", answer) == 1.0, (answer, box)


def test_wrong_answers_and_restated_questions_are_not_paid():
    pytest.importorskip("math_verify")
    for answer, box in maths_answers.WRONG:
        assert math_reward(f"\\boxed{{{box}}}", answer) == 0.0, (answer, box)


def test_a_number_in_clothes_wants_a_number():
    """Whatever a reference that is a number wears, a formula with its value never pays, and the number does."""
    rng = random.Random(4)
    clothes = ("%s", "%s cm", r"%s\text{ cm}^2", r"\$%s", r"(%s)", r"\mathbf{%s}", r"%s^\circ", "x = %s", r"\boxed{%s}",
               "%s square miles", r"%s\,\mathrm{m/s}", r"$%s$", r"%s\%%")
    for _ in range(100):
        a, b, dress = rng.randint(2, 40), rng.randint(2, 40), rng.choice(clothes)
        reference = dress % f"{a * b:,}"
        for formula in (f"{a}*{b}", f"{a}\\cdot {b}", f"{a * b - 1}+1", f"\\sqrt{{{(a * b) ** 2}}}", f"{a}({b})"):
            assert math_reward(f"\\boxed{{{formula}}}", reference) == 0.0, (reference, formula)
        assert math_reward(f"\\boxed{{{rng.choice(clothes) % (a * b)}}}", reference) == 1.0, reference


def test_several_boxes_for_a_list():
    """Only for a list, all of the boxes, and nothing but commas and words between them."""
    assert math_reward(r"\boxed{-2} and \boxed{1}", "-2, 1") == 1.0
    assert math_reward(r"$\boxed{1}$, $\boxed{-2}$.", "-2, 1") == 1.0
    for response in (r"\boxed{-2}, \boxed{1}, \boxed{3}", r"\boxed{-2} is wrong, so \boxed{1}", r"\boxed{1}"):
        assert math_reward(response, "-2, 1") == 0.0
    assert math_reward(r"\boxed{41} and \boxed{42}", "41") == 0.0


def test_long_answers_are_compared_or_counted():
    """300 characters go to Math-Verify; above MAX_ANSWER only the reference itself is right, and a loss is counted."""
    pytest.importorskip("math_verify")
    terms = "+".join(f"x^{{{n}}}" for n in range(40))
    assert len(terms) > 200 and math_reward(f"\\boxed{{y - y + {terms}}}", terms) == 1.0
    long, before = "x+" * 1500 + "y", maths.counts["long"]
    assert math_reward(f"\\boxed{{{long}}}", long) == 1.0 and maths.counts["long"] == before
    assert math_reward(f"\\boxed{{{long}y}}", long) == 0.0 and maths.counts["long"] == before + 1


@pytest.mark.parametrize("hostile", ["m+" * 900, "{" * 1900, "(" * 900 + ")" * 900, r"\text{" * 300, "5" + " cm" * 600,
                                     "(" * 400 + "1" + ",2)" * 400, "%" * 1900, "x_" * 900, r"\boxed{" * 200])
def test_hostile_answers_take_no_time(hostile):
    """A rule with nested repetitions took minutes for one of these; two of each pass unnoticed."""
    for _ in range(2):
        normalise(hostile)


def test_no_box_no_reward():
    for response in (
        "391",
        "The answer is 391.",
        "",
        "<think>\\boxed{391}</think>",
        "<think>\\boxed{391}",
        "\\boxed{}",
    ):
        assert math_reward(response, "391") == 0.0
    assert math_reward("\\boxed{392} \\boxed{391}", "391") == 1.0
    assert math_reward("\\boxed{391} \\boxed{392}", "391") == 0.0


def test_a_restated_sum_is_never_paid():
    """Copying the question into the box was paid by the symbolic checker: fatal for arithmetic RL."""
    rng = random.Random(2)
    for _ in range(200):
        a, b, sign = rng.randint(2, 99), rng.randint(2, 99), rng.choice("+-*")
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        for shown in (sign, {"*": r" \times ", "+": " + ", "-": " - "}[sign]):
            assert math_reward(f"\\boxed{{{a}{shown}{b}}}", str(value)) == 0.0
        assert math_reward(f"\\boxed{{{value}}}", str(value)) == 1.0
        assert math_reward(f"\\boxed{{{value + 1}}}", str(value)) == 0.0


def test_plain_numbers_are_exact():
    """0.1 + 0.2 in binary is not 3/10; here decimals are fractions: 0.3 = 3/10 to the last digit."""
    from fractions import Fraction

    assert plain_number("0.3") == Fraction(3, 10) and plain_number("0." + "3" * 60) != Fraction(1, 3)
    assert plain_number("9" * 150) == 10**150 - 1 and plain_number(r"\frac{1}{0}") is None


def test_math_verify_is_imported_by_nobody_here():
    """It costs 0.7 s and belongs to the workers alone; numbers do not even start one."""
    code = ("import sys, reward; from judge import maths; assert reward.math_reward('\\\\boxed{2}', '2') == 1.0; "
            "print([m for m in ('math_verify', 'sympy') if m in sys.modules], maths.counts['starts'])")
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[] 0"


# ---- maths: the workers ---------------------------------------------------------------------------------------------

SYMBOLIC = [
    (r"\sqrt{2}", "2^{1/2}", 1), ("x^2-1", "(x-1)(x+1)", 1), (r"\frac{\pi}{2}", r"\pi/2", 1),
    ("(1,2)", "(1, 2)", 1), (r"2\sqrt{3}", r"\sqrt{12}", 1), ("x^2-1", "x^2+1", 0), ("(1,2)", "(2,1)", 0),
    (r"\sqrt{2}", "1.41", 0), ("1,2", "1,2,2", 0), (r"2\pi", r"x=y=2\pi", 0),
    (r"\text{red}", r"\text{red}", 1), (r"\text{red}", r"\text{blue}", 0), (r"\pi", r"}{\frac", 0),
]  # fmt: skip


def test_expressions_go_to_math_verify():
    pytest.importorskip("math_verify")
    for answer, box, paid in SYMBOLIC:
        assert math_reward(f"\\boxed{{{box}}}", answer) == paid, (answer, box)
    assert maths.counts["worker"] > 0 and maths.counts["errors"] == 0


def test_no_file_beside_ours_is_imported_in_place_of_a_library(monkeypatch, tmp_path):
    """A worker starts in the project's root, where anybody may have a sympy.py: it must not find that one."""
    pytest.importorskip("math_verify")
    for name in ("judge", "data", "configurator.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "sympy.py").write_text("raise ImportError('the wrong sympy')")
    maths.close()
    monkeypatch.setattr(maths, "ROOT", os.fspath(tmp_path))
    assert maths.equal(r"\sqrt{2}", "2^{1/2}")
    maths.close()


def test_a_hanging_answer_is_wrong_and_holds_up_nobody():
    """A tower of powers never returns to Python. In threads, where signals are no use: False at the deadline,
    while another thread's expressions are checked by the second worker; then both workers serve again."""
    pytest.importorskip("math_verify")
    done = []

    def hang():
        done.append(("tower", math_reward(f"\\boxed{{{TOWER}}}", r"\pi")))

    def work():
        for k in range(2, 6):
            done.append((k, math_reward(f"\\boxed{{{k}^{{1/2}}}}", f"\\sqrt{{{k}}} + 0")))

    while len(maths._workers) < 2:  # both workers are up, so that the race below is about the answers
        warm = [threading.Thread(target=math_reward, args=(r"\boxed{2^{1/2}}", r"\sqrt{2}")) for _ in range(2)]
        for thread in warm:
            thread.start()
        for thread in warm:
            thread.join()
    before = dict(maths.counts)
    threads = [threading.Thread(target=target) for target in (hang, work)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done[-1] == ("tower", 0.0) and [d for d in done if d[0] != "tower"] == [(k, 1.0) for k in range(2, 6)]
    assert time.monotonic() - begin < 60
    assert maths.counts["timeouts"] - before["timeouts"] == 1
    assert math_reward(r"\boxed{2^{1/2}}", r"\sqrt{2}") == 1.0


def test_eight_threads_get_the_answers_of_one():
    pytest.importorskip("math_verify")
    questions = [(f"\\sqrt{{{k}}}", f"{k + k % 2}^{{1/2}}", float(k % 2 == 0)) for k in range(2, 34)]
    found = {}

    def work(part):
        for answer, box, _ in part:
            found[answer] = math_reward(f"\\boxed{{{box}}}", answer)

    threads = [threading.Thread(target=work, args=(questions[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {answer: paid for answer, _, paid in questions}


def test_a_dead_worker_is_replaced():
    pytest.importorskip("math_verify")
    math_reward(r"\boxed{2^{1/2}}", r"\sqrt{2}")
    for worker in list(maths._workers):
        worker.kill()
        worker.wait()
    timeouts = maths.counts["timeouts"]
    assert math_reward(r"\boxed{2^{1/2}}", r"\sqrt{2}") == 1.0
    assert maths.counts["timeouts"] == timeouts


def fake_worker(monkeypatch, code):
    def start():
        argv = [sys.executable, "-c", code]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    monkeypatch.setattr(maths, "_start_worker", start)


def test_a_failing_checker_is_loud(monkeypatch):
    """A swallowed exception once made every reward 0: here, in a tenth of 50 answers, it ends the run."""
    monkeypatch.setattr(maths, "counts", dict.fromkeys(maths.counts, 0))
    fake_worker(
        monkeypatch,
        "import sys\nprint('{\"ready\": true}', flush=True)\n"
        'for line in sys.stdin: print(\'{"errors": "boom"}\', flush=True)',
    )
    maths.close()
    with pytest.raises(RuntimeError, match="failed too often.*boom"):
        for _ in range(60):
            math_reward(r"\boxed{2^{1/2}}", r"\sqrt{2}")
    maths.close()


def test_a_missing_checker_is_loud(monkeypatch):
    fake_worker(monkeypatch, 'print(\'{"errors": "No module named math_verify"}\', flush=True)')
    maths.close()
    with pytest.raises(RuntimeError, match="does not start: No module named math_verify"):
        math_reward(r"\boxed{2^{1/2}}", r"\sqrt{2}")
