"""Pictures for people: contact sheets, and pictures inside a page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import atomic_path

MIN_SIDE, MAX_SIDE = 160, 512
_MARGIN = 16
_FONT_SIZE = 13
_LINE_HEIGHT = 18
_INK, _PAPER = (45, 52, 60), (255, 255, 255)


def save_sheet(path: Path, pictures: NDArray[np.uint8], captions: Sequence[str], columns: int = 4) -> None:
    """Write a contact sheet, atomically: pictures in rows, each with its whole caption underneath.

    Args:
        path: of the PNG.
        pictures: ``(N, H, W, 3)`` RGB, N at least 1; shown between 160 and 512 pixels wide.
        captions: N of them.
        columns: pictures per row.

    Raises:
        UserError: no pictures, another shape, another number of captions, or fewer than one column.
    """
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or not len(pictures):
        raise UserError(f"a sheet needs pictures of shape (N, H, W, 3) with N >= 1; got {pictures.shape}")
    if len(captions) != len(pictures):
        raise UserError(f"a sheet needs one caption per picture; got {len(captions)} for {len(pictures)} pictures")
    if columns < 1:
        raise UserError(f"a sheet needs at least 1 column; got {columns}")
    sheet = _compose([resize_to_view(picture) for picture in pictures], captions, min(columns, len(pictures)))
    with atomic_path(path) as draft:
        sheet.save(draft, format="PNG")


def resize_to_view(picture: NDArray[np.uint8], min_side: int = MIN_SIDE, max_side: int = MAX_SIDE) -> Image.Image:
    """Enlarge a small ``(H, W, 3)`` picture by a whole factor to at least ``min_side`` pixels wide, shrink a large one.

    Lanczos: pictures of 32 to 64 pixels stay sharp without showing their pixels as blocks.
    """
    image = Image.fromarray(picture)
    scale = min(float(max(math.ceil(min_side / image.width), 1)), max_side / image.width)
    if scale == 1:
        return image
    size = (round(image.width * scale), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS)


def to_data_uri(picture: NDArray[np.uint8]) -> str:
    """An ``(H, W, 3)`` picture, or an ``(F, H, W, 3)`` clip that moves, as a ``data:`` address, 128 to 256 pixels wide.

    A picture is a PNG; a clip is an animated WebP of 8 frames per second, which repeats.
    """
    buffer = io.BytesIO()
    if picture.ndim == 3:
        resize_to_view(picture, 128, 256).save(buffer, format="PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    first, *others = (resize_to_view(frame, 128, 256) for frame in picture)
    first.save(buffer, format="WEBP", save_all=True, append_images=others, duration=125, loop=0, quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _compose(images: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    width, height = images[0].size
    font = _font()
    texts = [_wrap(caption, width, font) for caption in captions]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    row_heights = [height + 6 + _LINE_HEIGHT * max(len(texts[i]) for i in row) + _MARGIN for row in rows]
    sheet = Image.new("RGB", (_MARGIN + columns * (width + _MARGIN), _MARGIN + sum(row_heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, row_height in zip(rows, row_heights, strict=True):
        for place, i in enumerate(row):
            left = _MARGIN + place * (width + _MARGIN)
            sheet.paste(images[i], (left, top))
            for line, text in enumerate(texts[i]):
                draw.text((left, top + height + 6 + line * _LINE_HEIGHT), text, _INK, font)
        top += row_height
    return sheet


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _FONT_SIZE)


def _wrap(caption: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most ``width`` pixels, broken between words, or within a word that is longer than a line."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
