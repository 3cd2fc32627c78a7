"""
Shards and mixture loader: exact proportions, exact resume, any number of ranks, boundaries, damaged files.
"""
import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.loader import make_source
from configurator import UserError
from data.loader import MixtureLoader, Stream, make_batch
from data.shards import Shard, Shards, sources, write_shard, write_source
from kernels.attention import doc_bounds

EOS = 1000


def make(folder, name, n_documents, low=0, longest=40, seed=0, shard_tokens=1 << 28):
    """
    A source of random documents that end with EOS; token values say nothing, lengths vary. -> the documents.
    """
    r = np.random.default_rng(seed)
    documents = [[*r.integers(low, 1000, r.integers(1, longest)).tolist(), EOS] for _ in range(n_documents)]
    write_source(folder, name, documents, 1001, shard_tokens)
    return documents


@pytest.fixture
def folder(tmp_path):
    for k, (name, n) in enumerate({"web": 300, "maths": 60, "code": 40}.items()):
        make(tmp_path, name, n, seed=k)
    return tmp_path


MIX = {"web": 0.3, "maths": 0.5, "code": 0.2}


def open_loader(folder, **k):
    return MixtureLoader(folder, ["web", "maths", "code"], 1001, n_mtp=2, **k)


# ---- shards ------------------------------------------------------------------------------------------------

def test_write_and_read(tmp_path):
    documents = make(tmp_path, "a", 200, shard_tokens=500)
    s = Shards(tmp_path, "a", verify=True)
    assert len(s.shards) > 5 and s.n_documents == 200 and s.n_tokens == sum(map(len, documents))
    assert [d.tolist() for d in s.documents()] == documents
    assert sources(tmp_path) == ["a"]
    assert s.shards[0].tokens.dtype == np.uint16
    make(tmp_path, "a", 3)           # rewritten with fewer shards: the old ones are gone
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a_00000.bin"]


def test_large_vocabularies_take_four_bytes(tmp_path):
    """151,679, the last row of MiMo-7B's embedding, does not fit 16 bits."""
    write_source(tmp_path, "a", [[151_679, 7]], 151_680)
    s = Shards(tmp_path, "a", 151_680)
    assert s.shards[0].tokens.dtype == np.uint32 and s.shards[0].document(0).tolist() == [151_679, 7]
    write_source(tmp_path, "b", [[65_535, 7]], 65_536)
    s = Shards(tmp_path, "b")
    assert s.shards[0].tokens.dtype == np.uint16 and s.shards[0].document(0).tolist() == [65_535, 7]


@pytest.mark.parametrize("ids", [[5, 1001], [-1, 5]])
def test_ids_outside_the_vocabulary_are_named_when_written(tmp_path, ids):
    with pytest.raises(ValueError, match=r"document 1 holds token id (1001|-1), must be in 0..1000"):
        write_source(tmp_path, "a", [[1], ids], 1001)
    with pytest.raises(ValueError, match="no .*a.json"):       # nothing half-written is taken for a source
        Shards(tmp_path, "a")


def test_a_failed_write_leaves_the_old_shard(tmp_path):
    write_shard(tmp_path / "x.bin", [[1, 2]], 1001)
    before = (tmp_path / "x.bin").read_bytes()
    with pytest.raises(ValueError):
        write_shard(tmp_path / "x.bin", [[1], [2000]], 1001)
    assert (tmp_path / "x.bin").read_bytes() == before


@pytest.mark.parametrize("damage, message", [
    (lambda p: os.truncate(p, os.path.getsize(p) - 8), "truncated"),
    (lambda p: os.truncate(p, 100), "not a token shard"),
    (lambda p: flip(p, 0), "not a token shard"),
    (lambda p: flip(p, 24), "header does not match"),
    (lambda p: flip(p, 1024 + 10), "tokens do not match their checksum"),
    (lambda p: flip(p, os.path.getsize(p) - 1), "table of document ends"),
    (lambda p: write_shard(p, [[1, 2, 3]], 1001), "is not the shard that"),
    (lambda p: p.unlink(), "is missing"),
    (lambda p: p.with_name("web.json").write_text("{"), "corrupt, not a list of shards"),
])
def test_damage_is_named(folder, damage, message):
    damage(folder / "web_00000.bin")
    with pytest.raises(ValueError, match=f"web.*{message}|{message}.*web"):
        open_loader(folder)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


READ_ALL = """
import resource, sys
from data.loader import MixtureLoader
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
ranks = [MixtureLoader(sys.argv[1], ["a", "b"], 1 << 20, rank=rank, world=3) for rank in range(3)]
batches = [[r.next_batch(0, {"a": 1, "b": 1}, 64, 6, rank, 3) for rank, r in enumerate(ranks)] for _ in range(60)]
ends = [s.ends for s in ranks[0].streams["a"].shards.shards[:20]]          # maps that are kept count too
print(sum(int(part.docs.sum()) for step in batches for part in step), sum(map(len, ends)))
"""


@pytest.mark.parametrize("files", [256, 48])
def test_more_shards_than_files_may_be_open(tmp_path, files):
    """Two sources of 600 shards, three loaders in a process: `ulimit -n 256`, and fewer than the loader would keep."""
    pytest.importorskip("resource")
    for name in "ab":
        make_source(tmp_path, 600, 600, 20, name)
    loader = MixtureLoader(tmp_path, ["a", "b"], 1 << 20)
    right = sum(int(loader.next_batch(0, {"a": 1, "b": 1}, 64, 6).docs.sum()) for _ in range(60))
    done = subprocess.run([sys.executable, "-c", READ_ALL, tmp_path, str(files)], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout.split() == [str(right), "20"], done.stderr


def test_memory_does_not_grow_with_the_documents(tmp_path):
    """Two shards of 10^6 documents: one order of 4 bytes a document, no table; 10 MB with the rows."""
    make_source(tmp_path, 2, 2_000_000, tokens=100)
    tracemalloc.start()
    try:
        loader = MixtureLoader(tmp_path, ["web"], 1 << 32, rank=1, world=2)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        loader.next_batch(0, {"web": 1.0}, 8192, 4)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_each_rank_opens_its_share_of_the_shards(tmp_path, monkeypatch):
    """What another rank would find damaged is found here when it is read, and named with its source."""
    make(tmp_path, "a", 12, shard_tokens=1)
    names, real = [], Shard.open
    monkeypatch.setattr(Shard, "open", lambda self: names.append(self.name) or real(self))
    loaders = [MixtureLoader(tmp_path, ["a"], 1001, rank=r, world=4) for r in range(4)]
    assert sorted(names) == sorted(s.name for s in loaders[0].streams["a"].shards.shards) and len(names) == 12
    assert names[:3] == ["a_00000.bin", "a_00004.bin", "a_00008.bin"]
    os.truncate(tmp_path / "a_00001.bin", 1030)
    (tmp_path / "a_00002.bin").unlink()
    one = MixtureLoader(tmp_path, ["a"], 1001, rank=0, world=4)
    for file, what in (("a_00001.bin", "truncated"), ("a_00002.bin", "is missing")):
        with pytest.raises(UserError, match=f"source 'a': .*{file}: .*{what}"):
            one.streams["a"].shards.shards[int(file[6])].document(0)


@pytest.mark.parametrize("shard_tokens", [1 << 28, 9000])
def test_the_order_is_the_permutation_of_seed_name_epoch_and_shard(tmp_path, shard_tokens):
    """Written out with whole tables in memory: 700 documents, more than are looked up at a time."""
    documents = make(tmp_path, "a", 700, shard_tokens=shard_tokens)
    source = Shards(tmp_path, "a")
    key, shards = [3, zlib.crc32(b"a")], [[d.tolist() for d in map(s.document, range(s.n_documents))]
                                          for s in source.shards]
    assert sum(shards, []) == documents
    draw = lambda n, *more: np.random.Generator(np.random.PCG64([*key, *more])).permutation(n)
    right = [shards[s][d] for e in range(2) for s in draw(len(shards), e) for d in draw(len(shards[s]), e, s + 1)]
    ids, docs = Stream(source, 3).take(0, 2 * source.n_tokens)
    assert ids.tolist() == sum(right, [])
    assert docs.tolist() == [k for k, d in enumerate(right) for _ in d]


@pytest.mark.parametrize("listed", [{"file": "../b.bin"}, {"file": "/etc/passwd"}, {"tokens": "9"}, {"file": ["a"]}])
def test_a_manifest_names_files_of_its_folder(folder, listed):
    info = json.loads((folder / "web.json").read_text())
    info["shards"][0] |= listed
    (folder / "web.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="web.json: corrupt, not a list of shards"):
        open_loader(folder)


# ---- one batch ---------------------------------------------------------------------------------------------

def test_make_batch_by_hand():
    """
    T = 4, one token of look-ahead. Row 0 holds documents 7 7 | 8 8 (8 goes on), row 1 is one document 9
    throughout: positions 0 1 0 1 and 0 1 2 3; bounds first 0 0 2 2 and 0 0 0 0, end 2 2 4 4 and 4 4 4 4.
    """
    ids, docs = np.arange(10).reshape(2, 5), np.array([[7, 7, 8, 8, 8], [9, 9, 9, 9, 3]])
    b = make_batch(ids, docs, 4)
    assert b.positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert b.bounds.tolist() == [[[0, 0, 2, 2], [0] * 4], [[2, 2, 4, 4], [4] * 4]] and b.bounds.dtype == torch.int32
    assert b.ids.dtype == torch.int64 and b.ids.shape == (2, 5)
    free = make_batch(ids, docs, 4, mask_documents=False)
    assert free.positions.tolist() == [[0, 1, 2, 3]] * 2 and free.bounds.tolist() == [[[0] * 4] * 2, [[4] * 4] * 2]
    second = b.rows(1, 2)
    assert second.bounds.tolist() == [[[0] * 4], [[4] * 4]] and second.ids.tolist() == [[5, 6, 7, 8, 9]]


def test_boundaries_are_where_documents_end(folder):
    """Position 0 right after each EOS, docs change there and nowhere else, look-ahead included."""
    b = open_loader(folder).next_batch(0, MIX, 64, 12)
    assert b.ids.shape == b.docs.shape == (12, 64 + 3) and b.positions.shape == (12, 64)
    after_eos = b.ids[:, :-1] == EOS
    assert torch.equal(b.docs[:, 1:] != b.docs[:, :-1], after_eos)
    assert torch.equal(b.positions[:, 1:] == 0, after_eos[:, :63])
    starts = torch.nonzero(b.positions.flatten() == 0).flatten().tolist()
    cuts = torch.tensor([*starts, 12 * 64], dtype=torch.int32)
    assert torch.equal(b.bounds, doc_bounds(cuts, 12, 64)), "as the kernels' own function has them"


def test_micro_batches_are_the_rows_of_the_batch(folder):
    b = open_loader(folder).next_batch(0, MIX, 32, 10)
    parts = [b.rows(lo, lo + 5) for lo in (0, 5)]
    assert torch.equal(torch.cat([p.ids for p in parts]), b.ids)
    for lo, p in zip((0, 5), parts, strict=True):
        again = make_batch(p.ids.numpy(), p.docs.numpy(), 32)
        assert torch.equal(p.bounds, again.bounds) and torch.equal(p.positions, again.positions)
        assert p.sources == b.sources[lo:lo + 5]


# ---- the stream --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shard_tokens", [1 << 28, 300])
def test_each_epoch_holds_each_document_once_in_a_new_order(tmp_path, shard_tokens):
    documents = make(tmp_path, "a", 100, shard_tokens=shard_tokens)
    stream = Stream(Shards(tmp_path, "a"), seed=1)
    orders = []
    for epoch in range(3):
        ids, docs = stream.take(epoch * stream.n_tokens, stream.n_tokens)
        pieces = [p.tolist() for p in np.split(ids, np.flatnonzero(np.diff(docs)) + 1)]
        assert sorted(pieces) == sorted(documents)
        assert docs.tolist() == sorted(docs.tolist()) and docs[0] == epoch * 100
        orders.append(pieces)
    assert orders[0] != orders[1] != orders[2] != documents
    other = Stream(Shards(tmp_path, "a"), seed=2).take(0, stream.n_tokens)[0]
    assert other.tolist() != sum(orders[0], [])


def test_any_slice_equals_the_long_read(tmp_path):
    """Random access over shard and epoch borders, and reads longer than the whole source."""
    make(tmp_path, "a", 30, shard_tokens=200)
    stream, r = Stream(Shards(tmp_path, "a"), seed=0), np.random.default_rng(0)
    ids, docs = stream.take(0, 5 * stream.n_tokens)
    for _ in range(100):
        at, n = int(r.integers(0, 4 * stream.n_tokens)), int(r.integers(1, stream.n_tokens))
        got = Stream(stream.shards, 0).take(at, n)
        assert np.array_equal(got[0], ids[at:at + n]) and np.array_equal(got[1], docs[at:at + n])


def test_a_source_of_one_document_still_has_boundaries(tmp_path):
    """The end of epoch 0 meets the same document again: another number, or the model would attend across."""
    write_source(tmp_path, "a", [[1, 2, EOS]], 1001)
    b = MixtureLoader(tmp_path, ["a"], 1001).next_batch(0, {"a": 1}, 8, 1)
    assert b.ids.tolist() == [[1, 2, EOS] * 3] and b.positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]


# ---- the mixture -------------------------------------------------------------------------------------------

def test_rows_continue_each_other(folder):
    """Row k+1 of a source starts T tokens after row k; the look-ahead is the start of the next row."""
    loader, last = open_loader(folder), {}
    for _ in range(20):
        b = loader.next_batch(0, MIX, 50, 8)
        for row, source in zip(b.ids.tolist(), b.sources, strict=True):
            if source in last:
                assert row[:3] == last[source][50:]
            last[source] = row


def test_proportions_are_exact_at_every_row(folder):
    """Deficit rule: after every row each source is within one row of its share; not only in the mean."""
    loader, counts = open_loader(folder), dict.fromkeys(MIX, 0)
    for n in range(1, 501):
        counts[loader.next_batch(0, MIX, 10, 1).sources[0]] += 1
        assert all(abs(counts[s] - MIX[s] * n) <= 1 for s in MIX), (n, counts)
    assert counts == {"web": 150, "maths": 250, "code": 100}
    assert loader.epochs() == {s: 10 * counts[s] / loader.streams[s].n_tokens for s in MIX}


def test_weights_need_not_add_up_and_zero_is_never_taken(folder):
    loader = open_loader(folder)
    b = loader.next_batch(0, {"web": 30, "maths": 10, "code": 0}, 10, 40)
    assert sorted(b.sources).count("web") == 30 and "code" not in b.sources


@pytest.mark.parametrize("cut", [0, 1, 7, 13])
def test_resume_is_exact(folder, cut):
    """
    Stop after `cut` batches, through JSON, go on in a new process' loader: the same batches, over a stage
    change.
    """
    stages = [(0, MIX, 32, 5)] * 8 + [(1, {"maths": .9, "web": .1}, 64, 3)] * 8

    def run(loader, todo):
        return [loader.next_batch(*step) for step in todo]
    whole = run(open_loader(folder), stages)
    first = open_loader(folder)
    run(first, stages[:cut])
    second = open_loader(folder)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for a, b in zip(whole[cut:], run(second, stages[cut:]), strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.docs, b.docs) and a.sources == b.sources


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_reads_the_same_batch(folder, world):
    """
    Also when the batch does not divide: 10 rows over 3, 4 or 8 ranks, over several steps and a resume by rank
    0's state.
    """
    one, ranks = open_loader(folder), [open_loader(folder) for _ in range(world)]
    for step in range(4):
        whole = one.next_batch(step // 2, MIX, 32, 10)
        parts = [r.next_batch(step // 2, MIX, 32, 10, rank, world) for rank, r in enumerate(ranks)]
        assert torch.equal(torch.cat([p.ids for p in parts]), whole.ids)
        assert sum((p.sources for p in parts), ()) == whole.sources
    assert all(r.state_dict() == one.state_dict() for r in ranks)


def test_a_new_stage_keeps_the_cursors_and_may_change_T(folder):
    loader = open_loader(folder)
    loader.next_batch(0, MIX, 32, 20)
    taken = dict(loader.taken)
    b = loader.next_batch(1, {"maths": 1.0}, 128, 1)
    assert loader.here == {"web": 0, "maths": 1, "code": 0}
    assert loader.taken["maths"] == taken["maths"] + 128
    expected = loader.streams["maths"].take(taken["maths"], 131)[0]
    assert b.ids[0].tolist() == expected.tolist()


# ---- what is refused ---------------------------------------------------------------------------------------

def test_errors_say_what_would_be_right(folder, tmp_path):
    with pytest.raises(ValueError, match="source 'wbe'.*sources there: code, maths, web"):
        MixtureLoader(folder, ["wbe"], 1001)
    with pytest.raises(ValueError, match="mix names source 'books', the loader .* web, maths, code"):
        open_loader(folder).next_batch(0, {"web": .5, "books": .5}, 32, 4)
    with pytest.raises(ValueError, match="token id 1000, the model's vocabulary ends at 999"):
        MixtureLoader(folder, ["web"], 1000)
    with pytest.raises(ValueError, match="seq_len = 64 is longer than the model's context, max_seq_len = 32"):
        open_loader(folder, max_seq_len=32).next_batch(0, MIX, 64, 4)
    with pytest.raises(ValueError, match="needs weights >= 0"):
        open_loader(folder).next_batch(0, {"web": 0.0}, 32, 4)
    with pytest.raises(ValueError, match="no sources named"):
        MixtureLoader(folder, [], 1001)
    write_source(tmp_path / "e", "empty", [], 1001)
    with pytest.raises(ValueError, match="source 'empty' .* is empty"):
        MixtureLoader(tmp_path / "e", ["empty"], 1001)


def test_resume_on_other_data_is_refused(folder):
    state = open_loader(folder).state_dict()
    make(folder, "maths", 61, seed=1)
    with pytest.raises(ValueError, match="source 'maths' is not the one the saved run was reading"):
        open_loader(folder).load_state_dict(state)
    make(folder, "maths", 60, seed=1)
    with pytest.raises(ValueError, match="the saved run used seed 0, this one 5"):
        open_loader(folder, seed=5).load_state_dict(state)
    open_loader(folder).load_state_dict(state)
