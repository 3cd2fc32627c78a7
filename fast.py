"""
The forward pass for generation in fp32 on a CPU: model.py's and mtp.py's functions in fewer, larger
operations.

At batch 1 a small model spends its time between operations, not in them: Block.forward needs some 60 kernels
a layer, this file 24, and a step takes about half as long (docs/engine.md). It computes the same function up
to rounding; tests/test_engine.py holds it against model.py. On a GPU the engine runs model.py in a CUDA
graph.

What is merged, on a private copy of the weights:
  q, k and v in one product, 1/sqrt(d) folded into q; gate and up in one product; the gain of each RMSNorm
  folded into the product behind it; residual adds inside the products; RoPE as one complex product: the pairs
  (i, i + d/2) that it rotates are made neighbours by permuting the rows of W_q and W_k, which no dot product
  of a query with a key can notice:

      (x1 cos - x2 sin, x2 cos + x1 sin)  =  (x1 + i x2) (cos + i sin)

  v heads pass through the same product with factor 1, so q, k, v need no splitting before it;
  MTP input: W [hidden ; embedding] = W_h hidden + W_e embedding, and the second term is a function of the
  token alone: a table, where the vocabulary is small.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Block, MiMo, ModelConfig
from mtp import MTPLayer

TABLE = 1 << 22    # most entries of a table of embedding terms, per MTP layer


class Weights:
    """The merged weights of one model, made again after any parameter was written to (an optimizer step, a
load)."""
    def __init__(self, model: MiMo, n_mtp: int, R: int):
        self.model, self.mtp, self.R = model, model.mtp_layers[:n_mtp], R
        self.params = list(model.parameters())
        self.version, self.merged, self.entry, self.gains = None, [], [], {}
        self.eps = model_eps(model.cfg)

    @torch.no_grad()
    def refresh(self) -> None:
        version = sum(p._version for p in self.params)              # in-place writes count up
        if version == self.version:
            return
        self.version = version
        self.merged = [merge(b, self.model.cfg, self.R) for b in [*self.model.layers, *self.mtp]]
        self.entry = [merge_entry(layer, self.model) for layer in self.mtp]
        norms = [self.model.norm, *(layer.final_layernorm for layer in self.mtp)]
        self.gains = {norm: norm.weight * self.model.cfg.d_model ** 0.5 for norm in norms}


def merge(block: Block, cfg: ModelConfig, R: int) -> tuple[Tensor, ...]:
    """
    Weights ready to be multiplied from the right: qkv [D, K (R + 2) d], for each KV head its G query heads
    (repeated to R rows: cache.py), then its k and v; qkv's bias; o [H d, D]; gate|up [D, 2F]; down [F, D].
    """
    K, d, G, a, mlp = cfg.n_kv_head, cfg.head_dim, cfg.n_head // cfg.n_kv_head, block.self_attn, block.mlp
    # 0, d/2, 1, d/2 + 1 ...
    pairs = torch.arange(d, device=a.q_proj.weight.device).view(2, d // 2).T.flatten()
    root = cfg.d_model ** 0.5                                       # normed() leaves it out

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.view(K, G, d, -1)[:, :, pairs].repeat(1, R // G, 1, 1) * d ** -0.5        # [K,R,d,D or 1]
        k, v = k.view(K, 1, d, -1)[:, :, pairs], v.view(K, 1, d, -1)
        return torch.cat([q, k, v], 1).flatten(0, 2)                # [K (R + 2) d, D or 1]
    w = rows(a.q_proj.weight, a.k_proj.weight, a.v_proj.weight) * block.input_layernorm.weight * root
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * root
    gate_up *= block.post_attention_layernorm.weight
    bias = rows(a.q_proj.bias, a.k_proj.bias, a.v_proj.bias)[:, 0]
    return w.T, bias, a.o_proj.weight.T, gate_up.T, mlp.down_proj.weight.T


def merge_entry(layer: MTPLayer, model: MiMo) -> tuple[Tensor, Tensor, Tensor | None]:
    """W_h and W_e with their norms' gains [D,D], and W_e embedding for each token [V,D] or None."""
    w_h, w_e = layer.input_proj.weight.chunk(2, 1)
    emb, (V, D) = model.embed_tokens.weight, model.embed_tokens.weight.shape
    w_h, w_e = ((w * norm.weight * D ** 0.5).T for w, norm in
                ((w_h, layer.hidden_layernorm), (w_e, layer.token_layernorm)))
    return w_h, w_e, normed(emb, model_eps(model.cfg)) @ w_e if V * D <= TABLE else None


def model_eps(cfg: ModelConfig) -> Tensor:
    """What normed() takes: sqrt(D eps)."""
    return torch.tensor((cfg.d_model * cfg.rms_eps) ** 0.5)


def rotations(cos: Tensor, sin: Tensor, cfg: ModelConfig, R: int) -> Tensor:
    """cos, sin [C,d] -> complex [C, K (R + 2), d/2], 1 for v."""
    half = cfg.head_dim // 2
    turn = torch.complex(cos[:, :half], sin[:, :half])[:, None]     # [C,1,d/2]
    return torch.cat([turn.expand(-1, R + 1, -1), torch.ones_like(turn)], 1).repeat(1, cfg.n_kv_head, 1)


def normed(x: Tensor, eps: Tensor) -> Tensor:
    """
    RMSNorm without its gain and without the factor sqrt(D), which the merged weights carry; eps holds sqrt(D
    eps):
        x / sqrt(|x|^2 + D eps)  =  x / sqrt(mean(x^2) + eps) / sqrt(D)
    """
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), eps)


def prepare(plan, turn: Tensor, R: int, K: int, d: int) -> None:
    """
    Room for the qkv of one layer at a time, [N, K (R + 2) d], with all its views made once a forward: a view
    costs as much as a small product. turn [N, K (R + 2), d/2] from rotations().
    """
    (B, Q), N = plan.shape, turn.shape[0]
    plan.turn, plan.qkv = turn, torch.empty(N, K * (R + 2) * d)
    plan.pairs = torch.view_as_complex(plan.qkv.view(N, K * (R + 2), d // 2, 2))
    heads = plan.qkv.view(N * K, R + 2, d)
    plan.new = heads[:, R:].flatten(1)                              # [N*K,2d], in the order of plan.where
    plan.q = heads[:, :R] if Q == 1 else plan.qkv.view(B, Q, K, R + 2, d)


def block_forward(x: Tensor, merged: tuple, cache, eps: Tensor, want: str = "all") -> Tensor | None:
    """
    Block.forward for x [N,D], N = B*Q tokens in the order of cache.plan; may write to x. Keys and values are
    stored for all of them; the rest is done for what is wanted: "all" -> [N,D], "last" of each sequence ->
    [B,D], "none".
    """
    (w_qkv, b_qkv, w_o, w_gate_up, w_down), plan = merged, cache.plan
    torch.addmm(b_qkv, normed(x, eps), w_qkv, out=plan.qkv)         # [N, K (R + 2) d]
    plan.pairs.mul_(plan.turn)
    cache.flat.index_copy_(0, plan.where, plan.new)
    if want == "none":
        return None
    if want == "last":
        x = x.view(*plan.shape, -1)[:, -1].contiguous()             # [B,D]
    x.addmm_(cache.attend_merged(want == "last"), w_o)
    gate, up = torch.mm(normed(x, eps), w_gate_up).chunk(2, -1)     # [N,F] each
    return x.addmm_(F.silu(gate).mul_(up), w_down)


def mtp_input(entry: tuple, h: Tensor, ahead: Tensor, model: MiMo) -> Tensor:
    """MTPLayer's entry: h [N,D] without the gain of its norm, ahead [N] the tokens. -> [N,D]."""
    w_h, w_e, table = entry
    if table is None:
        return torch.addmm(normed(model.embed_tokens(ahead), model_eps(model.cfg)) @ w_e, h, w_h)
    return torch.addmm(F.embedding(ahead, table), h, w_h)
