"""
Figures of a demo run, from the metrics.jsonl and eval.json in its folders. Only running means are computed here; all
other numbers were logged by the scripts themselves.

    python paper/figures.py --run=out/tiny        # 4 seconds; writes out/tiny/figures/*.png, and its points as CSV

    pretrain.png   losses over tokens, the three stages shaded, validation loss per source at each stage's end
    rl.png         avg@n on held-out problems over RL iterations, RL-Zero beside RL from SFT (report: Fig. 7)
    rollout.png    what dynamic sampling, the easy pool and the engine did (report: 3.3.2, 3.4)
    models.png     Base / RL-Zero / SFT / RL on held-out problems with 95% intervals (report: Table 5)
    mtp.png        acceptance per MTP layer, teacher-forced and in real decoding (report: 2.2)
    probes.png     long-context probes of the base model (report: Fig. 4)
"""
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configurator  # noqa: E402
from configurator import UserError  # noqa: E402

INK = "#222222"
COLOURS = {"maths": "#1b6ca8", "code": "#c8553d", "web": "#6a994e", "books": "#9c6ade", "synth": "#d4a017"}
NAMES = {"base": "Base", "rl_zero": "RL-Zero", "sft": "SFT", "rl": "RL"}
plt.rcParams.update({"figure.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.edgecolor": INK, "axes.grid": True, "grid.color": "#eeeeee", "legend.frameon": False,
                     "axes.axisbelow": True, "savefig.bbox": "tight"})


@dataclass(frozen=True)
class Config:
    run: str = "out/tiny"        # folder of the demo run; the figures go to RUN/figures


def rows_of(run: Path) -> list[dict]:
    """The lines of RUN/metrics.jsonl, oldest first; none where the run does not exist."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def save(fig: Figure, folder: Path, name: str, header: list[str], points: list[list]) -> None:
    """Write folder/NAME.png, and the points drawn in it as folder/NAME.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png")
    plt.close(fig)
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *points])


def smooth(values: list[float], n: int) -> list[float]:
    """Running mean: at each place the mean of the last n values, fewer at the start."""
    return [sum(values[max(0, i - n + 1):i + 1]) / len(values[max(0, i - n + 1):i + 1]) for i in range(len(values))]


def pretrain(run: Path, folder: Path) -> None:
    """
    Training loss of the trunk and of each MTP layer over tokens, smoothed over 15 steps; held-out loss per source at
    the end of each stage. Losses above 4 nats (the first steps) are cut off.
    """
    rows = rows_of(run / "base")
    steps = [r for r in rows if "loss" in r]
    tokens = [r["tokens"] / 1e6 for r in steps]
    fig, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for i, stage in enumerate(dict.fromkeys(r["stage"] for r in steps)):
        span = [t for t, r in zip(tokens, steps, strict=True) if r["stage"] == stage]
        ax.axvspan(span[0], span[-1], color="#f5f5f5" if i % 2 else "#e9eef4", lw=0)
        ax.text((span[0] + span[-1]) / 2, 0.98, stage, transform=ax.get_xaxis_transform(), ha="center", va="top",
                color="#666666")
    ax.plot(tokens, smooth([r["loss"] for r in steps], 15), color=INK, lw=1.3, label="trunk, training mixture")
    for k in range(max(len(r["mtp_loss"]) for r in steps)):
        some = [(t, r["mtp_loss"][k]) for t, r in zip(tokens, steps, strict=True) if len(r["mtp_loss"]) > k]
        ax.plot([t for t, _ in some], smooth([v for _, v in some], 15), lw=1, ls=["--", "-.", ":"][k % 3],
                color="#777777", label=f"MTP layer {k + 1}")
    points = [[r["tokens"], "train", r["loss"]] for r in steps]
    for name in COLOURS:
        ends = [(r["tokens"] / 1e6, r["valid"][name]["loss"]) for r in rows if name in r.get("valid", {})]
        if ends:
            ax.plot([t for t, _ in ends], [v for _, v in ends], "o-", ms=4, lw=0.8, color=COLOURS[name],
                    label=f"held-out {name}")
            points += [[t * 1e6, f"held-out {name}", v] for t, v in ends]
    ax.set(xlabel="tokens seen, millions", ylabel="loss, nats per token",
           ylim=(0, min(4, max(r["loss"] for r in steps))))
    fig.legend(ncol=5, fontsize=7, loc="outside lower center")
    save(fig, folder, "pretrain", ["tokens", "series", "nats_per_token"], points)


def rl(run: Path, folder: Path) -> None:
    """The held-out curve of RL and RL-Zero, one panel for maths and one for code, with 95% intervals."""
    fig, axes = plt.subplots(1, 2, figsize=(6.8, 2.9), sharey=True)
    points = []
    for name, style in (("rl", "-"), ("rl_zero", "--")):
        found = [(r["step"], r["heldout"]) for r in rows_of(run / name) if "heldout" in r]
        for ax, kind in zip(axes, ("maths", "code"), strict=True):
            x = [s for s, v in found if kind in v]
            y = [v[kind] for _, v in found if kind in v]
            if not x:
                continue
            label = NAMES[name] + (" (from SFT)" if name == "rl" else "")
            avg, low, high = ([100 * v[key] for v in y] for key in ("avg", "low", "high"))
            ax.plot(x, avg, "o" + style, ms=3, color=COLOURS[kind], label=label)
            ax.fill_between(x, low, high, color=COLOURS[kind], alpha=0.12, lw=0)
            ax.set(title=f"held-out {kind}", xlabel="RL iteration")
            ax.legend(fontsize=8)
            points += [[name, kind, s, v["avg"], v["low"], v["high"]] for s, v in zip(x, y, strict=True)]
    axes[0].set_ylabel("avg@n, %")
    save(fig, folder, "rl", ["run", "kind", "iteration", "avg", "low", "high"], points)


def rollout(run: Path, folder: Path) -> None:
    """Nine numbers that rl.py logs per iteration, RL beside RL-Zero."""
    series = [("reward_launched", "reward, all answers"), ("all0", "groups all wrong"), ("all1", "groups all right"),
              ("entropy", "entropy, nats per token"), ("length_mean", "answer length, tokens"),
              ("pool_size", "easy pool, problems"), ("waste", "valid samples wasted"),
              ("slot_idle", "engine slots idle"), ("logprob_diff_max", "engine - trainer log-prob, max")]
    fig, axes = plt.subplots(3, 3, figsize=(7.4, 5.2), sharex=True)
    points = []
    for name, colour in (("rl", INK), ("rl_zero", "#c8553d")):
        rows = [r for r in rows_of(run / name) if "reward_launched" in r]
        for ax, (key, title) in zip(axes.flat, series, strict=True):
            some = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            ax.plot([s for s, _ in some], [v for _, v in some], color=colour, lw=1.1, label=NAMES[name])
            ax.set_title(title, fontsize=8)
            points += [[name, key, s, v] for s, v in some]
    axes[0, 0].legend(fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("RL iteration")
    fig.tight_layout()
    save(fig, folder, "rollout", ["run", "series", "iteration", "value"], points)


def models(run: Path, folder: Path) -> None:
    """Bars: avg@n of the four models on held-out maths and code problems, with 95% intervals."""
    files = {name: run / name / "eval.json" for name in NAMES}
    found = {name: json.loads(path.read_text())["problems"] for name, path in files.items() if path.is_file()}
    fig, ax = plt.subplots(figsize=(5.4, 2.9))
    points = []
    for j, kind in enumerate(("maths", "code")):
        rows = [found[n][kind] for n in found]
        x = [i + (j - 0.5) * 0.38 for i in range(len(rows))]
        avg = [100 * r["avg"] for r in rows]
        err = [[100 * (r["avg"] - r["low"]) for r in rows], [100 * (r["high"] - r["avg"]) for r in rows]]
        ax.bar(x, avg, width=0.36, yerr=err, color=COLOURS[kind], error_kw={"lw": 1, "capsize": 2}, label=kind)
        for xi, v, top in zip(x, avg, err[1], strict=True):
            ax.text(xi, v + top + 1, f"{v:.0f}", ha="center", fontsize=8)
        points += [[name, kind, *(r[key] for key in ("avg", "low", "high", "n", "samples"))]
                   for name, r in zip(found, rows, strict=True)]
    ax.set_xticks(range(len(found)), [NAMES[n] for n in found])
    ax.set(ylabel="avg@n, held-out problems, %", ylim=(0, 105))
    ax.legend()
    save(fig, folder, "models", ["model", "kind", "avg", "low", "high", "problems", "samples"], points)


def mtp(run: Path, folder: Path) -> None:
    """Bars: share of drafts accepted per MTP layer of the base and SFT models; lines: the report's numbers."""
    fig, ax = plt.subplots(figsize=(4.2, 3.1), layout="constrained")
    points = []
    for i, name in enumerate(("base", "sft")):
        path = run / name / "eval.json"
        m = json.loads(path.read_text()).get("mtp") if path.is_file() else None
        for j, key in enumerate(("online", "teacher_forced") if m else ()):
            x = [k + 1 + (2 * i + j - 1.5) * 0.2 for k in range(len(m[key]))]
            ax.bar(x, [100 * v for v in m[key]], width=0.18, color=["#888888", "#1b6ca8"][i], alpha=0.55 if j else 1,
                   label=f"{NAMES[name]}, {'teacher-forced' if j else 'speculative decoding'}")
            points += [[name, key, k + 1, v] for k, v in enumerate(m[key])]
    for k, paper in ((1, 90), (3, 75)):
        ax.plot([k - 0.45, k + 0.45], [paper, paper], color="#c8553d", lw=1.2,
                label="report, MiMo-7B on AIME24" if k == 1 else None)
    ax.set(xlabel="MTP layer", ylabel="drafts accepted, %", ylim=(0, 105))
    ax.set_xticks([1, 2, 3])
    fig.legend(ncol=2, fontsize=6.5, loc="outside lower center")
    save(fig, folder, "mtp", ["model", "how", "layer", "acceptance"], points)


def probes(run: Path, folder: Path) -> None:
    """A table of scores: each long-context probe at each length. Nothing where eval.py ran no probes."""
    path = run / "base/eval.json"
    found = json.loads(path.read_text()).get("probes") if path.is_file() else None
    if not found:
        return
    lengths = list(next(iter(found.values())))
    grid = [[100 * by[n] for n in lengths] for by in found.values()]
    fig, ax = plt.subplots(figsize=(4.2, 2.9))
    ax.imshow(grid, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    ax.grid(False)
    for i, row in enumerate(grid):
        for j, v in enumerate(row):
            ax.text(j, i, f"{v:.0f}", ha="center", va="center", fontsize=8, color="white" if v > 60 else INK)
    ax.set_xticks(range(len(lengths)), [f"{n} tokens" for n in lengths])
    ax.set_yticks(range(len(found)), list(found))
    ax.set_title("long-context probes, base model, score in %", fontsize=8)
    save(fig, folder, "probes", ["probe", "tokens", "score"],
         [[k, n, by[n]] for k, by in found.items() for n in lengths])


def main(cfg: Config) -> None:
    run = Path(cfg.run)
    if not (run / "base/metrics.jsonl").is_file():
        raise UserError(f"no run in {run}: `make demo` makes one in out/tiny")
    folder = run / "figures"
    for draw in (pretrain, rl, rollout, models, mtp, probes):
        draw(run, folder)
    print(f"{len(list(folder.glob('*.png')))} figures in {folder}")


if __name__ == "__main__":
    configurator.run(main, Config)
