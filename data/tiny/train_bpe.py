"""Make data/tiny/bpe.tiktoken, the tiny tokenizer: 256 bytes + 765 merges + 3 control tokens = 1,024 ids.

The report takes Qwen2's vocabulary (151,680 rows); a 2M-parameter model would be all embedding with that.
Same kind of BPE, same split pattern (tokenizer.py), trained with `tokenizers` (a development dependency
only).

    python data/tiny/train_bpe.py FILE [FILE ...]       # any text files; prints characters per token
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tokenizer import PATTERN, TINY, U2B, Tokenizer, merges_of, write_tiktoken  # noqa: E402


def train(texts, n_ranks=1021):
    """texts: iterable of str -> ranks, dict bytes -> id, exactly n_ranks entries (ValueError if the text is
    too small)."""
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


def main(files):
    if not files:
        raise SystemExit("usage: python data/tiny/train_bpe.py FILE [FILE ...]")
    texts = [Path(f).read_text(encoding="utf-8") for f in files]
    write_tiktoken(TINY, train(texts))
    tok = Tokenizer.load("tiny")
    n = sum(len(tok.encode(t)) for t in texts)
    print(f"{TINY}: {tok.vocab_size} ids, {sum(map(len, texts)) / n:.2f} characters per token "
          f"on {n:,} tokens of its own text")


if __name__ == "__main__":
    main(sys.argv[1:])
