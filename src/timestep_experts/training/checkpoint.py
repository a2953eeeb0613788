"""Checkpoints: complete, atomic, and taken up again by the same command.

Random numbers and data positions are functions of (seed, stage, step), so the step is all there is to know of them.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import atomic_path
from timestep_experts.formats.sealed import (
    DamagedError,
    read_sealed_json,
    read_sealed_tensors,
    write_sealed_json,
    write_sealed_tensors,
)

_STATE, _EXPERTS, _OPTIMISER = "state.json", "experts.safetensors", "optimizer.safetensors"
_KIND = "tensor class"


def save_checkpoint(
    folder: Path,
    step: int,
    experts: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    fingerprint: Mapping[str, Any],
    total_limit: int | None,
) -> None:
    """Write ``checkpoint-<step>`` and delete the oldest beyond the limit.

    Args:
        folder: of the stage.
        step: optimiser steps done.
        experts: `Mixture.state_dict`.
        optimiser: its state is stored too.
        fingerprint: what the run is; a later run must say the same to resume.
        total_limit: how many checkpoints to keep, ``None`` for all.
    """
    tensors, numbers = flatten_optimiser_state(optimiser)
    with atomic_path(folder / f"checkpoint-{step}") as draft:
        draft.mkdir()
        write_sealed_tensors(draft / _EXPERTS, experts)
        write_sealed_tensors(draft / _OPTIMISER, tensors)
        write_sealed_json(draft / _STATE, {"step": step, "optimizer": numbers, "fingerprint": dict(fingerprint)})
    if total_limit is not None:
        for old in find_checkpoints(folder)[:-total_limit]:
            shutil.rmtree(old)


def load_latest_checkpoint(
    folder: Path, optimiser: torch.optim.Optimizer, fingerprint: Mapping[str, Any]
) -> tuple[int, dict[str, Tensor]] | None:
    """Restore the optimiser from the newest sound checkpoint. Damaged ones are set aside, with a warning.

    Returns:
        Its step and experts, or ``None`` if there is no checkpoint.

    Raises:
        UserError: the checkpoint belongs to another run; names what differs.
    """
    for checkpoint in reversed(find_checkpoints(folder)):
        try:
            state = read_sealed_json(checkpoint / _STATE)
            experts, moments = (read_sealed_tensors(checkpoint / name) for name in (_EXPERTS, _OPTIMISER))
        except DamagedError as error:
            set_aside(checkpoint, error)
            continue
        require_same_fingerprint(state["fingerprint"], fingerprint, folder)
        unflatten_optimiser_state(optimiser, moments, state["optimizer"])
        return state["step"], experts
    return None


def set_aside(path: Path, reason: DamagedError) -> None:
    """Rename a damaged file or folder of a run, so that it is neither used nor lost, and warn of it."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in count())
    kept = next(name for name in names if not name.exists())
    path.replace(kept)
    warnings.warn(f"{reason}. It was renamed to {kept.name} and is not used", stacklevel=2)


def find_checkpoints(folder: Path) -> list[Path]:
    """The folders ``checkpoint-<step>`` of a stage, oldest first; anything of another name is let be."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def find_states(folder: Path) -> list[Path]:
    """The documents of a stage's checkpoints, oldest first; each holds the run's ``fingerprint``."""
    return [checkpoint / _STATE for checkpoint in find_checkpoints(folder)]


def require_same_fingerprint(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to mix two runs in one folder.

    Raises:
        UserError: naming every setting that differs.
    """
    different = list(_differences("", stored, json.loads(json.dumps(wanted))))
    if different:
        raise UserError(
            f"{folder} holds a run with other settings; choose another output_dir or delete that folder:"
            + "".join(different)
        )


def _differences(path: str, stored: Any, wanted: Any) -> Iterator[str]:
    """One line for every single value that differs between two documents."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*stored, *wanted}):
            yield from _differences(f"{path}.{key}".lstrip("."), stored.get(key), wanted.get(key))
    elif isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        for index, pair in enumerate(zip(stored, wanted, strict=True)):
            yield from _differences(f"{path}.{index}", *pair)
    elif stored != wanted:
        yield f"\n  {path}: stored {stored!r}, now {wanted!r}"


def flatten_optimiser_state(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors and plain numbers, both named ``<parameter>.<entry>[.<part>]``.

    bitsandbytes puts quantised entries into a mapping of their own, torchao into tensors made of tensors: these are
    taken apart.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    _take_apart("", optimiser.state_dict()["state"], tensors, numbers)
    return tensors, numbers


def _take_apart(path: str, value: Any, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for name, part in value.items():
            _take_apart(f"{path}.{name}".lstrip("."), part, tensors, numbers)
    elif hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        numbers[f"{path}.{_KIND}"] = [type(value).__name__, *(_to_json(item) for item in context)]
        for name in names:
            tensors[f"{path}.{name}"] = getattr(value, name)
    elif isinstance(value, Tensor):
        # all parameters of an optimiser of bitsandbytes share one table, which safetensors would refuse to write
        tensors[path] = value.clone() if path.rpartition(".")[2].startswith("qmap") else value
    else:
        numbers[path] = value


def unflatten_optimiser_state(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Load what `flatten_optimiser_state` returned; parameter groups keep their present settings."""
    tree: dict[str, Any] = {}
    for key, value in {**tensors, **numbers}.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    state = {int(index): _put_together(entries) for index, entries in tree.items()}
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _put_together(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return {name: _put_together(part) for name, part in value.items()}
    name, *context = value.pop(_KIND)
    from torchao.optim import subclass_4bit, subclass_8bit, subclass_fp8

    modules = (subclass_4bit, subclass_8bit, subclass_fp8)
    kind: Any = next(getattr(module, name) for module in modules if hasattr(module, name))
    return kind.__tensor_unflatten__(value, [_from_json(item) for item in context])


def _to_json(item: Any) -> Any:
    """A flag, a shape or a dtype as JSON can hold it."""
    return str(item) if isinstance(item, torch.dtype) else list(item) if isinstance(item, torch.Size) else item


def _from_json(item: Any) -> Any:
    if isinstance(item, str):
        return getattr(torch, item.removeprefix("torch."))
    return torch.Size(item) if isinstance(item, list) else item
