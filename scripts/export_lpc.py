"""Unpack an archive of sprite clips (``lpc_clips_64.npz`` with ``lpc_clips.tsv``) into an ordinary folder of clips.

Run: python scripts/export_lpc.py --archive <folder> --species human --output work/lpc/humans
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import av
import numpy as np

FPS = 8


def main() -> None:
    """Write one lossless clip per row, and a ``captions.csv`` (``video``, ``caption``)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--species", nargs="+", required=True, choices=("human", "orc", "skeleton"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    clips = np.load(options.archive / "lpc_clips_64.npz")["clips"]
    with (options.archive / "lpc_clips.tsv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["species"] in options.species]
    with (options.output / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("video", "caption"))
        for row in rows:
            name = f"{row['species']}_{int(row['idx']):04d}.mkv"
            write_lossless(options.output / name, clips[int(row["idx"])])
            table.writerow((name, row["caption"]))
    print(f"{len(rows)} clips in {options.output}")


def write_lossless(path: Path, frames: np.ndarray) -> None:
    """Frames ``(F, H, W, 3)`` as FFV1, which keeps every pixel and, unlike a GIF, frames that repeat."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
