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
    # acceptance by hand, on text that the model wrote itself (elsewhere an engine would not draft)
    own = hf.generate(x[:1, :4], max_new_tokens=30, min_new_tokens=30, do_sample=False)
    trunk, draft = hf(own).logits[0].argmax(-1).tolist(), hf.mtp_logits(own)[0].argmax(-1).tolist()
    verified = [i for i in range(len(draft)) if trunk[i] == own[0, i + 1]]
    assert len(verified) >= 29
    share = sum(draft[i] == trunk[i + 1] for i in verified) / len(verified)
    assert hf.mtp_acceptance(own) == pytest.approx(share)


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
