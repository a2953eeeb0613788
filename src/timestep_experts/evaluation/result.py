"""One row of the table: a model in one mode, and everything that was measured on it."""

from __future__ import annotations

from dataclasses import dataclass

from timestep_experts.evaluation.gates import GateMap
from timestep_experts.evaluation.loss import LossCurve
from timestep_experts.mixture import ParameterCount
from timestep_experts.world.judge import Verdict


@dataclass(frozen=True)
class Result:
    """What was measured.

    Args:
        variant: its name in the recipe; ``base`` is the untouched model.
        mode: ``off``, ``switch`` or ``route``.
        curve: validation loss per bin of t.
        interval_losses: the same, averaged within each reported interval, from low to high noise.
        verdict: judged promises; ``None`` where captions are not the embedded world's.
        frechet: distance to validation pictures in the judge's features; ``None`` without pictures.
        parameters: trained (in all stages together), stored, active.
        num_images_seen: training samples, all stages together.
        seconds: of training, all stages together.
        gates: of the routers, one map per context scale; empty unless routed.
    """

    variant: str
    mode: str
    curve: LossCurve
    interval_losses: tuple[float, ...]
    verdict: Verdict | None
    frechet: float | None
    parameters: ParameterCount
    num_images_seen: int
    seconds: float
    gates: tuple[GateMap, ...]

    @property
    def label(self) -> str:
        """For tables and legends: ``variant, mode`` where a mode is worth naming."""
        return self.variant if self.mode == "off" else f"{self.variant}, {self.mode}"
