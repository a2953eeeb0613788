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

Gate = float | Tensor
"""Of one scale: a number, ``(B,)`` per sample, or ``(B, N)`` per position; B = 1 serves all samples. Any dtype."""


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

    def of(self, owner: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of these experts, ``(B, r, k)`` and ``(B, out, r / groups)``; B = 1 where one alone is held."""
        if len(self.A) == 1:
            return self.A, self.B
        place = self.place_of(owner)
        return self.A.index_select(0, place), self.B.index_select(0, place)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"experts={self.A.shape[0]}, rank={self.rank}, scaling={self.scaling:g}"


def apply_experts(
    base: Tensor,
    x: Tensor,
    stacks: Sequence[ExpertStack],
    owners: Sequence[Tensor],
    gates: Sequence[Gate],
    geometry: LayerGeometry,
    *,
    in_place: bool = False,
) -> Tensor:
    """Add every sample's experts to the base layer's output, in the fused form.

    ``base + sum_j gate_j * (alpha_j / r_j) * B_j[i_j] A_j[i_j] x``  (TSM, eq. 5), with R the sum of the active ranks.
    All scales are one product of rank R: the input is read once, the output once read and written.

    Args:
        base: ``(B, ..., out)``, or ``(B, out, *space)`` for a convolution.
        x: the layer's input, batch first.
        stacks: the m active scales.
        owners: m index tensors ``(B,)``, which expert of the scale each sample uses; ``(1,)`` where all use one.
        gates: m of them.
        geometry: of the base layer.
        in_place: ``base`` may be overwritten; only for a tensor that nobody else holds, and without gradients, which
            would be copied for it.

    Returns:
        A tensor shaped like ``base``.
    """
    chosen = [stack.of(owner) for stack, owner in zip(stacks, owners, strict=True)]
    ups = [_scaled(up, gate, stack.scaling) for (_, up), gate, stack in zip(chosen, gates, stacks, strict=True)]
    down, up = _join([down for down, _ in chosen], ups, geometry.groups)
    strength = _strength_per_position(gates, stacks, geometry.groups)
    project, add = (_project_planes, _add_planes) if geometry.kernel_size else (_project_rows, _add_rows)
    hidden = project(x, down.to(x.dtype), geometry)
    if strength is not None:
        hidden = hidden * (strength.transpose(1, 2) if geometry.kernel_size else strength).to(hidden.dtype)
    up = up.to(hidden.dtype)  # under autocast the first product has chosen it
    return add(base, hidden, up, geometry, in_place)


def _scaled(up: Tensor, gate: Gate, scaling: float) -> Tensor:
    """B times alpha / r and the gate; gates per position act on features, not here."""
    if not isinstance(gate, Tensor):
        return up if gate * scaling == 1 else up * (gate * scaling)
    if gate.dim() > 1:
        return up if scaling == 1 else up * scaling
    return up * (gate * scaling)[:, None, None].to(up.dtype)


def _join(downs: Sequence[Tensor], ups: Sequence[Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """Experts of several scales as one: ``(B, R, k)`` and ``(B, out, R / groups)``; B = 1 where all have B = 1.

    In a grouped convolution each group's rows of B see their own share of every scale's rank, so ranks are joined
    group by group.
    """
    if len(downs) == 1:
        return downs[0], ups[0]
    grouped = _same_length([down.view(len(down), groups, -1, down.shape[-1]) for down in downs])
    return torch.cat(grouped, 2).flatten(1, 2), torch.cat(_same_length(ups), 2)


def _same_length(tensors: Sequence[Tensor]) -> list[Tensor]:
    longest = max(len(tensor) for tensor in tensors)
    return [tensor.expand(longest, *tensor.shape[1:]) for tensor in tensors]


def _strength_per_position(gates: Sequence[Gate], stacks: Sequence[ExpertStack], groups: int) -> Tensor | None:
    """Gates per position spread over the joined rank, ``(B, N, R)``, with 1 for the others; ``None`` without any."""
    shape = next((gate.shape for gate in gates if isinstance(gate, Tensor) and gate.dim() > 1), None)
    if shape is None:
        return None
    parts = [
        (gate[..., None] if isinstance(gate, Tensor) else stack.A.new_ones(1)).expand(*shape, stack.rank // groups)
        for gate, stack in zip(gates, stacks, strict=True)
    ]
    joined = torch.cat(parts, -1)
    return joined if groups == 1 else joined.repeat(1, 1, groups)


def _project_rows(x: Tensor, down: Tensor, geometry: LayerGeometry) -> Tensor:
    """``A x`` of a linear layer, ``(B, N, R)``; A is every sample's own, or one ``(1, R, k)`` for all."""
    rows = x.reshape(x.shape[0], -1, geometry.in_features)
    return functional.linear(rows, down[0]) if len(down) == 1 else torch.bmm(rows, down.transpose(1, 2))


def _add_rows(base: Tensor, hidden: Tensor, up: Tensor, _: LayerGeometry, in_place: bool) -> Tensor:
    """``base + B hidden`` of a linear layer, with hidden ``(B, N, R)``."""
    # as rows of (B, R, out): products of so few columns are several times slower forward and, above all, backward
    rows = up.transpose(1, 2).contiguous()
    if len(rows) == 1:
        add = torch.Tensor.addmm_ if in_place else torch.addmm
        return add(base.reshape(-1, base.shape[-1]), hidden.flatten(0, 1), rows[0]).view(base.shape)
    batched_add = torch.Tensor.baddbmm_ if in_place else torch.baddbmm
    return batched_add(base.reshape(len(rows), -1, base.shape[-1]), hidden, rows).view(base.shape)


def _project_planes(x: Tensor, down: Tensor, geometry: LayerGeometry) -> Tensor:
    """``A x`` of a convolution, ``(B, R, N)`` with N the output positions; A as for rows."""
    batch = x.shape[0]
    if geometry.is_pointwise:
        return torch.bmm(down.expand(batch, -1, -1), x.flatten(2))
    if geometry.is_dense_plane:
        return _send(x, down, geometry)
    if len(down) == 1:
        return _convolve(x, down, geometry, groups=1).flatten(2)
    # one group per sample, so each meets its own experts
    hidden = _convolve(x.reshape(1, -1, *x.shape[2:]), down.flatten(0, 1), geometry, groups=batch)
    return hidden.reshape(batch, down.shape[1], -1)


def _add_planes(base: Tensor, hidden: Tensor, up: Tensor, geometry: LayerGeometry, in_place: bool) -> Tensor:
    """``base + B hidden`` of a convolution, with hidden ``(B, R, N)``."""
    up = up.expand(base.shape[0], -1, -1)
    add = torch.Tensor.baddbmm_ if in_place else torch.baddbmm
    if geometry.groups == 1 and not base.is_contiguous():  # channels that are last stay last
        rows = base.flatten(2).transpose(1, 2)
        return add(rows, hidden.transpose(1, 2), up.transpose(1, 2)).transpose(1, 2).view(base.shape)
    (batch, out), groups = base.shape[:2], geometry.groups
    y = add(
        base.reshape(batch * groups, out // groups, -1),
        up.reshape(batch * groups, out // groups, -1),
        hidden.reshape(batch * groups, -1, hidden.shape[-1]),
    ).view(base.shape)
    return y if base.is_contiguous() else torch.empty_like(base).copy_(y)


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
