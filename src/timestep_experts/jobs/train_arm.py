"""Everything that an arm of a recipe trains, whatever its kind."""

from __future__ import annotations

from timestep_experts.build import Workshop
from timestep_experts.config import Recipe
from timestep_experts.jobs.decouple import decouple_range
from timestep_experts.jobs.distill import distill_arm, distill_router_arm
from timestep_experts.jobs.merge_arm import merge_arm
from timestep_experts.jobs.train import assemble_arm, foster_arm, has_second_stage


def train_arm(recipe: Recipe, arm: str, workshop: Workshop) -> None:
    """Decouple, distill or foster, then assemble, then merge, as far as the recipe says so.

    Raises:
        ValueError: see the stages.
    """
    own = recipe.arm(arm)
    if own.decouple is not None and own.is_decoupled:
        for index in range(own.decouple.num_ranges):
            decouple_range(recipe, index, workshop, arm)
    elif own.distill is not None:
        distill_arm(recipe, arm, workshop)
    else:
        foster_arm(recipe, arm, workshop)
    if has_second_stage(recipe, arm):
        assemble_any_arm(recipe, arm, workshop)
    if own.merge is not None:
        merge_arm(recipe, arm, workshop)


def assemble_any_arm(recipe: Recipe, arm: str, workshop: Workshop) -> None:
    """Train the routers of an arm that was fostered or distilled.

    Raises:
        ValueError: see `assemble_arm`.
    """
    job = assemble_arm if recipe.arm(arm).distill is None else distill_router_arm
    job(recipe, arm, workshop)
