"""
One adapter for each public set turns its columns into ours: documents, chats or problems (report sections 2.1, 3.1,
3.2). The column names were read from the dataset cards.

    adapters                                       give
    text, fineweb_edu, openwebmath, the_stack      documents
    chat, sharegpt, alpaca, qa_sft                 chats, {"messages", "source", "id"}
    openthoughts, openr1_sft, deepmath_sft         chats
    gsm8k_sft, math_sft, mbpp_sft, humaneval_sft   chats with the published solutions
    qa, gsm8k, math, openr1, deepmath, dapo        maths problems, as data/problems.py reads them
    mbpp, humaneval                                code problems, the same
    apps, taco, codecontests, livecodebench        code problems

The filters of report section 3.2 that need no model are applied here: no proofs, no multiple choice, answers not
forced to integers, problems without tests dropped. An adapter returns the reason, or [], for a row that is filtered
out, and raises UserError for one that it cannot use. Every other set: name your columns, --columns=question=q,answer=a.
"""
import base64
import io
import json
import pickle
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from configurator import UserError
from data.corpus import Record
from data.problems import Problem, Test, from_row, identity
from data.published import problem_line
from data.readers import Bad

MAX_ANSWERS = 8          # responses kept for one query [paper 3.1]
MAX_BYTES = 1 << 28      # LiveCodeBench's packed tests: no more than this after decompression


def required(row: dict, column: str, kind: type = str) -> Any:
    """row[column]; UserError with the columns that are there when it is missing or of another type."""
    value = row.get(column)
    if not isinstance(value, kind):
        raise UserError(f"row needs {column!r} ({kind.__name__}), has {type(value).__name__}; "
                        f"columns: {', '.join(sorted(row))}")
    return value


# ---- documents ------------------------------------------------------------------------------------------------------

def document(row: dict) -> Record | str:
    """
    Any row with text, html or content (FineWeb-Edu, OpenWebMath, The Stack, own files, pages of a crawl); "empty" when
    they are. charset: of html that is bytes, what the HTTP header says. Its name is the first of url, id and path; only
    an http(s) address counts as one (data/dedup.py).
    """
    column = next((c for c in ("text", "content", "html") if row.get(c)), None)
    if column is None:
        if not {"text", "html", "content"} & set(row):
            raise UserError(f"row needs text, html or content; columns: {', '.join(map(str, sorted(row)))}")
        return "empty"
    value = row[column]
    if not isinstance(value, (str, bytes) if column == "html" else str):
        raise UserError(f"{column} should be text, is {type(value).__name__}")
    name = str(row.get("url") or row.get("id") or row.get("path") or "")
    if column == "html":
        return Record(name, html=value, charset=str(row.get("charset") or ""))
    return Record(name, text=value)


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


ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
         "bing": "assistant", "model": "assistant", "system": "system"}


def turns_of(turns: list, source: str, drop_system: bool = False) -> list[dict]:
    """A conversation [{from, value}] or [{role, content}] -> one chat. UserError for a turn of another form."""
    messages = []
    for k, turn in enumerate(turns):
        who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if ROLES.get(who) is None or not isinstance(text, str):
            raise UserError(f"turn {k} from {who!r}: should be from {', '.join(ROLES)}, with text")
        if not (drop_system and who == "system"):
            role = ROLES[who]
            messages.append({"role": role, "content": think_form(text) if role == "assistant" else text})
    if not any(m["role"] == "assistant" for m in messages):
        return []
    return [{"messages": messages, "source": source, "id": identity(json.dumps(messages))}]


def openthoughts(row: dict) -> list[dict]:
    """OpenThoughts-114k: system, conversations [{from, value}]. Its system prompt only names its own marks: dropped."""
    return turns_of(required(row, "conversations", list), "openthoughts", drop_system=True)


def sharegpt(row: dict) -> list[dict]:
    """ShareGPT: conversations [{from: human or gpt, value}], also [{role, content}]."""
    return turns_of(required(row, "conversations", list), "sharegpt")


def chats(row: dict) -> list[dict]:
    """OpenAI's form: messages [{role, content}]."""
    return turns_of(required(row, "messages", list), str(row.get("source") or "chat"))


def alpaca(row: dict) -> list[dict]:
    """Alpaca: instruction, input (may be empty), output."""
    question, more = required(row, "instruction"), row.get("input") or ""
    question += f"\n\n{more}" if more else ""
    answer = required(row, "output")
    return [chat(question, answer, "alpaca", identity(f"{question}\n{answer}"))] if answer.strip() else []


def qa_sft(row: dict) -> list[dict]:
    """Plain rows: question, answer; also reasoning, which then stands in <think>."""
    question, answer, steps = required(row, "question"), required(row, "answer"), row.get("reasoning") or ""
    answer = f"<think>{steps}</think>{answer}" if steps else answer
    return [chat(question, answer, "qa", identity(f"{question}\n{answer}"))] if answer.strip() else []


def benchmark_sft(row: dict) -> list[dict]:
    """A row of GSM8K, MATH, MBPP or HumanEval with its published solution; the steps of GSM8K stand in <think>."""
    p = benchmark(row)
    steps = f"<think>{p.reasoning}</think>" if p.reasoning else ""
    return [chat(p.question, steps + p.solution, "benchmark", p.id)]


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

def benchmark(row: dict) -> Problem:
    """A row of GSM8K, MATH, MBPP or HumanEval as published (data/published.py)."""
    line = problem_line(row)
    if line is None:
        raise UserError(f"not a row of GSM8K, MATH, MBPP or HumanEval; columns: {', '.join(map(str, sorted(row)))}")
    return from_row(line | {"id": identity(line["question"])})


def qa(row: dict) -> Problem | str:
    """Plain rows: question, answer (text or a number), perhaps level."""
    if "####" in str(row.get("answer")):
        raise UserError("answer holds '####': this is GSM8K's column with the steps, use the adapter gsm8k")
    return maths_problem(required(row, "question"), row.get("answer"), int(row.get("level") or 1))


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


class NoClasses(pickle._Unpickler):
    """
    Reads pickles of strings, numbers, lists and dicts. One that names a class could run code: UserError. In Python: C
    would obey a place 2^31 in the memo with 34 GB.
    """

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
    try:
        value = NoClasses(io.BytesIO(raw)).load()
    except UserError:
        raise
    except Exception as e:                                  # a pickle may break in any way
        raise UserError(f"packed tests cannot be read: {e or type(e).__name__}") from None
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


# ---- all of them ----------------------------------------------------------------------------------------------------

ADAPTERS = {
    "text": document, "fineweb_edu": document, "openwebmath": document, "the_stack": document,
    "chat": chats, "sharegpt": sharegpt, "alpaca": alpaca, "qa_sft": qa_sft,
    "openthoughts": openthoughts, "openr1_sft": openr1_sft, "deepmath_sft": deepmath_sft,
    **{f"{name}_sft": benchmark_sft for name in ("gsm8k", "math", "mbpp", "humaneval")},
    **{name: benchmark for name in ("gsm8k", "math", "mbpp", "humaneval")},
    "qa": qa, "openr1": openr1, "deepmath": deepmath, "dapo": dapo,
    "apps": apps, "taco": apps, "codecontests": codecontests, "livecodebench": livecodebench,
}


def convert(adapter: str, rows: Iterable[tuple[tuple, dict | Bad]], counts: Counter, columns: str = "",
            ) -> Iterator[tuple[tuple, Record | Problem | dict | Bad]]:
    """
    (place, row) -> (place, item of the adapter), without exact repeats of a problem. A row that
    the adapter cannot use comes out as a Bad in its place. columns: as in `renamed`. counts: "rows", and what was left
    out without fault, by reason. UserError for an unknown adapter.
    """
    if adapter not in ADAPTERS:
        raise UserError(f"adapter {adapter!r}: must be one of {', '.join(sorted(ADAPTERS))}")
    names, seen = column_map(columns), set()
    for place, row in rows:
        counts["rows"] += 1
        if isinstance(row, Bad):
            if row.fault:
                yield place, row
            else:
                counts[f"not wanted: {row.why}"] += 1
            continue
        try:
            with long_integers():
                items = ADAPTERS[adapter](renamed(row, names))
        except KeyError as e:
            yield place, Bad(f"adapter {adapter}: no field {e}")
            continue
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError, MemoryError, zlib.error,
                pickle.UnpicklingError) as e:
            yield place, Bad(f"adapter {adapter}: {e}")
            continue
        if not items or isinstance(items, str):
            counts[items or "nothing in it"] += 1
            continue
        for item in items if isinstance(items, list) else [items]:
            if isinstance(item, Problem):
                if item.id in seen:
                    counts["repeat"] += 1
                    continue
                seen.add(item.id)
            yield place, item


@contextmanager
def long_integers(digits: int = 100_000) -> Iterator[None]:
    """APPS has integers of more than the 4,300 digits that Python converts; time grows with the square of them."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(digits)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def column_map(columns: str) -> dict[str, list[str]]:
    """question=problem,answer=meta.gold -> {"question": ["problem"], "answer": ["meta", "gold"]}. UserError."""
    pairs = [part.partition("=") for part in columns.split(",") if part.strip()]
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise UserError(f"columns = {columns!r} should be OURS=THEIRS,OURS=THEIRS; a dot goes into an object")
    return {ours.strip(): theirs.strip().split(".") for ours, _, theirs in pairs}


def renamed(row: dict, names: dict[str, list[str]]) -> dict:
    """The row with each of our columns taken from where column_map says. UserError when it is not there."""
    new = {}
    for ours, theirs in names.items():
        value: Any = row
        for part in theirs:
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"--columns names {'.'.join(theirs)!r}; columns: {', '.join(map(str, sorted(row)))}")
            value = value[part]
        new[ours] = value
    return row | new if names else row
