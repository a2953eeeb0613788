"""A routed bundle whose gates depend on t alone, as a bundle that switches: a plain LoRA for every interval."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.formats import Bundle
from timestep_experts.intervals import Partition
from timestep_experts.mixture import MixtureSpec, Router, Scale
from timestep_experts.mixture.router_form import TimestepIndex


@dataclass(frozen=True)
class Switchable:
    """What was made.

    Args:
        bundle: every scale has an ungated expert per interval of the partition: A of the expert that owned it, with its
            rows times the gates there, and its B.
        partition: the intervals.
        error: how far gates are from those of the routed bundle, over all timesteps and layers: the root mean square
            of the difference, relative to that of the gates. It is 0 where gates are constant on the intervals.
    """

    bundle: Bundle
    partition: Partition
    error: float


def are_gates_folded(bundle: Bundle) -> bool:
    """Whether the gates of a bundle go into a merged LoRA: it routes, and they depend on t alone."""
    spec = bundle.spec
    return bundle.mode == "route" and bool(spec.gated_scales) and spec.router.depends_on_t_alone


def to_switchable(bundle: Bundle, partition: Partition | None = None) -> Switchable:
    """Fold gates into the experts, interval by interval.

    On each interval the gates have the value of its middle. Where the routers' table is constant on intervals already,
    this loses nothing.

    Args:
        bundle: of routers that hear t alone.
        partition: the intervals on which gates become constant, refined by those of the scales; ``None``: those of the
            routers' table.

    Raises:
        UserError: gates depend on more than t, or the partition is missing for a table that is not constant on any.
    """
    spec = bundle.spec
    if not spec.gated_scales:
        raise UserError("this bundle has no gates: none of its scales is a context")
    if not spec.router.depends_on_t_alone:
        raise UserError("gates can be folded into experts where routers hear t alone; these hear the input too")
    wanted = partition or spec.router.intervals
    if wanted is None:
        raise UserError("the gates change with every timestep; name the intervals on which they are to be constant")
    pieces = reduce(Partition.refine, (scale.partition for scale in spec.scales), wanted)
    middles = torch.tensor([(interval.lo + interval.hi) / 2 for interval in pieces.intervals])
    scales = tuple(Scale(s.name, pieces, s.rank, s.alpha) for s in spec.scales)
    tensors: dict[str, Tensor] = {}
    wrong = right = 0.0
    for path in bundle.target_modules:
        gates = _gates_of(bundle, path, middles)
        for scale in spec.scales:
            owners = scale.partition.index_of(middles)
            down, up = (bundle.tensors[f"{path}.experts.{scale.name}.{part}"] for part in "AB")
            if len(down) != len(scale.partition):
                raise UserError(
                    f"{path} has {len(down)} of the {len(scale.partition)} experts of scale {scale.name}: where several"
                    " denoisers share out the timesteps, gates cannot be folded"
                )
            gate = gates.get(scale.name, torch.ones(1, 1)).to(down)[:, :, None]
            tensors[f"{path}.experts.{scale.name}.A"] = gate * down[owners]
            tensors[f"{path}.experts.{scale.name}.B"] = up[owners].clone()
        every = torch.arange(spec.num_train_timesteps) + 0.5
        for name, exact in _gates_of(bundle, path, every).items():
            wrong += float((exact - gates[name][pieces.index_of(every)]).square().mean())
            right += float(exact.square().mean())
    switched = replace(bundle, spec=MixtureSpec(scales, dropout=spec.dropout), tensors=tensors, mode="switch")
    return Switchable(switched, pieces, (wrong / right) ** 0.5 if right else 0.0)


def _gates_of(bundle: Bundle, path: str, t: Tensor) -> dict[str, Tensor]:
    """The gates of every context at timesteps ``(n,)``: ``(n, r)`` or ``(n, 1)``."""
    spec = bundle.spec
    router = Router(0, spec.gated_scales, spec.num_train_timesteps, spec.router)  # it has no map, so any width serves
    router.load_state_dict({"E": bundle.tensors[f"{path}.router.E"].float()})
    with torch.no_grad():
        gates = router.gates_at(TimestepIndex.of(t, spec.router, spec.num_train_timesteps))
    return {scale.name: own for scale, own in zip(spec.gated_scales, gates, strict=True)}
