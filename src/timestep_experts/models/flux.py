"""FLUX.1: FluxTransformer2DModel on packed latents, CLIP's pooling and a T5, AutoencoderKL; predicts flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import FluxPipeline
from torch import Tensor

from timestep_experts.mixture import timestep_input_of
from timestep_experts.models.encoding import cast, token_ids
from timestep_experts.models.family import Conditioning, Family
from timestep_experts.models.noise import FlowNoise


class Flux(Family):
    """A `Family` around a `FluxPipeline`.

    Latents are those of the autoencoder, of even height and width; `predict` packs and unpacks them. A base distilled
    with guidance is trained at the constant ``guidance``.
    """

    pipeline_class = FluxPipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    max_sequence_length: int = 512
    guidance: float = 1.0

    @property
    def default_size(self) -> tuple[int, int]:
        """The transformer is bound to no size; the pipeline has one."""
        side = int(self.parts.default_sample_size * self.parts.vae_scale_factor)
        return side, side

    def make_noise(self) -> FlowNoise:
        """See `Family`."""
        num_tokens = (self.parts.default_sample_size // 2) ** 2
        return FlowNoise.of_scheduler(self.parts.scheduler, self.source, num_tokens)

    @property
    def size_multiple(self) -> int:
        """Latents are packed two by two."""
        return int(self.parts.vae_scale_factor) * 2

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` of CLIP's tokenizer, ``input_ids_2`` of T5's."""
        parts = self.parts
        return {
            "input_ids": token_ids(parts.tokenizer, captions, parts.tokenizer_max_length).input_ids,
            "input_ids_2": token_ids(parts.tokenizer_2, captions, self.max_sequence_length).input_ids,
        }

    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """T5's last hidden states, and CLIP's pooling."""
        clip, t5 = self.parts.text_encoder, self.parts.text_encoder_2
        return {
            "encoder_hidden_states": t5(tokens["input_ids_2"].to(self.device))[0],
            "pooled_projections": clip(tokens["input_ids"].to(self.device)).pooler_output,
        }

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The flow of unpacked latents; t goes to the transformer as ``t / 1000``."""
        transformer = self.parts.transformer
        dtype, device = transformer.dtype, noisy.device
        features = cast(dict(conditioning), self.denoiser)
        count, channels, height, width = noisy.shape
        packed = FluxPipeline._pack_latents(noisy.to(dtype), count, channels, height, width)  # noqa: SLF001
        places = FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, dtype)  # noqa: SLF001
        said = self.denoiser(
            packed,
            timestep=timestep_input_of(transformer).value_of(t),
            guidance=torch.full((count,), self.guidance, device=device) if transformer.config.guidance_embeds else None,
            img_ids=places,
            txt_ids=torch.zeros(features["encoder_hidden_states"].shape[1], 3, device=device, dtype=dtype),
            **features,
        ).sample
        predicted: Tensor = FluxPipeline._unpack_latents(said, height, width, vae_scale_factor=1)  # noqa: SLF001
        return predicted
