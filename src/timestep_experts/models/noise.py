"""Forward processes: how noise is added, what the denoiser should say, and how training draws t."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.intervals import LogitNormalDensity, TimestepDensity, UniformDensity, is_flow

PREDICTIONS = ("epsilon", "v_prediction")
_SAME_ALPHA = 1e-5  # between tables of alphas_cumprod
_LEAST = 1e-20  # of alphas_cumprod, where a schedule ends in pure noise


class NoiseProcess(Protocol):
    """The forward process of a family, in terms of t."""

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        ...

    @property
    def has_integer_timesteps(self) -> bool:
        """Whether t is a whole number (DDPM-like) rather than continuous (flow)."""
        ...

    @property
    def density(self) -> TimestepDensity:
        """The distribution that t has when the base is trained."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy latents at ``t (B,)``."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should say: noise, velocity or flow."""
        ...

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio of the noisy latents at ``t``, the square of the factors' ratio; float64."""
        ...

    def error_ratio(self, t: Tensor) -> Tensor:
        """How much larger than the implied error of the noise an error of the target is at ``t``, float64."""
        ...


class DiscreteNoise:
    """DDPM-like: ``sqrt(a_t) s_t x0 + sqrt(1 - a_t) noise`` at whole t, predicting noise or velocity.

    Args:
        scheduler: any diffusers scheduler with a noise schedule and a ``prediction_type``.
        source: whose it is, for errors.
        signal_scale: ``(T,)``, s_t; ``None`` is 1 everywhere.

    Raises:
        UserError: it predicts something else than noise or velocity, or has another noise schedule than DDPM.
    """

    def __init__(self, scheduler: DDPMScheduler, source: str, signal_scale: Tensor | None = None) -> None:
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise UserError(f"{source}: prediction_type is {prediction!r}; allowed are {', '.join(PREDICTIONS)}")
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.signal_scale = signal_scale
        if not have_one_schedule(self.scheduler, scheduler):
            raise UserError(
                f"{source}: a {type(scheduler).__name__} does not add noise as DDPM does; allowed are schedulers with"
                " the noise schedule of a DDPMScheduler of the same betas"
            )

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return int(self.scheduler.config["num_train_timesteps"])

    @property
    def has_integer_timesteps(self) -> bool:
        """Whole timesteps."""
        return True

    @property
    def density(self) -> UniformDensity:
        """Uniform in t."""
        return UniformDensity(self.num_train_timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See the class."""
        noisy: Tensor = self.scheduler.add_noise(self._scaled(latents, t), noise, t)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, or the velocity ``sqrt(a_t) noise - sqrt(1 - a_t) s_t x0``."""
        if self.scheduler.config["prediction_type"] == "epsilon":
            return noise
        velocity: Tensor = self.scheduler.get_velocity(self._scaled(latents, t), noise, t)
        return velocity

    def snr(self, t: Tensor) -> Tensor:
        """``a_t s_t^2 / (1 - a_t)``."""
        kept = self._kept(t)
        return kept * self._scale(t).square() / (1 - kept)

    def error_ratio(self, t: Tensor) -> Tensor:
        """1 for noise, ``1 / sqrt(a_t)`` for velocity."""
        kept = self._kept(t)
        if self.scheduler.config["prediction_type"] == "epsilon":
            return torch.ones_like(kept)
        return kept.clamp(min=_LEAST).rsqrt()

    def _kept(self, t: Tensor) -> Tensor:
        return self.scheduler.alphas_cumprod.double().to(t.device)[t]  # type: ignore[no-any-return]

    def _scale(self, t: Tensor) -> Tensor:
        if self.signal_scale is None:
            return torch.ones((), dtype=torch.double, device=t.device)
        return self.signal_scale.double().to(t.device)[t]

    def _scaled(self, latents: Tensor, t: Tensor) -> Tensor:
        if self.signal_scale is None:
            return latents
        return latents * per_sample(self.signal_scale.to(latents.device)[t], latents)


@dataclass(frozen=True)
class FlowNoise:
    """Rectified flow: ``(1 - sigma) x0 + sigma noise`` at ``sigma = t / T``, predicting ``noise - x0``.

    Args:
        density: how training draws t, shift included.
        num_train_timesteps: T.
    """

    density: LogitNormalDensity = field(default_factory=LogitNormalDensity)
    num_train_timesteps: int = 1000

    @classmethod
    def of_scheduler(cls, scheduler: Any, source: str, num_tokens: int) -> FlowNoise:
        """T and the shift of a flow-matching scheduler, under a logit-normal density of mean 0 and deviation 1.

        Args:
            scheduler: a diffusers flow-matching scheduler.
            source: whose it is, for errors.
            num_tokens: image tokens of a picture of the base's default size; a dynamic shift is the one for them.

        Raises:
            UserError: the scheduler is not of a flow model.
        """
        if not is_flow(scheduler):
            raise UserError(
                f"{source}: a {type(scheduler).__name__} is no scheduler of a flow model; allowed are"
                " FlowMatchEulerDiscreteScheduler and others that are made for flow (use_flow_sigmas)"
            )
        num_train_timesteps = int(scheduler.config["num_train_timesteps"])
        shift = flow_shift(scheduler, num_tokens)
        return cls(LogitNormalDensity(0.0, 1.0, shift, num_train_timesteps), num_train_timesteps)

    @property
    def has_integer_timesteps(self) -> bool:
        """Continuous t."""
        return False

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See the class."""
        return torch.lerp(latents, noise, per_sample(t / self.num_train_timesteps, latents))

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002 - the flow is straight
        """``noise - x0``."""
        return noise - latents

    def snr(self, t: Tensor) -> Tensor:
        """``((1 - sigma) / sigma)^2``."""
        sigma = t.double() / self.num_train_timesteps
        return ((1 - sigma) / sigma).square()

    def error_ratio(self, t: Tensor) -> Tensor:
        """``1 / (1 - sigma)``."""
        return 1 / (1 - t.double() / self.num_train_timesteps).clamp(min=_LEAST**0.5)


def have_one_schedule(one: Any, other: Any) -> bool:
    """Whether two schedulers add the same noise at every t; those without a table of alphas (EDM) have no such noise.

    Samplers keep a terminal signal of nothing as a very small one; that counts as the same.
    """
    tables = [getattr(scheduler, "alphas_cumprod", None) for scheduler in (one, other)]
    if tables[0] is None or tables[1] is None or tables[0].shape != tables[1].shape:
        return False
    return torch.allclose(tables[0].double().cpu(), tables[1].double().cpu(), rtol=0, atol=_SAME_ALPHA)


def flow_shift(scheduler: Any, num_tokens: int | None = None) -> float:
    """The shift of a flow scheduler, see `is_flow`.

    Args:
        scheduler: a diffusers scheduler.
        num_tokens: image tokens, on which a dynamic shift depends.

    Raises:
        UserError: the shift depends on image tokens, and their number is not given.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config["shift"] if "shift" in config else config["flow_shift"])
    if num_tokens is None:
        raise UserError(f"the shift of this {type(scheduler).__name__} depends on the size of a picture")
    return _dynamic_shift(config, num_tokens)


def flow_options(scheduler: Any) -> dict[str, Any]:
    """What tells any scheduler of diffusers that it is of the same flow model; each class knows some of the words."""
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if scheduler.config.get("use_dynamic_shifting"):
        return options
    shift = flow_shift(scheduler)
    return {**options, "shift": shift, "flow_shift": shift}


def _dynamic_shift(config: Any, num_tokens: int) -> float:
    """The pipelines' line through (base tokens, base shift) and (most tokens, most shift), in the scheduler's form."""
    fewest, most = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (most - fewest)
    mu = float(config["base_shift"] + slope * (num_tokens - fewest))
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` to ``(B, 1, ..., 1)`` in the dtype of ``like``."""
    return values.to(like.dtype).reshape(-1, *(1,) * (like.dim() - 1))
