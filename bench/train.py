"""
Our training step beside nanoGPT's own, in one run on one CPU thread.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python bench/train.py ../nanoGPT      # about two minutes; last line: the ratio, ours / nanoGPT

Both have the same width, layers, heads, vocabulary, batch and context, and the same number of parameters in the
matrices that every token is multiplied with (blocks and lm_head): with K = H/2 and F = 3 D a block of ours has 12 D^2
weights, like nanoGPT's. The totals, printed too, differ: our embedding is untied, and we have no position table.

nanoGPT's side is the inner loop of its train.py with the flags that its README gives for a CPU (compile off, dropout
0): forward, backward, clip, AdamW from model.configure_optimizers. Ours is what pretrain.py runs: document bounds,
summed losses over a count, clip, finite check, fused AdamW; without MTP, and again with one MTP layer to show its cost.
Each side runs in its own process, the sides in alternating turns; the first turn is left out.

Expect 1.1 to 1.2 without MTP and 0.8 with it: both sides spend most of their time in the same matrix products.
"""
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator  # noqa: E402
from configurator import UserError  # noqa: E402

SIDES = ("nanoGPT", "ours", "ours + MTP")


@dataclass(frozen=True)
class Config:
    nanogpt: str = ""                     # folder of a nanoGPT checkout
    width: int = 256                      # D; attention heads have 32 channels
    layers: int = 4                       # blocks
    vocab: int = 1024                     # V
    batch: int = 16                       # rows per step
    seq_len: int = 256                    # tokens per row
    steps: int = 5                        # steps per turn
    turns: int = 6                        # turns of each side that count
    threads: int = 1                      # torch threads
    wall: bool = False                    # wall-clock time instead of CPU time (for idle machines)
    out: str = "out/bench/train.json"     # the result
    side: Literal["", "nanoGPT", "ours", "ours + MTP"] = ""   # set for the process of one side, by the script itself

    POSITIONAL = ("nanogpt",)

    def __post_init__(self):
        configurator.at_least(self, 1, "layers", "vocab", "batch", "steps", "turns", "threads")
        configurator.at_least(self, 2, "seq_len")
        if self.width < 64 or self.width % 64:
            raise ValueError(f"width = {self.width} should be a multiple of 64: two heads of 32 share a kv head")


def main(cfg: Config) -> None:
    if not (Path(cfg.nanogpt) / "model.py").is_file():
        raise UserError(f"no model.py in {cfg.nanogpt}: git clone https://github.com/karpathy/nanoGPT")
    if cfg.side:
        serve(cfg)
    else:
        compare(cfg)


# ---- one side, in its own process -----------------------------------------------------------------------------------

def nanogpt_step(cfg: Config) -> tuple[Callable[[], float], int, int]:
    """-> (a training step that returns the loss, parameters in all, parameters in matrices) of nanoGPT."""
    import torch
    sys.path.insert(0, str(Path(cfg.nanogpt).resolve()))
    nanogpt = importlib.import_module("model")                  # its model.py, not ours: its folder comes first
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    model = nanogpt.GPT(nanogpt.GPTConfig(block_size=cfg.seq_len, vocab_size=cfg.vocab, n_layer=cfg.layers,
                                          n_head=cfg.width // 32, n_embd=cfg.width, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")

    def step() -> float:
        ids = torch.randint(0, cfg.vocab, (cfg.batch, cfg.seq_len + 1))
        _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()                                      # its train.py logs the loss, and so does ours

    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "wpe" not in n)
    return step, sum(p.numel() for p in model.parameters()), matrices


def our_step(cfg: Config, n_mtp: int) -> tuple[Callable[[], float], int, int]:
    """The same of our model with n_mtp MTP layers."""
    import torch

    import checkpoint
    import distributed
    import mtp
    from data.loader import make_batch
    from metrics import check_finite
    from model import ModelConfig
    rt = distributed.setup(threads=cfg.threads, seed=0, device="cpu")
    D, B, T = cfg.width, cfg.batch, cfg.seq_len
    shape = ModelConfig(vocab_size=cfg.vocab, n_layer=cfg.layers, d_model=D, n_head=D // 32, n_kv_head=D // 64,
                        head_dim=32, d_ff=3 * D, max_seq_len=T, n_mtp=n_mtp)
    model = checkpoint.materialise(distributed.shard(mtp.build(shape, "meta"), rt), rt)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    docs = torch.zeros(B, T + 1 + n_mtp, dtype=torch.long).numpy()

    def step() -> float:
        batch = make_batch(torch.randint(0, cfg.vocab, docs.shape).numpy(), docs, T)
        counts = mtp.target_counts(batch.ids, batch.docs, T, n_mtp)
        trunk, extra = mtp.losses(model, batch.ids, batch.docs, batch.positions, batch.bounds)
        sums = torch.stack([trunk, *extra])
        loss = sums[0] / counts[0] + (0.3 * (sums[1:] / counts[1:]).mean() if n_mtp else 0.0)
        loss.backward()
        norm = distributed.clip_grad_norm(model, 1.0)
        check_finite({"loss": sums.detach(), "gradient norm": norm}, model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    return step, sum(p.numel() for p in model.parameters()), matrices


def serve(cfg: Config) -> None:
    """The process of one side: each line on stdin starts a turn, a line on stdout gives its median seconds per step."""
    if cfg.side == "nanoGPT":
        step, parameters, matrices = nanogpt_step(cfg)
    else:
        step, parameters, matrices = our_step(cfg, 1 if cfg.side == "ours + MTP" else 0)
    print(json.dumps({"parameters": parameters, "matrices": matrices, "loss": step()}), flush=True)
    clock = time.perf_counter if cfg.wall else time.process_time
    for _ in sys.stdin:
        seconds = []
        for _ in range(cfg.steps):
            t = clock()
            step()
            seconds.append(clock() - t)
        print(json.dumps(statistics.median(seconds)), flush=True)


# ---- all sides in turns ---------------------------------------------------------------------------------------------

def compare(cfg: Config) -> None:
    """Run the sides in alternating turns, print one line for each, write the result."""
    import torch
    out = configurator.writable(cfg.out)
    flags = [f"--{name}={value}" for name, value in vars(cfg).items() if name not in ("nanogpt", "side", "out")]
    env = os.environ | {"OMP_NUM_THREADS": str(cfg.threads)}
    processes, models, times = {}, {}, {side: [] for side in SIDES}
    for side in SIDES:
        processes[side] = subprocess.Popen([sys.executable, __file__, cfg.nanogpt, *flags, f"--side={side}"], env=env,
                                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        lines = iter(processes[side].stdout.readline, "")
        model = next((line for line in lines if line.startswith("{")), None)       # nanoGPT prints lines of its own
        if model is None:
            raise UserError(f"the process of {side} ended before its first step; its error is above")
        models[side] = json.loads(model)
    for turn in range(cfg.turns + 1):
        for side, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds = json.loads(process.stdout.readline())
            if turn:
                times[side].append(seconds)
    for process in processes.values():
        process.stdin.close()
        process.wait()

    tokens, base = cfg.batch * cfg.seq_len, times["nanoGPT"]
    print(f"D {cfg.width}, {cfg.layers} layers, vocabulary {cfg.vocab:,}, {cfg.batch} x {cfg.seq_len} tokens, "
          f"{cfg.threads} thread(s), {'wall' if cfg.wall else 'CPU'} time, {torch.__version__}")
    rows = {}
    for side in SIDES:
        ratios = sorted(b / t for b, t in zip(base, times[side], strict=True))     # both of the same turn
        median = statistics.median(times[side])
        r = rows[side] = {"seconds_per_step": median, "tokens_per_second": tokens / median,
                          "ratio": statistics.median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1],
                          **models[side]}
        print(f"  {side:<11} {r['parameters']:>10,} parameters, {r['matrices']:>10,} in matrices, "
              f"{r['tokens_per_second']:>8,.0f} tokens/s, x{r['ratio']:.2f} ({r['ratio_low']:.2f} to "
              f"{r['ratio_high']:.2f})")
    about = {"command": " ".join(["python bench/train.py ../nanoGPT", *flags]), "threads": cfg.threads,
             "torch": torch.__version__, "python": platform.python_version(),
             "machine": platform.processor() or platform.machine()}
    out.write_text(json.dumps({"ratio": rows["ours"]["ratio"], "sides": rows, **about}, indent=1) + "\n")
    print(f"ratio ours / nanoGPT, tokens per second, MTP off: {rows['ours']['ratio']:.3f}")


if __name__ == "__main__":
    configurator.run(main, Config)
