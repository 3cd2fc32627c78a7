"""
The C kernels of the CPU: train_cpu.c, which train.py calls (training in fp32), and decode_cpu.c, which decode.py calls
(generation). Nobody has to read them to understand the rest: every function has its twin in torch.

Both are compiled once for each machine into one library, out/native/cpu-KEY-DIGEST.so (`cc -O3 -march=native`, four
seconds). A file that its digest does not fit (a disk was full, the power went) is compiled anew. It is code that runs
with the rights of whoever loads it, so it is neither loaded from nor written to a folder of somebody else: there each
user gets a folder of their own under the system's temporary one. Without a compiler everything runs on torch alone,
slower, and one line says so. The environment variable CC names another compiler; CC=none does without one.

ctypes releases Python's lock during a call, so a rollout thread and a training thread run side by side.
"""
import ctypes
import errno
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
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
    compiler = os.environ.get("CC", "").strip() or "cc"
    try:
        return ctypes.CDLL(str(build(compiler)))
    except (OSError, ValueError, subprocess.CalledProcessError) as e:      # ValueError: quotes in CC that do not close
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
    The path of the compiled library, made if these sources, this compiler and this processor have none yet: KEY is a
    hash of the sources, the flags, and all macros that the compiler defines for this processor, its own version among
    them; DIGEST is one of the file. compiler: words as a shell takes them, "ccache gcc". Raises OSError, ValueError or
    CalledProcessError where compiling fails.
    """
    command = shlex.split(compiler)
    for machine in MACHINE:
        flags = [*FLAGS, *machine]
        probe = subprocess.run([*command, *flags, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True)
        if probe.returncode == 0:
            break
    probe.check_returncode()
    sources = b"".join(path.read_bytes() for path in [*SOURCES, HERE / "cpu.h"])
    folder, key = own_folder(FOLDER), digest(sources + repr(flags).encode() + probe.stdout.encode())
    for path in sorted(folder.glob(f"cpu-{key}-*.so")):
        if ours(path) and path.name == f"cpu-{key}-{digest(path.read_bytes())}.so":
            return path
        path.unlink()                                               # cut off, or not ours
    for old in folder.glob("compiling-*"):                          # a compiler that was killed left it
        if time.time() - old.lstat().st_mtime > 600:
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=folder) as inside:       # whole or not at all
        made = Path(inside) / "cpu.so"
        subprocess.run([*command, *flags, f"-I{HERE}", *map(str, SOURCES), "-o", str(made), "-lm"], check=True,
                       capture_output=True, text=True)
        made.chmod(0o755)                                           # whatever the umask: nobody else may write to it
        with open(made, "rb") as f:
            path = folder / f"cpu-{key}-{digest(f.read())}.so"
            os.fsync(f.fileno())                                    # the name must not outlive a power cut without it
        os.replace(made, path)
    return path


def digest(content: bytes) -> str:
    """16 hexadecimal digits of its sha256."""
    return hashlib.sha256(content).hexdigest()[:16]


def ours(path: Path) -> bool:
    """Does it belong to this user, or to root, and may nobody else write to it?"""
    about = path.lstat()
    return about.st_uid in (os.geteuid(), 0) and not (about.st_mode & 0o022 or stat.S_ISLNK(about.st_mode))


def own_folder(folder: Path) -> Path:
    """folder, made if need be, or one in the system's temporary folder when somebody else may write to it."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if folder.lstat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode & ~0o022)
        if ours(folder) and os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"nanomimo-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not ours(folder):
        raise PermissionError(errno.EACCES, "belongs to somebody else", str(folder))
    return folder
