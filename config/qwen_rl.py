"""
RL of a model that exists, on one GPU (docs/your_model.md; report section 3.3, values ours).

    python rl.py config/qwen_rl.py --problems=problems.jsonl
"""
init, out, problems, valid = "out/qwen_sft", "out/qwen_rl", "problems.jsonl", ""
steps, batch_size, mini_batch, group_size, max_groups = 100, 32, 32, 8, 256
max_new_tokens = [(0, 512)]
slots, micro_tokens, kv_tokens = 64, 4096, 65_536
checkpointing = "selective"
