"""The names in ``docs/notation.md`` are names of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "timestep_experts").rglob("*.py"))


def names_of_code() -> set[str]:
    """Every class, function, parameter and field, and ``Class.name`` of what a class has."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found |= {node.name, *(f"{node.name}.{name}" for name in members(node))}
            elif isinstance(node, ast.FunctionDef):
                found |= {node.name, *(argument.arg for argument in [*node.args.args, *node.args.kwonlyargs])}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def members(node: ast.ClassDef) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef):
            yield child.name
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            yield child.target.id
        elif isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id == "self":
            yield child.attr


def names_of_the_table(text: str) -> list[str]:
    """The names in the second column of the first table: what stands in backticks, up to a shape or a call."""
    rows = [line.split(" | ") for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")]
    assert rows[0][:2] == ["| symbol", "name in code"]
    names: list[str] = []
    for row in rows[1:]:
        owner = ""
        for quoted in re.findall(r"`([^`]+)`", row[1]):
            name = re.split(r"[ (]", quoted)[0]
            name = owner + name if name.startswith(".") else name
            owner = name.rpartition(".")[0]
            names.append(name)
    return [name for name in names if name != "len"]


TEXT = (ROOT / "docs" / "notation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", names_of_the_table(TEXT))
def test_a_name_of_the_table_is_one_of_the_code(name: str) -> None:
    assert name in names_of_code()


def test_the_table_is_read_and_a_wrong_name_would_be_seen() -> None:
    rows = (
        "| symbol | name in code | unit |",
        "|---|---|---|",
        "| A | `ExpertStack.A (n, r, k)`, `.B` | |",
        "| x | `Nobody` | |",
    )
    table = "\n".join(rows)
    assert names_of_the_table(table) == ["ExpertStack.A", "ExpertStack.B", "Nobody"]
    assert {"ExpertStack.A", "ExpertStack.B"} <= names_of_code()
    assert "Nobody" not in names_of_code()
