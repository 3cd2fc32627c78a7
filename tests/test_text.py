"""Text at the borders: what comes in is whole, what goes to a terminal is shown, what goes to a file is kept."""
import io
import json
import random
import sys
from dataclasses import dataclass

import pytest
from test_sample import OneRound, run, write_checkpoint

import checkpoint
import configurator
import sample
from configurator import UserError
from data.answers import Answers
from data.jsonl import json_line, read_jsonl, write_jsonl
from data.sft_data import read_samples
from data.text import shown, typed, whole
from engine import Engine
from tokenizer import Tokenizer

TINY = Tokenizer.load("tiny")
ODD = ["\ud83d", "a\ude00b", "\ud83d\ude00", "\ufeffx", "a\r\nb", "\x00", "\x1b[31m", "\u2028\u2029\x85\x0b\x0c",
       "\udcff", "中文"]


# ---- in -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, right", [
    ("\ud83d", "\ufffd"), ("a\ude00b", "a\ufffdb"), ("\ud83d\ude00", "\U0001f600"), ("\ude00\ud83d", "\ufffd\ufffd"),
    ("\udcff", "\ufffd"), ("\x00\x1b\r\n\u2028\ufeff", "\x00\x1b\r\n\u2028\ufeff"), ("", ""), ("中", "中")])
def test_whole(text, right):
    """Halves become U+FFFD, halves that meet their other half one character, everything else is kept."""
    assert whole(text) == right
    assert TINY.decode(TINY.encode(text)) == TINY.decode(TINY.encode(right))          # the tokenizer's policy


@pytest.mark.parametrize("text, right", [
    ("hi\r", "hi"), ("\ufeffhi\r\n", "hi"), ("h\udcfci", "h\ufffdi"), ("a\x00b", "a\x00b"), ("a\u2028b", "a\u2028b"),
    ("  a ", "  a ")])
def test_typed(text, right):
    assert typed(text) == right


def test_files_of_lines_keep_their_rows(tmp_path):
    """BOM and CRLF as Windows writes them; separators that str.splitlines() would cut at; half pairs; NUL."""
    rows = [{"t": text} for text in ODD]
    written = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows) + b"\r\n"
    (tmp_path / "a.jsonl").write_bytes(written)
    want = [{"t": whole(text)} for text in ODD]
    assert [row for _, row in read_jsonl(tmp_path / "a.jsonl")] == want
    write_jsonl(tmp_path / "b.jsonl", rows)                                            # written as they are: no crash
    assert [row for _, row in read_jsonl(tmp_path / "b.jsonl")] == want
    assert [n for n, _ in read_jsonl(tmp_path / "b.jsonl")] == list(range(1, len(ODD) + 1))


def test_a_score_that_is_no_number_names_its_line(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for score in ("NaN", "Infinity", "-Infinity", "1e999"):
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, "score": 1})
                                          + f'\n{{"messages": {json.dumps(turns)}, "score": {score}}}\n')
        with pytest.raises(UserError, match="a.jsonl:2: score = .* finite number"):
            read_samples(tmp_path / "a.jsonl")


# ---- out: terminals -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, right", [
    ("a\x1b[2Jb", r"a\x1b[2Jb"), ("\x1b]52;c;aGk=\x07", r"\x1b]52;c;aGk=\x07"), ("\x9b31m", r"\x9b31m"),
    ("a\rb", r"a\rb"),
    ("\x08\x00\x7f", r"\x08\x00\x7f"), ("\u202eabc\u2066", r"\u202eabc\u2066"), ("\ud83d", r"\ud83d"),
    ("a\tb\nc", "a\tb\nc"), ("\x0b\x0c\x0e\x0f", r"\x0b\x0c\x0e\x0f"),
    ("é中\U0001f468\u200d\U0001f469 \u200c", "é中\U0001f468\u200d\U0001f469 \u200c")])
def test_shown(text, right):
    """Control characters by name; letters, emoji and their joiners as they are."""
    assert shown(text) == right and shown(right) == right
    assert shown("a\nb", lines=False) == r"a\nb"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, escape", [(Terminal, r"\x1b"), (io.StringIO, "\x1b")])
def test_a_models_escape_sequences(stream, escape, monkeypatch):
    """On a terminal they are shown, also inside of the colours of drafts; a pipe gets the text as it is."""
    ids = TINY.encode("a\x1b[")
    assert len(ids) == 3
    for mark in (False, True):
        monkeypatch.setattr(sys, "stdout", out := stream())
        sample.stream(OneRound(ids), sample.Request(0, [1], 9), TINY, mark=mark)
        text = out.getvalue()
        assert escape in text and (r"\x1b" in text) == (stream is Terminal)
        for colour in ("\x1b[32m", "\x1b[36m", "\x1b[0m"):                             # our own
            text = text.replace(colour, "")
        assert ("\x1b" in text) == (stream is io.StringIO)


@dataclass(frozen=True)
class Config:
    word: str = ""                        # [ours]


@pytest.mark.parametrize("encoding, right", [
    ("ascii", rb"\ufffd \xe9 \u4e2d \U0001f600"), ("cp1252", b"\\ufffd \xe9 \\u4e2d \\U0001f600"),
    ("utf-8", "\ufffd é 中 \U0001f600".encode())])
def test_no_output_ends_a_run(monkeypatch, encoding, right):
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    configurator.run(lambda cfg: print("\ufffd é 中 \U0001f600"), Config)
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == right + b"\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_typed_byte_ends_a_run(monkeypatch, encoding):
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gr\xfc\xffe\r\nnext\n"), encoding, errors="strict",
                                                       newline="\n"))
    got = []
    configurator.run(lambda cfg: got.extend([typed(input()), typed(input())]), Config)
    assert got == ["gr\ufffd\ufffde", "next"]


@pytest.mark.parametrize("error", [UserError("a\x1b]0;owned\x07b\nc"),
                                   FileNotFoundError(2, "No such file", "a\x1b]0;owned\x07b\nc")])
def test_an_error_that_quotes_foreign_text_stays_a_line(error):
    with pytest.raises(SystemExit) as e, configurator.one_line():
        raise error
    assert r"a\x1b]0;owned\x07b\nc" in e.value.code and e.value.code.isprintable()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_on_stdout_is_json_in_every_encoding(monkeypatch, encoding):
    row = {"answers": ["é中\U0001f600\x1b\x9b\u2028"]}
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace"))
    sample.print_row(row)
    assert json.loads(sys.stdout.buffer.getvalue().decode(encoding)) == row


def test_streamed_text_is_decode(monkeypatch):
    """Random tokens, broken bytes and control tokens among them: the pieces together are decode() of all."""
    rng, control = random.Random(0), [TINY.eos_id, TINY.im_end_id]
    high = TINY.encode("中é\U0001f600")
    for _ in range(300):
        ids = [rng.choice([*high, *range(256), *control, rng.randrange(TINY.n_ids)]) for _ in range(rng.randrange(30))]
        decoder = sample.StreamingDecoder(TINY)
        pieces = "".join(decoder.add(i) for i in ids) + decoder.rest()
        assert pieces == TINY.decode(ids, skip_control=True)


# ---- out: answers are kept as they come ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "model", chat=True)


def words(ckpt, folder, out, *more):
    return [f"--ckpt={ckpt}", f"--file={folder}/in.jsonl", f"--out={folder}/{out}", "--n=2", "--max_new_tokens=8",
            "--slots=3", *more]


def test_answers_survive_a_crash_and_the_same_command_goes_on(ckpt, tmp_path, monkeypatch, capsys):
    """Eight prompts, half pairs in them. Power goes after some: they are kept, only the others are asked again."""
    rows = [json.dumps({"prompt": f"{i} \ud83d", "k\ud83d": i}) for i in range(8)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    run(*words(ckpt, tmp_path, "whole.jsonl"))
    want = (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line)["k\ufffd"] for line in want.splitlines()] == list(range(8))
    step, n = Engine.step, iter(range(1000))

    def dies(self):
        if next(n) >= 12:
            raise MemoryError
        return step(self)
    with monkeypatch.context() as m, pytest.raises(MemoryError):
        m.setattr(Engine, "step", dies)
        run(*words(ckpt, tmp_path, "a.jsonl"))
    part = tmp_path / "a.jsonl.part0"
    kept = part.read_bytes().count(b"\n")
    assert 1 <= kept < 8 and not (tmp_path / "a.jsonl").exists()
    part.write_bytes(part.read_bytes() + b'[7, {"prompt": "tor')                       # a row that was not written out
    for other, named in (("--temperature=0.7", "temperature = 0.6, now it is 0.7"), ("--seed=3", "seed = 0"),
                         ("--max_new_tokens=9", "max_new_tokens = 8")):
        with pytest.raises(UserError, match=named):
            run(*words(ckpt, tmp_path, "a.jsonl", other))
    asked = []
    monkeypatch.setattr(Engine, "add", lambda self, r, real=Engine.add: (asked.append(r.id), real(self, r)))
    run(*words(ckpt, tmp_path, "a.jsonl", "--slots=2", "--mtp"))                       # neither changes an answer
    assert (tmp_path / "a.jsonl").read_bytes() == want and len(asked) == 2 * (8 - kept)
    assert f"{kept} of 8 prompts were answered before" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "in.jsonl", "whole.jsonl"]


def test_another_run_writes_the_same_answers(tmp_path):
    from test_lock import forged
    forged(tmp_path / "a.jsonl.lock")
    with pytest.raises(UserError, match="a.jsonl.lock: held by pid"):
        Answers(tmp_path / "a.jsonl", {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl.lock"]


def test_rows_go_to_stdout_in_order_as_they_are_complete(ckpt, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_bytes(b"".join(json_line({"prompt": f"{i}"}) for i in range(5)))
    printed, steps = [], []
    monkeypatch.setattr(Engine, "step", lambda self, real=Engine.step: (steps.append(len(printed)), real(self))[1])
    monkeypatch.setattr(sample, "print_row", printed.append)
    run(f"--ckpt={ckpt}", f"--file={tmp_path}/in.jsonl", "--max_new_tokens=8", "--slots=1")
    assert [row["prompt"] for row in printed] == list("01234")
    assert len(set(steps)) >= 4                                                        # not all at the end


# ---- a chat ---------------------------------------------------------------------------------------------------------

def test_ctrl_c_takes_the_question_back(ckpt, monkeypatch, capsys):
    """Questions and answers go on by turns, and a conversation that is cut to fit never begins with an answer."""
    lines, rows = iter(["one", "two", "three \udcff\r", "four", "five", ""]), []
    monkeypatch.setattr("builtins.input", lambda _="": next(lines))
    monkeypatch.setattr(sample, "prompt_tokens",
                        lambda row, *a, real=sample.prompt_tokens: rows.append(row) or real(row, *a))
    answered = sample.stream

    def stream(engine, request, *more):
        if request.id in (0, 2):
            engine.add(request)
            raise KeyboardInterrupt
        return answered(engine, request, *more)
    monkeypatch.setattr(sample, "stream", stream)
    run(f"--ckpt={ckpt}", "--max_new_tokens=8", "--max_len=60")
    for row in rows:
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    asked = [m["content"] for m in rows[-1]["messages"] if m["role"] == "user"]
    assert asked[-1] == "five" and not {"one", "three \ufffd"} & set(asked)
    assert any(m["content"] == "three \ufffd" for row in rows for m in row["messages"])


# ---- mistakes -------------------------------------------------------------------------------------------------------

def test_drafts_without_mtp_are_not_ignored(ckpt, tmp_path):
    for flag in ("--n_draft=1", "--draft_ids=100", "--mark"):
        with pytest.raises(UserError, match=f"{flag[2:].split('=')[0]} goes with mtp"):
            run(f"--ckpt={ckpt}", "--prompt=a", flag)
    with pytest.raises(UserError, match="n_draft = 3 should be 0 to 2"):
        run(f"--ckpt={ckpt}", "--prompt=a", "--mtp", "--n_draft=3")
    with pytest.raises(UserError, match="should fit the cache"):
        run(f"--ckpt={ckpt}", "--prompt=a", "--kv_tokens=10")


def test_a_tokenizer_that_is_too_large_or_damaged_is_one_line(ckpt, tmp_path):
    import shutil
    shutil.copytree(ckpt, tmp_path / "m")
    shape = json.loads((tmp_path / "m/model.json").read_text())
    tokenizer = json.loads((tmp_path / "m/tokenizer.json").read_text())
    config = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    for name, value in (("tokenizer.json", "\xff"), ("tokenizer_config.json", "["), ("tokenizer_config.json", "[]")):
        old = (tmp_path / "m" / name).read_bytes()
        (tmp_path / "m" / name).write_bytes(value.encode("latin-1"))
        with pytest.raises(UserError, match="tokenizer"):
            run(f"--ckpt={tmp_path}/m", "--prompt=a")
        (tmp_path / "m" / name).write_bytes(old)
    extra = dict(tokenizer["added_tokens"][0], id=1500, content="<|more|>")
    tokenizer["added_tokens"].append(extra)
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(tokenizer))
    config["added_tokens_decoder"]["1500"] = {k: extra[k] for k in extra if k != "id"}
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(config | {"padded_vocab_size": 1536}))
    assert shape["vocab_size"] == 1024
    manifest = json.loads((tmp_path / "m/manifest.json").read_text())
    files = {name: found for name, found in checkpoint.fingerprints(tmp_path / "m", 0, 1).items()
             if name != "manifest.json"}
    (tmp_path / "m/manifest.json").write_text(json.dumps(manifest | {"files": files}))
    with pytest.raises(UserError, match="its tokenizer has 1,501 ids, its model rows for 1,024"):
        run(f"--ckpt={tmp_path}/m", "--prompt=a")
