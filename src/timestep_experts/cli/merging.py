"""Commands that make one model of several, and those that say how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from timestep_experts.cli.parsing import (
    Overrides,
    RecipePath,
    escaped,
    load_recipe,
    make_console,
    numbers,
    quiet_libraries,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timestep_experts.evaluation.merges import MergeLosses
    from timestep_experts.intervals import Interval

Experts = Annotated[
    list[Path] | None, typer.Option("--expert", help="A fine-tuned copy of the base; give one per expert.")
]
Boundaries = Annotated[
    str | None, typer.Option(help="Ranges of t to report losses by, e.g. 0,250,1000; default: equal ones.")
]


def merge(
    base: Annotated[Path, typer.Argument(help="A .safetensors file, a folder with weights, or a pipeline's folder.")],
    output: Annotated[Path, typer.Argument(help="The file or folder to make, laid out as the base.")],
    expert: Annotated[list[Path], typer.Option(help="A fine-tuned copy of the base; give one per expert.")],
    weights: Annotated[
        str | None, typer.Option(help="One number per expert, e.g. 0.25,0.25; may leave [0, 1].")
    ] = None,
    weights_from: Annotated[
        Path | None, typer.Option(help="Or what `search` found for the same experts: its JSON.")
    ] = None,
    method: Annotated[str, typer.Option(help="linear, ties or dare.")] = "linear",
    density: Annotated[float, typer.Option(help="Share of each task vector that ties and dare keep.")] = 1.0,
    block_weights: Annotated[
        Path | None, typer.Option(help="YAML: regular expression of tensor names: [weight of each expert].")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Of pipelines, the part to merge; default: the denoiser.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of dare.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; default: the base's.")] = None,
) -> None:
    """Merge fine-tuned copies of a base model into one ordinary model."""
    quiet_libraries()
    from timestep_experts.jobs.merge import make_settings
    from timestep_experts.jobs.merge import merge as merge_job
    from timestep_experts.jobs.search import read_search

    if (weights is None) == (weights_from is None):
        raise ValueError("give either --weights or --weights-from")
    hashes = None
    if weights_from is not None:
        if (method, density, block_weights) != ("linear", 1.0, None):
            raise ValueError(
                "--weights-from holds a linear merge: --method, --density and --block-weights have no part"
            )
        settings, hashes = read_search(weights_from)
    else:
        settings = make_settings(numbers(weights or "", "--weights"), method, density, block_weights, seed)
    merged = merge_job(base, output, expert, settings, component, dtype, hashes)
    kept = f", {merged.num_kept} of them integers as in the base" if merged.num_kept else ""
    console = make_console()
    console.print(
        f"merged {len(expert)} experts into {escaped(output)}: {merged.num_tensors} tensors{kept};"
        f" how is in {escaped(merged.record)}",
        soft_wrap=True,
    )
    for name in merged.left_out:
        console.print(f"  not copied, for it holds weights that were not merged: {escaped(name)}", soft_wrap=True)


Method = Annotated[str, typer.Option(help="quadratic (few evaluations), grid (every combination) or cma (CMA-ES).")]
ObjectiveOption = Annotated[
    str, typer.Option(help="mean: loss over all t; ranges: mean over ranges of loss / the base's.")
]
Bounds = Annotated[str, typer.Option(help="Least and largest weight, of quadratic and cma.")]
Reach = Annotated[float, typer.Option(help="How far from the base quadratic begins; 1: at the experts.")]
Refinements = Annotated[int, typer.Option(help="Evaluations of quadratic after its first points, at most.")]
GridValues = Annotated[str, typer.Option("--grid", help="The values of every weight, of grid.")]
Budget = Annotated[int, typer.Option(help="Evaluations of cma, at most.")]
Seed = Annotated[int, typer.Option(help="Of the halves of the validation set, and of cma.")]


def search(
    recipe: RecipePath,
    overrides: Overrides = None,
    expert: Experts = None,
    output: Annotated[Path, typer.Option(help="The JSON to make; figures are put beside it.")] = Path("search.json"),
    method: Method = "quadratic",
    objective: ObjectiveOption = "mean",
    groups: Annotated[
        Path | None, typer.Option(help="YAML: regular expression of tensor names: group with weights of its own.")
    ] = None,
    boundaries: Boundaries = None,
    bounds: Bounds = "-1,2",
    reach: Reach = 1.0,
    refinements: Refinements = 10,
    grid: GridValues = "0,0.25,0.5,0.75,1",
    budget: Budget = 100,
    seed: Seed = 0,
) -> None:
    """Find the weights of a linear merge by the loss on held-out pictures; writes no model."""
    quiet_libraries()
    from timestep_experts.jobs.search import SearchInputs, figure_paths, read_groups, search_experts

    settings = _search_settings(method, objective, bounds, reach, refinements, grid, budget, seed)
    named = {} if groups is None else read_groups(groups)
    cut = None if boundaries is None else numbers(boundaries, "--boundaries")
    inputs = SearchInputs(tuple(expert or ()), named, cut)
    found = search_experts(load_recipe(recipe, overrides), inputs, output, settings)
    console = make_console()
    console.print(losses_table(found.rows, found.ranges))
    console.print(
        f"{found.num_evaluations} evaluations, {found.num_searched} of them by the search, and"
        f" {len(found.rows)} to confirm"
    )
    figures = " and ".join(str(path.name) for path in figure_paths(output))
    console.print(f"{escaped(output)}, with {figures} beside it; use it by: merge --weights-from", soft_wrap=True)


def _search_settings(
    method: str, objective: str, bounds: str, reach: float, refinements: int, grid: str, budget: int, seed: int
) -> Any:
    from timestep_experts.jobs.search_methods import make_search_settings
    from timestep_experts.merging import QuadraticSettings

    low, high = numbers(bounds, "--bounds", 2)
    quadratic = QuadraticSettings(low, high, reach, refinements)
    return make_search_settings(method, objective, quadratic, numbers(grid, "--grid"), budget, seed)


def losses_table(rows: Sequence[MergeLosses], ranges: Sequence[Interval]) -> Table:
    """Losses of merges by range of t, on pictures that no choice has seen; the two means last."""
    table = Table("merge", "weights", *(f"t in {escaped(interval)}" for interval in ranges), "all t", "", "selection")
    table.title = "loss on pictures that no choice has seen"
    base = rows[0]
    for row in rows:
        change = row.confirmation_mean / base.confirmation_mean - 1
        table.add_row(
            row.name,
            ", ".join(f"{weight:.4g}" for weight in row.weights),
            *(f"{loss:.5f}" for loss in row.confirmation),
            f"{row.confirmation_mean:.5f}",
            f"{change:+.2%}" if row is not base else "",
            f"{row.selection_mean:.5f}",
        )
    return table
