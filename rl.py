"""
Reinforcement learning with verifiable rewards (report section 3.3): GRPO without KL, dynamic sampling, clip-higher,
test-difficulty-driven rewards, the easy data pool, and the Seamless Rollout Engine around it.

    python rl.py config/tiny_rl.py                                 # RL from out/tiny/sft, minutes on a CPU
    python rl.py config/tiny_rl.py --plain --steps=2               # torch code only: slow, every breakpoint is hit
    python rl.py config/tiny_rl_zero.py                            # RL-Zero: from out/tiny/base, no SFT before it
    torchrun --nproc_per_node=8 rl.py config/mimo_7b_rl.py         # 8 GPUs, one launch order (rollout.py)

THE ALGORITHM, one iteration:

    1. sample      for each launched prompt q, pi_old generates a group of G answers o_1 .. o_G; with probability
                   easy_alpha the prompt comes from the pool of problems that were solved G times out of G
    2. reward      r_i in [0, 1]: a maths answer is right or wrong, a program earns by the difficulty of its tests
    3. filter      drop groups whose rewards are all equal; sample on until batch_size groups are left
    4. advantage   A_i = (r_i - mean(r)) / std(r) over the group, the same for every token of o_i              (Eq. 2)
    5. ratio       rho_ij = pi_theta(o_ij | q, o_i<j) / pi_old(o_ij | q, o_i<j) for every generated token
    6. objective   J = 1 / sum_i |o_i|  sum_i sum_j min(rho_ij A_i, clip(rho_ij, 1 - eps_low, 1 + eps_high) A_i) (Eq. 1)
                   i runs over all answers of the mini-batch, or over each group's apart: the field divide_by
    7. update      one AdamW step on -J per mini-batch of groups; then the engine gets the weights: pi_old = pi_theta

Steps 1 to 3 run in the rollout thread (rollout.py, reward.py), steps 4 to 7 in update(). docs/tutorial/grpo.py is the
same algorithm in 60 lines without threads, pool and several processes.

The held-out curve comes from the same rollout thread, engine and ranks (the report's Table 3): a step without training.

The end token is generated and is trained; an answer cut at the length limit gets no end token and reward 0. MTP layers
are frozen (mtp_weight trains them along). Eq. 1 prints one ratio per answer; it is read per token, as in DAPO. The
report is silent on G, eps_low and eps_high, the mix of maths and code in a batch and the points per difficulty level:
ours are marked in Config. config/mimo_7b_rl_0530.py is the later on-policy recipe: one update per batch, and a longest
answer that grows.

What to watch in metrics.jsonl: `heldout` (avg@4 on the valid problems), `reward_launched` (all answers, before groups
are dropped) and `entropy`; never the objective, which is near zero by construction. results/demo has the curves.
"""
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import configurator
import distributed
import kernels
import lora
import mtp
from configurator import UserError
from data.filters import check_references
from data.lock import hold
from data.problems import Problem, read_problems, stop_ids
from distributed import Runtime
from engine import Engine, Request
from eval import fingerprint, fitting, sample_seed, summary
from judge import Judge
from kernels.linear_cross_entropy import logprob_entropy
from lora import LoRA
from metrics import Metrics, check_finite, read_rows
from model import MiMo, ModelConfig
from reward import Grader, nothing_learned
from rollout import Batch, Group, RolloutThread, Scheduler, Task, hash64
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    init: str = "out/tiny/sft"            # checkpoint to start from; a base checkpoint makes it RL-Zero
    out: str = "out/tiny/rl"              # checkpoints and metrics.jsonl go here
    problems: str = "out/tiny/problems/rl.jsonl"     # training problems
    valid: str = "out/tiny/problems/valid.jsonl"     # held-out problems for the curve; "" = none
    steps: int = 40                       # iterations: one batch, then its updates
    batch_size: int = 16                  # groups per iteration [paper 3.3.3: 512]
    mini_batch: int = 16                  # groups per update [paper 3.3.3: 32, so 16 updates; 0530: one]
    group_size: int = 8                   # G, answers per prompt [ours]
    lr: float = 1e-6                      # constant [paper 3.3.3]
    warmup_steps: int = 0                 # linear warm-up, iterations [ours]
    eps_low: float = 0.2                  # Eq. 1 [ours, as DAPO]
    eps_high: float = 0.28                # Eq. 1: upper clip (DAPO's clip-higher), at least eps_low [ours, as DAPO]
    divide_by: Literal["batch", "group"] = "batch"   # whose tokens Eq. 1 divides by: of all answers of the mini-batch
                                          # [DAPO's code], or of each group, then the mean over groups [paper Eq. 1]
    scheme: Literal["vanilla", "strict", "soft"] = "soft"   # code reward [paper 3.3.1]
    easy_alpha: float = 0.1               # probability of drawing from the easy pool [paper 3.3.2]
    dynamic_sampling: bool = True         # drop groups whose rewards are all equal [paper 3.3]
    max_groups: int = 128                 # cap on groups launched per iteration, then train on what is there [ours]
    max_new_tokens: list[tuple[int, int]] = field(default_factory=lambda: [(0, 128)])   # longest answer, tokens; it may
                                          # grow: (from iteration, tokens) each [paper 3.6]
    max_staleness: int = 0                # 0: rollout rests during the update [paper 3.4.1]; 1: one batch ahead [ours]
    is_cap: float = 2.0                   # importance weights are truncated here when max_staleness = 1 [ours]
    reward_lag: int = 16                  # decode steps from the end of a group to the use of its rewards [ours];
                                          # with several processes also the steps between two exchanges
    slots: int = 128                      # answers decoded at a time, per process
    system: str | None = None             # system prompt; "" = an empty system turn, None = what the chat template says
    n_draft: int = 0                      # MTP layers that draft during rollouts; exact, but slower on large batches
    draft_below: int = 0                  # draft only while at most this many answers are in flight; 0 = always
    mtp_weight: float = 0.0               # train the MTP layers along, on trunk states that they cannot change; 0 =
                                          # frozen [paper 2.2]; above 0 [ours]
    judge_workers: int = 2                # sandboxed test runners, per process
    judge_seconds: float = 1.0            # processor seconds a test may take [ours]
    judge_memory_mb: int = 512            # address space of a program, MB [ours]
    judge_output_kb: int = 1024           # output of a program that is read, KB [ours]
    judge_tolerance: float | None = None  # by which floats may differ; None: 1e-9 in calls, not at all in text
    judge_isolation: Literal["auto", "A", "B", "C"] = "auto"   # docs/judge.md; C only for programs you trust
    judge_timeout: float = 600.0          # seconds without any reward, while some are waited for, that end the run
    lora: LoRA = LoRA()                   # adapters on a frozen base instead of all parameters: --lora.rank=16 [ours]
    micro_tokens: int = 8192              # padded tokens per forward of the trainer; never changes the result
    beta1: float = 0.9                    # AdamW [paper 2.3]
    beta2: float = 0.95                   # AdamW [paper 2.3]
    weight_decay: float = 0.0             # AdamW, on matrices only [ours]
    grad_clip: float = 1.0                # global gradient norm [paper 2.3]
    eval_every: int = 10                  # iterations between points of the held-out curve, which begins before the
                                          # first and ends after the last; 0 = no curve
    eval_samples: int = 4                 # answers per held-out problem
    save_every: int = 10                  # iterations between checkpoints
    keep: int = 2                         # checkpoints kept
    seed: int = 1                         # prompts, samples
    threads: int = 1                      # torch threads per process on CPU
    matmul: Literal["fp32", "bf16"] = "fp32"   # products on a CPU: bf16 rounds what goes in, sums are fp32; for AMX
    device: Literal["auto", "cpu", "cuda"] = "auto"   # auto: CUDA when there is one
    timeout: float = 1800.0               # seconds that a rank waits for the others
    checkpointing: Literal["none", "selective", "full"] = "none"   # activation checkpointing
    shard_ranks: int = 0                  # ranks a parameter is sharded over, 0 = all
    reduce_each: bool = False             # reduce-scatter gradients after every micro-batch: saves one fp32 copy of
                                          # them per GPU, costs more communication
    kv_tokens: int = 0                    # tokens in the engine's KV cache; 0 = slots x longest answer
    plain: bool = False                   # torch code only: no C, no Triton; for reading and debugging

    def __post_init__(self):
        configurator.at_least(self, 1, "steps", "batch_size", "mini_batch", "group_size", "slots", "judge_workers",
                              "micro_tokens", "eval_samples", "save_every", "keep", "threads", "is_cap",
                              "judge_memory_mb", "judge_output_kb", "timeout")
        configurator.at_least(self, 0, "lr", "warmup_steps", "easy_alpha", "reward_lag", "n_draft", "weight_decay",
                              "grad_clip", "eval_every", "max_staleness", "shard_ranks", "kv_tokens", "draft_below",
                              "mtp_weight", "seed")
        configurator.at_least(self, 0.01, "judge_seconds", "judge_timeout")
        for name, high in (("easy_alpha", 1), ("max_staleness", 1), ("beta1", 0.999999), ("beta2", 0.999999)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} = {getattr(self, name)} should be from 0 to {round(high)}")
        if self.dynamic_sampling and self.group_size < 2:
            raise ValueError(f"group_size = {self.group_size} has no reward range: dynamic sampling would drop every "
                             "group; should be at least 2")
        if self.max_groups < self.batch_size:
            raise ValueError(f"max_groups = {self.max_groups} should be at least batch_size = {self.batch_size}")
        if not 0 < self.eps_low <= self.eps_high:
            raise ValueError(f"eps_low = {self.eps_low}, eps_high = {self.eps_high}: "
                             "clip-higher needs 0 < eps_low <= eps_high")
        if self.lora.rank and self.mtp_weight:
            raise ValueError(f"lora.rank = {self.lora.rank} freezes the MTP layers, mtp_weight = {self.mtp_weight} "
                             "trains them: should be 0; sft.py --train=mtp trains them afterwards")
        if self.batch_size % self.mini_batch:
            raise ValueError(f"batch_size = {self.batch_size} must be a multiple of "
                             f"mini_batch = {self.mini_batch} (groups)")
        limits = self.max_new_tokens
        if not limits or limits[0][0] != 0 or sorted(limits) != limits or min(tokens for _, tokens in limits) < 1:
            raise ValueError(f"max_new_tokens = {limits} should be [(0, tokens), (iteration, tokens), ...] in order")

    def max_new_tokens_at(self, step: int) -> int:
        """Longest answer in iteration `step`, tokens."""
        return [tokens for start, tokens in self.max_new_tokens if step >= start][-1]

    def evaluates(self, step: int) -> bool:
        """Is there a point of the held-out curve after `step` iterations?"""
        return bool(self.valid and self.eval_every) and (step % self.eval_every == 0 or step == self.steps)


FIXED = ["init", "seed", "system", "lora"]     # what a started run keeps; docs/scale.md has the table


# ---- the loop -------------------------------------------------------------------------------------------------------

def main(cfg: Config, make_scheduler: Callable[..., Scheduler] = Scheduler) -> None:
    """make_scheduler: for the ablations of paper/policy.py."""
    # ---- 1. where we run --------------------------------------------------------------------------------------------
    rt = distributed.setup(threads=cfg.threads, seed=cfg.seed, device=cfg.device, shard_ranks=cfg.shard_ranks,
                           timeout=cfg.timeout, matmul=cfg.matmul)
    kernels.set_plain(cfg.plain)
    run = Path(cfg.out)
    lock = hold(run / "run.lock")                                   # one run, one folder

    # ---- 2. start from cfg.init, or resume --------------------------------------------------------------------------
    ckpt = checkpoint.to_resume(run)
    saved, changed = checkpoint.read_state(ckpt, "scheduler") if ckpt else None, []
    if ckpt:
        checkpoint.same_start(ckpt, cfg.init)
        changed = checkpoint.same_run(ckpt, cfg, FIXED)
    start = ckpt or checkpoint.find(cfg.init)
    shape = configurator.from_dict(ModelConfig, checkpoint.read_shape(start), f"{start}/model.json")
    tokenizer = Tokenizer.load(start)
    if cfg.system is not None:
        tokenizer = tokenizer.with_system(cfg.system)               # goes into the checkpoint: served as trained
    (problems, prompts), (held, held_prompts) = read_all(cfg, shape, start, tokenizer, rt)
    if rt.is_main:
        check_references(cfg.problems, problems, at_most=1000)
    meta = checkpoint_meta(cfg, start, held)
    chat = meta["chat"]
    model = mtp.build(shape, "meta")
    model.mtp_layers.requires_grad_(cfg.mtp_weight > 0)             # frozen in RL [paper 2.2]
    if cfg.lora.rank:
        lora.attach(model, cfg.lora, rt.dtype)
    model = distributed.shard(model, rt, checkpointing=cfg.checkpointing, shard_ranks=cfg.shard_ranks)
    base = lora.base_of(ckpt, cfg.lora) if ckpt else start          # with adapters: what the run began with, frozen
    model = checkpoint.materialise(model, rt, ckpt=base)            # each rank reads its own rows
    if cfg.lora.rank:
        lora.restore(model, ckpt, cfg.seed)
        meta["base"] = lora.identity(base)
    optimizer = distributed.adamw(model, cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay)

    # ---- 3. the two threads: rollout there, updates here ------------------------------------------------------------
    def new_judge() -> Judge:
        return Judge(workers=cfg.judge_workers, time_limit=cfg.judge_seconds, memory_mb=cfg.judge_memory_mb,
                     output_kb=cfg.judge_output_kb, tolerance=cfg.judge_tolerance, isolation=cfg.judge_isolation,
                     allow_unsafe=cfg.judge_isolation == "C", cache_size=10_000,
                     quiet=not rt.is_main)
    judge = new_judge()
    held_judge = new_judge() if held else judge     # its own: no late verdict of training comes up in an evaluation
    grader = Grader(problems, tokenizer, judge, cfg.scheme)
    held_grader = Grader(held, tokenizer, held_judge, cfg.scheme)
    scheduler = make_scheduler(len(problems), cfg.batch_size, cfg.group_size, seed=cfg.seed, alpha=cfg.easy_alpha,
                               dynamic=cfg.dynamic_sampling, max_groups=cfg.max_groups, reward_lag=cfg.reward_lag,
                               problems=fingerprint(problems))
    if saved:
        scheduler.load_state_dict(saved["scheduler"])
        checkpoint.steps_left(ckpt, scheduler.step, cfg.steps)
        checkpoint.load_optimizer(ckpt, model, optimizer)
    first, state = scheduler.step, scheduler.state_dict()
    replica = new_replica(model, rt)
    max_len = max(map(len, prompts + held_prompts)) + max(tokens for _, tokens in cfg.max_new_tokens)
    engine = Engine(replica, slots=cfg.slots, max_len=max_len, n_draft=cfg.n_draft, draft_below=cfg.draft_below,
                    kv_tokens=cfg.kv_tokens, n_ids=tokenizer.n_ids)
    if rt.is_main:
        print(configurator.show(cfg))
        print(f"{len(problems)} problems, {'chat template' if chat else 'plain text (RL-Zero)'}; judge isolation "
              f"{judge.isolation}; {f'resumed at iteration {first} from' if saved else 'starting from'} {start}",
              *(f"  changed: {words}" for words in changed), sep="\n")
    metrics = Metrics(run, resume_at=first, enabled=rt.is_main)
    evaluated = last_evaluation(metrics, rt)        # a run that was stopped in an evaluation begins with it
    stop = stop_ids(tokenizer, chat)
    limits = [cfg.max_new_tokens_at(step) for step in range(max(first, cfg.steps) + 1)]

    def make_request(task: Task, i: int, seed: int) -> Request:
        """Temperature 1 and no top-p: Eq. 1 compares full softmaxes [paper 3.3.3]."""
        return Request(task.key(i), prompts[task.prompt], limits[task.step], temperature=1.0, stop=stop, seed=seed)

    def make_held_request(task: Task, i: int, _: int) -> Request:
        """Temperature 0.6, top-p 0.95 [paper 3.5]; the same random numbers at every point of the curve."""
        return Request(task.key(i), held_prompts[task.prompt], cfg.max_new_tokens[-1][1], temperature=0.6, top_p=0.95,
                       stop=stop, seed=sample_seed(cfg.seed, held[task.prompt], i))

    def evaluation(step: int) -> tuple | None:
        """All held-out problems at once, all graded: one step without dynamic sampling and pool."""
        if not cfg.evaluates(step) or step <= evaluated:
            return None
        return (Scheduler(len(held), len(held), cfg.eval_samples, seed=cfg.seed, alpha=0.0, dynamic=False,
                          reward_lag=None), held_grader, make_held_request)

    # ranks meet every reward_lag decode steps, and at least every 64: some seconds
    exchange = distributed.Exchange(rt, min(max(1, cfg.reward_lag), 64)) if rt.world > 1 else None
    rollout = RolloutThread(scheduler, engine, grader, make_request, cfg.max_staleness, evaluation, last=cfg.steps,
                            exchange=exchange, judge_timeout=cfg.judge_timeout, stop=distributed.stop_here)
    bar = tqdm(total=cfg.steps, initial=first, unit="it", desc="rl", disable=None if rt.is_main else True)

    def save(step: int) -> None:
        checkpoint.save(run, step, model, tokenizer=tokenizer, config=configurator.to_dict(cfg), meta=meta,
                        optimizer=optimizer, keep=cfg.keep, shape=vars(model.cfg), rt=rt, state={"scheduler": state},
                        beside=lora.writer(model, cfg.lora, base))

    # ---- 4. the loop: SIGTERM drops the step in flight, saves what is finished and leaves; the same command goes on --
    with bar, judge, held_judge, closing(grader), closing(held_grader), closing(rollout):
        stopped = bool(evaluation(first)) and not log_heldout(metrics, first, rollout, held)
        for step in range(first, cfg.steps):
            # 4a. a rollout batch, without the groups whose rewards are not known because the judge itself failed
            t0 = time.perf_counter()
            batch = None if stopped else rollout.take()
            if stopped := batch is None:
                if step > first and step % cfg.save_every:
                    save(step)
                break
            state = batch.state
            failed = [g for g in batch.groups if any("JE" in info["verdicts"] for info in g.infos)]
            batch.groups = [g for g in batch.groups if g not in failed]

            # 4b. update
            t1 = time.perf_counter()
            with distributed.waiting_for(f"the update of iteration {step + 1}", rt.timeout):
                stats = update(model, optimizer, batch, cfg, rt, step)

            # 4c. new weights to the engine's replica, while the rollout thread rests; with max_staleness = 1 a copy
            t2 = time.perf_counter()
            if not cfg.max_staleness:
                distributed.fill(replica, distributed.replica_state(model))
            rollout.publish(copied_weights(model, rt) if cfg.max_staleness else None)

            # 4d. log and save
            seconds = {"wait_s": t1 - t0, "update_s": t2 - t1}
            log_iteration(metrics, bar, step, batch, len(failed), stats | seconds, problems, tokenizer, rt)
            stopped = distributed.stop_requested(rt)
            if stopped or step + 1 == cfg.steps or (step + 1) % cfg.save_every == 0:
                save(step + 1)
            if stopped:
                break

            # 4e. held-out curve, by the rollout thread
            if cfg.evaluates(step + 1):
                stopped = not log_heldout(metrics, step + 1, rollout, held)
    if stopped and rt.is_main:
        print("stopped (SIGTERM); the same command goes on")
    distributed.teardown(rt)
    lock.release()


def read_all(cfg: Config, shape: ModelConfig, start: Path, tokenizer: Tokenizer, rt: Runtime) -> list[tuple]:
    """
    Training problems and held-out ones, each (problems, token ids of their prompts), without those whose prompts leave
    no room for the longest answer (eval.fitting). UserError when these are many, or there are fewer MTP layers than
    shall draft or be trained.
    """
    mtp.check_drafts(cfg.n_draft, shape.n_mtp, str(start))
    if cfg.mtp_weight and not shape.n_mtp:
        raise UserError(f"mtp_weight = {cfg.mtp_weight} trains MTP layers, and {start} has none")
    chat = checkpoint.read_meta(start).get("chat", False)
    new = max(tokens for _, tokens in cfg.max_new_tokens)
    why = f"max_new_tokens {new:,} of max_seq_len = {shape.max_seq_len} in {start}"
    return [fitting(path, read_problems(path), tokenizer, chat, shape.max_seq_len - new, why, rt) if path else ([], [])
            for path in (cfg.problems, cfg.valid)]


def last_evaluation(metrics: Metrics, rt: Runtime) -> int:
    """The iteration behind the last point of the held-out curve that rank 0 has logged, -1 before the first."""
    logged = [row["step"] for _, row in read_rows(metrics.path) if "heldout" in row] if rt.is_main else []
    return distributed.all_gather_object(max(logged, default=-1))[0]


def checkpoint_meta(cfg: Config, start: Path, held: list[Problem]) -> dict:
    """
    What a checkpoint tells sample.py: whether it was trained on chats ("single" or "multi" turns), and three questions
    to ask, held-out ones of either kind where there are some.
    """
    meta = checkpoint.read_meta(start)
    kinds = [[p.question for p in held if p.kind == kind] for kind in ("maths", "code")]
    examples = [questions[i] for i in range(3) for questions in kinds if i < len(questions)][:3]
    return {"stage": "rl", "chat": meta.get("chat", False), "init": cfg.init, "turns": meta.get("turns", "single"),
            "examples": examples or meta.get("examples", [])}


def new_replica(model: MiMo, rt: Runtime) -> MiMo:
    """
    A plain copy of the policy in rt.dtype, adapters merged, whatever the trainer is sharded over. A collective under
    FSDP: every rank calls it.
    """
    plain = mtp.build(model.cfg, "meta").to(rt.dtype).to_empty(device=rt.device).requires_grad_(False)
    return distributed.fill(plain, distributed.replica_state(model))


def copied_weights(model: MiMo, rt: Runtime) -> dict[str, Tensor]:
    """The weights as Engine.load() takes them, in rt.dtype; training will not write to them. A collective."""
    return {name: w.to(rt.dtype, copy=True) for name, w in distributed.replica_state(model)}


def log_heldout(metrics: Metrics, step: int, rollout: RolloutThread, held: list[Problem]) -> bool:
    """Write a point of the held-out curve, per kind of problem, to metrics.jsonl. False if there is none (SIGTERM)."""
    t0 = time.perf_counter()
    if (groups := rollout.evaluated()) is None:
        return False
    graded = {g.task.prompt: [info | {"tokens": len(s.tokens), "finish": s.finish}
                              for s, info in zip(g.samples, g.infos, strict=True)] for g in groups}
    metrics.log(step=step, heldout={kind: summary([graded[i] for i, p in enumerate(held) if p.kind == kind])
                                    for kind in sorted({p.kind for p in held})}, heldout_s=time.perf_counter() - t0)
    return True


def log_iteration(metrics: Metrics, bar: tqdm, step: int, batch: Batch, failed: int, numbers: dict,
                  problems: list[Problem], tokenizer: Tokenizer, rt: Runtime) -> None:
    """One line of metrics.jsonl and of the progress bar; every tenth iteration also an answer with its reward."""
    timing = batch.timing
    row = {"step": step + 1, **batch.metrics, **timing, **numbers,
           "decode_tokens_per_second": batch.metrics["tokens"] / timing["rollout_s"]}
    metrics.log(**row)
    if not rt.is_main:
        return
    bar.update(1)
    bar.set_postfix_str(f"reward {row['reward_launched']:.3f} all-0 {row['all0']:.0%} all-1 {row['all1']:.0%} "
                        f"entropy {row.get('entropy', 0):.2f} length {row['length_mean']:.0f} pool {row['pool_size']}")
    if batch.note:
        bar.write("  " + batch.note)
    if note := nothing_learned(row):
        bar.write("  " + note)
    if failed:
        bar.write(f"  {failed} of {failed + len(batch.groups)} groups left out: the judge failed on them twice")
    if timing["judge_wait_s"] > max(1.0, 0.1 * timing["rollout_s"]):
        bar.write(f"  for {timing['judge_wait_s']:.0f} of {timing['rollout_s']:.0f} s all engines rested until late "
                  "rewards came: raise reward_lag or judge_workers")
    g = next((g for g in batch.groups if g.rank == rt.rank), None)
    if step % 10 == 0 and g:
        text = tokenizer.decode(g.samples[0].tokens, skip_control=True)
        bar.write(f"  {problems[g.task.prompt].question!r} -> {text!r}: reward {g.rewards[0]:.2f}")


# ---- the equations, pure functions ----------------------------------------------------------------------------------

def advantages(rewards: list[float]) -> list[float]:
    """
    Eq. 2 for the rewards of one group: population standard deviation, in float64; zeros if all rewards are equal.
    By hand, G = 4, rewards 1 0 0 0: mean 1/4, std sqrt(3)/4, so A = sqrt(3), -1/sqrt(3) three times.
    """
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / std if std > 1e-6 else 0.0 for r in rewards]


def surrogate(logp: Tensor, old: Tensor, A: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """
    The summand of Eq. 1 per token: min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), rho = exp(logp - old), all [N]
    fp32. -> (summand, rho, clipped: where the clip stops the gradient).

    By hand, eps 0.2 / 0.28:

        A     rho    summand
        1     1.5     1.28     clipped: a good token that is already far likelier is not pushed further
        1     0.5     0.5
       -1     0.5    -0.8      clipped: a bad token that is already far less likely is not pushed further
       -1     1.5    -1.5      not clipped: a bad token that became likelier is always pushed back
    """
    rho = (logp - old).exp()
    summand = torch.minimum(rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A)
    clipped = ((A > 0) & (rho > 1 + eps_high)) | ((A < 0) & (rho < 1 - eps_low))
    return summand, rho, clipped


# ---- samples -> tensors ---------------------------------------------------------------------------------------------

@dataclass
class Trajectory:
    """One answer to one prompt: what the trainer needs of it."""
    prompt: list[int]                    # token ids
    tokens: list[int]                    # generated token ids, the end token included
    rollout_logprobs: list[float]        # log-prob of each generated token when the engine sampled it
    A: float                             # advantage
    share: float = 1.0                   # weight of each of its tokens in Eq. 1: one over what divide_by names
    old: Tensor | None = None            # [len(tokens)] the trainer's log-probs under pi_old, where they are needed


NOTHING = [Trajectory([0], [0], [0.0], 0.0, 0.0)]       # advantage 0: a forward and backward that add nothing


def mini_batches(groups: list[Group], cfg: Config, step: int, rt: Runtime) -> list[list[Trajectory]]:
    """
    This rank's trajectories of each of the batch_size / mini_batch mini-batches. Groups are shuffled once and never
    cut. The answers of a mini-batch, sorted by length, go to the ranks in turn, whichever rank generated them
    (group.rank): each rank trains on about as many tokens. A collective: prompts, answers and log-probs travel, 8 bytes
    per token of an answer; lengths and rewards are known on every rank.
    """
    groups = sorted(groups, key=lambda g: hash64(cfg.seed, "order", step, g.task.index))
    n = cfg.batch_size // cfg.mini_batch
    ends = [len(groups) * i // n for i in range(n + 1)]             # the judge or the cap may have left fewer groups
    mine, parts, sizes = [], [[torch.empty(0, dtype=torch.int32)] for _ in range(rt.world)], [0] * rt.world
    for a, b in zip(ends, ends[1:], strict=False):
        lengths = [sum(len(s.tokens) for s in g.samples) for g in groups[a:b]]                  # sum_i |o_i| per group
        answers = [(g.rank, s, A, 1 / sum(lengths) if cfg.divide_by == "batch" else 1 / (length * len(lengths)))
                   for g, length in zip(groups[a:b], lengths, strict=True)
                   for s, A in zip(g.samples, advantages(g.rewards), strict=True)]
        answers.sort(key=lambda x: len(x[1].prompt) + len(x[1].tokens))
        mine.append(answers[rt.rank::rt.world])
        for i, (source, s, _, _) in enumerate(answers):
            if source == rt.rank:                                   # this rank has the tokens: send them
                ids = torch.tensor([*s.prompt, *s.tokens], dtype=torch.int32)
                parts[i % rt.world] += [ids, torch.tensor(s.logprobs, dtype=torch.float32).view(torch.int32)]
            if i % rt.world == rt.rank:                             # this rank trains on it: receive it
                sizes[source] += len(s.prompt) + 2 * len(s.tokens)
    received, at = distributed.all_to_all([torch.cat(p) for p in parts], sizes, rt), [0] * rt.world
    out = []
    for answers in mine:
        out.append([])
        for source, s, A, share in answers:
            P, N, begin = len(s.prompt), len(s.tokens), at[source]
            at[source] += P + 2 * N
            prompt, tokens, logprobs = received[source][begin:at[source]].split([P, N, N])
            out[-1].append(Trajectory(prompt.tolist(), tokens.tolist(), logprobs.view(torch.float32).tolist(), A,
                                      share))
    return out


def pack(trajectories: list[Trajectory], micro_tokens: int, rt: Runtime) -> list[list[Trajectory]]:
    """
    Micro-batches: trajectories of similar length together, at most micro_tokens padded tokens each (one that is longer
    stands alone), every trajectory in exactly one. Where this rank has fewer micro-batches than another it gets NOTHING
    at the end, because each forward is a collective under FSDP.
    """
    micros: list[list[Trajectory]] = []
    for t in sorted(trajectories, key=lambda t: len(t.prompt) + len(t.tokens)):
        widest = len(t.prompt) + len(t.tokens)
        if not micros or widest * (len(micros[-1]) + 1) > micro_tokens:
            micros.append([])
        micros[-1].append(t)
    most = int(distributed.all_reduce(torch.tensor(len(micros), device=rt.device), rt, "max"))
    return micros + [NOTHING] * (most - len(micros))


def padded(trajectories: list[Trajectory], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """
    -> (ids [B,T] of prompts and answers, padded on the right, where causal attention never sees it; [N] the flat index
    of the position before each generated token, one trajectory after the other, N = sum of |o_i|).
    """
    T = max(len(t.prompt) + len(t.tokens) for t in trajectories)
    ids = torch.zeros(len(trajectories), T, dtype=torch.long)       # [B,T]
    for b, t in enumerate(trajectories):
        ids[b, :len(t.prompt) + len(t.tokens)] = torch.tensor(t.prompt + t.tokens)
    at = torch.cat([b * T + torch.arange(len(t.prompt) - 1, len(t.prompt) + len(t.tokens) - 1)
                    for b, t in enumerate(trajectories)])           # [N]
    return ids.to(device), at.to(device)


def token_logprobs(model: MiMo, trajectories: list[Trajectory], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """
    log pi(o_ij | q, o_i<j) and entropy, in nats, of every generated token, one trajectory after the other: ([N], [N])
    fp32, N = sum of |o_i|.
    """
    ids, at = padded(trajectories, device)
    return logprobs_at(model, model(ids), ids, at)


def logprobs_at(model: MiMo, h: Tensor, ids: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the trunk's states h [B,T,D] before the final norm; ids [B,T] and at [N]: of padded()."""
    x = model.norm(h).flatten(0, 1)[at]                             # [B,T,D] -> [N,D]
    targets = ids.flatten()[at + 1]                                 # [N]
    return logprob_entropy(x, model.lm_head.weight, targets)


def mtp_loss(model: MiMo, h: Tensor, ids: Tensor, at: Tensor) -> Tensor:
    """Cross-entropy of the MTP layers, summed over the generated tokens, mean over the layers; arguments as above."""
    B, T, n = *ids.shape, len(model.mtp_layers)
    trained = torch.zeros(B * T, dtype=torch.long, device=ids.device).index_fill(0, at + 1, 1).view(B, T)
    ids, trained = (F.pad(x, (0, n + 1)) for x in (ids, trained))   # [B,T+1+n]
    _, *targets = mtp.mtp_targets(ids, torch.zeros_like(ids), T, n, trained)
    return sum(mtp.layer_losses(model, h, ids, targets, frozen_trunk=True)) / n


# ---- the updates of one batch ---------------------------------------------------------------------------------------

def update(model: MiMo, optimizer: torch.optim.Optimizer, batch: Batch, cfg: Config, rt: Runtime, step: int) -> dict:
    """
    Steps 4 to 7 of the algorithm: all updates of one batch, the same on every rank. -> numbers for the log, averaged
    over the tokens of all ranks. A rank may have fewer trajectories than another, or none.
    """
    # 4. advantage (Eq. 2), and the trajectories that this rank trains on, in mini-batches of whole groups
    minis = mini_batches(batch.groups, cfg, step, rt)
    # 5. ratio, the denominator: log-probs under pi_old. With a single update pi_old is the policy that is trained
    if len(minis) > 1 or cfg.max_staleness:
        remember_old(model, [t for mini in minis for t in mini], cfg, rt)
    sums, largest, norms = torch.zeros(9, device=rt.device), torch.zeros(2, device=rt.device), []
    for mini in minis:
        count = torch.tensor(float(sum(len(t.tokens) for t in mini)), device=rt.device)
        count = distributed.all_reduce(count, rt)               # sum_i |o_i| over all ranks
        if count == 0:
            continue
        micros = pack(mini, cfg.micro_tokens, rt)
        for m, micro in enumerate(micros):
            # 5. ratio, the numerator: log-probs under the policy that is trained
            ids, at = padded(micro, rt.device)                                          # [B,T], [N]
            h = model(ids)                                                              # [B,T,D]
            logp, entropy = logprobs_at(model, h, ids, at)                              # [N], [N]
            # 6. objective (Eq. 1) and its gradient. With a single update rho = 1 exactly: the plain policy gradient
            n = torch.tensor([len(t.tokens) for t in micro], device=rt.device)
            A, share = torch.tensor([[t.A, t.share] for t in micro], device=rt.device).repeat_interleave(n, 0).T  # [N]
            old = logp.detach() if micro[0].old is None else torch.cat([t.old for t in micro])      # [N]
            rollout_logprobs = torch.tensor([x for t in micro for x in t.rollout_logprobs], device=rt.device)
            summand, rho, clipped = surrogate(logp, old, A, cfg.eps_low, cfg.eps_high)
            if cfg.max_staleness:                                   # truncated importance weights [ours]
                summand = summand * (old - rollout_logprobs).exp().clamp_max(cfg.is_cap)
            distributed.sync_gradients(model, m == len(micros) - 1 or cfg.reduce_each, rt)
            loss, extra = -(share * summand).sum() * rt.world, torch.zeros_like(count)  # FSDP averages over ranks; the
            if cfg.mtp_weight:                                                          # shares are global
                extra = mtp_loss(model, h, ids, at)                 # its gradients end in the MTP layers [ours]
                loss = loss + cfg.mtp_weight * (extra / count) * rt.world
            loss.backward()
            if micro is not NOTHING:
                with torch.no_grad():
                    diff = old - rollout_logprobs                   # trainer and engine at one policy: rounding only
                    sums += torch.stack([torch.ones_like(logp).sum(), entropy.sum(), rho.sum(), summand.sum(),
                                         (clipped & (A < 0)).sum(), (clipped & (A > 0)).sum(), diff.abs().sum(),
                                         (diff.exp() - 1 - diff).sum(), extra])
                    largest = torch.maximum(largest, torch.stack([rho.max(), diff.abs().max()]))
        # 7. update: clip the gradient norm, one step of AdamW
        distributed.average_gradients(model, rt)
        trunk = [p for name, p in model.named_parameters() if not name.startswith("mtp_layers.")]
        norm = distributed.clip_grad_norm(trunk, cfg.grad_clip)     # apart: the trunk moves as without mtp_weight
        distributed.clip_grad_norm(model.mtp_layers.parameters(), cfg.grad_clip)
        check_finite({"gradient norm": norm}, model, step)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else cfg.lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        norms.append(norm)
    if not norms:
        return {"updates": 0}
    tokens, *means = distributed.all_reduce(sums, rt).tolist()
    ratio_max, diff_max = distributed.all_reduce(largest, rt, "max").tolist()
    names = ("entropy", "ratio", "objective", "clip_low", "clip_high", "logprob_diff", "rollout_kl", "mtp_loss")
    return {"updates": len(norms), "grad_norm": sum(norms) / len(norms), "ratio_max": ratio_max,
            "logprob_diff_max": diff_max, "trained_tokens": int(tokens),
            **{name: v / tokens for name, v in zip(names, means, strict=True)
               if name != "mtp_loss" or cfg.mtp_weight}}


@torch.no_grad()
def remember_old(model: MiMo, trajectories: list[Trajectory], cfg: Config, rt: Runtime) -> None:
    """Set .old of each trajectory: its log-probs under pi_old, the policy before the first update."""
    for micro in pack(trajectories, cfg.micro_tokens, rt):
        logp, _ = token_logprobs(model, micro, rt.device)
        if micro is NOTHING:                                        # shared by all updates: it remembers nothing
            continue
        for t, old in zip(micro, logp.split([len(t.tokens) for t in micro]), strict=True):
            t.old = old


if __name__ == "__main__":
    configurator.run(main, Config)
