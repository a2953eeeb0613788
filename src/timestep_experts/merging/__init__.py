"""Decouple-then-merge on weights: several fine-tuned copies of one base become one model. Needs torch only."""

from timestep_experts.merging.methods import Method, mask_seed, merge_dare, merge_linear, merge_ties, task_vector, trim
from timestep_experts.merging.settings import METHODS, MergeSettings, merge_tensor

__all__ = [
    "METHODS",
    "MergeSettings",
    "Method",
    "mask_seed",
    "merge_dare",
    "merge_linear",
    "merge_tensor",
    "merge_ties",
    "task_vector",
    "trim",
]
