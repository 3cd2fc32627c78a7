"""
FSDP2 on gloo and CPU: the number of processes, the way parameters are cut and how often gradients are reduced
never change the result (issue of every trainer: accumulation and clipping that depend on the number of
ranks).

All runs train the same 2-layer model with two MTP layers on the same 8 rows of packed documents with uneven
masks.
"""
import json
import re
import time

import pytest
import torch
from checkpoints import load_model
from fork_ranks import run_ranks, start
from scale_worker import main as train
from scale_worker import (
    run_eval,
    train_pretrain,
    train_rl,
    train_rl_updates,
    train_sft,
    validate,
    wait_in_vain,
    write_base,
    write_data,
)

import checkpoint
import distributed
from metrics import read_rows


def read(path):
    return json.loads(path.read_text())


def same(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    """Losses of trunk and MTP layers and the gradient norm, step by step; b may start later."""
    tail = a["seen"][-len(b["seen"]):]
    assert b["seen"] and len(tail) == len(b["seen"])
    for step, (x, y) in enumerate(zip(tail, b["seen"], strict=True)):
        assert y == pytest.approx(x, rel=tolerance, abs=tolerance), f"step {step}"
    # of a plain replica, decoded without collectives
    assert b["logits"] == pytest.approx(a["logits"], rel=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """1 process x 8 micro-batches, 20 steps: what the others must equal."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder / "out.json", steps=20)
    return read(folder / "out.json")


def test_two_ranks_with_uneven_shares(alone, tmp_path):
    """
    2 x 4 micro-batches, but one rank has 5 rows and the other 3; a validation forward after every step. Written in the
    background at step 10, resumed on one process.
    """
    run = str(tmp_path / "run")
    run_ranks(2, tmp_path, train, str(tmp_path / "two.json"), uneven=1, validate=1, run=run, save_at=9, background=1)
    same(alone, read(tmp_path / "two.json"))
    assert (tmp_path / "run/step_00000010/optimizer/.metadata").is_file()          # DCP
    train(tmp_path / "one.json", run=run, resume=1)
    same(alone, read(tmp_path / "one.json"))


def test_two_plain_copies(alone, tmp_path):
    """shard_ranks = 1 on a CPU: no FSDP, gradients averaged after the last micro-batch; saved on 2, loaded on 1."""
    run = str(tmp_path / "run")
    run_ranks(2, tmp_path, train, str(tmp_path / "two.json"), uneven=1, validate=1, shard_ranks=1, run=run, save_at=9)
    same(alone, read(tmp_path / "two.json"))
    assert not (tmp_path / "run/step_00000010/optimizer").exists()
    train(tmp_path / "one.json", run=run, resume=1)
    same(alone, read(tmp_path / "one.json"))


def test_a_full_disk_ends_all_ranks(tmp_path):
    """Rank 0 sees that a checkpoint will not fit; both end with its line, nothing is written."""
    run = tmp_path / "run"
    codes = run_ranks(2, tmp_path, train, str(tmp_path / "out.json"), run=str(run), save_at=1, full_disk=1)
    assert codes == [1, 1] and not list(run.glob("step_*"))
    for rank in range(2):
        log = (tmp_path / f"rank{rank}.log").read_text()
        assert log.count("disk full: a checkpoint in") == 1 and "Traceback" not in log


@pytest.mark.slow
def test_four_ranks_hybrid_then_saved_and_loaded_on_two_and_one(alone, tmp_path):
    """
    4 x 2 on a 2 x 2 mesh with selective recomputation, written in the background at step 10, resumed on 2 and
    1.
    """
    run = str(tmp_path / "run")
    run_ranks(
        4,
        tmp_path,
        train,
        str(tmp_path / "four.json"),
        shard_ranks=2,
        checkpointing="selective",
        run=run,
        save_at=9,
        background=1,
    )
    same(alone, read(tmp_path / "four.json"))
    assert (tmp_path / "run/step_00000010/optimizer/.metadata").is_file()          # DCP
    assert len(list((tmp_path / "run/step_00000010").glob("model-*.safetensors"))) == 4
    run_ranks(2, tmp_path, train, str(tmp_path / "two.json"), run=run, resume=1, reduce_each=1)
    same(alone, read(tmp_path / "two.json"))
    train(tmp_path / "one.json", run=run, resume=1)
    same(alone, read(tmp_path / "one.json"))


def test_saved_on_one_loads_on_two(alone, tmp_path):
    run = str(tmp_path / "run")
    train(tmp_path / "one.json", steps=10, run=run, save_at=9)
    run_ranks(2, tmp_path, train, str(tmp_path / "two.json"), run=run, resume=1, checkpointing="full")
    same(alone, read(tmp_path / "two.json"))


def test_one_gpu_is_a_mesh_of_one(alone, tmp_path):
    """A single GPU's path on the CPU: FSDP2 over one rank, saved, loaded without it; then bf16 compute."""
    run = str(tmp_path / "run")
    train(tmp_path / "one.json", one_gpu=1, run=run, save_at=9, background=1)
    same(alone, read(tmp_path / "one.json"))
    train(tmp_path / "plain.json", run=run, resume=1)
    same(alone, read(tmp_path / "plain.json"))
    train(tmp_path / "again.json", run=run, resume=1, one_gpu=1)
    same(alone, read(tmp_path / "again.json"))
    train(tmp_path / "bf16.json", one_gpu=2)
    for x, y in zip(alone["seen"], read(tmp_path / "bf16.json")["seen"], strict=True):
        assert y == pytest.approx(x, rel=0.03) and y != x


def test_frozen_trunk(tmp_path):
    """
    MTP fine-tuning: only the second MTP layer trains; its clipped norm and the frozen weights agree over
    ranks.
    """
    train(tmp_path / "one.json", steps=6, frozen=1)
    run_ranks(2, tmp_path, train, str(tmp_path / "two.json"), steps=6, frozen=1)
    one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    same(one, two)
    for name, norm in one["weights"].items():
        assert two["weights"][name] == pytest.approx(norm, rel=1e-3, abs=1e-7)
        if name.startswith("mtp_layers.0") or name.startswith("layers."):
            assert two["weights"][name] == pytest.approx(norm, rel=1e-9)


def test_tied_embeddings(tmp_path):
    """One parameter of two uses, sharded over two ranks; written by both, resumed on one."""
    run = str(tmp_path / "run")
    train(tmp_path / "one.json", steps=6, tied=1)
    run_ranks(2, tmp_path, train, str(tmp_path / "two.json"), steps=6, tied=1, run=run, save_at=2)
    train(tmp_path / "again.json", steps=6, tied=1, run=run, resume=1)
    one, two, again = (read(tmp_path / f"{name}.json") for name in ("one", "two", "again"))
    same(one, two)
    same(one, again)
    assert "lm_head.weight" not in one["weights"] and not any(name.endswith("bias") for name in one["weights"])
    for name, norm in one["weights"].items():
        assert two["weights"][name] == pytest.approx(norm, rel=1e-4), name


def test_one_bad_rank_ends_all(tmp_path):
    """A rank without rows ends every rank with one line, no rank hangs in a collective."""
    codes = run_ranks(2, tmp_path, train, str(tmp_path / "out.json"), starve=1)
    assert codes == [1, 1]
    assert re.search(r"error: a rank has no row", (tmp_path / "rank1.log").read_text())


# ---- the scripts themselves --------------------------------------------------------------------------------

def losses_of(folder):
    rows = [r for _, r in read_rows(folder / "metrics.jsonl") if "loss" in r]
    return [[r["loss"], *r["mtp_loss"], r["grad_norm"]] for r in rows]


@pytest.mark.parametrize("worlds", [(2,), pytest.param((2, 4), marks=pytest.mark.slow)], ids=str)
def test_pretrain_and_sft_do_not_depend_on_the_number_of_ranks(tmp_path, worlds):
    """
    pretrain.py through two stages (batch warm-up: 5, 7, 8 rows) and the MTP stage, then sft.py from its
    result. Several ranks switch activation checkpointing between the stages, under FSDP.
    """
    for world in (1, *worlds):
        folder = tmp_path / f"world{world}"
        folder.mkdir()
        how = {} if world == 1 else {"recompute": ("full", "none", "selective")}
        codes = run_ranks(world, folder, train_pretrain, str(folder), **how)
        assert set(codes) <= {0, -6}, (folder / "rank0.log").read_text()
    one = losses_of(tmp_path / "world1/base")
    assert len(one) >= 20 and len(one[-1]) == 1 + 3 + 1              # three MTP layers at the end
    for world in worlds:
        many = losses_of(tmp_path / f"world{world}/base")
        assert len(many) == len(one)
        for x, y in zip(one, many, strict=True):
            assert y == pytest.approx(x, rel=1e-5, abs=1e-5)
    for world in (1, *worlds):
        folder = tmp_path / f"world{world}"
        codes = run_ranks(world, folder, train_sft, str(folder), str(tmp_path / "world1/base"))
        assert set(codes) <= {0, -6}, (folder / "rank0.log").read_text()
    for world in worlds:
        for x, y in zip(losses_of(tmp_path / "world1/sft"), losses_of(tmp_path / f"world{world}/sft"), strict=True):
            assert y == pytest.approx(x, rel=1e-5, abs=1e-5)


def test_validation_does_not_depend_on_the_number_of_ranks(tmp_path):
    """10 tokens are one row of 64, 128 are two: two and three ranks measure these, not a row each (2.408 was 2.864)."""
    write_data(tmp_path / "data")
    validate(tmp_path, tmp_path / "1.json")
    one = read(tmp_path / "1.json")
    assert len({v["web"]["loss"] for v in one}) == 4                 # 10 and 64 tokens are the same row
    for world, shard_ranks in ((2, 1), (3, 0)):
        run_ranks(world, tmp_path, validate, str(tmp_path), str(tmp_path / "n.json"), shard_ranks)
        for x, y in zip(one, read(tmp_path / "n.json"), strict=True):
            for name in ("web", "maths"):                            # sums in fp32, added in another order
                assert y[name]["loss"] == pytest.approx(x[name]["loss"], rel=1e-6)
                assert y[name]["mtp"] == pytest.approx(x[name]["mtp"], rel=1e-6)


@pytest.mark.parametrize("mini_batch, group_size, how", [
    # plain copies; 11, 11 and 10 answers a rank
    pytest.param(8, 4, [(2, {"shard_ranks": 1}), (3, {})], marks=pytest.mark.slow),
    (4, 4, [(2, {})]),                                # two updates per batch, whose ratio is not 1
    # two answers an update: two ranks have nothing to train on
    pytest.param(1, 2, [(4, {})], marks=pytest.mark.slow),
])
def test_rl_updates_do_not_depend_on_the_number_of_ranks(tmp_path, mini_batch, group_size, how):
    """rl.update on the same groups: the answers go from the ranks that generated them to those that train on them."""
    steps, batch = 20 if mini_batch > 1 else 5, dict(mini_batch=mini_batch, group_size=group_size)
    train_rl_updates(tmp_path / "one.json", steps, **batch)
    one = read(tmp_path / "one.json")
    assert (one["seen"][-1][2] != pytest.approx(1.0, abs=1e-6)) == (mini_batch < 8)
    for world, more in how:
        out = tmp_path / f"{world}.json"
        run_ranks(world, tmp_path, train_rl_updates, str(out), steps, **batch, **more)
        many = read(out)
        assert len(many["seen"]) == len(one["seen"]) == steps
        for step, (x, y) in enumerate(zip(one["seen"], many["seen"], strict=True)):
            assert y == pytest.approx(x, rel=1e-5, abs=1e-5), f"{world} ranks, step {step}"


def rl_log(folder):
    """metrics.jsonl without what the clock decides."""
    timed = ("judge_queue_max", "decode_tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed and not k.endswith("_s")}
            for _, r in read_rows(folder / "metrics.jsonl")]


def weights_of(run):
    newest = run / (run / "latest").read_text().strip()
    return newest.name, [p.read_bytes() for p in sorted(newest.glob("model*.safetensors"))]


def trained_groups(run, world):
    """Per iteration [task, rewards, lengths] of the groups in launch order; every rank must have been given all."""
    seen = [[json.loads(line) for line in (run.parent / f"{run.name}.rank{r}.jsonl").read_text().splitlines()]
            for r in range(world)]
    assert all(s == seen[0] for s in seen)
    return seen[0]


def same_rl(one, many):
    """Two runs of train_rl with different numbers of ranks: what must be equal is, the rest is equal to 1e-5."""
    by_ranks = ("engine_steps", "slot_idle", "tokens", "aborted_tokens", "waste",
                "groups_launched", "groups_undone", "groups_aborted")              # speculation, undone
    for x, y in zip(rl_log(one), rl_log(many), strict=True):
        for name in x.keys() - by_ranks:
            exact = name in ("reward_launched", "reward_trained", "verdicts", "truncated", "length_mean", "length_p95",
                             "unparsable",
                             "pool_size", "pool_draws", "valid", "all0", "all1", "trained_tokens", "epoch", "capped")
            assert y[name] == (x[name] if exact else pytest.approx(x[name], rel=1e-5, abs=1e-5)), (name, x["step"])
    ends = [run / (run / "latest").read_text().strip() for run in (one, many)]
    a, b = (checkpoint.read_state(end)["scheduler"] for end in ends)
    assert a == b and a["step"] == 4
    a, b = (load_model(end)[1] for end in ends)
    for name, w in a.items():           # a mean, 1/100 of a step: Adam makes much of a gradient that is rounding
        assert (b[name] - w).pow(2).mean().sqrt() < 1e-7, name


@pytest.mark.parametrize("staleness", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_rl_does_not_depend_on_the_number_of_ranks(tmp_path, staleness):
    """
    rl.py, whole, on 1, 2 and 4 ranks (staleness 1: 1 and 2): the same groups in the same launch order, losses, weights
    and scheduler. With staleness 1 the ranks exchange what they decode beside the collectives of the update. A run
    stopped on two ranks goes on on one. A small lr: sums over ranks round differently, Adam makes the weights differ by
    1e-3 of lr or more, and a draw that lies so close between two tokens would take the other one.
    """
    write_base(tmp_path)
    flags = [f"--max_staleness={staleness}", "--lr=1e-5", f"--mtp_weight={0.0 if staleness else 0.3}"]
    one = tmp_path / "one"
    train_rl(tmp_path, one, *flags)
    want = trained_groups(one, 1)
    assert [len(groups) for groups in want] == [4, 3, 4, 4]            # where the judge failed, on whichever rank
    for world in (2,) if staleness else (2, 4):
        many = tmp_path / f"many{world}"
        codes = run_ranks(world, tmp_path, train_rl, str(tmp_path), str(many), *flags)
        assert set(codes) <= {0, -6}, (tmp_path / "rank0.log").read_text()
        assert trained_groups(many, world) == want
        same_rl(one, many)
    if staleness == 0:
        moved = tmp_path / "moved"
        run_ranks(2, tmp_path, train_rl, str(tmp_path), str(moved), *flags, term_after=2)
        assert weights_of(moved)[0] == "step_00000002"
        train_rl(tmp_path, moved, *flags)
        same_rl(one, moved)


@pytest.mark.parametrize("last_rank, message, codes", [
    ("raises", "rank 1 failed: ArithmeticError('on purpose')", [99, 99]),
    ("exits", "rank 0 lost the other ranks|another rank is gone", [99, 7]),   # the thread's exchange, the trainer's
])
def test_no_rank_waits_for_a_rollout_that_broke(tmp_path, last_rank, message, codes):
    """In iteration 2 the engine of rank 1 raises, and both ranks say so; or its process is gone, and rank 0 says so."""
    write_base(tmp_path)
    processes = start(2, tmp_path, train_rl, str(tmp_path), str(tmp_path / "run"), last_rank=last_rank)
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == codes
    for rank in [r for r in (0, 1) if codes[r] == 99]:
        last = (tmp_path / f"rank{rank}.log").read_text().strip().splitlines()[-1]
        assert any(words in last for words in message.split("|")), last
    assert weights_of(tmp_path / "run")[0] == "step_00000001"


HELD = ["--eval_every=2", "--eval_samples=2", "--steps=2"]


@pytest.mark.parametrize("world, where", [(2, "evaluation"), *(
    pytest.param(*how, marks=pytest.mark.slow) for how in ((1, "rollout"), (1, "evaluation"), (2, "rollout")))])
def test_sigterm_in_rl_ends_all_ranks_at_once_and_resumes_to_the_same_end(tmp_path, world, where):
    """
    The last rank gets SIGTERM in the rollout of iteration 2, or in the evaluation behind it: that work is dropped, what
    was finished is saved though save_every says otherwise, the exit is clean, and the same command ends bit-equal.
    """
    write_base(tmp_path)
    flags = [f"--valid={tmp_path}/problems.jsonl", *HELD, "--save_every=100"]
    run_ranks(world, tmp_path, train_rl, str(tmp_path), str(tmp_path / "whole"), *flags)
    codes = run_ranks(world, tmp_path, train_rl, str(tmp_path), str(tmp_path / "cut"), *flags, term_in=where)
    log = (tmp_path / "rank0.log").read_text()
    assert set(codes) <= {0, -6} and "stopped (SIGTERM)" in log and "Traceback" not in log, log
    assert weights_of(tmp_path / "cut")[0] == ("step_00000001" if where == "rollout" else "step_00000002")
    run_ranks(world, tmp_path, train_rl, str(tmp_path), str(tmp_path / "cut"), *flags)
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    rows = rl_log(tmp_path / "cut")
    assert rows == rl_log(tmp_path / "whole") and [r["step"] for r in rows if "heldout" in r] == [0, 2]


@pytest.mark.slow
def test_an_evaluation_may_take_longer_than_the_time_out(tmp_path):
    """Rank 1 decodes the second evaluation slowly, for more than the 10 s that ranks wait for each other: both meet."""
    write_base(tmp_path)
    flags = [f"--valid={tmp_path}/problems.jsonl", *HELD, "--steps=1", "--timeout=10"]
    codes = run_ranks(2, tmp_path, train_rl, str(tmp_path), str(tmp_path / "run"), *flags, nap=0.2)
    assert set(codes) <= {0, -6}, (tmp_path / "rank1.log").read_text()
    first, second = [r for _, r in read_rows(tmp_path / "run/metrics.jsonl") if "heldout" in r]
    assert second["heldout_s"] > 10 and second["step"] == 1


def test_an_error_in_an_evaluation_ends_both_ranks(tmp_path):
    write_base(tmp_path)
    processes = start(2, tmp_path, train_rl, str(tmp_path), str(tmp_path / "run"), f"--valid={tmp_path}/problems.jsonl",
                      *HELD, last_rank="raises there")
    for p in processes:
        p.join(60)
    for rank in range(2):
        assert processes[rank].exitcode not in (0, None)
        assert "rank 1 failed: ArithmeticError('on purpose')" in (tmp_path / f"rank{rank}.log").read_text()
    assert weights_of(tmp_path / "run")[0] == "step_00000002", "what was trained is saved before it is evaluated"


def test_a_time_out_says_who_waited_for_what(tmp_path):
    run_ranks(2, tmp_path, wait_in_vain)
    words = (tmp_path / "rank0.log").read_text()
    assert "error: rank 0 waited 1 s for the next round of the rollout, in vain" in words and "timeout" in words


@pytest.mark.parametrize("how", ["whole", "stopped"])
def test_an_evaluation_on_two_ranks_is_that_of_one(tmp_path, how):
    """eval.py: the same answers file, also where SIGTERM has reached one rank, and one rank alone goes on."""
    write_base(tmp_path)
    run_eval(tmp_path, "one")
    codes = run_ranks(2, tmp_path, run_eval, str(tmp_path), "two", stop_after=3 if how == "stopped" else 0)
    if how == "stopped":
        logs = [(tmp_path / f"rank{r}.log").read_text() for r in range(2)]
        assert codes == [1, 1] and all("error: stopped (SIGTERM) after" in log for log in logs), logs
        run_eval(tmp_path, "two")
    else:
        assert set(codes) <= {0, -6}, (tmp_path / "rank0.log").read_text()
    assert (tmp_path / "one_answers.jsonl").read_bytes() == (tmp_path / "two_answers.jsonl").read_bytes()
    one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    assert one["problems"] == two["problems"] and not list(tmp_path.glob("two_answers.jsonl.*"))


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_rl_on_two_ranks_ended_and_resumed_ends_bit_equal(tmp_path, how):
    """
    rl.py, whole: two ranks decode different numbers of steps, train one policy. kill -9 of both, the same command: the
    same weights and log. SIGTERM on one rank: both save and exit with 0, and the same command ends the same.
    """
    write_base(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / how
    codes = run_ranks(2, tmp_path, train_rl, str(tmp_path), str(whole))
    assert set(codes) <= {0, -6}, (tmp_path / "rank0.log").read_text()
    want, log = weights_of(whole), rl_log(whole)
    assert want[0] == "step_00000004" and len(want[1]) == 2 and [r["step"] for r in log] == [1, 2, 3, 4]
    assert all(r["grad_norm"] > 0 and r["updates"] == 2 for r in log) and log[-1]["ratio_max"] > 1

    if how == "killed":
        more = []
        processes = start(2, tmp_path, train_rl, str(tmp_path), str(broken))
        while not (broken / "step_00000002").is_dir() and any(p.is_alive() for p in processes):
            time.sleep(0.01)
        for p in processes:
            p.kill()
            p.join()
        assert weights_of(broken)[0] < want[0], "the run ended before it could be killed"
    else:
        more = ["--save_every=100"]
        codes = run_ranks(2, tmp_path, train_rl, str(tmp_path), str(broken), *more, term_after=2)
        assert set(codes) <= {0, -6} and weights_of(broken)[0] == "step_00000002"
    run_ranks(2, tmp_path, train_rl, str(tmp_path), str(broken), *more)
    assert weights_of(broken) == want and rl_log(broken) == log


@pytest.mark.parametrize("staleness", [0, 1])
def test_rl_publishes_in_the_replicas_dtype(tmp_path, monkeypatch, staleness):
    """
    bf16 replicas, as on a GPU: what the engine decodes with after an update is the trainer's fp32 weights, rounded. At
    no time does a whole fp32 copy exist: with staleness 0 nothing is copied but the replica itself.
    """
    import rl
    write_base(tmp_path)
    published, engines = [], []

    class Rollout(rl.RolloutThread):
        def publish(self, weights=None):
            published.append(weights)
            super().publish(weights)

    class Engine(rl.Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            engines.append(self)

    monkeypatch.setattr(rl, "RolloutThread", Rollout)
    monkeypatch.setattr(rl, "Engine", Engine)
    train_rl(tmp_path, tmp_path / "run", f"--max_staleness={staleness}", "--steps=2", dtype="bfloat16")
    (engine,), state = engines, load_model(tmp_path / "run/step_00000001")[1]
    if staleness:
        assert {w.dtype for w in published[0].values()} == {torch.bfloat16}
        got = published[0]
    else:
        assert published == [None, None]
        got, state = engine.model.state_dict(), load_model(tmp_path / "run/step_00000002")[1]
    assert all(torch.equal(got[name], w.bfloat16()) for name, w in state.items()) and len(got) == len(state)


# ---- parts -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_nothing(kind):
    """Same loss and bit-equal gradients with activation checkpointing, on one process."""
    from scale_worker import SHAPE, batch_at

    import mtp
    rt, grads = distributed.setup(seed=1, device="cpu"), []
    for checkpointing in ("none", kind):
        model = distributed.shard(mtp.build(SHAPE, "meta"), rt, checkpointing=checkpointing)
        checkpoint.materialise(model, rt, seed=3)
        b = batch_at(0, 0, 1, False)
        trunk, extra = mtp.losses(model, b.ids, b.docs, b.positions, b.bounds, b.mask)
        (trunk + sum(extra)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_recomputation_is_switched_on_and_off():
    """How often a block's attention runs for one forward and backward: the second time is the recomputation."""
    from scale_worker import SHAPE, batch_at

    import mtp
    rt, calls = distributed.setup(seed=1, device="cpu"), []
    model = distributed.shard(mtp.build(SHAPE, "meta"), rt, checkpointing="full")
    checkpoint.materialise(model, rt, seed=3)
    for block in [*model.layers, *model.mtp_layers]:
        block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    b, found = batch_at(0, 0, 1, False), []
    for kind in ("full", "none", "selective", "selective", "none"):
        if found:
            distributed.set_checkpointing(model, kind)
        calls.clear()
        trunk, extra = mtp.losses(model, b.ids, b.docs, b.positions, b.bounds, b.mask)
        (trunk + sum(extra)).backward()
        found.append(len(calls) / (SHAPE.n_layer + SHAPE.n_mtp))
    assert found == [2, 1, 2, 2, 1]


def test_compiled_blocks_give_the_same_losses(alone, tmp_path, monkeypatch):
    """
    torch.compile per block, over recomputation; dynamo alone (backend eager), so that no C++ compiler is
    needed.
    """
    compiler, seen = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f: seen.append(f) or compiler(f, backend="eager"))
    train(tmp_path / "out.json", steps=2, per_micro=4, compile=1, checkpointing="selective")
    assert len(seen) == 4                                             # two blocks, two MTP layers
    for x, y in zip(alone["seen"], read(tmp_path / "out.json")["seen"], strict=False):
        assert y == pytest.approx(x, rel=1e-5)
