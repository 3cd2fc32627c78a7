"""
SFT of a model that exists, on one GPU (docs/your_model.md; report section 3.1, values ours).

    python plan.py config/your_sft.py --model=out/qwen --gpus=1
    python sft.py config/your_sft.py --init=out/qwen --data=samples.jsonl
"""
init, out, data, heldout = "out/model", "out/model_sft", "samples.jsonl", ""
seq_len, batch_size, micro_batch = 2048, 16, 1
steps, lr, warmup_steps = 200, 1e-5, 10
checkpointing = "selective"
