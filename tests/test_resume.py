"""
kill -9 at a random moment of pretrain, sft and rl, then the same command again: the final weights are those of a run
that nobody disturbed, bit for bit.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def script(*words, cwd=ROOT, wait=True, **env):
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, env=ENV | env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if not wait:
        return process
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny tiny world: shards, problems and SFT samples in a few seconds."""
    folder = tmp_path_factory.mktemp("world")
    code, out, err = script("-m", "data.prepare", f"--out={folder}", "--pages=300", "--maths_problems=200",
                            "--code_problems=100", "--books=8", "--book_words=120", "--synth=60", "--sft=120",
                            "--rl_maths=24", "--rl_code=6", "--test=6", "--valid=2", "--tables=20",
                            "--valid_share=0.25")
    assert code == 0, err
    return folder


CONFIG = """
from schedule import Stage
_mix = dict(web=.3, maths=.4, code=.3)
model = dict(vocab_size=1024, n_layer=2, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=64, max_seq_len=160,
             n_mtp=1)
stages = [Stage("one", 3000, 64, 4, lr=3e-3, mtp_weight=0.3, mix=_mix),
          Stage("two", 1500, 128, 2, lr=3e-3, rope_base=6.4e5, mix=_mix | dict(synth=.1), checkpointing="full")]
mtp_stage = Stage("mtp", 1200, 64, 4, lr=3e-3, rope_base=6.4e5, mix=_mix, checkpointing="selective")
save_every, sample_every, valid_tokens, device = 3, 0, 256, "cpu"
"""


def pretrain_flags(world, out):
    (world / "small.py").write_text(CONFIG)
    return ["pretrain.py", world / "small.py", f"--data={world}/data", f"--out={out}"]


def sft_flags(world, out, base):
    return ["sft.py", f"--init={base}", f"--out={out}", f"--data={world}/sft.jsonl",
            f"--heldout={world}/problems/test.jsonl", "--seq_len=128", "--batch_size=2", "--steps=12", "--lr=1e-3",
            "--save_every=3", "--device=cpu"]


# rl.py with a reward that a model of a few hundred steps earns too: all zeros would move no weight and prove nothing
RL = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import configurator, rl
from scale_worker import ParityGrader
rl.Grader = ParityGrader
configurator.run(rl.main, rl.Config)
"""


def rl_flags(world, out, base):
    return ["-c", RL, f"--init={base}", f"--out={out}", f"--problems={world}/problems/rl_all.jsonl", "--valid=",
            "--steps=6", "--batch_size=2", "--mini_batch=1", "--group_size=4", "--max_groups=4",
            "--max_new_tokens=[(0,12),(3,16)]", "--slots=16", "--lr=1e-3", "--save_every=1", "--judge_workers=1",
            "--reward_lag=4", "--device=cpu"]


def newest(run):
    return run / (run / "latest").read_text().strip()


def weights(run):
    return (newest(run) / "model.safetensors").read_bytes()


def steps_logged(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if '"step"' in line and line.endswith("}")]


def kill_and_resume(command, run, seed):
    """Kill after a random number of steps, run again to the end."""
    target = random.Random(seed).randint(2, 5)
    process = script(*command, wait=False)
    deadline = time.monotonic() + 200
    while process.poll() is None and max(steps_logged(run), default=0) < target:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.Random(seed + 1).random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    saved = (run / "latest").is_file()                           # else it died before its first checkpoint
    code, out, err = script(*command)
    assert code == 0, err
    assert ("resumed at" in out) == saved, out


def test_killed_runs_end_bit_equal(world, tmp_path):
    """pretrain, then sft from it, then rl from that: each once undisturbed, once killed and resumed."""
    base, init = {}, None
    for name, flags in (("pretrain", lambda out: pretrain_flags(world, out)),
                        ("sft", lambda out: sft_flags(world, out, base["pretrain"])),
                        ("rl", lambda out: rl_flags(world, out, base["sft"]))):
        whole, broken = tmp_path / name, tmp_path / f"{name}_killed"
        code, _, err = script(*flags(whole))
        assert code == 0, err
        kill_and_resume(flags(broken), broken, seed=len(name))
        assert weights(whole) == weights(broken), f"{name}: resumed weights differ"
        assert init is None or weights(whole) != weights(init), f"{name}: nothing was learned"
        assert steps_logged(broken) == steps_logged(whole), f"{name}: steps missing from or twice in the log"
        base[name] = init = whole
    shape = json.loads((newest(tmp_path / "rl") / "model.json").read_text())
    assert shape["n_mtp"] == 3, "RL keeps the three MTP layers of pre-training"


def test_sigterm_saves_and_exits_0(world, tmp_path):
    command = pretrain_flags(world, tmp_path / "run") + ["--save_every=1000"]
    process = script(*command, wait=False)
    deadline = time.monotonic() + 100
    while max(steps_logged(tmp_path / "run"), default=0) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (tmp_path / "run/latest").is_file()


def test_going_on_from_a_model(world, tmp_path):
    """
    --init: a tied model without biases, as hf.py imports one, with a fresh MTP layer. The layer alone trains, then all
    with a longer context, then the report's last stage makes three layers of it.
    """
    import torch
    from checkpoints import load_model

    import checkpoint
    import configurator
    import mtp
    import pretrain
    from model import ModelConfig
    from tokenizer import Tokenizer

    shape = ModelConfig(vocab_size=1088, n_layer=2, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=64,
                        rope_base=5e5, max_seq_len=96, n_mtp=1, qkv_bias=False, tie_embeddings=True)
    model = mtp.build(shape)
    model.init_weights(4)
    checkpoint.save(tmp_path / "init", 0, model, meta={"stage": "import", "chat": False}, config={}, state={},
                    tokenizer=Tokenizer.load("tiny"))
    stage = "Stage(tokens=1024, seq_len={}, batch_size=4, lr=3e-3, mix=dict(web=.5, maths=.5))"

    def run(name, init, stages, *flags):
        (tmp_path / "c.py").write_text(f"from schedule import Stage\n{stages}\nsample_every, valid_tokens = 0, 256\n")
        words = [str(tmp_path / "c.py"), f"--data={world}/data", f"--out={tmp_path / name}", "--device=cpu",
                 f"--init={tmp_path / init}", *flags]
        pretrain.main(configurator.load(pretrain.Config, words))
        return load_model(tmp_path / name)

    one = f"stages = [{stage.format(64)}]"
    fields, first, _ = run("mtp", "init", one, "--train=mtp")
    assert fields == vars(shape) and (tmp_path / "mtp/step_00000004/tokenizer.json").is_file()
    start = dict(model.state_dict())
    for name, w in first.items():
        assert torch.equal(w, start[name]) != name.startswith("mtp_layers."), name
    fields, second, _ = run("all", "mtp", f"stages = [{stage.format(128)}]")
    assert (fields["max_seq_len"], fields["rope_base"]) == (128, 5e5) and not torch.equal(
        second["embed_tokens.weight"], first["embed_tokens.weight"])
    last = f"stages, mtp_stage = [], {stage.format(64)}"
    fields, third, _ = run("three", "all", last)
    assert (fields["n_mtp"], fields["max_seq_len"]) == (3, 128)
    for name, w in second.items():
        assert torch.equal(w, third[name]), name
    assert not torch.equal(third["mtp_layers.1.input_proj.weight"], third["mtp_layers.0.input_proj.weight"])
    run("three", "all", last)                                          # ended already: nothing changes
    assert all(torch.equal(w, third[name]) for name, w in load_model(tmp_path / "three")[1].items())
    checkpoint.save(tmp_path / "bare", 0, mtp.build(ModelConfig(**{**vars(shape), "n_mtp": 0})), meta={}, config={},
                    state={}, tokenizer=Tokenizer.load("tiny"))
    with pytest.raises(configurator.UserError, match="train = 'mtp' needs an MTP layer"):
        run("x", "bare", one, "--train=mtp")
    with pytest.raises(configurator.UserError, match="mtp_stage needs 1..3 MTP layers to copy"):
        run("x", "bare", last)
