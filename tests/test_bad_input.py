"""
What a person sees when something is missing, broken or impossible: one line that names what and where, exit status 1,
nothing half-written. Every entry point, by family: configuration, shards, problems, chats, checkpoints, results.
"""
import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import configurator
import distributed
import eval as evaluation
import hf
import mtp
import pretrain
import rl
import sample
import sft
from data import corpus, hub, loader, prepare, rl_problems, sft_data, shards, tag
from data.jsonl import read_jsonl, write_jsonl
from data.problems import read_problems
from data.sft_data import read_questions, read_samples
from metrics import Metrics
from model import ModelConfig
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = Tokenizer.load("tiny")
SHAPE = ModelConfig(vocab_size=1024, n_layer=1, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=32, max_seq_len=96)
MODEL = [f"--model.{k}={v}" for k, v in vars(SHAPE).items()]
MATHS = {"id": "0a", "kind": "maths", "question": "What is 1+1?", "answer": "2"}
CODE = {"id": "0b", "kind": "code", "question": "Given a list xs: return the sum.",
        "tests": [{"kind": "call", "input": "[[1, 2]]", "expected": "3"}]}
CHAT = {"messages": [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "\\boxed{2}"}]}


def ends(call, *words):
    """call() ends the process with status 1 and one line that holds all words. -> the line."""
    with pytest.raises((SystemExit, configurator.UserError)) as e:    # a script's end, or what run() makes one of
        call()
    line = e.value.code if isinstance(e.value, SystemExit) else str(e.value)
    assert isinstance(line, str) and "\n" not in line and len(line) < 600, line      # a text means status 1
    for word in map(str, words):
        assert word in line, f"{word!r} is not in: {line}"
    return line


def script(module, *argv):
    """A script as the command line calls it, in this process."""
    return lambda: configurator.run(module.main, lambda_config(module, argv))


def lambda_config(module, argv):
    """configurator.run reads sys.argv: put our words there."""
    sys.argv = [module.__name__, *map(str, argv)]
    return module.Config


@pytest.fixture(autouse=True)
def as_it_was():
    """sys.argv, the SIGTERM handler and the random generator that the scripts change."""
    argv, handler, rng = sys.argv, signal.getsignal(signal.SIGTERM), torch.get_rng_state()
    yield
    sys.argv = argv
    signal.signal(signal.SIGTERM, handler)
    torch.set_rng_state(rng)


def save(run, stage, shape=SHAPE, step=1, state=None, chat=False):
    model = checkpoint.materialise(mtp.build(shape, "meta"), distributed.setup(device="cpu"), seed=0)
    checkpoint.save(run, step, model, tokenizer=TINY, config={}, meta={"stage": stage, "chat": chat},
                               state=state or {"step": step})
    return run


def write_pages(world: Path, n: int) -> None:
    """Shards of n documents for each of two sources, to train on and to validate with."""
    for folder in ("data", "data/valid"):
        for name in ("web", "maths"):
            texts = [f"{name} page {i}: the sum of {i} and {i} is {2 * i}." for i in range(n)]
            documents = [np.array(TINY.encode(text) + [TINY.eos_id]) for text in texts]
            shards.write_source(world / folder, name, documents, TINY.vocab_size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A world in which nothing is wrong: shards, problems, chats, answers and a checkpoint. Do not write into it."""
    world = tmp_path_factory.mktemp("whole")
    write_pages(world, 40)
    write_jsonl(world / "problems.jsonl", [MATHS, CODE])
    write_jsonl(world / "sft.jsonl", [CHAT])
    write_jsonl(world / "answers.jsonl", [{"id": p["id"], "answers": [{"passed": False, "verdicts": ["WA"]}]}
                                          for p in (MATHS, CODE)])
    save(world / "base", "base")
    return world


@pytest.fixture
def world(whole, tmp_path):
    """A copy of it to break."""
    shutil.copytree(whole, tmp_path / "w")
    return tmp_path / "w"


def pretrain_words(world, *more):
    return [*MODEL, f"--data={world}/data", f"--out={world}/run", "--device=cpu", "--sample_every=0",
            "--stages.0.tokens=256", "--stages.0.seq_len=32", "--stages.0.batch_size=2",
            "--stages.0.mix={'web': 1, 'maths': 1}", "--valid_tokens=64", *more]


def sft_words(world, *more):
    return [f"--init={world}/base", f"--out={world}/run", f"--data={world}/sft.jsonl",
            f"--heldout={world}/problems.jsonl", "--seq_len=64", "--steps=1", "--batch_size=1", "--device=cpu", *more]


def rl_words(world, *more):
    return [f"--init={world}/base", f"--out={world}/run", f"--problems={world}/problems.jsonl", "--valid=",
            "--batch_size=1", "--mini_batch=1", "--max_groups=1", "--group_size=2", "--steps=1",
            "--max_new_tokens=[(0,4)]", "--device=cpu", *more]


def eval_words(world, *more):
    return [f"--ckpt={world}/base", f"--problems={world}/problems.jsonl", f"--out={world}/e/eval.json",
            "--max_new_tokens=8", "--samples=1", "--device=cpu", *more]


def rl_data_words(world, *more):
    return [f"--problems={world}/problems.jsonl", f"--answers=['{world}/answers.jsonl']", f"--out={world}/rl.jsonl",
            *more]


WORDS = {pretrain: pretrain_words, sft: sft_words, rl: rl_words, evaluation: eval_words, rl_problems: rl_data_words}


def test_the_whole_world_is_whole(world, capsys):
    """Else every test below could pass for the wrong reason. The resolved configuration is printed and kept."""
    script(pretrain, *pretrain_words(world))()
    assert "* model.d_model" in (out := capsys.readouterr().out) and "  beta1" in out
    kept = json.loads((the(world / "run") / "config.json").read_text())
    assert kept == configurator.to_dict(configurator.load(pretrain.Config, pretrain_words(world)))
    assert checkpoint.read_manifest(the(world / "run"))["commit"] == checkpoint.git_commit()
    for module in (pretrain, rl_problems, evaluation):
        script(module, *WORDS[module](world))()
    assert (world / "run/latest").is_file() and (world / "rl.jsonl").is_file() and (world / "e/eval.json").is_file()
    with pytest.raises(SystemExit, match="none of 1 samples"):              # its one query stands in the problems too
        script(sft, *sft_words(world, f"--out={world}/s"))()
    script(sft, *sft_words(world, f"--out={world}/s", "--heldout="))()
    assert (world / "s/latest").is_file()


# ---- configuration: sizes and shares -------------------------------------------------------------------------------

SIZES = [
    (pretrain, "micro_batch=0"), (pretrain, "keep=0"), (pretrain, "save_every=0"), (pretrain, "valid_tokens=-1"),
    (pretrain, "stages=[]"), (pretrain, "stages.0.tokens=-5"), (pretrain, "stages.0.tokens=1e999"),
    (pretrain, "stages.0.seq_len=0"), (pretrain, "stages.0.batch_size=0"), (pretrain, "stages.0.lr=-1"),
    (pretrain, "stages.0.rope_base=0"), (pretrain, "stages.0.mix={}"), (pretrain, "stages.0.mix={'web': -1.0}"),
    (pretrain, "stages.0.warmup_tokens=2e6"), (pretrain, "stages.0.mtp_weight=-1"), (pretrain, "beta1=1.0"),
    (pretrain, "threads=0"), (pretrain, "weight_decay=-0.1"), 
    (pretrain, "model.n_layer=0"),
    (pretrain, "model.n_head=0"), (pretrain, "model.n_kv_head=0"), (pretrain, "model.head_dim=0"),
    (pretrain, "model.n_kv_head=3"), (pretrain, "model.rope_base=-1"), (pretrain, "model.rms_eps=-1"),
    (sft, "seq_len=1"), (sft, "steps=0"), (sft, "batch_size=-2"), (sft, "micro_batch=0"), (sft, "keep=0"),
    (sft, "save_every=0"), (sft, "lr=-1"), (sft, "lr=1e999"), (sft, "beta2=1.5"), (sft, "max_per_query=0"),
    (rl, "steps=0"), (rl, "group_size=1"), (rl, "batch_size=0"), (rl, "mini_batch=0"), (rl, "mini_batch=3"),
    (rl, "max_groups=2"), (rl, "slots=0"), (rl, "judge_workers=0"), (rl, "eps_low=0.5"), (rl, "easy_alpha=2"),
    (rl, "max_new_tokens=[]"), (rl, "max_new_tokens=[(0,0)]"), (rl, "max_new_tokens=[(5,9)]"),
     (rl, "lr=-1"),
    (rl, "max_staleness=2"), (rl, "keep=-1"), (rl, "is_cap=0"), (rl, "reward_lag=-1"), (rl, "scheme=hard"),
    (evaluation, "samples=0"), (evaluation, "max_new_tokens=-1"), (evaluation, "slots=0"), (evaluation, "top_p=0"),
    (evaluation, "top_p=1.5"), (evaluation, "temperature=-1"), (evaluation, "limit=-1"), (evaluation, "tasks=[]"),
    (evaluation, "tasks=['maths']"), (evaluation, "probe_lengths=[]"), (evaluation, "probe_count=0"),
    (sample, "n=0"), (sample, "max_new_tokens=0"), (sample, "top_p=0"), (sample, "temperature=-0.1"),
    (sample, "slots=0"),
    (sample, "compare"), (sample, "out=x"), (sample, "max_len=-1"), (sample, "top_k=-1"),
    (rl_problems, "levels=0"), (rl_problems, "max_maths_rate=2"), (rl_problems, "answers=[]"),
    (prepare, "pages=3"), (prepare, "sft=0"), (prepare, "valid_share=1"), (prepare, "valid_share=0"),
    (prepare, "steps_share=1.5"), (prepare, "test=-1"), (prepare, "books=-1"), (prepare, "tests=0"),
]


@pytest.mark.parametrize("module, flag", SIZES, ids=[f"{m.__name__} {f}" for m, f in SIZES])
def test_impossible_values_are_refused_by_name(module, flag):
    field = flag.partition("=")[0].split(".")[-1]
    ends(lambda: configurator.load(module.Config, [f"--{flag}"]), field)


# ---- problems ------------------------------------------------------------------------------------------------------

def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def without(row, *names):
    return {k: v for k, v in row.items() if k not in names}


PROBLEMS = {
    "empty": (b"", "no problems in it"),
    "blank lines": (b"\n \n", "no problems in it"),
    "not UTF-8": (lines(MATHS) + b'{"id": "\xff"}\n', ":2:", "UTF-8", "0xff"),
    "not JSON": (lines(MATHS) + b'{"id": "0c",\n', ":2:", "not JSON"),
    "a list": (lines([1]), ":1:", "list", "object"),
    "deep": (b"[" * 100_000, ":1:", "deep"),
    "unknown field": (lines(MATHS | {"anser": "2"}), ":1:", "anser", "answer"),
    "no question": (lines(without(MATHS, "question")), ":1:", "question"),
    "empty question": (lines(MATHS | {"question": " "}), ":1:", "question"),
    "answer is a number": (lines(MATHS | {"answer": 2}), ":1:", "answer = 2", "str"),
    "level is text": (lines(MATHS | {"level": "hard"}), ":1:", "level", "int"),
    "kind": (lines(MATHS | {"kind": "math"}), ":1:", "'math'", "maths"),
    "no answer": (lines(without(MATHS, "answer")), ":1:", "answer"),
    "no tests": (lines(CODE | {"tests": []}), ":1:", "0b", "no tests"),
    "no tests but a solution": (lines(CODE | {"tests": [], "solution": "x"}), ":1:", "0b", "no tests"),
    "tests no list": (lines(CODE | {"tests": {}}), ":1:", "tests", "list"),
    "test kind": (lines(CODE | {"tests": [{"kind": "io", "input": "", "expected": ""}]}), ":1:", "'io'", "stdio"),
    "test input is no text": (lines(CODE | {"tests": [{"kind": "call", "input": [1], "expected": "1"}]}),
                              ":1:", "input"),
    "test input is no JSON": (lines(CODE | {"tests": [{"kind": "call", "input": "[1", "expected": "1"}]}),
                              ":1:", "[1"),
    "two kinds of tests": (lines(CODE | {"tests": [*CODE["tests"], {"kind": "stdio", "input": "", "expected": ""}]}),
                           ":1:", "all 'call' or all 'stdio'"),
    "no entry": (lines(CODE | {"entry": ""}), ":1:", "entry"),
    "same id twice": (lines(MATHS, CODE, MATHS | {"question": "What is 2+0?"}), ":3:", "0a", "line 1"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problems_file_names_the_line(tmp_path, name):
    text, *words = PROBLEMS[name]
    (tmp_path / "p.jsonl").write_bytes(text)
    with pytest.raises(ValueError) as e:
        read_problems(tmp_path / "p.jsonl")
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in (f"{tmp_path}/p.jsonl", *words)), e.value


@pytest.mark.parametrize("module, flag", [(rl, "problems"), (rl, "valid"), (evaluation, "problems"),
                                          (rl_problems, "problems"), (sft, "heldout")])
@pytest.mark.parametrize("what", ["missing", "a folder", "empty", "not JSON"])
def test_problems_that_a_script_cannot_read(world, module, flag, what):
    path = world / "bad.jsonl"
    {"missing": lambda: None, "a folder": path.mkdir, "empty": path.touch,
     "not JSON": lambda: path.write_text("{\n")}[what]()
    words = WORDS[module](world, f"--{flag}={path}")
    if module is sft and what == "empty":
        return                                           # no held-out questions: nothing to compare with
    ends(script(module, *words), path)
    assert not (world / "run").exists() or not list((world / "run").glob("step_*"))


def test_answers_of_rl_data(world):
    path = world / "answers.jsonl"
    for text, *words in ((b"", "no answers to problem 0a"), (lines({"id": "0a"}), ":1:", "answers"),
                         (lines({"id": "0a", "answers": []}), ":1:", "no answers"),
                         (lines({"id": "0a", "answers": [{"passed": 1, "verdicts": []}]}), ":1:", "passed"),
                         (lines({"id": "0a", "answers": [3]}), ":1:")):
        path.write_bytes(text)
        ends(script(rl_problems, *rl_data_words(world)), path, *words)
    assert not (world / "rl.jsonl").exists()


# ---- chats ---------------------------------------------------------------------------------------------------------

CHATS = {
    "empty": (b"", "no samples in it"),
    "not UTF-8": (b'{"messages": "\xff"}', ":1:", "UTF-8"),
    "not JSON": (lines(CHAT) + b"{", ":2:", "not JSON"),
    "no messages": (lines({"text": "a"}), ":1:", "messages"),
    "messages is text": (lines({"messages": "hi"}), ":1:", "list"),
    "no turn": (lines({"messages": []}), ":1:", "turn"),
    "a turn is text": (lines({"messages": ["hi"]}), ":1:", "messages[0]"),
    "role": (lines({"messages": [{"role": "bot", "content": "a"}]}), ":1:", "'bot'", "assistant"),
    "content": (lines({"messages": [{"role": "user", "content": 3}]}), ":1:", "messages[0]", "text"),
    "score": (lines(CHAT | {"score": "good"}), ":1:", "score", "number"),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_file_names_the_line(world, name):
    text, *words = CHATS[name]
    (world / "sft.jsonl").write_bytes(text)
    with pytest.raises(ValueError) as e:
        read_samples(world / "sft.jsonl")
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in ("sft.jsonl", *words)), e.value
    if name in ("empty", "role"):
        ends(script(sft, *sft_words(world, "--heldout=")), "sft.jsonl", *words)
        ends(script(sft_data, f"{world}/sft.jsonl", f"{world}/kept.jsonl"), "sft.jsonl", *words)
        assert not (world / "kept.jsonl").exists() and not list(world.glob("run/step_*"))


def test_questions_and_prompts(world):
    (world / "q.jsonl").write_bytes(lines({"question": 3}))
    with pytest.raises(ValueError, match="q.jsonl:1: .*no text"):
        read_questions(world / "q.jsonl")
    (world / "p.jsonl").write_text("")
    ends(lambda: sample.read_file(f"{world}/p.jsonl"), "p.jsonl", "no prompts")
    for text, *words in ((lines({"prompt": ""}), ":1:"), (lines({"messages": []}), ":1:", "turn"),
                         (b"\xff", ":1:", "UTF-8"),
                         (lines({"prompt": "a"}, {"messages": [{"role": "x", "content": "a"}]}), ":2:", "'x'")):
        (world / "p.jsonl").write_bytes(text)
        ends(lambda: sample.read_file(f"{world}/p.jsonl"), "p.jsonl", *words)


# ---- shards --------------------------------------------------------------------------------------------------------

def cut(path, n=200):
    path.write_bytes(path.read_bytes()[:-n])


def flip(path, at=-200):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


SHARDS = {
    "no folder": (lambda d: shutil.rmtree(d), "no token shards"),
    "empty folder": (lambda d: [shutil.rmtree(d), d.mkdir()], "maths", "none"),
    "a file": (lambda d: [shutil.rmtree(d), d.write_text("x")], "no token shards in"),
    "cut off": (lambda d: cut(d / "web_00000.bin"), "web_00000.bin", "truncated"),
    "a header only": (lambda d: cut(d / "web_00000.bin", (d / "web_00000.bin").stat().st_size - 100),
                      "web_00000.bin", "not a token shard"),
    "a flipped bit": (lambda d: flip(d / "web_00000.bin", 1100), "web_00000.bin", "corrupt"),
    "shard gone": (lambda d: (d / "web_00000.bin").unlink(), "web_00000.bin", "missing"),
    "unfinished": (lambda d: (d / "web.json").unlink(), "web.json"),
    "manifest of something else": (lambda d: (d / "web.json").write_text('{"shards": [1]}'), "web.json", "corrupt"),
    "manifest cut": (lambda d: cut(d / "web.json", 30), "web.json", "corrupt"),
    "another shard under the name": (lambda d: shutil.copy(d / "maths_00000.bin", d / "web_00000.bin"),
                                     "web_00000.bin"),
    "no document": (lambda d: shards.write_source(d, "web", [], 1024), "'web'", "empty"),
    "broken validation set": (lambda d: cut(d / "valid/web_00000.bin"), "valid/web_00000.bin", "truncated"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards(world, name):
    harm, *words = SHARDS[name]
    harm(world / "data")
    ends(script(pretrain, *pretrain_words(world)), f"{world}/data", *words)
    assert not (world / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--stages.0.mix={'poems': 1.0}"], ["poems", "maths, web"]),
    (["--model.vocab_size=512"], ["1,024", "512"]),
    (["--stages.0.seq_len=97"], ["seq_len = 97", "max_seq_len = 96"]),
    (["--tokenizer=nowhere"], ["nowhere", "tokenizer files"]),
])
def test_pretraining_that_does_not_fit(world, flags, words):
    ends(script(pretrain, *pretrain_words(world, *flags)), *words)
    assert not (world / "run").exists()


def test_shards_of_a_larger_vocabulary(world):
    shards.write_source(world / "data", "web", [[5000, 3]], 6000)
    ends(script(pretrain, *pretrain_words(world)), "'web'", "5000", "1023")


# ---- checkpoints ---------------------------------------------------------------------------------------------------

def the(run):
    return next(Path(run).glob("step_*"))


CHECKPOINTS = {
    "no such folder": (lambda run: shutil.rmtree(run), "no such folder"),
    "a file": (lambda run: [shutil.rmtree(run), run.write_text("x")], "no checkpoint in"),
    "an empty folder": (lambda run: [shutil.rmtree(run), run.mkdir()], "no checkpoint in"),
    "half a file": (lambda run: cut(the(run) / "model.safetensors"), "step_00000001 is not whole: model.safetensors"),
    "a flipped bit": (lambda run: flip(the(run) / "model.safetensors"), "step_00000001 is not whole", "checksum"),
    "a file gone": (lambda run: (the(run) / "model.json").unlink(), "step_00000001 is not whole", "json is missing"),
    "no manifest": (lambda run: (the(run) / "manifest.json").unlink(), "manifest.json is missing"),
    "a broken manifest": (lambda run: (the(run) / "manifest.json").write_text("{"), "manifest.json is not readable"),
    "only its pointer left": (lambda run: shutil.rmtree(the(run)), "latest names a checkpoint, and there is none"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used(world, name):
    harm, *words = CHECKPOINTS[name]
    harm(world / "base")
    for module in (sft, rl, evaluation):
        ends(script(module, *WORDS[module](world)), world / "base", *words)
    ends(script(sample, f"--ckpt={world}/base", "--prompt=a"), world / "base", *words)
    ends(script(hf, "export", f"{world}/base", f"{world}/hf", "--flavour=mimo"), world / "base", *words)
    assert not (world / "run").exists() and not (world / "hf").exists() and not (world / "e").exists()
    if name in ("half a file", "a flipped bit", "a file gone"):
        with pytest.raises(configurator.UserError, match="is not whole: model"):
            checkpoint.find(the(world / "base"))


def test_a_folder_of_weights_with_a_wrong_shape(world):
    """model.json of a folder that has no manifest was written by a person."""
    free = world / "free"
    shutil.copytree(the(world / "base"), free)
    (free / "manifest.json").unlink()
    shape = json.loads((free / "model.json").read_text())
    for text, *words in (("[1]", "model.json", "object"), ("{", "model.json", "JSON"),
                         (json.dumps(shape | {"n_layers": 3}), "n_layers"),
                         (json.dumps(shape | {"n_head": 0}), "n_head"),
                         (json.dumps(shape | {"d_model": 64}), "embed_tokens", "64"),
                         (json.dumps(shape | {"vocab_size": 2048}), "vocabulary"),
                         (json.dumps(shape | {"n_layer": 2}), "layers.1")):
        (free / "model.json").write_text(text)
        for module in (evaluation, sft):
            flag = "ckpt" if module is evaluation else "init"
            ends(script(module, *WORDS[module](world, f"--{flag}={free}")), *words)


@pytest.mark.parametrize("module", [pretrain, sft, rl])
def test_the_output_folder_holds_another_run(world, module):
    other = ModelConfig(**vars(SHAPE) | {"d_model": 64, "head_dim": 32})
    state = {"seen": 1, "step": 1, "stage": 0, "loader": {}, "spikes": {}, "scheduler": {}}
    save(world / "run", "base", other, state=state)
    before = sorted(p for p in (world / "run").rglob("*") if p.is_file())
    # pretrain reads its data before the checkpoint: its loader state is looked at first
    words = ["run"] if module is pretrain else ["d_model = 64", "32 here", "--out"]
    if module is pretrain:
        loader_state = loader.MixtureLoader(world / "data", ["maths", "web"], 1024, n_mtp=1, seed=1).state_dict()
        save(world / "run", "base", other, step=2, state=state | {"loader": loader_state})
        before = sorted(p for p in (world / "run").rglob("*") if p.is_file())
        words = ["d_model = 64", "32 here", "--out"]
    ends(script(module, *WORDS[module](world)), world / "run", *words)
    assert sorted(p for p in (world / "run").rglob("*") if p.is_file()) == before


@pytest.mark.parametrize("module", [pretrain, sft, rl])
def test_the_output_folder_holds_a_run_of_another_script(world, module):
    save(world / "run", "something", state={"else": 1})
    ends(script(module, *WORDS[module](world)), world / "run", "another kind of run", "'something'", "--out")


def test_resuming_with_other_data_or_seed(world):
    script(pretrain, *pretrain_words(world))()
    ends(script(pretrain, *pretrain_words(world, "--seed=2")), "seed 1", "2")
    shards.write_source(world / "data", "web", [[1, 2, 3]], 1024)
    ends(script(pretrain, *pretrain_words(world)), "'web'", "not the one")
    script(sft, *sft_words(world, f"--out={world}/s", "--heldout="))()
    longer = sft_words(world, f"--out={world}/s", "--heldout=", "--seq_len=32", "--steps=2")
    ends(script(sft, *longer), "seq_len = 32", "64")


def test_weights_that_are_not_finite(world):
    """NaN ends a run before it is saved, and names the tensor; metrics stay JSON."""
    model = checkpoint.materialise(mtp.build(SHAPE, "meta"), distributed.setup(device="cpu"), seed=0)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    shutil.rmtree(world / "base")
    checkpoint.save(world / "base", 1, model, tokenizer=TINY, config={}, meta={"chat": False}, state={})
    ends(script(sft, *sft_words(world, "--heldout=")), "step 0", "loss", "layers.0.mlp.up_proj.weight")
    assert not list((world / "run").glob("step_*"))
    Metrics(world / "m").log(step=1, loss=float("nan"), more=[float("inf")])
    assert json.loads((world / "m/metrics.jsonl").read_text()) == {"step": 1, "loss": None, "more": [None]}


# ---- results that cannot be written --------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [pretrain, sft, rl, evaluation, rl_problems])
def test_a_file_in_the_way(world, module):
    (world / "wall").write_text("x")
    more = ["--heldout="] if module is sft else []
    ends(script(module, *WORDS[module](world, f"--out={world}/wall/x", *more)), world / "wall")
    assert (world / "wall").read_text() == "x"


def test_a_folder_in_the_way(world):
    (world / "e.json").mkdir()
    ends(script(evaluation, *eval_words(world, f"--out={world}/e.json")), "e.json", "folder")
    ends(lambda: configurator.load(sample.Config, [str(world)]), world, "config file ends in .py")
    (world / "in.jsonl").write_bytes(lines({"prompt": "a"}))
    words = [f"--ckpt={world}/base", f"--file={world}/in.jsonl", f"--out={world}/e.json"]
    ends(script(sample, *words), "e.json", "folder")


@pytest.mark.parametrize("module", [pretrain, sft])
def test_a_full_disk_is_told_before_a_byte_is_written(world, module, monkeypatch):
    usage = shutil.disk_usage(world)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    more = ["--heldout="] if module is sft else []
    ends(script(module, *WORDS[module](world, *more)), "disk full", world / "run", "free")
    assert not list((world / "run").glob("*step*")) and not (world / "run/latest").exists()


class Full:
    """A file that has no room left."""
    def __init__(self, real):
        self.real = real

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.real.close()

    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device", self.real.name)


def test_a_disk_that_fills_up_leaves_the_old_file(world, monkeypatch):
    import builtins
    real = builtins.open
    (world / "rl.jsonl").write_text("old")
    monkeypatch.setattr(builtins, "open", lambda file, mode="r", *a, **k: Full(real(file, mode, *a, **k))
                        if "w" in mode and "rl.jsonl" in str(file) else real(file, mode, *a, **k))
    ends(script(rl_problems, *rl_data_words(world)), "rl.jsonl", "No space left on device")
    assert (world / "rl.jsonl").read_text() == "old" and not list(world.glob("*.tmp"))


def test_no_sandbox_on_this_machine(world, monkeypatch):
    import judge

    def refuse(*_):
        raise configurator.UserError("no sandbox on this machine. A: no bwrap")
    monkeypatch.setattr(judge, "choose_isolation", refuse)
    for module in (rl, evaluation):
        ends(script(module, *WORDS[module](world)), "no sandbox", "bwrap")


# ---- evaluation and sampling ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (["--max_new_tokens=95"], ["max_new_tokens 95", "max_seq_len = 96"]),
    (["--tasks=['probes']", "--probe_lengths=[512]"], ["512", "96"]),
    (["--tasks=['probes']", "--probe_lengths=[20]"], ["does not fit"]),
    (["--tasks=['mtp']", "--max_new_tokens=95"], ["max_new_tokens 95", "96"]),
])
def test_evaluation_that_does_not_fit(world, flags, words):
    ends(script(evaluation, *eval_words(world, *flags)), *words)
    assert not list((world / "e").glob("*"))


def test_sampling_that_does_not_fit(world):
    here = [f"--ckpt={world}/base", "--device=cpu"]
    ends(script(sample, *here, "--prompt=" + "word " * 200), "prompt 1", "95")
    ends(script(sample, *here, "--prompt=a", "--max_len=500"), "max_len = 500", "96")
    ends(script(sample, *here, f"--file={world}/none.jsonl"), "none.jsonl", "No such file")
    save(world / "plain", "base", ModelConfig(**vars(SHAPE) | {"n_mtp": 0}))
    ends(script(sample, f"--ckpt={world}/plain", "--prompt=a", "--mtp"), "no MTP layers")


def test_rl_that_does_not_fit(world):
    ends(script(rl, *rl_words(world, "--max_new_tokens=[(0,90)]")), "90", "max_seq_len = 96")
    ends(script(rl, *rl_words(world, "--n_draft=9")), "n_draft = 9", "0 to 7")
    long = MATHS | {"question": "What is " + "1+" * 80 + "1?"}
    (world / "long.jsonl").write_bytes(lines(long))
    ends(script(rl, *rl_words(world, f"--valid={world}/long.jsonl")), "long.jsonl", "max_seq_len = 96")


# ---- the other commands --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, words", [
    (b"", ["left to write", "there is no row"]), (b"{", ["a.jsonl:1:", "not JSON"]),
    (b'{"body": 1}', ["a.jsonl:1:", "columns: body"]),
    (b'{"text": "\xff"}', ["a.jsonl:1:", "UTF-8"]), (None, ["no such folder"]),
])
def test_hub(tmp_path, text, words):
    source = tmp_path / "a.jsonl"
    if text is None:
        source = tmp_path / "x"
    else:
        source.write_bytes(text)
    for more in ((), ("--tokenizer=tiny",)):
        ends(script(hub, "text", source, tmp_path / "out.jsonl", *more), *words)
        assert [p for p in tmp_path.iterdir() if p != source] == []


def test_hub_more(tmp_path):
    import gzip
    source = tmp_path / "a.jsonl.gz"
    source.write_bytes(gzip.compress(lines({"text": "a" * 1000 + str(os.urandom(500))}))[:-30])
    ends(script(hub, "text", source, tmp_path / "out.jsonl"), "a.jsonl.gz", "cut off")
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "a"}))
    ends(script(hub, "text", tmp_path / "b.jsonl", tmp_path), tmp_path, "folder")
    ends(script(hub, "text", tmp_path / "b.jsonl", tmp_path / "o", "--limit=0"), "limit = 0")
    ends(script(hub, "text", tmp_path / "b.jsonl", tmp_path / "o", "--tokenizer=nowhere"), "nowhere")
    ends(script(hub, "text", tmp_path / "b.jsonl", tmp_path / "o", "--tokenizer=tiny", "--labels=none"), "none")
    for adapter, row in (("apps", {"question": "q", "input_output": "[1]"}), ("livecodebench", {
            "question_content": "q", "public_test_cases": "[3]"}), ("dapo", {"prompt": []})):
        (tmp_path / "c.jsonl").write_bytes(lines(row))
        ends(script(hub, adapter, tmp_path / "c.jsonl", tmp_path / "o"), adapter, "c.jsonl:1:")
    (tmp_path / "c.jsonl").write_bytes(lines({"conversations": []}))
    ends(script(hub, "openthoughts", tmp_path / "c.jsonl", tmp_path / "o"), "c.jsonl", "nothing in it 1")
    assert not (tmp_path / "o").exists()


def test_small_commands(world, capsys):
    ends(script(shards, world / "base"), "no finished source")
    cut(world / "data/web_00000.bin")
    ends(script(shards, world / "data"), "web_00000.bin", "truncated")
    ends(script(loader, world / "data", "--mix.web=x"), "mix.web = 'x'", "float")
    ends(script(loader, world / "data", "--mix={'poems': 1}"), "poems")
    ends(script(corpus, "--pages=3"), "pages = 3")
    ends(script(tag, "nowhere.jsonl"), "nowhere.jsonl", "No such file")
    (world / "labels.jsonl").write_bytes(lines({"text": "a", "domain": "poems", "quality": 1, "depth": 1, "ad": 0}))
    ends(script(tag, world / "labels.jsonl"), "labels.jsonl:1:", "poems", "maths")
    ends(script(sft_data, f"{world}/sft.jsonl", f"{world}/x", "--workers=0"), "workers = 0")


def test_hf(world):
    folder = world / "hub"
    ends(script(hf, "import", folder, f"{world}/run"), "config.json is missing")
    script(hf, "export", f"{world}/base", folder, "--flavour=mimo", "--fold=no")()
    config = json.loads((folder / "config.json").read_text())
    for text, *words in (("{", "config.json", "JSON"), ("[]", "config.json"),
                         (json.dumps(config | {"vocab_size": "x"}), "vocab_size"),
                         (json.dumps(config | {"vocab_size": 2048}), "shape"),
                         (json.dumps(without(config, "rope_theta")), "rope_theta")):
        (folder / "config.json").write_text(text)
        ends(script(hf, "import", folder, f"{world}/run"), *words)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text('{"weights": 1}')
    ends(script(hf, "import", folder, f"{world}/run"), "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").unlink()
    keep = (folder / "tokenizer.json").read_text()
    for text in ("{}", "[]", '{"model": {"type": "BPE"}}'):
        (folder / "tokenizer.json").write_text(text)
        ends(script(hf, "import", folder, f"{world}/run"), "tokenizer")
    (folder / "tokenizer.json").write_text(keep)
    cut(folder / "model.safetensors")
    ends(script(hf, "import", folder, f"{world}/run"), "model.safetensors")
    (world / "mine").mkdir()
    (world / "mine/letter.txt").write_text("dear")
    ends(script(hf, "export", f"{world}/base", f"{world}/mine", "--flavour=qwen2"), "mine", "not empty")
    assert not (world / "run").exists() or not list((world / "run").iterdir())
    assert (world / "mine/letter.txt").read_text() == "dear"


@pytest.mark.parametrize("words, told", [
    (["paper/figures.py", "--run=nowhere"], "nowhere"),
    (["bench/train.py", "--nanogpt=nowhere"], "nowhere"),
    (["bench/extract.py", "nowhere"], "nowhere"),
    (["bench/gpu.py", "everything"], "usage"),
    (["paper/table2.py", "many"], "many"), (["paper/table3.py", "--seeds=0"], "seeds = 0"),
])
def test_scripts_without_a_main(words, told, monkeypatch):
    sys.argv = words
    monkeypatch.syspath_prepend(str(ROOT / Path(words[0]).parent))
    ends(lambda: runpy.run_path(str(ROOT / words[0]), run_name="__main__"), told)


def test_as_a_process():
    """What a shell sees: exit status 1, nothing but one line on stderr."""
    process = subprocess.run([sys.executable, "sft.py", "--init=nowhere", "--out=nowhere", "--device=cpu"], cwd=ROOT,
                             text=True, capture_output=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert process.returncode == 1 and "nowhere" in process.stderr, process.stderr
    assert "Traceback" not in process.stderr and process.stderr.count("\n") == 1, process.stderr


def test_the_7b_without_data_says_on_one_screen_what_is_missing():
    """The design card's own command on a laptop: each missing thing with how it is got, and what works now."""
    process = subprocess.run([sys.executable, "pretrain.py", "config/mimo_7b.py", "--device=cpu"], cwd=ROOT, text=True,
                             capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    *screen, last = process.stderr.strip().split("\n")
    assert process.returncode == 1 and len(screen) < 20 and max(map(len, screen)) < 120, process.stderr
    for word in ("tokenizer files", "MiMo-7B-Base", "token shards", "docs/your_data.md", "python plan.py"):
        assert word in "\n".join(screen), word
    assert last.startswith("error: no tokenizer files in ") and " and no token shards in " in last


def test_what_one_line_lets_through():
    """The disk and Ctrl-C end quietly, a bug does not."""
    with pytest.raises(SystemExit, match="^error: a/b: No space left on device$"), configurator.one_line():
        raise OSError(errno.ENOSPC, "No space left on device", "a/b")
    with pytest.raises(SystemExit) as e, configurator.one_line():
        raise KeyboardInterrupt
    assert e.value.code == 130
    with pytest.raises(ValueError), configurator.one_line():
        raise ValueError("a bug")


def test_a_line_written_is_read_and_blank_ones_are_skipped(tmp_path):
    write_jsonl(tmp_path / "deep/a.jsonl", [{"a": "é"}, {"b": 1}])
    with open(tmp_path / "deep/a.jsonl", "a") as f:
        f.write("\n")
    assert list(read_jsonl(tmp_path / "deep/a.jsonl")) == [(1, {"a": "é"}), (2, {"b": 1})]
