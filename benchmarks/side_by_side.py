"""One figure from a finished run: rows are trained variants, columns are prompts, all from the same seeds.

Run: python benchmarks/side_by_side.py runs/quickstart --rows base-off lora-r32-x8-switch main-route \
         --output docs/images/quickstart.png
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from timestep_experts.build import build_picture_sets, build_prompts
from timestep_experts.config import load_recipe


def main() -> None:
    """Read the pictures that an evaluation left behind and lay them out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of a finished run")
    parser.add_argument("--rows", nargs="+", required=True, help="<arm>-<mode>, folders of RUN/evaluation")
    parser.add_argument("--pictures", type=int, nargs="+", default=list(range(8)), help="which prompts, by number")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    recipe = load_recipe(options.run / "recipe.yaml", [])
    prompts = build_prompts(recipe, build_picture_sets(recipe)[1])
    figure, axes = plt.subplots(
        len(options.rows),
        len(options.pictures),
        figsize=(1.25 * len(options.pictures) + 1, 1.3 * len(options.rows) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row, name in zip(axes, options.rows, strict=True):
        label = "base" if name == "base-off" else ", ".join(name.rsplit("-", 1))
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, index in zip(row, options.pictures, strict=True):
            axis.imshow(
                Image.open(options.run / "evaluation" / name / "pictures" / f"{index:04d}.png"), interpolation="lanczos"
            )
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, index in zip(axes[0], options.pictures, strict=True):
        axis.set_title(textwrap.fill(prompts[index], 16), fontsize=7, color="#2d343c")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
