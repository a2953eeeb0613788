"""The loss of merges: one network, many weights, the same pictures, timesteps and noise for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from timestep_experts.data import EncodedDataset, halves_by_caption
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


@dataclass(frozen=True)
class MergeSplit:
    """What merges are tried on.

    Args:
        family: whose networks they rewrite.
        selection: pictures that weights are chosen by.
        confirmation: pictures that no choice sees.
        settings: ranges, bins and seed; confirmation draws with the next seed.
    """

    family: Family
    selection: EncodedDataset
    confirmation: EncodedDataset
    settings: LossSettings

    @classmethod
    def on_halves(cls, family: Family, dataset: EncodedDataset, settings: LossSettings, seed: int) -> MergeSplit:
        """One half of the validation pictures, by caption, is for choosing, the other for confirming.

        Args:
            family: as above.
            dataset: the validation pictures.
            settings: as above.
            seed: of the halves.

        Raises:
            UserError: there are too few pictures.
        """
        return cls(family, *halves_by_caption(dataset, seed), settings)


class MergeBench:
    """Measures a family's networks as a merge rewrites them.

    Args:
        split: what it is tried on.
        apply: rewrites the networks for a vector of weights.
    """

    def __init__(self, split: MergeSplit, apply: Callable[[tuple[float, ...]], None]) -> None:
        self.split = split
        self._apply = apply
        self._curves: dict[tuple[float, ...], LossCurve] = {}

    @property
    def ranges(self) -> tuple[Interval, ...]:
        """The reported ranges of t."""
        return self.split.settings.partition.intervals

    def curve(self, weights: tuple[float, ...]) -> LossCurve:
        """The loss on the selection pictures; measured once per vector."""
        if weights not in self._curves:
            self._apply(weights)
            self._curves[weights] = self._curve_of_selection()
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
        """Both losses of one merge."""
        self._apply(weights)
        return self.confirm_as_it_is(name, weights, self.curve(weights))

    def confirm_as_it_is(self, name: str, weights: tuple[float, ...], here: LossCurve | None = None) -> MergeLosses:
        """Both losses of whatever the family's networks are now.

        Args:
            name: of the row.
            weights: to show in it; may be empty.
            here: the loss on the selection pictures, where it is known.
        """
        here = here or self._curve_of_selection()
        split = self.split
        there = loss_curve(split.family, split.confirmation, replace(split.settings, seed=split.settings.seed + 1))
        by_range = [tuple(curve.within(interval) for interval in self.ranges) for curve in (here, there)]
        return MergeLosses(name, weights, by_range[0], by_range[1], here.mean, there.mean)

    def _curve_of_selection(self) -> LossCurve:
        return loss_curve(self.split.family, self.split.selection, self.split.settings)
