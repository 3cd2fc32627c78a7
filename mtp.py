"""
Multi-token prediction: training targets, loss, replication, and the acceptance rules of speculative decoding
(report section 2.2, Fig. 2).

An MTP layer is one more transformer block. Layer k (k = 0, 1, 2) at position i reads the trunk state h_i, from BEFORE
the final norm, beside the embedding of the token k+1 places ahead, and predicts the token after that:

    z_i    = Block_k( W_k [ RMSNorm(h_i) ; RMSNorm(emb(x_{i+k+1})) ] )          hidden first, embedding second
    logits = lm_head( RMSNorm_k(z_i) )       predicts   x_{i+k+2}

The embedding and lm_head are the trunk's. Every norm is the layer's own, the last one (final_layernorm) too. Code and
equations count the layers from 0; what is printed or drawn for people counts them from 1.

    position          i      i+1      i+2      i+3      i+4
    trunk      h_i  ----> predicts x_{i+1}
    layer 0    h_i + x_{i+1} ------> x_{i+2}
    layer 1    h_i +         x_{i+2} ------> x_{i+3}        all three read the SAME h_i: they are parallel,
    layer 2    h_i +                 x_{i+3} ------> x_{i+4}    not a chain

Pre-training trains one layer (loss weight 0.3, then 0.1). Afterwards it is copied into two more, trunk and layer 0 are
frozen and the copies fine-tuned (pretrain.py, last stage). SFT trains all three, RL freezes them or, beyond the report,
trains them alone beside the policy (rl.py, mtp_weight).

The report is silent on the weight of each depth when three are trained: we average them. On held-out reasoning text it
finds about 90% acceptance for the first layer and more than 75% for the third; the demo prints ours.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear_cross_entropy import linear_cross_entropy
from model import Block, MiMo, ModelConfig, RMSNorm


class MTPLayer(Block):
    """One MTP layer: Block's own parts plus three norms and the projection 2D -> D. 210,790,400 parameters at 7B."""
    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.token_layernorm = RMSNorm(cfg.d_model, cfg.rms_eps)
        self.hidden_layernorm = RMSNorm(cfg.d_model, cfg.rms_eps)
        self.input_proj = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)   # columns [hidden | embedding]
        self.final_layernorm = RMSNorm(cfg.d_model, cfg.rms_eps)

    def forward(self, h: Tensor, emb: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor | None = None,
                cache=None) -> Tensor:
        """h [B,T,D] trunk state before the final norm; emb [B,T,D] embedding of the token k+1 ahead. -> z [B,T,D]."""
        return super().forward(self.enter(h, emb), cos, sin, bounds, cache)

    def enter(self, h: Tensor, emb: Tensor) -> Tensor:
        """The block's input [B,T,D]: both normed, side by side, projected back to width D. Shapes as in forward."""
        return self.input_proj(torch.cat([self.hidden_layernorm(h), self.token_layernorm(emb)], -1))   # [B,T,2D] -> D


def build(cfg: ModelConfig, device: str | torch.device | None = None) -> MiMo:
    """A model with cfg.n_mtp MTP layers, without storage when device is "meta" (checkpoint.materialise fills it)."""
    with torch.device(device or "cpu"):
        model = MiMo(cfg)
        model.mtp_layers.extend(MTPLayer(cfg) for _ in range(cfg.n_mtp))
    return model


def replicate(model: MiMo, n: int = 3) -> MiMo:
    """
    The step between pre-training and MTP fine-tuning: layer 0 copied until there are n layers [paper 2.2].
    A new model on the same device; its cfg.n_mtp is n. Raises ValueError without a trained layer to copy.
    """
    if not 1 <= len(model.mtp_layers) <= n:
        raise ValueError(f"replicate needs 1..{n} MTP layers to start from, this model has {len(model.mtp_layers)}")
    cfg = ModelConfig(**{**vars(model.cfg), "n_mtp": n})
    new, have = build(cfg, model.lm_head.weight.device), len(model.mtp_layers)
    state = dict(model.state_dict())
    for k in range(have, n):
        state |= {name.replace("mtp_layers.0.", f"mtp_layers.{k}."): w
                  for name, w in model.state_dict().items() if name.startswith("mtp_layers.0.")}
    new.load_state_dict(state)
    return new.to(model.lm_head.weight.dtype)


def freeze_all_but_new(model: MiMo, first: int = 1) -> None:
    """MTP fine-tuning trains layers first.. only: trunk and the pre-trained layer keep their weights [paper 2.2]."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("mtp_layers.") and int(name.split(".")[1]) >= first)


def mtp_targets(ids: Tensor, docs: Tensor, T: int, n_mtp: int, mask: Tensor | None = None) -> list[Tensor]:
    """
    What each of T positions predicts, [B,T] for the trunk and for each of n_mtp layers: the token 1, 2, .. n_mtp + 1
    places ahead, or -100 where that lies in another document. ids, docs [B, T+1+n_mtp]; docs numbers the document of
    each token. mask [B, T+1+n_mtp]: 0 marks tokens that are context and no targets (SFT: the user's).

    By hand, documents A0 A1 A2 | B0 B1 and a neighbour C0, T = 5:
        depth 1, the trunk:    A1 A2 --- | B1 ---
        depth 2, MTP layer 0:  A2 --- --- | --- ---
    """
    targets = []
    for depth in range(1, n_mtp + 2):
        target = ids[:, depth:T + depth].masked_fill(docs[:, :T] != docs[:, depth:T + depth], -100)
        targets.append(target if mask is None else target.masked_fill(mask[:, depth:T + depth] == 0, -100))
    return targets


def target_counts(ids: Tensor, docs: Tensor, T: int, n_mtp: int, mask: Tensor | None = None) -> Tensor:
    """How many targets the trunk and each of n_mtp layers have, int64 [1 + n_mtp]; known before any forward."""
    return torch.stack([(t >= 0).sum() for t in mtp_targets(ids, docs, T, n_mtp, mask)])


def losses(model: MiMo, ids: Tensor, docs: Tensor, positions: Tensor, bounds: Tensor, mask: Tensor | None = None,
           ) -> tuple[Tensor, list[Tensor]]:
    """
    Summed cross-entropies of the trunk and of each MTP layer, in nats. -> (trunk sum, [sum per MTP layer]).

      ids, docs   [B, T+1+n] with look-ahead for n MTP layers
      positions   [B,T] within the document
      bounds      int32 [2,B,T], the document of each token (data.loader.Batch)
      mask        [B, T+1+n], 1 on tokens that are trained on as targets (SFT: the assistant's); default all

    Sums, not means: the caller divides by target_counts over the whole batch and all ranks, so that micro-batches and
    ranks never change the loss. The [B*T,V] logits are never kept (kernels/linear_cross_entropy.py).
    """
    T = positions.shape[1]
    n_mtp = min(ids.shape[1] - T - 1, len(model.mtp_layers))
    first, *rest = mtp_targets(ids, docs, T, n_mtp, mask)
    h = model(ids[:, :T], positions, bounds)                        # [B,T,D], before the final norm
    main = linear_cross_entropy(model.norm(h).flatten(0, 1), model.lm_head.weight, first.flatten())
    return main, layer_losses(model, h, ids, rest, positions, bounds)


def layer_losses(model: MiMo, h: Tensor, ids: Tensor, targets: list[Tensor], positions: Tensor | None = None,
                 bounds: Tensor | None = None, frozen_trunk: bool = False) -> list[Tensor]:
    """
    Summed cross-entropy of each MTP layer, in nats, on the trunk's states h [B,T,D] before the final norm. targets: one
    [B,T] per layer, of mtp_targets; the rest as in losses. frozen_trunk: h, embedding and head are constants, and only
    the layers get gradients.
    """
    T = h.shape[1]
    embedding, head = model.embed_tokens.weight, model.lm_head.weight               # tied with the trunk's [Fig. 2]
    if frozen_trunk:
        h, embedding, head = h.detach(), embedding.detach(), head.detach()
    cos, sin = model.rope_at(ids[:, :T], positions)
    extra = []
    for k, (layer, target) in enumerate(zip(model.mtp_layers, targets, strict=False)):
        emb = F.embedding(ids[:, k + 1:T + k + 1], embedding)
        z = layer.final_layernorm(layer(h, emb, cos, sin, bounds))  # [B,T,D]
        extra.append(linear_cross_entropy(z.flatten(0, 1), head, target.flatten()))
    return extra


@torch.no_grad()
def teacher_forced_acceptance(model: MiMo, ids: Tensor, docs: Tensor, positions: Tensor, bounds: Tensor,
                              mask: Tensor | None = None) -> list[tuple[int, int]]:
    """
    Acceptance of each MTP layer on a given text: [(accepted, verified) per layer]; shapes as in losses, mask: 1 on the
    tokens that the model wrote, default all.

    A draft is verified only if all drafts before it in the round were accepted, the same definition as the engine's
    counters. One forward gives all drafts; then each row is walked in rounds, as the engine goes: a round verifies
    layer 0, 1, .. up to the first wrong draft, and the next round starts behind the token that corrected it. A plain
    average over all positions is another quantity, because rounds start where the last one failed.

    Equal to the engine's count where the text is the model's own, down to near-ties of rounding (tests/test_engine.py).
    Elsewhere it answers "as if the model had written this".
    """
    T, n = positions.shape[1], len(model.mtp_layers)
    h = model(ids[:, :T], positions, bounds)
    cos, sin = model.rope_at(ids[:, :T], positions)
    right, exists = [], []          # [n][B][T]: is the draft of x_{i+k+2} right; is there such a token
    for k, layer in enumerate(model.mtp_layers):
        z = layer(h, model.embed_tokens(ids[:, k + 1:T + k + 1]), cos, sin, bounds)
        draft = (layer.final_layernorm(z) @ model.lm_head.weight.T).argmax(-1)      # [B,T]
        target = ids[:, k + 2:T + k + 2]
        same = docs[:, :T] == docs[:, k + 2:T + k + 2]
        right.append((draft == target).tolist())
        exists.append((same if mask is None else same & (mask[:, k + 2:T + k + 2] > 0)).tolist())
    counts = [[0, 0] for _ in range(n)]
    for row in range(len(ids)):
        i = 0
        while i < T:
            step = 1
            for k in range(n):
                if not exists[k][row][i]:
                    break
                counts[k][1] += 1
                if not right[k][row][i]:
                    break
                counts[k][0] += 1
                step += 1
            i += step
    return [(accepted, verified) for accepted, verified in counts]


# ---- acceptance rules, pure functions (Leviathan et al., arXiv 2211.17192) -------------------------------------------

def accept_matching(drafts: Tensor, tokens: Tensor) -> Tensor:
    """
    drafts [B,n], greedy; tokens [B,n+1], the trunk's own at each verified position, greedy or sampled. -> accepted
    drafts, int64 [B]. A draft counts only while all before it were right: by hand, drafts 5 7 9 against the trunk's
    5 8 9 4 accept one.
    """
    return (drafts == tokens[:, :-1]).long().cumprod(1).sum(1)


def accept_sampled(p: Tensor, q: Tensor, drafts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """
    The general rule, for reading and tests. The engine needs only accept_matching: its drafts are greedy, so that it
    samples the trunk's token first and compares (engine.py says why this is the same law).

    Speculative sampling keeps the output distribution p exactly.
      p       [B,n+1,V] target probabilities at each verified position
      q       [B,n,V] draft probabilities (one-hot for greedy drafts)
      drafts  [B,n] sampled from q
      u       [B,n] uniform in [0,1)
    Draft x is accepted with probability min(1, p(x)/q(x)); the token after the last accepted one is sampled from
        r = max(p - q, 0) / sum max(p - q, 0)
    or from p itself when everything was accepted. -> (accepted int64 [B], next-token probabilities [B,V]).

    By hand, V = 2, p = (.3, .7), q = (.6, .4): draft 0 is accepted with probability 1/2, else r = (0, 1); so
    P(0) = .6 * .5 = .3 and P(1) = .4 + .6 * .5 = .7.
    """
    n = drafts.shape[1]
    px = p[:, :n].gather(2, drafts[..., None])[..., 0]              # [B,n]
    qx = q.gather(2, drafts[..., None])[..., 0]
    accepted = (u * qx < px).long().cumprod(1).sum(1)               # u < p/q without dividing by 0
    at = accepted[:, None, None].expand(-1, 1, p.shape[2])
    target = p.gather(1, at)[:, 0]                                  # [B,V] p at the first position not accepted
    draft = torch.cat([q, torch.zeros_like(q[:, :1])], 1).gather(1, at)[:, 0]   # q there, 0 when all were accepted
    residual = (target - draft).clamp_min(0)
    return accepted, residual / residual.sum(-1, keepdim=True)
