"""
From files to token shards, for corpora that are larger than memory (report section 2.1).

    plan     the files, cut into parts of 8 to 512 MiB; the cut depends on the files alone
    read     a part: rows -> documents -> text, and the keys of deduplication
    dedup    over all parts: which documents stay
    write    a part: tags, decontamination, copies, tokens -> the part's shards
    finish   the shards get their names and manifests, what was rejected its file

`read` and `write` are pure functions of a part, so the parts may be done by any number of processes (`run`) or machines
(data/trove.py) in any order, and the shards come out the same byte for byte. Every step leaves its result in the folder
OUT/NAME.work and is not done twice: a run that was killed goes on where it was when the same command is given again.

Memory: a process holds a batch of documents, 8 MiB of text, and 136 bytes for each document of its part. `dedup` holds
80 bytes for each document of the corpus, and up to 770 more for one that shares its band keys with another
(data/dedup.py). The work folder needs as much disk as the extracted text and the shards together. data/hub.py is the
command.
"""
import json
import multiprocessing
import os
import shutil
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError
from data import tag as tagging
from data.adapters import convert
from data.corpus import SOURCE_OF, SOURCES, Record, copies, put_tags
from data.decontaminate import build_index, contaminated
from data.dedup import band_keys, canonical_url, clusters, shingle_hashes, shingles, signatures
from data.extract import extract
from data.jsonl import read_jsonl, whole_file
from data.problems import identity
from data.readers import Bad, check_hub_name, hub_rows, lines_before, listing, needed, read_rows
from data.sft_data import read_questions
from data.shards import ShardWriter, read_manifest, write_manifest
from data.text import whole
from tokenizer import Tokenizer

PART = (8 << 20, 512 << 20)      # bytes of the files of a part, at least and at most
BATCH = 8 << 20                  # characters of the documents that are worked on at a time
CACHE = 256 << 20                # bytes of shingles that dedup keeps for comparing
PAGE = "page: "                  # begins the names of what extraction counted; nothing is left out by these


@dataclass(frozen=True)
class Job:
    """What decides the shards; the fields of data/hub.py of the same names."""
    adapter: str
    source: str
    out: str
    name: str
    tokenizer: str
    columns: str = ""
    encoding: str = ""
    limit: int | None = None
    split: str = "train"
    subset: str = ""
    labels: str = ""
    heldout: str = ""
    valid_share: float = 0.01
    max_rejected: float = 0.05

    @property
    def work(self) -> Path:
        return Path(self.out) / f"{self.name}.work"

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources that it may write."""
        return SOURCES if self.labels else (self.name,)


def run(job: Job, workers: int = 1, replace: bool = False, append: bool = False) -> str:
    """All steps. replace, append: what happens to a source that is there. -> the table of steps. UserError."""
    work, parts = plan(job, replace, append)
    with ExitStack() as stack:
        each = map
        if workers > 1 and parts > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(min(workers, parts)))
            each = pool.imap_unordered
        each_part(each, read_part, work, parts, "read", job.max_rejected)
        dedup(work)
        each_part(each, write_part, work, parts, "write", job.max_rejected)
    return finish(work, append)


def each_part(each: Callable, step: Callable[[Path, int], dict], work: Path, parts: int, name: str,
              max_rejected: float) -> None:
    """A step on all parts; each: map, or that of a pool. UserError as soon as too much is rejected."""
    total = Counter()
    done = each(call, [(step, work, k) for k in range(parts)])
    for counts in tqdm(done, total=parts, desc=name, unit="part", leave=False, disable=None):
        total.update({k: v for k, v in counts.items() if isinstance(v, int)})
        check_rejected(work, total, max_rejected, least=1000)


def call(job: tuple) -> dict:
    """For Pool.imap: (function, arguments...) -> its result."""
    return job[0](*job[1:])


def check_rejected(work: Path, counts: Counter, share: float, least: int = 0) -> None:
    """UserError when more than `share` of the rows, and more than nine, were rejected; not before `least` rows."""
    rows, bad = counts["rows"], counts["rejected"]
    if rows >= least and bad > max(9, share * rows):
        raise UserError(f"{bad:,} of {rows:,} rows rejected, more than max_rejected = {share:g} allows"
                        f"{first_rejected(work)}")


def first_rejected(work: Path) -> str:
    """The words "; the first: FILE:ROW: why", or none if nothing was rejected."""
    for path in sorted(work.glob("rejected_*.jsonl")):
        for _, row in read_jsonl(path):
            return f"; the first: {row['file']}:{row['row']}: {row['reason']}"
    return ""


# ---- plan -----------------------------------------------------------------------------------------------------------

def plan(job: Job, replace: bool = False, append: bool = False) -> tuple[Path, int]:
    """
    Make the work folder, or find the one of the same command that was killed. -> (it, number of parts). UserError when
    a source is there already and neither replace nor append says what to do, and for what would fail after hours.
    """
    work, (files, unread) = job.work, listing(job.source) if Path(job.source).exists() else ([], [])
    needed(files)
    if not (work / "moves.json").is_file():                  # else it was killed in the last step, after all checks
        there = [n for n in job.sources if (Path(job.out) / f"{n}.json").is_file()]
        if there and not (replace or append):
            raise UserError(f"source {there[0]!r} is in {job.out} already: --append adds to it, --replace writes it "
                            "anew, --name gives the new one another name")
    tokenizer = Tokenizer.load(job.tokenizer)
    for folder in (Path(job.out), Path(job.out, "valid")):
        for name in job.sources if append else ():
            if (folder / f"{name}.json").is_file():
                made_by = read_manifest(folder / f"{name}.json").get("tokenizer")
                if made_by and made_by != tokenizer.fingerprint:
                    raise UserError(f"source {name!r} in {folder} was made with another tokenizer: nothing to add to")
    if not Path(job.source).exists():
        check_hub_name(job.source)
    if job.heldout:
        read_questions(job.heldout)
    labels = tagging.read_labels(job.labels) if job.labels else None
    stats = [(str(f), s.st_size, s.st_mtime_ns) for f in files for s in [f.stat()]] or [(job.source, 0, 0)]
    made = {"job": asdict(job), "files": [list(s) for s in stats], "unread": [str(f) for f in unread],
            "parts": cut(stats, job.limit)}
    path = work / "plan.json"
    if not (path.is_file() and json.loads(path.read_text(encoding="utf-8")) == made):
        shutil.rmtree(work, ignore_errors=True)              # of another command, or of files that have changed
        with whole_file(path) as f:
            json.dump(made, f)
        if labels:
            tagger, accuracy = tagging.train(*labels)
            tagging.save(tagger, work / "tagger.pt")
            print("tagger, held-out: " + ", ".join(f"{k} {v:.3g}" for k, v in accuracy.items()))
    elif any(work.glob("part_*.json")) or (work / "moves.json").is_file():
        print(f"{work}: going on with the run that was ended there")
    planned.cache_clear()
    tools.cache_clear()
    return work, len(made["parts"])


def cut(files: list[tuple[str, int, int]], limit: int | None = None) -> list[list]:
    """
    (path, bytes, time) of all files -> parts, each a list of [path, first byte, last byte or None for all]. About 64
    parts, in the bounds of PART; only uncompressed .jsonl is cut inside a file. With a limit there is one part.
    """
    target = min(max(sum(size for _, size, _ in files) // 64, PART[0]), PART[1])
    pieces = []
    for path, size, _ in files:
        inside = path.lower().endswith((".jsonl", ".ndjson")) and size > 1.5 * target
        bounds = [*range(0, size - target // 2, target), size] if inside else [0, size]
        pieces += [(path, a, b if inside else None, b - a) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    parts, filled = [[]], 0
    for path, start, end, size in pieces:
        if parts[-1] and filled + size > target and not limit:
            parts.append([])
            filled = 0
        parts[-1].append([path, start, end])
        filled += size
    return parts


@lru_cache(maxsize=1)
def planned(work: Path) -> tuple[Job, dict]:
    """The plan of a work folder."""
    made = json.loads((work / "plan.json").read_text(encoding="utf-8"))
    return Job(**made["job"]), made


# ---- read -----------------------------------------------------------------------------------------------------------

def read_part(work: Path, k: int) -> dict:
    """
    Part k: text_K.jsonl with [name, text] a line, keys_K.npy uint64 [14, n], names_K.npy uint64 [3, n] (hash of the
    address or 0, hash of the text, byte where the line begins), rejected_K.jsonl. -> counts, as in part_K.json.
    """
    done = work / f"part_{k:05d}.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    clock, counts, keys, names = time.process_time(), Counter(), [], array("Q")
    with whole_file(work / f"text_{k:05d}.jsonl", "wb") as texts, whole_file(work / f"rejected_{k:05d}.jsonl") as out:
        def reject(place: tuple, why: str) -> None:
            path, n, *start = place
            counts["rejected"] += 1
            row = n + sum(lines_before(path, at) for at in start)
            out.write(json.dumps({"file": path, "row": row, "reason": why}) + "\n")

        for batch in batches(documents(work, k, counts, reject)):
            keys.append(band_keys(signatures(shingle_hashes([r.text for r in batch]))))
            for record in batch:
                names.extend((hashed(canonical_url(record.url)), hashed(record.text), texts.tell()))
                texts.write(json.dumps([record.url, record.text], ensure_ascii=False).encode() + b"\n")
                counts["characters"] += len(record.text)
    np.save(work / f"keys_{k:05d}.npy", np.concatenate(keys).T if keys else np.zeros((14, 0), np.uint64))
    np.save(work / f"names_{k:05d}.npy", np.array(names, np.uint64).reshape(-1, 3).T)
    result = {**counts, "documents": len(names) // 3, "seconds": time.process_time() - clock}
    with whole_file(done) as f:
        json.dump(result, f)
    return result


def documents(work: Path, k: int, counts: Counter, reject: Callable[[tuple, str], None]) -> Iterator[Record]:
    """The documents of part k with their text; what has none is counted, what cannot be read is rejected."""
    (job, made), pages = planned(work), Counter()
    if Path(job.source).exists():
        rows = (((path, n, start), row) for path, start, end in made["parts"][k]
                for n, row in read_rows(path, start, end, job.encoding))
    else:
        rows = hub_rows(job.source, job.split, job.subset)
    for place, item in islice(convert(job.adapter, rows, counts, job.columns), job.limit):
        if isinstance(item, Bad):
            reject(place, item.why)
            continue
        if not isinstance(item, Record):
            raise UserError(f"adapter {job.adapter} gives no documents, so no shards can be made of it; without "
                            "--tokenizer it writes a .jsonl file")
        text = text_of(item, pages)
        if isinstance(text, Bad):
            reject(place, text.why)
        elif text.strip():
            yield Record(whole(item.url), text=text)
        else:
            counts["empty"] += 1
    counts.update({f"{PAGE}{what}": n for what, n in pages.items()})


def text_of(record: Record, pages: Counter | None = None) -> str | Bad:
    """
    Its text, of a page the extracted one (data/text.py: U+FFFD for half of a surrogate pair). pages: what
    data/extract.py counts.
    """
    try:
        return whole(record.text or extract(record.html, record.charset, pages))
    except Exception as e:                                   # whatever a page does to the parser, it is one page
        return Bad(f"extraction failed: {type(e).__name__}: {' '.join(str(e).split())}")


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Lists of about BATCH characters, of 1,000 documents at most."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.text)
        if size >= BATCH or len(batch) == 1000:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def hashed(text: str) -> int:
    """64-bit hash, never 0 but for ""."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1 if text else 0


# ---- dedup ----------------------------------------------------------------------------------------------------------

def dedup(work: Path) -> dict:
    """
    Over the whole corpus: the first document of each address stays, then the first of each near copy. keep_K.npy, bool
    [n], for each part. -> counts, as in dedup.json: of the documents dropped for their address, `differ` have another
    text than the one that stays.
    """
    done = work / "dedup.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    clock, n_parts = time.process_time(), len(planned(work)[1]["parts"])
    names = [np.load(work / f"names_{k:05d}.npy") for k in range(n_parts)]
    starts = np.cumsum([0] + [x.shape[1] for x in names])    # number of each part's first document
    address, text, line = np.concatenate(names, axis=1)      # [n] each
    del names
    alive = np.ones(len(address), bool)
    known = np.flatnonzero(address)
    _, first, same = np.unique(address[known], return_index=True, return_inverse=True)
    alive[known] = False
    alive[known[first]] = True
    differ = int((text[known] != text[known[first]][same]).sum())
    del text, address, known, first, same

    numbers = np.flatnonzero(alive)                          # the documents that MinHash sees
    cache: OrderedDict[int, np.ndarray] = OrderedDict()
    size = 0

    def shingles_of(i: int) -> np.ndarray:
        nonlocal size
        if i not in cache:
            k = int(np.searchsorted(starts, numbers[i], side="right")) - 1
            with open(work / f"text_{k:05d}.jsonl", "rb") as f:
                f.seek(int(line[numbers[i]]))
                cache[i] = shingles([json.loads(f.readline())[1]])[0]
            size += cache[i].nbytes
            while size > CACHE and len(cache) > 1:
                size -= cache.popitem(last=False)[1].nbytes
        cache.move_to_end(i)
        return cache[i]

    def band(b: int) -> np.ndarray:
        parts = (np.load(work / f"keys_{k:05d}.npy", mmap_mode="r")[b] for k in range(n_parts))
        return np.concatenate([*parts])[numbers]

    root = clusters(map(band, range(14)), shingles_of, len(numbers))
    keep = np.zeros(len(alive), bool)
    keep[numbers[root == np.arange(len(root))]] = True
    for k in range(n_parts):
        np.save(work / f"keep_{k:05d}.npy", keep[starts[k]:starts[k + 1]])
    result = {"documents": len(alive), "addresses": len(numbers), "differ": differ, "kept": int(keep.sum()),
              "seconds": time.process_time() - clock}
    with whole_file(done) as f:
        json.dump(result, f)
    return result


# ---- write ----------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def tools(work: Path) -> tuple[Tokenizer, dict, "tagging.Tagger | None"]:
    """What each process loads once: tokenizer, index of the held-out texts, tagger."""
    job, _ = planned(work)
    index = build_index(read_questions(job.heldout)) if job.heldout else {}
    return Tokenizer.load(job.tokenizer), index, tagging.load(work / "tagger.pt") if job.labels else None


def write_part(work: Path, k: int) -> dict:
    """Part k: its shards SOURCE_K.bin and valid/SOURCE_K.bin in the work folder. -> counts, as in written_K.json."""
    done = work / f"written_{k:05d}.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    clock, counts, (job, _), (tokenizer, index, tagger) = time.process_time(), Counter(), planned(work), tools(work)
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for batch in batches(kept(work, k)):
            hit = contaminated([r.text for r in batch], index) if index else np.zeros(len(batch), bool)
            batch = [r for r, bad in zip(batch, hit, strict=True) if not bad]
            counts["contaminated"] += int(hit.sum())
            put_tags(batch, tagger, None)
            for record in batch:
                source = SOURCE_OF.get(record.tags.domain, "web") if record.tags else job.name
                held = int(identity(record.text), 16) % 10_000 < 10_000 * job.valid_share
                where = f"valid/{source}" if held else source
                n = copies(record)
                if n and where not in writers:
                    path = work / f"{where}_{k:05d}.bin"
                    file = stack.enter_context(whole_file(path, "wb"))
                    writers[where] = ShardWriter(path, file, tokenizer.vocab_size)
                ids = tokenizer.encode(record.text) + [tokenizer.eos_id] if n else []
                for _ in range(n):
                    writers[where].add(ids)
                counts["written"] += n
                counts["dropped by tags"] += n == 0
        shards = {where: writer.finish() for where, writer in writers.items()}
    result = {**counts, "seconds": time.process_time() - clock, "shards": shards}
    with whole_file(done) as f:
        json.dump(result, f)
    return result


def kept(work: Path, k: int) -> Iterator[Record]:
    """The documents of part k that dedup left."""
    keep = np.load(work / f"keep_{k:05d}.npy")
    with open(work / f"text_{k:05d}.jsonl", "rb") as f:
        for wanted, line in zip(keep, f, strict=True):
            if wanted:
                url, text = json.loads(line)
                yield Record(url or identity(text), text=text)


# ---- finish ---------------------------------------------------------------------------------------------------------

def finish(work: Path, append: bool = False) -> str:
    """
    The shards of all parts get consecutive numbers in OUT and OUT/valid, behind those that are there with `append`;
    manifests; OUT/NAME.rejected.jsonl; the work folder goes. -> the table of steps. UserError when nothing is left.
    """
    job, made = planned(work)
    out, n_parts = Path(job.out), len(made["parts"])
    read, wrote = ([json.loads((work / f"{step}_{k:05d}.json").read_text(encoding="utf-8")) for k in range(n_parts)]
                   for step in ("part", "written"))
    total = sum((Counter({k: v for k, v in r.items() if k != "shards"}) for r in read + wrote), Counter())
    check_rejected(work, total, job.max_rejected)
    places = [f"{folder}{name}" for folder in ("", "valid/") for name in job.sources]
    if not any(w["shards"] for w in wrote):
        first = first_rejected(work)
        shutil.rmtree(work)                                  # there is nothing to go on with
        with suppress(OSError):
            out.rmdir()                                      # made for this; not if something else is in it
        raise UserError(f"{job.source}: nothing is left to write: {summary(total) or 'there is no row'}{first}")
    reasons = out / f"{job.name}.rejected.jsonl"
    old = reasons.read_bytes() if append and reasons.is_file() else b""
    with whole_file(reasons, "wb") as f:
        f.write(old)
        for path in made["unread"]:
            row = {"file": path, "row": 0, "reason": f"no reader for {os.path.splitext(path)[1] or 'such a name'}"}
            f.write(json.dumps(row).encode() + b"\n")
        for k in range(n_parts):
            f.write((work / f"rejected_{k:05d}.jsonl").read_bytes())

    moves = work / "moves.json"                              # decided once: after a kill the same names again
    if not moves.is_file():
        listed = {}
        for place in places:
            manifest = out / f"{place}.json"
            old = read_manifest(manifest)["shards"] if append and manifest.is_file() else []
            new = [dict(w["shards"][place], part=k) for k, w in enumerate(wrote) if place in w["shards"]]
            listed[place] = old + [dict(s, file=f"{Path(place).name}_{len(old) + i:05d}.bin")
                                   for i, s in enumerate(new)]
        with whole_file(moves) as f:
            json.dump(listed, f)
    (out / "valid").mkdir(exist_ok=True)
    tokenizer = Tokenizer.load(job.tokenizer)
    lines = table(read, wrote, json.loads((work / "dedup.json").read_text(encoding="utf-8")), total)
    for place, shards in json.loads(moves.read_text(encoding="utf-8")).items():
        if not append:
            (out / f"{place}.json").unlink(missing_ok=True)
        for shard in shards:
            made_here = work / f"{place}_{shard.pop('part', -1):05d}.bin"
            if made_here.is_file():
                os.replace(made_here, out / Path(place).parent / shard["file"])
        if shards:
            info = write_manifest((out / place).parent, Path(place).name, shards, tokenizer.vocab_size,
                                  tokenizer.fingerprint)
            lines.append(f"  {place:<14}{info['documents']:>12,} documents {info['tokens']:>14,} tokens in {out}")
        elif place.startswith("valid/") and total["written"]:
            lines.append(f"  {place:<14} no document fell to it: raise --valid_share for a validation loss")
    if made["unread"] or total["rejected"]:
        endings = Counter(os.path.splitext(p)[1] or Path(p).name for p in made["unread"])
        unread = ", ".join(f"{n} {ending}" for ending, n in endings.most_common(8))
        lines.append(f"{reasons}: {total['rejected']:,} rows rejected; files not read: "
                     f"{unread or 'none'}")
    shutil.rmtree(work)
    return "\n".join(lines)


def summary(counts: Counter) -> str:
    """The counts of what was left out, as one line."""
    others = ("rows", "documents", "characters", "seconds", "written")
    left_out = {k: v for k, v in counts.items() if k not in others and not k.startswith(PAGE)}
    return ", ".join(f"{k} {v:,}" for k, v in sorted(left_out.items()) if v)


def table(read: list[dict], wrote: list[dict], dedup: dict, total: Counter) -> list[str]:
    """The steps with documents in and out and CPU seconds of all processes."""
    seconds = lambda parts: sum(p["seconds"] for p in parts)
    kept, clean = dedup["kept"], dedup["kept"] - total["contaminated"]
    steps = [("rows -> text", total["rows"], dedup["documents"], seconds(read)),
             ("equal addresses", dedup["documents"], dedup["addresses"], 0.0),
             ("MinHash, exact Jaccard >= .7", dedup["addresses"], kept, dedup["seconds"]),
             ("decontaminate (16-gram)", kept, clean, 0.0),
             ("tags, copies, tokens", clean, total["written"], seconds(wrote))]
    lines = [f"{'step':<34}{'in':>12}{'out':>12}{'CPU s':>9}"]
    lines += [f"{name:<34}{a:>12,}{b:>12,}{s:>9.1f}" for name, a, b, s in steps]
    pages = [(name.removeprefix(PAGE), n) for name, n in sorted(total.items()) if name.startswith(PAGE)]
    lines[2:2] = [f"  {name:<44}{n:>12,}" for name, n in pages]
    lines.append(f"{total['characters'] / 1e6:,.2f} M characters; left out: {summary(total) or 'nothing'}")
    if dedup["differ"]:
        lines.append(f"{dedup['differ']:,} of the documents dropped for their address had another text than the first")
    return lines
