"""
MiMo-7B, the RL problem set: 100K maths and 30K code problems (report section 3.2), from sets of data/hub.py.

    python -m data.rl_problems config/mimo_7b_rl_problems.py --rules_only --out=out/mimo_7b/problems/rl_candidates.jsonl
    python eval.py --ckpt=out/mimo_7b/sft --problems=out/mimo_7b/problems/rl_candidates.jsonl --samples=16 \\
        --temperature=1 --top_p=1 --out=out/mimo_7b/difficulty/sft.json    # the same for the base and a strong model
    python -m data.rl_problems config/mimo_7b_rl_problems.py

The first command leaves what no model has to answer, the last one needs the answers to all that is left. Ours: the base
model's answers beside the SFT model's for the difficulty of tests, where the report says "several models".
"""
problems = "out/mimo_7b/problems/rl_all.jsonl"
out = "out/mimo_7b/problems/rl.jsonl"
answers = ["out/mimo_7b/difficulty/base_answers.jsonl", "out/mimo_7b/difficulty/sft_answers.jsonl"]
strong = "out/mimo_7b/difficulty/strong_answers.jsonl"          # a strong reasoning model, exported with hf.py import
heldout = "out/mimo_7b/problems/test.jsonl"
dedup = True
golden = True
judge_workers = 12
