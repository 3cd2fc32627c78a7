"""
The inference engine: continuous batching, chunked prefill, a paged KV cache, sampling per request, and speculative
decoding with the MTP layers (report 2.2, 3.4).

    engine = Engine(model, slots=128, max_len=256, n_draft=3)
    engine.add(Request(id=0, prompt=ids, max_new_tokens=64, temperature=0.6, top_p=0.95, stop=(eos,), seed=1))
    while engine.active or engine.waiting:
        for sample in engine.step():
            print(sample.tokens, sample.logprobs, sample.finish)

Three roles. The Engine of this file schedules: it decides which sequences run. The block manager (cache.py) knows which
blocks of the KV cache belong to which sequence. A runner (runner.py) does the forward passes: TorchRunner, GraphRunner
or CpuRunner. One step, in the order of Engine.step:

    schedule  running sequences get the blocks that they will write; if none is free, the youngest is pre-empted. Then
              requests from the queue take free slots, as far as there is memory
    prefill   one chunk of the new texts goes through the model, which fills the KV cache
    decode    one forward over the last committed token and the drafts of every sequence verifies the drafts:
              a token is sampled at each position, drafts that equal it are accepted, the result is committed
    retire    sequences that have ended leave, and become Samples
    draft     the MTP layers write n_draft new draft tokens behind the last committed token

A sequence is one row of the runner's state. Rows are kept compact, so that a batch is always one view:

    row    0 .............. A-1 | A ........ S-P-1 | S-P ............. S-1
           A sequences decode   | free             | P texts are prefilled

Requests with one prompt (a GRPO group) prefill it once, and share its blocks.

THE SAME REQUEST GIVES THE SAME TOKENS whatever runs beside it, with or without speculation, pre-empted or not: in fp32
on a CPU bit for bit, log-probs too (runner.py says why). Each token has its own random number, a hash of the request's
seed and the token's index, so no generator has a state. A sequence that was pre-empted prefills its prompt and what it
had generated, and goes on.

SPECULATION IS EXACT in the strongest sense. Drafts are greedy, so their distribution q is one-hot. Then the rule of
Leviathan et al., "keep draft x with probability p(x), else sample from p without x", has the same law as: sample the
token from p with the random number it would have used anyway, and accept the draft if it equals that token. One rule
serves greedy and sampled requests, and not only the distribution but the text itself is what it would be without MTP.

Drafts pay while few sequences run: a step then takes as long as reading the weights, whatever number of tokens is
verified. draft_below sets how many; above it the MTP layers rest, and when the number falls (the tail of a batch) the
sequences that are left are computed again, once, to fill the KV cache of the MTP layers.

Differs from the report, which patches vLLM: all MTP layers draft, in parallel form, each with a KV cache of its own.
Numbers to expect: docs/engine.md. Tests: tests/test_engine.py.
"""
import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kernels
from cache import BlockManager
from configurator import UserError
from model import MiMo
from mtp import check_drafts
from runner import MAX_STOPS, MIN_ROWS, CpuRunner, GraphRunner, TorchRunner


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
    verified: tuple[int, ...] = ()  # per draft of a step: how often verified (all drafts before it accepted)
    accepted: tuple[int, ...] = ()  # per draft of a step: how often it equalled the sampled token


@dataclass(eq=False)
class Sequence:
    """A request in flight. While it decodes, what it generates is in the runner's state, and read() brings it here."""
    request: Request
    number: int                     # in order of arrival: the youngest has the largest
    limit: int                      # most tokens of prompt and answer together
    text: list[int]                 # the prompt, and what was generated when it was read last
    verified: tuple[int, ...]       # as in Sample
    accepted: tuple[int, ...]
    logprobs: list[float] = field(default_factory=list)     # of the generated part of text

    def sample(self, finish: str | None = None) -> Sample:
        """The sample as it is now. finish None: the sequence has ended by itself."""
        r = self.request
        tokens = self.text[len(r.prompt):]
        return Sample(r.id, r.prompt, tokens, self.logprobs, finish or ("stop" if tokens[-1] in r.stop else "length"),
                      self.verified, self.accepted)


class Engine:
    """
    Continuous batching over one model. UserError for options that cannot work.

    model           a MiMo, shared with its owner; only load() writes to it
    slots           most sequences that run at a time
    max_len         longest prompt + answer, tokens
    n_draft         drafts a step, 0 = no speculation: at most one per MTP layer, or up to 7 of one layer
    draft_below     they draft while at most this many sequences are in flight; 0 = always
    draft_ids       drafts are among this many first ids, 0 = all: ids are roughly in order of frequency, and a part of
                    lm_head is read faster (FR-Spec, arXiv 2502.14856)
    chunk           prefill: most tokens per sequence and step
    prefill_tokens  prefill: most tokens per step over all sequences
    kv_tokens       tokens that the KV cache holds, 0 or None = room for `slots` sequences of max_len
    block           tokens per block of the cache
    plain           take the TorchRunner; None = kernels.is_plain()
    n_ids           rows of lm_head that are tokens (tokenizer.n_ids); the rest is padding and never sampled; None = all
    keep_weights    False: on a CPU the model's weights are freed as they are packed; it belongs to the engine then
    runner          the class of the runner; None = by the device, and `plain`
    """
    def __init__(self, model: MiMo, slots: int, max_len: int, n_draft: int = 0, draft_below: int = 0,
                 draft_ids: int = 0, chunk: int = 256, prefill_tokens: int = 4096, kv_tokens: int | None = None,
                 block: int = 64, plain: bool | None = None, n_ids: int | None = None, keep_weights: bool = True,
                 runner: type[TorchRunner] | None = None):
        V = model.cfg.vocab_size
        if n_ids is not None and not 1 <= n_ids <= V:
            raise UserError(f"n_ids = {n_ids} should be 1 to {V}, the rows of lm_head")
        check_drafts(n_draft, len(model.mtp_layers), "the model")
        if slots < 1 or max_len < 2:
            raise UserError(f"slots = {slots} and max_len = {max_len} should be at least 1 and 2")
        self.model, self.slots, self.max_len, self.n_draft = model, slots, max_len, n_draft
        self.draft_below, self.chunk = draft_below, max(chunk, MIN_ROWS)
        self.prefill_tokens = max(prefill_tokens, self.chunk)
        columns = max_len + n_draft + 2             # room for drafts, and a column that no text reaches
        n_blocks = -(-columns // block) * slots if not kv_tokens else kv_tokens // block
        self.blocks = BlockManager(n_blocks, block)
        if runner is None:
            plain = kernels.is_plain() if plain is None else plain
            runner = TorchRunner if plain else GraphRunner if model.lm_head.weight.device.type != "cpu" else \
                CpuRunner if CpuRunner.applies(model) else TorchRunner
        n_ids = n_ids or V
        self.runner = runner(model, slots, columns, n_draft, n_blocks, block, n_ids, min(draft_ids or n_ids, n_ids),
                             self.prefill_tokens, keep_weights)
        self.in_flight: dict[object, Sequence] = {}         # by id: all sequences here, in order of arrival
        self.queue: deque[Sequence] = deque()               # in order of arrival
        self.decoding: list[Sequence] = []                  # row i decodes decoding[i]
        self.prefilling: list[list[Sequence]] = []          # sequences with one text, a group; group j in row S-1-j
        self.arrived = self.preempted = 0                   # requests so far; pre-emptions so far
        self.steps = self.sequence_steps = 0        # decode steps so far; sequences decoded, summed over the steps
        self.spare = 0                                      # columns that every decoding sequence can fill at least

    # ---- what the owner calls ---------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Sequences that have a slot."""
        return len(self.in_flight) - len(self.queue)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self.queue)

    @property
    def room(self) -> int:
        """How many more requests could start now: free slots, and memory for as many average sequences."""
        if self.queue or self.active >= self.slots:
            return 0
        free, active = len(self.blocks.free_blocks), self.active
        used, spare = self.blocks.n_blocks - free, max(0, free - self.reserve())
        return min(self.slots - active, spare * active // used if active else spare)

    def add(self, request: Request) -> None:
        """Queue a request; a later step admits it. UserError says what would be right."""
        n, V, name = len(request.prompt), self.model.cfg.vocab_size, f"request {request.id!r}"
        if request.id in self.in_flight:
            raise UserError(f"{name}: a request with this id is in flight")
        if not 1 <= n < self.max_len:
            raise UserError(f"{name}: its prompt of {n} tokens should have 1 to max_len - 1 = {self.max_len - 1}")
        r = request
        if r.max_new_tokens < 1 or not r.temperature >= 0 or not 0 < r.top_p <= 1 or r.top_k < 0:
            raise UserError(f"{name}: max_new_tokens = {r.max_new_tokens} should be >= 1, temperature = "
                             f"{r.temperature} >= 0, top_p = {r.top_p} in (0, 1], top_k = {r.top_k} >= 0")
        if len(request.stop) > MAX_STOPS:
            raise UserError(f"{name}: {len(request.stop)} stop ids should be at most {MAX_STOPS}")
        if min(request.prompt) < 0 or max(request.prompt) >= V:
            raise UserError(f"{name}: its prompt ids should be in 0..{V - 1}")
        limit = min(n + request.max_new_tokens, self.max_len)
        if limit + self.n_draft > self.blocks.n_blocks * self.blocks.block:
            raise UserError(f"{name}: {limit + self.n_draft} tokens should fit the cache of "
                             f"{self.blocks.n_blocks * self.blocks.block}")
        if not self.in_flight:
            self.runner.refresh()                           # weights and RoPE base may have changed since
        none, self.arrived = (0,) * self.n_draft, self.arrived + 1
        s = self.in_flight[r.id] = Sequence(r, self.arrived, limit, r.prompt, none, none)
        self.queue.append(s)

    @torch.no_grad()
    def step(self) -> list[Sample]:
        """
        Schedule, prefill, decode, retire, draft: one step for every sequence. -> samples that have ended. UserError
        names a request for which the model's logits are NaN or infinite; it is taken out.
        """
        if not self.in_flight:
            return []
        self.schedule()
        if self.prefilling:
            self.prefill()
        if not self.decoding:
            return []
        A = len(self.decoding)
        self.steps, self.sequence_steps = self.steps + 1, self.sequence_steps + A
        self.spare -= self.runner.n_draft + 1
        ended, E = self.runner.decode(A)
        samples = self.retire(ended) if ended is not None and ended.any() else []
        if self.runner.n_draft and E and self.decoding:
            self.runner.draft(0, len(self.decoding), E)
        return samples

    @torch.no_grad()
    def abort(self, id: object) -> Sample | None:
        """Take a request out, wherever it is. -> what it has generated (finish "abort"), None if it is not here."""
        s = self.in_flight.get(id)
        if s is None:
            return None
        self.withdraw(s)
        if s in self.queue:
            self.queue.remove(s)
        del self.in_flight[id]
        return s.sample("abort")

    def progress(self, id: object) -> Sample | None:
        """What a request has generated so far (finish "running"); None if it is not here."""
        s = self.in_flight.get(id)
        if s in self.decoding:
            self.read(self.decoding.index(s))
        return s and s.sample("running")

    @torch.no_grad()
    def load(self, state_dict: dict[str, Tensor] | None = None) -> None:
        """
        New weights, copied into the model in place; None: the owner has written them there. Sequences in flight are
        computed again under the new weights: no token ever sees a key of another model.
        """
        if state_dict is not None:
            self.model.load_state_dict(state_dict)
        self.runner.refresh(written=True)
        self.recompute()

    # ---- schedule: memory and slots ---------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Decide whether to draft; blocks for what the running sequences write next; then start waiting ones."""
        if self.draft_below and self.n_draft:
            # twice as many until they stop, so that a new sequence or two do not switch back and forth
            few = len(self.in_flight) <= self.draft_below * (2 if self.runner.n_draft else 1)
            if few != bool(self.runner.n_draft):
                self.runner.n_draft = self.n_draft if few else 0
                if few:
                    self.recompute()                        # the MTP layers have rested: fill their KV cache
        if self.decoding and self.spare <= self.runner.n_draft:
            self.grow()
        if self.prefilling:
            self.keep_prefilling([j for j, group in enumerate(self.prefilling) if group])      # aborted groups leave
        if self.queue:
            self.admit()

    def grow(self) -> None:
        """
        Blocks for the next step of every decoding sequence, the oldest first. When none is free, the youngest sequence
        in flight is pre-empted: it has the least to compute again.
        """
        Q, block = self.runner.n_draft + 1, self.blocks.block
        n = dict(zip(self.decoding, self.runner.lengths(len(self.decoding)), strict=True))
        grown = []
        for s in sorted(self.decoding, key=lambda s: s.number):
            if s not in n:                                  # pre-empted by an older one
                continue
            had = len(self.blocks.tables[s.request.id])
            while not self.blocks.append(s.request.id, n[s] - 1 + Q):
                youngest = next(x for x in reversed(self.in_flight.values()) if x.request.id in self.blocks.tables)
                self.preempt(youngest)
                n.pop(youngest, None)
                if youngest is s:
                    break
            if s in n and len(self.blocks.tables[s.request.id]) > had:
                grown.append(s)
        for s in grown:
            if s in n:
                self.runner.map_row(self.decoding.index(s), self.blocks.tables[s.request.id])
        self.spare = min((len(self.blocks.tables[s.request.id]) * block - n + 1 for s, n in n.items()), default=0)

    def preempt(self, s: Sequence) -> None:
        """A running sequence gives its slot and its blocks back, and waits in front of the queue."""
        self.withdraw(s)
        self.queue.appendleft(s)
        self.preempted += 1

    def recompute(self) -> None:
        """All running sequences are prefilled again, in order of arrival."""
        for s in [s for s in reversed(self.in_flight.values()) if s.request.id in self.blocks.tables]:
            self.preempt(s)

    def withdraw(self, s: Sequence) -> None:
        """A sequence stops running, if it does; its text says how far it is."""
        if s.request.id not in self.blocks.tables:
            return
        if s in self.decoding:
            row = self.decoding.index(s)
            self.read(row)
            self.remove([row])
            return
        j, group = next((j, group) for j, group in enumerate(self.prefilling) if s in group)
        leader = group[0] is s
        group.remove(s)
        self.blocks.free(s.request.id)
        if leader and group:
            # the next one takes over: what it shared with s is in the cache, its other blocks are not
            shared = self.shared_blocks(s.text)
            row = self.runner.S - 1 - j
            done = min(self.runner.lengths(self.runner.S)[row] - 1, shared * self.blocks.block)
            self.runner.place(row, group[0].text, done, self.blocks.tables[group[0].request.id])

    def shared_blocks(self, text: list[int]) -> int:
        """
        Blocks that sequences which begin with this text can share: those that none of them will write. The text's last
        token is not in the cache yet, and the MTP layers write their last n_draft positions again.
        """
        return max(0, len(text) - 1 - self.n_draft) // self.blocks.block

    def reserve(self) -> int:
        """
        Blocks that no new sequence gets, so that those that run can grow for a while: a twelfth of the memory, or as
        much as they can need. In a simulation of 7B this halves what is computed again, and costs 2% of the sequences
        that run (docs/engine.md).
        """
        tables, few = self.blocks.tables, self.blocks.n_blocks // 12
        return min(few, sum(self.blocks.blocks_for(s.limit + self.n_draft) - len(tables[s.request.id])
                            for s in self.in_flight.values() if s.request.id in tables))

    def admit(self) -> None:
        """
        Fill free slots in order of arrival, as long as there is memory for the text, for the first decode step, and in
        reserve. A sequence whose text is being prefilled joins that group.
        """
        blocks, Q = self.blocks, self.runner.n_draft + 1
        while self.queue and self.active < self.slots:
            s = self.queue[0]
            n, group = len(s.text) - 1 + Q, next((g for g in self.prefilling if g[0].text == s.text), None)
            # whom to share blocks with: the group, or else a sequence of the same prompt that decodes already
            prompt, shared = s.request.prompt, ()
            if same := group or [x for x in self.decoding if x.request.prompt == prompt]:
                shared = blocks.tables[same[0].request.id][:self.shared_blocks(s.text if group else prompt)]
            left = len(blocks.free_blocks) - blocks.blocks_for(n) + len(shared)
            if self.active and left < blocks.n_blocks // 12 and left < self.reserve():
                break
            if not blocks.allocate(s.request.id, n, shared):
                break
            self.queue.popleft()
            if group:
                group.append(s)
                continue
            self.prefilling.append([s])
            self.runner.place(self.runner.S - len(self.prefilling), s.text, len(shared) * blocks.block,
                              blocks.tables[s.request.id])

    # ---- prefill ----------------------------------------------------------------------------------------------------

    def prefill(self) -> None:
        """
        Chunked prefill: the next chunk of the oldest texts through the trunk and the MTP layers, which fills the KV
        cache. A text's last token is left out: it goes through the model in the sequence's next decode step. Chunks are
        padded to the longest of the batch.
        """
        P, S = len(self.prefilling), self.runner.S
        goal = [len(group[0].text) - 1 for group in self.prefilling]
        done = [n - 1 for n in self.runner.lengths(S)[S - P:][::-1]]        # tokens in the cache
        T = B = 0                                                   # chunk length, and texts that fit prefill_tokens
        for n, n_done in zip(goal, done, strict=True):
            longest = max(T, min(n - n_done, self.chunk), MIN_ROWS)
            if B and longest * (B + 1) > self.prefill_tokens:
                break
            T, B = longest, B + 1
        end = [min(n_done + T, n) for n, n_done in zip(goal[:B], done[:B], strict=True)]
        if end != done[:B]:
            self.runner.prefill(S - B, done[:B][::-1], end[::-1], T)
        self.start_decoding([j for j in range(B) if end[j] == goal[j]])

    def start_decoding(self, finished: list[int]) -> None:
        """
        The texts of the groups prefilling[j], j in `finished`, are in the cache: a decoding row for each of their
        sequences, its sampling state, and its first drafts. A sequence reads the shared blocks of its group and gets
        copies of the others, which it will write.
        """
        if not finished:
            return
        A, tables, copies, sources = len(self.decoding), self.blocks.tables, [], []
        for j in finished:
            leader, *others = self.prefilling[j]
            shared, filled = self.shared_blocks(leader.text), self.blocks.blocks_for(len(leader.text) - 1)
            for s in others:
                copies += zip(tables[leader.request.id][shared:filled], tables[s.request.id][shared:filled],
                              strict=True)
            self.decoding += self.prefilling[j]
            sources += [self.runner.S - 1 - j] * (len(others) + 1)
        new = self.decoding[A:]
        self.runner.copy_blocks(copies)
        self.keep_prefilling([j for j in range(len(self.prefilling)) if j not in set(finished)], sources)
        for row, s in enumerate(new, A):
            self.runner.map_row(row, tables[s.request.id])
        self.runner.start(A, new)
        self.spare = 0                                              # grow() looks at the new ones before the next step
        if self.runner.n_draft:
            self.runner.draft(A, len(new), 1)

    def keep_prefilling(self, keep: list[int], sources: list[int] = ()) -> None:
        """
        Only the groups `keep` go on prefilling; their rows close up towards the end of the state. The last decoding
        rows take the state of the rows `sources`. All in one move, because old and new rows overlap.
        """
        before, last, A = len(self.prefilling), self.runner.S - 1, len(self.decoding)
        if len(keep) == before:
            return
        self.prefilling = [self.prefilling[j] for j in keep]
        self.runner.move([*sources, *(last - j for j in keep)],
                         [*range(A - len(sources), A), *(last - i for i in range(len(keep)))])
        for row in range(max(A, last - before + 1), last - len(keep) + 1):
            self.runner.map_row(row)

    # ---- the end of a sequence --------------------------------------------------------------------------------------

    def retire(self, ended: Tensor) -> list[Sample]:
        """ended bool [A]. -> the samples of these rows, which leave the batch. UserError: as step()."""
        rows = [i for i, has_ended in enumerate(ended.tolist()) if has_ended]
        samples = [self.read(i).sample() for i in rows]
        self.remove(rows)
        for sample in samples:
            del self.in_flight[sample.id]
        for s in samples:                                           # the runners have marked what is no number
            where = [f"after {len(s.tokens) - 1} tokens of its answer"] if math.isnan(s.logprobs[-1]) else \
                [f"MTP layer {k + 1}" for k, n in enumerate(s.accepted) if n < 0]
            if where:
                raise UserError(f"request {s.id!r}: the model's logits are not finite (NaN or infinity), {where[0]}: "
                                "its weights are broken, or too large")
        return samples

    def read(self, row: int) -> Sequence:
        """The sequence of a decoding row, with what it has generated so far."""
        s = self.decoding[row]
        tokens, s.logprobs, s.verified, s.accepted = self.runner.read(row, len(s.request.prompt))
        s.text = s.request.prompt + tokens
        return s

    def remove(self, rows: list[int]) -> None:
        """Decoding rows leave and their blocks are freed; the last of the rows that stay move into the holes."""
        gone, A = set(rows), len(self.decoding)
        for i in rows:
            self.blocks.free(self.decoding[i].request.id)
        holes = [i for i in rows if i < A - len(rows)]
        movers = [i for i in range(A - len(rows), A) if i not in gone]
        for i, j in zip(movers, holes, strict=True):
            self.decoding[j] = self.decoding[i]
        del self.decoding[A - len(rows):]
        self.runner.move(movers, holes)
        for row in range(A - len(rows), A):
            self.runner.map_row(row)


def generate(engine: Engine, requests: list[Request]) -> list[Sample]:
    """Run all requests to their end -> their samples, in the order of the requests."""
    for request in requests:
        engine.add(request)
    done = {}
    while len(done) < len(requests):
        done |= {s.id: s for s in engine.step()}
    return [done[r.id] for r in requests]
