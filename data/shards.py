"""
Token shards: documents as token ids on disk, read through memory maps (report section 2.1: web, papers, books, code,
synthetic).

A source NAME is a folder of files:

    NAME_00000.bin   header, 1 KiB | tokens, uint16 if the vocabulary fits, else uint32 | document ends, uint64
    NAME.json        the manifest: list of the shards with checksums; written last, so a source without it is unfinished

Every file is written under another name, flushed to the disk and renamed (data/jsonl.py:whole_file). Opening a source
checks headers, sizes and document ends, and names the file that is truncated or corrupt. The checksum of the tokens is
verified on opening for shards under 64 MiB, and for all shards by

    python -m data.shards out/tiny/data            # a line per source: documents, tokens, checksums verified

Documents end with <|endoftext|>, which the caller appends when it tokenises. The layout follows llm.c, with one file
instead of two and 64-bit counts (llm.c's int32 count ends at 2^31 tokens).
"""
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

import configurator
from configurator import UserError
from data.jsonl import whole_file

MAGIC, VERSION, HEADER_WORDS = 0x6D694D6F, 1, 128          # header = 128 little-endian int64 words = 1 KiB
SMALL = 64 << 20                                           # bytes; smaller shards are checksummed on opening


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("folder",)
    folder: str = ""                      # folder of the sources


# ---- writing --------------------------------------------------------------------------------------------------------

def write_shard(path: str | Path, documents: Iterable[Sequence[int]], vocab_size: int) -> dict:
    """
    documents: token ids of each, consumed once and never held together. -> dict(file, documents, tokens, max_id,
    crc32). The file appears when it is complete. UserError names a document with an id outside 0 .. vocab_size - 1.
    """
    path, dtype = Path(path), np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    ends, n, crc, max_id = [], 0, 0, -1
    with whole_file(path, "wb") as f:
        f.write(bytes(8 * HEADER_WORDS))
        for k, document in enumerate(documents):
            ids = np.asarray(document, dtype=np.int64)
            if ids.size == 0:
                continue
            if ids.min() < 0 or ids.max() >= vocab_size:
                bad = int(ids.min() if ids.min() < 0 else ids.max())
                raise UserError(f"{path}: document {k} holds token id {bad}, must be in 0..{vocab_size - 1}")
            data = ids.astype(dtype).tobytes()
            f.write(data)
            crc, n, max_id = zlib.crc32(data, crc), n + ids.size, max(max_id, int(ids.max()))
            ends.append(n)
        f.write(b"\0" * (-f.tell() % 8))                   # the uint64 table starts at a multiple of 8 bytes
        table = np.asarray(ends, dtype="<u8").tobytes()
        f.write(table)
        header = np.zeros(HEADER_WORDS, dtype="<i8")
        header[:9] = MAGIC, VERSION, dtype.itemsize, n, len(ends), vocab_size, max_id, crc, zlib.crc32(table)
        header[9] = zlib.crc32(header[:9].tobytes())
        f.seek(0)
        f.write(header.tobytes())
    return {"file": path.name, "documents": len(ends), "tokens": n, "max_id": max_id, "crc32": crc}


def write_source(folder: str | Path, name: str, documents: Iterable[Sequence[int]], vocab_size: int,
                 shard_tokens: int = 1 << 28) -> dict:
    """
    All documents of one source, in shards of about shard_tokens tokens. -> the manifest, as in NAME.json. Mix the
    documents before: each epoch shuffles the shards and the documents inside a shard, not across shards. UserError for
    an id outside the vocabulary.
    """
    folder, shards, documents = Path(folder), [], iter(documents)
    manifest = folder / f"{name}.json"
    manifest.unlink(missing_ok=True)                       # unfinished from here until the last line
    first = next(documents, None)
    while first is not None or not shards:
        rest = chain([] if first is None else [first], documents)
        path = folder / f"{name}_{len(shards):05d}.bin"
        shards.append(write_shard(path, until_full(rest, shard_tokens), vocab_size))
        first = next(documents, None)
    for old in folder.glob(f"{name}_[0-9][0-9][0-9][0-9][0-9].bin"):
        if old.name not in {s["file"] for s in shards}:
            old.unlink()
    info = {"name": name, "vocab_size": vocab_size, "tokens": sum(s["tokens"] for s in shards),
            "documents": sum(s["documents"] for s in shards), "shards": shards}
    with whole_file(manifest) as f:
        f.write(json.dumps(info, indent=1) + "\n")
    return info


def until_full(documents: Iterator[Sequence[int]], tokens: int) -> Iterator[Sequence[int]]:
    """The next documents, up to the one with which they reach `tokens` tokens together."""
    n = 0
    for document in documents:
        yield document
        n += len(document)
        if n >= tokens:
            return


# ---- reading --------------------------------------------------------------------------------------------------------

def sources(folder: str | Path) -> list[str]:
    """Names of the finished sources in a folder, sorted."""
    names = {p.name.removesuffix("_00000.bin") for p in Path(folder).glob("*_00000.bin")}
    return sorted(n for n in names if (Path(folder) / f"{n}.json").is_file())


class Shard:
    """
    One file of a source.

        tokens       read-only memory map, uint16 or uint32 [n_tokens]
        ends         int64 [n_documents]: where each document ends in tokens
        max_id, crc  largest token id; checksum of the tokens
    """
    def __init__(self, path: str | Path, verify: bool | None = None):
        """verify: check the tokens' checksum; None = only if the file is small. UserError if the file is damaged."""
        path, size = Path(path), os.path.getsize(path)
        header = np.fromfile(path, dtype="<i8", count=HEADER_WORDS)
        if header.size < HEADER_WORDS or header[0] != MAGIC:
            raise UserError(f"{path}: not a token shard (write it with data.shards.write_shard)")
        if header[9] != zlib.crc32(header[:9].tobytes()):
            raise UserError(f"{path}: corrupt: the header does not match its checksum; write it again")
        version, width, n, n_documents, _, max_id, crc, table_crc = (int(x) for x in header[1:9])
        if version != VERSION or width not in (2, 4):
            raise UserError(f"{path}: shard version {version} with {width}-byte tokens, "
                            f"this program reads version {VERSION} with 2 or 4")
        start = 8 * HEADER_WORDS
        table_start = start + -(-n * width // 8) * 8
        if size != table_start + 8 * n_documents:
            raise UserError(f"{path}: truncated or overwritten: {size:,} bytes, its header says "
                            f"{table_start + 8 * n_documents:,}; write it again")
        self.path, self.max_id, self.crc = path, max_id, crc
        empty = np.zeros(0, dtype="<u2")
        self.tokens = np.memmap(path, dtype=f"<u{width}", mode="r", offset=start, shape=(n,)) if n else empty
        self.ends = np.fromfile(path, dtype="<u8", offset=table_start, count=n_documents).astype(np.int64)
        if zlib.crc32(self.ends.astype("<u8").tobytes()) != table_crc or (n and self.ends[-1] != n):
            raise UserError(f"{path}: corrupt: the table of document ends does not match its checksum")
        if verify or (verify is None and size < SMALL):
            self.verify()

    def verify(self) -> None:
        """Read every token once and compare the checksum. UserError if a byte has changed."""
        crc, step = 0, 16 << 20
        for start in range(0, len(self.tokens), step):
            crc = zlib.crc32(self.tokens[start:start + step].tobytes(), crc)
        if crc != self.crc:
            raise UserError(f"{self.path}: corrupt: the tokens do not match their checksum; write it again")

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, a view into the memory map [length]."""
        return self.tokens[self.ends[i - 1] if i else 0:self.ends[i]]


class Shards:
    """
    One source: its shards in the order of the manifest.

        shards                 list of Shard
        n_tokens, n_documents  of all shards together
        fingerprint            checksum of all tokens: a checkpoint keeps it, to notice another data set on resume
    """
    def __init__(self, folder: str | Path, name: str, vocab_size: int | None = None, verify: bool | None = None):
        """
        vocab_size: the model's, larger than every token id. verify: as in Shard. UserError if the source is missing,
        unfinished, damaged or empty, or does not fit the vocabulary.
        """
        folder = Path(folder)
        manifest = folder / f"{name}.json"
        if not manifest.is_file():
            present = ", ".join(sources(folder)) or "none"
            raise UserError(f"source {name!r}: no {manifest}; sources there: {present}")
        try:
            listed = [{k: s[k] for k in ("file", "crc32", "tokens")}
                      for s in json.loads(manifest.read_text(encoding="utf-8"))["shards"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{manifest}: corrupt, not a list of shards; write the source again") from None
        self.name, self.shards = name, []
        for s in listed:
            if not (folder / s["file"]).is_file():
                raise UserError(f"source {name!r}: shard {folder / s['file']} is missing")
            shard = Shard(folder / s["file"], verify)
            if (shard.crc, len(shard.tokens)) != (s["crc32"], s["tokens"]):
                raise UserError(f"{shard.path}: is not the shard that {manifest} was written with")
            self.shards.append(shard)
        self.n_tokens = sum(len(s.tokens) for s in self.shards)
        self.n_documents = sum(len(s.ends) for s in self.shards)
        self.fingerprint = zlib.crc32(repr([(s.crc, len(s.tokens)) for s in self.shards]).encode())
        if self.n_tokens == 0:
            raise UserError(f"source {name!r} in {folder} is empty: no document has a token")
        max_id = max(s.max_id for s in self.shards)
        if vocab_size is not None and max_id >= vocab_size:
            raise UserError(f"source {name!r} in {folder} holds token id {max_id}, the model's vocabulary ends "
                            f"at {vocab_size - 1}: tokenise it with the model's tokenizer")

    def documents(self) -> Iterator[np.ndarray]:
        """All documents in file order, as views."""
        return (s.document(i) for s in self.shards for i in range(len(s.ends)))


def main(cfg: Config) -> None:
    if not sources(cfg.folder):
        raise UserError(f"{cfg.folder}: no finished source there (NAME.json beside NAME_00000.bin)")
    for name in sources(cfg.folder):
        s = Shards(cfg.folder, name, verify=True)
        print(f"{s.name:20s} {s.n_documents:12,} documents {s.n_tokens:16,} tokens, "
              f"{s.n_tokens / s.n_documents:8.1f} tokens/document, checksums right")


if __name__ == "__main__":
    configurator.run(main, Config)
