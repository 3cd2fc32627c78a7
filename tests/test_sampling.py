"""Top-p without a full sort: sampling.top_p_filter against the definition, ties included."""
import torch
from torch import Tensor

from sampling import sample_tokens, top_p_filter


def by_definition(p: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Every row by itself, the most likely first, the lower id first among equals, until top_p is reached."""
    kept = torch.zeros_like(p)
    for row, q, most, k in zip(kept, p, top_p, top_k, strict=True):
        before = torch.zeros(())
        for rank, i in enumerate(sorted(range(len(q)), key=lambda i: (-float(q[i]), i))):
            if rank and (before >= most or k and rank >= k):
                break
            row[i], before = q[i], before + q[i]
    return kept / kept.sum(-1, keepdim=True)


def test_top_p_filter_is_its_definition():
    gen = torch.Generator().manual_seed(0)
    for sharpness in (0.1, 1.0, 5.0):
        logits = torch.randn(40, 97, generator=gen) * sharpness
        logits[:20] = logits[:20].round()                       # many equal probabilities
        p = logits.softmax(-1)
        top_p = torch.tensor([0.0, 0.3, 0.9, 0.95, 1.0]).repeat(8)
        top_k = torch.tensor([0, 0, 1, 7]).repeat(10)
        torch.testing.assert_close(top_p_filter(p, top_p, top_k), by_definition(p, top_p, top_k))


def test_a_row_does_not_depend_on_the_other_rows():
    p = (torch.randn(30, 64, generator=torch.Generator().manual_seed(1)) * 2).round().softmax(-1)
    top_p, top_k = torch.linspace(0.5, 1.0, 30), torch.zeros(30, dtype=torch.int64)
    together = top_p_filter(p, top_p, top_k)
    for i in range(30):
        assert torch.equal(top_p_filter(p[i:i + 1], top_p[i:i + 1], top_k[i:i + 1])[0], together[i])


def test_greedy_rows_do_not_depend_on_the_rows_beside_them():
    """At temperature 0 nothing is cut: the log-prob is that at temperature 1, alone or beside a sampled row."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 3
    u, top_p, top_k = torch.tensor([0.3, 0.7, 0.5]), torch.tensor([0.5, 0.9, 0.5]), torch.tensor([0, 0, 2])
    ids, logp = sample_tokens(logits, u, torch.tensor([0.0, 0.6, 0.0]), top_p, top_k)
    greedy, alone = sample_tokens(logits, u, torch.zeros(3))
    assert ids[[0, 2]].equal(greedy[[0, 2]]) and logp[[0, 2]].equal(alone[[0, 2]])
    assert alone.allclose(logits.log_softmax(-1).max(-1).values)
