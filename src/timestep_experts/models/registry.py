"""Which family a base model belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from timestep_experts.errors import UserError
from timestep_experts.models.ddpm import DDPM
from timestep_experts.models.family import Family
from timestep_experts.models.files import check_configurations
from timestep_experts.models.flux import Flux
from timestep_experts.models.pixart import PixArt, PixArtSigma
from timestep_experts.models.quantization import Quantization
from timestep_experts.models.sources import require_source
from timestep_experts.models.stable_diffusion import StableDiffusion
from timestep_experts.models.stable_diffusion_3 import StableDiffusion3
from timestep_experts.models.stable_diffusion_xl import StableDiffusionXL
from timestep_experts.models.video_crafter import VideoCrafter
from timestep_experts.models.wan import Wan
from timestep_experts.world.judge import ASSETS

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArtSigma,
    "FluxPipeline": Flux,
    "TextToVideoSDPipeline": VideoCrafter,
    "WanPipeline": Wan,
    "DDPMPipeline": DDPM,
    "DDIMPipeline": DDPM,
}
"""The family of each pipeline, by the ``_class_name`` in a folder's ``model_index.json``."""


BASE_ASSET = "world/base"
"""The name of the base that ships with the package."""


def resolve_model(source: str) -> str:
    """The folder of the shipped base for `BASE_ASSET`; anything else as it is, with the home folder written out."""
    return str(ASSETS / "base") if source == BASE_ASSET else str(Path(source).expanduser())


def load_family(
    source: str, device: torch.device, dtype: torch.dtype = torch.float32, quantization: Quantization | None = None
) -> Family:
    """Load a base model of any family.

    Args:
        source: a diffusers folder, a hub id, or a single ``.safetensors`` file of Stable Diffusion 1.x or 2.x.
        device: where to.
        dtype: of all parts.
        quantization: of the denoisers and of T5s; ``None`` keeps them in ``dtype``.

    Raises:
        UserError: it is no pipeline or none of `FAMILIES`, or it cannot be loaded.
    """
    require_source(source)
    check_configurations(Path(source))
    if Path(source).suffix == ".safetensors":
        return StableDiffusion.load(source, device, dtype, quantization)
    supported = f"supported are folders and hub ids of {', '.join(FAMILIES)}, and .safetensors files of the first"
    try:
        name = DiffusionPipeline.load_config(source)["_class_name"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"cannot load a pipeline from {source!r}: it has no readable model_index.json; {supported}: {error}"
        ) from error
    if name not in FAMILIES:
        raise UserError(f"cannot load a pipeline from {source!r}: its model_index.json names {name!r}; {supported}")
    return FAMILIES[name].load(source, device, dtype, quantization)


def sampling_options_of(pipeline: Any) -> Mapping[str, Any]:
    """`Family.sampling_options` of a pipeline's family; none for a pipeline of no family."""
    names = (kind.__name__ for kind in type(pipeline).__mro__)
    return next((FAMILIES[name].sampling_options for name in names if name in FAMILIES), {})
