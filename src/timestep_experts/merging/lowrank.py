"""Low-rank task vectors: their weighted sum as one of a smaller rank, by work on the factors alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timestep_experts.errors import UserError


@dataclass(frozen=True)
class LowRank:
    """A layer's update ``up @ down``, all scaling included.

    A grouped convolution has PEFT's form: A is ungrouped, and the rows of B in group g see the g-th share of the rank.

    Args:
        down: A, ``(r, k)`` with k = in * prod(kernel), flattened as PEFT keeps it.
        up: B, ``(out, r / groups)``.
        groups: of the layer.
    """

    down: Tensor
    up: Tensor
    groups: int = 1

    @property
    def rank(self) -> int:
        """The r of its factors."""
        return self.down.shape[0]

    def by_group(self) -> list[tuple[Tensor, Tensor]]:
        """Each group's A ``(r / groups, k)`` and B ``(out / groups, r / groups)``."""
        return list(zip(self.down.chunk(self.groups), self.up.chunk(self.groups), strict=True))

    def product(self) -> Tensor:
        """The update as a matrix ``(out, k)``; of a grouped convolution over all its inputs."""
        return torch.cat([up @ down for down, up in self.by_group()])


@dataclass(frozen=True)
class Truncated:
    """A low-rank update and how much of the exact one it is.

    Args:
        update: of the asked rank.
        energy: squared Frobenius norm of the exact update.
        kept: of that, the share that the truncated one has, in [0, 1]; 1 for an update of 0.
    """

    update: LowRank
    energy: float
    kept: float


def weighted_sum(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """``sum_i w_i B_i A_i`` exactly, its rank the sum of theirs: factors side by side, nothing is multiplied out.

    Args:
        parts: of one layer.
        weights: one each.

    Raises:
        UserError: the counts differ.
    """
    if len(parts) != len(weights):
        raise UserError(f"there are {len(weights)} weights for {len(parts)} low-rank updates")
    groups = parts[0].groups
    by_group = [part.by_group() for part in parts]
    downs = torch.cat([by_group[i][g][0] for g in range(groups) for i in range(len(parts))])
    ups = torch.cat([w * part.up for part, w in zip(parts, weights, strict=True)], 1)
    return LowRank(downs, ups, groups)


def truncate(update: LowRank, rank: int) -> Truncated:
    """The nearest update of a smaller rank in the Frobenius norm (Eckart-Young), of a grouped layer group by group.

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, the singular values of ``B A`` are those of the small ``R_B R_A^T``. The
    square roots of the singular values go to both factors. Where the exact rank is lower, the rest is 0. fp64 inside.

    Args:
        update: of rank R.
        rank: to keep, a multiple of the layer's groups.

    Raises:
        UserError: the rank is not allowed.
    """
    if rank < 1 or rank % update.groups:
        raise UserError(f"rank must be a positive multiple of the layer's {update.groups} group(s); got {rank}")
    halves = [_decompose(down, up) for down, up in update.by_group()]
    parts = [_cut(*half, rank // update.groups) for half in halves]
    energy = sum(float(values.square().sum()) for _, values, _ in halves)
    kept = sum(float(values[: rank // update.groups].square().sum()) for _, values, _ in halves)
    down, up = (torch.cat([part[i] for part in parts]).to(update.down.dtype) for i in (0, 1))
    return Truncated(LowRank(down, up, update.groups), energy, kept / energy if energy else 1.0)


def truncate_matrix(update: Tensor, rank: int, groups: int = 1) -> Truncated:
    """The nearest low-rank update of a layer's full one, as PEFT would keep it.

    Args:
        update: ``(out, in / groups, *kernel)``, the shape of the layer's weight.
        rank: to keep, a multiple of the layer's groups.
        groups: of the layer; A gets zeros for the inputs of other groups.

    Raises:
        UserError: the rank is not allowed.
    """
    if rank < 1 or rank % groups:
        raise UserError(f"rank must be a positive multiple of the layer's {groups} group(s); got {rank}")
    own = update.shape[1:].numel()
    downs, ups, energy, kept = [], [], 0.0, 0.0
    for g, part in enumerate(update.float().flatten(1).chunk(groups)):
        left, values, right = torch.linalg.svd(part, full_matrices=False)
        down, up = _cut(left, values, right, rank // groups)
        downs.append(torch.nn.functional.pad(down, (g * own, (groups - 1 - g) * own)))
        ups.append(up)
        energy += float(values.double().square().sum())
        kept += float(values[: rank // groups].double().square().sum())
    return Truncated(LowRank(torch.cat(downs), torch.cat(ups), groups), energy, kept / energy if energy else 1.0)


def _decompose(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of ``up @ down`` without that product."""
    left, core_left = torch.linalg.qr(up.double())
    right, core_right = torch.linalg.qr(down.double().T)
    inner_left, values, inner_right = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    return left @ inner_left, values, inner_right @ right.T


def _cut(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A ``(rank, k)`` and B ``(d, rank)`` of the largest singular values, filled up with zeros."""
    roots, lacking = values[:rank].sqrt(), max(0, rank - len(values))
    down = torch.nn.functional.pad(roots[:, None] * right[:rank], (0, 0, 0, lacking))
    return down, torch.nn.functional.pad(left[:, :rank] * roots, (0, lacking))
