"""
MiMo-7B, SFT: 500K samples packed to 32,768 tokens, batch 128, constant learning rate 3e-5 (report section 3.1).

    python plan.py config/mimo_7b_sft.py --gpus=8                                     # memory, days
    python -m data.sft_data SAMPLES.jsonl out/mimo_7b/sft_tokens --tokenizer=out/qwen2_tokenizer --workers=32
    torchrun --nproc_per_node=8 sft.py config/mimo_7b_sft.py
    torchrun --nproc_per_node=8 sft.py config/mimo_7b_sft.py --init=out/mimo_7b_hf     # from imported weights

The second line filters and tokenises, once; add --heldout=FILE.jsonl, the questions that no sample may contain.

Ours: three epochs (the report is silent), which are 1,700 steps if a sample has 4,800 tokens on average.
"""
init = "out/mimo_7b/base"
out = "out/mimo_7b/sft"
data = "out/mimo_7b/sft_tokens"            # a folder: of a .jsonl each rank would filter and tokenise all by itself
heldout = "out/mimo_7b/problems/test.jsonl"
seq_len = 32_768
batch_size = 128
micro_batch = 1
steps = 1_700
lr = 3e-5
max_per_query = 8
save_every = 100
checkpointing = "full"
compile = True
reduce_each = True                         # saves 29 GB per GPU
