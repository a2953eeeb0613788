"""Validation loss over the timesteps, with common random numbers: every model meets the same pictures, t and noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from timestep_experts.data import EncodedDataset
from timestep_experts.intervals import Interval, Partition
from timestep_experts.models import Family
from timestep_experts.objectives import squared_error
from timestep_experts.training.batches import Batch, BatchPlan


@dataclass(frozen=True)
class LossSettings:
    """What a loss is measured on.

    Args:
        partition: the intervals that are reported.
        bins_per_interval: each is cut into so many equal bins.
        num_pictures: validation pictures met in each bin.
        batch_size: pictures at a time.
        seed: of pictures, timesteps and noise.
    """

    partition: Partition
    bins_per_interval: int
    num_pictures: int
    batch_size: int
    seed: int

    @property
    def bins(self) -> Partition:
        """All bins."""
        cut = self.bins_per_interval
        inner = (i.lo + (i.hi - i.lo) * k / cut for i in self.partition.intervals for k in range(cut))
        return Partition((*inner, self.partition.num_train_timesteps))


@dataclass(frozen=True)
class LossCurve:
    """Mean loss in each bin of t, from low to high noise.

    Args:
        bins: ``[lo, hi)`` of each bin.
        loss: of each bin.
        standard_error: of each bin's mean, over its samples.
    """

    bins: tuple[Interval, ...]
    loss: tuple[float, ...]
    standard_error: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the whole range of t, bins weighted by their width."""
        return self.within(Interval(self.bins[0].lo, self.bins[-1].hi))

    def within(self, interval: Interval) -> float:
        """Mean over an interval that is a union of bins."""
        weights = [b.hi - b.lo if interval.covers(b) else 0.0 for b in self.bins]
        return sum(w * value for w, value in zip(weights, self.loss, strict=True)) / sum(weights)


def loss_curve(family: Family, dataset: EncodedDataset, settings: LossSettings) -> LossCurve:
    """Measure the family's denoiser as it stands, with whatever experts it carries in their present mode."""
    sums = [_bin_losses(family, dataset, batches) for _, batches in evaluation_batches(family, dataset, settings)]
    means = tuple(losses.mean().item() for losses in sums)
    errors = tuple((losses.std(correction=min(1, len(losses) - 1)) / len(losses) ** 0.5).item() for losses in sums)
    return LossCurve(settings.bins.intervals, means, errors)


def evaluation_batches(
    family: Family, dataset: EncodedDataset, settings: LossSettings
) -> Iterator[tuple[Interval, list[Batch]]]:
    """The samples of every bin; the same for every model, mode and batch size."""
    plan = BatchPlan(settings.seed, "evaluation", settings.bins, settings.num_pictures, caption_dropout=0.0)
    for interval in tqdm(settings.bins.intervals, desc="validation loss", unit="bin", leave=False):
        batch = plan.draw(dataset, family, 0, only=interval)
        yield interval, batch.chunks(-(-len(batch) // settings.batch_size))


@torch.no_grad()
def _bin_losses(family: Family, dataset: EncodedDataset, batches: list[Batch]) -> Tensor:
    """The loss of every sample of a bin, ``(B,)`` on the CPU."""
    denoised = (family.denoise(batch.samples(dataset, family)) for batch in batches)
    return torch.cat([squared_error(item.predicted, item.target).cpu() for item in denoised])
