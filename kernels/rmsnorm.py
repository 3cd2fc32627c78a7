"""RMSNorm, alone and fused with the residual add."""
import torch


def rmsnorm_reference(x, weight, eps):
    # y = weight * cast(x / sqrt(mean(x^2) + eps)), the mean in fp32, cast back BEFORE the gain (as Hugging Face)
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def rmsnorm(x, weight, eps=1e-5):
    """x [..., D], weight [D] -> [..., D] in x's dtype."""
    return rmsnorm_reference(x, weight, eps)


def rmsnorm_residual(x, residual, weight, eps=1e-5):
    """s = x + residual; returns (rmsnorm(s), s)."""
    s = x + residual
    return rmsnorm_reference(s, weight, eps), s
