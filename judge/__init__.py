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

    python bench/judge.py          # how many programs a second it judges, beside other harnesses
Expect 200 programs a second and worker on an idle core, with 12 call tests each; whole programs take a fork per test.
"""
import ast
import collections
import functools
import hashlib
import json
import math
import os
import queue
import signal
import threading
import traceback
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from data.problems import Limits, Test
from judge.box import LABEL, Bounds, Box, JudgeError, Run, choose_isolation
from judge.server import decode

# accepted, wrong answer; time, memory, output limit exceeded; run-time error; judge error
STATUSES = ("AC", "WA", "TLE", "MLE", "OLE", "RE", "JE")
AS_THE_JUDGE = Limits()          # a problem that demands no limits of its own
HURRY_AFTER, STOP_AFTER = 4, 8   # after so many TLE the other tests have a tenth of the time; are not run [ours]
CHECK_SECONDS = 10               # processor time of the code of one check test, which is not the program's [ours]
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
    limits: Limits
    verdicts: dict[int, Verdict] = field(default_factory=dict)    # index of a test -> its verdict, kept over a retry
    counts: collections.Counter = field(default_factory=collections.Counter)

    @property
    def content(self) -> tuple:
        """What the verdicts depend on."""
        return self.program, self.tests, self.entry, self.limits

    def todo(self) -> tuple[list[int], float]:
        """
        -> indices of the tests still to run, in the order of place(), and the share of the time limits that they have.
        After STOP_AFTER time-outs there are none: the rest gets its verdict here.
        """
        rest = [i for i in sorted(range(len(self.tests)), key=lambda i: place(self.tests[i])) if i not in self.verdicts]
        timeouts = sum(v.status == "TLE" for v in self.verdicts.values())
        if timeouts < STOP_AFTER:
            return rest, 1.0 if timeouts < HURRY_AFTER else 0.1
        not_run = Verdict("TLE", 0.0, f"not run: {timeouts} tests of this program timed out")
        self.verdicts.update(dict.fromkeys(rest, not_run))
        return [], 0.0


@functools.lru_cache(1 << 16)
def place(test: Test) -> tuple[bytes, int]:
    """
    Where a test comes among its program's tests: by what it is, not by where it was listed. So nothing that one test
    does to the next (a time-out, a global variable) depends on the order of the list.
    """
    text = json.dumps([test.kind, test.input, test.expected]).encode()
    return hashlib.blake2b(text, digest_size=8).digest(), test.difficulty


@dataclass(frozen=True)
class Call:
    """A test as one call, whose result this process compares. request: as server.run_calls reads it."""
    request: tuple[str, ...]
    expected: object
    strict: bool              # a tuple is not a list; without it they are alike, since JSON has no tuples


@functools.lru_cache(1 << 16)
def as_call(test: Test, entry: str) -> Call | None:
    """
    The call that a call test makes, or a check test that ends in `assert f(..) == value`: statements before the assert
    run with the program, whose classes they may need. None where the expected value is no literal, or the assert is of
    another kind: then the test is code that a process of its own runs (Judge._judge_check).
    """
    if test.kind == "call":
        (_, plain), (expected, from_json) = test.value("input"), test.value("expected")
        request = ("json", test.input) if plain else ("expression", f"candidate(*({test.input.strip()}))")
        if from_json:
            return Call(request, expected, strict=not plain)
    else:
        *before, last = ast.parse(test.input).body
        asserted = last.test if isinstance(last, ast.Assert) else None
        if not (isinstance(asserted, ast.Compare) and isinstance(asserted.ops[0], ast.Eq) and len(asserted.ops) == 1
                and isinstance(asserted.left, ast.Call) and ast.unparse(asserted.left.func) in ("candidate", entry)):
            return None
        request = "expression", ast.unparse(asserted.left), "\n".join(map(ast.unparse, before))
        expected = asserted.comparators[0]
    try:
        return Call(request, ast.literal_eval(expected), strict=True)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def as_code(test: Test) -> str:
    """The code of a check test; of a call test whose expected value is no literal, the assert that it stands for."""
    if test.kind == "check":
        return test.input
    arguments, from_json = test.value("input")
    given = repr(arguments) if from_json else test.input.strip()
    return f"assert candidate(*({given})) == ({test.expected.strip()})"


# ---- comparison, always in this process -----------------------------------------------------------------------------

def same_value(expected: object, got: object, tolerance: float = 1e-9, strict: bool = False) -> bool:
    """
    Equality as Python's ==, but for three rules. A bool where a number is expected is wrong (True for 1); a number
    where a bool is expected counts as in Python (0 for False). Where a float is expected, numbers agree within
    `tolerance`, relative or absolute, also inside lists, tuples and values of dicts. Unless `strict`, a tuple counts
    as the list of its items.

    same_value([1, 2.0], [1, 2.0000000001]) and same_value(1, 1.0) are True; same_value([1], [True]) is False.
    """
    if isinstance(got, tuple) and not strict:
        got = list(got)
    if type(expected) in (list, tuple):
        return type(got) is type(expected) and len(expected) == len(got) and all(
            same_value(a, b, tolerance, strict) for a, b in zip(expected, got, strict=True))
    if type(expected) is dict:
        return type(got) is dict and expected.keys() == got.keys() and all(
            same_value(value, got[key], tolerance, strict) for key, value in expected.items())
    if type(got) is bool and type(expected) is not bool:
        return False
    if expected == got:
        return True
    return type(expected) is float and type(got) in (int, float) and close(expected, got, tolerance)


def close(expected: float, got: float, tolerance: float) -> bool:
    """Whether two numbers agree within `tolerance`, relative to the larger or absolute."""
    try:
        return math.isclose(expected, got, rel_tol=min(tolerance, 1.0), abs_tol=tolerance)
    except OverflowError:                        # an integer that no float can hold
        return False


def same_text(expected: str, got: str, tolerance: float = 0.0) -> bool:
    """
    Equality of two outputs: the same number of lines, and each line equal, where blanks at the end of a line and blank
    lines at the end of the text do not count. A prefix of the expected output is never enough. With a tolerance the
    words of a line are compared, and two that are numbers may differ by it.
    """
    a, b = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (expected, got))
    if a == b or not tolerance:
        return a == b
    a, b = ([line.split() for line in lines] for lines in (a, b))
    return [*map(len, a)] == [*map(len, b)] and all(
        x == y or same_number(x, y, tolerance) for x, y in zip(chain(*a), chain(*b), strict=True))


def same_number(expected: str, got: str, tolerance: float) -> bool:
    """Whether two words are numbers that agree within `tolerance`."""
    try:
        return close(float(expected), float(got), tolerance)
    except ValueError:
        return False


def how_it_ended(run: Run, cpu_total: float, share: float = 1.0) -> Verdict:
    """
    The verdict of the test that was running when the process ended without giving its result. cpu_total: processor
    seconds after which the kernel kills the process; share: of the time limit that it had.
    """
    message = run.err[-300:].decode("utf-8", "replace").strip()
    if run.end == "time":
        status, detail = "TLE", "time limit"
        detail = detail if share == 1.0 else f"{share:g} of the {detail}, after {HURRY_AFTER} TLE"
    elif run.end == "output":
        status, detail = "OLE", "output limit"
    elif os.WIFSIGNALED(run.status):
        number = os.WTERMSIG(run.status)
        status, detail = "RE", f"killed by signal {number}: {signal.strsignal(number)}"
        if number == signal.SIGPROF or number == signal.SIGKILL and run.cpu >= 0.9 * cpu_total:
            # the compiler's time (no program can send itself this signal), RLIMIT_CPU
            status, detail = "TLE", "processor time limit"
    elif "MemoryError" in message:
        status, detail = "MLE", message
    else:
        code = os.waitstatus_to_exitcode(run.status)
        status, detail = "RE", message if message and code else f"ended early with exit status {code}"
    return Verdict(status, run.wall, detail)


def failure(error: str, seconds: float) -> Verdict:
    """The verdict of a test whose call, or whose program, raised `error`."""
    return Verdict("MLE" if error.startswith("MemoryError") else "RE", seconds, error)


def compare(call: Call, test: Test, raw: object, tolerance: float, seconds: float) -> Verdict:
    """The verdict of a call test that gave `raw`: what server.encode() writes, or whatever a hostile process wrote."""
    try:
        right = same_value(call.expected, decode(raw), tolerance, call.strict)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return Verdict("RE", seconds, "the result is not readable")
    return Verdict("AC", seconds) if right else (
        Verdict("WA", seconds, f"on {test.input[:80]} gave {json.dumps(raw)[:80]}"))


# ---- the pool of workers --------------------------------------------------------------------------------------------

class Judge:
    """
    A pool of sandboxes, each served by a thread of its own that waits on pipes.

    workers: number of sandboxes. time_limit: processor seconds per test on the reference machine; a calibration run at
    start-up scales them to this one. wall_factor: a test may last wall_factor times that by the clock; this ends a
    program that sleeps, and leaves room for one that gets little of a busy machine. memory_mb: address space of a
    program. output_kb: of each of its streams. tolerance: by which floats may differ, relative or absolute; None is
    1e-9 for call tests, nothing for the others. A problem's own Limits go before these. isolation: "auto", or one of A,
    B, C to insist. allow_unsafe: accept isolation C, which does not hold back a hostile program. quiet: do not print
    the isolation.

    cache_size: size of the LRU cache of verdicts, in programs; 0 for none. The same program with the same tests is not
    run a third time: a policy repeats itself, and the more so the better it is trained. Only AC and WA are cached,
    since TLE, MLE, OLE, RE and JE may not repeat, and only where two runs gave the same.

    counts: totals of programs, tests, processes, cached (programs answered from the cache), retries (after a judge
    error), failed (programs with a JE), and of every status.

    UserError if no isolation holds on this machine. JudgeError from poll() and run() if more than 5 % of at least 20
    programs could not be judged: a judge error that passes unseen is a wrong reward.
    """

    def __init__(self, workers: int = 2, time_limit: float = 1.0, wall_factor: float = 5.0, memory_mb: int = 512,
                 output_kb: int = 1024, tolerance: float | None = None, isolation: str = "auto",
                 allow_unsafe: bool = False, cache_size: int = 0, quiet: bool = False):
        if workers < 1 or wall_factor < 1:
            raise ValueError(f"workers={workers} (should be >= 1), wall_factor={wall_factor} (>= 1)")
        self.limits, self.wall_factor, self.cache_size = (
            Limits(time_limit, memory_mb, output_kb, tolerance), wall_factor, cache_size)
        self.isolation, self.drop_by, scale = choose_isolation(isolation, allow_unsafe)
        self.scale, self.cpu_limit = scale, time_limit * scale    # cpu_limit: processor seconds per test here
        if not quiet and self.isolation not in _printed:
            _printed.add(self.isolation)
            print(f"judge: isolation {self.isolation} ({LABEL[self.isolation]}), {workers} workers, "
                  f"{time_limit:g} s a test x {scale:.2f} for this machine", flush=True)
        self._change = threading.Condition()                      # guards everything below
        self.counts, self._last_error = collections.Counter(), ""
        self._alarm = ""                                          # why poll() and run() raise
        self._queue, self._finished, self._running, self._closing = collections.deque(), [], 0, False
        # (program, tests, entry, limits) -> (verdicts, whether a second run gave the same), last used last
        self._cache = collections.OrderedDict()
        self._boxes = [None] * workers
        self._code_boxes = [None] * workers                       # for the code of check tests
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True, name=f"judge {i}")
                         for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def run(self, program: str, tests: list[Test], entry: str = "f", limits: Limits = AS_THE_JUDGE) -> list[Verdict]:
        """Judge one program and wait for it. -> one verdict per test, in the order of `tests`. Raises as submit()."""
        job = self.submit(None, program, tests, entry, limits, done=threading.Event())
        job.done.wait()
        if self._alarm:
            raise JudgeError(self._alarm)
        return [job.verdicts[i] for i in range(len(job.tests))]

    def submit(self, key: Hashable, program: str, tests: list[Test], entry: str = "f",
               limits: Limits = AS_THE_JUDGE, done: threading.Event | None = None) -> Job:
        """
        Queue one program and return at once; poll() will give its verdicts under `key`. entry: the function that call
        and check tests call, "f" or "Class.method"; "f" is also a method of class Solution where there is no function
        f. limits: the problem's. done: set when the verdicts are there; poll() leaves such a job out. ValueError for
        a program that cannot be judged; JudgeError after close().
        """
        job = Job(key, program, tuple(tests), entry, done, limits)
        if not isinstance(program, str):
            raise ValueError(f"a program should be text, not {type(program).__name__}")
        if not job.tests:
            raise ValueError("a program without tests cannot be judged")
        if len({test.kind for test in job.tests}) > 1:
            raise ValueError("the tests of one program should be all 'call' or all 'stdio' or all 'check'")
        if job.tests[0].kind != "stdio" and not entry:
            raise ValueError(f"{job.tests[0].kind} tests need an entry, the name of the function to call")
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
            boxes = [box for box in self._boxes + self._code_boxes if box]
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
                verdicts, agreed = self._cache.get(job.content, (None, False))
                if agreed:
                    job.counts["cached"] = 1
                    job.verdicts = verdicts
                    self._cache.move_to_end(job.content)
            error = "the judge was closed"
            for _ in range(2):                   # after a judge error once more in a new box, then the verdict is JE
                if self._closing or len(job.verdicts) == len(job.tests):
                    break
                try:
                    if job.tests[0].kind == "stdio":
                        self._judge_stdio(worker, job)
                    else:
                        self._judge_calls(worker, job)
                except Exception as e:
                    error = f"{type(e).__name__}: {e}"
                    if not isinstance(e, JudgeError):
                        error += " in " + traceback.format_exc(limit=-1).split("\n")[-3].strip()
                    job.counts["retries"] += 1
                    self._drop_boxes(worker)
            self._finish(job, error)
        self._drop_boxes(worker)

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
            if self.cache_size and set(statuses) <= {"AC", "WA"} and not job.counts["cached"]:
                before, _ = self._cache.get(job.content, ({}, False))
                same = {i: v.status for i, v in before.items()} == {i: v.status for i, v in job.verdicts.items()}
                self._cache[job.content] = job.verdicts, same
                self._cache.move_to_end(job.content)
                if len(self._cache) > self.cache_size:
                    self._cache.popitem(last=False)                                     # the longest unused
            if not job.done:
                self._finished.append(job)
        if job.done:
            job.done.set()

    def _box(self, boxes: list[Box | None], worker: int) -> Box:
        """The worker's box in _boxes or _code_boxes, started if there is none."""
        if box := boxes[worker]:
            return box
        box = Box(self.isolation, self.drop_by)
        with self._change:
            boxes[worker] = box
            if self._closing:                    # close() has not seen this one
                raise JudgeError("the judge was closed")
        return box

    def _drop_boxes(self, worker: int) -> None:
        for boxes in (self._boxes, self._code_boxes):
            with self._change:
                box, boxes[worker] = boxes[worker], None
            if box:
                box.kill()
                box.close()

    def _bounds(self, job: Job, tests: int, share: float) -> Bounds:
        """Limits of a process that runs so many tests of a job, each with this share of the time."""
        own, ours = job.limits, self.limits
        cpu = (own.seconds or ours.seconds) * self.scale * share
        return Bounds(cpu, cpu * self.wall_factor, math.ceil(cpu * tests) + 1,
                      int((own.memory_mb or ours.memory_mb) * (1 << 20)),
                      int((own.output_kb or ours.output_kb) * 1024))

    def _tolerance(self, job: Job, otherwise: float) -> float:
        for named in (job.limits.tolerance, self.limits.tolerance):
            if named is not None:
                return named
        return otherwise

    def _judge_calls(self, worker: int, job: Job) -> None:
        """
        All tests that are one call in one process; after a crash or a time-out, the tests behind it in a new one. Check
        tests that are code: each in processes of its own.
        """
        tolerance = self._tolerance(job, 1e-9 if job.tests[0].kind == "call" else 0.0)
        while (todo := job.todo())[0]:
            indices, share = todo
            calls = {i: call for i in indices if (call := as_call(job.tests[i], job.entry))}
            if not calls:
                self._judge_check(worker, job, indices[0], share)
                continue
            todo = [*calls]

            def on_line(k: int, line: dict, seconds: float, todo=todo, calls=calls) -> bool:
                """k: index in todo, or -1 when the program has loaded or failed to load. -> True to end the process."""
                if "e" in line:
                    for i in todo if k < 0 else todo[k:k + 1]:
                        job.verdicts[i] = failure(line["e"], seconds)
                elif k >= 0:
                    job.verdicts[todo[k]] = compare(calls[todo[k]], job.tests[todo[k]], line["v"], tolerance, seconds)
                return all(i in job.verdicts for i in todo)

            bounds = self._bounds(job, len(todo), share)
            job.counts["processes"] += 1
            task = {"kind": "call", "program": job.program, "entry": job.entry,
                    "calls": [call.request for call in calls.values()]}
            run = self._box(self._boxes, worker).execute(task, bounds, on_line)
            if run.end != "stopped":             # it failed in the first of `lost`, or while loading: then in all
                lost = [i for i in todo if i not in job.verdicts]
                verdict = how_it_ended(run, bounds.cpu_total, share)
                job.verdicts.update(dict.fromkeys(lost[:1] if run.loaded else lost, verdict))

    def _judge_check(self, worker: int, job: Job, i: int, share: float) -> None:
        """
        Test i, code with asserts: it runs in one process and the program in another, in two boxes. Each call that the
        code makes goes through this process to the program, and its result back, so that the program sees arguments
        and nothing else.
        """
        to_code, from_code, said = queue.SimpleQueue(), queue.SimpleQueue(), {}
        code_box, program_box = self._box(self._code_boxes, worker), self._box(self._boxes, worker)

        def run_code() -> None:
            def on_line(k: int, line: dict, seconds: float) -> bool | bytes:
                if k < 0:                        # it has loaded
                    return b""
                from_code.put(line.get("v") or ["failed", line["e"]])
                answer = to_code.get()
                return True if answer is None else json.dumps(answer).encode() + b"\n"

            task = {"kind": "check", "program": as_code(job.tests[i]), "entry": job.entry, "live": True}
            try:
                run = code_box.execute(task, Bounds(CHECK_SECONDS, 60 + CHECK_SECONDS, 60, 512 << 20, 1 << 24), on_line)
                from_code.put(["failed", "the test's own code did not end: " + how_it_ended(run, 60).detail])
            except Exception as error:
                from_code.put(error)

        def on_line(k: int, line: dict, seconds: float) -> bool | bytes:
            if k < 0 and "e" in line:            # it did not load
                job.verdicts[i] = failure(line["e"], seconds)
                return True
            if k >= 0:
                said.update(error=line.get("e"))
                to_code.put(line)
            asked = from_code.get()
            if isinstance(asked, Exception):
                raise JudgeError(f"the code of a test: {asked}")
            if asked[0] == "call":
                return json.dumps(["values", asked[1], asked[2:]]).encode() + b"\n"
            job.verdicts[i] = (Verdict("AC", seconds) if asked[0] == "passed" else
                               failure(said["error"], seconds) if said.get("error") else
                               Verdict("WA", seconds, str(asked[1])))
            return True

        thread = threading.Thread(target=run_code, name="check")
        thread.start()
        try:
            job.counts["processes"] += 1
            task = {"kind": "call", "program": job.program, "entry": job.entry, "live": True}
            bounds = self._bounds(job, 1, share)
            run = program_box.execute(task, bounds, on_line)
            if run.end != "stopped":
                job.verdicts[i] = how_it_ended(run, bounds.cpu_total, share)
            job.verdicts.setdefault(i, Verdict("OLE", run.wall, "arguments that do not fit into a pipe"))
        finally:
            to_code.put(None)
            thread.join()

    def _judge_stdio(self, worker: int, job: Job) -> None:
        """One process per test, forked from one that has compiled the program and never runs it."""
        tolerance, running = self._tolerance(job, 0.0), {}
        limits = self._bounds(job, 1, 1.0)
        # the kernel adds the forks to the time of that process, and each of its tests may use as much as it may
        limits = replace(limits, cpu_total=limits.cpu_total + len(job.tests) // 100)

        def tests() -> Iterator[tuple[bytes, Bounds]]:
            while (todo := job.todo())[0]:
                (i, *_), share = todo
                running.update(i=i, share=share)
                job.counts["processes"] += 1
                yield job.tests[i].input.encode("utf-8", "surrogatepass"), self._bounds(job, 1, share)

        while job.todo()[0]:
            for run in self._box(self._boxes, worker).run_tests(job.program, limits, tests()):
                i, share = running["i"], running["share"]
                if run.end != "exit" or run.status:
                    verdict = how_it_ended(run, limits.cpu_total, share)
                elif same_text(job.tests[i].expected, run.out.decode("utf-8", "replace"), tolerance):
                    verdict = Verdict("AC", run.wall)
                else:
                    verdict = Verdict("WA", run.wall, f"printed {run.out[:80]!r}")
                job.verdicts[i] = verdict
