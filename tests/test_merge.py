"""Merging files: what is written is the merge of what was read, in the base's layout, or nothing at all."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import max_error, normal, tiny_pipeline, tiny_unet
from test_checkpoints import write_shards
from test_cli import call, refused
from timestep_experts.formats.checkpoints import Checkpoint
from timestep_experts.merging import MergeSettings, merge_linear, merge_ties
from timestep_experts.weights.merge import BASE_KEY, MERGE_KEY, make_settings, merge, read_block_weights

HALVES = MergeSettings((0.5, -0.25))


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model of two blocks and a counter."""
    floats = {name: normal(4, 3, seed=10 * seed + i).to(dtype) for i, name in enumerate(["down.a", "down.b", "up.a"])}
    return {**floats, "counter": torch.tensor([seed])}


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[::2]}, {name: tensors[name] for name in names[1::2]}]


def files(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, list[Path]]:
    """A base and two experts, each a file."""
    paths = [folder / f"{name}.safetensors" for name in ("base", "one", "two")]
    for seed, path in enumerate(paths):
        save_file(state(seed, dtype), path, {"format": "pt", "title": path.stem})
    return paths[0], paths[1:]


def in_memory(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    base, one, two = (state(seed, dtype) for seed in range(3))
    return {name: merge_linear(base[name], [one[name], two[name]], HALVES.weights) for name in base}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert max_error(actual[name], tensor) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_merge_as_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    base, experts = files(tmp_path, dtype)
    merged = merge(base, tmp_path / "out.safetensors", experts, HALVES)
    written = load_file(merged.path)
    expected = in_memory(dtype)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert (merged.num_tensors, merged.num_kept, merged.left_out) == (4, 1, ())


def test_shards_merge_as_in_memory_into_the_same_shards(tmp_path: Path) -> None:
    base = write_shards(tmp_path / "base", shards(state(0)))
    (base / "config.json").write_text("{}")
    _, experts = files(tmp_path)
    merged = merge(base, tmp_path / "out", [experts[0], write_shards(tmp_path / "two", shards(state(2)))], HALVES)
    before, after = Checkpoint(base), Checkpoint(merged.path)
    assert {n: i.file.name for n, i in after.tensors.items()} == {n: i.file.name for n, i in before.tensors.items()}
    assert_equal({name: after.get(name) for name in after.tensors}, in_memory())
    assert sorted(p.name for p in merged.path.iterdir()) == sorted([*(p.name for p in base.iterdir()), "merge.json"])
    assert before.index is not None
    index = merged.path / before.index.name
    assert json.loads(index.read_text()) == json.loads(before.index.read_text())


def test_an_index_has_the_size_of_what_was_written(tmp_path: Path) -> None:
    base = write_shards(tmp_path / "base", shards(state(0)))
    merged = merge(base, tmp_path / "out", [base], MergeSettings((0.5,)), dtype="bf16")
    index = json.loads((merged.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == Checkpoint(merged.path).num_bytes == 3 * 24 + 8


def test_a_pipeline_merges_and_loads(tmp_path: Path) -> None:
    tiny_pipeline(seed=0).save_pretrained(tmp_path / "base")
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "one")
    tiny_unet(2).save_pretrained(tmp_path / "two")  # a component's folder
    tiny_unet(0).save_pretrained(tmp_path / "base" / "unet", variant="fp16")
    (tmp_path / "base" / "old.ckpt").write_bytes(b"x")
    settings = MergeSettings((0.5, 0.25), block_weights={r"mid_block\..*": (0.0, 1.0)})
    merged = merge(tmp_path / "base", tmp_path / "out", [tmp_path / "one", tmp_path / "two"], settings)
    assert merged.left_out == ("old.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    base, one, two = (tiny_unet(seed).state_dict() for seed in range(3))
    expected = {
        name: two[name]
        if name.startswith("mid_block.")
        else merge_linear(base[name], [one[name], two[name]], settings.weights)
        for name in base
    }
    assert_equal(loaded.unet.state_dict(), expected)
    before = tiny_pipeline(seed=0).vae.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in loaded.vae.state_dict().items())


def test_a_component_that_is_named_merges(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one")):
        tiny_pipeline(seed=seed).save_pretrained(tmp_path / name)
    merge(tmp_path / "base", tmp_path / "out", [tmp_path / "one"], MergeSettings((1.0,)), component="vae")
    for part, source in (("vae", "one"), ("unet", "base")):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        written, expected = load_file(tmp_path / "out" / name), load_file(tmp_path / source / name)
        assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_a_component_folder_merges_and_loads(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one")):
        tiny_unet(seed).save_pretrained(tmp_path / name, max_shard_size="60KB")
    assert len(Checkpoint(tmp_path / "base").files) > 1
    merge(tmp_path / "base", tmp_path / "out", [tmp_path / "one"], MergeSettings((1.0,)))
    loaded, expected = UNet2DConditionModel.from_pretrained(tmp_path / "out").state_dict(), tiny_unet(1).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_how_it_was_made_is_inside_and_beside(tmp_path: Path) -> None:
    base, experts = files(tmp_path)
    merged = merge(base, tmp_path / "out.safetensors", experts, HALVES)
    record = json.loads(merged.record.read_text())
    assert merged.record == tmp_path / "out.merge.json"
    with safe_open(merged.path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata[MERGE_KEY]) == record
    assert (metadata["title"], metadata["format"]) == ("base", "pt")
    shell = subprocess.run(["sha256sum", base, *experts], capture_output=True, text=True, check=True).stdout
    hashes = [line.split()[0] for line in shell.splitlines()]
    assert [record["base"]["sha256"], *(e["sha256"] for e in record["experts"])] == hashes
    assert metadata[BASE_KEY] == hashes[0]
    assert [expert["weight"] for expert in record["experts"]] == [0.5, -0.25]
    assert record["settings"]["method"] == "linear"


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_order_of_experts_does_not_matter_to_the_bit(tmp_path: Path, method: str) -> None:
    base, experts = files(tmp_path, torch.float16)
    save_file(state(3, torch.float16), tmp_path / "three.safetensors")
    experts = [*experts, tmp_path / "three.safetensors"]
    density = 1.0 if method == "linear" else 0.5
    weights = (0.3, 0.1, 0.7)
    merge(base, tmp_path / "a.safetensors", experts, make_settings(weights, method, density, None, 0))
    merge(base, tmp_path / "b.safetensors", experts[::-1], make_settings(weights[::-1], method, density, None, 0))
    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ties_streams_as_in_memory(tmp_path: Path) -> None:
    base, experts = files(tmp_path)
    merge(base, tmp_path / "out.safetensors", experts, MergeSettings((0.5, 0.5), "ties", 0.4))
    tensors = [state(seed)["up.a"] for seed in range(3)]
    expected = merge_ties(tensors[0], tensors[1:], (0.5, 0.5), 0.4)
    assert max_error(load_file(tmp_path / "out.safetensors")["up.a"], expected) < 1e-6


def test_dares_masks_come_from_the_seed(tmp_path: Path) -> None:
    base, experts = files(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        merge(base, tmp_path / f"{name}.safetensors", experts, MergeSettings((0.5, 0.5), "dare", 0.5, seed=seed))
    first, same, other = (load_file(tmp_path / f"{name}.safetensors")["up.a"] for name in "abc")
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_another_dtype_is_rounded_once(tmp_path: Path) -> None:
    base, experts = files(tmp_path, torch.float16)
    merged = merge(base, tmp_path / "out.safetensors", experts, HALVES, dtype="fp32")
    assert merged.num_kept == 1
    wide = [
        {name: t.float() if t.is_floating_point() else t for name, t in state(s, torch.float16).items()}
        for s in range(3)
    ]
    expected = {n: merge_linear(wide[0][n], [wide[1][n], wide[2][n]], HALVES.weights) for n in wide[0]}
    assert_equal(load_file(merged.path), expected)


def test_an_expert_that_names_its_base_is_accepted(tmp_path: Path) -> None:
    base, experts = files(tmp_path)
    merged = merge(base, tmp_path / "out.safetensors", experts, HALVES)  # names its base itself
    merge(base, tmp_path / "again.safetensors", [merged.path], MergeSettings((1.0,)))
    assert_equal(load_file(tmp_path / "again.safetensors"), load_file(merged.path))


def test_block_weights_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "blocks.yaml").write_text("'up.*': [1, 0.5]\n'.*': [0, 0]\n")
    assert list(read_block_weights(tmp_path / "blocks.yaml").items()) == [("up.*", (1.0, 0.5)), (".*", (0.0, 0.0))]


@pytest.mark.parametrize("text", ["[1, 2]", "up: 1", "up: [a]", "up: [true]", "1: [1]", "up: [", "", "\x00"])
def test_unusable_block_weights_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "blocks.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"blocks.yaml"):
        read_block_weights(tmp_path / "blocks.yaml")


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    base, experts = files(tmp_path)
    options = [part for expert in experts for part in ("--expert", expert)]
    arguments = ["merge", base, tmp_path / "out.safetensors", *options]
    assert refused(*arguments, "--weights", "0.5") == "there are 1 weights for 2 experts"
    outcome = call(*arguments, "--weights", "0.5,-0.25")
    assert outcome.code == 0
    assert "merged 2 experts into" in outcome.out
    assert "4 tensors, 1 of them integers as in the base" in outcome.out
    assert_equal(load_file(tmp_path / "out.safetensors"), in_memory())


def test_the_command_takes_every_option(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one")):
        tiny_pipeline(seed=seed).save_pretrained(tmp_path / name)
    (tmp_path / "old.yaml").write_text("'encoder.*': [2]")
    options = ["--weights", "1", "--method", "dare", "--density", "0.5", "--seed", "3", "--component", "vae"]
    options += ["--dtype", "fp16", "--block-weights", str(tmp_path / "old.yaml")]
    outcome = call("merge", tmp_path / "base", tmp_path / "out", "--expert", tmp_path / "one", *options)
    assert outcome.code == 0, outcome.err
    settings = json.loads((tmp_path / "out" / "merge.json").read_text())["settings"]
    assert settings == {
        "weights": [1.0],
        "method": "dare",
        "density": 0.5,
        "block_weights": {"encoder.*": [2.0]},
        "seed": 3,
        "component": "vae",
        "dtype": "torch.float16",
    }
    assert refused("merge", "a", "b", "--expert", "c", "--weights", "1", "--method", "mean").startswith("unknown merge")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece, num_tensors = 2**18, 64
    for seed in range(7):
        save_file({f"{i}": normal(piece // 4, seed=seed) for i in range(num_tensors)}, tmp_path / f"{seed}.safetensors")
    get, resident = Checkpoint.get, []

    def watched(checkpoint: Checkpoint, name: str) -> Tensor:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return get(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "get", watched)

    def growth(count: int) -> int:
        resident.clear()
        experts = [tmp_path / f"{i}.safetensors" for i in range(1, count + 1)]
        output = tmp_path / f"out{count}.safetensors"
        merge(tmp_path / "0.safetensors", output, experts, MergeSettings((0.1,) * count))
        return max(resident) - resident[0]

    growth(1)  # what the libraries take once
    # A handful of tensors of 64 in every file, in fp32 as in the files.
    assert growth(6) < 16 * piece
