"""What every way of training offers to the rest of the product."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from timestep_experts.build import RunContext
from timestep_experts.config import Variant
from timestep_experts.data import DecodeSettings
from timestep_experts.inference import SampleSettings
from timestep_experts.jobs.paths import VariantPaths
from timestep_experts.jobs.plan import StagePlan
from timestep_experts.mixture import Mixture, Mode, ParameterCount
from timestep_experts.models import Family

CandidateMode = Mode | Literal["merged"]


@dataclass(frozen=True)
class Costs:
    """What a candidate took to train, and takes to use.

    Args:
        parameters: trained (in all stages together), stored, and active besides the base's.
        num_images_seen: training samples, all stages together.
        seconds: of training, all stages together.
    """

    parameters: ParameterCount
    num_images_seen: int
    seconds: float


class Candidate(Protocol):
    """A model in one mode: a row of the table."""

    @property
    def variant(self) -> str:
        """The name of its variant, or ``base``."""
        ...

    @property
    def mode(self) -> CandidateMode:
        """How it is used; full copies ``switch`` as an ensemble."""
        ...

    def check(self) -> None:
        """See that it can be measured.

        Raises:
            UserError: it is not trained, or not merged.
        """
        ...

    def files(self) -> list[Path]:
        """The weights that decide what is measured, besides the base's."""
        ...

    def on(self, family: Family) -> AbstractContextManager[Mixture | None]:
        """Put the candidate on a family's pipeline, which has its own weights back when the context closes.

        Returns:
            The context; it gives the candidate's mixture, or ``None`` for a candidate without one.
        """
        ...

    def costs(self, family: Family, mixture: Mixture | None) -> Costs:
        """What it took to train, and takes to use; called while `on` is open."""
        ...

    def sampling(self, decoding: DecodeSettings) -> SampleSettings:
        """The settings with which it generates pictures or clips."""
        ...


class Method(Protocol):
    """One way of training, for one variant of a recipe."""

    @property
    def variant(self) -> Variant:
        """The variant that is trained."""
        ...

    @property
    def paths(self) -> VariantPaths:
        """The paths of its files."""
        ...

    def plan(self, *, with_memory: bool = False) -> list[StagePlan]:
        """Every stage, counted on the meta device: nothing is loaded or trained.

        Args:
            with_memory: estimate memory too, which takes seconds per stage.

        Raises:
            UserError: the base has no readable configuration, or what is asked does not fit it.
        """
        ...

    def stages(self) -> dict[Path, dict[str, Any]]:
        """The folders of all stages, trained or not, each with whatever of the method decides its result's bytes."""
        ...

    def train(self, context: RunContext) -> None:
        """Run all stages and, where the variant says so, the merge; each goes on where it stopped."""
        ...

    def candidates(self) -> list[Candidate]:
        """The rows that this variant adds to the table of results."""
        ...

    def notes(self) -> list[str]:
        """What a reader of the table should know of its rows."""
        ...
