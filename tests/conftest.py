"""
Test settings that must come first: one thread, Triton's CPU interpreter where there is no GPU, SIGTERM for pytest.

TRITON_INTERPRET must be set before triton is first imported in a process: tl.sum and the like are @jit objects made at
that import. The second half repairs bfloat16 in the interpreter, which otherwise computes it wrongly without a warning.
"""
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytest  # noqa: E402
import torch  # noqa: E402  (does not import triton)

torch.set_num_threads(1)
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def sigterm_ends_pytest(request, monkeypatch):
    """A script called in this process does not take SIGTERM away from pytest, unless the test is about that."""
    import distributed
    if "catches_sigterm" not in request.keywords:
        monkeypatch.setattr(distributed, "catch_sigterm", lambda: None)


def repair_bfloat16() -> None:
    """
    The interpreter stores bf16 as uint16 and then computes on the bit patterns: a dot multiplies integers, a cast
    truncates. Convert the operands of tl.dot to fp32, round casts to nearest even, and refuse all other bf16
    arithmetic, so that kernels cast to fp32 right after the load.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def narrow(x):
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "bfloat16_repaired", False):
        return
    dot, cast = builder.create_dot, builder.cast_impl
    fp_to_fp, binary = builder.create_fp_to_fp, builder.binary_op

    def up(h):
        return handle(widen(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h

    def to16(source, dtype):
        return source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16

    def down(source):
        return handle(narrow(source.data), tl.bfloat16)

    def checked_binary(self, left, right, op):
        if left.dtype.scalar == tl.bfloat16:
            raise TypeError("bf16 arithmetic in the interpreter: cast to float32 first")
        return binary(self, left, right, op)

    builder.create_dot = lambda self, a, b, d, *args: dot(self, up(a), up(b), d, *args)
    builder.cast_impl = lambda self, s, d: down(s) if to16(s, d) else cast(self, s, d)
    builder.create_fp_to_fp = lambda self, s, d, mode: down(s) if to16(s, d) else fp_to_fp(self, s, d, mode)
    builder.create_fp_trunc = lambda self, s, d: self.cast_impl(s, d)
    builder.binary_op = checked_binary
    builder.bfloat16_repaired = True


if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        repair_bfloat16()
    except ImportError:  # no triton: the kernel tests skip and say so
        pass
