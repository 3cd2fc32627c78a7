"""MTP: targets worked by hand, losses, replication, and the acceptance rules against enumeration."""
import pytest
import torch
import torch.nn.functional as F

import distributed
import mtp
from configurator import UserError
from data.loader import make_batch
from kernels.attention import doc_bounds
from model import ModelConfig

CFG = ModelConfig(vocab_size=32, n_layer=2, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=48, max_seq_len=64,
                  n_mtp=3)


def model(seed=0):
    m = mtp.build(CFG)
    m.init_weights(seed)
    return m


def batch(T=12, n=3, seed=0):
    """Two rows, documents of 5, 4 and the rest."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (2, T + 1 + n), generator=gen)
    docs = torch.tensor([[0] * 5 + [1] * 4 + [2] * (T + 1 + n - 9)] * 2)
    return make_batch(ids.numpy(), docs.numpy(), T)


def test_targets_by_hand():
    """[A0 A1 A2 B0 B1] with a neighbour C: no target crosses a document."""
    ids = torch.tensor([[10, 11, 12, 20, 21, 30, 31, 32]])
    docs = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    trunk, layer0, layer1 = (t.tolist() for t in mtp.mtp_targets(ids, docs, 5, 2))
    assert trunk == [[11, 12, -100, 21, -100]]
    assert layer0 == [[12, -100, -100, -100, -100]] and layer1 == [[-100] * 5]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    assert mtp.target_counts(ids, docs, 5, 1, mask).tolist() == [2, 1]


def test_losses_equal_cross_entropy_of_the_full_logits():
    m, b = model(), batch()
    bounds = b.bounds
    main, extra = mtp.losses(m, b.ids, b.docs, b.positions, bounds)
    h = m(b.ids[:, :12], b.positions, bounds)
    cos, sin = m.rope_at(b.ids[:, :12], b.positions)
    summed = lambda logits, depth: F.cross_entropy(
        logits.flatten(0, 1), mtp.mtp_targets(b.ids, b.docs, 12, 3)[depth - 1].flatten(), reduction="sum")
    want = [summed(m.logits(h), 1)]
    for k, layer in enumerate(m.mtp_layers):
        z = layer(h, m.embed_tokens(b.ids[:, k + 1:13 + k]), cos, sin, bounds)
        want.append(summed(layer.final_layernorm(z) @ m.lm_head.weight.T, k + 2))
    for got, ref in zip([main, *extra], want, strict=True):
        torch.testing.assert_close(got, ref, atol=1e-3, rtol=1e-5)
    # two rows, documents of 5, 4 and 3 tokens, the last going on beyond the row
    by_hand = [2 * (4 + 3 + 3), 2 * (3 + 2 + 3), 2 * (2 + 1 + 3), 2 * (1 + 0 + 3)]
    assert mtp.target_counts(b.ids, b.docs, 12, 3).tolist() == by_hand


def test_micro_batches_add_up_to_the_whole_gradient():
    m, b = model(), batch()
    def grad(parts):
        m.zero_grad()
        for p in parts:
            main, extra = mtp.losses(m, p.ids, p.docs, p.positions, p.bounds)
            (main + sum(extra)).backward()
        return torch.cat([q.grad.flatten() for q in m.parameters()])
    torch.testing.assert_close(grad([b]), grad([b.rows(0, 1), b.rows(1, 2)]), atol=1e-4, rtol=1e-4)


def test_mtp_layer_reads_the_state_before_the_final_norm_hidden_first():
    m, b = model(), batch()
    layer, h = m.mtp_layers[0], torch.randn(1, 4, 32)
    emb = torch.randn(1, 4, 32)
    cos, sin = m.rope_at(torch.zeros(1, 4), None)
    rms = lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    W = layer.input_proj.weight
    z = rms(h) @ W[:, :32].T + rms(emb) @ W[:, 32:].T
    from model import Block
    torch.testing.assert_close(layer(h, emb, cos, sin), Block.forward(layer, z, cos, sin), atol=1e-5, rtol=1e-4)
    # a gain on the final norm must not reach the MTP input
    before = mtp.losses(m, b.ids, b.docs, b.positions, b.bounds)[1][0]
    with torch.no_grad():
        m.norm.weight.mul_(3.0)
    after = mtp.losses(m, b.ids, b.docs, b.positions, b.bounds)[1][0]
    assert torch.equal(before, after)


def test_replication_copies_the_trained_layer_and_freezing_trains_only_the_new():
    one = mtp.build(ModelConfig(**{**vars(CFG), "n_mtp": 1}))
    one.init_weights(5)
    three = mtp.replicate(one, 3)
    assert three.cfg.n_mtp == 3
    for k in (1, 2):
        first, copy = three.mtp_layers[0].named_parameters(), three.mtp_layers[k].named_parameters()
        for (n0, a), (nk, c) in zip(first, copy, strict=True):
            assert n0 == nk and torch.equal(a, c) and a.data_ptr() != c.data_ptr()
    mtp.freeze_all_but_new(three, 1)
    trained = {n for n, p in three.named_parameters() if p.requires_grad}
    assert trained == {n for n in dict(three.named_parameters()) if n.startswith(("mtp_layers.1.", "mtp_layers.2."))}


def test_training_the_mtp_layers_alone_stores_nothing_of_the_trunk():
    """The bytes that autograd keeps do not depend on the trunk's depth; gradients and optimizer are the layers' own."""
    kept = []
    for n_layer in (1, 5):
        m = mtp.build(ModelConfig(**{**vars(CFG), "n_layer": n_layer}))
        m.init_weights(1)
        full, small = 0, 0
        b = batch()

        def count(t):
            nonlocal small
            small += t.numel() * t.element_size() if not isinstance(t, torch.nn.Parameter) else 0
            return t
        mtp.freeze_all_but_new(m, 0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            main, extra = mtp.losses(m, b.ids, b.docs, b.positions, b.bounds)
        assert not main.requires_grad
        (main + sum(extra)).backward()
        assert {n.split(".")[0] for n, p in m.named_parameters() if p.grad is not None} == {"mtp_layers"}
        optimizer = distributed.adamw(m, 1e-3, (0.9, 0.95), 0.1)
        optimizer.step()
        full = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.ndim)
        assert full == 2 * sum(p.numel() for p in m.mtp_layers.parameters())
        kept.append(small)
    assert kept[0] == kept[1] > 0


def test_greedy_acceptance_by_hand():
    drafts = torch.tensor([[5, 7, 9], [5, 8, 9], [1, 8, 9]])
    argmax = torch.tensor([[5, 8, 9, 4]] * 3)
    assert mtp.accept_matching(drafts, argmax).tolist() == [1, 3, 0]


def test_sampled_acceptance_keeps_the_distribution():
    """
    One draft, V = 4: P(x) = q(x) min(1, p(x)/q(x)) + P(rejected) r(x) must be p(x). The rejection probability and the
    residual are taken from accept_sampled itself, over 4,000 values of u evenly between 0 and 1.
    """
    p1, q1 = torch.tensor([.4, .3, .2, .1]), torch.tensor([.1, .2, .3, .4])
    total = torch.zeros(4)
    n = 4000
    for x in range(4):
        u = (torch.arange(n) + 0.5) / n
        p = torch.stack([p1, p1]).expand(n, 2, 4)
        kept, residual = mtp.accept_sampled(p, q1.expand(n, 1, 4), torch.full((n, 1), x), u[:, None])
        share = kept.float().mean()
        total[x] += q1[x] * share
        if share < 1:
            total += q1[x] * (1 - share) * residual[kept == 0][0]
    torch.testing.assert_close(total, p1, atol=1e-3, rtol=0)


def test_sampled_acceptance_with_one_hot_drafts_and_all_kept():
    p = torch.tensor([[[.25, .75], [.5, .5]]])
    one_hot = torch.tensor([[[0., 1.]]])
    kept, nxt = mtp.accept_sampled(p, one_hot, torch.tensor([[1]]), torch.tensor([[0.7]]))
    assert kept.item() == 1 and nxt.tolist() == [[.5, .5]]           # p itself after the last draft
    kept, nxt = mtp.accept_sampled(p, one_hot, torch.tensor([[1]]), torch.tensor([[0.8]]))
    assert kept.item() == 0 and nxt.tolist() == [[1.0, 0.0]]         # residual: p without the rejected token


def test_agreement_walks_in_rounds(monkeypatch):
    """
    By hand, one document of 9 tokens, T = 8, two layers, drafts right (1) or wrong (0) at slot i = 0..6:
        layer 0:  1 0 1 1 1 0 0      round at 0: layer 0 right, layer 1 wrong -> next at 2
        layer 1:  0 1 1 1 0 1 -      at 2: both right -> 5;  at 5: wrong -> 6;  at 6: wrong -> 7, where the text ends
    looked at: layer 0 four times, 2 right; layer 1 two times, 1 right. With a mask from token 4 on, slots 0 and 1 have
    no draft to look at: rounds at 2 (both right), 5, 6.
    """
    m = mtp.build(ModelConfig(vocab_size=16, n_layer=1, d_model=16, n_head=1, n_kv_head=1, head_dim=16, d_ff=16,
                              n_mtp=2))
    T, plan = 8, ([1, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 1, 0, 0])
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 0, 0]])
    docs = torch.tensor([[0] * 9 + [1] * 2])
    monkeypatch.setattr(m.lm_head, "weight", torch.nn.Parameter(torch.eye(16)))
    for k, layer in enumerate(m.mtp_layers):
        said = [ids[0, i + k + 2].item() if plan[k][i] else 15 for i in range(T)]
        monkeypatch.setattr(layer, "forward", lambda *a, said=said: torch.eye(16)[said][None])
        monkeypatch.setattr(layer.final_layernorm, "forward", lambda z: z)
    bounds = doc_bounds(torch.tensor([0, 8], dtype=torch.int32), 1, T)
    at = ids, docs, torch.arange(T)[None], bounds
    assert mtp.teacher_forced_acceptance(m, *at) == [(2, 4), (1, 2)]
    assert mtp.teacher_forced_acceptance(m, *at, torch.tensor([[0] * 4 + [1] * 7])) == [(1, 3), (1, 1)]


# ---- one layer, applied again and again -----------------------------------------------------------------------------

def one_layer(dtype=torch.float64, seed=3):
    m = mtp.build(ModelConfig(**{**vars(CFG), "n_mtp": 1}))
    m.init_weights(seed)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():                     # gains and biases that show: fresh ones are 1 and 0
        for p in m.parameters():
            p.add_(torch.randn(p.shape, generator=gen) * (0.3 if p.ndim == 1 else 0.02))
    mtp.freeze_all_but_new(m, 0)
    return m.to(dtype)


def walked(m, ids, docs, T, depth):
    """
    The losses as a serving engine would see them, one row, one anchor and one key at a time: z^1 of every position
    fills the cache; then from position i the layer reads its own state and the token after it, one position further.
    """
    layer, attn, cfg = m.mtp_layers[0], m.mtp_layers[0].self_attn, m.cfg
    rms = lambda x, norm: x / (x.pow(2).mean(-1, keepdim=True) + cfg.rms_eps).sqrt() * norm.weight

    def parts(state, token, place):           # -> x, q [H,d], k and v [K,d] of one position
        x = layer.input_proj(torch.cat([rms(state, layer.hidden_layernorm),
                                        rms(m.embed_tokens.weight[token], layer.token_layernorm)]))
        y, (cos, sin) = rms(x, layer.input_layernorm), m.rope_at(None, torch.tensor([place]))
        turn = lambda a: a * cos[0] + torch.cat([-a[:, cfg.head_dim // 2:], a[:, :cfg.head_dim // 2]], 1) * sin[0]
        q, k, v = (p(y).view(-1, cfg.head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        return x, turn(q), turn(k), v

    def after(x, q, keys, values):            # attention over a list of keys, then the MLP
        o = []
        for head in range(cfg.n_head):
            kv = head * cfg.n_kv_head // cfg.n_head
            weight = torch.stack([q[head] @ k[kv] / cfg.head_dim ** 0.5 for k in keys]).softmax(0)
            o.append(sum(w * v[kv] for w, v in zip(weight, values, strict=True)))
        x = x + attn.o_proj(torch.cat(o))
        return rms(x + layer.mlp(rms(x, layer.post_attention_layernorm)), layer.final_layernorm)

    total = [0.0] * depth
    for row in range(len(ids)):
        place = [i - min(j for j in range(T) if docs[row, j] == docs[row, i]) for i in range(T)]
        for doc in docs[row, :T].unique():
            mine = [i for i in range(T) if docs[row, i] == doc]
            h = m(ids[row:row + 1, mine])[0]
            cache = [parts(h[n], ids[row, i + 1], place[i]) for n, i in enumerate(mine)]
            for n, i in enumerate(mine):
                keys, values = [c[2] for c in cache[:n + 1]], [c[3] for c in cache[:n + 1]]
                (x, q), state = cache[n][:2], None
                for j in range(depth):
                    if docs[row, i + j + 2] != doc:
                        break
                    if j:
                        x, q, k, v = parts(state / m.norm.weight, ids[row, i + j + 1], place[i] + j)
                        keys, values = [*keys, k], [*values, v]
                    state = after(x, q, keys, values)
                    total[j] = total[j] - (state @ m.lm_head.weight.T).log_softmax(-1)[ids[row, i + j + 2]]
    return total


def test_repeated_application_equals_a_walk_of_one_key_at_a_time(monkeypatch):
    """Two rows of three documents, three applications; in one piece and in pieces of five positions."""
    m, b = one_layer(), batch()
    want = walked(m, b.ids, b.docs, 12, 3)
    for rows in (512, 5):
        monkeypatch.setattr(mtp.Chain, "ROWS", rows)
        _, got = mtp.losses(m, b.ids, b.docs, b.positions, b.bounds, depth=3)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-6)
    assert mtp.target_counts(b.ids, b.docs, 12, 3).tolist()[1:] == [16, 12, 8]
    _, (first,) = mtp.losses(m, b.ids[:, :14], b.docs[:, :14], b.positions, b.bounds)
    torch.testing.assert_close(first, got[0])


def test_gradients_of_repeated_application_by_finite_differences():
    m, b = one_layer(), batch()
    loss = lambda: mtp.mean_loss(torch.stack(mtp.losses(m, b.ids, b.docs, b.positions, b.bounds, depth=3)[1]), 3)
    loss().backward()
    assert {n.split(".")[0] for n, p in m.named_parameters() if p.grad is not None} == {"mtp_layers"}
    gen = torch.Generator().manual_seed(0)
    for name, p in m.mtp_layers.named_parameters():
        way, eps = torch.randn(p.shape, generator=gen, dtype=p.dtype), 1e-5
        with torch.no_grad():
            p.add_(eps * way)
            high = loss()
            p.sub_(2 * eps * way)
            low = loss()
            p.add_(eps * way)
        slope = (high - low) / (2 * eps)
        torch.testing.assert_close((p.grad * way).sum(), slope, atol=1e-5, rtol=1e-5, msg=name)


def test_weights_of_repeated_application_by_hand():
    torch.testing.assert_close(mtp.mean_loss(torch.tensor([1.0, 0, 0]), 3), torch.tensor(1 / 1.96))
    torch.testing.assert_close(mtp.mean_loss(torch.tensor([0.0, 0, 1]), 3), torch.tensor(0.36 / 1.96))
    assert mtp.mean_loss(torch.tensor([1.0, 2, 6])) == 3.0


def test_depth_needs_one_layer_trained_alone():
    for train, layers in (("all", 1), ("mtp", 3), ("mtp", 0)):
        with pytest.raises(UserError, match="mtp_depth = 3"):
            mtp.check_depth(3, train, layers, "the model")
    mtp.check_depth(3, "mtp", 1, "the model")
    mtp.check_depth(1, "all", 3, "the model")
