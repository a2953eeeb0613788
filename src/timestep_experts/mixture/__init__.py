"""TimeStep Master on any network: low-rank experts per timestep interval, switched or routed. Needs torch only.

Read `plain` for the formula, `layer` for where it stands, and `mixture` for how it gets there. The folder
`fast` computes the same and explains nothing of the method.
"""

from timestep_experts.mixture.fast.fusing import fuse, is_fused, unfuse
from timestep_experts.mixture.layer import MixtureLayer
from timestep_experts.mixture.mixture import Mixture, bound_to
from timestep_experts.mixture.parameters import ParameterCount
from timestep_experts.mixture.plain import PlainKernels
from timestep_experts.mixture.router import Router
from timestep_experts.mixture.router_form import RouterForm
from timestep_experts.mixture.spec import MixtureSpec, Scale, asymmetric
from timestep_experts.mixture.state import MODES, Mode
from timestep_experts.mixture.targets import match_targets
from timestep_experts.mixture.timesteps import TimestepInput, timestep_input_of

__all__ = [
    "MODES",
    "Mixture",
    "MixtureLayer",
    "MixtureSpec",
    "Mode",
    "ParameterCount",
    "PlainKernels",
    "Router",
    "RouterForm",
    "Scale",
    "TimestepInput",
    "asymmetric",
    "bound_to",
    "fuse",
    "is_fused",
    "match_targets",
    "timestep_input_of",
    "unfuse",
]
