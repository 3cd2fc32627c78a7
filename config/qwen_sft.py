"""
SFT of a model that exists, on one GPU (docs/your_model.md; report section 3.1, values ours).

    python plan.py config/qwen_sft.py --gpus=1                      # or --model=out/qwen, for another shape
    python sft.py config/qwen_sft.py --data=samples.jsonl
"""
init, out, data, heldout = "out/qwen", "out/qwen_sft", "samples.jsonl", ""
seq_len, batch_size, micro_batch = 2048, 16, 1
steps, lr, warmup_steps = 200, 1e-5, 10
checkpointing = "selective"
