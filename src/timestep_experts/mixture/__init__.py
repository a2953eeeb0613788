"""TimeStep Master on any network: low-rank experts per timestep interval, switched or routed. Needs torch only."""

from timestep_experts.mixture.layer import MixtureLayer, Mode
from timestep_experts.mixture.mixture import MODES, Mixture, ParameterCount, bound_to
from timestep_experts.mixture.router import Router
from timestep_experts.mixture.spec import MixtureSpec, Scale, asymmetric
from timestep_experts.mixture.targets import match_targets

__all__ = [
    "MODES",
    "Mixture",
    "MixtureLayer",
    "MixtureSpec",
    "Mode",
    "ParameterCount",
    "Router",
    "Scale",
    "asymmetric",
    "bound_to",
    "match_targets",
]
