"""
The trunk of MiMo-7B: a decoder of pre-RMSNorm blocks with GQA, RoPE and SwiGLU (report section 2.2).

    ids [B,T] -> embed_tokens -> n_layer x Block -> h [B,T,D] -> norm -> lm_head -> logits [B,T,V]
                                                    |
                                                    +-> MTP layers (mtp.py), which read h BEFORE the final norm

The trunk is exactly Qwen2 with QKV bias: on the same weights its fp32 logits equal transformers' Qwen2ForCausalLM bit
for bit (tests/test_hf_parity.py). Two fields make it the trunk of other families too: without qkv_bias it is Llama, and
with tie_embeddings lm_head is the embedding, as in small models of both. Parameter names below the top level are the
Hugging Face ones, so hf.py only has to add the prefix "model.".

Differs from the report in nothing we know of; initialisation and the untied, padded head are explained at the lines
concerned. One file for every size: the laptop toy and the 7B model differ in ModelConfig alone.

    python -c "from model import *; print(f'{ModelConfig.mimo_7b().n_params():,}')"     # 7,622,619,136

Symbols, the same in every file: B batch, T time, D model width, H query heads, K kv heads, d head width, F feed-forward
width, V vocabulary.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import kernels
from kernels import reference
from kernels.attention import attention
from kernels.cpu import train as cpu_kernels
from kernels.rmsnorm import rmsnorm, rmsnorm_residual
from kernels.rope import rope
from kernels.swiglu import swiglu

# The five operators of a block: the Triton kernel for CUDA tensors, torch's own operations for all others.
OPERATORS = SimpleNamespace(rmsnorm=rmsnorm, rmsnorm_residual=rmsnorm_residual, rope=rope, swiglu=swiglu,
                            attention=attention)


def operators(*tensors: Tensor) -> ModuleType | SimpleNamespace:
    """
    The five operators for these tensors: those in C (kernels/cpu/train.py) where a CPU trains in fp32, else OPERATORS;
    with --plain always kernels/reference.py. All compute the same values and gradients, up to rounding.
    """
    if kernels.PLAIN:
        return reference
    return cpu_kernels if cpu_kernels.c_kernels_apply(*tensors) else OPERATORS


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. ValueError for a shape that cannot be."""
    vocab_size: int = 1024        # V, rows of embedding and head, padding rows included (7B: 151,680) [paper 2.2]
    n_layer: int = 4              # trunk blocks (7B: 36) [paper 2.2]
    d_model: int = 128            # D (7B: 4,096) [paper 2.2]
    n_head: int = 4               # H, query heads (7B: 32) [paper 2.2]
    n_kv_head: int = 2            # K, key/value heads, each shared by H/K query heads (7B: 8) [paper 2.2]
    head_dim: int = 32            # d (7B: 128) [paper 2.2]
    d_ff: int = 384               # F, SwiGLU width (7B: 11,008) [paper 2.2]
    rms_eps: float = 1e-5         # RMSNorm epsilon [HF config]
    rope_base: float = 10_000.0   # RoPE base; 640,000 from stage 3 on [paper 2.3]
    max_seq_len: int = 1024       # longest context the model is trained for, tokens (7B: 32,768) [paper 2.1]
    n_mtp: int = 1                # MTP layers: 1 in pre-training, 3 for inference [paper 2.2]
    qkv_bias: bool = True         # biases on q, k and v: Qwen2 and MiMo have them, Llama has none [HF config]
    tie_embeddings: bool = False  # lm_head is the embedding: Qwen2.5 up to 3B, Llama 3.2, SmolLM2; not MiMo [paper 2.2]

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layer", "d_model", "n_head", "n_kv_head", "head_dim", "d_ff", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("rms_eps", "rope_base"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head = {self.n_head} must be a multiple of n_kv_head = {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: RoPE rotates pairs of channels")
        if not 0 <= self.n_mtp <= 8:
            raise ValueError(f"n_mtp = {self.n_mtp} must be between 0 and 8")
        if self.n_layer > 1000:              # a stranger's file may ask for more than can be built in a day
            raise ValueError(f"n_layer = {self.n_layer:,} must be at most 1,000")
        if self.n_params() > 1e13 or self.max_seq_len > 1 << 40:
            raise ValueError(f"impossible sizes: {float(self.n_params()):.1e} parameters, a context of "
                             f"{float(self.max_seq_len):.1e} tokens")

    @staticmethod
    def mimo_7b(n_mtp: int = 0) -> "ModelConfig":
        """The published shape with n_mtp MTP layers [paper 2.2; HF config.json of MiMo-7B]."""
        return ModelConfig(vocab_size=151_680, n_layer=36, d_model=4096, n_head=32, n_kv_head=8, head_dim=128,
                           d_ff=11_008, rope_base=640_000.0, max_seq_len=32_768, n_mtp=n_mtp)

    def block_params(self) -> int:
        """Parameters of one block: q, k, v and their biases, o, gate, up, down, two norms. 177,223,680 at 7B."""
        D, d = self.d_model, self.head_dim
        qkv = (D + self.qkv_bias) * d * (self.n_head + 2 * self.n_kv_head)
        return qkv + self.n_head * d * D + 3 * D * self.d_ff + 2 * D

    def params_by_part(self) -> dict[str, int]:
        """
        Exact parameter counts. By hand, 7B: the embedding and lm_head have 151,680 x 4,096 = 621,281,280 each, an MTP
        layer has 210,790,400. Tied to the embedding, lm_head adds none.
        """
        D = self.d_model
        return {"embedding": self.vocab_size * D, "blocks": self.n_layer * self.block_params(), "final norm": D,
                "lm_head": 0 if self.tie_embeddings else self.vocab_size * D,
                "MTP layers": self.n_mtp * (self.block_params() + 2 * D * D + 3 * D)}

    def n_params(self) -> int:
        """All parameters: the 7B trunk has 7,622,619,136, with three MTP layers 8,254,990,336."""
        return sum(self.params_by_part().values())


def flops_per_token(cfg: ModelConfig, seq_len: int, causal: bool = True, train: str = "all") -> float:
    """
    Training FLOPs per token in rows of T = seq_len: 6 per weight of every matrix product (2 forward, 4 backward), and
    12 H d T per layer for attention, half of it under a causal mask. Every MTP layer runs the head once more.
    Recomputation is not counted. causal=False counts the masked half too, the convention of PaLM and torchtitan.
    train="mtp" is MTP fine-tuning, whose trunk only runs forward; train="lora" computes no gradients of the weights:
    4 per weight, and the adapters are not counted.
    """
    D, d = cfg.d_model, cfg.head_dim
    block = D * d * (cfg.n_head + 2 * cfg.n_kv_head) + cfg.n_head * d * D + 3 * D * cfg.d_ff
    attention = 12 * cfg.n_head * d * seq_len * (0.5 if causal else 1.0)
    head = cfg.vocab_size * D
    per_weight = 4.0 if train == "lora" else 6.0
    trunk = cfg.n_layer * (per_weight * block + attention) + per_weight * head
    extra = cfg.n_mtp * (per_weight * (block + 2 * D * D + head) + attention)
    return trunk * (1 / 3 if train == "mtp" else 1) + extra


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w, in fp32, cast back before the gain as Qwen2 does; x [...,D] -> [...,D]."""
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return operators(x, self.weight).rmsnorm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention: K key/value heads, each read by H/K query heads."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        D, d = cfg.d_model, cfg.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(D, cfg.n_head * d, bias=cfg.qkv_bias)      # biases on q, k, v only, as Qwen2
        self.k_proj = nn.Linear(D, cfg.n_kv_head * d, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(D, cfg.n_kv_head * d, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_head * d, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor | None, cache) -> Tensor:
        """x [B,T,D] -> [B,T,D]; cos, sin, bounds and cache as in Block."""
        # views, not einops: this line runs per token in decode (docs/deviations.md)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = operators(q, k, cos, sin).rope(q, k, cos, sin)       # q [B,T,H,d], k and v [B,T,K,d]
        o = operators(q, k, v).attention(q, k, v, bounds) if cache is None else cache.attend(q, k, v)
        return self.o_proj(o.flatten(-2))                           # [B,T,H,d] -> [B,T,D]


class MLP(nn.Module):
    """SwiGLU: down( silu(gate(x)) * up(x) ), x [B,T,D] -> [B,T,D]."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)               # [B,T,D] -> [B,T,F]
        return self.down_proj(operators(gate, up).swiglu(gate, up))


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). One block serves training, decoding and the MTP layers."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.d_model, cfg.rms_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.d_model, cfg.rms_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor | None = None, cache=None) -> Tensor:
        """
        x [B,T,D] -> [B,T,D]. cos, sin [B or 1,T,d] from rope_at. bounds int32 [2,B,T] keeps attention inside each
        document: the first and the one-past-last index, in its row, of each token's document; None: a row is one
        document. cache: None in training, in decoding an object with attend(q, k, v) -> o (runner.py).
        """
        a = self.self_attn(self.input_layernorm(x), cos, sin, bounds, cache)
        post = self.post_attention_layernorm
        y, x = operators(a, post.weight, x).rmsnorm_residual(a, post.weight, post.eps, x)   # x + a and its norm
        return x + self.mlp(y)


class MiMo(nn.Module):
    """
    The trunk plus a list of MTP layers that mtp.build attaches. Calling the model gives h, the state before the final
    norm: the losses (mtp.py), the RL log-probs (rl.py) and the engine each take it from there, so the [B,T,V] logits
    exist only where somebody wants all of them.
    """
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        # zeros, until init_weights or a checkpoint fills them: nn.Embedding(V, D) would draw random numbers, which on
        # the meta device imports torch._dynamo and takes 2 s
        self.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(cfg.vocab_size, cfg.d_model), freeze=False)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model, cfg.rms_eps)
        if not cfg.tie_embeddings:                                  # untied from the embedding [paper 2.2]
            self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        else:                     # a plain attribute, no second submodule: there is one parameter, embed_tokens.weight,
            object.__setattr__(self, "lm_head", self.embed_tokens)      # whose gradient is the sum of both uses
        self.mtp_layers = nn.ModuleList()

    def forward(self, ids: Tensor, positions: Tensor | None = None, bounds: Tensor | None = None) -> Tensor:
        """
        ids int64 [B,T]; positions [B,T] or [1,T], default 0..T-1; bounds as in Block.
        -> h [B,T,D] before the final norm.
        """
        cos, sin = self.rope_at(ids, positions)
        x = self.embed_tokens(ids)                                  # [B,T] -> [B,T,D]
        for block in self.layers:
            x = block(x, cos, sin, bounds)
        return x

    def rope_at(self, ids: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """
        The angles of RoPE under the current base: positions [...,T] integers, default 0 .. T-1 for ids [B,T]
        -> cos, sin fp32 [...,T,d], both halves of d alike.

        By hand: d = 4, base 100: theta = (1, 0.1), so position 2 gives the angles (2, 0.2, 2, 0.2).
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        # theta_i = base^(-2i/d), i < d/2 ; the same angle serves elements i and i + d/2
        even = torch.arange(0, self.cfg.head_dim, 2, dtype=torch.int64, device=positions.device).float()
        theta = 1.0 / (self.cfg.rope_base ** (even / self.cfg.head_dim))            # [d/2]
        angle = positions[..., None].float() * theta                                # [...,T,d/2]
        angle = torch.cat((angle, angle), -1)                                       # [...,T,d]
        return angle.cos(), angle.sin()

    def logits(self, h: Tensor) -> Tensor:
        """
        h [...,D] before the final norm -> fp32 [...,V]. The head runs in the weights' dtype; the softmax that follows
        is always fp32.
        """
        return F.linear(self.norm(h), self.lm_head.weight).float()

    def set_context(self, rope_base: float, max_seq_len: int) -> None:
        """Stage 3 raises the RoPE base with the context (10,000 -> 640,000 at 7B) [paper 2.3]; weights stay."""
        self.cfg = replace(self.cfg, rope_base=float(rope_base), max_seq_len=int(max_seq_len))

    def initial_weights(self, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """
        (name, full tensor on the CPU), one parameter at a time: N(0, 1/D), which is a deviation of 0.0156 at 7B and
        keeps a toy's layers from starting near zero (docs/lab_log.md); the two projections that write to the residual
        stream scaled by 1/sqrt(2 n_layer) as in GPT-2; biases 0, gains 1 [ours: the report is silent].

        The numbers come in the order of names from one CPU generator, so that any device, any sharding and any number
        of ranks starts from the same ones.
        """
        gen = torch.Generator().manual_seed(seed)
        std = 1 / math.sqrt(self.cfg.d_model)
        for name, p in sorted(self.named_parameters()):
            if p.ndim == 1:
                yield name, torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0)
                continue
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            yield name, torch.randn(p.shape, generator=gen) * (std / math.sqrt(2 * self.cfg.n_layer) if writes else std)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Give every parameter its initial value, in place."""
        params = dict(self.named_parameters())
        for name, value in self.initial_weights(seed):
            params[name].copy_(value)


def causal_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """
    Attention as the textbook writes it, for readers and tests. q [B,T,H,d], k and v [B,T,K,d] -> [B,T,H,d].

        o = softmax(q k^T / sqrt(d) + causal mask) v
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    q = rearrange(q, "B T (K G) d -> B K G T d", G=G)
    k, v = (rearrange(x, "B T K d -> B K 1 T d") for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])                      # [B,K,G,T,T]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return rearrange(scores.masked_fill(future, -math.inf).softmax(-1) @ v, "B K G T d -> B T (K G) d")
