"""
SFT packing: whole samples into rows of T tokens, none of them cut (report section 3.1: packed to 32,768 tokens).

Best fit decreasing: the longest sample first, each into the fullest row that still has room for it. 500,000 samples of
log-normal lengths fill 99.99% of the tokens of the rows. A sample longer than T is dropped and counted: a cut answer
would teach the model to stop midway. Each sample has its own positions and attends only to itself. We read the report's
"batch 128" as 128 packed rows.

    pytest tests/test_pack.py      # no script of its own; sft.py uses it
"""
import zlib
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from configurator import UserError
from data.loader import Batch, make_batch


def best_fit(lengths: Sequence[int], T: int) -> tuple[list[list[int]], list[int]]:
    """
    lengths: tokens of each sample; T: tokens of a row. -> (rows: the indices of the samples in each, dropped: indices
    of the samples longer than T).

    By hand, T = 10, lengths 6 5 4 3 2 12: sample 5 is dropped; 6 opens row 0, 5 opens row 1, 4 goes to row 0 (4 free
    tokens fit tighter than 5), 3 goes to row 1, 2 fills it: rows [[0, 2], [1, 3, 4]].
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    rows, dropped = [], []
    rows_with, sizes = {}, []            # free tokens -> the rows that have exactly that many; the keys, sorted
    for i in order.tolist():
        n = int(lengths[i])
        if n > T:
            dropped.append(i)
            continue
        at = bisect_left(sizes, n)       # the smallest free space that takes n tokens
        if at < len(sizes):
            free = sizes[at]
            row = rows_with[free].pop()
            if not rows_with[free]:
                del rows_with[free], sizes[at]
        else:
            free, row = T, len(rows)
            rows.append([])
        rows[row].append(i)
        if left := free - n:
            if left not in rows_with:
                insort(sizes, left)
                rows_with[left] = []
            rows_with[left].append(row)
    return rows, sorted(dropped)


class PackedLoader:
    """
    Batches of packed rows, deterministic and resumable; every epoch visits each row once, in a new order.

    samples       sequence of (ids, mask), two sequences of one length; mask 1 = train on this token (Tokenizer.chat)
    seq_len       T, tokens of a row
    pad_id        fills the ends of rows; never trained on, never attended to from a sample
    n_mtp         MTP layers: a row carries A = 1 + n_mtp tokens of look-ahead for the targets, here always padding
    seed          of the orders
    vocab_size    rows of the embedding; when given, every id is checked against it
    max_seq_len   the model's context; when given, seq_len is checked against it

    The last rows of an epoch and the first of the next may share a batch, so that all batches have one size.

    Attributes: rows (best_fit), n_dropped samples longer than T, fill: share of the rows' tokens that belong to a
    sample. UserError for samples that do not fit the model, or if no sample fits a row.
    """
    def __init__(self, samples: Sequence[tuple[Sequence[int], Sequence[int]]], seq_len: int, pad_id: int,
                 n_mtp: int = 0, seed: int = 0, vocab_size: int | None = None, max_seq_len: int | None = None):
        if max_seq_len and seq_len > max_seq_len:
            raise UserError(f"seq_len = {seq_len} is longer than the model's context, max_seq_len = {max_seq_len}")
        self.fingerprint = 0                               # of all samples, in their order
        for k, (ids, mask) in enumerate(samples):
            if len(ids) != len(mask):
                raise UserError(f"sample {k}: {len(ids)} ids but {len(mask)} mask values")
            if len(ids) and vocab_size is not None and not 0 <= np.min(ids) <= np.max(ids) < vocab_size:
                raise UserError(f"sample {k}: token id {np.max(ids)} does not fit {vocab_size} rows")
            for part, dtype in ((ids, np.int64), (mask, bool)):
                self.fingerprint = zlib.crc32(np.asarray(part, dtype).tobytes(), self.fingerprint)
        self.samples, self.T, self.A, self.pad_id, self.seed = samples, seq_len, 1 + n_mtp, pad_id, seed
        lengths = [len(ids) for ids, _ in samples]
        self.rows, dropped = best_fit(lengths, seq_len)
        self.n_dropped = len(dropped)
        if not self.rows:
            raise UserError(f"no sample fits a row of {seq_len} tokens "
                            f"({len(dropped)} of {len(samples)} are longer)")
        kept = sum(lengths) - sum(lengths[i] for i in dropped)
        self.fill = kept / (len(self.rows) * seq_len)
        self.taken = 0                                     # rows taken over the whole training run

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row r -> ids, docs, mask [T+A]; docs numbers the samples in the row from 0 and is -1 on padding."""
        width = self.T + self.A
        ids, docs = np.full(width, self.pad_id, np.int64), np.full(width, -1, np.int64)
        mask, at = np.zeros(width, bool), 0
        for d, i in enumerate(self.rows[r]):
            tokens, train = self.samples[i]
            end = at + len(tokens)
            ids[at:end], docs[at:end], mask[at:end] = tokens, d, train
            mask[at] = False               # no token of the sample comes before its first, so nothing predicts it
            at = end
        return ids, docs, mask

    def next_batch(self, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's share of the next batch_size rows: batch_size*rank//world .. batch_size*(rank+1)//world - 1."""
        first, end = (self.taken + batch_size * r // world for r in (rank, rank + 1))
        rows, orders = [], {}
        for k in range(first, end):
            epoch, at = divmod(k, len(self.rows))
            if epoch not in orders:        # shuffled: best fit leaves the longest samples in the first rows
                orders[epoch] = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.rows))
            rows.append(self.row(orders[epoch][at]))
        self.taken += batch_size
        width = self.T + self.A
        ids, docs, mask = (np.stack(x) if rows else np.zeros((0, width), np.int64)
                           for x in (zip(*rows, strict=True) if rows else ((), (), ())))          # [B,T+A]
        return make_batch(ids, docs, self.T, mask)

    def epochs(self) -> float:
        """Epochs taken so far."""
        return self.taken / len(self.rows)

    def state_dict(self) -> dict:
        """What a checkpoint keeps: five numbers."""
        return {"taken": self.taken, "seed": self.seed, "rows": len(self.rows), "seq_len": self.T,
                "samples": self.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly there. UserError if data, row length or seed are not those of the saved run."""
        now = self.state_dict()
        for key in ("seed", "seq_len"):
            if state[key] != now[key]:
                raise UserError(f"packed loader: {key} = {now[key]}, the saved run had {state[key]}")
        if state["rows"] != now["rows"] or state.get("samples", now["samples"]) != now["samples"]:
            raise UserError(f"these are not the samples that the saved run was trained on: "
                            f"rows = {now['rows']}, fingerprint {now['samples']}; the saved run had {state['rows']}, "
                            f"{state.get('samples')}; give the same data and filters, or another --out for a new run")
        self.taken = state["taken"]
