"""pytest -m gpu tests/test_kernels_gpu.py: the compiled kernels against fp64 and against themselves."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import gpu  # noqa: E402
import gpu_kernels  # noqa: E402

import mtp  # noqa: E402
from engine import Engine, Request, generate  # noqa: E402
from kernels import reference
from kernels.attention import attention, doc_bounds  # noqa: E402
from model import ModelConfig  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("d", [64, 128, 256])
def test_every_attention_configuration_is_right_and_repeats_to_the_bit(d):
    run = gpu.Run(dry=False)
    gpu_kernels.check_attention(run, d)
    assert not run.faults, "\n".join(run.faults)


def test_every_other_kernel_is_right():
    run = gpu.Run(dry=False)
    gpu_kernels.check_others(run)
    gpu_kernels.check_decode(run)
    gpu_kernels.check_gemv(run)
    assert len(run.rows) == 8 and not run.faults


@pytest.mark.parametrize("d", [16, 32, 64, 128, 256])
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(d):
    """The rule of flash-attention's own tests, on packed ragged rows."""
    torch.manual_seed(0)
    B, T = 2, 555
    bounds = doc_bounds(torch.tensor([0, 7, 300, 555, 1110], device="cuda", dtype=torch.int32), B, T)
    like = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (torch.randn(B, T, n, d, **like) for n in (4, 2, 2))
    do = torch.randn_like(q)
    exact = gpu_kernels.exact_attention(q, k, v, bounds)
    truth = (exact, *torch.autograd.grad(exact, (q, k, v), do.double()))
    errors = []
    for f in (attention, reference.attention):
        o = f(q, k, v, bounds)
        got = (o, *torch.autograd.grad(o, (q, k, v), do))
        errors.append([(g.double() - t).abs().max().item() for g, t in zip(got, truth, strict=True)])
    for ours, torchs in zip(*errors, strict=True):
        assert ours <= 2 * torchs + 1e-5


# ---- the engine: CUDA graphs, blocks, fused decoding ----------------------------------------------------------------

def small_model(n_mtp=3):
    cfg = ModelConfig(vocab_size=1024, n_layer=3, d_model=256, n_head=8, n_kv_head=2, head_dim=64, d_ff=512,
                      max_seq_len=512, n_mtp=n_mtp)
    model = mtp.build(cfg)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.08) if p.ndim > 1 else p.normal_(0, 0.3)
    return model.bfloat16().cuda().requires_grad_(False)


def requests(n, **more):
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 90, (n,), generator=g).tolist()
    return [Request(i, torch.randint(0, 1024, (k,), generator=g).tolist(), 40 + i % 30, seed=i, stop=(5,), **more)
            for i, k in enumerate(lengths)]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("how", [dict(temperature=0.0), dict(temperature=1.0), dict(temperature=0.8, top_p=0.9)],
                         ids=["greedy", "plain", "top-p"])
def test_drafts_change_nothing(batch, how):
    """The same tokens with 0, 1 and 3 MTP layers, in bf16, through graphs; log-probs to the bit."""
    model = small_model()
    texts = []
    for n_draft in (0, 1, 3):
        done = generate(Engine(model, batch, 256, n_draft), requests(batch, **how))
        texts.append([(s.tokens, s.logprobs, s.finish) for s in done])
    assert texts[0] == texts[1] == texts[2]


def test_fused_decoding_equals_the_model():
    """Teacher-forced log-probs of engine samples from the model's own forward, in bf16: rounding only."""
    model = small_model()
    done = generate(Engine(model, 16, 256, 3), requests(16, temperature=1.0))
    worst = []
    for s in done:
        ids = torch.tensor([s.prompt + s.tokens], device="cuda")
        logp = model.logits(model(ids))[0].log_softmax(-1)
        at = torch.arange(len(s.prompt) - 1, ids.shape[1] - 1, device="cuda")
        exact = logp[at, ids[0, at + 1]]
        worst.append((exact - torch.tensor(s.logprobs, device="cuda")).abs().mean().item())
    assert max(worst) < 0.1 and sum(worst) / len(worst) < 0.03


def test_aborts_reloads_and_full_queues_on_the_gpu():
    """More requests than slots, some aborted, weights reloaded on the way: all end, no block is lost."""
    model, other = small_model(), small_model()
    engine = Engine(model, 4, 200, 3)
    free = len(engine.blocks.free_blocks)
    todo = requests(40, temperature=1.0)
    for r in todo:
        engine.add(r)
    ended, steps = {}, 0
    while engine.active or engine.waiting:
        for s in engine.step():
            assert s.id not in ended
            ended[s.id] = s
        steps += 1
        if steps % 7 == 0:
            pending = [r.id for r in todo if r.id not in ended]
            if pending and (s := engine.abort(pending[0])) is not None:
                ended[s.id] = s
        if steps == 20:
            engine.load(other.state_dict())
    assert len(ended) == 40 and len(engine.blocks.free_blocks) == free and not engine.in_flight
