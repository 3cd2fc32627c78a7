"""hf.py without transformers: the 7B's names, round trips to the bit, streaming, folding, and what ends the run."""
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import load_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import configurator
import hf
import mtp
from checkpoint import find, latest, read_meta, save
from configurator import UserError
from model import ModelConfig
from tokenizer import Tokenizer

TINY = dict(vocab_size=1024, d_model=16, n_head=4, n_kv_head=2, head_dim=4, d_ff=24, rope_base=640_000.0,
            max_seq_len=32_768)
SMALL = ModelConfig(n_layer=2, n_mtp=1, **TINY)


def rough_model(cfg, seed=0):
    """Large random weights and uneven norm gains, so that a wrong fold or a swapped tensor shows."""
    model, g = mtp.build(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = name.endswith("norm.weight")
            p.copy_((1 if norm else 0) + 0.2 * torch.randn(p.shape, generator=g))
    return model.eval()


def official(folder, cfg=SMALL, shards=3, dtype=torch.bfloat16, **changes):
    """A folder as Xiaomi publishes them: sharded bf16 weights with an index, config.json in the old keys, tokenizer."""
    folder.mkdir(parents=True)
    state = {hf.hub_name(n): t.to(dtype) for n, t in rough_model(cfg).state_dict().items()}
    names = sorted(state)
    parts = [names[k::shards] for k in range(shards)]
    weight_map = {}
    for k, part in enumerate(parts, 1):
        file = f"model-{k:05d}-of-{shards:05d}.safetensors"
        save_file({n: state[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tok = Tokenizer.load("tiny")
    tok.save(folder)
    config = {"architectures": ["MiMoForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
              "auto_map": hf.AUTO_MAP, "bos_token_id": tok.eos_id, "eos_token_id": tok.im_end_id,
              "hidden_act": "silu", "hidden_size": cfg.d_model,
              "initializer_range": 0.02, "intermediate_size": cfg.d_ff,
              "max_position_embeddings": cfg.max_seq_len, "max_window_layers": 36, "model_type": "mimo",
              "num_attention_heads": cfg.n_head, "num_hidden_layers": cfg.n_layer, "head_dim": cfg.head_dim,
              "num_key_value_heads": cfg.n_kv_head, "num_nextn_predict_layers": cfg.n_mtp,
              "rms_norm_eps": 1e-05, "rope_theta": 640000, "sliding_window": 32768, "use_cache": True,
              "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
              "use_mrope": False, "use_sliding_window": False, "vocab_size": cfg.vocab_size} | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "made_by": "the publisher"}')
    return state


def weights_of(folder):
    """All tensors of a folder, from all its files."""
    out = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        out |= load_file(file)
    return out


def same_bits(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ---- names ----------------------------------------------------------------------------------------------------------

def test_the_names_and_shapes_of_mimo_7b():
    """
    Against a list written out by hand from the published checkpoint: 435 trunk + 16 MTP tensors. By hand, one layer:
    4096*4096*2 + 2*1024*4096 + 4096+1024+1024 (attention) + 3*4096*11008 (MLP) + 2*4096 (norms) = 177,223,680.
    """
    D, F, V, KV = 4096, 11_008, 151_680, 1024
    block = {"input_layernorm.weight": [D], "post_attention_layernorm.weight": [D],
             "self_attn.q_proj.weight": [D, D], "self_attn.q_proj.bias": [D],
             "self_attn.k_proj.weight": [KV, D],
             "self_attn.k_proj.bias": [KV], "self_attn.v_proj.weight": [KV, D], "self_attn.v_proj.bias": [KV],
             "self_attn.o_proj.weight": [D, D], "mlp.gate_proj.weight": [F, D], "mlp.up_proj.weight": [F, D],
             "mlp.down_proj.weight": [D, F]}
    extra = {"token_layernorm.weight": [D], "hidden_layernorm.weight": [D], "final_layernorm.weight": [D],
             "input_proj.weight": [D, 2 * D]}
    want = {"model.embed_tokens.weight": [V, D], "model.norm.weight": [D], "lm_head.weight": [V, D]}
    want |= {f"model.layers.{i}.{n}": s for i in range(36) for n, s in block.items()}
    trunk = dict(want)
    want |= {f"model.mtp_layers.0.{n}": s for n, s in (block | extra).items()}
    assert hf.expected(ModelConfig.mimo_7b(n_mtp=1)) == want and len(want) == 451 and len(trunk) == 435
    assert hf.expected(ModelConfig.mimo_7b(n_mtp=0)) == trunk
    count = lambda shapes: sum(math.prod(s) for s in shapes.values())
    assert (count(trunk), count(want)) == (7_622_619_136, 7_833_409_536)
    three = hf.expected(ModelConfig.mimo_7b(n_mtp=3))
    assert len(three) == 483 and count(three) == 8_254_990_336


def test_451_tensors_there_and_back_and_there(tmp_path):
    """All 36 layers at width 16: import -> export -> import keeps every bit, the config and the tokenizer's files."""
    state = official(tmp_path / "hub", ModelConfig(n_layer=36, n_mtp=1, **TINY), shards=4)
    cfg, n, n_bytes = hf.import_folder(tmp_path / "hub", tmp_path / "run", shard_bytes=60_000)
    assert n == len(state) == 451 and n_bytes == sum(t.nbytes for t in state.values())
    assert cfg == ModelConfig(n_layer=36, n_mtp=1, **TINY)
    hf.export_folder(tmp_path / "run", tmp_path / "again", "mimo", shard_bytes=50_000)
    same_bits(state, weights_of(tmp_path / "again"))
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hub", "again"))
    assert before == after
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", hf.GENERATION):
        assert (tmp_path / "hub" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert (tmp_path / "again" / "modeling_mimo.py").is_file()
    hf.import_folder(tmp_path / "again", tmp_path / "run2")
    shape, first, meta = load_model(tmp_path / "run")
    shape2, second, meta2 = load_model(tmp_path / "run2")
    same_bits(first, second)
    assert shape == shape2 == vars(cfg) and meta == meta2 == {"stage": "import", "chat": True}


def test_an_import_is_a_checkpoint(tmp_path):
    """The training scripts read it like their own: newest of the run, whole, right weights, tokenizer inside."""
    from checkpoint import read_weights
    state = official(tmp_path / "hub")
    hf.import_folder(tmp_path / "hub", tmp_path / "run")
    ckpt = latest(tmp_path / "run")
    assert ckpt == tmp_path / "run" / "step_00000000" == find(tmp_path / "run")
    model = mtp.build(SMALL)
    read_weights(ckpt, model)
    for name, p in model.named_parameters():
        assert torch.equal(p, state[hf.hub_name(name)].float()), name
    assert Tokenizer.load(ckpt).ranks == Tokenizer.load("tiny").ranks
    with pytest.raises(UserError, match="a Hugging Face folder: `python hf.py import .*hub OUT` makes one"):
        find(tmp_path / "hub")
    with pytest.raises(UserError, match="holds step_00000000 already"):
        hf.import_folder(tmp_path / "hub", tmp_path / "run")


@pytest.mark.parametrize("eos, chat", [("im_end_id", True), ("eos_id", False)])
def test_base_and_chat_models_are_told_apart_by_their_end_token(tmp_path, eos, chat):
    official(tmp_path / "hub", eos_token_id=getattr(Tokenizer.load("tiny"), eos))
    hf.import_folder(tmp_path / "hub", tmp_path / "run")
    assert read_meta(find(tmp_path / "run"))["chat"] is chat


# ---- streaming ------------------------------------------------------------------------------------------------------

def test_memory_holds_one_shard(tmp_path, monkeypatch):
    """What save_file gets at once never exceeds the limit, or is one single larger tensor (embedding, lm_head)."""
    official(tmp_path / "hub")
    seen, real = [], hf.save_file

    def counted(data, *args, **more):
        seen.append([t.nbytes for t in data.values()])
        real(data, *args, **more)
    monkeypatch.setattr(hf, "save_file", counted)
    hf.import_folder(tmp_path / "hub", tmp_path / "run", shard_bytes=10_000)
    assert len(seen) > 2 and all(sum(sizes) <= 10_000 or len(sizes) == 1 for sizes in seen)
    assert max(map(sum, seen)) == 1024 * 16 * 2
    index = json.loads((find(tmp_path / "run") / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(sum, seen))
    seen.clear()
    hf.export_folder(tmp_path / "run", tmp_path / "out", "qwen2", dtype=torch.float32, shard_bytes=20_000)
    assert all(sum(sizes) <= 20_000 or len(sizes) == 1 for sizes in seen)    # sizes after the cast


# ---- every tensor exactly once --------------------------------------------------------------------------------------

def rewrite(folder, change):
    """Let `change` edit the tensors of the first shard."""
    file = sorted(folder.glob("model-*.safetensors"))[0]
    data = load_file(file)
    change(data)
    save_file(data, file, metadata={"format": "pt"})
    return file


def drop_from_index(folder, name):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop(name)
    path.write_text(json.dumps(index))


def lose(folder):
    rewrite(folder, lambda d: d.pop("lm_head.weight"))
    drop_from_index(folder, "lm_head.weight")


def index_lies(folder):
    rewrite(folder, lambda d: d.pop("lm_head.weight"))


def add(folder):
    rewrite(folder, lambda d: d.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}))


def double(folder):
    name = sorted(load_file(sorted(folder.glob("*.safetensors"))[1]))[0]
    rewrite(folder, lambda d: d.update({name: torch.ones(16)}))


def reshape(folder):
    rewrite(folder, lambda d: d.update({"lm_head.weight": d["lm_head.weight"][:1000]}))


def quantise(folder):
    rewrite(folder, lambda d: d.update({"lm_head.weight": d["lm_head.weight"].to(torch.int8)}))


def stray(folder):
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")


def missing_file(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_short(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage, message", [
    (lose, r"tensor lm_head.weight is missing \(1 such\)"),
    (index_lies, r"tensor lm_head.weight is not in model-00001-of-00003.safetensors, where"),
    (add, r"tensor model.layers.0.self_attn.q_norm.weight has no place in the model"),
    (double, r"is in both model-00001-of-00003.safetensors and model-00002"),
    (reshape, r"tensor lm_head.weight has shape \[1000, 16\], should be \[1024, 16\]"),
    (quantise, r"tensor lm_head.weight is I8, should be"),
    (stray, r"consolidated.safetensors is not in model.safetensors.index.json"),
    (missing_file, r"model-00002-of-00003.safetensors is missing"),
    (cut_short, r"model-00002-of-00003.safetensors is not a readable safetensors file"),
    (lambda f: (f / "vocab.json").unlink() or (f / "tokenizer.json").unlink(), r"no tokenizer.json"),
    (lambda f: (f / "config.json").unlink(), r"config.json is missing"),
])
def test_the_run_ends_naming_the_tensor(tmp_path, damage, message):
    official(tmp_path / "hub")
    damage(tmp_path / "hub")
    with pytest.raises(UserError, match=message):
        hf.import_folder(tmp_path / "hub", tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))        # nothing half-made is left


@pytest.mark.parametrize("changes, message", [
    ({"rms_norm_eps": None}, "rms_norm_eps = None should be float"),
    ({"rope_theta": None}, "rope_theta = None should be int or float"),
    ({"num_key_value_heads": None}, "num_key_value_heads = None should be int"),
    ({"vocab_size": "1024"}, "vocab_size = '1024' should be int"),
    ({"model_type": "qwen3"}, "model_type = 'qwen3' should be mimo, qwen2, llama: q and k have a norm of their own"),
    ({"model_type": "gpt2"}, "model_type = 'gpt2' should be mimo, qwen2, llama"),
    ({"model_type": ["mimo"]}, "model_type = .'mimo'. should be"),
    ({"model_type": "llama"}, "attention_bias = True should be False"),
    ({"model_type": "llama", "attention_bias": False}, "k_proj.bias has no place in the model"),
    ({"tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight: .* should be False"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is there, should be absent"),
    ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_theta = 640000, but 1000000.0 in"),
    ({"rope_scaling": None, "rope_parameters": [1]}, "rope_parameters = .1. should be an object"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "RoPE scaling .*llama3"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 should be 1.0"),
    ({"num_hidden_layers": 10**7}, "n_layer = 10,000,000 must be at most 1,000"),
    ({"hidden_size": 2**40}, "impossible sizes"),
    ({"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers = '1' should be int"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' should be True or False"),
    ({"head_dim": "4"}, "head_dim = '4' should be int"),
    ({"use_sliding_window": True}, "use_sliding_window = True should be False"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "RoPE scaling .*yarn"),
    ({"num_key_value_heads": 3}, "must be a multiple"),
    ({"num_nextn_predict_layers": 0}, "final_layernorm.weight has no place in the model .16 such"),
])
def test_a_config_that_is_not_mimo_is_refused(tmp_path, changes, message):
    official(tmp_path / "hub", **changes)
    with pytest.raises(UserError, match=message):
        hf.import_folder(tmp_path / "hub", tmp_path / "run")


def test_transformers_5_moves_the_rope_base(tmp_path):
    """rope_parameters instead of rope_theta; read naively the base would fall back to 10,000."""
    rope = {"rope_theta": 640000.0, "rope_type": "default"}
    official(tmp_path / "hub", rope_theta=None, rope_parameters=rope)
    assert hf.import_folder(tmp_path / "hub", tmp_path / "run")[0].rope_base == 640_000.0
    hf.export_folder(tmp_path / "run", tmp_path / "out", "mimo")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 640000 and "rope_parameters" not in config


# ---- layers 2 and 3 -------------------------------------------------------------------------------------------------

def test_mimo_7b_mtps(tmp_path):
    """The extra repository holds mtp_layers.1 and .2 only; import joins, export splits again, bit for bit."""
    three = ModelConfig(n_layer=2, n_mtp=3, **TINY)
    state = {hf.hub_name(n): t.to(torch.bfloat16) for n, t in rough_model(three).state_dict().items()}
    extra = {n: t for n, t in state.items() if n.startswith(("model.mtp_layers.1.", "model.mtp_layers.2."))}
    main = {n: t for n, t in state.items() if n not in extra}
    official(tmp_path / "hub", shards=1)
    (tmp_path / "hub" / "model.safetensors.index.json").unlink()
    (tmp_path / "hub" / "model-00001-of-00001.safetensors").unlink()
    save_file(main, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "mtps").mkdir()
    save_file(extra, tmp_path / "mtps" / "model.safetensors", metadata={"format": "pt"})
    cfg, n, _ = hf.import_folder(tmp_path / "hub", tmp_path / "run", mtps=tmp_path / "mtps")
    assert cfg == three and n == len(state) == 27 + 3 * 16
    hf.export_folder(tmp_path / "run", tmp_path / "out", "mimo", mtps=tmp_path / "out_mtps")
    same_bits(main, weights_of(tmp_path / "out"))
    same_bits(extra, weights_of(tmp_path / "out_mtps"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1          # SGLang would load a second layer over the first
    config = json.loads((tmp_path / "out_mtps" / "config.json").read_text())
    assert (config["architectures"], config["num_nextn_predict_layers"]) == (["MiMoMTPModel"], 3)
    with pytest.raises(UserError, match="is in the main model already"):
        hf.import_folder(tmp_path / "hub", tmp_path / "run3", mtps=tmp_path / "hub")
    save_file({n: t for n, t in extra.items() if ".1." not in n}, tmp_path / "mtps" / "model.safetensors")
    with pytest.raises(UserError, match="mtp_layers.1.final_layernorm.weight is missing .16 such"):
        hf.import_folder(tmp_path / "hub", tmp_path / "run4", mtps=tmp_path / "mtps")


# ---- other families -------------------------------------------------------------------------------------------------

def family(folder, kind, tied, **changes):
    """A folder of Qwen2's or Llama's shape, bf16, one file, no MTP layer. -> its tensors."""
    cfg = replace(SMALL, n_mtp=0, qkv_bias=kind != "llama", tie_embeddings=tied)
    more = {"num_nextn_predict_layers": None, "auto_map": None, "tie_word_embeddings": tied, "model_type": kind,
            "architectures": [hf.FAMILIES[kind]]}
    if kind == "llama":
        more |= {"attention_bias": False, "mlp_bias": False, "use_mrope": None, "max_window_layers": None,
                 "sliding_window": None, "use_sliding_window": None}
    official(folder, cfg, shards=1, **(more | changes))
    (folder / "model.safetensors.index.json").unlink()
    state = {hf.hub_name(n): p.to(torch.bfloat16) for n, p in rough_model(cfg).named_parameters()}
    (folder / "model-00001-of-00001.safetensors").unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return state


@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("qwen2", True), ("llama", False), ("llama", True)])
def test_every_family_there_and_back_and_there(tmp_path, kind, tied):
    """To the bit, the configuration too: tied stays tied, Llama comes out as Llama, no bias appears."""
    state = family(tmp_path / "hub", kind, tied)
    shape, n, _ = hf.import_folder(tmp_path / "hub", tmp_path / "run")
    assert (shape.qkv_bias, shape.tie_embeddings, shape.n_mtp) == (kind == "qwen2", tied, 0)
    assert n == len(state) == 27 - 6 * (kind == "llama") - tied
    assert shape.n_params() == sum(t.numel() for t in state.values())
    hf.export_folder(tmp_path / "run", tmp_path / "again", kind)
    same_bits(state, weights_of(tmp_path / "again"))
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hub", "again"))
    assert before == after
    assert hf.import_folder(tmp_path / "again", tmp_path / "run2")[0] == shape
    same_bits(load_model(tmp_path / "run")[1], load_model(tmp_path / "run2")[1])


@pytest.mark.parametrize("kind, tied", [("qwen2", True), ("llama", True), ("llama", False)])
@torch.no_grad()
def test_every_family_as_mimo(tmp_path, kind, tied):
    """Zero biases and a head of its own make no other logit; qwen2 of a Llama keeps the tie."""
    family(tmp_path / "hub", kind, tied)
    shape, _, _ = hf.import_folder(tmp_path / "hub", tmp_path / "run", dtype=torch.float32, fresh=1)
    model, x = mtp.build(shape), torch.arange(30)[None]
    hf.checkpoint.read_weights(find(tmp_path / "run"), model)
    for fold in ("no", "yes"):
        hf.export_folder(tmp_path / "run", tmp_path / fold, "mimo", fold=fold)
        cfg = hf.import_folder(tmp_path / fold, tmp_path / f"run_{fold}")[0]
        assert cfg == replace(shape, qkv_bias=True, tie_embeddings=False)
        other = load_into(tmp_path / fold, cfg)
        difference = (model.logits(model(x)) - other.logits(other(x))).abs().max()
        assert difference == 0 if fold == "no" else difference < 1e-4
    hf.export_folder(tmp_path / "run", tmp_path / "q", "qwen2")
    cfg = hf.import_folder(tmp_path / "q", tmp_path / "run_q")[0]
    assert cfg == replace(shape, qkv_bias=True, n_mtp=0)
    assert not list(tmp_path.glob(".made*")) and not list(tmp_path.glob("*/.made*"))


def test_what_older_folders_hold_beside_the_model(tmp_path):
    """RoPE's frequencies and a second copy of a tied embedding are no part of the model; a pipe is no file."""
    state = family(tmp_path / "hub", "llama", True)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
            "lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file(state | more, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    hf.import_folder(tmp_path / "hub", tmp_path / "run")
    same_bits({hf.hub_name(n): t for n, t in load_model(tmp_path / "run")[1].items()}, state)
    (tmp_path / "hub" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "hub" / "model.safetensors")
    with pytest.raises(UserError, match="is missing, or not a file"):
        hf.import_folder(tmp_path / "hub", tmp_path / "run2")
    (tmp_path / "hub" / "model.safetensors").rename(tmp_path / "hub" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is not read: .*save_pretrained"):
        hf.import_folder(tmp_path / "hub", tmp_path / "run2")
    with pytest.raises(UserError, match="huggingface-cli download Qwen/Qwen2.5-0.5B"):
        hf.import_folder("Qwen/Qwen2.5-0.5B", tmp_path / "run2")


def test_what_does_not_belong_to_a_folder_stays_out(tmp_path):
    """No private file through a link, no code of others through auto_map, no file outside through the index."""
    (tmp_path / "secret").write_text("s")
    official(tmp_path / "hub")
    (tmp_path / "hub" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="chat_template.jinja is a link to .*secret, should lie in the folder"):
        hf.import_folder(tmp_path / "hub", tmp_path / "run")
    (tmp_path / "hub" / "chat_template.jinja").unlink()
    cache = tmp_path / "models--x--y"                          # the Hugging Face cache: snapshots/COMMIT and blobs
    (cache / "blobs").mkdir(parents=True)
    shutil.copytree(tmp_path / "hub", cache / "snapshots" / "1")
    (cache / "snapshots" / "1" / "vocab.json").rename(cache / "blobs" / "abc")
    (cache / "snapshots" / "1" / "vocab.json").symlink_to("../../blobs/abc")
    path = cache / "snapshots" / "1" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil--x.Y", None]}}))
    hf.import_folder(cache / "snapshots" / "1", tmp_path / "run")
    hf.export_folder(tmp_path / "run", tmp_path / "out", "qwen2")
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    for bad in ("../x.safetensors", ["a"], "/x"):
        index = {"weight_map": {"lm_head.weight": bad}}
        (tmp_path / "hub" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="name of a file in its folder"):
            hf.import_folder(tmp_path / "hub", tmp_path / "run2")


def test_fresh_mtp_layers(tmp_path):
    """The last block, the trunk's norm; what no block has: gains of 1, and the mean of hidden state and embedding."""
    state = family(tmp_path / "hub", "qwen2", True)
    shape, n, _ = hf.import_folder(tmp_path / "hub", tmp_path / "run", fresh=2)
    hf.import_folder(tmp_path / "hub", tmp_path / "run2", fresh=2)
    got = load_model(tmp_path / "run")[1]
    same_bits(got, load_model(tmp_path / "run2")[1])
    assert shape.n_mtp == 2 and n == len(got) == len(state) + 32 and {t.dtype for t in got.values()} == {torch.bfloat16}
    for k in (0, 1):
        for name, t in state.items():
            if name.startswith("model.layers.1."):
                assert torch.equal(got[f"mtp_layers.{k}." + name.split(".", 3)[3]], t)
        assert torch.equal(got[f"mtp_layers.{k}.final_layernorm.weight"], state["model.norm.weight"])
        assert (got[f"mtp_layers.{k}.token_layernorm.weight"] == 1).all()
        assert torch.equal(got[f"mtp_layers.{k}.input_proj.weight"].float(), torch.cat([torch.eye(16) / 2] * 2, 1))
    official(tmp_path / "mimo")
    with pytest.raises(UserError, match="mtp = 1 adds MTP layers to a model without: this one has 1"):
        hf.import_folder(tmp_path / "mimo", tmp_path / "run3", fresh=1)
    assert not list(tmp_path.glob("run3/*"))


@pytest.mark.parametrize("template, eos, chat", [(False, "im_end_id", True), (False, "eos_id", False)])
def test_one_token_that_ends_text_and_turn(tmp_path, template, eos, chat):
    family(tmp_path / "hub", "llama", True, eos_token_id=[getattr(Tokenizer.load("tiny"), eos)])
    hf.import_folder(tmp_path / "hub", tmp_path / "run")
    assert read_meta(find(tmp_path / "run"))["chat"] is chat


# ---- export of our own models ---------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path):
    model = rough_model(SMALL)
    save(tmp_path / "run", 7, model, meta={"stage": "rl", "chat": True}, config={}, state={},
         tokenizer=Tokenizer.load("tiny"))
    return tmp_path / "run", model


@torch.no_grad()
def all_logits(model):
    """Trunk and MTP logits on fixed ids."""
    x = torch.randint(0, 1024, (2, 20), generator=torch.Generator().manual_seed(1))
    h = model(x)
    cos, sin = model.rope_at(x[:, 1:], None)
    layer = model.mtp_layers[0]
    z = layer(h[:, :-1], model.embed_tokens(x[:, 1:]), cos, sin)
    return model.logits(h), layer.final_layernorm(z) @ model.lm_head.weight.T


def load_into(folder, cfg=SMALL):
    model = mtp.build(cfg)
    model.load_state_dict({n.removeprefix("model."): t for n, t in weights_of(folder).items()})
    return model.eval()


def test_folding_by_hand():
    """
    D = 2, gamma = (2, 4). A row (1, 1) of lm_head becomes (2, 4); the norm becomes (1, 1); the MTP layer's final gain
    (6, 6) becomes (3, 1.5), so lm_head x gain is (1*6, 1*6) before and (2*3, 4*1.5) after.
    """
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        save_file({"norm.weight": torch.tensor([2., 4.])}, f"{d}/x.safetensors")
        change = hf.folding(Path(d) / "x.safetensors", "norm.weight")
    assert change("lm_head.weight", torch.ones(1, 2)).tolist() == [[2., 4.]]
    assert change("model.norm.weight", torch.tensor([2., 4.])).tolist() == [1., 1.]
    assert change("model.mtp_layers.0.final_layernorm.weight", torch.tensor([6., 6.])).tolist() == [3., 1.5]
    for other in ("model.layers.0.input_layernorm.weight", "model.mtp_layers.0.hidden_layernorm.weight"):
        assert change(other, torch.tensor([5., 5.])).tolist() == [5., 5.]


def test_folding_changes_no_logit_and_only_once(run, tmp_path):
    folder, model = run
    assert hf.export_folder(folder, tmp_path / "a", "mimo")[3] is True
    folded = load_into(tmp_path / "a")
    assert torch.equal(folded.norm.weight, torch.ones(16)) and (model.norm.weight - 1).abs().max() > 0.1
    for ours, theirs in zip(all_logits(model), all_logits(folded), strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    # a folded export, imported and exported again with --fold=yes, has nothing left to fold
    hf.import_folder(tmp_path / "a", tmp_path / "run2")
    hf.export_folder(tmp_path / "run2", tmp_path / "b", "mimo", fold="yes")
    same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


def test_when_the_norm_is_folded(run, tmp_path):
    folder, model = run
    plain = {hf.hub_name(n): t for n, t in model.state_dict().items()}
    assert hf.export_folder(folder, tmp_path / "a", "mimo", fold="no")[3] is False
    same_bits(weights_of(tmp_path / "a"), plain)
    assert hf.export_folder(folder, tmp_path / "b", "qwen2")[3] is False      # no MTP: nothing to agree on
    hf.import_folder(tmp_path / "a", tmp_path / "run2")
    assert hf.export_folder(tmp_path / "run2", tmp_path / "c", "mimo")[3] is False      # untouched import
    assert hf.export_folder(tmp_path / "run2", tmp_path / "c", "mimo", fold="yes")[3] is True
    with torch.no_grad():
        model.norm.weight[3] = 0
    save(folder, 8, model, meta={"stage": "rl", "chat": True}, config={}, state={},
         tokenizer=Tokenizer.load("tiny"))
    with pytest.raises(UserError, match="norm.weight has a gain of 0, .*--fold=no"):
        hf.export_folder(folder, tmp_path / "d", "mimo")


def test_what_an_export_holds(run, tmp_path):
    """Every key that transformers, vLLM or SGLang reads is spelled out: Qwen2Config's defaults are not ours."""
    hf.export_folder(run[0], tmp_path / "m", "mimo")
    hf.export_folder(run[0], tmp_path / "q", "qwen2")
    m, q = (json.loads((tmp_path / f / "config.json").read_text()) for f in "mq")
    assert m == q | {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "auto_map": hf.AUTO_MAP,
                     "num_nextn_predict_layers": 1}
    right = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 16, "head_dim": 4,
        "rms_norm_eps": 1e-05, "rope_theta": 640000, "vocab_size": 1024, "torch_dtype": "float32",
        "tie_word_embeddings": False, "max_position_embeddings": 32768, "eos_token_id": 1023}
    assert {k: q[k] for k in right} == right and isinstance(q["rope_theta"], int)
    names = set(weights_of(tmp_path / "q"))
    assert len(names) == 27 and not any("mtp" in n for n in names) and len(weights_of(tmp_path / "m")) == 43
    with safe_open(str(tmp_path / "m" / "model.safetensors"), framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
    for folder in (tmp_path / "m", tmp_path / "q"):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1023, 1021]
        assert "<|im_start|>" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        assert Tokenizer.load(folder).added == Tokenizer.load("tiny").added
        assert (folder / "modeling_mimo.py").is_file() == (folder.name == "m")
    for file in (tmp_path / "m").glob("*.py"):
        compile(file.read_text(), str(file), "exec")


def test_what_an_engine_would_run_wrongly_is_not_written(tmp_path, capsys):
    """vLLM takes a Qwen2's head width as d_model / n_head, whatever the file says, and answers nonsense."""
    cfg = replace(SMALL, head_dim=8)
    save(tmp_path / "run", 1, rough_model(cfg), meta={"chat": True}, config={}, state={},
         tokenizer=Tokenizer.load("tiny"))
    for flavour in ("mimo", "qwen2"):
        with pytest.raises(UserError, match="head_dim = 8 is not d_model / n_head = 16/4: .*--odd_heads"):
            hf.export_folder(tmp_path / "run", tmp_path / "out", flavour)
    hf.export_folder(tmp_path / "run", tmp_path / "out", "qwen2", odd_heads=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["head_dim"] == 8
    assert "vLLM's attention starts at 32" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("flavour", ["mimo", "qwen2"])
@pytest.mark.parametrize("widen", [1, 2, 3])
def test_a_wider_export_computes_the_same(tmp_path, flavour, widen):
    """Trunk, MTP layer and the layer applied three times, in fp32: the same logits; only rounding and eps differ."""
    model = rough_model(SMALL)
    save(tmp_path / "run", 1, model, meta={"chat": True}, config={}, state={}, tokenizer=Tokenizer.load("tiny"))
    hf.export_folder(tmp_path / "run", tmp_path / "out", flavour, widen=widen)
    shape, _, _ = hf.import_folder(tmp_path / "out", tmp_path / "back")
    assert (shape.d_model, shape.head_dim, shape.n_head) == (16 * widen, 4 * widen, 4)
    wide = mtp.build(shape)
    wide.load_state_dict(load_model(tmp_path / "back")[1])
    ids = torch.randint(0, 1024, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = []
    for m in (model, wide):
        h = m(ids[:, :36])
        states = mtp.mtp_states(m, h, ids, m.embed_tokens.weight, None, None, 3) if m.mtp_layers else ()
        logits.append([m.logits(h), *(z @ m.lm_head.weight.T for z in states)])
    for ours, other in zip(*logits, strict=flavour == "mimo"):
        assert ours.std() > 0.5
        torch.testing.assert_close(other, ours, atol=2e-3, rtol=0)


def test_another_user_can_read_the_weights(run, tmp_path):
    """safetensors writes them with mode 0600, which a server under another user cannot open."""
    hf.export_folder(run[0], tmp_path / "out", "mimo")
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    for file in (*(tmp_path / "out").iterdir(), *find(run[0]).iterdir()):
        assert file.stat().st_mode == usual, file


def test_a_base_model_stops_at_the_end_of_text(tmp_path):
    save(tmp_path / "run", 1, rough_model(SMALL), meta={"stage": "pretrain", "chat": False},
         config={}, state={}, tokenizer=Tokenizer.load("tiny"))
    hf.export_folder(tmp_path / "run", tmp_path / "out", "mimo")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["eos_token_id"] == 1021
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["model_max_length"]) == ("<|endoftext|>", 32_768)


def test_targets_are_replaced_only_if_they_are_ours(run, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and was not made by hf.py export"):
        hf.export_folder(run[0], tmp_path / "home", "mimo")
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.txt"]
    hf.export_folder(run[0], tmp_path / "out", "mimo")
    hf.export_folder(run[0], tmp_path / "out", "qwen2")            # replaced as a whole: no .py file is left
    assert not list((tmp_path / "out").glob("*.py"))


def test_the_space_asked_for_is_that_of_the_dtype_written(run, tmp_path, monkeypatch):
    _, _, written, _ = hf.export_folder(run[0], tmp_path / "fp32", "mimo", dtype=torch.float32)
    for dtype, free in ((torch.float32, written - 1), (torch.bfloat16, written // 2)):
        usage = shutil.disk_usage(tmp_path)._replace(free=50_000_000 + free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if dtype is torch.float32:
            with pytest.raises(UserError, match="GB to write"):
                hf.export_folder(run[0], tmp_path / "out", "mimo", dtype=dtype)
            assert not (tmp_path / "out").exists()
        else:
            assert hf.export_folder(run[0], tmp_path / "out", "mimo", dtype=dtype)[2] == written // 2


def test_a_failed_export_leaves_the_old_one(run, tmp_path, monkeypatch):
    hf.export_folder(run[0], tmp_path / "out", "mimo")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def no_space(*args, **more):
        raise OSError("No space left on device")
    monkeypatch.setattr(hf, "save_file", no_space)
    with pytest.raises(OSError, match="No space"):
        hf.export_folder(run[0], tmp_path / "out", "qwen2")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_command_line(run, tmp_path, capsys):
    command = lambda *words: hf.main(configurator.load(hf.Config, [str(word) for word in words]))
    command("export", run[0], tmp_path / "hf", "--flavour=mimo", "--dtype=bfloat16")
    assert "43 tensors" in (out := capsys.readouterr().out) and "final norm folded into lm_head" in out
    command("import", tmp_path / "hf", tmp_path / "run2")
    assert f"{SMALL.n_params():,} parameters" in capsys.readouterr().out
    assert {t.dtype for t in load_model(tmp_path / "run2")[1].values()} == {torch.bfloat16}
    for words, message in ((["export", run[0], "x"], "flavour is missing: .*--flavour=mimo"),
                           (["export", run[0], "x", "--flavour=gpt"], "'gpt' should be one of 'mimo', 'qwen2', 'll"),
                           (["export", run[0], "x", "--flavour=llama"], "has biases on q, k and v, Llama has none"),
                           (["import", run[0], "x", "--mtp=1", "--mtps=y"], "one of the two"),
                           (["exprot", run[0], "x"], "'exprot' should be one of 'import', 'export'"),
                           (["import", run[0]], "out is missing; usage: .*hf.py ACTION SOURCE OUT"),
                           ([], "action is missing; usage: ")):
        with pytest.raises(UserError, match=message):
            command(*words)
    with pytest.raises(UserError, match="no checkpoint at"):
        command("export", tmp_path / "nowhere", tmp_path / "x", "--flavour=mimo")
    with pytest.raises(UserError, match="there is no second one to write"):
        command("export", run[0], tmp_path / "y", "--flavour=mimo", f"--mtps={tmp_path / 'z'}")
