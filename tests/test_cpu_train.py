"""
kernels/cpu/train.py against torch: the same functions and gradients up to rounding, for shapes on and off its tiles;
the same bits every time and whatever is packed beside a document; and which tensors model.operators gives to it.
"""
from functools import partial

import pytest
import torch

import kernels
import mtp
from kernels import cpu, reference
from kernels.attention import doc_bounds
from kernels.cpu.train import attention, c_kernels_apply, rmsnorm, rmsnorm_residual, rope, swiglu
from model import OPERATORS, MiMo, ModelConfig, operators

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C compiler: training on a CPU runs on torch alone")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape, seed=0, grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def same(kernel, reference, inputs):
    """
    Outputs and gradients of the kernel and of the reference, both against the reference in fp64: the kernel's error is
    at most twice the reference's own in fp32 (flash-attn's criterion).
    """
    def run(f, inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        outs = f(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        down = [randn(*o.shape, seed=9 + i, grad=False).to(o.dtype) for i, o in enumerate(outs)]
        return *outs, *torch.autograd.grad(outs, inputs, down, allow_unused=True)
    exact = run(reference, [x.double() for x in inputs])
    for got, plain, right in zip(run(kernel, inputs), run(reference, inputs), exact, strict=True):
        if right is None:                                           # an input that the outputs do not depend on
            assert got is plain is None
            continue
        error, own = ((x.double() - right).norm() for x in (got, plain))
        assert error <= 2 * own + 1e-6 * right.norm(), (error, own, right.norm())


# one token, a panel's edge, G = 1, 2, 3, 8, the width that the compiler knows and others, a long row
@pytest.mark.parametrize("B, T, H, K, d", [(1, 1, 2, 1, 16), (3, 17, 4, 2, 16), (2, 70, 8, 4, 16), (1, 40, 3, 1, 32),
                                           (2, 33, 8, 1, 48), (1, 130, 2, 2, 128), (1, 512, 2, 1, 16)])
def test_attention(B, T, H, K, d):
    q, k, v = randn(B, T, H, d), randn(B, T, K, d, seed=1), randn(B, T, K, d, seed=2)
    same(attention, reference.attention, (q, k, v))


@pytest.mark.parametrize("cuts", [[0, 64, 100, 128, 256], [*range(60), 128, 200, 256], [0, 256]])
def test_packed_attention_and_its_bits(cuts):
    """As the reference; and each document, gradients too, has the bits it has alone."""
    B, T, H, K, d = 2, 128, 4, 2, 16
    q, k, v = randn(B, T, H, d), randn(B, T, K, d, seed=1), randn(B, T, K, d, seed=2)
    bounds = doc_bounds(torch.tensor(cuts, dtype=torch.int32), B, T)
    same(lambda q, k, v: attention(q, k, v, bounds), partial(reference.attention, bounds=bounds), (q, k, v))
    dout = randn(B, T, H, d, seed=5, grad=False)
    packed = attention(q, k, v, bounds)
    grads = torch.autograd.grad(packed, (q, k, v), dout)
    cuts = sorted({*cuts, T})                                       # rows end documents
    for a, b in zip(cuts, cuts[1:], strict=False):
        part = [t.detach().flatten(0, 1)[None, a:b].requires_grad_() for t in (q, k, v)]
        alone = attention(*part)
        assert torch.equal(alone[0], packed.flatten(0, 1)[a:b])
        for g, whole in zip(torch.autograd.grad(alone, part, dout.flatten(0, 1)[None, a:b]), grads, strict=True):
            assert torch.equal(g[0], whole.flatten(0, 1)[a:b])


def test_attention_of_large_scores_and_of_nan():
    """Scores of +-1e4 do not overflow; a NaN in one key reaches the tokens that see it and no other."""
    q, k, v = randn(1, 40, 2, 16), randn(1, 40, 1, 16, seed=1), randn(1, 40, 1, 16, seed=2)
    same(attention, reference.attention, (q * 100, k * 100, v))
    with torch.no_grad():
        k[0, 20] = torch.nan
    o = attention(q, k, v)
    assert not o[:, :20].isnan().any() and o[:, 20:].isnan().all()


def test_documents_do_not_touch_each_other():
    """A document whose first score is -88.5 behind one whose last panel of rows is not full: nothing reaches it."""
    q, k, v = (randn(1, 16, 1, 16, seed=i) for i in range(3))
    with torch.no_grad():
        q[0, 5], k[0, 5] = torch.eye(16)[:1], -354 * torch.eye(16)[:1]
    bounds = doc_bounds(torch.tensor([0, 5, 16], dtype=torch.int32), 1, 16)
    same(lambda q, k, v: attention(q, k, v, bounds), partial(reference.attention, bounds=bounds), (q, k, v))


def test_bounds_that_cannot_be_are_refused():
    q, k = randn(2, 8, 2, 16), randn(2, 8, 1, 16)
    for bounds in (torch.zeros(2, 2, 8, dtype=torch.int32), torch.full((2, 2, 8), 9, dtype=torch.int32)):
        with pytest.raises(ValueError, match="bounds with a document"):
            attention(q, k, k, bounds)


@pytest.mark.parametrize("N, D", [(5, 16), (7, 48), (2048, 128)])
def test_rmsnorm(N, D):
    x, r, w = randn(3, N, D), randn(3, N, D, seed=1), randn(D, seed=2)
    same(lambda x, w: rmsnorm(x, w, 1e-5), partial(reference.rmsnorm, eps=1e-5), (x, w))
    ours = lambda x, r, w: rmsnorm_residual(x, w, 1e-5, r)
    torchs = lambda x, r, w: (reference.rmsnorm(x + r, w, 1e-5), x + r)
    same(ours, torchs, (x, r, w))
    for i in (0, 1):                                                # only one of the two outputs is used
        same(lambda *t, i=i: ours(*t)[i], lambda *t, i=i: torchs(*t)[i], (x, r, w))


def test_swiglu():
    gate, up = randn(7, 48), randn(7, 48, seed=1)
    with torch.no_grad():
        gate[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    same(swiglu, reference.swiglu, (gate, up))


@pytest.mark.parametrize("H, K, d", [(8, 4, 16), (4, 1, 32)])
def test_rope(H, K, d):
    q, k = randn(3, 7, H, d), randn(3, 7, K, d, seed=1)
    for positions in (torch.arange(7), torch.arange(7)[None], torch.arange(21).view(3, 7) * 37 % 900):
        tables = MiMo(ModelConfig(n_layer=1, head_dim=d)).rope_at(None, positions)
        same(lambda q, k, t=tables: rope(q, k, *t), lambda q, k, t=tables: reference.rope(q, k, *t), (q, k))


def test_inputs_that_are_not_contiguous():
    """Views with odd strides, as slices of one wide projection, give what their copies give."""
    wide = randn(2, 9, 8, 16)
    q, k, v = wide[:, :, :4], wide[:, :, 4:6], wide[:, :, 6:]
    out, copies = attention(q, k, v), attention(*(t.contiguous() for t in (q, k, v)))
    assert torch.equal(out, copies)
    down = randn(9, 2, 4, 16, seed=3, grad=False).transpose(0, 1)
    assert torch.equal(*(torch.autograd.grad(o, wide, down)[0] for o in (out, copies)))
    gate, up = randn(4, 64).chunk(2, -1)
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))


def test_second_derivatives_are_refused():
    """The gradients of C have none: an error, not a zero."""
    x, q = randn(4, 16), randn(1, 3, 1, 16)
    for y in (swiglu(x, x), rmsnorm(x, x[0], 1e-5), rope(q, q, torch.ones(3, 16), torch.zeros(3, 16))[0],
              attention(q, q, q)):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(y.sum(), (x, q), create_graph=True, allow_unused=True)


def test_shapes_that_do_not_fit_are_refused():
    """C reads memory by the shapes it is given: every mismatch is a ValueError. A strided weight is copied."""
    x, w, q = randn(3, 128), randn(3, 128, seed=1), randn(1, 4, 3, 16)
    table = torch.ones(4, 16)
    for wrong in (lambda: rmsnorm(x, w, 1e-5), lambda: rmsnorm_residual(x, w[0], 1e-5, x[:2]), lambda: swiglu(x, x[:2]),
                  lambda: rope(q, q[:, :2], table, table), lambda: rope(q, q, table, table[:2]),
                  lambda: attention(q, q[:, :, :2], q[:, :, :2]), lambda: attention(q, q, q[:, :2]),
                  lambda: attention(q, q, q, torch.zeros(2, 1, 4))):
        with pytest.raises(ValueError):
            wrong()
    w = randn(128, 3, seed=1)[:, 0]
    torch.testing.assert_close(rmsnorm(x, w, 1e-5), reference.rmsnorm(x, w, 1e-5))


def test_a_freed_weight_is_refused():
    """FSDP frees a parameter's memory outside its layer: an error, not a crash."""
    x, w = randn(3, 16), randn(16)
    y = rmsnorm(x, w, 1e-5)
    w.untyped_storage().resize_(0)
    for use in (lambda: rmsnorm(x, w, 1e-5), lambda: y.sum().backward()):
        with pytest.raises(RuntimeError, match="no memory"):
            use()


# ---- which tensors go to C ------------------------------------------------------------------------------------------

def test_who_takes_the_other_path(monkeypatch):
    """No gradients wanted, fp64, a width off 16, two threads, --plain, torch.compile: torch's operations."""
    x = randn(2, 16)
    assert c_kernels_apply(x, x.detach()) and operators(x).swiglu is swiglu
    for other in (randn(2, 16, grad=False), randn(2, 17), randn(2, 16).double(), torch.empty(2, 16, device="meta")):
        assert not c_kernels_apply(other) and operators(other) is OPERATORS
    assert not c_kernels_apply(x, randn(2, 16).double())            # every tensor must fit
    with torch.no_grad():
        assert operators(x) is OPERATORS
    kernels.set_plain(True)
    assert operators(x) is reference
    kernels.set_plain(False)
    assert operators(x).swiglu is swiglu
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert operators(x) is OPERATORS
    monkeypatch.undo()
    torch.set_num_threads(2)
    assert operators(x) is OPERATORS


def nodes(loss):
    """Names of the autograd functions under a loss."""
    found, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [n for n, _ in node.next_functions]
    return {type(n).__name__ for n in found}


IN_C = {"NormBackward", "RopeBackward", "SwiGLUBackward", "AttentionBackward"}


@pytest.mark.parametrize("plain", [False, True])
def test_a_training_step_runs_in_c_or_with_plain_in_torch(plain):
    """All four functions of C in a model's graph, and with --plain none; losses and gradients agree."""
    model = mtp.build(ModelConfig(n_layer=1))
    model.init_weights(0)
    g = torch.Generator().manual_seed(0)
    ids, positions = torch.randint(0, 1024, (2, 34), generator=g), torch.arange(32)[None].expand(2, 32)

    def step():
        trunk, (first,) = mtp.losses(model, ids, torch.zeros_like(ids), positions, None)
        return trunk, first, *torch.autograd.grad(trunk + first, tuple(model.parameters()))

    torchs, ours = [], []
    for build, out in ((True, torchs), (plain, ours)):
        kernels.set_plain(build)
        try:
            out += step()
        finally:
            kernels.set_plain(False)
    assert (nodes(ours[0]) & IN_C == IN_C) == (not plain) and not nodes(torchs[0]) & IN_C
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
