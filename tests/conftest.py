"""What the tests share: a tiny denoiser with linear and convolutional targets, one-layer networks, random experts."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import settings
from torch import Tensor, nn

from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale

settings.register_profile("laws", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("laws")

LINEAR_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "time_emb_proj")
CONV_TARGETS = ("proj_in", "conv1", "conv_shortcut", "downsamplers.0.conv")
TARGETS = LINEAR_TARGETS + CONV_TARGETS


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """A UNet of random weights in evaluation mode: 8x8 latents, two levels, 51 k parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
        )
    return unet.eval()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that depend on nothing but the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unet_inputs(num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy latents ``(B, 4, 8, 8)`` and text features ``(B, 5, 8)``."""
    return normal(num_samples, 4, 8, 8, seed=seed), normal(num_samples, 5, 8, seed=seed + 1)


def randomise(mixture: Mixture, seed: int = 0) -> Mixture:
    """Fill every expert and router with normal numbers of standard deviation .1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in mixture.state_dict().values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return mixture


def zero_routers(mixture: Mixture) -> Mixture:
    """Make every router say nothing."""
    with torch.no_grad():
        for key, value in mixture.state_dict().items():
            if ".router." in key:
                value.zero_()
    return mixture


def scales(core: int, *contexts: int, rank: int = 4, alpha: float = 8, resting_gate: float = 0) -> tuple[Scale, ...]:
    """One ungated scale of ``core`` intervals and gated ones; a scale of n intervals is called ``n<n>``."""
    gated = [Scale(f"n{n}", Partition.uniform(n), rank, alpha, gated=True, resting_gate=resting_gate) for n in contexts]
    return (Scale(f"n{core}", Partition.uniform(core), rank, alpha), *gated)


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; shapes must agree."""
    assert actual.shape == expected.shape
    return (actual.double() - expected.double()).abs().max().item()


class OneLayer(nn.Module):
    """A denoiser that is a single layer, for formulas."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample)


def attach_to_layer(layer: nn.Module, spec: MixtureSpec, mode: str = "off") -> tuple[OneLayer, Mixture]:
    """A one-layer denoiser in evaluation mode with random experts."""
    net = OneLayer(layer).eval()
    mixture = randomise(Mixture.attach(net, spec, ["layer"]))
    mixture.mode = mode
    return net, mixture


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()
