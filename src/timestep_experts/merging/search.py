"""Search for the weights of a merge: few evaluations of a smooth loss, none of them lost.

An objective maps N weights to a loss. Every search hands its points to a `History`, which counts and remembers them.
What is found is the best point that was evaluated, never a promise of a fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from timestep_experts.errors import UserError

Weights: TypeAlias = tuple[float, ...]
Objective: TypeAlias = Callable[[Weights], float]

_MAX_SWEEPS = 1000
_POOR_STEP, _GOOD_STEP = 0.25, 0.75


@dataclass(frozen=True)
class Evaluated:
    """A point that was measured.

    Args:
        weights: N numbers.
        loss: there; may be infinite or NaN.
        why: what asked for it: ``lattice``, ``minimiser``, ``grid``, ``cma`` and the like.
    """

    weights: Weights
    loss: float
    why: str


class History:
    """An objective that counts and remembers; asked for the same weights again, it answers from memory.

    Args:
        objective: measured once per point.
        on_evaluated: told of every new point.

    Attributes:
        evaluated: every measured point, in order.
    """

    def __init__(self, objective: Objective, on_evaluated: Callable[[Evaluated], object] | None = None) -> None:
        self.evaluated: list[Evaluated] = []
        self._objective = objective
        self._on_evaluated = on_evaluated
        self._known: dict[Weights, float] = {}

    def __call__(self, weights: Sequence[float], why: str) -> float:
        """The loss at these weights."""
        point = tuple(float(weight) + 0.0 for weight in weights)  # -0.0 is 0.0
        if point not in self._known:
            self._known[point] = self._objective(point)
            self.evaluated.append(Evaluated(point, self._known[point], why))
            if self._on_evaluated is not None:
                self._on_evaluated(self.evaluated[-1])
        return self._known[point]

    @property
    def best(self) -> Evaluated:
        """The point of least loss, the first of equals.

        Raises:
            UserError: no loss was finite.
        """
        finite = self.finite
        if not finite:
            raise UserError(f"none of the {len(self.evaluated)} evaluated weights has a finite loss")
        return min(finite, key=lambda point: point.loss)

    @property
    def finite(self) -> list[Evaluated]:
        """The points whose loss is a number."""
        return [point for point in self.evaluated if math.isfinite(point.loss)]


@dataclass(frozen=True)
class Quadratic:
    """``m(w) = c + g . w + w . H w / 2`` with c a number, g ``(N,)`` and H ``(N, N)`` symmetric, fp64."""

    constant: float
    gradient: Tensor
    hessian: Tensor

    def __call__(self, weights: Sequence[float]) -> float:
        """Its value at N weights."""
        w = torch.tensor(weights, dtype=torch.double)
        return float(self.constant + self.gradient @ w + w @ self.hessian @ w / 2)


def num_coefficients(num_weights: int) -> int:
    """How many numbers a quadratic in N variables has, and evaluations it takes: ``1 + N + N (N + 1) / 2``."""
    return 1 + num_weights + num_weights * (num_weights + 1) // 2


def lattice(num_weights: int, reach: float = 1.0) -> list[Weights]:
    """Points that decide a quadratic in N variables, exactly as many as it has numbers.

    The corners of a simplex, 0 (the base) and ``reach * e_i`` (at reach 1: each expert), and the middles of its edges.
    """
    corners = torch.cat([torch.zeros(1, num_weights), reach * torch.eye(num_weights)]).double()
    pairs = itertools.combinations(range(num_weights + 1), 2)
    points = [*corners, *((corners[i] + corners[j]) / 2 for i, j in pairs)]
    return [tuple(point.tolist()) for point in points]


def grid(num_weights: int, values: Sequence[float]) -> Iterator[Weights]:
    """Every combination of some values: ``len(values) ** N`` points."""
    return itertools.product(values, repeat=num_weights)


def fit_quadratic(
    points: Sequence[Weights], losses: Sequence[float], importance: Sequence[float] | None = None
) -> Quadratic:
    """The least-squares quadratic through points, ``min sum_k a_k (m(w_k) - L_k)^2``; the smallest of several.

    Args:
        points: M of N weights.
        losses: M finite numbers.
        importance: a_k, M positive numbers; ``None``: all 1.
    """
    w = torch.tensor(points, dtype=torch.double)
    rows, columns = torch.triu_indices(w.shape[1], w.shape[1])
    squares = w[:, rows] * w[:, columns] * torch.where(rows == columns, 0.5, 1.0)
    design = torch.cat([torch.ones(len(w), 1), w, squares], 1)
    scale = torch.tensor(importance or [1.0] * len(w), dtype=torch.double).sqrt()[:, None]
    target = torch.tensor(losses, dtype=torch.double)[:, None]
    solved = torch.linalg.lstsq(design * scale, target * scale, driver="gelsd").solution[:, 0]
    hessian = torch.zeros(w.shape[1], w.shape[1], dtype=torch.double)
    hessian[rows, columns] = hessian[columns, rows] = solved[1 + w.shape[1] :]
    return Quadratic(solved[0].item(), solved[1 : 1 + w.shape[1]], hessian)


def minimise_in_box(model: Quadratic, low: Tensor, high: Tensor, starts: Sequence[Weights] = ()) -> Weights:
    """Where a quadratic is least within ``low <= w <= high``, fp64.

    Inside the box that is ``-H^-1 g``. Otherwise coordinates are minimised one after another, from the middle of the
    box and from ``starts``, until none moves: exact where H is positive definite, else the best of several descents.
    """
    positive, failed = torch.linalg.cholesky_ex(model.hessian)
    if not failed:
        inner = torch.cholesky_solve(-model.gradient[:, None], positive)[:, 0]
        if bool(((low <= inner) & (inner <= high)).all()):
            return tuple(inner.tolist())
    middles = [(low + high) / 2, *(torch.tensor(start, dtype=torch.double).clamp(low, high) for start in starts)]
    found = [_descend(model, middle, low, high) for middle in middles]
    return min(found, key=model)


def _descend(model: Quadratic, start: Tensor, low: Tensor, high: Tensor) -> Weights:
    w = start.clone()
    for _ in range(_MAX_SWEEPS):
        before = w.clone()
        for i in range(len(w)):
            slope = float(model.gradient[i] + model.hessian[i] @ w - model.hessian[i, i] * w[i])
            curve = float(model.hessian[i, i])
            ends = [float(low[i]), float(high[i])]
            inner = [min(max(-slope / curve, ends[0]), ends[1])] if curve > 0 else ends
            w[i] = min(inner, key=lambda x, s=slope, c=curve: s * x + c * x * x / 2)  # type: ignore[misc]
        if bool((w - before).abs().max() <= 1e-12):
            break
    return tuple(w.tolist())


@dataclass(frozen=True)
class QuadraticSettings:
    """How `search_quadratic` goes on.

    Args:
        low: least weight, at most 0.
        high: largest weight, above 0.
        reach: how far from the base the first points lie; see `lattice`.
        refinements: at most so many evaluations after the lattice.
        tolerance: stop where the fit was wrong by less than this share of the loss found, or promises less than that.

    Raises:
        UserError: a value is outside what is said here.
    """

    low: float = -1.0
    high: float = 2.0
    reach: float = 1.0
    refinements: int = 10
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= 0 < self.high):
            raise UserError(f"bounds of weights must hold 0, and more than it; got {self.low} to {self.high}")
        if not 0 < self.reach <= self.high:
            raise UserError(f"reach must be above 0 and within the bounds, up to {self.high}; got {self.reach}")
        if self.refinements < 1:
            raise UserError(f"refinements must be at least 1; got {self.refinements}")


def search_quadratic(history: History, num_weights: int, settings: QuadraticSettings) -> Quadratic:
    """Fit a quadratic, go to its minimiser, and fit again with what was seen there, in a trust region.

    An exactly quadratic objective takes `num_coefficients` evaluations and one to confirm. The region, a cube around
    the best point, begins as the bounds; it halves after a step that gave less than a quarter of what the fit promised,
    and doubles after one that gave three quarters.

    Returns:
        The last fit; what is found is ``history.best``.

    Raises:
        UserError: no loss was finite.
    """
    for point in lattice(num_weights, settings.reach):
        history(point, "lattice")
    model = fit_around(history.finite, math.inf)
    radius = math.inf
    for _ in range(settings.refinements):
        best = history.best
        centre = torch.tensor(best.weights, dtype=torch.double)
        low, high = (centre - radius).clamp(min=settings.low), (centre + radius).clamp(max=settings.high)
        point = minimise_in_box(model, low, high, [best.weights])
        enough = settings.tolerance * abs(best.loss)
        promised, num_before = best.loss - model(point), len(history.evaluated)
        loss = history(point, "minimiser")
        if len(history.evaluated) == num_before or promised < enough or abs(loss - model(point)) < enough:
            break
        step = float((torch.tensor(point, dtype=torch.double) - centre).abs().max())
        share = (best.loss - loss) / promised if math.isfinite(loss) else -1.0
        if share < _POOR_STEP:
            radius = step / 2
        elif share > _GOOD_STEP:
            radius = 2 * max(step, min(radius, settings.high - settings.low))
        model = fit_around(history.finite, step)
    return model


def fit_around(points: Sequence[Evaluated], radius: float) -> Quadratic:
    """`fit_quadratic` with importance ``1 / (1 + (d_k / radius)^2)^2`` at distance d_k from the best point."""
    if not points:
        raise UserError("no evaluated weights have a finite loss: there is nothing to fit")
    best = min(points, key=lambda point: point.loss)
    distances = [math.dist(point.weights, best.weights) for point in points]
    importance = [1 / (1 + (distance / max(radius, 1e-6)) ** 2) ** 2 for distance in distances]
    return fit_quadratic([point.weights for point in points], [point.loss for point in points], importance)
