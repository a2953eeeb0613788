"""The layers of a network under their own names, whatever others have put around them.

PEFT wraps a layer in one of its own, and ``torch.compile`` wraps a module in an ``OptimizedModule``. Names of layers
are those of the bare network, and experts sit on the innermost layer, so the order of these things does not matter.
Nor does the release of transformers: some name the same layers of CLIP differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from timestep_experts.errors import UserError

_COMPILED = "_orig_mod"
_CLIPS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_INSIDE_CLIP = ("encoder.", "embeddings.", "final_layer_norm")  # below text_model before transformers 5.6
_JOINED_WHEN_FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def uncompiled(network: nn.Module) -> nn.Module:
    """The network that ``torch.compile`` has wrapped, or the network itself."""
    inner = getattr(network, _COMPILED, network)
    return inner if isinstance(inner, nn.Module) else network


def innermost(module: nn.Module) -> nn.Module:
    """The layer that PEFT's layers are wrapped around, or the module itself."""
    read = getattr(module, "get_base_layer", None)
    return read() if callable(read) else module


def named_layers(network: nn.Module) -> dict[str, nn.Module]:
    """All modules below a network by their names in the bare network; a wrapped layer stands for what it wraps.

    Layers of CLIP's text encoder have the names of the files of LoRAs, whatever transformers calls them.
    """
    named: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    lacks_prefix = not hasattr(network, "text_model") and any(k.__name__ in _CLIPS for k in type(network).__mro__)
    for path, module in network.named_modules():
        name = ".".join(part for part in path.split(".") if part != _COMPILED)
        if lacks_prefix and name.startswith(_INSIDE_CLIP):
            name = f"text_model.{name}"
        if not name or name in named or name.startswith(inside):
            continue
        named[name] = innermost(uncompiled(module))
        if named[name] is not uncompiled(module):
            inside = (*inside, f"{name}.")
    return named


def attentions_of(named: dict[str, nn.Module], layers: Iterable[str]) -> list[Any]:
    """The attention modules whose projections carry experts and can be fused into one by diffusers.

    Raises:
        UserError: the parent of a layer reads its weight and never calls it.
    """
    parents: dict[int, nn.Module] = {}
    for layer in layers:
        name, _, leaf = layer.rpartition(".")
        parent = named.get(name)
        if isinstance(parent, nn.MultiheadAttention):
            raise UserError(
                f"{layer} cannot carry experts: its nn.MultiheadAttention reads the weight and never calls the layer"
            )
        if parent is not None and leaf in _JOINED_WHEN_FUSED and hasattr(parent, "fused_projections"):
            parents[id(parent)] = parent
    return list(parents.values())


def reads_text(named: dict[str, nn.Module], layer: str) -> bool:
    """Whether a layer of a denoiser works on tokens of the text: keys and values of cross-attention, and projections.

    Args:
        named: see `named_layers`.
        layer: its name.
    """
    name, _, leaf = layer.rpartition(".")
    is_cross = bool(getattr(named.get(name), "is_cross_attention", False))
    return (is_cross and leaf in ("to_k", "to_v")) or "caption_projection" in layer.split(".")


def require_separate_projections(attentions: Iterable[Any]) -> None:
    """Refuse attention whose projections were fused: the layers that carry experts are then not called.

    Raises:
        UserError: an attention module has fused projections.
    """
    if any(_is_fused(attention) for attention in attentions):
        raise UserError(
            "the query, key and value projections are fused into one layer (fuse_qkv_projections), so the layers that"
            " carry experts would not be called; undo that first (unfuse_qkv_projections)"
        )


def _is_fused(attention: Any) -> bool:
    """Whether an attention module calls one fused projection; of the older class its processor decides."""
    decides = hasattr(attention, "unfuse_projections") or type(attention.processor).__name__.startswith("Fused")
    return bool(attention.fused_projections) and decides
