"""Stable Diffusion 3.x: SD3Transformer2DModel, two CLIPs, a T5 that may be missing, AutoencoderKL; predicts flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional

from timestep_experts.models.encoding import encode_two_clips, token_ids
from timestep_experts.models.family import Family
from timestep_experts.models.noise import FlowNoise


class StableDiffusion3(Family):
    """A `Family` around a `StableDiffusion3Pipeline`."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizer_names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    max_sequence_length: int = 256

    def make_noise(self) -> FlowNoise:
        """See `Family`."""
        config = self.parts.transformer.config
        num_tokens = (config.sample_size // config.patch_size) ** 2
        return FlowNoise.of_scheduler(self.parts.scheduler, self.source, num_tokens)

    @property
    def size_multiple(self) -> int:
        """Whole patches of latents."""
        return int(self.parts.vae_scale_factor * self.parts.transformer.config.patch_size)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids``, ``input_ids_2`` and, where there is a T5, ``input_ids_3``."""
        parts = self.parts
        clip_length = parts.tokenizer_max_length
        tokens: dict[str, Tensor] = {
            "input_ids": token_ids(parts.tokenizer, captions, clip_length).input_ids,
            "input_ids_2": token_ids(parts.tokenizer_2, captions, clip_length).input_ids,
        }
        if parts.text_encoder_3 is not None:
            tokens["input_ids_3"] = token_ids(parts.tokenizer_3, captions, self.max_sequence_length).input_ids
        return tokens

    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Both CLIPs side by side, padded to the width of T5's states and followed by them; the CLIPs' projections."""
        short, projections = encode_two_clips(self.parts, tokens)
        long = self._encode_long(tokens)
        hidden = torch.cat([functional.pad(short, (0, long.shape[-1] - short.shape[-1])), long], -2)
        pooled = torch.cat(projections, -1)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def _encode_long(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """T5's last hidden states, or the zeros that stand for them."""
        encoder = self.parts.text_encoder_3
        if encoder is None:
            shape = (
                len(tokens["input_ids"]),
                self.max_sequence_length,
                self.parts.transformer.config.joint_attention_dim,
            )
            return torch.zeros(shape, device=self.device, dtype=self.parts.text_encoder.dtype)
        states: Tensor = encoder(tokens["input_ids_3"].to(self.device))[0]
        return states
