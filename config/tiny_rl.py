# RL of MiMo-tiny from SFT, on-policy (one update per batch, as the report's later recipe).
init, out = "out/tiny/sft", "out/tiny/rl"
problems, valid = "out/tiny/problems/rl.jsonl", "out/tiny/problems/valid.jsonl"
steps, batch_size, mini_batch, group_size = 40, 16, 16, 8
lr, warmup_steps = 5e-4, 3
budget = [(0, 96)]
slots, judge_workers, reward_lag = 128, 1, 8
eval_every, eval_samples = 10, 4
scheme = "soft"
