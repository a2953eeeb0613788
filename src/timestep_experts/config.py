"""The recipe: one strict YAML schema for a whole run. Objects of this module stop at ``build``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticKnownError

MAIN_ARM = "main"
Share = Annotated[float, Field(ge=0, lt=1)]


def _height_and_width(value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(type(s) is int and s > 0 for s in sides):
        raise ValueError("a side in pixels or [height, width] is needed")
    return sides[0], sides[1]


Size = Annotated[tuple[int, int], BeforeValidator(_height_and_width)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClipsConfig(_Strict):
    """How a video base reads clips."""

    num_frames: PositiveInt | None = Field(None, description="null: the base's default")
    fps: PositiveFloat | None = Field(None, description="frames per second at which clips are read; null: their own")
    stride: PositiveInt = Field(1, description="take one of so many of those frames")


class DataConfig(_Strict):
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


class ScaleConfig(_Strict):
    """One set of experts."""

    intervals: PositiveInt | None = Field(None, description="this many equal intervals")
    boundaries: tuple[float, ...] | None = Field(None, description="or explicit ones, from 0 to T")
    name: str | None = Field(None, description="null: n<intervals>")
    rank: PositiveInt = 4
    lora_alpha: PositiveFloat | None = Field(None, description="null: equal to rank")
    role: Literal["auto", "core", "context"] = Field("auto", description="auto: the finest scale is the core")
    learning_rate: PositiveFloat | tuple[PositiveFloat, ...] | None = Field(None, description="own, or one per expert")
    max_train_steps: PositiveInt | tuple[PositiveInt, ...] | None = Field(None, description="own, or one per expert")

    @model_validator(mode="after")
    def _one_partition(self) -> ScaleConfig:
        if (self.intervals is None) == (self.boundaries is None):
            raise ValueError("give either intervals or boundaries")
        for key in ("learning_rate", "max_train_steps"):
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


class ExpertsConfig(_Strict):
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


_NO_EXPERTS = ExpertsConfig(scales=(ScaleConfig(intervals=1),))


class OptimizerConfig(_Strict):
    """Any optimiser of torch.optim, or one of bitsandbytes or torchao."""

    name: str = Field("AdamW", description="e.g. AdamW, bitsandbytes.AdamW8bit, torchao.AdamW8bit")
    options: Mapping[str, float | bool | tuple[float, ...]] = {"weight_decay": 0.01, "betas": (0.9, 0.999)}
    lr_scheduler: str = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: PositiveFloat | None = 1.0


class FosterConfig(_Strict):
    """Stage 1."""

    method: Literal["independent", "coarse_to_fine", "joint"] = "joint"
    max_train_steps: PositiveInt = 1000
    train_batch_size: PositiveInt = Field(8, description="per interval and step")
    learning_rate: PositiveFloat = 1e-4
    text_learning_rate: PositiveFloat | None = Field(None, description="on text encoders; null: learning_rate")
    text_weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="there; null: the optimiser's")
    optimizer: OptimizerConfig = OptimizerConfig()


class AssembleConfig(_Strict):
    """Stage 2."""

    max_train_steps: PositiveInt = 1000
    train_batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-4
    table_learning_rate: PositiveFloat | None = Field(None, description="of E; null: 50 times learning_rate")
    optimizer: OptimizerConfig = OptimizerConfig()


class DecoupleOptimizerConfig(OptimizerConfig):
    """The same with DeMe's options."""

    options: Mapping[str, float | bool | tuple[float, ...]] = {"weight_decay": 1e-6, "betas": (0.95, 0.999)}


class DecoupleConfig(_Strict):
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


class TrainingConfig(_Strict):
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


class EvaluationConfig(_Strict):
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


class _Lacking(dict[str, Any]):
    """A recipe without experts and anything else to train, in the place of its experts."""


def _present(value: Any) -> Any:
    if isinstance(value, _Lacking):
        raise PydanticKnownError("missing")
    return value


class Recipe(_Strict):
    """Everything that decides a run."""

    pretrained_model_name_or_path: str = "world/base"
    output_dir: Path
    resolution: Size = Field((512, 512), description="side in pixels of square pictures, or [height, width]")
    max_sequence_length: PositiveInt | None = Field(None, description="tokens of a T5; null: the pipeline's default")
    seed: int = 0
    device: str = Field("auto", description="auto: cuda where there is one, else cpu")
    data: DataConfig
    experts: Annotated[ExpertsConfig, BeforeValidator(_present)] = Field(
        _NO_EXPERTS, description="may be left out where there is decouple"
    )
    foster: FosterConfig = FosterConfig()
    assemble: AssembleConfig | None = AssembleConfig()
    decouple: DecoupleConfig | None = Field(None, description="full copies; of the command decouple")
    modes: tuple[Literal["switch", "route"], ...] = Field(("switch", "route"), description="in which it is evaluated")
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    arms: Mapping[str, Mapping[str, Any]] = Field(
        {}, description="named variations of experts, foster, assemble, modes"
    )

    @model_validator(mode="before")
    @classmethod
    def _something_is_trained(cls, document: Any) -> Any:
        if isinstance(document, Mapping) and "experts" not in document and document.get("decouple") is None:
            return {**document, "experts": _Lacking(document)}
        return document

    @property
    def has_experts(self) -> bool:
        """Whether it says which experts are fostered."""
        return "experts" in self.model_fields_set

    @model_validator(mode="after")
    def _arms_are_recipes(self) -> Recipe:
        for name, changes in self.arms.items():
            foreign = sorted(set(changes) - {"experts", "foster", "assemble", "modes"})
            if foreign or name == MAIN_ARM or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"arms.{name}: an arm may change experts, foster, assemble and modes; its name is made of letters,"
                    f" digits, - and _, and is not {MAIN_ARM!r}; got {', '.join(foreign) or 'a bad name'}"
                )
        return self

    def arm(self, name: str) -> Recipe:
        """The recipe of one arm: this one with the arm's changes, and without arms.

        Raises:
            ValueError: there is no such arm, or its changes do not fit the schema.
        """
        if name != MAIN_ARM and name not in self.arms:
            raise ValueError(f"no arm {name!r} in this recipe: it has {', '.join(self.arm_names)}")
        document = self.model_dump(mode="json", exclude={"arms"}, exclude_unset=True)
        changes = self.arms.get(name, {})
        return parse_recipe(_merged(document, changes), where=f"recipe.arms.{name}")

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The main arm, then the variations."""
        return (MAIN_ARM, *self.arms)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides (dotted keys, YAML values).

    Raises:
        ValueError: naming the path of what is wrong, and the nearest valid key where one is unknown.
    """
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} should hold a mapping of keys to values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"an override reads key=value; got {override!r}")
        try:
            _set(document, key.split("."), yaml.safe_load(value), override)
        except (yaml.YAMLError, IndexError) as error:
            raise ValueError(f"override {override!r} cannot be applied: {error}") from error
    recipe = parse_recipe(document, where="recipe")
    for name in recipe.arm_names:
        recipe.arm(name)  # every arm must fit the schema before anything starts
    return recipe


def parse_recipe(document: Mapping[str, Any], where: str) -> Recipe:
    """Validate a document.

    Raises:
        ValueError: listing every problem with its path.
    """
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        problems = [p for p in error.errors() if not _is_consequence(p, error.errors())]
        raise ValueError("\n".join(_explain(problem, where) for problem in problems)) from error


def _is_consequence(problem: Mapping[str, Any], problems: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a list only counts as too short because its items are wrong, which is said of them already."""
    place = problem["loc"]
    return problem["type"] == "too_short" and any(
        p["loc"] != place and p["loc"][: len(place)] == place for p in problems
    )


def _explain(problem: Mapping[str, Any], where: str) -> str:
    place = ".".join([where, *(str(part) for part in problem["loc"])])
    if problem["type"] != "extra_forbidden":
        return f"{place}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})"
    *parents, key = (str(part) for part in problem["loc"])
    near = difflib.get_close_matches(key, _keys_under(parents), 1)
    return f"{place}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")


def _keys_under(parents: Sequence[str]) -> list[str]:
    """The valid keys of the section that a path of keys and list indices leads to."""
    sections: dict[str, type[BaseModel]] = {"scales": ScaleConfig, "optimizer": OptimizerConfig}
    section: type[BaseModel] = Recipe
    for part in parents:
        field = section.model_fields.get(part)
        if part in sections:
            section = sections[part]
        elif field is not None:
            kinds = [field.annotation, *get_args(field.annotation)]
            section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(section.model_fields)


def _set(document: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    node: Any = document
    for depth, key in enumerate(keys):
        place: str | int = key
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ValueError(f"override {override!r}: {key!r} is no index of a list of {len(node)}")
            place = int(key)
        elif not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {keys[depth - 1]!r} holds a value, not further keys")
        if depth == len(keys) - 1:
            node[place] = value
        elif isinstance(node, dict):
            node = node.setdefault(key, {})
        else:
            node = node[int(key)]


def _merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = deepcopy(dict(document))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
