"""Clips as files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import atomic_path
from timestep_experts.formats.video import require_av


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """Write a clip as H.264 that browsers play, atomically.

    Args:
        path: of the file.
        frames: ``(F, H, W, 3)`` RGB; H and W even, for colour is kept at half the resolution.
        fps: frames per second.

    Raises:
        UserError: another shape, no frames, a rate that is not positive, or PyAV is not installed.
    """
    av = require_av()
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise UserError(f"a clip needs frames of shape (F, H, W, 3) with F >= 1 and even H and W; got {frames.shape}")
    if not fps > 0:
        raise UserError(f"a clip needs a positive number of frames per second; got {fps}")
    with atomic_path(path) as draft, av.open(str(draft), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "17"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
