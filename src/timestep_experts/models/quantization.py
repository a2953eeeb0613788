"""A frozen base in few bits, by the quantisation configurations of diffusers and transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import diffusers
import torch
import transformers
from diffusers import PipelineQuantizationConfig
from torch import nn

from timestep_experts.errors import UserError

Quantization: TypeAlias = Literal["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8"]

BYTES_PER_WEIGHT: Mapping[Quantization, float] = {
    "bitsandbytes-8bit": 1.0,
    "bitsandbytes-4bit": 0.5 + 4 / 64,
    "torchao-int8": 1.0,
}
"""Of a linear layer; 4-bit weights share one fp32 scale per 64. Everything else keeps its dtype."""


def quantised_names(index: Mapping[str, Any], denoisers: tuple[str, ...]) -> dict[str, str]:
    """The parts of a pipeline to quantise, each with the library that loads it: its denoisers and its T5s.

    Args:
        index: of ``model_index.json``: library and class of each part.
        denoisers: names of denoisers; those that the pipeline lacks are left out.
    """
    parts = {name: value for name, value in index.items() if isinstance(value, list | tuple) and value[1]}
    return {name: library for name, (library, kind) in parts.items() if name in denoisers or "T5EncoderModel" in kind}


def quantization_config(
    kind: Quantization, names: Mapping[str, str], dtype: torch.dtype, device: torch.device
) -> PipelineQuantizationConfig:
    """What ``from_pretrained`` needs to load some parts quantised.

    Args:
        kind: how.
        names: of parts, each with its library, see `quantised_names`.
        dtype: that 4-bit weights are multiplied in.
        device: that the parts are for.

    Raises:
        UserError: the package is not installed, or cannot quantise on this device.
    """
    package = kind.partition("-")[0]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"base quantization {kind!r} needs {package}, which is not installed:"
            f" pip install 'timestep-experts[{package}]'"
        )
    if package == "bitsandbytes" and device.type == "cpu":
        raise UserError(f"base quantization {kind!r} needs an accelerator; on a CPU, torchao-int8 is allowed")
    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    return PipelineQuantizationConfig(
        quant_mapping={name: _config(kind, libraries[library], dtype) for name, library in names.items()}
    )


def _config(kind: Quantization, library: Any, dtype: torch.dtype) -> Any:
    if kind == "bitsandbytes-8bit":
        return library.BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bitsandbytes-4bit":
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return library.BitsAndBytesConfig(load_in_4bit=True, **options)
    from torchao.quantization import Int8WeightOnlyConfig

    return library.TorchAoConfig(Int8WeightOnlyConfig())


def is_quantised(module: nn.Module) -> bool:
    """Whether a network was loaded quantised."""
    return getattr(module, "hf_quantizer", None) is not None


def quantised_bytes(module: nn.Module, kind: Quantization) -> int:
    """Bytes of a network's parameters and buffers once its linear layers are quantised."""
    linear = {id(m.weight): m.weight for m in module.modules() if isinstance(m, nn.Linear)}
    kept = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in linear]
    few = sum(weight.numel() for weight in linear.values()) * BYTES_PER_WEIGHT[kind]
    return sum(tensor.nbytes for tensor in kept) + round(few)
