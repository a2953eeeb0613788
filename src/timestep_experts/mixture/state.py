"""What all layers of one mixture share: the spec, the mode, and the timesteps of the running forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from timestep_experts.mixture.kernels import Kernels
from timestep_experts.mixture.router import TimestepIndex
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
        timestep_index: the places of the timesteps in the routers' tables, as many as in ``expert_index``; ``None``
            where no scale is gated.
        text_mask: ``(B, L)``, 0 where a token of the text is padding; ``None`` where the network was given none.
    """

    t: Tensor
    expert_index: dict[str, Tensor]
    timestep_index: TimestepIndex | None
    text_mask: Tensor | None = None

    @classmethod
    def of(
        cls, t: Tensor, spec: MixtureSpec, num_samples: int | None = None, text_mask: Tensor | None = None
    ) -> StepContext:
        """Look up the experts of timesteps ``(B,)``, or of one timestep ``(1,)`` that all samples share."""
        expert_index = {scale.name: scale.partition.index_of(t) for scale in spec.scales}
        timestep_index = TimestepIndex.of(t, spec.num_train_timesteps, spec.router_knots) if spec.gated_scales else None
        t = t if num_samples is None else t.expand(num_samples)
        return cls(t, expert_index, timestep_index, text_mask)


def per_row(values: Tensor, num_rows: int) -> Tensor:
    """Spread one value per sample ``(B,)`` over a layer's rows; a single value ``(1,)`` stays one for all of them."""
    repeats = num_rows // len(values)  # a layer may see frames or views of one sample as rows, next to each other
    return values if len(values) == 1 or repeats == 1 else values.repeat_interleave(repeats)


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
    """

    spec: MixtureSpec
    kernels: Kernels
    mode: Mode = "off"
    fostered: tuple[str, ...] = ()
    step: StepContext | None = None
    is_bound: bool = False
    gate_log: dict[str, list[Tensor]] | None = None

    @contextmanager
    def bound(self, t: Tensor) -> Iterator[None]:
        """Give the timesteps ``(B,)`` by hand for a while, then return to the ones before."""
        before = self.step, self.is_bound
        self.step, self.is_bound = StepContext.of(t, self.spec), True
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
