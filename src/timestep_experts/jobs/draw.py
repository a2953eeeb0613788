"""Draw pictures or clips with a bundle, or with decoupled experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timestep_experts.build import BASE_DTYPES, resolve_model
from timestep_experts.config import ClipsConfig
from timestep_experts.data import ClipSettings, PictureSettings
from timestep_experts.formats import Bundle, load_bundle
from timestep_experts.formats.experts import find_experts
from timestep_experts.inference import DrawingCost, SampleSettings, attach, attach_ensemble, counted, sample
from timestep_experts.jobs.media import SHEET, frames_per_second, save_media, save_media_sheet
from timestep_experts.mixture import MODES, Mode
from timestep_experts.models import Family, load_family

_BATCH_SIZE = 16
_STEPS, _GUIDANCE = 20, 3.0


@dataclass(frozen=True)
class DrawSettings:
    """How to draw with a bundle; ``None``: as it was trained, or else as its base draws.

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
        folded: switch with the experts in the base's weights.
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
    folded: bool = False


def draw(bundle: Path, prompts: Sequence[str], output: Path, settings: DrawSettings) -> tuple[list[Path], DrawingCost]:
    """Draw one picture or clip per prompt; returns their paths and, last, the contact sheet's, and the cost.

    Raises:
        ValueError: an unknown mode, or a bundle or base that cannot be used.
    """
    mode: Mode | None = next((known for known in MODES if known == settings.mode), None)
    if settings.mode is not None and (mode is None or mode == "foster"):
        raise ValueError(f"unknown mode {settings.mode!r}: allowed are switch, route and off")
    loaded = load_bundle(bundle)
    if settings.folded and (mode or loaded.mode) != "switch":
        raise ValueError(f"only mode switch can be folded; this is mode {mode or loaded.mode}")
    family = _load_base(settings.model or loaded.base_model, loaded)
    if not family.text_encoders:
        raise ValueError(f"{family.source} is a {type(family.pipeline()).__name__}: it draws nothing for a prompt")
    attach(family.pipeline(), loaded, mode, folded=settings.folded)
    trained = _trained_media(loaded.provenance.get("recipe", {}), family)
    return _draw(family, trained, loaded.provenance, prompts, output, settings)


def _draw(
    family: Family,
    trained: ClipSettings | PictureSettings,
    provenance: Mapping[str, Any],
    prompts: Sequence[str],
    output: Path,
    settings: DrawSettings,
) -> tuple[list[Path], DrawingCost]:
    pipeline = family.pipeline()
    num_frames = trained.num_frames if isinstance(trained, ClipSettings) else None
    if num_frames is None and (settings.num_frames or settings.fps):
        raise ValueError(f"{family.source} draws pictures: num_frames and fps are for video models")
    scheduler, num_steps, guidance, timesteps = _sampler(provenance, settings)
    sampling = SampleSettings(
        scheduler,
        num_steps,
        guidance,
        (settings.height or trained.height, settings.width or trained.width),
        _BATCH_SIZE if num_frames is None else 1,
        settings.seed,
        settings.num_frames or num_frames,
        provenance.get("recipe", {}).get("max_sequence_length"),
        timesteps,
    )
    with counted(pipeline) as cost:
        media = sample(pipeline, prompts, sampling)
    names = [f"{settings.seed + index:06d}" for index in range(len(media))]
    paths = save_media(output, media, names, settings.fps or frames_per_second(trained))
    save_media_sheet(output / SHEET, media, prompts)
    return [*paths, output / SHEET], cost


def draw_ensemble(
    experts: Path, prompts: Sequence[str], output: Path, settings: DrawSettings, resident: str = "one"
) -> tuple[list[Path], DrawingCost, int]:
    """Draw with decoupled experts that are not merged, each at its own timesteps.

    A base without text draws one picture per prompt all the same.

    Args:
        experts: a run's ``decoupled`` folder.
        prompts: one per picture or clip.
        output: where to.
        settings: see there; ``mode`` and ``folded`` do not apply.
        resident: whether ``one`` expert or ``all`` are in memory; see `attach_ensemble`.

    Returns:
        As `draw`, and how often another expert was put into the denoiser.

    Raises:
        ValueError: the experts or the base cannot be used, or a mode or folding is asked for.
    """
    if settings.mode is not None:
        raise ValueError(f"mode {settings.mode!r} is for bundles; an ensemble has one expert at a time")
    if settings.folded:
        raise ValueError("folding is for bundles; an ensemble's experts are whole weights already")
    folders, partition, record = find_experts(experts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = load_family(resolve_model(settings.model or record.base_model), device)
    ensemble = attach_ensemble(family.pipeline(), folders, partition, resident)
    trained = _trained_media(record.provenance.get("recipe", {}), family)
    paths, cost = _draw(family, trained, record.provenance, prompts, output, settings)
    return paths, cost, ensemble.num_swaps


def _sampler(
    provenance: Mapping[str, Any], settings: DrawSettings
) -> tuple[str | None, int, float, tuple[int, ...] | None]:
    """Scheduler, steps, guidance and timesteps: a generator's own where its bundle says so and nobody else does.

    Its timesteps are left with another scheduler or number of steps, and in mode off, in which there is no generator.
    """
    own = provenance.get("sampling") or {} if settings.mode != "off" else {}
    guidance = own.get("guidance_scale", _GUIDANCE) if settings.guidance_scale is None else settings.guidance_scale
    timesteps = tuple(own.get("timesteps") or ())
    if not timesteps or settings.scheduler is not None or settings.num_inference_steps not in (None, len(timesteps)):
        scheduler = settings.scheduler or own.get("scheduler")
        return scheduler, settings.num_inference_steps or len(timesteps) or _STEPS, guidance, None
    return own["scheduler"], len(timesteps), guidance, timesteps


def _load_base(source: str, bundle: Bundle) -> Family:
    """In the dtype, quantised or not, that the experts were trained on; fp32 where the bundle does not say."""
    training = bundle.provenance.get("recipe", {}).get("training", {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = BASE_DTYPES[training.get("base_dtype", "fp32")]
    return load_family(resolve_model(source), device, dtype, training.get("base_quantization"))


def _trained_media(recipe: Mapping[str, Any], family: Family) -> ClipSettings | PictureSettings:
    """What experts were trained on, as far as their recipe says; else what the base draws."""
    height, width = recipe.get("resolution") or family.default_size
    if family.default_num_frames is None:
        return PictureSettings(height, width)
    clips = ClipsConfig(**(recipe.get("data", {}).get("clips") or {}))
    return ClipSettings(clips.num_frames or family.default_num_frames, height, width, clips.fps, clips.stride)
