"""Attach a mixture of timestep experts to any network, and take it off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timestep_experts.intervals import Interval
from timestep_experts.mixture.folding import Folding
from timestep_experts.mixture.hooks import RoutedCheckpoint, TimestepReader
from timestep_experts.mixture.layer import Binding, MixtureLayer, Mode
from timestep_experts.mixture.lowrank import ExpertStack
from timestep_experts.mixture.spec import MixtureSpec
from timestep_experts.mixture.targets import Networks, Targets, match_all

MODES: tuple[Mode, ...] = ("off", "foster", "switch", "route")


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a mixture.

    Args:
        stored: all experts and routers, as in a bundle.
        active: what one sample meets at one timestep in the current mode.
        trainable: those that require gradients now.
    """

    stored: int
    active: int
    trainable: int


class Mixture:
    """The experts attached to one network or several. Made by `attach` or found by `of`; `detach` undoes it.

    The networks are used as before: a hook reads ``timestep`` from each call and hands it to the layers.
    """

    def __init__(self, networks: dict[str, nn.Module], binding: Binding, layers: dict[str, MixtureLayer]) -> None:
        self.networks = networks
        self.layers = layers
        self._binding = binding

    @classmethod
    def attach(
        cls,
        networks: Networks,
        spec: MixtureSpec,
        target_modules: Targets | Mapping[str, Targets],
        *,
        owned: Mapping[str, Interval] | None = None,
        timestep_argument: str = "timestep",
        timestep_scale: float = 1.0,
        seed: int = 0,
    ) -> Mixture:
        """Give every target module its experts, in mode ``off``. B is zero, so nothing changes until training.

        Args:
            networks: the denoiser; its ``forward`` takes ``timestep_argument``, a number or a tensor of 1 or B values.
                Or several networks by name, which is then the first part of their layers' names. One whose ``forward``
                takes no timestep (a text encoder) is told it by `at`.
            spec: scales and router form.
            target_modules: see `match_targets`, for each network if there are several; every element of a list must
                match something.
            owned: the interval of t that a network is used for, by its name; it carries no experts of others.
            timestep_argument: the name of that argument.
            timestep_scale: t is this times what the denoiser receives.
            seed: of the initial A.

        Raises:
            ValueError: a network already carries a mixture, a pattern matches nothing, or a match cannot carry experts.
        """
        named = _by_name(networks)
        patterns = target_modules if isinstance(target_modules, Mapping) else dict.fromkeys(named, target_modules)
        matches = {name: match_all(network, patterns[name]) for name, network in named.items()}
        binding = Binding(spec)
        layers = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, network in named.items():
                for module in matches[name]:
                    path = f"{name}.{module}" if name else module
                    interval = (owned or {}).get(name)
                    layers[path] = MixtureLayer(network.get_submodule(module), binding, path, interval)
        mixture = cls(named, binding, layers)
        for path, layer in layers.items():
            layer.move_experts(_device_of(layer.base_layer))
            layer.train(layer.base_layer.training)
            mixture._replace_module(path, layer)
        for network in named.values():
            reader = TimestepReader.of(network, binding, timestep_argument, timestep_scale)
            network.register_forward_pre_hook(reader.read, with_kwargs=True)
        return mixture

    @classmethod
    def of(cls, networks: Networks) -> Mixture:
        """The mixture that networks (or deep copies of them) carry.

        Raises:
            ValueError: they carry none.
        """
        named = _by_name(networks)
        modules = (module for network in named.values() for module in network.modules())
        layers = {module.name: module for module in modules if isinstance(module, MixtureLayer)}
        if not layers:
            kinds = ", ".join(type(network).__name__ for network in named.values())
            raise ValueError(f"this {kinds} carries no mixture of experts")
        return cls(named, next(iter(layers.values())).binding, layers)

    def detach(self) -> None:
        """Put the base layers back and remove the hooks; every ``state_dict`` is what it was, to the byte."""
        self.unfold()
        for path, layer in self.layers.items():
            self._replace_module(path, layer.base_layer)
        for network in self.networks.values():
            for key, hook in list(network._forward_pre_hooks.items()):
                if isinstance(getattr(hook, "__self__", None), TimestepReader):
                    del network._forward_pre_hooks[key]
                    network._forward_pre_hooks_with_kwargs.pop(key, None)
            for module in network.modules():
                function = getattr(module, "_gradient_checkpointing_func", None)
                if isinstance(function, RoutedCheckpoint):
                    module._gradient_checkpointing_func = function.function  # type: ignore[assignment]

    def set_dropout(self, dropout: float, network: str) -> None:
        """Another dropout than the spec's for the experts of one network, until they are detached."""
        for path, layer in self.layers.items():
            if self._split(path)[0] == network:
                layer.dropout = dropout

    def _replace_module(self, path: str, module: nn.Module) -> None:
        name, inner = self._split(path)
        parent, _, leaf = inner.rpartition(".")
        setattr(self.networks[name].get_submodule(parent), leaf, module)

    def _split(self, path: str) -> tuple[str, str]:
        """The network of a layer, and the layer's name in it."""
        name, _, inner = ("", "", path) if "" in self.networks else path.partition(".")
        return name, inner

    @property
    def spec(self) -> MixtureSpec:
        """Scales and router form."""
        return self._binding.spec

    @property
    def mode(self) -> Mode:
        """Which experts speak: ``off``, ``foster``, ``switch`` or ``route``."""
        return self._binding.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: allowed are {', '.join(MODES)}")
        if self.is_folded and mode not in ("off", "switch"):
            raise ValueError(f"folded experts can be switched, or off; for mode {mode!r} unfold them first")
        self._binding.mode = mode

    @property
    def timesteps(self) -> Tensor | None:
        """The timesteps ``(B,)`` of the running or latest forward pass; ``None`` before the first."""
        routing = self._binding.routing
        return None if routing is None else routing.t

    @property
    def is_bound(self) -> bool:
        """Whether `at` is open."""
        return self._binding.is_bound

    def foster(self, *scale_names: str) -> None:
        """Mode ``foster``: the experts of these scales speak, ungated, and no others."""
        fostered = tuple(self.spec.scale(name).name for name in scale_names)
        self.mode = "foster"
        self._binding.fostered = fostered

    @property
    def is_folded(self) -> bool:
        """Whether `fold` is in force."""
        return any(reader.folding is not None for reader in self._readers().values())

    def fold(self) -> None:
        """Switch at the base's own cost: the experts of a call's timesteps stand in the denoisers' weights.

        ``W = W0 + sum_j gate_j * (alpha_j / r_j) * B_j A_j``, exchanged before a call whose timesteps others own, for
        which the timesteps are read on the host. See `Folding`, also for the layers that stay as they are: all of
        networks that take no timestep (text encoders) among them. A batch in which owners are mixed is computed
        unfolded, from W0.

        W0 is kept: as much memory again, on the same device, as the weights that carry experts. While folded, a
        network's own ``state_dict`` holds W and not W0, its calls are made without gradients, and whoever changes
        experts other than by `load_state_dict` unfolds them first.

        Raises:
            ValueError: the mode is not ``switch``, no network takes a timestep, or experts cannot be added to a weight
                (quantised, or offloaded layer by layer); nothing is folded then.
        """
        if self.mode != "switch":
            raise ValueError(
                f"only experts that are switched can be folded into the weights; the mode is {self.mode!r}"
            )
        told = {name: reader for name, reader in self._readers().items() if reader.position is not None}
        if not told:
            raise ValueError("no network of this mixture takes a timestep, by which folded experts would be exchanged")
        if self.is_folded:
            return
        layers = {n: [layer for path, layer in self.layers.items() if self._split(path)[0] == n] for n in told}
        foldings = {name: Folding(self.networks[name], layers[name]) for name in told}
        for name, reader in told.items():
            foldings[name].begin()
            reader.folding = foldings[name]

    def unfold(self) -> None:
        """Undo `fold`: the weights are what they were, to the byte, and their copies are dropped."""
        for reader in self._readers().values():
            if reader.folding is not None:
                reader.folding.end()
                reader.folding = None

    def _readers(self) -> dict[str, TimestepReader]:
        """The hook of each network."""
        hooks = (
            (n, getattr(h, "__self__", None)) for n, w in self.networks.items() for h in w._forward_pre_hooks.values()
        )
        return {name: reader for name, reader in hooks if isinstance(reader, TimestepReader)}

    @contextmanager
    def using(self, mode: Mode) -> Iterator[None]:
        """Another mode for a while, then back to the one before."""
        before = self.mode
        self.mode = mode
        try:
            yield
        finally:
            self._binding.mode = before

    @contextmanager
    def at(self, t: Tensor) -> Iterator[None]:
        """Bind timesteps ``(B,)`` by hand, for a network whose ``forward`` takes none."""
        with self._binding.bound(t.reshape(-1).float()):
            yield

    @contextmanager
    def recorded_gates(self) -> Iterator[dict[str, list[Tensor]]]:
        """Collect what the routers add to the resting gates, ``(B, m)`` per call and layer name, in mode ``route``."""
        self._binding.gate_log = log = dict[str, list[Tensor]]()
        try:
            yield log
        finally:
            self._binding.gate_log = None

    def stacks(self, scale_name: str) -> list[ExpertStack]:
        """The experts of one scale, layer by layer."""
        name = self.spec.scale(scale_name).name
        return [layer.experts[name] for layer in self.layers.values()]  # type: ignore[misc]  # ModuleDict

    def expert(self, scale_name: str, index: int, network_names: Iterable[str]) -> list[tuple[nn.Parameter, int]]:
        """One expert on some of the networks: the stacked tensors, A and B of each layer, with its place in them."""
        names = set(network_names)
        layers = (layer for path, layer in self.layers.items() if self._split(path)[0] in names)
        stacks: Any = (layer.experts[scale_name] for layer in layers)
        places = ((stack, index - stack.first) for stack in stacks)
        return [(p, place) for stack, place in places if 0 <= place < len(stack.A) for p in (stack.A, stack.B)]

    def router_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The routers' parameters: those of F (weights and biases), and the tables E."""
        routers = [layer.router for layer in self.layers.values() if layer.router is not None]
        maps = [p for router in routers for p in (router.F, router.bias) if p is not None]
        return maps, [router.E for router in routers if router.E is not None]

    def trained_modules(self) -> Iterable[nn.Module]:
        """The wrapped layers."""
        return self.layers.values()

    def state_dict(self) -> dict[str, Tensor]:
        """Every expert and router tensor, by ``<module>.experts.<scale>.A`` and the like; nothing of the base."""
        return {
            f"{name}.{key}": value
            for name, layer in self.layers.items()
            for key, value in layer.state_dict().items()
            if not key.startswith("base_layer.")
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fill in what `state_dict` gave.

        Raises:
            ValueError: listing every missing, unexpected and differently shaped tensor; nothing is loaded then.
        """
        own = self.state_dict()
        problems = [f"missing: {key}" for key in own.keys() - state.keys()]
        problems += [f"unexpected: {key}" for key in state.keys() - own.keys()]
        problems += [
            f"{key}: the model has {tuple(own[key].shape)}, the file {tuple(state[key].shape)}"
            for key in own.keys() & state.keys()
            if own[key].shape != state[key].shape
        ]
        if problems:
            raise ValueError("these experts do not fit the model:\n  " + "\n  ".join(sorted(problems)))
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])
        for reader in self._readers().values():
            if reader.folding is not None:
                reader.folding.forget()

    def count_parameters(self) -> ParameterCount:
        """Stored, active and trainable parameters of the experts and routers."""
        state = self.state_dict()
        active = 0
        for layer in self.layers.values():
            scales = self._binding.active_scales()
            active += sum(layer.geometry.num_expert_parameters(scale.rank) for scale in scales)
            if self.mode == "route" and layer.router is not None:
                rows = [p if p is not layer.router.E else p[0] for p in layer.router.parameters()]
                active += sum(row.numel() for row in rows)
        trainable = sum(p.numel() for p in self._own_parameters() if p.requires_grad)
        return ParameterCount(sum(value.numel() for value in state.values()), active, trainable)

    def _own_parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers.values():
            yield from layer.experts.parameters()
            if layer.router is not None:
                yield from layer.router.parameters()


@contextmanager
def bound_to(networks: Iterable[nn.Module], t: Tensor) -> Iterator[None]:
    """`Mixture.at` for the mixture that some networks carry; does nothing if they carry none."""
    layers = (module for network in networks for module in network.modules() if isinstance(module, MixtureLayer))
    first = next(layers, None)
    with nullcontext() if first is None else first.binding.bound(t.reshape(-1).float()):
        yield


def _by_name(networks: Networks) -> dict[str, nn.Module]:
    return {"": networks} if isinstance(networks, nn.Module) else dict(networks)


def _device_of(layer: nn.Module) -> torch.device | None:
    held = next((tensor for tensors in (layer.parameters(), layer.buffers()) for tensor in tensors), None)
    return None if held is None else held.device
