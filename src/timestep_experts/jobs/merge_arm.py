"""The trained experts of an arm made one: copies a copy, LoRA experts a LoRA, by weights found on training pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from timestep_experts.build import Workshop, build_loss_settings
from timestep_experts.config import MergeConfig, Recipe
from timestep_experts.evaluation.merges import Trial
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.formats.checkpoints import Checkpoint, file_sha256
from timestep_experts.formats.experts import find_experts
from timestep_experts.intervals import Partition
from timestep_experts.jobs.decouple import base_weights, decouple_folder
from timestep_experts.jobs.inputs import hash_inputs
from timestep_experts.jobs.lora import LoraSettings, write_merged
from timestep_experts.jobs.merge import merge
from timestep_experts.jobs.search import describe_merge, search_copies, write_search
from timestep_experts.jobs.search_methods import SearchSettings
from timestep_experts.jobs.train import arm_folder, reported_partition
from timestep_experts.merging import QuadraticSettings, WeightGroups

_IDENTITY = "identity.json"


def merged_folder(recipe: Recipe, arm: str) -> Path:
    """Where an arm's merged denoiser or LoRA is, with the search that weighed it."""
    return arm_folder(recipe, arm) / "merged"


def expert_files(recipe: Recipe, arm: str) -> list[Path]:
    """The files that an arm's training wrote, from low to high noise.

    Raises:
        ValueError: the arm has no bundle, or a range no expert yet.
    """
    if not recipe.arm(arm).is_decoupled:
        file = arm_folder(recipe, arm) / "bundle" / "mixture.safetensors"
        if not file.is_file():
            raise ValueError(f"arm {arm!r} is not trained yet: there is no {file}")
        return [file]
    folders, _, _ = find_experts(decouple_folder(recipe, arm))
    return [file for folder in folders for file in Checkpoint(folder).files]


def merge_arm(recipe: Recipe, arm: str, workshop: Workshop) -> None:
    """Merge the experts of one arm; what is merged already, of the same experts by the same settings, is kept.

    Weights are chosen by the loss on training pictures, so the validation pictures of the table stay unseen.

    Args:
        recipe: of the run.
        arm: its name.
        workshop: base and pictures.

    Raises:
        ValueError: the arm is not trained, does not merge, or its base has no weights to merge into.
    """
    own, folder = recipe.arm(arm), merged_folder(recipe, arm)
    if own.merge is None:
        raise ValueError(f"recipe.arms.{arm}: it has no section merge")
    partition = reported_partition(recipe, workshop)
    identity = _identity(own, own.merge, expert_files(recipe, arm), workshop, partition)
    stored = folder / _IDENTITY
    if stored.is_file() and json.loads(stored.read_text(encoding="utf-8")) == identity:
        return
    trial = _make_trial(own, own.merge, workshop, partition)
    search = _search_settings(own.merge, own.seed)
    with atomic_path(folder) as draft:
        if own.is_decoupled:
            _merge_copies(own, decouple_folder(recipe, arm), draft, trial, search)
        else:
            assert own.merge.rank is not None  # the recipe was checked
            lora = LoraSettings(own.merge.rank, model=own.pretrained_model_name_or_path, with_bundle=True)
            write_merged(arm_folder(recipe, arm) / "bundle", draft, lora, lambda: trial, search)
        write_json(draft / _IDENTITY, identity)


def _make_trial(recipe: Recipe, config: MergeConfig, workshop: Workshop, partition: Partition) -> Trial:
    """Choose on training pictures; what is confirmed on validation pictures is for the search's own table."""
    bins, pictures = config.bins_per_interval, config.num_pictures
    settings = replace(build_loss_settings(recipe, partition), bins_per_interval=bins, num_pictures=pictures)
    return Trial(workshop.family, workshop.train, workshop.validation, settings)


def _search_settings(config: MergeConfig, seed: int) -> SearchSettings:
    quadratic = QuadraticSettings(refinements=config.refinements)
    return SearchSettings(config.method, config.objective, quadratic, config.grid, config.budget, seed)


def _merge_copies(recipe: Recipe, decoupled: Path, output: Path, trial: Trial, settings: SearchSettings) -> None:
    base = base_weights(recipe, trial.family)
    if base is None:
        raise ValueError(
            f"recipe.pretrained_model_name_or_path: {recipe.pretrained_model_name_or_path} has no folder of"
            " .safetensors to merge into; convert it to one"
        )
    folders, _, _ = find_experts(decoupled)
    hashed, *experts = hash_inputs([Checkpoint(folder) for folder in (base, *folders)])
    groups = WeightGroups.of(len(experts), trial.family.denoiser.state_dict(), {})
    search, bench = search_copies(trial, experts, groups, settings)
    merge(base, output, folders, groups.settings(search.found.weights))
    write_search(output / "search.json", search, bench, describe_merge(recipe, hashed, experts, groups, search))


def _identity(
    recipe: Recipe, config: MergeConfig, experts: Iterable[Path], workshop: Workshop, partition: Partition
) -> dict[str, Any]:
    """Whatever decides the bytes of a merge."""
    return {
        "merge": config.model_dump(mode="json"),
        "base_model": recipe.pretrained_model_name_or_path,
        "seeds": [recipe.seed, recipe.evaluation.seed],
        "experts": [file_sha256(file) for file in experts],
        "train_pictures": workshop.train.key,
        "boundaries": list(partition.boundaries),
    }
