"""The judge's side of the sandbox: start a box, put one program into it, read bytes out, end it. And the
levels.

Report, section 3.2 (an online judge; it says nothing about isolation). Levels, strongest first; each is tried
at start-up and then attacked by a program of ours, and counts only if every attack fails:
    A  bubblewrap (own pid, net, ipc, mount, uts namespaces; read-only system) + seccomp + rlimits + unused
    user B  Landlock (read-only system, nothing else) + seccomp + rlimits: an ordinary user, or a default
    container C  rlimits and a process group: macOS, old kernels. For trusted code; the judge refuses it
    unless told otherwise
What is inside a box is in sandbox_server.py.
"""
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass

from configurator import UserError
from data.jsonl import strict_json
from judge import server


class JudgeError(RuntimeError):
    """The judge failed, not the program: a box did not start, died, or broke its protocol."""


# ---------------------------------------------------------------- how a box is started
SYSTEM_PATHS = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store")
BOOT = "import sys; del sys.path[0]; exec(compile(open(sys.argv[1]).read(), 'server.py', 'exec'))"
BWRAP = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
         "--hostname", "box", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL")


def unused_uid() -> int:
    """A user id that no account has; root becomes it."""
    import pwd
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return next(uid for uid in range(64999, 60000, -1) if uid not in taken)


def visible_paths() -> list[str]:
    """All that a program can read: the interpreter, its library, and the system's shared libraries."""
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    library = [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]
    return [path for path in dict.fromkeys((python, *library, *SYSTEM_PATHS)) if os.path.exists(path)]


def box_command(isolation, way, fd, memory) -> list[str]:
    """The argv that starts a box. No secret in it: any process of the machine can read an argv."""
    paths, source = visible_paths(), os.path.realpath(server.__file__)
    cfg = {"isolation": isolation, "way": way, "fd": fd, "memory": memory, "paths": paths,
           "uid": unused_uid() if way == "uid" else None}
    # no site-packages, no .pyc written; not -I, which would ignore PYTHONHASHSEED
    inner = [paths[0], "-S", "-s", "-B", "-X", "utf8", "-c", BOOT,
             "/server.py" if isolation == "A" else source, json.dumps(cfg)]
    if isolation != "A":
        return inner
    argv = [shutil.which("bwrap") or "bwrap", *BWRAP]
    if way == "namespace":    # an ordinary user: a user namespace of our own, in which we are nobody
        argv += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    else:    # root: the server keeps what it needs to turn its children into the unused user
        argv += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    for path in paths:
        parts = path.strip("/").split("/")
        for n in range(1, len(parts)):
            argv += ["--dir", "/" + "/".join(parts[:n])]    # else bwrap copies the mode of /root, 0700
        argv += ["--ro-bind", path, path]
    return [*argv, "--ro-bind", source, "/server.py", "--remount-ro", "/", "--chdir", "/", *inner]


# ---------------------------------------------------------------- one box
@dataclass
class Run:
    """What came out of one process."""
    begun: bool = False    # the walls stood before the program was read: what follows is its own doing
    loaded: bool = False    # call tests: the program has said that it is loaded, or why not
    out: bytes = b""
    err: bytes = b""
    end: str = "exit"    # exit | time | output | enough (the caller had seen all it wanted)
    status: int = 0    # as from waitpid
    cpu: float = 0.0    # processor seconds of the whole process, from its rusage
    wall: float = 0.0    # seconds since the last result line, or since the start


def memory_file(data: bytes):
    """An open, unnamed file that holds `data`, at its beginning."""
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("job"), "w+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)
    file.write(data)
    file.seek(0)
    return file


class Streams:
    """Three pipes of a hostile process, read without waiting; bytes beyond `cap` of each are thrown away."""

    def __init__(self, fds, cap):
        self.cap, self.poll, self.live = cap, select.poll(), {*fds}
        self.data = {fd: bytearray() for fd in fds}
        for fd in fds:
            self.poll.register(fd, select.POLLIN)

    def pump(self, fd) -> bool:
        """Read one block; False if no more is to be had now."""
        try:
            block = os.read(fd, 1 << 16) if fd in self.live else b""
        except BlockingIOError:
            return False
        if not block and fd in self.live:
            self.live.discard(fd)
            self.poll.unregister(fd)
        if len(self.data[fd]) <= self.cap:
            self.data[fd] += block
        return bool(block) and len(self.data[fd]) <= self.cap

    def drain(self):
        while any([self.pump(fd) for fd in self.data]):
            pass

    def overflowed(self) -> bool:
        return max(map(len, self.data.values())) > self.cap


class Box:
    """One sandboxed server. A JudgeError from any method means: throw the box away."""

    def __init__(self, isolation, way, memory):
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(30)
        self.stderr, self.devnull = tempfile.TemporaryFile(), open(os.devnull, "rb")
        self.process = None
        try:
            with theirs:
                # bwrap shows its own environment in /proc/1/environ: an empty one, but for a fixed order of
                # sets
                self.process = subprocess.Popen(
                    box_command(isolation, way, theirs.fileno(), memory), env={"PYTHONHASHSEED": "0"}, cwd="/",
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.stderr,
                    pass_fds=(theirs.fileno(),), start_new_session=True)
            self._receive(b"Z")
        except (OSError, JudgeError) as error:
            self.kill()
            self.stderr.seek(0)
            said = self.stderr.read(4000).decode("utf-8", "replace").strip().split("\n")[-1]
            self.close()
            raise JudgeError(said or str(error)) from None

    def _receive(self, want=b""):
        try:
            data = self.sock.recv(server.MESSAGE.size, socket.MSG_WAITALL)
        except OSError as error:
            raise JudgeError(f"the box does not answer: {error}") from None
        if len(data) < server.MESSAGE.size:
            raise JudgeError("the box has gone")
        kind, number, seconds = server.MESSAGE.unpack(data)
        if want and kind != want:
            raise JudgeError(f"the box said {kind!r} where {want!r} was due")
        return kind, number, seconds

    def _send(self, operation, number=0, fds=()):
        try:
            socket.send_fds(self.sock, [server.MESSAGE.pack(operation, number, 0.0)], list(fds))
        except OSError as error:
            raise JudgeError(f"the box does not listen: {error}") from None

    def kill(self):
        """At once, from any thread: whoever waits for this box gets a JudgeError."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def close(self):
        """Close the line; the server then ends its child and itself. Make sure of it."""
        self.sock.close()
        if self.process:
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.stderr.close()
        self.devnull.close()

    def execute(self, job, stdin, limit, wall, cap, cpu_total, on_line) -> Run:
        """Run one program in a fresh process and collect what it says.

        job: {"program", "entry", "inputs"}; stdin: bytes; limit processor seconds and limit * wall wall-clock
        seconds per result line (of the process, if it writes none); cap: bytes per stream; cpu_total: whole
        processor seconds of the process, kept by the kernel; on_line(i, line, seconds) -> True ends the
        process.
        """
        opened = []
        try:
            for _ in range(3):    # stdout, stderr, results
                opened += os.pipe()
            ours, theirs = opened[0::2], opened[1::2]
            with (memory_file(json.dumps(job).encode()) as job_file,
                  memory_file(stdin) if stdin else nullcontext(self.devnull) as source):
                self._send(b"R", cpu_total, [source.fileno(), *theirs, job_file.fileno()])
            for fd in theirs:
                os.close(fd)
                opened.remove(fd)
            for fd in ours:
                os.set_blocking(fd, False)
            return self._collect(Streams(ours, cap), limit, wall, on_line)
        finally:
            for fd in opened:
                os.close(fd)

    def _collect(self, streams, limit, wall, on_line):
        run, at, reported, count = Run(), 0, 0.0, -3    # count: -2 the walls stand, -1 loaded, 0.. the tests
        out, err, results = streams.data.values()
        streams.poll.register(self.sock.fileno(), select.POLLIN)
        last = now = time.monotonic()
        # at `soft` the server is asked for the processor time, at `hard` the process is ended in any case
        soft, hard, killed = last + limit, last + limit * wall, 0.0
        asked = over = False
        while not over:
            until = killed + 10 if killed else hard if asked else min(soft, hard)
            for fd, _ in streams.poll.poll(max(0, until - now) * 1000 + 1):
                if fd != self.sock.fileno():
                    streams.pump(fd)
                    continue
                kind, number, seconds = self._receive()
                if kind == b"E":
                    over, run.status, run.cpu = True, number, seconds
                else:
                    # the answer to "C": has this test used up its processor time, or was it kept waiting?
                    # `reported` is what the program claims for earlier tests: a lie buys it time up to
                    # `hard`, nothing else
                    used, asked = max(0.0, seconds - reported) if seconds >= 0 else limit, False
                    soft, hard = now + max(0.01, limit - used), 0.0 if used >= 0.97 * limit else hard
            now = time.monotonic()
            if over:
                streams.drain()    # nothing can write any more: take what is left
            stop = False
            while (newline := results.find(b"\n", at)) >= 0 and not (stop or killed):
                raw, at, count = bytes(results[at:newline]), newline + 1, count + 1
                run.begun, run.loaded = True, count >= -1
                if count >= -1:
                    line, claim = read_line(raw, count)
                    reported = max(reported, claim)
                    stop = on_line(count, line, now - last)
                    last, soft, hard = now, now + limit, now + limit * wall
            if killed:
                if now > killed + 10 and not over:
                    raise JudgeError("a killed program did not end")
                continue
            run.end = ("enough" if stop else "output" if streams.overflowed() else
                       "time" if now >= hard else "exit")
            if run.end != "exit" and not over:
                killed = now
                self._send(b"K")
            elif now >= soft and not asked and not over:
                asked = True
                self._send(b"C")
        run.out, run.err, run.wall = bytes(out), bytes(err), now - last
        if not run.begun:
            raise JudgeError(run.err[:300].decode("utf-8", "replace") or "no sign of life")
        return run


def read_line(raw, index):
    """({"v": value} or {"e": error}, processor seconds it claims) of one result line of a hostile process."""
    try:
        line = strict_json(raw)
        claim = line["c"]
        if line["i"] != index or not ("v" in line or "e" in line or index < 0):
            raise ValueError
        if type(claim) is not float or not 0 <= claim < 1e6:
            raise ValueError
        return ({"e": str(line["e"])[:300]} if "e" in line else {"v": line.get("v")}), claim
    except (ValueError, AttributeError, KeyError, TypeError):
        return {"e": "the result is not readable"}, 0.0


# ---------------------------------------------------------------- levels: found by trying
# Tries what no program may do, and returns the list of what worked. The first imports must work: one of the
# library's Python files and one of its machine code.
PROBE = """
import colorsys, os
import mmap
def f(secret, project, uid):
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
REFERENCE_SECONDS = 1.5e-3    # CALIBRATION on an idle 2023 server core: time limits count in its seconds
LABEL = {"A": "bubblewrap + seccomp + rlimits", "B": "Landlock + seccomp + rlimits",
         "C": "rlimits only, for trusted code"}


def ask(box, program, arguments):
    """The value one of our own programs returns in a box. JudgeError if it returns none."""
    answer = []

    def on_line(i, line, seconds):
        answer.append(line)
        return i == 0
    job = {"program": program, "entry": "f", "inputs": [json.dumps(arguments)]}
    run = box.execute(job, b"", 20, 3, 1 << 16, 60, on_line)
    if run.end != "enough" or "v" not in answer[-1]:
        raise JudgeError(f"the probe gave no answer: {answer} {run.err[:200]!r} {run.end} {run.status}")
    return answer[-1]["v"]


def attack(box, way):
    """Run PROBE; JudgeError names the holes."""
    with tempfile.NamedTemporaryFile() as secret:
        os.chmod(secret.name, 0o644)
        project = os.path.dirname(os.path.realpath(__file__))
        if holes := ask(box, PROBE, [secret.name, project, unused_uid() if way == "uid" else 0]):
            raise JudgeError(f"not tight: {', '.join(holes)}")


def open_isolation(isolation, memory) -> tuple[str, float]:
    """Start a box of this isolation and attack it. -> (the way it gives up power, time scale of this machine >=
    1).

    JudgeError with the reasons if no way of this isolation holds here.
    """
    if isolation != "C" and (sys.platform != "linux" or platform.machine() not in server.AUDIT_ARCH):
        raise JudgeError(f"needs Linux on {' or '.join(server.AUDIT_ARCH)}")
    root, reasons = os.geteuid() == 0, []
    ways = {"A": ("uid", "namespace") if root else ("namespace",),
            "B": ("uid", "capabilities") if root else ("nothing",), "C": ("nothing",)}[isolation]
    for way in ways:
        box = None
        try:
            box = Box(isolation, way, memory)
            if isolation != "C":
                attack(box, way)
            return way, max(1.0, min(10.0, ask(box, CALIBRATION, []) / REFERENCE_SECONDS))
        except JudgeError as error:
            reasons.append(f"{way}: {error}")
        finally:
            if box:
                box.close()
    raise JudgeError("; ".join(reasons))


def choose_isolation(isolation, memory, allow_unsafe) -> tuple[str, str, float]:
    """(isolation, way, time scale): the strongest isolation that holds here, or the one asked for. UserError without any."""
    if isolation not in ("auto", "A", "B", "C"):
        raise ValueError(f"isolation {isolation!r}: should be 'auto', 'A', 'B' or 'C'")
    reasons = []
    for candidate in "ABC" if isolation == "auto" else isolation:
        if candidate == "C" and not allow_unsafe:
            reasons.append("C: refused, rlimits do not confine untrusted code (allow_unsafe=True insists)")
            continue
        try:
            return candidate, *open_isolation(candidate, memory)
        except JudgeError as error:
            reasons.append(f"{candidate}: {error}")
    raise UserError("no sandbox on this machine. " + " | ".join(reasons))
