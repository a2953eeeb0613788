"""The rows of a run's table: which weights an arm has in each mode, and what they took to make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from timestep_experts.config import Recipe
from timestep_experts.formats import load_bundle
from timestep_experts.formats.checkpoints import Checkpoint
from timestep_experts.formats.experts import find_experts, read_projections
from timestep_experts.inference import attach, attach_ensemble, detach
from timestep_experts.intervals import Partition
from timestep_experts.jobs.decouple import build_decouple_settings, decouple_folder
from timestep_experts.jobs.merge_arm import expert_files, merged_folder
from timestep_experts.jobs.train import arm_folder, has_second_stage
from timestep_experts.mixture import Mixture, Mode, ParameterCount
from timestep_experts.models import Family
from timestep_experts.training.full_copy import matching_names
from timestep_experts.training.log import read_log

BASE = "base"
RowMode = Mode | Literal["merged"]


@dataclass(frozen=True)
class Costs:
    """What a row took to train, and takes to use.

    Args:
        parameters: trained (in all stages together), stored, and active besides the base's.
        num_images_seen: training samples, all stages together.
        seconds: of training, all stages together.
    """

    parameters: ParameterCount
    num_images_seen: int
    seconds: float


def modes_of(recipe: Recipe, arm: str) -> tuple[RowMode, ...]:
    """How an arm is measured: ``switch`` is an ensemble of decoupled copies too."""
    own = recipe.arm(arm)
    trained: tuple[RowMode, ...] = own.modes if has_second_stage(recipe, arm) else ("switch",)
    return trained if own.merge is None else (*trained, "merged")


@dataclass(frozen=True)
class Row:
    """A model in one mode.

    Args:
        recipe: of the run.
        arm: its name, or `BASE`.
        mode: of its experts.
    """

    recipe: Recipe
    arm: str
    mode: RowMode

    @property
    def is_decoupled(self) -> bool:
        """Whether it is made of full copies."""
        return self.arm != BASE and self.recipe.arm(self.arm).is_decoupled

    def check(self) -> None:
        """See that it can be measured.

        Raises:
            ValueError: it is not trained, or not merged.
        """
        if self.arm == BASE:
            return
        if self.mode == "merged" and not merged_folder(self.recipe, self.arm).is_dir():
            raise ValueError(f"arm {self.arm!r} is not merged yet: the command run does that")
        if self.is_decoupled:
            expert_files(self.recipe, self.arm)
        else:
            load_bundle(self._bundle())

    def files(self) -> list[Path]:
        """The weights that decide what is measured, besides the base's."""
        if self.arm == BASE:
            return []
        if self.mode == "merged" and self.is_decoupled:
            return list(Checkpoint(merged_folder(self.recipe, self.arm)).files)
        return expert_files(self.recipe, self.arm) if self.is_decoupled else [self._bundle() / "mixture.safetensors"]

    @contextmanager
    def on(self, family: Family) -> Iterator[Mixture | None]:
        """Put it on a family's pipeline, which has its own weights back afterwards; yields its mixture, if any."""
        if self.arm == BASE:
            yield None
            return
        pipeline = family.pipeline()
        if not self.is_decoupled:
            mixture = attach(pipeline, self._bundle(), "switch" if self.mode == "merged" else self.mode)
            try:
                yield mixture
            finally:
                detach(pipeline)
            return
        folders, partition, _ = find_experts(decouple_folder(self.recipe, self.arm))
        if self.mode == "merged":
            folders = [merged_folder(self.recipe, self.arm)]
            partition = Partition.uniform(1, partition.num_train_timesteps)
        ensemble = attach_ensemble(pipeline, folders, partition, "all")
        try:
            yield None
        finally:
            ensemble.detach()

    def _bundle(self) -> Path:
        folder = merged_folder if self.mode == "merged" else arm_folder
        return folder(self.recipe, self.arm) / "bundle"


def count_costs(row: Row, family: Family, mixture: Mixture | None) -> Costs:
    """What a row took to train, and takes to use.

    Args:
        row: which.
        family: its base, carrying the row's experts.
        mixture: of those, if it has one.
    """
    if row.arm == BASE:
        return Costs(ParameterCount(0, 0, 0), 0, 0.0)
    if row.is_decoupled:
        return _costs_of_copies(row, family)
    assert mixture is not None
    counted = mixture.count_parameters()
    if row.mode == "merged":
        bundle = load_bundle(arm_folder(row.recipe, row.arm) / "bundle")
        trained = sum(tensor.numel() for name, tensor in bundle.tensors.items() if ".experts." in name)
        stages = [folder for folder in stage_folders(row.recipe, row.arm) if folder.name != "assemble"]
        return Costs(ParameterCount(counted.stored, counted.active, trained), *_training(stages))
    trained = _trained(mixture, row.mode)
    stored = counted.stored if row.mode == "route" else trained
    return Costs(ParameterCount(stored, counted.active, trained), *_training(_used_stages(row, mixture)))


def stage_folders(recipe: Recipe, arm: str) -> list[Path]:
    """Where the stages of an arm's training are."""
    home = decouple_folder(recipe, arm) if recipe.arm(arm).is_decoupled else arm_folder(recipe, arm)
    return sorted(path.parent for path in home.glob("*/result.safetensors"))


def _costs_of_copies(row: Row, family: Family) -> Costs:
    """Copies take the base's place, so none of their parameters comes on top of it while they draw."""
    own = row.recipe.arm(row.arm)
    settings = build_decouple_settings(own, family.noise.num_train_timesteps)
    folders, _, _ = find_experts(decouple_folder(row.recipe, row.arm))
    sizes = {name: parameter.numel() for name, parameter in family.denoiser.named_parameters()}
    trained = len(folders) * sum(sizes[name] for name in matching_names(family.denoiser, settings.trainable))
    for folder in folders:
        projections = read_projections(folder)
        trained += 0 if projections is None else sum(delta.numel() for delta in projections.deltas.values())
    stored = sum(sizes.values())
    stored *= 1 if row.mode == "merged" else len(folders)
    return Costs(ParameterCount(stored, 0, trained), *_training(stage_folders(row.recipe, row.arm)))


def _trained(mixture: Mixture, mode: RowMode) -> int:
    """Parameters trained for a mode: routers and contexts that rest at gate 0 are not there for switching."""
    scales = [scale for scale in mixture.spec.scales if mode == "route" or scale.constant_gate]
    experts = sum(p.numel() for scale in scales for stack in mixture.stacks(scale.name) for p in stack.parameters())
    routers = sum(p.numel() for group in mixture.router_parameters() for p in group)
    return experts + (routers if mode == "route" else 0)


def _used_stages(row: Row, mixture: Mixture) -> list[Path]:
    """The stages whose work a mode uses; see `_trained`."""
    left_out = [scale.name for scale in mixture.spec.scales if row.mode != "route" and not scale.constant_gate]
    unused = {f"foster-{name}" for name in left_out}
    if row.recipe.arm(row.arm).foster.method == "coarse_to_fine":
        unused = set()  # the coarse experts live on in the fine ones
    unused |= {"assemble"} if row.mode == "switch" else set()
    prefixes = tuple(f"distill-{name}." for name in left_out)
    folders = stage_folders(row.recipe, row.arm)
    return [folder for folder in folders if folder.name not in unused and not folder.name.startswith(prefixes)]


def _training(stages: list[Path]) -> tuple[int, float]:
    """Samples and seconds of stages."""
    samples, seconds = 0, 0.0
    for folder in stages:
        records = [record for record in read_log(folder) if "num_images_seen" in record]
        samples += int(records[-1]["num_images_seen"])
        seconds += sum(record["seconds"] for record in records)
    return samples, seconds
