"""
Rewards: rule-based maths checking, and the test-difficulty driven reward for code. At the end the Grader, which turns
a sample into its reward, for RL and for evaluation.

Report, section 3.2 (rewards are accuracy alone, maths by Math-Verify), 3.3.1 and Fig. 5 (difficulty levels of unit
tests, strict and soft scheme). Ours, where the report is silent: exact k-means in one dimension with three levels,
equal scores per level, and a number has to be answered by a number (otherwise "\\boxed{17*23}", which only restates
the question, is paid).

    python reward.py                # a table of what is paid for some answers, and the checks per second
Expect 50,000 to 100,000 plain numbers and 100 to 300 Math-Verify answers a second on one core.
"""
import math
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from queue import SimpleQueue

from data.problems import Problem
from judge import Judge, maths
from judge.answers import normalise, same
from tokenizer import Tokenizer

# ---- the answer inside a response -----------------------------------------------------------------------------------

FENCE = re.compile(r"(?:\s|[-*+>] |[0-9]{1,3}[.)] )*(`{3,}|~{3,})[ \t]*(.*)", re.ASCII)      # also in a list item
PYTHON = re.compile(r"[{.\s]*(?:python[0-9.]*|py3?)\b", re.I)
DEFINES = re.compile(r"(?:async )?def \w+ ?\(|class \w+.*:|(?:import|from) [\w.]+(?:,| as | import |\s*(?:#.*)?$)"
                     r"|.*\b(?:input|open)\(|.*\bstdin\b")
BEGINS = re.compile(r"#|@\w|\"\"\"|'''|print\(|\w+(?:, ?\w+)* ?= ?\S|(?:for|while|if|with|try)\b[^#]*:")
STRINGS = re.compile(r"\"\"\"|'''|\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|#.*|\\.")


def extract_program(response: str) -> str | None:
    """
    The last complete fenced block behind the last </think> that is Python: by its language, or since it defines,
    imports or reads something. Without such a block the last one without a language; without any fence the whole
    answer, if it begins like code. None if there is no program, or if the thinking never ended.
    """
    answer, best, found = response.rpartition("</think>")[2], 0, []
    if "<think>" in answer:
        return None
    for language, lines in fenced_blocks(answer):
        python = PYTHON.match(language) or any(DEFINES.match(line.strip()) for line in lines)
        rank = 2 if python else 1 if not language else 0
        if rank and rank >= best and "".join(lines).strip():
            best, found = rank, lines
    if found:
        return dedented(found)
    lines = [line.strip() for line in answer.split("\n") if line.strip()]
    code = lines and (DEFINES.match(lines[0]) or BEGINS.match(lines[0]))
    code = code and any(DEFINES.match(line) or line.startswith("print(") for line in lines)
    return answer.strip() + "\n" if code and "```" not in answer and "~~~" not in answer else None


def fenced_blocks(text: str, strings: bool = True) -> list[tuple[str, list[str]]]:
    """
    The complete fenced blocks of a Markdown text: (language, lines) each. A fence may stand in a list item, have more
    than three marks, be of tildes, and close with words behind it; an opening fence of Python restarts an open block.
    strings: a fence inside of a docstring is text, as long as the docstring ends.
    """
    blocks, lines, mark, language, quote = [], [], "", "", ""
    for line in text.split("\n"):        # not one regular expression: linear in a hostile text too
        fence = FENCE.fullmatch(line) if "```" in line or "~~~" in line else None
        if fence and (quote or not fence[1].startswith(mark)):
            fence = None
        if fence and "`" not in fence[2] and (not mark or PYTHON.match(fence[2])):
            lines, mark, language = [], fence[1], fence[2].strip()
        elif fence and mark:
            blocks.append((language, lines))
            mark = ""
        elif mark:
            lines.append(line)
            quote = open_string(line, quote) if strings and (not language or PYTHON.match(language)) else ""
    return fenced_blocks(text, strings=False) if quote else blocks


def open_string(line: str, quote: str) -> str:
    """The triple quote that is open behind this line of Python, "" for none. quote: the one that is open before it."""
    at = 0
    while True:
        if quote:
            end = line.find(quote, at)
            if end < 0:
                return quote
            at, quote = end + 3, ""
        m = STRINGS.search(line, at)
        if not m:
            return ""
        at, quote = m.end(), m[0] if m[0] in ("'''", '"""') else ""


def dedented(lines: list[str]) -> str:
    """The lines as one text, moved to the left by the indentation of the first that is not blank."""
    first = next(line for line in lines if line.strip())
    n = len(first) - len(first.lstrip())
    return "".join(line[min(n, len(line) - len(line.lstrip())):] + "\n" for line in lines)


def last_boxed(response: str) -> str | None:
    r"""
    Content of the last \boxed{...} behind the last </think>, found by counting braces (not the escaped ones). None if
    there is no box, if the last one is left open, or if the thinking never ended.

    By hand: "\boxed{1} so \boxed{\frac{1}{2}}" -> "\frac{1}{2}".
    """
    answer = response.rpartition("</think>")[2]
    boxes = [] if "<think>" in answer else [m.end() for m in BOX.finditer(answer)]
    if not boxes:
        return None
    depth, i = 1, boxes[-1]
    begin = i
    while i < len(answer):
        if answer[i] == "\\":
            i += 1                       # skip the escaped character
        elif answer[i] in "{}":
            depth += 1 if answer[i] == "{" else -1
            if not depth:
                return answer[begin:i]
        i += 1
    return None


# ---- maths ----------------------------------------------------------------------------------------------------------

MAX_ANSWER = 2000    # characters; a longer answer is right only if it is the reference, letter for letter [ours]
BOX = re.compile(r"\\(?:boxed|fbox)\{")
BETWEEN_BOXES = re.compile(r"[\s$.,;]*(?:and|or|\\text\{ ?(?:and|or) ?\})?[\s$.,;]*")
reference_form = lru_cache(maxsize=1 << 14)(normalise)


def plain_number(text: str) -> Fraction | None:
    r"""Exact value of a plain number in any clothes: "x = 2\frac{1}{2}\text{ cm}" -> 5/2; None for all else."""
    return reference_form(text).value


def math_reward(response: str, answer: str) -> float:
    r"""
    1.0 if the last \boxed{} behind </think> equals the reference answer, else 0.0 (3.2: accuracy only).

    Both go through the rules of judge/answers.py. A number is compared exactly (0.5 = 1/2 = \frac12) and has to be
    answered by a number. Where rules cannot tell, Math-Verify does, in a process that is killed after
    maths.MATH_SECONDS: a time-out is a wrong answer, and is counted. RuntimeError if Math-Verify is not installed, or
    fails on more than a tenth of at least 50 answers. Any thread may call this.
    """
    box = last_boxed(response)
    if box is None or not box.strip():
        return 0.0
    if max(len(box), len(answer)) > MAX_ANSWER:
        maths.counts["long"] += box.split() != answer.split()
        return float(box.split() == answer.split())
    reference = reference_form(answer)
    paid = same(reference, normalise(box))
    if not paid and reference.items and (boxes := last_boxes(response, len(reference.items))):
        paid = same(reference, normalise(", ".join(boxes)))         # \boxed{1} and \boxed{2}
    if paid is None:
        return float(maths.equal(reference.text, normalise(box).text))
    maths.counts["fast"] += 1
    return float(paid)


def last_boxes(response: str, n: int) -> list[str]:
    r"""The contents of the last n > 1 boxes, if they are all that only commas, `and` and `or` stand between."""
    boxes, text = [], response.rpartition("</think>")[2]
    while n > 1 and len(boxes) <= n and (box := last_boxed(text)) is not None:
        *_, found = BOX.finditer(text)
        begin, after = found.start(), text[found.end() + len(box) + 1:]
        if boxes and not BETWEEN_BOXES.fullmatch(after):
            break
        boxes.insert(0, box)
        text = text[:begin]
    return boxes if len(boxes) == n else []


# ---- code: difficulty levels and reward (3.3.1) ---------------------------------------------------------------------

def estimate_pass_rates(table: Sequence[Sequence]) -> list[float]:
    """
    Pass rate of every test over all solutions of several models (3.3.1). table[solution][test] -> rate per test.

    An entry is a bool, a verdict's status, or a Verdict; a judge error (JE) counts neither way. By hand: [[1, 0],
    [1, 1]] -> [1.0, 0.5]. ValueError for an empty or ragged table, or a test without a single verdict.
    """
    rows = [[getattr(v, "status", v) for v in row] for row in table]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("the verdict table should have a row, a test, and rows of equal length")
    rates = []
    for test, column in enumerate(zip(*rows, strict=True)):
        known = [v == "AC" if isinstance(v, str) else bool(v) for v in column if v != "JE"]
        if not known:
            raise ValueError(f"test {test} has no verdict but judge errors")
        rates.append(sum(known) / len(known))
    return rates


def difficulty_levels(pass_rates: Sequence[float], k: int = 3) -> list[int]:
    """
    Cluster tests by pass rate into at most k difficulty levels, 0 = easiest (Fig. 5: easy, medium, hard). -> level per
    test.

    Exact k-means in one dimension: minimise sum over clusters of sum_i (x_i - mean)^2. The clusters are then intervals,
    so dynamic programming over the sorted distinct rates is exact, and equal rates are never split:

        best[c][j] = min_i best[c-1][i] + cost(i, j)
        cost(i, j) = sum (x - mean)^2 of the distinct rates i..j-1, each weighted by its count

    Fewer than k distinct rates give fewer levels. By hand: rates .1 .9 .2 .9 .5, k = 3 -> levels 2 0 2 0 1. ValueError
    for no rates, rates outside [0, 1], or k < 1.
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


def difficulty_reward(passed: Sequence[bool], levels: Sequence[int], scheme: str,
                      scores: Sequence[float] | None = None) -> float:
    """
    Reward in [0, 1] of one program. passed: bool per test; levels: difficulty level per test, lower is easier.

    Levels l = 1..L from easy to hard have scores s_l (equal by default, scaled to sum 1); p_l of n_l tests pass:

        vanilla   r = 1 if every test passes, else 0
        strict    r = sum_l s_l [ p_m = n_m for all m <= l ]       a level counts if it and all easier ones are complete
        soft      r = sum_l s_l p_l / n_l                          a level's score is split evenly over its tests

    By hand: levels 0 0 1 1, passed 1 1 1 0: vanilla 0, strict 1/2, soft 1/2 + 1/2 * 1/2 = 3/4. ValueError for no tests,
    unequal lengths, an unknown scheme, or scores that are not one positive number per level.
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


# ---- what a person should be told -----------------------------------------------------------------------------------

def nothing_learned(row: dict) -> str:
    """
    For an iteration of RL without an update: why, and what to check; "" if it made one. row: its line of metrics.jsonl,
    of which updates, all0, all1 and verdicts are read.
    """
    if row["updates"]:
        return ""
    shares = f"all 0: {row['all0']:.0%} of the groups, all 1: {row['all1']:.0%}"
    if row["all0"] > 0.9:
        why = (r"nearly every answer got 0. Look at one: does it end, within max_new_tokens, with \boxed{} or a fenced "
               "program? Do the references and tests fit the questions? Can the model solve any of them?")
    elif row["all1"] > 0.9:
        why = "nearly every answer was right: take harder problems (data/rl_problems.py)"
    else:
        why = "the answers to a question all got the same reward: raise group_size, or change the problems"
    odd = {name: maths.counts[name] for name in ("long", "timeouts", "errors", "unreadable") if maths.counts[name]}
    return (f"nothing was learned in iteration {row['step']} ({shares}): {why}"
            + (f"; maths answers so far: {odd}" if odd else ""))


# ---- from a sample to its reward ------------------------------------------------------------------------------------

class Grader:
    """
    Grades samples for rollout.Rollout: submit() takes one, poll() returns the rewards that are ready. Neither waits:
    code runs in the judge's sandboxes, maths in threads, so that a hard expression does not hold up decoding.

    problems: task.prompt is an index into it. scheme: "vanilla" (all tests or nothing), "strict" or "soft" (3.3.1).
    """
    def __init__(self, problems: list[Problem], tokenizer: Tokenizer, judge: Judge, scheme: str = "soft"):
        self.problems, self.tokenizer, self.judge, self.scheme = problems, tokenizer, judge, scheme
        self.pool = ThreadPoolExecutor(maths.MATH_WORKERS, thread_name_prefix="maths")
        self.maths: SimpleQueue[tuple[tuple, str, Future]] = SimpleQueue()     # (key, text, reward), done
        self.code: dict[tuple, Problem] = {}            # key -> problem, while the judge has the program
        self.ready: list[tuple[tuple, float, dict]] = []

    def submit(self, key: tuple, task, sample) -> None:
        """
        Grade sample.tokens (token ids) as an answer to problems[task.prompt]; poll() will give the reward under `key`.
        task: a rollout.Task; sample: an engine.Sample.
        """
        problem = self.problems[task.prompt]
        text = self.tokenizer.decode(sample.tokens, skip_control=True)
        if sample.finish == "length":                   # no end token: a truncated answer is not an answer
            self.ready.append((key, 0.0, {"passed": False, "verdicts": ["truncated"]}))
        elif problem.kind == "maths":
            future = self.pool.submit(math_reward, text, problem.answer)
            future.add_done_callback(lambda done: self.maths.put((key, text, done)))
        elif (program := extract_program(text)) is None:
            self.ready.append((key, 0.0, {"passed": False, "verdicts": ["no program"]}))
        else:
            self.code[key] = problem
            self.judge.submit(key, program, list(problem.tests), problem.entry, problem.limits)

    def poll(self) -> list[tuple[tuple, float, dict]]:
        """
        (key, reward, info) of the samples whose rewards are ready, in any order. info: {"passed": right answer or all
        tests, "verdicts": why}: for code a status per test, for maths "right", "wrong" or "no box", and for either
        "truncated" or "no program". What math_reward or the judge raises ends the run: a grader that fails must never
        look like a wrong answer.
        """
        done, self.ready = self.ready, []
        while not self.maths.empty():                   # only this thread takes from it
            key, text, future = self.maths.get()
            if future.cancelled():                      # by close()
                continue
            reward = future.result()
            why = "right" if reward == 1.0 else "no box" if last_boxed(text) is None else "wrong"
            done.append((key, reward, {"passed": reward == 1.0, "verdicts": [why]}))
        for key, verdicts in self.judge.poll():
            problem, statuses = self.code.pop(key), [v.status for v in verdicts]
            passed = [status == "AC" for status in statuses]
            reward = difficulty_reward(passed, [t.difficulty for t in problem.tests], self.scheme)
            done.append((key, reward, {"passed": all(passed), "verdicts": statuses}))
        return done

    def close(self) -> None:
        """Stop the threads; what is still queued for them is dropped."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    """The table of the header."""
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
