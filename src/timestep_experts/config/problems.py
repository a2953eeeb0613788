"""What is wrong with a recipe: one line per problem, with its path, the reason and the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from timestep_experts.config.methods import KINDS

_MOST_SHOWN = 200
_TYPES = ("int", "float", "str", "bool", "constrained-int", "constrained-float", "constrained-str")


def explain_all(error: ValidationError, where: str, root: type[BaseModel]) -> list[str]:
    """One line per problem.

    Args:
        error: of a validation.
        where: the path of what was validated.
        root: its schema.
    """
    problems = error.errors()
    parents = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    # A list only counts as too short because its items are wrong, which they say themselves.
    kept = [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in parents]
    # Of several allowed types, only what is wrong with a value of the right one is of interest.
    told = {_place(problem) for problem in kept if not _is_of_wrong_type(problem)}
    lines = [_explain(p, where, root) for p in kept if not (_is_of_wrong_type(p) and _place(p) in told)]
    return list(dict.fromkeys(lines))


def _is_of_wrong_type(problem: Mapping[str, Any]) -> bool:
    return str(problem["type"]).endswith("_type")


def _place(problem: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_keys(problem["loc"]))


def _explain(problem: Mapping[str, Any], where: str, root: type[BaseModel]) -> str:
    if problem["type"] == "variants":
        return str(problem["msg"])
    place = ".".join([where, *_keys(problem["loc"])])
    if problem["type"].startswith("union_tag"):
        got = problem["input"].get("kind") if isinstance(problem["input"], Mapping) else problem["input"]
        return f"{place}.kind: allowed are {', '.join(KINDS)} (got {got!r})"
    if problem["type"] != "extra_forbidden":
        is_section = isinstance(problem["input"], Mapping)  # its keys are at odds, and the message names them
        got = "" if is_section and problem["type"] == "value_error" else f" (got {_short(problem['input'])})"
        return f"{place}: {problem['msg'].removeprefix('Value error, ')}{got}"
    *parents, key = problem["loc"]
    near = difflib.get_close_matches(str(key), _keys_under(parents, root), 1)
    return f"{place}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")


def _short(value: object) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _keys(place: Sequence[str | int]) -> Iterator[str]:
    """The keys of a path as the recipe has them: pydantic writes kinds of methods and allowed types into it."""
    for index, part in enumerate(place):
        is_kind = index > 0 and place[index - 1] == "method" and part in KINDS
        is_type = isinstance(part, str) and ("[" in part or part in _TYPES)
        if not is_kind and not is_type:
            yield str(part)


def _keys_under(parents: Sequence[str | int], root: type[BaseModel]) -> list[str]:
    """The valid keys of the section to which a path of keys and list indices leads."""
    section = root
    for part in parents:
        field = section.model_fields.get(str(part))
        if str(part) in KINDS:
            section = KINDS[str(part)]
        elif field is not None:
            section = next(_models_of(field.annotation), section)
    return list(section.model_fields)


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The schemas that a type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_of(inner)
