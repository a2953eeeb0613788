"""The loss of merges: one network, many weights, the same pictures, timesteps and noise for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from timestep_experts.data import EncodedPictures, halves_by_caption
from timestep_experts.evaluation.loss import LossCurve, LossSettings, loss_curve
from timestep_experts.intervals import Interval
from timestep_experts.models import Family


@dataclass(frozen=True)
class MergeLosses:
    """What was measured of one merge.

    Args:
        name: ``base``, an expert's, ``uniform`` or ``found``.
        weights: of the experts, group after group.
        selection: loss in each range of t, on the pictures that weights are chosen by.
        confirmation: the same on pictures that no choice has seen, with other noise.
        selection_mean: over all t.
        confirmation_mean: over all t.
    """

    name: str
    weights: tuple[float, ...]
    selection: tuple[float, ...]
    confirmation: tuple[float, ...]
    selection_mean: float
    confirmation_mean: float


class MergeBench:
    """Measures a family's denoiser as a merge rewrites it.

    Args:
        family: whose denoiser is rewritten.
        pictures: of validation; one half by caption is for choosing, the other for confirming.
        settings: ranges, bins and seed; confirmation draws with the next seed.
        apply: rewrites the network for a vector of weights.
        seed: of the halves.

    Raises:
        ValueError: there are too few pictures.
    """

    def __init__(
        self,
        family: Family,
        pictures: EncodedPictures,
        settings: LossSettings,
        apply: Callable[[tuple[float, ...]], None],
        seed: int,
    ) -> None:
        self.selection, self.confirmation = halves_by_caption(pictures, seed)
        self.settings = settings
        self._family = family
        self._apply = apply
        self._curves: dict[tuple[float, ...], LossCurve] = {}

    @property
    def ranges(self) -> tuple[Interval, ...]:
        """The reported ranges of t."""
        return self.settings.partition.intervals

    def curve(self, weights: tuple[float, ...]) -> LossCurve:
        """The loss on the selection half; measured once per vector."""
        if weights not in self._curves:
            self._apply(weights)
            self._curves[weights] = loss_curve(self._family, self.selection, self.settings)
        return self._curves[weights]

    def by_range(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        """`curve`, averaged within each range."""
        curve = self.curve(weights)
        return tuple(curve.within(interval) for interval in self.ranges)

    def mean(self, weights: tuple[float, ...]) -> float:
        """The mean loss over all t."""
        return self.curve(weights).mean

    def relative(self, weights: tuple[float, ...]) -> float:
        """``(1 / R) sum_r L_r(w) / L_r(0)`` over the R ranges: each counts the same, however small its loss."""
        base = self.by_range((0.0,) * len(weights))
        return sum(loss / own for loss, own in zip(self.by_range(weights), base, strict=True)) / len(base)

    def confirm(self, name: str, weights: tuple[float, ...]) -> MergeLosses:
        """Both halves' losses of one merge."""
        self._apply(weights)
        return self.confirm_as_it_is(name, weights, self.curve(weights))

    def confirm_as_it_is(self, name: str, weights: tuple[float, ...], here: LossCurve | None = None) -> MergeLosses:
        """Both halves' losses of whatever the family's networks are now.

        Args:
            name: of the row.
            weights: to show in it; may be empty.
            here: the loss on the selection half, where it is known.
        """
        here = here or loss_curve(self._family, self.selection, self.settings)
        settings = replace(self.settings, seed=self.settings.seed + 1)
        there = loss_curve(self._family, self.confirmation, settings)
        by_range = [tuple(curve.within(interval) for interval in self.ranges) for curve in (here, there)]
        return MergeLosses(name, weights, by_range[0], by_range[1], here.mean, there.mean)
