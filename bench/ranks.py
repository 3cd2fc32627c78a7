"""
Pre-training of the toy on one rank, on two ranks under FSDP2, and on two ranks with plain copies (shard_ranks = 1).

    python -m data.prepare && python bench/ranks.py          # two idle cores; a few minutes

The three variants run one after the other, `rounds` times, each with a new model on rows of config/tiny.py's first
stage. Tokens per second are the median over steps and rounds, without the first five steps of a run. The last line is
plain copies over one rank: what the demo's pre-training gains by a second core. Ours: 1.20, results/scale/ranks.json.
"""
import json
import platform
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import configurator  # noqa: E402
import demo  # noqa: E402

VARIANTS = {"one rank": (1, 0), "two ranks, FSDP2": (2, 0), "two ranks, plain copies": (2, 1)}     # ranks, shard_ranks
MIX = {"web": 0.22, "maths": 0.48, "code": 0.18, "books": 0.12}


@dataclass(frozen=True)
class Config:
    data: str = "out/tiny/data"           # token shards that data/prepare.py wrote
    steps: int = 40                       # steps of 2,048 tokens in one run
    rounds: int = 2                       # times that each variant runs
    out: str = "out/bench/ranks"          # folder of the runs; the result goes to the same name with .json

    def __post_init__(self):
        configurator.at_least(self, 6, "steps")
        configurator.at_least(self, 1, "rounds")


def tokens_per_second(cfg: Config, name: str, ranks: int, shard_ranks: int) -> list[float]:
    """One run of pretrain.py with this number of ranks. -> tokens per second of each step. UserError if it fails."""
    run = Path(cfg.out) / name.replace(" ", "_").replace(",", "")
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    tokens = cfg.steps * 2048
    stage = {"tokens": tokens, "batch_size_start": 0, "batch_warmup_tokens": 0, "warmup_tokens": 0, "decay_tokens": 0,
             "mtp_switch_tokens": 0, "lr_end": 0.0, "mtp_weight_end": 0.1}
    words = ["pretrain.py", "config/tiny.py", f"--out={run}", f"--data={cfg.data}", f"--shard_ranks={shard_ranks}",
             "--mtp_stage=None", "--sample_every=0", "--valid_tokens=2048", "--device=cpu",
             f"--stages={[{'name': 'bench', 'seq_len': 256, 'batch_size': 8, 'lr': 3e-3, 'mix': MIX} | stage]}"]
    processes = demo.start_ranks(words, run / "log", ranks, folder=run)
    for p in processes:
        p.wait()
    if any(p.returncode for p in processes):
        raise configurator.UserError(f"the run {name!r} failed, see {run}/log")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["tokens_per_second"] for r in rows if "loss" in r][5:]


def main(cfg: Config) -> None:
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(cfg.rounds):
        for name, (ranks, shard_ranks) in VARIANTS.items():
            rates[name] += tokens_per_second(cfg, name, ranks, shard_ranks)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:26}{value:8,.0f} tokens/s   {value / medians['one rank']:.2f}x one rank")
    ratio = medians["two ranks, plain copies"] / medians["one rank"]
    result = {"ratio": ratio, "medians": medians, "command": "python bench/ranks.py", "threads": "1 per rank",
              "versions": f"Python {platform.python_version()}, torch {torch.__version__}"}
    Path(cfg.out).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"ratio {ratio:.2f}: two ranks with plain copies over one rank, tokens per second")


if __name__ == "__main__":
    configurator.run(main, Config)
