"""Decouple a recipe's base: one expert per range, each by itself. The same call goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from timestep_experts import __version__
from timestep_experts.build import (
    Workshop,
    build_decoupled_partition,
    build_loop_settings,
    build_loss_settings,
    build_optimiser_settings,
    build_sample_settings,
    resolve_model,
)
from timestep_experts.config import MAIN_ARM, DecoupleConfig, Recipe
from timestep_experts.evaluation import loss_curve
from timestep_experts.formats.checkpoints import Checkpoint, file_sha256, weights_sha256
from timestep_experts.formats.experts import ExpertRecord, StoredProjections, write_expert
from timestep_experts.formats.model_folders import find_weights
from timestep_experts.inference import sample
from timestep_experts.jobs.media import save_media_sheet
from timestep_experts.jobs.train import arm_folder, encoders_away
from timestep_experts.merging import fold, folded_layers
from timestep_experts.models import Family
from timestep_experts.training import Decoupled, DecoupleSettings, decouple
from timestep_experts.training.full_copy import FullCopy
from timestep_experts.training.log import RunLog
from timestep_experts.training.loop import Observer, run_stage


def build_decouple_settings(recipe: Recipe, num_train_timesteps: int) -> DecoupleSettings:
    """Full copies, one per range; numbers per range are spelled out.

    Raises:
        ValueError: the recipe decouples nothing, its base has lost precision, or its ranges do not fit.
    """
    config = recipe.decouple
    if config is None:
        raise ValueError("recipe.decouple: this recipe has no such section, so there is nothing to decouple")
    if recipe.training.base_quantization is not None:
        raise ValueError("recipe.training.base_quantization: a quantised base cannot be copied and trained; use null")
    options = config.model_dump(exclude={"intervals", "boundaries", "optimizer", "max_train_steps"})
    steps = config.max_train_steps
    return DecoupleSettings(
        partition=build_decoupled_partition(config, num_train_timesteps),
        max_train_steps=steps if isinstance(steps, tuple) else (steps,) * config.num_ranges,
        caption_dropout=recipe.data.caption_dropout,
        seed=recipe.seed,
        **options,
    )


def decouple_folder(recipe: Recipe, arm: str = MAIN_ARM) -> Path:
    """Where the experts of all ranges are."""
    return (recipe.output_dir if arm == MAIN_ARM else arm_folder(recipe, arm)) / "decoupled"


def range_folder(recipe: Recipe, index: int, arm: str = MAIN_ARM) -> Path:
    """Where one range's stage and its ``expert/`` are."""
    return decouple_folder(recipe, arm) / f"range-{index}"


def decouple_range(recipe: Recipe, index: int, workshop: Workshop, arm: str = MAIN_ARM) -> tuple[Path, tuple[str, ...]]:
    """Train one range's expert and write its folder, which `merge` and any diffusers tool read.

    Args:
        recipe: of the run.
        index: of the range.
        workshop: base and pictures.
        arm: its name.

    Returns:
        The expert's folder, and the names of projections that are not in its weights.

    Raises:
        ValueError: see `training.decouple` and `run_stage`.
    """
    folder, recipe = range_folder(recipe, index, arm), recipe.arm(arm)
    family, config = workshop.family, recipe.decouple
    settings = build_decouple_settings(recipe, family.noise.num_train_timesteps)
    assert config is not None  # its settings were built
    decoupled = decouple(family, settings, index)
    with _base_away(family, settings), encoders_away(recipe, workshop):
        run_stage(
            decoupled.stage,
            decoupled.trainee,
            decoupled.family,
            workshop.train,
            build_optimiser_settings(config.optimizer),
            build_loop_settings(recipe),
            folder,
            _identity(recipe, config, settings, index, workshop),
            _observer(recipe, settings, decoupled, workshop, folder),
        )
    return folder / "expert", _write(recipe, settings, index, decoupled, folder / "expert")


@contextmanager
def _base_away(family: Family, settings: DecoupleSettings) -> Iterator[None]:
    """Without consistency nothing asks the base: it is on the CPU while its copy trains."""
    home = family.device
    try:
        if not settings.consistency:
            family.denoiser.to("cpu")
        yield
    finally:
        family.denoiser.to(home)


def _identity(
    recipe: Recipe, config: DecoupleConfig, settings: DecoupleSettings, index: int, workshop: Workshop
) -> dict[str, Any]:
    """Whatever decides the bytes of a range's expert; other ranges' budgets do not."""
    training = recipe.training.model_dump(include={"mixed_precision", "base_dtype", "gradient_accumulation_steps"})
    return {
        **config.model_dump(mode="json", exclude={"intervals", "boundaries", "max_train_steps"}),
        **training,
        "boundaries": list(settings.partition.boundaries),
        "range": index,
        "max_train_steps": settings.max_train_steps[index],
        "seed": recipe.seed,
        "base_model": recipe.pretrained_model_name_or_path,
        "caption_dropout": recipe.data.caption_dropout,
        "train_pictures": workshop.train.key,
    }


def _observer(
    recipe: Recipe, settings: DecoupleSettings, decoupled: Decoupled, workshop: Workshop, folder: Path
) -> Observer:
    """Validation loss per range, and preview pictures, of what would be kept: averaged weights. The base stays."""
    family = decoupled.family

    def observe(step: int, log: RunLog) -> None:
        with decoupled.trainee.as_expert():
            curve = loss_curve(family, workshop.validation, build_loss_settings(recipe, settings.partition))
            values = {f"validation/{i}": curve.within(i) for i in settings.partition.intervals}
            log.write(step, {"validation/mean": curve.mean, **values})
            if recipe.training.preview_pictures:
                prompts = workshop.prompts[: recipe.training.preview_pictures]
                with workshop.family.encoders_on(family.device):
                    drawn = sample(family.pipeline(), prompts, build_sample_settings(recipe, workshop.media))
                save_media_sheet(folder / "previews" / f"step-{step:06d}.png", drawn, prompts)

    return observe


def _write(
    recipe: Recipe, settings: DecoupleSettings, index: int, decoupled: Decoupled, folder: Path
) -> tuple[str, ...]:
    trainee, denoiser = decoupled.trainee, decoupled.trainee.denoiser
    record = ExpertRecord(
        index=index,
        boundaries=settings.partition.boundaries,
        base_model=recipe.pretrained_model_name_or_path,
        denoiser_class=type(denoiser).__name__,
        seed=recipe.seed,
        provenance={
            "recipe": recipe.model_dump(mode="json", include={"decouple", "data", "resolution", "max_sequence_length"}),
            "versions": {
                "timestep_experts": __version__,
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
            },
        },
    )
    with trainee.as_expert():
        deltas = {name: delta.detach().cpu().clone() for name, delta in trainee.projections.named_deltas().items()}
        tensors = expert_tensors(trainee, deltas)
    places = tuple(trainee.projections.places)
    projections = StoredProjections(places, deltas) if places else None
    save_config = decoupled.family.denoiser.save_config
    write_expert(folder, save_config, tensors, record, base_sha256(recipe, decoupled.family), projections)  # type: ignore[arg-type]
    return tuple(trainee.projections.kept())


def expert_tensors(trainee: FullCopy, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy's weights as they are now, on the CPU, with foldable projections in them."""
    tensors = {name: tensor.detach().cpu() for name, tensor in trainee.denoiser.state_dict().items()}
    for layer, projection in folded_layers(trainee.projections.places).items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in tensors:
                tensors[name] = fold(tensors[name], deltas[projection])
    return tensors


def base_sha256(recipe: Recipe, family: Family) -> str | None:
    """The hash of a base's weights as `merge` knows it; ``None`` where it would not read them."""
    place = base_weights(recipe, family)
    return None if place is None else weights_sha256({file.name: file_sha256(file) for file in Checkpoint(place).files})


def base_weights(recipe: Recipe, family: Family) -> Path | None:
    """The folder of the base's denoiser, as `merge` reads it; ``None`` where it would not."""
    source = Path(resolve_model(recipe.pretrained_model_name_or_path))
    if source.suffix == ".safetensors":
        return None
    config: Any = family.denoiser.config  # of a hub's model, it names the folder of the download
    place = find_weights(source, family.denoiser_name) if source.is_dir() else Path(config["_name_or_path"])
    try:
        Checkpoint(place)
    except ValueError:  # other formats than safetensors
        return None
    return place
