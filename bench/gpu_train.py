"""
Training speed at the 7B's layer shapes on one GPU: the part `train` of bench/gpu.py.

    python bench/gpu.py train             # under two minutes on an H200; results/gpu/train.csv and .json
    python bench/gpu.py train --dry_run   # any machine: a toy, checks the script, the numbers mean nothing

As many 7B layers as fit the card (plan.plan decides; fp32 master weights and AdamW on the GPU), one MTP layer, the full
vocabulary, one row of T tokens, bf16 compute through FSDP2 on a mesh of one: pretrain.py's own path. Cases: T = 8,192
without recomputation, eager and compiled per block, and T = 32,768 with selective recomputation; full causal and
(eager) packed documents of 2,048 tokens. Rows per case: tokens/s; MFU by causal FLOPs, which are what is computed, and
by torchtitan's convention, which counts the masked half of attention too; peak memory over the plan; share of device
time per part, from one profiled step.

Target: 50% MFU at T = 8,192. Anchor: torchtitan, Llama-3.1-8B on H100, 33.7% eager and 39.0% compiled by its own
convention. With fewer layers, lm_head and loss are a larger share of a step than in the full model.
"""
import re
import statistics
import time
from dataclasses import replace

import torch

import distributed
import mtp
import plan
from kernels.attention import doc_bounds
from metrics import peak_tflops
from model import ModelConfig, flops_per_token
from schedule import Stage

TARGETS = {
    "train T=8192 eager: MFU": ("share", ">=", 0.50),
    "train T=8192 compiled: MFU": ("share", ">=", 0.50),
    "train T=8192 eager: peak memory over plan": ("x", "<=", 1.10),
}

# kernel names of this repository, cuBLAS, inductor, FSDP; the first match wins
PARTS = [
    ("attention", r"attention|forward_kernel|dq_kernel|dkv_kernel|delta_kernel|flash|fmha"),
    ("loss", r"loss_kernel|logprob|log_softmax|nll"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|addmm|aten::mm|aten::linear"),
    ("norm, RoPE, SwiGLU", r"norm_kernel|norm_backward|rope|swiglu|silu|triton_"),
    ("optimizer and clip", r"adam|multi_tensor|foreach|lerp"),
    ("copies of FSDP and others", r"all_gather|reduce_scatter|split_with|chunk_cat|nccl|mem|copy|cat|fill"),
]


def part_of(kernel: str) -> str:
    """The part of a training step that a GPU kernel of this name belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, kernel, re.I)), "other")


def layers_that_fit(shape: ModelConfig, T: int, budget: float, checkpointing: str) -> int:
    """Largest number of trunk blocks whose plan stays under `budget` bytes; at least 1."""
    fit = [n for n in range(1, 37) if planned(replace(shape, n_layer=n), T, checkpointing, "cuda") < budget]
    return max(fit, default=1)


def planned(shape: ModelConfig, T: int, checkpointing: str, device: str) -> float:
    """Bytes that torch should allocate for one row of T tokens by the plan, without its reserve for CUDA itself."""
    stage = Stage(tokens=1e6, seq_len=T, batch_size=1, checkpointing=checkpointing)
    (row,) = plan.plan(shape, [stage], 1, reduce_each=True, device=device)
    return row["total"] - row["memory"]["reserve"]


def step_of(shape: ModelConfig, T: int, compile: bool, checkpointing: str, documents: int, rt):
    """
    A function step(micros) that makes one training step of `micros` micro-batches (forward of trunk and MTP layer,
    backward, clip, AdamW) and returns the gradient norm. documents: tokens per packed document, 0 = one per row.
    """
    model = mtp.build(shape, "meta")
    model = distributed.shard(model, rt, checkpointing=checkpointing, compile=compile)
    model.to_empty(device=rt.device)
    with torch.no_grad():                        # not initial_weights(): billions of numbers drawn on the CPU
        for p in model.parameters():
            p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    generator, n = torch.Generator().manual_seed(0), shape.n_mtp
    ids = torch.randint(0, shape.vocab_size, (1, T + 1 + n), generator=generator).to(rt.device)
    length = documents or T
    docs = (torch.arange(T + 1 + n) // length)[None].to(rt.device)
    positions = (torch.arange(T) % length)[None].to(rt.device)
    cu = torch.tensor([*range(0, T, length), T], dtype=torch.int32, device=rt.device)
    counts = mtp.target_counts(ids, docs, T, n)

    def step(micros: int = 1) -> float:
        for _ in range(micros):
            bounds = doc_bounds(cu, 1, T) if documents else None
            trunk, extra = mtp.losses(model, ids, docs, positions, bounds)
            (trunk / counts[0] + 0.3 * sum(extra) / (counts[1] * n)).backward()
        norm = distributed.clip_grad_norm(model, 1.0)                # reads a number: it ends with the device
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    return step


def shares(step, cuda: bool) -> dict[str, float]:
    """Part -> its share of device time in one step, the largest first."""
    from torch.profiler import ProfilerActivity
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as p:
        step()
    spent: dict[str, float] = {}
    for event in p.key_averages():
        on_cpu = event.device_type == torch.autograd.DeviceType.CPU
        t = event.self_cpu_time_total if not cuda else 0.0 if on_cpu else event.self_device_time_total
        spent[part_of(event.key)] = spent.get(part_of(event.key), 0.0) + t
    total = sum(spent.values()) or 1.0
    return {part: t / total for part, t in sorted(spent.items(), key=lambda kv: -kv[1]) if t}


def one_case(run, rt, shape: ModelConfig, T: int, compile: bool, checkpointing: str, documents: int) -> None:
    """Measure one case and add its rows."""
    name = f"train T={T} {'compiled' if compile else 'eager'}"
    if documents:
        name += f" documents of {documents}"
    step = step_of(shape, T, compile, checkpointing, documents, rt)
    for _ in range(2 if run.cuda else 1):                        # compiles, allocates, warms up
        step()
    if run.cuda:
        torch.cuda.synchronize()
    seconds = []
    for _ in range(5 if run.cuda else 2):
        t = time.perf_counter()
        step()
        if run.cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - t)
    s = statistics.median(seconds)
    what = f"{shape.n_layer} layers, {checkpointing} recomputation"
    run.row(f"{name}: speed", T / s, "tokens/s", s * 1e3, what)
    peak = peak_tflops(rt.device)
    if peak:
        speed = T / s / (peak * 1e12)
        causal, whole = (flops_per_token(shape, documents or T, causal=c) * speed for c in (True, False))
        run.row(f"{name}: MFU", causal, "share", note=f"of {peak:g} TFLOP/s, causal FLOPs")
        run.row(f"{name}: MFU by torchtitan's convention", whole, "share")
        run.row(f"{name}: FLOPs over the measured matrix ceiling", causal * peak / run.matrix, "share")
    if run.cuda:
        torch.cuda.reset_peak_memory_stats()
        step(micros=2)              # the plan's case: the second forward stands on the first one's gradients
        used = torch.cuda.max_memory_allocated()
        share = used / planned(shape, T, checkpointing, rt.device.type)
        run.row(f"{name}: peak memory over plan", share, "x", note=f"{used / 1e9:.1f} GB")
    for part, share in shares(step, run.cuda).items():
        run.row(f"{name}: time in {part}", share, "share")


def train(run) -> None:
    """All cases; one that does not fit the card prints a line and is left out."""
    rt = distributed.setup(seed=0, device="cuda" if run.cuda else "cpu")
    base = replace(ModelConfig.mimo_7b(n_mtp=1), rope_base=10_000.0) if run.cuda else ModelConfig()
    budget = 0.88 * torch.cuda.get_device_properties(rt.device).total_memory if run.cuda else 0.0
    short, long, length = (8192, 32_768, 2048) if run.cuda else (64, 128, 16)
    for T, checkpointing in ((short, "none"), (long, "selective")):
        layers = layers_that_fit(base, T, budget, checkpointing) if run.cuda else 2
        shape = replace(base, n_layer=layers, max_seq_len=T)
        for compile, documents in ((False, 0), (True, 0), (False, length)):
            if compile and (not run.cuda or T == long):          # a CPU's compiler says nothing about a GPU
                continue
            try:
                one_case(run, rt, shape, T, compile, checkpointing, documents)
            except torch.OutOfMemoryError as e:
                print(f"train T={T} with {layers} layers does not fit: {str(e).split('.')[0]}", flush=True)
            if run.cuda:
                torch._dynamo.reset()
                torch.cuda.empty_cache()
    distributed.teardown(rt)
