"""
Token shards: documents as token ids on disk, of which only what is read at the moment is in memory (report section 2.1:
web, papers, books, code, synthetic).

A source NAME is a folder of files:

    NAME_00000.bin   header, 1 KiB | tokens, uint16 if the vocabulary fits, else uint32 | document ends, uint64
    NAME.json        the manifest: list of the shards with checksums, and a fingerprint of the tokenizer that made them;
                     written last, so a source without it is unfinished

Every file is written under another name, flushed to the disk and renamed (data/jsonl.py:whole_file). Opening a source
checks headers and sizes, and names the file that is truncated or corrupt. Several ranks share this work. The checksums
of tokens and document ends are verified on opening for sources under 64 million tokens, and for all by

    python -m data.shards out/tiny/data            # a line per source: documents, tokens, checksums verified

Documents end with <|endoftext|>, which the caller appends when it tokenises. The layout follows llm.c, with one file
instead of two and 64-bit counts (llm.c's int32 count ends at 2^31 tokens).
"""
import errno
import json
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

import configurator
from configurator import UserError
from data.jsonl import whole_file

MAGIC, VERSION, HEADER_WORDS = 0x6D694D6F, 1, 128          # header = 128 little-endian int64 words = 1 KiB
SMALL = 64 << 20                                           # tokens; a smaller source is checksummed on opening
OPEN = 64                                                  # shards of a process that are open at a time, of all sources
PIECE = 1 << 17                                            # numbers of a file that are read or mapped at a time


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
    listed, ours = {s["file"] for s in shards}, re.compile(re.escape(name) + r"_\d{5,}\.bin")
    for file in os.listdir(folder):
        if ours.fullmatch(file) and file not in listed:
            (folder / file).unlink()
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


class OpenShard(NamedTuple):
    """A shard's file while it is open."""
    file: BinaryIO
    width: int                             # bytes of a token, 2 or 4
    table: int                             # byte at which the document ends begin
    table_crc: int                         # their checksum


class Shard:
    """
    One file of a source. To make one opens nothing: the numbers come from the manifest. The file is opened, and its
    header compared with them, when something of it is read, and may be closed again in between (`opened`).

        n_tokens, n_documents  sizes
        max_id, crc            largest token id; checksum of the tokens

    Whatever is wrong with the file is a UserError that names it, and the source.
    """
    __slots__ = ("manifest", "name", "n_tokens", "n_documents", "max_id", "crc")

    def __init__(self, manifest: Path, listed: dict):
        self.manifest, self.name = manifest, listed["file"]
        self.n_tokens, self.n_documents = listed["tokens"], listed["documents"]
        self.max_id, self.crc = listed["max_id"], listed["crc32"]

    @property
    def path(self) -> Path:
        return self.manifest.parent / self.name

    def wrong(self, what: str) -> UserError:
        return UserError(f"source {self.manifest.stem!r}: {self.path}: {what}")

    def open(self) -> OpenShard:
        """The file, with a header that fits its size and the manifest."""
        try:
            file = with_room(lambda: open(self.path, "rb", buffering=0))
        except FileNotFoundError:
            raise self.wrong("shard is missing") from None
        except OSError as e:
            raise self.wrong(f"cannot be opened: {e.strerror}") from None
        try:
            return self.checked(file)
        except BaseException:
            file.close()
            raise

    def checked(self, file: BinaryIO) -> OpenShard:
        data, size = file.read(8 * HEADER_WORDS), os.fstat(file.fileno()).st_size
        header = np.frombuffer(data, dtype="<i8") if len(data) == 8 * HEADER_WORDS else [0]
        if header[0] != MAGIC:
            raise self.wrong("not a token shard (write it with data.shards.write_shard)")
        if header[9] != zlib.crc32(header[:9].tobytes()):
            raise self.wrong("corrupt: the header does not match its checksum; write it again")
        version, width, n, n_documents, _, max_id, crc, table_crc = (int(x) for x in header[1:9])
        if version != VERSION or width not in (2, 4):
            raise self.wrong(f"shard version {version} with {width}-byte tokens, this program reads version {VERSION} "
                             "with 2 or 4")
        table = 8 * HEADER_WORDS + -(-n * width // 8) * 8
        if size != table + 8 * n_documents:
            raise self.wrong(f"truncated or overwritten: {size:,} bytes, its header says {table + 8 * n_documents:,}; "
                             "write it again")
        if (n, n_documents, max_id, crc) != (self.n_tokens, self.n_documents, self.max_id, self.crc):
            raise self.wrong(f"is not the shard that {self.manifest} was written with")
        return OpenShard(file, width, table, table_crc)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, a read-only memory map that stays open as long as it is used, uint16 or uint32 [n_tokens]."""
        return self._map(f"<u{opened(self).width}", 8 * HEADER_WORDS, self.n_tokens)

    @property
    def ends(self) -> np.ndarray:
        """Where each document ends in tokens, a read-only memory map as above, int64 [n_documents]."""
        return self._map("<i8", opened(self).table, self.n_documents)

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens start .. start + n - 1, read with one call of the system: no page of the file stays mapped. -> [n]"""
        f = opened(self)
        return self._read(f, f"<u{f.width}", 8 * HEADER_WORDS + start * f.width, n)

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i [length]."""
        f, first = opened(self), max(i - 1, 0)
        *begin, end = self._read(f, "<i8", f.table + 8 * first, i + 1 - first).tolist()
        begin = begin[0] if begin else 0
        return self.read(begin, end - begin)

    def _map(self, dtype: str, at: int, n: int) -> np.ndarray:
        f = opened(self).file
        try:                                               # numpy maps no empty ones
            return with_room(lambda: np.memmap(f, dtype, "r", at, (n,))) if n else np.empty(0, dtype)
        except OSError as e:
            raise self.wrong(f"cannot be mapped: {e.strerror}") from None

    def _read(self, f: OpenShard, dtype: str, at: int, n: int) -> np.ndarray:
        out = np.empty(n, dtype)
        view, filled = memoryview(out).cast("B") if n else b"", 0
        while filled < len(view):
            try:
                data = os.pread(f.file.fileno(), len(view) - filled, at + filled)
            except OSError as e:
                raise self.wrong(f"cannot be read: {e.strerror}") from e
            if not data:
                raise self.wrong("became shorter while it was read")
            view[filled:filled + len(data)] = data
            filled += len(data)
        return out

    def lengths(self) -> np.ndarray:
        """Tokens of each document, uint32 [n_documents]; the table of ends is mapped piece by piece."""
        out, last = np.empty(self.n_documents, np.uint32 if self.n_tokens < 1 << 32 else np.uint64), 0
        for a in range(0, self.n_documents, PIECE):
            piece = np.array(self.ends[a:a + PIECE])
            out[a:a + PIECE] = np.diff(piece, prepend=last)
            last = piece[-1]
        if int(out.sum(dtype=np.uint64)) != self.n_tokens:
            raise self.wrong("corrupt: the table of document ends does not fit the tokens; write it again")
        return out

    def verify(self) -> None:
        """Read every byte once and compare the checksums. UserError if one has changed."""
        crc, table_crc, ends = 0, 0, 0
        for a in range(0, self.n_documents, PIECE):
            ends = self.ends[a:a + PIECE]
            table_crc = zlib.crc32(ends.tobytes(), table_crc)
        if table_crc != opened(self).table_crc or (self.n_tokens and ends[-1] != self.n_tokens):
            raise self.wrong("corrupt: the table of document ends does not match its checksum")
        for start in range(0, self.n_tokens, PIECE):
            crc = zlib.crc32(self.read(start, min(PIECE, self.n_tokens - start)), crc)
        if crc != self.crc:
            raise self.wrong("corrupt: the tokens do not match their checksum; write it again")


@lru_cache(maxsize=OPEN)
def opened(shard: Shard) -> OpenShard:
    """
    A shard's file, open. At most OPEN of a process are open at a time, of all sources together: Linux allows 1,024 by
    default, a corpus may have 88,602.
    """
    return shard.open()


def with_room(call: Callable[[], Any]) -> Any:
    """call(); where even fewer files may be open, those that `opened` keeps are closed, and it is called again."""
    try:
        return call()
    except OSError as e:
        if e.errno != errno.EMFILE:
            raise
    opened.cache_clear()
    return call()


def read_manifest(path: Path) -> dict:
    """NAME.json of a source. UserError if it is no list of shards, each a file in its folder."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if all(type(s[k]) is int for s in info["shards"] for k in ("tokens", "documents", "max_id", "crc32")) and \
                all(Path(s["file"]).name == s["file"] for s in info["shards"]):
            return info
    except (ValueError, KeyError, TypeError, RecursionError):
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
                 tokenizer: str = "", part: int = 0, parts: int = 1):
        """
        vocab_size: the model's, larger than every token id. verify: check the checksums; None = only if the source is
        small. tokenizer: Tokenizer.fingerprint of the model's; a source that another tokenizer made is refused. part,
        parts: only the shards part, part + parts ... are opened and checked now, so that ranks share the work; each
        is checked again when it is read. UserError for all that, and if the source is missing, unfinished, damaged or
        empty, or does not fit the vocabulary.
        """
        folder = Path(folder)
        manifest = folder / f"{name}.json"
        if not manifest.is_file():
            present = ", ".join(sources(folder)) or "none"
            raise UserError(f"source {name!r}: no {manifest}; sources there: {present}")
        info = read_manifest(manifest)
        made_by = info.get("tokenizer", "")
        if tokenizer and made_by and made_by != tokenizer:
            raise UserError(f"source {name!r} in {folder} was made with another tokenizer (fingerprint {made_by}, the "
                            f"model's is {tokenizer}): tokenise it with the model's tokenizer")
        self.name, self.shards = name, [Shard(manifest, listed) for listed in info["shards"]]
        self.n_tokens = sum(s.n_tokens for s in self.shards)
        self.n_documents = sum(s.n_documents for s in self.shards)
        self.fingerprint = zlib.crc32(repr([(s.crc, s.n_tokens) for s in self.shards]).encode())
        for shard in self.shards[part::parts]:
            opened(shard)
            if verify or (verify is None and self.n_tokens < SMALL):
                shard.verify()
        if self.n_tokens == 0:
            raise UserError(f"source {name!r} in {folder} is empty: no document has a token")
        max_id = max(s.max_id for s in self.shards)
        if vocab_size is not None and max_id >= vocab_size:
            raise UserError(f"source {name!r} in {folder} holds token id {max_id}, the model's vocabulary ends "
                            f"at {vocab_size - 1}: tokenise it with the model's tokenizer")

    def documents(self) -> Iterator[np.ndarray]:
        """All documents in file order."""
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
