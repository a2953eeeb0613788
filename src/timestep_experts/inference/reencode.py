"""Text encoders with experts of the denoising timestep: prompts are encoded anew as sampling goes on (TSM, 3.2).

A diffusers pipeline encodes its prompts once, before the first step. Here its ``encode_prompt`` is remembered with its
arguments and results; when other experts take over, it is called again with the timestep bound, and the denoiser is
given the new features wherever the pipeline passes the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from timestep_experts.errors import UserError
from timestep_experts.formats.model_folders import DENOISERS
from timestep_experts.mixture import Mixture
from timestep_experts.mixture.carriers import uncompiled

TextExperts = Literal["step", "interval", "off"]
_ATTRIBUTE = "_timestep_experts_reencoder"
_MOST_JOINED = 3  # features of one argument: wanted and unwanted, and some editing pipelines add one more


@dataclass
class _Encoding:
    """One call of an ``encode_prompt``: what it gave without experts, and what experts made of it since, by `_key`."""

    encode: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    originals: list[Tensor]
    features: dict[Hashable, list[Tensor]] = field(default_factory=dict)

    def repeats(self, other: _Encoding) -> bool:
        """Whether two calls are the same; results are compared too, for a tensor's ``repr`` does not show all of it."""
        return (
            self.encode == other.encode
            and repr((self.args, self.kwargs)) == repr((other.args, other.kwargs))
            and len(self.originals) == len(other.originals)
            and all(map(torch.equal, self.originals, other.originals))
        )


@dataclass
class Reencoder:
    """Keeps a pipeline's text features in step with the timestep. Made by `attach`; `remove` undoes it.

    Text features that a caller computed and passed as ``prompt_embeds`` stay as they are.

    Args:
        pipeline: a diffusers pipeline whose text encoders carry experts.
        mixture: over its text encoders and denoisers.
        when: ``step`` encodes at every new timestep, as routers ask for; ``interval`` where another expert takes over;
            ``off`` encodes once, without experts.
        num_text_passes: how often an ``encode_prompt`` ran.
    """

    pipeline: Any
    mixture: Mixture
    when: TextExperts
    num_text_passes: int = 0
    _followed: list[Any] = field(init=False, default_factory=list)
    _handles: list[Any] = field(init=False, default_factory=list)
    _encodings: list[_Encoding] = field(init=False, default_factory=list)  # of the running picture
    _earlier: list[_Encoding] = field(init=False, default_factory=list)  # of the one before, while prompts are encoded
    _is_drawing: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        for name, network in self.mixture.networks.items():
            if name not in DENOISERS:
                self._handles.append(network.register_forward_pre_hook(self._refuse_strangers))
        for name in DENOISERS:
            denoiser = getattr(self.pipeline, name, None)
            if isinstance(denoiser, nn.Module):
                self._handles.append(uncompiled(denoiser).register_forward_pre_hook(self._refresh, with_kwargs=True))
        self.follow(self.pipeline)

    @classmethod
    def of(cls, pipeline: Any) -> Reencoder | None:
        """The one that a pipeline carries, if any."""
        found: Reencoder | None = getattr(pipeline, _ATTRIBUTE, None)
        return found

    def follow(self, pipeline: Any) -> None:
        """Serve another pipeline over the same networks too, e.g. one made by ``from_pipe``.

        Raises:
            UserError: it is served already, or its text encoders are not those that carry the experts.
        """
        if self.of(pipeline) is not None:
            raise UserError(f"the prompts of this {type(pipeline).__name__} are encoded anew already")
        names = [name for name in self.mixture.networks if name not in DENOISERS]
        own = {name: getattr(pipeline, name, None) for name in names}
        other = [n for n, part in own.items() if part is None or uncompiled(part) is not self.mixture.networks[n]]
        if other:
            raise UserError(
                f"this {type(pipeline).__name__} does not share {', '.join(other)} with the"
                f" {type(self.pipeline).__name__} that carries the experts; make it by from_pipe or from its components"
            )
        pipeline.encode_prompt = partial(self._remember, pipeline.encode_prompt)
        setattr(pipeline, _ATTRIBUTE, self)
        self._followed.append(pipeline)

    def remove(self) -> None:
        """Give the pipelines their own ``encode_prompt`` back."""
        for pipeline in self._followed:
            del pipeline.encode_prompt
            delattr(pipeline, _ATTRIBUTE)
        for handle in self._handles:
            handle.remove()

    def _remember(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a pipeline calls: the features without experts, which mark the places where others are put."""
        if self._is_drawing:  # a new picture begins; some pipelines encode twice for it
            self._earlier, self._encodings, self._is_drawing = self._encodings, [], False
        self.num_text_passes += 1
        with self.mixture.using("off"):
            outputs = encode(*args, **kwargs)
        encoding = _Encoding(encode, args, kwargs, _tensors(outputs))
        known = (other for other in (*self._encodings, *self._earlier) if other.repeats(encoding))
        self._encodings.append(next(known, encoding))
        return outputs

    def _refuse_strangers(self, encoder: nn.Module, _: Any) -> None:
        """A pipeline that is not followed would encode its prompts by experts of no timestep, once and for all."""
        if self.mixture.mode != "off" and not self.mixture.is_bound:
            raise UserError(
                f"this {type(encoder).__name__} carries timestep experts, and what calls it says no timestep. For a"
                f" pipeline made from the {type(self.pipeline).__name__} that they were attached to:"
                " Reencoder.of(first).follow(other), or attach to the other one instead"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _refresh(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._is_drawing, self._earlier = True, []
        t = self.mixture.timesteps
        if self.when == "off" or self.mixture.mode == "off" or t is None:
            return None
        return tuple(self._renew(arg, t[:1]) for arg in args), self._renew(kwargs, t[:1])

    def _renew(self, value: Any, t: Tensor) -> Any:
        """An argument of the denoiser, with every text feature in it replaced by its new value."""
        if isinstance(value, dict):
            return {name: self._renew(inner, t) for name, inner in value.items()}
        if not isinstance(value, Tensor) or not value.dim():
            return value
        origin = self._origin(value)
        if origin is None:
            return value
        return torch.cat([self._features_at(encoding, t)[i] for encoding, i in origin]).to(value.dtype)

    def _features_at(self, encoding: _Encoding, t: Tensor) -> list[Tensor]:
        scales = self.mixture.spec.scales
        place: Hashable = t.item() if self.when == "step" else tuple(s.partition.index_of(t.item()) for s in scales)
        key = (self.mixture.mode, place)
        if key not in encoding.features:
            self.num_text_passes += 1
            with self.mixture.at(t):
                encoding.features[key] = _tensors(encoding.encode(*encoding.args, **encoding.kwargs))
        return encoding.features[key]

    def _origin(self, value: Tensor) -> tuple[tuple[_Encoding, int], ...] | None:
        """Which of the pipeline's text features a tensor is, or which it joins for classifier-free guidance."""
        known = [(encoding, i) for encoding in self._encodings for i in range(len(encoding.originals))]
        for count in range(1, _MOST_JOINED + 1):
            for candidate in product(known, repeat=count):
                parts = [encoding.originals[i] for encoding, i in candidate]
                if sum(len(part) for part in parts) != len(value) or any(p.shape[1:] != value.shape[1:] for p in parts):
                    continue
                if torch.equal(torch.cat(parts).to(value.dtype), value):
                    return candidate
        return None


@contextmanager
def reencoding(pipeline: Any, mixture: Mixture, when: TextExperts | None = None) -> Iterator[Reencoder | None]:
    """A `Reencoder` for a while, for a mixture that is attached already; ``None`` where no text encoder carries any.

    Args:
        pipeline: a diffusers pipeline around the mixture's networks.
        mixture: over its networks by name.
        when: see `Reencoder`; ``None`` is ``step`` when routing and ``interval`` otherwise.
    """
    reencoder = reencode(pipeline, mixture, when)
    try:
        yield reencoder
    finally:
        if reencoder is not None:
            reencoder.remove()


def reencode(pipeline: Any, mixture: Mixture, when: TextExperts | None = None) -> Reencoder | None:
    """`reencoding` without an end."""
    if all(name in DENOISERS for name in mixture.networks if name):
        return None
    return Reencoder(pipeline, mixture, when or ("step" if mixture.mode == "route" else "interval"))


def _tensors(outputs: Any) -> list[Tensor]:
    return [output for output in (outputs if isinstance(outputs, tuple | list) else [outputs]) if output is not None]
