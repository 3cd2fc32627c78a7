"""
Long documents: RULER-style probes (report Fig. 4) and the "books" that stage 3 trains on.

Report section 2.4 measures long context with RULER: needles (single, multi-key, multi-value, multi-query), variable
tracking, common and frequent word extraction. Each probe here is a prompt that ends where the answer starts, with the
answer and the depth of the needle, in words that the 1M-parameter model has. `probe_text` turns one into a training
document.

Books are long pages with far references: the last chapter needs what chapter one says. Without them a row of 32k tokens
holds only short documents, and nothing trains the larger RoPE base.

    python -m data.tiny.probes       # prints one probe of each kind
"""
import random
import re
from dataclasses import dataclass

from data.tiny.pages import way_between
from data.tiny.world import RIVERS, TRADES, World, make_world, sentence

COLOURS = ["red", "blue", "green", "white", "black", "brown", "grey", "pink", "gold", "tin", "old", "new"]
THINGS = ["box", "door", "chest", "cup", "lamp", "book", "ring", "coat", "cart", "boat", "bell", "key"]
KINDS = ("single", "multikey", "multivalue", "multiquery", "variables", "common", "frequent")


@dataclass(frozen=True)
class Probe:
    """One question to a long text. prompt + " " + answer is all of it."""
    kind: str                    # one of KINDS
    prompt: str                  # ends where the answer starts
    answers: tuple[str, ...]     # every string that the reply must hold
    depth: float                 # where the (first) needle lies in the filler: 0 = start, 1 = end
    ordered: bool = True         # whether the order of the answers counts

    @property
    def answer(self) -> str:
        """The right reply as text."""
        return ", ".join(self.answers) + "."


# ---- probes ---------------------------------------------------------------------------------------------------------

def probe(kind: str, seed: int, words: int, depth: float | None = None, world: World | None = None) -> Probe:
    """One probe of about `words` words of context. depth: 0..1, None = random. ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"probe kind {kind!r}: must be one of {', '.join(KINDS)}")
    w, r = world or make_world(0), random.Random(f"probe/{kind}/{seed}/{words}")
    if kind == "variables":
        return variables(w, r, words, depth)
    return counting(r, kind, words) if kind in ("common", "frequent") else needles(w, r, kind, words, depth)


def filler(w: World, r: random.Random, words: int) -> list[str]:
    """Sentences of the world, together about `words` words."""
    names, sentences, n = sorted(w.things), [], 0
    while n < words:
        name = r.choice(names)
        sentences.append(sentence(r, name, r.choice(w.things[name][1])))
        n += sentences[-1].count(" ") + 1
    return sentences


def hide(lines: list[str], sentences: list[str], depths: list[float]) -> str:
    """The text of the sentences with line i put in at depths[i], 0..1."""
    out = list(sentences)
    for depth, line in sorted(zip(depths, lines, strict=True), reverse=True):
        out.insert(round(depth * len(sentences)), line)
    return " ".join(out)


def number(r: random.Random) -> str:
    """Four digits."""
    return str(r.randrange(1000, 10000))


def needles(w: World, r: random.Random, kind: str, words: int, depth: float | None) -> Probe:
    """
    Sentences "The number of the red box is 4821." in a filler, and a question for the number.

        single       one needle
        multikey     three more, of other things
        multivalue   three numbers of one thing, all wanted
        multiquery   the numbers of two things, and three more of other things
    """
    things = [f"{a} {b}" for a in COLOURS for b in THINGS]
    targets = r.sample(things, 2 if kind == "multiquery" else 1)
    pairs = [(t, number(r)) for t in targets for _ in range(3 if kind == "multivalue" else 1)]
    wanted = len(pairs)
    if kind in ("multikey", "multiquery"):
        pairs += [(t, number(r)) for t in r.sample([t for t in things if t not in targets], 3)]
    depths = [r.random() if depth is None or i else depth for i in range(len(pairs))]
    if wanted > 1:                                           # the order of the answer is the order of the text
        depths[:wanted] = sorted(depths[:wanted]) if depth is None else below(r, depth, wanted)
    text = hide([f"The number of the {t} is {v}." for t, v in pairs], filler(w, r, words), depths)
    question = {"single": "What is the number of the {0}?", "multikey": "What is the number of the {0}?",
                "multivalue": "What are the numbers of the {0}?",
                "multiquery": "What are the numbers of the {0} and the {1}?"}[kind]
    noun = "number is" if wanted == 1 else "numbers are"
    return Probe(kind, f"{text}\n\n{question.format(*targets)} The {noun}", tuple(v for _, v in pairs[:wanted]),
                 depths[0])


def below(r: random.Random, depth: float, n: int) -> list[float]:
    """`depth` and n - 1 random depths between it and the end, in order."""
    return [depth] + sorted(depth + (1 - depth) * r.random() for _ in range(n - 1))


def variables(w: World, r: random.Random, words: int, depth: float | None) -> Probe:
    """x gets a number, y gets x, z gets y, far apart, beside a second chain: which letters hold the number?"""
    letters = r.sample("abcdefghjkmnpqrstuvwxyz", 6)
    value, other = number(r), number(r)
    while other == value:
        other = number(r)

    def chain(names: list[str], first: str) -> list[str]:
        links = zip(names[:-1], names[1:], strict=True)
        return [f"Let {names[0]} be {first}."] + [f"Let {b} be the same as {a}." for a, b in links]

    depths = sorted(r.random() for _ in range(3))
    if depth is not None:
        depths = below(r, depth, 3)
    lines = chain(letters[:3], value) + chain(letters[3:], other)
    text = hide(lines, filler(w, r, words), depths + sorted(r.random() for _ in range(3)))
    prompt = f"{text}\n\nWhich letters are {value}? The letters are"
    return Probe("variables", prompt, tuple(letters[:3]), depths[0])


def counting(r: random.Random, kind: str, words: int) -> Probe:
    """
    The three most frequent words of a list. common: they stand many times, all others a few times. frequent: each word
    stands half as often as the one before, and the order counts.
    """
    vocabulary = r.sample(sorted({*THINGS, *COLOURS, *(v[2] for v in TRADES.values())}), 16)
    if kind == "common":
        often, seldom = max(3, words // 5), max(1, words // 33)
        counts = [often] * 3 + [seldom] * 13
    else:
        counts = [max(1, round(words * 2.0**-i / 2)) for i in range(16)]
    bag = [word for word, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
    r.shuffle(bag)
    prompt = f"Words: {' '.join(bag)}\n\nWhich three words come most often? They are"
    return Probe(kind, prompt, tuple(vocabulary[:3]), 0.0, ordered=kind == "frequent")


def probe_text(p: Probe) -> str:
    """The probe as a training document."""
    return f"{p.prompt} {p.answer}"


def score(p: Probe, reply: str) -> float:
    """
    Share of the answers in the first line of the reply, as in RULER; where `ordered`, each must stand in its place.
    Answers (4821, 7093) and the reply " 4821, 9." -> 0.5
    """
    words = re.findall(r"\w+", reply.split("\n")[0])
    if p.ordered and len(p.answers) > 1:
        return sum(a == b for a, b in zip(p.answers, words, strict=False)) / len(p.answers)
    return sum(a in words[:len(p.answers) + 2] for a in p.answers) / len(p.answers)


def digits(p: Probe, reply: str) -> float:
    """
    Share of the digits of the first answer that stand in their place in the first word of the reply: what is learned
    before whole numbers are right. Answer 4821, reply " 4871, 9." -> 0.75. ValueError where the answer is no number.
    """
    if not p.answers[0].isdigit():
        raise ValueError(f"a probe of kind {p.kind} is not answered by a number")
    word = (re.findall(r"\w+", reply.split("\n")[0]) or [""])[0]
    return sum(a == b for a, b in zip(p.answers[0], word, strict=False)) / len(p.answers[0])


# ---- documents to learn from ----------------------------------------------------------------------------------------

def recall(seed: int) -> str:
    """
    A short document that trains retrieval and little else: one to five needles among some words, then said again. Half
    of these documents repeat the text word for word, half the needles alone, shuffled. Numbers have one to four digits.
    In probes a twenty-fifth of the tokens is retrieved, here a tenth to four tenths: a toy learns it from nothing less.
    """
    r = random.Random(f"recall/{seed}")
    w, n, digits = make_world(0), r.randint(1, 5), r.randint(1, 4)
    things = r.sample([f"{a} {b}" for a in COLOURS for b in THINGS], n)
    lines = [f"The number of the {t} is {r.randrange(10 ** (digits - 1), 10 ** digits)}." for t in things]
    text = hide(lines, filler(w, r, r.choice([0, 0, 8, 16, 25])), [r.random() for _ in lines])
    return f"{text}\n\n{text if r.random() < 0.5 else ' '.join(r.sample(lines, n))}"


# ---- books ----------------------------------------------------------------------------------------------------------

def book(w: World, seed: int, words: int) -> str:
    """A travel story of about `words` words. Chapter 1 gives numbers and names; later chapters need them, far away."""
    r = random.Random(f"book/{seed}")
    hero, friend = r.sample(w.people, 2)
    keep = [(f"{a} {b}", number(r)) for a, b in zip(r.sample(COLOURS, 4), r.sample(THINGS, 4), strict=True)]
    place_of = {thing: r.choice(w.towns) for thing, _ in keep}
    town, home = r.choice(w.towns), r.choice(w.towns)
    chapter = [f"{hero} lived in {home} and had a friend, {friend}.",
               *[f"The number of the {t} is {v}." for t, v in keep],
               *[f"The {t} is in {place}." for t, place in place_of.items()],
               f"One day {hero} left {home}."]
    out = [f"# The way of {hero}", "Chapter 1", " ".join(chapter)]
    for n in range(2, max(2, words // 110) + 1):
        last, town = town, r.choice(w.towns)
        chapter = [f"{hero} came to {town}.", *[sentence(r, town, f) for f in r.sample(w.things[town][1], 3)]]
        river = r.choice(RIVERS)
        chapter += [way_between(w, r, river, *r.sample(range(3), 2))] if r.random() < 0.5 else []
        chapter += filler(w, r, 40)
        thing, value = r.choice(keep)
        chapter.append(r.choice([f"{hero} thought of the {thing}. Its number is {value}.",
                                 f"{friend} asked for the {thing}. It is in {place_of[thing]}.",
                                 f"Before {town} came {last}." if n > 2 else f"The way began in {home}."]))
        out += [f"Chapter {n}", " ".join(chapter)]
    recalled = r.sample(keep, 3)
    chapter = [*[f"The number of the {t} is {v}." for t, v in recalled],
               *[f"The {t} is in {place_of[t]}." for t, _ in recalled],
               f"The friend of {hero} was {friend}. {hero} came home to {home}."]
    return "\n\n".join([*out, "The end", " ".join(chapter)])


def books(world: World, seed: int, count: int, words: int) -> list[str]:
    """`count` long documents for the source `books`: two stories to one probe document of the same length."""
    documents = []
    for i in range(count):
        if i % 3 == 2:
            p = probe(KINDS[i // 3 % len(KINDS)], 1_000_000 + 10_000 * seed + i, words, world=world)
            documents.append(probe_text(p))
        else:
            documents.append(book(world, 100_000 * seed + i, words))
    return documents


if __name__ == "__main__":
    for kind in KINDS:
        p = probe(kind, 0, 60)
        print(f"--- {kind}, depth {p.depth:.2f}\n{p.prompt} [{p.answer}]\n")
