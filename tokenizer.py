"""
Tokenizer: text <-> ids through tiktoken, from our own ranks (nothing is ever downloaded).

Report, section 2.2: MiMo-7B uses the Qwen2 tokenizer (vocabulary padded to 151,680). Two sources, one class:
  Tokenizer.load("tiny")   the embedded byte-level BPE, data/tiny/bpe.tiktoken: 1,024 ids, made by
                           data/tiny/train_bpe.py
  Tokenizer.load(folder)   Hugging Face files: tokenizer.json, or vocab.json + merges.txt [+
                           tokenizer_config.json / added_tokens.json]; the ids are those of Hugging Face's own
                           tokenizer (tests/test_tokenizer.py)
Both split text with Qwen2's regular expression, in which every digit is its own token.

Control tokens inside a text are never special here: encode("<|im_end|>") gives ordinary pieces, so that no
web page and no user can forge the end of a turn. Only chat() and the document writers insert control ids.

    python tokenizer.py "Problem: 17 + 25 = ?"      # shows the pieces; 2.0 to 3.2 characters a token
"""
import base64
import json
import os
import re
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken

from configurator import UserError

try:   # Python's Unicode tables differ from Hugging Face's on 51 combining marks: prefer theirs
    from tokenizers.normalizers import NFC
    _nfc = NFC().normalize_str
except ImportError:
    def _nfc(text):
        return unicodedata.normalize("NFC", text)

TINY = Path(__file__).resolve().parent / "data" / "tiny" / "bpe.tiktoken"
EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# [HF] Qwen2's pre-tokenizer: contractions | word with one leading sign | ONE digit | signs | line ends |
# spaces
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# ChatML without a default system prompt (MiMo's README advises an empty one); the same string chat() builds
# as ids
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def _normal(text):
    """NFC; half of a surrogate pair, which has no UTF-8 form, becomes U+FFFD."""
    return _nfc(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def byte_to_unicode():
    """
    GPT-2's printable stand-in for each byte, as used in vocab.json: 188 bytes stand for themselves, the
    others become code points from 256 on. -> list of 256 one-character strings.
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    table, spare = [], 256
    for b in range(256):
        table.append(chr(b if b in plain else spare))
        spare += b not in plain
    return table


B2U = byte_to_unicode()
U2B = {u: b for b, u in enumerate(B2U)}


def bpe_pieces(token, ranks, max_rank):
    """Byte-pair-merge `token` using only ranks below max_rank -> list of pieces (bytes).

    At every step the adjacent pair whose concatenation has the lowest rank is merged, leftmost first. By
    hand, with ranks a=0 b=1 c=2 ab=3 abc=4: bpe_pieces(b"abc", ranks, 4) = [b"ab", b"c"], and (ab, c) is the
    merge that makes abc."""
    parts = [token[i:i + 1] for i in range(len(token))]
    pairs = [ranks.get(a + b, max_rank) for a, b in zip(parts, parts[1:], strict=False)]
    while pairs and (best := min(pairs)) < max_rank:
        i = pairs.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del pairs[i]
        for j in (i - 1, i):                  # only the two joints of the new piece change
            if 0 <= j < len(pairs):
                pairs[j] = ranks.get(parts[j] + parts[j + 1], max_rank)
    return parts


def merges_of(ranks):
    """The merge list that the ranks stand for, in rank order -> list of (left, right) bytes.

    tiktoken merges by the rank of the RESULT, Hugging Face by a list of PAIRS; the two agree on every text if
    and only if each token re-derives from exactly two lower pieces. Raises ValueError naming the first token
    that does not."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = bpe_pieces(token, ranks, rank)
        if len(parts) != 2:
            raise UserError(f"token {rank} {token!r} is made of {len(parts)} pieces, not 2: no merge "
                            "list gives these ranks, so tiktoken and Hugging Face would disagree")
        merges.append((parts[0], parts[1]))
    return merges


class Tokenizer:
    """Byte-level BPE with control tokens.

    ranks       dict bytes -> id, the ordinary tokens
    added       dict text -> (id, is_control): tokens outside the BPE. Control tokens (<|im_end|>) are never
                found in a text by encode(); the others (<tool_call> in Qwen2.5) always are, as in Hugging
                Face
    vocab_size  rows of the embedding, >= the largest id + 1 (Qwen2: 151,665 used, padded to 151,680)
    """

    def __init__(self, ranks, added, vocab_size=None, chat_template=CHAT_TEMPLATE):
        self.ranks, self.added, self.chat_template = ranks, added, chat_template
        self.merges = merges_of(ranks)     # the self-check: some seconds for Qwen2
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
        # padded rows are no tokens: the engine draws among the first n_ids (Engine(ids=)), and decode() refuses them
        self.n_ids = max(ids) + 1
        self.valid_ids = np.zeros(self.vocab_size, dtype=bool)    # [V]
        self.valid_ids[ids] = True
        self._bpe = tiktoken.Encoding("nanomimo", pat_str=PATTERN, mergeable_ranks=ranks,
                                      special_tokens={text: i for text, (i, _) in added.items()})
        # leftmost match, longest first
        alternatives = sorted(added, key=len, reverse=True)
        self._split_all = re.compile("|".join(map(re.escape, alternatives)))
        plain = [t for t in alternatives if not added[t][1]]
        self._split_plain = re.compile("|".join(map(re.escape, plain))) if plain else None

    # ---- text <-> ids
    # ----------------------------------------------------------------------------------------------

    def encode(self, text, control=False):
        """text -> list of ids. control=False: control tokens written in the text are ordinary characters.
        control=True: they become their ids, as Hugging Face does by default (only for text that we wrote
        ourselves)."""
        split = self._split_all if control else self._split_plain
        if split is None:
            return self._segment(text)
        ids, at = [], 0
        # added tokens first, normalisation second: "<|im_end|>" + U+0338 would otherwise compose to
        # "<|im_end|" + U+226F
        for match in split.finditer(text):
            ids += self._segment(text[at:match.start()])
            ids.append(self.added[match.group()][0])
            at = match.end()
        return ids + self._segment(text[at:])

    def _segment(self, text):
        return self._bpe.encode_ordinary(text if text.isascii() else _normal(text))

    def encode_documents(self, texts, threads=1):
        """
        Many documents -> list of id lists, each ended by eos_id (a document is never split by its own text).
        """
        if self._split_plain is None:
            normal = [t if t.isascii() else _normal(t) for t in texts]
            lists = self._bpe.encode_ordinary_batch(normal, num_threads=threads)
        else:
            lists = [self.encode(t) for t in texts]
        return [ids + [self.eos_id] for ids in lists]

    def decode(self, ids, skip_control=False, errors="replace"):
        """
        ids -> text; bytes that are no UTF-8 become U+FFFD. ValueError for an id that is no token (padding
        row).
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not (0 <= i < self.vocab_size and self.valid_ids[i]):
                raise UserError(f"id {i} is no token: {self.valid_ids.sum()} of {self.vocab_size} rows are")
        if skip_control:
            control = {i for i, is_control in self.added.values() if is_control}
            ids = [i for i in ids if i not in control]
        return self._bpe.decode_bytes(ids).decode("utf-8", errors)

    # ---- chat
    # ------------------------------------------------------------------------------------------------------

    def chat(self, messages, add_generation_prompt=False, last_only=False):
        """ChatML -> (ids, mask), two lists of one length; mask is 1 on the tokens the model must learn to
        write: the assistant's text and its <|im_end|>, not the header, not the newline after. last_only: only
        the last assistant turn.

            <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nyo<|im_end|>\\n
            0           0   0  0 0         0  0           0        0  1 1         0

        messages: [{"role": "system" | "user" | "assistant", "content": text}]; no system prompt is added when
        there is none. The prompt (add_generation_prompt=True) is always a prefix of the full sample, so RL
        prompts equal the SFT ones."""
        ids, mask = [], []

        def put(new, train):
            ids.extend(new)
            mask.extend([int(train)] * len(new))

        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        for k, m in enumerate(messages):
            role, content = m["role"], m["content"]
            if role not in ("system", "user", "assistant"):
                raise UserError(f"message {k}: role {role!r} should be system, user or assistant")
            if not isinstance(content, str):
                raise UserError(f"message {k} ({role}): content should be text, is {type(content).__name__}")
            train = role == "assistant" and (not last_only or k == turns[-1])
            put([self.im_start_id], False)
            if role == "assistant":   # header apart: the prompt stays a prefix whatever the answer is
                put(self.encode("assistant\n"), False)
                put(self.encode(content), train)
            else:                     # in one piece, as Hugging Face's template does
                put(self.encode(f"{role}\n{content}"), False)
            put([self.im_end_id], train)
            put(self.encode("\n"), False)
        if add_generation_prompt:
            put([self.im_start_id, *self.encode("assistant\n")], False)
        return ids, mask

    # ---- files
    # -----------------------------------------------------------------------------------------------------

    @staticmethod
    def load(name):
        """
        "tiny" or a folder -> Tokenizer. Raises ValueError that names the file, FileNotFoundError if there is
        none.
        """
        if str(name) == "tiny":
            return _load_tiny()
        try:
            return _load_folder(os.fspath(name))
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise UserError(f"{name}: the tokenizer's files are not of Qwen2's form "
                            f"({type(e).__name__}: {e})") from None

    def save(self, folder):
        """
        Write tokenizer.json, vocab.json, merges.txt, added_tokens.json and tokenizer_config.json: what
        transformers, vLLM and SGLang read, and what load(folder) reads back to the same tokenizer.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        u = lambda token: "".join(B2U[b] for b in token)
        vocab = {u(t): r for t, r in sorted(self.ranks.items(), key=lambda item: item[1])}
        merges = [f"{u(a)} {u(b)}" for a, b in self.merges]
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [{"id": i, "content": t, **plain, "special": control}
                 for t, (i, control) in sorted(self.added.items(), key=lambda item: item[1][0])]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                      "use_regex": False}
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


def write_tiktoken(path, ranks):
    """One "base64(token) rank" per line, the format of OpenAI's .tiktoken files."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(t).decode()} {r}\n" for t, r in ordered]
    Path(path).write_text("".join(lines), encoding="ascii", newline="\n")


@lru_cache(maxsize=1)
def _load_tiny():
    ranks = {}
    for line in TINY.read_text(encoding="ascii").splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    # the three control tokens follow the ordinary ones
    return Tokenizer(ranks, {name: (len(ranks) + k, True) for k, name in enumerate((EOS, IM_START, IM_END))},
                     vocab_size=len(ranks) + 3)


def _read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from None


def _load_folder(folder):
    folder = Path(folder)
    has = lambda file: (folder / file).is_file()
    config = _read_json(folder / "tokenizer_config.json") if has("tokenizer_config.json") else {}
    if has("tokenizer.json"):
        vocab, merges, entries = _read_fast(folder / "tokenizer.json")
    elif has("vocab.json") and has("merges.txt"):
        vocab = _read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        # the header is the only comment: "#" also starts real merges
        merges = [tuple(s.split(" ")) for s in lines[lines[0].startswith("#version"):] if s]
        entries = [dict(e, id=int(i)) for i, e in config.get("added_tokens_decoder", {}).items()]
        if not entries:
            names = _read_json(folder / "added_tokens.json") if has("added_tokens.json") else {}
            entries = [{"content": t, "id": i, "special": t.startswith("<|")} for t, i in names.items()]
    else:
        raise FileNotFoundError(f"{folder}: no tokenizer.json and no vocab.json + merges.txt")
    added = {}
    for e in entries:
        flags = [k for k in ("lstrip", "rstrip", "single_word", "normalized") if e.get(k)]
        if flags:
            raise UserError(f"{folder}: added token {e['content']!r} has {flags[0]}=true, should be false")
        added[e["content"]] = (e["id"], bool(e.get("special")))
    # Qwen2 lists its control tokens outside vocab.json; a vocab.json that holds them too is fine
    ranks = {bytes(map(U2B.__getitem__, t)): i for t, i in vocab.items() if t not in added}
    template = config.get("chat_template", CHAT_TEMPLATE)
    if has("chat_template.jinja"):       # where newer versions of transformers put it
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tok = Tokenizer(ranks, added, _padded_size(folder, config), template)
    _check_merges(folder, tok.merges, merges)
    return tok


def _read_fast(path):
    """
    tokenizer.json -> vocab, merges (pairs), added tokens. ValueError if it is not Qwen2's kind of tokenizer.
    """
    fast = _read_json(path)
    model, pre = fast.get("model", {}), json.dumps(fast.get("pre_tokenizer"))
    if model.get("type") != "BPE" or json.dumps(PATTERN) not in pre:
        raise UserError(f"{path}: not Qwen2's byte-level BPE: model {model.get('type')!r} should be BPE, "
                        f"split by {PATTERN}")
    if (fast.get("normalizer") or {}).get("type") != "NFC":
        raise UserError(f"{path}: normalizer {fast.get('normalizer')} should be NFC")
    if model.get("ignore_merges"):
        raise UserError(f"{path}: ignore_merges=true is not Qwen2's BPE")
    # both forms exist: "a b" and ["a", "b"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return model["vocab"], merges, fast.get("added_tokens", [])


def _check_merges(folder, implied, merges):
    """
    The file's merges must be the ones the ids imply, in id order; else tiktoken's ids would differ from HF's.
    """
    for k, (pair, both) in enumerate(zip(merges, implied, strict=False)):
        if tuple(bytes(map(U2B.__getitem__, part)) for part in pair) != both:
            raise UserError(f"{folder}: merge {k} is {pair}, the ids imply {both}: order them by id")
    if len(merges) != len(implied):
        raise UserError(f"{folder}: {len(merges)} merges for {len(implied)} tokens of more than one byte")


def _padded_size(folder, config):
    """
    Rows of the embedding: our own note, else the model's config beside it, else None = next multiple of 128.
    """
    if isinstance(config.get("padded_vocab_size"), int):
        return config["padded_vocab_size"]
    for file in ("config.json", "model.json"):
        if (folder / file).is_file():
            size = _read_json(folder / file).get("vocab_size")
            if isinstance(size, int):
                return size
    return None


if __name__ == "__main__":
    tok = Tokenizer.load("tiny")
    shown = tok.encode(" ".join(sys.argv[1:]) or "Problem: what is 17 + 25?")
    print(" | ".join(f"{tok.decode([i])!r} {i}" for i in shown))
    print(f"{len(shown)} tokens of a vocabulary of {tok.vocab_size}")
