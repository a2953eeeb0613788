"""A base model without its weights: enough to count and to plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from timestep_experts.errors import UserError
from timestep_experts.intervals import Interval
from timestep_experts.models.family import SECOND_DENOISERS, Family
from timestep_experts.models.files import check_configurations
from timestep_experts.models.quantization import quantised_names
from timestep_experts.models.registry import FAMILIES
from timestep_experts.models.sources import require_source
from timestep_experts.models.video_crafter import FpsUNet3DConditionModel
from timestep_experts.models.wan import split_at


@dataclass(frozen=True)
class MetaModel:
    """What a folder's configurations say.

    Args:
        family: the base model's.
        denoisers: by name, on the meta device.
        text_encoders: by name, on the meta device.
        autoencoders: by name, on the meta device: one or none.
        owned_intervals: of each denoiser, where there are several.
        scheduler: of the base.
        num_train_timesteps: T.
        source: whose they are.
        quantised: names of the parts that a quantised base has quantised.
    """

    family: type[Family]
    denoisers: dict[str, nn.Module]
    text_encoders: dict[str, nn.Module]
    autoencoders: dict[str, nn.Module]
    owned_intervals: dict[str, Interval]
    scheduler: Any
    num_train_timesteps: int
    source: str
    quantised: tuple[str, ...]

    def cast_to(self, dtype: torch.dtype) -> None:
        """All networks in another dtype, but for the parts that diffusers keeps in fp32."""
        for network in self.networks.values():
            kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
            for name, parameter in network.named_parameters():
                if kept.isdisjoint(name.split(".")):
                    parameter.data = parameter.data.to(dtype)

    def make_family(self, *, with_second_denoiser: bool = True) -> Family:
        """A family around these networks: it can be asked for anything that needs no weights.

        Tokenizers are loaded.

        Args:
            with_second_denoiser: keep the further denoiser of a base that has two.

        Raises:
            UserError: what is loaded is missing or unreadable.
        """
        left_out = {} if with_second_denoiser else {name: None for name in SECOND_DENOISERS if name in self.denoisers}
        return self.family.around(self.source, {**self.networks, **left_out})

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks by name, on the meta device."""
        return {**self.denoisers, **self.text_encoders, **self.autoencoders}


def read_meta_model(source: str) -> MetaModel:
    """Build a base model's networks on the meta device: a few kilobytes are read, nothing is loaded.

    Args:
        source: a diffusers folder or a hub id.

    Raises:
        UserError: a configuration is missing or unreadable, or the pipeline is of no known family.
    """
    require_source(source)
    check_configurations(Path(source))
    if Path(source).is_file():
        raise UserError(
            f"cannot plan with {source!r}: a single file has no configuration. Make it a folder once:"
            " StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    try:
        index = DiffusionPipeline.load_config(source)
        family = FAMILIES.get(index["_class_name"])
        if family is None:
            raise UserError(f"model_index.json names {index['_class_name']!r}; supported are {', '.join(FAMILIES)}")
        denoisers = (family.denoiser_name, *SECOND_DENOISERS)
        names = {
            *denoisers,
            *family.text_encoder_names,
            *([family.autoencoder_name] if family.autoencoder_name else []),
        }
        networks = {n: _empty(source, n, *index[n]) for n in sorted(names) if n in index and index[n][1]}
        scheduler = _scheduler(source, index)
    except MemoryError:
        raise
    except Exception as error:  # libraries raise many kinds; all mean that the configurations are damaged
        raise UserError(f"cannot load a pipeline from {source!r}: {error}") from error
    total = int(scheduler.config["num_train_timesteps"])
    return MetaModel(
        family=family,
        denoisers={name: networks[name] for name in denoisers if name in networks},
        text_encoders={name: networks[name] for name in family.text_encoder_names if name in networks},
        autoencoders={name: networks[name] for name in [family.autoencoder_name] if name in networks},
        owned_intervals=split_at(index["boundary_ratio"], total) if "transformer_2" in networks else {},
        scheduler=scheduler,
        num_train_timesteps=total,
        source=source,
        quantised=tuple(quantised_names(index, denoisers)),
    )


def read_network(folder: str) -> nn.Module:
    """One network of diffusers on the meta device, by the ``config.json`` of its own folder.

    Raises:
        UserError: there is none, or it is of an unknown class.
    """
    try:
        config = diffusers.UNet2DConditionModel.load_config(folder)  # any class's reads any config
        with torch.device("meta"):
            module: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        return module
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"cannot read a network from {folder!r}: its config.json must name its class: {error}"
        ) from error


def _empty(source: str, name: str, library: str, kind: str) -> nn.Module:
    with torch.device("meta"):
        if library == "diffusers" or kind == FpsUNet3DConditionModel.__name__:
            cls: Any = getattr(diffusers, kind, FpsUNet3DConditionModel)
            module: nn.Module = cls.from_config(cls.load_config(source, subfolder=name))
            return module
        config = transformers.AutoConfig.from_pretrained(source, subfolder=name)
        built: nn.Module = getattr(transformers, kind)(config)
        return built


def _scheduler(source: str, index: Any) -> Any:
    return getattr(diffusers, index["scheduler"][1]).from_pretrained(source, subfolder="scheduler")
