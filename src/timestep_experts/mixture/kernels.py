"""The seam between a layer and the arithmetic of its experts.

A layer asks for three steps: gather the experts of every row, read the layer's input through A, and add B of that to
the base layer's output. Between the last two, a router may look at what was read, scale by scale. `plain.PlainKernels`
writes them as in the paper, and `fast.FastKernels` gives the same numbers sooner.

Shapes: B rows of a batch, N positions, k input and d output features, r rank, m active scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from timestep_experts.mixture.experts import ExpertStack
from timestep_experts.mixture.geometry import LayerGeometry
from timestep_experts.mixture.router import Router
from timestep_experts.mixture.router_form import TimestepIndex

Strength = float | Tensor
"""``gate_j * alpha_j / r_j`` of one scale: a number, or ``(B, N, r)``. B is 1 where all samples have the same, N is 1
where all positions have, and r is 1 where all ranks have."""


@dataclass(frozen=True)
class Experts:
    """The experts of every row of a batch.

    Args:
        downs: A of the active scales, ``(B, r, k)`` each, or of several scales joined along the rank.
        ups: B of the m active scales, ``(B, d, r / groups)`` each. In both, B = 1 serves all rows.
    """

    downs: Sequence[Tensor]
    ups: Sequence[Tensor]


class Kernels(Protocol):
    """How a layer's experts are computed."""

    def read_tables(self, routers: Sequence[Router], index: TimestepIndex) -> Sequence[Tensor]:
        """What the tables of routers add to their gates, ``(B, m)`` fp32 each, where the timesteps are."""
        ...

    def gather(
        self, stacks: Sequence[ExpertStack], expert_index: Sequence[Tensor], num_rows: int, groups: int
    ) -> Experts:
        """Choose the experts of every row.

        Args:
            stacks: the m active scales.
            expert_index: m index tensors, ``(B,)`` or ``(1,)`` where all rows use one expert.
            num_rows: B.
            groups: of the base layer.
        """
        ...

    def read(
        self, x: Tensor, router_input: Tensor | None, experts: Experts, geometry: LayerGeometry
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Compute A x, and the average of the router's input.

        Args:
            x: the experts' input, batch first.
            router_input: the same without dropout; ``None`` where no router asks for its average.
            experts: see `gather`.
            geometry: of the base layer.

        Returns:
            A x for each of ``experts.downs``: ``(B, N, r)`` of a linear layer and ``(B, r, N)`` of a convolution, N
            being the output positions; and the average over positions, ``(B, k)`` fp32.
        """
        ...

    def by_scale(self, hidden: Sequence[Tensor], experts: Experts, geometry: LayerGeometry) -> Sequence[Tensor]:
        """A x of each of the m active scales, ``(B, N, r)``, from what `read` returned."""
        ...

    def add(
        self,
        base_layer: nn.Module,
        y: Tensor,
        hidden: Sequence[Tensor],
        experts: Experts,
        strengths: Sequence[Strength],
        geometry: LayerGeometry,
    ) -> Tensor:
        """Add B A x of all scales, each times its strength, to the output y of the base layer."""
        ...
