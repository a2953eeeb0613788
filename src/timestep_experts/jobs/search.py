"""Search for the weights of a linear merge by held-out denoising loss: experts stay in memory, nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from tqdm import tqdm

from timestep_experts import __version__
from timestep_experts.build import build_family, build_loss_settings, build_validation, resolve_model
from timestep_experts.config import Recipe
from timestep_experts.evaluation.merges import MergeBench, MergeLosses, Trial
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.formats.checkpoints import Checkpoint
from timestep_experts.formats.experts import read_projections
from timestep_experts.formats.model_folders import find_weights
from timestep_experts.intervals import Interval, Partition
from timestep_experts.jobs.inputs import MergeInput, check_descent, finite_tensor, hash_inputs
from timestep_experts.jobs.merge import SEARCH_FORMAT
from timestep_experts.jobs.search_methods import SearchSettings, run_method
from timestep_experts.merging import Evaluated, Ledger, LiveMerge, WeightGroups, Weights
from timestep_experts.merging.live import check_shapes
from timestep_experts.models import Family
from timestep_experts.report.search_figures import loss_landscape, range_losses

_DEFAULT_RANGES = 4


@dataclass(frozen=True)
class Search:
    """What a search saw and found.

    Args:
        rows: base, every expert, uniform weights, what was found.
        evaluated: every point, in order.
        labels: of the numbers in a point.
        ranges: of t, in the order of the rows' losses.
        settings: of the search.
    """

    rows: tuple[MergeLosses, ...]
    evaluated: tuple[Evaluated, ...]
    labels: tuple[str, ...]
    ranges: tuple[Interval, ...]
    settings: SearchSettings

    @property
    def found(self) -> MergeLosses:
        """The best point that was evaluated."""
        return self.rows[-1]

    @property
    def num_evaluations(self) -> int:
        """Of the objective, all together."""
        return len(self.evaluated)


@dataclass(frozen=True)
class SearchInputs:
    """What `search_experts` reads.

    Args:
        experts: a fine-tuned copy of the denoiser each: a file, a folder with weights, or a pipeline's folder.
        groups: a regular expression of tensor names, to the group whose weights such tensors share; may be empty.
        boundaries: of the ranges that losses are reported by; ``None``: equal ones, as many as experts (of one: four).
    """

    experts: tuple[Path, ...]
    groups: Mapping[str, str]
    boundaries: tuple[float, ...] | None = None


def search_experts(recipe: Recipe, inputs: SearchInputs, output: Path, settings: SearchSettings) -> Search:
    """Search for the weights of full-weight experts; writes ``output`` and two figures beside it.

    Held in memory: the base twice (once live), every expert once, the validation set's latents.

    Args:
        recipe: gives the base, the data and how losses are measured.
        inputs: experts, groups and ranges.
        output: a ``.json`` to be made.
        settings: of the search.

    Raises:
        ValueError: an input cannot be read, or does not fit the base.
    """
    check_output(output)
    check_recipe(recipe)
    checkpoints = open_experts(inputs.experts, recipe)
    family = build_family(recipe)
    live = one_denoiser(family).state_dict()
    for checkpoint in checkpoints:
        check_shapes(live, {name: info.shape for name, info in checkpoint.tensors.items()}, str(checkpoint.path))
    groups = WeightGroups.of(len(checkpoints), live, inputs.groups)
    hashed, base = hash_inputs(checkpoints), hash_base(recipe, family)
    if base is not None:
        check_descent(base.sha256, str(base.weights.path), hashed)
    loss_settings = build_loss_settings(recipe, ranges_of(family, inputs.boundaries, len(checkpoints)))
    trial = Trial.on_halves(family, build_validation(recipe, family), loss_settings, settings.seed)
    search, bench = search_copies(trial, hashed, groups, settings)
    write_search(output, search, bench, describe_merge(recipe, base, hashed, groups, search))
    return search


def describe_merge(
    recipe: Recipe, base: MergeInput | None, experts: Sequence[MergeInput], groups: WeightGroups, search: Search
) -> dict[str, Any]:
    """What `read_search` needs to make the merge that a search found, for the record of `write_search`."""
    found = groups.settings(search.found.weights)
    return {
        "base": {"path": recipe.pretrained_model_name_or_path, "sha256": None if base is None else base.sha256},
        "experts": [expert.described() for expert in experts],
        "weights": found.weights,
        "block_weights": dict(found.block_weights),
        "groups": dict(groups.patterns),
    }


def search_copies(
    trial: Trial, experts: Sequence[MergeInput], groups: WeightGroups, settings: SearchSettings
) -> tuple[Search, MergeBench]:
    """Search for the weights of copies of the trial's one denoiser, which has its own weights back afterwards.

    Args:
        trial: what merges are tried on.
        experts: hashed, of the denoiser's names and shapes.
        groups: of its tensors.
        settings: of the search.

    Returns:
        The search, and the bench that it was made on.

    Raises:
        ValueError: a tensor is not finite, or no loss was.
    """
    live = one_denoiser(trial.family).state_dict()
    # In the order of their hashes, as `merge` adds them: the same sum to the bit.
    order = sorted(range(len(experts)), key=lambda i: experts[i].sha256)
    tensors = [{name: finite_tensor(experts[i], name) for name in live} for i in order]
    with LiveMerge(live, tensors) as merge:

        def apply(vector: Weights) -> None:
            chosen = groups.settings(vector).weights_by_tensor(live)
            merge.set({name: [chosen[name][i] for i in order] for name in merge.names})

        bench = MergeBench(trial, apply)
        names = [f"expert {i}" for i in range(len(experts))]
        return search_weights(bench, named_points(groups, names), groups.labels(), settings), bench


def named_points(groups: WeightGroups, names: Sequence[str]) -> dict[str, Weights]:
    """The rows of the table, found weights aside: base, every expert by itself, uniform weights (one expert: none)."""
    n = len(names)
    alone = [tuple(float(i == k) for i in range(n)) for k in range(n)]
    points = {"base": (0.0,) * n, **dict(zip(names, alone, strict=True))}
    if n > 1:
        points["uniform"] = (1 / n,) * n
    return {name: groups.everywhere(point) for name, point in points.items()}


def search_weights(
    bench: MergeBench, points: Mapping[str, Weights], labels: tuple[str, ...], settings: SearchSettings
) -> Search:
    """Search on a bench. The rows of the table are measured first: they cost little, and the search may begin there.

    Args:
        bench: measures weights.
        points: rows of the table by name; the last is where CMA-ES begins.
        labels: of the weights.
        settings: of the search.

    Raises:
        ValueError: no loss was finite.
    """
    start = list(points.values())[-1]
    most = settings.num_evaluations(len(labels)) + len(points)
    with tqdm(total=most, desc="searching", unit="evaluation") as bar:

        def show(point: Evaluated) -> None:
            bar.update()
            bar.set_postfix_str(f"loss {point.loss:.5g}")

        ledger = Ledger(bench.relative if settings.objective == "ranges" else bench.mean, show)
        for point in points.values():
            ledger(point, "table")
        run_method(ledger, start, settings)
    named = {**points, "found": ledger.best.weights}
    rows = tuple(bench.confirm(name, point) for name, point in named.items())
    return Search(rows, tuple(ledger.evaluated), labels, bench.ranges, settings)


def write_search(output: Path, search: Search, bench: MergeBench, record: Mapping[str, Any]) -> None:
    """Write a search as JSON, with figures of the landscape and of the ranges beside it."""
    trial = bench.trial
    document = {
        "format": SEARCH_FORMAT,
        "format_version": 1,
        **record,
        "objective": search.settings.objective,
        "loss": {row.name: _row(row) for row in search.rows},
        "ranges": [[interval.lo, interval.hi] for interval in search.ranges],
        "evaluated": [{**asdict(point), "ranges": bench.by_range(point.weights)} for point in search.evaluated],
        "labels": list(search.labels),
        "counts": {
            "evaluations": search.num_evaluations,
            "of_the_table": len(search.rows) - 1,
            "confirmations": len(search.rows),
            "selection_pictures": len(trial.selection),
            "confirmation_pictures": len(trial.confirmation),
            "samples_per_evaluation": len(trial.settings.bins) * trial.settings.num_pictures,
        },
        "seeds": {
            "halves": search.settings.seed,
            "selection": trial.settings.seed,
            "confirmation": trial.settings.seed + 1,
        },
        "settings": asdict(search.settings),
        "versions": {
            "timestep_experts": __version__,
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
        },
    }
    figures = loss_landscape(search.evaluated, search.labels), range_losses(search.rows, search.ranges)
    try:
        for path, figure in zip(figure_paths(output), figures, strict=True):
            with atomic_path(path) as draft:
                figure.savefig(draft, format="png")
        write_json(output, document)
    except BaseException:
        for path in figure_paths(output):
            path.unlink(missing_ok=True)
        raise


def read_groups(path: Path) -> dict[str, str]:
    """Groups by pattern from YAML: a mapping of regular expressions to names, in the file's order.

    Raises:
        ValueError: the file is unreadable or something else.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read groups from {path}: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise ValueError(f"{path} must map regular expressions over tensor names to names of groups")
    return value


def figure_paths(output: Path) -> tuple[Path, Path]:
    """Where the figures of a search are: the landscape, and the ranges."""
    return output.with_suffix(".landscape.png"), output.with_suffix(".ranges.png")


def check_output(output: Path) -> None:
    """Refuse an output that exists or has another ending.

    Raises:
        ValueError: it does.
    """
    if output.suffix != ".json":
        raise ValueError(f"the output must end in .json; got {output}")
    if output.exists():
        raise ValueError(f"{output} exists already; name an output to be made")


def one_denoiser(family: Family) -> torch.nn.Module:
    """The denoiser whose weights change.

    Raises:
        ValueError: there are several.
    """
    if len(family.denoisers) > 1:
        raise ValueError(f"{family.source} has {len(family.denoisers)} denoisers; only a base with one is supported")
    return family.denoiser


def check_recipe(recipe: Recipe) -> None:
    """Refuse a quantised base.

    Raises:
        ValueError: the recipe asks for one.
    """
    if recipe.training.base_quantization is not None:
        kind = recipe.training.base_quantization
        raise ValueError(
            f"recipe.training.base_quantization: a base in {kind} has no weights to add to; set it to null"
        )


def open_experts(paths: Sequence[Path], recipe: Recipe) -> list[Checkpoint]:
    """The experts' weights; of pipelines' folders, their denoisers'.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    if not paths:
        raise ValueError(f"give at least one --expert, fine-tuned from {recipe.pretrained_model_name_or_path}")
    places = [find_weights(path) for path in paths]
    for place in places:
        projections = read_projections(place) if place.is_dir() else None
        if projections is not None and projections.kept:
            raise ValueError(
                f"{place} has projections that are not in its weights ({projections.kept[0].name} and others), which a"
                " search cannot merge; train with projection: foldable, or give merge its weights yourself"
            )
    return [Checkpoint(place) for place in places]


def hash_base(recipe: Recipe, family: Family) -> MergeInput | None:
    """The base's own file, hashed; ``None`` for a base of the hub, which is not checked."""
    source = Path(resolve_model(recipe.pretrained_model_name_or_path))
    if not source.exists():
        return None
    return hash_inputs([Checkpoint(find_weights(source, None if source.is_file() else family.denoiser_name))])[0]


def ranges_of(family: Family, boundaries: Sequence[float] | None, num_experts: int) -> Partition:
    """The ranges of t that losses are reported by.

    Raises:
        ValueError: boundaries do not end at the base's T.
    """
    total = family.noise.num_train_timesteps
    if boundaries is None:
        return Partition.uniform(num_experts if num_experts > 1 else _DEFAULT_RANGES, total)
    partition = Partition(tuple(boundaries))
    if partition.num_train_timesteps != total:
        raise ValueError(
            f"--boundaries end at {partition.num_train_timesteps:g}; this base model has {total} timesteps"
        )
    return partition


def _row(row: MergeLosses) -> dict[str, Any]:
    return {
        "weights": row.weights,
        "selection": {"mean": row.selection_mean, "ranges": row.selection},
        "confirmation": {"mean": row.confirmation_mean, "ranges": row.confirmation},
    }
