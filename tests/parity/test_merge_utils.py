"""Merging beside PEFT's functions on task vectors, where both mean the same."""

from __future__ import annotations

import pytest
import torch
from peft.utils.merge_utils import task_arithmetic, ties

from conftest import max_error, normal
from timestep_experts.merging import merge_linear, merge_ties

BASE = normal(16, 25, dtype=torch.float64)
VECTORS = [normal(16, 25, seed=i, dtype=torch.float64) for i in (1, 2, 3)]
EXPERTS = [BASE + vector for vector in VECTORS]


def test_linear_is_task_arithmetic() -> None:
    weights = [0.3, -0.2, 1.5]
    expected = BASE + task_arithmetic(VECTORS, torch.tensor(weights, dtype=torch.float64))
    assert max_error(merge_linear(BASE, EXPERTS, weights), expected) < 1e-14


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties_at_equal_weights_is_pefts(density: float) -> None:
    # PEFT divides by the number that agree, whatever the weights: one weight of lambda there is lambda / N here.
    scale = 0.8
    expected = BASE + ties(VECTORS, torch.full((3,), scale, dtype=torch.float64), density)
    assert max_error(merge_ties(BASE, EXPERTS, [scale / 3] * 3, density), expected) < 1e-14
