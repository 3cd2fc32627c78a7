"""
lora.py: by hand, against finite differences, against the base and full fine-tuning, through checkpoints, into the
rollout engine, on two ranks, and in PEFT's format (with the real peft where it is installed).
"""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import load_model
from fork_ranks import run_ranks
from safetensors.torch import load_file, save_file
from scale_worker import ParityGrader
from test_your_model import SHAPE, qwen
from torch import nn

import checkpoint
import configurator
import distributed
import hf
import kernels
import lora
import mtp
import rl
import sft
from configurator import UserError
from engine import Engine, Request
from lora import LoRA, LoRALinear
from model import ModelConfig

TINY = ModelConfig(vocab_size=64, n_layer=2, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=48, n_mtp=1)
RT = dict(seed=1, device="cpu")
CHAT = [{"role": "user", "content": "What is 3+4?"}, {"role": "assistant", "content": "3+4=7"}]


def small(cfg=None, shape=TINY, dtype=torch.float32, seed=1):
    """A model with random weights, with adapters that are not zero if cfg is given."""
    model = mtp.build(shape)
    model.init_weights(seed)
    if cfg:
        lora.attach(model, cfg, dtype)
        lora.restore(model, None, seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in distributed.adapters_of(model).items():
                if name.endswith("B"):
                    p.normal_(0, 0.1)
    return model


def ids(seed=0, B=2, T=12, V=64):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- the layer ------------------------------------------------------------------------------------------------------

def test_by_hand():
    """W = [[1, 2], [3, 4]], A = [[1, -1]], B = [[1], [10]], s = 2/1: x = (1, 3) gives W x = (7, 15), A x = -2."""
    base = nn.Linear(2, 2, bias=False)
    layer = LoRALinear(base, 1, LoRA(rank=1, alpha=2.0).scale)
    for p, value in ((layer.weight, [[1., 2], [3, 4]]), (layer.lora_A, [[1., -1]]), (layer.lora_B, [[1.], [10]])):
        p.data = torch.tensor(value)
    assert layer(torch.tensor([1., 3])).tolist() == [7 - 4, 15 - 40]
    merged = layer.merged(layer.weight, layer.lora_A, layer.lora_B)
    assert merged.tolist() == [[1 + 2, 2 - 2], [3 + 20, 4 - 20]]
    assert LoRA(rank=16, alpha=32.0).scale == 2 and LoRA(rank=16, alpha=32.0, rslora=True).scale == 8


def test_gradients_are_those_of_finite_differences(monkeypatch):
    """Of the whole model's loss, in A and B of every adapter, all in float64; frozen weights have none."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)         # norms and logits are fp32 otherwise
    monkeypatch.setattr(kernels, "PLAIN", True)
    model, x = small(LoRA(rank=3)).double(), ids()
    adapters = distributed.adapters_of(model)

    def loss():
        return F.cross_entropy(model.logits(model(x))[:, :-1].flatten(0, 1), x[:, 1:].flatten())

    loss().backward()
    assert len(adapters) == 2 * 2 * 7 and all((p.grad is not None) == (n in adapters)
                                              for n, p in model.named_parameters())
    for name, p in adapters.items():
        i, flat, values = int(p.grad.abs().argmax()), p.data.view(-1), []
        at = float(flat[i])
        for value in (at + 1e-5, at - 1e-5):
            flat[i] = value
            with torch.no_grad():
                values.append(float(loss()))
        flat[i] = at
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(p.grad.view(-1)[i]), rel=1e-6), name


def test_layer_gradients_to_ten_digits():
    """torch.autograd.gradcheck of one layer, in float64: x, A and B."""
    layer = LoRALinear(nn.Linear(5, 4), 2, 1.7).double().requires_grad_(False)
    x, A, B = (torch.randn(size, dtype=torch.double, requires_grad=True) for size in ((3, 5), (2, 5), (4, 2)))

    def forward(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, x)

    assert torch.autograd.gradcheck(forward, (x, A, B))


def test_fresh_adapters_are_the_base_bit_for_bit():
    """The trunk's states; A as PEFT draws it, in +-1/sqrt(in), and the same in each run of a seed."""
    plain, model = small(), small()
    lora.attach(model, LoRA(rank=4), torch.float32)
    lora.restore(model, None, 7)
    with torch.no_grad():                                # with gradients, C and torch share the work in another way
        assert torch.equal(plain(ids()), model(ids()))
    down = model.layers[0].mlp.down_proj
    assert 0.9 / 48 ** 0.5 < down.lora_A.abs().max() <= 1 / 48 ** 0.5 and not down.lora_B.any()
    again = small()
    lora.attach(again, LoRA(rank=4), torch.float32)
    lora.restore(again, None, 7)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_full_rank_can_become_any_matrix():
    """With r = in and A = 1, one step of gradient descent on B is that step on W, scaled by s^2: the merged weights."""
    torch.manual_seed(0)
    base = nn.Linear(6, 4, bias=False)
    full, layer = nn.Linear(6, 4, bias=False), LoRALinear(base, 6, 1.5)
    full.weight.data = base.weight.data.clone()
    nn.init.eye_(layer.lora_A)
    nn.init.zeros_(layer.lora_B)
    x, y = torch.randn(20, 6), torch.randn(20, 4)
    for module in (full, layer):
        F.mse_loss(module(x), y).backward()
    layer.lora_B.data -= 0.1 * layer.lora_B.grad
    full.weight.data -= 0.1 * 1.5 ** 2 * full.weight.grad
    torch.testing.assert_close(layer.merged(layer.weight, layer.lora_A, layer.lora_B), full.weight)


def test_targets_and_nothing_else_trains():
    model = small(LoRA(rank=2, targets=("q_proj", "down_proj")))
    assert {n.rpartition(".")[0].split(".", 2)[2] for n in distributed.adapters_of(model)} == {"self_attn.q_proj",
                                                                                         "mlp.down_proj"}
    assert not any(n.startswith("mtp_layers") for n in distributed.adapters_of(model))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(distributed.adapters_of(model))
    optimizer = distributed.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    model(ids()).sum().backward()
    optimizer.step()
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim) \
        == 2 * sum(p.numel() for p in distributed.adapters_of(model).values())


@pytest.mark.parametrize("value, message", [
    (dict(rank=-1), "rank = -1 should be at least 0"), (dict(rank=2, targets=("lm_head",)), "lora.targets = .* q_proj"),
    (dict(rank=2, targets=()), "lora.targets"), (dict(rank=2, targets=("q_proj", "q_proj")), "lora.targets"),
    (dict(alpha=float("nan")), "alpha")])
def test_bad_fields(value, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**value)


@pytest.mark.parametrize("script, words, message", [
    (sft, ["--lora.rank=4", "--train=mtp"], "should be one of the two"),
    (rl, ["--lora.rank=4", "--mtp_weight=0.1"], "should be 0"),
    (sft, ["--lora.rnk=4"], "did you mean lora.rank")])
def test_bad_combinations(script, words, message):
    with pytest.raises(UserError, match=message):
        configurator.load(script.Config, words)


# ---- what is kept for the backward pass ------------------------------------------------------------------------------

def kept(module, x, **more):
    """Shapes that autograd keeps of a forward, without parameters."""
    own, shapes = {p.data_ptr() for p in module.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) if t.data_ptr() not in own
                                                  else None, lambda t: t):
        module(x, **more)
    return shapes


def test_a_frozen_layer_keeps_no_input():
    """Frozen: nothing. With an adapter: its input, and the r numbers of x A^T."""
    x = torch.randn(7, 32, requires_grad=True)
    assert kept(nn.Linear(32, 48).requires_grad_(False), x) == []
    layer = LoRALinear(nn.Linear(32, 48).requires_grad_(False), 3, 2.0)
    assert sorted(set(kept(layer, x))) == [(7, 3), (7, 32)]


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_changes_no_gradient(kind):
    grads = []
    for checkpointing in ("none", kind):
        model = small(LoRA(rank=3))
        distributed.set_checkpointing(model, checkpointing)
        model(ids()).square().sum().backward()
        grads.append([p.grad for p in distributed.adapters_of(model).values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_bf16_base_on_a_cpu():
    """The base is stored and computed in bf16, adapters and their gradients are fp32; near the fp32 result."""
    cfg = LoRA(rank=3, dtype="bfloat16")
    want, model = small(LoRA(rank=3)), small(cfg)
    got = model(ids())
    assert got.dtype == model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert F.cosine_similarity(got.float(), want(ids()), -1).min() > 0.99
    got.float().square().sum().backward()
    assert {p.grad.dtype for p in distributed.adapters_of(model).values()} == {torch.float32}


# ---- the rollout engine ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
def test_the_engine_has_the_trainers_log_probs(tied):
    """Of what it sampled itself, from the replica that rl.py makes, before and after an update of the adapters."""
    rt = distributed.setup(**RT)
    model = small(LoRA(rank=4), replace(TINY, tie_embeddings=tied))
    replica = rl.new_replica(model, rt)
    assert not distributed.adapters_of(replica) and [n for n, _ in replica.named_parameters()] \
        == [n for n, _ in small(shape=model.cfg).named_parameters()]
    engine = Engine(replica, slots=4, max_len=40)
    for _ in range(2):
        for i in range(4):
            engine.add(Request(i, [1, 2, 3 + i], 20, seed=i))
        samples = []
        while engine.active or engine.waiting:
            samples += engine.step()
        with torch.no_grad():
            got = [rl.token_logprobs(model, [rl.Trajectory(s.prompt, s.tokens, s.logprobs, 0.0)], "cpu")[0]
                   for s in samples]
        for s, logp in zip(samples, got, strict=True):
            torch.testing.assert_close(torch.tensor(s.logprobs), logp, atol=2e-5, rtol=0)
        with torch.no_grad():
            for p in distributed.adapters_of(model).values():
                p.add_(torch.randn_like(p) * 0.02)
        distributed.fill(replica, distributed.replica_state(model))
        engine.load()


# ---- the scripts: checkpoints, resuming ------------------------------------------------------------------------------

@pytest.fixture
def base(tmp_path):
    """An imported model, and a file of samples."""
    qwen(tmp_path / "hub")
    hf.import_folder(tmp_path / "hub", tmp_path / "base", fresh=1)
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"What is {i}+4?"}, {"role": "assistant", "content": f"{i}+4={i + 4}"}]}) + "\n"
        for i in range(6)))
    return tmp_path / "base"


def train(base, out, *more):
    words = [f"--init={base}", f"--out={base.parent / out}", f"--data={base.parent / 's.jsonl'}", "--heldout=",
             "--seq_len=128", "--batch_size=2", "--device=cpu", "--lr=1e-2", "--lora.rank=4", "--lora.alpha=8"]
    sft.main(configurator.load(sft.Config, [*words, *more]))
    return base.parent / out


def test_sft_resumes_bit_equal_and_its_checkpoint_is_a_whole_model(base, capsys):
    once, twice = train(base, "once", "--steps=4"), train(base, "twice", "--steps=2")
    train(base, "twice", "--steps=4")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (load_file(run / "step_00000004" / file) for run in (once, twice))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
    before, after = load_model(base)[1], load_model(once)[1]
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {f"layers.{i}.{n}.weight" for i in range(2) for n in
                     [*(f"self_attn.{x}" for x in lora.ATTENTION), *(f"mlp.{x}" for x in lora.MLP)]}
    tensors = load_file(once / "step_00000004/adapter/adapter_model.safetensors")
    for name in moved:
        A, B = (tensors[f"base_model.model.model.{name.removesuffix('weight')}lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(after[name], before[name] + 8 / 4 * B @ A, atol=1e-6, rtol=1e-5)
    state = torch.load(once / "step_00000004/train_state.pt", weights_only=True)
    assert set(state["optimizer"]) == set(n.removeprefix(lora.PREFIX + "model.").removesuffix(".weight")
                                          for n in tensors)
    assert os.stat(once / "step_00000004/adapter/adapter_model.safetensors").st_mode & 0o044 == 0o044


def test_what_cannot_be_resumed_says_so(base):
    run = train(base, "run", "--steps=1")
    for words, message in ((["--lora.rank=2"], "lora.rank = 2 here, 4 there"),
                           (["--lora.rank=0"], "lora.rank = 0 here"),
                           (["--lora.alpha=9"], "lora.alpha = 9.* here, 8.* there"),
                           (["--lora.targets=['q_proj']"], r"lora.targets.* = .*'q_proj'.* here")):
        with pytest.raises(UserError, match=message):
            train(base, "run", "--steps=2", *words)
    with pytest.raises(UserError, match="lora.rank = 4 here, 0 there"):
        train(base, "full", "--steps=1", "--lora.rank=0")
        train(base, "full", "--steps=2")
    base.rename(base.parent / "moved")
    with pytest.raises(UserError, match="which are gone: it cannot be resumed, but is a whole model"):
        train(base, "run", "--steps=2")
    hf.import_folder(base.parent / "hub", base, fresh=2)
    with pytest.raises(UserError, match="not the same any more|another shape"):
        train(base, "run", "--steps=2")
    train(run, "next", "--steps=1")                     # a run of its own on the merged weights
    assert (base.parent / "next/step_00000001/adapter").is_dir()


def test_rl_trains_adapters_and_resumes(base, monkeypatch):
    """A reward for even ids, which moves the adapters; bit-equal after a resume; the engine's log-probs are ours."""
    monkeypatch.setattr(rl, "Grader", ParityGrader)
    (base.parent / "p.jsonl").write_text(json.dumps(dict(id="1", kind="maths", question="1+2?", answer="3")) + "\n")

    def go(out, steps):
        rl.main(configurator.load(rl.Config, [
            f"--init={base}", f"--out={base.parent / out}", f"--problems={base.parent / 'p.jsonl'}", "--valid=",
            f"--steps={steps}", "--batch_size=1", "--mini_batch=1", "--group_size=4", "--max_groups=4",
            "--max_new_tokens=[(0,8)]", "--slots=8", "--judge_workers=1", "--device=cpu", "--lr=1e-2",
            "--lora.rank=4", "--save_every=1"]))
        return load_file(base.parent / out / f"step_{steps:08d}/adapter/adapter_model.safetensors")
    once, first, twice = go("once", 2), go("twice", 1), go("twice", 2)
    assert all(torch.equal(once[k], twice[k]) for k in once) and any(not torch.equal(once[k], first[k]) for k in once)
    rows = [json.loads(line) for line in (base.parent / "once/metrics.jsonl").read_text().splitlines()]
    assert max(row["logprob_diff_max"] for row in rows) < 1e-4 and min(row["grad_norm"] for row in rows) > 0


def train_rank(base, out, *words):
    train(Path(base), out, *words)


@pytest.mark.parametrize("words", [
    pytest.param([], id="sharded"), pytest.param(["--shard_ranks=1"], id="copies", marks=pytest.mark.slow),
    pytest.param(["--checkpointing=selective", "--lora.dtype=bfloat16"], id="bf16", marks=pytest.mark.slow)])
def test_two_ranks_give_the_result_of_one(base, words):
    """Loss and adapters; the checkpoint of two ranks goes on alone."""
    run_ranks(2, base.parent, train_rank, str(base), "two", "--steps=2", *words)
    one, two = train(base, "one", "--steps=2", *words), base.parent / "two"
    exact = "--lora.dtype=bfloat16" not in words
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
              for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if exact else 1e-2)
    a, b = (load_file(run / "step_00000002/adapter/adapter_model.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and {t.dtype for t in b.values()} == {torch.float32}
    if exact:
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)
    merged = load_model(two)[1]
    assert {t.dtype for t in merged.values()} == {torch.float32 if exact else torch.bfloat16}
    train(base, "two", "--steps=3", *words)


def one_gpu_step(out):
    """What distributed.setup() does for one GPU, on a CPU: a mesh of one rank, bf16 compute; two updates."""
    rt = distributed.setup(**RT)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    rt, seen = replace(rt, sharded=True, dtype=torch.bfloat16), []
    model = mtp.build(TINY, "meta")
    lora.attach(model, LoRA(rank=3), rt.dtype)
    model = distributed.shard(model, rt, checkpointing="selective").to_empty(device="cpu")
    distributed.fill(model, mtp.build(TINY).initial_weights(1))
    lora.restore(model, None, 1)
    optimizer = distributed.adamw(model, 1e-2, (0.9, 0.95), 0.1)
    for _ in range(3):
        for last in (False, True):
            distributed.sync_gradients(model, last, rt)
            loss = F.cross_entropy(model.logits(model(ids()))[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
            loss.backward()
        seen.append(float(loss.detach()))
        dtypes = {(str(p.dtype), str(p.grad.dtype)) for p in model.parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    replica = rl.new_replica(model, rt)
    with torch.no_grad():
        near = F.cosine_similarity(replica(ids()).float(), model(ids()).float(), -1).min()
    Path(out).write_text(json.dumps([seen, sorted(dtypes), float(near)]))
    distributed.teardown(rt)


def test_one_gpu_is_a_mesh_of_one_with_a_bf16_base(tmp_path):
    """Gradients and updates of the adapters in fp32; the engine's replica is near the trainer's forward, both bf16."""
    run_ranks(1, tmp_path, one_gpu_step, str(tmp_path / "out"))
    losses, dtypes, near = json.loads((tmp_path / "out").read_text())
    assert losses[2] < losses[1] < losses[0] and dtypes == [["torch.float32"] * 2] and near > 0.999


# ---- PEFT -----------------------------------------------------------------------------------------------------------

def adapter_of(folder, r=3, layers=("self_attn.q_proj", "mlp.down_proj"), **config):
    """An adapter as PEFT writes it, random, for the model that qwen() writes. -> its tensors."""
    shapes, tensors = hf.expected(SHAPE), {}
    for name in layers:
        out, into = shapes[f"model.layers.1.{name}.weight"]
        for which, size in (("A", (r, into)), ("B", (out, r))):
            tensors[f"base_model.model.model.layers.1.{name}.lora_{which}.weight"] = torch.randn(size)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": r, "lora_alpha": 5, "bias": "none", "target_modules": ["q_proj"],
        "lora_dropout": 0.05} | config))
    return tensors


@pytest.mark.parametrize("rslora, scale", [(False, 5 / 3), (True, 5 / 3 ** 0.5)])
def test_an_adapter_comes_in_merged(tmp_path, rslora, scale):
    qwen(tmp_path / "hub")
    tensors = adapter_of(tmp_path / "a", use_rslora=rslora)
    for out, adapter in (("plain", None), ("merged", tmp_path / "a")):
        hf.import_folder(tmp_path / "hub", tmp_path / out, adapter=adapter, fresh=1)
    plain, merged = (load_model(tmp_path / out)[1] for out in ("plain", "merged"))
    moved = {n for n in plain if not torch.equal(plain[n], merged[n])}
    assert moved == {"layers.1.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight"}
    for name in moved:
        A, B = (tensors[f"base_model.model.model.{name.removesuffix('weight')}lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(merged[name], plain[name] + scale * B @ A, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config, message", [
    (dict(use_dora=True), "use_dora = True should be absent"), (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(bias="all"), "bias = 'all' should be none"), (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
    (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern"), (dict(init_lora_weights="pissa"), "init_lora_weights"),
    (dict(peft_type="IA3"), "peft_type = 'IA3' should be LORA"), (dict(fan_in_fan_out=True), "fan_in_fan_out"),
    (dict(a_new_kind_of_adapter=1), "a_new_kind_of_adapter"), (dict(lora_alpha=None), "lora_alpha = None"),
    (dict(r=2), r"has shape \[3, .*\], should be \[2, "), (dict(r=0), "r = 0")])
def test_what_is_not_plain_lora_is_refused_in_one_line(tmp_path, config, message):
    qwen(tmp_path / "hub")
    adapter_of(tmp_path / "a", **config) if "r" not in config else adapter_of(tmp_path / "a")
    there = tmp_path / "a/adapter_config.json"
    there.write_text(json.dumps(json.loads(there.read_text()) | config))
    with pytest.raises(UserError, match=message) as e:
        hf.import_folder(tmp_path / "hub", tmp_path / "out", adapter=tmp_path / "a")
    assert "\n" not in str(e.value) and not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("change, message", [
    (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(3, 32)}, "lm_head.lora_A.weight has no place"),
    (lambda t: dict(list(t.items())[1:]), "lora_A.weight is missing"), (lambda t: {}, "no tensors"),
    (lambda t: t | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(3, 32)}, "no place"),
    (lambda t: {n.removeprefix("base_model.model."): x for n, x in t.items()}, "no place")])
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    """An adapter of a tied head among them: merging it would untie the head."""
    qwen(tmp_path / "hub")
    with pytest.raises(UserError, match="is missing: .* is not an adapter of PEFT"):
        hf.import_folder(tmp_path / "hub", tmp_path / "out", adapter=tmp_path / "none")
    save_file(change(adapter_of(tmp_path / "a")), tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        hf.import_folder(tmp_path / "hub", tmp_path / "out", adapter=tmp_path / "a")


def test_the_adapter_of_a_run_is_what_peft_writes(base):
    """Names, shapes, fields; base_model_name_or_path is the folder that was imported. hf.py reads it back."""
    run = train(base, "run", "--steps=2") / "step_00000002"
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.parent / "hub")
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"], config["use_rslora"]) \
        == ("LORA", "CAUSAL_LM", 4, 8, False)
    assert config["target_modules"] == sorted(lora.ATTENTION + lora.MLP)
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7 and all(n.startswith("base_model.model.model.layers.") for n in tensors)
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].shape == (4, 32)
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape == (48, 4)
    hf.import_folder(base.parent / "hub", base.parent / "back", adapter=run / "adapter", fresh=1)
    ours, back = load_model(run)[1], load_model(base.parent / "back")[1]
    assert all(torch.allclose(ours[n], back[n], atol=1e-6) for n in ours if not n.startswith("mtp"))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_itself(base, rslora):
    """Our adapter in PEFT, and PEFT's here: the same logits, through the whole path of either."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    x = ids(V=1000, T=30)

    def logits(run):
        model = mtp.build(ModelConfig(**load_model(run)[0]))
        checkpoint.read_weights(checkpoint.find(run), model)
        with torch.no_grad():
            return model.logits(model(x))

    run = train(base, "run", "--steps=2", f"--lora.rslora={rslora}")
    hub = lambda: transformers.AutoModelForCausalLM.from_pretrained(base.parent / "hub", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(hub(), run / "step_00000002/adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, logits(run), atol=2e-5, rtol=1e-4)
        assert (theirs.get_base_model()(x).logits - logits(base)).abs().max() > 1e-3       # it does something
    how = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=rslora, target_modules=["q_proj", "v_proj", "up_proj"],
                          init_lora_weights=False, lora_dropout=0.1, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(hub(), how).eval()
    theirs.save_pretrained(base.parent / "adapter")
    hf.import_folder(base.parent / "hub", base.parent / "merged", adapter=base.parent / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, logits(base.parent / "merged"), atol=2e-5, rtol=1e-4)
    for more, message in ((dict(use_dora=True), "use_dora"), (dict(modules_to_save=["embed_tokens"]), "modules_to_sa"),
                          (dict(init_lora_weights="pissa"), "init_lora_weights")):
        peft.get_peft_model(hub(), peft.LoraConfig(r=2, target_modules=["q_proj"], **more)).save_pretrained(
            base.parent / "odd")
        with pytest.raises(UserError, match=message):
            hf.import_folder(base.parent / "hub", base.parent / "never", adapter=base.parent / "odd")
        shutil.rmtree(base.parent / "odd")
