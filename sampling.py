"""
Sampling tokens: temperature, top-k, top-p and inversion, for all sequences of a batch at once (report 3.5: temperature
0.6 and top-p 0.95 in evaluation; 3.3: temperature 1 in RL rollouts).

Each token has its own random number: a hash of its request's seed and its index in the answer. No generator has a
state, so a token depends neither on the batch it is sampled in nor on the order of the sampling.

    ids, logp = sample_tokens(logits, uniform(seed, index), temperature, top_p, top_k)

kernels/cpu/decode_cpu.c does the same for one row at a time.
"""
import torch
from torch import Tensor


def signed64(x: int) -> int:
    """x modulo 2^64, as the signed 64-bit integer with the same bits: what torch.int64 can hold."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


GOLDEN, MIX1, MIX2 = (signed64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) on int64: products wrap around, the masks make >> logical."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * MIX1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * MIX2
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """u in [0, 1 - 2^-24], fp32: a pure function of (seed, index), int64 tensors that broadcast."""
    bits = splitmix(splitmix(seed) + (index + 1) * GOLDEN)
    return (bits >> 40 & (1 << 24) - 1).float() * 2.0 ** -24


def top_p_filter(p: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """
    p [N,V] with everything outside top-k and top-p set to 0, renormalised. top_p fp32 [N]; top_k int64 [N], 0 = all.

    By hand: p = (.5, .3, .2) and top_p = .6 keep .5 (mass before it 0) and .3 (mass before it .5) -> (.625, .375, 0).

    On a CPU: sort only tokens with p > (1 - top_p) / V, a few dozen. The rest sum to less than 1 - top_p, so none of
    them can be inside the nucleus.
    """
    if p.is_cuda:                                                   # in a CUDA graph no shape may depend on values
        p = p.double()                                              # as in sample_tokens()
        sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
    else:
        n = int((p > ((1 - top_p) / p.shape[-1])[:, None]).sum(-1).max().clamp_min(1))
        order = p.topk(n, sorted=False).indices.sort(-1).values     # by id, so that ties fall as in a full sort
        sorted_p, by_size = p.gather(1, order).sort(dim=-1, descending=True, stable=True)
        order = order.gather(1, by_size)
    before = sorted_p.cumsum(-1) - sorted_p                         # mass of the more likely tokens
    rank = torch.arange(sorted_p.shape[-1], device=p.device)
    inside = (before < top_p[:, None]) & (rank < torch.where(top_k > 0, top_k, p.shape[-1])[:, None])
    inside[:, 0] = True
    filtered = torch.zeros_like(p).scatter_(1, order, sorted_p * inside)
    return (filtered / filtered.sum(-1, keepdim=True)).float()


def sample_tokens(logits: Tensor, u: Tensor, temperature: Tensor | None = None, top_p: Tensor | None = None,
                  top_k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """
    One token per row by inversion: the first id whose cumulated probability exceeds u.

    logits fp32 [N,V]; the rest [N]. Without temperature: 1 everywhere, nothing filtered. With temperature but without
    top_k: greedy everywhere. -> (ids int64 [N], log-probs fp32 [N] under the distribution that was sampled from). A
    row with a logit that is NaN or infinite has no distribution: its log-prob is NaN, its id any.
    """
    low, high = logits.aminmax(dim=-1)
    check = (high - low) * 0                                        # [N], NaN where one is NaN or infinite, else 0
    if temperature is None:
        p = logits.softmax(-1)
    elif top_k is None:
        ids = logits.argmax(-1, keepdim=True)
        logp = logits.softmax(-1).gather(1, ids)[:, 0].log()
        return ids[:, 0], logp + check
    else:
        greedy = temperature == 0
        t = torch.where(greedy, 1.0, temperature)
        over = ~((low / t).isfinite() & (high / t).isfinite())      # so cold that the quotient overflows: the largest
        if logits.is_cuda or over.any():                            # logit at 0 keeps all of them in range
            logits = logits - torch.where(over, high, 0.0)[:, None]
        p = (logits / t[:, None]).softmax(-1)
        top_p, top_k = torch.where(greedy, 1.0, top_p), torch.where(greedy, 0, top_k)       # greedy: nothing is cut
        if logits.is_cuda:                                          # in a CUDA graph no shape may depend on values
            p = top_p_filter(p, top_p, top_k)
        elif (cut := (top_p < 1) | (top_k > 0)).any():
            p[cut] = top_p_filter(p[cut], top_p[cut], top_k[cut])
    # on a GPU the order of a sum depends on the number of rows: in fp64 the difference does not reach the token
    cdf = (p.double() if p.is_cuda else p).cumsum(-1)
    # u <= 1 - 2^-24 keeps u * total below the total in fp32, so a token of probability 0 is never sampled
    ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp_max(p.shape[-1] - 1)
    if temperature is not None:
        ids = torch.where(greedy, logits.argmax(-1), ids)
    return ids, p.gather(1, ids[:, None])[:, 0].log() + check
