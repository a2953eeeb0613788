"""DDPM: UNet2DModel on pixels, without text; class labels where the network is conditioned on classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import DDPMPipeline
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.models.encoding import cast
from timestep_experts.models.family import Conditioning, Family
from timestep_experts.models.noise import DiscreteNoise


class DDPM(Family):
    """A `Family` around a `DDPMPipeline` (or `DDIMPipeline`, which loads the same folders).

    Captions are ignored, unless the network knows classes: then a caption is the number of a class,
    and none may be dropped.
    """

    pipeline_class = DDPMPipeline
    autoencoder_name = None
    text_encoder_names = ()
    tokenizer_names = ()

    @property
    def has_empty_caption(self) -> bool:
        """Not where captions are classes: an empty one is class 0."""
        return self.parts.unet.config.num_class_embeds is None

    @property
    def size_multiple(self) -> int:
        """Every block but the last halves the sides."""
        return int(2 ** (len(self.parts.unet.config.block_out_channels) - 1))

    def make_noise(self) -> DiscreteNoise:
        """See `Family`."""
        return DiscreteNoise(self.parts.scheduler, self.source)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels are the latents."""
        return pixels.float()

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``class_labels``, or a column of nothing.

        Raises:
            UserError: a caption is no class number.
        """
        classes = self.parts.unet.config.num_class_embeds
        if classes is None:
            return {"nothing": torch.zeros(len(captions), 0)}
        labels = [caption.strip() or "0" for caption in captions]
        wrong = [label for label in labels if not label.isdigit() or int(label) >= classes]
        if wrong:
            raise UserError(f"captions of this model are class numbers from 0 to {classes - 1}; got {wrong[0]!r}")
        return {"class_labels": torch.tensor([int(label) for label in labels])}

    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Class labels are features."""
        return dict(tokens)

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Family`."""
        features = cast({name: value for name, value in conditioning.items() if name != "nothing"}, self.denoiser)
        predicted: Tensor = self.denoiser(noisy.to(self.parts.unet.dtype), t, **features).sample
        return predicted
