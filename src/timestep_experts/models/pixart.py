"""PixArt alpha and sigma: PixArtTransformer2DModel, one T5 text encoder, AutoencoderKL; predicts noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor

from timestep_experts.models.encoding import cast, token_ids
from timestep_experts.models.family import Conditioning, Family
from timestep_experts.models.noise import DiscreteNoise


class PixArt(Family):
    """A `Family` around a `PixArtAlphaPipeline`.

    Captions are lowercased and stripped, but not cleaned: the pipeline's ``clean_caption=False``.
    """

    pipeline_class = PixArtAlphaPipeline
    denoiser_name = "transformer"
    sampling_options: ClassVar = {"clean_caption": False, "use_resolution_binning": False}
    max_sequence_length: int = 120

    def make_noise(self) -> DiscreteNoise:
        """See `Family`."""
        return DiscreteNoise(self.parts.scheduler, self.source)

    @property
    def size_multiple(self) -> int:
        """Patches of latents must be whole, too."""
        return math.lcm(8, self.parts.vae_scale_factor * self.parts.transformer.config.patch_size)

    def prepare_captions(self, captions: Sequence[str]) -> list[str]:
        """Lowercased and stripped."""
        return [caption.lower().strip() for caption in captions]

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, ``(B, max_sequence_length)``."""
        tokens = token_ids(self.parts.tokenizer, self.prepare_captions(captions), self.max_sequence_length)
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The last hidden states ``(B, L, d)``, and the mask that cross-attention needs too."""
        encoder = self.parts.text_encoder
        placed = cast(dict(tokens), encoder)
        return {"encoder_hidden_states": encoder(**placed)[0], "encoder_attention_mask": placed["attention_mask"]}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The noise, without the learned variance; the latents' picture gives resolution and aspect ratio."""
        transformer = self.parts.transformer
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if transformer.use_additional_conditions:
            height, width = (side * self.parts.vae_scale_factor for side in noisy.shape[-2:])
            like = {"dtype": transformer.dtype, "device": noisy.device}
            added["resolution"] = torch.tensor([[height, width]], **like).repeat(len(noisy), 1)
            added["aspect_ratio"] = torch.tensor([[height / width]], **like).repeat(len(noisy), 1)
        said: Tensor = self.denoiser(
            noisy.to(transformer.dtype),
            timestep=t,
            added_cond_kwargs=added,
            **cast(dict(conditioning), self.denoiser),
        ).sample
        return said.chunk(2, dim=1)[0] if said.shape[1] == 2 * noisy.shape[1] else said


class PixArtSigma(PixArt):
    """A `Family` around a `PixArtSigmaPipeline`."""

    pipeline_class = PixArtSigmaPipeline
    max_sequence_length = 300
