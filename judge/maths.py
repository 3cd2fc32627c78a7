"""
Math-Verify (report section 3.2) in processes that can be killed, for answers that are not plain numbers.

    equal(r"\\sqrt{2}", "2^{1/2}")       # reference, answer -> True

An expression in an answer can keep sympy busy for ever, so it is compared in one of MATH_WORKERS worker processes,
which is killed after MATH_SECONDS of processor time. No signal handlers are used, so any thread may call this.

A worker is this file, run as `python -m judge.maths` from the project's root; importing sympy takes it 0.7 s, once.
"""
import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time

from judge.server import processor_time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MATH_SECONDS = 2.0         # processor seconds per answer [ours]
MATH_WORKERS = 2
MATH_MEMORY = 4 << 30      # bytes of address space per worker [ours]

# fast: answers that reward.math_reward decided by rules; long: refused, since too long to compare; worker: answers
# compared here; timeouts, errors: of these; unreadable: Math-Verify cannot read the reference, so that only the same
# text is right; starts: processes
counts = {"fast": 0, "long": 0, "worker": 0, "timeouts": 0, "errors": 0, "unreadable": 0, "starts": 0}
_workers, _idle, _change = [], [], threading.Condition()    # all that run; those without an answer; guards both


def equal(answer: str, box: str) -> bool:
    """
    Whether Math-Verify holds `box` (LaTeX, what a model put into its box) equal to the reference `answer`. False after
    MATH_SECONDS. RuntimeError if Math-Verify is not installed, or fails on more than a tenth of at least 50 answers.
    """
    reply = _ask(answer, box)
    if reply == {}:                     # the worker died, perhaps before it was asked: once more, in a new one
        reply = _ask(answer, box)
    with _change:
        counts["worker"] += 1
        counts["timeouts"] += not reply
        for what in ("errors", "unreadable"):
            counts[what] += what in (reply or ())
    if counts["errors"] > 0.1 * counts["worker"] and counts["worker"] >= 50:
        raise RuntimeError(f"Math-Verify failed too often: {counts}, {reply}")
    return bool(reply and reply.get("equal"))


def _ask(answer: str, box: str) -> dict | None:
    """
    The reply of an idle worker; starts one if fewer than MATH_WORKERS run, else waits for one. None: no reply in time;
    {}: the worker died. In both cases it is gone, and the next call starts another.
    """
    with _change:
        while not _idle and len(_workers) >= MATH_WORKERS:
            _change.wait()
        for dead in [w for w in _idle if w.poll() is not None]:
            _idle.remove(dead)
            _workers.remove(dead)
            _end_worker(dead)
        worker = _idle.pop() if _idle else None
        if worker is None:
            worker = _start_worker()
            _workers.append(worker)
    reply = {}
    try:
        if not hasattr(worker, "ready"):
            worker.ready = _read_reply(worker, 120.0, 120.0)
            if worker.ready != {"ready": True}:
                why = (worker.ready or {}).get("errors", "no answer")
                raise RuntimeError(f"Math-Verify does not start: {why} (pip install -r requirements.txt)")
        os.write(worker.stdin.fileno(), (json.dumps([answer, box, 2 * MATH_SECONDS]) + "\n").encode())
        reply = _read_reply(worker, MATH_SECONDS, 3 * MATH_SECONDS)
    except OSError:
        pass                            # it has died, of its memory limit for example
    finally:
        with _change:
            if reply:
                _idle.append(worker)
            else:
                _end_worker(worker)
                _workers.remove(worker)
            _change.notify()
    return reply


def _start_worker() -> subprocess.Popen:
    counts["starts"] += 1
    return subprocess.Popen([sys.executable, "-m", "judge.maths"], cwd=ROOT, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _read_reply(worker: subprocess.Popen, seconds: float, longest: float) -> dict | None:
    """
    A line of JSON from the worker; None at the deadline, {} if the worker ended. Waits by poll(): no signals.

    The deadline is `seconds` of the worker's processor time, so that a busy machine changes no verdict, and at most
    `longest` seconds by the clock (`seconds` by the clock where processor time cannot be read).
    """
    poll, data, begin, cpu = select.poll(), b"", time.monotonic(), processor_time(worker.pid)
    until = begin + seconds
    poll.register(worker.stdout.fileno(), select.POLLIN)
    while not data.endswith(b"\n"):
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            left = seconds - (processor_time(worker.pid) - cpu) if cpu >= 0 else 0.0
            until = min(time.monotonic() + left, begin + longest)
            if left < 0.03 * seconds or time.monotonic() >= begin + longest:
                return None
            continue
        block = os.read(worker.stdout.fileno(), 1 << 16)
        if not block:
            return {}
        data += block
    return json.loads(data)


def _end_worker(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
    worker.stdin.close()
    worker.stdout.close()


def close() -> None:
    """End the idle workers; done at interpreter exit too. The next answer that needs one starts another."""
    with _change:
        while _idle:
            worker = _idle.pop()
            _workers.remove(worker)
            _end_worker(worker)


atexit.register(close)
os.register_at_fork(after_in_child=lambda: (_idle.clear(), _workers.clear()))    # a fork uses no worker of its parent


# ---- in the worker --------------------------------------------------------------------------------------------------

def serve() -> None:
    """
    The loop of a worker: lines of [reference, answer, processor seconds] from stdin, until it closes; a line of JSON
    each to stdout: {"equal": bool}, {"unreadable": reference} or {"errors": text}. The first line is {"ready": true}.
    """
    import logging
    import resource
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                       # what a library prints goes to stderr, not between the replies
    try:
        import math_verify
    except ImportError as error:
        print(json.dumps({"errors": str(error)}), file=replies, flush=True)
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MATH_MEMORY, MATH_MEMORY))
    except (ValueError, OSError):
        pass                            # macOS
    logging.disable(logging.CRITICAL)
    boxed_only = [math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def parse(text: str) -> list:
        return math_verify.parse(f"\\boxed{{{text}}}", extraction_config=boxed_only,
                                 extraction_mode="first_match", parsing_timeout=None)

    math_verify.verify(parse("x^2"), parse("x"), timeout_seconds=None)    # its own late imports
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        reference, answer, seconds = json.loads(line)
        # if the parent has gone, nobody kills this process: then the kernel does, after `seconds` of processor time
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            gold, given = parse(reference), parse(answer)
            # the reference comes first: verify() is not symmetric
            same = gold and given and math_verify.verify(gold, given, timeout_seconds=None)
            reply = {"equal": bool(same)} if gold else {"unreadable": reference}
        except (MemoryError, RecursionError):
            reply = {"equal": False}    # the answer's own doing
        except Exception as error:
            reply = {"errors": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    # `-m` has put the project's root first; without it, no file of ours can be imported in place of a library's
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != ROOT]
    serve()
