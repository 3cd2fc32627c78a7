"""Real corpora in the shapes the recipe reads: documents for data/corpus.py, problems for RL, chats for SFT.

Rows come from any folder (or file) of .jsonl, .jsonl.gz, .jsonl.zst, .txt, .html and .parquet, or by name
from the Hugging Face hub, streamed. One adapter for each public set turns its columns into ours; the column
names were read from the dataset cards. Filters of report section 3.2 that need no model are applied here:
no proofs, no multiple choice, answers kept as they are, problems without tests dropped. What an adapter
drops it returns as None.

    python -m data.hub fineweb_edu FOLDER_OR_NAME out.jsonl --limit=1000     # documents: {"url", "text"}
    python -m data.hub dapo FOLDER_OR_NAME out.jsonl              # problems, as data/problems.py reads them
    python -m data.hub openthoughts FOLDER_OR_NAME out.jsonl      # {"messages", "source", "id"}
    python -m data.hub openwebmath FOLDER_OR_NAME out/web --tokenizer=tiny --name=maths --heldout=test.jsonl
                                           # documents through dedup and decontamination into shards
`datasets` 4.0 removed loading scripts, so LiveCodeBench and TACO load from their data files: give a folder.
"""

import argparse
import base64
import gzip
import io
import json
import pickle
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from configurator import UserError, os_words
from data import tag as tagging
from data.corpus import SOURCE_OF, Corpus, Record, clean
from data.jsonl import read_jsonl
from data.problems import Problem, Test, identity, read_problems
from data.shards import write_source
from tokenizer import Tokenizer

MAX_ANSWERS = 8  # responses kept for one query [paper 3.1]
MAX_BYTES = 1 << 28  # LiveCodeBench's packed tests: no more than this after decompression

# ---- rows


def read_rows(path: Path) -> Iterator[dict]:
    """Rows of one file, by its ending. A .txt or .html file is one row {"text" or "html", "url": its
    path}."""
    name = path.name
    if name.endswith(".parquet"):
        import pyarrow.parquet as pq  # 170 MB, only for those who read parquet

        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    elif name.endswith((".txt", ".html", ".htm")):
        text = path.read_bytes().decode("utf-8", "replace")
        yield {"text" if name.endswith(".txt") else "html": text, "url": str(path)}
    else:
        if name.endswith(".zst"):
            import zstandard

            file = io.BufferedReader(zstandard.open(path, "rb"))
        else:
            file = gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb")
        try:
            for _, row in read_jsonl(path, file=file):
                yield row
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise UserError(f"{path}: cut off or damaged: {e}") from None


def rows(source: str, split: str = "train", name: str | None = None) -> Iterator[dict]:
    """Rows of a folder (all files below it, in the order of their paths), of a file, or of a hub dataset,
    streamed. FileNotFoundError for a folder without a readable file."""
    endings = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".html", ".htm", ".parquet")
    path = Path(source)
    if path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.name.endswith(endings))
        if not files or not all(p.name.endswith(endings) for p in files):
            raise FileNotFoundError(f"{source}: no file that ends in {', '.join(endings)}")
        for file in files:
            yield from read_rows(file)
        return
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise FileNotFoundError(f"{source}: no such folder or file, and not a hub name like owner/dataset")
    from datasets import load_dataset  # 375 MB with its dependencies, only for the hub

    yield from load_dataset(source, name, split=split, streaming=True)


def need(row: dict, field: str, kind: type = str):
    """row[field]; ValueError with the columns that are there when it is missing or of another type."""
    value = row.get(field)
    if not isinstance(value, kind):
        raise UserError(
            f"row needs {field!r} ({kind.__name__}), has {type(value).__name__}; columns: {', '.join(sorted(row))}"
        )
    return value


# ---- documents


def document(row: dict) -> Record | None:
    """Any row with text, html or content (FineWeb-Edu, OpenWebMath, The Stack, own files); None when
    empty."""
    text, html = row.get("text") or row.get("content") or "", row.get("html") or ""
    if not (text or html):
        if not {"text", "html", "content"} & set(row):
            raise UserError(f"row needs text, html or content; columns: {', '.join(sorted(row))}")
        return None
    where = row.get("url") or row.get("id") or row.get("path") or identity(text or html)
    return Record(str(where), html="" if text else html, text=text)


# ---- conversations (SFT)


def think_form(text: str) -> str:
    """R1-style text in our form "<think>\\n...\\n</think>\\n\\nanswer". OpenThoughts' own marks are
    rewritten; text without any mark stays as it is."""
    text = re.sub(r"<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>", r"<think>\1</think>", text, flags=re.S)
    text = re.sub(r"<\|(?:begin|end)_of_solution\|>", "", text)
    if "</think>" not in text:
        return text.strip()
    thought, answer = text.split("</think>", 1)
    return f"<think>\n{thought.replace('<think>', '', 1).strip()}\n</think>\n\n{answer.strip()}"


def sample(question: str, answer: str, source: str, key: str) -> dict:
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": think_form(answer)}]
    return {"messages": chat, "source": source, "id": key}


def openthoughts(row: dict) -> list[dict]:
    """OpenThoughts-114k: system, conversations [{from, value}]. The system prompt only names its own marks:
    left out."""
    roles = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
    chat = [
        {"role": roles[turn["from"]], "content": think_form(turn["value"])}
        for turn in need(row, "conversations", list)
        if turn["from"] in roles
    ]
    return [{"messages": chat, "source": "openthoughts", "id": identity(chat[0]["content"])}]


def openr1_sft(row: dict) -> list[dict]:
    """OpenR1-Math-220k: the complete generations that were found right, eight at most. Rows without
    verdicts of Math-Verify are judged by the column of the language-model judge."""
    good = row.get("correctness_math_verify") or row.get("correctness_llama") or []
    whole = row.get("is_reasoning_complete") or []
    kept = [
        text
        for i, text in enumerate(need(row, "generations", list))
        if i < len(good) and good[i] and i < len(whole) and whole[i]
    ]
    question = need(row, "problem")
    return [sample(question, t, "openr1", f"{row.get('uuid')}/{i}") for i, t in enumerate(kept[:MAX_ANSWERS])]


def deepmath_sft(row: dict) -> list[dict]:
    """DeepMath-103K: r1_solution_1 .. 3."""
    question = need(row, "question")
    given = [row.get(f"r1_solution_{i}") for i in (1, 2, 3)]
    return [sample(question, t, "deepmath", f"{identity(question)}/{i}") for i, t in enumerate(given) if t]


# ---- maths problems (RL)

CHOICES = re.compile(r"\([A-E]\).*\([A-E]\)|\\text(?:bf)?\{\s*\(?[A-E]\)?|\n\s*A[.)].*\n\s*B[.)]", re.S)
PROOF = re.compile(r"\b(?:prove|show) that\b|\bprove\b", re.I)


def maths_problem(question: str, answer, level: int = 1) -> Problem | None:
    """A Problem with its original answer; None for proofs, multiple choice and empty answers [paper 3.2]."""
    answer = str(answer if answer is not None else "").strip()
    if not answer or not question.strip() or CHOICES.search(question) or PROOF.search(question):
        return None
    if re.fullmatch(r"\(?[A-E]\)?", answer) or answer.lower() in ("proof", "yes", "no", "true", "false"):
        return None  # a letter or a yes can be guessed
    key = identity(" ".join(question.lower().split()))
    return Problem(key, "maths", question.strip(), level=level, answer=answer)


def openr1(row: dict) -> Problem | None:
    """OpenR1-Math-220k as RL problems; question_type names proofs and multiple choice."""
    if str(row.get("question_type", "")).lower() in ("proof", "mcq", "multiple-choice"):
        return None
    return maths_problem(need(row, "problem"), row.get("answer"))


def deepmath(row: dict) -> Problem | None:
    """DeepMath-103K: question, final_answer, difficulty (a float around 1..10)."""
    return maths_problem(
        need(row, "question"), row.get("final_answer"), level=max(1, round(row.get("difficulty") or 1))
    )


def dapo(row: dict) -> Problem | None:
    """DAPO-Math-17k: prompt [{role, content}], reward_model {ground_truth}. The frame around the question
    goes; the set repeats each prompt about 100 times by accident, so read it through `convert`, which drops
    exact repeats."""
    text = need(row, "prompt", list)[-1]["content"]
    text = re.sub(r"^Solve the following math problem step by step\..*?\n\n", "", text, count=1, flags=re.S)
    text = re.sub(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*$", "", text)
    return maths_problem(text, need(row, "reward_model", dict).get("ground_truth"))


# ---- code problems (RL)

LEVELS = {"easy": 1, "medium": 2, "medium_hard": 3, "hard": 4, "very_hard": 5}
LEVELS |= {"introductory": 1, "interview": 2, "competition": 3}  # APPS


def as_json(value, default):
    """Several sets keep JSON inside a string; '' and None give the default."""
    if isinstance(value, str):
        sys.set_int_max_str_digits(0)  # APPS has integers of more than 4,300 digits
        return json.loads(value) if value.strip() else default
    return default if value is None else value


def code_problem(question: str, tests: list[Test], entry: str, level, golden: str = "") -> Problem | None:
    """A Problem with a fenced golden solution; None without tests [paper 3.2]."""
    if not tests or not question.strip():
        return None
    solution = f"```python\n{golden.strip()}\n```" if golden else ""
    key = identity(" ".join(question.split()))
    rank = level if isinstance(level, int) else LEVELS.get(str(level).lower(), 1)
    return Problem(
        key, "code", question.strip(), level=rank, tests=tuple(tests), entry=entry, solution=solution
    )


def apps(row: dict) -> Problem | None:
    """APPS and TACO: question, solutions (JSON), starter_code, input_output (JSON: inputs, outputs,
    fn_name), difficulty.

    With fn_name the tests are calls, else programs that read stdin. In call tests many rows wrap the value
    in a list; it is unwrapped only when every output of the problem is a list of one."""
    cases = as_json(row.get("input_output"), {})
    inputs, outputs, entry = cases.get("inputs") or [], cases.get("outputs") or [], cases.get("fn_name")
    solutions = as_json(row.get("solutions"), [])
    if entry:
        if all(isinstance(o, list) and len(o) == 1 for o in outputs):
            outputs = [o[0] for o in outputs]
        pairs = [(i if isinstance(i, list) else [i], o) for i, o in zip(inputs, outputs, strict=False)]
        tests = [Test("call", json.dumps(i), json.dumps(o)) for i, o in pairs]
    else:
        text = lambda x: "\n".join(map(str, x)) if isinstance(x, list) else str(x)
        tests = [Test("stdio", text(i), text(o)) for i, o in zip(inputs, outputs, strict=False)]
    question, starter = need(row, "question"), row.get("starter_code") or ""
    if starter.strip():
        question += f"\n\nStart from this code:\n{starter.strip()}"
    return code_problem(
        question, tests, entry or "main", row.get("difficulty"), solutions[0] if solutions else ""
    )


def codecontests(row: dict) -> Problem | None:
    """CodeContests: public, private and generated tests; golden = the first Python 3 solution (language
    3)."""
    tests = [
        Test("stdio", i, o)
        for field in ("public_tests", "private_tests", "generated_tests")
        for i, o in zip(
            (row.get(field) or {}).get("input", []), (row.get(field) or {}).get("output", []), strict=True
        )
    ]
    golden = python3(row.get("solutions") or {})
    level = 1 + max(0, min(4, ((row.get("cf_rating") or 800) - 800) // 500))  # 800 -> 1, 2,800 and more -> 5
    return code_problem(need(row, "description"), tests, "main", level, golden[0] if golden else "")


def python3(programs: dict) -> list[str]:
    """Programs of a CodeContests column in Python 3. On `incorrect_solutions`: real wrong programs, to rate
    tests."""
    languages = programs.get("language", [])
    return [s for n, s in zip(languages, programs.get("solution", []), strict=True) if n in (3, "PYTHON3")]


class OnlyPlain(pickle.Unpickler):
    """Reads pickles of strings, numbers, lists and dicts. Anything that names a class could run code:
    refused."""

    def find_class(self, module, name):
        raise UserError(f"pickle wants {module}.{name}: refused, only plain values are read")


def unpack_tests(packed) -> list[dict]:
    """LiveCodeBench's private tests: JSON, or base64(zlib(pickle(JSON))). The pickle comes from the net, so
    it goes through OnlyPlain, and decompression stops at 256 MiB."""
    if not isinstance(packed, str) or packed.lstrip()[:1] in ("[", ""):
        return as_json(packed, [])
    unzip = zlib.decompressobj()
    raw = unzip.decompress(base64.b64decode(packed), MAX_BYTES)
    if unzip.unconsumed_tail:
        raise UserError(f"packed tests are larger than {MAX_BYTES >> 20} MiB")
    value = OnlyPlain(io.BytesIO(raw)).load()
    return json.loads(value) if isinstance(value, (str, bytes)) else value


def livecodebench(row: dict) -> Problem | None:
    """LiveCodeBench: question_content, public_test_cases, private_test_cases, metadata (func_name),
    difficulty.

    Its call tests ("functional") give one JSON value for each argument, one to a line.
    """
    cases = as_json(row.get("public_test_cases"), []) + unpack_tests(row.get("private_test_cases"))
    entry = as_json(row.get("metadata"), {}).get("func_name") or "main"
    tests = []
    for case in cases:
        if case.get("testtype") == "functional":
            args = [json.loads(line) for line in case["input"].split("\n") if line.strip()]
            tests.append(Test("call", json.dumps(args), json.dumps(json.loads(case["output"]))))
        else:
            tests.append(Test("stdio", case["input"], case["output"]))
    question, starter = need(row, "question_content"), row.get("starter_code") or ""
    if starter.strip():
        question += f"\n\nStart from this code:\n{starter.strip()}"
    return code_problem(question, tests, entry, row.get("difficulty"))


# ---- all together

ADAPTERS = {
    "text": document, "fineweb_edu": document, "openwebmath": document, "the_stack": document,
    "openthoughts": openthoughts, "openr1_sft": openr1_sft, "deepmath_sft": deepmath_sft,
    "openr1": openr1, "deepmath": deepmath, "dapo": dapo,
    "apps": apps, "taco": apps, "codecontests": codecontests, "livecodebench": livecodebench,
}  # fmt: skip


def convert(
    adapter: str, given: Iterable[dict], dropped: dict | None = None
) -> Iterator[Record | Problem | dict]:
    """Rows -> items of the adapter, without exact repeats of a problem. `dropped` counts what was left out
    and why.

    ValueError for an unknown adapter, and for a row whose columns do not fit, with the row's number, from 1.
    """
    if adapter not in ADAPTERS:
        raise UserError(f"adapter {adapter!r}: must be one of {', '.join(sorted(ADAPTERS))}")
    dropped, seen = {} if dropped is None else dropped, set()
    for n, row in enumerate(given, 1):
        try:
            made = ADAPTERS[adapter](row)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, zlib.error, pickle.UnpicklingError) as e:
            what = f"no field {e}" if isinstance(e, KeyError) else e
            raise UserError(f"adapter {adapter}, row {n}: {what}") from None
        if not made:
            dropped["filtered"] = dropped.get("filtered", 0) + 1
            continue
        for item in made if isinstance(made, list) else [made]:
            if isinstance(item, Problem):
                if item.id in seen:
                    dropped["repeat"] = dropped.get("repeat", 0) + 1
                    continue
                seen.add(item.id)
            yield item


def documents(source: str, adapter: str = "text", limit: int | None = None) -> list[Record]:
    """Records of a folder or hub name, ready for data.corpus.clean."""
    return list(islice(convert(adapter, rows(source)), limit))


def to_shards(
    records: list[Record], folder: Path, tokenizer: str, name: str, heldout: list[str], labels: str
) -> None:
    """Records through the whole pipeline into token shards, one source for each kind of document.

    labels: a JSONL file of a teacher's labels (data/tag.py); a tagger trained on it sorts and re-weights
    the documents. Without labels all documents go to the source `name`, once each."""
    tagger, report = tagging.train(*tagging.read_labels(labels)) if labels else (None, {})
    kept, funnel, _ = clean(records, heldout, tagger, quiet=False)
    by_source: dict[str, list[str]] = {}
    for rec in kept:
        source = SOURCE_OF.get(rec.tags.domain, "web") if rec.tags else name
        by_source.setdefault(source, []).append(rec.text)
    print(Corpus(by_source, funnel, report).table())
    tok = Tokenizer.load(tokenizer)
    for source, texts in by_source.items():
        ids = (tok.encode(text) + [tok.eos_id] for text in texts)
        info = write_source(str(folder), source, ids, tok.vocab_size)
        print(f"  {source}: {info['tokens']:,} tokens in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description="turn a public corpus into JSONL that the recipe reads")
    parser.add_argument("adapter", choices=sorted(ADAPTERS))
    parser.add_argument("source", help="folder, file, or hub name owner/dataset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--split", default="train")
    parser.add_argument("--tokenizer", help="write shards: 'tiny' or a folder with tokenizer files")
    parser.add_argument("--name", default="web", help="source of the shards when there are no labels")
    parser.add_argument("--labels", default="", help="JSONL of a teacher's labels, for the tagger")
    parser.add_argument("--heldout", default="", help="problems no document may hold (JSONL)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        raise SystemExit(f"hub error: limit = {args.limit} should be at least 1")
    dropped: dict[str, int] = {}
    items = convert(args.adapter, rows(args.source, args.split), dropped)
    temporary, count = args.out.with_name(args.out.name + ".tmp"), 0
    try:
        if args.tokenizer:
            held = [p.question for p in read_problems(args.heldout)] if args.heldout else []
            records = list(islice(items, args.limit))
            if not records or not all(isinstance(r, Record) for r in records):
                raise UserError(
                    f"{args.source}: no documents to write (adapter {args.adapter}, {len(records)} items)"
                )
            return to_shards(records, args.out, args.tokenizer, args.name, held, args.labels)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.out.is_dir():
            raise UserError(f"{args.out} is a folder; out should be a .jsonl file, or add --tokenizer for shards")
        with open(temporary, "w", encoding="utf-8") as f:
            for item in tqdm(islice(items, args.limit), unit="row", disable=None):
                if isinstance(item, Record):
                    item = (
                        {"url": item.url, "text": item.text}
                        if item.text
                        else {"url": item.url, "html": item.html}
                    )
                f.write(
                    json.dumps(asdict(item) if isinstance(item, Problem) else item, ensure_ascii=False) + "\n"
                )
                count += 1
        if not count:
            raise UserError(f"{args.source}: nothing left to write: {dropped or 'there is no row'}")
        temporary.replace(args.out)
    except (ValueError, OSError, ImportError) as e:
        raise SystemExit(f"hub error: {os_words(e) if isinstance(e, OSError) else e}") from None
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{args.out}: {count:,} written", *(f"{n:,} {why}" for why, n in dropped.items()), sep=", ")


if __name__ == "__main__":
    main()
