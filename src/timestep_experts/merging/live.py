"""A network whose tensors are a merge, rewritten in place: what a search measures without writing a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.merging.methods import merge_linear


class LiveMerge:
    """The tensors of a network as ``theta + sum_i w_i tau_i`` (DeMe, arXiv 2410.06664, eq. 8), for any w at any time.

    Weights of 0 are the base and one weight of 1 is that expert, to the bit; leaving the context restores the base to
    the byte. Tensors in which no expert differs from the base, and integers, are left alone.

    Held besides the network: a copy of its base and every expert, each tensor once, where ``experts`` has them.

    Args:
        live: the network's own tensors by name, as ``state_dict`` gives them.
        experts: each expert's tensors, by the same names.

    Raises:
        UserError: names or shapes differ.
    """

    def __init__(self, live: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> None:
        for number, expert in enumerate(experts):
            check_shapes(live, {name: tuple(value.shape) for name, value in expert.items()}, f"expert {number}")
        changed = [name for name in live if _is_changed(live[name], [expert[name] for expert in experts])]
        self._live = {name: live[name] for name in changed}
        self._base = {name: live[name].detach().to("cpu", copy=True) for name in changed}
        self._experts = [{name: expert[name] for name in changed} for expert in experts]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are rewritten."""
        return tuple(self._live)

    @torch.no_grad()
    def set(self, weights: Mapping[str, Sequence[float]]) -> None:
        """Rewrite the network.

        Args:
            weights: of every tensor of `names`: one number per expert.
        """
        for name, tensor in self._live.items():
            tensor.copy_(merge_linear(self._base[name], (expert[name] for expert in self._experts), weights[name]))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the network its base back, to the byte."""
        for name, tensor in self._live.items():
            tensor.copy_(self._base[name])

    def __enter__(self) -> LiveMerge:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def check_shapes(base: Mapping[str, Tensor], expert: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse an expert of another model.

    Args:
        base: its tensors.
        expert: the expert's shapes.
        where: the expert is, for the error.

    Raises:
        UserError: naming the first tensor that is missing, unknown, or of another shape.
    """
    if lacking := sorted(base.keys() - expert.keys()):
        raise UserError(f"{where} lacks {lacking[0]}, which the base has ({len(lacking)} such tensors)")
    if strange := sorted(expert.keys() - base.keys()):
        raise UserError(f"{where} has {strange[0]}, which the base lacks ({len(strange)} such tensors)")
    for name, tensor in base.items():
        if tuple(expert[name]) != tuple(tensor.shape):
            shapes = f"{tuple(expert[name])}; the base's is {tuple(tensor.shape)}"
            raise UserError(f"{where}: {name} has shape {shapes}")


def _is_changed(base: Tensor, experts: Sequence[Tensor]) -> bool:
    held = base.detach().cpu()
    kinds = [torch.promote_types(held.dtype, expert.dtype) for expert in experts]
    pairs = zip(experts, kinds, strict=True)
    return base.is_floating_point() and any(not torch.equal(expert.to(kind), held.to(kind)) for expert, kind in pairs)
