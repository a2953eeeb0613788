"""What differs between base models, one file per family, behind one protocol."""

from timestep_experts.models.family import Conditioning, Family
from timestep_experts.models.stable_diffusion import StableDiffusion

__all__ = ["Conditioning", "Family", "StableDiffusion"]
