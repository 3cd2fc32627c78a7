"""
Files as rows: every kind of file that people keep text, pages, problems and chats in (report section 2.1 starts from
such a crawl).

    .jsonl .ndjson          one object a line
    .json                   a list of objects, or an object with one such list in it
    .csv .tsv               the first line names the columns
    .parquet                needs pyarrow
    .warc                   a crawl, needs fastwarc: each response of status 200 with HTML or plain text is a row
    .html .htm .xhtml       one row {"html": bytes, "path"}
    .txt .md, source code   one row {"text", "path"}; in the charset that --encoding says or data/charset.py finds

All but .parquet may be compressed: .gz, .bz2, .xz, .zst (needs zstandard). A file is read as a stream; what is in
memory at a time is one row of at most 64 MiB. Nothing that a row or a file holds ends the reading: what cannot be read
comes out as a Bad with the reason, in its place.
"""
import bz2
import csv
import gzip
import importlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from configurator import UserError
from data.charset import BOMS, decode
from data.jsonl import json_object

MAX_ROW = 64 << 20              # bytes of one row; a longer one is left out
MAX_JSON = 256 << 20            # bytes of a .json file, which has to be in memory as a whole
PACKED = (".gz", ".bz2", ".xz", ".zst")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".warc")
PAGES = (".html", ".htm", ".xhtml")
TEXTS = tuple(".txt .md .markdown .rst .tex .py .ipy .c .h .cc .cpp .cxx .hpp .cu .java .js .mjs .jsx .ts .tsx .go "
              ".rs .rb .php .pl .pm .sh .bash .sql .jl .r .m .scala .kt .swift .cs .fs .hs .ml .lean .v .lua .dart .ex "
              ".erl .clj .lisp .el .f90 .f .asm .s .vhdl .css .scss .yaml .yml .toml .cmake .proto .tf".split())


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used. fault=False: it is whole, but not wanted (an image of a crawl)."""
    why: str
    fault: bool = True


# ---- which files ----------------------------------------------------------------------------------------------------

def kind_of(path: str | Path) -> str:
    """The ending that says how a file is read, ".jsonl" for a.jsonl.gz; "" for a file that has no reader."""
    name = str(path).lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    ending = os.path.splitext(name)[1]
    return ending if ending in TABLES + PAGES + TEXTS else ""


def listing(source: str | Path) -> tuple[list[Path], list[Path]]:
    """
    -> (files that have a reader, files that have none), both in the order of their paths. source: a file, or a folder
    with all below it but hidden files and folders (.git). UserError when there is nothing to read.
    """
    path, found = Path(source), []
    if path.is_file():
        found = [path]
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(n for n in inner if not n.startswith("."))
        found += [Path(folder, n) for n in names if not n.startswith(".")]
    found.sort()
    files = [f for f in found if kind_of(f)]
    if not files:
        what = f"no file that can be read (of {len(found)})" if path.exists() else "no such file or folder"
        raise UserError(f"{source}: {what}; what can be read: {', '.join((*TABLES, *PAGES, '.txt', '.md'))} and source "
                        f"code, each also with {', '.join(PACKED)}")
    return files, [f for f in found if not kind_of(f)]


def optional(module: str, package: str = "") -> ModuleType:
    """A package that only some files need. UserError says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = package or module.partition(".")[0]
        raise UserError(f"this needs the package {package}, which is not installed: pip install {package}") from None


def needed(files: list[Path]) -> None:
    """UserError before the work starts when a package for one of the files is missing."""
    for file in files:
        if kind_of(file) == ".parquet":
            optional("pyarrow.parquet")
        if kind_of(file) == ".warc":
            optional("fastwarc.warc")
        if file.name.endswith(".zst"):
            optional("zstandard")


# ---- rows -----------------------------------------------------------------------------------------------------------

def read_rows(path: str | Path, start: int = 0, end: int | None = None, encoding: str = "", kind: str = "",
              ) -> Iterator[tuple[int, dict | Bad]]:
    """
    (row number from 1, row) of one file. start, end: of an uncompressed .jsonl file only the lines that begin in these
    bytes, counted from there; lines_before says how many there are before. encoding: of text files, "" = UTF-8 or what
    a byte order mark says. kind: an ending that says how to read, "" = the file's own. UserError when a package is
    missing, OSError when the file cannot be opened.
    """
    path, kind, n = Path(path), kind or kind_of(path), 0
    damage: tuple = (EOFError, OSError, zlib.error, lzma.LZMAError)
    if path.name.endswith(".zst"):
        damage += (optional("zstandard").ZstdError,)
    reader = {".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows, ".warc": warc_rows}.get(kind)
    with open(path, "rb") as raw:                            # a missing file is an error, a damaged one is a Bad
        try:
            if kind == ".parquet":
                rows = parquet_rows(path)
            elif kind in (".jsonl", ".ndjson"):
                rows = jsonl_rows(unpacked(path, raw), start, end)
            else:                                            # fastwarc unpacks by itself, up to where a file is cut off
                file = raw if kind == ".warc" and path.suffix in (".gz", ".zst") else unpacked(path, raw)
                rows = reader(path, file) if reader else file_row(path, file, encoding)
            for row in rows:
                n += 1
                if row is not None:                          # a blank line
                    yield n, row
        except damage as e:
            yield n + 1, Bad(f"cut off or damaged, the rest of the file is not read: {' '.join(str(e).split())}")


def table_rows(path: str | Path, hint: str = "") -> Iterator[tuple[str, int, dict]]:
    """
    (file, row number, row) of a file, or of all files of a folder, of problems, chats or labels. A file with another
    ending than those of TABLES is read as .jsonl. UserError names file and row of the first that cannot be read and
    ends with the hint.
    """
    path = Path(path)
    for file in listing(path)[0] if path.is_dir() else [path]:
        kind = kind_of(file) if kind_of(file) in TABLES else ".jsonl"
        for n, row in read_rows(file, kind=kind):
            if isinstance(row, Bad):
                raise UserError(f"{file}:{n}: {row.why}" + (f"; {hint}" if hint else ""))
            yield str(file), n, row


def hub_rows(source: str, split: str, subset: str) -> Iterator[tuple[tuple[str, int], dict]]:
    """
    ((name, row number), row) of a data set of the Hugging Face hub, streamed. UserError when there is no such set,
    subset or split.
    """
    check_hub_name(source)
    datasets = optional("datasets")                         # 375 MB with its dependencies, only for the hub
    try:
        rows = datasets.load_dataset(source, subset or None, split=split, streaming=True)
        yield from (((source, n), row) for n, row in enumerate(rows, 1))
    except ValueError as e:                                 # no such subset or split
        raise UserError(f"{source}: {' '.join(str(e).split())}") from None


def check_hub_name(source: str) -> None:
    """UserError when a source that is no file or folder cannot be a data set of the hub either."""
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise UserError(f"{source}: no such folder or file, and not a hub name like owner/dataset")


def unpacked(path: Path, raw: BinaryIO) -> BinaryIO:
    """The content of an open file, unpacked by the ending of its name."""
    if path.name.endswith(".zst"):
        return io.BufferedReader(optional("zstandard").open(raw, "rb"))
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix.lower())
    return opener(raw, "rb") if opener else raw


@lru_cache(maxsize=64)
def lines_before(path: str | Path, at: int) -> int:
    """How many lines of a file begin before byte `at`."""
    n, left = int(at > 0), at - 1
    with open(path, "rb") as f:
        while left > 0 and (block := f.read(min(left, 1 << 22))):
            n, left = n + block.count(b"\n"), left - len(block)
    return n


def jsonl_rows(file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[dict | Bad | None]:
    """The lines that begin at byte start .. end - 1; None stands for a blank line."""
    at = start
    if start:                                                # to the first line that begins here
        file.seek(start - 1)
        at = start - 1 + skip_line(file)
    while end is None or at < end:
        line = file.readline(MAX_ROW + 1)
        if not line:
            return
        at += len(line)
        if len(line) > MAX_ROW:
            at += skip_line(file)
            yield Bad(f"longer than {MAX_ROW >> 20} MiB")
            continue
        try:
            yield json_object(line) if line.strip() else None
        except UserError as e:
            yield Bad(str(e))


def skip_line(file: BinaryIO) -> int:
    """Read to the end of the line. -> bytes read."""
    n = 0
    while piece := file.readline(1 << 20):
        n += len(piece)
        if piece.endswith(b"\n"):
            break
    return n


def json_rows(path: Path, file: BinaryIO) -> Iterator[dict | Bad]:
    """A list of objects, an object with exactly one list of objects in it, or one object."""
    data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        yield Bad(f"a .json file over {MAX_JSON >> 20} MiB has to be in memory as a whole: make it .jsonl")
        return
    try:
        value = json_object(b'{"value": ' + data.removeprefix(b"\xef\xbb\xbf") + b"}")["value"]
    except UserError as e:
        yield Bad(str(e))
        return
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        own_list = len(lists) == 1 and all(isinstance(v, (list, str, int, float)) or v is None for v in value.values())
        # {"data": [...]} is a table; {"messages": [...], "id": ...} and {"conversations": [...]} are one row
        value = lists[0] if own_list and not {"messages", "conversations"} & set(value) else [value]
    for row in value if isinstance(value, list) else [value]:
        yield row if isinstance(row, dict) else Bad(f"a {type(row).__name__} where a JSON object should be")


def csv_rows(path: Path, file: BinaryIO) -> Iterator[dict | Bad]:
    """The first line names the columns. A row with more or fewer fields, or one that is not UTF-8, is Bad."""
    csv.field_size_limit(MAX_ROW)
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(text, delimiter="\t" if kind_of(path) == ".tsv" else ",", restkey="", restval=None)
    try:
        for row in rows:
            if "" in row and isinstance(row[""], list) or None in row.values():
                yield Bad(f"not {len(rows.fieldnames or ())} fields, as the first line has")
            elif any("\udc80" <= c <= "\udcff" for value in row.values() if not value.isascii() for c in value):
                yield Bad("not UTF-8")
            else:
                yield row
    except csv.Error as e:
        yield Bad(f"not CSV, the rest of the file is not read: {e}")


def parquet_rows(path: Path) -> Iterator[dict | Bad]:
    """Rows of a parquet file, 256 in memory at a time."""
    parquet = optional("pyarrow.parquet")                    # 170 MB, only for those who read parquet
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError:                   # of one text: the file only says that they are UTF-8
                    rows = [utf8_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
                yield from rows
    except ValueError as e:                                  # pyarrow's ArrowInvalid
        yield Bad(f"cut off or damaged, the rest of the file is not read: {' '.join(str(e).split())}")


def utf8_row(batch: Any) -> dict | Bad:
    """The row of a pyarrow.RecordBatch of one."""
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return Bad("not UTF-8")


def warc_rows(path: Path, file: BinaryIO) -> Iterator[dict | Bad]:
    """
    Pages of a crawl: {"url", "html": bytes, "charset": what the HTTP header says} or {"url", "text"}. Everything else
    that a crawl holds (images, redirects, requests) is a Bad without fault.
    """
    warc = optional("fastwarc.warc")
    kinds = warc.WarcRecordType.response | warc.WarcRecordType.resource | warc.WarcRecordType.conversion
    for record in warc.ArchiveIterator(file, record_types=kinds, parse_http=False):
        size = record.content_length
        if size > MAX_ROW:
            yield Bad(f"longer than {MAX_ROW >> 20} MiB")
            continue
        block = record.reader.read(size)
        if not size or len(block) < size:                    # the library says nothing of a file that is cut off
            yield Bad("cut off or damaged")
            continue
        kind, status, charset, body = record.headers.get("Content-Type") or "", 200, None, block
        if record.is_http:
            try:
                record.set_bytes_content(block)
                record.parse_http(auto_decode="all")
                kind, charset, body = record.http_content_type or "", record.http_charset, record.reader.read(MAX_ROW)
                status = record.http_headers.status_code
            except (OSError, AttributeError) as e:
                yield Bad(f"not an answer of HTTP: {e}")
                continue
        kind = kind.partition(";")[0].strip().lower()
        if status != 200 or kind not in ("text/html", "application/xhtml+xml", "text/plain"):
            yield Bad(f"status {status}" if status != 200 else f"content type {kind or 'unknown'}", fault=False)
            continue
        url = (record.headers.get("WARC-Target-URI") or "").strip("<>")
        if kind == "text/plain":
            text = decoded(body, declared=charset or "")
            yield text if isinstance(text, Bad) else {"url": url, "text": text}
        else:
            yield {"url": url, "html": body, "charset": charset or ""}


def file_row(path: Path, file: BinaryIO, encoding: str = "") -> Iterator[dict | Bad]:
    """A page or a text as one row. A page stays bytes: data/extract.py finds its charset."""
    data = file.read(MAX_ROW + 1)
    if len(data) > MAX_ROW:
        yield Bad(f"longer than {MAX_ROW >> 20} MiB")
    elif kind_of(path) in PAGES:
        yield {"html": data, "path": str(path)}
    else:
        text = decoded(data, encoding)
        yield text if isinstance(text, Bad) else {"text": text, "path": str(path)}


def decoded(data: bytes, encoding: str = "", declared: str = "") -> str | Bad:
    """
    Text of a file: by its byte order mark, else in the encoding, else as data/charset.py finds. declared: what an HTTP
    header says. A Bad when that does not fit: a text that is wrongly decoded is worse than one that is missing.
    """
    try:
        marked = any(data.startswith(mark) for mark, _ in BOMS)
        text = data.decode(encoding) if encoding and not marked else decode(data, declared)
    except LookupError:
        raise UserError(f"encoding {encoding!r}: Python knows no such encoding") from None
    except UnicodeDecodeError as e:
        return Bad(f"not {encoding}: byte {data[e.start]:#04x} at {e.start}; --encoding=NAME says what it is")
    if "\0" in text:
        return Bad("no text: it holds NUL bytes")
    broken = text.count("\ufffd")
    return Bad(f"{broken:,} characters in no known charset; --encoding=NAME says what it is") \
        if broken > len(text) // 500 else text
