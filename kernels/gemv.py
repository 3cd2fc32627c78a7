"""
Products of a few rows with a large weight, for decoding, with bias, residual or SwiGLU in the same kernel.

    y = x W^T [ + bias ] [ + residual ]            x [M, K], M <= 16 rows; W [N, K]
    y = silu(x Wgate^T) * (x Wup^T)

A decode step of one sequence multiplies one row with every weight: 2 operations per weight of 2 bytes, so the time is
that of reading the weights once (14.0 GB at 7B), if the kernels between the products take none. Each program owns BN
rows of W and walks along K in tiles; the next tile is loaded while the one before is multiplied. The x rows are padded
to 16, the tensor core's smallest width, so that verifying four tokens reads what one reads.

A row's numbers do not depend on the other rows: the tile has one shape for every M, and no sum crosses rows. So with
kernels.decode, whose split of the keys depends on shapes alone, up to four sequences with three drafts each come out
the same, bit for bit, with and without the drafts. The report's engine is vLLM; this kernel is ours.

Tried on an H200 and left out (docs/lab_log.md): the norm inside, as (x * g) W^T / rms with the squares summed beside
the product, which doubled the time of gate and up; plain multiply-adds for 1 to 4 rows, no faster for one row and three
times slower for four.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels import acc_type, jit, tl, tune
from kernels.decode import HEAD_DIMS, decode_attention
from kernels.rmsnorm import rmsnorm, rmsnorm_residual
from kernels.rope import rope_store

ROWS = 16                                               # most rows of x
# (BN rows of W, BK columns, warps, stages)
CONFIGS = [(16, 256, 1, 4), (64, 128, 4, 4), (32, 256, 4, 4), (16, 256, 2, 5), (32, 128, 2, 5)]
CPU_TILE = (16, 32, 1, 1)


@jit
def pick(n, w0, w1, w2, N0, N1, PARTS: tl.constexpr):
    """Column n of three weights that lie side by side -> (its weight or bias, its row there)."""
    w = w0
    at = n
    if PARTS == 3:
        if n >= N0 + N1:
            w = w2
            at = n - N0 - N1
        elif n >= N0:
            w = w1
            at = n - N0
    return w, at


@jit
def gemv_kernel(x, w0, w1, w2, b0, b1, b2, residual, y, M, K, N0, N1, N, PARTS: tl.constexpr, BIAS: tl.constexpr,
                GLU: tl.constexpr, RES: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr, ACC: tl.constexpr):
    """One program: BN columns of y. With PARTS = 3 the weights w0 [N0,K], w1 [N1,K] and w2 lie below each other."""
    n = tl.program_id(0) * BN
    w, at = pick(n, w0, w1, w2, N0, N1, PARTS)
    b, at = pick(n, b0, b1, b2, N0, N1, PARTS)
    rows, cols, k = tl.arange(0, ROWS), tl.arange(0, BN), tl.arange(0, BK)
    live = (rows < M)[:, None]
    place = (at + cols).to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros([BN, ROWS], ACC)
    up = tl.zeros([BN, ROWS], ACC)
    for k0 in tl.range(0, K, BK):
        inside = (k0 + k < K)[None, :] | EVEN
        wt = tl.load(w + place + k0, mask=inside, other=0.0)
        xt = tl.load(x + rows[:, None] * K + (k0 + k)[None, :], mask=live & inside, other=0.0)
        acc = tl.dot(wt, tl.trans(xt), acc, out_dtype=ACC, input_precision="ieee")       # [BN, ROWS]
        if GLU:
            ut = tl.load(w1 + place + k0, mask=inside, other=0.0)
            up = tl.dot(ut, tl.trans(xt), up, out_dtype=ACC, input_precision="ieee")
    if BIAS:
        acc += tl.load(b + at + cols).to(ACC)[:, None]
    if GLU:
        acc = acc / (1 + tl.exp(-acc)) * up
    to = rows.to(tl.int64)[None, :] * N + n + cols[:, None]
    if RES:
        acc += tl.load(residual + to, mask=(rows < M)[None, :], other=0.0).to(ACC)
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=(rows < M)[None, :])


def gemv(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None = None, residual: Tensor | None = None,
         glu: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """
    x [M,K] contiguous, M <= 16 -> y [M,N], where N is the rows of all weights together (with glu: of one).

    weights: one; or three whose products lie side by side in y; or with glu two, (gate, up); each [N_i,K] contiguous.
    biases: one for each weight, [N_i]. residual [M,N]. dtype: of y, default that of x. No gradients. ValueError where M
    or N_i do not fit the kernel's tile.

    By hand: x = (1, 2) and the row (3, 4) of W give 11, with bias 1 and residual 5: 17.
    """
    (M, K), N = x.shape, weights[0].shape[0] if glu else sum(w.shape[0] for w in weights)
    y = torch.empty((M, N), dtype=dtype or x.dtype, device=x.device)
    w, b = [*weights, *weights[:1] * 2][:3], [*(biases or weights), *weights[:1] * 2][:3]
    parts = 1 if glu else len(weights)
    if M > ROWS or parts not in (1, 3) or any(t.shape[0] % 16 for t in weights):
        raise ValueError(f"gemv: {M} rows should be at most {ROWS}, weights {[tuple(t.shape) for t in weights]} "
                         "one or three with multiples of 16 rows")

    def launch(config):
        BN, BK, warps, stages = config
        gemv_kernel[(N // BN,)](x, *w, *b, residual if residual is not None else x, y, M, K, w[0].shape[0],
                                w[1].shape[0], N, PARTS=parts, BIAS=biases is not None, GLU=glu,
                                RES=residual is not None, EVEN=K % BK == 0, ROWS=ROWS, BN=BN, BK=BK,
                                ACC=acc_type(x), num_warps=warps, num_stages=stages)

    small = x.device.type == "cpu" or x.dtype == torch.float32
    fit = [c for c in CONFIGS if all(t.shape[0] % c[0] == 0 for t in weights)]
    launch(tune(("gemv", x.dtype, K, N, glu), [CPU_TILE] if small else fit, launch))
    return y


def gemv_reference(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None = None,
                   residual: Tensor | None = None, glu: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """The same in plain torch, for any number of rows; shapes of gemv."""
    y = [F.linear(x, w, biases[i] if biases else None) for i, w in enumerate(weights)]
    y = F.silu(y[0]) * y[1] if glu else torch.cat(y, -1)
    return (y if residual is None else y + residual).to(dtype or x.dtype)


# ---- Block.forward for at most 16 rows on a GPU ---------------------------------------------------------------------

# Why a second forward: a decode step of few rows spends much of its time on starting kernels. model.Block.forward
# launches sixteen, block_step nine: norm; q, k, v; RoPE and cache; two of attention; o; norm; gate and up; down. The
# function is the same. Prefill, larger batches, --plain and the CPU take model.Block.forward.

def gemv_applies(block: nn.Module, B: int, Q: int) -> bool:
    """True if block_step may run B sequences of Q tokens: on a GPU in 16 bits, few rows, widths of whole tiles."""
    w, a = block.mlp.gate_proj.weight, block.self_attn
    outputs = (a.q_proj, a.k_proj, a.o_proj, block.mlp.gate_proj)
    return (B * Q <= ROWS and Q <= 8 and (w.device.type, w.dtype) in kernels.TRITON
            and (not w.is_cuda or w.element_size() == 2) and a.head_dim in HEAD_DIMS
            and not any(p.out_features % 16 for p in outputs))


def block_step(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, cache: object) -> Tensor:
    """
    What block(x, cos, sin, None, cache) computes, for a model.Block and a cache.BlockLayer: x [B,Q,D], B Q <= 16, cos
    and sin [B,Q,d] -> [B,Q,D]. Equal up to rounding: gate and up stay in fp32 until their product.
    """
    a, mlp, shape, ctx = block.self_attn, block.mlp, x.shape, cache.ctx
    x = x.reshape(-1, shape[-1])                                                    # [N,D], N = B Q
    norm, qkv = block.input_layernorm, (a.q_proj, a.k_proj, a.v_proj)
    biases = None if a.q_proj.bias is None else [p.bias for p in qkv]
    qkv = gemv(rmsnorm(x, norm.weight, norm.eps), [p.weight for p in qkv], biases)     # [N,(H+2K)d]
    q = rope_store(qkv, cos.flatten(0, 1), sin.flatten(0, 1), cache.k, cache.v, ctx.slot_mapping)   # [N,H,d]
    o = decode_attention(q.view(*shape[:2], *q.shape[1:]), cache.k, cache.v, ctx.block_table, ctx.lengths)
    norm, o = block.post_attention_layernorm, gemv(o.view(len(x), -1), [a.o_proj.weight])
    y, x = rmsnorm_residual(o, norm.weight, norm.eps, x)
    h = gemv(y, [mlp.gate_proj.weight, mlp.up_proj.weight], glu=True)                               # [N,F]
    return gemv(h, [mlp.down_proj.weight], residual=x).view(shape)
