"""
What a checkpoint costs a training step: written in the foreground, and beside training.

    python bench/save.py                   # a minute; last line: stall of a background save / blocking save

A model of 29M parameters (350 MB with AdamW's state) trains on one CPU thread and saves: blocking, then in
the background. Stall = seconds inside save_checkpoint (the copy to CPU memory). The training thread's CPU
time per step is printed with and without a save beside it: work that leaked into it would show. The first
background save allocates the copy's memory and is left out, as it comes once a run. Aim: at most 0.10.
"""
import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import checkpoint  # noqa: E402
import distributed  # noqa: E402
import mtp  # noqa: E402
from model import ModelConfig  # noqa: E402


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    p.add_argument("--out", default="out/bench/save.json")
    p.add_argument("--turns", type=int, default=5)
    args = p.parse_args()
    rt = distributed.setup(seed=0, device="cpu")
    shape = ModelConfig(vocab_size=8192, n_layer=6, d_model=512, n_head=8, n_kv_head=4, head_dim=64, d_ff=1536)
    model = checkpoint.materialise(mtp.build(shape, "meta"), rt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = Path(args.out).parent / "save_run"
    ids = torch.randint(0, 8192, (2, 66))
    docs, positions = torch.zeros_like(ids), torch.arange(64)[None].expand(2, 64)

    def timed(f) -> float:
        t = time.perf_counter()
        f()
        return time.perf_counter() - t

    def worked(f) -> float:
        """CPU seconds of this thread: waiting for a core that other programs hold is not counted."""
        t = time.thread_time()
        f()
        return time.thread_time() - t

    def step():
        trunk, extra = mtp.losses(model, ids, docs, positions, None)
        (trunk + extra[0]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def save(n: int, background: bool):
        checkpoint.save(run, n, model, optimizer=optimizer, config={}, meta={}, state={}, rt=rt,
                                keep=1, background=background)

    rows = []
    for turn in range(args.turns + 1):
        usual = [worked(step) for _ in range(5)]
        blocking = timed(lambda n=2 * turn: save(n, False))
        step()
        stall, beside = timed(lambda n=2 * turn + 1: save(n, True)), []
        while checkpoint._pending.thread.is_alive():
            beside.append(worked(step))
        checkpoint.finish()
        if turn:
            rows.append({"blocking": blocking, "stall": stall, "step": statistics.median(usual),
                         "step_beside": statistics.median(beside) if beside else None})
            r = rows[-1]
            print(f"blocking {blocking:.3f} s, background {stall:.3f} s; CPU per step {r['step']:.3f} s, "
                  f"beside a save {r['step_beside'] or float('nan'):.3f} s")
    shutil.rmtree(run, ignore_errors=True)
    ratio = statistics.median(r["stall"] / r["blocking"] for r in rows)
    about = {"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__, "threads": 1,
             "command": " ".join(sys.argv)}
    Path(args.out).write_text(json.dumps({"ratio": ratio, "rows": rows, **about}, indent=1) + "\n")
    print(f"stall of a background save / blocking save: {ratio:.3f}")


if __name__ == "__main__":
    main()
