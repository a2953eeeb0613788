"""Merge fine-tuned copies of a base model into one, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from timestep_experts.errors import UserError
from timestep_experts.formats import tool_versions
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.formats.checkpoints import Checkpoint, TensorInfo, write_streamed
from timestep_experts.formats.dtypes import parse_dtype
from timestep_experts.formats.experts import BASE_KEY, PROJECTIONS, write_projections
from timestep_experts.formats.model_folders import copy_around, find_weights, write_index
from timestep_experts.formats.yaml_text import read_yaml
from timestep_experts.merging import METHODS, MergeSettings, merge_tensor
from timestep_experts.weights.inputs import MergeInput, check_descent, finite_tensor, hash_inputs, is_finite, some
from timestep_experts.weights.projections import ProjectionMerge, read_projection_merge

MERGE_KEY = "timestep_experts_merge"
"""Metadata of merged weights: the record of the merge, as JSON."""

SEARCH_FORMAT = "timestep-experts/search"
"""Of the files that `read_search` reads."""

_RECORD = "merge.json"


@dataclass(frozen=True)
class Merged:
    """What a merge made.

    Args:
        path: the file or folder.
        record: the JSON with inputs, hashes, settings and versions.
        num_tensors: in the merged weights.
        num_kept: of those, integers and booleans, which have the base's value.
        left_out: files of the base that hold other copies of the weights, which were not merged and not copied.
        kept_projections: names of projections that fold into no layer; they are in ``projection.safetensors`` beside
            the weights, which alone are not the model.
    """

    path: Path
    record: Path
    num_tensors: int
    num_kept: int
    left_out: tuple[str, ...]
    kept_projections: tuple[str, ...] = ()


def merge(
    base: Path,
    output: Path,
    experts: Sequence[Path],
    settings: MergeSettings,
    component: str | None = None,
    dtype: str | None = None,
    expert_hashes: Sequence[str] | None = None,
) -> Merged:
    """Merge experts into a copy of their base that has its layout; whole or not at all.

    Args:
        base: a ``.safetensors`` file, a folder with weights, or a pipeline's folder.
        output: to be made; a file if ``base`` is one, else a folder.
        experts: each like ``base``, in any layout.
        settings: method and weights.
        component: of pipelines' folders, which part is merged; ``None``: the denoiser.
        dtype: ``fp32``, ``fp16`` or ``bf16`` of the merged floating-point tensors; ``None``: each as in the base.
        expert_hashes: SHA-256 of the experts that the weights are for, in their order; ``None``: not checked.

    Raises:
        UserError: an input cannot be read, they do not fit each other, a tensor is not finite, or the output exists.
    """
    places = [find_weights(path, component) for path in (base, *experts)]
    record_path, chosen = _record_path(base, output), _dtype_of(dtype)
    if component is not None and places == [base, *experts]:
        raise UserError(f"component {component!r} was given, but no input is a pipeline's folder")
    checkpoints = [Checkpoint(place) for place in places]
    if len(settings.weights) != len(experts):
        raise UserError(f"there are {len(settings.weights)} weights for {len(experts)} experts")
    for expert in checkpoints[1:]:
        check_fit(checkpoints[0], expert)
    factors = read_projection_merge(places[0], places[1:], has_folder=base.is_dir())
    names = factors.names if factors is not None else ()
    weights = settings.weights_by_tensor([*checkpoints[0].tensors, *names])
    inputs = hash_inputs(checkpoints)
    check_descent(inputs[0].sha256, str(inputs[0].weights.path), inputs[1:])
    if expert_hashes is not None:
        _check_hashes(inputs[1:], expert_hashes)
    part = None if places[0] == base else places[0].name
    if factors is not None:
        factors = factors.merge_projections(weights, settings, [expert.sha256 for expert in inputs[1:]])
    work = _Work(inputs[0], inputs[1:], settings, weights, chosen, part, factors)
    left_out = _write_file(work, output, record_path) if base.is_file() else _write_folder(work, base, output)
    num_kept = sum(not info.dtype.is_floating_point for info in checkpoints[0].tensors.values())
    kept = None if factors is None else factors.kept
    kept_names = () if kept is None else tuple(kept.deltas)
    return Merged(output, record_path, len(checkpoints[0].tensors), num_kept, left_out, kept_names)


def make_settings(
    weights: Sequence[float], method: str, density: float, block_weights: Path | None, seed: int
) -> MergeSettings:
    """Settings as the command line gives them.

    Args:
        weights: one per expert.
        method: see `MergeSettings`, as the rest.
        density: kept share.
        block_weights: a YAML file, see `read_block_weights`.
        seed: of DARE.

    Raises:
        UserError: a value is not allowed.
    """
    known = next((name for name in METHODS if name == method), None)
    if known is None:
        raise UserError(f"unknown merge method {method!r}: allowed are {', '.join(METHODS)}")
    blocks = {} if block_weights is None else read_block_weights(block_weights)
    return MergeSettings(tuple(weights), known, density, blocks, seed)


def read_search(path: Path) -> tuple[MergeSettings, tuple[str, ...]]:
    """The merge that a search found, and the SHA-256 of the experts that it is for, in their order.

    Raises:
        UserError: the file is unreadable, or no search of full-weight experts.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != SEARCH_FORMAT:
            raise UserError(f"its format is {document['format']!r}, not {SEARCH_FORMAT!r}")
        blocks = {pattern: tuple(map(float, weights)) for pattern, weights in document["block_weights"].items()}
        hashes = tuple(str(expert["sha256"]) for expert in document["experts"])
        return MergeSettings(tuple(map(float, document["weights"])), block_weights=blocks), hashes
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no result of a search for merge weights: {error!r}") from error


def read_block_weights(path: Path) -> dict[str, tuple[float, ...]]:
    """Weights by pattern from YAML: a mapping of regular expressions to lists of numbers, in the file's order.

    Raises:
        UserError: the file is unreadable or something else.
    """
    value = read_yaml(path)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} must map regular expressions over tensor names to lists of weights")
    for pattern, weights in value.items():
        is_list = isinstance(weights, list) and all(type(weight) in (int, float) for weight in weights)
        if not isinstance(pattern, str) or not is_list:
            raise UserError(
                f"{path}: {pattern!r} must be a string with a list of one number per expert; got {weights!r}"
            )
    return {pattern: tuple(map(float, weights)) for pattern, weights in value.items()}


@dataclass(frozen=True)
class _Work:
    """Everything that a merged tensor depends on."""

    base: MergeInput
    experts: Sequence[MergeInput]
    settings: MergeSettings
    weights: Mapping[str, tuple[float, ...]]
    dtype: torch.dtype | None
    component: str | None  # of the base's pipeline
    factors: ProjectionMerge | None = None

    def layout(self) -> dict[str, TensorInfo]:
        """What the result holds."""
        tensors = self.base.weights.tensors
        return {name: replace(info, dtype=self._dtype(info.dtype)) for name, info in tensors.items()}

    def merged(self, name: str) -> Tensor:
        """One tensor of the result."""
        base = finite_tensor(self.base, name)
        if not base.is_floating_point():
            return base
        # In the order of their hashes, so that the sum's rounding does not depend on the order they were given in.
        pairs = zip(range(len(self.experts)), self.weights[name], strict=True)
        ordered = sorted(pairs, key=lambda pair: (self.experts[pair[0]].sha256, pair[1]))
        tensors = (self._of_expert(index, name) for index, _ in ordered)
        weights, keys = [weight for _, weight in ordered], [self.experts[index].sha256 for index, _ in ordered]
        dtype = self._dtype(base.dtype)
        wide = base.to(torch.promote_types(base.dtype, dtype))
        if self.factors is not None and self.factors.projection_of(name) is not None:
            merged = merge_tensor(name, wide.double(), tensors, weights, self.settings, keys)
            merged = self.factors.folded(name, merged).to(dtype)
        else:
            merged = merge_tensor(name, wide, tensors, weights, self.settings, keys).to(dtype)
        if not is_finite(merged):
            raise UserError(f"the merged {name} leaves the range of {dtype}; take smaller weights or another dtype")
        return merged

    def _of_expert(self, index: int, name: str) -> Tensor:
        tensor = finite_tensor(self.experts[index], name)
        return tensor if self.factors is None else self.factors.unfolded(index, name, tensor)

    def write(self, folder: Path, names: Mapping[Path, str]) -> None:
        """Write the result's files, with a bar over the bytes read.

        Args:
            folder: where to.
            names: of the result's files, by the base's.
        """
        layout, record = self.layout(), json.dumps(self.record(), ensure_ascii=False)
        inputs = [self.base.weights, *(expert.weights for expert in self.experts)]
        with tqdm(total=sum(i.num_bytes for i in inputs), desc="merging", unit="B", unit_scale=True) as bar:

            def get(name: str) -> Tensor:
                merged = self.merged(name)
                bar.update(sum(i.tensors[name].num_bytes for i in inputs))
                return merged

            for file, own in self.base.weights.metadata_by_file.items():
                part = {name: info for name, info in layout.items() if info.file == file}
                metadata = {"format": "pt", **own, BASE_KEY: self.base.sha256, MERGE_KEY: record}
                write_streamed(folder / names[file], part, get, metadata)

    def record(self) -> dict[str, Any]:
        """How the result was made."""
        weights = self.settings.weights
        return {
            "format": "timestep-experts/merge",
            "format_version": 1,
            "base": self.base.described(),
            "experts": [
                {**expert.described(), "weight": weight} for expert, weight in zip(self.experts, weights, strict=True)
            ],
            "settings": {
                **asdict(self.settings),
                "component": self.component,
                "dtype": None if self.dtype is None else str(self.dtype),
            },
            "projections": {} if self.factors is None else self.factors.described(),
            "versions": tool_versions(),
        }

    def _dtype(self, stored: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored


def _write_file(work: _Work, output: Path, record_path: Path) -> tuple[str, ...]:
    try:
        with atomic_path(output) as draft:
            work.write(draft.parent, {work.base.weights.files[0]: draft.name})
            write_json(record_path, work.record())
    except BaseException:
        record_path.unlink(missing_ok=True)
        raise
    return ()


def _write_folder(work: _Work, base: Path, output: Path) -> tuple[str, ...]:
    weights = work.base.weights
    with atomic_path(output) as draft:
        left_out = copy_around(base, weights, draft)
        home = draft / weights.files[0].parent.relative_to(base)
        work.write(home, {file: file.name for file in weights.files})
        if work.factors is not None and work.factors.kept is not None:
            write_projections(home / PROJECTIONS, work.factors.kept)
        if weights.index is not None:
            write_index(weights.index, work.layout(), home / weights.index.name)
        write_json(draft / _RECORD, work.record())
    return left_out


def _record_path(base: Path, output: Path) -> Path:
    path = output.with_suffix(f".{_RECORD}") if base.is_file() else output / _RECORD
    for made in (output, path):
        if made.exists():
            raise UserError(f"{made} exists already; name an output to be made")
    if base.is_file() and output.suffix != ".safetensors":
        raise UserError(f"the base is a file, so the output must end in .safetensors; got {output}")
    if base.is_dir() and output.resolve().is_relative_to(base.resolve()):
        raise UserError(f"the output {output} must not be inside the base {base}")
    return path


def _check_hashes(experts: Sequence[MergeInput], expected: Sequence[str]) -> None:
    for number, (expert, sha256) in enumerate(zip(experts, expected, strict=True)):
        if expert.sha256 != sha256:
            known = expected.index(expert.sha256) if expert.sha256 in expected else None
            where = "none of those" if known is None else f"number {known} there"
            given = f"{expert.weights.path}, given as number {number}"
            raise UserError(f"the weights were searched for other experts, or in another order: {given}, is {where}")


def _dtype_of(name: str | None) -> torch.dtype | None:
    return None if name is None else parse_dtype(name)


def check_fit(base: Checkpoint, expert: Checkpoint) -> None:
    """Refuse an expert whose tensors have other names, shapes or kinds of numbers than the base's.

    Raises:
        UserError: naming the first that differ.
    """
    lacking, strange = base.tensors.keys() - expert.tensors.keys(), expert.tensors.keys() - base.tensors.keys()
    if lacking or strange:
        said = [f"lacks {some(lacking)}"] * bool(lacking) + [f"has {some(strange)}"] * bool(strange)
        raise UserError(f"{expert.path} has other tensors than the base {base.path}: it {' and '.join(said)}")
    for name, info in base.tensors.items():
        other = expert.tensors[name]
        if other.shape != info.shape:
            raise UserError(f"{other.file}: {name} has shape {other.shape}; the base's is {info.shape}")
        if other.dtype.is_floating_point != info.dtype.is_floating_point:
            raise UserError(f"{other.file}: {name} is {other.dtype}; the base's is {info.dtype}")
