"""The unit that is optimised: one expert, or one kind of router parameter, with its own rate, budget and clip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.intervals import Interval


@dataclass
class ParamGroup:
    """Parameters that learn together, apart from all others.

    An expert is a slice of every layer's stacked tensors. The optimiser is given leaves that share the stack's memory,
    so each expert has optimiser state, a learning rate, a step budget and a gradient norm of its own, exactly as in a
    run by itself, whatever the optimiser.

    Args:
        name: for logs, e.g. ``n8.3``.
        slices: stacked parameters with the index of this group's slice; ``None`` takes all of it.
        learning_rate: its peak.
        max_train_steps: its budget; afterwards the optimiser no longer sees it.
        gradient_share: gradients are multiplied by it: 1 / (strata that it owns), so its loss is the mean over its own
            samples while the total is a sum over strata.
        weight_decay: its own; ``None`` is that of the optimiser's options.
        max_grad_norm: its own limit; ``None`` is that of the optimiser.
        interval: from whose samples it learns; ``None`` is all timesteps.
    """

    name: str
    slices: list[tuple[nn.Parameter, int | None]]
    learning_rate: float
    max_train_steps: int
    gradient_share: float = 1.0
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    interval: Interval | None = None
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        if self.max_train_steps < 1 or self.learning_rate <= 0:
            raise UserError(
                f"{self.name}: steps and learning rate must be positive;"
                f" got {self.max_train_steps} and {self.learning_rate}"
            )
        self.leaves = [p.detach() if i is None else p.detach()[i] for p, i in self.slices]

    @property
    def for_optimiser(self) -> dict[str, Any]:
        """What an optimiser is given."""
        own = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        return {"params": self.leaves, "lr": self.learning_rate, **own}

    def take_gradients(self, max_norm: float | None) -> Tensor:
        """Give the leaves their share of the gradients and clip them by the group's own norm; returns the norm.

        Args:
            max_norm: the limit of groups that have none of their own.
        """
        for leaf, (parameter, index) in zip(self.leaves, self.slices, strict=True):
            if parameter.grad is not None:
                leaf.grad = parameter.grad if index is None else parameter.grad[index]
        gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        if not gradients:  # it is not this group's turn
            return self.leaves[0].new_zeros(())
        if self.gradient_share != 1:
            torch._foreach_mul_(gradients, self.gradient_share)
        max_norm = max_norm if self.max_grad_norm is None else self.max_grad_norm
        limit = float("inf") if max_norm is None else max_norm
        return nn.utils.clip_grad_norm_(self.leaves, limit)

    def drop_gradients(self) -> None:
        """Forget the leaves' gradients; the optimiser skips leaves without one."""
        for leaf in self.leaves:
            leaf.grad = None


@dataclass(frozen=True)
class NetworkRates:
    """How some networks learn otherwise than the rest: a text encoder may have a rate and a clip of its own.

    Args:
        factors: what learning rates are multiplied by, by the network's name.
        weight_decays: in place of the optimiser's, by the network's name.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    weight_decays: Mapping[str, float] = field(default_factory=dict)

    def group(self, networks: Iterable[str]) -> dict[tuple[float, float | None], list[str]]:
        """Which networks learn at the same rate: their names by the factor of the rate and their own weight decay."""
        groups: dict[tuple[float, float | None], list[str]] = {}
        for network in networks:
            groups.setdefault((self.factors.get(network, 1.0), self.weight_decays.get(network)), []).append(network)
        return groups


def learning_rate_factor(name: str, num_warmup_steps: int, num_training_steps: int) -> Callable[[int], float]:
    """A diffusers learning-rate schedule as a pure function of the step, so nothing of it needs to be saved.

    Raises:
        UserError: diffusers knows no schedule of that name, or it asks for more than a warm-up and a number of steps.
    """
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        schedule = get_scheduler(name, unused, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps)
        factor: Callable[[int], float] = schedule.lr_lambdas[0]
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"lr_scheduler: {name!r} cannot be used here: {error or type(error).__name__}") from error
    return factor
