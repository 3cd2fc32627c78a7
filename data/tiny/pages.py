"""What the pages of the tiny web say: content blocks made from the world's facts and from worked problems.

A page is a list of blocks; data/tiny/web.py hides them in HTML, `plain` gives the text a perfect extractor
would find. Each kind returns (blocks, (quality, reasoning depth, ad-ness)), the scores a teacher would give,
0 to 3 (report section 2.1 tags documents with such scores). Sentences are short and words few, for the reader
is a 1M-parameter model. The distances, ages and small sums in the prose agree with the facts of the world.
"""

import random
import re

from data.tiny.world import CROPS, FOODS, MONTHS, RIVERS, TRADES, World, distance, say

# a block: ("h1", text) ("p", text) ("ul", [text, ...]) ("code", source) ("post", [block, ...]), or
# ("tight", text) for text directly under a code block. Text may hold $TeX$, `code` and newlines.


def block_text(question: str, solution: str) -> str:
    """The text of one worked problem, the shape the base model is prompted with."""
    return f"Problem: {question}\nSolution:{chr(10) if solution.startswith('```') else ' '}{solution}"


def problem(question: str, solution: str) -> list:
    """A worked problem as blocks: fenced parts become code blocks, the text between them paragraphs."""
    parts = re.split(
        r"(?:^|\n)```(?:python)?\n(.*?)\n```(?=\n|$)\n?", block_text(question, solution), flags=re.S
    )
    blocks = [("code", part) if i % 2 else ("tight" if i else "p", part) for i, part in enumerate(parts)]
    return [b for b in blocks if b[0] == "code" or b[1]]


def plain(blocks: list) -> str:
    """The text a perfect extractor returns for these blocks."""
    out = ""
    for kind, body in blocks:
        text = {
            "h1": lambda b: f"# {b}",
            "p": str,
            "tight": str,
            "ul": lambda b: "\n".join(f"- {x}" for x in b),
            "code": lambda b: f"```python\n{b}\n```",
            "post": plain,
        }[kind](body)
        out += ("\n" if kind in ("code", "tight") else "\n\n") * bool(out) + text
    return out


# ---- the kinds of page


def encyclopedia(w: World, r: random.Random):
    name = r.choice(sorted(w.things))
    kind, facts = w.things[name]
    chosen = r.sample(facts, max(1, len(facts) - r.randrange(2)))
    chosen.sort(key=facts.index)
    if r.random() < 0.12:  # a stub: little to learn, a shallow page
        return [
            ("h1", name),
            ("p", f"{say(r, name, chosen[0])} This page is short. You can help us to make it better."),
        ], (1, 0, 0)
    more = []
    for fact in chosen:  # follow one fact to the thing that it names
        links = [v for v in fact[1:] if v in w.things and v != name]
        more += [(v, r.choice(w.things[v][1])) for v in links if r.random() < 0.6]
    blocks = [
        ("h1", name if kind != "animal" else f"The {name}"),
        ("p", " ".join(say(r, name, f) for f in chosen)),
    ]
    if more:
        blocks.append(("p", " ".join(say(r, v, f) for v, f in more)))
    depth = 1
    if kind in ("town", "river") and r.random() < 0.6:  # two facts and a difference: one step of reasoning
        river = name if kind == "river" else facts[0][1]
        i, j = r.sample(range(3), 2)
        blocks.append(("p", way_between(w, r, river, i, j)))
        depth = 2
    if kind == "region":
        blocks.append(("ul", [say(r, t, w.things[t][1][0]) for t in w.towns if w.things[t][1][0][2] == name]))
    return blocks, (2 + (len(chosen) + len(more) > 4), depth, 0)


def way_between(w: World, r: random.Random, river: str, i: int, j: int) -> str:
    s, t, m, n = distance(w, river, i, j)
    return r.choice(
        [
            f"{s} is at mile {m} and {t} is at mile {n} of the {river}. ${m} - {n} = {m - n}$. "
            f"The way is {m - n} miles.",
            f"How far is it from {t} to {s}? On the {river} {s} is at mile {m} and {t} is at mile {n}. "
            f"So the way is ${m} - {n} = {m - n}$ miles.",
        ]
    )


def maths_topic(r: random.Random) -> tuple[str, str]:
    """(title, a short explanation with a small formula) of one topic."""
    a, b, c = r.randrange(2, 60), r.randrange(2, 60), r.randrange(2, 10)
    x, k = r.randrange(2, 13), r.randrange(2, 7)
    topics = [
        (
            "Adding numbers",
            f"To add two numbers, add the ones, then the tens, and so on. "
            f"Here is a small case: ${a} + {b} = {a + b}$.",
        ),
        (
            "Sums of many numbers",
            f"Add the numbers from left to right. ${a} + {b} = {a + b}$ and ${a + b} + {c} = {a + b + c}$.",
        ),
        (
            "Taking away",
            f"To take a number away is to go back on the line. ${a + b} - {a} = {b}$, "
            f"because ${a} + {b} = {a + b}$.",
        ),
        (
            "Times tables",
            f"A product is a sum of equal numbers. ${c} \\times {x} = {c * x}$ is {c} times {x}.",
        ),
        (
            "Long products",
            f"Split the number into tens and ones. ${10 * k} \\times {c} = {10 * k * c}$ "
            f"and ${x} \\times {c} = {x * c}$. "
            f"Then add: ${10 * k * c} + {x * c} = {10 * k * c + x * c}$.",
        ),
        (
            "Equations",
            f"Do the same on both sides. If ${k}x + {b} = {k * x + b}$, take {b} away: ${k}x = {k * x}$. "
            f"Then divide by {k}: $x = {x}$.",
        ),
        (
            "Fractions",
            f"Divide the top and the bottom by the same number. "
            f"$\\frac{{{x * k}}}{{{c * k}}} = \\frac{{{x}}}{{{c}}}$, "
            f"because both can be divided by {k}.",
        ),
        (
            "The greatest common divisor",
            f"Take the rest again and again. {c * k} and {c * (k + 1)} have the rest {c}. "
            f"{c} divides both, so the greatest common divisor is {c}.",
        ),
        (
            "The rest of a division",
            f"Divide and keep the rest. {a} divided by {c} is {a // c} and the rest is {a % c}, "
            f"because ${c} \\times {a // c} + {a % c} = {a}$.",
        ),
        (
            "Powers",
            f"A power is a product of equal numbers. $x^{{2}} = x \\times x$, "
            f"so with $x = {x}$ we get {x * x}.",
        ),
    ]
    return r.choice(topics)


def code_topic(r: random.Random) -> tuple[str, str, str]:
    """(title, explanation, snippet) of one topic; every snippet runs."""
    xs = [r.randrange(-9, 10) for _ in range(r.randrange(3, 6))]
    k = r.randrange(2, 8)
    topics = [
        (
            "Lists in Python",
            "A list holds many values. The first has the index 0.",
            f"xs = {xs}\nprint(xs[0])  # {xs[0]}",
        ),
        (
            "The sum of a list",
            "The function `sum` adds all numbers of a list.",
            f"xs = {xs}\nprint(sum(xs))  # {sum(xs)}",
        ),
        (
            "The largest number",
            "The function `max` finds the largest number, `min` the smallest.",
            f"xs = {xs}\nprint(max(xs), min(xs))  # {max(xs)} {min(xs)}",
        ),
        (
            "A loop",
            "A `for` loop visits each value of a list. The body stands four spaces to the right.",
            f"total = 0\nfor x in {xs}:\n    total = total + x\nprint(total)  # {sum(xs)}",
        ),
        (
            "Keep some numbers",
            "A list comprehension makes a new list. The part after `if` says which values to keep.",
            f"xs = {xs}\nxs = [x for x in xs if x > {k}]\nprint(xs)  # {[x for x in xs if x > k]}",
        ),
        (
            "Change each number",
            "A list comprehension can change each value.",
            f"xs = {xs}\nprint([x * {k} for x in xs])  # {[x * k for x in xs]}",
        ),
        (
            "Sort a list",
            "The function `sorted` gives a new list in order. The old list stays as it is.",
            f"xs = {xs}\nprint(sorted(xs))  # {sorted(xs)}",
        ),
        (
            "Write a function",
            "A function starts with `def`. It gives its value back with `return`.",
            f"def f(x):\n    return x + {k}\n\nprint(f({xs[0]}))  # {xs[0] + k}",
        ),
        (
            "Choose with if",
            "With `if` and `else` a program takes one of two ways.",
            f"def f(xs):\n    if not xs:\n        return {k}\n    return len(xs)\n\n"
            f"print(f({xs}))  # {len(xs)}",
        ),
        (
            "The first numbers",
            "A slice takes a part of a list. `xs[:2]` holds the first two values, "
            "`xs[::2]` every second one.",
            f"xs = {xs}\nprint(xs[:2], xs[::2])  # {xs[:2]} {xs[::2]}",
        ),
    ]
    return r.choice(topics)


INTRO = [
    "Here is a problem with its solution.",
    "Let us try one.",
    "Now an example.",
    "Read the problem, then the steps.",
    "This one was asked in class.",
    "We go step by step.",
]
OUTRO = [
    "Check the answer before you go on.",
    "Try it again without help.",
    "Can you see why each step is right?",
    "The next page has more.",
    "Take your time with each step.",
]


def lesson(r: random.Random, domain: str, problems: list):
    """A maths or code page: a short explanation, then worked problems with ordinary prose around some of
    them."""
    if domain == "maths":
        title, text = maths_topic(r)
        blocks = [("h1", title), ("p", text)]
    else:
        title, text, snippet = code_topic(r)
        blocks = [("h1", title), ("p", text), ("code", snippet)]
    if len(problems) > 1 and r.random() < 0.5:  # some pages are only a list of problems
        blocks = [("h1", r.choice(["Worked problems", "More problems", "Practice"]))]
    for question, solution in problems:
        blocks += [("p", r.choice(INTRO))] if r.random() < 0.3 else []
        blocks += problem(question, solution)
    blocks += [("p", r.choice(OUTRO))] if r.random() < 0.2 else []
    return blocks, (3 if problems else 2, 3 if problems else 2, 0)


def forum(w: World, r: random.Random, domain: str, problems: list):
    """A thread: question, answers, thanks. On the world (two facts and a step), or on a maths or code
    problem."""
    hello = r.choice(["Hi all.", "Hello.", "I am new here.", "Good day."])
    thanks = r.choice(["Thank you, that helps.", "Now I see it. Thanks.", "I got the same answer."])
    if problems:
        what = {"maths": "sum", "code": "program"}[domain]
        ask = f"{hello} I do not know how to start with this {what}. Who can show me the steps?"
        posts = [[("p", ask)], problem(*problems[0]), [("p", thanks)]]
        return [("h1", f"Help with a {what}")] + [("post", p) for p in posts], (3, 3, 0)
    if r.random() < 0.6:
        river = r.choice(RIVERS)
        i, j = r.sample(range(3), 2)
        s, t, _, _ = distance(w, river, i, j)
        ask, answer, depth = f"How far is {t} from {s}?", way_between(w, r, river, i, j), 2
    else:
        p = r.choice(w.people)
        facts = {f[0]: f for f in w.things[p][1]}
        year, age = facts["died"][1:]
        ask, depth = f"How old was {p}?", 2
        answer = f"{say(r, p, facts['born'])} {p} died in {year}. ${year} - {year - age} = {age}$. "
        answer += f"So {p} was {age} years old."
    posts = [[("p", f"{hello} {ask}")], [("p", answer)], [("p", thanks)]]
    return [("h1", ask)] + [("post", p) for p in posts], (2, depth, 0)


def news(w: World, r: random.Random):
    town, other = r.sample(w.towns, 2)
    person, product, crop = r.choice(w.people), r.choice([t[0] for t in TRADES.values()]), r.choice(CROPS)
    day = f"day {r.randrange(1, 29)} of {r.choice(MONTHS)}"
    lines = [
        f"There was rain in {town} on {day}.",
        f"The market of {town} was full on {day}.",
        f"A new bridge was opened in {town}.",
        f"The price of {crop} went up by {r.randrange(2, 30)} coins.",
        f"{r.randrange(2, 90)} people came from {other}.",
        f"People say that {product} will cost more.",
        f"The road to {other} is closed.",
        "More news will follow.",
        f"A fire at the house of {person} was put out.",
        "No one was hurt.",
    ]
    return [("h1", f"News from {town}"), ("p", " ".join(r.sample(lines, r.randrange(3, 6))))], (
        1,
        0,
        r.random() < 0.2,
    )


def ads(w: World, r: random.Random):
    product, town = r.choice([t[0] for t in TRADES.values()]), r.choice(w.towns)
    lines = [
        f"Buy the best {product} in {town}!",
        f"Only {r.randrange(2, 40)} coins today!",
        "Call now!",
        f"Save {r.randrange(10, 70)} coins!",
        f"New {product} every day!",
        "Do not wait!",
        f"Free {r.choice(FOODS)} with each order!",
        "This offer ends soon!",
    ]
    return [("h1", f"Best {product}"), ("p", " ".join(r.sample(lines, r.randrange(3, 7))))], (0, 0, 3)


def jobs(w: World, r: random.Random):
    trade, town = r.choice(list(TRADES)), r.choice(w.towns)
    lines = [
        f"The pay is {r.randrange(5, 60)} coins a day.",
        f"You must know how to use a {TRADES[trade][2]}.",
        "Food and a bed are free.",
        f"Work starts in {r.choice(MONTHS)}.",
        f"Write to {r.choice(w.people)}.",
        f"We need {r.randrange(2, 9)} strong people.",
    ]
    return (
        [
            ("h1", f"Work for a {trade}"),
            ("p", f"We look for a {trade} in {town}. " + " ".join(r.sample(lines, r.randrange(2, 5)))),
        ],
        (1, 0, 1),
    )


def shallow(w: World, r: random.Random):
    words = r.sample("best page top list new free click here more good news links win".split(), 9)
    return [
        ("h1", "Welcome"),
        ("p", " ".join(words * 2)),
        ("p", f"Page {r.randrange(999)} of {r.randrange(999)}."),
    ], (0, 0, r.randrange(3))


def near_copy(r: random.Random, blocks: list) -> list:
    """What a mirror does: a line (or post) of its own on top or below, sometimes one sentence of the prose
    lost; problems untouched."""
    out = list(blocks)
    for i, (kind, body) in enumerate(out):
        sentences = (
            re.split(r"(?<=\.) ", body)
            if kind == "p" and not body.startswith("Problem") and "\n" not in body
            else []
        )
        if len(sentences) > 5 and r.random() < 0.3:
            sentences.pop(r.randrange(len(sentences)))
            out[i] = ("p", " ".join(sentences))
            break
    own = ("p", r.choice(["Copied with thanks.", "First seen on another site.", "Saved page."]))
    if any(kind == "post" for kind, _ in out):
        return out + [("post", [own])]
    return out[:1] + [own] + out[1:] if r.random() < 0.5 else out + [own]


# kinds that need nothing but the world; lesson and forum also take problems
SIMPLE = {"encyclopedia": encyclopedia, "news": news, "ads": ads, "jobs": jobs, "shallow": shallow}
