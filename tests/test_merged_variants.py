"""A run whose variants are merged: copies become a denoiser, experts a LoRA, and the table has a row for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from conftest import max_error
from test_cli import call, refused, write_recipe
from timestep_experts.config import load_recipe
from timestep_experts.formats import load_bundle
from timestep_experts.formats.lora import LORA_FILE
from timestep_experts.inference import attach, detach

DECOUPLE: dict[str, Any] = {
    "kind": "decouple",
    "intervals": 2,
    "max_train_steps": 2,
    "train_batch_size": 3,
    "learning_rate": 1e-2,
    "consistency": 0,
}
MERGE = {"refinements": 2, "num_pictures": 2}


def merging(home: Path, base: Path, data: Path, **changes: Any) -> Path:
    """A recipe with experts that become a LoRA, a variant of copies that become one, and one that stays."""
    variants = {
        "copies": {"method": DECOUPLE, "merge": MERGE},
        "lora": {"method": {"experts": {"scales": [{"intervals": 1, "rank": 2}]}}},
    }
    method = {"max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-1, "assemble": None}
    own = {"method": method, "variants": variants, "merge": {**MERGE, "rank": 3}}
    return write_recipe(home, base, data, **{**own, **changes})


@pytest.fixture(scope="module")
def run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run; its files are not to be changed."""
    recipe = merging(tmp_path_factory.mktemp("merged"), base, data)
    outcome = call("run", recipe)
    assert outcome.code == 0, outcome.err
    return recipe.parent / "out"


def rows_of(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["variant"], r["mode"]): r for r in json.loads((run / "results.json").read_text())}


def test_every_merged_variant_has_a_row(run: Path, base: Path) -> None:
    rows = rows_of(run)
    modes = [("base", "off"), ("main", "switch"), ("main", "merged"), ("copies", "switch"), ("copies", "merged")]
    assert list(rows) == [*modes, ("lora", "switch")]
    assert len({row["curve"]["loss"][0] for row in rows.values()}) == len(rows)
    assert "copies, merged" in (run / "report.html").read_text(encoding="utf-8")


def test_costs_are_those_of_what_is_used(run: Path, base: Path) -> None:
    rows = rows_of(run)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    size = sum(parameter.numel() for parameter in unet.parameters())
    copies, merged = (rows["copies", mode]["parameters"] for mode in ("switch", "merged"))
    assert copies == {"stored": 2 * size, "active": 0, "trainable": 2 * size}
    assert merged == {"stored": size, "active": 0, "trainable": 2 * size}
    assert {rows["copies", mode]["num_images_seen"] for mode in ("switch", "merged")} == {2 * 2 * 3}
    experts, lora = (rows["main", mode]["parameters"] for mode in ("switch", "merged"))
    assert lora["trainable"] == experts["trainable"]  # 4 experts of rank 2 and one of rank 2
    assert lora["stored"] == lora["active"] == experts["stored"] * 3 // 10
    assert rows["main", "merged"]["num_images_seen"] == rows["main", "switch"]["num_images_seen"] == 2 * 4 * 2


def test_merged_copies_are_the_base_plus_weighed_changes_in_diffusers_own_format(run: Path, base: Path) -> None:
    folder = run / "variants" / "copies"
    weights = json.loads((folder / "merged" / "search.json").read_text())["weights"]
    theta = UNet2DConditionModel.from_pretrained(base / "unet").state_dict()
    experts = [UNet2DConditionModel.from_pretrained(folder / "decoupled" / f"range-{i}" / "expert") for i in (0, 1)]
    merged = UNet2DConditionModel.from_pretrained(folder / "merged").state_dict()
    assert any(weights)
    for name, tensor in theta.items():
        changes = (w * (e.state_dict()[name].double() - tensor) for w, e in zip(weights, experts, strict=True))
        assert max_error(merged[name].double(), tensor + sum(changes)) < 1e-6  # rounding to fp32


def test_merged_experts_are_a_lora_of_diffusers_and_what_the_row_measured(run: Path, base: Path) -> None:
    folder = run / "variants" / "main" / "merged"
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 3, pipeline.unet.config["cross_attention_dim"])
    with torch.no_grad():
        plain = pipeline.unet(*inputs).sample
        attach(pipeline, folder / "bundle", "switch")
        ours = pipeline.unet(*inputs).sample
        detach(pipeline)
        pipeline.load_lora_weights(folder / LORA_FILE)
        theirs = pipeline.unet(*inputs).sample
    assert max_error(ours, theirs) < 1e-5
    assert max_error(ours, plain) > 1e-4
    assert [scale.rank for scale in load_bundle(folder / "bundle").spec.scales] == [3]


@pytest.mark.parametrize("name", ["main", "copies"])
def test_weights_are_chosen_on_training_pictures_and_beat_the_rows_they_were_chosen_among(run: Path, name: str) -> None:
    search = json.loads((run / "variants" / name / "merged" / "search.json").read_text())
    counts = search["counts"]
    assert (counts["selection_pictures"], counts["confirmation_pictures"]) == (9, 3)  # training, validation
    # every variant's weights are chosen by the intervals of the table, whatever its own ranges are
    assert search["ranges"] == [[250.0 * i, 250.0 * (i + 1)] for i in range(4)]
    losses = {name: row["selection"]["mean"] for name, row in search["loss"].items()}
    assert losses["found"] == min(losses.values())


def test_the_same_command_repeats_nothing_and_other_settings_merge_anew(base: Path, data: Path, tmp_path: Path) -> None:
    variants = {"copies": {"method": DECOUPLE, "merge": MERGE}}
    recipe = merging(tmp_path, base, data, variants=variants, merge=None)
    merged = tmp_path / "out" / "variants" / "copies" / "merged"
    assert call("run", recipe).code == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in merged.iterdir()}
    expert = (
        (tmp_path / "out" / "variants" / "copies" / "decoupled" / "range-0" / "result.safetensors").stat().st_mtime_ns
    )
    assert call("run", recipe).code == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in merged.iterdir()} == before
    assert call("run", recipe, "evaluation.seed=7").code == 0  # of the search's noise too
    assert (merged / "search.json").read_bytes() != before[merged / "search.json"][1]
    assert call("run", recipe, "variants.copies.merge.method=grid", "variants.copies.merge.grid=[0,0.5]").code == 0
    search = json.loads((merged / "search.json").read_text())
    assert {point["why"] for point in search["evaluated"]} == {"table", "grid"}
    again = tmp_path / "out" / "variants" / "copies" / "decoupled" / "range-0" / "result.safetensors"
    assert again.stat().st_mtime_ns == expert


def test_copies_alone_are_a_run_too_and_its_ranges_can_be_trained_before(
    base: Path, data: Path, tmp_path: Path
) -> None:
    recipe = merging(tmp_path, base, data, method=DECOUPLE, merge=MERGE, variants={})
    assert call("decouple", recipe, "--range", 1).code == 0
    result = tmp_path / "out" / "variants" / "main" / "decoupled" / "range-1" / "result.safetensors"
    before = result.stat().st_mtime_ns
    outcome = call("run", recipe)
    assert outcome.code == 0, outcome.err
    assert list(rows_of(tmp_path / "out")) == [("base", "off"), ("main", "switch"), ("main", "merged")]
    assert result.stat().st_mtime_ns == before
    assert len(rows_of(tmp_path / "out")["main", "merged"]["interval_losses"]) == 2


def test_ranges_of_a_variant_are_separate_jobs(run: Path, base: Path, data: Path, tmp_path: Path) -> None:
    recipe = merging(tmp_path, base, data)
    assert call("decouple", recipe, "--variant", "copies", "--range", 1).code == 0
    own = tmp_path / "out" / "variants" / "copies" / "decoupled"
    assert [path.name for path in own.iterdir()] == ["range-1"]
    name = Path("range-1") / "result.safetensors"
    assert (own / name).read_bytes() == (run / "variants" / "copies" / "decoupled" / name).read_bytes()


def test_the_plan_shows_copies_beside_experts(base: Path, data: Path, tmp_path: Path) -> None:
    outcome = call("run", merging(tmp_path, base, data), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert [line.split()[1] for line in outcome.out.splitlines() if "decouple-" in line] == ["copies", "copies"]
    assert not (tmp_path / "out").exists()


def test_a_variant_has_what_it_says(base: Path, data: Path, tmp_path: Path) -> None:
    loaded = load_recipe(merging(tmp_path, base, data))
    kinds = {variant.name: (variant.method.kind, variant.merge is not None) for variant in loaded.all_variants}
    # lora does not merge because main does
    assert kinds == {"main": ("foster", True), "copies": ("decouple", True), "lora": ("foster", False)}


def test_what_cannot_be_merged_is_one_clear_error(base: Path, data: Path, tmp_path: Path) -> None:
    def said(name: str, command: str = "run", *arguments: str, **changes: Any) -> str:
        message = refused(command, merging(tmp_path / name, base, data, **changes), *arguments)
        assert not (tmp_path / name / "out" / "variants").exists()
        return message

    def copies(**changes: Any) -> dict[str, Any]:
        return {"copies": {"method": DECOUPLE | changes.pop("method", {}), "merge": MERGE | changes}}

    assert said("a", merge=MERGE, variants={}) == "recipe: merge.rank: a LoRA needs a rank"
    assert (
        said("b", variants=copies(rank=4))
        == "recipe.variants.copies: merge.rank: copies are merged into a copy, which has no rank"
    )
    wide = "merge.rank: the experts have 10 together, so a LoRA of 11 is too wide"
    assert wide in said("h", merge=MERGE | {"rank": 11}, variants={})
    assert "recipe.variants.copies.merge.grid" in said("i", variants=copies(grid=[]))
    assert "not all projections of kind paper fold" in said("c", variants=copies(method={"projection": "paper"}))
    assert "unknown key; did you mean 'refinements'?" in said("d", variants=copies(refinement=4))
    experts = {"scales": [{"intervals": 2}]}
    method = {"kind": "distill", "experts": experts, "timesteps": [999, 499]}
    distilled = {"method": method, "merge": MERGE | {"rank": 2}}
    assert "which a distilled generator has none of" in said("g", variants={"few": distilled})
    assert "of kind foster; of this recipe it would take copies (decouple)" in refused(
        "foster", merging(tmp_path / "e", base, data), "--variant", "copies"
    )
    assert "of kind decouple; of this recipe it would take lora (foster)" in said("f", "decouple", "--variant", "lora")


def test_what_is_not_there_yet_is_said_before_anything_is_drawn(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = merging(tmp_path, base, data)
    assert call("foster", recipe).code == 0
    assert "variant 'main' is not merged yet: the command run does that" in refused("evaluate", recipe)
    assert not (tmp_path / "out" / "evaluation").exists()
