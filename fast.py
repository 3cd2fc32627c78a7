"""
The forward pass for generation in fp32 on a CPU: kernels/decode_cpu.c, compiled, its weights packed, and called.

At batch 1 a small model spends its time between operations, not in them: model.py makes some 60 calls into torch
a layer. Here a forward is one call into C, an order of magnitude faster (docs/engine.md). It computes the same
function up to rounding; tests/test_native.py holds it against model.py. On a GPU the engine runs model.py in a
CUDA graph.

The C file is compiled once for each machine (`cc -O3 -march=native`, two seconds) into out/native/. Without a
compiler the engine runs model.py's own forward, and says so once: everything works, generation is several times
slower. CC names another compiler; CC=none does without.

ctypes releases Python's lock during a call, so a rollout thread and a training thread run side by side.
"""
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Block, MiMo

SOURCE = Path(__file__).resolve().parent / "kernels" / "decode_cpu.c"
FOLDER = Path(__file__).resolve().parent / "out" / "native"
# no -ffast-math: sums keep their order, -inf and NaN their meaning. A fused multiply-add wherever a b + c stands,
# by the same rule in every loop: a row's bits must not depend on which loop it went through
FLAGS = ["-O3", "-ffp-contract=fast", "-shared", "-fPIC"]
MACHINE = ["-march=native"], ["-mcpu=native"], []       # the first one the compiler knows (clang on arm64: the second)


class Shape(ctypes.Structure):
    """Shape of decode_cpu.c."""
    _fields_ = [*((name, c_int32) for name in ("D", "Dp", "d", "dp", "H", "K", "Fp", "V", "Vp", "C")), ("eps", c_float)]


class Packed(ctypes.Structure):
    """Block of decode_cpu.c."""
    _fields_ = [(name, c_void_p) for name in
                ("norm1", "q", "q_bias", "kv", "kv_bias", "o", "norm2", "gate_up", "down")]


class Places(ctypes.Structure):
    """Plan of decode_cpu.c."""
    _fields_ = [("first", c_int64), ("Q", c_int64), *((name, c_void_p) for name in ("position", "column", "cos", "sin"))]


# ---- the compiler --------------------------------------------------------------------------------------------------

@cache
def library():
    """decode_cpu.c as a ctypes library, compiled if need be; None without a compiler, after one line that says so."""
    compiler = os.environ.get("CC", "cc")
    try:
        path = build(compiler)
        lib = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as e:
        why = (getattr(e, "stderr", "") or str(e)).strip().splitlines()
        print(f"note: {compiler} did not compile {SOURCE.name} ({why[0] if why else e}): generation on the CPU is several "
              "times slower; a C compiler (apt install gcc, xcode-select --install) is all that is missing",
              file=sys.stderr)
        return None
    p, i, shape, blocks, plan = c_void_p, c_int64, POINTER(Shape), POINTER(Packed), POINTER(Places)
    lib.trunk.argtypes = [shape, blocks, i, p, p, plan, i, p, i, p, p]
    lib.mtp.argtypes = [shape, blocks, p, p, p, p, p, plan, i, p, i, p, i, p, p]
    lib.head.argtypes = [shape, p, p, i, p, i, p, p, p]
    lib.exp_of.argtypes = [i, p, p]
    lib.scratch_floats.argtypes, lib.scratch_floats.restype = [shape], i
    lib.trunk.restype = lib.mtp.restype = lib.head.restype = lib.exp_of.restype = None
    return lib


def build(compiler: str) -> Path:
    """
    -> the compiled library, made if this source, compiler and processor have none yet: its name is a hash of the
    source, the flags, and all macros the compiler defines for this processor, its own version among them.
    """
    for machine in MACHINE:
        flags = [*FLAGS, *machine]
        probe = subprocess.run([compiler, *flags, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True)
        if probe.returncode == 0:
            break
    probe.check_returncode()
    name = hashlib.sha256(SOURCE.read_bytes() + repr(flags).encode() + probe.stdout.encode()).hexdigest()[:16]
    path = FOLDER / f"decode_cpu-{name}.so"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:     # whole or not at all, whoever else compiles it now
            made = Path(folder) / path.name
            subprocess.run([compiler, *flags, str(SOURCE), "-o", str(made), "-lm"], check=True, capture_output=True,
                           text=True)
            os.replace(made, path)
    return path


# ---- packed weights ------------------------------------------------------------------------------------------------

def up16(n: int) -> int:
    return -(-n // 16) * 16


def pad(x: Tensor, *sizes: int) -> Tensor:
    """x with zeros behind its last axes up to the sizes."""
    widths = [w for have, want in zip(x.shape[::-1], sizes[::-1], strict=False) for w in (0, want - have)]
    return F.pad(x, widths)


def panels(w: Tensor) -> Tensor:
    """A weight [out,in], both multiples of 16 -> [out/16, in, 16], what the products of decode_cpu.c read."""
    return w.unflatten(0, (-1, 16)).transpose(1, 2)


class Forward:
    """
    The forward of one model over one cache (cache.Rows). The packed weights are a private copy, made again after
    any parameter was written to (an optimizer step, a load).
    """
    def __init__(self, model: MiMo, n_mtp: int, rows, lib):
        cfg, self.model, self.lib, self.rows = model.cfg, model, lib, rows
        self.mtp_layers = list(model.mtp_layers[:n_mtp])
        self.params, self.version = list(model.parameters()), None
        self.shape = s = Shape(cfg.d_model, up16(cfg.d_model), cfg.head_dim, up16(cfg.head_dim), cfg.n_head,
                               cfg.n_kv_head, up16(cfg.d_ff), cfg.vocab_size, up16(cfg.vocab_size), rows.columns,
                               cfg.rms_eps)
        self.kept: dict[str, Tensor] = {}                           # the packed tensors; C holds their addresses
        self.caches = (c_void_p * len(rows.kv))(*(kv.data_ptr() for kv in rows.kv))
        self.blocks = (Packed * len(rows.kv))()
        self.scratch = torch.empty(lib.scratch_floats(byref(s)))
        self.places = Places()

    @torch.no_grad()
    def refresh(self) -> None:
        version = sum(p._version for p in self.params)              # in-place writes count up
        if version == self.version:
            return
        self.version, model, s = version, self.model, self.shape
        for i, block in enumerate([*model.layers, *self.mtp_layers]):
            for name, value in packed(block, s).items():
                setattr(self.blocks[i], name, self.keep(f"{i}.{name}", value))
        for k, layer in enumerate(self.mtp_layers):
            halves = layer.input_proj.weight.unflatten(1, (2, -1))  # [D,2,D]
            self.keep(f"entry{k}", panels(pad(halves, s.Dp, 2, s.Dp).flatten(1)))
            self.keep(f"hidden{k}", pad(layer.hidden_layernorm.weight, s.Dp))
            self.keep(f"token{k}", pad(layer.token_layernorm.weight, s.Dp))
        for norm in (model.norm, *(layer.final_layernorm for layer in self.mtp_layers)):
            self.keep(norm, pad(norm.weight, s.Dp))
        self.keep("head", panels(pad(model.lm_head.weight, s.Vp, s.Dp)))
        self.embedding = model.embed_tokens.weight.data_ptr()

    def keep(self, name, value: Tensor) -> int:
        """A contiguous copy under this name, always at the same address -> the address."""
        if name not in self.kept:
            self.kept[name] = torch.empty(value.shape)
        return self.kept[name].copy_(value).data_ptr()

    def at(self, plan) -> Places:
        """Where the plan's tokens stand; its tensors stay alive in the plan."""
        p = self.places
        p.first, p.Q, p.position, p.column = plan.first, plan.shape[1], plan.positions.data_ptr(), plan.columns.data_ptr()
        p.cos, p.sin = plan.cos.data_ptr(), plan.sin.data_ptr()
        return p

    def trunk(self, ids: Tensor, plan, fill: bool) -> Tensor | None:
        """ids int64 [B,Q] -> h [B,Q,D] before the final norm; fill: only the caches are filled."""
        s, x, ids = self.shape, torch.empty(*ids.shape, self.shape.Dp), ids.contiguous()
        self.lib.trunk(s, self.blocks, self.model.cfg.n_layer, self.caches, self.embedding, self.at(plan), ids.numel(),
                       ids.data_ptr(), fill, x.data_ptr(), self.scratch.data_ptr())
        return None if fill else x[..., :s.D]

    def mtp(self, k: int, h: Tensor, ahead: Tensor, plan, want: str) -> Tensor | None:
        """MTP layer k; h [B,Q,D] before the final norm, ahead [B,Q]. want "all" -> [B,Q,D], "last" -> [B,D], "none"."""
        s, (B, Q), i = self.shape, ahead.shape, self.model.cfg.n_layer + k
        x, h, ahead = torch.empty(B, Q, s.Dp), h.contiguous(), ahead.contiguous()
        every = {"all": 1, "last": Q, "none": 0}[want]
        kept = self.kept
        self.lib.mtp(s, byref(self.blocks[i]), self.caches[i], self.embedding, kept[f"entry{k}"].data_ptr(),
                     kept[f"hidden{k}"].data_ptr(), kept[f"token{k}"].data_ptr(), self.at(plan), B * Q, h.data_ptr(),
                     h.shape[-1], ahead.data_ptr(), every, x.data_ptr(), self.scratch.data_ptr())
        return None if want == "none" else x[..., :s.D] if want == "all" else x.view(-1, s.Dp)[:B, :s.D]

    def head(self, x: Tensor, norm) -> Tensor:
        """x [N,D] -> logits [N,V]."""
        s, N = self.shape, len(x)
        logits = torch.empty(N, s.Vp)
        self.lib.head(s, self.kept[norm].data_ptr(), self.kept["head"].data_ptr(), N, x.data_ptr(), x.stride(0),
                      logits.data_ptr(), None, self.scratch.data_ptr())
        return logits[:, :s.V]


def packed(block: Block, s: Shape) -> dict[str, Tensor]:
    """One block's weights as decode_cpu.c reads them, heads and widths padded with zeros to multiples of 16."""
    a, mlp, H, K, d, dp = block.self_attn, block.mlp, s.H, s.K, s.d, s.dp

    def heads(*parts: Tensor) -> Tensor:
        """[heads d, ...] each -> [heads, parts, dp, ...] flattened: k and v of one head lie side by side."""
        parts = [F.pad(p.unflatten(0, (-1, d)), (0, 0) * (p.ndim - 1) + (0, dp - d)) for p in parts]
        return torch.stack(parts, 1).flatten(0, 2)
    gate_up = torch.cat([pad(w, s.Fp, s.Dp) for w in (mlp.gate_proj.weight, mlp.up_proj.weight)])
    o = pad(a.o_proj.weight.unflatten(1, (H, d)), s.Dp, H, dp).flatten(1)
    return {"norm1": pad(block.input_layernorm.weight, s.Dp), "norm2": pad(block.post_attention_layernorm.weight, s.Dp),
            "q": panels(pad(heads(a.q_proj.weight), H * dp, s.Dp)), "q_bias": heads(a.q_proj.bias),
            "kv": panels(pad(heads(a.k_proj.weight, a.v_proj.weight), 2 * K * dp, s.Dp)),
            "kv_bias": heads(a.k_proj.bias, a.v_proj.bias), "o": panels(o), "gate_up": panels(gate_up),
            "down": panels(pad(mlp.down_proj.weight, s.Dp, s.Fp))}
