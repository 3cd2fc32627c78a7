"""
Real corpora and problem sets in the forms that the recipe reads: documents as token shards, chats for SFT, problems for
RL and evaluation. docs/your_data.md goes through all of it.

    python -m data.hub text FOLDER out/my/data --tokenizer=tiny --name=web          # shards for pretrain.py
    python -m data.hub text CRAWL out/my/data --tokenizer=tiny --name=maths --heldout=test.jsonl --workers=8
    python -m data.hub qa rows.csv out/my/problems.jsonl --columns=question=task,answer=result
    python -m data.hub gsm8k_sft train.jsonl out/my/sft.jsonl
    python -m data.hub fineweb_edu HuggingFaceFW/fineweb-edu out/fineweb.jsonl --limit=1000

The first word names the adapter (data/adapters.py): what the columns of a row are. The source is a file or a folder of
any kinds that data/readers.py knows, or a data set of the Hugging Face hub, owner/name, streamed. With --tokenizer,
documents go through extraction, deduplication and decontamination into shards, however many there are (data/build.py);
without, the items are written as they are, a line each.

With --heldout no document, chat or problem is written that holds a question of that file, and no problem that is a copy
of one (data/filters.py). The filters of report 3.2 that need the answers of models are in data/rl_problems.py.

Nothing in a row ends the run: what cannot be used is named in OUT.rejected.jsonl, and only when it is more than
--max_rejected of all rows (and more than nine) the run ends with an error. `datasets` has no loading scripts any more,
so LiveCodeBench and TACO load from their data files: give a folder.
"""
import json
from collections import Counter
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

from tqdm import tqdm

import configurator
from configurator import UserError
from data import build, trove
from data.adapters import convert
from data.corpus import Record
from data.filters import without_heldout
from data.jsonl import json_line, whole_file
from data.lock import hold
from data.problems import Problem, to_row
from data.readers import Bad, hub_rows, listing, needed, read_rows
from data.sft_data import query_of, read_questions


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("adapter", "source", "out")
    adapter: str = ""                     # what the rows are: a name of data/adapters.py
    source: str = ""                      # a folder, a file, or a hub name owner/dataset
    out: str = ""                         # JSONL file to write; with a tokenizer the folder of the shards
    columns: str = ""                     # OURS=THEIRS,OURS=THEIRS: rows whose columns have other names
    encoding: str = ""                    # of text files that are not UTF-8, e.g. cp1251
    limit: int | None = None              # items to take at most, None = all
    split: str = "train"                  # split of a hub dataset
    subset: str = ""                      # configuration of a hub dataset, e.g. sample-10BT; "" = its default
    max_rejected: float = 0.05            # share of rows that may be rejected
    replace: bool = False                 # write over what is there under this name
    append: bool = False                  # shards: add to the source that is there; copies between the two are not seen
    tokenizer: str = ""                   # write shards: "tiny" or a folder with tokenizer files
    name: str = "web"                     # source of the shards when there are no labels
    valid_share: float = 0.01             # shards: share of the documents that go to OUT/valid, for the validation loss
    labels: str = ""                      # JSONL of a teacher's labels: a tagger sorts and re-weights the documents
    heldout: str = ""                     # problems or chats; no document, chat or problem may hold their questions
    workers: int = 1                      # shards: processes of this machine at a time
    tasks: int = 0                        # shards: tasks for datatrove (data/trove.py), 0 = without it
    slurm_partition: str = ""             # with tasks: Slurm's name of the machines, "" = processes on this one
    slurm_time: str = "20:00:00"          # limit of a Slurm job
    memory_gb: int = 4                    # of a Slurm job
    dedup_memory_gb: int = 64             # of the Slurm job that deduplicates: 80 to 850 bytes a document

    def __post_init__(self):
        configurator.at_least(self, 0, "tasks")
        configurator.at_least(self, 1, "workers", "memory_gb", "dedup_memory_gb",
                              *(["limit"] if self.limit is not None else []))
        for name in ("max_rejected", "valid_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} = {getattr(self, name)} should be in [0, 1]")
        if self.replace and self.append:
            raise UserError("replace and append: one of them at most")
        defaults = {f.name: f.default for f in fields(self)}
        unused = lambda *names: [name for name in names if getattr(self, name) != defaults[name]]
        if not self.tokenizer and (names := unused("name", "labels", "append", "valid_share", "workers", "tasks")):
            raise UserError(f"{' and '.join(names)} are for shards: add --tokenizer")
        slurm = ("slurm_time", "memory_gb", "dedup_memory_gb")
        if not self.tasks and (names := unused("slurm_partition", *slurm)):
            raise UserError(f"{' and '.join(names)} are for Slurm: add --tasks and --slurm_partition")
        if self.tasks and not self.slurm_partition and (names := unused(*slurm)):
            raise UserError(f"{' and '.join(names)} are for Slurm: add --slurm_partition")
        if Path(self.source).exists() and unused("split", "subset"):
            raise UserError(f"split and subset are for data sets of the hub; {self.source} is a local source")


def write_items(cfg: Config) -> None:
    """The items of all rows into the file cfg.out, a line each. UserError when nothing is left, or too little."""
    out, counts = Path(cfg.out), Counter()
    if out.is_dir():
        raise UserError(f"{out} is a folder; out should be a .jsonl file, or add --tokenizer for shards")
    if out.exists() and not cfg.replace:
        raise UserError(f"{out} is there already: --replace writes it anew")
    files, unread = listing(cfg.source) if Path(cfg.source).exists() else ([], [])
    needed(files)
    heldout = read_questions(cfg.heldout) if cfg.heldout else []
    rows = (((str(f), n), row) for f in files for n, row in read_rows(f, encoding=cfg.encoding)) if files else \
        hub_rows(cfg.source, cfg.split, cfg.subset)
    reasons = out.with_name(out.stem + ".rejected.jsonl")
    reject = lambda file, row, why: rejected.write(json.dumps({"file": file, "row": row, "reason": why}) + "\n")
    first = ""
    with whole_file(out, "wb") as f, whole_file(reasons) as rejected:
        for path in unread:
            reject(str(path), 0, f"no reader for {path.suffix or 'such a name'}")
        items = ((place, line(item)) for place, item in convert(cfg.adapter, rows, counts, cfg.columns))
        items = without_heldout(items, asked, heldout, counts)
        for place, item in islice(tqdm(items, unit="row", disable=None), cfg.limit):
            if isinstance(item, Bad):
                reject(*place, item.why)
                counts["rejected"] += 1
                first = first or f"{place[0]}:{place[1]}: {item.why}"
                if counts["rejected"] > max(9, cfg.max_rejected * counts["rows"]) and counts["rows"] >= 1000:
                    break
                continue
            if not item.get("text", "a chat or problem").strip():
                counts["empty"] += 1
                continue
            f.write(json_line(item))
            counts["written"] += 1
        if counts["rejected"] > max(9, cfg.max_rejected * counts["rows"]):
            raise UserError(f"{counts['rejected']:,} of {counts['rows']:,} rows rejected, more than max_rejected = "
                            f"{cfg.max_rejected:g} allows; the first: {first}")
        if not counts["written"]:
            raise UserError(f"{cfg.source}: nothing left to write: {build.summary(counts) or 'there is no row'}"
                            + (f"; {first}" if first else ""))
    if not (unread or counts["rejected"]):
        reasons.unlink()
    print(f"{out}: {counts['written']:,} written, left out: {build.summary(counts) or 'nothing'}"
          + (f"; {len(unread)} files not read" if unread else "")
          + (f"; see {reasons}" if unread or counts["rejected"] else ""))


def line(item: Record | Problem | dict | Bad) -> dict | Bad:
    """An item as the object of its line; of a page the extracted text."""
    if isinstance(item, Record):
        text = build.text_of(item)
        return text if isinstance(text, Bad) else {"url": item.url, "text": text}
    return to_row(item) if isinstance(item, Problem) else item


def asked(pair: tuple[tuple, dict | Bad]) -> str:
    """(place, line) -> what must not hold a held-out question: a document's text, a question, the user's turns."""
    item = pair[1]
    if isinstance(item, Bad):
        return ""
    return query_of(item) if "messages" in item else item.get("text") or item.get("question") or ""


def job_of(cfg: Config) -> build.Job:
    """What of the configuration decides the shards."""
    return build.Job(**{f.name: getattr(cfg, f.name) for f in fields(build.Job)})


def main(cfg: Config) -> None:
    with hold(Path(cfg.out, f"{cfg.name}.lock") if cfg.tokenizer else f"{cfg.out}.lock"):
        if not cfg.tokenizer:
            write_items(cfg)
        elif cfg.tasks:
            slurm = {"partition": cfg.slurm_partition, "time": cfg.slurm_time, "memory_gb": cfg.memory_gb,
                     "dedup_memory_gb": cfg.dedup_memory_gb}
            trove.run(job_of(cfg), cfg.replace, cfg.append, cfg.tasks, cfg.workers, slurm)
        else:
            print(build.run(job_of(cfg), cfg.workers, cfg.replace, cfg.append))


if __name__ == "__main__":
    configurator.run(main, Config)
