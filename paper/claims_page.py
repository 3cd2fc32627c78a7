"""
The page of the claims, from results/claims/*.json alone: results/claims/README.md and a self-contained claims.html.

    python paper/claims_page.py          # a second; paper/experiments.py ends with it

Per claim: what the report says, our numbers per arm and seed, a plot of the contrasts, the verdict, what differs from
the report's experiment, the command, hours and seeds. A file's field "remark" is written by a person and printed as it
is. Below, in the HTML: answers along an RL run (paper/transcripts.py), tokens coloured by probability or by the MTP
layer that drafted them. No script and nothing from the network: it opens offline, in light and dark, on a phone.
"""
import html
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "paper")]
from claims import CLAIMS  # noqa: E402

import configurator  # noqa: E402
from data.jsonl import whole_file  # noqa: E402

UNITS = {"valid_loss": "nats", "grad_norm": "", "unsteady": "points", "answers": "answers"}   # else: points
STATES = {"agrees": "yes", "disagrees": "no"}                                                 # else: open


@dataclass(frozen=True)
class Config:
    results: str = "results/claims"       # folder that is read, and written to


def number(x: float, metric: str) -> str:
    return f"{x:+.4f}" if metric in ("valid_loss", "grad_norm") else f"{x:+.1f}"


def in_words(c: dict, seeds: int) -> str:
    """A contrast as one sentence."""
    unit = UNITS.get(c["metric"], "points")
    side = sum(c["sign"] * x > 0 for x in c["per_seed"])
    between = (f"[{number(c['low'], c['metric'])}, {number(c['high'], c['metric'])}]" if abs(c["low"]) < 1e300 else
               "not known from so few seeds")
    return (f"{number(c['mean'], c['metric'])} {unit}, 95% interval {between}; "
            f"{side} of {seeds} seeds on the report's side".replace(" ,", ","))


def load(folder: Path) -> list[dict]:
    """Registered claims in the table's order; `says` etc. as they were registered."""
    found = []
    for claim in CLAIMS:
        path = folder / f"{claim.key}.json"
        if path.is_file():
            row = json.loads(path.read_text(encoding="utf-8"))
            found.append(row["registered"]["entry"] | row | {"at": row["registered"]["commit"]})
    return found


def table_rows(claim: dict) -> list[tuple[str, str, str]]:
    """(arm, what is measured, "mean (seed, seed, ..)")."""
    rows = []
    for arm, values in claim.get("values", {}).items():
        for name, seeds in values.items():
            digits = 4 if name.split()[-1] in ("valid_loss", "grad_norm") else 1
            each = ", ".join(f"{x:.{digits}f}" for x in seeds)
            rows.append((arm, name, f"{sum(seeds) / len(seeds):.{digits}f}  ({each})"))
    return rows


# ---- markdown -------------------------------------------------------------------------------------------------------

def markdown(claims: list[dict]) -> str:
    lines = ["# The report's claims, put to the test on a laptop", "",
             "Made by `python paper/claims_page.py` from the files here; `make paper` runs the experiments. The rules "
             "(fresh test problems, registration, when a verdict is given) stand in `paper/claims.py`. The same page "
             "with plots and answers: `claims.html`, which opens offline.", "",
             "| claim | report | verdict | deciding contrast |", "|---|---|---|---|"]
    for c in claims:
        first, words = c["contrasts"][0], "no run yet"
        if c.get("values"):
            words = f"{first['says']}: {in_words(first, len(c['seeds_done']))}"
        lines.append(f"| [{c['key']}](#{c['key']}) | {c['section']} | {c.get('verdict', 'registered')} | {words} |")
    for c in claims:
        lines += ["", f"## {c['key']}", "", f"**Report {c['section']}.** {c['says']}", ""]
        if c["differs"]:
            lines += [f"**Differs from the report's experiment.** {c['differs']}", ""]
        if c.get("values"):
            lines += [f"**Verdict: {c['verdict']}.**" + (f" {c['remark']}" if c.get("remark") else ""), "",
                      "| contrast | difference | verdict |", "|---|---|---|"]
            lines += [f"| {x['says']} | {in_words(x, len(c['seeds_done']))} | {x['verdict']} |" for x in c["contrasts"]]
            lines += ["", "| arm | measured | mean (per seed) |", "|---|---|---|"]
            lines += [f"| {arm} | {name} | {values} |" for arm, name, values in table_rows(c)]
            lines += ["", f"`make paper CLAIM={c['key']}`; seeds {', '.join(map(str, c['seeds_done']))} of "
                      f"{', '.join(map(str, c['seeds']))}; {c['hours']} processor hours; registered at {c['at']}, "
                      f"run at {', '.join(c['commits'])}; {c['machine']}."]
        else:
            lines += [f"Registered at {c['at']}; no seed is finished. `make paper CLAIM={c['key']}`"]
    return "\n".join(lines) + "\n"


# ---- HTML -----------------------------------------------------------------------------------------------------------

STYLE = """
:root{--bg:#fdfdfb;--ink:#1d1d1f;--soft:#6b6b70;--line:#dddcd8;--yes:#2a7a4b;--no:#b3402b;--open:#8a6d1d;--hot:#d98a2b;
--l1:#1b6ca8;--l2:#6a994e;--l3:#9c6ade}
@media(prefers-color-scheme:dark){:root{--bg:#161618;--ink:#e8e8ea;--soft:#9a9aa2;--line:#36363b;--yes:#6fc793;--no:#ec8671;
--open:#d9bb66;--hot:#b06a18;--l1:#6cb2e6;--l2:#9fce82;--l3:#c3a2f2}}
*{box-sizing:border-box}body{margin:0 auto;max-width:56rem;padding:1rem;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;line-height:1.2}h2{font-size:1.15rem;margin:2.5rem 0 .3rem;
border-top:1px solid var(--line);padding-top:1.2rem}p{margin:.5rem 0}.soft{color:var(--soft);font-size:.88rem}
.v{font-weight:600}.yes{color:var(--yes)}.no{color:var(--no)}.open{color:var(--open)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;width:100%}
td,th{text-align:left;padding:.25rem .6rem .25rem 0;border-bottom:1px solid var(--line);vertical-align:top}
code,pre{font:.85rem/1.5 ui-monospace,monospace}
svg{width:100%;height:auto}a{color:inherit}.row{display:flex;justify-content:space-between;gap:1rem;font-size:.88rem}
.row .soft{white-space:nowrap}
details{border-bottom:1px solid var(--line);padding:.4rem 0}summary{cursor:pointer}pre{white-space:pre-wrap;
overflow-wrap:anywhere;margin:.3rem 0 .8rem}.t{border-radius:2px}label{margin-right:1rem}
#p:checked~.answers .t{background:color-mix(in srgb,var(--hot) calc((1 - var(--p))*100%),transparent)}
#d:checked~.answers .l1{color:var(--l1)}#d:checked~.answers .l2{color:var(--l2)}#d:checked~.answers .l3{color:var(--l3)}
"""


def plot(claim: dict) -> str:
    """The contrasts: interval, mean, and a ring per seed, each on its own scale around 0."""
    parts = []
    for c in claim["contrasts"]:
        top = 1.1 * max([abs(v) for v in (c["low"], c["high"], *c["per_seed"]) if abs(v) < 1e300], default=0.0) or 1.0
        low, high, mean, *seeds = (350 + 340 * max(-1, min(1, v / top)) for v in
                                   (c["low"], c["high"], c["mean"], *c["per_seed"]))
        colour = f"var(--{STATES.get(c['verdict'], 'open')})"
        rings = "".join(f'<circle cx="{x:.1f}" cy="14" r="5" fill="none" stroke="currentColor"/>' for x in seeds)
        unit = UNITS.get(c["metric"], "points")
        parts.append(f'<div class="row"><span>{html.escape(c["says"])}</span><span class="soft">'
                     f'{number(c["mean"], c["metric"])} {unit}</span></div><svg viewBox="0 0 700 28" role="img" '
                     'aria-label="difference with its 95% interval"><path d="M10 14H690" stroke="var(--line)"/>'
                     f'<path d="M350 4V24" stroke="currentColor"/><path d="M{low:.1f} 14H{high:.1f}" stroke="{colour}" '
                     f'stroke-width="5" stroke-linecap="round" opacity=".55"/>{rings}'
                     f'<circle cx="{mean:.1f}" cy="14" r="6.5" fill="{colour}"/></svg>')
    return ("".join(parts) + '<p class="soft">The mark is 0. Bar: 95% interval; full dot: mean; rings: seeds. Each row '
            'has its own scale.</p>')


def section(c: dict) -> str:
    e = html.escape
    parts = [f'<h2 id="{c["key"]}">{e(c["key"])} <span class="soft">report {e(c["section"])}</span></h2>',
             f'<p>{e(c["says"])}</p>']
    if c["differs"]:
        parts.append(f'<p class="soft">Differs from the report\'s experiment: {e(c["differs"])}</p>')
    if not c.get("values"):
        return "".join(parts) + f'<p class="soft">Registered at {c["at"]}; no seed is finished.</p>'
    first, seeds = c["contrasts"][0], len(c["seeds_done"])
    rows = "".join(f"<tr><td>{e(arm)}</td><td>{e(name)}</td><td>{e(values)}</td></tr>" for arm, name, values in
                   table_rows(c))
    return "".join(parts) + (
        f'<p class="v {STATES.get(c["verdict"], "open")}">{e(c["verdict"])}</p>'
        f'<p>{e(first["says"])}: {e(in_words(first, seeds))}. {e(c.get("remark", ""))}</p>{plot(c)}'
        f'<details><summary>Numbers per arm and seed</summary><div class="wide"><table><tr><th>arm</th>'
        f'<th>measured</th><th>mean (per seed)</th></tr>{rows}</table></div></details>'
        f'<p class="soft"><code>make paper CLAIM={c["key"]}</code>; seeds {", ".join(map(str, c["seeds_done"]))}; '
        f'{c["hours"]} processor hours; registered at {c["at"]}, run at {", ".join(c["commits"])}.</p>')


def viewer(path: Path) -> str:
    """Answers of a run, problem by problem."""
    if not path.is_file():
        return ""
    data, e = json.loads(path.read_text(encoding="utf-8")), html.escape
    parts = ['<h2 id="answers">Answers along an RL run</h2><p class="soft">Held-out problems, one answer each at the '
             f'start and at the checkpoints of {e(data["run"])}, temperature {data["temperature"]}, reward: '
             f'{e(data["scheme"])}.</p><input type="radio" name="c" id="p" checked><label for="p">colour: how unlikely '
             'each token was</label><input type="radio" name="c" id="d"><label for="d">colour: which MTP layer drafted '
             'it (<span style="color:var(--l1)">1</span> <span style="color:var(--l2)">2</span> '
             '<span style="color:var(--l3)">3</span>, plain: the trunk)</label><div class="answers">']
    for p in data["problems"]:
        rewards = " → ".join(f"{a['reward']:.2f}" for a in p["answers"])
        parts.append(f'<details><summary>{e(p["question"])} <span class="soft">reward {rewards}</span></summary>'
                     f'<p class="soft">A right answer: <code>{e(p["solution"])}</code></p>')
        for a in p["answers"]:
            tokens = "".join(f'<span class="t l{k}" style="--p:{prob}" title="{prob:.3f}">{e(text)}</span>'
                             for text, prob, k in a["tokens"])
            parts.append(f'<b>Iteration {a["step"]}</b>, reward {a["reward"]:.2f}<pre>{tokens}</pre>')
            if p["tests"] and len(a["verdicts"]) == len(p["tests"]):
                rows = "".join(f'<tr><td>{e(t["input"])}</td><td>{e(t["expected"])}</td><td>{t["difficulty"]}</td>'
                               f'<td>{v}</td></tr>' for t, v in zip(p["tests"], a["verdicts"], strict=True))
                parts.append('<details><summary class="soft">tests</summary><div class="wide"><table><tr><th>input</th>'
                             f'<th>expected</th><th>level</th><th>verdict</th></tr>{rows}</table></div></details>')
            else:
                parts.append(f'<p class="soft">{e(", ".join(a["verdicts"]))}</p>')
        parts.append("</details>")
    return "".join(parts) + "</div>"


def page(claims: list[dict], answers: Path) -> str:
    e = html.escape
    rows = "".join(f'<tr><td><a href="#{c["key"]}">{e(c["key"])}</a></td><td>{e(c["section"])}</td>'
                   f'<td class="v {STATES.get(c.get("verdict"), "open")}">{e(c.get("verdict", "registered"))}</td>'
                   "</tr>" for c in claims)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>The report's claims on a laptop</title>
<style>{STYLE}</style></head><body><h1>The report's claims, put to the test on a laptop</h1>
<p>The recipe of MiMo-7B (arXiv 2505.07608) with 1.3 million parameters. Test problems come from seeds that nobody
looked at; each claim was registered before its first run. A verdict needs a 95% interval and every seed on one side of
0; otherwise it cannot be told at this size.</p>
<div class="wide"><table><tr><th>claim</th><th>report</th><th>verdict</th></tr>{rows}</table></div>
{"".join(map(section, claims))}{viewer(answers)}</body></html>
"""


def main(cfg: Config) -> None:
    folder = Path(cfg.results)
    claims = load(folder)
    for name, text in (("README.md", markdown(claims)), ("claims.html", page(claims, folder / "transcripts.json"))):
        with whole_file(configurator.writable(folder / name)) as f:
            f.write(text)
    print(f"{len(claims)} claims in {folder}/README.md and {folder}/claims.html")


if __name__ == "__main__":
    configurator.run(main, Config)
