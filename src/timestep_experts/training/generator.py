"""A few-step generator: an eps-predicting base whose timestep experts say x0, step by step (DMD2, section 4.5)."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.mixture import Mixture
from timestep_experts.models import Family
from timestep_experts.models.family import Conditioning
from timestep_experts.models.quantization import is_quantised
from timestep_experts.objectives import clean_from_noise

SAMPLER = "LCMScheduler"
"""The scheduler of diffusers that samples as `Generator.sample` does."""


@dataclass(frozen=True)
class Generator:
    """A base model that samples in a few steps: x0, made noisy to the next t with fresh noise, x0, and so on.

    Args:
        family: the base; whatever its denoiser carries, in its present mode, is the generator.
        timesteps: t of each step, descending.

    Raises:
        UserError: the base cannot be distilled, or the timesteps do not descend within [1, T).
    """

    family: Family
    timesteps: tuple[int, ...]

    def __post_init__(self) -> None:
        require_distillable(self.family)
        t, total = self.timesteps, self.family.noise.num_train_timesteps
        if not t or any(a <= b for a, b in pairwise(t)) or t[0] >= total or t[-1] < 1:
            raise UserError(
                f"the timesteps of a generator must descend from at most {total - 1} to at least 1; got {list(t)}"
            )

    def clean(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """x0 as the denoiser sees it, fp32.

        Args:
            noisy: ``(B, c, h, w)``.
            t: ``(B,)`` int64.
            conditioning: text features.
        """
        return clean_from_noise(noisy, self.family.predict(noisy, t, conditioning), alphas_at(self.family, t))

    def input_at(self, step: Tensor, noises: Tensor, conditioning_of: Callable[[Tensor], Conditioning]) -> Tensor:
        """What the generator sees at a step when it samples: pure noise at step 0, its own x0 made noisy later on.

        Nothing of it has a graph.

        Args:
            step: ``(B,)`` int64 on the CPU, each sample's own, from 0.
            noises: ``(B, steps, c, h, w)``: the start, then the fresh noise of every later step.
            conditioning_of: text features of some samples, by their places in the batch.
        """
        noisy = noises[:, 0].clone()
        with torch.no_grad():
            for earlier, (t, following) in enumerate(pairwise(self.timesteps)):
                places = (step > earlier).nonzero()[:, 0]
                if len(places):
                    at, after = (torch.full((len(places),), value, device=noisy.device) for value in (t, following))
                    rows = places.to(noisy.device)
                    clean = self.clean(noisy[rows], at, conditioning_of(places))
                    noisy[rows] = self.family.noise.add_noise(clean, noises[rows, earlier + 1], after)
        return noisy

    def sample(self, noises: Tensor, conditioning: Conditioning) -> Tensor:
        """Latents after all steps; equals `SAMPLER` without guidance within 1e-5.

        Args:
            noises: ``(B, steps, c, h, w)``.
            conditioning: text features.
        """
        last = torch.full((len(noises),), len(self.timesteps) - 1)
        noisy = self.input_at(last, noises, lambda _: conditioning)
        with torch.no_grad():
            return self.clean(noisy, last.new_full((len(noises),), self.timesteps[-1]).to(noisy.device), conditioning)


def require_distillable(family: Family) -> None:
    """Refuse a base that this distillation is not for.

    Raises:
        UserError: it does not predict noise, its denoiser is no UNet2DConditionModel with a middle block, or it is
            quantised.
    """
    denoiser: Any = family.denoiser
    if not isinstance(denoiser, UNet2DConditionModel) or denoiser.mid_block is None:
        raise UserError(
            f"{family.source}: a {type(denoiser).__name__} cannot be distilled; allowed are bases with a"
            " UNet2DConditionModel that has a middle block, such as Stable Diffusion 1.x, 2.x-base and XL"
        )
    scheduler = getattr(family.noise, "scheduler", None)
    prediction = None if scheduler is None else scheduler.config["prediction_type"]
    if prediction != "epsilon":
        raise UserError(
            f"{family.source}: its prediction_type is {prediction or 'a flow'!r}; only bases that predict noise"
            " ('epsilon') can be distilled"
        )
    if is_quantised(denoiser):
        raise UserError(f"{family.source}: a quantised base cannot be distilled, for its copy is trained")


def alphas_at(family: Family, t: Tensor) -> Tensor:
    """The cumulative products of the alphas at t, fp64."""
    noise: Any = family.noise
    alphas: Tensor = noise.scheduler.alphas_cumprod.to(t.device).double()[t]
    return alphas


def trainable_copy(family: Family, mixture: Mixture) -> Family:
    """The same base around a copy of its denoiser that has no experts, in fp32; the other parts are shared.

    Args:
        family: the base.
        mixture: attached to its denoiser.
    """
    denoiser = deepcopy(family.denoiser)
    names = {name for name, network in mixture.networks.items() if network is family.denoiser}
    Mixture.of(dict.fromkeys(names, denoiser)).detach()
    twin = copy(family)
    twin.parts = copy(family.parts)
    setattr(twin.parts, family.denoiser_name, denoiser.float())
    return twin


@torch.no_grad()
def copy_base(source: nn.Module, target: nn.Module) -> None:
    """Copy the values of the base into a copy of its denoiser; of layers with experts, those of the base layer."""
    for name, parameter in target.named_parameters():
        parameter.copy_(source.get_parameter(name))
