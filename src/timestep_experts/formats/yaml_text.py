"""YAML 1.2 from people and strangers: ``no`` is a word, keys occur once, and aliases cannot fill the memory."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from timestep_experts.errors import UserError

MOST_BYTES = 2**20
MOST_VALUES = 100_000
"""Values of a document, counted as often as aliases repeat them."""


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document: mappings, lists, strings, numbers, booleans, dates and ``None``.

    Args:
        text: the document.
        where: what it is, for errors.

    Raises:
        UserError: it is not YAML 1.2, has a key twice, is nested too deeply, or is too large once aliases are written
            out.
    """
    try:
        value = YAML(typ="safe", pure=True).load(text)
        _count(value, {}, set())
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{where}: {error}") from None
        raise UserError(f"{where} is not YAML: {error}") from error
    return value


def read_yaml(path: Path) -> Any:
    """The value of a YAML file, see `parse_yaml`.

    Raises:
        UserError: see `parse_yaml`; or the file cannot be read, is not UTF-8, or is larger than `MOST_BYTES`.
    """
    try:
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than {MOST_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return parse_yaml(text, str(path))


def yaml_text(value: object) -> str:
    """A document in block style, keys in their own order."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = 120
    stream = StringIO()
    writer.dump(value, stream)
    return stream.getvalue()


def _count(value: Any, known: dict[int, int], is_open: set[int]) -> int:
    """The number of values in a value, with aliases written out."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) in known:
        return known[id(value)]
    if id(value) in is_open:
        raise UserError("an alias stands inside of what it repeats")
    is_open.add(id(value))
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
    known[id(value)] = 1 + sum(_count(part, known, is_open) for part in parts)
    is_open.discard(id(value))
    if known[id(value)] > MOST_VALUES:
        raise UserError(f"there are more than {MOST_VALUES:,} values, once aliases are written out")
    return known[id(value)]
