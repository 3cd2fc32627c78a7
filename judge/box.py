"""
The judge's side of the sandbox: start a box, put one program into it, read bytes out, end it; and choose the isolation.

Report, section 3.2 (an online judge; it says nothing about isolation). Three kinds of isolation, strongest first. Each
is tried at start-up, then attacked by a program of ours (PROBE), and counts only if every attack fails:

    A   bubblewrap + seccomp + rlimits   own pid, network, ipc, mount and host namespaces; only the interpreter and its
                                         libraries can be read; an unused user. Needs bwrap, and a kernel that lets it
    B   Landlock + seccomp + rlimits     only the interpreter and its libraries can be read. For ordinary users and for
                                         containers with default settings
    C   rlimits + process group          macOS, old kernels. For trusted code: refused unless allow_unsafe=True

What runs inside a box is in judge/server.py.
"""
import contextlib
import importlib.util
import json
import marshal
import os
import platform
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from configurator import UserError
from data.jsonl import STRICT
from judge import server

PATIENCE = 64                 # reads of one program's streams before the judge begins to wait between them [ours]


class JudgeError(RuntimeError):
    """The judge failed while it ran, not the program: a box did not start, died, or broke its protocol."""


# ---- how a box is started -------------------------------------------------------------------------------------------

PACKAGES = "numpy", "sortedcontainers"          # what programs may import beside the standard library, where installed
SYSTEM_PATHS = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store")
BOOT = "import sys; del sys.path[0]; exec(compile(open(sys.argv[1]).read(), 'server.py', 'exec'))"
BWRAP = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
         "--hostname", "box", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL")


def unused_uid() -> int:
    """
    A user id that no account has. A box that root starts runs its programs as this user. Each box takes another one:
    the limit on threads counts all processes of a user.
    """
    import pwd
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return random.SystemRandom().choice([uid for uid in range(60000, 65000) if uid not in taken])


def threads_now() -> int:
    """Threads and processes that this user has on the machine, as far as /proc shows them."""
    total = 0
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            total += len(os.listdir(f"/proc/{name}/task")) if os.stat(f"/proc/{name}").st_uid == os.getuid() else 0
        except OSError:                   # it has just ended
            pass
    return total


def visible_paths(isolation: str) -> tuple[dict[str, str], dict[str, str]]:
    """
    All that a program can read: the interpreter, its library, the system's shared libraries, /dev/null, and PACKAGES
    where installed. -> {path: the same path inside the box}, {package: its folder inside}. With isolation A packages
    are found in /packages, since their own path may lead through the project's folder.
    """
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    library = [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]
    paths = {path: path for path in (python, *library, *SYSTEM_PATHS, os.devnull)}
    packages = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            folder = os.path.dirname(spec.origin)
            packages[name] = f"/packages/{name}" if isolation == "A" else folder
            paths |= {folder: packages[name], folder + ".libs": packages[name] + ".libs"}    # wheels: shared libraries
    return {path: inside for path, inside in paths.items() if os.path.exists(path)}, packages


def box_command(isolation: str, drop_by: str, fds: tuple[int, ...]) -> list[str]:
    """
    The argv that starts a box. Nothing secret is in it: any process of the machine can read an argv. drop_by: see
    open_isolation; fds: the server's ends of its sockets.
    """
    (paths, packages), source = visible_paths(isolation), os.path.realpath(server.__file__)
    # programs of a box that runs as the user of the judge are counted together with all that this user runs
    own_user = drop_by in ("uid", "capabilities", "namespace")
    cfg = {"isolation": isolation, "drop_by": drop_by, "fds": fds, "paths": [*paths], "packages": packages,
           "uid": unused_uid() if drop_by in ("uid", "capabilities") else None,
           "threads": server.THREADS if own_user else threads_now() + 8 * server.THREADS}
    # no site-packages, no .pyc written; not -I, which would ignore PYTHONHASHSEED
    inner = [next(iter(paths)), "-S", "-s", "-B", "-X", "utf8", "-c", BOOT,
             "/server.py" if isolation == "A" else source, json.dumps(cfg)]
    if isolation != "A":
        return inner
    argv = [shutil.which("bwrap") or "bwrap", *BWRAP]
    if drop_by == "namespace":        # an ordinary user: a user namespace of our own, in which we are nobody
        argv += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    else:                             # root: the server keeps what it needs to turn its children into the unused user
        argv += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    for path, inside in paths.items():
        parts = inside.strip("/").split("/")
        for n in range(1, len(parts)):
            argv += ["--dir", "/" + "/".join(parts[:n])]      # otherwise bwrap copies the mode of /root, 0700
        argv += ["--dev-bind" if path == os.devnull else "--ro-bind", path, inside]
    return [*argv, "--ro-bind", source, "/server.py", "--remount-ro", "/", "--chdir", "/", *inner]


# ---- one box --------------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What came out of one process."""
    confined: bool = False    # limits and filter stood before it read the program: what follows is its own doing
    loaded: bool = False      # call tests: the program has reported that it is loaded, or why it could not be
    out: bytes = b""
    err: bytes = b""
    end: str = "exit"         # exit | time | output (over a limit) | stopped (on_line returned True)
    status: int = 0           # as waitpid gives it
    cpu: float = 0.0          # processor seconds of the whole program, from the kernel
    wall: float = 0.0         # seconds by the clock since the last result line, or since the start


@dataclass(frozen=True)
class Bounds:
    """The limits of one process."""
    cpu: float                # processor seconds per result line, or of the process if it writes none or is live
    wall: float               # the same by the clock
    cpu_total: float          # processor seconds of the process, kept by the kernel
    memory: int               # bytes of address space
    output: int               # bytes per stream


def memory_file(data: bytes) -> BinaryIO:
    """An open, unnamed file that holds `data`, at its beginning."""
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("job"), "w+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)
    file.write(data)
    file.seek(0)
    return file


@dataclass
class Streams:
    """The pipes of a hostile process, read without waiting. What is beyond max_output bytes of one is thrown away."""
    data: dict[int, bytearray]    # file descriptor -> what was read of it
    live: set[int]                # those into which somebody can still write
    poll: select.poll
    max_output: int

    def read(self, fd: int) -> bool:
        """Take one block of a live pipe. -> False if there is no more now, or if more than max_output bytes came."""
        try:
            block = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        if not block:
            self.live.discard(fd)
            self.poll.unregister(fd)
        if len(self.data[fd]) <= self.max_output:
            self.data[fd] += block
        return bool(block) and len(self.data[fd]) <= self.max_output


class Box:
    """
    One sandboxed server. isolation: "A", "B" or "C"; drop_by: see open_isolation. JudgeError from any method means:
    throw the box away.
    """

    def __init__(self, isolation: str, drop_by: str):
        self.isolation = isolation
        self.sock, theirs = socket.socketpair()
        (odd, their_odd), (even, their_even) = (socket.socketpair(type=socket.SOCK_DGRAM) for _ in range(2))
        self.jobs = [odd, even]                # the next child waits at the first
        self.sock.settimeout(30)
        self.stderr, self.process = tempfile.TemporaryFile(), None
        closed, stdout = os.pipe()
        try:
            with theirs, their_odd, their_even, memory_file(b"") as stdin:
                fds = theirs.fileno(), their_odd.fileno(), their_even.fileno()
                # a program gets the streams that its interpreter made here, so they are of the kind it will have: a
                # file and a pipe. bwrap shows its environment in /proc/1/environ: it has but a fixed order of sets,
                # and all symbols looked up at the start: each test would copy fifty pages of memory to do so
                self.process = subprocess.Popen(
                    box_command(isolation, drop_by, fds), env={"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"}, cwd="/",
                    stdin=stdin, stdout=stdout, stderr=self.stderr, pass_fds=fds, start_new_session=True)
            kind, _, _ = self._receive()
            if kind != b"Z":
                raise JudgeError(f"the box sent {kind!r} where b'Z' was due")
        except (OSError, JudgeError) as error:
            self.kill()
            self.stderr.seek(0)
            last_line = self.stderr.read(4000).decode("utf-8", "replace").strip().split("\n")[-1]
            self.close()
            raise JudgeError(last_line or str(error)) from None
        finally:
            os.close(closed)
            os.close(stdout)

    def _receive(self) -> tuple[bytes, int, float]:
        """The next message of the server: (kind, integer, seconds)."""
        try:
            data = self.sock.recv(server.MESSAGE.size, socket.MSG_WAITALL)
        except OSError as error:
            raise JudgeError(f"the box does not answer: {error}") from None
        if len(data) < server.MESSAGE.size:
            raise JudgeError("the box has gone")
        return server.MESSAGE.unpack(data)

    def _send(self, kind: bytes, number: int = 0, seconds: float = 0.0, fds: Iterable[int] = ()) -> None:
        """A message to the server; with `fds` also one to the child that waits, which takes them and the numbers."""
        try:
            message = server.MESSAGE.pack(kind, number, seconds)
            if fds:
                socket.send_fds(self.jobs[0], [message], list(fds))
                self.jobs.reverse()
            self.sock.sendall(message)
        except OSError as error:
            raise JudgeError(f"the box does not listen: {error}") from None

    def kill(self) -> None:
        """End the server at once, from any thread: whoever waits for this box gets a JudgeError."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Close the socket, at which the server ends its child and itself; after a second, kill both."""
        self.sock.close()
        for jobs in self.jobs:
            jobs.close()
        if self.process:
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.stderr.close()

    @contextlib.contextmanager
    def _process(self, kind: bytes, job: dict, limits: Bounds,
                 stdin: BinaryIO) -> Iterator[tuple[list[int], int | None]]:
        """
        Give the job and stdin to the child that waits. -> where to read its stdout, stderr and results, and where to
        write more for it (None if job["live"] is not set).
        """
        fds, files = [], [stdin, memory_file(marshal.dumps(job))]
        try:
            for _ in range(3):        # stdout, stderr, results
                fds += os.pipe()
            ours, theirs = fds[0::2], fds[1::2]
            line = None
            if job["live"]:
                read_end, line = os.pipe()
                fds += read_end, line
                widen(line)
                os.set_blocking(line, False)
            more = [read_end] if job["live"] else []
            self._send(kind, limits.memory, limits.cpu_total, [stdin.fileno(), *theirs, files[1].fileno(), *more])
            for fd in (*theirs, *more):
                os.close(fd)
                fds.remove(fd)
            for fd in ours:
                os.set_blocking(fd, False)
            yield ours, line
        finally:
            for fd in fds:
                os.close(fd)
            for file in files:
                file.close()

    def execute(self, job: dict, limits: Bounds, on_line: Callable[[int, dict, float], bool | bytes]) -> Run:
        """
        Run one program's function in a fresh process and collect what it writes.

        job: kind "call" or "check" (see run_calls and run_check in server.py), program, entry, calls, and live: the
        process waits for the bytes that on_line returns.

        on_line(k, {"v": value} or {"e": error}, seconds) is called for every result line, with k = -1
        (loaded), 0, 1 ...; it returns True to end the process. JudgeError if the box fails.
        """
        job = {"entry": "", "calls": [], "live": False} | job
        with self._process(b"R", job, limits, memory_file(b"")) as (ours, line):
            return self._collect(ours, line, limits, on_line)

    def run_tests(self, program: str, limits: Bounds, tests: Iterable[tuple[bytes, Bounds]]) -> Iterator[Run]:
        """
        Run a whole program once for every (stdin, limits) of `tests`, each in a process of its own, and yield what came
        out. Ends before `tests` does where the process that forks them ended with the last Run: ask again for the rest.
        limits: of that process. JudgeError if the box fails.
        """
        stdin = memory_file(b"")
        job = {"kind": "stdio", "program": program, "live": True}
        with self._process(b"S", job, limits, stdin) as (ours, line):
            streams = self._streams(ours, limits)
            for given, bounds in tests:
                stdin.seek(0)
                stdin.truncate()
                stdin.write(given)
                stdin.seek(0)
                put(line, server.START.pack(bounds.cpu, bounds.wall))
                run, alive = self._collect_test(streams, bounds)
                yield run
                if not alive:
                    return
                if self.isolation == "C":                 # what a test has forked there is ended with its parent only
                    break
            self._send(b"K")
            while self._receive()[0] != b"E":
                pass

    def _streams(self, fds: list[int], limits: Bounds) -> Streams:
        """The three pipes of a process, and this box's socket in their poll."""
        streams = Streams({fd: bytearray() for fd in fds}, {*fds}, select.poll(), limits.output)
        for fd in (*fds, self.sock.fileno()):
            streams.poll.register(fd, select.POLLIN)
        return streams

    def _poll(self, streams: Streams, seconds: float) -> tuple[list[tuple[bytes, int, float]], int]:
        """Wait at most so long and read what there is. -> (the server's messages, how many streams had something)."""
        ready = [fd for fd, _ in streams.poll.poll(max(0, seconds) * 1000 + 1)]
        ours = [fd for fd in ready if fd != self.sock.fileno()]
        for fd in ours:
            streams.read(fd)
        return [self._receive()] if len(ready) > len(ours) else [], len(ours)

    def _collect_test(self, streams: Streams, limits: Bounds) -> tuple[Run, bool]:
        """
        Read stdout and stderr of the test of a whole program that has just started, until it has ended. -> also whether
        the process that forked it may start another: not after too much output, or where that process itself failed.
        """
        out, err, results = streams.data.values()
        run, alive, killed, wakeups, begin = Run(), True, False, 0, time.monotonic()
        out.clear(), err.clear()
        until = begin + limits.wall + 10                      # the process keeps the limits; this is for its own end
        due = len(server.CONFINED) + server.ENDED.size
        while alive and (killed or len(results) < due):
            messages, reads = self._poll(streams, until - time.monotonic())
            wakeups += reads
            for kind, number, seconds in messages:
                if kind == b"E":
                    alive, run.status, run.cpu = False, number, seconds
            full, late = max(len(out), len(err)) > limits.output, time.monotonic() >= until
            if killed and late:
                raise JudgeError("a killed program did not end")
            if (full or late) and not killed:
                killed, until, run.end = True, time.monotonic() + 10, "output" if full else "time"
                self._send(b"K")
            elif wakeups > PATIENCE:                          # many small writes: let them gather
                time.sleep(0.004)
        while any([streams.read(fd) for fd in [*streams.live]]):
            pass                                              # nobody can write any more: take what is left
        if not results.startswith(server.CONFINED) or len(results) > due:
            raise JudgeError(err[:300].decode("utf-8", "replace") or "no sign of life")
        if len(results) == due and not killed:
            run.status, late, run.cpu = server.ENDED.unpack(results[len(server.CONFINED):])
            run.end = "time" if late else run.end
        del results[len(server.CONFINED):]
        if max(len(out), len(err)) > limits.output:
            run.end = "output"
        run.confined, run.out, run.err, run.wall = True, bytes(out), bytes(err), time.monotonic() - begin
        return run, alive

    def _collect(self, fds: list[int], line: int | None, limits: Bounds, on_line: Callable) -> Run:
        """
        Read stdout, stderr and results (fds) of a hostile process until it has ended; execute() says the rest. line:
        where to write what on_line returns.
        """
        run, streams = Run(), self._streams(fds, limits)
        out, err, results = streams.data.values()
        k, at, wakeups = -3, 0, 0                         # last line: -2 confined, -1 loaded, 0.. tests; where it ended
        last = now = sampled_at = time.monotonic()
        ask_at, end_at = last + limits.cpu, last + limits.wall # ask for the processor time; end the process anyway
        # processor seconds: of the program at sampled_at; when the running test began; whether the answer is due, and
        # whether it counts for the test that had just begun
        sampled = begun = 0.0
        asked = for_begin = False
        killed_at, ended = 0.0, False
        while not ended:
            until = killed_at + 10 if killed_at else end_at if asked else min(ask_at, end_at)
            messages, reads = self._poll(streams, until - now)
            wakeups += reads
            for kind, number, seconds in messages:
                if kind == b"E":
                    ended, run.status, run.cpu = True, number, seconds
                    continue
                now = sampled_at = time.monotonic()       # "C": processor time so far, as the kernel counts it
                sampled, asked = seconds if seconds >= 0 else begun + limits.cpu, False
                if for_begin:
                    begun, for_begin = sampled, False
                used = sampled - begun                    # was the test kept waiting, or has it used up its time?
                ask_at, end_at = now + max(0.01, limits.cpu - used), 0.0 if used >= 0.97 * limits.cpu else end_at
            now = time.monotonic()
            if ended:                                     # nobody can write any more: take what is left
                while any([streams.read(fd) for fd in [*streams.live]]):
                    pass
            elif wakeups > PATIENCE:                      # many small writes: let them gather, they must not cost us
                time.sleep(0.004)
            stop = False
            while (newline := results.find(b"\n", at)) >= 0 and not (stop or killed_at):
                raw, at, k = bytes(results[at:newline]), newline + 1, k + 1
                run.confined, run.loaded = True, k >= -1
                if run.loaded:
                    answer = on_line(k, read_line(raw, k), now - last)
                    stop = answer is True
                    if line is not None:                  # all calls together are one test; ours is not its time
                        spent, now = time.monotonic() - now, time.monotonic()
                        ask_at, end_at, last = ask_at + spent, end_at + spent, last + spent
                        stop = stop or not put(line, answer or b"")
                        continue
                    # what the tests before have used is estimated from above, as if none of them had waited, and
                    # measured where that estimate could be worth more than a fiftieth of the limit
                    last, ask_at, end_at, begun = now, now + limits.cpu, now + limits.wall, sampled + now - sampled_at
                    if now - sampled_at > 0.02 * limits.cpu and not asked and not ended:
                        asked = for_begin = True
                        self._send(b"C")
            if killed_at:
                if now > killed_at + 10 and not ended:
                    raise JudgeError("a killed program did not end")
                continue
            full = max(map(len, streams.data.values())) > limits.output
            run.end = "stopped" if stop else "output" if full else "time" if now >= end_at else "exit"
            if run.end != "exit" and not ended:
                killed_at = now
                self._send(b"K")
            elif now >= ask_at and not asked and not ended:
                asked = True
                self._send(b"C")
        run.out, run.err, run.wall = bytes(out), bytes(err), now - last
        if not run.confined:
            raise JudgeError(run.err[:300].decode("utf-8", "replace") or "no sign of life")
        return run


def widen(fd: int) -> None:
    """Make a pipe as large as an ordinary user may: what is written into it is not waited for."""
    try:
        import fcntl
        fcntl.fcntl(fd, 1031, 1 << 20)                    # F_SETPIPE_SZ
    except (ImportError, OSError):
        pass


def put(fd: int, data: bytes) -> bool:
    """Write all of `data` into a pipe without waiting. -> False if it does not fit or nobody reads."""
    try:
        return os.write(fd, data) == len(data) if data else True
    except OSError:
        return False


def read_line(raw: bytes, k: int) -> dict:
    """
    One result line of a hostile process, of which k is due -> {"v": value} or {"e": error}. A line that is anything
    else is an error too. The value is JSON as server.encode() writes it.
    """
    try:
        line = STRICT.decode(raw.decode("utf-8"))
        if line["i"] != k or not ("v" in line or "e" in line or k < 0):
            raise ValueError
        return {"e": str(line["e"])[:300]} if "e" in line else {"v": line.get("v")}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {"e": "the result is not readable"}


# ---- isolation: found by trying -------------------------------------------------------------------------------------

# Tries what no program may do, and returns the list of what worked. The first imports have to work: one Python file and
# one file of machine code of the library.
PROBE = """
import colorsys, os, time
import mmap
def f(secret, project, root):
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
    attempt("list the project", lambda: os.listdir(project))
    attempt("write a file", lambda: open("/tmp/judge_probe", "w").write("x"))
    attempt("network", network)
    attempt("fork", fork)
    attempt("run a command", lambda: os.execv("/bin/true", ["true"]))
    attempt("signal the server", lambda: os.kill(os.getppid(), 0))
    attempt("signal everybody", lambda: os.kill(-1, 0))
    attempt("become root", lambda: os.setuid(0))
    attempt("see processes", lambda: open("/proc/self/status").read())
    for fd in range(4, 4096):
        attempt("descriptor %d" % fd, lambda: os.fstat(fd))
        attempt("write to descriptor %d" % fd, lambda: os.write(fd, b"x" * 17))
    attempt("clock of another process", lambda: time.clock_gettime((~os.getppid() << 3) | 2))
    if root and os.getuid() < 60000:
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
REFERENCE_SECONDS = 1.5e-3    # CALIBRATION on an idle server core of 2023: time limits are in seconds of that machine
LABEL = {"A": "bubblewrap + seccomp + rlimits", "B": "Landlock + seccomp + rlimits",
         "C": "rlimits only, for trusted code"}


def call_in_box(box: Box, program: str, arguments: list) -> object:
    """What f(*arguments) of one of our own programs returns in a box. JudgeError if it returns nothing."""
    answers = []

    def on_line(k: int, line: dict, seconds: float) -> bool:
        answers.append(line)
        return k == 0

    job = {"kind": "call", "program": program, "entry": "f", "calls": [["json", json.dumps(arguments)]]}
    run = box.execute(job, Bounds(cpu=20, wall=60, cpu_total=60, memory=512 << 20, output=1 << 16), on_line)
    if run.end != "stopped" or "v" not in answers[-1]:
        raise JudgeError(f"the probe gave no answer: {answers} {run.err[:200]!r} {run.end} {run.status}")
    return answers[-1]["v"]


def attack(box: Box, drop_by: str) -> None:
    """Run PROBE in the box. JudgeError names the holes."""
    with tempfile.NamedTemporaryFile() as secret:
        os.chmod(secret.name, 0o644)
        project = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
        if holes := call_in_box(box, PROBE, [secret.name, project, drop_by in ("uid", "capabilities")]):
            raise JudgeError(f"not tight: {', '.join(holes)}")


def open_isolation(isolation: str) -> tuple[str, float]:
    """
    Start a box of this isolation ("A", "B", "C") and attack it. -> (drop_by, time scale of this machine, 1 to 10). The
    box is started while this process has a hundred descriptors open: a program must not have any of them.

    drop_by: how a program's process loses the rights of the user who started the judge, by what that user may do:
        uid            root: it becomes an unused user (A: each child; B: the server)
        capabilities   root whose interpreter an unused user could not read: the same, but it may read (B)
        namespace      an ordinary user: it is nobody in a user namespace of its own (A)
        nothing        an ordinary user, who has no rights to lose (B); isolation C
    JudgeError with the reasons if this isolation does not hold here.
    """
    if isolation != "C" and (sys.platform != "linux" or platform.machine() not in server.AUDIT_ARCH):
        raise JudgeError(f"needs Linux on {' or '.join(server.AUDIT_ARCH)}")
    root, reasons = os.geteuid() == 0, []
    ways = {"A": ("uid", "namespace") if root else ("namespace",),
            "B": ("uid", "capabilities") if root else ("nothing",), "C": ("nothing",)}[isolation]
    for drop_by in ways:
        box, held = None, []
        try:
            try:
                held += [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]
            except OSError:                   # fewer are allowed here
                pass
            box = Box(isolation, drop_by)
            if isolation != "C":
                attack(box, drop_by)
            return drop_by, max(1.0, min(10.0, call_in_box(box, CALIBRATION, []) / REFERENCE_SECONDS))
        except JudgeError as error:
            reasons.append(f"{drop_by}: {error}")
        finally:
            for fd in held:
                os.close(fd)
            if box:
                box.close()
    raise JudgeError("; ".join(reasons))


def choose_isolation(isolation: str, allow_unsafe: bool) -> tuple[str, str, float]:
    """
    The strongest isolation that holds here ("auto"), or the one that is named. -> (isolation, drop_by, time scale).
    UserError with the reasons if there is none; ValueError for another name.
    """
    if isolation not in ("auto", "A", "B", "C"):
        raise ValueError(f"isolation {isolation!r}: should be 'auto', 'A', 'B' or 'C'")
    reasons = []
    for candidate in "ABC" if isolation == "auto" else isolation:
        if candidate == "C" and not allow_unsafe:
            reasons.append("C: refused, rlimits do not confine untrusted code (allow_unsafe=True insists)")
            continue
        try:
            return candidate, *open_isolation(candidate)
        except JudgeError as error:
            reasons.append(f"{candidate}: {error}")
    raise UserError("no sandbox on this machine. " + " | ".join(reasons))
