"""
Mixture loader: rows of T tokens from several sources in exact proportions (report 2.1 and 2.3).

Stage 2 raises maths and code to ~70% of the tokens, stage 3 adds ~10% synthetic answers and goes from 8,192
to 32,768 tokens a row. The weights inside a stage are not in the report.

Everything is a pure function of (seed, the data, how much was taken), there is no random generator to save:
  - epoch e of a source is its shards, and the documents inside each shard, in permutations drawn from
    (seed, name, e), joined to one stream; a cursor per source counts the tokens taken;
  - each row goes to the source that is furthest behind its share (as in Megatron); its cursor moves by T;
  - so the state is a few small numbers, a batch is the same for any number of ranks, and T may change between
    stages.
Rows carry n_mtp + 1 tokens of look-ahead for the targets: the first tokens of the source's next row.

    python -m data.loader out/tiny/data web=0.7 maths=0.3     # shares, epochs, and some 10 M tokens a second
"""
import sys
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from configurator import UserError, one_line
from data.shards import Shards


@dataclass
class Batch:
    """
    B rows of T tokens with A = 1 + n_mtp tokens of look-ahead. Positions and cu_seqlens cover the T inputs
    only.
    """
    ids: torch.Tensor           # int64 [B,T+A]
    docs: torch.Tensor          # int64 [B,T+A], number of each token's document; changes at every boundary
    positions: torch.Tensor     # int64 [B,T], from its document's start, or the row's if that came later
    cu_seqlens: torch.Tensor    # int32 [n+1] over the flattened B*T inputs: ends of documents and rows
    mask: torch.Tensor | None = None    # bool [B,T+A], tokens to be learned as targets; None = all
    sources: tuple[str, ...] = ()       # where each row comes from

    def rows(self, lo, hi):
        """Rows lo..hi-1 as a batch of their own: a micro-batch."""
        T = self.positions.shape[1]
        mine = (self.cu_seqlens >= lo * T) & (self.cu_seqlens <= hi * T)
        return Batch(self.ids[lo:hi], self.docs[lo:hi], self.positions[lo:hi], self.cu_seqlens[mine] - lo * T,
                     None if self.mask is None else self.mask[lo:hi], self.sources[lo:hi])

    def to(self, device):
        move = lambda t: t if t is None else t.to(device, non_blocking=True)
        tensors = map(move, (self.ids, self.docs, self.positions, self.cu_seqlens, self.mask))
        return Batch(*tensors, self.sources)


def make_batch(ids, docs, T, mask=None, sources=(), mask_documents=True):
    """
    ids, docs [B,T+A] numpy -> Batch. mask_documents=False lets attention and positions run through document
    ends.

    By hand, T = 4, docs 7 7 8 8 | 8: positions 0 1 0 1, cu_seqlens 0 2 4.
    """
    B, inner = len(ids), docs[:, :T]
    starts = np.zeros((B, T), dtype=bool)                                  # the first token of each segment
    starts[:, 0] = True
    if mask_documents:
        starts[:, 1:] = inner[:, 1:] != inner[:, :-1]
    index = np.broadcast_to(np.arange(T), (B, T))
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)   # [B,T]
    cu = np.append(np.flatnonzero(starts), B * T).astype(np.int32)         # [n+1]
    as_torch = lambda a, t: torch.from_numpy(np.ascontiguousarray(a, dtype=t))
    return Batch(as_torch(ids, np.int64), as_torch(docs, np.int64), as_torch(positions, np.int64),
                 as_torch(cu, np.int32), None if mask is None else as_torch(mask, bool), tuple(sources))


class Stream:
    """One source as an endless stream of tokens, every epoch in a new order; a few orders are kept."""
    def __init__(self, shards, seed):
        self.shards, self.key = shards, (seed, zlib.crc32(shards.name.encode()))
        self.n_tokens, self.n_documents = shards.n_tokens, shards.n_documents
        self.cached = {}          # epoch -> order of the shards; (epoch, shard) -> order of its documents

    def shard_order(self, epoch):
        """-> shards in this epoch's order, where each ends in tokens, how many documents came before each."""
        if epoch in self.cached:
            return self.cached[epoch]
        order = np.random.Generator(np.random.PCG64([*self.key, epoch])).permutation(len(self.shards.shards))
        tokens = [len(self.shards.shards[s].tokens) for s in order]
        documents = [len(self.shards.shards[s].ends) for s in order]
        self.remember(epoch, (order, np.cumsum(tokens), np.cumsum([0, *documents[:-1]])))
        return self.cached[epoch]

    def document_order(self, epoch, s):
        """
        -> documents of shard s in this epoch's order, and where each ends in tokens. [n_documents] each.
        """
        if (epoch, s) not in self.cached:
            ends = self.shards.shards[s].ends
            order = np.random.Generator(np.random.PCG64([*self.key, epoch, s + 1])).permutation(len(ends))
            lengths = np.diff(ends, prepend=0)
            self.remember((epoch, s), (order, np.cumsum(lengths[order])))
        return self.cached[epoch, s]

    def remember(self, key, value):
        if len(self.cached) > 3:                 # a row may straddle two shards, or two epochs
            self.cached.pop(next(iter(self.cached)))
        self.cached[key] = value

    def take(self, start, n):
        """
        Tokens start..start+n-1 of the stream -> (ids [n], docs [n]); docs is a running number over all
        epochs.
        """
        ids, docs, filled = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64), 0
        while filled < n:
            epoch, at = divmod(start + filled, self.n_tokens)
            shards, shard_ends, before = self.shard_order(epoch)
            j = int(np.searchsorted(shard_ends, at, side="right"))
            shard = self.shards.shards[shards[j]]
            at -= int(shard_ends[j]) - len(shard.tokens)               # position inside this shard's stream
            order, ends = self.document_order(epoch, int(shards[j]))
            k = int(np.searchsorted(ends, at, side="right"))
            while filled < n and k < len(order):                       # document by document to shard's end
                begin = int(ends[k - 1]) if k else 0
                text = shard.document(order[k])[at - begin:][:n - filled]
                ids[filled:filled + len(text)] = text
                docs[filled:filled + len(text)] = epoch * self.n_documents + int(before[j]) + k
                filled, at, k = filled + len(text), at + len(text), k + 1
        return ids, docs


class MixtureLoader:
    """
    folder       where the sources lie (data/shards.py)
    names        sources that any stage may name; opened, and checked, here
    vocab_size   of the model; a source with a larger id is refused
    n_mtp        MTP layers that need targets: a row carries 1 + n_mtp tokens beyond T
    max_seq_len  the model's context; a longer row is refused
    """
    def __init__(self, folder, names, vocab_size, n_mtp=0, seed=0, max_seq_len=None):
        if not names:
            raise UserError("loader: no sources named")
        self.streams = {name: Stream(Shards(folder, name, vocab_size), seed) for name in names}
        self.ahead, self.seed, self.max_seq_len = 1 + n_mtp, seed, max_seq_len
        self.stage, self.seq = 0, 0                        # current stage, rows taken in it
        self.taken = dict.fromkeys(names, 0)               # tokens taken from each source over the whole run
        self.here = dict.fromkeys(names, 0)                # rows taken from each source in the current stage

    def plan(self, stage, mix, seq_len, n_rows):
        """
        Advance by n_rows rows of one stage -> [(source, first token)]. mix: source -> weight, normalised
        here.
        """
        unknown = sorted(name for name, w in mix.items() if w > 0 and name not in self.streams)
        if unknown:
            raise UserError(f"mix names source {unknown[0]!r}, the loader was opened with "
                            f"{', '.join(self.streams)}")
        if self.max_seq_len and seq_len > self.max_seq_len:
            raise UserError(f"seq_len = {seq_len} is longer than the model's context, "
                            f"max_seq_len = {self.max_seq_len}")
        total = sum(mix.values())
        if total <= 0 or min(mix.values()) < 0:
            raise UserError(f"mix = {mix} needs weights >= 0 with a positive sum")
        if stage != self.stage:                            # cursors stay: no document is seen again early
            self.stage, self.seq, self.here = stage, 0, dict.fromkeys(self.here, 0)
        share = {name: w / total for name, w in mix.items() if w > 0}
        plan = []
        for _ in range(n_rows):
            self.seq += 1
            # deficit = share * rows so far - rows it got; the largest one is served, so no source is ever off
            # by > 1 row
            name = max(share, key=lambda s: share[s] * self.seq - self.here[s])
            plan.append((name, self.taken[name]))
            self.here[name] += 1
            self.taken[name] += seq_len
        return plan

    def next_batch(self, stage, mix, seq_len, batch_size, rank=0, world=1, mask_documents=True):
        """
        The next batch_size rows, of which this rank reads its own part: rows B*rank//world ..
        B*(rank+1)//world. Every rank must call this with the same arguments. -> Batch.
        """
        plan = self.plan(stage, mix, seq_len, batch_size)
        mine = plan[batch_size * rank // world:batch_size * (rank + 1) // world]
        width = seq_len + self.ahead
        ids, docs = np.empty((len(mine), width), np.int64), np.empty((len(mine), width), np.int64)   # [B,T+A]
        for b, (name, start) in enumerate(mine):
            ids[b], docs[b] = self.streams[name].take(start, width)
        return make_batch(ids, docs, seq_len, None, (name for name, _ in mine), mask_documents)

    def epochs(self):
        """
        How often each source has been gone through, 1.0 = once. Small sources repeat silently: log this.
        """
        return {name: self.taken[name] / s.n_tokens for name, s in self.streams.items()}

    def state_dict(self):
        """Plain JSON values; the same for every rank."""
        return {"stage": self.stage, "seq": self.seq, "taken": dict(self.taken), "here": dict(self.here),
                "seed": self.seed, "data": {name: s.shards.fingerprint for name, s in self.streams.items()}}

    def load_state_dict(self, state):
        """
        Continue exactly. ValueError if the seed, the sources or their contents are not those of the saved
        run.
        """
        now = self.state_dict()
        if state["seed"] != now["seed"]:
            raise UserError(f"loader: the saved run used seed {state['seed']}, this one {now['seed']}")
        for name in sorted(set(state["data"]) | set(now["data"])):
            if state["data"].get(name) != now["data"].get(name):
                raise UserError(f"loader: source {name!r} is not the one the saved run was reading "
                                "(other files, or added to or removed from the mixture)")
        self.stage, self.seq = state["stage"], state["seq"]
        self.taken, self.here = dict(state["taken"]), dict(state["here"])


def main(folder, *weights):
    try:
        mix = {name: float(w) for name, w in (s.split("=") for s in weights)}
        loader = MixtureLoader(folder, list(mix), vocab_size=1 << 32, n_mtp=1)
    except ValueError as e:
        raise SystemExit(f"loader error: {e}") from None
    T, B, n, t = 256, 64, 0, time.perf_counter()
    while time.perf_counter() - t < 2:
        n += loader.next_batch(0, mix, T, B).positions.numel()
    for name, e in loader.epochs().items():
        print(f"{name:16s} weight {mix[name]:6.3f}  taken {loader.taken[name] / n:6.3f}  epochs {e:8.2f}")
    print(f"{n / (time.perf_counter() - t) / 1e6:.1f} M tokens/s in rows of {T}, one thread")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in word for word in sys.argv[2:]):
        raise SystemExit("usage: python -m data.loader FOLDER SOURCE=WEIGHT ...")
    with one_line():
        main(*sys.argv[1:])
