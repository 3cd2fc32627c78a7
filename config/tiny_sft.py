# SFT of MiMo-tiny: stopped early on purpose, so that RL has something to find.
init, out, data = "out/tiny/base", "out/tiny/sft", "out/tiny/sft.jsonl"
seq_len, batch_size, micro_batch = 256, 8, 8
steps, lr, warmup_steps = 80, 7e-4, 5
