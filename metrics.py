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


class SpikeGuard:
    """
    Opt-in: skip(norm) is True when a gradient norm exceeds `factor` times its running mean (0.98 old + 0.02 new, over
    the steps that were not skipped; never in the first `warm` steps). The caller then leaves out optimizer.step() and
    logs skipped=True. The report does not mention spikes; large runs skip a step rather than restart.
    """
    def __init__(self, factor: float = 0.0, warm: int = 20):
        self.factor, self.warm, self.mean, self.n, self.skipped = factor, warm, 0.0, 0, 0

    def skip(self, norm: float) -> bool:
        if self.factor and self.n >= self.warm and norm > self.factor * self.mean:
            self.skipped += 1
            return True
        keep = min(0.98, self.n / (self.n + 1))        # a plain mean until it is longer than 50 steps
        self.mean = keep * self.mean + (1 - keep) * norm
        self.n += 1
        return False

    def state_dict(self) -> dict:
        return {"mean": self.mean, "n": self.n, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        self.mean, self.n, self.skipped = state["mean"], state["n"], state["skipped"]
