"""Measure every arm in every mode with the same pictures, noise, prompts and seeds; write the report."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import TypeAdapter

from timestep_experts import __version__
from timestep_experts.build import (
    Workshop,
    build_loss_settings,
    build_sample_settings,
    build_spec,
)
from timestep_experts.config import Recipe
from timestep_experts.data import ClipSettings, decode_all
from timestep_experts.evaluation import (
    LossSettings,
    Result,
    frechet_distance,
    gate_map,
    judge_features,
    judge_pictures,
    loss_curve,
)
from timestep_experts.formats import load_bundle
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.inference import attach, detach, sample
from timestep_experts.intervals import Partition
from timestep_experts.jobs.distill_settings import build_generator_sample_settings
from timestep_experts.jobs.media import (
    SHEET,
    as_pictures,
    frames_per_second,
    load_media,
    save_media,
    save_media_sheet,
)
from timestep_experts.jobs.train import arm_folder, has_second_stage
from timestep_experts.mixture import Mixture, Mode, ParameterCount
from timestep_experts.report import ReportContent, write_report
from timestep_experts.training.log import read_log

BASE = "base"
NUM_SHOWN = 12
_RESULT = TypeAdapter(Result)
_RESULT_LIST = TypeAdapter(list[Result])


def evaluate(recipe: Recipe, workshop: Workshop) -> list[Result]:
    """Measure the base and every trained arm; what is measured already is read back.

    Raises:
        ValueError: an arm has no bundle yet.
    """
    settings = build_loss_settings(recipe, reported_partition(recipe, workshop))
    for arm in recipe.arm_names:
        load_bundle(arm_folder(recipe, arm) / "bundle")  # fails before minutes of sampling
    rows: list[tuple[str, Mode]] = [
        (BASE, "off"),
        *((arm, mode) for arm in recipe.arm_names for mode in _modes(recipe, arm)),
    ]
    return [_measure(recipe, workshop, settings, arm, mode) for arm, mode in rows]


def reported_partition(recipe: Recipe, workshop: Workshop) -> Partition:
    """The main arm's finest intervals: the same for all rows."""
    return build_spec(recipe.experts, workshop.family.noise.num_train_timesteps).strata


def write_run_report(recipe: Recipe, workshop: Workshop, results: Sequence[Result], command: str) -> Path:
    """Write ``report.html`` and ``results.json``; returns the report's path."""
    pictures: dict[str, NDArray[np.uint8]] = {}
    if recipe.evaluation.prompts is None:  # then prompts are captions of validation pictures
        pictures["real"] = _references(workshop)[:NUM_SHOWN]
    for result in results:
        shown = load_media(_folder(recipe, result.arm, result.mode) / "pictures", NUM_SHOWN, workshop.media)
        if len(shown):
            pictures[result.label] = shown
    content = ReportContent(
        title=recipe.output_dir.name,
        recipe_yaml=yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False),
        command=command,
        results=results,
        intervals=reported_partition(recipe, workshop).intervals,
        training_logs=_training_logs(recipe),
        prompts=workshop.prompts[:NUM_SHOWN],
        pictures=pictures if workshop.prompts else {},
        notes=_notes(recipe, workshop),
        skipped=[(item.place, item.reason) for item in workshop.train.skipped + workshop.validation.skipped],
        environment=_environment(),
    )
    path = recipe.output_dir / "report.html"
    write_report(path, content)
    write_json(recipe.output_dir / "results.json", _RESULT_LIST.dump_python(list(results), mode="json"))
    return path


def _modes(recipe: Recipe, arm: str) -> tuple[Mode, ...]:
    if has_second_stage(recipe, arm):
        return recipe.arm(arm).modes
    return ("switch",)


def _folder(recipe: Recipe, arm: str, mode: str) -> Path:
    return recipe.output_dir / "evaluation" / f"{arm}-{mode}"


def _measure(recipe: Recipe, workshop: Workshop, settings: LossSettings, arm: str, mode: Mode) -> Result:
    folder = _folder(recipe, arm, mode)
    identity = _identity(recipe, workshop, settings, arm)
    stored = folder / "result.json"
    if stored.is_file():
        document = json.loads(stored.read_text(encoding="utf-8"))
        if document["identity"] == identity:
            return _RESULT.validate_python(document["result"])
    mixture = None
    if arm != BASE:
        mixture = attach(workshop.family.pipeline(), arm_folder(recipe, arm) / "bundle", mode)
    try:
        result, pictures = _measure_attached(recipe, workshop, settings, arm, mode, mixture)
    finally:
        if mixture is not None:
            detach(workshop.family.pipeline())
    with atomic_path(folder) as draft:
        draft.mkdir(parents=True)
        if len(pictures):
            names = [f"{index:04d}" for index in range(len(pictures))]
            save_media(draft / "pictures", pictures, names, frames_per_second(workshop.media))
            save_media_sheet(draft / SHEET, pictures[:16], workshop.prompts[:16])
        write_json(draft / "result.json", {"identity": identity, "result": _RESULT.dump_python(result, mode="json")})
    return result


def _measure_attached(
    recipe: Recipe, workshop: Workshop, settings: LossSettings, arm: str, mode: Mode, mixture: Mixture | None
) -> tuple[Result, NDArray[np.uint8]]:
    family = workshop.family
    curve = loss_curve(family, workshop.validation, settings)
    drawing = build_sample_settings(recipe, workshop.media)
    if arm != BASE:
        drawing = build_generator_sample_settings(recipe.arm(arm), workshop.media)
    pictures = sample(family.pipeline(), workshop.prompts, drawing, progress=f"{arm}, {mode}")
    frechet = None
    if len(pictures) > 1:
        real = judge_features(as_pictures(_references(workshop)))
        frechet = frechet_distance(judge_features(as_pictures(pictures)), real)
    trained, samples, seconds = _training_totals(recipe, arm, mode, mixture)
    counted = mixture.count_parameters() if mixture is not None else ParameterCount(0, 0, 0)
    result = Result(
        arm=arm,
        mode=mode,
        curve=curve,
        interval_losses=tuple(curve.within(interval) for interval in settings.partition.intervals),
        verdict=judge_pictures(pictures, workshop.prompts) if workshop.is_judged else None,
        frechet=frechet,
        parameters=ParameterCount(counted.stored if mode == "route" else trained, counted.active, trained),
        num_images_seen=samples,
        seconds=seconds,
        gates=tuple(gate_map(family, mixture, workshop.validation, settings)) if mixture and mode == "route" else (),
    )
    return result, pictures


def _training_totals(recipe: Recipe, arm: str, mode: Mode, mixture: Mixture | None) -> tuple[int, int, float]:
    """Parameters trained, samples seen and seconds spent for an arm in one mode.

    What switching does not use does not count for it: routers, and contexts that rest at gate 0.
    """
    if mixture is None:
        return 0, 0, 0.0
    scales = [scale for scale in mixture.spec.scales if mode == "route" or scale.constant_gate]
    trained = sum(p.numel() for scale in scales for stack in mixture.stacks(scale.name) for p in stack.parameters())
    if mode == "route":
        trained += sum(p.numel() for group in mixture.router_parameters() for p in group)
    left_out = [scale.name for scale in mixture.spec.scales if scale not in scales]
    unused = {f"foster-{name}" for name in left_out}
    if recipe.arm(arm).foster.method == "coarse_to_fine":
        unused = set()  # the coarse experts live on in the fine ones
    unused |= {"assemble"} if mode == "switch" else set()
    samples, seconds = 0, 0.0
    for folder in _stage_folders(recipe, arm):
        if folder.name not in unused and not folder.name.startswith(tuple(f"distill-{name}." for name in left_out)):
            records = [record for record in read_log(folder) if "num_images_seen" in record]
            samples += int(records[-1]["num_images_seen"])
            seconds += sum(record["seconds"] for record in records)
    return trained, samples, seconds


def _stage_folders(recipe: Recipe, arm: str) -> list[Path]:
    folders = arm_folder(recipe, arm).glob("*/result.safetensors")
    return sorted(path.parent for path in folders)


def _training_logs(recipe: Recipe) -> dict[str, list[dict[str, float]]]:
    return {
        f"{arm}, {folder.name}": read_log(folder) for arm in recipe.arm_names for folder in _stage_folders(recipe, arm)
    }


def _identity(recipe: Recipe, workshop: Workshop, settings: LossSettings, arm: str) -> dict[str, Any]:
    """Whatever decides a measurement."""
    tensors = arm_folder(recipe, arm) / "bundle" / "mixture.safetensors"
    distilled = None if arm == BASE else recipe.arm(arm).distill
    return {
        **({} if distilled is None else {"timesteps": list(distilled.timesteps)}),
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "intervals": list(settings.partition.boundaries),
        "media": repr(workshop.media),
        "base_model": recipe.pretrained_model_name_or_path,
        "base": recipe.training.model_dump(include={"base_dtype", "base_quantization"}),
        "prompts": list(workshop.prompts),
        "validation_pictures": workshop.validation.key,
        "bundle": hashlib.sha256(tensors.read_bytes()).hexdigest() if tensors.is_file() else None,
    }


def _references(workshop: Workshop) -> NDArray[np.uint8]:
    """The validation pictures whose captions are prompts, one per prompt and in that order, then the others."""
    rest = {id(example): example for example in workshop.references.examples}
    ordered = []
    for prompt in workshop.prompts:
        match = next((example for example in rest.values() if example.caption == prompt), None)
        if match is not None:
            ordered.append(rest.pop(id(match)))
    return decode_all([*ordered, *rest.values()], workshop.media)


def _notes(recipe: Recipe, workshop: Workshop) -> list[str]:
    evaluation = recipe.evaluation
    notes = [
        f"One seed ({recipe.seed}). All rows meet the same validation pictures, timesteps and noise, and draw pictures"
        f" from the same {len(workshop.prompts)} prompts and seeds ({evaluation.scheduler or 'its own scheduler'},"
        f" {evaluation.num_inference_steps} steps, guidance {evaluation.guidance_scale:g}).",
        "Validation captions occur in no training picture.",
        "Parameters and samples are those of what the mode uses: switching counts neither routers nor contexts that"
        " rest at gate 0.",
    ]
    if any(recipe.arm(arm).distill for arm in recipe.arm_names):
        notes.append(
            "Distilled arms draw in their own few steps without guidance, whatever the base is drawn with. Their"
            " validation loss is that of a denoiser, which a generator is no longer: judge them by their pictures."
        )
    if workshop.prompts:
        notes.append(
            "Frechet distance is measured in the features of the embedded world's judge"
            + (", frame by frame" if isinstance(workshop.media, ClipSettings) else "")
            + ": a ruler for this table, not comparable with an Inception FID."
        )
    return notes


def _environment() -> Mapping[str, str]:
    return {
        "timestep-experts": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
