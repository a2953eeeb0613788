"""What fostering and distilling share: low-rank experts, their routers, their files and their rows of the table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from timestep_experts.build import RunContext, build_spec, build_targets, require_sensible_ranks
from timestep_experts.config import AssembleConfig, DistillConfig, FosterConfig, Recipe, Variant
from timestep_experts.data import DecodeSettings
from timestep_experts.errors import UserError
from timestep_experts.formats import Bundle, SamplingDefaults, load_bundle, save_bundle, tool_versions
from timestep_experts.formats.bundle import TENSORS
from timestep_experts.inference import SampleSettings, attach, detach
from timestep_experts.jobs.methods.merging import Merging
from timestep_experts.jobs.methods.protocol import Candidate, CandidateMode, Costs
from timestep_experts.jobs.paths import VariantPaths
from timestep_experts.jobs.plan import StagePlan
from timestep_experts.mixture import Mixture, Mode, ParameterCount
from timestep_experts.models import Family, MetaModel
from timestep_experts.training.log import LOG, read_log, training_cost
from timestep_experts.training.loop import is_finished
from timestep_experts.weights.switchable import are_gates_folded


@dataclass(frozen=True)
class BundleCandidate:
    """See `Candidate`: a variant's bundle in one mode."""

    method: LowRankMethod
    mode: Mode

    @property
    def variant(self) -> str:
        """The name of the variant."""
        return self.method.variant.name

    def check(self) -> None:
        """See `Candidate`."""
        load_bundle(self.method.paths.bundle)

    def files(self) -> list[Path]:
        """The bundle's tensors."""
        return [self.method.paths.bundle / TENSORS]

    @contextmanager
    def on(self, family: Family) -> Iterator[Mixture | None]:
        """Attach the bundle."""
        with _attached(family, self.method.paths.bundle, self.mode) as mixture:
            yield mixture

    def costs(self, family: Family, mixture: Mixture | None) -> Costs:  # noqa: ARG002 - the mixture is on it
        """Those of what the mode uses: switching uses neither routers nor contexts of base gate 0."""
        assert mixture is not None
        is_routed = self.mode == "route"
        used = [scale for scale in mixture.spec.scales if is_routed or scale.constant_gate]
        trained = sum(p.numel() for scale in used for stack in mixture.stacks(scale.name) for p in stack.parameters())
        trained += sum(p.numel() for group in mixture.router_parameters() for p in group) if is_routed else 0
        counted = mixture.count_parameters()
        left_out = [scale.name for scale in mixture.spec.scales if scale not in used]
        stages = [
            folder
            for folder in self.method.stages()
            if is_finished(folder)
            and (is_routed or folder.name != "assemble")
            and not self.method.is_unused(folder.name, left_out)
        ]
        stored = counted.stored if is_routed else trained
        return Costs(ParameterCount(stored, counted.active, trained), *training_cost(stages))

    def sampling(self, decoding: DecodeSettings) -> SampleSettings:
        """See `Candidate`."""
        return self.method.sampling(decoding)


@dataclass(frozen=True)
class MergedLoraCandidate:
    """See `Candidate`: the LoRA into which a variant's experts were merged."""

    method: LowRankMethod
    mode: CandidateMode = "merged"

    @property
    def variant(self) -> str:
        """The name of the variant."""
        return self.method.variant.name

    @property
    def bundle(self) -> Path:
        """The LoRA as a bundle of one expert."""
        return self.method.paths.merged / "bundle"

    def check(self) -> None:
        """See `Candidate`."""
        require_merged(self.variant, self.method.paths)
        load_bundle(self.bundle)

    def files(self) -> list[Path]:
        """The tensors of the LoRA."""
        return [self.bundle / TENSORS]

    @contextmanager
    def on(self, family: Family) -> Iterator[Mixture | None]:
        """Attach the LoRA."""
        with _attached(family, self.bundle, "switch") as mixture:
            yield mixture

    def costs(self, family: Family, mixture: Mixture | None) -> Costs:  # noqa: ARG002 - the mixture is on it
        """The training of all experts, and of routers whose gates are in the LoRA; and the size of the LoRA."""
        assert mixture is not None
        counted = mixture.count_parameters()
        made_of = load_bundle(self.method.paths.bundle)
        has_gates = are_gates_folded(made_of)
        trained = sum(t.numel() for name, t in made_of.tensors.items() if has_gates or ".experts." in name)
        stages = [s for s in self.method.stages() if is_finished(s) and (has_gates or s.name != "assemble")]
        return Costs(ParameterCount(counted.stored, counted.active, trained), *training_cost(stages))

    def sampling(self, decoding: DecodeSettings) -> SampleSettings:
        """See `Candidate`."""
        return self.method.sampling(decoding)


def require_merged(variant: str, paths: VariantPaths) -> None:
    """Refuse a variant that is not merged.

    Raises:
        UserError: there is nothing merged.
    """
    if not paths.merged.is_dir():
        raise UserError(f"variant {variant!r} is not merged yet: the command run does that")


@contextmanager
def _attached(family: Family, bundle: Path, mode: Mode) -> Iterator[Mixture]:
    pipeline = family.pipeline()
    mixture = attach(pipeline, bundle, mode)
    try:
        yield mixture
    finally:
        detach(pipeline)


@dataclass(frozen=True)
class LowRankMethod(ABC):
    """Low-rank experts are trained, then their routers where there are some, and what comes of it is merged."""

    name: ClassVar[str] = "foster or distill"
    recipe: Recipe
    variant: Variant
    config: FosterConfig | DistillConfig
    paths: VariantPaths

    @abstractmethod
    def train_experts(self, context: RunContext) -> None:
        """Stage 1: train all experts and write their bundle, for switching."""

    @abstractmethod
    def assemble(self, context: RunContext) -> None:
        """Stage 2: train the routers and write their bundle, for routing.

        Raises:
            UserError: the experts are not trained yet, or there is nothing to assemble.
        """

    @abstractmethod
    def sampling(self, decoding: DecodeSettings) -> SampleSettings:
        """How the experts generate pictures or clips."""

    @abstractmethod
    def sampling_defaults(self, decoding: DecodeSettings) -> SamplingDefaults:
        """What a bundle says of how it is meant to be sampled from."""

    @abstractmethod
    def is_unused(self, stage: str, left_out: list[str]) -> bool:
        """Whether the work of a stage, by its name, is left out with these scales."""

    @property
    def assembles(self) -> bool:
        """Whether routers are trained after the experts; without a context there are none."""
        return self.config.assemble is not None and self.config.experts.has_contexts

    @property
    def fosters_routers(self) -> bool:
        """Whether routers are trained together with the experts, which then fit only each other."""
        return isinstance(self.config, FosterConfig) and self.config.router_learning is not None

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes of which the table has rows."""
        trained: tuple[Mode, ...] = (
            ("route",) if self.fosters_routers else ("switch", "route") if self.assembles else ("switch",)
        )
        return tuple(mode for mode in self.config.modes or trained if mode in trained) or trained

    @property
    def assembling(self) -> AssembleConfig:
        """How routers are trained.

        Raises:
            UserError: the recipe does not say how.
        """
        if self.config.assemble is None:
            raise UserError("recipe.method.assemble is null: this recipe has no second stage")
        return self.config.assemble

    def train(self, context: RunContext) -> None:
        """See `Method`."""
        self.train_experts(context)
        if self.assembles:
            self.assemble(context)
        if self.variant.merge is not None:
            Merging(self.recipe, self.variant.merge, self.paths, context).merge_experts()

    def candidates(self) -> list[Candidate]:
        """The experts in each mode, and merged."""
        rows: list[Candidate] = [BundleCandidate(self, mode) for mode in self.modes]
        return rows if self.variant.merge is None else [*rows, MergedLoraCandidate(self)]

    def deciding(self, stage: str) -> dict[str, Any]:
        """Whatever of the method decides the bytes of a stage's result."""
        left_out = {"modes"} if stage == "assemble" else {"modes", "assemble"}
        return self.config.model_dump(mode="json", exclude=left_out)

    @cached_property
    def _stage_names(self) -> tuple[str, ...]:
        return tuple(plan.stage for plan in self.plan())

    def stages(self) -> dict[Path, dict[str, Any]]:
        """See `Method`."""
        return {self.paths.stage(name): self.deciding(name) for name in self._stage_names}

    @abstractmethod
    def notes(self) -> list[str]:
        """See `Method`."""

    @abstractmethod
    def plan(self, *, with_memory: bool = False) -> list[StagePlan]:
        """See `Method`."""

    def attach_to(self, meta_model: MetaModel) -> Mixture:
        """The experts on the meta device, to be counted."""
        networks, targets = build_targets(self.config.experts, meta_model.denoisers, meta_model.text_encoders)
        spec = build_spec(self.config, meta_model.num_train_timesteps)
        mixture = Mixture.attach(networks, spec, targets, owned=meta_model.owned_intervals)
        require_sensible_ranks(mixture)
        return mixture

    def write_bundle(self, mixture: Mixture, context: RunContext, mode: Mode) -> None:
        """Write the experts as the variant's bundle, with how they were made."""
        shared = self.recipe.model_dump(mode="json", exclude={"variants", "output_dir", "method", "merge"})
        folders = [folder for folder in self.stages() if (folder / LOG).is_file()]
        bundle = Bundle(
            spec=mixture.spec,
            target_modules=tuple(mixture.layers),
            tensors=mixture.state_dict(),
            mode=mode,
            base_model=self.recipe.pretrained_model_name_or_path,
            denoiser_class=type(context.family.denoiser).__name__,
            sampling=self.sampling_defaults(context.decoding),
            provenance={
                "recipe": {**shared, "method": self.config.model_dump(mode="json")},
                "versions": tool_versions(),
                "stages": {folder.name: _last_losses(folder) for folder in folders},
            },
        )
        save_bundle(bundle, self.paths.bundle)


def _last_losses(folder: Path) -> Mapping[str, float]:
    last: dict[str, float] = {}
    for record in read_log(folder):
        last |= record
    return {name: value for name, value in last.items() if name != "seconds"}
