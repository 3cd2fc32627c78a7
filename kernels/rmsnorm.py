"""
RMSNorm, alone and fused with the residual add before it (report section 2.2: pre-norm blocks).

    r = 1 / sqrt(mean_D(x^2) + eps)      h = x r      y = h w                   one row of D numbers at a time
    dh = dy w      dx = r (dh - h mean_D(dh h))      dw = sum over rows of dy h

Memory decides the speed: a row is read once and held in registers, and with the residual the sum s = x + residual is
written and normalised in the same pass. In backward a program walks over many rows and keeps its share of dw in
registers; one torch.sum adds the shares, in a fixed order, so dw has the same bits every time.

Rounding is that of Hugging Face's Qwen2RMSNorm: statistics in fp32, h cast to x's dtype, then the gain. The reference
is bit-equal to it in fp32 (tests/test_kernels_reference.py). The same in C: kernels/cpu/train.py.
"""
import torch
from torch import Tensor

import kernels
from kernels import acc_type, jit, next_pow2, reference, sm_count, tl


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """
    x [..., D], weight [D] -> [..., D]. ValueError (Triton) if weight is not [D].

    By hand: x = (1, 7), eps 0: mean square 25, so x / 5 = (0.2, 1.4); with weight (10, 1): (2, 1.4).
    """
    if (x.device.type, x.dtype) in kernels.TRITON:
        return norm_op(x, None, weight, eps)[0]
    return reference.rmsnorm(x, weight, eps)


def rmsnorm_residual(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """
    s = x + residual, both [..., D] -> (rmsnorm(s), s): a block's norm and its new residual stream. ValueError (Triton)
    if the shapes differ or weight is not [D].
    """
    if (x.device.type, x.dtype) in kernels.TRITON:
        return norm_op(x, residual, weight, eps)[:2]
    return reference.rmsnorm_residual(x, weight, eps, residual)


# ---- Triton ---------------------------------------------------------------------------------------------------------

@jit
def norm_kernel(x, res, w, y, s, r_out, D, stride_x, stride_r, EPS: tl.constexpr, RES: tl.constexpr, BD: tl.constexpr,
                ACC: tl.constexpr):
    """One program: one row. BD is D rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BD)
    live = col < D
    xt = tl.load(x + row * stride_x + col, mask=live, other=0.0).to(ACC)
    if RES:
        xt += tl.load(res + row * stride_r + col, mask=live, other=0.0).to(ACC)
        rounded = xt.to(s.dtype.element_ty)
        tl.store(s + row * D + col, rounded, mask=live)
        xt = rounded.to(ACC)                            # the norm sees the sum as the next layer will read it
    r = 1.0 / tl.sqrt(tl.sum(xt * xt, 0) / D + EPS)
    h = (xt * r).to(x.dtype.element_ty).to(ACC)         # cast before the gain, as the reference
    wt = tl.load(w + col, mask=live, other=0.0).to(ACC)
    tl.store(y + row * D + col, (h * wt).to(y.dtype.element_ty), mask=live)
    tl.store(r_out + row, r)


@jit
def norm_backward_kernel(s, w, r, dy, ds, dx, dw_part, N, D, stride_s, stride_dy, stride_ds, per, RES: tl.constexpr,
                         BD: tl.constexpr, ACC: tl.constexpr):
    """One program: `per` rows one after the other. ds is the gradient that reaches the sum directly."""
    pid = tl.program_id(0)
    col = tl.arange(0, BD)
    live = col < D
    wt = tl.load(w + col, mask=live, other=0.0).to(ACC)
    dw = tl.zeros([BD], ACC)
    start = pid.to(tl.int64) * per
    for i in tl.range(0, tl.minimum(per, N - pid * per)):
        row = start + i
        rt = tl.load(r + row)
        h = tl.load(s + row * stride_s + col, mask=live, other=0.0).to(ACC) * rt
        g = tl.load(dy + row * stride_dy + col, mask=live, other=0.0).to(ACC)
        # dh = dy w ;  ds = r (dh - h mean(dh h)) ;  dw = sum over rows of dy h
        dh = g * wt
        d = rt * (dh - h * (tl.sum(dh * h, 0) / D))
        if RES:
            d += tl.load(ds + row * stride_ds + col, mask=live, other=0.0).to(ACC)
        tl.store(dx + row * D + col, d.to(dx.dtype.element_ty), mask=live)
        dw += g * h
    tl.store(dw_part + pid.to(tl.int64) * D + col, dw, mask=live)


def warps_for(D: int) -> int:
    """Warps of a program for rows of D numbers."""
    return 4 if D <= 1024 else 8 if D <= 8192 else 16


def _flat(t: Tensor) -> Tensor:
    """t [..., D] as [N, D] with unit stride inside a row."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


@torch.library.custom_op("nanomimo::rmsnorm", mutates_args=())
def norm_op(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """
    x [..., D], residual of x's shape or None, weight [D] -> normed [..., D], x + residual (empty without one), and
    fp32 r [N], 1 / rms of each row. ValueError on other shapes.
    """
    D = x.shape[-1]
    if weight.shape != (D,) or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"rmsnorm: x {tuple(x.shape)} needs weight [{D}] and a residual of x's shape")
    xf = _flat(x)
    rf = _flat(residual) if residual is not None else None
    N = xf.shape[0]
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    s = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    r = torch.empty(N, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    stride_r = rf.stride(0) if rf is not None else 0
    norm_kernel[(N,)](xf, rf, weight.contiguous(), y, s, r, D, xf.stride(0), stride_r, EPS=eps, RES=rf is not None,
                      BD=next_pow2(D), ACC=acc_type(x), num_warps=warps_for(D))
    return y, s, r


@norm_op.register_fake
def _(x, residual, weight, eps):
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    s = x.new_empty(x.shape if residual is not None else (0,))
    return y, s, x.new_empty(x.numel() // x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("nanomimo::rmsnorm_backward", mutates_args=())
def norm_backward_op(s: Tensor, weight: Tensor, r: Tensor, dy: Tensor, ds: Tensor | None) -> tuple[Tensor, Tensor]:
    """s, dy and ds (or None) [..., D], weight [D], r [N] -> the gradients of s [..., D] and of weight [D]."""
    D = s.shape[-1]
    sf, gf = _flat(s), _flat(dy)
    df = _flat(ds) if ds is not None else None
    N = sf.shape[0]
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    per = -(-N // (4 * sm_count(s.device)))
    programs = -(-N // per)
    part = torch.empty((programs, D), dtype=torch.promote_types(s.dtype, torch.float32), device=s.device)
    stride_ds = df.stride(0) if df is not None else 0
    norm_backward_kernel[(programs,)](sf, weight.contiguous(), r, gf, df, dx, part, N, D, sf.stride(0), gf.stride(0),
                                      stride_ds, per, RES=df is not None, BD=next_pow2(D), ACC=acc_type(s),
                                      num_warps=warps_for(D))
    return dx, part.sum(0).to(weight.dtype)


@norm_backward_op.register_fake
def _(s, weight, r, dy, ds):
    return s.new_empty(s.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, residual, weight, _ = inputs
    ctx.with_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.with_residual else x, weight, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, ds, _):
    s, weight, r = ctx.saved_tensors
    if dy is None:                                      # only the sum was used
        return ds, ds if ctx.with_residual else None, None, None
    dx, dw = norm_backward_op(s, weight, r, dy, ds if ctx.with_residual else None)
    return dx, dx if ctx.with_residual else None, dw, None


norm_op.register_autograd(_backward, setup_context=_save)
