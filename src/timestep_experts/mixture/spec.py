"""What a mixture consists of, as plain values: scales, their roles, and the form of the routers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from timestep_experts.errors import UserError
from timestep_experts.intervals import Partition
from timestep_experts.mixture.router_form import RouterForm

MOST_RANK = 2**16
MOST_TIMESTEPS = 10**6


@dataclass(frozen=True)
class Scale:
    """One set of experts: a partition of the timesteps with one low-rank expert per interval.

    Args:
        name: unique in its mixture. It becomes part of every tensor's name, so it may have letters, digits, ``_`` and
            ``-`` only.
        partition: which expert owns which t.
        rank: r of every expert.
        alpha: the update is multiplied by alpha / r.
        gated: whether this is a context scale, whose gate is ``base_gate + G(z, t)`` when routing. A core scale is not
            gated; its gate is 1.
        base_gate: the gate of a context scale where no router takes part. 0 leaves the scale out of switching, as suits
            experts that were fostered independently. 1 keeps it in, as experts need that were fostered jointly and fit
            only each other.

    Raises:
        UserError: the name has other characters, the rank is below 1 or absurd, or alpha or base gate is not finite.
    """

    name: str
    partition: Partition
    rank: int
    alpha: float
    gated: bool = False
    base_gate: float = 0.0

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"a scale's name is made of letters, digits, '_' and '-'; got {self.name!r}")
        if not 1 <= self.rank <= MOST_RANK:
            raise UserError(f"scale {self.name!r}: rank must be from 1 to {MOST_RANK:,}; got {self.rank}")
        if not (math.isfinite(self.alpha) and math.isfinite(self.base_gate)):
            raise UserError(f"scale {self.name!r}: alpha and base_gate must be finite")

    @property
    def scaling(self) -> float:
        """The factor alpha / r of every update."""
        return self.alpha / self.rank

    @property
    def constant_gate(self) -> float:
        """The gate where no router takes part."""
        return self.base_gate if self.gated else 1.0


@dataclass(frozen=True)
class MixtureSpec:
    """The scales of a mixture and the form of its routers.

    Args:
        scales: at least one; all partitions share T.
        router: the form of the routers, which every layer with a gated scale has.
        dropout: on the experts' input while training, in [0, 1).

    Raises:
        UserError: there is no scale, a name is repeated, partitions differ in T or T is absurd, the dropout is outside
            [0, 1), or the routers' table does not fit T or the base gates.
    """

    scales: tuple[Scale, ...]
    router: RouterForm = field(default_factory=RouterForm)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        names = [scale.name for scale in self.scales]
        if not names or len(set(names)) < len(names):
            raise UserError(f"a mixture needs at least one scale and unique scale names; got {names}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1); got {self.dropout}")
        _ = self.strata  # partitions of different T fail here
        if not self.scales[0].partition.num_train_timesteps <= MOST_TIMESTEPS:
            raise UserError(f"a mixture knows at most {MOST_TIMESTEPS:,} timesteps")
        self.router.check(self.num_train_timesteps)
        if self.router.unit_rms and not all(scale.base_gate for scale in self.gated_scales):
            raise UserError("unit_rms divides gates by their size; a base gate of 0 has none. Use another base_gate")

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
        """Find a scale by its name.

        Raises:
            UserError: there is none of that name.
        """
        for scale in self.scales:
            if scale.name == name:
                return scale
        raise UserError(f"no scale {name!r} in this mixture: it has {', '.join(s.name for s in self.scales)}")


def asymmetric(scales: Sequence[Scale]) -> tuple[Scale, ...]:
    """Give scales their roles in TSM: the one with the smallest interval is the core, all others are gated contexts."""
    finest = max(scales, key=lambda scale: len(scale.partition))
    return tuple(replace(scale, gated=scale is not finest) for scale in scales)
