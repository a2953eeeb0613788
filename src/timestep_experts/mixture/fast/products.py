"""Products with few columns or rows, in the forms that are fastest for them.

Shapes: B rows of a batch, N positions, k input and d output features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from timestep_experts.mixture.geometry import LayerGeometry
from timestep_experts.mixture.plain import convolve

MAX_TERMS = 8
"""While compiling, products of at most this rank are written term by term. The compiler fuses them into one pass over
the layer's input and one over its output, where a library's product would be written and read once more. A library is
faster at higher ranks nevertheless."""


def flat(x: Tensor, is_convolution: bool) -> Tensor:
    """``(B, k, N)`` of a convolution's input, ``(B, N, k)`` of a linear layer's."""
    return x.flatten(2) if is_convolution else x.reshape(x.shape[0], -1, x.shape[-1])


def project(x: Tensor, down: Tensor, is_convolution: bool, max_terms: int = 0) -> Tensor:
    """A x, position by position, with A ``(B, R, k)``: ``(B, N, R)``, or ``(B, R, N)`` of a convolution."""
    z, rank = flat(x, is_convolution), down.shape[1]
    if is_convolution:
        return torch.bmm(down, z)
    if rank <= max_terms:
        return torch.stack([(z * down[:, i, None]).sum(2) for i in range(rank)], 2)
    return torch.bmm(z, down.transpose(1, 2))


def project_rows(x: Tensor, down: Tensor, _: LayerGeometry, *, max_terms: int, by_fold: bool) -> Tensor:  # noqa: ARG001
    """A x of a linear layer, ``(B, N, R)``; A is every row's own, or one ``(1, R, k)`` for all."""
    if len(down) == 1 and down.shape[1] > max_terms:
        return functional.linear(flat(x, is_convolution=False), down[0])
    return project(x, down, is_convolution=False, max_terms=max_terms)


def add_rows(
    y: Tensor, hidden: Tensor, ups: Sequence[Tensor], _: LayerGeometry, *, max_terms: int, in_place: bool
) -> Tensor:
    """``y + B hidden`` of a linear layer, with hidden ``(B, N, R)``."""
    # As rows of (B, R, d): products of so few columns are several times slower forward and, above all, backward.
    rows = torch.cat([up.transpose(1, 2) for up in ups], 1)
    if len(rows) == 1:  # they serve all samples
        hidden = hidden.flatten(0, 1)[None]
    return _add_product(y.reshape(len(rows), -1, y.shape[-1]), hidden, rows, max_terms, in_place).view(y.shape)


def project_planes(x: Tensor, down: Tensor, geometry: LayerGeometry, *, max_terms: int, by_fold: bool) -> Tensor:
    """A x of a convolution, ``(B, R, N)`` with N the output positions; A as in `project_rows`."""
    batch = x.shape[0]
    if geometry.is_pointwise:
        return project(x, down.expand(batch, -1, -1), is_convolution=True, max_terms=max_terms)
    if len(down) == 1:
        return convolve(x, down, geometry).flatten(2)
    if by_fold and _is_dense_plane(geometry) and _sums_in_full(x):
        return _conv_by_fold(x, down, geometry)
    # One group per row, so each meets its own experts.
    hidden = convolve(x.reshape(1, -1, *x.shape[2:]), down.flatten(0, 1), geometry, groups=batch)
    return hidden.reshape(batch, down.shape[1], -1)


def add_planes(
    y: Tensor, hidden: Tensor, ups: Sequence[Tensor], geometry: LayerGeometry, *, max_terms: int, in_place: bool
) -> Tensor:
    """``y + B hidden`` of a convolution, with hidden ``(B, R, N)``."""
    up = (torch.cat(list(ups), 2) if len(ups) > 1 else ups[0]).expand(y.shape[0], -1, -1)
    if geometry.groups == 1 and not y.is_contiguous():  # channels that are last stay last
        rows = y.flatten(2).transpose(1, 2)
        added = _add_product(rows, hidden.transpose(1, 2), up.transpose(1, 2), max_terms, in_place)
        return added.transpose(1, 2).view(y.shape)
    (batch, out), groups = y.shape[:2], geometry.groups
    added = _add_product(
        y.reshape(batch * groups, out // groups, -1),
        up.reshape(batch * groups, out // groups, -1),
        hidden.reshape(batch * groups, -1, hidden.shape[-1]),
        max_terms,
        in_place,
    ).view(y.shape)
    return added if y.is_contiguous() else torch.empty_like(y).copy_(added)


def _add_product(y: Tensor, left: Tensor, right: Tensor, max_terms: int, in_place: bool) -> Tensor:
    """``y + left @ right``, with left ``(B, p, R)`` and right ``(B, R, q)``."""
    rank = right.shape[1]
    if rank <= max_terms:
        left, right = _written_down(left.transpose(1, 2)).transpose(1, 2), _written_down(right)
        for i in range(rank):
            y = y + left[:, :, i : i + 1] * right[:, i : i + 1]
        return y
    return (torch.Tensor.baddbmm_ if in_place else torch.baddbmm)(y, left, right)


def _written_down(factor: Tensor) -> Tensor:
    """The same ``(B, R, q)``, in memory and in this order: a compiler would gather it anew for every position.

    Its loop may run along either axis of the output, whatever the layout of that is when it has planned convolutions. A
    factor that stands in this order is read in one piece.
    """
    _, rows, columns = factor.shape
    return factor.contiguous().as_strided(factor.shape, (rows * columns, columns, 1))


def _sums_in_full(x: Tensor) -> bool:
    """Whether products of x are sums in fp32 or wider; a fold would round every part of a half-precision one."""
    return x.dtype.itemsize >= 4 and not torch.is_autocast_enabled(x.device.type)


def _is_dense_plane(geometry: LayerGeometry) -> bool:
    """Whether a convolution over a plane is computed at every position, with no more padding than it reaches."""
    if (
        isinstance(geometry.padding, str)
        or len(geometry.kernel_size) != 2
        or any(step != 1 for step in geometry.stride)
    ):
        return False
    reach = zip(geometry.kernel_size, geometry.dilation, geometry.padding, strict=True)
    return all(p <= d * (k - 1) for k, d, p in reach)


def _conv_by_fold(x: Tensor, down: Tensor, geometry: LayerGeometry) -> Tensor:
    """A convolution with few output channels, as one product and a sum.

    Every position computes what it gives to each position within the kernel's reach, R numbers for each, and those are
    added up where they land: the sum over the kernel comes after the product over channels. Library kernels for
    grouped convolutions, one group per row, are slow where so few channels go out.
    """
    kernel = down.reshape(len(down), -1, geometry.in_features, *geometry.kernel_size).flip(-1, -2)
    sent = torch.bmm(kernel.flatten(3).transpose(2, 3).flatten(1, 2), x.flatten(2))
    reach = [d * (k - 1) for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
    padding = [int(p) for p in geometry.padding]
    size = [n + 2 * p - r for n, p, r in zip(x.shape[2:], padding, reach, strict=True)]
    margin = [r - p for p, r in zip(padding, reach, strict=True)]
    landed = functional.fold(sent, tuple(size), geometry.kernel_size, geometry.dilation, tuple(margin))
    return landed.flatten(2)
