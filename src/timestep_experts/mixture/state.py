"""What all layers of one mixture share: the spec, the mode, and the timesteps of the running forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from timestep_experts.mixture.kernels import Kernels
from timestep_experts.mixture.router import Router
from timestep_experts.mixture.router_form import TimestepIndex
from timestep_experts.mixture.spec import MixtureSpec, Scale

Mode = Literal["off", "foster", "switch", "route"]
MODES: tuple[Mode, ...] = ("off", "foster", "switch", "route")


@dataclass(frozen=True)
class StepContext:
    """The timesteps of one forward pass, and what they mean for experts and routers.

    Args:
        t: ``(B,)`` fp32.
        expert_index: by scale, ``(B,)`` int64, the expert that owns each timestep; ``(1,)`` where all samples share one
            timestep.
        timed: by layer, what the router's table adds to its gates: ``(B, m)``, or ``(1, m)`` where all samples share
            one timestep; empty where no gate depends on t.
        text_mask: ``(B, L)``, 0 where a token of the text is padding; ``None`` where the network was given none.
    """

    t: Tensor
    expert_index: dict[str, Tensor]
    timed: Mapping[str, Tensor] = field(default_factory=dict)
    text_mask: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StepContext:
        """The same without what the tables say, which may belong to a graph; copies of layers read their own tables."""
        return replace(self, timed={})


def per_row(values: Tensor, num_rows: int) -> Tensor:
    """Spread values per sample ``(B, ...)`` over a layer's rows; a single one ``(1, ...)`` serves all of them."""
    repeats = num_rows // len(values)  # a layer may see frames or views of one sample as rows, next to each other
    return values if len(values) == 1 or repeats == 1 else values.repeat_interleave(repeats, 0)


@dataclass
class MixtureState:
    """What all layers of one mixture read.

    Args:
        spec: scales and router form.
        kernels: the arithmetic of the layers.
        mode: which experts are active.
        fostered: in mode ``foster``, the scales that are active; their gates are 1.
        step: the running forward pass; the denoiser's hook sets it before each one.
        is_bound: whether a caller, and not the hook, gave the timesteps (`bound`).
        gate_log: where layers leave their gates, by layer name, while a caller records them.
        routers: of all layers, by layer name.
    """

    spec: MixtureSpec
    kernels: Kernels
    mode: Mode = "off"
    fostered: tuple[str, ...] = ()
    step: StepContext | None = None
    is_bound: bool = False
    gate_log: dict[str, list[Tensor]] | None = None
    routers: dict[str, Router] = field(default_factory=dict)

    def step_at(
        self,
        t: Tensor,
        num_samples: int | None = None,
        text_mask: Tensor | None = None,
        timed: Mapping[str, Tensor] | None = None,
    ) -> StepContext:
        """Look up what timesteps mean.

        Args:
            t: ``(B,)``, or one timestep ``(1,)`` that all samples share.
            num_samples: B.
            text_mask: see `StepContext`.
            timed: see `StepContext`; a layer that finds nothing there reads its own table.
        """
        expert_index = {scale.name: scale.partition.index_of(t) for scale in self.spec.scales}
        whole = t if num_samples is None else t.expand(num_samples)
        return StepContext(whole, expert_index, timed or {}, text_mask)

    def read_tables(self, t: Tensor, network: str) -> Mapping[str, Tensor]:
        """What the tables of all routers of a network say, by layer; it is read at once, for they are many and small.

        Args:
            t: as in `step_at`.
            network: its name; empty where there is one.
        """
        if self.mode != "route" or not self.spec.router.has_table or not self.routers:
            return {}
        own = {name: router for name, router in self.routers.items() if not network or name.startswith(f"{network}.")}
        return dict(zip(own, self.kernels.read_tables(list(own.values()), self.index_of(t)), strict=True))

    def index_of(self, t: Tensor) -> TimestepIndex:
        """Where timesteps are in the routers' tables."""
        return TimestepIndex.of(t, self.spec.router, self.spec.num_train_timesteps)

    @contextmanager
    def bound(self, t: Tensor) -> Iterator[None]:
        """Give the timesteps ``(B,)`` by hand for a while, then return to the ones before."""
        before = self.step, self.is_bound
        self.step, self.is_bound = self.step_at(t), True
        try:
            yield
        finally:
            self.step, self.is_bound = before

    def active_scales(self) -> tuple[Scale, ...]:
        """The scales whose experts are active in this mode, in the order of the spec."""
        return tuple(scale for scale in self.spec.scales if self._is_active(scale))

    def _is_active(self, scale: Scale) -> bool:
        if self.mode == "foster":
            return scale.name in self.fostered
        return self.mode == "route" or (self.mode == "switch" and scale.constant_gate != 0)
