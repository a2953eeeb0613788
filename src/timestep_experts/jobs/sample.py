"""Generate pictures or clips with a bundle, or with decoupled experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from timestep_experts.errors import UserError
from timestep_experts.formats import SamplingDefaults, load_bundle
from timestep_experts.formats.atomic import check_output_folder
from timestep_experts.formats.dtypes import DTYPES
from timestep_experts.formats.experts import find_experts
from timestep_experts.inference import SampleSettings, SamplingCost, attach, attach_ensemble, counted, sample
from timestep_experts.jobs.samples import DEFAULT_FPS, SHEET, save_sample_sheet, save_samples
from timestep_experts.mixture import MODES, Mode
from timestep_experts.models import Family, load_family, resolve_model
from timestep_experts.models.sources import require_source

_BATCH_SIZE = 16
_STEPS, _GUIDANCE = 20, 3.0


@dataclass(frozen=True)
class SampleOptions:
    """What a user asks for; ``None`` leaves it to what was trained, or else to the base.

    Args:
        model: the base.
        mode: ``switch``, ``route`` or ``off``.
        scheduler: the name of a diffusers scheduler.
        num_inference_steps: denoising steps; ``None``: a generator's own, or else 20.
        guidance_scale: of classifier-free guidance; ``None``: a generator's own, or else 3.
        seed: of the first picture.
        height: in pixels.
        width: in pixels.
        num_frames: of clips.
        fps: of clips' files.
        fused: switch with the experts in the base's weights.
    """

    model: str | None = None
    mode: str | None = None
    scheduler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    fused: bool = False


def sample_bundle(
    bundle: Path, prompts: Sequence[str], output: Path, options: SampleOptions
) -> tuple[list[Path], SamplingCost]:
    """Generate one picture or clip per prompt; returns their paths and, last, the contact sheet's, and the cost.

    Raises:
        UserError: the mode is unknown, or the bundle or the base cannot be used.
    """
    mode: Mode | None = next((known for known in MODES if known == options.mode), None)
    if options.mode is not None and (mode is None or mode == "foster"):
        raise UserError(f"unknown mode {options.mode!r}: allowed are switch, route and off")
    check_output_folder(output, makes=False)
    loaded = load_bundle(bundle)
    if options.fused and mode == "off":
        raise UserError("--fused has no meaning in mode off: no experts are active")
    family = load_family(
        _base_of(options, loaded.base_model),
        _device(),
        DTYPES[loaded.sampling.base_dtype],
        loaded.sampling.base_quantization,
    )
    if not family.text_encoders:
        raise UserError(f"{family.source} is a {type(family.pipeline()).__name__}: it generates nothing for a prompt")
    attach(family.pipeline(), loaded, mode, fused=options.fused)
    return _sample(family, loaded.sampling, prompts, output, options)


def sample_ensemble(
    experts: Path, prompts: Sequence[str], output: Path, options: SampleOptions, resident: str = "one"
) -> tuple[list[Path], SamplingCost, int]:
    """Generate with decoupled experts that are not merged, each at its own timesteps.

    A base without text generates one picture per prompt all the same.

    Args:
        experts: the ``decoupled`` folder of a variant.
        prompts: one per picture or clip.
        output: where to.
        options: see `SampleOptions`; ``mode`` and ``fused`` do not apply.
        resident: whether ``one`` expert or ``all`` are in memory; see `attach_ensemble`.

    Returns:
        As `sample_bundle`, and how often another expert was put into the denoiser.

    Raises:
        UserError: the experts or the base cannot be used, or a mode or fusing is asked for.
    """
    if options.mode is not None:
        raise UserError(f"mode {options.mode!r} is for bundles; an ensemble has one expert at a time")
    if options.fused:
        raise UserError("fusing is for bundles; an ensemble's experts are whole weights already")
    check_output_folder(output, makes=False)
    folders, partition, record = find_experts(experts)
    family = load_family(_base_of(options, record.base_model), _device())
    ensemble = attach_ensemble(family.pipeline(), folders, partition, resident)
    paths, cost = _sample(family, record.sampling, prompts, output, options)
    return paths, cost, ensemble.num_swaps


def _base_of(options: SampleOptions, recorded: str) -> str:
    """The base that was asked for, or the one that the weights were made on.

    Raises:
        UserError: it is not there.
    """
    source = resolve_model(options.model or recorded)
    try:
        require_source(source)
    except UserError as error:
        hint = "" if options.model else "; the weights were made on it, and if it is elsewhere now, --model says where"
        raise UserError(f"{error}{hint}") from error
    return source


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _sample(
    family: Family, defaults: SamplingDefaults, prompts: Sequence[str], output: Path, options: SampleOptions
) -> tuple[list[Path], SamplingCost]:
    settings = _settings(family, defaults, options)
    family.check_size(settings.size, settings.num_frames)
    with counted(family.pipeline()) as cost:
        samples = sample(family.pipeline(), prompts, settings)
    names, sheet = _free_names(output, [f"{options.seed + index:06d}" for index in range(len(samples))])
    paths = save_samples(output, samples, names, options.fps or defaults.fps or DEFAULT_FPS)
    save_sample_sheet(sheet, samples, prompts)
    return [*paths, sheet], cost


def _free_names(folder: Path, names: list[str]) -> tuple[list[str], Path]:
    """Names and a contact sheet that overwrite nothing: from the second time on they end in a number."""
    taken = {path.stem for path in folder.iterdir()} if folder.is_dir() else set()
    sheet = Path(SHEET)
    endings = ("" if number == 1 else f"-{number}" for number in count(1))
    ending = next(e for e in endings if taken.isdisjoint([f"{name}{e}" for name in (*names, sheet.stem)]))
    return [f"{name}{ending}" for name in names], folder / f"{sheet.stem}{ending}{sheet.suffix}"


def _settings(family: Family, defaults: SamplingDefaults, options: SampleOptions) -> SampleSettings:
    if not family.is_video and (options.num_frames or options.fps):
        raise UserError(f"{family.source} generates pictures: num_frames and fps are for video models")
    num_frames = options.num_frames or defaults.num_frames or family.default_num_frames if family.is_video else None
    scheduler, num_steps, guidance, timesteps = _sampler(defaults, options)
    height, width = defaults.resolution or family.default_size
    return SampleSettings(
        scheduler,
        num_steps,
        guidance,
        (options.height or height, options.width or width),
        1 if family.is_video else _BATCH_SIZE,
        options.seed,
        num_frames,
        defaults.max_sequence_length,
        timesteps,
    )


def _sampler(
    defaults: SamplingDefaults, options: SampleOptions
) -> tuple[str | None, int, float, tuple[int, ...] | None]:
    """Scheduler, steps, guidance and timesteps: a generator's own where nobody asks for others.

    Its timesteps are left with another scheduler or number of steps, and in mode off, in which there is no generator.
    """
    own = SamplingDefaults() if options.mode == "off" else defaults
    guidance = next(g for g in (options.guidance_scale, own.guidance_scale, _GUIDANCE) if g is not None)
    timesteps = own.timesteps or ()
    if not timesteps or options.scheduler is not None or options.num_inference_steps not in (None, len(timesteps)):
        scheduler = options.scheduler or own.scheduler
        return scheduler, options.num_inference_steps or len(timesteps) or _STEPS, guidance, None
    return own.scheduler, len(timesteps), guidance, timesteps
