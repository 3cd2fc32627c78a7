"""Whole programs: what the judge runs is what `python3 main.py < input` runs, idiom by idiom."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from configurator import UserError
from data.problems import Test
from judge import Judge
from judge.box import Bounds, Box, choose_isolation

if os.name != "posix":
    pytest.skip("the judge needs a POSIX system", allow_module_level=True)

GIVEN = "5\n1 2 3 4 5\nhello world\nüñí\nlast line without newline"
READ = "n = int(input())\n"
FASTIO = """
import os, sys
from io import BytesIO, IOBase
class FastIO(IOBase):
    newlines = 0
    def __init__(self, file):
        self._fd = file.fileno()
        self.buffer = BytesIO()
        self.writable = "x" in file.mode or "r" not in file.mode
        self.write = self.buffer.write if self.writable else None
    def read(self):
        while True:
            b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
            if not b:
                break
            ptr = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
        self.newlines = 0
        return self.buffer.read()
    def readline(self):
        while self.newlines == 0:
            b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
            self.newlines = b.count(b"\\n") + (not b)
            ptr = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
        self.newlines -= 1
        return self.buffer.readline()
    def flush(self):
        if self.writable:
            os.write(self._fd, self.buffer.getvalue())
            self.buffer.truncate(0), self.buffer.seek(0)
class IOWrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush = self.buffer.flush
        self.writable = self.buffer.writable
        self.write = lambda s: self.buffer.write(s.encode("utf8"))
        self.read = lambda: self.buffer.read().decode("utf8")
        self.readline = lambda: self.buffer.readline().decode("utf8")
sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip("\\r\\n")
print(int(input()) ** 2)
print(sum(map(int, input().split())))
sys.stdout.flush()
"""
PROGRAMS = {
    # ---- reading
    "input": "n = int(input())\nprint(sum(map(int, input().split())), n)",
    "input to the end": "while True:\n    try: print(input()[::-1])\n    except EOFError: break",
    "input past the end": "for _ in range(9): print(len(input()))",
    "prompt": "n = input('how many? ')\nprint(n)",
    "stdin.readline": "import sys\ninput = sys.stdin.readline\nprint(int(input()))\nprint(repr(input()))",
    "stdin.read": "import sys\nprint(len(sys.stdin.read().split()))",
    "stdin.readlines": "import sys\nprint([len(line) for line in sys.stdin.readlines()])",
    "for line in stdin": "import sys\nfor line in sys.stdin: print(line.strip().upper())",
    "iter(input, '')": "for line in iter(input, 'hello world'): print(line)",
    "stdin.buffer": "import sys\nprint(sys.stdin.buffer.readline(), sys.stdin.buffer.read())",
    "buffer after text": "import sys\nprint(sys.stdin.readline())\nprint(sys.stdin.buffer.read())",
    "stdin.detach": "import sys\nprint(sys.stdin.detach().read())",
    "open(0)": "print(open(0).read().split())",
    "open(0) lines": "n, xs, *rest = open(0)\nprint(n, xs, rest)",
    "open(0, 'rb')": "with open(0, 'rb') as f: print(f.read())",
    "rebound open(0)": "import sys\nsys.stdin = open(0)\nprint(int(input()) ** 2)",
    "/dev/stdin": "with open('/dev/stdin') as f: print(f.read())",
    "/dev/fd/0": "print(open('/dev/fd/0', 'rb').read())",
    "pathlib": "import pathlib\nprint(pathlib.Path('/dev/stdin').read_text())",
    "os.read": "import os\nprint(os.read(0, 4), os.read(0, 100000))",
    "os.read of st_size": "import os\nprint(os.read(0, os.fstat(0).st_size))",
    "os.fdopen": "import os\nprint(os.fdopen(0).read())",
    "io.open": "import io\nprint(io.open(0, encoding='utf-8', newline='').read())",
    "io.BytesIO": "import io, os\nf = io.BytesIO(os.read(0, 10**6)).readline\nprint(f(), f())",
    "mmap": "import mmap\nm = mmap.mmap(0, 0, prot=mmap.PROT_READ)\nprint(m.readline(), len(m))",
    "fileinput": "import fileinput\nfor line in fileinput.input(): print(fileinput.lineno(), line, end='')",
    "seek and tell":
        "import sys\nsys.stdin.readline()\nsys.stdin.seek(0)\n"
        "print(sys.stdin.read(3), sys.stdin.seekable())",
    "stdin as buffer": "import sys\nsys.stdin = sys.stdin.buffer\nprint(sys.stdin.readline())",
    "TextIOWrapper of stdin":
        "import sys, io\nsys.stdin = io.TextIOWrapper(sys.stdin.buffer, encoding='utf-8')\n"
        "print(input())",
    "StringIO and back":
        "import sys, io\nsys.stdin = io.StringIO('7')\nprint(input())\nsys.stdin = sys.__stdin__\n"
        "print(input())",
    "reconfigure": "import sys\nsys.stdin.reconfigure(encoding='latin-1')\nprint(ascii(sys.stdin.read()))",
    "names of the streams":
        "import sys\n"
        "print(sys.stdin.name, sys.stdout.name, sys.stdin.mode, sys.stdin.encoding, sys.stdin.fileno())",
    "isatty": "import sys, os\nprint(sys.stdin.isatty(), sys.stdout.isatty(), os.isatty(0), sys.stdout.seekable())",
    "closed stdin": "import sys\nsys.stdin.close()\nprint(1)",
    "select": "import select, sys\nprint(len(select.select([sys.stdin], [], [], 1)[0]))",
    "csv": "import csv, sys\nprint(list(csv.reader(sys.stdin, delimiter=' ')))",
    "json of stdin": "import json, sys\nprint(json.loads(sys.stdin.readline()))",
    "sys.stdin.read(1)": "import sys\nprint(repr(sys.stdin.read(1)), repr(sys.stdin.read(2)))",
    # ---- writing
    "print": READ + "print(n, n * n, sep=',', end='!\\n')",
    "print, flush": READ + "print(n, flush=True)",
    "no newline at the end": "import sys\nsys.stdout.write('x')",
    "stdout.buffer": READ + "import sys\nsys.stdout.buffer.write(b'%d\\n' % n)",
    "text, then buffer": "import sys\nprint('a')\nsys.stdout.buffer.write(b'b\\n')\nprint('c')",
    "writelines": "import sys\nsys.stdout.writelines(f'{i}\\n' for i in range(3000))",
    "os.write": "import os\nprint('late')\nos.write(1, b'first\\n')",
    "sys.__stdout__": READ + "import sys\nprint(n * n, file=sys.__stdout__)",
    "open(1, 'w')": READ + "out = open(1, 'w')\nout.write(str(n * n))",
    "open(1), closed": READ + "with open(1, 'w', closefd=False) as out: out.write(str(n))\nprint('after')",
    "rebound to open(1)": READ + "import sys\nsys.stdout = open(1, 'w')\nprint(n * n)",
    "os.fdopen(1)": READ + "import sys, os\nsys.stdout = os.fdopen(1, 'w')\nprint(n * n)",
    "BufferedWriter": READ + "import io\nout = io.BufferedWriter(io.FileIO(1, 'w'))\nout.write(b'%d' % n)",
    "TextIOWrapper":
        READ + "import sys, io\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\n"
        "print(n, 'ü')",
    "TextIOWrapper of detach":
        READ + "import sys, io\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), 'utf-8')\nprint(n)",
    "codecs": READ + "import sys, codecs\nsys.stdout = codecs.getwriter('utf-8')(sys.stdout.buffer)\nprint(n)",
    "StringIO, then real": READ + "import sys, io\nreal = sys.stdout\nsys.stdout = io.StringIO()\nprint(n)\n"
                           "real.write(sys.stdout.getvalue())",
    "StringIO and __stdout__":
        READ + "import sys, io\nsys.stdout = io.StringIO()\nprint(1)\nsys.stdout = sys.__stdout__\nprint(n)",
    "redirect_stdout":
        "import contextlib, io\nf = io.StringIO()\nwith contextlib.redirect_stdout(f): print(1)\n"
        "print(f.getvalue() * 2)",
    "stdout never given back": "import sys, io\nprint(1)\nsys.stdout = io.StringIO()\nprint(2)",
    "closed stdout": READ + "import sys\nprint(n)\nsys.stdout.close()",
    "print after close": READ + "import sys\nprint(n)\nsys.stdout.close()\nprint(n)",
    "os.close(1)": "import os\nos.close(1)",
    "os.close(1), buffered": "import os\nprint(1)\nos.close(1)",
    "dup2": "import os\nos.dup2(1, 9)\nos.write(9, b'nine')",
    "stderr": "import sys\nprint('log', file=sys.stderr)\nprint(1)",
    "/dev/stdout": "with open('/dev/stdout', 'w') as f: f.write('out')",
    "/dev/null": "import sys\nsys.stderr = open('/dev/null', 'w')\nprint('x', file=sys.stderr)\nprint(1)",
    "os.devnull":
        "import os, contextlib\n"
        "with open(os.devnull, 'w') as f, contextlib.redirect_stdout(f): print(1)\nprint(2)",
    "surrogates": "print('\\ud800')",
    "latin-1 bytes": "import sys\nsys.stdout.buffer.write(bytes(range(256)))",
    "logging":
        "import logging, sys\nlogging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "logging.warning('w')",
    "pprint": "import pprint\npprint.pprint({i: list(range(i)) for i in range(9)})",
    "line buffered": "import sys\nsys.stdout.reconfigure(line_buffering=True)\nprint(1)\nimport os\nos._exit(0)",
    "one million characters": "print('x' * 999000)",
    # ---- the end
    "exit()": "print(1)\nexit()",
    "quit(0)": "print(1)\nquit(0)",
    "exit closes stdin": "try: exit()\nexcept SystemExit: print(__import__('sys').stdin.closed)",
    "sys.exit(3)": "import sys\nprint(1)\nsys.exit(3)",
    "sys.exit(True)": "import sys\nsys.exit(True)",
    "sys.exit(text)": "import sys\nprint(1)\nsys.exit('bad')",
    "sys.exit(-1)": "import sys\nsys.exit(-1)",
    "sys.exit(256)": "import sys\nsys.exit(256)",
    "sys.exit(1.5)": "import sys\nsys.exit(1.5)",
    "sys.exit(tuple)": "import sys\nsys.exit((0, 1))",
    "raise SystemExit": "print(1)\nraise SystemExit",
    "subclass of SystemExit": "class Stop(SystemExit): pass\nprint(1)\nraise Stop(0)",
    "exit in a function": "def main():\n    print(1)\n    exit(0)\nmain()\nprint(2)",
    "os._exit loses the buffer": "import os\nprint(1)\nos._exit(0)",
    "error after output": "print(1)\n1 / 0",
    "syntax error": "print(1)\nprint(",
    "indentation error": "if True:\nprint(1)",
    "KeyboardInterrupt": "print(1)\ntry:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt:\n    print(2)",
    "excepthook": "import sys\nsys.excepthook = lambda *a: print('hook', a[0].__name__)\n1 / 0",
    "error text": "raise ValueError('ünï')",
    "atexit": READ + "import atexit\natexit.register(lambda: print(n * n))",
    "atexit, twice, with arguments": "import atexit\natexit.register(print, 1)\natexit.register(print, 2, sep='')",
    "atexit raises": "import atexit\natexit.register(lambda: 1 / 0)\nprint(1)",
    "atexit after an error": "import atexit\natexit.register(print, 'bye')\n1 / 0",
    "atexit after exit": "import atexit, sys\natexit.register(print, 'bye')\nsys.exit(0)",
    "atexit writes StringIO": "import atexit, io, sys\nsys.stdout = b = io.StringIO()\n"
                              "atexit.register(lambda: sys.__stdout__.write(b.getvalue()))\nprint(7)",
    "__del__": "class A:\n    def __del__(self): print('gone')\na = A()",
    "__del__ in a cycle": "class A:\n    def __del__(self): print('gone')\na = A()\na.me = a",
    "__del__ uses a global": "word = 'w'\nclass A:\n    def __del__(self): print(word)\ndef f(): return a\na = A()",
    "generator's finally":
        "def g():\n    try:\n        yield 1\n    finally:\n        print('finally')\nx = g()\n"
        "print(next(x))",
    "generator in a with": "import contextlib\n"
                           "@contextlib.contextmanager\ndef c():\n    print('in')\n    yield\n    print('out')\n"
                           "with c(): print(1)",
    "weakref.finalize": "import weakref\nclass A: pass\na = A()\nweakref.finalize(a, print, 'finalized')",
    "thread joined at exit": READ + "import threading\nthreading.Thread(target=lambda: print(n * n)).start()",
    "slow thread":
        "import threading, time\ndef f():\n    time.sleep(0.1)\n    print('late')\n"
        "threading.Thread(target=f).start()\nprint(1)",
    "daemon thread":
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "print(1)",
    "thread raises": "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()\nprint(1)",
    "exit in a thread": "import threading, sys\nt = threading.Thread(target=sys.exit)\nt.start()\nt.join()\nprint(1)",
    "big stack": "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(512 << 20)\n"
                 "def f(n): return n and 1 + f(n - 1)\ndef main(): print(f(50000))\n"
                 "t = threading.Thread(target=main)\nt.start()\nt.join()",
    "stack size told":
        "import threading\n"
        "print(threading.stack_size(1 << 26), threading.stack_size(), threading.stack_size(0))",
    "executor":
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as p: print(list(p.map(abs, [-1, 2])))",
    "queue":
        "import queue, threading\nq = queue.Queue()\n"
        "threading.Thread(target=q.put, args=(3,)).start()\nprint(q.get())",
    "timer": "import threading\nthreading.Timer(0.05, print, ['tick']).start()",
    # ---- the program and its interpreter
    "main guard": "def main():\n    print(int(input()))\nif __name__ == '__main__':\n    main()",
    "argv": "import sys\nprint(len(sys.argv), [a.split('/')[-1] for a in sys.argv])",
    "argparse":
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('-n', type=int, default=3)\n"
        "print(p.parse_args().n, p.prog)",
    "__file__": "import os\nprint(os.path.basename(__file__), __name__, __doc__, __package__, __spec__)",
    "own source": "print(len(open(__file__).read()), open(__file__, 'rb').readline())",
    "docstring": "'''about'''\nprint(__doc__)",
    "future import":
        "from __future__ import annotations\ndef f(x: unknown) -> None: print(x)\nf(1)\n"
        "print(f.__annotations__)",
    "annotations": "x: int = 1\nprint(__annotations__)",
    "coding line": "# -*- coding: latin-1 -*-\nprint(len('é'))",
    "byte order mark": "\ufeffprint(1)",
    "windows newlines": "x = '''a\r\nb'''\r\nprint(repr(x))\r\n",
    "import __main__": "import __main__\nx = 3\nprint(__main__.x, __main__.__name__)",
    "sys.modules": "import sys\nprint(sys.modules['__main__'].__dict__ is globals())",
    "globals": "print(sorted(k for k in globals() if k.startswith('__')))",
    "builtins": "print(__builtins__.len([1]), type(__builtins__).__name__)",
    "pickle of own class":
        "import pickle\nclass A:\n    def __init__(self, x): self.x = x\n"
        "print(pickle.loads(pickle.dumps(A(3))).x)",
    "dataclass":
        "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int\n"
        "    y: int = 0\nprint(sorted([P(2), P(1)]))",
    "enum": "import enum\nclass C(enum.Enum):\n    A = 1\nprint(C.A, C(1).name)",
    "typing hints": "import typing\nclass A:\n    x: 'typing.List[int]'\nprint(typing.get_type_hints(A))",
    "recursion limit":
        "import sys\nprint(sys.getrecursionlimit())\nsys.setrecursionlimit(5000)\n"
        "print(sys.getrecursionlimit())",
    "how deep": "def f(n):\n    try: return f(n + 1)\n    except RecursionError: return n\nprint(f(0))",
    "990 deep": "def f(n): return n and 1 + f(n - 1)\nprint(f(990))",
    "5000 deep": "import sys\nsys.setrecursionlimit(10**4)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(5000))",
    "largest limit":
        "import sys\nsys.setrecursionlimit(2**31 - 1)\ndef f(n): return n and 1 + f(n - 1)\n"
        "print(f(9000))",
    "RecursionError": "def f(): return f()\ntry: f()\nexcept RecursionError as e: print(type(e).__name__)",
    "call stack": "import sys\ndef f(): return sys._getframe(1).f_code.co_name\nprint(f())",
    "traceback":
        "import traceback\ntry: 1 / 0\n"
        "except ZeroDivisionError: print(traceback.format_exc().split('\\n')[-2])",
    "exec and eval": "exec('y = 3')\nprint(eval('y * 2'), compile('1', 'x', 'eval').co_name)",
    "inspect.getsource": "import inspect\ndef f(): return 1\nprint(inspect.signature(f), inspect.getsource(f))",
    "help in scope": "print(callable(help), callable(exit), repr(exit)[:8])",
    "walrus, match": "match (x := 3):\n    case 3: print('three')\n    case _: print(x)",
    "time":
        "import time\nt = time.time()\ntime.sleep(0.01)\n"
        "print(time.perf_counter() > 0, time.process_time() >= 0, time.time() > t)",
    "datetime": "import datetime\nprint(datetime.date(2024, 2, 29) + datetime.timedelta(365))",
    "decimal, fractions": "from decimal import Decimal, getcontext\nfrom fractions import Fraction\n"
                          "getcontext().prec = 50\n"
                          "print(Decimal(1) / 7, Fraction(6, 4))",
    "usual imports": "import math, heapq, bisect, itertools, functools, collections, string, re, operator\n"
                     "from collections import *\nfrom itertools import *\nfrom math import *\n"
                     "print(gcd(12, 18), Counter('aab'))",
    "more imports": "import array, statistics, cmath, textwrap, hashlib, struct, types, abc, numbers, graphlib\n"
                    "print(array.array('i', [1, 2]), statistics.median([1, 5, 2]), hashlib.md5(b'x').hexdigest())",
    "lru_cache":
        "from functools import lru_cache\n@lru_cache(None)\n"
        "def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(300))",
    "big numbers": "print(2 ** 10000 % (10 ** 9 + 7), len(str(2 ** 10000)))",
    "too many digits": "print(10 ** 5000)",
    "set_int_max_str_digits": "import sys\nsys.set_int_max_str_digits(0)\nprint(len(str(10 ** 5000)))",
    "gc": "import gc\ngc.disable()\nprint(gc.isenabled())\ngc.enable()\nprint(gc.collect() >= 0)",
    "resource":
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_STACK, resource.getrlimit(resource.RLIMIT_STACK))\n"
        "print(1)",
    "signal handler":
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "print(signal.getsignal(signal.SIGTERM))",
    "default signals":
        "import signal\n"
        "print([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD)])",
    "asserts": "assert 1 == 1\ntry:\n    assert False, 'no'\nexcept AssertionError as e: print(e)",
    "warnings": "import warnings\nwarnings.warn('w')\nprint(1)",
    "unittest":
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\n"
        "unittest.main(argv=['x'])",
    "doctest": "import doctest\ndef f():\n    '''\n    >>> f()\n    1\n    '''\n    return 1\nprint(doctest.testmod())",
    "fast io template": FASTIO,
    "class Solution": "class Solution:\n    def f(self, n): return n * n\nprint(Solution().f(int(input())))",
    "os and platform":
        "import os\n"
        "print(os.sep, os.name, os.linesep == '\\n', os.environ.get('HOME'), os.getpid() > 0)",
    "hash of a string": "print(hash('x'), list({'a', 'b', 'c'}))",
    "locale":
        "import locale\n"
        "print(locale.getpreferredencoding(False).lower(), __import__('sys').getdefaultencoding())",
    # ---- more of all
    "input after buffer":
        "import sys\nprint(sys.stdin.buffer.readline())\ntry: print(input())\nexcept EOFError: print('eof')",
    "buffer.peek": "import sys\nprint(sys.stdin.buffer.peek(3)[:3], sys.stdin.buffer.read1(4))",
    "open(0) twice": "a = open(0, closefd=False)\nprint(a.readline())\nb = open(0)\nprint(repr(b.read()[:5]))",
    "os.read then input": "import os\nprint(os.read(0, 2))\nprint(input())",
    "os.pread": "import os\nprint(os.pread(0, 5, 2), os.lseek(0, 0, 1))",
    "os.readv": "import os\nb = [bytearray(3), bytearray(4)]\nprint(os.readv(0, b), b)",
    "os.fstat(1)": "import os, stat\nprint(stat.S_ISFIFO(os.fstat(1).st_mode), stat.S_ISFIFO(os.fstat(2).st_mode))",
    "tell after next": "import sys\nnext(sys.stdin)\ntry: print(sys.stdin.tell())\nexcept OSError as e: print(e)",
    "stdin truncate": "import os\ntry: os.ftruncate(0, 0)\nexcept OSError as e: print('refused')",
    "recursion + stack_size":
        "import sys, threading\nsys.setrecursionlimit(1 << 25)\nthreading.stack_size(1 << 28)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nt = threading.Thread(target=lambda: print(f(100000)))\n"
        "t.start(); t.join()",
    "exit list": "import sys\nsys.exit([1])",
    "exit bool False": "import sys\nsys.exit(False)",
    "exit huge": "import sys\nsys.exit(10**30)",
    "exit in atexit": "import atexit, sys\natexit.register(lambda: sys.exit(3))\nprint(1)",
    "os._exit in atexit": "import atexit, os\natexit.register(lambda: os._exit(4))\nprint(1)",
    "atexit unregister": "import atexit\natexit.register(print, 1)\natexit.unregister(print)",
    "atexit registers atexit": "import atexit\natexit.register(lambda: atexit.register(print, 'inner'))",
    "raise in atexit after output":
        "import atexit\ndef f(): raise ValueError('x')\natexit.register(f)\natexit.register(print, 'second')\n"
        "print('first')",
    "generator close raises":
        "def g():\n    try: yield 1\n    except GeneratorExit: print('closed'); raise\nx = g(); next(x)",
    "generator ignores close": "def g():\n    try: yield 1\n    except GeneratorExit: yield 2\nx = g(); next(x)",
    "del raises": "class A:\n    def __del__(self): 1 / 0\na = A()",
    "coroutine by hand":
        "async def f(): return 3\nc = f()\ntry: c.send(None)\nexcept StopIteration as e: print(e.value)",
    "coroutine never awaited": "async def f(): return 3\nf()\nprint(1)",
    "getsignal alarm":
        "import signal\n"
        "print(signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP))",
    "all signals":
        "import signal\n"
        "print([(s.name, str(signal.getsignal(s))[:30]) for s in sorted(signal.valid_signals())"
        " if isinstance(s, signal.Signals) and s.name[:5] != 'SIGRT'])",
    "sigmask": "import signal\nprint(signal.pthread_sigmask(signal.SIG_BLOCK, []))",
    "decimal context": "import decimal\nprint(decimal.getcontext())\nprint(decimal.Decimal(2).sqrt())",
    "setlocale": "import locale\nprint(locale.setlocale(locale.LC_ALL, 'C'))",
    "breakpoint off": "import sys\nsys.breakpointhook = lambda *a: print('bp')\nbreakpoint()",
    "help()": "help(len)",
    "copyright": "print(type(license).__name__, callable(copyright))",
    "dir builtins": "import builtins\nprint(sorted(dir(builtins)))",
    "coding cp1252": "# vim: set fileencoding=cp1252 :\nprint(len('é'))",
    "tabs and spaces": "if True:\n\tprint(1)\n        print(2)",
    "form feed": "\x0cprint(1)",
    "carriage returns": "print(1)\rprint(2)\r",
    "match class":
        "from dataclasses import dataclass\n@dataclass\nclass P: x: int; y: int\nmatch P(1, 2):\n"
        "    case P(x=1, y=y): print(y)",
    "dataclass pickled":
        "import pickle\nfrom dataclasses import dataclass\n@dataclass\nclass P: x: int = 1\n"
        "print(pickle.loads(pickle.dumps(P(3))), P.__module__)",
    "main pickled function": "import pickle\ndef f(): return 7\nprint(pickle.loads(pickle.dumps(f))())",
    "__main__ from sys.modules":
        "import sys\nm = sys.modules['__main__']\nm.z = 4\nprint(z, m.__file__.split('/')[-1], m.__spec__)",
    "os.urandom": "import os\nprint(len(os.urandom(8)))",
    "settrace":
        "import sys\nn = 0\ndef t(*a):\n    global n\n    n += 1\n    return t\nsys.settrace(t)\n"
        "def f(): return 1\nf()\nsys.settrace(None)\nprint(n)",
    "uncaught chained": "try: 1 / 0\nexcept ZeroDivisionError as e: raise ValueError('x') from e",
    "custom error str": "class E(Exception):\n    def __str__(self): return 'custom'\nraise E",
    "recursion error uncaught": "def f(): f()\nf()",
    "warnings to error": "import warnings\nwarnings.simplefilter('error')\nwarnings.warn('w')",
    "large ints": "print(int('9' * 4300) % 7)\ntry: int('9' * 4301)\nexcept ValueError as e: print(e)",
    "print file None": "import sys\nsys.stdout = None\nprint(1)",
    "stderr None": "import sys\nsys.stderr = None\n1 / 0",
    "errors=replace": "import sys\nsys.stdout.reconfigure(errors='replace', encoding='ascii')\nprint('é')",
    "newline arg": "import sys\nsys.stdout.reconfigure(newline='\\r\\n')\nprint(1)",
    "write_through": "import sys, os\nsys.stdout.reconfigure(write_through=True)\nprint(1)\nos._exit(0)",
    "memory error caught": "try: x = bytearray(10**13)\nexcept MemoryError: print('caught')",
    "thread excepthook":
        "import threading\nthreading.excepthook = lambda a: print('hook', a.exc_type.__name__)\n"
        "t = threading.Thread(target=lambda: 1/0); t.start(); t.join()",
    "unraisable":
        "import sys\nsys.unraisablehook = lambda u: print('unraisable')\nclass A:\n    def __del__(self): 1/0\n"
        "a = A(); del a",
    "barrier":
        "import threading\nb = threading.Barrier(2)\n"
        "t = threading.Thread(target=b.wait); t.start(); b.wait(); t.join(); print('ok')",
    "array fromfile": "import array\na = array.array('b'); a.fromfile(open(0, 'rb'), 3); print(a)",
    "cmd loop":
        "import cmd\nclass C(cmd.Cmd):\n    prompt = ''\n    def default(self, l): print(l)\n"
        "    def do_EOF(self, l): return True\nC().cmdloop()",
    "code.interact": "import code\ncode.interact(banner='', local={})",
    "os.environ": "import os\nprint(sorted(os.environ))",
    "umask": "import os\nprint(os.umask(0o22) >= 0)",
    "os.pipe": "import os\nr, w = os.pipe()\nos.write(w, b'hi'); os.close(w)\nprint(os.read(r, 9), r)",
    "lowest fd": "import os\nprint(os.dup(0), os.dup(0))",
    "sys.displayhook": "import sys\nsys.displayhook(5)",
    "set order": "print(set('abcdef'))",
    "weakref at exit": "import weakref\nclass A: pass\na = A()\nweakref.finalize(a, print, 'bye').atexit = False",
}
UNLIKE = {  # what a sandbox without processes, sockets and files cannot do; docs/judge.md lists it
    "subprocess": "import subprocess\nprint(subprocess.run(['echo', 'x'], capture_output=True).stdout)",
    "fork": "import os\nif os.fork() == 0: os._exit(0)\nprint(os.wait()[1])",
    "a file": "open('/tmp/judge_program', 'w').write('x')\nprint(1)",
    "socket": "import socket\ns = socket.socket()\nprint(1)",
}


def default_signals():
    """What a shell gives a program. Whoever runs the tests may ignore some, as nohup does; children inherit that."""
    for number in signal.valid_signals():
        with contextlib.suppress(OSError):                 # SIGKILL and SIGSTOP are as they are
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="module")
def run():
    """-> function from a program's text to (output, exit status, last line of stderr) in the best sandbox there is."""
    try:
        isolation, drop_by, _ = choose_isolation("auto", allow_unsafe=True)
    except UserError as error:
        pytest.skip(str(error))
    box = Box(isolation, drop_by)
    bounds = Bounds(cpu=20, wall=60, cpu_total=30, memory=512 << 20, output=1 << 20)

    def judged(program: str) -> tuple[bytes, int, bytes]:
        results = []
        for run in box.run_tests(program, bounds, [(GIVEN.encode(), bounds)] * 2):
            assert run.end == "exit"
            results.append((run.out, os.waitstatus_to_exitcode(run.status), last_line(run.err)))
        assert results[0] == results[1]          # nothing of the first test is left for the second
        return results[0]

    yield judged
    box.close()


def last_line(err: bytes) -> bytes:
    return err.strip().split(b"\n")[-1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same from `python3 main.py < input`."""
    folder = tmp_path_factory.mktemp("plain")

    def ran(program: str) -> tuple[bytes, int, bytes]:
        (folder / "main.py").write_bytes(program.encode())
        (folder / "input").write_text(GIVEN)
        python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        with open(folder / "input") as given:
            done = subprocess.run([python, "-s", "main.py"], stdin=given, capture_output=True, cwd=folder,
                                  env={"PYTHONHASHSEED": "0"}, preexec_fn=default_signals)
        return done.stdout, done.returncode, last_line(done.stderr)

    return ran


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_as_the_interpreter_runs_it(run, plain, name):
    got, expected = run(PROGRAMS[name]), plain(PROGRAMS[name])
    assert got[:2] == expected[:2]
    assert got[1] != 1 or got[2] == expected[2]      # the error, where one ended the program


@pytest.mark.parametrize("name", UNLIKE)
def test_what_a_sandbox_cannot_do_is_an_error(run, plain, name):
    """The list of docs/judge.md: these run in the interpreter and end with an error here, not with a wrong output."""
    assert plain(UNLIKE[name])[1] == 0
    out, status, err = run(UNLIKE[name])
    assert status == 1 and b"Error" in err


def test_numpy_where_it_is_installed(run):
    np = pytest.importorskip("numpy")
    program = "import numpy as np\nprint(np.arange(6).reshape(2, 3).sum(axis=0), np.__version__)"
    assert run(program) == (f"[3 5 7] {np.__version__}\n".encode(), 0, b"")


def test_verdicts_follow_the_exit_status():
    """An error or another status than 0 is RE even if the output is right, as online judges have it."""
    programs = {"print(9)": "AC", "print(9)\nexit(1)": "RE", "print(9)\n1 / 0": "RE", "print(9)\nexit('x')": "RE",
                "import atexit\natexit.register(print, 9)\nexit()": "AC", "print(8)": "WA"}
    with Judge(workers=1, allow_unsafe=True, quiet=True) as judge:
        assert {p: judge.run(p, [Test("stdio", "", "9")])[0].status for p in programs} == programs
