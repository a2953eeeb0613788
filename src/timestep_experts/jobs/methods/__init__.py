"""The ways of training: one file each, behind one protocol.

Another way of training is one more file here, its name in `method_of`, and its settings in ``config/methods.py``.
"""

from __future__ import annotations

from typing_extensions import assert_never

from timestep_experts.config import DecoupleConfig, DistillConfig, FosterConfig, Recipe, Variant
from timestep_experts.jobs.methods.base import BaseCandidate
from timestep_experts.jobs.methods.decoupling import Decoupling
from timestep_experts.jobs.methods.distilling import Distilling
from timestep_experts.jobs.methods.fostering import Fostering
from timestep_experts.jobs.methods.low_rank import LowRankMethod
from timestep_experts.jobs.methods.protocol import Candidate, Costs, Method
from timestep_experts.jobs.paths import RunPaths

__all__ = [
    "BaseCandidate",
    "Candidate",
    "Costs",
    "Decoupling",
    "Distilling",
    "Fostering",
    "LowRankMethod",
    "Method",
    "method_of",
    "methods_of",
]


def method_of(recipe: Recipe, variant: Variant) -> Fostering | Distilling | Decoupling:
    """The way in which a variant is trained."""
    paths = RunPaths(recipe.output_dir).variant(variant.name)
    config = variant.method
    match config:
        case FosterConfig():
            return Fostering(recipe, variant, config, paths)
        case DistillConfig():
            return Distilling(recipe, variant, config, paths)
        case DecoupleConfig():
            return Decoupling(recipe, variant, config, paths, tuple(range(config.num_ranges)))
        case _:
            assert_never(config)


def methods_of(recipe: Recipe) -> list[Fostering | Distilling | Decoupling]:
    """Those of all variants, the main one first."""
    return [method_of(recipe, variant) for variant in recipe.all_variants]
