"""
Programs and tests per second through the judge (report section 3.2), call tests, with one and with two workers.

    python bench/judge.py --programs=400

Expect 200 to 500 programs of 12 call tests a second and worker on an idle core. The last line is the ratio of two
workers to one; out/bench/judge.json has the numbers.
"""
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configurator  # noqa: E402
from data.problems import Test  # noqa: E402
from judge import Judge  # noqa: E402

PROGRAM = "def f(xs):\n    xs = [x for x in xs if x % 2 == 0]\n    return sorted(xs)"
TESTS = [Test("call", json.dumps([list(range(i, i - 8, -1))]),
              json.dumps([x for x in range(i - 7, i + 1) if x % 2 == 0])) for i in range(12)]


@dataclass(frozen=True)
class Config:
    programs: int = 400                   # programs per measurement
    out: str = "out/bench/judge.json"     # the numbers

    def __post_init__(self):
        configurator.at_least(self, 1, "programs")


def programs_per_second(workers: int, programs: int) -> float:
    """Programs that a warm judge finishes a second. RuntimeError if it does not accept the program, which is right."""
    with Judge(workers=workers) as judge:
        for n in (4 * workers, programs):                             # in the first round the boxes start
            begin, finished = time.perf_counter(), []
            for i in range(n):
                judge.submit(i, PROGRAM, TESTS)
            while len(finished) < n:
                finished += judge.poll()
                time.sleep(0.002)
            seconds = time.perf_counter() - begin
    if any(verdict.status != "AC" for _, verdicts in finished for verdict in verdicts):
        raise RuntimeError("the judge gave a right program another verdict than AC")
    return programs / seconds


def main(cfg: Config) -> None:
    """Measure, print, write."""
    path, rates = configurator.writable(cfg.out), {}
    for workers in (1, 2):
        rates[workers] = programs_per_second(workers, cfg.programs)
        print(f"{workers} workers: {rates[workers]:.0f} programs/s, {len(TESTS) * rates[workers]:.0f} tests/s")
    ratio = rates[2] / rates[1]
    path.write_text(json.dumps({"ratio": ratio, "programs_per_second": rates, "tests_per_program": len(TESTS),
                                "command": " ".join(["python", *sys.argv]), "python": platform.python_version()},
                               indent=1) + "\n")
    print(f"two workers / one = {ratio:.2f}x")


if __name__ == "__main__":
    configurator.run(main, Config)
