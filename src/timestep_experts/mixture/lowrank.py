"""The stacked low-rank experts of one layer, chosen per sample.

All experts of a scale live in one pair of tensors, ``A (n, r, k)`` and ``B (n, d, r)``. A forward pass gathers each
sample's experts by index, joins those of all active scales along the rank and applies them with two batched products:
no Python branch on t, no value read back by the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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
        alpha: the update is scaled by alpha / r.
        where: the layer's name, for errors.
    """

    def __init__(self, geometry: LayerGeometry, num_experts: int, rank: int, alpha: float, where: str) -> None:
        super().__init__()
        if rank < 1 or rank % geometry.groups:
            raise ValueError(
                f"{where}: rank must be a positive multiple of the layer's {geometry.groups} group(s); got {rank}"
            )
        self.rank = rank
        self.scaling = alpha / rank
        self.A = nn.Parameter(torch.empty(num_experts, rank, geometry.in_features * math.prod(geometry.kernel_size)))
        self.B = nn.Parameter(torch.zeros(num_experts, geometry.out_features, rank // geometry.groups))
        for expert in self.A.data:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"experts={self.A.shape[0]}, rank={self.rank}, scaling={self.scaling:g}"


def apply_experts(
    base: Tensor,
    x: Tensor,
    stacks: list[ExpertStack],
    owners: list[Tensor],
    gates: Tensor,
    geometry: LayerGeometry,
    *,
    in_place: bool = False,
) -> Tensor:
    """Add every sample's experts to the base layer's output, in the fused form.

    ``base + sum_j gate_j * (alpha_j / r_j) * B_j[i_j] A_j[i_j] x``  (TSM, eq. 5), with R the sum of the active ranks.

    Args:
        base: ``(B, ..., out)``, or ``(B, out, *space)`` for a convolution.
        x: the layer's input, batch first.
        stacks: the m active scales.
        owners: m index tensors ``(B,)``, which expert of the scale each sample uses.
        gates: ``(B, m)``, or ``(B, N, m)`` for a gate per position, any dtype.
        geometry: of the base layer.
        in_place: ``base`` may be overwritten; only for a tensor that nobody else holds.

    Returns:
        A tensor shaped like ``base``.
    """
    groups = geometry.groups
    downs = [stack.A.index_select(0, owner) for stack, owner in zip(stacks, owners, strict=True)]
    ups = [stack.B.index_select(0, owner) for stack, owner in zip(stacks, owners, strict=True)]
    down = torch.cat([a.view(len(a), groups, -1, a.shape[-1]) for a in downs], 2).flatten(1, 2)
    up = torch.cat(ups, 2)
    strengths = [gates[..., j, None] * stack.scaling for j, stack in enumerate(stacks)]
    strength = torch.cat([s.expand(*s.shape[:-1], b.shape[-1]) for s, b in zip(strengths, ups, strict=True)], -1)
    if gates.dim() == 2:
        up = up * strength[:, None, :].to(up.dtype)
    hidden = _project_down(x, down.to(x.dtype), geometry)
    if gates.dim() == 3:
        hidden = hidden * strength.transpose(1, 2).to(hidden.dtype).repeat(1, groups, 1)
    up = up.to(hidden.dtype)  # under autocast the first product has chosen it
    add = torch.Tensor.baddbmm_ if in_place else torch.baddbmm
    if not geometry.kernel_size:
        flat = base.reshape(base.shape[0], -1, base.shape[-1])
        return add(flat, hidden.transpose(1, 2), up.transpose(1, 2)).view(base.shape)
    batch, out = base.shape[:2]  # of a grouped convolution, group g's rows of B see group g's share of the rank
    return add(
        base.reshape(batch * groups, out // groups, -1),
        up.reshape(batch * groups, out // groups, -1),
        hidden.reshape(batch * groups, -1, hidden.shape[-1]),
    ).view(base.shape)


def _project_down(x: Tensor, down: Tensor, geometry: LayerGeometry) -> Tensor:
    """``A x`` for every sample: ``(B, R, N)`` with N the output positions."""
    batch = x.shape[0]
    if not geometry.kernel_size:
        return torch.bmm(down, x.reshape(batch, -1, geometry.in_features).transpose(1, 2))
    if geometry.is_pointwise:
        return torch.bmm(down, x.flatten(2))
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(geometry.kernel_size) - 1]
    hidden = convolve(
        x.reshape(1, -1, *x.shape[2:]),
        down.reshape(-1, geometry.in_features, *geometry.kernel_size),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        batch,  # one group per sample, so each meets its own experts
    )
    return hidden.reshape(batch, down.shape[1], -1)
