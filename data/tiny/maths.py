"""
Maths problems with levels, worked steps and a rule-checkable answer: the tiny world's stand-in for the report's 100K
maths problems (section 3.2). Integers and fractions, no proofs, no multiple choice, answers not forced to integers.

Levels 1 to 3 are trained on and, held out by identity, evaluated. Level 0, "What is 3+4?", is what a newcomer types
first: one training problem in ten, and a held-out file of its own; the average over test.jsonl keeps its meaning.

A problem is a pure function of the random generator it gets. Its identity is the arithmetic, not the wording: "12 + 7"
and "Ada has 12 apples and gets 7 more" fall on the same side of the border between training and test.

    python -m data.tiny.maths        # prints one problem of each kind and level
"""
import math
import random

from data.problems import Problem, different, identity

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn"]
THINGS = ["apples", "books", "coins", "eggs", "pens", "shells"]
TOP = 10                                 # largest number in sums: facts that a million parameters can learn in minutes
TRAINED = (0, *3 * (1, 2, 3))            # levels in training: one problem in ten is what a newcomer types first
Parts = tuple[str, str, list[str], str]  # of a problem: (canonical form, question, steps, answer)


# ---- the kinds, each a function of a generator and a level 1..3 -----------------------------------------------------

def chain(rng: random.Random, level: int) -> Parts:
    """level + 1 operations + and -, every number between 1 and TOP."""
    value = rng.randint(1, TOP - 2)
    terms, steps = [value], []
    for _ in range(level + 1):
        up = rng.random() < 0.5 if 1 < value < TOP else value == 1
        n = rng.randint(1, TOP - value) if up else rng.randint(1, value - 1)
        terms.append(n if up else -n)
        steps.append(f"{value}{'+' if up else '-'}{n}={value + terms[-1]}")
        value += terms[-1]
    text = str(terms[0]) + "".join(f"{t:+d}" for t in terms[1:])
    if rng.random() < 0.25:
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        events = [f"gets {t} more" if t > 0 else f"loses {-t}" for t in terms[1:]]
        question = f"{name} has {terms[0]} {thing}, {', '.join(events)}. How many {thing} are there?"
    else:
        question = rng.choice(["What is {}?", "Compute {}."]).format(text)
    return f"chain {text}", question, steps, str(value)


def products(rng: random.Random, level: int) -> Parts:
    """a * b, then a sum or difference per further level."""
    a = rng.randint(2, 4)
    b = rng.randint(2, TOP // a)
    value, text, steps = a * b, f"{a}*{b}", [f"{a}*{b}={a * b}"]
    for _ in range(level):
        up = value < 2 or (rng.random() < 0.5 and value < TOP)
        n = rng.randint(1, TOP - value) if up else rng.randint(1, value - 1)
        steps.append(f"{value}{'+' if up else '-'}{n}={value + n if up else value - n}")
        text += f"{'+' if up else '-'}{n}"
        value += n if up else -n
    return f"product {text}", rng.choice(["What is {}?", "Compute {}."]).format(text), steps, str(value)


def equation(rng: random.Random, level: int) -> Parts:
    """a x + b = c at level 1; a x + b - d = c at level 2; a x + b = e x + c at level 3."""
    a = rng.randint(2, 4)
    x, b = rng.randint(1, TOP // a), rng.randint(1, TOP)
    ax = a * x
    left, right, steps = f"{a}x+{b}", ax + b, []
    if level == 2:
        d = rng.randint(1, TOP)
        left, right = f"{left}-{d}", right - d
        steps.append(f"{right}+{d}={right + d}")
    if level == 3:
        e = rng.randint(1, a - 1)
        text, steps = f"{left}={e if e > 1 else ''}x+{right - e * x}", [f"{a}-{e}={a - e}"]
        right, a, ax = right - e * x, a - e, (a - e) * x
    else:
        text = f"{left}={right}"
    steps.append(f"{ax + b}-{b}={ax}")
    if a > 1:
        steps.append(f"{ax}/{a}={x}")
    return f"equation {text}", f"Solve for x: {text}.", steps, str(x)


def remainder(rng: random.Random, level: int) -> Parts:
    """(a + b) mod m, then one more sum per level."""
    m, a = rng.randint(3, 6), rng.randint(1, TOP)
    text, steps = str(a), []
    for _ in range(level):
        b = rng.randint(1, TOP)
        text += f"+{b}"
        steps.append(f"{a}+{b}={a + b}")
        a += b
        if a > TOP and len(steps) < level:
            steps.append(f"{a}-{a // m * m}={a % m}")
            a %= m
    steps += [f"{m}*{a // m}={a // m * m}", f"{a}-{a // m * m}={a % m}"]
    return f"remainder {text} by {m}", f"What is the remainder of {text} divided by {m}?", steps, str(a % m)


def fraction(rng: random.Random, level: int) -> Parts:
    """Simplify p/q; from level 2 on a/m + b/m first."""
    while True:
        g, p, q = rng.randint(2, 6), rng.randint(1, 9), rng.randint(2, 9)
        if p < q and g * q <= 2 * TOP and math.gcd(p, q) == 1:
            break
    top, bottom, steps = g * p, g * q, []
    text = f"\\frac{{{top}}}{{{bottom}}}"
    if level > 1:
        first = rng.randint(1, top - 1)
        text = f"\\frac{{{first}}}{{{bottom}}}+\\frac{{{top - first}}}{{{bottom}}}"
        steps.append(f"{first}+{top - first}={top}")
    steps += [f"{top}/{g}={p}", f"{bottom}/{g}={q}"]
    return f"fraction {text}", f"Simplify {text}.", steps, f"\\frac{{{p}}}{{{q}}}"


KINDS = [chain, products, equation, remainder, fraction]


# ---- level 0: one operation on two numbers, as a newcomer types it --------------------------------------------------

def short(rng: random.Random, level: int = 0) -> Parts:
    """a+b of numbers up to TOP, the differences that undo them, and products up to 2 TOP."""
    sign = rng.choices("+-*", weights=[3, 3, 1])[0]
    a, b = rng.randint(1, TOP), rng.randint(1, TOP)
    if sign == "-":
        a += b
    elif sign == "*":
        b = rng.randint(1, min(TOP, 2 * TOP // a))
    answer = {"+": a + b, "-": a - b, "*": a * b}[sign]
    ask = rng.choices(["What is {}?", "Compute {}.", "How much is {}?", "{}{s}={s}?", "{}"], weights=[4, 2, 1, 1, 1])[0]
    gap = rng.choice(["", "", " "])
    return f"short {a}{sign}{b}", ask.format(f"{a}{gap}{sign}{gap}{b}", s=gap), [f"{a}{sign}{b}={answer}"], str(answer)


# ---- problems -------------------------------------------------------------------------------------------------------

def problem(rng: random.Random, level: int | None = None) -> Problem:
    """One problem of a random kind; level 0..3 (operations beyond the first), as in training when None."""
    level = rng.choice(TRAINED) if level is None else level
    kind = rng.choices(KINDS, weights=[4, 2, 2, 1, 1])[0] if level else short
    canonical, question, steps, answer = kind(rng, level)
    return Problem(identity(canonical), "maths", question, level, answer=answer, reasoning="\n".join(steps),
                   solution=f"\\boxed{{{answer}}}")


def table(rng: random.Random) -> str:
    """A page of number facts like those of a school book: sums, differences or products with one number."""
    n, kind = rng.randint(1, 2 * TOP), rng.choice("+-*")
    if kind == "*":
        n = rng.randint(2, 6)
        facts = [f"{n}*{k}={n * k}" for k in range(1, 7)]
    elif kind == "+":
        facts = [f"{n}+{k}={n + k}" for k in range(1, TOP + 1)]
    else:
        facts = [f"{n}-{k}={n - k}" for k in range(1, n + 1)]
    rng.shuffle(facts)
    return f"Facts about {n}: " + ", ".join(facts[:12]) + "."


def problems(n: int, split: str, seed: int, levels: tuple[int, ...] = (1, 2, 3)) -> list[Problem]:
    """
    n different problems of one split, by default of the levels that are held out for evaluation. UserError when there
    are not n different ones.
    """
    rng = random.Random(f"maths {split} {seed}")
    return different(n, split, lambda: problem(rng, rng.choice(levels)), f"maths problems of levels {levels}")


if __name__ == "__main__":
    rng = random.Random(0)
    for kind, levels in [(short, 6 * (0,)), *((kind, (1, 2, 3)) for kind in KINDS)]:
        for level in levels:
            print(f"{kind.__name__:10} {level}", *kind(rng, level)[1:], sep="  |  ")
