"""
The inside of the judge's sandbox: a warm interpreter that forks one confined process for every program.

Report, section 3.2: code rewards come from unit tests that an online judge runs. This file is all of ours that runs
inside a box: box.py starts it, and the expected outputs stay in the judge's process. A bare interpreter with an empty
environment reads it, so it imports the standard library only. There are two kinds of process:

- the server (trusted) imports the usual modules once, then waits for jobs. It never reads a program, an input or an
  output: a job arrives as open file descriptors, so nothing of one program is left in memory for the next.
- the child is a fork of the unused server; it gets exactly one program and ends. Before it reads the program it closes
  every other descriptor, sets its limits, becomes an unused user, and installs a seccomp filter that allows some
  seventy system calls: no process creation, no signals, no sockets, no exec, no mount, no change of a file. Functions
  (call, check) run in it, hostile. Of a whole program (stdio) it only makes a code object; it may fork, and does so
  once for every test. These tests are hostile: each is confined by the full filter before it runs a line.

A fork of a warm interpreter takes 1 to 2 ms, a fresh sandboxed interpreter about 30 ms. The server keeps one child
forked ahead, so that most of that time passes while the program before it runs. A fork for a test takes less than
that, since all but its filter was set up in the child.
"""
import _signal
import _socket
import atexit
import builtins
import collections
import ctypes
import errno
import functools
import gc
import importlib.util
import io
import json
import marshal
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable, Iterable

MESSAGE = struct.Struct("<cqd")    # (operation, integer, seconds): the fixed-size message in both directions
START = struct.Struct("<dd")       # to the child of a whole program: processor seconds and seconds of the next test
ENDED = struct.Struct("<i?d")      # from it: the test's wait status, whether its time was up, its processor seconds
CONFINED = b"{}\n"                 # the first line of every child: it is confined, and has not read its program yet
STDIN, STDOUT, STDERR, RESULTS, JOB, MORE = range(6)    # descriptors of a child; the last only if its job is live
# sockets of the server: messages both ways; descriptors for the children, which take turns at two sockets, so that the
# next child cannot take what is meant for the one before
LINE, JOBS = 5, (6, 7)
THREADS = 128                    # threads and processes of one box
STACKS = 1 << 30                 # address space beyond the memory limit that threading.stack_size may claim
MAIN = "/main.py"                # what a program finds as its own file
DEVICES = {f"{folder}/{name}": fd for fd, word in enumerate(("stdin", "stdout", "stderr"))
           for folder, name in (("/dev", word), ("/dev/fd", fd), ("/proc/self/fd", fd))}
WARM = ("math", "collections", "itertools", "functools", "heapq", "bisect", "re", "string", "random",
        "operator", "copy", "io", "typing")

# ---- seccomp: an allow list -----------------------------------------------------------------------------------------

# name: number on (x86_64, aarch64), -1 where the machine has no such call. Left out on purpose: fork, vfork, execve,
# kill and the other ways to send a signal, ptrace, process_vm_*, socket, memfd_create, io_uring, bpf, mount, unshare,
# chmod, unlink, truncate, keyctl, shm*, mq_*, timer_*, setsid, setpriority, sched_setaffinity, prctl.
ALLOW = {
    "read": (0, 63), "write": (1, 64), "open": (2, -1), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80),
    "lstat": (6, -1), "poll": (7, -1), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66),
    "pipe": (22, -1), "select": (23, -1), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233),
    "dup": (32, 23), "dup2": (33, -1), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93),
    "wait4": (61, 260), "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, -1),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "umask": (95, 166), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178),
    "time": (201, -1), "futex": (202, 98), "getdents64": (217, 61),
    "set_tid_address": (218, 96), "restart_syscall": (219, 128), "exit_group": (231, 94), "openat": (257, 56),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "pselect6": (270, 72),
    "ppoll": (271, 73), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "dup3": (292, 24),
    "pipe2": (293, 59), "getcpu": (309, 168), "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291),
    "rseq": (334, 293), "close_range": (436, 436),
}
# what the child of a whole program may do beside: it forks its tests, and ends those whose time is up
PARENT = {"fork": (57, -1), "kill": (62, 129), "setitimer": (38, 103), "prctl": (157, 167),
          "clock_gettime": (228, 113)}
CLONE, CLONE3, FCNTL, IOCTL, PRLIMIT, AFFINITY = (56, 220), (435, 435), (72, 25), (16, 29), (302, 261), (204, 123)
CLOCKS = (228, 113), (229, 114), (230, 115)    # clock_gettime, clock_getres, clock_nanosleep
# DUPFD GETFD SETFD GETFL DUPFD_CLOEXEC. Not SETOWN and SETSIG: together they send any signal to any process of the same
# user. Not SETPIPE_SZ: it takes memory that RLIMIT_AS does not count.
FORK = 0x1200011    # CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID, SIGCHLD
FCNTL_ALLOW = (0, 1, 2, 3, 1030)
AUDIT_ARCH = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


def seccomp_filter(parent: bool = False) -> list[tuple[int, int, int, int]]:
    """
    The filter of hostile processes, or of the parent of a whole program's tests: the classic BPF program as
    instructions (code, jt, jf, k): after a comparison the next jt (true) or jf (false) instructions are left out.
    Source: linux/seccomp.h, linux/filter.h. The list is searched by halves: the kernel runs the filter once for every
    system call there is when a child installs it, which took 0.3 ms with a plain list.
    """
    arch, column = AUDIT_ARCH[os.uname().machine]
    LOAD, EQUAL, ABOVE, ANY, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06    # load; jump if =, >=, any bit; return
    PASS, DENY, KILL = 0x7FFF0000, 0x00050000, 0x80000000    # DENY | errno

    def argument(i):
        return (LOAD, 0, 0, 16 + 8 * i)    # low word of argument i in struct seccomp_data

    def search(borders, allowed):
        """borders: the numbers at which the answer changes between allowed and not; allowed: the answer below them."""
        if not borders:
            return [(RETURN, 0, 0, PASS if allowed else DENY | errno.EPERM)]
        middle = len(borders) // 2
        below = search(borders[:middle], allowed)
        return [(ABOVE, len(below), 0, borders[middle]), *below,
                *search(borders[middle + 1:], allowed ^ (middle % 2 == 0))]

    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    # clone: threads only (CLONE_THREAD), and what fork() of libc asks for. clone3 has its flags in memory, where a
    # filter cannot look: it "does not exist" (ENOSYS), and libc uses clone
    code += [(EQUAL, 0, 4 + parent, CLONE[column]), argument(0), *([(EQUAL, 1, 0, FORK)] if parent else []),
             (ANY, 0, 1, 0x10000), (RETURN, 0, 0, PASS), (RETURN, 0, 0, DENY | errno.EPERM)]
    code += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, DENY | errno.ENOSYS)]
    code += [(EQUAL, 0, 1, IOCTL[column]), (RETURN, 0, 0, DENY | errno.ENOTTY)]
    # its own limits and processors only (pid 0); the clocks of the machine, its own and its thread's (0 to 15): the
    # clocks of other processes have negative numbers
    for numbers, below in ((PRLIMIT, 1), (AFFINITY, 1), *((clock, 16) for clock in CLOCKS[parent:])):
        code += [(EQUAL, 0, 4, numbers[column]), argument(0), (ABOVE, 1, 0, below), (RETURN, 0, 0, PASS),
                 (RETURN, 0, 0, DENY | errno.EPERM)]
    code += [(EQUAL, 0, 2 + 2 * len(FCNTL_ALLOW), FCNTL[column]), argument(1)]
    for command in FCNTL_ALLOW:
        code += [(EQUAL, 0, 1, command), (RETURN, 0, 0, PASS)]
    code += [(RETURN, 0, 0, DENY | errno.EPERM)]
    allow = ALLOW | PARENT if parent else ALLOW
    borders = collections.Counter(n + end for pair in allow.values() for n in pair[column:column + 1] if n >= 0
                                  for end in (0, 1))
    return code + search(sorted(n for n, times in borders.items() if times == 1), False)


def pack_filter(code: list[tuple[int, int, int, int]]) -> ctypes.Structure:
    """struct sock_fprog for prctl. Its attribute `keep` is the array that it points to, which has to stay alive."""
    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    raw = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(raw, len(raw))
    program = Program(len(code), ctypes.addressof(buffer))
    program.keep = buffer
    return program


# ---- Landlock and capabilities (isolation B) ------------------------------------------------------------------------

def landlock(libc: ctypes.CDLL, paths: list[str]) -> None:
    """
    From now on this process can read `paths` and no other file, write only /dev/null, use no TCP, and signal only
    processes that it confined with itself; the last two if the kernel can (ABI 4 and 6). OSError without Landlock.
    """
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        raise OSError(f"Landlock is not available (ABI {abi})")
    rights = (1 << {1: 13, 2: 14}.get(abi, 15)) - 1    # all file rights of this ABI: handled means denied
    rights |= (1 << 15) if abi >= 5 else 0
    attr = struct.pack("QQQ", rights, 3, 3)[:8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(444, attr, len(attr), 0)
    if ruleset < 0:
        raise OSError("landlock_create_ruleset failed")
    for path in filter(os.path.exists, paths):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        # execute (map a library), read, read directory; read and write
        allowed = 0b1101 if os.path.isdir(path) else 0b0110 if path == os.devnull else 0b0101
        if libc.syscall(445, ruleset, 1, struct.pack("<Qi", allowed, fd), 0):
            raise OSError(f"landlock_add_rule failed for {path}")
        os.close(fd)
    if libc.prctl(38, 1, 0, 0, 0) or libc.syscall(446, ruleset, 0):
        raise OSError("landlock_restrict_self failed")
    os.close(ruleset)


def change_user(libc: ctypes.CDLL, uid: int, reads: bool = False) -> None:
    """
    Become user and group `uid`, with no other group, no way back and no power, or with one: reads, to read what that
    user could not (CAP_DAC_READ_SEARCH; Landlock still says which files there are). OSError if that fails.
    """
    for capability in range(64 if reads else 0):
        libc.prctl(24, capability, 0, 0, 0)    # PR_CAPBSET_DROP
    libc.prctl(8, int(reads), 0, 0, 0)    # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    power = 1 << 2 if reads else 0
    if reads and libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", power, power, 0, 0, 0, 0)):
        raise OSError("capset failed")    # version 3 (linux/capability.h): effective, permitted, inheritable


# ---- what a program finds as if the interpreter had started it ------------------------------------------------------

PRELUDE = {}    # what LeetCode puts in scope: the usual modules, and the names in them that no builtin has
sources = {}    # MAIN -> the program's bytes, in its own process: a program may open its own file


def dress(packages: dict[str, str]) -> None:
    """
    Make this interpreter look to a program like `python3 main.py`, in what the sandbox would show: exit(), devices
    without /dev, the depth of recursion without our own frames, big thread stacks in spite of the memory limit, and
    the packages (name -> folder) without the folder around them.
    """
    import _sitebuiltins
    import _thread

    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D (i.e. EOF)")    # site makes these, and -S leaves it out
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D (i.e. EOF)")
    builtins.help = _sitebuiltins._Helper()
    for name in ("copyright", "credits", "license"):
        setattr(builtins, name, _sitebuiltins._Printer(name, ""))
    sys.argv, sys.orig_argv = ["main.py"], ["python3", "main.py"]
    plain_open, plain_stack_size = io.open, _thread.stack_size
    get_limit, set_limit = sys.getrecursionlimit, sys.setrecursionlimit
    ours = 2 if sys.version_info >= (3, 12) else 4    # frames below a program: -c, this file; before 3.12 exec() twice

    def open(file, mode="r", *args, **kwargs):
        name = file if type(file) is int else os.fspath(file)
        if name in sources:
            raw = io.BytesIO(sources[name])
            return raw if "b" in mode else io.TextIOWrapper(raw, "utf-8")
        if name in DEVICES:
            file = os.dup(DEVICES[name])
        return plain_open(file, mode, *args, **kwargs)

    def stack_size(size=0):
        before = plain_stack_size(size)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard != resource.RLIM_INFINITY:    # what was claimed before stays claimed
            resource.setrlimit(resource.RLIMIT_AS, (min(hard, soft + size), hard))
        return before

    class Packages:
        @staticmethod
        def find_spec(name, path=None, target=None):
            folder = packages.get(name)
            return folder and importlib.util.spec_from_file_location(
                name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])

    os.putenv("OPENBLAS_NUM_THREADS", "1")    # for the library of numpy; os.environ does not show it
    builtins.open = io.open = functools.partial(open)    # like the builtin, it must not become a method in a class
    _thread.stack_size = stack_size
    if "threading" in sys.modules:
        sys.modules["threading"].stack_size = stack_size
    sys.getrecursionlimit = lambda: get_limit() - ours
    sys.setrecursionlimit = lambda limit: set_limit(min(limit + ours, (1 << 31) - 1) if limit > 0 else limit)
    set_limit(get_limit() + ours)
    sys.meta_path.append(Packages)


class Loader:
    """Where inspect and traceback find the lines of a program."""
    @staticmethod
    def get_source(_: str) -> str:
        return sources[MAIN].decode()


def main_module(name: str, program: str) -> dict:
    """The fresh namespace of a program, in sys.modules under `name`."""
    sources[MAIN] = program.encode()    # as bytes, so that a coding line counts
    module = sys.modules[name] = types.ModuleType(name)
    module.__dict__.update(__builtins__=builtins, __file__=MAIN, __cached__=None, __annotations__={}, __loader__=Loader)
    return module.__dict__


def fill_prelude() -> None:
    """Fill PRELUDE from WARM."""
    for module in (sys.modules[name] for name in WARM):
        for name in getattr(module, "__all__", None) or [name for name in dir(module) if name[0] != "_"]:
            if not hasattr(builtins, name):
                PRELUDE.setdefault(name, getattr(module, name))
    PRELUDE.update({name: sys.modules[name] for name in WARM})


# ---- the server -----------------------------------------------------------------------------------------------------

def prepare(cfg: dict) -> None:
    """
    What is done once: imports, and the confinement of the server itself. cfg: as box.box_command writes it; added are
    linux (bool), libc, filters (for seccomp, by kind of message: R, S; or None) and pid (of the server). Whatever the
    judge's process is like (descriptors, signals it blocks or ignores, limits), nothing of it reaches a program.
    """
    for fd in [os.dup2(fd, 60 + i) for i, fd in enumerate(cfg["fds"])]:
        os.dup2(fd, LINE + fd - 60)
    os.closerange(JOBS[1] + 1, max(256, min(1 << 20, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
    theirs = {signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ}    # the last is Python's
    for number in set(signal.valid_signals()) - theirs:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for name in {*os.environ} - {"PYTHONHASHSEED", "LC_CTYPE"}:    # the last is Python's own; see box.Box
        del os.environ[name]
    libc = ctypes.CDLL(None, use_errno=True)
    cfg |= {"linux": sys.platform == "linux", "libc": libc, "filters": dict.fromkeys((b"R", b"S")), "pid": os.getpid()}
    limit("NOFILE", 64, 64)
    limit("CORE", 0, 0)
    if cfg["linux"]:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)    # PR_SET_PDEATHSIG: no server without its judge
        libc.prctl(36, 1, 0, 0, 0)    # PR_SET_CHILD_SUBREAPER: orphans come back to us
        if hasattr(libc, "mallopt"):
            libc.mallopt(-8, 1)    # M_ARENA_MAX: otherwise each thread claims 64 MB of a program's address space
    # random would seed itself from the system after each fork, but verdicts must repeat
    os.register_at_fork, hook = lambda **_: None, os.register_at_fork
    for name in WARM:
        __import__(name)
    os.register_at_fork = hook
    sys.modules["random"].seed(0)
    fill_prelude()
    dress(cfg["packages"])
    if cfg["isolation"] == "B":
        if cfg["uid"]:
            change_user(libc, cfg["uid"], reads=cfg["drop_by"] == "capabilities")
            libc.prctl(1, signal.SIGKILL, 0, 0, 0)    # the change of user clears it
        landlock(libc, cfg["paths"])
    if cfg["isolation"] in "AB":
        libc.prctl(38, 1, 0, 0, 0)    # PR_SET_NO_NEW_PRIVS
        libc.prctl(4, 0, 0, 0, 0)     # PR_SET_DUMPABLE: no other process reads this one's memory or descriptors
        cfg["filters"] = {b"R": pack_filter(seccomp_filter()), b"S": pack_filter(seccomp_filter(parent=True))}
    gc.collect()
    gc.freeze()    # the collector must not write to, and so copy, the memory pages that children share


def limit(name: str, soft: int, hard: int) -> None:
    """Set one limit of this process, never above the hard one it has. OSError or ValueError where it does not exist."""
    kind = getattr(resource, "RLIMIT_" + name)
    top = resource.getrlimit(kind)[1]
    if top != resource.RLIM_INFINITY:
        soft, hard = min(soft, top), min(hard, top)
    resource.setrlimit(kind, (soft, hard))


def serve(cfg: dict) -> dict:
    """
    Wait for messages until the socket closes, then end the process. A message is (kind, integer, seconds):

        in    R   the child that waits gets a program: what it needs comes on JOBS
              S   the same for a whole program, whose tests it forks
              K   kill the child
              C   how much processor time has the child used?
        out   Z   ready
              E   the child has ended; integer: its wait status; seconds: its processor time
              C   seconds: processor time of the child so far

    -> in a child, and only there: the job, as box.Box.execute sends it.
    """
    prepare(cfg)
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_r, False)
    os.set_blocking(wake_w, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_w)
    pid, before = 0, 0.0                          # the child that runs a program; processor time of it before that
    ahead, turn = 0, 0                            # the child that waits for the next one, and at which socket
    os.write(LINE, MESSAGE.pack(b"Z", 0, 0.0))
    while True:
        if not ahead:
            ahead = os.fork()
            if not ahead:
                return child(cfg, JOBS[turn])
            turn = 1 - turn
        ready, _, _ = select.select([LINE, wake_r], [], [])
        if wake_r in ready:
            os.read(wake_r, 512)
        if LINE in ready:
            kind = os.read(LINE, MESSAGE.size)[:1]
            if not kind:    # the judge has gone: end with it
                end(pid)
                end(ahead)
                os._exit(0)
            if kind in (b"R", b"S"):
                pid, before, ahead = ahead, max(0.0, processor_time(ahead)), 0
            elif kind == b"K":
                end(pid)
            elif kind == b"C" and pid:    # no answer if it has ended: then the judge gets E instead
                used = processor_time(pid)
                os.write(LINE, MESSAGE.pack(b"C", 0, used if used < 0 else used - before))
        done, status, usage = os.wait4(pid, os.WNOHANG) if pid else (0, 0, None)
        if done:
            pid = 0
            if cfg["isolation"] == "C":
                sweep(done, ahead)
            else:
                end_group(done)
            os.write(LINE, MESSAGE.pack(b"E", status, max(0.0, usage.ru_utime + usage.ru_stime - before)))


def end(pid: int) -> None:
    """SIGKILL to the group of a child, and to the child alone in case it leads no group. pid 0: no child."""
    for kill in (os.killpg, os.kill) if pid else ():
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def end_group(pid: int) -> None:
    """Isolation A and B: a child that was killed leaves perhaps a test, which dies with it and is ours to bury."""
    end(pid)
    try:
        while True:
            os.waitpid(-pid, 0)
    except ChildProcessError:
        pass


def sweep(pid: int, ahead: int) -> None:
    """
    Isolation C has no filter against fork: end the group of a program that has ended, then every orphan that the kernel
    has handed to this process (Linux). ahead: the child that waits for the next program, and stays.
    """
    end(pid)
    children = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(children):
        with open(children) as file:
            orphans = set(map(int, file.read().split())) - {ahead}
        if not orphans:
            break
        for orphan in orphans:
            end(orphan)
            try:
                os.waitpid(orphan, 0)
            except ChildProcessError:
                pass


def processor_time(pid: int) -> float:
    """Processor seconds of another process, or -1. Its clock has the number (~pid << 3) | 2, as clock_getcpuclockid."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except (OSError, OverflowError, AttributeError):
        return -1.0


# ---- the child ------------------------------------------------------------------------------------------------------

def child(cfg: dict, socket: int) -> dict:
    """
    Wait at a socket for the descriptors of a program and its limits (memory in bytes, processor seconds), confine this
    process for good, then read the job and return it.

    The first line on RESULTS reports that the process is confined. It is written before a byte of the program is read,
    so that no program can make its own end look like a failure of the judge.
    """
    try:
        signal.set_wakeup_fd(-1)
        _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)    # signal.signal() touches, and so copies, 60 pages of memory
        # a group to be killed, with its tests. A session takes the kernel 2 ms, and programs in A and B cannot fork
        os.setsid() if cfg["isolation"] == "C" else os.setpgid(0, 0)
        if cfg["isolation"] == "A" and cfg["drop_by"] == "uid":
            change_user(cfg["libc"], cfg["uid"])
        if cfg["linux"]:
            cfg["libc"].prctl(1, signal.SIGKILL, 0, 0, 0)    # after the change of user, which clears it
        if os.getppid() != cfg["pid"]:
            os._exit(0)    # the server had died before that call
        jobs = _socket.socket(fileno=socket)    # without what socket.socket adds: pages that would be copied
        message, ((_, _, fds),), _, _ = jobs.recvmsg(MESSAGE.size, _socket.CMSG_LEN(24))
        jobs.detach()
        kind, memory, cpu_seconds = MESSAGE.unpack(message)
        fds = struct.unpack(f"{len(fds) // 4}i", fds)
        high = [os.dup2(fd, 40 + i) for i, fd in enumerate(fds)]    # out of the way of 0..4
        for i, fd in enumerate(high):
            os.dup2(fd, i)
        os.closerange(len(fds), 64)    # there are none above: prepare() has closed them and set NOFILE
        confine(cfg, int(cpu_seconds), memory, kind)
        del cfg["paths"], cfg["packages"], cfg["fds"]    # a program that walks up the stack finds the rest
        os.write(RESULTS, CONFINED)
        return read_job()
    except BaseException as error:
        os.write(STDERR, f"sandbox: {error!r}".encode())
        os._exit(97)


def confine(cfg: dict, cpu_seconds: int, memory: int, kind: bytes) -> None:
    """
    Limits and system call filter of a child. cpu_seconds: processor time, kept by the kernel; memory: bytes; kind: of
    the message that gave it its program.
    """
    # FSIZE 0: not a byte into any file
    for name, soft, hard in (("FSIZE", 0, 0), ("CPU", cpu_seconds, cpu_seconds), ("NOFILE", 32, 32),
                             ("AS", memory, memory + STACKS), ("NPROC", cfg["threads"], cfg["threads"])):
        try:
            limit(name, soft, hard)
        except (ValueError, OSError):
            if cfg["linux"]:
                raise    # elsewhere (isolation C) RLIMIT_AS may not exist
    install(cfg, kind)


def install(cfg: dict, kind: bytes) -> None:
    """The filter for hostile processes (R), or for the parent of tests (S)."""
    filter = cfg["filters"][kind]
    if filter and cfg["libc"].prctl(22, 2, ctypes.byref(filter), 0, 0):    # PR_SET_SECCOMP
        raise OSError("seccomp failed")


def read_job() -> dict:
    """The job, as marshal writes it. With "live" in it more comes on MORE."""
    with open(JOB, "rb") as file:
        job = marshal.loads(file.read())
    gc.freeze()    # as in prepare()
    return job


# ---- values on the wire: JSON, where what JSON has not is {"kind": ...} ----------------------------------------------

def encode(value: object) -> object:
    """
    A value of Python as JSON: decode() gives it back. A subclass counts as its base (Counter is dict, IntEnum is int,
    namedtuple is tuple). TypeError for everything that is not made of Python's own types.
    """
    kind = type(value)
    if value is None or kind is bool or isinstance(value, str):
        return value if kind is bool or value is None else str.__str__(value)
    if isinstance(value, int):
        value = int(value)
        return value if value.bit_length() < 10_000 else {"int": hex(value)}    # beyond: too long for decimal digits
    if isinstance(value, float):
        value = float(value)
        return value if value - value == 0 else {"float": repr(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for base in (tuple, set, frozenset, collections.deque):
        if isinstance(value, base):
            return {base.__name__: [encode(item) for item in value]}
    if isinstance(value, (bytes, bytearray)):
        return {kind.__name__: bytes(value).decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if kind.__name__ in ("Fraction", "Decimal") and kind.__module__ in ("fractions", "decimal"):
        return {kind.__name__: str(value)}
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item())
    raise TypeError(f"a result of type {kind.__name__} is not a value")


def decode(value: object) -> object:
    """
    The value that encode() wrote as JSON. ValueError for anything else, and for a set or dict of many keys that share
    their hashes: such a one takes hours to build.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, body),) = value.items()
    if kind == "dict":
        pairs = [(decode(key), decode(item)) for key, item in body]
        return dict(pairs) if unlike([key for key, _ in pairs]) else None
    if kind in ("tuple", "set", "frozenset", "deque"):
        items = [decode(item) for item in body]
        make = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}[kind]
        return make(items) if kind in ("tuple", "deque") or unlike(items) else None
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind](body.encode("latin-1"))
    if kind == "complex":
        return complex(*map(decode, body))
    if kind == "range":
        return range(*body)
    if kind == "int":
        return int(body, 16)
    if kind == "float":
        return float(body)
    if kind in ("Fraction", "Decimal") and "e" not in body.lower():    # 1e999999999 would be written out
        number = getattr(importlib.import_module({"Fraction": "fractions", "Decimal": "decimal"}[kind]), kind)(body)
        hash(number)
        return number
    raise ValueError(f"no kind of value: {kind!r:.40}")


def unlike(keys: list) -> bool:
    """True. ValueError if most of many keys have one hash."""
    if len(keys) > 1000 and 2 * len(set(map(hash, keys))) < len(keys):
        raise ValueError("keys that share their hashes")
    return True


# ---- programs -------------------------------------------------------------------------------------------------------

def describe(error: BaseException) -> str:
    """Type and text of an error; the program's own __str__ may fail."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return "exception"


def report(line: dict) -> None:
    """Write one result line."""
    data = json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(RESULTS, data):]


def requests(job: dict) -> Iterable[list]:
    """The calls to make: those of the job, or with "live" those that come on MORE, until it closes."""
    return map(json.loads, open(MORE, "rb")) if job["live"] else job["calls"]


def entry_of(names: str, scope: dict) -> Callable:
    """
    The function to call: "f", or a method "Class.method" of a new object. "f" is also a method of class Solution
    where the program has no function f, as on LeetCode.
    """
    first, *rest = names.split(".")
    absent = scope.get(first, PRELUDE.get(first)) is PRELUDE.get(first)
    if absent and "Solution" in scope:
        first, rest, absent = "Solution", [first, *rest], False
    if absent:
        raise NameError(f"the program has no {names}")
    value = scope[first]
    for name in rest:
        value = getattr(value() if isinstance(value, type) else value, name)
    return value


def run_calls(job: dict, scope: dict) -> None:
    """
    Run all call tests of one program; it does not run what stands under `if __name__ == "__main__"`. A call is
    ["json", arguments as JSON text], ["expression", text that is evaluated in the program's names, perhaps statements
    before it], or ["values", arguments, [names of keyword arguments, their values]] as encode() writes
    them. Each gives one line of JSON on RESULTS:

        {"i": index, "v": value}, or with "e": error in place of "v"

    The line with index -1 comes first and tells whether the program loaded.
    """
    line, entry = {"i": -1}, job["entry"]
    try:
        exec(compile(sources[MAIN], MAIN, "exec", dont_inherit=True), scope)
        entry_of(entry, scope)
    except BaseException as error:
        line["e"] = describe(error)
    report(line)
    for i, (kind, what, *rest) in enumerate(requests(job) if "e" not in line else ()):
        try:    # arguments are made anew, a method gets a new object: a program may change them
            if kind == "json":
                value = entry_of(entry, scope)(*json.loads(what))
            elif kind == "values":
                (names, values), = rest
                value = entry_of(entry, scope)(*map(decode, what), **dict(zip(names, map(decode, values), strict=True)))
            else:
                function = entry_of(entry, scope)
                exec(*rest or ("",), scope)
                value = eval(what, scope, {"candidate": function, entry: function})
            report({"i": i, "v": encode(value)})
        except BaseException as error:
            report({"i": i, "e": describe(error)})
    os._exit(0)


def run_check(job: dict, scope: dict) -> None:
    """
    Run the code of a test in a process of its own, where `candidate` and the entry's name stand for the function under
    test. What the code calls it with goes out as a line, and the next line on MORE is what the function gave:

        {"i": n, "v": ["call", arguments, names of keyword arguments, their values]}, answered by {"v": value} or
        {"e": error}; at last {"i": n, "v": ["passed"]} or {"i": n, "v": ["failed", error]}
    """
    answers, n = map(json.loads, open(MORE, "rb")), 0

    def candidate(*args, **kwargs):
        nonlocal n
        report({"i": n, "v": ["call", [*map(encode, args)], [*kwargs], [*map(encode, kwargs.values())]]})
        n += 1
        answer = next(answers)
        if "e" in answer:
            name, _, text = answer["e"].partition(": ")
            kind = getattr(builtins, name, Exception)
            raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else Exception)(text)
        return decode(answer["v"])

    report({"i": -1})
    try:
        scope |= {"sys": sys, "candidate": candidate, job["entry"]: candidate}
        exec(compile(sources[MAIN], MAIN, "exec", dont_inherit=True), scope)
        verdict = ["passed"]
    except BaseException as error:
        verdict = ["failed", describe(error)]
    report({"i": n, "v": verdict})
    os._exit(0)


def fork_tests(cfg: dict) -> types.CodeType | None:
    """
    The process of a whole program: forks a test for each START on MORE, ends it when its time is up, and writes ENDED.
    It never runs a line of the program, and what a test does is gone with the test: nothing of it comes back but what
    the kernel says of its end.

    -> in a test, and only there, when it is confined: the program's code; None where it could not be compiled.
    """
    code, me, test, late = None, os.getpid(), 0, False
    message = os.read(MORE, START.size)
    cpu, _ = START.unpack(message)
    _signal.setitimer(_signal.ITIMER_PROF, cpu)    # the kernel ends this process if the compiler takes longer
    sys.stderr = None    # no warnings here
    try:
        code = compile(sources[MAIN], MAIN, "exec", dont_inherit=True)
    except BaseException:
        pass    # the test finds this error again, and has the streams for it
    sys.stderr = sys.__stderr__
    _signal.setitimer(_signal.ITIMER_PROF, 0)

    def look(*_):
        nonlocal late
        now, used = time.monotonic(), processor_time(test) if test else 0.0
        late = bool(test) and (used < 0 or used >= 0.97 * cpu or now >= until)
        try:
            if late:
                os.kill(test, signal.SIGKILL)
            elif test:
                _signal.setitimer(_signal.ITIMER_REAL, max(0.01, min(cpu - used, until - now)))
        except ProcessLookupError:    # it has just ended
            pass

    _signal.signal(_signal.SIGALRM, look)
    while message:
        cpu, wall = START.unpack(message)
        late, until, test = False, time.monotonic() + wall, os.fork()
        if not test:
            confine_test(cfg, me)
            return code
        _signal.setitimer(_signal.ITIMER_REAL, min(cpu, wall))
        _, status, usage = os.wait4(test, 0)
        test = 0
        os.write(RESULTS, ENDED.pack(status, late, usage.ru_utime + usage.ru_stime))
        message = os.read(MORE, START.size)
    os._exit(0)


def confine_test(cfg: dict, parent: int) -> None:
    """What a test, just forked by `parent`, does before it runs the program: then it has its three streams alone."""
    try:
        _signal.signal(_signal.SIGALRM, _signal.SIG_DFL)
        if cfg["linux"]:
            cfg["libc"].prctl(1, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)    # it had died before that call
        install(cfg, b"R")
        os.closerange(RESULTS, MORE + 1)
    except BaseException:
        os.write(RESULTS, b"!")    # no ENDED begins so: the judge gives up this box
        os._exit(97)


def exit_status(error: BaseException) -> int:
    """What the interpreter does with an error that nobody caught: the text goes to stderr, the number is returned."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 255 if -1 << 63 <= (error.code or 0) < 1 << 63 else 255
        print(error.code, file=sys.stderr)
    else:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next    # without our own frame
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except BaseException as other:
            sys.__excepthook__(type(other), other, other.__traceback__)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def flushed(status: int) -> int:
    """Flush stdout and stderr. -> status, or 120 where stdout cannot be flushed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException:
            status = 120 if stream is sys.stdout else status
    return status


def shut_down(status: int) -> None:
    """
    End the process as the interpreter ends (Py_FinalizeEx): join the threads, call what was registered for the exit,
    flush; then the program's names die, so that files are closed, generators and __del__ run; flush again.
    """
    flushed(0)
    for act in (lambda: "threading" in sys.modules and sys.modules["threading"]._shutdown(), atexit._run_exitfuncs):
        try:
            act()
        except BaseException as error:
            sys.__excepthook__(type(error), error, error.__traceback__)
    status = flushed(status)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    sys.modules.pop("__main__", None)
    gc.collect()
    flushed(status)    # where this fails the interpreter says nothing
    os._exit(status)


if __name__ == "__main__":
    cfg = json.loads(sys.argv[2])
    job = serve(cfg)    # returns in a child only
    scope = main_module({"stdio": "__main__", "call": "solution", "check": "check"}[job["kind"]], job["program"])
    if job["kind"] != "stdio":
        if job["kind"] == "check" or "." in job["entry"] or "class Solution" in job["program"]:
            scope |= PRELUDE
        (run_calls if job["kind"] == "call" else run_check)(job, scope)
    status, code = 0, fork_tests(cfg)    # returns in a test only
    try:
        exec(code or compile(sources[MAIN], MAIN, "exec", dont_inherit=True), scope)
    except BaseException as error:
        scope = None
        flushed(0)
        status = exit_status(error)
    scope = None
    shut_down(status)
