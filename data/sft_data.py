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

    python -m data.sft_data samples.jsonl kept.jsonl        # prints the counts (no decontamination: no eval
    set here)
"""
import json
import re
import sys
from collections import Counter
from pathlib import Path

from data import decontaminate
from data.decontaminate import build_index

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


def read_samples(path):
    """JSONL -> list of rows. ValueError with file, line and what would be right."""
    rows = []
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                turns = row["messages"]
                if not turns or not all(isinstance(m[k], str) for m in turns for k in ("role", "content")):
                    raise ValueError("messages must be a list of {role, content}, both text")
            except (ValueError, KeyError, TypeError) as e:
                why = f"no field {e}" if isinstance(e, KeyError) else e
                raise ValueError(f'{path}, line {n}: {why}; a sample is {{"messages": [...]}}') from None
            rows.append(row)
    return rows


def write_samples(path, rows):
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def load_samples(path, tokenizer, heldout="", max_per_query=8):
    """
    The SFT set ready for packing: read, filtered against the questions of the JSONL file `heldout` ("" =
    none; lines with a "question" or "messages"), tokenised. -> (list of (ids, mask), report in words).
    ValueError if none is left.
    """
    rows, contaminated = read_samples(path), lambda query: False
    if heldout:
        index = build_index(read_questions(heldout))
        hit = decontaminate.contaminated([query_of(r) for r in rows], index)
        bad = {query_of(r) for r, h in zip(rows, hit, strict=True) if h}
        contaminated = bad.__contains__
    kept, dropped = filter_samples(rows, contaminated, max_per_query)
    if not kept:
        raise ValueError(f"{path}: none of {len(rows)} samples is left after the filters: {dict(dropped)}")
    counts = ", ".join(f"{reason} {n:,}" for reason, n in dropped.items())
    report = f"{len(kept):,} of {len(rows):,} kept; dropped: {counts}"
    return [tokenizer.chat(row["messages"]) for row in kept], report


def read_questions(path):
    """Evaluation questions of a JSONL file: problems ("question") or chats ("messages")."""
    questions = []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            questions.append(row["question"] if "question" in row else query_of(row))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}, line {n}: should be JSON with "question" or "messages"') from None
    return questions


def main(source, target):
    try:
        rows = read_samples(source)
    except (ValueError, OSError) as e:
        raise SystemExit(f"sft_data error: {e}") from None
    kept, dropped = filter_samples(rows)
    write_samples(target, kept)
    print(f"{len(rows):,} samples, kept {len(kept):,}; dropped: "
          + ", ".join(f"{reason} {n:,}" for reason, n in dropped.items()))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m data.sft_data samples.jsonl kept.jsonl")
    main(*sys.argv[1:])
