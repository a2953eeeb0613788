"""Wan 2.1 and 2.2, text to video: WanTransformer3DModel, UMT5, AutoencoderKLWan; predicts flow.

Wan 2.2 has two denoisers: ``transformer`` for high noise, ``transformer_2`` below a boundary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.intervals import Interval, LogitNormalDensity, is_flow
from timestep_experts.models.encoding import per_channel, token_ids
from timestep_experts.models.family import Conditioning, Family
from timestep_experts.models.noise import FlowNoise, flow_shift


class Wan(Family):
    """A `Family` around a `WanPipeline`.

    Text features are padded with zeros to 512 tokens, which the denoiser attends to, as the pipeline does.
    """

    pipeline_class = WanPipeline
    denoiser_name = "transformer"
    default_num_frames = 81
    max_sequence_length: int = 512

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """``transformer``, and Wan 2.2's ``transformer_2``."""
        modules = {name: getattr(self.parts, name) for name in ("transformer", "transformer_2")}
        return {name: module for name, module in modules.items() if module is not None}

    @property
    def owned_intervals(self) -> dict[str, Interval]:
        """The timesteps of Wan 2.2's two denoisers."""
        return owned_intervals(self.parts)

    @property
    def default_size(self) -> tuple[int, int]:
        """The pipeline's."""
        return 480, 832

    @property
    def size_multiple(self) -> int:
        """The pipeline asks for 16; patches of latents must be whole, too."""
        _, rows, columns = self.parts.transformer.config.patch_size
        return math.lcm(16, self.parts.vae_scale_factor_spatial * rows, self.parts.vae_scale_factor_spatial * columns)

    def check_size(self, size: tuple[int, int], num_frames: int | None = None) -> None:
        """See `Family`; of the frames, the first is encoded alone and the others in groups."""
        super().check_size(size, num_frames)
        group = self.parts.vae_scale_factor_temporal
        if num_frames is not None and (num_frames - 1) % group:
            raise UserError(
                f"{self.source}: clips of {num_frames} frames do not fit; a number of frames less 1 must divide by"
                f" {group}"
            )

    def make_noise(self) -> FlowNoise:
        """The scheduler's T and flow shift.

        Raises:
            UserError: the scheduler is not of a flow model.
        """
        scheduler = self.parts.scheduler
        if not is_flow(scheduler) or scheduler.config.get("use_dynamic_shifting"):
            raise UserError(
                f"{self.source}: a {type(scheduler).__name__} without a fixed flow shift; allowed are"
                " FlowMatchEulerDiscreteScheduler and multistep schedulers with use_flow_sigmas"
            )
        num_train_timesteps = int(scheduler.config["num_train_timesteps"])
        density = LogitNormalDensity(shift=flow_shift(scheduler), num_train_timesteps=num_train_timesteps)
        return FlowNoise(density, num_train_timesteps)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Clips ``(B, 3, F, H, W)`` to normalised posterior means ``(B, c, (F - 1) / 4 + 1, h, w)``, fp32.

        Raises:
            UserError: F - 1, H or W are no multiples of what the autoencoder and the patches shrink them by.
        """
        vae = self.parts.vae
        frames, height, width = pixels.shape[-3:]
        self.check_size((height, width), frames)
        inputs = pixels.to(next(vae.parameters()).device, vae.dtype)
        means = torch.cat([vae.encode(clip[None]).latent_dist.mean for clip in inputs]).float()
        shift, scale = (per_channel(vae.config[name], means) for name in ("latents_mean", "latents_std"))
        return (means - shift) / scale

    def prepare_captions(self, captions: Sequence[str]) -> list[str]:
        """Cleaned as the pipeline does."""
        return [prompt_clean(caption) for caption in captions]

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` of the captions, cleaned as the pipeline does."""
        tokens = token_ids(self.parts.tokenizer, self.prepare_captions(captions), self.max_sequence_length)
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The last hidden states, 0 behind the end of a caption, ``(B, 512, d)``."""
        encoder = self.parts.text_encoder
        device = next(encoder.parameters()).device
        mask = tokens["attention_mask"].to(device)
        states: Tensor = encoder(tokens["input_ids"].to(device), mask).last_hidden_state
        return {"encoder_hidden_states": states * mask[..., None].to(states.dtype)}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Each sample by the denoiser that owns its t."""
        owned = self.owned_intervals
        text = conditioning["encoder_hidden_states"]
        if not owned:
            return _denoise(self.parts.transformer, noisy, t, text)
        t, text = t.to(noisy.device), text.to(noisy.device)
        is_low = t.double() < owned["transformer"].lo  # exact, as in Partition.index_of
        rows_of = {"transformer": (~is_low).nonzero()[:, 0], "transformer_2": is_low.nonzero()[:, 0]}
        parts = [
            (rows, _denoise(self.denoisers[name], noisy[rows], t[rows], text[rows]))
            for name, rows in rows_of.items()
            if len(rows)
        ]
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return torch.cat([predicted for _, predicted in parts])[order]


def owned_intervals(pipeline: Any) -> dict[str, Interval]:
    """The timesteps that each of a pipeline's two denoisers is used for, by name; empty where there is one.

    The denoiser of high noise also owns t = T.

    Raises:
        UserError: there are two, but the pipeline names no boundary between 0 and 1.
    """
    if getattr(pipeline, "transformer_2", None) is None:
        return {}
    ratio = pipeline.config.get("boundary_ratio")
    if ratio is None or not 0 < ratio < 1:
        raise UserError(f"two transformers need a boundary_ratio between 0 and 1; this pipeline's is {ratio}")
    return split_at(ratio, int(pipeline.scheduler.config.num_train_timesteps))


def split_at(boundary_ratio: float, num_train_timesteps: int) -> dict[str, Interval]:
    """The timesteps of Wan 2.2's two denoisers, by name."""
    boundary = boundary_ratio * num_train_timesteps
    return {"transformer": Interval(boundary, num_train_timesteps), "transformer_2": Interval(0, boundary)}


def _denoise(transformer: Any, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
    dtype = transformer.dtype  # not of the first parameter, which may be kept in fp32
    predicted: Tensor = transformer(
        hidden_states=noisy.to(dtype), timestep=t, encoder_hidden_states=text.to(noisy.device, dtype)
    ).sample
    return predicted
