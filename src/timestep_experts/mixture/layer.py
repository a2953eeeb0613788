"""One layer with experts: ``base(x) + core + gated contexts``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from timestep_experts.intervals import Interval
from timestep_experts.mixture.fused import Strength, add_experts, gather_experts, read_input
from timestep_experts.mixture.lowrank import ExpertStack, LayerGeometry
from timestep_experts.mixture.router import Averages, Router, TablePlace
from timestep_experts.mixture.spec import MixtureSpec, Scale

Mode = Literal["off", "foster", "switch", "route"]
PLAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Routing:
    """The timesteps of the running forward pass and who owns them.

    Args:
        t: ``(B,)`` fp32.
        owners: ``(B,)`` int64 by scale.
        place: of t in the routers' tables; ``None`` where no scale is gated.
        is_shared: one timestep was given for all samples, as pipelines do; then all of these repeat one value.
        is_folded: the owners' experts stand in the weights of the denoiser's folded layers.
    """

    t: Tensor
    owners: dict[str, Tensor]
    place: TablePlace | None
    is_shared: bool
    is_folded: bool = False

    def spread(self, values: Tensor, num_rows: int) -> Tensor:
        """Of one value per sample ``(B,)`` those of a layer's rows; a single one ``(1,)`` where it is shared."""
        if self.is_shared:
            return values[:1]
        repeats = num_rows // values.shape[0]  # frames or views of one sample stand next to each other
        return values if repeats == 1 else values.repeat_interleave(repeats)


@dataclass
class Binding:
    """What all layers of one mixture share: its form, its mode, and the timesteps of the running forward pass.

    Args:
        spec: of the mixture.
        mode: which experts speak.
        fostered: the scales that speak, ungated, in mode ``foster``.
        routing: set by the denoiser's hook before every forward pass.
        is_bound: whether `bound` is open, so that the caller and not the hook said the timesteps.
        gate_log: where layers leave their gates while a caller records them, by layer name.
        averages: of the layers' inputs, for their routers.
    """

    spec: MixtureSpec
    mode: Mode = "off"
    fostered: tuple[str, ...] = ()
    routing: Routing | None = None
    is_bound: bool = False
    gate_log: dict[str, list[Tensor]] | None = None
    averages: Averages = field(default_factory=Averages)

    def route_to(self, t: Tensor, num_samples: int | None = None) -> None:
        """Bind the timesteps ``(B,)`` of the next forward pass; the one place where owners are looked up.

        A single one ``(1,)`` is shared by all samples, and repeated for ``num_samples`` where their number is known.
        """
        spec = self.spec
        owners = {scale.name: scale.partition.index_of(t) for scale in spec.scales}
        place = TablePlace.of(t, spec.num_train_timesteps, spec.router_knots) if spec.gated_scales else None
        is_shared = t.shape[0] == 1
        if is_shared and num_samples is not None:
            t, owners = t.expand(num_samples), {name: owner.expand(num_samples) for name, owner in owners.items()}
            place = None if place is None else place.map(lambda value: value.expand(num_samples))
        self.routing = Routing(t, owners, place, is_shared)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # which keeps none
            self.averages.clear()

    @contextmanager
    def bound(self, t: Tensor) -> Iterator[None]:
        """`route_to` for a while, then back to the timesteps before."""
        before = self.routing, self.is_bound
        self.route_to(t)
        self.is_bound = True
        try:
            yield
        finally:
            self.routing, self.is_bound = before

    def active_scales(self) -> tuple[Scale, ...]:
        """The scales that speak in this mode, in the order of the spec."""
        return tuple(scale for scale in self.spec.scales if self._speaks(scale))

    def _speaks(self, scale: Scale) -> bool:
        if self.mode == "foster":
            return scale.name in self.fostered
        return self.mode == "route" or (self.mode == "switch" and scale.constant_gate != 0)


class MixtureLayer(nn.Module):
    """A base layer and its experts, one stack per scale, with a router if any scale is gated.

    Attributes that this module lacks are read from the base layer, so code that looks at ``weight`` or
    ``in_features`` keeps working.
    """

    def __init__(self, base_layer: nn.Module, binding: Binding, name: str, owned: Interval | None = None) -> None:
        super().__init__()
        spec = binding.spec
        self.base_layer = base_layer
        self.name = name
        self.binding = binding
        self.dropout = spec.dropout
        self.is_folded = False  # whether experts stand in the base layer's weight, see `Folding`
        self.geometry = LayerGeometry.of(base_layer, name)
        if spec.gate == "token" and spec.gated_scales and not self.geometry.keeps_positions:
            raise ValueError(
                f"{name}: a gate per position needs a layer that keeps positions; this {type(base_layer).__name__} has"
                f" kernel {self.geometry.kernel_size}, stride {self.geometry.stride}, padding {self.geometry.padding}"
            )
        self.experts = nn.ModuleDict({scale.name: self._stack(scale, owned) for scale in spec.scales})
        self.router = None
        if spec.gated_scales:
            self.router = Router(
                self.geometry.in_features,
                len(spec.gated_scales),
                spec.num_train_timesteps,
                spec.router_input,
                spec.gate,
                spec.router_knots,
            )

    def _stack(self, scale: Scale, owned: Interval | None) -> ExpertStack:
        """The experts of a scale, or those of them whose interval meets the one that this layer is used for."""
        met = [i for i, interval in enumerate(scale.partition.intervals) if owned is None or interval.meets(owned)]
        return ExpertStack(self.geometry, len(met), scale.rank, self.name, met[0] if owned else None)

    def __getattr__(self, name: str) -> Any:
        """Fall back to the base layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def move_experts(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Move experts and router to a device, and the experts to a dtype; routers stay fp32."""
        self.experts.to(device, dtype)
        if self.router is not None:
            self.router.to(device)

    def forward(self, x: Tensor) -> Tensor:
        """``base(x)`` plus what the mode lets the experts say; shapes are the base layer's."""
        y: Tensor = self.base_layer(x)
        binding, routing = self.binding, self.binding.routing
        if self.is_folded:
            if binding.mode != "switch" or routing is None or not routing.is_folded:
                raise RuntimeError(
                    f"{self.name}: experts are folded into this layer's weight, for calls of the whole denoiser alone;"
                    " Mixture.unfold() first"
                )
            return y
        if binding.mode == "off":
            return y
        if routing is None:
            raise RuntimeError(
                f"{self.name}: the experts know no timestep. Call the denoiser itself (its hook reads the timestep),"
                " or bind one with Mixture.at(t)."
            )
        scales = binding.active_scales()
        if not scales:
            return y
        stacks: list[Any] = [self.experts[scale.name] for scale in scales]
        owners = [routing.spread(routing.owners[scale.name], x.shape[0]) for scale in scales]
        down, ups = gather_experts(stacks, owners, self.geometry.groups)
        averages = binding.averages if self._asks_for_average() else None
        if self.dropout and self.training:
            hidden, _ = read_input(functional.dropout(x, self.dropout), down, self.geometry)
            average = None if averages is None else averages.of(x, channels_first=bool(self.geometry.kernel_size))
        else:
            hidden, average = read_input(x, down, self.geometry, averages)
        strengths = self._strengths(scales, self._positions(x) if average is None else average, routing)
        return add_experts(y, hidden, ups, strengths, self.geometry, in_place=self._may_overwrite_base())

    def _asks_for_average(self) -> bool:
        router = self.router
        is_asked = self.binding.mode == "route" and router is not None and router.F is not None
        return is_asked and self.binding.spec.gate == "sample"

    def _may_overwrite_base(self) -> bool:
        """Whether the base layer's output is a new tensor that nobody else has seen, autograd included."""
        base = self.base_layer
        is_plain = type(base) in PLAIN_LAYERS and "forward" not in vars(base)  # offloading and caches replace it
        return is_plain and not torch.is_grad_enabled() and not base._forward_hooks

    def _strengths(self, scales: Sequence[Scale], z: Tensor, routing: Routing) -> list[Strength]:
        """Gate times alpha / r of these scales: numbers, but for what the router says of z, ``(B, 1)`` or ``(B, N)``.

        Those that depend on a shared timestep alone come once, ``(1, 1)``.

        Args:
            scales: that speak.
            z: the layer's input, ``(B, N, k)``, or its average ``(B, k)`` where the router asks for that.
            routing: of the running forward pass.
        """
        binding = self.binding
        if binding.mode == "foster":
            return [scale.scaling for scale in scales]
        resting = [scale.constant_gate * scale.scaling for scale in scales]
        if binding.mode == "switch" or self.router is None:
            return [*resting]
        assert routing.place is not None  # a scale is gated, or there were no router
        gates: Tensor = self.router(z, routing.place.map(lambda value: routing.spread(value, len(z))))
        if binding.gate_log is not None:
            binding.gate_log.setdefault(self.name, []).append(gates.detach().expand(len(z), *gates.shape[1:]))
        said = iter(gates.unbind(-1) if gates.dim() > 2 else torch.split(gates, 1, -1))
        return [
            _plus(rest, next(said), s.scaling) if s.gated else rest for s, rest in zip(scales, resting, strict=True)
        ]

    def _positions(self, x: Tensor) -> Tensor:
        """The layer's input as ``(B, N, k)``."""
        return x.flatten(2).transpose(1, 2) if self.geometry.kernel_size else x.reshape(len(x), -1, x.shape[-1])


def _plus(rest: float, gate: Tensor, scaling: float) -> Tensor:
    """``rest + gate * scaling``, without the steps that change nothing."""
    scaled = gate if scaling == 1 else gate * scaling
    return scaled if rest == 0 else scaled + rest
