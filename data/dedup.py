"""
Global deduplication: equal addresses first, then MinHash over the extracted text (report section 2.1, "URL dedup and
MinHash").

The report gives no parameters. Ours are FineWeb's [ours]: 5-word shingles, 112 hashes in 14 bands of 8. Two documents
with Jaccard similarity J become a candidate pair with probability

    P(J) = 1 - (1 - J^8)^14        P(.4) = .01    P(.7) = .56    P(.8) = .92    P(.9) = 1.00

Each candidate is then compared exactly with the documents that stay, and removed only when its Jaccard similarity to
one of them is at least .7: every removed document has a text like it in the corpus.

rensa makes the signatures, numpy the band keys (112 bytes a document). Scripts that write no spaces (Chinese, Japanese,
Thai, Lao, Burmese, Khmer) count every character as a word.
"""
import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
import rensa

BANDS, ROWS, SHINGLE, THRESHOLD = 14, 8, 5, 0.7
CHECKS = 64           # documents at most that one is compared with, and that a bucket of equal band keys remembers
# parameters of an address that only say where the reader came from; ref, sid and the like may name the page and stay
TRACKING = re.compile(r"^(?:utm_\w+|fbclid|gclid|dclid|gbraid|wbraid|msclkid|yclid|mc_cid|mc_eid|igshid|mkt_tok|_hsenc|"
                      r"_hsmi|_openstat|phpsessid|jsessionid)$", re.I)
# Thai, Lao, Burmese, Khmer, kana, Han
SPACELESS = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
             "\uff66-\uff9f\U00020000-\U0003ffff")
WORD = re.compile(rf"[^\W{SPACELESS}]+|\S")
# for ASCII text the same by blanks around every other character and str.split, in less than half of the time
APART = [(chr(c), f" {chr(c)} ") for c in range(128) if not re.match(r"[\w\s]", chr(c))]


class Hashes(dict):
    """word -> 8 bytes of blake2b, the same in every process. Forgets all of it at a million words."""

    def __missing__(self, word: str) -> bytes:
        if len(self) >= 1 << 20:
            self.clear()
        digest = self[word] = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
        return digest


HASH_OF = Hashes()


# ---- addresses ------------------------------------------------------------------------------------------------------

def canonical_url(url: str) -> str:
    """
    One key for all the spellings of an address: https://www.A.org/x/?utm_source=m&b=2&a=1#top -> a.org/x?a=1&b=2.

    "" for what is no http(s) address: a path, an id, a broken address. Such a name says nothing about the page, so two
    documents with one name are not duplicates for it. A fragment that begins with ! or / stays: it is the page itself
    where a script draws the page.
    """
    try:
        parts = urlsplit(url.strip())
    except ValueError:                                       # http://[link removed]/x
        return ""
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return ""
    host = re.sub(r"^www\d?\.", "", parts.netloc.lower().rsplit("@", 1)[-1])
    host = re.sub(r":(?:80|443)$", "", host)
    path = re.sub(r";jsessionid=\w*", "", parts.path, flags=re.I)
    path = re.sub(r"/index\.(?:html?|php|aspx?)$", "/", path).rstrip("/")
    # bytes that are not UTF-8 stay what they are: ?q=%C4 and ?q=%D6 are two pages
    query = parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape")
    query = sorted(((k, v) for k, v in query if not TRACKING.match(k)), key=lambda pair: pair[0])
    fragment = "#" + parts.fragment if parts.fragment[:1] in ("!", "/") else ""
    return host + path + ("?" + urlencode(query, errors="surrogateescape") if query else "") + fragment


# ---- hashes of words and of runs of words ---------------------------------------------------------------------------

def word_hashes(text: str) -> np.ndarray:
    """Lower-cased words and punctuation marks -> 64-bit hashes, uint64 [n]."""
    text = text.lower()
    if text.isascii():
        for mark, apart in APART:
            if mark in text:
                text = text.replace(mark, apart)
        words = text.split()
    else:
        words = WORD.findall(text)
    return np.frombuffer(b"".join(map(HASH_OF.__getitem__, words)), "<u8")


def mix(x: np.ndarray) -> np.ndarray:
    """
    The finaliser of splitmix64, uint64 [n] -> uint64 [n]. Without it the permutations of MinHash are visibly
    correlated, and texts that are unlike each other collide.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def roll(total: np.ndarray, h: np.ndarray, n: int) -> np.ndarray:
    """
    Hashes of all runs of n words, before mix(), from those of n - 1 words and the word hashes h:
    total[t] * P + h[t + n - 1] -> uint64 [len(h) - n + 1].
    """
    end = max(0, len(h) - n + 1)
    return total[:end] * np.uint64(0x9E3779B97F4A7C15) + h[n - 1:n - 1 + end]


def windows(h: np.ndarray, n: int) -> np.ndarray:
    """
    Hash of each run of n words: mix(sum_i h[t + i] * P^(n - 1 - i) mod 2^64), uint64 [len(h) - n + 1], empty for a
    text of fewer words.
    """
    total = np.zeros(len(h), np.uint64)
    for i in range(1, n + 1):
        total = roll(total, h, i)
    return mix(total)


# ---- MinHash --------------------------------------------------------------------------------------------------------

def shingle_hashes(texts: list[str]) -> list[np.ndarray]:
    """
    For each text the hashes of its runs of 5 words, in the order of the text and with repeats, uint64 [n]; fewer words
    are one run. Enough for signatures.
    """
    hashes, runs, at = [word_hashes(t) for t in texts], [], 0
    flat = windows(np.concatenate(hashes), SHINGLE) if hashes else np.empty(0, np.uint64)     # of all texts at once
    for h in hashes:
        runs.append(flat[at:at + len(h) - SHINGLE + 1] if len(h) >= SHINGLE else windows(h, max(1, len(h))))
        at += len(h)
    return runs


def shingles(texts: list[str]) -> list[np.ndarray]:
    """For each text the set of its shingle_hashes, sorted, uint64 [n]."""
    ordered = map(np.sort, shingle_hashes(texts))
    return [own[np.append(True, own[1:] != own[:-1])[:len(own)]] for own in ordered]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A and B| / |A or B| of two sorted sets: {1,2,3} and {2,3,4} -> 2/4."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def signatures(sets: list[np.ndarray]) -> np.ndarray:
    """MinHash signatures, uint32 [n, BANDS * ROWS]: the minimum of each of 112 permutations over each set."""
    parts = []
    for start in range(0, len(sets), 10_000):
        part = sets[start:start + 10_000]
        offsets = np.cumsum([0] + [len(s) for s in part]).astype(np.uint64)
        flat = np.concatenate(part) if offsets[-1] else np.empty(0, np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, BANDS * ROWS, 1)
        parts.append(np.array(matrix.to_rows(), dtype=np.uint32))
    return np.concatenate(parts) if parts else np.empty((0, BANDS * ROWS), np.uint32)


def band_keys(signature: np.ndarray) -> np.ndarray:
    """[n, 112] -> uint64 [n, 14]: the 8 rows of a band folded into one key. Equal keys make a candidate pair."""
    keys = np.zeros((len(signature), BANDS), np.uint64)
    for row in signature.reshape(-1, BANDS, ROWS).astype(np.uint64).transpose(2, 0, 1):
        keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + row)
    return keys


def near_duplicates(texts: list[str]) -> np.ndarray:
    """For each text the index of the text that stays for it, int64 [n]; i itself means: keep text i."""
    sets = [s for start in range(0, len(texts), 1000) for s in shingles(texts[start:start + 1000])]
    return clusters(band_keys(signatures(sets)).T, sets.__getitem__, len(sets))


def clusters(bands: Iterable[np.ndarray], shingles_of: Callable[[int], np.ndarray], n: int) -> np.ndarray:
    """
    bands: the keys of each band, uint64 [n] each; shingles_of: document number -> its shingles. -> for each document
    the number of the one that stays for it, int64 [n].

    One pass in document order. Documents that share a band key are in one bucket; a document is compared with the kept
    documents that its buckets know, those with the most common buckets first, and joins the first that is like it. A
    bucket remembers the kept document of each of its members, so that a chain of copies finds its first one. Blind to
    quality, as in the report; the re-weighting by tags after it is not.

    Memory: 53 bytes a document, and up to 770 more for one that shares all of its buckets with another.
    """
    documents, buckets, total = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for keys in bands if n else ():
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]           # [n - 1]: a document and the next have one key
        shared = np.append(same, False)
        shared[1:] |= same                                   # buckets of one document are left out
        number = np.cumsum(np.append(True, ~same)[shared]) + total - 1      # of the bucket
        documents.append(order[shared])
        buckets.append(number)
        total = int(number[-1]) + 1 if len(number) else total
    document, bucket = np.concatenate(documents), np.concatenate(buckets)
    order = np.argsort(document, kind="stable")
    document, bucket = document[order], bucket[order]
    ends = np.flatnonzero(np.append(document[1:] != document[:-1], [True] * (len(document) > 0))) + 1
    # what a bucket knows: the first kept document, and a list of the others where there are any
    root, first, others, start = np.arange(n), array("q", [-1]) * total, {}, 0
    for end in ends.tolist():
        i, mine, start = int(document[start]), bucket[start:end].tolist(), end
        near = Counter(k for b in mine if first[b] >= 0 for k in (first[b], *others.get(b, ())))
        own = shingles_of(i) if near else None
        root[i] = kept = next((k for k, _ in near.most_common(CHECKS) if jaccard(shingles_of(k), own) >= THRESHOLD), i)
        for b in mine:
            if first[b] < 0:
                first[b] = kept
            elif first[b] != kept and kept not in (more := others.setdefault(b, [])) and len(more) < CHECKS:
                more.append(kept)
    return root
