"""
Start N processes as torchrun would, quickly: they fork from one clean server that has imported torch already.

    run_ranks(4, train, "out.json", steps=20)      # calls train("out.json", steps=20) on ranks 0..3, gloo on CPU

One thread each, at most 4. A test judges what the ranks wrote: gloo may abort in its teardown (SIGABRT), long
after the results are on disk, so exactly that is forgiven.
"""
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent)) if p not in sys.path]

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "safetensors.torch",
                               # packages only: Python 3.11 forgets sys.path here
                               "einops", "tiktoken", "tqdm"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_rank(rank: int, world: int, port: int, log: str, function, args, kwargs) -> None:
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
        try:
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
    port = free_port()
    processes = [server.Process(target=one_rank, args=(rank, world, port, str(Path(folder) / f"rank{rank}.log"), function,
                                                       args, kwargs)) for rank in range(world)]
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
            raise AssertionError(f"rank {rank} ended with {code}:\n" + (Path(folder) / f"rank{rank}.log").read_text())
    return codes
