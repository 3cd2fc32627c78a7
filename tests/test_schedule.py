"""The report's schedule at each of its breakpoints (section 2.3), and the laws of every Stage."""
import pytest

from schedule import Stage, batch_size_at, breakpoints, lr_at, mtp_weight_at, stage_at, total_tokens

T, B = 1e12, 1e9
PAPER = [
    Stage("stage 1", 84 * B + 10.2 * T + 7.5 * T, 8192, 2560, 160, 168 * B, lr=1.07e-4, warmup_tokens=84 * B,
          lr_end=3e-5, decay_tokens=7.5 * T, mtp_weight=0.3, mtp_weight_end=0.1, mtp_switch_tokens=10.284 * T),
    Stage("stage 2", 4 * T, 8192, 2560, lr=3e-5),
    Stage("stage 3", 2 * T, 32_768, 640, lr=3e-5, lr_end=1e-5, decay_tokens=0.5 * T, rope_base=640_000),
]


@pytest.mark.parametrize("seen, lr, batch, mtp, stage", [
    (0, 0.0, 160, 0.3, 0),                                   # warm-up starts
    (42 * B, 0.535e-4, 760, 0.3, 0),                         # half-way: lr 1.07e-4 / 2, batch 160 + 2400 / 4
    (84 * B, 1.07e-4, 1360, 0.3, 0),
    (168 * B, 1.07e-4, 2560, 0.3, 0),
    (10.283 * T, 1.07e-4, 2560, 0.3, 0),
    (10.285 * T, 1.07e-4, 2560, 0.1, 0),                     # the first 10.3T are over
    (10.284 * T + 3.75 * T, 6.85e-5, 2560, 0.1, 0),          # middle of the cosine: (1.07e-4 + 3e-5) / 2
    (17.784 * T, 3e-5, 2560, 0.1, 1),
    (21.784 * T, 3e-5, 640, 0.1, 2),
    (23.284 * T, 3e-5, 640, 0.1, 2),
    (23.534 * T, 2e-5, 640, 0.1, 2),                         # middle of the last cosine
    (23.784 * T, 1e-5, 640, 0.1, 2),
])
def test_report_schedule(seen, lr, batch, mtp, stage):
    assert lr_at(PAPER, seen) == pytest.approx(lr, rel=1e-4, abs=1e-12)
    assert batch_size_at(PAPER, seen) == batch
    assert mtp_weight_at(PAPER, seen) == mtp
    assert stage_at(PAPER, seen)[0] == stage


def test_total_is_what_the_listed_parts_add_up_to():
    assert total_tokens(PAPER) == pytest.approx(23.784 * T)


def test_learning_rate_never_jumps_inside_a_stage():
    at = [lr_at(PAPER, 17.784 * T * i / 5000) for i in range(5000)]
    assert max(abs(a - b) for a, b in zip(at, at[1:], strict=False)) < 5e-6
    assert min(at[30:]) >= 3e-5


def test_breakpoints_are_in_order_and_name_the_mtp_switch():
    points = breakpoints(PAPER)
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    assert any("MTP" in text and tokens == pytest.approx(10.284 * T) for tokens, text in points)


@pytest.mark.parametrize("bad, message", [
    (dict(tokens=0), "tokens = 0"),
    (dict(tokens=10, warmup_tokens=6, decay_tokens=6), "exceed"),
    (dict(mix={}), "mix"),
    (dict(mix={"web": -1.0}), "mix"),
    (dict(seq_len=1), "seq_len"),
])
def test_bad_stage_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Stage(**bad)
