"""
The arms of Table 2 and of section 3.3.2 with the real engine, model and judge: rl.py with another scheduler.

    python paper/policy.py config/tiny_rl.py --out=out/policy/naive --launch=wave --stop=drain --solved=queue
    python paper/policy.py config/tiny_rl.py --out=out/policy/drain --stop=drain --solved=queue
    python paper/policy.py config/tiny_rl.py --out=out/policy/first --stop=first       # biased to short answers
    python paper/policy.py config/tiny_rl.py --out=out/policy/kept --solved=queue      # 3.3.2: solved problems stay
    python paper/policy.py config/tiny_rl.py --out=out/policy/removed --easy_alpha=0   # 3.3.2: they go for good
    python paper/policy.py config/tiny_rl.py --out=out/policy/pool                     # the recipe, as rl.py runs it

All fields of rl.py, and three more. What to compare in metrics.jsonl: rollout_s, slot_idle, waste, length_mean and
heldout. Table 2 grades its first two arms when everything is generated; here the judge always works beside the engine.
"""
from dataclasses import dataclass
from functools import partial
from typing import Literal

from table2 import Ablation  # it also makes the project's modules importable

import configurator
import rl


@dataclass(frozen=True)
class Config(rl.Config):
    launch: Literal["continuous", "wave"] = "continuous"   # wave: batch_size groups, the next when all are graded
    stop: Literal["fifo", "drain", "first"] = "fifo"       # drain: when all are done; first: at the first to finish
    solved: Literal["pool", "queue"] = "pool"              # where a problem goes that was solved G of G times


def main(cfg: Config) -> None:
    rl.main(cfg, partial(Ablation, launch=cfg.launch, stop=cfg.stop, pool=cfg.solved == "pool", rate=0.5))


if __name__ == "__main__":
    configurator.run(main, Config)
