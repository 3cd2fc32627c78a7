"""Tests that carry Python values, or come as code: what is paid is what the problem's own tests pay, in any order."""

import itertools
import os
import random

import pytest

from configurator import UserError
from data.problems import Limits, Problem, Test, check_tests, read_problems, write_problems
from judge import Judge, place
from judge.server import decode, encode
from reward import difficulty_reward

if os.name != "posix":
    pytest.skip("the judge needs a POSIX system", allow_module_level=True)


@pytest.fixture(scope="module")
def judge():
    with Judge(workers=1, time_limit=0.3, wall_factor=8, allow_unsafe=True, quiet=True) as judge:
        yield judge


def statuses(judge, program, tests, entry="f", **kw):
    return " ".join(v.status for v in judge.run(program, tests, entry, **kw))


# ---- call tests -----------------------------------------------------------------------------------------------------

CALLS = [  # program, input, expected, status
    ("def f(t): return t + (3,)", "[(1, 2)]", "(1, 2, 3)", "AC"),
    ("def f(t): return list(t)", "[(1, 2)]", "(1, 2)", "WA"),
    ("def f(t): return tuple(t)", "[[1, 2]]", "[1, 2]", "AC"),                        # all JSON: a tuple is a list
    ("def f(t): return tuple(t)", "([1, 2],)", "[1, 2]", "WA"),                       # Python: it is not
    ("def f(ts): return len(set(ts))", "[[(1, 2), (1, 2)]]", "1", "AC"),
    ("def f(s): return s | {3}", "[{1, 2}]", "{1, 2, 3}", "AC"),
    ("def f(s): return sorted(s)", "[{1, 2}]", "{1, 2}", "WA"),
    ("def f(d): return d[1]", "[{1: 'a'}]", "'a'", "AC"),
    ("def f(d): return d['1']", '[{"1": "a"}]', '"a"', "AC"),
    ("def f(): return {1: {2}, None: b'x', 2.5: ()}", "[]", "{1: {2}, None: b'x', 2.5: ()}", "AC"),
    ("from collections import Counter\ndef f(s): return Counter(s)", "['aab']", "{'a': 2, 'b': 1}", "AC"),
    ("from collections import Counter\ndef f(s): return dict(Counter(s))", "['aab']", "Counter('aab')", "AC"),
    ("from collections import Counter\ndef f(s): return Counter(s)", "['aab']", "Counter('abb')", "WA"),
    ("from collections import defaultdict\ndef f(): return defaultdict(int, a=1)", "[]", '{"a": 1}', "AC"),
    ("from collections import OrderedDict\ndef f(): return OrderedDict(a=1)", "[]", '{"a": 1}', "AC"),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)", "[]", "(1, 2)", "AC"),
    ("from collections import deque\ndef f(): return deque([1])", "[]", "deque([1])", "AC"),
    ("from enum import IntEnum\nclass C(IntEnum):\n    A = 3\ndef f(): return C.A", "[]", "3", "AC"),
    ("from fractions import Fraction\ndef f(): return Fraction(1, 2)", "[]", "0.5", "AC"),
    ("from decimal import Decimal\ndef f(): return Decimal('2.50')", "[]", "2.5", "AC"),
    ("def f(b): return b[::-1]", "[b'ab\\x00']", "b'\\x00ba'", "AC"),
    ("def f(z): return z * z", "[1j]", "(-1+0j)", "AC"),
    ("def f(x): return x", "[float('inf')]", "float('inf')", "AC"),
    ("def f(x): return x", "[[1, 2] * 3]", "[1, 2] * 3", "AC"),
    ("def f(r): return r", "[range(3)]", "range(3)", "AC"),
    ("def f(x): return x", "[None]", "None", "AC"),
    ("def f(x): pass", "[[None]]", "null", "AC"),
    ("def f(n): return n / 2", "[4]", "2", "AC"),                                     # 2.0 == 2
    ("def f(n): return n == 1", "[1]", "1", "WA"),                                    # True where a number is due
    ("def f(n): return n - 1", "[1]", "false", "AC"),                                 # 0 == False
    ("def f(n): return 10 ** 5000", "[1]", "10 ** 5000", "AC"),
    ("def f(n): return 0.1 + 0.2", "[1]", "0.3", "AC"),
    ("def f(n): return f", "[1]", "1", "RE"),
    ("def f(n):\n    yield n", "[1]", "[1]", "RE"),
    ("class A: pass\ndef f(n): return A()", "[1]", "1", "RE"),
    ("def f(n): return n\nif __name__ == '__main__':\n    print(f(int(input())))", "[1]", "1", "AC"),
    ("def f(n): return n\nif __name__ == '__main__':\n    import unittest\n    unittest.main()", "[1]", "1", "AC"),
    ("import pickle\nclass A: pass\ndef f(): return type(pickle.loads(pickle.dumps(A()))) is A", "[]", "true", "AC"),
]


@pytest.mark.parametrize("case", CALLS, ids=lambda c: f"{c[0][-20:]} {c[2]}")
def test_calls_carry_python_values(judge, case):
    program, given, expected, status = case
    assert statuses(judge, program, [Test("call", given, expected)]) == status


def test_values_cross_the_wire():
    """decode() undoes encode() for every kind of value that the docs name, nested in each other."""
    plain = [None, True, 3, -2**70, 2**20000, 0.1, float("inf"), "ü\ud800", b"\0\xff", 1 - 2j, range(1, 9, 2)]
    values = plain + [[*plain], (*plain,), {1, 2}, frozenset("ab"), {(1, 2): {3: [b"x"]}, None: {frozenset([1])}}]
    for value in values:
        got = decode(encode(value))
        assert got == value and type(got) is type(value)
    for bad in (lambda: 0, object(), iter([]), {1: open}):
        with pytest.raises(TypeError, match="not a value"):
            encode(bad)
    for bad in ({"tuple": 3}, {"set": [[1]]}, {"made up": 1}, {"Fraction": "1e999999999"}, {"a": 1, "b": 2},
                {"set": [k * (2**61 - 1) for k in range(5000)]}):
        with pytest.raises((ValueError, TypeError)):
            decode(bad)


LEETCODE = """
class Solution:
    def __init__(self):
        self.seen = []
    def add(self, xs: List[int]) -> int:
        self.seen += xs
        return sum(self.seen) + (Counter(xs)[0] and inf) * 0
"""


@pytest.mark.parametrize("entry", ["add", "Solution.add"])
def test_class_solution_is_what_leetcode_makes_of_it(judge, entry):
    """The usual names are in scope, every test has a new object, and the published name of the method is enough."""
    tests = [Test("call", "[[1, 2]]", "3"), Test("call", "[[5]]", "5")]
    assert statuses(judge, LEETCODE, tests, entry) == "AC AC"
    assert statuses(judge, LEETCODE + "def add(xs):\n    return 3\n", tests, "add") == "AC WA"    # a function first


def test_no_name_is_given_to_a_program_that_forgot_an_import(judge):
    assert statuses(judge, "def f(x: List[int]): return 1", [Test("call", "[[1]]", "1")]) == "RE"


@pytest.mark.parametrize(("given", "expected", "said"), [
    ("[1", "1", "call test"), ("3", "3", "JSON list of arguments"), ("{1}", "3", "list of arguments"),
    ("[1]", "NaN", "NaN is not JSON"), ("[true, None]", "1", "call test"), ("[1]", "", "call test")])
def test_bad_values_are_named(given, expected, said):
    with pytest.raises(UserError, match=said):
        Test("call", given, expected)


# ---- tests that come as code ----------------------------------------------------------------------------------------

MBPP = [  # rows of the published shape: program, test_list and test_setup_code as one text, entry
    ("def pair(t):\n    return t + (len(t),)", "assert pair((1, 2)) == (1, 2, 2)\nassert pair(()) == (0,)", "pair"),
    ("from collections import Counter\ndef count(s):\n    return Counter(s)",
     "assert count('aab') == {'a': 2, 'b': 1}\nassert count([(1, 2), (1, 2)]) == {(1, 2): 2}", "count"),
    ("def half(a):\n    return a / 2", "assert half(4) == 2\nassert half(3) == 1.5", "half"),
    ("def same(a, b):\n    return int(a == b)", "assert same(1, 2) == False\nassert same(b'x', b'x') == True", "same"),
    ("class Node:\n    def __init__(self, v):\n        self.v, self.next = v, None\n"
     "def total(n):\n    return n.v + (total(n.next) if n.next else 0)",
     "head = Node(1)\nhead.next = Node(5)\nassert total(head) == 6\nassert total(Node(2)) == 2", "total"),
    ("import sys\ndef size(t):\n    return sys.getsizeof(t)",
     "assert size((1, 'a')) == sys.getsizeof((1, 'a'))", "size"),
    ("def root(x):\n    return x ** 0.5", "import math\nassert math.isclose(root(2), 1.41421356, rel_tol=1e-6)\n"
     "assert root(9) == 3\nassert abs(root(3) - 1.732) < 1e-3", "root"),
    ("def uniq(xs):\n    return set(xs)", "assert uniq([1, 1]) == set([1])\nassert len(uniq('abc')) == 3", "uniq"),
]
HUMAN_EVAL = [  # prompt, canonical_solution, test, entry_point
    ("def square(x):\n    '''x times x'''\n", "    return x * x\n",
     "METADATA = {'author': 'x'}\n\ndef check(candidate):\n    assert candidate(3) == 9, 'three'\n    assert True\n"
     "    assert candidate(-2) is not None\n    for i in range(50):\n        assert candidate(i) == i * i\n", "square"),
    ("import math\n\n\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n\n"
     "def zero(xs):\n    '''where poly is 0'''\n", "    return -xs[0] / xs[1]\n",
     "METADATA = {}\n\ndef check(candidate):\n    import random\n    rng = random.Random(4)\n    for _ in range(20):\n"
     "        xs = [rng.randint(1, 9), rng.randint(1, 9)]\n        assert math.fabs(poly(xs, candidate(xs))) < 1e-6\n",
     "zero"),
    ("def halve(x):\n", "    if x % 2:\n        raise ValueError('odd')\n    return x // 2\n",
     "def check(candidate):\n    assert candidate(4) == 2\n    try:\n        candidate(3)\n        assert False\n"
     "    except ValueError as error:\n        assert str(error) == 'odd'\n\ncheck(halve)\n", "halve"),
]
WRONG = {"returns its argument": "def {f}(*a, **k):\n    return a[0] if a else None", "None": "def {f}(*a, **k): pass",
         "exits": "import os\ndef {f}(*a, **k):\n    os._exit(0)", "exits at load": "import sys\nsys.exit(0)",
         "always equal":
             "class E:\n    __eq__ = lambda *a: True\n    __hash__ = None\ndef {f}(*a, **k):\n    return E()",
         "list of it": "def {f}(*a, **k):\n    return list(a[0])", "True": "def {f}(*a, **k):\n    return True",
         "patches": "import builtins\nbuiltins.abs = builtins.len = lambda *a: 0\ndef {f}(*a, **k):\n    return 0",
         "reads stdin": "def {f}(*a, **k):\n    return input()"}


def published():
    """(program, code of the tests, entry) of all rows."""
    yield from MBPP
    for prompt, solution, code, entry in HUMAN_EVAL:
        yield prompt + solution, prompt[:prompt.index(f"def {entry}")] + code, entry


@pytest.mark.parametrize("row", published(), ids=lambda row: row[2])
def test_published_tests_pay_their_own_solution(judge, row):
    program, code, entry = row
    tests = check_tests(code, entry)
    assert statuses(judge, program, tests, entry) == " ".join(["AC"] * len(tests))


@pytest.mark.parametrize("row", published(), ids=lambda row: row[2])
def test_wrong_programs_are_paid_only_where_the_asserts_themselves_hold(judge, row):
    """Each assert is also run here, in one namespace with the program, as the published harnesses do it."""
    _, code, entry = row
    tests = check_tests(code, entry)
    for name in ("returns its argument", "None", "list of it", "True"):
        program = WRONG[name].format(f=entry)
        for test, verdict in zip(tests, judge.run(program, tests, entry), strict=True):
            scope = {"sys": __import__("sys")}
            try:
                exec(program, scope)
                scope["candidate"] = scope[entry]
                exec(test.input, scope)
                holds = True
            except Exception:
                holds = False
            assert verdict.status != "AC" or holds, (name, test.input, verdict)
            assert verdict.status != "JE"
    for name in set(WRONG) - {"returns its argument", "None", "list of it", "True"}:
        paid = [v.status for v in judge.run(WRONG[name].format(f=entry), tests, entry)].count("AC")
        assert paid == 0 or name == "patches" and paid < len(tests), name


def test_check_tests_are_split_by_assert():
    code = "import os\nx = 3\ny = 4\ndef check(candidate):\n    z = candidate(x)\n    assert z == 3\n    assert f(5)\n"
    assert [t.input for t in check_tests(code, "f")] == ["x = 3\nz = candidate(x)\nassert z == 3", "assert f(5)"]
    for bad, said in (("x = 1", "no assert about f"), ("assert True", "no assert about f"), ("assert (", "not Python")):
        with pytest.raises(UserError, match=said):
            check_tests(bad, "f")


def test_expected_values_of_checks_stay_outside(judge):
    """The program sees the arguments that it is called with; the asserts run in another process."""
    spy = """
import gc, sys
def f(n):
    frame, seen = sys._getframe(), repr(gc.get_objects())
    while frame:
        seen += repr(frame.f_locals) + repr(frame.f_globals)
        frame = frame.f_back
    return "".join(reversed("73313")) in seen
"""
    for code in ("assert f(271) is False != 31337", "x = f(271)\nassert x is False or x == 31337"):
        assert judge.run(spy, [Test("check", code)])[0].status == "AC", code


def test_a_check_that_hangs_or_floods_is_not_the_judges_error(judge):
    assert statuses(judge, "def f(n):\n    while True: pass", [Test("check", "assert f(1) or 1")]) == "TLE"
    assert statuses(judge, "def f(n):\n    return 'x' * 10**7", [Test("check", "assert f(1) or 1")]) in ("OLE", "RE")
    assert statuses(judge, "def f(n): return 1", [Test("check", "assert f(1)\nassert f('x' * 10**7)")]) == "OLE"
    assert statuses(judge, "import os\ndef f(n): os._exit(0)", [Test("check", "assert f(1) or 1")]) == "RE"
    assert statuses(judge, "def f(n): return n", [Test("check", "assert f(1) or 1")]) == "AC"
    assert judge.counts["JE"] == judge.counts["retries"] == 0


# ---- order, limits, memory of verdicts ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def quick_judge():
    with Judge(workers=1, time_limit=0.1, wall_factor=8, allow_unsafe=True, quiet=True) as judge:
        yield judge


def test_the_order_of_tests_changes_nothing(quick_judge):
    """Time-outs, global state, twins: in every order a test has the same verdict, so each scheme pays the same."""
    program = "seen = []\ndef f(n):\n    seen.append(n)\n    while n < 5: pass\n    return n if len(seen) % 2 else -n"
    tests = [Test("call", f"[{n}]", str(n), n % 3) for n in range(9)] + [Test("call", "[7]", "7", 1)]
    orders = [tests, tests[::-1], random.Random(1).sample(tests, len(tests))]
    found = []
    for order in orders:
        verdicts = [v.status for v in quick_judge.run(program, order)]
        by_test = sorted(zip(map(place, order), verdicts, strict=True))
        found.append((by_test, *(difficulty_reward([v == "AC" for v in verdicts], [t.difficulty for t in order], scheme)
                                 for scheme in ("vanilla", "strict", "soft"))))
    assert found[0] == found[1] == found[2]
    assert [v for _, v in found[0][0]].count("TLE") == 5


def test_four_timeouts_cost_no_test_that_is_quick(quick_judge):
    program = "def f(n):\n    while n < 4: pass\n    return n"
    for order in itertools.islice(itertools.permutations(range(10)), 0, 2_000_000, 1_000_000):
        tests = [Test("call", f"[{n}]", str(n)) for n in order]
        assert [v.status for v in quick_judge.run(program, tests)] == ["TLE" if n < 4 else "AC" for n in order]


def test_a_problem_names_its_limits(judge):
    slow = "from time import process_time as t\ndef f():\n    end = t() + 0.5\n    while t() < end: pass\n    return 1"
    one = [Test("call", "[]", "1")]
    assert statuses(judge, slow, one) == "TLE" and statuses(judge, slow, one, limits=Limits(seconds=2)) == "AC"
    large = "def f(): return len(bytes(700 << 20)) and 1"
    assert statuses(judge, large, one) == "MLE" and statuses(judge, large, one, limits=Limits(memory_mb=900)) == "AC"
    small = Limits(memory_mb=64)
    assert statuses(judge, "def f(): return len(bytes(99 << 20)) and 1", one, limits=small) == "MLE"
    out = [Test("stdio", "", "x" * 3000)]
    assert statuses(judge, "print('x' * 3000)", out, limits=Limits(output_kb=2)) == "OLE"
    assert statuses(judge, "print('x' * 3000)", out) == "AC"
    near = [Test("call", "[]", "[1.0, 2]")]
    assert statuses(judge, "def f(): return [1.0004, 2]", near) == "WA"
    assert statuses(judge, "def f(): return [1.0004, 2]", near, limits=Limits(tolerance=1e-3)) == "AC"
    text = [Test("stdio", "", "0.333333 yes\n2\n")]
    for said, status in (("0.33334 yes\\n2.0", "AC"), ("0.33334  yes\\n2", "AC"), ("0.34 yes\\n2", "WA"),
                         ("0.33334 no\\n2", "WA"), ("0.33334 yes 2", "WA"), ("nan yes\\n2", "WA")):
        assert statuses(judge, f"print('{said}')", text, limits=Limits(tolerance=1e-4)) == status, said
    assert statuses(judge, "print('0.33334 yes\\n2')", text) == "WA"


def test_limits_are_arguments_of_the_judge():
    with Judge(workers=1, memory_mb=64, output_kb=1, tolerance=0.1, allow_unsafe=True, quiet=True) as judge:
        assert statuses(judge, "def f(): return len(bytes(99 << 20))", [Test("call", "[]", "1")]) == "MLE"
        assert statuses(judge, "print('x' * 2000)", [Test("stdio", "", "x")]) == "OLE"
        assert statuses(judge, "def f(): return 1.05", [Test("call", "[]", "1.0")]) == "AC"


def test_limits_stand_in_the_problems_file(tmp_path):
    """Only where a problem names some: other lines are as they always were."""
    test = Test("call", "[1]", "1")
    problems = [Problem("a" * 16, "code", "q", tests=(test,), limits=Limits(seconds=6, tolerance=1e-6)),
                Problem("b" * 16, "code", "q", tests=(test,))]
    path = tmp_path / "p.jsonl"
    write_problems(path, problems)
    first, second = path.read_text().splitlines()
    assert '"limits": {"seconds": 6, "tolerance": 1e-06}' in first and "limits" not in second
    assert read_problems(path) == problems
    for bad in ('{"seconds": "6"}', '{"seconds": 0}', '{"hours": 1}', '{"memory_mb": -1}', '[]'):
        path.write_text(second[:-1] + f', "limits": {bad}' + "}\n")
        with pytest.raises(UserError, match="limit"):
            read_problems(path)


def test_a_coin_is_not_remembered():
    """A program whose two runs disagree is run each time; one that agrees with itself is run twice."""
    coin = "import time\ndef f():\n    return time.time_ns() // 1000 % 2"
    with Judge(workers=1, cache_size=9, allow_unsafe=True, quiet=True) as judge:
        seen = [judge.run(coin, [Test("call", "[]", "0")] * 30)[0].status for _ in range(4)]
        assert set(seen) <= {"AC", "WA"} and judge.counts["cached"] == 0 and judge.counts["processes"] == 4
