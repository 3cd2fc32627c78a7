"""docs/your_model.md, command by command, on a small random model of the same shape: tied, with a template."""
import importlib
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import load_model
from safetensors.torch import save_file
from test_docs import commands_of

import configurator
import hf
import mtp
from model import ModelConfig
from tokenizer import Tokenizer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "your_model.md"
SHAPE = ModelConfig(vocab_size=1024, n_layer=2, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=48,
                    max_seq_len=256, n_mtp=0, tie_embeddings=True)
SMALL = {"sft": ["--steps=2", "--batch_size=2", "--seq_len=128", "--device=cpu"],
         "rl": ["--steps=1", "--batch_size=1", "--mini_batch=1", "--group_size=2", "--max_groups=2",
                "--max_new_tokens=[(0,8)]", "--slots=4", "--judge_workers=1", "--device=cpu"],
         "sample": ["--max_new_tokens=12"], "eval": ["--max_new_tokens=8"]}


def qwen(folder):
    """A folder as transformers would write it, with a default system prompt in its template."""
    model = mtp.build(SHAPE)
    model.init_weights(1)
    folder.mkdir()
    save_file({hf.hub_name(n): p.detach().clone() for n, p in model.named_parameters()}, folder / "model.safetensors")
    tokenizer = Tokenizer.load("tiny").with_system("You are Qwen.")
    tokenizer.save(folder)
    config = hf.hub_config(SHAPE, tokenizer, "qwen2", True, torch.float32, None)
    (folder / "config.json").write_text(json.dumps(config))


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(PAGE.parent.parent / "config")
    qwen(tmp_path / "Qwen2.5-0.5B-Instruct")
    (tmp_path / "questions.jsonl").write_text('{"prompt": "What is 1+1?"}\n{"prompt": "What is 2+3?"}\n')
    chat = [{"role": "user", "content": "What is 3+4?"}, {"role": "assistant", "content": "3+4=7"}]
    (tmp_path / "samples.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 2)
    (tmp_path / "problems.jsonl").write_text(json.dumps(dict(id="1", kind="maths", question="What is 1+2?",
                                                             answer="3")) + "\n")
    commands = [c for c in commands_of(PAGE.read_text()) if c[0] == "python" and "data.hub" not in c]
    assert len(commands) == 17, [shlex.join(c) for c in commands]
    for _, script, *words in commands:
        name = script.removesuffix(".py")
        module = importlib.import_module(name)
        if "--adapter=their_adapter" in words:
            shutil.copytree(tmp_path / "out/qwen_lora/step_00000002/adapter", tmp_path / "their_adapter")
        module.main(configurator.load(module.Config, words + SMALL.get(name, [])))
        if "--out=out/answers.jsonl" in words:                   # a random model's answers pass no filter
            rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
            assert [len(row["answers"]) for row in rows] == [len(row["finish"]) for row in rows] == [4, 4]
            rows = [row | {"answers": ["1+1=2", "It is 2.", "2", "two"], "finish": ["stop"] * 4} for row in rows]
            (tmp_path / "out/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = capsys.readouterr().out
    assert "8 of 8 kept" in text and "speculative / plain" in text
    before, after = (load_model(tmp_path / "out" / run)[1] for run in ("qwen", "qwen_mtp"))
    assert {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])} == {"mtp_layers"}
    tuned = load_model(tmp_path / "out/qwen_sft")[1]
    assert not torch.equal(tuned["embed_tokens.weight"], after["embed_tokens.weight"])
    lora, theirs = (load_model(tmp_path / "out" / run)[1] for run in ("qwen_lora", "qwen_theirs"))
    assert all(torch.allclose(lora[n], theirs[n], atol=1e-6) for n in theirs)
    assert not torch.equal(lora["layers.0.mlp.up_proj.weight"], after["layers.0.mlp.up_proj.weight"])
    assert load_model(tmp_path / "out/qwen_rl_lora")[2]["stage"] == "rl"
    config = json.loads((tmp_path / "out/qwen_hf/config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"], config["torch_dtype"]) == ("mimo", False, "bfloat16")
    served, trained = Tokenizer.load(tmp_path / "out/qwen_hf"), Tokenizer.load(tmp_path / "out/qwen_sft/step_00000002")
    prompt = served.chat(chat[:1], add_generation_prompt=True)[0]
    assert prompt == trained.chat(chat)[0][:len(prompt)] and "You are Qwen." in served.decode(prompt)
    shape, _, _ = hf.import_folder(tmp_path / "out/qwen_hf", tmp_path / "again")
    assert shape == replace(SHAPE, tie_embeddings=False, n_mtp=1)


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_a_system_prompt_goes_from_sft_into_the_export(tmp_path, system):
    """What is trained with --system is what the exported template writes; a resumed run adds it once."""
    import sft
    qwen(tmp_path / "hub")
    hf.import_folder(tmp_path / "hub", tmp_path / "base", fresh=1)
    chat = [{"role": "user", "content": "What is 3+4?"}, {"role": "assistant", "content": "3+4=7"}]
    (tmp_path / "s.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    words = [f"--init={tmp_path / 'base'}", f"--out={tmp_path / 'sft'}", f"--data={tmp_path / 's.jsonl'}", "--heldout=",
             "--seq_len=128", "--batch_size=1", "--device=cpu", *([] if system is None else [f"--system={system}"])]
    for steps in (1, 2):
        sft.main(configurator.load(sft.Config, [*words, f"--steps={steps}"]))
    hf.export_folder(tmp_path / "sft", tmp_path / "out", "qwen2")
    tok = Tokenizer.load(tmp_path / "out")
    want = "You are Qwen." if system is None else system
    assert tok.decode(tok.chat(chat[:1])[0]).startswith(f"<|im_start|>system\n{want}<|im_end|>\n<|im_start|>user\n")
    assert tok.chat_template.count("set messages") == (1 if system is None else 2)
