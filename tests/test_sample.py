"""sample.py as a person runs it: a tiny checkpoint, the printed text, the errors."""
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import configurator
import sample
from checkpoint import find
from configurator import UserError
from data.jsonl import write_jsonl
from engine import Sample
from kernels.cpu.decode import CpuForward
from model import ModelConfig
from mtp import build
from runner import TorchRunner
from tokenizer import Tokenizer


def write_checkpoint(folder: Path, n_mtp: int = 2, **meta) -> Path:
    """The layout of checkpoint.py: weights, shape, tokenizer, manifest with meta."""
    cfg = ModelConfig(vocab_size=1024, n_layer=1, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=64, n_mtp=n_mtp,
                      max_seq_len=128)
    model = build(cfg)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(10)
    folder.mkdir(parents=True)
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(asdict(cfg)))
    Tokenizer.load("tiny").save(folder)
    (folder / "manifest.json").write_text(json.dumps({"step": 1, "commit": "", "meta": meta,
                                                          "files": checkpoint.fingerprints(folder, 0, 1)}))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["base", "chat"])
def ckpt(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "model", chat=request.param), request.param


def run(*argv: str) -> None:
    sample.main(configurator.load(sample.Config, list(argv)))


def type_in(monkeypatch, *lines: str) -> list[dict]:
    """What the person types, then an empty line. -> the rows that talk() asks, as they come."""
    typed, rows, real = iter([*lines, ""]), [], sample.prompt_tokens
    monkeypatch.setattr("builtins.input", lambda _="": next(typed))
    monkeypatch.setattr(sample, "prompt_tokens", lambda row, *a: rows.append(row) or real(row, *a))
    return rows


# ---- answers --------------------------------------------------------------------------------------------------------

def test_prompt_plain_and_speculative_are_the_same_text(ckpt, capsys):
    path, _ = ckpt
    texts = []
    for extra in ((), ("--mtp",), ("--mtp", "--n_draft=1")):
        run(f"--ckpt={path}", "--prompt=3 + 4 =", "--max_new_tokens=20", *extra)
        out, err = capsys.readouterr()
        texts.append(out)
        assert "tokens/s" in err and ("tokens per forward" in err) == bool(extra)
        assert "\x1b" not in out                                    # not a terminal: no colours
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 5


class OneRound:
    """An engine that ends its request in one step: two accepted drafts and a third token."""
    n_draft, decoding, steps, sequence_steps = 2, (), 0, 0

    def __init__(self, ids: list[int]):
        self.ids = ids

    def add(self, request): ...

    def step(self):
        return [Sample(0, [1], self.ids, [0.0] * 3, "length", (1, 1), (1, 1))]


def test_colours_and_marks_follow_the_layers_that_were_accepted(ckpt, capsys, monkeypatch):
    """Green, cyan, then no colour. NO_COLOR turns it off; --mark writes the number of the layer, with or without."""
    path, _ = ckpt
    tokenizer = Tokenizer.load(find(path))
    ids = tokenizer.encode("a b c")[:3]
    request, pieces = sample.Request(0, [1], 9), [tokenizer.decode([i]) for i in ids]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    sample.stream(OneRound(ids), request, tokenizer)
    assert capsys.readouterr().out == f"\x1b[32m{pieces[0]}\x1b[0m\x1b[36m{pieces[1]}\x1b[0m{pieces[2]}\n"
    marked = f"‹{pieces[0]}›¹‹{pieces[1]}›²{pieces[2]}\n"
    sample.stream(OneRound(ids), request, tokenizer, mark=True)
    assert capsys.readouterr().out == marked
    monkeypatch.setenv("NO_COLOR", "1")
    sample.stream(OneRound(ids), request, tokenizer)
    assert capsys.readouterr().out == "".join(pieces) + "\n"
    sample.stream(OneRound(ids), request, tokenizer, mark=True)
    assert capsys.readouterr().out == marked


def test_marks_keep_lines(capsys):
    """A draft that is a line break is drawn inside its mark, and the line still breaks: the marks can be taken away."""
    tokenizer = Tokenizer.load("tiny")
    ids = tokenizer.encode("a\nb")
    assert len(ids) == 3
    sample.stream(OneRound(ids), sample.Request(0, [1], 9), tokenizer, mark=True)
    marked = capsys.readouterr().out
    assert marked == "‹a›¹‹↵›²\nb\n" and re.sub("‹|›[¹²]|↵", "", marked) == "a\nb\n"


def test_file_in_file_out(ckpt, tmp_path, capsys):
    path, chat = ckpt
    rows = [{"prompt": "one", "key": 7}, {"messages": [{"role": "user", "content": "two"}]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    run(f"--ckpt={path}", f"--file={tmp_path}/in.jsonl", f"--out={tmp_path}/new/out.jsonl", "--n=3",
        "--max_new_tokens=8", "--mtp")
    got = [json.loads(line) for line in (tmp_path / "new/out.jsonl").read_text().splitlines()]
    assert [g["answers"] and len(g["answers"]) for g in got] == [3, 3] and got[0]["key"] == 7
    assert len(set(got[0]["answers"])) > 1                          # each answer has a seed of its own
    run(f"--ckpt={path}", f"--file={tmp_path}/in.jsonl", "--n=3", "--max_new_tokens=8", "--slots=1")
    # to stdout, one slot, no MTP
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == got


def test_compare_prints_the_ratio_last(ckpt, capsys):
    path, _ = ckpt
    run(f"--ckpt={path}", "--prompt=abc", "--max_new_tokens=10", "--compare")
    out, err = capsys.readouterr()
    assert re.search(r"^speculative / plain = \d+\.\d\dx$", out.splitlines()[-1])
    assert "same text: 1 of 1" in err and err.count("tokens/s") == 2


def test_the_token_that_stops_an_answer_is_not_shown(capsys):
    tokenizer = Tokenizer.load("tiny")
    ids = tokenizer.encode("a b c")[:3]
    sample.stream(OneRound(ids), sample.Request(0, [1], 9, stop=(ids[2],)), tokenizer)
    assert capsys.readouterr().out == tokenizer.decode(ids[:2]) + "\n"
    stopped = Sample(0, [1], ids, [0.0] * 3, "stop")
    assert sample.answer_text(stopped, tokenizer) == tokenizer.decode(ids[:2])


def test_half_characters_are_held_back():
    tokenizer = Tokenizer.load("tiny")
    ids = tokenizer.encode("a\u00e9\u4e2d\U0001f600b")
    decoder = sample.StreamingDecoder(tokenizer)
    parts = [decoder.add(i) for i in ids]
    assert "".join(parts) + decoder.rest() == "a\u00e9\u4e2d\U0001f600b" and not any("\ufffd" in p for p in parts)


def test_plain_runs_torch_code_only(ckpt, monkeypatch, capsys):
    """A breakpoint in reference.rmsnorm or TorchRunner.trunk is hit, C is not called; the text is the same."""
    path, _ = ckpt
    import kernels
    import kernels.reference
    hit = {"rmsnorm": 0, "trunk": 0, "c": 0}

    def counted(name, real):
        def function(*args, **options):
            hit[name] += 1
            return real(*args, **options)
        return function
    monkeypatch.setattr(kernels.reference, "rmsnorm", counted("rmsnorm", kernels.reference.rmsnorm))
    monkeypatch.setattr(TorchRunner, "trunk", counted("trunk", TorchRunner.trunk))
    monkeypatch.setattr(CpuForward, "__init__", counted("c", CpuForward.__init__))
    words = f"--ckpt={path}", "--prompt=3 + 4 =", "--max_new_tokens=5", "--mtp", "--temperature=0"
    run(*words)
    text = capsys.readouterr().out
    if os.environ.get("CC") != "none":
        assert hit["c"] == 1 and hit["trunk"] == 0
    hit |= dict.fromkeys(hit, 0)
    try:
        run(*words, "--plain")
    finally:
        kernels.set_plain(False)
    assert hit["rmsnorm"] > 5 and hit["trunk"] > 2 and hit["c"] == 0
    assert capsys.readouterr().out == text


# ---- which model, and how it is asked -------------------------------------------------------------------------------

def test_without_ckpt_the_best_chat_model_is_taken(tmp_path, monkeypatch, capsys):
    """RL before SFT before imports before base models, the newest of equals; a broken one is passed over."""
    runs = [("rl_zero", dict(stage="rl", chat=False)), ("base", dict(stage="base", chat=False)),
            ("qwen", dict(stage="import", chat=True)), ("sft", dict(stage="sft", chat=True)),
            ("old", dict(stage="rl", chat=True)), ("new", dict(stage="rl", chat=True))]
    monkeypatch.chdir(tmp_path)
    for age, (name, meta) in zip((1, 2, 3, 0, 5, 4), runs, strict=True):       # the SFT model is the newest of all
        write_checkpoint(Path("out") / name / "step_00000001", **meta)
        (Path("out") / name / "latest").write_text("step_00000001\n")
        os.utime(Path("out") / name / "latest", (1e9 - age, 1e9 - age))
    for name, why in (("new", "newest RL chat model"), ("old", "newest RL chat model"),
                      ("sft", "newest SFT chat model"), ("qwen", "newest chat model"),
                      ("rl_zero", "newest base model (there is no chat model)"), ("base", "newest base model")):
        assert sample.best_checkpoint("out") == Path("out") / name / "step_00000001"
        err = capsys.readouterr().err
        assert f"out/{name}: the {why}" in err and "--ckpt=DIR takes another" in err
        (Path("out") / name / "step_00000001/manifest.json").write_text("{")    # the next best, please
    with pytest.raises(UserError, match="no checkpoint in out/.* can be used: .*manifest.json is not readable"):
        sample.best_checkpoint("out")


@pytest.mark.parametrize("meta, raw, form", [
    (dict(chat=True, stage="sft"), False, "chat"), (dict(chat=True, stage="sft"), True, "text"),
    (dict(chat=False, stage="base"), False, "problem"), (dict(chat=False, stage="rl"), False, "problem"),
    (dict(chat=False, stage="base"), True, "text"), (dict(chat=False, stage="import"), False, "text"),
    ({}, False, "text")])
def test_the_form_of_a_prompt(meta, raw, form):
    assert sample.form_of(meta, raw) == form


def test_prompts_take_the_form_of_the_model():
    tokenizer = Tokenizer.load("tiny")

    def text(prompt: str, form: str, tokenizer: Tokenizer = tokenizer) -> str:
        return tokenizer.decode(sample.prompt_tokens({"prompt": prompt}, tokenizer, form))
    assert text("hi", "chat") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for system in ("be brief", ""):                                  # "" is an empty turn, as MiMo's README advises
        assert text("hi", "chat", tokenizer.with_system(system)) == \
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text("hi", "text") == "hi"
    assert text("What is 1+1?", "problem") == "Problem: What is 1+1?\nSolution:"
    assert text("Problem: 3 + 4 =", "problem") == "Problem: 3 + 4 ="            # has the form already


def test_a_base_model_stops_before_the_next_problem_of_the_page():
    tokenizer = Tokenizer.load("tiny")
    cfg = configurator.load(sample.Config, [])
    request, = sample.make_requests([{"prompt": "1+1"}], tokenizer, "problem", cfg, 100)
    assert tokenizer.encode("Problem:")[0] in request.stop
    request, = sample.make_requests([{"prompt": "1+1"}], tokenizer, "text", cfg, 100)
    assert request.stop == (tokenizer.eos_id, tokenizer.im_end_id)


# ---- talking --------------------------------------------------------------------------------------------------------

def test_chat_keeps_the_history_and_drops_the_oldest_turns(ckpt, capsys, monkeypatch):
    """A chat model sees all turns; with little room the first pair goes. A base model sees the line."""
    path, chat = ckpt
    rows = type_in(monkeypatch, "first question", "second", "third")
    run(f"--ckpt={path}", "--max_new_tokens=16", "--max_len=72")
    questions = [[m["content"] for m in row["messages"] if m["role"] == "user"] for row in rows]
    if chat:
        assert [m["role"] for m in rows[0]["messages"]] == ["user"]
        assert ["first question", "second"] in questions            # it remembers
        assert questions[-1][-1] == "third" and "first question" not in questions[-1]       # and drops the oldest pair
        assert "sees the whole conversation" in capsys.readouterr().err
    else:
        assert rows[-1]["messages"] == [{"role": "user", "content": "third"}]


@pytest.mark.parametrize("meta, single", [
    (dict(stage="rl"), True), (dict(stage="sft"), True), (dict(stage="import"), False),
    (dict(stage="sft", turns="multi"), False), (dict(stage="import", turns="single"), True)])
def test_a_model_of_single_questions_gets_single_questions(tmp_path, meta, single, capsys, monkeypatch):
    path = write_checkpoint(tmp_path / "run", chat=True, **meta)
    rows = type_in(monkeypatch, "first", "second")
    run(f"--ckpt={path}", "--max_new_tokens=8")
    questions = [[m["content"] for m in row["messages"] if m["role"] == "user"] for row in rows]
    assert questions[-1] == (["second"] if single else ["first", "second"])
    assert ("each line is a new question" in capsys.readouterr().err) == single


def test_the_screen_shows_held_out_questions(tmp_path, capsys, monkeypatch):
    examples = ["What is 1+1?", "What is 2+2?", "What is 3+3?"]
    with_ = write_checkpoint(tmp_path / "with", chat=True, stage="rl", examples=examples)
    without = write_checkpoint(tmp_path / "without", chat=True, stage="rl")
    for path in (with_, without):
        type_in(monkeypatch)
        run(f"--ckpt={path}")
        err = capsys.readouterr().err
        assert ("held-out" in err) == all(question in err for question in examples) == (path == with_)


def test_the_screen_shows_questions_that_the_model_has_answered_right(tmp_path):
    """An evaluation beside the checkpoint decides: only what every sample of it got right is suggested."""
    rows = [{"question": f"What is {n}+{n}?", "answers": [{"passed": n > 3}, {"passed": n != 5}]} for n in range(8)]
    write_jsonl(tmp_path / "run/eval_answers.jsonl", rows)
    heading, questions = sample.suggestions({"examples": ["other"]}, tmp_path / "run/step_00000001")
    assert "answered right" in heading and questions == ["What is 4+4?", "What is 6+6?"]
    assert sample.suggestions({"examples": ["other"]}, tmp_path / "none/step_00000001")[1] == ["other"]


def test_speculation_is_counted_over_the_whole_chat(ckpt, capsys, monkeypatch):
    path, _ = ckpt
    type_in(monkeypatch, "one", "two", "three")
    run(f"--ckpt={path}", "--max_new_tokens=12", "--mtp")
    lines = re.findall(r"^\[(\d+) tokens, .*; so far: (\d) answers?, (\d+) tokens, (\d\.\d\d) tokens per forward, "
                       r"drafts accepted \d+% (?:\d+%|-)\]$", capsys.readouterr().err, re.MULTILINE)
    assert [int(line[1]) for line in lines] == [1, 2, 3]
    assert [int(line[2]) for line in lines] == [sum(int(x[0]) for x in lines[:i + 1]) for i in range(3)]
    assert all(1 <= float(line[3]) <= 3 for line in lines)
    type_in(monkeypatch, "one")
    run(f"--ckpt={path}", "--max_new_tokens=12")
    assert "so far" not in capsys.readouterr().err


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, words", [
    (["--prompt=a", "--file=b"], "one of the two"), (["--compare"], "compare needs"), (["--n=0"], "at least 1"),
    (["--mark"], "mark goes with mtp"), (["--ckpt=/nowhere/at/all"], "no such folder"),
    (["--mtpp"], "did you mean mtp")])
def test_mistakes_are_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        run(*argv)


def test_no_checkpoint_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make demo"):
        run("--prompt=a")


def test_bad_files_name_the_line(ckpt, tmp_path):
    path, _ = ckpt
    for text, words in (('{"prompt": "a"}\n{"prompt"', "in.jsonl:2: not JSON"),
                        ('{"promt": "a"}', "in.jsonl:1: .*should have"),
                        ('{"prompt": "' + "long " * 400 + '"}', "prompt 1 has")):
        (tmp_path / "in.jsonl").write_text(text)
        with pytest.raises(UserError, match=words):
            run(f"--ckpt={path}", f"--file={tmp_path}/in.jsonl")
    bare = write_checkpoint(tmp_path / "bare", chat=False, n_mtp=0)
    with pytest.raises(UserError, match="no MTP layers"):
        run(f"--ckpt={bare}", "--prompt=a", "--mtp")
