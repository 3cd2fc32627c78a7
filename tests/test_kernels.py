"""
The Triton kernels in Triton's CPU interpreter against fp64 references; their builds ahead of time; their wiring.

Error bars are relative Frobenius norms against fp64: 1e-12 with fp64 accumulators, 1e-5 fp32, 2e-3 fp16, 6e-3 bf16
(with the bf16 repair in conftest.py). What only a GPU can show is in bench/gpu.py.
"""
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
import mtp
from kernels import attention as A
from kernels import decode as D
from kernels import gemv as G
from kernels import linear_cross_entropy as L
from kernels import reference
from kernels import rmsnorm as N
from kernels import rope as R
from kernels import swiglu as S
from model import MiMo, ModelConfig
from runner import GraphRunner


def why_not():
    if kernels.triton is None:
        return "triton is not installed (pip install -r requirements-dev.txt, Linux x86-64)"
    if not kernels.INTERPRET:
        return "needs TRITON_INTERPRET=1 before the first import (conftest.py sets it where there is no GPU)"
    import numpy
    if tuple(map(int, kernels.triton.__version__.split(".")[:2])) < (3, 7) and numpy.__version__ >= "2.4":
        return "the interpreter of triton < 3.7 does not run with numpy >= 2.4 (triton #9171)"
    return ""


# the interpreter computes both sides of a tl.where, so -inf - -inf warns where it is never taken
pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs"),
              pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")]
ROOT = Path(__file__).resolve().parent.parent
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty gives NaN, so that an element which no program wrote is seen; every test has the same seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def through_triton(monkeypatch):
    """CPU tensors take the kernels, as CUDA tensors do."""
    monkeypatch.setattr(kernels, "TRITON", frozenset(("cpu", dtype) for dtype in DTYPES))


def tables(positions, d):
    """cos and sin for the positions, head width d and base 10,000."""
    return MiMo(ModelConfig(n_layer=1, head_dim=d)).rope_at(None, positions)


def randn(*shape, dtype=torch.float32, grad=True, gen=None):
    return torch.randn(shape, generator=gen).to(dtype).requires_grad_(grad)


def close(got, want, bar, what=""):
    # the floor is for gradients that are exactly 0, as dq and dk of a token that sees itself alone
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(0.1)
    assert error <= bar, f"{what}: relative error {error:.2e} over {bar}"


def compare(f, reference, inputs, bar):
    """Outputs and gradients of f against the same formula in fp64."""
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    got, want = f(*inputs), reference(*exact)
    got, want = (o if isinstance(o, tuple) else (o,) for o in (got, want))
    grads = [torch.randn(o.shape).to(o.dtype) for o in got]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        close(g, w, bar, f"output {i}")
    needs = [i for i, t in enumerate(inputs) if t.requires_grad]
    dgot = torch.autograd.grad(got, [inputs[i] for i in needs], grads)
    dwant = torch.autograd.grad(want, [exact[i] for i in needs], [g.double() for g in grads])
    for i, g, w in zip(needs, dgot, dwant, strict=True):
        close(g, w, bar, f"gradient {i}")


def exact_attention(q, k, v, bounds=None):
    """The textbook formula, nothing shared with either implementation."""
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(G, 2) for t in (k, v))
    at = torch.arange(T)
    see = (at[None, :] <= at[:, None])[None]
    if bounds is not None:
        see = see & (at >= bounds[0][:, :, None])
    s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", s.masked_fill(~see[:, None], -torch.inf).softmax(-1), v)


def attend(q, k, v, bounds=None):
    return A.attention_op(q, k, v, bounds)[0]


# B, T, H, K, d, tiles, document starts: ragged T, all group sizes, both tile shapes, cuts inside and on tile edges
SHAPES = [(1, 1, 2, 1, 16, (16, 16), None), (1, 48, 4, 4, 16, (16, 16), None),
          (1, 77, 4, 2, 32, (32, 16), None), (1, 40, 2, 1, 16, (16, 32), [0, 1, 2, 16, 17, 33, 40]),
          (2, 33, 2, 2, 16, (32, 16), [0, 5, 33, 50, 66]), (1, 70, 1, 1, 64, (32, 32), [0, 3, 64, 70]),
          (1, 128, 2, 1, 128, (128, 64), None)]


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:5])))
def test_attention(shape, dtype, monkeypatch):
    B, T, H, K, d, tiles, cuts = shape
    if dtype in (torch.float16, torch.float64) and T not in (77, 33):
        pytest.skip("two shapes are enough for this dtype")
    monkeypatch.setattr(A, "CPU_TILES", (*tiles, 4, 1))
    torch.manual_seed(T)
    bounds = A.doc_bounds(torch.tensor(cuts), B, T) if cuts else None
    q, k, v = (randn(B, T, n, d, dtype=dtype) for n in (H, K, K))
    compare(lambda *t: attend(*t, bounds), lambda *t: exact_attention(*t, bounds), (q, k, v), DTYPES[dtype])


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 30))])
def test_attention_on_random_shapes(seed, monkeypatch):
    """Random T, groups, documents (length 1 too), tiles; NaN rows lie past the end of q, k, v in memory."""
    draw, gen = random.Random(seed), torch.manual_seed(seed)          # compare() draws the output's gradient too
    B, T, K, G = draw.choice([1, 2]), draw.randrange(1, 50), draw.choice([1, 2]), draw.choice([1, 2, 4])
    d = 16
    if B * K * G > 4:
        B, K = 1, 1
    monkeypatch.setattr(A, "CPU_TILES", (*draw.choice([(16, 16), (32, 16), (16, 32), (32, 32)]), 4, 1))
    cuts = sorted({0, B * T, *(draw.randrange(B * T) for _ in range(draw.randrange(6)))})
    bounds = A.doc_bounds(torch.tensor(cuts), B, T) if draw.random() < 0.8 else None
    inputs = []
    for n in (K * G, K, K):
        memory = torch.full((B, T + 5, n, d), torch.nan)
        memory[:, :T] = torch.randn((B, T, n, d), generator=gen)
        inputs.append(memory[:, :T].requires_grad_())
    compare(lambda *t: attend(*t, bounds), lambda *t: exact_attention(*t, bounds), inputs, 1e-5)


def test_attention_is_causal_to_the_bit_and_repeats_to_the_bit():
    """A changed token j leaves every output before j as it was, and what follows its document too."""
    torch.manual_seed(0)
    T, j = 45, 20
    bounds = A.doc_bounds(torch.tensor([0, 10, 35, T]), 1, T)
    q, k, v = (randn(1, T, 2, 16, grad=False) for _ in range(3))
    before = attend(q, k, v, bounds)
    assert torch.equal(before, attend(q, k, v, bounds))
    for t in (q, k, v):
        t[:, j] += 1
    after = attend(q, k, v, bounds)
    assert torch.equal(before[:, :j], after[:, :j]) and torch.equal(before[:, 35:], after[:, 35:])
    assert not torch.equal(before[:, j:35], after[:, j:35])


def test_attention_gradcheck(monkeypatch):
    monkeypatch.setattr(A, "CPU_TILES", (16, 16, 4, 1))
    bounds = A.doc_bounds(torch.tensor([0, 4, 9]), 1, 9)
    inputs = tuple(randn(1, 9, n, 16, dtype=torch.float64) for n in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda *t: attend(*t, bounds), inputs, fast_mode=True)


@dtypes
@pytest.mark.parametrize("Q", [1, 4, 8])
def test_decode(Q, dtype):
    """Paged cache in shuffled blocks, NaN in every slot past the end; three splits, some of them empty."""
    torch.manual_seed(Q)
    B, H, K, d, block, lengths = 3, 4, 2, 16, 16, torch.tensor([90, 37, Q], dtype=torch.int32)
    table = torch.randperm(B * 6).view(B, 6).int()
    k, v = (randn(B * 6, K, block, d, dtype=dtype, grad=False).transpose(1, 2) for _ in range(2))
    q = randn(B, Q, H, d, dtype=dtype, grad=False)
    want = D.decode_reference(q.double(), k.double(), v.double(), table, lengths)
    for b, n in enumerate(lengths.tolist()):
        for at in range(n, 96):
            k[table[b, at // 16], at % 16] = v[table[b, at // 16], at % 16] = torch.nan
    close(D.decode_op(q, k, v, table, lengths, 3), want, DTYPES[dtype])


def test_decode_blocks_as_long_as_a_tile_and_sequences_of_nothing():
    """One block per sequence takes the single look-up; length 0 gives 0; idle splits change nothing."""
    torch.manual_seed(0)
    k, v, q = randn(2, 64, 1, 16, grad=False), randn(2, 64, 1, 16, grad=False), randn(2, 2, 4, 16, grad=False)
    table, lengths = torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([50, 0], dtype=torch.int32)
    one, many = (D.decode_op(q, k, v, table, lengths, splits) for splits in (1, 5))
    close(one, D.decode_reference(q, k, v, table, lengths), 1e-5)
    close(many, one, 1e-5)
    assert torch.equal(one[1], torch.zeros(2, 4, 16))


def test_a_row_does_not_depend_on_the_tokens_after_it():
    """Verifying four tokens gives each the bits it has as the last of one: where keys are split depends on shapes."""
    torch.manual_seed(0)
    k, v, q = randn(8, 16, 1, 16, grad=False), randn(8, 16, 1, 16, grad=False), randn(1, 4, 4, 16, grad=False)
    table = torch.arange(8, dtype=torch.int32)[None]
    for n in (61, 63, 64, 97):
        four = D.decode_op(q, k, v, table, torch.tensor([n + 3], dtype=torch.int32), 3)
        one = D.decode_op(q[:, :1], k, v, table, torch.tensor([n], dtype=torch.int32), 3)
        assert torch.equal(four[:, :1], one)


# 16 rows at once in bf16, as on a GPU; in the other dtypes under slow
@pytest.mark.parametrize("M, K, dtype", [
    pytest.param(M, K, dtype, id=f"{M}-{K}-{str(dtype)[6:]}",
                 marks=pytest.mark.slow if M == 16 and dtype is not torch.bfloat16 else ())
    for M, K in ((1, 64), (5, 48), (16, 80)) for dtype in DTYPES])
def test_gemv(M, K, dtype):
    """One weight with a residual, three with biases, SwiGLU; K that is no multiple of the tile."""
    torch.manual_seed(M)
    weights = [randn(n, K, dtype=dtype, grad=False) * K**-0.5 for n in (64, 32, 32)]
    biases = [randn(n, dtype=dtype, grad=False) for n in (64, 32, 32)]
    x, residual = randn(M, K, dtype=dtype, grad=False), randn(M, 64, dtype=dtype, grad=False)
    exact = {"residual": residual.double(), "biases": [b.double() for b in biases]}
    for ws, form in ((weights[:1], dict(residual=residual)), (weights, dict(biases=biases)),
                     (weights[1:], dict(glu=True))):
        got = G.gemv(x, ws, **form)
        want = G.gemv_reference(x.double(), [w.double() for w in ws], **{k: exact.get(k, v) for k, v in form.items()})
        close(got, want, DTYPES[dtype])
        for i in range(M):                                           # a row alone has the same bits
            one = form | ({"residual": residual[i:i + 1]} if "residual" in form else {})
            assert torch.equal(G.gemv(x[i:i + 1], ws, **one), got[i:i + 1])


def test_gemv_refuses_what_its_tiles_cannot_cut():
    with pytest.raises(ValueError, match="multiples of 16 rows"):
        G.gemv(torch.zeros(1, 32), [torch.zeros(24, 32)])
    with pytest.raises(ValueError, match="at most 16"):
        G.gemv(torch.zeros(17, 32), [torch.zeros(32, 32)])


@pytest.mark.parametrize("B, Q, bias", [(3, 1, True), (3, 4, True), (1, 1, False), (1, 4, True)])
def test_block_step_equals_the_block(B, Q, bias, through_triton):
    """A whole block over a cache in blocks, and what it leaves in the cache."""
    torch.manual_seed(Q)
    cfg = ModelConfig(n_layer=1, d_model=64, n_head=4, n_kv_head=2, head_dim=16, d_ff=96, qkv_bias=bias)
    model = MiMo(cfg).requires_grad_(False)
    block = model.layers[0]
    for p in block.parameters():
        p.normal_(0, 0.3)
    caches, outputs = [], []
    for fused in (True, False):
        cache = GraphRunner(model, slots=3, columns=64, n_draft=0, n_blocks=12, block=16, n_ids=64, draft_ids=64,
                            prefill_tokens=64)
        cache.refresh()
        cache.kv.copy_(randn(*cache.kv.shape, grad=False, gen=torch.Generator().manual_seed(1)))
        for row in range(3):
            cache.map_row(row, range(4 * row + 1, 4 * row + 5))
        positions = torch.tensor([[5], [30], [17]])[:B] + torch.arange(Q)
        layer = cache.layers[0]
        cos, sin = tables(positions, 16)
        layer.ctx = cache.context(0, positions)
        x = randn(B, Q, 64, grad=False, gen=torch.Generator().manual_seed(2))
        assert G.gemv_applies(block, B, Q)
        outputs.append(G.block_step(block, x, cos, sin, layer) if fused else block(x, cos, sin, None, layer))
        caches.append(cache.kv)
    close(outputs[0], outputs[1], 1e-5)
    close(caches[0], caches[1], 1e-6)


@dtypes
def test_linear_cross_entropy(dtype, through_triton):
    """37 rows in chunks of 16, a vocabulary that is no multiple of anything, two ignored targets."""
    torch.manual_seed(0)
    x, weight, targets = randn(37, 16, dtype=dtype), randn(333, 16, dtype=dtype), torch.randint(0, 333, (37,))
    targets[[3, 36]] = -100
    compare(lambda *t: L.linear_cross_entropy(*t, targets, chunk=16),
            lambda *t: F.cross_entropy(t[0] @ t[1].T, targets, reduction="sum"), (x, weight), DTYPES[dtype])


@dtypes
def test_logprob_entropy(dtype, through_triton):
    torch.manual_seed(0)
    x, weight, targets = randn(21, 16, dtype=dtype), randn(333, 16, dtype=dtype), torch.randint(0, 333, (21,))
    logp, entropy = L.logprob_entropy(x, weight, targets, chunk=8)
    exact = torch.distributions.Categorical(logits=x.double() @ weight.double().T)
    close(entropy, exact.entropy(), max(1e-12, DTYPES[dtype] if dtype == torch.float64 else 1e-5), "entropy")
    compare(lambda *t: L.logprob_entropy(*t, targets, chunk=8)[0],
            lambda *t: (t[0] @ t[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0], (x, weight), DTYPES[dtype])


def test_head_kernels_loop_over_column_blocks(through_triton, monkeypatch):
    """A row longer than one block, with a block of -inf logits among them, and in place in bf16."""
    monkeypatch.setattr(L, "CONFIGS", [(64, 4)])
    z = torch.randn(3, 200)
    z[:, :64] = -torch.inf
    targets = torch.tensor([70, 199, -100])
    exact = z.double().requires_grad_()
    nll = F.cross_entropy(exact, targets, reduction="none")
    (want,) = torch.autograd.grad(nll.sum(), exact)
    got, dz = L.cross_entropy_(z.clone(), targets, torch.bfloat16)
    close(got, nll, 1e-5)
    close(dz, want, 6e-3)
    logp, entropy, _ = L.logprob_(z, targets)
    close(logp, -nll, 1e-5)
    p = z.double().softmax(-1)
    close(entropy, -p.xlogy(p).sum(-1), 1e-5)


@dtypes
def test_rmsnorm(dtype, through_triton):
    torch.manual_seed(0)
    x, r, w = randn(2, 5, 48, dtype=dtype), randn(2, 5, 48, dtype=dtype), randn(48, dtype=dtype)
    exact = lambda x, w: reference.rmsnorm(x, w, 1e-5)
    compare(lambda x, w: N.rmsnorm(x, w, 1e-5), exact, (x, w), DTYPES[dtype])
    compare(lambda x, r, w: N.rmsnorm_residual(x, w, 1e-5, r), lambda x, r, w: (exact(x + r, w), x + r), (x, r, w),
            DTYPES[dtype])


@dtypes
def test_swiglu_of_the_halves_of_one_projection(dtype, through_triton):
    torch.manual_seed(0)
    both = randn(3, 2 * 1100, dtype=dtype)
    compare(lambda t: S.swiglu(*t.chunk(2, -1)), lambda t: F.silu(t[:, :1100]) * t[:, 1100:], (both,), DTYPES[dtype])


@dtypes
def test_rope_with_positions_per_document(dtype, through_triton):
    torch.manual_seed(0)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    cos, sin = tables(positions, 16)
    q, k = randn(2, 5, 3, 16, dtype=dtype), randn(2, 5, 1, 16, dtype=dtype)
    exact = lambda t: reference.rope(t, t, cos.double(), sin.double())[0]
    compare(lambda q, k: R.rope(q, k, cos, sin), lambda q, k: (exact(q), exact(k)), (q, k), DTYPES[dtype])


def operator_calls():
    """Each registered operator with arguments it accepts."""
    torch.manual_seed(0)
    q, k, v = randn(1, 9, 2, 16), randn(1, 9, 1, 16), randn(1, 9, 1, 16)
    bounds = A.doc_bounds(torch.tensor([0, 4, 9]), 1, 9)
    o, lse = (t.detach() for t in A.attention_op(q, k, v, bounds))
    cos, sin = tables(torch.arange(9)[None], 16)
    x, w, s = randn(5, 16), randn(16), randn(5, 16)
    head, targets = randn(33, 16), torch.arange(5)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    plain = [t.detach() for t in (q, k, v, x, w, s, head)]
    return {
        "attention": (A.attention_op, (q, k, v, bounds)),
        "attention_backward": (A.attention_backward_op, (*plain[:3], bounds, o, lse, torch.ones_like(o))),
        "decode": (D.decode_op, (plain[0][:, :1], plain[1], plain[2], table, lengths, 2)),
        "loss": (L.loss_op, (x, head, targets, 4, True, True)),
        "logprob": (L.logprob_op, (x, head, targets, 4)),
        "logprob_backward": (L.logprob_backward_op, (plain[3], plain[6], targets, torch.ones(5), torch.ones(5), 4)),
        "rmsnorm": (N.norm_op, (x, s, w, 1e-5)),
        "rmsnorm_backward": (N.norm_backward_op, (plain[3], plain[4], torch.ones(5), plain[5], None)),
        "swiglu": (S.swiglu_op, (x, s)),
        "swiglu_backward": (S.swiglu_backward_op, (plain[3], plain[5], plain[3])),
        "rope": (R.rope_op, (q, k, cos, sin, 1.0)),
    }


OPERATORS = ["attention", "attention_backward", "decode", "loss", "logprob", "logprob_backward", "rmsnorm",
             "rmsnorm_backward", "swiglu", "swiglu_backward", "rope"]


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, through_triton):
    """Schema, fake tensors, autograd registration and AOT dispatch of every operator."""
    op, args = operator_calls()[name]
    torch.library.opcheck(op, args)


def test_torch_compile_without_a_graph_break(through_triton):
    """Attention, norm, RoPE and loss in one full graph, forward and backward, give what eager gives."""
    torch.manual_seed(0)
    x, w, head = randn(1, 9, 32), randn(32), randn(33, 32)
    cos, sin = tables(torch.arange(9)[None], 16)

    def f(x, w, head):
        h = N.rmsnorm(x, w).view(1, 9, 2, 16)
        q, k = R.rope(h, h, cos, sin)
        return L.linear_cross_entropy(A.attention(q, k, h).flatten(0, 1).flatten(1), head, torch.arange(9))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(x, w, head), (x, w, head)),
                         torch.autograd.grad(f(x, w, head), (x, w, head)), strict=True):
        torch.testing.assert_close(got, want)


def test_offsets_beyond_32_bits(tmp_path):
    """Cache block 2 lies over 2^31 elements behind block 0: 32-bit offsets would wrap. The file is sparse."""
    stride = 2**30 + 2**10
    size = 2 * stride + 16 * 16
    memory = torch.from_file(str(tmp_path / "cache"), shared=True, size=size, dtype=torch.float16)
    cache = memory.as_strided((3, 16, 1, 16), (stride, 16, 16, 1))
    cache[2] = torch.randn(16, 1, 16)
    q, table, lengths = torch.randn(1, 1, 2, 16).half(), torch.tensor([[2]]).int(), torch.tensor([11]).int()
    got = D.decode_op(q, cache, cache, table, lengths, 1)
    small = cache[2:].clone()
    close(got, D.decode_reference(q.double(), small.double(), small.double(), table * 0, lengths), 2e-3)


def test_bfloat16_repair_rounds_to_nearest_even(through_triton):
    """A copy through a kernel (swiglu at gate 30, where silu is the identity) rounds as torch does."""
    up = torch.randn(1, 1024)
    gate = torch.ones(1, 1024)
    exact = (F.silu(gate.double()) * up.bfloat16().double())
    got = S.swiglu(gate.bfloat16(), up.bfloat16())
    assert torch.equal(got, exact.float().bfloat16())


def test_cpu_tensors_do_not_touch_the_operators(monkeypatch):
    """Without NANOMIMO_TRITON a CPU call is plain torch."""
    def never(*args):
        raise AssertionError("a CPU tensor reached a custom operator")
    for module, name in ((A, "attention_op"), (D, "decode_op"), (L, "loss_op"), (L, "logprob_op"),
                         (N, "norm_op"), (S, "swiglu_op"), (R, "rope_op")):
        monkeypatch.setattr(module, name, never)
    x, q = torch.randn(3, 16), torch.randn(1, 3, 1, 16)
    A.attention(q, q, q)
    D.decode_attention(q, q, q, torch.tensor([[0]]).int(), torch.tensor([3]).int())
    L.linear_cross_entropy(x, x, torch.arange(3))
    L.logprob_entropy(x, x, torch.arange(3))
    N.rmsnorm(x, x[0])
    S.swiglu(x, x)
    R.rope(q, q, *tables(torch.arange(3), 16))


def train(steps=20):
    """A tiny model with one MTP layer on one packed row: losses of 20 AdamW steps."""
    torch.manual_seed(0)
    model = mtp.build(ModelConfig(vocab_size=48, n_layer=1, d_model=32, n_head=2, n_kv_head=1, head_dim=16,
                                  d_ff=48, max_seq_len=16))
    model.init_weights(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    ids = torch.randint(0, 48, (1, 14))
    bounds = A.doc_bounds(torch.tensor([0, 5, 12]), 1, 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    losses = []
    for _ in range(steps):
        h = model(ids[:, :12], positions, bounds)
        loss = L.linear_cross_entropy(model.norm(h).flatten(0, 1), model.lm_head.weight, ids[0, 1:13])
        cos, sin = model.rope_at(ids[:, :12], positions)
        z = model.mtp_layers[0](h, model.embed_tokens(ids[:, 1:13]), cos, sin, bounds)
        z = model.mtp_layers[0].final_layernorm(z).flatten(0, 1)
        loss = loss + 0.3 * L.linear_cross_entropy(z, model.lm_head.weight, ids[0, 2:14])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_training_steps_equal_the_reference_run(monkeypatch, steps):
    reference = train()
    monkeypatch.setattr(kernels, "TRITON", frozenset({("cpu", torch.float32)}))
    assert train(steps) == pytest.approx(reference[:steps], rel=1e-4)
    assert reference[-1] < reference[0] * 0.7


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_builds_ahead_of_time_spill_nothing():
    """Default configurations at the 7B shapes, compared with the table of this triton version."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NANOMIMO_TRITON")}
    run = subprocess.run([sys.executable, "bench/kernel_builds.py", "--quick"], cwd=ROOT, env=env, text=True,
                         capture_output=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_spill_and_a_regression_are_faults(monkeypatch):
    """The judgement of bench/kernel_builds.py on made-up builds, good and bad."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from kernel_builds import faults
    good = dict(regs=200, stack=0, shared=1000, matrix=8, bulk=4, wgmma=8)
    stored = {k: str(v) for k, v in good.items()}
    assert not faults(good, 90, True, stored)
    assert faults(good | dict(stack=8), 90, True, None) == ["spills 8 bytes"]
    assert "limit" in faults(good | dict(shared=232_449), 90, True, None)[0]
    assert faults(good | dict(wgmma=0), 90, True, None) == ["no wgmma"]
    assert faults(good | dict(regs=201), 90, True, stored) == ["regs 200 -> 201"]
    assert faults(good | dict(bulk=3), 90, True, stored) == ["bulk 4 -> 3"]
