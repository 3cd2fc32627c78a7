"""
The tail of an RL iteration's rollout with MTP: what drafting brings while few sequences are left (report 3.4).

    python bench/mtp_tail.py                              # the demo's SFT model (make demo); about a minute
    python bench/mtp_tail.py --ckpt=out/tiny24/sft        # 24 layers: results/generate says how to train them

All answers of an iteration are launched at once: 24 prompts, 8 answers each, temperature 1. Most end early, and the
engine goes on with fewer and fewer sequences. With draft_below = N the MTP layers rest until N sequences are left, and
draft from then on; the texts are the same, which is asserted. Measured is the time from the moment at which at most N
are left to the last token, which includes computing the rest's texts again for the KV cache of the MTP layers, beside
the same stretch without drafts. Times are CPU seconds of the process; the sides alternate, medians count.

The last line is the ratio plain / drafting of the best N; out/bench/mtp_tail.json has all of them. Expect less than 1
for four layers, where three MTP layers cost nearly as much as the trunk, and more for a deep trunk (docs/engine.md).
"""
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import checkpoint  # noqa: E402
import configurator  # noqa: E402
import mtp  # noqa: E402
from configurator import UserError  # noqa: E402
from data.problems import prompt_ids, read_problems, stop_ids  # noqa: E402
from engine import Engine, Request, Sample  # noqa: E402
from model import ModelConfig  # noqa: E402
from rollout import hash64  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The command line of bench/mtp_tail.py."""
    ckpt: str = "out/tiny/sft"            # a chat model with MTP layers
    problems: str = "out/tiny/problems/rl.jsonl"     # prompts
    groups: int = 24                      # prompts of an iteration
    answers: int = 8                      # answers per prompt
    tokens: int = 96                      # longest answer
    tails: list[int] = (1, 2, 4, 8)       # N: sequences that are left when drafting begins
    iterations: int = 4                   # different prompts, one iteration each
    rounds: int = 5                       # timed repetitions of each, after one for warming up
    threads: int = 1                      # torch threads
    out: str = "out/bench/mtp_tail.json"  # the result

    def __post_init__(self):
        configurator.at_least(self, 1, "groups", "answers", "tokens", "iterations", "rounds", "threads")


def run(engine: Engine, requests: list[Request], tails: list[int]) -> tuple[dict[int, tuple], dict[object, Sample]]:
    """All requests at once, to their end. -> ({N: (seconds, steps) from when at most N are left}, samples by id)."""
    for r in requests:
        engine.add(r)
    done, moments, step = {}, {}, 0
    while len(done) < len(requests):
        for N in tails:
            if N not in moments and len(requests) - len(done) <= N:
                moments[N] = time.process_time(), step
        done |= {s.id: s for s in engine.step()}
        step += 1
    end = time.process_time()
    return {N: (end - start, step - at) for N, (start, at) in moments.items()}, done


def main(cfg: Config) -> None:
    """Plain and drafting by turns, for each N and iteration; a table, a file, a ratio."""
    torch.set_num_threads(cfg.threads)
    out, ckpt = configurator.writable(cfg.out), checkpoint.find(cfg.ckpt)
    if not Path(cfg.problems).is_file():
        raise UserError(f"no {cfg.problems}: make demo")
    shape, tokenizer = ModelConfig(**checkpoint.read_shape(ckpt)), Tokenizer.load(ckpt)
    if not shape.n_mtp:
        raise UserError(f"{ckpt}: has no MTP layers; this is about what they bring")
    model = mtp.build(shape)
    checkpoint.read_weights(ckpt, model)
    chat = checkpoint.read_meta(ckpt).get("chat", False)
    stop, problems = stop_ids(tokenizer, chat), read_problems(cfg.problems)
    texts = [prompt_ids(tokenizer, p, chat) for p in problems]
    iterations = []
    for k in range(cfg.iterations):
        chosen = [texts[(k * cfg.groups + i) % len(texts)] for i in range(cfg.groups)]
        iterations.append([Request((i, j), ids, cfg.tokens, 1.0, stop=stop, seed=hash64("tail", k, i, j) >> 1)
                           for i, ids in enumerate(chosen) for j in range(cfg.answers)])
    slots, longest = cfg.groups * cfg.answers, max(map(len, texts)) + cfg.tokens
    n = shape.n_mtp
    plain = Engine(model, slots, longest, n_ids=tokenizer.n_ids)
    drafting = {N: Engine(model, slots, longest, n_draft=n, draft_below=N, n_ids=tokenizer.n_ids) for N in cfg.tails}
    print(f"{ckpt}: {shape.n_layer} layers, D = {shape.d_model}, {n} MTP layers; {cfg.iterations} iterations of "
          f"{cfg.groups} x {cfg.answers} answers of at most {cfg.tokens} tokens, {cfg.threads} thread, CPU time")
    tails = {(side, N): [[] for _ in iterations] for N in cfg.tails for side in ("plain", "drafting")}
    whole, steps, verified, accepted = [], {}, {N: 0 for N in cfg.tails}, {N: 0 for N in cfg.tails}
    for turn in range(cfg.rounds + 1):
        for k, requests in enumerate(iterations):
            start = time.process_time()
            times, want = run(plain, requests, cfg.tails)
            if turn:
                whole.append(time.process_time() - start)
            for N, engine in drafting.items():
                mine, have = run(engine, requests, [N])
                same = all(have[i].tokens == s.tokens and have[i].logprobs == s.logprobs for i, s in want.items())
                assert same, "drafting changed a text or its log-probs"
                steps.setdefault(N, []).append((times[N][1], mine[N][1]))
                verified[N] += sum(s.verified[0] for s in have.values())
                accepted[N] += sum(s.accepted[0] for s in have.values())
                if turn:
                    tails["plain", N][k].append(times[N][0])
                    tails["drafting", N][k].append(mine[N][0])
    rows = []
    for N in cfg.tails:
        a, b = (sum(statistics.median(t) for t in tails[side, N]) / len(iterations) for side in ("plain", "drafting"))
        before, after = (sum(s[i] for s in steps[N]) / len(steps[N]) for i in (0, 1))
        rows.append({"N": N, "plain_ms": 1e3 * a, "drafting_ms": 1e3 * b, "ratio": a / b, "plain_steps": before,
                     "drafting_steps": after, "acceptance_first": accepted[N] / max(1, verified[N])})
        print(f"  last {N}: plain {1e3 * a:6.2f} ms in {before:4.1f} steps, drafting {1e3 * b:6.2f} ms in {after:4.1f} "
              f"steps: {a / b:.2f}x; first layer accepted {rows[-1]['acceptance_first']:.0%}")
    best, decode = max(rows, key=lambda row: row["ratio"]), 1e3 * statistics.median(whole)
    saved = max(row["plain_ms"] - row["drafting_ms"] for row in rows)
    print(f"the whole rollout takes {decode:.1f} ms without drafts; the most that drafting saves is {saved:.2f} ms")
    out.write_text(json.dumps({
        "ratio": best["ratio"], "median_seconds": {"plain": best["plain_ms"] / 1e3, "drafting":
                                                   best["drafting_ms"] / 1e3}, "rows": rows, "rollout_ms": decode,
        "command": " ".join(["python bench/mtp_tail.py", *sys.argv[1:]]), "commit": checkpoint.git_commit(),
        "checkpoint": str(ckpt), "shape": vars(shape), "torch": torch.__version__, "threads": cfg.threads}, indent=1)
        + "\n")
    print(out)
    print(f"tail of the last {best['N']}, plain / drafting: {best['ratio']:.2f}x at {shape.n_layer} layers")


if __name__ == "__main__":
    configurator.run(main, Config)
