"""The command decouple: experts as folders, their way into merge and sample, and how it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import PIPELINES
from torch import Tensor

from conftest import max_error, tiny_unet, unet_inputs
from test_cli import call, refused, row, write_recipe
from timestep_experts.formats import SamplingDefaults
from timestep_experts.formats.checkpoints import Checkpoint, file_sha256
from timestep_experts.formats.experts import (
    BASE_KEY,
    EXPERT_KEY,
    find_experts,
    read_projections,
    read_record,
    write_projections,
)
from timestep_experts.inference import attach_ensemble, attach_projections
from timestep_experts.intervals import Partition
from timestep_experts.merging import MergeSettings, fold, unfold
from timestep_experts.training.log import read_log
from timestep_experts.weights.merge import merge

# of numpy, met in the schedulers of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

WEIGHTS = "diffusion_pytorch_model.safetensors"
SECTION: dict[str, Any] = {
    "kind": "decouple",
    "intervals": 2,
    "max_train_steps": [3, 2],
    "train_batch_size": 4,
    "learning_rate": 1e-2,
    "ema_decay": 0.5,
}


def recipe_of(home: Path, base: Path, data: Path, **changes: Any) -> Path:
    return write_recipe(home, base, data, method=SECTION | changes, training={"logging_steps": 1}, variants={})


def decoupled(home: Path, base: Path, data: Path, *arguments: object, **changes: Any) -> Path:
    outcome = call("decouple", recipe_of(home, base, data, **changes), *arguments)
    assert outcome.code == 0, outcome.err
    return home / "out" / "variants" / "main" / "decoupled"


@pytest.fixture(scope="module")
def run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranges with projections of the paper; not to be changed."""
    return decoupled(tmp_path_factory.mktemp("run"), base, data, projection="paper", antithetic=True)


def say(unet: UNet2DConditionModel, t: int = 100) -> Tensor:
    sample, text = unet_inputs(2)
    with torch.no_grad():
        return unet(sample, torch.tensor(t), text).sample


def test_an_expert_is_an_ordinary_folder(run: Path, base: Path) -> None:
    folders, partition, record = find_experts(run)
    assert [folder.parent.name for folder in folders] == ["range-0", "range-1"]
    assert partition == Partition.uniform(2)
    assert (record.index, record.denoiser_class, record.base_model) == (0, "UNet2DConditionModel", str(base))
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"config.json", WEIGHTS, "projection.safetensors"}
        loaded = UNet2DConditionModel.from_pretrained(folder)
        assert tuple(loaded.config.block_out_channels) == tiny_unet().config.block_out_channels
        with safe_open(folder / WEIGHTS, "pt") as opened:
            assert opened.metadata()[BASE_KEY] == file_sha256(base / "unet" / WEIGHTS)
    assert not list(run.rglob("*.pkl")) + list(run.rglob("*.pt")) + list(run.rglob("*.bin"))


def test_the_expert_is_the_average(run: Path) -> None:
    state = load_file(run / "range-0" / "result.safetensors")
    expert = load_file(run / "range-0" / "expert" / WEIGHTS)
    projections = read_projections(run / "range-0" / "expert")
    assert projections is not None
    name = "up_blocks.0.upsamplers.0.conv.weight"
    assert torch.equal(expert["conv_in.weight"], state["ema.conv_in.weight"])
    assert not torch.equal(expert["conv_in.weight"], state["trained.conv_in.weight"])
    assert torch.equal(expert[name], fold(state[f"ema.{name}"], state["ema.up_blocks.0.projection"]))
    assert torch.equal(projections.deltas["mid_block.projection"], state["ema.mid_block.projection"])


def test_each_range_has_its_own_budget(run: Path) -> None:
    counts = [[record["step"] for record in read_log(run / f"range-{index}")][-1] for index in range(2)]
    assert counts == [3, 2]


def test_ranges_may_be_trained_apart_with_the_same_bytes(run: Path, base: Path, data: Path, tmp_path: Path) -> None:
    apart = decoupled(tmp_path / "apart", base, data, "--range", 1, projection="paper", antithetic=True)
    assert [path.name for path in apart.iterdir()] == ["range-1"]
    for name in (WEIGHTS, "projection.safetensors"):
        assert (apart / "range-1" / "expert" / name).read_bytes() == (run / "range-1" / "expert" / name).read_bytes()
    assert "no experts of range 0" in refused("sample", "--ensemble", apart, "--prompt", "a")


def test_the_same_command_again_trains_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    folder = decoupled(tmp_path / "home", base, data)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("log.jsonl")}
    weights = (folder / "range-0" / "expert" / WEIGHTS).read_bytes()
    assert call("decouple", tmp_path / "home" / "recipe.yaml").code == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("log.jsonl")}
    assert (folder / "range-0" / "expert" / WEIGHTS).read_bytes() == weights
    assert call("decouple", tmp_path / "home" / "out" / "recipe.yaml").code == 0  # the resolved recipe is a recipe
    # another range's budget is not this one's concern; this one's is
    recipe = tmp_path / "home" / "recipe.yaml"
    assert call("decouple", recipe, "method.max_train_steps=[3,5]", "--range", 0).code == 0
    assert "max_train_steps: stored 3, now 4" in refused("decouple", recipe, "method.max_train_steps=[4,2]")


def test_a_dry_run_counts_a_copy(base: Path, data: Path, tmp_path: Path) -> None:
    outcome = call("decouple", recipe_of(tmp_path, base, data, projection="foldable"), "--dry-run")
    parameters = sum(p.numel() for p in tiny_unet().parameters()) + 8**2 + 3 * 16**2 + 8**2
    assert row(outcome, "main", "decouple-0")[2:7] == ["1", f"{parameters:,}", "3", "12", "12"]
    assert row(outcome, "main", "decouple-1")[4] == "2"
    assert not (tmp_path / "out").exists()


# Merging


def factored(run: Path, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = load_file(run / f"range-{index}" / "result.safetensors")
    averages = {name.removeprefix("ema."): value for name, value in state.items() if name.startswith("ema.")}
    deltas = {name: value for name, value in averages.items() if name.endswith(".projection")}
    return {name: value for name, value in averages.items() if name not in deltas}, deltas


def test_factors_are_merged_apart_then_folded(run: Path, base: Path, tmp_path: Path) -> None:
    weights = (0.75, 0.5)
    experts = [run / f"range-{index}" / "expert" for index in range(2)]
    merged = merge(base, tmp_path / "out", experts, MergeSettings(weights))
    kept = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1")
    assert set(merged.kept_projections) == {f"{name}.projection" for name in kept}
    own = load_file(base / "unet" / WEIGHTS)
    (one, one_deltas), (two, two_deltas) = (factored(run, index) for index in range(2))
    deltas = {name: weights[0] * one_deltas[name] + weights[1] * two_deltas[name] for name in one_deltas}
    expected = {n: own[n] + weights[0] * (one[n] - own[n]) + weights[1] * (two[n] - own[n]) for n in own}
    plain = {name: value.clone() for name, value in expected.items()}
    for name in ("up_blocks.0.upsamplers.0.conv.weight", "up_blocks.0.upsamplers.0.conv.bias"):
        expected[name] = fold(expected[name], deltas["up_blocks.0.projection"])
        assert max_error(expected[name], plain[name]) > 1e-5
    written = load_file(tmp_path / "out" / "unet" / WEIGHTS)
    assert written.keys() == expected.keys()
    assert max(max_error(written[name], expected[name]) for name in expected) < 1e-6  # of fp32 numbers below 2
    stored = read_projections(tmp_path / "out" / "unet")
    assert stored is not None
    assert all(max_error(stored.deltas[name], deltas[name]) < 1e-7 for name in stored.deltas)


def test_one_expert_merges_into_itself_to_the_bit(run: Path, base: Path, tmp_path: Path) -> None:
    experts = [run / f"range-{index}" / "expert" for index in range(2)]
    merge(base, tmp_path / "one", experts, MergeSettings((0.0, 1.0)))
    written, expert = (load_file(path / WEIGHTS) for path in (tmp_path / "one" / "unet", experts[1]))
    assert all(torch.equal(written[name], expert[name]) for name in expert)
    merge(base, tmp_path / "none", experts, MergeSettings((0.0, 0.0)))
    written, own = (load_file(path / "unet" / WEIGHTS) for path in (tmp_path / "none", base))
    assert all(torch.equal(written[name], own[name]) for name in own)


def test_a_merged_model_with_kept_projections_is_used_with_them(run: Path, base: Path, tmp_path: Path) -> None:
    experts = [run / f"range-{index}" / "expert" for index in range(2)]
    merge(base, tmp_path / "out", experts, MergeSettings((0.0, 1.0)))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    bare = say(pipeline.unet)
    projections = attach_projections(pipeline, tmp_path / "out" / "unet")
    assert projections is not None
    with_them = say(pipeline.unet)
    assert max_error(with_them, bare) > 1e-5
    projections.detach_hooks()
    assert torch.equal(say(pipeline.unet), bare)
    other = StableDiffusionPipeline.from_pretrained(base)
    attach_ensemble(other, [experts[1]], Partition.uniform(1))
    assert torch.equal(say(other.unet), with_them)


def test_foldable_projections_leave_an_ordinary_model(base: Path, data: Path, tmp_path: Path) -> None:
    folder = decoupled(tmp_path / "home", base, data, projection="foldable", max_train_steps=2)
    experts = [folder / f"range-{index}" / "expert" for index in range(2)]
    merged = merge(base / "unet" / WEIGHTS, tmp_path / "out.safetensors", experts, MergeSettings((0.5, 0.5)))
    assert merged.kept_projections == ()
    stored = read_projections(experts[0])
    assert stored is not None
    name = "mid_block.resnets.1.conv2"
    weights, deltas = factored(folder, 0)
    unfolded = unfold(Checkpoint(experts[0]).get(f"{name}.weight"), deltas[f"{name}.projection"])
    assert max_error(unfolded, weights[f"{name}.weight"]) < 1e-6  # one rounding of an fp32 number
    assert attach_projections(StableDiffusionPipeline.from_pretrained(base), experts[0]) is None


def test_kept_projections_need_a_folder(run: Path, base: Path, tmp_path: Path) -> None:
    message = "the projections behind down_blocks.0, down_blocks.1, mid_block, up_blocks.1 fold into no layer"
    with pytest.raises(ValueError, match=message):
        merge(base / "unet" / WEIGHTS, tmp_path / "x.safetensors", [run / "range-0" / "expert"], MergeSettings((1.0,)))
    assert not list(tmp_path.iterdir())


def test_an_expert_of_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    tiny_unet(7).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained from another base: its metadata names base_sha256"):
        merge(tmp_path / "other", tmp_path / "out", [run / "range-0" / "expert"], MergeSettings((1.0,)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "was trained with projections, but .* is not there"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is no readable file of projections"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "is no readable file of projections: KeyError"),
        (lambda path: spoil(path), "mid_block.projection should have 16 x 16 numbers; got .* not finite"),
    ],
)
def test_projections_that_cannot_be_trusted_are_refused(
    damage: Callable[[Path], object], message: str, run: Path, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(run / "range-0" / "expert", tmp_path / "expert")
    damage(tmp_path / "expert" / "projection.safetensors")
    with pytest.raises(ValueError, match=message):
        merge(base, tmp_path / "out", [tmp_path / "expert"], MergeSettings((1.0,)))
    assert not (tmp_path / "out").exists()


def spoil(path: Path) -> None:
    stored = read_projections(path.parent)
    assert stored is not None
    stored.deltas["mid_block.projection"][0, 0] = float("nan")
    write_projections(path, stored)


def test_the_record_says_where_projections_went(run: Path, base: Path, tmp_path: Path) -> None:
    merged = merge(base, tmp_path / "out", [run / "range-0" / "expert"], MergeSettings((1.0,)))
    said = json.loads(merged.record.read_text())["projections"]
    assert said["up_blocks.0.projection"] == "up_blocks.0.upsamplers.0.conv"
    assert said["mid_block.projection"] == "projection.safetensors"


# Sampling


def test_an_ensemble_draws_the_same_with_one_or_all_of_its_experts_in_memory(run: Path, tmp_path: Path) -> None:
    options = ("--steps", 4, "--prompt", "a red star", "--height", 16, "--width", 16)
    for resident in ("one", "all"):
        outcome = call("sample", "--ensemble", run, "--output", tmp_path / resident, "--resident", resident, *options)
        assert outcome.code == 0, outcome.err
        assert "experts were put into the denoiser 2 times" in outcome.out
        assert "4 denoiser calls" in outcome.out
    assert (tmp_path / "one" / "000000.png").read_bytes() == (tmp_path / "all" / "000000.png").read_bytes()


def test_a_base_without_text_is_decoupled_merged_and_drawn(data: Path, tmp_path: Path) -> None:
    PIPELINES["ddpm"]().save_pretrained(tmp_path / "base")
    folder = decoupled(tmp_path / "home", tmp_path / "base", data, "resolution=8", "training.preview_pictures=2")
    assert list(folder.glob("range-0/previews/*.png"))
    outcome = call("sample", "--ensemble", folder, "--steps", 2, "--prompt", "any", "--output", tmp_path / "drawn")
    assert outcome.code == 0, outcome.err
    experts = [folder / f"range-{index}" / "expert" for index in range(2)]
    merge(tmp_path / "base", tmp_path / "out", experts, MergeSettings((0.5, 0.5)))
    assert DDPMPipeline.from_pretrained(tmp_path / "out").unet.config.block_out_channels == [8, 16]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method.lambda=1"], "recipe.method.lambda: unknown key"),
        (["method.consistancy=1"], "recipe.method.consistancy: unknown key; did you mean 'consistency'?"),
        (["method.full_range_probability=1.5"], "recipe.method.full_range_probability: "),
        (["method.weighting=snr"], "recipe.method.weighting: "),
        (["method.boundaries=[0,500,1000]"], "give either intervals or boundaries"),
        (
            ["method.intervals=null", "method.boundaries=[0,500,900]"],
            "boundaries end at 900; this base model has",
        ),
        (["method.intervals=null", "method.boundaries=[100,500,1000]"], "must ascend from 0"),
        (["method.max_train_steps=[1,2,3]"], "2 ranges need as many values of max_train_steps; got 3"),
        (["method.trainable=nothing"], "trainable: 'nothing' matches no parameter"),
        (["--range", "2"], "there is no range 2: this recipe has 2, from 0 to 1"),
        (["training.base_quantization=bitsandbytes-8bit"], "a quantised base cannot be copied and trained"),
    ],
)
def test_what_cannot_be_decoupled_is_one_clear_error(
    arguments: list[str], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    assert message in refused("decouple", recipe_of(tmp_path, base, data), *arguments)
    assert not (tmp_path / "out").exists()


def test_a_search_refuses_projections_beside_the_weights(run: Path, base: Path, data: Path, tmp_path: Path) -> None:
    expert = run / "range-0" / "expert"
    recipe = write_recipe(tmp_path / "home", base, data)
    message = "has projections that are not in its weights (down_blocks.0.projection and others)"
    assert message in refused("search", recipe, "--expert", expert, "--output", tmp_path / "found.json")


def test_recipes_of_the_other_kind_are_sent_on(base: Path, data: Path, tmp_path: Path) -> None:
    message = refused("foster", recipe_of(tmp_path / "full", base, data))
    assert message == (
        "recipe.method.kind: this command trains variants of kind foster; of this recipe it would take main (decouple)"
    )
    assert "trains variants of kind decouple; of this recipe it would take main (foster)" in refused(
        "decouple", write_recipe(tmp_path / "low", base, data)
    )


def test_what_is_no_ensemble_is_said(run: Path, base: Path, tmp_path: Path) -> None:
    assert "give either a bundle's folder or --ensemble" in refused("sample", "--prompt", "a")
    assert "holds no experts: expected folders such as" in refused("sample", "--ensemble", base, "--prompt", "a")
    for name in ("a", "b"):
        shutil.copytree(run / "range-0", tmp_path / name)
    assert "has 2 experts of range 0; each of 2 ranges needs one" in refused(
        "sample", "--ensemble", tmp_path, "--prompt", "a"
    )
    assert "unknown resident 'two': allowed are one, all" in refused(
        "sample", "--ensemble", run, "--prompt", "a", "--resident", "two"
    )
    assert "--resident has no meaning without --ensemble" in refused(
        "sample", run, "--prompt", "a", "--resident", "all"
    )
    assert "mode 'switch' is for bundles" in refused("sample", "--ensemble", run, "--prompt", "a", "--mode", "switch")
    assert "fusing is for bundles" in refused("sample", "--ensemble", run, "--prompt", "a", "--fused")
    with pytest.raises(ValueError, match="is no expert's folder: the metadata of its weights lacks"):
        read_record(base / "unet")


def rewrite_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / WEIGHTS
    metadata = dict(Checkpoint(folder).metadata)
    document = json.loads(metadata[EXPERT_KEY])
    change(document)
    save_file(load_file(file), file, {**metadata, EXPERT_KEY: json.dumps(document)})


def test_a_record_of_the_first_version_is_lifted(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "range-1" / "expert", tmp_path / "expert"))
    now = read_record(folder)

    def write_as_before(document: dict[str, Any]) -> None:
        document["format_version"] = 1
        del document["sampling"]

    rewrite_record(folder, write_as_before)
    assert read_record(folder) == now


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "has format version 3; this release reads up to 2"),
        ({"format_version": None}, "timestep_experts_expert is damaged"),
        ({"sampling": {"fps": -1}}, "timestep_experts_expert is damaged: .*fps"),
        ({"indx": 1}, "timestep_experts_expert is damaged: .*indx"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(
    change: dict[str, object], message: str, run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run / "range-1" / "expert", tmp_path / "expert"))
    rewrite_record(folder, lambda document: document.update(change))
    with pytest.raises(ValueError, match=f"(?s){folder}.*{message}"):
        read_record(folder)


def test_an_experts_record_says_how_it_was_made(run: Path) -> None:
    record = read_record(run / "range-1" / "expert")
    assert record.sampling == SamplingDefaults(resolution=(16, 16))
    assert (record.index, record.boundaries) == (1, (0.0, 500.0, 1000.0))
    assert record.provenance["recipe"]["method"]["consistency"] == 1.0
    assert json.dumps(record.provenance)
