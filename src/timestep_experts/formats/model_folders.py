"""Folders in the diffusers layout around a model's weights: finding them, and a copy that is ready for others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import write_json
from timestep_experts.formats.checkpoints import Checkpoint, TensorInfo, is_index

DENOISERS = ("unet", "transformer", "transformer_2")
"""What pipelines call their denoisers."""

_PIPELINE_INDEX = "model_index.json"
_WEIGHT_ENDINGS = (
    ".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf",
)  # fmt: skip
_DOWNLOADERS = {".git", ".cache"}


def find_weights(path: Path, component: str | None = None) -> Path:
    """Where a model's weights are: of a pipeline's folder that of a component, else the path itself.

    Args:
        path: a file or a folder.
        component: its name in ``model_index.json``; ``None``: the only denoiser.

    Raises:
        UserError: there is nothing there, or the pipeline has no such component, or several denoisers.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not (path / _PIPELINE_INDEX).is_file():
        return path
    listed = _components(path / _PIPELINE_INDEX)
    if component is None:
        found = [name for name in DENOISERS if name in listed]
        if len(found) != 1:
            kind = "several denoisers" if found else "no denoiser"
            names = ", ".join(found or listed)
            raise UserError(f"{path} has {kind}: name the component to merge, one of {names}")
        component = found[0]
    if component not in listed:
        raise UserError(f"{path} has no component {component!r}; it has {', '.join(listed)}")
    if not (path / component).is_dir():
        raise UserError(f"{_PIPELINE_INDEX} lists {component}, but there is no folder {path / component}")
    return path / component


def copy_around(folder: Path, weights: Checkpoint, target: Path) -> tuple[str, ...]:
    """Copy a folder but for the weights and what else holds the same model; returns the latter's names.

    Left out are other files of weights beside these and at the folder's top (variants, other formats), since they would
    hold the old model under the new one's name, links that lead nowhere, and what ``git`` and downloaders keep for
    themselves.

    Args:
        folder: of a model or a pipeline.
        weights: of the folder or of one of its components.
        target: to be made.
    """
    home = weights.files[0].parent
    left_out: list[str] = []

    def ignored(place: str, names: list[str]) -> set[str]:
        lost = {name for name in names if not (Path(place) / name).exists()}  # links that lead nowhere
        left_out.extend((Path(place) / name).relative_to(folder).as_posix() for name in lost)
        skipped = _DOWNLOADERS.intersection(names) | lost
        if Path(place) not in (folder, home):
            return skipped
        held = {name for name in names if name.endswith(_WEIGHT_ENDINGS) or name.endswith(".index.json")}
        held |= {name for name in names if is_index(name)}
        own = {file.name for file in (*weights.files, weights.index) if file and file.parent == Path(place)}
        left_out.extend((Path(place) / name).relative_to(folder).as_posix() for name in held - own - lost)
        return skipped | held

    shutil.copytree(folder, target, ignore=ignored)
    return tuple(sorted(left_out))


def write_index(index: Path, layout: Mapping[str, TensorInfo], target: Path) -> None:
    """Copy an index of shards with the size that a new layout has.

    Args:
        index: to copy.
        layout: of all shards.
        target: to be written.
    """
    document = json.loads(index.read_text(encoding="utf-8"))
    size = sum(info.num_bytes for info in layout.values())
    write_json(target, {**document, "metadata": {**document.get("metadata", {}), "total_size": size}})


def _components(index: Path) -> list[str]:
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
        entries = document.items()
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{index} is no description of a pipeline: {error}") from error
    return [name for name, kind in entries if isinstance(kind, list) and kind and kind[0] is not None]
