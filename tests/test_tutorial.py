"""
README and the tutorial's pages: every printed block is the one that paper/printed.py committed; every page of the
tutorial has its parts; every drawn picture is drawn by docs/pictures/draw.py and shown on a page. Nothing is run here:
what the blocks say was run by paper/printed.py.
"""
import re
from pathlib import Path

import pytest

from configurator import UserError
from paper import printed

PAGES = {path.name: path.read_text(encoding="utf-8") for path in printed.pages()}
TUTORIAL = [name for name in PAGES if name != "README.md"]
BLOCKS = {name: text for page in PAGES.values() for name, (_, text) in printed.blocks(page).items()}
PICTURES = Path(__file__).resolve().parent.parent / "docs/pictures"


@pytest.mark.parametrize("name", BLOCKS)
def test_a_printed_block_is_what_the_committed_run_printed(name):
    path = printed.FILES / f"{name}.txt"
    assert path.is_file(), f"no {path.name} in results/demo/printed: run `python paper/printed.py --only={name}`"
    assert BLOCKS[name] == path.read_text(encoding="utf-8"), "run `python paper/printed.py`"


def test_every_committed_output_stands_on_one_page():
    assert {path.stem for path in printed.FILES.glob("*.txt")} == set(BLOCKS)
    assert len(BLOCKS) == sum(page.count("<!-- printed:") for page in PAGES.values()) == \
        sum(page.count("<!-- end -->") for page in PAGES.values())
    assert set(printed.SHOW) | set(printed.TABLES) | set(printed.MAY_FAIL) <= set(BLOCKS)


@pytest.mark.parametrize("name", TUTORIAL)
def test_every_page_has_a_picture_a_number_a_time_and_folded_answers(name):
    page = PAGES[name]
    assert re.search(r"^!\[.+\]\(.+\.png\)$", page, re.M), "no picture"
    assert "**By hand" in page, "no number worked by hand"
    assert re.search(r"\bseconds?\b", page.split("## Try")[1].split("## Exercises")[0]), "no time beside the command"
    answers = page.split("## Exercises")[1]
    assert answers.count("<details><summary>Answer</summary>") == answers.count("</details>") == 2
    assert max(map(len, page.split("\n"))) < 200


def test_every_drawn_picture_is_drawn_by_the_script_and_shown():
    source = (PICTURES / "draw.py").read_text(encoding="utf-8")
    drawn = set(re.search(r"^PICTURES = \((.*?)\)", source, re.M | re.S)[1].replace(",", " ").split())
    shown = set(re.findall(r"\.\./pictures/(\w+)\.png", "".join(PAGES.values())))
    assert {path.stem for path in PICTURES.glob("*.png")} == drawn == shown


def test_blocks_by_hand():
    page = "a\n```\npython x.py\n```\nb\n<!-- printed: x -->\nold\n<!-- end -->\nc\n"
    assert printed.blocks(page) == {"x": ("python x.py\n", "old\n")}
    assert printed.filled(page, {"x": "new\n", "y": ""}) == page.replace("old", "new")
    assert printed.filled(page, {}) == page
    for bad in (page.replace("```", "~~~"), page + page):
        with pytest.raises(ValueError, match="stands twice, or has no commands"):
            printed.blocks(bad)


def test_tidy_by_hand():
    text = "  seed = 1\n* model.n_layer = 4\nsft: 50%|##| 2/4 [00:01, 1.9step/s]\n[3,127 tokens/s] in 0.71 s\n" \
           "out.json (5 s)\nratio = 0.98x\n"
    assert printed.tidy(text) == "[(varies) tokens/s] in (varies) s\nout.json (time varies)\nratio = (varies)"
    assert printed.tidy("word " * 30).split("\n")[1].startswith("    word")


def test_a_command_that_fails_is_named():
    with pytest.raises(UserError, match="'exit 3' ended with status 3"):
        printed.run("exit 3", may_fail=False)
    assert printed.run("echo out/try; exit 3", may_fail=True) == "out/try\n"
