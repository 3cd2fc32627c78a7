"""URL keys, MinHash against exact Jaccard, decontamination at 15 / 16 words and of short texts."""
import random

import numpy as np
import pytest

from data.decontaminate import build_index, contaminated
from data.dedup import (
    WORD,
    band_keys,
    canonical_url,
    jaccard,
    near_duplicates,
    shingle_hashes,
    shingles,
    signatures,
    windows,
    word_hashes,
)


@pytest.mark.parametrize("url", [
    "https://www.A.org/x/", "http://a.org/x/index.html", "http://a.org/x;jsessionid=1F", "http://a.org:80/x#top", "http://user@a.org/x",
    "http://a.org/x?utm_source=mail&fbclid=9", "HTTPS://A.ORG/x"])
def test_spellings_of_one_address(url):
    assert canonical_url(url) == "a.org/x"


def test_different_addresses_stay_apart():
    """Paths keep their case and their other parts, real query fields count, their order does not."""
    assert canonical_url("http://a.org/X") != canonical_url("http://a.org/x")
    assert canonical_url("http://a.org/x?p=1&q=2") == canonical_url("http://a.org/x?q=2&p=1") == "a.org/x?p=1&q=2"
    assert canonical_url("http://a.org/x?p=1") != canonical_url("http://a.org/x?p=2")
    assert canonical_url("http://a.org/indexes") == "a.org/indexes"


@pytest.mark.parametrize("a, b", [
    ("doc#0", "doc#1"), ("dQw4w9WgXcQ", "DQW4W9WGXCQ"), ("/d/c#1.txt", "/d/c#2.txt"), ("setup.py", "setup.py"),
    ("ftp://a.org/1", "ftp://a.org/1"), ("http://[link removed]/x", "http://[link removed]/x"), ("http://[::1", ""),
    ("urn:uuid:1", "urn:uuid:1"), ("http://", "https:///x"), ("C:\\a\\b.txt", "C:\\a\\b.txt"), ("", " ")])
def test_what_is_no_address_has_no_key(a, b):
    """So nothing is taken for its duplicate; nor does a broken address end the run."""
    assert canonical_url(a) == canonical_url(b) == ""


@pytest.mark.parametrize("a, b", [
    ("https://slashdot.org/article.pl?sid=24/01", "https://slashdot.org/article.pl?sid=24/02"),
    ("http://a.org/?ref=main", "http://a.org/?ref=dev"), ("http://a.org/talk?sessionid=3", "http://a.org/talk"),
    ("https://app.org/#!/a", "https://app.org/#!/b"), ("http://a.ru/?q=%C4", "http://a.ru/?q=%D6"),
    ("http://a.org/?a=1&a=2", "http://a.org/?a=2&a=1"), ("http://a.org/?id=", "http://a.org/"),
    ("https://a.org:8080/", "https://a.org/"), ("http://a.org/%2F", "http://a.org/")])
def test_what_may_name_the_page_stays(a, b):
    assert "" != canonical_url(a) != canonical_url(b)


def test_jaccard_by_hand():
    """
    "a b c d e f" has the 5-word shingles abcde, bcdef; "a b c d e g" has abcde, bcdeg: 1 common of 3.
    """
    a, b = shingles(["a b c d e f", "A b c d e g"])
    assert len(a) == len(b) == 2
    assert jaccard(a, b) == pytest.approx(1 / 3)
    assert jaccard(*shingles(["one two", "one  Two"])) == 1.0 and [len(x) for x in shingles(["", "a"])] == [0, 1]


def corpus(n: int, seed: int) -> tuple[list[str], list[tuple[int, int]]]:
    """n random texts of 60-200 Zipf words, then copies of some with 0.5 to 12% of the words changed -> texts, pairs."""
    rng = np.random.Generator(np.random.PCG64(seed))
    words = [f"w{i}" for i in range(5000)]
    p = 1 / np.arange(1, 5001)
    texts = [list(rng.choice(words, rng.integers(60, 200), p=p / p.sum())) for _ in range(n)]
    pairs = []
    for i in range(0, n, 4):
        copy = list(texts[i])
        for at in rng.choice(len(copy), max(1, int(len(copy) * rng.choice([0.005, 0.02, 0.05, 0.12]))), replace=False):
            copy[at] = words[rng.integers(5000)]
        pairs.append((i, len(texts)))
        texts.append(copy)
    return [" ".join(t) for t in texts], pairs


def test_minhash_finds_what_exact_jaccard_finds():
    """
    Of pairs with J >= .8 at least 95% are found (the bands promise 92% at .8, 99.97% at .9), of those under .7 none is
    removed, and unrelated texts are never removed.
    """
    texts, pairs = corpus(800, 0)
    root = near_duplicates(texts)
    exact = {pair: jaccard(*shingles([texts[pair[0]], texts[pair[1]]])) for pair in pairs}
    high = [p for p, j in exact.items() if j >= 0.8]
    low = [p for p, j in exact.items() if j < 0.7]
    assert len(high) > 50 and len(low) > 20
    assert np.mean([root[b] == a for a, b in high]) >= 0.95
    assert [p for p in low if root[p[1]] != p[1]] == []
    assert all(root[i] == i for i in range(800))  # the first of a cluster is the one that stays


def test_signatures_estimate_jaccard():
    """
    The share of equal rows is an unbiased estimate of J with standard error sqrt(J (1-J) / 112) <= .047 each: over 200
    pairs the mean error is under .01. Multiply-shift hashes without a finaliser fail this.
    """
    texts, pairs = corpus(800, 1)
    sets = shingles(texts)
    s = signatures(sets)
    assert s.shape == (1000, 112) and s.dtype == np.uint32
    error = [(s[a] == s[b]).mean() - jaccard(sets[a], sets[b]) for a, b in pairs]
    assert abs(np.mean(error)) < 0.01 and np.std(error) < 0.06
    assert (s[:300] == s[300:600]).mean() < 0.1  # unlike texts share few rows


def test_band_keys():
    """Equal bands give equal keys, one changed row changes exactly its own band's key."""
    s = np.arange(224, dtype=np.uint32).reshape(2, 112)
    s[1] = s[0]
    s[1, 17] += 1  # row 17 is in band 2
    assert (np.nonzero(band_keys(s)[0] != band_keys(s)[1])[0] == [2]).all()


def test_chain_of_copies_is_one_cluster_and_empty_input_is_fine():
    base = [f"w{i}" for i in range(100)]
    chain = [" ".join(base[:60 + 4 * k]) for k in range(6)]
    assert set(near_duplicates(chain)) == {0}
    assert near_duplicates([]).tolist() == [] and near_duplicates([""]).tolist() == [0]


def template_pages(n: int, copies: int, r: random.Random) -> list[str]:
    """
    n pages of one template (200 words that all share, 60 of their own: J = .6 to each other), and copies of the first
    `copies` of them with two words changed (J = .9), in random order.
    """
    word = lambda: f"w{r.randrange(10**6)}"
    shared = [word() for _ in range(200)]
    pages = [shared[:100] + [word() for _ in range(60)] + shared[100:] for _ in range(n)]
    for page in pages[:copies]:
        pages.append([word() if i in (70, 130) else w for i, w in enumerate(page)])
    r.shuffle(pages)
    return [" ".join(p) for p in pages]


@pytest.mark.parametrize("seed", range(3))
def test_what_goes_is_like_a_text_that_stays(seed):
    """
    Template pages are candidates of each other by the thousand and none is like another. Every planted copy goes, and
    nothing else; the text that stays for it is like it, by the exact sets.
    """
    texts = template_pages(400, 60, random.Random(seed))
    root = near_duplicates(texts)
    gone = np.flatnonzero(root != np.arange(len(texts)))
    grams = lambda t: {tuple(t.split()[i:i + 5]) for i in range(len(t.split()) - 4)}
    pairs = [(grams(texts[g]), grams(texts[root[g]])) for g in gone]
    exact = [len(a & b) / len(a | b) for a, b in pairs]
    assert len(gone) == 60 and min(exact) >= 0.7
    assert (root[root[gone]] == root[gone]).all() and (root[gone] < gone).all()


@pytest.mark.parametrize("low, high", [(0x4E00, 0x9F00), (0x3041, 0x3096), (0x0E01, 0x0E2E), (0x1780, 0x17A2)],
                         ids=["Han", "Kana", "Thai", "Khmer"])
def test_scripts_without_spaces(low, high):
    """
    600 characters without a space, one in 100 changed: all copies found, no other text goes. A question of 20
    characters is found inside a longer text, 15 characters of it are not enough.
    """
    r = random.Random(low)
    text = lambda n: "".join(chr(r.randrange(low, high)) for _ in range(n))
    originals = [text(600) for _ in range(40)]
    changed = ["".join(chr(r.randrange(low, high)) if i % 100 == 50 else c for i, c in enumerate(t)) for t in originals]
    assert near_duplicates(originals + changed).tolist() == [*range(40)] * 2
    question = text(20)
    assert contaminated([f"例题{question}?", question[:15] + "x"], build_index([question])).tolist() == [True, False]


def test_ascii_has_the_words_of_every_other_text():
    """The quick way for ASCII (blanks around all marks, then split) against the pattern, on all 128 characters."""
    r = random.Random(0)
    texts = ["".join(map(chr, range(128)))] + ["".join(chr(r.randrange(128)) for _ in range(60)) for _ in range(200)]
    for text in texts:
        words = WORD.findall(text.lower())
        assert word_hashes(text).tolist() == [int(word_hashes(w)[0]) for w in words]


def test_signatures_need_no_sets():
    texts = ["a b c d e f a b c d e f", "", "one", "x y " * 40]
    assert (signatures(shingle_hashes(texts)) == signatures(shingles(texts))).all()
    assert len(shingle_hashes(texts)[0]) == 8 and len(shingles(texts)[0]) == 6


def test_hashes_are_the_same_in_every_process():
    """Known values: a change here makes every stored key and split void."""
    assert word_hashes("Ada, 12").tolist() == word_hashes("ada , 12").tolist()
    assert int(word_hashes("ada")[0]) == 2811677874490880021
    assert int(windows(word_hashes("a b c"), 3)[0]) == 5853666015111585649


# ---- decontamination ------------------------------------------------------------------------------------------------

WORDS = [f"word{i}" for i in range(100)]


def test_sixteen_words_hit_fifteen_do_not():
    heldout = build_index([" ".join(WORDS[:40])])
    doc = lambda n: " ".join(["x"] * 5 + WORDS[10:10 + n] + ["y"] * 5)
    assert contaminated([doc(15), doc(16), doc(30)], heldout).tolist() == [False, True, True]


def test_short_texts_count_where_all_of_them_is_there():
    """
    "What is 17 + 25?" has 6 tokens: a document with all of it is hit, one with a part is not, and two documents with a
    part each are not.
    """
    heldout = build_index(["What is 17 + 25?"])
    docs = ["So: what is 17 + 25 ? It is 42.", "What is 17 + 26?", "what is 17", "+ 25?", "17 + 25 = 42"]
    assert contaminated(docs, heldout).tolist() == [True, False, False, False, False]


def test_against_plain_string_search():
    """100 random texts over 4 words, so that overlaps are many: the same verdicts as a search in joined strings."""
    r = random.Random(0)
    make = lambda n: " ".join(r.choice("abcd") for _ in range(n))
    docs, held = [make(60) for _ in range(100)], [make(n) for n in (3, 7, 7, 9, 20, 40)]
    grams = lambda t, n: {tuple(t.split()[i:i + n]) for i in range(len(t.split()) - n + 1)}
    want = [any(grams(d, min(8, len(h.split()))) & grams(h, min(8, len(h.split()))) for h in held) for d in docs]
    assert contaminated(docs, build_index(held, n=8)).tolist() == want
    assert 5 < sum(want) < 95


@pytest.mark.parametrize("text", ["is", ".", "The end", "42", "是"])
def test_a_held_out_text_of_a_word_or_two_is_not_looked_for(text, capsys):
    """It would remove nearly every document; the note names it."""
    docs = ["This is the end . 42 是 of a page.", "What is a page?"]
    assert not contaminated(docs, build_index([text, "a page that is not there"])).any()
    assert "1 held-out text(s) of fewer than 3 words" in capsys.readouterr().err
    assert contaminated(docs, build_index(["of a page"])).tolist() == [True, False]


def test_nothing_held_out():
    assert contaminated(["a b"], build_index([])).tolist() == [False]
    assert contaminated([], build_index(["a b"])).tolist() == []
    assert build_index(["", "  "]) == {}
