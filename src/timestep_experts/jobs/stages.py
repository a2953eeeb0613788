"""The run of one training stage: encoders out of the way, a fingerprint that guards its folder, and an observer."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from timestep_experts.build import RunContext, build_loop_settings, build_loss_settings
from timestep_experts.config import OptimizerConfig, Recipe
from timestep_experts.evaluation import loss_curve
from timestep_experts.formats.atomic import atomic_path
from timestep_experts.inference import SampleSettings, reencoding, sample
from timestep_experts.intervals import Partition
from timestep_experts.jobs.paths import RunPaths
from timestep_experts.jobs.samples import save_sample_sheet
from timestep_experts.mixture import Mixture, Mode
from timestep_experts.models import Family
from timestep_experts.training import Training
from timestep_experts.training.checkpoint import require_same_fingerprint
from timestep_experts.training.log import LOG, RunLog
from timestep_experts.training.loop import FINGERPRINT, RESULT, is_finished, run_stage, stored_fingerprint

_DECIDING = ("mixed_precision", "base_dtype", "base_quantization", "gradient_accumulation_steps", "not_finite")


@dataclass(frozen=True)
class Preview:
    """What is looked at while a stage trains.

    Args:
        family: the model as it is trained.
        sampling: how preview pictures are generated.
        partition: the intervals by which validation losses are logged; ``None`` logs none.
        observing: is open while losses are measured and pictures are generated.
        generating: is open while pictures are generated: it puts the model into the state in which it will be used.
    """

    family: Family
    sampling: SampleSettings
    partition: Partition | None
    observing: Callable[[], AbstractContextManager[None]] = nullcontext
    generating: Callable[[], AbstractContextManager[None]] = nullcontext


def preview_experts(
    context: RunContext, mixture: Mixture, mode: Mode, sampling: SampleSettings, partition: Partition | None
) -> Preview:
    """Look at experts: losses in the mode of their stage, pictures in the mode in which they will be used."""
    return Preview(context.family, sampling, partition, generating=lambda: _in_mode(context, mixture, mode))


def train_stage(
    recipe: Recipe,
    context: RunContext,
    training: Training,
    optimiser: OptimizerConfig,
    folder: Path,
    method: dict[str, Any],
    preview: Preview,
) -> None:
    """Run a stage in its folder, from where it stopped; what another variant has trained equally is taken from there.

    Args:
        recipe: of the run.
        context: base and pictures.
        training: the stage, what it changes, and the base around it.
        optimiser: its section.
        folder: of the stage.
        method: whatever of the method decides the bytes of the result.
        preview: what is looked at.

    Raises:
        UserError: see `run_stage`.
    """
    deciding = fingerprint(recipe, context, method)
    _take_from_another_variant(RunPaths(recipe.output_dir).variants, folder, deciding)
    with encoders_away(recipe, context):
        run_stage(
            training,
            context.train,
            build_loop_settings(recipe, optimiser),
            folder,
            deciding,
            lambda step, log: _observe(recipe, context, preview, folder, step, log),
        )


def _take_from_another_variant(variants: Path, folder: Path, deciding: Mapping[str, Any]) -> None:
    """Copy the finished stage of another variant that is the same by its fingerprint, unless this one has begun."""
    if not variants.is_dir() or stored_fingerprint(folder) is not None:
        return
    place = Path(*folder.relative_to(variants).parts[1:])
    wanted = json.loads(json.dumps(deciding))
    for other in sorted(variants.iterdir()):
        same = other / place
        if same != folder and is_finished(same) and stored_fingerprint(same) == wanted:
            with atomic_path(folder) as draft:
                draft.mkdir()
                for name in (RESULT, FINGERPRINT, LOG):
                    shutil.copyfile(same / name, draft / name)
            tqdm.write(f"{folder.name}: taken from {other.name}, which trained the same", sys.stderr)
            return


def fingerprint(recipe: Recipe, context: RunContext, method: dict[str, Any]) -> dict[str, Any]:
    """Whatever decides the bytes of a stage's result."""
    return {
        **method,
        **recipe.training.model_dump(include=set(_DECIDING)),
        "seed": recipe.seed,
        "base": context.base_sha256,
        "caption_dropout": recipe.data.caption_dropout,
        "train_pictures": context.train.key,
    }


def require_own_stages(recipe: Recipe, context: RunContext, stages: Mapping[Path, dict[str, Any]]) -> None:
    """See that what was trained already in a run's folders was trained as its recipe says now.

    Args:
        recipe: of the run.
        context: base and pictures.
        stages: whatever of the method decides the bytes of a stage, by its folder.

    Raises:
        UserError: a folder holds something else; names every value that differs.
    """
    for folder, method in stages.items():
        stored = stored_fingerprint(folder)
        if stored is not None:
            require_same_fingerprint(stored, fingerprint(recipe, context, method), folder)


def encoders_away(recipe: Recipe, context: RunContext) -> AbstractContextManager[None]:
    """While training, encoders whose work is cached are on the CPU; captions kept as tokens need the text encoders."""
    if not recipe.training.offload_encoders:
        return nullcontext()
    return context.family.encoders_on(torch.device("cpu"), with_text=not context.train.is_tokenised)


def _observe(recipe: Recipe, context: RunContext, preview: Preview, folder: Path, step: int, log: RunLog) -> None:
    """Write validation losses per interval, and generate preview pictures through the whole pipeline."""
    with preview.observing():
        if preview.partition is not None:
            curve = loss_curve(preview.family, context.validation, build_loss_settings(recipe, preview.partition))
            values = {f"validation/{interval}": curve.within(interval) for interval in preview.partition.intervals}
            log.write(step, {"validation/mean": curve.mean, **values})
        if recipe.training.preview_pictures:
            prompts = context.prompts[: recipe.training.preview_pictures]
            with preview.generating(), context.family.encoders_on(preview.family.device):
                pictures = sample(preview.family.pipeline(), prompts, preview.sampling)
            save_sample_sheet(folder / "previews" / f"step-{step:06d}.png", pictures, prompts)


@contextmanager
def _in_mode(context: RunContext, mixture: Mixture, mode: Mode) -> Iterator[None]:
    with mixture.using(mode), reencoding(context.family.pipeline(), mixture):
        yield
