"""
FSDP2 sharding of a plain model, and plain tensors back out of a sharded one.

Not in the report, which trained on Xiaomi's own cluster; needed to train 7B parameters (fp32 master weights,
gradients and Adam states: 16 bytes each, 125 GB) on GPUs of 80 GB.

    world size 1 on CPU       nothing is wrapped, the model stays what mtp.build made
    shard_ranks = 1 on CPU    nothing is wrapped: a copy per rank, gradients averaged once a step (plain data
                              parallelism; for a small model, gathering every block eats most of what a rank adds)
    anything else             fully_shard per Block, per MTP layer and at the root

On CUDA the master weights are fp32, blocks compute in bf16 and gradients are reduced in fp32
(MixedPrecisionPolicy); on CPU all is fp32. One GPU is a mesh of one rank, so it gets the same mixed precision
from the same code.

The names of the parameters never change: checkpointing and torch.compile replace `block.forward`, they do not
wrap the module. The losses read model.norm, model.lm_head, model.embed_tokens and layer.final_layernorm
outside of any forward; that is right under FSDP2 because root and MTP layers keep their weights gathered from
their forward to their backward (reshard_after_forward=False), at the price of 2.9 GB of bf16 weights per GPU
at 7B.

    torchrun --nproc_per_node=2 pretrain.py config/tiny.py --device=cpu     # two gloo processes, one result
"""
import copy
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

PLAIN = "_plain_twin"     # attribute of a sharded model: an unsharded copy on the meta device, for replica()


def blocks_of(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(trunk blocks, MTP layers): the units that are gathered, recomputed and compiled one at a time."""
    return list(model.layers), list(getattr(model, "mtp_layers", []))


# ---- sharding ----------------------------------------------------------------------------------------------

def mesh_for(world: int, shard_ranks: int, device_type: str):
    """
    One dimension: every parameter in `world` parts. Two (hybrid): `shard_ranks` parts, each held by world /
    shard_ranks groups; gathering then stays inside a node and only gradients, once a step, cross between
    nodes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    n = shard_ranks or world
    if world % n:
        raise ValueError(f"shard_ranks = {n} must divide the number of processes, {world}")
    if n == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world // n, n), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, rt, *, checkpointing: str = "none", compile: bool = False,
          shard_ranks: int = 0) -> nn.Module:
    """
    Activation checkpointing and torch.compile per block, then fully_shard. The model may be on the meta
    device (materialise fills it afterwards, each rank its own rows) or hold its weights already (then every
    rank must hold the same ones). Call it once per model and before the optimizer is made. Raises ValueError
    for a bad shard_ranks.
    """
    trunk, extra = blocks_of(model)
    twin = plain_twin(model) if rt.sharded else None
    for block in trunk + extra:
        if checkpointing != "none":
            block.forward = recomputed(block, checkpointing)
        if compile:                       # outermost: dynamo sees checkpointing as one of its own operators
            block.forward = torch.compile(block.forward)
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
    object.__setattr__(model, PLAIN, twin)       # not a submodule: invisible to parameters() and state_dict()
    return model


def recomputed(block: nn.Module, kind: str):
    """
    full: keep a block's input only and run the block again in the backward pass. selective: also keep q, k,
    v, the attention output (recomputing it is the part that grows with T^2) and o_proj's output; what is made
    again is norms, RoPE and the MLP, whose F-wide states are two thirds of a block's memory. On a CPU attention is made
    again too: torch does not see the C.
    """
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
    if kind == "full":
        return partial(checkpoint, block.forward, use_reentrant=False)
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    F = block.mlp.gate_proj.out_features

    def policy(ctx, op, *args, **kwargs):
        keep = F not in args[-1].shape if op in products else "attention" in str(op)   # weight [D,F], [F,D]
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(checkpoint, block.forward, use_reentrant=False,
                   context_fn=partial(create_selective_checkpoint_contexts, policy))


def sync_gradients(model: nn.Module, last: bool, rt) -> None:
    """Before each micro-batch's backward: FSDP reduces gradients over the ranks once, in the last one."""
    if rt.sharded:
        model.set_requires_gradient_sync(last or rt.world == 1)      # alone there is nothing to wait for
        model.set_is_last_backward(last)


@torch.no_grad()
def average_gradients(model: nn.Module, rt) -> None:
    """
    After the last micro-batch's backward: plain copies average their gradients over the ranks, all in one
    message. FSDP has done so in its backward, and one process has nothing to average.
    """
    if rt.sharded or rt.world == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]      # the same ones on every rank
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    flat /= rt.world
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


# ---- weights in: seed, checkpoint, another model -----------------------------------------------------------

def local_rows(p: Tensor) -> tuple[int, int]:
    """
    Rows lo..hi-1 of dimension 0 that this rank holds of a sharded parameter; all rows of a plain one. FSDP2
    cuts like torch.chunk. By hand: 10 rows on 4 ranks are 3 3 3 1, 5 rows on 4 are 2 2 1 0.
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
def assign(p: Tensor, value) -> None:
    """p = value; value is a full tensor, or anything that returns rows when sliced (a safetensors slice)."""
    lo, hi = local_rows(p)
    if hi > lo:
        local(p).copy_(value[lo:hi] if hasattr(p, "placements") else value[...])


def materialise(model: nn.Module, rt, *, seed: int = 0, ckpt=None) -> nn.Module:
    """
    Memory for a model on the meta device, then weights: from a checkpoint folder, else drawn from seed. A
    sharded model gets this rank's rows only; a plain one that will be sharded stays in CPU memory until
    shard() moves it block by block. The draws come from one CPU generator in name order: any number of ranks
    starts from the same numbers.
    """
    reshard(model)
    if any(p.is_meta for p in model.parameters()):
        later = rt.sharded and not is_sharded(model)
        model.to_empty(device="cpu" if later else rt.device)
    if ckpt is not None:
        from checkpoint import read_weights
        read_weights(ckpt, model)
    else:
        fill(model, model.initial_weights(seed))
    return model


@torch.no_grad()
def fill(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> nn.Module:
    """
    Set parameters from (name, full tensor) pairs, one at a time. Works on a plain, a sharded or a replica
    model.
    """
    reshard(model)
    params = dict(model.named_parameters())
    for name, value in named:
        assign(params[name], value)
    return model


# ---- weights out: replicas for decoding, whole models ------------------------------------------------------

def is_sharded(model: nn.Module) -> bool:
    return getattr(model, PLAIN, None) is not None


def reshard(model: nn.Module) -> None:
    """Back to sharded parameters where a forward without backward (validation) has left them gathered."""
    if is_sharded(model):
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def replica_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """
    (name, full tensor) parameter by parameter: what an engine replica, an export or a checkpoint is filled
    from. At most one gathered parameter exists at a time. Under FSDP every rank must run through it.
    """
    reshard(model)
    for name, p in model.named_parameters():
        yield name, full(p.detach())


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All of replica_state at once. At world size 1 on CPU the tensors share memory with the model."""
    return dict(replica_state(model))


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree with parameters on the meta device: no memory, same names."""
    on_meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
               for p in model.parameters()}
    return copy.deepcopy(model, on_meta)


def replica(model: nn.Module, device, dtype: torch.dtype) -> nn.Module:
    """
    A plain model of the same shape with memory but without weights: fill(replica, replica_state(model)) sets
    them.
    """
    twin = copy.deepcopy(getattr(model, PLAIN)) if is_sharded(model) else plain_twin(model)
    twin.cfg = model.cfg                          # set_context may have moved on since the twin was made
    return twin.to(dtype).to_empty(device=device).requires_grad_(False)


def unshard(model: nn.Module) -> nn.Module:
    """The whole model as a plain one in CPU memory on every rank; itself when it is not sharded."""
    if not is_sharded(model):
        return model
    return fill(replica(model, "cpu", torch.float32), replica_state(model))


def place(model: nn.Module, rt) -> nn.Module:
    """
    A plain model to where it trains; one that will be sharded stays on the CPU, shard() moves it block by
    block.
    """
    return model if rt.sharded else model.to(rt.device)
