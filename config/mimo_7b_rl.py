"""
MiMo-7B, RL from SFT: GRPO with 16 updates per batch (report section 3.3; 3.3.3 for the values).

    python plan.py config/mimo_7b_rl.py --gpus=8                   # memory per GPU, answers at once, hours
    torchrun --nproc_per_node=8 rl.py config/mimo_7b_rl.py         # 80 GB cards; config/mimo_7b_rl_h200.py for 141 GB
    torchrun --nproc_per_node=8 rl.py config/mimo_7b_rl.py --init=out/mimo_7b/base --out=out/mimo_7b/rl_zero

Ours, where the report is silent: G = 16, clip 0.2 / 0.28, no weight decay, the length of the run.
"""
init = "out/mimo_7b/sft"
out = "out/mimo_7b/rl"
problems = "out/mimo_7b/problems/rl.jsonl"      # 100K maths, 30K code [paper 3.2]
valid = "out/mimo_7b/problems/valid.jsonl"
steps = 1_000
batch_size = 512                                # groups per iteration [paper 3.3.3]
mini_batch = 32                                 # groups per update: 16 updates [paper 3.3.3]
group_size = 16
lr = 1e-6
scheme = "soft"
easy_alpha = 0.1
max_groups = 2_048
max_new_tokens = [(0, 30_720)]                  # 32,768 with a prompt of 2,048 [paper 3.3.3]
slots = 64
kv_tokens = 163_840                             # 24 GB: some 25 answers of 9k tokens at a time, and 80 GB are full
reduce_each = True                              # saves 27 GB per GPU
judge_workers = 12
# Rewards are used this many decode steps after a group ended (docs/rollout.md). The judge needs 7 ms for a program, 4 s
# for one that hangs (4 tests of 1 s) and 6 s at most for an expression (docs/judge.md). A decode step takes 25 ms with
# 64 answers of 8,192 tokens (14 GB of weights and 77 GB of cache at 87% of 4,277 GB/s, results/gpu) and 7 ms with the
# last one, so 6 s are 240 to 900 steps. 256 to 1,024 steps cost the same 2% (results/rollout/table2_lag.csv).
reward_lag = 512
micro_tokens = 32_768
eval_every = 20
eval_samples = 8
save_every = 1                                  # an iteration takes hours: lose no more than one
checkpointing = "full"
