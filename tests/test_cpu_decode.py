"""
kernels/cpu/decode_cpu.c through kernels/cpu/decode.py: the same function as model.py and mtp.py, and bits that depend on the row alone.

Random weights, large enough that attention is sharp. Each shape goes through the engine's cache in odd pieces.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import Engine, Request, generate
from kernels import cpu
from kernels.cpu import decode
from model import ModelConfig
from mtp import build
from sampling import signed64, uniform

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(decode.library() is None, reason="no C compiler: the engine runs model.py's forward")

# H/K = 1, 2, 4, 3; d = 16, 32, 64, 128 and 6; widths and vocabularies on and off multiples of 16
SHAPES = [dict(n_head=4, n_kv_head=4, head_dim=16, d_model=64, d_ff=96, vocab_size=1000),
          dict(n_head=4, n_kv_head=2, head_dim=32, d_model=48, d_ff=72, vocab_size=33),
          dict(n_head=4, n_kv_head=1, head_dim=64, d_model=40, d_ff=50, vocab_size=61),
          dict(n_head=2, n_kv_head=1, head_dim=128, d_model=32, d_ff=64, vocab_size=128),
          dict(n_head=3, n_kv_head=1, head_dim=6, d_model=20, d_ff=17, vocab_size=7)]


def make(shape: dict):
    model = build(ModelConfig(n_layer=2, n_mtp=3, max_seq_len=128, **shape))
    model.init_weights(3)
    with torch.no_grad():
        for p in model.parameters():                                  # uneven gains, biases that are not 0
            p.mul_(1.4) if p.ndim > 1 else p.add_(torch.randn(p.shape) * 0.3)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def model(request):
    torch.manual_seed(0)
    return make(request.param)


def ids_of(model, B: int, T: int) -> torch.Tensor:
    return torch.randint(model.cfg.vocab_size, (B, T), generator=torch.Generator().manual_seed(T))


def forward_of(model, slots: int, columns: int = 128) -> decode.Forward:
    engine = Engine(model, slots, columns - 5, 3)
    engine.tables()
    return engine.forward


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 5, [7, 1, 3], [60, 1, 4, 4, 1, 19], [128]], ids=str)
def test_forward_equals_model_py(model, pieces):
    """
    Trunk, head and three MTP layers, fed in pieces, up to the last column of the cache: logits within 1e-4 of the full
    forward. Each layer is also asked for the last token of each sequence alone, and for keys and values alone.
    """
    B, T = 3, sum(pieces)
    ids, e = ids_of(model, B, T + 3), forward_of(model, 8)
    h = model(ids[:, :T])
    cos, sin = model.rope_at(ids[:, :T], None)
    want = [model.logits(h)]
    for k, layer in enumerate(model.mtp_layers):
        z = layer(h, model.embed_tokens(ids[:, k + 1:T + k + 1]), cos, sin)
        want.append(layer.final_layernorm(z) @ model.lm_head.weight.T)
    done = 0
    for i, n in enumerate(pieces):
        here = slice(done, done + n)
        places = 2, torch.arange(done, done + n).expand(B, n).contiguous()
        got_h = e.trunk(ids[:, here], *places)
        torch.testing.assert_close(got_h, h[:, here], atol=1e-4, rtol=1e-5)
        got = [e.head(got_h.flatten(0, 1)).view(B, n, -1)]
        for k in range(3):
            ahead, kind = ids[:, done + k + 1:done + n + k + 1], ("all", "last", "none")[(i + k) % 3]
            z = e.mtp(k, got_h, ahead, *places, kind)
            if kind == "none":
                got.append(want[k + 1][:, here])
                continue
            assert z.shape == ((B, n, model.cfg.d_model) if kind == "all" else (B, model.cfg.d_model))
            logits = e.head(z.reshape(-1, model.cfg.d_model), k).view(B, -1, model.cfg.vocab_size)
            got.append(torch.cat([want[k + 1][:, here][:, :-logits.shape[1]], logits], 1))
        for a, b in zip(got, want, strict=True):
            assert (a - b[:, here]).abs().max() < 1e-4
        done += n


@torch.no_grad()
def test_a_rows_bits_depend_on_that_row_alone(model):
    """The same 37 tokens alone, one by one, in pieces, and among 11 to 61 others: one set of bits for h and logits."""
    T, ids = 37, ids_of(model, 20, 37)

    def run(rows: list[int], pieces: list[int]) -> list[torch.Tensor]:
        e, done, found = forward_of(model, 20, 69), 0, []
        for n in pieces:
            part = ids[rows, done:done + n]
            places = 0, torch.arange(done, done + n).expand(len(rows), n).contiguous()
            h = e.trunk(part, *places)
            z = e.mtp(1, h, part, *places)
            found.append([h, z, e.head(h.flatten(0, 1)).view(len(rows), n, -1)])
            done += n
        return [torch.cat(x, 1) for x in zip(*found, strict=True)]
    alone = run([5], [1] * T)
    for rows, pieces in (([5], [T]), ([5], [4] * 9 + [1]), ([5, 2], [30, 7]), (list(range(7)), [1] * T),
                         (list(range(11)), [16, 5, 16]), (list(range(20)), [3] * 12 + [1])):
        i = rows.index(5)
        for a, b in zip(alone, run(rows, pieces), strict=True):
            assert torch.equal(a[0], b[i])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 12345678901234567890])
def test_random_numbers_are_those_of_draw_py(seed):
    forward = forward_of(make(SHAPES[4]), 8)
    forward.uniform(5, 3, seed)
    u = forward.kept["u"]
    want = uniform(torch.tensor(signed64(seed)), torch.arange(u.shape[1] - 3))
    assert torch.equal(u[5, 3:], want) and want.std() > 0.2 and not u[5, :3].any() and not u[4].any()


def test_exp_is_accurate():
    """Relative error below 2e-7 where the result is a normal number; -inf -> 0; NaN stays NaN."""
    lib = decode.library()
    x = -torch.cat([torch.linspace(0, 87, 400_000), torch.tensor([0.0, 1e-30, 87.5, 1e30] * 4)])
    x[-3:] = torch.tensor([-torch.inf, torch.nan, -torch.inf])
    y = torch.empty_like(x)
    lib.exp_of(len(x), x.data_ptr(), y.data_ptr())
    right, wide = x.double().exp(), x > -87
    assert ((y - right).abs() / right)[wide].max() < 2e-7
    assert y[-3] == y[-1] == 0 and y[-2].isnan() and (y[x < -87.01] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("n_draft", [0, 1, 2, 3])
def test_engine_in_c_and_in_torch_say_the_same(model, n_draft):
    """Greedy and sampled, up to the context limit: the same tokens, log-probs and acceptance counts from both."""
    runs = [Request(i, ids_of(model, 1, 1 + 5 * i)[0].tolist(), 60, temperature=float(i % 2), seed=i) for i in range(8)]
    c, torch_ = (generate(Engine(model, 5, 50, n_draft, plain=not f), runs) for f in (True, False))
    for a, b in zip(c, torch_, strict=True):
        assert (a.tokens, a.finish, a.verified, a.accepted) == (b.tokens, b.finish, b.verified, b.accepted)
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


def test_nan_weights_give_nan_not_a_crash():
    m = make(SHAPES[0])
    m.layers[0].mlp.up_proj.weight[3] = torch.nan
    s, = generate(Engine(m, 1, 32, 2), [Request(0, [1, 2, 3], 5, temperature=0.0)])
    assert len(s.tokens) == 5 and all(x != x for x in s.logprobs) and all(0 <= t < 1000 for t in s.tokens)


# ---- the compiler ----------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from engine import Engine, Request, generate
from model import ModelConfig
from mtp import build
m = build(ModelConfig(n_layer=1, n_mtp=1))
m.init_weights(0)
for _ in range(2):
    e = Engine(m, 2, 64, 1)
    print(e.fast, generate(e, [Request(0, [1, 2, 3], 9, temperature=0.0)])[0].tokens)
"""


def test_without_a_compiler_it_says_so_once_and_works():
    def run(cc):
        return subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120,
                              env=os.environ | {"CC": cc})
    without, with_ = run("none"), run(os.environ.get("CC", "cc"))
    assert without.returncode == 0 and without.stderr.count("note: kernels/*_cpu.c not compiled by none") == 1
    assert with_.returncode == 0 and with_.stderr == ""
    assert without.stdout.replace("False", "True") == with_.stdout and with_.stdout.startswith("True [")


def test_compiled_once_whole_and_again_for_other_source(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "FOLDER", tmp_path / "native")
    path = cpu.build("cc")
    made = path.stat().st_mtime_ns
    assert cpu.build("cc") == path and path.stat().st_mtime_ns == made
    assert [p.name for p in (tmp_path / "native").iterdir()] == [path.name]     # nothing half-made lies about
    other = tmp_path / "decode_cpu.c"
    other.write_bytes(cpu.SOURCES[1].read_bytes() + b"\n")
    monkeypatch.setattr(cpu, "SOURCES", [cpu.SOURCES[0], other])
    assert cpu.build("cc") != path
    other.write_text("this is no C")
    with pytest.raises(subprocess.CalledProcessError):
        cpu.build("cc")
