"""Channel-wise projections (DeMe, arXiv 2410.06664, 3.2): a 1x1 convolution without bias on what a block gives.

A projection W is kept as W - I, which starts at zero: then the identity is exact in any precision, weight decay pulls
towards it, and W's task vector is the tensor itself. ``paper`` puts one after every down, mid and up block, on the
block's own output and not on the skips that it hands over. ``foldable`` puts one on the output of a linear or
convolutional layer inside each block, where W folds into that layer's weight and bias exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from timestep_experts.errors import UserError

Placement: TypeAlias = Literal["off", "paper", "foldable"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
_STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks")
_LAST_LAYERS = re.compile(r"(.*\.)?(to_out\.0|to_add_out|net\.2|proj_out)")


@dataclass(frozen=True)
class Place:
    """Where a projection sits.

    Args:
        module: the name of the module whose output it changes.
        channels: of that output.
        channels_last: whether channels are the last dimension, as a linear layer gives them, or the second.
        folds_into: the layers that W folds into exactly; empty where it must stay.
    """

    module: str
    channels: int
    channels_last: bool
    folds_into: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the projection: ``<module>.projection``."""
        return f"{self.module}.projection"


def find_places(denoiser: nn.Module, placement: Placement) -> list[Place]:
    """Where a denoiser gets its projections, in its own order; channels are read from the blocks.

    Raises:
        UserError: an unknown placement, or a denoiser that has no such place.
    """
    if placement not in PLACEMENTS:
        raise UserError(f"unknown placement {placement!r} of projections: allowed are {', '.join(PLACEMENTS)}")
    if placement == "off":
        return []
    blocks = _blocks_of(denoiser)
    if placement == "paper":
        places = [_after(name, block) for name, block in blocks.items()]
    elif blocks:
        places = [_inside(name, block) for name, block in blocks.items()]
    else:
        places = [_on(name, layer) for name, layer in _last_layers_of(denoiser)]
    if not places:
        need = "down, mid and up blocks" if placement == "paper" else "a UNet's blocks or a transformer's"
        hint = "; foldable projections fit transformers too" if placement == "paper" else ""
        raise UserError(f"projection {placement!r} needs {need}, which a {type(denoiser).__name__} has not{hint}")
    return places


class Projections(nn.Module):
    """The projections of one denoiser, on it from the start; the denoiser's own ``state_dict`` does not hold them.

    Parameters are ``W - I`` in fp32, ``(C, C)``, zero at first.

    Args:
        denoiser: whose outputs are changed by hooks.
        places: see `find_places`.
    """

    def __init__(self, denoiser: nn.Module, places: list[Place]) -> None:
        super().__init__()
        self.places = places
        device = next(denoiser.parameters()).device
        self.deltas = nn.ParameterList(nn.Parameter(torch.zeros(p.channels, p.channels, device=device)) for p in places)
        self._handles = [
            denoiser.get_submodule(place.module).register_forward_hook(_hook(delta, channels_last=place.channels_last))
            for place, delta in zip(places, self.deltas, strict=True)
        ]

    def named_deltas(self) -> dict[str, nn.Parameter]:
        """``W - I`` by ``<module>.projection``."""
        return {place.name: delta for place, delta in zip(self.places, self.deltas, strict=True)}

    def kept(self) -> dict[str, nn.Parameter]:
        """The projections that fold into no layer, and stay beside the weights."""
        return {p.name: d for p, d in zip(self.places, self.deltas, strict=True) if not p.folds_into}

    def detach_hooks(self) -> None:
        """Take the projections off: the denoiser computes with its own weights alone."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def folded_layers(places: list[Place]) -> dict[str, str]:
    """The name of the projection that folds into each layer, by the layer's name."""
    return {layer: place.name for place in places for layer in place.folds_into}


def fold(tensor: Tensor, delta: Tensor) -> Tensor:
    """``W @ tensor`` over the output channels, computed in fp64: a layer's weight or bias behind its projection.

    Args:
        tensor: ``(C, ...)``, the weight or the bias of a linear or convolutional layer of one group.
        delta: ``(C, C)``, ``W - I``.

    Returns:
        In the shape and dtype of ``tensor``.
    """
    flat = tensor.double().reshape(len(tensor), -1)
    return (flat + delta.double() @ flat).reshape(tensor.shape).to(tensor.dtype)


def unfold(tensor: Tensor, delta: Tensor) -> Tensor:
    """Invert `fold`, in fp64, so that the factors can be merged apart from each other.

    Raises:
        UserError: the projection has no inverse.
    """
    flat = tensor.double().reshape(len(tensor), -1)
    matrix = torch.eye(len(delta), dtype=torch.double, device=delta.device) + delta.double()
    try:
        unfolded: Tensor = torch.linalg.solve(matrix, flat)
        return unfolded.reshape(tensor.shape)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise UserError(f"a projection of {len(delta)} channels has no inverse: {error}") from error


def project(output: Tensor, delta: Tensor, *, channels_last: bool) -> Tensor:
    """``output + (W - I) output`` over its channels.

    Args:
        output: ``(B, ..., C)`` if ``channels_last``, else ``(B, C, ...)``.
        delta: ``(C, C)``, ``W - I``.
        channels_last: whether the channels are the last axis, as in the output of a linear layer.
    """
    delta = delta.to(output.dtype)
    if channels_last or output.dim() == 2:
        return output + functional.linear(output, delta)
    kernel = delta.reshape(*delta.shape, *(1,) * (output.dim() - 2))
    return output + _CONVOLUTIONS[output.dim()](output, kernel)


def _hook(delta: nn.Parameter, *, channels_last: bool) -> Callable[..., Any]:
    def change(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return project(output[0], delta, channels_last=channels_last), *output[1:]
        return project(output, delta, channels_last=channels_last)

    return change


def _blocks_of(denoiser: nn.Module) -> dict[str, nn.Module]:
    """A UNet's down, mid and up blocks by name, in the order in which they run; none for other networks."""
    down, mid, up = (getattr(denoiser, name, None) for name in ("down_blocks", "mid_block", "up_blocks"))
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList):
        return {}
    blocks = {f"down_blocks.{i}": block for i, block in enumerate(down)}
    blocks |= {"mid_block": mid} if isinstance(mid, nn.Module) else {}
    return {**blocks, **{f"up_blocks.{i}": block for i, block in enumerate(up)}}


def _after(name: str, block: nn.Module) -> Place:
    """Behind a block; what an up block gives goes to the next block alone, so W may move into its last layers."""
    channels = _channels_of(name, block)
    folds = tuple(f"{name}.{layer}" for layer in _output_layers(block)) if name.startswith("up_blocks.") else ()
    return Place(name, channels, channels_last=False, folds_into=folds)


def _inside(name: str, block: nn.Module) -> Place:
    """On the layer of a block that is nearest to its output: its sampler, its last attention, its last residual."""
    layer = next(_inner_layers(name, block), None)
    if layer is None:
        raise UserError(f"{name}, a {type(block).__name__}, has no layer that a projection folds into")
    return _on(f"{name}.{layer}", block.get_submodule(layer))


def _on(name: str, layer: nn.Module) -> Place:
    channels = int(layer.weight.shape[0])  # type: ignore[index]
    return Place(name, channels, channels_last=isinstance(layer, nn.Linear), folds_into=(name,))


def _inner_layers(name: str, block: nn.Module) -> Iterator[str]:
    ends = list(_sampler_convolutions(block))
    attentions = [
        f"{group}.{inner}"
        for group in ("attentions", "temp_attentions")
        if isinstance(getattr(block, group, None), nn.Module)
        for inner, _ in getattr(block, group).named_modules()
        if re.fullmatch(r"\d+\.(proj_out|to_out\.0)", inner)
    ]
    if name != "mid_block":  # whose last layer is a residual one
        ends += reversed(attentions)
    ends.append(f"resnets.{len(getattr(block, 'resnets', ())) - 1}.conv2")
    modules = dict(block.named_modules(remove_duplicate=False))
    return (end for end in ends if _takes_folding(modules.get(end)))


def _output_layers(block: nn.Module) -> list[str]:
    """The layers whose sum is what a block gives, but for a factor; empty if there is more to it."""
    modules = dict(block.named_modules(remove_duplicate=False))
    if getattr(block, "upsamplers", None) is not None:
        return [end for end in _sampler_convolutions(block) if _takes_folding(modules[end])]
    has_attention = any(getattr(block, name, None) is not None for name in ("attentions", "temp_attentions"))
    if has_attention or getattr(block, "temp_convs", None) is not None or hasattr(block, "skip_conv"):
        return []
    last = f"resnets.{len(getattr(block, 'resnets', ())) - 1}"
    ends = [f"{last}.conv2", f"{last}.conv_shortcut"]
    return ends if all(_takes_folding(modules.get(end)) for end in ends) else []


def _sampler_convolutions(block: nn.Module) -> Iterator[str]:
    for kind in ("upsamplers", "downsamplers"):
        samplers = getattr(block, kind, None)
        if isinstance(samplers, nn.ModuleList) and isinstance(getattr(samplers[-1], "conv", None), nn.Module):
            yield f"{kind}.{len(samplers) - 1}.conv"


def _last_layers_of(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Of a transformer, the linear layers that write to its residual streams."""
    for stack in _STACKS:
        blocks = getattr(denoiser, stack, None)
        for name, layer in blocks.named_modules() if isinstance(blocks, nn.ModuleList) else ():
            if isinstance(layer, nn.Linear) and _LAST_LAYERS.fullmatch(name):
                yield f"{stack}.{name}", layer


def _takes_folding(layer: nn.Module | None) -> bool:
    return isinstance(layer, _FOLDABLE) and getattr(layer, "groups", 1) == 1


def _channels_of(name: str, block: nn.Module) -> int:
    resnets = getattr(block, "resnets", None)
    if not isinstance(resnets, nn.ModuleList) or not hasattr(resnets[-1], "out_channels"):
        raise UserError(f"{name}, a {type(block).__name__}, does not say how many channels it gives")
    return int(resnets[-1].out_channels)  # type: ignore[arg-type]
