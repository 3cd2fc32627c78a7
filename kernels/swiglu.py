"""
SwiGLU: y = silu(gate) up, with silu(g) = g sigma(g) (report section 2.2).

    dgate = dy up sigma (1 + gate (1 - sigma))        dup = dy gate sigma              sigma = sigma(gate)

Eager autograd keeps silu(gate) for the backward pass, F numbers a token and layer: 12.1 GiB at 7B and 8,192 tokens.
Here only gate and up are kept, which the layer before has made anyway, and silu is computed again: two operations more
in a pass whose time is that of reading memory. gate and up may be the two halves of one wide projection (row strides
differ from F). The same in C: kernels/cpu/train.py.
"""
import torch
from torch import Tensor

import kernels
from kernels import acc_type, jit, reference, tl

BLOCK, WARPS = 1024, 4                                  # 8 numbers a thread: one 16-byte load of bf16


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """
    gate, up [..., F] -> [..., F]. ValueError (Triton) if the shapes differ.

    By hand: gate = ln 3, up = 4: sigma = 3/4, so y = 3 ln 3 = 3.2958.
    """
    if (gate.device.type, gate.dtype) in kernels.TRITON:
        return swiglu_op(gate, up)
    return reference.swiglu(gate, up)


# ---- Triton ---------------------------------------------------------------------------------------------------------

@jit
def swiglu_kernel(gate, up, out, F_, stride_g, stride_u, BF: tl.constexpr, ACC: tl.constexpr):
    """One program: BF columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BF + tl.arange(0, BF)
    live = col < F_
    g = tl.load(gate + row * stride_g + col, mask=live, other=0.0).to(ACC)
    u = tl.load(up + row * stride_u + col, mask=live, other=0.0).to(ACC)
    tl.store(out + row * F_ + col, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=live)


@jit
def swiglu_backward_kernel(gate, up, dout, dgate, dup, F_, stride_g, stride_u, stride_d, BF: tl.constexpr,
                           ACC: tl.constexpr):
    """One program: BF columns of one row of both gradients."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BF + tl.arange(0, BF)
    live = col < F_
    g = tl.load(gate + row * stride_g + col, mask=live, other=0.0).to(ACC)
    u = tl.load(up + row * stride_u + col, mask=live, other=0.0).to(ACC)
    d = tl.load(dout + row * stride_d + col, mask=live, other=0.0).to(ACC)
    sig = 1.0 / (1.0 + tl.exp(-g))
    # d silu(g) / dg = sig (1 + g (1 - sig))
    dg = d * u * sig * (1.0 + g * (1.0 - sig))
    tl.store(dgate + row * F_ + col, dg.to(dgate.dtype.element_ty), mask=live)
    tl.store(dup + row * F_ + col, (d * g * sig).to(dup.dtype.element_ty), mask=live)


def _flat(t: Tensor) -> Tensor:
    """t [..., F] as [N, F] with unit stride inside a row."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _launch(gate: Tensor) -> tuple[tuple[int, int], dict]:
    """The grid and the options of a launch for gate [N, F]."""
    N, F_ = gate.shape
    return (N, -(-F_ // BLOCK)), dict(BF=BLOCK, num_warps=WARPS, ACC=acc_type(gate))


@torch.library.custom_op("nanomimo::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., F], rows of any stride -> [..., F]. ValueError if the shapes differ."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u = _flat(gate), _flat(up)
    grid, options = _launch(g)
    swiglu_kernel[grid](g, u, out, g.shape[1], g.stride(0), u.stride(0), **options)
    return out


@swiglu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("nanomimo::swiglu_backward", mutates_args=())
def swiglu_backward_op(gate: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """gate, up, dout [..., F] -> the gradients of gate and up, [..., F] each."""
    dgate, dup = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    g, u, d = _flat(gate), _flat(up), _flat(dout)
    grid, options = _launch(g)
    swiglu_backward_kernel[grid](g, u, d, dgate, dup, g.shape[1], g.stride(0), u.stride(0), d.stride(0), **options)
    return dgate, dup


@swiglu_backward_op.register_fake
def _(gate, up, dout):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


swiglu_op.register_autograd(lambda ctx, dout: swiglu_backward_op(*ctx.saved_tensors, dout),
                            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
