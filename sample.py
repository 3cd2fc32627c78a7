"""
Generate and chat in the terminal (report 2.2: speculative decoding; 3.5: temperature 0.6, top-p 0.95).

    python sample.py --mtp                                     # chat with the newest checkpoint under out/
    python sample.py --ckpt=out/tiny/base --prompt="Problem: 3 + 4 =" --mtp
    # plain beside speculative, and the ratio
    python sample.py --ckpt=out/tiny/rl --prompt="..." --mtp --compare
    python sample.py --file=prompts.jsonl --out=answers.jsonl  # {"prompt": ...} or {"messages": [...]} a line

Text appears as it is made. With --mtp each token that was a draft is coloured by the MTP layer that guessed
it (NO_COLOR and pipes get plain text), and a line behind each answer tells tokens per second, memory traffic
in GB/s, tokens per forward and acceptance per layer. Speculation never changes the text (engine.py).

A base model continues the prompt; a chat model (meta "chat" of its checkpoint) answers it through the
template. Expect on the demo's checkpoint, one CPU core: docs/engine.md.
"""
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch

import checkpoint
import configurator
import distributed
import mtp
from checkpoint import find, newest, read_meta, read_shape
from data.jsonl import line_of, read_jsonl, write_jsonl
from data.sft_data import check_turns
from engine import Engine, Request, Sample
from model import MiMo, ModelConfig
from tokenizer import Tokenizer

COLOURS = ("32", "36", "35", "33")      # ANSI: layer 1 green, 2 cyan, 3 magenta, 4 yellow


@dataclass(frozen=True)
class Config:
    ckpt: str = ""                        # a checkpoint or a run folder; "" = the newest under out/
    prompt: str = ""                      # one prompt; "" and no file = chat (chat models) or lines (base models)
    file: str = ""                        # JSONL in: {"prompt": text} or {"messages": [...]}, any other keys are kept
    out: str = ""                         # JSONL out for --file; "" = stdout
    system: str = ""                      # system prompt of a chat model, "" = none
    n: int = 1                            # answers per prompt
    max_new_tokens: int = 256                 # most tokens of an answer
    max_len: int = 0                      # longest prompt + answer, tokens; 0 = the model's context
    temperature: float = 0.6              # 0 = greedy [paper 3.5]
    top_p: float = 0.95                   # [paper 3.5]
    top_k: int = 0                        # 0 = off
    seed: int = 0                         # answer j of prompt i uses seed + i * n + j
    mtp: bool = False                     # speculative decoding with the model's MTP layers
    n_draft: int = 0                      # how many of them, 0 = all
    compare: bool = False                 # run the prompts plain and speculative, print both and the ratio
    slots: int = 64                       # answers decoded at a time
    threads: int = 1                      # torch threads on CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"   # auto: CUDA when there is one

    def __post_init__(self):
        if self.prompt and self.file:
            raise ValueError("prompt and file: one of the two")
        if self.compare and not (self.prompt or self.file):
            raise ValueError("compare needs --prompt or --file")
        if self.out and not self.file:
            raise ValueError("out goes with file: it takes the answers to the prompts of --file")
        configurator.at_least(self, 1, "n", "max_new_tokens", "slots", "threads")
        configurator.at_least(self, 0, "temperature", "top_k", "n_draft", "max_len")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} should be in (0, 1]")


def main(cfg: Config) -> None:
    rt = distributed.setup(threads=cfg.threads, seed=cfg.seed, device=cfg.device)
    ckpt = find(cfg.ckpt) if cfg.ckpt else newest("out")
    if ckpt is None:
        raise SystemExit("error: no checkpoint under out/: `make demo` trains one in about a quarter of an hour")
    tokenizer, chat = Tokenizer.load(ckpt), bool(read_meta(ckpt).get("chat", False))
    model = mtp.build(configurator.from_dict(ModelConfig, read_shape(ckpt), f"{ckpt}/model.json"), "meta").to(rt.dtype)
    if cfg.max_len > model.cfg.max_seq_len:
        raise SystemExit(f"error: max_len = {cfg.max_len} is longer than the context of {ckpt}, max_seq_len = "
                         f"{model.cfg.max_seq_len}")
    model = checkpoint.materialise(model, rt, ckpt=ckpt).to(rt.device)
    layers = len(model.mtp_layers)
    if (cfg.mtp or cfg.compare) and layers == 0:
        raise SystemExit(f"error: {ckpt} has no MTP layers to draft with; run without --mtp")
    n_draft = min(cfg.n_draft or layers, layers)
    size = sum(p.numel() for p in model.parameters())
    note(f"{ckpt}  {'chat' if chat else 'base'} model, {size:,} parameters, {layers} MTP layers, {rt.device}")
    if cfg.prompt or cfg.file:
        rows = read_file(cfg.file) if cfg.file else [{"prompt": cfg.prompt}]
        requests = make_requests(rows, tokenizer, chat, cfg, model.cfg.max_seq_len)
        if cfg.compare:
            return compare(model, requests, tokenizer, n_draft, cfg)
        answer(model, requests, rows, tokenizer, n_draft if cfg.mtp else 0, cfg)
    else:
        talk(model, tokenizer, chat, n_draft if cfg.mtp else 0, cfg)


def note(text: str) -> None:
    """For the person, not for the pipe."""
    print(text, file=sys.stderr)


# ---- prompts -----------------------------------------------------------------------------------------------

def read_file(path: str) -> list[dict]:
    """One JSON object a line with "prompt" or "messages". Ends the run naming file and line."""
    rows, right = [], 'should have "prompt": text or "messages": [{"role", "content"}, ...]'
    for n, row in read_jsonl(path, right):
        with line_of(path, n, right):
            if "messages" in row:
                check_turns(row["messages"])
            elif not isinstance(row["prompt"], str) or not row["prompt"]:
                raise ValueError(f"prompt = {row['prompt']!r} is no text")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no prompts in it; a line {right}")
    return rows


def prompt_tokens(row: dict, tokenizer: Tokenizer, chat: bool, system: str) -> list[int]:
    """The chat template for chat models, the bare text for base models."""
    if not chat:
        text = row.get("prompt") or "\n".join(m["content"] for m in row["messages"])
        return tokenizer.encode(text)
    turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    if system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return tokenizer.chat(turns, add_generation_prompt=True)[0]


def make_requests(rows: list[dict], tokenizer: Tokenizer, chat: bool, cfg: Config, context: int,
                  ) -> list[Request]:
    requests, limit = [], cfg.max_len or context
    for i, row in enumerate(rows):
        try:
            ids = prompt_tokens(row, tokenizer, chat, cfg.system)
        except (ValueError, KeyError, TypeError) as e:
            raise SystemExit(f"error: prompt {i + 1}: {e}") from None
        if not 1 <= len(ids) < limit:
            raise SystemExit(f"error: prompt {i + 1} has {len(ids)} tokens, should have 1 to {limit - 1}")
        stop = tokenizer.eos_id, tokenizer.im_end_id
        requests += [Request((i, j), ids, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k, stop,
                             cfg.seed + i * cfg.n + j) for j in range(cfg.n)]
    return requests


def engine_for(model: MiMo, requests: list[Request], tokenizer: Tokenizer, n_draft: int, cfg: Config) -> Engine:
    limit = cfg.max_len or model.cfg.max_seq_len
    longest = min(limit, max(len(r.prompt) + r.max_new_tokens for r in requests))
    return Engine(model, min(cfg.slots, len(requests)), longest, n_draft, n_ids=tokenizer.n_ids)


# ---- running -----------------------------------------------------------------------------------------------

def run(engine: Engine, requests: list[Request], watch=None) -> tuple[dict[tuple, Sample], float]:
    """-> (samples by id, seconds). watch(engine) is called after every step."""
    done, start = {}, time.perf_counter()
    engine.steps = engine.rows = 0
    for request in requests:
        engine.add(request)
    while len(done) < len(requests):
        done |= {s.id: s for s in engine.step()}
        if watch:
            watch(engine, done)
    return done, time.perf_counter() - start


def answer(model: MiMo, requests: list[Request], rows: list[dict], tokenizer: Tokenizer, n_draft: int,
           cfg: Config) -> None:
    """All prompts; one alone is streamed, a file becomes JSON lines."""
    engine = engine_for(model, requests, tokenizer, n_draft, cfg)
    if cfg.out:
        configurator.writable(cfg.out)
    if not cfg.file:
        for request in requests:
            sample, seconds = stream(engine, request, tokenizer)
            note(figures([sample], seconds, engine))
        return
    done, seconds = run(engine, requests)
    lines = []
    for i, row in enumerate(rows):
        mine = [done[i, j] for j in range(cfg.n)]
        lines.append(row | {"answers": [tokenizer.decode(s.tokens, skip_control=True) for s in mine],
                            "finish": [s.finish for s in mine]})
    if cfg.out:
        write_jsonl(cfg.out, lines)
        note(f"{cfg.out}: {len(lines)} lines")
    else:
        print("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    note(figures(list(done.values()), seconds, engine))


def stream(engine: Engine, request: Request, tokenizer: Tokenizer) -> tuple[Sample, float]:
    """One answer, written as it grows: a token that was an accepted draft in the colour of its layer."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    pieces = Pieces(tokenizer)
    seen, right = 0, [0] * engine.n_draft

    def show(tokens: list[int], accepted: list[int]) -> None:
        """The tokens of one round: as many accepted drafts as layers counted up, then the trunk's own."""
        nonlocal seen, right
        layers = [k for k in range(engine.n_draft) if accepted[k] > right[k]]
        for i, token in enumerate(tokens[seen:]):
            text = pieces.add(token)
            code = COLOURS[layers[i] % len(COLOURS)] if colour and i < len(layers) else None
            sys.stdout.write(f"\x1b[{code}m{text}\x1b[0m" if code and text else text)
        seen, right = len(tokens), list(accepted)
        sys.stdout.flush()

    def watch(engine: Engine, done: dict) -> None:
        if done:
            sample = done[request.id]
            show(sample.tokens, list(sample.accepted))
        elif engine.decoding:
            partial = engine.result(0, "")
            show(partial.tokens, list(partial.accepted))
    done, seconds = run(engine, [request], watch)
    print(pieces.rest())
    return done[request.id], seconds


class Pieces:
    """Tokens to text, bit by bit: a character is held back until all of its bytes are there. Controls stay
silent."""
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.held = tokenizer, []

    def add(self, token: int) -> str:
        self.held.append(token)
        text = self.tokenizer.decode(self.held, skip_control=True)
        if text.endswith("\ufffd") and len(self.held) < 8:
            return ""
        self.held = []
        return text

    def rest(self) -> str:
        return self.tokenizer.decode(self.held, skip_control=True) if self.held else ""


def figures(samples: list[Sample], seconds: float, engine: Engine) -> str:
    """
    Tokens per second, GB/s, tokens per forward, acceptance. GB/s counts what a step has to read: the weights
    of the trunk once a step, those of the MTP layers and the head again for each draft, and the sequences'
    keys and values.
    """
    tokens = sum(len(s.tokens) for s in samples)
    rate = bytes_read(samples, engine) / seconds / 1e9
    text = f"[{tokens} tokens, {tokens / seconds:,.0f} tokens/s, {rate:.2f} GB/s"
    if engine.n_draft:
        text += f", {tokens / max(1, engine.rows):.2f} tokens per forward, drafts accepted:"
    for k in range(engine.n_draft):
        share = sum(s.accepted[k] for s in samples) / max(1, sum(s.verified[k] for s in samples))
        text += f" layer {k + 1} {share:.0%}"
    return text + "]"


def bytes_read(samples: list[Sample], engine: Engine) -> float:
    m, n = engine.model, engine.n_draft
    size = m.lm_head.weight.element_size()

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())
    head = count(m.lm_head)
    step = sum(map(count, m.layers)) + head + sum(count(layer) + head for layer in m.mtp_layers[:n])
    # a sequence's keys and values are read once a forward, at half its answer's length on average
    kv = 2 * m.cfg.n_kv_head * m.cfg.head_dim * (m.cfg.n_layer + n)
    forwards = engine.rows / max(1, sum(len(s.tokens) for s in samples))
    cached = sum(len(s.tokens) * forwards * (len(s.prompt) + len(s.tokens) / 2) for s in samples)
    return size * (engine.steps * step + cached * kv)


def compare(model: MiMo, requests: list[Request], tokenizer: Tokenizer, n_draft: int, cfg: Config) -> None:
    """The same prompts plain and speculative, by turns, three times; best of each. The ratio comes last."""
    kinds = {"plain": 0, "speculative": n_draft}
    engines = {name: engine_for(model, requests, tokenizer, n, cfg) for name, n in kinds.items()}
    best: dict[str, tuple] = {}
    for _ in range(3):
        for name, engine in engines.items():
            done, seconds = run(engine, requests)
            if name not in best or seconds < best[name][1]:
                best[name] = done, seconds, figures(list(done.values()), seconds, engine)
    plain, fast = best["plain"], best["speculative"]
    if not cfg.file:
        print(tokenizer.decode(fast[0][requests[0].id].tokens, skip_control=True))
    for name, (_, _, text) in best.items():
        note(f"{name:<12} {text}")
    same = sum(plain[0][r.id].tokens == fast[0][r.id].tokens for r in requests)
    note(f"same text: {same} of {len(requests)}")
    print(f"speculative / plain = {plain[1] / fast[1]:.2f}x")


# ---- talking -----------------------------------------------------------------------------------------------

def talk(model: MiMo, tokenizer: Tokenizer, chat: bool, n_draft: int, cfg: Config) -> None:
    """Line in, answer out, until an empty line. A chat model remembers; the oldest turns go first."""
    limit = cfg.max_len or model.cfg.max_seq_len
    engine = Engine(model, 1, limit, n_draft, n_ids=tokenizer.n_ids)
    turns: list[dict] = []
    note("An empty line ends it." if chat else "A base model continues your line. An empty line ends it.")
    for i in range(sys.maxsize):
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            return
        turns = [*turns, {"role": "user", "content": line}] if chat else []
        row = {"messages": turns} if chat else {"prompt": line}
        while chat and len(turns) > 1:
            if len(prompt_tokens(row, tokenizer, chat, cfg.system)) + cfg.max_new_tokens <= limit:
                break
            turns = turns[2:]                                       # a question and its answer
            row = {"messages": turns}
        try:
            one = replace(cfg, n=1, seed=cfg.seed + i)
            request = replace(make_requests([row], tokenizer, chat, one, limit)[0], id=i)
            sample, seconds = stream(engine, request, tokenizer)
        except KeyboardInterrupt:
            engine.abort(i)                                    # Ctrl-C stops the answer, not the conversation
            print()
            continue
        except SystemExit as e:
            note(str(e))
            turns = turns[:-1]
            continue
        note(figures([sample], seconds, engine))
        if chat:
            said = tokenizer.decode(sample.tokens, skip_control=True)
            turns = [*turns, {"role": "assistant", "content": said}]


if __name__ == "__main__":
    with torch.no_grad():
        configurator.run(main, Config)
