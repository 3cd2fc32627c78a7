"""
A run that is resumed with another configuration obeys each change or refuses it in one line (the table in
docs/scale.md), and a finished run goes on. In this process, with one layer and some hundred tokens.
"""
import contextlib
import dataclasses
import json
import re
import shutil
import signal
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import load_model

import checkpoint
import configurator
import distributed
import kernels
import mtp
import pretrain
import rl
import sft
from configurator import UserError
from data import shards
from data.jsonl import write_jsonl
from model import ModelConfig
from schedule import batch_size_at, next_stage, total_tokens
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = Tokenizer.load("tiny")
SHAPE = dict(vocab_size=1024, n_layer=1, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=32, max_seq_len=96,
             n_mtp=1)
CHATS = [{"messages": [{"role": "user", "content": f"What is {i}+1?"},
                       {"role": "assistant", "content": f"\\boxed{{{i + 1}}}"}]} for i in range(20)]
PROBLEMS = [{"id": f"{i:02x}", "kind": "maths", "question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(4)]
SCRIPTS = {"pretrain.py": pretrain, "sft.py": sft, "rl.py": rl}


@pytest.fixture(autouse=True)
def as_it_was():
    """What the scripts change in this process."""
    rng = torch.get_rng_state()
    yield
    torch.set_num_threads(1)
    kernels.set_plain(False)
    torch.set_rng_state(rng)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, chats, problems, and a base model to start from."""
    world = tmp_path_factory.mktemp("world")
    for folder in ("data", "data/valid"):
        for name in ("web", "maths", "books"):
            texts = [f"{name} page {i}: the sum of {i} and {i} is {2 * i}." for i in range(40)]
            documents = [np.array(TINY.encode(text) + [TINY.eos_id]) for text in texts]
            shards.write_source(world / folder, name, documents, TINY.vocab_size)
    write_jsonl(world / "sft.jsonl", CHATS)
    write_jsonl(world / "problems.jsonl", PROBLEMS)
    for name in ("base", "other"):
        model = checkpoint.materialise(mtp.build(ModelConfig(**SHAPE), "meta"), distributed.setup(device="cpu"), seed=3)
        checkpoint.save(world / name, 1, model, tokenizer=TINY, config={}, meta={"chat": True}, state={})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)      # setup() has taken it from pytest
    return world


def stage(name="s", tokens=640, **more):
    """A row of the table; a step is 128 tokens."""
    values = dict(name=name, tokens=tokens, seq_len=32, batch_size=4, lr=3e-3, mix={"web": 0.5, "maths": 0.5}) | more
    return f"Stage(**{values!r})"


def run(world, out, *stages, mtp_stage="None", flags=()):
    """pretrain.py on a table of stages. -> (weights by name, rows of metrics.jsonl)."""
    (world / "c.py").write_text(f"from schedule import Stage\nmodel = {SHAPE}\nstages = [{', '.join(stages)}]\n"
                                f"mtp_stage = {mtp_stage}\nsample_every, valid_tokens = 0, 384\n")
    pretrain.main(configurator.load(pretrain.Config, [f"{world}/c.py", f"--data={world}/data", f"--out={out}",
                                                      "--device=cpu", *flags]))
    return load_model(out)[1], rows(out)


def rows(out):
    timing = ("tokens_per_second", "mfu")
    return [{k: v for k, v in json.loads(line).items() if k not in timing}
            for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def valid(rows, source="maths"):
    return [row["valid"][source]["loss"] for row in rows if "valid" in row][-1]


# ---- finished runs go on --------------------------------------------------------------------------------------------

MTP = stage("mtp", mtp_weight=1.0)


@pytest.mark.parametrize("before, after", [
    ([stage("a"), stage("b")], [stage("a"), stage("b", 1280)]),
    ([stage("a"), stage("b")], [stage("a"), stage("b"), stage("c", seq_len=64, rope_base=2e4, lr=1e-3)]),
    ([stage("a")], [stage("a"), stage("b"), MTP]),
    ([stage("a"), MTP], [stage("a"), stage("mtp", 1280, mtp_weight=1.0)]),
    ([stage("a")], [stage("a"), stage("b", mix={"books": 1.0})]),              # a source that nobody read before
    ([stage("a"), stage("b", mix={"books": 1.0})], [stage("a"), stage("b", mix={"books": 1.0}), stage("c")]),
])
def test_a_longer_table_is_that_table_from_the_start(world, tmp_path, before, after):
    """Longer or appended stages: every weight and every line of the log, bit for bit."""
    split = lambda table: (*(s for s in table if s is not table[-1] or "'mtp'" not in s),)
    tuned = lambda table: table[-1] if "'mtp'" in table[-1] else "None"
    half, _ = run(world, tmp_path / "x", *split(before), mtp_stage=tuned(before))
    got, log = run(world, tmp_path / "x", *split(after), mtp_stage=tuned(after))
    want, whole = run(world, tmp_path / "whole", *split(after), mtp_stage=tuned(after))
    assert equal(got, want) and not equal(got, half)
    trained = lambda log: [row for row in log if "valid" not in row]
    drop = lambda row: {k: v for k, v in row.items() if k != "epochs"}         # of sources that one of them never saw
    assert list(map(drop, trained(log))) == list(map(drop, trained(whole)))


@pytest.mark.parametrize("after", [[stage("a"), stage("b", 2560)], [stage("a"), stage("b"), stage("c", 1920)]])
def test_a_longer_trunk_behind_mtp_fine_tuning(world, tmp_path, after):
    """
    The fault: the trunk stayed frozen and the loss where it was. Now the copies are dropped, the trunk trains on with
    fresh moments, and three layers are made of the first one again.
    """
    run(world, tmp_path / "x", stage("a"), stage("b"), mtp_stage=MTP)
    before = valid(rows(tmp_path / "x"))
    got, log = run(world, tmp_path / "x", *after, mtp_stage=MTP)
    want, whole = run(world, tmp_path / "whole", *after, mtp_stage=MTP)
    assert got.keys() == want.keys() and any(name.startswith("mtp_layers.2.") for name in got)
    assert valid(log) == pytest.approx(valid(whole), rel=0.1) and valid(log) < before - 0.5 * (before - valid(whole))
    names = [row["stage"] for row in log if "valid" not in row]
    assert names == ["a"] * 5 + ["b"] * 5 + ["mtp"] * 5 + ["b" if len(after) == 2 else "c"] * 15 + ["mtp"] * 5
    steps = [row["step"] for row in log if "valid" not in row]
    assert steps == list(range(1, 36)) and log[-1]["tokens"] == whole[-1]["tokens"] == 3840
    again, _ = run(world, tmp_path / "x", *after, mtp_stage=MTP)               # and nothing is left to train
    assert equal(again, got)


def test_what_the_stage_that_has_begun_obeys(world, tmp_path, capsys):
    """lr, batch, context and mixture of the next step; the shares of a new mixture count from here on."""
    out = tmp_path / "x"
    run(world, out, stage("a", 512), flags=["--save_every=1"])
    new = dict(lr=1e-3, batch_size=2, seq_len=64, mix={"web": 0.25, "books": 0.75}, weight_decay=0.2)
    decay = new.pop("weight_decay")
    _, log = run(world, out, stage("a", 1024, **new), flags=[f"--weight_decay={decay}"])
    told = capsys.readouterr().out
    for words in ("stages.0.tokens = 512, now 1024", "stages.0.lr = 0.003, now 0.001", "batch_size = 4, now 2",
                  "seq_len = 32, now 64", "weight_decay = 0.1, now 0.2", "'books': 0.75"):
        assert words in told, words
    last = [row for row in log if "valid" not in row][-1]
    assert (last["lr"], last["batch_size"], last["seq_len"], last["tokens"]) == (1e-3, 2, 64, 1024)
    assert checkpoint.read_shape(checkpoint.latest(out))["max_seq_len"] == 64
    taken = checkpoint.read_state(checkpoint.latest(out))["loader"]["taken"]
    assert taken == {"web": 256 + 128, "maths": 256, "books": 384}


@pytest.mark.parametrize("flags, words", [
    (["--stages.0.tokens=1280"], ["stages.0.tokens = 1280.0 here, 640 there"]),
    (["--stages.0.tokens=130"], ["stages.0.tokens = 130"]), (["--stages.0.lr=1e-4"], ["stages.0.lr", "0.003"]),
    (["--stages.0.mix.web=.7"], ["stages.0.mix"]), (["--stages.0.rope_base=1e5"], ["stages.0.rope_base = 100000.0"]),
    (["--stages.1.tokens=100"], ["stages.1.tokens = 100"]), (["--stages.1.rope_base=1e5"], ["stages.1.rope_base"]),
    (["--stages.1.tokens=1280", "--stages.1.rope_base=1e5"], ["stages.1.rope_base = 100000.0 here, None there"]),
    (["--mtp_stage.rope_base=1e5"], ["mtp_stage.rope_base"]), (["--n_mtp_final=4"], ["n_mtp_final = 4", "3"]),
    (["--mtp_stage=None"], ["mtp_stage = None here, 'mtp' there"]),
    (["--model.n_mtp=2"], ["n_mtp = 2 here, 1 there"]), (["--seed=2"], ["seed 1", "2"]),
    (["--model.n_mtp=0", "--mtp_stage=None"], ["n_mtp = 0 here, 1 there"]),
    (["--model.rope_base=2e4"], ["model.rope_base = 20000.0"]), (["--model.n_layer=2"], ["n_layer = 1 there, 2 here"]),
])
def test_what_a_table_may_not_change(world, tmp_path, flags, words):
    """One line with field, saved and given value; nothing in the folder changes."""
    out = tmp_path / "x"
    if not (world / "finished").exists():
        run(world, world / "finished", stage("a"), stage("b"), mtp_stage=MTP)
    shutil.copytree(world / "finished", out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "run.lock"}
    with pytest.raises(UserError) as e:
        run(world, out, stage("a"), stage("b"), mtp_stage=MTP, flags=flags)
    assert all(word in str(e.value) for word in words) and "--out" in str(e.value) and "\n" not in str(e.value), e.value
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "run.lock"} == before


def test_a_stage_may_not_go(world, tmp_path):
    run(world, tmp_path, stage("a"), stage("b"))
    with pytest.raises(UserError, match="stages.1 = None here, 'b' there"):
        run(world, tmp_path, stage("a"))
    run(world, tmp_path, stage("a"), stage("b"), stage("c"), flags=["--save_every=1"])
    with pytest.raises(UserError, match="stages.0.seq_len"):
        run(world, tmp_path, stage("a", seq_len=64), stage("b"), stage("c"))


# ---- every field of every script ------------------------------------------------------------------------------------

def documented():
    """{(script, field): what the table in docs/scale.md says}; no field stands there twice."""
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    found = {}
    for line in re.search(r"<!-- resuming -->\n(.*?)<!-- end -->", text, re.DOTALL)[1].splitlines()[2:]:
        script, fields, verdict = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", fields):
            assert (script, name) not in found, (script, name)
            found[script, name] = verdict
    return found


TABLE = documented()
PLACES = ("out", "data", "tokenizer", "problems", "heldout", "max_per_query", "stages", "mtp_stage", "model",
          "n_mtp_final", "steps", "lora", "mtp_depth")             # each has its own test
OTHER = dict(init="{world}/other", valid="{world}/problems.jsonl", device="auto", beta1=0.5, beta2=0.5, mini_batch=1,
             batch_size=4, max_groups=50, max_new_tokens=[(0, 5)], system="Be brief.", eps_low=0.1, eps_high=0.5,
             easy_alpha=0.3, judge_isolation="B", max_staleness=1, judge_tolerance=1e-3, shard_ranks=1, seq_len=48,
             n_draft=1, kv_tokens=4096, keep=5)


def test_the_table_has_every_field_once():
    for script, module in SCRIPTS.items():
        names = {f.name for f in dataclasses.fields(module.Config)}
        assert names == {name for s, name in TABLE if s == script}, script
        fixed = {name for (s, name), verdict in TABLE.items() if s == script and verdict.startswith("refused")}
        assert fixed == {name.split(".")[0] for name in module.FIXED}, script


class ReachedError(Exception):
    """A script has taken up its run: the first step would follow."""


def words_of(script, world, out):
    """A small run of each script."""
    if script == "pretrain.py":
        (world / "field.py").write_text(f"from schedule import Stage\nmodel = {SHAPE}\nstages = [{stage('a', 256)}]\n")
        return [f"{world}/field.py", f"--data={world}/data", f"--out={out}", "--device=cpu", "--valid_tokens=64",
                "--sample_every=0", f"--init={world}/base"]
    if script == "sft.py":
        return [f"--init={world}/base", f"--out={out}", f"--data={world}/sft.jsonl", "--heldout=", "--seq_len=64",
                "--steps=2", "--batch_size=2", "--device=cpu"]
    return [f"--init={world}/base", f"--out={out}", f"--problems={world}/problems.jsonl", "--valid=", "--batch_size=2",
            "--mini_batch=2", "--max_groups=4", "--group_size=2", "--steps=2", "--max_new_tokens=[(0,4)]",
            "--device=cpu"]


class Judge:
    """Nothing is judged here."""
    isolation = "none"

    def __init__(self, **_):
        pass


@pytest.fixture(scope="module")
def finished(world):
    """A run of two steps of each script; RL's as a checkpoint that it would have written."""
    for script in ("pretrain.py", "sft.py"):
        module = SCRIPTS[script]
        module.main(configurator.load(module.Config, words_of(script, world, world / f"run_{script}")))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cfg = configurator.load(rl.Config, words_of("rl.py", world, world / "run_rl.py"))
    model = checkpoint.materialise(mtp.build(ModelConfig(**SHAPE), "meta"), distributed.setup(device="cpu"), seed=3)
    problems = rl.read_problems(cfg.problems)
    scheduler = rl.Scheduler(len(problems), 2, 2, seed=cfg.seed, problems=rl.fingerprint(problems))
    scheduler.step = 2
    checkpoint.save(world / "run_rl.py", 2, model, tokenizer=TINY, config=configurator.to_dict(cfg),
                    meta={"stage": "rl", "chat": True}, state={"scheduler": scheduler.state_dict()},
                    optimizer=distributed.adamw(model, 1e-3, (0.9, 0.95), 0.0))
    return world


@pytest.fixture
def resumed(finished, tmp_path, monkeypatch):
    """resumed(script, *flags): the run of a script is taken up with other flags, as far as its first step."""
    def stop(*_, **__):
        raise ReachedError
    for module in SCRIPTS.values():
        monkeypatch.setattr(module, "Metrics", stop)
    monkeypatch.setattr(rl, "Judge", Judge)
    monkeypatch.setattr(torch, "compile", lambda forward: forward)             # which takes seconds to import itself
    monkeypatch.setattr(rl, "Grader", lambda *_: SimpleNamespace())

    def resumed(script, *flags):
        out = tmp_path / "run"
        if not out.exists():
            shutil.copytree(finished / f"run_{script}", out)
        module = SCRIPTS[script]
        module.main(configurator.load(module.Config, words_of(script, finished, out) + list(flags)))
    return resumed


@pytest.mark.parametrize("script, name", [key for key in TABLE if key[1] not in PLACES])
def test_a_changed_field_is_obeyed_or_refused(resumed, world, script, name, capsys):
    cfg = configurator.load(SCRIPTS[script].Config, words_of(script, world, "x"))
    old, hint = getattr(cfg, name), typing.get_type_hints(type(cfg))[name]
    choices = [v for v in typing.get_args(hint) if v != old] if typing.get_origin(hint) is typing.Literal else []
    new = OTHER[name] if name in OTHER else not old if isinstance(old, bool) else choices[0] if choices else old + 1
    new = new.format(world=world) if isinstance(new, str) else new
    if name == "device" and torch.cuda.is_available():
        pytest.skip("auto is another device here")
    if TABLE[script, name].startswith("obeyed"):
        with pytest.raises(ReachedError):
            resumed(script, f"--{name}={new}")
        assert f"  changed: {name} = " in capsys.readouterr().out
        return
    with pytest.raises(UserError) as e:
        resumed(script, f"--{name}={new}")
    line = str(e.value)
    assert name in line and str(old) in line and str(new) in line and "--out" in line and "\n" not in line, line


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_changed_is_nothing_said(resumed, world, script, capsys):
    """Another spelling of init is the same place."""
    for flags in ([], [f"--init={world}/base/step_00000001/../step_00000001"]):
        with pytest.raises(ReachedError):
            resumed(script, *flags)
    assert "changed:" not in capsys.readouterr().out


@pytest.mark.parametrize("script", ["pretrain.py", "sft.py"])
def test_depth_goes_with_train(resumed, script, capsys):
    with pytest.raises(ReachedError):
        resumed(script, "--train=mtp", "--mtp_depth=2")
    assert "  changed: mtp_depth = 1, now 2" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["sft.py", "rl.py"])
def test_adapters(resumed, script):
    with pytest.raises(UserError, match="lora.rank = 4 here, 0 there"):
        resumed(script, "--lora.rank=4")


@pytest.mark.parametrize("script", ["sft.py", "rl.py"])
def test_steps(resumed, script):
    with pytest.raises(ReachedError):
        resumed(script, "--steps=3")
    with pytest.raises(UserError, match="steps = 1 here, but .*step_00000002 has 2 already"):
        resumed(script, "--steps=1")


def test_sft_goes_on_with_the_same_samples_alone(resumed, world, tmp_path):
    """The fault: other answers of the same lengths were taken."""
    (tmp_path / "copy.jsonl").write_bytes((world / "sft.jsonl").read_bytes())
    with pytest.raises(ReachedError):
        resumed("sft.py", f"--data={tmp_path}/copy.jsonl", "--max_per_query=9")
    for i, (role, old, new) in enumerate([(1, "boxed{1}", "boxed{2}"), (0, "What is 0", "What is 9")]):
        other = json.loads(json.dumps(CHATS))
        other[0]["messages"][role]["content"] = other[0]["messages"][role]["content"].replace(old, new)
        write_jsonl(tmp_path / f"{i}.jsonl", other)
        with pytest.raises(UserError, match="not the samples that the saved run was trained on: .* fingerprint"):
            resumed("sft.py", f"--data={tmp_path}/{i}.jsonl")
    write_jsonl(tmp_path / "swapped.jsonl", CHATS[::-1])
    with pytest.raises(UserError, match="not the samples"):
        resumed("sft.py", f"--data={tmp_path}/swapped.jsonl")


def test_rl_goes_on_with_the_same_problems_alone(resumed, tmp_path):
    write_jsonl(tmp_path / "mended.jsonl", [PROBLEMS[0] | {"answer": "11"}, *PROBLEMS[1:]])
    with pytest.raises(ReachedError):
        resumed("rl.py", f"--problems={tmp_path}/mended.jsonl")
    write_jsonl(tmp_path / "other.jsonl", [PROBLEMS[0] | {"question": "What is 9+1?"}, *PROBLEMS[1:]])
    with pytest.raises(UserError, match="not the 4 problems"):
        resumed("rl.py", f"--problems={tmp_path}/other.jsonl")


def test_pretraining_goes_on_with_the_same_tokens_alone(world, tmp_path):
    """The same shards in another place; other ones only in a source that was never read."""
    run(world, tmp_path / "x", stage("a"))
    shutil.copytree(world / "data", tmp_path / "data")
    longer = (stage("a"), stage("b", mix={"web": 0.5, "books": 0.5}))
    shards.write_source(tmp_path / "data", "books", [[1, 2, 3]] * 300, 1024)
    run(world, tmp_path / "x", *longer, flags=[f"--data={tmp_path}/data"])
    shards.write_source(tmp_path / "data", "maths", [[1, 2, 3]] * 300, 1024)          # read in a, not in b, again in c
    with pytest.raises(UserError, match="source 'maths' is not the one .* fingerprint"):
        run(world, tmp_path / "x", *longer, stage("c"), flags=[f"--data={tmp_path}/data"])


# ---- nothing that can be resumed ------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("harm", ["a byte short", "gone"])
def test_a_run_that_cannot_be_read_is_not_begun_anew(resumed, script, harm, tmp_path):
    """The fault: step 1 again, an empty log, and the old folders pruned."""
    with pytest.raises(ReachedError):
        resumed(script)
    for ckpt in checkpoint.steps_in(tmp_path / "run"):
        file = ckpt / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1]) if harm == "a byte short" else shutil.rmtree(ckpt)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("[!r]*") if p.is_file()}
    with pytest.raises(UserError, match="can be used: step_0.* bytes, should" if "short" in harm else "latest names"):
        resumed(script)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("[!r]*") if p.is_file()} == before


# ---- stages shorter than a step -------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens", [(130, 100), (1, 1, 200), (200, 30, 20, 10, 130)])
def test_no_stage_is_passed_over(world, tmp_path, tokens):
    """A step is 128 tokens: each stage gets a step at least, its validation and its checkpoint, killed or not."""
    table = [stage(f"s{i}", n) for i, n in enumerate(tokens)]
    weights, log = run(world, tmp_path / "x", *table, mtp_stage=stage("mtp", 60), flags=["--keep=99"])
    names = [row["stage"] for row in log if "valid" not in row]
    assert list(dict.fromkeys(names)) == [f"s{i}" for i in range(len(tokens))] + ["mtp"], names
    assert [row["stage"] for row in log if "valid" in row] == list(dict.fromkeys(names))
    assert any(name.startswith("mtp_layers.2.") for name in weights)
    for ckpt in checkpoint.steps_in(tmp_path / "x")[:-1]:                      # as if killed right after that save
        shutil.rmtree(ckpt)
    (tmp_path / "x/latest").write_text(checkpoint.steps_in(tmp_path / "x")[0].name)
    again, after = run(world, tmp_path / "x", *table, mtp_stage=stage("mtp", 60))
    assert equal(again, weights) and after == log


@pytest.mark.parametrize("tokens", [1e6, 2e7, 3e7, 1e9])
def test_a_smoke_test_of_the_7b_trains_every_stage(tokens):
    """One step of the full batch is 21M tokens, the first ones 1.3M."""
    cfg = configurator.load(pretrain.Config, [str(ROOT / "config/mimo_7b.py"), "--mtp_stage.warmup_tokens=0",
                                              "--mtp_stage.decay_tokens=0", f"--mtp_stage.tokens={tokens}"] + [
        f"--stages.{i}.{name}={value}" for i in range(3)
        for name, value in dict(tokens=tokens, warmup_tokens=0, decay_tokens=0, batch_warmup_tokens=0).items()])
    stages, seen, at, trained = cfg.all_stages(), 0, -1, []
    while seen < total_tokens(stages) or at < len(stages) - 1:
        at = next_stage(stages, seen, at)
        seen += batch_size_at(stages, min(seen, total_tokens(stages[:at + 1]) - 1)) * stages[at].seq_len
        trained.append(at)
    assert sorted(set(trained)) == [0, 1, 2, 3] and trained == sorted(trained)


def test_less_than_a_token_is_no_stage(world, tmp_path):
    for tokens in (0.5, 0.999, 0.0, -1.0):
        with pytest.raises(UserError, match=f"stage a: tokens = {tokens} must be at least 1"):
            run(world, tmp_path, stage("a"), flags=[f"--stages.0.tokens={tokens}"])


def test_an_mtp_stage_with_nothing_to_train(world, tmp_path):
    with pytest.raises(UserError, match="mtp_stage has nothing to train: model.n_mtp = n_mtp_final = 1"):
        run(world, tmp_path, stage("a"), mtp_stage=MTP, flags=["--n_mtp_final=1"])


# ---- nothing to learn -----------------------------------------------------------------------------------------------

def test_a_source_of_empty_documents(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    shards.write_source(tmp_path / "data", "web", [[TINY.eos_id]] * 500, TINY.vocab_size)
    with pytest.raises(UserError, match="step 0: no targets in this batch.*documents of web have one token"):
        run(world, tmp_path / "x", stage("a", mix={"web": 1.0}), flags=[f"--data={tmp_path}/data"])
    assert not checkpoint.steps_in(tmp_path / "x")


# ---- spikes ---------------------------------------------------------------------------------------------------------

def test_the_spike_guard_in_a_run(world, tmp_path, monkeypatch):
    """The fault: text known by heart (norm 0.2), then another source (norm 9): that stage was skipped to its end."""
    norms = iter([0.2] * 25 + [9.0] * 22 + [1e9] * 99)
    monkeypatch.setattr(distributed, "clip_grad_norm", lambda *_: next(norms))
    table = stage("a", 25 * 16, seq_len=16, batch_size=1), stage("b", 99 * 16, seq_len=16, batch_size=1)
    with pytest.raises(UserError, match="norm 1e.09 is above skip_spikes = 10 .* max_skips = 3 steps in a row"):
        run(world, tmp_path, *table, flags=["--skip_spikes=10", "--max_skips=3"])
    log = [row for row in rows(tmp_path) if "valid" not in row]
    assert [row["skipped"] for row in log] == [False] * 47 + [True] * 3
    assert checkpoint.latest(tmp_path).name == "step_00000025"


# ---- seeds ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", ["pretrain", "sft", "rl", "eval", "sample", "data.prepare", "data.corpus"])
def test_seeds_out_of_range(module):
    __import__(module)
    Config = sys.modules[module].Config
    for seed in (-1, -2**63, 2**63, 2**64, 10**30):
        with pytest.raises(UserError, match=f"seed = {seed} should be "):
            configurator.load(Config, [f"--seed={seed}"])
    with contextlib.suppress(UserError):                                       # data.* may ask for other words
        assert configurator.load(Config, [f"--seed={2**63 - 1}"]).seed == 2**63 - 1
    for name in (f.name for f in dataclasses.fields(Config) if f.type in (int, "int")):
        with pytest.raises(UserError, match=f"{name} = "):
            configurator.load(Config, [f"--{name}={2**63}"])
