"""Decoupling: a full copy of the denoiser learns one range of timesteps (DeMe, arXiv 2410.06664, eq. 3-6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from timestep_experts.data import EncodedDataset
from timestep_experts.errors import UserError
from timestep_experts.intervals import Interval, Partition, draw_timesteps, mirror_timesteps
from timestep_experts.merging import Placement
from timestep_experts.models import Family, NoiseProcess
from timestep_experts.objectives import SnrWeighting, loss_weight, squared_error, uncertainty_weighted
from timestep_experts.training.batches import Batch, BatchPlan, generator_for
from timestep_experts.training.full_copy import FullCopy
from timestep_experts.training.param_group import ParamGroup
from timestep_experts.training.stage import Precision, Stage, Training

Sampling = Literal["sample", "batch"]
Weighting = SnrWeighting | Literal["uncertainty"]
Weigh = Callable[[Tensor, Tensor], Tensor]
"""Timesteps ``(B,)`` and losses ``(B,)`` to weighted losses."""


@dataclass(frozen=True)
class DecoupleSettings:
    """How the experts of all ranges are trained, each by itself.

    Args:
        partition: the ranges.
        max_train_steps: optimiser updates, one number per range.
        learning_rate: its peak.
        train_batch_size: samples per update.
        trainable: see `FullCopy`, as the next three.
        projection: where projections go.
        ema_decay: of the averages that are kept as the expert.
        ema_warmup: whether the decay grows.
        consistency: lambda, the weight of staying close to the base; 0 asks it nothing.
        full_range_probability: p, how often t comes from all timesteps rather than the own range.
        sampling: whether p is thrown per ``sample`` or per ``batch``.
        antithetic: draw t in pairs, mirrored in where they are drawn from.
        weighting: of the denoising loss by its noise level; the consistency loss is never weighted.
        uncertainty_intervals: of ``uncertainty``, equal ranges of t with a log-variance each.
        uncertainty_learning_rate: of those log-variances.
        caption_dropout: probability of the empty caption.
        seed: of samples.
    """

    partition: Partition
    max_train_steps: tuple[int, ...]
    learning_rate: float = 5e-5
    train_batch_size: int = 64
    trainable: str | None = None
    projection: Placement = "off"
    ema_decay: float | None = 0.9999
    ema_warmup: bool = True
    consistency: float = 1.0
    full_range_probability: float = 0.3
    sampling: Sampling = "sample"
    antithetic: bool = False
    weighting: Weighting = "none"
    uncertainty_intervals: int = 4
    uncertainty_learning_rate: float = 1e-3
    caption_dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Decoupled(Training):
    """The training of one range; the trainee is the copy that learns, and the family is the base around it."""

    trainee: FullCopy


@dataclass(frozen=True)
class DecouplePlan:
    """Samples mostly from one range, by a pure function of (seed, stage, step).

    Args:
        seed: the run's seed, from which all random numbers follow.
        stage: separates the random numbers of stages.
        strata: all ranges; losses are logged by them.
        interval: the own range.
        batch_size: samples per step.
        caption_dropout: probability of the empty caption.
        full_range_probability: p.
        sampling: see `DecoupleSettings`, as the next.
        antithetic: pairs.
    """

    seed: int
    stage: str
    strata: Partition
    interval: Interval
    batch_size: int
    caption_dropout: float
    full_range_probability: float
    sampling: Sampling
    antithetic: bool

    def draw(self, dataset: EncodedDataset, family: Family, step: int) -> Batch:
        """The samples of one step; with pairs, sample i + ceil(B / 2) mirrors sample i."""
        whole = Partition.uniform(1, self.strata.num_train_timesteps)
        plan = BatchPlan(self.seed, self.stage, whole, self.batch_size, self.caption_dropout)
        return replace(plan.draw(dataset, family, step), t=self.draw_timesteps(family.noise, step))

    def draw_timesteps(self, noise: NoiseProcess, step: int) -> Tensor:
        """``(B,)``: from the own range with probability 1 - p, else from all of them (DeMe, 3.2)."""
        generator = generator_for(self.seed, self.stage, "timesteps", step)
        count = -(-self.batch_size // 2) if self.antithetic else self.batch_size
        thrown = torch.rand(1 if self.sampling == "batch" else count, generator=generator)
        is_full = (thrown < self.full_range_probability).expand(count)
        whole = Interval(0, self.strata.num_train_timesteps)
        own, full = (self._draw_within(place, noise, count, generator) for place in (self.interval, whole))
        return torch.cat([torch.where(is_full, f, o) for f, o in zip(full, own, strict=True)])[: self.batch_size]

    def _draw_within(
        self, place: Interval, noise: NoiseProcess, count: int, generator: torch.Generator
    ) -> list[Tensor]:
        integer = noise.has_integer_timesteps
        t = draw_timesteps(place, noise.density, count, generator, integer=integer)
        return [t, mirror_timesteps(t, place, noise.density, integer=integer)] if self.antithetic else [t]


@dataclass(frozen=True)
class Decoupling:
    """Denoising loss, weighted by noise level, and lambda times the distance to the frozen base (DeMe, eq. 6).

    Where both are unweighted, the prediction tends to (target + lambda * teacher) / (1 + lambda).

    Args:
        teacher: the base as it was; ``None`` leaves the distance out, and the base is not asked.
        consistency: lambda.
        weigh: of denoising losses.
        samples_per_mean: the loss is summed over samples and divided by this.
    """

    teacher: Family | None
    consistency: float
    weigh: Weigh
    samples_per_mean: int

    def losses(
        self, family: Family, dataset: EncodedDataset, chunk: Batch, precision: Precision
    ) -> tuple[Tensor, Tensor]:
        """Weighted denoising losses and distances to the teacher, ``(B,)`` each; the latter 0 without one."""
        with torch.autocast(family.device.type, torch.bfloat16, enabled=precision == "bf16"):
            samples = chunk.samples(dataset, family)
            denoised = family.denoise(samples)
            taught = None
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher.predict(denoised.noisy, samples.t, samples.conditioning)
        denoising = self.weigh(samples.t, squared_error(denoised.predicted, denoised.target))
        return denoising, torch.zeros_like(denoising) if taught is None else squared_error(denoised.predicted, taught)

    def backward(
        self, _step: int, /, family: Family, dataset: EncodedDataset, chunk: Batch, precision: Precision
    ) -> Tensor:
        """See `Objective`."""
        denoising, distance = self.losses(family, dataset, chunk, precision)
        losses = denoising + self.consistency * distance
        (losses.sum() / self.samples_per_mean).backward()  # type: ignore[no-untyped-call]
        return losses.detach()


class Uncertainty(nn.Module):
    """Learned log-variances of the loss, one per range of timesteps; see `uncertainty_weighted`.

    Args:
        partition: the ranges.
        device: of losses.
    """

    def __init__(self, partition: Partition, device: torch.device | None = None) -> None:
        super().__init__()
        self.partition = partition
        self.log_variance = nn.Parameter(torch.zeros(len(partition), device=device))

    def forward(self, t: Tensor, losses: Tensor) -> Tensor:
        """Losses ``(B,)`` at timesteps ``(B,)``, weighted."""
        return uncertainty_weighted(losses, self.log_variance[self.partition.index_of(t)])


def decouple(base: Family, settings: DecoupleSettings, index: int) -> Decoupled:
    """The training of one range's expert: memory for the base, one copy, its averages, gradients and optimiser.

    Args:
        base: stays as it is; it is the frozen teacher.
        settings: of all ranges.
        index: of the range, from 0 at low noise.

    Raises:
        UserError: there is no such range; the ranges do not cover the base's timesteps, or one of them holds no whole
            timestep; the base has several denoisers; or see `FullCopy`.
    """
    interval = check_range(settings.partition, index, base.noise)
    ranges = Partition.uniform(settings.uncertainty_intervals, base.noise.num_train_timesteps)
    uncertainty = Uncertainty(ranges, base.device)
    is_uncertain = settings.weighting == "uncertainty"
    trainee = FullCopy(
        base.denoiser,
        settings.trainable,
        settings.projection,
        settings.ema_decay,
        ema_warmup=settings.ema_warmup,
        extra={"uncertainty": uncertainty} if is_uncertain else {},
    )
    steps, name = settings.max_train_steps[index], f"decouple-{index}"
    param_groups = [
        ParamGroup(f"range-{index}", [(p, None) for p in trainee.expert.values()], settings.learning_rate, steps)
    ]
    if is_uncertain:
        own: list[tuple[nn.Parameter, int | None]] = [(uncertainty.log_variance, None)]
        param_groups.append(ParamGroup("uncertainty", own, settings.uncertainty_learning_rate, steps, weight_decay=0.0))
    plan = DecouplePlan(
        settings.seed,
        name,
        settings.partition,
        interval,
        settings.train_batch_size,
        settings.caption_dropout,
        settings.full_range_probability,
        settings.sampling,
        settings.antithetic,
    )
    objective = Decoupling(
        base if settings.consistency else None,
        settings.consistency,
        uncertainty if is_uncertain else _snr_weigh(settings.weighting, base.noise),
        settings.train_batch_size,
    )
    stage = Stage(name, param_groups, plan, objective, after_step=trainee.follow)
    return Decoupled(stage, trainee, base.with_denoiser(trainee.denoiser))


def check_range(partition: Partition, index: int, noise: NoiseProcess) -> Interval:
    """The range of that index.

    Raises:
        UserError: there is none, the ranges do not end at T, or it holds no whole timestep where t is whole.
    """
    if not 0 <= index < len(partition):
        raise UserError(f"there is no range {index}: this recipe has {len(partition)}, from 0 to {len(partition) - 1}")
    if partition.num_train_timesteps != noise.num_train_timesteps:
        raise UserError(
            f"the ranges end at {partition.num_train_timesteps:g}; this base model has {noise.num_train_timesteps}"
            " timesteps"
        )
    interval = partition[index]
    if noise.has_integer_timesteps and math.ceil(interval.lo) >= math.ceil(interval.hi):
        raise UserError(f"range {index}, {interval}, contains no whole timestep to train on")
    return interval


def _snr_weigh(weighting: Weighting, noise: NoiseProcess) -> Weigh:
    if weighting == "none" or weighting == "uncertainty":
        return lambda _, losses: losses
    return lambda t, losses: losses * loss_weight(weighting, noise.snr(t), noise.error_ratio(t)).to(losses.dtype)
