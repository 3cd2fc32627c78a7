"""The tagger learns a toy distinction, is deterministic, and its tags set exact sampling rates."""
import json

import numpy as np
import pytest
import torch

from data import tag as t


def examples(n: int) -> tuple[list[str], list[t.Tags]]:
    """Texts whose words tell the domain and whose number of "because" tells the depth."""
    texts, labels = [], []
    for i in range(n):
        depth = i % 4
        ad = i % 5 == 0
        words = ["buy", "now", "cheap"] if ad else ["sum", "number", "add"]
        texts.append(f"{' '.join(words)} {i} {i * 7} " + "because " * (3 * depth))
        labels.append(t.Tags("ads" if ad else "maths", 0 if ad else 3, depth, 3 if ad else 0))
    return texts, labels


def test_learns_and_reports_on_unseen_texts():
    """A bag of words tells buy from sum: 100%; four depths by the share of one word: over 80%, majority is 25%."""
    texts, labels = examples(600)
    _, accuracy = t.train(texts, labels, epochs=8)
    assert 80 < accuracy["n"] < 160  # a fifth of the texts was kept out
    assert accuracy["domain"] == 1.0 and accuracy["ad"] == 1.0 and accuracy["depth"] > 0.8
    assert accuracy["majority"] == pytest.approx(0.8, abs=0.1)


def test_wrong_labels_are_not_learned():
    """Control: shuffled labels give held-out accuracy near the majority share, so the split does not leak."""
    texts, labels = examples(600)
    order = np.random.Generator(np.random.PCG64(0)).permutation(600)
    _, accuracy = t.train(texts, [labels[i] for i in order], epochs=8)
    assert accuracy["depth"] < 0.45


def test_deterministic_and_leaves_the_global_generator_alone():
    texts, labels = examples(60)
    state = torch.get_rng_state()
    a, _ = t.train(texts, labels, epochs=1)
    b, _ = t.train(texts, labels, epochs=1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_weights_follow_the_report():
    """Advertisements, news, job posts and shallow pages down, reasoning up (section 2.1)."""
    good, ad = t.Tags("encyclopedia", 3, 1, 0), t.Tags("ads", 0, 0, 3)
    job, news = t.Tags("jobs", 1, 0, 1), t.Tags("news", 1, 0, 0)
    assert t.weight(ad) < 0.01 < t.weight(job) < t.weight(news) < 1 <= t.weight(good)
    assert t.weight(t.Tags("encyclopedia", 3, 2, 0)) == 1.5 * t.weight(good)
    assert t.weight(t.Tags("maths", 3, 3, 0)) == t.weight(t.Tags("code", 3, 3, 0)) == 1.0


def test_copies_by_hand_and_on_average():
    """w = 2.25: two copies of all documents and a third of a quarter of them; the same id always gets the same."""
    got = [t.copies(f"http://a/{i}", 2.25) for i in range(4000)]
    assert set(got) == {2, 3} and np.mean(got) == pytest.approx(2.25, abs=0.03)
    assert t.copies("x", 0.0) == 0 and t.copies("x", 1.0) == 1
    assert [t.copies(f"{i}", 0.25) for i in range(50)] == [t.copies(f"{i}", 0.25) for i in range(50)]
    kept = {i for i in range(500) if t.copies(f"{i}", 0.2)}  # a larger weight keeps what a smaller one kept
    assert kept <= {i for i in range(500) if t.copies(f"{i}", 0.6)}


def test_label_file_and_bad_input(tmp_path):
    texts, labels = examples(20)
    rows = [{"text": x, "domain": y.domain, "quality": y.quality, "depth": y.depth, "ad": y.ad}
            for x, y in zip(texts, labels, strict=True)]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert t.read_labels(str(path)) == (texts, labels)
    path.write_text(json.dumps(rows[0]) + '\n{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"labels.jsonl:2: .*domain"):
        t.read_labels(str(path))
    with pytest.raises(ValueError, match="label 3"):
        t.train(texts, labels[:3] + [t.Tags("poetry", 1, 1, 1)] + labels[4:])
    with pytest.raises(ValueError, match="need at least 10"):
        t.train(texts[:3], labels[:3])


def test_empty_text_can_be_tagged():
    tagger, _ = t.train(*examples(40), epochs=1)
    assert len(t.tag(tagger, ["", "sum"])) == 2 and t.tag(tagger, []) == []
