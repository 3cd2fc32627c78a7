"""
Speed and memory of the corpus steps of data/build.py, beside rensa alone and datatrove's MinHash.

    python bench/corpus.py --gb=0.2
    python bench/corpus.py --gb=5 --sides="['ours','rensa']"

The text is made here: templates and Zipf words, documents of about 1.8 kB, and planted second fetches, exact copies and
near copies with 0.5%, 2% and 5% of their words changed, which tell what each side removes. Every step runs in a process
of its own; measured are its CPU seconds (user + system, imports included) and its peak memory. Rates are megabytes of
.jsonl per CPU second on one core.

    ours        plan (a tagger is trained), rows -> text and band keys (read), dedup, decontamination + tags + tokens
                (write), finish
    rensa       the same 5-word shingles as strings, its signatures, its index; no check of what it finds
    datatrove   its four MinHash steps as in FineWeb: 5-grams, 14 bands of 8, its English word tokenizer (spacy)

What is done is kept in the folder `work` and not done again when the same command is given after a kill. The last line
is the ratio of ours to rensa in MB per second for deduplication alone: shingles, signatures, keys and dedup with the
exact check, against shingles, signatures and index; out/bench/corpus_GBgb.json has everything.
"""
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import configurator  # noqa: E402

SIDES = {"ours": ["plan", "read", "dedup", "write", "finish"], "rensa": ["rensa"], "datatrove": ["datatrove"]}
FILE = 64 << 20                                # bytes of a .jsonl file
# planted, share of the documents: another fetch of an address; copies with this share of their words changed
REFETCHED, COPIES = 0.02, {"0": 0.02, "0.005": 0.03, "0.02": 0.03, "0.05": 0.02}
DOMAINS = ("encyclopedia", "maths", "code", "books")


@dataclass(frozen=True)
class Config:
    gb: float = 0.2                           # gigabytes of .jsonl, 10^9 bytes each
    sides: list[str] = field(default_factory=lambda: list(SIDES))     # what is measured
    peer: str = sys.executable                # a Python with datatrove and spacy, for that side
    work: str = ""                            # folder for text and results; "" = out/bench/corpus_GBgb
    keep: bool = False                        # leave the text there; else it is deleted at the end
    out: str = ""                             # result; "" = out/bench/corpus_GBgb.json
    step: str = ""                            # used by the script itself: the one step that this process does

    def __post_init__(self):
        configurator.at_least(self, 0.001, "gb")
        if unknown := set(self.sides) - set(SIDES):
            raise configurator.UserError(f"sides: {sorted(unknown)[0]!r} should be one of {', '.join(SIDES)}")


# ---- the text -------------------------------------------------------------------------------------------------------

def make_text(folder: Path, size: int) -> None:
    """size bytes of {"url", "text"} lines in files of FILE bytes; labels.jsonl, heldout.jsonl beside the folder."""
    r, letters, recent, labels, n = random.Random(0), "etaoinshrdlucmfwypvbgk", [], [], 0
    words = ["".join(r.choices(letters, range(len(letters), 0, -1), k=r.randint(2, 10))) for _ in range(80_000)]
    drawn = zipf(words, r)
    openings = {d: [" ".join(islice(drawn, 6)) for _ in range(20)] for d in DOMAINS}   # sentences of the templates
    held = [" ".join(islice(drawn, 24)) for _ in range(500)]
    folder.mkdir(parents=True)
    for k in range(-(-size // FILE)):
        with open(folder / f"{k:04d}.jsonl", "w", encoding="utf-8") as f:
            while f.tell() < min(FILE, size - k * FILE):
                n += 1
                url, u = f"http://host{n % 997}.org/page/{n}", r.random()
                if u < REFETCHED and recent:
                    url, text = r.choice(recent)
                    url += "?utm_source=feed"
                elif u < REFETCHED + sum(COPIES.values()) and recent:
                    level = r.choices(list(COPIES), COPIES.values())[0]
                    text = changed(r.choice(recent)[1], float(level), words, r)
                    url = f"http://mirror{n % 97}.org/{level}/{n}"
                else:
                    domain = r.choice(DOMAINS)
                    text = document(drawn, openings[domain], r) + (f" {r.choice(held)}" if r.random() < 0.001 else "")
                    recent.append((url, text))
                    if len(labels) < 1000:
                        labels.append({"text": text, "domain": domain, "quality": 2, "depth": 1, "ad": 0})
                    if len(recent) > 2000:
                        recent[r.randrange(2000)] = recent.pop()
                f.write(json.dumps({"url": url, "text": text}) + "\n")
    questions = ({"id": str(i), "kind": "maths", "question": q, "answer": "1"} for i, q in enumerate(held))
    for name, lines in (("heldout", questions), ("labels", labels)):
        (folder.parent / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def zipf(words: list[str], r: random.Random) -> Iterator[str]:
    """Words without end, word i with a frequency of 1 / (i + 3)."""
    sums = list(accumulate(1 / (i + 3) for i in range(len(words))))
    while True:
        yield from r.choices(words, cum_weights=sums, k=100_000)


def document(drawn: Iterator[str], openings: list[str], r: random.Random) -> str:
    """Paragraphs of five sentences, each a template's opening and random words."""
    sentence = lambda: f"{r.choice(openings).capitalize()} {' '.join(islice(drawn, r.randint(4, 14)))}."
    return "\n\n".join(" ".join(sentence() for _ in range(5)) for _ in range(max(1, int(r.lognormvariate(1.3, 0.7)))))


def changed(text: str, share: float, words: list[str], r: random.Random) -> str:
    """The text with this share of its words replaced."""
    parts = text.split(" ")
    for i in r.sample(range(len(parts)), round(share * len(parts))):
        parts[i] = r.choice(words)
    return " ".join(parts)


# ---- the sides, each a function that one process calls; -> what it found --------------------------------------------

def timed(module: object, name: str, clock: Counter) -> None:
    """Lets module.name add its CPU seconds to clock[name]."""
    function = getattr(module, name)

    def call(*args):
        start = time.process_time()
        result = function(*args)
        clock[name] += time.process_time() - start
        return result
    setattr(module, name, call)


def ours(work: Path, step: str) -> dict:
    """One step of data/build.py on all parts, one after the other. The parts of `read` and `write` are timed."""
    from data import build
    job = build.Job("text", str(work / "text"), str(work / "out"), "web", "tiny", labels=str(work / "labels.jsonl"),
                    heldout=str(work / "heldout.jsonl"))
    (folder, parts), clock = build.plan(job, replace=True), Counter()
    if step == "read":
        for name in ("shingle_hashes", "signatures", "band_keys"):
            timed(build, name, clock)
        for k in range(parts):
            build.read_part(folder, k)
    elif step == "dedup":
        import numpy as np
        result, start = build.dedup(folder), time.process_time()
        keep = np.concatenate([np.load(folder / f"keep_{k:05d}.npy") for k in range(parts)])
        urls = (json.loads(line)[0] for k in range(parts) for line in open(folder / f"text_{k:05d}.jsonl", "rb"))
        gone = removed(zip(urls, keep, strict=True))
        return {"documents": result["documents"], "kept": result["kept"], "removed": gone,
                "parts": {"dedup": result["seconds"]}, "unmeasured": time.process_time() - start}
    elif step == "write":
        for name in ("contaminated", "put_tags"):
            timed(build, name, clock)
        tokenizer = build.tools(folder)[0]
        timed(tokenizer, "encode", clock)
        for k in range(parts):
            build.write_part(folder, k)
    elif step == "finish":
        print(build.finish(folder))
    return {"parts": clock}


def rows(work: Path) -> Iterator[dict]:
    """The lines of the text."""
    for path in sorted((work / "text").glob("*.jsonl")):
        with open(path, "rb") as f:
            yield from map(json.loads, f)


def removed(kept: Iterator[tuple[str, bool]]) -> dict[str, float]:
    """(address, whether it stays) of all documents -> share removed of each planted kind, and of the others."""
    seen, gone = Counter(), Counter()
    for url, stays in kept:
        kind = f"copy {url.split('/')[3]}" if "//mirror" in url else "second fetch" if "utm_" in url else "other"
        seen[kind] += 1
        gone[kind] += not stays
    return {kind: gone[kind] / n for kind, n in sorted(seen.items())}


def rensa_alone(work: Path) -> dict:
    """Words in fives as strings, signatures of a batch, one index over all; a document goes if the index knows it."""
    import rensa
    clock, index, kept, n, source = Counter(), rensa.RMinHashLSH(0.7, 112, 14), [], 0, rows(work)
    while batch := list(islice(source, 1000)):
        start = time.process_time()
        sets = []
        for row in batch:
            words = row["text"].lower().split()
            sets.append({" ".join(words[i:i + 5]) for i in range(max(1, len(words) - 4))})
        clock["shingles"] += time.process_time() - start
        start = time.process_time()
        matrix = rensa.RMinHash.digest_matrix_from_token_sets(sets, 112, 1)
        clock["signatures"] += time.process_time() - start
        start = time.process_time()
        flags = index.insert_matrix_and_query_duplicate_flags(matrix, n)
        clock["index"] += time.process_time() - start
        kept += [(row["url"], not flag) for row, flag in zip(batch, flags, strict=True)]
        n += len(batch)
    return {"parts": clock, "documents": n, "removed": removed(iter(kept))}


def datatrove_minhash(work: Path) -> dict:
    """Signatures, buckets, clusters, filter, with its local executor and one worker."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    folder, config, files = work / "datatrove", MinhashConfig(), len(list((work / "text").glob("*.jsonl")))
    sig, buckets, ids, out = (str(folder / name) for name in ("sig", "buckets", "ids", "out"))
    reader = lambda: JsonlReader(str(work / "text"), text_key="text", id_key="url")
    stages = {"signatures": ([reader(), MinhashDedupSignature(sig, config)], files),
              "buckets": ([MinhashDedupBuckets(sig, buckets, config=config)], config.num_buckets),
              "cluster": ([MinhashDedupCluster(buckets, ids, config)], 1),
              "filter": ([reader(), MinhashDedupFilter(ids), JsonlWriter(out, compression=None)], files)}
    clock = Counter()
    for name, (pipeline, tasks) in stages.items():
        start = time.process_time()
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(folder / "logs" / name)).run()
        clock[name] = time.process_time() - start
    kept = {json.loads(line)["id"] for path in Path(out).glob("*") for line in open(path, "rb")}
    return {"parts": clock, "documents": sum(1 for _ in rows(work)),
            "removed": removed((row["url"], row["url"] in kept) for row in rows(work))}


# ---- the run --------------------------------------------------------------------------------------------------------

def measured(cfg: Config, work: Path, step: str) -> dict:
    """One step in a process of its own, or what it gave before. -> CPU seconds, peak memory, what it found."""
    done = work / f"{step}.json"
    if not done.is_file():
        python = cfg.peer if step == "datatrove" else sys.executable
        command = [python, __file__, f"--gb={cfg.gb}", f"--work={work}", f"--step={step}"]
        with open(work / f"{step}.log", "wb") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
            _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise configurator.UserError(f"step {step} failed, see {work}/{step}.log")
        found = json.loads((work / f"{step}.found").read_text())
        seconds = usage.ru_utime + usage.ru_stime - found.pop("unmeasured", 0.0)
        done.write_text(json.dumps({"cpu_seconds": seconds, "peak_mb": usage.ru_maxrss / 1024, **found}))
    return json.loads(done.read_text())


def main(cfg: Config) -> None:
    work = Path(cfg.work or f"out/bench/corpus_{cfg.gb:g}gb")
    if cfg.step:
        side = {"rensa": rensa_alone, "datatrove": datatrove_minhash}.get(cfg.step)
        found = side(work) if side else ours(work, cfg.step)
        (work / f"{cfg.step}.found").write_text(json.dumps(found))
        return
    if not (work / "labels.jsonl").is_file():
        shutil.rmtree(work, ignore_errors=True)
        make_text(work / "text", int(cfg.gb * 1e9))
    mb = sum(p.stat().st_size for p in (work / "text").glob("*.jsonl")) / 1e6
    steps = {step: measured(cfg, work, step) for side in cfg.sides for step in SIDES[side]}
    for name, s in steps.items():
        s["mb_per_cpu_second"] = mb / s["cpu_seconds"]
        parts = ", ".join(f"{k} {v:.1f} s" for k, v in s["parts"].items())
        print(f"{name:10} {s['cpu_seconds']:8.1f} s {s['mb_per_cpu_second']:7.1f} MB/s {s['peak_mb']:6.0f} MB  {parts}")
    for name in ("dedup", "rensa", "datatrove"):
        if name in steps:
            print(f"{name:10} removed: " + ", ".join(f"{k} {v:.1%}" for k, v in steps[name]["removed"].items()))
    result = {"gb": cfg.gb, "mb": mb, "steps": steps, "python": platform.python_version(),
              "command": "python bench/corpus.py " + " ".join(sys.argv[1:]), "config": asdict(cfg) | {"peer": ""},
              "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                                       text=True).stdout.strip()}
    if {"read", "rensa"} <= set(steps):
        seconds = lambda *names: sum(sum(steps[name]["parts"].values()) for name in names)
        result["ratio"] = seconds("rensa") / seconds("read", "dedup")
    out = Path(cfg.out or ROOT / f"out/bench/corpus_{cfg.gb:g}gb.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    if not cfg.keep:
        shutil.rmtree(work)
    print(f"{out}: deduplication, ours to rensa alone: {result.get('ratio', float('nan')):.2f}")


if __name__ == "__main__":
    configurator.run(main, Config)
