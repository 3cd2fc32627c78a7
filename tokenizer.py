"""
Tokenizer: text <-> token ids through tiktoken, with our own merge table. Nothing is downloaded.

Report, section 2.2: MiMo-7B uses the Qwen2 tokenizer (vocabulary padded to 151,680 rows). One class, two sources:

    Tokenizer.load("tiny")    the embedded byte-level BPE, data/tiny/bpe.tiktoken: 1,024 ids, made by
                              data/tiny/train_bpe.py
    Tokenizer.load(folder)    Hugging Face files: tokenizer.json, or vocab.json + merges.txt, with
                              tokenizer_config.json or added_tokens.json; the ids equal those of Hugging Face's
                              own tokenizer (tests/test_tokenizer.py)

Both split text with Qwen2's regular expression, in which every digit is its own token.

Control tokens that are written in a text are ordinary characters here: encode("<|im_end|>") gives pieces such as "<",
"|" and "im", so that no web page and no user can forge the end of a turn. Only chat(), and the scripts that end a
document with eos_id, insert control ids.

    python tokenizer.py "Problem: 17 + 25 = ?"      # shows the tokens; expect 2.0 to 3.2 characters a token
"""
import base64
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import tiktoken

import configurator
from configurator import UserError

try:   # Python's Unicode tables differ from Hugging Face's for 51 combining marks: use theirs where installed
    from tokenizers.normalizers import NFC
    nfc = NFC().normalize_str
except ImportError:
    def nfc(text: str) -> str:
        """Unicode's composed form: e followed by a combining accent becomes one character."""
        return unicodedata.normalize("NFC", text)

TINY = Path(__file__).resolve().parent / "data" / "tiny" / "bpe.tiktoken"
EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# [HF] Qwen2 splits text before BPE into: contractions | a word with one leading sign | ONE digit | signs | line ends |
# spaces
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")

LONG = 250_000                                   # blanks in a row that are encoded at a time
BLANKS = re.compile(rf"\s{{{LONG}}}")

# ChatML without a default system prompt (MiMo's README advises an empty one); the string whose ids chat() builds
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@dataclass(frozen=True)
class Config:
    text: str = "Problem: what is 17 + 25?"   # text to show as tokens
    tokenizer: str = "tiny"                   # "tiny" or a folder with Hugging Face's files

    POSITIONAL = ("text",)


def main(cfg: Config) -> None:
    tokenizer = Tokenizer.load(cfg.tokenizer)
    ids = tokenizer.encode(cfg.text)
    print(" | ".join(f"{tokenizer.decode([i])!r} {i}" for i in ids))
    print(f"{len(ids)} tokens of a vocabulary of {tokenizer.vocab_size:,}")


# ---- byte-pair encoding ---------------------------------------------------------------------------------------------

def byte_to_unicode() -> list[str]:
    """
    GPT-2's printable character for each byte, as used in vocab.json: 188 bytes stand for themselves, the others become
    the code points from 256 on. -> 256 strings of one character.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    table, code_point = [], 256
    for b in range(256):
        table.append(chr(b if b in printable else code_point))
        code_point += b not in printable
    return table


B2U = byte_to_unicode()                          # byte -> character
U2B = {u: b for b, u in enumerate(B2U)}          # character -> byte


def bpe_pieces(token: bytes, ranks: dict[bytes, int], max_rank: int) -> list[bytes]:
    """
    Byte-pair encoding of `token` with the merges whose result has a rank below max_rank. -> its pieces, in order.

    Each step merges the adjacent pair whose concatenation has the lowest rank, the leftmost one first. By hand, with
    ranks a=0 b=1 c=2 ab=3 abc=4: bpe_pieces(b"abc", ranks, 4) = [b"ab", b"c"], and (ab, c) is the merge that makes abc.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    pairs = [ranks.get(a + b, max_rank) for a, b in zip(parts, parts[1:], strict=False)]
    while pairs and (best := min(pairs)) < max_rank:
        i = pairs.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del pairs[i]
        for j in (i - 1, i):                     # only the pairs on both sides of the new piece change
            if 0 <= j < len(pairs):
                pairs[j] = ranks.get(parts[j] + parts[j + 1], max_rank)
    return parts


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """
    The merge list that the ranks stand for: (left, right) for each token of more than one byte, in order of rank.

    tiktoken merges by the rank of the RESULT, Hugging Face by a list of PAIRS. Both give the same tokens for every text
    if and only if each token is the merge of exactly two tokens of lower rank. UserError names the first that is not.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = bpe_pieces(token, ranks, rank)
        if len(parts) != 2:
            raise UserError(f"token {rank} {token!r} is made of {len(parts)} pieces, not 2: no merge list gives these "
                            "ranks, so tiktoken and Hugging Face would disagree")
        merges.append((parts[0], parts[1]))
    return merges


# ---- the tokenizer --------------------------------------------------------------------------------------------------

class Tokenizer:
    """
    Byte-level BPE with control tokens.

    ranks          bytes -> id of the ordinary tokens; a lower id is merged first
    added          text -> (id, is_control), the tokens outside the BPE. encode() never finds control tokens
                   (<|im_end|>) in a text; it always finds the others (<tool_call> in Qwen2.5), as Hugging Face does
    vocab_size     rows of the embedding, at least the largest id + 1 (Qwen2: 151,665 ids, padded to 151,680 rows);
                   None = the next multiple of 128
    chat_template  Jinja text of the chat format, stored with the files that save() writes

    Attributes beside these: eos_id, im_start_id, im_end_id; n_ids, the largest id + 1: the rows of the embedding from
    there on are padding, so the engine samples among the first n_ids; merges; valid_ids, bool [V], False for padding;
    fingerprint, 16 hex digits of the table: two tokenizers with the same one give the same ids.

    UserError for a table that Hugging Face would read differently, or that lacks a byte or a control token.
    """
    def __init__(self, ranks: dict[bytes, int], added: dict[str, tuple[int, bool]], vocab_size: int | None = None,
                 chat_template: str = CHAT_TEMPLATE):
        self.ranks, self.added, self.chat_template = ranks, added, chat_template
        self.merges = merges_of(ranks)           # also the check of all ranks: some seconds for Qwen2
        ids = [*ranks.values(), *(i for i, _ in added.values())]
        if len(set(ids)) != len(ids):
            raise UserError("tokenizer: two tokens share an id")
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:
            raise UserError(f"tokenizer: no token for byte {missing[0]} ({len(missing)} of 256 missing)")
        for name in (EOS, IM_START, IM_END):
            if name not in added:
                raise UserError(f"tokenizer: needs the token {name}, has {sorted(added)}")
        self.vocab_size = vocab_size or -(-(max(ids) + 1) // 128) * 128
        if max(ids) >= self.vocab_size:
            raise UserError(f"tokenizer: id {max(ids)} does not fit a vocabulary of {self.vocab_size}")
        self.eos_id, self.im_start_id, self.im_end_id = (added[name][0] for name in (EOS, IM_START, IM_END))
        self.n_ids = max(ids) + 1
        self.valid_ids = np.zeros(self.vocab_size, dtype=bool)             # [V]
        self.valid_ids[ids] = True
        self._bpe = tiktoken.Encoding("nanomimo", pat_str=PATTERN, mergeable_ranks=ranks,
                                      special_tokens={text: i for text, (i, _) in added.items()})
        by_length = sorted(added, key=len, reverse=True)                   # leftmost match, the longest first
        ordinary = [text for text in by_length if not added[text][1]]
        self._find_added = re.compile("|".join(map(re.escape, by_length)))
        self._find_ordinary = re.compile("|".join(map(re.escape, ordinary))) if ordinary else None

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for token, i in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d %d " % (i, len(token)) + token)
        digest.update(repr(sorted(self.added.items())).encode())
        return digest.hexdigest()

    # ---- text <-> ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, control: bool = False) -> list[int]:
        """
        text -> ids. control=False: control tokens written in the text are ordinary characters. control=True: they are
        found and become their ids, which is Hugging Face's default; only for text that we wrote ourselves.
        """
        pattern = self._find_added if control else self._find_ordinary
        if pattern is None:
            return self._encode_bpe(text)
        ids, at = [], 0
        # split at the added tokens before normalising: NFC would make U+226F of the ">" in "<|im_end|>" + U+0338
        for match in pattern.finditer(text):
            ids += self._encode_bpe(text[at:match.start()])
            ids.append(self.added[match.group()][0])
            at = match.end()
        return ids + self._encode_bpe(text[at:])

    def _encode_bpe(self, text: str) -> list[int]:
        """Text without added tokens -> ids. Half of a surrogate pair has no UTF-8 form and becomes U+FFFD."""
        if not text.isascii():
            text = nfc(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        if len(text) < LONG:
            return self._bpe.encode_ordinary(text)
        ids, at = [], 0
        for run in BLANKS.finditer(text):                    # tiktoken ends the process at a million blanks in a row
            ids += self._bpe.encode_ordinary(text[at:run.end()])
            at = run.end()
        return ids + self._bpe.encode_ordinary(text[at:])

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """
        ids -> text; bytes that are not UTF-8 become U+FFFD. skip_control: leave control tokens out. UserError for an id
        that is not a token (a padding row of the embedding).
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not (0 <= i < self.vocab_size and self.valid_ids[i]):
                raise UserError(f"id {i} is no token: {self.valid_ids.sum()} of {self.vocab_size} rows are")
        if skip_control:
            control = {i for i, is_control in self.added.values() if is_control}
            ids = [i for i in ids if i not in control]
        return self._bpe.decode_bytes(ids).decode("utf-8", "replace")

    # ---- chat -------------------------------------------------------------------------------------------------------

    def chat(self, messages: Sequence[dict[str, str]],
             add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """
        ChatML. messages: [{"role": "system" | "user" | "assistant", "content": text}, ...]. -> (ids, mask), two lists
        of one length. mask is 1 on the tokens that the model must learn to write: the assistant's text and its
        <|im_end|>, not the header before it and not the newline after it.

            <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n yo <|im_end|> \\n
            0            0    0  0  0          0  0            0         0  1  1          0

        add_generation_prompt: end with the header of the assistant's turn. That prompt is always a prefix of the full
        sample, so the prompts of RL equal those of SFT. No system prompt is added when there is none. UserError names
        the message with another role, or with a content that is not text.
        """
        ids, mask = [], []

        def put(new: list[int], train: bool) -> None:
            ids.extend(new)
            mask.extend([int(train)] * len(new))

        for k, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role not in ("system", "user", "assistant"):
                raise UserError(f"message {k}: role {role!r} should be system, user or assistant")
            if not isinstance(content, str):
                raise UserError(f"message {k} ({role}): content should be text, is {type(content).__name__}")
            train = role == "assistant"
            put([self.im_start_id], False)
            if train:                            # header encoded apart: the prompt stays a prefix for every answer
                put(self.encode("assistant\n"), False)
                put(self.encode(content), True)
            else:                                # in one piece, as Hugging Face encodes its template's text
                put(self.encode(f"{role}\n{content}"), False)
            put([self.im_end_id], train)
            put(self.encode("\n"), False)
        if add_generation_prompt:
            put([self.im_start_id, *self.encode("assistant\n")], False)
        return ids, mask

    # ---- files ------------------------------------------------------------------------------------------------------

    @staticmethod
    def load(name: str | os.PathLike) -> "Tokenizer":
        """name: "tiny", or a folder with Hugging Face's files. UserError names the file that is missing or wrong."""
        if str(name) == "tiny":
            return load_tiny()
        try:
            return load_folder(Path(name))
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise UserError(f"{name}: the tokenizer's files are not of Qwen2's form "
                            f"({type(e).__name__}: {e})") from None

    def save(self, folder: str | os.PathLike) -> None:
        """
        Write tokenizer.json, vocab.json, merges.txt, added_tokens.json and tokenizer_config.json: what transformers,
        vLLM and SGLang read, and what load(folder) reads back to the same tokenizer.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        as_text = lambda token: "".join(B2U[b] for b in token)
        vocab = {as_text(t): i for t, i in sorted(self.ranks.items(), key=lambda item: item[1])}
        merges = [f"{as_text(a)} {as_text(b)}" for a, b in self.merges]
        exact = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [{"id": i, "content": t, **exact, "special": control}
                 for t, (i, control) in sorted(self.added.items(), key=lambda item: item[1][0])]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
        fast = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                "normalizer": {"type": "NFC"},
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
                "post_processor": byte_level, "decoder": byte_level,
                "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                          "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                          "ignore_merges": False, "vocab": vocab, "merges": merges}}
        config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "unk_token": None,
                  "eos_token": IM_END, "pad_token": EOS, "errors": "replace", "add_prefix_space": False,
                  "clean_up_tokenization_spaces": False, "split_special_tokens": False,
                  "model_max_length": 131072, "padded_vocab_size": self.vocab_size,
                  "chat_template": self.chat_template,
                  "added_tokens_decoder": {str(a["id"]): {k: a[k] for k in a if k != "id"} for a in added}}
        dump = lambda value, **k: json.dumps(value, ensure_ascii=False, **k) + "\n"
        write = lambda file, text: (folder / file).write_text(text, encoding="utf-8", newline="\n")
        write("tokenizer.json", dump(fast, indent=1))
        write("vocab.json", dump(vocab))
        write("merges.txt", "#version: 0.2\n" + "".join(m + "\n" for m in merges))
        write("added_tokens.json", dump({a["content"]: a["id"] for a in added}, indent=1))
        write("tokenizer_config.json", dump(config, indent=1))


# ---- the embedded tokenizer -----------------------------------------------------------------------------------------

def write_tiktoken(path: str | os.PathLike, ranks: dict[bytes, int]) -> None:
    """One line "base64(token) rank" for each token, the format of OpenAI's .tiktoken files."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(t).decode()} {r}\n" for t, r in ordered]
    Path(path).write_text("".join(lines), encoding="ascii", newline="\n")


@lru_cache(maxsize=1)
def load_tiny() -> Tokenizer:
    """data/tiny/bpe.tiktoken; the three control tokens follow the ordinary ones. -> the same object at every call."""
    ranks = {}
    for line in TINY.read_text(encoding="ascii").splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return Tokenizer(ranks, {name: (len(ranks) + k, True) for k, name in enumerate((EOS, IM_START, IM_END))},
                     vocab_size=len(ranks) + 3)


# ---- Hugging Face's files -------------------------------------------------------------------------------------------

def load_folder(folder: Path) -> Tokenizer:
    """A folder in one of Hugging Face's layouts -> Tokenizer. UserError if a file is missing or not of Qwen2's kind."""
    has = lambda file: (folder / file).is_file()
    config = read_json(folder / "tokenizer_config.json") if has("tokenizer_config.json") else {}
    if has("tokenizer.json"):
        vocab, merges, entries = read_fast(folder / "tokenizer.json")
    elif has("vocab.json") and has("merges.txt"):
        vocab = read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        # the header is the only comment: real merges begin with "#" too
        merges = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version"):] if line]
        entries = [dict(e, id=int(i)) for i, e in config.get("added_tokens_decoder", {}).items()]
        if not entries:
            names = read_json(folder / "added_tokens.json") if has("added_tokens.json") else {}
            entries = [{"content": t, "id": i, "special": t.startswith("<|")} for t, i in names.items()]
    else:
        raise UserError(f"{folder}: no tokenizer.json and no vocab.json + merges.txt")
    added = {}
    for e in entries:
        flags = [k for k in ("lstrip", "rstrip", "single_word", "normalized") if e.get(k)]
        if flags:
            raise UserError(f"{folder}: added token {e['content']!r} has {flags[0]}=true, should be false")
        added[e["content"]] = (e["id"], bool(e.get("special")))
    # Qwen2 lists its control tokens outside vocab.json; a vocab.json that holds them too is accepted
    ranks = {bytes(map(U2B.__getitem__, t)): i for t, i in vocab.items() if t not in added}
    template = config.get("chat_template", CHAT_TEMPLATE)
    if has("chat_template.jinja"):               # where newer versions of transformers put it
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = Tokenizer(ranks, added, padded_size(folder, config), template)
    check_merges(folder, tokenizer.merges, merges)
    return tokenizer


def read_json(path: Path) -> dict:
    """The value of a JSON file; UserError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from None


def read_fast(path: Path) -> tuple[dict[str, int], list[tuple[str, ...]], list[dict]]:
    """
    tokenizer.json -> (vocab: token -> id, merges: pairs, added tokens: one dict each). UserError if it is not a
    tokenizer of Qwen2's kind.
    """
    fast = read_json(path)
    model, pre = fast.get("model", {}), json.dumps(fast.get("pre_tokenizer"))
    if model.get("type") != "BPE" or json.dumps(PATTERN) not in pre:
        raise UserError(f"{path}: not Qwen2's byte-level BPE: model {model.get('type')!r} should be BPE, "
                        f"split by {PATTERN}")
    if (fast.get("normalizer") or {}).get("type") != "NFC":
        raise UserError(f"{path}: normalizer {fast.get('normalizer')} should be NFC")
    if model.get("ignore_merges"):
        raise UserError(f"{path}: ignore_merges=true is not Qwen2's BPE")
    # two spellings exist: "a b" and ["a", "b"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return model["vocab"], merges, fast.get("added_tokens", [])


def check_merges(folder: Path, implied: list[tuple[bytes, bytes]], merges: list[tuple[str, ...]]) -> None:
    """
    implied: the merges that follow from the ids, in id order; merges: those of the file. UserError if they differ:
    tiktoken would then give other ids than Hugging Face.
    """
    for k, (pair, right) in enumerate(zip(merges, implied, strict=False)):
        if tuple(bytes(map(U2B.__getitem__, part)) for part in pair) != right:
            raise UserError(f"{folder}: merge {k} is {pair}, the ids imply {right}: order them by id")
    if len(merges) != len(implied):
        raise UserError(f"{folder}: {len(merges)} merges for {len(implied)} tokens of more than one byte")


def padded_size(folder: Path, config: dict) -> int | None:
    """Rows of the embedding: what save() noted, else vocab_size of the model's config beside it, else None."""
    if isinstance(config.get("padded_vocab_size"), int):
        return config["padded_vocab_size"]
    for file in ("config.json", "model.json"):
        if (folder / file).is_file():
            size = read_json(folder / file).get("vocab_size")
            if isinstance(size, int):
                return size
    return None


if __name__ == "__main__":
    configurator.run(main, Config)
