"""Stable Diffusion XL: two CLIP text encoders, their features side by side, and sizes as added conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from timestep_experts.models.encoding import cast, encode_two_clips, token_ids
from timestep_experts.models.family import Conditioning, Family
from timestep_experts.models.noise import DiscreteNoise


class StableDiffusionXL(Family):
    """A `Family` around a `StableDiffusionXLPipeline`."""

    pipeline_class = StableDiffusionXLPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")

    def make_noise(self) -> DiscreteNoise:
        """See `Family`."""
        return DiscreteNoise(self.parts.scheduler, self.source)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` of the first tokenizer, ``input_ids_2`` of the second."""
        return {
            "input_ids": token_ids(self.parts.tokenizer, captions).input_ids,
            "input_ids_2": token_ids(self.parts.tokenizer_2, captions).input_ids,
        }

    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The last but one hidden states of both encoders side by side, and the second one's projected pooling."""
        hidden, projections = encode_two_clips(self.parts, tokens)
        return {"encoder_hidden_states": hidden, "text_embeds": projections[1]}

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
