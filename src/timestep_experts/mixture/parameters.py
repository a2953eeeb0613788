"""The tensors of a mixture, as training and files need them: by name, by scale, by expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.mixture.experts import ExpertStack
from timestep_experts.mixture.layer import MixtureLayer
from timestep_experts.mixture.state import MixtureState


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a mixture.

    Args:
        stored: all experts and routers, as in a bundle.
        active: those that one sample meets at one timestep in the current mode.
        trainable: those that require gradients now.
    """

    stored: int
    active: int
    trainable: int


class MixtureParameters:
    """The layers of a mixture by path, and what they hold.

    Args:
        state: of the mixture.
        networks: by name; the one name is empty where there is one network.
        layers: by path: the network's name, if it has one, and the layer's name in it.
    """

    def __init__(self, state: MixtureState, networks: dict[str, nn.Module], layers: dict[str, MixtureLayer]) -> None:
        self.state = state
        self.networks = networks
        self.layers = layers

    def layers_of(self, network: str) -> list[MixtureLayer]:
        """The layers of one network."""
        return [layer for path, layer in self.layers.items() if self.split_path(path)[0] == network]

    def split_path(self, path: str) -> tuple[str, str]:
        """The network of a layer, and the layer's name in it."""
        name, _, inner = ("", "", path) if "" in self.networks else path.partition(".")
        return name, inner

    def stacks(self, scale_name: str) -> list[ExpertStack]:
        """The experts of one scale, layer by layer."""
        name = self.state.spec.scale(scale_name).name
        return [layer.experts[name] for layer in self.layers.values()]  # type: ignore[misc]  # of a ModuleDict

    def expert(self, scale_name: str, index: int, network_names: Iterable[str]) -> list[tuple[nn.Parameter, int]]:
        """One expert on some of the networks: the stacked tensors A and B of each layer, with its place in them."""
        wanted = {id(layer) for name in set(network_names) for layer in self.layers_of(name)}
        stacks = zip(self.layers.values(), self.stacks(scale_name), strict=True)
        places = [(stack, index - stack.first) for layer, stack in stacks if id(layer) in wanted]
        return [(p, place) for stack, place in places if 0 <= place < len(stack.A) for p in (stack.A, stack.B)]

    def router_parameters(
        self, network_names: Iterable[str] | None = None
    ) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The routers' parameters on some of the networks, or on all: those of F (weights and biases), and tables E."""
        layers = [layer for name in network_names or self.networks for layer in self.layers_of(name)]
        routers = [layer.router for layer in layers if layer.router is not None]
        maps = [parameter for router in routers for parameter in router.maps]
        return maps, [table for router in routers for table in router.tables]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all experts and routers, layer by layer."""
        for layer in self.layers.values():
            yield from layer.experts.parameters()
            if layer.router is not None:
                yield from layer.router.parameters()

    def trained_modules(self) -> Iterable[nn.Module]:
        """The layers with experts."""
        return self.layers.values()

    def state_dict(self) -> dict[str, Tensor]:
        """Every expert and router tensor, by ``<path>.experts.<scale>.A`` and the like; nothing of the base."""
        return {
            f"{path}.{key}": value for path, layer in self.layers.items() for key, value in layer.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors in that `state_dict` gave.

        Raises:
            UserError: a tensor is missing, unexpected or of another shape; all of them are listed, and nothing is
                loaded.
        """
        _copy(state, self.state_dict())

    def only(self, *scale_names: str) -> ScaleParameters:
        """The experts of some scales: what a stage changes that trains no others."""
        return ScaleParameters(self, tuple(self.state.spec.scale(name).name for name in scale_names))

    def count_parameters(self) -> ParameterCount:
        """Count the parameters of experts and routers: stored, active and trainable."""
        own = list(self.parameters())
        active = sum(self._count_active(layer) for layer in self.layers.values())
        trainable = sum(parameter.numel() for parameter in own if parameter.requires_grad)
        return ParameterCount(sum(parameter.numel() for parameter in own), active, trainable)

    def _count_active(self, layer: MixtureLayer) -> int:
        active = sum(layer.geometry.num_expert_parameters(scale.rank) for scale in self.state.active_scales())
        if self.state.mode != "route" or layer.router is None:
            return active
        rows = [p if p is not layer.router.E else p[0] for p in layer.router.parameters()]  # of a table, one row
        return active + sum(row.numel() for row in rows)


@dataclass(frozen=True)
class ScaleParameters:
    """The experts of some scales of a mixture.

    Args:
        mixture: whose.
        names: of the scales.
    """

    mixture: MixtureParameters
    names: tuple[str, ...]

    def trained_modules(self) -> Iterable[nn.Module]:
        """The layers with experts."""
        return self.mixture.trained_modules()

    def state_dict(self) -> dict[str, Tensor]:
        """Their tensors, by the mixture's names."""
        parts = [f".experts.{name}." for name in self.names]
        return {key: value for key, value in self.mixture.state_dict().items() if any(part in key for part in parts)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As that of the mixture, for these scales."""
        _copy(state, self.state_dict())


def _copy(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    problems = [f"missing: {key}" for key in own.keys() - state.keys()]
    problems += [f"unexpected: {key}" for key in state.keys() - own.keys()]
    problems += [
        f"{key}: the model has {tuple(own[key].shape)}, the file {tuple(state[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    if problems:
        raise UserError("these experts do not fit the model:\n  " + "\n  ".join(sorted(problems)))
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])
