"""Experts fused into the base weights, so that switching costs what the base costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.mixture.experts import ExpertStack
from timestep_experts.mixture.hooks import NetworkHook, TimestepReader, add_hook, hooks_of, remove_hook
from timestep_experts.mixture.layer import MixtureLayer
from timestep_experts.mixture.mixture import Mixture
from timestep_experts.mixture.router_form import TimestepIndex
from timestep_experts.mixture.state import MixtureState, Mode, StepContext

_CARRIERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def fuse(mixture: Mixture) -> None:
    """Switch at the base's own cost: the experts of a call's timesteps stand in the denoisers' weights.

    ``W = W0 + sum_j gate_j * (alpha_j / r_j) * B_j A_j``  (TSM, eq. 5, with constant gates). The weights are exchanged
    before a call whose timesteps other experts own, for which the host reads the timesteps. A batch whose samples have
    different owners is computed from W0, with the experts beside it.

    In mode ``route`` the constant part of the gates stands in the weights, that of the core above all. Only what the
    routers add is computed beside them. Routers that hear t alone add nothing beside: their whole gates stand in the
    weights, which are exchanged whenever a gate changes.

    W0 is kept, which takes as much memory again, on the same device, as the weights that carry experts. While experts
    are fused, a network's own ``state_dict`` holds W and not W0, and its calls are made without gradients. Networks
    that take no timestep (text encoders) stay as they are. If the experts are fused already, nothing happens.

    Raises:
        UserError: the mode is neither ``switch`` nor ``route``, no network takes a timestep, or experts cannot be added
            to a weight (because it is quantised, or offloaded layer by layer); nothing is fused then.
    """
    if mixture.mode not in ("switch", "route"):
        raise UserError(
            f"only experts that are switched or routed can be fused into the weights; the mode is {mixture.mode!r}"
        )
    names = [name for name, network in mixture.networks.items() if _takes_timestep(network)]
    if not names:
        raise UserError("no network of this mixture takes a timestep, by which fused experts would be exchanged")
    if is_fused(mixture):
        return
    made = {name: FusedExperts(mixture.networks[name], mixture.layers_of(name), mixture.state) for name in names}
    for name, fused in made.items():
        fused.keep_weights()
        add_hook(mixture.networks[name], fused)


def unfuse(mixture: Mixture) -> None:
    """Undo `fuse`: the weights are what they were, to the byte, and their copies are dropped."""
    for network in mixture.networks.values():
        for hook in list(hooks_of(network)):
            if isinstance(hook, FusedExperts):
                remove_hook(network, hook)


def is_fused(mixture: Mixture) -> bool:
    """Whether `fuse` is in force."""
    return any(isinstance(hook, FusedExperts) for network in mixture.networks.values() for hook in hooks_of(network))


def holds_experts(layer: MixtureLayer) -> bool:
    """Whether experts stand in the weight of a layer at this moment."""
    return "forward" in vars(layer)


def _takes_timestep(network: nn.Module) -> bool:
    readers = (hook for hook in hooks_of(network) if isinstance(hook, TimestepReader))
    return any(reader.position is not None for reader in readers)


@dataclass(frozen=True)
class FusedStep(StepContext):
    """A running forward pass whose experts stand in the weights."""


@dataclass(frozen=True)
class Held:
    """What stands in the weights of a network.

    Args:
        experts: by the scale's name, which of its experts.
        place: where the gates are in the routers' tables: a row, and a share of the way to the next one; ``None`` where
            gates are constant.
    """

    experts: tuple[tuple[str, int], ...] = ()
    place: tuple[int, float | None] | None = None

    def __bool__(self) -> bool:
        return bool(self.experts)


NOTHING = Held()


class FusedExperts(NetworkHook):
    """The fused layers of one denoiser, and the hook that exchanges their experts.

    Every layer keeps its own weight W0 as a buffer that is in no ``state_dict`` and moves with it. The weight is
    always made from W0 and never from its predecessor, so it does not drift, and W0 comes back to the byte.

    Three kinds of layers keep their experts beside them and give the same outputs: grouped convolutions (A reads all
    channels, and no grouped kernel does that), convolutions whose padding is not of zeros (the padding of the experts
    is), and layers that share their weight with another.

    Args:
        network: the denoiser.
        layers: those of its layers that carry experts.
        state: of the mixture.

    Raises:
        UserError: experts cannot be added to the weight of a layer; nothing is changed then.
    """

    def __init__(self, network: nn.Module, layers: Sequence[MixtureLayer], state: MixtureState) -> None:
        uses = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
        for layer in layers:
            _require_plain_weight(layer)
        self.state = state
        self._network, self._loras = network, _fused_loras(network)
        self.layers = [layer for layer in layers if _is_exact(layer.base_layer) and uses[id(_weight(layer))] == 1]
        self._carriers = list(layers)
        self._held: Held | None = NOTHING  # the experts in the weights; None: the weights are unknown
        self._versions = self._read_versions()

    @torch.no_grad()
    def keep_weights(self) -> None:
        """Copy W0 of all layers, or of none where memory ends."""
        kept = [_weight(layer).detach().clone() for layer in self.layers]
        for layer, weight in zip(self.layers, kept, strict=True):
            layer.base_layer.register_buffer("unfused_weight", weight, persistent=False)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        """Put the experts that own the call's timesteps into the weights, or none if they have different owners.

        Raises:
            UserError: gradients are enabled, or dropout is: both belong to the experts, which are in the weights.
        """
        if self.state.mode == "off":
            self.hold(NOTHING)
            return
        if torch.is_grad_enabled() or any(layer.base_layer.training and layer.dropout for layer in self._carriers):
            raise UserError(
                "fused experts are for inference: call the denoiser under torch.no_grad() and in evaluation mode, or"
                " unfuse them first (unfuse)"
            )
        step = self.state.step
        assert step is not None  # the reader's hook runs before this one
        held = {self._wanted_at(t) for t in set(step.t.tolist())}
        self.hold(held.pop() if len(held) == 1 else NOTHING)
        if self._held:
            self.state.step = FusedStep(**{item.name: getattr(step, item.name) for item in fields(step)})

    def _wanted_at(self, t: float) -> Held:
        scales, spec = self.state.active_scales(), self.state.spec
        place = None
        if _gates_need_t_alone(self.state):
            index = TimestepIndex.of(torch.tensor([t]), spec.router, spec.num_train_timesteps)
            place = (int(index.row), None if index.fraction is None else float(index.fraction))
        else:
            scales = tuple(scale for scale in scales if scale.constant_gate)
        return Held(tuple((scale.name, scale.partition.index_of(t)) for scale in scales), place)

    def check_mode(self, mode: Mode) -> None:
        """Refuse mode ``foster``."""
        if mode == "foster":
            raise UserError(f"fused experts can be switched, routed, or off; for mode {mode!r} unfuse them first")

    def close(self, network: nn.Module) -> None:  # noqa: ARG002 - its layers are known
        """Put W0 back, to the byte, and drop the copies."""
        self.hold(NOTHING)
        for layer in self.layers:
            del layer.base_layer.unfused_weight

    @torch.no_grad()
    def hold(self, held: Held) -> None:
        """Put these experts into the weights, and no others.

        Nothing is done where the weights hold them already and no expert has changed since.

        Raises:
            UserError: experts can no longer be added to a weight, or LoRAs were fused into the weights since, or
                unfused.
        """
        versions = self._read_versions()
        if held == self._held and (not held or versions == self._versions):
            return
        if _fused_loras(self._network) != self._loras:
            raise UserError(
                "LoRAs were fused or unfused (fuse_lora, unfuse_lora) while experts are fused into the same weights;"
                " undo that, unfuse the experts (unfuse), and fuse LoRAs before experts"
            )
        self._held = None  # in case one of the layers fails
        for layer in self.layers:
            _require_plain_weight(layer)  # it may have been offloaded since
            _weight(layer).copy_(fused_weight(layer, held) if held else _kept_weight(layer))
            if held:
                layer.forward = MethodType(_forward_fused, layer)  # type: ignore[method-assign]
            else:
                vars(layer).pop("forward", None)
        self._held, self._versions = held, versions

    def _read_versions(self) -> list[int]:
        """How often each tensor of experts and routers was changed in place; inference tensors do not count."""
        parameters = [parameter for layer in self.layers for parameter in layer.parameters()]
        return [0 if parameter.is_inference() else parameter._version for parameter in parameters]


def fused_weight(layer: MixtureLayer, held: Held) -> Tensor:
    """``W0 + sum_j gate_j * (alpha_j / r_j) * B_j[i_j] A_j[i_j]`` in fp32 or wider, shaped like the weight.

    Args:
        layer: with its kept weight W0.
        held: i_j, the expert of each active scale, and where its gates are in the routers' tables.
    """
    owners, gates = dict(held.experts), _gates_of(layer, held)
    kept = _kept_weight(layer)
    with torch.autocast(kept.device.type, enabled=False):
        total = kept.to(torch.promote_types(kept.dtype, torch.float32)).flatten(1)
        for scale in layer.state.spec.scales:
            if scale.name in owners:
                stack = cast("ExpertStack", layer.experts[scale.name])
                index = torch.tensor([owners[scale.name]], device=stack.A.device)
                down, up = (weight[0].to(total.dtype) for weight in stack.of(index))
                gate = gates.get(scale.name, down.new_full((1,), scale.constant_gate)).to(total.dtype)
                total = torch.addmm(total, up, gate[:, None] * down, alpha=scale.scaling)
        return total.view(kept.shape)


def _gates_need_t_alone(state: MixtureState) -> bool:
    """Whether all gates of a call are known with its timestep, and so can stand in the weights."""
    return state.mode == "route" and bool(state.spec.gated_scales) and state.spec.router.depends_on_t_alone


def _gates_of(layer: MixtureLayer, held: Held) -> dict[str, Tensor]:
    """The gates of the context scales at the held place; empty where gates are constant."""
    if held.place is None or layer.router is None:
        return {}
    device = layer.router.base.device
    row, fraction = held.place
    index = TimestepIndex(
        torch.tensor([row], device=device), None if fraction is None else torch.tensor([fraction], device=device)
    )
    gated = layer.state.spec.gated_scales
    return {scale.name: gates[0] for scale, gates in zip(gated, layer.router.gates_at(index), strict=True)}


def _forward_fused(layer: MixtureLayer, x: Tensor, y: Tensor) -> Tensor:
    """What a layer adds whose weight holds the experts of the denoiser's running call: what the routers add."""
    if layer.state.mode not in ("switch", "route") or not isinstance(layer.state.step, FusedStep):
        raise RuntimeError(
            f"{layer.name}: experts are fused into this layer's weight, for calls of the whole denoiser alone;"
            " unfuse(mixture) first"
        )
    routes = layer.state.mode == "route" and not _gates_need_t_alone(layer.state)
    gated = layer.state.spec.gated_scales if routes else ()
    return layer.add_experts(x, y, gated, only_routed=True) if gated else y


def _fused_loras(network: nn.Module) -> list[tuple[str, ...]]:
    """The adapters that PEFT has merged into weights, layer by layer."""
    merged = (getattr(module, "merged_adapters", ()) for module in network.modules())
    return [tuple(names) for names in merged if names]


def _weight(layer: MixtureLayer) -> nn.Parameter:
    return layer.base_layer.weight  # type: ignore[return-value]  # a plain one, by _require_plain_weight


def _kept_weight(layer: MixtureLayer) -> Tensor:
    return layer.base_layer.unfused_weight  # type: ignore[return-value]  # a buffer, by keep_weights


def _require_plain_weight(layer: MixtureLayer) -> None:
    base, weight = layer.base_layer, getattr(layer.base_layer, "weight", None)
    if not isinstance(base, _CARRIERS) or type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        held = "no weight" if not isinstance(weight, Tensor) else f"a {type(weight).__name__} of {weight.dtype}"
        raise UserError(
            f"{layer.name}: experts cannot be fused into this {type(base).__name__}, which has {held}; allowed are"
            " linear layers and convolutions with plain floating-point weights. Over a quantised base, switch unfused"
        )
    if weight.is_meta:
        raise UserError(
            f"{layer.name}: experts cannot be fused into a weight that is on the meta device; offload whole models,"
            " not layer by layer, or switch unfused"
        )


def _is_exact(base: nn.Module) -> bool:
    return isinstance(base, nn.Linear) or bool(base.groups == 1 and base.padding_mode == "zeros")
