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
from dataclasses import dataclass, field, fields, replace
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
from data.jsonl import read_json
from data.loader import Batch, MixtureLoader
from data.lock import hold
from data.shards import Shards, sources
from distributed import Runtime
from engine import Engine, Request, generate
from metrics import Metrics, SpikeGuard, check_finite, check_targets, mfu
from model import MiMo, ModelConfig
from schedule import Stage, batch_size_at, lr_at, mtp_weight_at, next_stage, total_tokens
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
    mtp_depth: int = 1                    # applications of the one MTP layer in the loss, for engines that draft that
                                          # many tokens with it [FastMTP: 3]
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
    max_skips: int = 20                   # so many in a row may be skipped; one more is no spike and ends the run
    plain: bool = False                   # torch code only: no C, no Triton; for reading and debugging

    def __post_init__(self):
        if not self.all_stages():
            raise ValueError("stages = []: a run needs at least one Stage")
        configurator.at_least(self, 1, "micro_batch", "valid_tokens", "save_every", "keep", "threads", "n_mtp_final",
                              "max_skips", "mtp_depth")
        configurator.at_least(self, 0, "weight_decay", "grad_clip", "sample_every", "shard_ranks", "skip_spikes",
                              "seed")
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
        if self.mtp_stage and self.model.n_mtp == self.n_mtp_final:
            raise ValueError(f"mtp_stage has nothing to train: model.n_mtp = n_mtp_final = {self.n_mtp_final}, so no "
                             "layer is copied; raise n_mtp_final, or give mtp_stage = None")
        if self.train == "mtp" and self.model.n_mtp < 1:
            raise ValueError("train = 'mtp' needs an MTP layer, the model has none: `hf.py import --mtp=1` adds one")
        mtp.check_depth(self.mtp_depth, self.train, self.n_mtp_final if self.mtp_stage else self.model.n_mtp,
                        "the model")

    def all_stages(self) -> list[Stage]:
        return self.stages + ([self.mtp_stage] if self.mtp_stage else [])


# What a started run keeps; docs/scale.md has the table of all fields. Stages: Position
FIXED = ["init", "seed", *(f"model.{f.name}" for f in fields(ModelConfig) if f.name != "max_seq_len")]
PAST = [f.name for f in fields(Stage) if f.name not in ("name", "checkpointing")]      # of a stage that is over


def main(cfg: Config) -> None:
    # ---- 1. where we run, what we read --------------------------------------------------------------------------
    rt = distributed.setup(threads=cfg.threads, seed=cfg.seed, device=cfg.device, shard_ranks=cfg.shard_ranks,
                           matmul=cfg.matmul)
    kernels.set_plain(cfg.plain)
    run = Path(cfg.out)
    lock = hold(run / "run.lock")                            # one run, one folder
    ckpt = checkpoint.to_resume(run)
    if cfg.init:
        cfg = going_on(cfg, ckpt)
    stages = cfg.all_stages()
    end, shortest = total_tokens(stages), min(s.seq_len for s in stages)
    tokenizer, loader = open_data(cfg, stages)

    # ---- 2. start or resume -------------------------------------------------------------------------------------
    spikes = SpikeGuard(cfg.skip_spikes, cfg.max_skips)
    if ckpt:
        model, optimizer, place, changed = resume(cfg, stages, tokenizer, loader, spikes, rt, ckpt)
    else:
        place, changed, source = Place(), [], cfg.tokenizer if cfg.init else None       # with init the same folder
        model, optimizer = set_up(mtp.build(cfg.model, "meta"), stages, -1, cfg, rt, source)
    seen, step, at, began = place.seen, place.step, place.stage, place.began
    left = seen < end or at < len(stages) - 1
    if rt.is_main:
        print(configurator.show(cfg))
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {end:,.0f} tokens, {rt.world} process(es) "
              f"on {rt.device}" + (f", resumed at step {step} from {ckpt}" if ckpt else ""),
              *(f"  changed: {words}" for words in changed), *([] if left else ["nothing is left to train"]), sep="\n")
    metrics = Metrics(run, resume_at=step, enabled=rt.is_main)
    bar = tqdm(total=int(end), initial=seen, unit="tok", unit_scale=True, desc="pretrain",
               disable=None if rt.is_main else True)

    # ---- 3. the loop --------------------------------------------------------------------------------------------
    while left:
        t0 = time.perf_counter()
        if (i := next_stage(stages, seen, at)) != at:        # a stage begins: context, RoPE base, perhaps new layers
            at, began = i, seen
            model, optimizer = begin_stage(model, optimizer, stages, at, cfg, rt)
            spikes.begin_stage()

        # 3a. what the table says of this step
        stage_end = total_tokens(stages[:i + 1])
        here = min(seen, stage_end - 1)                      # a stage shorter than the step before it gets one step
        s, rows, w = stages[i], batch_size_at(stages, here), mtp_weight_at(stages, here)
        tokens, n_mtp = rows * s.seq_len, max(cfg.mtp_depth, len(model.mtp_layers))     # losses beside the trunk's
        micro = max(1, cfg.micro_batch * shortest // s.seq_len)      # rows per forward: about as many tokens everywhere
        lr = lr_at(stages, min(seen + tokens / 2, stage_end - 1))     # at the step's middle: never 0 at step 0

        # 3b. a batch. Targets are counted over all ranks and micro-batches before the first forward: the loss is then
        # a mean over tokens, whatever the number of ranks and micro-batches
        batch = loader.next_batch(i, s.mix, s.seq_len, rows, rt.rank, rt.world).to(rt.device)
        counts = distributed.all_reduce(mtp.target_counts(batch.ids, batch.docs, s.seq_len, n_mtp), rt)
        check_targets(counts[0], step, f"the documents of {', '.join(sorted(set(batch.sources)))} have one token each")

        # 3c. forward and backward
        total = torch.zeros(1 + n_mtp, device=rt.device)
        for part, last in distributed.micro_batches(batch, micro, rt):
            sums = forward(model, part, n_mtp, cfg.mtp_depth)    # [1 + n_mtp] summed nats
            loss = sums[0] / counts[0]
            if n_mtp:
                loss = loss + w * mtp.mean_loss(sums[1:] / counts[1:].clamp_min(1), cfg.mtp_depth)
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
        left = seen < end or at < len(stages) - 1

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
            state = {"seen": seen, "step": step, "stage": at, "began": began, "loader": loader.state_dict(),
                     "spikes": spikes.state_dict()}
            checkpoint.save(run, step, model, tokenizer=tokenizer, config=configurator.to_dict(cfg), state=state,
                            meta={"stage": "base", "chat": False, "tokens": seen}, optimizer=optimizer, keep=cfg.keep,
                            shape=vars(model.cfg), rt=rt, background=cfg.async_save)
        if stop:
            break
    bar.close()
    checkpoint.finish()
    distributed.teardown(rt)
    lock.release()


# ---- start, resume, stages ------------------------------------------------------------------------------------------

def going_on(cfg: Config, ckpt: Path | None = None) -> Config:
    """
    cfg with the shape and the tokenizer of the checkpoint that it starts from, cfg.init; those that a started run took
    from there where it stands at ckpt. The context is that of the model, or of a stage with a longer one. UserError
    without a checkpoint.
    """
    shape = read_json(ckpt / "config.json").get("model") if ckpt else None
    source = ckpt if shape else checkpoint.find(cfg.init)
    shape = configurator.from_dict(ModelConfig, shape or checkpoint.read_shape(source), f"{source}/model.json")
    shape = replace(shape, max_seq_len=max(shape.max_seq_len, *(s.seq_len for s in cfg.all_stages())))
    try:
        return replace(cfg, model=shape, tokenizer=str(source))
    except ValueError as e:                                  # a rule of Config that this model breaks
        raise UserError(f"{source}: {e}") from None


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
    # the last stage needs the most look-ahead
    n_mtp = cfg.n_mtp_final if cfg.mtp_stage else max(cfg.mtp_depth, cfg.model.n_mtp)
    rank, world = distributed.ranks()
    loader = MixtureLoader(cfg.data, names, cfg.model.vocab_size, n_mtp=n_mtp, seed=cfg.seed,
                           max_seq_len=cfg.model.max_seq_len, tokenizer=tokenizer.fingerprint, rank=rank, world=world)
    for name in sources(Path(cfg.data) / "valid"):
        Shards(Path(cfg.data) / "valid", name, cfg.model.vocab_size, tokenizer=tokenizer.fingerprint)
    return tokenizer, loader


@dataclass
class Place:
    """Where in its table a run stands."""
    seen: int = 0               # tokens of the table that are trained
    step: int = 0               # steps that were made
    stage: int = -1             # the stage that model and optimizer are set up for, -1 before the first one
    began: int = 0              # `seen` where it began
    back: bool = False          # MTP fine-tuning will be made again: the table has more for the trunk than it had


def place_in_table(cfg: Config, saved: dict, old: dict) -> tuple[Place, list[str]]:
    """
    Where a run of the configuration `old` (config.json) that stands at `saved` goes on in cfg's table. -> (place, the
    fields of the table that must be as they were). Stages that are over stay; of the one that has begun, the RoPE base.

    MTP fine-tuning leaves the trunk and the first layer alone. So a table that trains the trunk further goes on from
    where it began, without its copies, and makes it again at the end.
    """
    place = Place(saved["seen"], saved["step"], saved["stage"], saved.get("began", 0))
    n, fixed = len(old.get("stages", [])), []
    tuned = place.stage == n and old.get("mtp_stage") is not None
    trunk = place                                            # where the trunk stands
    if tuned:
        begun = saved.get("began", sum(s["tokens"] for s in old["stages"]))
        trunk = Place(begun, place.step, n - 1, 0, back=True)
    for i in range(trunk.stage + 1):
        over = i < trunk.stage or trunk.seen >= total_tokens(cfg.stages[:i + 1])
        fixed += [f"stages.{i}.{name}" for name in (PAST if over else ["rope_base"])]
    if tuned and (len(cfg.stages) > n or trunk.seen < total_tokens(cfg.stages)):
        return trunk, fixed
    if tuned:
        over = place.seen >= total_tokens(cfg.all_stages())
        fixed += ["n_mtp_final", *(f"mtp_stage.{name}" for name in (PAST if over else ["rope_base"]))]
    return place, fixed


def resume(cfg: Config, stages: list[Stage], tokenizer: Tokenizer, loader: MixtureLoader, spikes: SpikeGuard,
           rt: Runtime, ckpt: Path) -> tuple[MiMo, torch.optim.AdamW, Place, list[str]]:
    """
    Everything as it was at ckpt. -> (model, optimizer, place, what is different from here on, in words). UserError for
    a configuration that cannot be obeyed.
    """
    saved = checkpoint.read_state(ckpt, "seen", "loader", "spikes")
    fields = checkpoint.read_shape(ckpt)
    checkpoint.same_shape(fields, vars(cfg.model), ckpt, ignore=("n_mtp", "rope_base", "max_seq_len"))
    loader.load_state_dict(saved["loader"])
    place, fixed = place_in_table(cfg, saved, read_json(ckpt / "config.json"))
    fixed += ["tokenizer"] if Tokenizer.load(ckpt).fingerprint != tokenizer.fingerprint else []
    changed = checkpoint.same_run(ckpt, cfg, FIXED + fixed)
    shape = configurator.from_dict(ModelConfig, fields, f"{ckpt}/model.json")
    if place.back:
        shape = replace(shape, n_mtp=cfg.model.n_mtp)
        changed.append("more for the trunk: back to where MTP fine-tuning began, without its copies; AdamW starts anew")
    else:
        spikes.load_state_dict(saved["spikes"])
    model = mtp.build(shape, "meta")
    set_context(model, stages, place.stage, cfg)
    model, optimizer = set_up(model, stages, place.stage, cfg, rt, ckpt, place.back)
    checkpoint.load_optimizer(ckpt, model, optimizer)
    return model, optimizer, place, changed


def begin_stage(model: MiMo, optimizer: torch.optim.AdamW, stages: list[Stage], at: int, cfg: Config, rt: Runtime,
                ) -> tuple[MiMo, torch.optim.AdamW]:
    """
    Context, RoPE base and activation checkpointing of stage `at`. MTP fine-tuning starts from copies of the layer, with
    a new optimizer.
    """
    stage = stages[at]
    if stage is cfg.mtp_stage:
        model = distributed.place(mtp.replicate(distributed.unshard(model), cfg.n_mtp_final), rt)
    set_context(model, stages, at, cfg)
    if stage is cfg.mtp_stage:
        return set_up(model, stages, at, cfg, rt)
    distributed.set_checkpointing(model, stage.checkpointing, cfg.compile)
    return model, optimizer


def set_context(model: MiMo, stages: list[Stage], at: int, cfg: Config) -> None:
    """RoPE base and context of stage `at`, on a model with those of the stage before it."""
    longest = max(s.seq_len for s in stages[:at + 1])
    if cfg.init:                                             # a model that exists keeps the context it was trained for
        longest = max(longest, cfg.model.max_seq_len)
    base = stages[at].rope_base
    model.set_context(model.cfg.rope_base if base is None else base, longest)


def set_up(model: MiMo, stages: list[Stage], at: int, cfg: Config, rt: Runtime,
           ckpt: str | Path | None = None, fewer_layers: bool = False) -> tuple[MiMo, torch.optim.AdamW]:
    """
    Freeze what stage `at` does not train, shard, fill a model that is still on the meta device (each rank its own rows,
    from the checkpoint or the seed; fewer_layers: as in checkpoint.read_weights), and make the optimizer. at = -1
    before the first stage.
    """
    model.requires_grad_(True)
    if 0 <= at and stages[at] is cfg.mtp_stage:
        mtp.freeze_all_but_new(model, cfg.model.n_mtp)
    elif cfg.train == "mtp":
        mtp.freeze_all_but_new(model, 0)
    model = distributed.shard(model, rt, checkpointing=stages[max(at, 0)].checkpointing, compile=cfg.compile,
                              shard_ranks=cfg.shard_ranks)
    if next(model.parameters()).is_meta:
        model = checkpoint.materialise(model, rt, seed=cfg.seed, ckpt=ckpt, fewer_layers=fewer_layers)
    return model, distributed.adamw(model, lr=0.0, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)


# ---- forward passes -------------------------------------------------------------------------------------------------

def forward(model: MiMo, batch: Batch, n_mtp: int, depth: int) -> Tensor:
    """Summed losses [1 + n_mtp] of one micro-batch, nats; depth as in mtp.losses."""
    width = batch.positions.shape[1] + 1 + n_mtp             # the loader's look-ahead is that of the last stage
    main, extra = mtp.losses(model, batch.ids[:, :width], batch.docs[:, :width], batch.positions, batch.bounds,
                             batch.mask, depth)
    return torch.stack([main, *extra])


@torch.no_grad()
def validate(model: MiMo, cfg: Config, stage: Stage, micro: int, rt: Runtime) -> dict[str, dict]:
    """
    Loss and MTP losses per source on held-out documents, nats per token, at the stage's context. The rows are the same
    for any number of ranks.
    """
    folder = Path(cfg.data) / "valid"
    n_mtp, found = max(cfg.mtp_depth, len(model.mtp_layers)), {}
    for name in sources(folder):
        loader = MixtureLoader(str(folder), [name], cfg.model.vocab_size, n_mtp=n_mtp, seed=0)
        rows = max(1, int(cfg.valid_tokens) // stage.seq_len)
        batch = loader.next_batch(0, {name: 1.0}, stage.seq_len, max(rows, rt.world), rt.rank, rt.world).to(rt.device)
        if rt.rank >= rows:                                  # more ranks than rows: it takes part with nothing to learn
            batch = replace(batch, mask=torch.zeros_like(batch.ids, dtype=torch.bool))
        parts = distributed.micro_batches(batch, micro, rt)
        sums = sum(forward(model, part, n_mtp, cfg.mtp_depth) for part, _ in parts)
        counts = mtp.target_counts(batch.ids, batch.docs, stage.seq_len, n_mtp, batch.mask)
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
