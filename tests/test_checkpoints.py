"""Weights read and written a tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import normal
from timestep_experts.formats.checkpoints import (
    DTYPES,
    Checkpoint,
    TensorInfo,
    file_sha256,
    weights_sha256,
    write_streamed,
)

INDEX = "model.safetensors.index.json"


def one_of_each() -> dict[str, Tensor]:
    """Every dtype, a scalar, nothing, and a name that is not ASCII."""
    tensors = {f"{name}.weight": (10 * normal(3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    return {**tensors, "größe": torch.tensor(3.0), "none": torch.zeros(0, 4, dtype=torch.int64)}


def write_shards(folder: Path, parts: list[dict[str, Tensor]], stem: str = "model") -> Path:
    """Shards as the libraries name them, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for part in parts for tensor in part.values())
    document = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(document))
    return folder


def layout_of(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype, Path()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_streamed_bytes_are_the_librarys(tmp_path: Path, metadata: dict[str, str]) -> None:
    tensors = one_of_each()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    write_streamed(tmp_path / "ours.safetensors", layout_of(tensors), tensors.__getitem__, metadata)
    if metadata:
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    loaded = load_file(tmp_path / "ours.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_transposed_tensor_is_written_as_it_is_seen(tmp_path: Path) -> None:
    tensors = {"a": normal(3, 4).T}
    write_streamed(tmp_path / "a.safetensors", layout_of(tensors), tensors.__getitem__, {})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensors["a"])


def test_one_file(tmp_path: Path) -> None:
    tensors = one_of_each()
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"who": "me"})
    for place in (path, tmp_path):
        checkpoint = Checkpoint(place)
        assert checkpoint.files == (path,)
        assert checkpoint.index is None
        assert checkpoint.metadata == {"who": "me"}
        assert {name: (i.shape, i.dtype) for name, i in checkpoint.tensors.items()} == {
            name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
        }
        assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert all(torch.equal(checkpoint.get(name), tensors[name]) for name in tensors)


def test_shards(tmp_path: Path) -> None:
    parts = [{"b": normal(2)}, {"a": normal(3), "c": normal(1)}]
    checkpoint = Checkpoint(write_shards(tmp_path, parts))
    assert [file.name for file in checkpoint.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert checkpoint.index == tmp_path / INDEX
    for part in parts:
        assert all(torch.equal(checkpoint.get(name), part[name]) for name in part)


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    save_file({"a": normal(4), "b": normal(4)}, tmp_path / "a.safetensors")
    checkpoint = Checkpoint(tmp_path)
    os.truncate(tmp_path / "a.safetensors", (tmp_path / "a.safetensors").stat().st_size - 8)
    with pytest.raises(ValueError, match=r"a.safetensors is truncated: b has 8 bytes of 16"):
        checkpoint.get("b")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot read a of .*a.safetensors"):
        checkpoint.get("a")


@pytest.mark.parametrize("default", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_the_default_name_is_taken_of_several(tmp_path: Path, default: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / default)
    save_file({"a": torch.zeros(1)}, tmp_path / default.replace(".", ".fp16."))
    assert Checkpoint(tmp_path).files == (tmp_path / default,)


def test_the_hash_of_shards_is_that_of_the_shell(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_shards(tmp_path, [{"a": normal(2)}, {"b": normal(3)}]))
    command = f"cd {tmp_path} && sha256sum *.safetensors | sha256sum"
    shell = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout.split()[0]
    assert weights_sha256({file.name: file_sha256(file) for file in checkpoint.files}) == shell


def test_hashes_are_those_of_the_library(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    read: list[int] = []
    digest = file_sha256(tmp_path / "a", read.append)
    assert digest == hashlib.sha256(b"abc").hexdigest()
    assert read == [3]
    assert weights_sha256({"a": digest}) == digest
    lines = f"{digest}  a\n{digest}  b\n".encode()
    assert weights_sha256({"b": digest, "a": digest}) == hashlib.sha256(lines).hexdigest()


def no_weights(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"")


def several_weights(folder: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, folder / f"{name}.safetensors")


def missing_shard(folder: Path) -> None:
    write_shards(folder, [{"a": torch.ones(1)}, {"b": torch.ones(1)}])
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncated(folder: Path) -> None:
    save_file({"a": torch.ones(100)}, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-8])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def no_tensors(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")


def duplicate(folder: Path) -> None:
    write_shards(folder, [{"a": torch.ones(1)}, {"b": torch.ones(1)}])
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")


def duplicate_in_one_file(folder: Path) -> None:
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def unlisted(folder: Path) -> None:
    write_shards(folder, [{"a": torch.ones(1)}])
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, folder / "model-00001-of-00001.safetensors")


def listed_only(folder: Path) -> None:
    write_shards(folder, [{"a": torch.ones(1), "b": torch.ones(1)}])
    save_file({"a": torch.ones(1)}, folder / "model-00001-of-00001.safetensors")


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": ')


def escaping_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}')


def strange_dtype(folder: Path) -> None:
    save_file({"a": torch.ones(1, dtype=torch.complex64)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_weights, r"has no weights: expected \*.safetensors.* it has model.bin"),
        (several_weights, "has several weights: one.safetensors, two.safetensors"),
        (missing_shard, "model-00002-of-00002.safetensors does not exist"),
        (truncated, "model.safetensors is truncated or damaged"),
        (garbage, "model.safetensors is truncated or damaged"),
        (no_tensors, "holds no tensors"),
        (duplicate, "a is in model-00001-of-00002.safetensors too"),
        (duplicate_in_one_file, "its header has a twice"),
        (unlisted, "lists b in nothing, but model-00001-of-00001.safetensors holds it"),
        (listed_only, "lists b in model-00001-of-00001.safetensors, but no shard holds it"),
        (broken_index, "is no index of shards"),
        (escaping_index, "names of files in its folder"),
        (strange_dtype, "a has dtype C64; supported are BOOL"),
    ],
)
def test_unusable_weights_are_refused(tmp_path: Path, spoil, message: str) -> None:
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.ckpt is not a .safetensors file"):
        Checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"b.safetensors does not exist"):
        Checkpoint(tmp_path / "b.safetensors")
