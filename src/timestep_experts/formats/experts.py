"""Expert folders: one range's fine-tuned denoiser as any tool loads it, with what tells it from the others.

``config.json`` and ``diffusion_pytorch_model.safetensors`` are those of a diffusers model. Projections, if there are
any, are in ``projection.safetensors``: those that folded are in the weights already and are kept so that a merge can
take them out again; the others are not in the weights, and change what the model says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import atomic_path, write_tensors
from timestep_experts.formats.checkpoints import Checkpoint, TensorInfo, write_streamed
from timestep_experts.formats.sampling import SamplingDefaults, sampling_of_version_1
from timestep_experts.intervals import Partition
from timestep_experts.merging import Place

BASE_KEY = "base_sha256"
"""Metadata of an expert's weights: the hash of the base that it was trained from, see `weights_sha256`."""
EXPERT_KEY = "timestep_experts_expert"
"""Metadata of an expert's weights: its `ExpertRecord`, as JSON."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
PROJECTIONS = "projection.safetensors"
_PLACES_KEY = "timestep_experts_projections"
_FORMAT = "timestep-experts/expert"
_FORMAT_VERSION = 2


@dataclass(frozen=True)
class ExpertRecord:
    """Which expert it is.

    Args:
        index: of its range, from 0 at low noise.
        boundaries: of all ranges.
        base_model: from which it was trained, as the recipe names it.
        denoiser_class: of base and expert.
        seed: of its samples.
        sampling: how it is meant to be sampled from.
        provenance: how it was made; for people, no code reads it.

    Raises:
        UserError: the boundaries are no partition, or the index is none of its intervals.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    index: int
    boundaries: tuple[float, ...]
    base_model: str
    denoiser_class: str
    seed: int
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the range is one of those that there are."""
        if not 0 <= self.index < len(Partition(self.boundaries)):
            raise UserError(f"there is no range {self.index} among {len(self.boundaries) - 1}")


_RECORD = TypeAdapter(ExpertRecord)


@dataclass(frozen=True)
class StoredProjections:
    """Projections as a file holds them.

    Args:
        places: where they sit.
        deltas: ``W - I`` by ``<module>.projection``.
    """

    places: tuple[Place, ...]
    deltas: Mapping[str, Tensor]

    @property
    def kept(self) -> tuple[Place, ...]:
        """The places of those that are not in the weights."""
        return tuple(place for place in self.places if not place.folds_into)


def write_expert(
    folder: Path,
    save_config: Callable[[Path], object],
    tensors: Mapping[str, Tensor],
    record: ExpertRecord,
    base_sha256: str | None,
    projections: StoredProjections | None = None,
) -> None:
    """Write an expert's folder, whole or not at all.

    Args:
        folder: to be made, or replaced.
        save_config: writes the model's ``config.json`` into a folder.
        tensors: all of the model's, by name; foldable projections are in them.
        record: which expert it is.
        base_sha256: the base's hash; ``None`` where it has no weights that `merge` could read.
        projections: those that it was trained with.
    """
    document = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **_RECORD.dump_python(record, mode="json")}
    base = {} if base_sha256 is None else {BASE_KEY: base_sha256}
    beside = {} if projections is None else {_PLACES_KEY: PROJECTIONS}
    with atomic_path(folder) as draft:
        draft.mkdir(parents=True)
        save_config(draft)
        metadata = {
            "format": "pt",
            **base,
            **beside,
            EXPERT_KEY: json.dumps(document, ensure_ascii=False, sort_keys=True),
        }
        layout = {n: TensorInfo(tuple(t.shape), t.dtype, draft / WEIGHTS) for n, t in tensors.items()}
        write_streamed(draft / WEIGHTS, layout, tensors.__getitem__, metadata)  # keeps the order of the metadata
        if projections is not None:
            write_projections(draft / PROJECTIONS, projections)


def write_projections(path: Path, projections: StoredProjections) -> None:
    """Write projections and their places."""
    places = json.dumps([asdict(place) for place in projections.places])
    write_tensors(path, projections.deltas, {_PLACES_KEY: places})


def read_projections(folder: Path) -> StoredProjections | None:
    """The projections of a model's folder; ``None`` where there are none.

    Raises:
        UserError: the file is not one of projections, or gone; or their numbers are not finite.
    """
    path = folder / PROJECTIONS
    if not path.is_file():
        if (folder / WEIGHTS).is_file() and _PLACES_KEY in Checkpoint(folder / WEIGHTS).metadata:
            raise UserError(f"{folder} was trained with projections, but {path} is not there")
        return None
    try:
        with safe_open(path, "pt") as opened:
            stored = json.loads((opened.metadata() or {})[_PLACES_KEY])
        places = tuple(Place(**{**place, "folds_into": tuple(place["folds_into"])}) for place in stored)
        deltas = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no readable file of projections: {type(error).__name__}: {error}") from error
    for place in places:
        delta = deltas.get(place.name)
        if delta is None or delta.shape != (place.channels, place.channels) or not delta.isfinite().all():
            what = "nothing" if delta is None else f"a tensor {tuple(delta.shape)}, or numbers that are not finite"
            raise UserError(f"{path}: {place.name} should have {place.channels} x {place.channels} numbers; got {what}")
    return StoredProjections(places, deltas)


def read_record(folder: Path) -> ExpertRecord:
    """Which expert a folder holds.

    Raises:
        UserError: its weights cannot be read, or do not say so.
    """
    stored = Checkpoint(folder).metadata.get(EXPERT_KEY)
    if stored is None:
        raise UserError(f"{folder} is no expert's folder: the metadata of its weights lacks {EXPERT_KEY}")
    try:
        document = json.loads(stored)
        version = document["format_version"]
        if version <= _FORMAT_VERSION:
            own = {name: value for name, value in document.items() if name not in ("format", "format_version")}
            lifted = {"sampling": sampling_of_version_1(own["provenance"])} if version == 1 else {}
            return _RECORD.validate_python({**own, **lifted})
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # what JSON and its schema raise
        raise UserError(f"{folder}: the metadata {EXPERT_KEY} is damaged: {error}") from error
    raise UserError(f"{folder} has format version {version}; this release reads up to {_FORMAT_VERSION}")


def find_experts(folder: Path) -> tuple[list[Path], Partition, ExpertRecord]:
    """The experts of all ranges, of a run or gathered from several: ``<folder>/<any name>/expert``.

    Returns:
        Their folders from low to high noise, their ranges, and the first one's record.

    Raises:
        UserError: there are none, a range has none or two, or they are of different runs.
    """
    places = sorted(path for path in folder.glob("*/expert") if path.is_dir())
    if not places:
        raise UserError(f"{folder} holds no experts: expected folders such as {folder / 'range-0' / 'expert'}")
    records = [read_record(place) for place in places]
    first = records[0]
    for place, record in zip(places, records, strict=True):
        if (record.boundaries, record.denoiser_class) != (first.boundaries, first.denoiser_class):
            raise UserError(f"{place} has other ranges or another denoiser than {places[0]}")
    _require_each_once(folder, [record.index for record in records], len(first.boundaries) - 1)
    ordered = [place for _, place in sorted(zip((r.index for r in records), places, strict=True))]
    return ordered, Partition(first.boundaries), first


def _require_each_once(folder: Path, found: Sequence[int], count: int) -> None:
    wrong = [index for index in range(count) if found.count(index) != 1]
    if wrong:
        number = found.count(wrong[0]) or "no"
        raise UserError(f"{folder} has {number} experts of range {wrong[0]}; each of {count} ranges needs one")
