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
    def __init__(self, model: MiMo, n_mtp: int):
        self.model, self.blocks, self.n_mtp = model, [*model.layers, *model.mtp_layers[:n_mtp]], n_mtp
        self.params, self.version, self.merged, self.entry = list(model.parameters()), None, [], []

    @torch.no_grad()
    def refresh(self) -> None:
        version = sum(p._version for p in self.params)              # in-place writes count up
        if version == self.version:
            return
        self.version = version
        self.merged = [merge(b, self.model.cfg) for b in self.blocks]
        self.entry = [merge_entry(layer, self.model) for layer in self.model.mtp_layers[:self.n_mtp]]


def merge(block: Block, cfg: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """qkv weight [(H + 2K) d, D] in the order q heads, k0 v0 k1 v1 ..., its bias, gate|up weight [2F, D]."""
    H, K, d, a, mlp = cfg.n_head, cfg.n_kv_head, cfg.head_dim, block.self_attn, block.mlp
    # 0, d/2, 1, d/2 + 1 ...
    pairs = torch.arange(d, device=a.q_proj.weight.device).view(2, d // 2).T.flatten()

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.view(H, d, -1)[:, pairs] * d ** -0.5, k.view(K, d, -1)[:, pairs], v.view(K, d, -1)
        return torch.cat([q.flatten(0, 1), torch.cat([k, v], 1).flatten(0, 1)])         # [(H + 2K) d, D or 1]
    w = rows(a.q_proj.weight, a.k_proj.weight, a.v_proj.weight) * block.input_layernorm.weight
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * block.post_attention_layernorm.weight
    return w, rows(a.q_proj.bias, a.k_proj.bias, a.v_proj.bias)[:, 0], gate_up


def merge_entry(layer: MTPLayer, model: MiMo) -> tuple[Tensor, Tensor, Tensor | None]:
    """W_h with the hidden norm's gain [D,D], W_e likewise [D,D], and W_e embedding for each token [V,D] or
None."""
    w_h, w_e = layer.input_proj.weight.chunk(2, 1)
    w_h, w_e = w_h * layer.hidden_layernorm.weight, w_e * layer.token_layernorm.weight
    emb, (V, D) = model.embed_tokens.weight, model.embed_tokens.weight.shape
    return w_h, w_e, F.rms_norm(emb, (D,), None, model.cfg.rms_eps) @ w_e.T if V * D <= TABLE else None


def rotations(cos: Tensor, sin: Tensor, cfg: ModelConfig) -> Tensor:
    """cos, sin [C,d] -> complex [C, H + 2K, d/2], 1 for the v heads."""
    half = cfg.head_dim // 2
    turn = torch.complex(cos[:, :half], sin[:, :half])[:, None]     # [C,1,d/2]
    one = torch.ones_like(turn)
    kv = torch.cat([turn, one], 1).repeat(1, cfg.n_kv_head, 1)      # k0 v0 k1 v1 ...
    return torch.cat([turn.expand(-1, cfg.n_head, -1), kv], 1)


def normed(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without its gain."""
    return F.rms_norm(x, x.shape[-1:], None, eps)


def block_forward(x: Tensor, block: Block, merged: tuple[Tensor, ...], cache, cfg: ModelConfig,
                  last: bool = False) -> Tensor:
    """
    Block.forward for x [N,D], N = B*Q tokens in the order of cache.plan; may write to x. last: keys and
    values for all, everything else only for each sequence's last token. -> [N,D], or [B,D].
    """
    (w_qkv, b_qkv, w_gate_up), plan, eps = merged, cache.plan, cfg.rms_eps
    N, H, K, d = x.shape[0], cfg.n_head, cfg.n_kv_head, cfg.head_dim
    qkv = torch.addmm(b_qkv, normed(x, eps), w_qkv.T)               # [N, (H + 2K) d]
    torch.view_as_complex(qkv.view(N, H + 2 * K, d // 2, 2)).mul_(plan.turn)
    if last:
        x = x.view(*plan.shape, -1)[:, -1].contiguous()             # [B,D]
    x = x.addmm_(cache.attend_merged(qkv, last), block.self_attn.o_proj.weight.T)
    gate, up = (normed(x, eps) @ w_gate_up.T).chunk(2, -1)          # [N,F] each
    return x.addmm_(F.silu(gate).mul_(up), block.mlp.down_proj.weight.T)


def mtp_input(entry: tuple[Tensor, ...], h: Tensor, ahead: Tensor, model: MiMo) -> Tensor:
    """MTPLayer's entry: h [N,D] without the gain of its norm, ahead [N] the tokens. -> [N,D]."""
    w_h, w_e, table = entry
    if table is None:
        return torch.addmm(normed(model.embed_tokens(ahead), model.cfg.rms_eps) @ w_e.T, h, w_h.T)
    return torch.addmm(F.embedding(ahead, table), h, w_h.T)
