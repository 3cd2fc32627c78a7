"""
The KV cache of the engine and attention over it, in two layouts with one interface (report 3.4 leaves this to
vLLM).

    Rows     one row of columns per sequence: a view, no gather, no table. CPU.
    Blocks   fixed blocks and a block table, for kernels.decode. GPU (runs on a CPU too, which is how it is
    tested).

Both know: plan(first, positions, write), layers[i].attend(q, k, v), copy(sources, targets, used), and the
ledger room_for / take / give / assign, which only Blocks needs. Memory is allocated once, here, and never
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


class Plan:
    """Where the Q new tokens of B sequences go and what they see; made once a forward for all layers."""
    first: int                          # the B sequences are rows first .. first + B - 1
    shape: tuple[int, int]              # B, Q
    positions: Tensor                   # int64 [B,Q]; a token sees the columns up to its position
    where: Tensor                       # flat index of each new key and value in the cache


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """
    softmax(q k^T + bias) v with bits that depend on nothing but the row itself.
    q [B,Q,H,d], scaled already; k, v [B*K,L,d]; bias [B,1,R,L] as Rows.plan makes it. -> [B,Q,H,d].
    """
    B, Q, H, d = q.shape
    K, L = k.shape[0] // B, k.shape[1]
    G, n = H // K, Q * H // K                                       # n rows of q read one KV head
    q = q.unflatten(2, (K, G)).transpose(1, 2)                      # [B,K,Q,G,d]
    if n < ROWS:
        q = q.reshape(B, K, 1, n, d).expand(-1, -1, -(-ROWS // n), -1, -1)
    q = q.reshape(B * K, -1, d)                                     # [B*K,R,d]
    p = torch.bmm(q, k.mT).view(B, K, -1, L).add_(bias).softmax(-1).view(B * K, -1, L)
    o = torch.bmm(p[:, :, :PIECE], v[:, :PIECE])                    # [B*K,R,d]
    for c in range(PIECE, L, PIECE):
        o.baddbmm_(p[:, :, c:c + PIECE], v[:, c:c + PIECE])
    return o[:, :n].view(B, K, Q, G, d).transpose(1, 2).reshape(B, Q, H, d)


# ---- a row a sequence --------------------------------------------------------------------------------------

class Rows:
    """kv [n_layer, S, K, C, 2d]: keys and values side by side, head-major, so that a batch of heads is one
view."""
    static = False                      # shapes follow the longest sequence

    def __init__(self, n_layer: int, S: int, K: int, G: int, columns: int, d: int, dtype, device):
        self.columns, self.G = -(-columns // KEYS) * KEYS, G
        self.kv = torch.zeros(n_layer, S, K, self.columns, 2 * d, dtype=dtype, device=device)
        self.layers = [RowLayer(self, kv) for kv in self.kv]
        self.column = torch.arange(self.columns, device=device)
        self.heads = torch.arange(S * K, device=device).view(S, 1, K) * self.columns
        self.zero, self.never = (torch.tensor(x, dtype=dtype, device=device) for x in (0.0, -math.inf))

    def plan(self, first: int, positions: Tensor, write: Tensor | None = None) -> Plan:
        """positions int64 [B,Q]; write: the column each token fills, default its position."""
        plan, (B, Q) = Plan(), positions.shape
        plan.first, plan.shape, plan.positions = first, (B, Q), positions
        columns = positions if write is None else write
        plan.where = (self.heads[first:first + B] + columns[:, :, None]).flatten()     # [B*Q*K]
        plan.L = L = min(-(-(int(positions.max()) + 1) // KEYS) * KEYS, self.columns)
        bias = torch.where(self.column[:L] <= positions[:, :, None], self.zero, self.never)     # [B,Q,L]
        plan.last_bias = bias[:, None, -1:]                      # [B,1,1,L], for the last token of each alone
        if Q > 1:                                                   # one row for each row of q in attend()
            bias = bias.repeat_interleave(self.G, 1).repeat(1, -(-ROWS // (Q * self.G)), 1)
        plan.bias = bias[:, None]                                   # [B,1,1 or R,L]
        return plan

    def hold(self, rows: Tensor) -> Tensor:
        return rows                                                 # what copy() needs to find the contents

    def copy(self, held: Tensor, targets: Tensor, used: int) -> None:
        """The first `used` columns of the held rows over rows targets; all is read before it is written."""
        self.kv[:, targets, :, :used] = self.kv[:, held, :, :used]

    def room_for(self, n: int) -> bool:
        return True                                                 # a free row always holds max_len tokens

    def take(self, key, n: int) -> None: ...

    def give(self, key) -> None: ...

    def assign(self, row: int, key) -> None: ...


class RowLayer:
    """One layer of Rows; what Block.forward knows as `cache`."""
    def __init__(self, owner: Rows, kv: Tensor):
        self.kv, self.d, self.plan = kv, kv.shape[-1] // 2, None
        self.flat = kv.view(-1, kv.shape[-1])                       # [S*K*C, 2d]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k, v [B,Q,K,d], then attends q [B,Q,H,d] -> [B,Q,H,d]."""
        self.flat.index_copy_(0, self.plan.where, torch.cat([k, v], -1).view(-1, 2 * self.d))
        return self.look(q * self.d ** -0.5, self.plan.bias)

    def attend_merged(self, qkv: Tensor, last: bool) -> Tensor:
        """The same for fast.py: qkv [B*Q, (H + 2K) d], q scaled. -> [B*Q, H d], with last [B, H d]."""
        kv_width = 2 * self.kv.shape[1] * self.d
        q, kv = qkv.split([qkv.shape[1] - kv_width, kv_width], 1)
        self.flat.index_copy_(0, self.plan.where, kv.reshape(-1, 2 * self.d))
        q = q.view(*self.plan.shape, -1, self.d)                    # [B,Q,H,d]
        o = self.look(q[:, -1:], self.plan.last_bias) if last else self.look(q, self.plan.bias)
        return o.flatten(2).flatten(0, 1)

    def look(self, q: Tensor, bias: Tensor) -> Tensor:
        plan = self.plan
        kv = self.kv[plan.first:plan.first + plan.shape[0]].flatten(0, 1)[:, :plan.L]   # [B*K,L,2d], a view
        return attend(q, *kv.split(self.d, -1), bias)


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
        self.free, self.owned = list(range(n, 0, -1)), {}           # owned: request id -> its blocks

    def plan(self, first: int, positions: Tensor, write: Tensor | None = None) -> Plan:
        plan, (B, Q) = Plan(), positions.shape
        plan.first, plan.shape, plan.positions = first, (B, Q), positions
        columns = positions if write is None else write
        plan.table = self.table[first:first + B]
        block = plan.table.gather(1, columns // self.block).long()  # [B,Q]
        plan.where = (block * self.block + columns % self.block).flatten()
        plan.lengths = (positions[:, -1] + 1).int()
        return plan

    def hold(self, rows: Tensor) -> Tensor:
        return self.table[rows].long()                              # before assign() changes the table

    def copy(self, held: Tensor, targets: Tensor, used: int) -> None:
        """Contents of the held blocks into those the targets have now; who only moved keeps its own."""
        n = -(-used // self.block)
        i, j = held[:, :n].flatten(), self.table[targets, :n].long().flatten()
        differ = i != j
        self.kv[:, :, j[differ]] = self.kv[:, :, i[differ]]

    def need(self, n: int) -> int:
        return -(-n // self.block)

    def room_for(self, n: int) -> bool:
        return self.need(n) <= len(self.free)

    def take(self, key, n: int) -> None:
        self.owned[key] = [self.free.pop() for _ in range(self.need(n))]

    def give(self, key) -> None:
        self.free += self.owned.pop(key)

    def assign(self, row: int, key) -> None:
        """The row of the table that the engine's row uses from now on; key None: all scrap."""
        blocks = self.owned[key] if key is not None else []
        row = self.table[row].zero_()
        row[:len(blocks)] = torch.tensor(blocks, dtype=torch.int32)


class BlockLayer:
    def __init__(self, owner: Blocks, k: Tensor, v: Tensor):
        self.k, self.v, self.plan = k, v, None                      # [n_blocks, block, K, d]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan, Q = self.plan, q.shape[1]
        self.k.flatten(0, 1).index_copy_(0, plan.where, k.flatten(0, 1))
        self.v.flatten(0, 1).index_copy_(0, plan.where, v.flatten(0, 1))
        if Q <= 8:
            return decode_attention(q, self.k, self.v, plan.table, plan.lengths)
        # prompts: the sequences' blocks side by side, then ordinary masked attention
        n = -(-(int(plan.positions.max()) + 1) // self.k.shape[1])
        # [B,K,L,d]
        k, v = (t[plan.table[:, :n].long()].flatten(1, 2).transpose(1, 2) for t in (self.k, self.v))
        mask = torch.arange(k.shape[2], device=q.device) <= plan.positions[:, :, None]               # [B,Q,L]
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask[:, None], enable_gqa=True)
        return o.transpose(1, 2)
