"""
Rows of JSON on their way to a file: they come one by one, in any order, from several processes and over several runs,
and stand in the file in the right order at the end (eval.py's answers, sample.py --file).

    answers = Answers(path, made_with)         # {"seed": 7, ...}: all that the rows depend on
    answers.done                               # keys of the rows that an earlier run has left
    answers.add(key, row)                      # on the disk when it returns
    answers.finish(keys)                       # `path` in the order of the keys

Until then each rank's rows are in PATH.partRANK, and PATH.run says what they were made with: a run that is cut short
keeps what it has, and the same command goes on with the rest. PATH.lock: one run at a time (data/lock.py).
"""
import glob
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import distributed
from configurator import UserError
from data.jsonl import json_line, whole_file
from data.lock import hold


class Answers:
    """
    made: plain values by name; a run that goes on must have the same. done: keys (text or int) of the rows that are
    there. UserError, on every rank, when the files there were made with something else, or another run writes them.
    """
    def __init__(self, path: Path, made: dict):
        rank, world = distributed.ranks()
        self.path, self.head = path, path.with_name(path.name + ".run")
        self.lock = hold(path.with_name(path.name + ".lock"))
        parts = self.parts()
        if self.head.is_file():
            saved = json.loads(self.head.read_text(encoding="utf-8"))
            for name, value in json.loads(json.dumps(made)).items():
                if saved.get(name) != value:
                    raise UserError(f"{self.head}: the unfinished answers there were made with {name} = "
                                    f"{saved.get(name)!r}, now it is {value!r}: give the same, or another --out, or "
                                    f"delete {self.head} and {path.name}.part*")
        elif parts:
            raise UserError(f"{parts[0]} is there without {self.head.name}, which says what it answers: delete it")
        found = [key for part in parts[rank::world] for key, _, _ in whole_rows(part)]
        self.done = {key for some in distributed.all_gather_object(found) for key in some}
        if rank == 0 and not self.head.is_file():
            with whole_file(self.head) as f:
                json.dump(made, f, indent=1)
        self.file = open(path.with_name(f"{path.name}.part{rank}"), "ab")      # one writer each

    def parts(self) -> list[Path]:
        """The files of all ranks, of earlier runs too."""
        return sorted(self.path.parent.glob(glob.escape(self.path.name) + ".part*"))

    def add(self, key: Hashable, row: dict) -> None:
        """A row is finished: it is on the disk when this returns."""
        self.file.write(b"[" + json.dumps(key).encode() + b", " + json_line(row)[:-1] + b"]\n")
        self.file.flush()

    def close(self) -> None:
        """No more rows."""
        self.file.close()

    def finish(self, keys: Iterable[Hashable], look: Callable[[bytes], Any] = len) -> list:
        """Write `path` in the order of the keys, delete the parts. -> look(line) of each row. One rank calls it."""
        self.close()
        parts, seen = self.parts(), []
        with ExitStack() as stack, whole_file(self.path, "wb") as out:
            files = [stack.enter_context(open(part, "rb")) for part in parts]
            where = {key: (f, at, n) for f, part in zip(files, parts, strict=True) for key, at, n in whole_rows(part)}
            for key in keys:
                f, at, n = where[key]
                f.seek(at)
                out.write((line := f.read(n)) + b"\n")
                seen.append(look(line))
        for file in [*parts, self.head]:
            file.unlink()
        self.lock.release()
        return seen


def whole_rows(part: Path) -> Iterator[tuple[Hashable, int, int]]:
    """
    (key, offset, length in bytes) of each row; cuts off a last one that was not written to its end. UserError for what
    are no rows of Answers.add.
    """
    at = 0
    with open(part, "rb") as f:
        for line in f:
            if not line.endswith(b"\n"):
                os.truncate(part, at)
                break
            if not line.startswith(b"["):
                raise UserError(f"{part}: its rows were written by another version: delete it, or finish with that one")
            head = line[:1024].decode("utf-8", "ignore")     # without parsing the answers: there may be 100 GB of them
            key, end = json.JSONDecoder().raw_decode(head, 1)
            begin = len(head[:end].encode()) + 2
            yield key, at + begin, len(line) - begin - 2
            at += len(line)
