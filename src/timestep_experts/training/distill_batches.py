"""The samples of a step of distillation: captions, the generator's noises, and how pictures are noised again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from timestep_experts.data import EncodedDataset
from timestep_experts.intervals import Partition
from timestep_experts.models import Family
from timestep_experts.training.batches import Batch, BatchPlan, generator_for

Purpose = Literal["match", "fake", "adversarial", "generated", "real"]

MATCHING_RANGE = (0.02, 0.98)
"""Shares of T between which distributions are matched: t from 20 to 980 of 1000 (DMD2)."""


@dataclass(frozen=True)
class Renoising:
    """How pictures are noised again: ``t (B,)`` int64 and ``noise (B, c, h, w)``."""

    t: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> Renoising:
        """On another device."""
        return Renoising(self.t.to(device), self.noise.to(device))


@dataclass(frozen=True)
class DistillBatch(Batch):
    """A `Batch` whose ``t`` is each sample's own generator step.

    Args:
        step: ``(B,)`` int64, that step's number, from 0.
        renoise: ``(B, steps, c, h, w)``: the start, and the fresh noise of every later step; ``noise`` is the first.
        renoisings: by purpose.
    """

    step: Tensor
    renoise: Tensor
    renoisings: Mapping[Purpose, Renoising]

    def chunks(self, count: int) -> list[Batch]:
        """See `Batch`; all random numbers stay with their sample."""
        again = {
            purpose: [Renoising(*pair) for pair in zip(item.t.chunk(count), item.noise.chunk(count), strict=True)]
            for purpose, item in self.renoisings.items()
        }
        parts = zip(super().chunks(count), self.step.chunk(count), self.renoise.chunk(count), strict=True)
        return [
            DistillBatch(
                **vars(plain), step=step, renoise=renoise, renoisings={p: items[index] for p, items in again.items()}
            )
            for index, (plain, step, renoise) in enumerate(parts)
        ]


@dataclass(frozen=True)
class DistillPlan:
    """How batches of distillation are drawn.

    Args:
        seed: the run's seed, from which all random numbers follow.
        stage: a name that separates the random numbers of stages.
        timesteps: of the generator, descending.
        owned: the numbers of the steps that are trained; samples are spread over them evenly.
        num_train_timesteps: T.
        batch_size: samples in all.
        caption_dropout: probability of the empty caption.
        is_adversarial: whether a discriminator needs its own noises.
    """

    seed: int
    stage: str
    timesteps: tuple[int, ...]
    owned: tuple[int, ...]
    num_train_timesteps: int
    batch_size: int
    caption_dropout: float
    is_adversarial: bool

    @property
    def strata(self) -> Partition:
        """One: all timesteps."""
        return Partition.uniform(1, self.num_train_timesteps)

    def draw(self, dataset: EncodedDataset, family: Family, step: int) -> DistillBatch:
        """The samples of one step, a pure function of seed, stage and step."""
        plan = BatchPlan(self.seed, self.stage, self.strata, self.batch_size, self.caption_dropout)
        plain = plan.draw(dataset, family, step)
        turns = (torch.arange(self.batch_size) + step * self.batch_size) % len(self.owned)
        places = torch.tensor(self.owned)[turns.sort().values]
        shape = (self.batch_size, int(places.max()) + 1, *dataset.latents.shape[1:])
        renoise = torch.randn(shape, generator=generator_for(self.seed, self.stage, "path", step))
        return DistillBatch(
            indices=plain.indices,
            t=torch.tensor(self.timesteps)[places],
            noise=renoise[:, 0],
            dropped=plain.dropped,
            step=places,
            renoise=renoise,
            renoisings={purpose: self._renoising(purpose, renoise[:, 0], step) for purpose in self._purposes()},
        )

    def _purposes(self) -> tuple[Purpose, ...]:
        return ("match", "fake", "adversarial", "generated", "real") if self.is_adversarial else ("match", "fake")

    def _renoising(self, purpose: Purpose, like: Tensor, step: int) -> Renoising:
        generator = generator_for(self.seed, self.stage, purpose, step)
        low, high = 0, self.num_train_timesteps
        if purpose == "match":
            low, high = (int(share * self.num_train_timesteps) for share in MATCHING_RANGE)
            high += 1
        t = torch.randint(low, high, (len(like),), generator=generator)
        return Renoising(t, torch.randn(like.shape, generator=generator))
