"""
Measurements that need a GPU. One command checks first, then times, each row beside its target.

    python bench/gpu.py kernels              # an H200; writes results/gpu/kernels.csv and .json (gpu_kernels.py)
    python bench/gpu.py train                # training at the 7B's layer shapes (gpu_train.py)
    python bench/gpu.py decode               # generation at the 7B's shape (gpu_decode.py)
    python bench/gpu.py kernels --dry_run    # any machine: tiny shapes, numbers mean nothing; out/bench/gpu/

All sides of a comparison run in one process on the same tensors. Shares are of ceilings measured in the same
run: a large bf16 matrix product and a large copy. Times are medians over replays of a CUDA graph with a cold L2
cache. Without a GPU the script refuses, unless it is told to dry-run. To expect on an H200: matrix ceiling near
800 TFLOP/s, copy ceiling near 4.28 TB/s. The targets stand in TARGETS, what came out in results/gpu and docs/.

A further part is a further function, imported here under its command's name: part(run) -> None, which calls
run.row(...).
"""
import csv
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_decode import TARGETS as DECODE_TARGETS  # noqa: E402
from gpu_decode import decode  # noqa: E402, F401  (the part `decode`)
from gpu_kernels import TARGETS as KERNEL_TARGETS  # noqa: E402
from gpu_kernels import kernels  # noqa: E402, F401  (the part `kernels`)
from gpu_train import TARGETS as TRAIN_TARGETS  # noqa: E402
from gpu_train import train  # noqa: E402, F401  (the part `train`)

import kernels as K  # noqa: E402
from checkpoint import git_commit  # noqa: E402

TARGETS = KERNEL_TARGETS | TRAIN_TARGETS | DECODE_TARGETS


class Run:
    """Device, ceilings, and the rows measured so far."""
    def __init__(self, dry):
        self.cuda = torch.cuda.is_available() and not dry
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.rows, self.faults, self.matrix, self.copy = [], [], None, None
        if self.cuda:
            torch.cuda.set_stream(torch.cuda.Stream())              # graphs cannot be captured on the default stream
        self.flush = torch.empty(256 << 20 if self.cuda else 16, dtype=torch.int8, device=self.device)

    def ms(self, f, reps=20, graph=True):
        """
        Median milliseconds of f(), L2 cold, after a warm-up that also compiles. f is captured as a CUDA graph, so that
        the host's time to launch it does not count; where it cannot be, its launches do. graph: False for a copy,
        which a graph hands to a slower engine.
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

    def row(self, name, value, unit, ms=None, note=""):
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

    def check(self, name, error):
        self.row(f"check: {name}, worst relative error", error, "")
        if not error <= 1e-2:
            self.faults.append(f"{name}: relative error {error:.1e} over 1e-2")

    def bandwidth(self, name, f, n_bytes):
        """A row in share of the copy ceiling, for work that memory bounds."""
        t = self.ms(f)
        self.row(name, n_bytes / t / 1e6 / self.copy, "share", t, f"{n_bytes / t / 1e6:.0f} GB/s")

    def randn(self, *shape, grad=False, dtype=None):
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype).requires_grad_(grad)


def ceilings(run):
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


def main(argv):
    parts = {name: f for name, f in globals().items() if name in ("kernels", "train", "decode")}
    names, flags = [a for a in argv if not a.startswith("-")], {a for a in argv if a.startswith("-")}
    if len(names) != 1 or names[0] not in parts or flags - {"--dry_run", "--dry_run=True"}:
        raise SystemExit(f"usage: python bench/gpu.py {'|'.join(parts)} [--dry_run]")
    name, dry = names[0], bool(flags)
    if not dry and not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py: no CUDA device; --dry_run runs all of it on the CPU with tiny shapes")
    run = Run(dry)
    commit = os.environ.get("COMMIT") or git_commit()               # COMMIT: where the code came without its .git
    about = dict(command=f"python bench/gpu.py {' '.join(argv)}", commit=commit, dry_run=dry,
                 device=torch.cuda.get_device_name() if run.cuda else "cpu",
                 torch=torch.__version__, triton=getattr(K.triton, "__version__", None),
                 cuda=torch.version.cuda,
                 python=platform.python_version(), seed=0,
                 started=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    print(json.dumps(about))
    start = time.time()
    try:
        ceilings(run)
        parts[name](run)
    finally:                                                         # Ctrl-C keeps what has been measured
        about["seconds"] = round(time.time() - start, 1)
        run.faults += [f"{r['name']} is not finite" for r in run.rows if not math.isfinite(r["value"])]
        aims = [r for r in run.rows if r["met"] is not None]
        about |= dict(faults=run.faults, targets_met=sum(r["met"] for r in aims), targets=len(aims))
        folder = ROOT / ("out/bench/gpu" if dry else "results/gpu")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(about | dict(rows=run.rows), indent=1) + "\n")
        with (folder / f"{name}.csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, list(run.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(run.rows)
        print(f"wrote {folder / name}.json and .csv in {about['seconds']} s")
    print("dry run: every line ran, the numbers mean nothing" if dry else
          f"{about['targets_met']} of {about['targets']} targets met")
    if run.faults:
        raise SystemExit("bench/gpu.py: WRONG:\n  " + "\n  ".join(run.faults))


if __name__ == "__main__":
    main(sys.argv[1:])
