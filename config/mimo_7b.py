"""
MiMo-7B, pre-training: the report's values (sections 2.2 and 2.3).

    python plan.py config/mimo_7b.py --gpus=8                    # parameters, schedule, memory, days
    torchrun --nproc_per_node=8 pretrain.py config/mimo_7b.py    # lines for several nodes: docs/scale.md

Ours, where the report is silent: the weights inside a mixture, the first batch of the warm-up (1/16 of the full one),
and everything about the stage that fine-tunes the two copied MTP layers.
"""
from model import ModelConfig
from schedule import Stage

_T, _B = 1e12, 1e9                         # a trillion and a billion tokens; names with _ are private to the file

out = "out/mimo_7b/base"
data = "out/mimo_7b/data"                  # shards <data>/<source>; docs/data.md: how to make them
tokenizer = "out/qwen2_tokenizer"          # folder with Qwen2's tokenizer.json
model = ModelConfig(vocab_size=151_680, n_layer=36, d_model=4096, n_head=32, n_kv_head=8, head_dim=128,
                    d_ff=11_008, rms_eps=1e-5, rope_base=10_000.0, max_seq_len=32_768, n_mtp=1)

# ~10% synthetic reasoning in stage 3 [paper 2.1]
_stage_3 = {"web": 0.19, "maths": 0.32, "code": 0.32, "books": 0.07, "synth": 0.10}
stages = [
    Stage(name="stage 1", tokens=84 * _B + 10.2 * _T + 7.5 * _T, seq_len=8192,
          batch_size=2560, batch_size_start=160, batch_warmup_tokens=168 * _B,
          lr=1.07e-4, lr_start=0.0, warmup_tokens=84 * _B, lr_end=3e-5, decay_tokens=7.5 * _T,
          mtp_weight=0.3, mtp_weight_end=0.1, mtp_switch_tokens=84 * _B + 10.2 * _T, rope_base=10_000.0,
          mix={"web": 0.60, "maths": 0.12, "code": 0.18, "books": 0.10}, checkpointing="none"),
    # maths and code at ~70% [paper 2.1]
    Stage(name="stage 2", tokens=4 * _T, seq_len=8192, batch_size=2560, lr=3e-5, rope_base=10_000.0,
          mix={"web": 0.22, "maths": 0.35, "code": 0.35, "books": 0.08}, checkpointing="none"),
    # 42 GB on each of 8 GPUs; "selective" takes a sixth less time, but 77 GB (63 on each of 64 GPUs)
    Stage(name="stage 3", tokens=2 * _T, seq_len=32_768, batch_size=640, lr=3e-5, lr_end=1e-5,
          decay_tokens=0.5 * _T, rope_base=640_000.0, mix=_stage_3, checkpointing="full"),
]
mtp_stage = Stage(name="MTP", tokens=20 * _B, seq_len=32_768, batch_size=640, lr=1e-4, lr_end=1e-5,
                  warmup_tokens=1 * _B, decay_tokens=10 * _B, mtp_weight=1.0, rope_base=640_000.0,
                  mix=_stage_3)
n_mtp_final = 3

micro_batch = 1                            # one row of 8,192 or of 32,768 tokens at a time
reduce_each = True                         # saves 27 GB per GPU: room to recompute nothing in stages 1 and 2
compile = True
async_save = True
save_every = 50                            # steps; one takes some six minutes on 8 GPUs
sample_every = 0
valid_tokens = 4_194_304
