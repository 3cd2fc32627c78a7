"""pytest -m gpu tests/test_kernels_gpu.py: the compiled kernels against fp64 and against themselves."""
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))


def test_every_configuration_is_right_and_repeats_to_the_bit():
    """bench/gpu.py's check: attention in all configurations, 20 repeats each; every other kernel."""
    import gpu
    run = gpu.Run(dry=False)
    gpu.check(run)
    assert len(run.rows) == 8


@pytest.mark.parametrize("d", [16, 32, 64, 128, 256])
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(d):
    """The rule of flash-attention's own tests, on packed ragged rows."""
    import gpu

    from kernels.attention import attention, attention_reference, doc_bounds
    torch.manual_seed(0)
    B, T = 2, 555
    bounds = doc_bounds(torch.tensor([0, 7, 300, 555, 1110], device="cuda", dtype=torch.int32), B, T)
    like = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (torch.randn(B, T, n, d, **like) for n in (4, 2, 2))
    do = torch.randn_like(q)
    exact = gpu.exact_attention(q, k, v, bounds)
    truth = (exact, *torch.autograd.grad(exact, (q, k, v), do.double()))
    errors = []
    for f in (attention, attention_reference):
        o = f(q, k, v, bounds)
        got = (o, *torch.autograd.grad(o, (q, k, v), do))
        errors.append([(g.double() - t).abs().max().item() for g, t in zip(got, truth, strict=True)])
    for ours, torchs in zip(*errors, strict=True):
        assert ours <= 2 * torchs + 1e-5
