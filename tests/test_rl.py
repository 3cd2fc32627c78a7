"""RL: Eq. 1 and Eq. 2 by hand, the clip on every side, batching that never changes the update, a bandit that learns."""
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import distributed
import mtp
import rl
from configurator import UserError, load
from data.problems import Problem
from model import ModelConfig
from rl import Trajectory, advantages, pack, padded, surrogate, token_logprobs
from rollout import Group, Task

CFG = ModelConfig(vocab_size=32, n_layer=2, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=48, max_seq_len=64,
                  n_mtp=1)
RT = distributed.Runtime(torch.device("cpu"), torch.float32, 0, 1, 0, True, False)


def model(seed=0):
    m = mtp.build(CFG)
    m.init_weights(seed)
    return m


def test_advantages_by_hand():
    assert advantages([1, 0, 0, 0]) == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert sum(advantages([0.2, 0.9, 0.4])) == pytest.approx(0, abs=1e-12)
    assert advantages([0.3, 0.3, 0.3]) == [0.0, 0.0, 0.0]
    assert advantages([0.3, 0.3 + 1e-9]) == [0.0, 0.0], "rounding is no signal"


@pytest.mark.parametrize("A, rho, value, clipped, gradient", [
    (1.0, 1.5, 1.28, True, 0.0),        # good token, already far up: clip-higher stops it at 1.28
    (1.0, 1.25, 1.25, False, 1.25),     # above 1 + eps_low, below 1 + eps_high: still allowed to grow
    (1.0, 0.5, 0.5, False, 0.5),        # good token that fell: eps_low must not stop it
    (-1.0, 0.5, -0.8, True, 0.0),       # bad token, already far down
    (-1.0, 1.5, -1.5, False, -1.5),     # bad token that rose: eps_high must not stop it
    (-1.0, 0.9, -0.9, False, -0.9),
])
def test_surrogate_on_every_side(A, rho, value, clipped, gradient):
    logp = torch.tensor([math.log(rho)], requires_grad=True)
    summand, ratio, cut = surrogate(logp, torch.zeros(1), torch.tensor([A]), 0.2, 0.28)
    summand.sum().backward()
    assert summand.item() == pytest.approx(value, rel=1e-5) and ratio.item() == pytest.approx(rho, rel=1e-5)
    assert bool(cut) == clipped and logp.grad.item() == pytest.approx(gradient, rel=1e-5)


def rows(lengths, seed=0):
    gen = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(1, 32, (n,), generator=gen).tolist()
    return [Trajectory(draw(p), draw(n), [0.0] * n, (-1.0) ** i) for i, (p, n) in enumerate(lengths)]


def test_token_logprobs_equal_the_full_softmax_and_see_no_padding():
    m, some = model(), rows([(3, 5), (7, 2), (1, 1)])
    logp, entropy = token_logprobs(m, some, "cpu")
    want, ent = [], []
    for r in some:
        full = m.logits(m(torch.tensor([r.prompt + r.tokens])))[0].log_softmax(-1)
        for j, t in enumerate(r.tokens):
            p = full[len(r.prompt) + j - 1]
            want.append(p[t])
            ent.append(-(p.exp() * p).sum())
    torch.testing.assert_close(logp, torch.stack(want), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.stack(ent), atol=1e-5, rtol=1e-5)


def test_micro_batches_hold_every_trajectory_once_within_micro_tokens():
    some = rows([(3, n) for n in (5, 1, 40, 2, 17, 9)])
    parts = pack(some, 60, RT)
    assert sorted(id(r) for p in parts for r in p) == sorted(map(id, some))
    assert all(len(p) == 1 or len(p) * max(len(r.prompt) + len(r.tokens) for r in p) <= 60 for p in parts)


@dataclass
class Answer:
    prompt: list
    tokens: list
    logprobs: list
    finish: str = "stop"


def groups(m, n=4, G=4, seed=0):
    """Groups with rewards 1 0 0 .. and log-probs from the model itself."""
    found = []
    for g in range(n):
        some = rows([(3, 2 + (g + i) % 4) for i in range(G)], seed=seed + g)
        for r in some:
            with torch.no_grad():
                r.rollout_logprobs = token_logprobs(m, [r], "cpu")[0].tolist()
        answers = [Answer(r.prompt, r.tokens, r.rollout_logprobs) for r in some]
        found.append(Group(Task(0, g, g, False), (0, 0), answers, [1.0] + [0.0] * (G - 1), [{}] * G, 0))
    return found


@dataclass
class Batch:
    groups: list


def config(**changes):
    return replace(rl.Config(), **{"batch_size": 4, "mini_batch": 4, "group_size": 4, "lr": 1e-2, **changes})


def updated(cfg, steps=1, optimizer=torch.optim.AdamW):
    m = model()
    opt = optimizer([p for p in m.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=0.0)
    stats = [rl.update(m, opt, Batch(groups(m)), cfg, RT, 0) for _ in range(steps)]
    return torch.cat([p.detach().flatten() for p in m.parameters()]), stats[0]


def test_first_update_has_ratio_one_and_a_gradient():
    _, stats = updated(config())
    assert stats["ratio"] == 1.0 and stats["ratio_max"] == 1.0 and stats["clip_low"] == stats["clip_high"] == 0.0
    assert stats["grad_norm"] > 0 and stats["updates"] == 1
    assert stats["logprob_diff_max"] < 1e-5


def test_micro_batch_size_never_changes_the_update():
    """With plain SGD: Adam's first step is lr * sign(g), which turns rounding of a zero gradient into a whole step."""
    whole, small = (updated(config(micro_tokens=n, lr=1.0), optimizer=torch.optim.SGD)[0] for n in (10_000, 8))
    torch.testing.assert_close(whole, small, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("divide_by", ["batch", "group"])
def test_loss_is_divided_by_the_tokens_of_the_update_or_of_each_group(divide_by):
    """Eq. 1: 1 / sum |o_i|. Gradients of the update equal those of the objective written out in one expression."""
    m, cfg = model(), config(grad_clip=1e9, divide_by=divide_by)
    some = groups(m)
    some[0].samples = some[0].samples[:2] + some[2].samples[2:]                 # groups of unlike length
    tokens = [sum(len(s.tokens) for s in g.samples) for g in some]
    assert len(set(tokens)) > 1
    total = 0.0
    for g, n in zip(some, tokens, strict=True):
        for s, a in zip(g.samples, advantages(g.rewards), strict=True):
            logp, _ = token_logprobs(m, [Trajectory(s.prompt, s.tokens, s.logprobs, a)], "cpu")
            count = sum(tokens) if divide_by == "batch" else n * len(some)
            total = total - ((logp - logp.detach()).exp() * a).sum() / count
    total.backward()
    want = [p.grad.clone() for p in m.parameters() if p.grad is not None]

    class Keep:
        param_groups = [{}]
        def step(self): self.grads = [p.grad.clone() for p in m.parameters() if p.grad is not None]
        def zero_grad(self, set_to_none): pass
    m.zero_grad()
    keep = Keep()
    rl.update(m, keep, Batch(some), cfg, RT, 0)
    for a, b in zip(keep.grads, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_several_updates_move_the_ratio_from_the_second_on():
    _, stats = updated(config(mini_batch=2))
    assert stats["updates"] == 2 and stats["ratio_max"] > 1.0


def test_mtp_weight_moves_the_layers_and_not_one_bit_of_the_trunk():
    """Two mini-batches, so that the second one starts from moved weights; the clip must bite on both kinds of norm."""
    def run(weight, **changes):
        m, cfg = model(), config(mtp_weight=weight, mini_batch=2, grad_clip=0.05, **changes)
        m.mtp_layers.requires_grad_(weight > 0)
        before = {name: p.detach().clone() for name, p in m.named_parameters()}
        opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=0.0)
        stats = rl.update(m, opt, Batch(groups(model())), cfg, RT, 0)
        return before, dict(m.named_parameters()), stats
    (before, frozen, plain), (_, along, stats) = run(0.0), run(0.5)
    for name, p in along.items():
        assert torch.equal(p, frozen[name]) == (not name.startswith("mtp_layers.")), name
        assert torch.equal(frozen[name], before[name]) == name.startswith("mtp_layers."), name
    assert stats.pop("mtp_loss") > 0 and stats == plain, "and the log says the same of the trunk"
    small = run(0.5, micro_tokens=8)[2]
    assert small["mtp_loss"] == pytest.approx(run(0.5)[2]["mtp_loss"], rel=1e-4)


def test_mtp_loss_is_that_of_pre_training_on_the_generated_tokens():
    """Every answer alone through mtp.losses, the prompt masked; and padding adds nothing."""
    m, some, want = model(), rows([(3, 5), (7, 2), (1, 1)]), 0.0
    for r in some:
        ids = torch.tensor([r.prompt + r.tokens + [0, 0]])
        T = ids.shape[1] - 2
        mask = torch.tensor([[0] * len(r.prompt) + [1] * len(r.tokens) + [0, 0]])
        where = torch.arange(T)[None]
        bounds = torch.stack([torch.zeros_like(where), torch.full_like(where, T)]).int()
        want += mtp.losses(m, ids, torch.zeros_like(ids), where, bounds, mask)[1][0]
    ids, at = padded(some, "cpu")
    got = rl.mtp_loss(m, m(ids), ids, at)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    got.backward()
    assert all((p.grad is None) == (not name.startswith("mtp_layers.")) for name, p in m.named_parameters())
    assert rl.mtp_loss(m, m(torch.zeros(1, 2, dtype=torch.long)), *padded(rl.NOTHING, "cpu")) == 0


def test_no_groups_means_no_update():
    m = model()
    assert rl.update(m, None, Batch([]), config(), RT, 0) == {"updates": 0}


def test_a_bandit_learns_the_rewarded_token():
    """One prompt, one token answers, reward for token 7: its probability grows from about 1/32 to over 0.9."""
    m = model()
    opt = torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0)
    gen = torch.Generator().manual_seed(0)
    p7 = []
    for step in range(60):
        with torch.no_grad():
            probs = m.logits(m(torch.tensor([[1, 2, 3]])))[0, -1].softmax(-1)
        p7.append(float(probs[7]))
        drawn = torch.multinomial(probs, 32, replacement=True, generator=gen).tolist()
        rewards = [float(t == 7) for t in drawn]
        if 0 < sum(rewards) < 32:
            answers = [Answer([1, 2, 3], [t], [math.log(probs[t])]) for t in drawn]
            rl.update(m, opt, Batch([Group(Task(step, 0, 0, False), (0, 0), answers, rewards, [{}] * 32, 0)]),
                      replace(config(), batch_size=1, mini_batch=1), RT, step)
    assert p7[0] < 0.2 and p7[-1] > 0.9


def test_evaluations_begin_before_the_first_iteration_and_end_after_the_last():
    cfg = load(rl.Config, ["--steps=25", "--eval_every=10"])
    assert [s for s in range(26) if cfg.evaluates(s)] == [0, 10, 20, 25]
    for off in ("--eval_every=0", "--valid="):
        assert not any(load(rl.Config, [off]).evaluates(s) for s in range(41))


@pytest.mark.parametrize("flag, message", [
    ("--temperature=0.8", "temperature"), ("--eps_high=0.1", "eps_low"), ("--mini_batch=3", "multiple of mini_batch"),
    ("--max_new_tokens=[(5,10)]", "max_new_tokens"), ("--scheme=hard", "scheme"),
])
def test_bad_configs_are_refused(flag, message):
    with pytest.raises(UserError) as e:
        load(rl.Config, [flag])
    assert message in str(e.value)


def test_longest_answer_grows_by_iteration():
    cfg = load(rl.Config, ["--max_new_tokens=[(0,32),(10,48)]"])
    assert [cfg.max_new_tokens_at(s) for s in (0, 9, 10, 99)] == [32, 32, 48, 48]


# ---- the script -----------------------------------------------------------------------------------------------------

def run_script(folder, *flags, script=rl):
    """rl.py, or a script with its fields: two iterations from a random model, paid by the share of even tokens."""
    from scale_worker import ParityGrader, write_base
    if not (folder / "base").is_dir():
        write_base(folder)
    grader, rl.Grader = rl.Grader, ParityGrader
    try:
        script.main(load(script.Config, [
            f"--init={folder}/base", f"--problems={folder}/problems.jsonl", "--valid=", "--steps=2", "--batch_size=2",
            "--mini_batch=2", "--group_size=4", "--max_groups=4", "--max_new_tokens=[(0,8)]", "--slots=8",
            "--judge_workers=1", "--reward_lag=2", "--device=cpu", *flags]))
    finally:
        rl.Grader = grader


def test_plain_is_torch_code_where_a_breakpoint_is_hit(tmp_path, monkeypatch):
    """With --plain training passes through reference.rmsnorm, decoding through TorchRunner.trunk; same results."""
    import kernels
    import kernels.reference
    from runner import TorchRunner
    hits = set()

    def watch(where, name):
        function = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, **named: (hits.add(name), function(*args, **named))[1])
    watch(kernels.reference, "rmsnorm")
    watch(TorchRunner, "trunk")
    try:
        run_script(tmp_path, f"--out={tmp_path}/plain", "--plain")
        assert kernels.is_plain() and hits == {"rmsnorm", "trunk"}
        run_script(tmp_path, f"--out={tmp_path}/fast")
        assert not kernels.is_plain()
    finally:
        kernels.set_plain(False)
    plain, fast = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                   for name in ("plain", "fast"))
    for a, b in zip(plain, fast, strict=True):
        assert a["reward_trained"] == b["reward_trained"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_ablations_reach_the_real_engine(tmp_path, monkeypatch):
    """paper/policy.py: waves of batch_size groups, drained, solved problems in the queue; the rest is rl.py."""
    monkeypatch.syspath_prepend(str(Path(rl.__file__).parent / "paper"))
    import policy
    made, Ablation = [], policy.Ablation
    monkeypatch.setattr(policy, "Ablation", lambda *args, **named: made.append(Ablation(*args, **named)) or made[-1])
    run_script(tmp_path, f"--out={tmp_path}/run", "--launch=wave", "--stop=drain", "--solved=queue", script=policy)
    (scheduler,) = made
    assert (scheduler.launch_mode, scheduler.stop_mode, scheduler.has_pool) == ("wave", "drain", False)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["groups_launched"] % 2 for r in rows] == [0, 0] and all(r["groups_aborted"] == 0 for r in rows)


def test_a_checkpoint_says_what_to_ask(tmp_path):
    """Turns are handed on from the start; three held-out questions of both kinds, or those of the start."""
    def manifest(**meta):
        (tmp_path / "manifest.json").write_text(json.dumps({"meta": meta}))
    problem = lambda i, kind: Problem(f"{i:016x}", kind, f"{kind} {i}", answer="1", solution="1")
    held = [problem(i, "maths") for i in range(3)] + [problem(3, "code")]
    manifest(stage="sft", chat=True, turns="multi", examples=["one"])
    meta = rl.checkpoint_meta(rl.Config(init="x"), tmp_path, held)
    assert meta == {"stage": "rl", "chat": True, "init": "x", "turns": "multi",
                    "examples": ["maths 0", "code 3", "maths 1"]}
    assert rl.checkpoint_meta(rl.Config(init="x"), tmp_path, [])["examples"] == ["one"]
    manifest(stage="base")
    meta = rl.checkpoint_meta(rl.Config(), tmp_path, [])
    assert (meta["chat"], meta["turns"], meta["examples"]) == (False, "single", [])
