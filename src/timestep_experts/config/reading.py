"""Recipes from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from timestep_experts.config.problems import explain_all
from timestep_experts.config.recipe import Recipe
from timestep_experts.errors import UserError


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides (dotted keys, YAML values).

    Raises:
        UserError: every problem with its path, and the nearest valid key where one is unknown.
    """
    if not path.is_file():
        raise UserError(f"no recipe at {path}")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} should hold a mapping of keys to values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"an override reads key=value; got {override!r}")
        try:
            _set(document, key.split("."), yaml.safe_load(value), override)
        except (yaml.YAMLError, IndexError) as error:
            raise UserError(f"override {override!r} cannot be applied: {error}") from error
    return parse_recipe(document)


def parse_recipe(document: Mapping[str, Any]) -> Recipe:
    """Validate a document with all its variants.

    Raises:
        UserError: every problem with its path.
    """
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise UserError("\n".join(explain_all(error, "recipe", Recipe))) from error


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
