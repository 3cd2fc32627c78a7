"""SwiGLU: silu(gate) * up, recomputed in the backward pass. (docstring below)"""
import torch
import torch.nn.functional as F

from kernels import jit, tl, use_triton


@jit
def swiglu_kernel(gate, up, out, F_, stride_g, stride_u, BF: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BF + tl.arange(0, BF)
    live = col < F_
    g = tl.load(gate + row * stride_g + col, mask=live, other=0.0).to(ACC)
    u = tl.load(up + row * stride_u + col, mask=live, other=0.0).to(ACC)
    tl.store(out + row * F_ + col, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=live)


@jit
def swiglu_backward_kernel(gate, up, dout, dgate, dup, F_, stride_g, stride_u, stride_d, BF: tl.constexpr,
                           ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BF + tl.arange(0, BF)
    live = col < F_
    g = tl.load(gate + row * stride_g + col, mask=live, other=0.0).to(ACC)
    u = tl.load(up + row * stride_u + col, mask=live, other=0.0).to(ACC)
    d = tl.load(dout + row * stride_d + col, mask=live, other=0.0).to(ACC)
    sig = 1.0 / (1.0 + tl.exp(-g))
    # d silu(g) / dg = sig (1 + g (1 - sig))
    tl.store(dgate + row * F_ + col, (d * u * sig * (1.0 + g * (1.0 - sig))).to(dgate.dtype.element_ty), mask=live)
    tl.store(dup + row * F_ + col, (d * g * sig).to(dup.dtype.element_ty), mask=live)


BLOCK, WARPS = 1024, 4


def _flat(t):
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _shape(gate):
    N, F_ = gate.shape
    return (N, -(-F_ // BLOCK)), dict(BF=BLOCK, num_warps=WARPS,
                                      ACC=tl.float64 if gate.dtype == torch.float64 else tl.float32)


@torch.library.custom_op("nanomimo::swiglu", mutates_args=())
def swiglu_op(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u = _flat(gate), _flat(up)
    grid, options = _shape(g)
    swiglu_kernel[grid](g, u, out, g.shape[1], g.stride(0), u.stride(0), **options)
    return out


@swiglu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("nanomimo::swiglu_backward", mutates_args=())
def swiglu_backward_op(gate: torch.Tensor, up: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    g, u, d = _flat(gate), _flat(up), _flat(dout)
    grid, options = _shape(g)
    swiglu_backward_kernel[grid](g, u, d, dgate, dup, g.shape[1], g.stride(0), u.stride(0), d.stride(0), **options)
    return dgate, dup


@swiglu_backward_op.register_fake
def _(gate, up, dout):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


swiglu_op.register_autograd(lambda ctx, dout: swiglu_backward_op(*ctx.saved_tensors, dout),
                            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def swiglu(gate, up):
    """gate, up [..., F] -> [..., F]."""
    if use_triton(gate):
        return swiglu_op(gate, up)
    return F.silu(gate) * up
