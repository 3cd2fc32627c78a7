"""One run, one folder: of two exactly one, whatever their timing; dead owners are taken over, living ones never."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fork_ranks import run_ranks
from test_bad_input import WORDS, as_it_was, ends, hub, pretrain, rl, script, sft, whole, world  # noqa: F401

import configurator
from configurator import UserError
from data import lock as locks
from data.lock import hold

ROOT = Path(__file__).resolve().parent.parent
HOLDER = """
import sys, time, types
# without torch: a process starts in a tenth of a second
sys.modules["distributed"] = types.SimpleNamespace(all_gather_object=lambda x: [x], ranks=lambda: (0, 1))
from data.lock import hold
from configurator import one_line
with one_line():
    lock = hold(sys.argv[1])
    print("held", flush=True)
    {then}
"""


def holder(path, then="sys.stdin.read(); lock.release()"):
    """A process that takes the lock and says so, or ends with a line on stderr."""
    return subprocess.Popen([sys.executable, "-c", HOLDER.format(then=then), str(path)], cwd=ROOT, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def ended(process):
    """-> (its status, stdout, stderr)"""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def forged(path, silent=0.0, **fields):
    """A lock file of another process."""
    other = locks.Lock(path).me | {"pid": os.getppid(), "start": locks.start_of(os.getppid()), "token": "other"}
    other |= fields
    path.write_text(json.dumps(other))
    os.utime(path, (time.time() - silent,) * 2)
    return path


@pytest.fixture(scope="module")
def gone():
    """(pid, start) of a process that has ended."""
    process = subprocess.Popen(["sleep", "60"])
    start = locks.start_of(process.pid)
    assert start and locks.alive(process.pid, start)
    process.kill()
    for _ in range(1000):                                 # its corpse is not alive either
        if not locks.alive(process.pid, start):
            break
        time.sleep(0.01)
    assert not locks.alive(process.pid, start)
    process.wait()
    return process.pid, start


def test_of_many_at_the_same_moment_one_wins(tmp_path, gone):
    """Four processes at once, first on an empty folder, then on the lock of a dead process."""
    for path in (tmp_path / "new/run.lock", forged(tmp_path / "old.lock", pid=gone[0], start=gone[1])):
        started = [holder(path) for _ in range(4)]
        lines = [p.stdout.readline() for p in started]
        assert lines.count("held\n") == 1, lines
        winner = started[lines.index("held\n")]
        for p in started:
            status, _, err = ended(p)
            if p is winner:
                assert status == 0 and (err.count("this run takes over") == (path.name == "old.lock"))
            else:
                assert status == 1 and err.count("\n") == 1, err
                assert f"error: {path}: held by pid {winner.pid} on " in err and "another --out" in err
        assert not path.exists() and not list(path.parent.glob(".*")) and not list(path.parent.glob("*.after"))


@pytest.mark.parametrize("how, status", [
    ("pass", 0), ("raise ValueError('bug')", 1), ("sys.exit(3)", 3),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143),
    ("import os, signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130)])
def test_it_is_released_whatever_ends_the_process(tmp_path, how, status):
    assert ended(holder(tmp_path / "made/run.lock", how))[0] == status
    assert not (tmp_path / "made").exists()               # nothing else was written


def test_after_sigkill_the_next_takes_over(tmp_path, capsys):
    first = holder(tmp_path / "run.lock")
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"held by pid {first.pid} on .* since .*last sign of life 0 s ago"):
        hold(tmp_path / "run.lock")
    first.kill()
    first.wait()
    lock = hold(tmp_path / "run.lock")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"pid {first.pid}" in err and "this run takes over" in err
    lock.release()
    assert list(tmp_path.iterdir()) == []
    hold(tmp_path / "run.lock").release()                 # nothing was left
    assert capsys.readouterr().err == ""


def test_a_pid_that_was_given_again_is_another_process(tmp_path):
    with pytest.raises(UserError, match=f"held by pid {os.getppid()}"):
        hold(forged(tmp_path / "a.lock"))
    hold(forged(tmp_path / "b.lock", start="1")).release()
    hold(forged(tmp_path / "b.lock", start="")).release()


def test_other_hosts_are_never_taken_over(tmp_path, gone):
    """Not even after days, nor when a process of this host has the same pid; the line says what to delete."""
    path = forged(tmp_path / "run.lock", silent=7000, host="node17", machine="x", pid=gone[0], start=gone[1])
    with pytest.raises(UserError, match=r"on node17 .*last sign of life 7,0\d\d s.*cannot be looked at.*delete .*run"):
        hold(path)
    assert json.loads(path.read_text())["host"] == "node17"
    path.unlink()
    hold(path).release()


def test_this_host_after_a_power_cut(tmp_path, capsys):
    """Same name, another start of the machine: alive as long as somebody touches it, dead after a minute of silence."""
    path = forged(tmp_path / "run.lock", silent=5, machine="before")
    with pytest.raises(UserError, match="last sign of life 5 s ago"):
        hold(path)
    lock = hold(forged(path, silent=locks.SILENT + 5, machine="before"))
    assert "this run takes over" in capsys.readouterr().err
    lock.release()


def test_the_clock_of_this_machine_does_not_matter(tmp_path, monkeypatch):
    """Silence is measured by the file server's clock."""
    path = forged(tmp_path / "run.lock", silent=30, machine="before")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(UserError, match="30 s ago"):
        hold(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null", b'{"pid": 1}', b"[" * 100_000,
                                     b'{"pid": -1, "host": 1}', b'{"pid": "1e400"}'])
def test_what_is_no_lock_is_refused(tmp_path, content):
    path = tmp_path / "run.lock"
    path.write_bytes(content)
    os.utime(path, (time.time() - 60,) * 2)
    with pytest.raises(UserError, match="run.lock is there and is no lock of this project: delete it"):
        hold(path)
    assert path.read_bytes() == content


def test_a_take_over_that_was_ended_is_named(tmp_path, gone):
    path = forged(tmp_path / "run.lock", pid=gone[0], start=gone[1])
    (tmp_path / "run.lock.after").write_text("{}")
    os.utime(tmp_path / "run.lock.after", (1, 1))
    with pytest.raises(UserError, match="delete .*run.lock and .*run.lock.after"):
        hold(path)


def test_a_file_system_without_hard_links(tmp_path, monkeypatch, gone):
    def no_link(*_):
        raise OSError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", no_link)
    lock = hold(tmp_path / "run.lock")
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    lock.release()
    hold(forged(tmp_path / "run.lock", pid=gone[0], start=gone[1])).release()
    with pytest.raises(UserError, match="held by"):
        hold(forged(tmp_path / "run.lock"))


def test_an_answer_that_nfs_lost(tmp_path, monkeypatch):
    """The server has made the link, its answer was lost, the client asks again: "exists". It is ours all the same."""
    real = os.link

    def twice(a, b):
        real(a, b)
        real(a, b)
    monkeypatch.setattr(os, "link", twice)
    hold(tmp_path / "run.lock").release()
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_call_of_this_process_is_no_other_run(tmp_path, capsys):
    first = hold(tmp_path / "run.lock")                   # its script ended with an error
    second = hold(tmp_path / "run.lock")
    assert capsys.readouterr().err == ""
    first.release()
    assert (tmp_path / "run.lock").exists()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_the_heartbeat(tmp_path, monkeypatch):
    """It touches the file; a run whose lock was deleted and taken by another one ends itself."""
    monkeypatch.setattr(locks, "BEAT", 0.02)
    told = threading.Event()
    monkeypatch.setattr(os, "kill", lambda pid, sig, real=os.kill:
                        told.set() if sig == signal.SIGINT else real(pid, sig))
    lock = hold(tmp_path / "run.lock")
    os.utime(tmp_path / "run.lock", (1, 1))
    for _ in range(500):
        if (tmp_path / "run.lock").stat().st_mtime > 1:
            break
        time.sleep(0.02)
    assert (tmp_path / "run.lock").stat().st_mtime > 1 and not told.is_set()
    forged(tmp_path / "run.lock")
    assert told.wait(10)
    lock.release()
    assert (tmp_path / "run.lock").exists()               # it is the other's


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "wall").write_text("x")
    with pytest.raises(UserError, match="wall"):
        hold(tmp_path / "wall/run.lock")


def test_escape_sequences_of_a_lock_are_shown(tmp_path, capsys):
    with pytest.raises(SystemExit) as e, configurator.one_line():
        hold(forged(tmp_path / "run.lock", command="\x1b]0;owned\x07"))
    assert r"\x1b]0;owned\x07" in e.value.code and "\x1b" not in e.value.code


# ---- the scripts ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [pretrain, sft, rl])
def test_a_second_run_in_the_folder_ends_before_it_touches_anything(world, module, gone):  # noqa: F811
    """A living owner: one line, the folder as it was. A dead one: the run takes over, and the lock is gone then."""
    more = ["--heldout="] if module is sft else []
    (world / "run").mkdir()
    lock = forged(world / "run/run.lock")
    ends(script(module, *WORDS[module](world, *more)), f"{lock}: held by pid {os.getppid()} on ", "another --out")
    assert [p.name for p in (world / "run").iterdir()] == ["run.lock"]
    forged(lock, pid=gone[0], start=gone[1])
    script(module, *WORDS[module](world, *more))()
    assert not lock.exists() and (world / "run/latest").is_file()


def test_a_corpus_is_built_by_one(tmp_path):
    """As lines and as shards: in a file's lock, and in one of the source, so that two sources can be made at a time."""
    rows = [json.dumps({"text": f"page {i} of many words " * 9}) for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    forged(tmp_path / "o.jsonl.lock")
    ends(script(hub, "text", tmp_path / "a.jsonl", tmp_path / "o.jsonl"), "o.jsonl.lock: held by")
    (tmp_path / "shards").mkdir()
    forged(tmp_path / "shards/web.lock")
    words = ["text", tmp_path / "a.jsonl", tmp_path / "shards", "--tokenizer=tiny", "--valid_share=0"]
    ends(script(hub, *words), "web.lock: held by")
    script(hub, *words, "--name=books")()
    assert sorted(p.name for p in tmp_path.glob("shards/*.lock")) == ["web.lock"]


def rank_that_wants(path):
    import distributed
    rt = distributed.setup(device="cpu", timeout=60)
    lock = hold(path)
    distributed.teardown(rt)
    lock.release()


def test_all_ranks_end_when_rank_0_is_refused(tmp_path):
    """And none hangs; the same line on each."""
    forged(tmp_path / "run.lock")
    assert run_ranks(2, tmp_path, rank_that_wants, tmp_path / "run.lock") == [1, 1]
    assert all("run.lock: held by pid" in (tmp_path / f"rank{r}.log").read_text() for r in (0, 1))
    (tmp_path / "run.lock").unlink()
    assert run_ranks(2, tmp_path, rank_that_wants, tmp_path / "run.lock")[0] in (0, -signal.SIGABRT)
    assert not (tmp_path / "run.lock").exists()
