"""
SFT packing: whole samples into rows of T tokens, nothing cut (report section 3.1: packed to 32,768 tokens).

Best fit decreasing: longest sample first, each into the fullest row that still has room. 500,000 log-normal
samples fill 99.99% of the slots. A sample longer than T is dropped and counted: a cut answer would teach to
stop midway. Each sample keeps its own positions and attends only to itself. "Batch 128" of the report is read
as 128 packed rows.
"""
from bisect import bisect_left, insort

import numpy as np

from configurator import UserError
from data.loader import make_batch


def best_fit(lengths, T):
    """
    lengths: tokens per sample; T: tokens per row. -> (rows: lists of sample indices, dropped: indices longer
    than T).

    By hand, T = 10, lengths 6 5 4 3 2 12: sample 5 is dropped; 6 opens row 0, 5 opens row 1, 4 goes to row 0
    (4 free is tighter than 5), 3 goes to row 1, 2 fills it: rows [[0, 2], [1, 3, 4]].
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    rows, dropped = [], []
    with_room, sizes = {}, []            # free slots -> rows with exactly that many; those sizes, sorted
    for i in order.tolist():
        n = int(lengths[i])
        if n > T:
            dropped.append(i)
            continue
        at = bisect_left(sizes, n)       # the smallest gap that takes n
        if at < len(sizes):
            free = sizes[at]
            row = with_room[free].pop()
            if not with_room[free]:
                del with_room[free], sizes[at]
        else:
            free, row = T, len(rows)
            rows.append([])
        rows[row].append(i)
        if left := free - n:
            if left not in with_room:
                insort(sizes, left)
                with_room[left] = []
            with_room[left].append(row)
    return rows, sorted(dropped)


class PackedLoader:
    """
    Packed SFT batches, deterministic and resumable; every epoch visits each row once in a new order.

    samples   sequence of (ids, mask), equally long; mask 1 = train on this token (Tokenizer.chat)
    pad_id    fills the ends of rows; never trained on, never attended to from a sample
    The last rows of an epoch and the first of the next may share a batch, so all batches have one size.
    """
    def __init__(self, samples, seq_len, pad_id, n_mtp=0, seed=0, vocab_size=None, max_seq_len=None):
        if max_seq_len and seq_len > max_seq_len:
            raise UserError(f"seq_len = {seq_len} is longer than the model's context, "
                            f"max_seq_len = {max_seq_len}")
        for k, (ids, mask) in enumerate(samples):
            if len(ids) != len(mask):
                raise UserError(f"sample {k}: {len(ids)} ids but {len(mask)} mask values")
            if len(ids) and vocab_size is not None and not 0 <= np.min(ids) <= np.max(ids) < vocab_size:
                raise UserError(f"sample {k}: token id {np.max(ids)} does not fit {vocab_size} rows")
        self.samples, self.T, self.ahead, self.pad_id, self.seed = samples, seq_len, 1 + n_mtp, pad_id, seed
        lengths = [len(ids) for ids, _ in samples]
        self.rows, dropped = best_fit(lengths, seq_len)
        self.n_dropped = len(dropped)
        if not self.rows:
            raise UserError(f"no sample fits a row of {seq_len} tokens "
                            f"({len(dropped)} of {len(samples)} are longer)")
        kept = sum(lengths) - sum(lengths[i] for i in dropped)
        self.fill = kept / (len(self.rows) * seq_len)      # share of slots that hold a token of a sample
        self.taken = 0                                     # rows taken over the whole run

    def order(self, epoch):
        # best fit leaves the longest samples in the first rows: shuffle
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.rows))

    def row(self, r):
        """Row r -> ids, docs, mask [T+A]; docs counts the samples in the row from 0 and is -1 on padding."""
        width = self.T + self.ahead
        ids, docs = np.full(width, self.pad_id, np.int64), np.full(width, -1, np.int64)
        mask, at = np.zeros(width, bool), 0
        for d, i in enumerate(self.rows[r]):
            tokens, train = self.samples[i]
            end = at + len(tokens)
            ids[at:end], docs[at:end], mask[at:end] = tokens, d, train
            mask[at] = False               # nothing inside the sample predicts its first token
            at = end
        return ids, docs, mask

    def next_batch(self, batch_size, rank=0, world=1):
        """
        The next batch_size rows, of which this rank gets B*rank//world .. B*(rank+1)//world. ->
        data.loader.Batch.
        """
        lo, hi = (self.taken + batch_size * r // world for r in (rank, rank + 1))
        rows, orders = [], {}
        for k in range(lo, hi):
            epoch, at = divmod(k, len(self.rows))
            if epoch not in orders:
                orders[epoch] = self.order(epoch)
            rows.append(self.row(orders[epoch][at]))
        self.taken += batch_size
        width = self.T + self.ahead
        ids, docs, mask = (np.stack(x) if rows else np.zeros((0, width), np.int64)
                           for x in (zip(*rows, strict=True) if rows else ((), (), ())))          # [B,T+A]
        return make_batch(ids, docs, self.T, mask)

    def epochs(self):
        return self.taken / len(self.rows)

    def state_dict(self):
        return {"taken": self.taken, "seed": self.seed, "rows": len(self.rows), "seq_len": self.T}

    def load_state_dict(self, state):
        """Continue exactly. ValueError if data, row length or seed are not those of the saved run."""
        now = self.state_dict()
        for key in ("seed", "rows", "seq_len"):
            if state[key] != now[key]:
                raise UserError(f"packed loader: {key} = {now[key]}, the saved run had {state[key]}")
        self.taken = state["taken"]
