"""docs/tutorial/grpo.py: one step makes rewarded answers likelier, thirty learn a rule, and the script runs."""
import importlib.util
from pathlib import Path

import pytest
import torch

import distributed
import mtp
from configurator import UserError, load
from data.problems import Problem
from engine import Engine
from model import ModelConfig
from rl import token_logprobs

PATH = Path(__file__).resolve().parents[1] / "docs/tutorial/grpo.py"
spec = importlib.util.spec_from_file_location("grpo", PATH)
grpo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grpo)


class Letters:
    """A tokenizer of 16 ids, of which 0, 1 and 3 end an answer; an answer is right when token 7 is in it."""
    eos_id, im_end_id, n_ids = 0, 1, 16

    def encode(self, text):
        return [3, 4 + len(text) % 5]

    def decode(self, tokens, skip_control):
        return "\\boxed{7}" if 7 in tokens else "no number"


def learner(lr):
    cfg = load(grpo.Config, ["--prompts=4", "--G=16", "--max_new_tokens=12", f"--lr={lr}"])
    policy = mtp.build(ModelConfig(vocab_size=16, n_layer=1, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=48,
                                   max_seq_len=64, n_mtp=1))
    policy.init_weights(0)
    policy.mtp_layers.requires_grad_(False)
    problems = [Problem(f"{i:016x}", "maths", "What is 3+4?" + "?" * i, answer="7") for i in range(4)]
    engine = Engine(policy, 64, 16, n_ids=16)
    optimizer = distributed.adamw(policy, cfg.lr, (0.9, 0.95), 0.0)
    return policy, lambda step: grpo.iteration(policy, engine, optimizer, Letters(), False, problems, step, cfg)


def test_a_step_makes_rewarded_answers_likelier_and_the_others_less_likely():
    policy, iteration = learner(1e-3)
    _, trajectories = iteration(0)
    with torch.no_grad():
        after, _ = token_logprobs(policy, trajectories, "cpu")
    before = torch.tensor([x for t in trajectories for x in t.rollout_logprobs])
    good = torch.tensor([t.A > 0 for t in trajectories for _ in t.tokens])
    assert (after - before)[good].mean() > 0 > (after - before)[~good].mean()


def test_thirty_steps_learn_the_rule_and_a_group_without_difference_is_left_out():
    _, iteration = learner(3e-3)
    rewards, trained = zip(*(iteration(step) for step in range(30)), strict=True)
    assert sum(rewards[:3]) / 3 < 0.6 and sum(rewards[-3:]) / 3 > 0.9
    assert all(len(t) % 16 == 0 for t in trained) and any(len(t) < 64 for t in trained)


def test_the_script_runs(tmp_path, capsys):
    """Two iterations of main() on a random model with the tiny tokenizer: nothing is right, so nothing is trained."""
    from scale_worker import write_base
    write_base(tmp_path)
    grpo.main(load(grpo.Config, [f"--init={tmp_path}/base", f"--problems={tmp_path}/problems.jsonl", "--steps=2",
                                 "--prompts=3", "--G=4", "--max_new_tokens=8"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("mean reward 0.000  groups trained on  0 of 3" in line for line in lines)
    with pytest.raises(UserError, match="G = 1 should be at least 2"):
        load(grpo.Config, ["--G=1"])
