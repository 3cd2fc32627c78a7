"""RMSNorm, alone and fused with the residual add. (docstring below)"""
import torch

from kernels import jit, next_pow2, sm_count, tl, use_triton


@jit
def norm_kernel(x, res, w, y, s, r_out, N, D, stride_x, stride_r, EPS: tl.constexpr, RES: tl.constexpr,
                BD: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BD)
    live = col < D
    xt = tl.load(x + row * stride_x + col, mask=live, other=0.0).to(ACC)
    if RES:
        xt += tl.load(res + row * stride_r + col, mask=live, other=0.0).to(ACC)
        rounded = xt.to(s.dtype.element_ty)
        tl.store(s + row * D + col, rounded, mask=live)
        xt = rounded.to(ACC)  # the norm sees the sum as the next layer will read it
    r = 1.0 / tl.sqrt(tl.sum(xt * xt, 0) / D + EPS)
    h = (xt * r).to(x.dtype.element_ty).to(ACC)  # cast before the gain, as the reference
    wt = tl.load(w + col, mask=live, other=0.0).to(ACC)
    tl.store(y + row * D + col, (h * wt).to(y.dtype.element_ty), mask=live)
    tl.store(r_out + row, r)


@jit
def norm_backward_kernel(s, w, r, dy, ds, dx, dw_part, N, D, stride_s, stride_dy, stride_ds, per, RES: tl.constexpr,
                         BD: tl.constexpr, ACC: tl.constexpr):
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


def warps_for(D):
    return 4 if D <= 1024 else 8 if D <= 8192 else 16


def _flat(t):
    """t [..., D] as [N, D] with unit stride inside a row."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("nanomimo::rmsnorm", mutates_args=())
def norm_op(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor,
            eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> normed, x + residual (empty without a residual), r [N] = 1 / rms of each row."""
    D = x.shape[-1]
    if weight.shape != (D,) or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"rmsnorm: x {tuple(x.shape)} needs weight [{D}] and a residual of x's shape")
    xf = _flat(x)
    rf = _flat(residual) if residual is not None else None
    N = xf.shape[0]
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    s = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    r = torch.empty(N, dtype=_wide(x), device=x.device)
    norm_kernel[(N,)](xf, rf, weight.contiguous(), y, s, r, N, D, xf.stride(0), rf.stride(0) if rf is not None else 0,
                      EPS=eps, RES=rf is not None, BD=next_pow2(D), num_warps=warps_for(D),
                      ACC=tl.float64 if x.dtype == torch.float64 else tl.float32)
    return y, s, r


@norm_op.register_fake
def _(x, residual, weight, eps):
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    s = x.new_empty(x.shape if residual is not None else (0,))
    return y, s, x.new_empty(x.numel() // x.shape[-1], dtype=_wide(x))


@torch.library.custom_op("nanomimo::rmsnorm_backward", mutates_args=())
def norm_backward_op(s: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, dy: torch.Tensor,
                     ds: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    D = s.shape[-1]
    sf, gf = _flat(s), _flat(dy)
    df = _flat(ds) if ds is not None else None
    N = sf.shape[0]
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    # each program walks `per` rows and keeps its part of dw in registers; the parts are added once, in a fixed order
    per = -(-N // (4 * sm_count(s.device)))
    programs = -(-N // per)
    part = torch.empty((programs, D), dtype=_wide(s), device=s.device)
    norm_backward_kernel[(programs,)](sf, weight.contiguous(), r, gf, df, dx, part, N, D, sf.stride(0), gf.stride(0),
                                      df.stride(0) if df is not None else 0, per, RES=df is not None,
                                      BD=next_pow2(D), num_warps=warps_for(D),
                                      ACC=tl.float64 if s.dtype == torch.float64 else tl.float32)
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
    if dy is None:  # only the sum was used
        return ds, ds if ctx.with_residual else None, None, None
    dx, dw = norm_backward_op(s, weight, r, dy, ds if ctx.with_residual else None)
    return dx, dx if ctx.with_residual else None, dw, None


norm_op.register_autograd(_backward, setup_context=_save)


def rmsnorm_reference(x, weight, eps):
    # y = weight * cast(x / sqrt(mean(x^2) + eps)), the mean in fp32, cast back BEFORE the gain (as Hugging Face)
    h = x.float() if x.dtype != torch.float64 else x
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def rmsnorm(x, weight, eps=1e-5):
    """x [..., D], weight [D] -> [..., D]."""
    if use_triton(x):
        return norm_op(x, None, weight, eps)[0]
    return rmsnorm_reference(x, weight, eps)


def rmsnorm_residual(x, residual, weight, eps=1e-5):
    """s = x + residual; returns (rmsnorm(s), s)."""
    if use_triton(x):
        return norm_op(x, residual, weight, eps)[:2]
    s = x + residual
    return rmsnorm_reference(s, weight, eps), s
