"""The shape of a layer, as far as a low-rank update beside it depends on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from timestep_experts.errors import UserError


@dataclass(frozen=True)
class LayerGeometry:
    """The sizes of a linear layer or of a convolution.

    A convolution has a ``kernel_size``; for a linear layer it is empty. In a grouped convolution A is ungrouped and B
    is grouped like the base layer, as in PEFT.
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
        """Read the geometry off a layer's attributes, so that quantised and custom layers are understood too.

        Args:
            layer: any module.
            where: its name, for the error.

        Raises:
            UserError: the layer is neither like a linear layer nor like a non-transposed convolution.
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
        raise UserError(
            f"{where}: a {type(layer).__name__} cannot carry experts; allowed are linear layers (in_features,"
            " out_features) and non-transposed convolutions (in_channels, kernel_size)"
        )

    @property
    def is_convolution(self) -> bool:
        """Whether channels come second, as in ``(B, k, *space)``, and not last."""
        return bool(self.kernel_size)

    @property
    def fan_in(self) -> int:
        """The number of inputs that one output of A reads: k, or k times the kernel's positions."""
        return self.in_features * math.prod(self.kernel_size)

    @property
    def is_pointwise(self) -> bool:
        """Whether a convolution reads one position at a time, and so is a linear layer over channels."""
        plain_padding = self.padding == "valid" or (not isinstance(self.padding, str) and not any(self.padding))
        return all(size == 1 for size in (*self.kernel_size, *self.stride)) and plain_padding

    @property
    def keeps_positions(self) -> bool:
        """Whether the positions of the output are those of the input, one to one."""
        if isinstance(self.padding, str):
            return self.padding == "same" or self.is_pointwise
        reach = zip(self.kernel_size, self.dilation, self.padding, strict=True)
        return all(size == 1 for size in self.stride) and all(d * (k - 1) == 2 * p for k, d, p in reach)

    def num_expert_parameters(self, rank: int) -> int:
        """The number of parameters of one expert of that rank: A and B together."""
        return rank * self.fan_in + self.out_features * rank // self.groups
