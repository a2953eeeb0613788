"""What training and evaluation need to know of a base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from timestep_experts.intervals import TimestepDensity

Conditioning: TypeAlias = Mapping[str, Tensor]
"""Text features by the names of the denoiser's arguments, batch first."""


class Family(Protocol):
    """A base model: its parts, its noise, and its loss."""

    @property
    def source(self) -> str:
        """Where it was loaded from."""
        ...

    @property
    def denoiser(self) -> nn.Module:
        """The network that experts are attached to; its ``forward`` takes ``timestep``."""
        ...

    @property
    def density(self) -> TimestepDensity:
        """How base training draws t."""
        ...

    @property
    def has_integer_timesteps(self) -> bool:
        """Whether t is a whole number (DDPM-like) rather than continuous (flow)."""
        ...

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        ...

    def encoder_fingerprint(self) -> str:
        """A hash of whatever decides latents and text features, for caches."""
        ...

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [-1, 1] to scaled latents ``(B, c, h, w)`` fp32."""
        ...

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Text features of each caption, fp32."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The forward process at ``t (B,)``."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should say: noise, velocity or flow."""
        ...

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """What it says."""
        ...

    def pipeline(self) -> Any:
        """The diffusers pipeline around the same modules."""
        ...
