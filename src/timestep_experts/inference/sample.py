"""Pictures for a list of prompts, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from timestep_experts.models.video_crafter import ScaledSignalDDIMScheduler


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn.

    Args:
        scheduler: the name of a diffusers scheduler; ``None`` keeps the pipeline's own.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 and below means none.
        resolution: side in pixels.
        batch_size: pictures at a time.
        seed: picture i starts from seed + i, whatever the batch size.
    """

    scheduler: str | None
    num_inference_steps: int
    guidance_scale: float
    resolution: int
    batch_size: int
    seed: int


def sample(
    pipeline: Any, prompts: Sequence[str], settings: SampleSettings, *, progress: str | None = "sampling"
) -> NDArray[np.uint8]:
    """Draw one picture per prompt.

    Args:
        pipeline: a diffusers text-to-image pipeline, with or without experts; its scheduler is put back afterwards.
        prompts: N of them.
        settings: see there.
        progress: title of the progress bar, ``None`` for no bar.

    Returns:
        ``(N, resolution, resolution, 3)`` uint8, RGB.

    Raises:
        ValueError: see `choose_scheduler`.
    """
    before = pipeline.scheduler
    pipeline.scheduler = choose_scheduler(settings.scheduler, before)
    pictures = []
    try:
        with tqdm(total=len(prompts), desc=progress, unit="picture", disable=progress is None, leave=False) as bar:
            for start in range(0, len(prompts), settings.batch_size):
                batch = list(prompts[start : start + settings.batch_size])
                seeds = range(settings.seed + start, settings.seed + start + len(batch))
                drawn = pipeline(
                    prompt=batch,
                    height=settings.resolution,
                    width=settings.resolution,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    output_type="np",
                ).images
                pictures.append((np.asarray(drawn) * 255).round().astype(np.uint8))
                bar.update(len(batch))
    finally:
        pipeline.scheduler = before
    size = settings.resolution
    return np.concatenate(pictures) if pictures else np.zeros((0, size, size, 3), np.uint8)


def choose_scheduler(name: str | None, own: Any) -> Any:
    """The scheduler of that name with a pipeline's noise schedule; ``None`` gives the pipeline's own.

    Raises:
        ValueError: diffusers has none of that name, or it does not sample what the base was trained on.
    """
    if name is None:
        return own
    chosen = make_scheduler(name, own.config)
    if isinstance(own, ScaledSignalDDIMScheduler) or _is_flow(own) != _is_flow(chosen):
        allowed = "FlowMatch ones" if _is_flow(own) else "DDPM-like ones"
        allowed = "none but its own" if isinstance(own, ScaledSignalDDIMScheduler) else allowed
        raise ValueError(
            f"{name} does not sample what this base was trained on: it comes with a {type(own).__name__}; allowed are"
            f" {allowed}, and null for its own"
        )
    return chosen


def _is_flow(scheduler: Any) -> bool:
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def make_scheduler(name: str, config: Any) -> Any:
    """A diffusers scheduler by name, with another one's noise schedule.

    Raises:
        ValueError: there is none of that name.
    """
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        known = sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax"))
        raise ValueError(f"diffusers has no scheduler {name!r}; it has {', '.join(known)}")
    try:
        return kind.from_config(config)
    except Exception as error:  # schedulers raise many kinds, missing libraries among them
        raise ValueError(f"{name} cannot be made for this noise schedule: {error}") from error
