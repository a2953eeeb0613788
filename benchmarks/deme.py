"""Compare decoupled experts, merged and not, with finetunes of equal training, over seeds (`deme_variants` says which).

Run: python benchmarks/deme.py recipes/cifar10.yaml --seeds 0 1 --output benchmarks/results/cifar10.json

Every piece is kept in the recipe's ``output_dir``; the same command goes on where it was stopped, and repeats nothing
that is finished. Merge weights are chosen on the recipe's ``data.validation_path``. All that is reported is measured on
``--report``, which shares no picture with it: the loss in every range of t with common random numbers, and the Frechet
distance of generated pictures in the features of ``--features`` (`picture_features`), all rows from the same noise.

Writes ``--output``, ``{seed: rows}``, and to ``output_dir`` a figure (``ranges.png``) and pictures (``sheet.png``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from deme_variants import GROUPS, Copy, Row, check, copies, rows_of, training_of
from picture_features import features_of, load_classifier
from timestep_experts.build import (
    RunContext,
    build_context,
    build_datasets,
    build_decode_settings,
    build_decoupled_partition,
    build_family,
    build_loss_settings,
    build_sample_settings,
    build_validation,
)
from timestep_experts.config import Recipe, load_recipe
from timestep_experts.data import decode_all
from timestep_experts.evaluation import frechet_distance, loss_curve
from timestep_experts.evaluation.merges import MergeLosses
from timestep_experts.formats.atomic import atomic_path, write_json, write_tensors
from timestep_experts.formats.checkpoints import Checkpoint, file_sha256, weights_sha256
from timestep_experts.formats.model_folders import find_weights
from timestep_experts.inference import attach_ensemble, sample
from timestep_experts.intervals import Partition
from timestep_experts.jobs.evaluate import prepare_output
from timestep_experts.jobs.measuring import measured_base
from timestep_experts.merging import MergeSettings
from timestep_experts.models import Family
from timestep_experts.report import save_sheet
from timestep_experts.report.search_figures import range_losses
from timestep_experts.weights.merge import merge, read_search
from timestep_experts.weights.search import SearchInputs, search_experts
from timestep_experts.weights.search_methods import SearchObjective, SearchSettings

NUM_SHOWN = 8
ResultRow = dict[str, Any]
Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Settings:
    """What is asked beside the recipe.

    Args:
        recipe: of the experts.
        report: folder of the pictures that results are of.
        features: file of the classifier whose features the Frechet distance is in.
        num_pictures: how many are generated for it per row; 0 generates none.
        objective: what merge weights are chosen to lower.
        search_pictures: per bin of t, while choosing.
        groups: of copies, those that are trained and compared.
    """

    recipe: Recipe
    report: str
    features: Path
    num_pictures: int
    objective: SearchObjective
    search_pictures: int
    groups: tuple[str, ...] = GROUPS


@dataclass(frozen=True)
class RowJob:
    """One row of one seed."""

    settings: Settings
    seed: int
    row: Row


def main() -> None:
    """Train, search, measure, show."""
    options = _parse()
    recipe = load_recipe(options.recipe, options.overrides)
    settings = Settings(
        recipe,
        options.report,
        options.features,
        options.num_pictures,
        options.objective,
        options.search_pictures,
        tuple(options.groups),
    )
    per_seed = compare(settings, options.seeds, options.workers)
    write_json(options.output, {str(seed): rows for seed, rows in per_seed.items()})
    partition = ranges_of(recipe)
    with atomic_path(recipe.output_dir / "ranges.png") as draft:
        range_losses(mean_losses(per_seed), partition.intervals).savefig(draft, format="png")
    if settings.num_pictures:
        show_pictures(settings, options.seeds[0])
    Console(width=180).print(as_table(per_seed, partition))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="of rows, beside the base")
    parser.add_argument("--report", default="work/cifar10/pictures/report", help="pictures that results are of")
    parser.add_argument("--features", type=Path, default=Path("work/cifar10/features.safetensors"))
    parser.add_argument(
        "--num-pictures", type=int, default=500, help="how many per row for the Frechet distance; 0: none"
    )
    parser.add_argument("--objective", choices=("mean", "ranges"), default="mean", help="of the search for weights")
    parser.add_argument("--search-pictures", type=int, default=32, help="per bin of t, while searching")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes that share the work")
    parser.add_argument("--output", type=Path, required=True, help="JSON with every number")
    return parser.parse_intermixed_args()


def default_workers() -> int:
    """One on a GPU, else one per core: single-threaded processes get more out of cores than threads do."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def compare(settings: Settings, seeds: Sequence[int], workers: int) -> dict[int, list[ResultRow]]:
    """All rows of all seeds; what is finished is read back.

    Raises:
        ValueError: the recipe cannot be compared, or pictures are in both the choosing and the reporting set.
    """
    recipe = settings.recipe
    check(recipe)
    require_apart(recipe, settings.report)
    prepare_output(recipe)
    document = recipe.model_dump_json(exclude_unset=True)
    _context(document)  # fills the cache on disk, before several processes do at once
    if workers > 1:
        _context.cache_clear()  # they hold the pictures themselves
    trained = [copy for seed in seeds for group in settings.groups for copy in copies(recipe, seed)[group]]
    longest_first = sorted(trained, key=lambda copy: -(3 * copy.samples + copy.base_samples))
    run_all(train_copy, [(document, copy) for copy in longest_first], workers)
    base, *others = rows_of(settings.groups)
    places = [(seed, row) for seed in seeds for row in others] + [(seeds[0], base)]
    places.sort(key=lambda place: place[1].how != "searched")  # which take longest
    measured = run_all(measure, [RowJob(settings, seed, row) for seed, row in places], workers)
    found = dict(zip(places, measured, strict=True))
    return {seed: [found[seeds[0], base], *(found[seed, row] for row in others)] for seed in seeds}


def run_all(function: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int) -> list[Outcome]:
    """A function of independent jobs, which begin in their order."""
    if workers == 1:
        return [function(job) for job in jobs]
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,)) as pool:
        return list(pool.map(function, jobs))


def require_apart(recipe: Recipe, report: str) -> None:
    """Refuse to report on pictures that weights were chosen by.

    Raises:
        ValueError: a file of the one set is, byte for byte, in the other.
    """
    sets = [_held_out(own).examples for own in (recipe, reporting(recipe, report))]
    digests = [{hashlib.sha256(example.read()).digest() for example in examples} for examples in sets]
    shared = len(digests[0] & digests[1])
    if shared:
        raise ValueError(
            f"{shared} pictures of {report} are in recipe.data.validation_path, {recipe.data.validation_path}, too:"
            " choosing and reporting need different ones"
        )


def reporting(recipe: Recipe, report: str) -> Recipe:
    """The recipe with the reporting pictures for validation."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation_path": report})})


def ranges_of(recipe: Recipe) -> Partition:
    """The experts' ranges."""
    total = build_family(recipe).noise.num_train_timesteps
    return build_decoupled_partition(check(recipe), total)


def train_copy(job: tuple[str, Copy]) -> None:
    """One full copy; one that is finished is only read."""
    document, copy = job
    copy.method.train_range(copy.index, _context(document))


@cache
def _context(document: str) -> RunContext:
    """The base and the encoded pictures, shared by all trainings of a process."""
    return build_context(Recipe.model_validate_json(document))


def _held_out(recipe: Recipe) -> Any:
    return build_datasets(recipe)[1]


def measure(job: RowJob) -> ResultRow:
    """One row: make the model, then measure it, unless this very model was measured so."""
    settings, recipe = job.settings, job.settings.recipe
    group = () if job.row.how == "base" else copies(recipe, job.seed)[job.row.group]
    folders = [copy.method.paths.copy(copy.index) for copy in group]
    source, found = recipe.pretrained_model_name_or_path, {"weights": None, "search_evaluations": 0}
    if job.row.how in ("uniform", "searched"):
        source, found = _merged(job, folders)
    served = folders if job.row.how == "copies" else []
    stored = row_path(recipe, job.seed, job.row)
    identity = _identity(settings, source, served)
    if stored.is_file():
        document = json.loads(stored.read_text(encoding="utf-8"))
        if document["identity"] == identity:
            return dict(document["row"])
    own = recipe.model_copy(update={"pretrained_model_name_or_path": source})
    measured, pictures = _measure_model(own, settings, served)
    row = {"label": job.row.label, **measured, **training_of(group), **found}
    if len(pictures):
        write_tensors(stored.with_suffix(".safetensors"), {"pictures": torch.from_numpy(pictures)})
    write_json(stored, {"identity": identity, "row": row})
    return row


def row_path(recipe: Recipe, seed: int, row: Row) -> Path:
    """Where a row's numbers are, and its pictures with another suffix; the base's are those of all seeds."""
    home = recipe.output_dir if row.how == "base" else recipe.output_dir / f"seed-{seed}"
    return home / "rows" / f"{row.slug}.json"


def _identity(settings: Settings, source: str, served: Iterable[Path]) -> dict[str, Any]:
    """Whatever decides a measurement."""
    recipe = settings.recipe
    return {
        "weights": [_weights_sha256(find_weights(Path(source)))] + [_weights_sha256(folder) for folder in served],
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "precision": recipe.training.mixed_precision,
        "report": str(settings.report),
        "max_validation_samples": recipe.data.max_validation_samples,
        "num_pictures": settings.num_pictures,
        "features": file_sha256(settings.features) if settings.num_pictures else None,
    }


def _weights_sha256(folder: Path) -> str:
    return weights_sha256({file.name: file_sha256(file) for file in Checkpoint(folder).files})


def _merged(job: RowJob, folders: Sequence[Path]) -> tuple[str, ResultRow]:
    """The merge of copies into a pipeline's folder, and the weights that it took."""
    recipe = job.settings.recipe
    home = recipe.output_dir / f"seed-{job.seed}"
    chosen, hashes, evaluations = MergeSettings((1 / len(folders),) * len(folders)), None, 0
    if job.row.how == "searched":
        settings = job.settings
        found = home / "searches" / f"{job.row.slug}-{settings.objective}-{settings.search_pictures}.json"
        if not found.is_file():
            _search(job, folders, found)
        chosen, hashes = read_search(found)
        evaluations = json.loads(found.read_text(encoding="utf-8"))["counts"]["evaluations"]
    output = home / "merged" / job.row.slug
    with atomic_path(output) as draft:
        merge(Path(recipe.pretrained_model_name_or_path), draft, folders, chosen, expert_hashes=hashes)
    return str(output), {"weights": list(chosen.weights), "search_evaluations": evaluations}


def _search(job: RowJob, folders: Sequence[Path], output: Path) -> None:
    settings, recipe = job.settings, job.settings.recipe
    evaluation = recipe.evaluation.model_copy(update={"num_pictures": settings.search_pictures})
    inputs = SearchInputs(tuple(folders), {}, ranges_of(recipe).boundaries)
    search_experts(
        measured_base(recipe.model_copy(update={"evaluation": evaluation})),
        inputs,
        output,
        SearchSettings(objective=settings.objective, seed=job.seed),
    )


def _measure_model(recipe: Recipe, settings: Settings, served: Sequence[Path]) -> tuple[ResultRow, NDArray[np.uint8]]:
    """Losses on the reporting pictures, and the distance of generated ones to them."""
    family, own = build_family(recipe), reporting(recipe, settings.report)
    partition = ranges_of(settings.recipe)
    if served:
        total = Partition.uniform(1, partition.num_train_timesteps)
        attach_ensemble(family.pipeline(), served, partition if len(served) > 1 else total, "all")
    curve = loss_curve(family, build_validation(own, family), build_loss_settings(recipe, partition))
    row: ResultRow = {"loss": curve.mean, "ranges": [curve.within(interval) for interval in partition.intervals]}
    row |= {"frechet": None, "frechet_of_real": None, "feature_accuracy": None}
    if not settings.num_pictures:
        return row, np.zeros((0, 1, 1, 3), np.uint8)
    pictures = generate(family, recipe, settings.num_pictures)
    document = settings.recipe.model_dump_json(exclude_unset=True)
    real, other, about = _references(document, settings.report, settings.features)
    generated = features_of(load_classifier(settings.features)[0], pictures)
    row |= {
        "frechet": frechet_distance(generated, real),
        "frechet_of_real": frechet_distance(other[: settings.num_pictures], real),
        "feature_accuracy": float(about.get("accuracy", "nan")),
    }
    return row, pictures


def generate(family: Family, recipe: Recipe, count: int) -> NDArray[np.uint8]:
    """Pictures of a pipeline without text, in the precision of training; picture i of all rows begins at one noise."""
    settings = build_sample_settings(recipe, build_decode_settings(recipe, None, flip=False))
    with torch.autocast(family.device.type, torch.bfloat16, enabled=recipe.training.mixed_precision == "bf16"):
        return sample(family.pipeline(), [""] * count, settings)


@cache
def _references(document: str, report: str, features: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Features of the reporting pictures and, as the least distance that real pictures have, of the choosing ones."""
    recipe = Recipe.model_validate_json(document)
    network, about = load_classifier(features)
    decoding = build_decode_settings(recipe, None, flip=False)
    sets = [_held_out(own).examples for own in (reporting(recipe, report), recipe)]
    real, other = (features_of(network, decode_all(examples, decoding)) for examples in sets)
    return real, other, about


def mean_losses(per_seed: dict[int, list[ResultRow]]) -> list[MergeLosses]:
    """Means over seeds, as the figure takes them."""
    rows = []
    for same in zip(*per_seed.values(), strict=True):
        ranges = tuple(statistics.mean(values) for values in zip(*(row["ranges"] for row in same), strict=True))
        mean = statistics.mean(row["loss"] for row in same)
        rows.append(MergeLosses(same[0]["label"], (), ranges, ranges, mean, mean))
    return rows


def as_table(per_seed: dict[int, list[ResultRow]], partition: Partition) -> Table:
    """Mean and standard deviation over seeds, row by row."""
    seeds = ", ".join(map(str, per_seed))
    first = next(iter(per_seed.values()))[0]
    title = f"mean and standard deviation over seeds {seeds}"
    if first["frechet"] is not None:
        title += (
            f"; Frechet of as many real pictures {first['frechet_of_real']:.3g}, in features of a classifier that is"
            f" {first['feature_accuracy']:.1%} right"
        )
    names = [str(interval) for interval in partition.intervals]
    table = Table("", "loss", *names, "Frechet", "updates per copy", "all updates", "samples", "weights", title=title)
    for same in zip(*per_seed.values(), strict=True):
        columns = [[row["loss"] for row in same], *zip(*(row["ranges"] for row in same), strict=True)]
        one = same[0]
        frechet = "" if one["frechet"] is None else _spread([row["frechet"] for row in same])
        updates = " ".join(map(str, dict.fromkeys(one["updates_per_expert"])))
        weights = "; ".join(" ".join(f"{w:.2f}" for w in row["weights"]) for row in same if row["weights"])
        counts = (updates, f"{one['total_updates']:,}", f"{one['samples']:,}", weights)
        table.add_row(one["label"], *map(_spread, columns), frechet, *counts)
    return table


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4g}" + (f" ± {deviation:.2g}" if deviation else "")


def show_pictures(settings: Settings, seed: int) -> Path:
    """The first pictures of every row, one row under the other, columns from the same noise."""
    recipe, shown, captions = settings.recipe, [], []
    for row in rows_of(settings.groups):
        pictures = load_file(row_path(recipe, seed, row).with_suffix(".safetensors"))["pictures"][:NUM_SHOWN].numpy()
        shown.append(pictures)
        captions += [row.label, *[""] * (len(pictures) - 1)]
    path = recipe.output_dir / "sheet.png"
    save_sheet(path, np.concatenate(shown), captions, columns=len(shown[0]))
    return path


if __name__ == "__main__":
    main()
