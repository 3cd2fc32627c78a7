"""
Make data/tiny/bpe.tiktoken, the tiny tokenizer: 256 bytes + 765 merges + 3 control tokens = 1,024 ids.

The report takes Qwen2's vocabulary (151,680 rows); a 2M-parameter model would be all embedding with that.
Same kind of BPE, same split pattern (tokenizer.py), trained with `tokenizers` (a development dependency
only). The result is committed: run this again only when the tiny world's language changes, since checkpoints
made with the old file become unreadable.

    python data/tiny/train_bpe.py             # from the tiny world, 30 s; prints characters per token by kind
    python data/tiny/train_bpe.py FILE ...    # from any text files
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tokenizer import PATTERN, TINY, U2B, Tokenizer, merges_of, write_tiktoken  # noqa: E402


def train(texts, n_ranks=1021):
    """
    texts: iterable of str -> ranks, dict bytes -> id, exactly n_ranks of them (ValueError: the text is too
    small).
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HF
    bpe = HF(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    # the one pattern tiktoken gets, too; the usual Digits + ByteLevel default splits differently
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n_ranks, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    ranks = {bytes(map(U2B.__getitem__, t)): i for t, i in bpe.get_vocab().items()}
    if len(ranks) != n_ranks:
        raise ValueError(f"only {len(ranks)} tokens of {n_ranks} found: give more, and more varied, text")
    merges_of(ranks)   # tiktoken and Hugging Face agree on these ranks, or this raises
    return ranks


def tiny_world():
    """
    What the demo's models read and write -> {kind: texts}: the crawl's clean documents, and problems in their
    plain and their chat form. Kinds are cut to one size: the later stages see as much maths and code as web.
    """
    from data import problems as form
    from data.corpus import build
    from data.tiny import code, maths
    made = {"maths": maths.problems(6000, "train", 0), "code": code.problems(3000, "train", 0)}
    pairs = {kind: [(p.question, form.response(p, think=False)) for p in ps] for kind, ps in made.items()}
    kinds = build(pairs, pages=4000).documents
    for kind, ps in made.items():
        kinds[f"{kind} chat"] = [f"user\n{p.question}\nassistant\n{form.response(p, think=True)}" for p in ps]
        kinds[f"{kind} plain"] = [f"{form.PLAIN.format(question=p.question)} {form.response(p, think=False)}"
                                  for p in ps]
    room = 600_000    # characters of each kind
    for kind, texts in kinds.items():
        total = 0
        for n, text in enumerate(texts):
            total += len(text)
            if total > room:
                kinds[kind] = texts[:n]
                break
    return kinds


def main(files):
    kinds = {f: [Path(f).read_text(encoding="utf-8")] for f in files} if files else tiny_world()
    write_tiktoken(TINY, train(t for texts in kinds.values() for t in texts))
    tok = Tokenizer.load("tiny")
    for kind, texts in kinds.items():
        n = sum(len(tok.encode(t)) for t in texts)
        characters = sum(map(len, texts))
        print(f"{kind:14s} {characters:9,} characters {n:8,} tokens {characters / n:6.2f} "
              "characters per token")
    print(f"{TINY}: {tok.vocab_size} ids")


if __name__ == "__main__":
    main(sys.argv[1:])
