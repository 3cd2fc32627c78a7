"""
Evaluation (report sections 2.2, 2.4 and 3.5): held-out problems, long-context probes, acceptance of the MTP layers.
The validation loss is measured by pretrain.py at the end of each stage.

    python eval.py --ckpt=out/tiny/rl                            # avg@8, pass@k on maths and code; 0.6, top-p 0.95
    python eval.py --ckpt=out/tiny/base --samples=16             # pass@16 of a base model: its potential (Fig. 3)
    python eval.py --ckpt=out/tiny/base --tasks="['probes']"     # needle, variable tracking, word extraction (Fig. 4)
    python eval.py --ckpt=out/tiny/sft --tasks="['mtp']"         # teacher-forced and real acceptance of the MTP layers
    torchrun --nproc_per_node=8 eval.py --ckpt=out/mimo_7b/sft --problems=FILE --samples=16 --temperature=1 --top_p=1 \\
        --max_new_tokens=30720 --slots=64 --kv_tokens=131072     # 16 answers to each of 130K problems [paper 3.2]

Problems are held out by identity (data/problems.py). A base checkpoint gets the plain text prompt, a chat checkpoint
the chat template.

    avg@n     mean of the pass rates over n samples a problem; with a bootstrap 95% interval over problems
    pass@k    1 - C(n-c, k) / C(n, k), the unbiased estimate from c correct of n (Chen et al., arXiv 2107.03374)

Results go to eval.json in the checkpoint's run folder, every answer to eval_answers.jsonl beside it. All problems are
launched at once, by the loop that makes RL batches (rollout.py; Table 3), on any number of ranks. The answers to a
problem are on the disk as soon as the last one is graded, so a long run can be stopped (SIGTERM, or a power cut): the
same command asks only what is missing. Answers depend on neither ranks, slots, memory nor drafts.
"""
import hashlib
import json
import math
import random
import signal
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import configurator
import distributed
import kernels
import mtp
from configurator import UserError
from data.answers import Answers
from data.filters import check_references
from data.jsonl import whole_file
from data.loader import make_batch
from data.problems import Problem, prompt_ids, read_problems, stop_ids
from data.text import shown
from data.tiny import probes
from data.tiny.world import World, make_world
from distributed import Exchange, Runtime
from engine import Engine, Request, generate
from judge import Judge
from model import MiMo, ModelConfig
from reward import Grader
from rollout import Ended, Group, RankState, Rollout, Scheduler, Stopped, Task
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
    slots: int = 128                      # answers decoded at a time, per process
    kv_tokens: int = 0                    # tokens in the engine's KV cache; 0 = slots x longest answer
    n_draft: int = 0                      # drafts a step; the same answers
    draft_below: int = 0                  # draft only while at most this many answers are in flight; 0 = always
    judge_workers: int = 1                # sandboxed test runners, per process
    judge_seconds: float = 1.0            # processor seconds a test may take [ours]
    judge_memory_mb: int = 512            # address space of a program, MB [ours]
    judge_output_kb: int = 1024           # output of a program that is read, KB [ours]
    judge_tolerance: float | None = None  # by which floats may differ; None: 1e-9 in calls, not at all in text
    judge_isolation: Literal["auto", "A", "B", "C"] = "auto"   # docs/judge.md; C only for programs you trust
    judge_timeout: float = 600.0          # seconds without any reward, while some are waited for, that end the run
    timeout: float = 1800.0               # seconds that a rank waits for the others
    seed: int = 7                         # of the samples
    threads: int = 1                      # torch threads on CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"   # auto: CUDA when there is one
    plain: bool = False                   # torch code only: no C, no Triton; for reading and debugging
    out: str = ""                         # result file; default <run>/eval.json

    def __post_init__(self):
        configurator.at_least(self, 1, "samples", "max_new_tokens", "probe_count", "slots", "judge_workers", "threads",
                              "judge_memory_mb", "judge_output_kb", "timeout")
        configurator.at_least(self, 0, "limit", "temperature", "kv_tokens", "n_draft", "draft_below", "seed")
        configurator.at_least(self, 0.01, "judge_seconds", "judge_timeout")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} should be in (0, 1]")
        if not self.tasks or not self.probe_lengths:
            raise ValueError("tasks and probe_lengths should not be empty")


def main(cfg: Config) -> dict:
    # ---- 1. model, problems, and all checks that would otherwise fail after minutes of work ------------------------
    rt = distributed.setup(threads=cfg.threads, seed=cfg.seed, device=cfg.device, timeout=cfg.timeout)
    if rt.world > 1 and set(cfg.tasks) != {"problems"}:
        raise UserError(f"tasks = {list(cfg.tasks)}: several ranks share problems only; run probes and mtp alone")
    kernels.set_plain(cfg.plain)
    ckpt = checkpoint.find(cfg.ckpt)
    tokenizer = Tokenizer.load(ckpt)
    if cfg.system is not None:
        tokenizer = tokenizer.with_system(cfg.system)
    shape = configurator.from_dict(ModelConfig, checkpoint.read_shape(ckpt), f"{ckpt}/model.json")
    problems = read_problems(cfg.problems) if {"problems", "mtp"} & set(cfg.tasks) else []
    if problems and rt.is_main:
        check_references(cfg.problems, problems, at_most=1000)
    chat = checkpoint.read_meta(ckpt).get("chat", False)
    mtp.check_drafts(cfg.n_draft, shape.n_mtp, str(ckpt))
    n_read = len(problems)
    problems, prompts = fitting(cfg.problems, problems, tokenizer, chat, shape.max_seq_len - cfg.max_new_tokens,
                                f"max_new_tokens {cfg.max_new_tokens} of max_seq_len = {shape.max_seq_len}", rt)
    model = mtp.build(shape, "meta").to(checkpoint.inference_dtype(ckpt, rt))
    model = checkpoint.materialise(model, rt, ckpt=ckpt).to(rt.device).eval()
    path = configurator.writable(cfg.out or ckpt.parent / "eval.json")
    probes_asked = make_probes(tokenizer, shape.max_seq_len, cfg) if "probes" in cfg.tasks else {}

    # ---- 2. measure: problems on all ranks; the rest, and the sums over all answers, on rank 0 alone ----------------
    results = {"ckpt": str(ckpt), "chat": chat, "commit": checkpoint.git_commit(), "config": configurator.to_dict(cfg)}
    t0 = time.perf_counter()
    if "problems" in cfg.tasks:
        kinds = sorted({p.kind for p in problems})
        asked = [p for kind in kinds for p in [p for p in problems if p.kind == kind][:cfg.limit or None]]
        ids = {p.id: prompt for p, prompt in zip(problems, prompts, strict=True)}
        answers = Answers(path.with_name(f"{path.stem}_answers.jsonl"), made_with(cfg, ckpt, asked, rt))
        answer_problems(model, tokenizer, asked, ids, stop_ids(tokenizer, chat), cfg, rt, answers)
    distributed.teardown(rt)                                 # no rank waits for what rank 0 does from here on
    if not rt.is_main:
        return {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and SIGTERM may end it at any moment
    if "problems" in cfg.tasks:
        results["problems"], results["left_out"] = {}, n_read - len(problems)
        graded = answers.finish([p.id for p in asked], lambda line: [
            {key: a[key] for key in ("passed", "tokens", "finish")} for a in json.loads(line)["answers"]])
        for kind in kinds:
            some = [row for p, row in zip(asked, graded, strict=True) if p.kind == kind]
            results["problems"][kind] = row = summary(some)
            print(f"{kind:6} avg@{cfg.samples} {row['avg']:6.1%}  [{row['low']:.1%}, {row['high']:.1%}]  "
                  + "  ".join(f"{k} {v:.1%}" for k, v in row.items() if k.startswith("pass@"))
                  + f"  {row['tokens']:.0f} tokens an answer, {row['truncated']:.1%} truncated, {row['n']} problems")
    if "mtp" in cfg.tasks:
        results["mtp"] = measured = measure_mtp(model, tokenizer, problems, chat, cfg)
        shares = {key: " ".join(f"{v:.1%}" for v in measured[key]) for key in ("teacher_forced", "online")}
        print(f"MTP acceptance per layer: teacher-forced {shares['teacher_forced']}, "
              f"speculative decoding {shares['online']}")
    if "probes" in cfg.tasks:
        results["probes"] = measure_probes(model, tokenizer, probes_asked)
        for kind, by_length in results["probes"].items():
            print(f"{kind:24}" + "  ".join(f"{n} tokens {share:.0%}" for n, share in by_length.items()))

    # ---- 3. keep ---------------------------------------------------------------------------------------------------
    results["seconds"] = time.perf_counter() - t0
    with whole_file(path) as f:                              # demo.py takes a file that is there as finished
        json.dump(results, f, indent=1)
    print(f"{path} ({results['seconds']:.0f} s)")
    return results


MAX_LEFT_OUT = 0.05        # share of prompts that may be too long for the model's context [ours]


def fitting(path: str, problems: list[Problem], tokenizer: Tokenizer, chat: bool, most: int, why: str,
            rt: Runtime) -> tuple[list[Problem], list[list[int]]]:
    """
    (the problems whose prompts have at most `most` tokens, the token ids of these prompts). The others are named on the
    screen; why: what takes the rest of the context. UserError if they are more than MAX_LEFT_OUT of all.
    """
    prompts = [prompt_ids(tokenizer, p, chat) for p in problems]
    long = [f"{p.id} ({len(ids):,} tokens)" for p, ids in zip(problems, prompts, strict=True) if len(ids) > most]
    if long:
        names = ", ".join(long[:5]) + (f" and {len(long) - 5:,} more" if len(long) > 5 else "")
        words = f"{path}: {len(long):,} of {len(problems):,} prompts are longer than {most:,} tokens ({why}): {names}"
        if len(long) > MAX_LEFT_OUT * len(problems):
            raise UserError(f"{words}; at most {MAX_LEFT_OUT:.0%} of them may be left out")
        if rt.is_main:
            print(shown(f"left out: {words}", lines=False))
    kept = [(p, ids) for p, ids in zip(problems, prompts, strict=True) if len(ids) <= most]
    return [p for p, _ in kept], [ids for _, ids in kept]


def fingerprint(problems: list[Problem]) -> str:
    """16 hex digits that depend on the ids, questions and order of the problems."""
    digest = hashlib.blake2b(digest_size=8)
    for p in problems:
        digest.update(f"{len(p.id)} {p.id} {len(p.question)} {p.question}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


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
    x, rng, means = np.asarray(values, dtype=np.float64), np.random.Generator(np.random.PCG64(seed)), []
    rows = max(1, 2**22 // len(x))               # a few at a time: 2,000 x 130,000 numbers do not fit in memory
    for done in range(0, draws, rows):
        means.append(x[rng.integers(0, len(x), (min(rows, draws - done), len(x)))].mean(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(x.mean()), float(low), float(high)


def summary(graded: list[list[dict]], ks: tuple[int, ...] = (1, 4, 8, 16)) -> dict[str, float]:
    """
    avg@n with its interval, pass@k, mean length (tokens) and truncated share. graded: per problem, per answer a dict
    with passed, tokens and finish; the last digits of the interval depend on the order of the problems.
    """
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

def sample_seed(seed: int, problem: Problem, i: int) -> int:
    """Of answer i: it depends on these three alone, so any subset of problems gives the same answers."""
    rng = random.Random(f"{seed} {problem.id}")
    return [rng.getrandbits(62) for _ in range(i + 1)][i]


def made_with(cfg: Config, ckpt: Path, problems: list[Problem], rt: Runtime) -> dict:
    """All that the answers depend on; a run that is resumed must have the same."""
    files = checkpoint.read_manifest(ckpt)["files"] if (ckpt / "manifest.json").is_file() else {}
    names = ("problems", "limit", "samples", "temperature", "top_p", "max_new_tokens", "seed", "judge_seconds",
             "judge_memory_mb", "judge_output_kb", "judge_tolerance")
    return {"ckpt": str(ckpt), **{name: getattr(cfg, name) for name in names}, "dtype": str(rt.dtype),
            "weights": [files[name][1][:16] for name in sorted(files) if name.startswith("model")],
            "fingerprint of the problems": fingerprint(problems)}


def answer_problems(model: MiMo, tokenizer: Tokenizer, problems: list[Problem], prompts: dict[str, list[int]],
                    stop: tuple[int, ...], cfg: Config, rt: Runtime, answers: Answers) -> None:
    """
    cfg.samples graded answers to every problem that has none, shared out over the ranks, each into `answers` when it is
    finished: {"passed", "verdicts", "text", "tokens", "finish"}. prompts: id of a problem -> token ids; stop: ids that
    end an answer. UserError after SIGTERM, or when another rank fails.
    """
    todo = [p for p in problems if p.id not in answers.done]
    if answers.done and rt.is_main:
        print(f"{len(problems) - len(todo):,} of {len(problems):,} problems were answered before")
    if not todo:
        return answers.close()
    engine = Engine(model, slots=cfg.slots, max_len=max(len(prompts[p.id]) for p in todo) + cfg.max_new_tokens,
                    n_draft=cfg.n_draft, draft_below=cfg.draft_below, kv_tokens=cfg.kv_tokens, n_ids=tokenizer.n_ids)
    sched = Scheduler(len(todo), len(todo), cfg.samples, seed=cfg.seed, alpha=0.0, dynamic=False, reward_lag=None)
    # 16 decode steps between two exchanges: a second or less
    rollout = Rollout(engine, Exchange(rt, 16) if rt.world > 1 else None, cfg.judge_timeout, distributed.stop_here)

    def make_request(task: Task, i: int, _: int) -> Request:
        problem = todo[task.prompt]
        return Request(task.key(i), prompts[problem.id], cfg.max_new_tokens, temperature=cfg.temperature,
                       top_p=cfg.top_p, stop=stop, seed=sample_seed(cfg.seed, problem, i))

    def done(group: Group) -> None:
        if group.rank == rt.rank:
            problem = todo[group.task.prompt]
            answers.add(problem.id, {"id": problem.id, "question": problem.question, "answers": [
                info | {"text": tokenizer.decode(s.tokens, skip_control=True), "tokens": len(s.tokens),
                        "finish": s.finish} for s, info in zip(group.samples, group.infos, strict=True)]})
        group.samples = group.rewards = group.infos = ()     # on the disk now
        answers.done.add(todo[group.task.prompt].id)
        bar.update(1)

    bar = tqdm(total=len(problems), initial=len(problems) - len(todo), unit="problem", desc="eval",
               disable=None if rt.is_main else True)
    judge = Judge(workers=cfg.judge_workers, time_limit=cfg.judge_seconds, memory_mb=cfg.judge_memory_mb,
                  output_kb=cfg.judge_output_kb, tolerance=cfg.judge_tolerance, isolation=cfg.judge_isolation,
                  allow_unsafe=cfg.judge_isolation == "C", cache_size=10_000,
                  quiet=not rt.is_main)
    with bar, closing(answers), judge, closing(Grader(todo, tokenizer, judge, "vanilla")) as grader:
        try:
            rollout.step(sched, grader, make_request, done)
        except Stopped:
            raise UserError(f"stopped (SIGTERM) after {len(answers.done):,} of {len(problems):,} problems; the same "
                            "command goes on with the others") from None
        except Ended as e:
            raise UserError(str(e)) from e
        except BaseException as e:
            with suppress(Ended):                            # the other ranks wait for this one: end them
                rollout.meet(RankState(error=f"rank {rt.rank} failed: {e!r}"))
            raise


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
    engine = Engine(model, slots=1, max_len=longest + n_mtp, n_draft=n_mtp, n_ids=tokenizer.n_ids)
    fast = generate(engine, requests)
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
            "tokens_per_forward": tokens / engine.sequence_steps, "speedup": (t1 - t0) / (t2 - t1),
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
    """
    Mean score of RULER-like probes (greedy), per kind and context length in tokens [report Fig. 4]; for the needles
    also the share of right digits of the first number ("single digits").
    """
    found: dict[str, dict[int, float]] = {}
    stop = stop_ids(tokenizer, True)
    for (length, kind), some in asked.items():
        engine = Engine(model, slots=8, max_len=length, n_ids=tokenizer.n_ids)
        replies = generate(engine, [Request(i, tokenizer.encode(p.prompt), REPLY, temperature=0.0, stop=stop)
                                    for i, p in enumerate(some)])
        texts = [tokenizer.decode(s.tokens, skip_control=True) for s in replies]
        for name, score in ((kind, probes.score), (f"{kind} digits", probes.digits)):
            if score is probes.score or some[0].answers[0].isdigit():
                scores = [score(p, text) for p, text in zip(some, texts, strict=True)]
                found.setdefault(name, {})[length] = sum(scores) / len(scores)
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
