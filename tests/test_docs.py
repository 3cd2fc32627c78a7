"""
README.md and docs/**/*.md against the code: every command parses, every `file.py:symbol` exists, every link and image
is there, the results block is what the committed run gives.

Commands are not run. A script with a Config goes through configurator.load, so files and flags must exist and have the
right types; for the others the file must exist.
"""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import configurator
from configurator import UserError
from paper import readme_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```[ \t]*(\w*)[ \t]*\n(.*?)^```[ \t]*$", re.M | re.S)
SYMBOL = re.compile(r"`([\w/]+\.py):([A-Za-z_][\w.]*)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FOREIGN = {"sglang.launch_server", "venv", "pip"}     # modules of other projects, named with python -m


def name(path):
    return str(path.relative_to(ROOT))


def commands_of(text):
    """Lines of fences without a language (or bash, sh) that begin like a command of ours, as words."""
    found = []
    for language, body in FENCE.findall(text):
        if language not in ("", "bash", "sh", "console"):
            continue
        for line in body.replace("\\\n", " ").split("\n"):
            for part in re.split(r"\s[;|&]+\s", line.strip().removeprefix("$ ")):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:                    # an apostrophe in prose is no command
                    continue
                while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=\S*", words[0]):
                    words = words[1:]                 # ENV=1 python ...
                if words and Path(words[0]).name in ("python", "python3", "make", "torchrun", "pytest"):
                    found.append([Path(words[0]).name, *words[1:]])
    return found


TEXTS = {p: p.read_text(encoding="utf-8") for p in PAGES}
COMMANDS = sorted({(name(p), tuple(words)) for p, text in TEXTS.items() for words in commands_of(text)})


def check_script(script, argv, monkeypatch):
    path = ROOT / script
    assert path.is_file(), f"no file {script}"
    source = path.read_text(encoding="utf-8")
    assert "__main__" in source, f"{script} is not a script"
    module = script.removesuffix(".py").replace("/", ".")
    monkeypatch.chdir(ROOT)
    if re.search(r"configurator\.(load|run)\(", source):
        configurator.load(importlib.import_module(module).Config, [word for word in argv if word != "--help"])


def check_command(words, monkeypatch):
    """AssertionError or UserError for a command line of a page that cannot work."""
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.M))
        wanted = [w for w in rest if "=" not in w]
        assert wanted and set(wanted) <= targets, f"make {wanted}: targets are {sorted(targets)}"
    elif program == "pytest" or rest[:2] == ["-m", "pytest"]:
        files = [w.split("::")[0] for w in rest if w.startswith("tests/")]
        assert files and all((ROOT / f).is_file() for f in files), "no such test file"
    elif program == "torchrun":
        at = next(i for i, w in enumerate(rest) if w.endswith(".py"))
        check_script(rest[at], rest[at + 1:], monkeypatch)
    elif rest[0] == "-c":
        ast.parse(rest[1])
    elif rest[0] == "-m":
        if rest[1] not in FOREIGN:
            check_script(rest[1].replace(".", "/") + ".py", rest[2:], monkeypatch)
    else:
        check_script(rest[0], rest[1:], monkeypatch)


@pytest.mark.parametrize("page", sorted({page for page, _ in COMMANDS}))
def test_every_command_of_a_page_parses(page, monkeypatch):
    bad = []
    for words in [words for where, words in COMMANDS if where == page]:
        try:
            check_command(words, monkeypatch)
        except (AssertionError, UserError, OSError, ImportError) as e:
            bad.append(f"{' '.join(words)}: {e}")
    assert not bad, f"{page}: " + "; ".join(bad)


def test_the_commands_are_found():
    """The test above is empty if the pages are read wrongly."""
    text = "```\nmake demo   # all\nX=1 python eval.py --ckpt=a \\\n  --n=2\n```\n```text\npython x.py\n```\n"
    assert commands_of(text) == [["make", "demo"], ["python", "eval.py", "--ckpt=a", "--n=2"]]
    assert ("README.md", ("make", "demo")) in COMMANDS and len(COMMANDS) > 20


@pytest.mark.parametrize("line", ["python no_such.py", "make nothing", "python sft.py --lrr=1",
                                  "python sft.py config/none.py", "python hf.py improt a b"])
def test_a_wrong_command_is_seen(line, monkeypatch, capsys):
    with pytest.raises((AssertionError, UserError)):
        check_command(line.split(), monkeypatch)


# ---- symbols -----------------------------------------------------------------------------------------------

def symbols_of(path):
    """Names that a file defines at its top level, and `Class.name` for methods and fields of classes."""
    def names(body):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield node.name, node
            for target in (getattr(node, "targets", None) or [getattr(node, "target", None)]):
                for leaf in ast.walk(target) if target is not None else ():
                    if isinstance(leaf, ast.Name):
                        yield leaf.id, None
    found = set()
    for symbol, node in names(ast.parse(path.read_text(encoding="utf-8")).body):
        found.add(symbol)
        if isinstance(node, ast.ClassDef):
            found |= {f"{symbol}.{inner}" for inner, _ in names(node.body)}
    return found


LOG = "docs/lab_log.md"                              # history: its names are those of their day
DEFINED = {t for p in (ROOT / "tests").glob("test_*.py")
           for t in [p.stem, *re.findall(r"def (test_\w+)", p.read_text(encoding="utf-8"))]}


@pytest.mark.parametrize("page", [name(p) for p in PAGES if name(p) != LOG])
def test_every_symbol_and_test_that_a_page_names_exists(page):
    text = TEXTS[ROOT / page]
    bad = [f"{file}:{symbol}" for file, symbol in SYMBOL.findall(text)
           if not (ROOT / file).is_file() or symbol not in symbols_of(ROOT / file)]
    bad += [test for test in re.findall(r"\btest_\w+", text) if test not in DEFINED]
    assert not bad, f"{page} names {', '.join(bad)}"


@pytest.mark.parametrize("page", [name(p) for p in PAGES if "tutorial" in p.parts])
def test_every_page_of_the_tutorial_has_its_parts(page):
    """The idea or its subject, code to read, something to run, exercises with answers; and the README leads to it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.startswith("# ") and "Code: `" in text and "Report: " in text
    assert "## Try" in text and "```" in text.split("## Try")[1], "nothing to run"
    exercises = text.split("## Exercises")[1]
    assert exercises.count("\n1. ") == exercises.count("\n2. ") == 1 and "(" in exercises
    assert f"({page})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_page_names_a_place_of_one_machine():
    """A command must work in anybody's checkout."""
    for page, text in TEXTS.items():
        assert not re.search(r"(?<![\w./])/(?:home|root|work|Users|mnt)/", text), name(page)


def map_rows():
    part = (ROOT / "docs/map.md").read_text(encoding="utf-8")
    return [line for line in part.split("\n") if line.startswith("| ") and not line.startswith("| report")]


@pytest.mark.parametrize("row", map_rows(), ids=lambda row: row.split("|")[2].strip()[:50])
def test_each_row_of_the_map_names_symbols_in_files_that_name_the_section(row):
    _, section, _, where, _ = row.split("|")
    found = SYMBOL.findall(where)
    assert found and not re.sub(SYMBOL, "", where).strip(" ,"), f"not all of {where} reads `file.py:symbol`"
    labels = [label.strip() for label in section.split(",")]      # "3.3.1", "Fig. 5"; 3.3 will do for 3.3.1
    labels += [label.rsplit(".", 1)[0] for label in labels if re.fullmatch(r"\d\.\d\.\d", label)]
    files = {file for file, _ in found}
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in files]
    assert any(x in text for x in labels for text in texts), f"none of {sorted(files)} names one of {labels}"


def test_the_map_is_whole():
    """Every section of the report that the code implements has a row."""
    labels = {label.strip() for row in map_rows() for label in row.split("|")[1].split(",")}
    assert labels >= {"2.1", "2.2", "2.3", "2.4", "3.1", "3.2", "3.3", "3.3.1", "3.3.2", "3.3.3", "3.4.1",
                      "3.5", "3.6", "Eq. 1", "Eq. 2", *(f"Fig. {i}" for i in range(2, 9)),
                      "Table 2", "Table 3", "Table 5", "Table 6"}


# ---- links, results, headers -------------------------------------------------------------------------------

def broken(page, target):
    """What is wrong with a link, None if nothing."""
    path, _, anchor = target.partition("#")
    path = (page.parent / path).resolve() if path else page
    if not path.exists():
        return f"{target}: no such file"
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M) if anchor else []
    heads = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    return f"{target}: no such heading" if anchor and anchor not in heads else None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_and_image_exists(page):
    targets = [t for t in LINK.findall(FENCE.sub("", TEXTS[page])) if not re.match(r"[a-z]+:", t)]
    assert not (bad := [b for t in targets if (b := broken(page, t))]), f"{name(page)}: {bad}"


def test_results_block_is_what_the_committed_run_gives():
    inside = readme_table.inside((ROOT / "README.md").read_text(encoding="utf-8"))
    if not (readme_table.RUN / "summary.json").is_file():
        pytest.skip("no demo run is committed yet: results/demo/summary.json does not exist")
    assert inside == readme_table.committed(), "run `python paper/readme_table.py`"


def test_block_by_hand():
    """A made-up run: a row per model with its interval, the report's numbers in the row of the same name."""
    row = {"avg": 0.25, "low": 0.2, "high": 0.301, "n": 250, "samples": 8, "pass@1": 0.25, "pass@16": 0.75}
    summary = {"models": {k: {"maths": row, "code": row} for k in readme_table.NAMES},
               "mtp": {"acceptance": [0.9, 0.8, 0.7], "teacher_forced": [0.9, 0.8, 0.7],
                       "tokens_per_forward": 3.0, "speedup": 1.5, "equal_text": True},
               "seconds": {"pretrain": 300.0, "total": 660.0}, "peak_mb": 900, "heldout_overlap": 0,
               "commit": "abc"}
    run = {"command": "make demo", "seeds": [1], "hardware": {"cpu": "x", "cores": 2}}
    text = readme_table.block(summary, run)
    assert "| RL-Zero | 25.0% [20.0%, 30.1%] | 25.0% [20.0%, 30.1%] | 93.6 / 56.4 / 49.1 |" in text
    assert "250 maths and 250 code" in text and "11.0 minutes" in text and "pass@16 75.0%" in text
    assert "- commit: `abc`; command: `make demo`; seeds: `1`; hardware: cpu `x`, cores `2`." in text
    readme = f"a\n{readme_table.BEGIN}\nold\n{readme_table.END}\nb\n"
    assert readme_table.inside(readme_table.replaced(readme, text)) == text
    with pytest.raises(ValueError, match="results:begin"):
        readme_table.replaced("no marks", text)


def test_every_file_says_what_it_is():
    """A header: the module's docstring, or the comment that a plain config file starts with."""
    rooms = ("config", "data", "kernels", "paper", "bench", "tests", "hf_export")
    files = [*ROOT.glob("*.py"), *(p for room in rooms for p in (ROOT / room).rglob("*.py"))]
    bad = []
    for path in files:
        source = path.read_text(encoding="utf-8")
        comment = path.parent.name == "config" and source.startswith("# ")
        if not (comment or ast.get_docstring(ast.parse(source))):
            bad.append(name(path))
    assert len(files) > 50 and not bad, f"no header: {bad}"

