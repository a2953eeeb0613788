"""Which expert owns a timestep, and what that timestep means in every other unit.

The one coordinate of an interval is the timestep value ``t`` in [0, T] that the denoiser receives (an integer for
DDPM-like models, 1000 * sigma after the shift for flow models). Sigma, log-SNR, scheduler index and step number are
converted from it and shown, never stored.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, overload

import torch
from torch import Tensor

from timestep_experts.errors import UserError

NUM_TRAIN_TIMESTEPS = 1000
MOST_INTERVALS = 10_000


@dataclass(frozen=True)
class Interval:
    """A half-open range ``[lo, hi)`` of timesteps, in units of ``t``."""

    lo: float
    hi: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lo) and math.isfinite(self.hi) and 0 <= self.lo < self.hi):
            raise UserError(f"an interval needs 0 <= lo < hi, both finite; got lo = {self.lo}, hi = {self.hi}")

    def __contains__(self, t: float) -> bool:
        return self.lo <= t < self.hi

    def __str__(self) -> str:
        return f"[{self.lo:g}, {self.hi:g})"

    def covers(self, other: Interval) -> bool:
        """Whether ``other`` lies inside this interval."""
        return self.lo <= other.lo and other.hi <= self.hi

    def meets(self, other: Interval) -> bool:
        """Whether some t lies in both."""
        return self.lo < other.hi and other.lo < self.hi


@dataclass(frozen=True)
class Partition:
    """Intervals side by side from 0 to T; every t in [0, T] has exactly one owner, and the last interval owns t = T.

    Args:
        boundaries: n + 1 ascending values; the first is 0, the last is T.

    Raises:
        UserError: fewer than two boundaries or too many, not ascending, or not starting at 0.
    """

    boundaries: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.boundaries) - 1 > MOST_INTERVALS:
            raise UserError(f"a partition has at most {MOST_INTERVALS:,} intervals; got {len(self.boundaries) - 1:,}")
        ascending = all(a < b for a, b in pairwise(self.boundaries))
        finite = all(math.isfinite(b) for b in self.boundaries)
        if len(self.boundaries) < 2 or self.boundaries[0] != 0 or not ascending or not finite:
            raise UserError(
                f"partition boundaries must ascend from 0 to the number of train timesteps; got {self.boundaries}"
            )

    @classmethod
    def uniform(cls, num_intervals: int, num_train_timesteps: float = NUM_TRAIN_TIMESTEPS) -> Partition:
        """Cut [0, T) into n equal intervals; interval ``clamp(floor(t * n / T), 0, n - 1)`` owns t (TSM, eq. 4).

        Raises:
            UserError: ``num_intervals`` below 1.
        """
        if not 1 <= num_intervals <= MOST_INTERVALS:
            raise UserError(f"a partition has 1 to {MOST_INTERVALS:,} intervals; got {num_intervals}")
        return cls(tuple(i * num_train_timesteps / num_intervals for i in range(num_intervals + 1)))

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    def __getitem__(self, index: int) -> Interval:
        return self.intervals[index]

    def __str__(self) -> str:
        return " ".join(str(interval) for interval in self.intervals)

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """The intervals from low to high noise."""
        return tuple(Interval(lo, hi) for lo, hi in pairwise(self.boundaries))

    @property
    def num_train_timesteps(self) -> float:
        """T, the upper end."""
        return self.boundaries[-1]

    @overload
    def index_of(self, t: Tensor) -> Tensor: ...
    @overload
    def index_of(self, t: float) -> int: ...
    def index_of(self, t: Tensor | float) -> Tensor | int:
        """The owner of each timestep.

        Tensors stay on their device and are never read by the host, so the owner may change under ``torch.compile``
        without recompilation.

        Args:
            t: timesteps in [0, T], a number or a tensor of any shape; values outside belong to the nearest interval.

        Returns:
            Indices in [0, n): an int for a number, an int64 tensor of the same shape for a tensor.
        """
        inner = self.boundaries[1:-1]
        if not isinstance(t, Tensor):
            return bisect_right(inner, t)
        if t.device.type != "mps":  # has no float64; elsewhere fractional boundaries are compared unrounded
            t = t.double()
        if inner and t.device.type == "cpu" and not torch.compiler.is_compiling():
            return torch.bucketize(t, torch.tensor(inner, dtype=t.dtype), right=True)
        index = torch.zeros_like(t, dtype=torch.long)  # other devices would wait for a copy of the boundaries
        for boundary in inner:
            index = index + (t >= boundary)
        return index

    def refine(self, other: Partition) -> Partition:
        """The coarsest partition whose intervals lie each inside one interval of both.

        Raises:
            UserError: the two do not share T.
        """
        if self.num_train_timesteps != other.num_train_timesteps:
            raise UserError(
                "partitions of different ranges cannot be refined together:"
                f" T = {self.num_train_timesteps:g} and T = {other.num_train_timesteps:g}"
            )
        return Partition(tuple(sorted({*self.boundaries, *other.boundaries})))

    def coarsens(self, other: Partition) -> bool:
        """Whether every interval of ``other`` lies inside one interval of this partition."""
        return set(self.boundaries) <= set(other.boundaries)


class TimestepDensity(Protocol):
    """How training draws t: a distribution on [0, T], given by its cumulative function and the inverse of it."""

    def cdf(self, t: Tensor) -> Tensor:
        """Probability of drawing a timestep below ``t``, float64."""
        ...

    def icdf(self, probability: Tensor) -> Tensor:
        """The timestep below which that much probability lies, float64."""
        ...


@dataclass(frozen=True)
class UniformDensity:
    """Every timestep equally likely: DDPM-like models."""

    num_train_timesteps: float = NUM_TRAIN_TIMESTEPS

    def cdf(self, t: Tensor) -> Tensor:
        """See `TimestepDensity`."""
        return (t.double() / self.num_train_timesteps).clamp(0, 1)

    def icdf(self, probability: Tensor) -> Tensor:
        """See `TimestepDensity`."""
        return probability.double() * self.num_train_timesteps


@dataclass(frozen=True)
class LogitNormalDensity:
    """Flow models: ``sigma = sigmoid(mean + std * normal)``, then the shift ``s * sigma / (1 + (s - 1) * sigma)``."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    num_train_timesteps: float = NUM_TRAIN_TIMESTEPS

    def cdf(self, t: Tensor) -> Tensor:
        """See `TimestepDensity`."""
        shifted = (t.double() / self.num_train_timesteps).clamp(0, 1)
        sigma = shifted / (self.shift - (self.shift - 1) * shifted)
        below: Tensor = torch.special.ndtr((torch.logit(sigma) - self.mean) / self.std)
        return below

    def icdf(self, probability: Tensor) -> Tensor:
        """See `TimestepDensity`."""
        sigma = torch.sigmoid(self.mean + self.std * torch.special.ndtri(probability.double()))
        return self.num_train_timesteps * self.shift * sigma / (1 + (self.shift - 1) * sigma)


def mass_per_interval(partition: Partition, density: TimestepDensity) -> list[float]:
    """The share of training samples that each interval's expert would get without stratification; sums to 1."""
    return density.cdf(torch.tensor(partition.boundaries, dtype=torch.double)).diff().tolist()


def draw_timesteps(
    interval: Interval, density: TimestepDensity, num_samples: int, generator: torch.Generator, *, integer: bool
) -> Tensor:
    """Draw t from the density truncated to an interval (by truncation, never by squeezing).

    Args:
        interval: where t must fall.
        density: the model family's own density.
        num_samples: how many.
        generator: a CPU generator.
        integer: round down to whole timesteps (DDPM-like models); an interval then needs to contain one.

    Returns:
        ``(num_samples,)`` on the CPU: int64 if ``integer``, else float32.

    Raises:
        UserError: ``integer`` is asked of an interval that contains no whole timestep.
    """
    first, stop = math.ceil(interval.lo), math.ceil(interval.hi)
    if integer and first >= stop:
        raise UserError(f"the interval {interval} contains no whole timestep to train on")
    lo, hi = (first, stop) if integer else (interval.lo, interval.hi)
    low, high = density.cdf(torch.tensor([lo, hi], dtype=torch.double)).tolist()
    probability = low + (high - low) * torch.rand(num_samples, generator=generator, dtype=torch.double)
    t = density.icdf(probability).clamp(lo, hi)
    if integer:
        return t.floor().long().clamp(first, stop - 1)
    return t.float().clamp(*_float32_within(lo, hi))


def mirror_timesteps(t: Tensor, interval: Interval, density: TimestepDensity, *, integer: bool) -> Tensor:
    """The antithetic partners of timesteps: what the mirrored quantile ``1 - u`` of the truncated density gives.

    Pairs have the density of single draws. Uniformly drawn whole timesteps become ``lo + hi - 1 - t`` (DeMe, 3.2; lo
    and hi rounded up to whole ones), uniformly drawn continuous ones ``lo + hi - t``.

    Args:
        t: in the interval, as `draw_timesteps` gives them.
        interval: in which they are mirrored.
        density: from which they were drawn; uniform if ``integer``.
        integer: whether timesteps are whole.

    Returns:
        Timesteps in the interval, in the shape and dtype of ``t``.
    """
    if integer:
        return math.ceil(interval.lo) + math.ceil(interval.hi) - 1 - t
    low, high = density.cdf(torch.tensor([interval.lo, interval.hi], dtype=torch.double)).tolist()
    mirrored = density.icdf(low + high - density.cdf(t)).clamp(interval.lo, interval.hi)
    return mirrored.to(t.dtype).clamp(*_float32_within(interval.lo, interval.hi))


def _float32_within(lo: float, hi: float) -> tuple[float, float]:
    """The smallest and the largest float32 in ``[lo, hi)``."""
    first, last = torch.tensor([lo, hi], dtype=torch.float32)
    if first.item() < lo:
        first = first.nextafter(torch.tensor(math.inf))
    if last.item() >= hi:
        last = last.nextafter(torch.tensor(-math.inf))
    return first.item(), last.item()


class NoiseSchedule(Protocol):
    """What is used of a diffusers scheduler."""

    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps of an inference run."""
        ...


def sigma_of(t: Tensor | float, scheduler: NoiseSchedule) -> Tensor:
    """Noise-to-signal ratio of the variance-exploding form (DDPM) or the flow time in [0, 1], float64.

    DDPM-like: ``sigma = sqrt((1 - a) / a)`` with a = alphas_cumprod, interpolated linearly in log-SNR between whole
    timesteps. Flow: ``sigma = t / T``.
    """
    t = torch.as_tensor(t, dtype=torch.double)
    alphas = _alphas_cumprod(scheduler)
    if alphas is None:
        return t / NUM_TRAIN_TIMESTEPS
    return torch.exp(-0.5 * _interpolate(torch.log(alphas / (1 - alphas)), t))


def log_snr_of(t: Tensor | float, scheduler: NoiseSchedule) -> Tensor:
    """Natural logarithm of the signal-to-noise ratio: ``-2 ln sigma`` (DDPM), ``2 ln((1 - sigma) / sigma)`` (flow)."""
    sigma = sigma_of(t, scheduler)
    if _alphas_cumprod(scheduler) is None:
        return -2 * torch.logit(sigma)
    return -2 * torch.log(sigma)


def t_of_log_snr(log_snr: Tensor | float, scheduler: NoiseSchedule) -> Tensor:
    """Inverse of `log_snr_of`; values beyond the schedule's ends are clamped to them. float64."""
    log_snr = torch.as_tensor(log_snr, dtype=torch.double)
    alphas = _alphas_cumprod(scheduler)
    if alphas is None:
        return NUM_TRAIN_TIMESTEPS * torch.sigmoid(-0.5 * log_snr)
    descending = torch.log(alphas / (1 - alphas))
    above = torch.searchsorted(-descending, -log_snr).clamp(1, len(descending) - 1)
    start, end = descending[above - 1], descending[above]
    return (above - 1 + (log_snr - start) / (end - start)).clamp(0, len(descending) - 1)


def t_of_sigma(sigma: Tensor | float, scheduler: NoiseSchedule) -> Tensor:
    """Inverse of `sigma_of`; values beyond the schedule's ends are clamped to them. float64."""
    sigma = torch.as_tensor(sigma, dtype=torch.double)
    if _alphas_cumprod(scheduler) is None:
        return NUM_TRAIN_TIMESTEPS * sigma
    return t_of_log_snr(-2 * torch.log(sigma), scheduler)


def inference_timesteps(scheduler: NoiseSchedule, num_inference_steps: int) -> list[float]:
    """The timesteps that the denoiser receives at a number of inference steps, in their order (high noise first)."""
    scheduler.set_timesteps(num_inference_steps)
    timesteps: list[float] = scheduler.timesteps.tolist()
    return timesteps


def step_of(t: float, timesteps: Sequence[float]) -> int:
    """The step number (from 0) of an inference run that is nearest to a timestep; the noisier one of two as near."""
    return min(range(len(timesteps)), key=lambda step: abs(timesteps[step] - t))


def steps_per_interval(partition: Partition, timesteps: Sequence[float]) -> list[list[int]]:
    """Which steps (counted from 0) of an inference run fall into each interval."""
    steps: list[list[int]] = [[] for _ in range(len(partition))]
    for step, t in enumerate(timesteps):
        steps[partition.index_of(t)].append(step)
    return steps


def is_flow(scheduler: NoiseSchedule) -> bool:
    """Whether a scheduler is of flow models: by its kind, or because it was told to be (``use_flow_sigmas``)."""
    kind = type(scheduler)
    config: Mapping[str, object] = getattr(scheduler, "config", {})
    return "FlowMatch" in kind.__name__ or (takes_flow_sigmas(kind) and bool(config.get("use_flow_sigmas")))


def takes_flow_sigmas(kind: type) -> bool:
    """Whether schedulers of a class can be told to be of flow models. Other classes keep the option unread."""
    return "use_flow_sigmas" in inspect.signature(kind.__init__).parameters  # type: ignore[misc]  # of no instance


def _alphas_cumprod(scheduler: NoiseSchedule) -> Tensor | None:
    """The table of a DDPM-like scheduler; ``None`` of one for flow models.

    Raises:
        UserError: it is neither, as one of EDM.
    """
    if is_flow(scheduler):
        return None
    alphas: Tensor | None = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise UserError(
            f"a {type(scheduler).__name__} tells neither DDPM's alphas_cumprod nor that it is of a flow model, so what"
            " its timesteps mean is not known"
        )
    return alphas.double().cpu()


def _interpolate(values: Tensor, t: Tensor) -> Tensor:
    below = t.floor().long().clamp(0, len(values) - 2)
    return torch.lerp(values[below], values[below + 1], (t - below).clamp(0, 1))
