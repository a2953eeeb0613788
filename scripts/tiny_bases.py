"""Tiny pipelines of the real classes, untrained: one per architecture, all on the same autoencoder's latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LATENT_CHANNELS = 8
TEXT_WIDTH = 128
PIXELS = "ddpm"
"""The architecture that works on pixels, without autoencoder and text."""
_PIXEL_ATTENTION_LEVEL = 2  # 8 x 8 of 32 pixels


def unet(autoencoder: AutoencoderKL, captions: Sequence[str], max_tokens: int, dropout: float) -> Any:
    """Stable Diffusion: a UNet of 4 M parameters and a CLIP of 3 layers."""
    tokenizer = clip_tokenizer(captions, max_tokens)
    text_encoder = CLIPTextModel(clip_config(tokenizer))
    denoiser = UNet2DConditionModel(
        sample_size=latent_side(autoencoder),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        dropout=dropout,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ddpm(resolution: int, widths: Sequence[int], layers_per_block: int, dropout: float) -> DDPMPipeline:
    """An unconditional UNet on pixels with attention at a quarter of the resolution, 1000 steps of linear betas."""
    levels = range(len(widths))
    down = tuple("AttnDownBlock2D" if level == _PIXEL_ATTENTION_LEVEL else "DownBlock2D" for level in levels)
    denoiser = UNet2DModel(
        sample_size=resolution,
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        norm_num_groups=16,
        attention_head_dim=32,
        dropout=dropout,
    )
    return DDPMPipeline(unet=denoiser, scheduler=DDPMScheduler(beta_schedule="linear"))


def dit(autoencoder: AutoencoderKL, captions: Sequence[str], max_tokens: int, dropout: float) -> Any:
    """PixArt: a DiT of 4 M parameters on 2 x 2 patches, and a T5 of 3 layers."""
    del max_tokens  # the family's length, of which all but the caption is masked
    tokenizer = t5_tokenizer(captions)
    transformer = PixArtTransformer2DModel(
        sample_size=latent_side(autoencoder),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=8,
        num_attention_heads=4,
        attention_head_dim=40,
        cross_attention_dim=160,
        caption_channels=TEXT_WIDTH,
        dropout=dropout,
    )
    text_config = T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=32, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0
    )
    return PixArtAlphaPipeline(
        vae=autoencoder,
        text_encoder=T5EncoderModel(text_config),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=noise_scheduler(),
    )


def mmdit(autoencoder: AutoencoderKL, captions: Sequence[str], max_tokens: int, dropout: float) -> Any:
    """Stable Diffusion 3: an MM-DiT of 4 M parameters on 2 x 2 patches, and two CLIPs of 4 layers, without a T5."""
    del dropout  # it has none
    tokenizer = clip_tokenizer(captions, max_tokens)
    sizes = {"num_hidden_layers": 4, "hidden_size": 96, "intermediate_size": 192, "projection_dim": 96}
    text_encoders = [CLIPTextModelWithProjection(clip_config(tokenizer, **sizes)) for _ in range(2)]
    side = latent_side(autoencoder)
    autoencoder.register_to_config(shift_factor=0.0)  # which its pipeline needs as a number
    transformer = SD3Transformer2DModel(
        sample_size=side,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=192,
        caption_projection_dim=128,
        pooled_projection_dim=192,
        pos_embed_max_size=side // 2,
    )
    return StableDiffusion3Pipeline(
        vae=autoencoder,
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def video(autoencoder: AutoencoderKL, captions: Sequence[str], max_tokens: int, dropout: float) -> Any:
    """VideoCrafter2's blocks and fading signal, with two levels, and a CLIP of 3 layers."""
    del dropout  # fixed in its temporal layers
    tokenizer = clip_tokenizer(captions, max_tokens)
    scheduler = noise_scheduler()
    scheduler.register_to_config(least_signal=0.7)
    denoiser = UNet3DConditionModel(
        sample_size=latent_side(autoencoder),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=24,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock3D",) * 2,
        up_block_types=("CrossAttnUpBlock3D",) * 2,
    )
    return TextToVideoSDPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=scheduler,
    )


ARCHITECTURES: dict[str, Callable[[AutoencoderKL, Sequence[str], int, float], Any]] = {
    "unet": unet,
    "dit": dit,
    "mmdit": mmdit,
    "video": video,
}


def latent_side(autoencoder: AutoencoderKL) -> int:
    """Height and width of the latents."""
    return int(autoencoder.config.sample_size) // 2 ** (len(autoencoder.config.block_out_channels) - 1)


def clip_tokenizer(captions: Sequence[str], max_tokens: int) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with a vocabulary learned from the captions."""
    blank = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    tokenizer = blank.train_new_from_iterator(captions, 2000, show_progress=False)
    tokenizer.model_max_length = max_tokens
    return tokenizer


def clip_config(tokenizer: CLIPTokenizer, **sizes: int) -> CLIPTextConfig:
    """Three layers of width 128, unless told otherwise."""
    defaults = {"hidden_size": TEXT_WIDTH, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **{**defaults, **sizes},
    )


def t5_tokenizer(captions: Sequence[str]) -> T5Tokenizer:
    """T5's tokenizer with a piece for every word of the captions, and for every letter."""
    words = sorted({word for caption in captions for word in caption.lower().split()})
    letters = sorted({letter for word in words for letter in word})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    return T5Tokenizer(
        vocab=special + [(f"▁{word}", -2.0) for word in words] + [(letter, -4.0) for letter in letters], extra_ids=0
    )


def noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )
