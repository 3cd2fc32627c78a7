"""
Kernels: one file each, with the torch reference, the Triton kernel and the operator that chooses, side by side.

CUDA tensors take the Triton kernel, CPU tensors the reference, which is plain torch. Training in fp32 on a CPU takes
the C of kernels/cpu/train.py instead; model.operators chooses it. Triton is imported only where a kernel can run: with
a CUDA build of torch, or when the environment asks for it before the first import.

    TRITON_INTERPRET=1                      define the kernels for Triton's CPU interpreter (tests)
    TRITON_INTERPRET=1 NANOMIMO_TRITON=1    ... and let CPU tensors take them (slow: milliseconds per program)
    NANOMIMO_AUTOTUNE=1                     on CUDA, time a kernel's few configurations once per shape

Without the last one the first configuration of a list is used, so two runs on one machine agree bit for bit.
"""
import os
import types
from collections.abc import Callable

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
FORCED = os.environ.get("NANOMIMO_TRITON") == "1"

# tl is triton's language or, without triton, the one name that the kernels' signatures need: defined here once, because
# every kernel file must load with and without triton
triton, tl = None, types.SimpleNamespace(constexpr=None)
if torch.version.cuda or INTERPRET or FORCED:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")     # triton 3.10 makes a*b+c one instruction only if asked
    try:
        import triton
        import triton.language

        tl = triton.language
    except ImportError:                                        # a CUDA build without triton (Windows): torch serves
        pass


# ---- which build runs -----------------------------------------------------------------------------------------------

AVAILABLE: frozenset[tuple[str, torch.dtype]] = frozenset()
if triton is not None and not INTERPRET:
    AVAILABLE = frozenset(("cuda", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
elif triton is not None and FORCED:
    AVAILABLE = frozenset(("cpu", dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16))

# The tensors that take the Triton kernels: `(x.device.type, x.dtype) in kernels.TRITON` is the one test of it. Both
# names below are changed by set_plain alone.
TRITON = AVAILABLE
PLAIN = False


def set_plain(plain: bool) -> None:
    """True: torch code only, in training and in decoding; what the flag --plain of the scripts sets."""
    global PLAIN, TRITON
    PLAIN, TRITON = plain, frozenset() if plain else AVAILABLE


def is_plain() -> bool:
    """Whether every operation takes its torch reference, so that a breakpoint there is hit."""
    return PLAIN


# ---- for the kernels ------------------------------------------------------------------------------------------------

def jit(fn: Callable) -> Callable:
    """triton.jit where triton is in use, else the function itself, which nobody calls."""
    return triton.jit(fn) if triton else fn


def next_pow2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n <= 1."""
    return 1 << max(n - 1, 0).bit_length()


def acc_type(x: Tensor):
    """Triton's dtype for sums over x: fp32, or fp64 for fp64 input (the interpreter tests)."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def sm_count(device: torch.device) -> int:
    """Processors that a grid should fill; few under the interpreter, where programs are costly."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def arch(device: torch.device) -> int:
    """The target whose configurations apply: 90 Hopper, 100 datacentre Blackwell, 80 everything else."""
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


_fastest: dict[tuple, tuple] = {}


def tune(key: tuple, configs: list[tuple], launch: Callable[[tuple], None]) -> tuple:
    """The configuration to use: the first; under NANOMIMO_AUTOTUNE=1 the fastest, measured once per key."""
    if len(configs) == 1 or os.environ.get("NANOMIMO_AUTOTUNE") != "1" or INTERPRET:
        return configs[0]
    if key not in _fastest:
        times = [triton.testing.do_bench(lambda c=c: launch(c), warmup=5, rep=30) for c in configs]
        _fastest[key] = configs[times.index(min(times))]
    return _fastest[key]


def scratch() -> None:
    """
    Give triton the memory in which descriptors made inside a kernel live. Its setting is per thread, and backward
    passes run in autograd's own thread, so this is called before every launch that needs it.
    """
    if not INTERPRET:
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
