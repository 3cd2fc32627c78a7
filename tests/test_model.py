"""The trunk: parameter counts, causality, document boundaries, agreement with attention as the textbook writes it."""
import math

import pytest
import torch
import torch.nn.functional as F

import mtp
from kernels.attention import attention, doc_bounds
from model import ModelConfig, causal_reference

TINY = ModelConfig(vocab_size=64, n_layer=2, d_model=32, n_head=4, n_kv_head=2, head_dim=8, d_ff=48, max_seq_len=64)


def tiny(**changes):
    model = mtp.build(ModelConfig(**{**vars(TINY), **changes}))
    model.init_weights(seed=3)
    return model


@pytest.mark.parametrize("n_mtp, count", [(0, 7_622_619_136), (1, 7_833_409_536), (3, 8_254_990_336)])
def test_parameter_counts_of_the_7b(n_mtp, count):
    cfg = ModelConfig.mimo_7b(n_mtp)
    assert cfg.n_params() == count
    assert sum(p.numel() for p in mtp.build(cfg, "meta").parameters()) == count


def test_names_and_shapes_are_those_of_the_checkpoint():
    names = {n: tuple(p.shape) for n, p in mtp.build(ModelConfig.mimo_7b(1), "meta").named_parameters()}
    assert len(names) == 435 + 16
    assert names["layers.35.self_attn.k_proj.bias"] == (1024,)
    assert names["layers.0.mlp.down_proj.weight"] == (4096, 11008)
    assert names["mtp_layers.0.input_proj.weight"] == (4096, 8192)
    assert names["lm_head.weight"] == (151_680, 4096)


def test_attention_equals_the_textbook():
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 17, heads, 8, generator=gen) for heads in (4, 2, 2))
    torch.testing.assert_close(attention(q, k, v), causal_reference(q, k, v), atol=1e-6, rtol=1e-5)


def test_changing_a_token_changes_nothing_before_it():
    model, ids = tiny(), torch.arange(20)[None] % 64
    other = ids.clone()
    other[0, 12] = 40
    a, b = model(ids), model(other)
    assert torch.equal(a[0, :12], b[0, :12])
    assert not torch.equal(a[0, 12:], b[0, 12:])


def test_a_document_sees_only_itself():
    """Two documents packed into one row give what each gives alone."""
    model, gen = tiny(), torch.Generator().manual_seed(1)
    a, b = (torch.randint(0, 64, (1, n), generator=gen) for n in (7, 9))
    packed = torch.cat([a, b], 1)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    bounds = doc_bounds(torch.tensor([0, 7, 16], dtype=torch.int32), 1, 16)
    h = model(packed, positions, bounds)
    torch.testing.assert_close(h[:, :7], model(a), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(h[:, 7:], model(b), atol=1e-5, rtol=1e-4)


def test_rope_is_relative_and_the_base_matters():
    model, ids = tiny(), torch.arange(16)[None]
    shifted = model(ids, torch.arange(100, 116)[None])
    torch.testing.assert_close(model(ids), shifted, atol=1e-4, rtol=1e-3)
    before = model(ids)
    model.set_context(640_000, 128)
    assert model.cfg.rope_base == 640_000 and model.cfg.max_seq_len == 128
    assert not torch.allclose(before, model(ids), atol=1e-6)


def test_logits_are_fp32_and_follow_from_the_final_norm():
    model = tiny()
    h = model(torch.arange(8)[None])
    by_hand = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) @ model.lm_head.weight.T
    torch.testing.assert_close(model.logits(h), by_hand, atol=1e-5, rtol=1e-4)
    assert model.to(torch.bfloat16).logits(h.bfloat16()).dtype == torch.float32


def test_first_loss_is_the_uniform_one():
    model, ids = tiny(), torch.arange(64)[None]
    loss = F.cross_entropy(model.logits(model(ids))[0], ids[0])
    assert abs(loss.item() - math.log(64)) < 1.0


@pytest.mark.parametrize("change, message", [
    (dict(n_head=3), "multiple of n_kv_head"), (dict(head_dim=7), "even"), (dict(n_layer=0), "n_layer"),
    (dict(n_mtp=9), "n_mtp"),
])
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**vars(TINY), **change})
