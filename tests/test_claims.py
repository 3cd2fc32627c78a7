"""paper/claims.py and its runner: a table that can be run, a runner that goes on, intervals and verdicts by hand."""
import importlib
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "paper"))
import experiments  # noqa: E402
from claims import CLAIMS, Claim, Contrast, Run, evaluated, pretrained  # noqa: E402
from experiments import interval, judged, needed  # noqa: E402

import configurator  # noqa: E402
from configurator import UserError  # noqa: E402


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.key)
def test_every_command_of_the_table_is_understood_and_every_contrast_can_be_measured(claim, monkeypatch):
    monkeypatch.setattr(experiments.Place, "__format__", lambda self, spec: str(self))
    monkeypatch.chdir(ROOT)
    for run, seed in needed(claim):
        words = experiments.command(run, seed)
        if words[0] == "-c":
            compile(words[1], "command", "exec")
            continue
        module, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0][:-3].replace("/", "."), words[1:])
        cfg = configurator.load(importlib.import_module(module.removeprefix("paper.")).Config, rest)
        assert str(seed) in str(cfg.out), "each run has its own folder"
        assert getattr(cfg, "seed", seed) in (seed, 7), "evaluations ask alike, everything else has the claim's seed"
    for c in claim.contrasts:
        assert c.metric in experiments.METRICS
        for operand in (c.better, c.worse):
            for name in operand.replace(" | ", " - ").split(" - "):
                arm, _, measure = name.rpartition(".")
                assert measure in claim.arms[arm], name


def test_keys_are_unique_and_runs_are_shared():
    assert len({c.key for c in CLAIMS}) == len(CLAIMS)
    assert experiments.folder(pretrained(), 11) == experiments.folder(pretrained(), 11)
    assert experiments.folder(pretrained(), 11) != experiments.folder(pretrained(), 12)
    one, other = evaluated(pretrained()), evaluated(pretrained(flags="--weight_decay=0.2"))
    assert experiments.folder(one, 11) != experiments.folder(other, 11), "what a run needs is part of what it is"


# ---- intervals and verdicts -----------------------------------------------------------------------------------------

def test_interval_of_single_numbers_is_students_t_by_hand():
    """1, 2, 3: mean 2, sd 1, t 4.303: 2 -+ 4.303 / sqrt(3)."""
    low, high = interval([np.array([x]) for x in (1.0, 2.0, 3.0)])
    assert (low, high) == pytest.approx((2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5))
    assert interval([np.array([1.0]), np.array([2.0])]) == (-np.inf, np.inf)


def test_bootstrap_holds_the_spread_of_seeds_and_of_problems():
    """Variance of the mean: of problems s^2 / (n p), of seeds at most that of n draws from the seeds' means."""
    rng = np.random.default_rng(1)
    alike = [rng.normal(0, 10, 400) for _ in range(3)]
    low, high = interval(alike)
    means = np.array([d.mean() for d in alike])
    want = 2 * 1.96 * np.sqrt(np.var(means) / 3 + 100 / 1200)
    assert high - low == pytest.approx(want, rel=0.12)
    low, high = interval([d - d.mean() + shift for d, shift in zip(alike, (-6, 0, 6), strict=True)])
    assert high - low > 12 * 0.6, "seeds that differ make it wide"
    assert interval([np.full(5, 3.0)] * 3) == (3.0, 3.0)


@pytest.mark.parametrize("differences, sign, verdict", [
    ([4.0, 5.0, 6.0], 1, "agrees"),
    ([4.0, 5.0, 6.0], -1, "disagrees"),
    ([-4.0, -5.0, -6.0], -1, "agrees"),
    ([-4.0, -5.0, -6.0], 1, "disagrees"),
    ([0.0, 0.0, 0.0], 1, "cannot be told at this size"),
    ([9.0, 9.0, -0.1], 1, "cannot be told at this size"),
    ([4.0, 5.0], 1, "not all seeds are done"),
])
def test_verdicts(monkeypatch, differences, sign, verdict):
    """Problems without spread: the bootstrap's interval is that of the seeds, and every seed has to agree."""
    monkeypatch.setattr(experiments, "value", lambda claim, side, metric, seed:
                        {"p": differences[seed], "q": differences[seed]} if side == "a" else {"p": 0.0, "q": 0.0})
    claim = Claim("k", "1", "says", {}, [], seeds=(0, 1, 2))
    found = judged(claim, Contrast("c", "a", "b", "score", sign), list(range(len(differences))))
    assert found["verdict"] == verdict and found["per_seed"] == differences


# ---- the runner -----------------------------------------------------------------------------------------------------

@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "OUT", tmp_path / "out")
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiments, "git", lambda *words: "" if words[0] == "status" else "abc")
    return tmp_path


COUNT = '-c "open(\'{out}/n\', \'a\').write(\'x\')'


def test_runs_are_done_once_in_order_and_a_failed_one_is_tried_again(place, capsys):
    first = Run("first", COUNT + '"')
    fails = Run("fails", COUNT + "; import os; os.path.exists('{out}/mended') or exit('no luck')\"", {"a": first})
    last = Run("last", COUNT + "; open('{f}/n')\"", {"f": fails})
    other = Run("other", COUNT + '"', {"a": first})
    todo = [(run, seed) for seed in (1, 2) for run in (first, fails, last, other)]
    assert experiments.run_all(todo, 2, lambda done: None) == 2
    assert "no luck" in capsys.readouterr().out
    assert all(experiments.done(run, 1) == (run in (first, other)) for run in (first, fails, last, other))
    for seed in (1, 2):
        (experiments.folder(fails, seed) / "mended").touch()
    assert experiments.run_all(todo, 2, lambda done: None) == 0
    times = {run.name: (experiments.folder(run, 1) / "n").read_text() for run in (first, fails, last, other)}
    assert times == {"first": "x", "fails": "xx", "last": "x", "other": "x"}
    note = json.loads((experiments.folder(last, 1) / "done.json").read_text())
    assert note["commit"] == "abc" and shlex.split(note["command"])[0] == "python" and note["cpu_seconds"] > 0


def test_a_claim_is_registered_before_it_runs_and_cannot_change_afterwards(place, monkeypatch):
    arms = {"a": {"test": Run("r", COUNT + '"')}}
    claim = Claim("k", "1", "says", arms, [Contrast("c", "a.test", "a.test", "score")])
    experiments.register(claim)
    experiments.register(claim)
    with pytest.raises(UserError, match="give the changed one a new key"):
        experiments.register(replace(claim, seeds=(11, 12)))
    monkeypatch.setattr(experiments, "git", lambda *words: " M paper/claims.py")
    with pytest.raises(UserError, match="not committed"):
        experiments.register(replace(claim, key="other"))


def test_checkpoint_at_a_number_of_answers(tmp_path):
    """8 answers a group: 40, 120, 240 after three steps; steps 1 and 3 have a checkpoint."""
    rows = [{"step": step, "groups_launched": n} for step, n in ((1, 5), (2, 10), (3, 15))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (1, 3):
        (tmp_path / f"step_{step:08d}").mkdir()
    at = experiments.Place(tmp_path)
    assert f"{at:answers=239}".endswith("step_00000001") and f"{at:answers=240}".endswith("step_00000003")
    with pytest.raises(UserError, match="no checkpoint"):
        format(at, "answers=39")


def test_scores_leave_out_problems_that_were_looked_at(tmp_path):
    seen = sorted(experiments.looked_at())
    assert len(seen) == 600
    problems = [{"id": seen[0], "kind": "maths"}, {"id": "new1", "kind": "maths"}, {"id": "new2", "kind": "code"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (tmp_path / "eval.json").write_text(json.dumps({"config": {"problems": str(tmp_path / "p.jsonl")}}))
    rows = [{"id": p["id"], "answers": [{"passed": i > k} for i in range(4)]} for k, p in enumerate(problems)]
    (tmp_path / "eval_answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert experiments.solved(tmp_path) == {"new1": 50.0, "new2": 25.0}
    assert experiments.solved(tmp_path, "code") == {"new2": 25.0}


# ---- the page -------------------------------------------------------------------------------------------------------

def test_the_page_says_what_the_files_say(tmp_path):
    """A claim that is judged, one that is only registered, and a transcript: in both pages, and nothing is loaded."""
    import claims_page
    judged_claim, registered = CLAIMS[0], CLAIMS[1]
    rows = [vars(c) | {"per_seed": [4.0, 5.0, 6.0], "mean": 5.0, "low": 3.0, "high": 7.0, "verdict": "agrees"}
            for c in judged_claim.contrasts]
    found = {"seeds_done": [11, 12, 13], "values": {"RL": {"test score": [60.0, 61.0, 65.0]}}, "contrasts": rows,
             "verdict": "agrees", "hours": 1.5, "commits": ["abc"], "machine": "x86", "remark": "By a <wide> margin."}
    for claim, more in ((judged_claim, found), (registered, {})):
        note = {"registered": {"commit": "c0ffee", "entry": experiments.entry(claim)}} | more
        (tmp_path / f"{claim.key}.json").write_text(json.dumps(note))
    answer = {"step": 30, "reward": 0.5, "verdicts": ["AC", "WA"], "finish": "stop", "tokens": [["a<b", 0.25, 2]]}
    test = {"kind": "call", "input": "[[1]]", "expected": "1", "difficulty": 2}
    problem = {"kind": "code", "question": "q?", "solution": "s", "tests": [test, test], "answers": [answer]}
    (tmp_path / "transcripts.json").write_text(json.dumps(
        {"run": "out/rl", "scheme": "strict", "temperature": 1.0, "commit": "abc", "problems": [problem]}))
    claims_page.main(claims_page.Config(results=str(tmp_path)))
    text, page = ((tmp_path / name).read_text() for name in ("README.md", "claims.html"))
    for out in (text, page):
        assert "+5.0 points" in out and "[+3.0, +7.0]" in out and "3 of 3 seeds on the report" in out
        assert "62.0  (60.0, 61.0, 65.0)" in out and "c0ffee" in out and registered.key in out
    assert "By a &lt;wide&gt; margin." in page and 'class="t l2" style="--p:0.25"' in page and "a&lt;b" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", ""), "it opens offline"
