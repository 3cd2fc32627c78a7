"""
Kernels: one file each, with the torch reference, the Triton kernel and the custom op side by side.

CPU tensors take the reference, plain torch, and where gradients are wanted the C of train_cpu.c (cpu.py). CUDA
tensors take the Triton kernel. Triton is imported only where a kernel can run: with a CUDA build of torch, or when the
environment asks for it before the first import.

    TRITON_INTERPRET=1                      define the kernels for Triton's CPU interpreter (tests)
    TRITON_INTERPRET=1 NANOMIMO_TRITON=1    ... and let CPU tensors take them (slow: milliseconds per program)
    NANOMIMO_AUTOTUNE=1                     on CUDA, time a kernel's few configurations once per shape

Without the last one the first configuration of a list is used, so two runs on one machine agree bit for bit.
"""
import os
import types

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
triton, tl = None, types.SimpleNamespace(constexpr=lambda value: value)  # enough for the kernels' signatures
if torch.version.cuda or INTERPRET or os.environ.get("NANOMIMO_TRITON") == "1":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.10 stops fusing a*b+c unless told
    try:
        import triton
        import triton.language as tl  # noqa: F401  (re-exported)
    except ImportError:  # a CUDA build without triton (Windows): the references serve
        pass


_plain = False


def set_plain(plain: bool) -> None:
    """True: torch code only, in training and in decoding; what the flag --plain of the scripts sets."""
    global _plain
    _plain = plain


def is_plain() -> bool:
    """Whether every operation takes its torch reference, so that a breakpoint there is hit."""
    return _plain


def jit(fn):
    """triton.jit where triton is in use, else the function itself, which nobody calls."""
    return triton.jit(fn) if triton else fn


def use_triton(x):
    """True if tensor x should take the Triton kernel."""
    if _plain:
        return False
    if x.is_cuda:
        return triton is not None and not INTERPRET and x.dtype != torch.float64
    return INTERPRET and triton is not None and os.environ.get("NANOMIMO_TRITON") == "1"


def next_pow2(n):
    return 1 << max(n - 1, 0).bit_length()


def wide(x):
    """The dtype that sums over x are kept in: fp32, or fp64 for fp64 input (the interpreter tests)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def acc_type(x):
    """The same for a kernel's accumulators."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def sm_count(device):
    """Processors that a grid should fill; few under the interpreter, where programs are costly."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def arch(device):
    """The target whose configurations apply: 90 Hopper, 100 datacentre Blackwell, 80 everything else."""
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


_best = {}


def tune(key, configs, launch):
    """The configuration to use: the first; under NANOMIMO_AUTOTUNE=1 the fastest, measured once per key."""
    if len(configs) == 1 or os.environ.get("NANOMIMO_AUTOTUNE") != "1" or INTERPRET:
        return configs[0]
    if key not in _best:
        times = [triton.testing.do_bench(lambda c=c: launch(c), warmup=5, rep=30) for c in configs]
        _best[key] = configs[times.index(min(times))]
    return _best[key]


def scratch():
    """
    Descriptors made inside a kernel live in global memory: tell triton where to get it. Its setting is per thread,
    and backward passes run in autograd's own, so this is called before every launch that needs it.
    """
    if not INTERPRET:
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
