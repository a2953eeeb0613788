"""Unpack a CIFAR10 archive into picture folders that a recipe's ``data`` reads: ``train``, ``choose`` and ``report``.

The archive is one ``.npz``: for each split (``train``, ``test``) ``<split>_jpeg``, all JPEG files end to end (uint8),
``<split>_offsets``, where each begins (N + 1 numbers), and ``<split>_labels``; and ``class_names``.

The test split is cut in two: ``choose`` is for whatever is selected by a held-out loss, ``report`` for what is
reported.

Run: python scripts/export_cifar10.py --archive cifar10_jpeg.npz --output work/cifar10/pictures
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from timestep_experts.formats.atomic import atomic_path

CAPTION = "a picture"
"""Of all, unless classes are asked for: a base without text ignores it, and a set is then halved picture by picture."""


def main() -> None:
    """Write PNG files and a ``metadata.jsonl`` with caption and label; folders that are there already stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="the first so many training pictures; classes take turns")
    parser.add_argument("--limit-test", type=int, help="the same of the test split, before it is cut in two")
    parser.add_argument("--captions", choices=("none", "class"), default="none", help="class: captions are its number")
    options = parser.parse_args()
    archive = np.load(options.archive)
    for name, split, rows in folders(archive, options.limit, options.limit_test):
        folder = options.output / name
        if (folder / "metadata.jsonl").is_file():
            print(f"{folder} is there already")
            continue
        with atomic_path(folder) as draft:
            write_folder(draft, read_pictures(archive, split, rows), with_classes=options.captions == "class")
        print(f"{len(rows)} pictures in {folder}")


def folders(
    archive: np.lib.npyio.NpzFile, limit: int | None, limit_test: int | None
) -> tuple[tuple[str, str, range], ...]:
    """Each folder's name, and the split and rows of its pictures; no picture is in two.

    Raises:
        ValueError: a limit leaves a folder empty.
    """
    train = range(len(archive["train_labels"]))[:limit]
    test = range(len(archive["test_labels"]))[:limit_test]
    if not train or len(test) < 2:
        raise ValueError(f"1 training and 2 test pictures are needed at least; got {len(train)} and {len(test)}")
    half = (len(test) + 1) // 2
    return ("train", "train", train), ("choose", "test", test[:half]), ("report", "test", test[half:])


def read_pictures(archive: np.lib.npyio.NpzFile, split: str, rows: range) -> Iterator[tuple[Image.Image, int]]:
    """Pictures and their labels."""
    content: NDArray[np.uint8] = archive[f"{split}_jpeg"]
    starts, labels = archive[f"{split}_offsets"], archive[f"{split}_labels"]
    for row in tqdm(rows, desc=split, unit="picture", leave=False):
        yield Image.open(io.BytesIO(content[starts[row] : starts[row + 1]].tobytes())).convert("RGB"), int(labels[row])


def write_folder(folder: Path, pictures: Iterator[tuple[Image.Image, int]], *, with_classes: bool) -> None:
    """PNG files and their table: ``file_name``, ``text``, ``label``."""
    folder.mkdir(parents=True)
    rows = []
    for index, (picture, label) in enumerate(pictures):
        name = f"{index:05d}.png"
        picture.save(folder / name, compress_level=1)
        rows.append({"file_name": name, "text": str(label) if with_classes else CAPTION, "label": label})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
