"""Where captioned clips come from, and how a clip becomes pixels; PyAV reads them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from timestep_experts.data.cache import to_pixels
from timestep_experts.data.sources import (
    Dataset,
    Example,
    Skipped,
    check_row,
    find_files,
    list_skipped,
    pair_with_text,
    read_table,
)
from timestep_experts.errors import UserError
from timestep_experts.formats.video import require_av

CLIP_SUFFIXES = frozenset({".mp4", ".m4v", ".webm", ".gif", ".mov", ".mkv", ".avi", ".ts"})
NAME_COLUMNS = ("video", "file_name")

_LEAST_SHARE = 0.9  # of the length that a file promises; headers round


@dataclass(frozen=True)
class ClipSettings:
    """How a clip becomes pixels: evenly spaced frames from its middle, each resized to cover and cropped.

    Args:
        num_frames: F.
        height: in pixels.
        width: in pixels.
        fps: the rate in 1/s at which a clip is read, the nearest frame each time; ``None`` reads its own frames.
        stride: one of so many of those is taken.
        flip: keep a mirrored copy of every clip as a further training row.

    Raises:
        UserError: one of them is not positive.
    """

    kind: ClassVar[str] = "clip"

    num_frames: int
    height: int
    width: int
    fps: float | None = None
    stride: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "fps", "stride"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"clips need a positive {name}; got {value}")

    def decode(self, example: Example) -> Tensor:
        """``(3, F, H, W)`` fp32 in [-1, 1].

        Raises:
            OSError: missing, damaged, too short, slower than it is to be read, or no clip at all.
            UserError: PyAV is not installed.
        """
        frames = read_frames(example.read(), self)
        return torch.stack([to_pixels(frame, self.height, self.width) for frame in frames], 1)


def open_clips(path: str, *, max_samples: int | None = None) -> Dataset:
    """Find captioned clips: files with one of `CLIP_SUFFIXES`.

    Args:
        path: a folder with a same-stem ``.txt`` beside each clip, or with one table (a ``.csv`` or ``metadata.jsonl``),
            or such a table. It has a column ``video`` or ``file_name`` and one of ``text``, ``caption``, ``prompt``, as
            OpenVid's. A clip lies where the table says, or anywhere below its folder if no other has its name.
        max_samples: use the first so many; ``None`` means all.

    Raises:
        UserError: no folder or table, several tables, or nothing usable; names what was skipped.
    """
    place = Path(path).expanduser()
    tables = [place] if place.is_file() else sorted({*place.glob("*.csv"), *place.glob("metadata.jsonl")})
    folder = place.parent if place.is_file() else place
    if not folder.is_dir() or any(table.suffix not in (".csv", ".jsonl") for table in tables):
        raise UserError(f"{path!r} is neither a folder of clips nor a .csv or .jsonl table of them")
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise UserError(f"{path!r} holds {len(tables)} tables: {names}; name the one to use")
    clips, unusable = find_files(folder, CLIP_SUFFIXES)
    found = [*unusable, *(_listed(folder, tables[0], clips) if tables else map(pair_with_text, clips))]
    examples = tuple(item for item in found if isinstance(item, Example))[:max_samples]
    skipped = tuple(item for item in found if isinstance(item, Skipped))
    if not examples:
        raise UserError(f"no usable captioned clip in {path!r}{list_skipped(skipped)}")
    return Dataset(examples, skipped)


def read_frames(content: bytes, settings: ClipSettings) -> list[Image.Image]:
    """The frames that settings ask for, RGB, in order; transparency is laid on white.

    Raises:
        OSError: see `ClipSettings.decode`.
        UserError: PyAV is not installed.
    """
    av = require_av()
    try:
        with av.open(io.BytesIO(content), metadata_errors="replace") as container:
            times = _times(container)
        stamps = sorted(times)
        wanted = [stamps[i] for i in choose_frames([times[stamp] for stamp in stamps], settings)]
        with av.open(io.BytesIO(content), metadata_errors="replace") as container:
            frames = dict(_decode(container, wanted))
    except (OSError, MemoryError) as error:
        if isinstance(error, av.FFmpegError):
            raise OSError(f"not a readable clip: {error}") from error
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise OSError(f"not a readable clip: {error or type(error).__name__}") from error
    if len(frames) < len(wanted):
        raise OSError(f"damaged: {len(wanted) - len(frames)} of {len(wanted)} frames cannot be decoded")
    return [frames[stamp] for stamp in wanted]


def choose_frames(times: Sequence[float], settings: ClipSettings) -> list[int]:
    """Which frames of a clip are used.

    Args:
        times: when each frame is shown, ascending, in seconds.
        settings: of which the number of frames, the rate and the stride count.

    Returns:
        ``num_frames`` different numbers, counted from 0.

    Raises:
        OSError: the clip is too short, or so slow that frames would be used twice.
    """
    shown = np.asarray(times, dtype=np.float64) - (times[0] if times else 0)
    num_shown = len(times)
    rate = (num_shown - 1) / shown[-1] if num_shown > 1 and shown[-1] > 0 else 0.0
    if settings.fps is None:
        available, at = num_shown, ""
    else:
        duration = num_shown / rate if rate else 0.0
        available, at = int(duration * settings.fps + 1e-6), f" at {settings.fps:g} per second"
    span = (settings.num_frames - 1) * settings.stride + 1
    if available < span:
        raise OSError(f"too short: {available} frames{at}, {span} are needed")
    positions = (available - span) // 2 + settings.stride * np.arange(settings.num_frames)
    if settings.fps is None:
        return [int(i) for i in positions]
    nearest = np.abs(shown[:, None] - positions / settings.fps).argmin(0)
    if len(set(nearest.tolist())) < settings.num_frames:
        raise OSError(f"too slow: {rate:.3g} frames per second, read at {settings.fps / settings.stride:g}")
    return [int(i) for i in nearest]


def _times(container: Any) -> dict[int, float]:
    """When each frame is shown, in seconds, by its time stamp; all of them must be there."""
    stream = _stream(container)
    lasts = {packet.pts: packet.duration or 0 for packet in container.demux(stream) if packet.pts is not None}
    unit = float(stream.time_base or 1)
    seconds = unit * (max(stamp + last for stamp, last in lasts.items()) - min(lasts)) if lasts else 0.0
    promised = unit * (stream.duration or 0)
    if not promised and len(container.streams) == 1:  # else it may be the sound's
        promised = (container.duration or 0) / 1e6
    if seconds < _LEAST_SHARE * promised:
        raise OSError(f"cut off: {seconds:.3g} of {promised:.3g} seconds are there")
    return {stamp: stamp * unit for stamp in lasts}


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise OSError("not a readable clip: it has no video")
    return container.streams.video[0]


def _decode(container: Any, wanted: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    left = set(wanted)
    for frame in container.decode(_stream(container)):
        if frame.pts in left:
            left.remove(frame.pts)
            yield frame.pts, _to_picture(frame)
        if not left:
            return


def _to_picture(frame: Any) -> Image.Image:
    if not any(component.is_alpha for component in frame.format.components):
        return Image.fromarray(frame.to_ndarray(format="rgb24"))
    layer = Image.fromarray(frame.to_ndarray(format="rgba"))
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _listed(folder: Path, table: Path, clips: Sequence[Path]) -> Iterator[Example | Skipped]:
    places: dict[str, list[Path]] = {}
    for clip in clips:
        places.setdefault(clip.name, []).append(clip)
    named = set()
    for place, row in read_table(table):
        if isinstance(row, str):
            yield Skipped(place, row)
            continue
        found = _find(folder, row, places)
        if isinstance(found, str):
            yield Skipped(place, found)
            continue
        named.add(found)
        yield check_row(found, place, row)
    for clip in clips:
        if clip not in named:
            yield Skipped(str(clip), f"no row in {table.name}")


def _find(folder: Path, row: Mapping[str, Any], places: Mapping[str, Sequence[Path]]) -> Path | str:
    """The clip that a row is about, or why there is none."""
    name = next((str(row[column]) for column in NAME_COLUMNS if row.get(column)), None)
    if name is None:
        return f"no {' or '.join(NAME_COLUMNS)}"
    if (folder / name).is_file() or name not in places:
        return folder / name
    if len(places[name]) > 1:
        return f"{len(places[name])} clips are called {name}"
    return places[name][0]
