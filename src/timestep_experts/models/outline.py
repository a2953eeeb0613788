"""A base model without its weights: enough to count and to plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from timestep_experts.models.family import Family
from timestep_experts.models.registry import FAMILIES


@dataclass(frozen=True)
class Outline:
    """What a folder's configurations say.

    Args:
        family: the base model's.
        denoisers: by name, on the meta device.
        text_encoders: by name, on the meta device.
        num_train_timesteps: T.
    """

    family: type[Family]
    denoisers: dict[str, nn.Module]
    text_encoders: dict[str, nn.Module]
    num_train_timesteps: int


def read_outline(source: str) -> Outline:
    """Build a base model's networks on the meta device: a few kilobytes are read, nothing is loaded.

    Args:
        source: a diffusers folder or a hub id.

    Raises:
        ValueError: a configuration is missing or unreadable, or the pipeline is of no known family.
    """
    try:
        index = DiffusionPipeline.load_config(source)
        family = FAMILIES[index["_class_name"]]
        names = {family.denoiser_name, *family.text_encoder_names, "transformer_2"}
        networks = {n: _empty(source, n, *index[n]) for n in sorted(names) if n in index and index[n][1]}
        scheduler = _scheduler(source, index)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot load a pipeline from {source!r}: {error}") from error
    encoders = {name: networks.pop(name) for name in family.text_encoder_names if name in networks}
    return Outline(family, networks, encoders, int(scheduler.config["num_train_timesteps"]))


def _empty(source: str, name: str, library: str, kind: str) -> nn.Module:
    with torch.device("meta"):
        if library == "diffusers":
            cls: Any = getattr(diffusers, kind)
            module: nn.Module = cls.from_config(cls.load_config(source, subfolder=name))
            return module
        config = transformers.AutoConfig.from_pretrained(source, subfolder=name)
        built: nn.Module = getattr(transformers, kind)(config)
        return built


def _scheduler(source: str, index: Any) -> Any:
    return getattr(diffusers, index["scheduler"][1]).from_pretrained(source, subfolder="scheduler")
