"""
A small invented world: the facts behind every page of the tiny web. A pure function of a seed.

Report section 2.1 trains on pages that describe one shared reality, so a fact that stands on one page helps to predict
another. Random text has no such facts; this world has: regions, rivers with towns at fixed miles, people with teachers
and trades, animals. Every page is written from the facts of World.things, so the truth of a page is known, and the same
fact comes back on many pages in other words. Numbers agree (the distance of two towns on a river is the difference of
their miles), so answers in a forum can reason with them. About 600 words of vocabulary, for a model of 1M parameters.

    python -m data.tiny.world        # prints the facts of five things
"""
import random
from dataclasses import dataclass

REGIONS = "Ardel Brona Celd Dovan Estry Forn".split()
RIVERS = "Osk Lenn Tarn Vell Wim Yar Nidd Kess".split()
TOWNS = ("Arlo Bram Cott Delby Elm Farrow Gorse Holt Inver Joss Kirk Lund Marl Nesby Orme Pell Quarn Rusk "
         "Selby Thorn Ulm Varn Wells Yarrow").split()
FIRST = "Ada Ben Cora Dan Eva Finn Gwen Hal Ida Jon Kit Lena Mira Ned Ona Paul Rosa Sam Tess Will".split()
LAST = "Ash Berg Cole Dale Fox Gray Hill Lake Reed Stone".split()
TRADES = {                                   # trade: (product, material, tool, place of work)
    "baker": ("bread", "flour", "oven", "bakery"),
    "smith": ("nails", "iron", "hammer", "forge"),
    "weaver": ("cloth", "wool", "loom", "mill"),
    "potter": ("pots", "clay", "wheel", "kiln"),
    "carver": ("chairs", "wood", "knife", "shop"),
    "mason": ("walls", "stone", "chisel", "yard"),
    "tanner": ("boots", "leather", "needle", "tannery"),
    "glazier": ("cups", "sand", "pipe", "glass house"),
}
ANIMALS = "fox heron otter hare crow deer goat bear".split()
FOODS = "grass fish seeds mice berries leaves".split()
COLOURS = "red grey brown black white".split()
CROPS = "wheat barley apples beans hops grapes".split()
CLIMATES = "cold mild dry wet".split()
MONTHS = "January February March April May June July August September October November December".split()

# relation -> wordings; {s} is the subject, {0} {1} ... the values. Each page draws its own wording
WORDINGS = {
    "region_is": ["{s} is a {0} region in the {1}.", "The region of {s} lies in the {1} and is {0}."],
    "capital": ["The capital of {s} is {0}.", "{0} is the capital of {s}.", "{s} has its capital at {0}."],
    "grows": ["Farmers in {s} grow {0}.", "{s} is known for its {0}.", "The main crop of {s} is {0}."],
    "borders": ["{s} has a border with {0}.", "To the east of {s} lies {0}."],
    "river_is": ["{s} is a river in {0}.", "The {s} is a river in the region of {0}."],
    "length": ["The {s} is {0} miles long.", "From its source to the sea the {s} runs {0} miles."],
    "passes": ["On its way the {s} passes {0}.", "The towns on the {s} are {0}."],
    "town_is": ["{s} is a town on the river {0}.", "{s} is a town in {1}, on the river {0}.",
                "{s} lies on the {0} in {1}."],
    "mile": ["{s} stands at mile {0} of the {1}.", "At mile {0} of the {1} is {s}."],
    "founded": ["{s} was founded in {0} by {1}.", "In {0} {1} founded {s}.",
                "The town was founded in {0}. Its founder was {1}."],
    "people": ["About {0} people live in {s}.", "{s} has {0} people."],
    "trade": ["{s} is known for its {0}.", "Many people in {s} make {0}.", "{s} sells {0} to other towns."],
    "market": ["The market of {s} is in {0}.", "Each {0} there is a market in {s}."],
    "person_is": ["{s} was a {0} from {1}.", "{s} was a {0} who lived in {1}."],
    "born": ["{s} was born in {0}.", "{s} was born in the year {0}."],
    "died": ["{s} died in {0} at the age of {1}.", "{s} lived for {1} years and died in {0}."],
    "teacher": ["{s} learned the trade from {0}.", "The teacher of {s} was {0}."],
    "makes": ["A {s} makes {0} from {1}.", "To make {0}, a {s} needs {1}."],
    "tool": ["The main tool of a {s} is the {0}.", "A {s} works with a {0}."],
    "place": ["A {s} works in a {0}.", "The place where a {s} works is called a {0}."],
    "animal_is": ["The {s} is a {0} animal.", "A {s} is {0}."],
    "eats": ["The {s} eats {0}.", "The food of the {s} is {0}."],
    "lives": ["The {s} lives in {0}.", "You can see the {s} in {0}."],
    "legs": ["A {s} has {0} legs.", "The {s} walks on {0} legs."],
}


@dataclass(frozen=True)
class World:
    """The facts; made by make_world()."""
    things: dict[str, tuple[str, list[tuple]]]       # name -> (kind, facts); a fact is (relation, value, ...)
    rivers: dict[str, list[tuple[int, str]]]         # river -> (mile, town), in order from the source
    towns: tuple[str, ...]
    people: tuple[str, ...]


def make_world(seed: int) -> World:
    """The whole world from one seed; the same seed gives the same world in every process and Python version."""
    r = random.Random(f"world/{seed}")               # a text as seed goes through sha512, not through hash()
    things, rivers, pick = {}, {}, r.choice
    sides = ["north", "south", "east", "west"]
    towns = r.sample(TOWNS, len(TOWNS))
    by_river = {river: sorted(towns[3 * i:3 * i + 3]) for i, river in enumerate(RIVERS)}
    home = {river: REGIONS[i % len(REGIONS)] for i, river in enumerate(RIVERS)}
    people = [f"{a} {b}" for a, b in zip(r.sample(FIRST * 2, 40), r.sample(LAST * 4, 40), strict=True)]
    people = list(dict.fromkeys(people))             # each name once, in order
    for i, name in enumerate(REGIONS):
        capital = next(by_river[v][0] for v in RIVERS if home[v] == name)
        things[name] = ("region", [("region_is", pick(CLIMATES), pick(sides)), ("capital", capital),
                                   ("grows", CROPS[i]), ("borders", REGIONS[(i + 1) % len(REGIONS)])])
    for river, names in by_river.items():
        miles = sorted(r.sample(range(4, 90), 3))
        rivers[river] = list(zip(miles, names, strict=True))
        things[river] = ("river", [("river_is", home[river]), ("length", miles[-1] + r.randrange(5, 30)),
                                   ("passes", f"{names[0]}, {names[1]} and {names[2]}")])
    products = [v[0] for v in TRADES.values()]
    born = {p: r.randrange(900, 1180) for p in people}
    for river in RIVERS:
        for mile, town in rivers[river]:
            founder = pick(people)
            things[town] = ("town", [("town_is", river, home[river]), ("mile", mile, river),
                                     ("founded", born[founder] + r.randrange(20, 50), founder),
                                     ("people", r.randrange(2, 60) * 100), ("trade", pick(products)),
                                     ("market", pick(MONTHS))])
    trade_of = {p: pick(list(TRADES)) for p in people}
    for p in people:
        age = r.randrange(50, 90)
        facts = [("person_is", trade_of[p], pick(towns)), ("born", born[p]), ("died", born[p] + age, age)]
        older = [q for q in people if trade_of[q] == trade_of[p] and born[q] + 15 < born[p] < born[q] + 50]
        things[p] = ("person", facts + ([("teacher", pick(older))] if older else []))
    for name, (product, material, tool, place) in TRADES.items():
        things[name] = ("trade", [("makes", product, material), ("tool", tool), ("place", place)])
    for name in ANIMALS:
        things[name] = ("animal", [("animal_is", pick(COLOURS)), ("eats", pick(FOODS)), ("lives", pick(REGIONS)),
                                   ("legs", 2 if name in ("heron", "crow") else 4)])
    return World(things, rivers, tuple(towns), tuple(people))


def sentence(r: random.Random, subject: str, fact: tuple) -> str:
    """One fact in one of its wordings: "Ada Ash" and ("born", 1012) -> "Ada Ash was born in 1012." """
    text = r.choice(WORDINGS[fact[0]]).format(*fact[1:], s=subject)
    return text[0].upper() + text[1:]


def distance(world: World, river: str, a: int, b: int) -> tuple[str, str, int, int]:
    """(town, town, mile, mile) of towns a and b (0..2) of a river, the one farther from the source first."""
    (m, s), (n, t) = sorted([world.rivers[river][a], world.rivers[river][b]], reverse=True)
    return s, t, m, n


if __name__ == "__main__":
    world, r = make_world(0), random.Random(0)
    for thing in r.sample(sorted(world.things), 5):
        print(thing, world.things[thing][0], *[sentence(r, thing, f) for f in world.things[thing][1]], sep=" | ")
