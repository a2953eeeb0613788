"""The experts of a bundle merged into one ordinary LoRA, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from timestep_experts.errors import UserError
from timestep_experts.evaluation.merges import MergeBench, MergeLosses, MergeSplit
from timestep_experts.formats import Bundle, load_bundle, portable, save_bundle, tool_versions
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.formats.dtypes import DTYPES, parse_dtype
from timestep_experts.formats.lora import one_expert_bundle, save_lora, updates_of
from timestep_experts.inference import attach, detach
from timestep_experts.intervals import Interval, Partition
from timestep_experts.merging import LowRank, Truncated, Weights, truncate, weighted_sum
from timestep_experts.mixture.carriers import named_layers
from timestep_experts.mixture.geometry import LayerGeometry
from timestep_experts.models import read_meta_model, resolve_model
from timestep_experts.weights.measured import MeasuredBase
from timestep_experts.weights.search import Search, search_weights, write_search
from timestep_experts.weights.search_methods import SearchSettings
from timestep_experts.weights.switchable import are_gates_folded, to_switchable

RECORD = "merge.json"
_PIECES = 8


@dataclass(frozen=True)
class LoraSettings:
    """How a bundle becomes a LoRA.

    Args:
        rank: of the LoRA.
        weights: one per expert, scale after scale; ``None``: each expert's share of the timesteps.
        model: the base; ``None``: the one that the bundle was made on, or the measured one.
        dtype: of the file: ``fp32``, ``fp16`` or ``bf16``.
        with_bundle: write the same as a bundle of one expert too.

    Raises:
        UserError: the dtype is unknown.
    """

    rank: int
    weights: tuple[float, ...] | None = None
    model: str | None = None
    dtype: str = "fp32"
    with_bundle: bool = False

    def __post_init__(self) -> None:
        parse_dtype(self.dtype)


@dataclass(frozen=True)
class MergedLora:
    """What was made.

    Args:
        path: the folder.
        labels: of the experts.
        weights: that they had.
        kept: of each layer's exact sum, the share of squared norm that the LoRA has.
        total_kept: the same over all layers.
        rows: losses, if they were measured: base, experts switching, their exact sum, the LoRA; else empty.
        ranges: of the rows.
        search: that found the weights, if there was one.
        left_out: whether the bundle routes by gates that have no part in the LoRA.
    """

    path: Path
    labels: tuple[str, ...]
    weights: tuple[float, ...]
    kept: Mapping[str, float]
    total_kept: float
    rows: tuple[MergeLosses, ...]
    ranges: tuple[Interval, ...]
    search: Search | None
    left_out: bool = False


def merge_lora(
    bundle_path: Path,
    output: Path,
    settings: LoraSettings,
    measured: MeasuredBase | None = None,
    search: SearchSettings | None = None,
) -> MergedLora:
    """Merge the experts of a bundle into one LoRA that diffusers, PEFT and others load; whole or not at all.

    Gates that depend on t alone are folded into the experts first; others have no part in it. Every layer has the asked
    rank; where that is more than it can use, the rest is 0.

    Args:
        bundle_path: the bundle's folder.
        output: a folder to be made.
        settings: rank and weights.
        measured: what losses are measured on; ``None``: nothing is measured.
        search: look for the weights by those losses, instead of taking those of the settings.

    Raises:
        UserError: the bundle does not fit the base, the rank or the number of weights is wrong, or the output exists.
    """
    check_folder_to_make(output)
    if search is not None and (measured is None or settings.weights is not None):
        raise UserError("a search for weights needs a base and pictures to measure losses on, and no weights")
    bundle = with_folded_gates(load_bundle(bundle_path))
    if measured is None:
        return write_merged(bundle_path, output, settings)
    seed = measured.seed if search is None else search.seed
    own = replace(settings, model=settings.model or measured.source)
    return write_merged(bundle_path, output, own, partial(_halves, measured, bundle, seed), search)


def write_merged(
    bundle_path: Path,
    output: Path,
    settings: LoraSettings,
    make_split: Callable[[], MergeSplit] | None = None,
    search: SearchSettings | None = None,
) -> MergedLora:
    """The same as `merge_lora`, tried on whatever the caller has.

    Args:
        bundle_path: the bundle's folder.
        output: a folder to be made.
        settings: rank and weights.
        make_split: called once everything fits: what losses are measured on; ``None``: nothing is measured.
        search: look for the weights.

    Raises:
        UserError: as `merge_lora`.
    """
    whole = load_bundle(bundle_path)
    bundle = with_folded_gates(whole)
    model = settings.model or bundle.base_model
    parts, layers = read_parts(bundle, resolve_model(model))
    labels, shares = label_experts(bundle), expert_shares(bundle)
    weights = shares if settings.weights is None else settings.weights
    if len(weights) != len(labels):
        raise UserError(f"there are {len(weights)} weights for {len(labels)} experts: {', '.join(labels)}")
    most = sum(part.rank for part in next(iter(parts.values())))
    if not 1 <= settings.rank <= most:
        raise UserError(f"rank {settings.rank} is not allowed: the experts have {most} together, so 1 to {most} are")
    bench = None if make_split is None else _Bench(make_split(), bundle, parts)
    found = None if bench is None or search is None else bench.search(labels, shares, search)
    weights = weights if found is None else found.found.weights
    cut = truncate_all(parts, weights, settings.rank)
    rows = () if bench is None else bench.losses(weights, cut)
    energy = sum(part.energy for part in cut.values())
    total = sum(part.kept * part.energy for part in cut.values()) / energy if energy else 1.0
    kept = {path: part.kept for path, part in cut.items()}
    ranges = () if bench is None else bench.split.settings.partition.intervals
    left_out = whole.mode == "route" and not are_gates_folded(whole)
    merged = MergedLora(output, labels, tuple(weights), kept, total, rows, ranges, found, left_out)
    record = _record(bundle_path, model, settings, merged)
    with atomic_path(output) as draft:
        draft.mkdir()
        updates = {path: part.update for path, part in cut.items()}
        write_lora(draft, updates, layers, settings, bundle, record)
        if bench is not None and found is not None:
            bench.write(draft / "search.json", found, portable(bundle_path))
    return merged


def with_folded_gates(bundle: Bundle) -> Bundle:
    """The same bundle, or where its gates depend on t alone, one that switches experts with their gates in them.

    Smooth gates become constant on the strata of its scales, of which a single one is cut into eighths.
    """
    spec = bundle.spec
    if not are_gates_folded(bundle):
        return bundle
    strata = spec.strata if len(spec.strata) > 1 else Partition.uniform(_PIECES, spec.num_train_timesteps)
    return to_switchable(bundle, spec.router.intervals or strata).bundle


def read_parts(bundle: Bundle, model: str) -> tuple[dict[str, list[LowRank]], dict[str, LayerGeometry]]:
    """Every layer's experts and geometry, by the layer's path in the pipeline.

    Raises:
        UserError: the base lacks a layer, or the experts have other shapes.
    """
    meta_model = read_meta_model(model)
    networks = {**meta_model.denoisers, **meta_model.text_encoders}
    parts, layers = {}, {}
    for path, updates in updates_of(bundle).items():
        full = path if path.partition(".")[0] in networks else f"{meta_model.family.denoiser_name}.{path}"
        layers[full] = geometry = _geometry(networks, full, model)
        parts[full] = [replace(update, groups=geometry.groups) for update in updates]
        for update in updates:
            own = (update.up.shape[0], update.down.shape[1])
            wanted = (geometry.out_features, geometry.in_features * torch.Size(geometry.kernel_size).numel())
            if own != wanted:
                raise UserError(f"{path}: the bundle's experts are for a layer of {own}; that of {model} has {wanted}")
    return parts, layers


def _geometry(networks: Mapping[str, nn.Module], path: str, model: str) -> LayerGeometry:
    name, _, inner = path.partition(".")
    try:
        return LayerGeometry.of(named_layers(networks[name])[inner], path)
    except KeyError as error:
        raise UserError(f"the bundle has experts for {path}, which {model} lacks") from error


def label_experts(bundle: Bundle) -> tuple[str, ...]:
    """Names of all experts, scale after scale: ``n8 [0, 125)`` and so on."""
    return tuple(f"{scale.name} {interval}" for scale in bundle.spec.scales for interval in scale.partition.intervals)


def expert_shares(bundle: Bundle) -> tuple[float, ...]:
    """Each expert's share of the timesteps; of a scale they sum to 1, so an expert for all timesteps has 1."""
    return tuple(
        (interval.hi - interval.lo) / scale.partition.num_train_timesteps
        for scale in bundle.spec.scales
        for interval in scale.partition.intervals
    )


def truncate_all(parts: Mapping[str, Sequence[LowRank]], weights: Sequence[float], rank: int) -> dict[str, Truncated]:
    """`truncate` of `weighted_sum` in every layer.

    Raises:
        UserError: the rank does not fit a layer's groups; names the layer.
    """
    cut = {}
    for path, updates in tqdm(parts.items(), desc="truncating", unit="layer", leave=False):
        try:
            cut[path] = truncate(weighted_sum(updates, weights), rank)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
    return cut


def write_lora(
    folder: Path,
    updates: Mapping[str, LowRank],
    layers: Mapping[str, LayerGeometry],
    settings: LoraSettings,
    like: Bundle,
    record: Mapping[str, Any],
) -> None:
    """Write a LoRA, its record and, if asked for, the bundle, into a folder that exists."""
    metadata = {"timestep_experts_merge": json.dumps(record, ensure_ascii=False)}
    save_lora(folder, updates, layers, DTYPES[settings.dtype], metadata)
    write_json(folder / RECORD, record)
    if settings.with_bundle:
        total = like.spec.num_train_timesteps
        save_bundle(one_expert_bundle(updates, total, like.base_model, like.denoiser_class, record), folder / "bundle")


def check_folder_to_make(output: Path) -> None:
    """Refuse an output that exists, or that is named like a file.

    Raises:
        UserError: it does.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name an output to be made")
    if output.suffix == ".safetensors":
        raise UserError(f"the output is a folder, as load_lora_weights takes it; got {output}")


def _halves(measured: MeasuredBase, bundle: Bundle, seed: int) -> MergeSplit:
    family = measured.load()
    as_tokens = any(path.partition(".")[0] in family.text_encoders for path in bundle.target_modules)
    return measured.split(family, bundle.spec.strata, seed, as_tokens=as_tokens)


class _Bench:
    """A base whose loss is measured with this or that attached."""

    def __init__(self, split: MergeSplit, bundle: Bundle, parts: Mapping[str, Sequence[LowRank]]) -> None:
        self.split, self.bundle, self.parts = split, bundle, parts
        self._searched: MergeBench | None = None

    @contextmanager
    def attached(self, bundle: Bundle) -> Iterator[Any]:
        """The base with a bundle, switching."""
        pipeline = self.split.family.pipeline()
        mixture = attach(pipeline, bundle, "switch")
        try:
            yield mixture
        finally:
            detach(pipeline)

    def search(self, labels: tuple[str, ...], shares: Weights, settings: SearchSettings) -> Search:
        """Search for weights of the exact sum."""
        count = len(labels)
        alone = {label: tuple(float(i == k) for i in range(count)) for k, label in enumerate(labels)}
        points = {"base": (0.0,) * count, **alone, "shares": shares}
        with self.attached(self.alone({p: weighted_sum(u, shares) for p, u in self.parts.items()})) as mixture:
            self._searched = MergeBench(self.split, _LiveSum(mixture, self.parts).set)
            return search_weights(self._searched, points, labels, settings)

    def losses(self, weights: Weights, cut: Mapping[str, Truncated]) -> tuple[MergeLosses, ...]:
        """Rows: the base, the experts switching, their exact sum, the truncated one."""
        bench = MergeBench(self.split, lambda _: None)
        rows = [bench.confirm_as_it_is("base", ())]
        exact = {path: weighted_sum(updates, weights) for path, updates in self.parts.items()}
        rank = next(iter(exact.values())).rank
        shown = {
            "experts, switching": self.bundle,
            f"their sum, r{rank}": self.alone(exact),
            f"LoRA r{next(iter(cut.values())).update.rank}": self.alone({p: part.update for p, part in cut.items()}),
        }
        for name, bundle in shown.items():
            with self.attached(bundle):
                rows.append(bench.confirm_as_it_is(name, ()))
        return tuple(rows)

    def alone(self, updates: Mapping[str, LowRank]) -> Bundle:
        """Updates as the one expert of a bundle."""
        total = self.bundle.spec.num_train_timesteps
        return one_expert_bundle(updates, total, self.bundle.base_model, self.bundle.denoiser_class, {})

    def write(self, path: Path, found: Search, bundle: str) -> None:
        """Write the result of `search`."""
        assert self._searched is not None
        record = {"bundle": bundle, "weights": found.found.weights, "labels": found.labels}
        write_search(path, found, self._searched, {**record, "format": "timestep-experts/lora-search"})


class _LiveSum:
    """An attached bundle of one expert whose B is rewritten: A stays, since weights scale columns of B alone."""

    def __init__(self, mixture: Any, parts: Mapping[str, Sequence[LowRank]]) -> None:
        self._stacks = {path: mixture.layers[path].experts["n1"] for path in parts}
        self._parts = parts

    @torch.no_grad()
    def set(self, weights: Weights) -> None:
        """The exact sum at these weights."""
        for path, stack in self._stacks.items():
            stack.B[0].copy_(weighted_sum(self._parts[path], weights).up)


def _record(bundle: Path, model: str, settings: LoraSettings, merged: MergedLora) -> dict[str, Any]:
    return {
        "format": "timestep-experts/lora",
        "format_version": 1,
        "bundle": portable(bundle),
        "base_model": portable(model),
        "rank": settings.rank,
        "experts": [{"expert": e, "weight": w} for e, w in zip(merged.labels, merged.weights, strict=True)],
        "energy_kept": merged.total_kept,
        "energy_kept_by_layer": dict(merged.kept),
        "ranges": [[interval.lo, interval.hi] for interval in merged.ranges],
        "loss": {
            row.name: {
                "selection": {"mean": row.selection_mean, "ranges": row.selection},
                "confirmation": {"mean": row.confirmation_mean, "ranges": row.confirmation},
            }
            for row in merged.rows
        },
        "versions": tool_versions(),
    }
