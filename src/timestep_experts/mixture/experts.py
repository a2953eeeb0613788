"""The stacked low-rank experts of one layer.

All n experts of a scale live in one pair of tensors, ``A (n, r, k)`` and ``B (n, d, r)``, and are chosen by index.

Shapes: n experts, r rank, k inputs per output of A, d output features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.mixture.geometry import LayerGeometry


class ExpertStack(nn.Module):
    """The experts of one scale on one layer.

    ``A`` is ``(n, r, k)`` with k = in * prod(kernel), and ``B`` is ``(n, out, r / groups)``. A is drawn as PEFT draws
    it (Kaiming uniform, a = sqrt 5) and B is zero, so a new stack changes nothing. A stays flat, so that casting a
    network to a memory format leaves it alone. Parameters are fp32 until they are moved; products run in the input's
    dtype.

    Args:
        geometry: of the base layer.
        num_experts: n.
        rank: r, a multiple of the layer's groups.
        where: the layer's name, for errors.
        first: the index in its scale of the first expert that is held here. It is given for a network that works on a
            part of the timesteps alone; ``None`` means that all experts are held.

    Raises:
        UserError: the rank is not a positive multiple of the layer's groups.
    """

    def __init__(
        self, geometry: LayerGeometry, num_experts: int, rank: int, where: str, first: int | None = None
    ) -> None:
        super().__init__()
        if rank < 1 or rank % geometry.groups:
            raise UserError(
                f"{where}: rank must be a positive multiple of the layer's {geometry.groups} group(s); got {rank}"
            )
        self.rank = rank
        self.first, self.is_part = first or 0, first is not None
        self.A = nn.Parameter(torch.empty(num_experts, rank, geometry.fan_in))
        self.B = nn.Parameter(torch.zeros(num_experts, geometry.out_features, rank // geometry.groups))
        for expert in self.A.data:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))

    def place_of(self, expert_index: Tensor) -> Tensor:
        """The places of experts in A and B; an expert that is not held here gives the nearest one."""
        if not self.is_part:
            return expert_index
        return (expert_index - self.first).clamp(0, len(self.A) - 1)

    def of(self, expert_index: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of these experts ``(B,)``: ``(B, r, k)`` and ``(B, out, r / groups)``."""
        place = self.place_of(expert_index)
        return self.A.index_select(0, place), self.B.index_select(0, place)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"experts={self.A.shape[0]}, rank={self.rank}"
