"""
Makes data/tiny/bpe.tiktoken, the tiny tokenizer: 256 bytes + 765 merges + 3 control tokens = 1,024 ids.

The report takes Qwen2's vocabulary (151,680 rows); a 2M-parameter model would be all embedding with that. This is the
same kind of BPE with the same split pattern (tokenizer.py), trained with the package `tokenizers`, a development
dependency only. The result is committed. Run this again only when the tiny world's language changes: checkpoints that
were made with the old file become unreadable.

    python -m data.tiny.train_bpe       # 30 s; characters per token by kind

data/train_bpe.py makes a tokenizer from your own text.
"""
from dataclasses import dataclass

import configurator
from data import problems as form
from data.corpus import build
from data.tiny import code, maths
from data.train_bpe import train
from tokenizer import TINY, Tokenizer, write_tiktoken


@dataclass(frozen=True)
class Config:
    pass


def tiny_world() -> dict[str, list[str]]:
    """
    What the demo's models read and write -> {kind: texts}: the clean documents of the crawl, and problems in their
    plain and their chat form. Each kind is cut to one size: the later stages see as much maths and code as web.
    """
    generated = {"maths": maths.problems(6000, "train", 0), "code": code.problems(3000, "train", 0)}
    pairs = {kind: [(p.question, form.response(p, think=False)) for p in ps] for kind, ps in generated.items()}
    kinds = build(pairs, pages=4000).documents
    for kind, ps in generated.items():
        kinds[f"{kind} chat"] = [f"user\n{p.question}\nassistant\n{form.response(p, think=True)}" for p in ps]
        kinds[f"{kind} plain"] = [f"{form.PLAIN.format(question=p.question)} {form.response(p, think=False)}"
                                  for p in ps]
    limit = 600_000                       # characters of each kind
    for kind, texts in kinds.items():
        total = 0
        for n, text in enumerate(texts):
            total += len(text)
            if total > limit:
                kinds[kind] = texts[:n]
                break
    return kinds


def main(cfg: Config) -> None:
    kinds = tiny_world()
    write_tiktoken(TINY, train(t for texts in kinds.values() for t in texts))
    tokenizer = Tokenizer.load("tiny")
    for kind, texts in kinds.items():
        n, characters = sum(len(tokenizer.encode(t)) for t in texts), sum(map(len, texts))
        print(f"{kind:14s} {characters:9,} characters {n:8,} tokens {characters / n:6.2f} characters per token")
    print(f"{TINY}: {tokenizer.vocab_size} ids")


if __name__ == "__main__":
    configurator.run(main, Config)
