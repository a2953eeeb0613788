"""Pictures and clips as files: ``<name>.png`` or ``<name>.mp4`` each, and a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from timestep_experts.data import ClipSettings, DecodeSettings, Example, decode_all
from timestep_experts.inference import write_mp4
from timestep_experts.report import save_clip_sheet, save_sheet

DEFAULT_FPS = 8.0
SHEET = "sheet.png"


def save_samples(
    folder: Path, samples: NDArray[np.uint8], names: Sequence[str], fps: float = DEFAULT_FPS
) -> list[Path]:
    """Write each picture ``(N, H, W, 3)`` or clip ``(N, F, H, W, 3)`` under its name; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    is_video = samples.ndim == 5
    paths = [folder / f"{name}.{'mp4' if is_video else 'png'}" for name in names]
    for path, item in zip(paths, samples, strict=True):
        if is_video:
            write_mp4(path, item, fps)
        else:
            Image.fromarray(item).save(path)
    return paths


def save_sample_sheet(path: Path, samples: NDArray[np.uint8], captions: Sequence[str]) -> None:
    """A contact sheet of pictures, or of clips with their frames side by side."""
    (save_clip_sheet if samples.ndim == 5 else save_sheet)(path, samples, captions)


def load_samples(folder: Path, count: int, settings: DecodeSettings) -> NDArray[np.uint8]:
    """The first so many of what `save_samples` wrote."""
    suffix = "mp4" if isinstance(settings, ClipSettings) else "png"
    paths = sorted(folder.glob(f"*.{suffix}"))[:count]
    if not paths:
        return np.zeros((0, 1, 1, 3), np.uint8)
    if isinstance(settings, ClipSettings):
        settings = ClipSettings(settings.num_frames, settings.height, settings.width)
    return decode_all([Example(str(path), "sampled", path.read_bytes) for path in paths], settings)


def frames_per_second(settings: DecodeSettings) -> float:
    """Of clips like those that were trained on; 8 where they were read at their own rate."""
    if isinstance(settings, ClipSettings) and settings.fps is not None:
        return settings.fps / settings.stride
    return DEFAULT_FPS


def as_pictures(samples: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures as they are, clips as all their frames: ``(M, H, W, 3)``."""
    return samples.reshape(-1, *samples.shape[-3:])
