"""Probes hold what they ask for; books refer far back."""
import re

import pytest

from data.tiny import probes
from data.tiny.world import RIVERS, distance, make_world


def test_world_is_consistent_and_a_function_of_its_seed():
    w = make_world(0)
    assert w == make_world(0) and w != make_world(1)
    for name, (kind, facts) in w.things.items():
        values = {f[0]: f[1:] for f in facts}
        if kind == "person":
            assert values["died"][0] - values["born"][0] == values["died"][1]
            if "teacher" in values:
                master = dict((f[0], f[1:]) for f in w.things[values["teacher"][0]][1])
                assert master["person_is"][0] == values["person_is"][0] and master["born"] < values["born"]
        if kind == "town":
            year, founder = values["founded"]
            life = dict((f[0], f[1:]) for f in w.things[founder][1])
            assert life["born"][0] < year <= life["died"][0], name
            assert (values["mile"][0], name) in w.rivers[values["mile"][1]]
    far, near, m, n = distance(w, RIVERS[0], 0, 2)
    assert m > n and (m, far) in w.rivers[RIVERS[0]] and (n, near) in w.rivers[RIVERS[0]]


@pytest.mark.parametrize("kind", probes.KINDS)
def test_probe(kind):
    """The answer can be found by reading the prompt as a machine would, the length is about right, seeds differ."""
    for seed in range(20):
        p = probes.probe(kind, seed, 200)
        assert p == probes.probe(kind, seed, 200) and p.prompt != probes.probe(kind, seed + 1, 200).prompt
        assert 150 < p.prompt.count(" ") < 330 and p.prompt[-1] not in " \n"
        assert probes.score(p, " " + p.answer) == 1.0 and probes.score(p, " nothing here") == 0.0
        text, question = p.prompt.rsplit("\n\n", 1)
        if kind in ("common", "frequent"):
            words = text.split()[1:]
            counts = sorted((words.count(a) for a in p.answers), reverse=True)
            others = max(words.count(x) for x in set(words) - set(p.answers))
            assert min(counts) > others
            assert kind == "common" or counts == [words.count(a) for a in p.answers]
        elif kind == "variables":
            value = re.search(r"Which letters are (\d+)", question)[1]
            known = {}
            for a, b in re.findall(r"Let (\w) be (?:the same as )?(\w+)\.", text):
                known[a] = known.get(b, b)
            assert sorted(k for k, v in known.items() if v == value) == sorted(p.answers)
        else:
            targets = re.findall(r"the (\w+ \w+)(?= and|\?)", question)
            found = [n for t in targets for n in re.findall(rf"The number of the {t} is (\d+)\.", text)]
            assert found == list(p.answers)
            assert len(re.findall(r"The number of the", text)) >= {"multikey": 4, "multiquery": 5}.get(kind, 1)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_lies_at_its_depth(depth):
    for kind in ("single", "multikey", "multivalue", "multiquery"):
        p = probes.probe(kind, 3, 300, depth)
        at = p.prompt.index(f" {p.answers[0]}.") / len(p.prompt)
        assert abs(at - depth) < 0.12


def test_score_by_hand():
    """answers (4821, 7093): both in order 1, one right .5, swapped 0; `common` does not look at the order."""
    p = probes.Probe("multiquery", "", ("4821", "7093"), 0.0)
    assert [probes.score(p, t) for t in (" 4821, 7093.", " 4821, 9.", " 7093, 4821.", "\n4821, 7093")] == [1, 0.5, 0, 0]
    q = probes.Probe("common", "", ("box", "cup"), 0.0, ordered=False)
    assert probes.score(q, " cup, box.") == 1.0


def test_unknown_kind():
    with pytest.raises(ValueError, match="must be one of single"):
        probes.probe("needle", 0, 100)


def test_books_refer_far_back():
    """What the last part says was said in chapter 1, and the words between are nearly all of the book."""
    w = make_world(0)
    for text in probes.books(w, 0, 4, 700)[:2]:
        assert 550 < text.count(" ") < 1000
        first, last = text.split("Chapter 2")[0], text.split("The end")[1]
        facts = re.findall(r"The number of the \w+ \w+ is \d+\.", last)
        assert len(facts) == 3 and all(f in first for f in facts)
    assert probes.books(w, 0, 4, 300) == probes.books(w, 0, 4, 300) != probes.books(w, 1, 4, 300)


def test_digits_by_hand():
    p = probes.Probe("single", "The number is", ("4821",), 0.0)
    replies = (" 4821.", " 4871, 9.", " 482", "", " red 4821")
    assert [probes.digits(p, reply) for reply in replies] == [1, .75, .75, 0, 0]
    with pytest.raises(ValueError, match="not answered by a number"):
        probes.digits(probes.probe("common", 0, 40), "a b c")


def test_recall_documents_say_everything_twice():
    """Each number that is said stands in both halves, behind the same name; between a tenth and half are retrieved."""
    for seed in range(200):
        first, second = probes.recall(seed).split("\n\n")
        said, again = (re.findall(r"The number of the (\w+ \w+) is (\d+)\.", half) for half in (first, second))
        assert sorted(said) == sorted(again) and 1 <= len(said) <= 5
    assert probes.recall(3) == probes.recall(3) != probes.recall(4)
