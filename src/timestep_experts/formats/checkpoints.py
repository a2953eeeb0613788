"""A model's weights as safetensors, read and written one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from timestep_experts.errors import UserError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""What can be merged, by safetensors' names, in the library's own order."""

_INDEX = re.compile(r".+\.safetensors\.index(\.[\w-]+)?\.json")
_DEFAULT_STEMS = ("diffusion_pytorch_model", "model")
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor.

    Args:
        shape: its sizes.
        dtype: its type.
        file: where it is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def num_bytes(self) -> int:
        """Its size as stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """A model's weights in one or several files; tensors are loaded when asked for.

    Args:
        path: a ``.safetensors`` file, or a folder with one or with shards and their index. Where a folder has several,
            the one that diffusers and transformers load by default is taken.

    Attributes:
        path: as given.
        index: of the shards, ``None`` for a single file.
        files: in the order of their names.
        tensors: by name, in the order of files and then of their headers.
        metadata: of all files together; of a key in several files, the first.
        metadata_by_file: of each.

    Raises:
        UserError: there are no weights or several to choose from, a shard is missing, a file is truncated or
            unreadable, or the index and the files disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: Path | None = None
        if path.is_dir():
            path = _weights_of_folder(path)
            self.index = path if is_index(path.name) else None
        weight_map = None if self.index is None else _read_index(self.index)
        self.files = (path,) if weight_map is None else tuple(path.parent / n for n in sorted(set(weight_map.values())))
        self.metadata_by_file: dict[Path, dict[str, str]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        for file in self.files:
            metadata, tensors, starts = _read_header(file)
            if twice := sorted(tensors.keys() & self.tensors.keys()):
                raise UserError(f"{file}: {twice[0]} is in {self.tensors[twice[0]].file.name} too")
            self.metadata_by_file[file] = metadata
            self.tensors |= tensors
            self._starts |= starts
        if weight_map is not None:
            self._check_index(weight_map)
        if not self.tensors:
            raise UserError(f"{path} holds no tensors")
        self.metadata = {k: v for file in reversed(self.files) for k, v in self.metadata_by_file[file].items()}

    def get(self, name: str) -> Tensor:
        """Load one tensor.

        Raises:
            UserError: its file can no longer be read.
        """
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        try:
            # Read rather than mapped: mapped pages stay in the process's memory while any of the file is open.
            with info.file.open("rb") as file:
                file.seek(self._starts[name])
                num_read = file.readinto(bytes_of(tensor))
        except OSError as error:
            raise UserError(f"cannot read {name} of {info.file}: {error}") from error
        if num_read != info.num_bytes:
            raise UserError(f"{info.file} is truncated: {name} has {num_read} bytes of {info.num_bytes}")
        return tensor

    @property
    def num_bytes(self) -> int:
        """Size of all tensors as stored."""
        return sum(info.num_bytes for info in self.tensors.values())

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        found = {name: info.file.name for name, info in self.tensors.items()}
        if wrong := sorted(found.items() ^ weight_map.items()):
            name = wrong[0][0]
            listed, real = weight_map.get(name, "nothing"), found.get(name, "no shard")
            raise UserError(f"{self.index} lists {name} in {listed}, but {real} holds it")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by its header alone.

    Raises:
        UserError: it is no readable ``.safetensors`` file.
    """
    return {name: info.shape for name, info in _read_header(path)[1].items()}


def file_sha256(path: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, as ``sha256sum`` prints it.

    Args:
        path: the file.
        on_bytes: told how many more bytes were read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()


def weights_sha256(hashes: Mapping[str, str]) -> str:
    """One hash for a model's files: a single file's own; of shards, that of the lines which ``sha256sum`` prints.

    Args:
        hashes: of each file, by its name.
    """
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def write_streamed(
    path: Path, layout: Mapping[str, TensorInfo], get: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with one tensor in memory at a time; safetensors itself wants them all.

    Bytes are those of ``safetensors.torch.save_file``, but for the order of the metadata.

    Args:
        path: to be written; not atomic.
        layout: shapes and dtypes of what ``get`` gives.
        get: called once per name.
        metadata: of the file.
    """
    # The library's own order: wide types first, so that all stay aligned.
    names = sorted(layout, key=lambda name: (-_RANK[layout[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        info, start = layout[name], end
        end += info.num_bytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = get(name)
            assert (tuple(tensor.shape), tensor.dtype) == (layout[name].shape, layout[name].dtype)
            file.write(bytes_of(tensor.cpu().contiguous()))


_STORED = {
    **DTYPES,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""What can be written: some optimisers keep their state in 8 bits."""
_NAMES = {dtype: name for name, dtype in _STORED.items()}
_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
_RANK = {_STORED[name]: rank for rank, name in enumerate(_ORDER)}


def is_index(name: str) -> bool:
    """Whether a file is an index of shards by its name, of a variant (``.index.fp16.json``) or not."""
    return _INDEX.fullmatch(name) is not None


def _weights_of_folder(folder: Path) -> Path:
    indices = sorted(path for path in folder.glob("*.json") if is_index(path.name))
    found = [*indices, *sorted(folder.glob("*.safetensors"))]
    for stem in _DEFAULT_STEMS:
        # An index wins over a file of the same stem, which is what diffusers does.
        for path in (folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"):
            if path in found:
                return path
    candidates = indices or found
    if len(candidates) == 1:
        return candidates[0]
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} has no weights: expected *.safetensors, with an index if several; it has {there}")
    raise UserError(f"{folder} has several weights: {', '.join(p.name for p in candidates)}; name one of them")


def _read_index(path: Path) -> dict[str, str]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        weight_map = dict(document["weight_map"])
        # A file elsewhere could not be written beside the others.
        if all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
            return weight_map
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is no index of shards: {type(error).__name__}: {error}") from error
    raise UserError(f"{path} is no index of shards: weight_map must hold names of files in its folder")


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
    """Metadata, tensors, and where in the file each tensor's bytes start."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file or a folder with some; convert other formats first")
    try:
        with safe_open(path, "pt"):
            pass  # the library checks that the header is sound and covers the file, so what follows can trust it
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=_without_duplicates)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged: {error}") from error
    metadata = header.pop("__metadata__", None) or {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} has dtype {entry['dtype']}; supported are {', '.join(DTYPES)}")
    tensors = {name: TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]], path) for name, entry in header.items()}
    return metadata, tensors, {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise UserError(f"its header has {twice[0]} twice")
    return dict(pairs)


def bytes_of(tensor: Tensor) -> Any:
    """A contiguous tensor's own memory, as a flat array of bytes."""
    return tensor.flatten().view(torch.uint8).numpy()
