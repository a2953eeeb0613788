"""Everything that can be known before a run loads weights or writes a result, looked at in seconds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from timestep_experts.build import build_datasets, build_decode_settings, build_device, build_prompts
from timestep_experts.config import Recipe
from timestep_experts.data import ClipSettings, Dataset
from timestep_experts.data.sources import WORLD_PREFIX
from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import check_output_folder
from timestep_experts.inference.sample import choose_scheduler, require_steps
from timestep_experts.jobs.methods import Method
from timestep_experts.jobs.plan import StagePlan, read_base
from timestep_experts.models import Family
from timestep_experts.models.sources import is_hub_id


@dataclass(frozen=True)
class Preflight:
    """What was found.

    Args:
        stages: of all variants.
        datasets: training and validation pictures; ``None`` of a source that would have to be downloaded.
    """

    stages: list[StagePlan]
    datasets: tuple[Dataset, Dataset] | None


def preflight(recipe: Recipe, methods: Sequence[Method], *, is_dry: bool) -> Preflight:
    """Look at the output, the base's configuration, the data, the sampler, and every stage of the methods.

    Args:
        recipe: of the run.
        methods: of the variants that are to be trained.
        is_dry: only look: make no folder, ask for no device, and estimate memory.

    Raises:
        UserError: the run could not come to its end; says what is in the way.
    """
    _require_one_process()
    check_output_folder(recipe.output_dir, makes=False)
    _check_device(recipe, is_dry=is_dry)
    family = read_base(recipe).make_family()
    if recipe.max_sequence_length is not None:
        family.set_max_sequence_length(recipe.max_sequence_length)
    decoding = build_decode_settings(recipe, family.default_num_frames, flip=False)
    family.check_size(recipe.resolution, decoding.num_frames if isinstance(decoding, ClipSettings) else None)
    _check_sampler(recipe, family)
    datasets = _find_datasets(recipe, family)
    stages = [stage for method in methods for stage in method.plan(with_memory=is_dry)]
    if not is_dry:
        check_output_folder(recipe.output_dir, makes=True)
    return Preflight(stages, datasets)


def _require_one_process() -> None:
    count = os.environ.get("WORLD_SIZE", "1")
    if count not in ("", "1"):
        raise UserError(
            f"this command was started in {count} processes (WORLD_SIZE), and each of them would train everything;"
            " start it once, without torchrun or accelerate launch"
        )


def _check_device(recipe: Recipe, *, is_dry: bool) -> None:
    if not is_dry:
        build_device(recipe)
    elif recipe.device != "auto":
        try:
            torch.device(recipe.device)
        except RuntimeError as error:
            raise UserError(f"recipe.device: {recipe.device!r} is no device: {error}") from error


def _check_sampler(recipe: Recipe, family: Family) -> None:
    evaluation = recipe.evaluation
    scheduler = choose_scheduler(evaluation.scheduler, family.pipeline().scheduler)
    require_steps(scheduler, evaluation.num_inference_steps)


def _find_datasets(recipe: Recipe, family: Family) -> tuple[Dataset, Dataset] | None:
    places = {"path": recipe.data.path, "validation_path": recipe.data.validation_path}
    for key, place in places.items():
        if place is None or place.startswith(WORLD_PREFIX) or Path(place).exists():
            continue
        if is_hub_id(place):  # the library that downloads it will look at it
            return None
        raise UserError(f"recipe.data.{key}: there is no file or folder {place}")
    datasets = build_datasets(recipe, is_video=family.is_video)
    build_prompts(recipe, datasets[1])
    return datasets
