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
from timestep_experts.mixture.router import Router, gate_table
from timestep_experts.mixture.router_form import TimestepIndex

MOST_JOINED_ROWS = 64
"""Tables of more rows are read one by one: joining them would copy more than it saves."""
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
        joined_tables: the tables of all routers are read as one, where they have few rows.
        terms: while compiling, products of small rank are written term by term, so that they fuse with their
            surroundings.
    """

    shared_experts: bool = True
    joined_scales: bool = True
    overwrite: bool = True
    conv_by_fold: bool = True
    joined_tables: bool = True
    terms: bool = True


@dataclass(frozen=True)
class FastKernels:
    """See `mixture.kernels.Kernels`.

    Args:
        tricks: what is done beyond the plain arithmetic.
    """

    tricks: Tricks = Tricks()

    def read_tables(self, routers: Sequence[Router], index: TimestepIndex) -> Sequence[Tensor]:
        """Join small tables and read them once: a network has hundreds, of a few numbers each."""
        tables: list[Tensor] = [table for router in routers for table in router.tables]
        is_small = len(tables[0]) <= MOST_JOINED_ROWS
        if not self.tricks.joined_tables or not is_small or len({table.device for table in tables}) > 1:
            return [index.read(router.table().to(index.row.device)) for router in routers]
        base = torch.cat([router.base for router in routers])
        joined = gate_table(torch.cat(tables, 1), base, routers[0].form)
        return torch.split(index.read(joined.to(index.row.device)), [table.shape[1] for table in tables], 1)

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

    def by_scale(self, hidden: Sequence[Tensor], experts: Experts, geometry: LayerGeometry) -> Sequence[Tensor]:
        """Views of the joined ranks; in a grouped convolution, each scale has its share of every group."""
        rows = [h.transpose(1, 2) for h in hidden] if geometry.is_convolution else hidden
        if len(rows) == len(experts.ups):
            return rows
        (joined,) = rows
        by_group = torch.unflatten(joined, 2, (geometry.groups, -1))
        parts = torch.split(by_group, [up.shape[-1] for up in experts.ups], 3)
        return [part.flatten(2) for part in parts]

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
            spread = _over_ranks(strengths, ups, geometry.groups).to(hidden.dtype)
            hidden = hidden * (spread.transpose(1, 2) if geometry.is_convolution else spread)
        ups = _same_length([up.to(hidden.dtype) for up in ups])  # under autocast the first product has chosen the dtype
        add = add_planes if geometry.is_convolution else add_rows
        return add(y, hidden, ups, geometry, max_terms=self._max_terms, in_place=in_place)


def _may_be_overwritten(base_layer: nn.Module) -> bool:
    """Whether the base layer's output is a new tensor that nobody else has seen, autograd included."""
    is_plain = type(base_layer) in _PLAIN_LAYERS and "forward" not in vars(base_layer)  # offloading, caches replace it
    is_seen = len(base_layer._forward_hooks) > 1 or torch_modules._global_forward_hooks  # one hook is the experts' own
    return is_plain and not is_seen and not torch.is_grad_enabled()


def _over_ranks(strengths: Sequence[Strength], ups: Sequence[Tensor], groups: int) -> Tensor:
    """Strengths of all joined ranks, group by group: ``(B, 1, R)`` or ``(B, N, R)``."""
    if len(strengths) == 1 and isinstance(strengths[0], Tensor):
        return strengths[0]
    shape = next(strength.shape[:2] for strength in strengths if isinstance(strength, Tensor))
    parts = []
    for strength, up in zip(strengths, ups, strict=True):
        own = strength if isinstance(strength, Tensor) else up.new_full((1, 1, 1), strength)
        by_group = torch.unflatten(own, 2, (groups, -1)) if own.shape[2] > 1 else own[..., None]
        parts.append(by_group.expand(*shape, groups, up.shape[-1]))
    return torch.cat(parts, 3).flatten(2)


def _same_length(tensors: Sequence[Tensor]) -> list[Tensor]:
    longest = max(len(tensor) for tensor in tensors)
    return [tensor.expand(longest, *tensor.shape[1:]) for tensor in tensors]
