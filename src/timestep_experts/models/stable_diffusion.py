"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder, AutoencoderKL; predicts noise or velocity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from diffusers import StableDiffusionPipeline
from torch import Tensor

from timestep_experts.models.encoding import cast, token_ids
from timestep_experts.models.family import Family
from timestep_experts.models.noise import DiscreteNoise


class StableDiffusion(Family):
    """A `Family` around a `StableDiffusionPipeline`."""

    pipeline_class = StableDiffusionPipeline
    loading_options: ClassVar = {"safety_checker": None, "requires_safety_checker": False}

    def make_noise(self) -> DiscreteNoise:
        """See `Family`."""
        return DiscreteNoise(self.parts.scheduler, self.source)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids``, and the mask where the text encoder is configured to use one."""
        tokens = token_ids(self.parts.tokenizer, captions)
        uses_mask = getattr(self.parts.text_encoder.config, "use_attention_mask", None)
        return {name: tokens[name] for name in ("input_ids", *(["attention_mask"] if uses_mask else []))}

    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The last hidden states, ``(B, L, d)``."""
        encoder = self.parts.text_encoder
        return {"encoder_hidden_states": encoder(**cast(dict(tokens), encoder))[0]}
