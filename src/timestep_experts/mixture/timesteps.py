"""How denoisers are told the timestep: most by t itself, some by t / 1000, some by the share that is not noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

Value = TypeVar("Value", float, Tensor)


@dataclass(frozen=True)
class TimestepInput:
    """The argument by which a denoiser is told the timestep: ``t = scale * value + offset``.

    Args:
        argument: its name in the network's ``forward``.
        scale: see above; not 0.
        offset: see above.
    """

    argument: str = "timestep"
    scale: float = 1.0
    offset: float = 0.0

    def t_of(self, value: Value) -> Value:
        """The timestep that a value means."""
        return value if self == TimestepInput(self.argument) else value * self.scale + self.offset

    def value_of(self, t: Value) -> Value:
        """The value that means a timestep."""
        return t if self == TimestepInput(self.argument) else (t - self.offset) / self.scale


_SHARE_OF_NOISE = TimestepInput(scale=1000.0)
_SHARE_OF_SIGNAL = TimestepInput(scale=-1000.0, offset=1000.0)

_BY_CLASS = {
    "AuraFlowTransformer2DModel": _SHARE_OF_NOISE,
    "BriaFibo2Transformer2DModel": _SHARE_OF_NOISE,
    "ChromaTransformer2DModel": _SHARE_OF_NOISE,
    "Flux2Transformer2DModel": _SHARE_OF_NOISE,
    "FluxTransformer2DModel": _SHARE_OF_NOISE,
    "HiDreamImageTransformer2DModel": TimestepInput("timesteps"),
    "Ideogram4Transformer2DModel": _SHARE_OF_SIGNAL,
    "Krea2Transformer2DModel": _SHARE_OF_NOISE,
    "LongCatImageTransformer2DModel": _SHARE_OF_NOISE,
    "Lumina2Transformer2DModel": _SHARE_OF_SIGNAL,
    "LuminaNextDiT2DModel": _SHARE_OF_SIGNAL,
    "MochiTransformer3DModel": TimestepInput(scale=-1.0, offset=1000.0),
    "NucleusMoEImageTransformer2DModel": _SHARE_OF_NOISE,
    "OvisImageTransformer2DModel": _SHARE_OF_NOISE,
    "PRXTransformer2DModel": _SHARE_OF_NOISE,
    "QwenImageTransformer2DModel": _SHARE_OF_NOISE,
    "ZImageTransformer2DModel": TimestepInput("t", -1000.0, 1000.0),
}
"""Denoisers of diffusers that their pipelines do not call with ``timestep=t``, for schedulers of 1000 timesteps."""


def timestep_input_of(network: nn.Module) -> TimestepInput:
    """How a network's own pipeline calls it: with t itself, but for the classes of diffusers that are listed here.

    Sana's ``timestep_scale`` is read from the network's configuration.
    """
    names = [kind.__name__ for kind in type(network).__mro__]
    if "SanaTransformer2DModel" in names:
        config: Any = network.config
        return TimestepInput(scale=1 / float(config.timestep_scale))
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), TimestepInput())
