"""
GRPO in about sixty lines, imports aside: the seven steps of tutorial page 8 (docs/tutorial/08-rl.md), one by one.

    python docs/tutorial/grpo.py                                    # ten iterations from out/tiny/sft, half a minute
    python docs/tutorial/grpo.py --init=out/tiny/base --steps=30    # RL-Zero: from the base model

Report section 3.3 (Eq. 1 and 2) on maths problems alone. Everything waits for everything: no rollout thread, no easy
pool, no judge, one process, one update per batch. rl.py is the same algorithm with all of these. The equations are
rl.py's own (advantages, surrogate, token_logprobs), and so are the engine and the reward. Nothing is saved.

Expect: the mean reward of all answers rises from 0.4 to 0.7 or more. Every iteration takes the same 32 problems, so
that ten iterations are enough to see it; part of the rise is that these answers are learned by heart. rl.py takes new
problems every time, needs more iterations, and measures on problems that it never trains on.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))        # the project's root
import torch  # noqa: E402

import checkpoint  # noqa: E402
import configurator  # noqa: E402
import distributed  # noqa: E402
import mtp  # noqa: E402
from data.problems import Problem, prompt_ids, read_problems, stop_ids  # noqa: E402
from engine import Engine, Request, generate  # noqa: E402
from model import MiMo, ModelConfig  # noqa: E402
from reward import math_reward  # noqa: E402
from rl import Trajectory, advantages, surrogate, token_logprobs  # noqa: E402
from rollout import hash64  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@dataclass(frozen=True)
class Config:
    init: str = "out/tiny/sft"            # checkpoint to start from
    problems: str = "out/tiny/problems/rl.jsonl"     # its first maths problems are the prompts
    steps: int = 10                       # iterations
    prompts: int = 32                     # prompts, the same ones in every iteration
    G: int = 8                            # answers per prompt
    max_new_tokens: int = 96              # longest answer
    lr: float = 3e-4                      # AdamW, constant
    eps_low: float = 0.2                  # Eq. 1
    eps_high: float = 0.28                # Eq. 1
    seed: int = 1                         # of the samples

    def __post_init__(self):
        configurator.at_least(self, 1, "steps", "prompts", "max_new_tokens")
        configurator.at_least(self, 2, "G")


def main(cfg: Config) -> None:
    rt = distributed.setup(seed=cfg.seed, device="cpu")
    ckpt = checkpoint.find(cfg.init)
    tokenizer, chat = Tokenizer.load(ckpt), checkpoint.read_meta(ckpt).get("chat", False)
    shape = configurator.from_dict(ModelConfig, checkpoint.read_shape(ckpt), f"{ckpt}/model.json")
    policy = checkpoint.materialise(mtp.build(shape, "meta"), rt, ckpt=ckpt)
    policy.mtp_layers.requires_grad_(False)                          # frozen in RL [paper 2.2]
    optimizer = distributed.adamw(policy, cfg.lr, (0.9, 0.95), weight_decay=0.0)
    problems = [p for p in read_problems(cfg.problems) if p.kind == "maths"][:cfg.prompts]
    longest = max(len(prompt_ids(tokenizer, p, chat)) for p in problems)
    engine = Engine(policy, len(problems) * cfg.G, longest + cfg.max_new_tokens, n_ids=tokenizer.n_ids)
    for step in range(cfg.steps):
        begin = time.perf_counter()
        reward, trajectories = iteration(policy, engine, optimizer, tokenizer, chat, problems, step, cfg)
        print(f"iteration {step + 1:2}  mean reward {reward:.3f}  groups trained on {len(trajectories) // cfg.G:2} of "
              f"{len(problems)}  {time.perf_counter() - begin:.1f} s")


def iteration(policy: MiMo, engine: Engine, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer, chat: bool,
              problems: list[Problem], step: int, cfg: Config) -> tuple[float, list[Trajectory]]:
    """One batch and its update. -> (mean reward of all answers, what was trained on)."""
    # 1. sample: G answers to each prompt from pi_old, at temperature 1
    stop = stop_ids(tokenizer, chat)
    requests = [Request((i, j), prompt_ids(tokenizer, p, chat), cfg.max_new_tokens, stop=stop,
                        seed=hash64(cfg.seed, step, i, j)) for i, p in enumerate(problems) for j in range(cfg.G)]
    samples = generate(engine, requests)
    # 2. reward: 1 if the boxed number is right. An answer that was cut at the limit is no answer
    rewards = [math_reward(tokenizer.decode(s.tokens, skip_control=True), problems[s.id[0]].answer)
               if s.finish == "stop" else 0.0 for s in samples]
    trajectories: list[Trajectory] = []
    for begin in range(0, len(samples), cfg.G):
        group, r = samples[begin:begin + cfg.G], rewards[begin:begin + cfg.G]
        # 3. filter: a group whose rewards are all equal has nothing to teach
        if max(r) > min(r):
            # 4. advantage: A = (r - mean) / std over the group (Eq. 2)
            trajectories += [Trajectory(s.prompt, s.tokens, s.logprobs, A)
                             for s, A in zip(group, advantages(r), strict=True)]
    if not trajectories:
        return sum(rewards) / len(rewards), []
    # 5. ratio: rho = pi_theta / pi_old for every generated token; pi_old is what the engine sampled with
    logp, _ = token_logprobs(policy, trajectories, "cpu")                                           # [N]
    old = torch.tensor([x for t in trajectories for x in t.rollout_logprobs])                       # [N]
    # 6. objective: the mean over all tokens of min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) (Eq. 1)
    A = torch.tensor([t.A for t in trajectories for _ in t.tokens])                                 # [N]
    summand, _, _ = surrogate(logp, old, A, cfg.eps_low, cfg.eps_high)
    objective = summand.mean()
    # 7. update: one AdamW step up the objective, the gradient norm clipped at 1; then the engine takes the new weights
    (-objective).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    engine.load(policy.state_dict())          # they share the tensors; this has them packed again for the C kernels
    return sum(rewards) / len(rewards), trajectories


if __name__ == "__main__":
    configurator.run(main, Config)
