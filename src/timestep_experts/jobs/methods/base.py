"""The untouched base as a row of the table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from timestep_experts.build import build_sample_settings
from timestep_experts.config import Recipe
from timestep_experts.data import DecodeSettings
from timestep_experts.inference import SampleSettings
from timestep_experts.jobs.methods.protocol import Costs
from timestep_experts.mixture import Mixture, ParameterCount
from timestep_experts.models import Family


@dataclass(frozen=True)
class BaseCandidate:
    """See `Candidate`."""

    recipe: Recipe
    variant: str = "base"
    mode: Literal["off"] = "off"

    def check(self) -> None:
        """It is always there."""

    def files(self) -> list[Path]:
        """None."""
        return []

    @contextmanager
    def on(self, family: Family) -> Iterator[Mixture | None]:  # noqa: ARG002 - it is the family's own
        """Change nothing."""
        yield None

    def costs(self, family: Family, mixture: Mixture | None) -> Costs:  # noqa: ARG002 - nothing was trained
        """Nothing."""
        return Costs(ParameterCount(0, 0, 0), 0, 0.0)

    def sampling(self, decoding: DecodeSettings) -> SampleSettings:
        """As the recipe says."""
        return build_sample_settings(self.recipe, decoding)
