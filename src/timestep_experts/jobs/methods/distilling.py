"""Distilling: low-rank experts become a few-step generator, one expert after the other (TSM, section 4)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from safetensors import safe_open

from timestep_experts.build import (
    RunContext,
    build_assemble_settings,
    build_distill_settings,
    build_generator_defaults,
    build_generator_sample_settings,
    build_mixture,
    build_spec,
    build_targets,
)
from timestep_experts.config import AssembleConfig, DistillConfig, OptimizerConfig, Recipe, Variant
from timestep_experts.errors import UserError
from timestep_experts.intervals import Partition
from timestep_experts.jobs.methods.bundles import expert_candidates, write_bundle
from timestep_experts.jobs.methods.protocol import Candidate
from timestep_experts.jobs.paths import RESULT, VariantPaths
from timestep_experts.jobs.plan import StagePlan, read_base
from timestep_experts.jobs.stages import fingerprint, preview_experts, train_stage
from timestep_experts.mixture import Mixture, Mode
from timestep_experts.models import Family
from timestep_experts.training.checkpoint import require_same_fingerprint
from timestep_experts.training.distill import DistillSettings, DistillStage, distill, distill_router


@dataclass(frozen=True)
class Distilling:
    """See `Method`."""

    kind: ClassVar[str] = "distill"
    recipe: Recipe
    variant: Variant
    config: DistillConfig
    paths: VariantPaths

    @property
    def assembles(self) -> bool:
        """Whether routers are trained: a single scale has none."""
        return self.config.assemble is not None and len(self.config.experts.scales) > 1

    def train(self, context: RunContext) -> None:
        """Distil all experts, then assemble them if the variant says so."""
        self.distill(context)
        if self.assembles:
            self.assemble(context)

    def distill(self, context: RunContext, experts: Sequence[str] = ()) -> bool:
        """Distil experts; writes the bundle, for switching, as soon as all of them are there.

        Args:
            context: base and pictures.
            experts: only these, ``<scale>.<index>``; none means all.

        Returns:
            Whether all experts are there.

        Raises:
            UserError: there is no such expert, its inputs come from experts that are not there yet, or the base cannot
                be distilled.
        """
        mixture = build_mixture(self.recipe, self.config, context.family)
        try:
            stages = distill(mixture, context.family, self._settings(context.family))
            self._train_experts(stages, _chosen(stages, experts), mixture, context)
            is_whole = not self._unfinished(stages)
            if is_whole and not (self.paths.stage("assemble") / RESULT).is_file():
                self._write(mixture, context, "switch")
            return is_whole
        finally:
            mixture.detach()

    def assemble(self, context: RunContext) -> None:
        """Train the routers of distilled experts and write their bundle, for routing.

        Raises:
            UserError: the experts are not distilled, or there is nothing to assemble.
        """
        config = self._assemble_config()
        mixture = build_mixture(self.recipe, self.config, context.family)
        try:
            settings = self._settings(context.family)
            stages = distill(mixture, context.family, settings)
            if missing := self._unfinished(stages):
                raise UserError(
                    f"variant {self.variant.name!r} is not distilled yet ({', '.join(missing)} missing in"
                    f" {self.paths.folder})"
                )
            self._train_experts(stages, set(), mixture, context)
            del stages  # and with them the copy of the base that they share
            router = distill_router(mixture, context.family, settings, build_assemble_settings(self.recipe, config))
            self._run(router, config.optimizer, mixture, context, "route")
            self._write(mixture, context, "route")
        finally:
            mixture.detach()

    def _assemble_config(self) -> AssembleConfig:
        if self.config.assemble is None:
            raise UserError("recipe.method.assemble is null: this recipe has no second stage")
        return self.config.assemble

    def _settings(self, family: Family) -> DistillSettings:
        scale_factor = int(getattr(family.parts, "vae_scale_factor", 1))
        return build_distill_settings(self.recipe, self.config, scale_factor)

    def _train_experts(
        self, stages: list[DistillStage], wanted: set[str], mixture: Mixture, context: RunContext
    ) -> None:
        """Train those that are wanted; of all others take what is there."""
        last_of = {item.expert: item for item in stages}
        for item in stages:
            last = last_of[item.expert]
            if (self.paths.stage(last.stage.name) / RESULT).is_file():
                if item is last:
                    self._load_generator(item, context)
            elif item.expert in wanted:
                if self.config.inputs == "backsim":
                    self._require_earlier(stages, item)
                self._run(item, self.config.optimizer, mixture, context, "switch")

    def _require_earlier(self, stages: Sequence[DistillStage], item: DistillStage) -> None:
        scale = item.expert.rpartition(".")[0]
        names = [other.expert for other in stages]
        earlier = [other for other in stages[: names.index(item.expert)] if other.expert.rpartition(".")[0] == scale]
        if missing := self._unfinished(earlier):
            raise UserError(
                f"expert {item.expert} learns from what the experts before it generate, and {', '.join(missing)} is"
                f" missing in {self.paths.folder}; distil those first, or set method.inputs to real"
            )

    def _unfinished(self, stages: Iterable[DistillStage]) -> list[str]:
        return [item.stage.name for item in stages if not (self.paths.stage(item.stage.name) / RESULT).is_file()]

    def _load_generator(self, item: DistillStage, context: RunContext) -> None:
        """Load only the expert of a finished stage: nobody goes on with its fake score."""
        folder = self.paths.stage(item.stage.name)
        stored = json.loads((folder / "fingerprint.json").read_text(encoding="utf-8"))
        require_same_fingerprint(stored, fingerprint(self.recipe, context, self._deciding(item)), folder)
        with safe_open(folder / RESULT, "pt") as opened:
            for name, tensor in item.trainee.own.items():
                tensor.copy_(opened.get_tensor(f"generator.{name}"))

    def _deciding(self, item: DistillStage) -> dict[str, Any]:
        """Whatever of the method decides the bytes of a stage's result."""
        left_out = {"modes"} if item.stage.name == "assemble" else {"modes", "assemble"}
        return self.config.model_dump(mode="json", exclude=left_out)

    def _run(
        self, item: DistillStage, optimiser: OptimizerConfig, mixture: Mixture, context: RunContext, mode: Mode
    ) -> None:
        """Preview pictures are by all steps; steps whose expert is not trained yet are the base's."""
        sampling = build_generator_sample_settings(self.recipe, self.config, context.media)
        train_stage(
            self.recipe,
            context,
            item.stage,
            item.trainee,
            context.family,
            optimiser,
            self.paths.stage(item.stage.name),
            self._deciding(item),
            preview_experts(context, mixture, mode, sampling, None),
        )

    def _write(self, mixture: Mixture, context: RunContext, mode: Mode) -> None:
        defaults = build_generator_defaults(self.recipe, self.config, context.media)
        write_bundle(self.recipe, self.variant, self.paths, mixture, context, mode, defaults)

    def candidates(self) -> list[Candidate]:
        """The generator in each mode."""
        modes: tuple[Mode, ...] = self.config.modes if self.assembles else ("switch",)
        sampling = partial(build_generator_sample_settings, self.recipe, self.config)
        return expert_candidates(self.variant, self.paths, modes, sampling, _is_unused)

    def partition(self, num_train_timesteps: int) -> Partition:
        """The strata of all scales."""
        return build_spec(self.config.experts, num_train_timesteps).strata

    def notes(self) -> list[str]:
        """See `Method`."""
        return [
            "Distilled variants generate in their own few steps without guidance, whatever the base uses. Their"
            " validation loss is that of a denoiser, which a generator is no longer: judge them by their pictures."
        ]

    def plan(self, *, with_memory: bool = False) -> list[StagePlan]:  # noqa: ARG002 - it is not known how to estimate
        """See `Method`. An expert or the routers are trained, and the fake score: a copy of the whole denoiser."""
        meta_model = read_base(self.recipe)
        networks, targets = build_targets(self.config.experts, meta_model.denoisers, meta_model.text_encoders)
        spec = build_spec(self.config.experts, meta_model.num_train_timesteps)
        mixture = Mixture.attach(networks, spec, targets, owned=meta_model.owned_intervals)
        family = meta_model.make_family()
        settings = self._settings(family)
        stages = distill(mixture, family, settings)
        if self.assembles:
            assembling = build_assemble_settings(self.recipe, self._assemble_config())
            stages.append(distill_router(mixture, family, settings, assembling))
        return [self._count(item) for item in stages]

    def _count(self, item: DistillStage) -> StagePlan:
        samples = item.stage.num_steps * item.stage.plan.batch_size
        leaves = [leaf for param_group in item.stage.param_groups for leaf in param_group.leaves]
        return StagePlan(
            variant=self.variant.name,
            stage=item.stage.name,
            num_experts=len(item.stage.param_groups) - 1,
            trainable=sum(leaf.numel() for leaf in leaves),
            steps=item.stage.num_steps,
            samples_per_expert=(samples, samples),
            samples=samples,
        )


def _is_unused(stage: str, left_out: list[str]) -> bool:
    """Whether a stage trained an expert of a scale that is left out."""
    return stage.startswith(tuple(f"distill-{name}." for name in left_out))


def _chosen(stages: Iterable[DistillStage], experts: Sequence[str]) -> set[str]:
    known = dict.fromkeys(item.expert for item in stages)
    for name in experts:
        if name not in known:
            raise UserError(f"there is no expert {name}; this variant has {', '.join(known)}")
    return set(experts or known)
