"""
The steps of data/build.py under datatrove's executors: for a corpus beyond one machine (report section 2.1).

    python -m data.hub text CRAWL /shared/web --tokenizer=MiMo-7B-Base --name=web --tasks=64 --workers=16
    python -m data.hub text CRAWL /shared/web --tokenizer=MiMo-7B-Base --tasks=2000 --slurm_partition=cpu

datatrove (pip install datatrove) starts the tasks, on this machine or as arrays of Slurm jobs, waits for a step before
it starts the next, and keeps logs in OUT/NAME.logs. A task does the parts rank, rank + tasks, rank + 2 tasks ... of a
step; after a failure the same command does what is missing. All machines have to see OUT and the source under the same
path. The shards are those of a run without --tasks byte for byte, whatever the number of tasks. Not run on a real Slurm
cluster here.
"""
from collections.abc import Callable
from pathlib import Path

from data import build
from data.readers import optional


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


def run(job: build.Job, replace: bool, append: bool, tasks: int, workers: int, slurm: dict) -> None:
    """
    The four steps, each depending on the one before it. workers: processes of this machine at a time; slurm: time,
    partition, memory_gb and dedup_memory_gb of the jobs, with an empty partition none are used.
    """
    module = f"datatrove.executor.{'slurm' if slurm['partition'] else 'local'}"
    executors = optional(module)
    work, parts = build.plan(job, replace, append)
    tasks, last = min(tasks, parts), None
    for name, step, n in (("read", parts_of(build.read_part, work, parts), tasks),
                          ("dedup", once(build.dedup, work), 1),
                          ("write", parts_of(build.write_part, work, parts), tasks),
                          ("finish", once(build.finish, work, append), 1)):
        # what is done is known from the work folder; datatrove's own marks would outlive it
        common = {"pipeline": [step], "tasks": n, "logging_dir": f"{job.out}/{job.name}.logs/{name}",
                  "skip_completed": False, "depends": last}
        if slurm["partition"]:
            memory = slurm["dedup_memory_gb" if name == "dedup" else "memory_gb"]
            last = executors.SlurmPipelineExecutor(time=slurm["time"], partition=slurm["partition"], job_name=name,
                                                   mem_per_cpu_gb=memory, **common)
        else:
            last = executors.LocalPipelineExecutor(workers=min(n, workers), **common)
    last.run()                                               # what it depends on runs first
