"""Which modules of a network carry experts, by PEFT's patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import nn

from timestep_experts.errors import UserError
from timestep_experts.mixture.carriers import named_layers
from timestep_experts.mixture.geometry import LayerGeometry
from timestep_experts.mixture.hooks import layers_in

Networks: TypeAlias = nn.Module | Mapping[str, nn.Module]
"""One network, or several by name: a denoiser and its text encoders, or two denoisers that share out the timesteps."""

Targets: TypeAlias = str | Sequence[str]
"""PEFT's patterns, see `match_targets`."""

_NUM_CLOSEST = 5
_LEAST_LIKENESS = 0.5


def match_targets(model: nn.Module, target_modules: Targets) -> list[str]:
    """Names of the modules that patterns select, by PEFT's rules; layers that already carry experts never match.

    Args:
        model: any network.
        target_modules: a regular expression that a full name must match, or a list of which an element must equal the
            name or its last dotted parts.
    """
    carriers = {id(layer.base_layer) for layer in layers_in(model)}
    free = [name for name, module in named_layers(model).items() if id(module) not in carriers]
    if isinstance(target_modules, str):
        return [name for name in free if re.fullmatch(target_modules, name)]
    endings = tuple(f".{target}" for target in target_modules)
    return [name for name in free if name in target_modules or name.endswith(endings)]


def match_all(network: nn.Module, targets: Targets) -> list[str]:
    """`match_targets`, with every reason to refuse.

    Raises:
        UserError: the network carries a mixture already, or patterns match nothing, with the closest there are.
    """
    if any(layers_in(network)):
        raise UserError(f"this {type(network).__name__} already carries a mixture of experts; detach it first")
    names = match_targets(network, targets)
    patterns = [targets] if isinstance(targets, str) else list(targets)
    unmatched = patterns if not names else [] if isinstance(targets, str) else _unmatched(names, patterns)
    if names and not unmatched:
        return names
    lines = [f"\n  {p!r}; the closest are: {', '.join(_closest(network, p))}" for p in unmatched]
    if isinstance(targets, str):
        like = match_targets(network, _closest(network, targets.rpartition(".")[2])[:1])
        lines = [f"\n  as a regular expression it must match a whole name, such as {name}" for name in like[:1]]
    raise UserError(f"target modules {unmatched} match no layer of this {type(network).__name__}" + "".join(lines))


def _unmatched(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [p for p in patterns if not any(name == p or name.endswith(f".{p}") for name in names)]


def _closest(network: nn.Module, pattern: str) -> list[str]:
    """Endings of the names of layers that can carry experts, the likest to a pattern first, in as many parts."""
    names = [name for name, module in named_layers(network).items() if _can_carry(module)]
    endings = dict.fromkeys(_ending(name, pattern.count(".") + 1) for name in names)
    likeness = {ending: difflib.SequenceMatcher(None, pattern, ending).ratio() for ending in endings}
    ranked = sorted(endings, key=lambda ending: -likeness[ending])[:_NUM_CLOSEST]
    return [ending for ending in ranked if likeness[ending] >= _LEAST_LIKENESS] or ranked


def _can_carry(module: nn.Module) -> bool:
    try:
        LayerGeometry.of(module, "")
    except ValueError:
        return False
    return True


def _ending(name: str, depth: int) -> str:
    """The last parts of a name, and as many more as it takes not to begin with a number."""
    parts = name.split(".")
    while depth < len(parts) and parts[-depth].isdigit():
        depth += 1
    return ".".join(parts[-depth:])
