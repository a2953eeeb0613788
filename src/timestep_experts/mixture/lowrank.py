"""The stacked low-rank experts of one layer, chosen per sample.

All experts of a scale live in one pair of tensors, ``A (n, r, k)`` and ``B (n, d, r)``. A forward pass gathers each
sample's experts by index, joins those of all active scales along the rank and applies them with two batched products:
no Python branch on t, no value read back by the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        alpha: the update is scaled by alpha / r.
        where: the layer's name, for errors.
        first: the index in its scale of the first expert held here, for a network that is used for a part of the
            timesteps alone; ``None`` where all experts are held.
    """

    def __init__(
        self, geometry: LayerGeometry, num_experts: int, rank: int, alpha: float, where: str, first: int | None = None
    ) -> None:
        super().__init__()
        if rank < 1 or rank % geometry.groups:
            raise ValueError(
                f"{where}: rank must be a positive multiple of the layer's {geometry.groups} group(s); got {rank}"
            )
        self.rank = rank
        self.scaling = alpha / rank
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

    def only(self, owner: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of the one expert that all samples use: owner ``(1,)``, or any where a single expert is held."""
        if len(self.A) == 1:
            return self.A, self.B
        return self.each(owner)

    def each(self, owner: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of every sample's expert, ``(B, r, k)`` and ``(B, out, r / groups)``."""
        place = self.place_of(owner)
        return self.A.index_select(0, place), self.B.index_select(0, place)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"experts={self.A.shape[0]}, rank={self.rank}, scaling={self.scaling:g}"


def apply_experts(
    base: Tensor,
    x: Tensor,
    stacks: list[ExpertStack],
    owners: list[Tensor],
    gates: Tensor | Sequence[float],
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
        owners: m index tensors ``(B,)``, which expert of the scale each sample uses; ``(1,)`` where all use one.
        gates: m numbers, or ``(B, m)``, or ``(B, N, m)`` for a gate per position, any dtype; B = 1 serves all samples.
        geometry: of the base layer.
        in_place: ``base`` may be overwritten; only for a tensor that nobody else holds.

    Returns:
        A tensor shaped like ``base``.
    """
    is_shared = all(len(stack.A) == 1 or len(owner) == 1 for stack, owner in zip(stacks, owners, strict=True))
    chosen = [
        stack.only(owner) if is_shared else stack.each(owner) for stack, owner in zip(stacks, owners, strict=True)
    ]
    numbers = [1.0] * len(stacks) if isinstance(gates, Tensor) else gates
    scalings = [gate * stack.scaling for gate, stack in zip(numbers, stacks, strict=True)]
    down, up = _join([A for A, _ in chosen], [B for _, B in chosen], scalings, geometry.groups)
    strength = _strength(gates, stacks, geometry.groups) if isinstance(gates, Tensor) else None
    if is_shared and not geometry.kernel_size:
        return _apply_to_rows(base, x, down[0], up[0], strength, in_place)
    hidden = _project_down(x, down.to(x.dtype), geometry)
    if strength is not None and strength.dim() == 2:
        up = up * strength[:, None, : up.shape[-1]].to(up.dtype)
    elif strength is not None:
        hidden = hidden * strength.transpose(1, 2).to(hidden.dtype)
    return _add_up(base, hidden, up.expand(len(x), -1, -1), geometry, in_place)


def _apply_to_rows(
    base: Tensor, x: Tensor, down: Tensor, up: Tensor, strength: Tensor | None, in_place: bool
) -> Tensor:
    """A linear layer's one pair of A and B for all samples: one product over all rows, gates act on its features."""
    hidden = functional.linear(x, down.to(x.dtype)).reshape(len(x), -1, len(down))
    if strength is not None:
        hidden = hidden * (strength[:, None] if strength.dim() == 2 else strength).to(hidden.dtype)
    add = torch.Tensor.addmm_ if in_place else torch.addmm
    flat = base.reshape(-1, base.shape[-1])
    return add(flat, hidden.flatten(0, 1), up.T.to(hidden.dtype)).view(base.shape)


def _join(downs: list[Tensor], ups: list[Tensor], scalings: list[float], groups: int) -> tuple[Tensor, Tensor]:
    """Experts of several scales as one: ``(B, R, k)`` and ``(B, out, R / groups)``, scaled by alpha / r.

    In a grouped convolution each group's rows of B see their own share of every scale's rank, so ranks are joined
    group by group.
    """
    scaled = [up if scaling == 1 else up * scaling for up, scaling in zip(ups, scalings, strict=True)]
    if len(downs) == 1:
        return downs[0], scaled[0]
    grouped = [down.view(len(down), groups, -1, down.shape[-1]) for down in downs]
    return torch.cat(grouped, 2).flatten(1, 2), torch.cat(scaled, 2)


def _strength(gates: Tensor, stacks: list[ExpertStack], groups: int) -> Tensor:
    """Gates per scale spread over the joined rank: ``(B, R)`` or ``(B, N, R)``; that of a single scale as it is."""
    if len(stacks) == 1:
        return gates
    parts = [gates[..., j, None].expand(*gates.shape[:-1], s.rank // groups) for j, s in enumerate(stacks)]
    joined = torch.cat(parts, -1)
    return joined if groups == 1 else joined.repeat(*(1,) * (gates.dim() - 1), groups)


def _add_up(base: Tensor, hidden: Tensor, up: Tensor, geometry: LayerGeometry, in_place: bool) -> Tensor:
    """``base + B hidden`` with hidden ``(B, R, N)`` and up ``(B, out, R / groups)``."""
    up = up.to(hidden.dtype)  # under autocast the first product has chosen it
    add = torch.Tensor.baddbmm_ if in_place else torch.baddbmm
    if not geometry.kernel_size:
        flat = base.reshape(base.shape[0], -1, base.shape[-1])
        return add(flat, hidden.transpose(1, 2), up.transpose(1, 2)).view(base.shape)
    (batch, out), groups = base.shape[:2], geometry.groups
    y = add(
        base.reshape(batch * groups, out // groups, -1),
        up.reshape(batch * groups, out // groups, -1),
        hidden.reshape(batch * groups, -1, hidden.shape[-1]),
    ).view(base.shape)
    # channels that were last stay last: later layers would choose other kernels, which round differently
    return y if base.is_contiguous() else torch.empty_like(base).copy_(y)


def _project_down(x: Tensor, down: Tensor, geometry: LayerGeometry) -> Tensor:
    """``A x``, ``(B, R, N)`` with N the output positions; A is every sample's own, or one ``(1, R, k)`` for all."""
    batch = x.shape[0]
    if not geometry.kernel_size:
        return torch.bmm(down, x.reshape(batch, -1, geometry.in_features).transpose(1, 2))
    if geometry.is_pointwise:
        return torch.bmm(down.expand(batch, -1, -1), x.flatten(2))
    if geometry.is_dense_plane:
        return _send(x, down, geometry)
    if len(down) == 1:
        return _convolve(x, down, geometry, groups=1).flatten(2)
    # one group per sample, so each meets its own experts
    hidden = _convolve(x.reshape(1, -1, *x.shape[2:]), down.flatten(0, 1), geometry, groups=batch)
    return hidden.reshape(batch, down.shape[1], -1)


def _send(x: Tensor, down: Tensor, geometry: LayerGeometry) -> Tensor:
    """A convolution with few output channels, as one product and a sum.

    Every position computes what it gives to each position within the kernel's reach, R numbers for each, and those are
    added up where they land: the sum over the kernel comes after the product over channels. Library kernels for
    convolutions are slow where so few channels go out.
    """
    batch = x.shape[0]
    kernel = down.reshape(len(down), -1, geometry.in_features, *geometry.kernel_size).flip(-1, -2)
    sent = torch.bmm(kernel.flatten(3).transpose(2, 3).flatten(1, 2).expand(batch, -1, -1), x.flatten(2))
    reach = [d * (k - 1) for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
    padding = [int(p) for p in geometry.padding]
    size = [n + 2 * p - r for n, p, r in zip(x.shape[2:], padding, reach, strict=True)]
    margin = [r - p for p, r in zip(padding, reach, strict=True)]
    landed = functional.fold(sent, tuple(size), geometry.kernel_size, geometry.dilation, tuple(margin))
    return landed.flatten(2)


def _convolve(x: Tensor, down: Tensor, geometry: LayerGeometry, groups: int) -> Tensor:
    """The base layer's kind of convolution with A ``(..., R, k)`` as its kernel."""
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[len(geometry.kernel_size) - 1]
    kernel = down.reshape(-1, geometry.in_features, *geometry.kernel_size)
    return convolution(x, kernel, None, geometry.stride, geometry.padding, geometry.dilation, groups)
