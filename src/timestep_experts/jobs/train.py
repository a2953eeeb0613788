"""Train the arms of a recipe: foster, assemble, write bundles. The same call goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml

from timestep_experts import __version__
from timestep_experts.build import (
    Workshop,
    build_assemble_settings,
    build_decoupled_partition,
    build_foster_settings,
    build_loop_settings,
    build_loss_settings,
    build_mixture,
    build_optimiser_settings,
    build_sample_settings,
    build_spec,
)
from timestep_experts.config import OptimizerConfig, Recipe
from timestep_experts.evaluation import loss_curve
from timestep_experts.formats import Bundle, save_bundle
from timestep_experts.formats.atomic import write_text
from timestep_experts.inference import reencoding, sample
from timestep_experts.intervals import Partition
from timestep_experts.jobs.media import save_media_sheet
from timestep_experts.mixture import Mixture, Mode
from timestep_experts.training import assemble, foster
from timestep_experts.training.log import RunLog, read_log
from timestep_experts.training.loop import Observer, run_stage
from timestep_experts.training.stage import Stage


def prepare_output(recipe: Recipe) -> None:
    """Write the resolved recipe beside the results."""
    left_out = set() if recipe.has_experts else {"experts", "foster", "assemble", "modes"}
    document = recipe.model_dump(mode="json", exclude=left_out)
    write_text(recipe.output_dir / "recipe.yaml", yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def arm_folder(recipe: Recipe, arm: str) -> Path:
    """Where an arm's stages and bundle are."""
    return recipe.output_dir / "arms" / arm


def reported_partition(recipe: Recipe, workshop: Workshop) -> Partition:
    """The main arm's finest intervals, or the ranges of its copies: the same for all rows of a table."""
    total = workshop.family.noise.num_train_timesteps
    if recipe.decouple is not None and recipe.is_decoupled:
        return build_decoupled_partition(recipe.decouple, total)
    return build_spec(recipe.experts, total).strata


def foster_arm(recipe: Recipe, arm: str, workshop: Workshop) -> None:
    """Foster the experts of one arm and write its bundle, for switching.

    Raises:
        ValueError: the arm is to be distilled.
    """
    own = recipe.arm(arm)
    if own.is_decoupled:
        raise ValueError(f"arm {arm!r} has full copies, no experts to foster: use the command decouple, or run")
    if own.distill is not None:
        raise ValueError(f"arm {arm!r} is distilled, not fostered: use the command distill, or run")
    mixture = build_mixture(own, workshop.family)
    try:
        _foster(own, arm_folder(recipe, arm), mixture, workshop)
        if not is_assembled(recipe, arm):
            save_arm(own, arm_folder(recipe, arm), mixture, workshop, "switch")
    finally:
        mixture.detach()


def assemble_arm(recipe: Recipe, arm: str, workshop: Workshop) -> None:
    """Train the routers of a fostered arm and write its bundle, for routing.

    Raises:
        ValueError: the arm has not been fostered, or has nothing to assemble.
    """
    own, folder = recipe.arm(arm), arm_folder(recipe, arm)
    settings = build_assemble_settings(own)
    mixture = build_mixture(own, workshop.family)
    try:
        stages = foster(mixture, build_foster_settings(own, workshop.family.text_encoders))
        unfinished = [stage.name for stage in stages if not (folder / stage.name / "result.safetensors").is_file()]
        if unfinished:
            raise ValueError(f"arm {arm!r} is not fostered yet ({', '.join(unfinished)} missing in {folder})")
        _foster(own, folder, mixture, workshop)
        stage = assemble(mixture, settings)
        assert own.assemble is not None  # its settings were built
        _run(own, stage, mixture, workshop, own.assemble.optimizer, folder, "route")
        save_arm(own, folder, mixture, workshop, "route")
    finally:
        mixture.detach()


def has_second_stage(recipe: Recipe, arm: str) -> bool:
    """Whether an arm's experts are assembled after fostering."""
    own = recipe.arm(arm)
    return not own.is_decoupled and own.assemble is not None and len(own.experts.scales) > 1


def is_assembled(recipe: Recipe, arm: str) -> bool:
    """Whether an arm's routers are trained."""
    return (arm_folder(recipe, arm) / "assemble" / "result.safetensors").is_file()


def _foster(recipe: Recipe, folder: Path, mixture: Mixture, workshop: Workshop) -> None:
    for stage in foster(mixture, build_foster_settings(recipe, workshop.family.text_encoders)):
        _run(recipe, stage, mixture, workshop, recipe.foster.optimizer, folder, "switch")


def _run(
    recipe: Recipe,
    stage: Stage,
    mixture: Mixture,
    workshop: Workshop,
    optimiser: OptimizerConfig,
    folder: Path,
    mode: Mode,
) -> None:
    with encoders_away(recipe, workshop):
        run_stage(
            stage,
            mixture,
            workshop.family,
            workshop.train,
            build_optimiser_settings(optimiser),
            build_loop_settings(recipe),
            folder / stage.name,
            stage_identity(recipe, workshop, stage),
            _observer(recipe, mixture, workshop, folder / stage.name, mode),
        )


def encoders_away(recipe: Recipe, workshop: Workshop) -> AbstractContextManager[None]:
    """While training, encoders whose work is cached are on the CPU; captions kept as tokens need the text encoders."""
    if not recipe.training.offload_encoders:
        return nullcontext()
    return workshop.family.encoders_on(torch.device("cpu"), with_text=not workshop.train.is_tokenised)


def stage_identity(recipe: Recipe, workshop: Workshop, stage: Stage) -> dict[str, Any]:
    """Whatever decides the bytes of a stage's result."""
    first = "foster" if recipe.distill is None else "distill"
    parts = {"seed", "experts", first} | ({"assemble"} if stage.name == "assemble" else set())
    document = recipe.model_dump(mode="json", include=parts)
    training = recipe.training.model_dump(
        include={"mixed_precision", "base_dtype", "base_quantization", "gradient_accumulation_steps"}
    )
    return {
        **document,
        **training,
        "base_model": recipe.pretrained_model_name_or_path,
        "caption_dropout": recipe.data.caption_dropout,
        "train_pictures": workshop.train.key,
    }


def _observer(recipe: Recipe, mixture: Mixture, workshop: Workshop, folder: Path, mode: Mode) -> Observer:
    """Validation loss per interval, and preview pictures through the whole pipeline, as far as training has come."""

    def observe(step: int, log: RunLog) -> None:
        settings = build_loss_settings(recipe, mixture.spec.strata)
        curve = loss_curve(workshop.family, workshop.validation, settings)
        values = {f"validation/{i}": curve.within(i) for i in settings.partition.intervals}
        log.write(step, {"validation/mean": curve.mean, **values})
        if recipe.training.preview_pictures:
            prompts = workshop.prompts[: recipe.training.preview_pictures]
            pipeline, device = workshop.family.pipeline(), workshop.family.device
            with mixture.using(mode), reencoding(pipeline, mixture), workshop.family.encoders_on(device):
                drawn = sample(pipeline, prompts, build_sample_settings(recipe, workshop.media))
            save_media_sheet(folder / "previews" / f"step-{step:06d}.png", drawn, prompts)

    return observe


def save_arm(
    recipe: Recipe,
    folder: Path,
    mixture: Mixture,
    workshop: Workshop,
    mode: Mode,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write an arm's bundle; ``sampling`` says how a generator draws (`DrawSettings`)."""
    provenance: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json", exclude={"arms", "output_dir"}),
        "versions": {
            "timestep_experts": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "stages": {
            path.name: _last_losses(path) for path in sorted(folder.iterdir()) if (path / "log.jsonl").is_file()
        },
    }
    if sampling is not None:
        provenance["sampling"] = dict(sampling)
    bundle = Bundle(
        spec=mixture.spec,
        target_modules=tuple(mixture.layers),
        tensors=mixture.state_dict(),
        mode=mode,
        base_model=recipe.pretrained_model_name_or_path,
        denoiser_class=type(workshop.family.denoiser).__name__,
        provenance=provenance,
    )
    save_bundle(bundle, folder / "bundle")


def _last_losses(folder: Path) -> Mapping[str, float]:
    last: dict[str, float] = {}
    for record in read_log(folder):
        last |= record
    return {name: value for name, value in last.items() if name != "seconds"}
