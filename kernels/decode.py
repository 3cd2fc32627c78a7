"""
Decode attention over a KV cache with a block table: 1 to 8 new tokens of a sequence against all that it holds.

One new token needs every cached key once, so the time is that of reading the cache (144 KiB a token at 7B). Three
things follow. The keys of one sequence are split over many programs, each leaving a partial output and its log-sum-exp

    o = sum_s 2^(lse_s - top) o_s / sum_s 2^(lse_s - top)           top = max_s lse_s

so that a single sequence can fill the machine (B = 1 has 8 KV heads for 132 processors). The G query heads of a KV head
are rows of one tile, so the cache is read once, not G times. And the Q new tokens of an MTP verification step (report
section 2.2, Fig. 2) are further rows of that tile: the tensor core's smallest tile has 16 rows and 4 heads x 4 tokens
fill it, so verifying 4 tokens reads, and takes, what generating 1 does.

The report's engine is vLLM with MTP support; this kernel is ours, and so is the rule that a sequence's numbers do not
depend on its neighbours: on a CPU it has the same bits whatever else is in the batch. On CUDA that holds for a given
number of splits, which follows from the batch's shape; and a row's bits do not depend on the tokens after it, so
verifying drafts gives what generating without them gives.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import acc_type, jit, next_pow2, sm_count, tl, tune

LOG2E = 1.4426950408889634
HEAD_DIMS = (16, 32, 64, 128, 256)                      # of the Triton kernels; other widths take the reference


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """
    Attention of Q new tokens, already in the cache, over all that each sequence holds, with scale d^-0.5. No gradients.

    q [B, Q, H, d]; k_cache, v_cache [n_blocks, block_size, K, d] with unit stride in d; block_table int32
    [B, max_blocks]; lengths int32 [B], valid tokens with the new ones. Row r of sequence b sees the cache positions
    below lengths[b] - Q + 1 + r. -> [B, Q, H, d]; rows that see nothing give 0. ValueError on shapes that do not fit.

    Fastest cache layout on a CPU: torch.empty(n_blocks, K, block_size, d).transpose(1, 2), a third of the time; and one
    block per sequence, in order, which is read in place instead of gathered.

    By hand: as attention, with the tokens in the cache: q = 1, k = (0, ln 3), v = (4, 8), length 2 gives 7.
    """
    B, Q, H, d = q.shape
    S, K = k_cache.shape[1:3]
    if H % K or k_cache.shape != v_cache.shape or k_cache.shape[3] != d or k_cache.stride(3) != 1:
        raise ValueError(f"decode_attention: q {tuple(q.shape)} needs caches [n_blocks, block_size, K, {d}] "
                         f"of one shape, K dividing {H}, got {list(k_cache.shape)}, {list(v_cache.shape)}")
    if block_table.shape[0] != B or lengths.shape != (B,):
        raise ValueError(f"decode_attention: block_table [{B}, max_blocks] and lengths [{B}] expected, got "
                         f"{tuple(block_table.shape)} and {tuple(lengths.shape)}")
    if (q.device.type, q.dtype) in kernels.TRITON and d in HEAD_DIMS:
        return decode_op(q, k_cache, v_cache, block_table, lengths, n_splits(B, K, block_table.shape[1] * S, q.device))
    return decode_reference(q, k_cache, v_cache, block_table, lengths)


def decode_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """The same with torch's scaled_dot_product_attention under a mask, in any dtype; shapes of decode_attention."""
    B, Q, H, d = q.shape
    S, K = k_cache.shape[1:3]
    G = H // K
    longest = int(lengths.max())
    n = -(-longest // S)                                # blocks in use
    table = block_table[:, :n]
    first = int(table[0, 0])
    if n == 1 and table[:, 0].tolist() == list(range(first, first + B)):
        k, v = k_cache[first:first + B], v_cache[first:first + B]                   # a view: a block holds a sequence
    else:
        k, v = (c[table.long()].flatten(1, 2) for c in (k_cache, v_cache))          # [B, n*S, K, d]
    # A multiple of 64 keys: the sums over keys are then blocked alike whatever the other sequences' lengths.
    L = min(-(-longest // 64) * 64, k.shape[1])
    last = lengths[:, None] - Q + 1 + torch.arange(Q, device=q.device)              # row r sees positions < last
    mask = torch.arange(L, device=q.device) < last[:, :, None]                      # [B, Q, L]
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    bias = bias.repeat_interleave(G, 1)[:, None]                                    # [B, 1, Q*G, L]
    # the G query heads of a KV head are rows of one small matrix, so each key is read once
    rows = q.view(B, Q, K, G, d).transpose(1, 2).reshape(B, K, Q * G, d)
    k, v = (c[:, :L].transpose(1, 2) for c in (k, v))                               # [B, K, L, d]
    o = F.scaled_dot_product_attention(rows, k, v, bias)
    return o.view(B, K, Q, G, d).transpose(1, 2).reshape(B, Q, H, d)


# ---- Triton ---------------------------------------------------------------------------------------------------------

@jit
def split_kernel(q, k_cache, v_cache, table, lengths, part_o, part_lse, Q, n_table, skb, sks, skh, svb, svs, svh,
                 S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, SCALE2: tl.constexpr, D: tl.constexpr,
                 ROWS: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """One program: one split of one sequence's keys, one KV head. Strides s??: block, slot, KV head."""
    b, kh = tl.program_id(0) // K, tl.program_id(0) % K
    split, n_split = tl.program_id(1), tl.num_programs(1)
    b64 = b.to(tl.int64)
    length = tl.load(lengths + b)
    # this split's share of the keys: whole tiles of BN, cut by the table's capacity and not by the length, so that a
    # row's sums do not depend on how many tokens come after it
    share = tl.cdiv(tl.cdiv(n_table * S, BN), n_split)
    lo = split * share
    hi = tl.minimum(lo + share, tl.cdiv(length, BN))
    r = tl.arange(0, ROWS)
    qi, g = r // G, r % G
    real = qi < Q
    dims = tl.arange(0, D)
    qt = tl.load(q + ((b64 * Q + qi[:, None]) * K + kh) * G * D + g[:, None] * D + dims[None, :],
                 mask=real[:, None], other=0.0)
    # query row qi sees cache positions < length - Q + 1 + qi
    sees = tl.where(real, length - Q + 1 + qi, 0)
    m = tl.full([ROWS], float("-inf"), ACC)
    l = tl.zeros([ROWS], ACC)
    acc = tl.zeros([ROWS, D], ACC)
    for j in tl.range(lo, hi):
        keys = j * BN + tl.arange(0, BN)
        live = keys < length
        if S % BN == 0:                                 # the tile lies in one block: one look-up, consecutive slots
            block = tl.load(table + b64 * n_table + j * BN // S).to(tl.int64)
            slot = (j * BN % S + tl.arange(0, BN)).to(tl.int64)
        else:
            block = tl.load(table + b64 * n_table + keys // S, mask=live, other=0).to(tl.int64)
            slot = (keys % S).to(tl.int64)
        k = tl.load(k_cache + (block * skb + slot * sks + kh * skh)[:, None] + dims[None, :],
                    mask=live[:, None], other=0.0)
        s = tl.dot(qt, k.T, out_dtype=ACC, input_precision="ieee")
        s = tl.where(keys[None, :] < sees[:, None], s * SCALE2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        l = l * shrink + tl.sum(p, 1)
        v = tl.load(v_cache + (block * svb + slot * svs + kh * svh)[:, None] + dims[None, :],
                    mask=live[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], out_dtype=ACC, input_precision="ieee")
        m = m_new
    # an empty split stores lse = -inf and o = 0: the merge gives it weight 0
    some = l > 0
    at = (tl.program_id(0).to(tl.int64) * n_split + split) * ROWS + r
    tl.store(part_lse + at, tl.where(some, m + tl.log2(tl.where(some, l, 1.0)), float("-inf")))
    tl.store(part_o + at[:, None] * D + dims[None, :], acc / tl.where(some, l, 1.0)[:, None])


@jit
def merge_kernel(part_o, part_lse, o, Q, n_split, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                 NS: tl.constexpr):
    """One program: one query row of one KV head; the weighted mean of the splits, as in the header."""
    bk, r = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, NS)
    dims = tl.arange(0, D)
    at = (bk.to(tl.int64) * n_split + split) * ROWS + r
    lse = tl.load(part_lse + at, mask=split < n_split, other=float("-inf"))
    top = tl.max(lse, 0)
    w = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))                     # [NS]
    total = tl.sum(w, 0)
    parts = tl.load(part_o + at[:, None] * D + dims[None, :], mask=split[:, None] < n_split, other=0.0)
    out = tl.sum(parts * w[:, None], 0) / tl.where(total > 0, total, 1.0)
    b, kh = (bk // K).to(tl.int64), bk % K
    tl.store(o + (((b * Q + r // G) * K + kh) * G + r % G) * D + dims, out.to(o.dtype.element_ty))


# (BN keys, warps, stages); none spills on any target (bench/kernel_builds.py)
CONFIGS = [(64, 4, 3), (128, 8, 3), (32, 4, 3)]
CPU_TILE = (32, 4, 1)


def n_splits(B: int, K: int, capacity: int, device: torch.device) -> int:
    """
    Splits per sequence for B sequences of up to `capacity` tokens: enough to fill the machine, of 128 to 1,024 keys
    each. It follows from shapes alone, so a CUDA graph of the call stays valid while sequences grow.
    """
    fill = -(-8 * sm_count(device) // (B * K))
    return max(1, min(max(fill, -(-capacity // 1024)), -(-capacity // 128), 128))


@torch.library.custom_op("nanomimo::decode_attention", mutates_args=())
def decode_op(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor,
              splits: int) -> Tensor:
    """Shapes of decode_attention, d in HEAD_DIMS, the keys of a sequence in `splits` parts -> [B, Q, H, d]."""
    q, block_table, lengths = q.contiguous(), block_table.contiguous(), lengths.contiguous()
    B, Q, H, d = q.shape
    S, K = k_cache.shape[1:3]
    G = H // K
    ROWS = max(16, next_pow2(Q * G))
    wide = torch.promote_types(q.dtype, torch.float32)
    part_o = torch.empty((B * K, splits, ROWS, d), dtype=wide, device=q.device)
    part_lse = torch.empty((B * K, splits, ROWS), dtype=wide, device=q.device)
    o = torch.empty_like(q)

    def launch(config):
        BN, warps, stages = config
        split_kernel[(B * K, splits)](
            q, k_cache, v_cache, block_table, lengths, part_o, part_lse, Q, block_table.shape[1],
            *k_cache.stride()[:3], *v_cache.stride()[:3], S=S, K=K, G=G, SCALE2=d**-0.5 * LOG2E, D=d,
            ROWS=ROWS, BN=BN, ACC=acc_type(q), num_warps=warps, num_stages=stages)

    small = q.device.type == "cpu" or q.dtype == torch.float32
    launch(tune(("decode", q.dtype, d, S, next_pow2(B), Q), [CPU_TILE] if small else CONFIGS, launch))
    merge_kernel[(B * K, Q * G)](part_o, part_lse, o, Q, splits, K=K, G=G, D=d, ROWS=ROWS, NS=next_pow2(splits),
                                 num_warps=4)
    return o


@decode_op.register_fake
def _(q, k_cache, v_cache, block_table, lengths, splits):
    return q.new_empty(q.shape)
