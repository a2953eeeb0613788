"""The experts of a method: their form, the layers that carry them, and the mixture on a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from timestep_experts.config import (
    DecoupleConfig,
    DistillConfig,
    ExpertsConfig,
    FosterConfig,
    MethodConfig,
    Recipe,
    RouterConfig,
    ScaleConfig,
)
from timestep_experts.errors import UserError
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, RouterForm, Scale
from timestep_experts.models import Family

_MOST_RANKS, _REPORTED = 16, 8


def build_spec(method: FosterConfig | DistillConfig, num_train_timesteps: int) -> MixtureSpec:
    """The form of the mixture.

    Contexts that are fostered jointly have a base gate of 1, for experts that grew up together fit only each other. All
    others have 0.
    """
    experts = method.experts
    is_joint = isinstance(method, FosterConfig) and method.schedule == "joint"
    scales = tuple(
        _scale(scale, num_train_timesteps, gated=gated, base_gate=float(gated and is_joint))
        for scale, gated in zip(experts.scales, experts.are_gated, strict=True)
    )
    return MixtureSpec(scales, _router_form(experts.router, num_train_timesteps), experts.dropout)


def _router_form(config: RouterConfig, num_train_timesteps: int) -> RouterForm:
    intervals = None
    if config.intervals is not None:
        intervals = Partition.uniform(config.intervals, num_train_timesteps)
    elif config.boundaries is not None:
        intervals = _partition("recipe.method.experts.router.boundaries", config.boundaries, num_train_timesteps)
    return RouterForm(
        config.gates, config.inputs, config.features, config.positions, config.knots, intervals, config.unit_rms
    )


def _scale(config: ScaleConfig, num_train_timesteps: int, *, gated: bool, base_gate: float) -> Scale:
    if config.boundaries is None:
        partition = Partition.uniform(config.num_experts, num_train_timesteps)
    else:
        where = f"recipe.method.experts.scales: the boundaries of {config.label}"
        partition = _partition(where, config.boundaries, num_train_timesteps)
    alpha = config.lora_alpha or config.rank
    return Scale(config.label, partition, config.rank, alpha, gated, base_gate)


def _partition(where: str, boundaries: Sequence[float], num_train_timesteps: int) -> Partition:
    partition = Partition(tuple(boundaries))
    if partition.num_train_timesteps != num_train_timesteps:
        raise UserError(
            f"{where} end at {partition.num_train_timesteps:g}; this base model has {num_train_timesteps} timesteps"
        )
    return partition


def build_decoupled_partition(config: DecoupleConfig, num_train_timesteps: int) -> Partition:
    """The ranges of full copies.

    Raises:
        UserError: they do not end at the base's T.
    """
    if config.boundaries is None:
        return Partition.uniform(config.num_ranges, num_train_timesteps)
    return _partition("recipe.method.boundaries", config.boundaries, num_train_timesteps)


def build_partition(method: MethodConfig, num_train_timesteps: int) -> Partition:
    """The finest intervals that a method trains: the ranges of its copies, or the strata of its scales.

    Raises:
        UserError: they do not end at the base's T.
    """
    if isinstance(method, DecoupleConfig):
        return build_decoupled_partition(method, num_train_timesteps)
    return build_spec(method, num_train_timesteps).strata


def build_reported_partition(recipe: Recipe, num_train_timesteps: int) -> Partition:
    """The intervals by which all rows of a run are reported, and merges are weighed: those of the main variant.

    One interval alone would not tell what happens at which noise level, so eighths stand for it.
    """
    own = build_partition(recipe.method, num_train_timesteps)
    return own if len(own) > 1 else Partition.uniform(_REPORTED, num_train_timesteps)


def build_targets(
    experts: ExpertsConfig, denoisers: Mapping[str, nn.Module], text_encoders: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, tuple[str, ...] | str]]:
    """The networks that carry experts, and which of their modules do.

    Raises:
        UserError: text encoders are to carry experts where there are none.
    """
    networks, targets = dict(denoisers), dict.fromkeys(denoisers, experts.target_modules)
    if experts.text_target_modules is None:
        return networks, targets
    if not text_encoders:
        raise UserError("recipe.method.experts.text_target_modules: this base model has no text encoder")
    wanted = experts.text_target_modules
    chosen = wanted if isinstance(wanted, Mapping) else dict.fromkeys(text_encoders, wanted)
    for name in chosen:
        if name not in text_encoders:
            known = ", ".join(text_encoders)
            raise UserError(
                f"recipe.method.experts.text_target_modules: no text encoder {name!r}; this base has {known}"
            )
        networks[name] = text_encoders[name]
    return networks, {**targets, **chosen}


def require_sensible_ranks(mixture: Mixture) -> None:
    """Refuse a rank that can only be a mistake; above the width of a layer it is of no use already.

    Raises:
        UserError: the rank of a scale is more than `_MOST_RANKS` times the width of every layer.
    """
    widths = [min(layer.geometry.fan_in, layer.geometry.out_features) for layer in mixture.layers.values()]
    for scale in mixture.spec.scales:
        if scale.rank > _MOST_RANKS * max(widths):
            raise UserError(
                f"recipe.method.experts.scales: the rank {scale.rank} of {scale.name} is far above the width of every"
                f" layer; the widest has {max(widths)}"
            )


def build_mixture(recipe: Recipe, method: FosterConfig | DistillConfig, family: Family) -> Mixture:
    """Attach a method's experts to the family's denoisers and, where it says so, to its text encoders."""
    experts = method.experts
    spec = build_spec(method, family.noise.num_train_timesteps)
    networks, targets = build_targets(experts, family.denoisers, family.text_encoders)
    mixture = Mixture.attach(
        networks,
        spec,
        targets,
        owned=family.owned_intervals,
        seed=recipe.seed,
    )
    require_sensible_ranks(mixture)
    if experts.text_dropout is not None:
        for name in networks.keys() & family.text_encoders.keys():
            mixture.set_dropout(experts.text_dropout, name)
    return mixture
