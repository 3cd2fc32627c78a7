"""The judge: verdicts, isolation, attacks that must be contained, reward hacks that must not be paid."""

import json
import os
import sys
import tempfile
import threading
import time
from collections import deque
from decimal import Decimal
from fractions import Fraction

import pytest

from configurator import UserError
from data.problems import Test
from judge import STATUSES, Judge, Verdict, same_text, same_value, server
from judge.box import Box, JudgeError

if os.name != "posix":
    pytest.skip("the judge needs a POSIX system", allow_module_level=True)


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(server.__file__)))


def call(arguments, expected):
    return Test("call", json.dumps(arguments), json.dumps(expected))


def stdio(given, expected):
    return Test("stdio", given, expected)


SQUARES = [call([n], n * n) for n in (1, 2, 3, 4)]
GOOD = "def f(n):\n    return n * n"


def statuses(verdicts):
    return " ".join(v.status for v in verdicts)


def open_judge(isolation, **kw):
    kw = {"workers": 1, "time_limit": 0.25, "wall_factor": 8, "allow_unsafe": isolation == "C", "quiet": True, **kw}
    try:
        return Judge(isolation=isolation, **kw)
    except UserError as error:
        pytest.skip(f"isolation {isolation} does not hold on this machine: {error}")


@pytest.fixture(scope="module", params=["A", "B", "C"])
def judge(request):
    """Each isolation: verdicts are the same in all."""
    with open_judge(request.param) as judge:
        yield judge


@pytest.fixture(scope="module", params=["A", "B"])
def strict_judge(request):
    """Isolation for untrusted code."""
    with open_judge(request.param) as judge:
        yield judge


@pytest.fixture(scope="module")
def best_judge():
    """The strongest isolation of this machine; C only where nothing else is (macOS)."""
    with Judge(workers=1, time_limit=0.25, wall_factor=8, allow_unsafe=True, quiet=True) as judge:
        yield judge


# ---- verdicts -------------------------------------------------------------------------------------------------------

VERDICTS = {
    "right": (GOOD, "AC AC AC AC"),
    "wrong": ("def f(n):\n    return n", "AC WA WA WA"),
    "type": ("def f(n):\n    return True if n == 1 else float(n * n)", "WA AC AC AC"),
    "raises": ("def f(n):\n    return n * n if n != 2 else [][0]", "AC RE AC AC"),
    "syntax": ("def f(n) return n", "RE RE RE RE"),
    "no entry": ("def g(n):\n    return n", "RE RE RE RE"),
    "null byte": ("def f(n):\n    return n\0", "RE RE RE RE"),
    "surrogate": ("x = '\ud800'\ndef f(n):\n    return n * n", "RE RE RE RE"),
    "exit in a test": ("import sys\ndef f(n):\n    n == 2 and sys.exit(0)\n    return n * n", "AC RE AC AC"),
    "dies in a test": ("import os\ndef f(n):\n    n == 3 and os._exit(0)\n    return n * n", "AC AC RE AC"),
    "loops in a test": ("def f(n):\n    while n == 2: pass\n    return n * n", "AC TLE AC AC"),
    "loops at load": ("while True: pass", "TLE TLE TLE TLE"),
    "dies at load": ("import os\nos._exit(0)", "RE RE RE RE"),
    "memory": ("def f(n):\n    return n * n if n != 4 else len(bytearray(2 << 30))", "AC AC AC MLE"),
    "floods stdout": ("def f(n):\n    while n == 1: print('x' * 9999)\n    return n * n", "OLE AC AC AC"),
    "prints a little": ("def f(n):\n    print('debug', n)\n    return n * n", "AC AC AC AC"),
    "no value": ("def f(n):\n    return {1, 2} if n == 1 else (lambda: 0) if n == 2 else n * n", "WA RE AC AC"),
    "crashes": ("import ctypes\ndef f(n):\n    return ctypes.string_at(0) if n == 2 else n * n", "AC RE AC AC"),
}


def check_verdicts(judge, name):
    program, expected = VERDICTS[name]
    if name == "memory" and judge.isolation == "C" and sys.platform == "darwin":
        pytest.skip("macOS keeps no RLIMIT_AS")
    assert statuses(judge.run(program, SQUARES)) == expected


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(best_judge, name):
    check_verdicts(best_judge, name)


ONE_OF_EACH = ("wrong", "raises", "loops in a test", "memory", "floods stdout")     # WA, RE, TLE, MLE, OLE beside AC


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ONE_OF_EACH else pytest.mark.slow)
                                  for n in VERDICTS])
def test_verdicts_are_the_same_in_every_isolation(judge, name):
    check_verdicts(judge, name)


STDIO = {
    "right": ("print(int(input()) ** 2)", "AC AC"),
    "trailing blanks": ("print(int(input()) ** 2, ' ')\nprint()", "AC AC"),
    "wrong": ("print(9)", "AC WA"),
    "silent": ("pass", "WA WA"),
    "prefix of the answer": ("print(str(int(input()) ** 2)[:1])", "AC WA"),
    "closed stdout": ("import sys, os\nos.close(1)\nsys.exit(0)", "WA WA"),
    "exit(0) after the answer": ("print(int(input()) ** 2)\nexit()", "AC AC"),
    "exit(3) after the answer": ("print(int(input()) ** 2)\nexit(3)", "RE RE"),
    "os._exit(0)": ("import os\nos._exit(0)", "WA WA"),
    "at exit": ("import atexit\nn = int(input())\natexit.register(lambda: print(n * n))", "AC AC"),
    "thread": ("import threading\nthreading.Thread(target=lambda: print(int(input()) ** 2)).start()", "AC AC"),
    "binary": ("import sys\nn = int(sys.stdin.buffer.read())\nsys.stdout.buffer.write(b'%d' % (n * n))", "AC AC"),
    "open(0)": ("print(int(open(0).read()) ** 2)", "AC AC"),
    "raises": ("print(int(input()) ** 2)\n1 / 0", "RE RE"),
    "sleeps": ("import time\nn = int(input())\nn == 3 and time.sleep(60)\nprint(n * n)", "TLE AC"),
    "floods": ("n = int(input())\nwhile n == 4: print('x' * 9999)\nprint(n * n)", "AC OLE"),
    "memory": ("n = int(input())\nif n == 4: bytearray(2 << 30)\nprint(n * n)", "AC MLE"),
}


@pytest.mark.parametrize("name", STDIO)
def test_stdio_verdicts(best_judge, name):
    program, expected = STDIO[name]
    assert statuses(best_judge.run(program, [stdio("3\n", "9\n"), stdio("4\n", "16\n")])) == expected


def test_details_say_what_happened(best_judge):
    assert best_judge.run("def f(n):\n    return n", SQUARES)[1].detail == "on [2] gave 2"
    assert "ZeroDivisionError" in best_judge.run("def f(n):\n    return 1 / 0", SQUARES)[0].detail
    assert "ZeroDivisionError" in best_judge.run("1 / 0", [stdio("", "x")])[0].detail
    assert "signal 11" in best_judge.run("import ctypes\nctypes.string_at(0)", SQUARES)[0].detail


def test_inputs_are_fresh_copies(best_judge):
    """A program may destroy its arguments: the next test, with an equal input, must not see it."""
    tests = [call([[3, 1, 2]], [3, 2, 1]), call([[3, 1, 2]], [3, 2, 1])]
    program = "def f(xs):\n    xs.sort()\n    return [xs.pop() for _ in range(3)]"
    assert statuses(best_judge.run(program, tests)) == "AC AC"


def test_programs_share_nothing(best_judge):
    """Each program has its own process: what one changes in the interpreter, the next does not see."""
    spoil = "import builtins, math\nbuiltins.sum = lambda x: 7\nmath.pi = 4\ndef f():\n    return sum([])"
    clean = "import math\ndef f():\n    return [sum([]), math.pi]"
    for _ in range(2):
        assert statuses(best_judge.run(spoil, [call([], 7)])) == "AC"
        assert statuses(best_judge.run(clean, [call([], [0, 3.141592653589793])])) == "AC"


def test_chance_is_the_same_in_every_run(best_judge):
    """Set order and `random` are fixed: a program that leans on them gets the same verdict each time."""
    program = "import random\ndef f():\n    return list({'a', 'b', 'c', 'd', 'e'}), hash('x'), random.random()"
    first = best_judge.run(program, [call([], 0)])[0].detail
    with Judge(workers=1, isolation=best_judge.isolation, allow_unsafe=True, quiet=True) as other:
        assert other.run(program, [call([], 0)])[0].detail == first


def test_entry_may_be_a_method(best_judge):
    program = "class Solution:\n    def add(self, a, b):\n        return a + b"
    assert statuses(best_judge.run(program, [call([1, 2], 3)], entry="Solution.add")) == "AC"


def test_time_limit_is_processor_time_of_one_test(best_judge):
    """Eight tests that each use half the limit pass, though together they use four times the limit."""
    program = """
import time
def f(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass
    return 1
"""
    assert statuses(best_judge.run(program, [call([0.5 * best_judge.cpu_limit], 1)] * 8)) == "AC " * 7 + "AC"
    assert statuses(best_judge.run(program, [call([30], 1)])) == "TLE"


def test_many_timeouts_end_the_program(best_judge):
    verdicts = best_judge.run("def f(n):\n    while True: pass", [call([n], 0) for n in range(10)])
    assert statuses(verdicts) == "TLE " * 9 + "TLE"
    assert sum(v.detail.startswith("not run") for v in verdicts) == 2
    assert sum("0.1 of the time limit" in v.detail for v in verdicts) == 4


# ---- reward hacks: wrong programs, never paid -----------------------------------------------------------------------

ALWAYS_EQUAL = """
class Always({base}):
    __eq__ = lambda *_: True
    __ne__ = lambda *_: False
    __hash__ = {base}.__hash__
    __bool__ = __len__ = lambda *_: 1
def f(n):
    return Always()
"""
HACKS = {
    **{f"always equal {base}": ALWAYS_EQUAL.format(base=base) for base in ("object", "int", "str", "float", "list")},
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "raise SystemExit": "def f(n):\n    raise SystemExit(0)",
    "os._exit(0)": "import os\ndef f(n):\n    os._exit(0)",
    "walk frames, append passed": """
import sys
def f(n):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            if isinstance(value, list):
                value.append("passed")
            if isinstance(value, dict):
                value["status"] = value["result"] = value["passed"] = "AC"
        frame = frame.f_back
""",
    "walk frames, return the expected output": """
import sys
def f(n):
    frame = sys._getframe()
    while frame:
        for name, value in list(frame.f_locals.items()):
            if name in ("expected", "gt_out", "outputs", "out", "answer", "want", "tests"):
                return value[0] if isinstance(value, list) else value
        frame = frame.f_back
""",
    "search the heap for the expected output": """
import gc
def f(n):
    for thing in gc.get_objects():
        if isinstance(thing, dict):
            for name in ("expected", "outputs", "answer", "test", "verdict"):
                if name in thing:
                    return thing[name]
""",
    "search the modules of the judge": """
import sys
def f(n):
    for name, module in list(sys.modules.items()):
        for attribute in ("same_value", "Judge", "Verdict", "Test", "expected"):
            if hasattr(module, attribute):
                return getattr(module, attribute)
    import judge
    judge.same_value = lambda *_: True
""",
    "patch the runner": """
import json, sys
def f(n):
    runner = sys._getframe(1).f_globals
    runner["json_types"] = runner["describe"] = lambda *_: True
    json.dumps = lambda *_, **__: '{"i": 0, "v": true, "c": 0.0, "status": "AC", "passed": true}'
""",
    "write verdicts into every descriptor": """
import os
def f(n):
    for fd in range(10):
        for line in (b'{"status": "AC"}', b'{"i": 0, "v": "AC", "c": 0.0}', b"PASSED", b"AC"):
            try:
                os.write(fd, line + b"\\n")
            except OSError:
                pass
    os._exit(0)
""",
    "claim the results of later tests": """
import os
os.write(3, b'{"i": -1, "c": 0.0}\\n' + b"".join(b'{"i": %d, "v": 0, "c": 0.0}\\n' % i for i in range(9)))
def f(n):
    return None
""",
    "results out of turn": """
import os
os.write(3, b'{"i": 3, "v": 16, "c": 0.0}\\n' * 9)
def f(n):
    return 0
""",
    "more results than tests": """
import os
os.write(3, b'{"i": 0, "v": 0, "c": 0.0}\\n' * 99)
def f(n):
    return 0
""",
    "bytes that are not JSON": "import os\nos.write(3, b'\\xff\\xfe\\0\\n' * 20)\nos._exit(0)",
    "deep JSON": "import os\nos.write(3, b'[' * 500000 + b'\\n')\nos._exit(0)",
    "not a number": "def f(n):\n    return float('nan')",
    "infinity": "def f(n):\n    return [1e999, float('inf')]",
    "huge integer": "def f(n):\n    return 10 ** 100000",
    "text of the number": "def f(n):\n    return str(n * n)",
    "boolean for one": "def f(n):\n    return n == n",
    "in a list": "def f(n):\n    return [n * n]",
    "an iterator": "def f(n):\n    yield n * n",
}


@pytest.mark.parametrize("name", HACKS)
def test_reward_hacks_are_not_paid(strict_judge, name):
    tests = [call([n], n * n) for n in (1, 5, 6)]
    verdicts = strict_judge.run(HACKS[name], tests)
    assert not any(v.status in ("AC", "JE") for v in verdicts), verdicts
    assert statuses(strict_judge.run(GOOD, tests)) == "AC AC AC"


def test_a_program_cannot_make_a_judge_error(strict_judge):
    """JE is retried and can stop a run: the end a broken sandbox would make must count as the program's."""
    fake = "import os\nos.write(2, b'sandbox: broken')\nos._exit(97)"
    assert statuses(strict_judge.run(fake, SQUARES)) == "RE RE RE RE"
    assert statuses(strict_judge.run(fake, [stdio("", "1")])) == "RE"
    assert statuses(strict_judge.run("import os\nos.closerange(0, 64)\nwhile True: pass", SQUARES)) == "TLE TLE TLE TLE"
    assert strict_judge.counts["JE"] == strict_judge.counts["retries"] == 0


def test_a_stdio_prefix_or_superset_is_not_paid(strict_judge):
    tests = [stdio("", "1\n2\n3\n")]
    for text in ("1", "1\\n2", "1\\n2\\n3\\n4", "1 2 3", "1\\n\\n2\\n3", "", "AC", "1\\n2\\n3 3"):
        assert statuses(strict_judge.run(f"print('{text}')", tests)) == "WA", text


# ---- attacks: programs return what they achieved --------------------------------------------------------------------

HELPERS = """
import os, sys, ctypes, signal
holes = []
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, act):
    try:
        result = act()
        holes.append(name + " " + repr(result)[:60])
    except Exception:
        pass
def syscall(name, number, *arguments):
    if libc.syscall(number, *arguments) >= 0:
        holes.append(name)
"""
ATTACKS = {
    "fork": """
attempt("fork", lambda: os.fork() or os._exit(0))
attempt("forkpty", lambda: os.forkpty())
attempt("popen", lambda: os.popen("id").read())
attempt("spawn", lambda: os.posix_spawn("/bin/true", ["true"], {}))
import subprocess
attempt("subprocess", lambda: subprocess.run([sys.executable or "python3", "-c", "1"]))
""",
    "fork by system call": """
if os.uname().machine == "x86_64":
    syscall("fork", 57)
    syscall("vfork", 58)
    syscall("clone", 56, 17, 0, 0, 0, 0)
    syscall("clone with a lie", 56, 0x100, 0, 0, 0, 0)
""",
    "exec": """
for path in ("/bin/sh", "/bin/true", "/usr/bin/env", os.path.realpath(sys.executable or "/usr/bin/python3")):
    attempt("exec " + path, lambda: os.execv(path, [path]))
""",
    "network": """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        attempt("socket", lambda: socket.socket(family, kind))
attempt("socketpair", lambda: socket.socketpair())
""",
    "read": """
for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/root", "/home", "/proc/self/environ",
"/proc/1/environ",
             "/proc/self/mem", "/proc/self/maps", "/proc/1/cmdline", "/sys/kernel", "/dev/mem", "/dev/kmsg",
             "/boot", "/var/log", "/run", "/proc", "/tmp", "/etc"):
    attempt("open " + path, lambda: open(path, "rb").read(1))
    if not os.__file__.startswith(path) and path != "/etc":    # on the way to visible files
        attempt("list " + path, lambda: os.listdir(path)[0])
attempt("environment", lambda: 1 / len(set(os.environ) - {"PYTHONHASHSEED", "LC_CTYPE", "PWD"}))
""",
    "write": """
for folder in ("/", "/tmp", "/dev/shm", "/var/tmp", "/run", ".", "/usr/lib", os.path.dirname(os.__file__)):
    path = os.path.join(folder, "judge_attack")
    attempt("write " + path, lambda: open(path, "w").write("x" * 100))
    attempt("mkdir " + path, lambda: os.mkdir(path))
    attempt("symlink " + path, lambda: os.symlink("/etc/passwd", path))
    attempt("fifo " + path, lambda: os.mkfifo(path))
attempt("unlink", lambda: os.unlink(os.__file__))
attempt("chmod", lambda: os.chmod(os.path.dirname(os.__file__), 0o777))
attempt("truncate", lambda: os.truncate(os.__file__, 0))
attempt("rename", lambda: os.rename(os.__file__, os.__file__ + "x"))
attempt("link", lambda: os.link(os.__file__, "/tmp/judge_attack"))
""",
    "disk and memory files": """
attempt("memfd", lambda: os.memfd_create("x"))
attempt("write stdin", lambda: os.write(0, b"x" * 100) and 1)
attempt("truncate stdin", lambda: os.ftruncate(0, 1 << 30))
attempt("fallocate stdin", lambda: os.posix_fallocate(0, 0, 1 << 30))
import tempfile
attempt("temporary file", lambda: tempfile.TemporaryFile().write(b"x"))
attempt("pipe size", lambda: __import__("fcntl").fcntl(os.pipe()[1], 1031, 1 << 20))
""",
    "signals": """
parent = os.getppid()
for pid in (-1, 0, 1, parent, 2, os.getpid()):
    for number in (0, signal.SIGKILL, signal.SIGSTOP):
        attempt("kill %d %d" % (pid, number), lambda: os.kill(pid, number))
attempt("killpg", lambda: os.killpg(0, 9))
attempt("raise", lambda: signal.raise_signal(signal.SIGSTOP))
attempt("pidfd", lambda: signal.pidfd_send_signal(os.pidfd_open(parent), 9))
attempt("alarm", lambda: signal.setitimer(signal.ITIMER_REAL, 0.01))
""",
    "signals by descriptor owner": """
import fcntl, struct
r, w = os.pipe()
for target in (os.getppid(), 1, -1):
    attempt("F_SETOWN", lambda: fcntl.fcntl(r, 8, target))
    attempt("F_SETOWN_EX", lambda: fcntl.fcntl(r, 15, struct.pack("ii", 1, target)))
    attempt("FIOSETOWN", lambda: fcntl.ioctl(r, 0x8901, struct.pack("i", target)))
attempt("F_SETSIG", lambda: fcntl.fcntl(r, 10, 9))
attempt("F_SETFL async", lambda: fcntl.fcntl(r, 4, os.O_ASYNC))
attempt("FIOASYNC", lambda: fcntl.ioctl(r, 0x5452, struct.pack("i", 1)))
attempt("TIOCSTI", lambda: fcntl.ioctl(0, 0x5412, b"x"))
""",
    "other processes": """
parent = os.getppid()
if os.uname().machine == "x86_64":
    syscall("ptrace attach", 101, 16, parent, 0, 0)
    syscall("ptrace traceme", 101, 0, 0, 0, 0)
    buffer = ctypes.create_string_buffer(64)
    iov = (ctypes.c_ulong * 2)(ctypes.addressof(buffer), 64)
    syscall("process_vm_readv", 310, parent, iov, 1, iov, 1, 0)
    syscall("process_vm_writev", 311, parent, iov, 1, iov, 1, 0)
    syscall("kcmp", 312, parent, os.getpid(), 0, 0, 0)
    syscall("pidfd_getfd", 438, 3, 0, 0)
import resource
attempt("limits of the server", lambda: resource.prlimit(parent, resource.RLIMIT_CPU, (1, 1)))
attempt("limits of 1", lambda: resource.prlimit(1, resource.RLIMIT_NOFILE))
attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, parent, 19))
attempt("affinity", lambda: os.sched_setaffinity(parent, {0}))
attempt("scheduler", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
""",
    "privileges": """
attempt("setuid", lambda: os.setuid(0))
attempt("setresuid", lambda: os.setresuid(0, 0, 0))
attempt("setgroups", lambda: os.setgroups([0]))
attempt("chroot", lambda: os.chroot("/"))
attempt("setsid", lambda: os.setsid())
if os.uname().machine == "x86_64":
    for name, number in (("unshare", 272), ("mount", 165), ("umount", 166), ("pivot_root", 155), ("setns",
    308),
                         ("init_module", 175), ("kexec", 246), ("bpf", 321), ("perf_event_open", 298),
                         ("userfaultfd", 323), ("io_uring_setup", 425), ("keyctl", 250), ("add_key", 248),
                         ("capset", 126), ("prctl", 157), ("seccomp", 317), ("iopl", 172), ("swapon", 167),
                         ("reboot", 169), ("sethostname", 170), ("open_by_handle_at", 304), ("fanotify_init",
                         300), ("inotify_init", 253), ("quotactl", 179), ("acct", 163), ("personality", 135),
                         ("modify_ldt", 154), ("name_to_handle_at", 303), ("clone3", 435), ("mount_setattr",
                         442), ("landlock_create_ruleset", 444), ("memfd_secret", 447), ("settimeofday",
                         164)):
        syscall(name, number, 0, 0, 0, 0, 0, 0)
""",
    "shared memory and queues": """
if os.uname().machine == "x86_64":
    for name, number in (("shmget", 29), ("semget", 64), ("msgget", 68)):
        syscall(name, number, 0, 4096, 0o1600)
    syscall("mq_open", 240, b"/judge", 0o102, 0o600, 0)
    syscall("eventfd", 290, 0, 0)
    syscall("timer_create", 222, 0, 0, ctypes.create_string_buffer(8))
import multiprocessing
attempt("multiprocessing", lambda: multiprocessing.Value("i", 0))
""",
    "more than its limits": """
import resource
for name in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE"):
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    attempt("raise " + name, lambda: resource.setrlimit(kind, (hard + 1, hard + 1)))
    attempt("unlimited " + name, lambda: resource.setrlimit(kind, (-1, -1)))
fds = []
try:
    while True:
        fds.append(os.open("/", os.O_RDONLY))
except OSError:
    pass
if len(fds) > 32:
    holes.append("%d descriptors" % len(fds))
""",
    "inherited descriptors": """
for fd in range(4, 4096):
    attempt("descriptor %d" % fd, lambda: os.fstat(fd))
    attempt("write to %d" % fd, lambda: os.write(fd, b"E" + bytes(16)))
""",
    "metadata by other calls than stat": """
for path in ("/etc/shadow", "/root", "/etc"):
    attempt("access " + path, lambda: 1 / os.access(path, os.F_OK))
    attempt("chdir " + path, lambda: os.chdir(path))
    attempt("xattr " + path, lambda: os.listxattr(path))
    attempt("statvfs " + path, lambda: os.statvfs(path))
""",
    "clocks and processors of other processes": """
import time
for pid in (os.getppid(), 1, 2, *range(100, 3000, 7)):
    for kind in range(8):
        attempt("clock", lambda: time.clock_gettime((~pid << 3) | kind))
        attempt("resolution", lambda: time.clock_getres((~pid << 3) | kind))
    attempt("affinity", lambda: os.sched_getaffinity(pid))
    attempt("limits", lambda: __import__("resource").prlimit(pid, 0))
""",
    "threads without end": """
import threading, _thread
started = 0
stop = _thread.allocate_lock()
stop.acquire()
threading.stack_size(1 << 16)
try:
    while started < 2000:
        _thread.start_new_thread(stop.acquire, ())
        started += 1
except RuntimeError:
    pass
if started > 1100:
    holes.append("%d threads" % started)
""",
    "the x32 calls": """
if os.uname().machine == "x86_64":
    for number in (57, 58, 41, 59, 62, 101):
        syscall("x32 %d" % number, 0x40000000 + number, 0, 0, 0)
""",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_contained(strict_judge, name):
    program = HELPERS + ATTACKS[name] + "\ndef f():\n    return holes"
    (verdict,) = strict_judge.run(program, [call([], [])])
    assert verdict.status == "AC", verdict
    assert statuses(strict_judge.run(GOOD, SQUARES)) == "AC AC AC AC"  # and the box still serves


EXHAUSTION = {  # program, statuses that are right
    "fork bomb": ("import os\ndef f(n):\n    while True: os.fork()", {"RE"}),
    "thread bomb": (
        "import threading, time\ndef f(n):\n    while True:\n"
        "        threading.Thread(target=time.sleep, args=(60,)).start()",
        {"RE", "MLE"},
    ),
    "threads that compute": (
        "import threading\ndef g():\n    while True: pass\n"
        "def f(n):\n    [threading.Thread(target=g).start() for _ in range(4)]\n    g()",
        {"TLE"},
    ),
    "two gigabytes": ("def f(n):\n    return len(bytes(2 << 30))", {"MLE"}),
    "memory bit by bit": ("def f(n):\n    xs = []\n    while True: xs.append(bytes(1 << 20))", {"MLE"}),
    "anonymous maps": (
        "import mmap\ndef f(n):\n    xs = []\n    while True: xs.append(mmap.mmap(-1, 1 << 24))",
        {"RE"},
    ),
    "sleep": ("import time\ndef f(n):\n    time.sleep(60)", {"TLE"}),
    "every signal ignored": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except Exception: pass\ndef f(n):\n    while True: pass",
        {"TLE"},
    ),
    "exceptions caught": (
        "def f(n):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
        {"TLE"},
    ),
    "recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n)", {"RE", "MLE", "TLE"}),
    "recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    x = []\n"
        "    for _ in range(10**6): x = [x]\n    return x",
        {"RE", "MLE", "TLE"},
    ),
    "big power": ("def f(n):\n    return (9 ** 9 ** 9) % 7", {"TLE", "MLE"}),
    "catastrophic regular expression": ("import re\ndef f(n):\n    return re.match('(a+)+$', 'a' * 60 + 'b')", {"TLE"}),
    "stdout flood": ("import os\ndef f(n):\n    while True: os.write(1, b'x' * 65536)", {"OLE"}),
    "stderr flood": ("import os\ndef f(n):\n    while True: os.write(2, b'x' * 65536)", {"OLE"}),
    "result flood": ("import os\ndef f(n):\n    while True: os.write(3, b'x' * 65536)", {"OLE"}),
    "result lines": ("import os\ndef f(n):\n    while True: os.write(3, b'{}\\n' * 20000)", {"RE", "OLE"}),
    "large result": ("def f(n):\n    return 'x' * 10**8", {"OLE", "MLE", "TLE"}),
    "endless result": ("def f(n):\n    x = []\n    x.append(x)\n    return x", {"RE"}),
    "an exception that will not be described": (
        "class E(BaseException):\n    def __str__(self):\n        while True: pass\ndef f(n):\n    raise E()",
        {"TLE"},
    ),
    "negative clock": ("import time\ntime.process_time = lambda: -1e9\ndef f(n):\n    while True: pass", {"TLE"}),
    "stopped clock": ("import time\ntime.process_time = lambda: 0.0\ndef f(n):\n    while True: pass", {"TLE"}),
    "lying clock and 1.7 times the limit": (
        "import time\nreal = time.process_time\ntime.process_time = lambda: 5e5\n"
        "def f(n):\n    end = real() + 0.43\n    while real() < end: pass\n    return n", {"TLE"}),
    "keys that share their hashes": (
        "import os\nos.write(3, b'{\"i\": -1}\\n{\"i\": 0, \"v\": {\"set\": [%s]}}\\n' "
        "% b','.join(b'%d' % (k * (2**61 - 1)) for k in range(30000)))\ndef f(n): pass", {"RE"}),
    "a byte at a time": ("import os\ndef f(n):\n    while True: os.write(1, b'x')", {"OLE", "TLE"}),
    "a result of a byte at a time": ("import os\ndef f(n):\n    while True: os.write(3, b'x')", {"OLE", "TLE"}),
    "lying clock": ("import time\ntime.process_time = lambda: 1e5\ndef f(n):\n    while True: pass", {"TLE"}),
}


@pytest.mark.parametrize("name", EXHAUSTION)
def test_exhaustion_is_contained(best_judge, name):
    """With the strongest isolation only: limits and clocks are the same code in all. This process does not grow."""
    import resource

    if best_judge.isolation == "C":
        pytest.skip("isolation C, the only one here, does not stop a fork bomb")

    program, expected = EXHAUSTION[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    (verdict,) = best_judge.run(program, [call([1], 1)])
    assert verdict.status in expected, verdict
    assert time.monotonic() - begin < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB: the flood was not kept
    assert statuses(best_judge.run(GOOD, SQUARES)) == "AC AC AC AC"


LEFT_OVER = {  # whole programs whose second test would print another thing if the first had left something
    "a module": "import math\nprint(getattr(math, 'x', 0))\nmath.x = 1",
    "a builtin": "import builtins\nprint(getattr(builtins, 'x', 0))\nbuiltins.x = 1",
    "the environment": "import os\nprint(os.environ.get('X', 0))\nos.environ['X'] = '1'",
    "umask": "import os\nprint(os.umask(0o77) & 0)",
    "the end of the input": "import os\nprint(len(os.read(0, 9)) - 2)\nos.lseek(0, 0, 2)",
    "another input": "import mmap\ntry: mmap.mmap(0, 0)[0:1] = b'9'\nexcept Exception: pass\nprint(len(input()) - 1)",
    "a handler": "import signal\nprint(int(signal.getsignal(10) == signal.SIG_IGN))\nsignal.signal(10, signal.SIG_IGN)",
    "a thread that writes": "import os, threading\nprint(0, flush=True)\nthreading.Thread(daemon=True, target="
                            "lambda: [os.write(2, b'x') for _ in range(10**6)]).start()",
    "limits": "import resource as r\nprint(r.getrlimit(r.RLIMIT_NOFILE)[0] - 32)\n"
              "r.setrlimit(r.RLIMIT_NOFILE, (9, 9))",
    "closed streams": "import os\nprint(0, flush=True)\nos.closerange(0, 64)",
    "a dead parent": "import os\nfor kill, who in ((os.kill, os.getppid()), (os.killpg, 0)):\n"
                     "    try: kill(who, 9)\n    except OSError: pass\nprint(0)",
    "a forked child": "import ctypes, os\nprint(0, flush=True)\ncall = ctypes.CDLL(None).syscall\n"
                      "for n, flags in ((56, 17), (56, 0x1200011), (57, 0), (58, 0), (435, 0)):\n"
                      "    if call(n, flags, 0, 0, 0, 0) == 0:\n        os.write(1, b'forked')\n        os._exit(0)",
    "other filters": "import ctypes\ncall = ctypes.CDLL(None).syscall\n"
                     "print(sum(call(157, a, b, 0, 0, 0) == 0 for a, b in ((1, 0), (4, 1), (36, 1), (22, 2))))",
    "lines to the judge": "import os\nfor fd in range(3, 300):\n    try: os.write(fd, b'\\0' * 13)\n"
                          "    except OSError: pass\nprint(0)",
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_a_test_leaves_nothing_for_the_next(strict_judge, name):
    """All tests of a whole program are forks of one process: each finds it as if it were the first."""
    tests = [Test("stdio", f"{i}\n", "0") for i in range(3)]
    assert statuses(strict_judge.run(LEFT_OVER[name], tests)) == "AC AC AC"


def test_what_the_compiler_may_cost(best_judge):
    """A program that takes the compiler too long is ended as one that runs too long, and a large one is not lost."""
    tests = [stdio("", "4")] * 2
    assert statuses(best_judge.run("a = [" + "'x'," * 5_000_000 + "]\nprint(4)", tests)) in ("TLE TLE", "MLE MLE")
    assert statuses(best_judge.run("#" * 2_000_000 + "\nprint(4)", tests)) == "AC AC"


def test_the_32_bit_entry_is_closed(strict_judge):
    """int 0x80 from made machine code reaches the 32-bit table, with other numbers: the filter kills."""
    if os.uname().machine != "x86_64":
        pytest.skip("x86_64 only")
    program = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3")    # mov eax, 2 (fork); int 0x80; ret
entry = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
def f():
    return entry()
"""
    (verdict,) = strict_judge.run(program, [call([], 0)])
    assert verdict.status == "RE" and "signal 31" in verdict.detail, verdict  # SIGSYS


def test_nothing_of_one_program_reaches_the_next(strict_judge):
    """The server never reads a job, so a search of the heap finds no earlier program or input."""
    secret = "x" + "q7Zp" * 5
    strict_judge.run(f"word = '{secret}'\ndef f(s):\n    return s + word", [call([secret], secret + secret)])
    program = f"""
import gc, sys
half = "q7" + "Zp"
def f():
    found = []
    for thing in gc.get_objects():
        try:
            if half * 5 in repr(thing)[:100000] and "found" not in repr(thing)[:100000]:
                found.append(repr(thing)[:80])
        except Exception:
            pass
    return found
# {len(secret)}
"""
    (verdict,) = strict_judge.run(program, [call([], [])])
    assert verdict.status == "AC", verdict


def test_secrets_of_the_parent_stay_outside(strict_judge):
    """A file, an environment variable and an open descriptor of this process: none can be had inside."""
    os.environ["JUDGE_SECRET"] = "swordfish"
    try:
        with tempfile.NamedTemporaryFile("w") as file, open_judge(strict_judge.isolation) as judge:
            file.write("swordfish")
            file.flush()
            os.chmod(file.name, 0o644)
            program = (
                HELPERS
                + f"""
attempt("file", lambda: open({file.name!r}).read())
attempt("project", lambda: open({os.path.join(ROOT, "judge", "__init__.py")!r}).read())
attempt("tests", lambda: os.listdir({os.path.dirname(os.path.abspath(__file__))!r}))
attempt("variable", lambda: os.environ["JUDGE_SECRET"])
def f():
    return holes
"""
            )
            (verdict,) = judge.run(program, [call([], [])])
            assert verdict.status == "AC", verdict
    finally:
        del os.environ["JUDGE_SECRET"]


def test_bare_threads_are_counted(strict_judge):
    """Threads made by clone() itself share one stack and cost no address space: the limit of the user holds them."""
    if os.uname().machine != "x86_64":
        pytest.skip("x86_64 only")
    program = """
import ctypes, mmap, struct
# int start(int n, struct timespec *wait, void *stack): n times clone(VM | FS | FILES | SIGHAND | THREAD, stack); each
# thread sleeps for ever; the number of threads that came
code = bytes.fromhex(
    "534154415541564889fb4989f44989d54d31f6b838000000bf000f01004c89ee31d24531d24531c0"
    "0f054885c0780a741349ffc64939de72da4c89f0415e415d415c5bc3b8230000004c89e731f60f05"
    "ebf2"
)
area = mmap.mmap(-1, 1 << 16, prot=7)
area.write(code)
base = ctypes.addressof(ctypes.c_char.from_buffer(area))
area[8192:8208] = struct.pack("qq", 9999, 0)
start = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)(base)
def f(most):
    made = start(3000, base + 8192, base + 60000)
    return made if made > most else "few"
"""
    (verdict,) = strict_judge.run(program, [call([2 * server.THREADS * 8], "few")])
    assert verdict.status == "AC", verdict
    assert statuses(strict_judge.run(GOOD, SQUARES)) == "AC AC AC AC"


def test_root_is_given_up(strict_judge):
    if os.geteuid() != 0:
        pytest.skip("not root: nothing to give up")
    powers = """
import ctypes, os, struct
libc = ctypes.CDLL(None)
def f():
    return [os.getuid() == 0 and DROP_BY == "uid", os.geteuid() == 0 and DROP_BY == "uid"]
""".replace("DROP_BY", repr(strict_judge.drop_by))
    assert statuses(strict_judge.run(powers, [call([], [False, False])])) == "AC"


# ---- processes ------------------------------------------------------------------------------------------------------

def descendants(pid):
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            for child in map(int, file.read().split()):
                found += [child, *descendants(child)]
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


linux = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")


@linux
def test_close_leaves_no_process(judge):
    """Closed in the middle of an endless program, others waiting: no process stays, every caller gets JE."""
    before = set(descendants(os.getpid()))
    other = open_judge(judge.isolation, workers=2, time_limit=30)
    waiting = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: waiting.append(other.run("while True: pass", SQUARES)))
        thread.start()
    for i in range(3):
        other.submit(i, GOOD, SQUARES)
    while other._running < 2 or len(set(descendants(os.getpid())) - before) < 4:
        time.sleep(0.01)
    started = set(descendants(os.getpid())) - before
    other.close()
    until = time.monotonic() + 10
    while any(map(alive, started)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, started))
    thread.join(10)
    assert {k for k, v in other.poll() if statuses(v) == "JE JE JE JE"} == {0, 1, 2}
    with pytest.raises(JudgeError, match="closed"):
        other.submit(9, GOOD, SQUARES)


@linux
def test_a_killed_judge_takes_its_boxes_along():
    """SIGKILL to the whole judge process while a program runs for ever: its boxes end by themselves."""
    import subprocess

    code = (
        "from data.problems import Test\nfrom judge import Judge\n"
        "judge = Judge(workers=1, time_limit=60, allow_unsafe=True)\n"
        "judge.submit(0, 'while True: pass', [Test('stdio', '', '')])\n"
        "while not judge._running: pass\nimport time\ntime.sleep(0.5)\nprint('up', flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT
    )
    while (said := process.stdout.readline()) != b"up\n":
        assert said.startswith(b"judge:")
    boxes = descendants(process.pid)
    assert len(boxes) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 10
    while any(map(alive, boxes)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, boxes))


@linux
def test_the_state_of_the_judges_process_does_not_matter():
    """150 descriptors, ignored and blocked signals, other limits: what the box is like does not depend on them."""
    import subprocess

    code = '''
import os, resource, signal, sys
held = [os.open("/dev/null", os.O_RDWR) for _ in range(150)]
for fd in held: os.set_inheritable(fd, True)
for s in (signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1): signal.signal(s, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGINT, signal.SIGTERM])
resource.setrlimit(resource.RLIMIT_STACK, (4 << 20, 64 << 20))
from data.problems import Test
from judge import Judge
PROGRAM = """
import os, signal
def f():
    seen = []
    for fd in range(4, 4096):
        for act in (os.fstat, lambda fd: os.write(fd, b"E" + bytes(16))):
            try:
                act(fd)
                seen.append(fd)
            except OSError:
                pass
    ignored = [int(s) for s in signal.valid_signals() if signal.getsignal(s) == signal.SIG_IGN]
    return seen, sorted(ignored), len(signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
for isolation in "AB":
    try:
        judge = Judge(workers=1, isolation=isolation, quiet=True)
    except ValueError:
        continue
    with judge:
        for _ in range(3):
            print(judge.run(PROGRAM, [Test("call", "[]", "[[], [13, 25], 0]")])[0])
print("done")
'''
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["done"], done.stderr
    assert all(line.startswith("Verdict(status='AC'") for line in lines[:-1]), lines


@linux
def test_isolation_c_ends_what_a_program_forked():
    with open_judge("C") as judge:
        program = (
            "import os, time\ndef f(n):\n    if os.fork() == 0:\n        os.setsid()\n"
            "        if os.fork() == 0:\n            while True: time.sleep(1)\n"
            "        os._exit(0)\n    os.wait()\n    return n * n"
        )
        assert statuses(judge.run(program, SQUARES)) == "AC AC AC AC"
        assert statuses(judge.run(GOOD, SQUARES)) == "AC AC AC AC"
        (box,) = judge._boxes
        end = time.monotonic() + 10                       # the child that waits for the next program, and no other
        while len(descendants(box.process.pid)) != 1 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(descendants(box.process.pid)) == 1
        assert all(alive(p) for p in descendants(box.process.pid))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["A", "B"])
def test_ten_thousand_programs_leave_nothing(isolation):
    """No process, no descriptor and no file is left over, whatever the programs do."""
    kinds = [("call", GOOD), ("call", "def f(n):\n    return 1 / 0"), ("call", "import os\ndef f(n):\n    os._exit(3)"),
             ("call", "def f(n):\n    return [0] * 10 ** 10"), ("call", "x ="), ("stdio", "print(9)"),
             ("stdio", "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()"),
             ("stdio", "print('x' * 2000000)"), ("check", GOOD), ("call", "import os\nos.closerange(0, 64)")]
    tests = {"call": SQUARES[:2], "stdio": [stdio("3", "9")], "check": [Test("check", "assert f(2) in (4, 5)")]}

    def held():
        files = sorted(os.listdir(tempfile.gettempdir()))
        return sorted(os.listdir("/proc/self/fd")), files, len(descendants(os.getpid()))

    def run(n: int) -> None:
        for i in range(n):
            kind, program = kinds[i % len(kinds)]
            judge.submit(i, program, tests[kind])
        found = {}
        while len(found) < n:
            found.update(judge.poll())
            time.sleep(0.01)
        time.sleep(0.5)

    others = set(descendants(os.getpid()))                    # of earlier tests: multiprocessing's servers live on
    with open_judge(isolation, workers=2, time_limit=1) as judge:
        run(500)                                              # both workers have started all their boxes
        before = held()
        run(10_000)
        assert judge.counts["JE"] == judge.counts["retries"] == 0
        after = held()
    assert after[0] == before[0] and after[2] == before[2]
    assert not [name for name in set(after[1]) - set(before[1]) if "judge" in name]
    assert not [pid for pid in set(descendants(os.getpid())) - others if alive(pid)]


# ---- the pool -------------------------------------------------------------------------------------------------------

def drain(judge, n):
    found, until = {}, time.monotonic() + 60
    while len(found) < n and time.monotonic() < until:
        found.update(judge.poll())
        time.sleep(0.005)
    return found


def test_submit_and_poll(best_judge):
    programs = [f"def f(n):\n    return n * {k}" for k in range(20)]
    for k, program in enumerate(programs):
        best_judge.submit(("key", k), program, [call([3], 9), call([2], 2)])
    found = drain(best_judge, 20)
    assert {k: statuses(v) for k, v in found.items()} == {
        ("key", k): f"{'AC' if k == 3 else 'WA'} {'AC' if k == 1 else 'WA'}" for k in range(20)
    }
    assert best_judge.poll() == []


def test_workers_change_no_verdict():
    programs = [body for body, _ in VERDICTS.values()]
    results = []
    for workers in (1, 3):
        with Judge(workers=workers, time_limit=0.3, allow_unsafe=True, quiet=True) as judge:
            for i, program in enumerate(programs):
                judge.submit(i, program, SQUARES)
            results.append({i: statuses(v) for i, v in drain(judge, len(programs)).items()})
            counts = judge.counts
            assert counts["programs"] == len(programs) and counts["tests"] == 4 * len(programs)
            assert sum(counts[s] for s in STATUSES) == counts["tests"]
            assert len(judge._queue) == judge._running == 0
    assert results[0] == results[1] and len(results[0]) == len(programs)


def test_the_same_program_is_run_once():
    """cache_size: the same program with the same tests has the same verdicts, and no second process."""
    with Judge(workers=1, cache_size=2, allow_unsafe=True, quiet=True) as judge:
        for _ in range(2):
            assert statuses(judge.run(GOOD, SQUARES)) == "AC AC AC AC"
        assert judge.counts["processes"] == 2 and judge.counts["cached"] == 0     # two runs have to agree
        second = judge.run(GOOD, SQUARES)
        assert judge.run(GOOD, SQUARES) == second and statuses(second) == "AC AC AC AC"
        assert judge.counts["processes"] == 2 and judge.counts["cached"] == 2
        assert judge.counts["programs"] == 4 and judge.counts["AC"] == 16
        # any other text, test or entry is another program
        both = GOOD + "\ndef g(n):\n    return n + 1"
        assert statuses(judge.run(GOOD, [call([2], 5)])) == "WA"
        assert statuses(judge.run(both, SQUARES)) == "AC AC AC AC"
        assert statuses(judge.run(both, SQUARES, entry="g")) == "WA WA WA WA"
        assert judge.counts["processes"] == 5 and judge.counts["cached"] == 2
        # two are kept: the first is forgotten by now
        assert statuses(judge.run(GOOD, SQUARES)) == "AC AC AC AC" and judge.counts["processes"] == 6


@pytest.mark.parametrize("body", ["while n: pass", "return [0] * 10 ** 10", "return n / 0"])
def test_what_did_not_end_by_itself_is_run_again(body):
    program = f"def f(n):\n    {body}"
    with Judge(workers=1, cache_size=9, time_limit=0.1, allow_unsafe=True, quiet=True) as judge:
        for times in (1, 2):
            assert statuses(judge.run(program, SQUARES[-1:])) in ("TLE", "MLE", "RE")
            assert judge.counts["processes"] == times and judge.counts["cached"] == 0


def test_half_a_verdict_is_not_cached(monkeypatch):
    """A box that dies twice in the middle: JE, and asked again the program is judged anew."""
    with Judge(workers=1, cache_size=9, allow_unsafe=True, quiet=True) as judge:

        def half(worker, job):
            job.verdicts[0] = Verdict("AC", 0.0)
            raise JudgeError("broken pipe")

        with monkeypatch.context() as broken:
            broken.setattr(judge, "_judge_calls", half)
            assert statuses(judge.run(GOOD, SQUARES)) == "AC JE JE JE"
        assert statuses(judge.run(GOOD, SQUARES)) == "AC AC AC AC"
        assert judge.counts["cached"] == 0


def test_nothing_is_cached_by_default(best_judge):
    before = best_judge.counts["processes"]
    assert statuses(best_judge.run(GOOD, SQUARES)) == statuses(best_judge.run(GOOD, SQUARES)) == "AC AC AC AC"
    assert best_judge.counts["processes"] == before + 2


def test_a_lost_box_is_retried_once_and_then_a_judge_error(monkeypatch):
    """A box that dies under a program: tried again in a new one. Twice: JE, never a silent 0."""
    with Judge(workers=1, allow_unsafe=True, quiet=True) as judge:
        assert statuses(judge.run(GOOD, SQUARES)) == "AC AC AC AC"
        judge._boxes[0].process.kill()
        judge._boxes[0].process.wait()
        assert statuses(judge.run(GOOD, SQUARES)) == "AC AC AC AC"
        assert judge.counts["retries"] == 1
        monkeypatch.setattr(Box, "execute", lambda *_: (_ for _ in ()).throw(JudgeError("broken pipe")))
        (verdict,) = judge.run(GOOD, SQUARES[:1])
        assert verdict.status == "JE" and "broken pipe" in verdict.detail
        assert judge.counts["JE"] == 1


def test_many_judge_errors_are_loud(monkeypatch):
    with Judge(workers=1, allow_unsafe=True, quiet=True) as judge:
        monkeypatch.setattr(Box, "execute", lambda *_: 1 / 0)
        for i in range(25):
            judge.submit(i, GOOD, SQUARES[:1])
        with pytest.raises(JudgeError, match="could not be judged.*ZeroDivisionError"):
            while True:
                judge.poll()
                time.sleep(0.01)


def test_isolation_is_printed_once_and_c_is_refused(capfd, monkeypatch):
    with pytest.raises(UserError, match="refused.*allow_unsafe"):
        Judge(isolation="C")
    with pytest.raises(ValueError, match="isolation 'D'"):
        Judge(isolation="D")
    monkeypatch.setattr("judge._printed", set())
    for _ in range(2):
        Judge(workers=1, allow_unsafe=True).close()
    out = capfd.readouterr().out
    assert out.count("judge: isolation") == 1 and "rlimits" in out


@pytest.mark.parametrize("isolation", ["A", "B"])
def test_an_isolation_that_leaks_does_not_count(isolation, monkeypatch):
    """An isolation counts only if the attack at start-up fails: without the filter it is refused by name."""
    open_judge(isolation).close()
    whole = open(server.__file__).read()
    source = whole.replace('if cfg["isolation"] in "AB":', "if False:")
    assert source != whole
    with tempfile.NamedTemporaryFile("w", suffix=".py") as weak:
        weak.write(source)
        weak.flush()
        os.chmod(weak.name, 0o644)
        monkeypatch.setattr(server, "__file__", weak.name)
        with pytest.raises(UserError, match="not tight: .*fork"):
            Judge(isolation=isolation)


def test_bad_calls_say_what_is_wrong(best_judge):
    with pytest.raises(ValueError, match="without tests"):
        best_judge.run(GOOD, [])
    with pytest.raises(ValueError, match="all 'call' or all 'stdio'"):
        best_judge.run(GOOD, [*SQUARES, stdio("", "")])
    with pytest.raises(ValueError, match="entry"):
        best_judge.run(GOOD, SQUARES, entry="")
    with pytest.raises(ValueError, match="workers=0"):
        Judge(workers=0)
    with pytest.raises(ValueError, match="'stdio' or 'call'"):
        Test("unit", "", "")
    with pytest.raises(ValueError, match="JSON list of arguments"):
        Test("call", "3", "3")
    with pytest.raises(ValueError, match="NaN is not JSON"):
        Test("call", "[3]", "NaN")


# ---- comparison -----------------------------------------------------------------------------------------------------

def test_same_value():
    """By hand: Python's ==, floats within 1e-9; True is not 1, but 0 is False; a list is no tuple when strict."""
    one, half = Fraction(1), Fraction(1, 2)
    equal = [(1, 1), (0.3, 0.1 + 0.2), ([1, [2.0, "x"]], [1, [2.0, "x"]]), ({"a": [None]}, {"a": [None]}), ([], []),
             (1, 1.0), (1.0, 1), (False, 0), (True, 1.0), ({1: 2}, {1.0: 2}), ({1, 2}, {2, 1}), ({1}, frozenset([1])),
             (b"x", bytearray(b"x")), (1, one), (0.5, half), (0.5, Decimal("0.5")), (2j, 2j), ([1, 2], (1, 2)),
             ([[1, 2]], [(1, 2)]), ({"a": [1]}, {"a": (1,)}), (2.0, 2 + 0j), (10**30, 10**30), (1e300, 10**300)]
    different = [(1, True), (0, False), (0, None), ("1", 1), ([1], [1, 1]), ([], {}), ([1, 2], [2, 1]), (2.0, True),
                 ({"a": 1}, {"a": 1, "b": 2}), ({"a": 1}, {"a": True}), (0.3, 0.3001), ("", None), ([0], [False]),
                 (10**17, 1e17 + 32), ({1}, [1]), ({1: 2}, {"1": 2}), (b"1", "1"), ({1, 2}, {1}), ((1, 2), [1, 2]),
                 ([1], deque([1])), (5, "5"), (1.0, 10**400), (float("nan"), float("nan"))]
    assert [pair for pair in equal if not same_value(*pair)] == []
    assert [pair for pair in different if same_value(*pair)] == []
    strict = [([1, 2], (1, 2)), ((1, 2), [1, 2]), ([[1]], [(1,)])]
    assert not any(same_value(*pair, strict=True) for pair in strict) and same_value((1, 2), (1, 2), strict=True)
    assert same_value(2.0, 2.04, 0.05) and same_value([100.0], [101.0], 0.05) and not same_value(2.0, 2.2, 0.05)
    assert not same_value(2, 2.0000000001) and not same_value(0.3, 0.1 + 0.2, 0.0)


def test_same_text():
    """By hand: blanks at the end of a line or of the text do not count; lines, tokens and digits do."""
    assert same_text("1\n2\n", "1 \n2\n\n") and same_text("", "\n") and same_text("a  b", "a  b")
    for got in ("1", "1\n2\n3", "1 2", "1\n\n2", " 1\n2", "", "01\n2", "1\n2.0"):
        assert not same_text("1\n2", got), got
    assert not same_text("1.0", "1.001") and not same_text("1", "nan")
