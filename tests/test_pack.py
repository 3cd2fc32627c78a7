"""SFT: best-fit packing, packed batches with boundaries and masks, and the filters of section 3.1."""
import json

import numpy as np
import pytest
import torch

import configurator
from configurator import UserError
from data import sft_data
from data.jsonl import write_jsonl
from data.pack import PackedLoader, best_fit
from data.sft_data import (
    REASONS,
    filter_samples,
    is_incomplete,
    is_mixed,
    load_samples,
    read_samples,
)
from data.shards import write_source
from kernels.attention import doc_bounds
from tokenizer import Tokenizer


def samples(n=60, seed=0, longest=30):
    """Sample k is k, k, k, ... of random length, so that a row says which samples it holds."""
    r = np.random.default_rng(seed)
    return [([k + 1] * n_tokens, r.integers(0, 2, n_tokens).tolist())
            for k, n_tokens in enumerate(r.integers(2, longest, n).tolist())]


def test_best_fit_by_hand():
    """
    T = 10, lengths 6 5 4 3 2 12: 12 is dropped; 6 opens row 0, 5 row 1, 4 fits row 0 (gap 4 is tighter than 5), 3 goes
    to row 1, 2 fills it: 10 + 10 tokens in two rows, nothing wasted.
    """
    assert best_fit([6, 5, 4, 3, 2, 12], 10) == ([[0, 2], [1, 3, 4]], [5])
    assert best_fit([], 10) == ([], [])
    assert best_fit([10, 10], 10) == ([[0], [1]], [])
    assert best_fit([4, 4, 4, 4], 10) == ([[0, 1], [2, 3]], [])


def test_every_sample_is_packed_once_and_rows_are_full():
    r = np.random.default_rng(0)
    lengths = np.minimum(r.lognormal(6, .9, 20_000).astype(int) + 5, 9000)
    rows, dropped = best_fit(lengths, 8192)
    assert sorted([i for row in rows for i in row] + dropped) == list(range(20_000))
    assert dropped == np.flatnonzero(lengths > 8192).tolist()
    sums = np.array([lengths[row].sum() for row in rows])
    assert sums.max() <= 8192 and sums.sum() / (len(rows) * 8192) > 0.995      # measured 99.9% here


def test_rows_hold_whole_samples_with_their_own_positions_and_mask():
    """
    For each sample of a row: contiguous, positions from 0, its own document number, its own mask but for its first
    token (nothing in the sample predicts that one). Padding is never trained on and is a document of its own.
    """
    data = samples()
    loader = PackedLoader(data, 64, pad_id=0, n_mtp=2)
    b = loader.next_batch(len(loader.rows))
    found = []
    for ids, docs, mask, row in zip(b.ids, b.docs, b.mask, range(len(b.ids)), strict=True):
        assert ids.shape == docs.shape == mask.shape == (67,)
        for d in range(int(docs.max()) + 1):
            at = torch.nonzero(docs == d).flatten()
            k = int(ids[at[0]]) - 1
            assert ids[at].tolist() == data[k][0] and at.tolist() == list(range(at[0], at[0] + len(at)))
            assert mask[at].tolist() == [False, *map(bool, data[k][1][1:])]
            assert b.positions[row, at].tolist() == list(range(len(at)))
            found.append(k)
        assert not mask[docs < 0].any() and (ids[docs < 0] == 0).all() and (docs[64:] < 0).all()
    assert sorted(found) == list(range(60))
    cuts = torch.tensor([*torch.nonzero(b.positions.flatten() == 0).flatten().tolist(), b.positions.numel()])
    assert torch.equal(b.bounds, doc_bounds(cuts.int(), *b.positions.shape))


def test_too_long_samples_are_dropped_and_counted():
    loader = PackedLoader([*samples(20), ([9] * 65, [1] * 65)], 64, pad_id=0)
    assert loader.n_dropped == 1 and sum(map(len, loader.rows)) == 20
    assert loader.fill == sum(len(i) for i, _ in samples(20)) / (64 * len(loader.rows))
    with pytest.raises(ValueError, match=r"no sample fits a row of 64 tokens \(1 of 1 are longer\)"):
        PackedLoader([([9] * 65, [1] * 65)], 64, pad_id=0)


def test_epochs_visit_each_row_once_in_a_new_order():
    loader = PackedLoader(samples(200), 64, pad_id=0)
    n = len(loader.rows)
    ids = loader.next_batch(3 * n).ids
    epochs = [sorted(map(tuple, e.tolist())) for e in ids.split(n)]
    assert epochs[0] == epochs[1] == epochs[2] and not torch.equal(ids[:n], ids[n:2 * n])
    assert loader.epochs() == 3


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_and_resume(world):
    one = PackedLoader(samples(200), 64, pad_id=0, seed=3)
    ranks = [PackedLoader(samples(200), 64, pad_id=0, seed=3) for _ in range(world)]
    for step in range(6):                       # goes over the end of the epoch
        if step == 3:
            state = json.loads(json.dumps(ranks[0].state_dict()))
            ranks = [PackedLoader(samples(200), 64, pad_id=0, seed=3) for _ in range(world)]
            for r in ranks:
                r.load_state_dict(state)
        whole = one.next_batch(20)
        parts = [r.next_batch(20, rank, world) for rank, r in enumerate(ranks)]
        for name in ("ids", "docs", "mask", "positions"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    with pytest.raises(ValueError, match="seq_len = 32, the saved run had 64"):
        PackedLoader(samples(200), 32, pad_id=0, seed=3).load_state_dict(one.state_dict() | {"rows": len(
            PackedLoader(samples(200), 32, pad_id=0).rows)})


def test_a_rank_without_rows():
    """One row over four ranks: three of them get an empty batch of the right width, and must not fail."""
    b = PackedLoader(samples(), 64, pad_id=0, n_mtp=1).next_batch(1, rank=0, world=4)
    assert b.ids.shape == (0, 66) and b.positions.shape == (0, 64) and b.bounds.shape == (2, 0, 64)


def test_pack_errors():
    with pytest.raises(ValueError, match="sample 1: 2 ids but 1 mask"):
        PackedLoader([([1], [1]), ([1, 2], [1])], 8, pad_id=0)
    with pytest.raises(ValueError, match="sample 0: token id 50"):
        PackedLoader([([1, 50], [1, 1])], 8, pad_id=0, vocab_size=50)
    with pytest.raises(ValueError, match="max_seq_len = 4"):
        PackedLoader(samples(), 8, pad_id=0, max_seq_len=4)


# ---- filters --------------------------------------------------------------------------------------------------------

def sample(query, answer, **more):
    user, assistant = {"role": "user", "content": query}, {"role": "assistant", "content": answer}
    return {"messages": [user, assistant], **more}


GOOD = "<think>\nadd\n</think>\n\nThe answer is \\boxed{4}."


@pytest.mark.parametrize("answer, bad", [
    (GOOD, False), ("4", False), ("```python\nx\n```", False), ("", True), ("  \n", True),
    ("<think>\nno end", True), ("no start</think> x", True), ("</think><think> x", True),
    ("<think>\na\n</think>\n\n", True), ("<think>a</think><think>b</think>c", True), ("```python\nx", True),
    ("so \\boxed{\\frac{1}{2}", True), ("so \\boxed{\\frac{1}{2}}", False),
])
def test_incomplete(answer, bad):
    assert is_incomplete(sample("q", answer)) is bad


def test_incomplete_by_its_own_account_or_without_an_answer():
    assert is_incomplete(sample("q", GOOD, finish_reason="length"))
    assert is_incomplete({"messages": [{"role": "user", "content": "q"}]})


@pytest.mark.parametrize("text, bad", [
    ("Let's 考虑 the case", True), ("Let us consider the case", False), ("", False), ("123 + 456", False),
    ("使用 Python 的 list 来解决这个问题。", False), ("これは日本語の文章です。漢字もある。", False),
    ("Сначала add the numbers вместе", True), ("α + β = γ and x, y", False),
    ("Let $考$ be `变量`: ```\n中文\n``` done, the answer is x", False),
    ("naïve café Müller", False), ("한국어 문장 입니다 그리고 here are many English words too", True),
])
def test_mixed_language(text, bad):
    """By hand, the first: words Let, the, case and characters 考, 虑: 2 of 5 foreign. (Let's is Let + a lone s.)"""
    assert is_mixed(text) is bad


def test_filters_count_each_reason_in_order():
    rows = [sample("in the test set", GOOD), sample("in the test set", ""), sample("a", "<think>\nx"),
            sample("b", "Let's 考虑 it"), sample("c", GOOD), sample("c", GOOD),
            *[sample(" D  d" if k % 2 else "d d", f"answer {k}") for k in range(11)]]
    kept, dropped = filter_samples(rows, is_contaminated=lambda query: "test set" in query)
    assert dropped == {"contaminated": 2, "incomplete": 1, "mixed": 1, "duplicate": 1, "over_cap": 3}
    assert tuple(dropped) == REASONS and len(kept) + sum(dropped.values()) == len(rows)
    assert kept == [rows[4], *rows[6:14]]


def test_the_cap_keeps_the_best_scored():
    rows = [sample("q", f"answer {k}", score=k % 5) for k in range(10)]
    kept, dropped = filter_samples(rows, max_per_query=3)
    assert kept == [rows[3], rows[4], rows[9]] and dropped["over_cap"] == 7


def test_answers_cut_at_the_length_limit(tmp_path):
    """SFT drops them. MTP layers learn from them too, but not an end token that the model never wrote."""
    tok = Tokenizer.load("tiny")
    row = {"prompt": "What is 1+2?", "answers": ["<think>1+", "3"], "finish": ["length", "stop"]}
    write_jsonl(tmp_path / "a.jsonl", [row])
    chats = [tok.chat([{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}])
             for text in row["answers"]]
    as_lists = lambda samples: [(ids.tolist(), mask.tolist()) for ids, mask in samples]
    assert as_lists(load_samples(tmp_path / "a.jsonl", tok)[0]) == chats[1:]
    (ids, mask), whole = as_lists(load_samples(tmp_path / "a.jsonl", tok, cut=True)[0])
    assert (ids, whole) == (chats[0][0], chats[1])
    assert [i for i, (now, before) in enumerate(zip(mask, chats[0][1], strict=True)) if now != before] == [ids.index(
        tok.im_end_id, chats[0][1].index(1))]


def test_load_samples(tmp_path):
    """16 words in a row of a held-out question drop the sample, 15 do not; the rest comes out tokenised."""
    words = [f"w{k}" for k in range(20)]
    held = tmp_path / "test.jsonl"
    held.write_text(json.dumps({"id": 1, "question": " ".join(words)}) + "\n")
    rows = [sample("x " + " ".join(words[:16]), GOOD), sample("x " + " ".join(words[:15]), GOOD)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    tok = Tokenizer.load("tiny")
    got, report = load_samples(tmp_path / "a.jsonl", tok, held)
    assert [(ids.tolist(), mask.tolist()) for ids, mask in got] == [tok.chat(rows[1]["messages"])]
    assert report.startswith("1 of 2 kept; dropped: contaminated 1,")
    assert len(load_samples(tmp_path / "a.jsonl", tok)[0]) == 2
    write_jsonl(tmp_path / "a.jsonl", rows[:1])
    with pytest.raises(ValueError, match="none of 1 samples is left"):
        load_samples(tmp_path / "a.jsonl", tok, held)
    held.write_text("{}\n")
    with pytest.raises(ValueError, match='test.jsonl:1: .*should be JSON with "question"'):
        load_samples(tmp_path / "a.jsonl", tok, held)


def test_tokenised_shards_are_the_same_samples(tmp_path, capsys):
    """The command's folder of shards packs to the same batches as the JSONL file itself."""
    rows = [sample(f"question {k}", f"answer {k} " * (k % 7 + 1)) for k in range(100)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    command = lambda *words: sft_data.main(configurator.load(sft_data.Config, [str(word) for word in words]))
    command(tmp_path / "a.jsonl", tmp_path / "shards", "--workers=2")
    assert "100 of 100 kept" in capsys.readouterr().out
    tok = Tokenizer.load("tiny")
    one, two = (PackedLoader(load_samples(tmp_path / p, tok)[0], 128, tok.eos_id, vocab_size=1024)
                for p in ("a.jsonl", "shards"))
    a, b = one.next_batch(30), two.next_batch(30)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.mask, b.mask) and a.mask.any()
    command(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--max_per_query=8")
    assert read_samples(tmp_path / "b.jsonl") == rows
    with pytest.raises(SystemExit, match="error: .*nowhere: No such file"), configurator.one_line():
        command(tmp_path / "nowhere", tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="out is missing; usage: "):
        command(tmp_path / "a.jsonl")
    write_source(tmp_path / "shards", "sft_mask", [[1, 0]], 2)
    with pytest.raises(ValueError, match="sft and sft_mask do not belong together"):
        load_samples(tmp_path / "shards", tok)


def test_files(tmp_path):
    rows = [sample("q", GOOD), sample("é", "中文")]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_samples(tmp_path / "a.jsonl") == rows
    for bad in ("{", '{"text": "x"}', '{"messages": []}', '{"messages": [{"role": "user"}]}', '[1]'):
        (tmp_path / "b.jsonl").write_text(json.dumps(rows[0]) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=r"b.jsonl:2: .*a sample is"):
            read_samples(tmp_path / "b.jsonl")
