"""The whole pipeline on a small crawl: counts, truth, and the same bytes in another process."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import UserError
from data import corpus
from data.decontaminate import build_index, contaminated
from data.tiny import code, maths, web
from data.tiny.pages import problem_text

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made():
    pairs = corpus.pairs_of
    train = {"maths": pairs(maths.problems(300, "train", 0)), "code": pairs(code.problems(150, "train", 0, tests=0))}
    test = {"maths": pairs(maths.problems(60, "test", 0)), "code": pairs(code.problems(60, "test", 0, tests=0))}
    return train, test, corpus.build(train, test, seed=0, pages=900, books=6, book_words=300)


def test_funnel(made):
    """
    Every step takes what the one before left; 8% URL variants go exactly, most mirrors go, no original goes at dedup
    but for true repeats; advertisements go, encyclopedia pages stay.
    """
    _, _, c = made
    steps = {name: (n, m) for name, n, m, _ in c.funnel}
    main = [s for s in c.funnel if not s[0].startswith(" ") and s[0] != "books"]
    assert all(a[2] == b[1] for a, b in zip(main[:-1], main[1:], strict=True))
    assert steps["crawl"] == (900, 900 + 72 + 72)
    assert steps["URL dedup"] == (1044, 972)
    assert steps["extract (empty pages out)"][1] == 972
    lost = 972 - steps["MinHash dedup, exact Jaccard >= .7"][1]
    assert 55 <= lost <= 130
    assert steps["  rebalance ads"][1] <= 0.1 * steps["  rebalance ads"][0]
    assert steps["  rebalance news"][1] < 0.4 * steps["  rebalance news"][0]
    assert steps["  rebalance encyclopedia"][1] >= 0.9 * steps["  rebalance encyclopedia"][0]
    n, m = steps["decontaminate (16-gram, paragraphs)"]
    assert m < n
    assert "decontaminate" in c.table() and "documents" in c.table()


def test_truth(made):
    """Extraction exact, no leak left, few copies left, most problems there to learn from, each source with its own."""
    train, test, c = made
    assert c.notes["documents whose paragraphs are all as on the page, share"] == 1.0
    assert c.notes["leaks left over"] == 0
    assert c.notes["copies left over"] <= 12
    assert all(v > 0.9 for k, v in c.notes.items() if "verbatim" in k)
    assert c.accuracy["domain"] > 0.95 and c.accuracy["depth"] > 0.85
    heldout = build_index([q for part in test.values() for q, _ in part])
    for source, texts in c.documents.items():
        assert texts and not contaminated(texts, heldout).any(), source
    question, solution = train["maths"][0]
    assert problem_text(question, solution) == f"Problem: {question}\nSolution: {solution}"
    share = lambda texts, mark: sum(mark in x for x in texts) / len(texts)
    assert share(c.documents["maths"], "\\boxed") > 0.8 and share(c.documents["web"], "\\boxed") < 0.02
    assert share(c.documents["code"], "```python") > 0.9
    assert not any("cookie" in x or "All rights reserved" in x for texts in c.documents.values() for x in texts)


def test_leaks_are_planted_and_a_pipeline_without_the_step_keeps_them(made):
    """Control for the test above: the crawl does hold held-out problems."""
    train, test, _ = made
    pages = web.crawl(0, 900, train, test)
    assert sum(p.leak for p in pages) >= 3
    heldout = build_index([q for part in test.values() for q, _ in part])
    leaking = [p.text for p in pages if p.leak]
    assert contaminated(leaking, heldout).all()


def test_same_bytes_in_another_process(made):
    """Nothing depends on hash() or on the order of a set: another PYTHONHASHSEED gives the same documents."""
    program = ("import sys, json, hashlib; from data import corpus\n"
               "train, test = json.load(sys.stdin)\n"
               "t = lambda d: {k: [tuple(x) for x in v] for k, v in d.items()}\n"
               "c = corpus.build(t(train), t(test), seed=0, pages=900, books=6, book_words=300)\n"
               "print(hashlib.sha256(json.dumps(c.documents).encode()).hexdigest())")
    train, test, c = made
    env = dict(os.environ, PYTHONHASHSEED="4242", OMP_NUM_THREADS="1")
    out = subprocess.run([sys.executable, "-c", program], input=json.dumps([train, test]), capture_output=True,
                         text=True, cwd=ROOT, env=env, timeout=120)
    assert out.stdout.strip() == hashlib.sha256(json.dumps(c.documents).encode()).hexdigest(), out.stderr[-500:]


def test_clean_takes_real_records():
    """Records of text without a tagger: URL and near-duplicates go, nothing is re-weighted."""
    long = " ".join(f"word{i}" for i in range(60))
    records = [corpus.Record("http://a.org/1", text=long), corpus.Record("http://www.a.org/1/", text="other words"),
               corpus.Record("http://b.org/2", text=long + " end"),
               corpus.Record("http://c.org/3", html="<p>held out text</p>"),
               corpus.Record("http://c.org/4", html="<nav>menu</nav>")]
    kept, funnel, accuracy = corpus.clean(records, ["Held out text"], None)
    assert [r.url for r in kept] == ["http://a.org/1"] and accuracy == {}
    assert [(n, m) for _, n, m, _ in funnel] == [(5, 4), (4, 3), (3, 2), (2, 2), (2, 2), (2, 1)]


def test_bad_input():
    with pytest.raises(UserError, match="unknown source 'math'"):
        corpus.build({"math": []})
    with pytest.raises(UserError, match="no maths page"):
        web.crawl(0, 1, {"maths": [("a", "b")]})


def test_a_step_that_is_left_out_is_left_out():
    """What the claims on the pipeline compare: boilerplate stays without extraction, copies without dedup."""
    page = lambda i, text: f"<html><body><nav>Home Contact</nav><article><p>{text}</p></article></body></html>"
    text = "The river Elm is 120 miles long and runs past the old mill, the market and the school of the town. " * 4
    crawl = [corpus.Record(f"http://x.org/{i}", html=page(i, text)) for i in range(3)]
    fresh = lambda: [corpus.Record(r.url, html=r.html) for r in crawl]
    kept, funnel, _ = corpus.clean(fresh(), [], None)
    assert len(kept) == 1 and "Contact" not in kept[0].text
    kept, _, _ = corpus.clean(fresh(), [], None, without=["dedup"])
    assert len(kept) == 3
    kept, _, _ = corpus.clean(fresh(), [], None, without=["extract"])
    assert len(kept) == 1 and "Contact" in kept[0].text
    kept, funnel, _ = corpus.clean(fresh(), [], None, without=["rebalance"])
    assert len(kept) == 1 and not any("rebalance" in step for step, *_ in funnel)
