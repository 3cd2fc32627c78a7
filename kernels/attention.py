"""
Causal grouped-query flash attention with document boundaries, forward and backward (report section 2.2).

    o_i = sum_{j visible to i} softmax_j(scale q_i . k_j) v_j        visible: same document and j <= i; scale = d^-0.5

The reference computes it with torch's scaled_dot_product_attention. The Triton kernels never write the [T, T] scores to
memory. They go over the keys block by block and keep, for each query row, a running maximum m, a running sum l and a
running output acc, each relative to m:

    m' = max(m, max_j s_j)      a = 2^(m - m')      p_j = 2^(s_j - m')
    l' = a l + sum_j p_j        acc' = a acc + sum_j p_j v_j                    at the end  o = acc / l

with s in base 2 (scale * log2 e folded into one factor), since the hardware's exponential is 2^x. One number a row is
kept for the backward pass, lse = m + log2 l, from which p is recomputed:

    p = 2^(s - lse)    dv = p^T do    dp = do v^T    delta = rowsum(o * do)    ds = p (dp - delta)
    dq = scale ds k    dk = scale ds^T q

dq runs over keys, dk and dv run over queries, in two kernels: 7 matrix products where one kernel with atomic adds needs
5, but no atomics: the same input gives the same bits every time. docs/kernels.md derives all this.

The report does not describe its kernels; this file is ours. One form serves every target: the tile loads are tensor
descriptors, which become TMA on sm_90 and sm_100 and pointer arithmetic with cp.async on sm_80. The registers and the
shared memory of each build (the same in C for training on a CPU: kernels/cpu/train.py):

    python bench/kernel_builds.py      # forward sm_90 128x64: 158 registers, none spilled, 24 wgmma, 13 bulk loads
"""
import torch
from torch import Tensor

import kernels
from kernels import acc_type, arch, jit, next_pow2, reference, scratch, tl, tune

LOG2E = 1.4426950408889634
HEAD_DIMS = (16, 32, 64, 128, 256)                      # of the Triton kernels; other widths take the reference


def doc_bounds(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """
    Document starts cu_seqlens int32 [n+1] over the flattened B*T tokens -> int32 [2, B, T]: the first and the
    one-past-last index, within its row, of each token's document. Row ends are boundaries too. All layers share it.

    By hand: B = 1, T = 4, cu_seqlens = (0, 1, 4): first = (0, 1, 1, 1), end = (1, 4, 4, 4).
    """
    device = cu_seqlens.device
    rows = torch.arange(0, B * T + 1, T, device=device, dtype=torch.int64)
    cuts = torch.cat((cu_seqlens.long(), rows)).unique()                            # sorted
    at = torch.arange(B * T, device=device)
    j = torch.searchsorted(cuts, at, right=True)                                    # first cut after each token
    row = at - at % T
    return torch.stack((cuts[j - 1] - row, cuts[j] - row)).view(2, B, T).to(torch.int32)


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> Tensor:
    """
    Causal grouped-query attention with scale d^-0.5. q [B, T, H, d], k and v [B, T, K, d], K divides H -> [B, T, H, d].

    bounds int32 [2, B, T] (Batch.bounds, doc_bounds) keeps each token inside its document; None: a row is one document.
    ValueError on shapes that do not fit. Any head_dim; the Triton kernels serve HEAD_DIMS.

    By hand: T = 2, d = 1, q = (1, 1), k = (0, ln 3), v = (4, 8): token 0 sees itself, o = 4; token 1 weighs
    e^0 : e^(ln 3) = 1 : 3, so o = (4 + 3 * 8) / 4 = 7.
    """
    (B, T, H, d), K = q.shape, k.shape[2]
    if k.shape != (B, T, K, d) or v.shape != k.shape or H % K:
        raise ValueError(f"attention: q {tuple(q.shape)} needs k and v [B, T, K, d] with K dividing H, "
                         f"got {tuple(k.shape)} and {tuple(v.shape)}")
    if bounds is not None and (bounds.shape != (2, B, T) or bounds.dtype != torch.int32):
        raise ValueError(f"attention: bounds must be int32 [2, {B}, {T}] (doc_bounds), "
                         f"got {bounds.dtype} {list(bounds.shape)}")
    if (q.device.type, q.dtype) in kernels.TRITON and d in HEAD_DIMS:
        return attention_op(q, k, v, bounds)[0]
    return reference.attention(q, k, v, bounds)


# ---- Triton kernels -------------------------------------------------------------------------------------------------

@jit
def attend(q, k_desc, v_desc, j0, col, rows, first, acc, m, l, SCALE2: tl.constexpr, MASK: tl.constexpr,
           DOCS: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """One block of keys for one block of rows: the update of (acc, m, l) in the header."""
    k = k_desc.load([j0, col])                                                      # [BN, D]
    s = tl.dot(q, k.T, out_dtype=ACC, input_precision="ieee")                       # [BM, BN]
    if MASK:
        keys = j0 + tl.arange(0, BN)
        see = keys[None, :] <= rows[:, None]
        if DOCS:
            see = see & (keys[None, :] >= first[:, None])
        # finite, so a row that sees nothing of this block yields numbers (wiped out by a = 0 later), not NaN; its own
        # diagonal is in the last block, so every row sees something in the end. Scaled before the mask: as one
        # multiply-add, s * SCALE2 - m_new of a masked row is the rounding error of 1e29, and 2^that is inf
        s = tl.where(see, s * SCALE2, -1e30)
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * SCALE2)
        p = tl.exp2(s * SCALE2 - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    v = v_desc.load([j0, col])
    acc = tl.dot(p.to(v.dtype), v, acc, out_dtype=ACC, input_precision="ieee")
    return acc, m_new, l


@jit
def block_ranges(bounds, b, m0, T, DOCS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """
    Key blocks that rows m0 .. m0+BM-1 need: [lo, hi). Those in [full_lo, full_hi) are visible to every row.

    first[i] never falls with i, so the first row gives lo, and the last row gives full_lo, behind every document start.
    """
    full_hi = m0 // BN
    hi = tl.cdiv(tl.minimum(m0 + BM, T), BN)
    lo = 0
    full_lo = 0
    if DOCS:
        row = b.to(tl.int64) * T
        lo = tl.load(bounds + row + m0) // BN
        full_lo = tl.minimum(tl.cdiv(tl.load(bounds + row + tl.minimum(m0 + BM, T) - 1), BN), full_hi)
        full_lo = tl.maximum(full_lo, lo)
        full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@jit
def forward_kernel(q, k, v, bounds, o, lse, T, H, sqb, sqt, skb, skt, svb, svt, G: tl.constexpr, SCALE2: tl.constexpr,
                   DOCS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """One program: BM query rows of one head. Strides s?b, s?t: to the next batch row, to the next time."""
    # heads vary fastest, and the last rows, which see most keys, come first: long programs start before short
    bh = tl.program_id(0)
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    b, h = bh // H, bh % H
    b64 = b.to(tl.int64)                                # 64 bits before any stride: B T H D passes 2^31 at T = 524,288
    K = H // G
    # a row of time holds all heads side by side, so head h is the columns from h D; rows past T read as zero
    q_desc = tl.make_tensor_descriptor(q + b64 * sqb, [T, H * D], [sqt, 1], [BM, D])
    k_desc = tl.make_tensor_descriptor(k + b64 * skb, [T, K * D], [skt, 1], [BN, D])
    v_desc = tl.make_tensor_descriptor(v + b64 * svb, [T, K * D], [svt, 1], [BN, D])
    col = (h // G) * D
    rows = m0 + tl.arange(0, BM)
    first = rows
    if DOCS:
        first = tl.load(bounds + b64 * T + rows, mask=rows < T, other=0)
    qt = q_desc.load([m0, h * D])
    m = tl.full([BM], float("-inf"), ACC)
    l = tl.zeros([BM], ACC)
    acc = tl.zeros([BM, D], ACC)
    lo, full_lo, full_hi, hi = block_ranges(bounds, b, m0, T, DOCS, BM, BN)
    for j in tl.range(full_lo, full_hi):
        acc, m, l = attend(qt, k_desc, v_desc, j * BN, col, rows, first, acc, m, l, SCALE2, False, DOCS, BN, ACC)
    # the blocks that a document's start cuts, then those on the diagonal
    head = full_lo - lo
    for i in tl.range(0, head + hi - full_hi):
        j = tl.where(i < head, lo + i, full_hi + i - head)
        acc, m, l = attend(qt, k_desc, v_desc, j * BN, col, rows, first, acc, m, l, SCALE2, True, DOCS, BN, ACC)
    o_desc = tl.make_tensor_descriptor(o + b64 * T * H * D, [T, H * D], [H * D, 1], [BM, D])
    o_desc.store([m0, h * D], (acc / l[:, None]).to(o.dtype.element_ty))
    tl.store(lse + bh.to(tl.int64) * T + rows, m + tl.log2(l), mask=rows < T)


@jit
def delta_kernel(o, do, delta, T, H, sdb, sdt, D: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr):
    """delta_i = o_i . do_i = sum_j p_ij dp_ij: the softmax's backward needs no second pass over the keys."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), bh % H
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    r64 = rows.to(tl.int64)[:, None]
    cols = h * D + tl.arange(0, D)[None, :]
    ot = tl.load(o + (b * T + r64) * H * D + cols, mask=rows[:, None] < T, other=0.0).to(ACC)
    dt = tl.load(do + b * sdb + r64 * sdt + cols, mask=rows[:, None] < T, other=0.0).to(ACC)
    tl.store(delta + bh.to(tl.int64) * T + rows, tl.sum(ot * dt, 1), mask=rows < T)


@jit
def dq_kernel(q, k, v, bounds, do, lse, delta, dq, T, H, sqb, sqt, skb, skt, svb, svt, sdb, sdt, G: tl.constexpr,
              SCALE: tl.constexpr, SCALE2: tl.constexpr, DOCS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr, ACC: tl.constexpr):
    """One program: dq of BM query rows of one head; the loop is the forward's, all blocks masked."""
    bh = tl.program_id(0)
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    b, h = bh // H, bh % H
    b64 = b.to(tl.int64)
    K = H // G
    q_desc = tl.make_tensor_descriptor(q + b64 * sqb, [T, H * D], [sqt, 1], [BM, D])
    k_desc = tl.make_tensor_descriptor(k + b64 * skb, [T, K * D], [skt, 1], [BN, D])
    v_desc = tl.make_tensor_descriptor(v + b64 * svb, [T, K * D], [svt, 1], [BN, D])
    do_desc = tl.make_tensor_descriptor(do + b64 * sdb, [T, H * D], [sdt, 1], [BM, D])
    col = (h // G) * D
    rows = m0 + tl.arange(0, BM)
    first = rows
    if DOCS:
        first = tl.load(bounds + b64 * T + rows, mask=rows < T, other=0)
    stat = bh.to(tl.int64) * T
    # lse = inf beyond T makes p = 0 there
    lse_r = tl.load(lse + stat + rows, mask=rows < T, other=float("inf"))
    delta_r = tl.load(delta + stat + rows, mask=rows < T, other=0.0)
    qt = q_desc.load([m0, h * D])
    dot = do_desc.load([m0, h * D])
    acc = tl.zeros([BM, D], ACC)
    lo, full_lo, full_hi, hi = block_ranges(bounds, b, m0, T, DOCS, BM, BN)
    for j in tl.range(lo, hi):
        kt = k_desc.load([j * BN, col])
        vt = v_desc.load([j * BN, col])
        s = tl.dot(qt, kt.T, out_dtype=ACC, input_precision="ieee")                      # [BM, BN]
        keys = j * BN + tl.arange(0, BN)
        see = keys[None, :] <= rows[:, None]
        if DOCS:
            see = see & (keys[None, :] >= first[:, None])
        # p = 2^(s - lse) ;  ds = p (dp - delta)
        p = tl.where(see, tl.exp2(s * SCALE2 - lse_r[:, None]), 0.0)
        dp = tl.dot(dot, vt.T, out_dtype=ACC, input_precision="ieee")
        ds = p * (dp - delta_r[:, None])
        acc = tl.dot(ds.to(kt.dtype), kt, acc, out_dtype=ACC, input_precision="ieee")
    out = tl.make_tensor_descriptor(dq + b64 * T * H * D, [T, H * D], [H * D, 1], [BM, D])
    out.store([m0, h * D], (acc * SCALE).to(dq.dtype.element_ty))


@jit
def dkv_kernel(q, k, v, bounds, do, lse, delta, dk, dv, B, T, H, sqb, sqt, skb, skt, svb, svt, sdb, sdt,
               G: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr, DOCS: tl.constexpr, D: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """One program: dk, dv of BN keys of one KV head, over its G query heads and the rows that see them."""
    K = H // G
    bk = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    b, kh = bk // K, bk % K
    b64 = b.to(tl.int64)
    q_desc = tl.make_tensor_descriptor(q + b64 * sqb, [T, H * D], [sqt, 1], [BM, D])
    k_desc = tl.make_tensor_descriptor(k + b64 * skb, [T, K * D], [skt, 1], [BN, D])
    v_desc = tl.make_tensor_descriptor(v + b64 * svb, [T, K * D], [svt, 1], [BN, D])
    do_desc = tl.make_tensor_descriptor(do + b64 * sdb, [T, H * D], [sdt, 1], [BM, D])
    kt = k_desc.load([n0, kh * D])
    vt = v_desc.load([n0, kh * D])
    keys = n0 + tl.arange(0, BN)
    end = T
    last = keys
    if DOCS:
        ends = bounds + (B + b64) * T
        last = tl.load(ends + keys, mask=keys < T, other=0)
        end = tl.load(ends + tl.minimum(n0 + BN, T) - 1)
    lo = n0 // BM
    n_rows = tl.cdiv(end, BM) - lo
    acc_k = tl.zeros([BN, D], ACC)
    acc_v = tl.zeros([BN, D], ACC)
    # one flat loop over (query head, row block): unrolling heads or splitting off the diagonal spills
    for i in tl.range(0, n_rows * G):
        h = kh * G + i // n_rows
        i0 = (lo + i % n_rows) * BM
        qt = q_desc.load([i0, h * D])
        dot = do_desc.load([i0, h * D])
        rows = i0 + tl.arange(0, BM)
        stat = (b64 * H + h) * T
        lse_r = tl.load(lse + stat + rows, mask=rows < T, other=float("inf"))
        delta_r = tl.load(delta + stat + rows, mask=rows < T, other=0.0)
        # scores transposed, so that p and ds enter the two products below as they lie in registers
        s = tl.dot(kt, qt.T, out_dtype=ACC, input_precision="ieee")                      # [BN, BM]
        see = keys[:, None] <= rows[None, :]
        if DOCS:
            see = see & (rows[None, :] < last[:, None])
        p = tl.where(see, tl.exp2(s * SCALE2 - lse_r[None, :]), 0.0)
        acc_v = tl.dot(p.to(dot.dtype), dot, acc_v, out_dtype=ACC, input_precision="ieee")
        dp = tl.dot(vt, dot.T, out_dtype=ACC, input_precision="ieee")
        ds = p * (dp - delta_r[None, :])
        acc_k = tl.dot(ds.to(qt.dtype), qt, acc_k, out_dtype=ACC, input_precision="ieee")
    dk_desc = tl.make_tensor_descriptor(dk + b64 * T * K * D, [T, K * D], [K * D, 1], [BN, D])
    dv_desc = tl.make_tensor_descriptor(dv + b64 * T * K * D, [T, K * D], [K * D, 1], [BN, D])
    dk_desc.store([n0, kh * D], (acc_k * SCALE).to(dk.dtype.element_ty))
    dv_desc.store([n0, kh * D], acc_v.to(dv.dtype.element_ty))


# ---- launching ------------------------------------------------------------------------------------------------------

# (BM rows, BN keys, warps, stages) by kernel, target and head_dim (widths 16 and 32 take those of 64); none spills
# under triton 3.6 or 3.9 (bench/kernel_builds.py; dkv 64x128 would suit sm_90 best, but spills 8 bytes under 3.6). The
# first is the default; NANOMIMO_AUTOTUNE=1 times the others too. sm_90 at 128, MiMo's width, holds only what an H200
# has shown to be right (docs/lab_log.md). The others have no measured speed: sm_80, sm_100, and the widths 64 (needed
# by Qwen2.5-0.5B and SmolLM2) and 256.
CONFIGS = {
    ("forward", 80, 64): [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)],
    ("forward", 80, 128): [(128, 32, 8, 3), (64, 32, 4, 2)],
    ("forward", 80, 256): [(64, 32, 8, 2)],
    ("forward", 90, 64): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
    ("forward", 90, 128): [(128, 64, 8, 3), (128, 128, 8, 2)],
    ("forward", 90, 256): [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2)],
    ("forward", 100, 64): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
    ("forward", 100, 128): [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2)],
    ("forward", 100, 256): [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2)],
    ("dq", 80, 64): [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 4, 2)],
    ("dq", 80, 128): [(128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
    ("dq", 80, 256): [(64, 32, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2)],
    ("dq", 90, 64): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
    ("dq", 90, 128): [(128, 64, 8, 3), (128, 64, 8, 2)],
    ("dq", 90, 256): [(128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
    ("dq", 100, 64): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
    ("dq", 100, 128): [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2)],
    ("dq", 100, 256): [(128, 32, 8, 2), (64, 32, 4, 2)],
    ("dkv", 80, 64): [(64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2)],
    ("dkv", 80, 128): [(64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 4, 2)],
    ("dkv", 80, 256): [(64, 32, 8, 2), (32, 32, 8, 2)],
    ("dkv", 90, 64): [(64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2)],
    ("dkv", 90, 128): [(64, 64, 4, 2)],
    ("dkv", 90, 256): [(16, 64, 8, 2)],
    ("dkv", 100, 64): [(64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2)],
    ("dkv", 100, 128): [(64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 3)],
    ("dkv", 100, 256): [(32, 64, 8, 2)],
}
CPU_TILES = (32, 32, 4, 1)                              # interpreter; tests change it
FP32_TILES = (32, 32, 4, 1)                             # fp32 on CUDA: exact, small tiles, not a fast path


def configs(kernel: str, device: torch.device, dtype: torch.dtype, d: int) -> list[tuple]:
    """The configurations of "forward", "dq" or "dkv" for this device, dtype and head_dim; the default first."""
    if device.type == "cpu":
        return [CPU_TILES]
    if dtype == torch.float32:
        return [FP32_TILES]
    return CONFIGS[kernel, arch(device), max(d, 64)]


def rowwise(t: Tensor) -> Tensor:
    """t [B, T, heads, d] as the descriptors need it, a copy if not so: heads side by side, rows aligned to 16 bytes."""
    unit = 16 // t.element_size()
    B, T, n, d = t.shape
    good = (t.stride(3) == 1 and t.stride(2) == d and t.stride(1) >= n * d and t.stride(0) >= n * d
            and t.stride(1) % unit == 0 and t.stride(0) % unit == 0 and t.data_ptr() % 16 == 0)
    return t if good else t.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("nanomimo::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shapes of attention, d in HEAD_DIMS -> o [B, T, H, d] and lse fp32 [B, H, T], base 2, without gradient."""
    scratch()
    q, k, v = rowwise(q), rowwise(k), rowwise(v)
    bounds = bounds if bounds is None else bounds.contiguous()
    B, T, H, d = q.shape
    o = torch.empty((B, T, H, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)

    def launch(config):
        BM, BN, warps, stages = config
        forward_kernel[(B * H, -(-T // BM))](
            q, k, v, bounds, o, lse, T, H, *(n for t in (q, k, v) for n in t.stride()[:2]), G=H // k.shape[2],
            SCALE2=d**-0.5 * LOG2E, DOCS=bounds is not None, D=d, BM=BM, BN=BN, ACC=acc_type(q), num_warps=warps,
            num_stages=stages)

    options = configs("forward", q.device, q.dtype, d)
    launch(tune(("forward", q.dtype, d, next_pow2(T), bounds is not None), options, launch))
    return o, lse


@attention_op.register_fake
def _(q, k, v, bounds):
    B, T, H, d = q.shape
    return q.new_empty((B, T, H, d)), q.new_empty((B, H, T), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("nanomimo::attention_backward", mutates_args=())
def attention_backward_op(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, o: Tensor, lse: Tensor,
                          do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs and outputs of attention_op and do [B, T, H, d] -> the gradients of q, k and v."""
    scratch()
    q, k, v, do = rowwise(q), rowwise(k), rowwise(v), rowwise(do)
    bounds = bounds if bounds is None else bounds.contiguous()
    B, T, H, d = q.shape
    K = k.shape[2]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta, acc, scale = torch.empty_like(lse), acc_type(q), d**-0.5
    delta_kernel[(B * H, -(-T // 64))](o, do, delta, T, H, do.stride(0), do.stride(1), D=d, BM=64, ACC=acc)
    strides = [s for t in (q, k, v, do) for s in t.stride()[:2]]
    shared = dict(G=H // K, SCALE=scale, SCALE2=scale * LOG2E, DOCS=bounds is not None, D=d, ACC=acc)

    def launch_dq(config):
        BM, BN, warps, stages = config
        dq_kernel[(B * H, -(-T // BM))](q, k, v, bounds, do, lse, delta, dq, T, H, *strides, BM=BM, BN=BN,
                                        num_warps=warps, num_stages=stages, **shared)

    def launch_dkv(config):
        BM, BN, warps, stages = config
        dkv_kernel[(B * K, -(-T // BN))](q, k, v, bounds, do, lse, delta, dk, dv, B, T, H, *strides, BM=BM, BN=BN,
                                         num_warps=warps, num_stages=stages, **shared)

    for name, launch in (("dq", launch_dq), ("dkv", launch_dkv)):
        options = configs(name, q.device, q.dtype, d)
        launch(tune((name, q.dtype, d, next_pow2(T), bounds is not None), options, launch))
    return dq, dk, dv


@attention_backward_op.register_fake
def _(q, k, v, bounds, o, lse, do):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do, _):
    return *attention_backward_op(*ctx.saved_tensors, do), None


attention_op.register_autograd(_backward, setup_context=_save)
