"""The recipes that ship: each is read, and planned on a tiny base of the class that it names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import PIPELINES
from tiny_video import tiny_video_crafter, tiny_wan

from timestep_experts.config import load_recipe
from timestep_experts.jobs.methods import methods_of
from timestep_experts.models.video_crafter import fold_fps

FOLDER = Path(__file__).parents[1] / "recipes"


def tiny_folded_video_crafter() -> Any:
    """As the converter makes it: a plain UNet3DConditionModel."""
    pipeline = tiny_video_crafter()
    pipeline.unet = fold_fps(pipeline.unet, 28.0)
    return pipeline


BASES: dict[str, Callable[[], Any]] = {
    "sd15": PIPELINES["sd"],
    "sdxl": PIPELINES["sdxl"],
    "pixart_alpha": PIPELINES["pixart"],
    "sd3_medium": PIPELINES["sd3"],
    "flux1_dev": PIPELINES["flux"],
    "videocrafter2": tiny_folded_video_crafter,
    "wan21": tiny_wan,
    "wan22": partial(tiny_wan, 0.875),
}
DECOUPLED: dict[str, Callable[[], Any]] = {"deme_cifar10": PIPELINES["ddpm"], "deme_sd14": PIPELINES["sd"]}
DISTILLED = ("dmd2_sd15",)  # planned in test_distill_run.py
WITHOUT_TEXT = ("flux1_dev", "wan21", "wan22")
SCALES = {"videocrafter2": (8, 4), "wan22": (6, 2)}
SAMPLES = {"videocrafter2": 5000 * 32, "wan21": 4000 * 8, "wan22": 4000 * 8}


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("papers/*.yaml")} == {*BASES, *DISTILLED, *DECOUPLED}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {
        "quickstart",
        "comparison",
        "gates",
        "emoji",
        "lpc",
        "distill",
        "cifar10",
    }


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_how_to_run_it(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(line.startswith("# Command:") for line in head)
    load_recipe(path, [])


@pytest.mark.parametrize("name", BASES)
def test_a_papers_recipe_fits_its_base(name: str, tmp_path: Path) -> None:
    BASES[name]().save_pretrained(tmp_path)
    recipe = load_recipe(FOLDER / "papers" / f"{name}.yaml", [f"pretrained_model_name_or_path={tmp_path}"])
    fine, coarse = SCALES.get(name, (8, 1))
    samples = SAMPLES.get(name, 4000 * 64)
    plan = [stage for method in methods_of(recipe) for stage in method.plan()]
    assert [stage.stage for stage in plan] == [f"foster-n{fine}", f"foster-n{coarse}", "assemble"]
    assert [stage.samples_per_expert for stage in plan] == [(samples, samples)] * 3
    text_groups = 2 if name == "sd3_medium" else 1  # text encoders at a rate of their own
    assert [stage.num_experts for stage in plan[:2]] == [fine * text_groups, coarse * text_groups]
    if name != "wan22":  # where experts sit in one of two transformers
        assert plan[0].trainable * coarse == plan[1].trainable * fine
    assert (recipe.method.experts.text_target_modules is None) == (name in WITHOUT_TEXT)


@pytest.mark.parametrize("name", DECOUPLED)
def test_a_papers_recipe_of_full_copies_fits_its_base(name: str, tmp_path: Path) -> None:
    DECOUPLED[name]().save_pretrained(tmp_path)
    recipe = load_recipe(FOLDER / "papers" / f"{name}.yaml", [f"pretrained_model_name_or_path={tmp_path}"])
    plan = [stage for method in methods_of(recipe) for stage in method.plan()]
    assert [stage.stage for stage in plan] == [f"decouple-{index}" for index in range(4)]
    assert {(stage.steps, stage.samples) for stage in plan} == {(20_000, 20_000 * 64)}


def test_the_shipped_base_can_be_planned(tmp_path: Path) -> None:
    recipe = load_recipe(FOLDER / "comparison.yaml", [f"output_dir={tmp_path}"])
    plan = [stage for method in methods_of(recipe) for stage in method.plan()]
    stored = {stage.variant: stage.trainable for stage in plan if stage.stage == "foster-joint"}
    assert stored["main"] == stored["lora-r32"] == 8 * stored["lora-r4"]  # parameter-matched
    samples = {stage.variant: stage.samples for stage in plan if stage.stage == "foster-joint"}
    assert samples["main"] == samples["lora-r4-x8"] == samples["lora-r18-x8"] == samples["lora-r32-x8"]  # and compute
    assert samples["main"] == 8 * samples["lora-r4"]
