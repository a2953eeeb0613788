"""Stable-Diffusion-shaped models: UNet2DConditionModel, CLIP text encoder, AutoencoderKL, eps- or v-prediction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from timestep_experts.intervals import UniformDensity
from timestep_experts.models.family import Conditioning

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class StableDiffusion:
    """A `Family` around a `StableDiffusionPipeline`; its parts are frozen and in evaluation mode.

    Args:
        source: where it was loaded from.
        parts: the pipeline.
        noise: the forward process, read off the pipeline's scheduler.
    """

    source: str
    parts: StableDiffusionPipeline
    noise: DDPMScheduler

    @classmethod
    def load(cls, source: str, device: torch.device, dtype: torch.dtype = torch.float32) -> StableDiffusion:
        """Load a diffusers folder, a hub id, or a single ``.safetensors`` file.

        Raises:
            ValueError: it cannot be loaded, or predicts something else than noise or velocity.
        """
        load = StableDiffusionPipeline.from_pretrained
        if Path(source).suffix == ".safetensors":
            load = StableDiffusionPipeline.from_single_file
        try:
            pipeline = load(source, safety_checker=None, requires_safety_checker=False).to(device, dtype)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"cannot load a Stable Diffusion pipeline from {source!r}: {error}") from error
        return cls.around(pipeline, source)

    @classmethod
    def around(cls, pipeline: StableDiffusionPipeline, source: str = "a pipeline in memory") -> StableDiffusion:
        """Wrap a pipeline that is already loaded.

        Raises:
            ValueError: it predicts something else than noise or velocity.
        """
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        noise = DDPMScheduler.from_config(pipeline.scheduler.config)
        prediction = noise.config.prediction_type
        if prediction not in PREDICTIONS:
            raise ValueError(f"{source}: prediction_type is {prediction!r}; allowed are {', '.join(PREDICTIONS)}")
        return cls(source, pipeline, noise)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet."""
        unet: nn.Module = self.parts.unet
        return unet

    @property
    def density(self) -> UniformDensity:
        """Uniform in t."""
        return UniformDensity(self.num_train_timesteps)

    @property
    def has_integer_timesteps(self) -> bool:
        """Whole timesteps."""
        return True

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return int(self.noise.config.num_train_timesteps)

    @property
    def device(self) -> torch.device:
        """Of the UNet."""
        return next(self.denoiser.parameters()).device

    def encoder_fingerprint(self) -> str:
        """Hash of the autoencoder's and text encoder's weights and of the tokenizer's vocabulary."""
        digest = hashlib.sha256(repr(sorted(self.parts.tokenizer.get_vocab().items())).encode())
        for module in (self.parts.vae, self.parts.text_encoder):
            for name, value in module.state_dict().items():
                digest.update(name.encode())
                digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(repr((self.parts.vae.config.scaling_factor, self.parts.tokenizer.model_max_length)).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Scaled means of the autoencoder's posterior, fp32: the same picture always gives the same latents."""
        vae = self.parts.vae
        latents: Tensor = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mean
        return latents.float() * float(vae.config.scaling_factor)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The text encoder's last hidden states, ``(B, L, d)`` fp32, as `StableDiffusionPipeline` computes them."""
        features: Tensor = self.parts.encode_prompt(list(captions), self.device, 1, False)[0]
        return {"encoder_hidden_states": features.float()}

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``sqrt(a_t) latents + sqrt(1 - a_t) noise``."""
        noisy: Tensor = self.noise.add_noise(latents, noise, t)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, or the velocity ``sqrt(a_t) noise - sqrt(1 - a_t) latents``."""
        if self.noise.config.prediction_type == "epsilon":
            return noise
        velocity: Tensor = self.noise.get_velocity(latents, noise, t)
        return velocity

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output; inputs are cast to its dtype."""
        dtype = self.parts.unet.dtype
        features = {name: value.to(dtype) for name, value in conditioning.items()}
        predicted: Tensor = self.denoiser(noisy.to(dtype), t, **features).sample
        return predicted

    def pipeline(self) -> StableDiffusionPipeline:
        """The pipeline around the same modules."""
        return self.parts
