"""Measure every variant in every mode with the same pictures, noise, prompts and seeds; write the report."""

from __future__ import annotations

import json
import math
import platform
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from timestep_experts.build import RunContext, build_loss_settings, build_reported_partition
from timestep_experts.config import Recipe
from timestep_experts.data import ClipSettings, decode_all
from timestep_experts.errors import UserError
from timestep_experts.evaluation import (
    LossSettings,
    Result,
    frechet_distance,
    gate_map,
    judge_features,
    judge_pictures,
    loss_curve,
)
from timestep_experts.formats import tool_versions
from timestep_experts.formats.atomic import atomic_path, write_json, write_text
from timestep_experts.formats.checkpoints import file_sha256
from timestep_experts.formats.locks import only_process_in
from timestep_experts.formats.sealed import DamagedError, read_sealed_json, write_sealed_json
from timestep_experts.formats.yaml_text import yaml_text
from timestep_experts.inference import sample
from timestep_experts.intervals import Partition
from timestep_experts.jobs.methods import BaseCandidate, Candidate, Method, methods_of
from timestep_experts.jobs.paths import RunPaths
from timestep_experts.jobs.samples import (
    SHEET,
    as_pictures,
    frames_per_second,
    load_samples,
    save_sample_sheet,
    save_samples,
)
from timestep_experts.jobs.stages import require_own_stages
from timestep_experts.mixture import Mixture
from timestep_experts.report import ReportContent, write_report
from timestep_experts.training.log import read_log
from timestep_experts.training.loop import is_finished

NUM_SHOWN = 12
_RESULT = TypeAdapter(Result)
_RESULT_LIST = TypeAdapter(list[Result])


def prepare_output(recipe: Recipe) -> None:
    """Write the resolved recipe beside the results."""
    write_text(RunPaths(recipe.output_dir).recipe, yaml_text(recipe.model_dump(mode="json")))


def require_same_run(recipe: Recipe, context: RunContext, methods: Sequence[Method]) -> None:
    """See that what the folder of a run holds of these methods was trained as the recipe says now.

    Raises:
        UserError: something was trained with other settings; names every value that differs.
    """
    for method in methods:
        require_own_stages(recipe, context, method.stages())


def evaluate(recipe: Recipe, context: RunContext) -> list[Result]:
    """Measure the base and every trained variant; what is measured already is read back.

    Raises:
        UserError: a variant is not trained yet, or was trained by another recipe, or what it says is not finite.
    """
    methods = methods_of(recipe)
    require_same_run(recipe, context, methods)
    settings = build_loss_settings(recipe, _partition(recipe, context))
    rows: list[Candidate] = [BaseCandidate(recipe)]
    rows += [candidate for method in methods for candidate in method.candidates()]
    for row in rows:
        row.check()  # fails before minutes of sampling
    with only_process_in(RunPaths(recipe.output_dir).evaluations):
        return [_measure(recipe, context, settings, row) for row in rows]


def write_run_report(recipe: Recipe, context: RunContext, results: Sequence[Result], command: str) -> Path:
    """Write ``report.html`` and ``results.json``; returns the report's path."""
    paths = RunPaths(recipe.output_dir)
    pictures: dict[str, NDArray[np.uint8]] = {}
    if recipe.evaluation.prompts is None:  # then prompts are captions of validation pictures
        pictures["real"] = _references(context)[:NUM_SHOWN]
    for result in results:
        shown = load_samples(paths.evaluation(result.variant, result.mode) / "pictures", NUM_SHOWN, context.decoding)
        if len(shown):
            pictures[result.label] = shown
    content = ReportContent(
        title=recipe.output_dir.name,
        recipe_yaml=yaml_text(recipe.model_dump(mode="json", exclude_unset=True)),
        command=command,
        results=results,
        intervals=_partition(recipe, context).intervals,
        training_logs=_training_logs(recipe),
        prompts=context.prompts[:NUM_SHOWN],
        pictures=pictures if context.prompts else {},
        notes=_notes(recipe, context),
        skipped=[(item.place, item.reason) for item in context.train.skipped + context.validation.skipped],
        environment=_environment(),
    )
    write_report(paths.report, content)
    write_json(paths.results, _RESULT_LIST.dump_python(list(results), mode="json"))
    return paths.report


def _partition(recipe: Recipe, context: RunContext) -> Partition:
    return build_reported_partition(recipe, context.family.noise.num_train_timesteps)


def _measure(recipe: Recipe, context: RunContext, settings: LossSettings, row: Candidate) -> Result:
    folder = RunPaths(recipe.output_dir).evaluation(row.variant, row.mode)
    deciding = _fingerprint(recipe, context, settings, row)
    stored = folder / "result.json"
    if stored.is_file():
        try:
            document = read_sealed_json(stored)
            if document["fingerprint"] == json.loads(json.dumps(deciding)):
                return _RESULT.validate_python(document["result"])
        except DamagedError as error:
            warnings.warn(f"{error}. It is measured again", stacklevel=2)
    with row.on(context.family) as mixture:
        result, pictures = _measure_attached(context, settings, row, mixture)
    with atomic_path(folder) as draft:
        draft.mkdir(parents=True)
        if len(pictures):
            names = [f"{index:04d}" for index in range(len(pictures))]
            save_samples(draft / "pictures", pictures, names, frames_per_second(context.decoding))
            save_sample_sheet(draft / SHEET, pictures[:16], context.prompts[:16])
        document = {"fingerprint": deciding, "result": _RESULT.dump_python(result, mode="json")}
        write_sealed_json(draft / "result.json", document)
    return result


def _measure_attached(
    context: RunContext, settings: LossSettings, row: Candidate, mixture: Mixture | None
) -> tuple[Result, NDArray[np.uint8]]:
    family, is_routed = context.family, row.mode == "route"
    curve = loss_curve(family, context.validation, settings)
    if not math.isfinite(curve.mean):
        raise UserError(f"the losses of {row.variant} in mode {row.mode} are not finite: what it trained has diverged")
    sampling = row.sampling(context.decoding)
    pictures = sample(family.pipeline(), context.prompts, sampling, progress=f"{row.variant}, {row.mode}")
    costs = row.costs(family, mixture)
    result = Result(
        variant=row.variant,
        mode=row.mode,
        curve=curve,
        interval_losses=tuple(curve.within(interval) for interval in settings.partition.intervals),
        verdict=judge_pictures(pictures, context.prompts) if context.is_judged else None,
        frechet=_frechet(as_pictures(pictures), context) if len(pictures) > 1 else None,
        parameters=costs.parameters,
        num_images_seen=costs.num_images_seen,
        seconds=costs.seconds,
        gates=tuple(gate_map(family, mixture, context.validation, settings)) if mixture and is_routed else (),
    )
    return result, pictures


def _frechet(generated: NDArray[np.uint8], context: RunContext) -> float | None:
    """The Frechet distance to the validation pictures; ``None`` where either side has a single picture."""
    real = as_pictures(_references(context))
    if min(len(generated), len(real)) < 2:
        return None
    return frechet_distance(judge_features(generated), judge_features(real))


def _training_logs(recipe: Recipe) -> dict[str, list[dict[str, float]]]:
    return {
        f"{method.variant.name}, {folder.name}": read_log(folder)
        for method in methods_of(recipe)
        for folder in filter(is_finished, method.stages())
    }


def _fingerprint(recipe: Recipe, context: RunContext, settings: LossSettings, row: Candidate) -> dict[str, Any]:
    """A fingerprint of whatever decides what a measurement says."""
    timesteps = row.sampling(context.decoding).timesteps
    return {
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "timesteps": None if timesteps is None else list(timesteps),
        "intervals": list(settings.partition.boundaries),
        "decoding": repr(context.decoding),
        "base_sha256": context.base_sha256,
        "base": recipe.training.model_dump(include={"base_dtype", "base_quantization"}),
        "prompts": list(context.prompts),
        "validation_pictures": context.validation.key,
        "weights": [file_sha256(file) for file in row.files()],
    }


def _references(context: RunContext) -> NDArray[np.uint8]:
    """The validation pictures whose captions are prompts, one per prompt and in that order, then the others."""
    rest = {id(example): example for example in context.references.examples}
    ordered = []
    for prompt in context.prompts:
        match = next((example for example in rest.values() if example.caption == prompt), None)
        if match is not None:
            ordered.append(rest.pop(id(match)))
    return decode_all([*ordered, *rest.values()], context.decoding)


def _notes(recipe: Recipe, context: RunContext) -> list[str]:
    evaluation = recipe.evaluation
    notes = [
        f"One seed ({recipe.seed}). All rows meet the same validation pictures, timesteps and noise, and generate"
        f" pictures from the same {len(context.prompts)} prompts and seeds"
        f" ({evaluation.scheduler or 'its own scheduler'},"
        f" {evaluation.num_inference_steps} steps, guidance {evaluation.guidance_scale:g}).",
        "Validation captions occur in no training picture."
        if not context.shares_captions
        else "Training pictures have some of the captions of validation pictures.",
        "Parameters and samples are those of what the mode uses: switching counts neither routers nor contexts"
        " of base gate 0.",
    ]
    notes += dict.fromkeys(note for method in methods_of(recipe) for note in method.notes())
    if any(variant.merge for variant in recipe.all_variants):
        notes.append(
            "Merged rows are one ordinary denoiser or LoRA. Their weights were chosen by the loss on training pictures,"
            " so these validation pictures took no part in it."
        )
    if context.prompts:
        notes.append(
            "Frechet distance is measured in the features of the embedded world's judge"
            + (", frame by frame" if isinstance(context.decoding, ClipSettings) else "")
            + ": a ruler for this table, not comparable with an Inception FID."
        )
    return notes


def _environment() -> Mapping[str, str]:
    return {
        **tool_versions(),
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
