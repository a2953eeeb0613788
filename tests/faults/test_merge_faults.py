"""What a merge refuses: each time one error, and nothing left behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import normal
from timestep_experts.weights import merge as merge_module
from timestep_experts.weights.merge import BASE_KEY, make_settings, merge


@dataclass
class Case:
    """A good merge in a folder, to be spoiled."""

    folder: Path
    weights: tuple[float, ...] = (0.5, 0.5)
    component: str | None = None
    dtype: str | None = None
    blocks: Path | None = None
    output: str = "out.safetensors"
    base: str = "base.safetensors"

    def run(self) -> None:
        settings = make_settings(self.weights, "linear", 1.0, self.blocks, 0)
        experts = [self.folder / f"{name}.safetensors" for name in ("one", "two")]
        output = self.folder / self.output
        merge(self.folder / self.base, output, experts, settings, self.component, self.dtype)

    def change(self, name: str, tensors: dict[str, Tensor | None], metadata: dict[str, str] | None = None) -> None:
        path = self.folder / f"{name}.safetensors"
        changed = {**load_file(path), **tensors}
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path, metadata)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    for seed, name in enumerate(("base", "one", "two")):
        tensors = {"a": normal(4, 3, seed=seed), "b": normal(2, seed=seed), "n": torch.tensor([seed])}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return Case(tmp_path)


def pipeline(case: Case, components: dict[str, list[str | None]]) -> None:
    case.base = "pipe"
    (case.folder / "pipe").mkdir()
    (case.folder / "pipe" / "model_index.json").write_text(json.dumps({"_class_name": "P", **components}))


def missing_tensors(case: Case) -> None:
    case.change("one", {"a": None})


def strange_tensors(case: Case) -> None:
    case.change("two", {f"x{i}": torch.ones(1) for i in range(5)})


def other_shape(case: Case) -> None:
    case.change("two", {"b": torch.ones(3)})


def other_kind(case: Case) -> None:
    case.change("two", {"b": torch.ones(2, dtype=torch.int64)})


def other_base(case: Case) -> None:
    case.change("two", {}, {BASE_KEY: "0" * 64})


def nan_in_expert(case: Case) -> None:
    case.change("two", {"b": torch.tensor([1.0, math.nan])})


def infinity_in_base(case: Case) -> None:
    case.change("base", {"a": torch.full((4, 3), math.inf)})


def overflow(case: Case) -> None:
    case.weights = (1e6, 1e6)
    case.dtype = "fp16"


def truncated(case: Case) -> None:
    path = case.folder / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def missing_expert(case: Case) -> None:
    (case.folder / "one.safetensors").unlink()


def too_few_weights(case: Case) -> None:
    case.weights = (1.0,)


def endless_weight(case: Case) -> None:
    case.weights = (1.0, math.inf)


def idle_block(case: Case) -> None:
    case.blocks = case.folder / "blocks.yaml"
    case.blocks.write_text("'up.*': [1, 1]")


def short_block(case: Case) -> None:
    case.blocks = case.folder / "blocks.yaml"
    case.blocks.write_text("'a': [1]")


def idle_component(case: Case) -> None:
    case.component = "unet"


def unknown_dtype(case: Case) -> None:
    case.dtype = "fp8"


def output_exists(case: Case) -> None:
    case.output = "one.safetensors"


def record_exists(case: Case) -> None:
    (case.folder / "out.merge.json").write_text("{}")


def output_of_another_kind(case: Case) -> None:
    case.output = "out"


def output_inside_the_base(case: Case) -> None:
    case.base = "inner"
    (case.folder / "inner").mkdir()
    (case.folder / "base.safetensors").rename(case.folder / "inner" / "base.safetensors")
    case.output = "inner/out"


def two_denoisers(case: Case) -> None:
    pipeline(case, {"transformer": ["diffusers", "T"], "transformer_2": ["diffusers", "T"]})


def no_denoiser(case: Case) -> None:
    pipeline(case, {"vae": ["diffusers", "V"], "unet": [None, None]})


def unknown_component(case: Case) -> None:
    pipeline(case, {"unet": ["diffusers", "U"]})
    case.component = "prior"


def component_without_folder(case: Case) -> None:
    pipeline(case, {"unet": ["diffusers", "U"]})


def broken_pipeline(case: Case) -> None:
    pipeline(case, {})
    (case.folder / "pipe" / "model_index.json").write_text("{")


FAULTS: list[tuple[Callable[[Case], None], str]] = [
    (missing_tensors, r"one.safetensors has other tensors than the base .*: it lacks a$"),
    (strange_tensors, r"two.safetensors has other tensors than .*: it has x0, x1, x2 and 2 more"),
    (other_shape, r"two.safetensors: b has shape \(3,\); the base's is \(2,\)"),
    (other_kind, r"b is torch.int64; the base's is torch.float32"),
    (other_base, rf"two.safetensors was trained from another base: its metadata names {BASE_KEY} 0000"),
    (nan_in_expert, r"two.safetensors: b is not finite: 1 of 2 numbers"),
    (infinity_in_base, r"base.safetensors: a is not finite: 12 of 12"),
    (overflow, r"the merged \w leaves the range of torch.float16"),
    (truncated, r"one.safetensors is truncated or damaged"),
    (missing_expert, r"one.safetensors does not exist"),
    (too_few_weights, r"there are 1 weights for 2 experts"),
    (endless_weight, r"weights must be finite numbers; got inf"),
    (idle_block, r"block_weights: 'up\.\*' decides no tensor"),
    (short_block, r"block_weights\['a'\] has 1 numbers; there are 2 experts"),
    (idle_component, r"component 'unet' was given, but no input is a pipeline's folder"),
    (unknown_dtype, r"unknown dtype 'fp8': allowed are fp32, fp16, bf16"),
    (output_exists, r"one.safetensors exists already"),
    (record_exists, r"out.merge.json exists already"),
    (output_of_another_kind, r"the output must end in .safetensors"),
    (output_inside_the_base, r"must not be inside the base"),
    (two_denoisers, r"has several denoisers: name the component to merge, one of transformer, transformer_2"),
    (no_denoiser, r"has no denoiser: name the component to merge, one of vae"),
    (unknown_component, r"has no component 'prior'; it has unet"),
    (component_without_folder, r"lists unet, but there is no folder"),
    (broken_pipeline, r"is no description of a pipeline"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[spoil.__name__ for spoil, _ in FAULTS])
def test_a_fault_is_named_and_leaves_nothing(case: Case, spoil: Callable[[Case], None], message: str) -> None:
    spoil(case)
    before = contents(case.folder)
    with pytest.raises(ValueError, match=message) as caught:
        case.run()
    assert "\n" not in str(caught.value)
    assert contents(case.folder) == before


@pytest.mark.parametrize("failing", ["write_json", "write_streamed"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_interruption_leaves_nothing(case: Case, monkeypatch: pytest.MonkeyPatch, failing: str, kind: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if kind == "folder":
        (case.folder / "model").mkdir()
        (case.folder / "base.safetensors").rename(case.folder / "model" / "base.safetensors")
        case.base, case.output = "model", "out"
    before = contents(case.folder)
    monkeypatch.setattr(merge_module, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.run()
    assert contents(case.folder) == before


def test_the_unspoiled_case_merges(case: Case) -> None:
    case.run()
    assert sorted(path.name for path in case.folder.glob("out*")) == ["out.merge.json", "out.safetensors"]
