"""What the experts of a layer compute: ``A x`` for the joined ranks of all scales, then ``base + B A x``.

A forward pass gathers each sample's experts by index, joins those of all active scales along the rank and applies them
with two products: no Python branch on t, no value read back by the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from timestep_experts.mixture.lowrank import ExpertStack, LayerGeometry
from timestep_experts.mixture.router import Averages, average_positions

Strength = float | Tensor
"""Of one scale, gate times alpha / r: a number, ``(B, 1)`` per sample, or ``(B, N)`` per position; B = 1 serves all."""

MAX_FUSED_RANK = 8
"""While compiling, products of at most this rank are written term by term, which the compiler fuses into one pass over
the layer's input and one over its output. A library's product would be written and read once more; of higher rank, it
is faster nevertheless."""


def gather_experts(stacks: Sequence[ExpertStack], owners: Sequence[Tensor], groups: int) -> tuple[Tensor, list[Tensor]]:
    """Every sample's experts: A of all scales joined, ``(B, R, k)``, and B of each, ``(B, out, r / groups)``.

    R is the sum of the active ranks. In a grouped convolution each group's rows of B see their own share of every
    scale's rank, so ranks are joined group by group.

    Args:
        stacks: the m active scales.
        owners: m index tensors ``(B,)``, which expert of the scale each sample uses; ``(1,)`` where all use one, and
            then that is what is gathered.
        groups: of the base layer.
    """
    chosen = [stack.of(owner) for stack, owner in zip(stacks, owners, strict=True)]
    downs, ups = [down for down, _ in chosen], [up for _, up in chosen]
    if len(downs) == 1:
        return downs[0], ups
    grouped = _same_length([down.view(len(down), groups, -1, down.shape[-1]) for down in downs])
    return torch.cat(grouped, 2).flatten(1, 2), ups


def read_input(
    x: Tensor, down: Tensor, geometry: LayerGeometry, averages: Averages | None = None
) -> tuple[Tensor, Tensor | None]:
    """All that experts and router read of a layer's input.

    Args:
        x: the input, batch first.
        down: A of every sample, or ``(1, R, k)`` for all.
        geometry: of the base layer.
        averages: gives the average of x over positions; ``None`` where no router asks for it.

    Returns:
        ``A x``, ``(B, N, R)`` of a linear layer and ``(B, R, N)`` of a convolution, with N the output positions; and
        the average, ``(B, k)`` fp32.
    """
    down, channels_first = down.to(x.dtype), bool(geometry.kernel_size)
    is_product = not channels_first or geometry.is_pointwise
    if is_product and len(down) == len(x) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _read_jointly(x, down, channels_first, averages)
    hidden = _project_planes(x, down, geometry) if channels_first else _project_rows(x, down)
    return hidden, None if averages is None else averages.of(x, channels_first=channels_first)


def add_experts(
    base: Tensor,
    hidden: Tensor,
    ups: Sequence[Tensor],
    strengths: Sequence[Strength],
    geometry: LayerGeometry,
    *,
    in_place: bool = False,
) -> Tensor:
    """Add every sample's experts to the base layer's output, in the fused form.

    ``base + sum_j gate_j * (alpha_j / r_j) * B_j[i_j] A_j[i_j] x``  (TSM, eq. 5). All scales are one product of rank R:
    the input is read once, the output once read and written.

    Args:
        base: ``(B, ..., out)``, or ``(B, out, *space)`` for a convolution.
        hidden: ``A x``, see `read_input`.
        ups: B of the m active scales, see `gather_experts`.
        strengths: gate_j * (alpha_j / r_j), m of them, of any dtype.
        geometry: of the base layer.
        in_place: ``base`` may be overwritten; only for a tensor that nobody else holds, and without gradients, which
            would be copied for it.

    Returns:
        A tensor shaped like ``base``.
    """
    if all(isinstance(strength, float) for strength in strengths):
        ups = [up if strength == 1 else up * strength for up, strength in zip(ups, strengths, strict=True)]
    else:  # on the features, so that samples of one t share B whatever their gates are
        spread = _over_ranks(strengths, ups).to(hidden.dtype)
        spread = spread if geometry.groups == 1 else spread.repeat(1, 1, geometry.groups)
        hidden = hidden * (spread.transpose(1, 2) if geometry.kernel_size else spread)
    ups = _same_length([up.to(hidden.dtype) for up in ups])  # under autocast the first product has chosen it
    return (_add_planes if geometry.kernel_size else _add_rows)(base, hidden, ups, geometry, in_place)


def _over_ranks(strengths: Sequence[Strength], ups: Sequence[Tensor]) -> Tensor:
    """Strengths repeated over the ranks of one group, ``(B, 1, R)`` or ``(B, N, R)``."""
    shape = next(strength.shape for strength in strengths if isinstance(strength, Tensor))
    parts = [
        s[..., None] if isinstance(s, Tensor) else up.new_full((1,), s) for s, up in zip(strengths, ups, strict=True)
    ]
    return torch.cat([part.expand(*shape, up.shape[-1]) for part, up in zip(parts, ups, strict=True)], -1)


def _same_length(tensors: Sequence[Tensor]) -> list[Tensor]:
    longest = max(len(tensor) for tensor in tensors)
    return [tensor.expand(longest, *tensor.shape[1:]) for tensor in tensors]


def _read_jointly(
    x: Tensor, down: Tensor, channels_first: bool, averages: Averages | None
) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        average = None if averages is None else averages.of(x, channels_first=channels_first)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, down = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (x, down))
    read: tuple[Tensor, Tensor | None] = JointReading.apply(x, down, average, channels_first)  # type: ignore[no-untyped-call]
    return read


class JointReading(torch.autograd.Function):
    """``A x`` and the average of x, whose gradients reach x by one product.

    Left to autograd, the average's gradient would be written out for every position and added to the other's, and A's
    would come of a product with few columns; together as much work as all the rest that experts do.
    """

    @staticmethod
    def forward(x: Tensor, down: Tensor, average: Tensor | None, channels_first: bool) -> tuple[Tensor, Tensor | None]:
        """See `read_input`; the average is given by its value."""
        return _read(x, down, channels_first), None if average is None else average.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004 - torch passes it
        """Keep what autograd would have kept."""
        x, down, average, ctx.channels_first = inputs
        ctx.has_average = average is not None
        ctx.save_for_backward(x, down)
        ctx.save_for_forward(x, down)

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor, d_average: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and A."""
        x, down = ctx.saved_tensors
        z = _flat(x, ctx.channels_first)
        dx = d_down = None
        if ctx.needs_input_grad[0]:
            first, second = (down.transpose(1, 2), d_hidden) if ctx.channels_first else (d_hidden, down)
            if d_average is None:
                dx = torch.bmm(first, second)
            else:
                positions = 2 if ctx.channels_first else 1
                share = (d_average / z.shape[positions]).to(z.dtype).unsqueeze(positions)
                dx = torch.baddbmm(share.expand_as(z), first, second)
            dx = dx.view(x.shape)
        if ctx.needs_input_grad[1]:
            first, second = (d_hidden, z.transpose(1, 2)) if ctx.channels_first else (d_hidden.transpose(1, 2), z)
            d_down = torch.bmm(first, second)
        return dx, d_down, None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor, down_t: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
        """The change along changes of x and A, for forward-mode differentiation."""
        x, down = ctx.saved_tensors
        hidden_t = _read(x_t, down, ctx.channels_first) + _read(x, down_t, ctx.channels_first)
        average_t = average_positions(x_t, channels_first=ctx.channels_first) if ctx.has_average else None
        return hidden_t, average_t


def _read(x: Tensor, down: Tensor, channels_first: bool) -> Tensor:
    z, rank = _flat(x, channels_first), down.shape[1]
    if channels_first:
        return torch.bmm(down, z)
    if _is_fused(rank):
        return torch.stack([(z * down[:, i, None]).sum(2) for i in range(rank)], 2)
    return torch.bmm(z, down.transpose(1, 2))


def _flat(x: Tensor, channels_first: bool) -> Tensor:
    """``(B, k, N)`` of a convolution's input, ``(B, N, k)`` of a linear layer's."""
    return x.flatten(2) if channels_first else x.reshape(x.shape[0], -1, x.shape[-1])


def _is_fused(rank: int) -> bool:
    return torch.compiler.is_compiling() and rank <= MAX_FUSED_RANK


def _project_rows(x: Tensor, down: Tensor) -> Tensor:
    """``A x`` of a linear layer, ``(B, N, R)``; A is every sample's own, or one ``(1, R, k)`` for all."""
    if len(down) == 1 and not _is_fused(down.shape[1]):
        return functional.linear(_flat(x, channels_first=False), down[0])
    return _read(x, down, channels_first=False)


def _add_rows(base: Tensor, hidden: Tensor, ups: Sequence[Tensor], _: LayerGeometry, in_place: bool) -> Tensor:
    """``base + B hidden`` of a linear layer, with hidden ``(B, N, R)``."""
    # as rows of (B, R, out): products of so few columns are several times slower forward and, above all, backward
    rows = torch.cat([up.transpose(1, 2) for up in ups], 1)
    if len(rows) == 1:  # which serve all samples
        hidden = hidden.flatten(0, 1)[None]
    return _add_product(base.reshape(len(rows), -1, base.shape[-1]), hidden, rows, in_place).view(base.shape)


def _project_planes(x: Tensor, down: Tensor, geometry: LayerGeometry) -> Tensor:
    """``A x`` of a convolution, ``(B, R, N)`` with N the output positions; A as for rows."""
    batch = x.shape[0]
    if geometry.is_pointwise:
        return _read(x, down.expand(batch, -1, -1), channels_first=True)
    if geometry.is_dense_plane:
        return _send(x, down, geometry)
    if len(down) == 1:
        return _convolve(x, down, geometry, groups=1).flatten(2)
    # one group per sample, so each meets its own experts
    hidden = _convolve(x.reshape(1, -1, *x.shape[2:]), down.flatten(0, 1), geometry, groups=batch)
    return hidden.reshape(batch, down.shape[1], -1)


def _add_planes(base: Tensor, hidden: Tensor, ups: Sequence[Tensor], geometry: LayerGeometry, in_place: bool) -> Tensor:
    """``base + B hidden`` of a convolution, with hidden ``(B, R, N)``."""
    up = (torch.cat(list(ups), 2) if len(ups) > 1 else ups[0]).expand(base.shape[0], -1, -1)
    if geometry.groups == 1 and not base.is_contiguous():  # channels that are last stay last
        rows = base.flatten(2).transpose(1, 2)
        y = _add_product(rows, hidden.transpose(1, 2), up.transpose(1, 2), in_place)
        return y.transpose(1, 2).view(base.shape)
    (batch, out), groups = base.shape[:2], geometry.groups
    y = _add_product(
        base.reshape(batch * groups, out // groups, -1),
        up.reshape(batch * groups, out // groups, -1),
        hidden.reshape(batch * groups, -1, hidden.shape[-1]),
        in_place,
    ).view(base.shape)
    return y if base.is_contiguous() else torch.empty_like(base).copy_(y)


def _add_product(base: Tensor, left: Tensor, right: Tensor, in_place: bool) -> Tensor:
    """``base + left @ right``, with left ``(B, p, R)`` and right ``(B, R, q)``."""
    rank = right.shape[1]
    if _is_fused(rank):
        left, right = _written_down(left.transpose(1, 2)).transpose(1, 2), _written_down(right)
        for i in range(rank):
            base = base + left[:, :, i : i + 1] * right[:, i : i + 1]
        return base
    return (torch.Tensor.baddbmm_ if in_place else torch.baddbmm)(base, left, right)


def _written_down(factor: Tensor) -> Tensor:
    """The same ``(B, R, q)``, in memory and in this order: a compiler would gather it anew for every position.

    Its loop may run along either axis of the output, whatever the layout of that is when it has planned convolutions;
    a factor that stands in this order is read in one piece.
    """
    _, rows, columns = factor.shape
    return factor.contiguous().as_strided(factor.shape, (rows * columns, columns, 1))


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
