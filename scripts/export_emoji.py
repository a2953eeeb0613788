"""Unpack an emoji archive (``emoji_<style>_<resolution>.npz`` with ``index.tsv``) into an ordinary picture folder.

Run: python scripts/export_emoji.py --archive <folder> --styles noto twemoji --split train --output work/emoji/train
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    """Write PNG files and a ``metadata.jsonl`` whose captions are the name and up to three tags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--styles", nargs="+", required=True)
    parser.add_argument("--split", choices=("train", "test"), required=True)
    parser.add_argument("--resolution", type=int, choices=(32, 64), default=32)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    captions = read_captions(options.archive / "index.tsv", options.split)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for style in options.styles:
        archive = np.load(options.archive / f"emoji_{style}_{options.resolution}.npz")
        for key, picture in zip(archive["keys"].tolist(), archive["images"], strict=True):
            if key in captions:
                Image.fromarray(picture).save(options.output / f"{style}_{key}.png")
                rows.append({"file_name": f"{style}_{key}.png", "text": captions[key]})
    (options.output / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} pictures in {options.output}")


def read_captions(index: Path, split: str) -> dict[str, str]:
    """Caption per key: the name, then those of the first three tags that it does not already say.

    Skin-tone variants are left out: they differ from their base picture in one colour alone.
    """
    with index.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    captions = {}
    for row in rows:
        if row["split"] == split and row["skin_tone"] == "0":
            tags = [tag for tag in row["tags"].split("|") if tag and tag not in row["name"]][:3]
            captions[row["key"]] = ", ".join([row["name"], *tags])
    return captions


if __name__ == "__main__":
    main()
