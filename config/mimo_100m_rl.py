"""
RL of the 100M model on one card (report section 3.3, scaled down; values ours).

    python rl.py config/mimo_100m_rl.py
"""
init = "out/mimo_100m/sft"
out = "out/mimo_100m/rl"
problems = "out/mimo_100m/problems/rl.jsonl"
valid = "out/mimo_100m/problems/valid.jsonl"
steps = 200
batch_size = 64
mini_batch = 64
group_size = 16
lr = 5e-6
max_new_tokens = [(0, 1_024)]
max_groups = 256
slots = 256
kv_tokens = 131_072                             # 1.6 GB, enough for all slots
judge_workers = 6
reward_lag = 128                                # 0.25 s at 2 ms a step (2 GB at 1 TB/s; not measured): programs of 7 ms
                                                # are in time; more would be much of an answer of 1,024 tokens
micro_tokens = 16_384
