"""
Generate and chat in the terminal (report 2.2: speculative decoding; 3.5: temperature 0.6, top-p 0.95).

    python sample.py --mtp                                     # chat with the best model under out/
    python sample.py --prompt="What is 7+2-6?" --mtp --mark    # one answer; accepted drafts are marked
    python sample.py --prompt="What is 7+2-6?" --compare       # plain beside speculative, and the ratio
    python sample.py --ckpt=out/tiny/base --prompt="Every street in" --raw      # a base model continues text
    python sample.py --file=prompts.jsonl --out=answers.jsonl  # {"prompt": ...} or {"messages": [...]} per line
    python sample.py --plain --prompt="What is 7+2-6?"         # torch code only: set a breakpoint in engine.py

Which model. Without --ckpt: the newest chat model under out/, after RL before after SFT; the choice is printed.

How it is asked. A chat model gets the chat template. One that was trained on single questions (the checkpoint says so)
gets each line as a new question; others see the conversation. A base model of this project gets the form of its
training pages, "Problem: <your line>", then "Solution:". Imported base weights, and every model under --raw, continue
your text as it stands.

What is shown. Text appears as it is generated; a terminal gets control characters as \\x1b, a pipe or a file as they
are (data/text.py). With --mtp each accepted draft has the colour of the MTP layer that wrote it: green, cyan, magenta.
NO_COLOR and pipes get plain text; --mark writes ‹draft›¹ instead, with the number of the layer. A line behind each
answer gives tokens per second, memory traffic in GB/s, tokens per forward and acceptance per layer; in a chat the last
two count the whole session. Speculation never changes the text (engine.py). At the default temperature of 0.6 a
question that is asked twice in a chat may get two answers; --temperature=0 is greedy.

Numbers to expect from the demo's checkpoint on one CPU core: docs/engine.md.
"""
import codecs
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import configurator
import distributed
import kernels
import mtp
from checkpoint import find, newest, read_meta, read_shape
from configurator import UserError
from data.answers import Answers
from data.jsonl import json_line, line_of, read_jsonl
from data.problems import PLAIN, stop_ids
from data.sft_data import check_turns
from data.text import for_stdout, shown, typed, whole
from engine import Engine, Request, Sample
from model import MiMo, ModelConfig
from tokenizer import Tokenizer

COLOURS = ("32", "36", "35", "33")      # ANSI: layer 1 green, 2 cyan, 3 magenta, 4 yellow
MARKS = "¹²³⁴⁵⁶⁷⁸"                      # of layers 1 to 8, for --mark
Form = Literal["chat", "problem", "text"]       # how a prompt is asked: chat template, data.problems.PLAIN, as it is


@dataclass(frozen=True)
class Config:
    """The command line of sample.py."""
    ckpt: str = ""                        # a checkpoint or a run folder; "" = the best chat model under out/
    prompt: str = ""                      # one prompt; "" and no file = chat, line by line
    file: str = ""                        # JSONL in: {"prompt": text} or {"messages": [...]}, any other keys are kept
    out: str = ""                         # JSONL out for --file; "" = stdout. A run that was ended goes on
    system: str | None = None             # system prompt of a chat model; "" = an empty system turn; None = what its
                                          # chat template says without one
    raw: bool = False                     # continue the prompt as it stands: no chat template, no "Problem:" form
    n: int = 1                            # answers per prompt
    max_new_tokens: int = 256             # most tokens of an answer
    max_len: int = 0                      # longest prompt + answer, tokens; 0 = the model's context
    temperature: float = 0.6              # 0 = greedy [paper 3.5]
    top_p: float = 0.95                   # [paper 3.5]
    top_k: int = 0                        # 0 = off
    seed: int = 0                         # answer j of prompt i uses seed + i * n + j
    mtp: bool = False                     # speculative decoding with the model's MTP layers
    n_draft: int = 0                      # drafts a step: 0 = one per layer; of a single layer up to 7
    draft_ids: int = 0                    # drafts are among this many first ids, 0 = all: faster where ids are many
    mark: bool = False                    # with --mtp: mark accepted drafts in plain text, ‹token›¹, instead of colours
    compare: bool = False                 # run the prompts plain and speculative, print both and the ratio
    plain: bool = False                   # torch code only: no C, no Triton; for reading and debugging
    slots: int = 64                       # answers decoded at a time
    kv_tokens: int = 0                    # tokens in the KV cache, 0 = room for all slots; answers beyond it wait
    threads: int = 1                      # torch threads on CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"   # auto: CUDA when there is one

    def __post_init__(self) -> None:
        if self.prompt and self.file:
            raise ValueError("prompt and file: one of the two")
        if self.compare and not (self.prompt or self.file):
            raise ValueError("compare needs --prompt or --file")
        if self.out and not self.file:
            raise ValueError("out goes with file: it takes the answers to the prompts of --file")
        for name in ("mark", "n_draft", "draft_ids"):
            if getattr(self, name) and not (self.mtp or self.compare and name != "mark"):
                raise ValueError(f"{name} goes with mtp, speculative decoding: add --mtp")
        configurator.at_least(self, 1, "n", "max_new_tokens", "slots", "threads")
        configurator.at_least(self, 0, "temperature", "top_k", "n_draft", "draft_ids", "max_len", "kv_tokens",
                              "seed")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} should be in (0, 1]")


@torch.no_grad()
def main(cfg: Config) -> None:
    """Answer --prompt or --file, or talk."""
    kernels.set_plain(cfg.plain)
    rt = distributed.setup(threads=cfg.threads, seed=cfg.seed, device=cfg.device)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)                   # what is done is on the disk
    ckpt = find(cfg.ckpt) if cfg.ckpt else best_checkpoint("out")
    meta, tokenizer = read_meta(ckpt), Tokenizer.load(ckpt)
    if cfg.system is not None:
        tokenizer = tokenizer.with_system(cfg.system)
    model = mtp.build(configurator.from_dict(ModelConfig, read_shape(ckpt), f"{ckpt}/model.json"), "meta")
    model = model.to(checkpoint.inference_dtype(ckpt, rt))
    if tokenizer.n_ids > model.cfg.vocab_size:
        raise UserError(f"{ckpt}: its tokenizer has {tokenizer.n_ids:,} ids, its model rows for "
                        f"{model.cfg.vocab_size:,}")
    if cfg.max_len > model.cfg.max_seq_len:
        raise UserError(f"max_len = {cfg.max_len} is longer than the context of {ckpt}, max_seq_len = "
                        f"{model.cfg.max_seq_len}")
    model = checkpoint.materialise(model, rt, ckpt=ckpt).to(rt.device)
    layers = len(model.mtp_layers)
    if (cfg.mtp or cfg.compare) and layers == 0:
        raise UserError(f"{ckpt} has no MTP layers to draft with; run without --mtp")
    n_draft = cfg.n_draft or layers
    mtp.check_drafts(n_draft, layers, str(ckpt))
    size = sum(p.numel() for p in model.parameters())
    kind, form = "chat" if meta.get("chat") else "base", form_of(meta, cfg.raw)
    note(f"{ckpt}  {kind} model, {size:,} parameters, {layers} MTP layers, {rt.device}")
    if not (cfg.prompt or cfg.file):
        return talk(model, tokenizer, form, meta, ckpt, n_draft if cfg.mtp else 0, cfg)
    rows = read_file(cfg.file) if cfg.file else [{"prompt": whole(cfg.prompt)}]
    requests = make_requests(rows, tokenizer, form, cfg, model.cfg.max_seq_len)
    if form == "problem" and cfg.prompt and not cfg.prompt.startswith("Problem:"):
        note('asked in the form of its training pages, "Problem: ... Solution:"; --raw continues your text instead')
    if cfg.compare:
        return compare(model, requests, tokenizer, n_draft, cfg)
    if cfg.out:
        configurator.writable(cfg.out)
    engine = engine_for(model, requests, tokenizer, n_draft if cfg.mtp else 0, cfg, keep_weights=False)
    if cfg.file:
        return answer_file(engine, requests, rows, tokenizer, ckpt, cfg)
    for request in requests:
        sample, seconds = stream(engine, request, tokenizer, cfg.mark)
        note(f"[{speed([sample], seconds, engine)}{speculation([sample], engine)}]")


def note(text: str) -> None:
    """For the person, not for the pipe."""
    print(shown(text), file=sys.stderr)


# ---- which model ----------------------------------------------------------------------------------------------------

def best_checkpoint(root: str) -> Path:
    """
    The checkpoint for somebody who named none: the newest chat model under root, after RL before after SFT before
    others; without chat models the newest base model. Prints the choice. UserError when there is none.
    """
    def rank(meta: dict) -> int:
        return {"rl": 0, "sft": 1}.get(meta.get("stage"), 2) if meta.get("chat") else 3

    if ckpt := newest(root, lambda run: rank(newest_meta(run))):
        kind = rank(newest_meta(ckpt.parent))
        what = ("RL chat model", "SFT chat model", "chat model", "base model (there is no chat model)")[kind]
        note(f"{ckpt.parent}: the newest {what}; --ckpt=DIR takes another")
        return ckpt
    raise UserError(f"no checkpoint under {root}/: `make demo` trains one in about a quarter of an hour")


def newest_meta(run: Path) -> dict:
    """The meta of the checkpoint that `latest` names, {} where it cannot be read; no file is checked."""
    try:
        return read_meta(run / (run / "latest").read_text(encoding="utf-8").strip())
    except (OSError, ValueError, KeyError):
        return {}


# ---- prompts --------------------------------------------------------------------------------------------------------

def form_of(meta: dict, raw: bool) -> Form:
    """How a model is asked, from the meta of its checkpoint; imported base weights know no form of their own."""
    if raw:
        return "text"
    if meta.get("chat"):
        return "chat"
    return "problem" if meta.get("stage") in ("base", "rl") else "text"


def read_file(path: str) -> list[dict]:
    """One JSON object per line with "prompt" or "messages". UserError names file and line."""
    rows, right = [], 'should have "prompt": text or "messages": [{"role", "content"}, ...]'
    for n, row in read_jsonl(path, right):
        with line_of(path, n, right):
            if "messages" in row:
                check_turns(row["messages"])
            elif not isinstance(row["prompt"], str) or not row["prompt"]:
                raise ValueError(f"prompt = {row['prompt']!r} is no text")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no prompts in it; a line {right}")
    return rows


def prompt_tokens(row: dict, tokenizer: Tokenizer, form: Form) -> list[int]:
    """The token ids of {"prompt"} or {"messages"} in the form that the model was trained on."""
    if form != "chat":
        text = row.get("prompt") or "\n".join(m["content"] for m in row["messages"])
        if form == "problem" and not text.startswith("Problem:"):
            text = PLAIN.format(question=text)
        return tokenizer.encode(text)
    turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return tokenizer.chat(turns, add_generation_prompt=True)[0]


def make_requests(rows: list[dict], tokenizer: Tokenizer, form: Form, cfg: Config, context: int) -> list[Request]:
    """cfg.n requests per row, with ids (row, answer). context: the model's, tokens. UserError names the prompt."""
    requests, limit, stop = [], cfg.max_len or context, stop_ids(tokenizer, chat=form != "problem")
    for i, row in enumerate(rows):
        try:
            ids = prompt_tokens(row, tokenizer, form)
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"prompt {i + 1}: {e}") from None
        if not 1 <= len(ids) < limit:
            raise UserError(f"prompt {i + 1} has {len(ids)} tokens, should have 1 to {limit - 1}")
        requests += [Request((i, j), ids, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k, stop,
                             cfg.seed + i * cfg.n + j) for j in range(cfg.n)]
    return requests


def engine_for(model: MiMo, requests: list[Request], tokenizer: Tokenizer, n_draft: int, cfg: Config,
               keep_weights: bool = True) -> Engine:
    """An engine just large enough for these requests."""
    limit = cfg.max_len or model.cfg.max_seq_len
    longest = min(limit, max(len(r.prompt) + r.max_new_tokens for r in requests))
    return Engine(model, min(cfg.slots, len(requests)), longest, n_draft, draft_ids=cfg.draft_ids,
                  kv_tokens=cfg.kv_tokens, n_ids=tokenizer.n_ids, keep_weights=keep_weights)


# ---- answers --------------------------------------------------------------------------------------------------------

def run_requests(engine: Engine, requests: list[Request], watch: Callable[[dict], None] | None = None,
                 keep: Callable[[list], None] = list) -> tuple[dict[tuple, Sample], float]:
    """
    -> (samples by id, seconds). After every step watch(samples so far) is called, and keep(those that ended in it).
    Resets the engine's counters.
    """
    done, start = {}, time.perf_counter()
    engine.steps = engine.sequence_steps = 0
    for request in requests:
        engine.add(request)
    while len(done) < len(requests):
        new = engine.step()
        done |= {s.id: s for s in new}
        keep(new)
        if watch:
            watch(done)
    return done, time.perf_counter() - start


def answer_text(sample: Sample, tokenizer: Tokenizer) -> str:
    """The answer without the token that stopped it."""
    return tokenizer.decode(sample.tokens[:-1] if sample.finish == "stop" else sample.tokens, skip_control=True)


def answer_file(engine: Engine, requests: list[Request], rows: list[dict], tokenizer: Tokenizer, ckpt: Path,
                cfg: Config) -> None:
    """
    The row of each prompt with its "answers" and why they ended, "finish". With --out a row is kept as soon as it is
    complete (data/answers.py), and the same command asks what is missing; the file itself comes at the end, in the
    order of the prompts. Without it rows go to stdout in that order, each as soon as those before it are there.
    """
    answers = Answers(Path(cfg.out), made_with(rows, ckpt, cfg)) if cfg.out else None
    waiting: dict[int, dict[int, Sample]] = {i: {} for i in range(len(rows))}      # prompt -> its samples by number
    done: dict[int, dict] = {}                                      # rows that wait for those before them
    if answers:
        waiting = {i: {} for i in waiting if i not in answers.done}
        if answers.done:
            note(f"{len(answers.done):,} of {len(rows):,} prompts were answered before")

    def keep(new: list[Sample]) -> None:
        for s in new:
            i, j = s.id
            waiting[i][j] = s
            if len(waiting[i]) < cfg.n:
                continue
            samples = [waiting[i][j] for j in range(cfg.n)]
            row = rows[i] | {"answers": [answer_text(s, tokenizer) for s in samples],
                             "finish": [s.finish for s in samples]}
            if answers:
                answers.add(i, row)
                continue
            done[i] = row
            while (first := len(rows) - len(waiting)) in done:
                del waiting[first]
                print_row(done.pop(first))

    samples, seconds = run_requests(engine, [r for r in requests if r.id[0] in waiting], keep=keep)
    if answers:
        answers.finish(range(len(rows)))
        note(f"{cfg.out}: {len(rows)} lines")
    if samples:
        note(f"[{speed(list(samples.values()), seconds, engine)}{speculation(list(samples.values()), engine)}]")


def made_with(rows: list[dict], ckpt: Path, cfg: Config) -> dict:
    """All that the answers depend on: what is there already goes on with the same alone."""
    files = checkpoint.read_manifest(ckpt)["files"] if (ckpt / "manifest.json").is_file() else {}
    prompts = hashlib.sha256(b"".join(json_line(row) for row in rows)).hexdigest()[:16]
    names = ("system", "raw", "n", "max_new_tokens", "max_len", "temperature", "top_p", "top_k", "seed")
    return {"ckpt": str(ckpt), "weights": [files[name][1][:16] for name in sorted(files) if name.startswith("model")],
            "prompts": prompts, **{name: getattr(cfg, name) for name in names}}


def print_row(row: dict) -> None:
    """A line of JSON on stdout, in an encoding that lacks characters as JSON writes them in ASCII."""
    line = for_stdout(json_line(row).decode())
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(row) + "\n"
    sys.stdout.write(line)
    sys.stdout.flush()


def stream(engine: Engine, request: Request, tokenizer: Tokenizer, mark: bool = False) -> tuple[Sample, float]:
    """One answer, written as it grows; accepted drafts are coloured, or marked. -> (sample, seconds)."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    decoder = StreamingDecoder(tokenizer)
    n_shown, accepted_before = 0, [0] * engine.n_draft

    def show(sample: Sample) -> None:
        """
        The tokens of one round: first its accepted drafts, one for each layer whose count went up, then the token that
        the trunk added.
        """
        nonlocal n_shown, accepted_before
        layers = [k for k in range(engine.n_draft) if sample.accepted[k] > accepted_before[k]]
        for i, token in enumerate(sample.tokens[n_shown:]):
            text = for_stdout(decoder.add(token)) if token not in request.stop else ""
            if text and i < len(layers) and mark:                   # a line break is drawn inside its mark, and follows
                text = "‹{}›{}{}".format(text.replace("\n", "↵"), MARKS[layers[i]], "\n" * text.count("\n"))
            elif text and i < len(layers) and colour:
                text = f"\x1b[{COLOURS[layers[i] % len(COLOURS)]}m{text}\x1b[0m"
            sys.stdout.write(text)
        n_shown, accepted_before = len(sample.tokens), list(sample.accepted)
        sys.stdout.flush()

    def watch(done: dict) -> None:
        if done:
            show(done[request.id])
        else:
            show(engine.progress(request.id))
    done, seconds = run_requests(engine, [request], watch)
    print(for_stdout(decoder.rest()))
    return done[request.id], seconds


class StreamingDecoder:
    """
    Tokens to text, one by one: a character is held back until all its bytes are there. Control tokens are silent. The
    pieces together are what Tokenizer.decode makes of all tokens at once.
    """
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that this token completes, often "" for a part of a character."""
        return self.decoder.decode(self.tokenizer.bytes_of([token], skip_control=True))

    def rest(self) -> str:
        """What is still held back at the end."""
        return self.decoder.decode(b"", final=True)


def compare(model: MiMo, requests: list[Request], tokenizer: Tokenizer, n_draft: int, cfg: Config) -> None:
    """The same prompts plain and speculative, by turns, three times; the best of each. The ratio comes last."""
    engines = {name: engine_for(model, requests, tokenizer, n, cfg)
               for name, n in {"plain": 0, "speculative": n_draft}.items()}
    best: dict[str, tuple] = {}
    for _ in range(3):
        for name, engine in engines.items():
            done, seconds = run_requests(engine, requests)
            if name not in best or seconds < best[name][1]:
                samples = list(done.values())
                best[name] = done, seconds, f"[{speed(samples, seconds, engine)}{speculation(samples, engine)}]"
    plain, speculative = best["plain"], best["speculative"]
    if not cfg.file:
        print(for_stdout(answer_text(speculative[0][requests[0].id], tokenizer)))
    for name, (_, _, text) in best.items():
        note(f"{name:<12} {text}")
    same = sum(plain[0][r.id].tokens == speculative[0][r.id].tokens for r in requests)
    note(f"same text: {same} of {len(requests)}")
    print(f"speculative / plain = {plain[1] / speculative[1]:.2f}x")


# ---- numbers --------------------------------------------------------------------------------------------------------

def speed(samples: list[Sample], seconds: float, engine: Engine) -> str:
    """
    Tokens, tokens per second, GB/s. GB/s counts what a step has to read: the trunk's weights once, those of each MTP
    layer and lm_head again for each draft, and the keys and values of the sequences.
    """
    tokens = sum(len(s.tokens) for s in samples)
    rate = bytes_read(samples, engine) / seconds / 1e9
    return f"{tokens} tokens, {tokens / seconds:,.0f} tokens/s, {rate:.2f} GB/s"


def speculation(samples: list[Sample], engine: Engine) -> str:
    """Tokens per forward and acceptance per layer, or per draft of a single layer; "" without drafts."""
    if not engine.n_draft:
        return ""
    tokens = sum(len(s.tokens) for s in samples)
    text = f", {tokens / max(1, engine.sequence_steps):.2f} tokens per forward, drafts accepted:"
    for k, share in enumerate(acceptance(samples)):
        text += f" {'layer' if len(engine.model.mtp_layers) >= engine.n_draft else 'draft'} {k + 1} {share}"
    return text


def acceptance(samples: list[Sample]) -> list[str]:
    """Per MTP layer: accepted / verified drafts, in per cent; "-" where none was verified."""
    pairs = [(sum(s.accepted[k] for s in samples), sum(s.verified[k] for s in samples))
             for k in range(len(samples[0].verified))]
    return [f"{accepted / verified:.0%}" if verified else "-" for accepted, verified in pairs]


def bytes_read(samples: list[Sample], engine: Engine) -> float:
    """Bytes of weights, keys and values that the engine's steps since its counters' reset have read, about."""
    cfg, n = engine.model.cfg, engine.n_draft
    size, head = engine.model.embed_tokens.weight.element_size(), cfg.vocab_size * cfg.d_model
    step = cfg.n_layer * cfg.block_params() + head + n * (cfg.block_params() + 2 * cfg.d_model ** 2 + head)
    # a sequence's keys and values are read once per forward, at half its answer's length on average
    kv = 2 * cfg.n_kv_head * cfg.head_dim * (cfg.n_layer + n) * engine.runner.kv.element_size()
    forwards = engine.sequence_steps / max(1, sum(len(s.tokens) for s in samples))
    cached = sum(len(s.tokens) * forwards * (len(s.prompt) + len(s.tokens) / 2) for s in samples)
    return size * engine.steps * step + cached * kv


# ---- talking --------------------------------------------------------------------------------------------------------

def talk(model: MiMo, tokenizer: Tokenizer, form: Form, meta: dict, ckpt: Path, n_draft: int, cfg: Config) -> None:
    """
    Line in, answer out, until an empty line. A chat model that was trained on conversations sees the earlier turns, of
    which the oldest are dropped when the context is full; for every other model a line stands alone.
    """
    limit = cfg.max_len or model.cfg.max_seq_len
    engine = Engine(model, 1, limit, n_draft, draft_ids=cfg.draft_ids, n_ids=tokenizer.n_ids, keep_weights=False)
    # checkpoints written before the key "turns" came: this project's own training data are single questions
    turns_of_training = meta.get("turns") or ("single" if meta.get("stage") in ("sft", "rl") else "multi")
    remembers = form == "chat" and turns_of_training == "multi"
    greet(form, remembers, *suggestions(meta, ckpt))
    if cfg.temperature:
        note(f"Answers are sampled at temperature {cfg.temperature:g} and vary; --temperature=0: the likeliest token.")
    turns: list[dict] = []
    samples: list[Sample] = []                                      # of the session
    forwards = 0
    for i in range(sys.maxsize):
        try:
            line = typed(input("> " if sys.stdin.isatty() else ""))
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            return
        turns = [*turns, {"role": "user", "content": line}] if remembers else [{"role": "user", "content": line}]
        while len(turns) > 1:
            if len(prompt_tokens({"messages": turns}, tokenizer, form)) + cfg.max_new_tokens <= limit:
                break
            turns = turns[2:]                                       # a question and its answer
        try:
            one = replace(cfg, n=1, seed=cfg.seed + i)
            request = replace(make_requests([{"messages": turns}], tokenizer, form, one, limit)[0], id=i)
            sample, seconds = stream(engine, request, tokenizer, cfg.mark)
        except KeyboardInterrupt:
            engine.abort(i)                                         # Ctrl-C stops the answer, not the conversation,
            turns = turns[:-1]                                      # which goes on without the question
            print()
            continue
        except UserError as e:
            note(f"error: {e}")
            turns = turns[:-1]
            continue
        samples, forwards, line = [*samples, sample], forwards + engine.sequence_steps, speed([sample], seconds, engine)
        note(f"[{line}{session(samples, forwards) if n_draft else ''}]")
        turns = [*turns, {"role": "assistant", "content": answer_text(sample, tokenizer)}]


def suggestions(meta: dict, ckpt: Path) -> tuple[str, list[str]]:
    """
    (heading, at most three questions to ask): held-out problems that the model answered right in every sample of its
    evaluation (eval.py writes eval_answers.jsonl into the run's folder), else those that its checkpoint names.
    """
    path = ckpt.parent / "eval_answers.jsonl"
    rows = [row for _, row in read_jsonl(path)] if path.is_file() else []
    solved = sorted((row["question"] for row in rows if all(a["passed"] for a in row["answers"])), key=len)
    if solved:                                                      # the shortest, and two that ask for more
        some = dict.fromkeys(solved[i * (len(solved) - 1) // 4] for i in range(3))
        return "Held-out problems that it has answered right:", list(some)
    return "Questions from its held-out problems:", meta.get("examples", [])[:3]


def greet(form: Form, remembers: bool, heading: str, examples: list[str]) -> None:
    """What to type, and what becomes of it. examples: questions to begin with."""
    if form == "chat":
        rule = "The model sees the whole conversation; the oldest turns go when its context is full" if remembers else \
            "This model was trained on single questions: each line is a new question, earlier lines are forgotten"
    elif form == "problem":
        rule = 'A base model: each line is asked in the form of its training pages, "Problem: <line> Solution:"; ' \
            "--raw continues your line as it stands"
    else:
        rule = "The model continues your line as it stands"
    note(f"{rule}. An empty line ends it.")
    if examples:
        note("\n".join([heading, *("    " + " ".join(question.split()) for question in examples)]))


def session(samples: list[Sample], forwards: int) -> str:
    """Speculation over a whole chat: "; so far: 3 answers, 214 tokens, 2.90 tokens per forward, drafts ..."."""
    n, tokens = len(samples), sum(len(s.tokens) for s in samples)
    return (f"; so far: {n} answer{'s' * (n > 1)}, {tokens} tokens, {tokens / max(1, forwards):.2f} tokens per "
            f"forward, drafts accepted {' '.join(acceptance(samples))}")


if __name__ == "__main__":
    configurator.run(main, Config)
