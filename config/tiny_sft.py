"""
MiMo-tiny, SFT (report section 3.1, scaled down; values ours): stopped early, so that RL has something to improve.

    python sft.py config/tiny_sft.py           # half a minute on one core
"""
init, out, data = "out/tiny/base", "out/tiny/sft", "out/tiny/sft.jsonl"
seq_len, batch_size, micro_batch = 256, 8, 8
steps, lr, warmup_steps = 80, 7e-4, 5
