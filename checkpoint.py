"""
Checkpoints: one folder each, written whole or not at all, checked when read.

    RUN/step_00000500/    model.safetensors     fp32 weights, Hugging Face names without the prefix "model."
                          model.json            ModelConfig fields
                          config.json           the resolved configuration of the run
                          tokenizer files       tokenizer.save()
                          train_state.pt        optimizer, RNG states, and what the training script hands over
                          adapter/              of a run with LoRA: its adapters in PEFT's format (lora.py)
                          manifest.json         step, commit, meta, and size + sha256 of every other file
    RUN/latest            names the newest whole one

Under FSDP the weights are several files with an index (each rank writes the tensors it owns) and the optimizer goes to
optimizer/ by torch.distributed.checkpoint (DCP): saved on N ranks, it loads on M. Reading is the same for both.

Atomic: everything goes to a temporary folder, each file is fsynced, the folder is renamed, then `latest` is replaced. A
kill at any moment leaves the previous checkpoint and `latest` whole (tests/test_checkpoint.py kills at random moments).
Not in the report.

    python -c "import checkpoint as c; print(c.read_manifest(c.find('out/tiny/base')))"
"""
import copy
import errno
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import configurator
import kernels
from configurator import UserError, at_end, os_words
from data.jsonl import read_json
from distributed import Runtime, all_gather_object, assign, fill, is_sharded, local, ranks, replica_state, reshard
from kernels.cpu.decode import library
from tokenizer import Tokenizer

# files that operating systems leave behind, which nothing here reads
LITTER = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+")

# ---- finding and checking -------------------------------------------------------------------------------------------

def folder_of(run: Path, step: int) -> Path:
    """RUN/step_00000500."""
    return run / f"step_{step:08d}"


def steps_in(run: Path) -> list[Path]:
    """
    Checkpoint folders of a run, newest first; none where there is no folder `run`. OSError when it cannot be read:
    Path.glob would find nothing there, and a run that cannot be seen is not a new one.
    """
    try:
        with os.scandir(run) as entries:
            return sorted((Path(run) / e.name for e in entries if re.fullmatch(r"step_\d+", e.name) and e.is_dir()),
                          reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []


def digest(path: Path) -> str:
    """sha256 of a file, 64 hexadecimal digits."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


def problem_with(ckpt: Path, part: int = 0, parts: int = 1, sums: bool = True) -> str | None:
    """
    What is wrong with a checkpoint folder, in words; None when every file has the size and checksum it was written
    with, and no other is there: one that was put in would be read as if it belonged to it (an index of weights, an
    optimizer). Only files part, part + parts, part + 2 parts ... are checked, so that ranks can share the reading.
    sums=False looks at the sizes only. OSError for what cannot be read, which may be whole.
    """
    try:
        if not (Path(ckpt) / "manifest.json").exists():
            return "manifest.json is missing"
        files = sorted(read_manifest(ckpt)["files"].items())
        there = {p.relative_to(ckpt).as_posix(): p for p in Path(ckpt).rglob("*") if p.is_symlink() or not p.is_dir()}
        for name in sorted(set(there) - {"manifest.json"} - {name for name, _ in files}):
            if not LITTER.fullmatch(there[name].name):
                return f"{name} is in the folder, but manifest.json does not name it: should be removed"
        for name, (size, checksum) in files[part::parts]:
            path = there.get(name)
            if path is None or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, should have {size:,}"
            if sums and digest(path) != checksum:
                return f"{name} does not match its checksum"
    except FileNotFoundError as e:
        return f"{Path(e.filename or ckpt).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):          # UserError too
        return "manifest.json is not readable"
    return None


def everywhere(look: Callable[[], Any]) -> list:
    """look() on every rank, in rank order. A collective; an OSError of one rank is raised as a UserError on all."""
    try:
        mine = look()
    except OSError as e:
        mine = e
    found = all_gather_object(mine)
    for e in found:
        if isinstance(e, OSError):
            raise UserError(f"{os_words(e)}: whether there is a checkpoint to go on from cannot be told; nothing was "
                            "changed. Try again when it can be read, or move what is broken out of the way") from e
    return found


def latest(run: str | Path) -> Path | None:
    """
    The newest checkpoint of a run that passes its check; None for a folder that never had one. A broken newer one is
    named on stderr. UserError when there are checkpoints and none can be used: no run begins anew on top of them.
    Under several ranks each checks a share of the files, and all agree.
    """
    rank, world = ranks()
    run, broken = Path(run), []
    for ckpt in everywhere(lambda: steps_in(run))[0]:
        wrong = next(filter(None, everywhere(lambda at=ckpt: problem_with(at, rank, world))), None)
        if wrong is None:
            if broken and rank == 0:
                print(*(f"warning: {run}/{words}; using the checkpoint before it" for words in broken), sep="\n",
                      file=sys.stderr)
            return ckpt
        broken.append(f"{ckpt.name} is not whole: {wrong}")
    what_to_do = "restore it from a copy, or move it away to begin anew, or name another folder"
    if broken:
        raise UserError(f"no checkpoint in {run} can be used: {'; '.join(broken)}. Nothing was changed: {what_to_do}")
    if everywhere((run / "latest").is_file)[0]:
        raise UserError(f"{run}/latest names a checkpoint, and there is none. Nothing was changed: {what_to_do}")
    return None


def to_resume(run: str | Path) -> Path | None:
    """
    latest(run), for the script that goes on from there. A kill may have come between a whole checkpoint and the file
    `latest`, which others read: it names that checkpoint now. A collective.
    """
    ckpt = latest(run)
    if ckpt and ranks()[0] == 0:
        name_latest(ckpt)
    return ckpt


def find(path: str | Path) -> Path:
    """
    A checkpoint folder, or the newest one of a run folder; also a folder of imported weights, which has no manifest to
    be checked against. UserError if there is none or it is broken.
    """
    path = Path(path)
    if not path.exists():
        there = sorted(str(p.parent) for p in Path("out").glob("**/latest"))
        raise UserError(f"no checkpoint at {path}: no such folder; "
            + (f"there are {', '.join(there[:6])}" if there else "`make demo` trains some"))
    written = re.fullmatch(r"step_\d+", path.name) is not None
    if not written and not (path / "model.json").is_file():
        if (ckpt := latest(path)) is None:
            hub = (path / "config.json").is_file()
            raise UserError(f"no checkpoint in {path}" + (f", a Hugging Face folder: `python hf.py import {path} OUT` "
                                                          "makes one of it" if hub else ""))
        return ckpt
    if written or (path / "manifest.json").is_file():
        for wrong in filter(None, everywhere(lambda: problem_with(path, *ranks()))):
            raise UserError(f"checkpoint {path} is not whole: {wrong}")
    return path


def newest(root: str | Path = "out", order: Callable[[Path], Any] = lambda run: 0) -> Path | None:
    """
    The checkpoint that was written last anywhere under root, None if there is none; with `order`, that of the run for
    which order(run) is smallest. Runs without one that can be used are named on stderr. UserError if all are such.
    """
    runs = sorted((p.parent for p in Path(root).glob("**/latest")), key=lambda run: -(run / "latest").stat().st_mtime)
    useless = []
    for run in sorted(runs, key=order):
        try:
            if ckpt := latest(run):
                return ckpt
        except UserError as e:
            useless.append(e)
            print(f"warning: {e}", file=sys.stderr)
    if useless:
        raise useless[0]
    return None


# ---- reading --------------------------------------------------------------------------------------------------------

def read_manifest(ckpt: str | Path) -> dict:
    """{"step", "commit", "meta", "world", "files": {name: [bytes, sha256]}}; UserError or OSError if unreadable."""
    return read_json(Path(ckpt) / "manifest.json")


def read_meta(ckpt: str | Path) -> dict:
    """{"stage": ..., "chat": ..., ...} as given to save(); {} for a folder without a manifest."""
    return read_manifest(ckpt)["meta"] if (Path(ckpt) / "manifest.json").is_file() else {}


def read_shape(ckpt: str | Path) -> dict:
    """ModelConfig fields. UserError if model.json is missing or has others."""
    shape = read_json(Path(ckpt) / "model.json")
    if not {"vocab_size", "n_layer", "max_seq_len", "n_mtp"} <= set(shape):
        raise UserError(f"{ckpt}/model.json should be an object with the fields of ModelConfig (model.py)")
    return {"qkv_bias": True, "tie_embeddings": False} | shape     # written before these fields came: MiMo's own


def same_shape(have: dict, want: dict, ckpt: str | Path, ignore: tuple[str, ...] = ()) -> None:
    """UserError naming the fields in which a checkpoint's shape, `have`, differs from the configuration's, `want`."""
    wrong = [f"{k} = {have.get(k)!r} there, {v!r} here" for k, v in want.items()
             if k not in ignore and have.get(k) != v]
    if wrong:
        raise UserError(f"checkpoint {ckpt} has another shape than is asked for: {'; '.join(wrong)}; give another "
                        "--out for a new run")


def same_start(ckpt: str | Path, init: str | Path) -> None:
    """
    Refuse to resume from ckpt when the checkpoint that the configuration starts from, init, has another model shape:
    the output folder belongs to another run. UserError names the fields.
    """
    init = Path(init)
    newest = [init] if (init / "model.json").is_file() else steps_in(init)
    if newest and (newest[0] / "model.json").is_file():
        have, want = read_shape(ckpt), read_shape(newest[0])
        if have != want:
            same_shape(have, want, f"{ckpt}, to be resumed as it lies in the output folder,")


def same_run(ckpt: Path, cfg: Any, fixed: Iterable[str]) -> list[str]:
    """
    Compare the configuration that ckpt was saved with to cfg, of which a run shall be resumed. fixed: names of fields
    (`seed`; `model` with all that is in it) that a started run keeps. -> what else differs, as `lr = 0.1, now 0.2`:
    the run obeys it from here on. UserError for fixed fields, with the saved and the given value.
    """
    saved, wrong, obeyed = read_json(Path(ckpt) / "config.json"), [], []
    for name, old, new in configurator.changes(saved, cfg):
        if name == "init" and all(all_gather_object(all(map(os.path.exists, (old, new))))) \
                and find(old).samefile(find(new)):
            continue                                   # another spelling of one place
        was, here = (repr(v["name"] if isinstance(v, dict) and "name" in v else v) for v in (old, new))    # a stage
        if any(f"{name}.".startswith(f"{f}.") or f.startswith(f"{name}.") for f in fixed):
            wrong.append(f"{name} = {here} here, {was} there")
        elif name not in ("out", "data", "tokenizer", "problems"):      # places: what is in them is compared elsewhere
            obeyed.append(f"{name} = {was}, now {here}")
    if wrong:
        raise UserError(f"{ckpt} cannot be resumed with another {wrong[0].split(' ')[0]}: {'; '.join(wrong)}; give the "
                        "old value, or another --out for a new run (docs/scale.md has the rules)")
    return obeyed


def steps_left(ckpt: Path, done: int, steps: int) -> None:
    """UserError when a run has more steps behind it than the configuration asks for."""
    if steps < done:
        raise UserError(f"steps = {steps} here, but {ckpt} has {done} already; give more, or another --out")


def weight_files(ckpt: str | Path) -> dict[str, Path]:
    """Tensor name -> the file it lies in. UserError if there are no weights."""
    ckpt = Path(ckpt)
    index = ckpt / "model.safetensors.index.json"
    if index.is_file():
        return {name: ckpt / file for name, file in weight_map_of(index).items()}
    path = ckpt / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing")
    with opened(path) as f:
        return dict.fromkeys(f.keys(), path)


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of a model.safetensors.index.json. UserError unless these are names in its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) and Path(f).name == f
                                                   for f in weight_map.values()):
        raise UserError(f"{index}: should be an object with weight_map, tensor name -> name of a file in its folder")
    return weight_map


def opened(path: Path) -> safe_open:
    """The safetensors file, open for reading. UserError if it is damaged."""
    if not path.is_file():                             # a pipe or a device would be waited for without end
        raise UserError(f"{path} is missing, or not a file")
    try:
        return safe_open(str(path), framework="pt")
    except Exception as e:              # safetensors raises its own type, OSError or ValueError by version
        raise UserError(f"{path} is not a readable safetensors file: {e}") from None


def inference_dtype(ckpt: str | Path, rt: Runtime) -> torch.dtype:
    """
    The dtype in which a model that only runs forward is held: rt.dtype; on a CPU bf16 for weights that are stored in
    bf16, where the C of kernels/cpu/ reads them as they are (the numbers are those of a copy in fp32).
    """
    if rt.device.type != "cpu" or kernels.PLAIN or library() is None:
        return rt.dtype
    name, path = next(iter(sorted(weight_files(ckpt).items())))
    with opened(path) as f:
        return torch.bfloat16 if f.get_slice(name).get_dtype() == "BF16" else rt.dtype


@torch.no_grad()
def read_weights(ckpt: str | Path, model: nn.Module, fewer_layers: bool = False) -> None:
    """
    Fill a model in place, but for LoRA's adapters; a sharded one reads its own rows only. UserError unless every tensor
    is there, with the right shape, and none is left over; fewer_layers: MTP layers beyond those of the model may be.
    """
    reshard(model)
    files, params = weight_files(ckpt), {n: p for n, p in model.named_parameters() if "lora_" not in n}
    if fewer_layers:
        files = {n: f for n, f in files.items() if n in params or not n.startswith("mtp_layers.")}
    missing, unused = sorted(set(params) - set(files)), sorted(set(files) - set(params))
    if missing or unused:
        what = f"lacks {missing[0]!r}" if missing else f"has {unused[0]!r} too many"
        raise UserError(f"the weights in {ckpt} do not fit the model: the checkpoint {what}")
    for path in sorted(set(files.values())):
        with opened(path) as f:
            for name in sorted(n for n, where in files.items() if where == path):
                piece, p = f.get_slice(name), params[name]
                have, want = list(piece.get_shape()), list(p.shape)
                if have != want:
                    hint = " (vocabulary mismatch)" if name.startswith(("embed_tokens", "lm_head")) else ""
                    raise UserError(f"{path}: {name} has shape {have}, the model {want}{hint}")
                assign(p, piece)


def materialise(model: nn.Module, rt: Runtime, *, seed: int = 0, ckpt: str | Path | None = None,
                fewer_layers: bool = False) -> nn.Module:
    """
    Memory for a model on the meta device, then its weights: from the checkpoint folder ckpt (fewer_layers: as in
    read_weights), else drawn from seed.

    A sharded model gets this rank's rows only; a plain one that will be sharded stays in CPU memory until shard() moves
    it block by block. The draws come from one CPU generator in name order: any number of ranks starts from the same
    numbers. UserError when the weights in ckpt do not fit the model.
    """
    reshard(model)
    if any(p.is_meta for p in model.parameters()):
        later = rt.sharded and not is_sharded(model)
        model.to_empty(device="cpu" if later else rt.device)
    if ckpt is not None:
        read_weights(ckpt, model, fewer_layers)
    else:
        fill(model, model.initial_weights(seed))
    return model


def read_state(ckpt: str | Path, *needs: str) -> dict:
    """The state that save() was given. UserError if it lacks one of the keys `needs`: another script's run."""
    state = torch_load(ckpt).get("state", {})
    lacking = [k for k in needs if k not in state]
    if lacking:
        stage = read_meta(ckpt).get("stage")
        raise UserError(f"{ckpt} is of another kind of run (stage {stage!r}, no {lacking[0]!r} in its state), not to "
                        "be resumed here: give another --out")
    return state


def torch_load(ckpt: str | Path) -> dict:
    """{"state", "optimizer", "rng"} of train_state.pt, memory-mapped; UserError if it cannot be read."""
    path = Path(ckpt) / "train_state.pt"
    if not path.is_file():
        raise UserError(f"{path} is missing: these are weights only, training cannot be resumed from them")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise UserError(f"{path} cannot be read: {e}".split("\n")[0]) from None


# ---- the optimizer, by parameter name -------------------------------------------------------------------------------

def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """{parameter name: {"step", "exp_avg", "exp_avg_sq"}}, sharded like the parameters; {} before the first step."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if optimizer.state.get(p)}


@torch.no_grad()
def load_optimizer(ckpt: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """
    AdamW's moments and the RNG states, from a checkpoint that may have been written on another number of ranks. A
    parameter that was frozen there begins without moments.
    """
    reshard(model)
    saved = torch_load(ckpt)
    names = {p: name for name, p in model.named_parameters()}
    trained = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    have = saved["optimizer"]
    trained = {name: p for name, p in trained.items() if name in have}
    fused = optimizer.param_groups[0].get("fused")
    state = {}
    for name, p in trained.items():
        state[name] = {"step": torch.zeros((), device=local(p).device if fused else "cpu"),
                       "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    if state and (Path(ckpt) / "optimizer").is_dir():
        load_dcp(Path(ckpt) / "optimizer", state)
    else:
        for name, parts in state.items():
            for key, value in parts.items():
                assign(value, have[name][key])
    for name, p in trained.items():
        optimizer.state[p] = state[name]
    restore_rng(saved["rng"])


# What torch's optimizer/.metadata, a pickle, may name; all else could run code. BytesStorageMetadata is not among it:
# torch would unpickle such an entry
METADATA = {"torch": ("Size", "float32", "float64", "float16", "bfloat16", "int64"),
            "torch.serialization": ("_get_layout",), "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            "torch.distributed.checkpoint.metadata": (
                "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
                "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")}


class MetadataReader(pickle._Unpickler):
    """Reads optimizer/.metadata and makes nothing but what METADATA names. In Python: C would obey a length of 2^40."""
    def find_class(self, module, name):
        if module in ("pathlib", "pathlib._local"):    # where the folder was when it was written
            return lambda *parts: "/".join(parts)
        if name not in METADATA.get(module, ()):
            raise UserError(f"it names {module}.{name}, which no optimizer does, and could run code")
        return super().find_class(module, name)

    def load_build(self):
        if isinstance(self.stack[-2], type):           # would change a class of torch, not an object
            raise UserError("it changes a class")
        super().load_build()

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}


def load_dcp(folder: Path, state: dict[str, dict[str, Tensor]]) -> None:
    """
    Fill the tensors of state from what torch.distributed.checkpoint saved; none of the folder's code is run, no file
    outside is read. A collective. UserError for a folder that DCP did not write.
    """
    import torch.distributed.checkpoint as dcp
    path = folder / ".metadata"
    try:
        metadata = MetadataReader(io.BytesIO(path.read_bytes())).load()
        strange = [where for where in metadata.storage_data.values()
                   if Path(where.relative_path).name != where.relative_path or where.transform_descriptors]
    except Exception as e:                             # a pickle may break in any way
        raise UserError(f"{path} cannot be read: {e or type(e).__name__}") from None
    if strange:
        raise UserError(f"{path} names {strange[0].relative_path!r}, should be a file of its folder as it was saved")

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            return metadata

    try:
        with warnings.catch_warnings():                # that a single process loads is no accident
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(state, storage_reader=Reader(str(folder)), no_dist=ranks()[1] == 1)
    except (Exception, dcp.api.CheckpointException) as e:
        first = next(iter(e.failures.values()))[0] if isinstance(e, dcp.api.CheckpointException) else e
        raise UserError(f"{folder} cannot be read: {first!r}".split("\n")[0]) from None


def rng_states() -> dict:
    """The states of torch's, numpy's, Python's and CUDA's random generators."""
    return {"torch": torch.get_rng_state(), "numpy": numpy_state(), "python": random.getstate(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None}


def numpy_state() -> tuple:
    """np.random.get_state() with its array as a tensor, which torch.load(weights_only=True) can read."""
    name, keys, *rest = np.random.get_state()
    return (name, torch.from_numpy(keys), *rest)


def restore_rng(saved: dict) -> None:
    """The inverse of rng_states()."""
    torch.set_rng_state(saved["torch"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    random.setstate(saved["python"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


# ---- writing --------------------------------------------------------------------------------------------------------

def save(run: str | Path, step: int, model: nn.Module, *, meta: dict, config: dict, state: dict,
         tokenizer: Tokenizer | None = None, optimizer: torch.optim.Optimizer | None = None, keep: int = 2,
         shape: dict | None = None, rt: Runtime | None = None, background: bool = False,
         beside: Callable[[Path], None] | None = None) -> None:
    """
    Write RUN/step_XXXXXXXX and point RUN/latest at it; the newest `keep` folders stay. Every rank must call it.

      meta    {"stage": "sft", "chat": True, ...}, read back by read_meta
      state   plain values and tensors (schedule position, loader cursors, scheduler), read back by read_state
      shape   ModelConfig fields, default vars(model.cfg)
      beside  rank 0 calls it with the folder, to put more files there (lora.writer)

    background=True copies everything to CPU memory and returns; a thread writes. At most one such save is under way:
    the next one and finish() wait for it. UserError when the disk is full or fails; the previous checkpoint and
    `latest` stay as they were.
    """
    finish()
    run = Path(run)
    reshard(model)
    optim = optimizer_state(model, optimizer) if optimizer is not None else {}
    check_space(run, model, optim)
    weights, order = owned_weights(model)
    check_plain(state, "state")
    dcp = is_sharded(model) and ranks()[1] > 1
    if not dcp:                                        # one GPU: shards of one, saved as what they are
        optim = {name: {key: local(t) for key, t in parts.items()} for name, parts in optim.items()}
    parts = {"optimizer": optim, "rng": rng_states(), "state": state}
    if background:
        weights, parts = snapshot(weights, "weights"), snapshot(parts, "parts")
    job = dict(run=run, step=step, weights=weights, parts=parts, meta=meta, config=config,
               tokenizer=tokenizer, keep=keep, shape=dict(shape if shape is not None else vars(model.cfg)),
               distributed=dcp, order=order, group=getattr(rt, "save_group", None), beside=beside)
    if not background:
        write(**job)
        return
    _pending.thread = threading.Thread(target=_write_quietly, kwargs=job, name="checkpoint", daemon=False)
    _pending.thread.start()
    at_end.callback(_pending.thread.join)              # before the run gives its folder away


class Pending:
    """The background save under way, if any, and what it died of."""
    thread: threading.Thread | None = None
    error: BaseException | None = None
    buffers: dict = {}


_pending = Pending()


def _write_quietly(**job) -> None:
    if sys.platform == "linux":                        # where cores are scarce, training goes first
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    try:
        write(**job)
    except BaseException as e:
        _pending.error = e


def finish() -> None:
    """Wait for a background save; raises what it died of."""
    if _pending.thread is not None:
        _pending.thread.join()
        _pending.thread = None
    if _pending.error is not None:
        error, _pending.error = _pending.error, None
        raise error


def check_plain(value: object, where: str) -> None:
    """
    TypeError naming the place of anything but dicts, lists, tuples, numbers, strings and tensors: train_state.pt is
    read with weights_only=True, so that opening somebody's checkpoint runs none of their code.
    """
    if isinstance(value, dict):
        for k, v in value.items():
            check_plain(v, f"{where}[{k!r}]")
    elif type(value) in (list, tuple):
        for i, v in enumerate(value):
            check_plain(v, f"{where}[{i}]")
    elif not isinstance(value, Tensor) and type(value) not in (type(None), bool, int, float, str, bytes):
        raise TypeError(f"checkpoint {where} = {value!r} is a {type(value).__name__}; "
                        "only plain values and tensors can be saved")


def owned_weights(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """
    -> (the whole tensors that this rank writes, the names of all): all of them at world size 1, else tensor i belongs
    to rank i mod world. Gathered one at a time, so no rank ever holds more than its share.
    """
    rank, world = ranks()
    mine, order = {}, []
    for i, (name, whole) in enumerate(replica_state(model)):
        order.append(name)
        if i % world == rank:
            mine[name] = whole.cpu() if world > 1 or whole.is_cuda else whole
    return mine, order


def snapshot(tree: object, key: object):
    """
    A copy in CPU memory that training cannot change while it is written. key names the buffer, which the next save uses
    again: fresh memory costs a page fault per 4 KB, which is slower than the copy itself.
    """
    if isinstance(tree, dict):
        return {k: snapshot(v, (key, k)) for k, v in tree.items()}
    if not isinstance(tree, Tensor):
        return copy.deepcopy(tree)
    source = local(tree.detach())
    buffer = _pending.buffers.get(key)
    if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
        buffer = _pending.buffers[key] = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
    buffer.copy_(source)
    if not hasattr(tree, "placements"):
        return buffer
    return type(tree)(buffer, tree._spec, requires_grad=False)     # from_local would move it back to the GPU


def check_space(run: Path, model: nn.Module, optim: dict) -> None:
    """UserError, on all ranks, before a byte is written, when the checkpoint cannot fit. A collective."""
    rank, _ = ranks()
    wrong = all_gather_object(no_space(run, model, optim) if rank == 0 else None)[0]
    if wrong:
        raise UserError(wrong)


def no_space(run: Path, model: nn.Module, optim: dict) -> str | None:
    """Why a checkpoint does not fit on the disk, in words; None if it does."""
    need = sum(p.numel() * 4 for p in model.parameters()) + 10_000_000
    need += sum(t.numel() * t.element_size() for parts in optim.values() for t in parts.values())
    try:
        run.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run).free
    except OSError as e:
        return f"cannot write checkpoints to {run}: {e.strerror or e}"
    if free < need:
        return (f"disk full: a checkpoint in {run} needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                "nothing was written, earlier checkpoints are whole")
    return None


def write(run: Path, step: int, weights: dict[str, Tensor], parts: dict, meta: dict, config: dict,
          tokenizer: Tokenizer | None, keep: int, shape: dict, distributed: bool, order: list[str], group: Any,
          beside: Callable[[Path], None] | None) -> None:
    """The writing itself, in the caller's thread or in the background. Collectives, if any, run on `group`."""
    rank, world = ranks()
    temporary = run / f".writing_{step:08d}"
    files: dict = {}

    def clear():
        for old in run.glob(".writing_*"):             # what a killed run left behind
            shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir(parents=True)

    def fill_folder():
        write_weights(temporary, weights, order)
        train = parts
        if distributed:
            import torch.distributed.checkpoint as dcp
            dcp.save(parts["optimizer"], checkpoint_id=str(temporary / "optimizer"), process_group=group)
            train = parts | {"optimizer": dict.fromkeys(parts["optimizer"])}
        if rank == 0:
            torch.save(train, temporary / "train_state.pt")
            write_json(temporary / "model.json", shape)
            write_json(temporary / "config.json", config)
            if tokenizer is not None:
                tokenizer.save(temporary, chat=bool(meta.get("chat", True)))
            if beside is not None:
                beside(temporary)

    def describe():
        for part in all_gather_object(fingerprints(temporary, rank, world), group):
            files.update(part)

    for todo in (clear if rank == 0 else None, fill_folder, describe,
                 (lambda: commit(run, step, temporary, meta, keep, world, files)) if rank == 0 else None):
        error = None
        try:
            if todo:
                todo()
        except Exception as e:
            error = e if room_in(temporary) else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        agree(error, run, step, temporary, group)


def room_in(folder: Path) -> bool:
    """
    Can a megabyte still be written there? On a full disk torch.save and safetensors end with errors of their own, which
    do not say so; a quota may be used up on a disk with room.
    """
    probe = folder / ".probe"
    try:
        with open(probe, "wb") as f:
            f.write(bytes(1 << 20))
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        return e.errno not in (errno.ENOSPC, errno.EDQUOT)
    finally:
        with suppress(OSError):
            probe.unlink()
    return True


def write_json(path: Path, value: object) -> None:
    """Indented JSON with a line end."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def agree(error: Exception | None, run: Path, step: int, temporary: Path, group: Any) -> None:
    """If any rank failed, all raise UserError with the reason here; the half-written folder is removed."""
    rank, world = ranks()
    errors = [error] if world == 1 else all_gather_object(repr(error) if error else None, group)
    if not any(errors):
        return
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    first = next(e for e in errors if e)
    full_disk = getattr(first, "errno", None) == errno.ENOSPC or "o space left" in str(first)
    what = "disk full" if full_disk else repr(first) if isinstance(first, Exception) else str(first)
    raise UserError(f"checkpoint of step {step} in {run} could not be written: {what}; earlier checkpoints are whole")


def write_weights(folder: Path, weights: dict[str, Tensor], order: list[str]) -> None:
    """One safetensors file at world size 1; one per rank, with Hugging Face's index, otherwise."""
    rank, world = ranks()
    name = "model.safetensors" if world == 1 else f"model-{rank + 1:05d}-of-{world:05d}.safetensors"
    save_file({k: w.contiguous() for k, w in weights.items()}, folder / name, metadata={"format": "pt"})
    usual_mode(folder / name)
    if world > 1 and rank == 0:
        where = {n: f"model-{i % world + 1:05d}-of-{world:05d}.safetensors" for i, n in enumerate(order)}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def usual_mode(path: Path) -> None:
    """The permissions that open() gives a new file. safetensors gives 0600, which another user's server cannot read."""
    probe = path.with_name(f".{path.name}.mode")       # os.umask() can only be asked by changing it, for all threads
    probe.touch()
    path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def fingerprints(folder: Path, part: int, parts: int) -> dict[str, list]:
    """fsync and describe every parts-th file: {name: [size, sha256]}."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())[part::parts]
    for path in paths:
        sync(path)
    return {p.relative_to(folder).as_posix(): [p.stat().st_size, digest(p)] for p in paths}


def commit(run: Path, step: int, temporary: Path, meta: dict, keep: int, world: int, files: dict) -> None:
    """
    Manifest, rename, look at it again, `latest`, then the oldest go. At every moment a whole newest checkpoint is on
    the disk.
    """
    manifest = {"step": step, "commit": git_commit(), "meta": meta, "world": world, "files": files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(temporary / "manifest.json")
    for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        sync(folder)
    target = folder_of(run, step)
    if target.exists():                                # the same step again, after it was found broken
        target.rename(run / f".writing_old_{uuid.uuid4().hex}")
    os.replace(temporary, target)
    sync(run)
    wrong = problem_with(target, sums=False)           # the sums were made of what fingerprints() read back
    if wrong or read_manifest(target)["files"] != files:
        raise OSError(f"read back, {wrong or 'manifest.json is another one'}")
    name_latest(target)
    for old in [*run.glob(".writing_old_*"), *[p for p in steps_in(run) if p.name <= target.name][keep:]]:
        shutil.rmtree(old, ignore_errors=True)


def name_latest(ckpt: Path) -> None:
    """The file `latest` beside ckpt names it from here on."""
    pointer = ckpt.parent / f".latest_{uuid.uuid4().hex}"
    pointer.write_text(ckpt.name + "\n", encoding="utf-8")
    sync(pointer)
    os.replace(pointer, ckpt.parent / "latest")
    sync(ckpt.parent)


def sync(path: Path) -> None:
    """fsync a file or, where the system can, a folder."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:                            # folders on Windows
        return
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(fd)


@lru_cache
def git_commit() -> str:
    """The commit this code is at, with + when files differ from it; "unknown" outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        git = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True).stdout
        head, changed = git("rev-parse", "--short=12", "HEAD").strip(), git("status", "--porcelain", "-uno")
        return head + ("+" if changed else "") if head else "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"
