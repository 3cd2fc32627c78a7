"""
What the pages of the tiny web say: content blocks made from the world's facts and from worked problems.

A page is a list of blocks; data/tiny/web.py hides them in HTML, `text_of` gives the text that a perfect extractor would
find. Each kind of page returns (blocks, (quality, reasoning depth, ad-ness)): the scores from 0 to 3 that a teacher
would give it (report section 2.1 tags documents with such scores). Sentences are short and words few, because a model
of 1M parameters has to learn them. The distances, ages and small sums in the prose agree with the facts of the world.

A block is one of

    ("h1", text)  ("p", text)  ("code", source)
    ("ul", [text, ...])        a list
    ("post", [block, ...])     a post of a forum thread
    ("tight", text)            text directly under a code block, without an empty line

and text may hold $TeX$, `code` and newlines.
"""
import random
import re

from data.tiny.world import CROPS, FOODS, MONTHS, RIVERS, TRADES, World, distance, sentence

Content = tuple[list, tuple[int, int, int]]      # of a page: blocks, (quality, depth, ad)


def problem_text(question: str, solution: str) -> str:
    """The text of one worked problem, in the form in which a base model gets a problem."""
    return f"Problem: {question}\nSolution:{chr(10) if solution.startswith('```') else ' '}{solution}"


def problem_blocks(question: str, solution: str) -> list:
    """A worked problem as blocks: fenced parts become code blocks, the text between them paragraphs."""
    text = problem_text(question, solution)
    parts = re.split(r"(?:^|\n)```(?:python)?\n(.*?)\n```(?=\n|$)\n?", text, flags=re.S)
    blocks = [("code", part) if i % 2 else ("tight" if i else "p", part) for i, part in enumerate(parts)]
    return [b for b in blocks if b[0] == "code" or b[1]]


def text_of(blocks: list) -> str:
    """The text that a perfect extractor returns for these blocks."""
    form = {"h1": "# {}".format, "p": str, "tight": str, "ul": lambda items: "\n".join(f"- {x}" for x in items),
            "code": "```python\n{}\n```".format, "post": text_of}
    out = ""
    for kind, body in blocks:
        out += ("\n" if kind in ("code", "tight") else "\n\n") * bool(out) + form[kind](body)
    return out


# ---- pages about the world ------------------------------------------------------------------------------------------

def encyclopedia(w: World, r: random.Random) -> Content:
    """A thing of the world, and facts about the things that its facts name."""
    name = r.choice(sorted(w.things))
    kind, facts = w.things[name]
    chosen = r.sample(facts, max(1, len(facts) - r.randrange(2)))
    chosen.sort(key=facts.index)
    if r.random() < 0.12:                            # a stub: little to learn, a shallow page
        text = f"{sentence(r, name, chosen[0])} This page is short. You can help us to make it better."
        return [("h1", name), ("p", text)], (1, 0, 0)
    more = []
    for fact in chosen:
        links = [v for v in fact[1:] if v in w.things and v != name]
        more += [(v, r.choice(w.things[v][1])) for v in links if r.random() < 0.6]
    blocks = [("h1", name if kind != "animal" else f"The {name}"),
              ("p", " ".join(sentence(r, name, f) for f in chosen))]
    if more:
        blocks.append(("p", " ".join(sentence(r, v, f) for v, f in more)))
    depth = 1
    if kind in ("town", "river") and r.random() < 0.6:       # two facts and a difference: one step of reasoning
        river = name if kind == "river" else facts[0][1]
        i, j = r.sample(range(3), 2)
        blocks.append(("p", way_between(w, r, river, i, j)))
        depth = 2
    if kind == "region":
        towns = [t for t in w.towns if w.things[t][1][0][2] == name]
        blocks.append(("ul", [sentence(r, t, w.things[t][1][0]) for t in towns]))
    return blocks, (2 + (len(chosen) + len(more) > 4), depth, 0)


def way_between(w: World, r: random.Random, river: str, i: int, j: int) -> str:
    """The distance of towns i and j of a river, with its subtraction."""
    s, t, m, n = distance(w, river, i, j)
    return r.choice([
        f"{s} is at mile {m} and {t} is at mile {n} of the {river}. ${m} - {n} = {m - n}$. The way is {m - n} miles.",
        f"How far is it from {t} to {s}? On the {river} {s} is at mile {m} and {t} is at mile {n}. "
        f"So the way is ${m} - {n} = {m - n}$ miles.",
    ])


def news(w: World, r: random.Random) -> Content:
    """Short sentences about a town; little of it is a fact of the world."""
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
    text = " ".join(r.sample(lines, r.randrange(3, 6)))
    return [("h1", f"News from {town}"), ("p", text)], (1, 0, r.random() < 0.2)


def ads(w: World, r: random.Random) -> Content:
    """An advertisement for a product."""
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


def jobs(w: World, r: random.Random) -> Content:
    """A job post."""
    trade, town = r.choice(list(TRADES)), r.choice(w.towns)
    lines = [
        f"The pay is {r.randrange(5, 60)} coins a day.",
        f"You must know how to use a {TRADES[trade][2]}.",
        "Food and a bed are free.",
        f"Work starts in {r.choice(MONTHS)}.",
        f"Write to {r.choice(w.people)}.",
        f"We need {r.randrange(2, 9)} strong people.",
    ]
    text = f"We look for a {trade} in {town}. " + " ".join(r.sample(lines, r.randrange(2, 5)))
    return [("h1", f"Work for a {trade}"), ("p", text)], (1, 0, 1)


def shallow(w: World, r: random.Random) -> Content:
    """A page of words without a sentence."""
    words = r.sample("best page top list new free click here more good news links win".split(), 9)
    blocks = [("h1", "Welcome"), ("p", " ".join(words * 2)), ("p", f"Page {r.randrange(999)} of {r.randrange(999)}.")]
    return blocks, (0, 0, r.randrange(3))


# kinds that need nothing but the world; lesson and forum also take problems
SIMPLE = {"encyclopedia": encyclopedia, "news": news, "ads": ads, "jobs": jobs, "shallow": shallow}


# ---- maths and code pages, threads ----------------------------------------------------------------------------------

def maths_topic(r: random.Random) -> tuple[str, str]:
    """(title, a short explanation with a small formula) of one topic."""
    a, b, c = r.randrange(2, 60), r.randrange(2, 60), r.randrange(2, 10)
    x, k = r.randrange(2, 13), r.randrange(2, 7)
    topics = [
        ("Adding numbers",
         f"To add two numbers, add the ones, then the tens, and so on. Here is a small case: ${a} + {b} = {a + b}$."),
        ("Sums of many numbers",
         f"Add the numbers from left to right. ${a} + {b} = {a + b}$ and ${a + b} + {c} = {a + b + c}$."),
        ("Taking away",
         f"To take a number away is to go back on the line. ${a + b} - {a} = {b}$, because ${a} + {b} = {a + b}$."),
        ("Times tables",
         f"A product is a sum of equal numbers. ${c} \\times {x} = {c * x}$ is {c} times {x}."),
        ("Long products",
         f"Split the number into tens and ones. ${10 * k} \\times {c} = {10 * k * c}$ and "
         f"${x} \\times {c} = {x * c}$. Then add: ${10 * k * c} + {x * c} = {10 * k * c + x * c}$."),
        ("Equations",
         f"Do the same on both sides. If ${k}x + {b} = {k * x + b}$, take {b} away: ${k}x = {k * x}$. "
         f"Then divide by {k}: $x = {x}$."),
        ("Fractions",
         f"Divide the top and the bottom by the same number. $\\frac{{{x * k}}}{{{c * k}}} = "
         f"\\frac{{{x}}}{{{c}}}$, because both can be divided by {k}."),
        ("The greatest common divisor",
         f"Take the rest again and again. {c * k} and {c * (k + 1)} have the rest {c}. {c} divides both, so the "
         f"greatest common divisor is {c}."),
        ("The rest of a division",
         f"Divide and keep the rest. {a} divided by {c} is {a // c} and the rest is {a % c}, because "
         f"${c} \\times {a // c} + {a % c} = {a}$."),
        ("Powers",
         f"A power is a product of equal numbers. $x^{{2}} = x \\times x$, so with $x = {x}$ we get {x * x}."),
    ]
    return r.choice(topics)


def code_topic(r: random.Random) -> tuple[str, str, str]:
    """(title, explanation, snippet) of one topic; every snippet runs."""
    xs = [r.randrange(-9, 10) for _ in range(r.randrange(3, 6))]
    k = r.randrange(2, 8)
    topics = [
        ("Lists in Python", "A list holds many values. The first has the index 0.",
         f"xs = {xs}\nprint(xs[0])  # {xs[0]}"),
        ("The sum of a list", "The function `sum` adds all numbers of a list.",
         f"xs = {xs}\nprint(sum(xs))  # {sum(xs)}"),
        ("The largest number", "The function `max` finds the largest number, `min` the smallest.",
         f"xs = {xs}\nprint(max(xs), min(xs))  # {max(xs)} {min(xs)}"),
        ("A loop", "A `for` loop visits each value of a list. The body stands four spaces to the right.",
         f"total = 0\nfor x in {xs}:\n    total = total + x\nprint(total)  # {sum(xs)}"),
        ("Keep some numbers",
         "A list comprehension makes a new list. The part after `if` says which values to keep.",
         f"xs = {xs}\nxs = [x for x in xs if x > {k}]\nprint(xs)  # {[x for x in xs if x > k]}"),
        ("Change each number", "A list comprehension can change each value.",
         f"xs = {xs}\nprint([x * {k} for x in xs])  # {[x * k for x in xs]}"),
        ("Sort a list", "The function `sorted` gives a new list in order. The old list stays as it is.",
         f"xs = {xs}\nprint(sorted(xs))  # {sorted(xs)}"),
        ("Write a function", "A function starts with `def`. It gives its value back with `return`.",
         f"def f(x):\n    return x + {k}\n\nprint(f({xs[0]}))  # {xs[0] + k}"),
        ("Choose with if", "With `if` and `else` a program takes one of two ways.",
         f"def f(xs):\n    if not xs:\n        return {k}\n    return len(xs)\n\nprint(f({xs}))  # {len(xs)}"),
        ("The first numbers",
         "A slice takes a part of a list. `xs[:2]` holds the first two values, `xs[::2]` every second one.",
         f"xs = {xs}\nprint(xs[:2], xs[::2])  # {xs[:2]} {xs[::2]}"),
    ]
    return r.choice(topics)


INTRO = ["Here is a problem with its solution.", "Let us try one.", "Now an example.",
         "Read the problem, then the steps.", "This one was asked in class.", "We go step by step."]
OUTRO = ["Check the answer before you go on.", "Try it again without help.", "Can you see why each step is right?",
         "The next page has more.", "Take your time with each step."]


def lesson(r: random.Random, domain: str, problems: list) -> Content:
    """A maths or code page: a short explanation, then worked problems with ordinary prose around some of them."""
    if domain == "maths":
        title, text = maths_topic(r)
        blocks = [("h1", title), ("p", text)]
    else:
        title, text, snippet = code_topic(r)
        blocks = [("h1", title), ("p", text), ("code", snippet)]
    if len(problems) > 1 and r.random() < 0.5:       # some pages are only a list of problems
        blocks = [("h1", r.choice(["Worked problems", "More problems", "Practice"]))]
    for question, solution in problems:
        blocks += [("p", r.choice(INTRO))] if r.random() < 0.3 else []
        blocks += problem_blocks(question, solution)
    blocks += [("p", r.choice(OUTRO))] if r.random() < 0.2 else []
    return blocks, (3 if problems else 2, 3 if problems else 2, 0)


def forum(w: World, r: random.Random, domain: str, problems: list) -> Content:
    """A thread: question, answer, thanks. On a maths or code problem, or on the world (two facts and a step)."""
    hello = r.choice(["Hi all.", "Hello.", "I am new here.", "Good day."])
    thanks = r.choice(["Thank you, that helps.", "Now I see it. Thanks.", "I got the same answer."])
    if problems:
        what = {"maths": "sum", "code": "program"}[domain]
        question = f"{hello} I do not know how to start with this {what}. Who can show me the steps?"
        posts = [[("p", question)], problem_blocks(*problems[0]), [("p", thanks)]]
        return [("h1", f"Help with a {what}")] + [("post", p) for p in posts], (3, 3, 0)
    if r.random() < 0.6:
        river = r.choice(RIVERS)
        i, j = r.sample(range(3), 2)
        s, t, _, _ = distance(w, river, i, j)
        question, answer = f"How far is {t} from {s}?", way_between(w, r, river, i, j)
    else:
        p = r.choice(w.people)
        facts = {f[0]: f for f in w.things[p][1]}
        year, age = facts["died"][1:]
        question = f"How old was {p}?"
        answer = f"{sentence(r, p, facts['born'])} {p} died in {year}. ${year} - {year - age} = {age}$. "
        answer += f"So {p} was {age} years old."
    posts = [[("p", f"{hello} {question}")], [("p", answer)], [("p", thanks)]]
    return [("h1", question)] + [("post", p) for p in posts], (2, 2, 0)


# ---- copies ---------------------------------------------------------------------------------------------------------

def near_copy(r: random.Random, blocks: list) -> list:
    """
    What a mirror does: a line (or post) of its own on top or below, sometimes one sentence of the prose lost. Problems
    stay as they are.
    """
    out = list(blocks)
    for i, (kind, body) in enumerate(out):
        prose = kind == "p" and not body.startswith("Problem") and "\n" not in body
        sentences = re.split(r"(?<=\.) ", body) if prose else []
        if len(sentences) > 5 and r.random() < 0.3:
            sentences.pop(r.randrange(len(sentences)))
            out[i] = ("p", " ".join(sentences))
            break
    own = ("p", r.choice(["Copied with thanks.", "First seen on another site.", "Saved page."]))
    if any(kind == "post" for kind, _ in out):
        return out + [("post", [own])]
    return out[:1] + [own] + out[1:] if r.random() < 0.5 else out + [own]
