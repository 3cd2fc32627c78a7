"""
Where a training script runs and what its processes do together: device, process group, collectives, FSDP2.

    rt = distributed.setup(threads=1, seed=1)     # one CPU process, one GPU, or a rank under torchrun: one call
    model = distributed.shard(model, rt)          # wraps nothing where nothing needs it
    ...
    distributed.teardown(rt)

    torchrun --nproc_per_node=2 pretrain.py config/tiny.py --device=cpu     # two gloo processes, the same result

Not in the report, which trained on Xiaomi's own cluster. Training 7B parameters takes 16 bytes each (fp32 master
weights, gradients and Adam's two moments), 125 GB, so on GPUs of 80 GB they have to be sharded.

    one process on a CPU       nothing is wrapped, the model stays what mtp.build made
    shard_ranks = 1 on a CPU   nothing is wrapped: every rank keeps a copy and gradients are averaged once a step
                               (data parallelism; gathering the blocks of a small model costs more than it brings)
    anything else              fully_shard per Block, per MTP layer and at the root

Precision: fp32 on a CPU (matmul = "bf16": its products round to bf16). On CUDA the master weights are fp32, blocks
compute in bf16, gradients are reduced in fp32 (MixedPrecisionPolicy). One GPU is a mesh of one rank, so that it gets
the same precision from the same code.

Parameter names never change: activation checkpointing and torch.compile replace `block.forward`, they do not wrap the
module. The losses read model.norm, model.lm_head, model.embed_tokens and layer.final_layernorm outside of any forward.
That is right under FSDP2 because root and MTP layers keep their weights gathered from their forward to their backward
(reshard_after_forward=False), at the price of 2.9 GB of bf16 weights per GPU at 7B.
"""
import atexit
import copy
import ctypes
import math
import os
import platform
import random
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configurator import UserError


@dataclass(frozen=True)
class Runtime:
    """What a script knows of the process it runs in; made by setup()."""
    device: torch.device
    dtype: torch.dtype          # of the forward pass: fp32 on a CPU, bf16 on CUDA
    rank: int                   # 0 .. world - 1
    world: int                  # number of processes
    local_rank: int             # rank inside this machine, and the number of its GPU
    is_main: bool               # rank 0: it prints, logs and names checkpoints
    sharded: bool               # parameters become FSDP2 shards
    save_group: Any = None      # gloo group for background saves, apart from the one that training uses
    timeout: float = 1800.0     # seconds that a rank waits for the others in a collective


# ---- beginning and end ----------------------------------------------------------------------------------------------

def setup(threads: int = 1, seed: int = 0, device: str = "auto", shard_ranks: int = 0,
          timeout: float = 1800.0, matmul: str = "fp32") -> Runtime:
    """
    threads: torch threads on a CPU. seed: of Python, numpy and torch. device: "cpu", "cuda", or "auto" (CUDA when there
    is one). shard_ranks: ranks that a parameter is sharded over, 0 = all. timeout: seconds that a rank waits for the
    others, in any collective of any group, before it gives up; waiting_for() says so in words. matmul: "fp32", or
    "bf16": matrix products of fp32 on a CPU round their inputs to bf16 and sum in fp32.

    A process group is made when torchrun's variables are there (nccl on CUDA, gloo on a CPU), and for a single GPU.
    Raises UserError when CUDA is asked for and absent, when the processor has no products of bf16, and when shard_ranks
    does not divide the number of processes.
    """
    torchrun = "MASTER_ADDR" in os.environ and "RANK" in os.environ
    rank, world, local_rank = ((int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) if torchrun
                               else (0, 1, 0))
    if shard_ranks and world % shard_ranks:
        raise UserError(f"shard_ranks = {shard_ranks} should divide the number of processes, {world}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda' but torch sees no CUDA device; --device=cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {local_rank} of this node has no GPU ({torch.cuda.device_count()} found): "
                            "lower --nproc_per_node")
        torch.cuda.set_device(where)
    keep_freed_memory()
    torch.set_num_threads(threads)
    if matmul == "bf16" and not cuda and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UserError("matmul = 'bf16' needs a processor with AVX-512 or AMX; --matmul=fp32")
    torch.set_float32_matmul_precision("medium" if matmul == "bf16" and not cuda else "highest")
    save_group = None
    if torchrun and world > 1:
        patience = timedelta(seconds=timeout)
        with waiting_for("the start of all ranks", timeout, rank):
            dist.init_process_group("nccl" if cuda else "gloo", device_id=where if cuda else None, timeout=patience)
            save_group = dist.new_group(backend="gloo", timeout=patience)
    elif cuda and not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=where)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())     # else NCCL warns
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)
    catch_sigterm()
    return Runtime(where, torch.bfloat16 if cuda else torch.float32, rank, world, local_rank, rank == 0,
                   cuda or world > 1 and shard_ranks != 1, save_group, timeout)


def teardown(rt: Runtime) -> None:
    """Leave the process group together: a rank that leaves early can abort the others. First checkpoint.finish()."""
    if dist.is_initialized():
        if rt.world > 1:
            with waiting_for("the end of the run", rt.timeout):
                dist.barrier()
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """
    Tell glibc to keep freed memory. It otherwise gives every freed block over 32 MB back to the system and takes it
    again with a page fault per 4 KB, at each step. Worth several per cent of a CPU training step (docs/scale.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)                     # M_MMAP_THRESHOLD: blocks up to 32 MB are heap
        libc.mallopt(-1, (1 << 31) - 1)                # M_TRIM_THRESHOLD: and the heap is not given back


_stop = threading.Event()


def catch_sigterm() -> None:
    """SIGTERM (a preempted node, a scheduler) asks the loops to save and to exit with status 0."""
    _stop.clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: _stop.set())


def stop_requested(rt: Runtime) -> bool:
    """True on every rank once SIGTERM has reached any of them. A collective: all ranks ask in the same step."""
    if rt.world == 1:
        return stop_here()
    return bool(all_reduce(torch.tensor(float(stop_here()), device=rt.device), rt) > 0)


def stop_here() -> bool:
    """True once SIGTERM has reached this process. Not a collective: rollout.Rollout tells the other ranks."""
    return _stop.is_set()


# ---- collectives ----------------------------------------------------------------------------------------------------

def ranks() -> tuple[int, int]:
    """(rank, world); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def waiting_for(what: str, timeout: float, rank: int | None = None) -> Iterator[None]:
    """
    Around collectives: a time-out of `timeout` seconds, or a process that is gone, becomes a UserError that says which
    rank waited for what. On GPUs NCCL's watchdog ends the process itself, and names rank and collective in its log.
    """
    try:
        yield
    except RuntimeError as e:                          # torch.distributed's errors are such
        words = str(e).lower()
        me = ranks()[0] if rank is None else rank
        if "timed out" in words or "timeout" in words:
            raise UserError(f"rank {me} waited {timeout:g} s for {what}, in vain: another rank hangs, or works alone "
                            "for so long; its last lines, or py-spy dump on it, say at what. A larger timeout in the "
                            f"configuration makes the ranks wait longer ({type(e).__name__})") from e
        if "connection" in words or "peer" in words:
            raise UserError(f"rank {me} waited for {what}, and another rank is gone: its own last lines say why "
                            f"({type(e).__name__})") from e
        raise


def all_reduce(t: Tensor, rt: Runtime, op: Literal["sum", "max"] = "sum") -> Tensor:
    """Sum or largest of t over the ranks, in place and returned."""
    if rt.world > 1:
        with waiting_for("a sum over all ranks", rt.timeout):
            dist.all_reduce(t, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return t


def all_gather_object(value: Any, group: Any = None) -> list:
    """value (any picklable object) of every rank, in rank order. group: a process group with all ranks."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def all_to_all(parts: list[Tensor], sizes: list[int], rt: Runtime) -> list[Tensor]:
    """
    parts[r], one-dimensional int32 on the CPU, goes to rank r. -> what came from each rank, in rank order.
    sizes: how many numbers come from each rank; the receiver has to know.
    """
    if rt.world == 1:
        return parts
    received = torch.empty(sum(sizes), dtype=torch.int32, device=rt.device)
    with waiting_for("the answers of all ranks", rt.timeout):
        dist.all_to_all_single(received, torch.cat(parts).to(rt.device), sizes, [len(p) for p in parts])
    return list(received.cpu().split(sizes))


class Exchange:
    """
    Joins the rollouts of several processes (rollout.SingleProcess is the one without others).

    exchange(state) -> the states of all ranks, in rank order; every rank must call it equally often. It has a gloo
    group of its own because it runs beside the trainer's collectives; to make one is itself a collective.
    steps: decode steps between two exchanges. UserError when a process is gone or silent for rt.timeout seconds.
    """
    def __init__(self, rt: Runtime, steps: int):
        self.rank, self.world, self.steps, self.timeout = rt.rank, rt.world, steps, rt.timeout
        with waiting_for("the start of the rollout", rt.timeout):
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=rt.timeout))

    def __call__(self, state: Any) -> list:
        with waiting_for("the next round of the rollout", self.timeout):
            return all_gather_object(state, self.group)


# ---- micro-batches and gradients ------------------------------------------------------------------------------------

def micro_batches(batch: Any, per_micro: int, rt: Runtime) -> Iterator[tuple[Any, bool]]:
    """
    Yields (micro-batch, is it the last) of a data.loader.Batch, in pieces of per_micro rows. Every rank gets the same
    number of pieces, because each forward is a collective under FSDP: where this rank has no rows left it gets its row
    0 with nothing to learn (mask all zero), which adds nothing. UserError, on all ranks, when one has no row at all.

    By hand: 5 rows in pieces of 2 are rows (0,2) (2,4) (4,5); if another rank has 7 rows, a fourth piece follows.
    """
    most = rows = batch.positions.shape[0]
    least = rows
    if rt.world > 1:
        most, least = all_reduce(torch.tensor([rows, -rows], device=rt.device), rt, "max").tolist()
        least = -least
    if least == 0:
        raise UserError(f"a rank has no row: the batch must have at least {rt.world} rows, one per process")
    n = -(-most // per_micro)
    for i in range(n):
        lo, hi = min(i * per_micro, rows), min((i + 1) * per_micro, rows)
        part = batch.rows(lo, hi) if hi > lo else batch.rows(0, 1)
        if hi == lo:
            part = replace(part, mask=torch.zeros_like(part.ids, dtype=torch.bool))
        yield part, i == n - 1


def sync_gradients(model: nn.Module, last: bool, rt: Runtime) -> None:
    """Before the backward of each micro-batch: FSDP reduces gradients over the ranks in the last one only."""
    if rt.sharded:
        model.set_requires_gradient_sync(last or rt.world == 1)      # alone there is nothing to wait for
        model.set_is_last_backward(last)


@torch.no_grad()
def average_gradients(model: nn.Module, rt: Runtime) -> None:
    """
    After the backward of the last micro-batch: ranks that keep whole copies average their gradients, in one message.
    FSDP has done so in its backward, and one process has nothing to average.
    """
    if rt.sharded or rt.world == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]      # the same ones on every rank
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= rt.world
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


@torch.no_grad()
def clip_grad_norm(model: nn.Module | Iterable[Tensor], max_norm: float) -> float:
    """
    g *= min(1, max_norm / |g|), |g| the 2-norm over all parameters and all ranks. -> |g| before clipping; max_norm 0
    only measures. Under FSDP each gradient is a shard and the norm is reduced over the mesh; clipping rank by rank
    would be another algorithm.
    """
    params = model.parameters() if isinstance(model, nn.Module) else model
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return 0.0
    norm = torch.nn.utils.get_total_norm(grads)
    value = float(norm.full_tensor() if hasattr(norm, "placements") else norm)
    if math.isfinite(value) and value > max_norm > 0:
        torch._foreach_mul_([g.to_local() if hasattr(g, "placements") else g for g in grads], max_norm / (value + 1e-6))
    return value


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the parameters that are not frozen; weight decay on matrices only, gains and biases have none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


# ---- sharding -------------------------------------------------------------------------------------------------------

UNSHARDED = "_unsharded_twin"     # attribute of a sharded model: an unsharded copy on the meta device, for replica()


def blocks_of(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(trunk blocks, MTP layers): the units that are gathered, recomputed and compiled one at a time."""
    return list(model.layers), list(getattr(model, "mtp_layers", []))


def mesh_for(world: int, shard_ranks: int, device_type: str):
    """
    One dimension: every parameter in `world` parts. Two (hybrid): in `shard_ranks` parts, each held by world /
    shard_ranks groups; gathering then stays inside a node and only gradients, once a step, cross between nodes.
    ValueError if shard_ranks does not divide world.
    """
    from torch.distributed.device_mesh import init_device_mesh
    n = shard_ranks or world
    if world % n:
        raise ValueError(f"shard_ranks = {n} must divide the number of processes, {world}")
    if n == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world // n, n), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, rt: Runtime, *, checkpointing: str = "none", compile: bool = False,
          shard_ranks: int = 0) -> nn.Module:
    """
    Activation checkpointing and torch.compile per block, then fully_shard. -> the same model.

    The model may be on the meta device (checkpoint.materialise fills it afterwards, each rank its own rows) or hold its
    weights already (then every rank must hold the same ones). Call it once per model and before the optimizer is made.
    ValueError for a bad shard_ranks.
    """
    trunk, extra = blocks_of(model)
    twin = meta_twin(model) if rt.sharded else None
    set_checkpointing(model, checkpointing, compile)
    if not rt.sharded:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mixed = rt.dtype != torch.float32
    # inputs are not cast: cos and sin of RoPE stay fp32, 32k positions do not fit in bf16's mantissa
    policy = MixedPrecisionPolicy(param_dtype=rt.dtype if mixed else None, cast_forward_inputs=False,
                                  reduce_dtype=torch.float32 if mixed else None)
    mesh = mesh_for(rt.world, shard_ranks, rt.device.type)
    for block in trunk:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for layer in extra:                   # its final_layernorm is used after its forward: keep it gathered
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    object.__setattr__(model, UNSHARDED, twin)   # not a submodule: invisible to parameters() and state_dict()
    return model


def set_checkpointing(model: nn.Module, kind: str, compile: bool = False) -> None:
    """
    What the blocks keep for the backward pass from now on (recomputed(); "none" keeps all), and whether torch.compile
    compiles them. It replaces each block's `forward`, not the module, so names, weights and FSDP's hooks stay: it may
    be called again between two steps, on a sharded model too.
    """
    trunk, extra = blocks_of(model)
    for block in trunk + extra:
        vars(block).pop("forward", None)      # what an earlier call put there
        if kind != "none":
            block.forward = recomputed(block, kind)
        if compile:                           # outermost: dynamo sees checkpointing as one of its own operators
            block.forward = torch.compile(block.forward)


def recomputed(block: nn.Module, kind: str):
    """
    A forward for `block` that keeps less for the backward pass.

    full: keep the block's input only and run the block again in the backward pass.
    selective: also keep q, k, v, the attention output (recomputing it is the part that grows with T^2) and o_proj's
    output. Norms, RoPE and the MLP are computed again; the MLP's F-wide states are two thirds of a block's memory. On
    a CPU attention is computed again too, because torch does not see the C.
    """
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
    if kind == "full":
        return partial(checkpoint, block.forward, use_reentrant=False)
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    # an axis of the weights [D,F], [F,D] of the MLP, and of LoRA's [D,r], [r,D]
    again = {block.mlp.gate_proj.out_features, *(A.shape[0] for n, A in adapters_of(block).items() if n[-1] == "A")}

    def policy(ctx, op, *args, **kwargs):
        keep = again.isdisjoint(args[-1].shape) if op in products else "attention" in str(op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(checkpoint, block.forward, use_reentrant=False,
                   context_fn=partial(create_selective_checkpoint_contexts, policy))


# ---- parameters of a sharded model ----------------------------------------------------------------------------------

def local_rows(p: Tensor) -> tuple[int, int]:
    """
    Rows lo .. hi - 1 of dimension 0 that this rank holds of a sharded parameter; all rows of a plain one. FSDP2 cuts
    like torch.chunk. By hand: 10 rows on 4 ranks are 3 3 3 1, 5 rows on 4 are 2 2 1 0.
    """
    if not hasattr(p, "placements"):
        return 0, p.shape[0] if p.ndim else 1
    rows, lo, hi = p.shape[0], 0, p.shape[0]
    for dim, placement in enumerate(p.placements):
        if placement.is_shard():
            part = -(-rows // p.device_mesh.size(dim))
            lo = min(p.device_mesh.get_local_rank(dim) * part, rows)
            hi = min(lo + part, rows)
    return lo, hi


def local(p: Tensor) -> Tensor:
    """The part of p on this rank, sharing memory with it."""
    return p.to_local() if hasattr(p, "placements") else p


def full(p: Tensor) -> Tensor:
    """p whole, on every rank. A collective under FSDP: every rank must call it in the same order."""
    return p.full_tensor() if hasattr(p, "placements") else p


@torch.no_grad()
def assign(p: Tensor, value: Any) -> None:
    """p = value; value is a full tensor, or anything that returns rows when sliced (a safetensors slice)."""
    lo, hi = local_rows(p)
    if hi > lo:
        local(p).copy_(value[lo:hi] if hasattr(p, "placements") else value[...])


@torch.no_grad()
def fill(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> nn.Module:
    """Set parameters from (name, full tensor) pairs, one at a time; the model may be plain, sharded or a replica."""
    reshard(model)
    params = dict(model.named_parameters())
    for name, value in named:
        assign(params[name], value)
    return model


def is_sharded(model: nn.Module) -> bool:
    """True for a model that shard() has sharded."""
    return getattr(model, UNSHARDED, None) is not None


def reshard(model: nn.Module) -> None:
    """Back to sharded parameters where a forward without backward (validation) has left them gathered."""
    if is_sharded(model):
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()


# ---- whole models out of a sharded one ------------------------------------------------------------------------------

def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter of LoRA's adapters (lora.py); {} for a model without."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@torch.no_grad()
def replica_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """
    (name, full tensor) weight by weight: what an engine's replica, an export or a checkpoint is filled from; LoRA's
    adapters are merged into the weight that they stand beside. At most one gathered parameter exists at a time. Under
    FSDP every rank must run through it.
    """
    reshard(model)
    adapters = adapters_of(model)
    for name, p in model.named_parameters():
        if name in adapters:
            continue
        layer, weight = name.removesuffix(".weight"), full(p.detach())
        if f"{layer}.lora_A" in adapters:
            pair = (full(adapters[f"{layer}.lora_{which}"]) for which in "AB")
            weight = model.get_submodule(layer).merged(weight, *pair)
        yield name, weight


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree with its parameters on the meta device: no memory, the same names."""
    on_meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
               for p in model.parameters()}
    return copy.deepcopy(model, on_meta)


def replica(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """
    A plain model of the same shape, with memory but without weights: fill(replica, replica_state(model)) sets them.
    """
    twin = copy.deepcopy(getattr(model, UNSHARDED)) if is_sharded(model) else meta_twin(model)
    twin.cfg = model.cfg                          # set_context may have moved on since the twin was made
    return twin.to(dtype).to_empty(device=device).requires_grad_(False)


def unshard(model: nn.Module) -> nn.Module:
    """The whole model as a plain one in CPU memory on every rank; itself when it is not sharded."""
    if not is_sharded(model):
        return model
    return fill(replica(model, "cpu", torch.float32), replica_state(model))


def place(model: nn.Module, rt: Runtime) -> nn.Module:
    """Move a plain model to where it trains. One that will be sharded stays on the CPU: shard() moves it by blocks."""
    return model if rt.sharded else model.to(rt.device)
