"""
Our engine beside transformers' generate, on one checkpoint, one CPU thread, in one run (report 2.2, 3.4).

    python bench/generate.py                          # the newest checkpoint under out/; about three minutes
    python bench/generate.py --ckpt=out/tiny/sft --rounds=7

The checkpoint is exported by hf.py and loaded by transformers as Qwen2ForCausalLM. Three questions:

    1  one request at a time:  transformers.generate  |  ours  |  ours with every MTP layer drafting
    2  64 requests with answers of skewed lengths:
         transformers   one left-padded batch, which runs until its longest answer is done
         ours           a request leaves when it is done, and its row costs nothing from then on
    3  MTP against batch size: measured speed-up, and the prediction of a cost model fitted at three of the sizes

Held-out problems, greedy. In 1 and 3 answers run to their end token; in 2 stop ids are off and the lengths are imposed.
All sides generate the same number of tokens, and the texts must be the same. Times are CPU seconds of the process, so
that another program on the machine disturbs less; the sides alternate, and the least of the rounds counts.

Writes out/bench/generate.json and out/bench/generate.png. The last line has the ratios. Numbers to expect:
docs/engine.md.
"""
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import configurator  # noqa: E402
import mtp  # noqa: E402
from checkpoint import find, newest, read_meta, read_shape, read_weights  # noqa: E402
from configurator import UserError  # noqa: E402
from data.problems import prompt_ids, read_problems, stop_ids  # noqa: E402
from engine import Engine, Request, generate  # noqa: E402
from model import MiMo, ModelConfig  # noqa: E402
from runner import CpuRunner  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The command line of bench/generate.py."""
    ckpt: str = ""                        # a checkpoint or a run folder; "" = the newest under out/
    problems: str = "out/tiny/problems/test.jsonl"   # prompts
    singles: int = 12                     # requests of question 1
    tokens: int = 128                     # most tokens of an answer in questions 1 and 3
    requests: int = 64                    # requests of question 2
    longest: int = 256                    # longest answer of question 2, tokens
    batches: list[int] = (1, 2, 4, 8, 16, 32, 64)    # batch sizes of question 3
    rounds: int = 5                       # timed repetitions of everything, after one for warming up
    threads: int = 1                      # torch threads, both sides
    out: str = "out/bench/generate.json"  # results; the plot lies beside it


def seconds(f: Callable) -> tuple[float, object]:
    """CPU seconds that f() takes, and its result."""
    start = time.process_time()
    result = f()
    return time.process_time() - start, result


def alternate(sides: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, once per round and by turns; one round before these is not counted."""
    times = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, f in sides.items():
            times[name].append(seconds(f)[0])
    return {name: t[1:] for name, t in times.items()}


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    """theirs / ours, the least time of each: above 1 ours is faster. Other programs only ever add to a time."""
    return min(times[theirs]) / min(times[ours])


# ---- transformers ---------------------------------------------------------------------------------------------------

def load_transformers(ckpt: Path):
    """The same weights in transformers, through hf.py; greedy, without stop ids."""
    from transformers import AutoModelForCausalLM

    import hf
    with tempfile.TemporaryDirectory() as folder:
        hf.export_folder(ckpt, Path(folder) / "qwen2", "qwen2")
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "qwen2", dtype=torch.float32)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval()


@torch.no_grad()
def theirs(model, prompts: list[list[int]], tokens: int, stop: tuple = ()) -> list[list[int]]:
    """transformers.generate on a left-padded batch. -> new tokens per prompt; without stop ids exactly `tokens`."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=True,
                         min_new_tokens=None if stop else tokens, eos_token_id=list(stop) or None, pad_token_id=0)
    return out[:, width:].tolist()


# ---- the cost model -------------------------------------------------------------------------------------------------

class Timed(CpuRunner):
    """Adds up the CPU seconds of decode() and of draft()."""
    seconds_decode = seconds_draft = 0.0

    def decode(self, A):
        t, result = seconds(lambda: super(Timed, self).decode(A))
        self.seconds_decode += t
        return result

    def draft(self, first, B, E):
        self.seconds_draft += seconds(lambda: super(Timed, self).draft(first, B, E))[0]


def serve(model: MiMo, prompts: list[list[int]], batch: int, n_draft: int, tokens: int,
          stop: tuple) -> tuple[dict[str, float], list]:
    """
    A full batch for as long as two batches of answers take: the first batch of answers is not timed, and the queue is
    never empty. -> (CPU seconds, samples). The seconds: "token" per token; "decode", "draft" and "rest", which is
    mostly prefill, per step.
    """
    engine, done = Engine(model, batch, 512, n_draft, runner=Timed), []
    runner = engine.runner
    for i in range(4 * batch + 4):
        engine.add(Request(i, prompts[i % len(prompts)], tokens, 0.0, stop=stop))

    def until(n: int) -> None:
        while len(done) < n:
            done.extend(engine.step())

    def n_generated() -> int:
        unfinished = sum(runner.lengths(len(engine.decoding))) - sum(len(s.request.prompt) for s in engine.decoding)
        return sum(len(s.tokens) for s in done) + unfinished
    until(batch)
    engine.steps, runner.seconds_decode, runner.seconds_draft, before = 0, 0.0, 0.0, n_generated()
    whole, _ = seconds(lambda: until(3 * batch + 2))
    cost = {"decode": runner.seconds_decode, "draft": runner.seconds_draft}
    cost["rest"] = whole - cost["decode"] - cost["draft"]
    return {name: t / engine.steps for name, t in cost.items()} | {"token": whole / (n_generated() - before)}, done


def interpolated(at: dict[int, float]) -> Callable[[float], float]:
    """cost(batch size), linear between the points: few sequences are bound by weights, many by their rows."""
    return lambda x: float(np.interp(x, list(at), list(at.values())))


def tokens_per_round(samples: list) -> tuple[float, list[float]]:
    """
    r = 1 + a1 + a1 a2 + a1 a2 a3, a_k = acceptance of layer k: accepted / verified drafts. The end of an answer of T
    tokens cuts its last round, which wastes (r - 1) / 2 tokens on average. -> (r T / (T + waste), [a_k]).
    """
    verified, accepted = ([sum(getattr(s, name)[k] for s in samples) for k in range(len(samples[0].verified))]
                          for name in ("verified", "accepted"))
    share = [a / max(1, v) for a, v in zip(accepted, verified, strict=True)]
    r = product = 1.0
    for a in share:
        product *= a
        r += product
    tokens = sum(len(s.tokens) for s in samples) / len(samples)
    return r * tokens / (tokens + (r - 1) / 2), share


def question3(model: MiMo, prompts: list[list[int]], cfg: Config, n_draft: int, stop: tuple) -> list[dict]:
    """
    Speed-up of n_draft MTP layers at each batch size, measured and predicted:

        speed-up(B) = tokens per round * plain(B) / (verify(B) + draft(B) + rest(B))

    Each cost is linear between its values at the two smallest and the largest batch; the others are predicted.
    """
    best: dict[tuple, tuple] = {}                                   # (B, n) -> the fastest result of serve()
    for _ in range(cfg.rounds):
        for key in [(B, n) for B in cfg.batches for n in (0, n_draft)]:
            new = serve(model, prompts, *key, cfg.tokens, stop)
            best[key] = min(new, best.get(key, new), key=lambda found: found[0]["token"])
    ends = sorted({*cfg.batches[:2], cfg.batches[-1]})
    plain = interpolated({B: best[B, 0][0]["decode"] + best[B, 0][0]["rest"] for B in ends})
    verify, draft, rest = (interpolated({B: best[B, n_draft][0][name] for B in ends})
                           for name in ("decode", "draft", "rest"))
    rows = []
    for B in cfg.batches:
        per_round, share = tokens_per_round(best[B, n_draft][1])
        before, cost = plain(B), verify(B) + draft(B) + rest(B)
        row = {"batch": B, "measured": best[B, 0][0]["token"] / best[B, n_draft][0]["token"],
               "predicted": per_round * before / cost, "tokens_per_round": per_round, "acceptance": share,
               "plain_ms": 1e3 * before, "verify_ms": 1e3 * verify(B), "draft_ms": 1e3 * draft(B),
               "rest_ms": 1e3 * rest(B), "fitted": B in ends,
               "measured_ms": {f"{n} drafts": {k: 1e3 * t for k, t in best[B, n][0].items()} for n in (0, n_draft)}}
        rows.append(row)
        print(f"  batch {B:3}: {row['measured']:.2f}x measured, {row['predicted']:.2f}x predicted "
              f"({row['predicted'] / row['measured'] - 1:+.0%}); {per_round:.2f} tokens a round; plain step "
              f"{row['plain_ms']:.2f} ms, verify {row['verify_ms']:.2f} + draft {row['draft_ms']:.2f} "
              f"+ rest {row['rest_ms']:.2f} ms")
    return rows


def plot(rows: list[dict], path: Path, title: str) -> None:
    """The answer to question 3 as a figure."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(5.5, 3.6), constrained_layout=True)
    x = [r["batch"] for r in rows]
    ax.plot(x, [r["measured"] for r in rows], "o-", label="measured")
    ax.plot(x, [r["predicted"] for r in rows], "s--", label="cost model, fitted at three of them")
    ax.axhline(1, color="grey", lw=.8)
    ax.set(xscale="log", xticks=x, xticklabels=x, title=title)
    ax.set(xlabel="sequences decoded together", ylabel="speed-up by MTP")
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    fig.savefig(path, dpi=150)


def main(cfg: Config) -> None:
    """Export, load, three questions, one JSON file."""
    torch.set_num_threads(cfg.threads)
    out = configurator.writable(cfg.out)
    ckpt = find(cfg.ckpt) if cfg.ckpt else newest(ROOT / "out")
    if ckpt is None:
        raise UserError("no checkpoint under out/: run `make demo`")
    try:
        import transformers
    except ImportError:
        raise UserError("no transformers: pip install -r requirements-dev.txt") from None
    tokenizer, shape = Tokenizer.load(ckpt), ModelConfig(**read_shape(ckpt))
    model = mtp.build(shape)
    read_weights(ckpt, model)
    n_draft, peer = len(model.mtp_layers), load_transformers(ckpt)
    # short and long prompts by turns: maths first, then code
    problems = sorted(read_problems(cfg.problems), key=lambda p: p.id)
    kinds = [[p for p in problems if p.kind == kind] for kind in sorted({p.kind for p in problems})]
    mixed = [p for pair in zip(*kinds, strict=False) for p in pair][:cfg.requests]
    chat = read_meta(ckpt).get("chat", False)
    prompts, stop = [prompt_ids(tokenizer, p, chat) for p in mixed], stop_ids(tokenizer, chat)
    # lengths with a long tail, as rollouts have: most are short, a few take nearly all of the time
    lengths = [max(4, round(cfg.longest * ((i + 1) / len(prompts)) ** 4)) for i in range(len(prompts))]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [lengths[i] for i in order]
    print(f"{ckpt}: {shape.n_layer} layers, D = {shape.d_model}, {n_draft} MTP layers, "
          f"torch {torch.__version__}, transformers {transformers.__version__}, {cfg.threads} thread")

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {"command": " ".join(["python bench/generate.py", *sys.argv[1:]]), "commit": git.stdout.strip(),
              "checkpoint": str(ckpt), "shape": vars(shape), "torch": torch.__version__,
              "transformers": transformers.__version__, "python": platform.python_version(),
              "cpu": platform.processor() or platform.machine(), "threads": cfg.threads}

    # 1: one at a time. The engines are made, and their weights packed, before the clock starts, as transformers' model
    # was loaded before
    runs = [Request(i, p, cfg.tokens, 0.0, stop=stop) for i, p in enumerate(prompts[:cfg.singles])]
    plain, speculative = Engine(model, 1, 512), Engine(model, 1, 512, n_draft)
    sides = {"transformers": lambda: [theirs(peer, [r.prompt], r.max_new_tokens, stop)[0] for r in runs],
             "ours": lambda: [s.tokens for s in generate(plain, runs)],
             "ours + MTP": lambda: [s.tokens for s in generate(speculative, runs)]}
    texts = {name: f() for name, f in sides.items()}
    same = sum(a == b for a, b in zip(texts["ours"], texts["transformers"], strict=True))
    assert texts["ours"] == texts["ours + MTP"], "speculation changed a text"
    times = alternate(sides, cfg.rounds)
    n_tokens = sum(map(len, texts["ours"]))
    rate = {name: n_tokens / min(t) for name, t in times.items()}
    result["median_seconds"] = {name: statistics.median(t) for name, t in times.items()}
    single, spec = ratio(times, "ours", "transformers"), ratio(times, "ours + MTP", "ours")
    result["one_request"] = {"tokens_per_second": rate, "ratio": single, "mtp_ratio": spec,
                             "tokens": n_tokens / len(runs), "same_text": f"{same}/{len(runs)}"}
    print("1  one request at a time: " + ", ".join(f"{name} {r:,.0f} tokens/s" for name, r in rate.items())
          + f"; ours / transformers = {single:.2f}x, with MTP {single * spec:.2f}x (MTP / plain {spec:.2f}); "
          f"same text {same} of {len(runs)}")

    # 2: many, of skewed lengths
    runs = [Request(i, p, n, 0.0) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))]
    wide = Engine(model, cfg.requests, max(len(r.prompt) + r.max_new_tokens for r in runs))
    sides = {"transformers": lambda: theirs(peer, [r.prompt for r in runs], max(lengths)),
             "ours": lambda: [s.tokens for s in generate(wide, runs)]}
    texts = {name: f() for name, f in sides.items()}
    same = sum(b[:len(a)] == a for a, b in zip(texts["ours"], texts["transformers"], strict=True))
    times = alternate(sides, max(3, cfg.rounds // 2))
    result["median_seconds_skewed"] = {name: statistics.median(t) for name, t in times.items()}
    many = ratio(times, "ours", "transformers")
    rate = {name: sum(lengths) / min(t) for name, t in times.items()}
    mean = sum(lengths) / len(lengths)
    result["skewed_batch"] = {"useful_tokens_per_second": rate, "ratio": many,
                              "same_text": f"{same}/{len(runs)}", "requests": cfg.requests,
                              "mean_length": mean, "longest": max(lengths)}
    print(f"2  {cfg.requests} requests, answers of {min(lengths)} to {max(lengths)} tokens, mean {mean:.0f}: "
          + ", ".join(f"{name} {r:,.0f} useful tokens/s" for name, r in rate.items())
          + f"; ratio {many:.2f}x; same text {same} of {len(runs)}")

    # 3: where MTP pays
    print("3  speed-up by MTP against batch size")
    result["mtp"] = rows = question3(model, prompts, cfg, n_draft, stop) if n_draft else []
    result |= {"ratio": single, "ratios": {"one_request": single, "one_request_mtp": single * spec,
                                           "skewed_batch": many, "mtp_over_plain": spec}}
    out.write_text(json.dumps(result, indent=1))
    if rows:
        title = f"{n_draft} MTP layers on a trunk of {shape.n_layer}, one CPU thread"
        plot(rows, out.with_suffix(".png"), title)
    print(out)
    print(f"ours / transformers: {single:.2f}x at batch 1, {single * spec:.2f}x with MTP "
          f"(MTP / plain {spec:.2f}x), {many:.2f}x at {cfg.requests} skewed requests")


if __name__ == "__main__":
    configurator.run(main, Config)
