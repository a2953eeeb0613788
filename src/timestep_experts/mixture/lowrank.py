"""The stacked low-rank experts of one layer.

All experts of a scale live in one pair of tensors, ``A (n, r, k)`` and ``B (n, d, r)``, and are chosen by index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerGeometry:
    """What a low-rank update must know of the layer it stands beside.

    A convolution has ``kernel_size``; for a linear layer it is empty. ``groups`` follows PEFT's rule: A is ungrouped
    and B is grouped like the base layer.
    """

    in_features: int
    out_features: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Module, where: str) -> LayerGeometry:
        """Read the geometry off a layer by its attributes, so quantised and custom layers count too.

        Raises:
            ValueError: the layer is neither linear-like nor a (non-transposed) convolution.
        """
        attributes: Any = layer
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            return cls(attributes.in_features, attributes.out_features)
        is_convolution = hasattr(layer, "kernel_size") and hasattr(layer, "in_channels")
        if is_convolution and not getattr(layer, "transposed", False):
            return cls(
                attributes.in_channels,
                attributes.out_channels,
                tuple(attributes.kernel_size),
                tuple(attributes.stride),
                attributes.padding if isinstance(attributes.padding, str) else tuple(attributes.padding),
                tuple(attributes.dilation),
                attributes.groups,
            )
        raise ValueError(
            f"{where}: a {type(layer).__name__} cannot carry experts; allowed are linear layers (in_features,"
            " out_features) and non-transposed convolutions (in_channels, kernel_size)"
        )

    @property
    def is_pointwise(self) -> bool:
        """Whether a convolution sees one position at a time, and so is a linear layer over channels."""
        plain_padding = self.padding == "valid" or (not isinstance(self.padding, str) and not any(self.padding))
        return all(size == 1 for size in (*self.kernel_size, *self.stride)) and plain_padding

    @property
    def is_dense_plane(self) -> bool:
        """Whether a convolution over a plane is computed at every position, with no more padding than it reaches."""
        if isinstance(self.padding, str) or len(self.kernel_size) != 2 or any(step != 1 for step in self.stride):
            return False
        reach = zip(self.kernel_size, self.dilation, self.padding, strict=True)
        return all(p <= d * (k - 1) for k, d, p in reach)

    @property
    def keeps_positions(self) -> bool:
        """Whether output positions are the input's, one to one."""
        if isinstance(self.padding, str):
            return self.padding == "same" or self.is_pointwise
        reach = zip(self.kernel_size, self.dilation, self.padding, strict=True)
        return all(size == 1 for size in self.stride) and all(d * (k - 1) == 2 * p for k, d, p in reach)

    def num_expert_parameters(self, rank: int) -> int:
        """Parameters of one expert of that rank: A and B."""
        return rank * self.in_features * math.prod(self.kernel_size) + self.out_features * rank // self.groups


class ExpertStack(nn.Module):
    """The experts of one scale on one layer: ``A (n, r, k)``, k = in * prod(kernel), and ``B (n, out, r / groups)``.

    A is drawn like PEFT's (Kaiming uniform, a = sqrt 5), B is zero, so a new stack changes nothing. A is kept flat, so
    that casting a network to a memory format leaves it alone. Parameters are fp32 until moved; the products run in the
    input's dtype.

    Args:
        geometry: of the base layer.
        num_experts: n.
        rank: r; a multiple of the layer's groups.
        where: the layer's name, for errors.
        first: the index in its scale of the first expert held here, for a network that is used for a part of the
            timesteps alone; ``None`` where all experts are held.
    """

    def __init__(
        self, geometry: LayerGeometry, num_experts: int, rank: int, where: str, first: int | None = None
    ) -> None:
        super().__init__()
        if rank < 1 or rank % geometry.groups:
            raise ValueError(
                f"{where}: rank must be a positive multiple of the layer's {geometry.groups} group(s); got {rank}"
            )
        self.rank = rank
        self.first, self.is_part = first or 0, first is not None
        self.A = nn.Parameter(torch.empty(num_experts, rank, geometry.in_features * math.prod(geometry.kernel_size)))
        self.B = nn.Parameter(torch.zeros(num_experts, geometry.out_features, rank // geometry.groups))
        for expert in self.A.data:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))

    def place_of(self, owner: Tensor) -> Tensor:
        """Where in A and B the experts of these indices are; the nearest ones for indices that are not held here."""
        if not self.is_part:
            return owner
        return (owner - self.first).clamp(0, len(self.A) - 1)

    def of(self, owner: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of these experts, ``(B, r, k)`` and ``(B, out, r / groups)``; B = 1 where one alone is held."""
        if len(self.A) == 1:
            return self.A, self.B
        place = self.place_of(owner)
        return self.A.index_select(0, place), self.B.index_select(0, place)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"experts={self.A.shape[0]}, rank={self.rank}"
