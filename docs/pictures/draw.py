"""
The diagrams of the tutorial, drawn with matplotlib alone; every number in them comes from the project's own code.

    python docs/pictures/draw.py                   # ten seconds; writes docs/pictures/*.png
    python docs/pictures/draw.py --only=packing    # one of them

    schedule.png      learning rate, batch and MTP weight of the 7B run over tokens       page 1
    model.png         a token's way through trunk and MTP layers                          page 2
    speculation.png   draft, verify, accept and commit in time                            page 3
    packing.png       samples in rows, the loss mask, who attends to whom                 page 5
    judge.png         what enters the sandbox and what leaves it                          page 6
    rl_threads.png    rollout thread, judge and trainer on one time axis                  page 8
    tokenizer.png     text, pieces, ids; the chat template with its loss mask             page 10
    checkpoint.png    how a checkpoint is written, and what a kill leaves                 page 11
    fsdp.png          which rank holds which shard, and when a block is gathered          page 12

One unit of every diagram is one inch, so that sizes in the code are sizes on paper.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Rectangle  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import configurator  # noqa: E402
from configurator import UserError  # noqa: E402
from data.pack import best_fit  # noqa: E402
from schedule import batch_size_at, breakpoints, lr_at, mtp_weight_at, total_tokens  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

INK, GREY, LINE = "#222222", "#6b7280", "#c9ced6"
BLUE, RED, GREEN, PURPLE, GOLD = "#1b6ca8", "#c8553d", "#4f8a3c", "#7c55c4", "#c48a0a"
PALE = {BLUE: "#dcebf6", RED: "#f9e1db", GREEN: "#e2f0db", PURPLE: "#ebe3f8", GOLD: "#fbefcf", GREY: "#eef0f3"}
plt.rcParams.update({"font.size": 12, "font.family": "DejaVu Sans", "figure.facecolor": "white", "text.color": INK,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK})


@dataclass(frozen=True)
class Config:
    only: str = ""        # name of one picture without .png; "" = all


# ---- shapes ---------------------------------------------------------------------------------------------------------

def canvas(width: float, height: float) -> tuple[Figure, plt.Axes]:
    """An empty drawing of width x height inches, (0, 0) at its lower left corner."""
    fig = plt.figure(figsize=(width, height))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return fig, ax


def box(ax: plt.Axes, x: float, y: float, w: float, h: float, text: str = "", colour: str = GREY, *, size: float = 12,
        strong: bool = False, dashed: bool = False, weight: str = "normal") -> None:
    """A rounded box with its lower left corner at (x, y). strong: filled with the colour itself, white text."""
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06", lw=1.4, edgecolor=colour,
                                facecolor=colour if strong else PALE[colour], linestyle="--" if dashed else "-"))
    write(ax, x + w / 2, y + h / 2, text, size, "white" if strong else INK, "center", weight)


def arrow(ax: plt.Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, text: str = "", *,
          at: tuple[float, float] = (0, 0), size: float = 11, style: str = "-|>", bend: float = 0, lw: float = 1.6,
          ha: str = "center") -> None:
    """An arrow, with a text beside its middle, moved by `at`."""
    ax.annotate("", end, start, arrowprops=dict(arrowstyle=style, color=colour, lw=lw, shrinkA=0, shrinkB=0,
                                                mutation_scale=14, connectionstyle=f"arc3,rad={bend}"))
    if text:
        ax.text((start[0] + end[0]) / 2 + at[0], (start[1] + end[1]) / 2 + at[1], text, ha=ha, va="center",
                fontsize=size, color=colour, linespacing=1.3)


def write(ax: plt.Axes, x: float, y: float, text: str, size: float = 12, colour: str = INK, ha: str = "left",
          weight: str = "normal", **more) -> None:
    """Text beside (x, y). A single line stands on a baseline that does not depend on its letters."""
    lines = "\n" in text or "rotation" in more
    ax.text(x, y if lines else y - 0.35 * size / 72, text, fontsize=size, color=colour, ha=ha, weight=weight,
            va="center" if lines else "baseline", linespacing=1.35, **more)


# ---- page 1 ---------------------------------------------------------------------------------------------------------

def schedule() -> Figure:
    """The report's section 2.3 as curves: config/mimo_7b.py through schedule.py."""
    stages = configurator.read_file(str(HERE.parents[1] / "config/mimo_7b.py"))["stages"]
    total = total_tokens(stages)
    edges = {t + d for t, _ in breakpoints(stages)[:-1] for d in (0, 1)}
    seen = sorted({total * i / 4000 for i in range(4000)} | edges)
    x = [t / 1e12 for t in seen]
    fig, axes = plt.subplots(3, 1, figsize=(10, 6.8), sharex=True, gridspec_kw={"height_ratios": [1.5, 1, 1]})
    rows = [("learning rate,\n1e-4", lambda t: lr_at(stages, t) * 1e4, BLUE, 1.45),
            ("batch,\nsequences", lambda t: batch_size_at(stages, t), GREEN, 3300),
            ("MTP weight", lambda t: mtp_weight_at(stages, t), RED, 0.42)]
    for ax, (name, law, colour, top) in zip(axes, rows, strict=True):
        ax.plot(x, [law(t) for t in seen], color=colour, lw=2.6, solid_capstyle="round")
        ax.set(ylim=(0, top), xlim=(0, total / 1e12))
        ax.set_ylabel(name, rotation=0, ha="right", va="center", color=colour, labelpad=12)
        start = 0.0
        for i, s in enumerate(stages):
            ax.axvspan(start, start + s.tokens / 1e12, color="#eef3f8" if i % 2 == 0 else "#f8f8f8", lw=0, zorder=0)
            start += s.tokens / 1e12
        ax.tick_params(labelsize=11)
    start = 0.0
    for s in stages:
        word = "context " if s.tokens > 5e12 else ""
        axes[0].text(start + s.tokens / 2e12, 1.04, f"{s.name}\n{s.tokens / 1e12:.3g}T\n{word}{s.seq_len:,}",
                     transform=axes[0].get_xaxis_transform(), ha="center", va="bottom", fontsize=11.5, color="#333344")
        start += s.tokens / 1e12
    note = dict(fontsize=11.5, color=GREY, va="center")
    axes[0].text(0.35, 1.25, "warm-up over the first 84B tokens", **note)
    axes[0].text(4.2, 0.86, "constant 1.07e-4", ha="center", **note)
    axes[0].text(11.0, 0.52, "cosine to 3e-5", ha="center", **note)
    axes[0].text(20.6, 0.55, "3e-5", ha="center", **note)
    axes[0].text(23.6, 0.55, "to 1e-5", ha="right", **note)
    axes[1].text(0.6, 2050, "160 to 2,560 over 168B tokens", **note)
    axes[1].text(21.5, 900, "640 rows, four times as long", ha="right", **note)
    axes[2].text(5.1, 0.2, "0.3 until 10.3T", ha="center", **note)
    axes[2].text(14, 0.2, "then 0.1", ha="center", **note)
    axes[2].set_xlabel("tokens seen, trillions")
    fig.subplots_adjust(left=0.2, right=0.98, top=0.87, bottom=0.09, hspace=0.12)
    fig.align_ylabels(axes)
    return fig


# ---- page 2 ---------------------------------------------------------------------------------------------------------

def model() -> Figure:
    """ids -> embedding -> blocks -> h -> norm -> lm_head; the MTP layers read h."""
    fig, ax = canvas(10, 6.7)
    y, h = 5.35, 0.72
    parts = [(0.15, 1.0, "ids\n[B,T]", GREY), (1.55, 1.5, "embed_tokens\n[B,T,D]", BLUE), (3.45, 0.95, "block 1", BLUE),
             (4.95, 0.95, "block 36", BLUE), (6.3, 0.8, "h\n[B,T,D]", GOLD), (7.45, 0.75, "norm", BLUE),
             (8.55, 1.3, "lm_head\n[B,T,V]", BLUE)]
    for x, w, text, colour in parts:
        box(ax, x, y, w, h, text, colour, strong=colour == GOLD, size=11.5)
    for (x, w, *_), (x2, *_) in zip(parts, parts[1:], strict=False):
        if text_dots := (x == 3.45):
            write(ax, 4.675, y + h / 2, "...", 18, BLUE, "center", weight="bold")
        if not text_dots:
            arrow(ax, (x + w, y + h / 2), (x2, y + h / 2))
    write(ax, 0.15, 6.4, "The trunk: a token's way from its number to the next one", 13.5, weight="bold")
    write(ax, 9.2, y - 0.2, "logits of $x_{i+1}$", 11.5, BLUE, "center")

    # inside one block
    box(ax, 0.15, 0.2, 3.95, 4.6, colour=GREY)
    write(ax, 0.35, 4.5, "inside a block, x is [B,T,D]", 12, weight="bold")
    stream = 0.62
    arrow(ax, (stream, 4.25), (stream, 0.35), INK, lw=2.4)
    write(ax, 0.36, 2.3, "x, the residual stream", 10.5, GREY, "center", rotation=90)
    for top, names in ((4.05, ("norm", "attention", "H queries share\nK key/value heads")),
                       (2.15, ("norm", "SwiGLU", "D to F and back"))):
        arrow(ax, (stream, top - 0.27), (1.1, top - 0.27), BLUE)
        box(ax, 1.1, top - 0.5, 0.95, 0.46, names[0], BLUE, size=11.5)
        arrow(ax, (2.05, top - 0.27), (2.4, top - 0.27), BLUE)
        box(ax, 2.4, top - 0.5, 1.45, 0.46, names[1], BLUE, size=11.5)
        write(ax, 3.12, top - 0.81, names[2], 10.5, GREY, "center")
        arrow(ax, (3.12, top - 1.08), (3.12, top - 1.32), BLUE, style="-")
        arrow(ax, (3.12, top - 1.32), (stream + 0.13, top - 1.32), BLUE)
        ax.text(stream, top - 1.32, "+", ha="center", va="center", fontsize=13, weight="bold", color=BLUE,
                bbox=dict(boxstyle="circle,pad=0.12", fc="white", ec=BLUE, lw=1.5))
    ax.plot([3.55, 3.9], [y, 4.8], color=LINE, lw=1.2, ls="--")

    # the MTP layers
    write(ax, 4.75, 4.18, "MTP layers: each reads the SAME h,", 12, weight="bold")
    write(ax, 4.75, 3.9, "from before the final norm", 12, weight="bold")
    rows = [2.7, 1.65, 0.6]
    ax.plot([6.7, 6.7, 4.5, 4.5], [y, 4.6, 4.6, rows[-1] + 0.2], color=GOLD, lw=2.4, solid_joinstyle="round")
    write(ax, 5.6, 4.78, "h", 13, GOLD, weight="bold")
    for k, (bottom, colour) in enumerate(zip(rows, (GREEN, BLUE, PURPLE), strict=True)):
        box(ax, 4.75, bottom + 0.42, 1.3, 0.42, f"emb($x_{{i+{k + 1}}}$)", GREY, size=12)
        arrow(ax, (6.05, bottom + 0.63), (6.45, bottom + 0.63), INK)
        arrow(ax, (4.5, bottom + 0.2), (6.45, bottom + 0.2), GOLD, lw=2.4)
        box(ax, 6.45, bottom, 2.0, 0.84, f"MTP layer {k + 1}\nits own final norm", colour, size=11.5)
        arrow(ax, (8.45, bottom + 0.42), (8.85, bottom + 0.42), colour)
        write(ax, 8.95, bottom + 0.58, "lm_head", 10.5, GREY)
        write(ax, 8.95, bottom + 0.28, f"$x_{{i+{k + 2}}}$", 13.5, colour)
    write(ax, 4.45, 0.22, "parallel, not a chain; embedding and lm_head are the trunk's", 11, GREY)
    return fig


# ---- page 3 ---------------------------------------------------------------------------------------------------------

def speculation() -> Figure:
    """Two decode steps with three drafts: 7 tokens for two forwards of the trunk."""
    fig, ax = canvas(10, 7.75)
    left, cell, pitch, colours = 2.55, 0.56, 0.66, (GREEN, BLUE, PURPLE)
    text = ["7", "+", "2", "=", "9", "⏎", "9", "-", "6", "=", "3"]
    at = lambda i: left + pitch * i

    def token(i: int, y: float, t: str, colour: str = GREY, strong: bool = False, dashed: bool = False):
        box(ax, at(i), y, cell, 0.44, t, colour, size=13, strong=strong, dashed=dashed)

    def step(top: float, n: int, title: str, drafts: list[str], truth: list[str], verdict: str, done: str):
        """n: number of committed tokens. Columns are places in the text; the trunk's forward reads n-1 .. n+2."""
        write(ax, 0.2, top, title, 13, weight="bold")
        y = top - 0.68
        write(ax, 0.2, y + 0.22, "committed so far", 11.5, GREY)
        for i in range(max(0, n - 4), n):
            token(i, y, text[i])
        y -= 0.62
        write(ax, 0.2, y + 0.22, "draft 3, from one h", 11.5)
        for k, d in enumerate(drafts):
            token(n + k, y, d, colours[k], dashed=True)
            write(ax, at(n + k) + cell / 2, y + 0.56, f"layer {k + 1}", 9.5, colours[k], "center")
        y -= 0.66
        write(ax, 0.2, y + 0.22, "verify 4, ONE forward", 11.5)
        token(n - 1, y, text[n - 1])
        for k, d in enumerate(drafts):
            token(n + k, y, d, colours[k], dashed=True)
        ax.add_patch(Rectangle((at(n - 1) - 0.07, y - 0.07), 4 * pitch + 0.04, 0.58, fill=False, ec=INK, lw=1.6))
        y -= 0.7
        write(ax, 0.2, y + 0.22, "the trunk's own tokens", 11.5)
        right = next((k for k, d in enumerate(drafts) if d != truth[k]), 3)
        for k, t in enumerate(truth):
            if k <= right:
                token(n + k, y, t, GOLD)
                arrow(ax, (at(n + k - 1) + cell / 2, y + 0.63), (at(n + k) + 0.2, y + 0.45), GREY, lw=1.1)
            else:
                token(n + k, y, "?", GREY, dashed=True)
            if k < 3 and k <= right:
                good = drafts[k] == t
                write(ax, at(n + k) + cell / 2, y - 0.15, "same" if good else "differs", 10,
                      GREEN if good else RED, "center", weight="bold")
        write(ax, at(n + 4) + 0.1, y + 0.22, verdict, 10.5, GREY)
        y -= 0.75
        write(ax, 0.2, y + 0.22, done, 12, GOLD, weight="bold")
        for k in range(right + 1):
            token(n + k, y, truth[k], GOLD, strong=True)
        return y

    y = step(7.5, 4, "step t", ["9", "⏎", "8"], ["9", "⏎", "9", "?"], "unused: it read a wrong 8",
             "accept 2, commit 3")
    ax.plot([0.2, 9.8], [y - 0.17, y - 0.17], color=LINE, lw=1.2)
    step(y - 0.42, 7, "step t+1", ["-", "6", "="], ["-", "6", "=", "3"], "", "accept 3, commit 4")
    return fig


# ---- page 5 ---------------------------------------------------------------------------------------------------------

def packing() -> Figure:
    """The example of data/pack.py:best_fit, T = 10, with each sample's question and answer told apart."""
    lengths, questions, T = [6, 5, 4, 3, 2, 12], [3, 2, 2, 1, 1, 5], 10
    rows, dropped = best_fit(lengths, T)
    colours = [BLUE, GREEN, PURPLE, RED, GOLD, GREY]
    fig, ax = canvas(10, 5.6)
    s = 0.4

    def sample(i: int, x: float, y: float, ghost: bool = False):
        for j in range(lengths[i]):
            answer = j >= questions[i]
            colour = colours[i]
            ax.add_patch(Rectangle((x + s * j, y), s - 0.04, 0.4, lw=1.2, ec=colour, ls="--" if ghost else "-",
                                   fc=colour if answer and not ghost else PALE[colour] if not ghost else "white"))
            write(ax, x + s * j + s / 2 - 0.02, y + 0.2, "1" if answer else "0", 10.5,
                  "white" if answer and not ghost else GREY, "center")

    write(ax, 0.2, 5.3, "samples, 6 5 4 3 2 12 tokens", 13, weight="bold")
    for i in range(6):
        y = 4.75 - 0.5 * i
        write(ax, 0.2, y + 0.2, f"{i}", 12, colours[i], weight="bold")
        sample(i, 0.5, y, ghost=i in dropped)
        if i in dropped:
            write(ax, 0.5, y - 0.17, "longer than a row: dropped and counted, never cut", 10.5, GREY)
    write(ax, 0.2, 1.62, f"rows of T = {T}, best fit, longest first", 13, weight="bold")
    for r, row in enumerate(rows):
        x, y = 0.5, 1.02 - 0.55 * r
        for i in row:
            sample(i, x, y)
            x += s * lengths[i]
        write(ax, 0.2, y + 0.2, str(r + 1), 12, GREY, weight="bold")
        write(ax, x + 0.08, y + 0.2, "full", 10.5, GREY)
    write(ax, 0.5, 0.17, "dark, 1: trained on (answer and <|im_end|>)    pale, 0: read only", 11, GREY)

    write(ax, 6.15, 5.3, "who attends to whom in row 1", 13, weight="bold")
    owner = [i for i in rows[0] for _ in range(lengths[i])]
    c, x0, y0 = 0.33, 6.3, 1.35
    for q in range(T):
        for k in range(T):
            sees = owner[q] == owner[k] and k <= q
            ax.add_patch(Rectangle((x0 + c * k, y0 + c * (T - 1 - q)), c - 0.03, c - 0.03, lw=0,
                                   fc=colours[owner[q]] if sees else "#f1f2f4"))
    write(ax, x0 + c * T / 2, y0 - 0.22, "key position in the row", 11, GREY, "center")
    write(ax, x0 - 0.2, y0 + c * T / 2, "query", 11, GREY, "center", rotation=90)
    write(ax, 6.15, y0 + c * T + 0.27, "itself and the past of its own sample, no more", 11, GREY)
    write(ax, x0 - 0.15, 0.6, "positions  " + " ".join(str(p) for i in rows[0] for p in range(lengths[i])), 11.5)
    write(ax, x0 - 0.15, 0.3, "restart with each sample", 11, GREY)
    return fig


# ---- page 6 ---------------------------------------------------------------------------------------------------------

def judge() -> Figure:
    """One program on its way through the judge."""
    fig, ax = canvas(10, 5.0)
    corners = [(0.15, 4.8), (3.45, 4.8), (3.45, 1.55), (9.85, 1.55), (9.85, 0.2), (0.15, 0.2)]
    ax.add_patch(plt.Polygon(corners, lw=1.6, ec=BLUE, fc="#f0f6fb", joinstyle="round"))
    write(ax, 0.35, 4.5, "our process, trusted", 12.5, BLUE, weight="bold")
    box(ax, 0.4, 3.3, 2.8, 0.85, "the answer's program\ndef f(xs): return sum(xs)", GREY, size=11)
    box(ax, 0.4, 2.25, 2.8, 0.8, "test inputs\n[[1,2]]   [[]]   [[5,5]]", GREY, size=11)
    box(ax, 0.4, 1.2, 2.8, 0.8, "expected outputs\n3   0   25", GOLD, strong=True, size=11)
    write(ax, 0.4, 0.63, "never leave this process:\na program cannot read them", 11, GOLD, weight="bold")

    ax.add_patch(Rectangle((4.7, 2.05), 2.55, 2.75, lw=3.5, ec=RED, fc=PALE[RED]))
    write(ax, 4.87, 4.5, "the box, hostile", 12.5, RED, weight="bold")
    for k, line in enumerate(("one process per program", "no network, no user,", "read-only system", "few system calls",
                              "limits: time, memory,", "output, processes")):
        write(ax, 4.87, 4.08 - 0.345 * k, line, 11.5)
    arrow(ax, (3.2, 3.72), (4.7, 3.72), RED, "program", at=(0.1, 0.2))
    arrow(ax, (3.2, 2.65), (4.7, 2.65), RED, "inputs", at=(0.1, 0.2))

    box(ax, 4.5, 0.4, 1.8, 0.8, "compare bytes", BLUE, size=11.5)
    arrow(ax, (5.4, 2.05), (5.4, 1.2), RED, "bytes out", at=(0.55, 0.17))
    arrow(ax, (3.2, 1.4), (4.5, 0.9), GOLD)
    box(ax, 6.85, 0.4, 1.2, 0.8, "verdicts\nAC AC WA", GREEN, size=11.5)
    arrow(ax, (6.3, 0.8), (6.85, 0.8), BLUE)
    arrow(ax, (8.05, 0.8), (8.45, 0.8), GREEN)
    box(ax, 8.45, 0.4, 1.2, 0.8, "reward\nin [0, 1]", GREEN, strong=True, size=11.5)

    write(ax, 7.55, 4.5, "one verdict per test", 12.5, weight="bold")
    rows = (("AC", "accepted"), ("WA", "wrong answer"), ("TLE", "time limit"), ("MLE", "memory limit"),
            ("OLE", "output limit"), ("RE", "run-time error"), ("JE", "the judge failed"))
    for k, (short, long) in enumerate(rows):
        write(ax, 7.55, 4.1 - 0.34 * k, short, 11.5, GREEN if short == "AC" else RED, weight="bold")
        write(ax, 8.2, 4.1 - 0.34 * k, long, 11.5)
    return fig


# ---- page 8 ---------------------------------------------------------------------------------------------------------

def rl_threads() -> Figure:
    """One RL iteration and the start of the next: engine slots, judge workers, trainer. An invented timing."""
    fig, ax = canvas(10, 6.1)
    x0, unit = 1.75, 0.5                                   # 16 units of time
    at = lambda t: x0 + unit * t

    def bar(y: float, start: float, end: float, text: str, colour: str, h: float = 0.34, strong: bool = True):
        ax.add_patch(FancyBboxPatch((at(start) + 0.02, y), unit * (end - start) - 0.04, h, lw=1.2, ec=colour,
                                    boxstyle="round,pad=0,rounding_size=0.04", fc=colour if strong else PALE[colour]))
        write(ax, at(start) + unit * (end - start) / 2, y + h / 2, text, 11, "white" if strong else INK, "center")

    lanes = [(3.5, 2.25, "rollout thread:\nengine, 5 slots", BLUE), (1.85, 1.15, "judge:\n2 workers", RED),
             (0.85, 0.75, "trainer:\nmain thread", GREEN)]
    for y, h, name, colour in lanes:
        ax.add_patch(Rectangle((x0 - 0.02, y), unit * 16.1, h, lw=0, fc="#f6f7f9"))
        write(ax, 0.12, y + h / 2, name, 11.5, colour, weight="bold")
    slots = [[(0, 4, "1", GREEN), (4, 6.4, "5", GREY), (6.4, 10.1, "6 aborted", RED), (12.2, 16, "1", BLUE)],
             [(0, 3, "1", GREEN), (3, 7.5, "4", GREEN), (12.2, 15, "1", BLUE)],
             [(0, 2, "2", GREY), (2, 9.5, "3", GREEN), (12.2, 14.2, "2", BLUE), (14.2, 16, "3", BLUE)],
             [(0, 2.6, "2", GREY), (2.6, 6, "4", GREEN), (6, 10.1, "6 aborted", RED), (12.2, 16, "2", BLUE)],
             [(0, 5.5, "3", GREEN), (5.5, 8.6, "5", GREY), (12.2, 16, "3", BLUE)]]
    for k, slot in enumerate(slots):
        for start, end, name, colour in slot:
            bar(5.32 - 0.42 * k, start, end, name, colour, strong=colour != RED)
    write(ax, at(0), 5.9, "each bar is one answer, the number is its group; G = 2 answers per group", 11, GREY)
    grades = [[(2, 2.6, "2", GREY), (3, 4.1, "1", GREEN), (5.5, 6.3, "3", GREEN), (6.4, 7.0, "5", GREY),
               (8.6, 9.2, "5", GREY), (9.5, 10.1, "3", GREEN)],
              [(2.6, 3.1, "2", GREY), (4, 4.8, "1", GREEN), (6, 7.2, "4", GREEN), (7.5, 8.2, "4", GREEN)]]
    for k, grading in enumerate(grades):
        for start, end, name, colour in grading:
            bar(2.45 - 0.45 * k, start, end, name, colour)
    bar(1.02, 10.1, 12.2, "update", GREEN, 0.42)
    bar(1.02, 0, 10.1, "waits in take()", GREY, 0.42, strong=False)
    bar(1.02, 12.2, 16, "waits", GREY, 0.42, strong=False)
    for t in (10.1, 12.2):
        ax.plot([at(t)] * 2, [0.75, 5.75], color=INK, lw=1.3, ls="--")
    write(ax, at(11.15), 4.62, "the engine\nrests: no\nstaleness", 11, GREY, "center")
    write(ax, at(10.0), 3.25, "batch full: groups 1 3 4", 11, INK, "right", weight="bold")
    arrow(ax, (at(12.2), 1.44), (at(12.2), 3.5), GREEN, lw=2.4)
    write(ax, at(12.3), 3.25, "publish weights", 11, GREEN, weight="bold")
    arrow(ax, (at(5.5), 3.64), (at(5.5), 2.8), GREY, lw=1.2)
    write(ax, at(5.35), 3.25, "submit", 11, GREY, "right")
    write(ax, at(0), 0.5, "green: rewards of the group differ, trained on      grey: all equal, dropped", 11, GREY)
    arrow(ax, (at(0), 0.2), (at(16.1), 0.2), INK, lw=1.2)
    write(ax, at(16.1), 0.37, "time", 11, INK, "right")
    return fig


# ---- page 10 --------------------------------------------------------------------------------------------------------

def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Each token as one can see it: a space as an open box, a newline as an arrow."""
    return [tokenizer.decode([i]).replace(" ", "␣").replace("\n", "⏎") for i in ids]


def tokenizer() -> Figure:
    """The embedded tokenizer of 1,024 ids on one sentence, then on one exchange."""
    tok = Tokenizer.load("tiny")
    fig, ax = canvas(10, 4.95)

    def row(ids: list[int], mask: list[int] | None, y: float, x: float = 0.2, end: float = 9.85) -> float:
        for k, (name, i) in enumerate(zip(pieces(tok, ids), ids, strict=True)):
            control = i in (tok.im_start_id, tok.im_end_id, tok.eos_id)
            w = max(0.46, 0.115 * len(name) + 0.16)
            if x + w > end:
                x, y = 0.2, y - 0.98
            colour = GREEN if mask and mask[k] else GOLD if control else GREY
            box(ax, x, y, w, 0.42, name, colour, size=11.5, strong=bool(mask and mask[k]))
            write(ax, x + w / 2, y - 0.15, str(i), 10.5, GREY, "center")
            x += w + 0.06
        return y

    text = "The total of 17 and 25 is 42."
    write(ax, 0.2, 4.7, f'encode("{text}")', 13, weight="bold")
    row(tok.encode(text), None, 4.07)
    write(ax, 0.2, 3.57, "frequent words are one piece, a space joins the word behind it, each digit stands alone",
          11.5, GREY)
    write(ax, 0.2, 3.06, 'chat([{"role": "user", ...}, {"role": "assistant", ...}])  gives ids and a mask', 13,
          weight="bold")
    ids, mask = tok.chat([{"role": "user", "content": "What is 7+2?"}, {"role": "assistant", "content": "7+2=9"}])
    y = row(ids, mask, 2.43)
    y -= 0.62
    for x, colour, strong, what in ((0.2, GOLD, False, "control id: no text that a user types can become one"),
                                    (5.4, GREEN, True, "mask 1: what the model learns to write")):
        box(ax, x, y - 0.1, 0.3, 0.24, "", colour, strong=strong)
        write(ax, x + 0.42, y + 0.02, what, 11.5)
    write(ax, 0.2, y - 0.45, "The answer's <|im_end|> is trained, so that the model learns to stop; the header and the "
          "last newline are not.", 11.5, GREY)
    return fig


# ---- page 11 --------------------------------------------------------------------------------------------------------

def checkpoint() -> Figure:
    """Four moments of one save, what is on the disk at each, and what a kill leaves."""
    fig, ax = canvas(10, 5.35)
    steps = [("1  write", [("step_400/", BLUE, False), (".writing_500/", GOLD, True)], "step_400",
              "every file goes to a\ntemporary folder and\nis fsynced"),
             ("2  describe", [("step_400/", BLUE, False), (".writing_500/", GOLD, True)], "step_400",
              "manifest.json: size and\nsha256 of every file,\nwritten last"),
             ("3  rename", [("step_400/", BLUE, False), ("step_500/", GREEN, False)], "step_400",
              "one atomic call: the\nfolder is there whole\nor not at all"),
             ("4  point", [("step_400/", BLUE, False), ("step_500/", GREEN, False)], "step_500",
              "latest is replaced by\na rename; only now do\nold folders go")]
    for k, (title, folders, pointer, what) in enumerate(steps):
        x = 0.2 + 2.45 * k
        write(ax, x, 5.05, title, 13.5, weight="bold")
        write(ax, x, 4.43, what, 11, GREY)
        ax.add_patch(Rectangle((x, 1.42), 2.25, 2.4, lw=1.2, ec=LINE, fc="#fafbfc"))
        write(ax, x + 0.12, 3.58, "RUN/", 11.5, GREY)
        for j, (name, colour, dashed) in enumerate(folders):
            box(ax, x + 0.3, 2.92 - 0.55 * j, 1.7, 0.42, name, colour, size=11.5, dashed=dashed)
        if k == 1:
            write(ax, x + 1.15, 2.22, "+ manifest.json", 10, GOLD, "center")
        box(ax, x + 0.3, 1.58, 1.7, 0.42, f"latest: {pointer}", GREY, size=11)
        if k < 3:
            arrow(ax, (x + 2.27, 2.6), (x + 2.43, 2.6), INK)
    write(ax, 0.2, 1.08, "killed here, the run goes on from", 12.5, RED, weight="bold")
    ends = [("step 400", "the next save removes\n.writing_500"), ("step 400", "no rename, no checkpoint"),
            ("step 500", "the newest folder that\npasses its check counts"),
            ("step 500", "an old folder may be left\nfor the next save")]
    for k, (where, why) in enumerate(ends):
        x = 0.2 + 2.45 * k
        write(ax, x, 0.72, where, 12.5, GREEN if where == "step 500" else BLUE, weight="bold")
        write(ax, x, 0.3, why, 10.5, GREY)
    return fig


# ---- page 12 --------------------------------------------------------------------------------------------------------

def fsdp() -> Figure:
    """Who holds which rows between steps, and what one rank has in memory during a step."""
    fig, ax = canvas(10, 6.6)
    ranks, names = (BLUE, GREEN, PURPLE, RED), ("root", "block 1", "block 2", "block 3")
    write(ax, 0.15, 6.25, "between two steps: four ranks, a quarter of every weight each", 13, weight="bold")
    for j, name in enumerate(names):
        y = 5.55 - 0.47 * j
        write(ax, 0.15, y + 0.17, name, 11.5)
        for r, colour in enumerate(ranks):
            box(ax, 1.5 + 1.1 * r, y, 1.02, 0.34, f"rank {r}", colour, strong=True, size=11)
    write(ax, 6.25, 5.0, "fp32 weights, gradients and\nAdam's two moments are cut\nthe same way: 16 bytes per\n"
          "parameter, over 4 ranks", 11.5, GREY)

    write(ax, 0.15, 3.62, "during a step: what rank 0 has in memory", 13, weight="bold")
    moments = ("start", "1\nforward", "2\nforward", "3\nforward", "3\nbackward", "2\nbackward", "1\nbackward",
               "update")
    gathered = {0: range(1, 7), 1: (1, 6), 2: (2, 5), 3: (3, 4)}
    w = 1.02
    for t, moment in enumerate(moments):
        write(ax, 1.5 + w * t + w / 2 - 0.04, 3.18, moment, 10.5, INK, "center")
        for j in range(4):
            x, y = 1.5 + w * t, 2.45 - 0.5 * j
            ax.add_patch(Rectangle((x, y), w - 0.08, 0.38, lw=1.2, ec=LINE, fc="white"))
            if t in gathered[j]:
                ax.add_patch(Rectangle((x, y), w - 0.08, 0.38, lw=1.2, ec=GOLD, fc=PALE[GOLD]))
            ax.add_patch(Rectangle((x, y), (w - 0.08) / 4, 0.38, lw=1.2, ec=BLUE, fc=BLUE))
            if t in ((6,), (6,), (5,), (4,))[j]:
                write(ax, x + 0.6, y + 0.19, "grad", 10.5, RED, "center", weight="bold")
    for j, name in enumerate(names):
        write(ax, 0.15, 2.64 - 0.5 * j, name, 11.5)
    for x, edge, fill, what in ((0.15, BLUE, BLUE, "its own quarter, always"),
                                (2.75, GOLD, PALE[GOLD], "the rest, gathered in bf16, freed")):
        ax.add_patch(Rectangle((x, 0.42), 0.3, 0.24, lw=1.2, ec=edge, fc=fill))
        write(ax, x + 0.42, 0.54, what, 11.5)
    write(ax, 6.5, 0.54, "grad", 10.5, RED, weight="bold")
    write(ax, 7.0, 0.54, "summed, each keeps a quarter", 11.5)
    write(ax, 0.15, 0.17, "root: embed_tokens, norm, lm_head; gathered to the end. MTP layers: until their backward.",
          11, GREY)
    return fig


PICTURES = (schedule, model, speculation, packing, judge, rl_threads, tokenizer, checkpoint, fsdp)


def main(cfg: Config) -> None:
    chosen = [f for f in PICTURES if cfg.only in ("", f.__name__)]
    if not chosen:
        raise UserError(f"only = {cfg.only!r} should be one of {', '.join(f.__name__ for f in PICTURES)}")
    for draw in chosen:
        fig = draw()
        fig.savefig(HERE / f"{draw.__name__}.png", dpi=150, metadata={"Software": None})
        plt.close(fig)
    print(f"{len(chosen)} pictures in {HERE.relative_to(HERE.parents[1])}")


if __name__ == "__main__":
    configurator.run(main, Config)
