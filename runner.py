"""
The runners of the engine: one forward pass over the KV cache, and the state of the sequences in it (report 2.2).

    TorchRunner    model.py's own forward, on any device: the path to read, and to put a breakpoint in (--plain)
    GraphRunner    a GPU: the kernels of kernels/decode.py and kernels/gemv.py, captured as a CUDA graph
    CpuRunner      a CPU: the C of kernels/cpu/, one call each

What the engine calls, the same in all three. Rows are rows of the state, one per sequence:

    prefill(first, done, end, T)   tokens done[i] .. end[i] - 1 of the texts in rows first + i into the KV cache
    decode(A)                      verify, accept and commit in rows 0 .. A - 1 -> (has it ended, bool [A] or None; E)
    draft(first, B, E)             the MTP layers write new drafts behind the last committed token
    place, start, move, read       write and read rows of the state
    copy_blocks(pairs)             copy blocks of the KV cache (cache.py decides which)

Letters: R rows go through a forward, the A that decode and rows that only fill up the batch; Q = n_draft + 1 positions
of each; C columns; E, the most tokens that one sequence has just committed, 0 if their drafts are written already.

THE SAME REQUEST GIVES THE SAME TOKENS whatever runs beside it, in fp32 on a CPU bit for bit. Measured on torch 2.13
with MKL, asserted in tests/test_engine.py:

    a row of a matrix product   does not depend on the other rows when there are at least MIN_ROWS = 4 of them; products
                                of 1, 2 or 3 rows run other code
    a sum over keys             does not depend on masked keys when their number is a multiple of KEY_STEP = 16 and
                                probabilities meet values in pieces of SUM_PIECE = 128; MKL splits a longer sum at
                                positions that depend on its length

torch's own attention (SDPA) has no such rule, so attend() below is written out.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError
from kernels.cpu.decode import CpuForward, library, up16
from kernels.decode import decode_attention
from kernels.gemv import block_step, gemv, gemv_applies
from model import Block, MiMo
from mtp import accept_matching
from sampling import sample_tokens, signed64, uniform

MIN_ROWS, KEY_STEP, SUM_PIECE = 4, 16, 128
MAX_STOPS = 8                                       # most stop ids of a request
BROKEN = -(1 << 62)                                 # count of accepted drafts of a layer whose logits are not finite


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


# ---- attention over the KV cache ------------------------------------------------------------------------------------

@dataclass
class ForwardContext:
    """
    One forward over Q new tokens of each of B sequences: where their keys and values go, and what each token sees.
    Made once per forward, shared by all layers. The last fields belong to one runner each.
    """
    positions: Tensor                       # int64 [B,Q]; a token sees the columns up to its own position
    slot_mapping: Tensor                    # int64: flat index of each new key and value in the cache
    cos: Tensor                             # [B,Q,d], the rotations of RoPE at the positions
    sin: Tensor
    block_table: Tensor                     # [B,n]: the blocks of each sequence
    n_columns: int = 0                      # TorchRunner: L, the columns that any token sees, a multiple of KEY_STEP
    query_rows: int = 0                     # TorchRunner: rows that one token and one KV head take in attend(), >= G
    bias: Tensor | None = None              # TorchRunner: 0 where a token may look, -inf elsewhere; shapes in attend()
    lengths: Tensor | None = None           # GraphRunner: int32 [B], tokens in each sequence after this forward


def attend(q: Tensor, kT: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """
    softmax(q k^T + bias) v, where the bits of a row depend on nothing but that row.

    q [B*K,n,d], scaled, n >= MIN_ROWS; kT [B*K,d,L]; v [B*K,L,d]; bias [B*K,1,L], or [B,1,n,L] where the tokens of a
    sequence see different keys. -> [B*K,n,d].
    """
    if bias.ndim == 3:
        s = torch.baddbmm(bias, q, kT)                              # [B*K,n,L]
    else:
        s = torch.bmm(q, kT)
        s.view(bias.shape[0], -1, *s.shape[1:]).add_(bias)
    p, L = s.softmax(-1), v.shape[1]
    if L <= SUM_PIECE:
        return torch.bmm(p, v)
    o = torch.bmm(p[:, :, :SUM_PIECE], v[:, :SUM_PIECE])
    for c in range(SUM_PIECE, L, SUM_PIECE):
        o.baddbmm_(p[:, :, c:c + SUM_PIECE], v[:, c:c + SUM_PIECE])
    return o


class CacheLayer:
    """One layer of the KV cache, kv [n_blocks + 1, K, block, 2d]; what Block.forward knows as `cache`."""
    def __init__(self, kv: Tensor):
        self.kv = kv
        self.ctx: ForwardContext | None = None                      # the runner sets it before each forward

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k, v [B,Q,K,d], then attends: q [B,Q,H,d] -> [B,Q,H,d]."""
        ctx, (B, Q, K, d), rows = self.ctx, k.shape, self.ctx.query_rows
        self.kv.view(-1, 2 * d).index_copy_(0, ctx.slot_mapping, torch.cat([k, v], -1).view(-1, 2 * d))
        # the blocks of each sequence side by side, [B,n,K,block,2d] -> [B*K,L,2d]
        kv = self.kv[ctx.block_table].transpose(1, 2).flatten(0, 1).flatten(1, 2)[:, :ctx.n_columns]
        keys, values = kv.split(d, -1)
        # the G query heads of one KV head are rows of one matrix, repeated until there are MIN_ROWS or more
        q = (q * d ** -0.5).view(B, Q, K, -1, d).transpose(1, 2)    # [B,K,Q,G,d]
        G = q.shape[3]
        q = q.repeat(1, 1, 1, rows // G, 1).reshape(B * K, Q * rows, d)
        o = attend(q, keys.mT, values, ctx.bias).view(B, K, Q, rows, d)[:, :, :, :G]
        return o.transpose(1, 2).reshape(B, Q, -1, d)


# ---- torch ----------------------------------------------------------------------------------------------------------

class TorchRunner:
    """
    model.py's forward over a KV cache in blocks. UserError for options that cannot work.

    model           a MiMo, shared with its owner
    slots           most sequences in flight
    columns         most tokens of a sequence, drafts included
    n_draft         MTP layers that draft; the attribute is 0 while the engine does not draft
    n_blocks        blocks of the KV cache, beside block 0
    block           tokens per block
    n_ids           rows of lm_head that are tokens; the rest is padding and never sampled
    draft_ids       drafts are among the first draft_ids of them
    prefill_tokens  most prompt tokens of one prefill
    keep_weights    False: the CpuRunner may free the model's weights once it has packed them
    """
    block_forward = staticmethod(Block.forward)                     # x through one block
    sampling = "temperature", "top_p", "top_k"                      # what sample_tokens() gets beside the logits

    def __init__(self, model: MiMo, slots: int, columns: int, n_draft: int, n_blocks: int, block: int, n_ids: int,
                 draft_ids: int, prefill_tokens: int, keep_weights: bool = True):
        cfg, w = model.cfg, model.lm_head.weight
        self.model, self.n_draft, self.most_drafts, self.block = model, n_draft, n_draft, block
        self.n_ids, self.draft_ids, self.device = n_ids, draft_ids, w.device
        self.S = slots + self.extra_rows(slots)
        self.columns = -(-columns // block) * block
        self.ring = 4 * (n_draft + 1)               # trunk states kept per sequence, for the MTP layers
        self.n_layer = cfg.n_layer + n_draft        # layers of the KV cache: the trunk's, then the MTP layers'
        self.kv = self.new_cache(n_blocks)
        self.layers = self.cache_layers()
        self.state = self.new_state()
        # on a CPU the same memory through NumPy, where reading or writing a few numbers costs a tenth
        numpy = w.device.type == "cpu"
        self.arrays = {name: t.numpy() if numpy and t.dtype != torch.bfloat16 else t for name, t in self.state.items()}
        self.arange = torch.arange(self.columns, device=w.device)
        self.rope_base, self.cos, self.sin = None, None, None       # refresh() makes them

    @staticmethod
    def extra_rows(slots: int) -> int:
        """Rows that fill up a batch: torch's products on a CPU need MIN_ROWS."""
        return MIN_ROWS

    def new_cache(self, n_blocks: int) -> Tensor:
        """The memory of the KV cache [n_layer, n_blocks + 1, K, block, 2d]: keys and values side by side."""
        cfg, w = self.model.cfg, self.model.lm_head.weight
        return torch.zeros(self.n_layer, n_blocks + 1, cfg.n_kv_head, self.block, 2 * cfg.head_dim, dtype=w.dtype,
                           device=w.device)

    def cache_layers(self) -> list:
        """One object per layer of self.kv, with the attend() that Block.forward calls."""
        return [CacheLayer(kv) for kv in self.kv]

    def new_state(self) -> dict[str, Tensor]:
        """
        Tensors with one row per sequence. n counts the committed tokens of a sequence, prompt included; the KV cache of
        the trunk holds the first n - 1. tokens, logp, u [S,C] by position in the text; drafts stand behind the
        committed tokens. table [S, C / block]: the sequence's blocks, then 0. h is a ring of trunk states: the state of
        position p is in h[row, p % ring].
        """
        S, C, m = self.S, self.columns, self.most_drafts
        long, real = (dict(dtype=t, device=self.device) for t in (torch.int64, torch.float32))
        w = self.model.lm_head.weight
        return {"tokens": torch.zeros(S, C, **long), "logp": torch.zeros(S, C, **real),
                "u": torch.zeros(S, C, **real), "n": torch.ones(S, **long), "limit": torch.ones(S, **long),
                "stop": torch.full((S, MAX_STOPS), -1, **long), "temperature": torch.ones(S, **real),
                "top_p": torch.ones(S, **real), "top_k": torch.zeros(S, **long),
                "table": torch.zeros(S, C // self.block, dtype=torch.int32, device=self.device),
                "h": torch.zeros(S, self.ring, self.model.cfg.d_model, dtype=self.state_dtype(w), device=self.device),
                "verified": torch.zeros(S, m, **long), "accepted": torch.zeros(S, m, **long)}

    def state_dtype(self, w: Tensor) -> torch.dtype:
        """The dtype of trunk states."""
        return w.dtype

    def refresh(self, written: bool = False) -> None:
        """The model's RoPE base may have changed, and its weights (written: they have): what was made from them."""
        if self.rope_base != self.model.cfg.rope_base:
            self.rope_base = self.model.cfg.rope_base
            self.cos, self.sin = self.model.rope_at(None, self.arange)

    # -- rows of the state

    def put(self, name: str, at: slice | int | tuple, values: list | int) -> None:
        """state[name][at] = a list of values, or one number for all."""
        array = self.arrays[name]
        array[at] = torch.tensor(values, dtype=array.dtype) if isinstance(array, Tensor) else values

    def place(self, row: int, text: list[int], done: int, table: list[int]) -> None:
        """A text of which `done` tokens are in the KV cache, in these blocks, stands in a row and waits for prefill."""
        self.put("tokens", (row, slice(0, len(text))), text)
        self.put("n", row, done + 1)
        self.map_row(row, table)

    def map_row(self, row: int, table: list[int] | tuple = ()) -> None:
        """The row's sequence has these blocks now; none: what the row writes goes to block 0, which nobody reads."""
        self.put("table", row, 0)
        self.put("table", (row, slice(0, len(table))), table)

    def start(self, first: int, sequences: list) -> None:
        """
        The texts of these engine.Sequences are in the rows first and on and in the KV cache: their sampling state.
        """
        rows, requests = slice(first, first + len(sequences)), [s.request for s in sequences]
        self.put("n", rows, [len(s.text) for s in sequences])
        self.put("limit", rows, [s.limit for s in sequences])
        for name in ("temperature", "top_p", "top_k"):
            self.put(name, rows, [getattr(r, name) for r in requests])
        self.put("stop", rows, [[*r.stop, *[-1] * (MAX_STOPS - len(r.stop))] for r in requests])
        for name in ("verified", "accepted") if self.most_drafts else ():
            self.put(name, rows, [list(getattr(s, name)) for s in sequences])
        for row, s in enumerate(sequences, first):
            if s.logprobs:
                self.put("logp", (row, slice(len(s.request.prompt), len(s.text))), s.logprobs)
        self.random_numbers(first, requests)

    def random_numbers(self, first: int, requests: list) -> None:
        """The random number of each token: a hash of the request's seed and the token's index in the answer."""
        rows = slice(first, first + len(requests))
        prompt = torch.tensor([[len(r.prompt)] for r in requests], device=self.device)
        seeds = torch.tensor([[signed64(r.seed)] for r in requests], device=self.device)
        self.state["u"][rows] = uniform(seeds, self.arange - prompt)

    def move(self, sources: list[int], targets: list[int]) -> None:
        """The state of rows `sources` into rows `targets`; everything is read before anything is written."""
        if not sources:
            return
        if isinstance(self.arrays["n"], Tensor):
            sources, targets = (torch.tensor(rows, device=self.device) for rows in (sources, targets))
        for array in self.arrays.values():
            array[targets] = array[sources]

    def lengths(self, A: int) -> list[int]:
        """Committed tokens of rows 0 .. A - 1."""
        return self.arrays["n"][:A].tolist()

    def read(self, row: int, first: int) -> tuple[list[int], list[float], tuple[int, ...], tuple[int, ...]]:
        """From column `first` on: the committed tokens and their log-probs; per MTP layer drafts verified, accepted."""
        s = self.arrays
        new = slice(first, int(s["n"][row]))
        return (s["tokens"][row, new].tolist(), s["logp"][row, new].tolist(), tuple(s["verified"][row].tolist()),
                tuple(s["accepted"][row].tolist()))

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Block source -> block target of every layer, for each pair."""
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            self.kv[:, list(targets)] = self.kv[:, list(sources)]

    # -- one forward

    def context(self, first: int, positions: Tensor, columns: Tensor | None = None) -> ForwardContext:
        """
        positions int64 [B,Q] of new tokens in rows first and on; columns int64 [B,Q]: the column that each token fills,
        default its position.
        """
        (B, Q), block, K = positions.shape, self.block, self.model.cfg.n_kv_head
        columns = positions if columns is None else columns
        L = min(-(-(int(positions.max()) + 1) // KEY_STEP) * KEY_STEP, self.columns)
        table = self.state["table"][first:first + B]
        at = table.gather(1, columns // block)[..., None] * K + torch.arange(K, device=self.device)     # [B,Q,K]
        bias = torch.zeros(B, Q, L, dtype=self.kv.dtype, device=self.device)
        bias.masked_fill_(self.arange[:L] > positions[:, :, None], -math.inf)
        G = self.model.cfg.n_head // K
        rows = G if Q * G >= MIN_ROWS else -(-MIN_ROWS // G) * G
        return ForwardContext(
            positions, (at * block + (columns % block)[..., None]).flatten().long(), self.cos[positions],
            self.sin[positions], table[:, :-(-L // block)], n_columns=L, query_rows=rows,
            bias=bias.repeat_interleave(K, 0) if Q == 1             # [B*K,1,L]
            else bias.repeat_interleave(rows, 1)[:, None])          # [B,1,Q*rows,L]

    def trunk(self, ids: Tensor, ctx: ForwardContext) -> Tensor:
        """ids [B,Q] through all blocks over the KV cache -> h [B,Q,D] before the final norm."""
        x = self.model.embed_tokens(ids)
        for block, layer in zip(self.model.layers, self.layers, strict=False):
            layer.ctx = ctx
            x = self.block_forward(block, x, ctx.cos, ctx.sin, None, layer)
        return x

    def mtp(self, k: int, h: Tensor, ahead: Tensor, ctx: ForwardContext) -> Tensor:
        """
        MTP layer k over its own KV cache: h [B,Q,D] from BEFORE the final norm, ahead [B,Q] the tokens k + 1 positions
        after h's. -> z [B,Q,D] before the layer's own final norm.
        """
        mtp, layer = self.model.mtp_layers[k], self.layers[self.model.cfg.n_layer + k]
        layer.ctx = ctx
        return self.block_forward(mtp, mtp.enter(h, self.model.embed_tokens(ahead)), ctx.cos, ctx.sin, None, layer)

    def logits(self, x: Tensor, norm: nn.Module, n: int) -> Tensor:
        """The first n rows of lm_head(norm(x)), norm the trunk's or an MTP layer's: x [B,Q,D] -> fp32 [B*Q,n]."""
        return F.linear(norm(x.flatten(0, 1)), self.model.lm_head.weight[:n]).float()

    # -- prefill; verify, accept, commit; draft

    def prefill(self, first: int, done: list[int], end: list[int], T: int) -> None:
        """
        Tokens done[i] .. end[i] - 1 of the text in row first + i, padded to T, through the trunk and the MTP layers,
        which fills the KV cache. What the padding writes is overwritten before any token sees it.
        """
        B, tokens, C = len(done), self.state["tokens"][first:first + len(done)], self.columns
        start = torch.tensor(done, device=self.device)[:, None]
        positions = (start + self.arange[:T]).clamp_max(C - 1)      # [B,T]
        ctx = self.context(first, positions)
        h = self.trunk(tokens.gather(1, positions), ctx)            # [B,T,D]
        self.put("n", slice(first, first + B), [n + 1 for n in end])
        for k in range(self.n_draft):
            # position p of layer k takes x_{p+k+1} where the text has it; draft() computes the last k positions again
            self.mtp(k, h, tokens.gather(1, (positions + k + 1).clamp_max(C - 1)), ctx)
        for i in range(B) if self.n_draft else ():                  # the last real states of each text into its ring
            low = max(end[i] - self.ring, done[i])
            places = self.arange[low:end[i]] % self.ring
            self.state["h"][first + i, places] = h[i, low - done[i]:end[i] - done[i]]

    def decode(self, A: int) -> tuple[Tensor, int]:
        """
        Verify, accept and commit, for rows 0 .. A - 1: the last committed token and its drafts go through the trunk in
        one forward, Q = n_draft + 1 positions; a token is sampled at each of them; drafts are accepted while they equal
        the sampled tokens; the accepted drafts and one more sampled token are committed.

        -> (has the sequence ended, bool [A]; Q, the most tokens that a row can have committed). decode() in
        kernels/cpu/decode_cpu.c takes the same steps.
        """
        Q = self.n_draft + 1
        R = max(A, -(-MIN_ROWS // Q)) if self.device.type == "cpu" else A
        s = {name: t[:R] for name, t in self.state.items()}
        s["n"][A:] = 1                                              # rows that only fill up the batch
        n = s["n"]
        positions = n[:, None] - 1 + self.arange[:Q]                # [R,Q]
        ids = s["tokens"].gather(1, positions)                      # x_{n-1} and the drafts
        h = self.trunk(ids, self.context(0, positions))             # [R,Q,D]

        # verify: sample the token that follows each position, with that token's own random number
        targets = positions + 1
        u = s["u"].gather(1, targets).flatten()
        how = [s[name].repeat_interleave(Q) for name in self.sampling]
        sampled, logp = (t.view(R, Q) for t in sample_tokens(self.logits(h, self.model.norm, self.n_ids), u, *how))
        s["tokens"].scatter_(1, targets, sampled)
        s["logp"].scatter_(1, targets, logp)
        # a logit that is no number ends the sequence too: Engine.retire says so
        is_stop = (sampled[:, :, None] == s["stop"][:, None, :]).any(-1) | logp.isnan()         # [R,Q]
        if Q == 1:
            n += 1
            return ((n >= s["limit"]) | is_stop[:, 0])[:A], 1

        # accept, commit: the accepted drafts and one token more, but nothing after a stop token or past the limit
        n_accepted = accept_matching(ids[:, 1:], sampled)           # [R]
        to_stop = (is_stop.cumsum(1) == 0).sum(1)                   # [R] tokens before the first stop token
        n_committed = torch.minimum(torch.minimum(n_accepted, to_stop) + 1, s["limit"] - n).clamp(1, Q)
        # draft k was verified if its position was committed, and if it existed: after a prompt of one token it does not
        k = self.arange[:self.n_draft]
        verified = (k < n_committed[:, None]) & (n > 1)[:, None]
        s["verified"][:, :Q - 1] += verified
        s["accepted"][:, :Q - 1] += verified & (k < n_accepted[:, None])
        s["h"].scatter_(1, (positions % self.ring)[..., None].expand_as(h), h)
        n += n_committed
        return ((n >= s["limit"]) | (n_committed == to_stop + 1))[:A], Q

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
        rows, s, W = slice(first, first + B), self.state, max(E, self.n_draft)
        n, tokens = s["n"][rows, None], s["tokens"][rows]
        positions = n - 1 + self.arange[:W] - W                     # [B,W], the last one is n-2
        real = positions.clamp_min(0)
        # a position before the text begins writes into the last column, which no text reaches
        ctx = self.context(first, real, torch.where(positions < 0, self.columns - 1, real))
        ring = (real % self.ring)[..., None].expand(-1, -1, self.model.cfg.d_model)
        h = s["h"][rows].gather(1, ring)                            # [B,W,D]
        for k, layer in enumerate(self.model.mtp_layers[:self.n_draft]):
            z = self.mtp(k, h, tokens.gather(1, real + k + 1), ctx)                    # [B,W,D]
            logits = self.logits(z[:, -1:], layer.final_layernorm, self.draft_ids)
            tokens.scatter_(1, n + k, logits.argmax(-1, keepdim=True))
            low, high = logits.aminmax(dim=-1)
            s["accepted"][rows, k].masked_fill_(~(low.isfinite() & high.isfinite()), BROKEN)


# ---- a GPU ----------------------------------------------------------------------------------------------------------

class PagedLayer:
    """One layer of the KV cache of a GPU: keys k and values v [n_blocks + 1, block, K, d]; ctx as in CacheLayer."""
    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v
        self.ctx: ForwardContext | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As CacheLayer.attend. Up to 8 tokens per sequence take kernels.decode, longer chunks torch's own."""
        ctx, Q = self.ctx, q.shape[1]
        self.k.flatten(0, 1).index_copy_(0, ctx.slot_mapping, k.flatten(0, 1))
        self.v.flatten(0, 1).index_copy_(0, ctx.slot_mapping, v.flatten(0, 1))
        if Q <= 8:
            return decode_attention(q, self.k, self.v, ctx.block_table, ctx.lengths)
        # prefill: the blocks of each sequence side by side, then ordinary masked attention
        n = -(-(int(ctx.positions.max()) + 1) // self.k.shape[1])
        k, v = (t[ctx.block_table[:, :n].long()].flatten(1, 2).transpose(1, 2) for t in (self.k, self.v))   # [B,K,L,d]
        mask = torch.arange(k.shape[2], device=q.device) <= ctx.positions[:, :, None]                       # [B,Q,L]
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask[:, None], enable_gqa=True)
        return o.transpose(1, 2)


class GraphRunner(TorchRunner):
    """
    The same for a GPU: no shape follows the longest sequence, so that a decode step is one CUDA graph, captured once
    per batch size, a power of two. Without a GPU (tests) nothing is captured.
    """
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.most_drafts > 7:
            raise UserError(f"n_draft = {self.most_drafts} should be at most 7: kernels.decode takes 8 tokens")
        self.graphs, self.kinds = {}, [TorchRunner.sampling] * self.S

    @staticmethod
    def extra_rows(slots: int) -> int:
        """A batch is filled up to a power of two, which must not reach the rows that prefill."""
        return max(MIN_ROWS, power_of_two(slots) // 2)

    def new_cache(self, n_blocks: int) -> Tensor:
        """[2, n_layer, n_blocks + 1, block, K, d]: keys, then values."""
        cfg, w = self.model.cfg, self.model.lm_head.weight
        return torch.zeros(2, self.n_layer, n_blocks + 1, self.block, cfg.n_kv_head, cfg.head_dim, dtype=w.dtype,
                           device=w.device)

    def cache_layers(self) -> list:
        return [PagedLayer(k, v) for k, v in zip(*self.kv, strict=True)]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            self.kv[:, :, list(targets)] = self.kv[:, :, list(sources)]

    def refresh(self, written: bool = False) -> None:
        if self.rope_base != self.model.cfg.rope_base:
            self.graphs = {}                                        # they have captured the old rotations
        super().refresh()

    def context(self, first: int, positions: Tensor, columns: Tensor | None = None) -> ForwardContext:
        (B, _), columns = positions.shape, positions if columns is None else columns
        table = self.state["table"][first:first + B]
        block = table.gather(1, columns // self.block).long()       # [B,Q]
        return ForwardContext(positions, (block * self.block + columns % self.block).flatten(), self.cos[positions],
                              self.sin[positions], table, lengths=(positions[:, -1] + 1).int())

    @staticmethod
    def block_forward(block: Block, x: Tensor, cos: Tensor, sin: Tensor, bounds: None, cache: PagedLayer) -> Tensor:
        """Few rows take the kernels of gemv.py."""
        if gemv_applies(block, *x.shape[:2]):
            return block_step(block, x, cos, sin, cache)
        return Block.forward(block, x, cos, sin, bounds, cache)

    def logits(self, x: Tensor, norm: nn.Module, n: int) -> Tensor:
        w = self.model.lm_head.weight
        w = w[:-(-n // 16) * 16]                                    # whole tiles
        if gemv_applies(self.model.layers[0], *x.shape[:2]) and len(w) % 16 == 0:
            return gemv(norm(x.flatten(0, 1)), [w], dtype=torch.float32)[:, :n]
        return super().logits(x, norm, n)

    # -- which of temperature, top_p and top_k a batch needs is known on the CPU: sorting 151,680 logits takes time

    def start(self, first: int, sequences: list) -> None:
        super().start(first, sequences)
        for row, r in enumerate([s.request for s in sequences], first):
            plain = r.temperature == 1 and r.top_p == 1 and r.top_k == 0
            self.kinds[row] = () if plain else ("temperature",) if r.temperature == 0 else TorchRunner.sampling

    def move(self, sources: list[int], targets: list[int]) -> None:
        super().move(sources, targets)
        for target, kind in zip(targets, [self.kinds[row] for row in sources], strict=True):
            self.kinds[target] = kind

    def decode(self, A: int) -> tuple[Tensor, int]:
        """decode() and draft(), replayed. -> (has the sequence ended, 0: the drafts are written)."""
        R, kinds = power_of_two(A), set(self.kinds[:A])
        self.put("n", slice(A, R), 1)                               # rows that only fill up the batch
        self.sampling = kinds.pop() if len(kinds) == 1 else TorchRunner.sampling
        if self.device.type != "cuda":
            return self.work(R)[:A], 0
        key = R, self.n_draft, self.sampling
        if key not in self.graphs:
            self.graphs[key] = self.capture(R)
        graph, ended = self.graphs[key]
        graph.replay()
        return ended[:A], 0

    def work(self, R: int) -> Tensor:
        """What a graph holds."""
        ended, E = super().decode(R)
        if self.n_draft:
            self.draft(0, R, E)
        return ended

    def capture(self, R: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """-> (the graph of work(R), the tensor in which a replay leaves its result)."""
        saved = {name: t.clone() for name, t in self.state.items()}           # the trial runs must leave no trace
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.work(R)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the trainer's thread may be using the GPU at the same time (rl.py, max_staleness = 1)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            ended = self.work(R)
        for name, t in saved.items():
            self.state[name].copy_(t)
        return graph, ended


# ---- a CPU ----------------------------------------------------------------------------------------------------------

class CpuRunner(TorchRunner):
    """The same in C: kernels/cpu/decode.py packs the weights and calls decode_cpu.c on the tensors of the state."""
    def __init__(self, model: MiMo, slots: int, columns: int, n_draft: int, n_blocks: int, block: int, n_ids: int,
                 draft_ids: int, prefill_tokens: int, keep_weights: bool = True):
        if block % KEY_STEP:
            raise UserError(f"block = {block} should be a multiple of {KEY_STEP}, the columns of a piece of the cache")
        super().__init__(model, slots, columns, n_draft, n_blocks, block, n_ids, draft_ids, prefill_tokens)
        self.c = CpuForward(model, n_draft, self.kv, self.state, n_ids, draft_ids, block,
                            most_tokens=max(prefill_tokens, self.S * (n_draft + 1)), keep_weights=keep_weights)

    @staticmethod
    def applies(model: MiMo) -> bool:
        """True on a CPU with a C compiler, for weights in fp32 or bf16."""
        w = model.lm_head.weight
        return w.device.type == "cpu" and w.dtype in (torch.float32, torch.bfloat16) and library() is not None

    @staticmethod
    def extra_rows(slots: int) -> int:
        """None: here a row's bits depend on that row alone."""
        return 0

    def new_cache(self, n_blocks: int) -> Tensor:
        """fp32 [n_layer, n_blocks + 1, floats of a block], in the order of decode_cpu.c."""
        cfg = self.model.cfg
        return torch.zeros(self.n_layer, n_blocks + 1, self.block * cfg.n_kv_head * 2 * up16(cfg.head_dim))

    def cache_layers(self) -> list:
        return []

    def state_dtype(self, w: Tensor) -> torch.dtype:
        return torch.float32

    def refresh(self, written: bool = False) -> None:
        super().refresh()
        self.c.refresh(self.cos, self.sin, written)

    def random_numbers(self, first: int, requests: list) -> None:
        for row, r in enumerate(requests, first):
            self.c.uniform(row, len(r.prompt), r.seed)

    def prefill(self, first: int, done: list[int], end: list[int], T: int) -> None:
        self.c.prefill(self.n_draft, first, T, end)
        self.put("n", slice(first, first + len(end)), [n + 1 for n in end])

    def decode(self, A: int) -> tuple[Tensor | None, int]:
        return self.c.decode(self.n_draft, A)

    def draft(self, first: int, B: int, E: int) -> None:
        self.c.draft(self.n_draft, first, B, E)
