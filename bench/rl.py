"""
One RL iteration of rl.py beside TRL's GRPOTrainer: the same weights, prompts, lengths and reward, on one CPU thread.

    pip install trl transformers          # the peer; never needed by the recipe
    python bench/rl.py                                      # the demo's SFT model, 1.3M parameters; eight minutes
    python bench/rl.py --size=27m --rounds=3                # random weights: D = 512, 6 layers, V = 8,192

Ours is rl.py's own main(): only the call that starts the next rollout waits for its turn. TRL's is GRPOTrainer.train()
over the export of the same checkpoint (hf.py, qwen2), with the loss "dapo" and the advantages of a group, which are
rl.py's. Both: maths problems, ids of the prompts checked equal, in every iteration the prompts that rl.py has drawn;
temperature 1, no KL, clip 0.2 / 0.28, one update of AdamW at the same learning rate, no dynamic sampling (TRL has
none), fp32, reward.math_reward, 0 for an answer without an end. Each side has its own process; they alternate, and the
first iteration of each is not counted. Times are CPU seconds of the process.

    decode   ours: Engine.step with prefill; TRL: transformers' generate, and tokenizing the prompts
    judge    reading the answers and math_reward
    update   log-probs, backward, optimizer
    rest     scheduling, copying the weights, the log

Expect the ratio to fall with the size: what TRL loses at 1.3M is calls and padding, at 27M both are matrix products.
--trl_malloc also tells TRL's process to keep freed memory, as rl.py does for itself; users of TRL do not get that.

The last line is the ratio of the medians; out/bench/rl.json has all iterations.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from real_sizes import cpu_name  # noqa: E402

import checkpoint  # noqa: E402
import configurator  # noqa: E402
import distributed  # noqa: E402
import hf  # noqa: E402
import mtp  # noqa: E402
import reward  # noqa: E402
from configurator import UserError  # noqa: E402
from data.problems import messages, prompt_ids, read_problems, stop_ids, write_problems  # noqa: E402
from model import ModelConfig  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

INSTALL = "pip install trl transformers"
SIDES = ("ours", "TRL")
PARTS = ("decode", "judge", "update", "rest")


@dataclass(frozen=True)
class Config:
    """The command line of bench/rl.py."""
    size: Literal["demo", "27m"] = "demo"     # demo: the checkpoint below; 27m: random weights
    ckpt: str = "out/tiny/sft"            # the demo's SFT model (make demo)
    problems: str = "out/tiny/problems/rl.jsonl"     # its maths problems are the prompts
    n_problems: int = 240                 # of these, the first so many
    groups: int = 0                       # prompts per iteration; 0 = 24 (demo) or 8 (27m)
    answers: int = 8                      # per prompt
    tokens: int = 0                       # longest answer; 0 = 96 (demo) or 64 (27m)
    rounds: int = 7                       # iterations of each side that count, after one for warming up
    trl_micro: int = 0                    # answers per forward and backward of TRL; 0 = all, its fastest here
    trl_malloc: bool = False              # TRL's process keeps freed memory too
    threads: int = 1                      # torch threads, both sides
    out: str = "out/bench/rl.json"        # the result
    side: Literal["", "ours", "TRL"] = ""     # set for the process of one side, by the script itself
    work: str = ""                        # its folder; set by the script itself

    def __post_init__(self):
        configurator.at_least(self, 1, "rounds", "threads", "n_problems")
        configurator.at_least(self, 2, "answers")
        configurator.at_least(self, 0, "groups", "tokens", "trl_micro")
        if self.n_answers % (self.trl_micro or self.n_answers):
            raise ValueError(f"trl_micro = {self.trl_micro} should divide the {self.n_answers} answers of an iteration")

    @property
    def n_groups(self) -> int:
        """Prompts per iteration."""
        return self.groups or {"demo": 24, "27m": 8}[self.size]

    @property
    def n_answers(self) -> int:
        """Answers per iteration."""
        return self.n_groups * self.answers

    @property
    def limit(self) -> int:
        """Longest answer, tokens."""
        return self.tokens or {"demo": 96, "27m": 64}[self.size]


LR, EPS_LOW, EPS_HIGH = 1e-6, 0.2, 0.28


def main(cfg: Config) -> None:
    if cfg.side:
        torch.set_num_threads(cfg.threads)
        (our_side if cfg.side == "ours" else trl_side)(cfg, Path(cfg.work))
    else:
        compare(cfg)


# ---- what both sides get --------------------------------------------------------------------------------------------

def random_checkpoint(run: Path) -> None:
    """A chat model of 27M random weights. Its vocabulary is the demo's, and pairs of bytes that stand in no text."""
    small = Tokenizer.load("tiny")
    pairs = (bytes([a, b]) for a in range(128, 256) for b in range(128, 256))
    new = [pair for pair in pairs if pair not in small.ranks][:8192 - small.n_ids]
    ranks = small.ranks | {pair: len(small.ranks) + i for i, pair in enumerate(new)}
    added = {name: (len(ranks) + i, True) for i, name in enumerate(sorted(small.added, key=small.added.get))}
    shape = ModelConfig(vocab_size=8192, n_layer=6, d_model=512, n_head=8, n_kv_head=4, head_dim=64, d_ff=1536)
    rt = distributed.setup(seed=0, device="cpu")
    model = checkpoint.materialise(mtp.build(shape, "meta"), rt)
    checkpoint.save(run, 0, model, tokenizer=Tokenizer(ranks, added, 8192), config={}, state={},
                    meta={"stage": "sft", "chat": True})


def prepare(cfg: Config, work: Path) -> tuple[Path, ModelConfig]:
    """Problems, checkpoint and its export, in the folder `work`. -> (checkpoint, its shape)."""
    if not Path(cfg.problems).is_file():
        raise UserError(f"no {cfg.problems}: make demo")
    maths = [p for p in read_problems(cfg.problems) if p.kind == "maths"][:cfg.n_problems]
    if len(maths) < cfg.n_groups:
        raise UserError(f"{cfg.problems}: {len(maths)} maths problems should be {cfg.n_groups} or more")
    write_problems(work / "problems.jsonl", maths)
    if cfg.size == "27m":
        random_checkpoint(work / "random")
    ckpt = checkpoint.find(work / "random" if cfg.size == "27m" else cfg.ckpt)
    if not checkpoint.read_meta(ckpt).get("chat"):
        raise UserError(f"{ckpt}: should be a chat model; TRL gets its prompts through the chat template")
    hf.export_folder(ckpt, work / "hf", "qwen2")
    return ckpt, ModelConfig(**checkpoint.read_shape(ckpt))


class Clock:
    """CPU seconds of each part since the last reset(); timed(part, f) is f with its seconds added up."""
    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.parts, self.start = Counter(), time.process_time()

    def timed(self, part: str, f: Callable, clock: Callable[[], float] = time.process_time) -> Callable:
        def g(*args, **kwargs):
            t = clock()
            try:
                return f(*args, **kwargs)
            finally:
                self.parts[part] += clock() - t
        return g

    def read(self) -> dict[str, float]:
        """-> seconds of decode, judge, update and rest, and their sum."""
        total = time.process_time() - self.start
        known = {part: self.parts[part] for part in PARTS[:-1]}
        return known | {"rest": total - sum(known.values()), "seconds": total}


def reply(found: dict) -> None:
    """One line for compare()."""
    print(json.dumps(found), flush=True)


# ---- ours -----------------------------------------------------------------------------------------------------------

def our_side(cfg: Config, work: Path) -> None:
    """
    rl.main. The first iteration starts by itself; after that a line on stdin starts each: publish() waits for it. A
    line on stdout tells what an iteration took and which problems it drew.
    """
    import rl
    from rollout import RolloutThread
    clock, last = Clock(), {}

    class Turns(RolloutThread):
        """A rollout thread that generates its next batch when it is this side's turn."""
        def publish(self, weights=None) -> None:
            reply(clock.read() | last)
            if not sys.stdin.readline():
                os._exit(0)
            clock.reset()
            super().publish(weights)

    def update(model, optimizer, batch, *rest):
        answers = [s for g in batch.groups for s in g.samples]
        last.update(problems=[g.task.prompt for g in batch.groups], tokens=sum(len(s.tokens) for s in answers),
                    longest=max(len(s.tokens) for s in answers),
                    reward=statistics.mean(r for g in batch.groups for r in g.rewards))
        return clock.timed("update", real_update)(model, optimizer, batch, *rest)

    # the rollout thread and the one that checks maths count their own time: they run at the same time as others
    real_update, rl.update, rl.RolloutThread = rl.update, update, Turns
    rl.Engine.step = clock.timed("decode", rl.Engine.step, time.thread_time)
    reward.math_reward = clock.timed("judge", reward.math_reward, time.thread_time)
    for name in ("submit", "poll"):
        setattr(rl.Grader, name, clock.timed("judge", getattr(rl.Grader, name), time.thread_time))
    rl.main(rl.Config(
        init=str(checkpoint.find(work / "random" if cfg.size == "27m" else cfg.ckpt)), out=str(work / "rl"),
        problems=str(work / "problems.jsonl"), valid="", steps=10_000, save_every=10_000, batch_size=cfg.n_groups,
        mini_batch=cfg.n_groups, max_groups=cfg.n_groups, group_size=cfg.answers, dynamic_sampling=False, easy_alpha=0,
        lr=LR, eps_low=EPS_LOW, eps_high=EPS_HIGH, max_new_tokens=[(0, cfg.limit)], slots=cfg.n_answers,
        judge_workers=1, reward_lag=8, micro_tokens=2048, threads=cfg.threads, device="cpu"))


# ---- TRL ------------------------------------------------------------------------------------------------------------

def trl_side(cfg: Config, work: Path) -> None:
    """GRPOTrainer.train. Each line on stdin, a list of problems, starts an iteration; the answer is like our_side's."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    if cfg.trl_malloc:
        distributed.keep_freed_memory()
    problems, clock, last, turn = read_problems(work / "problems.jsonl"), Clock(), {}, []
    rows = [{"prompt": messages(p), "answer": p.answer} for p in problems]
    ckpt = checkpoint.find(work / "random" if cfg.size == "27m" else cfg.ckpt)
    tokenizer, peer = Tokenizer.load(ckpt), AutoTokenizer.from_pretrained(work / "hf")
    stop = set(stop_ids(tokenizer, True))

    def rewards(completions, completion_ids, answer, **_) -> list[float]:
        last.update(tokens=sum(map(len, completion_ids)), longest=max(map(len, completion_ids)))
        paid = [reward.math_reward(c[0]["content"], a) if ids[-1] in stop else 0.0
                for c, ids, a in zip(completions, completion_ids, answer, strict=True)]
        return paid

    class Trainer(GRPOTrainer):
        """A GRPOTrainer that takes the prompts of its turn."""
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions([rows[i] for i in turn for _ in range(cfg.answers)])

    class Turns(TrainerCallback):
        """An iteration waits for its turn, and tells what it took."""
        def on_step_begin(self, args, state, control, **_):
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            turn[:] = json.loads(line)
            clock.reset()

        def on_step_end(self, args, state, control, **_):
            found = clock.read()
            found["update"] = found["seconds"] - clock.parts["rollout"]
            found["rest"] = clock.parts["rollout"] - found["decode"] - found["judge"]
            reply(found | last)

    micro = cfg.trl_micro or cfg.n_answers
    options = GRPOConfig(
        output_dir=str(work / "trl"), per_device_train_batch_size=micro,
        gradient_accumulation_steps=cfg.n_answers // micro, num_generations=cfg.answers, max_steps=10_000,
        max_completion_length=cfg.limit, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, epsilon=EPS_LOW,
        epsilon_high=EPS_HIGH, loss_type="dapo", scale_rewards="group", num_iterations=1, learning_rate=LR,
        lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch_fused", bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=1)
    for name, part in (("_generate", "decode"), ("_calculate_rewards", "judge"),
                       ("_generate_and_score_completions", "rollout")):
        setattr(Trainer, name, clock.timed(part, getattr(Trainer, name)))
    model = AutoModelForCausalLM.from_pretrained(work / "hf", dtype=torch.float32)
    trainer = Trainer(model=model, reward_funcs=rewards, args=options, train_dataset=Dataset.from_list(rows),
                      processing_class=peer, callbacks=[Turns()])
    theirs = trainer._tokenize_prompts([row["prompt"] for row in rows])[0]
    if theirs != [prompt_ids(tokenizer, p, True) for p in problems]:
        raise RuntimeError("the chat template of the export does not give the prompts that rl.py trains on")
    trainer.train()


# ---- by turns -------------------------------------------------------------------------------------------------------

def start(cfg: Config, side: str, work: Path, log) -> subprocess.Popen:
    """The process of one side; what it prints beside its lines goes to `log`."""
    flags = [f"--{name}={value}" for name, value in vars(cfg).items() if name not in ("side", "work", "out")]
    env = os.environ | {"OMP_NUM_THREADS": str(cfg.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, __file__, *flags, f"--side={side}", f"--work={work}"], env=env, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)


def answer(process: subprocess.Popen, log) -> dict:
    """The next line of a side that is an object; it prints others too. UserError if it ended."""
    for line in iter(process.stdout.readline, ""):
        if line.startswith('{"decode"'):
            return json.loads(line)
    log.seek(0)
    raise UserError(f"a side ended before its turn:\n{log.read()[-3000:]}")


def median(rows: list[dict], name: str) -> float:
    """The median of a column."""
    return statistics.median(row[name] for row in rows)


def compare(cfg: Config) -> None:
    """Both sides by turns; one line an iteration, a table, one JSON file, and the ratio."""
    try:
        import transformers
        import trl
    except ImportError as e:
        raise UserError(f"no {e.name}: {INSTALL}") from None
    out, found = configurator.writable(cfg.out), {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "ours.log", "w+") as our_log, \
            open(Path(folder) / "trl.log", "w+") as trl_log:
        work = Path(folder)
        ckpt, shape = prepare(cfg, work)
        logs, processes = {"ours": our_log, "TRL": trl_log}, {}
        try:
            for side in SIDES:
                processes[side] = start(cfg, side, work, logs[side])
            for turn in range(cfg.rounds + 1):
                for side, process in processes.items():
                    if side == "TRL" or turn:                       # our first iteration starts by itself
                        process.stdin.write(json.dumps(found["ours"][turn]["problems"] if side == "TRL" else "") + "\n")
                        process.stdin.flush()
                    found[side].append(answer(process, logs[side]))
                print(f"{'warm-up' if not turn else f'round {turn}'}: " + ", ".join(
                    f"{side} {rows[-1]['seconds']:.2f} s, {rows[-1]['tokens']:,} tokens, longest "
                    f"{rows[-1]['longest']}" for side, rows in found.items()), flush=True)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
    rows = {}
    parts = shape.params_by_part()
    size = f"{(shape.n_params() - parts['MTP layers']) / 1e6:.1f}M parameters"     # MTP layers are frozen, TRL has none
    print(f"{size}, {shape.n_layer} layers, D = {shape.d_model}, V = {shape.vocab_size:,}; {cfg.n_groups} groups x "
          f"{cfg.answers} answers of at most {cfg.limit} tokens; {cfg.threads} thread, CPU time")
    for side, all_rows in found.items():
        counted = all_rows[1:]
        seconds = {name: median(counted, name) for name in ("seconds", *PARTS)}
        each = [row["seconds"] for row in counted]
        rows[side] = {**{f"median_{name}": s for name, s in seconds.items()}, "least": min(each), "most": max(each),
                      "share": {name: sum(row[name] for row in counted) / sum(each) for name in PARTS},
                      "decoded_tokens_per_second": median(counted, "tokens") / seconds["decode"],
                      "updated_tokens_per_second": median(counted, "tokens") / seconds["update"],
                      "iterations": all_rows}
        r = rows[side]
        print(f"  {side:5} {seconds['seconds']:7.2f} s ({min(each):.2f} to {max(each):.2f}): "
              + ", ".join(f"{name} {share:.1%}" for name, share in r["share"].items())
              + f"; {r['decoded_tokens_per_second']:,.0f} tokens/s decoded, {r['updated_tokens_per_second']:,.0f} in "
              "the update")
    ours, theirs = rows["ours"], rows["TRL"]
    ratio = theirs["median_seconds"] / ours["median_seconds"]
    by_part = {name: theirs[f"median_{name}"] / ours[f"median_{name}"] for name in ("decode", "update")}
    about = {"shape": vars(shape), "parameters": shape.n_params() - parts["MTP layers"],
             "checkpoint": str(ckpt) if cfg.size == "demo" else "random weights", "torch": torch.__version__,
             "transformers": transformers.__version__, "trl": trl.__version__, "python": platform.python_version(),
             "cpu": cpu_name(), "threads": cfg.threads, "commit": checkpoint.git_commit(),
             "command": " ".join(["python bench/rl.py", *sys.argv[1:]])}
    out.write_text(json.dumps({
        "ratio": ratio, "ratio_decode": by_part["decode"], "ratio_update": by_part["update"],
        "median_seconds": {side: row["median_seconds"] for side, row in rows.items()}, "sides": rows, **about},
        indent=1) + "\n")
    print(out)
    print(f"TRL / ours, seconds of an RL iteration at {size}: {ratio:.2f}x "
          f"(decode {by_part['decode']:.1f}x, update {by_part['update']:.1f}x)")


if __name__ == "__main__":
    configurator.run(main, Config)
