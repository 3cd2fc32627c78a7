"""
Parity with transformers on exported folders: logits, greedy text, MTP drafts, tokenizer and chat template.

Skipped without transformers (requirements-dev.txt). Everything is made here; nothing is downloaded.
"""
import json
import os
import tempfile

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")                                # nothing is looked up anywhere
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))   # copies of our .py files
transformers = pytest.importorskip("transformers")

from checkpoints import load_model  # noqa: E402

import kernels  # noqa: E402
import mtp  # noqa: E402
from checkpoint import find, read_weights, save  # noqa: E402
from engine import Engine, Request, generate  # noqa: E402
from hf import export_folder, import_folder  # noqa: E402
from model import ModelConfig  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

CFG = ModelConfig(vocab_size=1024, n_layer=3, d_model=64, n_head=4, n_kv_head=2, head_dim=16, d_ff=128,
                  rope_base=640_000.0, max_seq_len=256, n_mtp=1)


def rough_model(cfg=CFG, seed=0, gain=0.3):
    """Large random weights and uneven gains: every part of the model matters, greedy text does not repeat itself."""
    model, g = mtp.build(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = name.endswith("norm.weight")
            p.copy_((1 if norm else 0) + (gain if norm else 0.1) * torch.randn(p.shape, generator=g))
    return model.eval()


def ids(n=40, rows=2, seed=1):
    return torch.randint(0, 1024, (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("run"), rough_model()
    save(folder, 3, model, meta={"stage": "sft", "chat": True}, config={}, state={},
         tokenizer=Tokenizer.load("tiny"))
    return folder, model


@pytest.fixture(scope="module")
def exports(run):
    """flavour -> (folder, transformers' model); "mimo" is folded."""
    made = {}
    for flavour in ("mimo", "qwen2"):
        folder = run[0] / f"hf_{flavour}"
        export_folder(run[0], folder, flavour)
        made[flavour] = folder, transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, torch_dtype=torch.float32, attn_implementation="sdpa").eval()
    return made


def max_diff(a, b):
    return (a - b).abs().max().item()


@torch.no_grad()
def test_trunk_logits_equal_qwen2(run, exports):
    """
    fp32 on CPU, the same weights (flavour qwen2 is not folded): all 81,920 logits are equal to the last bit when
    transformers uses the same attention (sdpa). Its eager attention sums in another order; measured 2.3e-6.
    """
    model, (folder, hf) = run[1], exports["qwen2"]
    assert type(hf).__name__ == "Qwen2ForCausalLM"
    x = ids()
    ours = model.logits(model(x))
    assert ours.std() > 0.5 and max_diff(ours, hf(x).logits) == 0.0
    eager = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32,
                                                              attn_implementation="eager").eval()
    assert max_diff(ours, eager(x).logits) < 2e-5


@torch.no_grad()
def test_folded_mimo_has_the_same_logits(run, exports):
    """Folding the final norm changes rounding only."""
    model, (folder, hf) = run[1], exports["mimo"]
    assert type(hf).__name__ == "MiMoForCausalLM"
    assert json.loads((folder / "export.json").read_text())["folded"]
    assert torch.equal(hf.model.norm.weight, torch.ones(64)) and (model.norm.weight - 1).abs().max() > 0.3
    x = ids()
    assert max_diff(model.logits(model(x)), hf(x).logits) < 5e-5


@torch.no_grad()
def our_mtp_logits(model, x):
    h = model(x)[:, :-1]
    cos, sin = model.rope_at(h[..., 0], None)
    z = model.mtp_layers[0](h, model.embed_tokens(x[:, 1:]), cos, sin)
    return model.mtp_layers[0].final_layernorm(z) @ model.lm_head.weight.T


@torch.no_grad()
def test_mtp_layer_in_transformers(run, exports):
    """The exported MTP layer, called through our modelling file, drafts what ours drafts; swapped halves do not."""
    model, hf = run[1], exports["mimo"][1]
    x = ids()
    ours, theirs = our_mtp_logits(model, x), hf.mtp_logits(x)
    assert theirs.shape == (2, 39, 1024) and max_diff(ours, theirs) < 5e-5
    layer = hf.model.mtp_layers[0]
    layer.input_proj.weight.copy_(layer.input_proj.weight.roll(64, 1))   # swapped: [embedding ; hidden]
    assert max_diff(ours, hf.mtp_logits(x)) > 0.1
    layer.input_proj.weight.copy_(layer.input_proj.weight.roll(64, 1))
    # acceptance by hand on text that the model wrote itself, and as mtp.py walks it; the prompt does not count
    own = hf.generate(x[:1, :4], max_new_tokens=30, min_new_tokens=30, do_sample=False)
    draft, text = hf.mtp_logits(own)[0].argmax(-1).tolist(), own[0].tolist()
    i, hits = 3, []
    while i + 2 < len(text):
        hits.append(draft[i] == text[i + 2])
        i += 1 + hits[-1]
    assert len(hits) > 10 and hf.mtp_acceptance(own, prompt_length=4) == pytest.approx(sum(hits) / len(hits))


@torch.no_grad()
def test_folding_makes_pre_and_post_norm_agree(run, exports):
    """
    The reason for folding: an engine that feeds the state AFTER the final norm (SGLang) drafts the same from a folded
    export, and something else from the original weights.
    """
    model, hf = run[1], exports["mimo"][1]
    x = ids()
    right = our_mtp_logits(model, x)

    layer, (cos, sin) = model.mtp_layers[0], model.rope_at(x[:, :-1], None)
    after_norm = model.norm(model(x))[:, :-1]
    unfolded = model.lm_head(layer.final_layernorm(layer(after_norm, model.embed_tokens(x[:, 1:]), cos, sin)))
    before = hf.trunk_state
    hf.trunk_state = lambda input_ids: hf.model.norm(before(input_ids))
    try:
        folded = hf.mtp_logits(x)
    finally:
        del hf.trunk_state
    assert max_diff(folded, right) < 1e-3 < 0.1 < max_diff(unfolded, right)


@torch.no_grad()
@pytest.mark.parametrize("flavour", ["mimo", "qwen2"])
def test_greedy_text_is_the_same(run, exports, flavour):
    """
    60 tokens after each of three chat prompts: transformers.generate, and our engine as sample.py runs it, without and
    with drafts of the MTP layer.
    """
    model, hf, tok = run[1], exports[flavour][1], Tokenizer.load("tiny")
    ends = (tok.im_end_id, tok.eos_id)
    questions = ("What is 17 + 25?", "Given a list xs: drop zeros; return the sum.", "x")
    prompts = [tok.chat([{"role": "user", "content": q}], add_generation_prompt=True)[0] for q in questions]
    requests = [Request(k, p, max_new_tokens=60, temperature=0.0, stop=ends) for k, p in enumerate(prompts)]
    plain = generate(Engine(model, slots=3, max_len=128), requests)
    drafted = generate(Engine(model, slots=3, max_len=128, n_draft=1), requests)
    for prompt, a, b in zip(prompts, plain, drafted, strict=True):
        theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0].tolist()
        assert theirs[len(prompt):] == a.tokens == b.tokens and len(set(a.tokens)) > 5
    assert hf.generation_config.eos_token_id == list(ends)


@pytest.mark.parametrize("flavour", ["mimo", "qwen2"])
def test_tokenizer_in_transformers(exports, flavour):
    """AutoTokenizer reads the exported tiny tokenizer: same ids, same chat, same stop token."""
    theirs = transformers.AutoTokenizer.from_pretrained(exports[flavour][0], trust_remote_code=True)
    ours = Tokenizer.load("tiny")
    for text in ("Problem: 17 + 25 = ?", "```python\ndef f(xs):\n    return xs[::-1]\n```",
                 "naïve cafe\u0301 中文 😀",
                 "<|im_start|>user\nhi<|im_end|>\n", "don't  \n\n x"):
        assert theirs(text)["input_ids"] == ours.encode(text, control=True), repr(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "<think>\n2+2=4\n</think>\n\n\\boxed{4}"}]
    for messages, add in ((chat, False), (chat[:2], True)):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
        assert theirs(text)["input_ids"] == ours.chat(messages, add_generation_prompt=add)[0]
    assert theirs.eos_token_id == ours.im_end_id


@torch.no_grad()
def test_a_folder_saved_by_transformers_comes_back(exports, run, tmp_path):
    """save_pretrained rewrites config.json (rope_parameters, dtype); we read that too, and lose no bit."""
    folder, hf = exports["qwen2"]
    hf.save_pretrained(tmp_path / "saved")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    cfg, _, _ = import_folder(tmp_path / "saved", tmp_path / "run")
    assert cfg == ModelConfig(**{**vars(CFG), "n_mtp": 0})
    _, state, _ = load_model(tmp_path / "run")
    for name, t in run[1].state_dict().items():
        assert name.startswith("mtp_layers.") or torch.equal(state[name], t), name


# ---- models that others made ----------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1)
KINDS = {
    "qwen2": transformers.Qwen2Config(**SHAPE, rope_theta=1e6),
    "qwen2 tied": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-6),
    "qwen2 head_dim 32": transformers.Qwen2Config(**SHAPE, head_dim=32),
    "llama": transformers.LlamaConfig(**SHAPE, rope_theta=5e5),
    "llama tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, head_dim=16),
    "mha": transformers.LlamaConfig(**(SHAPE | dict(num_key_value_heads=4)))}


@pytest.fixture(params=KINDS)
def hub(request, tmp_path):
    """A folder as transformers writes it, and its model with biases and gains that matter."""
    config, g = KINDS[request.param], torch.Generator().manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
    hf.save_pretrained(tmp_path / "hub")
    Tokenizer.load("tiny").save(tmp_path / "hub")
    return hf, tmp_path / "hub"


@torch.no_grad()
def test_models_of_others_there_and_back(hub, tmp_path):
    """fp32 logits equal transformers' to the last bit after import, after export and import, and as MiMo."""
    hf, folder = hub
    x, kind = ids(), hf.config.model_type
    right, odd = hf(x).logits, hf.config.head_dim != 16 if getattr(hf.config, "head_dim", None) else False
    for turn in range(2):
        shape, _, _ = import_folder(folder, tmp_path / f"run{turn}")
        model = mtp.build(shape)
        read_weights(find(tmp_path / f"run{turn}"), model)
        assert right.std() > 0.3 and max_diff(model.logits(model(x)), right) == 0.0
        folder = tmp_path / f"again{turn}"
        export_folder(tmp_path / f"run{turn}", folder, kind, odd_heads=odd)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
        assert type(again) is type(hf) and max_diff(again(x).logits, right) == 0.0
        assert sum(p.numel() for p in again.parameters()) == shape.n_params() == sum(p.numel() for p in hf.parameters())
    export_folder(tmp_path / "run0", tmp_path / "mimo", "mimo", odd_heads=odd)
    mimo = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mimo", trust_remote_code=True).eval()
    assert type(mimo).__name__ == "MiMoForCausalLM" and max_diff(mimo(x).logits, right) == 0.0


@torch.no_grad()
def test_greedy_text_of_models_of_others(hub, tmp_path):
    """Our engine, in C where it can and in torch, writes what transformers.generate writes."""
    hf, folder = hub
    shape, _, _ = import_folder(folder, tmp_path / "run")
    model = mtp.build(shape)
    read_weights(find(tmp_path / "run"), model)
    prompts = ids(12, rows=3, seed=5)
    theirs = hf.generate(prompts, max_new_tokens=40, do_sample=False, eos_token_id=1023, pad_token_id=1021)
    for plain in (False, True):
        kernels.set_plain(plain)
        try:
            requests = [Request(k, p.tolist(), max_new_tokens=40, temperature=0.0, stop=(1023,))
                        for k, p in enumerate(prompts)]
            for k, sample in enumerate(sorted(generate(Engine(model, 3, 64), requests), key=lambda s: s.id)):
                assert sample.tokens == theirs[k, 12:12 + len(sample.tokens)].tolist()
        finally:
            kernels.set_plain(False)


def test_a_mimo_folder_saved_by_transformers_still_loads(exports, tmp_path):
    """save_pretrained takes both of our files along, also before transformers 5."""
    exports["mimo"][1].save_pretrained(tmp_path / "saved")
    for file in ("configuration_mimo.py", "modeling_mimo.py"):
        assert (tmp_path / "saved" / file).is_file()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(again).__name__ == "MiMoForCausalLM"


@torch.no_grad()
def test_bf16(run, tmp_path):
    """--dtype=bfloat16: both read the same bf16 weights, and ours is no further from fp32 than transformers is."""
    export_folder(run[0], tmp_path / "hf", "qwen2", dtype=torch.bfloat16)
    load = lambda dtype: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf",
                                                                           torch_dtype=dtype).eval()
    import_folder(tmp_path / "hf", tmp_path / "run")
    model = mtp.build(ModelConfig(**{**vars(CFG), "n_mtp": 0})).to(torch.bfloat16).eval()
    read_weights(find(tmp_path / "run"), model)
    x = ids()
    exact = load(torch.float32)(x).logits
    ours, theirs = model.logits(model(x)).float() - exact, load(torch.bfloat16)(x).logits.float() - exact
    assert 0 < ours.std() < 1.2 * theirs.std() and theirs.std() < 0.02 * exact.std()
