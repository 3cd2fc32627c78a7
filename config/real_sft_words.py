# SmolLM2-135M-Instruct learns to answer short word problems shortly, before RL on them (results/real).
init, out, data = "out/real/sft", "out/real/sft_words", "out/real/words_sft.jsonl"
heldout = "out/real/problems/test.jsonl"
seq_len, batch_size, micro_batch = 256, 4, 4
steps, lr, warmup_steps = 10, 5e-5, 1
matmul = "bf16"
