"""Tags every document with a domain and three scores; tags set how often a document is sampled (report
section 2.1).

The report fine-tunes small language models as taggers, because heuristic rules throw away good maths and
code pages. This is the smallest honest equivalent: hashed 1- and 2-grams in an EmbeddingBag and four linear
heads (domain; quality, reasoning depth and ad-ness from 0 to 3), trained on a teacher's labels: the
generator's truth, or a JSONL file {"text", "domain", "quality", "depth", "ad"} from any labeller. It sees
words, not their order, so it counts steps of reasoning worse than a language model would. Accuracy is
always measured on labels that were kept out of training.

    python -m data.tag labels.jsonl         # trains, prints held-out accuracy
    docs/data.md has the accuracies on the tiny world
"""

import hashlib
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configurator import UserError, one_line
from data.dedup import mix, word_hashes
from data.jsonl import line_of, read_jsonl

DOMAINS = ("encyclopedia", "forum", "maths", "code", "books", "news", "ads", "jobs", "shallow")
SCORES = ("quality", "depth", "ad")
BUCKETS, WIDTH, WORDS = 1 << 14, 24, 200  # table rows, embedding size, words read of a document

# how many copies of a document of a domain are wanted, before its scores count [ours; the report gives none]
DOMAIN_WEIGHT = {
    "encyclopedia": 1.0,
    "forum": 1.25,
    "maths": 1.0,
    "code": 1.0,
    "books": 1.0,
    "news": 0.25,
    "ads": 0.02,
    "jobs": 0.1,
    "shallow": 0.02,
}


@dataclass(frozen=True)
class Tags:
    """domain: one of DOMAINS; quality, depth (of reasoning), ad: 0 to 3."""

    domain: str
    quality: int
    depth: int
    ad: int


class Tagger(nn.Module):
    """Mean of hashed n-gram embeddings -> logits: domain [B, 9] and three scores [B, 4] each."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(BUCKETS, WIDTH, mode="mean")
        self.heads = nn.ModuleList([nn.Linear(WIDTH, len(DOMAINS))] + [nn.Linear(WIDTH, 4) for _ in SCORES])
        nn.init.normal_(self.bag.weight, std=0.1)

    def forward(self, features: list[np.ndarray]) -> list[torch.Tensor]:
        flat = torch.from_numpy(np.concatenate(features))  # [sum of lengths]
        offsets = torch.tensor(np.cumsum([0] + [len(f) for f in features[:-1]]))  # [B]
        x = self.bag(flat, offsets)  # [B, WIDTH]
        return [head(x) for head in self.heads]  # [B, 9], 3 x [B, 4]


def features(text: str) -> np.ndarray:
    """Bucket numbers of the first 200 words and of their neighbours in pairs -> int64 [<= 399]; never
    empty."""
    h = word_hashes(text[: WORDS * 12])[:WORDS]
    grams = np.concatenate([h, mix(h[:-1] * np.uint64(3) + h[1:])]) if len(h) else np.zeros(1, np.uint64)
    return (grams % np.uint64(BUCKETS)).astype(np.int64)


def unit(key: str, salt: str = "") -> float:
    """A number in [0, 1) from a document's id: the same in every process and on every run."""
    return int.from_bytes(hashlib.blake2b(f"{salt}{key}".encode(), digest_size=8).digest(), "little") / 2**64


def train(
    texts: list[str], labels: list[Tags], seed: int = 0, epochs: int = 6
) -> tuple[Tagger, dict[str, float]]:
    """Fits a tagger on 80% of the labelled texts -> (tagger, accuracy on the other 20%). The split is by
    the text itself, so copies of a text are never on both sides. ValueError for an unknown domain or a
    score outside 0..3."""
    if len(texts) < 10:
        raise UserError(f"tagger: {len(texts)} labelled texts, need at least 10")
    for i, t in enumerate(labels):
        if t.domain not in DOMAINS or not all(0 <= getattr(t, s) <= 3 for s in SCORES):
            raise UserError(
                f"tagger label {i}: {t}: domain must be one of {', '.join(DOMAINS)}, scores 0..3"
            )
    feats = [features(t) for t in texts]
    target = torch.tensor([[DOMAINS.index(t.domain), t.quality, t.depth, t.ad] for t in labels])  # [n, 4]
    held = [i for i, t in enumerate(texts) if unit(t, "tag-split") < 0.2] or [0]
    fit = np.array([i for i in range(len(texts)) if i not in set(held)])
    generator = np.random.Generator(np.random.PCG64(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tagger = Tagger()
    opt = torch.optim.Adam(tagger.parameters(), lr=0.02)
    for _ in range(epochs):
        order = generator.permutation(fit)
        for start in range(0, len(order), 64):
            batch = order[start : start + 64]
            logits = tagger([feats[i] for i in batch])
            loss = sum(F.cross_entropy(z, target[batch, k]) for k, z in enumerate(logits))
            opt.zero_grad()
            loss.backward()
            opt.step()
    return tagger, accuracy(tagger, [texts[i] for i in held], [labels[i] for i in held])


@torch.no_grad()
def tag(tagger: Tagger, texts: list[str], batch: int = 512) -> list[Tags]:
    """Tags of each text, by the largest logit of each head."""
    out = []
    for start in range(0, len(texts), batch):
        best = [z.argmax(1).tolist() for z in tagger([features(t) for t in texts[start : start + batch]])]
        out += [Tags(DOMAINS[d], q, r, a) for d, q, r, a in zip(*best, strict=True)]
    return out


def accuracy(tagger: Tagger, texts: list[str], labels: list[Tags]) -> dict[str, float]:
    """Share of exact hits per head; for the scores also within one point; the largest domain's share as the
    floor."""
    got = tag(tagger, texts)
    pairs = list(zip(got, labels, strict=True))
    out = {
        "n": len(pairs),
        "domain": np.mean([g.domain == t.domain for g, t in pairs]),
        "majority": max(sum(t.domain == d for t in labels) for d in DOMAINS) / len(labels),
    }
    for s in SCORES:
        gap = [abs(getattr(g, s) - getattr(t, s)) for g, t in pairs]
        out |= {s: np.mean([x == 0 for x in gap]), f"{s}±1": np.mean([x <= 1 for x in gap])}
    return {k: float(v) for k, v in out.items()}


def weight(t: Tags) -> float:
    """Wanted copies of a document. Advertisements, news, jobs and shallow pages down; pages with reasoning
    up (report 2.1)."""
    w = DOMAIN_WEIGHT[t.domain] * (0.25 if t.quality == 0 or t.ad >= 2 else 0.7 if t.quality == 1 else 1.0)
    return w * (1.5 if t.depth >= 2 and t.domain in ("encyclopedia", "forum") else 1.0)


def copies(doc_id: str, w: float) -> int:
    """w = 2.3 -> 2 copies, or 3 for the 30% of documents whose id hashes below 0.3; w = 0.25 keeps a
    quarter."""
    return int(w) + (unit(doc_id, "copies") < w - int(w))


def read_labels(path: str) -> tuple[list[str], list[Tags]]:
    """JSONL of a teacher's labels -> (texts, tags). ValueError names the file and the line."""
    texts, labels = [], []
    for n, row in read_jsonl(path, right := "a line needs text, domain, quality, depth, ad"):
        with line_of(path, n, right):
            if not isinstance(row["text"], str):
                raise UserError(f"text = {row['text']!r:.40} should be text")
            if row["domain"] not in DOMAINS:
                raise UserError(f"domain {row['domain']!r} should be one of {', '.join(DOMAINS)}")
            if not all(type(row[s]) is int and 0 <= row[s] <= 3 for s in SCORES):
                raise UserError(f"{', '.join(SCORES)} should be whole numbers from 0 to 3")
            texts.append(row["text"])
            labels.append(Tags(row["domain"], *(row[s] for s in SCORES)))
    return texts, labels


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m data.tag labels.jsonl")
    torch.set_num_threads(1)
    try:
        report = train(*read_labels(sys.argv[1]))[1]
    except ValueError as e:
        raise SystemExit(f"tag error: {e}") from None
    for name, value in report.items():
        print(f"{name:12s} {value:.3f}")


if __name__ == "__main__":
    with one_line():
        main()
