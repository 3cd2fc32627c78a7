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


# ---- other families -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, count", [
    (dict(vocab_size=151_936, n_layer=24, d_model=896, n_head=14, n_kv_head=2, head_dim=64, d_ff=4864,
          tie_embeddings=True), 494_032_768),                           # Qwen2.5-0.5B
    (dict(vocab_size=151_936, n_layer=28, d_model=1536, n_head=12, n_kv_head=2, head_dim=128, d_ff=8960,
          tie_embeddings=True), 1_543_714_304),                         # Qwen2.5-1.5B
    (dict(vocab_size=49_152, n_layer=30, d_model=576, n_head=9, n_kv_head=3, head_dim=64, d_ff=1536, qkv_bias=False,
          tie_embeddings=True), 134_515_008),                           # SmolLM2-135M
    (dict(vocab_size=128_256, n_layer=32, d_model=4096, n_head=32, n_kv_head=8, head_dim=128, d_ff=14_336,
          qkv_bias=False), 8_030_261_248),                              # Llama 3 8B
])
def test_parameter_counts_of_other_models(changes, count):
    """As their publishers count them; a tied head is counted once."""
    cfg = ModelConfig(n_mtp=0, **changes)
    assert cfg.n_params() == count == sum(p.numel() for p in mtp.build(cfg, "meta").parameters())
    one = ModelConfig(n_mtp=1, **changes)
    assert one.n_params() == sum(p.numel() for p in mtp.build(one, "meta").parameters())


def losses_of(model):
    ids = torch.randint(0, 64, (2, 15), generator=torch.Generator().manual_seed(2))
    docs = torch.zeros(2, 15, dtype=torch.long)
    bounds = torch.tensor([0, 13], dtype=torch.int32).view(2, 1, 1).expand(2, 2, 13).contiguous()
    main, extra = mtp.losses(model, ids, docs, torch.arange(13)[None].expand(2, 13), bounds)
    return main + sum(extra)


def test_the_gradient_of_a_tied_embedding_is_the_sum_of_both_uses():
    """Against an untied model with the same numbers; one parameter, also after meta, to_empty, deepcopy and .to."""
    import copy
    tied, free = tiny(tie_embeddings=True), tiny()
    free.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.embed_tokens.weight})
    a, b = losses_of(tied), losses_of(free)
    assert torch.equal(a, b)
    a.backward()
    b.backward()
    assert "lm_head.weight" not in dict(tied.named_parameters()) and "lm_head.weight" not in tied.state_dict()
    torch.testing.assert_close(tied.embed_tokens.weight.grad, free.embed_tokens.weight.grad + free.lm_head.weight.grad)
    assert free.lm_head.weight.grad.norm() > 0 < free.embed_tokens.weight.grad.norm()
    torch.testing.assert_close(tied.layers[0].mlp.up_proj.weight.grad, free.layers[0].mlp.up_proj.weight.grad)
    empty = mtp.build(tied.cfg, "meta").to_empty(device="cpu")
    for model in (tied, empty, copy.deepcopy(tied), tiny(tie_embeddings=True).to(torch.bfloat16),
                  mtp.replicate(tied, 3)):
        assert model.lm_head.weight is model.embed_tokens.weight
        assert sum(p.numel() for p in model.parameters()) == model.cfg.n_params()


def test_without_biases_there_are_none_and_nothing_else_changes():
    """A model with biases of zero computes the same bits."""
    bare, zero = tiny(qkv_bias=False), tiny()
    assert not any(name.endswith("bias") for name, _ in bare.named_parameters())
    state = {name: p.new_zeros(p.shape) for name, p in zero.named_parameters()} | dict(bare.state_dict())
    zero.load_state_dict(state)
    ids = torch.arange(20)[None]
    assert torch.equal(bare.logits(bare(ids)), zero.logits(zero(ids)))
