"""What a denoiser's calls tell its experts: the hook that reads the timestep, and checkpoints that remember it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timestep_experts.mixture.folding import Folding
from timestep_experts.mixture.layer import Binding


@dataclass
class TimestepReader:
    """The hook on the denoiser: reads the timestep of a call, spreads it over the batch, binds it.

    Args:
        binding: of the mixture.
        first: the name of ``forward``'s first parameter, the batch.
        position: of the timestep among the parameters; ``None`` for a network that takes none.
        argument: the timestep's name.
        scale: t is this times what the denoiser receives.
        folding: of this network's layers, if they are folded.
    """

    binding: Binding
    first: str
    position: int | None
    argument: str
    scale: float
    folding: Folding | None = None

    @classmethod
    def of(cls, network: nn.Module, binding: Binding, argument: str, scale: float) -> TimestepReader:
        """For a network whose ``forward`` takes the timestep by that name, or takes none."""
        names = list(inspect.signature(network.forward).parameters)
        return cls(binding, names[0], names.index(argument) if argument in names else None, argument, scale)

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Bind the timestep of a call; called before the network's ``forward``."""
        if self.binding.mode == "off":
            if self.folding is not None:
                self.folding.hold({})
            return
        if self.position is not None:
            sample = args[0] if args else kwargs[self.first]
            t = kwargs[self.argument] if self.argument in kwargs else args[self.position]
            t = t if isinstance(t, Tensor) else torch.tensor([t])  # as_tensor would recompile at every new number
            t = t[:1] if t.dim() and t.stride(0) == 0 else t  # one for all samples, which a pipeline has expanded
            t = t.flatten(1).amax(1) if t.dim() > 1 else t  # one per token: those of a given frame are not noisy
            t = t.to(sample.device).reshape(-1).float()
            t = t if self.scale == 1 else t * self.scale
            self.binding.route_to(t, sample.shape[0])
            if self.folding is not None:
                self.folding.follow(self.binding)
        elif not self.binding.is_bound:
            self.binding.routing = None  # the denoiser's latest timestep is not that of a text
        if torch.is_grad_enabled():
            self._keep_routing_through_checkpoints(module)

    def _keep_routing_through_checkpoints(self, module: nn.Module) -> None:
        for child in module.modules():
            function = getattr(child, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, RoutedCheckpoint):
                child._gradient_checkpointing_func = RoutedCheckpoint(self.binding, function)  # type: ignore[assignment]


@dataclass
class RoutedCheckpoint:
    """A checkpoint function whose recomputation sees the timesteps of its own forward pass, not of the latest one."""

    binding: Binding
    function: Callable[..., Any]

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """Checkpoint ``run(*args)``."""
        routing = self.binding.routing

        def run_as_routed(*inputs: Any) -> Any:
            latest, self.binding.routing = self.binding.routing, routing
            try:
                return run(*inputs)
            finally:
                self.binding.routing = latest

        return self.function(run_as_routed, *args)
