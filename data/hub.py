"""
Real corpora in the forms that the recipe reads: documents for data/corpus.py, problems for RL, chats for SFT.

Rows come from any folder (or file) of .jsonl, .jsonl.gz, .jsonl.zst, .txt, .html and .parquet, or by name from the
Hugging Face hub, streamed. One adapter for each public set turns its columns into ours; the column names were read from
the dataset cards.

    adapters                                     give
    text, fineweb_edu, openwebmath, the_stack    documents, {"url", "text"}
    openthoughts, openr1_sft, deepmath_sft       chats, {"messages", "source", "id"}
    openr1, deepmath, dapo                       maths problems, as data/problems.py reads them
    apps, taco, codecontests, livecodebench      code problems, the same

The filters of report section 3.2 that need no model are applied here: no proofs, no multiple choice, answers not
forced to integers, problems without tests dropped. An adapter returns the reason, or None, for a row that is filtered
out; the counts are printed. The other filters are in data/rl_problems.py. With --heldout no document, chat or problem
is written that holds a question of that problems file.

    python -m data.hub fineweb_edu FOLDER_OR_NAME out.jsonl --limit=1000
    python -m data.hub openthoughts FOLDER_OR_NAME out.jsonl
    python -m data.hub openwebmath FOLDER_OR_NAME out/web --tokenizer=tiny --name=maths --heldout=test.jsonl

The last one sends documents through deduplication and decontamination into token shards. `datasets` 4.0 has no loading
scripts any more, so LiveCodeBench and TACO load from their data files: give a folder.
"""
import base64
import gzip
import importlib
import io
import json
import pickle
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

import configurator
from configurator import UserError
from data import tag as tagging
from data.corpus import SOURCE_OF, Corpus, Record, clean
from data.filters import without_heldout
from data.jsonl import read_jsonl, whole_file
from data.problems import Problem, Test, identity, read_problems
from data.sft_data import query_of
from data.shards import write_source
from tokenizer import Tokenizer

MAX_ANSWERS = 8          # responses kept for one query [paper 3.1]
MAX_BYTES = 1 << 28      # LiveCodeBench's packed tests: no more than this after decompression


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("adapter", "source", "out")
    adapter: str = ""                     # what the rows are: a name of the table above
    source: str = ""                      # a folder, a file, or a hub name owner/dataset
    out: str = ""                         # JSONL file to write; with a tokenizer the folder of the shards
    limit: int | None = None              # items to take at most, None = all
    split: str = "train"                  # split of a hub dataset
    subset: str = ""                      # configuration of a hub dataset, e.g. sample-10BT; "" = its default
    tokenizer: str = ""                   # write shards: "tiny" or a folder with tokenizer files
    name: str = "web"                     # source of the shards when there are no labels
    labels: str = ""                      # JSONL of a teacher's labels: a tagger sorts and re-weights the documents
    heldout: str = ""                     # problems, .jsonl, that no document, chat or problem may hold

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit = {self.limit} should be at least 1")
        if not self.tokenizer and (self.labels or self.name != "web"):
            raise UserError("name and labels are for shards: add --tokenizer")
        if Path(self.source).exists() and (self.split != "train" or self.subset):
            raise UserError(f"split and subset are for data sets of the hub; {self.source} is a local source")


# ---- rows -----------------------------------------------------------------------------------------------------------

def rows(source: str, split: str = "train", subset: str = "") -> Iterator[dict]:
    """
    Rows of a folder (all files below it, in the order of their paths), of a file, or of a hub dataset, streamed.
    UserError for a source that is not there, a folder without a readable file, and a damaged file.
    """
    endings = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".html", ".htm", ".parquet")
    path = Path(source)
    if path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.name.endswith(endings))
        if not files or not all(p.name.endswith(endings) for p in files):
            raise UserError(f"{source}: no file that ends in {', '.join(endings)}")
        for file in files:
            yield from read_rows(file)
        return
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise UserError(f"{source}: no such folder or file, and not a hub name like owner/dataset")
    datasets = optional("datasets")                         # 375 MB with its dependencies, only for the hub
    try:
        yield from datasets.load_dataset(source, subset or None, split=split, streaming=True)
    except ValueError as e:                                 # no such subset or split
        raise UserError(f"{source}: {' '.join(str(e).split())}") from None


def read_rows(path: Path) -> Iterator[dict]:
    """Rows of one file, by its ending. A .txt or .html file is one row {"text" or "html", "url": its path}."""
    name = path.name
    if name.endswith(".parquet"):
        parquet = optional("pyarrow.parquet")               # 170 MB, only for those who read parquet
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        except ValueError as e:                             # pyarrow's ArrowInvalid
            raise UserError(f"{path}: damaged: {' '.join(str(e).split())}") from None
    elif name.endswith((".txt", ".html", ".htm")):
        text = path.read_bytes().decode("utf-8", "replace")
        yield {"text" if name.endswith(".txt") else "html": text, "url": str(path)}
    else:
        damage: tuple = (EOFError, gzip.BadGzipFile, zlib.error)
        if name.endswith(".zst"):
            zstandard = optional("zstandard")
            file, damage = io.BufferedReader(zstandard.open(path, "rb")), (*damage, zstandard.ZstdError)
        else:
            file = gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb")
        try:
            for _, row in read_jsonl(path, file=file):
                yield row
        except damage as e:
            raise UserError(f"{path}: cut off or damaged: {e}") from None


def optional(module: str) -> ModuleType:
    """A large package that only some sources need. UserError says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"this source needs the package {package}: pip install {package}") from None


def required(row: dict, column: str, kind: type = str) -> Any:
    """row[column]; UserError with the columns that are there when it is missing or of another type."""
    value = row.get(column)
    if not isinstance(value, kind):
        raise UserError(f"row needs {column!r} ({kind.__name__}), has {type(value).__name__}; "
                        f"columns: {', '.join(sorted(row))}")
    return value


# ---- documents ------------------------------------------------------------------------------------------------------

def document(row: dict) -> Record | None:
    """Any row with text, html or content (FineWeb-Edu, OpenWebMath, The Stack, own files); None when it is empty."""
    text, html = row.get("text") or row.get("content") or "", row.get("html") or ""
    if not (text or html):
        if not {"text", "html", "content"} & set(row):
            raise UserError(f"row needs text, html or content; columns: {', '.join(sorted(row))}")
        return None
    url = row.get("url") or row.get("id") or row.get("path") or identity(text or html)
    return Record(str(url), html="" if text else html, text=text)


# ---- chats (SFT) ----------------------------------------------------------------------------------------------------

def think_form(text: str) -> str:
    """
    R1-style text in our form "<think>\\n...\\n</think>\\n\\nanswer". OpenThoughts' own marks are rewritten; text
    without any mark stays as it is.
    """
    text = re.sub(r"<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>", r"<think>\1</think>", text, flags=re.S)
    text = re.sub(r"<\|(?:begin|end)_of_solution\|>", "", text)
    if "</think>" not in text:
        return text.strip()
    thought, answer = text.split("</think>", 1)
    return f"<think>\n{thought.replace('<think>', '', 1).strip()}\n</think>\n\n{answer.strip()}"


def chat(question: str, answer: str, source: str, key: str) -> dict:
    """A line of an SFT file: one question and its answer."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": think_form(answer)}]
    return {"messages": turns, "source": source, "id": key}


def openthoughts(row: dict) -> list[dict]:
    """OpenThoughts-114k: system, conversations [{from, value}]. Its system prompt only names its own marks: dropped."""
    roles = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
    turns = [{"role": roles[turn["from"]], "content": think_form(turn["value"])}
             for turn in required(row, "conversations", list) if turn["from"] in roles]
    return [{"messages": turns, "source": "openthoughts", "id": identity(turns[0]["content"])}]


def openr1_sft(row: dict) -> list[dict]:
    """
    OpenR1-Math-220k: the complete generations that were found right, eight at most. Rows without verdicts of
    Math-Verify are judged by the column of the language-model judge.
    """
    right = row.get("correctness_math_verify") or row.get("correctness_llama") or []
    complete = row.get("is_reasoning_complete") or []
    kept = [text for i, text in enumerate(required(row, "generations", list))
            if i < len(right) and right[i] and i < len(complete) and complete[i]]
    question = required(row, "problem")
    return [chat(question, t, "openr1", f"{row.get('uuid')}/{i}") for i, t in enumerate(kept[:MAX_ANSWERS])]


def deepmath_sft(row: dict) -> list[dict]:
    """DeepMath-103K: r1_solution_1 .. 3."""
    question = required(row, "question")
    solutions = [row.get(f"r1_solution_{i}") for i in (1, 2, 3)]
    return [chat(question, t, "deepmath", f"{identity(question)}/{i}") for i, t in enumerate(solutions) if t]


# ---- maths problems (RL) --------------------------------------------------------------------------------------------

CHOICES = re.compile(r"\([A-E]\).*\([A-E]\)|\\text(?:bf)?\{\s*\(?[A-E]\)?|\n\s*A[.)].*\n\s*B[.)]", re.S)
PROOF = re.compile(r"\b(?:prove|show) that\b|\bprove\b", re.I)


def maths_problem(question: str, answer: Any, level: int = 1) -> Problem | str:
    """A Problem with its original answer; the reason for one that is filtered out [paper 3.2]."""
    answer = str(answer if answer is not None else "").strip()
    if not answer or not question.strip():
        return "no question or answer"
    if PROOF.search(question) or answer.lower() == "proof":
        return "proof"
    if CHOICES.search(question) or re.fullmatch(r"\(?[A-E]\)?", answer):
        return "multiple choice"
    if answer.lower() in ("yes", "no", "true", "false"):
        return "yes or no"                                  # can be guessed
    if "####" in answer:
        return "reference is GSM8K's whole column"
    key = identity(" ".join(question.lower().split()))
    return Problem(key, "maths", question.strip(), level=level, answer=answer)


def openr1(row: dict) -> Problem | str:
    """OpenR1-Math-220k as RL problems; question_type names proofs and multiple choice."""
    kind = str(row.get("question_type", "")).lower()
    if kind in ("proof", "mcq", "multiple-choice"):
        return "proof" if kind == "proof" else "multiple choice"
    return maths_problem(required(row, "problem"), row.get("answer"))


def deepmath(row: dict) -> Problem | str:
    """DeepMath-103K: question, final_answer, difficulty (a float around 1..10)."""
    level = max(1, round(row.get("difficulty") or 1))
    return maths_problem(required(row, "question"), row.get("final_answer"), level)


def dapo(row: dict) -> Problem | str:
    """
    DAPO-Math-17k: prompt [{role, content}], reward_model {ground_truth}. The instructions around the question are cut
    off. The set repeats each prompt about 100 times by accident, so read it through `convert`, which drops repeats.
    """
    text = required(row, "prompt", list)[-1]["content"]
    text = re.sub(r"^Solve the following math problem step by step\..*?\n\n", "", text, count=1, flags=re.S)
    text = re.sub(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*$", "", text)
    return maths_problem(text, required(row, "reward_model", dict).get("ground_truth"))


# ---- code problems (RL) ---------------------------------------------------------------------------------------------

LEVELS = {"easy": 1, "medium": 2, "medium_hard": 3, "hard": 4, "very_hard": 5,
          "introductory": 1, "interview": 2, "competition": 3}              # the second row: APPS


def as_json(value: Any, default: Any) -> Any:
    """Several sets keep JSON inside a string; "" and None give the default."""
    if isinstance(value, str):
        sys.set_int_max_str_digits(0)                       # APPS has integers of more than 4,300 digits
        return json.loads(value) if value.strip() else default
    return default if value is None else value


def code_problem(question: str, tests: list[Test], entry: str, level: Any, golden: str = "") -> Problem | str:
    """
    A Problem; the reason for one without tests [paper 3.2]. level: a number, or a word of LEVELS (unknown words count
    as 1). golden: a right program, "" for none.
    """
    if not tests or not question.strip():
        return "no question or tests"
    solution = f"```python\n{golden.strip()}\n```" if golden else ""
    key = identity(" ".join(question.split()))
    level = level if isinstance(level, int) else LEVELS.get(str(level).lower(), 1)
    return Problem(key, "code", question.strip(), level=level, tests=tuple(tests), entry=entry, solution=solution)


def with_starter(question: str, row: dict) -> str:
    """The question, followed by the code that the answer should start from, where the row has some."""
    starter = (row.get("starter_code") or "").strip()
    return question + (f"\n\nStart from this code:\n{starter}" if starter else "")


def apps(row: dict) -> Problem | str:
    """
    APPS and TACO: question, solutions (JSON), starter_code, input_output (JSON: inputs, outputs, fn_name), difficulty.

    With fn_name the tests are calls, else programs that read stdin. In call tests many rows wrap the value in a list;
    it is unwrapped only when every output of the problem is a list of one.
    """
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
    question = with_starter(required(row, "question"), row)
    return code_problem(question, tests, entry or "main", row.get("difficulty"), solutions[0] if solutions else "")


def codecontests(row: dict) -> Problem | str:
    """CodeContests: public, private and generated tests; golden = the first Python 3 solution (language 3)."""
    tests = []
    for column in ("public_tests", "private_tests", "generated_tests"):
        cases = row.get(column) or {}
        tests += [Test("stdio", i, o) for i, o in zip(cases.get("input", []), cases.get("output", []), strict=True)]
    programs = row.get("solutions") or {}
    pairs = zip(programs.get("language", []), programs.get("solution", []), strict=True)
    golden = next((program for language, program in pairs if language in (3, "PYTHON3")), "")
    level = 1 + max(0, min(4, ((row.get("cf_rating") or 800) - 800) // 500))    # 800 -> 1, 2,800 and more -> 5
    return code_problem(required(row, "description"), tests, "main", level, golden)


class NoClasses(pickle.Unpickler):
    """Reads pickles of strings, numbers, lists and dicts. One that names a class could run code: UserError."""

    def find_class(self, module, name):
        raise UserError(f"pickle wants {module}.{name}: refused, only plain values are read")


def unpack_tests(packed: Any) -> list[dict]:
    """
    LiveCodeBench's private tests: JSON, or base64(zlib(pickle(JSON))). The pickle comes from the net, so it is read by
    NoClasses, and decompression stops at MAX_BYTES. UserError for a pickle with a class, and for one that is larger.
    """
    if not isinstance(packed, str) or packed.lstrip()[:1] in ("[", ""):
        return as_json(packed, [])
    unzip = zlib.decompressobj()
    raw = unzip.decompress(base64.b64decode(packed), MAX_BYTES)
    if unzip.unconsumed_tail:
        raise UserError(f"packed tests are larger than {MAX_BYTES >> 20} MiB")
    value = NoClasses(io.BytesIO(raw)).load()
    return json.loads(value) if isinstance(value, (str, bytes)) else value


def livecodebench(row: dict) -> Problem | str:
    """
    LiveCodeBench: question_content, public_test_cases, private_test_cases, metadata (func_name), difficulty. Its call
    tests ("functional") give one JSON value for each argument, one to a line.
    """
    cases = as_json(row.get("public_test_cases"), []) + unpack_tests(row.get("private_test_cases"))
    entry = as_json(row.get("metadata"), {}).get("func_name") or "main"
    tests = []
    for case in cases:
        if case.get("testtype") == "functional":
            arguments = [json.loads(line) for line in case["input"].split("\n") if line.strip()]
            tests.append(Test("call", json.dumps(arguments), json.dumps(json.loads(case["output"]))))
        else:
            tests.append(Test("stdio", case["input"], case["output"]))
    question = with_starter(required(row, "question_content"), row)
    return code_problem(question, tests, entry, row.get("difficulty"))


# ---- the command ----------------------------------------------------------------------------------------------------

ADAPTERS = {
    "text": document, "fineweb_edu": document, "openwebmath": document, "the_stack": document,
    "openthoughts": openthoughts, "openr1_sft": openr1_sft, "deepmath_sft": deepmath_sft,
    "openr1": openr1, "deepmath": deepmath, "dapo": dapo,
    "apps": apps, "taco": apps, "codecontests": codecontests, "livecodebench": livecodebench,
}


def convert(adapter: str, source_rows: Iterable[dict], dropped: dict[str, int]) -> Iterator[Record | Problem | dict]:
    """
    Rows -> items of the adapter, without exact repeats of a problem. `dropped` counts what was left out and why.
    UserError for an unknown adapter, and for a row whose columns do not fit, with the number of the row, from 1.
    """
    if adapter not in ADAPTERS:
        raise UserError(f"adapter {adapter!r}: must be one of {', '.join(sorted(ADAPTERS))}")
    seen = set()
    for n, row in enumerate(source_rows, 1):
        try:
            items = ADAPTERS[adapter](row)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, zlib.error, pickle.UnpicklingError) as e:
            what = f"no field {e}" if isinstance(e, KeyError) else e
            raise UserError(f"adapter {adapter}, row {n}: {what}") from None
        if not items or isinstance(items, str):
            reason = items or "nothing in it"
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        for item in items if isinstance(items, list) else [items]:
            if isinstance(item, Problem):
                if item.id in seen:
                    dropped["repeat"] = dropped.get("repeat", 0) + 1
                    continue
                seen.add(item.id)
            yield item


def write_shards(records: list[Record], cfg: Config) -> None:
    """
    Documents through the whole pipeline into token shards, one source for each kind of document. With labels, a tagger
    trained on them sorts and re-weights the documents; without, each goes to the source cfg.name, once.
    """
    tokenizer = Tokenizer.load(cfg.tokenizer)
    heldout = [p.question for p in read_problems(cfg.heldout)] if cfg.heldout else []
    tagger, accuracy = tagging.train(*tagging.read_labels(cfg.labels)) if cfg.labels else (None, {})
    kept, funnel, _ = clean(records, heldout, tagger)
    by_source: dict[str, list[str]] = {}
    for record in kept:
        source = SOURCE_OF.get(record.tags.domain, "web") if record.tags else cfg.name
        by_source.setdefault(source, []).append(record.text)
    print(Corpus(by_source, funnel, accuracy).table())
    for source, texts in by_source.items():
        ids = (tokenizer.encode(text) + [tokenizer.eos_id] for text in texts)
        info = write_source(cfg.out, source, ids, tokenizer.vocab_size)
        print(f"  {source}: {info['tokens']:,} tokens in {cfg.out}")


def text_of(item: Record | Problem | dict) -> str:
    """What of an item must not hold a held-out question: a document's text, a problem's question, the user's turns."""
    if isinstance(item, Record):
        return item.text or item.html
    return item.question if isinstance(item, Problem) else query_of(item)


def main(cfg: Config) -> None:
    dropped: dict[str, int] = {}
    heldout = [p.question for p in read_problems(cfg.heldout)] if cfg.heldout else []
    items = convert(cfg.adapter, rows(cfg.source, cfg.split, cfg.subset), dropped)
    if not cfg.tokenizer:                                   # shards have their own decontamination
        items = without_heldout(items, text_of, heldout, dropped)
    items = islice(items, cfg.limit)
    if cfg.tokenizer:
        records = list(items)
        if not records or not all(isinstance(r, Record) for r in records):
            raise UserError(f"{cfg.source}: no documents to write (adapter {cfg.adapter}, {len(records)} items)")
        write_shards(records, cfg)
        return
    if Path(cfg.out).is_dir():
        raise UserError(f"{cfg.out} is a folder; out should be a .jsonl file, or add --tokenizer for shards")
    count = 0
    with whole_file(cfg.out) as f:
        for item in tqdm(items, unit="row", disable=None):
            if isinstance(item, Record):
                item = {"url": item.url, "text": item.text} if item.text else {"url": item.url, "html": item.html}
            f.write(json.dumps(asdict(item) if isinstance(item, Problem) else item, ensure_ascii=False) + "\n")
            count += 1
        if not count:
            raise UserError(f"{cfg.source}: nothing left to write: {dropped or 'there is no row'}")
    print(f"{cfg.out}: {count:,} written", *(f"{n:,} {why}" for why, n in dropped.items()), sep=", ")


if __name__ == "__main__":
    configurator.run(main, Config)
