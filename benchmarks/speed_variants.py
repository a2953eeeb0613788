"""The ways to adapt a network that the speed benchmark compares. All share the base's weights, which stay frozen."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale, fuse, match_targets
from timestep_experts.mixture.hooks import layers_in
from timestep_experts.mixture.kernels import Kernels

Pass = Literal["inference, one t", "inference, mixed t", "training, mixed t"]
ONE_T: Pass = "inference, one t"
MIXED_T: Pass = "inference, mixed t"
TRAINING: Pass = "training, mixed t"
PASSES: tuple[Pass, ...] = (ONE_T, MIXED_T, TRAINING)

BASE = "base"
PEFT = "PEFT LoRA"
ADAPTERS = "PEFT adapters"
FUSED = "PEFT fused"
SWITCH = "switch"
FUSED_IN = "switch, fused"
ROUTE = "route, 1 context"
ROUTE_3 = "route, 3 contexts"


class UnavailableError(Exception):
    """A variant cannot do a pass; the message says why."""


@dataclass(frozen=True)
class Form:
    """The size of what is attached.

    Args:
        num_experts: n, of the core scale and of PEFT's adapters.
        rank: r, of every expert, context and adapter.
        num_contexts: m; ``None`` is what the variant's name says. Context i has 2^i experts.
    """

    num_experts: int = 8
    rank: int = 4
    num_contexts: int | None = None


@dataclass
class Variant:
    """A network and what must be done before each call at one t.

    Args:
        model: to be called as the base is.
        trained: what receives gradients.
        before: takes the t of the coming call.
        settles: whether the first call in another interval does more than the ones after it.
    """

    model: nn.Module
    trained: list[nn.Parameter] = field(default_factory=list)
    before: Callable[[float], None] = lambda t: None  # noqa: ARG005
    settles: bool = False

    def extra_bytes(self, base: nn.Module) -> int:
        """Bytes held beside what the base holds; weights that a variant has in the place of the base's do not count."""
        return _held_bytes(self.model) - _held_bytes(base)


Maker = Callable[[nn.Module, Sequence[str], Form, Pass, list[float]], Variant]


def make_base(model: nn.Module, targets: Sequence[str], form: Form, kind: Pass, ts: list[float]) -> Variant:  # noqa: ARG001
    """The network as it is."""
    return Variant(model)


def make_peft(model: nn.Module, targets: Sequence[str], form: Form, kind: Pass, ts: list[float]) -> Variant:  # noqa: ARG001
    """One LoRA for all timesteps."""
    twin = twin_of(model)
    _inject(twin, targets, form, ["default"])
    return Variant(twin, [p for name, p in twin.named_parameters() if "lora_" in name])


def make_adapters(model: nn.Module, targets: Sequence[str], form: Form, kind: Pass, ts: list[float]) -> Variant:
    """One LoRA per interval: ``set_adapter`` before every call, or PEFT's adapter per sample where t is mixed."""
    if kind == TRAINING:
        raise UnavailableError("PEFT chooses adapters per sample in inference alone")
    twin = twin_of(model)
    names = [f"expert{i}" for i in range(form.num_experts)]
    _inject(twin, targets, form, names)
    partition = Partition.uniform(form.num_experts)
    if kind == MIXED_T:
        chosen = [names[partition.index_of(t)] for t in ts]
        for layer in _tuned_layers(twin):
            layer.register_forward_pre_hook(_name_adapters(chosen), with_kwargs=True)
        return Variant(twin)

    def set_adapter(t: float) -> None:
        name = names[partition.index_of(t)]
        for layer in _tuned_layers(twin):
            layer.set_adapter(name)

    return Variant(twin, before=set_adapter)


def make_fused(model: nn.Module, targets: Sequence[str], form: Form, kind: Pass, ts: list[float]) -> Variant:  # noqa: ARG001
    """One LoRA added to the base's weights, as ``fuse_lora`` does: what can be had if nothing depends on t."""
    if kind == TRAINING:
        raise UnavailableError("what is fused is not trained")
    twin = twin_of(model, with_own=targets)
    _inject(twin, targets, form, ["default"])
    for layer in _tuned_layers(twin):
        layer.merge()
    return Variant(twin)


def make_switch(model: nn.Module, targets: Sequence[str], form: Form, kind: Pass, ts: list[float]) -> Variant:  # noqa: ARG001
    """The mixture in mode ``switch``: the expert of t alone."""
    twin = twin_of(model)
    mixture = _attach(twin, targets, replace(form, num_contexts=0))
    mixture.mode = "switch"
    return variant_of(twin, mixture)


def make_route(
    model: nn.Module,
    targets: Sequence[str],
    form: Form,
    kind: Pass,  # noqa: ARG001
    ts: list[float],  # noqa: ARG001
    kernels: Kernels | None = None,
) -> Variant:
    """The mixture in mode ``route``: the expert of t and gated contexts, by its own arithmetic where one is given."""
    twin = twin_of(model)
    mixture = _attach(twin, targets, form, kernels)
    mixture.mode = "route"
    return variant_of(twin, mixture)


def make_fused_in(model: nn.Module, targets: Sequence[str], form: Form, kind: Pass, ts: list[float]) -> Variant:  # noqa: ARG001
    """Switching with the expert of t added to the base's weights, anew where another takes over."""
    if kind != ONE_T:
        raise UnavailableError("weights hold the expert of one t")
    twin = twin_of(model, with_own=targets)
    mixture = _attach(twin, targets, replace(form, num_contexts=0))
    mixture.mode = "switch"
    fuse(mixture)  # keeps the base's weights beside those in use
    return Variant(twin, settles=True)


def _with_contexts(num_contexts: int) -> Maker:
    def make(model: nn.Module, targets: Sequence[str], form: Form, kind: Pass, ts: list[float]) -> Variant:
        return make_route(model, targets, replace(form, num_contexts=num_contexts), kind, ts)

    return make


VARIANTS: dict[str, Maker] = {
    BASE: make_base,
    PEFT: make_peft,
    ADAPTERS: make_adapters,
    FUSED: make_fused,
    SWITCH: make_switch,
    FUSED_IN: make_fused_in,
    ROUTE: _with_contexts(1),
    ROUTE_3: _with_contexts(3),
}


def twin_of(model: nn.Module, with_own: Sequence[str] = ()) -> nn.Module:
    """A copy that shares all tensors with the model but those of the modules that are named."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for name in match_targets(twin, list(with_own)) if with_own else ():
        module = twin.get_submodule(name)
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return twin


def _inject(model: nn.Module, targets: Sequence[str], form: Form, names: Sequence[str]) -> None:
    count = len(match_targets(model, list(targets)))
    for name in names:
        # B is not zero, so that what is compared does something
        config = LoraConfig(r=form.rank, lora_alpha=form.rank, target_modules=list(targets), init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            inject_adapter_in_model(config, model, adapter_name=name)
    layers = _tuned_layers(model)
    assert len(layers) == count, "PEFT and the mixture must adapt the same layers"
    for layer in layers:
        layer.set_adapter(names[0])


def _tuned_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _name_adapters(names: list[str]) -> Callable[..., Any]:
    """The hook that PEFT's own models put on their layers for a batch of several adapters."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ARG001
        return args, {**kwargs, "adapter_names": names}

    return hook


def _attach(model: nn.Module, targets: Sequence[str], form: Form, kernels: Kernels | None = None) -> Mixture:
    contexts = [
        Scale(f"context{i}", Partition.uniform(2**i), form.rank, form.rank, gated=True)
        for i in range(form.num_contexts or 0)
    ]
    spec = MixtureSpec((Scale("core", Partition.uniform(form.num_experts), form.rank, form.rank), *contexts))
    return attach(model, targets, spec, kernels)


def attach(model: nn.Module, targets: Sequence[str], spec: MixtureSpec, kernels: Kernels | None = None) -> Mixture:
    """A mixture of random experts and routers in the base's dtype; nothing of it is zero."""
    mixture = Mixture.attach(model, spec, list(targets), kernels=kernels)
    with torch.no_grad():
        for value in mixture.state_dict().values():
            value.normal_(std=0.01)
    for layer in mixture.layers.values():
        layer.move_experts(dtype=next(layer.base_layer.parameters()).dtype)
    return mixture


def variant_of(model: nn.Module, mixture: Mixture) -> Variant:
    """A network with its mixture, all of which is trained."""
    parts = (part for layer in mixture.layers.values() for part in (layer.experts, layer.router) if part is not None)
    return Variant(model, [parameter for part in parts for parameter in part.parameters()])


def _held_bytes(model: nn.Module) -> int:
    """Of a network and of the experts on it."""
    parts = (model, *layers_in(model))
    return sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))
