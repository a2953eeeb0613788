"""The three steps of a layer's experts, as few and as large products as they can be.

A forward pass gathers each row's experts by index, joins those of all active scales along the rank and applies them
with two products. It has no Python branch on t, and the host reads no value back.

Shapes: B rows of a batch, N positions, k input and d output features, r rank, R the sum of joined ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from timestep_experts.mixture.experts import ExpertStack
from timestep_experts.mixture.fast.products import MAX_TERMS, add_planes, add_rows, project_planes, project_rows
from timestep_experts.mixture.geometry import LayerGeometry
from timestep_experts.mixture.kernels import Experts, Strength
from timestep_experts.mixture.plain import mean_pool

_PLAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Tricks:
    """What the fast arithmetic does beyond the plain one; each can be left out.

    Args:
        shared_experts: where all rows use one expert, it is gathered once and not once per row.
        joined_scales: all scales are one product along the joined rank, so the input is read once and the output
            written once.
        overwrite: without gradients, the base layer's own output is added to in place.
        conv_by_fold: a convolution by every row's own experts is a product and a sum (`_conv_by_fold`).
        terms: while compiling, products of small rank are written term by term, so that they fuse with their
            surroundings.
    """

    shared_experts: bool = True
    joined_scales: bool = True
    overwrite: bool = True
    conv_by_fold: bool = True
    terms: bool = True


@dataclass(frozen=True)
class FastKernels:
    """See `mixture.kernels.Kernels`.

    Args:
        tricks: what is done beyond the plain arithmetic.
    """

    tricks: Tricks = Tricks()

    def gather(
        self, stacks: Sequence[ExpertStack], expert_index: Sequence[Tensor], num_rows: int, groups: int
    ) -> Experts:
        """Choose every row's experts, and join A of all scales.

        In a grouped convolution each group's rows of B see their own share of every scale's rank, so ranks are joined
        group by group.
        """
        if not self.tricks.shared_experts:
            expert_index = [index.expand(num_rows) for index in expert_index]
        chosen = [self._choose(stack, index) for stack, index in zip(stacks, expert_index, strict=True)]
        downs, ups = [down for down, _ in chosen], [up for _, up in chosen]
        if len(downs) == 1 or not self.tricks.joined_scales:
            return Experts(downs, ups)
        grouped = _same_length([down.view(len(down), groups, -1, down.shape[-1]) for down in downs])
        return Experts([torch.cat(grouped, 2).flatten(1, 2)], ups)

    def _choose(self, stack: ExpertStack, expert_index: Tensor) -> tuple[Tensor, Tensor]:
        if self.tricks.shared_experts and len(stack.A) == 1:
            return stack.A, stack.B
        return stack.of(expert_index)

    def read(
        self, x: Tensor, router_input: Tensor | None, experts: Experts, geometry: LayerGeometry
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Compute A x of all scales, and the average of the router's input."""
        project = project_planes if geometry.is_convolution else project_rows
        hidden = [
            project(x, down.to(x.dtype), geometry, max_terms=self._max_terms, by_fold=self.tricks.conv_by_fold)
            for down in experts.downs
        ]
        return hidden, None if router_input is None else mean_pool(router_input, geometry.is_convolution)

    @property
    def _max_terms(self) -> int:
        """The largest rank of products that are written term by term now."""
        return MAX_TERMS if self.tricks.terms and torch.compiler.is_compiling() else 0

    def add(
        self,
        base_layer: nn.Module,
        y: Tensor,
        hidden: Sequence[Tensor],
        experts: Experts,
        strengths: Sequence[Strength],
        geometry: LayerGeometry,
    ) -> Tensor:
        """Add the experts of all scales to the base layer's output; joined scales are one product of rank R."""
        in_place = self.tricks.overwrite and _may_be_overwritten(base_layer)
        if len(hidden) == 1:
            return self._add_joined(y, hidden[0], experts.ups, strengths, geometry, in_place)
        for h, up, strength in zip(hidden, experts.ups, strengths, strict=True):
            y = self._add_joined(y, h, [up], [strength], geometry, in_place)
        return y

    def _add_joined(
        self,
        y: Tensor,
        hidden: Tensor,
        ups: Sequence[Tensor],
        strengths: Sequence[Strength],
        geometry: LayerGeometry,
        in_place: bool,
    ) -> Tensor:
        if all(isinstance(strength, float) for strength in strengths):
            ups = [up if strength == 1 else up * strength for up, strength in zip(ups, strengths, strict=True)]
        else:  # on the features, so that samples of one t share B whatever their gates are
            spread = _over_ranks(strengths, ups).to(hidden.dtype)
            spread = spread if geometry.groups == 1 else spread.repeat(1, 1, geometry.groups)
            hidden = hidden * (spread.transpose(1, 2) if geometry.is_convolution else spread)
        ups = _same_length([up.to(hidden.dtype) for up in ups])  # under autocast the first product has chosen the dtype
        add = add_planes if geometry.is_convolution else add_rows
        return add(y, hidden, ups, geometry, max_terms=self._max_terms, in_place=in_place)


def _may_be_overwritten(base_layer: nn.Module) -> bool:
    """Whether the base layer's output is a new tensor that nobody else has seen, autograd included."""
    is_plain = type(base_layer) in _PLAIN_LAYERS and "forward" not in vars(base_layer)  # offloading, caches replace it
    is_seen = len(base_layer._forward_hooks) > 1 or torch_modules._global_forward_hooks  # one hook is the experts' own
    return is_plain and not is_seen and not torch.is_grad_enabled()


def _over_ranks(strengths: Sequence[Strength], ups: Sequence[Tensor]) -> Tensor:
    """Repeat strengths over the ranks of one group, ``(B, 1, R)`` or ``(B, N, R)``."""
    shape = next(strength.shape for strength in strengths if isinstance(strength, Tensor))
    parts = [
        s[..., None] if isinstance(s, Tensor) else up.new_full((1,), s) for s, up in zip(strengths, ups, strict=True)
    ]
    return torch.cat([part.expand(*shape, up.shape[-1]) for part, up in zip(parts, ups, strict=True)], -1)


def _same_length(tensors: Sequence[Tensor]) -> list[Tensor]:
    longest = max(len(tensor) for tensor in tensors)
    return [tensor.expand(longest, *tensor.shape[1:]) for tensor in tensors]
