"""
Math-Verify (report section 3.2) in processes that can be killed, for answers that are not plain numbers.

    equal = equal(r"\\sqrt{2}", r"2^{1/2}")       # reference, answer -> bool

An expression in an answer can keep sympy busy for ever, so it is checked in one of MATH_WORKERS processes, which is
killed at a limit of processor time. No signals are used: safe in any thread.
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
MATH_SECONDS, MATH_WORKERS, MATH_MEMORY = 2.0, 2, 4 << 30
# unreadable: Math-Verify can read the reference answer in no way, so that nobody can ever be right
counts = {"fast": 0, "worker": 0, "timeouts": 0, "errors": 0, "unreadable": 0, "starts": 0}
_free, _running, _turn = [], [], threading.Condition()


def equal(answer: str, box: str) -> bool:
    """True if equal. A worker that dies is asked again in a new one, once: it may have been dead before."""
    reply = _ask(answer, box)
    if reply == {}:
        reply = _ask(answer, box)
    with _turn:
        counts["worker"] += 1
        counts["timeouts"] += not reply
        for what in ("errors", "unreadable"):
            counts[what] += what in (reply or ())
    if counts["errors"] > 0.1 * counts["worker"] and counts["worker"] >= 50:
        raise RuntimeError(f"Math-Verify failed too often: {counts}, {reply}")
    return bool(reply and reply.get("equal"))


def _ask(answer, box):
    """The reply of a free worker; starts one if fewer than MATH_WORKERS run, else waits for one.

    None: no reply in time. {}: the worker died. It is replaced in both cases.
    """
    with _turn:
        while not _free and len(_running) >= MATH_WORKERS:
            _turn.wait()
        for dead in [w for w in _free if w.poll() is not None]:
            _free.remove(dead)
            _running.remove(dead)
            _end_worker(dead)
        worker = _free.pop() if _free else None
        if worker is None:
            worker = _start_worker()
            _running.append(worker)
    reply = {}
    try:
        if not hasattr(worker, "ready"):
            worker.ready = _read_reply(worker, 120.0, 120.0)    # importing sympy takes 0.7 s
            if worker.ready != {"ready": True}:
                why = (worker.ready or {}).get("errors", "no answer")
                raise RuntimeError(f"Math-Verify does not start: {why} (pip install -r requirements.txt)")
        os.write(worker.stdin.fileno(), (json.dumps([answer, box, 2 * MATH_SECONDS]) + "\n").encode())
        reply = _read_reply(worker, MATH_SECONDS, 3 * MATH_SECONDS)
    except OSError:
        pass    # it had died, of its memory limit for example
    finally:
        with _turn:
            if reply:
                _free.append(worker)
            else:
                _end_worker(worker)
                _running.remove(worker)
            _turn.notify()
    return reply


def _start_worker():
    counts["starts"] += 1
    return subprocess.Popen([sys.executable, "-m", "judge.maths"], cwd=ROOT, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _read_reply(worker, seconds, longest):
    """A line of JSON; None at the deadline, {} at the worker's end. Waits by poll: no signal, any thread.

    The deadline is `seconds` of the worker's processor time, so that a busy machine changes no verdict; at
    most `longest` seconds by the clock (`seconds` by the clock where processor time cannot be read).
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


def _end_worker(worker):
    worker.kill()
    worker.wait()
    worker.stdin.close()
    worker.stdout.close()


def close() -> None:
    """End the idle Math-Verify processes (done at interpreter exit too). The next hard answer starts one."""
    with _turn:
        while _free:
            worker = _free.pop()
            _running.remove(worker)
            _end_worker(worker)


atexit.register(close)
os.register_at_fork(after_in_child=lambda: (_free.clear(), _running.clear()))    # a fork shares no worker


def worker_loop():
    """In the worker: lines of [reference, answer, processor seconds] in, verdicts out, until stdin closes."""
    import logging
    import resource
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)    # nothing else may write into the protocol
    try:
        import math_verify
    except ImportError as error:
        print(json.dumps({"errors": str(error)}), file=replies, flush=True)
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MATH_MEMORY, MATH_MEMORY))
    except (ValueError, OSError):
        pass    # macOS
    logging.disable(logging.CRITICAL)
    boxed_only = [math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def parse(text):
        return math_verify.parse(f"\\boxed{{{text}}}", extraction_config=boxed_only,
                                 extraction_mode="first_match", parsing_timeout=None)

    math_verify.verify(parse("x^2"), parse("x"), timeout_seconds=None)    # its own lazy imports
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        # if the parent is gone, nobody kills us: the kernel does, after so much processor time (no Python
        # handler)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reference, given = parse(gold), parse(answer)
            # the reference first: verify() is not symmetric
            equal = reference and given and math_verify.verify(reference, given, timeout_seconds=None)
            say = {"equal": bool(equal)} if reference else {"unreadable": gold}
        except (MemoryError, RecursionError):
            say = {"equal": False}    # the answer's own doing
        except Exception as error:
            say = {"errors": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(say), file=replies, flush=True)


if __name__ == "__main__":
    del sys.path[0]    # our own file names must not shadow anything
    worker_loop()
