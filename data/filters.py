"""
Filters for RL problems that look at the problem alone (report section 3.2): references that nobody can match, copies,
problems of an evaluation set, golden solutions that fail their own tests. data/rl_problems.py adds those that need the
answers of models.

    check_references("rl.jsonl", problems)       # what rl.py does after read_problems

The report says "n-gram deduplication and decontamination". Ours: 16 words in a row of a held-out question, as for
documents, and for copies the same numbers with most pairs of neighbouring words [ours]: a question in which two words
were replaced is the same problem, one with other numbers is not.
"""
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from configurator import UserError
from data.decontaminate import build_index, contaminated
from data.dedup import WORD, near_duplicates
from data.jsonl import read_jsonl
from data.problems import Problem
from data.text import shown
from judge import Judge, maths
from reward import MAX_ANSWER, extract_program, math_reward, reference_form

# ---- references -----------------------------------------------------------------------------------------------------

MAX_OUTPUT = 1 << 20        # bytes of output that the judge reads of a program


def reference_fault(problem: Problem) -> str:
    """Why no answer to this problem can be paid, "" if one can. Expressions go to Math-Verify: milliseconds each."""
    if problem.kind == "code":
        longest = max((len(test.expected.encode()) for test in problem.tests), default=0)
        most = MAX_OUTPUT if problem.limits.output_kb is None else int(problem.limits.output_kb * 1024)
        return f"expects {longest:,} bytes of output, the judge reads {most:,}" if longest > most else ""
    answer = problem.answer
    if "####" in answer:
        return "the answer is GSM8K's whole column; the reference is what stands behind ####"
    if len(answer) > MAX_ANSWER:
        return f"the answer has {len(answer):,} characters; above {MAX_ANSWER:,} only the same text is paid"
    if math_reward(f"\\boxed{{{answer}}}", answer) != 1.0:
        return f"the answer {answer[:40]!r} is not paid even in its own box"
    form = reference_form(answer)
    simple = form.value is not None or form.items or re.fullmatch(r"(?:\\text\{)?[A-Za-z' -]{1,60}\}?", form.text)
    if simple or maths.equal(form.text, form.text):
        return ""
    return f"Math-Verify cannot read the answer {answer[:40]!r}; only the same text is paid"


def check_references(path: str, problems: Sequence[Problem], max_share: float = 0.05, at_most: int = 0) -> list[str]:
    """
    -> reference_fault of each problem of a file. Prints how many there are and the first ones with their lines.
    UserError above max_share of the problems. at_most: check this many, evenly spread over the file, 0 = all; an answer
    that is no plain number takes tens of milliseconds.
    """
    problems = problems[::-(-len(problems) // at_most)] if at_most and problems else problems
    with ThreadPoolExecutor(maths.MATH_WORKERS) as pool:
        found = list(pool.map(reference_fault, problems))
    faults = {p.id: fault for p, fault in zip(problems, found, strict=True) if fault}
    if not faults:
        return found
    lines = {row.get("id"): n for n, row in read_jsonl(path)} if str(path).endswith(".jsonl") else {}
    named = [f"{path}:{lines[key]}: " if key in lines else f"{path}: " for key in faults]
    some = [f"{where}problem {key}: {fault}" for where, (key, fault) in zip(named[:3], faults.items(), strict=False)]
    count = f"{len(faults)} of {len(problems)} problems checked can never be answered right"
    if len(faults) > max_share * len(problems):
        raise UserError(f"{count}, more than {max_share:.0%}. " + "; ".join(some))
    print(shown(f"warning: {count}: " + "; ".join(some), lines=False), file=sys.stderr)
    return found


# ---- copies and held-out problems -----------------------------------------------------------------------------------

def copies(questions: Sequence[str], heldout: Sequence[str] = ()) -> list[str]:
    """
    For each question "" or why it goes: "held out" if it holds 16 words in a row of a held-out question (all of a
    shorter one), or is its copy; "copy" if it is a copy of an earlier question.
    """
    texts = [*heldout, *questions]
    first = first_copies(texts)
    overlap = contaminated(list(questions), build_index(list(heldout))) if heldout else [False] * len(questions)
    reasons = []
    for i, hit in enumerate(overlap, len(heldout)):
        reasons.append("held out" if hit or first[i] < len(heldout) else "copy" if first[i] < i else "")
    return reasons


def first_copies(texts: Sequence[str]) -> list[int]:
    """
    For each text the index of the first that it is a copy of, else its own. Two texts are copies if they hold the same
    numbers and share six tenths of the pairs of neighbouring words of the shorter one; without numbers, or among more
    than 500 texts with the same numbers, if MinHash finds them (data/dedup.py).
    """
    groups: dict[tuple, list[int]] = {}
    words = [WORD.findall(text.lower()) for text in texts]
    for i, text in enumerate(words):
        if text:
            groups.setdefault(tuple(sorted(w for w in text if w[0].isdigit())), []).append(i)
    first = list(range(len(texts)))
    for numbers, members in groups.items():
        if len(members) == 1:
            continue
        if not numbers or len(members) > 500:
            near = near_duplicates([texts[i] for i in members])
            for i, j in zip(members, near.tolist(), strict=True):
                first[i] = members[j]
            continue
        pairs = {i: set(zip(words[i], words[i][1:], strict=False)) or {tuple(words[i])} for i in members}
        for k, i in enumerate(members):
            match = next((j for j in members[:k] if first[j] == j and len(pairs[i] & pairs[j])
                          >= 0.6 * min(len(pairs[i]), len(pairs[j])) and 2 * len(pairs[i]) > len(pairs[j])
                          and 2 * len(pairs[j]) > len(pairs[i])), i)
            first[i] = match
    return first


def without_heldout(items: Iterable, text_of: Callable[[Any], str], heldout: Sequence[str], dropped: dict[str, int],
                    n: int = 1000) -> Iterator:
    """
    The items whose text (text_of(item); "" is never held out) is free of the held-out questions, as copies() tells;
    those that are not are counted in dropped["held out"]. n: items that are looked at together.
    """
    items = iter(items)
    while heldout and (part := list(islice(items, n))):
        for item, reason in zip(part, copies([text_of(item) for item in part], heldout), strict=True):
            if reason == "held out":
                dropped[reason] = dropped.get(reason, 0) + 1
            else:
                yield item
    yield from items


# ---- golden solutions -----------------------------------------------------------------------------------------------

def golden_faults(problems: Iterable[Problem], judge: Judge) -> dict[str, str]:
    """
    Problem id -> how its golden solution fails its tests, for the code problems that have one and where it fails: "WA
    in test 3". Problems without a golden solution are not in it.
    """
    waiting, faults = {}, {}
    for p in problems:
        program = extract_program(p.solution) if p.kind == "code" and p.solution else None
        if program is not None:
            waiting[p.id] = p
            judge.submit(p.id, program, list(p.tests), p.entry, p.limits)
    while waiting:
        for key, verdicts in judge.poll():
            bad = [i for i, v in enumerate(verdicts) if v.status != "AC"]
            if bad:
                faults[key] = f"{verdicts[bad[0]].status} in test {bad[0]}"
            del waiting[key]
        time.sleep(0.01)
    return faults
