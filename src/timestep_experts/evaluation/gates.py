"""What the routers learned: gates over modules and timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timestep_experts.data import EncodedDataset
from timestep_experts.evaluation.loss import LossSettings, evaluation_batches
from timestep_experts.mixture import Mixture
from timestep_experts.models import Family


@dataclass(frozen=True)
class GateMap:
    """Gates of one context scale, base gate included; where it has a gate per rank, over all of them.

    Args:
        scale: its name.
        modules: names, in the network's order.
        t: middle of each bin.
        mean: ``mean[module][bin]``, over samples and ranks.
        spread: standard deviation over both, the same shape.
    """

    scale: str
    modules: tuple[str, ...]
    t: tuple[float, ...]
    mean: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[float, ...], ...]


def gate_map(family: Family, mixture: Mixture, dataset: EncodedDataset, settings: LossSettings) -> list[GateMap]:
    """Route validation samples through every bin of t and keep the gates, one map per context scale."""
    columns: list[dict[str, list[tuple[float, float]]]] = []
    middles = []
    with mixture.using("route"):
        for interval, batches in evaluation_batches(family, dataset, settings):
            middles.append((interval.lo + interval.hi) / 2)
            with mixture.recorded_gates() as log:
                family.denoise(batches[0].samples(dataset, family))
            widths = [mixture.spec.router.num_gates(scale.rank) for scale in mixture.spec.gated_scales]
            columns.append({name: _moments(calls[-1], widths) for name, calls in log.items()})
    modules = tuple(name for name in mixture.layers if name in columns[0])
    maps = []
    for index, scale in enumerate(mixture.spec.gated_scales):
        mean = tuple(tuple(c[name][index][0] + scale.constant_gate for c in columns) for name in modules)
        spread = tuple(tuple(c[name][index][1] for c in columns) for name in modules)
        maps.append(GateMap(scale.name, modules, tuple(middles), mean, spread))
    return maps


def _moments(gates: Tensor, widths: Sequence[int]) -> list[tuple[float, float]]:
    """Mean and standard deviation of the gates of each scale."""
    return [(float(own.mean()), float(own.std(correction=0))) for own in torch.split(gates, list(widths), -1)]
