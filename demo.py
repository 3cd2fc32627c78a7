"""
The whole recipe on two CPU cores, from raw HTML to reinforcement learning (report sections 2 and 3).

    make demo            # or: python demo.py, in an environment with requirements.txt

    prepare -> pretrain (3 stages, then MTP) -+-> base ---------> RL-Zero
                                              +-> SFT ----------> RL          each evaluated on held-out problems

RECIPE below is the list of commands, as a person would type them one by one (README.md shows the same list). Each is
the script that also trains 7B, in processes of one thread each: pre-training on two ranks where there are two cores,
and what two branches can do at the same time side by side. What a step prints goes to out/tiny/logs, its numbers to
metrics.jsonl in its folder. The end: one table (the report's Table 5, small), a problem with the four models' answers,
MTP acceptance, the time of each step, figures, out/tiny/summary.json.

A step that is done is not done again: after Ctrl-C, `make demo` goes on where it was (out/tiny/base etc. resume from
their last checkpoint; --fresh starts over). results/demo has the numbers of our run.
"""
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import configurator
from configurator import UserError
from data.jsonl import read_jsonl
from data.problems import read_problems
from data.shards import Shards, sources
from data.text import shown
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent
OUT = Path("out/tiny")          # where config/tiny*.py write
MODELS = {"base": "Base", "rl_zero": "RL-Zero", "sft": "SFT", "rl": "RL"}


@dataclass(frozen=True)
class Step:
    """One command of the recipe."""
    name: str                   # of the log, of the time, and of the run's folder where it trains
    command: str                # as typed after `python`
    product: str = ""           # file below OUT that says that it is done; "" = it knows itself (training resumes)


# answers of a model to the RL problems: pass rates, difficulty of the tests (report 3.2 draws 16 answers, we 4)
RATE = "eval.py --ckpt=out/tiny/{0} --problems=out/tiny/problems/rl_all.jsonl --samples=4 --temperature=1.0 " \
       "--top_p=1.0 --out=out/tiny/difficulty/{0}.json"
PREPARE = Step("prepare", "-m data.prepare", "data/valid/synth.json")
PRETRAIN = Step("pretrain", "pretrain.py config/tiny.py")
BASE = [Step("eval_base", "eval.py --ckpt=out/tiny/base --samples=16 --tasks=\"['problems','mtp']\"", "base/eval.json"),
        Step("rate_base", RATE.format("base"), "difficulty/base.json")]
SFT = [Step("sft", "sft.py config/tiny_sft.py"),
       Step("rate_sft", RATE.format("sft"), "difficulty/sft.json"),
       Step("eval_sft", "eval.py --ckpt=out/tiny/sft --samples=8 --tasks=\"['problems','mtp']\"", "sft/eval.json")]
RL_PROBLEMS = Step("rl_problems", "-m data.rl_problems", "problems/rl.jsonl")
RL_ZERO = [Step("rl_zero", "rl.py config/tiny_rl_zero.py"),
           Step("eval_rl_zero", "eval.py --ckpt=out/tiny/rl_zero --samples=8", "rl_zero/eval.json")]
RL = [Step("rl", "rl.py config/tiny_rl.py"),
      Step("eval_rl", "eval.py --ckpt=out/tiny/rl --samples=8", "rl/eval.json")]
FIGURES = Step("figures", "paper/figures.py --run=out/tiny")

# (what the screen says, branches that run at the same time)
RECIPE: list[tuple[str, list[list[Step]]]] = [
    ("the tiny world: problems, HTML pages, extraction, dedup, tags, shards", [[PREPARE]]),
    ("pre-training in three stages, then two more MTP layers", [[PRETRAIN]]),
    ("SFT; answers of base and SFT model to the RL problems; held-out evaluation of both", [BASE, SFT]),
    ("RL problems: too easy ones go, unit tests get their difficulty", [[RL_PROBLEMS]]),
    ("two RL runs side by side: RL-Zero from the base model, RL from SFT", [RL_ZERO, RL]),
    ("figures and summary", [[FIGURES]]),
]


@dataclass(frozen=True)
class Config:
    fresh: bool = False         # delete out/tiny first


def main(cfg: Config) -> None:
    os.chdir(ROOT)
    out = OUT
    if cfg.fresh and out.exists():
        shutil.rmtree(out)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    clock, memory = Clock(out), Memory()
    for n, (title, branches) in enumerate(RECIPE, 1):
        print(f"{n}/{len(RECIPE)}  {title}", flush=True)
        if len(branches) > 1:
            side_by_side(clock, out, branches)
        else:
            for step in branches[0]:
                run(clock, out, step, show=step in (PREPARE, PRETRAIN),
                    ranks=min(2, cores()) if step is PRETRAIN else 1)
    summary = summarise(out, clock, memory.stop())
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(shown(screen(summary, out)))


# ---- running the steps ----------------------------------------------------------------------------------------------

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
    """Process pid and all its children, theirs too."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid] + [p for child in children for p in tree(int(child))]
    except OSError:
        return [pid]


def resident_mb(pid: int) -> float:
    """Resident memory of one process, MB; 0 where it cannot be read."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
    except (OSError, IndexError):
        return 0.0


def cores() -> int:
    """Processors that this process may use."""
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


def words_of(step: Step) -> list[str]:
    """The words behind `python`."""
    return shlex.split(step.command)


def run(clock: Clock, out: Path, step: Step, show: bool = False, ranks: int = 1) -> None:
    """One step, its output on the screen (show) or in logs/<name>.log; skipped when its product is already there."""
    if step.product and (out / step.product).exists():
        return
    log = out / f"logs/{step.name}.log"
    t0, target, words = time.perf_counter(), None if show else log, words_of(step)
    processes = start_ranks(words, target, ranks, log.parent) if ranks > 1 else [start(words, target)]
    try:
        while None in (codes := [p.poll() for p in processes]) and not any(codes):
            time.sleep(0.1)
    except KeyboardInterrupt:
        end(processes)
        raise UserError("interrupted; `make demo` goes on from the last checkpoint") from None
    if failed := [p for p in processes if p.returncode]:
        time.sleep(1)                                        # the others may just be saying why
        end(processes)
    # gloo may abort a rank while the process group is torn down, after all is saved and rank 0 has ended well
    forgiven = processes[0].returncode == 0 and all(p.returncode == -signal.SIGABRT for p in failed)
    code = 0 if forgiven else failed[0].returncode if failed else 0
    clock.add(step.name, time.perf_counter() - t0)
    if code:
        raise UserError(f"step {step.name!r} (python {step.command}) ended with status {code}"
                         + ("" if show else f", see {log}"))


def side_by_side(clock: Clock, out: Path, branches: list[list[Step]]) -> None:
    """Each branch in order, the branches at the same time; a bar per branch that follows the steps' metrics."""
    running: list[subprocess.Popen | None] = [None] * len(branches)
    failed: list[str] = []
    look = "{desc:14}{percentage:3.0f}%|{bar:40}| {elapsed} <{remaining} {postfix}"
    bars = [tqdm(total=100, desc=branch[0].name, position=i, bar_format=look, disable=None)
            for i, branch in enumerate(branches)]

    def walk(i: int) -> None:
        for k, step in enumerate(branches[i]):
            if failed or (step.product and (out / step.product).exists()):
                continue
            t0, words = time.perf_counter(), words_of(step)
            running[i] = process = start(words, out / f"logs/{step.name}.log")
            while process.poll() is None:
                time.sleep(0.3)
                if not bars[i].disable:
                    done, note = progress(out / step.name, words)
                    bars[i].set_description_str(step.name, refresh=False)
                    bars[i].n = max(bars[i].n, round(100 * (k + done) / len(branches[i]), 1))
                    bars[i].set_postfix_str(note)
            clock.add(step.name, time.perf_counter() - t0)
            if process.returncode:
                failed.append(f"step {step.name!r} (python {step.command}) ended with status {process.returncode}, "
                              f"see {out}/logs/{step.name}.log")
            elif bars[i].disable:
                print(f"     {step.name} done after {clock.seconds[step.name]:.0f} s", flush=True)
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
        raise UserError("interrupted; `make demo` goes on from the last checkpoints") from None
    finally:
        for bar in bars:
            bar.close()
    if failed:
        raise UserError("; ".join(failed))


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
    """The last n whole rows of a metrics file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[-n:]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            pass
    return rows


# ---- the closing screen ---------------------------------------------------------------------------------------------

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
            "answers": four_answers(out),
            "seconds": {k: round(v, 1) for k, v in clock.seconds.items()} | {"total": total_seconds(clock.seconds)},
            "peak_mb": peak_mb, "heldout_overlap": overlap(out), "commit": found["rl"]["commit"],
            "threads_per_process": 1}


def total_seconds(seconds: dict[str, float]) -> float:
    """Wall-clock of the whole: the parts of the recipe one after the other, of two branches the longer one."""
    took = lambda branch: sum(seconds.get(step.name, 0.0) for step in branch)
    return round(sum(max(map(took, branches)) for _, branches in RECIPE), 1)


def four_answers(out: Path) -> dict:
    """
    One held-out maths problem and each model's first answer to it: the first in the file that RL answers right and the
    base model wrong; without such a one the first of all. {"question", model: {"text", "passed"} ...}
    """
    rows = {name: {row["id"]: row for _, row in read_jsonl(out / name / "eval_answers.jsonl")} for name in MODELS}
    maths = [p.id for p in read_problems(out / "problems/test.jsonl") if p.kind == "maths"]
    first = lambda name, id: rows[name][id]["answers"][0]
    telling = [id for id in maths if first("rl", id)["passed"] and not first("base", id)["passed"]]
    id = (telling or maths)[0]
    return {"question": rows["rl"][id]["question"],
            **{name: {key: first(name, id)[key] for key in ("text", "passed")} for name in MODELS}}


def overlap(out: Path) -> int:
    """
    Held-out problems that occur in any training set: by identity in the RL and SFT sets, by the question's text in the
    pre-training shards. Must be 0.
    """
    test = read_problems(out / "problems/test.jsonl")
    trained = {p.id for p in read_problems(out / "problems/rl_all.jsonl")}
    trained |= {row["id"] for _, row in read_jsonl(out / "sft.jsonl")}
    tokenizer, pages = Tokenizer.load("tiny"), set()
    for name in sources(out / "data"):
        text = "\n".join(tokenizer.decode(ids) for ids in Shards(str(out / "data"), name).documents())
        pages |= {line.removeprefix("Problem: ") for line in text.split("\n") if line.startswith("Problem: ")}
    return sum(p.id in trained or p.question in pages for p in test)


def screen(s: dict, out: Path) -> str:
    """The closing screen. s: as from summarise()."""
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
              f"one held-out problem and each model's first answer: {s['answers']['question']}"]
    for name in MODELS:
        answer = s["answers"][name]
        text = textwrap.fill(" ".join(answer["text"].split()) or "(nothing)", 96, initial_indent=" " * 14,
                             subsequent_indent=" " * 14).lstrip()
        lines.append(f"{MODELS[name]:>9} {'right' if answer['passed'] else 'wrong':5} {text}")
    lines += ["", "time: " + ", ".join(f"{k} {v:.0f} s" for k, v in s["seconds"].items() if k != "total"),
              f"      {s['seconds']['total'] / 60:.1f} minutes in all, at most {s['peak_mb']} MB of memory, "
              f"{s['heldout_overlap']} held-out problems seen in training", "",
              f"figures      {out}/figures/*.png", f"checkpoints  {out}/{{base,sft,rl,rl_zero}}",
              f"logs         {out}/logs, {out}/*/metrics.jsonl", f"numbers      {out}/summary.json", "",
              "next   .venv/bin/python sample.py --mtp",
              "           ask the RL model",
              "       .venv/bin/python sample.py --compare --n=16 --slots=1 --prompt='What is 7+2-6?'",
              "           sixteen answers, one after the other, with and without MTP",
              "       .venv/bin/python plan.py config/mimo_7b.py --gpus=8",
              "           what the 7B run would take"]
    return "\n".join(lines)


if __name__ == "__main__":
    configurator.run(main, Config)
