"""What a search for merge weights keeps to: evaluations, minimisers, and the cuts of a similarity matrix."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import max_error, normal
from timestep_experts.merging import (
    History,
    LiveMerge,
    Quadratic,
    QuadraticSettings,
    best_cuts,
    fit_quadratic,
    grid,
    lattice,
    merge_linear,
    minimise_in_box,
    num_coefficients,
    search_quadratic,
)
from timestep_experts.merging.boundaries import interval_costs


def bowl(num_weights: int, seed: int, centre: float = 0.4) -> tuple[Quadratic, list[float]]:
    """A convex quadratic and its minimiser, inside the default bounds."""
    root = normal(num_weights, num_weights, seed=seed, dtype=torch.double)
    hessian = root @ root.T + 0.1 * torch.eye(num_weights, dtype=torch.double)
    least = centre + 0.3 * normal(num_weights, seed=seed + 1, dtype=torch.double).clamp(-2, 2)
    return Quadratic(1.7, -hessian @ least, hessian), least.tolist()


@given(num_weights=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_a_quadratic_is_minimised_in_the_fewest_evaluations(num_weights: int, seed: int) -> None:
    objective, least = bowl(num_weights, seed)
    history = History(objective)
    search_quadratic(history, num_weights, QuadraticSettings())
    assert len(history.evaluated) == num_coefficients(num_weights) + 1 == 2 + num_weights * (num_weights + 3) // 2
    assert max(abs(a - b) for a, b in zip(history.best.weights, least, strict=True)) < 1e-6
    assert history.best.why == "minimiser"


@given(num_weights=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_a_fit_through_the_lattice_is_the_quadratic(num_weights: int, seed: int) -> None:
    objective, _ = bowl(num_weights, seed)
    points = lattice(num_weights)
    assert len(set(points)) == num_coefficients(num_weights)
    fitted = fit_quadratic(points, [objective(point) for point in points])
    assert max_error(fitted.hessian, objective.hessian) < 1e-9
    assert max_error(fitted.gradient, objective.gradient) < 1e-9
    assert abs(fitted.constant - objective.constant) < 1e-9


def test_the_lattice_holds_the_base_and_every_expert() -> None:
    points = lattice(3)
    assert {(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)} <= set(points)


@given(num_weights=st.integers(1, 3), seed=st.integers(0, 10_000), is_convex=st.booleans())
def test_the_minimiser_in_a_box_beats_a_fine_grid(num_weights: int, seed: int, is_convex: bool) -> None:
    model, _ = bowl(num_weights, seed, centre=1.1)
    if not is_convex:
        model = Quadratic(0.0, model.gradient, model.hessian - 2 * torch.eye(num_weights, dtype=torch.double))
    box = torch.zeros(num_weights, dtype=torch.double), torch.ones(num_weights, dtype=torch.double)
    corners = list(itertools.product((0.0, 1.0), repeat=num_weights))
    found = minimise_in_box(model, *box, corners)
    assert all(0 <= weight <= 1 for weight in found)
    best = min(model(point) for point in grid(num_weights, [i / 20 for i in range(21)]))
    assert model(found) <= best + 1e-9


@given(seed=st.integers(0, 10_000), refinements=st.integers(1, 8))
def test_what_is_found_is_never_worse_than_anything_evaluated(seed: int, refinements: int) -> None:
    objective, least = bowl(2, seed)

    def bumpy(weights: tuple[float, ...]) -> float:
        distance = math.dist(weights, least)
        return math.nan if distance > 2 else objective(weights) + 0.3 * math.sin(5 * distance) * distance

    history = History(bumpy)
    search_quadratic(history, 2, QuadraticSettings(refinements=refinements))
    assert len(history.evaluated) <= num_coefficients(2) + refinements
    assert history.best.loss == min(point.loss for point in history.finite)
    assert all(-1 <= weight <= 2 for point in history.evaluated for weight in point.weights)


def test_refinements_go_on_where_the_loss_is_not_quadratic() -> None:
    def valley(weights: tuple[float, ...]) -> float:
        a, b = weights
        return 1 + (a - 0.8) ** 4 + 0.5 * (b - 0.6 * a) ** 2 + 0.2 * (a - 0.8) ** 2

    history = History(valley)
    search_quadratic(history, 2, QuadraticSettings(refinements=12, tolerance=1e-8))
    assert math.dist(history.best.weights, (0.8, 0.48)) < 0.05
    assert min(p.loss for p in history.evaluated[:6]) > history.best.loss


def test_the_same_point_is_measured_once() -> None:
    asked = []
    history = History(lambda weights: asked.append(weights) or 1.0)
    assert [history(w, "x") for w in [(0.0, 1.0), (-0.0, 1), (0.5, 1.0)]] == [1.0] * 3
    assert asked == [(0.0, 1.0), (0.5, 1.0)]


def test_a_search_without_a_finite_loss_says_so() -> None:
    with pytest.raises(ValueError, match="no evaluated weights have a finite loss"):
        search_quadratic(History(lambda _: math.nan), 2, QuadraticSettings())
    with pytest.raises(ValueError, match="none of the 0"):
        _ = History(lambda _: 0.0).best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.5}, "bounds of weights must hold 0"),
        ({"low": math.nan}, "bounds of weights must hold 0"),
        ({"high": 0.0}, "bounds of weights must hold 0"),
        ({"reach": 3.0}, "reach must be above 0 and within the bounds, up to 2.0; got 3.0"),
        ({"refinements": 0}, "refinements must be at least 1; got 0"),
    ],
)
def test_settings_refuse_what_makes_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuadraticSettings(**options)  # type: ignore[arg-type]


# A network rewritten in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_live_merge_is_the_merge_and_leaves_no_trace(dtype: torch.dtype) -> None:
    base = {"a": normal(4, 3, seed=1).to(dtype), "b": normal(5, seed=2).to(dtype), "n": torch.tensor([3])}
    experts = [{"a": normal(4, 3, seed=s), "b": base["b"].float(), "n": torch.tensor([s])} for s in (4, 5)]
    live = {name: value.clone() for name, value in base.items()}
    before = {name: value.clone() for name, value in live.items()}
    with LiveMerge(live, experts) as merge:
        assert merge.names == ("a",)  # what no expert changed is not held
        for weights in [(0.3, -1.2), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]:
            merge.set({"a": weights})
            assert torch.equal(live["a"], merge_linear(base["a"], [e["a"] for e in experts], weights))
            if sum(weights) == 1:
                assert torch.equal(live["a"], experts[weights.index(1.0)]["a"].to(dtype))
    assert all(torch.equal(live[name], before[name]) for name in before)


def test_a_live_merge_restores_after_a_failure() -> None:
    live = {"a": normal(3)}
    merge = LiveMerge(live, [{"a": normal(3, seed=1)}])
    with suppress(RuntimeError), merge:
        merge.set({"a": (1.0,)})
        raise RuntimeError
    assert torch.equal(live["a"], normal(3))


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({}, "expert 0 lacks a, which the base has"),
        ({"a": torch.ones(3), "b": torch.ones(1)}, "expert 0 has b, which the base lacks"),
        ({"a": torch.ones(4)}, r"expert 0: a has shape \(4,\); the base's is \(3,\)"),
    ],
)
def test_a_live_merge_refuses_experts_of_another_model(expert: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiveMerge({"a": torch.ones(3)}, [expert])


# Cuts


def brute_force(similarity: torch.Tensor, n: int) -> float:
    """The least cost of any cut, by the formula read aloud."""
    count = len(similarity)

    def cost(a: int, b: int) -> float:
        return sum(1 - float(similarity[i, j]) for i in range(a, b) for j in range(a, b)) / (b - a)

    cuts = itertools.combinations(range(1, count), n - 1)
    return min(sum(cost(a, b) for a, b in itertools.pairwise((0, *cut, count))) for cut in cuts)


@given(num_bins=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_cuts_are_the_best_there_are(num_bins: int, seed: int) -> None:
    root = normal(num_bins, 3, seed=seed)
    root = root / root.norm(dim=1, keepdim=True)
    similarity = root @ root.T
    cuts = best_cuts(similarity, num_bins)
    costs = interval_costs(similarity)
    for n, cut in enumerate(cuts, 1):
        assert len(cut.edges) == n + 1
        assert (cut.edges[0], cut.edges[-1]) == (0, num_bins)
        assert abs(cut.cost - brute_force(similarity, n)) < 1e-5
        assert abs(cut.cost - sum(float(costs[a, b]) for a, b in itertools.pairwise(cut.edges))) < 1e-9
    assert all(more.cost <= fewer.cost + 1e-5 for fewer, more in itertools.pairwise(cuts))


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1, 4), (2, 5, 2, 1, 3)])
def test_blocks_of_agreement_are_found(sizes: tuple[int, ...]) -> None:
    similarity = torch.block_diag(*(torch.ones(size, size) for size in sizes))
    cut = best_cuts(similarity, len(sizes))[-1]
    assert cut.edges == (0, *itertools.accumulate(sizes))
    assert cut.cost == 0


@pytest.mark.parametrize(
    ("matrix", "intervals", "message"),
    [
        (torch.ones(2, 3), 1, "must be square"),
        (torch.full((2, 2), math.nan), 1, "must be finite"),
        (torch.eye(3), 4, "3 bins can be cut into 1 to 3 intervals; got 4"),
    ],
)
def test_cuts_refuse_what_is_no_similarity(matrix: torch.Tensor, intervals: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_cuts(matrix, intervals)
