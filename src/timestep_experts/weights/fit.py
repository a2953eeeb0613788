"""Whether fine-tuned copies fit the base that they are said to come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from timestep_experts.errors import UserError
from timestep_experts.formats.checkpoints import Checkpoint
from timestep_experts.formats.model_folders import find_weights
from timestep_experts.merging.live import check_shapes
from timestep_experts.models import Family, resolve_model
from timestep_experts.weights.inputs import MergeInput, check_descent, hash_inputs


def require_fit(
    family: Family, source: str, experts: Sequence[Checkpoint]
) -> tuple[MergeInput | None, list[MergeInput]]:
    """See that copies have the base's names and shapes and, as far as they say so, were trained from it.

    Args:
        family: the loaded base.
        source: where it was loaded from, as the user named it.
        experts: the copies.

    Returns:
        The base's own file, hashed (``None`` for a base of the hub, which is not checked), and the copies, hashed.

    Raises:
        UserError: the base has several denoisers, or a copy does not fit it.
    """
    live = one_denoiser(family).state_dict()
    for expert in experts:
        check_shapes(live, {name: info.shape for name, info in expert.tensors.items()}, str(expert.path))
    hashed, base = hash_inputs(experts), _hash_base(source, family) if experts else None
    if base is not None:
        check_descent(base.sha256, str(base.weights.path), hashed)
    return base, hashed


def one_denoiser(family: Family) -> nn.Module:
    """The denoiser whose weights change.

    Raises:
        UserError: there are several.
    """
    if len(family.denoisers) > 1:
        raise UserError(f"{family.source} has {len(family.denoisers)} denoisers; only a base with one is supported")
    return family.denoiser


def _hash_base(source: str, family: Family) -> MergeInput | None:
    path = Path(resolve_model(source))
    if not path.exists():
        return None
    return hash_inputs([Checkpoint(find_weights(path, None if path.is_file() else family.denoiser_name))])[0]
