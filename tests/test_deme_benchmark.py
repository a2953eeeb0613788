"""The comparison of decoupled experts with finetunes, end to end on random pictures, and what it rests on."""

from __future__ import annotations

import importlib
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny import PIPELINES

from timestep_experts.config import Recipe, load_recipe
from timestep_experts.data import open_dataset

# of numpy, met in the schedulers of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ROOT = Path(__file__).parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIDE = 16
STEPS = (6, 4)
BATCH = 4


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("benchmarks", "scripts"):
            patch.syspath_prepend(str(ROOT / folder))
        names = ("deme", "deme_variants", "picture_features", "export_cifar10", "pretrain_base", "tiny_bases")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        for name in names:
            sys.modules.pop(name)


def write_archive(path: Path, train: int, test: int) -> None:
    content, random = {"class_names": np.array(["dark", "light"])}, np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        files = []
        for index in range(count):
            buffer = io.BytesIO()
            picture = random.integers(0, 128, (SIDE, SIDE, 3)) + 127 * (index % 2)
            Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        content[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        content[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        content[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)
    np.savez(path, **content)


def call(module: ModuleType, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", *map(str, arguments)])
        module.main()


@pytest.fixture(scope="module")
def home(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, ruler, base and recipe."""
    folder = tmp_path_factory.mktemp("cifar")
    write_archive(folder / "archive.npz", 24, 24)
    call(scripts.export_cifar10, "--archive", folder / "archive.npz", "--output", folder / "pictures")
    pictures, ruler = folder / "pictures", folder / "features.safetensors"
    short = ("--steps", 12, "--batch-size", 8)
    call(
        scripts.picture_features,
        *("--pictures", pictures / "train", "--held-out", pictures / "choose", "--output", ruler, *short),
    )
    PIPELINES["ddpm"]().save_pretrained(folder / "base")
    recipe = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "run"),
        "resolution": 8,
        "device": "cpu",
        "data": {
            "path": str(pictures / "train"),
            "validation_path": str(pictures / "choose"),
            "flip": True,
            "caption_dropout": 0,
        },
        "method": {
            "kind": "decouple",
            "intervals": 2,
            "max_train_steps": list(STEPS),
            "train_batch_size": BATCH,
            "learning_rate": 1e-3,
        },
        "evaluation": {
            "num_pictures": 4,
            "bins_per_interval": 1,
            "num_prompts": 0,
            "scheduler": "DDIMScheduler",
            "num_inference_steps": 2,
            "batch_size": 4,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def compare(scripts: SimpleNamespace, home: Path, output: str, *arguments: object) -> list[dict[str, object]]:
    options = ("--report", home / "pictures" / "report", "--features", home / "features.safetensors")
    options += ("--num-pictures", 4, "--search-pictures", 2, "--workers", 1, "--seeds", 0)
    call(scripts.deme, home / "recipe.yaml", *options, "--output", home / output, *arguments)
    return json.loads((home / output).read_text())["0"]


@pytest.fixture(scope="module")
def rows(scripts: SimpleNamespace, home: Path) -> list[dict[str, object]]:
    return compare(scripts, home, "first.json")


def test_every_row_is_measured(rows: list[dict[str, object]], scripts: SimpleNamespace, home: Path) -> None:
    assert [row["label"] for row in rows] == [row.label for row in scripts.deme_variants.ROWS]
    for row in rows:
        assert len(row["ranges"]) == 2
        for value in (row["loss"], row["frechet"], row["frechet_of_real"], *row["ranges"], *(row["weights"] or [])):
            assert math.isfinite(value)
        assert row["loss"] == pytest.approx(sum(row["ranges"]) / 2, rel=1e-6)  # ranges of one width
    assert len({row["loss"] for row in rows}) == len(rows)
    for name in ("ranges.png", "sheet.png"):
        with Image.open(home / "run" / name) as picture:
            assert picture.width > 100


def test_training_adds_up(rows: list[dict[str, object]]) -> None:
    whole = sum(STEPS)
    for row in rows[1:]:
        assert row["total_updates"] == sum(row["updates_per_expert"]) == whole
        assert row["samples"] == whole * BATCH
        is_consistent = row["label"].startswith("experts")
        assert row["base_samples"] == (whole * BATCH if is_consistent else 0)
        assert len(row["updates_per_expert"]) == (2 if row["label"].startswith(("experts", "finetunes")) else 1)
        assert (row["search_evaluations"] > 0) == row["label"].endswith(("searched", "scaled"))
    assert (rows[0]["total_updates"], rows[0]["samples"], rows[0]["updates_per_expert"]) == (0, 0, [])


def test_uniform_weights_are_of_the_number_of_copies(rows: list[dict[str, object]]) -> None:
    weights = {row["label"]: row["weights"] for row in rows}
    assert weights["experts, uniform"] == weights["finetunes, uniform"] == [0.5, 0.5]
    assert len(weights["experts, searched"]) == 2
    assert len(weights["plain, scaled"]) == 1
    assert weights["plain"] is weights["base"] is weights["experts, ensemble"] is None


def test_the_ensemble_has_each_experts_own_loss(rows: list[dict[str, object]], home: Path) -> None:
    """What is merged differs from it, and what a whole finetune says in a range is no expert's."""
    by_label = {row["label"]: row for row in rows}
    assert by_label["experts, ensemble"]["ranges"] != by_label["experts, uniform"]["ranges"]
    searched = json.loads((home / "run/seed-0/searches/experts-searched-mean-2.json").read_text())
    assert searched["ranges"] == [[0.0, 500.0], [500.0, 1000.0]]


def test_going_on_gives_the_same_rows(
    rows: list[dict[str, object]], scripts: SimpleNamespace, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = home / "run" / "seed-0"
    (run / "rows" / "p2.json").unlink()
    (run / "searches" / "finetunes-searched-mean-2.json").unlink()
    (run / "experts" / "variants" / "main" / "decoupled" / "range-1" / "result.safetensors").unlink()
    measured, real = [], scripts.deme._measure_model

    def counted(recipe: Recipe, settings: object, served: list[Path]) -> object:
        measured.append(recipe.pretrained_model_name_or_path)
        return real(recipe, settings, served)

    monkeypatch.setattr(scripts.deme, "_measure_model", counted)
    assert compare(scripts, home, "second.json") == rows
    assert len(measured) == 1  # the row that was lost; what was made again has the same bytes


def test_a_part_of_the_rows_is_what_it_is_among_all(
    rows: list[dict[str, object]], scripts: SimpleNamespace, home: Path
) -> None:
    part = compare(scripts, home, "part.json", "output_dir=" + str(home / "part"), "--groups", "plain")
    assert [row["label"] for row in part] == ["base", "plain", "plain, scaled"]
    assert part == rows[:2] + rows[4:5]
    assert not (home / "part" / "seed-0" / "experts").exists()


def test_choosing_and_reporting_share_no_picture(scripts: SimpleNamespace, home: Path) -> None:
    names = ("train", "choose", "report")
    sets = [open_dataset(str(home / "pictures" / name), max_samples=None, seed=0).examples for name in names]
    contents = [{example.read() for example in examples} for examples in sets]
    assert [len(c) for c in contents] == [24, 12, 12]
    assert len(set().union(*contents)) == 48
    recipe = load_recipe(home / "recipe.yaml")
    scripts.deme.require_apart(recipe, str(home / "pictures" / "report"))
    with pytest.raises(ValueError, match=r"12 pictures of .* are in recipe\.data\.validation_path"):
        scripts.deme.require_apart(recipe, str(home / "pictures" / "choose"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method={kind: foster, experts: {scales: [{intervals: 1}]}}", "decouple is what is compared here; got foster"),
        ("method.intervals=1", "one range is the plain finetune"),
        ("method.projection=paper", "which a search cannot merge; use foldable or off"),
        ("data.validation_path=null", "name the folder of pictures that weights are chosen by"),
    ],
)
def test_what_cannot_be_compared_is_refused(override: str, message: str, scripts: SimpleNamespace, home: Path) -> None:
    recipe = load_recipe(home / "recipe.yaml", ["method.max_train_steps=2", override])
    with pytest.raises(ValueError, match=message):
        scripts.deme_variants.check(recipe)


def test_the_recipes_rivals_get_the_updates_of_all_experts(scripts: SimpleNamespace) -> None:
    recipe = load_recipe(ROOT / "recipes" / "cifar10.yaml")
    groups = scripts.deme_variants.copies(recipe, seed=1)
    totals = {name: scripts.deme_variants.training_of(group) for name, group in groups.items()}
    assert len({(total["total_updates"], total["samples"]) for total in totals.values()}) == 1
    assert len(groups["finetunes"]) == len(groups["experts"]) == 4
    seeds = [copy.recipe.seed for group in groups.values() for copy in group]
    assert len(set(seeds)) == 1 + 4  # finetunes have samples of their own
    assert len({copy.recipe.output_dir for group in groups.values() for copy in group}) == 1 + 3 + 4


def test_a_ruler_reads_back_what_it_was(scripts: SimpleNamespace, home: Path, tmp_path: Path) -> None:
    network, about = scripts.picture_features.load_classifier(home / "features.safetensors")
    assert 0 <= float(about["accuracy"]) <= 1
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    features = scripts.picture_features.features_of(network, pictures)
    assert features.shape == (3, 128)
    alone = torch.cat([scripts.picture_features.features_of(network, pictures[i : i + 1]) for i in range(3)])
    assert (features - alone).abs().max() < 1e-5
    with pytest.raises(ValueError, match="is no picture classifier"):
        scripts.picture_features.load_classifier(tmp_path / "none.safetensors")


def test_a_base_of_pixels_goes_on_where_it_stopped(scripts: SimpleNamespace, home: Path, tmp_path: Path) -> None:
    options = ("--architecture", "ddpm", "--pictures", home / "pictures" / "train", "--weighting", "none", "--flip")
    size = ("--resolution", 8, "--widths", 32, 32, 32, "--batch-size", 4, "--steps", 4, "--checkpointing-steps", 3)
    for name in ("straight", "resumed"):  # the second begins at the checkpoint of step 3
        call(scripts.pretrain_base, *options, *size, "--work", tmp_path / "work", "--output", tmp_path / name)
    weights = [load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("straight", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {tensor.dtype for tensor in weights[0].values()} == {torch.float32}
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "straight")
    assert (pipeline.scheduler.config.beta_schedule, pipeline.scheduler.config.prediction_type) == ("linear", "epsilon")
    assert pipeline.unet.config.down_block_types == ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"]
