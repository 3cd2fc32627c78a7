"""
Programs that solve nothing, against MBPP and HumanEval (report section 3.2): which of them the judge pays, and whether
plain Python agrees on every one.

    python bench/wrong_programs.py mbpp.jsonl HumanEval.jsonl.gz

Each problem gets its gold solution and the programs of WRONG. The judge runs the tests as data/published.py reads them;
plain Python runs them as they are published, each program in a process of its own that must come to the last line. A
wrong program is paid rightly where the problem's own tests pass it: these are listed with their problems, and so is
every program on which the two disagree. The whole sets, 16,000 programs, take a quarter of an hour or more.
"""
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configurator  # noqa: E402
from data.problems import Test  # noqa: E402
from data.published import problem_line  # noqa: E402
from data.readers import table_rows  # noqa: E402
from judge import Judge  # noqa: E402

WRONG = {
    "return the argument": "def {f}(x=None, *rest, **named): return x",
    "return the last argument": "def {f}(*xs, **named): return xs[-1]",
    "return None": "def {f}(*xs, **named): pass",
    "return 0": "def {f}(*xs, **named): return 0",
    "return True": "def {f}(*xs, **named): return True",
    "return []": "def {f}(*xs, **named): return []",
    "return ''": "def {f}(*xs, **named): return ''",
    "print the argument": "def {f}(x=None, *rest, **named): print(x)",
    "exit in the function": "import sys\ndef {f}(*xs, **named): sys.exit(0)",
    "exit at once": "exit()",
    "os._exit": "import os\nos._exit(0)",
    "nothing": "",
    "echo": "print(input())",
}
# Plain Python: forks for each [program, tests] of stdin, and says for each whether it came to the end of its tests
PLAIN = """
import json, os, resource, signal, sys
for line in sys.stdin:
    program, tests = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        signal.alarm(100)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        scope = {"__name__": "solution"}
        exec(program, scope)
        exec(tests, scope)
        os.write(write, b"passed")
        os._exit(0)
    os.close(write)
    print(json.dumps(os.read(read, 6) == b"passed"), flush=True)
    os.close(read)
    os.waitpid(child, 0)
"""


@dataclass(frozen=True)
class Config:
    POSITIONAL = ("mbpp", "humaneval")
    mbpp: str = ""                                # mbpp.jsonl of google-research, as published
    humaneval: str = ""                           # HumanEval.jsonl.gz of openai/human-eval
    seconds: float = 10.0                         # processor time a test; the slowest gold solution takes 5
    workers: int = 2                              # sandboxes
    out: str = "out/bench/wrong_programs.json"    # what was paid, by program


def problems(path: str) -> list[tuple[str, dict, str]]:
    """-> (task id, the fields of a problem line, its tests as published) of every row."""
    found = []
    for _, _, row in table_rows(path):
        line = problem_line(row)
        if "prompt" in row and "entry_point" in row:
            before = row["prompt"].split(f"def {row['entry_point']}")[0]
            tests = f"{before}\n{row['test']}\ncheck({row['entry_point']})"
        else:
            tests = "\n".join([row.get("test_setup_code") or "", *row["test_list"]])
        found.append((str(row["task_id"]), line, tests))
    return found


def paid_by_python(programs: list[tuple[str, str]]) -> list[bool]:
    """Which of the (program, tests) come to the end of their tests in plain Python."""
    with tempfile.TemporaryFile("w+") as stdin:
        stdin.writelines(json.dumps(pair) + "\n" for pair in programs)
        stdin.seek(0)
        done = subprocess.run([sys.executable, "-c", PLAIN], stdin=stdin, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def paid_by_judge(judge: Judge, programs: list[tuple[str, list[Test], str]]) -> list[tuple[bool, str]]:
    """-> for each (program, tests, entry) whether all tests are AC, and what became of them."""
    for key, (program, tests, entry) in enumerate(programs):
        judge.submit(key, program, tests, entry)
    verdicts = {}
    while len(verdicts) < len(programs):
        verdicts.update(judge.poll())
        time.sleep(0.01)
    return [(all(v.status == "AC" for v in verdicts[key]),
             "; ".join(f"{v.status} {v.detail}" for v in verdicts[key] if v.status != "AC")[:200])
            for key in range(len(programs))]


def main(cfg: Config) -> None:
    """Judge all, compare, print, write."""
    if not cfg.mbpp or not cfg.humaneval:
        raise configurator.UserError("two files are needed: mbpp.jsonl HumanEval.jsonl.gz")
    out = configurator.writable(cfg.out)
    result: dict = {"command": " ".join(["python", *sys.argv]), "python": platform.python_version()}
    with Judge(workers=cfg.workers, time_limit=cfg.seconds) as judge:
        for name, path in (("MBPP", cfg.mbpp), ("HumanEval", cfg.humaneval)):
            cases = []
            for task, line, published in problems(path):
                tests = [Test(kind="check", input=test["input"], expected="") for test in line["tests"]]
                gold = line["solution"].removeprefix("```python\n").removesuffix("\n```")
                cases += [(what, task, program.format(f=line["entry"]) if what != "gold" else program, tests,
                           line["entry"], published) for what, program in {"gold": gold, **WRONG}.items()]
            judged = paid_by_judge(judge, [(program, tests, entry) for _, _, program, tests, entry, _ in cases])
            plain = paid_by_python([(program, published) for _, _, program, _, _, published in cases])
            paid, apart = defaultdict(list), []
            for (what, task, *_), (mine, why), pythons in zip(cases, judged, plain, strict=True):
                if mine:
                    paid[what].append(task)
                if mine != pythons:
                    apart.append({"program": what, "task": task, "judge": mine, "python": pythons, "why": why})
            n = len(cases) // (len(WRONG) + 1)
            print(f"{name}: {n} problems, {len(cases)} programs, gold solutions paid {len(paid['gold'])}, "
                  f"judge and plain Python disagree on {len(apart)}")
            for what in WRONG:
                print(f"  {what:26s} paid {len(paid[what]):3d}  {' '.join(paid[what][:20])}")
            for case in apart:
                print(f"  disagree: {case}")
            result[name] = {"problems": n, "programs": len(cases), "gold": len(paid.pop("gold")), "paid": paid,
                            "disagree": apart}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    configurator.run(main, Config)
