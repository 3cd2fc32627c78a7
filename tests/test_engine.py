"""
engine.py, cache.py, kernels/cpu/decode.py: exactness, acceptance, log-probs, scheduling, memory.

The checkpoint is trained here in a few seconds on a language of words: with it drafts are accepted often enough for a
bug that only lowers acceptance to be seen. D = 48, 2 trunk layers, 3 MTP layers, 32 tokens.
"""
import itertools
import math
import random
import re
import resource
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cache import BlockManager
from engine import Engine, Request, generate
from kernels.attention import doc_bounds
from kernels.cpu.decode import library
from kernels.linear_cross_entropy import logprob_entropy
from model import ModelConfig
from mtp import build, mtp_states, teacher_forced_acceptance
from runner import KEY_STEP, MIN_ROWS, SUM_PIECE, CpuRunner, GraphRunner, TorchRunner, attend
from sampling import sample_tokens, top_p_filter, uniform

V = 32
CFG = ModelConfig(vocab_size=V, n_layer=2, d_model=48, n_head=4, n_kv_head=2, head_dim=12, d_ff=96, n_mtp=3,
                  max_seq_len=128)


def text(n: int, seed: int) -> list[int]:
    """Words of 3 to 6 letters out of 12, separated by 0; each word has two likely successors."""
    rng = random.Random(7)
    words = [[rng.randrange(1, V) for _ in range(rng.randint(3, 6))] for _ in range(12)]
    follow = [rng.sample(range(12), 2) for _ in words]
    rng, out, w = random.Random(seed), [], 0
    while len(out) < n:
        w = follow[w][rng.random() < 0.3] if rng.random() < 0.9 else rng.randrange(12)
        out += [*words[w], 0]
    return out[:n]


@pytest.fixture(scope="session")
def model():
    """
    Trunk and MTP layers trained together. The final norm starts with uneven gains, so that the state before it and the
    state after it are different functions of the trunk; MTP reads the one before.
    """
    torch.manual_seed(0)
    m = build(CFG)
    m.init_weights(0)
    with torch.no_grad():
        m.norm.weight.copy_((torch.randn(CFG.d_model) * 1.5).exp())
    opt = torch.optim.AdamW(m.parameters(), lr=4e-3, weight_decay=0)
    T, corpus = 40, torch.tensor([text(44, s) for s in range(1, 16 * 140 + 1)]).view(140, 16, 44)
    for step, ids in enumerate(corpus):
        for g in opt.param_groups:
            g["lr"] = 4e-3 * min(1, (step + 1) / 10) * (1 - step / 150)
        h = m(ids[:, :T])
        cos, sin = m.rope_at(ids[:, :T], None)
        loss = F.cross_entropy(m.logits(h).flatten(0, 1), ids[:, 1:T + 1].flatten())
        for k, layer in enumerate(m.mtp_layers):
            z = layer.final_layernorm(layer(h, m.embed_tokens(ids[:, k + 1:T + k + 1]), cos, sin))
            loss = loss + F.cross_entropy((z @ m.lm_head.weight.T).flatten(0, 1), ids[:, k + 2:T + k + 2].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
    return m.requires_grad_(False)


@pytest.fixture(scope="session")
def small():
    """Random weights of a tiny shape, for what needs no acceptance."""
    m = build(ModelConfig(vocab_size=V, n_layer=1, d_model=16, n_head=2, n_kv_head=1, head_dim=8, d_ff=32, n_mtp=1))
    m.init_weights(0)
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return m.requires_grad_(False)


def requests(n: int, most: int = 12, seed: int = 3, **settings) -> list[Request]:
    rng = random.Random(seed)
    return [Request(i, text(rng.randint(1, 40), 50_000 + i), rng.randint(1, most), seed=i, **settings)
            for i in range(n)]


def rows_are_independent() -> bool:
    """The rule of cache.py on this machine: from MIN_ROWS rows on, a row's bits do not depend on how many there are."""
    g = torch.Generator().manual_seed(0)
    for D, N in ((48, 96), (128, 256), (384, 128)):
        x, w = torch.randn(300, D, generator=g), torch.randn(N, D, generator=g)
        whole = F.linear(x, w)
        if not all(torch.equal(F.linear(x[:n], w), whole[:n]) for n in range(MIN_ROWS, 300)):
            return False
    return True


INDEPENDENT = rows_are_independent()
bits = pytest.mark.skipif(not INDEPENDENT, reason="this machine's matrix products depend on the number of rows")


# ---- the same request, the same tokens ------------------------------------------------------------------------------

def mixed(n: int) -> list[Request]:
    """Greedy, plain sampling, temperature, top-p, top-k, with and without stop ids, all in one batch."""
    kinds = [dict(temperature=0.0), {}, dict(temperature=0.7, top_p=0.9), dict(temperature=1.3, top_k=5),
             dict(stop=(0, 5))]
    return [replace(r, **kinds[i % 5]) for i, r in enumerate(requests(n))]


@pytest.fixture(scope="session")
def plain(model):
    return generate(Engine(model, 64, 64), mixed(200))


def same(a, b) -> None:
    assert [(s.id, s.tokens, s.finish) for s in a] == [(s.id, s.tokens, s.finish) for s in b]
    if INDEPENDENT or library():
        assert [s.logprobs for s in a] == [s.logprobs for s in b]


@pytest.mark.parametrize("slots", [1, 7, 64])
@pytest.mark.parametrize("n_draft", [1, 2, 3])
def test_speculation_changes_nothing(model, plain, slots, n_draft):
    """200 prompts of mixed lengths and settings: text, finish reason and (bit for bit) log-probs as without MTP."""
    got = generate(Engine(model, slots, 64, n_draft), mixed(200))
    same(got, plain)
    assert sum(s.accepted[0] for s in got) > 0.5 * sum(s.verified[0] for s in got) > 0  # and it did speculate


@pytest.mark.parametrize("slots", [1, 7])
def test_company_changes_nothing(model, plain, slots):
    same(generate(Engine(model, slots, 64), mixed(200)), plain)


@pytest.mark.parametrize("options", [dict(chunk=4), dict(chunk=8, prefill_tokens=16), dict(max_len=100),
                                     dict(runner=GraphRunner, block=8), dict(plain=True, block=24)], ids=str)
@pytest.mark.parametrize("n_draft", [0, 3])
def test_layout_and_chunks_change_no_token(model, plain, options, n_draft):
    """Chunked prefill, another capacity, the block table with static shapes (the GPU's path), the plain path."""
    got = generate(Engine(model, 20, **(dict(max_len=64, n_draft=n_draft) | options)), mixed(60))
    assert [(s.tokens, s.finish) for s in got] == [(s.tokens, s.finish) for s in plain[:60]]
    for a, b in zip(got, plain, strict=False):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


@bits
def test_products_do_not_see_other_rows_or_masked_keys():
    """The basis: attend() gives each row the same bits for any number of rows, sequences and masked keys."""
    g = torch.Generator().manual_seed(0)
    B, K, n, d, C = 3, 2, 16, 12, 448
    k, v = torch.randn(B * K, C, d, generator=g), torch.randn(B * K, C, d, generator=g)
    for last in (0, 5, 15, 16, 100, SUM_PIECE - 1, SUM_PIECE, 200, 300):
        q = torch.randn(B * K, n, d, generator=g)

        def run(b, n, L, q=q, last=last):
            bias = torch.zeros(b * K, 1, L).masked_fill(torch.arange(L) > last, -math.inf)
            both = [attend(q[:b * K, :n], k[:b * K, :L].mT, v[:b * K, :L], x)
                    for x in (bias, bias[::K, None].expand(-1, -1, n, -1))]
            assert torch.equal(*both)
            return both[0]

        whole = run(B, n, C)
        for L in range(-(-(last + 1) // KEY_STEP) * KEY_STEP, C, KEY_STEP):
            assert torch.equal(run(B, n, L), whole)
        for b, m in itertools.product((1, 2), range(MIN_ROWS, n)):
            assert torch.equal(run(b, m, C), whole[:b * K, :m])


# ---- the distribution -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_draft", [0, 1])
def test_chi_square_against_enumeration(n_draft):
    """Vocabulary 8, three tokens: all 512 texts are enumerated; 6,000 samples must fit, and not fit temperature 1."""
    m = build(ModelConfig(vocab_size=8, n_layer=1, d_model=16, n_head=2, n_kv_head=1, head_dim=8, d_ff=32, n_mtp=1))
    m.init_weights(1)
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1:
                p.mul_(12)
    prompt, N, T, top_p = [3, 1, 4], 6000, 0.7, 0.95
    texts = torch.cartesian_prod(*[torch.arange(8)] * 3)  # [512,3]
    ids = torch.cat([torch.tensor(prompt).expand(512, 3), texts], 1)
    with torch.no_grad():
        logits = m.logits(m(ids))[:, 2:5]  # [512,3,8]

    def chances(T, top_p):
        p = (logits / T).softmax(-1).flatten(0, 1)
        p = top_p_filter(p, torch.full((len(p),), top_p), torch.zeros(len(p), dtype=torch.int64))
        return p.view(512, 3, 8).gather(2, texts[..., None])[..., 0].prod(1)  # [512]

    runs = [Request(i, prompt, 3, T, top_p, seed=1000 + i) for i in range(N)]
    got = torch.tensor([s.tokens for s in generate(Engine(m, 250, 16, n_draft), runs)])
    count = torch.bincount(got @ torch.tensor([64, 8, 1]), minlength=512).float()

    def z_score(p):
        """Cells that expect fewer than 5 are pooled; (chi2 - f) / sqrt(2 f) is about normal."""
        big = p * N >= 5
        observed, expected = (torch.cat([x[big], x[~big].sum()[None]]) for x in (count, p * N))
        observed, expected = observed[expected > 0], expected[expected > 0]
        f = len(observed) - 1
        return (((observed - expected) ** 2 / expected).sum() - f) / math.sqrt(2 * f)

    assert abs(z_score(chances(T, top_p))) < 3.5
    assert z_score(chances(1.0, 1.0)) > 20


def test_uniform_is_a_pure_function_and_uniform():
    seeds, index = torch.arange(200)[:, None], torch.arange(50)
    u = uniform(seeds, index)
    assert torch.equal(u[17, 31], uniform(torch.tensor(17), torch.tensor(31)))
    assert 0 <= u.min() and u.max() < 1 and u.unique().numel() > 9_980
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # chi-square, 19 degrees of freedom, p = .001
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):  # no correlation along a request or across seeds
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.04


def test_sampling_by_hand():
    """
    p = (.5, .3, .2): u = .49 samples 0, u = .51 samples 1, u = .81 samples 2. With top_p .6 the distribution is
    (.625, .375, 0): u = .8 samples 1, log-prob ln .375. top_k 1 and temperature 0 sample 0.
    """
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(6, 3)
    u = torch.tensor([0.49, 0.51, 0.81, 0.8, 0.99, 0.99])
    ids, logp = sample_tokens(logits, u, torch.tensor([1.0, 1, 1, 1, 1, 0]), torch.tensor([1.0, 1, 1, 0.6, 1, 1]),
                              torch.tensor([0, 0, 0, 0, 1, 0]))
    assert ids.tolist() == [0, 1, 2, 1, 0, 0]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.5, 0.3, 0.2, 0.375, 1, 0.5]))
    plain = sample_tokens(logits, u)
    assert plain[0].tolist() == [0, 1, 2, 2, 2, 2]
    zero = sample_tokens(torch.tensor([[0.0, -math.inf]]), torch.tensor([1 - 2.0**-24]))
    assert zero[0].item() == 0  # the largest u never reaches a token of mass 0


def test_group_samples_differ_from_the_first_token_on(model):
    group = [Request(i, text(20, 1), 6, temperature=3.0, seed=i) for i in range(16)]
    firsts = {s.tokens[0] for s in generate(Engine(model, 16, 32), group)}
    assert len(firsts) > 4


# ---- cache and log-probs against the full forward -------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, dict(plain=True), dict(runner=GraphRunner, block=16), dict(chunk=8)], ids=str)
def test_cached_logits_equal_the_full_forward(model, options, monkeypatch):
    """Prompts of 1..64 tokens: the logits of the first two decode steps, fp32, within 1e-4."""
    seen = []
    engine = Engine(model, 64, 128, **options)
    runner = engine.runner
    decode, logits = runner.decode, runner.logits
    if isinstance(runner, CpuRunner):
        monkeypatch.setattr(runner, "decode", lambda A: (decode(A), seen.append(runner.c.logits[:, :V].clone()))[0])
    else:
        monkeypatch.setattr(runner, "logits", lambda *a: seen.append(logits(*a)) or seen[-1])
    prompts = [text(n, 900 + n) for n in range(1, 65)]
    for i, p in enumerate(prompts):
        engine.add(Request(i, p, 50, temperature=0.0))  # long enough that none ends while we look
    worst, checked = 0.0, set()
    while len(checked) < 128:
        engine.step()
        for row, r in enumerate(s.request for s in engine.decoding):
            n = int(engine.runner.state["n"][row])
            if n - len(r.prompt) <= 2:
                ids = engine.runner.state["tokens"][row:row + 1, :n - 1]
                full = model.lm_head(model.norm(model(ids)))[0, -1]
                worst = max(worst, (seen[-1][row] - full).abs().max().item())
                checked.add((r.id, n - len(r.prompt)))
    assert worst < 1e-4


@pytest.mark.parametrize("n_draft", [0, 3])
def test_logprobs_equal_the_trainers(model, n_draft):
    for s in generate(Engine(model, 8, 64, n_draft), requests(24)):
        ids = torch.tensor([s.prompt + s.tokens])
        x = model.norm(model(ids[:, :-1]))[0]
        logp, _ = logprob_entropy(x, model.lm_head.weight, ids[0, 1:])
        torch.testing.assert_close(torch.tensor(s.logprobs), logp[len(s.prompt) - 1:], atol=1e-4, rtol=0)


# ---- acceptance -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def counts_by_teacher_forcing(model, sample, n_draft) -> list[list[int]]:
    """
    What the engine must count, from one full forward over the finished text: the drafts of every layer at every
    position, then a walk in rounds. -> [verified per layer, accepted per layer].
    """
    ids = torch.tensor([sample.prompt + sample.tokens + [0] * n_draft])
    n, end = len(sample.prompt), len(sample.prompt) + len(sample.tokens)
    h = model(ids)
    cos, sin = model.rope_at(ids, None)
    drafts = []                                                     # drafts[k][p]: layer k's choice for x_{p+k+2}
    if len(model.mtp_layers) == 1:
        padded = F.pad(ids, (0, n_draft))
        zs = mtp_states(model, h, padded, model.embed_tokens.weight, None, None, n_draft)
    else:
        aheads = (F.pad(ids[:, k + 1:], (0, k + 1)) for k in range(n_draft))
        zs = (layer.final_layernorm(layer(h, model.embed_tokens(ahead), cos, sin))
              for layer, ahead in zip(model.mtp_layers, aheads, strict=False))
    for z in zs:
        drafts.append((z @ model.lm_head.weight.T).argmax(-1)[0].tolist())
    x = ids[0].tolist()

    def round_at(c):
        """With c committed tokens: the drafts for x_c, x_{c+1}, ... that are verified, and accepted."""
        verified, accepted = [0] * n_draft, [0] * n_draft
        for k in range(min(n_draft, end - c)):
            verified[k] = 1
            if drafts[k][c - 2] != x[c + k]:
                break
            accepted[k] = 1
        return verified, accepted

    rounds, c = [([0] * n_draft, [0] * n_draft)], n
    while c < end:
        rounds.append(round_at(c) if c >= 2 else rounds[0])         # after a prompt of one token there is no draft yet
        c += sum(rounds[-1][1]) + 1
    return [[sum(r[i][k] for r in rounds) for k in range(n_draft)] for i in (0, 1)]


def counts(samples) -> list[list[int]]:
    return [[sum(x) for x in zip(*(getattr(s, name) for s in samples), strict=True)]
            for name in ("verified", "accepted")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_acceptance_is_what_teacher_forcing_says(model, temperature):
    """
    Per layer: exactly the count of a walk over teacher-forced drafts (two near-ties allowed), and within 3 points of
    the estimate that eval.py prints, mtp.teacher_forced_acceptance. No stop ids here, so every round is full.
    """
    runs = requests(60, most=40, temperature=temperature)
    got = generate(Engine(model, 16, 96, 3), runs)
    walk = torch.tensor([counts_by_teacher_forcing(model, s, 3) for s in got]).sum(0).tolist()
    online = counts(got)
    for k in range(3):
        assert abs(online[0][k] - walk[0][k]) <= 2 and abs(online[1][k] - walk[1][k]) <= 2
        assert online[0][k] > 100
    estimate = torch.zeros(3, 2)
    for s in got:
        ids, T = [*s.prompt, *s.tokens], len(s.prompt + s.tokens) - 1
        row = torch.tensor([[*ids, 0, 0, 0]])
        docs = torch.tensor([[0] * len(ids) + [1] * 3])
        mask = torch.tensor([[0] * len(s.prompt) + [1] * (len(s.tokens) + 3)])
        bounds = doc_bounds(torch.tensor([0, T], dtype=torch.int32), 1, T)
        estimate += torch.tensor(teacher_forced_acceptance(model, row, docs, torch.arange(T)[None], bounds, mask))
    for k in range(3):
        assert abs(online[1][k] / online[0][k] - estimate[k, 0] / estimate[k, 1]) < 0.03
    assert online[1][0] / online[0][0] > 0.5  # and the drafts are good enough to show a bug


@pytest.mark.parametrize("n_draft", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_rows_that_fill_up_a_batch_leave_prompts_alone(model, n_draft):
    """Blocks: 9 to 11 sequences decode as 16 rows while long prompts are prefilled, in chunks, in the last rows."""
    runs = [Request(i, text(2 + 17 * i % 78, i), 10 + i % 40, temperature=0.0) for i in range(40)]
    options = dict(runner=GraphRunner, block=16, chunk=8, prefill_tokens=16)
    many, alone = (generate(Engine(model, slots, 128, n_draft, **options), runs) for slots in (12, 1))
    assert [s.tokens for s in many] == [s.tokens for s in alone]


@pytest.mark.parametrize("runner", [TorchRunner, GraphRunner])
@pytest.mark.parametrize("n_draft", [0, 3])
def test_bf16_on_a_cpu(model, runner, n_draft):
    """State that NumPy cannot hold, as on a GPU; with an abort, and rows that move."""
    m = build(CFG)
    m.load_state_dict(model.state_dict())
    engine, runs = Engine(m.bfloat16(), 5, 96, n_draft, runner=runner), requests(20, temperature=1.0)
    for r in runs:
        engine.add(r)
    done = engine.step() + engine.step()
    gone = engine.abort(engine.decoding[0].request.id)
    while engine.active or engine.waiting:
        done += engine.step()
    assert sorted([gone.id, *(s.id for s in done)]) == list(range(20))
    for s in done:
        r = runs[s.id]
        assert s.prompt == r.prompt and 1 <= len(s.tokens) <= r.max_new_tokens and len(s.logprobs) == len(s.tokens)


@pytest.mark.parametrize("n_draft", [5, 7])
def test_more_than_three_drafts(n_draft):
    m = build(replace(CFG, n_mtp=8))
    m.init_weights(1)
    runs = requests(12, temperature=1.0)
    a, b = (generate(Engine(m, 4, 96, n_draft, runner=runner), runs) for runner in (TorchRunner, GraphRunner))
    assert [s.tokens for s in a] == [s.tokens for s in b]
    with pytest.raises(ValueError, match="n_draft = 8 should be at most 7"):
        Engine(m, 4, 96, 8, runner=GraphRunner)


def first_layer(model):
    """The model with its first MTP layer alone, which then drafts again and again."""
    m = build(replace(CFG, n_mtp=1))
    m.load_state_dict({name: model.state_dict()[name] for name in m.state_dict()})
    return m.requires_grad_(False)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("layers, n_draft", [(3, 1), (3, 2), (3, 3), (1, 3)])
def test_drafts_depend_on_the_text_alone(model, layers, n_draft, plain):
    """After rounds that committed 1 to 4 tokens the new drafts are those of an engine that just prefilled the text."""
    if not plain and library() is None:
        pytest.skip("no C compiler")
    model = model if layers == 3 else first_layer(model)
    engine, found = Engine(model, 4, 96, n_draft, plain=plain), {}
    for r in requests(40, most=30, temperature=1.0):
        engine.add(r)
    committed = set()
    while engine.active or engine.waiting:
        before = {s.request.id: int(engine.runner.state["n"][i]) for i, s in enumerate(engine.decoding)}
        engine.step()
        for i, r in enumerate(s.request for s in engine.decoding):
            n = int(engine.runner.state["n"][i])
            if r.id in before:
                committed.add(n - before[r.id])
            ids = engine.runner.state["tokens"][i, :n + n_draft].tolist()
            found[tuple(ids[:n])] = ids[n:]
    assert committed == set(range(1, n_draft + 2)) and len(found) > 100
    fresh = Engine(model, 1, 96, n_draft, plain=plain)
    for prompt, drafts in found.items():
        fresh.add(Request(0, list(prompt), 1, 0.0))
        fresh.admit()
        with torch.no_grad():
            fresh.prefill()
        assert fresh.runner.state["tokens"][0, len(prompt):len(prompt) + n_draft].tolist() == drafts
        fresh.abort(0)


@pytest.mark.parametrize("runner", [TorchRunner, GraphRunner, CpuRunner])
def test_one_layer_drafts_several_tokens(model, runner):
    """
    Greedy, sampled, with stop ids: the text of an engine without drafts; and the acceptance of each further application
    is that of a walk over mtp.mtp_states, which tests/test_mtp.py compares with one key at a time (two near-ties).
    """
    if runner is CpuRunner and library() is None:
        pytest.skip("no C compiler")
    one, runs = first_layer(model), mixed(16)
    a, b = (generate(Engine(one, 6, 96, n, runner=runner, block=16), runs) for n in (0, 3))
    assert [s.tokens for s in a] == [s.tokens for s in b]
    got = generate(Engine(one, 16, 96, 3, runner=runner), requests(30, most=40, temperature=0.0))
    walk = torch.tensor([counts_by_teacher_forcing(one, s, 3) for s in got]).sum(0).tolist()
    online = counts(got)
    for k in range(3):
        assert abs(online[0][k] - walk[0][k]) <= 2 and abs(online[1][k] - walk[1][k]) <= 2
    assert online[1][1] > 10                # the second application is right often enough to show a bug


class PostNorm(TorchRunner):
    """MTP reads the state after the final norm."""
    def mtp(self, k, h, ahead, ctx):
        return super().mtp(k, self.model.norm(h), ahead, ctx)


class Shifted(TorchRunner):
    """MTP reads another position's token."""
    def mtp(self, k, h, ahead, ctx):
        return super().mtp(k, h, ahead.roll(1, 1), ctx)


class Stale(TorchRunner):
    """draft() fills the newest position alone: what a rejected draft wrote, and what a round skipped, stays."""
    def draft(self, first, B, E):
        real = super().context

        def last_only(first, positions, columns):
            columns = columns.clone()
            columns[:, :-1] = self.columns - 1
            return real(first, positions, columns)

        self.context = last_only
        super().draft(first, B, E)
        del self.context


def swapped_halves(model):
    """input_proj with [embedding ; hidden] columns, Megatron's order, used as if it had ours."""
    m = build(CFG)
    m.load_state_dict(model.state_dict())
    for layer in m.mtp_layers:
        layer.input_proj.weight.data = layer.input_proj.weight.roll(CFG.d_model, 1)
    return m.requires_grad_(False)


def test_bugs_that_only_lower_acceptance_are_seen(model):
    """Each control gives the same text (speculation stays exact) and clearly fewer accepted drafts."""
    runs = requests(120, most=40, temperature=0.0)
    good = generate(Engine(model, 16, 96, 3), runs)

    def tokens_per_round(samples):
        (first, *_), accepted = counts(samples)
        return 1 + sum(accepted) / first

    best = tokens_per_round(good)
    found = {}
    for cls in (PostNorm, Shifted, Stale):                          # plain: nothing can be put into the C code
        bad = generate(Engine(model, 16, 96, 3, runner=cls), runs)
        assert [s.tokens for s in bad] == [s.tokens for s in good]
        found[cls.__name__] = tokens_per_round(bad)
    found["swapped"] = tokens_per_round(generate(Engine(swapped_halves(model), 16, 96, 3), runs))
    assert all(x < best - 0.04 for x in found.values()), (best, found)      # the stale cache costs least, 0.07 to 0.09


# ---- ends, limits, errors -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_draft", [0, 3])
def test_stop_inside_a_draft(model, n_draft):
    """The text up to and with the first stop id, nothing behind it, whatever a round accepted beyond it."""
    free = generate(Engine(model, 4, 64, n_draft), requests(30, temperature=0.0, most=20))
    for stop in (0, 7):
        got = generate(Engine(model, 4, 64, n_draft), requests(30, temperature=0.0, most=20, stop=(stop, V - 1)))
        for a, b in zip(free, got, strict=True):
            cut = next((i + 1 for i, t in enumerate(a.tokens) if t in (stop, V - 1)), None)
            assert b.tokens == a.tokens[:cut] and b.finish == ("length" if cut is None else "stop")
            assert len(b.logprobs) == len(b.tokens)


@pytest.mark.parametrize("n_draft", [0, 1, 3])
@pytest.mark.parametrize("runner", [CpuRunner, TorchRunner, GraphRunner])
def test_context_limit(model, n_draft, runner):
    """prompt + answer fills max_len to the last column and no further; tokens up to there are the same."""
    wide = generate(Engine(model, 4, 128, n_draft), [Request(n, text(n, n), 40, 0.0) for n in range(1, 30)])
    if runner is CpuRunner and library() is None:
        pytest.skip("no C compiler")
    tight = Engine(model, 4, 30, n_draft, runner=runner, block=16 if runner is CpuRunner else 4)
    got = generate(tight, [Request(n, text(n, n), 40, 0.0) for n in range(1, 30)])
    for a, b in zip(wide, got, strict=True):
        assert b.tokens == a.tokens[:30 - len(b.prompt)] and b.finish == "length"


def test_refusals_are_clear(small):
    e = Engine(small, 2, 16, runner=GraphRunner, kv_tokens=24, block=4)
    e.add(Request("a", [1], 4))
    for request, words in (
        (Request("a", [1], 4), "in flight"),
        (Request("b", [], 4), "1 to max_len - 1 = 15"),
        (Request("b", [1] * 16, 1), "prompt of 16"),
        (Request("b", [V], 1), f"0..{V - 1}"),
        (Request("b", [1], 0), "max_new_tokens = 0"),
        (Request("b", [1], 1, temperature=-1), ">= 0"),
        (Request("b", [1], 1, top_p=0.0), "(0, 1]"),
        (Request("b", [1], 1, stop=(1,) * 9), "at most 8"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            e.add(request)
    with pytest.raises(ValueError, match="should fit the cache of 8"):
        Engine(small, 2, 16, runner=GraphRunner, kv_tokens=8, block=4).add(Request("b", [1] * 9, 4))
    Engine(small, 1, 16, 1).add(Request("b", [1] * 9, 40))  # exactly the capacity of one slot: taken
    with pytest.raises(ValueError, match="n_draft = 8 should be 0 to 7: the model has 1"):
        Engine(small, 2, 16, 8)


# ---- memory ---------------------------------------------------------------------------------------------------------

def test_block_manager_by_hand():
    """Ten blocks of 4 tokens: tables grow block by block, shared blocks are free when their last reader is gone."""
    b = BlockManager(10, 4)
    assert b.allocate("a", 9) and b.tables["a"] == [1, 2, 3]
    assert b.allocate("b", 10, shared=b.tables["a"][:2]) and b.tables["b"] == [1, 2, 4] and b.readers[1] == 2
    assert b.append("a", 12) and b.tables["a"] == [1, 2, 3]         # three blocks hold twelve tokens
    assert b.append("a", 13) and b.tables["a"] == [1, 2, 3, 5]
    assert not b.append("a", 100) and not b.allocate("c", 25) and "c" not in b.tables       # nothing is taken
    assert b.tables["a"] == [1, 2, 3, 5] and len(b.free_blocks) == 5
    b.free("a")
    assert sorted(b.free_blocks) == [3, 5, 6, 7, 8, 9, 10] and b.readers[1] == 1
    b.free("b")
    assert sorted(b.free_blocks) == list(range(1, 11)) and not any(b.readers)


def groups(n: int, size: int) -> list[Request]:
    """Groups of requests with one prompt, as in RL; prompts from 1 token to several blocks."""
    return [Request((g, i), text(1 + 11 * g % 60, g), 6 + (7 * g + 3 * i) % 35, temperature=float(i % 3 > 0),
                    seed=100 * g + i) for g in range(n) for i in range(size)]


@pytest.mark.parametrize("runner", [None, TorchRunner, GraphRunner])
@pytest.mark.parametrize("n_draft", [0, 1, 2, 3])
def test_preempted_sequences_end_as_undisturbed(model, n_draft, runner):
    """
    A cache with a tenth of what the batch would like, groups that share their prompt, aborts, and the same weights
    loaded again: text, finish reason and acceptance as in a cache that has room for all, log-probs bit for bit.
    """
    runs = groups(12, 5)
    wide = {s.id: s for s in generate(Engine(model, 40, 112, n_draft, block=16, runner=runner), runs)}
    e = Engine(model, 40, 112, n_draft, block=16, kv_tokens=40 * 112 // 10, runner=runner, chunk=16)
    for r in runs:
        e.add(r)
    done, weights, gone, calls = {}, {k: v.clone() for k, v in model.state_dict().items()}, [e.abort((0, 2))], 0
    while e.in_flight:
        done |= {s.id: s for s in e.step()}
        calls += 1
        if calls in (10, 30):
            gone.append(e.abort(next(i for i in e.in_flight if i in e.blocks.tables)))
        if calls == 20:
            e.load(weights)
        assert len(e.blocks.free_blocks) + sum(n > 0 for n in e.blocks.readers) == 28
    assert e.preempted > 10 and len(done) + len(gone) == 60 and len(gone) == 3
    for s in done.values():
        right = wide[s.id]
        assert (s.tokens, s.finish, s.verified, s.accepted) == (right.tokens, right.finish, right.verified,
                                                                right.accepted)
        if INDEPENDENT or runner is None and library():
            assert runner is GraphRunner or s.logprobs == right.logprobs
    for s in gone:
        assert s.finish == "abort" and s.tokens == wide[s.id].tokens[:len(s.tokens)]
    assert len(e.blocks.free_blocks) == 28 and not any(e.blocks.readers)


@pytest.mark.parametrize("n_draft", [0, 3])
def test_a_group_stores_its_prompt_once(model, n_draft):
    """16 answers to one prompt of 100 tokens: its whole blocks once, and of each answer the blocks that it writes."""
    e = Engine(model, 16, 128, n_draft, block=16)
    for i in range(16):
        e.add(Request(i, text(100, 1), 20, seed=i))
    e.step()
    tables = [e.blocks.tables[i] for i in range(16)]
    # n_draft 0: token 99 is written next, so six blocks of 16 are shared. n_draft 3: the MTP layers write from 96 on
    assert all(t[:6] == tables[0][:6] for t in tables) and len({b for t in tables for b in t[6:]}) == 16
    used = e.blocks.n_blocks - len(e.blocks.free_blocks)
    assert used == 6 + 16
    e.add(Request("late", text(100, 1), 20, seed=3))                # joins a group that decodes already
    while e.in_flight:
        for s in e.step():
            if s.id == 3:
                right = s
            if s.id == "late":
                late = s
    assert (late.tokens, late.logprobs) == (right.tokens, right.logprobs)


def test_the_leader_of_a_group_is_aborted_while_it_prefills(model):
    """The next request of the group takes over what is shared, and every answer is right."""
    runs = [Request(i, text(100, 1), 12, seed=i) for i in range(4)]
    right = {s.id: s for s in generate(Engine(model, 4, 128, 2), runs)}
    e = Engine(model, 4, 128, 2, chunk=8, block=16)
    for r in runs:
        e.add(r)
    for _ in range(5):
        e.step()
    assert e.abort(0).tokens == []
    for _ in range(2):
        e.step()
    assert e.abort(1).tokens == []
    got = {}
    while e.in_flight:
        got |= {s.id: s for s in e.step()}
    assert list(got) == [2, 3] and all((s.tokens, s.logprobs) == (right[i].tokens, right[i].logprobs)
                                       for i, s in got.items())


def test_load_computes_running_sequences_again(model, small):
    """After load() a sequence goes on as if its text so far were the prompt of a new request under the new weights."""
    m, other = build(CFG), {k: v * 0.9 for k, v in model.state_dict().items()}
    m.load_state_dict(model.state_dict())
    e, runs = Engine(m, 3, 96, 3), requests(6, most=30, temperature=0.0)
    for r in runs:
        e.add(r)
    e.step()
    e.step()
    at = {s.request.id: (s.request.prompt + e.runner.read(row, len(s.request.prompt))[0], s.limit)
          for row, s in enumerate(e.decoding)}
    e.load(other)
    done = {}
    while e.in_flight:
        done |= {s.id: s for s in e.step()}
    fresh = Engine(m, 3, 96, 0)
    for i, (whole, limit) in at.items():
        (right,) = generate(fresh, [Request(0, whole, limit - len(whole), temperature=0.0)])
        assert done[i].prompt + done[i].tokens == whole + right.tokens


def test_room_looks_at_memory(small):
    """Free slots as long as memory is plenty; less when it is not; nothing while requests wait."""
    assert Engine(small, 6, 24).room == 6
    e = Engine(small, 6, 24, block=4, kv_tokens=48, runner=TorchRunner)         # 12 blocks
    e.add(Request(0, [1] * 9, 15, temperature=0.0))
    assert e.room == 0                                              # it waits in the queue
    e.step()
    assert e.room == 2                                              # it has 3 of 12 blocks, and 1 is in reserve: 8 // 3
    for i in range(1, 6):
        e.add(Request(i, [i] * 9, 15, temperature=0.0))
    e.step()
    assert e.room == 0 and e.waiting > 0
    while e.in_flight:
        e.step()
    assert e.room == 6


def test_drafts_while_few_sequences_are_in_flight(model):
    """
    draft_below: 40 requests start without drafts; when eight are left the MTP layers join. The same texts and log-probs
    as without them, fewer steps than without, and the drafts are those of an engine that always drafts.
    """
    runs = [replace(r, max_new_tokens=3 + 3 * i % 77) for i, r in enumerate(requests(40, temperature=0.0))]
    engines = [Engine(model, 40, 120, n, draft_below=below) for n, below in ((0, 0), (3, 8), (3, 0))]
    plain, tail, always = (generate(e, runs) for e in engines)
    assert [(s.tokens, s.logprobs, s.finish) for s in tail] == [(s.tokens, s.logprobs, s.finish) for s in plain]
    assert engines[2].steps < engines[1].steps < engines[0].steps
    some = [(a, b) for a, b in zip(tail, always, strict=True) if a.verified[0]]
    assert 4 <= len(some) <= 8 and all(0 < a.verified[0] < b.verified[0] for a, b in some)
    # from its first draft on a sequence is drafted as if its text until then had been the prompt
    e = Engine(model, 40, 120, 3, draft_below=8)
    for r in runs:
        e.add(r)
    e.step()
    while e.runner.n_draft == 0:
        e.step()
    fresh = Engine(model, 1, 120, 3)
    for _ in range(8):
        e.step()
        for row in range(len(e.decoding)):
            n = e.runner.lengths(len(e.decoding))[row]
            ids = e.runner.state["tokens"][row, :n + 3].tolist()
            fresh.add(Request(0, ids[:n], 1, 0.0))
            fresh.admit()
            with torch.no_grad():
                fresh.prefill()
            assert fresh.runner.state["tokens"][0, n:n + 3].tolist() == ids[n:]
            fresh.abort(0)
    e = Engine(model, 4, 120, 3, draft_below=1)                     # it switches on and off, and on again
    got = {}
    for i in range(0, 40, 4):
        for r in runs[i:i + 4]:
            e.add(r)
        while e.in_flight:
            got |= {s.id: s for s in e.step()}
    assert [(got[r.id].tokens, got[r.id].logprobs) for r in runs] == [(s.tokens, s.logprobs) for s in plain]


@pytest.mark.parametrize("runner", [None, TorchRunner, GraphRunner])
def test_drafts_among_the_first_ids(model, runner):
    """draft_ids: every draft is one of them, the texts are the same; with all ids nothing changes."""
    runs = requests(30, most=30, temperature=0.0)
    right = generate(Engine(model, 8, 96, 3, runner=runner), runs)
    e, seen = Engine(model, 8, 96, 3, draft_ids=17, runner=runner), set()
    draft = e.runner.draft

    def watched(first, B, E):
        draft(first, B, E)
        for row, n in enumerate(e.runner.lengths(first + B)[first:], first):
            seen.update(e.runner.state["tokens"][row, n:n + 3].tolist())
    e.runner.draft = watched
    got = generate(e, runs)
    assert [s.tokens for s in got] == [s.tokens for s in right] and max(seen) < 17 and len(seen) > 5
    assert 0 < sum(counts(got)[1]) < sum(counts(right)[1])
    every = generate(Engine(model, 8, 96, 3, draft_ids=V, runner=runner), runs)
    assert [(s.tokens, s.accepted) for s in every] == [(s.tokens, s.accepted) for s in right]


class Lengths:
    """A runner without a model: a sequence ends at its request's max_new_tokens."""
    n_draft = 0

    def __init__(self, model, slots, *options):
        self.S, self.n, self.limit, self.prefilled = slots, [1] * slots, [1] * slots, 0

    def refresh(self, written=False):
        pass

    def place(self, row, text, done, table):
        self.n[row] = done + 1

    def map_row(self, row, table=()):
        pass

    def copy_blocks(self, pairs):
        pass

    def start(self, first, sequences):
        for row, s in enumerate(sequences, first):
            self.n[row], self.limit[row] = len(s.text), s.limit

    def move(self, sources, targets):
        found = [(self.n[i], self.limit[i]) for i in sources]
        for i, both in zip(targets, found, strict=True):
            self.n[i], self.limit[i] = both

    def lengths(self, A):
        return self.n[:A]

    def read(self, row, first):
        return [0] * (self.n[row] - first), [0.0] * (self.n[row] - first), (), ()

    def prefill(self, first, done, end, T):
        self.prefilled += sum(end) - sum(done)
        for i, n in enumerate(end):
            self.n[first + i] = n + 1

    def decode(self, A):
        self.n[:A] = [n + 1 for n in self.n[:A]]
        ended = [n >= limit for n, limit in zip(self.n[:A], self.limit, strict=False)]
        return torch.tensor(ended) if any(ended) else None, 1


def test_memory_decides_how_many_answers_decode():
    """
    The 7B's lengths in miniature (a tenth: mean 900 of at most 3,072, lognormal, sigma 0.57) and its memory (13,107
    tokens), 64 slots. An answer of L tokens holds L/2 on average, so no policy has more than
    M sum L / sum L^2/2 answers at a time, 21 here; an engine that reserves the longest answer has 4.
    """
    model = SimpleNamespace(cfg=SimpleNamespace(vocab_size=32), mtp_layers=[])
    rng, sigma = random.Random(0), 0.57
    lengths = [max(1, min(3072, int(rng.lognormvariate(math.log(900) - sigma**2 / 2, sigma)))) for _ in range(16 * 24)]
    e = Engine(model, 64, 3276, kv_tokens=13_107, block=16, runner=Lengths)
    for i, n in enumerate(lengths):
        e.add(Request(i, [i // 16 % 32] * 30, n))
    busy = []
    while e.in_flight:
        done = e.step()
        assert all(len(s.tokens) == lengths[s.id] for s in done)
        if e.queue:
            busy.append(len(e.decoding))
    bound = 13_107 * sum(lengths) / sum(n * n / 2 for n in lengths)
    assert 0.9 * bound < sum(busy) / len(busy) <= bound * 1.02 and sum(busy) / len(busy) > 18
    assert e.runner.prefilled < sum(lengths)                        # what pre-emption computes again


def test_long_prompt_does_not_stall_the_others(model):
    """A prompt of 100 tokens in chunks of 8: the short one beside it ends while the long one still prefills."""
    e = Engine(model, 2, 128, 3, chunk=8)
    e.add(Request("long", text(100, 1), 4))
    e.add(Request("short", text(3, 2), 4))
    order = []
    while e.active or e.waiting:
        order += [s.id for s in e.step()]
    assert order == ["short", "long"]


def test_load_takes_effect_and_shared_weights_are_seen(model):
    """load() and an optimizer's in-place step both reach the packed weights of kernels/cpu/decode.py."""
    m = build(CFG)
    m.load_state_dict(model.state_dict())
    e, runs = Engine(m, 4, 64, 3), requests(8, temperature=0.0)
    before = generate(e, runs)
    m.requires_grad_(True)
    opt = torch.optim.SGD(m.parameters(), lr=0.5)
    m.logits(m(torch.tensor([text(30, 1)]))).logsumexp(-1).sum().backward()
    opt.step()
    changed = generate(e, runs)
    assert [s.logprobs for s in changed] != [s.logprobs for s in before]
    assert [s.tokens for s in changed] == [s.tokens for s in generate(Engine(m, 4, 64), runs)]
    e.load(model.state_dict())
    assert [s.tokens for s in generate(e, runs)] == [s.tokens for s in before]


def test_abort_returns_what_there_was(model):
    whole = generate(Engine(model, 4, 64, 3), requests(6, most=30))
    e = Engine(model, 4, 64, 3)
    for r in requests(6, most=30):
        e.add(r)
    assert e.abort(5).tokens == [] and e.abort("nobody") is None
    e.step()
    e.step()
    s = e.abort(e.decoding[0].request.id)
    assert s.finish == "abort" and 1 <= len(s.tokens) and s.tokens == whole[s.id].tokens[:len(s.tokens)]
    rest = {}
    while e.active or e.waiting:
        rest |= {s.id: s.tokens for s in e.step()}
    assert all(tokens == whole[i].tokens for i, tokens in rest.items()) and len(rest) >= 3


# ---- fuzz -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("runner, block, events", [
    (None, 16, 5000), (GraphRunner, 4, 1000), pytest.param(GraphRunner, 4, 5000, marks=pytest.mark.slow)])
def test_random_events(small, runner, block, events):
    """
    Random adds, steps, aborts and reloads: every request ends exactly once and with the text that it has alone, every
    block is freed, memory stays flat.
    """
    rng = random.Random(block)
    e = Engine(small, 6, 24, 1, chunk=6, runner=runner, block=block, kv_tokens=100)
    n_blocks = 100 // block
    prompts = [[rng.randrange(V) for _ in range(rng.randint(1, 20))] for _ in range(30)]
    settings = [dict(max_new_tokens=m, temperature=t, stop=s)
                for m in (1, 3, 9, 50) for t in (0.0, 1.0) for s in ((), (3, 4))]
    kinds = [(p, s) for p in range(30) for s in range(len(settings))]
    samples = generate(Engine(small, 200, 24),
                       [Request(i, prompts[p], seed=p, **settings[s]) for i, (p, s) in enumerate(kinds)])
    alone = dict(zip(kinds, samples, strict=True))
    flying, new, peak, weights = {}, 0, None, {k: v.clone() for k, v in small.state_dict().items()}
    address = e.runner.kv.data_ptr()

    def ended(sample):
        kind = flying.pop(sample.id)                                # KeyError: lost, or twice
        right = alone[kind]
        assert sample.prompt == prompts[kind[0]]
        if sample.finish == "abort":
            assert sample.tokens == right.tokens[:len(sample.tokens)]
        else:
            assert (sample.tokens, sample.finish) == (right.tokens, right.finish)

    for event in range(events):
        dice = rng.random()
        if dice < 0.35 and len(flying) < 40:
            kind = rng.choice(kinds)
            for _ in range(rng.choice((1, 1, 4))):  # groups with one prompt, as in RL
                flying[new] = kind
                e.add(Request(new, prompts[kind[0]], seed=kind[0], **settings[kind[1]]))
                new += 1
        elif dice < 0.45 and flying:
            ended(e.abort(rng.choice(list(flying))))
        elif dice < 0.46:
            e.load(weights)
        else:
            for sample in e.step():
                ended(sample)
        assert e.active + e.waiting == len(flying) and e.active <= 6
        if event == events // 3:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while flying:
        for sample in e.step():
            ended(sample)
    assert (e.active, e.waiting, e.in_flight) == (0, 0, {}) and new > events // 10 and e.preempted > events // 50
    assert sorted(e.blocks.free_blocks) == list(range(1, n_blocks + 1)) and e.blocks.tables == {}
    assert not any(e.blocks.readers) and not e.runner.state["table"].any()
    assert e.runner.kv.data_ptr() == address
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 16 * 1024  # KiB


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("n_draft", [0, 3])
def test_padding_rows_of_the_head_are_never_sampled(model, plain, n_draft):
    """
    The last 7 rows of lm_head made the likeliest by far: never sampled, greedy or not, and the log-probs are those of a
    softmax over the other rows. Without n_ids= they are sampled.
    """
    if not plain and library() is None:
        pytest.skip("no C compiler")
    padded = build(CFG)
    padded.load_state_dict(model.state_dict())
    with torch.no_grad():
        padded.lm_head.weight[V - 7:] = 3 * padded.lm_head.weight[:7]
    runs = [Request(i, text(5 + i, i), 20, temperature=float(i % 2), seed=i) for i in range(8)]
    for s in generate(Engine(padded, 4, 64, n_draft, plain=plain, n_ids=V - 7), runs):
        assert max(s.tokens) < V - 7
        with torch.no_grad():
            ids = torch.tensor([s.prompt + s.tokens])
            logp = padded.logits(padded(ids))[0, len(s.prompt) - 1:-1, :V - 7].log_softmax(-1)
        right = logp.gather(1, torch.tensor(s.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(s.logprobs), right, atol=1e-4, rtol=0)
    sampled = {t for s in generate(Engine(padded, 4, 64, n_draft, plain=plain), runs) for t in s.tokens}
    assert max(sampled) >= V - 7
    with pytest.raises(ValueError, match="n_ids = 33 should be 1 to 32"):
        Engine(padded, 4, 64, n_ids=V + 1)
