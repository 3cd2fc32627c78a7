"""
99M parameters in blocks (and 233M in embedding and lm_head of Qwen2's vocabulary): one 24 GB card, about an hour.

    python pretrain.py config/mimo_100m.py
    python plan.py config/mimo_100m.py --gpus=1 --card=rtx4090

Everything here is ours: the report trained one size. The stages keep the 7B's proportions.
"""
from model import ModelConfig
from schedule import Stage

_M = 1e6

out = "out/mimo_100m/base"
data = "out/mimo_100m/data"
tokenizer = "out/qwen2_tokenizer"
model = ModelConfig(vocab_size=151_680, n_layer=16, d_model=768, n_head=12, n_kv_head=3, head_dim=64,
                    d_ff=2048, rope_base=10_000.0, max_seq_len=8192, n_mtp=1)

_stage_3 = {"web": 0.19, "maths": 0.32, "code": 0.32, "books": 0.07, "synth": 0.10}
stages = [
    Stage(name="stage 1", tokens=88 * _M, seq_len=2048, batch_size=64, batch_size_start=16,
          batch_warmup_tokens=8 * _M, lr=1e-3, warmup_tokens=2 * _M, lr_end=2e-4, decay_tokens=37 * _M,
          mtp_weight=0.3, mtp_weight_end=0.1, mtp_switch_tokens=51 * _M,
          mix={"web": 0.60, "maths": 0.12, "code": 0.18, "books": 0.10}),
    Stage(name="stage 2", tokens=20 * _M, seq_len=2048, batch_size=64, lr=2e-4,
          mix={"web": 0.22, "maths": 0.35, "code": 0.35, "books": 0.08}),
    Stage(name="stage 3", tokens=10 * _M, seq_len=8192, batch_size=16, lr=2e-4, lr_end=4e-5,
          decay_tokens=2.5 * _M, rope_base=640_000.0, mix=_stage_3),
]
mtp_stage = Stage(name="MTP", tokens=4 * _M, seq_len=8192, batch_size=16, lr=5e-4, lr_end=5e-5,
                  warmup_tokens=0.4 * _M, decay_tokens=2 * _M, mtp_weight=1.0, rope_base=640_000.0,
                  mix=_stage_3)

micro_batch = 8                            # rows of 2,048 tokens, 16,384 tokens per forward
compile = True
save_every = 200
sample_every = 0
valid_tokens = 524_288
