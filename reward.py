"""Rewards: rule-based maths checking, and the test-difficulty driven reward for code.

Report, section 3.2 (rewards are accuracy alone, maths by Math-Verify), 3.3.1 and Fig. 5 (difficulty levels of
unit tests, strict and soft schemes). Pure functions but for the small pool of Math-Verify processes at the
end. Ours, where the report is silent: exact 1-D k-means with three levels, equal scores per level, and a
number must be answered by a number (else "\\boxed{17*23}" is paid for restating the question).

    python reward.py                # a table of what is paid for some answers, and the checks per second
Expect about 100,000 plain-number checks and 100 to 300 Math-Verify checks a second on one core.
"""
import math
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction

from data.problems import Problem
from judge import Judge, maths


# ---------------------------------------------------------------- code: difficulty levels and reward (3.3.1)
def difficulty_reward(passed, levels, scheme, scores=None) -> float:
    """Reward in [0, 1] of one program. passed: bool per test; levels: difficulty per test, lower is easier.

    With levels l = 1..L from easy to hard, scores s_l (equal by default, scaled to sum 1), p_l of n_l tests
    passed:
        vanilla   r = 1 if every test passes else 0
        strict    r = sum_l s_l [p_m = n_m for all m <= l]      a level counts if it and all easier ones are
        complete soft      r = sum_l s_l p_l / n_l                       a level's score is split evenly over
        its tests
    By hand: levels 0 0 1 1, passed 1 1 1 0: vanilla 0, strict 1/2, soft 1/2 + 1/2 * 1/2 = 3/4.
    ValueError for no tests, unequal lengths, unknown scheme, or scores that are not one positive number per
    level.
    """
    passed, levels = [bool(p) for p in passed], list(levels)
    if not passed or len(passed) != len(levels):
        raise ValueError(f"{len(passed)} results for {len(levels)} levels: should be as many, not 0")
    if scheme not in ("vanilla", "strict", "soft"):
        raise ValueError(f"scheme {scheme!r}: should be 'vanilla', 'strict' or 'soft'")
    order = sorted(set(levels))
    scores = [1.0] * len(order) if scores is None else list(scores)
    if len(scores) != len(order) or not all(math.isfinite(s) and s > 0 for s in scores):
        raise ValueError(f"scores {scores}: should be {len(order)} positive numbers, one per level")
    if all(passed):
        return 1.0
    if scheme == "vanilla":
        return 0.0
    total, terms, complete = math.fsum(scores), [], True
    for level, score in zip(order, scores, strict=True):
        results = [p for p, at in zip(passed, levels, strict=True) if at == level]
        p, n = sum(results), len(results)
        complete = complete and p == n
        if scheme == "strict":
            terms.append(score if complete else 0.0)
        else:
            terms.append(score if p == n else score * p / n)
    return math.fsum(terms) / total


def estimate_pass_rates(table) -> list[float]:
    """Per-test pass rate over all solutions of several models (3.3.1). table[solution][test] -> rate per
    test.

    An entry is a bool, a verdict status, or an object with `.status`; a judge error (JE) counts neither way.
    By hand: [[1, 0], [1, 1]] -> [1.0, 0.5]. ValueError for an empty or ragged table, tests that were not run
    (NR), or a test without a single verdict: estimation must run every test.
    """
    rows = [[getattr(v, "status", v) for v in row] for row in table]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("the verdict table should have a row, a test, and rows of equal length")
    rates = []
    for test, column in enumerate(zip(*rows, strict=True)):
        if "NR" in column:
            raise ValueError(f"test {test} was not run by some solution: turn stop_at_failed_level off")
        known = [v == "AC" if isinstance(v, str) else bool(v) for v in column if v != "JE"]
        if not known:
            raise ValueError(f"test {test} has no verdict but judge errors")
        rates.append(sum(known) / len(known))
    return rates


def difficulty_levels(pass_rates, k=3) -> list[int]:
    """Cluster tests by pass rate into at most k levels, 0 = easiest (Fig. 5: easy, medium, hard). -> level
    per test.

    Exact 1-D k-means: minimise sum over clusters of sum_i (x_i - mean)^2. In one dimension clusters are
    intervals, so dynamic programming over the sorted distinct rates is exact and ties are never split:
        best[c][j] = min_i best[c-1][i] + cost(i, j)      cost(i, j) of distinct rates i..j-1, weighted by
        their count
    Fewer than k distinct rates give fewer levels. By hand: rates .1 .9 .2 .9 .5, k = 3 -> levels 2 0 2 0 1.
    ValueError for rates outside [0, 1] or k < 1.
    """
    rates = [float(x) for x in pass_rates]
    if k < 1 or not rates or not all(0 <= x <= 1 for x in rates):
        raise ValueError(f"k = {k}, rates {rates[:5]}: should be k >= 1 and at least one rate, all in [0, 1]")
    values = sorted(set(rates), reverse=True)    # easiest first
    m, k = len(values), min(k, len(set(rates)))
    count, first, second = [0.0], [0.0], [0.0]    # prefix sums of n, n x, n x^2
    for x in values:
        n = rates.count(x)
        count.append(count[-1] + n)
        first.append(first[-1] + n * x)
        second.append(second[-1] + n * x * x)

    def cost(i, j):
        n, s = count[j] - count[i], first[j] - first[i]
        return max(0.0, second[j] - second[i] - s * s / n)    # sum x^2 - (sum x)^2 / n

    best = [[0.0] + [math.inf] * m] + [[math.inf] * (m + 1) for _ in range(k)]
    cut = [[0] * (m + 1) for _ in range(k + 1)]
    for c in range(1, k + 1):
        for j in range(c, m + 1):
            best[c][j], cut[c][j] = min((best[c - 1][i] + cost(i, j), i) for i in range(c - 1, j))
    level, j = {}, m
    for c in range(k, 0, -1):
        level.update((x, c - 1) for x in values[cut[c][j]:j])
        j = cut[c][j]
    return [level[x] for x in rates]


# ---------------------------------------------------------------- the answer inside a response
BARE = re.compile(r"(?:(?:from|import)[ \t].*\n\s*)*def[ \t]")


def after_thinking(response: str) -> str | None:
    """What stands behind the last </think>; all of it if there is no thinking; None if that never ended."""
    _, closed, rest = response.rpartition("</think>")
    if "<think>" in rest:
        return None
    return rest if closed else response


def extract_program(response: str) -> str | None:
    """The last complete fenced block after </think>, or all of the answer if it is bare code. Or None."""
    answer, block, found = after_thinking(response), None, None
    if answer is None:
        return None
    for line in answer.split("\n"):    # not a regular expression: linear in a hostile text too
        mark = line.strip()
        if block is None:
            block = [] if mark.startswith("```") and "`" not in mark[3:] else None
        elif mark == "```":
            found, block = "\n".join(block) + "\n", None
        else:
            block.append(line)
    if found is not None:
        return found
    return answer.strip() + "\n" if BARE.match(answer.strip()) and "```" not in answer else None


def last_boxed(response: str) -> str | None:
    r"""Content of the last \boxed{...} after </think>, by counting braces (escaped ones aside), or None.

    "\boxed{1} so \boxed{\frac{1}{2}}" -> "\frac{1}{2}". If the last box is left open there is no answer.
    """
    answer = after_thinking(response) or ""
    start = answer.rfind("\\boxed{")
    if start < 0:
        return None
    depth, i = 1, start + len("\\boxed{")
    begin = i
    while i < len(answer):
        if answer[i] == "\\":
            i += 1    # skip the escaped character
        elif answer[i] in "{}":
            depth += 1 if answer[i] == "{" else -1
            if not depth:
                return answer[begin:i]
        i += 1
    return None


# ---------------------------------------------------------------- maths
MAX_ANSWER = 200    # characters; nothing in a box is that long
NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
PLAIN = re.compile(rf"([+-]?)(?:({NUMBER})(?:/([0-9]+))?|\\[dt]?frac\{{([+-]?[0-9]+)\}}\{{([0-9]+)\}}"
                   r"|\\[dt]?frac([0-9])([0-9]))", re.ASCII)
NAMED = re.compile(r"\\?[A-Za-z][A-Za-z0-9_{}()'\\]*=", re.ASCII)    # x=, x_1=, f(2)=, \theta=
DECORATION = re.compile(r"\\left|\\right|\\[,;:! ]|\\displaystyle|\\\$|[$\s]|~")
THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", re.ASCII)
UNIT = re.compile(r"(?:\\%|%|\^\{?\\circ\}?|\\(?:text|mathrm|mbox)\{[A-Za-z^ /.]*\})+$")


def tidy(text: str) -> str:
    """The same expression without spacing, dollar signs and thousands separators."""
    text = DECORATION.sub("", text).replace("{,}", ",").replace("\u2212", "-").rstrip(".")
    return text.replace(",", "") if THOUSANDS.fullmatch(text) else text


def name_of(text: str) -> str:
    """What stands before the value: "x=" of "x=5", "" of "5"."""
    name = NAMED.match(text)
    return name[0] if name else ""


def plain_number(text: str) -> Fraction | None:
    r"""Exact value of a plain number: integer, decimal, a/b, \frac{a}{b}, any of them after `x=`. Else None.

    No product, power or sum is plain: `17*23`, `2^5`, `--5` and `1 2` are None; "x = -\frac{1}{2}" is -1/2.
    """
    if re.search(r"[0-9]\s+[0-9]", text):
        return None
    text = tidy(text)
    match = PLAIN.fullmatch(UNIT.sub("", text[len(name_of(text)):]))
    if not match:
        return None
    sign, number, under, a, b, c, d = match.groups()
    top, bottom = (Fraction(number), int(under or 1)) if number else (Fraction(a or c), int(b or d))
    return None if bottom == 0 else (-1 if sign == "-" else 1) * top / bottom


def math_reward(response: str, answer: str) -> float:
    r"""1.0 if the last \boxed{} after </think> equals the reference answer, else 0.0 (3.2: accuracy only).

    A number is compared exactly (0.5 = 1/2 = \frac12) and must be answered by a number; anything else goes to
    Math-Verify in a process that is killed after MATH_SECONDS. No signals: safe in any thread. RuntimeError
    if Math-Verify is not installed or fails on more than a tenth of at least 50 answers; a time-out is a
    wrong answer, and counted.
    """
    box = last_boxed(response)
    if box is None or not box.strip() or len(box) > MAX_ANSWER:
        return 0.0
    if len(answer) <= MAX_ANSWER and (gold := plain_number(answer)) is not None:
        maths.counts["fast"] += 1
        names = {name_of(tidy(answer)), name_of(tidy(box))} - {""}
        return float(plain_number(box) == gold and len(names) < 2)    # y = 2 is no answer to x = 2
    if tidy(box) == tidy(answer):
        maths.counts["fast"] += 1
        return 1.0
    # Math-Verify takes the last side of a chain of equations, and merges repeated list items: neither is an
    # answer
    if box.count("=") > max(1, answer.count("=")) or box.count(",") > answer.count(",") + box.count("{,}"):
        return 0.0
    return float(maths.equal(answer, box))


# ---------------------------------------------------------------- from a sample to its reward
class Grader:
    """
    The judge adapter of rollout.RolloutThread: submit(key, task, sample), poll() -> [(key, reward, info)].
    problems[task.prompt] says how to grade; info = {"passed": all tests or right answer, "verdicts": per test, ...}.
    Code rewards follow `scheme`: "vanilla" (all or nothing), "strict" or "soft" (report 3.3.1).
    """
    def __init__(self, problems: list[Problem], tokenizer, judge: Judge, scheme: str = "soft"):
        self.problems, self.tokenizer, self.judge, self.scheme = problems, tokenizer, judge, scheme
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="maths")   # a hard expression must not hold up decoding
        self.maths: list[tuple[tuple, Future]] = []
        self.code: dict[tuple, Problem] = {}
        self.ready: list[tuple] = []

    def submit(self, key: tuple, task, sample) -> None:
        problem = self.problems[task.prompt]
        text = self.tokenizer.decode(sample.tokens, skip_control=True)
        if sample.finish == "length":            # no end token: a truncated answer is not an answer
            self.ready.append((key, 0.0, {"passed": False, "verdicts": ["truncated"]}))
        elif problem.kind == "maths":
            self.maths.append((key, self.pool.submit(math_reward, text, problem.answer)))
        elif (program := extract_program(text)) is None:
            self.ready.append((key, 0.0, {"passed": False, "verdicts": ["no program"]}))
        else:
            self.code[key] = problem
            self.judge.submit(key, program, list(problem.tests), problem.entry)

    def poll(self) -> list[tuple]:
        done, self.ready = self.ready, []
        for key, future in [m for m in self.maths if m[1].done()]:
            right = future.result()              # a grader that raises ends the run: never silently 0
            done.append((key, right, {"passed": right == 1.0, "verdicts": ["right" if right == 1.0 else "wrong"]}))
        self.maths = [m for m in self.maths if not m[1].done() or m[0] not in {d[0] for d in done}]
        for key, verdicts in self.judge.poll():
            problem = self.code.pop(key)
            passed = [v.status == "AC" for v in verdicts]
            reward = difficulty_reward(passed, [t.difficulty for t in problem.tests], self.scheme)
            info = {"passed": all(passed), "verdicts": [v.status for v in verdicts]}
            done.append((key, reward, info))
        return done

    def waiting(self) -> int:
        return len(self.maths) + len(self.code) + len(self.ready)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def main():
    tower = r"5^{\left(5^{\left(5^{\left(5^5\right)}\right)}\right)}"
    for answer, box in (("391", "391"), ("391", "17*23"), ("0.5", r"\frac{1}{2}"), (r"\sqrt{2}", "2^{1/2}"),
                        ("x^2-1", "(x-1)(x+1)"), (r"\pi", tower)):
        begin = time.perf_counter()
        paid = math_reward(f"so \\boxed{{{box}}}", answer)
        print(f"reference {answer:10} answer {box:40} -> {paid:.0f}   {time.perf_counter() - begin:.3f} s")
    for answer, box, n in (("391", "391", 20000), (r"\sqrt{2}", "2^{1/2}", 100)):
        begin = time.perf_counter()
        for _ in range(n):
            math_reward(f"so \\boxed{{{box}}}", answer)
        print(f"{answer} against {box}: {n / (time.perf_counter() - begin):.0f} checks/s")
    maths.close()


if __name__ == "__main__":
    main()
