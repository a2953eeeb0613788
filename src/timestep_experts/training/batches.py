"""The samples of a training step, a pure function of (seed, stage, step), so that nothing of them needs saving."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from timestep_experts.data import EncodedDataset
from timestep_experts.intervals import Interval, Partition, draw_timesteps
from timestep_experts.models import Family, Samples


@dataclass(frozen=True)
class Batch:
    """Training samples on the CPU.

    Args:
        indices: ``(B,)`` int64, pictures in the dataset.
        t: ``(B,)``, grouped by stratum from low to high noise.
        noise: ``(B, c, ...)`` fp32, of the latents' shape.
        dropped: ``(B,)`` bool, whether a sample's caption is replaced by the empty one.
    """

    indices: Tensor
    t: Tensor
    noise: Tensor
    dropped: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def samples(self, dataset: EncodedDataset, family: Family) -> Samples:
        """These samples on the family's device; text encoders that carry experts encode here, at each sample's t."""
        device = family.device
        t = self.t.to(device)
        conditioning = dataset.features_at(family, self.indices, t, self.dropped)
        return Samples(dataset.latents[self.indices].to(device), self.noise.to(device), t, conditioning)

    def chunks(self, count: int) -> list[Batch]:
        """Cut into micro-batches of (nearly) equal size."""
        columns = (self.indices, self.t, self.noise, self.dropped)
        return [Batch(*parts) for parts in zip(*(column.chunk(count) for column in columns), strict=True)]


@dataclass(frozen=True)
class BatchPlan:
    """Which samples a step trains on.

    Args:
        seed: the run's seed, from which all random numbers follow.
        stage: a name that separates the random numbers of stages.
        strata: every batch holds ``samples_per_stratum`` timesteps of each of these intervals.
        samples_per_stratum: b.
        caption_dropout: probability of the empty caption.
    """

    seed: int
    stage: str
    strata: Partition
    samples_per_stratum: int
    caption_dropout: float

    @property
    def batch_size(self) -> int:
        """Samples per step."""
        return len(self.strata) * self.samples_per_stratum

    def draw(self, dataset: EncodedDataset, family: Family, step: int, *, only: Interval | None = None) -> Batch:
        """The samples of one step; a stratum's samples do not depend on the other strata.

        Args:
            dataset: the training set.
            family: its density truncated to each stratum gives t.
            step: from 0.
            only: leave out the strata outside of this interval.
        """
        parts = [
            self._draw_stratum(stratum, dataset, family, step)
            for stratum in self.strata.intervals
            if only is None or only.covers(stratum)
        ]
        columns = zip(*((part.indices, part.t, part.noise, part.dropped) for part in parts), strict=True)
        return Batch(*(torch.cat(column) for column in columns))

    def _draw_stratum(self, stratum: Interval, dataset: EncodedDataset, family: Family, step: int) -> Batch:
        count = self.samples_per_stratum
        generator = generator_for(self.seed, self.stage, str(stratum), step)
        return Batch(
            indices=self._indices(stratum, len(dataset), step),
            t=draw_timesteps(
                stratum, family.noise.density, count, generator, integer=family.noise.has_integer_timesteps
            ),
            noise=torch.randn(count, *dataset.latents.shape[1:], generator=generator),
            dropped=torch.rand(count, generator=generator) < self.caption_dropout,
        )

    def _indices(self, stratum: Interval, num_pictures: int, step: int) -> Tensor:
        """Each stratum goes through the dataset in an order of its own, shuffled anew in every epoch."""
        count = self.samples_per_stratum
        positions = torch.arange(step * count, (step + 1) * count)
        places = ((int(p) // num_pictures, int(p) % num_pictures) for p in positions)
        return torch.stack([_shuffle(self.seed, self.stage, str(stratum), num_pictures, e)[p] for e, p in places])


@lru_cache(maxsize=64)
def _shuffle(seed: int, stage: str, stratum: str, num_pictures: int, epoch: int) -> Tensor:
    return torch.randperm(num_pictures, generator=generator_for(seed, stage, stratum, "epoch", epoch))


def generator_for(*identity: object) -> torch.Generator:
    """A CPU generator seeded by a hash of whatever names its purpose."""
    digest = hashlib.sha256(repr(identity).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
