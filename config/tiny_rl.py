# RL of MiMo-tiny from SFT: two updates per batch (the report has 16).
init, out = "out/tiny/sft", "out/tiny/rl"
problems, valid = "out/tiny/problems/rl.jsonl", "out/tiny/problems/valid.jsonl"
steps, batch_size, mini_batch, group_size = 80, 16, 8, 8
lr, warmup_steps = 2e-4, 3
budget = [(0, 96)]
max_groups = 96
slots, judge_workers, reward_lag = 128, 1, 8
save_every = 20
eval_every, eval_samples = 20, 4
scheme = "strict"
