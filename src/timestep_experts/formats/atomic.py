"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a draft path beside ``path``; on success it takes the place of ``path`` (a file or a folder).

    A folder that stood there is replaced; a failure leaves it as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.draft-{os.getpid()}"
    _remove(draft)
    try:
        yield draft
        if path.is_dir():
            old = path.parent / f".{path.name}.old-{os.getpid()}"
            path.replace(old)
            try:
                draft.replace(path)
            except OSError:
                old.replace(path)
                raise
            _remove(old)
        else:
            draft.replace(path)
    finally:
        _remove(draft)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors atomically, in a fixed order, so equal tensors make equal bytes."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with atomic_path(path) as draft:
        save_file(ordered, draft, metadata=dict(metadata or {}))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
