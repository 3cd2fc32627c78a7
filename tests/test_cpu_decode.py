"""
kernels/cpu/decode_cpu.c through kernels/cpu/decode.py: the same function as model.py and mtp.py, and bits that depend
on the row alone.

Random weights, large enough that attention is sharp. Each shape goes through the engine's KV cache in odd pieces.
"""
import ctypes
import os
import subprocess
import sys
import time
from ctypes import byref, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import Engine, Request, generate
from kernels import cpu
from kernels.cpu import decode
from model import MiMo, ModelConfig
from mtp import build
from sampling import signed64, uniform

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(decode.library() is None, reason="no C compiler: the engine runs model.py's forward")

# H/K = 1, 2, 4, 3; d = 16, 32, 64, 128 and 6; widths and vocabularies on and off multiples of 16
SHAPES = [dict(n_head=4, n_kv_head=4, head_dim=16, d_model=64, d_ff=96, vocab_size=1000),
          dict(n_head=4, n_kv_head=2, head_dim=32, d_model=48, d_ff=72, vocab_size=33, qkv_bias=False,
               tie_embeddings=True),
          dict(n_head=4, n_kv_head=1, head_dim=64, d_model=40, d_ff=50, vocab_size=61),
          dict(n_head=2, n_kv_head=1, head_dim=128, d_model=32, d_ff=64, vocab_size=128),
          dict(n_head=3, n_kv_head=1, head_dim=6, d_model=20, d_ff=17, vocab_size=7)]


def make(shape: dict) -> MiMo:
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


def ids_of(model: MiMo, B: int, T: int) -> Tensor:
    return torch.randint(model.cfg.vocab_size, (B, T), generator=torch.Generator().manual_seed(T))


Context = decode.struct("Context", Q=c_int64, positions=c_void_p, columns=c_void_p, table=c_void_p)


class Parts:
    """The functions of decode_cpu.c that its prefill_chunk, decode and draft are made of, each by itself."""
    def __init__(self, model: MiMo, slots: int, columns: int = 128):
        runner = Engine(model, slots, columns - 5, 3, block=16).runner
        runner.refresh()
        self.table = runner.state["table"]                            # the blocks of each row, in any order
        blocks = torch.randperm(self.table.numel(), generator=torch.Generator().manual_seed(1)).int() + 1
        self.table.copy_(blocks.view_as(self.table))
        self.forward, self.lib, p, i = runner.c, decode.library(), c_void_p, c_int64
        cpu.bind(self.lib, trunk=(None, p, p, i, p, i, p), mtp=(None, p, i, p, i, p, p, i, p),
                 head=(None, p, i, i, i, p, p))
        self.c_model, self.shape = self.forward.c_model, self.forward.shape

    def context(self, first: int, positions: Tensor):
        """positions int64 [B,Q], contiguous and kept by the caller, of rows first and on."""
        return byref(Context(positions.shape[1], positions.data_ptr(), positions.data_ptr(),
                             self.table[first:].data_ptr()))

    def trunk(self, ids: Tensor, first: int, positions: Tensor) -> Tensor:
        """ids int64 [B,Q] -> h [B,Q,D] before the final norm."""
        x, ids = torch.empty(*ids.shape, self.shape.Dp), ids.contiguous()
        self.lib.trunk(self.c_model, self.context(first, positions), ids.numel(), ids.data_ptr(), False, x.data_ptr())
        return x[..., :self.shape.D]

    def mtp(self, k: int, h: Tensor, ahead: Tensor, first: int, positions: Tensor, emit: str = "all") -> Tensor | None:
        """MTP layer k; h [B,Q,D] before the final norm, ahead [B,Q]. emit "all" -> [B,Q,D], "last" -> [B,D], "none"."""
        s, (B, Q) = self.shape, ahead.shape
        x, h, ahead = torch.empty(B, Q, s.Dp), h.contiguous(), ahead.contiguous()
        self.lib.mtp(self.c_model, k, self.context(first, positions), B * Q, h.data_ptr(), ahead.data_ptr(),
                     {"all": 1, "last": Q, "none": 0}[emit], x.data_ptr())
        return None if emit == "none" else x[..., :s.D] if emit == "all" else x.view(-1, s.Dp)[:B, :s.D]

    def head(self, x: Tensor, layer: int = -1) -> Tensor:
        """x [N,D] -> logits [N,V], behind the trunk's norm (-1) or an MTP layer's."""
        x, logits = decode.pad(x, self.shape.Dp).contiguous(), torch.empty(len(x), self.shape.Vp)
        self.lib.head(self.c_model, layer, len(x), self.shape.V, x.data_ptr(), logits.data_ptr())
        return logits[:, :self.shape.V]


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 5, [7, 1, 3], [60, 1, 4, 4, 1, 19], [128]], ids=str)
def test_forward_equals_model_py(model, pieces):
    """
    Trunk, lm_head and three MTP layers, fed in pieces, up to the last column of the KV cache: logits within 1e-4 of the
    full forward. Each layer also has to give the last token of each sequence alone, and keys and values alone.
    """
    B, T = 3, sum(pieces)
    ids, parts = ids_of(model, B, T + 3), Parts(model, 8)
    h = model(ids[:, :T])
    cos, sin = model.rope_at(ids[:, :T], None)
    right = [model.logits(h)]
    for k, layer in enumerate(model.mtp_layers):
        z = layer(h, model.embed_tokens(ids[:, k + 1:T + k + 1]), cos, sin)
        right.append(layer.final_layernorm(z) @ model.lm_head.weight.T)
    done = 0
    for i, n in enumerate(pieces):
        here = slice(done, done + n)
        rows = 2, torch.arange(done, done + n).expand(B, n).contiguous()
        got_h = parts.trunk(ids[:, here], *rows)
        torch.testing.assert_close(got_h, h[:, here], atol=1e-4, rtol=1e-5)
        got = [parts.head(got_h.flatten(0, 1)).view(B, n, -1)]
        for k in range(3):
            ahead, emit = ids[:, done + k + 1:done + n + k + 1], ("all", "last", "none")[(i + k) % 3]
            z = parts.mtp(k, got_h, ahead, *rows, emit)
            if emit == "none":
                got.append(right[k + 1][:, here])
                continue
            assert z.shape == ((B, n, model.cfg.d_model) if emit == "all" else (B, model.cfg.d_model))
            logits = parts.head(z.reshape(-1, model.cfg.d_model), k).view(B, -1, model.cfg.vocab_size)
            got.append(torch.cat([right[k + 1][:, here][:, :-logits.shape[1]], logits], 1))
        for a, b in zip(got, right, strict=True):
            assert (a - b[:, here]).abs().max() < 1e-4
        done += n


@torch.no_grad()
def test_a_rows_bits_depend_on_that_row_alone(model):
    """The same 37 tokens alone, one by one, in pieces, and among 11 to 61 others: one set of bits for h and logits."""
    T, ids = 37, ids_of(model, 20, 37)

    def run(rows: list[int], pieces: list[int]) -> list[Tensor]:
        parts, done, found = Parts(model, 20, 69), 0, []
        for n in pieces:
            part = ids[rows, done:done + n]
            where = 0, torch.arange(done, done + n).expand(len(rows), n).contiguous()
            h = parts.trunk(part, *where)
            z = parts.mtp(1, h, part, *where)
            found.append([h, z, parts.head(h.flatten(0, 1)).view(len(rows), n, -1)])
            done += n
        return [torch.cat(x, 1) for x in zip(*found, strict=True)]
    alone = run([5], [1] * T)
    for rows, pieces in (([5], [T]), ([5], [4] * 9 + [1]), ([5, 2], [30, 7]), (list(range(7)), [1] * T),
                         (list(range(11)), [16, 5, 16]), (list(range(20)), [3] * 12 + [1])):
        i = rows.index(5)
        for a, b in zip(alone, run(rows, pieces), strict=True):
            assert torch.equal(a[0], b[i])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 12345678901234567890])
def test_random_numbers_are_those_of_sampling_py(seed):
    forward = Parts(make(SHAPES[4]), 8).forward
    forward.uniform(5, 3, seed)
    u = forward.kept["u"]
    right = uniform(torch.tensor(signed64(seed)), torch.arange(u.shape[1] - 3))
    assert torch.equal(u[5, 3:], right) and right.std() > 0.2 and not u[5, :3].any() and not u[4].any()


def test_exp_is_accurate(tmp_path):
    """exp_negative of cpu.h: relative error below 2e-7 where e^x is a normal number; -inf -> 0; NaN stays NaN."""
    source = tmp_path / "exp.c"
    source.write_text('#include "cpu.h"\nvoid exp_of(int64_t n, const float *x, float *y) {\n'
                      "    for (int i = 0; i < n; i += LANES) store(y + i, exp_negative(load(x + i)));\n}\n")
    for machine in cpu.MACHINE:
        done = subprocess.run([os.environ.get("CC", "cc"), *cpu.FLAGS, *machine, f"-I{cpu.HERE}", str(source), "-o",
                               str(tmp_path / "exp.so"), "-lm"], capture_output=True)
        if done.returncode == 0:
            break
    done.check_returncode()
    lib = ctypes.CDLL(str(tmp_path / "exp.so"))
    cpu.bind(lib, exp_of=(None, c_int64, c_void_p, c_void_p))
    x = -torch.cat([torch.linspace(0, 87, 400_000), torch.tensor([0.0, 1e-30, 87.5, 1e30] * 4)])
    x[-3:] = torch.tensor([-torch.inf, torch.nan, -torch.inf])
    y = torch.empty_like(x)
    lib.exp_of(len(x), x.data_ptr(), y.data_ptr())
    right, normal = x.double().exp(), x > -87
    assert ((y - right).abs() / right)[normal].max() < 2e-7
    assert y[-3] == y[-1] == 0 and y[-2].isnan() and (y[x < -87.01] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("n_draft", [0, 1, 2, 3])
def test_engine_in_c_and_in_torch_give_the_same(model, n_draft):
    """Greedy and sampled, up to the context limit: the same tokens, log-probs and acceptance counts from both."""
    runs = [Request(i, ids_of(model, 1, 1 + 5 * i)[0].tolist(), 60, temperature=float(i % 2), seed=i) for i in range(8)]
    in_c, in_torch = (generate(Engine(model, 5, 50, n_draft, plain=plain), runs) for plain in (False, True))
    for a, b in zip(in_c, in_torch, strict=True):
        assert (a.tokens, a.finish, a.verified, a.accepted) == (b.tokens, b.finish, b.verified, b.accepted)
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("biases", [True, False])
def test_bf16_weights_give_the_numbers_of_their_copy_in_fp32(model, biases):
    """Weights are widened in registers: the same tokens and log-probs bit for bit, from half the bytes."""
    half = make_like(model, biases).bfloat16()
    runs = [Request(i, ids_of(model, 1, 1 + 9 * i)[0].tolist(), 30, temperature=float(i % 2), seed=i) for i in range(6)]
    e = Engine(half, 4, 90, 2)
    got, right = generate(e, runs), generate(Engine(make_like(model, biases).bfloat16().float(), 4, 90, 2), runs)
    assert [(s.tokens, s.logprobs, s.accepted) for s in got] == [(s.tokens, s.logprobs, s.accepted) for s in right]
    matrices = [t for name, t in e.runner.c.kept.items() if name.split(".")[-1] in ("q", "kv", "o", "down", "lm_head")]
    assert len(matrices) == 4 * 4 + 1 and all(t.dtype == torch.bfloat16 for t in matrices)
    with pytest.raises(ValueError, match="were freed"):             # a model that belongs to its engine
        own = Engine(half, 4, 90, 3, keep_weights=False)
        assert [s.tokens for s in generate(own, runs)] == [s.tokens for s in right]
        assert {name for name, p in half.named_parameters() if p.numel()} == {"embed_tokens.weight", "norm.weight"}
        own.load()


def make_like(model: MiMo, biases: bool) -> MiMo:
    """A copy of a model, with or without the biases of q, k and v."""
    copy = build(model.cfg)
    copy.load_state_dict(model.state_dict())
    for block in () if biases else (*copy.layers, *copy.mtp_layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block.self_attn, name).bias = None
    return copy.requires_grad_(False)


# ---- the compiler ---------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from engine import Engine, Request, generate
from model import ModelConfig
from mtp import build
m = build(ModelConfig(n_layer=1, n_mtp=1))
m.init_weights(0)
for _ in range(2):
    e = Engine(m, 2, 64, 1)
    print(type(e.runner).__name__ == "CpuRunner", generate(e, [Request(0, [1, 2, 3], 9, temperature=0.0)])[0].tokens)
"""


def test_without_a_compiler_it_says_so_once_and_works():
    def run(cc):
        return subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120,
                              env=os.environ | {"CC": cc})
    without, with_ = run("none"), run(os.environ.get("CC", "cc"))
    assert without.returncode == 0 and without.stderr.count("note: kernels/cpu/*.c not compiled by none") == 1
    assert with_.returncode == 0 and with_.stderr == ""
    assert without.stdout.replace("False", "True") == with_.stdout and with_.stdout.startswith("True [")


def test_compiled_once_whole_and_again_for_other_source(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "FOLDER", tmp_path / "native")
    path = cpu.build("cc")
    made = path.stat().st_mtime_ns
    assert cpu.build("cc") == path and path.stat().st_mtime_ns == made
    assert [p.name for p in (tmp_path / "native").iterdir()] == [path.name]     # nothing half-made is left there
    other = tmp_path / "decode_cpu.c"
    other.write_bytes(cpu.SOURCES[1].read_bytes() + b"\n")
    monkeypatch.setattr(cpu, "SOURCES", [cpu.SOURCES[0], other])
    assert cpu.build("cc") != path
    other.write_text("this is no C")
    with pytest.raises(subprocess.CalledProcessError):
        cpu.build("cc")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compiler of two words that writes the time into its output: it is seen whether it was called again."""
    script = tmp_path / "my compiler.sh"
    script.write_text('while [ $# -gt 0 ]; do [ "$1" = -o ] && date +%N > "$2"; [ "$1" = -E ] && exit 0; shift; done\n')
    monkeypatch.setattr(cpu, "FOLDER", tmp_path / "out/native")
    return f"sh '{script}'"


def test_a_library_that_was_cut_off_is_compiled_anew(fake):
    """A power cut, a full disk: loading such a file would end the process with SIGBUS."""
    path = cpu.build(fake)
    whole = path.read_bytes()
    for broken in (b"", whole[:-1], whole + b"x", b"\x00" * len(whole)):
        path.write_bytes(broken)
        again = cpu.build(fake)
        assert cpu.digest(again.read_bytes()) == again.stem.split("-")[2] and len(again.read_bytes()) > 1
        assert [p.name for p in cpu.FOLDER.iterdir()] == [again.name]
        path = again
    assert cpu.build(fake) == path


def test_a_compiler_that_was_killed_leaves_nothing_for_long(fake):
    cpu.FOLDER.mkdir(parents=True)
    for name, age in (("compiling-old", 3600), ("compiling-now", 0)):
        (cpu.FOLDER / name).mkdir()
        (cpu.FOLDER / name / "cpu.so").write_text("half")
        os.utime(cpu.FOLDER / name, (time.time() - age,) * 2)
    path = cpu.build(fake)
    assert {p.name for p in cpu.FOLDER.iterdir()} == {path.name, "compiling-now"}       # another process may be at it


def test_code_that_others_may_write_to_is_not_loaded(fake, tmp_path, monkeypatch):
    """Writable files and links go; folders of one's own are closed; in a folder of somebody else's nothing is read."""
    path = cpu.build(fake)
    assert cpu.ours(path)
    path.chmod(0o777)
    path = cpu.build(fake)
    assert cpu.ours(path)
    cpu.FOLDER.chmod(0o777)
    assert cpu.build(fake) == path and cpu.ours(cpu.FOLDER)
    planted = cpu.FOLDER.rename(tmp_path / "elsewhere") / path.name
    cpu.FOLDER.mkdir()
    (cpu.FOLDER / path.name).symlink_to(planted)
    assert not cpu.build(fake).is_symlink()
    monkeypatch.setattr(cpu, "ours", lambda p, real=cpu.ours: "out" not in p.parts[-3:] and real(p))
    monkeypatch.setattr(cpu.tempfile, "tempdir", str(tmp_path))
    mine = cpu.build(fake)
    assert mine.parent == tmp_path / f"nanomimo-{os.geteuid()}" and mine.parent.stat().st_mode & 0o077 == 0
    mine.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="somebody else"):
        cpu.build(fake)


@pytest.mark.parametrize("compiler", ["none", "none -v", "'"])
def test_a_compiler_that_is_none_is_one_note(compiler, monkeypatch, capsys):
    monkeypatch.setenv("CC", compiler)
    assert cpu.library.__wrapped__() is None
    assert capsys.readouterr().err.count("\n") == 1
