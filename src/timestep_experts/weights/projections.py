"""Projections in a merge: weights and projections are merged apart from each other, then folded (DeMe, 3.3).

Folding each expert first and merging then would differ in second order, by products of one expert's change of a weight
with its change of the projection behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.formats.experts import PROJECTIONS, WEIGHTS, StoredProjections, read_projections
from timestep_experts.merging import MergeSettings, Place, fold, folded_layers, merge_tensor, unfold


@dataclass(frozen=True)
class ProjectionMerge:
    """The projections of all experts; an expert without them has identities.

    Args:
        places: where they sit.
        deltas: ``W - I`` of each expert by ``<module>.projection``.
        merged: the same of the result; empty before `merge_projections`.
    """

    places: tuple[Place, ...]
    deltas: tuple[Mapping[str, Tensor], ...]
    merged: Mapping[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the projections, by which ``block_weights`` may choose them."""
        return tuple(sorted({name for deltas in self.deltas for name in deltas}))

    @property
    def kept(self) -> StoredProjections | None:
        """Those of the result that no layer takes in."""
        places = tuple(place for place in self.places if not place.folds_into)
        if not places:
            return None
        return StoredProjections(places, {place.name: self.merged[place.name] for place in places})

    def described(self) -> dict[str, str]:
        """Where each projection of the result went, by its name, for the record of a merge."""
        return {p.name: ", ".join(p.folds_into) or PROJECTIONS for p in self.places}

    def projection_of(self, tensor: str) -> str | None:
        """The projection behind a layer's weight or bias, if it folds into it."""
        layer, _, kind = tensor.rpartition(".")
        return folded_layers(list(self.places)).get(layer) if kind in ("weight", "bias") else None

    def unfolded(self, index: int, name: str, tensor: Tensor) -> Tensor:
        """An expert's tensor without the projection that was folded into it, in fp64."""
        projection = self.projection_of(name)
        if projection is None or projection not in self.deltas[index]:
            return tensor.double() if projection is not None else tensor
        return unfold(tensor, self.deltas[index][projection])

    def folded(self, name: str, tensor: Tensor) -> Tensor:
        """A merged tensor with the merged projection in it."""
        projection = self.projection_of(name)
        return tensor if projection is None else fold(tensor, self.merged[projection])

    def merge_projections(
        self, weights: Mapping[str, tuple[float, ...]], settings: MergeSettings, keys: Sequence[str]
    ) -> ProjectionMerge:
        """The same with the result's projections; their base is the identity.

        Args:
            weights: of every projection, one number per expert.
            settings: of the merge.
            keys: what identifies each expert; sums are in their order.
        """
        merged = {}
        for name in self.names:
            first = next(deltas[name] for deltas in self.deltas if name in deltas)
            zero = torch.zeros_like(first)
            rows = zip(keys, (deltas.get(name, zero) for deltas in self.deltas), weights[name], strict=True)
            ordered = sorted(rows, key=lambda row: (row[0], row[2]))
            tensors, own = (tensor for _, tensor, _ in ordered), [weight for _, _, weight in ordered]
            merged[name] = merge_tensor(name, zero, tensors, own, settings, [key for key, _, _ in ordered])
        return ProjectionMerge(self.places, self.deltas, merged)


def read_projection_merge(base: Path, experts: Sequence[Path], *, has_folder: bool) -> ProjectionMerge | None:
    """The projections of experts; ``None`` if none has any.

    Args:
        base: where its weights are.
        experts: where theirs are: folders, or files in such folders.
        has_folder: whether the result is a folder, which can hold projections beside its weights.

    Raises:
        UserError: the base has projections; they sit at different places; or some fold nowhere, and the result would
            be a single file.
    """
    if (base / PROJECTIONS).is_file():
        raise UserError(f"{base / PROJECTIONS}: a base with projections beside its weights cannot be merged into")
    stored = [_read(expert) for expert in experts]
    found = [item for item in stored if item is not None]
    if not found:
        return None
    if any(item.places != found[0].places for item in found):
        raise UserError("the experts have projections at different places, so they cannot be merged apart")
    if found[0].kept and not has_folder:
        names = ", ".join(place.module for place in found[0].kept)
        raise UserError(
            f"the projections behind {names} fold into no layer and stay beside the weights, so the base and the"
            " output must be folders, not single files"
        )
    return ProjectionMerge(found[0].places, tuple({} if item is None else item.deltas for item in stored), {})


def _read(place: Path) -> StoredProjections | None:
    if place.is_file():
        return read_projections(place.parent) if place.name == WEIGHTS else None
    return read_projections(place)
