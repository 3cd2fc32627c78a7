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

vLLM and SGLang load one layer and, for more than one draft, apply it again to what it has just made. A layer can be
trained for that (FastMTP, arXiv 2509.18362): with mtp_depth = n the loss applies it n times, as these engines do,

    z^j_i = Block( W [ RMSNorm(h^{j-1}_i) ; RMSNorm(emb(x_{i+j})) ] ) at position i + j - 1        h^0_i = h_i
    h^j_i = RMSNorm_0(z^j_i) / gamma,    gamma the gain of the trunk's final norm, which an export folds into lm_head

where z^j_i attends to the keys of z^1 up to position i and to those of its own chain, z^2_i .. z^j_i.
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.reference import sdpa
from model import Block, MiMo, ModelConfig, RMSNorm, operators

MOST_DRAFTS = 7         # of one layer that drafts again and again: kernels/decode.py verifies 8 tokens at a time


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


class Chain:
    """
    The attention of a layer that is applied again and again in training: what Block.forward takes as its cache.
    Application j (from 0) of position i stands at position i + j and sees what a serving engine has there:

        the keys of application 0 up to position i, in the same document, and its own of applications 1 .. j

    No mask of more than ROWS positions times the keys they see is ever in memory.
    """
    ROWS = 512

    def __init__(self, bounds: Tensor | None):
        self.bounds, self.j, self.kv = bounds, 0, {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Application self.j for all positions: q [B,T,H,d], rotated, k and v [B,T,K,d] -> [B,T,H,d]."""
        self.kv[self.j] = k, v
        if self.j == 0:
            return operators(q, k, v).attention(q, k, v, self.bounds)
        at, out = torch.arange(q.shape[1], device=q.device), []
        for rows in at.split(self.ROWS):
            lo, hi = int(rows[0]), int(rows[-1]) + 1
            see = at[:hi] <= rows[:, None]                                                      # [R,hi]
            if self.bounds is not None:
                see = see & (at[:hi] >= self.bounds[0][:, lo:hi, None])                         # [B,R,hi]
            own = (rows == rows[:, None]).repeat(1, self.j)                                     # [R,jR]
            mask = torch.cat([see.expand(len(q), -1, -1), own.expand(len(q), -1, -1)], -1)      # [B,R,hi+jR]
            k, v = (torch.cat([self.kv[0][i][:, :hi], *(self.kv[n][i][:, lo:hi] for n in range(1, self.j + 1))], 1)
                    for i in (0, 1))
            out.append(sdpa(q[:, lo:hi], k, v, mask[:, None]))
        return torch.cat(out, 1)


def check_depth(depth: int, train: str, n_mtp: int, where: str) -> None:
    """UserError unless a loss of `depth` applications fits: one MTP layer, trained alone (train = "mtp")."""
    if depth > 1 and (train != "mtp" or n_mtp != 1):
        raise UserError(f"mtp_depth = {depth} applies one MTP layer again and again: train = {train!r} should be 'mtp'"
                        f", and {where} has {n_mtp} MTP layer(s), should have 1 (`hf.py export --flavour=mimo`, then "
                        "`import`, keeps the first)")


def check_drafts(n_draft: int, n_mtp: int, where: str) -> None:
    """UserError unless n_mtp layers can write n_draft drafts: one each, or up to MOST_DRAFTS of a single layer."""
    most = MOST_DRAFTS if n_mtp == 1 else n_mtp
    if not 0 <= n_draft <= most:
        raise UserError(f"n_draft = {n_draft} should be 0 to {most}: {where} has {n_mtp} MTP layer(s)")


def mean_loss(losses: Tensor, depth: int = 1) -> Tensor:
    """
    One number for the mean losses of the MTP layers, or of the applications of one layer: their average; with depth > 1
    0.6^j, normed, times that of application j [FastMTP]. By hand, three applications: 0.51, 0.31, 0.18.
    """
    if depth == 1:
        return losses.mean()
    weight = 0.6 ** torch.arange(len(losses), device=losses.device)
    return (losses * weight).sum() / weight.sum()


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
           depth: int = 1) -> tuple[Tensor, list[Tensor]]:
    """
    Summed cross-entropies of the trunk and of each MTP layer, in nats. -> (trunk sum, [sum per MTP layer]).

      ids, docs   [B, T+1+n] with look-ahead for n MTP layers
      positions   [B,T] within the document
      bounds      int32 [2,B,T], the document of each token (data.loader.Batch)
      mask        [B, T+1+n], 1 on tokens that are trained on as targets (SFT: the assistant's); default all
      depth       applications of the one MTP layer; above 1 they take the place of the layers, also in n

    Sums, not means: the caller divides by target_counts over the whole batch and all ranks, so that micro-batches and
    ranks never change the loss. The [B*T,V] logits are never kept (kernels/linear_cross_entropy.py).
    """
    T = positions.shape[1]
    n_mtp = min(ids.shape[1] - T - 1, max(depth, len(model.mtp_layers)))
    first, *rest = mtp_targets(ids, docs, T, n_mtp, mask)
    h = model(ids[:, :T], positions, bounds)                        # [B,T,D], before the final norm
    main = linear_cross_entropy(model.norm(h).flatten(0, 1), model.lm_head.weight, first.flatten())
    return main, layer_losses(model, h, ids, rest, positions, bounds, depth=depth)


def layer_losses(model: MiMo, h: Tensor, ids: Tensor, targets: list[Tensor], positions: Tensor | None = None,
                 bounds: Tensor | None = None, frozen_trunk: bool = False, depth: int = 1) -> list[Tensor]:
    """
    Summed cross-entropy of each MTP layer, or of each of depth > 1 applications of the first, in nats, on the trunk's
    states h [B,T,D] before the final norm. targets: one [B,T] per layer, of mtp_targets; the rest as in losses.
    frozen_trunk: h, embedding and head are constants, and only the layers get gradients.
    """
    embedding, head = model.embed_tokens.weight, model.lm_head.weight               # tied with the trunk's [Fig. 2]
    if frozen_trunk:
        h, embedding, head = h.detach(), embedding.detach(), head.detach()
    states = mtp_states(model, h, ids, embedding, positions, bounds, depth)
    return [linear_cross_entropy(z.flatten(0, 1), head, target.flatten())
            for z, target in zip(states, targets, strict=False)]


def mtp_states(model: MiMo, h: Tensor, ids: Tensor, embedding: Tensor, positions: Tensor | None, bounds: Tensor | None,
               depth: int, blank_first: bool = False) -> Iterator[Tensor]:
    """
    [B,T,D] behind the last norm of each MTP layer or application, in turn; embedding [V,D], the rest as above.
    blank_first: position 0 of a text reads zeros for its token's embedding, as in vLLM and SGLang.
    """
    T = h.shape[1]
    cos, sin = model.rope_at(ids[:, :T], positions)
    chain = Chain(bounds) if depth > 1 else None
    for k, layer in enumerate([model.mtp_layers[0]] * depth if chain else model.mtp_layers):
        emb = F.embedding(ids[:, k + 1:T + k + 1], embedding)
        if blank_first and not k:
            emb = emb.masked_fill((positions == 0)[..., None], 0)
        z = layer.final_layernorm(layer(h, emb, cos, sin, bounds, chain))
        yield z
        if chain:                                                               # one position further on
            positions = torch.arange(T, device=h.device)[None] if positions is None else positions
            chain.j, (cos, sin) = k + 1, model.rope_at(None, positions + k + 1)
            h = z / model.norm.weight.detach()


@torch.no_grad()
def teacher_forced_acceptance(model: MiMo, ids: Tensor, docs: Tensor, positions: Tensor, bounds: Tensor,
                              mask: Tensor | None = None, depth: int = 1, blank_first: bool = False,
                              ) -> list[tuple[int, int]]:
    """
    Acceptance of each MTP layer on a given text: [(accepted, verified) per layer]; shapes and depth as in losses, mask:
    1 on the tokens that the model wrote, default all. blank_first: as in mtp_states.

    A draft is verified only if all drafts before it in the round were accepted, the same definition as the engine's
    counters. One forward gives all drafts; then each row is walked in rounds, as the engine goes: a round verifies
    layer 0, 1, .. up to the first wrong draft, and the next round starts behind the token that corrected it. A plain
    average over all positions is another quantity, because rounds start where the last one failed.

    Equal to the engine's count where the text is the model's own, down to near-ties of rounding (tests/test_engine.py).
    Elsewhere it answers "as if the model had written this".
    """
    T, n = positions.shape[1], max(depth, len(model.mtp_layers))
    h = model(ids[:, :T], positions, bounds)
    right, exists = [], []          # [n][B][T]: is the draft of x_{i+k+2} right; is there such a token
    states = mtp_states(model, h, ids, model.embed_tokens.weight, positions, bounds, depth, blank_first)
    for k, z in enumerate(states):
        draft = (z @ model.lm_head.weight.T).argmax(-1)             # [B,T]
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
