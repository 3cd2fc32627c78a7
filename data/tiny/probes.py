"""Long documents: RULER-style probes (report Fig. 4) and the "books" that stage 3 trains on.

Report section 2.4 measures long context with RULER: needles (single, multi-key, multi-value, multi-query),
variable tracking, common and frequent word extraction. Each probe here is a prompt that ends where the
answer starts, with the answer and the depth of the needle, in words the 1M-parameter model has.
`probe_text` turns one into a training document.

Books are long pages with far references: what chapter one says is needed in the last one. Without them a
32k row holds only short documents and the larger RoPE base is never exercised.

Try:  python -m data.tiny.probes       # prints one probe of each kind
"""

import random
import re
from dataclasses import dataclass

from data.tiny.pages import way_between
from data.tiny.world import RIVERS, TRADES, World, make_world, say

COLOURS = ["red", "blue", "green", "white", "black", "brown", "grey", "pink", "gold", "tin", "old", "new"]
THINGS = ["box", "door", "chest", "cup", "lamp", "book", "ring", "coat", "cart", "boat", "bell", "key"]
KINDS = ("single", "multikey", "multivalue", "multiquery", "variables", "common", "frequent")


@dataclass(frozen=True)
class Probe:
    """prompt + " " + answer is the whole text. depth: where the (first) needle lies, 0 = start, 1 = end of
    the filler. answers: every string the reply must hold; order counts only where `ordered`."""

    kind: str
    prompt: str
    answers: tuple[str, ...]
    depth: float
    ordered: bool = True

    @property
    def answer(self) -> str:
        return ", ".join(self.answers) + "."


def filler(w: World, r: random.Random, words: int) -> list[str]:
    """Sentences of the world, together about `words` words."""
    names, out, n = sorted(w.things), [], 0
    while n < words:
        name = r.choice(names)
        out.append(say(r, name, r.choice(w.things[name][1])))
        n += out[-1].count(" ") + 1
    return out


def hide(sentences: list[str], needles: list[str], places: list[float]) -> str:
    """Needles put into the filler at the given depths (0..1), in order."""
    out = list(sentences)
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        out.insert(round(place * len(sentences)), needle)
    return " ".join(out)


def number(r: random.Random) -> str:
    return str(r.randrange(1000, 10000))


def needles(w: World, r: random.Random, kind: str, words: int, depth: float | None) -> Probe:
    """single: one needle. multikey: three more of other things. multivalue: three numbers of one thing.
    multiquery: ask two."""
    things = [f"{a} {b}" for a in COLOURS for b in THINGS]
    asked = r.sample(things, 2 if kind == "multiquery" else 1)
    pairs = [(t, number(r)) for t in asked for _ in range(3 if kind == "multivalue" else 1)]
    wanted = len(pairs)
    if kind in ("multikey", "multiquery"):
        pairs += [(t, number(r)) for t in r.sample([t for t in things if t not in asked], 3)]
    places = [r.random() if depth is None or i else depth for i in range(len(pairs))]
    if wanted > 1:  # the order of the answer is the order of the text
        places[:wanted] = (
            sorted(places[:wanted])
            if depth is None
            else [depth] + sorted(depth + (1 - depth) * r.random() for _ in range(wanted - 1))
        )
    text = hide(filler(w, r, words), [f"The number of the {t} is {v}." for t, v in pairs], places)
    ask = {
        "single": "What is the number of the {0}?",
        "multikey": "What is the number of the {0}?",
        "multivalue": "What are the numbers of the {0}?",
        "multiquery": "What are the numbers of the {0} and the {1}?",
    }[kind]
    noun = "number is" if wanted == 1 else "numbers are"
    return Probe(
        kind, f"{text}\n\n{ask.format(*asked)} The {noun}", tuple(v for _, v in pairs[:wanted]), places[0]
    )


def variables(w: World, r: random.Random, words: int, depth: float | None) -> Probe:
    """x gets a number, y gets x, z gets y, far apart, beside a second chain: which letters hold the
    number?"""
    letters = r.sample("abcdefghjkmnpqrstuvwxyz", 6)
    value, other = number(r), number(r)
    while other == value:
        other = number(r)

    def chain(names, first):
        return [f"Let {names[0]} be {first}."] + [
            f"Let {b} be the same as {a}." for a, b in zip(names[:-1], names[1:], strict=True)
        ]

    places = sorted(r.random() for _ in range(3))
    if depth is not None:
        places = [depth] + sorted(depth + (1 - depth) * r.random() for _ in range(2))
    lines = chain(letters[:3], value) + chain(letters[3:], other)
    text = hide(filler(w, r, words), lines, places + sorted(r.random() for _ in range(3)))
    return Probe(
        "variables", f"{text}\n\nWhich letters are {value}? The letters are", tuple(letters[:3]), places[0]
    )


def counting(w: World, r: random.Random, kind: str, words: int) -> Probe:
    """common: 3 words stand many times, all others a few times. frequent: counts fall off steeply, the top
    3 are asked."""
    vocabulary = r.sample(
        sorted({x.lower() for t in THINGS + COLOURS for x in [t]} | {v[2] for v in TRADES.values()}), 16
    )
    if kind == "common":
        often, seldom = max(3, words // 5), max(1, words // 33)
        bag = [x for x in vocabulary[:3] for _ in range(often)] + [
            x for x in vocabulary[3:] for _ in range(seldom)
        ]
    else:
        shares = [2.0**-i for i in range(len(vocabulary))]  # Zipf-like: each half as often as the one before
        bag = [
            x for x, s in zip(vocabulary, shares, strict=True) for _ in range(max(1, round(words * s / 2)))
        ]
    r.shuffle(bag)
    return Probe(
        kind,
        f"Words: {' '.join(bag)}\n\nWhich three words come most often? They are",
        tuple(vocabulary[:3]),
        0.0,
        ordered=kind == "frequent",
    )


def probe(kind: str, seed: int, words: int, depth: float | None = None, world: World | None = None) -> Probe:
    """One probe of about `words` words of context; depth None = random. ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"probe kind {kind!r}: must be one of {', '.join(KINDS)}")
    w, r = world or make_world(0), random.Random(f"probe/{kind}/{seed}/{words}")
    if kind == "variables":
        return variables(w, r, words, depth)
    return (
        counting(w, r, kind, words) if kind in ("common", "frequent") else needles(w, r, kind, words, depth)
    )


def probe_text(p: Probe) -> str:
    """The probe as a training document."""
    return f"{p.prompt} {p.answer}"


def score(p: Probe, reply: str) -> float:
    """Share of the asked-for strings in the first line of the reply, as RULER; all of them in order give 1
    where `ordered`. answers (4821, 7) and reply " 4821, 9." -> 0.5"""
    words = re.findall(r"\w+", reply.split("\n")[0])
    if p.ordered and len(p.answers) > 1:
        return sum(a == b for a, b in zip(p.answers, words, strict=False)) / len(p.answers)
    return sum(a in words[: len(p.answers) + 2] for a in p.answers) / len(p.answers)


# ---- books


def book(w: World, seed: int, words: int) -> str:
    """A travel story of about `words` words. Chapter 1 gives numbers and names; later chapters need them,
    far away."""
    r = random.Random(f"book/{seed}")
    hero, friend = r.sample(w.people, 2)
    keep = [(f"{a} {b}", number(r)) for a, b in zip(r.sample(COLOURS, 4), r.sample(THINGS, 4), strict=True)]
    hidden = [(thing, r.choice(w.towns)) for thing, _ in keep]
    town, home = r.choice(w.towns), r.choice(w.towns)
    out = [
        f"# The way of {hero}",
        "Chapter 1",
        " ".join(
            [
                f"{hero} lived in {home} and had a friend, {friend}.",
                *[f"The number of the {t} is {v}." for t, v in keep],
                *[f"The {t} is in {place}." for t, place in hidden],
                f"One day {hero} left {home}.",
            ]
        ),
    ]
    chapters = max(2, words // 110)
    for n in range(2, chapters + 1):
        last, town = town, r.choice(w.towns)
        lines = [f"{hero} came to {town}.", *[say(r, town, f) for f in r.sample(w.things[town][1], 3)]]
        river = r.choice(RIVERS)
        lines += [way_between(w, r, river, *r.sample(range(3), 2))] if r.random() < 0.5 else []
        lines += filler(w, r, 40)
        thing, value = r.choice(keep)
        where = dict(hidden)[thing]
        lines.append(
            r.choice(
                [
                    f"{hero} thought of the {thing}. Its number is {value}.",
                    f"{friend} asked for the {thing}. It is in {where}.",
                    f"Before {town} came {last}." if n > 2 else f"The way began in {home}.",
                ]
            )
        )
        out += [f"Chapter {n}", " ".join(lines)]
    asked = r.sample(keep, 3)
    out += [
        "The end",
        " ".join(
            [
                *[f"The number of the {t} is {v}." for t, v in asked],
                *[f"The {t} is in {dict(hidden)[t]}." for t, _ in asked],
                f"The friend of {hero} was {friend}. {hero} came home to {home}.",
            ]
        ),
    ]
    return "\n\n".join(out)


def books(world: World, seed: int, count: int, words: int) -> list[str]:
    """Long documents for the source `books`: two stories to one probe document of the same length."""
    out = []
    for i in range(count):
        if i % 3 == 2:
            out.append(
                probe_text(
                    probe(KINDS[i // 3 % len(KINDS)], 1_000_000 + 10_000 * seed + i, words, world=world)
                )
            )
        else:
            out.append(book(world, 100_000 * seed + i, words))
    return out


if __name__ == "__main__":
    for kind in KINDS:
        p = probe(kind, 0, 60)
        print(f"--- {kind}, depth {p.depth:.2f}\n{p.prompt} [{p.answer}]\n")
