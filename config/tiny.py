"""
MiMo-tiny, pre-training: the table of config/mimo_7b.py for a laptop CPU, with about a ten-millionth of its tokens.

    python pretrain.py config/tiny.py          # some five minutes on one core

All values are ours, chosen with scores on held-out problems (docs/lab_log.md); the report trained one size.
"""
from model import ModelConfig
from schedule import Stage

out, data, tokenizer = "out/tiny/base", "out/tiny/data", "tiny"
model = ModelConfig(vocab_size=1024, n_layer=4, d_model=128, n_head=8, n_kv_head=4, head_dim=16, d_ff=384,
                    max_seq_len=1024, n_mtp=1)          # 1,281,024 parameters; why many narrow heads: docs/lab_log.md
stages = [
    # no synthetic reasoning; warm-up, constant, cosine; MTP weight 0.3 -> 0.1 where the cosine starts
    Stage("stage 1", tokens=800e3, seq_len=256, batch_size=8, batch_size_start=4, batch_warmup_tokens=80e3,
          lr=3e-3, warmup_tokens=40e3, lr_end=2e-3, decay_tokens=300e3,
          mtp_weight=0.3, mtp_weight_end=0.1, mtp_switch_tokens=500e3,
          mix=dict(web=0.22, maths=0.48, code=0.18, books=0.12)),
    # maths and code at 70% [paper 2.1]
    Stage("stage 2", tokens=800e3, seq_len=256, batch_size=8, lr=2e-3, mtp_weight=0.1,
          mix=dict(web=0.20, maths=0.52, code=0.18, books=0.10)),
    # 10% synthetic reasoning; context and RoPE base raised, a quarter of the rows per step [paper 2.3]
    Stage("stage 3", tokens=600e3, seq_len=1024, batch_size=2, lr=2e-3, lr_end=2e-4, decay_tokens=350e3,
          rope_base=640_000.0, mtp_weight=0.1, mix=dict(web=0.10, maths=0.48, code=0.17, books=0.15, synth=0.10)),
]
# the trained MTP layer is copied into two more; these are fine-tuned, everything else is frozen [paper 2.2]
mtp_stage = Stage("mtp", tokens=150e3, seq_len=256, batch_size=8, lr=2e-3, lr_end=2e-4, decay_tokens=150e3,
                  rope_base=640_000.0, mtp_weight=1.0,
                  mix=dict(web=0.10, maths=0.48, code=0.17, books=0.15, synth=0.10))
micro_batch = 8
shard_ranks = 1                 # several ranks: each has a copy, gradients are averaged; the demo uses two ranks
threads = 1                     # per process: on busy cores two threads are many times slower (docs/lab_log.md)
