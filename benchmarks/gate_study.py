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

from rich.console import Console
from rich.table import Table

from over_seeds import run_seed
from timestep_experts.config import load_recipe
from timestep_experts.formats.atomic import write_json

RECIPE = Path("recipes/gates.yaml")
OUTPUT = Path("benchmarks/results/gates.json")
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
    options = parser.parse_intermixed_args()
    stored = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for budget, seed in product(options.budgets, options.seeds):
        key = f"x{budget}/seed-{seed}"
        stored[key] = {**stored.get(key, {}), **measure(options.recipe, options.overrides, options.rows, budget, seed)}
        write_json(options.output, stored)
    for table in tables(stored):
        Console(width=170).print(table)


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


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


if __name__ == "__main__":
    main()
