"""
Share of the MTP layer's drafts that would be accepted on answers that the model itself wrote before (eval.py's
answers file), counted as an engine goes: mtp.teacher_forced_acceptance. Much cheaper than to decode them again.

    python results/real/acceptance.py CHECKPOINT out/real/eval_base_answers.jsonl 40      # the first 40 questions
"""
import json
import sys

sys.path.insert(0, ".")
import numpy as np
import torch

import checkpoint
import configurator
import distributed
import mtp
from data.loader import make_batch
from model import ModelConfig
from tokenizer import Tokenizer

ckpt, path, n = checkpoint.find(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rt, tokenizer = distributed.setup(device="cpu", matmul="bf16"), Tokenizer.load(ckpt)
shape = configurator.from_dict(ModelConfig, checkpoint.read_shape(ckpt), "model.json")
model = checkpoint.materialise(mtp.build(shape, "meta"), rt, ckpt=ckpt).eval()
ahead, counts = len(model.mtp_layers), 0
for line in open(path, encoding="utf-8").read().splitlines()[:n]:
    row = json.loads(line)
    for answer in row["answers"]:
        ids, mask = tokenizer.chat([{"role": "user", "content": row["question"]},
                                    {"role": "assistant", "content": answer["text"]}])
        end = max(i for i, m in enumerate(mask) if m) + (answer["finish"] == "stop")     # a cut answer has no end
        ids, mask = ids[:end] + [tokenizer.eos_id] * ahead, mask[:end] + [1] * ahead
        batch = make_batch(np.array([ids]), np.array([[0] * end + [1] * ahead]), end - 1, mask=np.array([mask]))
        with torch.no_grad():
            text = batch.ids, batch.docs, batch.positions, batch.bounds, batch.mask
            counts += np.array(mtp.teacher_forced_acceptance(model, *text))
for k, (accepted, verified) in enumerate(counts):
    print(f"{ckpt}: layer {k + 1}: {accepted} of {verified} drafts accepted, {accepted / verified:.1%}")
