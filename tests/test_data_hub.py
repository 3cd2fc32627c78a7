"""Each adapter on a few hand-made rows with the columns of its dataset card; hostile pickles; the command."""
import base64
import gzip
import json
import pickle
import sys
import zlib
from collections import Counter

import pytest

import configurator
from configurator import UserError
from data import adapters, hub, train_bpe
from data.jsonl import whole_file
from data.problems import Problem, read_problems, write_problems
from data.readers import Bad, read_rows
from tokenizer import TINY, Tokenizer


def write(path, rows):
    """Rows as JSONL, compressed where the name ends in .gz. -> path"""
    data = "\n".join(json.dumps(r) for r in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def made(adapter, rows, tmp_path=None, columns="", counts=None):
    """The adapter's items, through a real file where a folder is given; ValueError for the first bad row."""
    counts = Counter() if counts is None else counts
    if tmp_path is not None:
        places = read_rows(write(tmp_path / "rows.jsonl", rows))
    else:
        places = enumerate(rows, 1)
    items = []
    for n, item in adapters.convert(adapter, places, counts, columns):
        if isinstance(item, Bad):
            raise ValueError(f"row {n}: {item.why}")
        items.append(item)
    return items


# ---- files ----------------------------------------------------------------------------------------------------------

def test_a_file_appears_when_it_is_complete(tmp_path):
    """Until the with-block ends there is the old file; after an exception too, and no temporary one beside it."""
    path = tmp_path / "deep" / "a.txt"
    with whole_file(path) as f:
        f.write("old é")
        assert not path.exists()
    assert path.read_bytes() == "old é".encode()
    with pytest.raises(KeyboardInterrupt):
        with whole_file(path, "wb") as f:
            f.write(b"new")
            assert path.read_bytes() == "old é".encode()
            raise KeyboardInterrupt
    assert path.read_bytes() == "old é".encode() and list(path.parent.iterdir()) == [path]


# ---- documents ------------------------------------------------------------------------------------------------------

def test_documents(tmp_path):
    fineweb = {"text": "Hello", "id": "<urn:1>", "url": "http://a.org", "dump": "CC", "score": 3.2, "int_score": 3}
    stack = {"content": "print(1)", "lang": "Python", "size": 8, "path": "a.py"}
    page = {"html": "<p>hi</p>", "url": "http://b.org"}
    got = made("text", [fineweb, stack, page, {"text": ""}], tmp_path)
    assert [(r.url, r.text, r.html) for r in got] == [("http://a.org", "Hello", ""), ("a.py", "print(1)", ""),
                                                      ("http://b.org", "", "<p>hi</p>")]
    with pytest.raises(ValueError, match="row 1: adapter text: row needs text, html or content; columns: body"):
        made("text", [{"body": "x"}])
    with pytest.raises(ValueError, match="text should be text, is list"):
        made("fineweb_edu", [{"text": ["a"]}])


# ---- conversations --------------------------------------------------------------------------------------------------

def test_openthoughts_marks_become_think(tmp_path):
    answer = "<|begin_of_thought|>\n\n1+1=2\n\n<|end_of_thought|>\n\n"
    answer += "<|begin_of_solution|>\n\nTwo.\n\n<|end_of_solution|>"
    row = {"system": "Use the marks.",
           "conversations": [{"from": "user", "value": "1+1?"}, {"from": "assistant", "value": answer}]}
    (got,) = made("openthoughts", [row], tmp_path)
    assert got["messages"] == [{"role": "user", "content": "1+1?"},
                               {"role": "assistant", "content": "<think>\n1+1=2\n</think>\n\nTwo."}]
    assert got["source"] == "openthoughts" and len(got["id"]) == 16


def test_openr1_keeps_right_and_whole_generations_eight_at_most(tmp_path):
    row = {"problem": "q", "answer": "5", "uuid": "u", "generations": [f"<think>t{i}</think>a" for i in range(12)],
           "correctness_math_verify": [False] + [True] * 11, "is_reasoning_complete": [True, False] + [True] * 10}
    none = row | {"correctness_math_verify": None, "correctness_llama": None}
    got = made("openr1_sft", [row, none], tmp_path)
    assert [g["messages"][1]["content"] for g in got] == [f"<think>\nt{i}\n</think>\n\na" for i in range(2, 10)]
    assert len({g["id"] for g in got}) == 8


def test_deepmath_both_ways(tmp_path):
    row = {"question": "Evaluate x.", "final_answer": "\\frac{1}{2}", "difficulty": 5.4, "topic": "t",
           "r1_solution_1": "s1", "r1_solution_2": "<think>a</think>b", "r1_solution_3": None}
    assert [g["messages"][1]["content"] for g in made("deepmath_sft", [row], tmp_path)] == [
        "s1", "<think>\na\n</think>\n\nb"]
    (p,) = made("deepmath", [row])
    assert (p.answer, p.level, p.kind) == ("\\frac{1}{2}", 5, "maths")


def test_chats_in_every_form(tmp_path):
    """ShareGPT, OpenAI's messages, Alpaca with and without input, plain rows; columns of other names."""
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1+1?"},
             {"from": "gpt", "value": "<think>two</think>2"}, {"from": "human", "value": "sure?"}]
    (got,) = made("sharegpt", [{"id": "x", "conversations": turns}], tmp_path)
    assert [m["role"] for m in got["messages"]] == ["system", "user", "assistant", "user"]
    assert got["messages"][2]["content"] == "<think>\ntwo\n</think>\n\n2"
    form = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert made("chat", [{"messages": form}])[0]["messages"] == form
    assert made("chat", [{"messages": form[:1]}]) == []
    with pytest.raises(ValueError, match="turn 0 from 'robot': should be from user, human"):
        made("sharegpt", [{"conversations": [{"from": "robot", "value": "x"}]}])
    a, b = made("alpaca", [{"instruction": "Add.", "input": "1 2", "output": "3"},
                           {"instruction": "Hi", "input": "", "output": "Ho"}])
    assert a["messages"][0]["content"] == "Add.\n\n1 2" and b["messages"] == [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (c,) = made("qa_sft", [{"task": "q", "meta": {"gold": "a", "why": "w"}}],
                columns="question=task,answer=meta.gold,reasoning=meta.why")
    assert c["messages"][1]["content"] == "<think>\nw\n</think>\n\na"
    with pytest.raises(ValueError, match="--columns names 'meta.gold'; columns: task"):
        made("qa_sft", [{"task": "q"}], columns="question=task,answer=meta.gold")
    with pytest.raises(UserError, match="should be OURS=THEIRS"):
        made("qa_sft", [], columns="question")


# ---- maths problems -------------------------------------------------------------------------------------------------

def test_proofs_and_choices_go_answers_stay_as_they_are():
    """Section 3.2: no proofs, no multiple choice, answers not forced to integers, rows without an answer dropped."""
    base = {"question_type": "math-word-problem", "generations": []}
    rows = [base | {"problem": "Find x.", "answer": "\\sqrt{2}"},
            base | {"problem": "Prove that x > 0.", "answer": "proof"},
            base | {"problem": "Pick: (A) 1 (B) 2 (C) 3", "answer": "2"},
            base | {"problem": "Which one?", "answer": "B"},
            base | {"problem": "What is it?", "answer": "x", "question_type": "MCQ"},
            base | {"problem": "No answer?", "answer": None}, base | {"problem": "  find  X. ", "answer": "\\sqrt{2}"}]
    counts = Counter()
    (p,) = made("openr1", rows, counts=counts)
    assert p.answer == "\\sqrt{2}" and counts == {
        "rows": 7, "proof": 1, "multiple choice": 3, "no question or answer": 1, "repeat": 1}


def test_plain_questions(tmp_path):
    (p,) = made("qa", [{"question": "What is 6 * 7?", "answer": 42, "level": 2}], tmp_path)
    assert (p.answer, p.level, p.kind) == ("42", 2, "maths")
    with pytest.raises(ValueError, match="GSM8K's column with the steps, use the adapter gsm8k"):
        made("qa", [{"question": "q", "answer": "steps\n#### 42"}])


def test_dapo_template_and_hundredfold_repeats(tmp_path):
    text = ("Solve the following math problem step by step. The last line of your response should be of the form "
            "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 6 * 7?\n\n"
            'Remember to put your answer on its own line after "Answer:".')
    row = {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": "42", "style": "rule"}}
    (p,) = made("dapo", [row] * 100, tmp_path)
    assert (p.question, p.answer) == ("What is 6 * 7?", "42")


# ---- code problems --------------------------------------------------------------------------------------------------

def test_apps_stdio_call_and_no_tests(tmp_path):
    stdio = {"question": "Add.", "solutions": json.dumps(["print(sum(map(int, input().split())))"]),
             "difficulty": "interview", "input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}),
             "starter_code": ""}
    call = {"question": "Double.", "solutions": "", "starter_code": "def f(x):", "difficulty": "VERY_HARD",
            "input_output": json.dumps({"fn_name": "f", "inputs": [[1], [2]], "outputs": [[2], [4]]})}
    lists = call | {"question": "Pair.",
                    "input_output": json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [[1, 2]]})}
    huge = stdio | {"question": "Huge.", "input_output": '{"inputs": ["1"], "outputs": [1' + "0" * 5000 + "]}"}
    empty = [stdio | {"question": "None.", "input_output": x} for x in ("", "{}", None)]
    a, b, c, d = made("taco", [stdio, call, lists, huge, *empty], tmp_path)
    assert (a.tests[0].kind, a.tests[0].input, a.tests[0].expected, a.level) == ("stdio", "1 2\n", "3\n", 2)
    assert a.solution.startswith("```python\nprint(") and a.entry == "main"
    assert [(t.kind, t.input, t.expected) for t in b.tests] == [("call", "[1]", "2"), ("call", "[2]", "4")]
    assert (b.entry, b.level) == ("f", 5) and b.question.endswith("def f(x):")
    assert c.tests[0].expected == "[1, 2]"
    assert len(d.tests[0].expected) == 5001


def test_codecontests_languages_are_numbers(tmp_path):
    tests = {"input": ["1\n"], "output": ["2\n"]}
    row = {"description": "Add one.", "public_tests": tests, "private_tests": tests,
           "generated_tests": {"input": [], "output": []},
           "solutions": {"language": [2, 3, 1], "solution": ["cpp", "py3", "py2"]}, "cf_rating": 1900}
    (p,) = made("codecontests", [row], tmp_path)
    assert len(p.tests) == 2 and p.solution == "```python\npy3\n```" and p.level == 3


def pack(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_livecodebench_reads_packed_tests(tmp_path):
    stdio = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    call = [{"input": '[1, 2]\n"a"', "output": "3", "testtype": "functional"}]
    row = {"question_title": "t", "question_content": "Q", "difficulty": "hard", "starter_code": "", "metadata": "{}",
           "public_test_cases": json.dumps(stdio), "private_test_cases": pack(json.dumps(stdio * 2))}
    functional = row | {"question_content": "R", "metadata": '{"func_name": "solve"}',
                        "public_test_cases": json.dumps(call), "private_test_cases": json.dumps(call)}
    a, b = made("livecodebench", [row, functional], tmp_path)
    assert len(a.tests) == 3 and a.tests[2].expected == "2\n" and a.level == 4 and a.entry == "main"
    assert b.entry == "solve" and (b.tests[0].input, b.tests[0].expected) == ('[[1, 2], "a"]', "3")


class Bomb:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_hostile_pickle_is_refused(capsys):
    """A pickle that names any class or function is refused before it runs; so is one that unpacks to too much."""
    with pytest.raises(ValueError, match="refused"):
        adapters.unpack_tests(pack(Bomb()))
    assert capsys.readouterr().out == ""
    old, adapters.MAX_BYTES = adapters.MAX_BYTES, 1000
    try:
        with pytest.raises(ValueError, match="larger than"):
            adapters.unpack_tests(pack("x" * 100_000))
    finally:
        adapters.MAX_BYTES = old


@pytest.mark.parametrize("raw", [
    b"\x80\x02K\x01r\xff\xff\xff\x7f.", b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    b"\x80\x02\x82\x01.", b"\x80\x02K\x01Q.", b"G\x00.", b"", b"\xff", b"(" * 1000,
    b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"a."])
def test_broken_pickles_are_rows_that_are_left_out(raw):
    """A memo of 2^31 places, 2^40 bytes, an extension, a persistent id, no pickle: one line, and no memory."""
    row = {"question_content": "q", "private_test_cases": base64.b64encode(zlib.compress(raw)).decode()}
    (place, bad), = adapters.convert("livecodebench", [((1,), row)], Counter())
    assert isinstance(bad, Bad) or raw.startswith(b"\x80\x02K\x01r"), bad


def test_long_integers_are_allowed_in_a_row_alone():
    """Python's limit of 4,300 digits guards the rest of the process."""
    row = {"question": "q", "input_output": json.dumps({"fn_name": "f", "inputs": [["1"]], "outputs": ["2"]}).replace(
        '"1"', "7" * 5000)}
    before = sys.get_int_max_str_digits()
    (_, problem), = adapters.convert("apps", [((1,), row)], Counter())
    assert "7" * 5000 in problem.tests[0].input and sys.get_int_max_str_digits() == before == 4300
    row["input_output"] = row["input_output"].replace("7" * 5000, "7" * 200_000)
    assert isinstance(next(adapters.convert("apps", [((1,), row)], Counter()))[1], Bad)


# ---- the command ----------------------------------------------------------------------------------------------------

def call(*words):
    """python -m data.hub WORDS"""
    hub.main(configurator.load(hub.Config, list(map(str, words))))


def test_command_writes_what_the_recipe_reads(tmp_path, capsys):
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", [row, row])
    call("dapo", tmp_path / "in", tmp_path / "out.jsonl")
    assert [p.answer for p in read_problems(tmp_path / "out.jsonl")] == ["2"]
    assert "1 written, left out: repeat 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="out.jsonl is there already: --replace writes it anew"):
        call("dapo", tmp_path / "in", tmp_path / "out.jsonl")
    write(tmp_path / "in" / "a.jsonl", [{"prompt": "text"}])
    with pytest.raises(UserError, match=r"nothing left.*rejected 1; .*a.jsonl:1: adapter dapo: row needs 'prompt'"):
        call("dapo", tmp_path / "in", tmp_path / "other.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.jsonl"]
    with pytest.raises(ValueError, match="must be one of alpaca"):
        call("nonsense", tmp_path / "in", tmp_path / "other.jsonl")
    with pytest.raises(UserError, match="no such folder or file, and not a hub name"):
        call("text", "/no/such/folder", tmp_path / "other.jsonl")


def test_bad_rows_are_named_and_the_others_written(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"text": "1"}\n{oops\n{"body": 2}\n{"text": "4"}\n')
    (tmp_path / "in/b.html").write_bytes("<p>Straße</p>".encode())
    (tmp_path / "in/c.exe").write_bytes(b"x")
    (tmp_path / "in/d.html").write_text("<!-- moved -->")
    call("text", tmp_path / "in", tmp_path / "out.jsonl")
    assert [json.loads(x)["text"] for x in (tmp_path / "out.jsonl").read_text().splitlines()] == ["1", "4", "Straße"]
    rows = [json.loads(x) for x in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert [(row["file"][-7:], row["row"]) for row in rows] == [("n/c.exe", 0), ("a.jsonl", 2), ("a.jsonl", 3)]
    assert "3 written, left out: empty 1, rejected 2; 1 files not read; see" in capsys.readouterr().out
    write(tmp_path / "many.jsonl", [{"text": "x"}] * 50 + [{"body": "x"}] * 10)
    with pytest.raises(UserError, match=r"10 of 60 rows rejected.*the first: .*many.jsonl:51: adapter text: row needs"):
        call("text", tmp_path / "many.jsonl", tmp_path / "b.jsonl")
    assert not list(tmp_path.glob("b.*"))


def test_command_writes_shards(tmp_path, capsys):
    """Four documents: one repeated under another spelling of its address, one that holds a held-out question."""
    texts = [f"The town of {n} has a market and a mill. " * 4 for n in ("Bram", "Holt")]
    rows = [{"text": texts[0], "url": "http://a.org/1"}, {"text": "x", "url": "http://www.a.org/1/"},
            {"text": texts[1], "url": "http://a.org/2"}, {"text": "So: What is 17 + 25? It is 42.", "url": "c"}]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", rows)
    write_problems(tmp_path / "test.jsonl", [Problem("0" * 16, "maths", "What is 17 + 25?", answer="42")])
    call("text", tmp_path / "in", tmp_path / "shards", "--tokenizer=tiny", "--name=maths",
         f"--heldout={tmp_path / 'test.jsonl'}", "--valid_share=0")
    info = json.loads((tmp_path / "shards" / "maths.json").read_text())
    assert info["documents"] == 2
    with pytest.raises(UserError, match="limit = 0 should be at least 1"):
        call("text", tmp_path / "in", tmp_path / "o.jsonl", "--limit=0")
    with pytest.raises(UserError, match="nothing is left to write: empty 1"):
        call("text", write(tmp_path / "none.jsonl", [{"text": ""}]), tmp_path / "s2", "--tokenizer=tiny")


def test_own_tokenizer(tmp_path, capsys):
    """From a folder to shards in two commands; the embedded one stays as it is; a second one is not written over it."""
    pytest.importorskip("tokenizers")
    (tmp_path / "in").mkdir()
    text = " ".join(f"the {a}{b} of {b}{a} and the {b}" for a in ("mill", "town", "river") for b in "abcdefgh")
    write(tmp_path / "in" / "a.jsonl", [{"text": f"{text} é 12"}, {"body": 1}])
    (tmp_path / "in/b.html").write_text(f"<p>{text}</p>")
    before = TINY.read_bytes()
    words = [str(tmp_path / "in"), str(tmp_path / "tok")]
    train_bpe.main(configurator.load(train_bpe.Config, [*words, "--vocab_size=300"]))
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert tokenizer.vocab_size == 300 and tokenizer.decode(tokenizer.encode("é the town 7")) == "é the town 7"
    assert "300 ids from 2 texts" in capsys.readouterr().out and TINY.read_bytes() == before
    call("text", tmp_path / "in", tmp_path / "data", f"--tokenizer={tmp_path / 'tok'}", "--valid_share=0")
    assert json.loads((tmp_path / "data/web.json").read_text())["tokenizer"] == tokenizer.fingerprint
    with pytest.raises(UserError, match="a tokenizer is there already"):
        train_bpe.main(configurator.load(train_bpe.Config, [*words, "--vocab_size=300"]))
    with pytest.raises(UserError, match="give more, and more varied, text"):
        train_bpe.main(configurator.load(train_bpe.Config, [words[0], str(tmp_path / "t2"), "--vocab_size=9000"]))


def test_heldout_is_obeyed_by_every_adapter(tmp_path, capsys):
    """The held-out question itself, and with two words replaced; a third row stays. Problems, chats and documents."""
    question = "A train leaves the town of Holt at 9 and needs 4 hours for the 320 miles to Bram. How fast is it?"
    other = question.replace("A train", "One bus").replace("fast", "quick")
    write_problems(tmp_path / "test.jsonl", [Problem("0" * 16, "maths", question, answer="80")])
    texts = [question, other, "How many legs have 3 horses and 2 hens?"]
    dapo = [{"prompt": [{"role": "user", "content": t}], "reward_model": {"ground_truth": "1"}} for t in texts]
    apps = [{"question": t, "input_output": json.dumps({"inputs": ["1"], "outputs": ["1"]})} for t in texts]
    chats = [{"conversations": [{"from": "user", "value": t}, {"from": "assistant", "value": "80"}]} for t in texts]
    pages = [{"text": f"From the book, page 7. {t} Answer it."} for t in texts]
    for adapter, rows in (("dapo", dapo), ("apps", apps), ("openthoughts", chats), ("text", pages)):
        source, out = write(tmp_path / f"{adapter}.jsonl", rows), tmp_path / f"{adapter}_out.jsonl"
        call(adapter, source, out, f"--heldout={tmp_path / 'test.jsonl'}")
        left = out.read_text()
        assert "horses" in left and "Bram" not in left, adapter
        assert "1 written, left out: held out 2" in capsys.readouterr().out
    call("qa", write(tmp_path / "qa.jsonl", [{"question": t, "answer": 1} for t in texts]), tmp_path / "qa_out.jsonl",
         f"--heldout={write(tmp_path / 'chats.jsonl', [{'messages': [{'role': 'user', 'content': question}]}])}")
    assert [p.question for p in read_problems(tmp_path / "qa_out.jsonl")] == texts[2:]


def test_a_flag_that_would_not_be_used_is_an_error(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "x"}])
    for flag in ("--labels=l.jsonl", "--name=maths", "--split=test", "--subset=a", "--append", "--valid_share=0.5",
                 "--workers=2", "--tasks=3", "--slurm_partition=cpu", "--memory_gb=8"):
        with pytest.raises(UserError, match="are for"):
            call("text", source, tmp_path / "out.jsonl", flag)
    for flags in (["--memory_gb=8"], ["--tasks=2", "--slurm_time=1:00"]):
        with pytest.raises(UserError, match="are for Slurm"):
            call("text", source, tmp_path / "data", "--tokenizer=tiny", *flags)
