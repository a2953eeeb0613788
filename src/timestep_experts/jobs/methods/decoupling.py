"""Decoupling: full copies of the denoiser learn one range of timesteps each, and may be merged (DeMe)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from timestep_experts.build import (
    RunContext,
    build_decouple_settings,
    build_sample_settings,
    build_sampling_defaults,
)
from timestep_experts.config import DecoupleConfig, Recipe, Variant
from timestep_experts.data import DecodeSettings
from timestep_experts.errors import UserError
from timestep_experts.formats import tool_versions
from timestep_experts.formats.checkpoints import Checkpoint
from timestep_experts.formats.experts import (
    ExpertRecord,
    StoredProjections,
    find_experts,
    read_projections,
    write_expert,
)
from timestep_experts.inference import SampleSettings, attach_ensemble
from timestep_experts.intervals import Partition
from timestep_experts.jobs.methods.low_rank import require_merged
from timestep_experts.jobs.methods.merging import Merging, base_sha256
from timestep_experts.jobs.methods.protocol import Candidate, Costs
from timestep_experts.jobs.paths import VariantPaths
from timestep_experts.jobs.plan import (
    Memory,
    StagePlan,
    base_bytes,
    count_stage,
    estimate_peaks,
    optimiser_bytes,
    planned_device,
    read_base,
)
from timestep_experts.jobs.stages import Preview, train_stage
from timestep_experts.merging import fold, folded_layers
from timestep_experts.mixture import Mixture, ParameterCount
from timestep_experts.models import Family, MetaModel
from timestep_experts.training import Decoupled, DecoupleSettings, decouple
from timestep_experts.training.full_copy import FullCopy, matching_names
from timestep_experts.training.log import training_cost
from timestep_experts.training.loop import is_finished


@dataclass(frozen=True)
class Decoupling:
    """See `Method`."""

    name: ClassVar[str] = "decouple"
    recipe: Recipe
    variant: Variant
    config: DecoupleConfig
    paths: VariantPaths
    ranges: tuple[int, ...]

    def of_ranges(self, ranges: Sequence[int] | None) -> Decoupling:
        """The same for some of the ranges alone; ``None``: for all.

        Raises:
            UserError: there is no such range.
        """
        count = self.config.num_ranges
        if wrong := [index for index in ranges or () if not 0 <= index < count]:
            raise UserError(f"there is no range {wrong[0]}: this recipe has {count}, from 0 to {count - 1}")
        return self if ranges is None else replace(self, ranges=tuple(dict.fromkeys(ranges)))

    def train(self, context: RunContext) -> None:
        """Train the copies of all ranges, and merge them if the variant says so."""
        for index in self.ranges:
            self.train_range(index, context)
        if self.variant.merge is not None:
            Merging(self.recipe, self.variant.merge, self.paths, context).merge_copies()

    def train_range(self, index: int, context: RunContext) -> tuple[Path, tuple[str, ...]]:
        """Train the copy of one range and write its folder, which ``merge`` and any diffusers tool read.

        Args:
            index: of the range, from 0 at low noise.
            context: base and pictures.

        Returns:
            The copy's folder, and the names of projections that are not in its weights.

        Raises:
            UserError: see `training.decouple` and `run_stage`.
        """
        family = context.family
        settings = self.settings(family.noise.num_train_timesteps)
        decoupled = decouple(family, settings, index)
        preview = Preview(
            decoupled.family,
            build_sample_settings(self.recipe, context.decoding),
            settings.partition,
            observing=decoupled.trainee.as_expert,
        )
        with _base_away(family, settings):
            train_stage(
                self.recipe,
                context,
                decoupled,
                self.config.optimizer,
                self.paths.copy_stage(index),
                self._deciding(settings, index),
                preview,
            )
        return self.paths.copy(index), self._write(settings, index, decoupled, context)

    def settings(self, num_train_timesteps: int) -> DecoupleSettings:
        """How the copies are trained; see `build_decouple_settings`."""
        return build_decouple_settings(self.recipe, self.config, num_train_timesteps)

    def _deciding(self, settings: DecoupleSettings, index: int) -> dict[str, Any]:
        """Whatever of the method decides the bytes of one copy; other ranges' budgets do not."""
        return {
            **self.config.model_dump(mode="json", exclude={"intervals", "boundaries", "max_train_steps"}),
            "boundaries": list(settings.partition.boundaries),
            "range": index,
            "max_train_steps": settings.max_train_steps[index],
        }

    def _write(
        self, settings: DecoupleSettings, index: int, decoupled: Decoupled, context: RunContext
    ) -> tuple[str, ...]:
        trainee, denoiser = decoupled.trainee, decoupled.trainee.denoiser
        shared = {"data", "resolution", "max_sequence_length"}
        record = ExpertRecord(
            index=index,
            boundaries=settings.partition.boundaries,
            base_model=self.recipe.pretrained_model_name_or_path,
            denoiser_class=type(denoiser).__name__,
            seed=self.recipe.seed,
            sampling=build_sampling_defaults(self.recipe, context.decoding),
            provenance={
                "recipe": {
                    **self.recipe.model_dump(mode="json", include=shared),
                    "method": self.config.model_dump(mode="json"),
                },
                "versions": tool_versions(),
            },
        )
        with trainee.as_expert():
            deltas = {name: delta.detach().cpu().clone() for name, delta in trainee.projections.named_deltas().items()}
            tensors = expert_tensors(trainee, deltas)
        places = tuple(trainee.projections.places)
        projections = StoredProjections(places, deltas) if places else None
        config: Any = decoupled.family.denoiser
        base = base_sha256(self.recipe, decoupled.family)
        write_expert(self.paths.copy(index), config.save_config, tensors, record, base, projections)
        return tuple(trainee.projections.kept())

    def stages(self) -> dict[Path, dict[str, Any]]:
        """See `Method`."""
        settings = self.settings(read_base(self.recipe).num_train_timesteps)
        return {self.paths.copy_stage(index): self._deciding(settings, index) for index in self.ranges}

    def candidates(self) -> list[Candidate]:
        """The copies as an ensemble, and merged."""
        rows: list[Candidate] = [CopiesCandidate(self, "switch")]
        return rows if self.variant.merge is None else [*rows, CopiesCandidate(self, "merged")]

    def notes(self) -> list[str]:
        """See `Method`."""
        return [
            "Decoupled copies switch as an ensemble. They take the base's place, so none of their parameters is active"
            " on top of it; stored is what must be kept of them."
        ]

    def plan(self, *, with_memory: bool = False) -> list[StagePlan]:
        """See `Method`."""
        meta_model = read_base(self.recipe)
        settings = self.settings(meta_model.num_train_timesteps)
        family = meta_model.make_family()
        plans = []
        for number in self.ranges:
            stage = decouple(family, settings, number).stage
            plan = count_stage(self.variant.name, stage, self.config.optimizer)
            plans.append(replace(plan, samples_per_expert=(plan.samples, plan.samples), num_experts=1))
        if not with_memory:
            return plans
        memory = self._estimate(meta_model, settings)
        return [replace(plan, memory=memory) for plan in plans]

    def _estimate(self, meta_model: MetaModel, settings: DecoupleSettings) -> Memory:
        """The memory of one range's training, which is that of every other one."""
        [(made, peak)] = estimate_peaks(
            self.recipe, meta_model, lambda family: [decouple(family, settings, 0)], trains_text=False
        )
        base = base_bytes(self.recipe, meta_model, trains_text=False)
        if not settings.consistency and planned_device(self.recipe) != "cpu":
            base -= sum(t.nbytes for n in meta_model.denoisers.values() for t in (*n.parameters(), *n.buffers()))
        trained = 4 * sum(parameter.numel() for parameter in made.stage.parameters())
        copy = 4 * sum(parameter.numel() for parameter in made.family.denoiser.parameters())
        averages = trained * (settings.ema_decay is not None)
        state = optimiser_bytes(self.config.optimizer, made.stage)
        return Memory(base, copy + averages + trained + state, peak - trained)


@dataclass(frozen=True)
class CopiesCandidate:
    """See `Candidate`: full copies as an ensemble, or merged into one."""

    method: Decoupling
    mode: Literal["switch", "merged"]

    @property
    def variant(self) -> str:
        """The name of the variant."""
        return self.method.variant.name

    def check(self) -> None:
        """See `Candidate`."""
        if self.mode == "merged":
            require_merged(self.variant, self.method.paths)
        find_experts(self.method.paths.copies)

    def files(self) -> list[Path]:
        """The weights of all copies, or of the merged one."""
        merged = [self.method.paths.merged]
        folders = merged if self.mode == "merged" else find_experts(self.method.paths.copies)[0]
        return [file for folder in folders for file in Checkpoint(folder).files]

    @contextmanager
    def on(self, family: Family) -> Iterator[Mixture | None]:
        """Put the copies in the denoiser's place."""
        folders, partition, _ = find_experts(self.method.paths.copies)
        if self.mode == "merged":
            folders = [self.method.paths.merged]
            partition = Partition.uniform(1, partition.num_train_timesteps)
        ensemble = attach_ensemble(family.pipeline(), folders, partition, "all")
        try:
            yield None
        finally:
            ensemble.detach()

    def costs(self, family: Family, mixture: Mixture | None) -> Costs:  # noqa: ARG002 - copies are no mixture
        """Copies take the base's place, so none of their parameters comes on top of it while they generate."""
        settings = self.method.settings(family.noise.num_train_timesteps)
        folders, _, _ = find_experts(self.method.paths.copies)
        sizes = {name: parameter.numel() for name, parameter in family.denoiser.named_parameters()}
        trained = len(folders) * sum(sizes[name] for name in matching_names(family.denoiser, settings.trainable))
        for folder in folders:
            projections = read_projections(folder)
            trained += 0 if projections is None else sum(delta.numel() for delta in projections.deltas.values())
        stored = sum(sizes.values()) * (1 if self.mode == "merged" else len(folders))
        return Costs(ParameterCount(stored, 0, trained), *training_cost(filter(is_finished, self.method.stages())))

    def sampling(self, decoding: DecodeSettings) -> SampleSettings:
        """As the base."""
        return build_sample_settings(self.method.recipe, decoding)


def expert_tensors(trainee: FullCopy, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy's weights as they are now, on the CPU, with foldable projections in them."""
    tensors = {name: tensor.detach().cpu() for name, tensor in trainee.denoiser.state_dict().items()}
    for layer, projection in folded_layers(trainee.projections.places).items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in tensors:
                tensors[name] = fold(tensors[name], deltas[projection])
    return tensors


@contextmanager
def _base_away(family: Family, settings: DecoupleSettings) -> Iterator[None]:
    """Without consistency nothing asks the base: it is on the CPU while its copy trains."""
    home = family.device
    try:
        if not settings.consistency:
            family.denoiser.to("cpu")
        yield
    finally:
        family.denoiser.to(home)
