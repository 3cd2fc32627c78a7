"""
The code judge: runs untrusted programs against unit tests in a sandbox and gives a verdict for every test.

Report, section 3.2: code rewards are rule-based, from unit tests that an online judge runs; 3.4.1: rewards are computed
while the engine decodes. The report says no more, the design is ours (docs/judge.md):
- expected outputs never enter the sandbox: a program can only send bytes out, and this process compares them;
- the strongest isolation that this machine can give (A, B or C, see box.py) is found at start-up and printed once; C is
  refused unless allow_unsafe=True;
- each worker owns one warm, confined interpreter that forks a new process for every program; no two programs ever
  share a process.

    with Judge(workers=2) as judge:
        verdicts = judge.run("def f(xs):\\n    return sum(xs)", [Test("call", "[[1, 2]]", "3")], entry="f")

    python bench/judge.py          # prints the isolation, and how many programs a second it judges
Expect 200 to 500 programs a second and worker on an idle core, with 12 call tests each.
"""
import collections
import json
import math
import os
import signal
import threading
import traceback
from collections.abc import Hashable
from dataclasses import dataclass, field

from data.jsonl import STRICT
from data.problems import Test
from judge.box import LABEL, Box, JudgeError, Run, choose_isolation

# accepted, wrong answer; time, memory, output limit exceeded; run-time error; judge error
STATUSES = ("AC", "WA", "TLE", "MLE", "OLE", "RE", "JE")
MAX_TIMEOUTS = 4                 # after this many TLE the other tests of a program are TLE without being run [ours]
MAX_OUTPUT = 1024 << 10          # bytes that are read of each stream of a program [ours]
MAX_FAILED = 0.05                # share of programs with a JE, of at least 20, above which the judge raises [ours]

_printed = set()                 # isolations that this process has printed


@dataclass(frozen=True)
class Verdict:
    """What became of one test. status: one of STATUSES; seconds: wall-clock; detail: one line for a person."""
    status: str
    seconds: float
    detail: str = ""


@dataclass
class Job:
    """One program with its tests: in the queue, then in the hands of one worker."""
    key: Hashable
    program: str
    tests: tuple[Test, ...]
    entry: str
    done: threading.Event | None                                  # run() waits for it; None for submit() and poll()
    verdicts: dict[int, Verdict] = field(default_factory=dict)    # index of a test -> its verdict, kept over a retry
    counts: collections.Counter = field(default_factory=collections.Counter)

    def todo(self) -> list[int]:
        """Indices of the tests still to run. After MAX_TIMEOUTS there are none: the rest gets its verdict here."""
        rest = [i for i in range(len(self.tests)) if i not in self.verdicts]
        timeouts = sum(v.status == "TLE" for v in self.verdicts.values())
        if timeouts < MAX_TIMEOUTS:
            return rest
        not_run = Verdict("TLE", 0.0, f"not run: {timeouts} tests of this program timed out")
        self.verdicts.update(dict.fromkeys(rest, not_run))
        return []


# ---- comparison, always in this process -----------------------------------------------------------------------------

def same_value(expected: object, got: object) -> bool:
    """
    Equality of two JSON values with their types: True != 1, 1 != 1.0. Floats agree within 1e-9, relative or absolute.

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


def same_text(expected: str, got: str) -> bool:
    """
    Equality of two outputs: the same number of lines, and each line equal, where blanks at the end of a line and blank
    lines at the end of the text do not count. A prefix of the expected output is never enough.
    """
    a, b = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (expected, got))
    return a == b


def how_it_ended(run: Run, cpu_total: float) -> Verdict:
    """
    The verdict of the test that was running when the process ended without giving its result. cpu_total: processor
    seconds after which the kernel kills the process.
    """
    message = run.err[-300:].decode("utf-8", "replace").strip()
    if run.end == "time":
        status, detail = "TLE", "time limit"
    elif run.end == "output":
        status, detail = "OLE", "output limit"
    elif os.WIFSIGNALED(run.status):
        number = os.WTERMSIG(run.status)
        status, detail = "RE", f"killed by signal {number}: {signal.strsignal(number)}"
        if number == signal.SIGKILL and run.cpu >= 0.9 * cpu_total:                 # RLIMIT_CPU
            status, detail = "TLE", "processor time limit"
    elif "MemoryError" in message:
        status, detail = "MLE", message
    else:
        code = os.waitstatus_to_exitcode(run.status)
        status, detail = "RE", message if message and code else f"ended early with exit status {code}"
    return Verdict(status, run.wall, detail)


# ---- the pool of workers --------------------------------------------------------------------------------------------

class Judge:
    """
    A pool of sandboxes, each served by a thread of its own that waits on pipes.

    workers: number of sandboxes. time_limit: processor seconds per test on the reference machine; a calibration run at
    start-up scales them to this one. wall_factor: a test may last wall_factor times that by the clock; this ends a
    program that sleeps, and leaves room for one that gets little of a busy machine. memory_mb: address space of a
    program. isolation: "auto", or one of A, B, C to insist. allow_unsafe: accept isolation C, which does not hold back
    a hostile program. quiet: do not print the isolation.

    cache_size: size of the LRU cache of verdicts, in programs; 0 for none. The same program with the same tests is not
    run again: a policy repeats itself, and the more so the better it is trained. Only AC and WA are cached, since TLE,
    MLE, OLE, RE and JE may not repeat.

    counts: totals of programs, tests, processes, cached (programs answered from the cache), retries (after a judge
    error), failed (programs with a JE), and of every status.

    UserError if no isolation holds on this machine. JudgeError from poll() and run() if more than 5 % of at least 20
    programs could not be judged: a judge error that passes unseen is a wrong reward.
    """

    def __init__(self, workers: int = 2, time_limit: float = 1.0, wall_factor: float = 5.0, memory_mb: int = 512,
                 isolation: str = "auto", allow_unsafe: bool = False, cache_size: int = 0, quiet: bool = False):
        if workers < 1 or time_limit <= 0 or wall_factor < 1:
            raise ValueError(f"workers={workers} (should be >= 1), time_limit={time_limit} s (> 0), "
                             f"wall_factor={wall_factor} (>= 1)")
        self.memory, self.cache_size = memory_mb << 20, cache_size
        self.isolation, self.drop_by, scale = choose_isolation(isolation, self.memory, allow_unsafe)
        self.cpu_limit = time_limit * scale                       # processor seconds per test
        self.wall_limit = self.cpu_limit * wall_factor            # seconds per test by the clock
        if not quiet and self.isolation not in _printed:
            _printed.add(self.isolation)
            print(f"judge: isolation {self.isolation} ({LABEL[self.isolation]}), {workers} workers, "
                  f"{time_limit:g} s a test x {scale:.2f} for this machine", flush=True)
        self._change = threading.Condition()                      # guards everything below
        self.counts, self._last_error = collections.Counter(), ""
        self._alarm = ""                                          # why poll() and run() raise
        self._queue, self._finished, self._running, self._closing = collections.deque(), [], 0, False
        self._cache = collections.OrderedDict()                   # (program, tests, entry) -> verdicts, last used last
        self._boxes = [None] * workers
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True, name=f"judge {i}")
                         for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def run(self, program: str, tests: list[Test], entry: str = "f") -> list[Verdict]:
        """Judge one program and wait for it. -> one verdict per test, in the order of `tests`. Raises as submit()."""
        job = self.submit(None, program, tests, entry, done=threading.Event())
        job.done.wait()
        if self._alarm:
            raise JudgeError(self._alarm)
        return [job.verdicts[i] for i in range(len(job.tests))]

    def submit(self, key: Hashable, program: str, tests: list[Test], entry: str = "f",
               done: threading.Event | None = None) -> Job:
        """
        Queue one program and return at once; poll() will give its verdicts under `key`. entry: the function that call
        tests call, "f" or "Class.method". done: set when the verdicts are there; poll() leaves such a job out.
        ValueError for a program that cannot be judged; JudgeError after close().
        """
        job = Job(key, program, tuple(tests), entry, done)
        if not isinstance(program, str):
            raise ValueError(f"a program should be text, not {type(program).__name__}")
        if not job.tests:
            raise ValueError("a program without tests cannot be judged")
        if len({test.kind for test in job.tests}) > 1:
            raise ValueError("the tests of one program should be all 'call' or all 'stdio'")
        if job.tests[0].kind == "call" and not entry:
            raise ValueError("call tests need an entry, the name of the function to call")
        with self._change:
            if self._closing:
                raise JudgeError("the judge is closed")
            self._queue.append(job)
            self._change.notify()
        return job

    def poll(self) -> list[tuple[Hashable, list[Verdict]]]:
        """(key, verdicts) of the programs that finished since the last call, in any order. Never waits."""
        if self._alarm:
            raise JudgeError(self._alarm)
        with self._change:
            finished, self._finished = self._finished, []
        return [(job.key, [job.verdicts[i] for i in range(len(job.tests))]) for job in finished]

    def close(self) -> None:
        """End every process, also those that run; programs without a verdict get JE. No process is left."""
        with self._change:
            self._closing = True
            self._change.notify_all()
            boxes = [box for box in self._boxes if box]
        for box in boxes:
            box.kill()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- one worker -------------------------------------------------------------------------------------------------

    def _work(self, worker: int) -> None:
        """
        The loop of one worker thread. A box ends with the thread that started it (PR_SET_PDEATHSIG), so each worker
        starts its own.
        """
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
                job = self._queue.popleft()
                self._running += 1
                content = job.program, job.tests, job.entry
                if content in self._cache:
                    job.counts["cached"] = 1
                    job.verdicts = self._cache[content]
                    self._cache.move_to_end(content)
            error = "the judge was closed"
            for _ in range(2):                   # after a judge error once more in a new box, then the verdict is JE
                if self._closing or len(job.verdicts) == len(job.tests):
                    break
                try:
                    box = self._boxes[worker] or self._open_box(worker)
                    if job.tests[0].kind == "call":
                        self._judge_calls(box, job)
                    else:
                        self._judge_stdio(box, job)
                except Exception as e:
                    error = f"{type(e).__name__}: {e}"
                    if not isinstance(e, JudgeError):
                        error += " in " + traceback.format_exc(limit=-1).split("\n")[-3].strip()
                    job.counts["retries"] += 1
                    self._drop_box(worker)
            self._finish(job, error)
        self._drop_box(worker)

    def _finish(self, job: Job, error: str) -> None:
        """JE with `error` for tests without a verdict; count, cache, and hand the job over to poll() or run()."""
        failed = len(job.verdicts) < len(job.tests)
        for i in range(len(job.tests)):
            job.verdicts.setdefault(i, Verdict("JE", 0.0, error))
        statuses = collections.Counter(v.status for v in job.verdicts.values())
        with self._change:
            self._running -= 1
            self.counts.update(job.counts + statuses)
            self.counts.update(programs=1, tests=len(job.tests), failed=int(failed))
            self._last_error = error if failed else self._last_error
            lost, programs = self.counts["failed"], self.counts["programs"]
            self._alarm = "" if programs < 20 or lost <= MAX_FAILED * programs else (
                f"{lost} of {programs} programs could not be judged, last: {self._last_error}")
            if self.cache_size and set(statuses) <= {"AC", "WA"}:
                self._cache[job.program, job.tests, job.entry] = job.verdicts
                if len(self._cache) > self.cache_size:
                    self._cache.popitem(last=False)                                     # the longest unused
            if not job.done:
                self._finished.append(job)
        if job.done:
            job.done.set()

    def _open_box(self, worker: int) -> Box:
        box = Box(self.isolation, self.drop_by, self.memory)
        with self._change:
            self._boxes[worker] = box
            if self._closing:                    # close() has not seen this one
                raise JudgeError("the judge was closed")
        return box

    def _drop_box(self, worker: int) -> None:
        with self._change:
            box, self._boxes[worker] = self._boxes[worker], None
        if box:
            box.kill()
            box.close()

    def _judge_calls(self, box: Box, job: Job) -> None:
        """All call tests in one process; after a crash or a time-out, the tests behind it in a new one."""
        while todo := job.todo():
            def on_line(k: int, line: dict, seconds: float, todo=todo) -> bool:
                """k: index in todo, or -1 when the program has loaded or failed to load. -> True to end the process."""
                if "e" in line:
                    status = "MLE" if line["e"].startswith("MemoryError") else "RE"
                    for i in todo if k < 0 else todo[k:k + 1]:
                        job.verdicts[i] = Verdict(status, seconds, line["e"])
                elif k >= 0:
                    test, got = job.tests[todo[k]], line["v"]
                    job.verdicts[todo[k]] = (
                        Verdict("AC", seconds) if same_value(STRICT.decode(test.expected), got) else
                        Verdict("WA", seconds, f"on {test.input[:80]} gave {json.dumps(got)[:80]}"))
                return len(job.verdicts) == len(job.tests)

            cpu_total = math.ceil(self.cpu_limit * len(todo)) + 1
            job.counts["processes"] += 1
            payload = {"program": job.program, "entry": job.entry, "inputs": [job.tests[i].input for i in todo]}
            run = box.execute(payload, b"", self.cpu_limit, self.wall_limit, cpu_total, MAX_OUTPUT, on_line)
            if run.end != "stopped":             # it failed in the first of `lost`, or while loading: then in all
                lost = [i for i in todo if i not in job.verdicts]
                job.verdicts.update(dict.fromkeys(lost[:1] if run.loaded else lost, how_it_ended(run, cpu_total)))

    def _judge_stdio(self, box: Box, job: Job) -> None:
        """One process per test: the program runs from its first line each time."""
        cpu_total = math.ceil(self.cpu_limit) + 1
        while todo := job.todo():
            test = job.tests[todo[0]]
            job.counts["processes"] += 1
            run = box.execute({"program": job.program, "entry": ""}, test.input.encode("utf-8", "surrogatepass"),
                              self.cpu_limit, self.wall_limit, cpu_total, MAX_OUTPUT, lambda *_: False)
            if run.end != "exit" or run.status:
                verdict = how_it_ended(run, cpu_total)
            elif same_text(test.expected, run.out.decode("utf-8", "replace")):
                verdict = Verdict("AC", run.wall)
            else:
                verdict = Verdict("WA", run.wall, f"printed {run.out[:80]!r}")
            job.verdicts[todo[0]] = verdict
