"""
Table 2 of the report remade: what each part of the Seamless Rollout Engine brings to one RL step (3.4.1).

The scheduler is the one that trains (rollout.Scheduler). Slots, lengths and judge are simulated on a virtual clock,
because 256 H20 are not at hand. Time counts decode steps; a busy slot makes one token per step. Idle is the mean share
of empty slots, and aborted work counts as idle. Not modelled: prefill, steps that become slower as the batch fills, and
the update (the "overall" column takes the report's share of it).

    python paper/table2.py                  # a minute on one core; writes results/rollout/table2*.csv and .json
    python paper/table2.py --seeds=2        # the same, rougher

Three facts of the report are put in: 41 % valid groups; the idle share of naive sampling, 69 % (it sets the mean
length); a synchronous reward costs about 5 % (it sets the judge's time). Everything else comes out. Expect: continuous
rollout 1.7x, the full engine 1.9x (report 2.2x and 2.6x), waste 19 % -> 10 % (22.1 % -> 12.9 %). Stopping at the first
groups that finish looks faster still, because it trains on answers that are 5 % too short.
"""
import csv
import heapq
import json
import math
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator  # noqa: E402
from rollout import Group, Key, Scheduler, hash64  # noqa: E402

# The report's two speed-ups fix the share f of rollout in a naive step: 1/overall = 1 - f (1 - 1/rollout).
# All four rows agree on f = 0.913 (2.20 -> 1.99, 2.34 -> 2.10, 2.61 -> 2.29, 2.82 -> 2.43, printed 2.45).
OVERALL = 0.913


@dataclass(frozen=True)
class Config:
    seeds: int = 8                        # simulated runs per row, each of 5 RL steps
    out: str = "results/rollout"          # folder of the .csv and .json files

    def __post_init__(self):
        configurator.at_least(self, 1, "seeds")


class Ablation(Scheduler):
    """
    The scheduler with parts of the engine taken away, for Tables 2 and 3 and Fig. 6; paper/policy.py gives it to the
    real engine. What the other arguments mean: rollout.Scheduler.

    launch   "continuous": on demand, as the engine does; "wave": `batch` groups at a time, the next when all are graded
    stop     "fifo": as the engine does; "drain": when everything that was launched has completed; "first": at the first
             `batch` valid groups to finish, wrong on purpose (it prefers short answers)
    rate     share of valid groups that is expected before anything is known [report: 41 %]
    pool     is there an easy pool? False: solved problems stay in the queue
    """

    def __init__(self, n_prompts: int, batch: int, G: int, launch: str = "continuous", stop: str = "fifo",
                 rate: float = 0.41, pool: bool = False, **scheduler):
        if launch not in ("continuous", "wave") or stop not in ("fifo", "drain", "first") or not 0 < rate <= 1:
            raise ValueError(f"launch = {launch!r}, stop = {stop!r}, rate = {rate} should be continuous or wave; fifo, "
                             "drain or first; in (0, 1]")
        self.launch_mode, self.stop_mode, self.has_pool = launch, stop, pool
        super().__init__(n_prompts, batch, G, **scheduler)
        self.rate = rate

    def _begin(self) -> None:
        super()._begin()
        self.order: list[Group] = []       # in the order in which their rewards were applied

    def blocked(self, free: int) -> bool:
        return bool(self.late())           # without the recipe's rules any reward may decide

    def _wanted(self) -> bool:
        if self.launch_mode == "continuous" or not self.dynamic or len(self.groups) >= self.max_groups:
            return super()._wanted()
        wave_open = len(self.groups) % self.batch_size != 0        # `free` may cut a wave into several calls
        return wave_open or self.n_applied == len(self.groups) and self.n_valid < self.batch_size

    def _select(self) -> list[Group] | None:
        if self.stop_mode == "fifo":
            return super()._select()
        known = {g.task.index for g in self.order}
        self.order += [g for g in self.groups if g.applied and g.task.index not in known]
        full, quiet = self.n_valid >= self.batch_size, self.n_applied == len(self.groups)
        if full and (quiet or self.stop_mode == "first") or quiet and len(self.groups) >= self.max_groups:
            groups = self.order if self.stop_mode == "first" else self.groups
            return sorted([g for g in groups if g.valid][:self.batch_size], key=lambda g: g.task.index)
        return None

    def batch(self, slots: int = 0, aborted_tokens: int = 0) -> tuple[list[Group], dict]:
        batch = super().batch(slots, aborted_tokens)
        if not self.has_pool:
            self.pool.clear()
        return batch


@dataclass(frozen=True)
class World:
    """Prompts, lengths, judge and slots of the simulation. Lengths and judge times in decode steps."""
    # A step without dynamic sampling just fills the slots: the report's idle times are proportional to the samples
    # generated (0.36 : 1.00 : 0.25 with idle 70.8, 69.3, 38.8 % means busy 1 : 2.97 : 2.69, and
    # 1 : 1.221/0.41 : 1.139/0.41 = 1 : 2.98 : 2.78 samples), as they are when slots, not GPUs, are counted.
    slots: int = 512
    batch: int = 64                # groups; batch * G = 512 samples
    G: int = 8
    p_easy: float = 0.33           # share of prompts that are always solved
    p_hard: float = 0.23           # share that is never solved; the rest have a pass rate uniform in [0.1, 0.9]
    median: float = 9000.0         # answer length of a prompt that is neither
    easy: float = 0.6              # easy prompts have shorter answers, by this factor
    hard: float = 1.5              # hard ones longer
    sigma_prompt: float = 0.4      # lognormal spread between prompts
    sigma_sample: float = 0.4      # and between the answers to one prompt
    cap: int = 32768               # longest answer [paper 3.3.3]; a truncated answer earns 0
    judge: float = 12.0            # mean time of one grading
    judge_sigma: float = 1.0       # its lognormal spread
    workers: int = 64              # graders
    n_prompts: int = 20000
    seed: int = 0

    def uniform(self, *key) -> float:
        """A number in (0, 1) that depends on seed and key alone."""
        return (hash64(self.seed, *key) + 0.5) / 2**64

    def normal(self, *key) -> float:
        """The same with a standard normal distribution."""
        return statistics.NormalDist().inv_cdf(self.uniform(*key))

    def answer(self, prompt: int, key: Key) -> tuple[int, float, float]:
        """(length, reward, grading time) of a sample: functions of its name, never of the scheduling."""
        u = self.uniform("kind", prompt)
        rate, factor = 0.1 + 0.8 * self.uniform("rate", prompt), 1.0
        if u < self.p_easy:
            rate, factor = 1.0, self.easy
        elif u > 1 - self.p_hard:
            rate, factor = 0.0, self.hard
        z = self.sigma_prompt * self.normal("p", prompt) + self.sigma_sample * self.normal("s", *key)
        length = max(1, min(self.cap, round(self.median * factor * math.exp(z))))
        reward = float(length < self.cap and self.uniform("r", *key) < rate)
        grading = self.judge * math.exp(self.judge_sigma * self.normal("j", *key) - self.judge_sigma**2 / 2)
        return length, reward, grading


@dataclass
class Answer:
    """What the scheduler needs of a sample: something sized under .tokens, and how it ended."""
    tokens: range
    finish: str = "stop"


class VirtualJudge:
    """`workers` graders, first come first served. A reward is there when the virtual time has come."""
    def __init__(self, workers: int):
        self.free = [0.0] * workers        # when each worker is free
        self.queue = []                    # heap of (ready, key, reward)

    def submit(self, t: float, key: Key, reward: float, grading: float) -> None:
        """A sample arrives at time t and takes `grading` steps of a worker."""
        ready = max(t, self.free[0]) + grading
        heapq.heapreplace(self.free, ready)
        heapq.heappush(self.queue, (ready, key, reward))

    def poll(self, t: float) -> list[tuple]:
        """[(key, reward, info)] of what was graded by time t."""
        out = []
        while self.queue and self.queue[0][0] <= t:
            _, key, reward = heapq.heappop(self.queue)
            out.append((key, reward, None))
        return out


# ---- one RL step in virtual time ------------------------------------------------------------------------------------

def simulate_step(sched: Scheduler, world: World, grade_at_end: bool = False) -> dict:
    """
    One RL step of `sched` in virtual time; ends with sched.batch().

    grade_at_end: submit to the judge only when everything launched so far has been generated (naive). -> the step's
    metrics, with "time" (decode steps and stalls), "idle", "length_trained" (tokens), and "spans": (key, slot, start,
    end, state) of every sample, for Fig. 6.
    """
    judge, wall, clock = VirtualJudge(world.workers), 0.0, 0        # the clock stands still while the engine waits
    waiting, held, running, free = [], [], [], list(range(world.slots))
    answers, spans = {}, {}
    while True:
        if held and not running and not waiting:
            for key in held:
                judge.submit(wall, key, *answers[key][1:])
            held = []
        sched.observe(judge.poll(wall))
        if any(None in g.rewards for g in sched.due()):
            wall = judge.queue[0][0]
            continue
        for task in sched.launch(free=len(free) - len(waiting)):
            for key in map(task.key, range(sched.G)):
                answers[key] = world.answer(task.prompt, key)
                waiting.append(key)
        if sched.selected is not None:
            break
        while waiting and free:                                     # first come, first served
            key, slot = waiting.pop(0), heapq.heappop(free)
            spans[key] = [key, slot, wall, wall + answers[key][0]]
            heapq.heappush(running, (clock + answers[key][0], key, slot))
        # jump to the next moment that can change a decision
        moments = [running[0][0]] if running else []
        if sched.reward_lag is not None:
            moments += [g.due for g in sched.unapplied]
        elif judge.queue:
            moments += [clock + max(1, math.ceil(judge.queue[0][0] - wall))]
        steps, active, finished = min(moments) - clock, len(running), []
        clock, wall = clock + steps, wall + steps
        while running and running[0][0] == clock:
            _, key, slot = heapq.heappop(running)
            heapq.heappush(free, slot)
            finished.append((key, Answer(range(answers[key][0]))))
            spans[key][3] = wall
        sched.advance(finished, active * steps, steps)
        for key, _ in finished:
            held.append(key) if grade_at_end else judge.submit(wall, key, *answers[key][1:])
    left = {key: end - clock for end, key, _ in running}            # tokens that aborted samples still had to make
    return account(sched, world, spans, answers, left, wall)


def account(sched: Scheduler, world: World, spans: dict, answers: dict, left: dict, wall: float) -> dict:
    """End the step and count what simulate_step() returns."""
    whole = sum(answers[key][0] for key in spans if key not in left)                # tokens of finished samples
    aborted = sum(answers[key][0] - left[key] for key in left)
    groups = sched.groups
    selected, metrics = sched.batch(slots=world.slots, aborted_tokens=aborted)
    used = {g.task.index for g in selected}
    for key, span in spans.items():
        g = groups[key[1]]
        unused = "excess" if g.valid or not g.applied else "dropped"
        span[3] = min(span[3], wall)
        span.append("aborted" if key in left else "used" if key[1] in used else unused)
    trained = [len(s.tokens) for g in selected for s in g.samples]
    return metrics | {
        "time": wall,
        "idle": 1 - whole / (world.slots * wall),
        "length_trained": statistics.fmean(trained) if trained else 0.0,
        "spans": list(spans.values()),
    }


def true_length(world: World, groups: int = 4000) -> float:
    """Mean answer length over valid groups when nothing is selected by time: what an unbiased batch shows."""
    lengths = []
    for n in range(groups):
        answers = [world.answer(hash64("truth", n) % world.n_prompts, (-1, n, i)) for i in range(world.G)]
        if len({r for _, r, _ in answers}) > 1:
            lengths += [length for length, _, _ in answers]
    return statistics.fmean(lengths)


# ---- the tables -----------------------------------------------------------------------------------------------------

# name, what the report prints (overall, rollout, idle time normalised, idle, waste), flags, grade at the end
ROWS = [
    ("w/o dynamic sampling", (2.45, 2.82, 0.36, 0.708, None), dict(dynamic=False, stop="drain"), True),
    ("naive dynamic sampling", (1, 1, 1, 0.693, 0.221), dict(launch="wave", stop="drain"), True),
    ("+ continuous rollout", (1.99, 2.20, 0.25, 0.388, 0.139), dict(stop="drain", reward_lag=0), False),
    ("+ async reward", (2.09, 2.34, 0.21, 0.340, 0.164), dict(stop="drain"), False),
    ("+ early termination", (2.29, 2.61, 0.15, 0.277, 0.129), dict(stop="fifo"), False),
    ("bit-equal: reward_lag 64", None, dict(stop="fifo", reward_lag=64), False),
    ("first finished (biased)", None, dict(stop="first"), False),
]


def run(world: World, flags: dict, grade_at_end: bool, seeds: int, steps: int = 5) -> dict:
    """Means over `seeds` runs of `steps` steps (the report: a 5-step trace), and the seeds' deviation."""
    runs = []
    for seed in range(seeds):
        w = replace(world, seed=seed)
        sched = Ablation(w.n_prompts, w.batch, w.G, seed=seed, **{"reward_lag": None, **flags})
        trace = [simulate_step(sched, w, grade_at_end) for _ in range(steps)]
        names = [k for k, v in trace[0].items() if isinstance(v, int | float)]
        runs.append({k: statistics.fmean(s[k] for s in trace) for k in names})
        runs[-1]["idle"] = sum(s["idle"] * s["time"] for s in trace) / sum(s["time"] for s in trace)
    mean = {k: statistics.fmean(r[k] for r in runs) for k in runs[0]}
    return mean | {"time_sd": statistics.stdev([r["time"] for r in runs]) if seeds > 1 else 0.0}


def table(world: World, seeds: int, rows=ROWS) -> list[dict]:
    got = [(name, paper, run(world, flags, at_end, seeds)) for name, paper, flags, at_end in rows]
    naive = next(r for name, _, r in got if name.startswith("naive"))
    truth = statistics.fmean(true_length(replace(world, seed=s), 1500) for s in range(seeds))
    out = []
    for name, paper, r in got:
        speed = naive["time"] / r["time"]
        out.append({
            "method": name,
            "overall": 1 / (1 - OVERALL * (1 - 1 / speed)), "rollout": speed,
            "idle_time": r["idle"] * r["time"] / (naive["idle"] * naive["time"]), "idle": r["idle"],
            "waste": r["waste"] if name[0] != "w" else None,
            "valid": r["valid"], "launched": r["groups_launched"],
            "aborted_token_share": r["aborted_tokens"] / (r["tokens"] + r["aborted_tokens"]),
            "length_vs_true": r["length_trained"] / truth if name[0] != "w" else None,
            "time_steps": r["time"], "time_sd": r["time_sd"],
            **{f"paper_{k}": v for k, v in zip(("overall", "rollout", "idle_time", "idle", "waste"),
                                               paper or (None,) * 5, strict=True)},
        })
    return out


def show(rows: list[dict], columns=("overall", "rollout", "idle_time", "idle", "waste")) -> str:
    percent = {"idle", "waste"}
    cell = lambda k, v: "/" if v is None else f"{v:.1%}" if k in percent else f"{v:.2f}"
    lines = [f"{'ours (report)':26}" + "".join(f"{c:>18}" for c in columns) + f"{'length vs true':>18}"]
    for r in rows:
        cells = [f"{cell(c, r[c])} ({cell(c, r['paper_' + c])})" for c in columns]
        bias = "/" if r.get("length_vs_true") is None else f"{r['length_vs_true'] - 1:+.1%}"
        lines.append(f"{r['method']:26}" + "".join(f"{c:>18}" for c in cells) + f"{bias:>18}")
    return "\n".join(lines)


def save(name: str, rows: list[dict], world: World, seeds, out: str, **more) -> None:
    """OUT/NAME.csv with the numbers, OUT/NAME.json with everything needed to make them again."""
    folder = ROOT / out
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about = {"command": f"python paper/{name}.py", "commit": head.stdout.strip(),
             "python": platform.python_version(), "hardware": "none: virtual clock, one CPU core",
             "seeds": list(seeds), "world": asdict(world), **more}
    (folder / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")


def sweep(world: World, seeds: int) -> tuple[list[dict], list[dict]]:
    """Two questions beside the table: what do more slots change, and what does reproducibility cost?"""
    naive, full = (next(r for r in ROWS if r[0].startswith(name)) for name in ("naive", "+ early"))
    by_slots = []
    for slots in (256, 512, 1024, 2048):
        w = replace(world, slots=slots)
        n, f = run(w, naive[2], True, seeds), run(w, full[2], False, seeds)
        by_slots.append({"slots": slots, "rollout": n["time"] / f["time"], "idle_naive": n["idle"],
                         "idle": f["idle"], "waste_naive": n["waste"], "waste": f["waste"]})
    lags, slow = [], replace(world, judge=60.0)         # a mean grading of 60 steps: 2 s at 30 steps a second
    for lag in (None, 0, 16, 64, 256, 1024, 4096):
        r = run(slow, {"reward_lag": lag}, False, seeds)
        lags.append({"reward_lag": "as they arrive" if lag is None else lag, "time_steps": r["time"],
                     "waste": r["waste"], "idle": r["idle"]})
    for row in lags:
        row["slowdown"] = row["time_steps"] / lags[0]["time_steps"]
    return by_slots, lags


def main(cfg: Config) -> None:
    rows = table(World(), cfg.seeds)
    print(show(rows))
    save("table2", rows, World(), range(cfg.seeds), cfg.out)
    for name, extra in zip(("table2_slots", "table2_lag"), sweep(World(), cfg.seeds), strict=True):
        print(f"\n{name}: " + ", ".join(extra[0]))
        for row in extra:
            print("  " + "  ".join(f"{v:.3f}" if isinstance(v, float) else f"{v:>14}" for v in row.values()))
        save(name, extra, World(), range(cfg.seeds), cfg.out, command="python paper/table2.py")


if __name__ == "__main__":
    configurator.run(main, Config)
