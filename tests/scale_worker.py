"""
What one rank of tests/test_scale.py does: train a small model on invented batches and write down what it saw,
or run the real scripts on a few documents. Not a test itself.

    torchrun --nproc_per_node=2 tests/scale_worker.py OUT key=value ...
"""
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from checkpoints import load_latest  # noqa: E402

import checkpoint  # noqa: E402
import distributed  # noqa: E402
import mtp  # noqa: E402
from data.loader import make_batch  # noqa: E402
from metrics import check_finite  # noqa: E402
from model import ModelConfig  # noqa: E402

SHAPE = ModelConfig(128, n_layer=2, d_model=32, n_head=4, n_kv_head=2, head_dim=8, d_ff=64, n_mtp=2)
T, ROWS = 24, 8


def batch_at(step: int, rank: int, world: int, uneven: int):
    """8 rows of packed documents; every row has its own share of masked targets. uneven: the first rank has
    so many rows more."""
    g = np.random.default_rng(step)
    width = T + 1 + SHAPE.n_mtp
    ids, docs = g.integers(0, SHAPE.vocab_size, (ROWS, width)), np.cumsum(g.random((ROWS, width)) < 0.1, 1)
    mask = g.random((ROWS, width)) < np.linspace(0.1, 1.0, ROWS)[:, None]
    cuts = np.linspace(0, ROWS, world + 1).round().astype(int)
    if uneven:
        cuts = np.array([0, *np.minimum(cuts[1:-1] + uneven, ROWS), ROWS])
    lo, hi = cuts[rank], cuts[rank + 1]
    return make_batch(ids[lo:hi], docs[lo:hi], T, mask[lo:hi])


def main(
    out,
    steps=20,
    per_micro=1,
    checkpointing="none",
    shard_ranks=0,
    uneven=0,
    frozen=0,
    run="",
    resume=0,
    save_at=-1,
    background=0,
    validate=0,
    reduce_each=0,
    compile=0,
    starve=0,
    one_gpu=0,
    full_disk=0,
    tied=0,
):
    shape = replace(SHAPE, tie_embeddings=True, qkv_bias=False) if tied else SHAPE
    rt = distributed.setup(seed=1, device="cpu", shard_ranks=shard_ranks)
    if full_disk and rt.is_main:                       # only rank 0 looks
        shutil.disk_usage = lambda path: SimpleNamespace(free=1)
    if one_gpu:                                        # what setup() does for one GPU, on the CPU
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        rt = replace(rt, sharded=True, dtype=torch.bfloat16 if one_gpu == 2 else torch.float32)
    model = mtp.build(shape, "meta")
    if frozen:
        mtp.freeze_all_but_new(model, 1)
    how = {"checkpointing": checkpointing, "shard_ranks": shard_ranks, "compile": bool(compile)}
    model = distributed.shard(model, rt, **how)
    checkpoint.materialise(model, rt, seed=3)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), fused=True)
    start = 0
    if resume:
        state, _ = load_latest(run, model, optimizer)
        start = state["step"]
    seen = []

    def forward(batch, rows):
        trunk, extra = mtp.losses(model, batch.ids, batch.docs, batch.positions, batch.bounds, batch.mask)
        return torch.stack([trunk, *extra])

    for step in range(start, steps):
        batch = batch_at(step, rt.rank, rt.world, 4 if starve else uneven)
        counts = mtp.target_counts(batch.ids, batch.docs, T, SHAPE.n_mtp, batch.mask)
        counts = distributed.all_reduce(counts, rt)
        total = torch.zeros(1 + SHAPE.n_mtp)
        for micro, last in distributed.micro_batches(batch, per_micro, rt):
            sums = forward(micro, micro.positions.shape[0])
            distributed.sync_gradients(model, last or bool(reduce_each), rt)
            ((sums[0] / counts[0] + 0.3 * (sums[1:] / counts[1:]).mean()) * rt.world).backward()
            total += sums.detach()
        total = distributed.all_reduce(total, rt) / counts
        assert {p.grad.dtype for p in trained} == {torch.float32}      # also where blocks compute in bf16
        distributed.average_gradients(model, rt)
        norm = distributed.clip_grad_norm(model, 0.5)
        check_finite({"loss": total}, model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append([*total.tolist(), norm])
        if validate:                                   # a forward without backward leaves the root gathered
            with torch.no_grad():
                forward(batch_at(999, 0, 1, 0), ROWS)
        if step == save_at:
            checkpoint.save(
                run,
                step + 1,
                model,
                optimizer=optimizer,
                config={},
                meta={"stage": "base"},
                state={"step": step + 1},
                shape=vars(shape),
                rt=rt,
                background=bool(background),
            )
    weights = {name: float(w.double().norm()) for name, w in distributed.replica_state(model)}
    copy = distributed.fill(distributed.replica(model, "cpu", torch.float32), distributed.replica_state(model))
    with torch.no_grad():                              # the replica decodes alone: no collective
        logits = copy.logits(copy(torch.arange(16)[None])) if rt.rank == 0 else torch.zeros(1)
    if rt.is_main:
        Path(out).write_text(json.dumps({"seen": seen, "weights": weights, "logits": float(logits.norm())}))
    distributed.teardown(rt)


# ---- the real scripts --------------------------------------------------------------------------------------

def write_data(folder: Path) -> None:
    """Two sources of invented documents as shards, the same numbers for every caller."""
    from data.shards import write_source
    for where, seed in ((folder, 0), (folder / "valid", 1)):
        where.mkdir(parents=True, exist_ok=True)
        for k, name in enumerate(("web", "maths")):
            g = np.random.default_rng([seed, k])
            documents = [g.integers(0, 256, n).tolist() + [1021] for n in g.integers(5, 60, 300)]
            write_source(str(where), name, documents, 1024)


def train_pretrain(folder, term_after=-1, recompute=("none", "none", "none")):
    """
    pretrain.py: two stages with batch warm-up and longer rows, then MTP fine-tuning; 24 steps. recompute: the stages'
    activation checkpointing.
    """
    import configurator
    import pretrain
    folder = Path(folder)
    if int(os.environ.get("RANK", 0)) == 0:
        if not (folder / "data").is_dir():
            write_data(folder / "data.new")
            (folder / "data.new").rename(folder / "data")
    while not (folder / "data").is_dir():
        time.sleep(0.05)
    mix = {"web": 0.5, "maths": 0.5}
    config = (
        f"from model import ModelConfig\nfrom schedule import Stage\n"
        f"out, data, tokenizer = {str(folder / 'base')!r}, {str(folder / 'data')!r}, 'tiny'\n"
        "model = ModelConfig(vocab_size=1024, n_layer=2, d_model=32, n_head=4, n_kv_head=2, head_dim=8,\n"
        "                    d_ff=64, max_seq_len=64, n_mtp=1)\n"
        "stages = [Stage('one', 12 * 7 * 32, 32, 8, batch_size_start=4, batch_warmup_tokens=1600, lr=1e-3,\n"
        f"                warmup_tokens=600, mtp_weight=0.3, mtp_weight_end=0.1, mtp_switch_tokens=1300,\n"
        f"                mix={mix}, checkpointing={recompute[0]!r}),\n"
        f"          Stage('two', 6 * 5 * 64, 64, 5, lr=1e-3, lr_end=1e-4, decay_tokens=800, rope_base=1e5,\n"
        f"                mix={mix}, checkpointing={recompute[1]!r})]\n"
        f"mtp_stage = Stage('mtp', 4 * 5 * 64, 64, 5, lr=1e-3, mtp_weight=1.0, rope_base=1e5, mix={mix},\n"
        f"                  checkpointing={recompute[2]!r})\n"
        "micro_batch, valid_tokens, sample_every, save_every, device = 2, 256, 0, 1000, 'cpu'\n"
    )
    path = folder / f"config{os.environ.get('RANK', 0)}.py"
    path.write_text(config)
    asked = distributed.stop_requested
    calls = iter(range(1, 1000))

    def stop_requested(rt):                            # the signal arrives during step `term_after`
        if next(calls) == term_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(rt)

    distributed.stop_requested = stop_requested
    try:
        pretrain.main(configurator.load(pretrain.Config, [str(path)]))
    finally:
        distributed.stop_requested = asked


def validate(folder, out, shard_ranks=0):
    """pretrain.py's validation of seeded weights, with fewer rows than ranks, as many, and more."""
    import pretrain
    from schedule import Stage
    rt = distributed.setup(device="cpu", seed=1, shard_ranks=shard_ranks)
    shape = ModelConfig(1024, n_layer=1, d_model=32, n_head=4, n_kv_head=2, head_dim=8, d_ff=64, max_seq_len=64)
    model = distributed.shard(mtp.build(shape, "meta"), rt, shard_ranks=shard_ranks)
    model = checkpoint.materialise(model, rt, seed=1)
    stage = Stage(seq_len=64)
    configs = [pretrain.Config(data=f"{folder}/data", model=shape, stages=[stage], valid_tokens=tokens)
               for tokens in (10, 64, 128, 192, 640)]
    found = [pretrain.validate(model, cfg, stage, micro=2, rt=rt) for cfg in configs]
    if rt.is_main:
        Path(out).write_text(json.dumps(found))
    distributed.teardown(rt)


def train_sft(folder, init):
    """sft.py: 6 steps of 5 packed rows."""
    import configurator
    import sft
    folder = Path(folder)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i} + {i % 7}?"},
                {"role": "assistant", "content": f"<think>\n{i} and {i % 7}\n</think>\n\n{i + i % 7}"},
            ]
        }
        for i in range(120)
    ]
    path = folder / f"sft{os.environ.get('RANK', 0)}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    sft.main(
        configurator.load(
            sft.Config,
            [
                f"--init={init}",
                f"--out={folder / 'sft'}",
                f"--data={path}",
                "--heldout=",
                "--seq_len=64",
                "--batch_size=5",
                "--micro_batch=2",
                "--steps=20",
                "--device=cpu",
            ],
        )
    )


def rl_model(rt, shard_ranks=0):
    import rl
    model = mtp.build(SHAPE, "meta")
    model.mtp_layers.requires_grad_(False)
    model = checkpoint.materialise(distributed.shard(model, rt, shard_ranks=shard_ranks), rt, seed=3)
    trained = [p for p in model.parameters() if p.requires_grad]
    return rl, model, torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def train_rl_updates(out, steps=20, mini_batch=8, group_size=4, shard_ranks=0):
    """rl.update on 8 groups of answers of 1 to 14 tokens, most of them generated by rank 0, on any number of ranks."""
    from rollout import Group, RemoteSample, Task
    rt = distributed.setup(seed=1, device="cpu", shard_ranks=shard_ranks)
    rl, model, optimizer = rl_model(rt, shard_ranks)
    cfg = replace(rl.Config(), batch_size=8, mini_batch=mini_batch, group_size=group_size, lr=1e-3, micro_tokens=48,
                  grad_clip=0.5)
    seen = []
    for step in range(steps):
        groups = []
        for index in range(8):
            g, home = np.random.default_rng([step, index]), max(0, index - 5) % rt.world
            prompt = g.integers(0, SHAPE.vocab_size, int(g.integers(1, 8))).tolist()
            samples = []
            for _ in range(group_size):
                answer = g.integers(0, SHAPE.vocab_size, int(g.integers(1, 15))).tolist()
                samples.append(SimpleNamespace(prompt=prompt, tokens=answer, logprobs=[-4.8 - 0.01 * i for i in answer])
                               if home == rt.rank else RemoteSample(range(len(prompt)), range(len(answer)), "stop"))
            groups.append(Group(Task(step, index, index, False), (0, 0), samples, g.random(group_size).tolist(),
                                [{}] * group_size, 0, rank=home))
        stats = rl.update(model, optimizer, SimpleNamespace(groups=groups), cfg, rt, step)
        seen.append([stats[k] for k in ("objective", "entropy", "ratio", "clip_low", "clip_high", "grad_norm",
                                        "ratio_max", "logprob_diff", "trained_tokens")])
    assert rl.NOTHING[0].old is None
    weights = {name: float(w.double().norm()) for name, w in distributed.replica_state(model)}
    if rt.is_main:
        Path(out).write_text(json.dumps({"seen": seen, "weights": weights}))
    distributed.teardown(rt)


class ParityGrader:
    """
    Rewards that a random model earns too: the share of even tokens. Decoded answers differ, so do rewards. On one
    answer of iteration 2 the judge "fails".
    """
    def __init__(self, *_):
        self.ready = []

    def submit(self, key, task, sample):
        reward = sum(t % 2 == 0 for t in sample.tokens) / max(1, len(sample.tokens))
        verdict = "JE" if key == (1, 1, 2) else "right"
        self.ready.append((key, reward, {"passed": False, "verdicts": [verdict]}))

    def poll(self):
        done, self.ready = self.ready, []
        return done

    def close(self):
        pass


def write_base(folder: Path) -> None:
    """A checkpoint of a random model with the tiny tokenizer, and 30 maths problems."""
    from data.problems import Problem, write_problems
    from tokenizer import Tokenizer
    shape = replace(SHAPE, vocab_size=1024, max_seq_len=128)
    model = mtp.build(shape)
    model.init_weights(seed=3)
    checkpoint.save(folder / "base", 1, model, tokenizer=Tokenizer.load("tiny"), config={}, state={},
                            meta={"stage": "sft", "chat": True}, shape=vars(shape))
    write_problems(folder / "problems.jsonl", [Problem(f"{i:016x}", "maths", f"What is {i} + {i * i}?",
                                                       answer=str(i + i * i)) for i in range(30)])


def train_rl(folder, out, *flags, term_after=-1, dtype="", last_rank="", term_in="", nap=0.0):
    """
    rl.py from write_base's checkpoint: 4 iterations of 4 groups of 4 answers. Answers end by chance, at another moment
    on every rank. OUT.rankR.jsonl: the groups of each update. term_after: SIGTERM comes in that iteration. dtype: of
    the replicas, as on a GPU. last_rank: what its engine does in iteration 2, "raises" or "exits"; in the second
    evaluation, "raises there". term_in: SIGTERM reaches the last rank in the "rollout" of iteration 2, or in the second
    "evaluation". nap: seconds that a step of the last rank's engine sleeps in the second evaluation.
    """
    import configurator
    import rl
    rl.Grader = ParityGrader
    setup, asked, calls = distributed.setup, distributed.stop_requested, iter(range(1, 1000))
    update, step, add = rl.update, rl.Engine.step, rl.Engine.add
    now = {"evaluating": False, "evaluations": 0, "iteration": 0}
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))

    def written_update(model, optimizer, batch, *rest):
        with open(f"{out}.rank{rank}.jsonl", "a") as f:
            f.write(json.dumps([[vars(g.task), g.rewards, [len(s.tokens) for s in g.samples]] for g in batch.groups])
                    + "\n")
        return update(model, optimizer, batch, *rest)

    def broken_step(engine):
        if now["iteration"] == 1:
            if last_rank == "exits":
                while not (Path(out) / "latest").is_file():
                    time.sleep(0.01)
                time.sleep(0.5)                        # now rank 0 is done with saving, and waits in take()
                os._exit(7)
            raise ArithmeticError("on purpose")
        return step(engine)

    def watched_add(engine, request):
        evaluating = request.temperature == 0.6
        now["evaluations"] += evaluating and not now["evaluating"]
        now["evaluating"], now["iteration"] = evaluating, request.id[0]
        second = evaluating and now["evaluations"] == 2
        if (term_in == "evaluation" and second) or (term_in == "rollout" and not evaluating and request.id[0] == 1):
            os.kill(os.getpid(), signal.SIGTERM)
        if last_rank == "raises there" and second:
            raise ArithmeticError("on purpose")
        add(engine, request)

    def slow_step(engine):
        time.sleep(nap if now["evaluating"] and now["evaluations"] == 2 else 0)
        return step(engine)

    def in_dtype(**how):
        rt = setup(**how)
        return replace(rt, dtype=getattr(torch, dtype)) if dtype else rt

    def stop_requested(rt):
        if next(calls) == term_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(rt)

    distributed.setup, distributed.stop_requested, rl.update = in_dtype, stop_requested, written_update
    if rank == world - 1:
        rl.Engine.add = watched_add
        rl.Engine.step = broken_step if last_rank in ("raises", "exits") else slow_step
    try:
        rl.main(configurator.load(rl.Config, [
            f"--init={folder}/base", f"--out={out}", f"--problems={folder}/problems.jsonl", "--valid=", "--steps=4",
            "--batch_size=4", "--mini_batch=2", "--group_size=4", "--max_groups=8",
            "--max_new_tokens=[(0,24)]", "--slots=8",
            "--lr=1e-3", "--save_every=1", "--judge_workers=1", "--reward_lag=2", "--micro_tokens=256", "--device=cpu",
            *flags]))
    finally:
        distributed.setup, distributed.stop_requested, rl.update = setup, asked, update
        rl.Engine.step, rl.Engine.add = step, add


def wait_in_vain():
    """Rank 1 comes to no exchange; the ranks wait a second for each other."""
    rt = distributed.setup(device="cpu", timeout=30)
    exchange = distributed.Exchange(replace(rt, timeout=1), 1)
    if rt.rank == 0:
        exchange("here")
    time.sleep(3)


def run_eval(folder, name, stop_after=0):
    """eval.py on write_base's checkpoint and problems. stop_after: SIGTERM reaches rank 1 after so many of its own."""
    import configurator
    import eval as evaluation
    add, count = evaluation.Answers.add, iter(range(1, 1000))

    def counted(self, key, row):
        add(self, key, row)
        if next(count) == stop_after and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
    evaluation.Answers.add = counted
    try:
        evaluation.main(configurator.load(evaluation.Config, [
            f"--ckpt={folder}/base", f"--problems={folder}/problems.jsonl", "--samples=2", "--max_new_tokens=12",
            "--device=cpu", "--slots=6", f"--out={folder}/{name}.json"]))
    finally:
        evaluation.Answers.add = add


if __name__ == "__main__":
    words = dict(word.split("=", 1) for word in sys.argv[2:])
    main(sys.argv[1], **{k: int(v) if v.lstrip("-").isdigit() else v for k, v in words.items()})
