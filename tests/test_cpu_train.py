"""
kernels/train_cpu.c against torch: the same functions and gradients up to rounding, for shapes on and off its tiles;
the same bits every time and whatever is packed beside a document; and who takes which path.
"""
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels import cpu
from kernels.attention import attention, attention_reference, doc_bounds
from kernels.rmsnorm import rmsnorm, rmsnorm_reference, rmsnorm_residual
from kernels.rope import rope, rope_tables, rotate
from kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C compiler: training on a CPU runs on torch alone")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape, seed=0, grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def same(kernel, reference, inputs, taken: str):
    """
    Outputs and gradients of the kernel and of the reference, both against the reference in fp64: the kernel's error
    is at most twice the reference's own in fp32 (flash-attn's criterion). `taken`: the kernel's autograd function.
    """
    def run(f, inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        outs = f(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        assert (type(outs[0].grad_fn).__name__ == taken + "Backward") == (f is kernel)
        down = [randn(*o.shape, seed=9 + i, grad=False).to(o.dtype) for i, o in enumerate(outs)]
        return *outs, *torch.autograd.grad(outs, inputs, down)
    exact = run(reference, [x.double() for x in inputs])
    for got, plain, right in zip(run(kernel, inputs), run(reference, inputs), exact, strict=True):
        error, own = ((x.double() - right).norm() for x in (got, plain))
        assert error <= 2 * own + 1e-6 * right.norm(), (error, own, right.norm())


# one token, a panel's edge, G = 1, 2, 3, 8, the width that the compiler knows and others, a long row
@pytest.mark.parametrize("B, T, H, K, d", [(1, 1, 2, 1, 16), (3, 17, 4, 2, 16), (2, 70, 8, 4, 16), (1, 40, 3, 1, 32),
                                           (2, 33, 8, 1, 48), (1, 130, 2, 2, 128), (1, 512, 2, 1, 16)])
def test_attention(B, T, H, K, d):
    q, k, v = randn(B, T, H, d), randn(B, T, K, d, seed=1), randn(B, T, K, d, seed=2)
    for scale in (None, 0.7):
        same(partial(attention, scale=scale), partial(attention_reference, scale=scale), (q, k, v), "AttentionOnCPU")


@pytest.mark.parametrize("cuts", [[0, 64, 100, 128, 256], [*range(60), 128, 200, 256], [0, 256]])
def test_packed_attention_and_its_bits(cuts):
    """As the reference; and each document, gradients too, has the bits it has alone."""
    B, T, H, K, d = 2, 128, 4, 2, 16
    q, k, v = randn(B, T, H, d), randn(B, T, K, d, seed=1), randn(B, T, K, d, seed=2)
    bounds = doc_bounds(torch.tensor(cuts, dtype=torch.int32), B, T)
    same(partial(attention, bounds=bounds), partial(attention_reference, bounds=bounds), (q, k, v), "AttentionOnCPU")
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
    same(attention, attention_reference, (q * 100, k * 100, v), "AttentionOnCPU")
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
    same(partial(attention, bounds=bounds), partial(attention_reference, bounds=bounds), (q, k, v), "AttentionOnCPU")


def test_bounds_that_cannot_be_are_refused():
    q, k = randn(2, 8, 2, 16), randn(2, 8, 1, 16)
    for bounds in (torch.zeros(2, 2, 8, dtype=torch.int32), torch.full((2, 2, 8), 9, dtype=torch.int32)):
        with pytest.raises(ValueError, match="bounds with a document"):
            attention(q, k, k, bounds)


@pytest.mark.parametrize("N, D", [(5, 16), (7, 48), (2048, 128)])
def test_rmsnorm(N, D):
    x, r, w = randn(3, N, D), randn(3, N, D, seed=1), randn(D, seed=2)
    same(rmsnorm, partial(rmsnorm_reference, eps=1e-5), (x, w), "NormOnCPU")
    same(rmsnorm_residual, lambda x, r, w: (rmsnorm_reference(x + r, w, 1e-5), x + r), (x, r, w), "NormOnCPU")
    for i in (0, 1):                                                # only one of the two outputs is used
        got = torch.autograd.grad(rmsnorm_residual(x, r, w)[i].sum(), (x, r, w), allow_unused=True)
        want = torch.autograd.grad([rmsnorm_reference(x + r, w, 1e-5), x + r][i].sum(), (x, r, w), allow_unused=True)
        for a, b in zip(got, want, strict=True):
            assert a is b is None or torch.allclose(a, b, atol=5e-6)


def test_swiglu():
    gate, up = randn(7, 48), randn(7, 48, seed=1)
    with torch.no_grad():
        gate[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    same(swiglu, lambda gate, up: F.silu(gate) * up, (gate, up), "SwiGLUOnCPU")


@pytest.mark.parametrize("H, K, d", [(8, 4, 16), (4, 1, 32)])
def test_rope(H, K, d):
    q, k = randn(3, 7, H, d), randn(3, 7, K, d, seed=1)
    for positions in (torch.arange(7), torch.arange(7)[None], torch.arange(21).view(3, 7) * 37 % 900):
        tables = rope_tables(positions, d, 1e4)
        same(lambda q, k, t=tables: rope(q, k, *t), lambda q, k, t=tables: (rotate(q, *t), rotate(k, *t)), (q, k),
             "RopeOnCPU")


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
    x = randn(4, 16)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(swiglu(x, x).sum(), x, create_graph=True)


def test_shapes_that_only_the_reference_knows():
    """A weight for each row broadcasts, a strided one is copied: as the reference."""
    x, w = randn(3, 128), randn(3, 128, seed=1)
    assert torch.equal(rmsnorm(x, w), rmsnorm_reference(x, w, 1e-5))
    w = randn(128, 3, seed=1)[:, 0]
    torch.testing.assert_close(rmsnorm(x, w), rmsnorm_reference(x, w, 1e-5))


def test_who_takes_the_other_path():
    """No gradients wanted, fp64, a width off 16, two threads: torch's operations."""
    def taken(x):
        return "OnCPU" in type(swiglu(x, x).grad_fn).__name__
    assert taken(randn(2, 16))
    assert not taken(randn(2, 16, grad=False)) and not taken(randn(2, 17)) and not taken(randn(2, 16).double())
    with torch.no_grad():
        assert not taken(randn(2, 16))
    torch.set_num_threads(2)
    assert not taken(randn(2, 16))
