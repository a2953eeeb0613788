"""A trained mixture on a diffusers pipeline."""

from timestep_experts.inference.attach import attach, detach
from timestep_experts.inference.reencode import Reencoder
from timestep_experts.inference.sample import SampleSettings, sample

__all__ = ["Reencoder", "SampleSettings", "attach", "detach", "sample"]
