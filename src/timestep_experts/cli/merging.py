"""Commands that make one model of several, and those that say how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from timestep_experts.cli.parsing import (
    MOST_SEED,
    Overrides,
    RecipePath,
    escaped,
    load_recipe,
    make_console,
    numbers,
    quiet_libraries,
)
from timestep_experts.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from timestep_experts.evaluation.merges import MergeLosses
    from timestep_experts.intervals import Interval
    from timestep_experts.weights.search_methods import SearchSettings

Experts = Annotated[
    list[Path] | None, typer.Option("--expert", help="A fine-tuned copy of the base; give one per expert.")
]
AsBundle = Annotated[bool, typer.Option("--bundle", help="Write the same as a bundle of one expert too.")]
Boundaries = Annotated[
    str | None, typer.Option(help="Ranges of t to report losses by, e.g. 0,250,1000; default: equal ones.")
]

_NUM_WORST = 8


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
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of dare.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; default: the base's.")] = None,
) -> None:
    """Merge fine-tuned copies of a base model into one ordinary model."""
    from timestep_experts.weights.merge import make_settings, read_search
    from timestep_experts.weights.merge import merge as merge_job

    if (weights is None) == (weights_from is None):
        raise UserError("give either --weights or --weights-from")
    hashes = None
    if weights_from is not None:
        if (method, density, block_weights, seed) != ("linear", 1.0, None, 0):
            raise UserError(
                "--weights-from is a linear merge: no --method, --density, --block-weights or --seed with it"
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
    if merged.kept_projections:
        console.print(f"  projections beside the weights, not in them: {', '.join(merged.kept_projections)}")
    for name in merged.left_out:
        console.print(f"  not copied, for it holds weights that were not merged: {escaped(name)}", soft_wrap=True)


Method = Annotated[str, typer.Option(help="quadratic (few evaluations), grid (every combination) or cma (CMA-ES).")]
ObjectiveOption = Annotated[
    str | None, typer.Option(help="mean: loss over all t (default); ranges: mean over ranges of loss / the base's.")
]
Bounds = Annotated[str | None, typer.Option(help="Least and largest weight, of quadratic and cma; default: -1,2.")]
Reach = Annotated[
    float | None, typer.Option(help="How far from the base quadratic and cma begin; 1, the default: at the experts.")
]
Refinements = Annotated[
    int | None, typer.Option(help="Evaluations of quadratic after its first points, at most; default: 10.")
]
GridValues = Annotated[
    str | None, typer.Option("--grid", help="The values of every weight, of grid; default: 0,0.25,0.5,0.75,1.")
]
Budget = Annotated[int | None, typer.Option(help="Evaluations of cma, at most; default: 100.")]
Seed = Annotated[int | None, typer.Option(help="Of the halves of the validation set, and of cma; default: 0.")]


def search(
    recipe: RecipePath,
    overrides: Overrides = None,
    expert: Experts = None,
    output: Annotated[Path, typer.Option(help="The JSON to make; figures are put beside it.")] = Path("search.json"),
    method: Method = "quadratic",
    objective: ObjectiveOption = None,
    groups: Annotated[
        Path | None, typer.Option(help="YAML: regular expression of tensor names: group with weights of its own.")
    ] = None,
    boundaries: Boundaries = None,
    bounds: Bounds = None,
    reach: Reach = None,
    refinements: Refinements = None,
    grid: GridValues = None,
    budget: Budget = None,
    seed: Seed = None,
) -> None:
    """Find the weights of a linear merge by the loss on held-out pictures; writes no model."""
    quiet_libraries()
    from timestep_experts.jobs.measuring import measured_base
    from timestep_experts.weights.search import SearchInputs, figure_paths, read_groups, search_experts

    settings = _search_settings(
        method,
        objective=objective,
        seed=seed,
        bounds=bounds,
        reach=reach,
        refinements=refinements,
        grid=grid,
        budget=budget,
    )
    assert settings is not None  # there is a method
    named = {} if groups is None else read_groups(groups)
    cut = None if boundaries is None else numbers(boundaries, "--boundaries")
    inputs = SearchInputs(tuple(expert or ()), named, cut)
    found = search_experts(measured_base(load_recipe(recipe, overrides)), inputs, output, settings)
    console = make_console()
    console.print(losses_table(found.rows, found.ranges))
    console.print(f"{found.num_evaluations} evaluations to search, {len(found.rows)} to confirm")
    figures = " and ".join(str(path.name) for path in figure_paths(output))
    console.print(f"{escaped(output)}, with {figures} beside it; use it by: merge --weights-from", soft_wrap=True)


def merge_lora(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    output: Annotated[Path, typer.Argument(help="The folder to make, for load_lora_weights.")],
    rank: Annotated[int, typer.Option(help="Of the LoRA; at most that of all experts together.")],
    weights: Annotated[
        str | None, typer.Option(help="One per expert, scale after scale; default: shares of the timesteps.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base; default: the one the bundle was made on.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Measures the losses with this recipe's base and data.")] = None,
    find: Annotated[
        str | None, typer.Option("--search", help="Look for the weights: quadratic, grid or cma; needs --recipe.")
    ] = None,
    objective: ObjectiveOption = None,
    bounds: Bounds = None,
    reach: Reach = None,
    refinements: Refinements = None,
    grid: GridValues = None,
    budget: Budget = None,
    seed: Seed = None,
    dtype: Annotated[str, typer.Option(help="Of the file: fp32, fp16 or bf16.")] = "fp32",
    as_bundle: AsBundle = False,
) -> None:
    """Merge a bundle's experts into one ordinary LoRA, for any tool."""
    quiet_libraries()
    from timestep_experts.jobs.measuring import measured_base
    from timestep_experts.weights.lora import LoraSettings
    from timestep_experts.weights.lora import merge_lora as merge_lora_job

    if model is not None and recipe is not None:
        raise UserError("give either --model or --recipe, which names the base")
    given = None if weights is None else numbers(weights, "--weights")
    how = _search_settings(
        find,
        objective=objective,
        seed=seed,
        bounds=bounds,
        reach=reach,
        refinements=refinements,
        grid=grid,
        budget=budget,
    )
    loaded = None if recipe is None else measured_base(load_recipe(recipe, None))
    merged = merge_lora_job(bundle, output, LoraSettings(rank, given, model, dtype, as_bundle), loaded, how)
    console = make_console()
    if merged.search is not None:
        console.print(losses_table(merged.search.rows, merged.search.ranges))
    if merged.rows:
        console.print(losses_table(merged.rows, merged.ranges))
    shown = ", ".join(f"{escaped(e)}: {w:.4g}" for e, w in zip(merged.labels, merged.weights, strict=True))
    console.print(f"{len(merged.labels)} experts at weights {shown}", soft_wrap=True)
    _print_kept(console, merged.kept, merged.total_kept, rank)
    if merged.left_out:
        console.print("the routers of this bundle hear the input, so they have no part in the LoRA")
    console.print(f"made {escaped(output)}", soft_wrap=True)


def fold_gates(
    bundle: Annotated[Path, typer.Argument(help="A bundle whose gates depend on t alone.")],
    output: Annotated[Path, typer.Option(help="Folder of the bundle to be made.")],
    intervals: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Make smooth gates constant on so many intervals."),
    ] = None,
) -> None:
    """Turn a routed bundle into one that switches plain LoRAs, with its gates folded into them."""
    from timestep_experts.formats import load_bundle, save_bundle
    from timestep_experts.intervals import Partition
    from timestep_experts.weights.lora import check_folder_to_make
    from timestep_experts.weights.switchable import to_switchable

    check_folder_to_make(output)
    loaded = load_bundle(bundle)
    partition = None if intervals is None else Partition.uniform(intervals, loaded.spec.num_train_timesteps)
    folded = to_switchable(loaded, partition)
    save_bundle(folded.bundle, output)
    console = make_console()
    console.print(f"made {escaped(output)}: {len(folded.partition)} experts per scale", soft_wrap=True)
    console.print(f"its gates differ from the routed ones by {100 * folded.error:.2f} % (root mean square)")


def extract_lora(
    base: Annotated[Path, typer.Argument(help="A pipeline's folder, or a denoiser's with its config.json.")],
    expert: Annotated[Path, typer.Argument(help="A fine-tuned copy of it.")],
    output: Annotated[Path, typer.Argument(help="The folder to make, for load_lora_weights.")],
    rank: Annotated[int, typer.Option(help="Of the LoRA.")],
    component: Annotated[str | None, typer.Option(help="Of pipelines, the part; default: the denoiser.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the file: fp32, fp16 or bf16.")] = "fp32",
    as_bundle: AsBundle = False,
) -> None:
    """Write what a fine-tuned copy of a base learnt as a LoRA."""
    quiet_libraries()
    from timestep_experts.weights.extract import extract_lora as extract_lora_job
    from timestep_experts.weights.lora import LoraSettings

    settings = LoraSettings(rank, dtype=dtype, with_bundle=as_bundle)
    extracted = extract_lora_job(base, expert, output, settings, component)
    console = make_console()
    _print_kept(console, extracted.kept, extracted.total_kept, rank)
    if extracted.left_out:
        share = sum(extracted.left_out.values())
        largest = sorted(extracted.left_out, key=lambda name: -extracted.left_out[name])[:_NUM_WORST]
        console.print(
            f"{len(extracted.left_out)} tensors with {share:.2%} of the whole change are left out, for no LoRA can hold"
            f" them; all are in merge.json, the largest are {escaped(', '.join(largest))}",
            soft_wrap=True,
        )
    console.print(f"made {escaped(output)}", soft_wrap=True)


def analyse(
    recipe: RecipePath,
    overrides: Overrides = None,
    expert: Experts = None,
    output: Annotated[Path, typer.Option(help="The folder to make.")] = Path("analysis"),
    timesteps: Annotated[int, typer.Option(help="K: gradients are taken at the middles of K equal bins.")] = 20,
    pictures: Annotated[int, typer.Option(help="Of validation, the same at every timestep.")] = 64,
    parameters: Annotated[str, typer.Option(help="Regular expression of the denoiser's parameter names.")] = ".*",
    sketch: Annotated[
        int, typer.Option(help="Numbers that a gradient is projected to; 0: keep all gradients whole.")
    ] = 65536,
    intervals: Annotated[int, typer.Option(help="Of the cut that the figure shows.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of pictures, noise and projection.")] = 0,
) -> None:
    """Say where gradients of timesteps agree, propose boundaries, and compare experts' task vectors."""
    quiet_libraries()
    from timestep_experts.evaluation.gradients import GradientSettings
    from timestep_experts.jobs.measuring import measured_base
    from timestep_experts.weights.analyse import analyse as analyse_job
    from timestep_experts.weights.analyse import as_yaml

    loaded = load_recipe(recipe, overrides)
    batch_size = loaded.evaluation.batch_size
    settings = GradientSettings(timesteps, pictures, batch_size, sketch or None, parameters, seed)
    found = analyse_job(measured_base(loaded), expert or [], output, settings, intervals)
    console = make_console()
    table = Table(
        "intervals", "dissimilarity inside", "of equal ones", "for method.experts.scales", title="proposed boundaries"
    )
    for proposal in found.proposals:
        count, line = str(len(proposal.boundaries) - 1), escaped(as_yaml(proposal))
        table.add_row(count, f"{proposal.cost:.4g}", f"{proposal.uniform_cost:.4g}", line)
    console.print(table)
    vectors = found.task_vectors
    if vectors is not None:
        cosines = Table("cosine of task vectors", *vectors.experts)
        for name, row in zip(vectors.experts, vectors.cosines, strict=True):
            cosines.add_row(name, *(f"{value:.3f}" for value in row))
        console.print(cosines)
    console.print(f"figures and analysis.json in {escaped(output)}", soft_wrap=True)


def _print_kept(console: Console, kept: Mapping[str, float], total: float, rank: int) -> None:
    """The layers that lose most, and what is kept of all."""
    worst = sorted(kept.items(), key=lambda item: item[1])[:_NUM_WORST]
    table = Table("layer", "kept", title=f"squared norm kept at rank {rank}: {total:.2%}; the layers that lose most")
    for path, part in worst:
        table.add_row(path, f"{part:.2%}")
    console.print(table)


_MEANT_FOR: dict[str | None, tuple[str, ...]] = {
    None: (),
    "quadratic": ("objective", "seed", "bounds", "reach", "refinements"),
    "grid": ("objective", "seed", "grid"),
    "cma": ("objective", "seed", "bounds", "reach", "budget"),
}


def _search_settings(method: str | None, **given: float | str | None) -> SearchSettings | None:
    """Settings of a search; ``None`` without a method. An option that has no meaning for the method is an error."""
    from timestep_experts.merging import QuadraticSettings
    from timestep_experts.weights.search_methods import SearchSettings, make_search_settings

    said = {name: value for name, value in given.items() if value is not None}
    if idle := [name for name in said if name not in _MEANT_FOR.get(method, said)]:
        raise UserError(f"--{idle[0]} has no meaning " + (f"for method {method}" if method else "without --search"))
    if method is None:
        return None
    default, quadratic = SearchSettings(), QuadraticSettings()
    low, high = numbers(str(said["bounds"]), "--bounds", 2) if "bounds" in said else (quadratic.low, quadratic.high)
    reach = float(said.get("reach", quadratic.reach))
    refinements = int(said.get("refinements", quadratic.refinements))
    grid = numbers(str(said["grid"]), "--grid") if "grid" in said else default.grid_values
    return make_search_settings(
        method,
        str(said.get("objective", default.objective)),
        QuadraticSettings(low, high, reach, refinements),
        grid,
        int(said.get("budget", default.budget)),
        int(said.get("seed", default.seed)),
    )


def losses_table(rows: Sequence[MergeLosses], ranges: Sequence[Interval]) -> Table:
    """Losses of merges by range of t, on pictures that no choice has seen; the two means last."""
    has_weights = any(row.weights for row in rows)
    weights_column = ["weights"] * has_weights
    table = Table(
        "merge", *weights_column, *(f"t in {escaped(interval)}" for interval in ranges), "all t", "", "selection"
    )
    table.title = "loss on pictures that no choice has seen"
    base = rows[0]
    for row in rows:
        change = row.confirmation_mean / base.confirmation_mean - 1
        table.add_row(
            row.name,
            *[", ".join(f"{weight:.4g}" for weight in row.weights)] * has_weights,
            *(f"{loss:.5f}" for loss in row.confirmation),
            f"{row.confirmation_mean:.5f}",
            f"{change:+.2%}" if row is not base else "",
            f"{row.selection_mean:.5f}",
        )
    return table
