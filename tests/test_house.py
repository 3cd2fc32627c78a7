"""
The house: which room may import from which, what lies at the root, how a docstring looks, what --help says.

A room imports only from floors below its own, behind functions too. Names stand where they are defined: nothing is
re-exported. Docstrings keep their pictures: an indented block that a tool re-filled is seen here.
"""
import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("", "config", "data", "data/tiny", "kernels", "kernels/cpu", "judge", "paper", "bench", "hf_export")
# from the ground up; a module that is not named stands on the floor of its folder
FLOORS = [
    ["configurator", "cache", "kernels", "kernels.*", "kernels.cpu.*", "data", "data.text", "data.tiny"],
    ["schedule", "sampling", "data.jsonl", "data.charset", "data.formulas", "data.page", "data.readers",
     "data.published", "chat_template", "model"],
    ["tokenizer"],
    ["mtp", "distributed", "data.problems", "data.shards", "data.dedup", "data.extract", "data.decontaminate",
     "data.tiny.world", "data.tiny.pages", "data.tiny.web"],
    ["metrics", "checkpoint", "lora", "judge", "judge.*", "data.*", "data.tiny.*"],
    ["reward", "runner"],
    ["engine", "rollout", "data.filters"],
    ["eval", "data.rl_problems", "data.hub"],
    ["pretrain", "sft", "rl", "sample", "hf"],
    ["plan", "demo", "paper.*", "bench.*", "docs.*"],
]
SOURCES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
           for room in ROOMS for path in (ROOT / room).glob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def floor_of(module: str) -> int:
    """Index into FLOORS; the exact name wins over a folder's pattern."""
    for pattern in (module, module.rpartition(".")[0] + ".*"):
        for i, floor in enumerate(FLOORS):
            if pattern in floor:
                return i
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS")


def imports_of(module: str) -> set[str]:
    """Modules of ours that it imports, at any depth of nesting."""
    found, folder = set(), SOURCES[module].parent
    for node in ast.walk(TREES[module]):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:   # `from judge import server` is judge.server alone
            inner = [f"{node.module}.{a.name}" for a in node.names]
            names = [name if name in SOURCES else node.module for name in inner]
        for name in names:
            if folder.name in ("bench", "paper") and f"{folder.name}.{name}" in SOURCES:
                name = f"{folder.name}.{name}"             # scripts of one folder see each other by bare name
            if name in SOURCES:
                found.add(name)
    return found - {module}


CODE = sorted(m for m in SOURCES if not m.startswith(("config.", "hf_export.")))


def code_lines(text: str, tree: ast.Module | None) -> int:
    told = set()
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.strip()) and not line.strip().startswith(("#", "//", "/*", "*")) and n not in told
               for n, line in enumerate(text.split("\n"), 1))


def test_readme_counts_the_lines_of_code():
    """Python and C without tests and benchmarks, without blank lines, comments and docstrings; to the thousand."""
    lines = sum(code_lines(path.read_text(encoding="utf-8"), TREES[name]) for name, path in SOURCES.items()
                if not name.startswith("bench."))
    lines += sum(code_lines(path.read_text(encoding="utf-8"), None) for path in (ROOT / "kernels/cpu").glob("*.[ch]"))
    said = re.search(r"([\d,]+) lines of code, tests and\s+benchmarks aside", (ROOT / "README.md").read_text())[1]
    assert abs(int(said.replace(",", "")) - lines) <= 1000, lines


@pytest.mark.parametrize("module", CODE)
def test_a_room_imports_only_from_floors_below(module):
    """Or from its own floor, where the next test forbids circles."""
    above = {name for name in imports_of(module) if floor_of(name) > floor_of(module)}
    assert not above, f"{module} imports {sorted(above)} from a higher floor"


def test_no_circle():
    """A depth-first walk over all imports, those inside functions too, never comes back to where it is."""
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module):], module])
        if module in done:
            return
        path.append(module)
        for name in sorted(imports_of(module)):
            visit(name)
        done.add(path.pop())
    for module in CODE:
        visit(module)


def test_a_circle_is_seen(monkeypatch):
    """The test above would see one: schedule importing pretrain."""
    monkeypatch.setitem(TREES, "schedule", ast.parse("def f():\n    from pretrain import main"))
    with pytest.raises(AssertionError, match="schedule -> pretrain|pretrain -> schedule"):
        test_no_circle()
    with pytest.raises(AssertionError, match="higher floor"):
        test_a_room_imports_only_from_floors_below("schedule")


def test_the_root_is_easy_to_see():
    scripts = sorted(p.name for p in ROOT.glob("*.py"))
    assert len(scripts) <= 24, scripts


@pytest.mark.parametrize("module", CODE)
def test_nothing_is_re_exported(module):
    """`from a import f` takes f from where it is defined."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module in TREES:
            defined = {n.id for top in TREES[node.module].body for n in ast.walk(top)
                       if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            defined |= {top.name for top in ast.walk(TREES[node.module])
                        if isinstance(top, (ast.FunctionDef, ast.ClassDef))}
            for a in node.names:
                ours = a.name in defined or f"{node.module}.{a.name}" in SOURCES
                allowed = node.module == "kernels" and a.name in ("tl", "triton")    # there or None, decided once
                assert ours or allowed, f"{module}: {node.module}.{a.name} is defined elsewhere"


# ---- docstrings -----------------------------------------------------------------------------------------------------

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def docstrings(module: str):
    """(place, docstring node) of everything in a module that has one."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            yield f"{module}:{getattr(node, 'name', '')}:{node.body[0].lineno}", node.body[0].value


@pytest.mark.parametrize("module", CODE)
def test_docstrings_have_one_style(module):
    """One line, or quotes alone on the first and the last line; no line wider than the code."""
    source = SOURCES[module].read_text(encoding="utf-8").split("\n")
    for place, node in docstrings(module):
        lines = source[node.lineno - 1:node.end_lineno]
        assert max(map(len, lines)) <= 120, f"{place}: a line of {max(map(len, lines))} characters"
        if len(lines) > 1:
            assert lines[0].strip() in ('"""', 'r"""'), f"{place}: text begins on the line after the quotes"
            assert lines[-1].strip() == '"""', f"{place}: the closing quotes stand alone"
        else:
            assert not lines[0].strip().startswith('""""'), f"{place}: four quotes"


def refilled(text: str) -> str | None:
    """
    The first line of an indented block that looks like prose wrapped by a tool: a table row or picture whose next line,
    at the same indent, begins with words that ended the row before. Two marks of it: a line with a gap of three blanks
    inside (a column) followed by a line without any gap at the same indent that begins in the middle of a sentence
    (lower case), and a line that is one lone word.
    """
    lines = text.split("\n")
    for a, b in zip(lines, lines[1:], strict=False):
        indent = len(a) - len(a.lstrip())
        column = re.search(r"\S {3,}\S", a.strip())
        if indent and column and b.strip() and len(b) - len(b.lstrip()) == indent:
            if re.fullmatch(r"[a-z]+[,.;:]?", b.strip()) and not re.search(r"\S {3,}\S", b.strip()):
                return b
    return None


@pytest.mark.parametrize("module", CODE)
def test_no_indented_block_was_refilled(module):
    for place, node in docstrings(module):
        assert refilled(node.value) is None, f"{place}: {refilled(node.value)!r} belongs to the row above"
        prose = node.value.rstrip().split("\n")
        if len(prose) > 2 and len(prose[-1].split()) == 1 and prose[-1].startswith("    ") and len(prose[-2]) > 90:
            raise AssertionError(f"{place}: one lone word on the last line: {prose[-1].strip()!r}")


def test_a_refilled_block_is_seen():
    """The rewards' table as it once stood in reward.py."""
    broken = ("    vanilla   r = 1 if every test passes else 0\n"
              "    strict    r = sum_l s_l [...]      a level counts if it and all easier ones are\n"
              "    complete\n    soft      r = sum_l s_l p_l / n_l\n")
    whole = broken.replace("are\n    complete\n", "are complete\n")
    assert refilled(broken) == "    complete" and refilled(whole) is None


# ---- public names ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [m for m in CODE if not m.startswith(("bench.", "paper."))])
def test_public_functions_are_annotated_and_documented(module):
    bad = []
    for node in TREES[module].body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_") or node.name == "main":
            continue
        if any("jit" in ast.unparse(d) or "register_fake" in ast.unparse(d) for d in node.decorator_list):
            continue                                       # a Triton kernel's parameters are pointers and constants
        if not ast.get_docstring(node) and node.name != "Config":
            bad.append(f"{node.name} has no docstring")
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            without = [a.arg for a in arguments if a.annotation is None]
            if without:
                bad.append(f"{node.name}: no type for {', '.join(without)}")
    assert not bad, f"{module}: {'; '.join(bad)}"


# ---- one command line -----------------------------------------------------------------------------------------------

# judge.server and judge.maths are started by the judge, in bare interpreters; nobody types their words
SCRIPTS = sorted(m for m in CODE if "__main__" in SOURCES[m].read_text(encoding="utf-8")
                 and m not in ("configurator", "judge.server", "judge.maths"))


@pytest.mark.parametrize("module", SCRIPTS)
def test_every_script_reads_its_words_through_configurator(module):
    source = SOURCES[module].read_text(encoding="utf-8")
    assert "argparse" not in source and "parse_args" not in source
    if re.search(r"configurator\.run\(main, Config\)|run\(main, Config\)", source):
        if module.startswith(("bench.", "paper.")):        # their folder is sys.path[0]; peers may be missing
            tree = next(n for n in TREES[module].body if isinstance(n, ast.ClassDef) and n.name == "Config")
            fields = [n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)]
        else:
            fields = [f.name for f in dataclasses.fields(importlib.import_module(module).Config)]
        segment = source[source.index("class Config"):]
        for name in fields:
            assert re.search(rf"\n    {name}: .*#", segment), f"{module}: field {name} has no comment"
    else:
        assert "sys.argv" not in source, f"{module} reads sys.argv by hand"


@pytest.mark.parametrize("words", [["pretrain.py"], ["plan.py"], ["hf.py"], ["-m", "data.hub"], ["-m", "data.prepare"]])
def test_help_shows_every_field_with_its_default(words):
    run = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "usage: python" in run.stdout and run.stdout.count("\n  --") >= 3, run.stderr
