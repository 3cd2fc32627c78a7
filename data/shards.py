"""
Token shards: documents as ids on disk, read through memory maps (report section 2.1: web, papers, books,
code, synthetic).

A source NAME is a folder of files
    NAME_00000.bin   header 1 KiB | tokens, uint16 if the vocabulary fits, else uint32 | document ends, uint64
    NAME.json        written last, so a source without it is unfinished: the list of its shards with checksums
Every file is written under another name, synced and renamed. Opening checks header, sizes and document ends,
and names the file that is truncated or corrupt; the tokens' checksum is verified for shards under 64 MiB, and
by hand with

    python -m data.shards out/tiny/data            # a line per source: documents, tokens, checksums verified

Documents end with <|endoftext|>; whoever tokenises appends it (Tokenizer.encode_documents). The layout
follows llm.c, with one file instead of two and 64-bit counts (its int32 count ends at 2^31 tokens).
"""
import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np

from configurator import UserError, one_line

MAGIC, VERSION, HEADER_WORDS = 0x6D694D6F, 1, 128          # header = 128 little-endian int64 words = 1 KiB
SMALL = 64 << 20                                           # bytes; smaller shards are checksummed on opening


def write_shard(path, documents, vocab_size):
    """
    documents: iterable of id sequences, consumed once and never held. -> dict(file, documents, tokens,
    max_id, crc32). Atomic: `path` is either the old file or the whole new one. ValueError names a document
    with an id >= vocab_size.
    """
    path, dtype = Path(path), np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    ends, n, crc, top = [], 0, 0, -1
    with open(temporary, "wb") as f:
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
            crc, n, top = zlib.crc32(data, crc), n + ids.size, max(top, int(ids.max()))
            ends.append(n)
        f.write(b"\0" * (-f.tell() % 8))                    # the uint64 table starts on its own boundary
        table = np.asarray(ends, dtype="<u8").tobytes()
        f.write(table)
        header = np.zeros(HEADER_WORDS, dtype="<i8")
        header[:9] = MAGIC, VERSION, dtype.itemsize, n, len(ends), vocab_size, top, crc, zlib.crc32(table)
        header[9] = zlib.crc32(header[:9].tobytes())
        f.seek(0)
        f.write(header.tobytes())
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    return {"file": path.name, "documents": len(ends), "tokens": n, "max_id": top, "crc32": crc}


def write_source(folder, name, documents, vocab_size, shard_tokens=1 << 28):
    """
    All documents of one source, in shards of about shard_tokens tokens. -> the manifest, as in NAME.json.
    Mix the documents before: each epoch is shuffled by shard and inside a shard, not across shards.
    """
    folder, shards, it = Path(folder), [], iter(documents)
    manifest = folder / f"{name}.json"
    manifest.unlink(missing_ok=True)                        # unfinished from here until the last line
    pending = next(it, None)
    while pending is not None or not shards:
        def until_full(first):
            nonlocal pending
            n, document = 0, first
            while document is not None:
                yield document
                n += len(document)
                document = next(it, None)
                if n >= shard_tokens:
                    break
            pending = document
        shards.append(write_shard(folder / f"{name}_{len(shards):05d}.bin", until_full(pending), vocab_size))
    for stale in folder.glob(f"{name}_[0-9][0-9][0-9][0-9][0-9].bin"):
        if stale.name not in {s["file"] for s in shards}:
            stale.unlink()
    info = {"name": name, "vocab_size": vocab_size, "tokens": sum(s["tokens"] for s in shards),
            "documents": sum(s["documents"] for s in shards), "shards": shards}
    temporary = manifest.with_name(manifest.name + ".tmp")
    temporary.write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, manifest)
    return info


def sources(folder):
    """Names of the finished sources in a folder, sorted."""
    names = {p.name.removesuffix("_00000.bin") for p in Path(folder).glob("*_00000.bin")}
    return sorted(n for n in names if (Path(folder) / f"{n}.json").is_file())


class Shard:
    """One file. tokens: read-only memory map [n_tokens]; ends int64 [n_documents]: where each ends."""
    def __init__(self, path, verify=None):
        """verify: check the tokens' checksum; default: only if the file is small. ValueError if damaged."""
        path, size = Path(path), os.path.getsize(path)
        header = np.fromfile(path, dtype="<i8", count=HEADER_WORDS)
        if header.size < HEADER_WORDS or header[0] != MAGIC:
            raise UserError(f"{path}: not a token shard (write it with data.shards.write_shard)")
        if header[9] != zlib.crc32(header[:9].tobytes()):
            raise UserError(f"{path}: corrupt: the header does not match its checksum; write it again")
        version, width, n, n_documents, vocab_size, max_id, crc, table_crc = (int(x) for x in header[1:9])
        if version != VERSION or width not in (2, 4):
            raise UserError(f"{path}: shard version {version} with {width}-byte tokens, "
                            f"this program reads version {VERSION} with 2 or 4")
        start = 8 * HEADER_WORDS
        table_at = start + -(-n * width // 8) * 8
        if size != table_at + 8 * n_documents:
            raise UserError(f"{path}: truncated or overwritten: {size:,} bytes, its header says "
                            f"{table_at + 8 * n_documents:,}; write it again")
        self.path, self.vocab_size, self.max_id, self.crc = path, vocab_size, max_id, crc
        empty = np.zeros(0, dtype="<u2")
        self.tokens = np.memmap(path, dtype=f"<u{width}", mode="r", offset=start, shape=(n,)) if n else empty
        self.ends = np.fromfile(path, dtype="<u8", offset=table_at, count=n_documents).astype(np.int64)
        if zlib.crc32(self.ends.astype("<u8").tobytes()) != table_crc or (n and self.ends[-1] != n):
            raise UserError(f"{path}: corrupt: the table of document ends does not match its checksum")
        if verify or (verify is None and size < SMALL):
            self.verify()

    def verify(self):
        """Read every token once and compare the checksum. ValueError if a byte changed."""
        crc, step = 0, 16 << 20
        for at in range(0, len(self.tokens), step):
            crc = zlib.crc32(self.tokens[at:at + step].tobytes(), crc)
        if crc != self.crc:
            raise UserError(f"{self.path}: corrupt: the tokens do not match their checksum; write it again")

    def document(self, i):
        """Tokens of document i, a view."""
        return self.tokens[self.ends[i - 1] if i else 0:self.ends[i]]


class Shards:
    """
    One source: its shards in order. ValueError if it is missing, unfinished, empty or does not fit the
    vocabulary.
    """
    def __init__(self, folder, name, vocab_size=None, verify=None):
        folder = Path(folder)
        manifest = folder / f"{name}.json"
        if not manifest.is_file():
            have = ", ".join(sources(folder)) or "none"
            raise UserError(f"source {name!r}: no {manifest}; sources there: {have}")
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
        top = max(s.max_id for s in self.shards)
        if vocab_size is not None and top >= vocab_size:
            raise UserError(f"source {name!r} in {folder} holds token id {top}, the model's vocabulary ends "
                            f"at {vocab_size - 1}: tokenise it with the model's tokenizer")

    def documents(self):
        """All documents in file order, as views."""
        return (s.document(i) for s in self.shards for i in range(len(s.ends)))

    def __getitem__(self, i):
        """Document i, counted over all shards."""
        for s in self.shards:
            if i < len(s.ends):
                return s.document(i)
            i -= len(s.ends)
        raise IndexError(f"source {self.name!r} has {self.n_documents} documents")


def main(folder):
    if not sources(folder):
        raise SystemExit(f"shards error: {folder}: no finished source there (NAME.json beside NAME_00000.bin)")
    for name in sources(folder):
        try:
            s = Shards(folder, name, verify=True)
        except ValueError as e:
            raise SystemExit(f"shards error: {e}") from None
        print(f"{s.name:20s} {s.n_documents:12,} documents {s.n_tokens:16,} tokens, "
              f"{s.n_tokens / s.n_documents:8.1f} tokens/document, checksums right")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m data.shards FOLDER")
    with one_line():
        main(sys.argv[1])
