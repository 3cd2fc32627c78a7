"""
The compiled kernels of the CPU: train_cpu.c (training, fp32) and decode_cpu.c (generation, called by fast.py).

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
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "train_cpu.c", HERE / "decode_cpu.c"]
FOLDER = HERE.parent / "out" / "native"
# no -ffast-math: sums keep their order, -inf and NaN their meaning. A fused multiply-add wherever a b + c stands,
# by the same rule in every loop: a row's bits must not depend on which loop it went through
FLAGS = ["-O3", "-ffp-contract=fast", "-shared", "-fPIC"]
MACHINE = ["-march=native"], ["-mcpu=native"], []       # the first one the compiler knows (clang on arm64: the second)


@cache
def library():
    """The compiled library, made if need be; None without a compiler, after one line that says so."""
    compiler = os.environ.get("CC", "cc")
    try:
        lib = ctypes.CDLL(str(build(compiler)))
    except (OSError, subprocess.CalledProcessError) as e:
        why = (getattr(e, "stderr", "") or str(e)).strip().splitlines()
        print(f"note: {compiler} did not compile kernels/*_cpu.c ({why[0] if why else e}): generation on the CPU is "
              "several times slower, training by a third; a C compiler (apt install gcc, xcode-select --install) is "
              "all that is missing", file=sys.stderr)
        return None
    p, i, f = c_void_p, c_int64, c_float
    bind(lib, norm_forward=(None, i, i, f, p, p, p, p, p, p), norm_backward=(None, i, i, p, p, p, p, p, p, p),
         swiglu_forward=(None, i, p, p, p), swiglu_backward=(None, i, p, p, p, p, p),
         rope=(None, i, i, i, p, p, p, f, p), attention_floats=(i, i, i), attention_forward=(None, p, p),
         attention_backward=(None, p, p))
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


def trains(*tensors) -> bool:
    """
    True where the kernels of train_cpu.c serve: gradients are wanted, everything is fp32 on a CPU with a last axis of
    a multiple of 16, torch has one thread (it has no second one for them), and there is a compiler. Without gradients
    torch's own operations run, to the bit those of transformers.
    """
    return (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            and all(t.device.type == "cpu" and t.dtype == torch.float32 and t.shape[-1] % 16 == 0 for t in tensors)
            and torch.get_num_threads() == 1 and not torch.compiler.is_compiling() and library() is not None)


def at(t: torch.Tensor | None) -> int | None:
    """The address of a contiguous tensor's first number."""
    return None if t is None else t.data_ptr()
