"""
The inside of the judge's sandbox: a warm interpreter that forks one confined process for every program.

Report, section 3.2: code rewards come from unit tests that an online judge runs. This file is all of ours that runs
inside a box: box.py starts it, and the expected outputs stay in the judge's process. A bare interpreter with an empty
environment reads it, so it imports the standard library only. There are two kinds of process:

- the server (trusted) imports the usual modules once, then waits for jobs. It never reads a program, an input or an
  output: a job arrives as open file descriptors, so nothing of one program is left in memory for the next.
- the child (hostile) is a fork of the unused server; it runs exactly one program and ends. Before it reads the program
  it closes every other descriptor, sets its limits, becomes an unused user, and installs a seccomp filter that allows
  some seventy system calls: no process creation, no signals, no sockets, no exec, no mount, no change of a file.

A fork of a warm interpreter takes 1 to 2 ms, a fresh sandboxed interpreter about 30 ms.
"""
import builtins
import ctypes
import errno
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import types

MESSAGE = struct.Struct("<cid")    # (operation, integer, seconds): the fixed-size message in both directions
STDIN, STDOUT, STDERR, RESULTS, JOB = range(5)    # descriptors of a child
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
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, -1),
    "pipe": (22, -1), "select": (23, -1), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233),
    "dup": (32, 23), "dup2": (33, -1), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93),
    "wait4": (61, 260), "uname": (63, 160), "getcwd": (79, 17), "chdir": (80, 49), "readlink": (89, -1),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178),
    "time": (201, -1), "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
    "set_tid_address": (218, 96), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "openat": (257, 56),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72),
    "ppoll": (271, 73), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "dup3": (292, 24),
    "pipe2": (293, 59), "getcpu": (309, 168), "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291),
    "rseq": (334, 293), "close_range": (436, 436), "faccessat2": (439, 439),
}
CLONE, CLONE3, FCNTL, IOCTL, PRLIMIT = (56, 220), (435, 435), (72, 25), (16, 29), (302, 261)
# DUPFD GETFD SETFD GETFL DUPFD_CLOEXEC. Not SETOWN and SETSIG: together they send any signal to any process of the same
# user. Not SETPIPE_SZ: it takes memory that RLIMIT_AS does not count.
FCNTL_ALLOW = (0, 1, 2, 3, 1030)
AUDIT_ARCH = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


def seccomp_filter() -> list[tuple[int, int, int, int]]:
    """
    The classic BPF program as instructions (code, jt, jf, k): after a comparison the next jt (true) or jf (false)
    instructions are left out. Source: linux/seccomp.h, linux/filter.h.
    """
    arch, column = AUDIT_ARCH[os.uname().machine]
    LOAD, EQUAL, ANY, RETURN = 0x20, 0x15, 0x45, 0x06    # load; jump if equal; jump if any bit; return
    PASS, DENY, KILL = 0x7FFF0000, 0x00050000, 0x80000000    # DENY | errno

    def argument(i):
        return (LOAD, 0, 0, 16 + 8 * i)    # low word of argument i in struct seccomp_data

    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for numbers in ALLOW.values():
        if numbers[column] >= 0:
            code += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, PASS)]
    # clone: threads only (CLONE_THREAD). clone3 has its flags in memory, where a filter cannot look: it "does not
    # exist" (ENOSYS), and libc uses clone
    code += [(EQUAL, 0, 4, CLONE[column]), argument(0), (ANY, 0, 1, 0x10000), (RETURN, 0, 0, PASS),
             (RETURN, 0, 0, DENY | errno.EPERM)]
    code += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, DENY | errno.ENOSYS)]
    code += [(EQUAL, 0, 1, IOCTL[column]), (RETURN, 0, 0, DENY | errno.ENOTTY)]
    # prlimit: its own limits only (pid 0)
    code += [(EQUAL, 0, 4, PRLIMIT[column]), argument(0), (EQUAL, 0, 1, 0), (RETURN, 0, 0, PASS),
             (RETURN, 0, 0, DENY | errno.EPERM)]
    code += [(EQUAL, 0, 1 + 2 * len(FCNTL_ALLOW), FCNTL[column]), argument(1)]
    for command in FCNTL_ALLOW:
        code += [(EQUAL, 0, 1, command), (RETURN, 0, 0, PASS)]
    code += [(RETURN, 0, 0, DENY | errno.EPERM)]
    return code


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
    From now on this process can read `paths` and no other file, write none, use no TCP, and signal only processes that
    it confined with itself; the last two if the kernel can (ABI 4 and 6). OSError if there is no Landlock.
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
        allowed = 0b1101 if os.path.isdir(path) else 0b0101    # execute (map a library), read, read directory
        if libc.syscall(445, ruleset, 1, struct.pack("<Qi", allowed, fd), 0):
            raise OSError(f"landlock_add_rule failed for {path}")
        os.close(fd)
    if libc.prctl(38, 1, 0, 0, 0) or libc.syscall(446, ruleset, 0):
        raise OSError("landlock_restrict_self failed")
    os.close(ruleset)


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root without its powers: all capability sets become empty (linux/capability.h). OSError if that fails."""
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)    # PR_CAPBSET_DROP
    if libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)):
        raise OSError("capset failed")


def change_user(uid: int) -> None:
    """Become user and group `uid`, with no other group and no way back."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


# ---- the server -----------------------------------------------------------------------------------------------------

def prepare(cfg: dict) -> None:
    """
    What is done once: imports, and the confinement of the server itself. cfg: as box.box_command writes it; added are
    linux (bool), libc, filter (for seccomp, or None) and pid (of the server).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    cfg |= {"linux": sys.platform == "linux", "libc": libc, "filter": None, "pid": os.getpid()}
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if cfg["linux"]:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)    # PR_SET_PDEATHSIG: no server without its judge
        libc.prctl(36, 1, 0, 0, 0)    # PR_SET_CHILD_SUBREAPER: orphans come back to us
    for name in WARM:
        __import__(name)
    builtins.exit = builtins.quit = sys.exit    # the module site makes them, and -S leaves it out
    if cfg["isolation"] == "B":
        if cfg["drop_by"] == "uid":
            change_user(cfg["uid"])
        elif cfg["drop_by"] == "capabilities":
            drop_capabilities(libc)
        landlock(libc, cfg["paths"])
    if cfg["isolation"] in "AB":
        libc.prctl(38, 1, 0, 0, 0)    # PR_SET_NO_NEW_PRIVS
        cfg["filter"] = pack_filter(seccomp_filter())
    gc.collect()
    gc.freeze()    # the collector must not write to, and so copy, the memory pages that children share


def serve(cfg: dict) -> None:
    """
    Wait for messages until the socket closes. A message is (kind, integer, seconds):

        in    R   run a program; integer: its processor seconds; with it the 5 descriptors of a child
              K   kill the child
              C   how much processor time has the child used?
        out   Z   ready
              E   the child has ended; integer: its wait status; seconds: its processor time
              C   seconds: processor time of the child so far
    """
    sock = socket.socket(fileno=cfg["fd"])
    prepare(cfg)
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_r, False)
    os.set_blocking(wake_w, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_w)
    pid = 0
    sock.sendall(MESSAGE.pack(b"Z", 0, 0.0))
    while True:
        ready, _, _ = select.select([sock, wake_r], [], [])
        if wake_r in ready:
            os.read(wake_r, 512)
            done, status, usage = os.wait4(pid, os.WNOHANG) if pid else (0, 0, None)
            if done:
                pid = 0
                if cfg["isolation"] == "C":
                    sweep(done)
                sock.sendall(MESSAGE.pack(b"E", status, usage.ru_utime + usage.ru_stime))
        if sock in ready:
            message, fds, _, _ = socket.recv_fds(sock, MESSAGE.size, 5, socket.MSG_WAITALL)
            if not message:    # the judge has gone: end with it
                return end(pid)
            kind, number, _ = MESSAGE.unpack(message)
            if kind == b"R":
                pid = os.fork()
                if not pid:
                    child(cfg, number, fds)
                for fd in fds:
                    os.close(fd)
            elif kind == b"K":
                end(pid)
            elif kind == b"C" and pid:    # no answer if it has ended: then the judge gets E instead
                sock.sendall(MESSAGE.pack(b"C", 0, processor_time(pid)))


def end(pid: int) -> None:
    """SIGKILL to the group of a child, and to the child alone in case it leads no group yet. pid 0: no child."""
    for kill in (os.killpg, os.kill) if pid else ():
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def sweep(pid: int) -> None:
    """
    Isolation C has no filter against fork: end the group of a program that has ended, then every orphan that the kernel
    has handed to this process (Linux).
    """
    end(pid)
    children = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(children) and (orphans := open(children).read().split()):
        for orphan in map(int, orphans):
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

def child(cfg: dict, cpu_seconds: int, fds: list[int]) -> None:
    """
    Confine this process for good, then run its one program. Never returns.

    The first line on RESULTS reports that the process is confined. It is written before a byte of the program is read,
    so that no program can make its own end look like a failure of the judge.
    """
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        high = [os.dup2(fd, 40 + i) for i, fd in enumerate(fds)]    # out of the way of 0..4
        for i, fd in enumerate(high):
            os.dup2(fd, i)
        os.closerange(5, 64)
        confine(cfg, cpu_seconds)
        sys.modules["random"].seed(0)    # fork() has just seeded it from the system, but verdicts must repeat
        os.write(RESULTS, b"{}\n")
        job = b""
        while block := os.read(JOB, 1 << 20):
            job += block
        os.close(JOB)
        job = json.loads(job)
    except BaseException as error:
        os.write(STDERR, f"sandbox: {error!r}".encode())
        os._exit(97)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    run_call(job, main) if job["entry"] else run_stdio(job, main)


def confine(cfg: dict, cpu_seconds: int) -> None:
    """Limits, user and system call filter of a child. cpu_seconds: processor time, kept by the kernel."""
    # FSIZE 0: not a byte into any file
    limits = {"FSIZE": 0, "CPU": cpu_seconds, "NOFILE": 32, "AS": cfg["memory"]}
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        except (ValueError, OSError):
            if cfg["linux"]:
                raise    # elsewhere (isolation C) RLIMIT_AS may not exist
    if cfg["isolation"] == "A" and cfg["drop_by"] == "uid":
        change_user(cfg["uid"])
    if cfg["linux"]:
        cfg["libc"].prctl(1, signal.SIGKILL, 0, 0, 0)    # after the change of user, which clears it
    if os.getppid() != cfg["pid"]:
        os._exit(0)    # the server had died before that call
    if cfg["filter"] and cfg["libc"].prctl(22, 2, ctypes.byref(cfg["filter"]), 0, 0):    # PR_SET_SECCOMP
        raise OSError("seccomp failed")


def describe(error: BaseException) -> str:
    """Type and text of an error; the program's own __str__ may fail."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return "exception"


def json_types(value: object) -> object:
    """The same value, made of JSON's own types; a tuple becomes a list. TypeError for every other type."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        return [json_types(item) for item in value]
    if kind is dict and all(type(key) is str for key in value):
        return {key: json_types(item) for key, item in value.items()}
    raise TypeError(f"a result of type {kind.__name__} is not JSON")


def run_call(job: dict, main: types.ModuleType) -> None:
    """
    Run all call tests of one program. Each gives one line of JSON on RESULTS:

        {"i": index, "v": value, "c": processor seconds so far}, or with "e": error in place of "v"

    The line with index -1 comes first and tells whether the program loaded.
    """
    def report(line: dict) -> None:
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[os.write(RESULTS, data):]

    line = {"i": -1}
    try:
        exec(compile(job["program"], "<program>", "exec"), main.__dict__)
        function = main
        for name in job["entry"].split("."):    # "f", or "Solution.f" for a method
            function = getattr(function() if isinstance(function, type) else function, name)
    except BaseException as error:
        line["e"] = describe(error)
    report(line | {"c": time.process_time()})
    for i, text in enumerate(job["inputs"] if "e" not in line else ()):
        line = {"i": i}
        try:
            line["v"] = json_types(function(*json.loads(text)))    # parsed anew: a program may change its arguments
            line["c"] = time.process_time()
            report(line)
        except BaseException as error:    # also an integer with too many digits, in report()
            report({"i": i, "e": describe(error), "c": time.process_time()})
    os._exit(0)


def run_stdio(job: dict, main: types.ModuleType) -> None:
    """Run a whole program, standard input to standard output. Exit status 0, or 1 with the error on stderr."""
    sys.stdin, sys.stdout = open(STDIN, encoding="utf-8"), open(STDOUT, "w", encoding="utf-8")
    code = 0
    try:
        try:
            exec(compile(job["program"], "<program>", "exec"), main.__dict__)
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()    # some contest programs start threads and do not join them
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()    # others write their output at exit
        sys.stdout.flush()
    except BaseException as error:
        os.write(STDERR, describe(error).encode("utf-8", "replace"))
        code = 1
    os._exit(code & 255)


if __name__ == "__main__":
    serve(json.loads(sys.argv[2]))
