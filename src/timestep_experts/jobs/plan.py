"""What a stage would do, before it does it: experts, steps, samples and memory, counted without weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from timestep_experts.build import build_base_dtype, build_decode_settings, build_optimiser_settings
from timestep_experts.config import OptimizerConfig, Recipe
from timestep_experts.data import ClipSettings, EncodedDataset
from timestep_experts.errors import UserError
from timestep_experts.models import Family, MetaModel, read_meta_model, resolve_model
from timestep_experts.models.quantization import quantised_bytes
from timestep_experts.training import Training
from timestep_experts.training.assemble import ROUTER
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
    """One stage of one variant.

    Args:
        variant: the name of the variant.
        stage: the name of the stage.
        num_experts: how many experts learn in it, or if there is none, how many kinds of router parameters.
        trainable: parameters that change.
        steps: optimiser steps.
        samples_per_expert: the fewest and the most that one of them sees.
        samples: seen in all.
        memory: an estimate; ``None`` where none was asked for, and for distillation.
    """

    variant: str
    stage: str
    num_experts: int
    trainable: int
    steps: int
    samples_per_expert: tuple[int, int]
    samples: int
    memory: Memory | None = None


def read_base(recipe: Recipe) -> MetaModel:
    """The recipe's base on the meta device, in the dtype of the recipe.

    Raises:
        UserError: the base has no readable configuration.
    """
    meta_model = read_meta_model(resolve_model(recipe.pretrained_model_name_or_path))
    meta_model.cast_to(build_base_dtype(recipe))
    return meta_model


def count_trained(stage: Stage) -> int:
    """The number of parameters that a stage changes."""
    return sum(leaf.numel() for group in stage.param_groups for leaf in group.leaves)


def count_stage(variant: str, stage: Stage, optimiser: OptimizerConfig) -> StagePlan:
    """The plan of a stage whose experts learn side by side.

    Raises:
        UserError: the optimiser or its schedule does not fit the stage.
    """
    check_optimiser(variant, stage, optimiser)
    batch = stage.plan.batch_size // len(stage.plan.strata)
    experts = [group for group in stage.param_groups if not group.name.startswith(ROUTER)] or stage.param_groups
    seen = [round(group.max_train_steps * batch / group.gradient_share) for group in experts]
    return StagePlan(
        variant=variant,
        stage=stage.name,
        num_experts=len(experts),
        trainable=count_trained(stage),
        steps=stage.num_steps,
        samples_per_expert=(min(seen), max(seen)),
        samples=stage.num_steps * stage.plan.batch_size,
    )


def check_optimiser(variant: str, stage: Stage, optimiser: OptimizerConfig) -> None:
    """See that a stage can be trained by an optimiser and its schedule.

    Raises:
        UserError: it cannot; names variant and stage.
    """
    try:
        build_optimiser_settings(optimiser).check(stage.param_groups)
    except UserError as error:
        raise UserError(f"recipe.method.optimizer, variant {variant}, stage {stage.name}: {error}") from error


def base_bytes(recipe: Recipe, meta_model: MetaModel, *, trains_text: bool) -> int:
    """The bytes of the frozen networks that are on the device while training.

    Args:
        recipe: of the run.
        meta_model: its base.
        trains_text: whether text encoders carry experts, so that they cannot leave.
    """
    training = recipe.training
    leaves = training.offload_encoders and planned_device(recipe) != "cpu"
    encoders = {} if leaves else meta_model.autoencoders
    text_encoders = {} if leaves and not trains_text else meta_model.text_encoders
    return sum(
        quantised_bytes(network, training.base_quantization)
        if training.base_quantization and name in meta_model.quantised
        else sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        for name, network in {**meta_model.denoisers, **encoders, **text_encoders}.items()
    )


def planned_device(recipe: Recipe) -> str:
    """The kind of device that the recipe is for, which need not be there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if recipe.device == "auto" else recipe.device
    return name.partition(":")[0]


def estimate_peaks(
    recipe: Recipe,
    meta_model: MetaModel,
    make: Callable[[Family], Sequence[Training]],
    *,
    beside: Iterable[nn.Module] = (),
    trains_text: bool,
) -> list[tuple[Training, int]]:
    """The most bytes that one step of each training needs beside what is held, measured on fake tensors.

    Args:
        recipe: of the run.
        meta_model: its base, whose parameters become fake.
        make: the trainings, of those parameters.
        beside: modules of the meta device that stand beside the base's networks, such as layers of experts.
        trains_text: whether text encoders carry experts, so that captions are kept as tokens.
    """
    # A sample meets one of two denoisers, and they are alike.
    family = meta_model.make_family(with_second_denoiser=False)
    if recipe.max_sequence_length is not None:
        family.set_max_sequence_length(recipe.max_sequence_length)
    if recipe.training.gradient_checkpointing:
        family.checkpoint_gradients()
    with fake_networks([*meta_model.networks.values(), *beside]), warnings.catch_warnings():
        # A copy of a fake tensor asks for its address.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        dataset = fake_pictures(family, _pixel_shape(recipe, family), as_tokens=trains_text)
        return [(training, _step_peak(recipe, training, dataset)) for training in make(family)]


def _step_peak(recipe: Recipe, training: Training, dataset: EncodedDataset) -> int:
    settings = recipe.training
    return step_peak(
        training,
        dataset,
        settings.gradient_accumulation_steps,
        settings.mixed_precision,
        on_accelerator=planned_device(recipe) != "cpu",
    )


def optimiser_bytes(optimiser: OptimizerConfig, stage: Stage) -> int:
    """The bytes of the optimiser's state over what a stage changes."""
    settings = build_optimiser_settings(optimiser)
    shapes = [leaf.shape for group in stage.param_groups for leaf in group.leaves]
    return state_bytes(settings.name, settings.options, shapes)


def _pixel_shape(recipe: Recipe, family: Family) -> tuple[int, ...]:
    """The shape of a picture ``(3, H, W)`` or a clip ``(3, F, H, W)`` of the recipe's data."""
    decoding = build_decode_settings(recipe, family.default_num_frames, flip=False)
    frames = (decoding.num_frames,) if isinstance(decoding, ClipSettings) else ()
    return (3, *frames, *recipe.resolution)
