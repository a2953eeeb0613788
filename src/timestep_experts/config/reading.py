"""Recipes from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from timestep_experts.config.problems import explain_all
from timestep_experts.config.recipe import Recipe
from timestep_experts.errors import UserError
from timestep_experts.formats.yaml_text import parse_yaml, read_yaml

MOST_PROBLEMS = 20


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides (dotted keys, YAML values).

    Raises:
        UserError: every problem with its path, and the nearest valid key where one is unknown.
    """
    if not path.is_file():
        raise UserError(f"no recipe at {path}")
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise UserError(f"{path} should hold a mapping of keys to values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"an override reads key=value; got {override!r}")
        _set(document, key.split("."), parse_yaml(value, f"override {override!r}"), override)
    return parse_recipe(document)


def parse_recipe(document: Mapping[str, Any]) -> Recipe:
    """Validate a document with all its variants.

    Raises:
        UserError: every problem with its path.
    """
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        problems = explain_all(error, "recipe", Recipe)
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise UserError("\n".join([*problems[:MOST_PROBLEMS], *more])) from error


def _set(document: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    node: Any = document
    for depth, key in enumerate(keys):
        place: str | int = key
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise UserError(f"override {override!r}: {key!r} is no index of a list of {len(node)}")
            place = int(key)
        elif not isinstance(node, dict):
            raise UserError(f"override {override!r}: {keys[depth - 1]!r} holds a value, not further keys")
        if depth == len(keys) - 1:
            node[place] = value
        elif isinstance(node, dict):
            node = node.setdefault(key, {})
        else:
            node = node[int(key)]
