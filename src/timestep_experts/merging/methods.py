"""Ways to merge the same tensor of several experts.

All take the base's tensor and each expert's of the same shape, compute in fp32 (fp64 for an fp64 base), give the base's
dtype back, and keep the base's value of integers and booleans: counters are not trained. An expert of weight 0 has no
part in the result, whatever it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from timestep_experts.errors import UserError

Method: TypeAlias = Literal["linear", "ties", "dare"]

_BLOCK = 2**17
"""Elements worked on at a time: temporary tensors of a whole layer would be fresh pages of memory at every operation,
which takes longer than the arithmetic."""
_COARSE_BITS = 16


def task_vector(expert: Tensor, base: Tensor) -> Tensor:
    """How an expert differs from its base, in fp32 or, for an fp64 base, fp64 (DeMe, arXiv 2410.06664, tau_i).

    Args:
        expert: floating point, any shape.
        base: floating point, the same shape.

    Raises:
        UserError: the shapes differ, or a tensor is not of real floating point.
    """
    _check_expert(expert, base)
    dtype = _compute_dtype(base)
    return expert.to(dtype) - base.to(dtype)


def merge_linear(base: Tensor, experts: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of task vectors on the base, theta + sum_i w_i tau_i (DeMe, arXiv 2410.06664, eq. 8).

    Weights of 0 give the base to the bit, and one weight of 1 beside zeros gives that expert to the bit (rounded to the
    base's dtype). Where every expert equals the base, so does the result, but for the sign of
    zeros.

    Args:
        base: any shape.
        experts: one tensor each; read one after another, so an iterator needs no more memory than one of them.
        weights: one each; may leave [0, 1].

    Raises:
        UserError: the counts or shapes differ, or tensors are complex.
    """
    if not _is_merged(base):
        return base.clone()
    is_copy = [w for w in weights if w != 0] == [1.0]
    wide = base.flatten().to(_compute_dtype(base))
    moved: Tensor | None = None
    copied: Tensor | None = None
    for _, expert, weight in _active(base, experts, weights):
        if is_copy:
            copied = expert  # theta + (theta_i - theta) would round twice
        else:
            moved = _moved_on(moved, wide, expert.flatten(), weight)
    if moved is None:
        return (base if copied is None else copied).to(base.dtype, copy=True)
    return _added(base, wide, (moved[here] for here in _blocks(wide)))


def merge_ties(base: Tensor, experts: Iterable[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect signs and merge what agrees (TIES, arXiv 2306.01708).

    With trimmed task vectors tau_i and contributions c_i = w_i tau_i, the elected sign of an element is that of
    sum_i c_i (plus where it is 0). With A the experts whose c_i has it, the element moves by

        sum_{i in A} c_i * (sum_i |w_i|) / (sum_{i in A} |w_i|)

    With equal weights w = lambda / N this is the paper's lambda * mean over A. At density 1, an element whose
    contributions of non-zero weight all have the same sign, none being 0, is that of `merge_linear` to the bit.

    Args:
        base: any shape.
        experts: one tensor each; all are held at once.
        weights: one each; may leave [0, 1].
        density: share of each task vector's elements that is kept, in (0, 1]; see `trim`.

    Raises:
        UserError: the counts or shapes differ, tensors are complex, or the density is outside its range.
    """
    _check_density(density)
    active = [w for w in weights if w != 0]
    if not _is_merged(base) or (len(active) < 2 and density == 1):
        return merge_linear(base, experts, weights)
    wide = base.flatten().to(_compute_dtype(base))
    flat = [expert.flatten() for _, expert, _ in _active(base, experts, weights)]
    if not flat:
        return base.clone()
    least = [_least_kept(task_vector(expert, wide), density) for expert in flat]

    def moved(here: slice) -> Tensor:
        vectors = [_difference(expert, wide, here) for expert in flat]
        kept = [vector.mul_(vector.abs() >= limit) for vector, limit in zip(vectors, least, strict=True)]
        return _elected([vector.mul_(weight) for vector, weight in zip(kept, active, strict=True)], active)

    return _added(base, wide, (moved(here) for here in _blocks(wide)))


def merge_dare(
    base: Tensor, experts: Iterable[Tensor], weights: Sequence[float], density: float, seeds: Sequence[int]
) -> Tensor:
    """`merge_linear` of task vectors thinned at random and rescaled (DARE, arXiv 2311.03099).

    Each element is kept with probability ``density`` and divided by it, so the expectation is that of `merge_linear`;
    at density 1 the result is `merge_linear`'s to the bit.

    Args:
        base: any shape.
        experts: one tensor each; read one after another.
        weights: one each; may leave [0, 1].
        density: in (0, 1].
        seeds: of each expert's mask; see `mask_seed`.

    Raises:
        UserError: the counts or shapes differ, tensors are complex, or the density is outside its range.
    """
    _check_density(density)
    if len(seeds) != len(weights):
        raise UserError(f"DARE needs one seed per expert; got {len(seeds)} for {len(weights)} experts")
    if density == 1 or not _is_merged(base):
        return merge_linear(base, experts, weights)
    moved = torch.zeros_like(base, dtype=_compute_dtype(base))
    for index, expert, weight in _active(base, experts, weights):
        # On the CPU, so that the mask does not depend on the device.
        kept = torch.rand(base.shape, generator=torch.Generator().manual_seed(seeds[index])) < density
        moved += task_vector(expert, base).mul_(kept.to(base.device)).mul_(weight / density)
    if not any(weights):
        return base.clone()
    return (base.to(moved.dtype) + moved).to(base.dtype)


def trim(vector: Tensor, density: float) -> Tensor:
    """Zero all but the largest elements by magnitude; those equal to the smallest kept one are kept too.

    Args:
        vector: any shape.
        density: share to keep, in (0, 1]; rounded to a whole number of elements, at least one.
    """
    return vector * (vector.abs() >= _least_kept(vector, density))


def mask_seed(seed: int, name: str, expert: str) -> int:
    """A seed for one expert's mask on one tensor, independent of the order in which either is visited.

    Args:
        seed: of the whole merge.
        name: the tensor's.
        expert: what identifies the expert: the job takes the SHA-256 of its weights.
    """
    digest = hashlib.sha256(f"{seed}\n{name}\n{expert}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _least_kept(vector: Tensor, density: float) -> Tensor:
    """The smallest magnitude that `trim` keeps.

    Of fp32 by counting: magnitudes as bits are in the order of integers, so a histogram of their upper halves says in
    which narrow bin the one that is sought lies, and only that bin is searched.
    """
    size = vector.numel()
    if density == 1 or size == 0:
        return vector.new_zeros(())
    rank = size - max(1, round(density * size))  # among ascending magnitudes, from 0
    flat = vector.flatten()
    if vector.dtype != torch.float32:
        return flat.abs().kthvalue(rank + 1).values
    counts = torch.zeros(2**_COARSE_BITS, dtype=torch.int64, device=vector.device)
    for here in _blocks(flat):
        counts += torch.bincount(_upper_half(flat[here]), minlength=len(counts))
    below = counts.cumsum(0)
    coarse = int(torch.searchsorted(below, rank, right=True))
    within = torch.cat([part[_upper_half(part) == coarse] for part in (flat[here] for here in _blocks(flat))])
    return within.abs().kthvalue(rank - int(below[coarse] - counts[coarse]) + 1).values


def _upper_half(vector: Tensor) -> Tensor:
    """The upper half of the bits of fp32 magnitudes."""
    return vector.abs().view(torch.int32) >> (32 - _COARSE_BITS)


def _elected(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """What contributions move an element by, once those of the other sign than the elected one are left out."""
    positive = reduce(torch.add, parts) >= 0
    agreeing = [torch.where(positive, part > 0, part < 0) for part in parts]
    size = reduce(torch.add, [agrees * abs(w) for agrees, w in zip(agreeing, weights, strict=True)])
    total = reduce(torch.add, [torch.full_like(size, abs(w)) for w in weights])
    share = torch.where(size > 0, total / size, 0.0)
    return reduce(torch.add, [part * agrees for part, agrees in zip(parts, agreeing, strict=True)]) * share


def _moved_on(moved: Tensor | None, wide: Tensor, expert: Tensor, weight: float) -> Tensor:
    """``moved + weight * (expert - wide)`` in the place of ``moved``; all flat."""
    if moved is None:
        first = torch.empty_like(wide)
        for here in _blocks(wide):
            torch.mul(_difference(expert, wide, here), weight, out=first[here])
        return first
    for here in _blocks(wide):
        moved[here].add_(_difference(expert, wide, here).mul_(weight))
    return moved


def _difference(expert: Tensor, wide: Tensor, here: slice) -> Tensor:
    return expert[here].to(wide.dtype) - wide[here]


def _added(base: Tensor, wide: Tensor, moved: Iterable[Tensor]) -> Tensor:
    """``wide + moved`` in the base's shape and dtype; ``moved`` comes block by block."""
    merged = torch.empty_like(base, memory_format=torch.contiguous_format)
    flat = merged.view(-1)
    for here, part in zip(_blocks(wide), moved, strict=True):
        flat[here] = wide[here] + part
    return merged


def _blocks(flat: Tensor) -> list[slice]:
    """Slices that cover a flat tensor, each so small that what is computed of it stays in a processor's cache."""
    size = flat.numel() or 1
    block = _BLOCK if flat.device.type == "cpu" else size
    return [slice(start, start + block) for start in range(0, flat.numel(), block)]


def _active(base: Tensor, experts: Iterable[Tensor], weights: Sequence[float]) -> Iterator[tuple[int, Tensor, float]]:
    """Number, tensor and weight of the experts whose weight is not 0; all are checked."""
    count = 0
    for count, expert in enumerate(experts, 1):
        if count > len(weights):
            raise UserError(f"there are more experts than weights ({len(weights)})")
        _check_expert(expert, base)
        if weights[count - 1] != 0:
            yield count - 1, expert, weights[count - 1]
    if count < len(weights):
        raise UserError(f"there are {len(weights)} weights for {count} experts")


def _check_expert(expert: Tensor, base: Tensor) -> None:
    if expert.shape != base.shape:
        raise UserError(f"an expert's tensor has shape {tuple(expert.shape)}, its base's {tuple(base.shape)}")
    for tensor in (expert, base):
        if not tensor.is_floating_point():
            raise UserError(f"only floating-point tensors have task vectors; got {tensor.dtype}")


def _is_merged(base: Tensor) -> bool:
    if base.is_complex():
        raise UserError(f"complex tensors cannot be merged; got {base.dtype}")
    return base.is_floating_point()


def _compute_dtype(base: Tensor) -> torch.dtype:
    return torch.float64 if base.dtype == torch.float64 else torch.float32


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise UserError(f"density must be above 0 and at most 1; got {density}")
