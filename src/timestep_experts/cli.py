"""The command line: parsing and printing only."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from timestep_experts.intervals import Interval, Partition

USER_ERROR = 2
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"

app = typer.Typer(
    name="timestep-experts",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Specialise a diffusion model by noise level: train experts per timestep interval, then **switch** or"
    " **route** them.\n\nStart with `timestep-experts run recipes/quickstart.yaml`. Any key of a recipe can be"
    " overridden on the command line: `foster.max_train_steps=100 experts.scales.0.rank=8`.",
)
console = Console(width=None if sys.stdout.isatty() else 140)

RecipePath = Annotated[Path, typer.Argument(help="A recipe YAML; see the folder recipes/.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, e.g. foster.max_train_steps=100", metavar="[KEY=VALUE]...")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Arm = Annotated[str | None, typer.Option(help="Only this arm of the recipe; default: all of them.")]


def main() -> None:
    """Entry point: exit code 0; 2 with one message for a user's error; 1 with a traceback for ours."""
    with _user_errors():
        app()


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if not _is_raised_by_us(error):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(USER_ERROR)


def _is_raised_by_us(error: BaseException) -> bool:
    """Whether this package raised it, and so explains it; what a library raises is a fault of ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals["__name__"].startswith("timestep_experts")


def _escaped(value: object) -> str:
    return str(value).replace("[", r"\[")


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Do everything: foster and assemble all arms, measure them, print the table and write the report."""
    loaded = _load(recipe, overrides)
    _quiet_libraries()
    if dry_run:
        _print_plan(loaded)
        return
    from timestep_experts import jobs

    jobs.make_plan(loaded)  # what does not fit fails here, before anything is written
    workshop = _workshop(loaded)
    jobs.prepare_output(loaded)
    for arm in loaded.arm_names:
        _train_arm(loaded, arm, workshop)
    _evaluate(loaded, workshop)


@app.command()
def foster(recipe: RecipePath, overrides: Overrides = None, arm: Arm = None, dry_run: DryRun = False) -> None:
    """Stage 1: train the experts of every interval; writes a bundle to switch with."""
    _quiet_libraries()
    from timestep_experts import jobs

    _stage(recipe, overrides, arm, dry_run, jobs.foster_arm)


@app.command()
def assemble(recipe: RecipePath, overrides: Overrides = None, arm: Arm = None, dry_run: DryRun = False) -> None:
    """Stage 2: train the routers of fostered experts; writes a bundle to route with."""
    _quiet_libraries()
    from timestep_experts import jobs

    def assemble_if_any(loaded: Any, name: str, workshop: Any) -> None:
        if arm is not None or jobs.has_second_stage(loaded, name):
            jobs.assemble_arm(loaded, name, workshop)

    _stage(recipe, overrides, arm, dry_run, assemble_if_any)


@app.command()
def decouple(
    recipe: RecipePath,
    overrides: Overrides = None,
    range_: Annotated[
        list[int] | None,
        typer.Option("--range", help="Only this range, from 0 at low noise; may be given several times."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train a full copy of the denoiser for every range of timesteps; writes folders for **merge** and **sample**."""
    loaded = _load(recipe, overrides)
    _quiet_libraries()
    from timestep_experts import jobs

    plans = jobs.make_decouple_plan(loaded, range_, with_memory=dry_run)  # what does not fit fails here
    if dry_run:
        _print_stages(plans, jobs.planned_device(loaded))
        return
    workshop = _workshop(loaded)
    jobs.prepare_output(loaded)
    for index in range(len(plans)) if range_ is None else range_:
        folder, kept = jobs.decouple_range(loaded, index, workshop)
        console.print(f"range {index}: {_escaped(folder)}", soft_wrap=True)
        if kept:
            console.print(f"  projections beside the weights, not in them: {', '.join(kept)}", soft_wrap=True)


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Measure the trained arms of a recipe, print the table and write the report."""
    loaded = _load(recipe, overrides)
    _evaluate(loaded, _workshop(loaded))


@app.command()
def sample(
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be given several times.")],
    bundle: Annotated[Path | None, typer.Argument(help="A bundle's folder.")] = None,
    ensemble: Annotated[Path | None, typer.Option(help="Or a run's folder of decoupled experts, not merged.")] = None,
    output: Annotated[Path, typer.Option(help="Where to put pictures and a contact sheet.")] = Path("samples"),
    model: Annotated[str | None, typer.Option(help="The base; default: the one the bundle was made on.")] = None,
    mode: Annotated[str | None, typer.Option(help="switch, route or off; default: the bundle's own.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Inference steps.")] = 20,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance scale.")] = 3.0,
    scheduler: Annotated[
        str | None, typer.Option(help="Any scheduler of diffusers; without it, the base's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Picture i starts from seed + i.")] = 0,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels; default: as trained.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels; default: as trained.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Of clips; default: as trained.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="Of clips' files; default: as trained, or 8.")] = None,
) -> None:
    """Draw pictures, or clips with a video model, with a trained bundle or an ensemble of decoupled experts."""
    _quiet_libraries()
    from timestep_experts.jobs.draw import DrawSettings, draw, draw_ensemble

    settings = DrawSettings(model, mode, scheduler, steps, guidance, seed, height, width, num_frames, fps)
    if (bundle is None) == (ensemble is None):
        raise ValueError("give either a bundle's folder or --ensemble")
    if ensemble is not None:
        paths, cost, num_swaps = draw_ensemble(ensemble, prompt, output, settings)
        console.print(f"experts were put into the denoiser {num_swaps:,} times")
    elif bundle is not None:
        paths, cost = draw(bundle, prompt, output, settings)
    kind = "clips" if paths[0].suffix == ".mp4" else "pictures"
    count = len(paths) - 1
    console.print(f"{count} {kind} and {paths[-1].name} in {output}; {cost.per_picture(count)}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="VideoCrafter2's model.ckpt, or the same as .safetensors.")],
    output: Annotated[Path, typer.Argument(help="The folder to make.")],
    tokenizer: Annotated[str, typer.Option(help="A folder or hub id with CLIP's tokenizer.")] = CLIP_TOKENIZER,
    fps: Annotated[float, typer.Option(min=1, help="Frames per second that the model is told.")] = 28.0,
) -> None:
    """Turn VideoCrafter2's public checkpoint into a diffusers folder, as recipes/papers/videocrafter2.yaml wants it."""
    _quiet_libraries()
    from timestep_experts.jobs.convert import convert as convert_job

    convert_job(checkpoint, output, tokenizer, fps)
    console.print(f"made {_escaped(output)}", soft_wrap=True)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="A .safetensors file, a folder with weights, or a pipeline's folder.")],
    output: Annotated[Path, typer.Argument(help="The file or folder to make, laid out as the base.")],
    expert: Annotated[list[Path], typer.Option(help="A fine-tuned copy of the base; give one per expert.")],
    weights: Annotated[str, typer.Option(help="One number per expert, e.g. 0.25,0.25; may leave [0, 1].")],
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
    _quiet_libraries()
    from timestep_experts.jobs.merge import make_settings
    from timestep_experts.jobs.merge import merge as merge_job

    settings = make_settings(_numbers(weights, "--weights"), method, density, block_weights, seed)
    merged = merge_job(base, output, expert, settings, component, dtype)
    kept = f", {merged.num_kept} of them integers as in the base" if merged.num_kept else ""
    console.print(
        f"merged {len(expert)} experts into {_escaped(output)}: {merged.num_tensors} tensors{kept};"
        f" how is in {_escaped(merged.record)}",
        soft_wrap=True,
    )
    if merged.kept_projections:
        console.print(f"  projections beside the weights, not in them: {', '.join(merged.kept_projections)}")
    for name in merged.left_out:
        console.print(f"  not copied, for it holds weights that were not merged: {_escaped(name)}", soft_wrap=True)


@app.command()
def show(bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")]) -> None:
    """Print what a bundle is and how it was made."""
    from timestep_experts.formats import load_bundle

    loaded = load_bundle(bundle)
    table = Table("scale", "role", "resting gate", "rank", "alpha", "experts", "intervals", title=_escaped(bundle))
    for scale in loaded.spec.scales:
        role = "context (gated)" if scale.gated else "core"
        count = str(len(scale.partition))
        row = [scale.name, role, f"{scale.constant_gate:g}", str(scale.rank), f"{scale.alpha:g}", count]
        table.add_row(*row, _escaped(scale.partition))
    console.print(table)
    stored = sum(value.numel() for value in loaded.tensors.values())
    console.print(
        f"for a {loaded.denoiser_class} ({_escaped(loaded.base_model)}), {len(loaded.target_modules)} modules"
    )
    console.print(f"{stored:,} parameters stored; meant to be used in mode [bold]{loaded.mode}[/]")
    console.print_json(json.dumps(dict(loaded.provenance)))


@app.command()
def explain(
    intervals: Annotated[int | None, typer.Option(min=1, help="Cut into so many equal intervals.")] = None,
    boundaries: Annotated[str | None, typer.Option(help="Or at these timesteps, e.g. 0,250,1000.")] = None,
    interval: Annotated[str | None, typer.Option(help="Or one interval lo,hi, e.g. 200,400.")] = None,
    scheduler: Annotated[str, typer.Option(help="A scheduler of diffusers, or a model's folder.")] = "DDIMScheduler",
    steps: Annotated[int, typer.Option(min=1, help="Inference steps.")] = 20,
    shift: Annotated[float, typer.Option(min=1e-3, help="Of flow schedulers.")] = 1.0,
) -> None:
    """Say what intervals mean: t, sigma, log-SNR, the steps inside, and other trainers' words for them."""
    _quiet_libraries()
    from timestep_experts.jobs.explain import explain_interval, explain_partition

    given = [value is not None for value in (intervals, boundaries, interval)]
    if sum(given) != 1:
        raise ValueError("give exactly one of --intervals, --boundaries and --interval")
    if interval is not None:
        lo, hi = _numbers(interval, "--interval", 2)
        console.print(explain_interval(Interval(lo, hi), scheduler, steps, shift))
        return
    partition = Partition.uniform(intervals) if intervals else Partition(_numbers(boundaries or "", "--boundaries"))
    console.print(explain_partition(partition, scheduler, steps, shift))


def _numbers(text: str, option: str, count: int | None = None) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} takes numbers separated by commas; got {text!r}") from error
    if count is not None and len(numbers) != count:
        raise ValueError(f"{option} takes {count} numbers; got {text!r}")
    return numbers


def _quiet_libraries() -> None:
    """Leave the terminal to our own messages and bars."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # diffusers imports them where they are installed
        logging.getLogger(name).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _load(path: Path, overrides: list[str] | None) -> Any:
    from timestep_experts.config import load_recipe

    return load_recipe(path, overrides or [])


def _workshop(recipe: Any) -> Any:
    _quiet_libraries()
    from timestep_experts.build import build_workshop

    workshop = build_workshop(recipe)
    skipped = workshop.train.skipped + workshop.validation.skipped
    console.print(
        f"{len(workshop.train):,} training and {len(workshop.validation):,} validation {workshop.media.kind}s,"
        f" {len(skipped)} skipped; {len(workshop.prompts)} prompts"
    )
    for item in skipped:
        console.print(f"  skipped {_escaped(item.place)}: {_escaped(item.reason)}", highlight=False)
    return workshop


def _stage(
    path: Path, overrides: list[str] | None, arm: str | None, dry_run: bool, job: Callable[[Any, str, Any], None]
) -> None:
    recipe = _load(path, overrides)
    if arm is not None:
        recipe.arm(arm)
    if dry_run:
        _print_plan(recipe, arm)
        return
    from timestep_experts import jobs

    jobs.make_plan(recipe)  # what does not fit fails here, before anything is written
    jobs.prepare_output(recipe)
    workshop = _workshop(recipe)
    for name in [arm] if arm is not None else recipe.arm_names:
        job(recipe, name, workshop)
        bundle = recipe.output_dir / "arms" / name / "bundle"
        console.print(f"{name}: {_escaped(bundle)}", soft_wrap=True)


def _train_arm(recipe: Any, arm: str, workshop: Any) -> None:
    from timestep_experts import jobs

    console.rule(f"[bold]{arm}", align="left")
    jobs.foster_arm(recipe, arm, workshop)
    if jobs.has_second_stage(recipe, arm):
        jobs.assemble_arm(recipe, arm, workshop)


def _evaluate(recipe: Any, workshop: Any) -> None:
    from timestep_experts import jobs
    from timestep_experts.report import interval_table, results_table

    results = jobs.evaluate(recipe, workshop)
    report = jobs.write_run_report(recipe, workshop, results, shlex.join(["timestep-experts", *sys.argv[1:]]))
    intervals = jobs.reported_partition(recipe, workshop).intervals
    console.print(interval_table(results, intervals))
    console.print(results_table(results, intervals))
    console.print(f"report: [bold]{_escaped(report)}", soft_wrap=True)


def _print_plan(recipe: Any, arm: str | None = None) -> None:
    from timestep_experts.jobs import make_plan, planned_device

    _print_stages(make_plan(recipe, arm, with_memory=True), planned_device(recipe))


def _print_stages(stages: Iterable[Any], device: str) -> None:
    titles = ("arm", "stage", "experts", "trained", "steps", "samples per expert", "samples")
    parts = ("base", "experts and optimizer", "activations", "peak")
    table = Table(*titles, *parts, title=f"plan; estimated memory of training on {device}, at its peak")
    for stage in stages:
        low, high = stage.samples_per_expert
        memory = stage.memory
        assert memory is not None  # it was asked for
        table.add_row(
            stage.arm,
            stage.stage,
            str(stage.num_experts),
            f"{stage.trainable:,}",
            f"{stage.steps:,}",
            f"{low:,}" if low == high else f"{low:,} to {high:,}",
            f"{stage.samples:,}",
            *(_size(size) for size in (memory.base, memory.experts, memory.activations, memory.peak)),
        )
    console.print(table)


def _size(num_bytes: int) -> str:
    power, unit = next((p, u) for p, u in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if num_bytes >= 2**p or p == 10)
    return f"{num_bytes / 2**power:,.1f} {unit}"


if __name__ == "__main__":
    main()
