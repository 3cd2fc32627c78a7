# RL of SmolLM2-135M-Instruct on word problems of one or two steps (results/real).
init, out = "out/real/sft_words", "out/real/rl_1"
problems, valid = "out/real/problems/train.jsonl", "out/real/problems/valid.jsonl"
steps, batch_size, mini_batch, group_size, max_groups = 8, 8, 8, 8, 12
lr, warmup_steps = 3e-5, 1
max_new_tokens = [(0, 48)]
slots, judge_workers, reward_lag = 64, 1, 8
micro_tokens = 4096
save_every = 4
eval_every, eval_samples = 4, 2
matmul = "bf16"
