"""Logits that are NaN or infinite are an error with the request's id, in every runner; low temperatures are not."""
import math

import pytest
import torch

from configurator import UserError
from engine import Engine, Request, generate
from kernels.cpu.decode import library
from model import ModelConfig
from mtp import build
from rollout import RolloutThread, Scheduler
from runner import CpuRunner, GraphRunner, TorchRunner
from sampling import sample_tokens

SHAPE = ModelConfig(vocab_size=37, n_layer=1, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=64, n_mtp=2,
                    max_seq_len=128)
RUNNERS = [TorchRunner, GraphRunner,
           pytest.param(CpuRunner, marks=pytest.mark.skipif(library() is None, reason="no C compiler"))]


def new_model():
    model = build(SHAPE)
    model.init_weights(0)
    return model.requires_grad_(False)


def break_it(model, where, value):
    weight = {"lm_head": model.lm_head.weight, "prompt": model.embed_tokens.weight[2:3],
              "gain": model.norm.weight[None],
              "block": model.layers[0].mlp.up_proj.weight, "mtp": model.mtp_layers[1].input_proj.weight}[where]
    weight[0, 3] = value


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("where", ["lm_head", "prompt", "gain", "block"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_no_number_names_the_request(runner, where, value):
    """In the head, the prompt's prefill, a norm, a block; greedy, sampled, cut, drafted; the engine goes on."""
    model = new_model()
    break_it(model, where, value)
    for n_draft in (0, 2):
        engine = Engine(model, 4, 64, n_draft=n_draft, runner=runner)
        for i, how in enumerate((dict(temperature=0.0), dict(temperature=0.6, top_p=0.9), dict(temperature=1.0),
                                 dict(temperature=1e-40), dict(temperature=2.0, top_k=3))):
            with pytest.raises(UserError, match=rf"^request \('a', {i}\): .* not finite .*after 0 tokens"):
                generate(engine, [Request(("a", i), [1, 2, 3], 8, **how)])
            assert not engine.in_flight and len(engine.blocks.free_blocks) == engine.blocks.n_blocks


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_mtp_layer_that_is_broken_is_named(runner, value):
    """Its drafts would be rejected and the text be right: a silent loss of speed."""
    model = new_model()
    plain = generate(Engine(model, 4, 64, runner=runner), [Request(7, [1, 2, 3], 8, temperature=0.0)])
    break_it(model, "mtp", value)
    for n_draft in (0, 1):                                                        # without layer 2
        engine = Engine(model, 4, 64, n_draft=n_draft, runner=runner)
        assert generate(engine, [Request(7, [1, 2, 3], 8, temperature=0.0)])[0].tokens == plain[0].tokens
    with pytest.raises(UserError, match=r"^request 7: .*not finite .*MTP layer 2"):
        generate(Engine(model, 4, 64, n_draft=2, runner=runner), [Request(7, [1, 2, 3], 8)])


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_others_of_a_batch_are_not_ended(runner):
    """A word of one prompt is broken: the other request, beside it and behind it, gets what it gets alone."""
    model = new_model()
    whole = generate(Engine(model, 4, 64, runner=runner), [Request("b", [4, 5], 9, seed=1)])[0]
    break_it(model, "prompt", math.nan)                                           # token 2
    if 2 in whole.tokens:
        pytest.skip("the sample needs the broken word itself")
    engine, done = Engine(model, 4, 64, runner=runner), []
    engine.add(Request("a", [1, 2, 3], 8))
    engine.add(Request("b", [4, 5], 9, seed=1))
    with pytest.raises(UserError, match="request 'a'"):
        while not done:
            done = engine.step()
    while not done:
        done = engine.step()
    assert done[0].tokens == whole.tokens


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("temperature", [1.4e-45, 1e-42, 1e-40, 1e-38, 1e-37, 1e-36, 1e-30, 1e-10])
def test_the_lowest_temperatures_are_greedy(runner, temperature):
    """The limit of softmax(logits / t) for t -> 0: the largest logit has probability 1, log-prob 0."""
    model = new_model()
    greedy = generate(Engine(model, 1, 64, runner=runner), [Request(0, [1, 2, 3], 8, temperature=0.0)])[0]
    for more in ({}, {"top_p": 0.5}, {"top_k": 2}):
        for n_draft in (0, 2):
            cold = generate(Engine(model, 1, 64, n_draft=n_draft, runner=runner),
                            [Request(0, [1, 2, 3], 8, temperature=temperature, seed=5, **more)])[0]
            assert cold.tokens == greedy.tokens and cold.logprobs == [0.0] * 8


def test_equal_logits_share_the_probability_at_any_temperature():
    """By hand: (2, 2, 1) at 1e-40 is (.5, .5, 0); (-2, -2, -3) too, whose quotients are all -inf."""
    for logits in ([2.0, 2.0, 1.0], [-2.0, -2.0, -3.0]):
        for u, right in ((0.49, 0), (0.51, 1)):
            ids, logp = sample_tokens(torch.tensor([logits]), torch.tensor([u]), torch.tensor([1e-40]),
                                      torch.tensor([1.0]), torch.tensor([0]))
            assert ids.item() == right and logp.item() == pytest.approx(math.log(0.5))


def test_the_rollout_thread_ends_the_run_with_that_line():
    """What rl.py and eval.py wait for raises UserError: one line, exit status 1, no traceback."""
    model = new_model()
    break_it(model, "lm_head", math.nan)

    class Grader:
        def submit(self, *_): ...
        def poll(self, *_): return []
    thread = RolloutThread(Scheduler(2, 1, 2), Engine(model, 4, 64), Grader(),
                           lambda task, i, seed: Request(task.key(i), [1, 2, 3], 8, seed=seed))
    try:
        with pytest.raises(UserError, match=r"the rollout thread failed: request \(0, 0, 0\): .*not finite"):
            thread.take()
    finally:
        thread.close()
