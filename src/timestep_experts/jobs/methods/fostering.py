"""Fostering: low-rank experts learn their intervals, and routers assemble them (TSM)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from timestep_experts.build import (
    RunContext,
    build_assemble_settings,
    build_foster_settings,
    build_mixture,
    build_sample_settings,
    build_sampling_defaults,
)
from timestep_experts.config import FosterConfig, OptimizerConfig
from timestep_experts.data import DecodeSettings
from timestep_experts.errors import UserError
from timestep_experts.formats import SamplingDefaults
from timestep_experts.inference import SampleSettings
from timestep_experts.jobs.methods.low_rank import LowRankMethod
from timestep_experts.jobs.plan import (
    Memory,
    StagePlan,
    base_bytes,
    count_stage,
    estimate_peaks,
    optimiser_bytes,
    read_base,
)
from timestep_experts.jobs.stages import preview_experts, train_stage
from timestep_experts.mixture import Mixture, Mode
from timestep_experts.models import Family, MetaModel
from timestep_experts.training import Training, assemble, foster
from timestep_experts.training.ema import Averaged
from timestep_experts.training.stage import Stage, Trainable


@dataclass(frozen=True)
class Fostering(LowRankMethod):
    """See `Method`."""

    name: ClassVar[str] = "foster"
    config: FosterConfig

    def train_experts(self, context: RunContext) -> None:
        """See `LowRankMethod`."""
        mixture = build_mixture(self.recipe, self.config, context.family)
        try:
            self._foster(mixture, context)
            if not self.paths.is_finished("assemble"):
                self.write_bundle(mixture, context, self._fostered_mode)
        finally:
            mixture.detach()

    def assemble(self, context: RunContext) -> None:
        """See `LowRankMethod`."""
        _ = self.assembling  # a recipe without this stage fails here
        mixture = build_mixture(self.recipe, self.config, context.family)
        try:
            stages = self._foster_stages(mixture, context.family)
            if missing := [stage.name for stage in stages if not self.paths.is_finished(stage.name)]:
                raise UserError(
                    f"variant {self.variant.name!r} is not fostered yet ({', '.join(missing)} missing in"
                    f" {self.paths.folder})"
                )
            self._foster(mixture, context)
            self._run(self._assemble_stage(mixture, context.family), mixture, context, "route")
            self.write_bundle(mixture, context, "route")
        finally:
            mixture.detach()

    def _foster_stages(self, mixture: Mixture, base: Family | MetaModel) -> list[Stage]:
        return foster(mixture, build_foster_settings(self.recipe, self.config, base.text_encoders))

    def _foster(self, mixture: Mixture, context: RunContext) -> None:
        for stage in self._foster_stages(mixture, context.family):
            self._run(stage, mixture, context, self._fostered_mode)

    @property
    def _fostered_mode(self) -> Mode:
        return "route" if self.fosters_routers else "switch"

    def _run(self, stage: Stage, mixture: Mixture, context: RunContext, mode: Mode) -> None:
        """Run a stage; its pictures are previewed in the mode in which its experts will be used."""
        trainee, decay = self._trainee(stage, mixture), self._decay_of(stage)
        preview = preview_experts(context, mixture, mode, self.sampling(context.decoding), mixture.spec.strata)
        averaged = None
        if decay is not None:
            averaged = Averaged(trainee, stage.parameters(), decay)
            trainee, stage = averaged, replace(stage, after_step=averaged.follow)
            preview = replace(preview, observing=averaged.observed)
        train_stage(
            self.recipe,
            context,
            Training(stage, trainee, context.family),
            self._optimiser(stage),
            self.paths.stage(stage.name),
            self.deciding(stage.name),
            preview,
        )
        if averaged is not None:
            averaged.settle()

    def _decay_of(self, stage: Stage) -> float | None:
        """The share of the old average that an update keeps; ``None`` where the last weights are kept."""
        return None if stage.name == "assemble" else self.config.ema_decay

    def _trainee(self, stage: Stage, mixture: Mixture) -> Trainable:
        """What a stage changes; of a scale that is fostered by itself, only its own experts are kept."""
        own = [scale.name for scale in mixture.spec.scales if stage.name == f"foster-{scale.name}"]
        return mixture.only(*own) if own else mixture

    def deciding(self, stage: str) -> dict[str, Any]:
        """See `LowRankMethod`. A scale that is fostered independently does not know of the others, nor of its role."""
        everything = super().deciding(stage)
        own = [scale for scale in self.config.experts.scales if stage == f"foster-{scale.label}"]
        if self.config.schedule != "independent" or not own:
            return everything
        experts = {key: value for key, value in everything["experts"].items() if key != "router"}
        return {**everything, "experts": {**experts, "scales": [own[0].model_dump(mode="json", exclude={"role"})]}}

    def _optimiser(self, stage: Stage) -> OptimizerConfig:
        return self.assembling.optimizer if stage.name == "assemble" else self.config.optimizer

    def sampling(self, decoding: DecodeSettings) -> SampleSettings:
        """See `LowRankMethod`."""
        return build_sample_settings(self.recipe, decoding)

    def sampling_defaults(self, decoding: DecodeSettings) -> SamplingDefaults:
        """See `LowRankMethod`."""
        return build_sampling_defaults(self.recipe, decoding)

    def is_unused(self, stage: str, left_out: list[str]) -> bool:
        """See `LowRankMethod`; coarse experts live on in the fine ones that began as their copies."""
        return self.config.schedule != "coarse_to_fine" and stage in {f"foster-{name}" for name in left_out}

    def notes(self) -> list[str]:
        """See `Method`."""
        return []

    def plan(self, *, with_memory: bool = False) -> list[StagePlan]:
        """See `Method`."""
        meta_model = read_base(self.recipe)
        trains_text = self.config.experts.text_target_modules is not None
        base = base_bytes(self.recipe, meta_model, trains_text=trains_text)
        mixture = self.attach_to(meta_model)
        plans = [
            count_stage(self.variant.name, stage, self._optimiser(stage)) for stage in self._stages(mixture, meta_model)
        ]
        if not with_memory:
            return plans

        def make(family: Family) -> list[Training]:
            return [Training(stage, mixture, family) for stage in self._stages(mixture, meta_model)]

        peaks = estimate_peaks(self.recipe, meta_model, make, beside=mixture.trained_modules(), trains_text=trains_text)
        memory = [self._memory(base, mixture, training.stage, peak) for training, peak in peaks]
        return [replace(plan, memory=estimated) for plan, estimated in zip(plans, memory, strict=True)]

    def _stages(self, mixture: Mixture, meta_model: MetaModel) -> list[Stage]:
        stages = self._foster_stages(mixture, meta_model)
        if not self.assembles:
            return stages
        return [*stages, self._assemble_stage(mixture, meta_model)]

    def _assemble_stage(self, mixture: Mixture, base: Family | MetaModel) -> Stage:
        return assemble(mixture, build_assemble_settings(self.recipe, self.assembling, base.text_encoders))

    def _memory(self, base: int, mixture: Mixture, stage: Stage, peak: int) -> Memory:
        """Experts are fp32: their values, and of what a stage changes, averages, gradients and optimiser's state."""
        stored = 4 * mixture.count_parameters().stored
        gradients = 4 * sum(parameter.numel() for parameter in stage.parameters())
        averages = 0 if self._decay_of(stage) is None else gradients
        return Memory(
            base, stored + averages + gradients + optimiser_bytes(self._optimiser(stage), stage), peak - gradients
        )
