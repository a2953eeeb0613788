"""Distil the arms of a recipe into few-step generators. The same call goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open

from timestep_experts.build import (
    Workshop,
    build_assemble_settings,
    build_loop_settings,
    build_mixture,
    build_optimiser_settings,
)
from timestep_experts.config import OptimizerConfig, Recipe
from timestep_experts.inference import sample
from timestep_experts.jobs.distill_settings import build_distill_settings, build_generator_sample_settings
from timestep_experts.jobs.media import save_media_sheet
from timestep_experts.jobs.train import arm_folder, encoders_away, is_assembled, save_arm, stage_identity
from timestep_experts.mixture import Mixture, Mode
from timestep_experts.models import Family
from timestep_experts.training.checkpoint import require_same_identity
from timestep_experts.training.distill import DistillSettings, DistillStage, distill, distill_router
from timestep_experts.training.log import RunLog
from timestep_experts.training.loop import Observer, run_stage

_RESULT = "result.safetensors"


def is_distilled(recipe: Recipe, arm: str) -> bool:
    """Whether an arm's experts are distilled, not fostered."""
    return recipe.arm(arm).distill is not None


def distill_arm(recipe: Recipe, arm: str, workshop: Workshop, experts: Sequence[str] = ()) -> bool:
    """Distil the experts of one arm; writes its bundle, for switching, as soon as all of them are there.

    Args:
        recipe: of the run.
        arm: its name.
        workshop: base and pictures.
        experts: only these, ``<scale>.<index>``; none means all.

    Returns:
        Whether all experts are there.

    Raises:
        ValueError: no such expert, one whose inputs come from experts that are not there yet, or a base that cannot be
            distilled.
    """
    own, folder = recipe.arm(arm), arm_folder(recipe, arm)
    mixture = build_mixture(own, workshop.family)
    try:
        stages = distill(mixture, workshop.family, settings_of(own, workshop.family))
        _train_experts(own, folder, stages, _chosen(stages, experts), mixture, workshop)
        is_whole = not _unfinished(folder, stages)
        if is_whole and not is_assembled(recipe, arm):
            save_arm(own, folder, mixture, workshop, "switch", _sampling(own, workshop))
        return is_whole
    finally:
        mixture.detach()


def distill_router_arm(recipe: Recipe, arm: str, workshop: Workshop) -> None:
    """Train the routers of a distilled arm and write its bundle, for routing.

    Raises:
        ValueError: the arm has not been distilled, or has nothing to assemble.
    """
    own, folder = recipe.arm(arm), arm_folder(recipe, arm)
    assembling = build_assemble_settings(own)
    mixture = build_mixture(own, workshop.family)
    try:
        settings = settings_of(own, workshop.family)
        stages = distill(mixture, workshop.family, settings)
        if missing := _unfinished(folder, stages):
            raise ValueError(f"arm {arm!r} is not distilled yet ({', '.join(missing)} missing in {folder})")
        _train_experts(own, folder, stages, set(), mixture, workshop)
        del stages  # and with them the copy of the base that they share
        assert own.assemble is not None  # its settings were built
        router = distill_router(mixture, workshop.family, settings, assembling)
        _run(own, folder, router, own.assemble.optimizer, mixture, workshop, "route")
        save_arm(own, folder, mixture, workshop, "route", _sampling(own, workshop))
    finally:
        mixture.detach()


def settings_of(recipe: Recipe, family: Family) -> DistillSettings:
    """`DistillSettings` for latents of this base."""
    return build_distill_settings(recipe, int(getattr(family.parts, "vae_scale_factor", 1)))


def _chosen(stages: Iterable[DistillStage], experts: Sequence[str]) -> set[str]:
    known = dict.fromkeys(item.expert for item in stages)
    for name in experts:
        if name not in known:
            raise ValueError(f"--expert {name}: there is none of that name; this arm has {', '.join(known)}")
    return set(experts or known)


def _train_experts(
    recipe: Recipe, folder: Path, stages: list[DistillStage], wanted: set[str], mixture: Mixture, workshop: Workshop
) -> None:
    """Train those that are wanted; of all others take what is there."""
    assert recipe.distill is not None  # its stages were made
    last_of = {item.expert: item for item in stages}
    for item in stages:
        is_last = item is last_of[item.expert]
        if (folder / last_of[item.expert].stage.name / _RESULT).is_file():
            if is_last:
                _load_generator(folder, item, stage_identity(recipe, workshop, item.stage))
        elif item.expert in wanted:
            if recipe.distill.inputs == "backsim":
                _require_earlier(folder, stages, item)
            _run(recipe, folder, item, recipe.distill.optimizer, mixture, workshop, "switch")


def _require_earlier(folder: Path, stages: Sequence[DistillStage], item: DistillStage) -> None:
    scale = item.expert.rpartition(".")[0]
    names = [other.expert for other in stages]
    earlier = [other for other in stages[: names.index(item.expert)] if other.expert.rpartition(".")[0] == scale]
    if missing := _unfinished(folder, earlier):
        raise ValueError(
            f"expert {item.expert} learns from what the experts before it draw, and {', '.join(missing)} is missing in"
            f" {folder}; distil those first, or set distill.inputs to real"
        )


def _unfinished(folder: Path, stages: Iterable[DistillStage]) -> list[str]:
    return [item.stage.name for item in stages if not (folder / item.stage.name / _RESULT).is_file()]


def _load_generator(folder: Path, item: DistillStage, identity: Mapping[str, Any]) -> None:
    """Only the expert of a finished stage: nobody goes on with its fake score."""
    place = folder / item.stage.name
    stored = json.loads((place / "identity.json").read_text(encoding="utf-8"))
    require_same_identity(stored, identity, place)
    with safe_open(place / _RESULT, "pt") as opened:
        for name, tensor in item.trainee.own.items():
            tensor.copy_(opened.get_tensor(f"generator.{name}"))


def _run(
    recipe: Recipe,
    folder: Path,
    item: DistillStage,
    optimiser: OptimizerConfig,
    mixture: Mixture,
    workshop: Workshop,
    mode: Mode,
) -> None:
    with encoders_away(recipe, workshop):
        run_stage(
            item.stage,
            item.trainee,
            workshop.family,
            workshop.train,
            build_optimiser_settings(optimiser),
            build_loop_settings(recipe),
            folder / item.stage.name,
            stage_identity(recipe, workshop, item.stage),
            _observer(recipe, mixture, workshop, folder / item.stage.name, mode),
        )


def _observer(recipe: Recipe, mixture: Mixture, workshop: Workshop, folder: Path, mode: Mode) -> Observer:
    """Preview pictures by all steps; steps whose expert is not trained yet are the base's."""

    def observe(step: int, _log: RunLog) -> None:
        if recipe.training.preview_pictures:
            prompts = workshop.prompts[: recipe.training.preview_pictures]
            with mixture.using(mode), workshop.family.encoders_on(workshop.family.device):
                settings = build_generator_sample_settings(recipe, workshop.media)
                drawn = sample(workshop.family.pipeline(), prompts, settings)
            save_media_sheet(folder / "previews" / f"step-{step:06d}.png", drawn, prompts)

    return observe


def _sampling(recipe: Recipe, workshop: Workshop) -> dict[str, Any]:
    settings = asdict(build_generator_sample_settings(recipe, workshop.media))
    return {name: settings[name] for name in ("scheduler", "timesteps", "guidance_scale")}
