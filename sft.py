"""
Supervised fine-tuning on packed chat samples (report section 3.1).

    python sft.py config/tiny_sft.py                               # from out/tiny/base, seconds to minutes on a CPU
    python plan.py config/mimo_7b_sft.py --gpus=8                  # memory per GPU by kind, nothing is trained
    torchrun --nproc_per_node=8 sft.py config/mimo_7b_sft.py       # from the 7B base, packed to 32,768 tokens

The recipe: three filters (16-gram overlap of the query with an evaluation set; mixed-language or incomplete answers; at
most eight answers per query), samples packed into rows of seq_len without ever being cut or seeing each other, the loss
on the assistant's tokens including <|im_end|>, a constant learning rate, batch 128. The MTP layers are trained along.

Data: JSONL, one {"messages": [{"role", "content"}, ...]} a line, answers as "<think>\\n...\\n</think>\\n\\nanswer".
The model's shape comes from the checkpoint. The report is silent on the number of epochs and on the MTP weight in SFT;
we keep the 0.1 of the end of pre-training, averaged over the layers.
"""
import time
from collections.abc import Sequence
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
import lora
import mtp
from configurator import UserError
from data.lock import hold
from data.pack import PackedLoader
from data.sft_data import load_samples, read_questions
from lora import LoRA
from metrics import Metrics, check_finite, check_targets
from model import ModelConfig
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    init: str = "out/tiny/base"           # checkpoint to start from
    out: str = "out/tiny/sft"             # checkpoints and metrics.jsonl go here
    data: str = "out/tiny/sft.jsonl"      # chat samples
    heldout: str = "out/tiny/problems/test.jsonl"   # no query may share a 16-gram with these questions; "" = none
    seq_len: int = 256                    # tokens per packed row [paper 3.1: 32,768]
    batch_size: int = 16                  # packed rows per step over all ranks [paper 3.1: 128]
    micro_batch: int = 16                 # rows per forward and rank; never changes the result
    steps: int = 60                       # optimizer steps
    warmup_steps: int = 0                 # linear warm-up [ours: the report says constant]
    lr: float = 3e-5                      # constant [paper 3.1]
    mtp_weight: float = 0.1               # weight of the mean MTP loss [ours]
    beta1: float = 0.9                    # AdamW [paper 2.3]
    beta2: float = 0.95                   # AdamW [paper 2.3]
    weight_decay: float = 0.1             # AdamW, on matrices only [paper 2.3]
    grad_clip: float = 1.0                # global gradient norm [paper 2.3]
    max_per_query: int = 8                # answers kept per query [paper 3.1]
    system: str | None = None             # system prompt of samples without one; "" = an empty system turn, None = what
                                          # the chat template says
    train: Literal["all", "mtp"] = "all"  # mtp: the MTP layers alone, on a frozen trunk
    lora: LoRA = LoRA()                   # adapters on a frozen base instead of all parameters: --lora.rank=16 [ours]
    mtp_depth: int = 1                    # applications of the one MTP layer in the loss, for engines that draft that
                                          # many tokens with it [FastMTP: 3]
    save_every: int = 50                  # steps between checkpoints
    keep: int = 2                         # checkpoints kept
    seed: int = 1                         # order of rows
    threads: int = 1                      # torch threads per process on CPU
    matmul: Literal["fp32", "bf16"] = "fp32"   # products on a CPU: bf16 rounds what goes in, sums are fp32; for AMX
    device: Literal["auto", "cpu", "cuda"] = "auto"   # auto: CUDA when there is one
    checkpointing: Literal["none", "selective", "full"] = "none"   # activation checkpointing
    compile: bool = False                 # torch.compile per block, CUDA
    shard_ranks: int = 0                  # ranks a parameter is sharded over, 0 = all
    reduce_each: bool = False             # reduce-scatter gradients after every micro-batch: saves one fp32 copy of
                                          # them per GPU, costs more communication
    plain: bool = False                   # torch code only: no C, no Triton; for reading and debugging

    def __post_init__(self):
        configurator.at_least(self, 2, "seq_len")
        configurator.at_least(self, 1, "batch_size", "micro_batch", "steps", "max_per_query", "save_every", "keep",
                              "threads", "mtp_depth")
        configurator.at_least(self, 0, "warmup_steps", "lr", "mtp_weight", "weight_decay", "grad_clip", "shard_ranks",
                              "seed")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} should be in [0, 1)")
        if self.lora.rank and self.train == "mtp":
            raise ValueError(f"lora.rank = {self.lora.rank} trains adapters of the trunk, train = 'mtp' the MTP "
                             "layers: should be one of the two")


FIXED = ["init", "seed", "seq_len", "system", "lora"]     # what a started run keeps; docs/scale.md has the table


def main(cfg: Config) -> None:
    # ---- 1. where we run, start or resume -----------------------------------------------------------------------
    rt = distributed.setup(threads=cfg.threads, seed=cfg.seed, device=cfg.device, shard_ranks=cfg.shard_ranks,
                           matmul=cfg.matmul)
    kernels.set_plain(cfg.plain)
    run = Path(cfg.out)
    lock = hold(run / "run.lock")                            # one run, one folder
    ckpt = checkpoint.to_resume(run)
    saved, changed = checkpoint.read_state(ckpt, "step", "loader") if ckpt else None, []
    if ckpt:
        checkpoint.same_start(ckpt, cfg.init)
        changed = checkpoint.same_run(ckpt, cfg, FIXED)
        checkpoint.steps_left(ckpt, saved["step"], cfg.steps)
    start = ckpt or checkpoint.find(cfg.init)                # a folder of checkpoints or one checkpoint
    shape, tokenizer = checkpoint.read_shape(start), Tokenizer.load(start)
    if cfg.system is not None:
        tokenizer = tokenizer.with_system(cfg.system)        # goes into the checkpoint: served as trained
    if cfg.seq_len > shape["max_seq_len"]:
        raise UserError(f"seq_len = {cfg.seq_len} is longer than the context of {start}, "
                        f"max_seq_len = {shape['max_seq_len']}")
    model = mtp.build(configurator.from_dict(ModelConfig, shape, f"{start}/model.json"), "meta")
    if cfg.train == "mtp":
        mtp.freeze_all_but_new(model, 0)
    if cfg.lora.rank:
        lora.attach(model, cfg.lora, rt.dtype)
    model = distributed.shard(model, rt, checkpointing=cfg.checkpointing, compile=cfg.compile,
                              shard_ranks=cfg.shard_ranks)
    base = lora.base_of(ckpt, cfg.lora) if ckpt else start   # with adapters: what the run began with, frozen
    model = checkpoint.materialise(model, rt, ckpt=base)     # each rank reads its own rows
    if cfg.lora.rank:
        lora.restore(model, ckpt, cfg.seed)
    optimizer = distributed.adamw(model, cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay)
    n_mtp = max(cfg.mtp_depth, len(model.mtp_layers))        # losses beside the trunk's
    mtp.check_depth(cfg.mtp_depth, cfg.train, shape["n_mtp"], str(start))
    if cfg.train == "mtp" and not (shape["n_mtp"] and cfg.mtp_weight):
        raise UserError(f"train = 'mtp' has nothing to train: {start} has {shape['n_mtp']} MTP layer(s), mtp_weight = "
                        f"{cfg.mtp_weight}; `hf.py import --mtp=1` adds a layer")

    # ---- 2. samples: filter, then pack --------------------------------------------------------------------------
    samples, report = load_samples(cfg.data, tokenizer, cfg.heldout, max_per_query=cfg.max_per_query,
                                   cut=cfg.train == "mtp")
    loader = PackedLoader(samples, cfg.seq_len, tokenizer.eos_id, n_mtp=n_mtp, seed=cfg.seed,
                          vocab_size=shape["vocab_size"], max_seq_len=shape["max_seq_len"])
    step = 0
    if saved:
        step = saved["step"]
        loader.load_state_dict(saved["loader"])
        checkpoint.load_optimizer(ckpt, model, optimizer)
    # the trunk of a base model stays one when only its MTP layers train
    chat = cfg.train == "all" or checkpoint.read_meta(start).get("chat", True)
    meta = {"stage": "sft", "chat": chat, "init": str(cfg.init if saved else start), "turns": turns(samples),
            "examples": examples(cfg.heldout)} | ({"base": lora.identity(base)} if cfg.lora.rank else {})
    if rt.is_main:
        print(configurator.show(cfg))
        print(f"samples: {report}; {loader.n_dropped} longer than a row; rows filled to {loader.fill:.1%}"
              + (f"; resumed at step {step} from {ckpt}" if saved else f"; starting from {start}"),
              *(f"  changed: {words}" for words in changed), sep="\n")
        if cfg.lora.rank and not checkpoint.read_meta(base).get("chat", True):
            print(f"note: {base} is no chat model, and LoRA leaves embedding and head as they are: a token that they "
                  "were never trained on, <|im_end|> for one, is not learnt (docs/lab_log.md)")
    metrics = Metrics(run, resume_at=step, enabled=rt.is_main)
    bar = tqdm(total=cfg.steps, initial=step, unit="step", desc="sft", disable=None if rt.is_main else True)

    # ---- 3. the loop --------------------------------------------------------------------------------------------
    while step < cfg.steps:
        t0 = time.perf_counter()
        lr = cfg.lr * min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else cfg.lr

        # 3a. a batch of packed rows; targets are counted over all ranks before the first forward
        batch = loader.next_batch(cfg.batch_size, rt.rank, rt.world).to(rt.device)
        counts = mtp.target_counts(batch.ids, batch.docs, cfg.seq_len, n_mtp, batch.mask)
        counts = distributed.all_reduce(counts, rt)
        check_targets(counts[0], step, f"no sample of these rows of {cfg.data} has a token to train on")

        # 3b. forward and backward
        total = torch.zeros(1 + n_mtp, device=rt.device)
        for part, last in distributed.micro_batches(batch, cfg.micro_batch, rt):
            main_sum, extra = mtp.losses(model, part.ids, part.docs, part.positions, part.bounds, part.mask,
                                          cfg.mtp_depth)
            sums = torch.stack([main_sum, *extra])           # [1 + n_mtp] summed nats
            # a mean over all trained tokens of the global batch: per-row means would overweigh short rows
            loss = sums[0] / counts[0]
            if n_mtp:
                loss = loss + cfg.mtp_weight * mtp.mean_loss(sums[1:] / counts[1:].clamp_min(1), cfg.mtp_depth)
            distributed.sync_gradients(model, last or cfg.reduce_each, rt)
            (loss * rt.world).backward()
            total += sums.detach()
        losses = distributed.all_reduce(total, rt) / counts.clamp_min(1)      # means over the targets, nats per token

        # 3c. update
        distributed.average_gradients(model, rt)
        norm = distributed.clip_grad_norm(model, cfg.grad_clip)
        check_finite({"loss": losses, "gradient norm": norm}, model, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # 3d. log and save
        seconds = time.perf_counter() - t0
        metrics.log(step=step, loss=float(losses[0]), mtp_loss=losses[1:].tolist(), lr=lr, grad_norm=norm,
                    trained_tokens=int(counts[0]), epochs=round(loader.epochs(), 3),
                    tokens_per_second=cfg.batch_size * cfg.seq_len / seconds)
        bar.update(1)
        bar.set_postfix_str(f"loss {float(losses[0]):.3f} epoch {loader.epochs():.2f}")
        stop = distributed.stop_requested(rt)
        if stop or step == cfg.steps or step % cfg.save_every == 0:
            checkpoint.save(run, step, model, tokenizer=tokenizer, config=configurator.to_dict(cfg), meta=meta,
                            optimizer=optimizer, keep=cfg.keep, shape=vars(model.cfg), rt=rt,
                            state={"step": step, "loader": loader.state_dict()},
                            beside=lora.writer(model, cfg.lora, base))
        if stop:
            break
    bar.close()
    checkpoint.finish()
    distributed.teardown(rt)
    lock.release()


def turns(samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    """`multi` if one of the first 1,000 samples (ids, mask) has more than one answer, else `single`; for sample.py."""
    several = lambda mask: np.count_nonzero(np.diff(np.asarray(mask, np.int8), prepend=0) == 1) > 1
    return "multi" if any(several(samples[i][1]) for i in range(min(1000, len(samples)))) else "single"


def examples(heldout: str) -> list[str]:
    """Three held-out questions, the first, one from the middle and the last: what sample.py suggests to ask."""
    questions = read_questions(heldout) if heldout else []
    return [questions[i] for i in sorted({0, len(questions) // 2, len(questions) - 1})] if questions else []


if __name__ == "__main__":
    configurator.run(main, Config)
