"""The sizes that the papers and their released weights imply, on the graph of Stable Diffusion 1.5 (no memory used)."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from conftest import scales
from timestep_experts.mixture import Mixture, MixtureSpec, match_targets

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
DMD2 = [
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]


@pytest.fixture(scope="module")
def shared_unet():
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )


@pytest.fixture
def stable_diffusion(shared_unet):
    yield shared_unet
    Mixture.of(shared_unet).detach()


def attach(unet, targets, *numbers, rank):
    with torch.device("meta"):
        return Mixture.attach(unet, MixtureSpec(scales(*numbers, rank=rank)), targets)


def test_base_is_the_network_of_the_papers(shared_unet):
    assert sum(p.numel() for p in shared_unet.parameters()) == 859_520_964


def test_attention_experts_of_rank_4(stable_diffusion):
    mixture = attach(stable_diffusion, ATTENTION, 1, rank=4)
    assert len(mixture.layers) == 128
    assert mixture.count_parameters().stored == 797_184
    assert {parameter.device.type for stack in mixture.stacks("n1") for parameter in stack.parameters()} == {"meta"}


def test_distillation_targets_are_182_linear_layers_and_96_convolutions(stable_diffusion):
    assert len(DMD2) == 14
    mixture = attach(stable_diffusion, DMD2, 1, rank=64)
    kinds = [type(layer.base_layer) for layer in mixture.layers.values()]
    assert (len(kinds), kinds.count(nn.Linear), sum(issubclass(k, nn.Conv2d) for k in kinds)) == (278, 182, 96)
    assert mixture.count_parameters().stored == 67_252_224


def test_router_with_one_context_stays_under_a_million(stable_diffusion):
    mixture = attach(stable_diffusion, DMD2, 4, 1, rank=64)
    maps, tables = mixture.router_parameters()
    assert sum(p.numel() for p in [*maps, *tables]) == 570_694
    assert mixture.count_parameters().stored == 5 * 67_252_224 + 570_694


def test_active_parameters_are_those_that_one_sample_meets(stable_diffusion):
    mixture = attach(stable_diffusion, DMD2, 4, 1, rank=64)
    one_expert = 67_252_224
    met = {}
    for mode in ("off", "switch", "route"):
        mixture.mode = mode
        met[mode] = mixture.count_parameters().active
    one_row_each = 570_694 - 278 * 999
    assert met == {"off": 0, "switch": one_expert, "route": 2 * one_expert + one_row_each}
    mixture.foster("n4", "n1")
    assert mixture.count_parameters().active == 2 * one_expert
    mixture.foster("n1")
    assert mixture.count_parameters().active == one_expert


def test_trainable_parameters_are_those_that_require_gradients(stable_diffusion):
    mixture = attach(stable_diffusion, ATTENTION, 8, 1, rank=4)
    for parameter in (p for stack in mixture.stacks("n1") for p in stack.parameters()):
        parameter.requires_grad_(False)
    for parameters in mixture.router_parameters():
        for parameter in parameters:
            parameter.requires_grad_(False)
    assert mixture.count_parameters().trainable == 8 * 797_184


def test_matching_needs_no_memory_and_no_attaching(shared_unet):
    assert len(match_targets(shared_unet, ATTENTION)) == 128
    assert len(match_targets(shared_unet, DMD2)) == 278
