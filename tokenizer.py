"""
Tokenizer: text <-> token ids through tiktoken, with our own merge table. Nothing is downloaded.

Report, section 2.2: MiMo-7B uses the Qwen2 tokenizer (vocabulary padded to 151,680 rows). One class, two sources:

    Tokenizer.load("tiny")    the embedded byte-level BPE, data/tiny/bpe.tiktoken: 1,024 ids, made by
                              data/tiny/train_bpe.py
    Tokenizer.load(folder)    Hugging Face files: tokenizer.json, or vocab.json + merges.txt, with
                              tokenizer_config.json or added_tokens.json; the ids equal those of Hugging Face's
                              own tokenizer (tests/test_tokenizer.py)

Both split text with Qwen2's regular expression, in which every digit is its own token. Another byte-level BPE (Llama 3,
SmolLM2) is encoded by Hugging Face's library `tokenizers`, behind the same methods.

Control tokens that are written in a text are ordinary characters here: encode("<|im_end|>") gives pieces such as "<",
"|" and "im", so that no web page and no user can forge the end of a turn. Only chat(), and the scripts that end a
document with eos_id, insert control ids.

    python tokenizer.py "Problem: 17 + 25 = ?"      # shows the tokens; expect 2.0 to 3.2 characters a token
"""
import base64
import copy
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

import chat_template
import configurator
from chat_template import CHAT_TEMPLATE
from configurator import UserError
from data.jsonl import read_json
from data.text import whole

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

# what ends a document where it is not eos_token: chat models of Llama 3 and DeepSeek name the end of a turn there
ENDS_OF_TEXT = (EOS, "<|end_of_text|>", "<｜end▁of▁sentence｜>")
# <|im_start|>, <｜User｜>; Mistral's [INST], Gemma's <start_of_turn>
CONTROL_SHAPE = re.compile(r"<[|｜].*[|｜]>|\[/?[A-Z_]+\]|<(start|end)_of_\w+>")
JOINED = re.compile(r"<[|｜][\"']")               # in a template that puts <|user|> together: '<|' + role + '|>'
MOST_MERGING = 1 << 28                           # sum of the squares of all tokens' bytes; Qwen2: 2^23
MOST_ROWS = 1 << 24                              # of an embedding


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

    ranks          bytes -> id of the ordinary tokens; a lower id is merged first. None with fast
    added          text -> (id, is_control), the tokens outside the BPE. encode() never finds control tokens
                   (<|im_end|>) in a text; it always finds the others (<tool_call> in Qwen2.5), as Hugging Face does.
                   What ends a text or a turn, or stands as <|...|> in the chat template, is control whatever it says
    vocab_size     rows of the embedding, at least the largest id + 1 (Qwen2: 151,665 ids, padded to 151,680 rows);
                   None = the next multiple of 128
    chat_template  Jinja text of the chat format (chat_template.py), stored with the files that save() writes; None = a
                   base model's that has none
    names          bos_token, eos_token, pad_token and unk_token of tokenizer_config.json, which templates may write
    fast           contents of tokenizer.json where the rule of ranks does not apply: `tokenizers` encodes then

    Attributes beside these: eos_id ends a document; im_end_id ends a turn, and is eos_id where there is no other;
    im_start_id, ChatML's, None without; n_ids, the largest id + 1: the rows of the embedding from there on are padding,
    so the engine samples among the first n_ids; merges; valid_ids, bool [V], False for padding; fingerprint, 16 hex
    digits of the table: two tokenizers with the same one give the same ids.

    UserError for a table that Hugging Face would read differently, or that lacks a byte or a token that ends a text.
    """
    def __init__(self, ranks: dict[bytes, int] | None, added: dict[str, tuple[int, bool]],
                 vocab_size: int | None = None, chat_template: str | None = CHAT_TEMPLATE,
                 names: dict[str, str | None] | None = None, fast: dict | None = None):
        self.ranks, self.chat_template, self.fast = ranks, chat_template and whole(chat_template), fast
        self.names = {"bos_token": None, "eos_token": None, "pad_token": EOS if EOS in added else None,
                      "unk_token": None} | (names or {})
        eos = next((name for name in ENDS_OF_TEXT if name in added), self.names["eos_token"])
        end = IM_END if IM_END in added else self.names["eos_token"] or eos
        for name in (eos or EOS, end or IM_END):
            if name not in added:
                raise UserError(f"tokenizer: needs the token {name}, or eos_token in tokenizer_config.json; has "
                                f"{sorted(added)}")
        template = chat_template or ""
        in_template = {name for name in added if CONTROL_SHAPE.fullmatch(name) and (
            name in template or name[0] == "<" and JOINED.search(template))}
        always = {eos, end, IM_START, *self.names.values(), *in_template}
        self.added = {name: (i, control or name in always) for name, (i, control) in added.items()}
        vocab = ranks if fast is None else {t: i for t, i in fast["model"]["vocab"].items() if t not in added}
        ids = [*vocab.values(), *(i for i, _ in added.values())]
        if len(set(ids)) != len(ids):
            raise UserError("tokenizer: two tokens share an id")
        if not all(type(i) is int and i >= 0 for i in ids):
            raise UserError("tokenizer: an id is not a number from 0 on")
        self.vocab_size = vocab_size or -(-(max(ids) + 1) // 128) * 128
        if not max(ids) < self.vocab_size <= MOST_ROWS:
            raise UserError(f"tokenizer: id {max(ids)} does not fit a vocabulary of {self.vocab_size} (at most "
                            f"{MOST_ROWS:,})")
        self.eos_id, self.im_end_id = added[eos][0], added[end][0]
        self.im_start_id = added[IM_START][0] if IM_START in added else None
        self.n_ids = max(ids) + 1
        self.valid_ids = np.zeros(self.vocab_size, dtype=bool)             # [V]
        self.valid_ids[ids] = True
        by_length = sorted(added, key=len, reverse=True)                   # leftmost match, the longest first
        either = lambda names: re.compile("|".join(map(re.escape, names))) if names else None
        self._find_added = either(by_length)
        self._find_control = either([name for name in by_length if self.added[name][1]])
        self._find_ordinary = either([name for name in by_length if not self.added[name][1]])
        if fast is None:
            self._set_ranks(ranks)
        else:
            self._set_fast(fast, vocab)

    def _set_ranks(self, ranks: dict[bytes, int]) -> None:
        """tiktoken encodes. UserError where Hugging Face would give other ids."""
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:
            raise UserError(f"tokenizer: no token for byte {missing[0]} ({len(missing)} of 256 missing)")
        self.merges = merges_of(ranks)           # also the check of all ranks: some seconds for Qwen2
        self._bpe = tiktoken.Encoding("nanomimo", pat_str=PATTERN, mergeable_ranks=ranks,
                                      special_tokens={text: i for text, (i, _) in self.added.items()})
        self._bytes_of = self._bpe.decode_bytes

    def _set_fast(self, fast: dict, vocab: dict[str, int]) -> None:
        """Hugging Face's library encodes: once with all added tokens, once with control tokens as ordinary text."""
        try:
            import tokenizers
        except ImportError:
            raise UserError("this tokenizer does not follow Qwen2's rule and needs Hugging Face's library: "
                            "pip install tokenizers") from None
        for entry in fast["added_tokens"]:
            entry["special"] = self.added[entry["content"]][1]
        self.merges, text = None, json.dumps(fast, ensure_ascii=False)
        try:
            self._with_control, self._as_text = (tokenizers.Tokenizer.from_str(text) for _ in range(2))
        except BaseException as e:               # the library raises a bare Exception, or a panic, which is none
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            raise UserError(f"tokenizer.json: {e}") from None
        self._as_text.encode_special_tokens = True
        for tokenizer in (self._with_control, self._as_text):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        table = {i: bytes(map(U2B.__getitem__, t)) if U2B.keys() >= set(t) else t.encode() for t, i in vocab.items()}
        table |= {i: t.encode() for t, (i, _) in self.added.items()}
        self._bytes_of = lambda ids: b"".join(map(table.__getitem__, ids))

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        if self.fast is not None:
            digest.update(json.dumps(self.fast, sort_keys=True).encode())
        for token, i in sorted((self.ranks or {}).items(), key=lambda item: item[1]):
            digest.update(b"%d %d " % (i, len(token)) + token)
        digest.update(repr(sorted(self.added.items())).encode())
        return digest.hexdigest()

    # ---- text <-> ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, control: bool = False) -> list[int]:
        """
        text -> ids. control=False: control tokens written in the text are ordinary characters. control=True: they are
        found and become their ids, which is Hugging Face's default; only for text that we wrote ourselves.
        """
        if self.fast is not None:
            return (self._with_control if control else self._as_text).encode(whole(text), add_special_tokens=False).ids
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
        """Text without added tokens -> ids."""
        text = text if text.isascii() else nfc(whole(text))
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
        return self.bytes_of(ids, skip_control).decode("utf-8", "replace")

    def bytes_of(self, ids: Iterable[int], skip_control: bool = False) -> bytes:
        """What decode() makes text of: a token may be a part of a character."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not (0 <= i < self.vocab_size and self.valid_ids[i]):
                raise UserError(f"id {i} is no token: {self.valid_ids.sum()} of {self.vocab_size} rows are")
        if skip_control:
            control = {i for i, is_control in self.added.values() if is_control}
            ids = [i for i in ids if i not in control]
        return self._bytes_of(ids)

    # ---- chat -------------------------------------------------------------------------------------------------------

    def chat(self, messages: Sequence[dict[str, str]],
             add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """
        messages: [{"role": "system" | "user" | "assistant", "content": text}, ...], in the model's own chat template.
        -> (ids, mask), two lists of one length. mask is 1 on the tokens that the model must learn to write: the
        assistant's text and the token that ends its turn, not the header before it and not the newline after it.

            <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n yo <|im_end|> \\n
            0            0    0  0  0          0  0            0         0  1  1          0

        add_generation_prompt: end with the header of the assistant's turn. That prompt is always a prefix of the full
        sample, so the prompts of RL equal those of SFT. A system prompt is added only if the template has a default
        one; an empty system message is a turn of its own. UserError names the message with another role, or with a
        content that is not text.
        """
        if self.chat_template is None:
            raise UserError("this tokenizer has no chat template: put a chat_template.jinja into the model's folder")
        for k, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role not in ("system", "user", "assistant"):
                raise UserError(f"message {k}: role {role!r} should be system, user or assistant")
            if not isinstance(content, str):
                raise UserError(f"message {k} ({role}): content should be text, is {type(content).__name__}")
        # Control tokens in a content are taken apart by a letter that nobody uses, until the template has been split at
        # its own ones. The parts are encoded apart, so that the prompt stays a prefix for every answer
        everything = "".join(m["content"] for m in messages)
        wedge = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in everything)
        safe = [{"role": m["role"], "content": self._split_control(m["content"], wedge)} for m in messages]
        end = next(name for name, (i, _) in self.added.items() if i == self.im_end_id)
        tokens = {name: text for name, text in self.names.items() if text is not None}
        ids, mask = [], []
        for text, train in chat_template.parts(self.chat_template, safe, end, add_generation_prompt, **tokens):
            new, at = [], 0
            for match in self._find_control.finditer(text):
                new += [*self.encode(text[at:match.start()].replace(wedge, "")), self.added[match.group()][0]]
                at = match.end()
            new += self.encode(text[at:].replace(wedge, ""))
            ids += new
            mask += [int(train)] * len(new)
        return ids, mask

    def with_system(self, text: str) -> "Tokenizer":
        """
        This tokenizer with another system prompt for conversations without one, "" for an empty system turn. save()
        writes it into the chat template: whoever serves the model sends the prompt that it was trained on.
        """
        if self.chat_template is None:
            raise UserError("this tokenizer has no chat template, so no system prompt either")
        other = copy.copy(self)
        other.chat_template = chat_template.with_system(self.chat_template, whole(text))
        return other

    def _split_control(self, text: str, wedge: str) -> str:
        """text with the letter `wedge` between the letters of each control token; twice where one begins in another."""
        while self._find_control.search(text):
            text = self._find_control.sub(lambda match: wedge.join(match.group()) + wedge, text)
        return text

    # ---- files ------------------------------------------------------------------------------------------------------

    @staticmethod
    def load(name: str | os.PathLike) -> "Tokenizer":
        """name: "tiny", or a folder with Hugging Face's files. UserError names the file that is missing or wrong."""
        if str(name) == "tiny":
            return load_tiny()
        try:
            return load_folder(Path(name))
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError) as e:
            raise UserError(f"{name}: the tokenizer's files are not of a byte-level BPE's form "
                            f"({type(e).__name__}: {e})") from None

    def save(self, folder: str | os.PathLike, chat: bool = True) -> None:
        """
        Write tokenizer.json and tokenizer_config.json, and with ranks vocab.json, merges.txt and added_tokens.json:
        what transformers, vLLM and SGLang read, and what load(folder) reads back to the same tokenizer. chat: is the
        model's last token <|im_end|> or, for a base model, <|endoftext|>.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dump = lambda value, **k: json.dumps(value, ensure_ascii=False, **k) + "\n"
        write = lambda file, text: (folder / file).write_text(text, encoding="utf-8", newline="\n")
        text_of = {i: text for text, (i, _) in self.added.items()}
        ends = {"eos_token": text_of[self.im_end_id if chat else self.eos_id]}
        config = self.names | ends | {
            "clean_up_tokenization_spaces": False, "padded_vocab_size": self.vocab_size,
            "chat_template": self.chat_template}
        if self.fast is not None:
            write("tokenizer.json", dump(self.fast))
            write("tokenizer_config.json", dump({"tokenizer_class": "PreTrainedTokenizerFast"} | config, indent=1))
            return
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
        config |= {"tokenizer_class": "Qwen2Tokenizer", "errors": "replace", "add_prefix_space": False,
                   "split_special_tokens": False,
                   "added_tokens_decoder": {str(a["id"]): {k: a[k] for k in a if k != "id"} for a in added}}
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
    """A folder in one of Hugging Face's layouts -> Tokenizer. UserError if a file is missing or it is no such BPE."""
    has = lambda file: (folder / file).is_file()
    config = read_json(folder / "tokenizer_config.json") if has("tokenizer_config.json") else {}
    fast, merges_file = None, folder / "merges.txt"
    if has("tokenizer.json"):
        fast = read_json(folder / "tokenizer.json")
        check_kind(fast, folder / "tokenizer.json")
        # two spellings exist: "a b" and ["a", "b"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in fast["model"]["merges"]]
        vocab, entries = fast["model"]["vocab"], fast.setdefault("added_tokens", [])
    elif has("vocab.json") and has("merges.txt"):
        vocab = read_json(folder / "vocab.json")
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        # the header is the only comment: real merges begin with "#" too
        merges = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version"):] if line]
        entries = [dict(e, id=int(i)) for i, e in config.get("added_tokens_decoder", {}).items()]
        if not entries:
            found = read_json(folder / "added_tokens.json") if has("added_tokens.json") else {}
            entries = [{"content": t, "id": i, "special": t.startswith("<|")} for t, i in found.items()]
    else:
        raise UserError(f"{folder}: no tokenizer.json and no vocab.json + merges.txt")
    added = {e["content"]: (e["id"], bool(e.get("special"))) for e in entries}
    size, names, template = padded_size(folder, config), special_names(folder, config), template_of(folder, config)
    if template is None and IM_START in added:
        template = CHAT_TEMPLATE
    # Qwen2 lists its control tokens outside vocab.json; a vocab.json that holds them too is accepted
    wrong = why_not_ranks(fast, vocab, entries)
    if wrong is None:
        ranks = {bytes(map(U2B.__getitem__, t)): i for t, i in vocab.items() if t not in added}
        try:
            tokenizer = Tokenizer(ranks, added, size, template, names)
            check_merges(folder, tokenizer.merges, merges)
            return tokenizer
        except UserError as e:
            if fast is None:                     # nothing but Qwen2's rule says how these files split a text
                raise
            wrong = str(e)
    if fast is None:
        raise UserError(f"{folder}: {wrong}; a tokenizer.json beside vocab.json would say how it is meant")
    return Tokenizer(None, added, size, template, names, fast)


def check_kind(fast: dict, path: Path) -> None:
    """UserError unless the contents of tokenizer.json are a byte-level BPE's."""
    model, decoder = fast.get("model") or {}, fast.get("decoder") or {}
    decoders = [d.get("type") for d in decoder.get("decoders", [decoder])]
    if model.get("type") != "BPE" or model.get("byte_fallback") or "ByteLevel" not in decoders:
        raise UserError(f"{path}: model {model.get('type')!r} with decoder {decoder.get('type')!r} should be BPE with "
                        "ByteLevel: only byte-level BPE is read, not SentencePiece (Llama 2, Mistral 7B, Gemma)")


def why_not_ranks(fast: dict | None, vocab: dict[str, int], entries: list[dict]) -> str | None:
    """
    Why Qwen2's rule (NFC, PATTERN, merges by id) does not describe this tokenizer, in words; None if it may, as far as
    one sees without computing the merges. fast: contents of tokenizer.json or None.
    """
    for e in entries:
        flags = [k for k in ("lstrip", "rstrip", "single_word", "normalized") if e.get(k)]
        if flags:
            return f"added token {e['content']!r} has {flags[0]}=true, should be false"
    # checking the merges of a token takes time with the square of its length
    if sum(len(token) ** 2 for token in vocab) > MOST_MERGING:
        return f"tokens of up to {max(map(len, vocab)):,} bytes, too long for their merges to be checked"
    if fast is None:
        return None
    model, pre = fast["model"], fast.get("pre_tokenizer") or {}
    if any(model.get(k) for k in ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return "ignore_merges, dropout, or a prefix or suffix of words is not Qwen2's BPE"
    if (fast.get("normalizer") or {}).get("type") != "NFC":
        return f"normalizer {fast.get('normalizer')} should be NFC"
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in pre.get("pretokenizers", [pre])]
    if steps != [{"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                 {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
        return f"should be split by {PATTERN}"
    return None


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


def special_names(folder: Path, config: dict) -> dict[str, str | None]:
    """bos_token, eos_token, pad_token, unk_token as text, from tokenizer_config.json or special_tokens_map.json."""
    more = folder / "special_tokens_map.json"
    found = (read_json(more) if more.is_file() else {}) | config
    text = lambda value: value.get("content") if isinstance(value, dict) else value
    return {name: text(found[name]) for name in ("bos_token", "eos_token", "pad_token", "unk_token") if name in found}


def template_of(folder: Path, config: dict) -> str | None:
    """The chat template: chat_template.jinja, where newer versions of transformers put it, else tokenizer_config's."""
    if (folder / "chat_template.jinja").is_file():
        check_inside(folder / "chat_template.jinja")
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):               # several by name, of which "default" is for conversations
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def check_inside(path: Path) -> None:
    """
    UserError for a file of a downloaded folder that is a link elsewhere: a private file would travel with the model.
    The Hugging Face cache is the exception, whose files are links to ../../blobs.
    """
    real, home = path.resolve(), path.parent.resolve()
    if home not in real.parents and real.parent != home.parent.parent / "blobs":
        raise UserError(f"{path} is a link to {real}, should lie in the folder")


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
