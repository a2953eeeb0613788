"""Run a recipe with several seeds and report mean and standard deviation of every row.

Run: python benchmarks/over_seeds.py recipes/emoji.yaml --seeds 0 1 2 --output benchmarks/results/emoji.json

A killed run goes on where it stopped. The seed decides the experts' initial values, the samples, and the split of the
data; validation noise and drawing seeds stay the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from timestep_experts.build import build_context, build_reported_partition
from timestep_experts.config import load_recipe
from timestep_experts.jobs.evaluate import evaluate, prepare_output, write_run_report
from timestep_experts.jobs.methods import methods_of
from timestep_experts.report import results_rows

COLUMNS = (
    "loss",
    "colour",
    "shape",
    "texture",
    "relation",
    "frechet",
    "trained",
    "active",
    "num_images_seen",
    "seconds",
)


def main() -> None:
    """Train, measure, aggregate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="JSON with every number")
    options = parser.parse_intermixed_args()
    per_seed = {seed: run_seed(options.recipe, options.overrides, seed) for seed in options.seeds}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(per_seed, indent=2) + "\n")
    Console(width=160).print(aggregate(per_seed))


def run_seed(recipe: Path, overrides: list[str], seed: int) -> list[dict[str, str | float | int | None]]:
    """All rows of one seed."""
    folder = load_recipe(recipe, overrides).output_dir / f"seed-{seed}"
    loaded = load_recipe(recipe, [*overrides, f"seed={seed}", f"output_dir={folder}"])
    prepare_output(loaded)
    context = build_context(loaded)
    for method in methods_of(loaded):
        method.train(context)
    results = evaluate(loaded, context)
    write_run_report(loaded, context, results, f"python benchmarks/over_seeds.py {recipe} --seeds {seed}")
    return results_rows(results, build_reported_partition(loaded, context.family.noise.num_train_timesteps).intervals)


def aggregate(per_seed: dict[int, list[dict[str, str | float | int | None]]]) -> Table:
    """Mean and standard deviation over seeds, row by row."""
    runs = list(per_seed.values())
    shown = [column for column in COLUMNS if runs[0][-1][column] is not None]
    table = Table("", *shown, title=f"mean and standard deviation over seeds {', '.join(map(str, per_seed))}")
    for rows in zip(*runs, strict=True):
        cells = []
        for column in shown:
            values = [float(row[column] or 0) for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4g}" + (f" ± {spread:.2g}" if spread else ""))
        table.add_row(str(rows[0]["label"]), *cells)
    return table


if __name__ == "__main__":
    main()
