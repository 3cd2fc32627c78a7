"""GSM8K, MATH, MBPP and HumanEval: rows of the published form, written here, through read_problems and the adapters."""
import json
from collections import Counter

import pytest

from configurator import UserError
from data.adapters import convert
from data.problems import read_problems
from data.published import call_tests, last_boxed, problem_line
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
    assert [(t.input, t.expected) for t in s.tests] == [("[2]", "true"), ("[3]", "false"), ("[-4]", "true"),
                                                        ("[7]", "false")]
    assert s.entry == "even" and s.question.endswith("pass these tests:\n" + "\n".join(SANITIZED["test_list"]))
    (h,) = read_problems(lines(tmp_path / "h.jsonl", [HUMANEVAL]))
    assert [(t.input, t.expected) for t in h.tests] == [("[[2, 3]]", "[1.0, 1.5]"), ("[[]]", "[]"), ("[[3]]", "[1.5]")]
    assert h.question.startswith("Complete this function:\n```python\ndef halves(xs):") and h.entry == "halves"


def test_gold_solutions_pass_and_others_do_not(tmp_path):
    """Through the judge: the published solution of each gets every test right, an empty function none of all."""
    with Judge(workers=1) as judge:
        for row in (MBPP, SANITIZED, HUMANEVAL):
            (p,) = read_problems(lines(tmp_path / "a.jsonl", [row]))
            program = p.solution.removeprefix("```python\n").removesuffix("\n```")
            assert {v.status for v in judge.run(program, list(p.tests), entry=p.entry)} == {"AC"}
            empty = f"def {p.entry}(x):\n    return None"
            assert {v.status for v in judge.run(empty, list(p.tests), entry=p.entry)} == {"WA"}


@pytest.mark.parametrize("program, why", [
    ("assert f({1, 2}) == 3", "not a call with literal values: f({1, 2}) == 3"),
    ("assert f({1: 2}) == 3", "not a call with literal"), ("assert f(root) == 3", "not a call with literal"),
    ("assert f(1) == 3 and g(2)", "not a call"), ("assert f(1) == 1\nassert g(1) == 1", "not a call"),
    ("assert f(x=1) == 1", "not a call"), ("assert set(f(1)) == set([1])", "not a call"),
    ("for i in range(3):\n    assert f(i) == i", "a program"), ("assert f(1) == ", "not Python"),
    ("x = 1", "no tests"), ("assert True", "no tests"), ("assert f(1) == 1e999", "not a call"),
    ("assert f(b'a') == 1", "not a call"), ("assert f(1) == 1 / 0", "not a call"), ("assert f(1) > 0", "not a call")])
def test_what_a_call_test_cannot_say_is_left_out_with_its_reason(program, why):
    with pytest.raises(UserError, match="its tests? .*|it has no tests") as error:
        call_tests(program)
    assert why in str(error.value)


def test_closeness_and_arithmetic():
    """The judge compares floats with a tolerance in any case."""
    name, tests = call_tests("import math\nassert abs(f(2.0) - 1.5) < 1e-6\nassert math.isclose(f(1), 3)\n"
                             "assert f(3 * 5, -2) == 2 - 7\nassert f('a' 'b') == ('x', [None])")
    assert name == "f" and [(t["input"], t["expected"]) for t in tests] == [
        ("[2.0]", "1.5"), ("[1]", "3.0"), ("[15, -2]", "-5"), ('["ab"]', '["x", [null]]')]


def test_rows_that_cannot_become_problems_are_counted(tmp_path, capsys):
    sets = {**MBPP, "task_id": 13, "test_list": ["assert f({1}) == 1"]}
    boxless = {**MATH, "solution": "It is 3."}
    path = lines(tmp_path / "a.jsonl", [MBPP, sets, MBPP, GSM8K, boxless])
    assert len(read_problems(path)) == 2
    assert "a.jsonl: 2 of 4 problems left out, the first in row 2: its test is not a call" in capsys.readouterr().err
    with pytest.raises(UserError, match="no problems in it"):
        read_problems(lines(tmp_path / "b.jsonl", [sets]))


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
