"""kernels/ on a CPU: hand-worked answers, packing, batching, --plain. tests/test_cpu_train.py has what is in C."""
import importlib
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import engine
import kernels
import mtp
import runner
from kernels.attention import attention, doc_bounds
from kernels.cpu import train as cpu_train
from kernels.decode import decode_attention
from kernels.linear_cross_entropy import linear_cross_entropy, logprob_entropy
from kernels.rmsnorm import rmsnorm, rmsnorm_residual
from kernels.rope import rope
from kernels.swiglu import swiglu
from model import MiMo, ModelConfig


def randn(*shape, seed=0, grad=False):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def test_attention_by_hand():
    """Token 1 weighs e^0 : e^ln3 = 1 : 3 over values 4 and 8: (4 + 3 * 8) / 4 = 7."""
    q = torch.ones(1, 2, 1, 1)
    k = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    v = torch.tensor([4.0, 8.0]).view(1, 2, 1, 1)
    assert attention(q, k, v).flatten().tolist() == pytest.approx([4, 7])
    # as two documents of one token, each sees itself
    bounds = doc_bounds(torch.tensor([0, 1, 2], dtype=torch.int32), 1, 2)
    assert attention(q, k, v, bounds).flatten().tolist() == [4, 8]


def test_doc_bounds_by_hand():
    """Starts 0, 1, 5 over two rows of 4: the document that starts at 1 is cut by the row end at 4."""
    first, end = doc_bounds(torch.tensor([0, 1, 5, 8], dtype=torch.int32), 2, 4).tolist()
    assert first == [[0, 1, 1, 1], [0, 1, 1, 1]]
    assert end == [[1, 4, 4, 4], [1, 4, 4, 4]]
    assert doc_bounds(torch.tensor([0, 8], dtype=torch.int32), 2, 4).dtype == torch.int32


@pytest.mark.parametrize("cuts", [[0, 64, 100, 128, 256], [*range(60), 128, 200, 256]])
def test_packed_documents_equal_separate_documents(cuts):
    """Few documents take the loop, many the mask: both give what each document gives alone, gradients too."""
    B, T = 2, 128
    q, k, v = (randn(B, T, n, 16, seed=n, grad=True) for n in (4, 2, 2))
    o = attention(q, k, v, doc_bounds(torch.tensor(cuts, dtype=torch.int32), B, T))
    alone = torch.empty(B * T, 4, 16)
    for a, b in zip(cuts[:-1], cuts[1:], strict=True):
        alone[a:b] = attention(*(t.flatten(0, 1)[None, a:b] for t in (q, k, v)))[0]
    torch.testing.assert_close(o.flatten(0, 1), alone, atol=1e-6, rtol=1e-5)
    do = randn(B, T, 4, 16, seed=9)
    exact = torch.autograd.grad(alone.view(o.shape), (q, k, v), do)
    for got, want in zip(torch.autograd.grad(o, (q, k, v), do), exact,
                         strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def caches(B, S, K, d, n_extra=3):
    """A paged cache in shuffled blocks of 16 and the same tokens as one block per sequence."""
    whole = [randn(B, S, K, d, seed=s) for s in (1, 2)]
    order = torch.randperm(B * S // 16 + n_extra, generator=torch.Generator().manual_seed(0))[:B * S // 16]
    paged = [torch.full((B * S // 16 + n_extra, 16, K, d), float("nan")) for _ in whole]
    for p, w in zip(paged, whole, strict=True):
        p[order] = w.view(-1, 16, K, d)
    return whole, paged, order.view(B, S // 16).int()


@pytest.mark.parametrize("Q", [1, 4])
def test_decode_equals_the_last_rows_of_training_attention(Q):
    B, S, H, K, d = 3, 96, 4, 2, 16
    (k, v), paged, table = caches(B, S, K, d)
    lengths = torch.tensor([96, 33, Q], dtype=torch.int32)
    q = randn(B, Q, H, d)
    whole = decode_attention(q, k, v, torch.arange(B, dtype=torch.int32)[:, None], lengths)
    assert torch.equal(whole, decode_attention(q, *paged, table, lengths))
    for b, n in enumerate(lengths.tolist()):
        full = torch.zeros(1, n, H, d)
        full[0, n - Q:] = q[b]
        want = attention(full, k[b:b + 1, :n], v[b:b + 1, :n])[0, n - Q:]
        torch.testing.assert_close(whole[b], want, atol=1e-6, rtol=1e-5)


def test_decode_numbers_do_not_depend_on_the_batch():
    """A sequence decoded alone and in company of longer ones gives the same bits."""
    B, S, K, d = 6, 256, 2, 32
    k, v = randn(B, K, S, d, seed=1).transpose(1, 2), randn(B, K, S, d, seed=2).transpose(1, 2)
    lengths = torch.tensor([5, 63, 64, 65, 130, 256], dtype=torch.int32)
    q = randn(B, 1, 4, d)
    together = decode_attention(q, k, v, torch.arange(B, dtype=torch.int32)[:, None], lengths)
    for b in range(B):
        alone = decode_attention(q[b:b + 1], k, v, torch.tensor([[b]], dtype=torch.int32), lengths[b:b + 1])
        assert torch.equal(together[b], alone[0])


def test_decode_of_an_empty_sequence_is_zero():
    k = randn(2, 16, 1, 16)
    o = decode_attention(randn(2, 1, 2, 16), k, k, torch.tensor([[0], [1]], dtype=torch.int32),
                         torch.tensor([0, 3], dtype=torch.int32))
    assert torch.equal(o[0], torch.zeros(1, 2, 16)) and o[1].isfinite().all()


def test_linear_cross_entropy_by_hand():
    """Logits (0, ln 3), target 1: p = 3/4, loss ln 4/3; the sum over two rows doubles it; target -100 adds nothing."""
    x, weight = torch.ones(3, 1), torch.tensor([[0.0], [math.log(3)]])
    assert linear_cross_entropy(x[:2], weight, torch.tensor([1, -100])).item() == pytest.approx(math.log(4 / 3))
    twice = linear_cross_entropy(x, weight, torch.tensor([1, -100, 1]))
    assert twice.item() == pytest.approx(2 * math.log(4 / 3)) and twice.dtype == torch.float32


@pytest.mark.parametrize("chunk", [7, 64])
def test_linear_cross_entropy_equals_torch(chunk):
    x, weight, targets = randn(50, 16, grad=True), randn(40, 16, seed=1, grad=True), torch.arange(50) % 40
    targets[[3, 49]] = -100
    ours = linear_cross_entropy(x, weight, targets, chunk=chunk)
    torchs = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(ours, torchs)
    for got, want in zip(torch.autograd.grad(ours * 0.5, (x, weight)),
                         torch.autograd.grad(torchs * 0.5, (x, weight)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_linear_cross_entropy_of_a_frozen_head_and_without_grad():
    x, weight, targets = randn(9, 4, grad=True), randn(5, 4), torch.arange(9) % 5
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    (want,) = torch.autograd.grad(F.cross_entropy(x @ weight.T, targets, reduction="sum"), x)
    torch.testing.assert_close(x.grad, want)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, targets), loss)


def test_logprob_entropy_by_hand():
    """p = (1/4, 3/4): log p(0) = ln 1/4, H = 1/4 ln 4 + 3/4 ln 4/3."""
    x, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]])
    logp, entropy = logprob_entropy(x, weight, torch.tensor([0]))
    assert logp.item() == pytest.approx(math.log(1 / 4))
    assert entropy.item() == pytest.approx(math.log(4) / 4 + 3 / 4 * math.log(4 / 3))


def test_logprob_entropy_equals_categorical():
    x, weight = randn(30, 16, grad=True), randn(40, 16, seed=1, grad=True)
    targets = torch.arange(30)
    logp, entropy = logprob_entropy(x, weight, targets, chunk=8)
    want = torch.distributions.Categorical(logits=x @ weight.T)
    torch.testing.assert_close(logp, want.log_prob(targets))
    torch.testing.assert_close(entropy, want.entropy(), atol=1e-6, rtol=1e-5)
    assert not entropy.requires_grad
    g = randn(30, seed=2)
    for got, exact in zip(torch.autograd.grad(logp, (x, weight), g),
                          torch.autograd.grad(want.log_prob(targets), (x, weight), g), strict=True):
        torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-5)


def test_rmsnorm_by_hand_and_as_hugging_face_rounds():
    """x = (1, 7): mean square 25, x / 5 = (0.2, 1.4), times the gain (10, 1)."""
    x, gain = torch.tensor([1.0, 7.0]), torch.tensor([10.0, 1.0])
    assert rmsnorm(x, gain, eps=0.0).tolist() == pytest.approx([2, 1.4])
    for dtype in (torch.float32, torch.bfloat16):
        x, w = randn(64, 128).to(dtype), randn(128, seed=1).to(dtype)
        h = x.to(torch.float32)  # transformers Qwen2RMSNorm.forward, line by line
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        assert torch.equal(rmsnorm(x, w, 1e-5), w * h.to(dtype))
    normed, total = rmsnorm_residual(x, w, 1e-5, 2 * x)
    assert torch.equal(total, x + 2 * x) and torch.equal(normed, rmsnorm(x + 2 * x, w, 1e-5))


def test_swiglu_by_hand():
    """gate = ln 3 has sigma = 3/4; y = 4 * 3/4 * ln 3 = 3 ln 3."""
    assert swiglu(torch.tensor(math.log(3)), torch.tensor(4.0)).item() == pytest.approx(3 * math.log(3))


def tables(positions, d, base):
    """cos and sin of the positions, [.., d]."""
    return MiMo(ModelConfig(n_layer=1, head_dim=d, rope_base=base)).rope_at(None, positions)


def test_rope_by_hand():
    """d = 4, base 100: theta = (1, 0.1). A quarter turn of (1, 0) is (0, 1)."""
    cos, sin = tables(torch.tensor([2]), 4, 100.0)
    assert torch.atan2(sin, cos)[0].tolist() == pytest.approx([2, 0.2, 2, 0.2])
    quarter = torch.full((1, 2), math.pi / 2)
    one = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    q, _ = rope(one, one, quarter.cos(), quarter.sin())
    assert q.flatten().tolist() == pytest.approx([0, 1], abs=1e-7)


def test_rope_scores_depend_on_the_distance_only():
    q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16, seed=1)
    dots = []
    for i, j in ((0, 0), (5, 2), (1003, 1000)):
        at_i, at_j = (tables(torch.tensor([p]), 16, 1e4) for p in (i, j))
        dots.append((rope(q, q, *at_i)[0] * rope(k, k, *at_j)[0]).sum().item())
    assert dots[1] == pytest.approx(dots[2], abs=1e-4) and abs(dots[0] - dots[1]) > 1e-2


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="K dividing H"):
        attention(randn(1, 4, 3, 16), randn(1, 4, 2, 16), randn(1, 4, 2, 16))
    with pytest.raises(ValueError, match="bounds must be int32"):
        attention(randn(1, 4, 2, 16), randn(1, 4, 2, 16), randn(1, 4, 2, 16), torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="caches"):
        cache = randn(1, 16, 2, 16)
        decode_attention(randn(1, 1, 3, 16), cache, cache, torch.zeros(1, 1), torch.ones(1))
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(randn(4, 8), randn(5, 8), torch.zeros(3, dtype=torch.int64))


# ---- --plain --------------------------------------------------------------------------------------------------------

REFERENCES = ["reference.rmsnorm", "reference.rope", "reference.swiglu", "reference.attention"]
OPERATORS = ["rmsnorm.norm_op", "rope.rope_op", "swiglu.swiglu_op", "attention.attention_op", "decode.decode_op",
             "linear_cross_entropy.loss_op", "linear_cross_entropy.logprob_op"]


@pytest.fixture
def watched(monkeypatch):
    """
    A set that collects the references that are called. The Triton operators, which CPU tensors would take here as CUDA
    tensors do, and all C functions are errors.
    """
    called = set()

    def watch(name, function):
        def call(*args, **named):
            called.add(name)
            return function(*args, **named)
        return call

    def never(*args, **named):
        raise AssertionError("a kernel was called")

    for name in REFERENCES:
        file, function = name.split(".")
        module = importlib.import_module(f"kernels.{file}")
        monkeypatch.setattr(module, function, watch(name, getattr(module, function)))
    for name in OPERATORS:
        monkeypatch.setattr(f"kernels.{name}", never)
    monkeypatch.setattr(cpu_train, "library", never)
    monkeypatch.setattr(runner, "library", never)
    monkeypatch.setattr(kernels, "AVAILABLE", frozenset({("cpu", torch.float32)}))
    yield called
    monkeypatch.undo()
    kernels.set_plain(False)


def test_plain_calls_the_references_and_no_kernel(watched):
    """With --plain a breakpoint in each reference is hit, in training and in decoding; without it the kernels are."""
    model = mtp.build(ModelConfig(vocab_size=64, n_layer=1, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=48))
    model.init_weights(0)
    ids = torch.arange(36).view(2, 18) % 64
    requests = [engine.Request(0, [1, 2, 3], 4), engine.Request(1, [4, 5], 4)]

    def train():
        trunk, extra = mtp.losses(model, ids, torch.zeros_like(ids), torch.arange(16)[None].expand(2, 16), None)
        (trunk + sum(extra)).backward()
        logprob_entropy(model(ids).flatten(0, 1), model.lm_head.weight, ids.flatten())[0].sum().backward()

    kernels.set_plain(True)
    assert kernels.is_plain()
    train()
    assert watched == set(REFERENCES)
    watched.clear()
    assert all(len(s.tokens) == 4 for s in engine.generate(engine.Engine(model, 2, 16, 1), requests))
    assert watched == set(REFERENCES[:3])
    kernels.set_plain(False)
    assert not kernels.is_plain()
    for kernel in (train, lambda: engine.generate(engine.Engine(model, 2, 16, runner=runner.GraphRunner), requests)):
        with pytest.raises(AssertionError, match="a kernel was called"):
            kernel()


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch uses triton")
def test_importing_the_kernels_does_not_import_triton():
    code = ("import sys, kernels.attention, kernels.decode, kernels.linear_cross_entropy, kernels.rmsnorm, "
            "kernels.rope, kernels.swiglu; sys.exit('triton' in sys.modules)")
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NANOMIMO_TRITON")}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120).returncode == 0
