"""Fostering: low-rank experts learn their intervals, and routers assemble them (TSM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from timestep_experts.build import (
    RunContext,
    build_assemble_settings,
    build_foster_settings,
    build_mixture,
    build_optimiser_settings,
    build_sample_settings,
    build_sampling_defaults,
    build_spec,
    build_targets,
)
from timestep_experts.config import AssembleConfig, FosterConfig, OptimizerConfig, Recipe, Variant
from timestep_experts.errors import UserError
from timestep_experts.intervals import Partition
from timestep_experts.jobs.methods.bundles import expert_candidates, write_bundle
from timestep_experts.jobs.methods.merging import merge_experts
from timestep_experts.jobs.methods.protocol import Candidate
from timestep_experts.jobs.paths import RESULT, VariantPaths
from timestep_experts.jobs.plan import (
    Memory,
    StagePlan,
    base_bytes,
    count_stage,
    pixel_shape,
    planned_device,
    prepare_for_memory,
    read_base,
)
from timestep_experts.jobs.stages import preview_experts, train_stage
from timestep_experts.mixture import Mixture, Mode
from timestep_experts.models import MetaModel
from timestep_experts.training import assemble, foster
from timestep_experts.training.memory import fake_networks, fake_pictures, step_peak
from timestep_experts.training.optimiser import state_bytes
from timestep_experts.training.stage import Stage


@dataclass(frozen=True)
class Fostering:
    """See `Method`."""

    kind: ClassVar[str] = "foster"
    recipe: Recipe
    variant: Variant
    config: FosterConfig
    paths: VariantPaths

    @property
    def assembles(self) -> bool:
        """Whether routers are trained: a single scale has none."""
        return self.config.assemble is not None and len(self.config.experts.scales) > 1

    def train(self, context: RunContext) -> None:
        """Foster, assemble and merge, as far as the variant says so."""
        self.foster(context)
        if self.assembles:
            self.assemble(context)
        merge_experts(self.recipe, self.variant, self.paths, context, self.partition)

    def foster(self, context: RunContext) -> None:
        """Stage 1: train the experts and write their bundle, for switching."""
        mixture = build_mixture(self.recipe, self.config, context.family)
        try:
            self._foster(mixture, context)
            if not (self.paths.stage("assemble") / RESULT).is_file():
                self._write(mixture, context, "switch")
        finally:
            mixture.detach()

    def assemble(self, context: RunContext) -> None:
        """Stage 2: train the routers of fostered experts and write their bundle, for routing.

        Raises:
            UserError: the experts are not fostered, or there is nothing to assemble.
        """
        config = self._assemble_config()
        mixture = build_mixture(self.recipe, self.config, context.family)
        try:
            settings = build_foster_settings(self.recipe, self.config, context.family.text_encoders)
            folders = [self.paths.stage(stage.name) for stage in foster(mixture, settings)]
            if missing := [folder.name for folder in folders if not (folder / RESULT).is_file()]:
                raise UserError(
                    f"variant {self.variant.name!r} is not fostered yet ({', '.join(missing)} missing in"
                    f" {self.paths.folder})"
                )
            self._foster(mixture, context)
            stage = assemble(mixture, build_assemble_settings(self.recipe, config))
            self._run(stage, mixture, context, config.optimizer, "route")
            self._write(mixture, context, "route")
        finally:
            mixture.detach()

    def _assemble_config(self) -> AssembleConfig:
        if self.config.assemble is None:
            raise UserError("recipe.method.assemble is null: this recipe has no second stage")
        return self.config.assemble

    def _foster(self, mixture: Mixture, context: RunContext) -> None:
        settings = build_foster_settings(self.recipe, self.config, context.family.text_encoders)
        for stage in foster(mixture, settings):
            self._run(stage, mixture, context, self.config.optimizer, "switch")

    def _run(self, stage: Stage, mixture: Mixture, context: RunContext, optimiser: OptimizerConfig, mode: Mode) -> None:
        left_out = {"modes"} if mode == "route" else {"modes", "assemble"}
        sampling = build_sample_settings(self.recipe, context.media)
        train_stage(
            self.recipe,
            context,
            stage,
            mixture,
            context.family,
            optimiser,
            self.paths.stage(stage.name),
            self.config.model_dump(mode="json", exclude=left_out),
            preview_experts(context, mixture, mode, sampling, mixture.spec.strata),
        )

    def _write(self, mixture: Mixture, context: RunContext, mode: Mode) -> None:
        defaults = build_sampling_defaults(self.recipe, context.media)
        write_bundle(self.recipe, self.variant, self.paths, mixture, context, mode, defaults)

    def candidates(self) -> list[Candidate]:
        """The experts in each mode, and merged."""
        modes: tuple[Mode, ...] = self.config.modes if self.assembles else ("switch",)
        sampling = partial(build_sample_settings, self.recipe)
        return expert_candidates(self.variant, self.paths, modes, sampling, self._is_unused)

    def _is_unused(self, stage: str, left_out: list[str]) -> bool:
        """Whether a stage trained a scale that is left out; coarse experts live on in the fine ones."""
        return self.config.schedule != "coarse_to_fine" and stage in {f"foster-{name}" for name in left_out}

    def partition(self, num_train_timesteps: int) -> Partition:
        """The strata of all scales."""
        return build_spec(self.config.experts, num_train_timesteps).strata

    def notes(self) -> list[str]:
        """See `Method`."""
        return []

    def plan(self, *, with_memory: bool = False) -> list[StagePlan]:
        """See `Method`."""
        meta_model = read_base(self.recipe)
        base = base_bytes(self.recipe, meta_model, trains_text=self.config.experts.text_target_modules is not None)
        mixture = attach_to_meta_model(self.config, meta_model)

        def make_stages() -> list[Stage]:
            stages = foster(mixture, build_foster_settings(self.recipe, self.config, meta_model.text_encoders))
            if not self.assembles:
                return stages
            return [*stages, assemble(mixture, build_assemble_settings(self.recipe, self._assemble_config()))]

        plans = [count_stage(self.variant.name, stage) for stage in make_stages()]
        if not with_memory:
            return plans
        memory = self._estimate(meta_model, mixture, make_stages, base)
        return [replace(plan, memory=estimated) for plan, estimated in zip(plans, memory, strict=True)]

    def _estimate(
        self, meta_model: MetaModel, mixture: Mixture, make_stages: Callable[[], list[Stage]], base: int
    ) -> list[Memory]:
        """The memory of each stage: one step of it on fake tensors."""
        recipe, training = self.recipe, self.recipe.training
        family = meta_model.make_family(with_second_denoiser=False)  # a sample meets one of two, and they are alike
        prepare_for_memory(recipe, family)
        as_tokens = self.config.experts.text_target_modules is not None
        networks = [
            *meta_model.denoisers.values(),
            *meta_model.text_encoders.values(),
            *meta_model.autoencoders.values(),
        ]
        with fake_networks(networks):
            pictures = fake_pictures(family, pixel_shape(recipe, family), as_tokens=as_tokens)
            stages = make_stages()  # of the parameters that have become fake
            peaks = [
                step_peak(
                    stage,
                    mixture,
                    family,
                    pictures,
                    training.gradient_accumulation_steps,
                    training.mixed_precision,
                    on_accelerator=planned_device(recipe) != "cpu",
                )
                for stage in stages
            ]
        stored = 4 * mixture.count_parameters().stored
        trained = [4 * sum(parameter.numel() for parameter in stage.parameters()) for stage in stages]
        return [
            Memory(base, stored + own + self._state_bytes(stage), peak - own)
            for stage, own, peak in zip(stages, trained, peaks, strict=True)
        ]

    def _state_bytes(self, stage: Stage) -> int:
        is_second = stage.name == "assemble" and self.config.assemble is not None
        source = self.config.assemble if is_second and self.config.assemble is not None else self.config
        settings = build_optimiser_settings(source.optimizer)
        shapes = [leaf.shape for param_group in stage.param_groups for leaf in param_group.leaves]
        return state_bytes(settings.name, settings.options, shapes)


def attach_to_meta_model(config: FosterConfig, meta_model: MetaModel) -> Mixture:
    """The method's experts on the meta device."""
    networks, targets = build_targets(config.experts, meta_model.denoisers, meta_model.text_encoders)
    spec = build_spec(config.experts, meta_model.num_train_timesteps)
    return Mixture.attach(networks, spec, targets, owned=meta_model.owned_intervals)
