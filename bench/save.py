"""
What a checkpoint costs a training step: written in the foreground, and in the background beside training.

    python bench/save.py                   # a minute; last line: stall of a background save / blocking save

A model of 29M parameters (350 MB with AdamW's state) trains on one CPU thread and saves in turns: blocking, then in the
background. Stall = seconds inside checkpoint.save, which copies the state to CPU memory. The training thread's CPU time
per step is printed with and without a save beside it: work of the save that the training thread had to do would show
there. The first background save, which allocates the memory of the copy, happens once per run and is left out. Aim: a
ratio of at most 0.10; ours is 0.05 to 0.07 (results/scale/save.json).
"""
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import checkpoint  # noqa: E402
import configurator  # noqa: E402
import distributed  # noqa: E402
import mtp  # noqa: E402
from model import ModelConfig  # noqa: E402


@dataclass(frozen=True)
class Config:
    turns: int = 5                        # times that each kind of save is measured
    out: str = "out/bench/save.json"      # the result

    def __post_init__(self):
        configurator.at_least(self, 1, "turns")


def timed(f: Callable[[], None]) -> float:
    """Seconds that f() takes, wall clock."""
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


def cpu_seconds(f: Callable[[], None]) -> float:
    """CPU seconds of this thread in f(): waiting for a core that other programs hold is not counted."""
    t = time.thread_time()
    f()
    return time.thread_time() - t


def main(cfg: Config) -> None:
    out = configurator.writable(cfg.out)
    rt = distributed.setup(seed=0, device="cpu")
    shape = ModelConfig(vocab_size=8192, n_layer=6, d_model=512, n_head=8, n_kv_head=4, head_dim=64, d_ff=1536)
    model = checkpoint.materialise(mtp.build(shape, "meta"), rt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = out.parent / "save_run"
    ids = torch.randint(0, 8192, (2, 66))
    docs, positions = torch.zeros_like(ids), torch.arange(64)[None].expand(2, 64)

    def step() -> None:
        trunk, extra = mtp.losses(model, ids, docs, positions, None)
        (trunk + extra[0]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def save(n: int, background: bool) -> None:
        checkpoint.save(run, n, model, optimizer=optimizer, config={}, meta={}, state={}, rt=rt, keep=1,
                        background=background)

    rows = []
    for turn in range(cfg.turns + 1):
        usual = [cpu_seconds(step) for _ in range(5)]
        blocking = timed(lambda n=2 * turn: save(n, False))
        step()
        stall, beside = timed(lambda n=2 * turn + 1: save(n, True)), []
        while checkpoint._pending.thread.is_alive():
            beside.append(cpu_seconds(step))
        checkpoint.finish()
        if turn == 0:
            continue
        rows.append({"blocking": blocking, "stall": stall, "step": statistics.median(usual),
                     "step_beside": statistics.median(beside) if beside else None})
        print(f"blocking {blocking:.3f} s, background {stall:.3f} s; CPU per step {rows[-1]['step']:.3f} s, "
              f"beside a save {rows[-1]['step_beside'] or float('nan'):.3f} s")
    shutil.rmtree(run, ignore_errors=True)
    ratio = statistics.median(r["stall"] / r["blocking"] for r in rows)
    about = {"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__, "threads": 1,
             "command": f"python bench/save.py --turns={cfg.turns}"}
    out.write_text(json.dumps({"ratio": ratio, "rows": rows, **about}, indent=1) + "\n")
    print(f"stall of a background save / blocking save: {ratio:.3f}")


if __name__ == "__main__":
    configurator.run(main, Config)
