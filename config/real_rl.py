# RL of SmolLM2-135M-Instruct on word problems of one or two steps (results/real).
init, out = "out/real/sft", "out/real/rl_1"
problems, valid = "out/real/problems/train.jsonl", "out/real/problems/valid.jsonl"
steps, batch_size, mini_batch, group_size, max_groups = 16, 8, 8, 8, 12
lr, warmup_steps = 2e-5, 2
max_new_tokens = [(0, 64)]
slots, judge_workers, reward_lag = 64, 1, 8
micro_tokens = 4096
save_every = 4
eval_every, eval_samples = 8, 2
matmul = "bf16"
