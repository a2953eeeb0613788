"""Gates per rank beside LoRAs of equal size and equal compute, at several budgets of training.

Run: python benchmarks/gate_study.py --budgets 1 4 --seeds 3 4 5 --rows main lora-r33

A killed study goes on where it stopped, and rows that are asked for later are added to those that are there. The budget
multiplies the steps of every row; the seed decides initial values, samples, and the split of the data.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from over_seeds import run_seed
from timestep_experts.config import load_recipe
from timestep_experts.formats.atomic import write_json
from timestep_experts.report.figures import figure_style
from timestep_experts.report.labels import PALETTE

RECIPE = Path("recipes/gates.yaml")
OUTPUT = Path("benchmarks/results/gates.json")
BASE, LORA = "base", "lora-r33, switch"
Rows = dict[str, dict[str, float]]


def main() -> None:
    """Train and measure what is missing, then print and write everything there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value of the recipe")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--rows", nargs="+", help="names of variants; all if none is named")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--figure", type=Path, help="a picture of everything there is")
    options = parser.parse_intermixed_args()
    stored = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for budget, seed in product(options.budgets, options.seeds):
        key = f"x{budget}/seed-{seed}"
        stored[key] = {**stored.get(key, {}), **measure(options.recipe, options.overrides, options.rows, budget, seed)}
        write_json(options.output, stored)
    for table in tables(stored):
        Console(width=170).print(table)
    if options.figure is not None:
        draw(stored, options.figure)


def measure(recipe: Path, overrides: Sequence[str], rows: Sequence[str] | None, budget: int, seed: int) -> Rows:
    """The rows of one budget and one seed, by variant and mode."""
    whole = load_recipe(recipe, list(overrides))
    steps = whole.method.max_train_steps
    if not isinstance(steps, int):
        raise SystemExit("the study multiplies one number of steps, which all rows share")
    kept = {name: changes for name, changes in whole.variants.items() if rows is None or name in rows}
    own = [*overrides, f"variants={json.dumps(kept)}", f"method.max_train_steps={steps * budget}"]
    found = run_seed(recipe, [*own, f"output_dir={whole.output_dir / f'x{budget}'}"], seed)
    return {str(row["label"]): row for row in found}  # type: ignore[misc]


def tables(stored: dict[str, Rows]) -> Iterator[Table]:
    """For every budget, mean and standard deviation over seeds of the loss, whole and by interval."""
    for budget in sorted({int(key.partition("/")[0][1:]) for key in stored}):
        runs = [rows for key, rows in stored.items() if key.startswith(f"x{budget}/")]
        labels = dict.fromkeys(label for rows in runs for label in rows)
        columns = [name for name in runs[0][next(iter(labels))] if name.startswith("loss")]
        table = Table("", "stored k", "seeds", *columns, title=f"validation loss at {budget} times the steps")
        for label in labels:
            own = [rows[label] for rows in runs if label in rows]
            cells = [spread([row[name] for row in own]) for name in columns]
            table.add_row(label, f"{own[0]['stored'] / 1e3:.0f}", str(len(own)), *cells)
        yield table


def draw(stored: dict[str, Rows], path: Path) -> None:
    """Loss against stored parameters, and every row's loss by noise level beside the plain LoRA's, seed by seed.

    Seeds without the plain LoRA are left out.
    """
    budgets = sorted({int(key.partition("/")[0][1:]) for key in stored})
    labels = [label for label in dict.fromkeys(label for rows in stored.values() for label in rows) if label != BASE]
    colours = dict(zip(labels, PALETTE, strict=False))
    with figure_style():
        figure = Figure((9.5, 3.2 * len(budgets)), layout="constrained")
        for axes, budget in zip(figure.subplots(len(budgets), 2, squeeze=False), budgets, strict=True):
            runs = [rows for key, rows in stored.items() if key.startswith(f"x{budget}/")]
            for label, rows in ((label, rows) for rows in runs if LORA in rows for label in labels if label in rows):
                axes[0].plot(rows[label]["stored"] / 1e6, rows[label]["loss"], "o", color=colours[label], alpha=0.8)
                names = [name for name in rows[label] if name.startswith("loss [")]
                change = [100 * (rows[label][name] / rows[LORA][name] - 1) for name in names]
                axes[1].plot(range(len(names)), change, ".-", color=colours[label], alpha=0.8)
            axes[0].set(title=f"{budget} x the steps: loss against stored parameters (M), a dot per seed")
            axes[1].set(title="loss by eighths of t, % beside the plain LoRA, a line per seed", xticks=range(8))
            axes[1].set_xticklabels([f"{125 * i}" for i in range(8)])
            for label in labels:
                axes[0].plot([], [], "o", color=colours[label], label=label)
            axes[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


if __name__ == "__main__":
    main()
