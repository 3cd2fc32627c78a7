"""
Section 2.1's taggers: our bag of n-grams (data/tag.py) beside a tiny MiMo with a classification head.

    python paper/tagger.py                     # out/tagger/tagger.json and a table; some minutes on one core

The report fine-tunes small language models. Here both learn from the same pages, with labels known by construction, and
are measured on the fifth that data/tag.py keeps out. Two crawls:

    template   the toy's pages (data/tiny/web.py)
    varied     pages of paraphrases: many wordings of each sentence, some of them only in held-out pages; things that
               all domains speak of; sentences of other domains mixed in; reasoning told by the order of sentences,
               not by single words; defects that lower the quality

The MiMo is model.py's trunk with the mean of its last states and four linear heads. Each seed draws new crawls, new
weights and a new order. Macro-F1 is the mean over the domains; times are CPU seconds, tokens included.
"""
import json
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import configurator  # noqa: E402
from data import tag as ngrams  # noqa: E402
from data.corpus import pairs_of  # noqa: E402
from data.tag import DOMAINS, SCORES, Tags, unit  # noqa: E402
from data.tiny import code, maths, web  # noqa: E402
from model import MiMo, ModelConfig  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@dataclass(frozen=True)
class Config:
    pages: int = 800                      # labelled pages of each crawl; a fifth is held out
    seeds: int = 3                        # repetitions
    tokens: int = 448                     # first tokens of a page that the MiMo reads
    epochs: int = 5                       # passes of the MiMo over its pages
    lr: float = 3e-3                      # of the MiMo, Adam
    n_layer: int = 2                      # its shape
    d_model: int = 64                     # its width
    workers: int = 1                      # processes, a seed each
    out: str = "out/tagger"               # folder of the result

    def __post_init__(self):
        configurator.at_least(self, 100, "pages")
        configurator.at_least(self, 1, "seeds", "tokens", "epochs", "n_layer", "d_model", "workers")


# ---- the two crawls, each -> (texts, labels) ------------------------------------------------------------------------

def template_pages(n: int, seed: int) -> tuple[list[str], list[Tags]]:
    """n pages of the toy's crawl, without copies."""
    problems = {"maths": pairs_of(maths.problems(n // 2, "train", seed)),
                "code": pairs_of(code.problems(n // 4, "train", seed, tests=0))}
    pages = [p for p in web.crawl(seed, n, problems) if p.copy_of < 0][:n]
    return [p.text for p in pages], [Tags(p.domain, p.quality, p.depth, p.ad) for p in pages]


THINGS = "lamp bridge loaf river list wheel basket boat number door kettle rope field table engine song coat".split()
# [a|b|c|d]: one of them, the last only in held-out pages; {t} {u}: things, {n} {m}: numbers
SENTENCES = {
    "encyclopedia": ["The {t} [is|counts as|became|ranks as] a [kind|sort|form|type] of {u} [known|found] since {n}.",
                     "[In|During|Around|By] the year {n} the {t} [was|had been|got|stood] near a {u}.",
                     "[Most|Many|Some|Few] {u}s [have|hold|carry|own] {m} parts, the {t} among them."],
    "forum": ["[Does anyone|Can someone|Who can|Could you] [tell|show|explain to|remind] me how a {t} works?",
              "[I had|We had|There was|Mine got] the same [trouble|issue|problem|fault] with my {u} on day {n}.",
              "[Thanks|Cheers|Great|Ta], that [helped|fixed it|worked|did it] for the {t}."],
    "maths": ["[Let|Take|Suppose|Put] x [be|equal|stand for|mean] {n} and y {m} for each {t}.",
              "The [sum|total|product|result] of {n} and {m} [is|gives|makes|yields] a new number of {u}s.",
              "[Divide|Split|Multiply|Reduce] the {t} count by {m} on both [sides|ends|parts|halves]."],
    "code": ["[Call|Run|Import|Start] {t}() with a list of {n} [items|entries|values|elements].",
             "The [loop|function|method|routine] [returns|prints|yields|emits] a {u} after {m} steps.",
             "[Store|Keep|Save|Cache] the {t} in a [variable|field|buffer|slot] of size {n}."],
    "books": ["[She|He|The man|Nobody] [looked|gazed|stared|peered] at the {t} and [said|thought|knew|felt] nothing.",
              "It was [late|dark|cold|quiet] when the {u} [came|arrived|appeared|turned up] at the house.",
              "[Long|Many years|A while|Some time] after that the {t} [lay|stood|rested|hung] by the window."],
    "news": ["[Officials|Police|Sources|Witnesses] [said|told us|confirmed|reported] on day {n} that a {t} was lost.",
             "The price of a {u} [rose|fell|went up|dropped] by {m} coins [today|this week|overnight|again].",
             "[More|Further|New|Other] [details|facts|reports|lines] on the {t} will follow."],
    "ads": ["[Buy|Order|Get|Grab] your {t} [now|today|here|at once] for {n} coins!",
            "[Only|Just|From|Under] {m} coins a {u}, [save|win|gain|pocket] big!",
            "The [best|finest|cheapest|greatest] {t} [ever|in town|around|anywhere], [hurry|act now|no waiting]!"],
    "jobs": ["We [seek|need|hire|want] {m} [people|workers|hands|helpers] for our {t} [shop|works|yard|team].",
             "The [pay|wage|salary|rate] is {n} coins a [day|week|month|shift].",
             "[Write|Apply|Send a letter|Reply] to the {u} [office|desk|house|hall] by day {m}."],
    "shallow": ["[best|top|free|hot] {t} [page|list|link|site] {n} [click|here|more|go] {u} {m}.",
                "[new|good|cool|nice] {u} [stuff|things|posts|pics] [links|tags|home|menu] {t}."],
}
# a step of reasoning uses what the sentence before it ended on; the same words in the wrong order are none
STEP = ["[So|Thus|Hence|Therefore] the {b} [is|stays|comes|lies] [above|over|past|beyond] the {c}.",
        "[As|Since|Because|For] it [beats|tops|passes|exceeds] the {b}, the {b} [beats|tops|passes|exceeds] the {c}."]


def varied_pages(n: int, seed: int) -> tuple[list[str], list[Tags]]:
    """n pages with paraphrases; those that data/tag.py will keep out have wordings that the others never have."""
    r, texts, labels = random.Random(seed), [], []
    while len(texts) < n:
        domain = r.choice(DOMAINS)
        tags = Tags(domain, r.randrange(4), r.randrange(4), 3 if domain == "ads" else r.randrange(4))
        state = r.getstate()
        text = varied_page(tags, r, unseen=True)
        if unit(text, "tag-split") >= 0.2:                       # goes to training: again, with known wordings
            r.setstate(state)
            text = varied_page(tags, r, unseen=False)
            if unit(text, "tag-split") < 0.2:
                continue
        texts.append(text)
        labels.append(tags)
    return texts, labels


def varied_page(tags: Tags, r: random.Random, unseen: bool) -> str:
    """6 to 9 sentences of its domain and 2 of another; depth steps in order; ad shouts; 3 - quality defects."""
    def worded(frame: str, **names) -> str:
        choose = lambda m: (words := m[1].split("|"))[r.randrange(len(words) if unseen else min(len(words), 3))]
        filled = re.sub(r"\[(.*?)\]", choose, frame)
        t, u = r.sample(THINGS, 2)
        return filled.format(**{"t": t, "u": u, "n": r.randrange(2, 2000), "m": r.randrange(2, 60)} | names)

    other = r.choice([d for d in DOMAINS if d != tags.domain])
    parts = [worded(r.choice(SENTENCES[tags.domain])) for _ in range(r.randint(6, 9))]
    parts += [worded(r.choice(SENTENCES[other])) for _ in range(2)]
    parts += [worded(r.choice(SENTENCES["ads"])) for _ in range(tags.ad)]
    r.shuffle(parts)
    chain = r.sample(THINGS, 8)
    steps = [worded(r.choice(STEP), b=chain[i], c=chain[i + 1]) for i in range(tags.depth)]
    loose = [worded(r.choice(STEP), b=r.choice(THINGS), c=r.choice(THINGS)) for _ in range(3 - tags.depth)]
    at = r.randrange(len(parts))
    parts[at:at] = steps                                         # each begins with what the one before ended on
    for sentence in loose:                                       # no two of these belong together
        parts.insert(r.randrange(len(parts) + 1), sentence)
    for defect in r.sample(["twice", "cut", "scrambled"], 3 - tags.quality):
        i = r.randrange(len(parts))
        words = parts[i].split()
        parts[i] = {"twice": f"{parts[i]} {parts[i]}", "cut": " ".join(words[:len(words) // 2]),
                    "scrambled": " ".join(r.sample(words, len(words)))}[defect]
    return " ".join(parts)


# ---- the language model as a tagger ---------------------------------------------------------------------------------

class MiMoTagger(nn.Module):
    """ids int64 [B,T], lengths [B] -> logits of the domain [B, 9] and of the three scores, [B, 4] each."""

    def __init__(self, cfg: ModelConfig, seed: int):
        super().__init__()
        self.trunk = MiMo(cfg)
        self.trunk.init_weights(seed)
        self.trunk.lm_head = None                                # nothing is predicted but tags
        self.heads = nn.ModuleList([nn.Linear(cfg.d_model, len(DOMAINS))] + [nn.Linear(cfg.d_model, 4) for _ in SCORES])

    def forward(self, ids: Tensor, lengths: Tensor) -> list[Tensor]:
        h = self.trunk.norm(self.trunk(ids))                                          # [B,T,D]
        inside = torch.arange(ids.shape[1]) < lengths[:, None]                        # [B,T]; causal: padding is unseen
        x = (h * inside[..., None]).sum(1) / lengths[:, None]                         # [B,D]
        return [head(x) for head in self.heads]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids of B pages -> ids [B,T] with zeros behind the shorter ones, lengths [B]."""
    lengths = torch.tensor([max(1, len(row)) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids, lengths


def train_mimo(rows: list[list[int]], labels: list[Tags], cfg: Config, seed: int) -> MiMoTagger:
    """rows: token ids of the pages. Adam, learning rate down to zero; 32 pages a step, of about one length."""
    tagger = MiMoTagger(ModelConfig(n_layer=cfg.n_layer, d_model=cfg.d_model, n_head=4, n_kv_head=2,
                                    head_dim=cfg.d_model // 4, d_ff=3 * cfg.d_model, n_mtp=0), seed)
    optimizer = torch.optim.Adam(tagger.parameters(), lr=cfg.lr)
    target = torch.tensor([[DOMAINS.index(t.domain), t.quality, t.depth, t.ad] for t in labels])       # [n, 4]
    r, done, steps = random.Random(seed), 0, cfg.epochs * -(-len(rows) // 32)
    for _ in range(cfg.epochs):
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + r.random() * 20)
        batches = [order[i:i + 32] for i in range(0, len(order), 32)]
        for batch in r.sample(batches, len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1, (done + 1) / 20) * (1 - done / steps)
            logits = tagger(*padded([rows[i] for i in batch]))
            loss = sum(F.cross_entropy(z, target[batch, k]) for k, z in enumerate(logits))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    return tagger


@torch.no_grad()
def mimo_tags(tagger: MiMoTagger, rows: list[list[int]]) -> list[Tags]:
    """Tags of each page, by the largest logit of each head."""
    found: list[Tags | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), 32):
        batch = order[start:start + 32]
        best = [z.argmax(1).tolist() for z in tagger(*padded([rows[i] for i in batch]))]
        for i, d, *scores in zip(batch, *best, strict=True):
            found[i] = Tags(DOMAINS[d], *scores)
    return found


# ---- the comparison -------------------------------------------------------------------------------------------------

def scored(found: list[Tags], labels: list[Tags]) -> dict[str, float]:
    """Accuracy of each head, and macro-F1 of the domain over those that occur."""
    f1 = []
    for d in {t.domain for t in labels}:
        hits = sum(a.domain == b.domain == d for a, b in zip(found, labels, strict=True))
        f1.append(2 * hits / (sum(t.domain == d for t in found) + sum(t.domain == d for t in labels)))
    share = lambda key: float(np.mean([getattr(a, key) == getattr(b, key) for a, b in zip(found, labels, strict=True)]))
    return {"domain": share("domain"), "domain F1": statistics.mean(f1)} | {s: share(s) for s in SCORES}


def compare(texts: list[str], labels: list[Tags], cfg: Config, seed: int) -> dict[str, dict[str, float]]:
    """Both taggers on the same pages. -> {"n-grams" or "MiMo": scores, training seconds, seconds per MB}"""
    tokenizer = Tokenizer.load("tiny")
    held = [unit(t, "tag-split") < 0.2 for t in texts]           # the split of data/tag.py:train
    part = lambda items, want: [x for x, out in zip(items, held, strict=True) if out == want]
    mb, truth, out = sum(len(t.encode()) for t in part(texts, True)) / 1e6, part(labels, True), {}

    start = time.process_time()
    tagger, _ = ngrams.train(texts, labels)
    middle = time.process_time()
    found = ngrams.tag(tagger, part(texts, True))
    out["n-grams"] = scored(found, truth) | {"train_s": middle - start, "s_per_mb": (time.process_time() - middle) / mb}

    start = time.process_time()
    rows = lambda want: [tokenizer.encode(t)[:cfg.tokens] for t in part(texts, want)]
    mimo = train_mimo(rows(False), part(labels, False), cfg, seed)
    middle = time.process_time()
    found = mimo_tags(mimo, rows(True))
    out["MiMo"] = scored(found, truth) | {"train_s": middle - start, "s_per_mb": (time.process_time() - middle) / mb}
    return out


def one_seed(cfg: Config, seed: int) -> list[dict]:
    """Both taggers on both crawls of a seed. -> a row each"""
    torch.set_num_threads(1)
    return [{"seed": seed, "crawl": name, "tagger": side, **row}
            for name, make in (("template", template_pages), ("varied", varied_pages))
            for side, row in compare(*make(cfg.pages, seed), cfg, seed).items()]


def main(cfg: Config) -> None:
    columns = ("domain", "domain F1", *SCORES, "train_s", "s_per_mb")
    lines = [f"{'':19}" + "".join(f"{k:>15}" for k in columns)]
    with Pool(cfg.workers) as pool:
        runs = sum(pool.starmap(one_seed, [(cfg, seed) for seed in range(cfg.seeds)], chunksize=1), [])
    for name in ("template", "varied"):
        for side in ("n-grams", "MiMo"):
            chosen = [r for r in runs if (r["crawl"], r["tagger"]) == (name, side)]
            values = [[r[k] for r in chosen] for k in columns]
            cells = (f"{statistics.mean(v):.3f} ({max(v) - min(v):.3f})" for v in values)
            lines.append(f"{name:10}{side:9}" + "".join(f"{cell:>15}" for cell in cells))
    print("\n".join(lines), "\nmeans of the seeds (largest minus smallest)", sep="")
    out = Path(cfg.out) / "tagger.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python paper/tagger.py", *sys.argv[1:]])
    out.write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    configurator.run(main, Config)
