"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder, AutoencoderKL; predicts noise or velocity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import StableDiffusionPipeline
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.models.encoding import cast, token_ids
from timestep_experts.models.family import Family
from timestep_experts.models.noise import DiscreteNoise


class StableDiffusion(Family):
    """A `Family` around a `StableDiffusionPipeline`.

    Args:
        parts: the pipeline.
        source: where it was loaded from.

    Raises:
        UserError: the UNet attends to features of another width than the text encoder gives, as that of SDXL would.
    """

    pipeline_class = StableDiffusionPipeline
    loading_options: ClassVar = {"safety_checker": None, "requires_safety_checker": False}

    def __init__(self, parts: Any, source: str = "a pipeline in memory") -> None:
        super().__init__(parts, source)
        if parts.text_encoder is None:  # a pipeline for features that are there already
            return
        wanted, given = parts.unet.config.cross_attention_dim, parts.text_encoder.config.hidden_size
        if wanted != given:
            raise UserError(
                f"{source}: its UNet attends to text features of width {wanted}, its text encoder gives {given};"
                " they are not of one Stable Diffusion"
            )

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
