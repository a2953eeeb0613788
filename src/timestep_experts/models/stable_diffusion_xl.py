"""Stable Diffusion XL: two CLIP text encoders, their features side by side, and sizes as added conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from timestep_experts.models.encoding import (
    cast,
    encode_posterior_mean,
    encode_two_clips,
    per_channel,
    posterior_mean,
    token_ids,
)
from timestep_experts.models.family import Conditioning, Family
from timestep_experts.models.noise import DiscreteNoise

NO_CAPTION = "\0"
"""Stands for a caption that is not given; no text holds this character."""


class StableDiffusionXL(Family):
    """A `Family` around a `StableDiffusionXLPipeline`."""

    pipeline_class = StableDiffusionXLPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")

    def make_noise(self) -> DiscreteNoise:
        """See `Family`."""
        return DiscreteNoise(self.parts.scheduler, self.source)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """See `Family`. An autoencoder with statistics of its latents (Playground v2.5) is normalised by them."""
        config = self.parts.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return encode_posterior_mean(self.parts.vae, pixels)
        latents = posterior_mean(self.parts.vae, pixels)
        return (latents - per_channel(mean, latents)) * float(config.scaling_factor) / per_channel(std, latents)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` of the first tokenizer, ``input_ids_2`` of the second; all -1 of `NO_CAPTION`."""
        is_none = torch.tensor([caption == NO_CAPTION for caption in captions])
        texts = ["" if caption == NO_CAPTION else caption for caption in captions]
        tokenizers = {"input_ids": self.parts.tokenizer, "input_ids_2": self.parts.tokenizer_2}
        return {
            name: token_ids(tokenizer, texts).input_ids.masked_fill(is_none[:, None], -1)
            for name, tokenizer in tokenizers.items()
        }

    @property
    def no_caption(self) -> str:
        """Where the pipeline takes zeros for a prompt that is not given, this is not the empty caption."""
        return NO_CAPTION if self.parts.config.get("force_zeros_for_empty_prompt") else ""

    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The last but one hidden states of both encoders side by side, and the second one's projected pooling.

        Of `NO_CAPTION` both are 0.
        """
        is_none = tokens["input_ids"][:, 0] < 0
        hidden, projections = encode_two_clips(self.parts, {name: ids.clamp(min=0) for name, ids in tokens.items()})
        features = {"encoder_hidden_states": hidden, "text_embeds": projections[1]}
        return {
            name: value.masked_fill(is_none.to(value.device).reshape(-1, *(1,) * (value.dim() - 1)), 0)
            for name, value in features.items()
        }

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Original and target size are those of the latents' picture, without crop, as in the pipeline."""
        features = cast(dict(conditioning), self.denoiser)
        height, width = (side * self.parts.vae_scale_factor for side in noisy.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=noisy.dtype, device=noisy.device)
        added = {"text_embeds": features.pop("text_embeds"), "time_ids": sizes.expand(len(noisy), -1)}
        predicted: Tensor = self.denoiser(
            noisy.to(self.parts.unet.dtype), t, **features, added_cond_kwargs=added
        ).sample
        return predicted
