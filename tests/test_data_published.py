"""GSM8K, MATH, MBPP and HumanEval: rows of the published form, written here, through read_problems and the adapters."""
import json
from collections import Counter

import pytest

from configurator import UserError
from data.adapters import convert
from data.problems import read_problems
from data.published import last_boxed, problem_line
from judge import Judge

GSM8K = {"question": "Ann has 3 bags with 400 nuts each and eats 12. How many are left?",
         "answer": "Ann has 3 * 400 = <<3*400=1200>>1200 nuts.\nShe keeps 1200 - 12 = <<1200-12=1188>>1188."
                   "\n#### 1,188"}
MATH = {"problem": "What is $\\frac12+\\frac13$?", "level": "Level 3", "type": "Prealgebra",
        "solution": "First \\boxed{x} is a draft. The sum is $\\boxed{\\frac{5}{6}}$."}
MATH500 = {"problem": "Find $x$.", "solution": "It is $\\boxed{3}$.", "answer": "3", "subject": "Algebra", "level": 2,
           "unique_id": "test/algebra/1.json"}
MBPP = {"task_id": 11, "text": "Write a function to add the squares of a list.", "test_setup_code": "",
        "code": "def squares(xs):\r\n    return sum(x * x for x in xs)", "challenge_test_list": [],
        "test_list": ["assert squares([1, 2]) == 5", "assert squares([]) == 0", "assert squares((2,)) == 4"]}
SANITIZED = {"source_file": "a.py", "task_id": 12, "prompt": "Write a function that says whether n is even.",
             "code": "def even(n):\n    return n % 2 == 0", "test_imports": [],
             "test_list": ["assert even(2)", "assert not even(3)", "assert even(-4) is True", "assert even(7)==False"]}
HUMANEVAL = {"task_id": "HumanEval/900", "entry_point": "halves",
             "prompt": 'def halves(xs):\n    """ Half of each number.\n    >>> halves([2])\n    [1.0]\n    """\n',
             "canonical_solution": "    return [x / 2 for x in xs]\n",
             "test": "\n\nMETADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    assert True, 'always'\n"
                     "    assert candidate([2, 3]) == [1.0, 1.5], 'no'\n    assert candidate([]) == []\n"
                     "    assert [0.5 * 3] == candidate([3])\n"}


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_as_published(tmp_path):
    """One file after the other, as eval.py reads them."""
    p, q, r = [read_problems(lines(tmp_path / "a.jsonl", [row]))[0] for row in (GSM8K, MATH, MATH500)]
    assert (p.answer, p.solution) == ("1188", "The answer is \\boxed{1188}.") and p.question == GSM8K["question"]
    assert p.reasoning == "Ann has 3 * 400 = 1200 nuts.\nShe keeps 1200 - 12 = 1188."
    assert (q.answer, q.level) == ("\\frac{5}{6}", 3) and (r.answer, r.level) == ("3", 2)
    (tmp_path / "m").mkdir()
    for k, row in enumerate((MATH, MATH500)):                # MATH is a folder with a file for each problem
        (tmp_path / f"m/{k}.json").write_text(json.dumps(row))
    assert [x.answer for x in read_problems(tmp_path / "m")] == ["\\frac{5}{6}", "3"]
    (tmp_path / "mbpp.json").write_text(json.dumps([SANITIZED]))
    (s,) = read_problems(tmp_path / "mbpp.json")
    assert [(t.kind, t.input) for t in s.tests] == [("check", a.replace("==", " == ")) for a in SANITIZED["test_list"]]
    assert s.entry == "even" and s.question.endswith("pass these tests:\n" + "\n".join(SANITIZED["test_list"]))
    (h,) = read_problems(lines(tmp_path / "h.jsonl", [HUMANEVAL]))
    assert [t.input for t in h.tests] == ["assert candidate([2, 3]) == [1.0, 1.5]", "assert candidate([]) == []",
                                          "assert [0.5 * 3] == candidate([3])"]
    assert h.question.startswith("Complete this function:\n```python\ndef halves(xs):") and h.entry == "halves"


def test_gold_solutions_pass_and_others_do_not(tmp_path):
    """Through the judge: the published solution of each gets every test right, an empty function does not."""
    with Judge(workers=1) as judge:
        for row in (MBPP, SANITIZED, HUMANEVAL):
            (p,) = read_problems(lines(tmp_path / "a.jsonl", [row]))
            program = p.solution.removeprefix("```python\n").removesuffix("\n```")
            assert {v.status for v in judge.run(program, list(p.tests), entry=p.entry)} == {"AC"}
            empty = f"def {p.entry}(x):\n    return None"
            assert "WA" in {v.status for v in judge.run(empty, list(p.tests), entry=p.entry)}   # `not even(3)` is right


MORE = [                                            # asserts of every form that MBPP and HumanEval have
    {**MBPP, "text": "Sets.", "code": "def both(a, b):\n    return a & b",
     "test_list": ["assert both({1, 2}, {2}) == {2}", "assert set(both({1}, {1})) == set([1])"]},
    {**MBPP, "text": "Keys.", "code": "def keys(d):\n    return [*d]",
     "test_list": ["assert keys({1: 2, (3,): 4}) == [1, (3,)]"]},
    {**MBPP, "text": "Close.", "code": "def half(x, by=2):\n    return x / by", "test_setup_code": "import math",
     "test_list": ["assert math.isclose(half(1), 0.5, rel_tol=0.001)", "assert abs(half(x=3) - 1.5) < 1e-6"]},
    {**MBPP, "text": "Tree.", "code": "class Node:\n    def __init__(self, x):\n        self.x, self.left = x, None\n"
     "def depth(t):\n    return 1 + depth(t.left) if t else 0",
     "test_setup_code": "root = Node(1)\nroot.left = Node(2)", "test_list": ["assert (depth(root)) == 2"]},
    {**HUMANEVAL, "entry_point": "decode", "canonical_solution": "    return s[::-1]\n",
     "prompt": "import random\n\ndef encode(s):\n    return s[::-1]\n\ndef decode(s):\n    pass\n",
     "test": "def check(candidate):\n    for word in ('ab', 'cde'):\n        assert candidate(encode(word)) == word"}]


def test_every_form_of_assert(tmp_path):
    """None is left out; through the judge the published solution passes and a function that gives None does not."""
    problems = read_problems(lines(tmp_path / "a.jsonl", MORE))
    assert [p.entry for p in problems] == ["both", "keys", "half", "depth", "decode"]
    with Judge(workers=1) as judge:
        for p in problems:
            program = p.solution.removeprefix("```python\n").removesuffix("\n```")
            assert {v.status for v in judge.run(program, list(p.tests), entry=p.entry)} == {"AC"}, p.entry
            empty = f"{program}\ndef {p.entry}(*a, **k):\n    return None"
            assert "AC" not in {v.status for v in judge.run(empty, list(p.tests), entry=p.entry)}, p.entry


@pytest.mark.parametrize("asserts, why", [
    (["assert f(1) == "], "test_list: not Python"),
    (["assert True"], "its tests call no function that its code defines"),
    (["assert g(1) == 1"], "its tests call no function"), (["f(1)"], "no assert about f")])
def test_a_row_without_usable_tests_says_why(asserts, why):
    with pytest.raises(UserError, match=why):
        problem_line({**MBPP, "code": "def f(x):\n    return x", "test_list": asserts})


def test_rows_that_cannot_become_problems_are_counted(tmp_path, capsys):
    other = {**MBPP, "task_id": 13, "test_list": ["assert unknown({1}) == 1"]}
    boxless = {**MATH, "solution": "It is 3."}
    path = lines(tmp_path / "a.jsonl", [MBPP, other, MBPP, GSM8K, boxless])
    assert len(read_problems(path)) == 2
    assert "a.jsonl: 2 of 4 problems left out, the first in row 2: its tests call no" in capsys.readouterr().err
    with pytest.raises(UserError, match="no problems in it"):
        read_problems(lines(tmp_path / "b.jsonl", [other]))


def test_other_rows_are_not_taken_for_one_of_the_four():
    assert problem_line({"question": "q", "answer": "3"}) is None
    assert problem_line({"id": "1", "kind": "maths", "question": "q", "answer": "3", "solution": "s"}) is None
    assert problem_line({"problem": "p", "solution": "s", "generations": []}) is None


@pytest.mark.parametrize("text, box", [("\\boxed{a{b}c}", "a{b}c"), ("\\fbox{2}", "2"), ("$\\boxed 2$", "2"),
                                       ("\\boxed{1} or \\boxed {2}", "2"), ("\\boxed{open", ""), ("none", "")])
def test_last_boxed(text, box):
    assert last_boxed(text) == box


def test_adapters_of_the_four():
    """Problems for RL, and chats with the published solution for SFT."""
    rows = [GSM8K, MATH, MBPP, HUMANEVAL]
    items = lambda adapter: [item for _, item in convert(adapter, enumerate(rows, 1), Counter())]
    assert [p.kind for p in items("gsm8k")] == ["maths", "maths", "code", "code"]
    chats = items("math_sft")
    assert chats[0]["messages"][1]["content"] == ("<think>\nAnn has 3 * 400 = 1200 nuts.\nShe keeps 1200 - 12 = 1188."
                                                  "\n</think>\n\nThe answer is \\boxed{1188}.")
    assert chats[1]["messages"][1]["content"] == MATH["solution"]
    assert chats[3]["messages"][1]["content"].startswith("```python\ndef halves(xs):")
