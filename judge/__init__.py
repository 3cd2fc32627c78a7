"""The code judge: runs untrusted programs against unit tests in a sandbox and says what became of each test.

Report, section 3.2: code rewards are rule-based, from unit tests, run in great numbers by an online judge,
and asynchronously to generation (3.4.1). The report says no more; the design is ours (docs/judge.md):
- expected outputs never enter the sandbox; a program can only send bytes out, and this process compares them;
- isolation levels A, B, C, tried at start-up and printed once (box.py); C is refused unless
  `allow_unsafe=True`;
- one warm, confined interpreter per worker forks one process per program; no two programs ever share a
  process.

    with Judge(workers=2) as judge:
        verdicts = judge.run("def f(xs):\\n    return sum(xs)", [Test("call", "[[1, 2]]", "3")], entry="f")

    python bench/judge.py          # prints the level of isolation and measures programs per second
Expect 200 to 500 programs of 12 call tests a second and worker on an idle core.
"""
import collections
import decimal
import json
import math
import os
import signal
import threading
import time
import traceback
from dataclasses import dataclass

from data.jsonl import strict_json
from data.problems import Test
from judge.box import LABEL, Box, JudgeError, Run, choose_isolation

# accepted, wrong answer, time, memory, output limit exceeded, run-time error, judge error, not run (a lower
# level of difficulty failed already; only with stop_at_failed_level)
STATUSES = ("AC", "WA", "TLE", "MLE", "OLE", "RE", "JE", "NR")


@dataclass(frozen=True)
class Verdict:
    """status: one of STATUSES; seconds: wall-clock of the test as the judge saw it; detail: one line."""
    status: str
    seconds: float
    detail: str = ""


# ---------------------------------------------------------------- comparison, always in this process
def same_value(expected, got) -> bool:
    """Equality of two JSON values with their types: True != 1, 1 != 1.0; floats agree within 1e-9,
    relative.

    same_value([1, 2.0], [1, 2.0000000001]) is True; same_value([1], [True]) and same_value(1, 1.0) are False.
    """
    if type(expected) is not type(got):
        return False
    if isinstance(expected, list):
        return len(expected) == len(got) and all(map(same_value, expected, got))
    if isinstance(expected, dict):
        return expected.keys() == got.keys() and all(same_value(v, got[k]) for k, v in expected.items())
    if isinstance(expected, float):
        return expected == got or math.isclose(expected, got, rel_tol=1e-9, abs_tol=1e-9)
    return expected == got


def same_text(expected, got, tolerance=None) -> bool:
    """Equality of two outputs: as many lines (blank ones at the end aside), each equal after rstrip.

    With a tolerance, lines of as many tokens also agree if each pair of tokens is equal or two decimal
    numbers that differ by at most tolerance * max(1, |expected|). A prefix of the answer is never enough.
    """
    a, b = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (expected, got))
    return len(a) == len(b) and all(x == y or (tolerance is not None and _same_tokens(x, y, tolerance))
                                    for x, y in zip(a, b, strict=True))


def _same_tokens(a, b, tolerance):
    a, b = a.split(), b.split()
    return len(a) == len(b) and all(_same_number(x, y, tolerance) for x, y in zip(a, b, strict=True))


def _same_number(x, y, tolerance):
    if x == y or max(len(x), len(y)) > 100:
        return x == y
    try:
        x, y = decimal.Decimal(x), decimal.Decimal(y)
        near = decimal.Decimal(str(tolerance)) * max(1, abs(x))
        return x.is_finite() and y.is_finite() and abs(x - y) <= near
    except decimal.DecimalException:
        return False


def how_it_ended(run: Run, cpu_total: float) -> tuple[str, str]:
    """(status, detail) of the test that was running when its process ended without a result."""
    if run.end in ("time", "output"):
        return ("TLE", "time limit") if run.end == "time" else ("OLE", "output limit")
    if os.WIFSIGNALED(run.status):
        number = os.WTERMSIG(run.status)
        if number == signal.SIGKILL and run.cpu >= 0.9 * cpu_total:    # RLIMIT_CPU
            return "TLE", "processor time limit"
        return "RE", f"killed by signal {number}: {signal.strsignal(number)}"
    said, code = run.err[-300:].decode("utf-8", "replace").strip(), os.waitstatus_to_exitcode(run.status)
    if "MemoryError" in said:
        return "MLE", said
    return "RE", said if said and code else f"ended early with exit status {code}"


# ---------------------------------------------------------------- the pool
@dataclass
class Job:
    key: object
    program: str
    tests: list
    entry: str
    verdicts: list | None = None
    done: threading.Event | None = None    # set for run(), None for submit()


_printed = set()


class Judge:
    """A pool of `workers` sandboxes, each served by a thread that waits on pipes.

    time_limit: processor seconds per test, on the reference machine (scaled by a calibration run at
    start-up). wall: a test may last time_limit * wall of wall-clock: a sleeper, or a starved process on a
    busy machine. memory_mb: address space of a program. output_kb: bytes taken of each of its streams.
    stop_at_failed_level: run easier levels first and leave out (NR) the levels above a failed one; strict
    rewards only. max_timeouts: when so many tests of a program have timed out, the rest is TLE without being
    run. tolerance: of stdio numbers; None compares text. level: "auto", or one of A, B, C to insist. remember:
    of so many programs the verdicts are kept, and the same program with the same tests is not run again: a
    policy repeats itself, more the better it is trained. Not kept is what time, memory, a crash or the judge
    had a part in, any status but AC, WA and NR: such a program is judged anew.
    JudgeError at the start if no level holds; from poll() and run() if more than 5 % of at least 20 programs
    could not be judged: a swallowed judge error would be a wrong reward.
    """

    def __init__(self, workers=2, time_limit=1.0, wall=5.0, memory_mb=512, output_kb=1024, isolation="auto",
                 allow_unsafe=False, stop_at_failed_level=False, max_timeouts=4, tolerance=None, remember=0,
                 quiet=False):
        if workers < 1 or time_limit <= 0 or wall < 1:
            raise ValueError(f"workers={workers} (>= 1), time_limit={time_limit} s (> 0), wall={wall} (>= 1)")
        self.memory, self.cap, self.wall, self.tolerance = memory_mb << 20, output_kb << 10, wall, tolerance
        self.stop_at_failed_level, self.max_timeouts = stop_at_failed_level, max_timeouts
        self.remember, self._known = remember, {}    # (program, tests, entry) -> verdicts, longest unused first
        self.isolation, self.way, self.scale = choose_isolation(isolation, self.memory, allow_unsafe)
        self.limit = time_limit * self.scale
        if not quiet and self.isolation not in _printed:
            _printed.add(self.isolation)
            print(f"judge: isolation {self.isolation} ({LABEL[self.isolation]}), {workers} workers, "
                  f"{time_limit:g} s a test x {self.scale:.2f} for this machine", flush=True)
        self.counts, self.seconds, self.last_error = collections.Counter(), 0.0, ""
        self._change = threading.Condition()    # guards everything below and the counts
        self._queue, self._finished, self._running, self._closing = collections.deque(), [], 0, False
        self._boxes = [None] * workers
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True, name=f"judge {i}")
                         for i in range(workers)]
        for thread in self._threads:
            thread.start()

    # ---- the face
    def run(self, program: str, tests: list[Test], entry: str = "f") -> list[Verdict]:
        """Judge one program and wait. One verdict per test, in the order of `tests`."""
        job = Job(None, program, list(tests), entry, done=threading.Event())
        self._put(job)
        job.done.wait()
        self._check()
        return job.verdicts

    def submit(self, key, program: str, tests: list[Test], entry: str = "f") -> None:
        """Queue one program; its verdicts come out of poll() under `key`. Returns at once."""
        self._put(Job(key, program, list(tests), entry))

    def poll(self) -> list:
        """(key, verdicts) of submitted programs that finished since the last call, in any order. No wait."""
        self._check()
        with self._change:
            finished, self._finished = self._finished, []
        return [(job.key, job.verdicts) for job in finished]

    def counters(self) -> dict:
        """queued, running: programs now. Totals: programs, tests, processes, repeats (remembered), retries,
        seconds, statuses."""
        with self._change:
            names = ("programs", "tests", "processes", "repeats", "retries", *STATUSES)
            return {"queued": len(self._queue), "running": self._running, "seconds": self.seconds,
                    **{name: self.counts[name] for name in names}}

    def close(self) -> None:
        """End every process, the running ones too; programs without a verdict get JE. No process is left."""
        with self._change:
            self._closing = True
            self._change.notify_all()
            boxes = [box for box in self._boxes if box]
        for box in boxes:
            box.kill()
        for thread in self._threads:
            thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _put(self, job):
        if not job.tests:
            raise ValueError("a program without tests cannot be judged")
        if len({test.kind for test in job.tests}) > 1:
            raise ValueError("the tests of one program should be all 'call' or all 'stdio'")
        if job.tests[0].kind == "call" and not job.entry:
            raise ValueError("call tests need an entry, the name of the function to call")
        with self._change:
            if self._closing:
                raise JudgeError("the judge is closed")
            self._queue.append(job)
            self._change.notify()

    def _check(self):
        failed, programs = self.counts["failed"], self.counts["programs"]
        if programs >= 20 and failed > 0.05 * programs:
            raise JudgeError(f"{failed} of {programs} programs could not be judged, last: {self.last_error}")

    # ---- a worker
    def _work(self, worker):
        # a box lives and dies with the thread that started it (PR_SET_PDEATHSIG): each worker starts its own
        while True:
            with self._change:
                while not self._queue and not self._closing:
                    self._change.wait()
                if self._closing:
                    break
                job, begin = self._queue.popleft(), time.monotonic()
                self._running += 1
            known = self._recall(job)
            # verdicts by test, kept over a retry
            verdicts, counts, error = dict(known), collections.Counter(repeats=int(bool(known))), ""
            # a judge error is tried once more, in a new box, then told as JE
            for _ in range(0 if known else 2):
                try:
                    box = self._boxes[worker] or self._open_box(worker)
                    judge = self._judge_calls if job.tests[0].kind == "call" else self._judge_stdio
                    judge(box, job, verdicts, counts)
                    break
                except Exception as trouble:
                    error = f"{type(trouble).__name__}: {trouble}"
                    if not isinstance(trouble, JudgeError):
                        error += " in " + traceback.format_exc(limit=-1).split("\n")[-3].strip()
                    counts["retries"] += 1
                    self._drop_box(worker)
                if self._closing:
                    break
            if not known:
                self._keep(job, verdicts)
            self._finish(job, verdicts, counts, error, time.monotonic() - begin)
        self._drop_box(worker)
        with self._change:
            rest, self._queue = list(self._queue), collections.deque()
            self._running += len(rest)
        for job in rest:
            self._finish(job, {}, collections.Counter(), "the judge was closed", 0.0)

    def _recall(self, job):
        """The verdicts that are kept of this program; it moves behind all others, to be forgotten last."""
        same = (job.program, tuple(job.tests), job.entry)
        with self._change:
            if not self.remember or not isinstance(job.program, str) or same not in self._known:
                return {}
            self._known[same] = self._known.pop(same)
            return self._known[same]

    def _keep(self, job, verdicts):
        if (self.remember and isinstance(job.program, str) and len(verdicts) == len(job.tests)
                and all(v.status in ("AC", "WA", "NR") for v in verdicts.values())):
            with self._change:
                self._known[job.program, tuple(job.tests), job.entry] = verdicts
                if len(self._known) > self.remember:
                    del self._known[next(iter(self._known))]

    def _open_box(self, worker):
        box = Box(self.isolation, self.way, self.memory)
        with self._change:
            self._boxes[worker] = box
            if self._closing:    # close() has not seen this one
                raise JudgeError("the judge was closed")
        return box

    def _drop_box(self, worker):
        with self._change:
            box, self._boxes[worker] = self._boxes[worker], None
        if box:
            box.kill()
            box.close()

    def _finish(self, job, verdicts, counts, error, seconds):
        job.verdicts = [verdicts.get(i) or Verdict("JE", 0.0, error) for i in range(len(job.tests))]
        failed = any(v.status == "JE" for v in job.verdicts)
        with self._change:
            self._running -= 1
            self.seconds += seconds
            self.counts.update(counts)
            self.counts.update(v.status for v in job.verdicts)
            self.counts.update(programs=1, tests=len(job.tests), failed=int(failed))
            self.last_error = error if failed else self.last_error
            if not job.done:
                self._finished.append(job)
        if job.done:
            job.done.set()

    def _todo(self, job, verdicts):
        """Tests still to run; those that need not run get their verdict here."""
        order = range(len(job.tests))
        if self.stop_at_failed_level:
            order = sorted(order, key=lambda i: job.tests[i].difficulty)
        timeouts = sum(v.status == "TLE" for v in verdicts.values())
        failed = min((job.tests[i].difficulty for i, v in verdicts.items() if v.status != "AC"), default=math.inf)
        for i in order:
            if i not in verdicts and self.stop_at_failed_level and job.tests[i].difficulty > failed:
                verdicts[i] = Verdict("NR", 0.0, f"level {failed} failed")
            elif i not in verdicts and timeouts >= self.max_timeouts:
                verdicts[i] = Verdict("TLE", 0.0, f"not run: {timeouts} tests of this program timed out")
        return [i for i in order if i not in verdicts]

    def _judge_calls(self, box, job, verdicts, counts):
        """All tests in one process; after a crash or a time-out, the tests behind it in a new one."""
        while todo := self._todo(job, verdicts):
            def on_line(k, line, seconds, todo=todo):
                if k < 0:    # the program has loaded, or failed to: then that is the verdict of every test
                    if "e" in line:
                        verdicts.update((i, self._verdict(job.tests[i], line, seconds)) for i in todo)
                    return "e" in line
                verdicts[todo[k]] = self._verdict(job.tests[todo[k]], line, seconds)
                return k + 1 == len(todo) or not self._todo(job, verdicts)

            cpu_total = math.ceil(self.limit * len(todo)) + 1
            inputs = [job.tests[i].input for i in todo]
            counts["processes"] += 1
            run = box.execute({"program": job.program, "entry": job.entry, "inputs": inputs}, b"", self.limit,
                              self.wall, self.cap, cpu_total, on_line)
            if run.end != "enough":
                status, detail = how_it_ended(run, cpu_total)
                for i in [i for i in todo if i not in verdicts][:1 if run.loaded else None]:
                    verdicts[i] = Verdict(status, run.wall, detail)

    def _verdict(self, test, line, seconds):
        if "e" in line:
            return Verdict("MLE" if line["e"].startswith("MemoryError") else "RE", seconds, line["e"])
        if same_value(strict_json(test.expected), line["v"]):
            return Verdict("AC", seconds)
        return Verdict("WA", seconds, f"on {test.input[:80]} gave {json.dumps(line['v'])[:80]}")

    def _judge_stdio(self, box, job, verdicts, counts):
        """One process a test: the program runs from its first line each time."""
        cpu_total = math.ceil(self.limit) + 1
        while todo := self._todo(job, verdicts):
            test = job.tests[todo[0]]
            counts["processes"] += 1
            stdin = test.input.encode("utf-8", "surrogatepass")
            run = box.execute({"program": job.program, "entry": ""}, stdin, self.limit, self.wall, self.cap,
                              cpu_total, lambda *_: False)
            if run.end != "exit" or run.status:
                status, detail = how_it_ended(run, cpu_total)
                verdict = Verdict(status, run.wall, detail)
            elif same_text(test.expected, run.out.decode("utf-8", "replace"), self.tolerance):
                verdict = Verdict("AC", run.wall)
            else:
                verdict = Verdict("WA", run.wall, f"printed {run.out[:80]!r}")
            verdicts[todo[0]] = verdict
