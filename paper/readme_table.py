"""
The results block of README.md, written from the committed demo run (the report's Table 5 beside it).

    python paper/readme_table.py        # rewrites README.md between its two marks; prints the block

Reads results/demo/summary.json (a copy of what demo.py wrote) and, where it exists, results/demo/run.json (command,
hardware, versions, seeds). Nobody edits the README between the marks by hand: tests/test_docs.py compares the block
with what this script makes of the committed files.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator  # noqa: E402
from configurator import UserError  # noqa: E402

RUN = ROOT / "results/demo"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NAMES = {"base": "Base", "rl_zero": "RL-Zero", "sft": "SFT", "rl": "RL"}
# report, Table 5: MATH500, AIME 2024, LiveCodeBench v5, in per cent
REPORT = {"base": (37.4, 32.9, 32.9), "rl_zero": (93.6, 56.4, 49.1), "sft": (93.0, 58.7, 52.3),
          "rl": (95.8, 68.2, 57.8)}


@dataclass(frozen=True)
class Config:
    """No settings: the block depends on the committed files alone."""


def percent(x: float) -> str:
    """0.352 -> 35.2%."""
    return f"{100 * x:.1f}%"


def block(summary: dict, run: dict) -> str:
    """The text between the marks. summary: a demo's summary.json; run: where and how it was made ({} = unknown)."""
    cell = lambda row: f"{percent(row['avg'])} [{percent(row['low'])}, {percent(row['high'])}]"
    layers = lambda shares: ", ".join(map(percent, shares))
    tail = lambda row: ", ".join(f"{k} {percent(v)}" for k, v in row.items() if k.startswith("pass@"))
    models, mtp, seconds = summary["models"], summary["mtp"], summary["seconds"]
    base = models["base"]
    lines = ["| | maths, avg@n | code, avg@n | "
             "MiMo-7B, the report's Table 5: MATH500 / AIME24 / LiveCodeBench v5 |", "|---|---|---|---|"]
    for key, name in NAMES.items():
        report = " / ".join(f"{v}" for v in REPORT[key])
        lines.append(f"| {name} | {cell(models[key]['maths'])} | {cell(models[key]['code'])} | {report} |")
    lines += [
        "",
        f"The left columns are ours: a model of about a million parameters on {base['maths']['n']} maths and "
        f"{base['code']['n']} code problems held out by identity, n = "
        + ", ".join(f"{models[k]['maths']['samples']} ({v})" for k, v in NAMES.items())
        + ", temperature 0.6, top-p 0.95, brackets: 95% bootstrap intervals over problems. The right "
        "column is a model of seven billion on public benchmarks: only the order of rows can be compared.",
        "",
        f"- Base: maths {tail(base['maths'])}; code {tail(base['code'])}.",
        "- MTP, greedy answers to held-out problems: drafts accepted per layer "
        f"{layers(mtp['acceptance'])} (teacher-forced {layers(mtp['teacher_forced'])}; report, AIME24: first "
        f"about 90%, third above 75%), {mtp['tokens_per_forward']:.2f} tokens per forward, "
        f"{mtp['speedup']:.2f}x plain decoding at batch 1, text "
        f"{'equal token for token' if mtp['equal_text'] else 'DIFFERENT'}.",
        f"- {seconds['total'] / 60:.1f} minutes in all: "
        + ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items() if k != "total")
        + f"; peak memory {summary['peak_mb']} MB; held-out problems seen in training: "
        f"{summary['heldout_overlap']}.",
        "- " + "; ".join(f"{k}: {show(v)}" for k, v in ({"commit": summary["commit"]} | run).items()) + ".",
    ]
    return "\n".join(lines)


def show(value: object) -> str:
    """A value of run.json in words: dicts and lists flat, with commas."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {show(v)}" for k, v in value.items())
    return ", ".join(map(show, value)) if isinstance(value, list) else f"`{value}`"


def inside(readme: str) -> str:
    """What stands between the marks. UserError when the README does not have both, once each and in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise UserError(f"README.md should have {BEGIN} and {END}, once each")
    return readme[readme.index(BEGIN) + len(BEGIN):readme.index(END)].strip("\n")


def replaced(readme: str, text: str) -> str:
    """The README with text between the marks. UserError as inside()."""
    inside(readme)
    return readme[:readme.index(BEGIN) + len(BEGIN)] + "\n" + text + "\n" + readme[readme.index(END):]


def committed() -> str:
    """The block of the files under results/demo."""
    read = lambda path: json.loads(path.read_text(encoding="utf-8"))
    run = RUN / "run.json"
    return block(read(RUN / "summary.json"), read(run) if run.is_file() else {})


def main(cfg: Config) -> None:
    if not (RUN / "summary.json").is_file():
        raise UserError(f"no {RUN}/summary.json: `make demo` writes out/tiny/summary.json, copy it")
    text, path = committed(), ROOT / "README.md"
    path.write_text(replaced(path.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    configurator.run(main, Config)
