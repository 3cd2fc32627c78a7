# A fresh MTP layer for SmolLM2-135M-Instruct, from the model's own answers; the trunk is frozen (results/real).
init, out, data, heldout = "out/real/base", "out/real/mtp", "out/real/mtp_answers.jsonl", "out/real/gsm8k_test.jsonl"
train, mtp_weight = "mtp", 1.0
seq_len, batch_size, micro_batch = 512, 4, 4
steps, lr, warmup_steps = 30, 1e-3, 4
save_every = 15
matmul = "bf16"
