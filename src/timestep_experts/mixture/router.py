"""The router of one layer: ``G(z, t) = F(z) + E(t)`` (TSM, eq. 6-7), and its kin.

Shapes: B samples, N positions, m gates, h features that stand for the layer's input z: its k features, or one for
each rank of the gated scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from timestep_experts.mixture.router_form import RouterForm, TimestepIndex
from timestep_experts.mixture.spec import Scale


class Router(nn.Module):
    """The gates of a layer's context experts: a raw sum without softmax or sigmoid, so they may be negative.

    F is a linear map of z, and E is a table over t. Both start at zero, so an untrained router leaves every gate at its
    base value. Everything is computed in fp32, under autocast too.

    Args:
        in_features: k of the layer.
        gated: the context scales.
        num_train_timesteps: T.
        form: what the gates speak to and hear.
    """

    base: Tensor

    def __init__(self, in_features: int, gated: Sequence[Scale], num_train_timesteps: int, form: RouterForm) -> None:
        super().__init__()
        self.form = form
        self.widths = tuple(form.num_gates(scale.rank) for scale in gated)
        parts = {
            name: nn.Parameter(torch.zeros([in_features if size is None else size for size in shape]))
            for name, shape in self.shapes(gated, num_train_timesteps, form).items()
        }
        self.F, self.bias, self.E = (parts.get(name) for name in ("F", "bias", "E"))
        base = [torch.full((width,), s.base_gate) for s, width in zip(gated, self.widths, strict=True)]
        self.register_buffer("base", torch.cat(base), persistent=False)

    @staticmethod
    def shapes(gated: Sequence[Scale], num_train_timesteps: int, form: RouterForm) -> dict[str, tuple[int | None, ...]]:
        """The shapes of a router's tensors by name, without making one; ``None`` stands for k."""
        num_gates = sum(form.num_gates(scale.rank) for scale in gated)
        shapes: dict[str, tuple[int | None, ...]] = {}
        if form.hears_latents:  # their mean over ranks is 0 already, and a bias would be one more row of the table
            shapes["F"] = (num_gates, sum(scale.rank for scale in gated))
        elif form.hears_input:
            shapes |= {"F": (num_gates, None), "bias": (num_gates,)}
        return {**shapes, **({"E": (form.num_rows(num_train_timesteps), num_gates)} if form.has_table else {})}

    @property
    def tables(self) -> list[nn.Parameter]:
        """E, whose rows are met by few samples each."""
        return [] if self.E is None else [self.E]

    @property
    def maps(self) -> list[nn.Parameter]:
        """All parameters that are no tables."""
        return [parameter for parameter in self.parameters() if parameter is not self.E]

    def makers_of(self, scale: int) -> list[Tensor]:
        """Whatever of the parameters makes the gates of one context scale, by its place among them."""
        end = list(accumulate(self.widths))[scale]
        gates = slice(end - self.widths[scale], end)
        rows = [part[gates] for part in (self.F, self.bias) if part is not None]
        return rows if self.E is None else [*rows, self.E[:, gates]]

    @property
    def needs_pooled_input(self) -> bool:
        """Whether the layer's input must be averaged over positions for z."""
        form = self.form
        return form.hears_input and form.features == "input_mean" and form.positions == "sample"

    def table(self) -> Tensor:
        """What t adds to the base gates at each row, ``(rows, m)`` fp32."""
        assert self.E is not None
        return gate_table(self.E, self.base, self.form)

    def gates_at(self, index: TimestepIndex) -> list[Tensor]:
        """The gates of each context scale, base gates included, at timesteps ``(n,)``: ``(n, r)`` or ``(n, 1)`` each.

        They must depend on t alone.
        """
        assert self.form.depends_on_t_alone
        return list(torch.split(index.read(self.table()) + self.base, list(self.widths), 1))

    def forward(self, z: Tensor, timed: Tensor | None) -> Tensor:
        """Gates, to be added to their base values.

        Args:
            z: ``(B, h)``, or ``(B, N, h)`` for a gate per position.
            timed: what the table adds, ``(B, m)``, or ``(1, m)`` where all samples have one timestep; ``None`` where
                there is no table.

        Returns:
            ``(B, m)``, or ``(B, N, m)`` with a gate per position; fp32. Gates that depend on one timestep for all
            samples and on nothing else come once, with B = 1.
        """
        # TSM, eq. 6-7:  G(z, t) = F z + b + E[t]
        if timed is not None and self.form.positions == "token":
            timed = timed[:, None]
        if self.F is None:
            assert timed is not None
            return timed
        with torch.autocast(z.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            mapped = functional.linear(z.float(), self.F.float(), bias)
            return mapped if timed is None else mapped + timed


def gate_table(added: Tensor, base: Tensor, form: RouterForm) -> Tensor:
    """What t adds to base gates ``(m,)`` at each row, for E ``(rows, m)``; fp32."""
    with torch.autocast(added.device.type, enabled=False):
        if not form.unit_rms:
            return added.float()
        # S / rms(S), with S = base + E; what is added to the base is the rest
        gates = base + added.float()
        return gates * gates.square().mean(0).rsqrt() - base
