"""
Where and how a training script runs: device, process group, gradient reductions, metrics, guards against bad
steps and bad endings. Sharding is in parallel.py, checkpoints in checkpoint.py, arithmetic about memory and
FLOPs in memory.py; the scripts import them all from here.

    rt = runtime.setup(threads=1, seed=1)     # one CPU process, one GPU, or a rank under torchrun: one call
    ...
    runtime.teardown(rt)

    torchrun --nproc_per_node=8 pretrain.py config/mimo_7b.py     # docs/scale.md: lines for several nodes

Not in the report. Precision: fp32 on CPU; bf16 compute with fp32 master weights and reductions on CUDA.
"""
import atexit
import ctypes
import json
import math
import os
import platform
import random
import signal
import threading
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import (  # noqa: F401  (the scripts say runtime.latest, runtime.save_checkpoint ...)
    RunError,
    die,
    find,
    finish_saves,
    git_commit,
    latest,
    load_checkpoint,
    load_model,
    load_optimizer,
    newest,
    ranks,
    read_manifest,
    read_meta,
    read_shape,
    read_state,
    read_weights,
    same_shape,
    same_start,
    save_checkpoint,
    shared,
)
from configurator import os_words
from memory import flops_per_token
from parallel import (  # noqa: F401
    assign,
    average_gradients,
    fill,
    full,
    full_state,
    is_sharded,
    local,
    local_rows,
    materialise,
    place,
    replica,
    replica_state,
    reshard,
    shard,
    sync_gradients,
    unshard,
)


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    dtype: torch.dtype          # of the forward pass: fp32 on CPU, bf16 on CUDA
    rank: int
    world: int
    local_rank: int
    is_main: bool               # rank 0: prints, logs, names checkpoints
    sharded: bool               # parameters become FSDP2 shards: over several ranks, and on CUDA (precision)
    save_group: Any = None      # gloo group of background saves, apart from the one training uses


# ---- beginning and end -------------------------------------------------------------------------------------

def setup(threads: int = 1, seed: int = 0, device: str = "auto", shard_ranks: int = 0) -> Runtime:
    """
    threads: torch threads on CPU. seed: Python, numpy and torch. device: "cpu", "cuda" or "auto" (CUDA when
    there is one). shard_ranks: 1 on CPU means that every rank keeps a plain copy (parallel.py). A process group
    is made when torchrun's variables are there (nccl on CUDA, gloo on CPU), and for one GPU, whose mixed
    precision is FSDP2's on a mesh of one. Ends the run with one line if CUDA is asked for and absent.
    """
    torchrun = "MASTER_ADDR" in os.environ and "RANK" in os.environ
    rank, world, local_rank = ((int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) if torchrun
                               else (0, 1, 0))
    if shard_ranks and world % shard_ranks:
        die(f"shard_ranks = {shard_ranks} should divide the number of processes, {world}")
    if device == "cuda" and not torch.cuda.is_available():
        die("device = 'cuda' but torch sees no CUDA device; --device=cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            die(f"rank {local_rank} of this node has no GPU ({torch.cuda.device_count()} found): "
                "lower --nproc_per_node")
        torch.cuda.set_device(where)
    keep_freed_memory()
    torch.set_num_threads(threads)
    save_group = None
    if torchrun and world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=where if cuda else None)
        save_group = dist.new_group(backend="gloo")
    elif cuda and not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=where)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())     # else NCCL warns
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)
    catch_sigterm()
    return Runtime(where, torch.bfloat16 if cuda else torch.float32, rank, world, local_rank, rank == 0,
                   cuda or world > 1 and shard_ranks != 1, save_group)


def teardown(rt: Runtime) -> None:
    """
    Wait for a background save, then leave the process group together: a rank that leaves early can abort the
    others.
    """
    finish_saves()
    if dist.is_initialized():
        if rt.world > 1:
            dist.barrier()
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """
    glibc gives every freed block over 32 MB back to the system and takes it again with a page fault per 4 KB,
    each step anew. Keeping it is worth several per cent of a CPU training step (docs/scale.md); Linux with
    glibc only.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)                     # M_MMAP_THRESHOLD: blocks up to 32 MB are heap
        libc.mallopt(-1, (1 << 31) - 1)                # M_TRIM_THRESHOLD: and the heap is not given back


_stop = threading.Event()


def catch_sigterm() -> None:
    """Preemptible nodes send SIGTERM: the loops then save and exit with status 0."""
    _stop.clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: _stop.set())


def stop_requested(rt: Runtime) -> bool:
    """
    True on every rank once SIGTERM has reached any of them. A collective: all ranks ask in the same step.
    """
    flag = torch.tensor(float(_stop.is_set()), device=rt.device)
    return bool(all_reduce_sum(flag, rt) > 0) if rt.world > 1 else _stop.is_set()


@contextmanager
def reading(*more: type[Exception]):
    """
    What a person gave is read inside: a ValueError, a file that cannot be read, or one of `more` ends the run
    with one line, not a traceback.
    """
    try:
        yield
    except OSError as e:
        die(os_words(e))
    except (ValueError, *more) as e:
        die(str(e))


def target(path) -> Path:
    """
    Where a result will be written: its folder is made and looked at now, so that a run ends before its work
    and not after it when the result could not be kept. -> path.
    """
    path = Path(path)
    with reading():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; a file is to be written there")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path}: no permission to write in {path.parent}")
    return path


# ---- over the ranks ----------------------------------------------------------------------------------------

def all_reduce_sum(t: Tensor, rt: Runtime) -> Tensor:
    """
    Sum of t over the ranks, in place and returned. Counts of targets go through here BEFORE the first
    micro-batch.
    """
    if rt.world > 1:
        dist.all_reduce(t)
    return t


def all_reduce_max(t: Tensor, rt: Runtime) -> Tensor:
    """Largest t over the ranks, in place and returned."""
    if rt.world > 1:
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t


def deal(parts: list[Tensor], sizes: list[int], rt: Runtime) -> list[Tensor]:
    """
    parts[r], 1-d int32 on the CPU, goes to rank r. -> what came from each rank, in rank order; sizes: the numbers in
    each of these, which the receiver has to know.
    """
    if rt.world == 1:
        return parts
    came = torch.empty(sum(sizes), dtype=torch.int32, device=rt.device)
    dist.all_to_all_single(came, torch.cat(parts).to(rt.device), sizes, [len(p) for p in parts])
    return list(came.cpu().split(sizes))


class Exchange:
    """
    What joins the rollout threads of several processes (rollout.Alone: of one). exchange(facts) -> the facts of all
    ranks, by rank; each rank must call it equally often. It has a gloo group of its own, because it runs beside the
    trainer's collectives; to make it is a collective. RuntimeError when a process is gone. steps: decode steps
    between two exchanges.
    """
    def __init__(self, rt: Runtime, steps: int):
        self.rank, self.world, self.steps, self.group = rt.rank, rt.world, steps, dist.new_group(backend="gloo")

    def __call__(self, facts) -> list:
        return shared(facts, self.group)


def micro_ranges(rows: int, per_micro: int, rt: Runtime) -> list[tuple[int, int, bool]]:
    """
    [(lo, hi, last)]: this rank's rows in pieces of per_micro. Every rank gets the same number of pieces,
    because each forward is a collective under FSDP: a rank with fewer rows gets pieces lo == hi at the end,
    for which it must still run a forward and a backward that add nothing. Ends the run, on all ranks, when
    one has no row.

    By hand: 5 rows in pieces of 2 are (0,2) (2,4) (4,5); if another rank has 7 rows, a fourth piece (5,5)
    follows.
    """
    most, least = all_reduce_max(torch.tensor([rows, -rows], device=rt.device), rt).tolist()
    if least == 0:
        die(f"a rank has no row: the batch must have at least {rt.world} rows, one per process")
    n = -(-most // per_micro)
    return [(min(i * per_micro, rows), min((i + 1) * per_micro, rows), i == n - 1) for i in range(n)]


def micro_batches(batch, per_micro: int, rt: Runtime):
    """
    (micro-batch, is it the last) over a data.loader.Batch, the same number on every rank (micro_ranges).
    Where this rank has no rows left it gets its row 0 with nothing to learn: mask all zero.
    """
    for lo, hi, last in micro_ranges(batch.positions.shape[0], per_micro, rt):
        if hi > lo:
            yield batch.rows(lo, hi), last
        else:
            row = batch.rows(0, 1)
            yield replace(row, mask=torch.zeros_like(row.ids, dtype=torch.bool)), last


@torch.no_grad()
def clip_grad_norm(model: nn.Module | Iterable[Tensor], max_norm: float) -> float:
    """
    g *= min(1, max_norm / |g|) with |g| the 2-norm over all parameters and all ranks. -> |g| before clipping.
    Under FSDP each gradient is a shard and the norm is reduced over the mesh; clipping before the reduction,
    rank by rank, would be another algorithm.
    """
    params = model.parameters() if isinstance(model, nn.Module) else model
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return 0.0
    norm = full(torch.nn.utils.get_total_norm(grads))
    value = float(norm)
    if math.isfinite(value) and value > max_norm > 0:
        scale = max_norm / (value + 1e-6)
        torch._foreach_mul_([local(g) for g in grads], scale)
    return value


# ---- guards ------------------------------------------------------------------------------------------------

def check_finite(values: dict[str, Tensor | float], model: nn.Module | None = None, step: int = 0) -> None:
    """
    Ends the run when a value is NaN or infinite, naming the first bad gradient or weight of the model. The
    values must be the same on every rank (reduced), so that all ranks end together. The weights on disk stay
    as they were.
    """
    bad = [k for k, v in values.items() if not bool(torch.isfinite(torch.as_tensor(v)).all())]
    if not bad:
        return
    params = [] if model is None else list(model.named_parameters())
    named = [(f"weight of {name}", p) for name, p in params]     # first: one bad weight spoils every gradient
    named += [(f"gradient of {name}", p.grad) for name, p in params if p.grad is not None]
    first = next((name for name, t in named if not bool(torch.isfinite(local(t.detach())).all())), None)
    if dist.is_initialized() and dist.get_world_size() > 1:
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, first)
        first = next((f for f in found if f), None)
    die(f"step {step}: {bad[0]} is not finite" + (f"; first bad tensor: {first}" if first else "")
        + "; the last checkpoint is from before this step")


class SpikeGuard:
    """
    Opt-in: skip(norm) is True when a gradient norm exceeds factor times its running mean (0.98 old + 0.02
    new, over the steps that were not skipped; never in the first 20). The caller leaves out optimizer.step()
    and logs skipped=True. The report does not mention spikes; skipping a step is what large runs do instead
    of restarting.
    """
    def __init__(self, factor: float = 0.0, warm: int = 20):
        self.factor, self.warm, self.mean, self.n, self.skipped = factor, warm, 0.0, 0, 0

    def skip(self, norm: float) -> bool:
        if self.factor and self.n >= self.warm and norm > self.factor * self.mean:
            self.skipped += 1
            return True
        keep = min(0.98, self.n / (self.n + 1))        # a plain mean until it is longer than 50 steps
        self.mean = keep * self.mean + (1 - keep) * norm
        self.n += 1
        return False

    def state_dict(self) -> dict:
        return {"mean": self.mean, "n": self.n, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        self.mean, self.n, self.skipped = state["mean"], state["n"], state["skipped"]


# ---- telling -----------------------------------------------------------------------------------------------

class Metrics:
    """
    RUN/metrics.jsonl, one line a step. resume_at = s drops the lines after step s, which a killed run wrote
    beyond its last checkpoint, and a half-written last line: a resumed run's file equals that of an
    uninterrupted one. enabled=False (ranks other than 0) writes nothing.
    """
    def __init__(self, run, resume_at: int = 0, enabled: bool = True):
        self.path, self.enabled = Path(run) / "metrics.jsonl", enabled
        if not enabled:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = read_rows(self.path) if resume_at else []
            kept = [line for line, row in rows if row.get("step", 0) <= resume_at]
            new = self.path.with_suffix(".tmp")
            new.write_text("".join(kept), encoding="utf-8")
            os.replace(new, self.path)
        except OSError as e:
            die(f"cannot write {self.path}: {e.strerror or e}")

    def log(self, **row) -> None:
        """
        Numbers, strings, lists and dicts of them; NaN and infinity are written as null, the file stays JSON.
        """
        if not self.enabled:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(finite(row), allow_nan=False) + "\n")
        except OSError as e:
            die(f"cannot write {self.path}: {e.strerror or e}; the last checkpoint is whole")


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """(line, parsed) for every whole line of a metrics file; [] when there is none."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else ():
        try:
            rows.append((line, json.loads(line)))
        except ValueError:
            continue
    return [(line, row) for line, row in rows if line.endswith("\n") and isinstance(row, dict)]


def finite(value):
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


PEAK_TFLOPS = {"GB200": 2500.0, "B200": 2250.0, "H200": 989.0, "H100": 989.0, "H800": 989.0, "H20": 148.0,
               "A100": 312.0, "A800": 312.0, "L40S": 362.0, "4090": 165.0, "3090": 71.0}   # dense bf16


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of this GPU, None when unknown (and on CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def mfu(shape, seq_len: int, tokens_per_second: float, rt: Runtime) -> float | None:
    """
    Model FLOP utilisation: FLOPs the model needs (recomputation not counted) per second over the GPUs' peak.
    shape has ModelConfig's fields, tokens_per_second is over all ranks. None where the peak is unknown.
    """
    peak = peak_tflops(rt.device)
    return flops_per_token(shape, seq_len) * tokens_per_second / (rt.world * peak * 1e12) if peak else None
