"""What the routers learned: gates over modules and timesteps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from timestep_experts.data import EncodedDataset
from timestep_experts.evaluation.loss import LossSettings, evaluation_batches
from timestep_experts.mixture import Mixture
from timestep_experts.models import Family


@dataclass(frozen=True)
class GateMap:
    """Gates of one context scale, base gate included.

    Args:
        scale: its name.
        modules: names, in the network's order.
        t: middle of each bin.
        mean: ``mean[module][bin]``, over samples.
        spread: standard deviation over samples, the same shape.
    """

    scale: str
    modules: tuple[str, ...]
    t: tuple[float, ...]
    mean: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[float, ...], ...]


def gate_map(family: Family, mixture: Mixture, dataset: EncodedDataset, settings: LossSettings) -> list[GateMap]:
    """Route validation samples through every bin of t and keep the gates, one map per context scale."""
    columns: list[dict[str, tuple[list[float], list[float]]]] = []
    middles = []
    with mixture.using("route"):
        for interval, batches in evaluation_batches(family, dataset, settings):
            middles.append((interval.lo + interval.hi) / 2)
            with mixture.recorded_gates() as log:
                family.denoise(batches[0].samples(dataset, family))
            columns.append({name: _moments(calls) for name, calls in log.items()})
    modules = tuple(name for name in mixture.layers if name in columns[0])
    maps = []
    for index, scale in enumerate(mixture.spec.gated_scales):
        mean = tuple(tuple(c[name][0][index] + scale.constant_gate for c in columns) for name in modules)
        spread = tuple(tuple(c[name][1][index] for c in columns) for name in modules)
        maps.append(GateMap(scale.name, modules, tuple(middles), mean, spread))
    return maps


def _moments(calls: list[Tensor]) -> tuple[list[float], list[float]]:
    gates = calls[-1].flatten(0, -2)
    return gates.mean(0).tolist(), gates.std(0, correction=0).tolist()
