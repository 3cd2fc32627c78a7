"""
plan.py: exact parameters, the report's schedule, and memory that agrees with what a real step allocates.
"""
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fork_ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import configurator
import distributed
import kernels
import mtp
import plan
import pretrain
import rl
import sft
from configurator import UserError
from engine import Engine
from model import Block, ModelConfig, flops_per_token
from schedule import Stage

ROOT = Path(__file__).resolve().parent.parent


# ---- arithmetic --------------------------------------------------------------------------------------------

def test_parameters_are_the_published_ones_and_those_of_the_modules():
    """
    7,622,619,136 trunk; 7,833,409,536 with one MTP layer; 8,254,990,336 with three (weight names: Hugging
    Face).
    """
    shape = ModelConfig.mimo_7b(n_mtp=1)
    assert [replace(shape, n_mtp=n).n_params() for n in (0, 1, 3)] == [7_622_619_136, 7_833_409_536, 8_254_990_336]
    for n in (0, 1, 3):
        model = mtp.build(ModelConfig.mimo_7b(n_mtp=n), "meta")
        assert sum(p.numel() for p in model.parameters()) == replace(shape, n_mtp=n).n_params()
    small = mtp.build(ModelConfig(), "meta")
    assert sum(p.numel() for p in small.parameters()) == ModelConfig().n_params()


def test_steps_by_hand():
    """
    100 tokens in batches of 10 are 10 steps; growing from 5 to 10 over them 100/5 ln 2 = 13.86; then 10 a
    step.
    """
    assert plan.steps_of(Stage(tokens=200, seq_len=2, batch_size=10)) == pytest.approx(10)
    grown = Stage(tokens=200, seq_len=2, batch_size=10, batch_size_start=5, batch_warmup_tokens=200)
    assert plan.steps_of(grown) == pytest.approx(13.863, rel=1e-4)
    longer = Stage(tokens=400, seq_len=2, batch_size=10, batch_size_start=5, batch_warmup_tokens=200)
    assert plan.steps_of(longer) == pytest.approx(23.863, rel=1e-4)


def test_days_by_hand():
    """
    2 GPUs of 100 TFLOP/s at 50% are 1e14 FLOP/s: a stage of tokens x FLOPs/token = 8.64e18 takes one day.
    """
    shape = ModelConfig()
    per_token = flops_per_token(shape, 256)
    (row,) = plan.plan(shape, [Stage(tokens=8.64e18 / per_token)], 2, mfu=0.5, tflops=100.0)
    assert row["days"] == pytest.approx(1.0)


def test_kv_cache_of_the_7b():
    """2 x 36 layers x 8 heads x 128 x 2 bytes = 147,456 per token."""
    assert plan.kv_bytes_per_token(ModelConfig.mimo_7b()) == 147_456
    (with_kv,) = plan.plan(ModelConfig.mimo_7b(), [Stage(seq_len=8192)], 8, kv_tokens=32_768)
    assert with_kv["memory"]["KV"] == 32_768 * 147_456 + 2 * 7_622_619_136


def test_sharding_divides_state_and_hybrid_sharding_divides_it_less():
    shape, stage = ModelConfig.mimo_7b(n_mtp=1), [Stage(seq_len=8192)]
    full, hybrid = (plan.plan(shape, stage, 64, shard_ranks=n)[0]["memory"] for n in (0, 8))
    assert full["optimizer"] == 8 * 7_833_409_536 / 64 and hybrid["optimizer"] == 8 * 7_833_409_536 / 8
    each, last = (plan.plan(shape, stage, 8, reduce_each=r)[0]["memory"]["gradients"] for r in (1, 0))
    assert last - each == pytest.approx(4 * 7_833_409_536 * 7 / 8)


# ---- against real allocations ------------------------------------------------------------------------------

class Live(TorchDispatchMode):
    """
    Bytes of all storages that exist, and their maximum: every operator's outputs are followed until they are
    freed.
    """
    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()

    def add(self, t):
        t = getattr(t, "_local_tensor", t)                       # FSDP's parameters and gradients
        if not isinstance(t, torch.Tensor) or (storage := t.untyped_storage()) in self.seen:
            return
        self.seen[storage] = size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, size)

    def drop(self, size):
        self.live -= size

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves((args, out)):                       # FSDP makes some tensors out of sight
            self.add(t)
        return out


def real_step(n_layer, vocab_size, checkpointing, micros, reduce_each=False, train="all", **fields):
    """The second of two AdamW steps, every storage counted. -> peak, row of the plan, bytes of Adam's state."""
    rt = distributed.setup(seed=1, device="cpu")
    shape = ModelConfig(vocab_size, n_layer, d_model=96, n_head=6, n_kv_head=2, head_dim=16, d_ff=256, n_mtp=1,
                        **fields)
    B, T = 8, 64
    model = mtp.build(shape, "meta")
    if train == "mtp":
        mtp.freeze_all_but_new(model, 0)
    model = distributed.shard(model, rt, checkpointing=checkpointing)
    checkpoint.materialise(model, rt)
    optimizer = distributed.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    ids = torch.randint(0, 1024, (B, T + 2))
    docs, positions = torch.zeros_like(ids), torch.arange(T)[None].expand(B, T)
    with Live() as measured:
        for p in model.parameters():
            measured.add(p)
        for _step in range(2):                                   # the first makes the optimizer's state
            measured.peak = 0
            for micro in range(micros):                          # a second forward stands on accumulated gradients
                trunk, extra = mtp.losses(model, ids, docs, positions, None)
                distributed.sync_gradients(model, micro + 1 == micros or reduce_each, rt)
                (trunk + extra[0]).backward()
            peak = measured.peak
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    (row,) = plan.plan(shape, [Stage(tokens=1e6, seq_len=T, batch_size=B)], rt.world, micro_batch=B,
                         checkpointing=checkpointing, device="cpu", reduce_each=reduce_each, train=train)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    distributed.teardown(rt)
    return peak, row, state


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("layers, vocabulary", [(6, 1024), (3, 8192)])
@pytest.mark.parametrize("micros", [1, 2])
def test_memory_is_within_ten_per_cent_of_a_real_step(checkpointing, layers, vocabulary, micros):
    """
    One process, once activations dominate, once logits do. With one micro-batch a step gradients come as activations
    go: the plan without the gradients.
    """
    peak, row, state = real_step(layers, vocabulary, checkpointing, micros)
    planned = row["total"] - (row["memory"]["gradients"] if micros == 1 else 0)
    assert planned == pytest.approx(peak, rel=0.10)
    assert row["memory"]["optimizer"] == state


@pytest.mark.parametrize("fields", [{}, dict(tie_embeddings=True, qkv_bias=False)], ids=["untied", "tied"])
@pytest.mark.parametrize("layers, vocabulary, train", [(6, 1024, "mtp"), (3, 8192, "mtp"), (3, 8192, "all")])
def test_memory_of_mtp_layers_alone_and_of_tied_embeddings(layers, vocabulary, train, fields):
    """A frozen trunk has no gradients, no moments and no activations; a tied head is no second matrix."""
    peak, row, state = real_step(layers, vocabulary, "none", 2, train=train, **fields)
    assert row["total"] == pytest.approx(peak, rel=0.10)
    assert row["memory"]["optimizer"] == state


def step_on_a_rank(out, checkpointing, reduce_each):
    peak, row, _ = real_step(3, 4096, checkpointing, 2, reduce_each)
    Path(f"{out}{os.environ['RANK']}").write_text(str(peak / row["total"]))


@pytest.mark.parametrize("checkpointing, reduce_each", [
    ("none", False), ("full", True),
    pytest.param("none", True, marks=pytest.mark.slow), pytest.param("full", False, marks=pytest.mark.slow)])
def test_memory_on_two_ranks(tmp_path, checkpointing, reduce_each):
    """Under FSDP, two micro-batches."""
    run_ranks(2, tmp_path, step_on_a_rank, str(tmp_path / "out"), checkpointing, reduce_each)
    for rank in range(2):
        assert float((tmp_path / f"out{rank}").read_text()) == pytest.approx(1, abs=0.10)


def test_gpu_activations_are_the_kernels_own_save_lists(monkeypatch):
    """
    One block of the 7B in bf16 at T = 8,192 on the meta device, through the Triton operators' fake versions.
    """
    monkeypatch.setattr(kernels, "TRITON", {("meta", torch.bfloat16)})      # nothing is launched on the meta device
    shape, T, kept = ModelConfig.mimo_7b(), 8192, {}
    with torch.device("meta"):
        block = Block(shape).to(torch.bfloat16)
        x = torch.empty(1, T, shape.d_model, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = torch.empty(1, T, shape.head_dim), torch.empty(1, T, shape.head_dim)
    known = {t.untyped_storage()._cdata for t in [*block.parameters(), cos, sin]}      # not per layer

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x, cos, sin)
    assert plan.block_bytes(shape, "none", gpu=True) == 119_432
    assert sum(s.nbytes() for s in kept.values()) == T * 119_432


# ---- the command, and every configuration file -------------------------------------------------------------

def test_plan_of_the_7b_prints_the_report():
    done = subprocess.run([sys.executable, "plan.py", "config/mimo_7b.py", "--gpus=8"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    for fact in ("7,622,619,136", "7,833,409,536", "8,254,990,336", "84B", "168B", "10.284T", "17.784T", "21.784T",
                 "23.284T", "1,360", "2,560", "0.000107", "32,768", "640,000"):
        assert fact in done.stdout, fact
    assert not (ROOT / "out/mimo_7b").exists()


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda p: p.stem)
def test_every_config_loads_and_plans(path, capsys):
    """plan.py finds out whose configuration it is, and the model; SFT and RL files go from one folder to another."""
    script = plan.script_of(str(path))
    assert script is (rl if "_rl" in path.stem else sft if "_sft" in path.stem else pretrain)
    cfg = configurator.load(script.Config, [str(path)])
    plan.main(configurator.load(plan.Config, [str(path), "--gpus=8"]))
    printed = capsys.readouterr().out
    assert "memory per GPU" in printed and "KV" in printed
    assert ("8,254,990,336" in printed) == path.stem.startswith("mimo_7b")
    assert script is pretrain or cfg.init != cfg.out and cfg.out.startswith("out/")
    with pytest.raises(UserError, match="shard_ranks = 3 should divide gpus = 8"):
        plan.main(configurator.load(plan.Config, [str(path), "--set.shard_ranks=3"]))


def test_plan_says_what_it_cannot_take(tmp_path):
    (tmp_path / "odd.py").write_text("nonsense = 1\n")
    with pytest.raises(UserError, match="odd.py: its fields are those of none"):
        plan.main(plan.Config(str(tmp_path / "odd.py")))
    (tmp_path / "mine_rl.py").write_text("group_size = 4\n")
    with pytest.raises(UserError, match="which model"):
        plan.main(plan.Config(str(tmp_path / "mine_rl.py")))


def test_rl_memory_counts_what_the_engine_allocates():
    """A bf16 replica with three MTP layers and a cache of 2,048 tokens in blocks, as on a GPU; two of them draft."""
    shape = ModelConfig(vocab_size=512, n_layer=4, d_model=64, n_head=4, n_kv_head=2, head_dim=16, d_ff=160, n_mtp=3)
    replica = distributed.replica(mtp.build(shape), "cpu", torch.bfloat16)
    engine = Engine(replica, slots=4, max_len=1024, n_draft=2, layout="blocks", kv_tokens=2048, plain=True)
    cache = sum(t.nbytes for t in vars(engine.cache).values() if isinstance(t, torch.Tensor) and t.is_floating_point())
    weights = sum(p.nbytes for p in replica.parameters())
    how = dict(micro_tokens=64, n_draft=2, kv_tokens=2048)
    kinds = plan.rl_memory(shape, 3, 8, **how)
    assert cache > 0 and kinds["KV"] == pytest.approx(weights + cache, rel=0.10)
    assert plan.rl_memory(shape, 3, 8, copies=1, **how)["KV"] - kinds["KV"] == weights
    trunk = sum(p.numel() for n, p in replica.named_parameters() if not n.startswith("mtp_layers"))
    assert kinds["optimizer"] == 8 * trunk / 8                      # MTP layers are frozen
