"""
MiMo-7B-RL-0530: on-policy RL on 175K samples, the longest answer raised 32K -> 38K -> 48K (report section 3.6).

    torchrun --nproc_per_node=8 rl.py config/mimo_7b_rl_0530.py

One update per batch instead of 16: the ratio of Eq. 1 is exactly 1 and nothing is ever clipped. SFT had grown to 6M
samples by then; the checkpoint it starts from must have a context of 49,152 or more (model.json, max_seq_len). Ours:
the iterations at which the longest answer grows (the report's Fig. 8 shows thirds of the run).
"""
from config.mimo_7b_rl import *

init = "out/mimo_7b/sft_6m"
out = "out/mimo_7b/rl_0530"
mini_batch = batch_size                         # on-policy: one update per batch
steps = 342                                     # 342 x 512 prompts = 175K
max_new_tokens = [(0, 30_720), (114, 36_864), (228, 47_104)]
micro_tokens = 49_152
slots = 48
kv_tokens = 114_688                             # what 80 GB leave beside rows of 49,152; on H200: --kv_tokens=524_288
