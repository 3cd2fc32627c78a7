"""
plan.py: exact parameters, the report's schedule, and memory that agrees with what a real step allocates.
"""
import gc
import math
import os
import random
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from fork_ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import configurator
import distributed
import kernels
import lora
import mtp
import plan
import pretrain
import rl
import sft
from configurator import UserError
from data.problems import Problem, prompt_ids, write_problems
from model import Block, ModelConfig, flops_per_token
from schedule import Stage
from tokenizer import Tokenizer

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
    memory = plan.rl_memory(ModelConfig.mimo_7b(n_mtp=3), rl.Config(kv_tokens=32_768), 8)
    assert memory["KV cache"] == 32_768 * 147_456 and memory["replica"] == 2 * 8_254_990_336


def test_sharding_divides_state_and_hybrid_sharding_divides_it_less():
    shape, stage = ModelConfig.mimo_7b(n_mtp=1), [Stage(seq_len=8192)]
    full, hybrid = (plan.plan(shape, stage, 64, shard_ranks=n)[0]["memory"] for n in (0, 8))
    assert full["optimizer"] == 8 * 7_833_409_536 / 64 and hybrid["optimizer"] == 8 * 7_833_409_536 / 8
    each, last = (plan.plan(shape, stage, 8, reduce_each=r)[0]["memory"]["gradients"] for r in (1, 0))
    assert last - each == pytest.approx(4 * 7_833_409_536 * 7 / 8)


def test_the_worst_moment_is_the_forwards_or_the_reductions():
    """
    7B on 8: embedding and head, 2 x 621,281,280 + 4,096 gradients, in bf16 and fp32 are 7.46 GB, which do not add to
    the 36.9 GB of activations that are gone by then; under full recomputation of 512 tokens they are the larger.
    """
    shape = ModelConfig.mimo_7b(n_mtp=1)
    long, short = (plan.plan(shape, [Stage(seq_len=T, checkpointing=kind)], 8)[0]
                   for T, kind in ((8192, "none"), (512, "full")))
    for row, key in ((long, "reduction"), (short, "forward")):
        memory = row["memory"]
        assert memory["reduction"] == 6 * (2 * 621_281_280 + 4096)
        forward = memory["activations"] + memory["logits"]
        less = memory["reduction"] if key == "reduction" else forward
        assert less == min(forward, memory["reduction"])
        assert row["total"] == pytest.approx(sum(memory.values()) - less)


def test_recomputation_by_hand():
    """
    A 7B block at 8,192 tokens: 177.2M weights in products, so 2 x 177.2M + 2 x 4,096 x 8,192 = 421 MFLOP forward; gate
    and up 2 x 2 x 4,096 x 11,008 = 180. The days grow by as much.
    """
    shape = ModelConfig.mimo_7b()
    assert plan.recomputed_flops(shape, 8192, "full", 1) == pytest.approx(421.5e6, rel=1e-3)
    assert plan.recomputed_flops(shape, 8192, "selective", 36) == 36 * 4 * 4096 * 11_008
    days = [plan.plan(shape, [Stage(seq_len=8192, checkpointing=kind)], 8)[0]["days"]
            for kind in ("none", "selective", "full")]
    flops = flops_per_token(shape, 8192)
    assert days[1] / days[0] == pytest.approx(1 + 36 * 180.36e6 / flops, rel=1e-3)
    assert days[2] / days[0] == pytest.approx(1 + 36 * 421.5e6 / flops, rel=1e-3)


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


def real_step(n_layer, vocab_size, checkpointing, micros, reduce_each=False, train="all", adapters=None, **fields):
    """The second of two AdamW steps, every storage counted. -> peak, row of the plan, bytes of Adam's state."""
    rt = distributed.setup(seed=1, device="cpu")
    shape = ModelConfig(vocab_size, n_layer, d_model=96, n_head=6, n_kv_head=2, head_dim=16, d_ff=256, n_mtp=1,
                        **fields)
    B, T = 8, 64
    model = mtp.build(shape, "meta")
    if train == "mtp":
        mtp.freeze_all_but_new(model, 0)
    if adapters:
        lora.attach(model, adapters, rt.dtype)
    model = distributed.shard(model, rt, checkpointing=checkpointing)
    checkpoint.materialise(model, rt)
    if adapters:
        lora.restore(model, None, 1)
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
    stage = Stage(tokens=1e6, seq_len=T, batch_size=B, checkpointing=checkpointing)
    (row,) = plan.plan(shape, [stage], rt.world, micro_batch=B, device="cpu", reduce_each=reduce_each, train=train,
                       lora=adapters)
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


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("layers, vocabulary, adapters, fields", [
    (6, 1024, lora.LoRA(rank=8), {}), (6, 1024, lora.LoRA(rank=2, targets=("q_proj", "v_proj")), {}),
    (3, 8192, lora.LoRA(rank=8), dict(tie_embeddings=True, qkv_bias=False))], ids=["all", "q and v", "tied"])
def test_memory_of_lora(checkpointing, layers, vocabulary, adapters, fields):
    """The frozen base has no gradients and moments, and keeps inputs only where an adapter reads them."""
    peak, row, state = real_step(layers, vocabulary, checkpointing, 2, adapters=adapters, **fields)
    assert row["total"] == pytest.approx(peak, rel=0.10)
    assert row["memory"]["optimizer"] == state and row["trained"] == state // 8


def step_on_a_rank(out, checkpointing, reduce_each, adapters=None):
    peak, row, _ = real_step(3, 4096, checkpointing, 2, reduce_each, adapters=adapters)
    Path(f"{out}{os.environ['RANK']}").write_text(str(peak / row["total"]))


@pytest.mark.parametrize("checkpointing, reduce_each", [
    ("none", False), ("full", True),
    pytest.param("none", True, marks=pytest.mark.slow), pytest.param("full", False, marks=pytest.mark.slow)])
def test_memory_on_two_ranks(tmp_path, checkpointing, reduce_each):
    """Under FSDP, two micro-batches."""
    run_ranks(2, tmp_path, step_on_a_rank, str(tmp_path / "out"), checkpointing, reduce_each)
    for rank in range(2):
        assert float((tmp_path / f"out{rank}").read_text()) == pytest.approx(1, abs=0.10)


@pytest.mark.slow
def test_memory_of_lora_on_two_ranks(tmp_path):
    """The same under FSDP."""
    run_ranks(2, tmp_path, step_on_a_rank, str(tmp_path / "out"), "none", False, lora.LoRA(rank=8))
    for rank in range(2):
        assert float((tmp_path / f"out{rank}").read_text()) == pytest.approx(1, abs=0.10)


def test_adapters_are_counted_as_they_are():
    """By hand at the 7B, and the parameters of a model with them."""
    assert plan.adapter_params(ModelConfig.mimo_7b(), lora.LoRA(rank=16)) == 41_435_136
    model = mtp.build(ModelConfig(n_mtp=1), "meta")
    lora.attach(model, lora.LoRA(rank=3, targets=("k_proj", "up_proj")), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) \
        == plan.adapter_params(ModelConfig(), lora.LoRA(rank=3, targets=("k_proj", "up_proj")))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("adapters", [None, lora.LoRA(rank=16), lora.LoRA(rank=16, targets=("q_proj",)), lora.LoRA()],
                         ids=["all train", "LoRA", "LoRA on q", "frozen"])
def test_gpu_activations_are_the_kernels_own_save_lists(monkeypatch, adapters):
    """
    One block of the 7B in bf16 at T = 8,192 on the meta device, through the Triton operators' fake versions.
    """
    monkeypatch.setattr(kernels, "TRITON", {("meta", torch.bfloat16)})      # nothing is launched on the meta device
    shape, T, kept = ModelConfig.mimo_7b(), 8192, {}
    with torch.device("meta"):
        block = Block(shape).to(torch.bfloat16)
        x = torch.empty(1, T, shape.d_model, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = torch.empty(1, T, shape.head_dim), torch.empty(1, T, shape.head_dim)
    if adapters:
        one = torch.nn.Module()
        one.layers = [block]
        block.requires_grad_(False)
        lora.attach(one, adapters, torch.bfloat16) if adapters.rank else None
        block.to(torch.bfloat16)             # FSDP casts the adapters too
    known = {t.untyped_storage()._cdata for t in [*block.parameters(), cos, sin]}      # not per layer

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x, cos, sin)
    want = plan.block_bytes(shape, "none", gpu=True, lora=adapters)
    assert (want == 119_432) == (adapters is None)
    assert sum(s.nbytes() for s in kept.values()) == T * want


# ---- the command, and every configuration file -------------------------------------------------------------

def test_plan_of_the_7b_prints_the_report():
    done = subprocess.run([sys.executable, "plan.py", "config/mimo_7b.py", "--gpus=8"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    for fact in ("7,622,619,136", "7,833,409,536", "8,254,990,336", "84B", "168B", "10.284T", "17.784T", "21.784T",
                 "23.284T", "1,360", "2,560", "0.000107", "32,768", "640,000"):
        assert fact in done.stdout, fact
    assert not (ROOT / "out/mimo_7b").exists()


@pytest.mark.parametrize("path", sorted({*ROOT.glob("config/*.py")} - {*ROOT.glob("config/*_problems.py")}),
                         ids=lambda p: p.stem)
def test_every_config_loads_and_plans(path, capsys):
    """plan.py finds out whose configuration it is, and the model; SFT and RL files go from one folder to another."""
    script = plan.script_of(str(path))
    assert script is (rl if "_rl" in path.stem else sft if "_sft" in path.stem else pretrain)
    cfg = configurator.load(script.Config, [str(path)])
    plan.main(configurator.load(plan.Config, [str(path), "--gpus=8"]))
    printed = capsys.readouterr().out
    assert "memory per GPU" in printed and ("KV cache" in printed) == ("at once" in printed) == (script is rl)
    assert ("8,254,990,336" in printed) == path.stem.startswith("mimo_7b")
    assert script is pretrain or cfg.init != cfg.out and cfg.out.startswith("out/")
    with pytest.raises(UserError, match="shard_ranks = 3 should divide gpus = 8"):
        plan.main(configurator.load(plan.Config, [str(path), "--set.shard_ranks=3"]))


def printed_by(words, capsys):
    """What plan.py prints for these words of its command line."""
    plan.main(configurator.load(plan.Config, words))
    return capsys.readouterr().out


def test_pages_say_what_plan_prints(capsys):
    """docs/scale.md: the blocks, the table of configurations; README: hours of an iteration on H100 and H200."""
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\npython plan\.py ([^\n]*)\n```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for words, text in blocks:
        assert text in printed_by(words.split(), capsys), f"docs/scale.md: what does plan.py {words} print?"
    two = ["config/mimo_1b_rl.py", "--gpus=2", "--set.slots=64", "--set.kv_tokens=65536", "--set.micro_tokens=8192"]
    assert " 23.5  24 GB" in printed_by(two, capsys) and "takes 23.5 GB on each of two" in page
    yours = (ROOT / "docs/your_model.md").read_text(encoding="utf-8")
    for words, said in ((["qwen_sft.py"], "8.3 GB for SFT"), (["qwen_rl.py"], "14.6 GB for RL with LoRA"),
                        (["mimo_7b_sft_lora.py"], "SFT 40.2 GB"), (["mimo_7b_rl_lora.py"], "RL 70.7 GB")):
        more = ["--model=config/qwen_1b5.py", "--set.lora.rank=16"] if words[0].startswith("qwen") else []
        number = re.search(r"[\d.]+(?= GB)", said)[0]
        assert said in yours and f" {number}  " in printed_by([f"config/{words[0]}", "--gpus=1", *more], capsys)
    rows = re.findall(r"^\| `(\w+)` \| (\d+) x (\w+) \| (.*) \|$", page, re.MULTILINE)
    shipped = {p.stem for p in ROOT.glob("config/mimo_*.py")} - {"mimo_7b_problems"}
    assert {name for name, *_ in rows} == shipped
    for name, gpus, card, cells in rows:
        printed = re.sub(" +", " ", printed_by([f"config/{name}.py", f"--gpus={gpus}", f"--card={card}"], capsys))
        total, at_once, iteration, whole = (cell.strip() for cell in cells.split("|"))
        for cell in (total, at_once, iteration, whole):
            assert f" {cell}" in printed, f"docs/scale.md, {name}: {cell}"
        if name in ("mimo_7b_rl", "mimo_7b_rl_h200"):
            assert f"{iteration} " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_plan_says_what_it_cannot_take(tmp_path):
    (tmp_path / "odd.py").write_text("nonsense = 1\n")
    with pytest.raises(UserError, match="odd.py: its fields are those of none"):
        plan.main(plan.Config(str(tmp_path / "odd.py")))
    with pytest.raises(UserError, match="kv_tokens = 30,720 should be at least 31,040: one answer of 30,720 tokens"):
        plan.main(plan.Config(str(ROOT / "config/mimo_7b_rl.py"), set={"kv_tokens": 30_720}))
    (tmp_path / "mine_rl.py").write_text("group_size = 4\n")
    with pytest.raises(UserError, match="which model"):
        plan.main(plan.Config(str(tmp_path / "mine_rl.py")))


# ---- RL: answers at once, hours ----------------------------------------------------------------------------

def test_answers_at_once_are_what_memory_holds():
    """
    With m tokens of memory and lengths L a GPU decodes at most m sum(L) / sum(L^2 / 2) answers on average: an answer
    holds t tokens at its step t. The 7B's 131,072 tokens and a mean of 9,000: 21.6, and the simulation comes near it.
    """
    found = plan.decoding(64, 131_072, 9000, 30_720, 16)
    draw = random.Random(1)
    lengths = [min(30_720, draw.lognormvariate(math.log(9000) - 0.57 ** 2 / 2, 0.57)) for _ in range(100_000)]
    bound = 131_072 * sum(lengths) / sum(n * n / 2 for n in lengths)
    assert bound == pytest.approx(21.6, rel=0.01)
    assert 0.9 * bound < found.at_once < 1.1 * bound              # 1,280 answers, so a sampling error of some per cent
    assert found.kv_tokens > 0.95 * 131_072                       # shared prompts count for each reader
    assert plan.decoding(64, 131_072, 9000, 30_720, 16, seed=1) != found


def test_memory_for_all_slots_is_never_short():
    """Every slot full of the longest answer, to the block: nothing is computed twice, and the slots are the limit."""
    found = plan.decoding(8, 8 * 1088, 400, 700, 4)
    assert found.at_once == 8 and found.recomputed == 0


def test_decode_time_is_the_measured_one():
    """results/gpu/decode.csv: shares of a copy's 4,277 GB/s with one sequence and with 64 of 8k tokens."""
    shape, card = ModelConfig.mimo_7b(), plan.CARDS["h200"]
    for kv_tokens, share in ((128, 0.5039), (64 * 8192, 0.8688)):
        read = 2 * (shape.n_params() - shape.params_by_part()["embedding"]) + kv_tokens * 147_456
        assert read / 4277e9 / plan.decode_seconds(shape, kv_tokens, card) == pytest.approx(share, rel=0.01)


def test_hours_by_hand():
    """
    One GPU, two groups of two answers of 100 tokens, no dynamic sampling: decoding at that rate. Two updates: 4/3
    of the training FLOPs over 4 x 400 tokens, prompts included, at 50 TFLOP/s.
    """
    shape = ModelConfig(n_mtp=0)
    run = rl.Config(batch_size=2, mini_batch=1, group_size=2, dynamic_sampling=False, slots=4, eval_every=0)
    cfg, card = plan.Config("x", gpus=1, mean=100, mfu=0.5), plan.Card(24e9, 100.0, 1e12)
    h = plan.rl_hours(shape, run, cfg, card, longest=128)
    assert h["rollout"] == pytest.approx(2 * 2 * 100 / h["tokens/s"] / 3600) and h["evaluation"] == 0
    assert h["update"] == pytest.approx(2 * 2 * 400 * flops_per_token(shape, 100) * 4 / 3 / 50e12 / 3600)
    assert h["iteration"] == h["rollout"] + h["update"] and h["groups"] == 2


@pytest.mark.parametrize("name, gpus, card, at_once", [
    ("mimo_7b", 8, 80, 0), ("mimo_7b_sft", 8, 80, 0), ("mimo_7b_rl", 8, 80, 24), ("mimo_7b_rl_0530", 8, 80, 10),
    ("mimo_7b_rl_h200", 8, 141, 63), ("mimo_7b_sft_lora", 1, 80, 0), ("mimo_7b_rl_lora", 1, 80, 63),
    ("mimo_1b", 8, 80, 0), ("mimo_1b_rl", 8, 24, 120), ("mimo_100m", 1, 24, 0), ("mimo_100m_sft", 1, 24, 0),
    ("mimo_100m_rl", 1, 24, 250)])
def test_shipped_configurations_fit_their_cards(name, gpus, card, at_once):
    """With the held-out curve, which the same engine decodes; and so many answers decode at a time."""
    path = str(ROOT / f"config/{name}.py")
    script, base = plan.script_of(path), configurator.load(pretrain.Config, [plan.model_config(path)]) \
        if "_rl" in name or "_sft" in name else None
    run = configurator.load(script.Config, [path])
    if script is rl:
        shape = replace(base.model, n_mtp=base.n_mtp_final)
        total = plan.peak(plan.rl_memory(shape, run, gpus))
        longest = run.max_new_tokens[-1][1]
        found = plan.decoding(run.slots, run.kv_tokens, round(longest * 9000 / 30_720), longest, run.group_size)
        assert at_once <= found.at_once <= run.slots
    elif script is sft:
        shape = replace(base.model, n_mtp=base.n_mtp_final)
        stage = Stage(seq_len=run.seq_len, checkpointing=run.checkpointing)
        total = plan.plan(shape, [stage], gpus, micro_batch=run.micro_batch, reduce_each=run.reduce_each,
                          lora=run.lora)[0]["total"]
    else:
        total = max(row["total"] for row in plan.plan(
            run.model, run.stages, gpus, mtp_stage=run.mtp_stage, n_mtp_final=run.n_mtp_final,
            micro_batch=run.micro_batch, reduce_each=run.reduce_each))
    assert 0.1 * card < total / 1e9 <= card


@pytest.mark.parametrize("path", ["config/qwen_sft.py", "config/qwen_rl.py"])
def test_a_1_5b_fits_one_card_of_24_gb_with_lora(path, capsys):
    """And without it does not."""
    words = [path, "--model=config/qwen_1b5.py", "--gpus=1", "--card=rtx4090"]
    for flags, size in ((["--set.lora.rank=16"], "24 GB"), ([], "80 GB")):
        assert re.findall(r"\d  (\d+ GB|no card)$", printed_by(words + flags, capsys), re.MULTILINE) == [size]


class Launch(Exception):
    """Raised where rl.py would launch its first request."""


def meta_tensors():
    """All tensors on the meta device, by id."""
    return {id(t): t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_meta}


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*_rl*.py")), ids=lambda p: p.stem)
def test_every_rl_configuration_starts_with_what_the_plan_says(path, tmp_path, monkeypatch):
    """
    rl.py itself, up to its first launch, with a held-out set, on the meta device in bf16. Whatever exists then is a
    meta tensor, a second engine too: the model, whole in fp32 (with LoRA in bf16, and adapters), and what the plan
    calls replica, KV cache and engine.
    """
    run = configurator.load(rl.Config, [str(path)])
    base = configurator.load(pretrain.Config, [plan.model_config(str(path))])
    shape = replace(base.model, n_mtp=base.n_mtp_final, max_seq_len=run.max_new_tokens[-1][1] + 2 * plan.PROMPT)
    tokenizer, setup = Tokenizer.load("tiny"), distributed.setup
    monkeypatch.setattr(distributed, "setup", lambda **how: replace(
        setup(seed=1, device="cpu"), device=torch.device("meta"), dtype=torch.bfloat16))
    monkeypatch.setattr(rl.Tokenizer, "load", lambda folder: tokenizer)
    for name, result in (("find", tmp_path), ("read_shape", vars(shape)), ("read_meta", {"chat": False})):
        monkeypatch.setattr(checkpoint, name, lambda *_, result=result: result)
    monkeypatch.setattr(checkpoint, "materialise", lambda model, *_, **__: model)
    monkeypatch.setattr(lora, "identity", lambda base: {})
    for name in ("Judge", "Grader"):
        monkeypatch.setattr(rl, name, MagicMock())

    def launch(*_, **__):
        raise Launch

    monkeypatch.setattr(rl, "RolloutThread", launch)
    problem = Problem("0", "maths", "What is 7", answer="7")
    while len(prompt_ids(tokenizer, problem, False)) < plan.PROMPT:
        problem = replace(problem, question=problem.question + "+7")
    for name in ("rl", "valid"):
        write_problems(tmp_path / f"{name}.jsonl", [problem])
    gc.collect()
    older = meta_tensors()
    with pytest.raises(Launch) as stopped:                          # its traceback keeps main's variables
        rl.main(configurator.load(rl.Config, [
            str(path), f"--problems={tmp_path}/rl.jsonl", f"--valid={tmp_path}/valid.jsonl", f"--out={tmp_path}/out"]))
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for key, t in meta_tensors().items()
                if key not in older}
    allocated = sum(storages.values())
    memory = plan.rl_memory(shape, run, 8)
    own = 4 * shape.n_params()
    if run.lora.rank:
        own = 2 * shape.n_params() + 4 * plan.adapter_params(shape, run.lora)
    planned = own + memory["replica"] + memory["KV cache"] + memory["engine"]
    assert 0.98 * planned < allocated < 1.02 * planned, f"{allocated / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB"
    assert stopped.traceback
