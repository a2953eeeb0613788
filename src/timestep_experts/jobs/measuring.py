"""A recipe's base and data for the room of weights, which knows no recipe."""

from __future__ import annotations

from timestep_experts.build import build_family, build_loss_settings, build_validation
from timestep_experts.config import Recipe
from timestep_experts.errors import UserError
from timestep_experts.weights.measured import MeasuredBase


def measured_base(recipe: Recipe) -> MeasuredBase:
    """The recipe's base, unquantised, with its validation pictures.

    Raises:
        UserError: the recipe quantises its base.
    """
    if recipe.training.base_quantization is not None:
        kind = recipe.training.base_quantization
        raise UserError(f"recipe.training.base_quantization: a base in {kind} has no weights to add to; set it to null")
    return MeasuredBase(
        source=recipe.pretrained_model_name_or_path,
        load=lambda: build_family(recipe),
        load_pictures=lambda family, as_tokens: build_validation(recipe, family, as_tokens=as_tokens),
        loss_settings=lambda partition: build_loss_settings(recipe, partition),
        seed=recipe.seed,
    )
