"""
SFT filters (report section 3.1): what is dropped from ~500K samples before training, with a count for each
reason.

In this order, so that each reason counts what the ones before let through:
  contaminated   a 16-gram of the QUERY occurs in an evaluation set (the function is passed in)
  incomplete     no final answer, unbalanced <think>, code fence or \\boxed{, or marked as cut
  mixed          a foreign script inside the response: "Let's 考虑 the case"
  duplicate      the same query with the same response, letter for letter
  over_cap       more than 8 responses to one query [paper]; the best scored stay, else the first

Rows are {"messages": [{"role", "content"}, ...], optional "source", "id", "score", "finish_reason"}. The
report names the filters, not their rules; the thresholds below are ours.

    python -m data.sft_data samples.jsonl kept.jsonl                       # prints the counts
    python -m data.sft_data samples.jsonl out/sft --tokenizer=MiMo-7B-Base --workers=32    # as token shards
"""
import argparse
import multiprocessing
import re
from collections import Counter
from pathlib import Path

import numpy as np

from configurator import UserError, os_words
from data import decontaminate
from data.decontaminate import build_index
from data.jsonl import line_of, read_jsonl, write_jsonl
from data.shards import Shards, write_source
from tokenizer import Tokenizer

REASONS = ("contaminated", "incomplete", "mixed", "duplicate", "over_cap")

CODE = re.compile(r"```.*?(```|\Z)|`[^`\n]*`"                                            # code
                  r"|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+", re.DOTALL)   # TeX
# one unit of text per script: a Chinese or Japanese character says about as much as an English word
SCRIPTS = {
    "latin": re.compile(r"[A-Za-z\u00C0-\u024F]{2,}"),           # two letters: x and y are mathematics
    "han": re.compile(r"[\u3040-\u30FF\u3400-\u9FFF]"),
    "hangul": re.compile(r"[\uAC00-\uD7AF]{2,}"),
    "cyrillic": re.compile(r"[\u0400-\u04FF]{2,}"),
    "arabic": re.compile(r"[\u0600-\u06FF]{2,}"),
    "devanagari": re.compile(r"[\u0900-\u097F]{2,}"),
}


def query_of(row):
    """All that the user wrote, joined."""
    return "\n".join(m["content"] for m in row["messages"] if m["role"] == "user")


def response_of(row):
    """The last message if it is the assistant's, else ""."""
    last = row["messages"][-1]
    return last["content"] if last["role"] == "assistant" else ""


def normalised(text):
    """Lower case, single spaces: what counts as the same query for the cap."""
    return " ".join(text.lower().split())


def is_mixed(text, share=0.02, latin_share=0.3):
    """
    A second script in more than `share` of the words of prose (code and formulas aside). Latin words inside
    another script are usual ("用 Python 的 list") and get more room. By hand: "Let's 考虑 the case" has latin
    Let, the, case and han 考, 虑: 2 of 5 words are foreign, True.
    """
    prose = CODE.sub(" ", text)
    counts = Counter({name: len(rule.findall(prose)) for name, rule in SCRIPTS.items()})
    total, (main, _) = sum(counts.values()), counts.most_common(1)[0]
    room = lambda name: total if name == main else total * (latin_share if name == "latin" else share)
    return any(n > room(name) for name, n in counts.items())


def is_incomplete(row):
    """No whole final answer after the reasoning."""
    text = response_of(row)
    if row.get("finish_reason") == "length" or row["messages"][0]["role"] == "assistant":
        return True
    opened, closed = text.count("<think>"), text.count("</think>")
    final = text.rsplit("</think>", 1)[-1]
    if opened > 1 or opened != closed or not final.strip():
        return True
    if opened and text.index("</think>") < text.index("<think>"):
        return True
    return text.count("```") % 2 == 1 or has_open_box(final)


def has_open_box(text):
    """A \\boxed{ whose brace is never closed."""
    for start in (m.end() for m in re.finditer(r"\\boxed\s*\{", text)):
        depth = 1
        for c in text[start:]:
            depth += (c == "{") - (c == "}")
            if depth == 0:
                break
        if depth:
            return True
    return False


def filter_samples(rows, contaminated=lambda query: False, cap=8):
    """
    rows: list of samples; contaminated(query) -> bool. -> (kept, in the given order; Counter of dropped per
    reason). Deterministic: no randomness, ties go to the earlier row.
    """
    dropped, seen, per_query = Counter(dict.fromkeys(REASONS, 0)), set(), {}
    for k, row in enumerate(rows):
        query, key = query_of(row), (query_of(row), response_of(row))
        if contaminated(query):
            dropped["contaminated"] += 1
        elif is_incomplete(row):
            dropped["incomplete"] += 1
        elif is_mixed(response_of(row)):
            dropped["mixed"] += 1
        elif key in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(key)
            per_query.setdefault(normalised(query), []).append(k)
    kept = set()
    for group in per_query.values():
        best = sorted(group, key=lambda k: (-rows[k].get("score", 0.0), k))[:cap]
        kept.update(best)
        dropped["over_cap"] += len(group) - len(best)
    return [row for k, row in enumerate(rows) if k in kept], dropped


SAMPLE = 'a sample is {"messages": [{"role": ..., "content": text}, ...]}'


def read_samples(path):
    """JSONL -> list of rows. ValueError with file, line and what would be right; also if there is none."""
    rows = []
    for n, row in read_jsonl(path, SAMPLE):
        with line_of(path, n, SAMPLE):
            check_turns(row["messages"])
            if type(row.get("score", 0.0)) not in (int, float):
                raise UserError(f"score = {row['score']!r} should be a number")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no samples in it; {SAMPLE}, one a line")
    return rows


def check_turns(turns):
    """ValueError for what is no conversation that Tokenizer.chat takes."""
    if not isinstance(turns, list) or not turns:
        raise UserError("messages should be a list with a turn at least")
    for k, m in enumerate(turns):
        if not isinstance(m, dict) or not isinstance(m.get("content"), str):
            raise UserError(f"messages[{k}] should be an object with role and content, both text")
        if m.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"messages[{k}]: role {m.get('role')!r} should be system, user or assistant")


def filtered(path, heldout="", max_per_query=8):
    """
    A JSONL file through all filters, against the questions of the JSONL file `heldout` ("" = none). -> (kept
    rows, report in words). ValueError if none is left.
    """
    rows, contaminated = read_samples(path), lambda query: False
    if heldout:
        index = build_index(read_questions(heldout))
        hit = decontaminate.contaminated([query_of(r) for r in rows], index)
        bad = {query_of(r) for r, h in zip(rows, hit, strict=True) if h}
        contaminated = bad.__contains__
    kept, dropped = filter_samples(rows, contaminated, max_per_query)
    if not kept:
        raise UserError(f"{path}: none of {len(rows)} samples is left after the filters: {dict(dropped)}")
    counts = ", ".join(f"{reason} {n:,}" for reason, n in dropped.items())
    return kept, f"{len(kept):,} of {len(rows):,} kept; dropped: {counts}"


def load_samples(path, tokenizer, heldout="", max_per_query=8):
    """
    The SFT set ready for data.pack. path: a JSONL file, filtered and tokenised here (fine up to some 10,000
    samples), or a folder that the command above made. -> (sequence of (ids, mask), report in words).
    ValueError says what is wrong.
    """
    if Path(path).is_dir():
        samples = ShardSamples(path, tokenizer.vocab_size)
        return samples, f"{len(samples):,} samples, filtered and tokenised before, from {path}"
    kept, report = filtered(path, heldout, max_per_query)
    return [as_arrays(tokenizer.chat(row["messages"])) for row in kept], report


def as_arrays(sample):
    """(ids, mask) lists -> arrays: 5 bytes a token instead of 16."""
    return np.asarray(sample[0], np.uint32), np.asarray(sample[1], bool)


class ShardSamples:
    """Tokenised samples in memory-mapped shards: source "sft" holds the ids, "sft_mask" 1 where to train."""
    def __init__(self, folder, vocab_size):
        self.ids, self.mask = Shards(folder, "sft", vocab_size), Shards(folder, "sft_mask", 2)
        if [s.ends.tolist() for s in self.ids.shards] != [s.ends.tolist() for s in self.mask.shards]:
            raise UserError(f"{folder}: sft and sft_mask do not belong together; write them again")

    def __len__(self):
        return self.ids.n_documents

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.ids[i], self.mask[i]


def write_tokenised(folder, rows, tokenizer="tiny", workers=1):
    """
    Tokenise once, in parallel, instead of in every rank at every start: 500K samples take an hour on one
    core.
    """
    masks, vocab_size = [], Tokenizer.load(tokenizer).vocab_size

    def ids_of(samples):
        for ids, mask in samples:
            masks.append(mask)
            yield ids
    with multiprocessing.get_context("spawn").Pool(workers, _start, (tokenizer,)) as pool:
        info = write_source(folder, "sft", ids_of(pool.imap(_tokenise, rows, chunksize=64)), vocab_size)
    write_source(folder, "sft_mask", masks, 2)
    return info


def _start(tokenizer):
    global _tokenizer
    _tokenizer = Tokenizer.load(tokenizer)


def _tokenise(row):
    return as_arrays(_tokenizer.chat(row["messages"]))


def read_questions(path):
    """Evaluation questions of a JSONL file: problems ("question") or chats ("messages")."""
    questions = []
    for n, row in read_jsonl(path):
        with line_of(path, n, 'should be JSON with "question" or "messages"'):
            questions.append(row["question"] if "question" in row else query_of(row))
            if not isinstance(questions[-1], str):
                raise UserError(f"question = {questions[-1]!r} is no text")
    return questions


def main(argv=None):
    parser = argparse.ArgumentParser("python -m data.sft_data", description="filter and tokenise SFT samples")
    parser.add_argument("source", help="samples, JSONL")
    parser.add_argument("target", help="X.jsonl: filtered samples; other names: a folder of shards")
    parser.add_argument("--heldout", default="", help="JSONL of evaluation questions, 16-gram filter")
    parser.add_argument("--tokenizer", default="tiny", help="tiny, or a folder with tokenizer files")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenise")
    parser.add_argument("--cap", type=int, default=8, help="answers kept per query [paper 3.1]")
    a = parser.parse_args(argv)
    if a.workers < 1 or a.cap < 1:
        raise SystemExit(f"sft_data error: workers = {a.workers} and cap = {a.cap} should be at least 1")
    try:
        kept, report = filtered(a.source, a.heldout, a.cap)
        print(report)
        if a.target.endswith(".jsonl"):
            write_jsonl(a.target, kept)
        else:
            info = write_tokenised(a.target, kept, a.tokenizer, a.workers)
            print(f"{a.target}: {info['documents']:,} samples, {info['tokens']:,} tokens")
    except (ValueError, OSError) as e:
        raise SystemExit(f"sft_data error: {os_words(e) if isinstance(e, OSError) else e}") from None


if __name__ == "__main__":
    main()
