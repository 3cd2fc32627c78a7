"""demo.py's way of running steps: ranks, failures, skipping what is done. The recipe itself is `make demo`."""
import json
import shlex

import pytest

import demo
from configurator import UserError
from data.jsonl import write_jsonl
from data.problems import Problem, write_problems


@pytest.fixture
def place(tmp_path, monkeypatch):
    """out/tiny in a folder of its own. -> (clock, out)."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(demo, "OUT", tmp_path)
    return demo.Clock(tmp_path), tmp_path


def step(name, program, product=""):
    """A step that runs a line of Python."""
    return demo.Step(name, shlex.join(["-c", program]), product)


def test_two_ranks_know_each_other(place):
    clock, out = place
    program = ("import os, sys; from pathlib import Path; r = os.environ['RANK']; "
               f"Path({str(out)!r}, 'rank' + r).write_text(' '.join(os.environ[k] for k in "
               "('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'OMP_NUM_THREADS')))")
    demo.run(clock, out, step("pretrain", program), ranks=2)
    zero, one = ((out / f"rank{r}").read_text().split() for r in (0, 1))
    assert zero[:3] == ["2", "0", "127.0.0.1"] and one[:3] == ["2", "1", "127.0.0.1"]
    assert zero[3] == one[3] and zero[4] == "1"
    assert "pretrain" in json.loads((out / "seconds.json").read_text())


def test_one_failed_rank_ends_the_other_and_is_named(place):
    clock, out = place
    program = ("import os, time; r = os.environ['RANK']\n"
               "if r == '1': raise SystemExit('no shards')\n"
               "time.sleep(600)")
    with pytest.raises(UserError, match=r"(?s)step .pretrain. .* ended with status 1, see .*logs/pretrain.log"):
        demo.run(clock, out, step("pretrain", program), ranks=2)
    assert "no shards" in (out / "logs/rank1.log").read_text()


def test_an_abort_at_the_very_end_of_rank_1_is_forgiven(place):
    clock, out = place
    demo.run(clock, out, step("a", "import os; os.environ['RANK'] == '1' and os.abort()"), ranks=2)
    with pytest.raises(UserError, match="ended with status -6"):
        demo.run(clock, out, step("b", "import os; os.environ['RANK'] == '0' and os.abort()"), ranks=2)


def test_a_step_that_is_done_is_not_done_again(place):
    clock, out = place
    (out / "product").write_text("")
    done = step("done", "raise SystemExit(1)", "product")
    demo.run(clock, out, done)
    demo.side_by_side(clock, out, [[done]])
    assert not (out / "seconds.json").exists()


def test_a_failed_branch_names_its_log(place):
    clock, out = place
    with pytest.raises(UserError, match=r"step 'bad' .*logs/bad.log"):
        demo.side_by_side(clock, out, [[step("good", "pass")], [step("bad", "raise SystemExit('broken')")]])
    assert "broken" in (out / "logs/bad.log").read_text()


def test_total_counts_the_longer_of_two_branches():
    assert demo.total_seconds({"prepare": 1.0, "pretrain": 10.0, "eval_base": 5.0, "rate_base": 2.0, "sft": 3.0,
                               "rl": 20.0, "rl_zero": 25.0, "eval_rl": 4.0}) == 1 + 10 + 7 + 25


def test_the_closing_screen_shows_one_problem_and_what_to_type_next(tmp_path):
    """A made-up run of two problems: RL answers the second right, the base model wrong; that one is shown."""
    write_problems(tmp_path / "problems/test.jsonl",
                   [Problem(f"0{i}", "maths", f"What is {i}+1?", answer=f"{i + 1}") for i in range(2)])
    for name in demo.MODELS:
        rows = [{"id": f"0{i}", "question": f"What is {i}+1?", "answers": [
                    {"text": f"{name} says {i}", "passed": name == "rl" and i == 1}]} for i in range(2)]
        write_jsonl(tmp_path / name / "eval_answers.jsonl", rows)
    answers = demo.four_answers(tmp_path)
    assert answers["question"] == "What is 1+1?" and answers["rl"] == {"text": "rl says 1", "passed": True}
    row = {"avg": 0.25, "low": 0.2, "high": 0.3, "n": 2, "samples": 8, "pass@1": 0.25}
    text = demo.screen({"models": {k: {"maths": row, "code": row} for k in demo.MODELS}, "answers": answers,
                        "mtp": {"acceptance": [0.9], "teacher_forced": [0.9], "tokens_per_forward": 1.9,
                                "speedup": 1.1, "equal_text": True},
                        "seconds": {"rl": 3.0, "total": 60.0}, "peak_mb": 1, "heldout_overlap": 0}, tmp_path)
    assert "What is 1+1?" in text and "right rl says 1" in text and "wrong base says 1" in text
    assert text.count(".venv/bin/python") == 3


def test_readme_shows_the_recipe_that_the_demo_runs():
    """One list of commands: README's block is RECIPE, in order, as a person types it."""
    readme = (demo.ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("<!-- recipe:begin -->")[1].split("<!-- recipe:end -->")[0]
    shown = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").split("\n")
             if line.startswith("python ")]
    assert shown == [["python", *demo.words_of(s)] for _, branches in demo.RECIPE for b in branches for s in b]
