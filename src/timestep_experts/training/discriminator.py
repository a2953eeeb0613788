"""Real or generated, seen from the middle of the fake score (DMD2, section 4.3)."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from timestep_experts.models import Family
from timestep_experts.models.family import Conditioning

_SMALL = 4
_MOST_GROUPS = 32


class DiscriminatorHead(nn.Sequential):
    """``[conv k4 s2, GroupNorm, SiLU]`` until at most 4 x 4, a convolution over all that is left, the same, a 1x1.

    Norms have 32 groups, or fewer so that a group holds at least four channels where it can.

    Args:
        channels: of the features.
        height: of the features.
        width: of the features.
        seed: of its weights.
    """

    def __init__(self, channels: int, height: int, width: int, seed: int) -> None:
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            while max(height, width) > _SMALL:
                layers += [nn.Conv2d(channels, channels, 4, 2, 1), *_norm_and_activation(channels)]
                height, width = height // 2, width // 2
            layers += [nn.Conv2d(channels, channels, (height, width)), *_norm_and_activation(channels)]
            super().__init__(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(B, C, h, w)`` to logits ``(B,)`` fp32; high means real."""
        for layer in self:
            features = layer(features)
        return features.float().flatten()


def _norm_and_activation(channels: int) -> list[nn.Module]:
    groups = math.gcd(_MOST_GROUPS, channels, max(channels // 4, 1))
    return [nn.GroupNorm(groups, channels), nn.SiLU()]


def middle_shape(denoiser: Any, height: int, width: int) -> tuple[int, int, int]:
    """Channels, height and width of a UNet2DConditionModel's middle block for latents of a size."""
    for block in denoiser.down_blocks:
        if block.downsamplers is not None:
            height, width = -(-height // 2), -(-width // 2)
    return int(denoiser.config.block_out_channels[-1]), height, width


class _Reached(Exception):  # noqa: N818 - it is no error
    """Ends a forward pass whose rest nobody needs."""


def middle_features(family: Family, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """What a family's denoiser has made of noisy latents after its middle block, ``(B, C, h, w)``.

    The pass ends there: the decoder is not run.

    Args:
        family: with a UNet2DConditionModel.
        noisy: ``(B, c, h, w)``.
        t: ``(B,)``.
        conditioning: text features.
    """
    found: list[Tensor] = []

    def leave(_module: nn.Module, _inputs: Any, features: Tensor) -> None:
        found.append(features)
        raise _Reached

    denoiser: Any = family.denoiser
    handle = denoiser.mid_block.register_forward_hook(leave)
    try:
        with suppress(_Reached):
            family.predict(noisy, t, conditioning)
    finally:
        handle.remove()
    return found[0]
