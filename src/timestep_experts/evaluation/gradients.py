"""Where gradients of different timesteps agree: what a partition of the timesteps can be read from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timestep_experts.data import EncodedDataset
from timestep_experts.errors import UserError
from timestep_experts.intervals import Interval, Partition
from timestep_experts.models import Family, Samples
from timestep_experts.objectives import squared_error
from timestep_experts.training.batches import generator_for

_CHUNK = 2**22


@dataclass(frozen=True)
class GradientSettings:
    """What gradients are taken of.

    Args:
        num_timesteps: K; t is the middle of each of K equal bins.
        num_pictures: the same at every t, each with the same noise.
        batch_size: pictures at a time.
        sketch_size: numbers that a gradient is projected to; ``None`` keeps K whole gradients, in fp32.
        parameters: a regular expression that a parameter's full name must match.
        seed: of pictures, noise and projection.

    Raises:
        UserError: a value is not allowed.
    """

    num_timesteps: int = 20
    num_pictures: int = 64
    batch_size: int = 16
    sketch_size: int | None = 2**16
    parameters: str = ".*"
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {"timesteps": self.num_timesteps, "pictures": self.num_pictures, "batch size": self.batch_size}
        sizes["sketch size"] = 1 if self.sketch_size is None else self.sketch_size
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"the {name} must be at least 1; got {value}")
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise UserError(f"parameters: {self.parameters!r} is no regular expression: {error}") from error


@dataclass(frozen=True)
class Gradients:
    """Gradients of the mean loss at K timesteps, as far as cosines need them.

    Args:
        bins: that the timesteps stand for, from low to high noise.
        t: of each, its bin's middle.
        sketches: ``(K, m)`` fp32; inner products are those of the gradients, of a projection in expectation.
        norms: exact, of each gradient.
        losses: mean, at each t.
        num_parameters: that gradients were taken of.
    """

    bins: tuple[Interval, ...]
    t: tuple[float, ...]
    sketches: Tensor
    norms: tuple[float, ...]
    losses: tuple[float, ...]
    num_parameters: int

    def similarity(self) -> Tensor:
        """Cosines ``(K, K)`` fp64; the diagonal is 1.

        Raises:
            UserError: a gradient is zero or not finite.
        """
        lengths = self.sketches.double().norm(dim=1, keepdim=True)
        if not bool((lengths.isfinite() & (lengths > 0)).all()):
            wrong = next(t for t, norm in zip(self.t, lengths, strict=True) if not (norm.isfinite() and norm > 0))
            raise UserError(f"the gradient at t = {wrong:g} is zero or not finite, so it has no direction")
        unit = self.sketches.double() / lengths
        cosines: Tensor = (unit @ unit.T).fill_diagonal_(1.0).clamp(-1, 1)
        return cosines


def measure_gradients(family: Family, dataset: EncodedDataset, settings: GradientSettings) -> Gradients:
    """Gradients of the denoising loss by the denoiser's parameters, at K timesteps; the family is left as it was.

    In memory: one gradient of the chosen parameters, and K sketches. The projection is a count sketch (each number is
    added, with a random sign, to one of m sums; arXiv 0902.2206): cosines are off by about ``1 / sqrt(m)``, 0.004 at
    the default. Random numbers depend on the seed and the parameter's name alone, so all timesteps share them.

    Raises:
        UserError: no parameter matches.
    """
    bins = Partition.uniform(settings.num_timesteps, family.noise.num_train_timesteps).intervals
    times = [_middle(interval, family.noise.has_integer_timesteps) for interval in bins]
    generator = generator_for(settings.seed, "gradients")
    rows = torch.randperm(len(dataset), generator=generator)[: settings.num_pictures]
    noise = torch.randn(len(rows), *dataset.latents.shape[1:], generator=generator)
    sketches, norms, losses = [], [], []
    with _trainable(family.denoiser, settings.parameters) as parameters:
        for t in tqdm(times, desc="gradients", unit="timestep", leave=False):
            losses.append(_accumulate(family, dataset, rows, noise, t, settings.batch_size))
            gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in parameters.items()}
            norms.append(sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5)
            sketches.append(_project(gradients, settings))
            for parameter in parameters.values():
                parameter.grad = None
        count = sum(p.numel() for p in parameters.values())
    return Gradients(bins, tuple(times), torch.stack(sketches), tuple(norms), tuple(losses), count)


def add_to_sketch(sketch: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Add numbers to a count sketch: ``s[h(j)] += sign(j) v_j`` with random h and sign.

    Args:
        sketch: ``(m,)``, changed.
        values: any shape.
        generator: of h and sign; in the same state it gives the same ones.
    """
    for part in torch.split(values.detach().flatten(), _CHUNK):
        place = torch.randint(len(sketch), (len(part),), generator=generator)
        sign = torch.randint(0, 2, (len(part),), generator=generator, dtype=torch.int8) * 2 - 1
        sketch.index_add_(0, place, part.cpu().to(sketch.dtype) * sign)


def _project(gradients: dict[str, Tensor], settings: GradientSettings) -> Tensor:
    if settings.sketch_size is None:
        return torch.cat([gradient.flatten().float().cpu() for gradient in gradients.values()])
    sketch = torch.zeros(settings.sketch_size)
    for name, gradient in gradients.items():
        add_to_sketch(sketch, gradient, generator_for(settings.seed, "sketch", name))
    return sketch


def _accumulate(
    family: Family, dataset: EncodedDataset, rows: Tensor, noise: Tensor, t: float, batch_size: int
) -> float:
    """Leave the gradient of the mean loss at t on the parameters; returns that loss."""
    total, kind = 0.0, torch.long if family.noise.has_integer_timesteps else torch.float32
    for chosen, eps in zip(torch.split(rows, batch_size), torch.split(noise, batch_size), strict=True):
        latents, eps = dataset.latents[chosen].to(family.device), eps.to(family.device)
        times = torch.full((len(chosen),), t, device=family.device).to(kind)
        denoised = family.denoise(Samples(latents, eps, times, dataset.features_at(family, chosen, times)))
        loss = squared_error(denoised.predicted, denoised.target).sum() / len(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


@contextmanager
def _trainable(network: nn.Module, pattern: str) -> Iterator[dict[str, nn.Parameter]]:
    named = dict(network.named_parameters())
    chosen = {name: p for name, p in named.items() if re.fullmatch(pattern, name) and p.dtype.is_floating_point}
    if not chosen:
        raise UserError(
            f"parameters: {pattern!r} matches none; it must match a whole name, such as {next(iter(named))}"
        )
    before = {name: parameter.requires_grad for name, parameter in chosen.items()}
    try:
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        yield chosen
    finally:
        for name, parameter in chosen.items():
            parameter.requires_grad_(before[name])
            parameter.grad = None


def _middle(interval: Interval, is_integer: bool) -> float:
    middle = (interval.lo + interval.hi) / 2
    return float(int(middle)) if is_integer else middle
