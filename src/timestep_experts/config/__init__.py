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
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticKnownError

from timestep_experts.config.sections import (
    NO_EXPERTS,
    AssembleConfig,
    ClipsConfig,
    DataConfig,
    DecoupleConfig,
    DecoupleOptimizerConfig,
    DistillConfig,
    EvaluationConfig,
    ExpertsConfig,
    FosterConfig,
    GanConfig,
    MergeConfig,
    OptimizerConfig,
    ScaleConfig,
    Size,
    Strict,
    TrainingConfig,
)

__all__ = [
    "MAIN_ARM",
    "AssembleConfig",
    "ClipsConfig",
    "DataConfig",
    "DecoupleConfig",
    "DecoupleOptimizerConfig",
    "DistillConfig",
    "EvaluationConfig",
    "ExpertsConfig",
    "FosterConfig",
    "GanConfig",
    "MergeConfig",
    "OptimizerConfig",
    "Recipe",
    "ScaleConfig",
    "TrainingConfig",
    "load_recipe",
    "parse_recipe",
]

MAIN_ARM = "main"
_OF_ARMS = ("experts", "foster", "distill", "assemble", "decouple", "merge", "modes")
_OF_EXPERTS = ("experts", "foster", "distill", "assemble", "modes")


class _Lacking(dict[str, Any]):
    """A recipe without experts and anything else to train, in the place of its experts."""


def _present(value: Any) -> Any:
    if isinstance(value, _Lacking):
        raise PydanticKnownError("missing")
    return value


class Recipe(Strict):
    """Everything that decides a run."""

    pretrained_model_name_or_path: str = "world/base"
    output_dir: Path
    resolution: Size = Field((512, 512), description="side in pixels of square pictures, or [height, width]")
    max_sequence_length: PositiveInt | None = Field(None, description="tokens of a T5; null: the pipeline's default")
    seed: int = 0
    device: str = Field("auto", description="auto: cuda where there is one, else cpu")
    data: DataConfig
    experts: Annotated[ExpertsConfig, BeforeValidator(_present)] = Field(
        NO_EXPERTS, description="may be left out where there is decouple"
    )
    foster: FosterConfig = FosterConfig()
    distill: DistillConfig | None = Field(None, description="in place of foster; assemble then goes by its losses too")
    assemble: AssembleConfig | None = AssembleConfig()
    decouple: DecoupleConfig | None = Field(None, description="full copies, in place of experts")
    merge: MergeConfig | None = Field(None, description="what was trained is made one too; null: no such row")
    modes: tuple[Literal["switch", "route"], ...] = Field(("switch", "route"), description="in which it is evaluated")
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    arms: Mapping[str, Mapping[str, Any]] = Field({}, description="named variations of " + ", ".join(_OF_ARMS))

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

    @property
    def is_decoupled(self) -> bool:
        """Whether full copies are all that it trains; where it has experts too, copies are the command decouple's."""
        return self.decouple is not None and not self.has_experts

    @model_validator(mode="after")
    def _merged_into_what(self) -> Recipe:
        if self.merge is None:
            return self
        if self.is_decoupled == (self.merge.rank is not None):
            needed = "copies are merged into a copy, which has no rank" if self.is_decoupled else "a LoRA needs a rank"
            raise ValueError(f"merge.rank: {needed}")
        most = sum(scale.rank * scale.num_experts for scale in self.experts.scales)
        if self.merge.rank is not None and self.merge.rank > most:
            raise ValueError(
                f"merge.rank: the experts have {most} together, so a LoRA of {self.merge.rank} is too wide"
            )
        if self.distill is not None:
            raise ValueError("merge: weights are chosen by the denoising loss, which a distilled generator has none of")
        if self.decouple is not None and self.is_decoupled and self.decouple.projection == "paper":
            raise ValueError("merge: not all projections of kind paper fold; use decouple.projection: foldable")
        return self

    @model_validator(mode="after")
    def _distilled_or_fostered(self) -> Recipe:
        if self.distill is not None and "foster" in self.model_fields_set:
            raise ValueError("experts are fostered or distilled; give foster or distill, not both")
        if self.distill is not None and self.training.base_quantization is not None:
            raise ValueError("distill trains a copy of the base, so training.base_quantization must be null")
        has_gan = self.distill is not None and self.distill.gan is not None
        if not has_gan and any(scale.gan_train_steps is not None for scale in self.experts.scales):
            raise ValueError("experts.scales: gan_train_steps is of distill.gan, which this recipe does not have")
        return self

    @model_validator(mode="after")
    def _arms_are_recipes(self) -> Recipe:
        for name, changes in self.arms.items():
            foreign = sorted(set(changes) - set(_OF_ARMS))
            if foreign or name == MAIN_ARM or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"arms.{name}: an arm may change {', '.join(_OF_ARMS[:-1])} and {_OF_ARMS[-1]}; its name is made of"
                    f" letters, digits, - and _, and is not {MAIN_ARM!r}; got {', '.join(foreign) or 'a bad name'}"
                )
        return self

    def arm(self, name: str) -> Recipe:
        """The recipe of one arm: this one with the arm's changes, and without arms.

        An arm that decouples, and says nothing of experts, has no experts; an arm merges only if it says so itself.

        Raises:
            ValueError: there is no such arm, or its changes do not fit the schema.
        """
        if name != MAIN_ARM and name not in self.arms:
            raise ValueError(f"no arm {name!r} in this recipe: it has {', '.join(self.arm_names)}")
        document = self.model_dump(mode="json", exclude={"arms"}, exclude_unset=True)
        changes = self.arms.get(name, {})
        if name != MAIN_ARM:
            document.pop("merge", None)
        if changes.get("decouple") is not None and "experts" not in changes:
            document = {key: value for key, value in document.items() if key not in _OF_EXPERTS}
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
        is_section = isinstance(problem["input"], Mapping)  # whose keys are at odds, as the message says
        got = "" if is_section and problem["type"] == "value_error" else f" (got {problem['input']!r})"
        return f"{place}: {problem['msg'].removeprefix('Value error, ')}{got}"
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
