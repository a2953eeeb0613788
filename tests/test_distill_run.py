"""Distillation from a recipe: the plan, the whole run, single experts, the bundle that draws in its own steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import PIPELINES

from conftest import tiny_pipeline
from test_cli import TARGETS, call
from test_cli import write_recipe as write_fostering_recipe
from timestep_experts.config import load_recipe
from timestep_experts.formats import load_bundle
from timestep_experts.inference import sample
from timestep_experts.jobs.methods import methods_of
from timestep_experts.jobs.sample import SampleOptions, sample_bundle

# of numpy, met in the schedulers of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PAPER = Path(__file__).parents[1] / "recipes" / "papers" / "dmd2_sd15.yaml"
EXPERTS = ("n4.3", "n4.2", "n4.1", "n4.0", "n1.0")


def write_recipe(home: Path, base: Path, data: Path, /, **changes: Any) -> Path:
    """The recipe of a run of seconds, in ``home``; its output is ``home / "out"``."""
    document: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "output_dir": str(home / "out"),
        "resolution": 16,
        "device": "cpu",
        "data": {"path": str(data), "validation_share": 0.4, "caption_dropout": 0},
        "method": {
            "kind": "distill",
            "experts": {
                "target_modules": TARGETS,
                "scales": [{"intervals": 4, "rank": 2}, {"intervals": 1, "rank": 2}],
            },
            "max_train_steps": 2,
            "train_batch_size": 1,
            "learning_rate": 1e-3,
            "generator_interval": 1,
            "gan": {"max_train_steps": 1, "train_batch_size": 1, "learning_rate": 1e-3},
            "assemble": {"max_train_steps": 1, "train_batch_size": 4, "learning_rate": 1e-3},
        },
        "evaluation": {"num_pictures": 2, "bins_per_interval": 1, "num_prompts": 2, "num_inference_steps": 2},
        "training": {"preview_pictures": 1},
    }
    document["method"] |= changes.pop("method", {})
    home.mkdir(exist_ok=True)
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(document | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has been run once; not to be changed."""
    home = tmp_path_factory.mktemp("run")
    outcome = call("run", write_recipe(home, base, data))
    assert outcome.code == 0, outcome.err
    return home


def test_a_run_distils_assembles_and_measures(finished: Path) -> None:
    home = finished / "out" / "variants" / "main"
    stages = {path.parent.name for path in home.glob("*/result.safetensors")}
    assert stages == {f"distill-{expert}{ending}" for expert in EXPERTS for ending in ("", "-gan")} | {"assemble"}
    rows = [(row["variant"], row["mode"]) for row in json.loads((finished / "out" / "results.json").read_text())]
    assert rows == [("base", "off"), ("main", "switch"), ("main", "route")]
    assert "whatever the base uses" in (finished / "out" / "report.html").read_text()
    assert list((home / "distill-n4.2-gan" / "previews").glob("*.png"))
    log = [json.loads(line) for line in (home / "distill-n4.2-gan" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "loss/discriminator", "loss/generator_adversarial", "matching_gradient"} <= log[-1].keys()


def test_samples_of_a_mode_are_those_of_what_it_uses(finished: Path) -> None:
    rows = {row["mode"]: row for row in json.loads((finished / "out" / "results.json").read_text())}
    assert rows["switch"]["num_images_seen"] == 4 * (2 * 1 + 1 * 1)
    assert rows["route"]["num_images_seen"] == 4 * (2 + 1) + (2 * 4 + 1 * 4) + 4


def test_the_bundle_holds_the_mixture_alone_and_says_how_it_draws(finished: Path) -> None:
    home = finished / "out" / "variants" / "main"
    bundle = load_bundle(home / "bundle")
    assert bundle.mode == "route"
    assert all(".experts." in name or ".router." in name for name in bundle.tensors)
    sampling = bundle.sampling
    assert (sampling.scheduler, sampling.timesteps) == ("LCMScheduler", (999, 749, 499, 249))
    assert (sampling.guidance_scale, sampling.resolution) == (1.0, (16, 16))
    for index, expert in enumerate(("n4.0", "n4.1", "n4.2", "n4.3")):
        for name, tensor in load_file(home / f"distill-{expert}-gan" / "result.safetensors").items():
            if name.startswith("generator."):
                assert torch.equal(bundle.tensors[name.removeprefix("generator.")][index], tensor)


def test_the_same_command_again_trains_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "out").rglob("*/result.safetensors")}
    bundle = {path: path.read_bytes() for path in (finished / "out").glob("variants/*/bundle/*")}
    for command in ("distill", "assemble"):
        outcome = call(command, finished / "recipe.yaml")
        assert outcome.code == 0, outcome.err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert {path: path.read_bytes() for path in bundle} == bundle


def test_one_expert_after_the_other_is_a_run(base: Path, data: Path, finished: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one", base, data)
    early = call("distill", recipe, "--expert", "n4.2")
    assert early.code == 2
    assert (
        "expert n4.2 learns from what the experts before it generate, and distill-n4.3, distill-n4.3-gan is"
        in early.err
    )
    early = call("assemble", recipe)
    assert (early.code, "variant 'main' is not distilled yet" in early.err) == (2, True)
    for expert in EXPERTS:
        outcome = call("distill", recipe, "--expert", expert)
        assert outcome.code == 0, outcome.err
        assert ("still to be distilled" in outcome.out) == (expert != "n1.0")
    for name in ("distill-n4.0-gan", "distill-n1.0-gan"):
        one, whole = (
            home / "out" / "variants" / "main" / name / "result.safetensors" for home in (tmp_path / "one", finished)
        )
        assert one.read_bytes() == whole.read_bytes()
    assert load_bundle(tmp_path / "one" / "out" / "variants" / "main" / "bundle").mode == "switch"


def test_experts_of_real_inputs_need_no_others(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, data)
    outcome = call("distill", recipe, "method.inputs=real", "--expert", "n4.1")
    assert outcome.code == 0, outcome.err
    made = {path.parent.name for path in (tmp_path / "out").rglob("result.safetensors")}
    assert made == {"distill-n4.1", "distill-n4.1-gan"}


def test_a_generator_is_drawn_with_in_its_own_steps(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, seen = finished / "out" / "variants" / "main" / "bundle", []

    def look(pipeline: Any, prompts: Any, settings: Any, **options: Any) -> Any:
        seen.append((settings.scheduler, settings.num_inference_steps, settings.guidance_scale, settings.timesteps))
        return sample(pipeline, prompts, settings, **options)

    monkeypatch.setattr("timestep_experts.jobs.sample.sample", look)
    own = ("LCMScheduler", 4, 1.0, (999, 749, 499, 249))
    for options, expected, calls in (
        ({}, own, 4),
        ({"num_inference_steps": 4, "guidance_scale": 2.0}, ("LCMScheduler", 4, 2.0, own[3]), 4),
        ({"num_inference_steps": 2}, ("LCMScheduler", 2, 1.0, None), 2),
        ({"scheduler": "DDIMScheduler"}, ("DDIMScheduler", 4, 1.0, None), 4),
        ({"mode": "off"}, (None, 20, 3.0, None), 20),
    ):
        _, cost = sample_bundle(bundle, ["a red star"], tmp_path / str(len(seen)), SampleOptions(**options))
        assert seen[-1] == expected
        assert cost.num_denoiser_calls == calls
    outcome = call("sample", bundle, "--prompt", "a red star", "--output", tmp_path / "cli")
    assert outcome.code == 0, outcome.err
    assert "4 denoiser calls" in outcome.out
    assert seen[-1] == own


def test_another_distillation_is_refused_by_name(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    options = [f"output_dir={tmp_path / 'out'}", "method.guidance_scale=3"]
    outcome = call("distill", finished / "recipe.yaml", *options)
    assert outcome.code == 2
    assert "holds a run with other settings" in outcome.err
    assert "guidance_scale: stored 1.75, now 3.0" in outcome.err


# Plans and refusals


def test_the_papers_recipe_is_planned(tmp_path: Path) -> None:
    PIPELINES["sd"]().save_pretrained(tmp_path)
    recipe = load_recipe(PAPER, [f"pretrained_model_name_or_path={tmp_path}"])
    plan = {(stage.variant, stage.stage): stage for method in methods_of(recipe) for stage in method.plan()}
    names = [f"distill-{expert}{ending}" for expert in EXPERTS for ending in ("", "-gan")]
    lora = [("lora", "distill-n1.0"), ("lora", "distill-n1.0-gan")]
    assert list(plan) == [*(("main", name) for name in [*names, "assemble"]), *lora]
    steps = [plan["main", name].steps for name in names]
    assert steps == [20000, 5000, 20000, 5000, 5000, 20000, 5000, 40000, 40000, 5000]
    assert [plan[key].steps for key in lora] == [40000, 5000]
    assert [plan[key].samples for key in lora] == [40000 * 4 * 32, 5000 * 4 * 16]
    assert (plan["main", "assemble"].steps, plan["main", "assemble"].samples) == (20000, 20000 * 16)
    outcome = call("run", PAPER, f"pretrained_model_name_or_path={tmp_path}", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "not estimated" in outcome.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"experts": {"scales": []}}}, "recipe.method.experts.scales"),
        ({"method": {"timesteps": [999, 749, 499, 251]}}, "expert n4.0 of [0, 250) would never be used"),
        ({"method": {"timesteps": [249, 999]}}, "must descend from at most 999 to at least 1"),
        ({"method": {"timestep": [999]}}, "recipe.method.timestep: unknown key; did you mean 'timesteps'?"),
        ({"method": {"gan": {"weight": 1}}}, "recipe.method.gan.weight: unknown key"),
        ({"method": {"kind": "foster"}}, "recipe.method.generator_interval: unknown key"),
        ({"training": {"base_quantization": "bitsandbytes-8bit"}}, "training.base_quantization must be null"),
        (
            {"method": {"gan": None, "experts": {"scales": [{"intervals": 4, "gan_train_steps": 3}]}}},
            "gan_train_steps belongs to gan, which is null here",
        ),
        (
            {"method": {"experts": {"scales": [{"intervals": 4, "gan_train_steps": [3, 3]}]}}},
            "4 experts need as many values of gan_",
        ),
        (
            {"method": {"experts": {"scales": [{"intervals": 4}], "text_target_modules": ["q_proj"]}}},
            "experts of the denoiser alone, and text_encoder carry some too",
        ),
    ],
)
def test_recipes_that_distil_nothing_sensible(
    changes: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    outcome = call("run", write_recipe(tmp_path, base, data, **changes))
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert not (tmp_path / "out").exists()


def test_a_base_that_predicts_velocity_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    tiny_pipeline("v_prediction").save_pretrained(tmp_path / "v")
    outcome = call("distill", write_recipe(tmp_path / "run", tmp_path / "v", data))
    assert outcome.code == 2
    assert "only bases that predict noise ('epsilon') can be distilled" in " ".join(outcome.err.split())
    assert not (tmp_path / "run" / "out").exists()


def test_commands_of_the_other_kind_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    outcome = call("foster", write_recipe(tmp_path / "a", base, data))
    assert "of kind foster; of this recipe it would take main (distill)" in " ".join(outcome.err.split())
    fostered = write_fostering_recipe(tmp_path / "b", base, data)
    outcome = call("distill", fostered, "--variant", "main")
    assert outcome.code == 2
    assert "of kind distill; of this recipe it would take main (foster)" in " ".join(outcome.err.split())
    outcome = call("distill", write_recipe(tmp_path / "c", base, data), "--expert", "n4.4")
    assert "there is no expert n4.4; this variant has n4.3, n4.2, n4.1, n4.0, n1.0" in outcome.err
