"""One whole pipeline of random weights per family: the real classes, 16-pixel pictures, 8x8 latents.

Widths differ between families, so that a bundle of one never fits another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from conftest import tiny_autoencoder, tiny_clip_config, tiny_pipeline, tiny_tokenizer

WORDS = ("a", "red", "blue", "star", "plain", "cross", "in", "the", "dark")
CLIP_LENGTH = 24


def clip_tokenizer(length: int = CLIP_LENGTH) -> CLIPTokenizer:
    return tiny_tokenizer([], length)


def clip_config(width: int) -> CLIPTextConfig:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width, "num_hidden_layers": 2}
    return tiny_clip_config(clip_tokenizer(), **sizes)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def flow_scheduler(**options: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def seeded(build: Callable[..., Any]) -> Callable[..., Any]:
    """Weights depend on nothing but the arguments; like a loaded pipeline, it drops nothing out."""

    def build_seeded(**options: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline = build(**options)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval()
        return pipeline

    return build_seeded


def stable_diffusion() -> diffusers.StableDiffusionPipeline:
    pipeline = tiny_pipeline()
    pipeline.tokenizer = clip_tokenizer(length=8)
    return pipeline


@seeded
def stable_diffusion_xl() -> diffusers.StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8 + 16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=tiny_autoencoder(),
        text_encoder=CLIPTextModel(clip_config(8)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(16)),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )


@seeded
def ddpm(**options: Any) -> diffusers.DDPMPipeline:
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **options,
    )
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())


@seeded
def pixart(
    kind: type[Any] = diffusers.PixArtAlphaPipeline, **options: Any
) -> diffusers.PixArtAlphaPipeline | diffusers.PixArtSigmaPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=16,
        norm_num_groups=4,
        **({"sample_size": 8} | options),
    )
    return kind(
        vae=tiny_autoencoder(),
        text_encoder=t5(16),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


@seeded
def stable_diffusion_3(*, has_t5: bool = True, **options: Any) -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=8 + 16,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=tiny_autoencoder(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(clip_config(8)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(16)),
        text_encoder_3=t5(32) if has_t5 else None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer() if has_t5 else None,
        transformer=transformer,
        scheduler=flow_scheduler(**({"shift": 3.0} | options)),
    )


@seeded
def flux(*, guidance_embeds: bool = True, **options: Any) -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * 4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        vae=tiny_autoencoder(shift_factor=0.1),
        text_encoder=CLIPTextModel(clip_config(8)),
        text_encoder_2=t5(16),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=flow_scheduler(**({"shift": 3.0, "use_dynamic_shifting": True} | options)),
    )


PIPELINES: dict[str, Callable[..., Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "ddpm": ddpm,
    "pixart": pixart,
    "sd3": stable_diffusion_3,
    "flux": flux,
}

VARIANTS: dict[str, Callable[..., Any]] = PIPELINES | {
    "pixart of 1024 pixels": partial(pixart, sample_size=128),
    "pixart sigma": partial(pixart, kind=diffusers.PixArtSigmaPipeline),
    "sd3 without t5": partial(stable_diffusion_3, has_t5=False),
    "flux without guidance": partial(flux, guidance_embeds=False, use_dynamic_shifting=False, shift=1.0),
}
