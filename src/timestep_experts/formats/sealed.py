"""Files of a run that carry a hash of what they hold, so that nobody trains on a flipped bit or an edit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from timestep_experts.formats.atomic import write_json, write_tensors
from timestep_experts.formats.checkpoints import bytes_of

SEAL = "sha256"
"""The key of the hash, in a file's metadata or its JSON."""


class DamagedError(Exception):
    """A file of a run is not what was written: truncated, changed, or unreadable. Says which and how."""


def write_sealed_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """`write_tensors` with a hash of names, types, shapes and values in the file's metadata."""
    placed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, placed, {SEAL: hash_tensors(placed)})


def read_sealed_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_sealed_tensors` wrote.

    Raises:
        DamagedError: it is not.
    """
    try:
        with safe_open(path, "pt") as opened:
            seal = (opened.metadata() or {}).get(SEAL)
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if seal != hash_tensors(tensors):
        raise DamagedError(f"{path} does not hold what was written: its hash differs")
    return tensors


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json` with a hash of the document in it."""
    plain = json.loads(json.dumps(value))
    write_json(path, {**plain, SEAL: _hash_json(plain)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `write_sealed_json` wrote.

    Raises:
        DamagedError: it is not.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        seal = document.pop(SEAL)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read: {error!r}") from error
    if seal != _hash_json(document):
        raise DamagedError(f"{path} does not hold what was written: its hash differs")
    return dict(document)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def _hash_json(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
