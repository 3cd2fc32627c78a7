"""
Reinforcement learning with verifiable rewards (report section 3.3): GRPO without KL, dynamic sampling, clip-higher,
test-difficulty-driven rewards, the easy data pool, and the Seamless Rollout Engine around it.

    python rl.py config/tiny_rl.py                                 # RL from out/tiny/sft, minutes on a CPU
    python rl.py config/tiny_rl_zero.py                            # RL-Zero: from out/tiny/base, no SFT before it
    torchrun --nproc_per_node=8 rl.py config/mimo_7b_rl.py         # 8 GPUs, one launch order (rollout.py)

One iteration: the rollout thread (rollout.py) delivers `batch_size` groups of G answers to one prompt each, all with a
reward range above zero; here they get advantages (Eq. 2) and the policy is updated on mini-batches of whole groups
(Eq. 1):

    A_ij = (r_i - mean(r)) / std(r)                                                      over the group   (Eq. 2)
    J    = 1 / sum_i |o_i|  sum_i sum_j  min( rho_ij A_ij,  clip(rho_ij, 1 - eps_low, 1 + eps_high) A_ij )   (Eq. 1)
    rho_ij = pi_theta(o_ij | q, o_i<j) / pi_old(o_ij | q, o_i<j)        per token; Eq. 1 prints it per answer

The end token is generated and is trained; an answer cut at the length limit gets no end token and reward 0. MTP layers
are frozen. The report is silent on G, eps_low and eps_high, the mix of maths and code in a batch and the points per
difficulty level: ours are marked in Config. config/mimo_7b_rl_0530.py is the later on-policy recipe: one update per
batch and a growing limit on the answer's length.

What to watch in metrics.jsonl: `heldout` (avg@4 on the valid problems), `reward_launched` (all answers, before groups
are dropped) and `entropy`; never the objective, which is near zero by construction. results/demo has the curves.
"""
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import configurator
import distributed
import mtp
from configurator import UserError
from data.problems import prompt_ids, read_problems, stop_ids
from engine import Engine, Request
from eval import solve, summary
from judge import Judge
from kernels.linear_cross_entropy import logprob_entropy
from metrics import Metrics, check_finite
from model import MiMo, ModelConfig
from reward import Grader
from rollout import Group, RolloutThread, Scheduler, hash64
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
    eps_high: float = 0.28                # clip-higher: above eps_low [ours, as DAPO]
    scheme: Literal["vanilla", "strict", "soft"] = "soft"   # code reward [paper 3.3.1]
    easy_alpha: float = 0.1               # probability of drawing from the easy pool [paper 3.3.2]
    dynamic_sampling: bool = True         # drop groups whose rewards are all equal [paper 3.3]
    max_groups: int = 128                 # cap on groups launched per iteration, then train on what is there [ours]
    max_new_tokens: list[tuple[int, int]] = field(default_factory=lambda: [(0, 128)])   # (from iteration, tokens) [paper 3.6]
    max_staleness: int = 0                # 0: rollout rests during the update [paper 3.4.1]; 1: one batch ahead [ours]
    is_cap: float = 2.0                   # truncation of the importance weights when max_staleness = 1 [ours]
    reward_lag: int = 16                  # decode steps between the end of a group and the use of its rewards [ours];
                                          # several processes: also between two exchanges of what ended
    slots: int = 128                      # answers decoded at a time, per process
    n_draft: int = 0                      # MTP layers that draft during rollouts; exact, but slower on large batches
    judge_workers: int = 2                # sandboxed test runners
    micro_tokens: int = 8192              # tokens per forward of the trainer; never changes the result
    beta1: float = 0.9                    # AdamW [paper 2.3]
    beta2: float = 0.95                   # AdamW [paper 2.3]
    weight_decay: float = 0.0             # [ours]
    grad_clip: float = 1.0                # global gradient norm [paper 2.3]
    eval_every: int = 10                  # iterations between points of the held-out curve, 0 = never
    eval_samples: int = 4                 # answers per held-out problem
    save_every: int = 10                  # iterations between checkpoints
    keep: int = 2                         # checkpoints kept
    seed: int = 1                         # prompts, samples
    threads: int = 1                      # torch threads per process on CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"   # auto: CUDA when there is one
    checkpointing: Literal["none", "selective", "full"] = "none"   # activation checkpointing
    shard_ranks: int = 0                  # ranks a parameter is sharded over, 0 = all
    reduce_each: bool = False             # FSDP reduces every micro-batch: 4 bytes x parameters less, more traffic
    kv_tokens: int = 0                    # tokens in the engine's KV cache on a GPU; 0 = slots x longest answer

    def __post_init__(self):
        configurator.at_least(self, 1, "steps", "batch_size", "mini_batch", "group_size", "slots", "judge_workers",
                              "micro_tokens", "eval_samples", "save_every", "keep", "threads", "is_cap")
        configurator.at_least(self, 0, "lr", "warmup_steps", "easy_alpha", "reward_lag", "n_draft", "weight_decay",
                              "grad_clip", "eval_every", "max_staleness", "shard_ranks", "kv_tokens")
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
        if self.batch_size % self.mini_batch:
            raise ValueError(f"batch_size = {self.batch_size} must be a multiple of "
                             f"mini_batch = {self.mini_batch} (groups)")
        if not self.max_new_tokens or self.max_new_tokens[0][0] != 0 or sorted(self.max_new_tokens) != self.max_new_tokens \
                or min(tokens for _, tokens in self.max_new_tokens) < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens} should be [(0, tokens), (iteration, tokens), ...] in order")

    def max_new_tokens_at(self, step: int) -> int:
        return [tokens for start, tokens in self.max_new_tokens if step >= start][-1]


# ---- the equations, pure functions ---------------------------------------------------------------------------------

def advantages(rewards: list[float]) -> list[float]:
    """
    Eq. 2, population standard deviation, in float64; zeros for a group without a reward range.
    By hand, G = 4, rewards 1 0 0 0: mean 1/4, std sqrt(3)/4, so A = sqrt(3), -1/sqrt(3) three times.
    """
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / std if std > 1e-6 else 0.0 for r in rewards]


def surrogate(logp: Tensor, old: Tensor, A: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """
    The summand of Eq. 1 per token: min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), rho = exp(logp - old), all [N]
    fp32. -> (summand, rho, clipped: where the clip stops the gradient).

    By hand, eps 0.2 / 0.28: A = 1, rho = 1.5 gives 1.28 (clipped); A = -1, rho = 1.5 gives -1.5 (not clipped: a bad
    token that became likelier is always pushed back); A = -1, rho = 0.5 gives -0.8 (clipped); A = 1, rho = 0.5 gives
    0.5 (not clipped).
    """
    rho = (logp - old).exp()
    summand = torch.minimum(rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A)
    clipped = ((A > 0) & (rho > 1 + eps_high)) | ((A < 0) & (rho < 1 - eps_low))
    return summand, rho, clipped


# ---- samples -> tensors --------------------------------------------------------------------------------------------

@dataclass
class Trajectory:
    """One answer: what the trainer needs of it."""
    prompt: list[int]
    tokens: list[int]
    rollout_logprobs: list[float]        # the engine's log-probs
    A: float
    old: Tensor | None = None     # trainer log-probs under pi_old, [len(tokens)]


def mini_batches(groups: list[Group], cfg: Config, step: int, rt) -> list[list[Trajectory]]:
    """
    This rank's rows of the batch_size / mini_batch mini-batches, in which groups, shuffled once, are never cut. The
    answers of a mini-batch, sorted by length, are dealt to the ranks one by one, whoever generated them (group.rank):
    each trains on about as many tokens. A collective: prompts, answers and log-probs travel, 8 bytes per token of an
    answer; their lengths and rewards are known everywhere.
    """
    groups = sorted(groups, key=lambda g: hash64(cfg.seed, "order", step, g.task.index))
    n = cfg.batch_size // cfg.mini_batch
    ends = [len(groups) * i // n for i in range(n + 1)]             # the judge or the cap may have left fewer groups
    pieces, parts, sizes = [], [[torch.empty(0, dtype=torch.int32)] for _ in range(rt.world)], [0] * rt.world
    for a, b in zip(ends, ends[1:], strict=False):
        answers = [(g.rank, s, A) for g in groups[a:b] for s, A in zip(g.samples, advantages(g.rewards), strict=True)]
        answers.sort(key=lambda x: len(x[1].prompt) + len(x[1].tokens))
        pieces.append(answers[rt.rank::rt.world])
        for i, (home, s, _) in enumerate(answers):
            if home == rt.rank:
                ids = torch.tensor([*s.prompt, *s.tokens], dtype=torch.int32)
                parts[i % rt.world] += [ids, torch.tensor(s.logprobs, dtype=torch.float32).view(torch.int32)]
            if i % rt.world == rt.rank:
                sizes[home] += len(s.prompt) + 2 * len(s.tokens)
    came, at = distributed.all_to_all([torch.cat(p) for p in parts], sizes, rt), [0] * rt.world
    out = []
    for piece in pieces:
        out.append([])
        for home, s, A in piece:
            P, N, start = len(s.prompt), len(s.tokens), at[home]
            at[home] += P + 2 * N
            prompt, tokens, logprobs = came[home][start:at[home]].split([P, N, N])
            out[-1].append(Trajectory(prompt.tolist(), tokens.tolist(), logprobs.view(torch.float32).tolist(), A))
    return out


def pack(rows: list[Trajectory], micro_tokens: int) -> list[list[Trajectory]]:
    """Rows of similar length together, at most micro_tokens padded tokens each; every row in exactly one."""
    out, widest = [], 0
    for row in sorted(rows, key=lambda r: len(r.prompt) + len(r.tokens)):
        widest = len(row.prompt) + len(row.tokens)
        if not out or widest * (len(out[-1]) + 1) > micro_tokens:
            out.append([])
        out[-1].append(row)
    return out


def token_logprobs(model: MiMo, rows: list[Trajectory], device) -> tuple[Tensor, Tensor]:
    """
    log pi(o_ij | q, o_i<j) and entropy of every generated token, one after the other: ([N], [N]) fp32,
    N = sum of |o_i|. Padding is on the right, where causal attention never sees it.
    """
    width = max(len(r.prompt) + len(r.tokens) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for b, r in enumerate(rows):
        ids[b, :len(r.prompt) + len(r.tokens)] = torch.tensor(r.prompt + r.tokens)
    at = torch.cat([b * width + torch.arange(len(r.prompt) - 1, len(r.prompt) + len(r.tokens) - 1)
                    for b, r in enumerate(rows)])                   # the position before each generated token
    ids = ids.to(device)
    h = model(ids)                                                  # [B,T,D]
    x = model.norm(h).flatten(0, 1)[at.to(device)]                  # [B,T,D] -> [N,D]
    targets = ids.flatten()[at.to(device) + 1]
    return logprob_entropy(x, model.lm_head.weight, targets)


def main(cfg: Config) -> None:
    # ---- start or resume -----------------------------------------------------------------------------------------
    rt = distributed.setup(threads=cfg.threads, seed=cfg.seed, device=cfg.device, shard_ranks=cfg.shard_ranks)
    run = Path(cfg.out)
    ckpt = checkpoint.latest(run)
    saved = checkpoint.read_state(ckpt, "scheduler") if ckpt else None
    if ckpt:
        checkpoint.same_start(ckpt, cfg.init)
    start = ckpt or checkpoint.find(cfg.init)
    shape = configurator.from_dict(ModelConfig, checkpoint.read_shape(start), f"{start}/model.json")
    tokenizer = Tokenizer.load(start)
    problems = read_problems(cfg.problems)
    held = read_problems(cfg.valid) if cfg.valid else []
    model = mtp.build(shape, "meta")
    model.mtp_layers.requires_grad_(False)                          # frozen in RL [paper 2.2]
    model = distributed.shard(model, rt, checkpointing=cfg.checkpointing, shard_ranks=cfg.shard_ranks)
    model = checkpoint.materialise(model, rt, ckpt=start)              # each rank reads its own rows
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                                  fused=True)
    chat = checkpoint.read_meta(start).get("chat", False)
    prompts = [prompt_ids(tokenizer, p, chat) for p in problems]
    prompt_len, new = max(map(len, prompts)), max(tokens for _, tokens in cfg.max_new_tokens)
    if prompt_len + new > shape.max_seq_len:
        raise UserError(f"{cfg.problems}: longest prompt {prompt_len} + {new} new tokens exceed "
                        f"the context of {start}, max_seq_len = {shape.max_seq_len}")
    longest = max([len(prompt_ids(tokenizer, p, chat)) for p in held] or [0])
    if longest + new > shape.max_seq_len:
        raise UserError(f"{cfg.valid}: longest prompt {longest} + {new} new tokens exceed the context of {start}, "
                        f"max_seq_len = {shape.max_seq_len}")
    if not 0 <= cfg.n_draft <= shape.n_mtp:
        raise UserError(f"n_draft = {cfg.n_draft} should be 0 to {shape.n_mtp}, the MTP layers of {start}")

    # ---- the two threads: rollout there, updates here ---------------------------------------------------------------
    judge = Judge(workers=cfg.judge_workers, cache_size=10_000)
    grader = Grader(problems, tokenizer, judge, cfg.scheme)
    scheduler = Scheduler(len(problems), cfg.batch_size, cfg.group_size, seed=cfg.seed, alpha=cfg.easy_alpha,
                          dynamic=cfg.dynamic_sampling, max_groups=cfg.max_groups, reward_lag=cfg.reward_lag)
    if saved:
        scheduler.load_state_dict(saved["scheduler"])
        checkpoint.load_optimizer(ckpt, model, optimizer)
    # a plain copy decodes, whatever the trainer is sharded over
    replica = distributed.fill(distributed.replica(model, rt.device, rt.dtype), distributed.replica_state(model))
    engine = Engine(replica, slots=cfg.slots, max_len=prompt_len + new, n_draft=cfg.n_draft,
                    kv_tokens=cfg.kv_tokens or None, n_ids=tokenizer.n_ids)

    def make_request(task, i: int, seed: int) -> Request:
        return Request(task.key(i), prompts[task.prompt], cfg.max_new_tokens_at(task.step), temperature=1.0,    # Eq. 1 compares full softmaxes
                       stop=stop_ids(tokenizer, chat), seed=seed)

    if rt.is_main:
        print(configurator.show(cfg))
        print(f"{len(problems)} problems, {'chat template' if chat else 'plain text (RL-Zero)'}; "
              f"judge isolation {judge.isolation}" + (f"; resumed at iteration {scheduler.step} from {ckpt}" if saved
                                              else f"; starting from {start}"))
    metrics = Metrics(run, resume_at=scheduler.step, enabled=rt.is_main)
    bar = tqdm(total=cfg.steps, initial=scheduler.step, unit="it", desc="rl", disable=None if rt.is_main else True)
    if held and not saved and rt.is_main:
        metrics.log(step=0, heldout=evaluate(replica, tokenizer, held, chat, cfg))
    # each rank's thread decodes by itself, reward_lag steps at a time: what ends in one such round has its rewards used
    # at the end of the next
    exchange = distributed.Exchange(rt, max(1, cfg.reward_lag)) if rt.world > 1 else None
    rollout = RolloutThread(scheduler, engine, grader, make_request, max_staleness=cfg.max_staleness,
                            exchange=exchange)

    # ---- the loop ----------------------------------------------------------------------------------------------------
    try:
        for step in range(scheduler.step, cfg.steps):
            t0 = time.perf_counter()
            batch = rollout.take()
            t1 = time.perf_counter()
            if batch.note and rt.is_main:
                bar.write("  " + batch.note)
            broken = [g for g in batch.groups if any("JE" in info["verdicts"] for info in g.infos)]
            if broken:                                              # the judge failed: no reward is known
                if rt.is_main:
                    bar.write(f"  {len(broken)} of {len(batch.groups)} groups left out: the judge failed on them twice")
                batch.groups = [g for g in batch.groups if g not in broken]
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else cfg.lr
            stats = update(model, optimizer, batch, cfg, rt, step)
            t2 = time.perf_counter()
            # while the thread rests (max_staleness 0) its replica takes the new weights one parameter at a time, each
            # cast to the replica's dtype; while it decodes (1), they are published as a second copy in that dtype
            if not cfg.max_staleness:
                distributed.fill(replica, distributed.replica_state(model))
            heldout = {}
            if held and cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps):
                twin = replica
                if cfg.max_staleness:
                    twin = distributed.fill(distributed.replica(model, rt.device, rt.dtype), distributed.replica_state(model))
                heldout = {"heldout": evaluate(twin, tokenizer, held, chat, cfg)} if rt.is_main else {}
            if step + 1 < cfg.steps:
                weights = distributed.replica_state(model)
                rollout.publish({name: w.to(rt.dtype, copy=True) for name, w in weights} if cfg.max_staleness else None)
            verdicts = Counter(v for g in batch.groups for info in g.infos for v in info["verdicts"])
            samples = [s for g in batch.groups for s in g.samples]
            lengths = sorted(len(s.tokens) for s in samples) or [0]
            row = dict(step=step + 1, **batch.metrics, **batch.timing, **stats, verdicts=dict(verdicts),
                       length_mean=sum(lengths) / len(lengths), length_p95=lengths[int(0.95 * (len(lengths) - 1))],
                       truncated=sum(s.finish == "length" for s in samples) / max(1, len(samples)),
                       wait_s=t1 - t0, update_s=t2 - t1, heldout_s=time.perf_counter() - t2,
                       decode_tokens_per_second=batch.metrics["tokens"] / batch.timing["rollout_s"], **heldout)
            metrics.log(**row)
            bar.update(1)
            bar.set_postfix_str(f"reward {row['reward_launched']:.3f} all-0 {row['all0']:.0%} all-1 {row['all1']:.0%} "
                                f"entropy {stats.get('entropy', 0):.2f} length {row['length_mean']:.0f} "
                                f"pool {row['pool_size']}")
            g = next((g for g in batch.groups if g.rank == rt.rank), None)
            if step % 10 == 0 and g and rt.is_main:
                text = tokenizer.decode(g.samples[0].tokens, skip_control=True)
                bar.write(f"  {problems[g.task.prompt].question!r} -> {text!r}: reward {g.rewards[0]:.2f}")
            stop = distributed.stop_requested(rt)
            if stop or step + 1 == cfg.steps or (step + 1) % cfg.save_every == 0:
                checkpoint.save(run, step + 1, model, tokenizer=tokenizer, config=configurator.to_dict(cfg),
                                        meta={"stage": "rl", "chat": chat, "init": cfg.init}, optimizer=optimizer,
                                        keep=cfg.keep, shape=vars(model.cfg), rt=rt,
                                        state={"scheduler": batch.state})
            if stop:
                break
    finally:
        rollout.close()
        grader.close()
        judge.close()
        bar.close()
    distributed.teardown(rt)


def update(model: MiMo, optimizer, batch, cfg: Config, rt, step: int) -> dict:
    """
    All updates of one batch (Eq. 1), the same on every rank. -> numbers for the log, averaged over the tokens of all
    ranks. A rank may have fewer rows or micro-batches than another; where it has none left it runs NOTHING, a row that
    adds 0, because each forward is a collective under FSDP.
    """
    pieces = mini_batches(batch.groups, cfg, step, rt)
    if len(pieces) > 1 or cfg.max_staleness:
        remember_old(model, [r for piece in pieces for r in piece], cfg, rt)
    sums, worst, norms = torch.zeros(8, device=rt.device), torch.zeros(2, device=rt.device), []
    for piece in pieces:
        count = torch.tensor(float(sum(len(r.tokens) for r in piece)), device=rt.device)
        count = distributed.all_reduce_sum(count, rt)                   # sum_i |o_i|
        if count == 0:
            continue
        parts = same_number(pack(piece, cfg.micro_tokens), rt)
        for m, micro in enumerate(parts):
            logp, entropy = token_logprobs(model, micro, rt.device)
            n = torch.tensor([len(r.tokens) for r in micro], device=rt.device)
            A = torch.tensor([r.A for r in micro], device=rt.device).repeat_interleave(n)   # [N]
            rollout_logprobs = torch.tensor([x for r in micro for x in r.rollout_logprobs], device=rt.device)
            # one update per batch: pi_old is this very forward, rho = 1 exactly, its gradient is the policy gradient
            old = logp.detach() if micro[0].old is None else torch.cat([r.old for r in micro])
            summand, rho, clipped = surrogate(logp, old, A, cfg.eps_low, cfg.eps_high)
            if cfg.max_staleness:                                   # truncated importance weights [ours]
                summand = summand * (old - rollout_logprobs).exp().clamp_max(cfg.is_cap)
            distributed.sync_gradients(model, m == len(parts) - 1 or cfg.reduce_each, rt)
            (-(summand.sum() / count) * rt.world).backward()
            if micro is not NOTHING:
                with torch.no_grad():
                    gap = old - rollout_logprobs                           # engine and trainer at one policy: rounding only
                    sums += torch.stack([torch.ones_like(logp).sum(), entropy.sum(), rho.sum(), summand.sum(),
                                         (clipped & (A < 0)).sum(), (clipped & (A > 0)).sum(), gap.abs().sum(),
                                         (gap.exp() - 1 - gap).sum()])
                    worst = torch.maximum(worst, torch.stack([rho.max(), gap.abs().max()]))
        distributed.average_gradients(model, rt)
        norm = distributed.clip_grad_norm(model, cfg.grad_clip)
        check_finite({"gradient norm": norm}, model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        norms.append(norm)
    if not norms:
        return {"updates": 0}
    tokens, *means = distributed.all_reduce_sum(sums, rt).tolist()
    worst = distributed.all_reduce_max(worst, rt)
    names = ("entropy", "ratio", "objective", "clip_low", "clip_high", "engine_gap", "engine_kl")
    return {"updates": len(norms), "grad_norm": sum(norms) / len(norms), "ratio_max": float(worst[0]),
            "engine_gap_max": float(worst[1]), "trained_tokens": int(tokens),
            **{name: v / tokens for name, v in zip(names, means, strict=True)}}


@torch.no_grad()
def remember_old(model: MiMo, rows: list[Trajectory], cfg: Config, rt) -> None:
    """Fill row.old: log-probs under pi_old, the policy before the first update."""
    for micro in same_number(pack(rows, cfg.micro_tokens), rt):
        logp, _ = token_logprobs(model, micro, rt.device)
        if micro is NOTHING:                                        # shared by all updates: it remembers nothing
            continue
        for row, old in zip(micro, logp.split([len(r.tokens) for r in micro]), strict=True):
            row.old = old


NOTHING = [Trajectory([0], [0], [0.0], 0.0)]       # advantage 0: a forward and backward that add nothing


def same_number(parts: list[list[Trajectory]], rt) -> list[list[Trajectory]]:
    """parts, padded with NOTHING to the largest number on any rank."""
    most = int(distributed.all_reduce_max(torch.tensor(len(parts), device=rt.device), rt))
    return parts + [NOTHING] * (most - len(parts))


def evaluate(model: MiMo, tokenizer, problems, chat: bool, cfg: Config) -> dict[str, dict]:
    """The held-out curve: avg@n at the report's evaluation settings (temperature 0.6, top-p 0.95), per kind."""
    prompts = [prompt_ids(tokenizer, p, chat) for p in problems]
    tokens = cfg.max_new_tokens[-1][1]
    engine = Engine(model, slots=cfg.slots, max_len=max(map(len, prompts)) + tokens, n_ids=tokenizer.n_ids)
    with Judge(workers=cfg.judge_workers, cache_size=10_000) as judge:
        return {kind: summary(solve(engine, tokenizer, judge, [p for p in problems if p.kind == kind], chat=chat,
                                    n=cfg.eval_samples, max_new_tokens=tokens, seed=cfg.seed))
                for kind in sorted({p.kind for p in problems})}


if __name__ == "__main__":
    configurator.run(main, Config)
