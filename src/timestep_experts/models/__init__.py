"""What differs between base models, one file per family, behind one protocol."""

from timestep_experts.models.ddpm import DDPM
from timestep_experts.models.family import SECOND_DENOISERS, Conditioning, Denoised, Family, Samples
from timestep_experts.models.flux import Flux
from timestep_experts.models.meta_model import MetaModel, read_meta_model, read_network
from timestep_experts.models.noise import DiscreteNoise, FlowNoise, NoiseProcess
from timestep_experts.models.pixart import PixArt, PixArtSigma
from timestep_experts.models.quantization import Quantization
from timestep_experts.models.registry import BASE_ASSET, FAMILIES, load_family, resolve_model, sampling_options_of
from timestep_experts.models.stable_diffusion import StableDiffusion
from timestep_experts.models.stable_diffusion_3 import StableDiffusion3
from timestep_experts.models.stable_diffusion_xl import StableDiffusionXL
from timestep_experts.models.video_crafter import VideoCrafter
from timestep_experts.models.wan import Wan, owned_intervals

__all__ = [
    "BASE_ASSET",
    "DDPM",
    "FAMILIES",
    "SECOND_DENOISERS",
    "Conditioning",
    "Denoised",
    "DiscreteNoise",
    "Family",
    "FlowNoise",
    "Flux",
    "MetaModel",
    "NoiseProcess",
    "PixArt",
    "PixArtSigma",
    "Quantization",
    "Samples",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "VideoCrafter",
    "Wan",
    "load_family",
    "owned_intervals",
    "read_meta_model",
    "read_network",
    "resolve_model",
    "sampling_options_of",
]
