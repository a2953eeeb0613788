"""One figure from a finished run: rows are trained variants, columns are prompts, all from the same seeds.

Run: python benchmarks/side_by_side.py runs/comparison --rows base-off lora-r32-x8-switch main-route \
         --output docs/images/quickstart.png

Of clips, each prompt fills several columns: evenly spaced frames (``--frames``).
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from timestep_experts.build import build_datasets, build_decode_settings, build_prompts
from timestep_experts.config import load_recipe
from timestep_experts.data import ClipSettings, DecodeSettings
from timestep_experts.jobs.samples import load_samples


def main() -> None:
    """Read the pictures that an evaluation left behind and lay them out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of a finished run")
    parser.add_argument("--rows", nargs="+", required=True, help="<variant>-<mode>, folders of RUN/evaluation")
    parser.add_argument("--pictures", type=int, nargs="+", default=list(range(8)), help="which prompts, by number")
    parser.add_argument("--frames", type=int, default=4, help="of each clip")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    recipe = load_recipe(options.run / "recipe.yaml", [])
    is_video = recipe.data.clips is not None
    decoding = build_decode_settings(recipe, 16 if is_video else None, flip=False)
    prompts = build_prompts(recipe, build_datasets(recipe, is_video=is_video)[1])
    width = options.frames if is_video else 1
    shown = [load_row(options.run / "evaluation" / name, options.pictures, decoding, width) for name in options.rows]
    figure, axes = plt.subplots(
        len(options.rows),
        shown[0].shape[0],
        figsize=(1.25 * shown[0].shape[0] + 1, 1.3 * len(options.rows) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))  # room for the prompts
    for row, name, pictures in zip(axes, options.rows, shown, strict=True):
        label = "base" if name == "base-off" else ", ".join(name.rsplit("-", 1))
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="lanczos")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, index in zip(axes[0][::width], options.pictures, strict=True):
        title = axis.annotate(
            textwrap.fill(prompts[index], 20 * width - 4),
            (0, 1.03),
            xycoords="axes fraction",
            fontsize=7,
            color="#2d343c",
            annotation_clip=False,
        )
        title.set_in_layout(False)  # it may reach over the frames beside it
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=110)


def load_row(folder: Path, indices: list[int], decoding: DecodeSettings, num_frames: int) -> NDArray[np.uint8]:
    """The pictures of some prompts, or so many frames of each of their clips: ``(N, H, W, 3)``."""
    samples = load_samples(folder / "pictures", max(indices) + 1, decoding)[indices]
    if not isinstance(decoding, ClipSettings):
        return samples
    frames = np.linspace(0, samples.shape[1] - 1, num_frames).round().astype(int)
    return samples[:, frames].reshape(-1, *samples.shape[2:])


if __name__ == "__main__":
    main()
