"""Rotary position embedding, half-split (Hugging Face) layout."""
import torch


def rope_tables(positions, head_dim, base):
    """positions [..., T] integers -> cos, sin fp32 [..., T, d]."""
    # theta_i = base^(-2i/d), i < d/2 ; the same angle serves elements i and i + d/2
    even = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float()
    inv_freq = 1.0 / (base ** (even / head_dim))  # [d/2]
    angle = positions[..., None].float() * inv_freq  # [..., T, d/2]
    angle = torch.cat((angle, angle), -1)  # [..., T, d]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    # (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the two halves of a head
    half = x.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]  # [.., T, 1, d/2]
    x1, x2 = x[..., :half].float(), x[..., half:].float()
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(x.dtype)


def rope(q, k, cos, sin):
    """q [B, T, H, d], k [B, T, K, d], cos and sin fp32 [T, d] or [B, T, d] -> rotated q, k."""
    return rotate(q, cos, sin), rotate(k, cos, sin)
