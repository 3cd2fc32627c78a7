"""
Training on a CPU in fp32: RMSNorm, RoPE, SwiGLU and causal attention of train_cpu.c as autograd functions.

The formulas stand in kernels/rmsnorm.py, rope.py, swiglu.py and attention.py, beside the torch references that
tests/test_cpu_train.py holds these against; docs/kernels.md, section 9, says why they are in C and what it brings.
model.operators takes them where c_kernels_apply is true; the flag --plain, CC=none and a second thread take the
references. Every function here has the signature and the result of its reference.
"""
import ctypes
from ctypes import byref, c_float, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.autograd import Function

import kernels
from kernels import cpu

NO_SECOND = "the kernels of train_cpu.c have no second derivatives; --plain or CC=none takes torch's own operations"


class Arguments(ctypes.Structure):
    """The struct Attention of train_cpu.c, field for field."""
    _fields_ = [*((name, c_int64) for name in ("B", "T", "H", "K", "d")), ("scale", c_float),
                *((name, c_void_p) for name in "bounds q k v o max total dout dq dk dv".split())]


@cache
def library() -> ctypes.CDLL | None:
    """The library of kernels/cpu with the functions of train_cpu.c; None without a compiler."""
    lib = cpu.library()
    if lib is not None:
        p, i, f = c_void_p, c_int64, c_float
        cpu.bind(lib, norm_forward=(None, i, i, f, p, p, p, p, p, p), norm_backward=(None, i, i, p, p, p, p, p, p, p),
                 swiglu_forward=(None, i, p, p, p), swiglu_backward=(None, i, p, p, p, p, p),
                 rope=(None, i, i, i, p, p, p, f, p), attention_floats=(i, i, i), attention_forward=(i, p, p),
                 attention_backward=(i, p, p))
    return lib


def c_kernels_apply(*tensors: Tensor) -> bool:
    """
    True where these functions may take the tensors: gradients are wanted, everything is fp32 on a CPU with a last axis
    of a multiple of 16, torch has one thread, as the kernels have, and there is a compiler. False for DTensors, fake
    tensors and torch.compile; and without gradients, where torch's own operations give the bits of transformers.
    """
    return (not kernels.PLAIN and not torch.compiler.is_compiling() and torch.is_grad_enabled()
            and any(t.requires_grad for t in tensors)
            and all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32
                    and t.ndim and t.shape[-1] % 16 == 0 for t in tensors)
            and ("cpu", torch.float32) not in kernels.TRITON and torch.get_num_threads() == 1
            and library() is not None)


class Norm(Function):
    """y = rmsnorm(x, weight, eps); with a residual (y, s): s = x + residual, y = rmsnorm(s). x [..., D], weight [D]."""
    @staticmethod
    def forward(ctx, x, weight, eps, residual=None):
        D, added = x.shape[-1], residual is not None
        if weight.shape != (D,) or (added and residual.shape != x.shape):
            raise ValueError(f"rmsnorm: x {tuple(x.shape)} needs weight [{D}] and a residual of x's shape")
        x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous() if added else None
        y, r, s = torch.empty_like(x), x.new_empty(x.numel() // D), torch.empty_like(x) if added else x
        if weight.data_ptr() == 0:                                  # FSDP frees parameters
            raise RuntimeError(f"rmsnorm: the weight [{D}] has no memory: are the parameters gathered?")
        library().norm_forward(len(r), D, eps, x.data_ptr(), residual.data_ptr() if added else None, weight.data_ptr(),
                               s.data_ptr(), y.data_ptr(), r.data_ptr())
        ctx.save_for_backward(s, weight, r)
        ctx.set_materialize_grads(False)
        ctx.added = added
        return (y, s) if added else y

    @staticmethod
    def backward(ctx, dy, ds=None):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        s, weight, r = ctx.saved_tensors
        if dy is None:                                              # only the sum was used
            return ds, None, None, ds
        if weight.data_ptr() == 0:
            raise RuntimeError(f"rmsnorm: the weight [{len(weight)}] has no memory: are the parameters gathered?")
        dx, dw, dy = torch.empty_like(s), weight.new_empty(2, len(weight)), dy.contiguous()
        ds = None if ds is None else ds.contiguous()
        library().norm_backward(len(r), s.shape[-1], s.data_ptr(), weight.data_ptr(), r.data_ptr(), dy.data_ptr(),
                                None if ds is None else ds.data_ptr(), dx.data_ptr(), dw.data_ptr())
        return dx, dw[0], None, dx if ctx.added else None


class Rope(Function):
    """q [B, T, H, d], k [B, T, K, d], cos and sin [T, d], [1, T, d] or [B, T, d] -> rotated q and k."""
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        B, T, _, d = q.shape
        if k.shape != (B, T, k.shape[2], d) or cos.shape != sin.shape:
            raise ValueError(f"rope: q {tuple(q.shape)}, k {tuple(k.shape)} and tables {tuple(cos.shape)} do not fit")
        cos, sin = (t.expand(B, T, d).contiguous() for t in (cos, sin))
        ctx.save_for_backward(cos, sin)
        out = []
        for x in (q.contiguous(), k.contiguous()):
            out.append(torch.empty_like(x))
            library().rope(B * T, x.shape[2], d, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), 1.0, out[-1].data_ptr())
        return tuple(out)

    @staticmethod
    def backward(ctx, dq, dk):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        cos, sin = ctx.saved_tensors
        (B, T, d), out = cos.shape, []
        for x in (dq.contiguous(), dk.contiguous()):                # the opposite angle: a rotation's transpose
            out.append(torch.empty_like(x))
            library().rope(B * T, x.shape[2], d, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), -1.0, out[-1].data_ptr())
        return *out, None, None


class SwiGLU(Function):
    """gate, up [..., F] -> silu(gate) up: two passes over memory where eager autograd makes seven."""
    @staticmethod
    def forward(ctx, gate, up):
        if gate.shape != up.shape:
            raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        library().swiglu_forward(y.numel(), gate.data_ptr(), up.data_ptr(), y.data_ptr())
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        (gate, up), dy = ctx.saved_tensors, dy.contiguous()
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        library().swiglu_backward(dy.numel(), gate.data_ptr(), up.data_ptr(), dy.data_ptr(), dgate.data_ptr(),
                                  dup.data_ptr())
        return dgate, dup


class Attention(Function):
    """
    Causal attention, document by document: q [B, T, H, d], k and v [B, T, K, d], K divides H, bounds int32 [2, B, T] or
    None -> [B, T, H, d]. Each row keeps its largest score and its sum of exponentials for the backward pass.
    """
    @staticmethod
    def forward(ctx, q, k, v, bounds=None):
        (B, T, H, d), K = q.shape, k.shape[2]
        if k.shape != (B, T, K, d) or v.shape != k.shape or H % K or (
                bounds is not None and (bounds.shape != (2, B, T) or bounds.dtype != torch.int32)):
            raise ValueError(f"attention: q {tuple(q.shape)} needs k and v [B, T, K, d] with K dividing H, got "
                             f"{tuple(k.shape)} and {tuple(v.shape)}; bounds must be int32 [2, B, T] (doc_bounds)")
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        bounds = bounds if bounds is None else bounds.contiguous()
        o = torch.empty_like(q)
        top, total = q.new_empty(2, K * (B * T * (H // K) + 16))
        room = q.new_empty(library().attention_floats(T, d))
        ctx.save_for_backward(q, k, v, bounds, top, total)
        arguments = Arguments(B, T, H, K, d, d**-0.5, None if bounds is None else bounds.data_ptr(), q.data_ptr(),
                              k.data_ptr(), v.data_ptr(), o.data_ptr(), top.data_ptr(), total.data_ptr())
        if library().attention_forward(byref(arguments), room.data_ptr()):
            raise ValueError("attention: bounds with a document that ends before its token or behind its row "
                             "(doc_bounds makes right ones)")
        return o

    @staticmethod
    def backward(ctx, do):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        q, k, v, bounds, top, total = ctx.saved_tensors
        (B, T, H, d), K, do = q.shape, k.shape[2], do.contiguous()
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        room = q.new_empty(library().attention_floats(T, d))
        arguments = Arguments(B, T, H, K, d, d**-0.5, None if bounds is None else bounds.data_ptr(), q.data_ptr(),
                              k.data_ptr(), v.data_ptr(), None, top.data_ptr(), total.data_ptr(), do.data_ptr(),
                              dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
        library().attention_backward(byref(arguments), room.data_ptr())
        return dq, dk, dv, None


# the operators under the names of kernels/*.py: rmsnorm(x, weight, eps), rmsnorm_residual(x, weight, eps, residual),
# rope(q, k, cos, sin), swiglu(gate, up), attention(q, k, v, bounds)
rmsnorm = rmsnorm_residual = Norm.apply
rope, swiglu, attention = Rope.apply, SwiGLU.apply, Attention.apply
