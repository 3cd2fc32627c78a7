"""
Checkpoints: whole or not at all, whatever kills the writer; broken ones are named and passed over.
"""
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_latest, load_model
from fork_ranks import start

import checkpoint
import distributed
import mtp
from configurator import UserError
from model import ModelConfig
from tokenizer import Tokenizer

SHAPE = ModelConfig(vocab_size=64, n_layer=1, d_model=16, n_head=2, n_kv_head=1, head_dim=8, d_ff=24, n_mtp=1)


def small(seed: int = 0):
    rt = distributed.setup(seed=seed, device="cpu")
    model = checkpoint.materialise(mtp.build(SHAPE, "meta"), rt, seed=seed)
    return rt, model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def train(model, optimizer, steps: int = 1) -> list[float]:
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 64, (2, 10))  # from the global generator: resume must restore it
        trunk, extra = mtp.losses(model, ids, torch.zeros_like(ids), torch.arange(8)[None].expand(2, 8), None)
        (trunk + extra[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(trunk.item() + random.random() + float(np.random.rand()))
    return losses


def save(run, step, model, optimizer, **more):
    checkpoint.save(
        run,
        step,
        model,
        optimizer=optimizer,
        config={"lr": 1e-2},
        meta={"stage": "base"},
        state={"step": step, "cursor": [step, 2.5, "x"]},
        **more,
    )


def break_file(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "corrupt":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1                              # one bit
        path.write_bytes(data)
    elif how == "missing":
        path.unlink()


# ---- one checkpoint ----------------------------------------------------------------------------------------

def test_folder_holds_all_that_the_design_names(tmp_path):
    rt, model, optimizer = small()
    train(model, optimizer)
    save(tmp_path, 500, model, optimizer, tokenizer=Tokenizer.load("tiny"))
    ckpt = tmp_path / "step_00000500"
    assert (tmp_path / "latest").read_text().strip() == "step_00000500"
    for name in ("model.safetensors", "model.json", "config.json", "train_state.pt", "tokenizer.json"):
        assert (ckpt / name).stat().st_size > 0
    manifest = checkpoint.read_manifest(ckpt)
    assert manifest["step"] == 500 and manifest["commit"] and manifest["meta"] == {"stage": "base"}
    assert set(manifest["files"]) == {p.name for p in ckpt.iterdir()} - {"manifest.json"}
    assert ModelConfig(**checkpoint.read_shape(ckpt)) == SHAPE
    assert not list(tmp_path.glob(".*"))                       # no temporary left
    shape, state, meta = load_model(tmp_path)          # a run folder or the checkpoint itself
    assert shape == vars(SHAPE) and meta == {"stage": "base"}
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("background", [False, True])
def test_resume_is_bit_equal(tmp_path, background):
    """
    3 steps, save, 3 steps = load, the same 3 steps: weights, moments, Python, numpy and torch generators.
    """
    rt, model, optimizer = small(1)
    train(model, optimizer, 3)
    save(tmp_path, 3, model, optimizer, background=background)
    first = train(model, optimizer, 3)  # while the background save may still be writing
    checkpoint.finish()
    rt, other, optimizer2 = small(7)
    state, ckpt = load_latest(tmp_path, other, optimizer2)
    assert state == {"step": 3, "cursor": [3, 2.5, "x"]} and ckpt.name == "step_00000003"
    assert train(other, optimizer2, 3) == first
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_keep_last_n_and_newest(tmp_path):
    rt, model, optimizer = small()
    for step in range(1, 6):
        save(tmp_path / "run", step, model, optimizer, keep=3)
    assert [p.name[-1] for p in checkpoint.steps_in(tmp_path / "run")] == ["5", "4", "3"]
    os.utime(tmp_path / "run/latest", (1, 1))
    save(tmp_path / "other", 1, model, optimizer)
    assert checkpoint.newest(tmp_path) == tmp_path / "other/step_00000001"
    assert checkpoint.newest(tmp_path / "nothing") is None


@pytest.mark.parametrize("before", [0, 1])
def test_a_kill_between_a_checkpoint_and_the_file_latest(tmp_path, monkeypatch, before):
    """The whole checkpoint is there, `latest` names the one before or is not there: the run that goes on mends it."""
    rt, model, optimizer = small()
    for step in range(1, before + 1):
        save(tmp_path, step, model, optimizer)

    def killed(ckpt):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "name_latest", killed)
        save(tmp_path, before + 1, model, optimizer)
    newest = tmp_path / f"step_{before + 1:08d}"
    assert (tmp_path / "latest").exists() == bool(before) and newest.is_dir()
    assert checkpoint.to_resume(tmp_path) == newest and (tmp_path / "latest").read_text() == newest.name + "\n"
    assert checkpoint.to_resume(tmp_path / "nowhere") is None and not (tmp_path / "nowhere").exists()


# ---- broken ones -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt", "manifest.json", "model.json"])
@pytest.mark.parametrize("how", ["truncated", "corrupt", "missing"])
def test_broken_newest_is_named_and_the_one_before_is_used(tmp_path, capsys, name, how):
    if (name, how) == ("manifest.json", "corrupt"):
        how = "truncated"  # a flipped bit may hit a space; JSON is what is checked
    rt, model, optimizer = small()
    save(tmp_path, 1, model, optimizer)
    save(tmp_path, 2, model, optimizer)
    break_file(tmp_path / "step_00000002" / name, how)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"
    warning = capsys.readouterr().err
    assert "step_00000002" in warning and name in warning and "not whole" in warning
    with pytest.raises(UserError, match=f"step_00000002 is not whole: {name}"):
        checkpoint.find(tmp_path / "step_00000002")
    save(tmp_path, 2, model, optimizer)  # reaching the step again replaces the broken folder
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000002"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("make, message", [
    (lambda p: p / "nowhere", "no checkpoint at .*nowhere: no such folder"),
    (lambda p: p, "no checkpoint in"),
])
def test_missing_checkpoint_is_one_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as e:
        checkpoint.find(make(tmp_path))
    assert "\n" not in str(e.value)


def test_other_shapes_and_vocabularies_are_named(tmp_path):
    rt, model, optimizer = small()
    save(tmp_path, 1, model, optimizer)
    ckpt = checkpoint.latest(tmp_path)
    with pytest.raises(UserError, match="n_layer = 1 there, 2 here"):
        checkpoint.same_shape(checkpoint.read_shape(ckpt), vars(SHAPE) | {"n_layer": 2}, ckpt)
    wide = ModelConfig(**{**vars(SHAPE), "vocab_size": 96})
    with pytest.raises(UserError, match=r"shape \[64, 16\], the model \[96, 16\] \(vocabulary mismatch\)"):
        checkpoint.read_weights(ckpt, mtp.build(wide))
    with pytest.raises(UserError, match="lacks 'mtp_layers.1"):
        checkpoint.read_weights(ckpt, mtp.build(ModelConfig(**{**vars(SHAPE), "n_mtp": 2})))
    with pytest.raises(UserError, match="'mtp_layers.0.* too many"):
        checkpoint.read_weights(ckpt, mtp.build(ModelConfig(**{**vars(SHAPE), "n_mtp": 0})))
    with pytest.raises(TypeError, match=r"state\['cursor'\] = \{1\} is a set"):
        checkpoint.save(tmp_path, 2, model, config={}, meta={}, state={"cursor": {1}})


# ---- none that can be used -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, how", [("model.safetensors", "truncated"), ("train_state.pt", "missing"),
                                       ("manifest.json", "missing")])
def test_a_run_of_which_nothing_can_be_used_is_no_new_run(tmp_path, name, how):
    """The error names each folder and what is wrong with it."""
    rt, model, optimizer = small()
    for step in (1, 2):
        save(tmp_path / "run", step, model, optimizer)
        break_file(tmp_path / f"run/step_0000000{step}" / name, how)
    for look in (checkpoint.latest, checkpoint.find):
        with pytest.raises(UserError, match=f"no checkpoint in .*run can be used: step_00000002 is not whole: {name}"
                                            f".*; step_00000001 is not whole: {name}.*Nothing was changed: restore"):
            look(tmp_path / "run")
    for ckpt in checkpoint.steps_in(tmp_path / "run"):
        shutil.rmtree(ckpt)
    with pytest.raises(UserError, match="latest names a checkpoint, and there is none"):
        checkpoint.latest(tmp_path / "run")
    (tmp_path / "run/latest").unlink()
    assert checkpoint.latest(tmp_path / "run") is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("call", ["scandir", "digest", "read_manifest"])
@pytest.mark.parametrize("what", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_now_is_neither_new_nor_broken(tmp_path, monkeypatch, call, what):
    """A hiccup of a network file system: no new run, and no way back to an older checkpoint."""
    rt, model, optimizer = small()
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)

    def fail(path, *args):
        raise OSError(what, os.strerror(what), str(path))
    with monkeypatch.context() as m:
        m.setattr(os if call == "scandir" else checkpoint, call, fail)
        with pytest.raises(UserError, match=f"{os.strerror(what)}.*nothing was changed"):
            checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000002"


def test_the_newest_under_a_folder_passes_over_a_run_of_which_nothing_can_be_used(tmp_path, capsys):
    rt, model, optimizer = small()
    for name in ("a", "b"):
        save(tmp_path / name, 1, model, optimizer)
        os.utime(tmp_path / name / "latest", (ord(name), ord(name)))
    break_file(tmp_path / "b/step_00000001/model.safetensors", "truncated")
    assert checkpoint.newest(tmp_path) == tmp_path / "a/step_00000001"
    assert "no checkpoint in" in capsys.readouterr().err
    break_file(tmp_path / "a/step_00000001/model.safetensors", "corrupt")
    with pytest.raises(UserError, match="b can be used"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("lost", ["model.safetensors", "manifest.json"])
def test_nothing_is_pruned_before_the_newer_one_is_verified(tmp_path, monkeypatch, lost):
    """The file system says that all is written, and then it is not."""
    rt, model, optimizer = small()
    save(tmp_path, 1, model, optimizer, keep=1)
    replace = os.replace

    def forgetful(source, target):
        replace(source, target)
        if Path(target).name == "step_00000002":
            break_file(Path(target) / lost, "truncated")
    with monkeypatch.context() as m:
        m.setattr(os, "replace", forgetful)
        with pytest.raises(UserError, match="step 2 in .* could not be written: .*read back.*; earlier checkpoints"):
            save(tmp_path, 2, model, optimizer, keep=1)
    assert (tmp_path / "latest").read_text().strip() == "step_00000001"
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"
    save(tmp_path, 2, model, optimizer, keep=1)
    assert checkpoint.steps_in(tmp_path) == [tmp_path / "step_00000002"]


# ---- full disks --------------------------------------------------------------------------------------------

def test_no_room_is_told_before_a_byte_is_written(tmp_path, monkeypatch):
    rt, model, optimizer = small()
    save(tmp_path, 1, model, optimizer)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match=r"disk full: a checkpoint in .* needs 0.01 GB, 0.00 GB are free"):
        save(tmp_path, 2, model, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


@pytest.mark.parametrize("where", ["save_file", "torch.save", "fsync", "replace"])
@pytest.mark.parametrize("background", [False, True])
def test_disk_full_in_the_middle_loses_nothing(tmp_path, monkeypatch, where, background):
    rt, model, optimizer = small()
    save(tmp_path, 1, model, optimizer)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        target = {
            "save_file": (checkpoint, "save_file"),
            "torch.save": (torch, "save"),
            "fsync": (os, "fsync"),
            "replace": (os, "replace"),
        }[where]
        m.setattr(*target, fail)
        with pytest.raises(UserError, match="step 2 in .* could not be written: disk full; earlier check"):
            save(tmp_path, 2, model, optimizer, background=background)
            checkpoint.finish()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"
    save(tmp_path, 2, model, optimizer)                        # with room again, it works
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000002"


def test_a_real_write_error_is_one_line(tmp_path):
    """
    The kernel refuses to let a file grow (RLIMIT_FSIZE): one line, status 1, no traceback, nothing
    half-written.
    """
    code = ("import resource, signal, sys; sys.path[:0] = {path!r}; import configurator, test_checkpoint as t\n"
            "with configurator.one_line():\n"
            "    rt, model, optimizer = t.small()\n"
            "    t.save({run!r}, 1, model, optimizer)\n"
            "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
            "    t.save({run!r}, 2, model, optimizer)\n")
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", code.format(path=[str(here), str(here.parent)], run=str(tmp_path))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "step 2" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_a_disk_that_is_full_inside_torch_save_is_called_so(tmp_path, monkeypatch):
    """torch.save then fails with words of its own (seen on a full tmpfs), safetensors with others; a quota too."""
    rt, model, optimizer = small()
    save(tmp_path, 1, model, optimizer)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    real = open
    for code, words in ((errno.ENOSPC, "disk full"), (errno.EDQUOT, "disk full"), (None, "unexpected pos 64")):
        def probed(path, *a, code=code, **k):
            if code and str(path).endswith(".probe"):
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *a, **k)
        with monkeypatch.context() as m:
            m.setattr(torch, "save", fail)
            m.setattr("builtins.open", probed)
            with pytest.raises(UserError, match=f"step 2 in .* could not be written: .*{words}.*earlier checkpoints"):
                save(tmp_path, 2, model, optimizer)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# ---- kills -------------------------------------------------------------------------------------------------

def writer(run: str, background: bool) -> None:
    """Saves as fast as it can, from where it was; weights and state both say the step."""
    rt, model, optimizer = small()
    state, _ = load_latest(run, model, optimizer)
    step = first = state["step"] if state else 0
    while True:
        step += 1
        with torch.no_grad():
            model.norm.weight.fill_(step)
        save(run, step, model, optimizer, background=background)
        if step > first + background:                          # so that something new is on the disk for certain
            Path(run, "done").write_text(str(step))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing(tmp_path, kills, background):
    """SIGKILL while writing, several times with foreground and as often with background saves."""
    rng, before = random.Random(5), 0
    for kill in range(kills):
        (process,) = start(1, tmp_path, writer, str(tmp_path), background)
        deadline, told = time.monotonic() + 60, tmp_path / "done"
        told.unlink(missing_ok=True)
        # it must get somewhere before it is killed; the first background save is on the disk only after `done`
        while not (told.exists() and (tmp_path / "latest").exists()):
            assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "rank0.log").read_text()
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        done = int(told.read_text() or 0) if told.exists() else 0
        ckpt = checkpoint.latest(tmp_path)
        shape, weights, _ = load_model(ckpt)
        step = int(weights["norm.weight"][0])
        assert checkpoint.read_state(ckpt)["step"] == step == int(ckpt.name[5:])
        # a foreground save that returned is on the disk; a background one when the next has begun
        assert step >= max(before, done - background), f"kill {kill}: {done} was reported, {step} is there"
        # `latest` names a whole one
        assert checkpoint.find(tmp_path / (tmp_path / "latest").read_text().strip())
        before = step
    assert before >= kills
    assert "not whole" not in (tmp_path / "rank0.log").read_text()


def test_json_of_the_manifest_is_plain(tmp_path):
    rt, model, optimizer = small()
    save(tmp_path, 1, model, optimizer)
    files = json.loads((tmp_path / "step_00000001/manifest.json").read_text())["files"]
    assert all(len(checksum) == 64 and size > 0 for size, checksum in files.values())
