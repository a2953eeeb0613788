"""Stage 2, assembling: the experts are frozen, only the routers learn (TSM, eq. 5-7)."""

from __future__ import annotations

from dataclasses import dataclass, field

from timestep_experts.errors import UserError
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture
from timestep_experts.training.batches import BatchPlan
from timestep_experts.training.param_group import NetworkRates, ParamGroup
from timestep_experts.training.stage import Denoising, Stage

ROUTER = "router."
"""How the names of param groups begin that hold parts of routers."""


@dataclass(frozen=True)
class RouterRates:
    """At which rates routers learn.

    Args:
        learning_rate: of F.
        table_learning_rate: of E; each of its rows is met by few samples, so it needs far more.
        by_network: what is otherwise on some networks.
        weight_decay: of all others; ``None`` is the optimiser's.
        max_grad_norm: of F, and of E, on their own; ``None`` is the optimiser's.
    """

    learning_rate: float
    table_learning_rate: float
    by_network: NetworkRates = field(default_factory=NetworkRates)
    weight_decay: float | None = None
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class AssembleSettings:
    """How routers learn over frozen experts.

    Args:
        rates: of their parts.
        max_train_steps: optimiser steps.
        train_batch_size: samples per step, t over the whole range.
        caption_dropout: probability of the empty caption.
        seed: of samples.
    """

    rates: RouterRates
    max_train_steps: int
    train_batch_size: int
    caption_dropout: float
    seed: int


def assemble(mixture: Mixture, settings: AssembleSettings) -> Stage:
    """The stage that assembles a fostered mixture.

    Raises:
        UserError: no scale is gated, so there is nothing to learn.
    """
    param_groups = router_param_groups(mixture, settings.rates, settings.max_train_steps)
    whole = Partition.uniform(1, mixture.spec.num_train_timesteps)

    def set_mode() -> None:
        mixture.mode = "route"

    plan = BatchPlan(settings.seed, "assemble", whole, settings.train_batch_size, settings.caption_dropout)
    return Stage("assemble", param_groups, plan, Denoising(settings.train_batch_size), set_mode)


def router_param_groups(
    mixture: Mixture, rates: RouterRates, max_train_steps: int, gradient_share: float = 1.0
) -> list[ParamGroup]:
    """The routers' maps F and tables E, each at its own rate.

    Args:
        mixture: whose.
        rates: of both.
        max_train_steps: their budget.
        gradient_share: see `ParamGroup`.

    Raises:
        UserError: no scale is gated, so there is nothing to learn.
    """
    groups = rates.by_network.group(mixture.networks)
    param_groups = []
    for (factor, weight_decay), networks in groups.items():
        maps, tables = mixture.router_parameters(networks)
        ending = f".{'+'.join(networks)}" if len(groups) > 1 else ""
        kinds = [(f"{ROUTER}F", maps, rates.learning_rate), (f"{ROUTER}E", tables, rates.table_learning_rate)]
        param_groups += [
            ParamGroup(
                name + ending,
                [(parameter, None) for parameter in parameters],
                rate * factor,
                max_train_steps,
                gradient_share,
                weight_decay=rates.weight_decay if weight_decay is None else weight_decay,
                max_grad_norm=rates.max_grad_norm,
            )
            for name, parameters, rate in kinds
            if parameters
        ]
    if not param_groups:
        raise UserError("there are no routers to train: no scale of this mixture is a gated context")
    return param_groups
