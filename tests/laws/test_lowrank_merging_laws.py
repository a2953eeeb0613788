"""Merging on factors: exact at full rank, the nearest below it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import max_error, normal
from timestep_experts.merging import LowRank, truncate, truncate_matrix, weighted_sum


def parts(out: int, k: int, ranks: list[int], groups: int = 1, seed: int = 0) -> list[LowRank]:
    return [
        LowRank(normal(r, k, seed=seed + 2 * i), normal(out, r // groups, seed=seed + 2 * i + 1), groups)
        for i, r in enumerate(ranks)
    ]


@pytest.mark.parametrize(("out", "k", "groups"), [(6, 9, 1), (3, 20, 1), (20, 3, 1), (8, 12, 2), (8, 36, 4)])
def test_full_rank_is_the_exact_weighted_sum(out: int, k: int, groups: int) -> None:
    updates, weights = parts(out, k, [4, 8, 4], groups), (0.5, -0.25, 1.5)
    exact = sum(w * part.product().double() for part, w in zip(updates, weights, strict=True))
    joined = weighted_sum(updates, weights)
    assert joined.rank == 16
    assert max_error(joined.product(), exact) < 1e-5
    cut = truncate(joined, 16)
    assert (tuple(cut.update.down.shape), tuple(cut.update.up.shape)) == ((16, k), (out, 16 // groups))
    assert max_error(cut.update.product(), exact) < 1e-5
    assert cut.kept == pytest.approx(1)
    assert cut.energy == pytest.approx(float(exact.square().sum()), rel=1e-6)


@given(out=st.integers(1, 9), k=st.integers(1, 9), rank=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_a_truncated_sum_is_the_nearest_there_is(out: int, k: int, rank: int, seed: int) -> None:
    joined = weighted_sum(parts(out, k, [3, 4], seed=seed), (1.0, -0.7))
    cut = truncate(joined, rank)
    left, values, right = torch.linalg.svd(joined.product().double(), full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    assert max_error(cut.update.product(), best) < 1e-4
    energy = values.square()
    assert cut.kept == pytest.approx(float(energy[:rank].sum() / energy.sum()), abs=1e-6)


def test_groups_are_truncated_each_by_itself() -> None:
    joined = weighted_sum(parts(8, 12, [4, 8], 2), (1.0, 1.0))
    product = truncate(joined, 4).update.product()
    for whole, group in zip(joined.product().chunk(2), product.chunk(2), strict=True):
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        assert max_error(group, left[:, :2] * values[:2] @ right[:2]) < 1e-4


def test_both_factors_carry_the_same_weight() -> None:
    update = truncate(weighted_sum(parts(6, 9, [3]), (2.0,)), 3).update
    assert max_error(update.down @ update.down.T, update.up.T @ update.up) < 1e-4


def test_nothing_stays_nothing() -> None:
    cut = truncate(weighted_sum(parts(4, 5, [2]), (0.0,)), 3)
    assert (cut.energy, cut.kept) == (0.0, 1.0)
    assert not cut.update.product().any()


@pytest.mark.parametrize(("shape", "groups"), [((6, 9), 1), ((6, 4, 3, 3), 1), ((6, 4, 1, 1), 1), ((8, 3, 3, 3), 4)])
def test_a_full_update_is_kept_at_full_rank(shape: tuple[int, ...], groups: int) -> None:
    matrix = normal(*shape)
    rank = groups * min(shape[0] // groups, matrix[0].numel())
    cut = truncate_matrix(matrix, rank, groups)
    rows = cut.update.product().chunk(groups)
    own = matrix[0].numel()
    for g, (group, exact) in enumerate(zip(rows, matrix.flatten(1).chunk(groups), strict=True)):
        inputs = slice(g * own, (g + 1) * own)
        assert max_error(group[:, inputs], exact) < 1e-5
        assert group.abs().sum() == pytest.approx(float(group[:, inputs].abs().sum()))  # nothing for other groups
    assert cut.kept == pytest.approx(1)
    assert cut.energy == pytest.approx(float(matrix.square().sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_ranks_that_do_not_fit_groups_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"positive multiple of the layer's 2 group\(s\); got {rank}"):
        truncate(parts(4, 4, [2], 2)[0], rank)
    with pytest.raises(ValueError, match=rf"positive multiple of the layer's 2 group\(s\); got {rank}"):
        truncate_matrix(torch.ones(4, 4), rank, 2)


def test_the_number_of_weights_is_checked() -> None:
    with pytest.raises(ValueError, match="there are 1 weights for 2 low-rank updates"):
        weighted_sum(parts(4, 4, [2, 2]), (1.0,))
