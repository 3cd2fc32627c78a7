"""Decode attention over a block-table KV cache, 1..8 query rows per sequence."""
import torch
import torch.nn.functional as F


def decode_reference(q, k_cache, v_cache, block_table, lengths, scale=None):
    B, Q, H, d = q.shape
    S, K = k_cache.shape[1:3]
    G = H // K
    longest = int(lengths.max())
    n = -(-longest // S)  # blocks in use
    table = block_table[:, :n]
    first = int(table[0, 0])
    if n == 1 and torch.equal(table[:, 0], torch.arange(first, first + B, device=table.device, dtype=table.dtype)):
        k, v = k_cache[first:first + B], v_cache[first:first + B]  # a view: one block holds one sequence
    else:
        k, v = (c[table.long()].flatten(1, 2) for c in (k_cache, v_cache))  # [B, n*S, K, d]
    # A multiple of 64 keys: the sums over keys are then blocked alike whatever the other sequences' lengths.
    L = min(-(-longest // 64) * 64, k.shape[1])
    last = lengths[:, None] - Q + 1 + torch.arange(Q, device=q.device)  # row r sees positions < last
    mask = torch.arange(L, device=q.device) < last[:, :, None]  # [B, Q, L]
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    bias = bias.repeat_interleave(G, 1)[:, None]  # [B, 1, Q*G, L]
    # the G query heads of a KV head are rows of one small matrix, so each key is read once
    rows = q.view(B, Q, K, G, d).transpose(1, 2).reshape(B, K, Q * G, d)
    o = F.scaled_dot_product_attention(rows, k[:, :L].transpose(1, 2), v[:, :L].transpose(1, 2), bias, scale=scale)
    return o.view(B, K, Q, G, d).transpose(1, 2).reshape(B, Q, H, d)


def decode_attention(q, k_cache, v_cache, block_table, lengths, scale=None):
    """q [B, Q, H, d] -> [B, Q, H, d]; row r of sequence b sees cache positions < lengths[b] - Q + 1 + r."""
    return decode_reference(q, k_cache, v_cache, block_table, lengths, scale)
