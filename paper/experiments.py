"""
Run the claims of paper/claims.py and judge them: `make paper`, `make paper CLAIM=fig5`.

    python paper/experiments.py                  # all claims in order, two runs at a time; what is done is skipped
    python paper/experiments.py --claim=fig5 --jobs=1
    python paper/experiments.py --list           # claims, runs, what is done, hours so far

Each Run is a process of one thread in out/paper/NAME-HASH/SEED: the hash is of its command and of the commands of all
runs that it needs, so a changed command is another folder. Killed runs go on (the scripts resume). A finished run
leaves done.json: command, commit, processor time. When all runs of a seed are there the claim's file in results/claims
is written: values per arm and seed, contrasts with intervals, the verdict. Then paper/claims_page.py makes the page.
"""
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "paper")]
import claims_page  # noqa: E402
from claims import CLAIMS, Claim, Contrast, Run  # noqa: E402

import configurator  # noqa: E402
from configurator import UserError  # noqa: E402
from data.jsonl import whole_file  # noqa: E402
from eval import pass_at_k  # noqa: E402

G = 8                            # answers to a prompt, config/tiny_rl.py
OUT, RESULTS = ROOT / "out/paper", ROOT / "results/claims"


@dataclass(frozen=True)
class Config:
    claim: str = ""              # its key, "" = all
    jobs: int = 2                # runs at a time, one thread each
    list: bool = False           # say what is done, run nothing
    judge: bool = False          # run nothing, only judge what is done

    def __post_init__(self):
        configurator.at_least(self, 1, "jobs")
        if self.claim not in ("", *(c.key for c in CLAIMS)):
            raise UserError(f"claim = {self.claim!r} should be one of {', '.join(c.key for c in CLAIMS)}")


# ---- runs and their folders -----------------------------------------------------------------------------------------

@cache
def text(run: Run) -> str:
    """The run's command and, below it, those of all that it needs: what its numbers depend on, but for the seed."""
    return "\n".join([run.command] + [f"  {name}: " + text(used).replace("\n", "\n  ") for name, used in
                                      sorted(run.uses.items())])


def folder(run: Run, seed: int) -> Path:
    return OUT / f"{run.name}-{hashlib.sha256(text(run).encode()).hexdigest()[:8]}" / str(seed)


class Place(str):
    """A run's folder in a command. {x:answers=N}: its newest checkpoint that saw at most N answers."""

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        limit, seen, best = int(spec.removeprefix("answers=")), 0, None
        for row in metrics(Path(self)):
            if "groups_launched" in row:
                seen += row["groups_launched"] * G
                step = Path(self) / f"step_{row['step']:08d}"
                if seen <= limit and step.is_dir():
                    best = step
        if best is None:
            raise UserError(f"{self} has no checkpoint of at most {limit:,} answers: save more often")
        return str(best)


def command(run: Run, seed: int) -> list[str]:
    places = {name: Place(folder(used, seed)) for name, used in run.uses.items()}
    return shlex.split(run.command.format(out=folder(run, seed), seed=seed, **places))


def needed(claim: Claim) -> list[tuple[Run, int]]:
    """All runs of a claim, those that others need first, seed by seed."""
    found: dict[tuple[str, int], tuple[Run, int]] = {}

    def add(run: Run, seed: int) -> None:
        for used in run.uses.values():
            add(used, seed)
        found.setdefault((str(folder(run, seed)), seed), (run, seed))
    for seed in claim.seeds:
        for measures in claim.arms.values():
            for run in measures.values():
                add(run, seed)
    return list(found.values())


def done(run: Run, seed: int) -> bool:
    return (folder(run, seed) / "done.json").is_file()


# ---- registration ---------------------------------------------------------------------------------------------------

def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


def entry(claim: Claim) -> dict:
    """The claim as it is registered."""
    return {"key": claim.key, "section": claim.section, "says": claim.says, "differs": claim.differs,
            "seeds": list(claim.seeds), "contrasts": [vars(c) for c in claim.contrasts],
            "arms": {arm: {name: text(run).split("\n") for name, run in measures.items()}
                     for arm, measures in claim.arms.items()}}


def register(claim: Claim) -> None:
    """Write the claim's entry down before its first run. UserError if it is not committed, or is another one by now."""
    path, new = RESULTS / f"{claim.key}.json", entry(claim)
    if path.is_file():
        if json.loads(path.read_text())["registered"]["entry"] != json.loads(json.dumps(new)):
            raise UserError(f"{path.relative_to(ROOT)}: claim {claim.key!r} was registered with another entry; "
                            "give the changed one a new key")
        return
    if git("status", "--porcelain", "--", "paper/claims.py"):
        raise UserError("paper/claims.py has changes that are not committed: a claim is registered before it is run")
    write(path, {"registered": {"commit": git("rev-parse", "--short=12", "HEAD"), "entry": new}})


def write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as f:
        json.dump(value, f, indent=1)
        f.write("\n")


# ---- running --------------------------------------------------------------------------------------------------------

def start(run: Run, seed: int) -> subprocess.Popen:
    out = folder(run, seed)
    out.mkdir(parents=True, exist_ok=True)
    words = command(run, seed)
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"$ python {shlex.join(words)}\n")
        log.flush()
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(run: Run, seed: int, status: int, used: resource.struct_rusage) -> bool:
    """Note what a run took, over all the times it was begun. -> whether it is done."""
    out = folder(run, seed)
    spent = out / "cpu_seconds"
    seconds = used.ru_utime + used.ru_stime + (float(spent.read_text()) if spent.is_file() else 0.0)
    spent.write_text(f"{seconds:.3f}")
    last = ((out / "log.txt").read_text(encoding="utf-8").strip() or "?").splitlines()[-1]
    place = f"{out.relative_to(ROOT)}"
    if status or "stopped (SIGTERM)" in last:
        print(f"{place}: status {status}: {last[:200]}", flush=True)
        return False
    write(out / "done.json", {"command": f"python {shlex.join(command(run, seed))}".replace(f"{ROOT}/", ""),
                              "commit": git("rev-parse", "--short=12", "HEAD"), "cpu_seconds": round(seconds, 3)})
    print(f"{place}: done, {seconds / 60:.1f} minutes of processor time in all", flush=True)
    return True


def run_all(todo: list[tuple[Run, int]], jobs: int, after: Callable[[Path], None]) -> int:
    """
    Run what is not done, in order as soon as its inputs are there; after(folder) when one is done. -> how many failed.
    Ctrl-C and SIGTERM stop it.
    """
    running: dict[int, tuple[subprocess.Popen, Run, int]] = {}
    failed: set[Path] = set()

    def ready(run: Run, seed: int) -> bool:
        busy = {folder(r, s) for _, r, s in running.values()} | failed
        return (not done(run, seed) and folder(run, seed) not in busy
                and all(done(used, seed) for used in run.uses.values()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while True:
            for run, seed in todo:
                if len(running) < jobs and ready(run, seed):
                    process = start(run, seed)
                    running[process.pid] = (process, run, seed)
            if not running:
                return len(failed)
            pid, status, used = os.wait4(-1, 0)
            if pid in running:
                process, run, seed = running.pop(pid)
                process.returncode = os.waitstatus_to_exitcode(status)
                if finish(run, seed, process.returncode, used):
                    after(folder(run, seed))
                else:
                    failed.add(folder(run, seed))
    finally:
        for process, _, _ in running.values():            # they save, and the same command goes on
            process.send_signal(signal.SIGTERM)
        for pid, (_, run, seed) in list(running.items()):
            _, status, used = os.wait4(pid, 0)
            finish(run, seed, os.waitstatus_to_exitcode(status) or 143, used)


# ---- metrics: folder of a run -> a number, or a number per problem --------------------------------------------------

def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@cache
def looked_at() -> frozenset[str]:
    """Test problems of world 1, on which the recipe was chosen: they do not count."""
    from data.prepare import GENERATORS, Config, heldout
    cfg = Config()
    return frozenset(p.id for kind in GENERATORS for p in heldout(kind, "test", cfg.test, cfg))


def solved(out: Path, kind: str = "") -> dict[str, float]:
    """Share of right answers per fresh test problem, in percent."""
    problems = json.loads((out / "eval.json").read_text())["config"]["problems"]
    kinds = {p["id"]: p["kind"] for p in map(json.loads, open(problems, encoding="utf-8"))}
    rows = map(json.loads, open(out / "eval_answers.jsonl", encoding="utf-8"))
    return {row["id"]: 100 * sum(a["passed"] for a in row["answers"]) / len(row["answers"]) for row in rows
            if kind in ("", kinds[row["id"]]) and row["id"] not in looked_at()}


def pass_at(out: Path, k: int, less: int = 0) -> dict[str, float]:
    """pass@k per fresh test problem, percent; with `less`, pass@k minus pass@less."""
    return {id: 100 * (pass_at_k(64, c, k) - (pass_at_k(64, c, less) if less else 0.0))
            for id, c in ((id, round(0.64 * share)) for id, share in solved(out).items())}


def probed(out: Path, kind: str) -> float:
    """Score of a long-context probe at 512 tokens, percent."""
    return 100 * json.loads((out / "eval.json").read_text())["probes"][kind]["512"]


def heldout_points(out: Path) -> list[float]:
    """The held-out curve of an RL run on the validation problems, percent, mean of the kinds."""
    return [100 * float(np.mean([kind["avg"] for kind in row["heldout"].values()])) for row in metrics(out)
            if "heldout" in row]


def valid_loss(out: Path) -> float:
    """Mean of the held-out losses on maths and code pages at the end of the last stage, nats per token."""
    last = [row["valid"] for row in metrics(out) if "valid" in row][-1]
    return float(np.mean([last[source]["loss"] for source in ("maths", "code")]))


def last_half(out: Path, name: str) -> float:
    values = [row[name] for row in metrics(out) if name in row]
    return float(np.mean(values[len(values) // 2:]))


METRICS: dict[str, Callable[[Path], dict[str, float] | float]] = {
    "score": solved,                                                                # percent, per problem
    "maths": lambda out: solved(out, "maths"),
    "code": lambda out: solved(out, "code"),
    "valid_loss": valid_loss,                                                       # nats per token
    "grad_norm": lambda out: last_half(out, "grad_norm"),                           # second half of the run
    "unsteady": lambda out: float(np.std(np.diff(heldout_points(out)))),            # points
    "answers": lambda out: G * last_half(out, "groups_launched"),                   # launched per iteration
    "pass_64": lambda out: pass_at(out, 64),
    "pass_8_over_1": lambda out: pass_at(out, 8, 1),
    "pass_64_over_8": lambda out: pass_at(out, 64, 8),
    "needle": lambda out: probed(out, "single"),
    "needle_digits": lambda out: probed(out, "single digits"),
    "acceptance_3": lambda out: 100 * json.loads((out / "eval.json").read_text())["mtp"]["online"][2],   # percent
}


def value(claim: Claim, operand: str, metric: str, seed: int) -> dict[str, float] | float:
    """Of "ARM.MEASURE", of "A.M - B.N" (a rise), or of "A.M | B.N": the arm whose run ends best on valid problems."""
    if " | " in operand:
        best = max(operand.split(" | "),
                   key=lambda o: heldout_points(folder(claim.arms[o.rpartition(".")[0]]["run"], seed))[-1])
        return value(claim, best, metric, seed)
    if " - " in operand:
        a, b = (value(claim, o, metric, seed) for o in operand.split(" - "))
        return {k: a[k] - b[k] for k in a} if isinstance(a, dict) else a - b
    arm, _, measure = operand.rpartition(".")
    return METRICS[metric](folder(claim.arms[arm][measure], seed))


# ---- verdicts -------------------------------------------------------------------------------------------------------

T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}          # Student's t, 97.5%, by degrees of freedom


def interval(differences: list[np.ndarray], draws: int = 4000) -> tuple[float, float]:
    """
    95% interval of the mean over seeds. differences: per seed, one number per problem: bootstrap over the seeds and,
    in each, over its problems. One number per seed: Student's t, because so few numbers cannot be drawn from.
    """
    if all(len(d) == 1 for d in differences):
        x = np.array([d[0] for d in differences])
        half = T[len(x) - 1] * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 2 else math.inf
        return x.mean() - half, x.mean() + half
    rng, n = np.random.default_rng(0), len(differences)
    means = np.stack([d[rng.integers(len(d), size=(draws, n, len(d)))].mean(-1) for d in differences])  # [n,draws,n]
    chosen = rng.integers(n, size=(draws, n))                                     # which seed stands at each place
    drawn = means[chosen, np.arange(draws)[:, None], np.arange(n)[None]].mean(1)  # [draws]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def judged(claim: Claim, contrast: Contrast, seeds: list[int]) -> dict:
    """A contrast in numbers and words, from the seeds that are done."""
    differences = []
    for seed in seeds:
        a, b = (value(claim, side, contrast.metric, seed) for side in (contrast.better, contrast.worse))
        differences.append(np.array([a[k] - b[k] for k in sorted(a)] if isinstance(a, dict) else [a - b]))
    means = [float(d.mean()) for d in differences]
    low, high = interval(differences)
    signs = {contrast.sign * np.sign(m) for m in means}
    if contrast.sign * (low if contrast.sign > 0 else high) > 0 and signs == {1}:
        word = "agrees"
    elif contrast.sign * (high if contrast.sign > 0 else low) < 0 and signs == {-1}:
        word = "disagrees"
    else:
        word = "cannot be told at this size"
    return vars(contrast) | {"per_seed": means, "mean": float(np.mean(means)), "low": low, "high": high,
                             "verdict": word if len(seeds) == len(claim.seeds) else "not all seeds are done"}


def judge(claim: Claim) -> None:
    """Write what is known of a claim to results/claims/KEY.json; only seeds of which all runs are done count."""
    path = RESULTS / f"{claim.key}.json"
    runs = needed(claim)
    seeds = [s for s in claim.seeds if all(done(run, seed) for run, seed in runs if seed == s)]
    if not seeds or not path.is_file():
        return
    metric_of = {"score", *(c.metric for c in claim.contrasts)}
    values = {arm: {f"{measure} {metric}": [mean(claim, arm, measure, metric, s) for s in seeds]
                    for measure in measures for metric in sorted(metric_of)
                    if knows(claim, arm, measure, metric, seeds)}
              for arm, measures in claim.arms.items()}
    notes = [json.loads((folder(r, s) / "done.json").read_text()) for r, s in runs if s in seeds]
    contrasts = [judged(claim, c, seeds) for c in claim.contrasts]
    write(path, json.loads(path.read_text()) | {
        "seeds_done": seeds, "values": values, "contrasts": contrasts, "verdict": contrasts[0]["verdict"],
        "hours": round(sum(n["cpu_seconds"] for n in notes) / 3600, 2), "commits": sorted({n["commit"] for n in notes}),
        "machine": f"{platform.machine()}, Python {platform.python_version()}"})


def knows(claim: Claim, arm: str, measure: str, metric: str, seeds: list[int]) -> bool:
    try:
        return METRICS[metric](folder(claim.arms[arm][measure], seeds[0])) is not None
    except (OSError, KeyError, IndexError, TypeError, ValueError):
        return False


def mean(claim: Claim, arm: str, measure: str, metric: str, seed: int) -> float:
    found = METRICS[metric](folder(claim.arms[arm][measure], seed))
    return float(np.mean(list(found.values()))) if isinstance(found, dict) else float(found)


def main(cfg: Config) -> None:
    claims = [c for c in CLAIMS if cfg.claim in ("", c.key)]
    for claim in claims:
        runs = needed(claim)
        n = sum(done(*r) for r in runs)
        spent = sum(json.loads((folder(*r) / "done.json").read_text())["cpu_seconds"] for r in runs if done(*r))
        print(f"{claim.key:10} {claim.section:16} {n:3} of {len(runs):3} runs done, {spent / 3600:.1f} processor hours")
    if cfg.list:
        return
    if not cfg.judge:
        for claim in claims:
            register(claim)
        todo = list({folder(r, s): (r, s) for c in claims for r, s in needed(c)}.values())
        t0 = time.time()
        parts = {c.key: {folder(*r) for r in needed(c)} for c in claims}
        failed = run_all(todo, cfg.jobs, lambda done: [judge(c) for c in claims if done in parts[c.key]])
        print(f"{(time.time() - t0) / 3600:.1f} hours; {failed} runs failed" if failed else "all runs are done")
    for claim in claims:
        judge(claim)
    claims_page.main(claims_page.Config())
    if not cfg.judge and failed:
        raise UserError(f"{failed} runs failed: log.txt in their folders says why; the same command tries them again")


if __name__ == "__main__":
    configurator.run(main, Config)
