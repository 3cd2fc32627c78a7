"""
The demo's training step on one CPU thread with the kernels of kernels/train_cpu.c, and with torch's operations in the
place of all or one of them: the plain references, which train without a compiler.

    python -m data.prepare && python bench/train_kernels.py       # a few minutes; a busy machine only makes it noisy

The variants take turns, one step each, on rows of config/tiny.py; ratios are of CPU time, least and median over the
turns. docs/kernels.md, section 9, has our numbers.
"""
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import configurator  # noqa: E402
import distributed  # noqa: E402
import mtp  # noqa: E402
import pretrain  # noqa: E402
from data.loader import MixtureLoader  # noqa: E402
from kernels import attention, cpu, rmsnorm, rope, swiglu  # noqa: E402

KERNELS = {"attention": attention, "SwiGLU": swiglu, "RMSNorm": rmsnorm, "RoPE": rope}
VARIANTS = {"all in C": [], "torch alone": list(KERNELS), **{f"{name} by torch": [name] for name in KERNELS}}


@dataclass(frozen=True)
class Config:
    data: str = "out/tiny/data"           # shards of data/prepare.py
    seq_len: int = 256                    # tokens a row; a step has 2,048 tokens
    turns: int = 15                       # steps of each variant
    out: str = "out/bench/train_kernels.json"

    def __post_init__(self):
        configurator.at_least(self, 1, "seq_len", "turns")


def main(cfg: Config) -> None:
    if cpu.library() is None:
        raise SystemExit("error: no C compiler, nothing to compare")
    run = configurator.load(pretrain.Config, ["config/tiny.py"])
    rt = distributed.setup(threads=1, seed=1, device="cpu")
    model = mtp.build(run.model)
    model.init_weights(1)
    optimizer = pretrain.optimizer_for(model, run)
    loader = MixtureLoader(cfg.data, list(run.stages[0].mix), run.model.vocab_size, n_mtp=1, seed=1,
                           max_seq_len=run.model.max_seq_len)

    def step() -> float:
        batch = loader.next_batch(0, run.stages[0].mix, cfg.seq_len, 2048 // cfg.seq_len, 0, 1)
        t0 = time.process_time()
        counts = mtp.target_counts(batch.ids, batch.docs, cfg.seq_len, 1)
        sums = pretrain.forward(model, batch, 1)
        (sums[0] / counts[0] + 0.3 * sums[1] / counts[1]).backward()
        distributed.clip_grad_norm(model, run.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.process_time() - t0

    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    seconds = {name: [] for name in VARIANTS}
    for turn in range(cfg.turns + 1):
        for name, without in VARIANTS.items():
            for kernel, module in KERNELS.items():
                module.cpu = SimpleNamespace(trains=lambda *tensors: False) if kernel in without else cpu
            took = step()
            if turn:                                                # the first one warms up
                seconds[name].append(took)
    best = seconds["all in C"]
    rows = {name: {"least": min(s) / min(best), "median": statistics.median(s) / statistics.median(best)}
            for name, s in seconds.items()}
    for name, row in rows.items():
        print(f"{name:20} CPU time over all in C: least {row['least']:.2f}, median {row['median']:.2f}")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"command": " ".join(["python", *sys.argv]), "torch": torch.__version__,
                               "processor": platform.processor() or platform.machine(), "turns": cfg.turns,
                               "tokens_per_step": 2048, "seq_len": cfg.seq_len, "ratios": rows}, indent=1) + "\n")
    distributed.teardown(rt)


if __name__ == "__main__":
    configurator.run(main, Config)
