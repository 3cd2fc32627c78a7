"""
Measurements that need a GPU. One command checks first, then times, each row beside its target.

    python bench/gpu.py kernels              # an H200; writes results/gpu/kernels.csv and .json (gpu_kernels.py)
    python bench/gpu.py train                # training at the 7B's layer shapes (gpu_train.py)
    python bench/gpu.py decode               # generation at the 7B's shape (gpu_decode.py)
    python bench/gpu.py kernels --dry_run    # any machine: tiny shapes, numbers mean nothing; out/bench/gpu/

All sides of a comparison run in one process on the same tensors. Shares are of ceilings measured in the same run: a
large bf16 matrix product and a large copy. Times are medians over replays of a CUDA graph with a cold L2 cache. Without
a GPU the script refuses, except with --dry_run. To expect on an H200: matrix ceiling near 800 TFLOP/s, copy ceiling
near 4.28 TB/s. The targets stand in each part's TARGETS, what came out in results/gpu and docs/.

A part is a function part(run: Run) that calls run.row(...) for each measurement; PARTS names them all.
"""
import csv
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import gpu_decode  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_train  # noqa: E402

import configurator  # noqa: E402
import kernels  # noqa: E402
from checkpoint import git_commit  # noqa: E402
from configurator import UserError  # noqa: E402

PARTS = {"kernels": gpu_kernels.kernels, "train": gpu_train.train, "decode": gpu_decode.decode}
TARGETS = gpu_kernels.TARGETS | gpu_train.TARGETS | gpu_decode.TARGETS      # row -> (unit, ">=" or "<=", value)


@dataclass(frozen=True)
class Config:
    part: str = ""                        # kernels, train or decode
    dry_run: bool = False                 # tiny shapes on the CPU: every line runs, the numbers mean nothing

    POSITIONAL = ("part",)

    def __post_init__(self):
        if self.part not in ("", *PARTS):
            raise ValueError(f"part = {self.part!r} should be one of {', '.join(PARTS)}; usage: "
                             f"python bench/gpu.py {'|'.join(PARTS)} [--dry_run]")


class Run:
    """Device, ceilings, and the rows measured so far."""
    def __init__(self, dry: bool):
        self.cuda = torch.cuda.is_available() and not dry
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.rows, self.faults, self.matrix, self.copy = [], [], None, None
        if self.cuda:
            torch.cuda.set_stream(torch.cuda.Stream())              # graphs cannot be captured on the default stream
        self.flush = torch.empty(256 << 20 if self.cuda else 16, dtype=torch.int8, device=self.device)

    def ms(self, f: Callable, reps: int = 20, graph: bool = True) -> float:
        """
        Median milliseconds of f(), L2 cold, after a warm-up that also compiles. f is captured as a CUDA graph, so that
        the host's time to launch it does not count; where that fails, its launches count. graph: False for a copy,
        which a graph gives to a slower engine.
        """
        f()
        if not self.cuda:
            start = time.perf_counter()
            f()
            return (time.perf_counter() - start) * 1e3
        f()
        torch.cuda.synchronize()
        go = f
        try:
            if graph:
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
                    f()
                go = captured.replay
        except RuntimeError as e:
            print(f"    not captured: {str(e).splitlines()[0][:100]}", flush=True)
            torch.cuda.synchronize()
        times = []
        for _ in range(reps):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            go()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)

    def row(self, name: str, value: float, unit: str, ms: float | None = None, note: str = "") -> None:
        """Add a measurement and print it beside its target. ValueError if the target has another unit."""
        unit_wanted, sense, bar = TARGETS.get(name, (unit, "", None))
        if unit_wanted != unit:
            raise ValueError(f"bench/gpu.py: target of '{name}' is in {unit_wanted}, the row in {unit}")
        met = None if bar is None or not self.cuda else (value >= bar if sense == ">=" else value <= bar)
        target = f"{sense} {bar}" if bar is not None else ""
        self.rows.append(dict(name=name, value=round(value, 4), unit=unit, ms=ms and round(ms, 4),
                              target=target, met=met, note=note))
        verdict = f"target {target}" + ("" if met is None else " met" if met else " MISSED") if target else ""
        took = "" if ms is None else f"{ms:9.3f} ms"
        print(f"{name:66} {value:10.4g} {unit:8} {took:12} {verdict} {note}".rstrip(), flush=True)

    def check(self, name: str, error: float) -> None:
        """A row with a relative error against fp64, and a fault where it is over 1e-2."""
        self.row(f"check: {name}, worst relative error", error, "")
        if not error <= 1e-2:
            self.faults.append(f"{name}: relative error {error:.1e} over 1e-2")

    def bandwidth(self, name: str, f: Callable, n_bytes: int) -> None:
        """A row in share of the copy ceiling, for work that memory bounds."""
        t = self.ms(f)
        self.row(name, n_bytes / t / 1e6 / self.copy, "share", t, f"{n_bytes / t / 1e6:.0f} GB/s")

    def randn(self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers on the run's device, by default in its dtype."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype).requires_grad_(grad)


def ceilings(run: Run) -> None:
    """Measure what the device can do at most: run.matrix in TFLOP/s, run.copy in GB/s."""
    n = 8192 if run.cuda else 128
    a, b = run.randn(n, n), run.randn(n, n)
    t = run.ms(lambda: a @ b)
    run.matrix = 2 * n**3 / t / 1e9
    run.row("ceiling: matrix product", run.matrix, "TFLOP/s", t, f"{n}^3")
    source = torch.empty((4 << 30) if run.cuda else (1 << 20), dtype=torch.int8, device=run.device)
    target = torch.empty_like(source)
    t = run.ms(lambda: target.copy_(source), graph=False)
    run.copy = 2 * source.numel() / t / 1e6
    run.row("ceiling: copy", run.copy, "GB/s", t, "read plus written bytes")
    if run.cuda:
        del a, b, source, target
        torch.cuda.empty_cache()                                     # the parts want the whole card


def main(cfg: Config) -> None:
    if not cfg.dry_run and not torch.cuda.is_available():
        raise UserError("bench/gpu.py: no CUDA device; --dry_run runs all of it on the CPU with tiny shapes")
    run = Run(cfg.dry_run)
    commit = os.environ.get("COMMIT") or git_commit()               # COMMIT: where the code came without its .git
    about = dict(command=f"python bench/gpu.py {cfg.part}{' --dry_run' if cfg.dry_run else ''}", commit=commit,
                 dry_run=cfg.dry_run, device=torch.cuda.get_device_name() if run.cuda else "cpu",
                 torch=torch.__version__, triton=getattr(kernels.triton, "__version__", None),
                 cuda=torch.version.cuda, python=platform.python_version(), seed=0,
                 started=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    print(json.dumps(about))
    start = time.time()
    try:
        ceilings(run)
        PARTS[cfg.part](run)
    finally:                                                        # Ctrl-C keeps what has been measured
        about["seconds"] = round(time.time() - start, 1)
        run.faults += [f"{r['name']} is not finite" for r in run.rows if not math.isfinite(r["value"])]
        aims = [r for r in run.rows if r["met"] is not None]
        about |= dict(faults=run.faults, targets_met=sum(r["met"] for r in aims), targets=len(aims))
        folder = ROOT / ("out/bench/gpu" if cfg.dry_run else "results/gpu")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{cfg.part}.json").write_text(json.dumps(about | dict(rows=run.rows), indent=1) + "\n")
        with (folder / f"{cfg.part}.csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, list(run.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(run.rows)
        print(f"wrote {folder / cfg.part}.json and .csv in {about['seconds']} s")
    print("dry run: every line ran, the numbers mean nothing" if cfg.dry_run else
          f"{about['targets_met']} of {about['targets']} targets met")
    if run.faults:
        raise UserError(f"bench/gpu.py: wrong results: {'; '.join(run.faults)}")


if __name__ == "__main__":
    configurator.run(main, Config)
