"""
What a training run writes down about itself (metrics.jsonl, MFU) and the guards that watch these numbers.

    metrics = Metrics("out/tiny/base", resume_at=step)
    metrics.log(step=step, loss=1.234)            # one line of JSON
    check_finite({"loss": loss}, model, step)     # NaN ends the run before it reaches a checkpoint

Not in the report.
"""
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configurator import UserError
from data.jsonl import whole_file
from distributed import Runtime, all_gather_object, local
from model import ModelConfig, flops_per_token


class Metrics:
    """
    RUN/metrics.jsonl, one line a step.

    resume_at = s drops the lines after step s, which a killed run wrote beyond its last checkpoint, and a half-written
    last line: the file of a resumed run equals that of an uninterrupted one. enabled=False (ranks other than 0) writes
    nothing. Raises UserError when the file cannot be written.
    """
    def __init__(self, run: str | Path, resume_at: int = 0, enabled: bool = True):
        self.path, self.enabled = Path(run) / "metrics.jsonl", enabled
        if not enabled:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = read_rows(self.path) if resume_at else []
            kept = [line for line, row in rows if row.get("step", 0) <= resume_at]
            with whole_file(self.path, "w") as f:
                f.write("".join(kept))
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror or e}") from None

    def log(self, **row) -> None:
        """Numbers, strings, lists and dicts of them. NaN and infinity are written as null: the file stays JSON."""
        if not self.enabled:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(finite(row), allow_nan=False) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror or e}; the last checkpoint is whole") from None


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """(line, parsed) for every whole line of a metrics file; [] when there is none."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else ():
        try:
            rows.append((line, json.loads(line)))
        except ValueError:
            continue
    return [(line, row) for line, row in rows if line.endswith("\n") and isinstance(row, dict)]


def finite(value: Any):
    """value with every NaN and infinity replaced by None, inside lists and dicts too."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- model FLOP utilisation -----------------------------------------------------------------------------------------

PEAK_TFLOPS = {"GB200": 2500.0, "B200": 2250.0, "H200": 989.0, "H100": 989.0, "H800": 989.0, "H20": 148.0,
               "A100": 312.0, "A800": 312.0, "L40S": 362.0, "4090": 165.0, "3090": 71.0}   # dense bf16


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of this GPU in TFLOP/s; None when unknown, and on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def mfu(shape: ModelConfig, seq_len: int, tokens_per_second: float, rt: Runtime) -> float | None:
    """
    Model FLOP utilisation in [0, 1]: the FLOPs that the model needs (recomputation not counted) per second, over the
    peak of the GPUs. tokens_per_second is over all ranks. None where the peak is unknown.
    """
    peak = peak_tflops(rt.device)
    return flops_per_token(shape, seq_len) * tokens_per_second / (rt.world * peak * 1e12) if peak else None


# ---- guards ---------------------------------------------------------------------------------------------------------

def check_finite(values: dict[str, Tensor | float], model: nn.Module | None = None, step: int = 0) -> None:
    """
    Raises UserError when a value is NaN or infinite, naming the first bad weight or gradient of the model. The values
    must be the same on every rank (reduced), so that all ranks end together. The weights on disk stay as they were.
    """
    bad = [k for k, v in values.items() if not bool(torch.isfinite(torch.as_tensor(v)).all())]
    if not bad:
        return
    params = [] if model is None else list(model.named_parameters())
    named = [(f"weight of {name}", p) for name, p in params]     # first: one bad weight spoils every gradient
    named += [(f"gradient of {name}", p.grad) for name, p in params if p.grad is not None]
    first = next((name for name, t in named if not bool(torch.isfinite(local(t.detach())).all())), None)
    first = next(filter(None, all_gather_object(first)), None)
    raise UserError(f"step {step}: {bad[0]} is not finite" + (f"; first bad tensor: {first}" if first else "")
                    + "; the last checkpoint is from before this step")


def check_targets(count: Tensor, step: int, why: str) -> None:
    """Raises UserError when a batch has no target (count 0, over all ranks): its loss would be 0 / 0."""
    if not int(count):
        raise UserError(f"step {step}: no targets in this batch, nothing to learn: {why}")


class SpikeGuard:
    """
    Opt-in: skip(norm) is True when a gradient norm exceeds `factor` times its running mean (0.98 old + 0.02 new; never
    in the first `warm` steps of a stage). The caller then leaves out optimizer.step() and logs skipped=True. The report
    does not mention spikes; large runs skip a step rather than restart.

    A spike is short; a new level that lasts is let through: a skipped norm enters the mean as factor * mean, so that
    the limit rises with each (factor 10: by 18%). UserError when that takes more than `most` skips in a row.
    """
    def __init__(self, factor: float = 0.0, most: int = 20, warm: int = 20):
        self.factor, self.most, self.warm, self.skipped = factor, most, warm, 0
        self.begin_stage()

    def begin_stage(self) -> None:
        """Another mixture, context or set of trained weights has another norm: the mean starts anew."""
        self.mean, self.n, self.in_a_row = 0.0, 0, 0

    def skip(self, norm: float) -> bool:
        limit = self.factor * self.mean
        spike = bool(self.factor) and self.n >= self.warm and norm > limit
        self.in_a_row = self.in_a_row + 1 if spike else 0
        self.skipped += spike
        if self.in_a_row > self.most:
            raise UserError(f"gradient norm {norm:.3g} is above skip_spikes = {self.factor:g} times its running mean, "
                            f"{self.mean:.3g}, for more than max_skips = {self.most} steps in a row: no spike. Lower "
                            "the learning rate, look at the data of these steps, or raise skip_spikes (0 = never skip);"
                            " the last checkpoint is from before this step")
        keep = min(0.98, self.n / (self.n + 1))        # a plain mean until it is longer than 50 steps
        self.mean = keep * self.mean + (1 - keep) * (limit if spike else norm)
        self.n += 1
        return spike

    def state_dict(self) -> dict:
        return {"mean": self.mean, "n": self.n, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.mean, self.n, self.skipped = state["mean"], state["n"], state["skipped"]
        self.in_a_row = state.get("in_a_row", 0)
