# SmolLM2-135M-Instruct learns GSM8K's form of an answer from a few hundred training answers (results/real).
init, out, data, heldout = "out/real/mtp", "out/real/sft", "out/real/gsm8k_sft.jsonl", "out/real/gsm8k_test.jsonl"
seq_len, batch_size, micro_batch = 512, 4, 4
steps, lr, warmup_steps = 20, 1e-4, 2
save_every = 10
matmul = "bf16"
