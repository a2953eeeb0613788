"""Decouple-then-merge on weights: several fine-tuned copies of one base become one model. Needs torch only."""

from timestep_experts.merging.boundaries import Cut, best_cuts
from timestep_experts.merging.groups import WeightGroups
from timestep_experts.merging.live import LiveMerge
from timestep_experts.merging.lowrank import LowRank, Truncated, truncate, truncate_matrix, weighted_sum
from timestep_experts.merging.methods import Method, mask_seed, merge_dare, merge_linear, merge_ties, task_vector, trim
from timestep_experts.merging.projection import (
    PLACEMENTS,
    Place,
    Placement,
    Projections,
    find_places,
    fold,
    folded_layers,
    project,
    unfold,
)
from timestep_experts.merging.search import (
    Evaluated,
    History,
    Quadratic,
    QuadraticSettings,
    Weights,
    fit_around,
    fit_quadratic,
    grid,
    lattice,
    minimise_in_box,
    num_coefficients,
    search_quadratic,
)
from timestep_experts.merging.settings import METHODS, MergeSettings, merge_tensor

__all__ = [
    "METHODS",
    "PLACEMENTS",
    "Cut",
    "Evaluated",
    "History",
    "LiveMerge",
    "LowRank",
    "MergeSettings",
    "Method",
    "Place",
    "Placement",
    "Projections",
    "Quadratic",
    "QuadraticSettings",
    "Truncated",
    "WeightGroups",
    "Weights",
    "best_cuts",
    "find_places",
    "fit_around",
    "fit_quadratic",
    "fold",
    "folded_layers",
    "grid",
    "lattice",
    "mask_seed",
    "merge_dare",
    "merge_linear",
    "merge_tensor",
    "merge_ties",
    "minimise_in_box",
    "num_coefficients",
    "project",
    "search_quadratic",
    "task_vector",
    "trim",
    "truncate",
    "truncate_matrix",
    "unfold",
    "weighted_sum",
]
