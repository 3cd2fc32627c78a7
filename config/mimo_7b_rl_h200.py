"""
MiMo-7B, RL from SFT on 141 GB cards: all 64 slots decode at a time, which halves the hours of a rollout.

    python plan.py config/mimo_7b_rl_h200.py --gpus=8 --card=h200
    torchrun --nproc_per_node=8 rl.py config/mimo_7b_rl_h200.py
"""
from config.mimo_7b_rl import *

kv_tokens = 524_288                             # 77 GB
