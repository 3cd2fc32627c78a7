"""
RL of the 1B model (report section 3.3, scaled down; all values ours but the recipe's shape).

    torchrun --nproc_per_node=8 rl.py config/mimo_1b_rl.py
"""
from config.mimo_7b_rl import *

init = "out/mimo_1b/sft"
out = "out/mimo_1b/rl"
problems = "out/mimo_1b/problems/rl.jsonl"
valid = "out/mimo_1b/problems/valid.jsonl"
steps = 400
batch_size = 128
mini_batch = 64
max_groups = 512
max_new_tokens = [(0, 4_096)]
slots = 128
kv_tokens = 131_072                             # 4.8 GB, enough for all slots
micro_tokens = 16_384
checkpointing = "selective"
save_every = 10
# reward_lag stays 512: 256 answers of 2,048 tokens are 1.7 GB of weights and 19 GB of cache, 5.6 ms a step at the share
# of bandwidth that the 7B's decode reached, so 2.9 s. Not measured. More would be much of an answer of 4,096 tokens
