"""
Rotary position embedding of q and k (report section 2.2; base 10,000, and 640,000 from stage 3 on).

    (x_i, x_{i+d/2}) is rotated by the angle position * theta_i        theta_i = base^(-2i/d), i < d/2

The pairs are half a head apart, Hugging Face's layout. The caller gives cos and sin of the angles (model.rope_at makes
them, fp32, once for all layers), with positions that start at 0 in each packed document. The rotation runs in fp32 and
is rounded once. One kernel rotates the q and the k heads of a token, so that it reads each angle once. Its backward
pass is the same kernel with the angle negated. The same in C: kernels/cpu/train.py.
"""
import torch
from torch import Tensor

import kernels
from kernels import acc_type, jit, next_pow2, reference, tl


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """
    q [B, T, H, d], k [B, T, K, d], cos and sin fp32 [T, d], [1, T, d] or [B, T, d], both halves of d alike -> rotated q
    and k, new tensors. ValueError (Triton) on other shapes. Widths d that are no power of two take the reference.

    By hand: d = 2 and the angle pi/2 turn (1, 0) into (0, 1).
    """
    if (q.device.type, q.dtype) in kernels.TRITON and not q.shape[-1] & (q.shape[-1] - 1):
        return rope_op(q, k, cos, sin, 1.0)
    return reference.rope(q, k, cos, sin)


def rope_store(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, where: Tensor) -> Tensor:
    """
    For decoding: qkv [N, (H + 2K) d], cos and sin fp32 [N, d] -> rotated q [N, H, d]; rotated k and v are written to
    the caches [n_blocks, block, K, d], contiguous, at the flat slots `where`, int64 [N]. No gradients.
    """
    (N, width), (K, d) = qkv.shape, k_cache.shape[2:]
    H = width // d - 2 * K
    if (qkv.device.type, qkv.dtype) in kernels.TRITON:
        q = torch.empty((N, H, d), dtype=qkv.dtype, device=qkv.device)
        store_kernel[(N,)](qkv, cos, sin, q, k_cache, v_cache, where, cos.stride(0), H=H, K=K, D=d,
                           HEADS=next_pow2(max(H, K)), ACC=acc_type(qkv), num_warps=4)
        return q
    q, k, v = qkv.view(N, -1, d).split((H, K, K), 1)
    q, k = reference.rope(q, k, cos, sin)
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache.flatten(0, 1).index_copy_(0, where, new)
    return q


# ---- Triton ---------------------------------------------------------------------------------------------------------

@jit
def rope_kernel(q, k, cos, sin, q_out, k_out, T, sqb, sqt, sqh, skb, skt, skh, sob, sot, soh, srb, srt, srh, scb, sct,
                H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SIGN: tl.constexpr,
                ACC: tl.constexpr):
    """One program: one token. Strides s?b, s?t, s?h: batch row, time, head, of q, k, outputs, tables."""
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    i = tl.arange(0, D // 2)
    c = tl.load(cos + b * scb + t * sct + i).to(ACC)[None, :]
    s = tl.load(sin + b * scb + t * sct + i).to(ACC)[None, :] * SIGN
    h = tl.arange(0, HEADS)[:, None]
    at = h * sqh + i[None, :]
    to = h * soh + i[None, :]
    rotate_heads(q + b * sqb + t * sqt + at, q_out + b * sob + t * sot + to, h < H, c, s, D, ACC)
    at = h * skh + i[None, :]
    to = h * srh + i[None, :]
    rotate_heads(k + b * skb + t * skt + at, k_out + b * srb + t * srt + to, h < K, c, s, D, ACC)


@jit
def rotate_heads(source, target, live, c, s, D: tl.constexpr, ACC: tl.constexpr):
    """The heads at `source` [HEADS, D/2] and D/2 further on, rotated, to `target`."""
    # both halves are read before either is written, so source and target may be the same memory
    x1 = tl.load(source, mask=live, other=0.0).to(ACC)
    x2 = tl.load(source + D // 2, mask=live, other=0.0).to(ACC)
    tl.store(target, (x1 * c - x2 * s).to(target.dtype.element_ty), mask=live)
    tl.store(target + D // 2, (x2 * c + x1 * s).to(target.dtype.element_ty), mask=live)


@jit
def store_kernel(qkv, cos, sin, q_out, k_cache, v_cache, where, scb, H: tl.constexpr, K: tl.constexpr,
                 D: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr):
    """One program: one token of qkv [N, (H + 2K) D]; its slot in the caches [slots, K, D] is where[n]."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, D // 2)
    c = tl.load(cos + n * scb + i).to(ACC)[None, :]
    s = tl.load(sin + n * scb + i).to(ACC)[None, :]
    h = tl.arange(0, HEADS)[:, None]
    at = h * D + i[None, :]
    token = qkv + n * (H + 2 * K) * D
    slot = tl.load(where + n) * K * D
    rotate_heads(token + at, q_out + n * H * D + at, h < H, c, s, D, ACC)
    rotate_heads(token + H * D + at, k_cache + slot + at, h < K, c, s, D, ACC)
    whole = h * D + tl.arange(0, D)[None, :]
    v = tl.load(token + (H + K) * D + whole, mask=h < K, other=0.0)
    tl.store(v_cache + slot + whole, v.to(v_cache.dtype.element_ty), mask=h < K)


@torch.library.custom_op("nanomimo::rope", mutates_args=())
def rope_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """
    Shapes of rope, d a power of two, else ValueError. sign 1 rotates forward, -1 back: a rotation's transpose is the
    rotation by the opposite angle.
    """
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    (B, T, H, d), K = q.shape, k.shape[2]
    if k.shape != (B, T, K, d) or d < 2 or d & (d - 1) or cos.shape[-2:] != (T, d) or sin.shape != cos.shape:
        raise ValueError(f"rope: q {tuple(q.shape)} and k {tuple(k.shape)} need one power-of-two head_dim "
                         f"and tables [T, d], [1, T, d] or [B, T, d], got {tuple(cos.shape)}")
    cos, sin = (t.expand(B, T, d) if t.dim() == 3 else t[None].expand(B, T, d) for t in (cos, sin))
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    strides = [n for t in (q, k, q_out, k_out) for n in t.stride()[:3]]
    rope_kernel[(B * T,)](q, k, cos, sin, q_out, k_out, T, *strides, *cos.stride()[:2], H=H, K=K, D=d,
                          HEADS=next_pow2(max(H, K)), SIGN=sign, ACC=acc_type(q), num_warps=4)
    return q_out, k_out


@rope_op.register_fake
def _(q, k, cos, sin, sign):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    _, _, cos, sin, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    return *rope_op(dq, dk, *ctx.saved_tensors, -ctx.sign), None, None, None


rope_op.register_autograd(_backward, setup_context=_save)
