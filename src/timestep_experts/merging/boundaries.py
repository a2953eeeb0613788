"""Where to cut the timesteps: intervals inside which gradients agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from timestep_experts.errors import UserError


@dataclass(frozen=True)
class Cut:
    """A way to cut K bins into n intervals.

    Args:
        edges: n + 1 ascending bin numbers from 0 to K; interval i holds the bins ``edges[i]`` to ``edges[i + 1] - 1``.
        cost: see `best_cuts`.
    """

    edges: tuple[int, ...]
    cost: float


def best_cuts(similarity: Tensor, max_intervals: int) -> list[Cut]:
    """The best cut of K bins into n intervals, for n = 1 .. max_intervals, by dynamic programming.

    An interval of bins a .. b-1 costs the sum over its bins of their mean dissimilarity to the interval,

        C(a, b) = sum_{i, j in [a, b)} (1 - S_ij) / (b - a)

    (kernel change points, arXiv 1202.3878, eq. 3 up to a constant), and the best cut has the least sum of costs:
    ``V(n, b) = min_a V(n - 1, a) + C(a, b)``.

    Args:
        similarity: S, ``(K, K)`` symmetric; cosines.
        max_intervals: at most K.

    Raises:
        UserError: the matrix is not square or not finite, or there are fewer bins than intervals.
    """
    num_bins = _check(similarity, max_intervals)
    cost = interval_costs(similarity)
    value = [torch.full((num_bins + 1,), torch.inf, dtype=torch.double) for _ in range(max_intervals + 1)]
    value[0][0] = 0.0
    came_from: list[Tensor] = [torch.zeros(num_bins + 1, dtype=torch.long)]
    for n in range(1, max_intervals + 1):
        value[n], last = (value[n - 1][:, None] + cost).min(0)
        came_from.append(last)
    return [_trace_back(came_from, n, num_bins, float(value[n][num_bins])) for n in range(1, max_intervals + 1)]


def interval_costs(similarity: Tensor) -> Tensor:
    """``C(a, b)`` of `best_cuts` for all edges, ``(K + 1, K + 1)`` fp64; infinite where b <= a."""
    num_bins = len(similarity)
    sums = torch.zeros(num_bins + 1, num_bins + 1, dtype=torch.double)
    sums[1:, 1:] = (1 - similarity.double()).cumsum(0).cumsum(1)
    corners = sums.diagonal()
    within = corners[None, :] - sums - sums.T + corners[:, None]
    edges = torch.arange(num_bins + 1)
    lengths = edges[None, :] - edges[:, None]
    return torch.where(lengths > 0, within / lengths.clamp(min=1), torch.inf)


def _trace_back(came_from: list[Tensor], n: int, num_bins: int, cost: float) -> Cut:
    edges = [num_bins]
    for k in range(n, 0, -1):
        edges.append(int(came_from[k][edges[-1]]))
    return Cut(tuple(reversed(edges)), cost)


def _check(similarity: Tensor, max_intervals: int) -> int:
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise UserError(f"a similarity matrix must be square; got {tuple(similarity.shape)}")
    if not similarity.isfinite().all():
        raise UserError("a similarity matrix must be finite; some gradients were zero, NaN or infinite")
    if not 1 <= max_intervals <= len(similarity):
        count = len(similarity)
        raise UserError(f"{count} bins can be cut into 1 to {count} intervals; got {max_intervals}")
    return len(similarity)
