"""An exponential moving average of parameters, in fp32, as a function of the updates done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def ema_decay_at(step: int, decay: float, *, warmup: bool) -> float:
    """The decay of an update: ``min(decay, (1 + n) / (10 + n))`` after n optimiser updates, or without warm-up decay.

    Args:
        step: n, from 1.
        decay: what it grows to.
        warmup: whether early averages forget faster, so that the untrained weights do not linger.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class MovingAverage:
    """Averages of named parameters; ``EMAModel`` of diffusers counts its own steps, here the loop's step decides.

    Args:
        parameters: what is averaged; the averages start as copies.
        decay: share of the old average that an update keeps, in [0, 1).
        warmup: see `ema_decay_at`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, *, warmup: bool = True) -> None:
        self.parameters, self.decay, self.warmup = dict(parameters), decay, warmup
        self.averages = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after an optimiser update, counted from 1."""
        share = 1 - ema_decay_at(step, self.decay, warmup=self.warmup)
        torch._foreach_lerp_(list(self.averages.values()), [p.float() for p in self.parameters.values()], share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the parameters are the averages; then they are what they were, to the byte."""
        own: dict[str, Tensor] = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.averages[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]
