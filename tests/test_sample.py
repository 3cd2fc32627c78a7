"""sample.py as a person runs it: a tiny checkpoint, the printed text, the errors."""

import json
import re
from pathlib import Path

import pytest
import torch

import configurator
import sample
from checkpoint import find
from configurator import UserError
from engine import Sample
from model import ModelConfig
from mtp import build
from tokenizer import Tokenizer


def write_checkpoint(folder: Path, chat: bool, n_mtp: int = 2) -> Path:
    """The layout of checkpoint.py, unsigned parts left out: weights, shape, tokenizer, manifest with meta."""
    from dataclasses import asdict

    from safetensors.torch import save_file

    cfg = ModelConfig(
        vocab_size=1024,
        n_layer=1,
        d_model=32,
        n_head=2,
        n_kv_head=1,
        head_dim=16,
        d_ff=64,
        n_mtp=n_mtp,
        max_seq_len=128,
    )
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
    (folder / "manifest.json").write_text(
        json.dumps({"step": 1, "commit": "", "meta": {"chat": chat}, "files": {}})
    )
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["base", "chat"])
def ckpt(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "model", request.param), request.param


def run(*argv: str) -> None:
    with torch.no_grad():
        sample.main(configurator.load(sample.Config, list(argv)))


def test_prompt_plain_and_speculative_are_the_same_text(ckpt, capsys):
    path, _ = ckpt
    texts = []
    for extra in ((), ("--mtp",), ("--mtp", "--n_draft=1")):
        run(f"--ckpt={path}", "--prompt=3 + 4 =", "--max_new_tokens=20", *extra)
        out, err = capsys.readouterr()
        texts.append(out)
        assert "tokens/s" in err and ("tokens per forward" in err) == bool(extra)
        assert "\x1b" not in out  # not a terminal: no colours
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 5


def test_colours_follow_the_layers_that_were_right(ckpt, capsys, monkeypatch):
    """A round that keeps two drafts and draws a third token: green, cyan, plain. NO_COLOR turns it off."""
    path, _ = ckpt
    tokenizer = Tokenizer.load(find(path))
    ids = tokenizer.encode("a b c")
    request = sample.Request(0, [1], 9)

    class Engine:
        n_draft, decoding, steps, rows = 2, (), 0, 0

        def add(self, request): ...

        def step(self):
            return [Sample(0, [1], ids[:3], [0.0] * 3, "length", (1, 1), (1, 1))]

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    sample.stream(Engine(), request, tokenizer)
    out = capsys.readouterr().out
    pieces = [tokenizer.decode([i]) for i in ids[:3]]
    assert out == f"\x1b[32m{pieces[0]}\x1b[0m\x1b[36m{pieces[1]}\x1b[0m{pieces[2]}\n"
    monkeypatch.setenv("NO_COLOR", "1")
    sample.stream(Engine(), request, tokenizer)
    assert capsys.readouterr().out == "".join(pieces) + "\n"


def test_file_in_file_out(ckpt, tmp_path, capsys):
    path, chat = ckpt
    rows = [{"prompt": "one", "key": 7}, {"messages": [{"role": "user", "content": "two"}]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    run(
        f"--ckpt={path}",
        f"--file={tmp_path}/in.jsonl",
        f"--out={tmp_path}/new/out.jsonl",
        "--n=3",
        "--max_new_tokens=8",
        "--mtp",
    )
    got = [json.loads(line) for line in (tmp_path / "new/out.jsonl").read_text().splitlines()]
    assert [g["answers"] and len(g["answers"]) for g in got] == [3, 3] and got[0]["key"] == 7
    assert len(set(got[0]["answers"])) > 1  # each answer has a seed of its own
    run(f"--ckpt={path}", f"--file={tmp_path}/in.jsonl", "--n=3", "--max_new_tokens=8", "--slots=1")
    # to stdout, one slot, no MTP
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == got


def test_compare_prints_the_ratio_last(ckpt, capsys):
    path, _ = ckpt
    run(f"--ckpt={path}", "--prompt=abc", "--max_new_tokens=10", "--compare")
    out, err = capsys.readouterr()
    assert re.search(r"^speculative / plain = \d+\.\d\dx$", out.splitlines()[-1])
    assert "same text: 1 of 1" in err and err.count("tokens/s") == 2


def test_chat_keeps_the_history_and_drops_the_oldest_turns(ckpt, capsys, monkeypatch):
    """A chat model sees all turns; with little room the first pair goes. A base model sees the line."""
    path, chat = ckpt
    lines = iter(["first question", "second", "third", ""])
    seen = []
    monkeypatch.setattr("builtins.input", lambda _="": next(lines))
    real = sample.prompt_tokens
    monkeypatch.setattr(sample, "prompt_tokens", lambda row, *a: seen.append(row) or real(row, *a))
    run(f"--ckpt={path}", "--max_new_tokens=16", "--max_len=72")
    last = seen[-1]
    if chat:
        assert [m["role"] for m in seen[0]["messages"]] == ["user"]
        talk = [[m["content"] for m in row["messages"] if m["role"] == "user"] for row in seen]
        assert ["first question", "second"] in talk                 # it remembers
        assert talk[-1][-1] == "third" and "first question" not in talk[-1]     # and drops the oldest pair
    else:
        assert last == {"prompt": "third"}


def test_prompts_take_the_checkpoints_form(ckpt):
    path, chat = ckpt
    tokenizer = Tokenizer.load(find(path))
    ids = sample.prompt_tokens({"prompt": "hi"}, tokenizer, chat, "be brief" if chat else "")
    text = tokenizer.decode(ids)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        if chat
        else "hi"
    )


def test_pieces_hold_back_half_characters():
    tokenizer = Tokenizer.load("tiny")
    ids = tokenizer.encode("a\u00e9\u4e2d\U0001f600b")
    pieces = sample.Pieces(tokenizer)
    parts = [pieces.add(i) for i in ids]
    assert "".join(parts) + pieces.rest() == "a\u00e9\u4e2d\U0001f600b" and not any(
        "\ufffd" in p for p in parts
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--prompt=a", "--file=b"], "one of the two"),
        (["--compare"], "compare needs"),
        (["--n=0"], "at least 1"),
        (["--ckpt=/nowhere/at/all"], "no such folder"),
        (["--mtpp"], "did you mean mtp"),
    ],
)
def test_mistakes_end_in_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        run(*argv)


def test_no_checkpoint_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make demo"):
        run("--prompt=a")


def test_bad_files_name_the_line(ckpt, tmp_path):
    path, _ = ckpt
    for text, words in (
        ('{"prompt": "a"}\n{"prompt"', "in.jsonl:2: not JSON"),
        ('{"promt": "a"}', "in.jsonl:1: .*should have"),
        ('{"prompt": "' + "long " * 400 + '"}', "prompt 1 has"),
    ):
        (tmp_path / "in.jsonl").write_text(text)
        with pytest.raises(UserError, match=words):
            run(f"--ckpt={path}", f"--file={tmp_path}/in.jsonl")
    bare = write_checkpoint(tmp_path / "bare", chat=False, n_mtp=0)
    with pytest.raises(UserError, match="no MTP layers"):
        run(f"--ckpt={bare}", "--prompt=a", "--mtp")
