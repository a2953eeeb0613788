"""What was trained is merged into one: copies a copy, experts a LoRA, by weights that are found on training pictures.

The validation pictures of the table stay unseen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timestep_experts.build import RunContext, build_loss_settings, build_reported_partition
from timestep_experts.config import MergeConfig, Recipe
from timestep_experts.errors import UserError
from timestep_experts.evaluation.merges import MergeSplit
from timestep_experts.formats.atomic import atomic_path, write_json
from timestep_experts.formats.bundle import TENSORS
from timestep_experts.formats.checkpoints import Checkpoint, file_sha256, weights_sha256
from timestep_experts.formats.experts import find_experts
from timestep_experts.formats.model_folders import find_weights
from timestep_experts.intervals import Partition
from timestep_experts.jobs.paths import VariantPaths
from timestep_experts.merging import QuadraticSettings, WeightGroups
from timestep_experts.models import Family, resolve_model
from timestep_experts.training.loop import FINGERPRINT
from timestep_experts.weights.inputs import hash_inputs
from timestep_experts.weights.lora import LoraSettings, write_merged
from timestep_experts.weights.merge import merge
from timestep_experts.weights.search import describe_merge, search_copies, write_search
from timestep_experts.weights.search_methods import SearchSettings


@dataclass(frozen=True)
class Merging:
    """The merge of what one variant has trained.

    What is merged already, of the same experts by the same settings, is kept.

    Args:
        recipe: of the run.
        config: how to merge.
        paths: of the variant.
        context: base and pictures.
    """

    recipe: Recipe
    config: MergeConfig
    paths: VariantPaths
    context: RunContext

    def merge_experts(self) -> None:
        """Merge the variant's low-rank experts into a LoRA."""

        def write(draft: Path, split: MergeSplit, search: SearchSettings) -> None:
            assert self.config.rank is not None  # the recipe was checked
            lora = LoraSettings(self.config.rank, model=self.recipe.pretrained_model_name_or_path, with_bundle=True)
            write_merged(self.paths.bundle, draft, lora, lambda: split, search)

        self._merge_once([self.paths.bundle / TENSORS], write)

    def merge_copies(self) -> None:
        """Merge the variant's full copies into one.

        Raises:
            UserError: the base has no weights to merge into.
        """
        source = self.recipe.pretrained_model_name_or_path
        base = base_weights(self.recipe, self.context.family)
        if base is None:
            raise UserError(
                f"recipe.pretrained_model_name_or_path: {source} has no folder of .safetensors to merge into; convert"
                " it to one"
            )
        folders, _, _ = find_experts(self.paths.copies)

        def write(draft: Path, split: MergeSplit, search: SearchSettings) -> None:
            hashed, *experts = hash_inputs([Checkpoint(folder) for folder in (base, *folders)])
            groups = WeightGroups.of(len(experts), split.family.denoiser.state_dict(), {})
            found, bench = search_copies(split, experts, groups, search)
            merge(base, draft, folders, groups.settings(found.found.weights))
            record = describe_merge(source, hashed, experts, groups, found)
            write_search(draft / "search.json", found, bench, record)

        self._merge_once([file for folder in folders for file in Checkpoint(folder).files], write)

    def _merge_once(self, experts: Iterable[Path], write: Callable[[Path, MergeSplit, SearchSettings], None]) -> None:
        """Write the merged folder, unless the one that is there is of the same experts and settings."""
        config, context = self.config, self.context
        partition = build_reported_partition(self.recipe, context.family.noise.num_train_timesteps)
        deciding = self._fingerprint(experts, partition)
        stored = self.paths.merged / FINGERPRINT
        if stored.is_file() and json.loads(stored.read_text(encoding="utf-8")) == deciding:
            return
        settings = replace(
            build_loss_settings(self.recipe, partition),
            bins_per_interval=config.bins_per_interval,
            num_pictures=config.num_pictures,
        )
        # Training pictures choose; what validation pictures confirm is only for the table of the search.
        split = MergeSplit(context.family, context.train, context.validation, settings)
        quadratic = QuadraticSettings(refinements=config.refinements)
        seed = self.recipe.seed
        search = SearchSettings(config.method, config.objective, quadratic, config.grid, config.budget, seed)
        with atomic_path(self.paths.merged) as draft:
            write(draft, split, search)
            write_json(draft / FINGERPRINT, deciding)

    def _fingerprint(self, experts: Iterable[Path], partition: Partition) -> dict[str, Any]:
        """A fingerprint of whatever decides the bytes of a merge."""
        return {
            "merge": self.config.model_dump(mode="json"),
            "base": self.context.base_sha256,
            "seeds": [self.recipe.seed, self.recipe.evaluation.seed],
            "experts": [file_sha256(file) for file in experts],
            "train_pictures": self.context.train.key,
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
