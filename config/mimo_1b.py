"""
A 1.1B model with the 7B recipe: 60B tokens, about two days on 8 H100 at 40% MFU.

    torchrun --nproc_per_node=8 pretrain.py config/mimo_1b.py
    python plan.py config/mimo_1b.py --gpus=8

Everything here is ours: the report trained one size. Shape: the 7B's ratios (d_ff = 2.7 D, 4 query heads per kv head).
Stages: the 7B's proportions (75% / 17% / 8% of the tokens) and its decay of the learning rate.
"""
from model import ModelConfig
from schedule import Stage

_B = 1e9

out = "out/mimo_1b/base"
data = "out/mimo_1b/data"
tokenizer = "out/qwen2_tokenizer"
model = ModelConfig(vocab_size=151_680, n_layer=24, d_model=1536, n_head=12, n_kv_head=3, head_dim=128,
                    d_ff=4096, rope_base=10_000.0, max_seq_len=32_768, n_mtp=1)

_stage_3 = {"web": 0.19, "maths": 0.32, "code": 0.32, "books": 0.07, "synth": 0.10}
stages = [
    Stage(name="stage 1", tokens=45 * _B, seq_len=4096, batch_size=512, batch_size_start=64,
          batch_warmup_tokens=1 * _B, lr=4e-4, warmup_tokens=0.5 * _B, lr_end=1e-4, decay_tokens=19 * _B,
          mtp_weight=0.3, mtp_weight_end=0.1, mtp_switch_tokens=26 * _B,
          mix={"web": 0.60, "maths": 0.12, "code": 0.18, "books": 0.10}),
    Stage(name="stage 2", tokens=10 * _B, seq_len=4096, batch_size=512, lr=1e-4,
          mix={"web": 0.22, "maths": 0.35, "code": 0.35, "books": 0.08}),
    Stage(name="stage 3", tokens=5 * _B, seq_len=32_768, batch_size=64, lr=1e-4, lr_end=2e-5,
          decay_tokens=1.25 * _B, rope_base=640_000.0, mix=_stage_3),
]
mtp_stage = Stage(name="MTP", tokens=1 * _B, seq_len=32_768, batch_size=64, lr=3e-4, lr_end=3e-5,
                  warmup_tokens=0.05 * _B, decay_tokens=0.5 * _B, mtp_weight=1.0,
                  rope_base=640_000.0, mix=_stage_3)

micro_batch = 8                            # rows of 4,096 tokens; in stage 3 one row of 32,768
compile = True
async_save = True
save_every = 500
sample_every = 0
valid_tokens = 1_048_576
