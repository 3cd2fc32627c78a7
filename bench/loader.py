"""
The loader on a corpus that is as large as the 7B's: start-up time, memory and open files of one rank.

    python bench/loader.py                                              # 88,602 shards, 10^8 documents; 2 GB of disk
    python bench/loader.py --shards=886                                 # as many documents a shard as 10^10 would give
    python bench/loader.py --shards=2000 --documents=1e6 --files=256    # to see that it runs, quickly

The shards are real except for their tokens: these are holes in sparse files, which read as zeros. Document lengths are
drawn, on average `tokens` a document. A process of its own opens the source (as rank 0 of `ranks`) and reads
`batches` batches of 8 rows from far-apart places. It prints its CPU seconds and peak memory (VmHWM, all
mapped pages counted) beside the size of all document tables, which a loader that keeps them would hold in every rank.

The last line is that size over what reading adds to the memory of Python and torch; out/bench/loader.json has the
numbers.
"""
import json
import os
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import checkpoint  # noqa: E402
import configurator  # noqa: E402
from data.loader import MixtureLoader  # noqa: E402
from data.shards import HEADER_WORDS, MAGIC, VERSION, write_manifest  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The command line of bench/loader.py."""
    shards: int = 88_602                  # 23.8T tokens in shards of 2^28
    documents: float = 1e8                # of all shards together
    tokens: int = 1000                    # per document, on average
    ranks: int = 8                        # the process that is measured is one of so many
    files: int = 0                        # open files that it may have (ulimit -n), 0 = as they are
    batches: int = 50                     # of 8 rows of 8,192 tokens
    folder: str = "out/bench/loader"      # the source is made here, and removed at the end
    out: str = "out/bench/loader.json"    # the result

    def __post_init__(self):
        configurator.at_least(self, 1, "shards", "documents", "tokens", "ranks", "batches")
        configurator.at_least(self, 0, "files")


def make_source(folder: Path, shards: int, documents: int, tokens: int, name: str = "web") -> None:
    """A source of `documents` documents of about `tokens` zeros, in sparse files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, listed = np.random.default_rng(0), []
    for k in range(shards):
        n = documents * (k + 1) // shards - documents * k // shards
        ends = np.empty(n, "<u8")
        for a in range(0, n, 1 << 20):                    # a shard may have 10^8 documents
            ends[a:a + (1 << 20)] = draw.integers(1, 2 * tokens, len(ends[a:a + (1 << 20)]))
        np.cumsum(ends, out=ends)
        header = np.zeros(HEADER_WORDS, "<i8")
        total = int(ends[-1]) if n else 0
        crc = zlib.crc32(bytes(4 * total)) if total < 1 << 16 else 0         # large sources are not summed at the start
        header[:9] = MAGIC, VERSION, 4, total, n, 151_680, 0, crc, zlib.crc32(ends)
        header[9] = zlib.crc32(header[:9].tobytes())
        with open(folder / f"{name}_{k:05d}.bin", "wb") as f:
            f.write(header.tobytes())
            f.seek(8 * HEADER_WORDS + -(-4 * total // 8) * 8)
            f.write(ends)
        listed.append({"file": f"{name}_{k:05d}.bin", "documents": n, "tokens": total, "max_id": 0, "crc32": crc})
    write_manifest(folder, name, listed, 151_680)


def memory() -> tuple[float, float]:
    """(now, peak) MB of this process, mapped pages counted."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) / 1e3 for key in ("VmRSS", "VmHWM"))


def measure(folder: str, ranks: int, files: int, batches: int, answer) -> None:
    """In a process of its own: open the source, read from it, send the numbers."""
    import resource
    torch.set_num_threads(1)
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    before, cpu, wall = memory()[0], time.process_time(), time.perf_counter()
    loader = MixtureLoader(folder, ["web"], 151_680, n_mtp=1, rank=0, world=ranks)
    found = {"start_cpu_s": time.process_time() - cpu, "start_wall_s": time.perf_counter() - wall,
             "start_mb": memory()[0] - before}
    most, cpu = 0, time.process_time()
    step = loader.streams["web"].n_tokens // batches
    for i in range(batches):
        loader.taken["web"] = i * step
        loader.next_batch(0, {"web": 1.0}, 8192, 8)
        most = max(most, len(os.listdir("/proc/self/fd")))
    answer.put(found | {"batch_cpu_s": (time.process_time() - cpu) / batches, "open_files": most, "before_mb": before,
                        "peak_mb": memory()[1], "maps": len(Path("/proc/self/maps").read_text().splitlines()),
                        "source_maps": Path("/proc/self/maps").read_text().count("/web_")})


def main(cfg: Config) -> None:
    """Make the source, measure, remove it."""
    out, folder, process = configurator.writable(cfg.out), Path(cfg.folder), get_context("spawn")
    try:
        make_source(folder, cfg.shards, int(cfg.documents), cfg.tokens)
        answer = process.Queue()
        child = process.Process(target=measure, args=(cfg.folder, cfg.ranks, cfg.files, cfg.batches, answer))
        child.start()
        child.join()
        if child.exitcode:
            raise configurator.UserError(f"the measured process ended with {child.exitcode}")
        found = answer.get()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table, added = 8 * cfg.documents / 1e6, found["peak_mb"] - found["before_mb"]
    print(f"{cfg.shards:,} shards, {cfg.documents:,.0f} documents: opened in {found['start_cpu_s']:.2f} s of CPU "
          f"({found['start_wall_s']:.2f} s) as one of {cfg.ranks} rank(s), +{found['start_mb']:.0f} MB")
    print(f"{cfg.batches} batches of 65,536 tokens from far-apart places: {found['batch_cpu_s']:.3f} s of CPU each; at "
          f"most {found['open_files']} files open, {found['source_maps']} maps of shards at the end")
    print(f"peak memory {found['peak_mb']:.0f} MB, {found['before_mb']:.0f} MB of it Python and torch")
    out.write_text(json.dumps({
        "ratio": table / added, "table_mb": table, **found, "config": configurator.to_dict(cfg),
        "command": " ".join(["python bench/loader.py", *sys.argv[1:]]), "torch": torch.__version__,
        "numpy": np.__version__, "commit": checkpoint.git_commit()}, indent=1) + "\n")
    print(out)
    print(f"the tables of all documents are {table:,.0f} MB, the loader adds {added:.0f} MB: ratio {table / added:.1f}")


if __name__ == "__main__":
    configurator.run(main, Config)
