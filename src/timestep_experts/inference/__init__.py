"""A trained mixture on a diffusers pipeline."""

from timestep_experts.inference.attach import attach, detach
from timestep_experts.inference.cost import SamplingCost, counted
from timestep_experts.inference.ensemble import Ensemble, attach_ensemble, attach_projections
from timestep_experts.inference.reencode import Reencoder, reencoding
from timestep_experts.inference.sample import SampleSettings, sample
from timestep_experts.inference.video import write_mp4

__all__ = [
    "Ensemble",
    "Reencoder",
    "SampleSettings",
    "SamplingCost",
    "attach",
    "attach_ensemble",
    "attach_projections",
    "counted",
    "detach",
    "reencoding",
    "sample",
    "write_mp4",
]
