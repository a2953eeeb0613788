"""What a mixture consists of, as plain values: scales, their roles, and the router's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from timestep_experts.intervals import Partition
from timestep_experts.mixture.router import GateGranularity, RouterInput


@dataclass(frozen=True)
class Scale:
    """One set of experts: a partition of the timesteps with one low-rank expert per interval.

    Args:
        name: unique in its mixture; part of every tensor name, so letters, digits, ``_`` and ``-`` only.
        partition: which expert owns which t.
        rank: r of every expert.
        alpha: the update is scaled by alpha / r.
        gated: a context scale, multiplied by ``resting_gate + G(z, t)`` when routing; otherwise a core scale (gate 1).
        resting_gate: a gated scale's gate where no router speaks: 0 leaves it out of switching (experts fostered
            independently), 1 keeps it in (experts fostered jointly, which only fit each other together).
    """

    name: str
    partition: Partition
    rank: int
    alpha: float
    gated: bool = False
    resting_gate: float = 0.0

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"a scale's name is made of letters, digits, '_' and '-'; got {self.name!r}")
        if self.rank < 1:
            raise ValueError(f"scale {self.name!r}: rank must be at least 1; got {self.rank}")

    @property
    def scaling(self) -> float:
        """Alpha / r, by which every update is multiplied."""
        return self.alpha / self.rank

    @property
    def constant_gate(self) -> float:
        """The gate where no router speaks."""
        return self.resting_gate if self.gated else 1.0


@dataclass(frozen=True)
class MixtureSpec:
    """The scales of a mixture and the form of its routers.

    Args:
        scales: at least one; all partitions share T.
        router_input: what gates depend on.
        gate: one per sample, or per position ("token").
        router_knots: ``None`` for the paper's table over every timestep, or the knots of a smooth one.
        dropout: on the experts' input while training, in [0, 1).

    Raises:
        ValueError: no scale, a repeated name, partitions of different T, a dropout outside [0, 1).
    """

    scales: tuple[Scale, ...]
    router_input: RouterInput = "z_and_t"
    gate: GateGranularity = "sample"
    router_knots: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        names = [scale.name for scale in self.scales]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a mixture needs at least one scale and unique scale names; got {names}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}")
        _ = self.strata  # partitions of different T fail here

    @property
    def strata(self) -> Partition:
        """The coarsest partition in which no interval crosses a boundary of any scale."""
        return reduce(Partition.refine, (scale.partition for scale in self.scales))

    @property
    def num_train_timesteps(self) -> int:
        """T, which all partitions share."""
        return int(self.scales[0].partition.num_train_timesteps)

    @property
    def gated_scales(self) -> tuple[Scale, ...]:
        """The context scales, in the order of the router's outputs."""
        return tuple(scale for scale in self.scales if scale.gated)

    def scale(self, name: str) -> Scale:
        """The scale of that name.

        Raises:
            ValueError: there is none.
        """
        for scale in self.scales:
            if scale.name == name:
                return scale
        raise ValueError(f"no scale {name!r} in this mixture: it has {', '.join(s.name for s in self.scales)}")

    def with_resting_gates(self, gate: float) -> MixtureSpec:
        """The same mixture with another resting gate on every context scale."""
        return replace(self, scales=tuple(replace(s, resting_gate=gate) if s.gated else s for s in self.scales))


def asymmetric(scales: Sequence[Scale]) -> tuple[Scale, ...]:
    """Give the roles of TSM: the scale with the smallest interval is the core, all others are gated contexts."""
    finest = max(scales, key=lambda scale: len(scale.partition))
    return tuple(replace(scale, gated=scale is not finest) for scale in scales)
