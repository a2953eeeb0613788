"""A full copy of a denoiser as a trainee: which of its parameters learn, their averages, what a checkpoint holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.merging import Placement, Projections, find_places
from timestep_experts.training.ema import MovingAverage


class FullCopy:
    """A copy of a denoiser in fp32, with projections where asked for; the original is not touched.

    The copy drops nothing out: it starts by saying what the original says (in evaluation mode to the bit).

    Args:
        denoiser: what is copied.
        trainable: a regular expression that must match the full name of a parameter that learns; ``None`` for all.
        placement: of projections, which always learn.
        ema_decay: of averages of what learns; ``None`` for none.
        ema_warmup: see `ema_decay_at`.
        extra: modules that learn beside it without being part of the expert, by name; they are not averaged.

    Raises:
        UserError: the expression is none or matches no parameter, or projections do not fit the denoiser.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        trainable: str | None = None,
        placement: Placement = "off",
        ema_decay: float | None = None,
        *,
        ema_warmup: bool = True,
        extra: Mapping[str, nn.Module] | None = None,
    ) -> None:
        places = find_places(denoiser, placement)
        chosen = matching_names(denoiser, trainable)
        self.denoiser = _in_fp32(deepcopy(denoiser))
        for module in self.denoiser.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.projections = Projections(self.denoiser, places)
        self.extra = nn.ModuleDict(dict(extra or {}))
        own = dict(self.denoiser.named_parameters())
        self.expert = {**{name: own[name] for name in chosen}, **self.projections.named_deltas()}
        self.average = None if ema_decay is None else MovingAverage(self.expert, ema_decay, warmup=ema_warmup)

    def state_dict(self) -> dict[str, Tensor]:
        """What learns, under ``trained.``, and its averages, under ``ema.``."""
        state = {f"trained.{name}": p.detach() for name, p in self.expert.items()}
        state |= {f"extra.{name}": p.detach() for name, p in self.extra.named_parameters()}
        averages = {} if self.average is None else self.average.averages
        return {**state, **{f"ema.{name}": value for name, value in averages.items()}}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], /) -> None:
        """Load what `state_dict` returned.

        Raises:
            UserError: the names differ.
        """
        own = self.state_dict()
        if own.keys() != tensors.keys():
            some = ", ".join(sorted(own.keys() ^ tensors.keys())[:3])
            raise UserError(f"a checkpoint of other parameters than what is trained: they differ in {some}")
        for name, value in own.items():
            value.copy_(tensors[name])

    def trained_modules(self) -> Iterable[nn.Module]:
        """See `Trainable`."""
        return (self.denoiser, self.projections, self.extra)

    def follow(self, step: int) -> None:
        """Average after an optimiser update."""
        if self.average is not None:
            self.average.update(step)

    @contextmanager
    def as_expert(self) -> Iterator[None]:
        """While open, the copy is what would be kept: averaged, and in evaluation mode."""
        was_training = self.denoiser.training
        self.denoiser.eval()
        try:
            with nullcontext() if self.average is None else self.average.in_place():
                yield
        finally:
            self.denoiser.train(was_training)


def matching_names(denoiser: nn.Module, trainable: str | None) -> list[str]:
    """The parameters whose full names a regular expression matches; all of them for ``None``.

    Raises:
        UserError: it is no regular expression, or matches none.
    """
    names = [name for name, _ in denoiser.named_parameters()]
    if trainable is None:
        return names
    try:
        found = [name for name in names if re.fullmatch(trainable, name)]
    except re.error as error:
        raise UserError(f"trainable: {trainable!r} is no regular expression: {error}") from error
    if not found:
        raise UserError(
            f"trainable: {trainable!r} matches no parameter of this {type(denoiser).__name__}; it must match a whole"
            f" name, such as {names[0]!r}"
        )
    return found


def _in_fp32(module: nn.Module) -> nn.Module:
    """``module.float()``, which fake tensors do not bear; ties are kept."""
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                wide = tensor.detach().float()
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(owner, name, made.setdefault(id(tensor), nn.Parameter(wide) if is_parameter else wide))
    return module
