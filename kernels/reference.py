"""
The operators of a block in plain torch, in any dtype, with autograd's own gradients (report section 2.2). These are the
definitions: the kernels in Triton (attention.py, rmsnorm.py, rope.py, swiglu.py) and in C (cpu/) are compared with
them in tests/test_kernels_reference.py and tests/test_cpu_train.py.

A model runs them directly with --plain, and wherever no kernel applies.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] or of x's shape -> [..., D]; bit-equal to Hugging Face's Qwen2RMSNorm in fp32."""
    # y = w cast(x / sqrt(mean(x^2) + eps)): the mean in fp32, the cast BEFORE the gain, as Hugging Face
    h = x.float() if x.dtype != torch.float64 else x
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def rmsnorm_residual(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """s = x + residual, both [..., D] -> (rmsnorm(s), s): a block's norm and its new residual stream."""
    s = x + residual
    return rmsnorm(s, weight, eps), s


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [..., T, H, d], k [..., T, K, d], cos and sin [T, d] or with their leading axes -> both rotated."""
    # (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the two halves of a head
    half = q.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]                         # [.., T, 1, d/2]
    q1, q2, k1, k2 = q[..., :half], q[..., half:], k[..., :half], k[..., half:]
    return (torch.cat((q1 * cos - q2 * sin, q2 * cos + q1 * sin), -1).to(q.dtype),
            torch.cat((k1 * cos - k2 * sin, k2 * cos + k1 * sin), -1).to(k.dtype))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., F] -> silu(gate) up [..., F]."""
    return F.silu(gate) * up


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> Tensor:
    """
    Causal grouped-query attention: q [B, T, H, d], k and v [B, T, K, d] -> [B, T, H, d]; bounds int32 [2, B, T] keeps
    each token inside its document (attention.doc_bounds). With torch's own, for any head_dim.
    """
    B, T = q.shape[:2]
    if bounds is None:
        return sdpa(q, k, v)
    at = torch.arange(T, device=q.device)
    starts = (bounds[0] == at).nonzero()[:, 1]
    if starts.numel() == B:                             # every row is one document
        return sdpa(q, k, v)
    if starts.numel() * 8 <= B * T:
        # documents of 8 tokens and more on average: one call each. The work is sum(T_i^2), two to eight times less than
        # with a mask at 256 to 1,024 tokens a row, and packed equals unpacked bit for bit
        lengths = (bounds[1] - bounds[0])[bounds[0] == at].tolist()
        parts = zip(*(t.flatten(0, 1).split(lengths) for t in (q, k, v)), strict=True)
        return torch.cat([sdpa(*(t[None] for t in part))[0] for part in parts]).view(q.shape)
    # key j is visible to query i  <=>  first[i] <= j <= i
    mask = (at >= bounds[0][:, :, None]) & (at <= at[:, None])                      # [B, T, T]
    return sdpa(q, k, v, mask=mask[:, None])


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's attention on [B, T, heads, d]: causal, or under mask bool [B, 1, T, T]."""
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))                              # [B, heads, T, d]
    gqa = q.shape[-3] != k.shape[-3]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return o.transpose(-3, -2)
