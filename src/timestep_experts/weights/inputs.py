"""Checkpoints that a merge reads: their hashes, where they come from, and that their numbers are finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from timestep_experts.errors import UserError
from timestep_experts.formats import portable
from timestep_experts.formats.checkpoints import Checkpoint, file_sha256, weights_sha256
from timestep_experts.formats.experts import BASE_KEY

_NUM_SHOWN = 3


@dataclass(frozen=True)
class MergeInput:
    """A model to read, and who it is.

    Args:
        weights: its tensors.
        files: SHA-256 of each file, by name.
    """

    weights: Checkpoint
    files: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """One hash for all files."""
        return weights_sha256(self.files)

    def described(self) -> dict[str, Any]:
        """For a record."""
        return {"path": portable(self.weights.path), "sha256": self.sha256, "files": dict(self.files)}


def hash_inputs(checkpoints: Sequence[Checkpoint]) -> list[MergeInput]:
    """Hash every file, with a bar."""
    files = [file for checkpoint in checkpoints for file in checkpoint.files]
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, leave=False) as bar:
        return [MergeInput(c, {file.name: file_sha256(file, bar.update) for file in c.files}) for c in checkpoints]


def check_descent(base_sha256: str, base: str, experts: Sequence[MergeInput]) -> None:
    """Refuse experts whose metadata names another base.

    Args:
        base_sha256: the base's hash.
        base: where it is, for the error.
        experts: those without `BASE_KEY` are not checked.

    Raises:
        UserError: one was trained from another base.
    """
    for expert in experts:
        claimed = expert.weights.metadata.get(BASE_KEY)
        if claimed is not None and claimed != base_sha256:
            raise UserError(
                f"{expert.weights.path} was trained from another base: its metadata names {BASE_KEY} {claimed},"
                f" but {base} has {base_sha256}"
            )


def finite_tensor(source: MergeInput, name: str) -> Tensor:
    """Load one tensor.

    Raises:
        UserError: it is unreadable or not finite.
    """
    tensor = source.weights.get(name)
    if tensor.is_floating_point() and not is_finite(tensor):
        count = int((~tensor.isfinite()).sum())
        file = source.weights.tensors[name].file
        raise UserError(f"{file}: {name} is not finite: {count} of {tensor.numel()} numbers are NaN or infinite")
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; in one pass, NaN being passed on to both ends."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    shown = sorted(names)
    rest = len(shown) - _NUM_SHOWN
    return ", ".join(shown[:_NUM_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
