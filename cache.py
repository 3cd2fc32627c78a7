"""
The KV cache of the engine and attention over it, in two layouts with one interface (report 3.4 leaves this to
vLLM).

    Rows     one row of columns per sequence: a view, no gather, no table. CPU.
    Blocks   fixed blocks and a block table, for kernels.decode. GPU (runs on a CPU too, which is how it is
    tested).

Both know: context(first, positions, write), layers[i].attend(q, k, v), copy(sources, targets, used), and the
ledger can_allocate / allocate / free / map_row, which only Blocks needs. Memory is allocated once, here, and never
grows.

Bit-equal rows (Rows, fp32). Measured on torch 2.13 with MKL, asserted in tests/test_engine.py: a row of a
matrix product does not depend on the other rows once there are at least ROWS = 4 of them (1, 2 and 3 take
other code); sums over keys do not depend on masked keys when their number is a multiple of KEYS = 16 and
probabilities meet values in pieces of PIECE = 128 (MKL splits a longer sum in places that depend on its
length). SDPA has no such rule to offer.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decode import decode_attention

ROWS, KEYS, PIECE = 4, 16, 128


class ForwardContext:
    """Where the Q new tokens of B sequences go and what they see; made once a forward for all layers."""
    first: int                          # the B sequences are rows first .. first + B - 1
    shape: tuple[int, int]              # B, Q
    positions: Tensor                   # int64 [B,Q]; a token sees the columns up to its position
    slot_mapping: Tensor                       # flat index of each new key and value in the cache


def attend(q: Tensor, kT: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """
    softmax(q k^T + bias) v with bits that depend on nothing but the row itself. q [B*K,n,d], scaled, n >=
    ROWS; kT [B*K,d,L]; v [B*K,L,d]; bias [B*K,1,L], or [B,1,n,L] where tokens see different keys. ->
    [B*K,n,d].
    """
    if bias.ndim == 3:
        s = torch.baddbmm(bias, q, kT)                              # [B*K,n,L]
    else:
        s = torch.bmm(q, kT)
        s.view(bias.shape[0], -1, *s.shape[1:]).add_(bias)
    p, L = s.softmax(-1), v.shape[1]
    if L <= PIECE:
        return torch.bmm(p, v)
    o = torch.bmm(p[:, :, :PIECE], v[:, :PIECE])
    for c in range(PIECE, L, PIECE):
        o.baddbmm_(p[:, :, c:c + PIECE], v[:, c:c + PIECE])
    return o


# ---- a row a sequence --------------------------------------------------------------------------------------

class Rows:
    """kv [n_layer, S, K, C, 2d]: keys and values side by side; head-major: a batch of heads is one view."""
    static = False                      # shapes follow the longest sequence

    def __init__(self, n_layer: int, S: int, K: int, G: int, columns: int, d: int, dtype, device):
        self.columns = -(-columns // KEYS) * KEYS
        # the G query heads that read one KV head are rows of one matrix, repeated to R until there are enough
        self.K, self.G, self.R = K, G, -(-ROWS // G) * G
        self.kv = torch.zeros(n_layer, S, K, self.columns, 2 * d, dtype=dtype, device=device)
        self.layers = [RowLayer(self, kv) for kv in self.kv]
        self.column = torch.arange(self.columns, device=device)
        self.heads = torch.arange(S * K, device=device).view(S, 1, K) * self.columns
        self.zero, self.never = (torch.tensor(x, dtype=dtype, device=device) for x in (0.0, -math.inf))

    def context(self, first: int, positions: Tensor, write: Tensor | None = None) -> ForwardContext:
        """positions int64 [B,Q]; write: the column each token fills, default its position."""
        ctx, (B, Q) = ForwardContext(), positions.shape
        ctx.first, ctx.shape, ctx.positions = first, (B, Q), positions
        columns = positions if write is None else write
        ctx.slot_mapping = (self.heads[first:first + B] + columns[:, :, None]).flatten()     # [B*Q*K]
        ctx.L = L = min(-(-(int(positions.max()) + 1) // KEYS) * KEYS, self.columns)
        bias = torch.where(self.column[:L] <= positions[:, :, None], self.zero, self.never)     # [B,Q,L]
        ctx.g = self.G if Q * self.G >= ROWS else self.R           # rows a token has in attend()
        # for each sequence's last token alone, and for all
        ctx.last_bias = bias[:, -1:].repeat_interleave(self.K, 0)  # [B*K,1,L]
        ctx.bias = ctx.last_bias if Q == 1 else bias.repeat_interleave(ctx.g, 1)[:, None]    # [B,1,Q*g,L]
        return ctx

    def hold(self, rows: list[int]) -> list[int]:
        return rows                                                 # what copy() needs to find the contents

    def copy(self, held: list[int], targets: list[int], used: int) -> None:
        """The first `used` columns of the held rows over rows targets; all is read before it is written."""
        self.kv[:, targets, :, :used] = self.kv[:, held, :, :used]

    def can_allocate(self, n: int) -> bool:
        return True                                                 # a free row always holds max_len tokens

    def allocate(self, key, n: int) -> None: ...

    def free(self, key) -> None: ...

    def map_row(self, row: int, key) -> None: ...


class PackedRows(Rows):
    """The same memory as decode_cpu.c lays it out: 16 columns of all heads, then the next 16."""
    def copy(self, held: list[int], targets: list[int], used: int) -> None:
        pieces, used = self.kv.view(*self.kv.shape[:2], self.columns // KEYS, -1), -(-used // KEYS)
        # a slice a row: indexing with a tensor takes several times as long
        copies = {i: pieces[:, i, :used].clone() for i in set(held)}
        for i, j in zip(held, targets, strict=True):
            pieces[:, j, :used] = copies[i]


class RowLayer:
    """One layer of Rows; what Block.forward knows as `cache`."""
    def __init__(self, owner: Rows, kv: Tensor):
        self.kv, self.d, self.K, self.G, self.R = kv, kv.shape[-1] // 2, owner.K, owner.G, owner.R
        self.flat, self.ctx, self.window = kv.view(-1, kv.shape[-1]), None, (None, None, None)  # [S*K*C, 2d]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k, v [B,Q,K,d], then attends q [B,Q,H,d] -> [B,Q,H,d]."""
        (B, Q), g, ctx = self.ctx.shape, self.ctx.g, self.ctx
        self.flat.index_copy_(0, ctx.slot_mapping, torch.cat([k, v], -1).view(-1, 2 * self.d))
        q = (q * self.d ** -0.5).view(B, Q, self.K, self.G, self.d).transpose(1, 2)     # [B,K,Q,G,d]
        q = q.repeat(1, 1, 1, g // self.G, 1).reshape(B * self.K, Q * g, self.d)
        o = attend(q, *self.seen(), ctx.bias).view(B, self.K, Q, g, self.d)[:, :, :, :self.G]
        return o.transpose(1, 2).reshape(B, Q, -1, self.d)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Keys [B*K,d,L] and values [B*K,L,d] that the plan's rows may see; the last views are kept."""
        ctx = self.ctx
        which = ctx.first, ctx.shape[0], ctx.L
        if self.window[0] != which:
            kv = self.kv[ctx.first:ctx.first + ctx.shape[0]].flatten(0, 1)[:, :ctx.L]
            k, v = kv.split(self.d, -1)
            self.window = which, k.mT, v
        return self.window[1:]


# ---- blocks and a table ------------------------------------------------------------------------------------

class Blocks:
    """
    k, v [n_layer, n_blocks, block, K, d]; table int32 [S, max_blocks]. Block 0 is scrap: unused table entries
    point at it, so padding and rows that only fill up a batch have a place to write. A request takes all the
    blocks it can ever need when it is admitted: a request that is running never waits for memory, and nothing
    is ever pushed out.
    """
    static = True                       # shapes depend on the batch alone: fit for CUDA graphs

    def __init__(self, n_layer: int, S: int, K: int, G: int, columns: int, d: int, dtype, device,
                 block: int, n: int):
        self.block, self.columns = block, -(-columns // block) * block
        self.kv = torch.zeros(2, n_layer, n + 1, block, K, d, dtype=dtype, device=device)
        self.layers = [BlockLayer(self, k, v) for k, v in zip(*self.kv, strict=True)]
        self.table = torch.zeros(S, self.columns // block, dtype=torch.int32, device=device)
        self.column = torch.arange(self.columns, device=device)
        self.free_blocks, self.owned = list(range(n, 0, -1)), {}           # owned: request id -> its blocks

    def context(self, first: int, positions: Tensor, write: Tensor | None = None) -> ForwardContext:
        ctx, (B, Q) = ForwardContext(), positions.shape
        ctx.first, ctx.shape, ctx.positions = first, (B, Q), positions
        columns = positions if write is None else write
        ctx.table = self.table[first:first + B]
        block = ctx.table.gather(1, columns // self.block).long()  # [B,Q]
        ctx.slot_mapping = (block * self.block + columns % self.block).flatten()
        ctx.lengths = (positions[:, -1] + 1).int()
        return ctx

    def hold(self, rows: list[int]) -> Tensor:
        return self.table[rows].long()                              # before assign() changes the table

    def copy(self, held: Tensor, targets: list[int], used: int) -> None:
        """Contents of the held blocks into those the targets have now; who only moved keeps its own."""
        n = -(-used // self.block)
        i, j = held[:, :n].flatten(), self.table[targets, :n].long().flatten()
        differ = i != j
        self.kv[:, :, j[differ]] = self.kv[:, :, i[differ]]

    def need(self, n: int) -> int:
        return -(-n // self.block)

    def can_allocate(self, n: int) -> bool:
        return self.need(n) <= len(self.free_blocks)

    def allocate(self, key, n: int) -> None:
        self.owned[key] = [self.free_blocks.pop() for _ in range(self.need(n))]

    def free(self, key) -> None:
        self.free_blocks += self.owned.pop(key)

    def map_row(self, row: int, key) -> None:
        """The row of the table that the engine's row uses from now on; key None: all scrap."""
        blocks = self.owned[key] if key is not None else []
        row = self.table[row].zero_()
        row[:len(blocks)] = torch.tensor(blocks, dtype=torch.int32)


class BlockLayer:
    def __init__(self, owner: Blocks, k: Tensor, v: Tensor):
        self.k, self.v, self.ctx = k, v, None                      # [n_blocks, block, K, d]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx, Q = self.ctx, q.shape[1]
        self.k.flatten(0, 1).index_copy_(0, ctx.slot_mapping, k.flatten(0, 1))
        self.v.flatten(0, 1).index_copy_(0, ctx.slot_mapping, v.flatten(0, 1))
        if Q <= 8:
            return decode_attention(q, self.k, self.v, ctx.table, ctx.lengths)
        # prompts: the sequences' blocks side by side, then ordinary masked attention
        n = -(-(int(ctx.positions.max()) + 1) // self.k.shape[1])
        # [B,K,L,d]
        k, v = (t[ctx.table[:, :n].long()].flatten(1, 2).transpose(1, 2) for t in (self.k, self.v))
        mask = torch.arange(k.shape[2], device=q.device) <= ctx.positions[:, :, None]               # [B,Q,L]
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask[:, None], enable_gqa=True)
        return o.transpose(1, 2)
