"""The command line: parsing and printing only."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from timestep_experts.cli import merging
from timestep_experts.cli.parsing import (
    MOST_SEED,
    Overrides,
    RecipePath,
    escaped,
    make_console,
    numbers,
    quiet_libraries,
)
from timestep_experts.cli.parsing import load_recipe as _load
from timestep_experts.errors import UserError
from timestep_experts.intervals import Interval, Partition

if TYPE_CHECKING:
    from timestep_experts.build import RunContext
    from timestep_experts.config import Recipe
    from timestep_experts.data import Dataset
    from timestep_experts.jobs.methods import Decoupling, Distilling, LowRankMethod, Method
    from timestep_experts.jobs.plan import StagePlan
    from timestep_experts.mixture import RouterForm

M = TypeVar("M", bound="LowRankMethod | Decoupling")
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
    " overridden on the command line: `method.max_train_steps=100 method.experts.scales.0.rank=8`.",
)
console = make_console()

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
VariantName = Annotated[str | None, typer.Option("--variant", help="Only this one; default: all of the kind.")]


class _StopRequest(BaseException):
    """A signal asks to stop. Not an ``Exception``: nobody but `main` handles it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> None:
    """Entry point: exit code 0; 2 with one message for a user's error; 1 with a traceback for ours.

    A full disk or a missing permission is the machine's, and counts as the user's. A signal to stop gives 128 and its
    number.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    with _user_errors():
        app()


def _stop(number: int, _: FrameType | None) -> None:
    raise _StopRequest(number)


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever read our output has left
        sys.stdout = None
        sys.exit(USER_ERROR)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    except _StopRequest as request:
        name = signal.Signals(request.number).name
        Console(stderr=True).print(f"stopped by {name}; the same command goes on from what is saved", highlight=False)
        sys.exit(128 + request.number)


def _fail(message: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escaped(message)}", highlight=False, soft_wrap=True)
    sys.exit(USER_ERROR)


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Do everything: train all variants, merge those that say so, measure them, print the table, write the report."""
    loaded = _load(recipe, overrides)
    quiet_libraries()
    from timestep_experts.jobs.methods import methods_of

    methods = methods_of(loaded)
    context = _prepare(loaded, methods, dry_run)
    if context is None:
        return
    for method in methods:
        console.rule(f"[bold]{method.variant.name}", align="left")
        method.train(context)
    _evaluate(loaded, context)


@app.command()
def foster(
    recipe: RecipePath, overrides: Overrides = None, variant: VariantName = None, dry_run: DryRun = False
) -> None:
    """Stage 1: train the experts of every interval; writes a bundle to switch with."""
    from timestep_experts.jobs.methods import Fostering

    _stage(recipe, overrides, variant, dry_run, Fostering, lambda method, context: method.train_experts(context))


@app.command()
def distill(
    recipe: RecipePath,
    overrides: Overrides = None,
    variant: VariantName = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="Only this one, e.g. n4.3; may be given several times.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train a few-step generator, one expert after the other; writes a bundle to switch with."""
    from timestep_experts.jobs.methods import Distilling

    def job(method: Distilling, context: RunContext) -> None:
        if not method.distill(context, expert or ()):
            console.print(f"{method.variant.name}: some experts are still to be distilled")

    _stage(recipe, overrides, variant, dry_run, Distilling, job)


@app.command()
def assemble(
    recipe: RecipePath, overrides: Overrides = None, variant: VariantName = None, dry_run: DryRun = False
) -> None:
    """Stage 2: train the routers of fostered or distilled experts; writes a bundle to route with."""
    from timestep_experts.jobs.methods import LowRankMethod

    def job(method: LowRankMethod, context: RunContext) -> None:
        if variant is not None or method.assembles:
            method.assemble(context)

    _stage(recipe, overrides, variant, dry_run, LowRankMethod, job)  # type: ignore[type-abstract]  # nobody makes one


@app.command()
def decouple(
    recipe: RecipePath,
    overrides: Overrides = None,
    range_: Annotated[
        list[int] | None,
        typer.Option("--range", help="Only this range, from 0 at low noise; may be given several times."),
    ] = None,
    variant: Annotated[str, typer.Option(help="The one of kind decouple.")] = "main",
    dry_run: DryRun = False,
) -> None:
    """Train a full copy of the denoiser for every range of timesteps; writes folders for **merge** and **sample**."""
    loaded = _load(recipe, overrides)
    quiet_libraries()
    from timestep_experts.jobs.methods import Decoupling

    (whole,) = _methods_of(loaded, variant, Decoupling)
    method = whole.of_ranges(range_)
    context = _prepare(loaded, [method], dry_run)
    if context is None:
        return
    for index in method.ranges:
        folder, kept = method.train_range(index, context)
        console.print(f"range {index}: {escaped(folder)}", soft_wrap=True)
        if kept:
            console.print(f"  projections beside the weights, not in them: {', '.join(kept)}", soft_wrap=True)


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Measure the trained variants of a recipe, print the table and write the report."""
    loaded = _load(recipe, overrides)
    _evaluate(loaded, _context(loaded))


@app.command()
def sample(
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given several times.")],
    bundle: Annotated[Path | None, typer.Argument(help="A bundle's folder.")] = None,
    ensemble: Annotated[Path | None, typer.Option(help="Or a run's folder of decoupled experts, not merged.")] = None,
    resident: Annotated[
        str | None, typer.Option(help="Of an ensemble: one expert in memory at a time (default), or all.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to put pictures and a contact sheet.")] = Path("samples"),
    model: Annotated[str | None, typer.Option(help="The base; default: the one the bundle was made on.")] = None,
    mode: Annotated[str | None, typer.Option(help="switch, route or off; default: the bundle's own.")] = None,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused", help="With the experts in the base's weights, where gates are constant: faster, for memory."
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: 20, or a generator's own.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Classifier-free guidance; default: 3, or none for a generator.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Any scheduler of diffusers; default: the base's own, or a generator's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Picture i starts from seed + i.")] = 0,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels; default: as trained.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels; default: as trained.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Of clips; default: as trained.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="Of clips' files; default: as trained, or 8.")] = None,
) -> None:
    """Generate pictures, or clips with a video model, with a trained bundle or an ensemble of decoupled experts."""
    quiet_libraries()
    from timestep_experts.jobs.sample import SampleOptions, sample_bundle, sample_ensemble

    options = SampleOptions(model, mode, scheduler, steps, guidance, seed, height, width, num_frames, fps, fused)
    if (bundle is None) == (ensemble is None):
        raise UserError("give either a bundle's folder or --ensemble")
    if resident is not None and ensemble is None:
        raise UserError("--resident has no meaning without --ensemble: a bundle's experts are always there")
    if ensemble is not None:
        paths, cost, num_swaps = sample_ensemble(ensemble, prompt, output, options, resident or "one")
        console.print(f"experts were put into the denoiser {num_swaps:,} times")
    elif bundle is not None:
        paths, cost = sample_bundle(bundle, prompt, output, options)
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
    quiet_libraries()
    from timestep_experts.weights.convert import convert as convert_job

    convert_job(checkpoint, output, tokenizer, fps)
    console.print(f"made {escaped(output)}", soft_wrap=True)


app.command()(merging.merge)
app.command()(merging.search)
app.command("merge-lora")(merging.merge_lora)
app.command("extract-lora")(merging.extract_lora)
app.command("fold-gates")(merging.fold_gates)
app.command()(merging.analyse)


@app.command()
def show(bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")]) -> None:
    """Print what a bundle is and how it was made."""
    from timestep_experts.formats import load_bundle

    loaded = load_bundle(bundle)
    table = Table("scale", "role", "base gate", "rank", "alpha", "experts", "intervals", title=escaped(bundle))
    for scale in loaded.spec.scales:
        role = "context (gated)" if scale.gated else "core"
        count = str(len(scale.partition))
        row = [scale.name, role, f"{scale.constant_gate:g}", str(scale.rank), f"{scale.alpha:g}", count]
        table.add_row(*row, escaped(scale.partition))
    console.print(table)
    if loaded.spec.gated_scales:
        console.print(f"routers: {_describe(loaded.spec.router)}")
    stored = sum(value.numel() for value in loaded.tensors.values())
    console.print(f"for a {loaded.denoiser_class} ({escaped(loaded.base_model)}), {len(loaded.target_modules)} modules")
    console.print(f"{stored:,} parameters stored; meant to be used in mode [bold]{loaded.mode}[/], and sampled with")
    console.print_json(loaded.sampling.model_dump_json(exclude_none=True))
    console.print("made by")
    console.print_json(json.dumps(dict(loaded.provenance)))


def _describe(form: RouterForm) -> str:
    """The form of routers in a sentence."""
    heard = {"z_and_t": "t and the layer's input", "z": "the layer's input", "t": "t"}[form.inputs]
    heard += " (the size of its latents)" if form.hears_latents else ""
    said = f"one gate per {form.gates} and {form.positions}, which hears {heard}"
    if not form.has_table:
        return said
    if form.intervals is not None:
        rows = f"a row for each of {escaped(form.intervals)}"
    elif isinstance(form.knots, tuple):
        rows = f"knots at {', '.join(f'{knot:g}' for knot in form.knots)}"
    else:
        rows = "a row for every t" if form.knots is None else f"{form.knots} knots"
    return f"{said}; the table over t has {rows}" + (" and unit size" if form.unit_rms else "")


@app.command()
def explain(
    intervals: Annotated[int | None, typer.Option(min=1, help="Cut into so many equal intervals.")] = None,
    boundaries: Annotated[str | None, typer.Option(help="Or at these timesteps, e.g. 0,250,1000.")] = None,
    interval: Annotated[str | None, typer.Option(help="Or one interval lo,hi, e.g. 200,400.")] = None,
    scheduler: Annotated[str, typer.Option(help="A scheduler of diffusers, or a model's folder.")] = "DDIMScheduler",
    steps: Annotated[int, typer.Option(min=1, help="Inference steps.")] = 20,
    shift: Annotated[
        float | None, typer.Option(min=1e-3, help="Of a flow scheduler. Default: the model's own, for a class 1.")
    ] = None,
) -> None:
    """Say what intervals mean: t, sigma, log-SNR, the steps inside, and other trainers' words for them."""
    quiet_libraries()
    from timestep_experts.jobs.explain import explain_interval, explain_partition

    given = [value is not None for value in (intervals, boundaries, interval)]
    if sum(given) != 1:
        raise UserError("give exactly one of --intervals, --boundaries and --interval")
    if interval is not None:
        lo, hi = numbers(interval, "--interval", 2)
        console.print(explain_interval(Interval(lo, hi), scheduler, steps, shift))
        return
    partition = Partition.uniform(intervals) if intervals else Partition(numbers(boundaries or "", "--boundaries"))
    console.print(explain_partition(partition, scheduler, steps, shift))


def _prepare(recipe: Recipe, methods: Sequence[Method], dry_run: bool) -> RunContext | None:
    """Look at everything before anything is written; then load what the methods share, or only print the plan."""
    quiet_libraries()
    from timestep_experts.jobs.evaluate import prepare_output, require_same_run
    from timestep_experts.jobs.plan import planned_device
    from timestep_experts.jobs.preflight import preflight

    checked = preflight(recipe, methods, is_dry=dry_run)
    if dry_run:
        _print_stages(checked.stages, planned_device(recipe))
        return None
    context = _context(recipe, checked.datasets)
    require_same_run(recipe, context, methods)
    prepare_output(recipe)
    return context


def _context(recipe: Recipe, datasets: tuple[Dataset, Dataset] | None = None) -> RunContext:
    quiet_libraries()
    from timestep_experts.build import build_context

    context = build_context(recipe, datasets)
    skipped = context.train.skipped + context.validation.skipped
    console.print(
        f"{len(context.train):,} training and {len(context.validation):,} validation {context.decoding.kind}s,"
        f" {len(skipped)} skipped; {len(context.prompts)} prompts"
    )
    for item in skipped:
        console.print(f"  skipped {escaped(item.place)}: {escaped(item.reason)}", highlight=False)
    for kind, dataset in (("training", context.train), ("validation", context.validation)):
        for cut in dataset.cut:
            console.print(
                f"  {cut.count:,} of {len(dataset.captions):,} different {kind} captions are cut off: {cut.tokenizer}"
                f" reads {cut.limit} tokens, and the longest caption has {cut.longest}",
                highlight=False,
            )
    if context.shares_captions:
        console.print("  some captions occur both in training and in validation pictures")
    return context


def _methods_of(recipe: Recipe, variant: str | None, kind: type[M]) -> list[M]:
    """The methods of a kind, of one variant or of all.

    Raises:
        UserError: the variant is of another kind, or none is of this one.
    """
    from timestep_experts.jobs.methods import method_of, methods_of

    methods = methods_of(recipe) if variant is None else [method_of(recipe, recipe.variant(variant))]
    found: list[M] = [method for method in methods if isinstance(method, kind)]
    if not found:
        own = ", ".join(f"{method.variant.name} ({method.config.kind})" for method in methods)
        raise UserError(
            f"recipe.method.kind: this command trains variants of kind {kind.name}; of this recipe it would take {own}"
        )
    return found


def _stage(
    path: Path,
    overrides: list[str] | None,
    variant: str | None,
    dry_run: bool,
    kind: type[M],
    job: Callable[[M, RunContext], None],
) -> None:
    recipe = _load(path, overrides)
    methods = _methods_of(recipe, variant, kind)
    context = _prepare(recipe, methods, dry_run)
    if context is None:
        return
    for method in methods:
        job(method, context)
        console.print(f"{method.variant.name}: {escaped(method.paths.bundle)}", soft_wrap=True)


def _evaluate(recipe: Recipe, context: RunContext) -> None:
    from timestep_experts.build import build_reported_partition
    from timestep_experts.jobs.evaluate import evaluate, write_run_report
    from timestep_experts.report import interval_table, results_table

    results = evaluate(recipe, context)
    report = write_run_report(recipe, context, results, shlex.join(["timestep-experts", *sys.argv[1:]]))
    intervals = build_reported_partition(recipe, context.family.noise.num_train_timesteps).intervals
    console.print(interval_table(results, intervals))
    console.print(results_table(results, intervals))
    console.print(f"report: [bold]{escaped(report)}", soft_wrap=True)


def _print_stages(stages: Iterable[StagePlan], device: str) -> None:
    titles = ("variant", "stage", "experts", "trained", "steps", "samples per expert", "samples")
    parts = ("base", "experts and optimizer", "activations", "peak")
    table = Table(*titles, *parts, title=f"plan; estimated memory of training on {device}, at its peak")
    for stage in stages:
        low, high = stage.samples_per_expert
        memory = stage.memory  # it is not known of distillation
        sizes = () if memory is None else (memory.base, memory.experts, memory.activations, memory.peak)
        table.add_row(
            stage.variant,
            stage.stage,
            str(stage.num_experts),
            f"{stage.trainable:,}",
            f"{stage.steps:,}",
            f"{low:,}" if low == high else f"{low:,} to {high:,}",
            f"{stage.samples:,}",
            *([_size(size) for size in sizes] or ["not estimated"] * len(parts)),
        )
    console.print(table)


def _size(num_bytes: int) -> str:
    power, unit = next((p, u) for p, u in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if num_bytes >= 2**p or p == 10)
    return f"{num_bytes / 2**power:,.1f} {unit}"


if __name__ == "__main__":
    main()
