"""Stage 1, fostering: experts of every scale learn their own intervals (TSM, eq. 3-4, and two ways beyond it)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import Literal

import torch

from timestep_experts.errors import UserError
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, Scale
from timestep_experts.training.assemble import RouterRates, router_param_groups
from timestep_experts.training.batches import BatchPlan
from timestep_experts.training.param_group import NetworkRates, ParamGroup
from timestep_experts.training.stage import Denoising, Stage

FosterMethod = Literal["independent", "coarse_to_fine", "joint"]


@dataclass(frozen=True)
class FosterSettings:
    """How experts are fostered.

    Args:
        method: ``independent`` (the paper): every scale by itself, each expert sees its own samples only.
            ``coarse_to_fine``: the scales in turn from coarse to fine, each starting as a copy of the coarser one; the
            steps are shared out among them. ``joint``: all scales at once, ungated, so that coarse experts learn what
            timesteps share and fine ones the rest.
        train_batch_size: samples per stratum and step: per expert, where scales are fostered by themselves.
        learning_rates: per scale, one number per expert.
        max_train_steps: per scale, one number per expert.
        caption_dropout: probability of the empty caption.
        seed: of samples.
        by_network: what is otherwise on some networks.
        router: at which rates the routers learn together with the experts, which needs ``joint``; ``None``: they do
            not, and every gate is 1.
    """

    method: FosterMethod
    train_batch_size: int
    learning_rates: Mapping[str, Sequence[float]]
    max_train_steps: Mapping[str, Sequence[int]]
    caption_dropout: float
    seed: int
    by_network: NetworkRates = field(default_factory=NetworkRates)
    router: RouterRates | None = None


def foster(mixture: Mixture, settings: FosterSettings) -> list[Stage]:
    """The stages that foster a mixture, to be run in this order.

    Raises:
        UserError: ``coarse_to_fine`` on scales that do not nest or differ in rank, or routers that are to learn with
            experts that are not fostered jointly.
    """
    scales = sorted(mixture.spec.scales, key=lambda scale: len(scale.partition))
    if settings.method == "joint":
        stage = _stage(mixture, settings, scales, mixture.spec.strata, "foster-joint", 1.0)
        return [stage if settings.router is None else _with_routers(stage, mixture, settings.router)]
    if settings.router is not None:
        raise UserError(f"routers can learn together with experts that are fostered jointly, not {settings.method}")
    if settings.method == "independent":
        return [_stage(mixture, settings, [s], s.partition, f"foster-{s.name}", 1.0) for s in reversed(scales)]
    _require_nesting(scales)
    stages = []
    for coarser, scale in zip([None, *scales[:-1]], scales, strict=True):
        stage = _stage(mixture, settings, [scale], mixture.spec.strata, f"foster-{scale.name}", 1 / len(scales))
        stages.append(stage if coarser is None else replace(stage, prepare=_copier(mixture, coarser, scale)))
    return stages


def _stage(
    mixture: Mixture, settings: FosterSettings, scales: Sequence[Scale], strata: Partition, name: str, share: float
) -> Stage:
    names = [scale.name for scale in scales]
    return Stage(
        name=name,
        param_groups=[
            param_group for scale in scales for param_group in _experts(mixture, settings, scale, strata, share)
        ],
        plan=BatchPlan(settings.seed, name, strata, settings.train_batch_size, settings.caption_dropout),
        objective=Denoising(settings.train_batch_size),
        set_mode=lambda: mixture.foster(*names),
    )


def _with_routers(stage: Stage, mixture: Mixture, rates: RouterRates) -> Stage:
    """The same stage with all gates, which learn as long as the experts do."""

    def set_mode() -> None:
        mixture.mode = "route"

    routers = router_param_groups(mixture, rates, stage.num_steps, 1 / len(mixture.spec.strata))
    return replace(stage, param_groups=[*stage.param_groups, *routers], set_mode=set_mode)


def _experts(
    mixture: Mixture, settings: FosterSettings, scale: Scale, strata: Partition, share: float
) -> list[ParamGroup]:
    groups = settings.by_network.group(mixture.networks)
    param_groups = []
    for (index, interval), (own, networks) in product(enumerate(scale.partition.intervals), groups.items()):
        factor, weight_decay = own
        owned = sum(interval.covers(stratum) for stratum in strata.intervals)
        param_groups.append(
            ParamGroup(
                name=f"{scale.name}.{index}" + (f".{'+'.join(networks)}" if len(groups) > 1 else ""),
                slices=list(mixture.expert(scale.name, index, networks)),
                learning_rate=settings.learning_rates[scale.name][index] * factor,
                max_train_steps=max(1, round(settings.max_train_steps[scale.name][index] * share)),
                gradient_share=1 / owned,
                weight_decay=weight_decay,
                interval=interval,
            )
        )
    return param_groups


def _require_nesting(scales: Sequence[Scale]) -> None:
    for coarse, fine in pairwise(scales):
        if coarse.rank != fine.rank or coarse.alpha != fine.alpha or not coarse.partition.coarsens(fine.partition):
            raise UserError(
                f"coarse_to_fine copies scale {coarse.name!r} into {fine.name!r}: they need the same rank and alpha,"
                f" and nested intervals; got rank {coarse.rank} and {fine.rank}, alpha {coarse.alpha:g} and"
                f" {fine.alpha:g}, intervals {coarse.partition} and {fine.partition}"
            )


def _copier(mixture: Mixture, coarse: Scale, fine: Scale) -> Callable[[], None]:
    owners = torch.tensor([coarse.partition.index_of(interval.lo) for interval in fine.partition.intervals])

    @torch.no_grad()
    def copy() -> None:
        for source, target in zip(mixture.stacks(coarse.name), mixture.stacks(fine.name), strict=True):
            places = source.place_of(owners[target.first :][: len(target.A)].to(source.A.device))
            target.A.copy_(source.A[places])
            target.B.copy_(source.B[places])

    return copy
