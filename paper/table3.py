"""
Table 3 of the report remade: validation, where every answer counts and nothing is filtered (3.4.1).

Before: problems go to the engine batch by batch, and a batch is graded when all of it has been generated. Now: all are
launched at once, a slot takes the next one when it is free, and grading runs beside. No work is saved or lost, so the
speed-up is (1 - idle now) / (1 - idle before): the report's 0.671 / 0.342 is its 1.96. The size of its validation set
is not reported, so the table shows several.

    python paper/table3.py                  # half a minute; writes results/rollout/table3.csv and .json
    python paper/table3.py --seeds=2        # the same, rougher

The world of paper/table2.py, nothing fitted anew. Expect: 2.0x for four batches, idle 69 % -> 37 %.
"""
import statistics
from dataclasses import dataclass, replace

from table2 import Ablation, World, save, simulate_step  # it also makes the project's modules importable

import configurator


@dataclass(frozen=True)
class Config:
    seeds: int = 8                        # simulated validations per row
    out: str = "results/rollout"          # folder of the .csv and .json file

    def __post_init__(self):
        configurator.at_least(self, 1, "seeds")


def validate(world: World, groups: int, batch: int, at_end: bool) -> tuple[float, float]:
    """Generate and grade `groups` groups in batches of `batch`. -> (time in decode steps, idle share)."""
    sched = Ablation(world.n_prompts, batch, world.G, stop="drain", seed=world.seed, dynamic=False, reward_lag=None)
    steps = [simulate_step(sched, world, at_end) for _ in range(groups // batch)]
    time = sum(s["time"] for s in steps)
    return time, sum(s["idle"] * s["time"] for s in steps) / time


def table(world: World, seeds: int, batches=(1, 2, 3, 4, 6, 8)) -> list[dict]:
    """One row for each size of the validation set, in batches that just fill the slots."""
    rows, batch = [], world.slots // world.G
    for n in batches:
        worlds = [replace(world, seed=s) for s in range(seeds)]
        before = [validate(w, n * batch, batch, True) for w in worlds]
        now = [validate(w, n * batch, n * batch, False) for w in worlds]
        mean = lambda runs, k: statistics.fmean(r[k] for r in runs)
        rows.append({"batches": n, "samples": n * batch * world.G, "speedup": mean(before, 0) / mean(now, 0),
                     "idle_before": mean(before, 1), "idle": mean(now, 1),
                     "paper_speedup": 1.96, "paper_idle_before": 0.658, "paper_idle": 0.329})
    return rows


def main(cfg: Config) -> None:
    rows = table(World(), cfg.seeds)
    print(f"{'batches':>14}{'samples':>10}{'speed-up':>10}{'idle before':>13}{'idle now':>10}")
    for r in rows:
        print(f"{r['batches']:14}{r['samples']:10}{r['speedup']:9.2f}x{r['idle_before']:13.1%}{r['idle']:10.1%}")
    print(f"{'report':>14}{'?':>10}{1.96:9.2f}x{0.658:13.1%}{0.329:10.1%}")
    save("table3", rows, World(), range(cfg.seeds), cfg.out)


if __name__ == "__main__":
    configurator.run(main, Config)
