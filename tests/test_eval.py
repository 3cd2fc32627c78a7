"""Prompts, grading, estimators, and the RL data filters."""
import itertools
import json
import random
from dataclasses import dataclass

import numpy as np
import pytest

import eval as evaluation
from configurator import UserError, load
from data import rl_problems
from data.problems import Problem, Test, prompt_ids, read_problems, stop_ids, write_problems
from eval import bootstrap, pass_at_k, summary
from judge import Judge
from reward import Grader
from tokenizer import Tokenizer

TOK = Tokenizer.load("tiny")
MATHS = Problem("a1", "maths", "What is 3+4?", answer="7", reasoning="3+4=7", solution="\\boxed{7}")
CODE = Problem("b2", "code", "Given a list xs: return the sum.",
               solution="```python\ndef f(xs):\n    return sum(xs)\n```",
               tests=(Test("call", "[[1, 2]]", "3", 0), Test("call", "[[]]", "0", 1), Test("call", "[[-1]]", "-1", 2)))


@dataclass
class Answer:
    tokens: list
    finish: str = "stop"


@dataclass
class Task:
    prompt: int


def test_plain_and_chat_prompts():
    assert TOK.decode(prompt_ids(TOK, MATHS, chat=False)) == "Problem: What is 3+4?\nSolution:"
    chat = prompt_ids(TOK, MATHS, chat=True)
    full, mask = TOK.chat([{"role": "user", "content": MATHS.question}, {"role": "assistant", "content": "x"}])
    assert full[:len(chat)] == chat and not any(mask[:len(chat)]), "the RL prompt is the SFT prefix"


def test_a_base_model_stops_at_the_next_problem():
    ends = stop_ids(TOK, chat=False)
    following = TOK.encode(" \\boxed{7}\n\nProblem: What is 1+1?")
    assert any(t in ends for t in following)
    assert set(stop_ids(TOK, chat=True)) == {TOK.eos_id, TOK.im_end_id}


@pytest.mark.parametrize("n, c, k", [(n, c, k) for n in range(1, 6) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_by_brute_force(n, c, k):
    outcomes = [i < c for i in range(n)]
    draws = list(itertools.combinations(outcomes, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_bootstrap_covers_and_shrinks():
    rng = random.Random(0)
    mean, low, high = bootstrap([float(rng.random() < 0.3) for _ in range(400)])
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 * (0.21 / 400) ** 0.5, rel=0.2)
    assert bootstrap([1.0] * 10) == (1.0, 1.0, 1.0)


def test_grader_pays_right_answers_and_nothing_else():
    cases = [
        (0, "<think>\n3+4=7\n</think>\n\n\\boxed{7}", 1.0), (0, "\\boxed{8}", 0.0), (0, "7", 0.0),
        (0, "\\boxed{3+4}", 0.0),                                            # restating the question is no answer
        (1, CODE.solution, 1.0), (1, "no code here", 0.0),
        (1, "```python\ndef f(xs):\n    return 3\n```", 1 / 3),              # soft: one of three levels
        (1, "```python\ndef f(xs):\n    return xs[0] +\n```", 0.0),
    ]
    with Judge(workers=1, quiet=True) as judge:
        grader = Grader([MATHS, CODE], TOK, judge, "soft")
        for i, (prompt, text, _) in enumerate(cases):
            grader.submit(("k", i), Task(prompt), Answer(TOK.encode(text) + [TOK.im_end_id]))
        grader.submit(("k", 99), Task(0), Answer(TOK.encode("\\boxed{7}"), finish="length"))
        got = {}
        while len(got) < len(cases) + 1:
            got |= {key[1]: (reward, info) for key, reward, info in grader.poll()}
        assert grader.maths.empty() and not (grader.code or grader.ready), "nothing is left over"
        grader.close()
    for i, (_, text, want) in enumerate(cases):
        assert got[i][0] == pytest.approx(want), text
    assert got[99] == (0.0, {"passed": False, "verdicts": ["truncated"]})


# ---- streaming and resuming -----------------------------------------------------------------------------------------

@pytest.fixture
def asked(tmp_path):
    """A random model and thirty problems; -> run(name, *flags) -> (result or None, bytes of the answers or None)."""
    from scale_worker import write_base
    write_base(tmp_path)

    def run(name, *flags):
        result = evaluation.main(load(evaluation.Config, [
            f"--ckpt={tmp_path}/base", f"--problems={tmp_path}/problems.jsonl", "--samples=2", "--max_new_tokens=12",
            "--device=cpu", f"--out={tmp_path}/{name}.json", *flags]))
        return result, (tmp_path / f"{name}_answers.jsonl").read_bytes()
    run.folder = tmp_path
    return run


def stop_after(monkeypatch, n):
    """SIGTERM comes when n problems are answered."""
    add, count = evaluation.Answers.add, iter(range(1, 1000))
    asked = [False]

    def counted(self, key, row):
        add(self, key, row)
        asked[0] = next(count) >= n
    monkeypatch.setattr(evaluation.Answers, "add", counted)
    monkeypatch.setattr(evaluation.distributed, "stop_here", lambda: asked[0])


def test_answers_depend_on_neither_slots_nor_drafts_and_come_in_the_order_of_the_problems(asked):
    (result, want), (_, narrow), (_, drafted) = asked("a"), asked("b", "--slots=3"), asked("c", "--n_draft=2")
    assert narrow == want == drafted
    ids = [json.loads(line)["id"] for line in want.splitlines()]
    assert ids == [p.id for p in read_problems(asked.folder / "problems.jsonl")]
    assert result["problems"]["maths"]["n"] == 30
    assert sorted(p.name for p in asked.folder.glob("a*")) == ["a.json", "a_answers.jsonl"]


def test_a_stopped_evaluation_goes_on_where_it_was(asked, monkeypatch):
    """SIGTERM after some problems, a power cut within a row: the same file as without, and nothing is asked twice."""
    want = asked("whole")
    with monkeypatch.context() as m:
        stop_after(m, 4)
        with pytest.raises(UserError, match=r"stopped \(SIGTERM\) after [1-9]\d* of 30 problems"):
            asked("cut", "--slots=4")
    part = asked.folder / "cut_answers.jsonl.part0"
    lines = part.read_bytes().splitlines(keepends=True)
    assert 4 <= len(lines) < 20
    part.write_bytes(b"".join(lines) + lines[0][:len(lines[0]) // 2])        # torn
    with pytest.raises(UserError, match="samples = 2, now it is 3.*another --out"):
        asked("cut", "--samples=3")
    with pytest.raises(UserError, match="seed = 7, now it is 8"):
        asked("cut", "--seed=8")
    first, added = len(lines), []
    add = evaluation.Answers.add
    monkeypatch.setattr(evaluation.Answers, "add", lambda self, key, row: (added.append(key), add(self, key, row)))
    result, answers = asked("cut", "--slots=7")                              # slots change no answer
    assert answers == want[1] and result["problems"] == want[0]["problems"]
    assert len(added) == 30 - first and not part.exists()


def test_answers_without_their_head_are_not_mixed_in(asked):
    (asked.folder / "x_answers.jsonl.part0").write_text("{}\n")
    with pytest.raises(UserError, match="part0 is there without"):
        asked("x")
    (asked.folder / "x_answers.jsonl.part0").unlink()
    with pytest.MonkeyPatch.context() as m:
        stop_after(m, 4)
        with pytest.raises(UserError, match="stopped"):
            asked("x", "--slots=4")
    (asked.folder / "x_answers.jsonl.part0").write_text('{"id": "a", "answers": []}\n')
    with pytest.raises(UserError, match="part0: its rows were written by another version"):
        asked("x")


def test_prompts_that_are_too_long_are_named_and_left_out(asked, capsys):
    """One of thirty is 3 %: named, counted, left out. Three of 32 are over 5 %: refused, before anything is written."""
    path = asked.folder / "problems.jsonl"
    problems = read_problems(path)
    long = [Problem(f"long{i}", "maths", "1+" * 120 + "1?", answer="1") for i in range(3)]
    write_problems(path, [*problems[:7], long[0], *problems[7:]])
    result, answers = asked("one")
    out = capsys.readouterr().out
    assert "1 of 31 prompts are longer than 116 tokens (max_new_tokens 12 of max_seq_len = 128): long0 (" in out
    assert result["left_out"] == 1 and result["problems"]["maths"]["n"] == 30 and b"long0" not in answers
    write_problems(path, [*problems[:29], *long])
    with pytest.raises(UserError, match="3 of 32 prompts .*long0.*long1.*long2.*at most 5%"):
        asked("many")
    assert not list(asked.folder.glob("many*"))


def test_tokens_per_forward_is_what_the_engine_counts(asked, monkeypatch):
    """
    tokens / (tokens - accepted) is too much: where the end token was an accepted draft, its round made one token fewer.
    One sequence at a time, so the forwards are the engine's steps.
    """
    runs, generate = [], evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda *args: runs.append((args[0], generate(*args))) or runs[-1][1])
    found = asked("m", "--tasks=['problems','mtp']")[0]["mtp"]
    engine, samples = runs[1]
    assert engine.n_draft == 2 and found["tokens_per_forward"] == sum(len(s.tokens) for s in samples) / engine.steps
    a, b = found["online"]
    assert found["tokens_per_forward"] <= 1 + a + a * b


def test_bootstrap_in_pieces_is_bootstrap():
    """A million problems at a time do not fit; the random numbers are the same."""
    x = np.random.default_rng(0).random(3000)
    picks = np.random.Generator(np.random.PCG64(0)).integers(0, 3000, (2000, 3000))
    low, high = np.quantile(x[picks].mean(1), [0.025, 0.975])
    assert bootstrap(list(x)) == (x.mean(), low, high)


def test_summary_by_hand():
    answer = lambda ok: {"passed": ok, "tokens": 10, "finish": "stop"}
    s = summary([[answer(True), answer(False)], [answer(False), answer(False)]], ks=(1, 2))
    assert s["avg"] == 0.25 and s["pass@1"] == 0.25 and s["pass@2"] == 0.5 and s["n"] == 2 and s["truncated"] == 0


def test_problem_files_round_trip_and_name_the_bad_line(tmp_path):
    write_problems(tmp_path / "p.jsonl", [MATHS, CODE])
    assert read_problems(tmp_path / "p.jsonl") == [MATHS, CODE]
    with open(tmp_path / "p.jsonl", "a") as f:
        f.write(json.dumps({"id": "c3", "kind": "code", "question": "q", "solution": "s"}) + "\n")
    with pytest.raises(ValueError, match="p.jsonl:3: .*no tests"):
        read_problems(tmp_path / "p.jsonl")


def test_rl_data_filters_and_levels_by_hand(tmp_path):
    """
    Two models, two answers each. Test pass rates 4/4, 2/4, 1/4 -> levels 0, 1, 2 (k = 3). A maths problem the last
    model always solves goes; one it solves half the time stays.
    """
    easy = Problem("e5", "maths", "q", answer="1")
    write_problems(tmp_path / "all.jsonl", [MATHS, easy, CODE])
    code = lambda *verdicts: {"passed": all(v == "AC" for v in verdicts), "verdicts": list(verdicts)}
    maths = lambda ok: {"passed": ok, "verdicts": ["right" if ok else "wrong"]}
    one = {"a1": [maths(False), maths(False)], "e5": [maths(False), maths(False)],
           "b2": [code("AC", "WA", "WA"), code("AC", "AC", "WA")]}
    two = {"a1": [maths(True), maths(False)], "e5": [maths(True), maths(True)],
           "b2": [code("AC", "AC", "AC"), code("AC", "WA", "WA")]}
    for name, rows in (("one", one), ("two", two)):
        lines = [json.dumps({"id": k, "answers": v}) + "\n" for k, v in rows.items()]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    rl_problems.main(rl_problems.Config(f"{tmp_path}/all.jsonl", f"{tmp_path}/out.jsonl",
                                [f"{tmp_path}/one.jsonl", f"{tmp_path}/two.jsonl"]))
    kept = read_problems(tmp_path / "out.jsonl")
    assert [p.id for p in kept] == ["a1", "b2"]
    assert [t.difficulty for t in kept[1].tests] == [0, 1, 2]
