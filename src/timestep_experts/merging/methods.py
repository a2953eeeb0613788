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

Method: TypeAlias = Literal["linear", "ties", "dare"]


def task_vector(expert: Tensor, base: Tensor) -> Tensor:
    """How an expert differs from its base, in fp32 or, for an fp64 base, fp64 (DeMe, arXiv 2410.06664, tau_i).

    Args:
        expert: floating point, any shape.
        base: floating point, the same shape.

    Raises:
        ValueError: the shapes differ, or a tensor is not of real floating point.
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
        ValueError: the counts or shapes differ, or tensors are complex.
    """
    if not _is_merged(base):
        return base.clone()
    is_copy = [w for w in weights if w != 0] == [1.0]
    dtype = _compute_dtype(base)
    moved: Tensor | None = None
    for _, expert, weight in _active(base, experts, weights):
        # theta + (theta_i - theta) would round twice: a copy is the difference from nothing.
        part = expert if is_copy else task_vector(expert, base).mul_(weight)
        moved = part if moved is None else moved.add_(part)
    if moved is None or is_copy:
        return (base if moved is None else moved).to(base.dtype, copy=True)
    return (base.to(dtype) + moved).to(base.dtype)


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
        ValueError: the counts or shapes differ, tensors are complex, or the density is outside its range.
    """
    _check_density(density)
    active = [w for w in weights if w != 0]
    if not _is_merged(base) or (len(active) < 2 and density == 1):
        return merge_linear(base, experts, weights)
    parts = [trim(task_vector(expert, base), density) * w for _, expert, w in _active(base, experts, weights)]
    if not parts:
        return base.clone()
    elected = torch.where(reduce(torch.add, parts) >= 0, 1.0, -1.0)
    agreeing = [part.sign() == elected for part in parts]
    size = reduce(torch.add, [agrees * abs(w) for agrees, w in zip(agreeing, active, strict=True)])
    total = reduce(torch.add, [torch.full_like(size, abs(w)) for w in active])
    share = torch.where(size > 0, total / size, 0.0)
    moved = reduce(torch.add, [part * agrees for part, agrees in zip(parts, agreeing, strict=True)])
    return (base.to(moved.dtype) + moved * share).to(base.dtype)


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
        ValueError: the counts or shapes differ, tensors are complex, or the density is outside its range.
    """
    _check_density(density)
    if len(seeds) != len(weights):
        raise ValueError(f"DARE needs one seed per expert; got {len(seeds)} for {len(weights)} experts")
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
    size = vector.numel()
    if density == 1 or size == 0:
        return vector
    magnitudes = vector.abs()
    num_kept = max(1, round(density * size))
    threshold = magnitudes.flatten().kthvalue(size - num_kept + 1).values
    return vector * (magnitudes >= threshold)


def mask_seed(seed: int, name: str, expert: str) -> int:
    """A seed for one expert's mask on one tensor, independent of the order in which either is visited.

    Args:
        seed: of the whole merge.
        name: the tensor's.
        expert: what identifies the expert: the job takes the SHA-256 of its weights.
    """
    digest = hashlib.sha256(f"{seed}\n{name}\n{expert}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _active(base: Tensor, experts: Iterable[Tensor], weights: Sequence[float]) -> Iterator[tuple[int, Tensor, float]]:
    """Number, tensor and weight of the experts whose weight is not 0; all are checked."""
    count = 0
    for count, expert in enumerate(experts, 1):
        if count > len(weights):
            raise ValueError(f"there are more experts than weights ({len(weights)})")
        _check_expert(expert, base)
        if weights[count - 1] != 0:
            yield count - 1, expert, weights[count - 1]
    if count < len(weights):
        raise ValueError(f"there are {len(weights)} weights for {count} experts")


def _check_expert(expert: Tensor, base: Tensor) -> None:
    if expert.shape != base.shape:
        raise ValueError(f"an expert's tensor has shape {tuple(expert.shape)}, its base's {tuple(base.shape)}")
    for tensor in (expert, base):
        if not tensor.is_floating_point():
            raise ValueError(f"only floating-point tensors have task vectors; got {tensor.dtype}")


def _is_merged(base: Tensor) -> bool:
    if base.is_complex():
        raise ValueError(f"complex tensors cannot be merged; got {base.dtype}")
    return base.is_floating_point()


def _compute_dtype(base: Tensor) -> torch.dtype:
    return torch.float64 if base.dtype == torch.float64 else torch.float32


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1; got {density}")
