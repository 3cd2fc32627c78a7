"""demo.py's way of running steps: ranks, failures, skipping what is done. The recipe itself is `make demo`."""
import json

import pytest

import demo


@pytest.fixture
def place(tmp_path, monkeypatch):
    """out/tiny in a folder of its own. -> (clock, out)."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(demo, "OUT", tmp_path)
    return demo.Clock(tmp_path), tmp_path


def test_two_ranks_know_each_other(place):
    clock, out = place
    program = ("import os, sys; from pathlib import Path; r = os.environ['RANK']; "
               f"Path({str(out)!r}, 'rank' + r).write_text(' '.join(os.environ[k] for k in "
               "('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'OMP_NUM_THREADS')))")
    demo.run(clock, "pretrain", ["-c", program], None, show=False, ranks=2)
    zero, one = ((out / f"rank{r}").read_text().split() for r in (0, 1))
    assert zero[:3] == ["2", "0", "127.0.0.1"] and one[:3] == ["2", "1", "127.0.0.1"]
    assert zero[3] == one[3] and zero[4] == "1"
    assert "pretrain" in json.loads((out / "seconds.json").read_text())


def test_one_failed_rank_ends_the_other_and_is_named(place):
    clock, out = place
    program = ("import os, time; r = os.environ['RANK']\n"
               "if r == '1': raise SystemExit('no shards')\n"
               "time.sleep(600)")
    with pytest.raises(SystemExit, match=r"(?s)step .pretrain. .* ended with status 1, see .*logs/pretrain.log"):
        demo.run(clock, "pretrain", ["-c", program], None, show=False, ranks=2)
    assert "no shards" in (out / "logs/rank1.log").read_text()


def test_an_abort_at_the_very_end_of_rank_1_is_forgiven(place):
    clock, _ = place
    demo.run(clock, "a", ["-c", "import os; os.environ['RANK'] == '1' and os.abort()"], None, show=False, ranks=2)
    with pytest.raises(SystemExit, match="ended with status -6"):
        demo.run(clock, "b", ["-c", "import os; os.environ['RANK'] == '0' and os.abort()"], None, show=False, ranks=2)


def test_a_step_that_is_done_is_not_done_again(place):
    clock, out = place
    (out / "product").write_text("")
    demo.run(clock, "done", ["-c", "raise SystemExit(1)"], out / "product", show=False)
    demo.side_by_side(clock, out, [[("done", ["-c", "raise SystemExit(1)"], out / "product")]])
    assert not (out / "seconds.json").exists()


def test_a_failed_branch_names_its_log(place):
    clock, out = place
    with pytest.raises(SystemExit, match=r"step 'bad' .*logs/bad.log"):
        demo.side_by_side(clock, out, [[("good", ["-c", "pass"], None)],
                                       [("bad", ["-c", "raise SystemExit('broken')"], None)]])
    assert "broken" in (out / "logs/bad.log").read_text()


def test_total_counts_the_longer_of_two_branches():
    assert demo.total_seconds({"prepare": 1.0, "pretrain": 10.0, "eval_base": 5.0, "rate_base": 2.0, "sft": 3.0,
                               "rl": 20.0, "rl_zero": 25.0, "eval_rl": 4.0}) == 1 + 10 + 7 + 25
