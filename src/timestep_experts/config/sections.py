"""The sections of a recipe that do not depend on the way of training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from timestep_experts.errors import UserError

WholeNumber: TypeAlias = Annotated[int, Field(strict=True)]
PositiveInt: TypeAlias = Annotated[int, Field(strict=True, gt=0, le=10**9)]
Number: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]
PositiveFloat: TypeAlias = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, Field(strict=True, ge=0, lt=1)]
Count: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=10**9)]
Seed: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
"""Any number of samples can be counted on from a seed without leaving the generators' 64 bits."""


def _height_and_width(value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(type(s) is int and s > 0 for s in sides):
        raise UserError("a side in pixels or [height, width] is needed")
    return sides[0], sides[1]


Size: TypeAlias = Annotated[tuple[int, int], BeforeValidator(_height_and_width)]


def _at_home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _expanded(path: Path) -> Path:
    return path.expanduser()


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"is no regular expression: {error}") from error
    return pattern


Place: TypeAlias = Annotated[str, AfterValidator(_at_home)]
"""A path or a name; a leading ~ is the home folder."""
LocalPath: TypeAlias = Annotated[Path, AfterValidator(_expanded)]
Pattern: TypeAlias = Annotated[str, AfterValidator(_compiles)]
"""A regular expression."""


def _without_rate(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if "lr" in options:
        raise UserError("lr has no place among the options: the key learning_rate is for it")
    return options


OptimizerOptions: TypeAlias = Annotated[Mapping[str, Number | bool | tuple[Number, ...]], AfterValidator(_without_rate)]


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

    path: Place = Field(description="world/flat, world/neon, a folder, a table of clips, a saved dataset or a hub id")
    clips: ClipsConfig | None = Field(
        None, description="of a video base; null: as many frames as it generates, at their own rate"
    )
    max_train_samples: PositiveInt | None = None
    validation_path: Place | None = Field(None, description="null: held-out captions of the same source")
    validation_share: Annotated[Number, Field(gt=0, lt=1)] = Field(
        0.1, description="of the captions (or, where there are too few, of the pictures), if no path is set"
    )
    max_validation_samples: PositiveInt | None = None
    flip: bool = False
    caption_dropout: Share = 0.1


class OptimizerConfig(Strict):
    """Any optimiser of torch.optim, or one of bitsandbytes or torchao."""

    name: str = Field("AdamW", description="e.g. AdamW, bitsandbytes.AdamW8bit, torchao.AdamW8bit")
    options: OptimizerOptions = Field({"weight_decay": 0.01, "betas": (0.9, 0.999)})
    lr_scheduler: str = "constant"
    lr_warmup_steps: Count = 0
    max_grad_norm: PositiveFloat | None = 1.0


class MergeConfig(Strict):
    """What was trained is merged into one; the weights are searched on training pictures."""

    rank: PositiveInt | None = Field(
        None, description="of the LoRA that low-rank experts become; full copies become a copy, without a rank"
    )
    method: Literal["quadratic", "grid", "cma"] = "quadratic"
    objective: Literal["mean", "ranges"] = Field("mean", description="the loss, or its ratios to the base's by range")
    refinements: PositiveInt = Field(10, description="evaluations of quadratic after its first points, at most")
    grid: tuple[Number, ...] = Field((0.0, 0.25, 0.5, 0.75, 1.0), min_length=1, description="values of a weight")
    budget: PositiveInt = Field(100, description="evaluations of cma, at most")
    num_pictures: PositiveInt = Field(32, description="per bin of timesteps, for one evaluation")
    bins_per_interval: PositiveInt = 1


class TrainingConfig(Strict):
    """What all stages share."""

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
    not_finite: Literal["stop", "skip"] = Field(
        "stop", description="where a gradient is not finite; skip: leave those experts out of the step, and count it"
    )
    preview_pictures: Count = Field(0, description="at every validation, by the full pipeline")


class EvaluationConfig(Strict):
    """Losses with common random numbers, and pictures for the same prompts and seeds."""

    num_pictures: PositiveInt = Field(128, description="validation pictures per timestep bin")
    bins_per_interval: PositiveInt = 4
    seed: Seed = 1234
    prompts: tuple[str, ...] | LocalPath | None = Field(
        None, description="a list or a text file; null: held-out captions"
    )
    num_prompts: Count = 128
    scheduler: str | None = Field(None, description="any scheduler of diffusers; null: the base's own")
    num_inference_steps: PositiveInt = 20
    guidance_scale: NonNegativeFloat = 3.0
    batch_size: PositiveInt = 32
    judge: Literal["auto", "scenes", "off"] = Field("auto", description="auto: where captions are the embedded world's")
