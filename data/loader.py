"""
Mixture loader: rows of T tokens from several sources in exact proportions (report sections 2.1 and 2.3).

Stage 2 raises maths and code to about 70% of the tokens; stage 3 adds about 10% synthetic answers and goes from 8,192
to 32,768 tokens a row. The weights inside a stage are not in the report.

Everything is a pure function of (seed, the data, tokens taken so far); there is no random generator to save:

  - epoch e of a source is its shards, and the documents inside each shard, in permutations drawn from (seed, name, e),
    joined to one stream. A cursor per source counts the tokens taken.
  - Each row goes to the source that is furthest behind its share (as in Megatron); its cursor moves by T.
  - So the state is a few small numbers, a batch is the same for any number of ranks, and T may change between stages.

Rows carry n_mtp + 1 tokens of look-ahead for the targets: the first tokens of the source's next row.

    python -m data.loader out/tiny/data --mix.web=0.7 --mix.maths=0.3     # shares, epochs, some 10 M tokens a second
"""
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

import configurator
from configurator import UserError
from data.shards import Shards

BLOCK = 256                     # documents that are looked up in a shard's table at a time

@dataclass
class Batch:
    """B rows of T tokens with A = 1 + n_mtp tokens of look-ahead. Positions and bounds cover the T inputs only."""
    ids: Tensor                 # int64 [B,T+A]
    docs: Tensor                # int64 [B,T+A], number of each token's document; changes at every boundary
    positions: Tensor           # int64 [B,T], from the start of the document, or of the row if that came later
    bounds: Tensor              # int32 [2,B,T], first and one-past-last index of each token's document inside its row
    mask: Tensor | None = None  # bool [B,T+A], tokens to be learned as targets; None = all
    sources: tuple[str, ...] = ()       # where each row comes from

    def rows(self, lo: int, hi: int) -> "Batch":
        """Rows lo .. hi - 1 as a batch of their own: a micro-batch."""
        return Batch(self.ids[lo:hi], self.docs[lo:hi], self.positions[lo:hi], self.bounds[:, lo:hi],
                     None if self.mask is None else self.mask[lo:hi], self.sources[lo:hi])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        tensors = (self.ids, self.docs, self.positions, self.bounds, self.mask)
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in tensors), self.sources)


def make_batch(ids: np.ndarray, docs: np.ndarray, T: int, mask: np.ndarray | None = None,
               sources: Iterable[str] = (), mask_documents: bool = True) -> Batch:
    """
    ids, docs, mask [B,T+A] -> Batch. mask_documents=False lets attention and positions run through document ends.

    By hand, T = 4, docs 7 7 8 8 | 8: positions 0 1 0 1, bounds first 0 0 2 2, end 2 2 4 4.
    """
    B, inner = len(ids), docs[:, :T]
    starts = np.zeros((B, T + 1), dtype=bool)                              # the first token of each segment, and T
    starts[:, [0, T]] = True
    if mask_documents:
        starts[:, 1:T] = inner[:, 1:] != inner[:, :-1]
    index = np.broadcast_to(np.arange(T + 1), (B, T + 1))
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)[:, :T]            # [B,T]
    end = np.minimum.accumulate(np.where(starts, index, T)[:, ::-1], axis=1)[:, ::-1][:, 1:]   # next start after it
    as_torch = lambda a, t: torch.from_numpy(np.ascontiguousarray(a, dtype=t))
    return Batch(as_torch(ids, np.int64), as_torch(docs, np.int64), as_torch(index[:, :T] - first, np.int64),
                 as_torch(np.stack([first, end]), np.int32), None if mask is None else as_torch(mask, bool),
                 tuple(sources))


class Stream:
    """
    One source as an endless stream of tokens, every epoch in a new order.

    In memory are the orders of two shards (a row may reach over two), 4 bytes a document; the tokens of the documents
    are read, and where each lies is looked up in its file, when they are needed.
    """
    def __init__(self, shards: Shards, seed: int):
        self.shards, self.key = shards, (seed, zlib.crc32(shards.name.encode()))
        self.n_tokens, self.n_documents = shards.n_tokens, shards.n_documents
        self.epoch_order, self.shard_order, self.block = (
            lru_cache(maxsize=2)(f) for f in (self._epoch_order, self._shard_order, self._block))

    def draw(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([*self.key, *key]))

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's order of all shards, where each ends in tokens, how many documents came before each. [n] each"""
        lengths, documents = (np.array(x) for x in zip(*((s.n_tokens, s.n_documents) for s in self.shards.shards),
                                                       strict=True))
        order = self.draw(epoch).permutation(len(lengths))
        return order, np.cumsum(lengths[order]), np.cumsum(documents[order]) - documents[order]

    def _shard_order(self, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of a shard's documents [n], and where each BLOCK of them ends in its tokens [n/BLOCK]."""
        lengths = self.shards.shards[shard].lengths()
        # shuffled as the documents are, and gone before their order is made: one array is in memory at a time
        self.draw(epoch, shard + 1).shuffle(lengths)
        n, blocks = len(lengths), range(0, len(lengths), BLOCK)
        ends = np.cumsum(np.fromiter((lengths[a:a + BLOCK].sum(dtype=np.int64) for a in blocks), np.int64, len(blocks)))
        del lengths
        order = np.arange(n, dtype=np.uint32)
        self.draw(epoch, shard + 1).shuffle(order)
        return order, ends

    def _block(self, epoch: int, shard: int, b: int) -> tuple[list[int], list[int], np.ndarray]:
        """Block b of that order: where its documents begin and end in the file, and end in the stream. [BLOCK] each"""
        order, block_ends = self.shard_order(epoch, shard)
        documents, table = order[b * BLOCK:(b + 1) * BLOCK].astype(np.int64), self.shards.shards[shard].ends
        stops = np.array(table[documents])
        starts = np.where(documents > 0, table[documents - 1], 0)
        ends = np.cumsum(stops - starts) + (block_ends[b - 1] if b else 0)
        return starts.tolist(), stops.tolist(), ends

    def take(self, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start .. start + n - 1 of the stream -> (ids [n], docs [n]), docs counted over all epochs."""
        ids, docs, filled = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64), 0
        while filled < n:
            epoch, at = divmod(start + filled, self.n_tokens)
            shards, shard_ends, before = self.epoch_order(epoch)
            j = int(np.searchsorted(shard_ends, at, side="right"))
            number = int(shards[j])
            shard = self.shards.shards[number]
            at -= int(shard_ends[j]) - shard.n_tokens                      # position inside this shard's stream
            _, block_ends = self.shard_order(epoch, number)
            b = int(np.searchsorted(block_ends, at, side="right"))
            while filled < n and b < len(block_ends):
                starts, stops, ends = self.block(epoch, number, b)
                k = int(np.searchsorted(ends, at, side="right"))
                while filled < n and k < len(starts):                      # document by document to the block's end
                    begin = stops[k] - (int(ends[k]) - at)
                    piece = shard.read(begin, min(stops[k] - begin, n - filled))
                    ids[filled:filled + len(piece)] = piece
                    docs[filled:filled + len(piece)] = epoch * self.n_documents + before[j] + b * BLOCK + k
                    filled, at, k = filled + len(piece), at + len(piece), k + 1
                b += 1
        return ids, docs


class MixtureLoader:
    """
    folder       where the sources lie (data/shards.py)
    names        sources that any stage may name; opened, and checked, here
    vocab_size   of the model; a source with a larger id is refused
    n_mtp        MTP layers that need targets: a row carries 1 + n_mtp tokens beyond T
    max_seq_len  the model's context; a longer row is refused
    tokenizer    Tokenizer.fingerprint of the model's; a source that another one made is refused. "" = not checked
    rank, world  this rank checks every world-th shard at the opening; the others check the rest

    Raises UserError, from the constructor and from next_batch, for what a person's data or table got wrong.
    """
    def __init__(self, folder, names: list[str], vocab_size: int, n_mtp: int = 0, seed: int = 0,
                 max_seq_len: int | None = None, tokenizer: str = "", rank: int = 0, world: int = 1):
        if not names:
            raise UserError("loader: no sources named")
        self.streams = {name: Stream(Shards(folder, name, vocab_size, None, tokenizer, rank, world), seed)
                        for name in names}
        self.ahead, self.seed, self.max_seq_len = 1 + n_mtp, seed, max_seq_len
        self.stage, self.seq = 0, 0                        # current stage, rows taken in it
        self.taken = dict.fromkeys(names, 0)               # tokens taken from each source over the whole run
        self.here = dict.fromkeys(names, 0)                # rows taken from each source in the current stage
        self.share: dict[str, float] | None = None         # the mixture, normalised
        self.absent: dict[str, int] = {}                   # fingerprints of sources that were read once and are not now

    def next_batch(self, stage: int, mix: dict[str, float], seq_len: int, batch_size: int, rank: int = 0,
                   world: int = 1, mask_documents: bool = True) -> Batch:
        """
        The next batch_size rows of a stage, of which this rank reads rows B*rank//world .. B*(rank+1)//world - 1.
        mix: source -> weight, normalised here. Every rank must call this with the same arguments.
        """
        unknown = sorted(name for name, w in mix.items() if w > 0 and name not in self.streams)
        if unknown:
            raise UserError(f"mix names source {unknown[0]!r}, the loader was opened with {', '.join(self.streams)}")
        if self.max_seq_len and seq_len > self.max_seq_len:
            raise UserError(f"seq_len = {seq_len} is longer than the model's context, max_seq_len = {self.max_seq_len}")
        total = sum(mix.values())
        if total <= 0 or min(mix.values()) < 0:
            raise UserError(f"mix = {mix} needs weights >= 0 with a positive sum")
        share = {name: w / total for name, w in mix.items() if w > 0}
        if stage != self.stage or share != (self.share or share):      # the cursors, `taken`, stay: no document is
            self.stage, self.seq, self.here = stage, 0, dict.fromkeys(self.here, 0)              # seen again early
        self.share = share
        rows = []                                          # (source, its first token)
        for _ in range(batch_size):
            self.seq += 1
            # deficit = share * rows so far - rows it got; the source with the largest deficit gets the row, so none is
            # ever off by more than one row
            name = max(share, key=lambda s: share[s] * self.seq - self.here[s])
            rows.append((name, self.taken[name]))
            self.here[name] += 1
            self.taken[name] += seq_len
        rows = rows[batch_size * rank // world:batch_size * (rank + 1) // world]
        width = seq_len + self.ahead
        ids, docs = np.empty((len(rows), width), np.int64), np.empty((len(rows), width), np.int64)   # [B,T+A]
        for b, (name, start) in enumerate(rows):
            ids[b], docs[b] = self.streams[name].take(start, width)
        return make_batch(ids, docs, seq_len, None, (name for name, _ in rows), mask_documents)

    def epochs(self) -> dict[str, float]:
        """How often each source has been read, 1.0 = once. Small sources repeat silently: log this."""
        return {name: self.taken[name] / s.n_tokens for name, s in self.streams.items()}

    def state_dict(self) -> dict:
        """Plain JSON values; the same on every rank."""
        return {"stage": self.stage, "seq": self.seq, "taken": dict(self.taken), "here": dict(self.here),
                "mix": self.share, "seed": self.seed,
                "data": self.absent | {name: s.shards.fingerprint for name, s in self.streams.items()}}

    def load_state_dict(self, state: dict) -> None:
        """
        Continue exactly. Sources may be new, and some of the saved run not be read any more. UserError if the seed, or
        the contents of a source, are not those of the saved run.
        """
        now = self.state_dict()
        if state["seed"] != now["seed"]:
            raise UserError(f"loader: the saved run used seed {state['seed']}, this one {now['seed']}; give "
                            "another --out for a new run")
        for name in sorted(set(state["data"]) & set(now["data"])):
            if state["data"][name] != now["data"][name]:
                raise UserError(f"loader: source {name!r} is not the one the saved run was reading: "
                                f"fingerprint {now['data'][name]}, the saved one {state['data'][name]}; give the same "
                                "shards as --data, or another --out for a new run")
        self.stage, self.seq, self.share = state["stage"], state["seq"], state.get("mix")
        self.taken, self.here = self.taken | state["taken"], self.here | state["here"]
        self.absent = {name: data for name, data in state["data"].items() if name not in self.streams}


# ---- how fast, and in which shares ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    data: str = ""                        # folder of shards
    mix: dict[str, float] = field(default_factory=lambda: {"web": 1.0})   # --mix.SOURCE=WEIGHT, one a source
    seconds: float = 2.0                  # how long to read

    POSITIONAL = ("data",)


def main(cfg: Config) -> None:
    loader = MixtureLoader(cfg.data, list(cfg.mix), vocab_size=1 << 32, n_mtp=1)
    T, B, n, t = 256, 64, 0, time.perf_counter()
    while time.perf_counter() - t < cfg.seconds:
        n += loader.next_batch(0, cfg.mix, T, B).positions.numel()
    for name, epochs in loader.epochs().items():
        print(f"{name:16s} weight {cfg.mix[name]:6.3f}  taken {loader.taken[name] / n:6.3f}  epochs {epochs:8.2f}")
    print(f"{n / (time.perf_counter() - t) / 1e6:.1f} M tokens/s in rows of {T}, one thread")


if __name__ == "__main__":
    configurator.run(main, Config)
