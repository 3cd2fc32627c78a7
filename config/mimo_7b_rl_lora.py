"""
MiMo-7B, RL with LoRA on one card of 80 GB: base and rollout engine in bf16, adapters in fp32 (sizes ours).

    python hf.py import MiMo-7B-SFT out/mimo_7b_hf
    python plan.py config/mimo_7b_rl_lora.py --gpus=1
    python rl.py config/mimo_7b_rl_lora.py --init=out/mimo_7b_hf --problems=problems.jsonl --valid=

The learning rate is ten times that of all parameters, a rule of thumb; one update per batch.
"""
from config.mimo_7b_rl import *

out = "out/mimo_7b/rl_lora"
lora = dict(rank=16)
steps, batch_size, mini_batch, group_size, max_groups = 200, 32, 32, 8, 128
lr = 1e-5
max_new_tokens = [(0, 8192)]
slots, kv_tokens, micro_tokens, reward_lag = 64, 163_840, 16_384, 256
eval_samples = 4
