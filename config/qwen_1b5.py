"""
Qwen2.5-1.5B: its shape, for plan.py. Training takes the shape from the checkpoint (docs/your_model.md).

    python plan.py config/qwen_sft.py --model=config/qwen_1b5.py --gpus=1 --card=rtx4090 --set.lora.rank=16
    python plan.py config/qwen_rl.py --model=config/qwen_1b5.py --gpus=1 --card=rtx4090 --set.lora.rank=16
"""
from dataclasses import replace

from config.qwen import *

model = replace(model, n_layer=28, d_model=1536, n_head=12, n_kv_head=2, head_dim=128, d_ff=8960)
out = "out/qwen_1b5_more"
