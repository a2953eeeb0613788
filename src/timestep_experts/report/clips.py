"""Clips for people: frames side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from timestep_experts.errors import UserError
from timestep_experts.report.pictures import save_sheet


def save_clip_sheet(path: Path, clips: NDArray[np.uint8], captions: Sequence[str], columns: int = 8) -> None:
    """Write a contact sheet, atomically: a row per clip, evenly spaced frames from the first to the last.

    Args:
        path: of the PNG.
        clips: ``(N, F, H, W, 3)`` RGB, N and F at least 1.
        captions: N of them, each under its clip's first frame.
        columns: frames per clip; all of them where a clip has fewer.

    Raises:
        UserError: no clips, another shape, another number of captions, or fewer than one column.
    """
    if clips.ndim != 5 or clips.shape[-1] != 3 or not clips.size:
        raise UserError(f"a sheet needs clips of shape (N, F, H, W, 3) with N and F >= 1; got {clips.shape}")
    if len(captions) != len(clips):
        raise UserError(f"a sheet needs one caption per clip; got {len(captions)} for {len(clips)} clips")
    if columns < 1:
        raise UserError(f"a sheet needs at least 1 column; got {columns}")
    columns = min(columns, clips.shape[1])
    shown = clips[:, np.linspace(0, clips.shape[1] - 1, columns).round().astype(int)]
    texts = [text for caption in captions for text in (caption, *[""] * (columns - 1))]
    save_sheet(path, shown.reshape(-1, *clips.shape[2:]), texts, columns)
