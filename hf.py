"""
Weights in and out: Hugging Face folders <-> our checkpoints (report 2.2; MiMo-7B Base, SFT, RL, RL-0530).

    python hf.py import MiMo-7B-RL out/mimo_7b                       # 451 tensors, 7,833,409,536 parameters
    python hf.py import MiMo-7B-Base out/base --mtps=MiMo-7B-MTPs    # with MTP layers 2 and 3: 483 tensors
    python hf.py export out/tiny/rl out/hf --flavour=mimo            # MiMoForCausalLM, one MTP layer
    python hf.py export out/tiny/rl out/hf --flavour=qwen2           # Qwen2ForCausalLM, loads anywhere

Both directions are streamed: memory holds one output shard at a time. Every tensor of the source is used exactly once,
or the run ends and names the first one that is missing, left over, in two files or of another shape. Stored dtypes are
kept (the official ones are bf16) unless --dtype names another; import -> export -> import keeps every bit.

A trap: MiMo's MTP layer reads the trunk state BEFORE the final norm, and so does vLLM; SGLang gives it the state AFTER
the norm. Both compute the same function only if the final norm has no gain. So an export of our own models moves the
gain gamma of that norm to where it changes no logit:

    lm_head[:, j] *= gamma_j       model.norm = 1       mtp_layers.k.final_layernorm /= gamma

An import that was not trained here is exported without this change (--fold=yes makes it). More in docs/weights.md.
"""
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

import checkpoint
import configurator
import mtp
from checkpoint import opened, read_json, write_json
from configurator import UserError, from_dict
from model import ModelConfig
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
# copied unchanged from an import to its export
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json",
                   "special_tokens_map.json", "chat_template.jinja")
CONFIG, GENERATION = "hf_config.json", "generation_config.json"    # in an imported checkpoint: the publisher's files
AUTO_MAP = {"AutoConfig": "configuration_mimo.MiMoConfig", "AutoModel": "modeling_mimo.MiMoModel",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}      # the names that safetensors uses
MARK = "export.json"          # file that marks a folder as an export of this script, which it may replace

Sources = dict[str, tuple[Path, str]]      # name to write -> (safetensors file, name of the tensor in that file)


@dataclass(frozen=True)
class Config:
    action: Literal["import", "export"] = ""    # import: Hugging Face -> checkpoint; export: the other way
    source: str = ""                            # import: a Hugging Face folder; export: a checkpoint or a run's folder
    out: str = ""                               # folder to write
    flavour: Literal["mimo", "qwen2"] = ""      # export, required: MiMoForCausalLM or Qwen2ForCausalLM
    mtps: str = ""                              # folder of MTP layers 2 and 3 (MiMo-7B-MTPs), read or written
    dtype: Literal["stored", "bfloat16", "float16", "float32"] = "stored"   # of the written weights
    chat: Literal["auto", "yes", "no"] = "auto"   # import: is it a chat model? auto: yes if it ends with <|im_end|>
    fold: Literal["auto", "yes", "no"] = "auto"   # export: fold the final norm's gain? auto: no for an untrained import
    shard_gb: float = 5.0                       # GB per written file, and about the peak of memory

    POSITIONAL = ("action", "source", "out")

    def __post_init__(self):
        configurator.at_least(self, 1e-3, "shard_gb")
        if self.action == "export" and not self.flavour:
            raise ValueError("flavour is missing: an export needs --flavour=mimo or --flavour=qwen2")


def main(cfg: Config) -> None:
    dtype = None if cfg.dtype == "stored" else getattr(torch, cfg.dtype)
    mtps, shard_bytes = cfg.mtps or None, cfg.shard_gb * 1e9
    if cfg.action == "import":
        shape, n, size = import_folder(cfg.source, cfg.out, mtps, dtype, shard_bytes, cfg.chat)
        print(f"{cfg.source} -> {cfg.out}: {n} tensors, {shape.n_params():,} parameters, {size / 1e9:.2f} GB, "
              f"{shape.n_mtp} MTP layer(s), RoPE base {shape.rope_base:,.0f}, context {shape.max_seq_len:,}")
    else:
        ckpt, n, size, folded = export_folder(cfg.source, cfg.out, cfg.flavour, mtps, dtype, cfg.fold, shard_bytes)
        print(f"{ckpt} -> {cfg.out}: {n} tensors, {size / 1e9:.2f} GB, flavour {cfg.flavour}, "
              f"final norm {'folded into lm_head' if folded else 'as it was'}")


# ---- names and shapes -----------------------------------------------------------------------------------------------

def hub_name(name: str) -> str:
    """layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj.weight; lm_head alone has no "model." before it."""
    return name if name.startswith("lm_head.") else "model." + name


def expected(shape: ModelConfig) -> dict[str, list[int]]:
    """Hub name -> shape of every tensor; nothing is allocated. MiMo-7B with one MTP layer: 435 + 16 = 451 entries."""
    return {hub_name(name): list(t.shape) for name, t in mtp.build(shape, "meta").state_dict().items()}


def tensors_in(folder: str | Path) -> dict[str, Path]:
    """
    Hub name -> file, from the contents of the files. UserError for a tensor that is in two files, for a file that the
    index lists and that is missing, and for a safetensors file that the index does not list.
    """
    folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    present = {p.name for p in folder.glob("*.safetensors")}
    listing = read_json(index) if index.is_file() else {"weight_map": {}}
    weight_map = listing.get("weight_map") if isinstance(listing, dict) else None
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: should be an object with weight_map, tensor name -> file")
    listed = set(weight_map.values()) if weight_map else present
    if not listed:
        raise UserError(f"{folder}: no .safetensors file")
    if listed != present:
        odd = sorted(listed ^ present)[0]
        raise UserError(f"{folder}: {odd} is {'missing' if odd in listed else 'not in ' + index.name + ', remove it'}")
    found = {}
    for file in sorted(listed):
        with opened(folder / file) as f:
            for name in f.keys():      # noqa: SIM118 (not a dict)
                if name in found:
                    raise UserError(f"{folder}: tensor {name} is in both {found[name].name} and {file}")
                found[name] = folder / file
    wrong = sorted(n for n, file in weight_map.items() if n not in found or found[n].name != file)
    if wrong:
        raise UserError(f"{folder}: tensor {wrong[0]} is not in {weight_map[wrong[0]]}, where {index.name} says it is")
    return found


def check_tensors(have: Sources, want: dict[str, list[int]], where: Path) -> None:
    """have, want (hub name -> shape): the same names, each with its shape and a dtype we know, else UserError."""
    missing, left_over = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    if missing:
        raise UserError(f"{where}: tensor {missing[0]} is missing ({len(missing)} such)")
    if left_over:
        raise UserError(f"{where}: tensor {left_over[0]} has no place in the model ({len(left_over)} such)")
    for path in {p for p, _ in have.values()}:
        with opened(path) as f:
            for name, stored in ((n, s) for n, (p, s) in have.items() if p == path):
                piece = f.get_slice(stored)
                if list(piece.get_shape()) != want[name]:
                    raise UserError(f"{path}: tensor {stored} has shape {piece.get_shape()}, should be {want[name]}")
                if piece.get_dtype() not in DTYPES:
                    raise UserError(f"{path}: tensor {stored} is {piece.get_dtype()}, should be {' or '.join(DTYPES)}")


# ---- streaming ------------------------------------------------------------------------------------------------------

def sizes_of(sources: Sources, dtype: torch.dtype | None) -> dict[str, int]:
    """Name -> bytes of the tensor once it is written in dtype (None: as stored)."""
    sizes, files = {}, {path: opened(path) for path in {p for p, _ in sources.values()}}
    for new, (path, old) in sources.items():
        piece = files[path].get_slice(old)
        sizes[new] = torch.Size(piece.get_shape()).numel() * (dtype or DTYPES[piece.get_dtype()]).itemsize
    return sizes


def write_shards(folder: Path, sources: Sources, shard_bytes: float, dtype: torch.dtype | None = None,
                 change: Callable[[str, Tensor], Tensor] = lambda name, t: t) -> int:
    """
    Write the tensors, in the order of sources, as safetensors files of at most shard_bytes (or of one larger tensor),
    with an index if there are several. change(name, tensor) -> tensor is applied before the cast to dtype (None: as
    stored). One shard is in memory at a time. -> bytes written.
    """
    sizes, shards, room = sizes_of(sources, dtype), [], 0
    for new in sources:
        if sizes[new] > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(new)
        room -= sizes[new]
    weight_map = {}
    for k, names in enumerate(shards, 1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        data = {}
        for path in sorted({sources[new][0] for new in names}):
            with opened(path) as f:
                for new in (n for n in names if sources[n][0] == path):
                    t = f.get_tensor(sources[new][1])
                    data[new] = change(new, t).to(dtype or t.dtype)
        save_file(data, folder / file, metadata={"format": "pt"})     # transformers refuses a file without it
        del data                                                      # before the next shard is read
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return sum(sizes.values())


def check_space(folder: Path, sources: Sources, dtype: torch.dtype | None) -> None:
    """UserError, before a byte is written, if the disk has no room for what write_shards would write."""
    folder.mkdir(parents=True, exist_ok=True)
    n_bytes, free = sum(sizes_of(sources, dtype).values()), shutil.disk_usage(folder).free
    if free < n_bytes + 50_000_000:
        raise UserError(f"{folder}: {n_bytes / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free")


# ---- import ---------------------------------------------------------------------------------------------------------

def model_config(hf: dict, path: Path) -> ModelConfig:
    """
    hf: the contents of Hugging Face's config.json (Qwen2 or MiMo), path: its name for errors. No key has a default:
    Qwen2Config's own defaults (eps 1e-6, vocabulary 151,936) are not MiMo's, so a missing key must not be guessed.
    UserError names key and value.
    """
    def get(key: str, *kinds: type) -> int | float:
        if not isinstance(hf.get(key), kinds) or isinstance(hf[key], bool):
            raise UserError(f"{path}: {key} = {hf.get(key)!r} should be {' or '.join(k.__name__ for k in kinds)}")
        return hf[key]

    if hf.get("model_type") not in ("mimo", "qwen2"):
        raise UserError(f"{path}: model_type = {hf.get('model_type')!r} should be mimo or qwen2")
    # transformers 5 moves RoPE's keys into rope_parameters and calls torch_dtype dtype
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{path}: RoPE scaling {rope} is not part of MiMo-7B; should be absent")
    hf = {"rope_theta": rope.get("rope_theta")} | hf
    fixed = {"hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False}
    for key, right in fixed.items():
        if hf.get(key, right) != right:
            raise UserError(f"{path}: {key} = {hf[key]!r} should be {right!r}: this is not MiMo-7B's architecture")
    n_head, d_model = get("num_attention_heads", int), get("hidden_size", int)
    fields = dict(
        vocab_size=get("vocab_size", int), n_layer=get("num_hidden_layers", int), d_model=d_model, n_head=n_head,
        n_kv_head=get("num_key_value_heads", int), head_dim=hf.get("head_dim") or d_model // n_head,
        d_ff=get("intermediate_size", int), rms_eps=get("rms_norm_eps", float),
        rope_base=float(get("rope_theta", int, float)), max_seq_len=get("max_position_embeddings", int),
        n_mtp=hf.get("num_nextn_predict_layers", 0))
    try:
        return ModelConfig(**fields)
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: {e}") from None


def with_mtps(folder: str | Path, files: dict[str, Path], shape: ModelConfig) -> tuple[dict[str, Path], ModelConfig]:
    """
    Join the folder MiMo-7B-MTPs, which holds only model.mtp_layers.1.* and .2.*, with the files of the main model. ->
    (name -> file of all tensors, shape with three MTP layers).
    """
    extra = tensors_in(folder)
    double = sorted(set(extra) & set(files))
    if double:
        raise UserError(f"{folder}: tensor {double[0]} is in the main model already")
    layers = [int(n.split(".")[2]) for n in extra if re.match(r"model\.mtp_layers\.\d+\.", n)]
    if not layers:
        raise UserError(f"{folder}: no tensor of an MTP layer (model.mtp_layers.1.* ...)")
    return files | extra, replace(shape, n_mtp=max(layers) + 1)


def import_folder(source: str | Path, out: str | Path, mtps: str | Path | None = None, dtype: torch.dtype | None = None,
                  shard_bytes: float = 5e9, chat: str = "auto") -> tuple[ModelConfig, int, int]:
    """
    A Hugging Face folder -> the checkpoint OUT/step_00000000 and OUT/latest, which pretrain.py, sft.py, rl.py,
    sample.py and eval.py read like their own. mtps: folder of MTP layers 2 and 3. dtype: None = as stored. chat:
    "auto", "yes" or "no". -> (shape, tensors, bytes). UserError says what does not fit; nothing half-made is left.
    """
    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        raise UserError(f"{source / 'config.json'} is missing: {source} is not a Hugging Face model folder")
    if checkpoint.steps_in(out):
        raise UserError(f"{out} holds {checkpoint.steps_in(out)[0].name} already: give another folder, or remove it")
    hf = read_json(source / "config.json")
    if not isinstance(hf, dict):
        raise UserError(f"{source / 'config.json'} should be a JSON object, is a {type(hf).__name__}")
    shape, files = model_config(hf, source / "config.json"), tensors_in(source)
    if mtps:
        files, shape = with_mtps(mtps, files, shape)
    want = expected(shape)
    have = {name: (path, name) for name, path in files.items()}
    check_tensors(have, want, source)
    try:
        tokenizer = Tokenizer.load(source)
    except (ValueError, OSError) as e:
        raise UserError(f"tokenizer: {e}") from None
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(f"{source}: the tokenizer has {tokenizer.vocab_size:,} ids, vocab_size = {shape.vocab_size:,}")
    check_space(out, have, dtype)
    temporary = out / ".writing_00000000"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        ours = {name.removeprefix("model."): have[name] for name in want}
        n_bytes = write_shards(temporary, ours, shard_bytes, dtype)
        write_json(temporary / "model.json", vars(shape))
        write_json(temporary / CONFIG, hf)
        write_json(temporary / "config.json", {"imported": str(source), "mtps": str(mtps) if mtps else None})
        for file in (*TOKENIZER_FILES, GENERATION):
            if (source / file).is_file():
                shutil.copyfile(source / file, temporary / file)
        ends = hf.get("eos_token_id")          # MiMo's chat models stop at <|im_end|>, the base model at <|endoftext|>
        ends = ends if isinstance(ends, list) else [ends]
        is_chat = tokenizer.im_end_id in ends if chat == "auto" else chat == "yes"
        checkpoint.commit(out, 0, temporary, {"stage": "import", "chat": is_chat}, keep=1, world=1,
                          files=checkpoint.fingerprints(temporary, 0, 1))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return shape, len(want), n_bytes


# ---- export ---------------------------------------------------------------------------------------------------------

def hub_config(shape: ModelConfig, tokenizer: Tokenizer, flavour: str, chat: bool, dtype: torch.dtype,
               original: dict | None) -> dict:
    """
    The contents of config.json, with the keys that old and new engines read: rope_theta and torch_dtype are spelled
    out, because an engine that does not know transformers 5's rope_parameters would use a RoPE base of 10,000 without a
    warning. original: the config.json of an import, whose other keys are kept.
    """
    mimo = flavour == "mimo"
    base = int(shape.rope_base) if float(shape.rope_base).is_integer() else shape.rope_base
    config = {
        "attention_bias": True, "attention_dropout": 0.0, "bos_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.im_end_id if chat else tokenizer.eos_id, "hidden_act": "silu",
        "initializer_range": 0.02, "max_window_layers": shape.n_layer, "sliding_window": shape.max_seq_len,
        "tie_word_embeddings": False, "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
        "use_sliding_window": False} | (original or {}) | {
        "model_type": flavour, "architectures": ["MiMoForCausalLM" if mimo else "Qwen2ForCausalLM"],
        "head_dim": shape.head_dim, "hidden_size": shape.d_model, "intermediate_size": shape.d_ff,
        "max_position_embeddings": shape.max_seq_len, "num_attention_heads": shape.n_head,
        "num_hidden_layers": shape.n_layer, "num_key_value_heads": shape.n_kv_head, "rms_norm_eps": shape.rms_eps,
        "rope_theta": base, "torch_dtype": str(dtype).removeprefix("torch."), "vocab_size": shape.vocab_size,
        "auto_map": AUTO_MAP, "num_nextn_predict_layers": min(shape.n_mtp, 1)}
    for key in ("rope_parameters", "rope_scaling", "dtype", "layer_types", *(() if mimo else
                ("auto_map", "num_nextn_predict_layers"))):
        config.pop(key, None)
    return dict(sorted(config.items()))


def generation_config(tokenizer: Tokenizer, chat: bool) -> dict:
    """
    The contents of generation_config.json: the sampling of the report's evaluation (temperature 0.6, top-p 0.95). Chat
    models stop at both end tokens.
    """
    ends = [tokenizer.im_end_id, tokenizer.eos_id] if chat else tokenizer.eos_id
    return {"bos_token_id": tokenizer.eos_id, "eos_token_id": ends, "pad_token_id": tokenizer.eos_id,
            "do_sample": True, "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.40.1"}


def folding(path: Path, name: str) -> Callable[[str, Tensor], Tensor]:
    """
    path, name: file and name of the final norm's gain gamma [D]. -> change(hub name, tensor), which moves gamma into
    lm_head and out of the MTP norms; exact up to rounding. UserError if a gain is 0 or not finite.
    """
    with opened(path) as f:
        gamma = f.get_tensor(name).float()                                   # [D]
    if not (gamma.isfinite() & (gamma.abs() > 1e-6)).all():
        raise UserError(f"{path}: {name} has a gain of {gamma.abs().min():g}, nothing can be divided by it; --fold=no")

    def change(name: str, t: Tensor) -> Tensor:
        if name == "lm_head.weight":                                         # lm_head[:, j] *= gamma_j
            return t.float() * gamma                                         # [V,D] * [D]
        if name == "model.norm.weight":                                      # model.norm = 1
            return torch.ones_like(t)
        if name.endswith(".final_layernorm.weight"):                         # final_layernorm /= gamma
            return t.float() / gamma
        return t
    return change


def export_folder(source: str | Path, out: str | Path, flavour: str, mtps: str | Path | None = None,
                  dtype: torch.dtype | None = None, fold: str = "auto",
                  shard_bytes: float = 5e9) -> tuple[Path, int, int, bool]:
    """
    A checkpoint, or the newest one of a run's folder -> a Hugging Face folder. flavour "mimo" has one MTP layer (SGLang
    would load a second one over the first); more go to the folder mtps, as in MiMo-7B-MTPs. "qwen2" has none. dtype:
    None = as stored. fold: "auto", "yes" or "no". -> (checkpoint folder, tensors, bytes, whether the gain was folded).
    """
    ckpt, out = checkpoint.find(source), Path(out)
    shape, meta = from_dict(ModelConfig, checkpoint.read_shape(ckpt), f"{ckpt}/model.json"), checkpoint.read_meta(ckpt)
    have = {hub_name(n): (p, n) for n, p in checkpoint.weight_files(ckpt).items()}
    want = expected(shape)
    check_tensors(have, want, ckpt)
    tokenizer, chat = Tokenizer.load(ckpt), meta.get("chat", True)
    original = read_json(ckpt / CONFIG) if (ckpt / CONFIG).is_file() else None
    untrained_import = original is not None and meta.get("stage") == "import"
    folded = flavour == "mimo" and (fold == "yes" or fold == "auto" and not untrained_import)
    change = folding(*have["model.norm.weight"]) if folded else lambda name, t: t
    with opened(have["lm_head.weight"][0]) as f:
        stored = DTYPES[f.get_slice("lm_head.weight").get_dtype()]
    note = {"source": str(ckpt), "flavour": flavour, "folded": folded}

    mtp_layer = lambda name: int(name.split(".")[2]) if name.startswith("model.mtp_layers.") else -1    # -1: the trunk
    main = {n: have[n] for n in want if mtp_layer(n) < (1 if flavour == "mimo" else 0)}
    rest = {n: have[n] for n in want if mtp_layer(n) >= 1}
    if mtps and not rest:
        raise UserError(f"{ckpt} has {shape.n_mtp} MTP layer(s), there is no second one to write to {mtps}")
    config = hub_config(shape, tokenizer, flavour, chat, dtype or stored, original)
    check_space(out.parent, main | (rest if mtps else {}), dtype)
    temporary = open_target(out)
    try:
        n_bytes = write_shards(temporary, main, shard_bytes, dtype, change)
        write_json(temporary / "config.json", config)
        write_json(temporary / GENERATION, generation_config(tokenizer, chat))
        code = sorted((HERE / "hf_export").glob("*.py")) if flavour == "mimo" else []
        # an import's own generation_config.json replaces ours
        for path in (*code, *(ckpt / f for f in (*TOKENIZER_FILES, GENERATION) if (ckpt / f).is_file())):
            shutil.copyfile(path, temporary / path.name)
        close_target(temporary, out, note)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if mtps:                                  # the layout of MiMo-7B-MTPs: these tensors and a configuration
        temporary = open_target(Path(mtps))
        write_shards(temporary, rest, shard_bytes, dtype, change)
        more = {"architectures": ["MiMoMTPModel"], "num_nextn_predict_layers": shape.n_mtp}
        write_json(temporary / "config.json", config | more)
        close_target(temporary, Path(mtps), note)
    elif rest and flavour == "mimo":
        print(f"note: MTP layers 2 to {shape.n_mtp} are left out; --mtps=FOLDER writes them", file=sys.stderr)
    return ckpt, len(main), n_bytes, folded


def open_target(folder: Path) -> Path:
    """-> a new folder beside `folder` to write in. UserError if `folder` holds something this script did not write."""
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and was not made by hf.py export: give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def close_target(temporary: Path, folder: Path, note: dict) -> None:
    """Mark the new folder with note and commit, then rename it: `folder` is the old export or the whole new one."""
    write_json(temporary / MARK, note | {"commit": checkpoint.git_commit()})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


if __name__ == "__main__":
    configurator.run(main, Config)
