"""
JSON lines, the form of every data file of the recipe: problems, chats, answers, labels, prompts. And whole_file(), with
which every result is written, so that no reader meets half a file.

Not in the report. One reader for all files, so that the error for a broken line always has the same form: file, line,
what is wrong with it, and what would be right.

    python -c "from data.jsonl import read_jsonl; print(next(read_jsonl('out/tiny/sft.jsonl')))"
"""
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from configurator import UserError
from data.text import whole

# ---- writing --------------------------------------------------------------------------------------------------------

@contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """
    Open `path` for writing, mode "w" (UTF-8 text) or "wb", so that it appears only when it is complete. The content
    goes to PATH.tmp, which is flushed to the disk and renamed at the end of the with-block: a reader sees the old file
    or the whole new one. After an exception PATH.tmp is removed and the old file stays. Makes the folder. OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def json_line(row: Any) -> bytes:
    """A row as one line of a file, UTF-8, whatever text is in it."""
    return whole(json.dumps(row, ensure_ascii=False)).encode() + b"\n"


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """One JSON object per line; the file appears when it is complete (whole_file)."""
    with whole_file(path, "wb") as f:
        for row in rows:
            f.write(json_line(row))


# ---- reading --------------------------------------------------------------------------------------------------------

def read_jsonl(path: str | Path, hint: str = "", file: BinaryIO | None = None) -> Iterator[tuple[int, dict]]:
    """
    (line number from 1, object) of each line that is not blank. hint: what a line should hold, added to every error.
    file: an open binary file that is read instead of opening `path`; path is then only its name in errors.
    UserError names file and line; OSError if the file cannot be opened.
    """
    with file or open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                with line_of(path, n, hint):
                    row = json_object(line)
                yield n, row


@contextmanager
def line_of(path: str | Path, n: int, hint: str = "") -> Iterator[None]:
    """
    For the checks that a caller makes on the fields of line n: ValueError, KeyError, TypeError or AttributeError in the
    with-block becomes UserError("path:n: what is wrong; hint").
    """
    try:
        yield
    except KeyError as e:
        raise UserError(f"{path}:{n}: no field {e}" + (f"; {hint}" if hint else "")) from None
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path}:{n}: {e}" + (f"; {hint}" if hint else "")) from None


def json_object(line: bytes) -> dict:
    """
    One line -> its object. The mark with which Windows begins a file is no part of it; half of a surrogate pair, which
    no file can hold, becomes U+FFFD. UserError in words for what is not UTF-8, not JSON, or not an object.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if HALF.search(line):
            row = json.loads(whole(json.dumps(row, ensure_ascii=False)))
    except UnicodeDecodeError as e:
        raise UserError(f"not UTF-8: byte {line[e.start]:#04x} at column {e.start + 1}") from None
    except RecursionError:
        raise UserError("not JSON: nested too deeply") from None
    except ValueError as e:
        raise UserError(f"not JSON: {e}") from None
    if not isinstance(row, dict):
        raise UserError(f"a {type(row).__name__} where a JSON object should be")
    return row


HALF = re.compile(rb"\\u[dD][89a-fA-F]")             # an escape that may be half of a surrogate pair


MOST_JSON = 1 << 28                                  # bytes of a JSON file


def read_json(path: str | Path) -> dict:
    """
    The object in a JSON file, which may come from a stranger. UserError if it is missing, a pipe or a device (which
    would be waited for without end), larger than MOST_JSON, or not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing, or not a file")
    if path.stat().st_size > MOST_JSON:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, should have at most {MOST_JSON:,}")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise UserError(f"{path} is not JSON that can be read: nested too deeply") from None
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should be a JSON object, is a {type(value).__name__}")
    return value


# ---- strict JSON ----------------------------------------------------------------------------------------------------

def _refuse(name: str):
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(parse_constant=_refuse)    # made once: json.loads would build one at every call


def strict_json(text: str | bytes) -> Any:
    """The value of strict JSON. ValueError for what is not JSON, NaN and infinities included (NaN equals nothing)."""
    try:
        return STRICT.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
