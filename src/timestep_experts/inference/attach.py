"""Put a bundle on a pipeline, and take it off."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from timestep_experts.formats import Bundle, load_bundle
from timestep_experts.mixture import Mixture, Mode


def attach(pipeline: Any, bundle: Bundle | Path | str, mode: Mode | None = None) -> Mixture:
    """Give a pipeline the experts of a bundle. It is then used as always: prompts, guidance, schedulers, img2img.

    Args:
        pipeline: a diffusers pipeline; its ``unet`` or ``transformer`` receives the experts, in its dtype and on its
            device. Other pipelines that share that module are specialised too.
        bundle: a bundle or its folder.
        mode: ``switch`` or ``route`` (or ``off``); ``None`` takes the bundle's own.

    Returns:
        The mixture: set its ``mode`` at any time; `detach` gives the pipeline back as it was.

    Raises:
        ValueError: the bundle does not fit, naming the modules and shapes that differ; the pipeline stays as it was.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    denoiser = denoiser_of(pipeline)
    missing = sorted(set(bundle.target_modules) - {name for name, _ in denoiser.named_modules()})
    if missing:
        raise ValueError(
            f"this bundle was made for a {bundle.denoiser_class} ({bundle.base_model}); the {type(denoiser).__name__}"
            f" of this pipeline lacks {len(missing)} of its {len(bundle.target_modules)} modules:\n  "
            + "\n  ".join(missing)
        )
    exactly = "|".join(re.escape(name) for name in bundle.target_modules)
    mixture = Mixture.attach(denoiser, bundle.spec, exactly)
    try:
        mixture.load_state_dict(bundle.tensors)
        mixture.mode = mode or bundle.mode
    except ValueError:
        mixture.detach()
        raise
    dtype = next(denoiser.parameters()).dtype
    for layer in mixture.layers.values():
        layer.move_experts(dtype=dtype if dtype.is_floating_point else None)
        layer.experts.requires_grad_(False)
        if layer.router is not None:
            layer.router.requires_grad_(False)
    return mixture


def detach(pipeline: Any) -> None:
    """Take the experts off a pipeline; its ``state_dict`` is what it was, to the byte.

    Raises:
        ValueError: it carries none.
    """
    Mixture.of(denoiser_of(pipeline)).detach()


def denoiser_of(pipeline: Any) -> nn.Module:
    """The network of a pipeline that is called at every step.

    Raises:
        ValueError: the pipeline has neither a ``unet`` nor a ``transformer``.
    """
    for name in ("unet", "transformer"):
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ValueError(f"a {type(pipeline).__name__} has neither a unet nor a transformer to attach experts to")
