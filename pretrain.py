"""
Pre-training in three stages, then MTP fine-tuning (report sections 2.1-2.3).

    python pretrain.py config/tiny.py                              # 1.3M parameters on a laptop CPU, minutes
    python plan.py config/mimo_7b.py --gpus=8                      # what the 7B run would take
    torchrun --nproc_per_node=8 pretrain.py config/mimo_7b.py      # the 7B run under FSDP2
    python pretrain.py config/mine.py --init=out/qwen              # goes on from a model (hf.py import, or a run)

One loop serves all of it. What changes on the way - learning rate, batch, MTP weight, RoPE base, context, mixture,
recomputation - is read from the table of `Stage`s (schedule.py) at the number of tokens seen. The loss is

    L = CE(trunk) + w * mean_k CE(MTP layer k)            w = 0.3, later 0.1; one MTP layer in stages 1-3

After stage 3 the MTP layer is copied into two more, trunk and first layer are frozen, and the copies train on the same
mixture with w = 1 (section 2.2). The report is silent on the length of that stage and on its learning rate. With
--init and no stages but mtp_stage that is all there is: MiMo-7B's published layer becomes three.

The data are token shards, one folder a source (data/prepare.py makes those of the tiny world). A run is resumed by
running the same command again; on one CPU process the result is bit-equal to an uninterrupted run. Expect for
config/tiny.py: 7.4 nats per token at the first step (ln 1024, and 1/2 for logits of variance 1). The held-out loss per
source is printed where a stage ends; results/demo keeps the curves of a whole run.
"""
import sys
import textwrap
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import configurator
import distributed
import kernels
import mtp
from configurator import UserError
from data.loader import Batch, MixtureLoader
from data.shards import Shards, sources
from distributed import Runtime
from engine import Engine, Request, generate
from metrics import Metrics, SpikeGuard, check_finite, mfu
from model import MiMo, ModelConfig
from schedule import Stage, batch_size_at, lr_at, mtp_weight_at, stage_at, total_tokens
from tokenizer import Tokenizer

SAMPLE_PROMPT = "Problem: What is 7+4-6?\nSolution:"     # continued greedily now and then, for the screen


@dataclass(frozen=True)
class Config:
    out: str = "out/tiny/base"            # checkpoints and metrics.jsonl go here
    data: str = "out/tiny/data"           # shards: <data>/<source>, validation: <data>/valid/<source>
    init: str = ""                        # checkpoint or run to go on from: its weights, shape and tokenizer; ""
                                          # = new weights of the shape `model`
    tokenizer: str = "tiny"               # "tiny" (embedded) or a folder with a tokenizer's files; not with init
    model: ModelConfig = ModelConfig()    # shape [paper 2.2]; not with init
    train: Literal["all", "mtp"] = "all"  # mtp: the MTP layers alone, on a frozen trunk
    stages: list[Stage] = field(default_factory=lambda: [Stage()])   # the pre-training table [paper 2.3]
    mtp_stage: Stage | None = None        # MTP fine-tuning after them; None = leave it out [paper 2.2]
    n_mtp_final: int = 3                  # MTP layers after replication [paper 2.2]
    micro_batch: int = 16                 # rows per forward and rank at the shortest context; never changes the result
    beta1: float = 0.9                    # AdamW [paper 2.3]
    beta2: float = 0.95                   # AdamW [paper 2.3]
    weight_decay: float = 0.1             # AdamW, on matrices only [paper 2.3; matrices: ours]
    grad_clip: float = 1.0                # global gradient norm [paper 2.3]
    valid_tokens: float = 16_384          # per source, at the end of each stage; tokens
    save_every: int = 200                 # steps between checkpoints (also at stage ends and on SIGTERM)
    keep: int = 2                         # checkpoints kept
    sample_every: int = 150               # steps between samples printed to the screen, 0 = never
    seed: int = 1                         # weights and data order
    threads: int = 1                      # torch threads per process on CPU
    matmul: Literal["fp32", "bf16"] = "fp32"   # products on a CPU: bf16 rounds what goes in, sums are fp32; for AMX
    device: Literal["auto", "cpu", "cuda"] = "auto"   # auto: CUDA when there is one
    compile: bool = False                 # torch.compile per block, CUDA
    shard_ranks: int = 0                  # ranks a parameter is sharded over; fewer than all = hybrid sharding, 0 = all
    reduce_each: bool = False             # reduce-scatter gradients after every micro-batch: saves one fp32 copy of
                                          # them per GPU, costs more communication
    async_save: bool = False              # write checkpoints in the background while training goes on
    skip_spikes: float = 0.0              # skip a step whose gradient norm exceeds this multiple of its running mean,
                                          # 0 = never
    plain: bool = False                   # torch code only: no C, no Triton; for reading and debugging

    def __post_init__(self):
        if not self.all_stages():
            raise ValueError("stages = []: a run needs at least one Stage")
        configurator.at_least(self, 1, "micro_batch", "valid_tokens", "save_every", "keep", "threads", "n_mtp_final")
        configurator.at_least(self, 0, "weight_decay", "grad_clip", "sample_every", "shard_ranks", "skip_spikes")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} should be in [0, 1)")
        for s in self.all_stages():          # a model that exists may get a longer context here
            if s.seq_len > self.model.max_seq_len and not self.init:
                raise ValueError(f"stage {s.name}: seq_len = {s.seq_len} is longer than model.max_seq_len = "
                                 f"{self.model.max_seq_len}")
        if self.mtp_stage and not 1 <= self.model.n_mtp <= self.n_mtp_final:
            raise ValueError(f"mtp_stage needs 1..{self.n_mtp_final} MTP layers to copy, "
                             f"model.n_mtp = {self.model.n_mtp}")
        if self.train == "mtp" and self.model.n_mtp < 1:
            raise ValueError("train = 'mtp' needs an MTP layer, the model has none: `hf.py import --mtp=1` adds one")

    def all_stages(self) -> list[Stage]:
        return self.stages + ([self.mtp_stage] if self.mtp_stage else [])


def main(cfg: Config) -> None:
    # ---- 1. where we run, what we read --------------------------------------------------------------------------
    rt = distributed.setup(threads=cfg.threads, seed=cfg.seed, device=cfg.device, shard_ranks=cfg.shard_ranks,
                           matmul=cfg.matmul)
    kernels.set_plain(cfg.plain)
    if cfg.init:
        cfg = going_on(cfg)
    stages, run = cfg.all_stages(), Path(cfg.out)
    end, shortest = total_tokens(stages), min(s.seq_len for s in stages)
    tokenizer, loader = open_data(cfg, stages)

    # ---- 2. start or resume -------------------------------------------------------------------------------------
    ckpt = checkpoint.latest(run)
    model, optimizer, saved = start(cfg, stages, loader, rt, ckpt)
    # at: the stage that model and optimizer are set up for, -1 before the first one
    seen, step, at = (saved["seen"], saved["step"], saved["stage"]) if saved else (0, 0, -1)
    spikes = SpikeGuard(cfg.skip_spikes)
    if saved:
        spikes.load_state_dict(saved["spikes"])
    if rt.is_main:
        print(configurator.show(cfg))
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {end:,.0f} tokens, {rt.world} process(es) "
              f"on {rt.device}" + (f", resumed at step {step} from {ckpt}" if saved else ""))
    metrics = Metrics(run, resume_at=step, enabled=rt.is_main)
    bar = tqdm(total=int(end), initial=seen, unit="tok", unit_scale=True, desc="pretrain",
               disable=None if rt.is_main else True)

    # ---- 3. the loop --------------------------------------------------------------------------------------------
    while seen < end:
        t0 = time.perf_counter()
        i, _ = stage_at(stages, seen)
        if i != at:                                          # a stage begins: context, RoPE base, perhaps new layers
            at = i
            model, optimizer = begin_stage(model, optimizer, stages, at, cfg, rt)

        # 3a. what the table says of this step
        s, rows, w = stages[i], batch_size_at(stages, seen), mtp_weight_at(stages, seen)
        tokens, stage_end, n_mtp = rows * s.seq_len, total_tokens(stages[:i + 1]), len(model.mtp_layers)
        micro = max(1, cfg.micro_batch * shortest // s.seq_len)      # rows per forward: about as many tokens everywhere
        lr = lr_at(stages, min(seen + tokens / 2, stage_end - 1))     # at the step's middle: never 0 at step 0

        # 3b. a batch. Targets are counted over all ranks and micro-batches before the first forward: the loss is then
        # a mean over tokens, whatever the number of ranks and micro-batches
        batch = loader.next_batch(i, s.mix, s.seq_len, rows, rt.rank, rt.world).to(rt.device)
        counts = distributed.all_reduce(mtp.target_counts(batch.ids, batch.docs, s.seq_len, n_mtp), rt)

        # 3c. forward and backward
        total = torch.zeros(1 + n_mtp, device=rt.device)
        for part, last in distributed.micro_batches(batch, micro, rt):
            sums = forward(model, part, n_mtp)               # [1 + n_mtp] summed nats
            loss = sums[0] / counts[0]
            if n_mtp:
                loss = loss + w * (sums[1:] / counts[1:].clamp_min(1)).mean()
            distributed.sync_gradients(model, last or cfg.reduce_each, rt)
            (loss * rt.world).backward()                     # FSDP averages over ranks; the counts are global already
            total += sums.detach()
        losses = distributed.all_reduce(total, rt) / counts.clamp_min(1)      # means over the targets, nats per token

        # 3d. update
        distributed.average_gradients(model, rt)
        norm = distributed.clip_grad_norm(model, cfg.grad_clip)
        check_finite({"loss": losses, "gradient norm": norm}, model, step)
        skipped = spikes.skip(norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen, step = seen + tokens, step + 1

        # 3e. log, validate, save
        seconds = time.perf_counter() - t0
        metrics.log(step=step, tokens=seen, stage=s.name, loss=float(losses[0]), mtp_loss=losses[1:].tolist(), lr=lr,
                    batch_size=rows, seq_len=s.seq_len, mtp_weight=w, grad_norm=norm, skipped=skipped,
                    tokens_per_second=tokens / seconds, mfu=mfu(model.cfg, s.seq_len, tokens / seconds, rt),
                    epochs={name: round(n, 4) for name, n in loader.epochs().items()})
        bar.update(tokens)
        bar.set_postfix_str(f"{s.name} loss {float(losses[0]):.3f} mtp {float(losses[1:].mean()) if n_mtp else 0:.3f} "
                            f"lr {lr:.1e}")
        if cfg.sample_every and step % cfg.sample_every == 0 and not rt.sharded:
            bar.write(f"  sample at {seen:,} tokens: {continue_text(model, tokenizer, SAMPLE_PROMPT)!r}")
        if stage_ended := seen >= stage_end:
            valid = validate(model, cfg, s, micro, rt)
            metrics.log(step=step, tokens=seen, stage=s.name, valid=valid)
            if rt.is_main:
                bar.write(f"  {s.name} ends at {seen:,} tokens; validation loss, nats per token: "
                          + ", ".join(f"{name} {v['loss']:.3f}" for name, v in valid.items()))
        stop = distributed.stop_requested(rt)
        if stage_ended or stop or step % cfg.save_every == 0:
            state = {"seen": seen, "step": step, "stage": at, "loader": loader.state_dict(),
                     "spikes": spikes.state_dict()}
            checkpoint.save(run, step, model, tokenizer=tokenizer, config=configurator.to_dict(cfg), state=state,
                            meta={"stage": "base", "chat": False, "tokens": seen}, optimizer=optimizer, keep=cfg.keep,
                            shape=vars(model.cfg), rt=rt, background=cfg.async_save)
        if stop:
            break
    bar.close()
    checkpoint.finish()
    distributed.teardown(rt)


# ---- start, resume, stages ------------------------------------------------------------------------------------------

def going_on(cfg: Config) -> Config:
    """
    cfg with the shape and the tokenizer of the checkpoint that it starts from, cfg.init; the context is that of the
    model, or of a stage with a longer one. UserError without a checkpoint.
    """
    init = checkpoint.find(cfg.init)
    shape = configurator.from_dict(ModelConfig, checkpoint.read_shape(init), f"{init}/model.json")
    shape = replace(shape, max_seq_len=max(shape.max_seq_len, *(s.seq_len for s in cfg.all_stages())))
    try:
        return replace(cfg, init=str(init), model=shape, tokenizer=str(init))
    except ValueError as e:                                  # a rule of Config that this model breaks
        raise UserError(f"{init}: {e}") from None


def open_data(cfg: Config, stages: list[Stage]) -> tuple[Tokenizer, MixtureLoader]:
    """Tokenizer and loader, with everything checked now that a later stage would stumble over. UserError says what."""
    missing = {}
    if cfg.tokenizer != "tiny" and not Path(cfg.tokenizer).exists():
        missing[f"tokenizer files in {cfg.tokenizer!r}"] = (
            "tokenizer.json, or vocab.json and merges.txt, of XiaomiMiMo/MiMo-7B-Base or of any Qwen2 model, from the\n"
            "Hugging Face hub; --tokenizer=DIR names another folder")
    if not Path(cfg.data).is_dir():
        missing[f"token shards in {cfg.data!r}"] = (
            "`python -m data.prepare` makes those of the tiny world in out/tiny/data; docs/your_data.md says how to\n"
            "make them from your own text; --data=DIR names another folder")
    if missing:
        print("This run needs what is not here yet:", *(f"  {what}\n{textwrap.indent(how, '      ')}"
                                                        for what, how in missing.items()),
              "What works without them: python plan.py CONFIG --gpus=8    parameters, schedule, memory, days",
              sep="\n", file=sys.stderr)
        raise UserError(f"no {' and no '.join(missing)}")
    tokenizer = Tokenizer.load(cfg.tokenizer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise UserError(f"tokenizer {cfg.tokenizer!r} has {tokenizer.vocab_size:,} ids, model.vocab_size = "
                        f"{cfg.model.vocab_size:,}: the model must have at least as many rows")
    names = sorted({name for s in stages for name, w in s.mix.items() if w > 0})
    n_mtp = cfg.n_mtp_final if cfg.mtp_stage else cfg.model.n_mtp      # the last stage needs the most look-ahead
    loader = MixtureLoader(cfg.data, names, cfg.model.vocab_size, n_mtp=n_mtp, seed=cfg.seed,
                           max_seq_len=cfg.model.max_seq_len, tokenizer=tokenizer.fingerprint)
    for name in sources(Path(cfg.data) / "valid"):
        Shards(Path(cfg.data) / "valid", name, cfg.model.vocab_size, tokenizer=tokenizer.fingerprint)
    return tokenizer, loader


def start(cfg: Config, stages: list[Stage], loader: MixtureLoader, rt: Runtime,
          ckpt: Path | None,
          ) -> tuple[MiMo, torch.optim.AdamW, dict | None]:
    """A new model, or that of ckpt with optimizer and loader where they were. -> (model, optimizer, saved state)."""
    saved = checkpoint.read_state(ckpt, "seen", "loader", "spikes") if ckpt else None
    shape, at = cfg.model, -1
    if saved:
        at = saved["stage"]
        if at >= len(stages):
            raise UserError(f"{ckpt} is in stage {at + 1} of its table, this configuration has {len(stages)}")
        loader.load_state_dict(saved["loader"])
        fields = checkpoint.read_shape(ckpt)
        checkpoint.same_shape(fields, vars(cfg.model), ckpt, ignore=("n_mtp", "rope_base", "max_seq_len"))
        shape = configurator.from_dict(ModelConfig, fields, f"{ckpt}/model.json")
    model, optimizer = set_up(mtp.build(shape, "meta"), stages, at, cfg, rt, ckpt or (cfg.init or None))
    if saved:
        checkpoint.load_optimizer(ckpt, model, optimizer)
    return model, optimizer, saved


def begin_stage(model: MiMo, optimizer: torch.optim.AdamW, stages: list[Stage], at: int, cfg: Config, rt: Runtime,
                ) -> tuple[MiMo, torch.optim.AdamW]:
    """
    Context, RoPE base and activation checkpointing of stage `at`. MTP fine-tuning starts from copies of the layer, with
    a new optimizer.
    """
    stage = stages[at]
    if stage is cfg.mtp_stage:
        model = distributed.place(mtp.replicate(distributed.unshard(model), cfg.n_mtp_final), rt)
    longest = max(s.seq_len for s in stages[:at + 1])
    if cfg.init:                                             # a model that exists keeps the context it was trained for
        longest = max(longest, cfg.model.max_seq_len)
    model.set_context(model.cfg.rope_base if stage.rope_base is None else stage.rope_base, longest)
    if stage is cfg.mtp_stage:
        return set_up(model, stages, at, cfg, rt)
    distributed.set_checkpointing(model, stage.checkpointing, cfg.compile)
    return model, optimizer


def set_up(model: MiMo, stages: list[Stage], at: int, cfg: Config, rt: Runtime,
           ckpt: str | Path | None = None) -> tuple[MiMo, torch.optim.AdamW]:
    """
    Freeze what stage `at` does not train, shard, fill a model that is still on the meta device (each rank its own rows,
    from the checkpoint or the seed), and make the optimizer. at = -1 before the first stage.
    """
    model.requires_grad_(True)
    if 0 <= at and stages[at] is cfg.mtp_stage:
        mtp.freeze_all_but_new(model, cfg.model.n_mtp)
    elif cfg.train == "mtp":
        mtp.freeze_all_but_new(model, 0)
    model = distributed.shard(model, rt, checkpointing=stages[max(at, 0)].checkpointing, compile=cfg.compile,
                              shard_ranks=cfg.shard_ranks)
    if next(model.parameters()).is_meta:
        model = checkpoint.materialise(model, rt, seed=cfg.seed, ckpt=ckpt)
    return model, distributed.adamw(model, lr=0.0, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)


# ---- forward passes -------------------------------------------------------------------------------------------------

def forward(model: MiMo, batch: Batch, n_mtp: int) -> Tensor:
    """Summed losses [1 + n_mtp] of one micro-batch, nats."""
    width = batch.positions.shape[1] + 1 + n_mtp             # the loader's look-ahead is that of the last stage
    main, extra = mtp.losses(model, batch.ids[:, :width], batch.docs[:, :width], batch.positions, batch.bounds,
                             batch.mask)
    return torch.stack([main, *extra])


@torch.no_grad()
def validate(model: MiMo, cfg: Config, stage: Stage, micro: int, rt: Runtime) -> dict[str, dict]:
    """Loss and MTP losses per source on held-out documents, nats per token, at the stage's context."""
    folder = Path(cfg.data) / "valid"
    n_mtp, found = len(model.mtp_layers), {}
    for name in sources(folder):
        loader = MixtureLoader(str(folder), [name], cfg.model.vocab_size, n_mtp=n_mtp, seed=0)
        rows = max(rt.world, int(cfg.valid_tokens) // stage.seq_len)
        batch = loader.next_batch(0, {name: 1.0}, stage.seq_len, rows, rt.rank, rt.world).to(rt.device)
        parts = distributed.micro_batches(batch, micro, rt)
        sums = sum(forward(model, part, n_mtp) for part, _ in parts)
        counts = mtp.target_counts(batch.ids, batch.docs, stage.seq_len, n_mtp)
        mean = distributed.all_reduce(sums, rt) / distributed.all_reduce(counts, rt).clamp_min(1)
        found[name] = {"loss": float(mean[0]), "mtp": mean[1:].tolist()}
    return found


@torch.no_grad()
def continue_text(model: MiMo, tokenizer: Tokenizer, prompt: str, n: int = 40) -> str:
    """A greedy continuation of at most n tokens for the progress bar; sample.py has the real thing."""
    ids = tokenizer.encode(prompt)
    out = generate(Engine(model, slots=1, max_len=len(ids) + n, n_ids=tokenizer.n_ids),
                   [Request(0, ids, max_new_tokens=n, temperature=0.0, stop=(tokenizer.eos_id,))])[0]
    return tokenizer.decode(out.tokens)


if __name__ == "__main__":
    configurator.run(main, Config)
