"""
The inference engine: continuous batching, per-request sampling, MTP speculative decoding (report 2.2, 3.4).

    engine = Engine(model, slots=128, max_len=256, n_draft=3)
    engine.add(Request(id=0, prompt=ids, max_new_tokens=64, temperature=0.6, top_p=0.95, stop=(eos,), seed=1))
    while engine.active or engine.waiting:
        for sample in engine.step(): print(sample.tokens, sample.logprobs, sample.finish)

One step = admit, read one chunk of the new prompts, decode every active sequence once, retire what ended.
Sequences are rows of the cache (cache.py), packed so that a batch is always one view:

    0 ...... A-1 | A ........ | S-P ....... S-1       A sequences decode at the front; P prompts are read in
    chunks at
      decoding   |    free    |    reading            the back and copied to the front when done, once per
      sample.

THE SAME REQUEST GIVES THE SAME TOKENS whatever runs beside it, with or without speculation: in fp32 on a CPU
bit for bit, log-probs too. cache.py says which products are safe; and each token owns its random number, a
hash of the request's seed and the token's index, so no generator has a state.

SPECULATION IS EXACT in the strongest sense. Drafts are greedy, so their q is one-hot, and the rule of
Leviathan et al. "keep x with probability p(x), else draw from p without x" is the same law as: draw the token
from p with the number it would have used anyway, and keep the draft if it is that token. One rule then serves
greedy and sampled requests, and not only the distribution but the text itself is what it would have been
without MTP.

Differs from the report, which patches vLLM: all MTP layers run, in parallel form, each with a cache of its
own. Expected: docs/engine.md. Tests: tests/test_engine.py.
"""
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from cache import ROWS, Blocks, ForwardContext, PackedRows, Rows
from kernels.cpu.decode import Forward, library, up16
from kernels.gemv import block_step, gemv, gemv_applies
from kernels.rope import rope_tables
from model import Block, MiMo
from mtp import accept_greedy
from sampling import sample_tokens, signed64, uniform

STOPS = 8          # most stop ids of a request


@dataclass(frozen=True)
class Request:
    id: object                      # any hashable, unique among the requests in flight
    prompt: list[int]               # token ids, at least one
    max_new_tokens: int                 # most tokens to generate, the stop token included
    temperature: float = 1.0        # 0 = greedy
    top_p: float = 1.0              # keep the smallest set of most likely tokens with at least this mass
    top_k: int = 0                  # keep the k most likely tokens, 0 = all
    stop: tuple[int, ...] = ()      # ids that end the sample; the id itself is kept
    seed: int = 0                   # with the token's index decides its random number; any 64-bit integer


@dataclass(frozen=True)
class Sample:
    id: object
    prompt: list[int]
    tokens: list[int]               # generated, the stop token included
    logprobs: list[float]         # ln of the probability each token was drawn with (greedy: at temperature 1)
    finish: str                     # "stop" | "length" (max_new_tokens, or the engine's max_len) | "abort"
    # per MTP layer: drafts verified at, that is, with all drafts before them kept
    verified: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()  # per MTP layer: of those, how many were the token drawn


def sampling_mode(r: Request) -> int:
    """0 needs a softmax only, 1 an argmax only, 2 everything that sample_tokens() can do."""
    return 1 if r.temperature == 0 else 2 if r.temperature != 1 or r.top_p < 1 or r.top_k > 0 else 0


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


# ---- the engine --------------------------------------------------------------------------------------------

class Engine:
    """
    model: a MiMo, shared with its owner and written to by load() alone. slots: most sequences decoded at
    once; max_len: longest prompt + answer, tokens; n_draft: MTP layers used for speculation, 0 = plain.
    chunk: prompt tokens read per sequence and step; prefill_tokens: prompt tokens read per step over all sequences.
    layout: "rows" (CPU) or "blocks" (GPU) of cache.py, with kv_tokens tokens in all (default slots * max_len) in blocks
    of `block`. plain: run torch code only, no C; default kernels.is_plain(). n_ids: only the first n_ids rows of
    lm_head are tokens (tokenizer.n_ids), the rest is padding and never sampled. ValueError for what cannot work.
    """
    def __init__(self, model: MiMo, slots: int, max_len: int, n_draft: int = 0, chunk: int = 256,
                 prefill_tokens: int = 4096, layout: str | None = None, kv_tokens: int | None = None, block: int = 64,
                 plain: bool | None = None, n_ids: int | None = None):
        cfg, w = model.cfg, model.lm_head.weight
        if n_ids is not None and not 1 <= n_ids <= cfg.vocab_size:
            raise ValueError(f"n_ids = {n_ids} should be 1 to {cfg.vocab_size}, the rows of lm_head")
        if not 0 <= n_draft <= len(model.mtp_layers):
            raise ValueError(f"n_draft = {n_draft} should be 0 to {len(model.mtp_layers)}, the MTP layers")
        if slots < 1 or max_len < 2:
            raise ValueError(f"slots = {slots} and max_len = {max_len} should be at least 1 and 2")
        layout = layout or ("blocks" if w.is_cuda else "rows")
        self.model, self.slots, self.max_len, self.n_draft = model, slots, max_len, n_draft
        self.n_ids = n_ids or cfg.vocab_size
        self.chunk, self.device = max(chunk, ROWS), w.device
        self.prefill_tokens = max(prefill_tokens, chunk, ROWS)
        # ROWS spare rows, so that a batch of 1 has 4; n_draft + 2 spare columns, the last one scrap: padding
        # writes there and nobody reads it
        # with blocks batches are filled up to powers of two: prompts being read must lie beyond that
        spare = ROWS if layout == "rows" else max(ROWS, power_of_two(slots) // 2)
        self.S, columns = slots + spare, max_len + n_draft + 2
        K, d = cfg.n_kv_head, cfg.head_dim
        plain = kernels.is_plain() if plain is None else plain
        possible = layout == "rows" and w.dtype == torch.float32 and w.device.type == "cpu"
        lib = library() if possible and not plain else None
        self.fast = lib is not None
        shape = (cfg.n_layer + n_draft, self.S, K, cfg.n_head // K, columns, up16(d) if self.fast else d)
        if layout == "rows":
            self.cache = (PackedRows if self.fast else Rows)(*shape, w.dtype, w.device)
            self.kv_tokens = slots * columns
        else:
            if n_draft > 7:
                raise ValueError(f"n_draft = {n_draft} should be at most 7: kernels.decode takes 8 tokens")
            self.kv_tokens = kv_tokens or slots * (max_len + n_draft + block)
            self.cache = Blocks(*shape, w.dtype, w.device, block, self.kv_tokens // block)
        self.column, self.columns = self.cache.column, self.cache.columns
        self.ring = 4 * (n_draft + 1)                     # trunk states kept for the MTP layers, per sequence
        self.state, self.views = self.new_state(cfg), (0, {})
        # on a CPU the same memory through NumPy, where reading or writing a few numbers costs a tenth
        numpy = w.device.type == "cpu" and w.dtype != torch.bfloat16
        self.arrays = {name: t.numpy() if numpy else t for name, t in self.state.items()}
        self.forward = Forward(model, n_draft, self.cache, self.state, lib, self.n_ids, self.prefill_tokens) \
            if self.fast else None
        self.queue: deque[Request] = deque()
        self.decoding: list[Request] = []                           # row i belongs to decoding[i]
        self.prefilling: list[list[Request]] = []           # requests with one prompt; row S-1-j is reading[j]'s
        self.in_flight: set = set()                      # ids of all requests here
        self.modes = [0, 0, 0]                               # decoding requests by sampling_mode()
        self.accept = accept_greedy                          # bench/gpu_decode.py imposes another rule
        self.rope_base, self.graphs = None, {}
        self.steps = self.rows = 0                             # decode forwards so far, and sequences in them

    def new_state(self, cfg) -> dict[str, Tensor]:
        """One row a sequence. n counts its certain tokens; the trunk's cache holds the first n - 1."""
        S, C, m = self.S, self.columns, self.n_draft
        long, real = (dict(dtype=t, device=self.device) for t in (torch.int64, torch.float32))
        w = self.model.lm_head.weight
        return {"tokens": torch.zeros(S, C, **long), "logp": torch.zeros(S, C, **real),
                "u": torch.zeros(S, C, **real), "n": torch.ones(S, **long), "limit": torch.ones(S, **long),
                "stop": torch.full((S, STOPS), -1, **long), "temperature": torch.ones(S, **real),
                "top_p": torch.ones(S, **real), "top_k": torch.zeros(S, **long),
                "h": torch.zeros(S, self.ring, cfg.d_model, dtype=w.dtype, device=self.device),
                "verified": torch.zeros(S, m, **long), "accepted": torch.zeros(S, m, **long)}

    @property
    def active(self) -> int:
        return len(self.decoding) + sum(map(len, self.prefilling))

    @property
    def waiting(self) -> int:
        return len(self.queue)

    def add(self, request: Request) -> None:
        """Queues a request; it enters the batch at a later step. ValueError says what would be right."""
        n, V, name = len(request.prompt), self.model.cfg.vocab_size, f"request {request.id!r}"
        if request.id in self.in_flight:
            raise ValueError(f"{name}: a request with this id is in flight")
        if not 1 <= n < self.max_len:
            raise ValueError(f"{name}: its prompt of {n} tokens should have 1 to max_len - 1 = "
                             f"{self.max_len - 1}")
        r = request
        if r.max_new_tokens < 1 or not r.temperature >= 0 or not 0 < r.top_p <= 1 or r.top_k < 0:
            raise ValueError(f"{name}: max_new_tokens = {r.max_new_tokens} should be >= 1, temperature = "
                             f"{r.temperature} >= 0, top_p = {r.top_p} in (0, 1], top_k = {r.top_k} >= 0")
        if len(request.stop) > STOPS:
            raise ValueError(f"{name}: {len(request.stop)} stop ids should be at most {STOPS}")
        if min(request.prompt) < 0 or max(request.prompt) >= V:
            raise ValueError(f"{name}: its prompt ids should be in 0..{V - 1}")
        if self.size(request) > self.kv_tokens:
            raise ValueError(f"{name}: {self.size(request)} tokens should fit the cache of {self.kv_tokens}")
        self.in_flight.add(request.id)
        self.queue.append(request)

    def size(self, request: Request) -> int:
        """Most cache columns it can ever fill: prompt, answer, and the drafts after its last token."""
        return min(len(request.prompt) + request.max_new_tokens, self.max_len) + self.n_draft

    @torch.no_grad()
    def step(self) -> list[Sample]:
        """One round for everybody: admit, read a chunk of prompts, decode, retire. -> samples that ended."""
        if not self.in_flight:
            return []
        self.tables()
        self.admit()
        if self.prefilling:
            self.prefill()
        if not self.decoding:
            return []
        A, cuda = len(self.decoding), self.device.type == "cuda"
        # torch's products on a CPU need ROWS rows (cache.py): so many sequences of n_draft + 1 tokens
        R = max(A, 1 if self.fast or cuda else -(-ROWS // (self.n_draft + 1)))
        if self.cache.static:
            R = power_of_two(R)                                     # graphs want few sizes
        if R > A:
            self.state["n"][A:R] = 1                                # rows that only make up the number
        self.steps, self.rows = self.steps + 1, self.rows + A
        if cuda:
            return self.retire(self.replay(R)[:A])
        ended, E = self.decode(R)
        samples = [] if ended is None else self.retire(ended[:A])
        if self.n_draft and self.decoding:
            self.draft(0, len(self.decoding), E)
        return samples

    @torch.no_grad()
    def abort(self, id) -> Sample | None:
        """Takes a request out wherever it is. -> what it had generated (finish "abort"), None if not here."""
        for i, request in enumerate(self.decoding):
            if request.id == id:
                sample = self.result(i, "abort")
                self.remove([i])
                return sample
        for group in [self.queue, *self.prefilling]:
            for request in group:
                if request.id == id:
                    self.drop(group, request)
                    none = (0,) * self.n_draft
                    return Sample(id, request.prompt, [], [], "abort", none, none)
        return None

    def drop(self, group, request: Request) -> None:
        """Before its first token. An emptied group keeps its row until prefill closes the gap."""
        leader = group[0] is request
        group.remove(request)
        self.in_flight.discard(request.id)
        if group is self.queue:
            return
        owned = getattr(self.cache, "owned", {})
        if leader and group and owned:
            # its blocks are being read into: they go to the next of the group, whose own are given back
            owned[request.id], owned[group[0].id] = owned[group[0].id], owned[request.id]
        self.cache.free(request.id)

    @torch.no_grad()
    def load(self, state_dict: dict[str, Tensor]) -> None:
        """New weights, copied into the model in place. Sequences in flight go on, on the cache they have."""
        self.model.load_state_dict(state_dict)

    def tables(self) -> None:
        """cos and sin of every position [C,d], again after a change of the RoPE base; fast.py's weights."""
        if self.rope_base != self.model.cfg.rope_base:
            self.rope_base, self.graphs = self.model.cfg.rope_base, {}
            self.cos, self.sin = rope_tables(self.column, self.model.cfg.head_dim, self.rope_base)
        if self.fast:
            self.forward.refresh(self.cos, self.sin)

    # -- prompts

    def admit(self) -> None:
        """Fill free slots in order of arrival; requests with one prompt, an RL group, are read once."""
        if not self.queue:
            return
        free, new = self.slots - self.active, {}
        while free and self.queue and self.cache.can_allocate(self.size(self.queue[0])):
            request = self.queue.popleft()
            self.cache.allocate(request.id, self.size(request))
            new.setdefault(tuple(request.prompt), []).append(request)
            free -= 1
        for prompt, group in new.items():
            # the longest first: whoever inherits its blocks (abort) finds enough of them
            group.sort(key=self.size, reverse=True)
            row = self.S - 1 - len(self.prefilling)
            self.prefilling.append(group)
            self.cache.map_row(row, group[0].id)
            self.state["tokens"][row, :len(prompt)] = torch.tensor(prompt)
            self.arrays["n"][row] = 1                           # while reading: n - 1 tokens are in the cache

    def prefill(self) -> None:
        """
        One chunk of the oldest prompts through the trunk and the MTP layers: all but each prompt's last
        token, which its first decode step takes. Chunks are padded to the longest; what padding writes is
        overwritten before it can be seen.
        """
        self.keep_prefilling([j for j, group in enumerate(self.prefilling) if group])
        want = [len(group[0].prompt) - 1 for group in self.prefilling]
        done = [n - 1 for n in self.arrays["n"][self.S - len(want):].tolist()[::-1]]
        T = B = 0
        for w, r in zip(want, done, strict=True):                 # as many as the budget allows, oldest first
            longest = max(T, min(w - r, self.chunk), ROWS)
            if B and longest * (B + 1) > self.prefill_tokens:
                break
            T, B = longest, B + 1
        if B == 0:
            return
        new = [min(r + T, w) for w, r in zip(want[:B], done[:B], strict=True)]
        if new != done[:B]:
            self.prefill_chunk(done[:B], new, T)
            self.put("n", slice(self.S - B, self.S), [m + 1 for m in new[::-1]])
        self.start_decoding([j for j in range(B) if new[j] == want[j]])

    def prefill_chunk(self, done: list[int], new: list[int], T: int) -> None:
        """Tokens done[j] .. new[j] - 1 of reading[j]'s prompt, as T columns."""
        B, tokens, C = len(done), self.state["tokens"], self.columns
        first = self.S - B
        if self.fast:
            return self.forward.prefill_chunk(first, B, T, new[::-1])
        start = torch.tensor(done[::-1], device=self.device)[:, None]
        positions = (start + self.column[:T]).clamp_max(C - 1)      # [B,T]
        ctx = self.context(first, positions)
        h = self.trunk(tokens[first:].gather(1, positions), ctx)   # [B,T,D]
        if self.n_draft == 0:
            return
        for k in range(self.n_draft):
            # slot p of layer k takes x_{p+k+1}, from the prompt where known; draft() re-runs the last k slots
            ahead = tokens[first:].gather(1, (positions + k + 1).clamp_max(C - 1))
            self.mtp(k, h, ahead, ctx)
        for j in range(B):                                       # the last states of each, not of its padding
            first, end, row = max(new[j] - self.ring, done[j]), new[j], B - 1 - j
            slots = self.column[first:end] % self.ring
            self.state["h"][self.S - B + row, slots] = h[row, first - done[j]:end - done[j]]

    def start_decoding(self, finished: list[int]) -> None:
        """The prompts of reading[j], j in finished, are read: a row in front for each of their requests."""
        if not finished:
            return
        A, s, sources = len(self.decoding), self.state, []
        for j in finished:
            self.decoding += self.prefilling[j]
            sources += [self.S - 1 - j] * len(self.prefilling[j])
        new, rows = self.decoding[A:], slice(A, len(self.decoding))
        self.keep_prefilling([j for j in range(len(self.prefilling)) if j not in set(finished)], sources, new)

        self.put("n", rows, [len(r.prompt) for r in new])
        self.put("limit", rows, [min(len(r.prompt) + r.max_new_tokens, self.max_len) for r in new])
        for name in ("temperature", "top_p", "top_k"):
            self.put(name, rows, [getattr(r, name) for r in new])
        self.put("stop", rows, [[*r.stop, *[-1] * (STOPS - len(r.stop))] for r in new])
        for name in ("verified", "accepted"):
            self.put(name, rows, 0)
        if self.fast:
            for row, r in enumerate(new, A):
                self.forward.uniform(row, len(r.prompt), r.seed)
        else:
            seeds = torch.tensor([[signed64(r.seed)] for r in new], device=self.device)
            s["u"][rows] = uniform(seeds, self.column - s["n"][rows, None])
        for request in new:
            self.modes[sampling_mode(request)] += 1
        if self.n_draft:
            self.draft(A, len(new), 1)

    def put(self, name: str, rows: slice, values) -> None:
        """The state `name` of these rows from a list, or one number for all."""
        array = self.arrays[name]
        array[rows] = torch.tensor(values, dtype=array.dtype) if isinstance(array, Tensor) else values

    def keep_prefilling(self, keep: list[int], sources=(), new=()) -> None:
        """
        Only the groups `keep` go on reading, closed up towards the end of the cache; requests `new`, read in
        rows sources, take the front rows up to A. One rearrangement, for old and new places overlap.
        """
        before, end = len(self.prefilling), self.S - 1
        if len(keep) == before:
            return
        self.prefilling, A = [self.prefilling[j] for j in keep], len(self.decoding)
        targets = [*range(A - len(new), A), *(end - i for i in range(len(keep)))]
        self.compact([*sources, *(end - j for j in keep)], targets,
                     [r.id for r in new] + [group[0].id for group in self.prefilling], ("tokens", "n", "h"))
        for row in range(max(A, end - before + 1), end - len(keep) + 1):
            self.cache.map_row(row, None)

    # -- decoding

    def context(self, first: int, positions: Tensor, write: Tensor | None = None) -> ForwardContext:
        ctx = self.cache.context(first, positions, write)
        ctx.cos, ctx.sin = self.cos[positions], self.sin[positions]           # [B,Q,d]
        return ctx

    def trunk(self, ids: Tensor, ctx: ForwardContext) -> Tensor:
        """ids [B,Q] through the blocks over the cache -> h [B,Q,D] before the final norm."""
        x = self.model.embed_tokens(ids)
        for block, cache in zip(self.model.layers, self.cache.layers, strict=False):
            x = self.block(block, x, ctx, cache)
        return x

    def block(self, block, x: Tensor, ctx: ForwardContext, cache) -> Tensor:
        """x [B,Q,D] through one block and its part of the cache; few rows on a GPU take the fused kernels."""
        cache.ctx = ctx
        if self.cache.static and gemv_applies(block, *x.shape[:2]):
            return block_step(block, x, ctx.cos, ctx.sin, cache)
        return Block.forward(block, x, ctx.cos, ctx.sin, None, cache)

    def mtp(self, k: int, h: Tensor, ahead: Tensor, ctx: ForwardContext) -> Tensor:
        """
        MTP layer k over its own cache -> z [B,Q,D]; h [B,Q,D] from BEFORE the final norm, ahead [B,Q] the tokens k+1
        places after h's.
        """
        layer, cache = self.model.mtp_layers[k], self.cache.layers[self.model.cfg.n_layer + k]
        return self.block(layer, layer.enter(h, self.model.embed_tokens(ahead)), ctx, cache)

    def logits(self, x: Tensor, norm) -> Tensor:
        """The shared head behind the trunk's norm or an MTP layer's. x [B,Q,D] -> fp32 [B Q,n_ids]."""
        (B, Q), x, w = x.shape[:2], x.flatten(0, 1), self.model.lm_head.weight
        if self.cache.static and gemv_applies(self.model.layers[0], B, Q) and len(w) % 16 == 0:
            return gemv(norm(x), [w], dtype=torch.float32)[:, :self.n_ids]
        return F.linear(norm(x), w).float()[:, :self.n_ids]

    def mode(self) -> int:
        """How many of temperature, top_p, top_k this batch's sample_tokens() has to be given."""
        plain, greedy, other = self.modes
        return 3 if other or plain and greedy else 1 if greedy else 0

    def rows_of_state(self, R: int) -> dict[str, Tensor]:
        """Views of the first R rows, kept for as long as R stays."""
        if self.views[0] != R:
            self.views = R, {name: t[:R] for name, t in self.state.items()}
        return self.views[1]

    def decode(self, R: int) -> tuple[Tensor, int]:
        """
        Each of the first R rows: its last certain token and its drafts through the trunk, a token drawn at
        each of these Q = n_draft + 1 places, and as many kept as the drafts before them were right. -> (has
        ended, bool [R]; most tokens a row has gained). The steps below are those of decode_cpu.c too.
        """
        if self.fast:
            return self.forward.decode(R)
        s, Q = self.rows_of_state(R), self.n_draft + 1
        n = s["n"]
        positions = n[:, None] - 1 + self.column[:Q]                # [R,Q]
        ids = s["tokens"].gather(1, positions)
        h = self.trunk(ids, self.context(0, positions))                # [R,Q,D]
        names = ("temperature", "top_p", "top_k")[:self.mode()]
        settings = [s[name].repeat_interleave(Q) if Q > 1 else s[name] for name in names]
        places = positions + 1
        u = s["u"].gather(1, places).flatten()
        drawn, logp = (t.view(R, Q) for t in sample_tokens(self.logits(h, self.model.norm), u, *settings))
        s["tokens"].scatter_(1, places, drawn)
        s["logp"].scatter_(1, places, logp)
        is_stop = (drawn[:, :, None] == s["stop"][:, None, :]).any(-1)          # [R,Q]
        if Q == 1:
            n += 1
            return (n >= s["limit"]) | is_stop[:, 0], 1
        # kept: the accepted drafts and one token more, but nothing after a stop token or past the limit
        n_accepted = self.accept(ids[:, 1:], drawn)                      # [R] drafts that were right, in a row
        to_stop = (is_stop.cumsum(1) == 0).sum(1)                   # [R] tokens before the first stop token
        n_committed = torch.minimum(torch.minimum(n_accepted, to_stop) + 1, s["limit"] - n).clamp(1, Q)
        # draft k was verified at if its place's token was kept, and it existed (not after a 1-token prompt)
        k = self.column[:self.n_draft]
        verified = (k < n_committed[:, None]) & (n > 1)[:, None]
        s["verified"] += verified
        s["accepted"] += verified & (k < n_accepted[:, None])
        s["h"].scatter_(1, (positions % self.ring)[..., None].expand_as(h), h)
        n += n_committed
        return (n >= s["limit"]) | (n_committed == to_stop + 1), Q if self.cache.static else int(n_committed.max())

    def draft(self, first: int, B: int, E: int) -> None:
        """
        New drafts after the last certain token x_{n-1}: layer k reads (h_{n-2}, x_{n-1+k}) and writes draft
        x_{n+k}. Each layer is run, with the true hidden states from the ring, on all slots that became certain (E at
        most), and again on those where it had read a draft that was rejected: the k before the newest, if the round
        kept one token, and fewer by one with each token more. So its cache keeps nothing of a rejected draft. One
        window for all layers, W = max(E, n_draft):

            slots   n-1-W ............ n-3  n-2                   slot p of layer k takes the token x_{p+k+1}
        """
        if self.fast:
            return self.forward.draft(first, B, E)
        rows, s, W = slice(first, first + B), self.state, max(E, self.n_draft)
        n, tokens = s["n"][rows, None], s["tokens"][rows]
        slots = n - 1 + self.column[:W] - W                         # [B,W], the last one is n-2
        real = slots.clamp_min(0)
        ctx = self.context(first, real, torch.where(slots < 0, self.columns - 1, real))
        ring = (real % self.ring)[..., None].expand(-1, -1, self.model.cfg.d_model)
        h = s["h"][rows].gather(1, ring)                            # [B,W,D]
        for k, layer in enumerate(self.model.mtp_layers[:self.n_draft]):
            z = self.mtp(k, h, tokens.gather(1, real + k + 1), ctx)                    # [B,W,D]
            tokens.scatter_(1, n + k, self.logits(z[:, -1:], layer.final_layernorm).argmax(-1, keepdim=True))

    def replay(self, R: int) -> Tensor:
        """decode() and draft() as one CUDA graph per number of rows (a power of two) and kind of sampling."""
        key = R, self.mode()
        if key not in self.graphs:
            def work():
                ended, _ = self.decode(R)
                if self.n_draft:
                    self.draft(0, R, self.n_draft + 1)
                return ended
            saved = {name: t.clone() for name, t in self.state.items()}       # trial runs must leave no trace
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: the trainer's thread may be using the GPU meanwhile (rl.py, max_staleness = 1)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                ended = work()
            for name, t in saved.items():
                self.state[name].copy_(t)
            self.graphs[key] = graph, ended
        graph, ended = self.graphs[key]
        graph.replay()
        return ended

    # -- the end of a sequence

    def result(self, i: int, finish: str | None = None) -> Sample:
        """Row i's tokens so far; finish None: it has ended by itself."""
        s, r = self.arrays, self.decoding[i]
        new = slice(len(r.prompt), int(s["n"][i]))
        tokens = s["tokens"][i, new].tolist()
        return Sample(r.id, r.prompt, tokens, s["logp"][i, new].tolist(),
                      finish or ("stop" if tokens[-1] in r.stop else "length"),
                      tuple(s["verified"][i].tolist()), tuple(s["accepted"][i].tolist()))

    def retire(self, ended: Tensor) -> list[Sample]:
        rows = [i for i, over in enumerate(ended.tolist()) if over]
        samples = [self.result(i) for i in rows]
        self.remove(rows)
        return samples

    def remove(self, rows: list[int]) -> None:
        """Rows leave the decoding part; the last of those that stay move into the holes."""
        if not rows:
            return
        gone, A = set(rows), len(self.decoding)
        for i in rows:
            self.in_flight.discard(self.decoding[i].id)
            self.cache.free(self.decoding[i].id)
            self.modes[sampling_mode(self.decoding[i])] -= 1
        holes = [i for i in rows if i < A - len(rows)]
        movers = [i for i in range(A - len(rows), A) if i not in gone]
        for i, j in zip(movers, holes, strict=True):
            self.decoding[j] = self.decoding[i]
        del self.decoding[A - len(rows):]
        self.compact(movers, holes, [self.decoding[j].id for j in holes], tuple(self.state))
        for i in range(A - len(rows), A):
            self.cache.map_row(i, None)

    def compact(self, sources: list[int], targets: list[int], keys: list, names: tuple[str, ...]) -> None:
        """
        Row targets[x] becomes that of request keys[x] and takes over the state `names` and the cached tokens of row
        sources[x]; everything is read before anything is written.
        """
        if not sources:
            return
        held = self.cache.hold(sources)
        for row, key in zip(targets, keys, strict=True):
            self.cache.map_row(row, key)
        self.cache.copy(held, targets, min(int(self.arrays["n"][sources].max()) + self.n_draft, self.columns))
        if isinstance(self.arrays["n"], Tensor):
            sources, targets = (torch.tensor(rows, device=self.device) for rows in (sources, targets))
        for name in names:
            self.arrays[name][targets] = self.arrays[name][sources]


def generate(engine: Engine, requests: list[Request]) -> list[Sample]:
    """Runs requests to the end -> samples in the order of the requests."""
    for request in requests:
        engine.add(request)
    done = {}
    while len(done) < len(requests):
        done |= {s.id: s for s in engine.step()}
    return [done[r.id] for r in requests]
