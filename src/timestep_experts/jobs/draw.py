"""Draw pictures with a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from timestep_experts.build import resolve_model
from timestep_experts.formats import load_bundle
from timestep_experts.inference import SampleSettings, attach, sample
from timestep_experts.mixture import MODES, Mode
from timestep_experts.models import load_family
from timestep_experts.report import save_sheet


def draw(
    bundle: Path,
    prompts: Sequence[str],
    output: Path,
    model: str | None,
    mode: str | None,
    num_inference_steps: int,
    guidance_scale: float,
    scheduler: str | None,
    seed: int,
) -> list[Path]:
    """Draw one picture per prompt; returns their paths and, last, the contact sheet's.

    Raises:
        ValueError: an unknown mode, or a bundle or base that cannot be used.
    """
    chosen: Mode | None = next((known for known in MODES if known == mode), None)
    if mode is not None and (chosen is None or chosen == "foster"):
        raise ValueError(f"unknown mode {mode!r}: allowed are switch, route and off")
    loaded = load_bundle(bundle)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = load_family(resolve_model(model or loaded.base_model), device)
    if not family.text_encoders:
        raise ValueError(f"{family.source} is a {type(family.pipeline()).__name__}: it draws nothing for a prompt")
    pipeline = family.pipeline()
    attach(pipeline, loaded, chosen)
    settings = SampleSettings(scheduler, num_inference_steps, guidance_scale, family.default_resolution, 16, seed)
    pictures = sample(pipeline, prompts, settings)
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{seed + index:06d}.png" for index in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    save_sheet(output / "sheet.png", pictures, prompts)
    return [*paths, output / "sheet.png"]
