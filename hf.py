"""
Weights in and out: Hugging Face folders <-> our checkpoints (report 2.2; MiMo-7B Base, SFT, RL, RL-0530).

    python hf.py import MiMo-7B-RL out/mimo_7b                       # 451 tensors, 7,833,409,536 parameters
    python hf.py import MiMo-7B-Base out/base --mtps=MiMo-7B-MTPs    # with MTP layers 2 and 3: 483 tensors
    python hf.py import Qwen2.5-0.5B out/qwen --mtp=1                # Qwen2, Qwen2.5, Llama; a fresh MTP layer to train
    python hf.py import Qwen2.5-0.5B out/qwen --adapter=PEFT         # with a LoRA adapter of PEFT, merged
    python hf.py export out/tiny/rl out/hf --flavour=mimo            # MiMoForCausalLM, one MTP layer
    python hf.py export out/tiny/rl out/hf --flavour=qwen2           # Qwen2ForCausalLM without it; llama: Llama's

Both directions are streamed: memory holds one output shard at a time. Every tensor of the source is used exactly once,
or the run ends and names the first one that is missing, left over, in two files or of another shape. Stored dtypes are
kept (the official ones are bf16) unless --dtype names another; import -> export -> import keeps every bit. The flavour
mimo always has biases and a head of its own, as MiMo-7B: zeros and a copy of the embedding where the model has none.

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
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

import checkpoint
import configurator
import lora
import mtp
from checkpoint import opened, usual_mode, weight_map_of, write_json
from configurator import UserError, from_dict
from data.jsonl import MOST_JSON, read_json
from model import ModelConfig
from tokenizer import Tokenizer, check_inside

HERE = Path(__file__).resolve().parent
# copied unchanged from an import to its export
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json",
                   "special_tokens_map.json", "chat_template.jinja")
CONFIG, GENERATION = "hf_config.json", "generation_config.json"    # in an imported checkpoint: the publisher's files
FAMILIES = {"mimo": "MiMoForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
REFUSED = {"qwen3": "q and k have a norm of their own", "qwen2_moe": "a mixture of experts",
           "qwen3_moe": "a mixture of experts", "mistral": "its attention has a sliding window",
           "gemma2": "softcapping, norms behind each layer"}          # model_type -> what this trunk does not have
AUTO_MAP = {"AutoConfig": "configuration_mimo.MiMoConfig", "AutoModel": "modeling_mimo.MiMoModel",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}      # the names that safetensors uses
CODE = ("auto_map", "custom_pipelines")      # keys that name code of a publisher's repository: these stay behind
MARK = "export.json"          # file that marks a folder as an export of this script, which it may replace

Sources = dict[str, tuple[Path, str]]      # name to write -> (safetensors file, name of the tensor in that file)


@dataclass(frozen=True)
class Config:
    action: Literal["import", "export"] = ""    # import: Hugging Face -> checkpoint; export: the other way
    source: str = ""                            # import: a Hugging Face folder; export: a checkpoint or a run's folder
    out: str = ""                               # folder to write
    flavour: Literal["mimo", "qwen2", "llama"] = ""   # export, required: the family whose code loads the folder
    mtps: str = ""                              # folder of MTP layers 2 and 3 (MiMo-7B-MTPs), read or written
    adapter: str = ""                           # import: a PEFT folder with a LoRA adapter, merged into the weights
    mtp: int = 0                                # import: fresh MTP layers for a model without, to be trained
    dtype: Literal["stored", "bfloat16", "float16", "float32"] = "stored"   # of the written weights
    chat: Literal["auto", "yes", "no"] = "auto"   # import: is it a chat model? auto: yes if it ends with <|im_end|>
    widen: int = 1                              # export: heads and states this many times as wide, padded with zeros
    odd_heads: bool = False                     # export: also where d_model is not n_head head_dim; not for vLLM
    fold: Literal["auto", "yes", "no"] = "auto"   # export: fold the final norm's gain? auto: no for an untrained import
    shard_gb: float = 5.0                       # GB per written file, and about the peak of memory

    POSITIONAL = ("action", "source", "out")

    def __post_init__(self):
        configurator.at_least(self, 1e-3, "shard_gb")
        configurator.at_least(self, 0, "mtp")
        configurator.at_least(self, 1, "widen")
        if self.action == "export" and not self.flavour:
            raise ValueError("flavour is missing: an export needs --flavour=mimo, --flavour=qwen2 or --flavour=llama")
        if self.adapter and self.action == "export":
            raise ValueError(f"adapter = {self.adapter!r} should be empty: adapters come in at an import")
        if self.mtp and (self.mtps or self.action == "export"):
            raise ValueError(f"mtp = {self.mtp} makes fresh MTP layers at an import, mtps names a folder of trained "
                             "ones: one of the two")


def main(cfg: Config) -> None:
    dtype = None if cfg.dtype == "stored" else getattr(torch, cfg.dtype)
    mtps, shard_bytes = cfg.mtps or None, cfg.shard_gb * 1e9
    if cfg.action == "import":
        shape, n, size = import_folder(cfg.source, cfg.out, mtps, dtype, shard_bytes, cfg.chat, cfg.mtp,
                                       cfg.adapter or None)
        print(f"{cfg.source} -> {cfg.out}: {n} tensors, {shape.n_params():,} parameters, {size / 1e9:.2f} GB, "
              f"{shape.n_mtp} MTP layer(s), RoPE base {shape.rope_base:,.0f}, context {shape.max_seq_len:,}")
    else:
        ckpt, n, size, folded = export_folder(cfg.source, cfg.out, cfg.flavour, mtps, dtype, cfg.fold, shard_bytes,
                                              cfg.odd_heads, cfg.widen)
        print(f"{ckpt} -> {cfg.out}: {n} tensors, {size / 1e9:.2f} GB, flavour {cfg.flavour}, "
              f"final norm {'folded into lm_head' if folded else 'as it was'}")


# ---- names and shapes -----------------------------------------------------------------------------------------------

def hub_name(name: str) -> str:
    """layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj.weight; lm_head alone has no "model." before it."""
    return name if name.startswith("lm_head.") else "model." + name


def expected(shape: ModelConfig) -> dict[str, list[int]]:
    """Hub name -> shape of every tensor; nothing is allocated. MiMo-7B with one MTP layer: 435 + 16 = 451 entries."""
    return {hub_name(name): list(t.shape) for name, t in mtp.build(shape, "meta").named_parameters()}


def tensors_in(folder: str | Path) -> dict[str, Path]:
    """
    Hub name -> file, from the contents of the files. UserError for a tensor that is in two files, for a file that the
    index lists and that is missing, and for a safetensors file that the index does not list.
    """
    folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    present = {p.name for p in folder.glob("*.safetensors")}
    weight_map = weight_map_of(index) if index.is_file() else {}
    listed = set(weight_map.values()) if weight_map else present
    if not listed:
        old = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
        raise UserError(f"{folder}: no .safetensors file" + (f", {old[0]} is not read: load the folder with "
                        "transformers' AutoModelForCausalLM and write it again with save_pretrained" if old else ""))
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
    uses = Counter(sources.values())
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
                    if uses[sources[new]] > 1:                        # tensors of one file may not share memory
                        t = t.clone()
                    data[new] = change(new, t).to(dtype or t.dtype)
        save_file(data, folder / file, metadata={"format": "pt"})     # transformers refuses a file without it
        usual_mode(folder / file)
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
    hf: the contents of Hugging Face's config.json (MiMo, Qwen2 or Llama), path: its name for errors. No key has a
    default: Qwen2Config's own defaults (eps 1e-6, vocabulary 151,936) are not MiMo's, so a missing key must not be
    guessed. UserError names key and value.
    """
    def get(key: str, *kinds: type) -> int | float:
        if not isinstance(hf.get(key), kinds) or isinstance(hf[key], bool):
            raise UserError(f"{path}: {key} = {hf.get(key)!r:.80} should be {' or '.join(k.__name__ for k in kinds)}")
        if isinstance(hf[key], int) and abs(hf[key]) >= 1 << 63:
            raise UserError(f"{path}: {key} has {hf[key].bit_length()} bits, impossible sizes")
        return hf[key]

    family = hf.get("model_type")
    if family not in list(FAMILIES):
        why = f": {REFUSED[family]}" if family in list(REFUSED) else ""
        raise UserError(f"{path}: model_type = {family!r} should be {', '.join(FAMILIES)}{why}")
    if hf.get("quantization_config"):
        raise UserError(f"{path}: quantization_config is there, should be absent: only bf16, fp16 and fp32 are read")
    hf = {"rope_theta": rope_base(hf, path)} | hf
    fixed = {"hidden_act": "silu", "use_sliding_window": False, "partial_rotary_factor": 1.0, "mlp_bias": False}
    if family == "llama":                  # Qwen2's own classes have these biases whatever the key says
        fixed["attention_bias"] = False
    for key, right in fixed.items():
        if hf.get(key) not in (None, right):
            raise UserError(f"{path}: {key} = {hf[key]!r} should be {right!r}: this is not MiMo-7B's architecture")
    kinds = hf.get("layer_types") or []
    other = sorted({str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])} - {"full_attention"})
    if other:
        raise UserError(f"{path}: layer_types has {other[0]!r}, should be 'full_attention' throughout")
    if (tied := hf.get("tie_word_embeddings") or False) is not bool(tied):
        raise UserError(f"{path}: tie_word_embeddings = {tied!r} should be True or False")
    n_head, d_model = get("num_attention_heads", int), get("hidden_size", int)
    head_dim = d_model // max(1, n_head) if hf.get("head_dim") is None else get("head_dim", int)
    n_mtp = 0 if hf.get("num_nextn_predict_layers") is None else get("num_nextn_predict_layers", int)
    fields = dict(
        vocab_size=get("vocab_size", int), n_layer=get("num_hidden_layers", int), d_model=d_model, n_head=n_head,
        n_kv_head=get("num_key_value_heads", int), head_dim=head_dim,
        d_ff=get("intermediate_size", int), rms_eps=get("rms_norm_eps", float),
        rope_base=float(get("rope_theta", int, float)), max_seq_len=get("max_position_embeddings", int),
        n_mtp=n_mtp, qkv_bias=family != "llama",
        tie_embeddings=tied)
    try:
        return ModelConfig(**fields)
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: {e}") from None


def rope_base(hf: dict, path: Path) -> float | None:
    """
    The base, from where transformers 5 keeps it (rope_parameters); None if it is not there. UserError for a scaling,
    and for two bases in one file, of which every version of transformers takes another one.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters = {rope!r:.80} should be an object")
    if rope.get("rope_type", rope.get("type", "default")) != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: RoPE scaling {rope} is not part of MiMo-7B; should be absent")
    new, old = rope.get("rope_theta"), hf.get("rope_theta")
    if None not in (new, old) and new != old:
        raise UserError(f"{path}: rope_theta = {old!r}, but {new!r} in rope_parameters: should be one of the two")
    return new


def drop_unused(files: dict[str, Path], shape: ModelConfig) -> dict[str, Path]:
    """
    Without the tensors that no model reads: RoPE's frequencies, which older Llama folders store, and a copy of the
    embedding as lm_head under tied embeddings. UserError if that is not a copy.
    """
    files = {name: path for name, path in files.items() if not name.endswith(".rotary_emb.inv_freq")}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if shape.tie_embeddings and head in files and embedding in files:
        with opened(files[head]) as f, opened(files[embedding]) as g:
            if not torch.equal(f.get_tensor(head), g.get_tensor(embedding)):
                raise UserError(f"{files[head]}: {head} is not {embedding}: tie_word_embeddings = True should be False")
        del files[head]
    return files


def with_mtps(folder: str | Path, files: dict[str, Path], shape: ModelConfig) -> tuple[dict[str, Path], ModelConfig]:
    """
    Join the folder MiMo-7B-MTPs, which holds only model.mtp_layers.1.* and .2.*, with the files of the main model. ->
    (name -> file of all tensors, shape with three MTP layers).
    """
    extra = tensors_in(folder)
    double = sorted(set(extra) & set(files))
    if double:
        raise UserError(f"{folder}: tensor {double[0]} is in the main model already")
    layers = [int(n.split(".")[2]) for n in extra if re.match(r"model\.mtp_layers\.[0-7]\.", n)]
    if not layers:
        raise UserError(f"{folder}: no tensor of an MTP layer (model.mtp_layers.1.* to 7.*)")
    return files | extra, replace(shape, n_mtp=max(layers) + 1)


def fresh_layers(have: Sources, shape: ModelConfig, n: int, folder: Path) -> tuple[Sources, ModelConfig]:
    """
    have and shape with n untrained MTP layers, for a model without. Their block is a copy of the last one, their last
    norm the trunk's; what no block has is written to a file in folder: input_proj = [1/2 | 1/2], the mean of hidden
    state and embedding, and gains of 1. docs/lab_log.md compares this start with others.
    """
    if shape.n_mtp:
        raise UserError(f"mtp = {n} adds MTP layers to a model without: this one has {shape.n_mtp}, should be 0")
    shape, made = replace(shape, n_mtp=n), {}
    with opened(have["model.norm.weight"][0]) as f:
        gain = torch.ones_like(f.get_tensor(have["model.norm.weight"][1]))                  # [D]
    for name in expected(shape):
        if name.startswith("model.mtp_layers."):
            part = name.split(".", 3)[3]
            if part == "input_proj.weight":
                made[name] = torch.cat([torch.diag(gain / 2)] * 2, 1)                       # [D,2D]
            elif part in ("token_layernorm.weight", "hidden_layernorm.weight"):
                made[name] = gain.clone()
            elif part == "final_layernorm.weight":
                have = have | {name: have["model.norm.weight"]}
            else:
                have = have | {name: have[f"model.layers.{shape.n_layer - 1}.{part}"]}
    return have | store(made, folder), shape


def store(tensors: dict[str, Tensor], folder: Path, file: str = "made.safetensors") -> Sources:
    """Tensors that are in no file yet, written to one in folder, a temporary one."""
    if not tensors:
        return {}
    save_file(tensors, folder / file)
    return {name: (folder / file, name) for name in tensors}


def import_folder(source: str | Path, out: str | Path, mtps: str | Path | None = None, dtype: torch.dtype | None = None,
                  shard_bytes: float = 5e9, chat: str = "auto", fresh: int = 0,
                  adapter: str | Path | None = None) -> tuple[ModelConfig, int, int]:
    """
    A Hugging Face folder -> the checkpoint OUT/step_00000000 and OUT/latest, which pretrain.py, sft.py, rl.py,
    sample.py and eval.py read like their own. mtps: folder of MTP layers 2 and 3. dtype: None = as stored. chat:
    "auto", "yes" or "no". fresh: untrained MTP layers to add. adapter: a PEFT folder, merged in. -> (shape, tensors,
    bytes). UserError says what does not fit; nothing half-made is left.
    """
    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        hint = (f"; `huggingface-cli download {source} --local-dir DIR` fetches one" if not source.exists() else
                f", but a LoRA adapter: `python hf.py import BASE OUT --adapter={source}` merges it into its base"
                if (source / "adapter_config.json").is_file() else "")
        raise UserError(f"{source / 'config.json'} is missing: {source} is not a Hugging Face model folder{hint}")
    if checkpoint.steps_in(out):
        raise UserError(f"{out} holds {checkpoint.steps_in(out)[0].name} already: give another folder, or remove it")
    hf = read_json(source / "config.json")
    shape, files = model_config(hf, source / "config.json"), tensors_in(source)
    if mtps:
        files, shape = with_mtps(mtps, files, shape)
    have = {name: (path, name) for name, path in drop_unused(files, shape).items()}
    check_tensors(have, expected(shape), source)
    merge = lora.merging(Path(adapter), expected(shape)) if adapter else lambda name, t: t
    copies = copied_files(source)
    try:
        tokenizer = Tokenizer.load(source)
    except (ValueError, OSError) as e:
        raise UserError(f"tokenizer: {e}") from None
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(f"{source}: the tokenizer has {tokenizer.vocab_size:,} ids, vocab_size = {shape.vocab_size:,}")
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / ".writing_00000000"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".made_") as made:
            if fresh:
                have, shape = fresh_layers(have, shape, fresh, Path(made))
            ours = {name.removeprefix("model."): have[name] for name in expected(shape)}
            check_space(out, ours, dtype)
            n_bytes = write_shards(temporary, ours, shard_bytes, dtype, lambda name, t: merge(hub_name(name), t))
        write_json(temporary / "model.json", vars(shape))
        write_json(temporary / CONFIG, {key: value for key, value in hf.items() if key not in CODE})
        write_json(temporary / "config.json", {"imported": str(source), "mtps": str(mtps) if mtps else None,
                                               "adapter": str(adapter) if adapter else None, "fresh_mtp": fresh})
        for file in copies:
            shutil.copyfile(source / file, temporary / file)
        tidy_tokenizer(temporary / "tokenizer_config.json", {})
        generation = read_json(source / GENERATION) if GENERATION in copies else {}
        meta = {"stage": "import", "chat": is_chat(tokenizer, hf, generation) if chat == "auto" else chat == "yes"}
        checkpoint.commit(out, 0, temporary, meta, keep=1, world=1, files=checkpoint.fingerprints(temporary, 0, 1))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return shape, len(ours), n_bytes


def copied_files(folder: Path) -> list[str]:
    """
    Which of the files that are copied unchanged a folder has. UserError for one that no model needs in this size, and
    for a link that leads out of the folder.
    """
    files = [file for file in (*TOKENIZER_FILES, GENERATION) if (folder / file).is_file()]
    for file in files:
        check_inside(folder / file)
        if (size := (folder / file).stat().st_size) > MOST_JSON:
            raise UserError(f"{folder / file} has {size:,} bytes, should have at most {MOST_JSON:,}")
    return files


def is_chat(tokenizer: Tokenizer, hf: dict, generation: dict) -> bool:
    """
    MiMo's chat models stop at <|im_end|>, the base model at <|endoftext|>. Where one token is both (DeepSeek), a chat
    template makes a chat model. hf, generation: contents of config.json and generation_config.json.
    """
    if tokenizer.im_end_id == tokenizer.eos_id:
        return tokenizer.chat_template is not None
    ends = [e for c in (hf, generation) for e in ([c.get("eos_token_id")] if not isinstance(c.get("eos_token_id"), list)
                                                  else c["eos_token_id"])]
    return tokenizer.im_end_id in ends


# ---- export ---------------------------------------------------------------------------------------------------------

def hub_config(shape: ModelConfig, tokenizer: Tokenizer, flavour: str, chat: bool, dtype: torch.dtype,
               original: dict | None) -> dict:
    """
    The contents of config.json, with the keys that old and new engines read: rope_theta and torch_dtype are spelled
    out, because an engine that does not know transformers 5's rope_parameters would use a RoPE base of 10,000 without a
    warning. original: the config.json of an import, whose other keys are kept if it is of the same kind.
    """
    mimo, llama = flavour == "mimo", flavour == "llama"
    base = int(shape.rope_base) if float(shape.rope_base).is_integer() else shape.rope_base
    if original and (original.get("model_type") == "llama") != llama:
        original = None
    own = {"mlp_bias": False} if llama else {
        "max_window_layers": shape.n_layer, "sliding_window": shape.max_seq_len, "use_mrope": False,
        "use_sliding_window": False}
    config = own | {
        "attention_bias": shape.qkv_bias, "attention_dropout": 0.0, "bos_token_id": bos_of(tokenizer),
        "eos_token_id": tokenizer.im_end_id if chat else tokenizer.eos_id, "hidden_act": "silu",
        "initializer_range": 0.02, "transformers_version": "4.40.1", "use_cache": True} | (original or {}) | {
        "model_type": flavour, "architectures": [FAMILIES[flavour]],
        "head_dim": shape.head_dim, "hidden_size": shape.d_model, "intermediate_size": shape.d_ff,
        "max_position_embeddings": shape.max_seq_len, "num_attention_heads": shape.n_head,
        "num_hidden_layers": shape.n_layer, "num_key_value_heads": shape.n_kv_head, "rms_norm_eps": shape.rms_eps,
        "rope_theta": base, "tie_word_embeddings": shape.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."), "vocab_size": shape.vocab_size,
        "auto_map": AUTO_MAP, "num_nextn_predict_layers": min(shape.n_mtp, 1)}
    for key in ("rope_parameters", "rope_scaling", "dtype", "layer_types", *(() if mimo else
                ("auto_map", "num_nextn_predict_layers"))):
        config.pop(key, None)
    return dict(sorted(config.items()))


def bos_of(tokenizer: Tokenizer) -> int:
    """The id of bos_token; Qwen2 has none and names <|endoftext|> there."""
    return tokenizer.added.get(tokenizer.names["bos_token"], (tokenizer.eos_id, True))[0]


def generation_config(tokenizer: Tokenizer, chat: bool) -> dict:
    """
    The contents of generation_config.json: the sampling of the report's evaluation (temperature 0.6, top-p 0.95). Chat
    models stop at both end tokens.
    """
    ends = list(dict.fromkeys((tokenizer.im_end_id, tokenizer.eos_id))) if chat else tokenizer.eos_id
    return {"bos_token_id": bos_of(tokenizer), "eos_token_id": ends, "pad_token_id": tokenizer.eos_id,
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


def flavoured(shape: ModelConfig, flavour: str, odd_heads: bool, where: Path) -> ModelConfig:
    """
    The shape that a flavour's code has: MiMo and Qwen2 always with biases, MiMo with a head of its own, since folding
    needs one. UserError for what the engines cannot run.
    """
    if flavour == "llama" and shape.qkv_bias:
        raise UserError(f"{where} has biases on q, k and v, Llama has none: --flavour=qwen2 or mimo")
    if flavour != "llama" and shape.head_dim * shape.n_head != shape.d_model and not odd_heads:
        raise UserError(f"{where}: head_dim = {shape.head_dim} is not d_model / n_head = {shape.d_model}/{shape.n_head}"
                        ": as a Qwen2, vLLM loads this and answers nonsense; --odd_heads exports it for transformers "
                        "and SGLang, which are right")
    return replace(shape, qkv_bias=flavour != "llama", tie_embeddings=shape.tie_embeddings and flavour != "mimo")


def completed(have: Sources, shape: ModelConfig, stored: torch.dtype, folder: Path) -> Sources:
    """have with what a flavour's shape wants beside it: biases of 0, in a file in folder, and the embedding as head."""
    want = expected(shape)
    zeros = {n: torch.zeros(size, dtype=stored) for n, size in want.items() if n not in have and n.endswith("bias")}
    return {"lm_head.weight": have["model.embed_tokens.weight"]} | have | store(zeros, folder)


def widened(have: Sources, shape: ModelConfig, m: int, folder: Path) -> tuple[Sources, ModelConfig]:
    """
    have and shape of the same function, with heads and hidden states m times as wide, in a file in folder; for small
    models, which engines refuse whose attention starts at a width of 32. The new channels hold zeros.

    RoPE turns channel i of a head by base^(-2i/d): it moves to m i, where the wide head has that angle. A norm over m D
    channels of which D are filled comes out sqrt(m) too large: gains are divided by it, eps by m. Scores are divided by
    sqrt(m d): q is multiplied by sqrt(m).
    """
    D, d, tensors = shape.d_model, shape.head_dim, {}
    half = m * torch.arange(d // 2)
    place = torch.cat([half, half + m * d // 2])                                # [d], of each channel in a wide head

    def behind(t: Tensor, fill: float = 0.0) -> Tensor:                         # [D,...] -> [mD,...]
        return torch.cat([t, torch.full_like(t, fill).repeat_interleave(m - 1, 0)])

    def spread(t: Tensor) -> Tensor:                                            # [heads d,...] -> [heads m d,...]
        heads = t.unflatten(0, (-1, d))
        wide = heads.new_zeros(len(heads), m * d, *heads.shape[2:])
        wide[:, place] = heads
        return wide.flatten(0, 1)

    for name, (path, stored) in have.items():
        with opened(path) as f:
            t, part = f.get_tensor(stored), name.split(".")[-2]
        if "norm" in part:
            t = behind(t, 1.0) / m ** 0.5
        elif part in ("q_proj", "k_proj", "v_proj"):
            t = spread(t if t.ndim == 1 else behind(t.T).T) * (m ** 0.5 if part == "q_proj" else 1)
        elif part == "o_proj":
            t = behind(spread(t.T).T)
        elif part == "input_proj":
            t = behind(torch.cat([behind(side) for side in t.T.split(D)]).T)
        else:                                                                   # down writes states, the others read
            t = behind(t) if part == "down_proj" else behind(t.T).T
        tensors[name] = t.contiguous()
    shape = replace(shape, d_model=m * D, head_dim=m * d, rms_eps=shape.rms_eps / m)
    return store(tensors, folder, "wide.safetensors"), shape


def export_folder(source: str | Path, out: str | Path, flavour: str, mtps: str | Path | None = None,
                  dtype: torch.dtype | None = None, fold: str = "auto", shard_bytes: float = 5e9,
                  odd_heads: bool = False, widen: int = 1) -> tuple[Path, int, int, bool]:
    """
    A checkpoint, or the newest one of a run's folder -> a Hugging Face folder. flavour "mimo" has one MTP layer (SGLang
    would load a second one over the first); more go to the folder mtps, as in MiMo-7B-MTPs. "qwen2" and "llama" have
    none. dtype: None = as stored. fold: "auto", "yes" or "no". odd_heads: also where d_model is not n_head head_dim.
    widen: as in widened(), 1 = no. -> (checkpoint folder, tensors, bytes, whether the gain was folded).
    """
    ckpt, out = checkpoint.find(source), Path(out)
    shape, meta = from_dict(ModelConfig, checkpoint.read_shape(ckpt), f"{ckpt}/model.json"), checkpoint.read_meta(ckpt)
    have = {hub_name(n): (p, n) for n, p in checkpoint.weight_files(ckpt).items()}
    check_tensors(have, expected(shape), ckpt)
    shape = flavoured(shape, flavour, odd_heads, ckpt)
    tokenizer, chat = Tokenizer.load(ckpt), meta.get("chat", True)
    original = read_json(ckpt / CONFIG) if (ckpt / CONFIG).is_file() else None
    untrained_import = original is not None and meta.get("stage") == "import"
    folded = flavour == "mimo" and (fold == "yes" or fold == "auto" and not untrained_import)
    with opened(have["model.embed_tokens.weight"][0]) as f:
        stored = DTYPES[f.get_slice("embed_tokens.weight").get_dtype()]
    note = {"source": str(ckpt), "flavour": flavour, "folded": folded}

    mtp_layer = lambda name: int(name.split(".")[2]) if name.startswith("model.mtp_layers.") else -1    # -1: the trunk
    if mtps and shape.n_mtp < 2:
        raise UserError(f"{ckpt} has {shape.n_mtp} MTP layer(s), there is no second one to write to {mtps}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".made_") as made:
        have = completed(have, shape, stored, Path(made))
        if widen > 1:
            have, shape = widened(have, shape, widen, Path(made))
        if shape.head_dim < 32:
            print(f"note: head_dim = {shape.head_dim}: transformers and llama.cpp run this, vLLM's attention starts at "
                  f"32; --widen={-(-32 // shape.head_dim)} pads with zeros", file=sys.stderr)
        change = folding(*have["model.norm.weight"]) if folded else lambda name, t: t
        config = hub_config(shape, tokenizer, flavour, chat, dtype or stored, original)
        main = {n: have[n] for n in expected(shape) if mtp_layer(n) < (1 if flavour == "mimo" else 0)}
        rest = {n: have[n] for n in expected(shape) if mtp_layer(n) >= 1}
        check_space(out.parent, main | (rest if mtps else {}), dtype)
        temporary = open_target(out)
        try:
            n_bytes = write_shards(temporary, main, shard_bytes, dtype, change)
            write_json(temporary / "config.json", config)
            write_json(temporary / GENERATION, generation_config(tokenizer, chat))
            code = sorted((HERE / "hf_export").glob("*.py")) if flavour == "mimo" else []
            # an import's own generation_config.json replaces ours
            for path in (*code, *(ckpt / file for file in copied_files(ckpt))):
                shutil.copyfile(path, temporary / path.name)
            tidy_tokenizer(temporary / "tokenizer_config.json",
                           {} if untrained_import else {"model_max_length": shape.max_seq_len})
            close_target(temporary, out, note)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if mtps:                              # the layout of MiMo-7B-MTPs: these tensors and a configuration
            temporary = open_target(Path(mtps))
            write_shards(temporary, rest, shard_bytes, dtype, change)
            more = {"architectures": ["MiMoMTPModel"], "num_nextn_predict_layers": shape.n_mtp}
            write_json(temporary / "config.json", config | more)
            close_target(temporary, Path(mtps), note)
        elif rest and flavour == "mimo":
            print(f"note: MTP layers 2 to {shape.n_mtp} are left out; --mtps=FOLDER writes them", file=sys.stderr)
    return ckpt, len(main), n_bytes, folded


def tidy_tokenizer(path: Path, changes: dict) -> None:
    """tokenizer_config.json with these changes, and without what would name code of others to be run."""
    if path.is_file():
        config = read_json(path)
        if changes or set(CODE) & set(config):
            write_json(path, {k: v for k, v in config.items() if k not in CODE} | changes)


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
