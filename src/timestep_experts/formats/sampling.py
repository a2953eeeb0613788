"""How trained weights are meant to be sampled from: the part of a file that behaviour depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from timestep_experts.formats.dtypes import DtypeName


class SamplingDefaults(BaseModel):
    """What the command ``sample`` uses where it is not told otherwise. A missing value leaves it to the base model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_dtype: DtypeName = Field("fp32", description="dtype of the base that the experts were trained on")
    base_quantization: Literal["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8"] | None = Field(
        None, description="how that base was quantised; null: not at all"
    )
    resolution: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="height and width in pixels; null: the base's own"
    )
    num_frames: PositiveInt | None = Field(None, description="frames of a clip; null: the base's own number")
    fps: PositiveFloat | None = Field(None, description="frames per second of a clip's file; null: 8")
    max_sequence_length: PositiveInt | None = Field(None, description="tokens of a T5; null: the pipeline's default")
    scheduler: str | None = Field(None, description="name of a diffusers scheduler; null: the base's own")
    timesteps: tuple[int, ...] | None = Field(
        None, description="t of each step of a distilled generator, descending; null: the scheduler chooses"
    )
    guidance_scale: Annotated[float, Field(ge=0)] | None = Field(
        None, description="of classifier-free guidance; null: 3, the default of the command"
    )


def sampling_of_version_1(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The same as files of version 1 had it, among what they said of how they were made."""
    recipe, generator = provenance.get("recipe", {}), provenance.get("sampling") or {}
    training, clips = recipe.get("training", {}), (recipe.get("data") or {}).get("clips") or {}
    return {
        "base_dtype": training.get("base_dtype", "fp32"),
        "base_quantization": training.get("base_quantization"),
        "resolution": recipe.get("resolution"),
        "num_frames": clips.get("num_frames"),
        "fps": clips["fps"] / clips.get("stride", 1) if clips.get("fps") else None,
        "max_sequence_length": recipe.get("max_sequence_length"),
        "scheduler": generator.get("scheduler"),
        "timesteps": generator.get("timesteps"),
        "guidance_scale": generator.get("guidance_scale"),
    }
