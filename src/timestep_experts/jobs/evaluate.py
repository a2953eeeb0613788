"""Measure every arm in every mode with the same pictures, noise, prompts and seeds; write the report."""

from __future__ import annotations

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
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.formats.checkpoints import file_sha256
from timestep_experts.inference import sample
from timestep_experts.jobs.distill_settings import build_generator_sample_settings
from timestep_experts.jobs.media import (
    SHEET,
    as_pictures,
    frames_per_second,
    load_media,
    save_media,
    save_media_sheet,
)
from timestep_experts.jobs.rows import BASE, Row, count_costs, modes_of, stage_folders
from timestep_experts.jobs.train import reported_partition
from timestep_experts.mixture import Mixture
from timestep_experts.report import ReportContent, write_report
from timestep_experts.training.log import read_log

NUM_SHOWN = 12
_RESULT = TypeAdapter(Result)
_RESULT_LIST = TypeAdapter(list[Result])


def evaluate(recipe: Recipe, workshop: Workshop) -> list[Result]:
    """Measure the base and every trained arm; what is measured already is read back.

    Raises:
        ValueError: an arm has no bundle yet.
    """
    settings = build_loss_settings(recipe, reported_partition(recipe, workshop))
    rows = [Row(recipe, BASE, "off"), *(Row(recipe, a, m) for a in recipe.arm_names for m in modes_of(recipe, a))]
    for row in rows:
        row.check()  # fails before minutes of sampling
    return [_measure(recipe, workshop, settings, row) for row in rows]


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


def _folder(recipe: Recipe, arm: str, mode: str) -> Path:
    return recipe.output_dir / "evaluation" / f"{arm}-{mode}"


def _measure(recipe: Recipe, workshop: Workshop, settings: LossSettings, row: Row) -> Result:
    folder = _folder(recipe, row.arm, row.mode)
    identity = _identity(recipe, workshop, settings, row)
    stored = folder / "result.json"
    if stored.is_file():
        document = json.loads(stored.read_text(encoding="utf-8"))
        if document["identity"] == identity:
            return _RESULT.validate_python(document["result"])
    with row.on(workshop.family) as mixture:
        result, pictures = _measure_attached(recipe, workshop, settings, row, mixture)
    with atomic_path(folder) as draft:
        draft.mkdir(parents=True)
        if len(pictures):
            names = [f"{index:04d}" for index in range(len(pictures))]
            save_media(draft / "pictures", pictures, names, frames_per_second(workshop.media))
            save_media_sheet(draft / SHEET, pictures[:16], workshop.prompts[:16])
        write_json(draft / "result.json", {"identity": identity, "result": _RESULT.dump_python(result, mode="json")})
    return result


def _measure_attached(
    recipe: Recipe, workshop: Workshop, settings: LossSettings, row: Row, mixture: Mixture | None
) -> tuple[Result, NDArray[np.uint8]]:
    family, arm, mode = workshop.family, row.arm, row.mode
    curve = loss_curve(family, workshop.validation, settings)
    drawing = build_sample_settings(recipe, workshop.media)
    if arm != BASE:
        drawing = build_generator_sample_settings(recipe.arm(arm), workshop.media)
    pictures = sample(family.pipeline(), workshop.prompts, drawing, progress=f"{arm}, {mode}")
    frechet = None
    if len(pictures) > 1:
        real = judge_features(as_pictures(_references(workshop)))
        frechet = frechet_distance(judge_features(as_pictures(pictures)), real)
    costs = count_costs(row, family, mixture)
    result = Result(
        arm=arm,
        mode=mode,
        curve=curve,
        interval_losses=tuple(curve.within(interval) for interval in settings.partition.intervals),
        verdict=judge_pictures(pictures, workshop.prompts) if workshop.is_judged else None,
        frechet=frechet,
        parameters=costs.parameters,
        num_images_seen=costs.num_images_seen,
        seconds=costs.seconds,
        gates=tuple(gate_map(family, mixture, workshop.validation, settings)) if mixture and mode == "route" else (),
    )
    return result, pictures


def _training_logs(recipe: Recipe) -> dict[str, list[dict[str, float]]]:
    return {
        f"{arm}, {folder.name}": read_log(folder) for arm in recipe.arm_names for folder in stage_folders(recipe, arm)
    }


def _identity(recipe: Recipe, workshop: Workshop, settings: LossSettings, row: Row) -> dict[str, Any]:
    """Whatever decides a measurement."""
    distilled = None if row.arm == BASE else recipe.arm(row.arm).distill
    return {
        **({} if distilled is None else {"timesteps": list(distilled.timesteps)}),
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "intervals": list(settings.partition.boundaries),
        "media": repr(workshop.media),
        "base_model": recipe.pretrained_model_name_or_path,
        "base": recipe.training.model_dump(include={"base_dtype", "base_quantization"}),
        "prompts": list(workshop.prompts),
        "validation_pictures": workshop.validation.key,
        "weights": [file_sha256(file) for file in row.files()],
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
    arms = [recipe.arm(arm) for arm in recipe.arm_names]
    if any(arm.is_decoupled for arm in arms):
        notes.append(
            "Decoupled copies switch as an ensemble. They take the base's place, so none of their parameters is active"
            " on top of it; stored is what must be kept of them."
        )
    if any(arm.merge for arm in arms):
        notes.append(
            "Merged rows are one ordinary denoiser or LoRA. Their weights were chosen by the loss on training pictures,"
            " so these validation pictures took no part in it."
        )
    if any(arm.distill for arm in arms):
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
