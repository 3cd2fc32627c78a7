"""
SFT filters (report section 3.1): which of the ~500K samples are dropped before training, with a count for each reason.

The filters run in this order; each reason counts only samples that the filters before it kept:

    contaminated   a 16-gram of the QUERY occurs in an evaluation set (data/decontaminate.py)
    incomplete     no final answer; an unbalanced <think>, code fence or \\boxed{; or marked as cut at the length limit
    mixed          a foreign script inside the response: "Let's 考虑 the case"
    duplicate      the same query with the same response, letter for letter
    over_cap       more than 8 responses to one query [paper 3.1]; the best scored are kept, else the first

A sample is {"messages": [{"role", "content"}, ...]}, optionally with "source", "id", "score", "finish_reason". The
report names the filters, not their rules; the thresholds below are ours.

    python -m data.sft_data samples.jsonl kept.jsonl                                       # prints the counts
    python -m data.sft_data samples.jsonl out/sft --tokenizer=MiMo-7B-Base --workers=32    # writes token shards
"""
import math
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
from configurator import UserError
from data.decontaminate import build_index, contaminated
from data.jsonl import line_of, write_jsonl
from data.readers import table_rows
from data.shards import Shards, opened, write_source
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    source: str = ""                      # samples, JSONL
    out: str = ""                         # NAME.jsonl: the kept samples; any other name: a folder of token shards
    heldout: str = ""                     # JSONL of evaluation questions for the 16-gram filter; "" = none
    max_per_query: int = 8                # responses kept per query [paper 3.1]
    tokenizer: str = "tiny"               # "tiny" or a folder with tokenizer files; for token shards
    workers: int = 1                      # processes that tokenise

    POSITIONAL = ("source", "out")

    def __post_init__(self):
        configurator.at_least(self, 1, "max_per_query", "workers")


def main(cfg: Config) -> None:
    kept, counts = read_filtered(cfg.source, cfg.heldout, cfg.max_per_query)
    print(counts)
    if cfg.out.endswith(".jsonl"):
        write_jsonl(cfg.out, kept)
    else:
        info = write_tokenised(cfg.out, kept, cfg.tokenizer, cfg.workers)
        print(f"{cfg.out}: {info['documents']:,} samples, {info['tokens']:,} tokens")


# ---- the filters ----------------------------------------------------------------------------------------------------

REASONS = ("contaminated", "incomplete", "mixed", "duplicate", "over_cap")
CODE_OR_TEX = re.compile(r"```.*?(```|\Z)|`[^`\n]*`"
                         r"|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+", re.DOTALL)
# one unit of text in each script: a Chinese or Japanese character carries about as much as an English word
SCRIPTS = {
    "latin": re.compile(r"[A-Za-z\u00C0-\u024F]{2,}"),           # two letters or more: x and y are mathematics
    "han": re.compile(r"[\u3040-\u30FF\u3400-\u9FFF]"),
    "hangul": re.compile(r"[\uAC00-\uD7AF]{2,}"),
    "cyrillic": re.compile(r"[\u0400-\u04FF]{2,}"),
    "arabic": re.compile(r"[\u0600-\u06FF]{2,}"),
    "devanagari": re.compile(r"[\u0900-\u097F]{2,}"),
}


def query_of(sample: dict) -> str:
    """All that the user wrote, joined by line ends."""
    return "\n".join(m["content"] for m in sample["messages"] if m["role"] == "user")


def response_of(sample: dict) -> str:
    """The last message if it is the assistant's, else ""."""
    last = sample["messages"][-1]
    return last["content"] if last["role"] == "assistant" else ""


def is_mixed(text: str, share: float = 0.02, latin_share: float = 0.3) -> bool:
    """
    True if a script other than the main one makes up more than `share` of the words, code and formulas left out. Latin
    words inside another script are usual ("用 Python 的 list") and may reach latin_share.

    By hand: "Let's 考虑 the case" has the Latin words Let, the, case and the Han characters 考, 虑: 2 of 5 are foreign.
    """
    prose = CODE_OR_TEX.sub(" ", text)
    counts = Counter({name: len(unit.findall(prose)) for name, unit in SCRIPTS.items()})
    total, (main_script, _) = sum(counts.values()), counts.most_common(1)[0]
    limit = lambda name: total if name == main_script else total * (latin_share if name == "latin" else share)
    return any(n > limit(name) for name, n in counts.items())


def is_cut(sample: dict) -> bool:
    """True if the answer ended at the length limit."""
    return sample.get("finish_reason") == "length"


def is_incomplete(sample: dict) -> bool:
    """True if there is no complete final answer after the reasoning."""
    text = response_of(sample)
    if is_cut(sample) or sample["messages"][0]["role"] == "assistant":
        return True
    opened, closed = text.count("<think>"), text.count("</think>")
    final = text.rsplit("</think>", 1)[-1]
    if opened > 1 or opened != closed or not final.strip():
        return True
    if opened and text.index("</think>") < text.index("<think>"):
        return True
    return text.count("```") % 2 == 1 or has_open_box(final)


def has_open_box(text: str) -> bool:
    """True if the brace of a \\boxed{ is never closed."""
    for start in (m.end() for m in re.finditer(r"\\boxed\s*\{", text)):
        depth = 1
        for c in text[start:]:
            depth += (c == "{") - (c == "}")
            if depth == 0:
                break
        if depth:
            return True
    return False


def filter_samples(samples: list[dict], is_contaminated: Callable[[str], bool] = lambda query: False,
                   max_per_query: int = 8, cut: bool = False) -> tuple[list[dict], Counter]:
    """
    is_contaminated(query) -> bool; cut: keep answers that the length limit ended. -> (kept samples in their order,
    number of dropped samples per reason). Queries that differ only in case and spaces count as one for max_per_query.
    Of equal scores the earlier sample is kept.
    """
    dropped, seen, per_query = Counter(dict.fromkeys(REASONS, 0)), set(), {}
    for k, sample in enumerate(samples):
        query, text = query_of(sample), response_of(sample)
        if is_contaminated(query):
            dropped["contaminated"] += 1
        elif is_incomplete(sample) and not (cut and text and is_cut(sample)):
            dropped["incomplete"] += 1
        elif is_mixed(text):
            dropped["mixed"] += 1
        elif (query, text) in seen:
            dropped["duplicate"] += 1
        else:
            seen.add((query, text))
            per_query.setdefault(" ".join(query.lower().split()), []).append(k)
    kept = set()
    for group in per_query.values():
        best = sorted(group, key=lambda k: (-samples[k].get("score", 0.0), k))[:max_per_query]
        kept.update(best)
        dropped["over_cap"] += len(group) - len(best)
    return [sample for k, sample in enumerate(samples) if k in kept], dropped


# ---- reading --------------------------------------------------------------------------------------------------------

FORM = 'a sample is {"messages": [{"role": ..., "content": text}, ...]}'


def answered(row: dict) -> list[dict]:
    """
    The samples of a row: itself; or one for each of its "answers", as `sample.py --file` writes them beside "prompt" or
    "messages": a model's own answers, to train MTP layers or the next model on.
    """
    if "answers" not in row:
        return [row]
    before = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    finish = row.get("finish", ["stop"] * len(row["answers"]))
    return [row | {"messages": [*before, {"role": "assistant", "content": answer}], "finish_reason": reason}
            for answer, reason in zip(row["answers"], finish, strict=True)]


def read_samples(path: str | Path) -> list[dict]:
    """
    JSONL -> samples. UserError names file and line of what is no sample, and a file that holds none; OSError if the
    file cannot be opened.
    """
    samples = []
    for file, n, sample in table_rows(path, FORM):
        with line_of(file, n, FORM):
            found = answered(sample)
            for one in found:
                check_turns(one["messages"])
            score = sample.get("score", 0.0)
            if type(score) not in (int, float) or not math.isfinite(score):
                raise UserError(f"score = {score!r} should be a finite number")
        samples += found
    if not samples:
        raise UserError(f"{path}: no samples in it; {FORM}, one a line")
    return samples


def check_turns(messages: list[dict[str, str]]) -> None:
    """UserError if messages is not a conversation that Tokenizer.chat takes."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages should be a list with a turn at least")
    for k, m in enumerate(messages):
        if not isinstance(m, dict) or not isinstance(m.get("content"), str):
            raise UserError(f"messages[{k}] should be an object with role and content, both text")
        if m.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"messages[{k}]: role {m.get('role')!r} should be system, user or assistant")


def read_questions(path: str | Path) -> list[str]:
    """
    Evaluation questions of a file: problems ("question", or "problem", "prompt" or "text" as published sets have them)
    or chats ("messages"). UserError as read_samples.
    """
    questions = []
    for file, n, row in table_rows(path):
        with line_of(file, n, 'should be JSON with "question" or "messages"'):
            column = next((c for c in ("question", "messages", "problem", "prompt", "text") if c in row), "question")
            questions.append(query_of(row) if column == "messages" else row[column])
            if not isinstance(questions[-1], str):
                raise UserError(f"{column} = {questions[-1]!r} is no text")
    return questions


def read_filtered(path: str | Path, heldout: str | Path = "", max_per_query: int = 8,
                  cut: bool = False) -> tuple[list[dict], str]:
    """
    The samples of a JSONL file that pass all filters; heldout: JSONL of evaluation questions, "" = none; cut: as in
    filter_samples. -> (samples, the counts as one line of text). UserError if none is left.
    """
    samples, is_contaminated = read_samples(path), lambda query: False
    if heldout:
        queries = [query_of(sample) for sample in samples]
        hits = contaminated(queries, build_index(read_questions(heldout)))           # bool [len(samples)]
        is_contaminated = {query for query, hit in zip(queries, hits, strict=True) if hit}.__contains__
    kept, dropped = filter_samples(samples, is_contaminated, max_per_query, cut)
    if not kept:
        raise UserError(f"{path}: none of {len(samples)} samples is left after the filters: {dict(dropped)}")
    counts = ", ".join(f"{reason} {n:,}" for reason, n in dropped.items())
    return kept, f"{len(kept):,} of {len(samples):,} kept; dropped: {counts}"


# ---- tokens ---------------------------------------------------------------------------------------------------------

def load_samples(path: str | Path, tokenizer: Tokenizer, heldout: str | Path = "", max_per_query: int = 8,
                 cut: bool = False) -> tuple[Sequence[tuple[np.ndarray, np.ndarray]], str]:
    """
    The SFT set, ready for data.pack. path: a JSONL file, which is filtered and tokenised here (fine up to some 10,000
    samples), or a folder of token shards that this script made. cut: keep answers that the length limit ended, and do
    not train their end token: MTP layers learn from any text of their model. -> (sequence of (ids uint32 [n], mask bool
    [n]), one line of text about it). UserError says what is wrong with the files.
    """
    if Path(path).is_dir():
        samples = ShardSamples(path, tokenizer.vocab_size, tokenizer.fingerprint)
        return samples, f"{len(samples):,} samples, filtered and tokenised before, from {path}"
    kept, counts = read_filtered(path, heldout, max_per_query, cut)
    samples = [as_arrays(tokenizer.chat(sample["messages"])) for sample in kept]
    for sample, (_, mask) in zip(kept, samples, strict=True):
        if is_cut(sample):
            mask[np.flatnonzero(mask)[-1]] = False           # the template's end token, which the model did not write
    return samples, counts


def as_arrays(sample: tuple[list[int], list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) as lists -> as arrays uint32 and bool: 5 bytes a token instead of 16."""
    return np.asarray(sample[0], np.uint32), np.asarray(sample[1], bool)


class ShardSamples(Sequence):
    """
    Tokenised samples in shards: source "sft" holds the ids, "sft_mask" the mask, 1 where to train.
    tokenizer: fingerprint of the model's. UserError if another one made them, or if the two were not written together.
    """
    def __init__(self, folder: str | Path, vocab_size: int, tokenizer: str = ""):
        self.ids, self.mask = Shards(folder, "sft", vocab_size, tokenizer=tokenizer), Shards(folder, "sft_mask", 2)
        tables = lambda source: [(s.n_documents, opened(s).table_crc) for s in source.shards]
        if tables(self.ids) != tables(self.mask):
            raise UserError(f"{folder}: sft and sft_mask do not belong together; write them again")
        self.first = np.cumsum([0] + [s.n_documents for s in self.ids.shards])     # number of each shard's first sample

    def __len__(self) -> int:
        return self.ids.n_documents

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = int(np.searchsorted(self.first, i, side="right")) - 1                # the shard that holds sample i
        at = i - int(self.first[k])
        return self.ids.shards[k].document(at), self.mask.shards[k].document(at)


def write_tokenised(folder: str | Path, samples: Iterable[dict], tokenizer: str = "tiny", workers: int = 1) -> dict:
    """
    Tokenise once and in parallel, instead of on every rank at every start: 500K samples take an hour on one core.
    tokenizer: "tiny" or a folder. -> the manifest of source "sft" (data/shards.py).
    """
    masks, loaded = [], Tokenizer.load(tokenizer)

    def ids_only(tokenised: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
        for ids, mask in tokenised:
            masks.append(mask)
            yield ids

    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (tokenizer,)) as pool:
        tokenised = ids_only(pool.imap(_tokenise, samples, chunksize=64))
        info = write_source(folder, "sft", tokenised, loaded.vocab_size, tokenizer=loaded.fingerprint)
    write_source(folder, "sft_mask", masks, 2)
    return info


def _start_worker(tokenizer: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.load(tokenizer)


def _tokenise(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    return as_arrays(_tokenizer.chat(sample["messages"]))


if __name__ == "__main__":
    configurator.run(main, Config)
