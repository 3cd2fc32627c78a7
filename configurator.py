"""
Typed configuration: dataclass defaults < config files, left to right < --key=value, left to right.

Not a section of the report, but the place where its numbers are written down and may go wrong. Each script declares
one frozen dataclass `Config`. A config file is plain assignments and may inherit another one with
`from config.mimo_7b import *`; names that start with _ are private to the file.

    python pretrain.py config/tiny.py --model.n_layer=6 --stages.0.tokens=1e6 --compile
    python hf.py export out/tiny/rl out/hf --flavour=mimo        # Config.POSITIONAL names the fields without --

A key nobody declared, in a file or on the command line, ends the run with exit status 1 and the nearest real name. A
wrong type names field, value and expected type. Reading a config file runs it as Python: only run files you trust.

Errors. Whatever a person or a disk did wrong is raised as UserError, anywhere in the project, and ends in one place,
run(): one line on stderr and exit status 1. Every other exception is a bug and keeps its traceback.
"""
import ast
import atexit
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import re
import runpy
import sys
import types
import typing
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from data.text import safe_streams, shown


class UserError(ValueError):
    """What a person gave, or what a disk did, cannot be used. The message is one line that says what would be right."""


at_end = ExitStack()            # at_end.callback(f) calls f() when the script ends, whatever ends it (data/lock.py)
atexit.register(at_end.close)


def run(main: Callable, Config: type):
    """What a script does when it is called: `if __name__ == "__main__": configurator.run(main, Config)`."""
    safe_streams()
    with one_line():
        try:
            return main(load(Config))
        finally:
            at_end.close()


@contextmanager
def one_line():
    """
    The one place where errors end. UserError, and what the system says of a file (full disk, no such file, no
    permission), become one line and exit status 1; Ctrl-C becomes status 130.
    """
    try:
        yield
    except UserError as e:
        raise SystemExit(f"error: {shown(str(e), lines=False)}") from None
    except OSError as e:
        raise SystemExit(f"error: {shown(os_words(e), lines=False)}") from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def os_words(e: OSError) -> str:
    """What the system says, as `out/x: No space left on device`, not `[Errno 28] No space left on device: 'out/x'`."""
    if e.filename is None or not e.strerror:
        return e.strerror or str(e) or type(e).__name__
    return f"{e.filename2 or e.filename}: {e.strerror}"


def writable(path: str | Path) -> Path:
    """
    Where a result will be written: create its folder and check, before the work starts, that the file can be written.
    -> path. UserError when it cannot.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"{path} is a folder; a file is to be written there")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: no permission to write in {path.parent}")
    return path


def at_least(cfg: Any, low: float, *names: str) -> None:
    """For __post_init__: ValueError naming the first field that is under `low`, infinite or NaN."""
    for name in names:
        value = getattr(cfg, name)
        if not (math.isfinite(value) and value >= low):
            raise ValueError(f"{name} = {value} should be at least {low}")


def load(Config: type, argv: list[str] | None = None):
    """
    Config: a dataclass type. argv: words after the script's name, default sys.argv[1:]. Words without -- fill the
    fields that Config.POSITIONAL names, in order; beyond these, and where there are none, they are config files.
    -> an instance of Config. Raises UserError for whatever it cannot take.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(help_text(Config))
        raise SystemExit(0)
    cfg, flags = raw(Config, defaults(Config)), [word for word in argv if word.startswith("--")]
    names, bare = getattr(Config, "POSITIONAL", ()), [word for word in argv if not word.startswith("--")]
    for path in bare[len(names):]:                     # files first: flags win over files wherever they stand
        cfg = update(cfg, read_file(path), where=path)
    for name, word in zip(names, bare, strict=False):
        cfg = set_path(cfg, [name], Word(word), name)
    for word in flags:
        key, eq, value = word[2:].partition("=")       # only the first "=" splits: --prompt=a=b is fine
        cfg = set_path(cfg, key.split("."), Word(value) if eq else True, key)
    for name in names:
        if getattr(cfg, name) == "":
            raise UserError(f"{name} is missing; usage: {usage(Config)}")
    return built(cfg)                                  # rules between fields are checked once, on the whole


def read_file(path: str) -> dict[str, Any]:
    """The public assignments of a config file; modules, classes and functions that it imported are left out."""
    if not Path(path).is_file():
        hint = "no such file" if path.endswith(".py") else "a config file ends in .py; a flag starts with --, " \
            "its value follows after ="
        raise UserError(f"cannot read config file {path!r}: {hint}")
    root = str(Path(__file__).resolve().parent)        # so that `from config.tiny import *` works from any folder
    sys.path[:0] = [root]
    try:
        names = runpy.run_path(path)
    except SystemExit:
        raise
    except BaseException as e:
        raise UserError(f"{path}: {type(e).__name__}: {e}") from None
    finally:
        sys.path.remove(root)
    return {k: v for k, v in names.items()
            if not k.startswith("_") and not isinstance(v, (types.ModuleType, type, types.FunctionType))}


def update(cfg: Any, values: dict[str, Any], where: str):
    """All values of one file at once, so that rules between fields see the file as a whole."""
    fields, hints, place = {f.name for f in dataclasses.fields(cfg)}, typing.get_type_hints(type(cfg)), f" in {where}"
    for key in values:
        if key not in fields:
            raise unknown(key, key, nested(cfg, key) or fields, place)
    new = {key: check(value, hints[key], key, place) for key, value in values.items()}
    return raw(type(cfg), {name: getattr(cfg, name) for name in fields} | new)


def set_path(node: Any, path: list[str], value: Any, full: str):
    """A copy of node (dataclass, list, tuple or dict) with the value at path replaced and checked."""
    head, rest = path[0], path[1:]
    if isinstance(node, (list, tuple)):
        if not head.isdigit() or int(head) >= len(node):
            raise UserError(f"unknown key {full}: {head!r} should be an index from 0 to {len(node) - 1}")
        items, i = list(node), int(head)
        items[i] = set_path(items[i], rest, value, full) if rest else value
        return type(node)(items)
    if isinstance(node, dict):
        if head not in node and rest:
            raise unknown(full, head, node)
        return node | {head: set_path(node[head], rest, value, full) if rest else value}
    if not dataclasses.is_dataclass(node):
        here = ".".join(full.split(".")[:-len(path)])
        what = "None, give it as a whole in a config file" if node is None else "a plain value, it has no parts"
        raise UserError(f"unknown key {full}: {here} is {what}")
    fields = {f.name: f for f in dataclasses.fields(node)}
    if head not in fields:
        raise unknown(full, head, nested(node, head) or fields)
    hint = typing.get_type_hints(type(node))[head]
    if hint == dict[str, Any] and rest:                # names of another configuration (plan.py --set): dots and all
        value, rest = getattr(node, head) | {".".join(rest): value}, []
    new = set_path(getattr(node, head), rest, value, full) if rest else value
    new = check(new, hint, full if rest == [] else full.rsplit(".", len(rest))[0])
    return raw(type(node), {f: getattr(node, f) for f in fields} | {head: new})


def unknown(full: str, head: str, names: Iterable[str], place: str = "") -> UserError:
    """The error for a key that nobody declared, with the nearest of names."""
    near = difflib.get_close_matches(head, list(names), n=1, cutoff=0.0)
    prefix = full[:full.rfind(head)]
    return UserError(f"unknown key {full}{place}" + (f" -- did you mean {prefix}{near[0]}?" if near else ""))


def nested(node: Any, name: str) -> list[str]:
    """The first field called `name` inside of node, as [dotted name]: what was meant by a word one level up."""
    return [path for path, _ in leaves(node) if path.endswith(f".{name}")][:1]


def defaults(cls: type) -> dict[str, Any]:
    """Field name -> default value."""
    return {f.name: getattr(make(cls, {}), f.name) for f in dataclasses.fields(cls)}


def raw(cls: type, values: dict[str, Any]):
    """A dataclass whose __post_init__ has not run: what it will complain of may be mended by the next flag."""
    node = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(node, name, value)
    return node


def built(node: Any):
    """The same values through the real constructors, innermost first."""
    if isinstance(node, (list, tuple)):
        return type(node)(built(v) for v in node)
    if not dataclasses.is_dataclass(node):
        return node
    return make(type(node), {f.name: built(getattr(node, f.name)) for f in dataclasses.fields(node)})


def make(cls: type, values: dict[str, Any]):
    """Build a dataclass; a ValueError of its __post_init__, or a missing field, becomes a UserError."""
    try:
        return cls(**values)
    except (ValueError, TypeError) as e:
        raise UserError(str(e)) from None


def check(value: Any, hint: Any, key: str, place: str = ""):
    """
    value if it has the type `hint`, else UserError. An int is taken for a float and an integral float (1e6) for an
    int; a nested dataclass takes an instance or a dict; a Word is read; nothing else is converted.
    """
    def wrong(want: str):
        return UserError(f"{key} = {value!r} should be {want}{place}")

    if isinstance(value, Word):
        value = value.read_as(hint)
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise wrong("one of " + ", ".join(map(repr, args)))
    if origin in (Union, types.UnionType):
        for arm in args:
            try:
                return check(value, arm, key, place)
            except UserError:
                continue
        raise wrong(name_of(hint))
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise wrong(name_of(hint))
        arms = args if origin is tuple and args[-1] is not Ellipsis else [args[0]] * len(value)
        if len(arms) != len(value):
            raise wrong(f"{len(arms)} values")
        return origin(check(v, arm, f"{key}.{i}", place) for i, (v, arm) in enumerate(zip(value, arms, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong(name_of(hint))
        return {check(k, args[0], f"{key} key", place): check(v, args[1], f"{key}.{k}", place)
                for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, dict):
            return update(raw(hint, defaults(hint)), value, place.removeprefix(" in "))
        raise wrong(name_of(hint))
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        value = int(value)
    if hint is int and type(value) is int and not -2**63 <= value < 2**63:
        raise wrong("an int below 2^63 (9,223,372,036,854,775,808)")
    if type(value) is hint:                            # exact: True is not an int here
        return value
    raise wrong(name_of(hint))


def name_of(hint: Any) -> str:
    """int, str | None, list[Stage]: as one would write it, without modules."""
    return "None" if hint is types.NoneType else getattr(hint, "__name__", str(hint)) if not get_args(hint) \
        else re.sub(r"\b[\w.]+\.(\w+)", r"\1", str(hint))


class Word(str):
    """What stands behind --key= on the command line: what it means depends on the type of the field."""

    def read_as(self, hint: Any):
        """
        Text is taken as it stands: --prompt=123, --out=2024, --prompt='"quoted"'; None where the field may be None.
        Elsewhere a Python literal if it reads as one, 3e-4, True, [1,2], else the word itself.
        """
        arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if str in arms and not (self == "None" and types.NoneType in arms):
            return str(self)
        try:
            return ast.literal_eval(self)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return str(self)


# ---- showing and storing --------------------------------------------------------------------------------------------

def to_dict(cfg: Any) -> dict:
    """Plain dicts, lists and scalars, for JSON."""
    return dataclasses.asdict(cfg)


def from_dict(Config: type, values: dict, where: str = "saved config"):
    """The inverse of to_dict; UserError for keys that Config does not have, wrong types, and what Config refuses."""
    node = update(raw(Config, defaults(Config)), values, where)
    try:
        return built(node)
    except ValueError as e:
        raise UserError(f"{where}: {e}") from None


def leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every field, nested dataclasses and lists of them opened."""
    if dataclasses.is_dataclass(node):
        return [x for f in dataclasses.fields(node) for x in leaves(getattr(node, f.name), f"{path}{f.name}.")]
    if isinstance(node, (list, tuple)) and node and dataclasses.is_dataclass(node[0]):
        return [x for i, v in enumerate(node) for x in leaves(v, f"{path}{i}.")]
    return [(path[:-1], node)]


def changes(saved: dict, cfg: Any) -> list[tuple[str, Any, Any]]:
    """
    (dotted name, saved value, value now) wherever cfg differs from what to_dict() gave, perhaps read back from JSON.
    A field that the saved one does not have came later and is no difference; a stage more or less is one, with None.
    """
    plain = lambda v: json.loads(json.dumps(to_dict(v) if dataclasses.is_dataclass(v) else v))

    def walk(old: Any, new: Any, path: str) -> Iterable[tuple[str, Any, Any]]:
        if dataclasses.is_dataclass(new) and isinstance(old, dict):
            for f in dataclasses.fields(new):
                if f.name in old:
                    yield from walk(old[f.name], getattr(new, f.name), f"{path}{f.name}.")
        elif isinstance(new, list) and isinstance(old, list) and any(map(dataclasses.is_dataclass, new)):
            for i, pair in enumerate(itertools.zip_longest(old, new)):
                yield from walk(*pair, f"{path}{i}.")
        elif plain(old) != plain(new):
            yield path[:-1], plain(old), plain(new)
    return list(walk(saved, cfg, ""))


def show(cfg: Any) -> str:
    """One line a value, * before those that differ from the dataclass's defaults."""
    default = dict(leaves(type(cfg)()))
    rows = [(" " if k in default and default[k] == v else "*", k, v) for k, v in leaves(cfg)]
    width = max(len(k) for _, k, _ in rows)
    return "\n".join(f"{mark} {k:<{width}} = {v!r}" for mark, k, v in rows)


def usage(Config: type) -> str:
    """How a script is called: python hf.py ACTION SOURCE OUT [--key=value ...]."""
    module = sys.modules[Config.__module__]
    inside = getattr(getattr(module, "__spec__", None), "name", "")     # "data.prepare" of python -m data.prepare
    path = Path(getattr(module, "__file__", None) or "SCRIPT.py")
    folder = f"{path.parent.name}/" if path.parent.name in ("bench", "paper") else ""
    script = f"-m {inside}" if "." in inside else folder + path.name
    words = [name.upper() for name in getattr(Config, "POSITIONAL", ())] or ["[config/FILE.py ...]"]
    return " ".join(["python", script, *words, "[--key=value ...]"])


def help_text(Config: type) -> str:
    """
    --help: the script's own first lines, how to call it, then every field, nested ones too, with its type, default and
    the comment behind it. A list of dataclasses (--stages.0.lr) shows the fields of one item.
    """
    module = sys.modules[Config.__module__]
    return "\n".join([(module.__doc__ or "").strip(), "", f"usage: {usage(Config)}",
                      "a flag wins over a file, a file over the defaults below; --flag alone sets a bool", "",
                      *help_rows(Config, make(Config, {}), "--", {})])


def help_rows(cls: type, node: Any, prefix: str, shown_at: dict[type, str]) -> list[str]:
    """
    One line a field of the dataclass cls. node: an instance with the defaults, None where there is none; shown_at:
    nested dataclasses that were shown before, and where.
    """
    comments, hints, lines = field_comments(inspect.getsource(cls)), typing.get_type_hints(cls), []
    for f in dataclasses.fields(cls):
        value, hint, name = None if node is None else getattr(node, f.name), hints[f.name], prefix + f.name
        inner = next((t for t in (hint, *get_args(hint)) if dataclasses.is_dataclass(t)), None)
        shown = "" if inner and value is not None else "=" + (repr(value) if len(repr(value)) < 40 else "...")
        kind = "|".join(map(str, get_args(hint))) if get_origin(hint) is Literal else name_of(hint)
        again = f"; fields as {shown_at[inner]}*" if inner in shown_at else ""
        lines.append(f"  {name + shown:<34}  {kind:<12}  {comments.get(f.name, '')}{again}".rstrip())
        if inner and not again:
            many = get_origin(hint) in (list, tuple)
            item = value[0] if many and value else value if dataclasses.is_dataclass(value) else None
            shown_at[inner] = f"{name}.0." if many else f"{name}."
            lines += help_rows(inner, item, shown_at[inner], shown_at)
    return lines


def field_comments(source: str) -> dict[str, str]:
    """name -> the comment at the end of its line and on the comment lines that follow it."""
    found, name = {}, ""
    for line in source.splitlines():
        code, _, comment = line.partition("# ")
        field = code.strip().partition(":")[0]
        if code.strip():
            name = field if ":" in code and field.isidentifier() and comment and code.endswith("  ") else ""
            if name:
                found[name] = comment.strip()
        elif name and comment:
            found[name] += " " + comment.strip()
    return found
