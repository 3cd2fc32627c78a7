"""
Your own tokenizer from your own text: byte-level BPE with Qwen2's split pattern, as MiMo's (report section 2.2).

    python -m data.train_bpe FILES out/my/tokenizer --vocab_size=8192
    python -m data.hub text FILES out/my/data --tokenizer=out/my/tokenizer

FILES is a file or a folder of any kinds that data/readers.py knows; rows of tables need text, html or content, as for
the adapter `text`. The folder that is written holds Hugging Face's files (tokenizer.json and others), which the whole
recipe takes as --tokenizer, and other programs too. The embedded tokenizer stays as it is. Training holds the counts of
all words in memory; --characters bounds what it reads, evenly over the files. Needs the package tokenizers.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import configurator
from configurator import UserError
from data.adapters import document
from data.build import text_of
from data.readers import Bad, listing, needed, optional, read_rows
from tokenizer import EOS, IM_END, IM_START, PATTERN, U2B, Tokenizer, merges_of


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("files", "out")
    files: str = ""                       # a file or a folder
    out: str = ""                         # folder of the tokenizer
    vocab_size: int = 8192                # ids, 256 bytes and three control tokens among them
    characters: float = 200e6             # of text to learn from, at most
    encoding: str = ""                    # of text files that are not UTF-8
    replace: bool = False                 # write over a tokenizer that is there

    def __post_init__(self):
        configurator.at_least(self, 300, "vocab_size")
        configurator.at_least(self, 1, "characters")


def train(texts: Iterable[str], n_ranks: int = 1021) -> dict[bytes, int]:
    """texts -> ranks: bytes of a token -> its id, exactly n_ranks of them. UserError if the text is too small."""
    optional("tokenizers")
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HF
    bpe = HF(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    # the pattern that tiktoken gets too; the usual default, Digits + ByteLevel, splits differently
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n_ranks, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    ranks = {bytes(map(U2B.__getitem__, t)): i for t, i in bpe.get_vocab().items()}
    if len(ranks) != n_ranks:
        raise UserError(f"only {len(ranks)} tokens of {n_ranks} found: give more, and more varied, text")
    merges_of(ranks)                      # raises unless tiktoken and Hugging Face agree on these ranks
    return ranks


def texts(cfg: Config, counts: dict[str, int]) -> Iterator[str]:
    """The texts of all files, of each its share of cfg.characters. counts: texts, characters, rows left out."""
    files, _ = listing(cfg.files)
    needed(files)
    sizes = [f.stat().st_size for f in files]
    for file, size in zip(files, sizes, strict=True):
        left = cfg.characters * size / max(1, sum(sizes))
        for _, row in read_rows(file, encoding=cfg.encoding):
            try:
                record = None if isinstance(row, Bad) else document(row)
            except UserError:
                record = None
            text = text_of(record) if record else ""
            if isinstance(text, Bad) or not text:
                counts["left out"] += 1
                continue
            counts["texts"] += 1
            counts["characters"] += len(text)
            yield text[:int(left) + 1]
            left -= len(text)
            if left <= 0:
                break


def main(cfg: Config) -> None:
    out, counts = Path(cfg.out), {"texts": 0, "characters": 0, "left out": 0}
    if (out / "tokenizer.json").exists() and not cfg.replace:
        raise UserError(f"{out}: a tokenizer is there already, and shards may need it: --replace or another folder")
    ranks = train(texts(cfg, counts), cfg.vocab_size - 3)
    added = {name: (len(ranks) + k, True) for k, name in enumerate((EOS, IM_START, IM_END))}
    Tokenizer(ranks, added, cfg.vocab_size).save(out)
    tokenizer = Tokenizer.load(out)
    sample = "".join(t for t, _ in zip(texts(cfg, dict(counts)), range(200), strict=False))[:1_000_000]
    print(f"{out}: {tokenizer.vocab_size:,} ids from {counts['texts']:,} texts, {counts['characters'] / 1e6:.1f} M "
          f"characters; {len(sample) / max(1, len(tokenizer.encode(sample))):.2f} characters per token; "
          f"{counts['left out']:,} rows left out")


if __name__ == "__main__":
    configurator.run(main, Config)
