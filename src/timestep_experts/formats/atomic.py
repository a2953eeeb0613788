"""Files and folders that are written whole or not at all, and reach the disk before they take their names."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from torch import Tensor

from timestep_experts.errors import UserError
from timestep_experts.formats.checkpoints import TensorInfo, write_streamed

_LONGEST_NAME = 255  # in bytes, of all common file systems
_DRAFT, _OLD = "draft", "old"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a draft path beside ``path``; on success it takes the place of ``path`` (a file or a folder).

    A file replaces a file and a folder a folder; a failure leaves what stood there as it was. Drafts that a killed
    process left behind for the same path are removed.

    Raises:
        UserError: it cannot be written (a full disk, a missing permission, a folder in the place of a file); names the
            path and the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(path)
        draft = path.parent / f"{_prefix(path, _DRAFT)}{os.getpid()}-{uuid4().hex[:8]}"
        try:
            yield draft
            _sync(draft)
            _take_place(draft, path)
        finally:
            _remove(draft)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _take_place(draft: Path, path: Path) -> None:
    if path.is_dir() != draft.is_dir() and path.exists():
        kind = "folder" if path.is_dir() else "file"
        raise UserError(f"cannot write {path}: a {kind} of that name is in the way")
    if not path.is_dir():
        draft.replace(path)
    else:
        old = path.parent / f"{_prefix(path, _OLD)}{os.getpid()}-{uuid4().hex[:8]}"
        path.replace(old)
        try:
            draft.replace(path)
        except OSError:
            old.replace(path)
            raise
        _remove(old)
    _sync_one(path.parent)


def check_output_folder(path: Path, *, makes: bool) -> None:
    """See that a folder can be made and written to, before anything is computed for it.

    Args:
        path: of the folder, which may be there.
        makes: make it, and try to write.

    Raises:
        UserError: it cannot; names what is in the way.
    """
    if too_long := [part for part in path.parts if len(os.fsencode(part)) > _LONGEST_NAME]:
        raise UserError(f"cannot write to {too_long[0][:40]}...: a name has at most {_LONGEST_NAME} bytes")
    try:
        there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        if not there.is_dir():
            raise UserError(f"cannot write to {path}: {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {path}: {there} is read-only")
        if makes:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot write to {path}: {getattr(error, 'strerror', None) or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors atomically, in a fixed order (metadata too), so equal tensors make equal bytes."""
    placed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    layout = {name: TensorInfo(tuple(tensor.shape), tensor.dtype, path) for name, tensor in placed.items()}
    with atomic_path(path) as draft:
        write_streamed(draft, layout, placed.__getitem__, dict(sorted((metadata or {}).items())))


def _prefix(path: Path, kind: str) -> str:
    return f".{path.name[:100]}.{kind}-{socket.gethostname()[:40]}-"


def _clear_up(path: Path) -> None:
    """Remove what processes left that no longer run on this machine; put back a folder that was being replaced."""
    for entry in path.parent.iterdir():
        for kind in (_OLD, _DRAFT):
            prefix = _prefix(path, kind)
            process = entry.name.removeprefix(prefix).partition("-")[0]
            if entry.name.startswith(prefix) and process.isdigit() and not _is_running(int(process)):
                if kind == _OLD and not path.exists():
                    entry.replace(path)
                else:
                    _remove(entry)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, for somebody else
        return True
    return True


def _sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            _sync(inner)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
