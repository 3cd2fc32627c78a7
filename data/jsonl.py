"""
JSON lines, as every data file of the recipe is written: problems, chats, answers, labels, prompts.

Not in the report. One reader for all of them, so that a broken line is always told in the same way: file, line, what is
wrong with it, and what would be right.

    python -c "from data.jsonl import read_jsonl; print(next(read_jsonl('out/tiny/sft.jsonl')))"
"""
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from configurator import UserError


@contextmanager
def line_of(path, n: int, right: str = ""):
    """What is wrong inside is told as "path:n: what; right". For the checks that a caller makes on a line's fields."""
    try:
        yield
    except KeyError as e:
        raise UserError(f"{path}:{n}: no field {e}" + (f"; {right}" if right else "")) from None
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path}:{n}: {e}" + (f"; {right}" if right else "")) from None


def _refuse(name: str):
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(parse_constant=_refuse)    # json.loads would make one for every line


def strict_json(text: str | bytes):
    """The value of strict JSON: NaN and infinities are refused (no JSON, and NaN equals nothing). ValueError."""
    try:
        return STRICT.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse(line: bytes) -> dict:
    """One line -> its object. ValueError in words for what is not UTF-8, not JSON, or not an object."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise UserError(f"not UTF-8: byte {line[e.start]:#04x} at column {e.start + 1}") from None
    except RecursionError:
        raise UserError("not JSON: nested too deeply") from None
    except ValueError as e:
        raise UserError(f"not JSON: {e}") from None
    if not isinstance(row, dict):
        raise UserError(f"a {type(row).__name__} where a JSON object should be")
    return row


def read_jsonl(path, right: str = "", file=None) -> Iterator[tuple[int, dict]]:
    """
    (line number from 1, object) of each line that is not blank. right: what a line should be, told with every error.
    file: an open binary file to read instead of path. ValueError names file and line; OSError if it cannot be opened.
    """
    with file or open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                with line_of(path, n, right):
                    row = parse(line)
                yield n, row


def write_jsonl(path, rows: Iterable[dict]) -> None:
    """A line an object, atomically: a reader sees the old file or the whole new one, whatever happens."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            for row in rows:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
