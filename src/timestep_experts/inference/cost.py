"""What sampling costs: calls of the denoisers, and passes through the text encoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from timestep_experts.formats.model_folders import DENOISERS
from timestep_experts.inference.reencode import Reencoder


@dataclass
class SamplingCost:
    """What was counted.

    Args:
        num_denoiser_calls: forward passes of all denoisers, each over a whole batch.
        num_text_passes: how often prompts were encoded, a whole batch at a time; ``None`` where no text encoder carries
            experts, so that they are encoded once per batch.
    """

    num_denoiser_calls: int = 0
    num_text_passes: int | None = None

    def per_picture(self, num_pictures: int) -> str:
        """In words, e.g. ``9 text passes (3.0 per picture), 60 denoiser calls``."""
        calls = f"{self.num_denoiser_calls:,} denoiser calls"
        if self.num_text_passes is None:
            return calls
        share = self.num_text_passes / max(num_pictures, 1)
        return f"{self.num_text_passes:,} text passes ({share:.1f} per picture), {calls}"


@contextmanager
def counted(pipeline: Any) -> Iterator[SamplingCost]:
    """Count while open.

    Args:
        pipeline: a diffusers pipeline, with or without experts.
    """
    cost, reencoder = SamplingCost(), Reencoder.of(pipeline)
    before = reencoder.num_text_passes if reencoder is not None else 0

    def count(*_: object) -> None:
        cost.num_denoiser_calls += 1

    denoisers = [part for name in DENOISERS if isinstance(part := getattr(pipeline, name, None), nn.Module)]
    handles = [denoiser.register_forward_hook(count) for denoiser in denoisers]
    try:
        yield cost
    finally:
        for handle in handles:
            handle.remove()
        if reencoder is not None:
            cost.num_text_passes = reencoder.num_text_passes - before
