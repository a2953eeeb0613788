"""A run whose routers learn together with the experts, its bundle, and what can be made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from conftest import max_error
from test_cli import call, refused, write_recipe
from test_merged_variants import MERGE, rows_of
from timestep_experts.config import load_recipe
from timestep_experts.formats import load_bundle
from timestep_experts.formats.lora import LORA_FILE
from timestep_experts.inference import attach, detach

METHOD: dict[str, Any] = {
    "experts": {
        "scales": [{"intervals": 1, "rank": 3}],
        "router": {"gates": "rank", "inputs": "t", "knots": 4, "unit_rms": True},
    },
    "router_learning": {"table_learning_rate": 1.0},
    "max_train_steps": 2,
    "train_batch_size": 4,
    "learning_rate": 1e-1,
    "ema_decay": 0.5,
    "assemble": None,
}
PLAIN = {"experts": {"router": {"gates": "expert", "unit_rms": False}}, "router_learning": None, "ema_decay": None}


@pytest.fixture(scope="module")
def run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run; its files are not to be changed."""
    recipe = write_recipe(
        tmp_path_factory.mktemp("gates"),
        base,
        data,
        method=METHOD,
        variants={"lora": {"method": PLAIN}},
        merge={**MERGE, "rank": 3},
    )
    outcome = call("run", recipe)
    assert outcome.code == 0, outcome.err
    return recipe.parent / "out"


def test_gates_that_grew_up_with_their_experts_are_never_left_out(run: Path) -> None:
    rows = rows_of(run)
    assert list(rows) == [("base", "off"), ("main", "route"), ("main", "merged"), ("lora", "switch")]
    bundle = load_bundle(run / "variants" / "main" / "bundle")
    assert bundle.mode == "route"
    tables = [tensor for name, tensor in bundle.tensors.items() if name.endswith("router.E")]
    assert all(tensor.shape == (4, 3) and tensor.abs().max() > 0 for tensor in tables)
    gates = sum(tensor.numel() for tensor in tables)
    routed, lora = (rows[key]["parameters"] for key in (("main", "route"), ("lora", "switch")))
    assert routed["stored"] == routed["trainable"] == lora["stored"] + gates
    assert routed["active"] == lora["active"] + gates // 4


def test_a_single_scale_is_reported_by_eighths_of_the_timesteps(run: Path) -> None:
    curve = rows_of(run)["main", "route"]["curve"]
    assert len(curve["loss"]) == 8 * load_recipe(run / "recipe.yaml", []).evaluation.bins_per_interval


def test_a_bundle_says_what_its_gates_are(run: Path) -> None:
    outcome = call("show", run / "variants" / "main" / "bundle")
    said = " ".join(outcome.out.split())
    assert "one gate per rank and sample, which hears t; the table over t has 4 knots and unit size" in said


def test_gates_are_folded_into_plain_loras(run: Path, base: Path, tmp_path: Path) -> None:
    bundle = run / "variants" / "main" / "bundle"
    assert "name the intervals" in refused("fold-gates", bundle, "--output", tmp_path / "none")
    outcome = call("fold-gates", bundle, "--output", tmp_path / "folded", "--intervals", 500)
    assert outcome.code == 0, outcome.err
    assert "500 experts per scale" in outcome.out
    folded = load_bundle(tmp_path / "folded")
    assert (folded.mode, len(folded.spec.scales[0].partition), folded.spec.gated_scales) == ("switch", 500, ())
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([501]), torch.ones(1, 3, pipeline.unet.config["cross_attention_dim"])
    drawn = []
    with torch.no_grad():
        for path in (bundle, tmp_path / "folded"):
            attach(pipeline, path)
            drawn.append(pipeline.unet(*inputs).sample)
            detach(pipeline)
        plain = pipeline.unet(*inputs).sample
    assert max_error(drawn[0], plain) > 1e-3
    assert max_error(drawn[0], drawn[1]) <= 1e-5  # t = 501 is the middle of its interval


def test_the_merged_lora_has_the_mean_gates(run: Path) -> None:
    folder = run / "variants" / "main" / "merged"
    assert (folder / LORA_FILE).is_file()
    record = json.loads((folder / "merge.json").read_text())
    assert record["energy_kept"] == pytest.approx(1, abs=1e-6)  # all pieces share A, so rank 3 holds their sum
    assert [item["expert"] for item in record["experts"]] == [f"n1 [{125 * i}, {125 * (i + 1)})" for i in range(8)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "independent"}, "router_learning needs the schedule joint; got independent"),
        ({"experts": {"scales": [{"intervals": 1}]}}, "router_learning needs routers"),
        ({"modes": ["switch"]}, "used with their routers; add route"),
        (
            {"experts": {**METHOD["experts"], "router": {"knots": 4, "intervals": 2}}},
            "either knots, intervals or boundaries",
        ),
        ({"experts": {**METHOD["experts"], "router": {"gates": "rank", "boundaries": [0, 500]}}}, "end at 500"),
        ({"experts": {**METHOD["experts"], "router": {"gates": "rank", "knots": [0, 500]}}}, "end at T"),
    ],
    ids=str,
)
def test_recipes_that_cannot_be_are_refused(
    changes: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, base, data, method={**METHOD, **changes}, variants={})
    assert message in refused("run", recipe, "--dry-run")


def test_routers_may_learn_on_over_frozen_experts(base: Path, data: Path, tmp_path: Path) -> None:
    assemble = {"max_train_steps": 2, "train_batch_size": 2, "table_learning_rate": 0.5}
    method = {**METHOD, "assemble": assemble, "modes": ["switch", "route"]}
    recipe = write_recipe(tmp_path, base, data, method=method, variants={}, merge={**MERGE, "rank": 3})
    folder = tmp_path / "out" / "variants" / "main"
    assert call("foster", recipe).code == 0
    before = load_bundle(folder / "bundle")
    assert before.mode == "route"
    assert call("run", recipe).code == 0
    after = load_bundle(folder / "bundle")
    for name, tensor in after.tensors.items():
        assert torch.equal(tensor, before.tensors[name]) == (".experts." in name), name
    rows = rows_of(tmp_path / "out")
    assert list(rows) == [("base", "off"), ("main", "route"), ("main", "merged")]
    routed, merged = (rows["main", mode] for mode in ("route", "merged"))
    assert merged["parameters"]["trainable"] == routed["parameters"]["trainable"]  # the gates are in the LoRA
    assert merged["num_images_seen"] == routed["num_images_seen"] == 2 * 4 + 2 * 2
