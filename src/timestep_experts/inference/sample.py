"""Pictures or clips for a list of prompts, each from a seed of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from timestep_experts.errors import UserError
from timestep_experts.intervals import is_flow
from timestep_experts.models import sampling_options_of
from timestep_experts.models.noise import flow_options, have_one_schedule
from timestep_experts.models.video_crafter import ScaledSignalDDIMScheduler

_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are generated.

    Args:
        scheduler: the name of a diffusers scheduler; ``None`` keeps the pipeline's own.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 and below means none.
        size: height and width in pixels.
        batch_size: pictures at a time.
        seed: picture i starts from seed + i, whatever the batch size.
        num_frames: of a video pipeline; ``None`` for pictures.
        max_sequence_length: tokens of a T5; ``None`` keeps the pipeline's default.
        timesteps: t of each step, for a generator that was distilled at these; ``None`` lets the scheduler choose.
    """

    scheduler: str | None
    num_inference_steps: int
    guidance_scale: float
    size: tuple[int, int]
    batch_size: int
    seed: int
    num_frames: int | None = None
    max_sequence_length: int | None = None
    timesteps: tuple[int, ...] | None = None

    @property
    def call_options(self) -> dict[str, Any]:
        """What a pipeline is called with, beside prompts and seeds."""
        height, width = self.size
        options = {
            "height": height,
            "width": width,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "num_frames": self.num_frames,
            "max_sequence_length": self.max_sequence_length,
            "timesteps": None if self.timesteps is None else list(self.timesteps),
        }
        return {name: value for name, value in options.items() if value is not None}


def sample(
    pipeline: Any, prompts: Sequence[str], settings: SampleSettings, *, progress: str | None = "sampling"
) -> NDArray[np.uint8]:
    """Generate one picture, or with ``settings.num_frames`` one clip, per prompt.

    Args:
        pipeline: a diffusers text-to-image or text-to-video pipeline, with or without experts; its scheduler is put
            back afterwards. One that takes no prompts generates as many pictures of its own size: of the classes that
            the prompts number (DiT), or of anything (DDPM).
        prompts: N of them.
        settings: see `SampleSettings`.
        progress: title of the progress bar, ``None`` for no bar.

    Returns:
        ``(N, H, W, 3)``, of clips ``(N, F, H, W, 3)``, uint8, RGB.

    Raises:
        UserError: see `choose_scheduler`; or what is generated is not finite.
    """
    before = pipeline.scheduler
    scheduler = choose_scheduler(settings.scheduler, before)
    if settings.timesteps is None:
        require_steps(scheduler, settings.num_inference_steps)
    pipeline.scheduler = scheduler
    options = {**sampling_options_of(pipeline), **settings.call_options}
    unit = "picture" if settings.num_frames is None else "clip"
    generated = []
    try:
        with tqdm(total=len(prompts), desc=progress, unit=unit, disable=progress is None, leave=False) as bar:
            for start in range(0, len(prompts), settings.batch_size):
                batch = list(prompts[start : start + settings.batch_size])
                seeds = range(settings.seed + start, settings.seed + start + len(batch))
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                output = _call(pipeline, batch, {**options, "generator": generators, "output_type": "np"})
                signal = np.asarray(output.images if settings.num_frames is None else output.frames)
                _require_finite(signal, batch, pipeline)
                generated.append((signal * 255).round().astype(np.uint8))
                bar.update(len(batch))
    finally:
        pipeline.scheduler = before
    return np.concatenate(generated) if generated else np.zeros((0, *settings.size, 3), np.uint8)


def _call(pipeline: Any, prompts: list[str], options: dict[str, Any]) -> Any:
    """Call a pipeline by its own names for things."""
    accepted = inspect.signature(pipeline.__call__).parameters
    if "num_frames" not in accepted and "video_length" in accepted and "num_frames" in options:
        options = {**options, "video_length": options["num_frames"]}
    if "prompt" in accepted:
        return pipeline(prompt=prompts, **{n: v for n, v in options.items() if n != "num_frames" or n in accepted})
    if "class_labels" in accepted and not all(prompt.isdecimal() for prompt in prompts):
        raise UserError(
            f"a {type(pipeline).__name__} generates classes, so prompts must be their numbers; got {prompts}"
        )
    wanted = {"class_labels": [int(prompt) for prompt in prompts]} if "class_labels" in accepted else {}
    count = {} if wanted else {"batch_size": len(prompts)}
    return pipeline(**wanted, **count, **{name: value for name, value in options.items() if name in accepted})


def _require_finite(signal: NDArray[np.float32], prompts: Sequence[str], pipeline: Any) -> None:
    wrong = [prompt for prompt, values in zip(prompts, signal, strict=True) if not np.isfinite(values).all()]
    if wrong:
        raise UserError(
            f"what this {type(pipeline).__name__} generates for {wrong[0]!r} is not finite, and would be black;"
            f" {len(wrong)} of {len(prompts)} prompts are concerned. Half precision overflows in some bases, in the"
            " autoencoder of SDXL in fp16 for one: load it in fp32 or bf16. If it is finite in mode off, the experts"
            " have diverged"
        )


def choose_scheduler(name: str | None, own: Any) -> Any:
    """The scheduler of that name with a pipeline's noise schedule; ``None`` gives the pipeline's own.

    Raises:
        UserError: diffusers has none of that name, or it does not sample what the base was trained on.
    """
    if name is None:
        return own
    chosen = make_scheduler(name, {**own.config, **(flow_options(own) if is_flow(own) else {})})
    is_same = is_flow(chosen) if is_flow(own) else not is_flow(chosen) and have_one_schedule(own, chosen)
    if isinstance(own, ScaledSignalDDIMScheduler) or not is_same:
        allowed = "flow-matching ones" if is_flow(own) else "DDPM-like ones that know its noise schedule"
        allowed = "none but its own" if isinstance(own, ScaledSignalDDIMScheduler) else allowed
        raise UserError(
            f"{name} does not sample what this base was trained on: it comes with a {type(own).__name__}; allowed are"
            f" {allowed}, and null for its own"
        )
    return chosen


def require_steps(scheduler: Any, num_inference_steps: int) -> None:
    """See that a scheduler can take so many steps.

    Raises:
        UserError: it cannot; says why.
    """
    if scheduler.config.get("use_dynamic_shifting"):  # its steps depend on the size of a picture
        return
    tried, sample = deepcopy(scheduler), torch.zeros(1, 4, 8, 8)
    try:
        tried.set_timesteps(num_inference_steps)
        tried.step(sample, tried.timesteps[0], sample)
    except Exception as error:  # schedulers raise many kinds
        raise UserError(
            f"{type(scheduler).__name__} cannot take {num_inference_steps} steps here: {error or type(error).__name__}"
        ) from error


def make_scheduler(name: str, config: Any) -> Any:
    """A diffusers scheduler by name, with another one's noise schedule.

    Raises:
        UserError: there is none of that name.
    """
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        known = sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax"))
        raise UserError(f"diffusers has no scheduler {name!r}; it has {', '.join(known)}")
    # diffusers gives the new class its own value of whatever the other one had by default: right for ways to sample,
    # not for what the model was trained with
    defaults = [key for key in config.get("_use_default_values", ()) if key not in _NOISE_SCHEDULE]
    try:
        return kind.from_config({**config, "_use_default_values": defaults})
    except Exception as error:  # schedulers raise many kinds, missing libraries among them
        raise UserError(f"{name} cannot be made for this noise schedule: {error}") from error
