"""What a recipe would do, before it does it."""

from __future__ import annotations

from dataclasses import dataclass

from timestep_experts.build import (
    build_assemble_settings,
    build_foster_settings,
    build_spec,
    build_targets,
    resolve_model,
)
from timestep_experts.config import Recipe
from timestep_experts.jobs.train import has_second_stage
from timestep_experts.mixture import Mixture
from timestep_experts.models import read_outline
from timestep_experts.training import assemble, foster

_BYTES_PER_TRAINED = 16  # fp32 value, gradient, two moments


@dataclass(frozen=True)
class StagePlan:
    """One stage of one arm.

    Args:
        arm: its name.
        stage: its name.
        num_experts: learners in it.
        trainable: parameters that change.
        steps: optimiser steps.
        samples_per_expert: the fewest and the most that one of them sees.
        samples: seen in all.
        memory: bytes of base weights, trained parameters, gradients and AdamW's moments; activations come on top.
    """

    arm: str
    stage: str
    num_experts: int
    trainable: int
    steps: int
    samples_per_expert: tuple[int, int]
    samples: int
    memory: int


def make_plan(recipe: Recipe) -> list[StagePlan]:
    """Every stage of every arm, counted on the meta device: nothing is loaded or trained.

    Raises:
        ValueError: the base has no readable configuration, or the experts do not fit it.
    """
    return [stage for arm in recipe.arm_names for stage in _plan_arm(recipe, arm)]


def _plan_arm(recipe: Recipe, arm: str) -> list[StagePlan]:
    own = recipe.arm(arm)
    outline = read_outline(resolve_model(own.pretrained_model_name_or_path))
    networks, targets = build_targets(own.experts, outline.denoisers, outline.text_encoders)
    base = sum(p.numel() for network in networks.values() for p in network.parameters())
    mixture = Mixture.attach(networks, build_spec(own.experts, outline.num_train_timesteps), targets)
    stages = foster(mixture, build_foster_settings(own, outline.text_encoders))
    if has_second_stage(recipe, arm):
        stages.append(assemble(mixture, build_assemble_settings(own)))
    plans = []
    for stage in stages:
        batch = stage.plan.samples_per_stratum
        seen = [round(learner.max_train_steps * batch / learner.gradient_share) for learner in stage.learners]
        trainable = sum(leaf.numel() for learner in stage.learners for leaf in learner.leaves)
        stored = mixture.count_parameters().stored
        plans.append(
            StagePlan(
                arm=arm,
                stage=stage.name,
                num_experts=len(stage.learners),
                trainable=trainable,
                steps=stage.num_steps,
                samples_per_expert=(min(seen), max(seen)),
                samples=stage.num_steps * len(stage.plan.strata) * batch,
                memory=4 * (base + stored - trainable) + _BYTES_PER_TRAINED * trainable,
            )
        )
    return plans
