"""
The inference engine: continuous batching, chunked prefill, one KV cache, sampling per request, and speculative decoding
with the MTP layers (report 2.2, 3.4).

    engine = Engine(model, slots=128, max_len=256, n_draft=3)
    engine.add(Request(id=0, prompt=ids, max_new_tokens=64, temperature=0.6, top_p=0.95, stop=(eos,), seed=1))
    while engine.active or engine.waiting:
        for sample in engine.step():
            print(sample.tokens, sample.logprobs, sample.finish)

One step, in the order of Engine.step:

    admit     requests from the queue take free slots, and memory in the KV cache (cache.py)
    prefill   one chunk of the new prompts goes through the model, which fills the KV cache
    decode    one forward over the last committed token and the drafts of every sequence verifies the drafts:
              a token is sampled at each position, drafts that equal it are accepted, the result is committed
    retire    sequences that have ended leave, and become Samples
    draft     the MTP layers write n_draft new draft tokens behind the last committed token

A sequence is one row of the KV cache and of the state. Rows are kept compact, so that a batch is always one view:

    row    0 .............. A-1 | A ........ S-P-1 | S-P ............. S-1
           A sequences decode   | free             | P prompts are prefilled

Prefilled rows are copied to the front when their prompt is done, once per request: the samples of one prompt (a GRPO
group) prefill it once.

Letters: S rows in all, A of them decode; R rows go through a forward: these A, and rows that only fill up the
batch; Q = n_draft + 1 positions of each; C columns; E, the most tokens that one sequence has just committed.

THE SAME REQUEST GIVES THE SAME TOKENS whatever runs beside it, with or without speculation: in fp32 on a CPU bit for
bit, log-probs too. cache.py says which products are safe. Each token has its own random number, a hash of the request's
seed and the token's index, so no generator has a state.

SPECULATION IS EXACT in the strongest sense. Drafts are greedy, so their distribution q is one-hot. Then the rule of
Leviathan et al., "keep draft x with probability p(x), else sample from p without x", has the same law as: sample the
token from p with the random number it would have used anyway, and accept the draft if it equals that token. One rule
serves greedy and sampled requests, and not only the distribution but the text itself is what it would be without MTP.

Where the forward runs: on a CPU in C (kernels/cpu/decode.py), on a GPU in a CUDA graph. Engine(plain=True), the flag
--plain of the scripts, runs the torch code below instead: the path to read, and to put a breakpoint in.

Differs from the report, which patches vLLM: all MTP layers draft, in parallel form, each with a KV cache of its own.
Numbers to expect: docs/engine.md. Tests: tests/test_engine.py.
"""
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from cache import MIN_ROWS, Blocks, ForwardContext, PackedRows, Rows
from kernels.cpu.decode import CpuForward, library, up16
from kernels.gemv import block_step, gemv, gemv_applies
from model import Block, MiMo, ModelConfig
from mtp import accept_matching
from sampling import sample_tokens, signed64, uniform

MAX_STOPS = 8                                       # most stop ids of a request
SOFTMAX, GREEDY, FILTERED = range(3)                # sampling modes


@dataclass(frozen=True)
class Request:
    """One prompt to be continued, and how."""
    id: object                      # any hashable, unique among the requests in flight
    prompt: list[int]               # token ids, at least one
    max_new_tokens: int             # most tokens to generate, the stop token included
    temperature: float = 1.0        # 0 = greedy
    top_p: float = 1.0              # sample from the smallest set of most likely tokens with at least this mass
    top_k: int = 0                  # sample from the k most likely tokens, 0 = all
    stop: tuple[int, ...] = ()      # ids that end the sample; the id itself is kept
    seed: int = 0                   # with the token's index it decides the random number; any 64-bit integer


@dataclass(frozen=True)
class Sample:
    """What became of a request."""
    id: object                      # the request's
    prompt: list[int]               # the request's
    tokens: list[int]               # generated ids, the stop token included
    logprobs: list[float]           # ln of the probability each token was sampled with (greedy: at temperature 1)
    finish: str                     # "stop" | "length" (max_new_tokens, or the engine's max_len) | "abort"
    verified: tuple[int, ...] = ()  # per MTP layer: its drafts that were verified (all drafts before them accepted)
    accepted: tuple[int, ...] = ()  # per MTP layer: of these, the drafts that equalled the sampled token


def sampling_mode(r: Request) -> int:
    """SOFTMAX: temperature 1, nothing cut. GREEDY: temperature 0. FILTERED: all else that sample_tokens() can do."""
    if r.temperature == 0:
        return GREEDY
    return FILTERED if r.temperature != 1 or r.top_p < 1 or r.top_k > 0 else SOFTMAX


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


# ---- the engine -----------------------------------------------------------------------------------------------------

class Engine:
    """
    Continuous batching over one model. ValueError for options that cannot work.

    model           a MiMo, shared with its owner; only load() writes to it
    slots           most sequences in flight
    max_len         longest prompt + answer, tokens
    n_draft         MTP layers that draft, 0 = no speculation
    chunk           prefill: most prompt tokens per sequence and step
    prefill_tokens  prefill: most prompt tokens per step over all sequences
    layout          "rows" or "blocks" of cache.py, None = rows on a CPU, blocks on a GPU
    kv_tokens       blocks: tokens that the cache holds, None = room for `slots` sequences of max_len
    block           blocks: tokens per block
    plain           run the torch code of this file, no C and no CUDA graph; None = kernels.is_plain()
    n_ids           rows of lm_head that are tokens (tokenizer.n_ids); the rest is padding and never sampled; None = all
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
        self.chunk, self.device = max(chunk, MIN_ROWS), w.device
        self.prefill_tokens = max(prefill_tokens, chunk, MIN_ROWS)
        self.plain = kernels.is_plain() if plain is None else plain
        # Extra rows: matmuls on a CPU need >= 4 rows to be batch-invariant (cache.py), and with blocks a batch is
        # filled up to a power of two, which must not reach the rows that prefill. Extra columns: room for drafts, plus
        # one trash column for padded positions.
        extra_rows = MIN_ROWS if layout == "rows" else max(MIN_ROWS, power_of_two(slots) // 2)
        self.S, columns = slots + extra_rows, max_len + n_draft + 2
        c_applies = layout == "rows" and w.dtype == torch.float32 and w.device.type == "cpu" and not self.plain
        lib = library() if c_applies else None
        K, d = cfg.n_kv_head, up16(cfg.head_dim) if lib else cfg.head_dim
        shape = cfg.n_layer + n_draft, self.S, K, cfg.n_head // K, columns, d
        if layout == "rows":
            self.cache = (PackedRows if lib else Rows)(*shape, w.dtype, w.device)
            self.blocks, self.kv_tokens = None, slots * columns     # a free row always has room
        else:
            if n_draft > 7:
                raise ValueError(f"n_draft = {n_draft} should be at most 7: kernels.decode takes 8 tokens")
            self.kv_tokens = kv_tokens or slots * (max_len + n_draft + block)
            self.cache = self.blocks = Blocks(*shape, w.dtype, w.device, block, self.kv_tokens // block)
        self.arange, self.columns = self.cache.arange, self.cache.columns
        self.fused = self.cache.static_shapes and not self.plain     # few rows on a GPU take the kernels of gemv.py
        self.ring = 4 * (n_draft + 1)               # trunk states kept per sequence, for the MTP layers
        self.state, self.views = self.new_state(cfg), (0, {})
        # on a CPU the same memory through NumPy, where reading or writing a few numbers costs a tenth
        numpy = w.device.type == "cpu" and w.dtype != torch.bfloat16
        self.arrays = {name: t.numpy() if numpy else t for name, t in self.state.items()}
        self.c = CpuForward(model, n_draft, self.cache, self.state, lib, self.n_ids, self.prefill_tokens) \
            if lib else None                        # the forward in C, or None: the torch code below
        self.queue: deque[Request] = deque()
        self.decoding: list[Request] = []           # row i decodes decoding[i]
        self.prefilling: list[list[Request]] = []   # requests with one prompt, a group; group j prefills in row S-1-j
        self.in_flight: set = set()                 # ids of all requests here
        self.modes = [0, 0, 0]                      # how many decoding requests have each sampling mode
        self.rope_base, self.graphs = None, {}
        self.steps = self.sequence_steps = 0        # decode steps so far; sequences decoded, summed over the steps

    def new_state(self, cfg: ModelConfig) -> dict[str, Tensor]:
        """
        Tensors with one row per sequence. n counts the committed tokens of a sequence, prompt included; the KV cache of
        the trunk holds the first n - 1. tokens, logp, u [S,columns] by position in the text; drafts stand behind the
        committed tokens. h is a ring of trunk states: the state of position p is in h[row, p % ring].
        """
        S, C, m = self.S, self.columns, self.n_draft
        long, real = (dict(dtype=t, device=self.device) for t in (torch.int64, torch.float32))
        w = self.model.lm_head.weight
        return {"tokens": torch.zeros(S, C, **long), "logp": torch.zeros(S, C, **real),
                "u": torch.zeros(S, C, **real), "n": torch.ones(S, **long), "limit": torch.ones(S, **long),
                "stop": torch.full((S, MAX_STOPS), -1, **long), "temperature": torch.ones(S, **real),
                "top_p": torch.ones(S, **real), "top_k": torch.zeros(S, **long),
                "h": torch.zeros(S, self.ring, cfg.d_model, dtype=w.dtype, device=self.device),
                "verified": torch.zeros(S, m, **long), "accepted": torch.zeros(S, m, **long)}

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return len(self.decoding) + sum(map(len, self.prefilling))

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self.queue)

    @property
    def room(self) -> int:
        """How many more requests could start now."""
        return max(0, self.slots - self.active - self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request; a later step admits it. ValueError says what would be right."""
        n, V, name = len(request.prompt), self.model.cfg.vocab_size, f"request {request.id!r}"
        if request.id in self.in_flight:
            raise ValueError(f"{name}: a request with this id is in flight")
        if not 1 <= n < self.max_len:
            raise ValueError(f"{name}: its prompt of {n} tokens should have 1 to max_len - 1 = {self.max_len - 1}")
        r = request
        if r.max_new_tokens < 1 or not r.temperature >= 0 or not 0 < r.top_p <= 1 or r.top_k < 0:
            raise ValueError(f"{name}: max_new_tokens = {r.max_new_tokens} should be >= 1, temperature = "
                             f"{r.temperature} >= 0, top_p = {r.top_p} in (0, 1], top_k = {r.top_k} >= 0")
        if len(request.stop) > MAX_STOPS:
            raise ValueError(f"{name}: {len(request.stop)} stop ids should be at most {MAX_STOPS}")
        if min(request.prompt) < 0 or max(request.prompt) >= V:
            raise ValueError(f"{name}: its prompt ids should be in 0..{V - 1}")
        if self.max_columns(request) > self.kv_tokens:
            raise ValueError(f"{name}: {self.max_columns(request)} tokens should fit the cache of {self.kv_tokens}")
        self.in_flight.add(request.id)
        self.queue.append(request)

    def max_columns(self, request: Request) -> int:
        """Most cache columns that a request can fill: prompt, answer, and the drafts behind its last token."""
        return min(len(request.prompt) + request.max_new_tokens, self.max_len) + self.n_draft

    @torch.no_grad()
    def step(self) -> list[Sample]:
        """Admit, prefill, decode, retire, draft: one step for every request in flight. -> samples that have ended."""
        if not self.in_flight:
            return []
        self.refresh()
        self.admit()
        if self.prefilling:
            self.prefill()
        if not self.decoding:
            return []
        A, cuda = len(self.decoding), self.device.type == "cuda"
        # torch's products on a CPU need MIN_ROWS rows (cache.py); a sequence brings n_draft + 1 of them
        R = max(A, 1 if self.c or cuda else -(-MIN_ROWS // (self.n_draft + 1)))
        if self.cache.static_shapes:
            R = power_of_two(R)                                     # CUDA graphs: few different batch sizes
        if R > A:
            self.state["n"][A:R] = 1                                # rows that only fill up the batch
        self.steps, self.sequence_steps = self.steps + 1, self.sequence_steps + A
        if cuda and not self.plain:
            return self.retire(self.replay(R)[:A])
        ended, E = self.decode(R)
        samples = [] if ended is None else self.retire(ended[:A])
        if self.n_draft and self.decoding:
            self.draft(0, len(self.decoding), E)
        return samples

    @torch.no_grad()
    def abort(self, id: object) -> Sample | None:
        """Take a request out, wherever it is. -> what it has generated (finish "abort"), None if it is not here."""
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
        """
        Take a request out of the queue or of a prefilling group. A group that is empty then keeps its row until the
        next call of prefill().
        """
        leader = group[0] is request
        group.remove(request)
        self.in_flight.discard(request.id)
        if group is self.queue or not self.blocks:
            return
        if leader and group:
            # prefill fills the leader's blocks: the next request of the group takes them over, its own are freed
            owned = self.blocks.owned
            owned[request.id], owned[group[0].id] = owned[group[0].id], owned[request.id]
        self.blocks.free(request.id)

    @torch.no_grad()
    def load(self, state_dict: dict[str, Tensor]) -> None:
        """
        New weights, copied into the model in place. Sequences in flight go on with the KV cache they have. Give the
        model's own state_dict after an update by a fused optimizer, whose writes torch does not count (kernels.cpu).
        """
        self.model.load_state_dict(state_dict)

    def refresh(self) -> None:
        """cos, sin [C,d] of all positions, made again when the RoPE base has changed; the weights that C has packed."""
        if self.rope_base != self.model.cfg.rope_base:
            self.rope_base, self.graphs = self.model.cfg.rope_base, {}
            self.cos, self.sin = self.model.rope_at(None, self.arange)
        if self.c:
            self.c.refresh(self.cos, self.sin)

    # ---- prefill ----------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Fill free slots in order of arrival. Requests with one prompt that are admitted together form one group."""
        if not self.queue:
            return
        free, new = self.slots - self.active, {}
        while free and self.queue:
            request = self.queue[0]
            if self.blocks and not self.blocks.allocate(request.id, self.max_columns(request)):
                break
            self.queue.popleft()
            new.setdefault(tuple(request.prompt), []).append(request)
            free -= 1
        for prompt, group in new.items():
            # the longest first: whoever takes over its blocks (drop) finds enough of them
            group.sort(key=self.max_columns, reverse=True)
            row = self.S - 1 - len(self.prefilling)
            self.prefilling.append(group)
            if self.blocks:
                self.blocks.map_row(row, group[0].id)
            self.state["tokens"][row, :len(prompt)] = torch.tensor(prompt)
            self.arrays["n"][row] = 1                               # n - 1 tokens are in the cache: none yet

    def prefill(self) -> None:
        """
        Chunked prefill: the next chunk of the oldest prompts through the trunk and the MTP layers, which fills the KV
        cache. A prompt's last token is left out: it goes through the model in the sequence's first decode step. Chunks
        are padded to the longest of the batch; what the padding writes is overwritten before any token sees it.
        """
        self.keep_prefilling([j for j, group in enumerate(self.prefilling) if group])      # aborted groups leave
        goal = [len(group[0].prompt) - 1 for group in self.prefilling]
        done = [n - 1 for n in self.arrays["n"][self.S - len(goal):].tolist()[::-1]]       # tokens in the cache
        T = B = 0                                                   # chunk length, and prompts that fit prefill_tokens
        for n, n_done in zip(goal, done, strict=True):
            longest = max(T, min(n - n_done, self.chunk), MIN_ROWS)
            if B and longest * (B + 1) > self.prefill_tokens:
                break
            T, B = longest, B + 1
        if B == 0:
            return
        end = [min(n_done + T, n) for n, n_done in zip(goal[:B], done[:B], strict=True)]
        if end != done[:B]:
            self.prefill_chunk(done[:B], end, T)
            self.put("n", slice(self.S - B, self.S), [n + 1 for n in end[::-1]])
        self.start_decoding([j for j in range(B) if end[j] == goal[j]])

    def prefill_chunk(self, done: list[int], end: list[int], T: int) -> None:
        """Tokens done[j] .. end[j] - 1 of the prompt of prefilling[j], padded to T, into the KV cache."""
        B, tokens, C = len(done), self.state["tokens"], self.columns
        first = self.S - B
        if self.c:
            return self.c.prefill_chunk(first, B, T, end[::-1])
        start = torch.tensor(done[::-1], device=self.device)[:, None]
        positions = (start + self.arange[:T]).clamp_max(C - 1)      # [B,T]
        ctx = self.context(first, positions)
        h = self.trunk(tokens[first:].gather(1, positions), ctx)    # [B,T,D]
        if self.n_draft == 0:
            return
        for k in range(self.n_draft):
            # position p of layer k takes x_{p+k+1} where the prompt has it; draft() computes the last k positions again
            ahead = tokens[first:].gather(1, (positions + k + 1).clamp_max(C - 1))
            self.mtp(k, h, ahead, ctx)
        for j in range(B):                                          # the last real states of each prompt into its ring
            low, row = max(end[j] - self.ring, done[j]), B - 1 - j
            places = self.arange[low:end[j]] % self.ring
            self.state["h"][first + row, places] = h[row, low - done[j]:end[j] - done[j]]

    def start_decoding(self, finished: list[int]) -> None:
        """
        The prompts of the groups prefilling[j], j in `finished`, are in the cache: a decoding row for each request of
        these groups, its sampling state, and its first drafts.
        """
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
        self.put("stop", rows, [[*r.stop, *[-1] * (MAX_STOPS - len(r.stop))] for r in new])
        for name in ("verified", "accepted"):
            self.put(name, rows, 0)
        if self.c:
            for row, r in enumerate(new, A):
                self.c.uniform(row, len(r.prompt), r.seed)
        else:
            seeds = torch.tensor([[signed64(r.seed)] for r in new], device=self.device)
            s["u"][rows] = uniform(seeds, self.arange - s["n"][rows, None])
        for request in new:
            self.modes[sampling_mode(request)] += 1
        if self.n_draft:
            self.draft(A, len(new), 1)

    def put(self, name: str, rows: slice, values: list | int) -> None:
        """state[name] of these rows = a list with a value per row, or one number for all."""
        array = self.arrays[name]
        array[rows] = torch.tensor(values, dtype=array.dtype) if isinstance(array, Tensor) else values

    def keep_prefilling(self, keep: list[int], sources: Sequence[int] = (), new: Sequence[Request] = ()) -> None:
        """
        Only the groups `keep` go on prefilling; their rows close up towards the end of the cache. The requests `new`,
        prefilled in rows `sources`, get the last decoding rows. All in one compact(), because old and new rows overlap.
        """
        before, last = len(self.prefilling), self.S - 1
        if len(keep) == before:
            return
        self.prefilling, A = [self.prefilling[j] for j in keep], len(self.decoding)
        targets = [*range(A - len(new), A), *(last - i for i in range(len(keep)))]
        self.compact([*sources, *(last - j for j in keep)], targets,
                     [r.id for r in new] + [group[0].id for group in self.prefilling], ("tokens", "n", "h"))
        for row in range(max(A, last - before + 1), last - len(keep) + 1) if self.blocks else ():
            self.blocks.map_row(row, None)

    # ---- one forward over the KV cache ------------------------------------------------------------------------------

    def context(self, first: int, positions: Tensor, columns: Tensor | None = None) -> ForwardContext:
        """The context of a forward over rows first and on; positions [B,Q]; columns [B,Q] to fill, if not the same."""
        return self.cache.context(first, positions, self.cos[positions], self.sin[positions], columns)

    def trunk(self, ids: Tensor, ctx: ForwardContext) -> Tensor:
        """ids [B,Q] through all blocks over the KV cache -> h [B,Q,D] before the final norm."""
        x = self.model.embed_tokens(ids)
        for block, layer_cache in zip(self.model.layers, self.cache.layers, strict=False):
            x = self.block(block, x, ctx, layer_cache)
        return x

    def block(self, block: Block, x: Tensor, ctx: ForwardContext, layer_cache) -> Tensor:
        """x [B,Q,D] through one block and its layer of the KV cache."""
        layer_cache.ctx = ctx
        if self.fused and gemv_applies(block, *x.shape[:2]):
            return block_step(block, x, ctx.cos, ctx.sin, layer_cache)
        return Block.forward(block, x, ctx.cos, ctx.sin, None, layer_cache)

    def mtp(self, k: int, h: Tensor, ahead: Tensor, ctx: ForwardContext) -> Tensor:
        """
        MTP layer k over its own KV cache: h [B,Q,D] from BEFORE the final norm, ahead [B,Q] the tokens k + 1 positions
        after h's. -> z [B,Q,D] before the layer's own final norm.
        """
        layer, layer_cache = self.model.mtp_layers[k], self.cache.layers[self.model.cfg.n_layer + k]
        return self.block(layer, layer.enter(h, self.model.embed_tokens(ahead)), ctx, layer_cache)

    def logits(self, x: Tensor, norm: nn.Module) -> Tensor:
        """lm_head(norm(x)), norm the trunk's or an MTP layer's: x [B,Q,D] -> fp32 [B*Q,n_ids]."""
        (B, Q), x, w = x.shape[:2], x.flatten(0, 1), self.model.lm_head.weight
        if self.fused and gemv_applies(self.model.layers[0], B, Q) and len(w) % 16 == 0:
            return gemv(norm(x), [w], dtype=torch.float32)[:, :self.n_ids]
        return F.linear(norm(x), w).float()[:, :self.n_ids]

    # ---- decode: verify, accept, commit; then draft -----------------------------------------------------------------

    def sampling_arguments(self) -> tuple[str, ...]:
        """Which of temperature, top_p and top_k sample_tokens() needs for the sequences that decode now."""
        if self.modes[FILTERED] or self.modes[SOFTMAX] and self.modes[GREEDY]:
            return "temperature", "top_p", "top_k"
        return ("temperature",) if self.modes[GREEDY] else ()

    def rows_of_state(self, R: int) -> dict[str, Tensor]:
        """Views of the first R rows of the state, kept for as long as R stays the same."""
        if self.views[0] != R:
            self.views = R, {name: t[:R] for name, t in self.state.items()}
        return self.views[1]

    def decode(self, R: int) -> tuple[Tensor | None, int]:
        """
        Verify, accept and commit, for each of the first R rows: the last committed token and its drafts go through the
        trunk in one forward, Q = n_draft + 1 positions; a token is sampled at each of them; drafts are accepted while
        they equal the sampled tokens; the accepted drafts and one more sampled token are committed.

        -> (has the sequence ended, bool [R], or None if none has; most tokens that a row has committed).
        decode() in kernels/cpu/decode_cpu.c takes the same steps.
        """
        if self.c:
            return self.c.decode(R)
        s, Q = self.rows_of_state(R), self.n_draft + 1
        n = s["n"]
        positions = n[:, None] - 1 + self.arange[:Q]                # [R,Q]
        ids = s["tokens"].gather(1, positions)                      # x_{n-1} and the drafts
        h = self.trunk(ids, self.context(0, positions))             # [R,Q,D]

        # verify: sample the token that follows each position, with that token's own random number
        arguments = [s[name].repeat_interleave(Q) if Q > 1 else s[name] for name in self.sampling_arguments()]
        targets = positions + 1
        u = s["u"].gather(1, targets).flatten()
        sampled, logp = (t.view(R, Q) for t in sample_tokens(self.logits(h, self.model.norm), u, *arguments))
        s["tokens"].scatter_(1, targets, sampled)
        s["logp"].scatter_(1, targets, logp)
        is_stop = (sampled[:, :, None] == s["stop"][:, None, :]).any(-1)        # [R,Q]
        if Q == 1:
            n += 1
            return (n >= s["limit"]) | is_stop[:, 0], 1

        # accept, commit: the accepted drafts and one token more, but nothing after a stop token or past the limit
        n_accepted = accept_matching(ids[:, 1:], sampled)             # [R]
        to_stop = (is_stop.cumsum(1) == 0).sum(1)                   # [R] tokens before the first stop token
        n_committed = torch.minimum(torch.minimum(n_accepted, to_stop) + 1, s["limit"] - n).clamp(1, Q)
        # draft k was verified if its position was committed, and if it existed: after a prompt of one token it does not
        k = self.arange[:self.n_draft]
        verified = (k < n_committed[:, None]) & (n > 1)[:, None]
        s["verified"] += verified
        s["accepted"] += verified & (k < n_accepted[:, None])
        s["h"].scatter_(1, (positions % self.ring)[..., None].expand_as(h), h)
        n += n_committed
        return (n >= s["limit"]) | (n_committed == to_stop + 1), \
            Q if self.cache.static_shapes else int(n_committed.max())

    def draft(self, first: int, B: int, E: int) -> None:
        """
        New drafts for rows first .. first + B - 1, behind the last committed token x_{n-1}. The state of x_{n-1} is not
        known yet, so all layers start from position n-2, one after the other:

                    layer 0        layer 1          layer 2
            reads   h_{n-2}        h_{n-2}          h_{n-2}         the same trunk state: the layers are parallel
            and     x_{n-1}        draft of x_n     draft of x_{n+1}
            writes  draft of x_n   draft of x_{n+1} draft of x_{n+2}

        Recompute the last W = max(E, n_draft) positions of every MTP layer: the E tokens just committed (at most), plus
        positions whose inputs were drafts that were rejected. One window serves all layers; the trunk states come from
        the ring, and nothing of a rejected draft stays in a KV cache.

            positions   n-1-W ... n-3  n-2          position p of layer k reads h_p and the token x_{p+k+1}
        """
        if self.c:
            return self.c.draft(first, B, E)
        rows, s, W = slice(first, first + B), self.state, max(E, self.n_draft)
        n, tokens = s["n"][rows, None], s["tokens"][rows]
        positions = n - 1 + self.arange[:W] - W                     # [B,W], the last one is n-2
        real = positions.clamp_min(0)
        # a position before the text begins writes into the trash column
        ctx = self.context(first, real, torch.where(positions < 0, self.columns - 1, real))
        ring = (real % self.ring)[..., None].expand(-1, -1, self.model.cfg.d_model)
        h = s["h"][rows].gather(1, ring)                            # [B,W,D]
        for k, layer in enumerate(self.model.mtp_layers[:self.n_draft]):
            z = self.mtp(k, h, tokens.gather(1, real + k + 1), ctx)                    # [B,W,D]
            tokens.scatter_(1, n + k, self.logits(z[:, -1:], layer.final_layernorm).argmax(-1, keepdim=True))

    def replay(self, R: int) -> Tensor:
        """decode() and draft() as one CUDA graph, captured once per batch size R and set of sampling arguments."""
        key = R, self.sampling_arguments()
        if key not in self.graphs:
            def work() -> Tensor:
                ended, _ = self.decode(R)
                if self.n_draft:
                    self.draft(0, R, self.n_draft + 1)
                return ended
            saved = {name: t.clone() for name, t in self.state.items()}       # the trial runs must leave no trace
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: the trainer's thread may be using the GPU at the same time (rl.py, max_staleness = 1)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                ended = work()
            for name, t in saved.items():
                self.state[name].copy_(t)
            self.graphs[key] = graph, ended
        graph, ended = self.graphs[key]
        graph.replay()
        return ended

    # ---- the end of a sequence --------------------------------------------------------------------------------------

    def result(self, i: int, finish: str | None = None) -> Sample:
        """The sample in decoding row i as it is now. finish None: the sequence has ended by itself."""
        s, r = self.arrays, self.decoding[i]
        new = slice(len(r.prompt), int(s["n"][i]))
        tokens = s["tokens"][i, new].tolist()
        return Sample(r.id, r.prompt, tokens, s["logp"][i, new].tolist(),
                      finish or ("stop" if tokens[-1] in r.stop else "length"),
                      tuple(s["verified"][i].tolist()), tuple(s["accepted"][i].tolist()))

    def retire(self, ended: Tensor) -> list[Sample]:
        """ended bool [A]. -> the samples of these rows, which leave the batch."""
        rows = [i for i, has_ended in enumerate(ended.tolist()) if has_ended]
        samples = [self.result(i) for i in rows]
        self.remove(rows)
        return samples

    def remove(self, rows: list[int]) -> None:
        """Decoding rows leave and their memory is freed; the last of the rows that stay move into the holes."""
        if not rows:
            return
        gone, A = set(rows), len(self.decoding)
        for i in rows:
            self.in_flight.discard(self.decoding[i].id)
            if self.blocks:
                self.blocks.free(self.decoding[i].id)
            self.modes[sampling_mode(self.decoding[i])] -= 1
        holes = [i for i in rows if i < A - len(rows)]
        movers = [i for i in range(A - len(rows), A) if i not in gone]
        for i, j in zip(movers, holes, strict=True):
            self.decoding[j] = self.decoding[i]
        del self.decoding[A - len(rows):]
        self.compact(movers, holes, [self.decoding[j].id for j in holes], tuple(self.state))
        for i in range(A - len(rows), A) if self.blocks else ():
            self.blocks.map_row(i, None)

    def compact(self, sources: list[int], targets: list[int], keys: list, names: tuple[str, ...]) -> None:
        """
        Move rows: row targets[x] becomes that of request keys[x], and takes the state `names` and the cached tokens of
        row sources[x]. Everything is read before anything is written.
        """
        if not sources:
            return
        found = self.blocks.locate(sources) if self.blocks else sources
        for row, key in zip(targets, keys, strict=True) if self.blocks else ():
            self.blocks.map_row(row, key)
        self.cache.copy(found, targets, min(int(self.arrays["n"][sources].max()) + self.n_draft, self.columns))
        if isinstance(self.arrays["n"], Tensor):
            sources, targets = (torch.tensor(rows, device=self.device) for rows in (sources, targets))
        for name in names:
            self.arrays[name][targets] = self.arrays[name][sources]


def generate(engine: Engine, requests: list[Request]) -> list[Sample]:
    """Run all requests to their end -> their samples, in the order of the requests."""
    for request in requests:
        engine.add(request)
    done = {}
    while len(done) < len(requests):
        done |= {s.id: s for s in engine.step()}
    return [done[r.id] for r in requests]
