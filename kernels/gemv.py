"""
Products of a few rows with a large weight, for decoding: norm before, residual or SwiGLU after, in one kernel.

    y = [ norm(x) ] W^T [ + bias ] [ + residual ]            x [M, K], M <= 16 rows; W [N, K]
    y = silu(norm(x) Wgate^T) * (norm(x) Wup^T)

A decode step of one sequence multiplies one row with every weight: 2 operations per weight of 2 bytes, so the time
is that of reading the weights once (14.0 GB at 7B), if the kernels between the products take none. A block is
seven kernels here (norm and q, k, v; RoPE and cache; two of attention; o; norm, gate and up; down) where
model.py's takes sixteen. Each program owns BN rows of W and walks along K. The tensor cores' smallest tile has 16
rows, so verifying four tokens reads what one reads. Narrow products of one sequence (q, k, v, o, down) take plain
multiply-adds instead, which can be cut into more and smaller programs.

The norm costs no pass of its own: with x_i scaled by the gain g alone,

    norm(x) W^T = (x * g) W^T / sqrt(mean(x^2) + eps)

the sum of squares is collected beside the product and divides at the end.

A row's numbers do not depend on the other rows: tiles have one shape for every M, and no sum crosses rows. So
with kernels.decode, whose split of the keys depends on shapes alone, up to four sequences with three drafts each
come out the same, bit for bit, with and without the drafts. The report's engine is vLLM; this kernel is ours.
"""
import torch
import torch.nn.functional as F

from kernels import acc_type, jit, tl, tune, use_triton
from kernels.decode import HEAD_DIMS, decode_attention
from kernels.rope import rope_store

MOST_ROWS = 16
# tensor cores: (BN rows of W, BK columns, warps, stages); multiply-adds: (BN, BK, warps, unrolled)
CONFIGS = [(32, 256, 4, 4), (16, 256, 1, 4), (16, 256, 2, 5), (32, 128, 2, 5), (64, 128, 4, 4)]
FEW_CONFIGS = [(4, 512, 4, 2), (8, 256, 4, 4), (4, 1024, 4, 1), (2, 1024, 4, 2), (4, 256, 2, 2)]
CPU_TILE = (16, 32, 1, 1)


@jit
def pick(n, w0, w1, w2, N0, N1, PARTS: tl.constexpr):
    """Column n of three weights lying side by side -> (its weight or bias, its row there)."""
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
def few_step(x, at, inside, g, wt, acc, squares, NORM: tl.constexpr, ACC: tl.constexpr):
    """One row of x times one tile of W."""
    xt = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    if NORM:
        squares += xt * xt
        xt = xt * g
    acc += wt * xt[None, :]
    return acc, squares


@jit
def few_end(acc, squares, bias, residual, y, to, K, EPS, NORM: tl.constexpr, RES: tl.constexpr, ACC: tl.constexpr):
    out = tl.sum(acc, 1)
    if NORM:
        out = out * tl.rsqrt(tl.sum(squares, 0) / K + EPS)
    out += bias
    if RES:
        out += tl.load(residual + to).to(ACC)
    tl.store(y + to, out.to(y.dtype.element_ty))


@jit
def few_kernel(x, gain, w0, w1, w2, b0, b1, b2, residual, y, K, N0, N1, N, EPS, M: tl.constexpr, NORM: tl.constexpr,
               PARTS: tl.constexpr, BIAS: tl.constexpr, RES: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr):
    """gemv_kernel for M = 1..4 rows by multiply-adds: W never leaves registers, and programs can be small and many."""
    n = tl.program_id(0) * BN
    w, at = pick(n, w0, w1, w2, N0, N1, PARTS)
    b, at = pick(n, b0, b1, b2, N0, N1, PARTS)
    cols, k = tl.arange(0, BN), tl.arange(0, BK)
    place = (at + cols).to(tl.int64)[:, None] * K + k[None, :]
    acc0, s0 = tl.zeros([BN, BK], ACC), tl.zeros([BK], ACC)
    acc1, acc2, acc3, s1, s2, s3 = acc0, acc0, acc0, s0, s0, s0
    for k0 in tl.range(0, K, BK, loop_unroll_factor=UNROLL):
        inside = k0 + k < K
        g = 0.0
        if EVEN:
            wt = tl.load(w + place + k0).to(ACC)
        else:
            wt = tl.load(w + place + k0, mask=inside[None, :], other=0.0).to(ACC)
        if NORM:
            g = tl.load(gain + k0 + k, mask=inside, other=0.0).to(ACC)
        acc0, s0 = few_step(x, k0 + k, inside, g, wt, acc0, s0, NORM, ACC)
        if M > 1:
            acc1, s1 = few_step(x + K, k0 + k, inside, g, wt, acc1, s1, NORM, ACC)
        if M > 2:
            acc2, s2 = few_step(x + 2 * K, k0 + k, inside, g, wt, acc2, s2, NORM, ACC)
        if M > 3:
            acc3, s3 = few_step(x + 3 * K, k0 + k, inside, g, wt, acc3, s3, NORM, ACC)
    bias = 0.0
    if BIAS:
        bias = tl.load(b + at + cols).to(ACC)
    to = n + cols
    few_end(acc0, s0, bias, residual, y, to, K, EPS, NORM, RES, ACC)
    if M > 1:
        few_end(acc1, s1, bias, residual, y, N + to, K, EPS, NORM, RES, ACC)
    if M > 2:
        few_end(acc2, s2, bias, residual, y, 2 * N + to, K, EPS, NORM, RES, ACC)
    if M > 3:
        few_end(acc3, s3, bias, residual, y, 3 * N + to, K, EPS, NORM, RES, ACC)


@jit
def gemv_kernel(x, gain, w0, w1, w2, b0, b1, b2, residual, y, M, K, N0, N1, N, EPS, NORM: tl.constexpr,
                PARTS: tl.constexpr, BIAS: tl.constexpr, GLU: tl.constexpr, RES: tl.constexpr,
                EVEN: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
    """One program: BN columns of y. PARTS 3: the weights w0 [N0,K], w1 [N1,K], w2 lie below each other."""
    n = tl.program_id(0) * BN
    w, at = pick(n, w0, w1, w2, N0, N1, PARTS)
    b, at = pick(n, b0, b1, b2, N0, N1, PARTS)
    rows, cols, k = tl.arange(0, ROWS), tl.arange(0, BN), tl.arange(0, BK)
    live = rows < M
    place = (at + cols).to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros([BN, ROWS], ACC)
    up = tl.zeros([BN, ROWS], ACC)
    squares = tl.zeros([ROWS], ACC)
    for k0 in tl.range(0, K, BK):
        inside = k0 + k < K
        if EVEN:
            wt = tl.load(w + place + k0)
            xt = tl.load(x + rows[:, None] * K + (k0 + k)[None, :], mask=live[:, None], other=0.0)
        else:
            wt = tl.load(w + place + k0, mask=inside[None, :], other=0.0)
            xt = tl.load(x + rows[:, None] * K + (k0 + k)[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if NORM:
            wide = xt.to(ACC)
            squares += tl.sum(wide * wide, 1)
            g = tl.load(gain + k0 + k, mask=inside, other=0.0).to(ACC)
            xt = (wide * g[None, :]).to(xt.dtype)
        acc = tl.dot(wt, tl.trans(xt), acc, out_dtype=ACC, input_precision="ieee")  # [BN, ROWS]
        if GLU:
            if EVEN:
                ut = tl.load(w1 + place + k0)
            else:
                ut = tl.load(w1 + place + k0, mask=inside[None, :], other=0.0)
            up = tl.dot(ut, tl.trans(xt), up, out_dtype=ACC, input_precision="ieee")
    if NORM:
        r = tl.rsqrt(squares / K + EPS)[None, :]
        acc = acc * r
        up = up * r
    if BIAS:
        acc += tl.load(b + at + cols).to(ACC)[:, None]
    if GLU:
        acc = acc / (1 + tl.exp(-acc)) * up
    to = rows.to(tl.int64)[None, :] * N + n + cols[:, None]
    if RES:
        acc += tl.load(residual + to, mask=live[None, :], other=0.0).to(ACC)
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=live[None, :])


def gemv(x, weights, biases=None, norm=None, residual=None, glu=False, dtype=None, few=False):
    """
    x [M,K] contiguous, M <= 16 -> [M,N], N the rows of all weights together (glu: of one). weights: one, three that
    lie side by side in y, or with glu (gate, up), each [N_i,K] contiguous; biases: one each; norm: a module with
    weight [K] and eps; residual [M,N]; dtype of y, default x's. few: multiply-adds, M <= 4, not with glu.
    Within one of the two a row has the same bits for every M. No gradients. ValueError where N_i is no multiple of the
    kernel's tile.
    """
    (M, K), N = x.shape, weights[0].shape[0] if glu else sum(w.shape[0] for w in weights)
    y = torch.empty((M, N), dtype=dtype or x.dtype, device=x.device)
    w, b = [*weights, *weights[:1] * 2][:3], [*(biases or weights), *weights[:1] * 2][:3]
    parts = 1 if glu else len(weights)
    if M > (4 if few else MOST_ROWS) or parts not in (1, 3) or any(t.shape[0] % 16 for t in weights):
        raise ValueError(f"gemv: {M} rows should be at most {4 if few else MOST_ROWS}, weights "
                         f"{[tuple(t.shape) for t in weights]} one or three with multiples of 16 rows")

    def launch(config):
        BN, BK, warps, last = config
        args = (x, norm.weight if norm else x, *w, *b, residual if residual is not None else x, y)
        sizes = (K, w[0].shape[0], w[1].shape[0], N, norm.eps if norm else 0.0)
        form = dict(NORM=norm is not None, PARTS=parts, BIAS=biases is not None, RES=residual is not None,
                    EVEN=K % BK == 0, BN=BN, BK=BK, ACC=acc_type(x), num_warps=warps)
        if few:
            few_kernel[(N // BN,)](*args, *sizes, M=M, UNROLL=last, **form)
        else:
            gemv_kernel[(N // BN,)](*args, M, *sizes, GLU=glu, ROWS=MOST_ROWS, num_stages=last, **form)

    small = x.device.type == "cpu" or x.dtype == torch.float32
    fit = [c for c in (FEW_CONFIGS if few else CONFIGS) if all(t.shape[0] % c[0] == 0 for t in weights)]
    launch(tune(("gemv", few, x.dtype, K, N, glu), [CPU_TILE] if small else fit, launch))
    return y


def gemv_reference(x, weights, biases=None, norm=None, residual=None, glu=False, dtype=None, few=False):
    if norm is not None:
        h = x.float() if x.dtype != torch.float64 else x
        x = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype) * norm.weight
    y = [F.linear(x, w, biases[i] if biases else None) for i, w in enumerate(weights)]
    y = F.silu(y[0]) * y[1] if glu else torch.cat(y, -1)
    return (y if residual is None else y + residual).to(dtype or x.dtype)


def serves(block, B, Q):
    """True if block_step may run B sequences of Q tokens: on a GPU in 16 bits, few rows, widths of whole tiles."""
    w, a = block.mlp.gate_proj.weight, block.self_attn
    wide = (a.q_proj, a.k_proj, a.o_proj, block.mlp.gate_proj)
    return (B * Q <= MOST_ROWS and Q <= 8 and use_triton(w) and (not w.is_cuda or w.element_size() == 2)
            and a.head_dim in HEAD_DIMS and not any(p.out_features % 16 for p in wide))


def alone(B, Q):
    """One sequence and up to three drafts: few enough rows for multiply-adds, chosen alike with and without them."""
    return B == 1 and Q <= 4


def block_step(block, x, cos, sin, cache):
    """
    What block(x, cos, sin, None, cache) computes, for a cache in blocks (cache.BlockLayer): x [B,Q,D], B Q <= 16, cos
    and sin [B,Q,d] -> [B,Q,D]. Up to rounding: q, k, v, gate and up are not rounded between norm, product and what
    follows.
    """
    a, mlp, shape, plan, few = block.self_attn, block.mlp, x.shape, cache.plan, alone(*x.shape[:2])
    x = x.reshape(-1, shape[-1])                                                    # [N,D], N = B Q
    qkv = (a.q_proj, a.k_proj, a.v_proj)
    qkv = gemv(x, [p.weight for p in qkv], [p.bias for p in qkv], block.input_layernorm, few=few)   # [N,(H+2K)d]
    q = rope_store(qkv, cos.flatten(0, 1), sin.flatten(0, 1), cache.k, cache.v, plan.where)         # [N,H,d]
    o = decode_attention(q.view(*shape[:2], *q.shape[1:]), cache.k, cache.v, plan.table, plan.lengths)
    x = gemv(o.view(len(x), -1), [a.o_proj.weight], residual=x, few=few)
    gate_up = [mlp.gate_proj.weight, mlp.up_proj.weight]
    h = gemv(x, gate_up, norm=block.post_attention_layernorm, glu=True)                             # [N,F]
    return gemv(h, [mlp.down_proj.weight], residual=x, few=few).view(shape)
