"""What routers look like, as plain values: what a gate speaks to, what it hears, and how it depends on t."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.intervals import Partition

Gates = Literal["expert", "rank"]
RouterInput = Literal["z_and_t", "z", "t"]
RouterFeatures = Literal["input_mean", "latent_rms"]
GatePositions = Literal["sample", "token"]


@dataclass(frozen=True)
class RouterForm:
    """The form of the routers. The defaults are those of the paper.

    Args:
        gates: what a gate speaks to. ``expert``: a context scale has one gate (TSM, eq. 5). ``rank``: it has one gate
            for each of its ranks, as if each were an expert of its own: ``B (g * (A x))``.
        inputs: what gates depend on; the term of whatever is missing does not exist.
        features: what stands for z. ``input_mean``: the layer's input, averaged over positions (TSM, eq. 6).
            ``latent_rms``: the root mean square over positions of the gated scales' latents A x, divided by its mean
            over ranks, minus 1. An average of inputs is nearly 0 where their mean is; this is not.
        positions: ``sample``: a gate is one number per sample. ``token``: it is one number per position.
        knots: ``None`` gives the paper's table over t, with a row for every whole timestep. A number gives that many
            rows at even distances from 0 to T, and timesteps as numbers give rows there; between rows the table is
            linear.
        intervals: makes the table constant on each interval of a partition, instead of knots.
        unit_rms: the table with its base gates is divided by its root mean square over its rows, gate by gate. The
            size of a gate and that of its row of B have the same effect; this takes one of the two away.

    Raises:
        UserError: knots are fewer than two, do not ascend from 0, or are given together with intervals; or a choice
            would have no effect: one about a table that does not exist, or about a z that is not heard.
    """

    gates: Gates = "expert"
    inputs: RouterInput = "z_and_t"
    features: RouterFeatures = "input_mean"
    positions: GatePositions = "sample"
    knots: int | tuple[float, ...] | None = None
    intervals: Partition | None = None
    unit_rms: bool = False

    def __post_init__(self) -> None:
        if self.knots is not None and self.intervals is not None:
            raise UserError("a router's table has either knots or intervals, not both")
        if isinstance(self.knots, tuple):
            ascend = len(self.knots) > 1 and self.knots[0] == 0 and all(lo < hi for lo, hi in pairwise(self.knots))
        else:
            ascend = self.knots is None or self.knots > 1
        if not ascend:
            raise UserError(f"a router's table needs at least 2 knots, ascending from 0 to T; got {self.knots}")
        if not self.has_table and (self.unit_rms or self.knots is not None or self.intervals is not None):
            raise UserError(
                "knots, intervals and unit_rms are of the table over t; a router that hears z alone has none"
            )
        if not self.hears_input and self.features != "input_mean":
            raise UserError(f"features: {self.features} stands for z, which a router that hears t alone does not hear")

    @property
    def hears_input(self) -> bool:
        """Whether gates depend on z."""
        return self.inputs != "t"

    @property
    def has_table(self) -> bool:
        """Whether gates depend on t."""
        return self.inputs != "z"

    @property
    def depends_on_t_alone(self) -> bool:
        """Whether gates are known as soon as t is, so that experts times gates can stand in a weight."""
        return self.inputs == "t"

    @property
    def hears_latents(self) -> bool:
        """Whether z is made of the latents A x."""
        return self.hears_input and self.features == "latent_rms"

    def num_rows(self, num_train_timesteps: int) -> int:
        """The rows of the table."""
        if self.intervals is not None:
            return len(self.intervals)
        return num_train_timesteps if self.knots is None else len(self.places(num_train_timesteps))

    def places(self, num_train_timesteps: int) -> tuple[float, ...]:
        """The timesteps of the knots; empty where there are none."""
        if isinstance(self.knots, int):
            return tuple(num_train_timesteps * i / (self.knots - 1) for i in range(self.knots))
        return self.knots or ()

    def num_gates(self, rank: int) -> int:
        """The number of gates of a context scale of that rank."""
        return rank if self.gates == "rank" else 1

    def check(self, num_train_timesteps: int) -> None:
        """Compare the table with T.

        Raises:
            UserError: it has more knots than T + 1, or does not end at T.
        """
        places = self.places(num_train_timesteps)
        if len(places) > num_train_timesteps + 1 or (places and places[-1] != num_train_timesteps):
            raise UserError(f"a router's knots must be from 2 to T + 1 and end at T; got {self.knots}")
        if self.intervals is not None and self.intervals.num_train_timesteps != num_train_timesteps:
            raise UserError(
                f"a router's intervals end at {self.intervals.num_train_timesteps:g}, those of the scales at"
                f" {num_train_timesteps:g}"
            )


@dataclass(frozen=True)
class TimestepIndex:
    """Where timesteps are in the tables of all routers.

    Args:
        row: ``(B,)`` int64, the row of each timestep; in a table of knots, the knot below it.
        fraction: ``(B,)`` fp32 in [0, 1], how far each timestep is on its way to the next knot; ``None`` for tables
            without knots.
    """

    row: Tensor
    fraction: Tensor | None = None

    @classmethod
    def of(cls, t: Tensor, form: RouterForm, num_train_timesteps: int) -> TimestepIndex:
        """Find timesteps ``(B,)``; one outside [0, T) gets the nearest row."""
        if form.intervals is not None:
            return cls(form.intervals.index_of(t))
        if form.knots is None:
            return cls(t.floor().long().clamp(0, num_train_timesteps - 1))
        t = t.float()
        if isinstance(form.knots, int):
            last = form.knots - 1
            place = (t / num_train_timesteps * last).clamp(0, last)
        else:  # each piece counts as far as t has come in it; no numbers are sent to the device of t
            last = len(form.knots) - 1
            place = torch.stack([((t - lo) / (hi - lo)).clamp(0, 1) for lo, hi in pairwise(form.knots)]).sum(0)
        below = place.floor().long().clamp(max=last - 1)
        return cls(below, place - below)

    def read(self, table: Tensor) -> Tensor:
        """The rows ``(B, m)`` of a table, interpolated linearly between knots."""
        rows = table.index_select(0, self.row)
        if self.fraction is None:
            return rows
        return torch.lerp(rows, table.index_select(0, self.row + 1), self.fraction[:, None])
