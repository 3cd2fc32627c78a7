"""
What a run would take, before anyone pays for it: parameters, schedule, memory of a GPU, days; in RL also how many
answers decode at once and the hours of an iteration.

    python plan.py config/mimo_7b.py --gpus=8            # pre-training; seconds on any laptop; nothing is allocated
    python plan.py config/mimo_7b_sft.py --gpus=8        # SFT
    python plan.py config/mimo_7b_rl.py --gpus=8         # RL: trainer, rollout engine, one iteration
    python plan.py config/mimo_100m_rl.py --gpus=1 --card=rtx4090
    python plan.py config/mimo_7b_rl.py --set.micro_tokens=16384     # any field of the configuration, changed
    python plan.py config/mimo_7b_sft_lora.py --gpus=1               # one card: LoRA on a frozen base

MEMORY is what one GPU holds at its worst moment, by kind. That is the end of a forward pass; of the second micro-batch
of a step or a later one: with a single one gradients come as activations go, and the peak is less by about the
gradients.

    weights      fp32 master shards, and what FSDP has gathered in bf16 (root, MTP layers, two blocks); with LoRA the
                 frozen base in bf16, and fp32 adapters
    gradients    fp32: of all parameters until the last micro-batch reduces them, shards if each one does
    optimizer    Adam's two moments, fp32 shards
    activations  what autograd keeps for the backward pass, from the kernels' own lists (block_floats)
    logits       gradients of the loss head, made in the forward, and one chunk of logits
    reduction    end of the backward pass: FSDP's fp32 copy of the root's gradients (embedding and lm_head in one
                 message). Activations and logits are gone by then, so only the larger of the two counts in the total
    replica      RL: the engine's own copy of the weights in bf16; two with max_staleness 1
    KV cache     RL: the engine's cache, kv_tokens long. The held-out curve is decoded by the same engine
    engine       RL: state of the sequences in the engine
    forward      RL: what one forward of the engine needs for a moment; the CUDA graphs keep it
    reserve      CUDA context, NCCL and fragmentation: an allowance of 4 GB, 2 GB for a single GPU; not measured

The first five agree within 10% with what a real step allocates (tests/test_plan.py measures it on CPU, and block by
block with the GPU kernels' own save lists). A card of "80 GB" is taken as 80e9 bytes; drivers show a little more.

AN RL ITERATION is simulated with the engine's own block manager (cache.py) and no model: decoding(). Its time is
arithmetic from measured numbers: decode_seconds(). The report gives no memory figures; parameters and schedule are its
sections 2.2 and 2.3.
"""
import math
import random
from collections import deque
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import configurator
import pretrain
import rl
import sft
from cache import BlockManager
from configurator import UserError
from lora import MLP, LoRA
from model import ModelConfig, flops_per_token
from schedule import Stage, batch_size_at, breakpoints, lr_at, mtp_weight_at, stage_at

GB = 1e9
SCRIPTS = (pretrain, sft, rl)


@dataclass(frozen=True)
class Card:
    """A GPU, from its data sheet."""
    memory: float       # bytes
    tflops: float       # dense bf16 TFLOP/s
    bandwidth: float    # bytes/s that a copy reaches: 4,277 GB/s measured on an H200 (results/gpu), which is 0.891 of
                        # its data sheet; the same share for the others


CARDS = {"rtx4090": Card(24e9, 165, 0.891 * 1008e9), "a100": Card(80e9, 312, 0.891 * 2039e9),
         "h100": Card(80e9, 989, 0.891 * 3350e9), "h200": Card(141e9, 989, 4277e9)}

# what is assumed of an RL run, and from where
PROMPT = 300                    # tokens of a prompt [ours]
BLOCK = 64                      # tokens of a block of the KV cache, as Engine's default
SIGMA = 0.57                    # answer lengths are lognormal with this deviation of ln(length); paper/table2.py: 0.4
                                # between prompts and 0.4 between answers to one prompt [ours]
WASTE = 0.095                   # valid groups beyond the batch, over the batch (results/rollout/table2.csv)
BYTES_PER_TOKEN = 80            # host memory: an id and a log-prob as Python objects in lists, measured
# results/gpu: 0.504 of copy bandwidth with one sequence of the 7B (14.0 GB read), 0.869 with 64 of 8k tokens (91.3 GB),
# which is 6.5 and 24.6 ms: full bandwidth and, beside it, 3.2 ms for 36 layers
SECONDS_PER_LAYER = 89e-6       # of a decode step, for launching kernels and waiting for the last of each


@dataclass(frozen=True)
class Config:
    config: str = ""                      # the configuration to plan for, of pretrain.py, sft.py or rl.py
    model: str = ""                       # SFT and RL: the pre-training configuration whose model they train, with its
                                          # final MTP layers, or a checkpoint; "" = the same name without _sft, _rl ...
    gpus: int = 8                         # GPUs of the run
    card: Literal["rtx4090", "a100", "h100", "h200"] = "h100"   # what they are: 24, 80, 80 or 141 GB
    mfu: float = 0.4                      # model FLOP utilisation of a run without recomputation, for the times
    mean: int = 0                         # RL: tokens of an answer on average; 0 = 29% of the longest, 9,000 of 30,720
    valid: float = 0.41                   # RL: share of groups that have a learning signal [paper Table 2]
    heldout: int = 200                    # RL: problems of the held-out curve
    set: dict[str, Any] = field(default_factory=dict)   # --set.KEY=VALUE: a field of the configuration, changed

    POSITIONAL = ("config",)

    def __post_init__(self):
        configurator.at_least(self, 1, "gpus")
        configurator.at_least(self, 0, "mean", "heldout")
        for name in ("mfu", "valid"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} should be in (0, 1]")


def main(cfg: Config) -> None:
    flags = [f"--{key}={value}" for key, value in cfg.set.items()]
    script = script_of(cfg.config)
    run = configurator.load(script.Config, [cfg.config, *flags])
    train = getattr(run, "train", "all")
    if run.shard_ranks and cfg.gpus % run.shard_ranks:
        raise UserError(f"shard_ranks = {run.shard_ranks} should divide gpus = {cfg.gpus}")
    how = dict(shard_ranks=run.shard_ranks, reduce_each=run.reduce_each, mtp_depth=getattr(run, "mtp_depth", 1))
    if script is pretrain:
        run = pretrain.going_on(run) if run.init else run
        print(report(run.model, run.stages, cfg, train=train, mtp_stage=run.mtp_stage, n_mtp_final=run.n_mtp_final,
                     micro_batch=run.micro_batch, **how))
        return
    path = cfg.model or model_config(cfg.config)
    if Path(path).is_dir():
        base = pretrain.going_on(pretrain.Config(init=path))
        base = replace(base, n_mtp_final=base.model.n_mtp)
    else:
        base = configurator.load(pretrain.Config, [path])
    print(f"model of {path} with {base.n_mtp_final} MTP layer{'s' * (base.n_mtp_final != 1)}")
    shape = replace(base.model, n_mtp=base.n_mtp_final)
    if script is sft:
        stage = Stage("SFT", tokens=run.steps * run.batch_size * run.seq_len, seq_len=run.seq_len,
                      batch_size=run.batch_size, lr=run.lr, mtp_weight=run.mtp_weight,
                      rope_base=base.all_stages()[-1].rope_base, checkpointing=run.checkpointing)
        print(report(shape, [stage], cfg, n_mtp_final=base.n_mtp_final, micro_batch=run.micro_batch, train=train,
                     lora=run.lora, **how))
    else:
        print(rl_report(shape, run, cfg))


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

def block_floats(shape: ModelConfig, checkpointing: str, gpu: bool, lora: LoRA | None = None) -> tuple[float, float]:
    """
    (numbers in the compute dtype, fp32 numbers) that the backward pass of one block keeps per token.

    none        x, its norm, x + attention and its norm (4 D); q and o (2 H d), k and v (2 K d); gate, up and their
                product (3 F); two rms, and per head log-sum-exp (on a CPU the largest score and the sum)
    full        x
    selective   x, q, k, v, o and o_proj's output; on a CPU o is computed again

    torch's own operations (no compiler, or several threads) keep F more. lora: the weights are frozen, and the input of
    a linear layer (the two norms, the product) is kept only where an adapter reads it, with x A^T (r).
    """
    D, F, Hd, Kd = shape.d_model, shape.d_ff, shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    if checkpointing == "full":
        return D, 0
    if checkpointing == "selective":
        return (2 * D + 2 * Hd + 2 * Kd, shape.n_head) if gpu else (2 * D + Hd + 2 * Kd, 0)
    fp32 = shape.n_head * (1 if gpu else 2) + 2
    if lora is None:
        return 4 * D + 2 * Hd + 2 * Kd + 3 * F, fp32
    has = lambda *names: bool(lora.rank and set(names) & set(lora.targets))
    inputs = D * has("q_proj", "k_proj", "v_proj") + D * has("gate_proj", "up_proj") + F * has("down_proj")
    return 2 * D + 2 * Hd + 2 * Kd + 2 * F + inputs + lora.rank * len(lora.targets), fp32


def activation_bytes(shape: ModelConfig, tokens: int, n_mtp: int, checkpointing: str, gpu: bool, frozen: bool,
                     lora: LoRA | None = None) -> float:
    """
    Kept for the backward pass by `tokens` tokens of a micro-batch. frozen: the trunk only runs forward; lora: it has
    adapters, and all weights are frozen.
    """
    e, D = (2 if gpu else 4), shape.d_model
    if lora:
        blocks = shape.n_layer * block_bytes(shape, checkpointing, gpu, lora)
        blocks += n_mtp * block_bytes(shape, checkpointing, gpu, LoRA())
        return tokens * (blocks + D * e * (1 + n_mtp))             # and what the final norms read
    blocks = (n_mtp + (0 if frozen else shape.n_layer)) * block_bytes(shape, checkpointing, gpu)
    # an MTP layer's input: two norms and their concatenation; then embeddings and final norms
    norms = 0 if checkpointing != "none" else 2 * D * e + 2 * D * e
    return tokens * (blocks + n_mtp * (norms + 2 * D * e) + 2 * D * e * (1 + n_mtp))


def block_bytes(shape: ModelConfig, checkpointing: str, gpu: bool, lora: LoRA | None = None) -> float:
    """Bytes one block keeps per token: 119,432 at 7B with the GPU kernels, 8,192 under full checkpointing."""
    compute, fp32 = block_floats(shape, checkpointing, gpu, lora)
    return compute * (2 if gpu else 4) + fp32 * 4


def logits_bytes(shape: ModelConfig, tokens: int, losses: int, gpu: bool, head: bool) -> float:
    """
    Gradients of head and input that each of the losses makes in the forward and keeps. head: lm_head trains; else there
    is no gradient of it.
    """
    e, V, D = (2 if gpu else 4), shape.vocab_size, shape.d_model
    return losses * ((V * D * e if head else 0) + tokens * (D * e + 4))


def passing_bytes(shape: ModelConfig, tokens: int, checkpointing: str, gpu: bool, head: bool) -> tuple[float, float]:
    """
    Bytes that live for a moment, of which only the larger counts: a chunk of fp32 logits, or lm_head's gradient, at the
    end of the forward; one whole block computed again at the start of the backward (where its weights are frozen as
    well: what it does not keep is there for a moment). -> (logits, activations).
    """
    V, rows = shape.vocab_size, min(tokens, 2048 if gpu else 512)
    head = max(rows * V * 4, V * shape.d_model * (2 if gpu else 4) if head else 0)
    again = 0 if checkpointing == "none" else tokens * block_bytes(shape, "none", gpu)
    return (head, 0) if head > again else (0, again)


# ---- memory by kind -------------------------------------------------------------------------------------------------

def plan(shape: ModelConfig, stages: list[Stage], world: int, *, micro_batch: int = 1, shard_ranks: int = 0,
         mtp_stage: Stage | None = None, n_mtp_final: int = 3, reduce_each: bool = False, device: str = "cuda",
         mfu: float = 0.4, tflops: float = 989.0, train: str = "all", mtp_depth: int = 1,
         lora: LoRA | None = None) -> list[dict]:
    """
    One dict per stage: tokens, steps, rows of a micro-batch, parameters, FLOPs per token, days, and bytes per rank by
    kind. stages: the pre-training table; mtp_stage: the fine-tuning of new MTP layers after it, or None. micro_batch
    counts rows of the shortest context, as in pretrain.py; train="mtp": the MTP layers alone, on a frozen trunk, one
    layer mtp_depth times; lora: adapters of the trunk alone, if its rank is not 0. ValueError if shard_ranks does not
    divide world.
    """
    if shard_ranks and world % shard_ranks:
        raise ValueError(f"shard_ranks = {shard_ranks} should divide the number of GPUs, {world}")
    gpu, reduce_each = device == "cuda", reduce_each or world == 1
    e, n = (2 if gpu else 4), shard_ranks or world
    lora = lora if lora and lora.rank else None
    table, rows = list(stages) + ([mtp_stage] if mtp_stage else []), []
    shortest, sharded = min(s.seq_len for s in table), gpu or world > 1
    for s in table:
        last, kind = s is mtp_stage, s.checkpointing
        frozen = last or train == "mtp"                        # the trunk only runs forward
        n_mtp = n_mtp_final if last else shape.n_mtp
        here = replace(shape, n_mtp=n_mtp)
        count, P = here.params_by_part(), here.n_params()
        new = n_mtp - shape.n_mtp if last else n_mtp
        trained = new * (count["MTP layers"] // n_mtp) if frozen else adapter_params(shape, lora) if lora else P
        micro = max(1, micro_batch * shortest // s.seq_len)
        tokens, n_mtp = micro * s.seq_len, n_mtp * mtp_depth
        head, losses = not (frozen or lora), n_mtp + (not frozen)
        root = count["embedding"] + count["lm_head"] + count["final norm"]
        gathered = root + count["MTP layers"] + 2 * shape.block_params()     # 2: block in use and the next
        passing = passing_bytes(shape, tokens, kind, gpu, head)
        memory = {
            "weights": (weight_bytes(lora, gpu) * P + (4 * trained if lora else 0)) / n
                       + (gathered * e if sharded else 0),
            "gradients": 4 * trained if sharded and not reduce_each else 4 * trained / n,
            "optimizer": 8 * trained / n,
            "activations": activation_bytes(shape, tokens, n_mtp, kind, gpu, frozen, lora) + passing[1],
            "logits": logits_bytes(shape, tokens, losses, gpu, head) + passing[0],
            # the root's gradients in fp32 for the message, beside them as they came, then the shard that comes back
            "reduction": root * (4 + max(e, 4 / n)) if sharded and head else 0,
            "reserve": (4e9 if world > 1 else 2e9) if gpu else 0,
        }
        flops = flops_per_token(replace(here, n_mtp=n_mtp), s.seq_len,
                                train="mtp" if frozen else "lora" if lora else "all")
        again = recomputed_flops(here, s.seq_len, kind, n_mtp + (0 if frozen else shape.n_layer))
        rows.append({"name": s.name, "tokens": s.tokens, "steps": steps_of(s), "seq_len": s.seq_len,
                     "batch_size": s.batch_size, "micro_batch": micro, "checkpointing": kind, "parameters": count,
                     "trained": trained, "flops_per_token": flops, "again": again / flops, "memory": memory,
                     "total": peak(memory),
                     "days": s.tokens * (flops + again) / (world * tflops * 1e12 * mfu) / 86_400})
    return rows


def weight_bytes(lora: LoRA | None, gpu: bool) -> int:
    """Bytes of a weight as the trainer keeps it: fp32, but for the frozen base of LoRA."""
    return 2 if lora and lora.rank and (lora.dtype == "bfloat16" or gpu and lora.dtype == "auto") else 4


def adapter_params(shape: ModelConfig, lora: LoRA) -> int:
    """
    Numbers in the adapters of all trunk blocks: r (in + out) for each target. By hand, 7B, r = 16, all seven: q and o
    8,192 each, k and v 5,120 each, gate, up and down 15,104 each: 71,936 x 16 x 36 = 41,435,136.
    """
    D, Hd, Kd, F = shape.d_model, shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim, shape.d_ff
    width = {"q_proj": D + Hd, "k_proj": D + Kd, "v_proj": D + Kd, "o_proj": Hd + D} | dict.fromkeys(MLP, D + F)
    return shape.n_layer * lora.rank * sum(width[name] for name in lora.targets)


def peak(memory: dict[str, float]) -> float:
    """Bytes at the worst moment: activations and logits, or the reduction, which comes when they are gone."""
    return sum(memory.values()) - min(memory["activations"] + memory["logits"], memory["reduction"])


def recomputed_flops(shape: ModelConfig, seq_len: int, checkpointing: str, blocks: int) -> float:
    """
    FLOPs per token that `blocks` blocks compute a second time: under "full" their forward, under "selective" gate and
    up. By hand, 7B at 8,192: a block's forward has 2 x 177.2M + 4 x 4,096 x 4,096 = 421 MFLOP, gate and up 180.
    """
    D, F, d = shape.d_model, shape.d_ff, shape.head_dim
    if checkpointing == "full":
        weights = D * d * (shape.n_head + 2 * shape.n_kv_head) + shape.n_head * d * D + 3 * D * F
        return blocks * (2 * weights + 2 * shape.n_head * d * seq_len)
    return blocks * 4 * D * F if checkpointing == "selective" else 0.0


def kv_bytes_per_token(shape: ModelConfig, element: int = 2) -> int:
    """K and V of every trunk layer: 147,456 bytes at 7B in bf16."""
    return 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * element


def rl_memory(shape: ModelConfig, run: rl.Config, world: int, device: str = "cuda") -> dict[str, float]:
    """
    Bytes per rank by kind in RL: the trunk trains on micro_tokens a forward, the MTP layers of shape lie frozen unless
    mtp_weight trains them, and a plain replica with a cache decodes, held-out problems too. The replica takes new
    weights parameter by parameter; with max_staleness = 1 they are published whole as well.
    """
    e, n = (2 if device == "cuda" else 4), run.shard_ranks or world
    stage = Stage(tokens=1e9, seq_len=run.micro_tokens, checkpointing=run.checkpointing)
    trained = shape if run.mtp_weight else replace(shape, n_mtp=0)
    (row,) = plan(trained, [stage], world, shard_ranks=run.shard_ranks, reduce_each=run.reduce_each, device=device,
                  lora=run.lora)
    kinds, frozen, V = row["memory"], shape.n_params() - trained.n_params(), shape.vocab_size
    reserve = {"reserve": kinds.pop("reserve")}                     # printed last
    # rows that fill up a batch to a power of two; id, log-prob and random number of each token, states for the drafts
    rows, longest = run.slots + max(4, 2 ** (run.slots - 1).bit_length() // 2), longest_of(run)
    state = rows * ((longest + PROMPT) * 16 + 4 * (1 + run.n_draft) * shape.d_model * e)
    # what one forward needs for a moment: a prefill of 4,096 tokens, or sampling with top-p in fp64
    forward = max(4096 * (3 * shape.d_ff + 6 * shape.d_model) * e, run.slots * (1 + run.n_draft) * V * 64)
    return kinds | {"weights": kinds["weights"] + weight_bytes(run.lora, device == "cuda") * frozen / n,
                    "replica": (1 + run.max_staleness) * shape.n_params() * e,
                    "KV cache": kv_tokens_of(run) * kv_bytes_per_token(
                        replace(shape, n_layer=shape.n_layer + run.n_draft), e),
                    "engine": state, "forward": forward} | reserve


def longest_of(run: rl.Config) -> int:
    """The longest answer of the whole run, tokens."""
    return max(tokens for _, tokens in run.max_new_tokens)


def kv_tokens_of(run: rl.Config) -> int:
    """Tokens in the engine's cache; without kv_tokens there is room for the longest answer in every slot, in blocks."""
    return run.kv_tokens or run.slots * -(-(PROMPT + longest_of(run) + run.n_draft + 2) // BLOCK) * BLOCK


# ---- an RL iteration: how many answers at once, how long -------------------------------------------------------------

@dataclass(frozen=True)
class Decoding:
    """What decoding() finds, averaged over the middle of the simulation: the engine neither fills nor empties."""
    at_once: float        # answers that decode
    kv_tokens: float      # tokens in the cache that a decode step reads
    recomputed: float     # tokens that are computed again after a pre-emption, per token of an answer


@cache
def decoding(slots: int, kv_tokens: int, mean: int, longest: int, group: int, seed: int = 0) -> Decoding:
    """
    How many answers one engine decodes at once: the real block manager, no weights, lognormal lengths with this mean,
    cut at longest. Groups share their prompt of PROMPT tokens. As in Engine.admit and Engine.grow, answers start in
    order while there is a slot and memory, of which a twelfth is left for those that run to grow into; when one must
    grow and no block is free, the youngest is pre-empted and starts again from its tokens.

    All active answers grow by 1/50 of the mean at a time: finer steps change the result by less than 2%.
    """
    draw, answers = random.Random(seed).lognormvariate, max(1200, 12 * slots)
    length = [min(longest, max(1, round(draw(math.log(mean) - SIGMA ** 2 / 2, SIGMA)))) for _ in range(answers)]
    blocks, stride = BlockManager(kv_tokens // BLOCK, BLOCK), max(1, mean // 50)
    most = blocks.blocks_for(PROMPT + longest)
    queue, active = deque(range(answers)), []          # active: in order of arrival, the youngest last
    done, again, seen = [0] * answers, 0, []
    while queue or active:
        while queue and len(active) < slots:
            i = queue[0]
            peer = next((j for j in active if j // group == i // group), None)
            shared = () if peer is None else blocks.tables[peer][:PROMPT // BLOCK]
            left = len(blocks.free_blocks) - blocks.blocks_for(PROMPT + done[i]) + len(shared)
            if active and left < min(blocks.n_blocks // 12, sum(most - len(blocks.tables[j]) for j in active)):
                break
            if not blocks.allocate(i, PROMPT + done[i], shared):
                break
            active.append(queue.popleft())
            again += done[i]
        for i in list(active):
            while i in blocks.tables and not blocks.append(i, PROMPT + min(done[i] + stride, length[i])):
                youngest = active.pop()
                blocks.free(youngest)
                queue.appendleft(youngest)
            if i in blocks.tables:
                done[i] = min(done[i] + stride, length[i])
        seen.append((len(active), sum(PROMPT + done[i] for i in active)))
        for i in [i for i in active if done[i] == length[i]]:
            active.remove(i)
            blocks.free(i)
    middle = seen[len(seen) // 5:-(len(seen) // 5)]
    return Decoding(*(sum(column) / len(middle) for column in zip(*middle, strict=True)), again / sum(length))


def decode_seconds(shape: ModelConfig, kv_tokens: float, card: Card) -> float:
    """
    Seconds of one decode step: the bytes that it reads (trunk weights, keys and values, all in bf16) at the bandwidth
    of a copy, and SECONDS_PER_LAYER. Both points measured on an H200 come out again; other cards are an assumption.
    By hand, 7B, one short sequence on an H200: 14.0 GB / 4,277 GB/s + 36 x 89 us = 3.3 + 3.2 = 6.5 ms.
    """
    count = shape.params_by_part()
    read = 2 * (count["blocks"] + count["lm_head"]) + kv_tokens * kv_bytes_per_token(shape)
    return read / card.bandwidth + shape.n_layer * SECONDS_PER_LAYER


def rl_hours(shape: ModelConfig, run: rl.Config, cfg: Config, card: Card, longest: int) -> dict[str, float]:
    """
    One iteration with this longest answer: its hours, answers at once, tokens/s of a GPU, groups and tokens launched.
    Drafts of MTP layers are not counted.

    rollout     batch_size / valid groups, and WASTE more that are aborted at the end, by all GPUs together
    update      one forward and backward over the trained answers, the recomputation, and a forward for the old
                log-probs if there are several updates; at mfu
    evaluation  heldout x eval_samples answers, and the longest of them on its own at the end
    """
    mean = min(cfg.mean, longest) or math.ceil(longest * 9000 / 30_720)
    G, trunk = run.group_size, replace(shape, n_mtp=0)
    found = decoding(run.slots, kv_tokens_of(run), mean, longest, G)
    speed = cfg.mfu * card.tflops * 1e12
    prefill = 2 * trunk.n_params() / speed                          # seconds per recomputed token
    each = decode_seconds(shape, found.kv_tokens, card) / found.at_once + found.recomputed * prefill
    groups = min(run.max_groups, run.batch_size * (1 + WASTE) / cfg.valid) if run.dynamic_sampling else run.batch_size
    launched, trained = groups * G * mean, run.batch_size * G * (mean + PROMPT)
    flops = flops_per_token(trunk, mean, train="lora" if run.lora.rank else "all")
    old = flops_per_token(trunk, mean) / 3 if run.mini_batch < run.batch_size or run.max_staleness else 0
    again = recomputed_flops(trunk, mean, run.checkpointing, shape.n_layer)
    evaluated = cfg.heldout * run.eval_samples if run.eval_every and run.valid else 0
    tail = longest * decode_seconds(shape, longest, card) if evaluated else 0
    hours = {"rollout": launched * each / cfg.gpus, "update": trained * (flops + old + again) / speed / cfg.gpus,
             "evaluation": evaluated * mean * each / cfg.gpus + tail}
    hours = {name: seconds / 3600 for name, seconds in hours.items()}
    both = max(hours["rollout"], hours["update"]) if run.max_staleness else hours["rollout"] + hours["update"]
    return {"longest": longest, "mean": mean, "at once": found.at_once, "recomputed": found.recomputed,
            "tokens/s": 1 / each, "groups": groups, "tokens": launched, **hours,
            "iteration": both + hours["evaluation"] / max(1, run.eval_every)}


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

def report(shape: ModelConfig, stages: list[Stage], cfg: Config, *, mtp_stage: Stage | None = None,
           n_mtp_final: int = 3, **more) -> str:
    """What is printed for pre-training and SFT. more: as in plan()."""
    card = CARDS[cfg.card]
    rows = plan(shape, stages, cfg.gpus, mtp_stage=mtp_stage, n_mtp_final=n_mtp_final, mfu=cfg.mfu, tflops=card.tflops,
                **more)
    out = ["parameters"]
    parts = replace(shape, n_mtp=0).params_by_part()
    out += [f"  {name:<34}{n:>20,}" for name, n in parts.items() if n] + [f"  {'trunk':<34}{sum(parts.values()):>20,}"]
    for n in sorted({shape.n_mtp, n_mtp_final} - {0}):
        out.append(f"  {f'with {n} MTP layer' + 's' * (n != 1):<34}{replace(shape, n_mtp=n).n_params():>20,}")
    if (lora := more.get("lora")) and lora.rank:
        out.append(f"  {f'adapters of rank {lora.rank}, trained':<34}{adapter_params(shape, lora):>20,}")
    out += ["", *schedule_lines(rows, list(stages) + ([mtp_stage] if mtp_stage else [])), ""]
    for s in stages:
        if (least := s.batch_size_start or s.batch_size) < cfg.gpus:
            out += [f"warning: {s.name} has steps of {least} rows for {cfg.gpus} GPUs: it will not run", ""]
    out += [f"memory per GPU in GB, {cfg.gpus} GPU(s)",
            *memory_lines([(f"{r['name']:<12}{r['micro_batch']:>4} x {r['seq_len']:>6,}  {r['checkpointing']:<10}",
                            r["memory"]) for r in rows], f"{'stage':<10}{'rows x tokens':>15}  recomputed"),
            "", f"compute, at {cfg.mfu:.0%} of {card.tflops:g} TFLOP/s on {cfg.gpus} x {cfg.card}",
            f"  {'stage':<12}{'tokens':>12}{'steps':>14}{'GFLOP/token':>14}{'recomputed':>12}{'time':>15}"]
    for r in rows:
        out.append(f"  {r['name']:<12}{human(r['tokens']):>12}{r['steps']:>14,.0f}"
                   f"{r['flops_per_token'] / 1e9:>14,.3g}{r['again']:>12.0%}{duration(r['days']):>15}")
    total = {key: sum(r[key] for r in rows) for key in ("tokens", "steps", "days")}
    out.append(f"  {'all':<12}{human(total['tokens']):>12}{total['steps']:>14,.0f}{duration(total['days']):>41}")
    return "\n".join(out)


def memory_lines(rows: list[tuple[str, dict[str, float]]], head: str) -> list[str]:
    """A table: head over the rows' names, a column for each kind of memory, the total and the card that it fits."""
    kinds = [k for k in rows[0][1] if any(memory[k] for _, memory in rows)]
    lines = [f"  {head}" + "".join(f"{k:>{max(8, len(k) + 2)}}" for k in kinds) + f"{'total':>8}  fits"]
    for name, memory in rows:
        lines.append(f"  {name:<{len(head)}}" + "".join(f"{memory[k] / GB:>{max(8, len(k) + 2)}.1f}" for k in kinds)
                     + f"{peak(memory) / GB:>8.1f}  {fits(peak(memory))}")
    return [*lines, "  total: the reduction comes when activations and logits are gone, so that the larger counts"]


def fits(total: float) -> str:
    """The smallest card that holds so many bytes."""
    size = min((card.memory for card in CARDS.values() if total <= card.memory), default=0)
    return f"{size / GB:.0f} GB" if size else "no card"


def rl_report(shape: ModelConfig, run: rl.Config, cfg: Config) -> str:
    """What is printed for an RL configuration; shape with the MTP layers that lie frozen."""
    memory, card, longest = rl_memory(shape, run, cfg.gpus), CARDS[cfg.card], longest_of(run)
    one = kv_tokens_of(replace(run, kv_tokens=0, slots=1))
    if kv_tokens_of(run) < one:
        raise UserError(f"kv_tokens = {run.kv_tokens:,} should be at least {one:,}: one answer of {longest:,} tokens "
                        "and its prompt")
    phases = [(start, rl_hours(shape, run, cfg, card, tokens)) for start, tokens in run.max_new_tokens
              if start < run.steps]
    groups, tokens = (max(h[name] for _, h in phases) for name in ("groups", "tokens"))
    problems = f"{cfg.heldout} problems x {run.eval_samples} answers, every {run.eval_every} iterations"
    columns = ("rollout", "update", "evaluation", "iteration")
    adapters = f"; adapters of rank {run.lora.rank}: {adapter_params(shape, run.lora):,}" if run.lora.rank else ""
    out = [f"parameters: {shape.n_params():,}{adapters}", "",
           f"memory per GPU in GB, {cfg.gpus} GPU(s): {run.micro_tokens:,} tokens a forward, recomputation "
           f"{run.checkpointing}, {kv_tokens_of(run):,} tokens in the KV cache",
           *memory_lines([("", memory)], ""), "",
           f"host memory for the answers of an iteration: {tokens * BYTES_PER_TOKEN / GB:.2g} GB over "
           f"all GPUs, {BYTES_PER_TOKEN} bytes a token, dropped groups too", "",
           f"one iteration on {cfg.gpus} x {cfg.card}: {groups:,.0f} groups of {run.group_size} answers "
           f"are launched for {run.batch_size} that are trained on",
           f"  {'from':>6}{'longest':>9}{'mean':>8}{'at once':>14}{'recomputed':>12}{'tokens/s':>10}"
           + "".join(f"{name:>14}" for name in columns)]
    for start, h in phases:
        out.append(f"  {start:>6,}{h['longest']:>9,}{h['mean']:>8,}{h['at once']:>7.1f} of {run.slots:>3}"
                   f"{h['recomputed']:>12.0%}{h['tokens/s']:>10,.0f}"
                   + "".join(f"{duration(h[name] / 24):>14}" for name in columns))
    ends = [start for start, _ in phases[1:]] + [run.steps]
    days = sum((end - start) * h["iteration"] for (start, h), end in zip(phases, ends, strict=True)) / 24
    out += ["  from: iteration; longest, mean: tokens of an answer; at once: answers decoding on a GPU, of its slots",
            "  recomputed: tokens computed again, as memory ran out and a sequence had to wait; tokens/s: of one GPU",
            f"  evaluation: {problems if run.eval_every and run.valid else 'none'}",
            f"all {run.steps:,} iterations: {duration(days)}", "",
            "the largest cache that a card has room for, with the longest answers",
            f"  {'card':<10}{'--kv_tokens=':>14}{'at once':>14}{'rollout':>14}"]
    for name, card in CARDS.items():
        room = (card.memory - peak(memory) + memory["KV cache"]) * kv_tokens_of(run) / memory["KV cache"]
        if room < one:
            out.append(f"  {name:<10}{'does not fit':>14}")
            continue
        filled = replace(run, kv_tokens=int(min(room, run.slots * one)) // BLOCK * BLOCK)
        h = rl_hours(shape, filled, cfg, card, longest)
        out.append(f"  {name:<10}{filled.kv_tokens:>14,}{h['at once']:>7.1f} of {run.slots:>3}"
                   f"{duration(h['rollout'] / 24):>14}")
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
    """3.2 years, 12 days, 5.1 hours, 40 minutes, 7 seconds: three digits, in the unit that reads best."""
    for unit, size in (("years", 365.0), ("days", 1.0), ("hours", 1 / 24), ("minutes", 1 / 1440)):
        if days >= (2 * size if unit == "days" else size):
            return f"{days / size:,.3g} {unit}"
    return f"{days * 86_400:.2g} seconds" if days * 86_400 >= 1 else "< 1 second"


def human(n: float) -> str:
    """17.784T, 84B, 1.5M, 512."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.5g}{unit}"
    return f"{n:.0f}"


if __name__ == "__main__":
    configurator.run(main, Config)
