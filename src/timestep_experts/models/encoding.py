"""How pictures become latents and captions become tokens: what several families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def posterior_mean(autoencoder: Any, pixels: Tensor) -> Tensor:
    """Means of an AutoencoderKL's posterior, fp32: the same picture always gives the same latents.

    An autoencoder in fp16 that says ``force_upcast`` overflows, so it encodes in fp32, as diffusers' pipelines do.

    Args:
        autoencoder: a diffusers AutoencoderKL.
        pixels: ``(B, 3, H, W)`` in [-1, 1].

    Returns:
        ``(B, c, h, w)``, neither shifted nor scaled.
    """
    device, dtype = next(autoencoder.parameters()).device, autoencoder.dtype
    overflows = dtype == torch.float16 and bool(autoencoder.config.get("force_upcast"))
    try:
        if overflows:
            autoencoder.float()
        mean: Tensor = autoencoder.encode(pixels.to(device, autoencoder.dtype)).latent_dist.mean
    finally:
        if overflows:
            autoencoder.to(dtype)
    return mean.float()


def encode_posterior_mean(autoencoder: Any, pixels: Tensor) -> Tensor:
    """The posterior's means, shifted and scaled: ``(mean - shift) * scale``, see `posterior_mean`."""
    config = autoencoder.config
    mean = posterior_mean(autoencoder, pixels)
    return (mean - float(config.get("shift_factor") or 0)) * float(config.scaling_factor)


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """``(c,)`` to ``(c, 1, ..., 1)``, so that it meets the channels of ``like (B, c, ...)``."""
    return torch.tensor(values, device=like.device).reshape(-1, *(1,) * (like.dim() - 2))


def token_ids(tokenizer: Any, captions: Sequence[str], max_length: int | None = None) -> Any:
    """Padded and cut to one length: ``input_ids`` and ``attention_mask``, ``(B, L)`` int64."""
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=max_length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


@dataclass(frozen=True)
class CutCaptions:
    """Captions that a tokenizer cuts off, because its text encoder reads only so many tokens.

    Args:
        tokenizer: its name in the pipeline.
        limit: the number of tokens that are read, including those that mark beginning and end.
        count: the number of captions that have more tokens.
        longest: the number of tokens of the longest caption.
    """

    tokenizer: str
    limit: int
    count: int
    longest: int


def count_tokens(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """The number of tokens of each caption, including those that mark beginning and end; nothing is cut."""
    return [len(ids) for ids in tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]]


def cast(features: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Floating-point features in the dtype and everything on the device of a module."""
    first = next(p for p in module.parameters() if p.is_floating_point())  # quantised weights are whole numbers
    return {
        name: value.to(first.device, first.dtype if value.is_floating_point() else None)
        for name, value in features.items()
    }


def plain_tensors(value: Any) -> list[Tensor]:
    """The tensors that a quantised one is made of, in a fixed order; a plain tensor is made of itself."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value] if isinstance(value, Tensor) else []
    names, _ = value.__tensor_flatten__()
    return [tensor for name in names for tensor in plain_tensors(getattr(value, name))]


def encode_two_clips(pipeline: Any, tokens: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The last but one hidden states of ``text_encoder`` and ``text_encoder_2`` side by side.

    And what each of them returns first: its projected pooling, where it has a projection.
    """
    encoders = {"input_ids": pipeline.text_encoder, "input_ids_2": pipeline.text_encoder_2}
    outputs = [
        encoder(tokens[name].to(next(encoder.parameters()).device), output_hidden_states=True)
        for name, encoder in encoders.items()
    ]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return hidden, [output[0] for output in outputs]
