"""Low-rank updates as files: one ordinary LoRA, and a bundle of a single expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import write_tensors
from timestep_experts.formats.bundle import Bundle
from timestep_experts.intervals import Partition
from timestep_experts.merging import LowRank
from timestep_experts.mixture import MixtureSpec, Scale
from timestep_experts.mixture.geometry import LayerGeometry

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that ``load_lora_weights`` of diffusers looks for in a folder."""

_SCALE = "n1"


def lora_tensors(updates: Mapping[str, LowRank], layers: Mapping[str, LayerGeometry]) -> dict[str, Tensor]:
    """The tensors of a LoRA by PEFT's keys, with alpha equal to the rank, so that no file needs to say it.

    Args:
        updates: by the layer's path, the pipeline's part first: ``unet.down_blocks.0...``.
        layers: geometry of the same paths.

    Returns:
        ``<path>.lora_A.weight`` and ``<path>.lora_B.weight``: ``(r, in)`` and ``(out, r)``, of a convolution ``(r, in,
        *kernel)`` and ``(out, r / groups, 1, ...)``.
    """
    tensors = {}
    for path, update in updates.items():
        geometry = layers[path]
        kernel = geometry.kernel_size
        down = (update.rank, geometry.in_features, *kernel)
        tensors[f"{path}.lora_A.weight"] = update.down.reshape(down)
        tensors[f"{path}.lora_B.weight"] = update.up.reshape(*update.up.shape, *(1 for _ in kernel))
    return tensors


def save_lora(
    folder: Path,
    updates: Mapping[str, LowRank],
    layers: Mapping[str, LayerGeometry],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> Path:
    """Write a LoRA into a folder; returns the file.

    Args:
        folder: where the file goes; it exists.
        updates: see `lora_tensors`.
        layers: see `lora_tensors`.
        dtype: the dtype of the tensors in the file.
        metadata: further text for the head of the file.

    Raises:
        UserError: a number leaves the range of the dtype.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in lora_tensors(updates, layers).items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} is not finite in {dtype}; take smaller weights or another dtype")
    write_tensors(folder / LORA_FILE, tensors, {"format": "pt", **metadata})
    return folder / LORA_FILE


def updates_of(bundle: Bundle) -> dict[str, list[LowRank]]:
    """Every layer's experts as updates: scale after scale, each from low to high noise. Groups are not known here.

    Raises:
        UserError: a layer has not all experts of a scale, for its network owns a part of the timesteps alone.
    """
    found: dict[str, list[LowRank]] = {}
    for path in bundle.target_modules:
        found[path] = []
        for scale in bundle.spec.scales:
            down, up = (bundle.tensors[f"{path}.experts.{scale.name}.{part}"].float() for part in "AB")
            if len(down) != len(scale.partition):
                raise UserError(
                    f"{path} has {len(down)} of the {len(scale.partition)} experts of scale {scale.name}: denoisers"
                    " share out the timesteps, so no single LoRA can stand for the experts of both"
                )
            scaling = scale.scaling
            found[path] += [LowRank(a, scaling * b) for a, b in zip(down, up, strict=True)]
    return found


def one_expert_bundle(
    updates: Mapping[str, LowRank],
    num_train_timesteps: int,
    base_model: str,
    denoiser_class: str,
    provenance: Mapping[str, Any],
) -> Bundle:
    """A bundle whose only expert owns all timesteps and is these updates, all of one rank.

    Args:
        updates: by the layer's path.
        num_train_timesteps: T.
        base_model: where the base is.
        denoiser_class: of the base.
        provenance: how the updates were made.
    """
    rank = next(iter(updates.values())).rank
    scale = Scale(_SCALE, Partition.uniform(1, num_train_timesteps), rank, rank)
    tensors = {}
    for path, update in updates.items():
        tensors[f"{path}.experts.{_SCALE}.A"] = update.down[None]
        tensors[f"{path}.experts.{_SCALE}.B"] = update.up[None]
    return Bundle(MixtureSpec((scale,)), tuple(updates), tensors, "switch", base_model, denoiser_class, provenance)
