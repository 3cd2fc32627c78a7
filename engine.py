"""
The inference engine: continuous batching, KV cache, per-request sampling, MTP speculative decoding (report 2.2, 3.4).

    engine = Engine(model, slots=128, max_len=256, n_draft=3)
    engine.add(Request(id=0, prompt=ids, max_tokens=64, temperature=0.6, top_p=0.95, stop=(eos,), seed=1))
    while engine.active or engine.waiting:
        for sample in engine.step(): print(sample.tokens, sample.logprobs, sample.finish)

Rows of the KV cache, [slots + 4] sequences of max_len tokens each; nothing is ever gathered on the way to attention:

    0 ...... A-1 | A ........ | S-P ....... S-1          A sequences decode, always packed to the front, so that their
      decoding   |    free    |    prefilling            cache is one view; P prompts are read in chunks at the back and
                                                         copied to the front when done (once per sample of a group).

One step = admit, read one chunk of the waiting prompts, decode every active sequence once, retire what ended.

THE SAME REQUEST GIVES THE SAME TOKENS whatever runs beside it, with or without speculation, bit for bit in fp32 on a
CPU. Measured on torch 2.13 (MKL), asserted by tests/test_engine.py: a row of a matrix product does not depend on the
other rows once there are at least 4 of them (1, 2 and 3 take other code), nor on masked keys when their number is a
multiple of 64 and probabilities meet values in blocks of 128. So every product here has 4 rows or more, and each token
owns its random number: u = hash(seed, index of the token), no generator has a state.

Speculation is exact in the strongest sense. Drafts are one-hot (greedy), so "accept x with probability p(x), else draw
from p without x" (Leviathan et al.) is the same law as: draw the token from p, with the number it would have used
anyway, and accept if the draft is that token. Hence one rule for greedy and sampled requests, and the text, not only
its distribution, is the same as without MTP.

Differs from the report, which patches vLLM: the three MTP layers are all run, in parallel form, each with its own cache.
"""
import math
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rope import rope_tables
from model import MiMo
from mtp import accept_greedy

KEYS = 64          # cached keys are read in multiples of this: see the header
BLOCK = 128        # probabilities x values are summed in blocks of this many keys
ROWS = 4           # fewest rows of a matrix product


@dataclass(frozen=True)
class Request:
    id: object                      # any hashable, unique among the requests in flight
    prompt: list[int]               # token ids, at least one
    max_tokens: int                 # most tokens to generate, the stop token included
    temperature: float = 1.0        # 0 = greedy
    top_p: float = 1.0              # keep the smallest set of most likely tokens with at least this mass
    top_k: int = 0                  # keep the k most likely tokens, 0 = all
    stop: tuple[int, ...] = ()      # ids that end the sample; the id itself is kept
    seed: int = 0                   # with the token's index decides its random number


@dataclass(frozen=True)
class Sample:
    id: object
    prompt: list[int]
    tokens: list[int]               # generated, the stop token included
    logprobs: list[float]           # natural log of the probability each token was drawn with (greedy: temperature 1)
    finish: str                     # "stop" | "length" (max_tokens or max_len) | "abort"
    drafted: tuple[int, ...] = ()   # per MTP layer: drafts looked at, that is, with all drafts before them accepted
    accepted: tuple[int, ...] = ()  # per MTP layer: of those, how many equalled the token drawn


# ---- drawing tokens --------------------------------------------------------------------------------------------------

def signed64(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


GOLDEN, MIX1, MIX2 = (signed64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 tensors; int64 products wrap, and >> is made logical by the masks."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * MIX1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * MIX2
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """u in [0, 1 - 2^-24], fp32, a pure function of (seed, index); both int64 of one shape."""
    bits = splitmix(splitmix(seed) + (index + 1) * GOLDEN)
    return (bits >> 40 & (1 << 24) - 1).float() * 2.0 ** -24


def keep_top(p: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """p [N,V] with everything outside top-k and top-p set to 0, renormalised. top_p fp32 [N], top_k int64 [N], 0 = all.
    By hand: p = (.5, .3, .2), top_p = .6 keeps .5 (mass before it 0) and .3 (mass before it .5 < .6) -> (.625, .375, 0)."""
    sorted_p, order = p.sort(-1, descending=True, stable=True)
    before = sorted_p.cumsum(-1) - sorted_p                         # mass of the more likely tokens
    rank = torch.arange(p.shape[-1], device=p.device)
    k = torch.where(top_k > 0, top_k, p.shape[-1])
    keep = (before < top_p[:, None]) & (rank < k[:, None])
    keep[:, 0] = True
    kept = torch.zeros_like(p).scatter_(1, order, sorted_p * keep)
    return kept / kept.sum(-1, keepdim=True)


def draw(logits: Tensor, u: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, plain: bool,
         ) -> tuple[Tensor, Tensor]:
    """
    One token a row by inversion: the first id whose cumulated probability exceeds u. logits fp32 [N,V], the rest [N];
    plain: every row has temperature 1 and keeps all tokens. -> (ids int64 [N], log-probs fp32 [N]).
    """
    if plain:
        logp = logits.log_softmax(-1)
        cdf = logp.exp().cumsum(-1)
    else:
        greedy = temperature == 0
        logp = (logits / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
        cut = (top_p < 1) | (top_k > 0)
        if cut.any():
            kept = keep_top(logp[cut].exp(), top_p[cut], top_k[cut])
            logp = logp.index_put((cut,), kept.log())
        cdf = logp.exp().cumsum(-1)
    # u <= 1 - 2^-24 keeps u * total below total in fp32, so a token of probability 0 is never drawn
    ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    if not plain:
        ids = torch.where(greedy, logits.argmax(-1), ids)
    return ids, logp.gather(1, ids[:, None])[:, 0]


# ---- cache and attention ---------------------------------------------------------------------------------------------

class Plan:
    """Where the Q new tokens of B sequences go and what they see; made once a step, read by every layer."""
    def __init__(self, engine: "Engine", first: int, positions: Tensor, write: Tensor | None = None):
        """positions int64 [B,Q]: also the last cache column each token sees; write: the column it fills (default same)."""
        (B, Q), K, C = positions.shape, engine.K, engine.columns
        self.first, self.B = first, B
        heads = torch.arange(first * K, (first + B) * K, device=positions.device).view(B, 1, K) * C
        write = positions if write is None else write
        self.where = (heads + write[:, :, None]).flatten()          # rows of the cache seen as [S*K*C, d]
        self.L = min(-(-(int(positions.max()) + 1) // KEYS) * KEYS, C)
        seen = engine.column[:self.L] <= positions[:, :, None]      # [B,Q,L]
        bias = torch.zeros(seen.shape, dtype=engine.dtype, device=seen.device).masked_fill_(~seen, -math.inf)
        self.bias = bias.repeat_interleave(engine.G, 1)[:, None]    # [B,1,Q*G,L]
        self.cos, self.sin = engine.cos[positions], engine.sin[positions]   # [B,Q,d]


class LayerCache:
    """One layer's keys and values, [S,K,C,d] each; what Block.forward knows as `cache`."""
    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v, self.plan = k, v, None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k, v [B,Q,K,d], then attends q [B,Q,H,d] -> [B,Q,H,d]."""
        plan, d = self.plan, q.shape[-1]
        self.k.view(-1, d).index_copy_(0, plan.where, k.reshape(-1, d))
        self.v.view(-1, d).index_copy_(0, plan.where, v.reshape(-1, d))
        rows = slice(plan.first, plan.first + plan.B)
        return attend(q, self.k[rows], self.v[rows], plan.bias)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """
    softmax(q k^T / sqrt(d) + bias) v for few queries over a head-major cache: each row's bits depend on nothing else.
    q [B,Q,H,d]; k, v [B,K,C,d] of which the first L columns are read; bias [B,1,Q*G,L]. -> [B,Q,H,d]. Plain matrix
    products instead of SDPA: 2x faster at these sizes, and SDPA sums keys in an order that depends on L.
    """
    B, Q, H, d = q.shape
    K, L = k.shape[1], bias.shape[-1]
    R = Q * H // K                                                  # the G heads of a KV head are rows of one matrix
    q = (q * d ** -0.5).view(B, Q, K, H // K, d).transpose(1, 2).reshape(B * K, R, d)
    k, v = k.flatten(0, 1)[:, :L], v.flatten(0, 1)[:, :L]           # [B*K,L,d], views
    if R < ROWS:
        q = F.pad(q, (0, 0, 0, ROWS - R))
    s = torch.bmm(q, k.mT)[:, :R].view(B, K, R, L) + bias           # [B,K,R,L]
    p = s.softmax(-1).view(B * K, R, L)
    if R < ROWS:
        p = F.pad(p, (0, 0, 0, ROWS - R))
    o = torch.bmm(p[:, :, :BLOCK], v[:, :BLOCK])                    # [B*K,R,d]
    for c in range(BLOCK, L, BLOCK):
        o.baddbmm_(p[:, :, c:c + BLOCK], v[:, c:c + BLOCK])
    return o[:, :R].view(B, K, Q, H // K, d).transpose(1, 2).reshape(B, Q, H, d)


# ---- the engine ------------------------------------------------------------------------------------------------------

class Engine:
    """
    model: a MiMo, shared with its owner and never written to except by load(); slots: most sequences decoded at once;
    max_len: longest prompt + answer, tokens; n_draft: MTP layers used for speculation (0 = plain), at most those the
    model has; chunk: prompt tokens read per sequence and step; budget: prompt tokens read per step over all sequences.
    """
    def __init__(self, model: MiMo, slots: int, max_len: int, n_draft: int = 0, chunk: int = 256, budget: int = 4096):
        cfg = model.cfg
        if not 0 <= n_draft <= len(model.mtp_layers):
            raise ValueError(f"n_draft = {n_draft} should be between 0 and the {len(model.mtp_layers)} MTP layers of the model")
        if slots < 1 or max_len < 2:
            raise ValueError(f"slots = {slots} and max_len = {max_len} should be at least 1 and 2")
        w = model.lm_head.weight
        self.model, self.slots, self.max_len, self.n_draft = model, slots, max_len, n_draft
        self.chunk, self.budget = max(chunk, ROWS), max(budget, chunk, ROWS)
        self.K, self.G, self.dtype, self.device = cfg.n_kv_head, cfg.n_head // cfg.n_kv_head, w.dtype, w.device
        self.S = S = slots + ROWS                                   # ROWS spare rows, so that a batch of 1 has 4
        # the last column is scrap: padding writes there, nobody reads it
        self.columns = C = -(-(max_len + n_draft + 2) // KEYS) * KEYS
        n_layer = cfg.n_layer + n_draft
        self.cache = torch.zeros(n_layer, 2, S, self.K, C, cfg.head_dim, dtype=self.dtype, device=self.device)
        self.layers = [LayerCache(kv[0], kv[1]) for kv in self.cache]
        self.column = torch.arange(C, device=self.device)
        self.ring = 4 * (n_draft + 1)                               # trunk states kept for re-running the MTP layers
        long = dict(dtype=torch.int64, device=self.device)
        real = dict(dtype=torch.float32, device=self.device)
        # one row a sequence; n counts its tokens that are certain, the trunk cache holds the first n - 1 of them
        self.state = {
            "tokens": torch.zeros(S, C, **long), "logp": torch.zeros(S, C, **real), "n": torch.ones(S, **long),
            "start": torch.ones(S, **long), "limit": torch.ones(S, **long), "seed": torch.zeros(S, **long),
            "temperature": torch.ones(S, **real), "top_p": torch.ones(S, **real), "top_k": torch.zeros(S, **long),
            "stop": torch.full((S, 1), -1, **long), "h": torch.zeros(S, self.ring, cfg.d_model, dtype=self.dtype, device=self.device),
            "drafted": torch.zeros(S, n_draft, **long), "accepted": torch.zeros(S, n_draft, **long)}
        self.waiting_requests: deque[Request] = deque()
        self.decoding: list[Request] = []                           # row i of the cache belongs to decoding[i]
        self.reading: list[list[Request]] = []                      # requests with one prompt; row S-1-j is reading[j]'s
        self.fancy = 0                                              # active requests that need more than a softmax
        self.ids: set = set()
        self.rope_base = None
        self.steps = self.rows = 0                                  # decode forwards, and sequences in them

    @property
    def active(self) -> int:
        return len(self.decoding) + sum(map(len, self.reading))

    @property
    def waiting(self) -> int:
        return len(self.waiting_requests)

    def add(self, request: Request) -> None:
        """Queues a request; it enters the batch at a later step. Raises ValueError with what would be right."""
        n, V = len(request.prompt), self.model.cfg.vocab_size
        if request.id in self.ids:
            raise ValueError(f"request {request.id!r}: a request with this id is in flight")
        if not 1 <= n < self.max_len:
            raise ValueError(f"request {request.id!r}: a prompt of {n} tokens should have 1 to {self.max_len - 1} (max_len - 1)")
        if request.max_tokens < 1 or request.temperature < 0 or not 0 < request.top_p <= 1 or request.top_k < 0:
            raise ValueError(f"request {request.id!r}: max_tokens = {request.max_tokens} should be >= 1, temperature = "
                             f"{request.temperature} >= 0, top_p = {request.top_p} in (0, 1], top_k = {request.top_k} >= 0")
        if not (0 <= min(request.prompt) and max(request.prompt) < V):
            raise ValueError(f"request {request.id!r}: prompt ids should be in 0..{V - 1}")
        self.ids.add(request.id)
        self.waiting_requests.append(request)

    @torch.no_grad()
    def step(self) -> list[Sample]:
        """One round for everybody: admit, read a chunk of prompts, decode, retire. -> the samples that ended."""
        if not self.ids:
            return []
        self.tables()
        self.admit()
        if self.reading:
            self.read_prompts()
        if not self.decoding:
            return []
        ended = self.retire(self.decode())
        if self.n_draft and self.decoding:
            self.draft(0, max(len(self.decoding), ROWS), self.n_draft + 1)
        return ended

    @torch.no_grad()
    def abort(self, id) -> Sample | None:
        """Takes a request out wherever it is. -> what it had generated (finish "abort"), or None if it is not here."""
        if id not in self.ids:
            return None
        for i, request in enumerate(self.decoding):
            if request.id == id:
                sample = self.result(i, "abort")
                self.remove([i])
                return sample
        for group in [self.waiting_requests, *self.reading]:
            for request in group:
                if request.id == id:
                    group.remove(request)                           # an emptied reading group is dropped when read
                    self.ids.discard(id)
                    return Sample(id, request.prompt, [], [], "abort", (0,) * self.n_draft, (0,) * self.n_draft)
        return None

    @torch.no_grad()
    def load(self, state_dict: dict[str, Tensor]) -> None:
        """New weights, copied into the model in place. Sequences in flight go on, with the cache they have."""
        self.model.load_state_dict(state_dict)

    def tables(self) -> None:
        """cos and sin of every position [C,d], again when stage 3 has raised the RoPE base."""
        if self.rope_base != self.model.cfg.rope_base:
            self.rope_base = self.model.cfg.rope_base
            self.cos, self.sin = rope_tables(self.column, self.model.cfg.head_dim, self.rope_base)

    # -- prompts

    def admit(self) -> None:
        """Fill free slots in order of arrival; waiting requests with one prompt, as an RL group has, are read once."""
        free, new = self.slots - self.active, {}
        while free and self.waiting_requests:
            request = self.waiting_requests.popleft()
            new.setdefault(tuple(request.prompt), []).append(request)
            free -= 1
        for prompt, group in new.items():
            row = self.S - 1 - len(self.reading)
            self.reading.append(group)
            self.state["tokens"][row, :len(prompt)] = torch.tensor(prompt)
            self.state["n"][row] = 1                                # while reading: n - 1 tokens are in the cache

    def read_prompts(self) -> None:
        """
        One chunk of the oldest prompts through the trunk and the MTP layers, all but each prompt's last token, which the
        first decode step takes. Sequences are padded to the longest chunk; what padding writes is overwritten later.
        """
        self.reading, empty = [g for g in self.reading if g], [j for j, g in enumerate(self.reading) if not g]
        if empty:                                                   # aborted: close the gaps
            keep = [j for j in range(len(self.reading) + len(empty)) if j not in empty]
            self.copy([self.S - 1 - j for j in keep], [self.S - 1 - j for j in range(len(keep))])
        want = [len(g[0].prompt) - 1 for g in self.reading]
        done = (self.state["n"][self.S - len(want):].flip(0) - 1).tolist() if want else []
        T, B = 0, 0
        for w, r in zip(want, done, strict=True):                   # as many prompts as the budget allows, oldest first
            longest = max(T, min(w - r, self.chunk), ROWS)
            if B and longest * (B + 1) > self.budget:
                break
            T, B = longest, B + 1
        if B == 0:
            return
        if any(w > r for w, r in zip(want[:B], done[:B], strict=True)):
            self.read_chunk(B, T)
        new = [min(r + T, w) for w, r in zip(want[:B], done[:B], strict=True)]
        self.state["n"][self.S - B:] = torch.tensor(new[::-1], device=self.device) + 1
        self.start_decoding([j for j in range(B) if new[j] == want[j]])

    def read_chunk(self, B: int, T: int) -> None:
        first = self.S - B
        start = self.state["n"][first:, None] - 1
        columns = start + torch.arange(T, device=self.device)       # [B,T]
        positions = columns.clamp_max(self.columns - 1)
        ids = self.state["tokens"][first:].gather(1, positions)
        h = self.trunk(ids, Plan(self, first, positions))           # [B,T,D]
        if self.n_draft == 0:
            return
        for k in range(self.n_draft):
            # slot p of layer k takes x_{p+k+1}: from the prompt, where known; the last k slots are re-run by draft()
            ahead = self.state["tokens"][first:].gather(1, (positions + k + 1).clamp_max(self.columns - 1))
            self.mtp(k, h, ahead, Plan(self, first, positions))
        tail = slice(max(T - self.ring, 0), T)
        for j in range(B):                                          # only a sequence's own rows, not its padding
            real = len(self.reading[B - 1 - j][0].prompt) - 1
            n = min(T, real - int(start[j, 0]))
            tail = slice(max(n - self.ring, 0), n)
            self.state["h"][first + j, positions[j, tail] % self.ring] = h[j, tail]

    def start_decoding(self, finished: list[int]) -> None:
        """Prompts reading[j], j in finished, are in the cache: one row of the front part for each of their requests."""
        if not finished:
            return
        A, source, state = len(self.decoding), [], self.state
        for j in finished:
            self.decoding += self.reading[j]
            source += [self.S - 1 - j] * len(self.reading[j])
        new = self.decoding[A:]
        rows = slice(A, A + len(new))
        self.copy(source, list(range(A, A + len(new))))
        def column(values, like):
            return torch.tensor(values, dtype=like.dtype, device=self.device)
        starts = [len(r.prompt) for r in new]
        state["n"][rows] = state["start"][rows] = column(starts, state["n"])
        state["limit"][rows] = column([min(len(r.prompt) + r.max_tokens, self.max_len) for r in new], state["limit"])
        state["seed"][rows] = column([signed64(r.seed) for r in new], state["seed"])
        for name in ("temperature", "top_p", "top_k"):
            state[name][rows] = column([getattr(r, name) for r in new], state[name])
        width = max(len(r.stop) for r in new)
        if width > state["stop"].shape[1]:
            state["stop"] = F.pad(state["stop"], (0, width - state["stop"].shape[1]), value=-1)
        width = state["stop"].shape[1]
        state["stop"][rows] = column([list(r.stop) + [-1] * (width - len(r.stop)) for r in new], state["stop"])
        state["drafted"][rows] = state["accepted"][rows] = 0
        self.fancy += sum(map(needs_more_than_softmax, new))
        keep = [j for j in range(len(self.reading)) if j not in set(finished)]
        self.copy([self.S - 1 - j for j in keep], [self.S - 1 - i for i in range(len(keep))])
        self.reading = [self.reading[j] for j in keep]
        if self.n_draft:
            self.draft(A, len(new), 1)

    # -- decoding

    def trunk(self, ids: Tensor, plan: Plan) -> Tensor:
        """ids [B,Q] through the blocks over the cache -> h [B,Q,D] before the final norm."""
        x = self.model.embed_tokens(ids)
        for block, cache in zip(self.model.layers, self.layers, strict=False):
            cache.plan = plan
            x = block(x, plan.cos, plan.sin, None, cache)
        return x

    def mtp(self, k: int, h: Tensor, ahead: Tensor, plan: Plan) -> Tensor:
        """MTP layer k over its own cache; ahead [B,Q] is the token k+1 places after h's. -> z [B,Q,D]."""
        cache = self.layers[self.model.cfg.n_layer + k]
        cache.plan = plan
        return self.model.mtp_layers[k](h, self.model.embed_tokens(ahead), plan.cos, plan.sin, None, cache)

    def decode(self) -> Tensor:
        """
        Every active sequence: its last certain token and its drafts through the trunk, a token drawn at each of these
        Q = n_draft + 1 places, and as many of them kept as the drafts before them were right. -> bool [A], has ended.
        """
        A, Q, s = len(self.decoding), self.n_draft + 1, self.state
        R = max(A, ROWS)
        s["n"][A:R] = 1                                             # rows that only make up the number
        n = s["n"][:R]
        positions = n[:, None] - 1 + self.column[:Q]                # [R,Q]
        ids = s["tokens"][:R].gather(1, positions)
        h = self.trunk(ids, Plan(self, 0, positions))
        logits = self.model.logits(h.flatten(0, 1))                 # [R*Q,V]
        def each(name):
            return s[name][:R].repeat_interleave(Q)
        u = uniform(each("seed"), (positions + 1 - s["start"][:R, None]).flatten())
        drawn, logp = (t.view(R, Q) for t in draw(logits, u, each("temperature"), each("top_p"), each("top_k"), self.fancy == 0))
        s["tokens"][:R].scatter_(1, positions + 1, drawn)
        s["logp"][:R].scatter_(1, positions + 1, logp)
        self.steps, self.rows = self.steps + 1, self.rows + A
        is_stop = (drawn[:, :, None] == s["stop"][:R, None, :]).any(-1)         # [R,Q]
        if self.n_draft == 0:
            n += 1
            return ((n >= s["limit"][:R]) | is_stop[:, 0])[:A]
        # kept tokens: the accepted drafts and one more, but nothing after a stop token or past the limit
        kept = accept_greedy(ids[:, 1:], drawn)                     # [R] drafts right in a row
        to_stop = (is_stop.long().cumsum(1) == 0).sum(1)            # [R] tokens before the first stop token, Q if none
        room = s["limit"][:R] - n
        emit = torch.minimum(torch.minimum(kept, to_stop) + 1, room).clamp_max(Q)
        # draft k was looked at if the token before it was kept, and a draft existed (a prompt of one token has none)
        k = self.column[:self.n_draft]
        looked = (k < emit[:, None]) & (k <= kept[:, None]) & (n > 1)[:, None]
        s["drafted"][:R] += looked
        s["accepted"][:R] += looked & (k < kept[:, None])
        s["h"][:R].scatter_(1, (positions % self.ring)[..., None].expand_as(h), h)
        n += emit
        return ((n >= s["limit"][:R]) | (emit == to_stop + 1))[:A]

    def draft(self, first: int, B: int, E: int) -> None:
        """
        New drafts after the last certain token x_{n-1}: layer k reads (h_{n-2}, x_{n-1+k}) and writes draft x_{n+k}.
        Each layer is also re-run on the slots that became certain (at most E) or still held a draft (k), with the true
        hidden state from the ring, so its cache never keeps what a rejected draft left. Fixed windows: static shapes.

            slots of layer k:   n-1-E-k ............ n-3  n-2          tokens needed: slot p takes x_{p+k+1}
        """
        rows, s, m = slice(first, first + B), self.state, self.model
        n = s["n"][rows, None]
        tokens = s["tokens"][rows]
        for k in range(self.n_draft):
            slots = n - 1 + self.column[:E + k] - (E + k)           # [B,E+k], the last one is n-2
            real = slots.clamp_min(0)
            plan = Plan(self, first, real, torch.where(slots < 0, self.columns - 1, real))
            h = s["h"][rows].gather(1, (real % self.ring)[..., None].expand(-1, -1, m.cfg.d_model))
            z = self.mtp(k, h, tokens.gather(1, real + k + 1), plan)[:, -1]     # [B,D]
            z = m.mtp_layers[k].final_layernorm(z)
            tokens.scatter_(1, n + k, F.linear(z, m.lm_head.weight).argmax(-1, keepdim=True))

    # -- the end of a sequence

    def result(self, i: int, finish: str) -> Sample:
        s, request = self.state, self.decoding[i]
        a, b = len(request.prompt), int(s["n"][i])
        return Sample(request.id, request.prompt, s["tokens"][i, a:b].tolist(), s["logp"][i, a:b].tolist(), finish,
                      tuple(s["drafted"][i].tolist()), tuple(s["accepted"][i].tolist()))

    def retire(self, ended: Tensor) -> list[Sample]:
        rows = ended.nonzero()[:, 0].tolist()
        samples = []
        for i in rows:
            sample = self.result(i, "stop")
            stopped = sample.tokens[-1] in self.decoding[i].stop
            samples.append(sample if stopped else self.result(i, "length"))
        self.remove(rows)
        return samples

    def remove(self, rows: list[int]) -> None:
        """Take rows out of the decoding part: the last rows that stay move into the holes."""
        if not rows:
            return
        gone, A = set(rows), len(self.decoding)
        for i in rows:
            self.ids.discard(self.decoding[i].id)
            self.fancy -= needs_more_than_softmax(self.decoding[i])
        holes = [i for i in rows if i < A - len(rows)]
        movers = [i for i in range(A - len(rows), A) if i not in gone]
        self.copy(movers, holes)
        for i, j in zip(movers, holes, strict=True):
            self.decoding[j] = self.decoding[i]
        del self.decoding[A - len(rows):]

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Rows of the cache and of all per-sequence state, all read before any is written."""
        pairs = [(i, j) for i, j in zip(sources, targets, strict=True) if i != j]
        if not pairs:
            return
        i, j = torch.tensor(pairs, device=self.device).T
        used = min(-(-(int(self.state["n"][i].max()) + self.n_draft) // KEYS) * KEYS, self.columns)
        self.cache[:, :, j, :, :used] = self.cache[:, :, i, :, :used]
        for t in self.state.values():
            t[j] = t[i]


def needs_more_than_softmax(r: Request) -> bool:
    return r.temperature != 1 or r.top_p < 1 or r.top_k > 0


def generate(engine: Engine, requests: list[Request]) -> list[Sample]:
    """Runs requests to the end -> samples in the order of the requests."""
    for request in requests:
        engine.add(request)
    done = {}
    while len(done) < len(requests):
        done |= {s.id: s for s in engine.step()}
    return [done[r.id] for r in requests]
