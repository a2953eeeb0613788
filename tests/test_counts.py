"""The sizes that the papers and their released weights imply, on the real graphs (no memory used)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet3DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

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


def test_distillation_targets_are_those_of_the_recipe():
    recipe = yaml.safe_load((Path(__file__).parents[1] / "recipes/papers/dmd2_sd15.yaml").read_text(encoding="utf-8"))
    assert sorted(recipe["method"]["experts"]["target_modules"]) == sorted(DMD2)


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


def pixart_alpha():
    return PixArtTransformer2DModel(num_layers=28, num_attention_heads=16, attention_head_dim=72)


def sd3_medium():
    return SD3Transformer2DModel(num_layers=24, num_attention_heads=24, attention_head_dim=64)


def open_clip_vit_h():
    """The layers up to the last but one, which VideoCrafter2 reads."""
    return CLIPTextModel(CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23))


@pytest.mark.parametrize(
    ("make", "targets", "rank", "modules", "parameters"),
    [
        (pixart_alpha, ATTENTION, 4, 224, 2_064_384),
        (sd3_medium, ATTENTION, 4, 96, 1_179_648),
        (UNet3DConditionModel, ["to_k", "to_v"], 16, 132, 3_385_344),
        (open_clip_vit_h, ["out_proj"], 16, 23, 753_664),
    ],
    ids=["PixArt-alpha", "SD3 medium", "VideoCrafter2", "VideoCrafter2, text"],
)
def test_experts_of_the_other_models(make, targets, rank, modules, parameters):
    with torch.device("meta"):
        model = make()
    mixture = attach(model, targets, 1, rank=rank)
    assert len(mixture.layers) == modules
    assert mixture.count_parameters().stored == parameters


def clip_large():
    """The text encoder of Stable Diffusion 1.x."""
    return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))


def clip_large_projected():
    """The first text encoder of Stable Diffusion 3 and XL."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    return CLIPTextModelWithProjection(config)


def clip_giant():
    """OpenCLIP bigG: the second text encoder of Stable Diffusion 3 and XL."""
    config = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    )
    return CLIPTextModelWithProjection(config)


def t5_xxl():
    """The encoder of T5 v1.1 XXL: of PixArt, Stable Diffusion 3 and FLUX.1."""
    return T5EncoderModel(
        T5Config(
            d_model=4096,
            d_kv=64,
            num_heads=64,
            d_ff=10240,
            num_layers=24,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


@pytest.mark.parametrize(
    ("make", "base", "targets", "layers", "width", "modules", "parameters"),
    [
        (clip_large, 123_060_480, ["q_proj", "v_proj"], 12, 768, 24, 147_456),
        (clip_large_projected, 123_650_304, ["q_proj", "k_proj", "v_proj", "out_proj"], 12, 768, 48, 294_912),
        (clip_giant, 694_659_840, ["q_proj", "k_proj", "v_proj", "out_proj"], 32, 1280, 128, 1_310_720),
        (t5_xxl, 4_762_310_656, ["q", "v"], 24, 4096, 48, 1_572_864),
    ],
    ids=["CLIP-L of SD 1.5", "CLIP-L of SD3", "CLIP-G of SD3", "T5-XXL of PixArt"],
)
def test_experts_of_rank_4_on_text_encoders(make, base, targets, layers, width, modules, parameters):
    with torch.device("meta"):
        encoder = make()
    assert sum(p.numel() for p in encoder.parameters()) == base
    mixture = attach(encoder, targets, 1, rank=4)
    sizes = {(layer.base_layer.in_features, layer.base_layer.out_features) for layer in mixture.layers.values()}
    assert sizes == {(width, width)}  # T5-XXL: 64 heads of 64
    assert len(mixture.layers) == modules == layers * len(targets)
    assert mixture.count_parameters().stored == parameters == layers * len(targets) * 4 * (width + width)
