"""Searching on files: what is measured is the merge, the base comes back, the result is what `merge` takes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import random_pictures, tiny_pipeline
from test_cli import call, refused
from timestep_experts.config import load_recipe
from timestep_experts.data import EncodedDataset, halves_by_caption
from timestep_experts.evaluation import LossSettings, loss_curve
from timestep_experts.evaluation.merges import MergeBench, MergeSplit
from timestep_experts.intervals import Partition
from timestep_experts.jobs.measuring import measured_base
from timestep_experts.merging import LiveMerge, QuadraticSettings, WeightGroups, num_coefficients
from timestep_experts.models import StableDiffusion
from timestep_experts.weights import search as search_module
from timestep_experts.weights.inputs import BASE_KEY
from timestep_experts.weights.merge import merge, read_search
from timestep_experts.weights.search import (
    SearchInputs,
    named_points,
    read_groups,
    search_experts,
    search_weights,
)
from timestep_experts.weights.search_methods import SearchSettings, make_search_settings

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SETTINGS = LossSettings(Partition((0, 400, 1000)), bins_per_interval=1, num_pictures=3, batch_size=4, seed=3)
FEW = SearchSettings(quadratic=QuadraticSettings(refinements=2))
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Case:
    """A recipe on a tiny base with a few pictures, and two experts that are near it."""

    folder: Path
    experts: list[Path] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    settings: SearchSettings = FEW
    overrides: list[str] = field(default_factory=list)
    boundaries: tuple[float, ...] | None = None

    @property
    def output(self) -> Path:
        return self.folder / "search.json"

    def run(self) -> search_module.Search:
        recipe = load_recipe(self.folder / "recipe.yaml", self.overrides)
        inputs = SearchInputs(tuple(self.experts), self.groups, self.boundaries)
        return search_experts(measured_base(recipe), inputs, self.output, self.settings)

    def change(self, expert: int, change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> None:
        path = self.experts[expert] / WEIGHTS
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata or None)

    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.output.read_text())
        return document


def near(base: torch.nn.Module, seed: int, strength: float = 0.05) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(strength * torch.randn(parameter.shape, generator=generator))
    return base


@pytest.fixture
def case(tmp_path: Path) -> Case:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    made = Case(tmp_path)
    for seed in (1, 2):
        near(tiny_pipeline().unet, seed).save_pretrained(tmp_path / f"e{seed}")
        made.experts.append(tmp_path / f"e{seed}")
    recipe = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "run"),
        "resolution": 16,
        "data": {"path": "world/neon", "max_train_samples": 2, "max_validation_samples": 6},
        "method": {"kind": "foster", "experts": {"scales": [{"intervals": 2}]}},
        "evaluation": {"num_pictures": 2, "bins_per_interval": 1, "batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return made


# Common random numbers, in place


def test_weights_in_place_have_the_losses_of_the_models_they_stand_for(family: StableDiffusion) -> None:
    pictures = random_pictures(6, family)
    live = family.denoiser.state_dict()
    before = {name: value.clone() for name, value in live.items()}
    experts = [near(tiny_pipeline().unet, seed) for seed in (1, 2)]
    split = MergeSplit.on_halves(family, pictures, SETTINGS, seed=0)
    base_curve = loss_curve(family, halves_by_caption(pictures, 0)[0], SETTINGS)
    with LiveMerge(live, [expert.state_dict() for expert in experts]) as merged:
        bench = MergeBench(split, lambda w: merged.set(dict.fromkeys(merged.names, w)))
        curves = [bench.curve(w) for w in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]]
        again = MergeBench(split, lambda w: merged.set(dict.fromkeys(merged.names, w)))
        assert again.curve((0.3, 0.4)) == bench.curve((0.3, 0.4))
        assert [again.curve(w) for w in [(0.0, 1.0), (0.0, 0.0)]] == [curves[2], curves[0]]  # the order is no matter
    assert all(torch.equal(live[name], before[name]) for name in before)
    assert curves[0] == base_curve
    for expert, curve in zip(experts, curves[1:], strict=True):
        family.denoiser.load_state_dict(expert.state_dict())
        assert loss_curve(family, split.selection, SETTINGS) == curve


def test_relative_losses_count_every_range_the_same(family: StableDiffusion) -> None:
    factors = {(0.0,): 1.0, (0.5,): 3.0}
    bench = MergeBench(MergeSplit.on_halves(family, random_pictures(4, family), SETTINGS, seed=0), lambda _: None)
    base = bench.curve((0.0,))
    bench._curves[(0.5,)] = replace(base, loss=(base.loss[0] * factors[(0.5,)], base.loss[1]))
    assert bench.relative((0.0,)) == pytest.approx(1, abs=1e-12)
    assert bench.relative((0.5,)) == pytest.approx(2, abs=1e-12)


def test_halves_share_no_caption(family: StableDiffusion) -> None:
    pictures = random_pictures(6, family)
    doubled = replace(
        pictures, latents=pictures.latents.repeat(2, 1, 1, 1), caption_rows=pictures.caption_rows.repeat(2)
    )
    first, second = halves_by_caption(doubled, 0)
    assert (len(first), len(second)) == (6, 6)
    assert not set(first.caption_rows.tolist()) & set(second.caption_rows.tolist())
    assert torch.equal(halves_by_caption(doubled, 0)[0].latents, first.latents)
    same = replace(doubled, caption_rows=torch.zeros(12, dtype=torch.long))
    assert [len(half) for half in halves_by_caption(same, 0)] == [6, 6]
    one = EncodedDataset(pictures.latents[:1], pictures.caption_rows[:1], pictures.features, pictures.captions, ())
    with pytest.raises(ValueError, match="1 validation pictures cannot be halved"):
        halves_by_caption(one, 0)


# The search


def test_a_search_finds_and_records(case: Case) -> None:
    base_before = (case.folder / "base" / "unet" / WEIGHTS).read_bytes()
    found = case.run()
    document = case.document()
    losses = [point["loss"] for point in document["evaluated"]]
    assert found.found.selection_mean == min(losses) == document["loss"]["found"]["selection"]["mean"]
    assert document["counts"]["evaluations"] == len(losses) == found.num_evaluations
    assert num_coefficients(2) < len(losses) <= num_coefficients(2) + 2  # uniform weights are on the lattice
    assert [point["why"] for point in document["evaluated"]][:4] == ["table"] * 4
    assert [row.name for row in found.rows] == ["base", "expert 0", "expert 1", "uniform", "found"]
    assert document["weights"] == list(found.found.weights)
    assert document["counts"]["selection_pictures"] + document["counts"]["confirmation_pictures"] == 6
    for path in search_module.figure_paths(case.output):
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert (case.folder / "base" / "unet" / WEIGHTS).read_bytes() == base_before


def test_what_was_found_merges_and_has_the_loss_that_was_promised(case: Case) -> None:
    found = case.run()
    settings, hashes = read_search(case.output)
    merged = case.folder / "merged"
    merge(case.folder / "base", merged, case.experts, settings, expert_hashes=hashes)
    as_base = [f"pretrained_model_name_or_path={merged}"]
    alone = replace(case, experts=case.experts[:1], overrides=as_base, boundaries=(0, 500, 1000))
    alone.output.unlink()
    base = alone.run().rows[0]  # the merge by itself, measured as a base
    assert base.selection_mean == found.found.selection_mean
    assert base.confirmation_mean == found.found.confirmation_mean
    with pytest.raises(ValueError, match=r"other experts, or in another order: .*e2, given as number 0, is number 1"):
        merge(case.folder / "base", case.folder / "x", case.experts[::-1], settings, expert_hashes=hashes)
    assert not (case.folder / "x").exists()


def test_one_expert_is_a_scalar(case: Case) -> None:
    case.experts.pop()
    found = case.run()
    assert [row.name for row in found.rows] == ["base", "expert 0", "found"]
    assert len(found.found.weights) == 1
    assert len(found.ranges) == 4
    assert found.found.selection_mean <= min(row.selection_mean for row in found.rows)


@pytest.mark.parametrize("method", ["grid", "cma"])
def test_other_methods_count_what_they_were_told(case: Case, method: str) -> None:
    case.settings = make_search_settings(method, "ranges", QuadraticSettings(), (0.0, 0.5), 7, 0)
    found = case.run()
    by_method = [point for point in found.evaluated if point.why == method]
    assert len(by_method) == {"grid": 2, "cma": 7}[method]  # two of the grid's four are rows of the table
    assert min(point.loss for point in found.evaluated) == next(
        point.loss for point in found.evaluated if point.weights == found.found.weights
    )


def test_groups_have_weights_of_their_own(case: Case) -> None:
    case.groups = {r"down_blocks\..*": "down", r"conv_in\..*": "down", r"up_blocks\..*": "up"}
    found = case.run()
    assert found.labels == ("down w0", "down w1", "up w0", "up w1", "others w0", "others w1")
    document = case.document()
    w = document["loss"]["found"]["weights"]
    assert document["weights"] == w[4:]
    assert document["block_weights"] == dict(zip(case.groups, [w[:2], w[:2], w[2:4]], strict=True))
    settings, hashes = read_search(case.output)
    merge(case.folder / "base", case.folder / "merged", case.experts, settings, expert_hashes=hashes)


def test_groups_that_cover_everything_leave_no_others() -> None:
    groups = WeightGroups.of(2, ["a.x", "b.x"], {r"a\..*": "a", ".*": "rest"})
    assert groups.groups == ("a", "rest")
    assert len(groups) == 4
    settings = groups.settings((1.0, 2.0, 3.0, 4.0))
    assert settings.weights_by_tensor(["a.x", "b.x"]) == {"a.x": (1.0, 2.0), "b.x": (3.0, 4.0)}
    assert named_points(groups, ["x", "y"])["uniform"] == (0.5, 0.5, 0.5, 0.5)


def test_the_start_of_cma_is_the_last_row() -> None:
    seen = []

    class Bench:
        ranges = ()

        def mean(self, weights: tuple[float, ...]) -> float:
            seen.append(weights)
            return sum(weights)

        def confirm(self, name: str, weights: tuple[float, ...]) -> tuple[str, tuple[float, ...]]:
            return name, weights

    settings = make_search_settings("cma", "mean", QuadraticSettings(0.0, 1.0), (0.0,), 30, 0)
    points = {"base": (0.0, 0.0), "uniform": (0.5, 0.5)}
    found = search_weights(Bench(), points, ("a", "b"), settings)  # type: ignore[arg-type]
    assert len(seen) == len(set(seen)) == len(found.evaluated)
    assert all(0 <= weight <= 1 for point in seen for weight in point)
    assert found.rows[-1] == ("found", (0.0, 0.0))


# The command


def test_the_command_prints_the_table_and_its_result_merges(case: Case) -> None:
    experts = [part for path in case.experts for part in ("--expert", path)]
    outcome = call("search", case.folder / "recipe.yaml", *experts, "--output", case.output, "--refinements", 1)
    assert outcome.code == 0, outcome.err
    assert "uniform" in outcome.out
    assert "evaluations" in outcome.out
    target = case.folder / "merged"
    outcome = call("merge", case.folder / "base", target, *experts, "--weights-from", case.output)
    assert outcome.code == 0, outcome.err
    assert json.loads((target / "merge.json").read_text())["settings"]["weights"] == case.document()["weights"]
    text = refused("merge", case.folder / "base", case.folder / "x", *experts)
    assert text == "give either --weights or --weights-from"
    text = refused(
        "merge", case.folder / "base", case.folder / "x", *experts, "--weights-from", case.output, "--method", "ties"
    )
    assert "--weights-from is a linear merge" in text
    start = ("search", case.folder / "recipe.yaml", *experts, "--output", case.folder / "other.json")
    assert refused(*start, "--grid", "0,1") == "--grid has no meaning for method quadratic"
    assert refused(*start, "--method", "grid", "--budget", 5) == "--budget has no meaning for method grid"
    assert refused(*start, "--bounds", "0.5,1").startswith("bounds of weights must hold 0")
    assert refused(*start, "--bounds", "1") == "--bounds takes 2 numbers; got '1'"
    assert "unknown search method 'guess'" in refused(*start, "--method", "guess")
    assert not (case.folder / "other.json").exists()


# Faults


def nan_tensor(case: Case) -> None:
    case.change(1, lambda tensors: tensors["conv_in.bias"].fill_(math.nan))


def other_shape(case: Case) -> None:
    case.change(0, lambda tensors: tensors.update({"conv_in.bias": torch.ones(3)}))


def missing(case: Case) -> None:
    case.change(0, lambda tensors: tensors.pop("conv_in.bias"))


def other_base(case: Case) -> None:
    case.change(1, lambda tensors: None, **{BASE_KEY: "0" * 64})


def no_experts(case: Case) -> None:
    case.experts = []


def unknown_key(case: Case) -> None:
    case.overrides = ["evaluation.num_picture=2"]


def exists(case: Case) -> None:
    case.output.write_text("mine")


def idle_group(case: Case) -> None:
    case.groups = {"nothing": "a"}


def reserved_group(case: Case) -> None:
    case.groups = {".*": "others"}


def bad_boundaries(case: Case) -> None:
    case.boundaries = (0, 500)


def quantised(case: Case) -> None:
    case.overrides = ["training.base_quantization=torchao-int8"]


FAULTS = [
    (nan_tensor, r"e2.*conv_in\.bias is not finite: 8 of 8"),
    (other_shape, r"e1: conv_in\.bias has shape \(3,\); the base's is \(8,\)"),
    (missing, r"e1 lacks conv_in\.bias, which the base has"),
    (other_base, "e2 was trained from another base: its metadata names base_sha256 0000"),
    (no_experts, "give at least one expert, fine-tuned from"),
    (unknown_key, "unknown key; did you mean 'num_pictures'"),
    (exists, "search.json exists already"),
    (idle_group, "'nothing' decides no tensor"),
    (reserved_group, "the name 'others' is that of"),
    (quantised, "recipe.training.base_quantization: a base in torchao-int8 has no weights to add to"),
    (bad_boundaries, "boundaries end at 500; this base model has 1000 timesteps"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[spoil.__name__ for spoil, _ in FAULTS])
def test_a_fault_is_named_and_leaves_nothing(case: Case, spoil: Callable[[Case], None], message: str) -> None:
    spoil(case)
    before = sorted(case.folder.glob("search*"))
    with pytest.raises(ValueError, match=message) as caught:
        case.run()
    assert "\n" not in str(caught.value)
    assert sorted(case.folder.glob("search*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("guess", "mean"), "unknown search method 'guess': allowed are quadratic, grid, cma"),
        (("cma", "fid"), "unknown objective 'fid': allowed are mean, ranges"),
    ],
)
def test_unknown_words_are_refused(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_search_settings(*arguments, QuadraticSettings(), (0.0,), 5, 0)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "x"}', '{"format": "timestep-experts/search"}'])
def test_something_else_is_no_search(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="is no result of a search for merge weights"):
        read_search(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["[]", "a: 1", "{", "a: [1]"])
def test_something_else_is_no_groups(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"x\.yaml"):
        read_groups(tmp_path / "x.yaml")
