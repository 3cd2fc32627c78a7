"""The code judge: runs untrusted programs against unit tests in a sandbox and says what became of each test.

Report, section 3.2: the reward of a code problem is rule-based, from its unit tests; "an online judge" runs very many of
them in parallel, asynchronously to generation (3.4.1). The report says no more; the design here is ours (docs/judge.md):
- expected outputs never enter the sandbox; a program can send bytes out, and this process alone compares them;
- levels, chosen by trying them at start-up and printed once:
    A  bubblewrap (namespaces, read-only system, no network) + seccomp allow list + rlimits
    B  Landlock + seccomp allow list + rlimits (an ordinary user, or a default container)
    C  rlimits and a process group only (macOS, old kernels): refused unless `allow_unsafe=True`
- one warm, confined interpreter per worker forks one process per program; no two programs ever share a process.

    with Judge(workers=2) as judge:
        verdicts = judge.run("def f(xs):\\n    return sum(xs)", [Test("call", "[[1, 2]]", "3")], entry="f")

    python judge.py                    # prints the level, checks the walls, measures programs per second
Expect about 250 programs of 12 call tests a second and worker on one ordinary core.
"""
import ast
import collections
import decimal
import json
import math
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Literal

import sandbox

STATUSES = ("AC", "WA", "TLE", "MLE", "OLE", "RE", "JE", "NR")    # NR: not run (a lower level failed already)


class JudgeError(RuntimeError):
    """The judge failed, not the program: the box did not start, died, or broke its protocol."""


@dataclass(frozen=True)
class Test:
    """One unit test. `call`: input is a JSON list of arguments and expected is JSON; `stdio`: both are text.

    level: difficulty, 0 = easiest (reward.difficulty_levels). ValueError if the JSON of a call test is not readable.
    """
    kind: Literal["stdio", "call"]
    input: str
    expected: str
    level: int = 0
    __test__ = False    # not a pytest class

    def __post_init__(self):
        if self.kind not in ("stdio", "call"):
            raise ValueError(f"test kind {self.kind!r}: should be 'stdio' or 'call'")
        if self.kind == "call":
            try:
                arguments, _ = read_json(self.input), read_json(self.expected)
            except ValueError as error:
                raise ValueError(f"call test {self.input[:60]!r} -> {self.expected[:60]!r}: {error}") from None
            if not isinstance(arguments, list):
                raise ValueError(f"call test input {self.input[:60]!r}: should be a JSON list of arguments")


@dataclass(frozen=True)
class Verdict:
    """status: one of STATUSES; seconds: wall-clock of this test, as the judge saw it; detail: one line for a person."""
    status: str
    seconds: float
    detail: str = ""


# ---------------------------------------------------------------- comparison (always in this process)
def read_json(text):
    """Strict JSON: NaN and infinities are refused (they are not JSON, and NaN compares equal to nothing)."""
    def refuse(name):
        raise ValueError(f"{name} is not JSON")
    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def same_value(expected, got, tolerance=1e-9) -> bool:
    """Equality of two JSON values with their types: True != 1, 1 != 1.0; floats agree within a relative tolerance.

    same_value([1, 2.0], [1, 2.0000000001]) is True; same_value([1], [True]) and same_value(1, 1.0) are False.
    """
    if type(expected) is not type(got):
        return False
    if isinstance(expected, list):
        return len(expected) == len(got) and all(map(lambda a, b: same_value(a, b, tolerance), expected, got))
    if isinstance(expected, dict):
        return expected.keys() == got.keys() and all(same_value(expected[k], got[k], tolerance) for k in expected)
    if isinstance(expected, float):
        return expected == got or math.isclose(expected, got, rel_tol=tolerance, abs_tol=tolerance)
    return expected == got


def same_text(expected, got, tolerance=None) -> bool:
    """Equality of two outputs: as many lines (blank ones at the end aside), each equal after rstrip.

    With a tolerance, also as many tokens a line, and tokens that are both decimal numbers may differ by
    tolerance * max(1, |expected|). A prefix of the answer is never enough (the zip() bug of other judges).
    """
    a, b = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (expected, got))
    if len(a) != len(b):
        return False
    return all(x == y or (tolerance is not None and _same_tokens(x.split(), y.split(), tolerance))
               for x, y in zip(a, b, strict=True))


def _same_tokens(a, b, tolerance):
    return len(a) == len(b) and all(x == y or _same_number(x, y, tolerance) for x, y in zip(a, b, strict=True))


def _same_number(x, y, tolerance):
    if len(x) > 100 or len(y) > 100:
        return False
    try:
        x, y = decimal.Decimal(x), decimal.Decimal(y)
    except decimal.InvalidOperation:
        return False
    tolerance = decimal.Decimal(str(tolerance))
    return x.is_finite() and y.is_finite() and abs(x - y) <= tolerance * max(1, abs(x))


def tests_from_asserts(source: str, entry: str) -> list[Test]:
    """HumanEval/MBPP style tests to call tests: each statement must read `assert entry(literals) == literal`.

    ValueError names the first line of any other shape: such a test would need its expected value inside the box.
    """
    tests = []
    for node in ast.parse(source).body:
        try:
            compare = node.test
            call, (operator,), (right,) = compare.left, compare.ops, compare.comparators
            if not (isinstance(node, ast.Assert) and isinstance(operator, ast.Eq) and call.func.id == entry
                    and not call.keywords):
                raise ValueError
            arguments, expected = [ast.literal_eval(a) for a in call.args], ast.literal_eval(right)
            tests.append(Test("call", json.dumps(sandbox.plain(arguments)), json.dumps(sandbox.plain(expected))))
        except (AttributeError, ValueError, TypeError):
            raise ValueError(f"line {node.lineno}: {ast.unparse(node)[:80]!r} should be "
                             f"`assert {entry}(literals) == literal`") from None
    return tests


# ---------------------------------------------------------------- the box: one warm sandboxed interpreter
SYSTEM_PATHS = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store")
BOOT = "import sys; del sys.path[0]; exec(compile(open(sys.argv[1]).read(), 'sandbox.py', 'exec'))"
BWRAP = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
         "--die-with-parent", "--new-session", "--as-pid-1", "--hostname", "box")


def unused_uid() -> int:
    """A user id that no account has (root gives up its own for it)."""
    import pwd
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return next(uid for uid in range(64999, 60000, -1) if uid not in taken)


def box_command(level, drop, fd, memory):
    """(argv, how the box gives up power): what to start for a level. No secret in it: any user can read an argv."""
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    paths = [sys.base_prefix, *SYSTEM_PATHS]
    if not python.startswith(os.path.join(sys.base_prefix, "")):
        paths.append(python)
    source = os.path.realpath(sandbox.__file__)
    cfg = {"level": level, "drop": drop, "fd": fd, "memory": memory, "paths": paths,
           "uid": unused_uid() if drop == "uid" else None}
    inner = [python, "-S", "-s", "-B", "-X", "utf8", "-c", BOOT,
             "/sandbox.py" if level == "A" else source, json.dumps(cfg)]
    if level != "A":
        return inner
    argv = ["bwrap", *BWRAP]
    if drop == "namespace":                                # not root: a user namespace, in which we are nobody
        argv += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    argv += ["--cap-drop", "ALL"]
    if drop == "uid":                                      # root: keep only what the server needs to give up root
        argv += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    for path in (p for p in paths if os.path.exists(p)):
        for parent in _parents(path):
            argv += ["--dir", parent]                      # else bwrap copies the mode of /root, 0700
        argv += ["--ro-bind", path, path]
    return [*argv, "--ro-bind", source, "/sandbox.py", "--remount-ro", "/", "--chdir", "/", *inner]


def _parents(path):
    parts = path.strip("/").split("/")[:-1]
    return ["/" + "/".join(parts[:i + 1]) for i in range(len(parts))]


@dataclass
class Run:
    """What came out of one process: result lines (parsed), the two streams, and how it ended."""
    lines: list                # dicts {"v": value} or {"e": error}
    seconds: list              # wall-clock per line
    out: bytes = b""
    err: bytes = b""
    end: str = "exit"          # exit | time | output | enough (the caller had seen all it wanted)
    status: int = 0            # as from waitpid
    cpu: float = 0.0           # processor seconds of the whole process, from its rusage
    wall: float = 0.0


class Box:
    """The parent's side of one sandboxed server. A JudgeError from any method means: throw the box away."""

    def __init__(self, level, drop, memory):
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(30)
        self.stderr = tempfile.TemporaryFile()
        self.devnull = os.open(os.devnull, os.O_RDONLY)
        try:
            with theirs:
                # an empty environment (bwrap shows its own in /proc/1/environ) but for a fixed order of sets
                self.process = subprocess.Popen(
                    box_command(level, drop, theirs.fileno(), memory), env={"PYTHONHASHSEED": "0"}, cwd="/",
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.stderr,
                    pass_fds=(theirs.fileno(),), start_new_session=True)
        except OSError as error:
            self.process = None
            self.close()
            raise JudgeError(f"cannot start: {error}") from None
        try:
            self._receive(b"Z")
        except JudgeError as error:
            self.kill()
            self.stderr.seek(0)
            said = self.stderr.read(4000).decode("utf-8", "replace").strip().split("\n")[-1]
            self.close()
            raise JudgeError(said or str(error)) from None

    def _receive(self, want=b""):
        try:
            data = self.sock.recv(sandbox.MESSAGE.size, socket.MSG_WAITALL)
        except OSError as error:
            raise JudgeError(f"the box does not answer: {error}") from None
        if len(data) < sandbox.MESSAGE.size:
            raise JudgeError("the box has gone")
        kind, number, seconds = sandbox.MESSAGE.unpack(data)
        if want and kind != want:
            raise JudgeError(f"the box said {kind!r} where {want!r} was due")
        return kind, number, seconds

    def _send(self, operation, number=0, fds=()):
        try:
            socket.send_fds(self.sock, [sandbox.MESSAGE.pack(operation, number, 0.0)], list(fds))
        except OSError as error:
            raise JudgeError(f"the box does not listen: {error}") from None

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()

    def close(self):
        """Close the line (the server then ends its child and itself), and make sure of it."""
        self.sock.close()
        if self.process:
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        if not self.stderr.closed:
            self.stderr.close()
            os.close(self.devnull)

    def execute(self, job, stdin, limit, wall, cap, cpu_total, enough) -> Run:
        """Run one program in a fresh process and collect what it says.

        limit: processor seconds, and limit * wall: wall-clock seconds, per result line (per process for stdio);
        cap: bytes per stream; cpu_total: whole seconds, enforced by the kernel; enough(lines) -> True ends it early.
        """
        opened = []
        try:
            for _ in range(3):                                # stdout, stderr, results
                opened += os.pipe()
            with tempfile.TemporaryFile() as job_file, tempfile.TemporaryFile() as stdin_file:    # no name on disk
                job_file.write(json.dumps(job).encode())
                job_file.seek(0)
                stdin_file.write(stdin)
                stdin_file.seek(0)
                self._send(b"R", cpu_total, [stdin_file.fileno() if stdin else self.devnull, *opened[1::2],
                                             job_file.fileno()])
            for fd in opened[1::2]:
                opened.remove(fd)
                os.close(fd)
            for fd in opened:
                os.set_blocking(fd, False)
            return self._collect(opened, limit, wall, cap, enough)
        finally:
            for fd in opened:
                os.close(fd)

    def _collect(self, reads, limit, wall, cap, enough):
        run, data, at, reported = Run([], []), {fd: bytearray() for fd in reads}, 0, 0.0
        live, poll = {*reads, self.sock.fileno()}, select.poll()
        for fd in live:
            poll.register(fd, select.POLLIN)
        begin = last = now = time.monotonic()
        soft, hard, killed = begin + limit, begin + limit * wall, 0.0
        asked = over = False

        def pump(fd):
            """Read one block; False when there is nothing more to take now. Beyond the cap bytes are thrown away."""
            try:
                block = os.read(fd, 1 << 16) if fd in live else b""
            except BlockingIOError:
                return False
            if not block and fd in live:
                live.discard(fd)
                poll.unregister(fd)
            if len(data[fd]) <= cap:
                data[fd] += block
            return bool(block) and len(data[fd]) <= cap

        while not over:
            until = killed + 10 if killed else hard if asked else min(soft, hard)
            for fd, _ in poll.poll(max(0, until - now) * 1000 + 1):
                if fd != self.sock.fileno():
                    pump(fd)
                    continue
                kind, number, seconds = self._receive()
                if kind == b"E":
                    over, run.status, run.cpu = True, number, seconds
                else:
                    # the answer to "C": has this test used up its processor time, or was it kept waiting?
                    used, asked = (max(0.0, seconds - reported) if seconds >= 0 else limit), False
                    soft = time.monotonic() + max(0.01, limit - used)
                    if used >= 0.97 * limit:
                        hard = 0.0
            now = time.monotonic()
            while over and any([pump(fd) for fd in reads]):    # nothing can write any more: take what is left
                pass
            while (stop := data[reads[2]].find(b"\n", at)) >= 0:
                line, at = _read_line(bytes(data[reads[2]][at:stop]), len(run.lines) - 1), stop + 1
                run.lines.append(line)
                run.seconds.append(now - last)
                reported = max(reported, line["c"])
                last, soft, hard = now, now + limit, now + limit * wall
            if killed:
                if now > killed + 10 and not over:
                    raise JudgeError("a killed program did not end")
                continue
            run.end = ("output" if max(map(len, data.values())) > cap else "enough" if enough(run.lines) else
                       "time" if now >= hard else "exit")
            if run.end != "exit" and not over:
                killed = now
                self._send(b"K")
            elif now >= soft and not asked:
                asked = True
                self._send(b"C")
        run.out, run.err, run.wall = bytes(data[reads[0]]), bytes(data[reads[1]]), now - begin
        return run


def _read_line(raw, index):
    """One result line of a hostile process: {"v": value} or {"e": error}, and "c", the seconds it claims."""
    try:
        line = read_json(raw)
        claim = line.get("c", 0.0)
        good = line["i"] == index and ("v" in line or "e" in line or index == -1)
        if not good or type(claim) is not float or not 0 <= claim < 1e6:
            raise ValueError
        return line if "e" not in line else {"e": str(line["e"])[:300], "c": claim}
    except (ValueError, AttributeError, KeyError, TypeError):
        return {"e": "the result is not readable", "c": 0.0}


def how_it_ended(run: Run, cpu_total: float) -> tuple[str, str]:
    """(status, detail) of the test that was running when its process ended without a result."""
    if run.end == "time":
        return "TLE", "time limit"
    if run.end == "output":
        return "OLE", "output limit"
    if os.WIFSIGNALED(run.status):
        if run.cpu >= 0.9 * cpu_total:
            return "TLE", "processor time limit"
        return "RE", f"killed by {signal.Signals(os.WTERMSIG(run.status)).name}"
    said = run.err[-300:].decode("utf-8", "replace").strip()
    code = os.waitstatus_to_exitcode(run.status)
    if code == 97 and said.startswith("sandbox:"):
        raise JudgeError(said)
    if "MemoryError" in said:
        return "MLE", said
    return "RE", said if said and code else f"ended early with exit status {code}"


# ---------------------------------------------------------------- levels: found by trying
# A program that tries to do what it must not; it returns the list of what worked.
PROBE = """
import os
def f(secret, uid):
    holes = []
    def attempt(name, act):
        try:
            act()
            holes.append(name)
        except Exception:
            pass
    def network():
        import socket
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    def fork():
        if not os.fork():
            os._exit(0)
    attempt("read a file outside", lambda: open(secret).read())
    attempt("write a file", lambda: open("/tmp/judge_probe", "w").write("x"))
    attempt("network", network)
    attempt("fork", fork)
    attempt("signal the server", lambda: os.kill(os.getppid(), 0))
    attempt("signal everybody", lambda: os.kill(-1, 0))
    attempt("become root", lambda: os.setuid(0))
    attempt("see other processes", lambda: open("/proc/self/status").read())
    if uid and os.getuid() != uid:
        holes.append("still user %d" % os.getuid())
    return holes
"""
CALIBRATION = """
import time
def f():
    best = 9.0
    for _ in range(5):
        begin, total, xs = time.process_time(), 0, list(range(20000))
        for x in xs:
            total += x * x % 7
        best = min(best, time.process_time() - begin)
    return best
"""
REFERENCE_SECONDS = 1.2e-3    # CALIBRATION on an idle core of a 2023 server, Python 3.11: limits are in its seconds
WAYS = {"A": ("uid", "namespace"), "B": ("uid", "capabilities", "nothing"), "C": ("nothing",)}
LABEL = {"A": "bubblewrap + seccomp + rlimits", "B": "Landlock + seccomp + rlimits",
         "C": "rlimits only, for trusted code"}
_printed = set()


def open_box(level, memory, drop=None):
    """Start a box and attack it. Returns (box, drop, speed scale); JudgeError with the reason if it does not hold."""
    root, reasons = os.geteuid() == 0, []
    for way in [drop] if drop else WAYS[level]:
        if not drop and level != "C" and root != (way in ("uid", "capabilities")) and not (root and way == "namespace"):
            continue
        box = None
        try:
            box = Box(level, way, memory)
            with tempfile.NamedTemporaryFile() as secret:
                os.chmod(secret.name, 0o644)
                arguments = json.dumps([secret.name, unused_uid() if way == "uid" else 0])
                run = box.execute({"program": PROBE, "entry": "f", "inputs": [arguments]}, b"", 10, 3, 1 << 16, 30,
                                  lambda lines: len(lines) == 2)
            holes = run.lines[1].get("v", run.lines[1]) if len(run.lines) == 2 else how_it_ended(run, 30)
            if holes and level != "C":
                raise JudgeError(f"a probe got through: {holes}")
            run = box.execute({"program": CALIBRATION, "entry": "f", "inputs": ["[]"]}, b"", 20, 5, 1 << 16, 60,
                              lambda lines: len(lines) == 2)
            return box, way, max(1.0, min(10.0, run.lines[1]["v"] / REFERENCE_SECONDS))
        except (JudgeError, KeyError, IndexError, TypeError) as error:
            reasons.append(f"{way}: {error}")
            if box:
                box.close()
    raise JudgeError("; ".join(reasons) or "not available")


# ---------------------------------------------------------------- the pool
@dataclass
class Job:
    key: object
    program: str
    tests: list
    entry: str
    verdicts: list | None = None
    done: threading.Event | None = None    # set for run(), None for submit()


class Judge:
    """A pool of `workers` sandboxes, each served by a thread that waits on pipes.

    time_limit: processor seconds per test on the reference machine (scaled by a calibration run at start-up);
    wall: a test may last time_limit * wall of wall-clock (a sleeper, or a busy machine); memory_mb per program;
    output_kb per stream; stop_at_failed_level: run easier levels first and leave the tests above the first failed
    level out (status NR; for strict rewards only); max_timeouts: after so many timed-out tests of one program the
    rest is TLE unrun; level: "auto", or one of "A", "B", "C" to insist.
    JudgeError at start if no level holds; from poll()/run() if more than 5 % of at least 20 programs could not be judged.
    """

    def __init__(self, workers=2, time_limit=1.0, wall=5.0, memory_mb=512, output_kb=1024, level="auto",
                 allow_unsafe=False, stop_at_failed_level=False, max_timeouts=4, tolerance=None, quiet=False):
        if workers < 1 or time_limit <= 0:
            raise ValueError(f"workers={workers}, time_limit={time_limit}: should be at least 1, and above 0 s")
        self.time_limit, self.wall, self.memory, self.cap = time_limit, wall, memory_mb << 20, output_kb << 10
        self.stop_at_failed_level, self.max_timeouts, self.tolerance = stop_at_failed_level, max_timeouts, tolerance
        self.counts = collections.Counter()
        self.seconds = 0.0
        self._lock, self._ready = threading.Lock(), threading.Condition()
        self._queue, self._finished, self._closing, self._running = collections.deque(), collections.deque(), False, 0
        box = self._choose(level, allow_unsafe)
        box.close()                    # a box lives and dies with the thread that started it: workers open their own
        if not quiet and (self.level, self.drop) not in _printed:
            _printed.add((self.level, self.drop))
            print(f"judge: level {self.level} ({LABEL[self.level]}), {workers} workers, "
                  f"time limit {time_limit:g} s x {self.scale:.2f}", flush=True)
        self._boxes = [None] * workers
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def _choose(self, level, allow_unsafe):
        if level not in ("auto", "A", "B", "C"):
            raise ValueError(f"level {level!r}: should be 'auto', 'A', 'B' or 'C'")
        reasons = []
        for candidate in "ABC" if level == "auto" else level:
            if candidate == "C" and not allow_unsafe:
                reasons.append("C: refused (rlimits do not confine untrusted code; allow_unsafe=True insists)")
                continue
            try:
                if candidate != "C" and (sys.platform != "linux" or platform.machine() not in sandbox.AUDIT_ARCH):
                    raise JudgeError(f"needs Linux on {' or '.join(sandbox.AUDIT_ARCH)}")
                box, self.drop, self.scale = open_box(candidate, self.memory)
                self.level = candidate
                return box
            except JudgeError as error:
                reasons.append(f"{candidate}: {error}")
        raise JudgeError("no sandbox on this machine. " + " | ".join(reasons))

    # ---- the face
    def run(self, program: str, tests: list[Test], entry: str = "f") -> list[Verdict]:
        """Judge one program and wait. One verdict per test, in the order of `tests`."""
        job = Job(None, program, list(tests), entry, done=threading.Event())
        self._put(job)
        job.done.wait()
        self._check()
        return job.verdicts

    def submit(self, key, program: str, tests: list[Test], entry: str = "f") -> None:
        """Queue one program; its verdicts come out of poll() under `key`."""
        self._put(Job(key, program, list(tests), entry))

    def poll(self) -> list:
        """(key, verdicts) of all submitted programs finished since the last call, in no promised order. Never waits."""
        self._check()
        finished = []
        while self._finished:
            job = self._finished.popleft()
            finished.append((job.key, job.verdicts))
        return finished

    def counters(self) -> dict:
        """queued, running: programs now; programs, tests, processes, seconds (of worker time); and counts by status."""
        with self._lock:
            return {"queued": len(self._queue), "running": self._running, "seconds": self.seconds,
                    **{k: self.counts[k] for k in ("programs", "tests", "processes", "boxes", "retries", *STATUSES)}}

    def close(self) -> None:
        """End every process, the running ones too. What is still queued gets JE."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        for box in self._boxes:
            if box:
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
        kinds = {test.kind for test in job.tests}
        if len(kinds) > 1:
            raise ValueError("tests of one program should be all 'call' or all 'stdio'")
        with self._ready:
            if self._closing:
                raise JudgeError("the judge is closed")
            self._queue.append(job)
            self._ready.notify()

    def _check(self):
        # grader trouble must be loud: a swallowed error is a wrong reward
        if self.counts["programs"] >= 20 and self.counts["failed programs"] > 0.05 * self.counts["programs"]:
            raise JudgeError(f"{self.counts['failed programs']} of {self.counts['programs']} programs could not be "
                             f"judged; the last error: {self.last_error}")

    # ---- a worker
    def _work(self, worker):
        while True:
            with self._ready:
                while not self._queue and not self._closing:
                    self._ready.wait()
                if self._closing:
                    break
                job = self._queue.popleft()
                self._running += 1
            begin, error = time.monotonic(), None
            verdicts = {}                                     # by index of the test: kept over a retry
            for attempt in range(2):
                try:
                    if self._boxes[worker] is None:
                        self._boxes[worker] = Box(self.level, self.drop, self.memory)
                        self.counts["boxes"] += 1
                    (self._judge_calls if job.tests[0].kind == "call" else self._judge_stdio)(
                        self._boxes[worker], job, verdicts)
                    break
                except Exception as trouble:
                    error = f"{type(trouble).__name__}: {trouble}"
                    if not isinstance(trouble, JudgeError):
                        error += " " + traceback.format_exc(limit=-2).replace("\n", " ")
                    if self._boxes[worker]:
                        self._boxes[worker].close()
                        self._boxes[worker] = None
                    if self._closing:
                        break
                    self.counts["retries"] += attempt == 0
            self._finish(job, verdicts, error, time.monotonic() - begin)
        if self._boxes[worker]:
            self._boxes[worker].close()
        with self._ready:
            rest, self._queue = list(self._queue), collections.deque()
        for job in rest:
            self._finish(job, {}, "the judge was closed", 0.0)

    def _finish(self, job, verdicts, error, seconds):
        job.verdicts = [verdicts.get(i) or Verdict("JE", 0.0, error or "no verdict") for i in range(len(job.tests))]
        with self._lock:
            self.seconds += seconds
            self._running -= error != "the judge was closed"
            self.counts.update(v.status for v in job.verdicts)
            self.counts["programs"] += 1
            self.counts["tests"] += len(job.tests)
            if any(v.status == "JE" for v in job.verdicts):
                self.counts["failed programs"] += 1
                self.last_error = error
        if job.done:
            job.done.set()
        else:
            self._finished.append(job)

    def _order(self, job, verdicts):
        """Indices still to run, easiest level first if levels may stop the run."""
        todo = [i for i in range(len(job.tests)) if i not in verdicts]
        return sorted(todo, key=lambda i: job.tests[i].level) if self.stop_at_failed_level else todo

    def _beyond(self, job, verdicts, i):
        """Why test i need not run: a lower level failed, or too many time-outs. None if it must run."""
        if self.stop_at_failed_level and any(v.status != "AC" and job.tests[k].level < job.tests[i].level
                                             for k, v in verdicts.items()):
            return Verdict("NR", 0.0, "a lower level failed")
        if sum(v.status == "TLE" for v in verdicts.values()) >= self.max_timeouts:
            return Verdict("TLE", 0.0, f"not run: {self.max_timeouts} tests of this program timed out")
        return None

    def _judge_calls(self, box, job, verdicts):
        """All tests in one process; after a crash or a time-out the tests behind it get a new one."""
        limit = self.time_limit * self.scale
        while todo := self._order(job, verdicts):
            if beyond := self._beyond(job, verdicts, todo[0]):
                verdicts[todo[0]] = beyond
                continue
            taken = 0

            def enough(lines, todo=todo):
                nonlocal taken
                for line, i in zip(lines[1 + taken:], todo[taken:], strict=False):
                    if "e" in lines[0] or self._beyond(job, verdicts, i):
                        return True
                    verdicts[i] = self._compare(job.tests[i], line)
                    taken += 1
                return taken == len(todo) or bool(lines and "e" in lines[0])

            cpu_total = math.ceil(limit * len(todo)) + 1
            run = box.execute({"program": job.program, "entry": job.entry, "inputs": [job.tests[i].input for i in todo]},
                              b"", limit, self.wall, self.cap, cpu_total, enough)
            self.counts["processes"] += 1
            for i, seconds in zip(todo[:taken], run.seconds[1:], strict=False):
                verdicts[i] = Verdict(verdicts[i].status, seconds, verdicts[i].detail)
            if run.lines and "e" in run.lines[0]:             # the program itself does not load: true of every test
                verdict = self._compare(None, run.lines[0])
                verdicts.update((i, verdict) for i in todo)
            elif run.end == "enough":
                continue
            elif not run.lines:
                verdict = Verdict(*_swap(how_it_ended(run, cpu_total), run.wall))
                verdicts.update((i, verdict) for i in todo)
            elif taken < len(todo):
                verdicts[todo[taken]] = Verdict(*_swap(how_it_ended(run, cpu_total), run.wall - sum(run.seconds)))

    def _compare(self, test, line):
        if "e" in line:
            return Verdict("MLE" if line["e"].startswith("MemoryError") else "RE", 0.0, line["e"])
        expected = read_json(test.expected)
        if same_value(expected, line["v"]):
            return Verdict("AC", 0.0)
        return Verdict("WA", 0.0, f"f{test.input[:80]} gave {json.dumps(line['v'])[:80]}")

    def _judge_stdio(self, box, job, verdicts):
        """One process a test: the program is run from its first line each time."""
        limit = self.time_limit * self.scale
        for i in self._order(job, verdicts):
            verdicts[i] = self._beyond(job, verdicts, i)
            if verdicts[i]:
                continue
            del verdicts[i]
            run = box.execute({"program": job.program, "entry": ""}, job.tests[i].input.encode(), limit, self.wall,
                              self.cap, math.ceil(limit) + 1, lambda lines: False)
            self.counts["processes"] += 1
            if run.end != "exit" or run.status:
                verdicts[i] = Verdict(*_swap(how_it_ended(run, math.ceil(limit) + 1), run.wall))
            elif same_text(job.tests[i].expected, run.out.decode("utf-8", "replace"), self.tolerance):
                verdicts[i] = Verdict("AC", run.wall)
            else:
                verdicts[i] = Verdict("WA", run.wall, f"printed {run.out[:80]!r}")


def _swap(ended, seconds):
    return ended[0], seconds, ended[1]


def main():
    program = "def f(xs):\n    return sorted(x for x in xs if x % 2 == 0)"
    tests = [Test("call", json.dumps([list(range(i, i + 8))]), json.dumps(sorted(x for x in range(i, i + 8) if x % 2 == 0)))
             for i in range(12)]
    for workers in (1, 2):
        with Judge(workers=workers) as judge:
            judge.run(program, tests)
            begin, n, got = time.perf_counter(), 400, 0
            for i in range(n):
                judge.submit(i, program, tests)
            while got < n:
                got += len(judge.poll())
                time.sleep(0.002)
            seconds = time.perf_counter() - begin
            print(f"{workers} workers: {n / seconds:.0f} programs/s, {12 * n / seconds:.0f} tests/s, {judge.counters()}")


if __name__ == "__main__":
    main()
