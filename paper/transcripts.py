"""
Answers along an RL run, token by token: what the page of the claims shows below its verdicts.

    python paper/transcripts.py --run=out/tiny/rl --start=out/tiny/sft     # a minute on one core

The same validation problems are answered by the model that RL starts from and by each checkpoint that the run kept
(rl.py --save_every=30 --keep=99), with the same random numbers. One answer at a time, with all MTP layers drafting:
then each round yields the accepted drafts, of layers 1, 2, .., and one token of the trunk behind them. Each answer is
graded as in training. Written to results/claims/transcripts.json: per answer its tokens as text, the probability each
was sampled with, the MTP layer that drafted it (0: none), verdicts with the difficulty of the tests, and the reward.
"""
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint  # noqa: E402
import configurator  # noqa: E402
import distributed  # noqa: E402
import mtp  # noqa: E402
from configurator import UserError  # noqa: E402
from data.jsonl import whole_file  # noqa: E402
from data.problems import Problem, prompt_ids, read_problems, stop_ids  # noqa: E402
from engine import Engine, Request, Sample  # noqa: E402
from eval import sample_seed  # noqa: E402
from judge import Judge  # noqa: E402
from model import ModelConfig  # noqa: E402
from reward import Grader  # noqa: E402
from rollout import Task  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@dataclass(frozen=True)
class Config:
    run: str = "out/tiny/rl"                          # an RL run; each checkpoint in it is asked
    start: str = "out/tiny/sft"                       # the model that it began with
    problems: str = "out/tiny/problems/valid.jsonl"   # validation problems
    count: int = 4                                    # problems of each kind
    temperature: float = 1.0                          # as in training
    max_new_tokens: int = 128                         # longest answer, tokens
    scheme: str = "strict"                            # of the reward (rl.py)
    out: str = "results/claims/transcripts.json"      # the file that is written

    def __post_init__(self):
        configurator.at_least(self, 1, "count", "max_new_tokens")


def answer(engine: Engine, request: Request) -> tuple[Sample, list[int]]:
    """-> (sample, per token the MTP layer that drafted it, from 1; 0 = sampled by the trunk)."""
    engine.add(request)
    drafted: list[int] = []
    accepted: tuple[int, ...] = ()
    while True:
        ended = engine.step()
        now = ended[0] if ended else engine.progress(request.id)
        before = accepted or (0,) * len(now.accepted)
        drafted += [k + 1 for k, (a, b) in enumerate(zip(now.accepted, before, strict=True)) if a > b]
        drafted += [0] * (len(now.tokens) - len(drafted))
        accepted = now.accepted
        if ended:
            return now, drafted[:len(now.tokens)]


def grade(problem: Problem, sample: Sample, grader: Grader) -> tuple[float, list[str]]:
    index = next(i for i, p in enumerate(grader.problems) if p.id == problem.id)
    grader.submit((0, 0), Task(0, index, 0, False), sample)
    while not (found := grader.poll()):
        time.sleep(0.005)
    return found[0][1], found[0][2]["verdicts"]


def main(cfg: Config) -> None:
    rt = distributed.setup(threads=1, device="cpu")
    problems = read_problems(cfg.problems)
    chosen = [p for kind in ("maths", "code") for p in [p for p in problems if p.kind == kind][:cfg.count]]
    points = [(0, checkpoint.find(cfg.start))] + [(int(c.name.removeprefix("step_")), c)
                                                  for c in checkpoint.steps_in(Path(cfg.run))[::-1]]
    points.sort(key=lambda point: point[0])
    if len(points) < 2:
        raise UserError(f"{cfg.run} has no checkpoint: a run of rl.py is wanted")
    shown = {p.id: {"kind": p.kind, "question": p.question, "solution": p.solution,
                    "tests": [vars(t) for t in p.tests], "answers": []} for p in chosen}
    with Judge(workers=1) as judge:
        for step, ckpt in points:
            tokenizer = Tokenizer.load(ckpt)
            shape = configurator.from_dict(ModelConfig, checkpoint.read_shape(ckpt), f"{ckpt}/model.json")
            model = mtp.build(shape, "meta")
            model = checkpoint.materialise(model, rt, ckpt=ckpt).eval()
            chat = checkpoint.read_meta(ckpt).get("chat", False)
            engine = Engine(model, slots=1, max_len=shape.max_seq_len, n_draft=shape.n_mtp)
            grader = Grader(problems, tokenizer, judge, cfg.scheme)
            for p in chosen:
                request = Request(p.id, prompt_ids(tokenizer, p, chat), cfg.max_new_tokens, cfg.temperature,
                                  stop=stop_ids(tokenizer, chat), seed=sample_seed(1, p, 0))
                sample, drafted = answer(engine, request)
                reward, verdicts = grade(p, sample, grader)
                shown[p.id]["answers"].append({
                    "step": step, "reward": round(reward, 4), "verdicts": verdicts, "finish": sample.finish,
                    "tokens": [[tokenizer.decode([t]), round(math.exp(lp), 3), k] for t, lp, k in
                               zip(sample.tokens, sample.logprobs, drafted, strict=True)]})
            grader.close()
            print(f"iteration {step}: rewards {[a['answers'][-1]['reward'] for a in shown.values()]}", flush=True)
    with whole_file(configurator.writable(cfg.out)) as f:
        json.dump({"run": cfg.run, "scheme": cfg.scheme, "temperature": cfg.temperature,
                   "commit": checkpoint.git_commit(), "problems": list(shown.values())}, f, ensure_ascii=False)


if __name__ == "__main__":
    configurator.run(main, Config)
