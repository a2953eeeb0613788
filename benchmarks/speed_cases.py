"""What the speed benchmark adapts: single layers of known models at their widths, and whole denoisers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from speed_variants import PASSES, Pass

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of the papers, see recipes/papers


@dataclass(frozen=True)
class Case:
    """A network and its input.

    Args:
        name: in tables.
        make: the network, of random weights.
        targets: the modules that are adapted.
        shape: of one sample.
        batches: samples at one t, and at mixed t.
        conditions: further arguments for that many samples.
        expands_t: whether the network wants one t per sample even if all are the same, as its pipeline gives it.
        reduced: what was made smaller than the real one.
    """

    name: str
    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    shape: tuple[int, ...]
    batches: tuple[int, int]
    conditions: Callable[[int], dict[str, Any]] = lambda batch: {}  # noqa: ARG005
    expands_t: bool = False
    reduced: str = ""


class OneLayer(nn.Module):
    """One layer behind a timestep."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:  # noqa: ARG002 - read by the mixture's hook
        """Apply the layer."""
        return (self.layer(sample),)


def linear(name: str, width: int, tokens: int, batches: tuple[int, int]) -> Case:
    """A linear layer of one width."""
    full = f"{name}: Linear {width}, {tokens} tokens"
    return Case(full, lambda: OneLayer(nn.Linear(width, width)), ("layer",), (tokens, width), batches)


def convolution(name: str, width: int, side: int, kernel: int, batches: tuple[int, int]) -> Case:
    """A convolution that keeps width and positions."""
    full = f"{name}: Conv2d {width}, {kernel}x{kernel}, on {side}x{side}"
    shape = (width, side, side)
    return Case(
        full, lambda: OneLayer(nn.Conv2d(width, width, kernel, padding=kernel // 2)), ("layer",), shape, batches
    )


def layer_cases(device: torch.device, *, quick: bool) -> list[Case]:
    """Layers as they are met in pictures of 512 pixels; two samples at one t are guidance, mixed t is a batch."""
    if quick:
        return [
            linear("tiny", 16, 8, (2, 3)),
            convolution("tiny", 8, 4, 3, (2, 3)),
            convolution("tiny", 8, 4, 1, (2, 3)),
        ]
    batches = (2, 8 if device.type == "cuda" else 4)
    levels = ((320, 64), (640, 32), (1280, 16))
    return [
        *(linear("SD1.5", width, side * side, batches) for width, side in levels),
        linear("PixArt", 1152, 1024, batches),
        linear("SD3", 1536, 1024, batches),
        linear("FLUX", 3072, 1024 + 512, batches),
        *(convolution("SD1.5", width, side, 3, batches) for width, side in levels),
        *(convolution("SD1.5", width, side, 1, batches) for width, side in levels),
    ]


def denoiser_cases(device: torch.device, *, quick: bool) -> list[Case]:
    """Whole networks on latents of 64x64, as for pictures of 512 pixels."""
    if quick:
        return [tiny_stable_diffusion(), pixart(1, 8, 2, tiny=True), stable_diffusion_3(1, 8, 2, tiny=True)]
    is_gpu = device.type == "cuda"
    layers = 28 if is_gpu else 4, 24 if is_gpu else 4
    return [stable_diffusion(is_gpu), pixart(layers[0], 64, 4), stable_diffusion_3(layers[1], 64, 4)]


def stable_diffusion(is_gpu: bool) -> Case:
    """The UNet of Stable Diffusion 1.5, whole."""

    def make() -> nn.Module:
        network: nn.Module = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
        return network

    batches = (2, 4) if is_gpu else (1, 2)
    return Case("SD1.5 UNet", make, ATTENTION, (4, 64, 64), batches, lambda batch: _text(batch, 77, 768))


def tiny_stable_diffusion() -> Case:
    """A UNet of two levels."""

    def make() -> nn.Module:
        network: nn.Module = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
        )
        return network

    return Case("tiny UNet", make, ATTENTION, (4, 8, 8), (2, 3), lambda batch: _text(batch, 5, 8), reduced="all")


def pixart(num_layers: int, side: int, batch: int, *, tiny: bool = False) -> Case:
    """PixArt-alpha of some of its 28 blocks."""
    heads, width, text = (2, 8, 16) if tiny else (16, 72, 4096)

    def make() -> nn.Module:
        network: nn.Module = PixArtTransformer2DModel(
            sample_size=side,
            num_layers=num_layers,
            num_attention_heads=heads,
            attention_head_dim=width,
            cross_attention_dim=heads * width,
            caption_channels=text,
            use_additional_conditions=False,
        )
        return network

    def conditions(num_samples: int) -> dict[str, Any]:
        return {**_text(num_samples, 120, text), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

    reduced = "" if num_layers == 28 else f"{num_layers} of 28 blocks"
    name = "PixArt" + (f" ({reduced})" if reduced else "")
    return Case(name, make, ATTENTION, (4, side, side), (2, batch), conditions, expands_t=True, reduced=reduced)


def stable_diffusion_3(num_layers: int, side: int, batch: int, *, tiny: bool = False) -> Case:
    """Stable Diffusion 3 medium of some of its 24 blocks."""
    heads, width, text, pooled = (2, 8, 16, 16) if tiny else (24, 64, 4096, 2048)

    def make() -> nn.Module:
        network: nn.Module = SD3Transformer2DModel(
            sample_size=side,
            num_layers=num_layers,
            num_attention_heads=heads,
            attention_head_dim=width,
            joint_attention_dim=text,
            caption_projection_dim=heads * width,
            pooled_projection_dim=pooled,
            out_channels=16,
            pos_embed_max_size=side,
        )
        return network

    def conditions(num_samples: int) -> dict[str, Any]:
        return {**_text(num_samples, 333, text), "pooled_projections": torch.randn(num_samples, pooled)}

    reduced = "" if num_layers == 24 else f"{num_layers} of 24 blocks"
    name = "SD3" + (f" ({reduced})" if reduced else "")
    return Case(name, make, ATTENTION, (16, side, side), (2, batch), conditions, expands_t=True, reduced=reduced)


def _text(batch: int, length: int, width: int) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(batch, length, width), "return_dict": False}


def passes_of(case: Case, pattern: re.Pattern[str]) -> list[Pass]:
    """Those passes of a case that a pattern means."""
    return [kind for kind in PASSES if pattern.search(f"{case.name}, {kind}")]
