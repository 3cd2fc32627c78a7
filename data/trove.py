"""
The steps of data/build.py under datatrove's executors: for a corpus beyond one machine (report section 2.1).

    python -m data.trove text CRAWL /shared/web --tokenizer=MiMo-7B-Base --name=web --tasks=64 --workers=16
    python -m data.trove text CRAWL /shared/web --tokenizer=MiMo-7B-Base --tasks=2000 --slurm_partition=cpu

datatrove (pip install datatrove) starts the tasks, on this machine or as arrays of Slurm jobs, waits for a step before
it starts the next, and keeps logs in OUT/NAME.logs. A task does the parts rank, rank + tasks, rank + 2 tasks ... of a
step; after a failure the same command does what is missing. All machines have to see OUT and the source under the same
path. The shards are those of `python -m data.hub` byte for byte, whatever the number of tasks. Not run on a real Slurm
cluster here.
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import configurator
from configurator import UserError
from data import build, hub
from data.readers import optional


@dataclass(frozen=True)
class Config(hub.Config):
    tokenizer: str = "tiny"               # "tiny" or a folder with tokenizer files
    tasks: int = 8                        # tasks of the parallel steps
    slurm_partition: str = ""             # Slurm's name of the machines; "" = processes on this one
    slurm_time: str = "20:00:00"          # limit of a Slurm job
    memory_gb: int = 4                    # of a Slurm job; the dedup step gets dedup_memory_gb
    dedup_memory_gb: int = 64             # 100 bytes a document, up to 500

    def __post_init__(self):
        super().__post_init__()
        configurator.at_least(self, 1, "tasks", "memory_gb", "dedup_memory_gb")


def parts_of(step: Callable[[Path, int], dict], work: Path, parts: int) -> Callable:
    """A step of datatrove's pipeline: task `rank` of `world` does every world-th part."""
    def run(data: object = None, rank: int = 0, world_size: int = 1) -> None:
        for k in range(rank, parts, world_size):
            step(work, k)
    return run


def once(step: Callable, *arguments: object) -> Callable:
    """A step that one task does for the whole corpus."""
    def run(data: object = None, rank: int = 0, world_size: int = 1) -> None:
        result = step(*arguments)
        if isinstance(result, str):
            print(result)
    return run


def executors(cfg: Config) -> list:
    """The four steps, each depending on the one before it."""
    job = hub.job_of(cfg)
    work, parts = build.plan(job, cfg.replace, cfg.append)
    tasks = min(cfg.tasks, parts)
    steps = [("read", parts_of(build.read_part, work, parts), tasks, cfg.memory_gb),
             ("dedup", once(build.dedup, work), 1, cfg.dedup_memory_gb),
             ("write", parts_of(build.write_part, work, parts), tasks, cfg.memory_gb),
             ("finish", once(build.finish, work, cfg.append), 1, cfg.memory_gb)]
    made: list = []
    for name, step, n, memory in steps:
        # what is done is known from the work folder; datatrove's own marks would outlive it
        common = {"pipeline": [step], "tasks": n, "logging_dir": f"{cfg.out}/{cfg.name}.logs/{name}",
                  "skip_completed": False, "depends": made[-1] if made else None}
        if cfg.slurm_partition:
            slurm = optional("datatrove.executor.slurm", "datatrove")
            made.append(slurm.SlurmPipelineExecutor(time=cfg.slurm_time, partition=cfg.slurm_partition, job_name=name,
                                                    mem_per_cpu_gb=memory, **common))
        else:
            local = optional("datatrove.executor.local", "datatrove")
            made.append(local.LocalPipelineExecutor(workers=min(n, cfg.workers), **common))
    return made


def main(cfg: Config) -> None:
    if not cfg.tokenizer:
        raise UserError("tokenizer is empty: shards need one")
    executors(cfg)[-1].run()                                 # runs what it depends on first


if __name__ == "__main__":
    configurator.run(main, Config)
