"""
Evaluation (report sections 2.2, 2.4 and 3.5): held-out problems, long-context probes, acceptance of the MTP layers.
The validation loss is measured by pretrain.py at the end of each stage.

    python eval.py --ckpt=out/tiny/rl                            # avg@8, pass@k on maths and code; 0.6, top-p 0.95
    python eval.py --ckpt=out/tiny/base --samples=16             # pass@16 of a base model: its potential (Fig. 3)
    python eval.py --ckpt=out/tiny/base --tasks="['probes']"     # needle, variable tracking, word extraction (Fig. 4)
    python eval.py --ckpt=out/tiny/sft --tasks="['mtp']"         # teacher-forced and real acceptance of the MTP layers

Problems are held out by identity (data/problems.py). A base checkpoint gets the plain text prompt, a chat checkpoint
the chat template.

    avg@n     mean of the pass rates over n samples a problem; with a bootstrap 95% interval over problems
    pass@k    1 - C(n-c, k) / C(n, k), the unbiased estimate from c correct of n (Chen et al., arXiv 2107.03374)

Results go to eval.json in the checkpoint's run folder, every answer to eval_answers.jsonl beside it.
"""
import json
import math
import random
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import checkpoint
import configurator
import distributed
import kernels
import mtp
from configurator import UserError
from data.jsonl import whole_file, write_jsonl
from data.loader import make_batch
from data.problems import Problem, prompt_ids, read_problems, stop_ids
from data.tiny import probes
from data.tiny.world import World, make_world
from engine import Engine, Request, generate
from judge import Judge
from model import MiMo, ModelConfig
from reward import Grader
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    ckpt: str = "out/tiny/rl"             # a checkpoint, or a run folder: its newest one
    tasks: list[Literal["problems", "probes", "mtp"]] = ("problems",)   # what to measure
    problems: str = "out/tiny/problems/test.jsonl"   # held-out problems
    limit: int = 0                        # problems of each kind, 0 = all
    system: str | None = None             # system prompt; "" = an empty system turn, None = the chat template's
    samples: int = 8                      # answers per problem [paper 3.5: avg@32 on AIME, avg@8 on LiveCodeBench]
    temperature: float = 0.6              # [paper 3.5]
    top_p: float = 0.95                   # [paper 3.5]
    max_new_tokens: int = 128             # longest answer, tokens
    probe_lengths: list[int] = (256, 512, 1024)      # context lengths of the probes, tokens
    probe_count: int = 10                 # probes per kind and length
    slots: int = 128                      # answers decoded at a time
    judge_workers: int = 1                # sandboxed test runners
    seed: int = 7                         # of the samples
    threads: int = 1                      # torch threads on CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"   # auto: CUDA when there is one
    plain: bool = False                   # torch code only: no C, no Triton; for reading and debugging
    out: str = ""                         # result file; default <run>/eval.json

    def __post_init__(self):
        configurator.at_least(self, 1, "samples", "max_new_tokens", "probe_count", "slots", "judge_workers", "threads")
        configurator.at_least(self, 0, "limit", "temperature")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} should be in (0, 1]")
        if not self.tasks or not self.probe_lengths:
            raise ValueError("tasks and probe_lengths should not be empty")


def main(cfg: Config) -> dict:
    # ---- 1. model, problems, and all checks that would otherwise fail after minutes of work ------------------------
    rt = distributed.setup(threads=cfg.threads, seed=cfg.seed, device=cfg.device)
    kernels.set_plain(cfg.plain)
    ckpt = checkpoint.find(cfg.ckpt)
    tokenizer = Tokenizer.load(ckpt)
    if cfg.system is not None:
        tokenizer = tokenizer.with_system(cfg.system)
    shape = configurator.from_dict(ModelConfig, checkpoint.read_shape(ckpt), f"{ckpt}/model.json")
    problems = read_problems(cfg.problems) if {"problems", "mtp"} & set(cfg.tasks) else []
    model = checkpoint.materialise(mtp.build(shape, "meta"), rt, ckpt=ckpt).eval()
    chat = checkpoint.read_meta(ckpt).get("chat", False)
    path = configurator.writable(cfg.out or ckpt.parent / "eval.json")
    if problems:
        longest = max(len(prompt_ids(tokenizer, p, chat)) for p in problems)
        if longest + cfg.max_new_tokens > shape.max_seq_len:
            raise UserError(f"{cfg.problems}: longest prompt {longest} + max_new_tokens {cfg.max_new_tokens} exceed "
                            f"the context of {cfg.ckpt}, max_seq_len = {shape.max_seq_len}")
    asked = make_probes(tokenizer, shape.max_seq_len, cfg) if "probes" in cfg.tasks else {}

    # ---- 2. measure ------------------------------------------------------------------------------------------------
    results = {"ckpt": str(ckpt), "chat": chat, "commit": checkpoint.git_commit(), "config": configurator.to_dict(cfg)}
    t0 = time.perf_counter()
    if "problems" in cfg.tasks:
        results["problems"], answers = measure_problems(model, tokenizer, problems, chat, cfg)
        write_jsonl(path.with_name(f"{path.stem}_answers.jsonl"), answers)
    if "mtp" in cfg.tasks:
        results["mtp"] = measured = measure_mtp(model, tokenizer, problems, chat, cfg)
        shares = {key: " ".join(f"{v:.1%}" for v in measured[key]) for key in ("teacher_forced", "online")}
        print(f"MTP acceptance per layer: teacher-forced {shares['teacher_forced']}, "
              f"speculative decoding {shares['online']}")
    if "probes" in cfg.tasks:
        results["probes"] = measure_probes(model, tokenizer, asked)
        for kind, by_length in results["probes"].items():
            print(f"{kind:24}" + "  ".join(f"{n} tokens {share:.0%}" for n, share in by_length.items()))

    # ---- 3. keep ---------------------------------------------------------------------------------------------------
    results["seconds"] = time.perf_counter() - t0
    with whole_file(path) as f:                              # demo.py takes a file that is there as finished
        json.dump(results, f, indent=1)
    print(f"{path} ({results['seconds']:.0f} s)")
    return results


# ---- estimators -----------------------------------------------------------------------------------------------------

def pass_at_k(n: int, c: int, k: int) -> float:
    """
    Probability that one of k samples is right, estimated from c right of n. ValueError unless 0 <= c <= n, 1 <= k <= n.
    By hand: n = 4, c = 1, k = 2: 1 - C(3,2)/C(4,2) = 1 - 3/6 = 0.5.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap(values: list[float], draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean with a percentile 95% interval; resamples problems, not samples. -> (mean, low, high)."""
    x = np.asarray(values, dtype=np.float64)
    picks = np.random.Generator(np.random.PCG64(seed)).integers(0, len(x), (draws, len(x)))
    low, high = np.quantile(x[picks].mean(1), [0.025, 0.975])
    return float(x.mean()), float(low), float(high)


def summary(graded: list[list[dict]], ks: tuple[int, ...] = (1, 4, 8, 16)) -> dict[str, float]:
    """avg@n with its interval, pass@k, mean length (tokens) and truncated share of what solve() returns."""
    rates = [sum(s["passed"] for s in row) / len(row) for row in graded]
    n = len(graded[0])
    avg, low, high = bootstrap(rates)
    samples = [s for row in graded for s in row]
    return {"avg": avg, "low": low, "high": high, "n": len(graded), "samples": n,
            **{f"pass@{k}": sum(pass_at_k(n, sum(s["passed"] for s in row), k) for row in graded) / len(graded)
               for k in ks if k <= n},
            "tokens": sum(s["tokens"] for s in samples) / len(samples),
            "truncated": sum(s["finish"] == "length" for s in samples) / len(samples)}


# ---- held-out problems ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class GradedTask:
    """What reward.Grader reads of a rollout.Task: the index of the problem."""
    prompt: int


def solve(engine: Engine, tokenizer: Tokenizer, judge: Judge, problems: list[Problem], *, chat: bool, n: int,
          max_new_tokens: int, temperature: float = 0.6, top_p: float = 0.95, seed: int = 0) -> list[list[dict]]:
    """
    n samples of every problem, graded. -> per problem, per sample {"passed", "verdicts", "text", "tokens", "finish"}.
    The seed of a sample depends on (seed, problem, number) only, so any subset of problems gives the same samples.
    """
    grader, requests, stop = Grader(problems, tokenizer, judge, "vanilla"), [], stop_ids(tokenizer, chat)
    for i, problem in enumerate(problems):
        ids, rng = prompt_ids(tokenizer, problem, chat), random.Random(f"{seed} {problem.id}")
        requests += [Request((i, j), ids, max_new_tokens, temperature=temperature, top_p=top_p, stop=stop,
                             seed=rng.getrandbits(62)) for j in range(n)]
    for request in requests:
        engine.add(request)
    samples, outcomes = [], {}
    while len(outcomes) < len(requests):         # programs run while other answers are still being written
        finished = engine.step()
        samples += finished
        for s in finished:
            grader.submit(s.id, GradedTask(s.id[0]), s)
        outcomes |= {key: info for key, _, info in grader.poll()}
        if len(samples) == len(requests):
            time.sleep(0.005)                    # nothing left to decode: leave the core to the judge's workers
    grader.close()
    graded = [[{}] * n for _ in problems]
    for s in samples:
        i, j = s.id
        graded[i][j] = outcomes[s.id] | {"text": tokenizer.decode(s.tokens, skip_control=True), "tokens": len(s.tokens),
                                         "finish": s.finish}
    return graded


def measure_problems(model: MiMo, tokenizer: Tokenizer, problems: list[Problem], chat: bool, cfg: Config,
                     ) -> tuple[dict[str, dict], list[dict]]:
    """-> (kind of problem -> summary; a row per problem with all graded answers, for data/rl_problems.py)."""
    results, rows = {}, []
    with Judge(workers=cfg.judge_workers, cache_size=10_000) as judge:
        for kind in sorted({p.kind for p in problems}):
            some = [p for p in problems if p.kind == kind][:cfg.limit or None]
            longest = max(len(prompt_ids(tokenizer, p, chat)) for p in some)
            engine = Engine(model, slots=cfg.slots, max_len=longest + cfg.max_new_tokens, n_ids=tokenizer.n_ids)
            graded = solve(engine, tokenizer, judge, some, chat=chat, n=cfg.samples, seed=cfg.seed,
                           max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p)
            results[kind] = row = summary(graded)
            rows += [{"id": p.id, "question": p.question, "answers": answers}
                     for p, answers in zip(some, graded, strict=True)]
            print(f"{kind:6} avg@{cfg.samples} {row['avg']:6.1%}  [{row['low']:.1%}, {row['high']:.1%}]  "
                  + "  ".join(f"{k} {v:.1%}" for k, v in row.items() if k.startswith("pass@"))
                  + f"  {row['tokens']:.0f} tokens an answer, {row['truncated']:.1%} truncated, {row['n']} problems")
    return results, rows


# ---- acceptance of the MTP layers -----------------------------------------------------------------------------------

@torch.no_grad()
def measure_mtp(model: MiMo, tokenizer: Tokenizer, problems: list[Problem], chat: bool, cfg: Config) -> dict:
    """
    Greedy answers to held-out problems, once plain and once with every MTP layer drafting. The texts must be equal;
    acceptance per layer is counted in the engine and, on the same texts, teacher-forced.
    """
    problems = [p for p in problems if p.kind == "maths"][:64] + [p for p in problems if p.kind == "code"][:64]
    n_mtp = len(model.mtp_layers)
    prompts = [prompt_ids(tokenizer, p, chat) for p in problems]
    longest = max(map(len, prompts)) + cfg.max_new_tokens
    stop = stop_ids(tokenizer, chat)
    requests = [Request(i, ids, cfg.max_new_tokens, temperature=0.0, stop=stop) for i, ids in enumerate(prompts)]
    t0 = time.perf_counter()
    plain = generate(Engine(model, slots=1, max_len=longest, n_ids=tokenizer.n_ids), requests)
    t1 = time.perf_counter()
    fast = generate(Engine(model, slots=1, max_len=longest + n_mtp, n_draft=n_mtp, n_ids=tokenizer.n_ids), requests)
    t2 = time.perf_counter()
    verified = [sum(s.verified[k] for s in fast) for k in range(n_mtp)]
    accepted = [sum(s.accepted[k] for s in fast) for k in range(n_mtp)]
    counts = np.zeros((n_mtp, 2), int)                       # teacher-forced: accepted, verified
    for s in plain:                                          # one row a text: prompt, answer, look-ahead
        ids = s.prompt + s.tokens
        T, ahead = len(ids) - 1, [tokenizer.eos_id] * n_mtp
        batch = make_batch(np.array([ids + ahead]), np.array([[0] * len(ids) + [1] * n_mtp]), T,
                           mask=np.array([[0] * len(s.prompt) + [1] * (len(s.tokens) + n_mtp)]))
        batch = batch.to(model.lm_head.weight.device)
        counts += np.array(mtp.teacher_forced_acceptance(model, batch.ids, batch.docs, batch.positions, batch.bounds,
                                                         batch.mask)).reshape(n_mtp, 2)
    tokens = sum(len(s.tokens) for s in fast)
    return {"online": [a / max(1, v) for a, v in zip(accepted, verified, strict=True)],
            "teacher_forced": [int(a) / max(1, int(v)) for a, v in counts],
            "equal_text": all(a.tokens == b.tokens for a, b in zip(plain, fast, strict=True)),
            # every decode forward verifies the draft of layer 1
            "tokens_per_forward": tokens / max(1, verified[0]) if n_mtp else 1.0, "speedup": (t1 - t0) / (t2 - t1),
            "answers": len(fast)}


# ---- long-context probes --------------------------------------------------------------------------------------------

REPLY = 24                                                   # tokens of a probe's answer, part of its length


def make_probes(tokenizer: Tokenizer, context: int, cfg: Config) -> dict[tuple[int, str], list[probes.Probe]]:
    """(length in tokens, kind) -> probes. UserError for a length that is too short, or longer than the context."""
    world, asked = make_world(cfg.seed), {}
    for length in cfg.probe_lengths:
        if length > context:
            raise UserError(f"probe_lengths: {length} tokens exceed the context of {cfg.ckpt}, {context}")
        for kind in probes.KINDS:
            asked[length, kind] = [fitting_probe(kind, cfg.seed * 1000 + i, length - REPLY, tokenizer, world)
                                   for i in range(cfg.probe_count)]
    return asked


@torch.no_grad()
def measure_probes(model: MiMo, tokenizer: Tokenizer, asked: dict) -> dict[str, dict[int, float]]:
    """Mean score of RULER-like probes (greedy), per kind and context length in tokens [report Fig. 4]."""
    found: dict[str, dict[int, float]] = {}
    stop = stop_ids(tokenizer, True)
    for (length, kind), some in asked.items():
        engine = Engine(model, slots=8, max_len=length, n_ids=tokenizer.n_ids)
        replies = generate(engine, [Request(i, tokenizer.encode(p.prompt), REPLY, temperature=0.0, stop=stop)
                                    for i, p in enumerate(some)])
        scores = [probes.score(p, tokenizer.decode(s.tokens, skip_control=True))
                  for p, s in zip(some, replies, strict=True)]
        found.setdefault(kind, {})[length] = sum(scores) / len(scores)
    return found


def fitting_probe(kind: str, seed: int, tokens: int, tokenizer: Tokenizer, world: World) -> probes.Probe:
    """The longest probe of this kind and seed whose prompt is at most `tokens` long."""
    words = tokens
    while len(tokenizer.encode((p := probes.probe(kind, seed, words, world=world)).prompt)) > tokens:
        words = int(words * 0.9)
        if words < 8:
            raise UserError(f"probe_lengths: a {kind} probe does not fit {tokens} tokens and an answer of {REPLY}")
    return p


if __name__ == "__main__":
    configurator.run(main, Config)
