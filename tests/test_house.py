"""The house rules of the source tree, read from the code: import direction, docstrings, light import, leftovers.

A checker takes the package's folder and returns one line per breach. Each is also shown to catch a small bad tree.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "timestep_experts"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

# A room imports itself and rooms of earlier rows. `build` turns a recipe into objects, so `config` stands before it.
ORDER = (
    ("errors",),
    ("intervals", "world"),
    ("mixture", "merging", "objectives"),
    ("formats",),
    ("models",),
    ("data",),
    ("training", "inference"),
    ("evaluation",),
    ("report",),
    ("weights",),
    ("config",),
    ("build",),
    ("jobs",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
TORCH_ONLY = ("errors", "intervals", "mixture", "merging", "objectives")
IMPORTERS = {
    "typer": ("cli",),
    f"{PACKAGE}.config": ("build", "jobs", "cli"),
    f"{PACKAGE}.build": ("jobs", "cli"),
    f"{PACKAGE}.jobs": ("cli",),
    f"{PACKAGE}.cli": ("__main__",),
}

MAX_IMPORT_SECONDS = 1.0
HEAVY = ("datasets", "diffusers", "matplotlib", "transformers")
UNSAFE = ("pickle", "torch.load", "torch.save")

Checker = Callable[[Path], list[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file: its dotted module name, its room (empty for the package's own ``__init__``), text and syntax tree."""

    path: str
    module: str
    room: str
    is_package: bool
    text: str
    tree: ast.Module


@cache
def read_sources(root: Path) -> tuple[Source, ...]:
    sources = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        is_package = path.stem == "__init__"
        parts = path.parent.parts if is_package else path.with_suffix("").parts
        text = file.read_text(encoding="utf-8")
        module = ".".join((PACKAGE, *parts))
        sources.append(Source(str(path), module, parts[0] if parts else "", is_package, text, ast.parse(text)))
    return tuple(sources)


def imported_names(source: Source) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import, lazy ones and those for the type checker included."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = source.module.split(".")
            parent = parent[: len(parent) - node.level + source.is_package] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def is_under(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def public_definitions(body: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public classes, functions and methods; a property's getter speaks for its setter."""
    for node in ast.iter_child_nodes(body):
        if isinstance(node, ast.If | ast.Try):
            yield from public_definitions(node, prefix)
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if any(decorator.endswith(("overload", ".setter", ".deleter")) for decorator in decorators):
            continue
        yield f"{prefix}{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node, f"{prefix}{node.name}.")


def unplaced_rooms(root: Path) -> list[str]:
    rooms = {source.room: source.path for source in read_sources(root) if source.room}
    return [
        f"{path}: place {room!r} in ORDER of tests/test_house.py, after all that it imports"
        for room, path in rooms.items()
        if room not in LEVEL
    ]


def imports_against_the_order(root: Path) -> list[str]:
    problems = []
    for source in read_sources(root):
        for line, name in imported_names(source):
            room = name.split(".")[1] if is_under(name, PACKAGE) and name != PACKAGE else ""
            if not is_under(name, PACKAGE) or name == f"{PACKAGE}.__version__" or room == source.room:
                continue
            if room not in LEVEL:
                problems.append(f"{source.path}:{line}: import {name} from the module that defines it")
            elif source.room in LEVEL and LEVEL[room] >= LEVEL[source.room]:
                problems.append(f"{source.path}:{line}: {source.room!r} imports {name}, which is no earlier room")
    return problems


def foreign_imports(root: Path) -> list[str]:
    allowed = {"torch", PACKAGE, *sys.stdlib_module_names}
    return [
        f"{source.path}:{line}: {source.room!r} may import torch and the standard library only, not {name}"
        for source in read_sources(root)
        if source.room in TORCH_ONLY
        for line, name in imported_names(source)
        if name.split(".")[0] not in allowed
    ]


def imports_by_strangers(root: Path) -> list[str]:
    return [
        f"{source.path}:{line}: {target} is imported by {' and '.join(importers) or 'nothing'} only"
        for source in read_sources(root)
        for line, name in imported_names(source)
        for target, importers in IMPORTERS.items()
        if is_under(name, target) and source.room not in importers and not is_under(source.module, target)
    ]


def import_cycles(root: Path) -> list[str]:
    modules = {source.module for source in read_sources(root)}
    graph = {
        source.module: {
            name if name in modules else name.rpartition(".")[0]
            for _, name in imported_names(source)
            if is_under(name, PACKAGE)
        }
        for source in read_sources(root)
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"import cycle: {' -> '.join(reversed(error.args[1]))}"]
    return []


def missing_docstrings(root: Path) -> list[str]:
    problems = []
    for source in read_sources(root):
        if any(part.startswith("_") for part in source.module.split(".")):
            continue
        if ast.get_docstring(source.tree) is None:
            problems.append(f"{source.path}:1: the module has no docstring")
        problems += [
            f"{source.path}:{node.lineno}: {name} has no docstring"
            for name, node in public_definitions(source.tree)
            if ast.get_docstring(node) is None
        ]
    return problems


def unfinished_work(root: Path) -> list[str]:
    return [
        f"{source.path}:{number}: {found[0]} left behind"
        for source in read_sources(root)
        for number, line in enumerate(source.text.splitlines(), 1)
        if (found := re.search(r"\b(TODO|FIXME)\b", line))
    ]


def commented_debugging(root: Path) -> list[str]:
    pattern = re.compile(r"#+\s*(print\(|pprint\(|breakpoint\(|import i?pdb|i?pdb\.)")
    return [
        f"{source.path}:{token.start[0]}: debugging left in a comment: {token.string}"
        for source in read_sources(root)
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline)
        if token.type == tokenize.COMMENT and pattern.match(token.string)
    ]


def unsafe_serialisation(root: Path) -> list[str]:
    problems = []
    for source in read_sources(root):
        attributes = [(n.lineno, ast.unparse(n)) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)]
        problems += [
            f"{source.path}:{line}: {name} runs code from a file; use safetensors or JSON"
            for line, name in [*imported_names(source), *attributes]
            if any(is_under(name, unsafe) for unsafe in UNSAFE)
        ]
    return problems


def measure_import(folder: Path, *, after: str = "torch", module: str = PACKAGE) -> tuple[float, list[str]]:
    """Seconds it takes to import a module from ``folder`` once ``after`` is loaded, and the heavy modules loaded."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(folder)!r}); import {after}; start = time.perf_counter();"
        f" import {module}; print(time.perf_counter() - start, *set({HEAVY!r}).intersection(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    seconds, *heavy = result.stdout.split()
    return float(seconds), sorted(heavy)


@pytest.fixture(scope="module")
def import_cost() -> tuple[float, list[str]]:
    return measure_import(SOURCE.parent)


# Checker, a tree that it must object to (path: text), what it must say.
BREACHES: list[tuple[Checker, dict[str, str], str]] = [
    (unplaced_rooms, {"cellar.py": ""}, "cellar.py: place 'cellar' in ORDER"),
    (unplaced_rooms, {"cellar/shelf.py": ""}, "cellar/shelf.py: place 'cellar' in ORDER"),
    (imports_against_the_order, {"intervals.py": f"from {PACKAGE} import mixture"}, "intervals.py:1: 'intervals'"),
    (imports_against_the_order, {"models/a.py": f"import {PACKAGE}.data.b"}, f"'models' imports {PACKAGE}.data.b"),
    (imports_against_the_order, {"mixture/a.py": "from ..models.b import c"}, f"imports {PACKAGE}.models.b.c"),
    (imports_against_the_order, {"mixture/__init__.py": "from ..report import b"}, f"imports {PACKAGE}.report.b"),
    (imports_against_the_order, {"models/a.py": f"def f():\n    import {PACKAGE}.report"}, "models/a.py:2:"),
    (imports_against_the_order, {"report/a.py": f"from {PACKAGE} import Mixture"}, "the module that defines it"),
    (foreign_imports, {"mixture/a.py": "import numpy as np"}, "mixture/a.py:1: 'mixture' may import torch"),
    (foreign_imports, {"objectives/a.py": "from diffusers.models import b"}, "not diffusers.models.b"),
    (imports_by_strangers, {"report/a.py": "import typer"}, "report/a.py:1: typer is imported by cli only"),
    (imports_by_strangers, {"__init__.py": "from .cli import main"}, f"{PACKAGE}.cli is imported by __main__ only"),
    (imports_by_strangers, {"config.py": "from . import build"}, f"{PACKAGE}.build is imported by jobs and cli only"),
    (imports_by_strangers, {"training/a.py": f"import {PACKAGE}.config"}, "is imported by build and jobs and cli only"),
    (import_cycles, {"data/a.py": "from . import b", "data/b.py": "from .a import c"}, ".data.b -> "),
    (import_cycles, {"data/__init__.py": "from .a import c", "data/a.py": f"from {PACKAGE}.data import d"}, ".data.a"),
    (missing_docstrings, {"a.py": "x = 1"}, "a.py:1: the module has no docstring"),
    (missing_docstrings, {"a.py": '"""A file."""\ndef f(): ...'}, "a.py:2: f has no docstring"),
    (missing_docstrings, {"a.py": '"""A file."""\nclass A: ...'}, "a.py:2: A has no docstring"),
    (
        missing_docstrings,
        {"a.py": '"""A file."""\nclass A:\n    """A."""\n    def f(self): ...'},
        "A.f has no docstring",
    ),
    (unfinished_work, {"a.py": "x = 1  # TODO: two"}, "a.py:1: TODO left behind"),
    (commented_debugging, {"a.py": "x = 1\n# print(x)"}, "a.py:2: debugging left in a comment"),
    (unsafe_serialisation, {"a.py": "import pickle"}, "a.py:1: pickle runs code"),
    (unsafe_serialisation, {"a.py": "from pickle import loads"}, "a.py:1: pickle.loads runs code"),
    (unsafe_serialisation, {"a.py": "from torch import load"}, "a.py:1: torch.load runs code"),
    (unsafe_serialisation, {"a.py": "import torch\ntorch.save({}, 'a')"}, "a.py:2: torch.save runs code"),
]
CHECKERS = tuple(dict.fromkeys(checker for checker, _, _ in BREACHES))
WELL_KEPT = {
    "__init__.py": f'"""The package."""\nfrom {PACKAGE}.mixture import Mixture\n__version__ = "1"',
    "intervals.py": '"""Intervals."""\nimport math\nimport torch',
    "mixture/__init__.py": '"""A room."""\nfrom .layer import Mixture',
    "mixture/layer.py": f'"""A file."""\nfrom {PACKAGE}.intervals import a\n\n\nclass Mixture:\n    """A class."""',
    "config.py": '"""Recipes."""\nimport pydantic',
    "build.py": f'"""Objects."""\nfrom {PACKAGE}.config import Recipe\nfrom {PACKAGE}.mixture.layer import Mixture',
    "cli.py": f'"""Commands."""\nimport typer\nfrom {PACKAGE} import __version__, build, config',
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("checker", CHECKERS)
def test_source_keeps_the_rule(checker: Checker) -> None:
    problems = checker(SOURCE)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("checker", CHECKERS)
def test_checker_accepts_a_well_kept_tree(checker: Checker, tmp_path: Path) -> None:
    assert checker(write_tree(tmp_path, WELL_KEPT)) == []


@pytest.mark.parametrize(("checker", "files", "message"), BREACHES)
def test_checker_catches_a_breach(checker: Checker, files: dict[str, str], message: str, tmp_path: Path) -> None:
    assert message in "\n".join(checker(write_tree(tmp_path, files)))


def test_source_is_found() -> None:
    assert (SOURCE / "intervals.py").is_file()


def test_import_is_fast(import_cost: tuple[float, list[str]]) -> None:
    seconds, _ = import_cost
    assert seconds < MAX_IMPORT_SECONDS, f"import {PACKAGE} took {seconds:.2f} s after torch"


def test_import_loads_no_heavy_library(import_cost: tuple[float, list[str]]) -> None:
    _, heavy = import_cost
    assert heavy == [], f"import {PACKAGE} loads {', '.join(heavy)}: import them where they are used"


def test_merging_loads_no_heavy_library() -> None:
    _, heavy = measure_import(SOURCE.parent, module=f"{PACKAGE}.cli, {PACKAGE}.weights.merge")
    assert heavy == [], f"merge would wait for {', '.join(heavy)}, which it does not need"


def test_measure_import_sees_time_and_heavy_libraries(tmp_path: Path) -> None:
    slow = {f"{PACKAGE}.py": "import time, datasets\ntime.sleep(0.2)", "datasets.py": ""}
    seconds, heavy = measure_import(write_tree(tmp_path, slow), after="json")
    assert seconds >= 0.2
    assert heavy == ["datasets"]
