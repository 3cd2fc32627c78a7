"""
Corpora in parts: the same bytes for any number of processes, tasks and kills; what is rejected; what is added to what.
"""
import hashlib
import json
import random
import re

import numpy as np
import pytest

import configurator
from configurator import UserError
from data import build, hub, trove
from data.dedup import jaccard, shingles
from data.loader import MixtureLoader
from data.sft_data import ShardSamples, write_tokenised
from data.shards import Shards
from tokenizer import Tokenizer

TINY = Tokenizer.load("tiny")


def texts_of(folder, name="web"):
    """The documents of a source as text, in file order."""
    return [TINY.decode(ids[:-1]) for ids in Shards(folder, name).documents()]


def command(*words):
    """python -m data.hub text WORDS --tokenizer=tiny"""
    hub.main(configurator.load(hub.Config, ["text", *map(str, words), "--tokenizer=tiny"]))


def checksums(folder):
    """Name -> checksum of all files below a folder but datatrove's logs."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file() and ".logs" not in str(p)}


@pytest.fixture
def crawl(tmp_path, monkeypatch):
    """600 documents in four files, 60 near copies and 30 second fetches among them, two broken rows. Parts of 50 kB."""
    monkeypatch.setattr(build, "PART", (50_000, 50_000))
    r = random.Random(0)
    words = [f"word{i}" for i in range(2000)]
    rows = [{"url": f"http://h{i % 7}.org/{i}", "text": " ".join(r.choices(words, k=80))} for i in range(510)]
    for i in range(60):
        copy = rows[i * 5]["text"].split()
        copy[40] = "changed"
        rows.append({"url": f"http://mirror.org/{i}", "text": " ".join(copy)})
    rows += [{"url": f"https://www.h{i % 7}.org/{i}/?utm_source=x", "text": f"other text {i}"} for i in range(30)]
    r.shuffle(rows)
    (tmp_path / "in").mkdir()
    lines = [json.dumps(row) for row in rows]
    for k in range(3):
        (tmp_path / f"in/{k}.jsonl").write_text("\n".join(lines[k * 200:(k + 1) * 200]) + "\n{broken\n" * (k < 2))
    (tmp_path / "in/z.txt").write_text("a text of its own")
    (tmp_path / "in/notes.docx").write_text("x")
    return tmp_path / "in"


def test_one_run(crawl, tmp_path, capsys):
    """What stays, what goes and why; the broken rows by file and line, although the files are cut into pieces."""
    command(crawl, tmp_path / "out")
    kept = texts_of(tmp_path / "out") + texts_of(tmp_path / "out/valid")
    assert len(kept) == len(set(kept)) == 515        # 4 of the 60 copies stay: their originals were fetched second
    printed = capsys.readouterr().out
    assert "rows -> text                               603         601" in printed
    assert "equal addresses                            601         571" in printed
    assert "571         515" in printed and "30 of the documents dropped for their address had another text" in printed
    rejected = [json.loads(line) for line in (tmp_path / "out/web.rejected.jsonl").read_text().splitlines()]
    assert [(row["file"][len(str(crawl)) + 1:], row["row"]) for row in rejected] == [
        ("notes.docx", 0), ("0.jsonl", 201), ("1.jsonl", 201)]
    assert rejected[0]["reason"] == "no reader for .docx" and "not JSON" in rejected[1]["reason"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir())[-1] == "web_00008.bin"
    assert MixtureLoader(tmp_path / "out", ["web"], 1024, tokenizer=TINY.fingerprint).next_batch(0, {"web": 1}, 64, 2)


@pytest.mark.slow
def test_same_bytes_from_several_processes_and_after_kills(crawl, tmp_path, monkeypatch):
    """One process; two; a run that is killed at every 15th write of a result, again and again until it is through."""
    command(crawl, tmp_path / "a")
    command(crawl, tmp_path / "b", "--workers=2")
    want, kills = checksums(tmp_path / "a"), 0
    assert checksums(tmp_path / "b") == want
    replace, writes = build.os.replace, 0

    def killed(source, target):
        nonlocal writes
        writes += 1
        if writes % 15 == 0:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(build.os, "replace", killed)
    while True:
        try:
            command(crawl, tmp_path / "c")
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 3 and checksums(tmp_path / "c") == want


def test_a_killed_run_of_other_files_begins_anew(crawl, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(build, "dedup", lambda work: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command(crawl, tmp_path / "out")
    assert (tmp_path / "out/web.work/part_00000.json").is_file()
    (crawl / "z.txt").write_text("it has changed since")
    command(crawl, tmp_path / "out", "--valid_share=0")
    assert "it has changed since" in texts_of(tmp_path / "out")


def test_datatrove_gives_the_same_bytes(crawl, tmp_path):
    """Three tasks on two workers of its local executor."""
    pytest.importorskip("datatrove")
    command(crawl, tmp_path / "a")
    for again in ([], ["--replace"]):
        command(crawl, tmp_path / "b", "--tasks=3", "--workers=2", *again)
        assert checksums(tmp_path / "b") == checksums(tmp_path / "a")


def test_tasks_share_the_parts(crawl, tmp_path):
    """What data/trove.py gives datatrove, done by hand by three tasks of two in the wrong order: the same bytes."""
    command(crawl, tmp_path / "a")
    cfg = configurator.load(hub.Config, ["text", str(crawl), str(tmp_path / "b"), "--tokenizer=tiny"])
    work, parts = build.plan(hub.job_of(cfg))
    for step in (build.read_part, build.write_part):
        for rank in (2, 0, 1):
            trove.parts_of(step, work, parts)(rank=rank, world_size=3)
        build.dedup(work)
    build.finish(work)
    assert checksums(tmp_path / "b") == checksums(tmp_path / "a")


def test_what_goes_is_like_what_stays(crawl, tmp_path):
    """The exact check over files: for every document that MinHash removed one with J >= .7 is in the shards."""
    command(crawl, tmp_path / "out", "--valid_share=0")
    kept = texts_of(tmp_path / "out")
    first: dict[str, str] = {}
    for path in sorted(crawl.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            if line != "{broken":
                row = json.loads(line)
                first.setdefault(build.canonical_url(row["url"]), row["text"])
    gone = [t for t in first.values() if t not in set(kept)]
    sets = shingles(kept)
    assert len(gone) == 56 and all(max(jaccard(shingles([t])[0], s) for s in sets) >= 0.7 for t in gone)


# ---- sources that are there -----------------------------------------------------------------------------------------

def test_a_source_is_not_overwritten_without_being_asked(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"the text of {name}")
    out = tmp_path / "out"
    command(tmp_path / "one.txt", out, "--valid_share=0")
    before = checksums(out)
    with pytest.raises(UserError, match="source 'web' is in .*out already: --append adds to it, --replace"):
        command(tmp_path / "two.txt", out)
    assert checksums(out) == before
    command(tmp_path / "two.txt", out, "--append", "--valid_share=0")
    assert texts_of(out) == ["the text of one", "the text of two"]
    command(tmp_path / "two.txt", out, "--replace", "--valid_share=0")
    assert texts_of(out) == ["the text of two"] and not list(out.glob("*_00001.bin"))
    command(tmp_path / "one.txt", out, "--name=maths", "--valid_share=1")
    assert texts_of(out / "valid", "maths") == ["the text of one"] and not (out / "maths.json").exists()
    with pytest.raises(UserError, match="replace and append: one of them"):
        command(tmp_path / "one.txt", out, "--replace", "--append")


def other_tokenizer(folder):
    """A tokenizer with two ids exchanged: as many ids as the embedded one, and other text for them."""
    ranks = dict(TINY.ranks)
    ranks[b"a"], ranks[b"b"] = ranks[b"b"], ranks[b"a"]
    Tokenizer(ranks, TINY.added, TINY.vocab_size).save(folder)
    return folder


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    """By the loader of pre-training, by SFT, and where a second corpus is added; equal ones have equal fingerprints."""
    other = other_tokenizer(tmp_path / "tok")
    (tmp_path / "a.txt").write_text("a text")
    hub.main(configurator.load(hub.Config, ["text", str(tmp_path / "a.txt"), str(tmp_path / "out"),
                                            f"--tokenizer={other}", "--valid_share=0"]))
    assert Tokenizer.load(other).fingerprint != TINY.fingerprint
    TINY.save(tmp_path / "same")
    assert Tokenizer.load(tmp_path / "same").fingerprint == TINY.fingerprint
    with pytest.raises(UserError, match="source 'web' in .* was made with another tokenizer"):
        MixtureLoader(tmp_path / "out", ["web"], 1024, tokenizer=TINY.fingerprint)
    with pytest.raises(UserError, match="another tokenizer: nothing to add to"):
        command(tmp_path / "a.txt", tmp_path / "out", "--append")
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    write_tokenised(tmp_path / "sft", [chat], str(other))
    with pytest.raises(UserError, match="source 'sft' in .* was made with another tokenizer"):
        ShardSamples(tmp_path / "sft", 1024, TINY.fingerprint)
    assert len(ShardSamples(tmp_path / "sft", 1024, Tokenizer.load(other).fingerprint)) == 1


# ---- what ends a run ------------------------------------------------------------------------------------------------

def test_only_a_share_of_bad_rows_ends_a_run(tmp_path):
    """Nine bad rows never do; ten of 100 do at .05, and not at .2. The message has the first of them."""
    good, path = '{"text": "some text"}\n', tmp_path / "a.jsonl"
    path.write_text(good + "{\n" * 9)
    command(path, tmp_path / "out", "--valid_share=0")
    path.write_text(good * 90 + "{\n" * 10)
    with pytest.raises(UserError, match=r"10 of 100 rows rejected, more than max_rejected = 0.05 allows; the first: "
                                        r".*a.jsonl:91: not JSON"):
        command(path, tmp_path / "b")
    command(path, tmp_path / "b", "--max_rejected=0.2", "--valid_share=0")
    assert texts_of(tmp_path / "b") == ["some text"]
    path.write_text('{"text": " "}\n{"body": "x"}\n')
    with pytest.raises(UserError, match="nothing is left to write: empty 1, rejected 1"):
        command(path, tmp_path / "c")


def test_a_hopeless_run_ends_early(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PART", (5000, 5000))
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 20_000)
    with pytest.raises(UserError, match="row needs text, html or content; columns: body"):
        command(tmp_path / "a.jsonl", tmp_path / "out")
    assert len(list((tmp_path / "out/web.work").glob("part_*.json"))) < 10


def test_pages_that_break_the_parser_are_one_page_each(tmp_path):
    for k, page in enumerate([b"<!-- moved -->", b"<nav>a</nav>tail&#1;", b"\x00", b"", b"<p>a page</p>",
                              "<p>\ufffd&#xFFFF;&#xD800;b</p>".encode()]):
        (tmp_path / f"{k}.html").write_bytes(page)
    (tmp_path / "blank.txt").write_text("x" + " " * 1_100_000 + "y")
    command(tmp_path, tmp_path / "out", "--valid_share=0")
    assert {"a page", "x" + " " * 1_100_000 + "y"} <= set(texts_of(tmp_path / "out"))


def test_charset_of_the_header_and_counts_of_the_extractor(tmp_path, capsys):
    """Through all steps: html as bytes with the charset that a WARC reader found; a page nested too deep is counted."""
    pytest.importorskip("fastwarc")
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=koi8-r\r\n\r\n"
    body += "<p>Дождь шёл весь день, и река поднялась до моста.</p>".encode("koi8-r")
    head = f"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: {len(body)}\r\n\r\n"
    (tmp_path / "a.warc").write_bytes(head.encode() + body + b"\r\n\r\n")
    (tmp_path / "b.html").write_text("<div>" * 3000 + "<p>The mill of Bram has two stones.</p>" + "</div>" * 3000)
    command(tmp_path, tmp_path / "out", "--valid_share=0")
    assert texts_of(tmp_path / "out") == ["Дождь шёл весь день, и река поднялась до моста.",
                                          "The mill of Bram has two stones."]
    assert re.search(r"\n  nested too deep: .* 1\n", capsys.readouterr().out)


def test_held_out_questions_and_tags(tmp_path):
    """A question of a published file is kept out; labels send each document to its source."""
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "How many apples has Tom now?", "answer": "#### 3"}))
    kinds = {"maths": "sum term equation root", "forum": "thread reply user thanks"}
    labels = [{"text": f"{text} {i}", "domain": kind, "quality": 3, "depth": 0, "ad": 0}
              for kind, text in kinds.items() for i in range(30)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    rows = [{"text": f"{text} {n}"} for text in kinds.values() for n in "abcdefgh"]
    rows += [{"text": "Q: how many apples has Tom now ? 3"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command(tmp_path / "a.jsonl", tmp_path / "out", f"--labels={tmp_path / 'labels.jsonl'}", "--valid_share=0",
            f"--heldout={tmp_path / 'test.jsonl'}")
    assert all(t.startswith("sum") for t in texts_of(tmp_path / "out", "maths"))
    web = texts_of(tmp_path / "out", "web")
    assert web and all(t.startswith("thread") for t in web)


def test_cut_covers_every_byte_once(monkeypatch):
    monkeypatch.setattr(build, "PART", (100, 100))
    files = [("a.jsonl", 1234, 0), ("b.txt", 30, 0), ("c.txt", 60, 0), ("d.txt", 50, 0), ("e.jsonl.gz", 900, 0)]
    parts = build.cut(files)
    pieces = [piece for part in parts for piece in part]
    ends = [(start, end) for path, start, end in pieces if path == "a.jsonl"]
    assert ends[0][0] == 0 and ends[-1][1] == 1234 and all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
    assert [p for p in pieces if p[0] != "a.jsonl"] == [[name, 0, None] for name, _, _ in files[1:]]
    assert max(b - a for a, b in ends) <= 150 and [["b.txt", 0, None], ["c.txt", 0, None]] in parts
    assert build.cut(files, limit=5) == [pieces]
    assert np.all([len(p) for p in parts])
