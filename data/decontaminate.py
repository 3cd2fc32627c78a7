"""
Removes documents that hold a problem of an evaluation set (report sections 3.1 and 3.2: a 16-gram overlap).

The report does not say what a gram is; ours are lower-cased words and punctuation marks [ours]. A document that shares
16 of them in a row with a held-out text is dropped; 15 are not enough. This rule would never find a held-out text of
fewer than 16 words; such a text counts when the document holds all of it. One of one or two words is not looked for,
with a note: "is" stands in every document. About 0.5 million words a second on one core.

Where a page holds many worked problems, dropping all of it loses the good ones too. `cut` takes out the paragraph that
holds the overlap and keeps the rest, as GPT-3's cleaning cut a window. The report does not say what it did with long
pages.
"""
import sys

import numpy as np

from data.dedup import mix, roll, windows, word_hashes

N = 16
FEWEST = 3                      # words of a held-out text that is looked for


def build_index(heldout: list[str], n: int = N) -> dict[int, np.ndarray]:
    """
    Window length -> sorted hashes of the held-out windows of that length, uint64: n for long texts, the text's own
    length for a text of fewer words. Texts of fewer than FEWEST words are left out and told on stderr.
    """
    by_length: dict[int, list] = {}
    short = []
    for text in heldout:
        h = word_hashes(text)
        if 0 < len(h) < FEWEST:
            short.append(text)
        elif len(h):
            length = min(n, len(h))
            by_length.setdefault(length, []).append(windows(h, length))
    if short:
        print(f"note: {len(short):,} held-out text(s) of fewer than {FEWEST} words are not looked for, nearly every "
              f"document would hold them: {short[0]!r:.60}", file=sys.stderr)
    return {length: np.unique(np.concatenate(hashes)) for length, hashes in by_length.items()}


def contaminated(texts: list[str], index: dict[int, np.ndarray]) -> np.ndarray:
    """
    bool [len(texts)]: True where a text holds 16 words in a row of a held-out text, or all of a shorter one. index:
    what build_index made of the held-out texts.
    """
    hashes = [word_hashes(t) for t in texts]
    hit = np.zeros(len(texts), bool)
    flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    owner = np.repeat(np.arange(len(texts)), [len(h) for h in hashes])
    total = np.zeros(len(flat), np.uint64)
    for length in range(1, max(index, default=0) + 1):
        total = roll(total, flat, length)                       # all lengths in one pass, each from the one before
        if length not in index or not len(total):
            continue
        keys, w = index[length], mix(total)
        inside = owner[:len(w)] == owner[length - 1:]           # a window must not run over the end of a document
        at = np.minimum(np.searchsorted(keys, w), len(keys) - 1)
        hit[owner[:len(w)][inside & (keys[at] == w)]] = True
    return hit


def cut(text: str, index: dict[int, np.ndarray]) -> str:
    """
    The text without the paragraphs that hold a held-out text; "" when more than half of it would go, or when the
    overlap runs over the end of a paragraph.
    """
    paragraphs = text.split("\n\n")
    hit = contaminated(paragraphs, index)
    rest = "\n\n".join(p for p, bad in zip(paragraphs, hit, strict=True) if not bad)
    return rest if 2 * len(rest) > len(text) and not contaminated([rest], index)[0] else ""
