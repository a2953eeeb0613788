"""The sections of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Share: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


def _height_and_width(value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(type(s) is int and s > 0 for s in sides):
        raise ValueError("a side in pixels or [height, width] is needed")
    return sides[0], sides[1]


Size: TypeAlias = Annotated[tuple[int, int], BeforeValidator(_height_and_width)]


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ClipsConfig(Strict):
    """How a video base reads clips."""

    num_frames: PositiveInt | None = Field(None, description="null: the base's default")
    fps: PositiveFloat | None = Field(None, description="frames per second at which clips are read; null: their own")
    stride: PositiveInt = Field(1, description="take one of so many of those frames")


class DataConfig(Strict):
    """Captioned pictures, or clips."""

    path: str = Field(description="world/flat, world/neon, a folder, a table of clips, a saved dataset or a hub id")
    clips: ClipsConfig | None = Field(
        None, description="of a video base; null: as many frames as it draws, at their own rate"
    )
    max_train_samples: PositiveInt | None = None
    validation_path: str | None = Field(None, description="null: held-out captions of the same source")
    validation_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="of the captions, if no path is set")
    max_validation_samples: PositiveInt | None = None
    flip: bool = False
    caption_dropout: Share = 0.1


class ScaleConfig(Strict):
    """One set of experts."""

    intervals: PositiveInt | None = Field(None, description="this many equal intervals")
    boundaries: tuple[float, ...] | None = Field(None, description="or explicit ones, from 0 to T")
    name: str | None = Field(None, description="null: n<intervals>")
    rank: PositiveInt = 4
    lora_alpha: PositiveFloat | None = Field(None, description="null: equal to rank")
    role: Literal["auto", "core", "context"] = Field("auto", description="auto: the finest scale is the core")
    learning_rate: PositiveFloat | tuple[PositiveFloat, ...] | None = Field(None, description="own, or one per expert")
    max_train_steps: PositiveInt | tuple[PositiveInt, ...] | None = Field(None, description="own, or one per expert")
    gan_train_steps: PositiveInt | tuple[PositiveInt, ...] | None = Field(None, description="the same, of distill.gan")

    @model_validator(mode="after")
    def _one_partition(self) -> ScaleConfig:
        if (self.intervals is None) == (self.boundaries is None):
            raise ValueError("give either intervals or boundaries")
        for key in ("learning_rate", "max_train_steps", "gan_train_steps"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != self.num_experts:
                raise ValueError(f"{self.num_experts} experts need as many values of {key}; got {len(value)} values")
        return self

    @property
    def num_experts(self) -> int:
        """Intervals of this scale."""
        return self.intervals or len(self.boundaries or ()) - 1

    @property
    def label(self) -> str:
        """Its name in files."""
        return self.name or f"n{self.num_experts}"


class ExpertsConfig(Strict):
    """What is attached to the denoiser, and to the text encoders."""

    target_modules: tuple[str, ...] | str = ("to_q", "to_k", "to_v", "to_out.0")
    text_target_modules: tuple[str, ...] | str | Mapping[str, tuple[str, ...] | str] | None = Field(
        None, description="of every text encoder, or of those named (text_encoder_2: [...]); null: none"
    )
    scales: tuple[ScaleConfig, ...] = Field(min_length=1)
    dropout: Share = Field(0.0, description="of what experts see while they train")
    text_dropout: Share | None = Field(None, description="the same on text encoders; null: dropout")
    router_input: Literal["z_and_t", "z", "t"] = "z_and_t"
    gate: Literal["sample", "token"] = "sample"
    router_knots: Annotated[int, Field(ge=2)] | None = Field(None, description="null: the paper's table over every t")


NO_EXPERTS = ExpertsConfig(scales=(ScaleConfig(intervals=1),))


class OptimizerConfig(Strict):
    """Any optimiser of torch.optim, or one of bitsandbytes or torchao."""

    name: str = Field("AdamW", description="e.g. AdamW, bitsandbytes.AdamW8bit, torchao.AdamW8bit")
    options: Mapping[str, float | bool | tuple[float, ...]] = {"weight_decay": 0.01, "betas": (0.9, 0.999)}
    lr_scheduler: str = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: PositiveFloat | None = 1.0


class FosterConfig(Strict):
    """Stage 1."""

    method: Literal["independent", "coarse_to_fine", "joint"] = "joint"
    max_train_steps: PositiveInt = 1000
    train_batch_size: PositiveInt = Field(8, description="per interval and step")
    learning_rate: PositiveFloat = 1e-4
    text_learning_rate: PositiveFloat | None = Field(None, description="on text encoders; null: learning_rate")
    text_weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="there; null: the optimiser's")
    optimizer: OptimizerConfig = OptimizerConfig()


class GanConfig(Strict):
    """The second phase of distillation: the same with a discriminator."""

    max_train_steps: PositiveInt = 5000
    train_batch_size: PositiveInt = Field(16, description="per step of the generator that an expert owns")
    learning_rate: PositiveFloat = 5e-7
    fake_learning_rate: PositiveFloat | None = Field(None, description="null: learning_rate")
    generator_weight: Annotated[float, Field(ge=0)] = 1e-3
    discriminator_weight: Annotated[float, Field(ge=0)] = 1e-2


class DistillConfig(Strict):
    """In place of fostering: a few-step generator, by distribution matching."""

    timesteps: tuple[int, ...] = Field((999, 749, 499, 249), description="of the generator's steps, descending")
    inputs: Literal["backsim", "real"] = Field(
        "backsim", description="experts see what earlier ones draw, or training pictures made noisy"
    )
    guidance_scale: Annotated[float, Field(ge=0)] = Field(1.75, description="of the real score; the generator has none")
    generator_interval: PositiveInt = Field(10, description="updates of the fake score (steps) per generator update")
    max_train_steps: PositiveInt = 20000
    train_batch_size: PositiveInt = Field(32, description="per step of the generator that an expert owns")
    learning_rate: PositiveFloat = 1e-5
    fake_learning_rate: PositiveFloat | None = Field(None, description="of the fake score; null: learning_rate")
    gan: GanConfig | None = Field(GanConfig(), description="null: no second phase")
    optimizer: OptimizerConfig = OptimizerConfig(max_grad_norm=10.0)


class AssembleConfig(Strict):
    """Stage 2."""

    max_train_steps: PositiveInt = 1000
    train_batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-4
    table_learning_rate: PositiveFloat | None = Field(None, description="of E; null: 50 times learning_rate")
    optimizer: OptimizerConfig = OptimizerConfig()


class DecoupleOptimizerConfig(OptimizerConfig):
    """The same with DeMe's options."""

    options: Mapping[str, float | bool | tuple[float, ...]] = {"weight_decay": 1e-6, "betas": (0.95, 0.999)}


class DecoupleConfig(Strict):
    """Full copies of the denoiser, one per range of timesteps."""

    intervals: PositiveInt | None = Field(None, description="this many equal ranges")
    boundaries: tuple[float, ...] | None = Field(None, description="or explicit ones, from 0 to T")
    max_train_steps: PositiveInt | tuple[PositiveInt, ...] = Field(20000, description="updates, or one per range")
    learning_rate: PositiveFloat = 5e-5
    train_batch_size: PositiveInt = Field(64, description="samples per optimiser update")
    optimizer: DecoupleOptimizerConfig = DecoupleOptimizerConfig()
    trainable: str | None = Field(None, description="a regular expression of whole parameter names; null: all")
    projection: Literal["off", "paper", "foldable"] = "off"
    consistency: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(1.0, description="lambda; 0: off")
    full_range_probability: Annotated[float, Field(ge=0, le=1)] = Field(0.3, description="p: t from all timesteps")
    sampling: Literal["sample", "batch"] = Field("sample", description="what p is thrown for")
    antithetic: bool = Field(False, description="draw t in mirrored pairs")
    weighting: Literal["none", "snr_plus_one", "truncated", "min_snr", "p2", "uncertainty"] = "none"
    uncertainty_intervals: PositiveInt = Field(4, description="ranges of t that have a log-variance of their own")
    uncertainty_learning_rate: PositiveFloat = 1e-3
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(0.9999, description="null: keep the last weights")
    ema_warmup: bool = Field(True, description="the decay of update n is at most (1 + n) / (10 + n)")

    @model_validator(mode="after")
    def _one_partition(self) -> DecoupleConfig:
        if (self.intervals is None) == (self.boundaries is None):
            raise ValueError("give either intervals or boundaries")
        steps = self.max_train_steps
        if isinstance(steps, tuple) and len(steps) != self.num_ranges:
            raise ValueError(f"{self.num_ranges} ranges need as many values of max_train_steps; got {len(steps)}")
        return self

    @property
    def num_ranges(self) -> int:
        """How many experts there are."""
        return self.intervals or len(self.boundaries or ()) - 1


class MergeConfig(Strict):
    """The trained experts of an arm made one; their weights are searched on training pictures."""

    rank: PositiveInt | None = Field(
        None, description="of the LoRA that experts of experts.scales become; copies of decouple need none"
    )
    method: Literal["quadratic", "grid", "cma"] = "quadratic"
    objective: Literal["mean", "ranges"] = Field("mean", description="the loss, or its ratios to the base's by range")
    refinements: PositiveInt = Field(10, description="evaluations of quadratic after its first points, at most")
    grid: tuple[FiniteFloat, ...] = Field((0.0, 0.25, 0.5, 0.75, 1.0), min_length=1, description="values of a weight")
    budget: PositiveInt = Field(100, description="evaluations of cma, at most")
    num_pictures: PositiveInt = Field(32, description="per bin of timesteps, for one evaluation")
    bins_per_interval: PositiveInt = 1


class TrainingConfig(Strict):
    """What both stages share."""

    mixed_precision: Literal["no", "bf16"] = "no"
    base_dtype: Literal["fp32", "bf16"] = Field("fp32", description="of the frozen base; experts are always fp32")
    base_quantization: Literal["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8"] | None = Field(
        None, description="of denoisers and T5s; null: none"
    )
    offload_encoders: bool = Field(True, description="keep what is not needed while training on the CPU")
    gradient_accumulation_steps: PositiveInt = 1
    gradient_checkpointing: bool = False
    checkpointing_steps: PositiveInt | None = 500
    checkpoints_total_limit: PositiveInt | None = 2
    logging_steps: PositiveInt = 10
    validation_steps: PositiveInt | None = Field(None, description="null: at the end of each stage")
    preview_pictures: Annotated[int, Field(ge=0)] = Field(0, description="at every validation, by the full pipeline")


class EvaluationConfig(Strict):
    """Losses with common random numbers, and pictures for the same prompts and seeds."""

    num_pictures: PositiveInt = Field(128, description="validation pictures per timestep bin")
    bins_per_interval: PositiveInt = 4
    seed: int = 1234
    prompts: tuple[str, ...] | Path | None = Field(None, description="a list or a text file; null: held-out captions")
    num_prompts: Annotated[int, Field(ge=0)] = 128
    scheduler: str | None = Field(None, description="any scheduler of diffusers; null: the base's own")
    num_inference_steps: PositiveInt = 20
    guidance_scale: Annotated[float, Field(ge=0)] = 3.0
    batch_size: PositiveInt = 32
    judge: Literal["auto", "scenes", "off"] = Field("auto", description="auto: where captions are the embedded world's")
