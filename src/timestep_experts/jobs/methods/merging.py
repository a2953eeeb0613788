"""What was trained is merged into one: copies a copy, experts a LoRA, by weights that are found on training pictures.

The validation pictures of the table stay unseen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from timestep_experts.build import RunContext, build_loss_settings
from timestep_experts.config import MergeConfig, Recipe, Variant
from timestep_experts.errors import UserError
from timestep_experts.evaluation.merges import MergeSplit
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.formats.checkpoints import Checkpoint, file_sha256, weights_sha256
from timestep_experts.formats.experts import find_experts
from timestep_experts.formats.model_folders import find_weights
from timestep_experts.intervals import Partition
from timestep_experts.jobs.paths import VariantPaths
from timestep_experts.merging import QuadraticSettings, WeightGroups
from timestep_experts.models import Family, resolve_model
from timestep_experts.weights.inputs import hash_inputs
from timestep_experts.weights.lora import LoraSettings, write_merged
from timestep_experts.weights.merge import merge
from timestep_experts.weights.search import describe_merge, search_copies, write_search
from timestep_experts.weights.search_methods import SearchSettings

_FINGERPRINT = "fingerprint.json"


def merge_experts(
    recipe: Recipe,
    variant: Variant,
    paths: VariantPaths,
    context: RunContext,
    partition_of: Callable[[int], Partition],
) -> None:
    """Merge a variant's low-rank experts into a LoRA; do nothing where the variant merges nothing.

    What is merged already, of the same experts by the same settings, is kept.

    Args:
        recipe: of the run.
        variant: says how.
        paths: of the variant.
        context: base and pictures.
        partition_of: the intervals by which losses are reported, given T.

    Raises:
        UserError: the experts are not trained.
    """
    config = variant.merge
    if config is None:
        return

    def write(draft: Path, split: MergeSplit, search: SearchSettings) -> None:
        assert config.rank is not None  # the recipe was checked
        lora = LoraSettings(config.rank, model=recipe.pretrained_model_name_or_path, with_bundle=True)
        write_merged(paths.bundle, draft, lora, lambda: split, search)

    experts = [paths.bundle / "mixture.safetensors"]
    _merge_once(recipe, config, paths, context, partition_of(_total(context)), experts, write)


def merge_copies(
    recipe: Recipe,
    variant: Variant,
    paths: VariantPaths,
    context: RunContext,
    partition_of: Callable[[int], Partition],
) -> None:
    """Merge a variant's full copies into one; see `merge_experts`.

    Raises:
        UserError: a copy is not trained, or the base has no weights to merge into.
    """
    config = variant.merge
    if config is None:
        return
    folders, _, _ = find_experts(paths.copies)

    def write(draft: Path, split: MergeSplit, search: SearchSettings) -> None:
        base = base_weights(recipe, split.family)
        if base is None:
            raise UserError(
                f"recipe.pretrained_model_name_or_path: {recipe.pretrained_model_name_or_path} has no folder of"
                " .safetensors to merge into; convert it to one"
            )
        hashed, *experts = hash_inputs([Checkpoint(folder) for folder in (base, *folders)])
        groups = WeightGroups.of(len(experts), split.family.denoiser.state_dict(), {})
        found, bench = search_copies(split, experts, groups, search)
        merge(base, draft, folders, groups.settings(found.found.weights))
        write_search(
            draft / "search.json",
            found,
            bench,
            describe_merge(recipe.pretrained_model_name_or_path, hashed, experts, groups, found),
        )

    files = [file for folder in folders for file in Checkpoint(folder).files]
    _merge_once(recipe, config, paths, context, partition_of(_total(context)), files, write)


def _total(context: RunContext) -> int:
    return context.family.noise.num_train_timesteps


def _merge_once(
    recipe: Recipe,
    config: MergeConfig,
    paths: VariantPaths,
    context: RunContext,
    partition: Partition,
    experts: Iterable[Path],
    write: Callable[[Path, MergeSplit, SearchSettings], None],
) -> None:
    """Write the merged folder, unless the one that is there is of the same experts and settings."""
    deciding = _fingerprint(recipe, config, experts, context, partition)
    stored = paths.merged / _FINGERPRINT
    if stored.is_file() and json.loads(stored.read_text(encoding="utf-8")) == deciding:
        return
    settings = replace(
        build_loss_settings(recipe, partition),
        bins_per_interval=config.bins_per_interval,
        num_pictures=config.num_pictures,
    )
    # Weights are chosen on training pictures; what is confirmed on validation pictures is for the search's own table.
    split = MergeSplit(context.family, context.train, context.validation, settings)
    quadratic = QuadraticSettings(refinements=config.refinements)
    search = SearchSettings(config.method, config.objective, quadratic, config.grid, config.budget, recipe.seed)
    with atomic_path(paths.merged) as draft:
        write(draft, split, search)
        write_json(draft / _FINGERPRINT, deciding)


def _fingerprint(
    recipe: Recipe, config: MergeConfig, experts: Iterable[Path], context: RunContext, partition: Partition
) -> dict[str, Any]:
    """Whatever decides the bytes of a merge."""
    return {
        "merge": config.model_dump(mode="json"),
        "base_model": recipe.pretrained_model_name_or_path,
        "seeds": [recipe.seed, recipe.evaluation.seed],
        "experts": [file_sha256(file) for file in experts],
        "train_pictures": context.train.key,
        "boundaries": list(partition.boundaries),
    }


def base_sha256(recipe: Recipe, family: Family) -> str | None:
    """The hash of a base's weights as ``merge`` knows it; ``None`` where it would not read them."""
    place = base_weights(recipe, family)
    return None if place is None else weights_sha256({file.name: file_sha256(file) for file in Checkpoint(place).files})


def base_weights(recipe: Recipe, family: Family) -> Path | None:
    """The folder of the base's denoiser, as ``merge`` reads it; ``None`` where it would not."""
    source = Path(resolve_model(recipe.pretrained_model_name_or_path))
    if source.suffix == ".safetensors":
        return None
    config: Any = family.denoiser.config  # of a hub's model, it names the folder of the download
    place = find_weights(source, family.denoiser_name) if source.is_dir() else Path(config["_name_or_path"])
    try:
        Checkpoint(place)
    except ValueError:  # other formats than safetensors
        return None
    return place
