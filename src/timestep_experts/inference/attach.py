"""Put a bundle on a pipeline, and take it off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timestep_experts.errors import UserError
from timestep_experts.formats import Bundle, load_bundle
from timestep_experts.formats.model_folders import DENOISERS
from timestep_experts.inference.reencode import Reencoder, TextExperts, reencode
from timestep_experts.mixture import Mixture, Mode, fuse
from timestep_experts.mixture.carriers import named_layers, uncompiled
from timestep_experts.mixture.hooks import layers_in
from timestep_experts.models import owned_intervals

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def attach(
    pipeline: Any,
    bundle: Bundle | Path | str,
    mode: Mode | None = None,
    *,
    text_experts: TextExperts | None = None,
    fused: bool = False,
) -> Mixture:
    """Give a pipeline the experts of a bundle. It is then used as always: prompts, guidance, schedulers, img2img.

    Args:
        pipeline: a diffusers pipeline; its ``unet`` or ``transformer`` receives the experts, in its dtype and on its
            device. Other pipelines that share that module are specialised too; where text encoders carry experts,
            name them to `Reencoder.follow`.
        bundle: a bundle or its folder.
        mode: ``switch`` or ``route`` (or ``off``); ``None`` takes the bundle's own.
        text_experts: how often prompts are encoded anew where text encoders carry experts: ``step``, ``interval`` or
            ``off``; ``None`` is ``step`` when routing and ``interval`` when switching. See `Reencoder`.
        fused: switch at the base's own cost, for a copy of the weights that carry experts: see `mixture.fuse`.

    Returns:
        The mixture: set its ``mode`` at any time; `detach` gives the pipeline back as it was.

    Raises:
        UserError: the bundle does not fit, naming the modules and shapes that differ, or experts are to be fused that
            cannot; the pipeline stays as it was.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    networks = _networks_of(pipeline, bundle.target_modules)
    inner = {name: _inner_names(name, network, bundle.target_modules) for name, network in networks.items()}
    known = {path for name, found in inner.items() for path in (_path(name, i) for i in found)}
    missing = sorted(set(bundle.target_modules) - known)
    if missing:
        raise UserError(
            f"this bundle was made for a {bundle.denoiser_class} ({bundle.base_model}); this"
            f" {type(pipeline).__name__} with its {type(denoiser_of(pipeline)).__name__} lacks {len(missing)} of its"
            f" {len(bundle.target_modules)} modules:\n  " + "\n  ".join(missing)
        )
    exactly = {name: "|".join(re.escape(i) for i in found) for name, found in inner.items()}
    mixture = Mixture.attach(networks, bundle.spec, exactly, owned=owned_intervals(pipeline))
    try:
        mixture.load_state_dict(bundle.tensors)
        mixture.mode = mode or bundle.mode
    except ValueError:
        mixture.detach()
        raise
    reencode(pipeline, mixture, text_experts)
    _make_ready(mixture)
    if fused:
        try:
            fuse(mixture)
        except ValueError:
            detach(pipeline)
            raise
    return mixture


def _make_ready(mixture: Mixture) -> None:
    """Experts in the base's dtype, unless it is one for storage alone (fp8, integers), and nothing that trains."""
    for layer in mixture.layers.values():
        held = next(layer.base_layer.parameters(), None)
        layer.move_experts(dtype=held.dtype if held is not None and held.dtype in _DTYPES else None)
        layer.experts.requires_grad_(False)
        if layer.router is not None:
            layer.router.requires_grad_(False)


def detach(pipeline: Any) -> None:
    """Take the experts off a pipeline; its ``state_dict`` is what it was, to the byte.

    Raises:
        UserError: it carries none.
    """
    mixture = mixture_of(pipeline)
    reencoder = Reencoder.of(pipeline)
    if reencoder is not None:
        reencoder.remove()
    mixture.detach()


def mixture_of(pipeline: Any) -> Mixture:
    """The mixture that a pipeline carries.

    Raises:
        UserError: it carries none.
    """
    modules = _modules_of(pipeline)
    carried = {name: [layer.name for layer in layers_in(part)] for name, part in modules.items()}
    if any(path.startswith(f"{name}.") for name, paths in carried.items() for path in paths):
        return Mixture.of({name: modules[name] for name, paths in carried.items() if paths})
    return Mixture.of(denoiser_of(pipeline))


def denoiser_of(pipeline: Any) -> nn.Module:
    """The network of a pipeline that is called at every step.

    Raises:
        UserError: the pipeline has neither a ``unet`` nor a ``transformer``.
    """
    for name in DENOISERS:
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module):
            return uncompiled(module)
    raise UserError(f"a {type(pipeline).__name__} has neither a unet nor a transformer to attach experts to")


def _networks_of(pipeline: Any, paths: Sequence[str]) -> dict[str, nn.Module]:
    """The pipeline's parts that module paths begin with; a mixture of a bare denoiser has paths without a part."""
    modules = _modules_of(pipeline)
    parts = {path.partition(".")[0] for path in paths}
    return {name: modules[name] for name in parts} if parts <= modules.keys() else {"": denoiser_of(pipeline)}


def _modules_of(pipeline: Any) -> dict[str, nn.Module]:
    return {name: uncompiled(part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _inner_names(name: str, network: nn.Module, paths: Sequence[str]) -> list[str]:
    wanted = set(paths)
    return [inner for inner in named_layers(network) if _path(name, inner) in wanted]


def _path(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name else inner
