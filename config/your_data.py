"""
The smallest table for your own text: one source, one stage, a small model (docs/your_data.md goes through it).

    python pretrain.py config/your_data.py          # reads out/my/data, source web; tokenizer out/my/tokenizer

A source more is a name more in mix. MTP fine-tuning is left out; config/tiny.py has all stages.
"""
from model import ModelConfig
from schedule import Stage

out, data, tokenizer = "out/my/base", "out/my/data", "out/my/tokenizer"
model = ModelConfig(vocab_size=4096, n_layer=4, d_model=128, n_head=8, n_kv_head=4, head_dim=16, d_ff=384,
                    max_seq_len=1024, n_mtp=1)          # vocab_size: at least the tokenizer's
stages = [Stage("stage 1", tokens=1e6, seq_len=1024, batch_size=2, lr=3e-3, warmup_tokens=40e3, lr_end=2e-4,
                decay_tokens=500e3, mix=dict(web=1.0))]
mtp_stage = None
micro_batch = 2
