"""
What a person sees when something is missing, broken or impossible: one line that names what and where, exit status 1,
nothing half-written. Every entry point, by family: configuration, shards, problems, chats, checkpoints, results.
"""
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import configurator
import eval as evaluation
import mtp
import pretrain
import rl
import rl_data
import runtime
import sample
import sft
from data import prepare, shards
from data.jsonl import write_jsonl
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
    with pytest.raises(SystemExit) as e:
        call()
    line = e.value.code
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
    model = runtime.materialise(mtp.build(shape, "meta"), runtime.setup(device="cpu"), seed=0)
    checkpoint.save_checkpoint(run, step, model, tokenizer=TINY, config={}, meta={"stage": stage, "chat": chat},
                               state=state or {"step": step})
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A world in which nothing is wrong: shards, problems, chats, answers and a checkpoint. Do not write into it."""
    world = tmp_path_factory.mktemp("whole")
    for folder in ("data", "data/valid"):
        for name in ("web", "maths"):
            texts = [f"{name} page {i}: the sum of {i} and {i} is {2 * i}." for i in range(40)]
            documents = [np.array(TINY.encode(text) + [TINY.eos_id]) for text in texts]
            shards.write_source(world / folder, name, documents, TINY.vocab_size)
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
            "--batch_size=1", "--mini_batch=1", "--max_groups=1", "--group_size=2", "--steps=1", "--budget=[(0,4)]",
            "--device=cpu", *more]


def eval_words(world, *more):
    return [f"--ckpt={world}/base", f"--problems={world}/problems.jsonl", f"--out={world}/e/eval.json",
            "--max_tokens=8", "--samples=1", "--device=cpu", *more]


def rl_data_words(world, *more):
    return [f"--problems={world}/problems.jsonl", f"--answers=['{world}/answers.jsonl']", f"--out={world}/rl.jsonl",
            *more]


WORDS = {pretrain: pretrain_words, sft: sft_words, rl: rl_words, evaluation: eval_words, rl_data: rl_data_words}


def test_the_whole_world_is_whole(world):
    """Else every test below could pass for the wrong reason."""
    configurator.load(pretrain.Config, pretrain_words(world))
    for module in (pretrain, rl_data, evaluation):
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
    (pretrain, "threads=0"), (pretrain, "weight_decay=-0.1"), (pretrain, "dry_run_mfu=0"),
    (pretrain, "model.n_layer=0"),
    (pretrain, "model.n_head=0"), (pretrain, "model.n_kv_head=0"), (pretrain, "model.head_dim=0"),
    (pretrain, "model.n_kv_head=3"), (pretrain, "model.rope_base=-1"), (pretrain, "model.rms_eps=-1"),
    (sft, "seq_len=1"), (sft, "steps=0"), (sft, "batch_size=-2"), (sft, "micro_batch=0"), (sft, "keep=0"),
    (sft, "save_every=0"), (sft, "lr=-1"), (sft, "lr=1e999"), (sft, "beta2=1.5"), (sft, "max_per_query=0"),
    (rl, "steps=0"), (rl, "group_size=1"), (rl, "batch_size=0"), (rl, "mini_batch=0"), (rl, "mini_batch=3"),
    (rl, "max_groups=2"), (rl, "slots=0"), (rl, "judge_workers=0"), (rl, "eps_low=0.5"), (rl, "easy_alpha=2"),
    (rl, "budget=[]"), (rl, "budget=[(0,0)]"), (rl, "budget=[(5,9)]"), (rl, "temperature=0.5"), (rl, "lr=-1"),
    (rl, "max_staleness=2"), (rl, "keep=-1"), (rl, "is_cap=0"), (rl, "reward_lag=-1"), (rl, "scheme=hard"),
    (evaluation, "samples=0"), (evaluation, "max_tokens=-1"), (evaluation, "slots=0"), (evaluation, "top_p=0"),
    (evaluation, "top_p=1.5"), (evaluation, "temperature=-1"), (evaluation, "limit=-1"), (evaluation, "tasks=[]"),
    (evaluation, "tasks=['maths']"), (evaluation, "probe_lengths=[]"), (evaluation, "probe_count=0"),
    (sample, "n=0"), (sample, "max_tokens=0"), (sample, "top_p=0"), (sample, "temperature=-0.1"), (sample, "slots=0"),
    (sample, "compare"), (sample, "out=x"), (sample, "max_len=-1"), (sample, "top_k=-1"),
    (rl_data, "levels=0"), (rl_data, "max_maths_rate=2"), (rl_data, "answers=[]"),
    (prepare, "pages=3"), (prepare, "sft=0"), (prepare, "valid_share=1"), (prepare, "valid_share=0"),
    (prepare, "steps_share=1.5"), (prepare, "test=-1"), (prepare, "books=-1"), (prepare, "tests=0"),
]


@pytest.mark.parametrize("module, flag", SIZES, ids=[f"{m.__name__} {f}" for m, f in SIZES])
def test_impossible_values_are_refused_by_name(module, flag):
    field = flag.partition("=")[0].split(".")[-1]
    line = ends(lambda: configurator.load(module.Config, [f"--{flag}"]), field)
    assert line.startswith("config error: ")
