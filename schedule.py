"""
The three-stage pre-training schedule as one table and pure functions of the tokens seen (report section 2.3).

A run is a list of `Stage`s. Everything that changes during pre-training is a row of it: learning rate, batch size, MTP
loss weight, context, RoPE base and data mixture. The 7B table (config/mimo_7b.py) and the laptop's (config/tiny.py)
differ in numbers only.

    stage 1   0 -> 1.07e-4 over 84B, constant for 10.2T, cosine to 3e-5 over 7.5T; batch 0 -> 2,560 over 168B;
              MTP 0.3 -> 0.1 at 10.3T
    stage 2   3e-5 for 4T, maths and code at ~70%
    stage 3   3e-5 for 1.5T, cosine to 1e-5 over 0.5T; batch 640, context 32,768, RoPE base 640,000,
              ~10% synthetic reasoning

The stages add up to 23.8T tokens; the report says "approximately 25T". Where the report is silent: the weights inside
a stage's mixture, and the first batch size of the warm-up (we start at 1/16 of the full one).

    python plan.py config/mimo_7b.py --gpus=8       # prints the schedule at each breakpoint
"""
import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """One row of the pre-training table [paper 2.3]. ValueError for values that make no sense together."""
    name: str = "stage"                 # for logs and tables
    tokens: float = 1e6                 # length of the stage, tokens (inputs to the trunk)
    seq_len: int = 256                  # T, context of a row, tokens
    batch_size: int = 16                # rows per optimizer step, over all ranks
    batch_size_start: int = 0           # rows at the stage's start, grows linearly to batch_size; 0 = batch_size
    batch_warmup_tokens: float = 0.0    # over this many tokens
    lr: float = 1e-3                    # plateau learning rate
    lr_start: float = 0.0               # learning rate at the first token when warmup_tokens > 0
    warmup_tokens: float = 0.0          # linear lr_start -> lr
    lr_end: float = 0.0                 # learning rate at the last token when decay_tokens > 0
    decay_tokens: float = 0.0           # the last tokens of the stage, cosine lr -> lr_end
    mtp_weight: float = 0.1             # weight of the MTP loss
    mtp_weight_end: float = 0.1         # from mtp_switch_tokens on
    mtp_switch_tokens: float = 0.0      # tokens into the stage at which it changes; 0 = never
    rope_base: float | None = None      # RoPE base; None = as it is: the model's, or that of the stage before
    mix: dict[str, float] = field(default_factory=lambda: {"web": 1.0})   # source -> share of tokens, normalised
    checkpointing: Literal["none", "selective", "full"] = "none"   # activations computed again in the backward pass:
                                        # less memory, +17% or +33% FLOPs, the same numbers [ours]

    def __post_init__(self):
        if not 1 <= self.tokens < math.inf:
            raise ValueError(f"stage {self.name}: tokens = {self.tokens} must be at least 1")
        for name in ("batch_size_start", "batch_warmup_tokens", "lr", "lr_start", "warmup_tokens", "lr_end",
                     "decay_tokens", "mtp_weight", "mtp_weight_end", "mtp_switch_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"stage {self.name}: {name} = {getattr(self, name)} must be at least 0")
        if self.rope_base is not None and not 0 < self.rope_base < math.inf:
            raise ValueError(f"stage {self.name}: rope_base = {self.rope_base} must be positive")
        if self.seq_len < 2 or self.batch_size < 1:
            raise ValueError(f"stage {self.name}: seq_len = {self.seq_len} and batch_size = {self.batch_size} "
                             "must be at least 2 and 1")
        if self.warmup_tokens + self.decay_tokens > self.tokens:
            raise ValueError(f"stage {self.name}: warmup_tokens + decay_tokens = "
                             f"{self.warmup_tokens + self.decay_tokens:g} exceed tokens = {self.tokens:g}")
        if not self.mix or min(self.mix.values()) < 0 or sum(self.mix.values()) <= 0:
            raise ValueError(f"stage {self.name}: mix = {self.mix} needs weights >= 0 with a positive sum")


def total_tokens(stages: list[Stage]) -> float:
    """Length of the whole run, tokens."""
    return sum(s.tokens for s in stages)


def stage_at(stages: list[Stage], seen: float) -> tuple[int, float]:
    """seen: tokens trained on so far. -> (index of the stage the next step belongs to, tokens into it)."""
    for i, s in enumerate(stages):
        if seen < s.tokens or i == len(stages) - 1:
            return i, seen
        seen -= s.tokens
    raise ValueError("stages is empty: a run needs at least one Stage")


def next_stage(stages: list[Stage], seen: float, at: int) -> int:
    """
    Index of the stage that the next step trains, after steps of stage `at` (-1 = none yet). A step may end beyond its
    stage, but a stage that lies within that step is not passed over: it gets one step.
    """
    return min(stage_at(stages, seen)[0], at + 1)


def lr_at(stages: list[Stage], seen: float) -> float:
    """Learning rate of the step that starts after `seen` tokens [paper 2.3]."""
    i, t = stage_at(stages, seen)
    s = stages[i]
    if t < s.warmup_tokens:
        return s.lr_start + (s.lr - s.lr_start) * t / s.warmup_tokens
    left = s.tokens - t
    if left < s.decay_tokens:                     # lr_end + (lr - lr_end) (1 + cos(pi x)) / 2, x from 0 to 1
        x = min(1.0, 1 - left / s.decay_tokens)
        return s.lr_end + (s.lr - s.lr_end) * 0.5 * (1 + math.cos(math.pi * x))
    return s.lr


def batch_size_at(stages: list[Stage], seen: float) -> int:
    """Rows of the step that starts after `seen` tokens: linear warm-up, then constant [paper 2.3]."""
    i, t = stage_at(stages, seen)
    s = stages[i]
    if t >= s.batch_warmup_tokens:
        return s.batch_size
    start = s.batch_size_start or s.batch_size
    return max(1, round(start + (s.batch_size - start) * t / s.batch_warmup_tokens))


def mtp_weight_at(stages: list[Stage], seen: float) -> float:
    """Weight of the MTP loss: 0.3 for the first 10.3T tokens, then 0.1 [paper 2.3]."""
    i, t = stage_at(stages, seen)
    s = stages[i]
    return s.mtp_weight_end if s.mtp_switch_tokens and t >= s.mtp_switch_tokens else s.mtp_weight


def breakpoints(stages: list[Stage]) -> list[tuple[float, str]]:
    """(tokens seen, what happens there) wherever the schedule changes its law; plan.py prints them."""
    points, start = [], 0.0
    for s in stages:
        base = "as it is" if s.rope_base is None else f"{s.rope_base:,.0f}"
        points.append((start, f"{s.name} starts: context {s.seq_len:,}, RoPE base {base}"))
        if s.warmup_tokens:
            points.append((start + s.warmup_tokens, "learning-rate warm-up ends"))
        if s.batch_warmup_tokens:
            points.append((start + s.batch_warmup_tokens, "batch warm-up ends"))
        if s.mtp_switch_tokens:
            points.append((start + s.mtp_switch_tokens, f"MTP weight -> {s.mtp_weight_end}"))
        if s.decay_tokens:
            points.append((start + s.tokens - s.decay_tokens, "cosine decay starts"))
        start += s.tokens
    points.append((start, "end"))
    return sorted(points, key=lambda p: p[0])
