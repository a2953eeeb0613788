"""VideoCrafter2's public checkpoint, one file of the original code, as a pipeline of diffusers.

`formats.video_crafter` renames the denoiser; the autoencoder and OpenCLIP are Stable Diffusion's, and diffusers renames
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    load_single_file_checkpoint,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from timestep_experts.errors import UserError
from timestep_experts.formats.video_crafter import PREFIX, to_diffusers
from timestep_experts.models.video_crafter import FPS, LEAST_SIGNAL, FpsUNet3DConditionModel, fold_fps

_AUTOENCODER = "first_stage_model."
_TEXT_ENCODER = "cond_stage_model.model."
_PADDING = "!"  # token 0
_POSITIONS = "embeddings.position_ids"  # a buffer that newer versions of transformers do not keep


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """All tensors of a ``.ckpt`` (read without running code from it) or ``.safetensors`` file.

    Raises:
        UserError: it is missing, unreadable, or not VideoCrafter2's.
    """
    try:
        state: dict[str, Tensor] = load_single_file_checkpoint(str(path))
    except (OSError, ValueError, SafetensorError, RuntimeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for prefix in (PREFIX, _AUTOENCODER, _TEXT_ENCODER):
        if not any(key.startswith(prefix) for key in state):
            raise UserError(f"{path} is no checkpoint of VideoCrafter2: it has no tensor under {prefix!r}")
    return state


def convert_checkpoint(
    state: Mapping[str, Tensor],
    tokenizer: Any,
    fps: float = FPS,
    *,
    denoiser: Mapping[str, Any] | None = None,
    autoencoder: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
) -> TextToVideoSDPipeline:
    """A pipeline with the checkpoint's weights, whose denoiser has the frame rate folded in.

    Args:
        state: see `read_checkpoint`.
        tokenizer: CLIP's; it will pad with token 0, as OpenCLIP does.
        fps: frames per second that the denoiser is told from now on.
        denoiser: settings of UNet3DConditionModel that differ from VideoCrafter2's.
        autoencoder: the same of AutoencoderKL.
        text_encoder: the same of CLIPTextConfig.

    Raises:
        UserError: a tensor is missing, of another shape, or has no place.
    """
    tokenizer.pad_token = _PADDING
    unet = FpsUNet3DConditionModel(**(denoiser or {}))
    _fill(unet, to_diffusers(state), "denoiser")
    vae = AutoencoderKL(**{**_autoencoder_settings(), **(autoencoder or {})})
    _fill(vae, convert_ldm_vae_checkpoint(dict(state), dict(vae.config)), "autoencoder")
    text = CLIPTextModel(CLIPTextConfig(**{**_text_encoder_settings(), **(text_encoder or {})}))
    _fill(text, _text_state(state, text), "text encoder")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.register_to_config(**{LEAST_SIGNAL: 0.7})
    return TextToVideoSDPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=fold_fps(unet, fps), scheduler=scheduler
    )


def _text_state(state: Mapping[str, Tensor], text: CLIPTextModel) -> dict[str, Tensor]:
    """The layers up to the last but one, whose states VideoCrafter2 takes, and the final norm."""
    last = f"{_TEXT_ENCODER}transformer.resblocks.{text.config.num_hidden_layers}."
    kept = {key: value for key, value in state.items() if not key.startswith(last)}
    renamed = convert_open_clip_checkpoint(text, kept, prefix=_TEXT_ENCODER)
    has_wrapper = hasattr(text, "text_model")
    return {
        key if has_wrapper else key.removeprefix("text_model."): value
        for key, value in renamed.items()
        if "text_projection" not in key and not key.endswith(_POSITIONS)
    }


def _fill(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"the {name} of this checkpoint does not fit VideoCrafter2's: {error}") from error
    missing = [key for key in missing if not key.endswith(_POSITIONS)]
    if missing or unexpected:
        raise UserError(
            f"the {name} of this checkpoint does not fit VideoCrafter2's: it lacks {len(missing)} tensors"
            f" {missing[:3]} and has {len(unexpected)} others {unexpected[:3]}"
        )


def _autoencoder_settings() -> dict[str, Any]:
    """Stable Diffusion's autoencoder, for frames of 320 x 512."""
    return {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "scaling_factor": 0.18215,
        "sample_size": 512,
    }


def _text_encoder_settings() -> dict[str, Any]:
    """OpenCLIP ViT-H without its last layer."""
    return {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
        "eos_token_id": 2,
    }
