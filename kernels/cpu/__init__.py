"""
The C kernels of the CPU: train_cpu.c, which train.py calls (training in fp32), and decode_cpu.c, which decode.py calls
(generation). Nobody has to read them to understand the rest: every function has its twin in torch.

Both are compiled once for each machine into one library, out/native/cpu-<hash>.so (`cc -O3 -march=native`, four
seconds). Without a compiler everything runs on torch alone, slower, and one line says so. The environment variable CC
names another compiler; CC=none does without one.

ctypes releases Python's lock during a call, so a rollout thread and a training thread run side by side.
"""
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "train_cpu.c", HERE / "decode_cpu.c"]
FOLDER = HERE.parent.parent / "out" / "native"
# no -ffast-math: sums keep their order, -inf and NaN their meaning. -ffp-contract=fast makes a b + c one instruction
# by the same rule in every loop, so a row's bits do not depend on the loop that computed it. -fwrapv: e^x shifts an
# exponent past the sign
FLAGS = ["-O3", "-ffp-contract=fast", "-fwrapv", "-shared", "-fPIC"]
MACHINE = ["-march=native"], ["-mcpu=native"], []       # the first one the compiler knows (clang on arm64: the second)


@cache
def library() -> ctypes.CDLL | None:
    """
    The compiled library, made if need be; None without a compiler, after one line that says so. train.py and decode.py
    each declare the functions that they call.
    """
    compiler = os.environ.get("CC", "cc")
    try:
        return ctypes.CDLL(str(build(compiler)))
    except (OSError, subprocess.CalledProcessError) as e:
        why = (getattr(e, "stderr", "") or str(e)).strip().splitlines()
        print(f"note: kernels/cpu/*.c not compiled by {compiler} into {FOLDER} ({why[0] if why else e}): on the CPU "
              "generation is several times slower, training too is slower; needed are a C compiler (apt install gcc, "
              "xcode-select --install) and a folder to write to", file=sys.stderr)
        return None


def bind(lib: ctypes.CDLL, **functions: tuple) -> None:
    """Declare functions of the library: name = (type of the result, types of the arguments ...)."""
    for name, (result, *arguments) in functions.items():
        getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments


def build(compiler: str) -> Path:
    """
    The path of the compiled library, made if these sources, this compiler and this processor have none yet: its name is
    a hash of the sources, the flags, and all macros that the compiler defines for this processor, its own version among
    them. Raises OSError or CalledProcessError where compiling fails.
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
