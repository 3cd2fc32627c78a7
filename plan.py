"""
What a run would take, before anyone pays for it: parameters, schedule, FLOPs, memory per GPU, days.

    python plan.py config/mimo_7b.py --gpus=8            # pre-training; seconds on any laptop; nothing is allocated
    python plan.py config/mimo_7b_sft.py --gpus=8        # SFT
    python plan.py config/mimo_7b_rl.py --gpus=8         # RL: trainer and rollout engine
    python plan.py config/mimo_7b_rl.py --set.micro_tokens=16384     # any field of the configuration, changed

Memory is what one rank holds at the end of a forward pass, its worst moment, by kind; of the second micro-batch of a
step or a later one: with a single one gradients come as activations go, and the peak is less by about the gradients.

    weights      fp32 master shards, and what FSDP has gathered in bf16 (root, MTP layers, two blocks)
    gradients    fp32: of all parameters until the last micro-batch reduces them, shards if each one does
    optimizer    Adam's two moments, fp32 shards
    activations  what autograd keeps for the backward pass, from the kernels' own lists (block_floats)
    logits       gradients of the loss head, made in the forward, and one chunk of logits
    KV           RL: an engine replica's weights in bf16 and its cache; 0 in training

Not counted: CUDA context, NCCL buffers and fragmentation, 2 to 4 GB. The figures agree within 10% with what a real
step allocates (tests/test_plan.py measures it on CPU, and block by block with the GPU kernels' own save lists). The
report gives no memory figures; parameters and schedule are its sections 2.2 and 2.3.
"""
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import configurator
import pretrain
import rl
import sft
from configurator import UserError
from model import ModelConfig, flops_per_token
from schedule import Stage, batch_size_at, breakpoints, lr_at, mtp_weight_at, stage_at

GB = 1e9
SCRIPTS = (pretrain, sft, rl)


@dataclass(frozen=True)
class Config:
    config: str = ""                      # the configuration to plan for, of pretrain.py, sft.py or rl.py
    model: str = ""                       # SFT and RL: the pre-training configuration whose model they train, with its
                                          # final MTP layers, or a checkpoint; "" = the same name without _sft, _rl ...
    gpus: int = 8                         # GPUs of the run
    mfu: float = 0.4                      # model FLOP utilisation, for the days
    tflops: float = 989.0                 # peak dense bf16 TFLOP/s of a GPU (H100, H200: 989)
    set: dict[str, Any] = field(default_factory=dict)   # --set.KEY=VALUE: a field of the configuration, changed

    POSITIONAL = ("config",)

    def __post_init__(self):
        configurator.at_least(self, 1, "gpus")
        if not 0 < self.mfu <= 1 or self.tflops <= 0:
            raise ValueError(f"mfu = {self.mfu} should be in (0, 1], tflops = {self.tflops} above 0")


def main(cfg: Config) -> None:
    flags = [f"--{key}={value}" for key, value in cfg.set.items()]
    script = script_of(cfg.config)
    run = configurator.load(script.Config, [cfg.config, *flags])
    train = getattr(run, "train", "all")
    if run.shard_ranks and cfg.gpus % run.shard_ranks:
        raise UserError(f"shard_ranks = {run.shard_ranks} should divide gpus = {cfg.gpus}")
    how = dict(checkpointing=run.checkpointing, shard_ranks=run.shard_ranks, reduce_each=run.reduce_each)
    if script is pretrain:
        run = pretrain.going_on(run) if run.init else run
        print(report(run.model, run.stages, cfg.gpus, train=train, mtp_stage=run.mtp_stage, n_mtp_final=run.n_mtp_final,
                     micro_batch=run.micro_batch, mfu=cfg.mfu, tflops=cfg.tflops, **how))
        return
    path = cfg.model or model_config(cfg.config)
    if Path(path).is_dir():
        base = pretrain.going_on(pretrain.Config(init=path))
        base = replace(base, n_mtp_final=base.model.n_mtp)
    else:
        base = configurator.load(pretrain.Config, [path])
    print(f"model of {path} with {base.n_mtp_final} MTP layer(s)")
    if script is sft:
        stage = Stage("SFT", tokens=run.steps * run.batch_size * run.seq_len, seq_len=run.seq_len,
                      batch_size=run.batch_size, lr=run.lr, mtp_weight=run.mtp_weight,
                      rope_base=base.all_stages()[-1].rope_base)
        print(report(replace(base.model, n_mtp=base.n_mtp_final), [stage], cfg.gpus, n_mtp_final=base.n_mtp_final,
                     micro_batch=run.micro_batch, mfu=cfg.mfu, tflops=cfg.tflops, train=train, **how))
    else:
        print(rl_report(base.model, base.n_mtp_final, cfg.gpus, micro_tokens=run.micro_tokens, n_draft=run.n_draft,
                        kv_tokens=run.kv_tokens or run.slots * base.model.max_seq_len, copies=run.max_staleness,
                        **how))


def script_of(path: str):
    """The module whose Config has all the fields that the configuration file sets. UserError if none or several do."""
    values = configurator.read_file(path)
    fit = [script for script in SCRIPTS if set(values) <= {f.name for f in fields(script.Config)}]
    if len(fit) == 1:
        return fit[0]
    raise UserError(f"{path}: its fields are those of {'several' if fit else 'none'} of pretrain.py, sft.py and rl.py")


def model_config(path: str) -> str:
    """config/mimo_7b_rl_0530.py -> config/mimo_7b.py: the longest name that is a file and begins this one."""
    folder, words = Path(path).parent, Path(path).stem.split("_")
    for n in range(len(words) - 1, 0, -1):
        if (found := folder / f"{'_'.join(words[:n])}.py").is_file():
            if script_of(str(found)) is pretrain:
                return str(found)
    raise UserError(f"{path}: which model? --model=config/FILE.py names the pre-training configuration")


# ---- activations ----------------------------------------------------------------------------------------------------

def block_floats(shape: ModelConfig, checkpointing: str, gpu: bool) -> tuple[float, float]:
    """
    (numbers in the compute dtype, fp32 numbers) that the backward pass of one block keeps per token.

    none        x, its norm, x + attention and its norm (4 D); q and o (2 H d), k and v (2 K d); gate, up and their
                product (3 F); two rms, and per head log-sum-exp (on a CPU the largest score and the sum)
    full        x
    selective   x, q, k, v, o and o_proj's output; on a CPU o is computed again

    torch's own operations (no compiler, or several threads) keep F more.
    """
    D, F, Hd, Kd = shape.d_model, shape.d_ff, shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    if checkpointing == "full":
        return D, 0
    if checkpointing == "selective":
        return (2 * D + 2 * Hd + 2 * Kd, shape.n_head) if gpu else (2 * D + Hd + 2 * Kd, 0)
    return 4 * D + 2 * Hd + 2 * Kd + 3 * F, shape.n_head * (1 if gpu else 2) + 2


def activation_bytes(shape: ModelConfig, tokens: int, n_mtp: int, checkpointing: str, gpu: bool, frozen: bool) -> float:
    """Kept for the backward pass by `tokens` tokens of a micro-batch. frozen: the trunk only runs forward."""
    e, D = (2 if gpu else 4), shape.d_model
    blocks = (n_mtp + (0 if frozen else shape.n_layer)) * block_bytes(shape, checkpointing, gpu)
    # an MTP layer's input: two norms and their concatenation; then embeddings and final norms
    norms = 0 if checkpointing != "none" else 2 * D * e + 2 * D * e
    return tokens * (blocks + n_mtp * (norms + 2 * D * e) + 2 * D * e * (1 + n_mtp))


def block_bytes(shape: ModelConfig, checkpointing: str, gpu: bool) -> float:
    """Bytes one block keeps per token: 119,432 at 7B with the GPU kernels, 8,192 under full checkpointing."""
    compute, fp32 = block_floats(shape, checkpointing, gpu)
    return compute * (2 if gpu else 4) + fp32 * 4


def logits_bytes(shape: ModelConfig, tokens: int, n_mtp: int, gpu: bool, frozen: bool) -> float:
    """
    Gradients of head and input that the loss makes in the forward and keeps, once per head. frozen: none of lm_head,
    and nothing for the trunk's loss.
    """
    e, V, D = (2 if gpu else 4), shape.vocab_size, shape.d_model
    return (n_mtp + (not frozen)) * ((0 if frozen else V * D * e) + tokens * (D * e + 4))


def passing_bytes(shape: ModelConfig, tokens: int, checkpointing: str, gpu: bool,
                  frozen: bool) -> tuple[float, float]:
    """
    Bytes that live for a moment, of which only the larger counts: a chunk of fp32 logits, or lm_head's gradient, at the
    end of the forward; one whole block computed again at the start of the backward. -> (logits, activations).
    """
    V, rows = shape.vocab_size, min(tokens, 2048 if gpu else 512)
    head = max(rows * V * 4, 0 if frozen else V * shape.d_model * (2 if gpu else 4))
    again = 0 if checkpointing == "none" else tokens * block_bytes(shape, "none", gpu)
    return (head, 0) if head > again else (0, again)


# ---- memory by kind -------------------------------------------------------------------------------------------------

def plan(shape: ModelConfig, stages: list[Stage], world: int, *, micro_batch: int = 1, checkpointing: str = "none",
         shard_ranks: int = 0, mtp_stage: Stage | None = None, n_mtp_final: int = 3, reduce_each: bool = False,
         device: str = "cuda", mfu: float = 0.4, tflops: float = 989.0, kv_tokens: int = 0,
         train: str = "all") -> list[dict]:
    """
    One dict per stage: tokens, steps, rows of a micro-batch, parameters, FLOPs per token, days, and bytes per rank by
    kind. stages: the pre-training table; mtp_stage: the fine-tuning of new MTP layers after it, or None. micro_batch
    counts rows of the shortest context, as in pretrain.py; kv_tokens: tokens in an engine's cache; train="mtp": the MTP
    layers alone, on a frozen trunk. ValueError if shard_ranks does not divide world.
    """
    if shard_ranks and world % shard_ranks:
        raise ValueError(f"shard_ranks = {shard_ranks} should divide the number of GPUs, {world}")
    gpu, reduce_each = device == "cuda", reduce_each or world == 1
    e, n = (2 if gpu else 4), shard_ranks or world
    table, rows = list(stages) + ([mtp_stage] if mtp_stage else []), []
    shortest, sharded = min(s.seq_len for s in table), gpu or world > 1
    for s in table:
        last = s is mtp_stage
        frozen = last or train == "mtp"                        # the trunk only runs forward
        n_mtp = n_mtp_final if last else shape.n_mtp
        here = replace(shape, n_mtp=n_mtp)
        count, P = here.params_by_part(), here.n_params()
        new = n_mtp - shape.n_mtp if last else n_mtp
        trained = new * (count["MTP layers"] // n_mtp) if frozen else P
        micro = max(1, micro_batch * shortest // s.seq_len)
        tokens = micro * s.seq_len
        root = count["embedding"] + count["lm_head"] + count["final norm"]
        gathered = root + count["MTP layers"] + 2 * shape.block_params()     # 2: block in use and the next
        passing = passing_bytes(shape, tokens, checkpointing, gpu, frozen)
        memory = {
            "weights": 4 * P / n + (gathered * e if sharded else 0),
            "gradients": 4 * trained if sharded and not reduce_each else 4 * trained / n,
            "optimizer": 8 * trained / n,
            "activations": activation_bytes(shape, tokens, n_mtp, checkpointing, gpu, frozen) + passing[1],
            "logits": logits_bytes(shape, tokens, n_mtp, gpu, frozen) + passing[0],
            "KV": kv_tokens * kv_bytes_per_token(shape, e) + (P * e if kv_tokens else 0),
        }
        flops = flops_per_token(here, s.seq_len, train="mtp" if frozen else "all")
        rows.append({"name": s.name, "tokens": s.tokens, "steps": steps_of(s), "seq_len": s.seq_len,
                     "batch_size": s.batch_size, "micro_batch": micro, "parameters": count,
                     "trained": trained, "flops_per_token": flops, "memory": memory,
                     "total": sum(memory.values()),
                     "days": s.tokens * flops / (world * tflops * 1e12 * mfu) / 86_400})
    return rows


def kv_bytes_per_token(shape: ModelConfig, element: int = 2) -> int:
    """K and V of every trunk layer: 147,456 bytes at 7B in bf16."""
    return 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * element


def rl_memory(shape: ModelConfig, n_mtp: int, world: int, *, micro_tokens: int, kv_tokens: int,
              checkpointing: str = "none", shard_ranks: int = 0, reduce_each: bool = False, n_draft: int = 0,
              copies: int = 0, device: str = "cuda") -> dict[str, float]:
    """
    Bytes per rank by kind in RL: the trunk trains on micro_tokens a forward, n_mtp MTP layers lie frozen, and a plain
    replica with a cache of kv_tokens decodes. The replica takes new weights parameter by parameter; copies = 1: they
    are published whole as well (max_staleness 1).
    """
    e, trunk = (2 if device == "cuda" else 4), replace(shape, n_mtp=0)
    (row,) = plan(trunk, [Stage(tokens=1e9, seq_len=micro_tokens)], world, checkpointing=checkpointing, device=device,
                  shard_ranks=shard_ranks, reduce_each=reduce_each)
    whole = replace(shape, n_mtp=n_mtp)
    frozen, P = whole.params_by_part()["MTP layers"], whole.n_params()
    cache = kv_tokens * kv_bytes_per_token(replace(shape, n_layer=shape.n_layer + n_draft), e)
    return row["memory"] | {"weights": row["memory"]["weights"] + 4 * frozen / (shard_ranks or world),
                            "KV": (1 + copies) * P * e + cache}


def rl_report(shape: ModelConfig, n_mtp: int, world: int, **how) -> str:
    """What is printed for an RL configuration; how: as in rl_memory."""
    kinds = rl_memory(shape, n_mtp, world, **how)
    return "\n".join([f"parameters with {n_mtp} MTP layers: {replace(shape, n_mtp=n_mtp).n_params():,}",
                      f"memory per GPU in GB, {world} GPU(s), {how['micro_tokens']:,} tokens a forward, "
                      f"{how['kv_tokens']:,} tokens in the KV cache",
                      "  " + "".join(f"{k:>13}" for k in kinds) + f"{'total':>10}",
                      "  " + "".join(f"{v / GB:>13.2f}" for v in kinds.values())
                      + f"{sum(kinds.values()) / GB:>10.2f}"])


def steps_of(stage: Stage) -> float:
    """
    Optimizer steps of a stage: the integral of dt / (T b(t)), with a batch b that grows linearly in tokens.
    By hand: T = 1, 100 tokens at a constant batch of 10 are 10 steps; growing from 5 to 10 over them
    100/5 ln(10/5) = 13.9.
    """
    b0, b1, W = stage.batch_size_start or stage.batch_size, stage.batch_size, stage.batch_warmup_tokens
    W = min(W, stage.tokens)
    grown = W / b1 if b0 == b1 else W / (b1 - b0) * math.log(b1 / b0)
    return (grown + (stage.tokens - W) / b1) / stage.seq_len


# ---- printing -------------------------------------------------------------------------------------------------------

def report(shape: ModelConfig, stages: list[Stage], world: int, *, mtp_stage: Stage | None = None,
           n_mtp_final: int = 3, checkpointing: str = "none", micro_batch: int = 1, mfu: float = 0.4,
           tflops: float = 989.0, **more) -> str:
    """What is printed for pre-training and SFT. more: as in plan()."""
    rows = plan(shape, stages, world, mtp_stage=mtp_stage, n_mtp_final=n_mtp_final, mfu=mfu, tflops=tflops,
                checkpointing=checkpointing, micro_batch=micro_batch, **more)
    out = ["parameters"]
    parts = replace(shape, n_mtp=0).params_by_part()
    out += [f"  {name:<34}{n:>20,}" for name, n in parts.items() if n] + [f"  {'trunk':<34}{sum(parts.values()):>20,}"]
    for n in sorted({shape.n_mtp, n_mtp_final} - {0}):
        out.append(f"  {f'with {n} MTP layer' + 's' * (n != 1):<34}{replace(shape, n_mtp=n).n_params():>20,}")
    out += ["", *schedule_lines(rows, list(stages) + ([mtp_stage] if mtp_stage else [])), ""]
    for s in stages:
        if (least := s.batch_size_start or s.batch_size) < world:
            out += [f"warning: {s.name} has steps of {least} rows for {world} GPUs: it will not run", ""]
    out.append(f"memory per GPU in GB, {world} GPU(s), activation checkpointing {checkpointing}")
    kinds = list(rows[0]["memory"])
    head = "".join(f"{k:>13}" for k in kinds)
    out.append(f"  {'stage':<12}{'rows x tokens':>16}{head}{'total':>10}")
    for r in rows:
        out.append(f"  {r['name']:<12}{r['micro_batch']:>6} x {r['seq_len']:>7,}"
                   + "".join(f"{r['memory'][k] / GB:>13.2f}" for k in kinds) + f"{r['total'] / GB:>10.2f}")
    out += ["", f"compute, at {mfu:.0%} of {tflops:g} TFLOP/s on {world} GPU(s)",
            f"  {'stage':<12}{'tokens':>12}{'steps':>14}{'GFLOP/token':>14}{'time':>12}"]
    for r in rows:
        out.append(f"  {r['name']:<12}{human(r['tokens']):>12}{r['steps']:>14,.0f}"
                   f"{r['flops_per_token'] / 1e9:>14,.3g}{duration(r['days']):>12}")
    total = {key: sum(r[key] for r in rows) for key in ("tokens", "steps", "days")}
    out.append(f"  {'all':<12}{human(total['tokens']):>12}{total['steps']:>14,.0f}{duration(total['days']):>26}")
    return "\n".join(out)


def schedule_lines(rows: list[dict], stages: list) -> list[str]:
    """The schedule at each of its breakpoints: what holds for the step that starts there."""
    lines = ["schedule",
             f"  {'tokens seen':>14}  {'lr':>9}{'batch':>8}{'context':>9}{'RoPE base':>11}{'MTP':>6}  what"]
    for seen, what in breakpoints(stages):
        s = stages[stage_at(stages, seen)[0]]
        base = "as it is" if s.rope_base is None else f"{s.rope_base:,.0f}"
        lines.append(f"  {human(seen):>14}  {lr_at(stages, seen):>9.3g}{batch_size_at(stages, seen):>8,}"
                     f"{s.seq_len:>9,}{base:>11}{mtp_weight_at(stages, seen):>6g}  {what}")
    return lines


def duration(days: float) -> str:
    """3.2 years, 12 days, 5.1 hours, 40 minutes, under a minute: three digits, in the unit that reads best."""
    for unit, size in (("years", 365.0), ("days", 1.0), ("hours", 1 / 24), ("minutes", 1 / 1440)):
        if days >= (2 * size if unit == "days" else size):
            return f"{days / size:,.3g} {unit}"
    return "< 1 minute"


def human(n: float) -> str:
    """17.784T, 84B, 1.5M, 512."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.5g}{unit}"
    return f"{n:.0f}"


if __name__ == "__main__":
    configurator.run(main, Config)
