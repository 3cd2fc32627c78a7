"""
MiMo-7B, SFT with LoRA on one card of 80 GB: the report's rows and context, adapters instead of all parameters (ours).

    python hf.py import MiMo-7B-RL out/mimo_7b_hf                                     # a model that has seen chats
    python plan.py config/mimo_7b_sft_lora.py --gpus=1
    python sft.py config/mimo_7b_sft_lora.py --init=out/mimo_7b_hf --data=samples.jsonl --heldout=

The learning rate is ten times that of all parameters, a rule of thumb.
"""
from config.mimo_7b_sft import *

out = "out/mimo_7b/sft_lora"
lora = dict(rank=16)
batch_size, steps = 16, 500
lr = 3e-4
