"""
Qwen2.5-0.5B goes on with your own text: continued pre-training, all parameters (report section 2.3; values ours).

    python hf.py import Qwen2.5-0.5B out/qwen --mtp=1
    python -m data.hub text your_text.jsonl out/text --tokenizer=out/qwen/step_00000000 --name=web
    python pretrain.py config/qwen.py --init=out/qwen --data=out/text

With --init the shape comes from the checkpoint; it stands here for plan.py, which counts without one.
"""
from model import ModelConfig
from schedule import Stage

model = ModelConfig(vocab_size=151_936, n_layer=24, d_model=896, n_head=14, n_kv_head=2, head_dim=64, d_ff=4864,
                    rms_eps=1e-6, rope_base=1_000_000.0, max_seq_len=32_768, n_mtp=1, tie_embeddings=True)
n_mtp_final = 1
out = "out/qwen_more"
stages = [Stage(name="text", tokens=1e9, seq_len=4096, batch_size=64, lr=2e-5, warmup_tokens=2e7, lr_end=2e-6,
                decay_tokens=9e8, mix=dict(web=1.0))]
micro_batch = 1
checkpointing = "selective"
sample_every = 0
