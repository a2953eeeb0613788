"""The recipes that ship: each is read, and planned on a tiny base of the class that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import PIPELINES

from timestep_experts.config import load_recipe
from timestep_experts.jobs import make_plan

FOLDER = Path(__file__).parents[1] / "recipes"
BASES = {"sd15": "sd", "sdxl": "sdxl", "pixart_alpha": "pixart", "sd3_medium": "sd3", "flux1_dev": "flux"}


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("papers/*.yaml")} == set(BASES)
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"quickstart", "emoji"}


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_how_to_run_it(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(line.startswith("# Command:") for line in head)
    load_recipe(path, [])


@pytest.mark.parametrize("name", BASES)
def test_a_papers_recipe_fits_its_base(name: str, tmp_path: Path) -> None:
    PIPELINES[BASES[name]]().save_pretrained(tmp_path)
    plan = make_plan(load_recipe(FOLDER / "papers" / f"{name}.yaml", [f"pretrained_model_name_or_path={tmp_path}"]))
    assert [stage.stage for stage in plan] == ["foster-n8", "foster-n1", "assemble"]
    assert [stage.steps for stage in plan] == [4000] * 3
    assert [stage.samples_per_expert for stage in plan] == [(256_000, 256_000)] * 3
    has_text_experts = name != "flux1_dev"
    assert plan[0].num_experts == 8 * (2 if name == "sd3_medium" else 1)  # text encoders at a rate of their own
    assert plan[0].trainable == 8 * plan[1].trainable
    assert (load_recipe(FOLDER / "papers" / f"{name}.yaml", []).experts.text_target_modules is None) != has_text_experts


def test_the_shipped_base_can_be_planned(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(FOLDER / "quickstart.yaml", [f"output_dir={tmp_path}"]))
    stored = {stage.arm: stage.trainable for stage in plan if stage.stage == "foster-joint"}
    assert stored["main"] == stored["lora-r32"] == 8 * stored["lora-r4"]  # parameter-matched
    samples = {stage.arm: stage.samples for stage in plan if stage.stage == "foster-joint"}
    assert samples["main"] == samples["lora-r4-x8"] == samples["lora-r18-x8"] == samples["lora-r32-x8"]  # and compute
    assert samples["main"] == 8 * samples["lora-r4"]
