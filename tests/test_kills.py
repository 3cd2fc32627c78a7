"""
pretrain, sft and rl, killed at random moments by SIGKILL and SIGTERM, each time resumed with other settings of the kind
that does not change the result, until they end: weights and metrics.jsonl are those of a run that nobody disturbed.

The moments are drawn over the time that the undisturbed run took, so they fall into the start, the steps, the saves and
the end alike. NANOMIMO_KILLS=50 pytest -m slow tests/test_kills.py      # 50 kills of each script
"""
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from fork_ranks import start
from test_bad_input import write_pages

import checkpoint
import configurator
import distributed
import mtp
from data.jsonl import write_jsonl
from model import ModelConfig
from tokenizer import Tokenizer

TINY = Tokenizer.load("tiny")
SHAPE = dict(vocab_size=1024, n_layer=1, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=32, max_seq_len=96,
             n_mtp=1)
MANY = int(os.environ.get("NANOMIMO_KILLS", "12"))
CONFIG = f"""
from schedule import Stage
model = {SHAPE}
stages = [Stage("a", 2500, 32, 4, lr=3e-3, mix=dict(web=.5, maths=.5)),
          Stage("short", 60, 32, 4, lr=3e-3, mix=dict(web=.5, maths=.5)),
          Stage("b", 1500, 64, 2, lr=3e-3, rope_base=6.4e5, mix=dict(web=.3, maths=.7))]
mtp_stage = Stage("mtp", 1200, 32, 4, lr=3e-3, mix=dict(web=1.0))
valid_tokens, skip_spikes, sample_every, device = 128, 10.0, 0, "cpu"
"""
STEADY = {                                # what may change between two kills without changing the result
    "pretrain": {"save_every": (1, 2, 3, 7), "keep": (1, 2, 5), "async_save": (True, False), "sample_every": (0, 5)},
    "sft": {"save_every": (1, 2, 3, 7), "keep": (1, 2, 5)},
    "rl": {"save_every": (1, 2, 3), "keep": (1, 2), "judge_workers": (1, 2), "judge_timeout": (300.0, 600.0)},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, chats, problems, and a model to start from."""
    world = tmp_path_factory.mktemp("world")
    write_pages(world, 60)
    write_jsonl(world / "sft.jsonl", [{"messages": [{"role": "user", "content": f"What is {i}+1?"}, {
        "role": "assistant", "content": f"It is \\boxed{{{i + 1}}}."}]} for i in range(40)])
    for name, n in (("problems", 12), ("valid", 3)):
        write_jsonl(world / f"{name}.jsonl", [{"id": f"{i:02x}", "kind": "maths", "question": f"What is {i}+{n}?",
                                               "answer": str(i + n)} for i in range(n)])
    (world / "small.py").write_text(CONFIG)
    model = checkpoint.materialise(mtp.build(ModelConfig(**SHAPE), "meta"), distributed.setup(device="cpu"), seed=3)
    checkpoint.save(world / "base", 1, model, tokenizer=TINY, config={}, meta={"stage": "sft", "chat": True}, state={})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)      # setup() has taken it from pytest
    return world


def words(script, world, out):
    if script == "pretrain":
        return [f"{world}/small.py", f"--data={world}/data", f"--out={out}"]
    if script == "sft":
        return [f"--init={world}/base", f"--out={out}", f"--data={world}/sft.jsonl", "--heldout=", "--seq_len=64",
                "--batch_size=4", "--steps=40", "--lr=1e-3", "--device=cpu"]
    return [f"--init={world}/base", f"--out={out}", f"--problems={world}/problems.jsonl", "--batch_size=2",
            f"--valid={world}/valid.jsonl", "--steps=8", "--mini_batch=1", "--group_size=4", "--max_groups=4",
            "--slots=8", "--lr=1e-3", "--max_new_tokens=[(0,8),(3,12)]",
            "--eval_every=3", "--eval_samples=2", "--reward_lag=2", "--device=cpu"]


def work(script, argv):
    """The script in a process of its own. RL's rewards come from ParityGrader: a random model earns some."""
    module = __import__(script)
    if script == "rl":
        from scale_worker import ParityGrader
        module.Grader = ParityGrader
    module.main(configurator.load(module.Config, argv))


def result(run):
    """(weights, rows of the log without clocks) of a run that has ended."""
    newest = run / (run / "latest").read_text().strip()
    clock = lambda name: name.endswith(("_s", "_per_second")) or name in ("mfu", "judge_p95")
    rows = [{k: v for k, v in json.loads(line).items() if not clock(k)}
            for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (newest / "model.safetensors").read_bytes(), rows


def ended(process, folder, allowed):
    """Wait for a process; its exit code, which must be one of those allowed."""
    process.join(300)
    log = (folder / "rank0.log").read_text()
    assert process.exitcode in allowed, f"ended with {process.exitcode}:\n{log}"
    return process.exitcode


@pytest.mark.parametrize("script", STEADY)
@pytest.mark.parametrize("kills", [2, pytest.param(MANY, marks=pytest.mark.slow)])
def test_killed_at_random_moments(world, tmp_path, script, kills):
    for out in ("warm", "whole"):                      # the first one may wait for the server's imports
        began = time.monotonic()
        (process,) = start(1, tmp_path, work, script, words(script, world, tmp_path / out))
        ended(process, tmp_path, [0])
        seconds = time.monotonic() - began
    weights, rows = result(tmp_path / "whole")
    assert weights != (checkpoint.find(world / "base") / "model.safetensors").read_bytes(), "nothing was learned"
    rng, done, runs = random.Random(f"{script} {kills}"), 0, 0
    while done < kills or runs == 0:
        flags = [f"--{name}={rng.choice(values)}" for name, values in STEADY[script].items()]
        (process,) = start(1, tmp_path, work, script, words(script, world, tmp_path / "x") + flags)
        if done < kills:                               # else to the end
            process.join(rng.random() * seconds)
            if process.is_alive():
                how = rng.choice([signal.SIGKILL, signal.SIGTERM])
                os.kill(process.pid, how)
                code = ended(process, tmp_path, [-how, 0])         # 0: SIGTERM, saved; or it ended in this moment
                done += 1
                if code != 0 or not finished(tmp_path / "x", rows):
                    continue
        ended(process, tmp_path, [0])
        again, log = result(tmp_path / "x")
        assert log == rows, f"after {done} kills"
        assert again == weights, f"after {done} kills"
        assert not [p for p in (tmp_path / "x").glob(".*") if ".writing_old" in p.name]
        shutil.rmtree(tmp_path / "x")
        runs += 1
        print(f"{script}: {done} kills, {runs} whole runs of {seconds:.1f} s", flush=True)


def finished(run: Path, rows: list) -> bool:
    """Has this run, which SIGTERM or nothing ended, written its last checkpoint and the last line of its log?"""
    try:
        step = json.loads((run / (run / "latest").read_text().strip() / "manifest.json").read_text())["step"]
    except FileNotFoundError:
        return False
    return step == rows[-1]["step"] and result(run)[1] == rows
