"""
Start N processes as torchrun would, quickly: they fork from one clean server that has imported torch already.

    run_ranks(4, folder, train, "out.json", steps=20)    # train("out.json", steps=20) on ranks 0..3, gloo

One thread each, at most 4. A test judges what the ranks wrote: gloo may abort in its teardown (SIGABRT), long
after the results are on disk, so exactly that is forgiven.
"""
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from multiprocessing import forkserver
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = [str(HERE), str(HERE.parent)]
sys.path[:0] = [p for p in FOLDERS if p not in sys.path]

import configurator  # noqa: E402

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "pretrain", "sft", "rl"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_rank(rank: int, world: int, port: int, log: str, function, args, kwargs) -> None:
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
        try:
            with configurator.one_line():
                function(*args, **kwargs)
        except SystemExit as e:
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
                raise SystemExit(1) from None
            raise
        except BaseException:
            traceback.print_exc()
            raise SystemExit(99) from None


def start(world: int, folder, function, *args, **kwargs) -> list:
    """N running processes; their output goes to folder/rankN.log."""
    before = os.environ.get("PYTHONPATH")              # the server forgets sys.path (Python 3.11), not this
    os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [before])])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    port = free_port()
    processes = [
        server.Process(
            target=one_rank,
            args=(rank, world, port, str(Path(folder) / f"rank{rank}.log"), function, args, kwargs),
        )
        for rank in range(world)
    ]
    for p in processes:
        p.start()
    return processes


def run_ranks(world: int, folder, function, *args, **kwargs) -> list[int]:
    """-> exit codes; AssertionError with the log when a rank neither ends by itself nor says why."""
    processes = start(world, folder, function, *args, **kwargs)
    for p in processes:
        p.join(120)
        if p.is_alive():
            p.kill()
            p.join()
    codes = [p.exitcode for p in processes]
    for rank, code in enumerate(codes):
        if code not in (0, 1, -signal.SIGABRT):
            log = (Path(folder) / f"rank{rank}.log").read_text()
            raise AssertionError(f"rank {rank} ended with {code}:\n{log}")
    return codes
