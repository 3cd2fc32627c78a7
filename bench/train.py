"""
Our training step beside nanoGPT's own, in one run on one CPU thread.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python bench/train.py --nanogpt=../nanoGPT     # about two minutes; last line: the ratio, ours / nanoGPT

Same width, layers, heads, vocabulary, batch and context. "Same parameter count" is taken over the matrices
that every token is multiplied with (blocks and head): with K = H/2 and F = 3 D a block of ours has 12 D^2
weights, as nanoGPT's has. Totals differ by an embedding (ours is untied) and a position table (ours has
none); both printed.

nanoGPT's side is the inner loop of its train.py with the flags its README gives for a CPU (compile off,
dropout 0): forward, backward, clip, AdamW from model.configure_optimizers. Ours is what pretrain.py runs:
document bounds, summed losses over a count, clip, finite check, fused AdamW; MTP off, then with one MTP
layer to show its cost. Each side runs in its own process, in alternating turns; the first turn is thrown
away. Expect 1.1 to 1.2 without MTP and 0.8 with it: both are bound by the same matrix products.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("nanoGPT", "ours", "ours + MTP")


def nanogpt_step(args):
    """-> (step function, parameters in all, parameters in matrices)."""
    sys.path.insert(0, str(Path(args.nanogpt).resolve()))
    import torch

    from model import GPT, GPTConfig
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=args.seq_len, vocab_size=args.vocab, n_layer=args.layers,
                          n_head=args.width // 32, n_embd=args.width, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")

    def step():
        ids = torch.randint(0, args.vocab, (args.batch, args.seq_len + 1))
        _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()                                          # train.py logs it; so do we

    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "wpe" not in n)
    return step, sum(p.numel() for p in model.parameters()), matrices


def our_step(args, n_mtp: int):
    sys.path.insert(0, str(ROOT))
    import torch

    import checkpoint
    import distributed
    import mtp
    from data.loader import make_batch
    from kernels.attention import doc_bounds
    from metrics import check_finite
    from model import ModelConfig
    rt = distributed.setup(threads=args.threads, seed=0, device="cpu")
    D, B, T = args.width, args.batch, args.seq_len
    shape = ModelConfig(vocab_size=args.vocab, n_layer=args.layers, d_model=D, n_head=D // 32,
                        n_kv_head=D // 64, head_dim=32, d_ff=3 * D, max_seq_len=T, n_mtp=n_mtp)
    model = checkpoint.materialise(distributed.shard(mtp.build(shape, "meta"), rt), rt)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    docs = torch.zeros(B, T + 1 + n_mtp, dtype=torch.long).numpy()

    def step():
        batch = make_batch(torch.randint(0, args.vocab, docs.shape).numpy(), docs, T)
        counts = mtp.target_counts(batch.ids, batch.docs, T, n_mtp)
        bounds = doc_bounds(batch.cu_seqlens, B, T)
        trunk, extra = mtp.losses(model, batch.ids, batch.docs, batch.positions, bounds)
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


def serve(args) -> None:
    """The child: a line in asks for a turn, a line out tells seconds per step."""
    if args.side == "nanoGPT":
        step, total, matrices = nanogpt_step(args)
    else:
        step, total, matrices = our_step(args, 1 if "MTP" in args.side else 0)
    print(json.dumps({"parameters": total, "matrices": matrices, "loss": step()}), flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(args.steps):
            t = time.perf_counter() if args.wall else time.process_time()
            step()
            seconds.append((time.perf_counter() if args.wall else time.process_time()) - t)
        print(json.dumps(statistics.median(seconds)), flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nanogpt", required=True, help="folder of a nanoGPT checkout")
    p.add_argument("--width", type=int, default=256, help="D; heads are 32 wide")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--vocab", type=int, default=1024)
    p.add_argument("--batch", type=int, default=16, help="rows")
    p.add_argument("--seq_len", type=int, default=256, help="tokens per row")
    p.add_argument("--steps", type=int, default=5, help="steps per turn")
    p.add_argument("--turns", type=int, default=6)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--wall", action="store_true", help="wall clock, not CPU time (idle machines)")
    p.add_argument("--out", default="out/bench/train.json")
    p.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = p.parse_args()
    if not (Path(args.nanogpt) / "model.py").is_file():
        raise SystemExit(f"no model.py in --nanogpt={args.nanogpt}: git clone https://github.com/karpathy/nanoGPT")
    if args.side:
        return serve(args)

    import torch
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, __file__, *sys.argv[1:]]
    sides, facts, times = {}, {}, {s: [] for s in SIDES}
    for s in SIDES:
        sides[s] = subprocess.Popen([*command, f"--side={s}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    text=True, env=env)
        lines = iter(sides[s].stdout.readline, "")                # nanoGPT prints lines of its own
        facts[s] = json.loads(next(line for line in lines if line.startswith("{")))
    for turn in range(args.turns + 1):
        for s, child in sides.items():
            child.stdin.write("go\n")
            child.stdin.flush()
            seconds = json.loads(child.stdout.readline())
            if turn:
                times[s].append(seconds)
    for child in sides.values():
        child.stdin.close()
        child.wait()

    tokens, base = args.batch * args.seq_len, times["nanoGPT"]
    print(f"D {args.width}, {args.layers} layers, vocabulary {args.vocab:,}, {args.batch} x {args.seq_len}"
          f" tokens, {args.threads} thread(s), {'wall' if args.wall else 'CPU'} time, {torch.__version__}")
    rows = {}
    for s in SIDES:
        ratios = sorted(b / t for b, t in zip(base, times[s], strict=True))       # of the same turn
        median = statistics.median(times[s])
        rows[s] = {"seconds_per_step": median, "tokens_per_second": tokens / median,
                   "ratio": statistics.median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1],
                   **facts[s]}
        r = rows[s]
        print(f"  {s:<11} {r['parameters']:>10,} parameters, {r['matrices']:>10,} in matrices, "
              f"{r['tokens_per_second']:>8,.0f} tokens/s, "
              f"x{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    words = ["--nanogpt=../nanoGPT" if w.startswith("--nanogpt=") else w for w in sys.argv]    # nobody's own folder
    about = {"command": " ".join(words), "threads": args.threads, "torch": torch.__version__,
             "python": platform.python_version(), "machine": platform.processor() or platform.machine()}
    out.write_text(json.dumps({"ratio": rows["ours"]["ratio"], "sides": rows, **about}, indent=1) + "\n")
    print(f"ratio ours / nanoGPT, tokens per second, MTP off: {rows['ours']['ratio']:.3f}")


if __name__ == "__main__":
    main()
