"""
Problems in the form of the public sets, from a seed, and a policy that follows a script: 200 as in MBPP (a function,
tests of three kinds), 200 as in GSM8K (a story, a number). Their wording is ours. For tests/test_real_like.py.
"""
import json
import random

from data.problems import Problem, Test, identity

NAMES = ("Ada", "Ben", "Cleo", "Dara", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jun")
THINGS = ("pens", "cards", "shells", "apples", "stamps", "bolts", "tickets", "marbles", "seeds", "coins")


def maths_set(seed: int, n: int = 200) -> list[Problem]:
    """Stories of two steps. The formula, which restates the story, stands in `reasoning`."""
    rng, found = random.Random(seed), {}
    while len(found) < n:
        who, what, where = rng.choice(NAMES), rng.choice(THINGS), rng.choice(("market", "school", "fair", "library"))
        a, b, c = rng.randint(21, 99), rng.randint(12, 89), rng.randint(3, 150)
        question, formula, value = rng.choice([
            (f"{who} packs {a} boxes for the {where}, and puts {b} {what} into each of them. On the way {c} {what} "
             f"are lost. How many {what} arrive?", f"{a} \\times {b} - {c}", a * b - c),
            (f"For the {where} {who} buys {a} bags with {b} {what} each and finds {c} more {what} at home. How many "
             f"{what} does {who} have now?", f"{a} \\cdot {b} + {c}", a * b + c),
            (f"The {where} sold {a} {what} every day for {b} days, and then {c} {what} on the last day. How many "
             f"{what} were sold in all?", f"{a}*{b}+{c}", a * b + c)])
        found[question] = Problem(identity(question), "maths", question, answer=str(value), reasoning=formula,
                                  solution=f"\\boxed{{{value}}}")
    return list(found.values())


def code_set(seed: int, n: int = 200) -> list[Problem]:
    """
    One function each, with two tests of three kinds: positive numbers; a negative one; none that is left. The programs
    of answer() pass one, two or three of the kinds, so the pass rates and the levels are known.
    """
    rng, found, seen = random.Random(seed), {}, set()
    while len(found) < n:
        a, b, m = rng.randint(2, 9), rng.randint(1, 60), rng.randint(2, 4)
        op, word = rng.choice((("sum", "the sum"), ("max", "the largest"), ("min", "the smallest"),
                               ("len", "the number")))
        if (key := tuple(sorted((a, b, m)))) in seen:       # the same numbers in nearly the same words: a copy
            continue
        seen.add(key)
        entry = f"{word.split()[-1]}_{a}_{b}_{m}"
        question = (f"Write a function {entry}(xs). It keeps the numbers of the list xs that {m} divides, turns each "
                    f"kept number x into {a} * x + {b}, and returns {word} of the results, 0 if nothing is kept.")
        inputs = [[m * rng.randint(low, low + 8), m * rng.randint(low, low + 8) + 1] for low in (1, 1, -9, -9)]
        inputs += [[], [m + 1, 1 - m]]
        results = [[a * x + b for x in xs if x % m == 0] for xs in inputs]
        tests = tuple(Test("call", json.dumps([xs]), json.dumps({"sum": sum, "max": max, "min": min, "len": len}[op](ys)
                                                                if ys else 0))
                      for xs, ys in zip(inputs, results, strict=True))
        body = f"    ys = [{a} * x + {b} for x in xs if x % {m} == 0]\n"
        golden = f"def {entry}(xs):\n{body}    return {op}(ys) if ys else 0\n"
        found[question] = Problem(identity(question), "code", question, tests=tests, entry=entry,
                                  solution=f"```python\n{golden}```")
    return list(found.values())


# ---- what the policy answers ----------------------------------------------------------------------------------------

CLOTHES = (r"\boxed{%s}", r"so $\boxed{%s \text{ of them}}$", r"\boxed{x = %s}", r"\boxed{\mathbf{%s}}")
FORMS = ("```python\n%s```", "1. First\n\n   ~~~py\n   %s   ~~~\n",
         "Solution:\n````python\n%s````\nOutput:\n```\n7\n```")
HOSTILE = ("import os\nos._exit(0)\n", "import sys\nsys.exit(0)\n",
           "class Always(int):\n    def __eq__(self, other):\n        return True\n\n\n"
           "def ENTRY(xs):\n    return Always(7)\n", "raise SystemExit('AC')\n", "print('AC ' * 20)\n")


def answer(problem: Problem, kind: str, i: int) -> tuple[str, float | int]:
    """
    (text, what it deserves): right 1 or wrong 0 for maths; for code the number of kinds of tests, from the easiest on,
    that the program passes, 0 to 3. kind: right, wrong, hostile; for code also part1 and part2.
    """
    if problem.kind == "maths":
        value = int(problem.answer)
        shown = {"right": f"{value:,}" if i % 2 else str(value), "wrong": str(value + 1 + i),
                 "hostile": (problem.reasoning, f"{value - 1}+1", f"{value}, {value + 1}")[i % 3]}[kind]
        text = f"<think>\nFirst \\boxed{{{value}}}.\n</think>\n\n" + CLOTHES[i % len(CLOTHES)] % shown
        return text, int(kind == "right")
    golden = problem.solution.removeprefix("```python\n").removesuffix("```")
    head, body = golden.split("\n", 1)
    first, last = body.rstrip("\n").split("\n")
    program = {"right": golden, "wrong": f"{head}\n    return None\n",
               "part2": f"{head}\n{first}\n    return {last.split('return ')[1].split(' if ')[0]} if ys else None\n",
               "part1": f"{head}\n    if not xs or min(xs) < 0:\n        return 'no'\n{body}",
               "hostile": HOSTILE[i % len(HOSTILE)].replace("ENTRY", problem.entry)}[kind]
    form = FORMS[i % len(FORMS)]
    program = program.replace("\n", "\n   ").removesuffix("   ") if "~~~" in form else program
    return form % program, {"right": 3, "part2": 2, "part1": 1}.get(kind, 0)
