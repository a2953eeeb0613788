"""The speed benchmark at tiny sizes: every row is there and makes sense; and its formula counts as PyTorch does."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
MODULES = (
    "cases",
    "formula",
    "gap",
    "growth",
    "passes",
    "report",
    "start",
    "targets",
    "timing",
    "tricks",
    "gates",
    "variants",
    "world",
)
IN_GROWTH = {"base", "PEFT LoRA", "switch", "route"}


@pytest.fixture(scope="module")
def speed() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        found = {name: importlib.import_module(f"speed_{name}") for name in MODULES}
        yield SimpleNamespace(main=importlib.import_module("speed").main, **found)
        for name in ("speed", *(f"speed_{name}" for name in MODULES)):
            sys.modules.pop(name)


def count_product(into: torch.Size, a: torch.Size, b: torch.Size, **_: Any) -> int:
    return 2 * math.prod(a) * b[-1]


IN_PLACE = {torch.ops.aten.addmm_: count_product, torch.ops.aten.baddbmm_: count_product}  # not known to the counter


def run(speed: SimpleNamespace, folder: Path, *arguments: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        given = ("--quick", "--no-compile", "--device", "cpu", "--output", str(folder), *arguments)
        patch.setattr(sys, "argv", ["speed.py", *given])
        speed.main()
    return json.loads((folder / "speed_cpu.json").read_text())["sections"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module", params=["layers", "denoisers", "world", "growth"])
def section(request: pytest.FixtureRequest, speed: SimpleNamespace, folder: Path) -> tuple[str, dict[str, Any]]:
    sections = run(speed, folder, "--sections", request.param)
    return request.param, sections[request.param]


def test_every_variant_is_measured_or_its_absence_explained(
    section: tuple[str, dict[str, Any]], speed: SimpleNamespace
) -> None:
    name, found = section
    expected = IN_GROWTH if name == "growth" else set(speed.variants.VARIANTS)
    passes = {"world": {speed.variants.ONE_T}, "growth": {speed.variants.MIXED_T, speed.variants.TRAINING}}
    said = {(row["case"], row["pass"], row["variant"]) for row in (*found["rows"], *found["skipped"])}
    cases = {row["case"] for row in found["rows"]}
    assert said == {(c, p, v) for c in cases for p in passes.get(name, set(speed.variants.PASSES)) for v in expected}
    assert all(row["reason"] for row in found["skipped"])


def test_ratios_are_finite_and_memory_of_the_base_is_one(section: tuple[str, dict[str, Any]]) -> None:
    name, found = section
    for row in found["rows"]:
        low, high = row["quartiles"]
        assert 0 < low <= row["ratio"] <= high
        assert math.isfinite(high)
        if name in ("layers", "denoisers"):
            assert math.isfinite(row["memory_ratio"])
            assert row["peak_bytes"] > 0
            if row["variant"] == "base":
                assert (row["memory_ratio"], row["extra_weight_bytes"]) == (1, 0)
    assert found["environment"]["quick"] is True


def test_sections_stay_and_the_figures_are_drawn(
    section: tuple[str, dict[str, Any]], speed: SimpleNamespace, folder: Path
) -> None:
    name, found = section
    kept = json.loads((folder / "speed_cpu.json").read_text())["sections"]
    assert kept[name] == found
    with Image.open(folder / ("speed_growth_cpu.png" if name == "growth" else "speed_cpu.png")) as picture:
        assert picture.width > 1000


def test_attaching_loading_and_folding_are_timed_beside_loras(speed: SimpleNamespace, folder: Path) -> None:
    found = run(speed, folder, "--sections", "start")["start"]
    said = {(row["pass"], row["variant"]) for row in found["rows"]}
    beside_a_lora = {(what, variant) for what in ("attach", "load") for variant in ("route, 1 context", "PEFT LoRA")}
    exchanged = {("fuse another expert in", variant) for variant in ("switch, fused", "PEFT fused")}
    assert said == beside_a_lora | exchanged | {("one step", "base")}
    for row in found["rows"]:
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high
    assert json.loads((folder / "speed_cpu.json").read_text())["sections"]["start"] == found


def test_every_trick_is_left_out_once(speed: SimpleNamespace) -> None:
    makers = speed.tricks.variants()
    assert list(makers) == ["base", *(f"without {name}" for name in speed.tricks.TRICKS), "plain arithmetic"]
    require_measured(speed, makers, speed.variants.Form(num_contexts=1))


def test_gates_of_every_form_are_measured_beside_one_lora(speed: SimpleNamespace) -> None:
    makers = speed.gates.variants()
    assert list(makers) == ["base", "PEFT LoRA", *speed.gates.FORMS, *speed.gates.WITHOUT]
    require_measured(speed, makers, speed.variants.Form(rank=4))


def require_measured(speed: SimpleNamespace, makers: dict[str, Any], form: Any) -> None:
    """Each variant is measured on one layer."""
    budget = speed.timing.Budget(1, 1, min_seconds=0.001)
    setting = speed.passes.Setting(torch.device("cpu"), torch.float32, budget, memory=False)
    (case, *_) = speed.cases.layer_cases(setting.device, quick=True)
    base = speed.passes.build(case, setting)
    rows = speed.passes.measure(case, base, speed.variants.MIXED_T, makers, form, setting).rows
    assert [row["variant"] for row in rows] == list(makers)
    assert all(row["ratio"] > 0 for row in rows)


def test_a_part_of_the_cases_is_measured_anew(speed: SimpleNamespace, tmp_path: Path) -> None:
    first = run(speed, tmp_path, "--sections", "layers", "--no-compile")["layers"]
    again = run(speed, tmp_path, "--sections", "layers", "--no-compile", "--cases", "1x1")["layers"]
    assert len(again["rows"]) == len(first["rows"])
    for row in again["rows"]:
        assert (row in first["rows"]) == ("1x1" not in row["case"])
    training = run(speed, tmp_path, "--sections", "layers", "--no-compile", "--cases", "Linear.*training")["layers"]
    assert len(training["rows"]) == len(first["rows"])
    for row in training["rows"]:
        assert (row in again["rows"]) == ("Linear" not in row["case"] or "training" not in row["pass"])
    with pytest.raises(SystemExit, match="it has: tiny: Linear"):
        run(speed, tmp_path, "--sections", "layers", "--cases", "5x5")
    kept = json.loads((tmp_path / "speed_cpu.json").read_text())
    kept["sections"]["layers"]["environment"]["threads"] += 1
    (tmp_path / "speed_cpu.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="other conditions"):
        run(speed, tmp_path, "--sections", "layers", "--cases", "1x1")


def test_the_gap_is_told_by_operator(speed: SimpleNamespace, folder: Path) -> None:
    rows = run(speed, folder, "--sections", "gap")["gap"]["rows"]
    for kind in (speed.variants.MIXED_T, speed.variants.TRAINING):
        for variant in ("PEFT LoRA", "switch", "route, 1 context"):
            found = {r["operator"]: r for r in rows if (r["pass"], r["variant"]) == (kind, variant)}
            assert "Python, between operators" in found
            own = (
                ("aten::mm", "aten::mul", "aten::add")
                if variant == "PEFT LoRA"
                else ("aten::bmm", "aten::index_select")
            )
            assert any(found[operator]["milliseconds"] > 0 for operator in own if operator in found)
            assert all(math.isfinite(row["share"]) for row in found.values())
    one_t = [r for r in rows if r["pass"] == speed.variants.ONE_T]
    assert {r["variant"] for r in one_t} == {"PEFT LoRA", "switch", "switch, fused", "route, 1 context"}
    fused = {r["operator"] for r in one_t if r["variant"] == "switch, fused"}
    assert "Python, between operators" in fused
    assert "aten::baddbmm_" not in fused  # no product beside the layer's own


def test_weights_beside_the_base_are_those_of_the_adapters(speed: SimpleNamespace) -> None:
    case = speed.cases.linear("one", 16, 8, (2, 2))
    setting = speed.passes.Setting(torch.device("cpu"), torch.float32, speed.timing.Budget(1, 1))
    base = speed.passes.build(case, setting)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    one, bytes_each = 4 * (16 + 16), 4
    expected = {"base": 0, "PEFT LoRA": one, "PEFT adapters": 8 * one, "PEFT fused": one, "switch": 8 * one}
    for name, count in expected.items():
        form, t = speed.variants.Form(), speed.variants.ONE_T
        variant = speed.variants.VARIANTS[name](base, case.targets, form, t, [])
        assert variant.extra_bytes(base) == bytes_each * count
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("contexts", [0, 1, 3])
def test_the_formula_counts_flops_as_pytorch_does(contexts: int, training: bool, speed: SimpleNamespace) -> None:
    sizes = speed.growth.Sizes(contexts=contexts, batch=3, tokens=8, width=16)
    case = speed.cases.linear("one", sizes.width, sizes.tokens, (sizes.batch, sizes.batch))
    setting = speed.passes.Setting(torch.device("cpu"), torch.float32, speed.timing.Budget(1, 1))
    base = speed.passes.build(case, setting)
    form = speed.variants.Form(sizes.experts, sizes.rank, sizes.contexts)
    variant = speed.variants.make_route(base, case.targets, form, speed.variants.TRAINING, [])
    layer = speed.formula.Layer(sizes.batch, sizes.tokens, sizes.width, sizes.width)
    bare = layer.bare(training=training)
    extra = layer.mixture(sizes.experts, sizes.rank, contexts, training=training)
    t = torch.tensor([10.0, 400.0, 900.0])
    for model, expected in ((base, bare.flops), (variant.model, bare.flops + extra.flops)):
        x = torch.ones(3, 8, 16, requires_grad=training)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, torch.set_grad_enabled(training):
            output = model(x, timestep=t)[0]
            if training:
                output.sum().backward()
        assert counter.get_total_flops() == expected


def test_more_of_anything_costs_more_by_the_formula(speed: SimpleNamespace) -> None:
    layer = speed.formula.Layer(2, 64, 32, 48)
    costs = [layer.mixture(8, 4, contexts, training=False).num_bytes for contexts in range(5)]
    assert costs == sorted(costs)
    assert speed.formula.predicted_ratio(layer.bare(training=False), speed.formula.Cost(0, 0), 1e9, 1e9) == 1


def test_quick_numbers_are_not_recorded(speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick"])
    with pytest.raises(SystemExit):
        speed.main()
