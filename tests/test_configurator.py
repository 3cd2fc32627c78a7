"""Typed configuration: what is taken, and that everything else ends the run with status 1 and one helpful line."""
import ast
import importlib
import inspect
import runpy
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

import configurator
from configurator import UserError, from_dict, load, show, to_dict
from model import ModelConfig
from schedule import Stage

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Part:
    tokens: float = 1.0
    seq_len: int = 8
    mix: dict[str, float] = field(default_factory=lambda: {"web": 1.0})


@dataclass(frozen=True)
class Model:
    n_layer: int = 2
    n_head: int = 4

    def __post_init__(self):
        if self.n_head % 2:
            raise ValueError(f"n_head = {self.n_head} must be even")


@dataclass(frozen=True)
class Config:
    lr_max: float = 1e-3            # learning rate
    steps: int = 10
    out: str = "out"
    resume: str | None = None
    compile: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    model: Model = Model()
    stages: list[Part] = field(default_factory=lambda: [Part(), Part()])
    betas: tuple[float, float] = (0.9, 0.95)
    second: Part | None = None


def test_defaults_file_flags_in_that_order(tmp_path):
    (tmp_path / "a.py").write_text("steps = 20\nlr_max = 1\n_private = 3\nimport math\n")
    (tmp_path / "b.py").write_text("steps = 30\nmodel = dict(n_layer=5)\n")
    cfg = load(Config, ["--steps=40", str(tmp_path / "a.py"), str(tmp_path / "b.py"), "--stages.1.tokens=1e6"])
    assert (cfg.steps, cfg.lr_max, cfg.model.n_layer) == (40, 1.0, 5)
    assert (cfg.stages[0].tokens, cfg.stages[1].tokens) == (1.0, 1e6)


def test_rules_between_fields_are_checked_on_the_whole(tmp_path):
    """A file or flag may pass through a state that another flag mends."""
    (tmp_path / "odd.py").write_text("model = dict(n_head=3)\n")
    assert load(Config, [str(tmp_path / "odd.py"), "--model.n_head=6"]).model.n_head == 6
    with pytest.raises(UserError, match="must be even"):
        load(Config, [str(tmp_path / "odd.py")])


def test_inheritance_by_import(tmp_path, monkeypatch):
    monkeypatch.setattr(configurator, "__file__", str(tmp_path / "configurator.py"))
    (tmp_path / "base_cfg.py").write_text("steps = 20\nout = 'x'\n")
    (tmp_path / "child.py").write_text("from base_cfg import *\nsteps = 21\n")
    cfg = load(Config, [str(tmp_path / "child.py")])
    assert (cfg.steps, cfg.out) == (21, "x")


@pytest.mark.parametrize("flag, name, value", [
    ("--steps=1e3", "steps", 1000), ("--lr_max=1", "lr_max", 1.0), ("--out=a=b", "out", "a=b"),
    ("--compile", "compile", True), ("--compile=False", "compile", False), ("--resume=None", "resume", None),
    ("--out=123", "out", "123"), ("--out=2024", "out", "2024"), ("--out=None", "out", "None"),
    ("--out=[1,2]", "out", "[1,2]"),
    ("--out=True", "out", "True"), ("--out='quoted'", "out", "'quoted'"), ('--out="a" b', "out", '"a" b'),
    ("--out=", "out", ""), ("--out=1e-3", "out", "1e-3"), ("--out=\\n", "out", "\\n"),
    ("--out=" + "(" * 500, "out", "(" * 500),
    ("--resume=0x10", "resume", "0x10"), ("--resume=''", "resume", "''"),
    ("--resume=x", "resume", "x"), ("--dtype=bf16", "dtype", "bf16"), ("--betas=(0.8,0.9)", "betas", (0.8, 0.9)),
])
def test_accepted(flag, name, value):
    got = getattr(load(Config, [flag]), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("argv, message", [
    (["--lr_mx=1"], "unknown key lr_mx -- did you mean lr_max?"),
    (["--seq_len=9"], "unknown key seq_len -- did you mean stages.0.seq_len?"),
    (["--model.n_layr=1"], "unknown key model.n_layr -- did you mean model.n_layer?"),
    (["--stages.0.seqlen=3"], "unknown key stages.0.seqlen -- did you mean stages.0.seq_len?"),
    (["--stages.9.seq_len=3"], "should be an index from 0 to 1"),
    (["--stages.x.seq_len=3"], "should be an index from 0 to 1"),
    (["--steps.x=3"], "is a plain value"),
    (["--steps=1.5"], "steps = 1.5 should be int"),
    (["--steps=True"], "steps = True should be int"),
    (["--lr_max=abc"], "lr_max = 'abc' should be float"),
    (["--compile=0"], "compile = 0 should be bool"),
    (["--dtype=fp64"], "dtype = 'fp64' should be one of 'fp32', 'bf16'"),
    (["--model=3"], "model = 3 should be Model"),
    (["--model.n_head=3"], "n_head = 3 must be even"),
    (["--betas=(1,2,3)"], "betas"),
    (["--stages.0.mix={'web':'x'}"], "stages.0.mix"),
    (["nowhere.py"], "cannot read config file 'nowhere.py'"),
    (["lr=3"], "a flag starts with --"),
    (["--steps", "3"], "cannot read config file '3'"),
    (["-steps=3"], "a flag starts with --"),
    (["."], "a config file ends in .py"),
    (["--"], "unknown key"),
    (["--steps"], "steps = True should be int"),
    (["--steps="], "steps = '' should be int"),
    (["--steps=nan"], "steps = 'nan' should be int"),
    (["--steps=1e999"], "should be int"),
    (["--lr_max=None"], "lr_max = None should be float"),
    (["--stages=3"], "stages = 3 should be list[Part]"),
    (["--stages=[3]"], "stages.0 = 3 should be Part"),
    (["--stages=[{'tokenz': 1}]"], "unknown key tokenz"),
    (["--stages.-1.tokens=3"], "should be an index"),
    (["--stages.0=3"], "stages.0 = 3 should be Part"),
    (["--stages.0.mix.web.x=3"], "is a plain value"),
    (["--betas=('a', 0.9)"], "betas.0 = 'a' should be float"),
    (["--model.n_head.x=3"], "is a plain value"),
    (["--second.tokens=3"], "second is None"),
])
def test_rejected_with_status_1_and_one_line(argv, message):
    with pytest.raises(UserError) as e:
        load(Config, argv)
    text = str(e.value)
    assert message in text and "\n" not in text


@pytest.mark.parametrize("source, message", [
    ("stepz = 3\n", "unknown key stepz"), ("steps = 'x'\n", "steps = 'x' should be int"),
    ("steps = (\n", "SyntaxError"), ("model = dict(n_layr=3)\n", "n_layr"), ("1/0\n", "ZeroDivisionError"),
])
def test_rejected_in_a_file_names_the_file(tmp_path, source, message):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(UserError) as e:
        load(Config, [str(tmp_path / "bad.py")])
    assert message in str(e.value) and "bad.py" in str(e.value)


def test_round_trip_and_marks():
    cfg = load(Config, ["--stages.1.seq_len=32", "--betas=(0.5,0.6)", "--resume=x"])
    assert from_dict(Config, to_dict(cfg)) == cfg
    shown = show(cfg).splitlines()
    assert any(line.startswith("* stages.1.seq_len") for line in shown)
    assert any(line.startswith("  steps") for line in shown)


def test_help_prints_every_field(capsys):
    with pytest.raises(SystemExit) as e:
        load(Config, ["--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert "--lr_max=0.001" in out and "learning rate" in out and "--stages" in out
    rows = {line.split("=")[0].split()[0]: line for line in out.splitlines() if line.startswith("  --")}
    assert set(rows) == {"--lr_max", "--steps", "--out", "--resume", "--compile", "--dtype", "--betas", "--model",
                         "--model.n_layer", "--model.n_head", "--stages", "--stages.0.tokens", "--stages.0.seq_len",
                         "--stages.0.mix", "--second"}
    assert rows["--lr_max"].split() == ["--lr_max=0.001", "float", "learning", "rate"]
    assert "fp32|bf16" in rows["--dtype"] and "str | None" in rows["--resume"] and "bool" in rows["--compile"]
    assert "list[Part]" in rows["--stages"] and "fields as --stages.0.*" in rows["--second"]


SCRIPTS = ["pretrain", "sft", "rl", "data.rl_problems", "eval", "sample", "demo", "data.prepare"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script_is_for_a_person(script, capsys):
    """What it does, how to call it, and every field, nested ones too, with its meaning."""
    module = importlib.import_module(script)
    with pytest.raises(SystemExit):
        load(module.Config, ["config/tiny.py", "--help"])
    out = capsys.readouterr().out
    assert out.startswith(module.__doc__.strip()[:40])
    assert f"usage: python {'-m ' + script if '.' in script else script + '.py'} " in out
    rows = [line.split(maxsplit=2) for line in out.splitlines() if line.startswith("  --")]
    assert {row[0][2:].split("=")[0] for row in rows} >= {f.name for f in fields(module.Config)}
    without = [row[0] for row in rows if len(row) < 3 and ".name" not in row[0]]
    assert not without, f"no comment: {without}"
    if script == "pretrain":
        assert "--model.n_kv_head=2" in out and "--stages.0.warmup_tokens=0.0" in out


@pytest.mark.parametrize("words", [["hf.py", "export", "--help"], ["data/hub.py", "--help"], ["plan.py", "--help"],
                                   ["data/corpus.py", "--help"], ["data/sft_data.py", "--help"],
                                   ["paper/figures.py", "--help"]])
def test_help_of_the_others(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert e.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["pretrain", "sft", "rl", "data/rl_problems", "eval", "sample", "demo", "plan",
                                    "data/prepare"])
def test_every_field_is_read_somewhere(script):
    """A flag that nothing reads is a lie: each field of a Config occurs in its file as cfg.name or self.name."""
    source = (ROOT / f"{script}.py").read_text()
    tree = ast.parse(source)
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    fields = [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)]
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
            and n.value.id in ("cfg", "self")}
    assert fields and set(fields) <= used, f"never read: {sorted(set(fields) - used)}"


@pytest.mark.parametrize("cls, files", [(Stage, ["schedule.py", "pretrain.py", "data/loader.py"]),
                                        (ModelConfig, ["model.py", "mtp.py", "pretrain.py"])],
                         ids=["Stage", "ModelConfig"])
def test_every_nested_field_is_read_somewhere(cls, files):
    used = {n.attr for f in files for n in ast.walk(ast.parse((ROOT / f).read_text())) if isinstance(n, ast.Attribute)
            and isinstance(n.value, (ast.Name, ast.Attribute)) and isinstance(n.ctx, ast.Load)
            and ast.unparse(n.value) in ("s", "stage", "cfg", "self.cfg", "cfg.model", "self.model")}
    assert {f.name for f in fields(cls)} <= used, {f.name for f in fields(cls)} - used


@pytest.mark.parametrize("script", ["sft", "rl", "data.rl_problems", "eval", "sample"])
def test_the_shape_of_the_model_comes_from_the_checkpoint(script):
    """No flag can contradict it."""
    with pytest.raises(UserError, match="unknown key model.n_layer"):
        load(importlib.import_module(script).Config, ["--model.n_layer=3"])


def test_every_field_has_a_comment():
    assert configurator.field_comments(inspect.getsource(Config)) == {"lr_max": "learning rate"}
    for script in ("pretrain", "sft", "rl"):
        source = (ROOT / f"{script}.py").read_text()
        body = source[source.index("class Config"):source.index("def __post_init__")]
        names = [n.target.id for n in ast.parse(body).body[0].body if isinstance(n, ast.AnnAssign)]
        assert set(names) == set(configurator.field_comments(body)), script
