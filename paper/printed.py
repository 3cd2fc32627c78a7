"""
What the README and the tutorial's pages print, written from a demo run, so that no page shows a number that the code
does not give.

    python paper/printed.py                       # two minutes when idle; needs out/tiny of `make demo`
    python paper/printed.py --only=sft,rl         # some blocks only

A page marks a block with comments and gives the commands in the fence before it:

    ```
    python sft.py config/tiny_sft.py --out=out/try/sft --steps=4
    ```
    <!-- printed: sft -->
    ...
    <!-- end -->

This script runs that fence as it stands (with out/printed for out/try, and cleaned away before), keeps the lines worth
reading, writes them to results/demo/printed/NAME.txt and puts them between the marks. Times and speeds differ from run
to run: they read "(varies)". tests/test_tutorial.py compares pages and files; it runs nothing.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator  # noqa: E402
from configurator import UserError  # noqa: E402

FILES = ROOT / "results/demo/printed"
SCRATCH = "out/printed"                                 # stands for the pages' out/try while this script runs
MARK = re.compile(r"<!-- printed: (\w+) -->\n(.*?)<!-- end -->", re.S)
FENCE = re.compile(r"^```(?:text)?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Config:
    only: str = ""        # names of blocks, separated by commas; "" = all


def pages() -> list[Path]:
    """README.md and the tutorial's pages, in order."""
    return [ROOT / "README.md", *sorted((ROOT / "docs/tutorial").glob("*.md"))]


def blocks(page: str) -> dict[str, tuple[str, str]]:
    """
    page: the text of a page. -> {name: (commands, what stands between the marks)}; commands is the fence before the
    mark. ValueError for a mark without a fence before it, or a name that occurs twice.
    """
    found = {}
    for match in MARK.finditer(page):
        fences = FENCE.findall(page[:match.start()])
        if not fences or match[1] in found:
            raise ValueError(f"printed block {match[1]!r} stands twice, or has no commands before it")
        found[match[1]] = (fences[-1], match[2])
    return found


def filled(page: str, texts: dict[str, str]) -> str:
    """The page with texts[name] in its blocks; a block that texts does not have stays as it is."""
    put = lambda m: f"<!-- printed: {m[1]} -->\n{texts[m[1]]}<!-- end -->" if m[1] in texts else m[0]
    return MARK.sub(put, page)


def run(commands: str, may_fail: bool) -> str:
    """What the commands print, stdout and stderr together. UserError when one fails that should not."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1",
                        "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-e", "-c", commands.replace("out/try", SCRATCH)], cwd=ROOT, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode and not may_fail:
        raise UserError(f"{commands.strip()!r} ended with status {done.returncode}: {done.stdout[-300:].strip()!r}")
    return done.stdout.replace(SCRATCH, "out/try")


# ---- what is worth reading of an output -----------------------------------------------------------------------------

def tidy(text: str) -> str:
    """Without the printed configuration and progress bars, times and speeds as (varies), lines of at most 118."""
    lines = [line for line in text.replace("\r", "\n").split("\n")
             if not re.match(r"[* ] [\w.]+ += ", line) and "it/s]" not in line and "step/s]" not in line]
    text = "\n".join(lines)
    text = re.sub(r"[\d,.]+(?= (?:tokens/s|GB/s|checks/s|programs/s|tests/s)\b)", "(varies)", text)
    text = re.sub(r"\b\d+\.\d+ s\b", "(varies) s", text)
    text = re.sub(r"\(\d+ s\)", "(time varies)", text)
    text = re.sub(r"(= |, |: )\d+\.\d+x\b", r"\1(varies)", text)
    wrap = lambda line: textwrap.wrap(line, 118, subsequent_indent="    ", break_long_words=False,
                                      break_on_hyphens=False) if len(line) > 118 else [line]
    return "\n".join(part for line in text.strip("\n").split("\n") for part in wrap(line.rstrip()))


def lines_with(*words: str) -> Callable[[str], str]:
    """A filter: only lines in which one of the words occurs."""
    return lambda text: tidy("\n".join(line for line in text.split("\n") if any(word in line for word in words)))


def metrics(name: str) -> list[dict]:
    """The metrics.jsonl of a run that a command has just written under out/try."""
    return [json.loads(line) for line in open(ROOT / SCRATCH / name / "metrics.jsonl", encoding="utf-8")]


def pretrain(text: str) -> str:
    """One line about the run, two for each stage."""
    lines = [line for line in text.split("\n") if "parameters," in line or "ends at" in line]
    return tidy("\n".join(line.replace(" nats per token: ", " nats per token:\n    ") for line in lines))


def sft(text: str) -> str:
    """The line about the samples, and the first line of the log."""
    row = metrics("sft")[0]
    layers = ", ".join(f"{x:.2f}" for x in row["mtp_loss"])
    return f"{lines_with('samples:')(text)}\n\nstep 1: loss {row['loss']:.2f} nats per token, MTP layers {layers}; " \
           f"{row['trained_tokens']:,} tokens trained on"


def rl(text: str) -> str:
    """How the run begins, and of the forty numbers of a log line those to read first."""
    rows = metrics("rl")
    row = lambda name, show: f"  {name:30}" + "".join(f"{show(r):>13}" for r in rows)
    number = lambda key, form: lambda r: format(r[key], form)
    table = [f"{'from out/try/rl/metrics.jsonl':32}" + "".join(f"{'step ' + str(r['step']):>13}" for r in rows),
             row("groups_launched / groups_used", lambda r: f"{r['groups_launched']} / {r['groups_used']}"),
             *(row(key, number(key, ".3f")) for key in ("reward_launched", "reward_trained", "pass_rate")),
             row("all0, all1", lambda r: f"{r['all0']:.2f}, {r['all1']:.2f}"),
             row("entropy, nats per token", number("entropy", ".3f")),
             row("ratio, ratio_max", lambda r: f"{r['ratio']:.0f}, {r['ratio_max']:.0f}")]
    return lines_with("problems,", "  '")(text) + "\n\n" + "\n".join(table)


def ranks(_: str) -> str:
    """Losses of the two runs side by side."""
    one, two = metrics("one"), metrics("two")
    table = ["step   one process   two processes   difference"]
    table += [f"{a['step']:4}   {a['loss']:11.6f}   {b['loss']:13.6f}   {abs(a['loss'] - b['loss']):10.0e}"
              for a, b in zip(one, two, strict=True) if "loss" in a]
    return "\n".join(table[:6])


def mtp(_: str) -> str:
    """A Markdown table of what eval.py wrote."""
    m = json.loads((ROOT / SCRATCH / "mtp.json").read_text(encoding="utf-8"))["mtp"]
    layers = lambda shares: " | ".join(f"{100 * x:.1f}%" for x in shares)
    a, b, c = m["online"]
    return "\n".join([
        "| | layer 1 | layer 2 | layer 3 |", "|---|---|---|---|",
        f"| drafts accepted while decoding | {layers(m['online'])} |",
        f"| the same, from one forward over the finished text | {layers(m['teacher_forced'])} |",
        "| MiMo-7B on AIME24 (report) | about 90% | | above 75% |", "",
        f"{m['answers']} answers, the text {'equal' if m['equal_text'] else 'NOT EQUAL'} to that of plain decoding. "
        f"Tokens per forward of the trunk: 1 + a1 + a1 a2 + a1 a2 a3 = **{1 + a + a * b + a * b * c:.2f}**."])


def grpo(text: str) -> str:
    """The first and the last lines."""
    lines = tidy(text).split("\n")
    return "\n".join(lines if len(lines) <= 14 else [*lines[:6], "...", *lines[-6:]])


def plan(text: str) -> str:
    """Trunk and MTP sizes, and the schedule table; memory and days have a page of their own."""
    keep, lines = [], text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("schedule"))
    for line in lines[start:]:
        if keep and not line.strip():
            break
        keep.append(line.rstrip())
    sizes = [line.rstrip() for line in lines[:start] if "trunk" in line or "MTP layer" in line]
    return "\n".join([*sizes, "", *keep])


SHOW = {
    "plan": plan, "pretrain": pretrain, "mtp": mtp, "sft": sft, "rl": rl, "ranks": ranks, "grpo": grpo,
    "resume": lines_with("warning:", "samples:"),
}                                                       # every other block shows all of its output, tidied
TABLES = ("mtp",)                                       # Markdown; all others stand in a fence
MAY_FAIL = ("typo",)                                    # commands that show how a run is refused


def main(cfg: Config) -> None:
    if not (ROOT / "out/tiny/rl/latest").is_file():
        raise UserError("no out/tiny/rl: `make demo` makes the run that the pages show")
    wanted = {name: commands for path in pages() for name, (commands, _) in blocks(path.read_text("utf-8")).items()}
    chosen = cfg.only.split(",") if cfg.only else list(wanted)
    if unknown := set(chosen) - set(wanted):
        raise UserError(f"only: no page has a block {unknown.pop()!r}; there are {', '.join(wanted)}")
    FILES.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        shutil.rmtree(ROOT / SCRATCH, ignore_errors=True)
        print(f"{name}: {wanted[name].strip().splitlines()[0]}", flush=True)
        text = SHOW.get(name, tidy)(run(wanted[name], name in MAY_FAIL))
        text = f"{text}\n" if name in TABLES else f"```text\n{text}\n```\n"
        (FILES / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    shutil.rmtree(ROOT / SCRATCH, ignore_errors=True)
    for path in FILES.glob("*.txt"):
        if path.stem not in wanted:
            path.unlink()
    texts = {path.stem: path.read_text(encoding="utf-8") for path in FILES.glob("*.txt")}
    for path in pages():
        page = path.read_text(encoding="utf-8")
        path.write_text(filled(page, texts), encoding="utf-8", newline="\n")
    print(f"{len(chosen)} blocks in {FILES.relative_to(ROOT)} and in the pages")


if __name__ == "__main__":
    configurator.run(main, Config)
