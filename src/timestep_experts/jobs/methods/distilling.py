"""Distilling: low-rank experts become a few-step generator, one expert after the other (TSM, section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from timestep_experts.build import (
    RunContext,
    build_assemble_settings,
    build_distill_settings,
    build_generator_defaults,
    build_generator_sample_settings,
    build_mixture,
)
from timestep_experts.config import DistillConfig, OptimizerConfig
from timestep_experts.data import DecodeSettings
from timestep_experts.errors import UserError
from timestep_experts.formats import SamplingDefaults
from timestep_experts.inference import SampleSettings
from timestep_experts.jobs.methods.low_rank import LowRankMethod
from timestep_experts.jobs.plan import StagePlan, check_optimiser, count_trained, read_base
from timestep_experts.jobs.stages import fingerprint, preview_experts, train_stage
from timestep_experts.mixture import Mixture, Mode
from timestep_experts.models import Family
from timestep_experts.training.distill import DistillSettings, DistillStage, distill, distill_router
from timestep_experts.training.loop import load_result


@dataclass(frozen=True)
class Distilling(LowRankMethod):
    """See `Method`."""

    name: ClassVar[str] = "distill"
    config: DistillConfig

    def train_experts(self, context: RunContext) -> None:
        """See `LowRankMethod`."""
        self.distill(context)

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
            if is_whole and not self.paths.is_finished("assemble"):
                self.write_bundle(mixture, context, "switch")
            return is_whole
        finally:
            mixture.detach()

    def assemble(self, context: RunContext) -> None:
        """See `LowRankMethod`."""
        config = self.assembling
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
            self._run(router, mixture, context, "route")
            self.write_bundle(mixture, context, "route")
        finally:
            mixture.detach()

    def _settings(self, family: Family) -> DistillSettings:
        scale_factor = int(getattr(family.parts, "vae_scale_factor", 1))
        return build_distill_settings(self.recipe, self.config, scale_factor)

    def _train_experts(
        self, stages: list[DistillStage], wanted: set[str], mixture: Mixture, context: RunContext
    ) -> None:
        """Train those that are wanted; of all others take what is there."""
        last_of = {item.expert: item for item in stages}
        finished = {expert: self._generator(last, context) for expert, last in last_of.items()}
        for item in stages:
            generator = finished[item.expert]
            if generator is not None:
                if item is last_of[item.expert]:
                    for name, tensor in item.trainee.own.items():
                        tensor.copy_(generator[name])
            elif item.expert in wanted:
                if self.config.inputs == "backsim":
                    self._require_earlier(stages, item)
                self._run(item, mixture, context, "switch")

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
        return [item.stage.name for item in stages if not self.paths.is_finished(item.stage.name)]

    def deciding(self, stage: str) -> dict[str, Any]:
        """See `LowRankMethod`. The experts of a scale do not know of the other scales, nor of their scale's role."""
        everything = super().deciding(stage)
        own = [scale for scale in self.config.experts.scales if stage.startswith(f"distill-{scale.label}.")]
        if not own:
            return everything
        experts = {key: value for key, value in everything["experts"].items() if key != "router"}
        return {**everything, "experts": {**experts, "scales": [own[0].model_dump(mode="json", exclude={"role"})]}}

    def _generator(self, item: DistillStage, context: RunContext) -> dict[str, Tensor] | None:
        """The expert of a finished stage, without the fake score, with which nobody goes on; ``None``: unfinished."""
        deciding = fingerprint(self.recipe, context, self.deciding(item.stage.name))
        loaded = load_result(self.paths.stage(item.stage.name), deciding)
        prefix = "generator."
        return loaded and {n.removeprefix(prefix): t for n, t in loaded.items() if n.startswith(prefix)}

    def _run(self, item: DistillStage, mixture: Mixture, context: RunContext, mode: Mode) -> None:
        """Run a stage. Preview pictures take all steps; where an expert is not trained yet, the step is the base's."""
        train_stage(
            self.recipe,
            context,
            item,
            self._optimiser(item),
            self.paths.stage(item.stage.name),
            self.deciding(item.stage.name),
            preview_experts(context, mixture, mode, self.sampling(context.decoding), None),
        )

    def sampling(self, decoding: DecodeSettings) -> SampleSettings:
        """See `LowRankMethod`: in the generator's own steps."""
        return build_generator_sample_settings(self.recipe, self.config, decoding)

    def sampling_defaults(self, decoding: DecodeSettings) -> SamplingDefaults:
        """See `LowRankMethod`."""
        return build_generator_defaults(self.recipe, self.config, decoding)

    def is_unused(self, stage: str, left_out: list[str]) -> bool:
        """See `LowRankMethod`."""
        return stage.startswith(tuple(f"distill-{name}." for name in left_out))

    def notes(self) -> list[str]:
        """See `Method`."""
        return [
            "Distilled variants generate in their own few steps without guidance, whatever the base uses. Their"
            " validation loss is that of a denoiser, which a generator is no longer: judge them by their pictures."
        ]

    def plan(self, *, with_memory: bool = False) -> list[StagePlan]:  # noqa: ARG002 - it is not known how to estimate
        """See `Method`. An expert or the routers are trained, and the fake score: a copy of the whole denoiser."""
        meta_model = read_base(self.recipe)
        mixture, family = self.attach_to(meta_model), meta_model.make_family()
        settings = self._settings(family)
        stages = distill(mixture, family, settings)
        if self.assembles:
            assembling = build_assemble_settings(self.recipe, self.assembling)
            stages.append(distill_router(mixture, family, settings, assembling))
        return [self._count(item) for item in stages]

    def _optimiser(self, item: DistillStage) -> OptimizerConfig:
        return self.assembling.optimizer if item.stage.name == "assemble" else self.config.optimizer

    def _count(self, item: DistillStage) -> StagePlan:
        check_optimiser(self.variant.name, item.stage, self._optimiser(item))
        samples = item.stage.num_steps * item.stage.plan.batch_size
        return StagePlan(
            variant=self.variant.name,
            stage=item.stage.name,
            num_experts=len(item.stage.param_groups) - 1,
            trainable=count_trained(item.stage),
            steps=item.stage.num_steps,
            samples_per_expert=(samples, samples),
            samples=samples,
        )


def _chosen(stages: Iterable[DistillStage], experts: Sequence[str]) -> set[str]:
    known = dict.fromkeys(item.expert for item in stages)
    for name in experts:
        if name not in known:
            raise UserError(f"there is no expert {name}; this variant has {', '.join(known)}")
    return set(experts or known)
