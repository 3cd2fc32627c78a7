# RL of MiMo-tiny from SFT, on-policy: one update per batch, as the report's later recipe (docs/lab_log.md).
init, out = "out/tiny/sft", "out/tiny/rl"
problems, valid = "out/tiny/problems/rl.jsonl", "out/tiny/problems/valid.jsonl"
steps, batch_size, mini_batch, group_size = 90, 24, 24, 8
lr, warmup_steps = 3e-4, 3
max_new_tokens = [(0, 96)]
max_groups = 120
slots, judge_workers, reward_lag = 192, 1, 8
micro_tokens = 2048                         # what stays in a CPU's cache
save_every = 20
eval_every, eval_samples = 20, 4
scheme = "strict"
