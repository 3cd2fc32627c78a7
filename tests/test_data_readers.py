"""Every kind of file as rows; what is broken comes out in its place, with the reason, and nothing behind it is lost."""
import bz2
import gzip
import json
import lzma

import pytest

from configurator import UserError
from data import readers
from data.jsonl import json_object
from data.readers import Bad, lines_before, listing, read_rows, table_rows


def rows(path, data=None, **k):
    """(number, row, or the reason) of a file."""
    if data is not None:
        path.write_bytes(data)
    return [(n, row.why if isinstance(row, Bad) else row) for n, row in read_rows(path, **k)]


LINES = b'{"text": "1"}\n\n{"text": "3"}\n'
WANT = [(1, {"text": "1"}), (3, {"text": "3"})]


@pytest.mark.parametrize("ending, pack", [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress),
                                          (".xz", lzma.compress)])
def test_jsonl_packed_and_cut_off(tmp_path, ending, pack):
    path = tmp_path / f"a.jsonl{ending}"
    assert rows(path, pack(LINES)) == WANT
    if ending:
        many = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000))
        got = rows(path, pack(many)[:-40])
        assert "cut off or damaged" in got[-1][1]
        assert rows(path, b"not packed")[0][1].startswith("cut off or damaged")


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    assert rows(tmp_path / "a.jsonl.zst", zstandard.compress(LINES)) == WANT
    assert "damaged" in rows(tmp_path / "a.jsonl.zst", b"no zst")[0][1]


def test_jsonl_with_everything_that_dumps_hold(tmp_path):
    """A mark of Windows, half a surrogate pair, a list, broken JSON and UTF-8, deep nesting, a line cut off."""
    lines = [b'\xef\xbb\xbf{"text": "\xc3\xa9"}', b'{"text": "half \\ud83d"}', b'{"text": "\\ud83d\\ude00"}', b"[1]",
             b"{oops", b'{"text": "\xff"}', b'{"a":' * 100_000, b'{"text": "cut']
    got = rows(tmp_path / "a.jsonl", b"\n".join(lines))
    assert [row for _, row in got[:3]] == [{"text": "é"}, {"text": "half \ufffd"}, {"text": "😀"}]
    assert [n for n, _ in got] == list(range(1, 9))
    for (_, why), what in zip(got[3:], ["a list where", "not JSON", "not UTF-8: byte 0xff", "not JSON", "not JSON"],
                              strict=True):
        assert what in why
    assert json_object(b'{"\\udc00": ["\\udbff", {"a": "\\uDFFFx"}]}') == {"\ufffd": ["\ufffd", {"a": "\ufffdx"}]}


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW", 50)
    got = rows(tmp_path / "a.jsonl.gz", gzip.compress(b'{"a": 1}\n' + b"x" * 300 + b'\n{"a": 3}\n'))
    assert got == [(1, {"a": 1}), (2, "longer than 0 MiB"), (3, {"a": 3})]
    assert rows(tmp_path / "a.txt", b"x" * 51) == [(1, "longer than 0 MiB")]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_pieces_of_a_file_are_the_file(tmp_path, end):
    """Cut at every byte: each line is in exactly one of the two pieces, with its number."""
    lines = [b'{"n": 1}', b"", b'{"n": "\xc3\xa9"}', b"{broken", b'{"n": 5}']
    path = tmp_path / "a.jsonl"
    whole = rows(path, b"\n".join(lines) + end)
    for at in range(1, path.stat().st_size):
        second = [(n + lines_before(path, at), row) for n, row in rows(path, start=at)]
        assert rows(path, start=0, end=at) + second == whole, at


def test_json(tmp_path):
    path, want = tmp_path / "a.json", [(1, {"a": 1}), (2, {"a": 2})]
    assert rows(path, b'[{"a": 1}, {"a": 2}]') == want
    assert rows(path, b'\xef\xbb\xbf{"version": "1", "data": [{"a": 1}, {"a": 2}]}') == want
    chat = {"id": "x", "conversations": [{"from": "human", "value": "q"}]}
    assert rows(path, json.dumps(chat).encode()) == [(1, chat)]
    assert rows(path, b'{"a": {"b": 1}}') == [(1, {"a": {"b": 1}})]
    assert "not JSON" in rows(path, b"[1,")[0][1] and rows(path, b'[1, {"a": 2}]')[0][1].startswith("a int where")


def test_csv(tmp_path):
    data = '\ufeffurl,text\nu,"two\nlines, ""quoted"""\nv\nw,x,y\nz,é\n'.encode()
    got = rows(tmp_path / "a.csv", data + b"l,\xff\n")
    assert got[0] == (1, {"url": "u", "text": 'two\nlines, "quoted"'}) and got[3] == (4, {"url": "z", "text": "é"})
    assert [why for _, why in got[1:3]] == ["not 2 fields, as the first line has"] * 2 and got[4] == (5, "not UTF-8")
    assert rows(tmp_path / "a.tsv", b"a\tb\n1\t2\n") == [(1, {"a": "1", "b": "2"})]


def test_parquet(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist([{"text": "3"}, {"text": "4"}]), tmp_path / "b.parquet")
    assert rows(tmp_path / "b.parquet") == [(1, {"text": "3"}), (2, {"text": "4"})]
    assert "damaged" in rows(tmp_path / "b.parquet", b"not parquet")[0][1]
    texts = pa.array([b"3", b"\xff", b"\xed\xa0\xbd", b"4"]).cast(pa.binary()).view(pa.string())   # nobody checks
    parquet.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    assert rows(tmp_path / "c.parquet") == [(1, {"text": "3"}), (2, "not UTF-8"), (3, "not UTF-8"), (4, {"text": "4"})]


def record(kind, url, content_type, body, http=""):
    """A record of a WARC file, with headers of HTTP when there are any."""
    body = f"HTTP/1.1 {http}\r\n\r\n".encode() + body if http else body
    return (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
            f"WARC-Date: 2026-01-01T00:00:00Z\r\nWARC-Target-URI: {url}\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body + b"\r\n\r\n"


def test_warc(tmp_path):
    """Pages of status 200 only; the charset of the header, unpacked bodies, plain text; a file cut off anywhere."""
    pytest.importorskip("fastwarc")
    answer = "application/http; msgtype=response"
    zipped = gzip.compress(b"<p>zip</p>")
    packed = f"200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\nContent-Length: {len(zipped)}"
    records = [record("warcinfo", "x", "application/warc-fields", b"software: x"),
               record("request", "http://a.org/", "application/http; msgtype=request", b"GET / HTTP/1.1\r\n\r\n"),
               record("response", "http://a.org/", answer, "<p>привет</p>".encode("cp1251"),
                      "200 OK\r\nContent-Type: text/html; charset=windows-1251"),
               record("response", "http://a.org/i.png", answer, b"\x89PNG", "200 OK\r\nContent-Type: image/png"),
               record("response", "http://a.org/m", answer, b"moved", "301 Moved\r\nContent-Type: text/html"),
               record("response", "<http://a.org/z>", answer, zipped, packed),
               record("conversion", "http://a.org/w", "text/plain", "täxt".encode())]
    russian = {"url": "http://a.org/", "html": "<p>привет</p>".encode("cp1251"), "charset": "windows-1251"}
    want = [russian, "content type image/png", "status 301",
            {"url": "http://a.org/z", "html": b"<p>zip</p>", "charset": ""}, {"url": "http://a.org/w", "text": "täxt"}]
    plain, zipped_file = b"".join(records), b"".join(map(gzip.compress, records))
    assert [row for _, row in rows(tmp_path / "a.warc", plain)] == want
    assert [row for _, row in rows(tmp_path / "a.warc.gz", zipped_file)] == want
    for data, name, tail in ((plain, "b.warc", 30), (zipped_file, "b.warc.gz", 30), (zipped_file, "b.warc.gz", 300)):
        got = [row for _, row in rows(tmp_path / name, data[:-tail])]
        assert "damaged" in got[-1] and got[:2] == want[:2]
    assert "damaged" in rows(tmp_path / "c.warc", b"no warc at all")[0][1]


@pytest.mark.parametrize("data, encoding, want", [
    ("é".encode(), "", "é"), ("\ufeffé".encode(), "", "é"), ("é中".encode("utf-16"), "", "é中"),
    ("é".encode("utf-32"), "", "é"), ("привет".encode("cp1251"), "cp1251", "привет"),
    (("Die Straße nach Köln führt über die schöne Brücke. " * 9).encode("latin-1"), "", None),
    (b"\xff\xfe\xff", "", "1 characters in no known charset; --encoding=NAME"),
    (b"\xe9", "ascii", "not ascii: byte 0xe9 at 0; --encoding=NAME"),
    (b"a\0b", "", "no text: it holds NUL bytes")])
def test_text_in_its_charset(tmp_path, data, encoding, want):
    ((_, row),) = rows(tmp_path / "a.txt", data, encoding=encoding)
    got = row if isinstance(row, str) else row["text"]
    assert got.startswith(want) if want else got == data.decode("latin-1")


def test_a_charset_that_there_is_not(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(UserError, match="encoding 'klingon': Python knows no such"):
        list(read_rows(tmp_path / "a.txt", encoding="klingon"))


def test_listing_names_what_it_cannot_read(tmp_path):
    for name in ("b/a.md", "a.py", "c.PDF", "Makefile", ".git/x.txt", "b/.hidden.txt", "b/z.JSONL.gz", "p.htm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, unread = listing(tmp_path)
    short = lambda paths: [str(p.relative_to(tmp_path)) for p in paths]
    assert short(files) == ["a.py", "b/a.md", "b/z.JSONL.gz", "p.htm"] and short(unread) == ["Makefile", "c.PDF"]
    with pytest.raises(UserError, match=r"no file that can be read \(of 1\); what can be read: .jsonl"):
        listing(tmp_path / "Makefile")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        listing(tmp_path / "nowhere")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    """By the name that pip knows, and before any work."""
    (tmp_path / "a.parquet").write_bytes(b"x")
    (tmp_path / "b.warc").write_bytes(b"x")
    monkeypatch.setattr(readers.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    for name, package in (("a.parquet", "pyarrow"), ("b.warc", "fastwarc")):
        with pytest.raises(UserError, match=f"this needs the package {package}.*: pip install {package}$"):
            readers.needed([tmp_path / name])


def test_tables_of_a_folder(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nq,1\n")
    (tmp_path / "b.jsonl").write_text('{"question": "r"}\n')
    assert [(n, row["question"]) for _, n, row in table_rows(tmp_path)] == [(1, "q"), (1, "r")]
    (tmp_path / "c.data").write_text('{"a": 1}\n{')
    with pytest.raises(UserError, match="c.data:2: not JSON.*; one a line"):
        list(table_rows(tmp_path / "c.data", "one a line"))
