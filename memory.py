"""
Arithmetic about a run before it exists: parameters, FLOPs, memory.

    python pretrain.py config/mimo_7b.py --dry_run=True
"""


def matmul_params(shape) -> tuple[int, int]:
    """
    (weights that one trunk token is multiplied with, the same for all MTP layers); embeddings are a lookup.
    """
    D, V, F, d = shape.d_model, shape.vocab_size, shape.d_ff, shape.head_dim
    block = D * d * (shape.n_head + 2 * shape.n_kv_head) + shape.n_head * d * D + 3 * D * F
    return shape.n_layer * block + V * D, shape.n_mtp * (block + 2 * D * D + V * D)


def flops_per_token(shape, seq_len: int, causal: bool = True) -> float:
    """
    Training FLOPs per token: 6 per matrix weight, and attention 12 H d T per layer, half of it under a causal
    mask. causal=False is the convention of torchtitan and PaLM, which counts the masked half too.
    """
    trunk, extra = matmul_params(shape)
    attention = 12 * shape.n_head * shape.head_dim * seq_len * (shape.n_layer + shape.n_mtp)
    return 6.0 * (trunk + extra) + attention * (0.5 if causal else 1.0)
