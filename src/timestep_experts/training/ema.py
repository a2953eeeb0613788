"""An exponential moving average of parameters, in fp32, as a function of the updates done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.training.stage import Trainable


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


class Averaged:
    """A trainee of which the moving average of what learns is kept; see `Trainable`.

    Args:
        trainee: what learns.
        parameters: what of it learns; they share memory with the tensors of its ``state_dict``.
        decay: see `MovingAverage`.
    """

    _PREFIX = "average."

    def __init__(self, trainee: Trainable, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.trainee = trainee
        by_place = {parameter.data_ptr(): parameter for parameter in parameters}
        places = {name: tensor.data_ptr() for name, tensor in trainee.state_dict().items()}
        own = {name: by_place[place] for name, place in places.items() if place in by_place}
        self._average = MovingAverage(own, decay)

    def follow(self, step: int) -> None:
        """Take in the weights after an update, counted from 1."""
        self._average.update(step)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, and their averages."""
        averages = {self._PREFIX + name: average for name, average in self._average.averages.items()}
        return {**self.trainee.state_dict(), **averages}

    def load_state_dict(self, tensors: Mapping[str, Tensor], /) -> None:
        """Load what `state_dict` returned.

        Raises:
            UserError: it is of another trainee, or has other averages.
        """
        averages = {n.removeprefix(self._PREFIX): t for n, t in tensors.items() if n.startswith(self._PREFIX)}
        if averages.keys() != self._average.averages.keys():
            some = ", ".join(sorted(averages.keys() ^ self._average.averages.keys())[:3])
            raise UserError(f"a checkpoint with averages of other parameters than what is trained: {some}")
        self.trainee.load_state_dict({n: t for n, t in tensors.items() if not n.startswith(self._PREFIX)})
        for name, average in averages.items():
            self._average.averages[name].copy_(average)

    def trained_modules(self) -> Iterable[nn.Module]:
        """Those of the trainee."""
        return self.trainee.trained_modules()

    def observed(self) -> AbstractContextManager[None]:
        """While open, the trainee is its average."""
        return self._average.in_place()

    @torch.no_grad()
    def settle(self) -> None:
        """Give the trainee the averages as its weights."""
        for name, parameter in self._average.parameters.items():
            parameter.copy_(self._average.averages[name])
