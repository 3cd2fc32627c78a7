"""
The forward pass for generation in fp32 on a CPU: kernels/cpu/decode_cpu.c, compiled, its weights packed, and called.

At batch 1 a small model spends its time between operations, not in them: model.py makes some 60 calls into torch
a layer. Here a forward is one call into C, an order of magnitude faster (docs/engine.md). It computes the same
function up to rounding; tests/test_cpu_decode.py holds it against model.py. On a GPU the engine runs model.py in a
CUDA graph.

Without a C compiler (kernels/cpu/__init__.py) the engine runs model.py's own forward: everything works, generation is several
times slower.
"""
import ctypes
import mmap
from contextlib import suppress
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import cpu


def struct(name: str, **fields):
    """A struct of decode_cpu.c, field for field."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def pointers(*names: str) -> dict:
    return dict.fromkeys(names, c_void_p)


Shape = struct("Shape", **dict.fromkeys(("D", "Dp", "d", "dp", "H", "K", "Fp", "V", "Vp", "C"), c_int32), eps=c_float)
Packed = struct("Block", **pointers("norm1", "q", "q_bias", "kv", "kv_bias", "o", "norm2", "gate_up", "down"))
Entry = struct("Entry", **pointers("input_proj", "hidden_norm", "token_norm", "final_norm"))
Model = struct("Model", s=Shape, n_layer=c_int64, n_draft=c_int64, blocks=POINTER(Packed), caches=POINTER(c_void_p),
               mtp=POINTER(Entry), **pointers("embedding", "norm", "lm_head", "cos", "sin", "scratch"))
Places = struct("Plan", first=c_int64, Q=c_int64, **pointers("position", "column"))
STATE = ("tokens", "logp", "u", "n", "limit", "stop", "temperature", "top_p", "top_k", "h", "verified", "accepted")
ROOM = ("ended", "position", "column", "ids", "x", "states", "logits")
State = struct("State", columns=c_int64, ring=c_int64, stops=c_int64, **pointers(*STATE, *ROOM))


@cache
def library():
    """The library of kernels/cpu with the functions of decode_cpu.c; None without a compiler."""
    lib = cpu.library()
    if lib is not None:
        p, i = c_void_p, c_int64
        cpu.bind(lib, scratch_floats=(i, p), trunk=(None, p, p, i, p, i, p), mtp=(None, p, i, p, i, p, p, i, p),
                 head=(None, p, i, i, p, p), prefill_chunk=(None, p, p, i, i, i, p), decode=(i, p, p, i, p),
                 draft=(None, p, p, i, i, i), uniform=(None, i, i, p), exp_of=(None, i, p, p))
    return lib


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


def large_pages(n: int) -> Tensor:
    """
    n floats in pages of 2 MB, where the system has them (Linux): with pages of 4 KB a pass over 13 MB of weights
    touches more of them than the processor keeps addresses for.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n)
    page = 2 << 20                                                  # bytes
    memory = mmap.mmap(-1, 4 * n + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):                                         # a kernel without
        memory.madvise(mmap.MADV_HUGEPAGE)
    floats = torch.frombuffer(memory, dtype=torch.float32)          # keeps the memory
    skip = -floats.data_ptr() % page // 4
    return floats[skip:skip + n]


class CpuForward:
    """
    The forward of one model over one cache (cache.PackedRows), and the engine's prefill_chunk, decode and draft, which work on
    the tensors of its state in place. n_ids: rows of the head in use, the rest is padding; chunk: most prompt tokens
    read at once. The packed weights are a private copy, made again after any parameter was written to (an optimizer
    step, a load).
    """
    def __init__(self, model: nn.Module, n_draft: int, rows, state: dict[str, Tensor], lib, n_ids: int, chunk: int):
        cfg, self.model, self.lib = model.cfg, model, lib
        self.mtp_layers = list(model.mtp_layers[:n_draft])
        self.params, self.version = list(model.parameters()), None
        self.free = torch.empty(0)                                  # what is left of the last large_pages()
        self.kept: dict[str, Tensor] = {"cache": rows.kv}           # all tensors of which C holds the addresses
        s = Shape(cfg.d_model, up16(cfg.d_model), cfg.head_dim, up16(cfg.head_dim), cfg.n_head, cfg.n_kv_head,
                  up16(cfg.d_ff), n_ids, up16(n_ids), rows.columns, cfg.rms_eps)
        n = len(rows.kv)
        self.blocks, self.entries = (Packed * n)(), (Entry * max(1, n_draft))()
        caches = (c_void_p * n)(*(kv.data_ptr() for kv in rows.kv))
        self.c = Model(s, cfg.n_layer, n_draft, self.blocks, caches, self.entries)
        self.shape, self.at = self.c.s, byref(self.c)
        self.c.scratch = self.keep("scratch", torch.empty(lib.scratch_floats(byref(s))))
        # a forward has a chunk of prompts, or n_draft + 1 tokens a sequence, which is also draft()'s widest window
        S, N = len(state["n"]), max(chunk, len(state["n"]) * (n_draft + 1))
        self.ended, self.logits = torch.zeros(S, dtype=torch.bool), torch.empty(S * (n_draft + 1), s.Vp)
        places = [torch.empty(N, dtype=torch.int64) for _ in range(3)]
        room = [self.ended, *places, torch.empty(N, s.Dp), torch.empty(N, s.D), self.logits]
        tensors = {**{name: state[name] for name in STATE}, **dict(zip(ROOM, room, strict=True))}
        self.kept |= tensors
        self.state = State(state["tokens"].shape[1], state["h"].shape[1], state["stop"].shape[1],
                           *(t.data_ptr() for t in tensors.values()))
        self.rows, self.done = byref(self.state), c_int64()

    def refresh(self, cos: Tensor, sin: Tensor) -> None:
        """New rotations, and the weights packed again if they have changed."""
        self.kept["cos"], self.kept["sin"] = cos, sin
        self.c.cos, self.c.sin = cos.data_ptr(), sin.data_ptr()
        version = sum(map(attrgetter("_version"), self.params))     # in-place writes count up
        if version == self.version:
            return
        self.version = version
        with torch.no_grad():
            self.pack()

    def pack(self) -> None:
        """All weights, in the order in which they are read: the trunk, the head, the MTP layers."""
        model, c, s, n = self.model, self.c, self.shape, len(self.model.layers)
        for i, block in enumerate(model.layers):
            self.pack_into(self.blocks[i], f"{i}", packed(block, s))
        c.norm, c.embedding = self.keep("norm", pad(model.norm.weight, s.Dp)), model.embed_tokens.weight.data_ptr()
        c.lm_head = self.keep("head", panels(pad(model.lm_head.weight[:s.V], s.Vp, s.Dp)))
        for k, layer in enumerate(self.mtp_layers):
            halves = layer.input_proj.weight.unflatten(1, (2, -1))  # [D,2,D]
            self.pack_into(self.entries[k], f"mtp {k}", {
                "hidden_norm": pad(layer.hidden_layernorm.weight, s.Dp),
                "token_norm": pad(layer.token_layernorm.weight, s.Dp),
                "input_proj": panels(pad(halves, s.Dp, 2, s.Dp).flatten(1)),
                "final_norm": pad(layer.final_layernorm.weight, s.Dp)})
            self.pack_into(self.blocks[n + k], f"{n + k}", packed(layer, s))

    def pack_into(self, target, prefix: str, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            setattr(target, name, self.keep(f"{prefix}.{name}", value))

    def keep(self, name: str, value: Tensor) -> int:
        """A contiguous copy under this name, always at the same address -> the address."""
        if name not in self.kept:
            n = up16(value.numel())
            if n > len(self.free):
                self.free = large_pages(max(n, 8 << 20))
            self.kept[name], self.free = self.free[:value.numel()].view(value.shape), self.free[n:]
        return self.kept[name].copy_(value).data_ptr()

    def prefill_chunk(self, first: int, B: int, T: int, end: list[int]) -> None:
        """Engine.prefill_chunk for rows first .. first + B - 1; end: how many tokens of each are read after it."""
        self.lib.prefill_chunk(self.at, self.rows, first, B, T, (c_int64 * B)(*end))

    def decode(self, R: int) -> tuple[Tensor | None, int]:
        """Engine.decode: -> (ended [R], None if no row has; most tokens a row has gained)."""
        most = self.lib.decode(self.at, self.rows, R, byref(self.done))
        return self.ended[:R] if self.done.value else None, most

    def draft(self, first: int, B: int, E: int) -> None:
        """Engine.draft."""
        self.lib.draft(self.at, self.rows, first, B, E)

    def uniform(self, row: int, first: int, seed: int) -> None:
        """sampling.uniform of the seed into the state's u, for the tokens at columns first and on."""
        u = self.kept["u"][row, first:]
        self.lib.uniform(seed, len(u), u.data_ptr())

    # -- the parts, each alone: the tests hold them against model.py

    def places(self, first: int, positions: Tensor):
        """Where tokens stand: positions int64 [B,Q], contiguous and kept by the caller, of rows first and on."""
        return byref(Places(first, positions.shape[1], positions.data_ptr(), positions.data_ptr()))

    def trunk(self, ids: Tensor, first: int, positions: Tensor) -> Tensor:
        """ids int64 [B,Q] -> h [B,Q,D] before the final norm."""
        x, ids = torch.empty(*ids.shape, self.shape.Dp), ids.contiguous()
        self.lib.trunk(self.at, self.places(first, positions), ids.numel(), ids.data_ptr(), False, x.data_ptr())
        return x[..., :self.shape.D]

    def mtp(self, k: int, h: Tensor, ahead: Tensor, first: int, positions: Tensor, want: str = "all") -> Tensor | None:
        """MTP layer k; h [B,Q,D] before the final norm, ahead [B,Q]. want "all" -> [B,Q,D], "last" -> [B,D], "none"."""
        s, (B, Q) = self.shape, ahead.shape
        x, h, ahead = torch.empty(B, Q, s.Dp), h.contiguous(), ahead.contiguous()
        every = {"all": 1, "last": Q, "none": 0}[want]
        self.lib.mtp(self.at, k, self.places(first, positions), B * Q, h.data_ptr(), ahead.data_ptr(), every,
                     x.data_ptr())
        return None if want == "none" else x[..., :s.D] if want == "all" else x.view(-1, s.Dp)[:B, :s.D]

    def head(self, x: Tensor, layer: int = -1) -> Tensor:
        """x [N,D] -> logits [N,V], behind the trunk's norm (-1) or an MTP layer's."""
        x, logits = pad(x, self.shape.Dp).contiguous(), torch.empty(len(x), self.shape.Vp)
        self.lib.head(self.at, layer, len(x), x.data_ptr(), logits.data_ptr())
        return logits[:, :self.shape.V]


def packed(block: nn.Module, s: Shape) -> dict[str, Tensor]:
    """
    One block's weights as decode_cpu.c reads them and in its order, heads and widths padded with zeros to multiples of
    16.
    """
    a, mlp, H, K, d, dp = block.self_attn, block.mlp, s.H, s.K, s.d, s.dp

    def heads(*parts: Tensor) -> Tensor:
        """[heads d, ...] each -> [heads, parts, dp, ...] flattened: k and v of one head lie side by side."""
        parts = [F.pad(p.unflatten(0, (-1, d)), (0, 0) * (p.ndim - 1) + (0, dp - d)) for p in parts]
        return torch.stack(parts, 1).flatten(0, 2)
    gate_up = torch.cat([pad(w, s.Fp, s.Dp) for w in (mlp.gate_proj.weight, mlp.up_proj.weight)])
    o = pad(a.o_proj.weight.unflatten(1, (H, d)), s.Dp, H, dp).flatten(1)
    return {"norm1": pad(block.input_layernorm.weight, s.Dp),
            "kv": panels(pad(heads(a.k_proj.weight, a.v_proj.weight), 2 * K * dp, s.Dp)),
            "kv_bias": heads(a.k_proj.bias, a.v_proj.bias),
            "q": panels(pad(heads(a.q_proj.weight), H * dp, s.Dp)), "q_bias": heads(a.q_proj.bias), "o": panels(o),
            "norm2": pad(block.post_attention_layernorm.weight, s.Dp), "gate_up": panels(gate_up),
            "down": panels(pad(mlp.down_proj.weight, s.Dp, s.Fp))}
