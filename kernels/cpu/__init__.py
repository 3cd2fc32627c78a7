"""
The compiled kernels of the CPU: train_cpu.c (training, fp32) and decode_cpu.c (generation, called by decode.py).

Both are compiled once for each machine into one library, out/native/cpu-<hash>.so (`cc -O3 -march=native`, four
seconds). Without a compiler everything runs on torch alone, slower, and one line says so; CC names another compiler,
CC=none does without.

ctypes releases Python's lock during a call, so a rollout thread and a training thread run side by side.
"""
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from ctypes import c_float, c_int64, c_void_p
from functools import cache, wraps
from pathlib import Path

import torch

import kernels

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "train_cpu.c", HERE / "decode_cpu.c"]
FOLDER = HERE.parent.parent / "out" / "native"
# no -ffast-math: sums keep their order, -inf and NaN their meaning. A fused multiply-add wherever a b + c stands,
# by the same rule in every loop: a row's bits must not depend on which loop it went through
FLAGS = ["-O3", "-ffp-contract=fast", "-fwrapv", "-shared", "-fPIC"]    # wrapv: e^x shifts an exponent past the sign
MACHINE = ["-march=native"], ["-mcpu=native"], []       # the first one the compiler knows (clang on arm64: the second)


@cache
def library():
    """The compiled library, made if need be; None without a compiler, after one line that says so."""
    compiler = os.environ.get("CC", "cc")
    try:
        lib = ctypes.CDLL(str(build(compiler)))
    except (OSError, subprocess.CalledProcessError) as e:
        why = (getattr(e, "stderr", "") or str(e)).strip().splitlines()
        print(f"note: kernels/cpu/*.c not compiled by {compiler} into {FOLDER} ({why[0] if why else e}): on the CPU "
              "generation is several times slower, training too is slower; needed are a C compiler (apt install gcc, "
              "xcode-select --install) and a folder to write to", file=sys.stderr)
        return None
    p, i, f = c_void_p, c_int64, c_float
    bind(lib, norm_forward=(None, i, i, f, p, p, p, p, p, p), norm_backward=(None, i, i, p, p, p, p, p, p, p),
         swiglu_forward=(None, i, p, p, p), swiglu_backward=(None, i, p, p, p, p, p),
         rope=(None, i, i, i, p, p, p, f, p), attention_floats=(i, i, i), attention_forward=(i, p, p),
         attention_backward=(i, p, p))
    return lib


def bind(lib, **functions) -> None:
    """name = (type of the result, types of the arguments ...)"""
    for name, (result, *arguments) in functions.items():
        getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments


def build(compiler: str) -> Path:
    """
    -> the compiled library, made if these sources, compiler and processor have none yet: its name is a hash of the
    sources, the flags, and all macros the compiler defines for this processor, its own version among them.
    """
    for machine in MACHINE:
        flags = [*FLAGS, *machine]
        probe = subprocess.run([compiler, *flags, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True)
        if probe.returncode == 0:
            break
    probe.check_returncode()
    sources = b"".join(path.read_bytes() for path in [*SOURCES, HERE / "cpu.h"])
    path = FOLDER / f"cpu-{hashlib.sha256(sources + repr(flags).encode() + probe.stdout.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:     # whole or not at all, whoever else compiles it now
            made = Path(folder) / path.name
            subprocess.run([compiler, *flags, f"-I{HERE}", *map(str, SOURCES), "-o", str(made), "-lm"], check=True,
                           capture_output=True, text=True)
            os.replace(made, path)
    return path


def c_kernels_apply(*tensors) -> bool:
    """
    True where the kernels of train_cpu.c serve: gradients are wanted, everything is fp32 on a CPU with a last axis of
    a multiple of 16, torch has one thread, as the kernels have, and there is a compiler. Without gradients torch's own
    operations run, to the bit those of transformers; and for DTensors, fake tensors and torch.compile.
    """
    return (not kernels.is_plain() and not torch.compiler.is_compiling() and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            and all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"
                    and t.dtype == torch.float32 and t.ndim and t.shape[-1] % 16 == 0 for t in tensors)
            and torch.get_num_threads() == 1 and library() is not None)


def first_order(backward):
    """Marks a backward pass in C: create_graph=True, which would want its own derivative, is a RuntimeError."""
    @wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError("the kernels of train_cpu.c have no second derivatives; CC=none takes torch's own "
                               "operations")
        return backward(ctx, *gradients)
    return checked


def at(t: torch.Tensor | None) -> int | None:
    """The address of a contiguous tensor's first number. RuntimeError for a tensor whose memory was freed (FSDP)."""
    if t is not None and t.data_ptr() == 0 and t.numel():
        raise RuntimeError(f"a tensor {list(t.shape)} without memory: are its parameters gathered?")
    return None if t is None else t.data_ptr()
