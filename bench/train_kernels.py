"""
The demo's training step on one CPU thread: the C of kernels/cpu/train.py beside torch's own operations.

Torch takes the place of all of the C or of one kernel; its operations are the plain references, which train where there
is no compiler.

    python -m data.prepare && python bench/train_kernels.py      # a few minutes; on a busy machine only more noise

The variants alternate, one step each, on rows of config/tiny.py. Ratios are of CPU time, least and median over the
turns; the last line is the ratio of torch alone. docs/kernels.md, section 9, has our numbers.
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
import model as trunk  # noqa: E402
import mtp  # noqa: E402
import pretrain  # noqa: E402
from configurator import UserError  # noqa: E402
from data.loader import MixtureLoader  # noqa: E402
from kernels.cpu import train as in_c  # noqa: E402

KERNELS = {"attention": ["attention"], "SwiGLU": ["swiglu"], "RMSNorm": ["rmsnorm", "rmsnorm_residual"],
           "RoPE": ["rope"]}
VARIANTS = {"all in C": [], "torch alone": list(KERNELS), **{f"{name} by torch": [name] for name in KERNELS}}


@dataclass(frozen=True)
class Config:
    data: str = "out/tiny/data"           # shards of data/prepare.py
    seq_len: int = 256                    # tokens a row; a step has 2,048 tokens
    turns: int = 15                       # steps of each variant that count
    out: str = "out/bench/train_kernels.json"    # the result

    def __post_init__(self):
        configurator.at_least(self, 1, "seq_len", "turns")


def operators_without(names: list[str]) -> SimpleNamespace:
    """The operators in C, those of the kernels `names` by torch; model.py takes it in the place of its own."""
    by_torch = {f: getattr(trunk.OPERATORS, f) for name in names for f in KERNELS[name]}
    c = {f: getattr(in_c, f) for functions in KERNELS.values() for f in functions}
    return SimpleNamespace(c_kernels_apply=in_c.c_kernels_apply, **c | by_torch)


def main(cfg: Config) -> None:
    if in_c.library() is None:
        raise UserError("no C compiler, nothing to compare")
    run = configurator.load(pretrain.Config, ["config/tiny.py"])
    rt = distributed.setup(threads=1, seed=1, device="cpu")
    model = mtp.build(run.model)
    model.init_weights(1)
    optimizer = distributed.adamw(model, lr=1e-3, betas=(run.beta1, run.beta2), weight_decay=run.weight_decay)
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

    seconds = {name: [] for name in VARIANTS}
    for turn in range(cfg.turns + 1):
        for name, without in VARIANTS.items():
            trunk.cpu_kernels = operators_without(without)
            took = step()
            if turn:                                                # the first one warms up
                seconds[name].append(took)
    trunk.cpu_kernels = in_c
    best = seconds["all in C"]
    rows = {name: {"least": min(s) / min(best), "median": statistics.median(s) / statistics.median(best)}
            for name, s in seconds.items()}
    for name, row in rows.items():
        print(f"{name:20} CPU time over all in C: least {row['least']:.2f}, median {row['median']:.2f}")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"command": " ".join(["python", *sys.argv]), "torch": torch.__version__,
                               "processor": platform.processor() or platform.machine(), "turns": cfg.turns,
                               "tokens_per_step": 2048, "seq_len": cfg.seq_len, "ratios": rows,
                               "ratio": rows["torch alone"]["median"]}, indent=1) + "\n")
    distributed.teardown(rt)
    print(f"torch alone / all in C = {rows['torch alone']['median']:.2f}")


if __name__ == "__main__":
    configurator.run(main, Config)
