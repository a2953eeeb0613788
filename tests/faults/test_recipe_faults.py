"""Recipes from people and strangers: one clear error, at once, whatever the file holds."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from timestep_experts.config import Recipe, load_recipe, parse_recipe
from timestep_experts.errors import UserError
from timestep_experts.formats.yaml_text import parse_yaml, yaml_text

COMPARISON = Path(__file__).parents[2] / "recipes" / "comparison.yaml"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
SMALL: dict[str, Any] = {
    "output_dir": "runs/x",
    "data": {"path": "pictures"},
    "method": {"kind": "foster", "experts": {"scales": [{"intervals": 4}]}},
}


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(COMPARISON, overrides)
    return str(caught.value)


# Text


def read(path: Path, content: bytes) -> Recipe:
    path.write_bytes(content)
    return load_recipe(path)


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x,x]\n" + b"".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n".encode() for i in range(9)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea: 1", "is not UTF-8 text"),
        (b"[" * 2000, "is nested too deeply"),
        (b"a: " + b"[" * 500 + b"]" * 500, "is nested too deeply|Extra|unknown key"),
        (b"output_dir: a\noutput_dir: b", 'found duplicate key "output_dir"'),
        (BOMB, "more than 100,000 values"),
        (b"a: &a [*a]", "alias"),
        (b"a: 2020-13-45", "is not YAML: month must be in 1..12"),
        (b"a: !!int x", "is not YAML"),
        (b"a: " + b"9" * 5000, "is not YAML"),
        (b"a: !!python/object:os.system x", "could not determine a constructor"),
        (b"- 1\n- 2", "should hold a mapping"),
        (b"", "should hold a mapping"),
        (b"x" * (2**20 + 1), "is larger than 1,048,576 bytes"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:20],
)
def test_text_that_is_no_recipe_is_one_error_in_no_time(content: bytes, message: str, tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=message):
        read(tmp_path / "recipe.yaml", content)
    assert time.process_time() - start < 20  # seconds of this process; nested ones take 3, a bomb would take minutes


@pytest.mark.parametrize("word", ["no", "off", "on", "yes", "n", "y"])
def test_words_stay_words(word: str) -> None:
    assert parse_yaml(f"a: {word}", "here") == {"a": word}


def test_a_mixed_precision_of_no_is_what_it_says() -> None:
    assert load_recipe(COMPARISON, ["training.mixed_precision=no"]).training.mixed_precision == "no"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_resolved_recipe_is_a_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    text = yaml_text(recipe.model_dump(mode="json"))
    again = parse_recipe(parse_yaml(text, "here"))
    assert again.model_dump(mode="json") == recipe.model_dump(mode="json")
    assert again.all_variants == recipe.all_variants


# Values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.learning_rate=.inf", "method.learning_rate: Input should be a finite number"),
        ("method.learning_rate=.nan", "method.learning_rate: Input should be"),
        ("method.learning_rate=true", "method.learning_rate: Input should be a valid number (got True)"),
        ("method.experts.scales.0.rank=true", "rank: Input should be a valid integer (got True)"),
        ("method.experts.scales.0.rank=4.0", "rank: Input should be a valid integer"),
        ("method.experts.scales.0.rank=100000", "rank: Input should be less than or equal to 65536"),
        ("method.experts.scales.0.lora_alpha=.inf", "lora_alpha: Input should be a finite number"),
        ("method.experts.scales.0.intervals=1001", "intervals: Input should be less than or equal to 1000"),
        ("method.experts.scales.0.intervals=1000000", "intervals: Input should be less than or equal to 1000"),
        ("method.experts.scales.0.name=../x", "name: String should match pattern"),
        ("method.modes=[]", "method.modes: Tuple should have at least 1 item"),
        ("method.modes=[switch, switch]", "method.modes: every mode is named once"),
        ("method.optimizer.options={lr: 5}", "options: lr has no place among the options: the key learning_rate"),
        ("method.optimizer.options={eps: .nan}", "options"),
        ("method.optimizer.lr_warmup_steps=-1", "lr_warmup_steps: Input should be greater than or equal to 0"),
        ("method.experts.target_modules='('", "target_modules: is no regular expression"),
        ("method.experts.target_modules=[]", "target_modules"),
        ("seed=-1", "recipe.seed: Input should be greater than or equal to 0"),
        ("seed=9223372036854775808", "recipe.seed: Input should be less than"),
        ("evaluation.seed=-5", "evaluation.seed: Input should be greater than or equal to 0"),
        ("evaluation.guidance_scale=.inf", "guidance_scale: Input should be a finite number"),
        ("device='cuda 0'", "recipe.device: String should match pattern"),
    ],
)
def test_absurd_values_are_refused_by_their_key(override: str, message: str) -> None:
    assert message in refusal(override)


def test_many_problems_are_counted_and_not_all_printed() -> None:
    start = time.process_time()
    message = refusal(f"evaluation.prompts={['x', *[1] * 5000]}")
    assert time.process_time() - start < 20  # it was quadratic
    lines = message.splitlines()
    assert len(lines) <= 21
    assert lines[-1].startswith("and ")


def test_a_value_that_is_long_is_cut() -> None:
    assert len(refusal(f"training.mixed_precision={'x' * 100_000}")) < 1000


def test_home_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = load_recipe(COMPARISON, ["output_dir=~/runs", "data.path=~/pictures", "data.validation_path=~/others"])
    assert recipe.output_dir == Path("/home/somebody/runs")
    assert (recipe.data.path, recipe.data.validation_path) == ("/home/somebody/pictures", "/home/somebody/others")


# Anything


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PLACES = [
    *("output_dir", "resolution", "seed", "device", "data", "method", "merge", "training", "evaluation", "variants"),
    *("data.path", "data.clips", "method.experts", "method.experts.scales", "method.optimizer", "method.assemble"),
    *("method.modes", "method.optimizer.options", "evaluation.prompts", "training.validation_steps", "variants.a"),
]


@settings(max_examples=150, deadline=None)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_anywhere_is_taken_or_refused(place: str, value: Any) -> None:
    document = yaml.safe_load(yaml.safe_dump(SMALL))
    *parents, key = place.split(".")
    node = document
    for parent in parents:
        node = node.setdefault(parent, {})
    node[key] = value
    with suppress(UserError):
        parse_recipe(document)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_is_yaml_or_refused(text: str) -> None:
    with suppress(UserError):
        parse_yaml(text, "here")
