"""Text encoders with experts of the denoising timestep: prompts are encoded anew as sampling goes on (TSM, 3.2).

A diffusers pipeline encodes its prompts once, before the first step. Here its ``encode_prompt`` is remembered with its
arguments and results; when other experts take over, it is called again with the timestep bound, and the denoiser is
given the new features wherever the pipeline passes the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from timestep_experts.mixture import Mixture

DENOISERS = ("unet", "transformer", "transformer_2")
TextExperts = Literal["step", "interval", "off"]
_ATTRIBUTE = "_timestep_experts_reencoder"


@dataclass
class Reencoder:
    """Keeps a pipeline's text features in step with the timestep. Made by `attach`; `remove` undoes it.

    Args:
        pipeline: a diffusers pipeline whose text encoders carry experts.
        mixture: over its text encoders and denoisers.
        when: ``step`` encodes at every new timestep, as routers ask for; ``interval`` where another expert takes over;
            ``off`` encodes once, without experts.
        num_text_passes: how often ``encode_prompt`` ran.
    """

    pipeline: Any
    mixture: Mixture
    when: TextExperts
    num_text_passes: int = 0
    _encode: Callable[..., Any] = field(init=False)
    _arguments: tuple[Any, Any] = field(init=False, default=((), {}))
    _originals: list[Tensor] = field(init=False, default_factory=list)
    _features: dict[Hashable, list[Tensor]] = field(init=False, default_factory=dict)
    _handles: list[Any] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._encode = self.pipeline.encode_prompt
        self.pipeline.encode_prompt = self._remember
        for name in DENOISERS:
            denoiser = getattr(self.pipeline, name, None)
            if isinstance(denoiser, nn.Module):
                self._handles.append(denoiser.register_forward_pre_hook(self._refresh, with_kwargs=True))
        setattr(self.pipeline, _ATTRIBUTE, self)

    @classmethod
    def of(cls, pipeline: Any) -> Reencoder | None:
        """The one that a pipeline carries, if any."""
        found: Reencoder | None = getattr(pipeline, _ATTRIBUTE, None)
        return found

    def remove(self) -> None:
        """Give the pipeline its own ``encode_prompt`` back."""
        del self.pipeline.encode_prompt
        delattr(self.pipeline, _ATTRIBUTE)
        for handle in self._handles:
            handle.remove()

    def _remember(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline calls: the features without experts, which mark the places where others are put."""
        if repr((args, kwargs)) != repr(self._arguments):
            self._features.clear()
        self._arguments = (args, kwargs)
        self.num_text_passes += 1
        with self.mixture.using("off"):
            outputs = self._encode(*args, **kwargs)
        self._originals = _tensors(outputs)
        return outputs

    def _refresh(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        t = self.mixture.timesteps
        if self.when == "off" or self.mixture.mode == "off" or t is None or not self._originals:
            return None
        features = self._features_at(t[:1])
        return args, {name: self._renew(value, features) for name, value in kwargs.items()}

    def _features_at(self, t: Tensor) -> list[Tensor]:
        scales = self.mixture.spec.scales
        key: Hashable = t.item() if self.when == "step" else tuple(s.partition.index_of(t.item()) for s in scales)
        if key not in self._features:
            self.num_text_passes += 1
            args, kwargs = self._arguments
            with self.mixture.at(t):
                self._features[key] = _tensors(self._encode(*args, **kwargs))
        return self._features[key]

    def _renew(self, value: Any, features: list[Tensor]) -> Any:
        """An argument of the denoiser, with every text feature in it replaced by its new value."""
        if isinstance(value, dict):
            return {name: self._renew(inner, features) for name, inner in value.items()}
        if not isinstance(value, Tensor):
            return value
        origin = _origin(value, self._originals)
        return value if origin is None else torch.cat([features[i] for i in origin]).to(value.dtype)


def _tensors(outputs: Any) -> list[Tensor]:
    return [output for output in (outputs if isinstance(outputs, tuple | list) else [outputs]) if output is not None]


def _origin(value: Tensor, originals: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Which of the pipeline's text features a tensor is, or which two it joins for classifier-free guidance."""
    indices = range(len(originals))
    for candidate in [*((i,) for i in indices), *product(indices, repeat=2)]:
        parts = [originals[i] for i in candidate]
        if sum(len(part) for part in parts) != len(value) or any(p.shape[1:] != value.shape[1:] for p in parts):
            continue
        if torch.equal(torch.cat(parts).to(value.dtype), value):
            return candidate
    return None
