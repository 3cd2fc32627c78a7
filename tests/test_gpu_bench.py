"""bench/gpu.py without a GPU: the dry run passes every measurement; a real run refuses and says why."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def bench(*args):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NANOMIMO_TRITON")}
    return subprocess.run([sys.executable, "bench/gpu.py", *args], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=300)


def test_dry_run_measures_every_row():
    run = bench("kernels", "--dry_run")
    assert run.returncode == 0, run.stderr
    result = json.loads((ROOT / "out/bench/gpu/kernels.json").read_text())
    names = " ".join(row["name"] for row in result["rows"])
    for part in ("ceiling", "check", "attention forward", "attention backward", "packed", "linear cross",
                 "logprob", "decode B=64", "rmsnorm", "swiglu", "rope"):
        assert part in names, part
    assert result["dry_run"] and all(row["met"] is None for row in result["rows"])


def test_a_kernel_of_ours_that_does_not_run_is_a_fault(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from gpu_kernels import attempt

    def broken():
        raise RuntimeError("out of shared memory")
    run = SimpleNamespace(faults=[])
    assert attempt(run, "theirs", broken) is None and run.faults == []
    assert attempt(run, "ours", broken, ours=True) is None
    assert run.faults == ["ours: does not run: out of shared memory"]
    assert attempt(run, "ours", lambda: 3, ours=True) == 3
    assert capsys.readouterr().out.count("does not run: out of shared memory") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses_and_names_the_dry_run():
    run = bench("kernels")
    assert run.returncode == 1 and "--dry_run" in run.stderr
    assert "usage" in bench("nothing").stderr
