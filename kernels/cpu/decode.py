"""
The forward pass for generation on a CPU: decode_cpu.c, compiled, its weights packed, and called (report 2.2). The
weights are fp32 or bf16, all sums fp32.

At batch 1 a small model spends its time between operations, not in them: model.py makes some 60 calls into torch per
layer. Here a forward is one call into C, an order of magnitude faster (docs/engine.md). It computes the same function
up to rounding; tests/test_cpu_decode.py compares it with model.py.

Nobody has to read this file to understand the engine. Without a C compiler, or with --plain, the engine runs the torch
code of engine.py and model.py: everything works, generation is several times slower.

    python -c "from kernels.cpu.decode import library; print(library())"          # None without a compiler
"""
import ctypes
import mmap
from contextlib import suppress
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import cpu


def struct(name: str, **fields) -> type:
    """A struct of decode_cpu.c, field for field."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def pointers(*names: str) -> dict:
    """Fields of a struct that are addresses."""
    return dict.fromkeys(names, c_void_p)


# what each field means stands beside it in decode_cpu.c
Shape = struct("Shape", **dict.fromkeys(("D", "Dp", "d", "dp", "H", "K", "Fp", "V", "Vp", "C", "draft_V", "block",
                                         "half"),
                                        c_int32), eps=c_float)
BlockWeights = struct("Block", **pointers("norm1", "norm2", "q_bias", "kv_bias", "q", "kv", "o", "gate_up", "down"))
MtpWeights = struct("Mtp", **pointers("hidden_norm", "token_norm", "final_norm", "input_proj"))
Model = struct("Model", s=Shape, n_layer=c_int64, n_draft=c_int64, n_mtp=c_int64, blocks=POINTER(BlockWeights),
               caches=POINTER(c_void_p), mtp=POINTER(MtpWeights),
               **pointers("norm", "cos", "sin", "embedding", "lm_head", "scratch"))
STATE = ("tokens", "logp", "u", "n", "limit", "stop", "temperature", "top_p", "top_k", "table", "h", "verified",
         "accepted")
BUFFERS = ("ended", "positions", "columns", "ids", "x", "states", "logits")
State = struct("State", ring=c_int64, n_stops=c_int64, most_drafts=c_int64, **pointers(*STATE, *BUFFERS))


@cache
def library():
    """The library of kernels/cpu with the functions of decode_cpu.c; None without a compiler."""
    lib = cpu.library()
    if lib is not None:
        p, i = c_void_p, c_int64
        cpu.bind(lib, scratch_floats=(i, p), prefill=(None, p, p, i, i, i, p), decode=(i, p, p, i, p),
                 draft=(None, p, p, i, i, i), uniform=(None, i, i, p))
    return lib


# ---- packed weights -------------------------------------------------------------------------------------------------

def up16(n: int) -> int:
    """The smallest multiple of 16 that is at least n."""
    return -(-n // 16) * 16


def pad(x: Tensor, *sizes: int) -> Tensor:
    """x with zeros behind its last axes, up to the sizes."""
    widths = [w for have, want in zip(x.shape[::-1], sizes[::-1], strict=False) for w in (0, want - have)]
    return F.pad(x, widths)


def panels(w: Tensor) -> Tensor:
    """A weight [out,in], both multiples of 16 -> [out/16, in, 16], what the products of decode_cpu.c read."""
    return w.unflatten(0, (-1, 16)).transpose(1, 2)


def large_pages(n: int) -> Tensor:
    """
    n bytes in pages of 2 MB, where the system has them (Linux): with pages of 4 KB one pass over 13 MB of weights
    overflows the TLB.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n, dtype=torch.uint8)
    page = 2 << 20
    memory = mmap.mmap(-1, n + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):                                         # a Linux kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    every = torch.frombuffer(memory, dtype=torch.uint8)             # keeps the memory
    skip = -every.data_ptr() % page
    return every[skip:skip + n]


# ---- the forward ----------------------------------------------------------------------------------------------------

class CpuForward:
    """
    Prefill, decode and draft in C, in place on the tensors of a runner. n_draft: drafts in this call.

    model        a MiMo; its weights are packed into a private copy
    most_drafts  most drafts of a step
    kv           fp32 [layers, n_blocks + 1, floats of a block], the KV cache
    state        TorchRunner.new_state
    n_ids        rows of lm_head that are tokens; the rest is padding
    draft_ids    drafts are among the first draft_ids of them
    block        tokens of a block
    most_tokens  most tokens of one forward
    keep_weights False: the model's own weights are freed as they are packed, and the model cannot be used any more
    """
    def __init__(self, model: nn.Module, most_drafts: int, kv: Tensor, state: dict[str, Tensor], n_ids: int,
                 draft_ids: int, block: int, most_tokens: int, keep_weights: bool):
        cfg, self.model, self.lib, self.version = model.cfg, model, library(), None
        self.mtp_layers, self.keep_weights = list(model.mtp_layers[:most_drafts]), keep_weights
        self.free = torch.empty(0, dtype=torch.uint8)               # what is left of the last large_pages()
        self.kept: dict[str, Tensor] = {"cache": kv}                # all tensors of which C holds the addresses
        S, C = state["tokens"].shape
        s = Shape(cfg.d_model, up16(cfg.d_model), cfg.head_dim, up16(cfg.head_dim), cfg.n_head, cfg.n_kv_head,
                  up16(cfg.d_ff), n_ids, up16(n_ids), C, draft_ids, block, model.lm_head.weight.dtype == torch.bfloat16,
                  cfg.rms_eps)
        self.blocks, self.mtp = (BlockWeights * len(kv))(), (MtpWeights * max(1, most_drafts))()
        caches = (c_void_p * len(kv))(*(layer.data_ptr() for layer in kv))
        self.c = Model(s, cfg.n_layer, most_drafts, len(self.mtp_layers), self.blocks, caches, self.mtp)
        self.shape, self.c_model = self.c.s, byref(self.c)
        self.c.scratch = self.keep("scratch", torch.empty(self.lib.scratch_floats(byref(s))))
        self.ended, self.logits = torch.zeros(S, dtype=torch.bool), torch.empty(S * (most_drafts + 1), s.Vp)
        integers = [torch.empty(most_tokens, dtype=torch.int64) for _ in range(3)]
        buffers = [self.ended, *integers, torch.empty(most_tokens, s.Dp), torch.empty(most_tokens, s.D), self.logits]
        tensors = {**{name: state[name] for name in STATE}, **dict(zip(BUFFERS, buffers, strict=True))}
        self.kept |= tensors
        self.state = State(state["h"].shape[1], state["stop"].shape[1], most_drafts,
                           *(t.data_ptr() for t in tensors.values()))
        self.c_state, self.n_ended = byref(self.state), c_int64()

    def prefill(self, n_draft: int, first: int, T: int, end: list[int]) -> None:
        """T more tokens of the texts in the rows first and on; end: tokens of each in the cache afterwards."""
        self.c.n_draft = n_draft
        self.lib.prefill(self.c_model, self.c_state, first, len(end), T, (c_int64 * len(end))(*end))

    def decode(self, n_draft: int, A: int) -> tuple[Tensor | None, int]:
        """-> (has the sequence ended, bool [A], or None if none has; most tokens that a row has committed)."""
        self.c.n_draft = n_draft
        most = self.lib.decode(self.c_model, self.c_state, A, byref(self.n_ended))
        return self.ended[:A] if self.n_ended.value else None, most

    def draft(self, n_draft: int, first: int, B: int, E: int) -> None:
        """New drafts for rows first .. first + B - 1, which have just committed E tokens at most."""
        self.c.n_draft = n_draft
        self.lib.draft(self.c_model, self.c_state, first, B, E)

    def uniform(self, row: int, first: int, seed: int) -> None:
        """The random numbers of a request's tokens, sampling.uniform, into u of its row from column `first` on."""
        u = self.kept["u"][row, first:]
        self.lib.uniform(seed, len(u), u.data_ptr())

    # -- weights

    @torch.no_grad()
    def refresh(self, cos: Tensor, sin: Tensor, written: bool) -> None:
        """
        The rotations [C,d] of all positions; and the weights, packed again if they were written: the caller says so, or
        torch has counted a write in place (it does not count those of a fused optimizer).
        """
        self.kept["cos"], self.kept["sin"] = cos, sin
        self.c.cos, self.c.sin = cos.data_ptr(), sin.data_ptr()
        if not self.keep_weights and self.version is not None:
            if written:
                raise ValueError("these weights were freed when they were packed (keep_weights=False)")
            return
        version = sum(p._version for p in self.model.parameters())
        if written or version != self.version:
            self.version = version
            self.pack()

    def pack(self) -> None:
        """All weights, in the order in which C reads them: the trunk, lm_head, the MTP layers."""
        model, c, s, n = self.model, self.c, self.shape, len(self.model.layers)
        for i, block in enumerate(model.layers):
            self.pack_into(self.blocks[i], f"{i}", packed(block, s))
            self.release(block)
        c.norm, c.embedding = self.keep("norm", pad(model.norm.weight, s.Dp)), model.embed_tokens.weight.data_ptr()
        c.lm_head = self.keep("lm_head", panels(pad(model.lm_head.weight[:s.V], s.Vp, s.Dp)))
        for k, layer in enumerate(self.mtp_layers):
            halves = layer.input_proj.weight.unflatten(1, (2, -1))  # [D,2,D]
            self.pack_into(self.mtp[k], f"mtp {k}", {
                "hidden_norm": pad(layer.hidden_layernorm.weight, s.Dp),
                "token_norm": pad(layer.token_layernorm.weight, s.Dp),
                "input_proj": panels(pad(halves, s.Dp, 2, s.Dp).flatten(1)),
                "final_norm": pad(layer.final_layernorm.weight, s.Dp)})
            self.pack_into(self.blocks[n + k], f"{n + k}", packed(layer, s))
            self.release(layer)
        self.release(model.lm_head)

    def release(self, module: nn.Module) -> None:
        """Free the weights of a module that are packed now, where the owner has asked for it; not the embedding."""
        for p in () if self.keep_weights else module.parameters():
            if p is not self.model.embed_tokens.weight:
                p.data = p.data.new_empty(0)

    def pack_into(self, target: ctypes.Structure, prefix: str, weights: dict[str, Tensor | None]) -> None:
        """Set the fields of a struct to the addresses of copies of these weights."""
        for name, value in weights.items():
            setattr(target, name, None if value is None else self.keep(f"{prefix}.{name}", value))

    def keep(self, name: str, value: Tensor) -> int:
        """
        A contiguous copy under this name, always at the same address: matrices as they are, in fp32 or bf16, vectors in
        fp32. -> the address.
        """
        if name not in self.kept:
            dtype = value.dtype if value.ndim > 1 else torch.float32
            n = value.numel() * dtype.itemsize
            if n > len(self.free):
                self.free = large_pages(max(n, 32 << 20))
            self.kept[name], self.free = self.free[:n].view(dtype).view(value.shape), self.free[-(-n // 64) * 64:]
        return self.kept[name].copy_(value).data_ptr()


def packed(block: nn.Module, s: Shape) -> dict[str, Tensor | None]:
    """
    The weights of one model.Block in the layout of decode_cpu.c and in the order in which it reads them: heads and
    widths are padded with zeros to multiples of 16.
    """
    a, mlp, H, K, d, dp = block.self_attn, block.mlp, s.H, s.K, s.d, s.dp

    def heads(*parts: Tensor | None) -> Tensor | None:
        """[heads d, ...] each -> [heads, parts, dp, ...] flattened: k and v of one head lie side by side."""
        if parts[0] is None:                                        # a model without biases
            return None
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
