"""
SFT of the 100M model on one card (report section 3.1, scaled down; values ours).

    python sft.py config/mimo_100m_sft.py
"""
init = "out/mimo_100m/base"
out = "out/mimo_100m/sft"
data = "out/mimo_100m/sft.jsonl"
heldout = "out/mimo_100m/problems/test.jsonl"
seq_len = 4096
batch_size = 32
micro_batch = 4
steps = 600
lr = 1e-4
compile = True
