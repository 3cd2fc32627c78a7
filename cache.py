"""
The KV cache of the engine and attention over it, in two layouts with one interface (report 3.4 leaves this to vLLM).

    Rows      one contiguous row of columns per sequence: a batch is a view, nothing is gathered. CPU.
    Blocks    paged: blocks of fixed size and a block table, for kernels.decode. GPU (the tests run it on a CPU).

What the engine calls:

    context(first, positions, cos, sin)   -> ForwardContext, made once per forward: where new keys and values go
    layers[i].attend(q, k, v)             append k and v, then attend; model.py's Block knows this object as `cache`
    copy(found, targets, n_columns)       move cached tokens to other rows (Engine.compact)

and of Blocks alone, where memory has to be shared out:

    allocate(key, n), free(key)           blocks for a request of n tokens
    map_row(row, key)                     the engine's row `row` now belongs to request `key`
    locate(rows)                          the blocks of these rows, as copy() takes them; Rows takes the rows themselves

The memory itself is taken once, in __init__, and never grows.

Bit-equal rows (Rows, fp32). The engine promises that a sequence does not depend on the sequences beside it. Measured on
torch 2.13 with MKL, asserted in tests/test_engine.py:

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
from torch import Tensor

from kernels.decode import decode_attention

MIN_ROWS, KEY_STEP, SUM_PIECE = 4, 16, 128


@dataclass
class ForwardContext:
    """
    One forward over Q new tokens of each of B sequences: where their keys and values go, and what each token sees.
    Made once per forward, shared by all layers. The last fields belong to one layout each.
    """
    first: int                              # the sequences are rows first .. first + B - 1 of the engine
    shape: tuple[int, int]                  # B, Q
    positions: Tensor                       # int64 [B,Q]; a token sees the columns up to its own position
    slot_mapping: Tensor                    # int64 [B*Q*K] or [B*Q]: flat index of each new key and value in the cache
    cos: Tensor                             # [B,Q,d], the rotations of RoPE at the positions
    sin: Tensor
    n_columns: int = 0                      # Rows: L, the columns that any token sees, a multiple of KEY_STEP
    query_rows: int = 0                     # Rows: rows that one token and one KV head take in attend(), at least G
    bias: Tensor | None = None              # Rows: 0 where a token may look, -inf elsewhere; shapes in attend()
    block_table: Tensor | None = None       # Blocks: int32 [B, max_blocks]
    lengths: Tensor | None = None           # Blocks: int32 [B], tokens in each sequence after this forward


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


# ---- Rows: one row per sequence -------------------------------------------------------------------------------------

class Rows:
    """
    kv [n_layer, S, K, C, 2d]: keys and values side by side. Head before column, so that a batch of heads is one view.

    n_layer layers (the trunk's, then the MTP layers'); S rows; K KV heads with G query heads each; C columns, one per
    token, rounded up to a multiple of KEY_STEP; d head width.
    """
    static_shapes = False                   # the shapes of a forward follow the longest sequence

    def __init__(self, n_layer: int, S: int, K: int, G: int, columns: int, d: int, dtype: torch.dtype, device):
        self.columns = -(-columns // KEY_STEP) * KEY_STEP
        # the G query heads of one KV head are rows of one matrix, repeated until there are MIN_ROWS or more: R rows
        self.K, self.G, self.R = K, G, -(-MIN_ROWS // G) * G
        self.kv = torch.zeros(n_layer, S, K, self.columns, 2 * d, dtype=dtype, device=device)
        self.layers = [RowLayer(self, kv) for kv in self.kv]
        self.arange = torch.arange(self.columns, device=device)
        self.heads = torch.arange(S * K, device=device).view(S, 1, K) * self.columns   # where a head's columns begin
        self.zero, self.minus_inf = (torch.tensor(x, dtype=dtype, device=device) for x in (0.0, -math.inf))

    def context(self, first: int, positions: Tensor, cos: Tensor, sin: Tensor,
                columns: Tensor | None = None) -> ForwardContext:
        """
        positions int64 [B,Q] of new tokens in rows first and on; cos, sin [B,Q,d] at these positions; columns int64
        [B,Q]: the column that each token fills, default its position.
        """
        B, Q = positions.shape
        columns = positions if columns is None else columns
        L = min(-(-(int(positions.max()) + 1) // KEY_STEP) * KEY_STEP, self.columns)
        bias = torch.where(self.arange[:L] <= positions[:, :, None], self.zero, self.minus_inf)         # [B,Q,L]
        rows = self.G if Q * self.G >= MIN_ROWS else self.R
        return ForwardContext(
            first, (B, Q), positions, (self.heads[first:first + B] + columns[:, :, None]).flatten(), cos, sin,
            n_columns=L, query_rows=rows, bias=bias.repeat_interleave(self.K, 0) if Q == 1              # [B*K,1,L]
            else bias.repeat_interleave(rows, 1)[:, None])                                              # [B,1,Q*rows,L]

    def copy(self, found: list[int], targets: list[int], n_columns: int) -> None:
        """The first n_columns columns of the found rows into rows `targets`; all is read before anything is written."""
        self.kv[:, targets, :, :n_columns] = self.kv[:, found, :, :n_columns]


class PackedRows(Rows):
    """The same memory in the order of kernels/cpu/decode_cpu.c: 16 columns of all heads, then the next 16."""
    def copy(self, found: list[int], targets: list[int], n_columns: int) -> None:
        pieces = self.kv.view(*self.kv.shape[:2], self.columns // KEY_STEP, -1)
        n = -(-n_columns // KEY_STEP)
        # one slice per row: indexing with a tensor takes several times as long
        copies = {i: pieces[:, i, :n].clone() for i in set(found)}
        for i, j in zip(found, targets, strict=True):
            pieces[:, j, :n] = copies[i]


class RowLayer:
    """One layer of Rows; what Block.forward knows as `cache`."""
    def __init__(self, owner: Rows, kv: Tensor):
        self.kv, self.d, self.K, self.G = kv, kv.shape[-1] // 2, owner.K, owner.G
        self.flat = kv.view(-1, kv.shape[-1])                       # [S*K*C, 2d]
        self.ctx: ForwardContext | None = None                      # the engine sets it before each forward
        self.views = (None, None, None)                             # the last views of keys_and_values()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k, v [B,Q,K,d], then attends: q [B,Q,H,d] -> [B,Q,H,d]."""
        ctx, (B, Q), rows = self.ctx, self.ctx.shape, self.ctx.query_rows
        self.flat.index_copy_(0, ctx.slot_mapping, torch.cat([k, v], -1).view(-1, 2 * self.d))
        q = (q * self.d ** -0.5).view(B, Q, self.K, self.G, self.d).transpose(1, 2)                     # [B,K,Q,G,d]
        q = q.repeat(1, 1, 1, rows // self.G, 1).reshape(B * self.K, Q * rows, self.d)
        o = attend(q, *self.keys_and_values(), ctx.bias).view(B, self.K, Q, rows, self.d)[:, :, :, :self.G]
        return o.transpose(1, 2).reshape(B, Q, -1, self.d)

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Keys [B*K,d,L] and values [B*K,L,d] that the sequences of this forward may see; the last views are kept."""
        ctx = self.ctx
        window = ctx.first, ctx.shape[0], ctx.n_columns
        if self.views[0] != window:
            kv = self.kv[ctx.first:ctx.first + ctx.shape[0]].flatten(0, 1)[:, :ctx.n_columns]
            k, v = kv.split(self.d, -1)
            self.views = window, k.mT, v
        return self.views[1:]


# ---- Blocks: paged, with a block table ------------------------------------------------------------------------------

class Blocks:
    """
    A paged cache: kv [2, n_layer, n_blocks + 1, block, K, d], keys and values; block table int32 [S, max_blocks].

    Block 0 is a trash block: unused entries of the table point at it, so that padding, and rows that only fill up a
    batch, have somewhere to write. A request allocates at admission all blocks that it can ever need. So a request that
    runs never waits for memory and is never pre-empted.

    Parameters as in Rows; block: tokens per block; n_blocks: blocks of memory beside the trash block.
    """
    static_shapes = True                    # the shapes of a forward depend on the batch size alone, for CUDA graphs

    def __init__(self, n_layer: int, S: int, K: int, G: int, columns: int, d: int, dtype: torch.dtype, device,
                 block: int, n_blocks: int):
        self.block, self.columns = block, -(-columns // block) * block
        self.kv = torch.zeros(2, n_layer, n_blocks + 1, block, K, d, dtype=dtype, device=device)
        self.layers = [BlockLayer(k, v) for k, v in zip(*self.kv, strict=True)]
        self.block_table = torch.zeros(S, self.columns // block, dtype=torch.int32, device=device)
        self.arange = torch.arange(self.columns, device=device)
        self.free_blocks = list(range(n_blocks, 0, -1))
        self.owned: dict[object, list[int]] = {}                    # request id -> its blocks

    def context(self, first: int, positions: Tensor, cos: Tensor, sin: Tensor,
                columns: Tensor | None = None) -> ForwardContext:
        """As Rows.context."""
        (B, Q), columns = positions.shape, positions if columns is None else columns
        table = self.block_table[first:first + B]
        block = table.gather(1, columns // self.block).long()       # [B,Q]
        return ForwardContext(first, (B, Q), positions, (block * self.block + columns % self.block).flatten(), cos, sin,
                              block_table=table, lengths=(positions[:, -1] + 1).int())

    def locate(self, rows: list[int]) -> Tensor:
        """The blocks of these rows, for copy(); taken before map_row changes the table."""
        return self.block_table[rows].long()

    def copy(self, found: Tensor, targets: list[int], n_columns: int) -> None:
        """
        Contents of the found blocks into the blocks that the target rows have now. A request that only moved to another
        row still has its own blocks, and nothing is copied for it.
        """
        n = -(-n_columns // self.block)
        i, j = found[:, :n].flatten(), self.block_table[targets, :n].long().flatten()
        differ = i != j
        self.kv[:, :, j[differ]] = self.kv[:, :, i[differ]]

    def blocks_for(self, n: int) -> int:
        """Blocks that n tokens take."""
        return -(-n // self.block)

    def allocate(self, key, n: int) -> bool:
        """Blocks for the n tokens of request `key`; False, and nothing is taken, when too few are free."""
        if self.blocks_for(n) > len(self.free_blocks):
            return False
        self.owned[key] = [self.free_blocks.pop() for _ in range(self.blocks_for(n))]
        return True

    def free(self, key) -> None:
        """Give the blocks of request `key` back."""
        self.free_blocks += self.owned.pop(key)

    def map_row(self, row: int, key) -> None:
        """The engine's row `row` uses the blocks of request `key` from now on; key None: the trash block alone."""
        blocks = self.owned[key] if key is not None else []
        entries = self.block_table[row].zero_()
        entries[:len(blocks)] = torch.tensor(blocks, dtype=torch.int32)


class BlockLayer:
    """One layer of Blocks; what Block.forward knows as `cache`. kernels.gemv.block_step reads k, v and ctx too."""
    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v                                       # [n_blocks + 1, block, K, d]
        self.ctx: ForwardContext | None = None                      # the engine sets it before each forward

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As RowLayer.attend. Up to 8 tokens per sequence take kernels.decode; longer chunks of prefill torch's own."""
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
