"""Causal grouped-query attention with document boundaries."""
import torch
import torch.nn.functional as F


def doc_bounds(cu_seqlens, B, T):
    """cu_seqlens int32 [n+1] over the flattened B*T tokens -> int32 [2, B, T]: first and one-past-last index,
    within the row, of each token's document. Row ends are boundaries too."""
    device = cu_seqlens.device
    rows = torch.arange(0, B * T + 1, T, device=device, dtype=torch.int64)
    cuts = torch.cat((cu_seqlens.long(), rows)).unique()  # sorted
    at = torch.arange(B * T, device=device)
    j = torch.searchsorted(cuts, at, right=True)  # first cut after each token
    row = at - at % T
    return torch.stack((cuts[j - 1] - row, cuts[j] - row)).view(2, B, T).to(torch.int32)


def sdpa(q, k, v, mask=None, causal=False, scale=None):
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))  # [.., heads, T, d]
    gqa = q.shape[-3] != k.shape[-3]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return o.transpose(-3, -2)


def attention_reference(q, k, v, bounds=None, scale=None):
    B, T = q.shape[:2]
    if bounds is None:
        return sdpa(q, k, v, causal=True, scale=scale)
    at = torch.arange(T, device=q.device)
    starts = (bounds[0] == at).nonzero()[:, 1]
    if starts.numel() * 32 <= B * T:
        # few documents: each alone, so the work is sum(T_i^2) and packed equals unpacked bit for bit
        lengths = (bounds[1] - bounds[0])[bounds[0] == at].tolist()
        parts = zip(*(t.flatten(0, 1).split(lengths) for t in (q, k, v)), strict=True)
        return torch.cat([sdpa(a[None], b[None], c[None], causal=True, scale=scale)[0] for a, b, c in parts]).view(q.shape)
    # key j is visible to query i  <=>  first[i] <= j <= i
    mask = (at[None, None, :] >= bounds[0][:, :, None]) & (at[None, None, :] <= at[None, :, None])  # [B, T, T]
    return sdpa(q, k, v, mask=mask[:, None], scale=scale)


def attention(q, k, v, bounds=None, scale=None):
    """q [B, T, H, d], k and v [B, T, K, d] -> [B, T, H, d], causal, inside documents when bounds are given."""
    return attention_reference(q, k, v, bounds, scale)
