"""Hooks: one on the denoiser reads the timestep of a call, and one on every base layer adds its experts."""

from __future__ import annotations

import inspect
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.mixture.carriers import require_separate_projections
from timestep_experts.mixture.experts import ExpertStack
from timestep_experts.mixture.layer import MixtureLayer
from timestep_experts.mixture.state import MixtureState, Mode
from timestep_experts.mixture.timesteps import TimestepInput

_MASKS = {False: ("encoder_attention_mask",), True: ("attention_mask",)}  # of denoisers, and of text encoders
_SCALE_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class NetworkHook(ABC):
    """Something that a mixture does before every call of a network."""

    @abstractmethod
    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before the network's ``forward``."""

    def check_mode(self, mode: Mode) -> None:  # noqa: B027 - most hooks allow all modes
        """Called before the mode changes.

        Raises:
            UserError: this hook does not allow the mode.
        """

    def close(self, network: nn.Module) -> None:  # noqa: B027 - most hooks leave nothing behind
        """Undo what this hook has changed in the network; called when it is removed."""


def add_hook(network: nn.Module, hook: NetworkHook) -> None:
    """Call a hook before every later call of the network, after the hooks that are there."""
    network.register_forward_pre_hook(hook.before_call, with_kwargs=True)


def hooks_of(network: nn.Module) -> Iterator[NetworkHook]:
    """The hooks that mixtures have put on a network."""
    owners = (getattr(function, "__self__", None) for function in list(network._forward_pre_hooks.values()))
    return (owner for owner in owners if isinstance(owner, NetworkHook))


def remove_hook(network: nn.Module, hook: NetworkHook) -> None:
    """Close a hook and call it no more."""
    hook.close(network)
    for key, function in list(network._forward_pre_hooks.items()):
        if getattr(function, "__self__", None) is hook:
            del network._forward_pre_hooks[key]
            network._forward_pre_hooks_with_kwargs.pop(key, None)


def add_layer(layer: MixtureLayer) -> None:
    """Let a layer with experts change the output of its base layer, before hooks of others see it."""
    layer.base_layer.register_forward_hook(layer.after_base, prepend=True, with_kwargs=True)


def layers_in(network: nn.Module) -> Iterator[MixtureLayer]:
    """The layers with experts that sit on a network's modules."""
    for module in network.modules():
        owners = (getattr(function, "__self__", None) for function in list(module._forward_hooks.values()))
        yield from (owner for owner in owners if isinstance(owner, MixtureLayer))


def remove_layer(layer: MixtureLayer) -> None:
    """Let the base layer's output be its own again."""
    base = layer.base_layer
    for key, function in list(base._forward_hooks.items()):
        if getattr(function, "__self__", None) is layer:
            del base._forward_hooks[key]
            base._forward_hooks_with_kwargs.pop(key, None)


def warn_of_dead_scales(layer: MixtureLayer) -> None:
    """At a backward pass in mode ``route``, warn of contexts that cannot learn, by what one layer of a mixture holds.

    B of a context that was never fostered is 0, and so is its gate: each is a factor of the other's gradient.
    """
    for index, scale in enumerate(layer.state.spec.gated_scales):
        up = cast("ExpertStack", layer.experts[scale.name]).B
        if scale.base_gate == 0 and up.requires_grad and not up.is_inference():
            up.register_hook(_DeadScaleWatch(layer, scale.name, index, up))  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class _DeadScaleWatch:
    layer: MixtureLayer
    name: str
    index: int
    up: Tensor
    is_done: bool = False

    def __call__(self, gradient: Tensor) -> None:
        router = self.layer.router
        if self.is_done or self.layer.state.mode != "route" or router is None:
            return
        self.is_done = True
        if not any(bool(values.any()) for values in (gradient, self.up, *router.makers_of(self.index))):
            warnings.warn(
                f"the experts of context {self.name!r} cannot learn: they and their gates are 0, so neither gets a"
                f" gradient. Foster them first (mixture.foster({self.name!r})), or give the scale a base_gate",
                stacklevel=2,
            )


def forget_compiled() -> None:
    """Let what is compiled be compiled anew at its next call: compiled code does not see that hooks come and go."""
    if "torch._dynamo" in sys.modules:  # else nothing has been compiled
        torch.compiler.reset()


@dataclass(eq=False)
class TimestepReader(NetworkHook):
    """Reads the timestep of a call of the denoiser and makes it the mixture's running step.

    Args:
        state: of the mixture.
        first: the name of ``forward``'s first parameter, the batch.
        position: of the timestep among the parameters; ``None`` for a network that takes none.
        timestep: how the denoiser is told the timestep.
        mask: the name and the place of the text's mask among the parameters; ``None`` for a network that takes none.
        attentions: those whose projections carry experts; fused projections are refused.
        name: of the network; empty where there is one.
    """

    state: MixtureState
    first: str
    position: int | None
    timestep: TimestepInput
    mask: tuple[str, int] | None = None
    attentions: Sequence[Any] = ()
    name: str = ""
    _fractions: int = 0
    _is_sure: bool = False

    @classmethod
    def of(
        cls,
        network: nn.Module,
        state: MixtureState,
        timestep: TimestepInput,
        attentions: Sequence[Any] = (),
        name: str = "",
    ) -> TimestepReader:
        """Make the hook for a network whose ``forward`` takes the timestep in that way, or takes none."""
        names = list(inspect.signature(network.forward).parameters)
        position = names.index(timestep.argument) if timestep.argument in names else None
        mask = next(((name, names.index(name)) for name in _MASKS[position is None] if name in names), None)
        is_sure = timestep.scale != 1 or state.spec.num_train_timesteps <= 1
        return cls(state, names[0], position, timestep, mask, attentions, name, _is_sure=is_sure)

    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the running step. A text encoder takes no timestep, so it has none but the one that a caller bound."""
        if self.state.mode == "off":
            return
        require_separate_projections(self.attentions)
        _warn_of_ignored_scale(kwargs)
        if self.position is not None:
            sample = args[0] if args else kwargs[self.first]
            first = sample if isinstance(sample, Tensor) else sample[0]  # Z-Image takes a list of pictures
            name = self.timestep.argument
            value = kwargs[name] if name in kwargs else args[self.position]
            t, mask = self._read(value, first.device), self._read_mask(args, kwargs)
            self.state.step = self.state.step_at(t, len(sample), mask, self.state.read_tables(t, self.name))
        elif self.state.is_bound and self.state.step is not None:
            timed = self.state.read_tables(self.state.step.t, self.name)
            self.state.step = replace(self.state.step, text_mask=self._read_mask(args, kwargs), timed=timed)
        else:
            self.state.step = None  # the denoiser's latest timestep is not that of a text
        if torch.is_grad_enabled():
            self._keep_step_through_checkpoints(module)

    def _read(self, timestep: Any, device: torch.device) -> Tensor:
        """The timesteps ``(B,)``, or ``(1,)`` where one is given for all samples; fp32."""
        t = timestep if isinstance(timestep, Tensor) else torch.tensor([timestep])  # as_tensor: new graph per number
        t = t[:1] if t.dim() and t.stride(0) == 0 else t  # a pipeline has expanded one for all samples
        t = t.flatten(1).amax(1) if t.dim() > 1 else t  # one per token: tokens of a given frame are not noisy
        t = self.timestep.t_of(t.to(device).reshape(-1).float())
        # Fake tensors have no values. In this order, compiled code depends on none of these.
        if not _is_recording() and type(t) is Tensor and not self._is_sure:
            self._require_timesteps(t)
        return t

    def _read_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The mask ``(B, L)`` of the text's tokens, where the call has one that is not yet added to scores."""
        if self.mask is None:
            return None
        name, place = self.mask
        mask = kwargs[name] if name in kwargs else args[place] if place < len(args) else None
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _require_timesteps(self, t: Tensor) -> None:
        """Refuse t / T or 1 - t / T from a denoiser that is thought to be called with t; the first t above 1 is proof.

        Raises:
            UserError: for the second time, all values are at most 1 and some are no whole numbers.
        """
        self._is_sure = bool((t > 1).any())
        self._fractions += bool(((t > 0) & (t < 1)).any())
        if self._fractions > 1 and not self._is_sure:
            raise UserError(
                f"this denoiser seems to be called with shares of noise or signal, not with timesteps from 0 to"
                f" {self.state.spec.num_train_timesteps:g}: its {self.timestep.argument} is {t[0].item():g}, and one"
                " expert would do all the work. Say how it is called when you attach the experts:"
                " timestep=TimestepInput(scale=..., offset=...)"
            )

    def _keep_step_through_checkpoints(self, module: nn.Module) -> None:
        for child in module.modules():
            function = getattr(child, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, StepCheckpoint):
                child._gradient_checkpointing_func = StepCheckpoint(self.state, function)  # type: ignore[assignment]

    def close(self, network: nn.Module) -> None:
        """Give modules their own checkpoint functions back."""
        for module in network.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, StepCheckpoint):
                module._gradient_checkpointing_func = function.function  # type: ignore[assignment]


def _is_recording() -> bool:
    """Whether the call is compiled or captured for later, so that no value may be looked at."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _warn_of_ignored_scale(kwargs: Mapping[str, Any]) -> None:
    """Say that the scale of LoRAs, which diffusers takes in a call, is not one of experts."""
    for name in _SCALE_ARGUMENTS:
        scale = (kwargs.get(name) or {}).get("scale", 1)
        if scale != 1:
            warnings.warn(
                f"{name}={{'scale': {scale}}} weakens LoRAs alone: timestep experts act in full. To call the denoiser"
                " without them, set the mixture's mode to 'off'",
                stacklevel=2,
            )


@dataclass
class StepCheckpoint:
    """A checkpoint function whose recomputation sees the timesteps of its own forward pass, not of the latest one."""

    state: MixtureState
    function: Callable[..., Any]

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """Checkpoint ``run(*args)``."""
        step = self.state.step

        def run_at_its_step(*inputs: Any) -> Any:
            latest, self.state.step = self.state.step, step
            try:
                return run(*inputs)
            finally:
                self.state.step = latest

        return self.function(run_at_its_step, *args)
