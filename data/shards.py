"""
Token shards: documents as token ids on disk, read through memory maps (report section 2.1: web, papers, books, code,
synthetic).

A source NAME is a folder of files:

    NAME_00000.bin   header, 1 KiB | tokens, uint16 if the vocabulary fits, else uint32 | document ends, uint64
    NAME.json        the manifest: list of the shards with checksums, and a fingerprint of the tokenizer that made them;
                     written last, so a source without it is unfinished

Every file is written under another name, flushed to the disk and renamed (data/jsonl.py:whole_file). Opening a source
checks headers and sizes, and names the file that is truncated or corrupt. The checksums of tokens and document ends are
verified on opening for shards under 64 MiB, and for all shards by

    python -m data.shards out/tiny/data            # a line per source: documents, tokens, checksums verified

Documents end with <|endoftext|>, which the caller appends when it tokenises. The layout follows llm.c, with one file
instead of two and 64-bit counts (llm.c's int32 count ends at 2^31 tokens).
"""
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

import configurator
from configurator import UserError
from data.jsonl import whole_file

MAGIC, VERSION, HEADER_WORDS = 0x6D694D6F, 1, 128          # header = 128 little-endian int64 words = 1 KiB
SMALL = 64 << 20                                           # bytes; smaller shards are checksummed on opening
OPEN = 64                                                  # shards of a process that are open at a time, of all sources


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("folder",)
    folder: str = ""                      # folder of the sources


# ---- writing --------------------------------------------------------------------------------------------------------

class ShardWriter:
    """
    One shard that is being written, document by document. Made inside whole_file, so that the file appears when it is
    complete; `file` is what that gave. UserError names a document with an id outside 0 .. vocab_size - 1.
    """
    def __init__(self, path: str | Path, file: BinaryIO, vocab_size: int):
        self.path, self.file, self.vocab_size = Path(path), file, vocab_size
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.ends, self.n, self.crc, self.max_id = array("Q"), 0, 0, -1
        file.write(bytes(8 * HEADER_WORDS))

    def add(self, document: Sequence[int]) -> None:
        """Token ids of one document; an empty one is left out."""
        ids = np.asarray(document, dtype=np.int64)
        if ids.size == 0:
            return
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise UserError(f"{self.path}: document {len(self.ends)} holds token id {bad}, must be in "
                            f"0..{self.vocab_size - 1}")
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.crc, self.n = zlib.crc32(data, self.crc), self.n + ids.size
        self.max_id = max(self.max_id, int(ids.max()))
        self.ends.append(self.n)

    def finish(self) -> dict:
        """Table of document ends and header -> dict(file, documents, tokens, max_id, crc32), as in the manifest."""
        self.file.write(b"\0" * (-self.file.tell() % 8))  # the uint64 table starts at a multiple of 8 bytes
        table = np.asarray(self.ends, dtype="<u8").tobytes()
        self.file.write(table)
        header = np.zeros(HEADER_WORDS, dtype="<i8")
        header[:9] = (MAGIC, VERSION, self.dtype.itemsize, self.n, len(self.ends), self.vocab_size, self.max_id,
                      self.crc, zlib.crc32(table))
        header[9] = zlib.crc32(header[:9].tobytes())
        self.file.seek(0)
        self.file.write(header.tobytes())
        return {"file": self.path.name, "documents": len(self.ends), "tokens": self.n, "max_id": self.max_id,
                "crc32": self.crc}


def write_shard(path: str | Path, documents: Iterable[Sequence[int]], vocab_size: int) -> dict:
    """One shard; documents: token ids of each, consumed once and never held together. -> as ShardWriter.finish."""
    with whole_file(path, "wb") as f:
        shard = ShardWriter(path, f, vocab_size)
        for document in documents:
            shard.add(document)
        return shard.finish()


def write_source(folder: str | Path, name: str, documents: Iterable[Sequence[int]], vocab_size: int,
                 shard_tokens: int = 1 << 28, tokenizer: str = "") -> dict:
    """
    All documents of one source, in shards of about shard_tokens tokens. -> the manifest, as in NAME.json. Mix the
    documents before: each epoch shuffles the shards and the documents inside a shard, not across shards. tokenizer:
    Tokenizer.fingerprint of the one that made the ids. UserError for an id outside the vocabulary.
    """
    folder, shards, documents = Path(folder), [], iter(documents)
    (folder / f"{name}.json").unlink(missing_ok=True)      # unfinished from here until the last line
    first = next(documents, None)
    while first is not None or not shards:
        rest = chain([] if first is None else [first], documents)
        path = folder / f"{name}_{len(shards):05d}.bin"
        shards.append(write_shard(path, until_full(rest, shard_tokens), vocab_size))
        first = next(documents, None)
    return write_manifest(folder, name, shards, vocab_size, tokenizer)


def write_manifest(folder: str | Path, name: str, shards: list[dict], vocab_size: int, tokenizer: str = "") -> dict:
    """NAME.json for shards that are there already; files of an older source NAME that it does not list go. -> it"""
    folder = Path(folder)
    for old in folder.glob(f"{name}_[0-9][0-9][0-9][0-9][0-9].bin"):
        if old.name not in {s["file"] for s in shards}:
            old.unlink()
    info = {"name": name, "vocab_size": vocab_size, "tokenizer": tokenizer,
            "tokens": sum(s["tokens"] for s in shards), "documents": sum(s["documents"] for s in shards),
            "shards": shards}
    with whole_file(folder / f"{name}.json") as f:
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


@lru_cache(maxsize=OPEN)
def mapped(path: Path) -> np.ndarray:
    """A read-only memory map of a file, uint8. At most OPEN are kept: Linux allows 1,024 open files by default."""
    return np.memmap(path, dtype=np.uint8, mode="r")


class Shard:
    """
    One file of a source. It is opened when its tokens are read, and may be closed again in between (`mapped`).

        tokens                 read-only view into the file, uint16 or uint32 [n_tokens]
        ends                   the same, int64 [n_documents]: where each document ends in tokens
        n_tokens, n_documents  sizes
        max_id, crc            largest token id; checksum of the tokens
    """
    def __init__(self, path: str | Path, verify: bool | None = None):
        """verify: check the checksums; None = only if the file is small. UserError if the file is damaged."""
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
        self.table = start + -(-n * width // 8) * 8        # where the document ends begin, in bytes
        if size != self.table + 8 * n_documents:
            raise UserError(f"{path}: truncated or overwritten: {size:,} bytes, its header says "
                            f"{self.table + 8 * n_documents:,}; write it again")
        self.path, self.n_tokens, self.n_documents, self.width = path, n, n_documents, width
        self.max_id, self.crc, self.table_crc = max_id, crc, table_crc
        mapped.cache_clear()                               # the file may have been written anew
        if verify or (verify is None and size < SMALL):
            self.verify()

    @property
    def tokens(self) -> np.ndarray:
        start = 8 * HEADER_WORDS
        return mapped(self.path)[start:start + self.n_tokens * self.width].view(f"<u{self.width}")

    @property
    def ends(self) -> np.ndarray:
        return mapped(self.path)[self.table:].view("<i8")

    def verify(self) -> None:
        """Read every byte once and compare the checksums. UserError if one has changed."""
        crc, step, tokens, ends = 0, 16 << 20, self.tokens, self.ends
        if zlib.crc32(ends.tobytes()) != self.table_crc or (self.n_tokens and ends[-1] != self.n_tokens):
            raise UserError(f"{self.path}: corrupt: the table of document ends does not match its checksum")
        for start in range(0, self.n_tokens, step):
            crc = zlib.crc32(tokens[start:start + step].tobytes(), crc)
        if crc != self.crc:
            raise UserError(f"{self.path}: corrupt: the tokens do not match their checksum; write it again")

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, a view into the memory map [length]."""
        ends = self.ends
        return self.tokens[ends[i - 1] if i else 0:ends[i]]


def read_manifest(path: Path) -> dict:
    """NAME.json of a source. UserError if it is no list of shards."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if all({"file", "crc32", "tokens"} <= set(s) for s in info["shards"]):
            return info
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: corrupt, not a list of shards; write the source again")


class Shards:
    """
    One source: its shards in the order of the manifest.

        shards                 list of Shard
        n_tokens, n_documents  of all shards together
        fingerprint            checksum of all tokens: a checkpoint keeps it, to notice another data set on resume
    """
    def __init__(self, folder: str | Path, name: str, vocab_size: int | None = None, verify: bool | None = None,
                 tokenizer: str = ""):
        """
        vocab_size: the model's, larger than every token id. verify: as in Shard. tokenizer: Tokenizer.fingerprint of
        the model's; a source that another tokenizer made is refused. UserError for that, and if the source is missing,
        unfinished, damaged or empty, or does not fit the vocabulary.
        """
        folder = Path(folder)
        manifest = folder / f"{name}.json"
        if not manifest.is_file():
            present = ", ".join(sources(folder)) or "none"
            raise UserError(f"source {name!r}: no {manifest}; sources there: {present}")
        info = read_manifest(manifest)
        listed, made_by = info["shards"], info.get("tokenizer", "")
        if tokenizer and made_by and made_by != tokenizer:
            raise UserError(f"source {name!r} in {folder} was made with another tokenizer (fingerprint {made_by}, the "
                            f"model's is {tokenizer}): tokenise it with the model's tokenizer")
        self.name, self.shards = name, []
        for s in listed:
            if not (folder / s["file"]).is_file():
                raise UserError(f"source {name!r}: shard {folder / s['file']} is missing")
            shard = Shard(folder / s["file"], verify)
            if (shard.crc, shard.n_tokens) != (s["crc32"], s["tokens"]):
                raise UserError(f"{shard.path}: is not the shard that {manifest} was written with")
            self.shards.append(shard)
        self.n_tokens = sum(s.n_tokens for s in self.shards)
        self.n_documents = sum(s.n_documents for s in self.shards)
        self.fingerprint = zlib.crc32(repr([(s.crc, s.n_tokens) for s in self.shards]).encode())
        if self.n_tokens == 0:
            raise UserError(f"source {name!r} in {folder} is empty: no document has a token")
        max_id = max(s.max_id for s in self.shards)
        if vocab_size is not None and max_id >= vocab_size:
            raise UserError(f"source {name!r} in {folder} holds token id {max_id}, the model's vocabulary ends "
                            f"at {vocab_size - 1}: tokenise it with the model's tokenizer")

    def documents(self) -> Iterator[np.ndarray]:
        """All documents in file order, as views."""
        return (s.document(i) for s in self.shards for i in range(s.n_documents))


def main(cfg: Config) -> None:
    if not sources(cfg.folder):
        raise UserError(f"{cfg.folder}: no finished source there (NAME.json beside NAME_00000.bin)")
    for name in sources(cfg.folder):
        s = Shards(cfg.folder, name, verify=True)
        print(f"{s.name:20s} {s.n_documents:12,} documents {s.n_tokens:16,} tokens, "
              f"{s.n_tokens / s.n_documents:8.1f} tokens/document, checksums right")


if __name__ == "__main__":
    configurator.run(main, Config)
