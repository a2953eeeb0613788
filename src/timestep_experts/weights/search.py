"""Search for the weights of a linear merge by held-out denoising loss: experts stay in memory, nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from timestep_experts.errors import UserError
from timestep_experts.evaluation.merges import MergeBench, MergeLosses, MergeSplit
from timestep_experts.formats import portable, tool_versions
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.formats.checkpoints import Checkpoint
from timestep_experts.formats.experts import read_projections
from timestep_experts.formats.model_folders import find_weights
from timestep_experts.formats.yaml_text import read_yaml
from timestep_experts.intervals import Interval, Partition
from timestep_experts.merging import Evaluated, History, LiveMerge, WeightGroups, Weights
from timestep_experts.models import Family
from timestep_experts.report.search_figures import loss_landscape, range_losses
from timestep_experts.weights.fit import one_denoiser, require_fit
from timestep_experts.weights.inputs import MergeInput, finite_tensor
from timestep_experts.weights.measured import MeasuredBase
from timestep_experts.weights.merge import SEARCH_FORMAT
from timestep_experts.weights.search_methods import SearchSettings, run_method

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
        """How often the objective was evaluated, all calls counted."""
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


def search_experts(measured: MeasuredBase, inputs: SearchInputs, output: Path, settings: SearchSettings) -> Search:
    """Search for the weights of full-weight experts; writes ``output`` and two figures beside it.

    Held in memory: the base twice (once live), every expert once, the validation set's latents.

    Args:
        measured: the base, and what losses are measured on.
        inputs: experts, groups and ranges.
        output: a ``.json`` to be made.
        settings: of the search.

    Raises:
        UserError: an input cannot be read, or does not fit the base.
    """
    check_output(output)
    checkpoints = open_experts(inputs.experts, measured.source)
    family = measured.load()
    groups = WeightGroups.of(len(checkpoints), one_denoiser(family).state_dict(), inputs.groups)
    base, hashed = require_fit(family, measured.source, checkpoints)
    ranges = ranges_of(family, inputs.boundaries, len(checkpoints))
    split = measured.split(family, ranges, settings.seed)
    search, bench = search_copies(split, hashed, groups, settings)
    write_search(output, search, bench, describe_merge(measured.source, base, hashed, groups, search))
    return search


def describe_merge(
    source: str, base: MergeInput | None, experts: Sequence[MergeInput], groups: WeightGroups, search: Search
) -> dict[str, Any]:
    """What `read_search` needs to make the merge that a search found, for the record of `write_search`."""
    found = groups.settings(search.found.weights)
    return {
        "base": {"path": portable(source), "sha256": None if base is None else base.sha256},
        "experts": [expert.described() for expert in experts],
        "weights": found.weights,
        "block_weights": dict(found.block_weights),
        "groups": dict(groups.patterns),
    }


def search_copies(
    split: MergeSplit, experts: Sequence[MergeInput], groups: WeightGroups, settings: SearchSettings
) -> tuple[Search, MergeBench]:
    """Search for the weights of copies of the one denoiser, which has its own weights back afterwards.

    Args:
        split: what merges are tried on.
        experts: hashed, of the denoiser's names and shapes.
        groups: of its tensors.
        settings: of the search.

    Returns:
        The search, and the bench that it was made on.

    Raises:
        UserError: a tensor is not finite, or no loss was.
    """
    live = one_denoiser(split.family).state_dict()
    # In the order of their hashes, as `merge` adds them: the same sum to the bit.
    order = sorted(range(len(experts)), key=lambda i: experts[i].sha256)
    tensors = [{name: finite_tensor(experts[i], name) for name in live} for i in order]
    with LiveMerge(live, tensors) as merge:

        def apply(vector: Weights) -> None:
            chosen = groups.settings(vector).weights_by_tensor(live)
            merge.set({name: [chosen[name][i] for i in order] for name in merge.names})

        bench = MergeBench(split, apply)
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
        UserError: no loss was finite.
    """
    start = list(points.values())[-1]
    most = settings.num_evaluations(len(labels)) + len(points)
    with tqdm(total=most, desc="searching", unit="evaluation") as bar:

        def show(point: Evaluated) -> None:
            bar.update()
            bar.set_postfix_str(f"loss {point.loss:.5g}")

        history = History(bench.relative if settings.objective == "ranges" else bench.mean, show)
        for point in points.values():
            history(point, "table")
        run_method(history, start, settings)
    named = {**points, "found": history.best.weights}
    rows = tuple(bench.confirm(name, point) for name, point in named.items())
    return Search(rows, tuple(history.evaluated), labels, bench.ranges, settings)


def write_search(output: Path, search: Search, bench: MergeBench, record: Mapping[str, Any]) -> None:
    """Write a search as JSON, with figures of the landscape and of the ranges beside it."""
    split = bench.split
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
            "selection_pictures": len(split.selection),
            "confirmation_pictures": len(split.confirmation),
            "samples_per_evaluation": len(split.settings.bins) * split.settings.num_pictures,
        },
        "seeds": {
            "halves": search.settings.seed,
            "selection": split.settings.seed,
            "confirmation": split.settings.seed + 1,
        },
        "settings": asdict(search.settings),
        "versions": tool_versions(),
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
        UserError: the file is unreadable or something else.
    """
    value = read_yaml(path)
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise UserError(f"{path} must map regular expressions over tensor names to names of groups")
    return value


def figure_paths(output: Path) -> tuple[Path, Path]:
    """Where the figures of a search are: the landscape, and the ranges."""
    return output.with_suffix(".landscape.png"), output.with_suffix(".ranges.png")


def check_output(output: Path) -> None:
    """Refuse an output that exists or has another ending.

    Raises:
        UserError: it does.
    """
    if output.suffix != ".json":
        raise UserError(f"the output must end in .json; got {output}")
    if output.exists():
        raise UserError(f"{output} exists already; name an output to be made")


def open_experts(paths: Sequence[Path], source: str) -> list[Checkpoint]:
    """The experts' weights; of pipelines' folders, their denoisers'.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    if not paths:
        raise UserError(f"give at least one expert, fine-tuned from {source}")
    places = [find_weights(path) for path in paths]
    for place in places:
        projections = read_projections(place) if place.is_dir() else None
        if projections is not None and projections.kept:
            raise UserError(
                f"{place} has projections that are not in its weights ({projections.kept[0].name} and others), which a"
                " search cannot merge; train with projection: foldable, or give merge its weights yourself"
            )
    return [Checkpoint(place) for place in places]


def ranges_of(family: Family, boundaries: Sequence[float] | None, num_experts: int) -> Partition:
    """The ranges of t that losses are reported by.

    Raises:
        UserError: boundaries do not end at the base's T.
    """
    total = family.noise.num_train_timesteps
    if boundaries is None:
        return Partition.uniform(num_experts if num_experts > 1 else _DEFAULT_RANGES, total)
    partition = Partition(tuple(boundaries))
    if partition.num_train_timesteps != total:
        raise UserError(f"boundaries end at {partition.num_train_timesteps:g}; this base model has {total} timesteps")
    return partition


def _row(row: MergeLosses) -> dict[str, Any]:
    return {
        "weights": row.weights,
        "selection": {"mean": row.selection_mean, "ranges": row.selection},
        "confirmation": {"mean": row.confirmation_mean, "ranges": row.confirmation},
    }
