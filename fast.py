"""
The trunk's and the MTP layers' forward for generation in fp32 on a CPU: model.py's functions with fewer,
larger operations.

At batch 1 a small model spends its time between operations, not in them. This file needs 26 kernels a layer
where Block.forward needs 60, and is about twice as fast there (docs/engine.md). It computes the same function
up to rounding; tests/test_engine.py holds it against model.py. On a GPU the engine runs model.py itself
inside a CUDA graph.

What is merged, on a private copy of the weights:
  q, k and v in one product, 1/sqrt(d) folded into q; gate and up in one product; residual adds inside the
  products; RoPE as one complex product: the pairs (i, i + d/2) that it rotates are made neighbours by
  permuting the rows of W_q and W_k, which no dot product of a query with a key can notice:

      (x1 cos - x2 sin, x2 cos + x1 sin)  =  (x1 + i x2) (cos + i sin)

  v heads pass through the same product with factor 1, so q, k, v need no splitting before it.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Block, MiMo, ModelConfig
from mtp import MTPLayer


class Weights:
    """The merged weights of one model, copied again whenever a parameter was written to (an optimizer step, a
load)."""
    def __init__(self, model: MiMo, n_mtp: int):
        self.model, self.blocks = model, [*model.layers, *model.mtp_layers[:n_mtp]]
        self.params, self.version, self.merged = list(model.parameters()), None, []

    def refresh(self) -> None:
        version = sum(p._version for p in self.params)              # in-place writes count up
        if version == self.version:
            return
        self.version = version
        new = [merge(b, self.model.cfg) for b in self.blocks]
        if self.merged:                                             # keep the addresses, and the memory flat
            for old, fresh in zip(self.merged, new, strict=True):
                for a, b in zip(old, fresh, strict=True):
                    a.copy_(b)
        else:
            self.merged = new


def merge(block: Block, cfg: ModelConfig) -> tuple[Tensor, ...]:
    """qkv weight [D, (H + 2K) d] in the order q heads, k0 v0 k1 v1 ..., its bias, gate|up weight [D, 2F]."""
    H, K, d, a = cfg.n_head, cfg.n_kv_head, cfg.head_dim, block.self_attn
    # 0, d/2, 1, d/2 + 1, ...
    pairs = torch.arange(d, device=a.q_proj.weight.device).view(2, d // 2).T.flatten()

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.view(H, d, -1)[:, pairs] * d ** -0.5, k.view(K, d, -1)[:, pairs], v.view(K, d, -1)
        return torch.cat([q.flatten(0, 1), torch.cat([k, v], 1).flatten(0, 1)])         # [(H + 2K) d, D or 1]
    w = rows(a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)
    b = rows(a.q_proj.bias, a.k_proj.bias, a.v_proj.bias)[:, 0]
    return w, b, torch.cat([block.mlp.gate_proj.weight, block.mlp.up_proj.weight])


def rotations(cos: Tensor, sin: Tensor, cfg: ModelConfig) -> Tensor:
    """cos, sin [C,d] -> complex [C, H + 2K, d/2], 1 for the v heads."""
    half = cfg.head_dim // 2
    turn = torch.complex(cos[:, :half], sin[:, :half])[:, None]     # [C,1,d/2]
    one = torch.ones_like(turn)
    kv = torch.cat([turn, one], 1).repeat(1, cfg.n_kv_head, 1)      # k0 v0 k1 v1 ...
    return torch.cat([turn.expand(-1, cfg.n_head, -1), kv], 1)


def block_forward(x: Tensor, block: Block, merged: tuple[Tensor, ...], cache, cfg: ModelConfig) -> Tensor:
    """Block.forward for x [N,D], N = B*Q tokens in the order of cache.plan; writes to x's place and returns
it."""
    (w_qkv, b_qkv, w_gate_up), plan, eps = merged, cache.plan, cfg.rms_eps
    (N, D), H, K, d = x.shape, cfg.n_head, cfg.n_kv_head, cfg.head_dim
    y = F.rms_norm(x, (D,), block.input_layernorm.weight, eps)
    qkv = torch.addmm(b_qkv, y, w_qkv.T)                            # [N, (H + 2K) d]
    torch.view_as_complex(qkv.view(N, H + 2 * K, d // 2, 2)).mul_(plan.turn)
    o = cache.attend_merged(qkv)                                    # [N, H d]
    x = x.addmm_(o, block.self_attn.o_proj.weight.T)
    y = F.rms_norm(x, (D,), block.post_attention_layernorm.weight, eps)
    gate, up = (y @ w_gate_up.T).chunk(2, -1)                       # [N,F] each
    return x.addmm_(F.silu(gate).mul_(up), block.mlp.down_proj.weight.T)


def mtp_input(layer: MTPLayer, h: Tensor, emb: Tensor, eps: float) -> Tensor:
    """[hidden ; embedding] through input_proj, as MTPLayer.forward. h, emb [N,D] -> [N,D]."""
    D = h.shape[1:]
    return torch.cat([F.rms_norm(h, D, layer.hidden_layernorm.weight, eps),
                      F.rms_norm(emb, D, layer.token_layernorm.weight, eps)], -1) @ layer.input_proj.weight.T
