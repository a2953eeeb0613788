"""What the comparison of decoupling trains, which rows come of it, and how much training each of them is.

Everything begins at one base, and every row but the base has the same number of updates and samples in all:

- ``experts``: one copy per range with the recipe's own settings, as an ensemble, merged uniformly or by found weights;
- ``plain``, ``min_snr``, ``p2``: one copy for all timesteps with the updates of all experts together;
- ``finetunes``: as many copies as experts, each with an expert's updates, but for all timesteps and with samples of its
  own. Merged like experts, they say what averaging and searching do without any specialisation;
- ``plain, scaled``: the plain copy's change times one found number, the least that a search can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from timestep_experts.config import MAIN, DecoupleConfig, Recipe, parse_recipe
from timestep_experts.jobs.methods import Decoupling, method_of

BASE = "base"
EXPERTS, FINETUNES, PLAIN = "experts", "finetunes", "plain"
WEIGHTINGS = {PLAIN: "none", "min_snr": "min_snr", "p2": "p2"}
GROUPS = (*WEIGHTINGS, FINETUNES, EXPERTS)

How = Literal["base", "copies", "uniform", "searched"]
"""``copies``: as trained, each for its range; ``uniform`` and ``searched``: merged into one."""


@dataclass(frozen=True)
class Copy:
    """One full copy to be trained.

    Args:
        recipe: of its training.
        index: of its range in that recipe.
    """

    recipe: Recipe
    index: int

    @property
    def method(self) -> Decoupling:
        """The way in which it is trained."""
        method = method_of(self.recipe, self.recipe.variant(MAIN))
        assert isinstance(method, Decoupling)  # see `check`
        return method

    @property
    def settings(self) -> DecoupleConfig:
        """Of the training."""
        return self.method.config

    @property
    def updates(self) -> int:
        """Of the optimiser."""
        steps = self.settings.max_train_steps
        return steps[self.index] if isinstance(steps, tuple) else steps

    @property
    def samples(self) -> int:
        """That it sees."""
        return self.updates * self.settings.train_batch_size

    @property
    def base_samples(self) -> int:
        """That the frozen base is asked about too."""
        return self.samples if self.settings.consistency else 0


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Args:
        label: for people.
        group: of copies, see `copies`; ``base`` has none.
        how: what is made of them.
    """

    label: str
    group: str
    how: How

    @property
    def slug(self) -> str:
        """Its name in files."""
        return self.label.replace(", ", "-").replace(" ", "-")


ROWS = (
    Row(BASE, BASE, "base"),
    *(Row(name, name, "copies") for name in WEIGHTINGS),
    Row("plain, scaled", PLAIN, "searched"),
    Row("finetunes, uniform", FINETUNES, "uniform"),
    Row("finetunes, searched", FINETUNES, "searched"),
    Row("experts, ensemble", EXPERTS, "copies"),
    Row("experts, uniform", EXPERTS, "uniform"),
    Row("experts, searched", EXPERTS, "searched"),
)


def rows_of(groups: Sequence[str]) -> tuple[Row, ...]:
    """Those of some groups of copies, and the base's."""
    return tuple(row for row in ROWS if row.group in (BASE, *groups))


def check(recipe: Recipe) -> DecoupleConfig:
    """The recipe's section ``method``.

    Raises:
        ValueError: it is of another kind, or its experts could not be compared.
    """
    if not isinstance(recipe.method, DecoupleConfig):
        raise ValueError(f"recipe.method.kind: decouple is what is compared here; got {recipe.method.kind}")
    if recipe.method.num_ranges < 2:
        raise ValueError("recipe.method.intervals: one range is the plain finetune; give at least 2")
    if recipe.method.projection == "paper":
        raise ValueError(
            "recipe.method.projection: with paper, projections stay beside the weights, which a search cannot merge;"
            " use foldable or off"
        )
    if recipe.data.validation_path is None:
        raise ValueError("recipe.data.validation_path: name the folder of pictures that weights are chosen by")
    return recipe.method


def copies(recipe: Recipe, seed: int) -> dict[str, tuple[Copy, ...]]:
    """All trainings of one seed by group. Copies meet the seed's samples, but finetunes those of their own.

    Raises:
        ValueError: see `check`.
    """
    config, home = check(recipe), recipe.output_dir / f"seed-{seed}"
    steps = config.max_train_steps
    per_range = steps if isinstance(steps, tuple) else (steps,) * config.num_ranges
    experts = _variant(recipe, home / EXPERTS, seed, {})
    whole = {
        name: _variant(recipe, home / name, seed, _full_range(sum(per_range), weighting))
        for name, weighting in WEIGHTINGS.items()
    }
    several = [
        _variant(recipe, home / f"{FINETUNES}-{i}", 1000 * (seed + 1) + i, _full_range(updates, "none"))
        for i, updates in enumerate(per_range)
    ]
    return {
        EXPERTS: tuple(Copy(experts, index) for index in range(config.num_ranges)),
        FINETUNES: tuple(Copy(one, 0) for one in several),
        **{name: (Copy(one, 0),) for name, one in whole.items()},
    }


def training_of(group: tuple[Copy, ...]) -> dict[str, int | list[int]]:
    """How much training a row rests on: updates of each copy and of all, samples, and those the base answered too."""
    return {
        "updates_per_expert": [copy.updates for copy in group],
        "total_updates": sum(copy.updates for copy in group),
        "samples": sum(copy.samples for copy in group),
        "base_samples": sum(copy.base_samples for copy in group),
    }


def _full_range(updates: int, weighting: str) -> dict[str, Any]:
    """An ordinary finetune."""
    return {
        "intervals": 1,
        "boundaries": None,
        "max_train_steps": updates,
        "full_range_probability": 0.0,
        "consistency": 0.0,
        "projection": "off",
        "weighting": weighting,
    }


def _variant(recipe: Recipe, folder: Path, seed: int, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with another folder, seed and section; the loss that is logged at a stage's end is a cheap one."""
    document = recipe.model_dump(mode="json", exclude_unset=True)
    document |= {"output_dir": str(folder), "seed": seed}
    document["method"] = {**document["method"], **changes}
    document["evaluation"] = {**document.get("evaluation", {}), "num_pictures": 8, "bins_per_interval": 1}
    return parse_recipe(document)
