"""What a recipe would do, before it does it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from timestep_experts.build import (
    build_assemble_settings,
    build_base_dtype,
    build_foster_settings,
    build_media_settings,
    build_optimiser_settings,
    build_spec,
    build_targets,
    resolve_model,
)
from timestep_experts.config import Recipe
from timestep_experts.data import ClipSettings
from timestep_experts.jobs.decouple import build_decouple_settings
from timestep_experts.jobs.distill import settings_of
from timestep_experts.jobs.train import has_second_stage
from timestep_experts.mixture import Mixture
from timestep_experts.models import Family, Outline, read_outline
from timestep_experts.models.quantization import quantised_bytes
from timestep_experts.training import DecoupleSettings, assemble, decouple, foster
from timestep_experts.training.distill import DistillStage, distill, distill_router
from timestep_experts.training.memory import fake_networks, fake_pictures, step_peak
from timestep_experts.training.optimiser import state_bytes
from timestep_experts.training.stage import Stage


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a stage's training, on the device that it runs on.

    Args:
        base: the frozen networks that are there, in their dtype or quantised.
        experts: values, gradients and optimiser state of experts and routers.
        activations: of one micro-batch: what is kept for the backward pass, and temporary tensors.
    """

    base: int
    experts: int
    activations: int

    @property
    def peak(self) -> int:
        """All together."""
        return self.base + self.experts + self.activations


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
        memory: an estimate; ``None`` where none was asked for, and for distillation.
    """

    arm: str
    stage: str
    num_experts: int
    trainable: int
    steps: int
    samples_per_expert: tuple[int, int]
    samples: int
    memory: Memory | None = None


def make_plan(recipe: Recipe, arm: str | None = None, *, with_memory: bool = False) -> list[StagePlan]:
    """Every stage of every arm, counted on the meta device: nothing is loaded or trained.

    Args:
        recipe: what to plan.
        arm: only this one; ``None`` for all.
        with_memory: estimate memory too, which takes seconds per stage.

    Raises:
        ValueError: the base has no readable configuration, or the experts do not fit it.
    """
    arms = recipe.arm_names if arm is None else [arm]
    return [stage for name in arms for stage in _plan_arm(recipe, name, with_memory)]


def _plan_arm(recipe: Recipe, arm: str, with_memory: bool) -> list[StagePlan]:
    own = recipe.arm(arm)
    if own.is_decoupled:
        copies = make_decouple_plan(own, with_memory=with_memory)
        return [replace(plan, arm=arm) for plan in copies]
    outline = read_outline(resolve_model(own.pretrained_model_name_or_path))
    outline.cast_to(build_base_dtype(own))
    base = _base_bytes(own, outline)
    networks, targets = build_targets(own.experts, outline.denoisers, outline.text_encoders)
    spec = build_spec(own.experts, outline.num_train_timesteps)
    mixture = Mixture.attach(networks, spec, targets, owned=outline.owned_intervals)

    if own.distill is not None:
        return _plan_distillation(own, arm, mixture, outline.make_family(), assembled=has_second_stage(recipe, arm))

    def make_stages() -> list[Stage]:
        stages = foster(mixture, build_foster_settings(own, outline.text_encoders))
        return [*stages, assemble(mixture, build_assemble_settings(own))] if has_second_stage(recipe, arm) else stages

    plans = [_count(arm, stage) for stage in make_stages()]
    if not with_memory:
        return plans
    memory = _estimate(own, outline, mixture, make_stages, base)
    return [replace(plan, memory=estimated) for plan, estimated in zip(plans, memory, strict=True)]


def make_decouple_plan(
    recipe: Recipe, indices: Sequence[int] | None = None, *, with_memory: bool = False
) -> list[StagePlan]:
    """Every range's training, counted on the meta device: nothing is loaded or trained.

    Args:
        recipe: what to plan.
        indices: only these ranges; ``None`` for all.
        with_memory: estimate memory too, which takes seconds.

    Raises:
        ValueError: the base has no readable configuration, or what is asked does not fit it.
    """
    outline = read_outline(resolve_model(recipe.pretrained_model_name_or_path))
    settings = build_decouple_settings(recipe, outline.num_train_timesteps)
    outline.cast_to(build_base_dtype(recipe))
    family = outline.make_family()
    wanted = range(len(settings.partition)) if indices is None else indices
    plans = []
    for number in wanted:
        plan = _count("decouple", decouple(family, settings, number).stage)
        plans.append(replace(plan, samples_per_expert=(plan.samples, plan.samples), num_experts=1))  # of all ranges' t
    if not with_memory:
        return plans
    memory = _estimate_copy(recipe, outline, family, settings)
    return [replace(plan, memory=memory) for plan in plans]


def _estimate_copy(recipe: Recipe, outline: Outline, family: Family, settings: DecoupleSettings) -> Memory:
    """The memory of a range's training, which is that of every other one: a step of it on fake tensors."""
    training, on_accelerator = recipe.training, planned_device(recipe) != "cpu"
    base = _base_bytes(recipe, outline)
    if not settings.consistency and on_accelerator:
        base -= sum(tensor.nbytes for tensor in (*family.denoiser.parameters(), *family.denoiser.buffers()))
    if recipe.max_sequence_length is not None:
        family.set_max_sequence_length(recipe.max_sequence_length)
    if training.gradient_checkpointing:
        family.checkpoint_gradients()
    with fake_networks([*outline.denoisers.values(), *outline.text_encoders.values(), *outline.autoencoders.values()]):
        pictures = fake_pictures(family, _pixel_shape(recipe, family), as_tokens=False)
        with warnings.catch_warnings():  # a copy of a fake tensor asks for its address
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            made = decouple(family, settings, 0)
        peak = step_peak(
            made.stage,
            made.trainee,
            made.family,
            pictures,
            training.gradient_accumulation_steps,
            training.mixed_precision,
            on_accelerator=on_accelerator,
        )
    assert recipe.decouple is not None  # its settings were built
    optimiser = build_optimiser_settings(recipe.decouple.optimizer)
    trained = 4 * sum(parameter.numel() for parameter in made.stage.parameters())
    copies = sum(4 * p.numel() for p in made.trainee.denoiser.parameters()) + trained * (settings.ema_decay is not None)
    shapes = [leaf.shape for learner in made.stage.learners for leaf in learner.leaves]
    return Memory(base, copies + trained + state_bytes(optimiser.name, optimiser.options, shapes), peak - trained)


def _plan_distillation(
    recipe: Recipe, arm: str, mixture: Mixture, family: Family, *, assembled: bool
) -> list[StagePlan]:
    """What is trained is an expert or the routers, and the fake score with its head: a copy of the whole denoiser."""
    settings = settings_of(recipe, family)
    stages = distill(mixture, family, settings)
    if assembled:
        stages.append(distill_router(mixture, family, settings, build_assemble_settings(recipe)))
    return [_count_distilled(arm, item) for item in stages]


def _count_distilled(arm: str, item: DistillStage) -> StagePlan:
    samples = item.stage.num_steps * item.stage.plan.batch_size
    leaves = [leaf for learner in item.stage.learners for leaf in learner.leaves]
    return StagePlan(
        arm=arm,
        stage=item.stage.name,
        num_experts=len(item.stage.learners) - 1,
        trainable=sum(leaf.numel() for leaf in leaves),
        steps=item.stage.num_steps,
        samples_per_expert=(samples, samples),
        samples=samples,
    )


def _count(arm: str, stage: Stage) -> StagePlan:
    batch = stage.plan.batch_size // len(stage.plan.strata)
    seen = [round(learner.max_train_steps * batch / learner.gradient_share) for learner in stage.learners]
    return StagePlan(
        arm=arm,
        stage=stage.name,
        num_experts=len(stage.learners),
        trainable=sum(leaf.numel() for learner in stage.learners for leaf in learner.leaves),
        steps=stage.num_steps,
        samples_per_expert=(min(seen), max(seen)),
        samples=stage.num_steps * stage.plan.batch_size,
    )


def _base_bytes(recipe: Recipe, outline: Outline) -> int:
    """The frozen networks that are on the device while training."""
    training = recipe.training
    leaves = training.offload_encoders and planned_device(recipe) != "cpu"
    needs_text = recipe.experts.text_target_modules is not None
    encoders = {} if leaves else outline.autoencoders
    text_encoders = {} if leaves and not needs_text else outline.text_encoders
    return sum(
        quantised_bytes(network, training.base_quantization)
        if training.base_quantization and name in outline.quantised
        else sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        for name, network in {**outline.denoisers, **encoders, **text_encoders}.items()
    )


def planned_device(recipe: Recipe) -> str:
    """The kind of device that the recipe is for, which need not be there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if recipe.device == "auto" else recipe.device
    return name.partition(":")[0]


def _estimate(
    recipe: Recipe, outline: Outline, mixture: Mixture, make_stages: Callable[[], list[Stage]], base: int
) -> list[Memory]:
    """The memory of each stage: one step of it on fake tensors."""
    training = recipe.training
    family = outline.make_family(with_second_denoiser=False)  # a sample meets one of two, and they are alike
    if recipe.max_sequence_length is not None:
        family.set_max_sequence_length(recipe.max_sequence_length)
    if training.gradient_checkpointing:
        family.checkpoint_gradients()
    as_tokens = recipe.experts.text_target_modules is not None
    estimates = []
    with fake_networks([*outline.denoisers.values(), *outline.text_encoders.values(), *outline.autoencoders.values()]):
        pictures = fake_pictures(family, _pixel_shape(recipe, family), as_tokens=as_tokens)
        stages = make_stages()  # of the parameters that have become fake
        for stage in stages:
            peak = step_peak(
                stage,
                mixture,
                family,
                pictures,
                training.gradient_accumulation_steps,
                training.mixed_precision,
                on_accelerator=planned_device(recipe) != "cpu",
            )
            estimates.append(peak)
    stored = 4 * mixture.count_parameters().stored
    trained = [4 * sum(parameter.numel() for parameter in stage.parameters()) for stage in stages]
    return [
        Memory(base, stored + own + _state_bytes(recipe, stage), peak - own)
        for stage, own, peak in zip(stages, trained, estimates, strict=True)
    ]


def _state_bytes(recipe: Recipe, stage: Stage) -> int:
    source = recipe.assemble if stage.name == "assemble" and recipe.assemble is not None else recipe.foster
    settings = build_optimiser_settings(source.optimizer)
    shapes = [leaf.shape for learner in stage.learners for leaf in learner.leaves]
    return state_bytes(settings.name, settings.options, shapes)


def _pixel_shape(recipe: Recipe, family: Family) -> tuple[int, ...]:
    """A picture or a clip as the recipe's data would be."""
    media = build_media_settings(recipe, family.default_num_frames, flip=False)
    frames = (media.num_frames,) if isinstance(media, ClipSettings) else ()
    return (3, *frames, *recipe.resolution)
