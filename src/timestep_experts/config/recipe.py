"""The whole recipe, and its variants."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from timestep_experts.config.methods import DecoupleConfig, DistillConfig, MethodConfig
from timestep_experts.config.problems import explain_all
from timestep_experts.config.sections import (
    DataConfig,
    EvaluationConfig,
    LocalPath,
    MergeConfig,
    Place,
    PositiveInt,
    Seed,
    Size,
    Strict,
    TrainingConfig,
)
from timestep_experts.errors import UserError

MAIN = "main"
"""The name of the variant that the recipe itself describes."""


@dataclass(frozen=True)
class Variant:
    """One thing that a recipe trains.

    Args:
        name: `MAIN`, or a key of the recipe's ``variants``.
        method: the way of training.
        merge: how what was trained is merged into one; ``None``: it is not.
    """

    name: str
    method: MethodConfig
    merge: MergeConfig | None


class _Trained(Strict):
    """The part of a recipe that variants change."""

    method: MethodConfig
    merge: MergeConfig | None = None


class Recipe(Strict):
    """Everything that decides a run."""

    pretrained_model_name_or_path: Place = "world/base"
    output_dir: LocalPath
    resolution: Size = Field((512, 512), description="side in pixels of square pictures, or [height, width]")
    max_sequence_length: PositiveInt | None = Field(None, description="tokens of a T5; null: the pipeline's default")
    seed: Seed = 0
    device: str = Field("auto", pattern=r"^[a-z]+(:\d+)?$", description="auto: cuda where there is one, else cpu")
    data: DataConfig
    method: MethodConfig = Field(description="what is trained, and how: foster, distill or decouple")
    merge: MergeConfig | None = Field(None, description="merge what was trained into one model; null: no such row")
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    variants: Mapping[str, Mapping[str, Any]] = Field({}, description="named variations of method and merge")

    _resolved: dict[str, Variant] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _resolve(self) -> Recipe:
        _check(self.method, self.merge, self.training)
        resolved = {MAIN: Variant(MAIN, self.method, self.merge)}
        problems = []
        for name, changes in self.variants.items():
            _check_variant_name(name, changes)
            try:
                trained = _Trained.model_validate(self._with(changes))
                _check(trained.method, trained.merge, self.training)
                resolved[name] = Variant(name, trained.method, trained.merge)
            except ValidationError as error:
                problems += explain_all(error, f"recipe.variants.{name}", _Trained)
            except ValueError as error:
                problems.append(f"recipe.variants.{name}: {error}")
        if problems:
            raise PydanticCustomError("variants", "{lines}", {"lines": "\n".join(problems)})
        self._resolved = resolved
        return self

    def _with(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The document of a variant: the main one with its changes; another kind of method begins anew."""
        method = self.method.model_dump(mode="json", exclude_unset=True)
        changed = changes.get("method", {})
        if isinstance(changed, Mapping):
            is_same_kind = changed.get("kind", self.method.kind) == self.method.kind
            changed = _merged(method, changed) if is_same_kind else dict(changed)
        return {**changes, "method": changed}

    @property
    def all_variants(self) -> tuple[Variant, ...]:
        """The main variant, then the others in their order."""
        return tuple(self._resolved.values())

    def variant(self, name: str) -> Variant:
        """Find a variant by its name.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self._resolved:
            raise UserError(f"no variant {name!r} in this recipe: it has {', '.join(self._resolved)}")
        return self._resolved[name]


def _check_variant_name(name: str, changes: Mapping[str, Any]) -> None:
    foreign = sorted(set(changes) - set(_Trained.model_fields))
    if foreign or name == MAIN or not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(
            f"variants.{name}: a variant may change method and merge; its name is made of letters, digits, - and _, and"
            f" is not {MAIN!r}; got {', '.join(foreign) or 'a bad name'}"
        )


def _check(method: MethodConfig, merge: MergeConfig | None, training: TrainingConfig) -> None:
    """Refuse what does not fit together."""
    if isinstance(method, DistillConfig) and training.base_quantization is not None:
        raise UserError("distill trains a copy of the base, so training.base_quantization must be null")
    if merge is None:
        return
    if isinstance(method, DistillConfig):
        raise UserError("merge: weights are chosen by the denoising loss, which a distilled generator has none of")
    if isinstance(method, DecoupleConfig):
        if merge.rank is not None:
            raise UserError("merge.rank: copies are merged into a copy, which has no rank")
        if method.projection == "paper":
            raise UserError("merge: not all projections of kind paper fold; use method.projection: foldable")
        return
    if merge.rank is None:
        raise UserError("merge.rank: a LoRA needs a rank")
    most = sum(scale.rank * scale.num_experts for scale in method.experts.scales)
    if merge.rank > most:
        raise UserError(f"merge.rank: the experts have {most} together, so a LoRA of {merge.rank} is too wide")


def _merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = deepcopy(dict(document))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
