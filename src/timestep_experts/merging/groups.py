"""Groups of tensors that share their weights, as one vector of numbers that a search can move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from timestep_experts.errors import UserError
from timestep_experts.merging.search import Weights
from timestep_experts.merging.settings import MergeSettings

OTHERS = "others"
"""The group of tensors that no pattern matches."""


@dataclass(frozen=True)
class WeightGroups:
    """N weights for each group of tensors; the vector holds the groups' weights one after another.

    Args:
        num_experts: N.
        groups: names in the vector's order; `OTHERS` is last, where some tensor is in no group.
        patterns: a regular expression that a tensor's full name must match, to its group; the first that matches wins.
    """

    num_experts: int
    groups: tuple[str, ...]
    patterns: Mapping[str, str]

    @classmethod
    def of(cls, num_experts: int, names: Iterable[str], patterns: Mapping[str, str]) -> WeightGroups:
        """The groups of a model's tensors.

        Raises:
            UserError: a pattern decides no tensor, is no regular expression, or takes the name of `OTHERS`.
        """
        if OTHERS in patterns.values():
            raise UserError(f"groups: the name {OTHERS!r} is that of the tensors that no pattern matches")
        order = tuple(dict.fromkeys(patterns.values()))
        marks = {pattern: (float(order.index(group)),) for pattern, group in patterns.items()}
        chosen = MergeSettings((-1.0,), block_weights=marks).weights_by_tensor(names)
        has_others = any(mark == (-1.0,) for mark in chosen.values())
        return cls(num_experts, (*order, OTHERS) if has_others or not order else order, dict(patterns))

    def __len__(self) -> int:
        return self.num_experts * len(self.groups)

    def labels(self) -> tuple[str, ...]:
        """A name for each number of the vector: ``w0``, or ``<group> w0`` where there are several groups."""
        several = len(self.groups) > 1
        return tuple(f"{group} w{i}" if several else f"w{i}" for group in self.groups for i in range(self.num_experts))

    def everywhere(self, weights: Weights) -> Weights:
        """The vector that gives every group the same N weights."""
        return weights * len(self.groups)

    def settings(self, vector: Weights) -> MergeSettings:
        """The linear merge that a vector stands for; weights that no tensor has are 0."""
        n = self.num_experts
        by_group = {group: vector[n * k : n * (k + 1)] for k, group in enumerate(self.groups)}
        blocks = {pattern: by_group[group] for pattern, group in self.patterns.items()}
        return MergeSettings(by_group.get(OTHERS, (0.0,) * n), block_weights=blocks)
