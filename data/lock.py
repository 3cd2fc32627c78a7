"""
One run, one folder. Who writes to a folder or a file holds its lock; a second run there ends with one line that names
who does.

    lock = hold(run / "run.lock")       # UserError on all ranks when somebody else holds it
    ...
    lock.release()                      # also at the end of the process, whatever ends it but SIGKILL and a power cut

The lock is a small JSON file: host, pid, start of the process, command. It is made by link(), which is atomic on NFS
too, and its owner touches it every BEAT seconds. What becomes of one that is there:

    its process is dead, on this machine                         taken over, one line says so. A process is its pid and
                                                                 its start: a pid that was given again is another one
    this host, or container, before it was started again         taken over, one line says so
    (a power cut), and untouched for SILENT seconds
    another host                                                 refused, even when it is silent for days: nobody can
                                                                 see from here whether its process lives or hangs. The
                                                                 line says since when it is silent, and what to delete

Two that find a dead lock at the same moment: the one that makes LOCK.after, again by link(), may replace it.

    cat out/tiny/base/run.lock
"""
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from configurator import UserError, at_end, os_words
from data.text import shown
from distributed import all_gather_object, ranks

BEAT, SILENT = 15, 60           # seconds


def hold(path: str | Path) -> "Lock":
    """
    Take the lock `path` on rank 0, whose folder is made if need be. UserError on every rank when it is held; a
    collective where there are several ranks.
    """
    lock, wrong = Lock(Path(path)), None
    if ranks()[0] == 0:
        try:
            wrong = lock.take()
        except OSError as e:
            wrong = os_words(e)
    if wrong := all_gather_object(wrong)[0]:
        raise UserError(wrong)
    return lock


class Lock:
    """A lock file, held or not. release() of one that is not held does nothing."""
    def __init__(self, path: Path):
        self.path, self.held, self.ended = path, False, threading.Event()
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        self.me = {"host": socket.gethostname(), "machine": machine(), "pid": pid, "start": start_of(pid),
                   "since": since, "command": " ".join(sys.argv)[:200], "token": uuid.uuid4().hex}

    def take(self) -> str | None:
        """None when it is ours now, else who holds it, in words. OSError when the folder cannot be written."""
        self.me["folders"] = [str(p) for p in self.path.parents if not p.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = self.path.with_name(f".{self.path.name}.{self.me['token']}")
        try:
            with open(mine, "w", encoding="utf-8") as f:
                json.dump(self.me, f)
                f.flush()
                os.fsync(f.fileno())
            for _ in range(50):
                self.held = made(mine, self.path)
                wrong = None if self.held else self.take_over(mine)
                if wrong:
                    return wrong
                if self.held:
                    break
            else:
                return f"{self.path} changes hands all the time: start one run in this folder, not many"
        finally:
            mine.unlink(missing_ok=True)
        at_end.callback(self.release)
        threading.Thread(target=self.beat, name="lock", daemon=True).start()
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))      # so that at_end has its turn
        return None

    def take_over(self, mine: Path) -> str | None:
        """The file is there: who holds it, in words; None when it is ours now (held), or to try again."""
        try:
            holder, silent = read(self.path), now(mine) - self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        if holder is None and silent < 5:              # being written, where there is no link()
            time.sleep(0.1)
            return None
        dead, who = self.judge(holder, silent)
        if not dead:
            return who
        right = self.path.with_name(f"{self.path.name}.after")
        if not made(mine, right):
            with suppress(FileNotFoundError):
                if now(mine) - right.stat().st_mtime > 5:
                    return f"{who}; a run that would take over was ended at it: delete {self.path} and {right}"
            time.sleep(0.1)
            return None
        try:
            if read(self.path) == holder:              # and nobody was faster
                os.replace(mine, self.path)
                self.held, self.me["folders"] = True, holder.get("folders", [])
                if holder["pid"] != os.getpid():
                    print(shown(f"note: {who}, which has ended without releasing it: this run takes over", lines=False),
                          file=sys.stderr)
        finally:
            right.unlink()
        return None

    def judge(self, holder: dict | None, silent: float) -> tuple[bool, str]:
        """(may its lock be taken over, who it is in words). silent: seconds since somebody touched the lock."""
        folder, quiet = self.path.parent, f"last sign of life {max(0, silent):,.0f} s ago"
        if holder is None:
            return False, f"{self.path} is there and is no lock of this project: delete it if no run works in {folder}"
        who = (f"{self.path}: held by pid {holder['pid']} on {holder['host']} since {holder['since']} "
               f"({holder['command']})")
        here = holder["host"] == self.me["host"]
        if here and holder["machine"] == self.me["machine"]:
            ours = holder["pid"] == os.getpid()        # of an earlier call in this process that ended with an error
            if ours or not alive(holder["pid"], holder["start"]):
                return True, who
            return False, f"{who}, {quiet}: wait for its end, or give another --out"
        if here and silent > SILENT:                   # its host has been started again
            return True, who
        return False, (f"{who}, {quiet}, which cannot be looked at from here ({self.me['host']}): give another --out, "
                       f"or, if you know that it is dead, delete {self.path}")

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def beat(self) -> None:
        """Touch the file until the end. Whoever deleted it may have started another run: then this one ends."""
        while not self.ended.wait(BEAT):
            with suppress(OSError):                    # the disk may be away for a while
                holder = read(self.path) if self.path.exists() else {}
                if holder and holder["pid"] == os.getpid() and holder["token"] != self.me["token"]:
                    return                             # a later call in this process
                if holder and holder["token"] != self.me["token"] and not self.ended.is_set():
                    print(f"error: {self.path} was taken away from this run, by pid {holder['pid']} on "
                          f"{holder['host']}: ending", file=sys.stderr)
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                if holder:
                    os.utime(self.path)

    def release(self) -> None:
        """Remove the file, and the folders that were made for it if nothing else has come."""
        if not self.held or self.me["pid"] != os.getpid():          # a forked child has a copy of this object
            return
        self.held = False
        self.ended.set()
        with suppress(OSError):
            if (read(self.path) or {}).get("token") == self.me["token"]:
                self.path.unlink()
            for folder in self.me["folders"]:
                os.rmdir(folder)


def made(mine: Path, path: Path) -> bool:
    """Was `path` made with the content of `mine`? False when it was there already. OSError for anything else."""
    try:
        os.link(mine, path)
        return True
    except FileExistsError:
        with suppress(OSError):                        # NFS repeats a request whose answer was lost: it was ours
            return os.path.samefile(mine, path)
        return False
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES):
            raise
    try:                                               # a file system without hard links
        with open(path, "xb") as f:
            f.write(mine.read_bytes())
        return True
    except FileExistsError:
        return False


def read(path: Path) -> dict | None:
    """What a lock file says; None if it is not one. FileNotFoundError when it is gone."""
    if path.exists() and not path.is_file():           # a pipe or a device would be waited for without end
        return None
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        right = 0 < holder["pid"] < 2**31 and all(isinstance(holder[k], str) for k in
                                                  ("host", "machine", "start", "since", "command", "token"))
        return holder if right and type(holder["pid"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def now(path: Path) -> float:
    """The time by the clock of the server that `path` lies on: file times of other machines compare with it alone."""
    os.utime(path)
    return path.stat().st_mtime


def machine() -> str:
    """This start of this machine, and this container on it: the pids of others say nothing here. "" where unknown."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    return ""


def start_of(pid: int) -> str:
    """When a process was started, in the system's own words; "" if there is none, or only its corpse."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]     # proc(5): state is field 3, the start field 22
    except OSError:
        if sys.platform == "linux":
            return ""
    words = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True,
                           env={**os.environ, "LC_ALL": "C"})
    return words.stdout.strip()


def alive(pid: int, start: str) -> bool:
    """Does the process with this pid and this start run on this machine?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:                            # another user's, of whom /proc may say nothing
        return start_of(pid) in (start, "")
    return start_of(pid) == start
