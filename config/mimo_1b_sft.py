"""
SFT of the 1B model (report section 3.1, scaled down; the recipe is the report's, the values are ours).

    torchrun --nproc_per_node=8 sft.py config/mimo_1b_sft.py
"""
from config.mimo_7b_sft import *

init = "out/mimo_1b/base"
out = "out/mimo_1b/sft"
data = "out/mimo_1b/sft_tokens"
heldout = "out/mimo_1b/problems/test.jsonl"
seq_len = 16_384
batch_size = 64
steps = 1_000
lr = 5e-5
checkpointing = "selective"
