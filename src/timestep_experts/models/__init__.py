"""What differs between base models, one file per family, behind one protocol."""

from timestep_experts.models.ddpm import DDPM
from timestep_experts.models.family import Conditioning, Family
from timestep_experts.models.noise import DiscreteNoise, FlowNoise, NoiseProcess
from timestep_experts.models.stable_diffusion import StableDiffusion
from timestep_experts.models.stable_diffusion_xl import StableDiffusionXL

__all__ = [
    "DDPM",
    "Conditioning",
    "DiscreteNoise",
    "Family",
    "FlowNoise",
    "NoiseProcess",
    "StableDiffusion",
    "StableDiffusionXL",
]
