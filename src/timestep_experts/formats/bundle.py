"""The bundle: one folder that holds everything needed to use a trained mixture and to know how it was made.

``mixture.json`` says what the mixture is and where it belongs, ``mixture.safetensors`` holds its tensors. The format is
described in ``docs/bundle.md``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import atomic_path, write_json, write_tensors
from timestep_experts.formats.checkpoints import read_shapes
from timestep_experts.formats.sampling import SamplingDefaults, sampling_of_version_1
from timestep_experts.formats.sealed import SEAL, hash_tensors
from timestep_experts.mixture import MixtureSpec, Mode, Router

FORMAT = "timestep-experts/bundle"
FORMAT_VERSION = 3
DOCUMENT, TENSORS = "mixture.json", "mixture.safetensors"
"""The files of a bundle."""
_SPEC = TypeAdapter(MixtureSpec)
_MOST_BYTES, _MOST_SHOWN = 2**25, 20
_SHORT_CLIP_NAME = re.compile(r"^(text_encoder(?:_\d)?)\.(encoder\.layers|embeddings|final_layer_norm)\b")


class BundleDocument(BaseModel):
    """``mixture.json``."""

    model_config = ConfigDict(extra="forbid")

    format: str
    format_version: int = Field(strict=True, ge=1)
    mode: Mode
    base_model: str
    denoiser_class: str
    mixture: MixtureSpec
    target_modules: tuple[str, ...] = Field(min_length=1)
    sampling: SamplingDefaults
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """A trained mixture.

    Args:
        spec: scales and router form.
        target_modules: what `Mixture.attach` is given: the exact module names.
        tensors: what `Mixture.load_state_dict` is given.
        mode: how the mixture is meant to be used: ``switch`` after fostering, ``route`` after assembling.
        base_model: where the base came from, for people.
        denoiser_class: the base's class name.
        sampling: how it is meant to be sampled from.
        provenance: how it was made: recipe, seeds, losses, versions. Free-form JSON for people; no code reads it.
    """

    spec: MixtureSpec
    target_modules: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    mode: Mode
    base_model: str
    denoiser_class: str
    provenance: Mapping[str, Any]
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)

    def __post_init__(self) -> None:
        """Layers of CLIP's text encoder get the names that they have in files, see `named_layers`."""
        object.__setattr__(self, "target_modules", tuple(map(_canonical, self.target_modules)))
        object.__setattr__(self, "tensors", {_canonical(name): tensor for name, tensor in self.tensors.items()})


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write a bundle, replacing one that stands there; atomic."""
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "mode": bundle.mode,
        "base_model": bundle.base_model,
        "denoiser_class": bundle.denoiser_class,
        "mixture": _SPEC.dump_python(bundle.spec, mode="json"),
        "target_modules": list(bundle.target_modules),
        "sampling": bundle.sampling.model_dump(mode="json", exclude_defaults=True),
        "provenance": dict(bundle.provenance),
    }
    with atomic_path(folder) as draft:
        draft.mkdir()
        write_tensors(draft / TENSORS, bundle.tensors, {"format": FORMAT, SEAL: hash_tensors(bundle.tensors)})
        write_json(draft / DOCUMENT, document)


def load_bundle(folder: Path | str) -> Bundle:
    """Read a bundle.

    Raises:
        UserError: there is none, it is damaged, or it was written by a newer version.
    """
    folder = Path(folder)
    document = _read_document(folder / DOCUMENT)
    path = folder / TENSORS
    if not path.is_file():
        raise UserError(f"the bundle {folder} is damaged: there is no file {TENSORS}")
    try:
        _check_shapes(document, read_shapes(path))
        tensors = load_file(path)
        with safe_open(path, "pt") as opened:
            seal = (opened.metadata() or {}).get(SEAL)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"the bundle {folder} is damaged: {TENSORS}: {error}") from error
    if seal not in (None, hash_tensors(tensors)):
        raise UserError(f"the bundle {folder} is damaged: {TENSORS} does not hold what was written: its hash differs")
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"the bundle {folder} is not usable: {wrong[0]} has numbers that are not finite")
    return Bundle(
        spec=document.mixture,
        target_modules=document.target_modules,
        tensors=tensors,
        mode=document.mode,
        base_model=document.base_model,
        denoiser_class=document.denoiser_class,
        sampling=document.sampling,
        provenance=document.provenance,
    )


def _check_shapes(document: BundleDocument, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what a document promises with the header of the tensors' file, before anything of that size is made.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape.
    """
    spec = document.mixture
    router = Router.shapes(spec.gated_scales, spec.num_train_timesteps, spec.router) if spec.gated_scales else {}
    wanted: dict[str, tuple[int | None, ...]] = {}
    for path in document.target_modules:
        for scale in spec.scales:
            wanted[f"{path}.experts.{scale.name}.A"] = (None, scale.rank, None)
            wanted[f"{path}.experts.{scale.name}.B"] = (None, None, None)
        wanted |= {f"{path}.router.{name}": shape for name, shape in router.items()}
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - shapes.keys())]
    problems += [f"unexpected: {name}" for name in sorted(shapes.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & shapes.keys()):
        found, sizes = shapes[name], wanted[name]
        own = next((s for s in spec.scales if name.endswith((f".{s.name}.A", f".{s.name}.B"))), None)
        if (
            len(found) != len(sizes)
            or any(size not in (None, seen) for seen, size in zip(found, sizes, strict=True))
            or (own is not None and not 1 <= found[0] <= len(own.partition))
        ):
            problems.append(f"{name}: {DOCUMENT} and the shape {found} contradict each other")
    if problems:
        more = [f"and {len(problems) - _MOST_SHOWN} more"] if len(problems) > _MOST_SHOWN else []
        raise UserError("\n  ".join(["its tensors do not fit", *problems[:_MOST_SHOWN], *more]))


def _canonical(name: str) -> str:
    return _SHORT_CLIP_NAME.sub(r"\1.text_model.\2", name)


def _read_document(path: Path) -> BundleDocument:
    if not path.is_file():
        raise UserError(f"no bundle at {path.parent}: it has no {path.name}")
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"the bundle {path.parent} is damaged: {path.name} is larger than {_MOST_BYTES:,} bytes")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the bundle {path.parent} is damaged: {path.name} is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a bundle: its 'format' should be {FORMAT!r}")
    version = document.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this release reads up to {FORMAT_VERSION}")
    try:
        document = _from_version_1(document) if version == 1 else document
        document = _from_version_2(document) if version in (1, 2) else document
        return BundleDocument.model_validate(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the bundle {path.parent} is damaged: {path.name}: {error}") from error


def _from_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """Lift a document that kept sampling settings in the provenance, and called base gates resting gates."""
    scales = [
        {("base_gate" if key == "resting_gate" else key): value for key, value in scale.items()}
        for scale in document["mixture"]["scales"]
    ]
    sampling = sampling_of_version_1(document["provenance"])
    return {**document, "mixture": {**document["mixture"], "scales": scales}, "sampling": sampling}


def _from_version_2(document: dict[str, Any]) -> dict[str, Any]:
    """Lift a document that described the routers beside the scales, and not in a section of their own."""
    mixture = dict(document["mixture"])
    router = {
        new: mixture.pop(old)
        for old, new in (("router_input", "inputs"), ("gate", "positions"), ("router_knots", "knots"))
        if old in mixture
    }
    return {**document, "mixture": {**mixture, "router": router}}
