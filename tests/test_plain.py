"""
--plain of the five scripts that run a model: torch code only, so that a breakpoint in a reference or in the engine's
own forward is hit. Each script runs on a tiny world, in this process, with the references watched.
"""
import pytest
import torch
from test_bad_input import WORDS, script, whole, world  # noqa: F401  (fixtures)

import eval as evaluation
import kernels
import kernels.cpu
import kernels.cpu.decode
import kernels.rmsnorm
import pretrain
import rl
import sample
import sft


@pytest.fixture(autouse=True)
def compiled_again():
    """A script sets the mode for its whole process."""
    yield
    kernels.set_plain(False)


@pytest.mark.parametrize("module", [pretrain, sft, rl, sample, evaluation], ids=lambda m: m.__name__)
def test_plain_runs_torch_code_only(world, module, monkeypatch):  # noqa: F811
    calls, reference = [], kernels.reference.rmsnorm

    def watched(*args):
        calls.append(torch.is_grad_enabled())
        return reference(*args)

    def compiled(*_):
        raise AssertionError("--plain asked for the compiled library")
    monkeypatch.setattr(kernels.reference, "rmsnorm", watched)
    for place in (kernels.cpu, kernels.cpu.decode):
        monkeypatch.setattr(place, "library", compiled)
    words = [f"--ckpt={world}/base", "--prompt=a", "--max_new_tokens=4", "--mtp"] if module is sample \
        else [*WORDS[module](world), *{sft: ["--heldout="], rl: ["--dynamic_sampling=False"]}.get(module, [])]
    script(module, *words, "--plain")()
    assert calls, "the reference was never called"
    assert any(calls) == (module in (pretrain, sft, rl)), "training calls it with gradients"
