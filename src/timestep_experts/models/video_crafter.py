"""VideoCrafter2: UNet3DConditionModel, OpenCLIP ViT-H as CLIPTextModel, AutoencoderKL frame by frame; predicts noise.

What it adds to Stable Diffusion: the signal fades faster than the schedule says, and the frame rate is a condition.
A scheduler's configuration says the first by an entry `LEAST_SIGNAL`; without it the base is one of the same form, such
as ModelScope's text-to-video, whose signal does not fade.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from diffusers import DDIMScheduler, ModelMixin, TextToVideoSDPipeline, UNet3DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from timestep_experts.errors import UserError
from timestep_experts.models.encoding import cast, encode_posterior_mean, token_ids
from timestep_experts.models.family import Family
from timestep_experts.models.noise import DiscreteNoise, per_sample
from timestep_experts.models.quantization import is_quantised

FPS = 28.0
"""Frames per second that VideoCrafter2's own script asks for."""

LEAST_SIGNAL = "least_signal"
"""The entry of a scheduler's configuration that holds the last s_t: .7 for VideoCrafter2."""

_FADING_STEPS = 400
_CHECKPOINT = "_gradient_checkpointing_func"  # diffusers' name, by which experts find it and hold on to their timesteps
_CHECKPOINTED = ("resnets", "temp_convs", "attentions", "temp_attentions")


def signal_scale(num_train_timesteps: int = 1000, least: float = 0.7) -> Tensor:
    """What the latents are multiplied by at each t: from 1 to ``least`` in 400 even steps, then that; ``(T,)`` fp32."""
    fading = torch.arange(num_train_timesteps, dtype=torch.double) / (_FADING_STEPS - 1)
    return (1 - (1 - least) * fading.clamp(max=1)).float()


class ScaledSignalDDIMScheduler(DDIMScheduler):  # type: ignore[misc]
    """DDIM for latents that are scaled by `signal_scale` before noise is added.

    ``x0 = (z - sqrt(1 - a_t) e) / (sqrt(a_t) s_t)``, and ``x0`` is scaled by the s of the timestep that a step leads
    to; past the last one s is 1.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """See `DDIMScheduler.step`.

        Raises:
            UserError: the scheduler is configured to clip or threshold pixels, which latents are not.
        """
        if self.config.clip_sample or self.config.thresholding:
            raise UserError("ScaledSignalDDIMScheduler steps latents; set clip_sample and thresholding to False")
        previous, scaled = super().step(
            model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict=False
        )
        before = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        alpha = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        scales = signal_scale_of(self)
        clean = scaled / scales[int(timestep)].item()
        previous = previous + alpha**0.5 * (scales[max(before, 0)].item() * clean - scaled)
        return DDIMSchedulerOutput(previous, clean) if return_dict else (previous, clean)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(a_t) s_t x0 + sqrt(1 - a_t) noise``."""
        scales = signal_scale_of(self).to(timesteps.device)[timesteps]
        noisy: Tensor = super().add_noise(original_samples * per_sample(scales, original_samples), noise, timesteps)
        return noisy


def _signature_with_fps() -> inspect.Signature:
    own = inspect.signature(UNet3DConditionModel.__init__)
    fps = inspect.Parameter("fps", inspect.Parameter.KEYWORD_ONLY, default=FPS)
    return own.replace(parameters=[*own.parameters.values(), fps])


def signal_scale_of(scheduler: Any) -> Tensor:
    """`signal_scale` as a scheduler's configuration has it: all 1 without an entry `LEAST_SIGNAL`."""
    return signal_scale(scheduler.config.num_train_timesteps, float(scheduler.config.get(LEAST_SIGNAL, 1)))


class FpsUNet3DConditionModel(UNet3DConditionModel):  # type: ignore[misc]
    """A UNet3DConditionModel with VideoCrafter2's ``fps_embedding``, which is added to the time embedding.

    ``fps`` is the rate that it is told, for all clips, and a part of its configuration; `fold_fps` makes it part of
    the weights.
    """

    @wraps(UNet3DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, fps: float = FPS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        first = self.time_embedding.linear_1
        self.fps_embedding = TimestepEmbedding(first.in_features, first.out_features)
        self.fps = fps
        self.time_embedding.register_forward_hook(self._add_fps)

    __init__.__signature__ = _signature_with_fps()  # type: ignore[attr-defined]  # decides what is read from a config

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.config["fps"])

    @fps.setter
    def fps(self, fps: float) -> None:
        self.register_to_config(fps=float(fps))

    def embed_fps(self, fps: Tensor) -> Tensor:
        """What frame rates ``(B,)`` add to the time embedding, ``(B, d)``."""
        frequencies: Tensor = self.time_proj(fps)
        embedded: Tensor = self.fps_embedding(frequencies.to(self.fps_embedding.linear_1.weight.dtype))
        return embedded

    def _add_fps(self, module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:  # noqa: ARG002 - a hook
        return embedded + self.embed_fps(torch.full((len(embedded),), self.fps, device=embedded.device))


@torch.no_grad()
def fold_fps(unet: FpsUNet3DConditionModel, fps: float) -> UNet3DConditionModel:
    """The same network at one frame rate, which becomes part of ``time_embedding.linear_2.bias``.

    Returns:
        A plain UNet3DConditionModel that shares the other weights.

    Raises:
        UserError: the network is quantised.
    """
    if is_quantised(unet):
        raise UserError(f"a quantised {type(unet).__name__} cannot be folded; fold it before, in fp32 or bf16")
    bias = "time_embedding.linear_2.bias"
    state = {name: value for name, value in unet.state_dict().items() if not name.startswith("fps_embedding.")}
    state[bias] = state[bias] + unet.embed_fps(torch.tensor([fps], device=state[bias].device))[0]
    with torch.device("meta"):
        folded = UNet3DConditionModel.from_config({k: v for k, v in unet.config.items() if k != "fps"})
    folded.load_state_dict(state, assign=True)
    plain: UNet3DConditionModel = folded.train(unet.training)
    return plain


def checkpoint_blocks(unet: UNet3DConditionModel) -> None:
    """Gradient checkpointing, which diffusers does not offer for this network: its layers keep their inputs only.

    Every residual, convolutional and attention layer of its blocks is affected; gradients stay the same. Experts may
    be attached before or after. `uncheckpoint_blocks` undoes it.
    """
    for layer in _checkpointed_layers(unet):
        setattr(layer, _CHECKPOINT, partial(checkpoint, use_reentrant=False))
        layer.forward = MethodType(_forward_checkpointed, layer)  # bound, so that a deep copy runs itself


def uncheckpoint_blocks(unet: UNet3DConditionModel) -> None:
    """Undo `checkpoint_blocks`; without it before, nothing happens."""
    for layer in _checkpointed_layers(unet):
        if vars(layer).pop("forward", None) is not None:
            delattr(layer, _CHECKPOINT)
            if isinstance(layer, ModelMixin):
                setattr(layer, _CHECKPOINT, None)  # as diffusers made it


def _checkpointed_layers(unet: UNet3DConditionModel) -> list[Any]:
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    return [unet.transformer_in, *(layer for b in blocks for name in _CHECKPOINTED for layer in getattr(b, name, ()))]


def _forward_checkpointed(layer: Any, *args: Any, **kwargs: Any) -> Any:
    run = partial(type(layer).forward, layer, **kwargs)
    return getattr(layer, _CHECKPOINT)(run, *args) if torch.is_grad_enabled() else run(*args)


class VideoCrafter(Family):
    """A `Family` around a `TextToVideoSDPipeline`.

    VideoCrafter2 takes the last but one hidden states of OpenCLIP, through the final norm. As with Stable Diffusion 2,
    a CLIPTextModel of one layer less (23 instead of 24) gives just that as its last hidden states.

    Args:
        parts: the pipeline.
        source: where it was loaded from.
        fps: the frame rate that a `FpsUNet3DConditionModel` is told; ``None`` leaves it as it is (`FPS` at first).

    Raises:
        UserError: ``fps`` is given, but the denoiser has no fps embedding.
    """

    pipeline_class = TextToVideoSDPipeline
    default_num_frames = 16

    def __init__(self, parts: Any, source: str = "a pipeline in memory", fps: float | None = None) -> None:
        if fps is not None and not isinstance(parts.unet, FpsUNet3DConditionModel):
            raise UserError(f"{source}: a {type(parts.unet).__name__} takes no fps; got {fps}")
        if fps is not None:
            parts.unet.fps = fps
        super().__init__(parts, source)
        self._drawing = parts
        if LEAST_SIGNAL in parts.scheduler.config:
            kind = ScaledSignalDDIMScheduler
            scheduler = kind.from_config(parts.scheduler.config, clip_sample=False, thresholding=False)
            self._drawing = TextToVideoSDPipeline(**{**parts.components, "scheduler": scheduler})
            self._drawing.set_progress_bar_config(disable=True)

    @property
    def fps(self) -> float | None:
        """The frame rate that the denoiser is told; ``None`` where it has no fps embedding."""
        return getattr(self.parts.unet, "fps", None)

    @property
    def default_size(self) -> tuple[int, int]:
        """VideoCrafter2's 320 x 512, unless the denoiser's configuration names the side of its latents."""
        return (320, 512) if self.parts.unet.config.sample_size is None else super().default_size

    def make_noise(self) -> DiscreteNoise:
        """See `Family`; the latents are scaled where the scheduler says so."""
        return DiscreteNoise(self.parts.scheduler, self.source, signal_scale_of(self.parts.scheduler))

    def pipeline(self) -> Any:
        """A pipeline of the same modules that samples by `ScaledSignalDDIMScheduler` where the signal fades."""
        return self._drawing

    def checkpoint_gradients(self) -> None:
        """By `checkpoint_blocks`: a UNet3DConditionModel cannot do it itself."""
        checkpoint_blocks(self.parts.unet)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Clips ``(B, 3, F, H, W)`` to ``(B, 4, F, h, w)``; no frame sees another."""
        clips = [encode_posterior_mean(self.parts.vae, clip.transpose(0, 1)) for clip in pixels]
        return torch.stack(clips).transpose(1, 2)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids``."""
        return {"input_ids": token_ids(self.parts.tokenizer, captions).input_ids}

    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The last hidden states, ``(B, L, d)``."""
        encoder = self.parts.text_encoder
        return {"encoder_hidden_states": encoder(**cast(dict(tokens), encoder))[0]}
