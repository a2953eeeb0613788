"""Decouple-then-merge on weights: several fine-tuned copies of one base become one model. Needs torch only."""

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
from timestep_experts.merging.settings import METHODS, MergeSettings, merge_tensor

__all__ = [
    "METHODS",
    "PLACEMENTS",
    "MergeSettings",
    "Method",
    "Place",
    "Placement",
    "Projections",
    "find_places",
    "fold",
    "folded_layers",
    "mask_seed",
    "merge_dare",
    "merge_linear",
    "merge_tensor",
    "merge_ties",
    "project",
    "task_vector",
    "trim",
    "unfold",
]
