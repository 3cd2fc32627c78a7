"""
Figure 6 of the report remade: what the slots of the engine do during one RL step, four ways (3.4.1).

Each row is a slot, each bar one answer: trained on, dropped because its group's rewards are equal, valid but beyond the
batch, or aborted. White is idle. A small world, so that the bars can be seen.

    python paper/fig6.py                    # 5 seconds; writes results/rollout/fig6.png, fig6.csv and fig6.json

Expect: three waves, each waiting for its longest answer; then one ragged block of a third of the length.
"""
from dataclasses import dataclass
from pathlib import Path

from table2 import ROOT, Ablation, World, save, simulate_step  # it also makes the project's modules importable

import configurator


@dataclass(frozen=True)
class Config:
    out: str = "results/rollout"          # folder of the .png, .csv and .json file


COLOURS = {"used": "#2a7f62", "dropped": "#b8b8b8", "excess": "#e0a030", "aborted": "#c0392b"}
LABELS = {"used": "trained on", "dropped": "dropped: rewards all equal", "excess": "beyond the batch",
          "aborted": "aborted"}
PANELS = [
    ("naive dynamic sampling", dict(launch="wave", stop="drain"), True),
    ("continuous rollout, drained", dict(stop="drain"), False),
    ("continuous, first-in-first-out stop", dict(stop="fifo"), False),
    ("first finished: fast, and biased to short answers", dict(stop="first"), False),
]
WORLD = World(slots=128, batch=16, G=8, workers=16, seed=0)


def panels(world: World) -> list[tuple[str, dict]]:
    """(title, what simulate_step returns) of each panel."""
    out = []
    for name, flags, at_end in PANELS:
        sched = Ablation(world.n_prompts, world.batch, world.G, seed=world.seed, reward_lag=None, **flags)
        out.append((name, simulate_step(sched, world, at_end)))
    return out


def draw(runs: list[tuple[str, dict]], path: Path) -> None:
    """The figure, one panel below the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(len(runs), 1, figsize=(9, 9), sharex=True, layout="constrained")
    for ax, (name, run) in zip(axes, runs, strict=True):
        for state, colour in COLOURS.items():
            bars = [(slot, start, end) for _, slot, start, end, s in run["spans"] if s == state]
            ax.barh([b[0] for b in bars], [b[2] - b[1] for b in bars], left=[b[1] for b in bars], height=1.0,
                    color=colour, edgecolor="white", linewidth=0.3, label=LABELS[state])
        ax.axvline(run["time"], color="black", linewidth=1)
        ax.set_title(f"{name}: {run['time']:,.0f} steps, idle {run['idle']:.0%}, mean trained length "
                     f"{run['length_trained']:,.0f}", fontsize=10, loc="left")
        ax.set_ylabel("slot")
        ax.set_ylim(-0.5, WORLD.slots - 0.5)
    axes[-1].set_xlabel("decode steps")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[s]) for s in COLOURS]
    fig.legend(handles, LABELS.values(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.savefig(path, dpi=130)


def main(cfg: Config) -> None:
    runs = panels(WORLD)
    names = ("launch", "sample", "slot", "start", "end", "state")
    rows = [{"panel": name} | dict(zip(names, (*key[1:], *span), strict=True))
            for name, run in runs for key, *span in run["spans"]]
    save("fig6", rows, WORLD, [WORLD.seed], cfg.out)
    draw(runs, ROOT / cfg.out / "fig6.png")
    for name, run in runs:
        print(f"{name:50} {run['time']:8,.0f} steps  idle {run['idle']:.0%}  waste {run['waste']:.0%}  "
              f"mean trained length {run['length_trained']:,.0f}")


if __name__ == "__main__":
    configurator.run(main, Config)
