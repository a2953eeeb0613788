"""Attach a mixture of timestep experts to any network, choose its mode, and take it off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.intervals import Interval
from timestep_experts.mixture.carriers import (
    attentions_of,
    named_layers,
    reads_text,
    require_separate_projections,
    uncompiled,
)
from timestep_experts.mixture.fast import FastKernels
from timestep_experts.mixture.hooks import (
    NetworkHook,
    TimestepReader,
    add_hook,
    add_layer,
    forget_compiled,
    hooks_of,
    layers_in,
    remove_hook,
    remove_layer,
    warn_of_dead_scales,
)
from timestep_experts.mixture.kernels import Kernels
from timestep_experts.mixture.layer import MixtureLayer
from timestep_experts.mixture.parameters import MixtureParameters
from timestep_experts.mixture.spec import MixtureSpec
from timestep_experts.mixture.state import MODES, MixtureState, Mode
from timestep_experts.mixture.targets import Networks, Targets, match_all
from timestep_experts.mixture.timesteps import TimestepInput, timestep_input_of

default_kernels: type[Kernels] = FastKernels
"""The arithmetic of mixtures that are attached without naming another one."""


class Mixture(MixtureParameters):
    """The experts attached to one network or several. `attach` makes it, `of` finds it again, `detach` undoes it.

    The networks are used as before: a hook reads ``timestep`` from each call and hands it to the layers.
    """

    @classmethod
    def attach(
        cls,
        networks: Networks,
        spec: MixtureSpec,
        target_modules: Targets | Mapping[str, Targets],
        *,
        owned: Mapping[str, Interval] | None = None,
        timestep: TimestepInput | None = None,
        seed: int = 0,
        kernels: Kernels | None = None,
    ) -> Mixture:
        """Give every target module its experts, in mode ``off``. B is zero, so nothing changes until training.

        Args:
            networks: the denoiser; its ``forward`` takes the timestep, a number or a tensor of 1 or B values.
                Or several networks by name; the name is then the first part of their layers' paths. A network whose
                ``forward`` takes no timestep (a text encoder) gets it from `at`.
            spec: scales and router form.
            target_modules: see `match_targets`, one for each network if there are several; every element of a list must
                match something.
            owned: the interval of t that a network works on, by its name; it carries no experts of other timesteps.
            timestep: how the denoisers are told the timestep; ``None`` for what diffusers' pipelines do.
            seed: of the initial A. The experts of a layer do not depend on which others there are.
            kernels: the arithmetic of the layers; ``None`` for the fast one.

        Raises:
            UserError: a network already carries a mixture, a pattern matches nothing, or a match cannot carry experts.
        """
        named = _by_name(networks)
        patterns = target_modules if isinstance(target_modules, Mapping) else dict.fromkeys(named, target_modules)
        matches = {name: match_all(network, patterns[name]) for name, network in named.items()}
        state = MixtureState(spec, kernels or default_kernels())
        layers, readers = {}, {}
        for name, network in named.items():
            found = named_layers(network)
            attentions = attentions_of(found, matches[name])
            require_separate_projections(attentions)
            readers[name] = TimestepReader.of(network, state, timestep or timestep_input_of(network), attentions, name)
            for module in matches[name]:
                path = f"{name}.{module}" if name else module
                text = readers[name].position is None or reads_text(found, module)
                layers[path] = MixtureLayer(
                    found[module], state, path, (owned or {}).get(name), reads_text=text, seed=seed
                )
        state.routers.update({path: layer.router for path, layer in layers.items() if layer.router is not None})
        for layer in layers.values():
            layer.move_experts(_device_of(layer.base_layer))
            add_layer(layer)
        warn_of_dead_scales(next(iter(layers.values())))
        for name, network in named.items():
            add_hook(network, readers[name])
        forget_compiled()
        return cls(state, named, layers)

    @classmethod
    def of(cls, networks: Networks) -> Mixture:
        """Find the mixture that networks, or deep copies of them, carry.

        Raises:
            UserError: they carry none.
        """
        named = _by_name(networks)
        layers = {layer.name: layer for network in named.values() for layer in layers_in(network)}
        if not layers:
            kinds = ", ".join(type(network).__name__ for network in named.values())
            raise UserError(f"this {kinds} carries no mixture of experts")
        return cls(next(iter(layers.values())).state, named, layers)

    def detach(self) -> None:
        """Remove the hooks; every ``state_dict`` is what it was, to the byte."""
        for network, hook in self._hooks():
            remove_hook(network, hook)
        for layer in self.layers.values():
            remove_layer(layer)
        forget_compiled()

    @property
    def spec(self) -> MixtureSpec:
        """Scales and router form."""
        return self.state.spec

    @property
    def mode(self) -> Mode:
        """Which experts are active.

        ``off``: none. ``foster``: those of some scales, ungated (`foster`). ``switch``: every scale whose gate is not 0
        without a router. ``route``: all, contexts as the routers say.
        """
        return self.state.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}: allowed are {', '.join(MODES)}")
        for _, hook in self._hooks():
            hook.check_mode(mode)
        self.state.mode = mode

    def foster(self, *scale_names: str) -> None:
        """Set mode ``foster``: the experts of these scales are active, ungated, and no others."""
        fostered = tuple(self.spec.scale(name).name for name in scale_names)
        self.mode = "foster"
        self.state.fostered = fostered

    @contextmanager
    def using(self, mode: Mode) -> Iterator[None]:
        """Set another mode for a while, then return to the one before."""
        before = self.mode
        self.mode = mode
        try:
            yield
        finally:
            self.state.mode = before

    @contextmanager
    def at(self, t: Tensor) -> Iterator[None]:
        """Bind timesteps ``(B,)`` by hand, for a network whose ``forward`` takes none."""
        with self.state.bound(t.reshape(-1).float()):
            yield

    @property
    def is_bound(self) -> bool:
        """Whether `at` is open."""
        return self.state.is_bound

    @property
    def timesteps(self) -> Tensor | None:
        """The timesteps ``(B,)`` of the running or latest forward pass; ``None`` before the first."""
        return None if self.state.step is None else self.state.step.t

    @contextmanager
    def recorded_gates(self) -> Iterator[dict[str, list[Tensor]]]:
        """Collect what the routers add to the base gates, ``(B, m)`` per call and layer path, in mode ``route``."""
        self.state.gate_log = log = dict[str, list[Tensor]]()
        try:
            yield log
        finally:
            self.state.gate_log = None

    def set_dropout(self, dropout: float, network: str) -> None:
        """Give the experts of one network another dropout than the spec's, until they are detached."""
        for layer in self.layers_of(network):
            layer.dropout = dropout

    def _hooks(self) -> list[tuple[nn.Module, NetworkHook]]:
        """All hooks with their networks, the latest of each network first."""
        return [(network, hook) for network in self.networks.values() for hook in reversed(list(hooks_of(network)))]


@contextmanager
def bound_to(networks: Iterable[nn.Module], t: Tensor) -> Iterator[None]:
    """Do as `Mixture.at` for the mixture that some networks carry; do nothing if they carry none."""
    first = next((layer for network in networks for layer in layers_in(network)), None)
    with nullcontext() if first is None else first.state.bound(t.reshape(-1).float()):
        yield


def _by_name(networks: Networks) -> dict[str, nn.Module]:
    named = {"": networks} if isinstance(networks, nn.Module) else dict(networks)
    return {name: uncompiled(network) for name, network in named.items()}


def _device_of(layer: nn.Module) -> torch.device | None:
    """Where a layer stands now. What is offloaded stands nowhere; its experts move at the first call."""
    held = next((tensor for tensors in (layer.parameters(), layer.buffers()) for tensor in tensors), None)
    is_offloaded = held is not None and held.is_meta and "forward" in vars(layer)
    return None if held is None or is_offloaded else held.device
