"""
The 7B on a CPU: tokens per second in bf16 beside the limit that the memory sets.

    python bench/cpu_memory.py                    # MiMo-7B's shape: 15.2 GB of weights, for a machine with 24 GB
    python bench/cpu_memory.py --layers=8         # a part of it, for less memory
    python bench/cpu_memory.py --shape=tiny       # to see that it runs

Weights are random. A decode step reads every block and lm_head once; bytes / (measured bandwidth) is the least time
that a step can take. The bandwidth is that of a plain copy, bytes read and written, and that of a sum, which only
reads, as a step does; both with the same number of threads. The model's own weights are freed as the engine packs them
(keep_weights=False), so that the peak is one copy of the weights and a layer; the peak is printed.

Run it when nothing else needs the memory. The last line is the share of the read bandwidth; out/bench/cpu_memory.json
has the numbers.
"""
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import checkpoint  # noqa: E402
import configurator  # noqa: E402
import mtp  # noqa: E402
from configurator import UserError  # noqa: E402
from engine import Engine, Request  # noqa: E402
from model import MiMo, ModelConfig  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The command line of bench/cpu_memory.py."""
    shape: Literal["7b", "tiny"] = "7b"   # tiny: to see that it runs
    layers: int = 0                       # trunk blocks; 0 = all of the shape's
    batches: list[int] = (1, 4)           # sequences that are decoded together
    steps: int = 12                       # timed steps of each
    threads: int = 1                      # torch threads; the engine's C code always takes one
    out: str = "out/bench/cpu_memory.json"    # the result

    def __post_init__(self):
        configurator.at_least(self, 1, "steps", "threads")
        configurator.at_least(self, 0, "layers")


@torch.no_grad()
def random_model(shape: ModelConfig) -> MiMo:
    """bf16, one tensor at a time: rows of a small random table, because 7 billion random numbers take minutes."""
    model = mtp.build(shape, "meta").to(torch.bfloat16).requires_grad_(False)
    table = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            value = torch.empty(p.shape, dtype=torch.bfloat16)
            flat = value.view(-1)
            for i in range(0, flat.numel(), len(table)):
                flat[i:i + len(table)] = table[:flat.numel() - i] if p.ndim > 1 else 1.0
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return model


def bandwidth(n_bytes: int) -> dict[str, float]:
    """Bytes per second, the best of five: read and written by a copy, read by a sum."""
    a = torch.ones(n_bytes // 8, dtype=torch.float64)
    b, best = torch.empty_like(a), {"copy": 0.0, "read": 0.0}
    for _ in range(5):
        for name, f, moved in (("copy", lambda: b.copy_(a), 2), ("read", a.sum, 1)):
            start = time.perf_counter()
            f()
            best[name] = max(best[name], moved * n_bytes / (time.perf_counter() - start))
    return best


def available() -> int:
    """Bytes of memory that are free for this process; a large number where Linux does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 60)


def measure(engine: Engine, batch: int, steps: int) -> float:
    """Seconds of a decode step of `batch` sequences, wall time, the median."""
    for i in range(batch):
        engine.add(Request(i, [i + 1, 2, 3, 4, 5, 6, 7, 8], steps + 8, 0.0))
    while len(engine.decoding) < batch:
        engine.step()
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    for i in range(batch):
        engine.abort(i)
    return statistics.median(seconds[1:])


def main(cfg: Config) -> None:
    """Build, pack, decode, compare with the bandwidth."""
    torch.set_num_threads(cfg.threads)
    out, shape = configurator.writable(cfg.out), ModelConfig.mimo_7b() if cfg.shape == "7b" else ModelConfig(n_mtp=0)
    shape = replace(shape, n_layer=cfg.layers or shape.n_layer)
    parts = shape.params_by_part()
    whole, read = 2 * shape.n_params(), 2 * (parts["blocks"] + parts["lm_head"])
    need = whole + 4 * parts["lm_head"] + (1 << 30)                 # lm_head stands there twice while it is packed
    if need > available():
        raise UserError(f"{shape.n_layer} layers need {need / 1e9:.1f} GB of memory, {available() / 1e9:.1f} GB are "
                        "free: give fewer --layers")
    speed = bandwidth(min(1 << 30, whole))
    print(f"{shape.n_params() / 1e9:.2f}B parameters, {whole / 1e9:.2f} GB in bf16, {read / 1e9:.2f} GB read in a "
          f"step; one thread copies {speed['copy'] / 1e9:.1f} GB/s and reads {speed['read'] / 1e9:.1f} GB/s")
    start = time.perf_counter()
    model = random_model(shape)
    engine = Engine(model, max(cfg.batches), cfg.steps + 64, keep_weights=False)
    engine.add(Request("pack", [1, 2], 1, 0.0))
    while engine.in_flight:
        engine.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"built and packed in {time.perf_counter() - start:.0f} s; peak of memory {peak / 1e9:.2f} GB, "
          f"{peak / whole:.2f} of the weights")
    rows = []
    for batch in cfg.batches:
        seconds = measure(engine, batch, cfg.steps)
        rows.append({"sequences": batch, "ms_per_step": 1e3 * seconds, "tokens_per_second": batch / seconds,
                     "limit_copy": batch * speed["copy"] / read, "limit_read": batch * speed["read"] / read,
                     "share_of_read": read / seconds / speed["read"]})
        r = rows[-1]
        print(f"  {batch} sequence{'s' * (batch > 1)}: {1e3 * seconds:.1f} ms a step, {r['tokens_per_second']:.2f} "
              f"tokens/s; limit at copy bandwidth {r['limit_copy']:.2f}, at read bandwidth {r['limit_read']:.2f}")
    ratio = rows[0]["share_of_read"]
    out.write_text(json.dumps({
        "ratio": ratio, "rows": rows, "bandwidth": speed, "bytes": whole, "bytes_per_step": read, "peak_bytes": peak,
        "shape": vars(shape), "command": " ".join(["python bench/cpu_memory.py", *sys.argv[1:]]),
        "commit": checkpoint.git_commit(), "torch": torch.__version__, "threads": cfg.threads}, indent=1) + "\n")
    print(out)
    print(f"{shape.n_params() / 1e9:.2f}B in bf16, {cfg.batches[0]} sequence: {rows[0]['tokens_per_second']:.2f} "
          f"tokens/s, {ratio:.0%} of the read bandwidth, peak memory {peak / 1e9:.1f} GB")


if __name__ == "__main__":
    configurator.run(main, Config)
