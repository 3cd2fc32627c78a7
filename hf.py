"""
Weights in and out: Hugging Face folders <-> our checkpoints (report 2.2; MiMo-7B Base, SFT, RL, RL-0530).

    python hf.py import MiMo-7B-RL out/mimo_7b                       # 451 tensors, 7,833,409,536 parameters
    python hf.py import MiMo-7B-Base out/base --mtps=MiMo-7B-MTPs    # with MTP layers 2 and 3: 483 tensors
    python hf.py export out/tiny/rl out/hf --flavour=mimo            # MiMoForCausalLM, one MTP layer
    python hf.py export out/tiny/rl out/hf --flavour=qwen2           # Qwen2ForCausalLM, loads anywhere

Both directions stream: one output shard in memory at a time. Every tensor of the source is used exactly once,
or the run ends naming the first that is missing, left over, double or of another shape. Stored dtypes are
kept (the official ones: bf16) unless --dtype says otherwise; import -> export -> import keeps every bit.

The trap: MiMo's MTP layer reads the trunk state BEFORE the final norm (vLLM does so), SGLang hands it the
state AFTER. The two agree only if the final norm has no gain, so exporting our own models folds the gain
gamma away, which changes no logit:

    lm_head[:, j] *= gamma_j       model.norm = 1       mtp_layers.k.final_layernorm /= gamma

An import nobody trained on is exported as it came (--fold=yes folds it too). More in docs/weights.md.
"""
import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoint
import mtp
from checkpoint import opened, read_json, write_json
from configurator import UserError, from_dict, one_line
from model import ModelConfig
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
# what belongs to a tokenizer; copied as it is, so that an import can be exported with the very same files
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json",
                   "special_tokens_map.json", "chat_template.jinja")
CONFIG, GENERATION = "hf_config.json", "generation_config.json"   # an import keeps the originals so
AUTO_MAP = {"AutoConfig": "configuration_mimo.MiMoConfig", "AutoModel": "modeling_mimo.MiMoModel",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}      # safetensors' names
MARK = "export.json"          # says that a folder was made by this script and may be replaced by it


# ---- names and shapes --------------------------------------------------------------------------------------

def hub_name(name):
    """
    layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj.weight; only the head is not inside "model.".
    """
    return name if name.startswith("lm_head.") else "model." + name


def expected(cfg):
    """
    Hub name -> shape of every tensor, nothing allocated. MiMo-7B with one MTP layer: 435 + 16 = 451 entries.
    """
    return {hub_name(name): list(t.shape) for name, t in mtp.build(cfg, "meta").state_dict().items()}


def tensors_in(folder):
    """
    Hub name -> file, from what the files hold. Ends the run on a tensor in two files, on a file that the
    index lists and is not there, and on a safetensors file that the index does not list.
    """
    folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    there = {p.name for p in folder.glob("*.safetensors")}
    listing = read_json(index) if index.is_file() else {"weight_map": {}}
    weight_map = listing.get("weight_map") if isinstance(listing, dict) else None
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: should be an object with weight_map, tensor name -> file")
    listed = set(weight_map.values()) if weight_map else there
    if not listed:
        raise UserError(f"{folder}: no .safetensors file")
    if listed != there:
        odd = sorted(listed ^ there)[0]
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


def check_tensors(have, want, where):
    """
    have: hub name -> (file, name in the file); want: hub name -> shape. Each once and in its shape, or the
    run ends.
    """
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


# ---- streaming ---------------------------------------------------------------------------------------------

def bytes_of(sources, dtype):
    """sources: name -> (file, name in it) -> name -> bytes it takes in dtype (None: the stored one)."""
    sizes, readers = {}, {path: opened(path) for path in {p for p, _ in sources.values()}}
    for new, (path, old) in sources.items():
        piece = readers[path].get_slice(old)
        sizes[new] = torch.Size(piece.get_shape()).numel() * (dtype or DTYPES[piece.get_dtype()]).itemsize
    return sizes


def write_shards(folder, sources, limit, dtype=None, change=lambda name, t: t):
    """
    sources: new name -> (file, name in it), in the order of writing; change(new name, tensor) -> tensor
    before it is cast to dtype (None: the stored one). A shard takes `limit` bytes (or one larger tensor) and
    is dropped before the next is read. -> bytes written.
    """
    sizes, shards, room = bytes_of(sources, dtype), [], 0
    for new in sources:
        if sizes[new] > room:
            shards.append([])
            room = limit
        shards[-1].append(new)
        room -= sizes[new]
    weight_map = {}
    for k, names in enumerate(shards, 1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        data = {}                                                     # this shard; the one before is gone
        for path in sorted({sources[new][0] for new in names}):
            with opened(path) as f:
                for new in (n for n in names if sources[n][0] == path):
                    t = f.get_tensor(sources[new][1])
                    data[new] = change(new, t).to(dtype or t.dtype)
        save_file(data, folder / file, metadata={"format": "pt"})     # transformers wants the mark
        del data
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return sum(sizes.values())


def need_space(folder, sources, dtype):
    """Ends the run before a byte is written if the disk cannot take what write_shards would write."""
    folder.mkdir(parents=True, exist_ok=True)
    n_bytes, free = sum(bytes_of(sources, dtype).values()), shutil.disk_usage(folder).free
    if free < n_bytes + 50_000_000:
        raise UserError(f"{folder}: {n_bytes / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free")


# ---- import ------------------------------------------------------------------------------------------------

def model_config(hf, path):
    """
    Hugging Face's config.json (Qwen2 or MiMo) -> ModelConfig. No key has a default: Qwen2Config's own (eps
    1e-6, vocabulary 151,936) are not MiMo's, so a missing key must not be guessed. Ends the run naming key
    and value.
    """
    def get(key, *kinds):
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
    heads, width = get("num_attention_heads", int), get("hidden_size", int)
    fields = dict(
        vocab_size=get("vocab_size", int), n_layer=get("num_hidden_layers", int), d_model=width, n_head=heads,
        n_kv_head=get("num_key_value_heads", int), head_dim=hf.get("head_dim") or width // heads,
        d_ff=get("intermediate_size", int), rms_eps=get("rms_norm_eps", float),
        rope_base=float(get("rope_theta", int, float)), max_seq_len=get("max_position_embeddings", int),
        n_mtp=hf.get("num_nextn_predict_layers", 0))
    try:
        return ModelConfig(**fields)
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: {e}") from None


def extra_layers(folder, files, cfg):
    """MiMo-7B-MTPs: a folder with model.mtp_layers.1.* and .2.* only. -> (all files, cfg with 3 layers)."""
    extra = tensors_in(folder)
    double = sorted(set(extra) & set(files))
    if double:
        raise UserError(f"{folder}: tensor {double[0]} is in the main model already")
    layers = [int(n.split(".")[2]) for n in extra if re.match(r"model\.mtp_layers\.\d+\.", n)]
    if not layers:
        raise UserError(f"{folder}: no tensor of an MTP layer (model.mtp_layers.1.* ...)")
    return files | extra, ModelConfig(**{**vars(cfg), "n_mtp": max(layers) + 1})


def import_folder(source, run, mtps=None, dtype=None, shard_bytes=5e9, chat="auto"):
    """
    A Hugging Face folder -> RUN/step_00000000 and RUN/latest, as pretrain.py, sft.py, rl.py, sample.py and
    eval.py read them. Nothing is left behind on an error. -> (ModelConfig, tensors, bytes).
    """
    source, run = Path(source), Path(run)
    if not (source / "config.json").is_file():
        raise UserError(f"{source / 'config.json'} is missing: {source} is not a Hugging Face model folder")
    if checkpoint.steps_in(run):
        raise UserError(f"{run} holds {checkpoint.steps_in(run)[0].name} already: give another folder, or remove it")
    hf = read_json(source / "config.json")
    if not isinstance(hf, dict):
        raise UserError(f"{source / 'config.json'} should be a JSON object, is a {type(hf).__name__}")
    cfg, files = model_config(hf, source / "config.json"), tensors_in(source)
    if mtps:
        files, cfg = extra_layers(mtps, files, cfg)
    want = expected(cfg)
    have = {name: (path, name) for name, path in files.items()}
    check_tensors(have, want, source)
    try:
        tokenizer = Tokenizer.load(source)
    except (ValueError, OSError) as e:
        raise UserError(f"tokenizer: {e}") from None
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f"{source}: the tokenizer has {tokenizer.vocab_size:,} ids, vocab_size = {cfg.vocab_size:,}")
    need_space(run, have, dtype)
    temporary = run / ".writing_00000000"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        ours = {name.removeprefix("model."): have[name] for name in want}
        n_bytes = write_shards(temporary, ours, shard_bytes, dtype)
        write_json(temporary / "model.json", vars(cfg))
        write_json(temporary / CONFIG, hf)
        write_json(temporary / "config.json", {"imported": str(source), "mtps": str(mtps) if mtps else None})
        for file in (*TOKENIZER_FILES, GENERATION):
            if (source / file).is_file():
                shutil.copyfile(source / file, temporary / file)
        # MiMo's chat models stop at <|im_end|>, the base model at <|endoftext|>
        ends = hf.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        is_chat = tokenizer.im_end_id in ends if chat == "auto" else chat == "yes"
        checkpoint.commit(run, 0, temporary, {"stage": "import", "chat": is_chat}, keep=1, world=1,
                          files=checkpoint.fingerprints(temporary, 0, 1))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return cfg, len(want), n_bytes


# ---- export ------------------------------------------------------------------------------------------------

def hub_config(cfg, tokenizer, flavour, chat, dtype, original):
    """
    config.json in the keys that engines of 2024 and of today read: rope_theta and torch_dtype are spelled
    out, since an engine that does not know transformers 5's rope_parameters falls back to a RoPE base of
    10,000 in silence. original: the config.json of the import, whose other keys are kept.
    """
    mimo = flavour == "mimo"
    base = int(cfg.rope_base) if float(cfg.rope_base).is_integer() else cfg.rope_base
    config = {
        "architectures": ["MiMoForCausalLM" if mimo else "Qwen2ForCausalLM"],
        "attention_bias": True, "attention_dropout": 0.0, "bos_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.im_end_id if chat else tokenizer.eos_id, "hidden_act": "silu",
        "initializer_range": 0.02, "max_window_layers": cfg.n_layer, "sliding_window": cfg.max_seq_len,
        "tie_word_embeddings": False, "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
        "use_sliding_window": False} | (original or {}) | {
        "model_type": flavour, "architectures": ["MiMoForCausalLM" if mimo else "Qwen2ForCausalLM"],
        "head_dim": cfg.head_dim, "hidden_size": cfg.d_model, "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_seq_len, "num_attention_heads": cfg.n_head,
        "num_hidden_layers": cfg.n_layer, "num_key_value_heads": cfg.n_kv_head, "rms_norm_eps": cfg.rms_eps,
        "rope_theta": base, "torch_dtype": str(dtype).removeprefix("torch."), "vocab_size": cfg.vocab_size,
        "auto_map": AUTO_MAP, "num_nextn_predict_layers": min(cfg.n_mtp, 1)}
    for key in ("rope_parameters", "rope_scaling", "dtype", "layer_types", *(() if mimo else
                ("auto_map", "num_nextn_predict_layers"))):
        config.pop(key, None)
    return dict(sorted(config.items()))


def generation_config(tokenizer, chat):
    """Sampling of the report's evaluation (T 0.6, top-p 0.95); chat models stop at both end tokens."""
    ends = [tokenizer.im_end_id, tokenizer.eos_id] if chat else tokenizer.eos_id
    return {"bos_token_id": tokenizer.eos_id, "eos_token_id": ends, "pad_token_id": tokenizer.eos_id,
            "do_sample": True, "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.40.1"}


def folding(path, name):
    """
    -> change(name, tensor) that moves the final norm's gain into head and MTP norms, exact up to rounding.
    """
    with opened(path) as f:
        gamma = f.get_tensor(name).float()                                   # [D]
    if not (gamma.isfinite() & (gamma.abs() > 1e-6)).all():
        raise UserError(f"{path}: {name} has a gain of {gamma.abs().min():g}, nothing can be divided by it; --fold=no")

    def change(name, t):
        if name == "lm_head.weight":                                         # lm_head[:, j] *= gamma_j
            return t.float() * gamma                                         # [V,D] * [D]
        if name == "model.norm.weight":                                      # model.norm = 1
            return torch.ones_like(t)
        if name.endswith(".final_layernorm.weight"):                         # final_layernorm /= gamma
            return t.float() / gamma
        return t
    return change


def open_target(folder):
    """A fresh folder beside `folder`; ends the run if `folder` holds something this script did not write."""
    folder = Path(folder)
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and was not made by hf.py export: give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def close_target(temporary, folder, note):
    """The mark, then the rename: the folder is the old export or the whole new one."""
    write_json(temporary / MARK, note | {"commit": checkpoint.git_commit()})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def export_folder(source, target, flavour, mtps=None, dtype=None, fold="auto", shard_bytes=5e9):
    """
    A checkpoint, or the newest of a run -> a Hugging Face folder. flavour "mimo": one MTP layer (SGLang would
    load a second one over the first), the others go to the folder `mtps` as MiMo-7B-MTPs has them; "qwen2":
    none. -> (checkpoint folder, tensors, bytes, folded).
    """
    ckpt, target = checkpoint.find(source), Path(target)
    cfg, meta = from_dict(ModelConfig, checkpoint.read_shape(ckpt), f"{ckpt}/model.json"), checkpoint.read_meta(ckpt)
    have = {hub_name(n): (p, n) for n, p in checkpoint.weight_files(ckpt).items()}
    want = expected(cfg)
    check_tensors(have, want, ckpt)
    tokenizer, chat = Tokenizer.load(ckpt), meta.get("chat", True)
    original = read_json(ckpt / CONFIG) if (ckpt / CONFIG).is_file() else None
    untouched = original is not None and meta.get("stage") == "import"
    folded = flavour == "mimo" and (fold == "yes" or fold == "auto" and not untouched)
    change = folding(*have["model.norm.weight"]) if folded else lambda name, t: t
    with opened(have["lm_head.weight"][0]) as f:
        stored = DTYPES[f.get_slice("lm_head.weight").get_dtype()]
    note = {"source": str(ckpt), "flavour": flavour, "folded": folded}

    layer = lambda name: int(name.split(".")[2]) if name.startswith("model.mtp_layers.") else -1
    main = {n: have[n] for n in want if layer(n) < (1 if flavour == "mimo" else 0)}
    rest = {n: have[n] for n in want if layer(n) >= 1}
    if mtps and not rest:
        raise UserError(f"{ckpt} has {cfg.n_mtp} MTP layer(s), there is no second one to write to {mtps}")
    config = hub_config(cfg, tokenizer, flavour, chat, dtype or stored, original)
    need_space(target.parent, main | (rest if mtps else {}), dtype)
    temporary = open_target(target)
    try:
        n_bytes = write_shards(temporary, main, shard_bytes, dtype, change)
        write_json(temporary / "config.json", config)
        write_json(temporary / GENERATION, generation_config(tokenizer, chat))
        ours = sorted((HERE / "hf_export").glob("*.py")) if flavour == "mimo" else []
        # an import's own generation_config.json wins over ours
        for path in (*ours, *(ckpt / f for f in (*TOKENIZER_FILES, GENERATION) if (ckpt / f).is_file())):
            shutil.copyfile(path, temporary / path.name)
        close_target(temporary, target, note)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if mtps:                                  # the layout of MiMo-7B-MTPs: these tensors and a configuration
        temporary = open_target(mtps)
        write_shards(temporary, rest, shard_bytes, dtype, change)
        more = {"architectures": ["MiMoMTPModel"], "num_nextn_predict_layers": cfg.n_mtp}
        write_json(temporary / "config.json", config | more)
        close_target(temporary, Path(mtps), note)
    elif rest and flavour == "mimo":
        print(f"note: MTP layers 1..{cfg.n_mtp - 1} are left out; --mtps=FOLDER writes them", file=sys.stderr)
    return ckpt, len(main), n_bytes, folded


# ---- command line ------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(prog="hf.py", description="Hugging Face folders <-> our checkpoints")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, names in (("import", ("DIR", "RUN")), ("export", ("CKPT", "DIR"))):
        p = verbs.add_parser(verb)
        for n, name in zip(("source", "target"), names, strict=True):
            p.add_argument(n, metavar=name)
        p.add_argument("--mtps", help="folder with MTP layers 2 and 3 (MiMo-7B-MTPs)")
        p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: as stored")
        p.add_argument("--shard_gb", type=float, default=5.0, help="GB per file, and the peak of memory")
        if verb == "import":
            p.add_argument("--chat", choices=["auto", "yes", "no"], default="auto",
                           help="is it a chat model? auto: if its eos token is <|im_end|>")
        else:
            p.add_argument("--flavour", choices=["mimo", "qwen2"], required=True)
            p.add_argument("--fold", choices=["auto", "yes", "no"], default="auto",
                           help="the final norm's gain; auto: yes, but for an import nobody trained on")
    a = parser.parse_args(argv)
    dtype = getattr(torch, a.dtype) if a.dtype else None
    if a.verb == "import":
        cfg, n, size = import_folder(a.source, a.target, a.mtps, dtype, a.shard_gb * 1e9, a.chat)
        print(f"{a.source} -> {a.target}: {n} tensors, {cfg.n_params():,} parameters, {size / 1e9:.2f} GB, "
              f"{cfg.n_mtp} MTP layer(s), RoPE base {cfg.rope_base:,.0f}, context {cfg.max_seq_len:,}")
    else:
        ckpt, n, size, folded = export_folder(a.source, a.target, a.flavour, a.mtps, dtype, a.fold,
                                              a.shard_gb * 1e9)
        print(f"{ckpt} -> {a.target}: {n} tensors, {size / 1e9:.2f} GB, flavour {a.flavour}, "
              f"final norm {'folded into the head' if folded else 'as it was'}")


if __name__ == "__main__":
    with one_line():
        main()
