"""
The whole recipe on a laptop CPU, from raw HTML to reinforcement learning (report sections 2 and 3).

    make demo            # or: python demo.py, in an environment with requirements.txt

    prepare -> pretrain (3 stages, then MTP) -+-> base ---------> RL-Zero
                                              +-> SFT ----------> RL          each evaluated on held-out problems

Every step is the script that also trains 7B, in processes of one thread each: pre-training on two ranks where there
are two cores, then the two branches side by side. What a step prints goes to out/tiny/logs, its numbers to
metrics.jsonl in its folder. The end: one table (the report's Table 5, small), MTP acceptance, the time of each phase,
figures, out/tiny/summary.json.

A step that is done is not done again: after Ctrl-C, `make demo` goes on where it was (out/tiny/base etc. resume from
their last checkpoint; --fresh starts over). The closing screen prints time and peak memory; results/demo has those of
our run.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import configurator

ROOT = Path(__file__).resolve().parent
OUT = Path("out/tiny")          # where config/tiny*.py write
MODELS = {"base": "Base", "rl_zero": "RL-Zero", "sft": "SFT", "rl": "RL"}


@dataclass(frozen=True)
class Config:
    fresh: bool = False         # delete out/tiny first
    samples: int = 8            # answers per held-out problem in the table, avg@samples
    base_samples: int = 16      # the same for the base model, whose pass@16 is its potential
    estimate_samples: int = 4   # answers per RL problem and model for difficulty estimation [paper 3.2: 16]


def main(cfg: Config) -> None:
    os.chdir(ROOT)
    out = OUT
    if cfg.fresh and out.exists():
        shutil.rmtree(out)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    clock, memory = Clock(out), Memory()
    evaluate = lambda name, n, tasks: ["eval.py", f"--ckpt={out}/{name}", f"--samples={n}", f"--tasks={tasks}"]
    estimate = lambda name: ["eval.py", f"--ckpt={out}/{name}", f"--problems={out}/problems/rl_all.jsonl",
                             f"--samples={cfg.estimate_samples}", "--temperature=1.0", "--top_p=1.0",
                             f"--out={out}/difficulty/{name}.json"]

    print("1/5  the tiny world: problems, HTML pages, extraction, dedup, tags, shards")
    run(clock, "prepare", ["-m", "data.prepare"], out / "data/valid/synth.json", show=True)
    print("2/5  pre-training in three stages, then two more MTP layers")
    run(clock, "pretrain", ["pretrain.py", "config/tiny.py"], None, show=True, ranks=min(2, cores()))
    print("3/5  SFT; the RL problems' difficulty from answers of base and SFT model; held-out evaluation of both")
    side_by_side(clock, out, [
        [("eval_base", evaluate("base", cfg.base_samples, ["problems", "mtp"]), out / "base/eval.json"),
         ("rate_base", estimate("base"), out / "difficulty/base.json")],
        [("sft", ["sft.py", "config/tiny_sft.py"], None),
         ("rate_sft", estimate("sft"), out / "difficulty/sft.json"),
         ("eval_sft", evaluate("sft", cfg.samples, ["problems", "mtp"]), out / "sft/eval.json")],
    ])
    run(clock, "rl_data", ["rl_data.py"], out / "problems/rl.jsonl", show=False)
    print("4/5  two RL runs side by side: RL-Zero from the base model, RL from SFT")
    side_by_side(clock, out, [
        [("rl_zero", ["rl.py", "config/tiny_rl_zero.py"], None),
         ("eval_rl_zero", evaluate("rl_zero", cfg.samples, ["problems"]), out / "rl_zero/eval.json")],
        [("rl", ["rl.py", "config/tiny_rl.py"], None),
         ("eval_rl", evaluate("rl", cfg.samples, ["problems"]), out / "rl/eval.json")],
    ])
    print("5/5  figures and summary")
    run(clock, "figures", ["paper/figures.py", f"--run={out}"], None, show=False)
    summary = summarise(out, clock, memory.stop())
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(screen(summary, out))


# ---- running the steps ---------------------------------------------------------------------------------------------

class Clock:
    """Seconds per phase, kept in <out>/seconds.json so that a resumed demo adds up."""
    def __init__(self, out: Path):
        self.path = out / "seconds.json"
        self.seconds = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.lock = threading.Lock()

    def add(self, name: str, seconds: float) -> None:
        with self.lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.path.write_text(json.dumps(self.seconds, indent=1))


class Memory:
    """Peak of the resident memory of this process and all its children together, MB; polled twice a second (Linux)."""
    def __init__(self):
        self.peak, self.done = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(0.5):
            self.peak = max(self.peak, sum(map(resident_mb, tree(os.getpid()))))

    def stop(self) -> float | None:
        self.done.set()
        return round(self.peak) or None


def tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid] + [p for child in children for p in tree(int(child))]
    except OSError:
        return [pid]


def resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
    except (OSError, IndexError):
        return 0.0


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(words: list[str], log: Path | None, **env: str) -> subprocess.Popen:
    """A step in a session of its own: Ctrl-C reaches this process alone, which then lets the step save and end."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | env
    target = open(log, "ab") if log else None
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=target, start_new_session=True,
                            stderr=subprocess.STDOUT if log else None)


def start_ranks(words: list[str], log: Path | None, ranks: int, folder: Path) -> list[subprocess.Popen]:
    """What torchrun does on one machine. Rank 0 speaks, the others write to folder/rank<r>.log."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [start(words, log if r == 0 else folder / f"rank{r}.log", RANK=str(r), LOCAL_RANK=str(r), **where)
            for r in range(ranks)]


def end(processes: list[subprocess.Popen]) -> None:
    """SIGTERM: training scripts save and end. What does not end within 20 seconds has nothing to save."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def run(clock: Clock, name: str, words: list[str], product: Path | None, show: bool, ranks: int = 1) -> None:
    """One step, its output on the screen (show) or in logs/<name>.log; skipped when its product is already there."""
    if product is not None and product.exists():
        return
    log = clock.path.parent / f"logs/{name}.log"
    t0, target = time.perf_counter(), None if show else log
    processes = start_ranks(words, target, ranks, log.parent) if ranks > 1 else [start(words, target)]
    try:
        while None in (codes := [p.poll() for p in processes]) and not any(codes):
            time.sleep(0.1)
    except KeyboardInterrupt:
        end(processes)
        raise SystemExit("\ninterrupted; `make demo` goes on from the last checkpoint") from None
    if failed := [p for p in processes if p.returncode]:
        time.sleep(1)                                        # the others may just be saying why
        end(processes)
    # gloo may abort a rank while the process group is torn down, after all is saved and rank 0 has ended well
    forgiven = processes[0].returncode == 0 and all(p.returncode == -signal.SIGABRT for p in failed)
    code = 0 if forgiven else failed[0].returncode if failed else 0
    clock.add(name, time.perf_counter() - t0)
    if code:
        raise SystemExit(f"demo: step {name!r} ({' '.join(words)}) ended with status {code}"
                         + ("" if show else f", see {log}"))


def side_by_side(clock: Clock, out: Path, branches: list[list[tuple]]) -> None:
    """Each branch in order, the branches at the same time; a bar per branch that follows the steps' metrics."""
    running: list[subprocess.Popen | None] = [None] * len(branches)
    failed: list[str] = []
    look = "{desc:14}{percentage:3.0f}%|{bar:40}| {elapsed} <{remaining} {postfix}"
    bars = [tqdm(total=100, desc=branch[0][0], position=i, bar_format=look, disable=None)
            for i, branch in enumerate(branches)]

    def walk(i: int) -> None:
        for k, (name, words, product) in enumerate(branches[i]):
            if failed or (product is not None and product.exists()):
                continue
            t0 = time.perf_counter()
            running[i] = process = start(words, out / f"logs/{name}.log")
            while process.poll() is None:
                time.sleep(0.3)
                if not bars[i].disable:
                    done, note = progress(out / name, words)
                    bars[i].set_description_str(name, refresh=False)
                    bars[i].n = max(bars[i].n, round(100 * (k + done) / len(branches[i]), 1))
                    bars[i].set_postfix_str(note)
            clock.add(name, time.perf_counter() - t0)
            if process.returncode:
                failed.append(f"step {name!r} ({' '.join(words)}) ended with status {process.returncode}, "
                              f"see {out}/logs/{name}.log")
            elif bars[i].disable:
                print(f"     {name} done after {clock.seconds[name]:.0f} s", flush=True)
        bars[i].n = 100
        bars[i].refresh()

    threads = [threading.Thread(target=walk, args=(i,), daemon=True) for i in range(len(branches))]
    try:
        for t in threads:
            t.start()
        for t in threads:
            while t.is_alive():
                t.join(0.2)
    except KeyboardInterrupt:
        failed.append("interrupted")
        end([process for process in running if process])
        for t in threads:
            t.join(2)
        raise SystemExit("\ninterrupted; `make demo` goes on from the last checkpoints") from None
    finally:
        for bar in bars:
            bar.close()
    if failed:
        raise SystemExit("demo: " + "; ".join(failed))


def progress(run: Path, words: list[str]) -> tuple[float, str]:
    """(share done, note) of a training step, from its configuration and the last line of its metrics."""
    if not words[1].endswith(".py"):
        return 0.0, ""                                       # an evaluation: no metrics to follow
    steps = configurator.read_file(words[1]).get("steps", 1)
    rows = last_rows(run / "metrics.jsonl", 1)
    if not rows:
        return 0.0, ""
    row = rows[0]
    key = next((k for k in ("reward_launched", "loss") if k in row), None)
    note = f"{key.split('_')[0]} {row[key]:.2f}" if key else ""
    return min(1.0, row["step"] / steps), f"step {row['step']}/{steps} {note}"


def last_rows(path: Path, n: int) -> list[dict]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[-n:]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            pass
    return rows


# ---- the closing screen --------------------------------------------------------------------------------------------

def summarise(out: Path, clock: Clock, peak_mb: float | None) -> dict:
    """The numbers of the closing screen, as a machine reads them."""
    found = {name: json.loads((out / name / "eval.json").read_text()) for name in MODELS}
    pick = lambda row: {k: row[k] for k in ("avg", "low", "high", "n", "samples", "tokens", "truncated")} | \
        {k: v for k, v in row.items() if k.startswith("pass@")}
    m = found["sft"]["mtp"]
    return {"models": {name: {kind: pick(row) for kind, row in f["problems"].items()} for name, f in found.items()},
            "mtp": {"acceptance": m["online"], "teacher_forced": m["teacher_forced"], "speedup": m["speedup"],
                    "tokens_per_forward": m["tokens_per_forward"], "equal_text": m["equal_text"],
                    "acceptance_base": found["base"]["mtp"]["online"], "checkpoint": "sft"},
            "seconds": {k: round(v, 1) for k, v in clock.seconds.items()} | {"total": total_seconds(clock.seconds)},
            "peak_mb": peak_mb, "heldout_overlap": overlap(out), "commit": found["rl"]["commit"],
            "threads_per_process": 1}


def total_seconds(seconds: dict[str, float]) -> float:
    """Wall-clock of the whole: the phases one after the other, of two branches side by side the longer one."""
    took = lambda *names: sum(seconds.get(name, 0.0) for name in names)
    first = max(took("eval_base", "rate_base"), took("sft", "rate_sft", "eval_sft"))
    second = max(took("rl_zero", "eval_rl_zero"), took("rl", "eval_rl"))
    return round(took("prepare", "pretrain", "rl_data", "figures") + first + second, 1)


def overlap(out: Path) -> int:
    """
    Held-out problems that occur in any training set: by identity in the RL and SFT sets, by the question's text in the
    pre-training shards. Must be 0.
    """
    from data.problems import read_problems
    from data.shards import Shards, sources
    from tokenizer import Tokenizer
    test = read_problems(out / "problems/test.jsonl")
    trained = {p.id for p in read_problems(out / "problems/rl_all.jsonl")}
    with open(out / "sft.jsonl", encoding="utf-8") as f:
        trained |= {json.loads(line)["id"] for line in f}
    tokenizer = Tokenizer.load("tiny")
    pages = set()
    for name in sources(out / "data"):
        text = "\n".join(tokenizer.decode(ids) for ids in Shards(str(out / "data"), name).documents())
        pages |= {line.removeprefix("Problem: ") for line in text.split("\n") if line.startswith("Problem: ")}
    return sum(p.id in trained or p.question in pages for p in test)


def screen(s: dict, out: Path) -> str:
    """The closing screen."""
    cell = lambda row: f"{row['avg']:6.1%} [{row['low']:.1%}, {row['high']:.1%}]"
    lines = ["", "held-out problems, avg@n at temperature 0.6, top-p 0.95, with 95% intervals (report: Table 5)", "",
             f"{'':10}{'maths':>24}{'code':>24}"]
    lines += [f"{MODELS[name]:10}{cell(row['maths']):>24}{cell(row['code']):>24}" for name, row in s["models"].items()]
    base = s["models"]["base"]
    best = lambda row: next((f"{k} {v:.1%}" for k, v in reversed(row.items()) if k.startswith("pass@")), "")
    lines.append(f"{'':10}n = {base['maths']['n']} + {base['code']['n']} problems; Base: maths {best(base['maths'])}, "
                 f"code {best(base['code'])}")
    m, layers = s["mtp"], lambda xs: ", ".join(f"{x:.1%}" for x in xs)
    lines += ["", f"MTP on held-out reasoning text (SFT model): acceptance per layer {layers(m['acceptance'])} "
                  f"(teacher-forced {layers(m['teacher_forced'])})",
              f"    {m['tokens_per_forward']:.2f} tokens per forward, {m['speedup']:.2f}x plain decoding at batch 1, "
              f"greedy text {'equal' if m['equal_text'] else 'DIFFERENT'}", "",
              "time: " + ", ".join(f"{k} {v:.0f} s" for k, v in s["seconds"].items() if k != "total"),
              f"      {s['seconds']['total'] / 60:.1f} minutes in all, at most {s['peak_mb']} MB of memory, "
              f"{s['heldout_overlap']} held-out problems seen in training", "",
              f"figures      {out}/figures/*.png", f"checkpoints  {out}/{{base,sft,rl,rl_zero}}",
              f"logs         {out}/logs, {out}/*/metrics.jsonl", f"numbers      {out}/summary.json",
              "try          .venv/bin/python sample.py --mtp"]
    return "\n".join(lines)


if __name__ == "__main__":
    configurator.run(main, Config)
