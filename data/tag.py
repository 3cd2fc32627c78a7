"""
Tags every document with a domain and three scores, which decide how often it is sampled (report section 2.1).

The report fine-tunes small language models as taggers, because heuristic rules throw away good maths and code pages.
This is the smallest honest equivalent: hashed words and pairs of words in an EmbeddingBag and four linear heads
(domain; quality, reasoning depth and ad-ness from 0 to 3), trained on the labels of a teacher: the truth of the page
generator, or a JSONL file of any labeller. It sees words, not their order, so it counts steps of reasoning worse than a
language model would. Accuracy is always measured on labels that were kept out of training.

    python -m data.tag labels.jsonl         # lines {"text", "domain", "quality", "depth", "ad"}; held-out accuracy

docs/data.md has the accuracies on the tiny world.
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import configurator
from configurator import UserError
from data.dedup import mix, word_hashes
from data.jsonl import line_of, read_jsonl, whole_file

DOMAINS = ("encyclopedia", "forum", "maths", "code", "books", "news", "ads", "jobs", "shallow")
SCORES = ("quality", "depth", "ad")
BUCKETS, WIDTH, WORDS = 1 << 14, 24, 200     # rows of the table, size of an embedding, words read of a document

# copies of a document that its domain asks for, before its scores count [ours; the report gives no numbers]
DOMAIN_WEIGHT = {"encyclopedia": 1.0, "forum": 1.25, "maths": 1.0, "code": 1.0, "books": 1.0,
                 "news": 0.25, "ads": 0.02, "jobs": 0.1, "shallow": 0.02}


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("labels",)
    labels: str = ""                      # JSONL file of a teacher's labels


@dataclass(frozen=True)
class Tags:
    """What a tagger, or its teacher, says of one document."""
    domain: str      # one of DOMAINS
    quality: int     # 0 to 3
    depth: int       # of the reasoning, 0 to 3
    ad: int          # 0 to 3, 3 = an advertisement


# ---- the model ------------------------------------------------------------------------------------------------------

class Tagger(nn.Module):
    """Mean of hashed n-gram embeddings -> logits of the domain [B, 9] and of the three scores, [B, 4] each."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(BUCKETS, WIDTH, mode="mean")
        self.heads = nn.ModuleList([nn.Linear(WIDTH, len(DOMAINS))] + [nn.Linear(WIDTH, 4) for _ in SCORES])
        nn.init.normal_(self.bag.weight, std=0.1)

    def forward(self, grams: list[np.ndarray]) -> list[Tensor]:
        """grams: ngrams() of B documents."""
        flat = torch.from_numpy(np.concatenate(grams))                              # [sum of lengths]
        offsets = torch.tensor(np.cumsum([0] + [len(g) for g in grams[:-1]]))       # [B]
        x = self.bag(flat, offsets)                                                 # [B, WIDTH]
        return [head(x) for head in self.heads]                                     # [B, 9], 3 x [B, 4]


def ngrams(text: str) -> np.ndarray:
    """Bucket numbers of the first 200 words and of each pair of neighbours -> int64 [<= 399], never empty."""
    h = word_hashes(text[:WORDS * 12])[:WORDS]
    both = np.concatenate([h, mix(h[:-1] * np.uint64(3) + h[1:])]) if len(h) else np.zeros(1, np.uint64)
    return (both % np.uint64(BUCKETS)).astype(np.int64)


def train(texts: list[str], labels: list[Tags], epochs: int = 6) -> tuple[Tagger, dict[str, float]]:
    """
    Fits a tagger on 80% of the labelled texts. -> (tagger, its accuracy on the other 20%). The split is by the hash of
    the text, so copies of a text are never on both sides. UserError for fewer than 10 texts, an unknown domain or a
    score outside 0..3.
    """
    if len(texts) < 10:
        raise UserError(f"tagger: {len(texts)} labelled texts, need at least 10")
    for i, t in enumerate(labels):
        if t.domain not in DOMAINS or not all(0 <= getattr(t, s) <= 3 for s in SCORES):
            raise UserError(f"tagger label {i}: {t}: domain must be one of {', '.join(DOMAINS)}, scores 0..3")
    grams = [ngrams(t) for t in texts]
    target = torch.tensor([[DOMAINS.index(t.domain), t.quality, t.depth, t.ad] for t in labels])    # [n, 4]
    heldout = [i for i, t in enumerate(texts) if unit(t, "tag-split") < 0.2] or [0]
    fit = np.array([i for i in range(len(texts)) if i not in set(heldout)])
    generator = np.random.Generator(np.random.PCG64(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tagger = Tagger()
    optimizer = torch.optim.Adam(tagger.parameters(), lr=0.02)
    for _ in range(epochs):
        order = generator.permutation(fit)
        for start in range(0, len(order), 64):
            batch = order[start:start + 64]
            logits = tagger([grams[i] for i in batch])
            loss = sum(F.cross_entropy(z, target[batch, k]) for k, z in enumerate(logits))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return tagger, accuracy(tagger, [texts[i] for i in heldout], [labels[i] for i in heldout])


@torch.no_grad()
def tag(tagger: Tagger, texts: list[str]) -> list[Tags]:
    """Tags of each text, by the largest logit of each head."""
    found = []
    for start in range(0, len(texts), 512):
        best = [z.argmax(1).tolist() for z in tagger([ngrams(t) for t in texts[start:start + 512]])]
        found += [Tags(DOMAINS[d], q, r, a) for d, q, r, a in zip(*best, strict=True)]
    return found


def accuracy(tagger: Tagger, texts: list[str], labels: list[Tags]) -> dict[str, float]:
    """
    Share of exact hits of each head, for the scores also within one point. "n": texts; "majority": share of the most
    frequent domain, which a tagger that always names this domain would reach.
    """
    pairs = list(zip(tag(tagger, texts), labels, strict=True))
    shares = {"n": len(pairs), "domain": np.mean([t.domain == label.domain for t, label in pairs]),
              "majority": max(sum(label.domain == d for label in labels) for d in DOMAINS) / len(labels)}
    for s in SCORES:
        error = [abs(getattr(t, s) - getattr(label, s)) for t, label in pairs]
        shares |= {s: np.mean([x == 0 for x in error]), f"{s}±1": np.mean([x <= 1 for x in error])}
    return {k: float(v) for k, v in shares.items()}


def save(tagger: Tagger, path: str | Path) -> None:
    """The weights, for the processes that tag the parts of a corpus."""
    with whole_file(path, "wb") as f:
        torch.save(tagger.state_dict(), f)


def load(path: str | Path) -> Tagger:
    """The inverse of save."""
    tagger = Tagger()
    tagger.load_state_dict(torch.load(path, weights_only=True))
    return tagger


# ---- from tags to copies --------------------------------------------------------------------------------------------

def weight(t: Tags) -> float:
    """
    Copies wanted of a document: few of advertisements, news, job posts and shallow pages, more of pages with reasoning
    [report 2.1; the numbers are ours].
    """
    w = DOMAIN_WEIGHT[t.domain] * (0.25 if t.quality == 0 or t.ad >= 2 else 0.7 if t.quality == 1 else 1.0)
    return w * (1.5 if t.depth >= 2 and t.domain in ("encyclopedia", "forum") else 1.0)


def copies(key: str, w: float) -> int:
    """w = 2.3 -> 2 copies, or 3 for the 30% of documents whose key hashes below 0.3; w = 0.25 keeps a quarter."""
    return int(w) + (unit(key, "copies") < w - int(w))


def unit(key: str, salt: str = "") -> float:
    """A number in [0, 1) from a document's key: the same in every process and on every run."""
    return int.from_bytes(hashlib.blake2b(f"{salt}{key}".encode(), digest_size=8).digest(), "little") / 2**64


# ---- labels of a teacher --------------------------------------------------------------------------------------------

def read_labels(path: str) -> tuple[list[str], list[Tags]]:
    """JSONL of a teacher's labels -> (texts, tags). UserError names the file and the line."""
    texts, labels = [], []
    for n, row in read_jsonl(path, hint := "a line needs text, domain, quality, depth, ad"):
        with line_of(path, n, hint):
            if not isinstance(row["text"], str):
                raise UserError(f"text = {row['text']!r:.40} should be text")
            if row["domain"] not in DOMAINS:
                raise UserError(f"domain {row['domain']!r} should be one of {', '.join(DOMAINS)}")
            if not all(type(row[s]) is int and 0 <= row[s] <= 3 for s in SCORES):
                raise UserError(f"{', '.join(SCORES)} should be whole numbers from 0 to 3")
            texts.append(row["text"])
            labels.append(Tags(row["domain"], *(row[s] for s in SCORES)))
    return texts, labels


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    for name, value in train(*read_labels(cfg.labels))[1].items():
        print(f"{name:12s} {value:.3f}")


if __name__ == "__main__":
    configurator.run(main, Config)
