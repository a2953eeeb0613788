"""What training, evaluation and sampling need to know of a base model."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from timestep_experts.errors import UserError
from timestep_experts.intervals import Interval
from timestep_experts.mixture import bound_to
from timestep_experts.models.encoding import (
    CutCaptions,
    cast,
    count_tokens,
    encode_posterior_mean,
    plain_tensors,
)
from timestep_experts.models.files import check_folder, check_single_file, check_weights
from timestep_experts.models.noise import NoiseProcess
from timestep_experts.models.quantization import Quantization, quantised_names, quantization_config
from timestep_experts.models.sources import weights_variant

Conditioning: TypeAlias = Mapping[str, Tensor]
"""Text features by name, batch first."""

SECOND_DENOISERS = ("transformer_2",)
"""Further denoisers that a pipeline may have, by name."""


@dataclass(frozen=True)
class Samples:
    """What a denoiser is trained or measured on, on its device.

    Args:
        latents: ``(B, c, ...)``, without noise.
        noise: like the latents.
        t: ``(B,)``.
        conditioning: text features, for captions that are dropped those of the empty one.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    conditioning: Conditioning


@dataclass(frozen=True)
class Denoised:
    """Samples as the denoiser sees them, what it predicts, and what it should predict; all like the latents."""

    noisy: Tensor
    predicted: Tensor
    target: Tensor


_LATENT_FACTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")


class Family(ABC):
    """A base model around its diffusers pipeline; all parts are frozen and in evaluation mode.

    A subclass says what differs: the pipeline's class, its parts, how pixels and text are encoded, and how the denoiser
    is called.

    Args:
        parts: the pipeline.
        source: where it was loaded from.
    """

    pipeline_class: ClassVar[type]
    denoiser_name: ClassVar[str] = "unet"
    autoencoder_name: ClassVar[str | None] = "vae"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizer_names: ClassVar[tuple[str, ...]] = ("tokenizer",)
    default_num_frames: ClassVar[int | None] = None
    max_sequence_length: int | None = None
    """Tokens of the long text encoder (T5); ``None`` where a tokenizer's own length is the only one."""
    loading_options: ClassVar[Mapping[str, Any]] = {}
    sampling_options: ClassVar[Mapping[str, Any]] = {}
    """What the pipeline must be told to generate for the same text and at the same size as in training."""

    def __init__(self, parts: Any, source: str = "a pipeline in memory") -> None:
        self.parts = parts
        self.source = source
        for component in parts.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        parts.set_progress_bar_config(disable=True)
        self.noise = self.make_noise()

    @classmethod
    def load(
        cls,
        source: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        quantization: Quantization | None = None,
    ) -> Self:
        """Load a diffusers folder, a hub id, or a single ``.safetensors`` file.

        Raises:
            UserError: it cannot be loaded, or not quantised here, or its objective is not this family's.
        """
        kind: Any = cls.pipeline_class
        is_one_file = Path(source).suffix == ".safetensors"
        load = kind.from_single_file if is_one_file else kind.from_pretrained
        try:
            if quantization is not None and is_one_file:
                raise UserError(f"base quantization {quantization!r} needs a folder or a hub id, not a single file")
            cls._check_files(Path(source))
            options = {**cls.loading_options, **cls._left_out(source)}
            if quantization is not None:
                options["quantization_config"] = cls._quantised(source, device, dtype, quantization)
            if not is_one_file:
                options["variant"] = cls._variant(source)
            pipeline = load(source, dtype=dtype, **options)
            check_weights(Path(source), {k: v for k, v in pipeline.components.items() if isinstance(v, nn.Module)})
            pipeline.to(device)
        except MemoryError:
            raise
        except Exception as error:  # of safetensors, tokenizers and others: all mean that the files are no such base
            raise UserError(f"cannot load a {kind.__name__} from {source!r}: {error}") from error
        return cls(pipeline, source)

    @classmethod
    def _variant(cls, source: str) -> str | None:
        """The variant of the denoiser's files, where there are no others."""
        return weights_variant(Path(source), cls.denoiser_name) if Path(source).is_dir() else None

    @classmethod
    def _check_files(cls, source: Path) -> None:
        if source.suffix == ".safetensors":
            check_single_file(source)
        elif source.is_dir():
            needed = (cls.denoiser_name, cls.autoencoder_name, *cls.text_encoder_names, *cls.tokenizer_names)
            check_folder(source, cls.pipeline_class, [name for name in needed if name], cls.loading_options)

    @classmethod
    def around(cls, source: str, networks: Mapping[str, nn.Module | None]) -> Self:
        """A family of networks made elsewhere, or left out; the rest of its pipeline is loaded.

        Raises:
            UserError: the rest cannot be loaded.
        """
        kind: Any = cls.pipeline_class
        try:
            pipeline = kind.from_pretrained(source, **{**cls.loading_options, **cls._left_out(source), **networks})
        except MemoryError:
            raise
        except Exception as error:  # see `load`
            raise UserError(f"cannot load a {kind.__name__} from {source!r}: {error}") from error
        return cls(pipeline, source)

    @classmethod
    def _left_out(cls, source: str) -> dict[str, None]:
        """The text encoders and tokenizers that a folder was saved without; diffusers wants to be told of each."""
        if Path(source).suffix == ".safetensors":
            return {}
        kind: Any = cls.pipeline_class
        index = kind.load_config(source)
        return {name: None for name in (*cls.text_encoder_names, *cls.tokenizer_names) if index.get(name) == [None] * 2}

    @classmethod
    def _quantised(cls, source: str, device: torch.device, dtype: torch.dtype, kind: Quantization) -> Any:
        """The configuration that quantises denoisers and T5s."""
        pipeline: Any = cls.pipeline_class
        names = quantised_names(pipeline.load_config(source), (cls.denoiser_name, *SECOND_DENOISERS))
        return quantization_config(kind, names, dtype, device)

    @property
    def is_video(self) -> bool:
        """Whether it generates clips."""
        return self.default_num_frames is not None

    @property
    def denoiser(self) -> nn.Module:
        """The network that experts are attached to; its ``forward`` takes ``timestep``."""
        module: nn.Module = getattr(self.parts, self.denoiser_name)
        return module

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """All denoisers by their names in the pipeline: one, unless several share out the timesteps."""
        return {self.denoiser_name: self.denoiser}

    @property
    def owned_intervals(self) -> dict[str, Interval]:
        """The timesteps of each denoiser, where there are several."""
        return {}

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by their names in the pipeline; without those that it was loaded without."""
        modules = {name: getattr(self.parts, name) for name in self.text_encoder_names}
        return {name: module for name, module in modules.items() if module is not None}

    @property
    def has_empty_caption(self) -> bool:
        """Whether the empty caption means that there is none, so that captions may be dropped in training."""
        return True

    @property
    def no_caption(self) -> str:
        """What `tokenize` is given for a caption that is not there: the empty one, as pipelines do."""
        return ""

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return next(self.denoiser.parameters()).device

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the base generates unless told otherwise."""
        config: Any = self.denoiser.config
        side = int(config.sample_size) * int(getattr(self.parts, "vae_scale_factor", 1))
        return side, side

    @property
    def size_multiple(self) -> int:
        """What height and width in pixels must divide by: diffusers' pipelines of UNets ask for 8."""
        return math.lcm(8, int(getattr(self.parts, "vae_scale_factor", 1)))

    def check_size(self, size: tuple[int, int], num_frames: int | None = None) -> None:
        """See that pictures or clips of this size can be encoded, denoised and generated.

        Args:
            size: height and width in pixels.
            num_frames: of clips; ``None`` for pictures.

        Raises:
            UserError: they cannot; says what is allowed.
        """
        height, width = size
        if height % self.size_multiple or width % self.size_multiple:
            raise UserError(
                f"{self.source}: a size of {width} x {height} pixels does not fit; width and height must divide by"
                f" {self.size_multiple}"
            )
        if num_frames is not None and not self.is_video:
            raise UserError(f"{self.source} generates pictures, which have no frames; got {num_frames} frames")

    def checkpoint_gradients(self) -> None:
        """Trade compute for memory: keep the activations of block boundaries alone."""
        for module in self.denoisers.values():
            denoiser: Any = module
            denoiser.enable_gradient_checkpointing()

    @contextmanager
    def encoders_on(self, device: torch.device, *, with_text: bool = True) -> Iterator[None]:
        """The autoencoder, and the text encoders if ``with_text``, on some device for a while, then where they were."""
        autoencoder = {} if self.autoencoder_name is None else {"": getattr(self.parts, self.autoencoder_name)}
        modules = {**autoencoder, **(self.text_encoders if with_text else {})}.values()
        homes = [next(module.parameters()).device for module in modules]
        try:
            for module in modules:
                module.to(device)
            yield
        finally:
            for module, home in zip(modules, homes, strict=True):
                module.to(home)

    def set_max_sequence_length(self, max_sequence_length: int) -> None:
        """Tokens of the long text encoder, fewer or more than the family's default.

        Raises:
            UserError: it is not positive, or the family has no such encoder.
        """
        if self.max_sequence_length is None:
            raise UserError(f"{self.source}: a {type(self.parts).__name__} takes no max_sequence_length")
        if max_sequence_length < 1:
            raise UserError(f"max_sequence_length must be positive; got {max_sequence_length}")
        self.max_sequence_length = max_sequence_length

    def pipeline(self) -> Any:
        """The diffusers pipeline around the same modules."""
        return self.parts

    def with_denoiser(self, denoiser: nn.Module) -> Self:
        """The same base around another denoiser, all else shared; this one keeps its own.

        Raises:
            UserError: the base shares out its timesteps among several denoisers.
        """
        if len(self.denoisers) > 1:
            raise UserError(f"{self.source} has several denoisers ({', '.join(self.denoisers)}); one is needed")
        twin = copy(self)
        twin.parts = copy(self.parts)
        setattr(twin.parts, self.denoiser_name, denoiser)
        return twin

    def encoder_fingerprint(self) -> str:
        """A hash of whatever decides latents and text features: weights, settings and vocabularies."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for name in (*self.text_encoder_names, self.autoencoder_name):
            module = getattr(self.parts, name) if name else None
            for key, value in module.state_dict().items() if module else ():
                digest.update(key.encode())
                for tensor in plain_tensors(value):
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name in self.tokenizer_names:
            tokenizer = getattr(self.parts, name)
            if tokenizer is not None:
                digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
        digest.update(repr(self.encoding_settings()).encode())
        return digest.hexdigest()

    def encoding_settings(self) -> tuple[object, ...]:
        """Whatever else than weights and vocabularies decides latents and text features."""
        config = getattr(self.parts, self.autoencoder_name).config if self.autoencoder_name else {}
        return (self.token_limits, self.no_caption, *(config.get(fact) for fact in _LATENT_FACTS))

    def prepare_captions(self, captions: Sequence[str]) -> list[str]:
        """What the pipeline does to captions before it tokenises them: nothing, unless a family says otherwise."""
        return list(captions)

    @property
    def token_limits(self) -> dict[str, int]:
        """The number of tokens that are read of a caption, by the name of the tokenizer; a long one (T5) comes last."""
        tokenizers = {name: getattr(self.parts, name) for name in self.tokenizer_names}
        limits = {name: int(t.model_max_length) for name, t in tokenizers.items() if t is not None}
        if self.max_sequence_length is not None and self.tokenizer_names[-1] in limits:
            limits[self.tokenizer_names[-1]] = self.max_sequence_length
        return limits

    def cut_captions(self, captions: Sequence[str]) -> list[CutCaptions]:
        """Which tokenizers cut some of these captions, how many, and how long the longest is; at least one caption."""
        prepared, found = self.prepare_captions(captions), []
        for name, limit in self.token_limits.items():
            lengths = count_tokens(getattr(self.parts, name), prepared)
            count = sum(length > limit for length in lengths)
            found += [CutCaptions(name, limit, count, max(lengths))] if count else []
        return found

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Text features of each caption as the pipeline computes them, in the encoders' dtype."""
        return self.encode_text(self.tokenize(captions))

    def features_at(self, tokens: Mapping[str, Tensor], t: Tensor) -> dict[str, Tensor]:
        """`encode_text` by the experts in charge at ``t (B,)``, each caption's own; gradients reach them."""
        with bound_to(self.text_encoders.values(), t):
            return self.encode_text(tokens)

    @abstractmethod
    def make_noise(self) -> NoiseProcess:
        """The forward process, read off the pipeline's scheduler."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pictures ``(B, 3, H, W)`` or clips ``(B, 3, F, H, W)`` in [-1, 1] to scaled latents, fp32."""
        return encode_posterior_mean(self.parts.vae, pixels)

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids (and masks) of each caption, int64, by name."""

    @abstractmethod
    def encode_text(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Text features of what `tokenize` gave, in the encoders' dtype; gradients reach experts on the encoders."""

    def denoise(self, samples: Samples) -> Denoised:
        """Add the noise, predict, and give the target: the base's own loss compares the last two (TSM, eq. 3)."""
        noisy = self.noise.add_noise(samples.latents, samples.noise, samples.t)
        predicted = self.predict(noisy, samples.t, samples.conditioning)
        return Denoised(noisy, predicted, self.noise.target(samples.latents, samples.noise, samples.t))

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """What the denoiser says; inputs are cast to its dtype."""
        denoiser: Any = self.denoiser
        predicted: Tensor = denoiser(noisy.to(denoiser.dtype), timestep=t, **cast(dict(conditioning), denoiser)).sample
        return predicted
