"""The router of one layer: ``G(z, t) = F(z) + E(t)`` (TSM, eq. 6-7)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

RouterInput = Literal["z_and_t", "z", "t"]
GateGranularity = Literal["sample", "token"]


class Router(nn.Module):
    """Gates of the context experts, a raw sum without softmax or sigmoid: they may be negative.

    ``F`` is a linear map of the layer's input z, ``E`` a table over t. Both start at zero, so an untrained router
    leaves every gate at its resting value. Everything is computed in fp32, autocast or not.

    Args:
        in_features: k, the features of z.
        num_gated: m, the number of gated scales.
        num_train_timesteps: T.
        inputs: what the router sees; the other term does not exist.
        granularity: one gate per sample (z is averaged over positions) or one per position ("token").
        num_knots: ``None`` is the paper's table, one row per whole timestep, row floor(t). A number makes a smooth
            table: that many rows at even distances, at least 2, interpolated linearly.
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
            raise ValueError(f"a smooth router table needs at least 2 knots; got {num_knots}")
        self.num_train_timesteps = num_train_timesteps
        self.granularity = granularity
        self.is_smooth = num_knots is not None
        rows = num_train_timesteps if num_knots is None else num_knots
        self.F = nn.Parameter(torch.zeros(num_gated, in_features)) if inputs != "t" else None
        self.bias = nn.Parameter(torch.zeros(num_gated)) if inputs != "t" else None
        self.E = nn.Parameter(torch.zeros(rows, num_gated)) if inputs != "z" else None

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Gates around their resting values.

        Args:
            z: the layer's input, ``(B, N, k)``.
            t: ``(B,)`` timesteps.

        Returns:
            ``(B, m)``, or ``(B, N, m)`` with a gate per position; fp32.
        """
        with torch.autocast(z.device.type, enabled=False):
            gates = z.new_zeros((), dtype=torch.float32)
            if self.F is not None and self.bias is not None:
                pooled = z.float() if self.granularity == "token" else z.float().mean(1)
                gates = gates + functional.linear(pooled, self.F.float(), self.bias.float())
            if self.E is not None:
                timed = self._look_up(self.E.float(), t)
                gates = gates + (timed[:, None] if self.granularity == "token" else timed)
            return gates

    def _look_up(self, table: Tensor, t: Tensor) -> Tensor:
        if not self.is_smooth:
            return table.index_select(0, t.floor().long().clamp(0, self.num_train_timesteps - 1))
        last = len(table) - 1
        place = (t.float() / self.num_train_timesteps * last).clamp(0, last)
        below = place.floor().long().clamp(max=last - 1)
        return torch.lerp(table.index_select(0, below), table.index_select(0, below + 1), (place - below)[:, None])
