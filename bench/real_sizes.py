"""
Decoding at sizes that people use, on one CPU thread: ours in fp32 and bf16 beside transformers and llama.cpp.

    pip install transformers gguf         # the peers; never needed by the recipe. llama.cpp, once:
    git clone https://github.com/ggml-org/llama.cpp && cd llama.cpp
    cmake -B build -DGGML_NATIVE=ON && cmake --build build --target llama-batched-bench
    python bench/real_sizes.py --llama=../llama.cpp/build/bin/llama-batched-bench          # 112M; ten minutes
    python bench/real_sizes.py --shape=135m --llama=...                                    # SmolLM2's shape
    python bench/real_sizes.py --ckpt=out/smollm2 --llama=...    # a model that hf.py has imported

112M is config/mimo_100m.py with a vocabulary of 8,192. Weights are random unless --ckpt names some: the time of a step
does not depend on their values. A step is one token for each of 1 or 32 sequences with 32 tokens before it; prefill is
not in it. llama.cpp reads a GGUF file of the same shape and weights, f32 and f16, through its own llama-batched-bench,
which measures decoding alone; transformers' time is generate() for one token and for 33, and their difference.

All sides run in turns, in another order each round; the medians count. Ours and transformers: CPU seconds of the
process. llama-batched-bench tells wall time, which is multiplied by its process's share of a core, CPU / wall.

MTP: THE ACCEPTANCE IS IMPOSED, because random weights cannot guess. Measured is the time of a step that drafts three
tokens and verifies four, where all drafts are right (the dearest case: with gains of 0 in the last norms all logits are
0, and the smallest id wins everywhere). Tokens per step are computed from the report's rates, 90%, 82% (which the
report does not give) and 75%:  1 + .90 + .90 .82 + .90 .82 .75 = 3.19. "Of few": drafts among the first 8,192 ids, for
a large vocabulary, of whose head a draft then reads a part; how much acceptance that costs is not in these rates.

The last line is the ratios, with the size; out/bench/real_sizes.json has every time.
"""
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import checkpoint  # noqa: E402
import configurator  # noqa: E402
import hf  # noqa: E402
import mtp  # noqa: E402
from configurator import UserError  # noqa: E402
from engine import Engine, Request, generate  # noqa: E402
from model import MiMo, ModelConfig  # noqa: E402

REPORT = (0.90, 0.82, 0.75)     # acceptance per MTP layer: accepted / verified drafts
PROMPT = 32                     # tokens before the first that is generated
SHAPES = {
    "112m": ModelConfig(vocab_size=8192, n_layer=16, d_model=768, n_head=12, n_kv_head=3, head_dim=64, d_ff=2048,
                        n_mtp=3),
    "135m": ModelConfig(vocab_size=49_152, n_layer=30, d_model=576, n_head=9, n_kv_head=3, head_dim=64, d_ff=1536,
                        n_mtp=3, tie_embeddings=True),
    "tiny": ModelConfig(n_mtp=3)}


@dataclass(frozen=True)
class Config:
    """The command line of bench/real_sizes.py."""
    shape: Literal["112m", "135m", "tiny"] = "112m"   # tiny: to see that it runs
    ckpt: str = ""                        # a checkpoint whose trunk is taken in place of random weights
    llama: str = ""                       # the program llama-batched-bench; "" = without llama.cpp
    draft_ids: int = 8192                 # a second row with MTP drafts only among so many first ids, where V is larger
    batches: list[int] = (1, 32)          # sequences that are decoded together
    steps: int = 32                       # decode steps per measurement
    rounds: int = 5                       # timed turns of every side, after one for warming up
    threads: int = 1                      # threads, all sides
    out: str = "out/bench/real_sizes.json"    # the result

    def __post_init__(self):
        configurator.at_least(self, 1, "steps", "rounds", "threads")


def cpu_seconds(f: Callable[[], object]) -> float:
    """CPU seconds of this process in f()."""
    start = time.process_time()
    f()
    return time.process_time() - start


# ---- the sides: each a function (batch) -> seconds per step ---------------------------------------------------------

def build(shape: ModelConfig, ckpt: str) -> MiMo:
    """Random weights, or a checkpoint's trunk; the MTP layers are random."""
    model = mtp.build(shape)
    model.init_weights()
    if ckpt:
        trained = mtp.build(ModelConfig(**checkpoint.read_shape(checkpoint.find(ckpt))))
        checkpoint.read_weights(checkpoint.find(ckpt), trained)
        trunk = {name: w for name, w in trained.state_dict().items() if not name.startswith("mtp_layers.")}
        model.load_state_dict(trunk, strict=False)
    return model.requires_grad_(False)


def prompts(batch: int, V: int) -> list[list[int]]:
    """Random ids, the same in every call."""
    return torch.randint(0, V, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def our_step(model: MiMo, n_draft: int, cfg: Config, draft_ids: int = 0) -> Callable[[int], float]:
    """Our engine: a decode step, with the drafts of n_draft MTP layers among the first draft_ids tokens, 0 = all."""
    warm, V = 2, model.cfg.vocab_size
    new = (cfg.steps + warm + 2) * (n_draft + 1)
    engine = Engine(model, max(cfg.batches), PROMPT + new + 1, n_draft, draft_ids=draft_ids)

    def seconds(batch: int) -> float:
        for i, prompt in enumerate(prompts(batch, V)):
            engine.add(Request(i, prompt, new, 0.0))
        while len(engine.decoding) < batch:
            engine.step()
        for _ in range(warm):
            engine.step()
        before = sum(engine.runner.lengths(batch))
        took = cpu_seconds(lambda: [engine.step() for _ in range(cfg.steps)])
        committed = sum(engine.runner.lengths(batch)) - before
        if committed != batch * cfg.steps * (n_draft + 1):
            raise RuntimeError(f"{committed} tokens in {cfg.steps} steps of {batch}: should be all that was drafted")
        for i in range(batch):
            engine.abort(i)
        return took / cfg.steps
    return seconds


def load_transformers(model: MiMo, dtype: torch.dtype):
    """The same trunk as Qwen2ForCausalLM."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    c = model.cfg
    config = Qwen2Config(vocab_size=c.vocab_size, num_hidden_layers=c.n_layer, hidden_size=c.d_model,
                         num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
                         intermediate_size=c.d_ff, rms_norm_eps=c.rms_eps, max_position_embeddings=c.max_seq_len,
                         rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
                         tie_word_embeddings=c.tie_embeddings)
    peer = Qwen2ForCausalLM(config)
    trunk = {hf.hub_name(name): w for name, w in model.state_dict().items() if not name.startswith("mtp_layers.")}
    missing, unknown = peer.load_state_dict(trunk, strict=False)
    if unknown or any(not name.endswith(("_proj.bias", "lm_head.weight")) for name in missing):
        raise RuntimeError(f"transformers' Qwen2 lacks {unknown} or has too much: {missing}")
    for name in missing:                                            # a Llama has no biases, a tied model no lm_head
        if name.endswith("bias"):
            peer.get_parameter(name).data.zero_()
    peer.generation_config.eos_token_id = peer.generation_config.pad_token_id = None
    return peer.to(dtype).eval()


@torch.no_grad()
def their_texts(peer, ids: list[list[int]], new: int) -> list[list[int]]:
    """transformers' generate, greedy, exactly `new` tokens."""
    ids = torch.tensor(ids)
    out = peer.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                        do_sample=False, pad_token_id=0)
    return out[:, PROMPT:].tolist()


def their_step(peer, cfg: Config) -> Callable[[int], float]:
    """transformers: generate() of steps + 1 tokens, less generate() of one."""
    def seconds(batch: int) -> float:
        ids = prompts(batch, peer.config.vocab_size)
        long, short = (cpu_seconds(lambda n=n: their_texts(peer, ids, n)) for n in (cfg.steps + 1, 1))
        return (long - short) / cfg.steps
    return seconds


def write_gguf(model: MiMo, path: Path, half: bool) -> None:
    """The trunk as a GGUF file of the architecture qwen2, without a tokenizer; matrices in f16 or f32."""
    import gguf
    c, w = model.cfg, gguf.GGUFWriter(path, "qwen2")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, c.n_layer)
    zeros = {} if c.qkv_bias else {f"layers.{i}.self_attn.{p}_proj.bias": torch.zeros(n * c.head_dim)
                                   for i in range(c.n_layer)
                                   for p, n in (("q", c.n_head), ("k", c.n_kv_head), ("v", c.n_kv_head))}
    for name, t in (model.state_dict() | zeros).items():
        if not name.startswith("mtp_layers.") and (name != "lm_head.weight" or not c.tie_embeddings):
            target = names.get_name(hf.hub_name(name), (".weight", ".bias"))
            w.add_tensor(target, t.to(torch.float16 if half and t.ndim > 1 else torch.float32).numpy())
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.max_seq_len)
    w.add_embedding_length(c.d_model)
    w.add_block_count(c.n_layer)
    w.add_feed_forward_length(c.d_ff)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(c.n_kv_head)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_rope_freq_base(c.rope_base)
    w.add_layer_norm_rms_eps(c.rms_eps)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    w.add_tokenizer_model("no_vocab")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def llama_step(file: Path, cfg: Config) -> Callable[[int], float]:
    """llama.cpp's own benchmark: decoding alone, wall time x the process's share of a core."""
    def seconds(batch: int) -> float:
        context = batch * max(256, PROMPT + cfg.steps)              # with less than 256 a sequence it prints nothing
        command = [cfg.llama, "-m", str(file), "-c", str(context), "-b", "2048", "-ub", "512", "-npp", str(PROMPT),
                   "-ntg", str(cfg.steps), "-npl", str(batch), "-t", str(cfg.threads), "-tb", str(cfg.threads),
                   "--output-format", "jsonl"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not found:
            raise UserError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return found[-1]["t_tg"] * min(1.0, cpu / wall / cfg.threads) / cfg.steps
    return seconds


# ---- all of them in turns -------------------------------------------------------------------------------------------

def cpu_name() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def check(cfg: Config) -> None:
    """UserError names a peer that is missing and how to get it."""
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as e:
        raise UserError(f"no {e.name}: pip install transformers gguf") from None
    if cfg.llama and not Path(cfg.llama).is_file():
        raise UserError(f"no program {cfg.llama}: see `python bench/real_sizes.py --help` for how to build llama.cpp")


def main(cfg: Config) -> None:
    """Make the sides, take turns, print the table and the ratios, write the result."""
    check(cfg)
    import transformers
    torch.set_num_threads(cfg.threads)
    out, shape = configurator.writable(cfg.out), SHAPES[cfg.shape]
    if cfg.ckpt:
        shape = replace(ModelConfig(**checkpoint.read_shape(checkpoint.find(cfg.ckpt))), n_mtp=3)
    model = build(shape, cfg.ckpt)
    half = mtp.build(shape).to(torch.bfloat16).requires_grad_(False)
    half.load_state_dict(model.state_dict())
    parts = shape.params_by_part()
    size, read = shape.n_params() - parts["MTP layers"], parts["blocks"] + model.lm_head.weight.numel()
    print(f"{size / 1e6:.0f}M parameters ({shape.n_layer} layers, D = {shape.d_model}, V = {shape.vocab_size:,}), "
          f"{'weights of ' + cfg.ckpt if cfg.ckpt else 'random weights'}; a step reads {4 * read / 1e6:.0f} MB in "
          f"fp32; {cfg.threads} thread of {cpu_name()}")
    with tempfile.TemporaryDirectory() as folder:
        peer = load_transformers(model, torch.float32)
        ids, new = prompts(4, shape.vocab_size), 16
        samples = generate(Engine(model, 4, PROMPT + new + 1), [Request(i, p, new, 0.0) for i, p in enumerate(ids)])
        same = sum(s.tokens == t for s, t in zip(samples, their_texts(peer, ids, new), strict=True))
        print(f"ours and transformers in fp32: same greedy text {same} of 4, {new} tokens each")
        files = {"f32": Path(folder) / "f32.gguf", "f16": Path(folder) / "f16.gguf"} if cfg.llama else {}
        for kind, file in files.items():
            write_gguf(model, file, kind == "f16")
        for m in (model, half):                                     # from here on every draft is right, see above
            for norm in (m.norm, *(layer.final_layernorm for layer in m.mtp_layers)):
                norm.weight.zero_()
        sides = {"ours fp32": our_step(model, 0, cfg), "ours bf16": our_step(half, 0, cfg),
                 "ours fp32, 3 drafts": our_step(model, 3, cfg), "ours bf16, 3 drafts": our_step(half, 3, cfg),
                 "transformers fp32": their_step(peer, cfg),
                 "transformers bf16": their_step(load_transformers(model, torch.bfloat16), cfg)}
        if cfg.draft_ids < shape.vocab_size:
            sides |= {f"ours {kind}, 3 drafts of few": our_step(m, 3, cfg, cfg.draft_ids)
                      for kind, m in (("fp32", model), ("bf16", half))}
        sides |= {f"llama.cpp {kind}": llama_step(file, cfg) for kind, file in files.items()}
        keys = [(name, batch) for batch in cfg.batches for name in sides]
        times = {key: [] for key in keys}
        for turn in range(cfg.rounds + 1):
            at = turn * len(keys) // (cfg.rounds + 1)
            for name, batch in keys[at:] + keys[:at]:
                took = sides[name](batch)
                if turn:
                    times[name, batch].append(took)
    report(cfg, out, times, size, {
        "shape": vars(shape), "parameters": size, "bytes_per_step_fp32": 4 * read,
        "weights": cfg.ckpt or "random", "same_text": f"{same}/4", "transformers": transformers.__version__})


def report(cfg: Config, out: Path, times: dict, size: int, about: dict) -> None:
    """The table, the ratios and the file."""
    ms = {key: 1e3 * statistics.median(t) for key, t in times.items()}
    per_step = 1 + sum(REPORT[0] * p for p in (1, REPORT[1], REPORT[1] * REPORT[2]))
    rows, ratios = [], {}
    for (name, batch), t in times.items():
        tokens = batch * (per_step if "drafts" in name else 1)
        rows.append({"side": name, "sequences": batch, "ms_per_step": ms[name, batch], "least_ms": 1e3 * min(t),
                     "most_ms": 1e3 * max(t), "tokens_per_second": 1e3 * tokens / ms[name, batch],
                     "all_ms": [1e3 * x for x in t]})
        print(f"  {name:27} {batch:3} sequences: {ms[name, batch]:8.2f} ms a step ({1e3 * min(t):.2f} to "
              f"{1e3 * max(t):.2f}), {rows[-1]['tokens_per_second']:7.1f} tokens/s"
              + (f" at {per_step:.2f} tokens a step" if "drafts" in name else ""))
    for batch in cfg.batches:
        pairs = [("ours fp32", "transformers fp32"), ("ours bf16", "transformers bf16"),
                 ("ours bf16", "transformers fp32"), ("ours bf16", "ours fp32"), ("ours fp32", "llama.cpp f32"),
                 ("ours bf16", "llama.cpp f16")]
        found = {f"{us} / {them}": ms[them, batch] / ms[us, batch] for us, them in pairs if (them, batch) in ms}
        found |= {f"{name} / plain": per_step * ms[name.split(",")[0], batch] / t
                  for (name, n), t in ms.items() if n == batch and "drafts" in name}
        ratios[batch] = found
    first = ratios[cfg.batches[0]]
    ratio = first.get("ours bf16 / llama.cpp f16", first["ours fp32 / transformers fp32"])
    out.write_text(json.dumps({
        "ratio": ratio, "ratios": ratios, "tokens_per_step_with_mtp": per_step, "imposed_acceptance": REPORT,
        "sides": rows, **about, "command": " ".join(["python bench/real_sizes.py", *sys.argv[1:]]),
        "commit": checkpoint.git_commit(), "llama.cpp": llama_version(cfg.llama), "torch": torch.__version__,
        "python": platform.python_version(), "cpu": cpu_name(), "threads": cfg.threads}, indent=1) + "\n")
    print(out)
    for batch, found in ratios.items():
        print(f"{size / 1e6:.0f}M, {batch} sequence{'s' * (batch > 1)}: "
              + ", ".join(f"{name} {r:.2f}x" for name, r in found.items()))


def llama_version(program: str) -> str:
    """What llama.cpp says its version is."""
    if not program:
        return ""
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    return next((line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")), "unknown")


if __name__ == "__main__":
    configurator.run(main, Config)
