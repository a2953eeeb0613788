"""The recipe: strict, overridable, and wrong only with a path and a hint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from timestep_experts.build import (
    build_assemble_settings,
    build_decode_settings,
    build_decouple_settings,
    build_distill_settings,
    build_foster_settings,
    build_sample_settings,
    build_spec,
)
from timestep_experts.config import MAIN, DecoupleConfig, FosterConfig, Recipe, load_recipe, parse_recipe
from timestep_experts.training import FosterSettings

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "output_dir": "runs/x",
    "data": {"path": "pictures"},
    "method": {"kind": "foster", "experts": {"scales": [{"intervals": 4, "rank": 2}, {"intervals": 1}]}},
}


def load(tmp_path: Path, changes: dict[str, Any] | None = None, overrides: Sequence[str] = ()) -> Recipe:
    path = tmp_path / "recipe.yaml"
    changes = changes or {}
    method = SMALL["method"] | changes.get("method", {})
    path.write_text(yaml.safe_dump(SMALL | changes | {"method": method}, sort_keys=False), encoding="utf-8")
    return load_recipe(path, overrides)


def problems(tmp_path: Path, changes: dict[str, Any] | None = None, overrides: Sequence[str] = ()) -> list[str]:
    with pytest.raises(ValueError, match=r".") as caught:
        load(tmp_path, changes, overrides)
    return str(caught.value).splitlines()


def foster_settings(recipe: Recipe) -> FosterSettings:
    assert isinstance(recipe.method, FosterConfig)
    return build_foster_settings(recipe, recipe.method, ())


def with_scales(*scales: dict[str, Any]) -> dict[str, Any]:
    return {"method": {"experts": {"scales": list(scales)}}}


# Reading


def test_defaults_are_those_of_the_docs(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert (recipe.resolution, recipe.seed, recipe.device) == ((512, 512), 0, "auto")
    assert recipe.method.modes is None
    assert recipe.method.experts.router.model_dump(exclude_unset=True) == {}
    assert recipe.method.experts.target_modules == ("to_q", "to_k", "to_v", "to_out.0")
    assert recipe.method.schedule == "joint"
    assert recipe.method.assemble is not None
    assert [variant.name for variant in recipe.all_variants] == [MAIN]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: [1", "is not YAML"),
        ("- 1", "should hold a mapping of keys to values"),
        ("", "should hold a mapping of keys to values"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        load_recipe(path)


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no recipe at {tmp_path / 'gone.yaml'}"):
        load_recipe(tmp_path / "gone.yaml")


def test_what_is_required_is_said(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1")
    with pytest.raises(ValueError, match=r".") as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()
    assert {line.split(":")[0] for line in lines} == {"recipe.output_dir", "recipe.data", "recipe.method"}
    assert all("Field required" in line for line in lines)


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    lines = problems(tmp_path, {"seed": "one", "resolution": 0, "method": {"schedule": "both"}})
    assert [line.split(":")[0] for line in lines] == ["recipe.resolution", "recipe.seed", "recipe.method.schedule"]
    assert lines[1].endswith("(got 'one')")


@pytest.mark.parametrize(("given", "meant"), [(16, (16, 16)), ([16, 24], (16, 24))])
def test_a_resolution_is_a_side_or_height_and_width(given: object, meant: tuple[int, int], tmp_path: Path) -> None:
    recipe = load(tmp_path, {"resolution": given})
    assert recipe.resolution == meant
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("given", [0, -8, 1.5, "big", [16], [16, 0], [16, 24, 32], True, None])
def test_no_other_resolution_is_taken(given: object, tmp_path: Path) -> None:
    (line,) = problems(tmp_path, {"resolution": given})
    assert line == f"recipe.resolution: a side in pixels or [height, width] is needed (got {given!r})"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_with_all_its_variants(path: Path) -> None:
    recipe = load_recipe(path)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert head.startswith("#")
    assert "Command:" in head
    assert f"recipes/{path.name}" in head
    build_sample_settings(recipe, build_decode_settings(recipe, 16 if recipe.data.clips else None, flip=False))
    for variant in recipe.all_variants:
        method = variant.method
        if isinstance(method, DecoupleConfig):
            build_decouple_settings(recipe, method, 1000)
            continue
        spec = build_spec(method, 1000)
        if isinstance(method, FosterConfig):
            build_foster_settings(recipe, method, ())
        else:
            build_distill_settings(recipe, method, 8)
        if method.assemble is not None:
            build_assemble_settings(recipe, method.assemble)
        num_cores = len([scale for scale in spec.scales if not scale.gated])
        assert num_cores == (0 if method.experts.router.gates == "rank" else 1)


def test_there_are_recipes() -> None:
    assert "quickstart" in {path.stem for path in RECIPES}


# Unknown keys


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sede": 1}, "recipe.sede: unknown key; did you mean 'seed'?"),
        ({"data": {"path": "x", "fliip": True}}, "recipe.data.fliip: unknown key; did you mean 'flip'?"),
        ({"method": {"max_steps": 3}}, "recipe.method.max_steps: unknown key; did you mean 'max_train_steps'?"),
        (
            {"method": {"optimizer": {"lr_schedule": "cosine"}}},
            "recipe.method.optimizer.lr_schedule: unknown key; did you mean 'lr_scheduler'?",
        ),
        (
            {"method": {"assemble": {"table_learning_rat": 1e-3}}},
            "recipe.method.assemble.table_learning_rat: unknown key; did you mean 'table_learning_rate'?",
        ),
        (
            {"method": {"assemble": {"optimizer": {"nam": "SGD"}}}},
            "recipe.method.assemble.optimizer.nam: unknown key; did you mean 'name'?",
        ),
        (
            with_scales({"intervals": 4}, {"intervals": 1, "rnk": 4}),
            "recipe.method.experts.scales.1.rnk: unknown key; did you mean 'rank'?",
        ),
        ({"zzz": 1}, "recipe.zzz: unknown key"),
    ],
)
def test_an_unknown_key_names_its_path_and_the_nearest(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    assert problems(tmp_path, changes) == [line]


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"method": {"rank": 4}}, "recipe.method.rank"),
        ({"data": {"path": "x", "learning_rate": 1}}, "recipe.data.learning_rate"),
        ({"max_train_steps": 7}, "recipe.max_train_steps"),
    ],
)
def test_a_key_of_another_section_is_not_suggested_to_itself(
    changes: dict[str, Any], path: str, tmp_path: Path
) -> None:
    (line,) = problems(tmp_path, changes)
    assert line.startswith(f"{path}: unknown key")
    assert f"did you mean '{path.rpartition('.')[2]}'" not in line


def test_the_nearest_key_is_one_that_is_valid_there(tmp_path: Path) -> None:
    assert sorted(problems(tmp_path, {"evaluation": {"seeed": 1, "num_promts": 2}})) == [
        "recipe.evaluation.num_promts: unknown key; did you mean 'num_prompts'?",
        "recipe.evaluation.seeed: unknown key; did you mean 'seed'?",
    ]
    (line,) = problems(tmp_path, {"training": {"learning_rat": 1}})
    assert not line.endswith("'learning_rate'?")


def test_an_unknown_key_of_a_variant_names_the_variant(tmp_path: Path) -> None:
    variants = {"wide": {"method": {"experts": {"scales": [{"intervals": 1, "rnak": 4}]}}}}
    assert problems(tmp_path, {"variants": variants}) == [
        "recipe.variants.wide.method.experts.scales.0.rnak: unknown key; did you mean 'rank'?"
    ]


# Overrides


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda r: r.seed, 7),
        ("method.max_train_steps=5", lambda r: r.method.max_train_steps, 5),
        ("method.learning_rate=2.0e-3", lambda r: r.method.learning_rate, 2e-3),
        ("method.experts.scales.0.rank=8", lambda r: r.method.experts.scales[0].rank, 8),
        ("method.experts.scales.1={intervals: 2, rank: 3}", lambda r: r.method.experts.scales[1].num_experts, 2),
        ("method.experts.scales=[{intervals: 2}]", lambda r: len(r.method.experts.scales), 1),
        ("method.experts.target_modules=[to_q]", lambda r: r.method.experts.target_modules, ("to_q",)),
        ("method.experts.target_modules=.*to_q", lambda r: r.method.experts.target_modules, ".*to_q"),
        ("data.flip=true", lambda r: r.data.flip, True),
        ("data.path=a=b", lambda r: r.data.path, "a=b"),
        ("method.assemble=null", lambda r: r.method.assemble, None),
        ("evaluation.prompts=[a cat, a dog]", lambda r: r.evaluation.prompts, ("a cat", "a dog")),
        ("evaluation.prompts=prompts.txt", lambda r: r.evaluation.prompts, Path("prompts.txt")),
        ("method.optimizer.options={momentum: 0.9}", lambda r: dict(r.method.optimizer.options), {"momentum": 0.9}),
        (
            "variants.wide.method.experts.scales.0.rank=64",
            lambda r: r.variant("wide").method.experts.scales[0].rank,
            64,
        ),
        ("variants.new={method: {assemble: null}}", lambda r: r.variant("new").method.assemble, None),
    ],
)
def test_an_override_is_what_the_file_would_say(override: str, read: Any, value: object, tmp_path: Path) -> None:
    wide = {"method": {"experts": {"scales": [{"intervals": 1, "rank": 32}]}}}
    assert read(load(tmp_path, {"variants": {"wide": wide}}, [override])) == value


def test_later_overrides_win(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, None, ["method.optimizer={name: SGD}", "method.max_train_steps=5", "method.max_train_steps=6"]
    )
    assert recipe.method.max_train_steps == 6


@pytest.mark.parametrize("override", ["seed", "=7", "--seed", "", "seed:7"])
def test_a_malformed_override_is_shown(override: str, tmp_path: Path) -> None:
    (line,) = problems(tmp_path, None, [override])
    assert line == f"an override reads key=value; got {override!r}"


@pytest.mark.parametrize(
    "override",
    [
        "method.experts.scales.2.rank=8",
        "method.experts.scales.2={intervals: 1}",
        "method.experts.scales.-1.rank=8",
        "method.experts.scales.-1={intervals: 1}",
        "method.experts.scales.first.rank=8",
        "method.experts.scales.rank=8",
        "seed.x=1",
        "seed.x.y=1",
        "data.path.x=1",
        "method.experts.scales.0.rank.x=1",
        "seed=[1",
        "seed={a: 1",
        "seed=%",
    ],
)
def test_an_override_that_leads_nowhere_is_shown(override: str, tmp_path: Path) -> None:
    (line, *_) = problems(tmp_path, {"seed": 1}, [override])
    assert repr(override) in line


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("method.max_step=3", "recipe.method.max_step: unknown key; did you mean 'max_train_steps'?"),
        ("evaluaton.seed=3", "recipe.evaluaton: unknown key; did you mean 'evaluation'?"),
        ("method.max_train_steps=0", "recipe.method.max_train_steps: Input should be greater than 0 (got 0)"),
        ("method..x=1", "recipe.method.: unknown key"),
    ],
)
def test_an_override_is_checked_like_the_file(override: str, line: str, tmp_path: Path) -> None:
    assert problems(tmp_path, None, [override]) == [line]


# Variants


def test_a_variant_is_laid_over_the_recipe(tmp_path: Path) -> None:
    variants = {
        "wide": {"method": {"experts": {"scales": [{"intervals": 1, "rank": 32}]}}},
        "long": {"method": {"max_train_steps": 99, "assemble": None, "modes": ["switch"]}},
    }
    optimizer = {"name": "SGD", "options": {"momentum": 0.9}}
    recipe = load(tmp_path, {"variants": variants, "method": {"schedule": "independent", "optimizer": optimizer}})
    assert [variant.name for variant in recipe.all_variants] == ["main", "wide", "long"]
    main, wide, long = (variant.method for variant in recipe.all_variants)
    assert main == recipe.method
    assert [scale.rank for scale in wide.experts.scales] == [32]
    assert wide == main.model_copy(update={"experts": wide.experts})
    changed = {"max_train_steps": 99, "assemble": None, "modes": ("switch",)}
    assert long == main.model_copy(update=changed)


def test_a_variant_of_another_kind_begins_anew(tmp_path: Path) -> None:
    variants = {"copies": {"method": {"kind": "decouple", "intervals": 2}}}
    recipe = load(tmp_path, {"variants": variants, "method": {"max_train_steps": 7, "learning_rate": 0.5}})
    assert recipe.variant("copies").method == DecoupleConfig(kind="decouple", intervals=2)


@pytest.mark.parametrize("kind", [None, "train", 3])
def test_the_kinds_of_methods_are_named(kind: object, tmp_path: Path) -> None:
    (line,) = problems(tmp_path, {"method": {"kind": kind}})
    assert line == f"recipe.method.kind: allowed are foster, distill, decouple (got {kind!r})"


def test_an_unknown_variant_lists_those_there_are(tmp_path: Path) -> None:
    recipe = load(tmp_path, {"variants": {"wide": {}}})
    with pytest.raises(ValueError, match="no variant 'wid' in this recipe: it has main, wide"):
        recipe.variant("wid")


@pytest.mark.parametrize(
    ("name", "changes", "got"),
    [
        ("wide", {"seed": 1, "data": {}}, "got data, seed"),
        ("main", {}, "got a bad name"),
        ("a b", {}, "got a bad name"),
        ("../x", {}, "got a bad name"),
        ("", {}, "got a bad name"),
    ],
)
def test_what_a_variant_may_not_be_is_refused(name: str, changes: dict[str, Any], got: str, tmp_path: Path) -> None:
    (line,) = problems(tmp_path, {"variants": {name: changes}})
    assert f"variants.{name}: a variant may change method and merge; its name is made of" in line
    assert got in line


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"method": {"max_train_steps": -1}}, "recipe.variants.bad.method.max_train_steps"),
        ({"method": {"experts": {"scales": [{"rank": 4}]}}}, "recipe.variants.bad.method.experts.scales.0"),
        ({"method": {"experts": {"scales": []}}}, "recipe.variants.bad.method.experts.scales"),
        ({"method": 3}, "recipe.variants.bad.method"),
        ({"method": {"modes": ["swap"]}}, "recipe.variants.bad.method.modes.0"),
    ],
)
def test_a_bad_variant_fails_before_anything_starts(changes: dict[str, Any], path: str, tmp_path: Path) -> None:
    (line,) = problems(tmp_path, {"variants": {"good": {}, "bad": changes}})
    assert line.startswith(f"{path}: ")


# Scales


@pytest.mark.parametrize("scale", [{}, {"intervals": 2, "boundaries": [0, 500, 1000]}])
def test_exactly_one_of_intervals_and_boundaries(scale: dict[str, Any], tmp_path: Path) -> None:
    (line,) = problems(tmp_path, with_scales({"intervals": 1}, scale))
    assert line.startswith("recipe.method.experts.scales.1: give either intervals or boundaries")


@pytest.mark.parametrize("option", ["learning_rate", "max_train_steps"])
@pytest.mark.parametrize(
    ("scale", "count"), [({"intervals": 3}, 3), ({"boundaries": [0, 100, 1000]}, 2), ({"intervals": 1}, 1)]
)
def test_numbers_per_expert_fit_the_number_of_experts(
    scale: dict[str, Any], count: int, option: str, tmp_path: Path
) -> None:
    numbers = [7 + i for i in range(count)]
    settings = foster_settings(load(tmp_path, with_scales(scale | {option: numbers})))
    values = settings.learning_rates if option == "learning_rate" else settings.max_train_steps
    assert values == {f"n{count}": tuple(numbers)}
    alone = foster_settings(load(tmp_path, with_scales(scale | {option: 7})))
    values = alone.learning_rates if option == "learning_rate" else alone.max_train_steps
    assert values == {f"n{count}": (7,) * count}


@pytest.mark.parametrize("where", ["main", "variant"])
@pytest.mark.parametrize("option", ["learning_rate", "max_train_steps"])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_list_of_wrong_length_fails_before_anything_starts(
    count: int, option: str, where: str, tmp_path: Path
) -> None:
    changes = with_scales({"intervals": 4, option: [1] * count})
    lines = problems(tmp_path, changes if where == "main" else {"variants": {"bad": changes}})
    path = "recipe.method.experts.scales" if where == "main" else "recipe.variants.bad.method.experts.scales"
    assert lines[0].startswith(path)
    assert "4 experts" in lines[0]
    assert f"got {count} values" in lines[0]


@pytest.mark.parametrize("boundaries", [[0, 500], [0, 500, 999], [0, 2000], [1, 1000], [0, 600, 500, 1000], [0], []])
def test_boundaries_that_do_not_ascend_from_0_to_t_are_refused(boundaries: list[float], tmp_path: Path) -> None:
    def build() -> None:
        build_spec(load(tmp_path, with_scales({"boundaries": boundaries})).method, 1000)

    with pytest.raises(ValueError, match="boundaries"):
        build()


def test_boundaries_end_at_the_timesteps_of_the_base(tmp_path: Path) -> None:
    method = load(tmp_path, with_scales({"boundaries": [0, 100.5, 500]})).method
    assert build_spec(method, 500).scales[0].partition.boundaries == (0, 100.5, 500)
    with pytest.raises(ValueError, match="boundaries of n2 end at 500; this base model has 1000 timesteps"):
        build_spec(method, 1000)


def test_two_scales_of_one_name_are_refused(tmp_path: Path) -> None:
    method = load(tmp_path, with_scales({"intervals": 2}, {"boundaries": [0, 100, 1000]})).method
    with pytest.raises(ValueError, match="unique scale names"):
        build_spec(method, 1000)
    method = load(tmp_path, with_scales({"intervals": 2}, {"boundaries": [0, 100, 1000], "name": "late"})).method
    assert [scale.name for scale in build_spec(method, 1000).scales] == ["n2", "late"]


def test_roles_are_the_finest_scale_or_as_they_are_given(tmp_path: Path) -> None:
    auto = build_spec(load(tmp_path, with_scales({"intervals": 1}, {"intervals": 4}, {"intervals": 2})).method, 1000)
    assert [scale.gated for scale in auto.scales] == [True, False, True]
    own = with_scales({"intervals": 1, "role": "core"}, {"intervals": 4, "role": "context"})
    assert [scale.gated for scale in build_spec(load(tmp_path, own).method, 1000).scales] == [False, True]
