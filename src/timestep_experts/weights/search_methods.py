"""The ways to search: settings as the command line gives them, and which searcher runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from timestep_experts.errors import UserError
from timestep_experts.merging import History, QuadraticSettings, grid, num_coefficients, search_quadratic

SearchMethod = Literal["quadratic", "grid", "cma"]
SearchObjective = Literal["mean", "ranges"]
_METHODS: tuple[SearchMethod, ...] = get_args(SearchMethod)
_OBJECTIVES: tuple[SearchObjective, ...] = get_args(SearchObjective)
_DIVERGED = 1e30
"""What CMA-ES is told instead of a loss that is no number."""


@dataclass(frozen=True)
class SearchSettings:
    """How weights are searched.

    Args:
        method: ``quadratic`` (a fit, its minimiser, refinements), ``grid`` (every combination) or ``cma`` (CMA-ES).
        objective: ``mean``: the mean loss over all t; ``ranges``: the mean over ranges of loss divided by the base's.
        quadratic: bounds of weights, for ``cma`` too; reach and refinements of the quadratic.
        grid_values: that every weight takes in a grid.
        budget: evaluations of ``cma``, at most.
        seed: of the halves of the validation set, and of ``cma``.

    Raises:
        UserError: a value is not allowed.
    """

    method: SearchMethod = "quadratic"
    objective: SearchObjective = "mean"
    quadratic: QuadraticSettings = field(default_factory=QuadraticSettings)
    grid_values: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    budget: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise UserError(f"the budget must be at least 1 evaluation; got {self.budget}")
        if not self.grid_values or not all(math.isfinite(value) for value in self.grid_values):
            raise UserError(f"a grid needs finite values; got {self.grid_values}")

    def num_evaluations(self, num_weights: int) -> int:
        """How many there will be at most, beside those of the rows of the table."""
        if self.method == "grid":
            return int(len(set(self.grid_values)) ** num_weights)
        if self.method == "cma":
            return self.budget
        return num_coefficients(num_weights) + self.quadratic.refinements


def make_search_settings(
    method: str,
    objective: str,
    quadratic: QuadraticSettings,
    grid_values: Sequence[float],
    budget: int,
    seed: int,
) -> SearchSettings:
    """`SearchSettings` from words.

    Raises:
        UserError: a word is unknown, or a value not allowed.
    """
    known_method = next((name for name in _METHODS if name == method), None)
    known_objective = next((name for name in _OBJECTIVES if name == objective), None)
    if known_method is None:
        raise UserError(f"unknown search method {method!r}: allowed are {', '.join(_METHODS)}")
    if known_objective is None:
        raise UserError(f"unknown objective {objective!r}: allowed are {', '.join(_OBJECTIVES)}")
    return SearchSettings(known_method, known_objective, quadratic, tuple(grid_values), budget, seed)


def run_method(history: History, start: Sequence[float], settings: SearchSettings) -> None:
    """Search; what is found is ``history.best``.

    Args:
        history: of the objective.
        start: where CMA-ES begins; as many numbers as there are weights.
        settings: method and limits.

    Raises:
        UserError: no loss was finite.
    """
    if settings.method == "quadratic":
        search_quadratic(history, len(start), settings.quadratic)
    elif settings.method == "grid":
        for point in grid(len(start), settings.grid_values):
            history(point, "grid")
    else:
        _search_cma(history, start, settings)


def _search_cma(history: History, start: Sequence[float], settings: SearchSettings) -> None:
    """Covariance matrix adaptation (Hansen, arXiv 1604.00772), by its author's library, until the budget is spent."""
    import cma  # takes a second to import

    bounds = [settings.quadratic.low, settings.quadratic.high]
    options = {"bounds": bounds, "seed": settings.seed + 1, "verbose": -9}  # seed 0 is the clock there
    strategy = cma.CMAEvolutionStrategy(list(start), 0.3 * settings.quadratic.reach, options)
    already = len(history.evaluated)
    while not strategy.stop():
        points = strategy.ask()
        left = settings.budget - (len(history.evaluated) - already)
        losses = [history([float(x) for x in point], "cma") for point in points[:left]]
        if len(losses) < len(points):
            break
        strategy.tell(points, [loss if math.isfinite(loss) else _DIVERGED for loss in losses])
