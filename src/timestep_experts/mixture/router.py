"""The router of one layer: ``G(z, t) = F(z) + E(t)`` (TSM, eq. 6-7), and what routers of many layers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

RouterInput = Literal["z_and_t", "z", "t"]
GateGranularity = Literal["sample", "token"]


@dataclass(frozen=True)
class TablePlace:
    """Where timesteps are in the tables E of all routers.

    Args:
        below: ``(B,)`` int64, the row of each timestep, or the knot below it.
        beyond: ``(B,)`` fp32 in [0, 1], how far towards the next knot; ``None`` for tables with a row per timestep.
    """

    below: Tensor
    beyond: Tensor | None = None

    @classmethod
    def of(cls, t: Tensor, num_train_timesteps: int, num_knots: int | None = None) -> TablePlace:
        """Of timesteps ``(B,)``; those outside [0, T) are at the nearest row."""
        if num_knots is None:
            return cls(t.floor().long().clamp(0, num_train_timesteps - 1))
        last = num_knots - 1
        place = (t.float() / num_train_timesteps * last).clamp(0, last)
        below = place.floor().long().clamp(max=last - 1)
        return cls(below, place - below)

    def map(self, change: Callable[[Tensor], Tensor]) -> TablePlace:
        """Both tensors changed in the same way."""
        return TablePlace(change(self.below), None if self.beyond is None else change(self.beyond))

    def read(self, table: Tensor) -> Tensor:
        """The rows ``(B, m)`` of a table, interpolated between knots."""
        rows = table.index_select(0, self.below)
        if self.beyond is None:
            return rows
        return torch.lerp(rows, table.index_select(0, self.below + 1), self.beyond[:, None])


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
        self.granularity = granularity
        rows = num_train_timesteps if num_knots is None else num_knots
        self.F = nn.Parameter(torch.zeros(num_gated, in_features)) if inputs != "t" else None
        self.bias = nn.Parameter(torch.zeros(num_gated)) if inputs != "t" else None
        self.E = nn.Parameter(torch.zeros(rows, num_gated)) if inputs != "z" else None

    def forward(self, z: Tensor, place: TablePlace) -> Tensor:
        """Gates around their resting values.

        Args:
            z: the layer's input, ``(B, k)`` averaged over positions, or ``(B, N, k)`` for a gate per position.
            place: of the samples' timesteps, or of one for all.

        Returns:
            ``(B, m)``, or ``(B, N, m)`` with a gate per position; fp32.
        """
        with torch.autocast(z.device.type, enabled=False):
            mapped = None
            if self.F is not None and self.bias is not None:
                mapped = functional.linear(z.float(), self.F.float(), self.bias.float())
            if self.E is None:
                assert mapped is not None
                return mapped
            timed = place.read(self.E.float())
            timed = timed[:, None] if self.granularity == "token" else timed
            return timed if mapped is None else mapped + timed


class Averages:
    """Averages over positions of layers' inputs, ``(B, k)`` fp32, kept for as long as the input itself is.

    Queries, keys and values read one tensor, and all cross-attentions read the prompt's: each is averaged once, a
    prompt once for all steps. What is overwritten in place is averaged anew.
    """

    def __init__(self) -> None:
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[Averages], tuple[()]]:
        """Nothing of it is worth copying or storing."""
        return Averages, ()

    def clear(self) -> None:
        """Forget all, so that no gradient flows through what an earlier forward pass computed."""
        self._kept.clear()

    def of(self, x: Tensor, *, channels_first: bool) -> Tensor:
        """See `average_positions`."""
        # the compiler shares equal sums itself, and a captured graph must contain its own
        is_recorded = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        if is_recorded or x.is_inference():  # which does not count what is done in place
            return average_positions(x, channels_first=channels_first)
        now = (x._version, channels_first, x.requires_grad and torch.is_grad_enabled())
        kept = self._kept.get(x)  # type: ignore[no-untyped-call]
        if kept is None or kept[0] != now:
            kept = now, average_positions(x, channels_first=channels_first)
            self._kept[x] = kept
        average: Tensor = kept[1]
        return average


def average_positions(x: Tensor, *, channels_first: bool) -> Tensor:
    """The average of a layer's input over all axes but the first and the channels', ``(B, k)`` fp32; always a new one.

    Args:
        x: ``(B, ..., k)``, or ``(B, k, *space)`` with channels first.
        channels_first: as convolutions have them.
    """
    positions = tuple(range(2, x.dim()) if channels_first else range(1, x.dim() - 1))
    # a copy where there are no positions: what is kept must not keep its key alive
    return x.mean(positions, dtype=torch.float32) if positions else x.to(torch.float32, copy=True)
