"""
A fresh MTP layer for a model that has none, on plain text; the trunk is frozen (report section 2.2; values ours).

    python hf.py import Qwen2.5-0.5B out/qwen --mtp=1
    python -m data.hub text your_text.jsonl out/text --tokenizer=out/qwen/step_00000000 --name=web
    python pretrain.py config/mtp_attach.py --init=out/qwen --data=out/text

A chat model's layer learns best from its own answers: sample.py --file writes them, sft.py --train=mtp takes them
(docs/your_model.md). 50M tokens are a start, not a measured optimum.
"""
from schedule import Stage

out = "out/mtp_attach"
train = "mtp"
stages = [Stage(name="attach", tokens=50e6, seq_len=1024, batch_size=64, lr=1e-3, warmup_tokens=1e6, lr_end=1e-4,
                decay_tokens=40e6, mtp_weight=1.0, mix=dict(web=1.0))]
micro_batch = 1
save_every = 50
sample_every = 0
