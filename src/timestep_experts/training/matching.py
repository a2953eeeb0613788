"""The losses of distillation: whose gradients reach whom (DMD2, arXiv 2405.14867, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from timestep_experts.data import EncodedDataset
from timestep_experts.mixture import Mixture
from timestep_experts.models import Family, Samples
from timestep_experts.models.family import Conditioning
from timestep_experts.objectives import (
    clean_from_noise,
    discriminator_loss,
    generator_adversarial_loss,
    guided,
    matching_gradient,
    matching_loss,
    squared_error,
)
from timestep_experts.training.batches import Batch
from timestep_experts.training.discriminator import DiscriminatorHead, middle_features
from timestep_experts.training.distill_batches import DistillBatch, Renoising
from timestep_experts.training.generator import Generator, alphas_at
from timestep_experts.training.stage import Precision

Inputs = Literal["backsim", "real"]


@dataclass(frozen=True)
class Adversary:
    """Weights of the adversarial losses.

    Args:
        generator_weight: of the generator's.
        discriminator_weight: of the discriminator's, beside the fake score's own loss.
    """

    generator_weight: float = 1e-3
    discriminator_weight: float = 1e-2


@dataclass
class Distilling:
    """An `Objective`: every step teaches the fake score and the discriminator, every so many-th the generator too.

    Gradients of the generator's losses reach what learns of the mixture and nothing else, those of the others reach
    the fake score and the head and nothing else.

    Args:
        generator: in the mode of its stage.
        mixture: what the generator's denoiser carries; in mode ``off`` that denoiser is the real score.
        fake: the family around the fake score.
        head: of the discriminator.
        adversary: ``None`` without one.
        inputs: see `DistillSettings`.
        guidance_scale: of the real score.
        generator_interval: the generator learns at every so many-th step.
        samples_per_mean: losses are summed over samples and divided by this.
    """

    generator: Generator
    mixture: Mixture
    fake: Family
    head: DiscriminatorHead | None
    adversary: Adversary | None
    inputs: Inputs
    guidance_scale: float
    generator_interval: int
    samples_per_mean: int
    _noted: dict[str, list[Tensor]] = field(default_factory=dict, init=False)

    def backward(
        self, step: int, /, family: Family, dataset: EncodedDataset, chunk: Batch, precision: Precision
    ) -> Tensor:
        """See `Objective`; the losses are those of the fake score."""
        assert isinstance(chunk, DistillBatch)
        moment = _Moment(self, family, dataset, chunk, precision)
        is_turn = (step + 1) % self.generator_interval == 0
        with torch.set_grad_enabled(is_turn):
            clean = moment.generate()
        if is_turn:
            self._teach_generator(moment, clean)
        clean = clean.detach()
        losses = moment.fake_losses(clean)
        (losses.sum() / self.samples_per_mean).backward()  # type: ignore[no-untyped-call]
        if self.adversary is not None:
            doubts = discriminator_loss(moment.logits(clean, "generated"), moment.logits(moment.latents, "real"))
            (self.adversary.discriminator_weight * doubts.sum() / self.samples_per_mean).backward()  # type: ignore[no-untyped-call]
            self._note("loss/discriminator", doubts)
        return losses.detach()

    def take_values(self) -> Mapping[str, float]:
        """Means since the last time, for the log."""
        values = {name: torch.cat(parts).mean().item() for name, parts in self._noted.items()}
        self._noted.clear()
        return values

    def _note(self, name: str, values: Tensor) -> None:
        self._noted.setdefault(name, []).append(values.detach())

    def _teach_generator(self, moment: _Moment, clean: Tensor) -> None:
        gradient = moment.matching_gradient(clean.detach())
        loss = matching_loss(clean, gradient).sum() / self.samples_per_mean
        self._note("matching_gradient", gradient.abs().flatten(1).mean(1))
        if self.adversary is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        seen = clean.detach().requires_grad_()
        fooled = generator_adversarial_loss(moment.logits(seen, "adversarial"))
        self._note("loss/generator_adversarial", fooled)
        weighted = self.adversary.generator_weight * fooled.sum() / self.samples_per_mean
        (pull,) = torch.autograd.grad(weighted, seen)  # in the picture alone: the discriminator is not to learn from it
        torch.autograd.backward([loss, clean], [torch.ones_like(loss), pull])


class _Moment:
    """One micro-batch on the device, and what the networks say to it."""

    def __init__(
        self, owner: Distilling, family: Family, dataset: EncodedDataset, chunk: DistillBatch, precision: Precision
    ) -> None:
        self.owner, self.family, self.dataset, self.chunk = owner, family, dataset, chunk
        self.device, self.precision = family.device, precision
        self.latents = dataset.latents[chunk.indices].to(self.device)
        self.conditioning = self._conditioning(torch.arange(len(chunk)))

    def _conditioning(self, places: Tensor, *, without_caption: bool = False) -> Conditioning:
        dropped = self.chunk.dropped[places]
        wanted = torch.ones_like(dropped) if without_caption else dropped
        return self.dataset.conditioning(self.chunk.indices[places], self.device, wanted)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def generate(self) -> Tensor:
        """The generator's pictures, x."""
        generator, chunk = self.owner.generator, self.chunk
        t, noises = chunk.t.to(self.device), chunk.renoise.to(self.device)
        with self._autocast():
            noisy = self._generator_input(t, noises)
        with self._autocast():  # anew: it would keep the casts of weights that were made without a graph
            return generator.clean(noisy, t, self.conditioning)

    def _generator_input(self, t: Tensor, noises: Tensor) -> Tensor:
        step = self.chunk.step
        if self.owner.inputs == "backsim":
            return self.owner.generator.input_at(step, noises, self._conditioning)
        fresh = noises[torch.arange(len(step)), step]
        is_start = (step == 0).to(self.device).reshape(-1, *(1,) * (fresh.dim() - 1))
        return torch.where(is_start, fresh, self.family.noise.add_noise(self.latents, fresh, t))

    @torch.no_grad()
    def matching_gradient(self, clean: Tensor) -> Tensor:
        """See there."""
        again = self.chunk.renoisings["match"].to(self.device)
        alpha, scale = alphas_at(self.family, again.t), self.owner.guidance_scale
        noisy = self.family.noise.add_noise(clean, again.noise, again.t)
        fake = self.owner.fake.predict(noisy, again.t, self.conditioning)  # in fp32: a small difference of two follows
        with self._autocast(), self.owner.mixture.using("off"):
            real = self.family.predict(noisy, again.t, self.conditioning)
            if scale != 1:
                empty = self._conditioning(torch.arange(len(self.chunk)), without_caption=True)
                real = guided(real, self.family.predict(noisy, again.t, empty), scale)
        return matching_gradient(clean, clean_from_noise(noisy, fake, alpha), clean_from_noise(noisy, real, alpha))

    def fake_losses(self, clean: Tensor) -> Tensor:
        """``mean (F(z) - n)^2`` of each sample: the fake score is the denoiser of what the generator makes."""
        again = self.chunk.renoisings["fake"].to(self.device)
        with self._autocast():
            denoised = self.owner.fake.denoise(Samples(clean, again.noise, again.t, self.conditioning))
        return squared_error(denoised.predicted, denoised.target)

    def logits(self, clean: Tensor, purpose: Literal["adversarial", "generated", "real"]) -> Tensor:
        """What the discriminator thinks of pictures, made noisy."""
        again: Renoising = self.chunk.renoisings[purpose].to(self.device)
        assert self.owner.head is not None  # an adversary comes with one
        noisy = self.family.noise.add_noise(clean, again.noise, again.t)
        with self._autocast():
            logits: Tensor = self.owner.head(middle_features(self.owner.fake, noisy, again.t, self.conditioning))
        return logits
