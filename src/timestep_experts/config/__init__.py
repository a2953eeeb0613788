"""The recipe: one strict YAML schema for a whole run. Objects of this room stop at ``build`` and ``jobs``."""

from timestep_experts.config.methods import (
    AssembleConfig,
    DecoupleConfig,
    DistillConfig,
    ExpertsConfig,
    FosterConfig,
    GanConfig,
    MethodConfig,
    RouterConfig,
    ScaleConfig,
)
from timestep_experts.config.reading import load_recipe, parse_recipe
from timestep_experts.config.recipe import MAIN, Recipe, Variant
from timestep_experts.config.sections import (
    ClipsConfig,
    DataConfig,
    EvaluationConfig,
    MergeConfig,
    OptimizerConfig,
    TrainingConfig,
)

__all__ = [
    "MAIN",
    "AssembleConfig",
    "ClipsConfig",
    "DataConfig",
    "DecoupleConfig",
    "DistillConfig",
    "EvaluationConfig",
    "ExpertsConfig",
    "FosterConfig",
    "GanConfig",
    "MergeConfig",
    "MethodConfig",
    "OptimizerConfig",
    "Recipe",
    "RouterConfig",
    "ScaleConfig",
    "TrainingConfig",
    "Variant",
    "load_recipe",
    "parse_recipe",
]
