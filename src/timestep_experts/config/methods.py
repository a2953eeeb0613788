"""The ways of training, each with its own settings: the section ``method`` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import AfterValidator, Field, model_validator

from timestep_experts.config.sections import (
    NonNegativeFloat,
    Number,
    OptimizerConfig,
    OptimizerOptions,
    Pattern,
    PositiveFloat,
    PositiveInt,
    Share,
    Strict,
    WholeNumber,
)
from timestep_experts.errors import UserError
from timestep_experts.mixture.router_form import GatePositions, Gates, RouterFeatures, RouterInput


def _once_each(modes: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(modes)) < len(modes):
        raise UserError("every mode is named once")
    return modes


Modes: TypeAlias = Annotated[tuple[Literal["switch", "route"], ...], Field(min_length=1), AfterValidator(_once_each)]
NumIntervals: TypeAlias = Annotated[PositiveInt, Field(le=1000)]
Boundaries: TypeAlias = Annotated[tuple[Number, ...], Field(max_length=1001)]
Rank: TypeAlias = Annotated[PositiveInt, Field(le=2**16)]
Knots: TypeAlias = Annotated[WholeNumber, Field(ge=2, le=1000)]
Targets: TypeAlias = Annotated[tuple[str, ...], Field(min_length=1)] | Pattern
"""Names of layers, or one regular expression."""


class ScaleConfig(Strict):
    """One set of experts."""

    intervals: NumIntervals | None = Field(None, description="this many equal intervals")
    boundaries: Boundaries | None = Field(None, description="or explicit ones, from 0 to T")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = Field(None, description="null: n<intervals>")
    rank: Rank = 4
    lora_alpha: PositiveFloat | None = Field(None, description="null: equal to rank")
    role: Literal["auto", "core", "context"] = Field(
        "auto", description="auto: the finest scale is the core, others are contexts; with gates per rank, all are"
    )
    learning_rate: PositiveFloat | tuple[PositiveFloat, ...] | None = Field(None, description="own, or one per expert")
    max_train_steps: PositiveInt | tuple[PositiveInt, ...] | None = Field(None, description="own, or one per expert")
    gan_train_steps: PositiveInt | tuple[PositiveInt, ...] | None = Field(None, description="the same, of gan")

    @model_validator(mode="after")
    def _one_partition(self) -> ScaleConfig:
        if (self.intervals is None) == (self.boundaries is None):
            raise UserError("give either intervals or boundaries")
        for key in ("learning_rate", "max_train_steps", "gan_train_steps"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != self.num_experts:
                raise UserError(f"{self.num_experts} experts need as many values of {key}; got {len(value)} values")
        return self

    @property
    def num_experts(self) -> int:
        """Intervals of this scale."""
        return self.intervals or len(self.boundaries or ()) - 1

    @property
    def label(self) -> str:
        """Its name in files."""
        return self.name or f"n{self.num_experts}"


class RouterConfig(Strict):
    """The form of the routers; the defaults are the paper's."""

    gates: Gates = Field("expert", description="a context scale has one gate, or one for each of its ranks")
    inputs: RouterInput = Field("z_and_t", description="what gates depend on")
    features: RouterFeatures = Field("input_mean", description="what stands for z")
    positions: GatePositions = Field("sample", description="one gate per sample, or per position")
    knots: Knots | Annotated[tuple[Number, ...], Field(min_length=2, max_length=1001)] | None = Field(
        None, description="of the table over t: how many, or where; null: a row for every t"
    )
    intervals: NumIntervals | None = Field(None, description="or a table that is constant on so many equal intervals")
    boundaries: Boundaries | None = Field(None, description="or on these, from 0 to T")
    unit_rms: bool = Field(False, description="divide the table with its base gates by its size, gate by gate")

    @model_validator(mode="after")
    def _one_table(self) -> RouterConfig:
        if sum(value is not None for value in (self.knots, self.intervals, self.boundaries)) > 1:
            raise UserError("a table over t has either knots, intervals or boundaries")
        return self


class RouterLearningConfig(Strict):
    """Routers learn together with the experts."""

    learning_rate: PositiveFloat | None = Field(None, description="of F; null: that of the experts")
    table_learning_rate: PositiveFloat | None = Field(None, description="of E; null: 5 times that of the experts")
    weight_decay: NonNegativeFloat | None = Field(None, description="null: the optimiser's")
    max_grad_norm: PositiveFloat | None = Field(None, description="null: the optimiser's")


class ExpertsConfig(Strict):
    """The low-rank experts on the denoiser, and on the text encoders."""

    target_modules: Targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_target_modules: Targets | Mapping[str, Targets] | None = Field(
        None, description="of every text encoder, or of those named (text_encoder_2: [...]); null: none"
    )
    scales: tuple[ScaleConfig, ...] = Field(min_length=1)
    dropout: Share = Field(0.0, description="of what experts see while they train")
    text_dropout: Share | None = Field(None, description="the same on text encoders; null: dropout")
    router: RouterConfig = RouterConfig()

    @property
    def are_gated(self) -> tuple[bool, ...]:
        """Which scales are contexts. A role that is given makes cores of all scales that have none."""
        if any(scale.role != "auto" for scale in self.scales):
            return tuple(scale.role == "context" for scale in self.scales)
        finest = None if self.router.gates == "rank" else max(self.scales, key=lambda scale: scale.num_experts)
        return tuple(scale is not finest for scale in self.scales)

    @property
    def has_contexts(self) -> bool:
        """Whether there are routers."""
        return any(self.are_gated)


class AssembleConfig(Strict):
    """Stage 2: the experts are frozen, and the routers learn."""

    max_train_steps: PositiveInt = 1000
    train_batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-4
    table_learning_rate: PositiveFloat | None = Field(None, description="of E; null: 50 times learning_rate")
    text_learning_rate: PositiveFloat | None = Field(None, description="of F on text encoders; null: learning_rate")
    text_weight_decay: NonNegativeFloat | None = Field(None, description="there; null: the optimiser's")
    optimizer: OptimizerConfig = OptimizerConfig()


class FosterConfig(Strict):
    """Low-rank experts learn their intervals by the base's own loss; then routers assemble them."""

    kind: Literal["foster"]
    experts: ExpertsConfig
    schedule: Literal["independent", "coarse_to_fine", "joint"] = "joint"
    max_train_steps: PositiveInt = 1000
    train_batch_size: PositiveInt = Field(8, description="per interval and step")
    learning_rate: PositiveFloat = 1e-4
    text_learning_rate: PositiveFloat | None = Field(None, description="on text encoders; null: learning_rate")
    text_weight_decay: NonNegativeFloat | None = Field(None, description="there; null: the optimiser's")
    optimizer: OptimizerConfig = OptimizerConfig()
    router_learning: RouterLearningConfig | None = Field(
        None, description="of routers that learn together with experts that are fostered jointly; null: they do not"
    )
    ema_decay: Share | None = Field(None, description="keep the moving average of experts; null: the last weights")
    assemble: AssembleConfig | None = Field(AssembleConfig(), description="stage 2; null: there is none")
    modes: Modes | None = Field(None, description="of those that are trained, the ones to be evaluated; null: all")

    @model_validator(mode="after")
    def _routers_learn_with_joint_experts(self) -> FosterConfig:
        if self.router_learning is not None and self.schedule != "joint":
            raise UserError(f"router_learning needs the schedule joint; got {self.schedule}")
        if self.router_learning is not None and not self.experts.has_contexts:
            raise UserError("router_learning needs routers: no scale is a context, and gates do not speak to ranks")
        if self.router_learning is not None and self.modes is not None and "route" not in self.modes:
            raise UserError("modes: experts whose routers learn with them are used with their routers; add route")
        return self

    @model_validator(mode="after")
    def _has_no_second_phase(self) -> FosterConfig:
        if any(scale.gan_train_steps is not None for scale in self.experts.scales):
            raise UserError("experts.scales: gan_train_steps belongs to the gan of a distillation")
        return self


class GanConfig(Strict):
    """The second phase of distillation: the same with a discriminator."""

    max_train_steps: PositiveInt = 5000
    train_batch_size: PositiveInt = Field(16, description="per step of the generator that an expert owns")
    learning_rate: PositiveFloat = 5e-7
    fake_learning_rate: PositiveFloat | None = Field(None, description="null: learning_rate")
    generator_weight: NonNegativeFloat = 1e-3
    discriminator_weight: NonNegativeFloat = 1e-2


class DistillConfig(Strict):
    """Low-rank experts become a few-step generator by distribution matching; routers may assemble them."""

    kind: Literal["distill"]
    experts: ExpertsConfig
    timesteps: tuple[WholeNumber, ...] = Field((999, 749, 499, 249), description="of the generator's steps, descending")
    inputs: Literal["backsim", "real"] = Field(
        "backsim", description="experts see what earlier ones generate, or training pictures made noisy"
    )
    guidance_scale: NonNegativeFloat = Field(1.75, description="of the real score; the generator has none")
    generator_interval: PositiveInt = Field(10, description="updates of the fake score (steps) per generator update")
    max_train_steps: PositiveInt = 20000
    train_batch_size: PositiveInt = Field(32, description="per step of the generator that an expert owns")
    learning_rate: PositiveFloat = 1e-5
    fake_learning_rate: PositiveFloat | None = Field(None, description="of the fake score; null: learning_rate")
    gan: GanConfig | None = Field(GanConfig(), description="null: no second phase")
    optimizer: OptimizerConfig = OptimizerConfig(max_grad_norm=10.0)
    assemble: AssembleConfig | None = Field(
        AssembleConfig(), description="stage 2, by the losses of the last phase; null: no routers are trained"
    )
    modes: Modes | None = Field(None, description="of those that are trained, the ones to be evaluated; null: all")

    @model_validator(mode="after")
    def _second_phase_has_a_gan(self) -> DistillConfig:
        if self.gan is None and any(scale.gan_train_steps is not None for scale in self.experts.scales):
            raise UserError("experts.scales: gan_train_steps belongs to gan, which is null here")
        return self


class DecoupleOptimizerConfig(OptimizerConfig):
    """The same with DeMe's options."""

    options: OptimizerOptions = Field({"weight_decay": 1e-6, "betas": (0.95, 0.999)})


class DecoupleConfig(Strict):
    """Full copies of the denoiser learn one range of timesteps each."""

    kind: Literal["decouple"]
    intervals: NumIntervals | None = Field(None, description="this many equal ranges")
    boundaries: Boundaries | None = Field(None, description="or explicit ones, from 0 to T")
    max_train_steps: PositiveInt | tuple[PositiveInt, ...] = Field(20000, description="updates, or one per range")
    learning_rate: PositiveFloat = 5e-5
    train_batch_size: PositiveInt = Field(64, description="samples per optimiser update")
    optimizer: DecoupleOptimizerConfig = DecoupleOptimizerConfig()
    trainable: Pattern | None = Field(None, description="a regular expression of whole parameter names; null: all")
    projection: Literal["off", "paper", "foldable"] = "off"
    consistency: NonNegativeFloat = Field(1.0, description="lambda; 0: off")
    full_range_probability: Annotated[Number, Field(ge=0, le=1)] = Field(0.3, description="p: t from all timesteps")
    sampling: Literal["sample", "batch"] = Field("sample", description="what p is thrown for")
    antithetic: bool = Field(False, description="draw t in mirrored pairs")
    weighting: Literal["none", "snr_plus_one", "truncated", "min_snr", "p2", "uncertainty"] = "none"
    uncertainty_intervals: PositiveInt = Field(4, description="ranges of t that have a log-variance of their own")
    uncertainty_learning_rate: PositiveFloat = 1e-3
    ema_decay: Share | None = Field(0.9999, description="null: keep the last weights")
    ema_warmup: bool = Field(True, description="the decay of update n is at most (1 + n) / (10 + n)")

    @model_validator(mode="after")
    def _one_partition(self) -> DecoupleConfig:
        if (self.intervals is None) == (self.boundaries is None):
            raise UserError("give either intervals or boundaries")
        steps = self.max_train_steps
        if isinstance(steps, tuple) and len(steps) != self.num_ranges:
            raise UserError(f"{self.num_ranges} ranges need as many values of max_train_steps; got {len(steps)}")
        return self

    @property
    def num_ranges(self) -> int:
        """How many experts there are."""
        return self.intervals or len(self.boundaries or ()) - 1


MethodConfig: TypeAlias = Annotated[FosterConfig | DistillConfig | DecoupleConfig, Field(discriminator="kind")]
"""What a variant trains. Another way of training is one more class here and one more file in ``jobs/methods``."""

KINDS: Mapping[str, type[FosterConfig | DistillConfig | DecoupleConfig]] = {
    get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(MethodConfig)[0])
}
"""The same by their names in a recipe."""
