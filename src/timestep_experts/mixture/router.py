"""The router of one layer: ``G(z, t) = F(z) + E(t)`` (TSM, eq. 6-7).

Shapes: B samples, N positions, k features of the layer's input z, m gated scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from timestep_experts.errors import UserError

RouterInput = Literal["z_and_t", "z", "t"]
GateGranularity = Literal["sample", "token"]


@dataclass(frozen=True)
class TimestepIndex:
    """Where timesteps are in the tables E of all routers.

    Args:
        row: ``(B,)`` int64, the row of each timestep; in a table of knots, the knot below it.
        fraction: ``(B,)`` fp32 in [0, 1], how far each timestep is on its way to the next knot; ``None`` for tables
            that have a row per timestep.
    """

    row: Tensor
    fraction: Tensor | None = None

    @classmethod
    def of(cls, t: Tensor, num_train_timesteps: int, num_knots: int | None = None) -> TimestepIndex:
        """Find timesteps ``(B,)``; one outside [0, T) gets the nearest row."""
        if num_knots is None:
            return cls(t.floor().long().clamp(0, num_train_timesteps - 1))
        last = num_knots - 1
        place = (t.float() / num_train_timesteps * last).clamp(0, last)
        below = place.floor().long().clamp(max=last - 1)
        return cls(below, place - below)

    def read(self, table: Tensor) -> Tensor:
        """The rows ``(B, m)`` of a table, interpolated linearly between knots."""
        rows = table.index_select(0, self.row)
        if self.fraction is None:
            return rows
        return torch.lerp(rows, table.index_select(0, self.row + 1), self.fraction[:, None])


class Router(nn.Module):
    """The gates of a layer's context experts: a raw sum without softmax or sigmoid, so they may be negative.

    F is a linear map of the layer's input z, and E is a table over t. Both start at zero, so an untrained router leaves
    every gate at its base value. Everything is computed in fp32, under autocast too.

    Args:
        in_features: k.
        num_gated: m.
        num_train_timesteps: T.
        inputs: what the router sees; the other term does not exist.
        granularity: one gate per sample (z is averaged over positions) or one per position ("token").
        num_knots: ``None`` gives the paper's table with one row per whole timestep, row floor(t). A number, at least 2,
            gives a smooth table: that many rows at even distances, interpolated linearly.

    Raises:
        UserError: a smooth table has fewer than 2 knots.
    """

    def __init__(
        self,
        in_features: int,
        num_gated: int,
        num_train_timesteps: int,
        inputs: RouterInput = "z_and_t",
        granularity: GateGranularity = "sample",
        num_knots: int | None = None,
    ) -> None:
        super().__init__()
        if num_knots is not None and num_knots < 2:
            raise UserError(f"a smooth router table needs at least 2 knots; got {num_knots}")
        self.granularity = granularity
        rows = num_train_timesteps if num_knots is None else num_knots
        self.F = nn.Parameter(torch.zeros(num_gated, in_features)) if inputs != "t" else None
        self.bias = nn.Parameter(torch.zeros(num_gated)) if inputs != "t" else None
        self.E = nn.Parameter(torch.zeros(rows, num_gated)) if inputs != "z" else None

    @staticmethod
    def shapes(
        num_gated: int, num_train_timesteps: int, inputs: RouterInput, num_knots: int | None
    ) -> dict[str, tuple[int | None, ...]]:
        """The shapes of a router's tensors by name, without making one; ``None`` stands for k."""
        rows = num_train_timesteps if num_knots is None else num_knots
        maps: dict[str, tuple[int | None, ...]] = {"F": (num_gated, None), "bias": (num_gated,)}
        return {**(maps if inputs != "t" else {}), **({"E": (rows, num_gated)} if inputs != "z" else {})}

    @property
    def tables(self) -> list[nn.Parameter]:
        """E, whose rows are met by few samples each."""
        return [] if self.E is None else [self.E]

    @property
    def maps(self) -> list[nn.Parameter]:
        """All parameters that are no tables."""
        return [parameter for parameter in self.parameters() if parameter is not self.E]

    def makers_of(self, gate: int) -> list[Tensor]:
        """Whatever of the parameters makes one of the gates."""
        rows = [part[gate] for part in (self.F, self.bias) if part is not None]
        return rows if self.E is None else [*rows, self.E[:, gate]]

    @property
    def needs_pooled_input(self) -> bool:
        """Whether z must be averaged over positions before it comes here."""
        return self.F is not None and self.granularity == "sample"

    def forward(self, z: Tensor, timestep: TimestepIndex) -> Tensor:
        """Gates, to be added to their base values.

        Args:
            z: the layer's input, ``(B, k)`` averaged over positions, or ``(B, N, k)`` for a gate per position.
            timestep: of every sample, or one for all of them.

        Returns:
            ``(B, m)``, or ``(B, N, m)`` with a gate per position; fp32. Gates that depend on one timestep for all
            samples and on nothing else come once, with B = 1.
        """
        # TSM, eq. 6-7:  G(z, t) = F z + b + E[t]
        with torch.autocast(z.device.type, enabled=False):
            mapped = None
            if self.F is not None and self.bias is not None:
                mapped = functional.linear(z.float(), self.F.float(), self.bias.float())
            if self.E is None:
                assert mapped is not None
                return mapped
            timed = timestep.read(self.E.float())
            timed = timed[:, None] if self.granularity == "token" else timed
            return timed if mapped is None else mapped + timed
