"""What a full-weight expert learnt as a LoRA: its task vector, truncated layer by layer, streamed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from timestep_experts.errors import UserError
from timestep_experts.formats import save_bundle, tool_versions
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.formats.checkpoints import Checkpoint
from timestep_experts.formats.dtypes import DTYPES
from timestep_experts.formats.lora import one_expert_bundle, save_lora
from timestep_experts.formats.model_folders import find_weights
from timestep_experts.intervals import NUM_TRAIN_TIMESTEPS
from timestep_experts.merging import Truncated, task_vector, truncate_matrix
from timestep_experts.mixture.geometry import LayerGeometry
from timestep_experts.models import read_meta_model, read_network
from timestep_experts.weights.inputs import MergeInput, check_descent, finite_tensor, hash_inputs
from timestep_experts.weights.lora import RECORD, LoraSettings, check_folder_to_make
from timestep_experts.weights.merge import check_fit


@dataclass(frozen=True)
class Extracted:
    """What was made.

    Args:
        path: the folder.
        kept: of each layer's task vector, the share of squared norm that the LoRA has.
        total_kept: the same over all of the expert's change, what is left out included.
        left_out: tensors that changed but cannot be in a LoRA (norms, biases, embeddings), with their share of the
            whole change's squared norm.
    """

    path: Path
    kept: Mapping[str, float]
    total_kept: float
    left_out: Mapping[str, float]


@dataclass(frozen=True)
class _Network:
    """Where a denoiser stands: its name in the pipeline, its layers, T."""

    name: str
    layers: Mapping[str, LayerGeometry]
    kind: str
    num_train_timesteps: int


def extract_lora(
    base: Path, expert: Path, output: Path, settings: LoraSettings, component: str | None = None
) -> Extracted:
    """Write the nearest LoRA of a rank to what an expert changed; whole or not at all.

    One layer at a time is in memory, and the LoRA.

    Args:
        base: a pipeline's folder, or a denoiser's with its ``config.json``.
        expert: a fine-tuned copy, in any layout.
        output: a folder to be made.
        settings: rank, dtype, and whether a bundle is written too; weights and model have no part.
        component: of pipelines' folders, which part; ``None``: the denoiser.

    Raises:
        UserError: an input cannot be read, they do not fit, a tensor is not finite, the rank is not allowed, the
            expert is the base, or the output exists.
    """
    check_folder_to_make(output)
    network = _read_network(base, component)
    checkpoints = [Checkpoint(find_weights(path, component)) for path in (base, expert)]
    check_fit(*checkpoints)
    most = max(g.groups * min(_size(g)) for g in network.layers.values())
    if not 1 <= settings.rank <= most:
        raise UserError(f"rank {settings.rank} is not allowed: no layer of {base} can use more than {most}")
    own, other = hash_inputs(checkpoints)
    check_descent(own.sha256, str(own.weights.path), [other])
    cut, outside = _truncate(own, other, network, settings.rank)
    energy = sum(part.energy for part in cut.values()) + sum(outside.values())
    if not cut:
        raise UserError(
            f"no linear or convolutional layer of {expert} differs from {base}: there is nothing to extract"
        )
    total = sum(part.kept * part.energy for part in cut.values()) / energy
    left_out = {name: part / energy for name, part in outside.items()}
    extracted = Extracted(output, {path: part.kept for path, part in cut.items()}, total, left_out)
    updates = {f"{network.name}.{path}": part.update for path, part in cut.items()}
    record = _record(own, other, settings.rank, extracted)
    with atomic_path(output) as draft:
        draft.mkdir()
        layers = {f"{network.name}.{path}": geometry for path, geometry in network.layers.items()}
        save_lora(draft, updates, layers, DTYPES[settings.dtype], {})
        write_json(draft / RECORD, record)
        if settings.with_bundle:
            bundle = one_expert_bundle(updates, network.num_train_timesteps, str(base), network.kind, record)
            save_bundle(bundle, draft / "bundle")
    return extracted


def _truncate(
    base: MergeInput, expert: MergeInput, network: _Network, rank: int
) -> tuple[dict[str, Truncated], dict[str, float]]:
    """Every changed layer's update by its path, and the squared norms of other changed tensors by name."""
    cut: dict[str, Truncated] = {}
    outside: dict[str, float] = {}
    for name, info in tqdm(base.weights.tensors.items(), desc="truncating", unit="tensor", leave=False):
        if not info.dtype.is_floating_point:
            continue
        change = task_vector(finite_tensor(expert, name), finite_tensor(base, name))
        if not change.any():
            continue
        path, _, kind = name.rpartition(".")
        if kind != "weight" or path not in network.layers:
            outside[name] = float(change.double().square().sum())
            continue
        try:
            cut[path] = truncate_matrix(change, rank, network.layers[path].groups)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
    return cut, outside


def _read_network(base: Path, component: str | None) -> _Network:
    if (base / "model_index.json").is_file():
        meta_model = read_meta_model(str(base))
        networks = {**meta_model.denoisers, **meta_model.text_encoders}
        name = component or find_weights(base).name
        if name not in networks:
            raise UserError(f"{base} has no denoiser or text encoder {name!r}; it has {', '.join(networks)}")
        return _network(name, networks[name], meta_model.num_train_timesteps)
    if not (base / "config.json").is_file():
        raise UserError(
            f"{base} must be a pipeline's folder, or a denoiser's with its config.json: layers are not named in weights"
        )
    module = read_network(str(base))
    return _network("unet" if "UNet" in type(module).__name__ else "transformer", module, NUM_TRAIN_TIMESTEPS)


def _network(name: str, module: nn.Module, num_train_timesteps: int) -> _Network:
    layers = {}
    for path, child in module.named_modules():
        try:
            geometry = LayerGeometry.of(child, path)
        except ValueError:
            continue
        if isinstance(getattr(child, "weight", None), nn.Parameter):
            layers[path] = geometry
    return _Network(name, layers, type(module).__name__, num_train_timesteps)


def _size(geometry: LayerGeometry) -> tuple[int, int]:
    """Rows and columns of one group's update."""
    kernel = torch.Size(geometry.kernel_size).numel()
    return geometry.out_features // geometry.groups, geometry.in_features // geometry.groups * kernel


def _record(base: MergeInput, expert: MergeInput, rank: int, extracted: Extracted) -> dict[str, Any]:
    return {
        "format": "timestep-experts/lora",
        "format_version": 1,
        "base": base.described(),
        "expert": expert.described(),
        "rank": rank,
        "energy_kept": extracted.total_kept,
        "energy_kept_by_layer": dict(extracted.kept),
        "left_out": dict(extracted.left_out),
        "versions": tool_versions(),
    }
