"""
Tables and the figure of results/real from the folders of that run: what its training scripts logged, step by step, and
what eval.py measured.

    python paper/real.py --run=out/real        # writes results/real/*.csv, rl.png and summary.json

The numbers are the scripts' own, but for one: a model that was never shown \\boxed{} is also judged by the last number
of its answer ("last_number" in summary.json), with the same bootstrap interval.
"""
import csv
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from figures import plt, rows_of  # noqa: E402

import configurator  # noqa: E402
from configurator import UserError  # noqa: E402
from data.problems import read_problems  # noqa: E402
from eval import bootstrap  # noqa: E402

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
COLUMNS = {"mtp": ["step", "mtp_loss", "epochs", "trained_tokens"],
           "sft": ["step", "loss", "mtp_loss", "grad_norm", "epochs", "trained_tokens"],
           "rl": ["step", "reward_launched", "launched", "all0", "all1", "entropy", "length_mean", "truncated",
                  "grad_norm", "logprob_diff", "rollout_s", "update_s"]}


@dataclass(frozen=True)
class Config:
    run: str = "out/real"                 # folder of the run's folders
    out: str = "results/real"             # where tables, figure and summary go


def main(cfg: Config) -> None:
    """Everything that is there; a run that is not finished yields what it has."""
    run, out = Path(cfg.run), Path(cfg.out)
    if not run.is_dir():
        raise UserError(f"run = {cfg.run!r} is no folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("mtp", "sft", "sft_words"):
        write_table(out / f"{name}.csv", COLUMNS[name.split("_")[0]], rows_of(run / name))
    seeds = {int(folder.name[3:]): rows_of(folder) for folder in sorted(run.glob("rl_[0-9]*"))}
    write_table(out / "rl.csv", ["seed", *COLUMNS["rl"]],
                [row | {"seed": seed} for seed, rows in seeds.items() for row in rows if "reward_launched" in row])
    points = [{"seed": seed, "step": row["step"], **row["heldout"]["maths"]}
              for seed, rows in seeds.items() for row in rows if "heldout" in row]
    write_table(out / "rl_valid.csv", ["seed", "step", "avg", "low", "high", "n", "samples", "truncated"], points)
    if len({p["step"] for p in points}) > 1:
        draw(points, out / "rl.png")
    summary = {path.stem.removeprefix("eval_"): evaluation(path) for path in sorted(run.glob("eval_*.json"))}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for name, row in summary.items():
        print(name, json.dumps(row))


def write_table(path: Path, columns: list[str], rows: list[dict]) -> None:
    """The columns of the rows that have them, as CSV; a list of one number as the number, others to six digits."""
    def cell(x: object) -> object:
        x = x[0] if isinstance(x, list) and len(x) == 1 else x
        return f"{x:.6g}" if isinstance(x, float) else x
    columns = [c for c in columns if any(c in row for row in rows)]
    if rows:
        with open(path, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([columns, *([cell(row.get(c, "")) for c in columns] for row in rows)])


def evaluation(path: Path) -> dict:
    """What eval.py wrote, without its configuration, and how many answers end with the right number."""
    found = json.loads(path.read_text(encoding="utf-8"))
    row = {key: found[key] for key in ("ckpt", "commit", "mtp") if key in found}
    if "problems" in found:
        row |= found["problems"]["maths"]
        asked = {p.id: p.answer for p in read_problems(found["config"]["problems"])}
        answers = path.with_name(f"{path.stem}_answers.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [sum(last_number(a["text"]) == float(asked[x["id"]]) for a in x["answers"]) / len(x["answers"])
                 for x in map(json.loads, answers)]
        row["problems"] = found["config"]["problems"]
        row["last_number"] = dict(zip(("avg", "low", "high"), bootstrap(rates), strict=True))
    return row


def last_number(text: str) -> float | None:
    """By hand: "5 + 3 = 8 apples, $1,200.50." -> 1200.5; None without a number."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def draw(points: list[dict], path: Path) -> None:
    """Accuracy on the validation problems over RL iterations, a line a seed, with 95% intervals."""
    fig, ax = plt.subplots(figsize=(4.2, 2.9), layout="constrained")
    for seed, colour in zip(sorted({p["seed"] for p in points}), ("#1b6ca8", "#c8553d", "#6a994e"), strict=False):
        mine = [p for p in points if p["seed"] == seed]
        x, (avg, low, high) = [p["step"] for p in mine], ([100 * p[k] for p in mine] for k in ("avg", "low", "high"))
        ax.plot(x, avg, "o-", ms=3, color=colour, label=f"seed {seed}")
        ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    ax.set(xlabel="RL iteration", ylabel="validation problems solved, %")
    ax.legend()
    fig.savefig(path)
    plt.close(fig)


if __name__ == "__main__":
    configurator.run(main, Config)
