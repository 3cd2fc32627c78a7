"""
SmolLM2-135M-Instruct, the model of results/real: its shape, for plan.py and for going on with your own text. The run
itself has real_sft_mtp.py, real_sft.py and real_rl.py; this file was planned with and not run.

    python plan.py config/real_sft.py --gpus=1
    python pretrain.py config/real.py --init=out/real/base --data=out/text
"""
from model import ModelConfig
from schedule import Stage

model = ModelConfig(vocab_size=49_152, n_layer=30, d_model=576, n_head=9, n_kv_head=3, head_dim=64, d_ff=1536,
                    rms_eps=1e-5, rope_base=100_000.0, max_seq_len=8192, n_mtp=1, qkv_bias=False, tie_embeddings=True)
n_mtp_final = 1
out = "out/real/more"
stages = [Stage(name="text", tokens=1e8, seq_len=2048, batch_size=64, lr=1e-4, warmup_tokens=2e6, lr_end=1e-5,
                decay_tokens=9e7, mix=dict(web=1.0))]
micro_batch = 1
sample_every = 0
