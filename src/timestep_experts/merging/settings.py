"""How a whole model is merged: one method, and the weights that each tensor's experts have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.merging.methods import Method, mask_seed, merge_dare, merge_linear, merge_ties

METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class MergeSettings:
    """How to merge a model's tensors.

    Args:
        weights: one per expert, finite; may leave [0, 1].
        method: ``linear``, ``ties`` or ``dare``.
        density: share of each task vector that TIES and DARE keep, in (0, 1]; 1 for ``linear``.
        block_weights: a regular expression that a tensor's full name must match, to the weights of all experts on such
            tensors; the first that matches wins, and tensors that none matches have ``weights``.
        seed: of DARE's masks; 0 for the others.

    Raises:
        UserError: a value is outside what is said here.
    """

    weights: tuple[float, ...]
    method: Method = "linear"
    density: float = 1.0
    block_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown merge method {self.method!r}: allowed are {', '.join(METHODS)}")
        if not 0 < self.density <= 1:
            raise UserError(f"density must be above 0 and at most 1; got {self.density}")
        if self.method == "linear" and self.density != 1:
            raise UserError(f"density {self.density} has no meaning for method linear; use ties or dare")
        if self.method != "dare" and self.seed != 0:
            raise UserError(f"seed {self.seed} has no meaning for method {self.method}; only dare draws numbers")
        if not self.weights:
            raise UserError("merging needs the weight of at least one expert")
        _check_weights(self.weights, len(self.weights), "weights")
        for pattern, weights in self.block_weights.items():
            _check_weights(weights, len(self.weights), f"block_weights[{pattern!r}]")
            _compiled(pattern)

    def weights_by_tensor(self, names: Iterable[str]) -> dict[str, tuple[float, ...]]:
        """The weights of every tensor.

        Args:
            names: of all the model's tensors.

        Raises:
            UserError: a pattern decides no tensor: none matches, or earlier patterns took all that do.
        """
        patterns = {pattern: _compiled(pattern) for pattern in self.block_weights}
        unused: set[str | None] = set(patterns)
        chosen = {}
        for name in names:
            first = next((pattern for pattern, compiled in patterns.items() if compiled.fullmatch(name)), None)
            unused.discard(first)
            chosen[name] = self.weights if first is None else self.block_weights[first]
        if unused:
            idle = ", ".join(repr(pattern) for pattern in patterns if pattern in unused)
            raise UserError(
                f"block_weights: {idle} decides no tensor; a pattern must match a whole name that no earlier one"
                f" matches, such as {next(iter(chosen), '')!r}"
            )
        return chosen


def merge_tensor(
    name: str,
    base: Tensor,
    experts: Iterable[Tensor],
    weights: Sequence[float],
    settings: MergeSettings,
    expert_keys: Sequence[str],
) -> Tensor:
    """Merge one tensor as settings say.

    Args:
        name: the tensor's, which seeds DARE's masks.
        base: any shape.
        experts: one tensor each.
        weights: one each, from `MergeSettings.weights_by_tensor`.
        settings: of the whole merge.
        expert_keys: what identifies each expert in DARE's seeds.

    Raises:
        UserError: the counts or shapes differ, or tensors are complex.
    """
    if settings.method == "linear":
        return merge_linear(base, experts, weights)
    if settings.method == "ties":
        return merge_ties(base, experts, weights, settings.density)
    seeds = [mask_seed(settings.seed, name, key) for key in expert_keys]
    return merge_dare(base, experts, weights, settings.density, seeds)


def _check_weights(weights: Sequence[float], count: int, place: str) -> None:
    if len(weights) != count:
        raise UserError(f"{place} has {len(weights)} numbers; there are {count} experts")
    for weight in weights:
        if not math.isfinite(weight):
            raise UserError(f"{place} must be finite numbers; got {weight}")


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"block_weights: {pattern!r} is no regular expression: {error}") from error
