"""
What a training script leans on: reductions, clipping, guards, metrics and endings. Several ranks:
test_scale.py.
"""
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_model
from fork_ranks import run_ranks
from scale_worker import train_pretrain

import checkpoint
import distributed
import metrics
from configurator import UserError
from data.loader import make_batch
from metrics import Metrics, SpikeGuard, check_finite, mfu, read_rows
from model import ModelConfig, flops_per_token

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def rt():
    return distributed.setup(seed=1, device="cpu")


# ---- setup and endings -------------------------------------------------------------------------------------

def test_setup_on_one_process(rt):
    assert (rt.rank, rt.world, rt.is_main, rt.sharded, rt.dtype) == (0, 1, True, False, torch.float32)
    assert not torch.distributed.is_initialized() and torch.get_num_threads() == 1
    first = torch.rand(3)
    distributed.setup(seed=1, device="cpu")
    assert torch.equal(torch.rand(3), first)


def test_products_of_bf16_on_a_cpu(monkeypatch):
    """Inputs are rounded to bf16, sums are not; the next setup is fp32 again. Refused without AVX-512."""
    x, w = torch.randn(64, 256), torch.randn(256, 64)
    exact, rounded = x @ w, x.bfloat16().float() @ w.bfloat16().float()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        distributed.setup(device="cpu", matmul="bf16")
        assert torch.get_float32_matmul_precision() == "medium"
        got = x @ w                                    # a processor may still compute in fp32 where that is faster
        assert min((got - rounded).abs().max(), (got - exact).abs().max()) < 1e-3
        distributed.setup(device="cpu")
    assert torch.get_float32_matmul_precision() == "highest" and torch.equal(x @ w, exact)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="matmul = 'bf16' needs a processor with AVX-512"):
        distributed.setup(device="cpu", matmul="bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is absent")
def test_absent_cuda_is_one_line():
    with pytest.raises(UserError, match="device = 'cuda' but torch sees no CUDA device"):
        distributed.setup(device="cuda")


@pytest.mark.parametrize("error, line", [("UserError('disk on fire: /dev/sda')", "error: disk on fire: /dev/sda\n"),
                                         ("OSError(28, 'No space left', 'out/x')", "error: out/x: No space left\n")])
def test_an_error_ends_in_one_line_and_status_1(error, line):
    program = ("import configurator\nfrom configurator import UserError\nfrom dataclasses import dataclass\n"
               f"@dataclass\nclass Config: pass\ndef main(cfg): raise {error}\nconfigurator.run(main, Config)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, line)


@pytest.mark.catches_sigterm
def test_sigterm_asks_for_a_stop(rt):
    assert not distributed.stop_requested(rt)
    os.kill(os.getpid(), signal.SIGTERM)
    assert distributed.stop_requested(rt)
    distributed.setup(device="cpu")
    assert not distributed.stop_requested(rt)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_sigterm_ends_pytest(tmp_path):
    """`timeout` and a scheduler can end a test run that has called a script's setup in this very process."""
    (tmp_path / "test_sleeps.py").write_text("import time\nimport distributed\ndef test_sleeps():\n"
                                             "    distributed.setup(device='cpu')\n    print('up', flush=True)\n"
                                             "    time.sleep(60)\n")
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    run = subprocess.Popen([sys.executable, "-m", "pytest", "-s", "-c", str(ROOT / "pyproject.toml"), "--rootdir",
                            str(ROOT), str(tmp_path / "test_sleeps.py")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "up" not in (line := run.stdout.readline()):
        assert line, "pytest ended before the test began"
    run.terminate()
    assert run.wait(20) == -signal.SIGTERM


def test_sigterm_saves_exits_0_and_resumes_to_the_same_end(tmp_path):
    """
    pretrain.py preempted after its seventh step and once more in its second stage: same metrics and bit-equal weights
    as without, although its stages recompute what they keep for the backward pass, each in another way.
    """
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert run_ranks(1, tmp_path / "whole", train_pretrain, str(tmp_path / "whole"), term_after=-1) == [0]
    for term_after, step in ((7, 7), (9, 16), (-1, 24)):
        assert run_ranks(1, tmp_path / "parts", train_pretrain, str(tmp_path / "parts"), term_after=term_after,
                         recompute=("full", "none", "selective")) == [0]
        assert checkpoint.read_state(checkpoint.latest(tmp_path / "parts/base"))["step"] == step
    one, two = (load_model(tmp_path / name / "base")[1] for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    drop = ("tokens_per_second", "mfu")
    logs = [
        [
            {k: v for k, v in row.items() if k not in drop}
            for _, row in read_rows(tmp_path / name / "base/metrics.jsonl")
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


# ---- gradients ---------------------------------------------------------------------------------------------

def test_clip_by_the_global_norm():
    """
    By hand: gradients (3, 0) and (4,): |g| = 5. max 2.5 halves them; max 10 leaves them; 5 is told either
    way.
    """
    def params():
        a, b, c = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 1))
        a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
        return [a, b, c]                                       # c has no gradient: frozen
    small, large = params(), params()
    assert distributed.clip_grad_norm(small, 2.5) == pytest.approx(5.0)
    assert torch.cat([p.grad for p in small[:2]]).tolist() == pytest.approx([1.5, 0.0, 2.0])
    assert distributed.clip_grad_norm(large, 10.0) == pytest.approx(5.0)
    assert torch.cat([p.grad for p in large[:2]]).tolist() == [3.0, 0.0, 4.0]
    assert distributed.clip_grad_norm([small[2]], 1.0) == 0.0


def test_clipping_leaves_a_nan_for_the_guard_to_name():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, math.nan])
    assert math.isnan(distributed.clip_grad_norm([p], 1.0))
    assert p.grad[0] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["weight", "gradient"])
def test_first_bad_tensor_is_named(bad, kind):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model(torch.ones(1, 2)).sum().backward()
    check_finite({"loss": torch.ones(2), "norm": 1.0}, model, 12)
    tensor = model[1].weight.data if kind == "weight" else model[1].weight.grad
    tensor[0, 1] = bad
    with pytest.raises(UserError, match=f"step 12: loss is not finite; first bad .*: {kind} of 1.weight"):
        check_finite({"norm": 1.0, "loss": torch.tensor([1.0, bad])}, model, 12)


def test_spikes_are_skipped_only_when_asked_and_hardly_move_the_mean():
    """By hand, after 20 norms of 1: a spike enters as the limit, 5, so that the mean is 25/21 and the limit 125/21."""
    off, on = SpikeGuard(), SpikeGuard(5.0)
    for norm in [1.0] * 20:
        assert not on.skip(norm) and not off.skip(1e6)
    assert on.mean == pytest.approx(1.0)
    assert on.skip(1e30) and on.mean == pytest.approx(25 / 21)
    assert not on.skip(5.9) and on.skip(1e9) and on.skip(1e9) and not on.skip(4.9) and on.skipped == 3
    again = SpikeGuard(5.0)
    again.load_state_dict(on.state_dict())
    assert again.state_dict() == on.state_dict() and again.skip(1e9) == on.skip(1e9)
    # the first 20 are never skipped
    assert not any(SpikeGuard(2.0).skip(10.0 ** k) for k in range(20))


@pytest.mark.parametrize("factor", [2.0, 5.0, 10.0])
@pytest.mark.parametrize("level", [1.5, 4.0, 11.0, 45.0, 1e4, 1e30])
def test_a_norm_that_lasts_is_let_through_or_ends_the_run(factor, level):
    """The fault: after 100 steps at norm 1, 10,000 steps at norm 11 were skipped, and the run ended with status 0."""
    guard = SpikeGuard(factor, most=20)
    assert not any(guard.skip(1.0) for _ in range(100))
    try:
        skipped = [guard.skip(level) for _ in range(10_000)]
    except UserError as e:
        assert "for more than max_skips = 20 steps in a row" in str(e) and f"{level:.3g}" in str(e)
        assert level > factor * (1 + 0.02 * (factor - 1)) ** 20 and guard.skipped == 21
    else:
        assert sum(skipped) <= 20 and not any(skipped[20:])
        assert skipped[0] == (level > factor)


def test_each_stage_has_its_own_mean(rt):
    guard = SpikeGuard(10.0)
    assert not any(guard.skip(0.2) for _ in range(100))
    guard.begin_stage()
    assert not any(guard.skip(9.0) for _ in range(100)) and guard.skipped == 0 and guard.skip(100.0)


# ---- micro-batches -----------------------------------------------------------------------------------------

def pieces(rows, per_micro, rt):
    """[(ids of the rows, is anything learned, last)] of micro_batches over a batch of so many rows."""
    batch = make_batch(np.arange(3 * rows).reshape(rows, 3), np.zeros((rows, 3), int), 2)
    return [(part.ids[:, 0].tolist(), part.mask is None, last)
            for part, last in distributed.micro_batches(batch, per_micro, rt)]


def test_micro_batches_by_hand(rt, monkeypatch):
    assert pieces(5, 2, rt) == [([0, 3], True, False), ([6, 9], True, False), ([12], True, True)]
    assert pieces(4, 8, rt) == [([0, 3, 6, 9], True, True)]
    with pytest.raises(UserError, match="a rank has no row"):
        pieces(0, 2, rt)
    two = dataclasses.replace(rt, world=2)
    monkeypatch.setattr(distributed, "all_reduce", lambda t, rt, op: torch.tensor([7, -5]))  # another rank has 7
    assert pieces(5, 2, two)[3:] == [([0], False, True)], "a fourth piece, for which nothing is learned"
    monkeypatch.setattr(distributed, "all_reduce", lambda t, rt, op: torch.tensor([7, 0]))   # another rank has none
    with pytest.raises(UserError, match="a rank has no row"):
        pieces(7, 2, two)


# ---- metrics -----------------------------------------------------------------------------------------------

def test_metrics_drop_what_was_written_after_the_checkpoint(tmp_path):
    log = Metrics(tmp_path)
    for step in range(1, 6):
        log.log(step=step, loss=1.0 / step)
    log.log(step=3, valid={"web": 2.0})
    with open(log.path, "a") as f:
        f.write('{"step": 4, "lo')                              # killed while writing
    Metrics(tmp_path, resume_at=3).log(step=4, loss=float("nan"), by=[1.0, math.inf])
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 3, 4]
    assert rows[-1] == {"step": 4, "loss": None, "by": [1.0, None]}          # still JSON
    Metrics(tmp_path, resume_at=2, enabled=False).log(step=9)        # another rank: touches nothing
    assert len(log.path.read_text().splitlines()) == 5
    Metrics(tmp_path)                                                # a run from the start
    assert log.path.read_text() == ""


def test_mfu_is_flops_over_peak(rt, monkeypatch):
    """By hand: 7B trunk at T = 8,192; 1e4 tokens/s on one GPU of 989 TFLOP/s."""
    shape = ModelConfig.mimo_7b()
    assert mfu(shape, 8192, 1e4, rt) is None  # a CPU has no peak to compare with
    monkeypatch.setattr(metrics, "peak_tflops", lambda device: 989.0)
    per_token = 6 * 7.0010e9 + 6 * 36 * 32 * 128 * 8192  # matrices without the embedding; attention
    assert mfu(shape, 8192, 1e4, rt) == pytest.approx(per_token * 1e4 / 989e12, rel=1e-3)
    assert flops_per_token(shape, 8192, causal=False) - flops_per_token(shape, 8192) \
        == 6 * 36 * 32 * 128 * 8192
