"""Latents and text features, encoded once and kept as safetensors under a key of content and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from timestep_experts.data.sources import Example, PictureSet, Skipped, list_skipped
from timestep_experts.formats.atomic import write_json, write_tensors
from timestep_experts.models import Family

_CACHE_VERSION = 1
_BATCH = 64


@dataclass(frozen=True)
class PictureSettings:
    """How a picture becomes pixels.

    Args:
        resolution: the side in pixels; the shorter side is resized to it, then the centre is cropped.
        flip: keep a mirrored copy of every picture as a further training row.
    """

    resolution: int
    flip: bool = False


@dataclass(frozen=True)
class EncodedPictures:
    """A dataset as training sees it.

    Args:
        latents: ``(N, c, h, w)`` fp32, scaled; mirrored copies follow the originals.
        caption_rows: ``(N,)`` int64, each picture's row in ``features``.
        features: text features by denoiser argument, ``(M + 1, ...)``; the last row is the empty caption.
        captions: M different captions.
        skipped: what was left out, and why.
        key: hash of contents and settings; empty for data made by hand.
    """

    latents: Tensor
    caption_rows: Tensor
    features: dict[str, Tensor]
    captions: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    key: str = ""

    def __len__(self) -> int:
        return len(self.latents)

    def conditioning(self, rows: Tensor, device: torch.device, dropped: Tensor | None = None) -> dict[str, Tensor]:
        """Text features of pictures, with the empty caption where ``dropped`` (``(B,)`` bool) says so."""
        wanted = self.caption_rows[rows]
        if dropped is not None:
            wanted = torch.where(dropped, len(self.captions), wanted)
        return {name: values[wanted].to(device) for name, values in self.features.items()}


def encode_dataset(pictures: PictureSet, settings: PictureSettings, family: Family, folder: Path) -> EncodedPictures:
    """Encode a dataset, or take it from the cache if neither content nor settings have changed.

    The key covers every file's bytes and caption, the settings, and the weights of the encoders.

    Raises:
        ValueError: no picture can be decoded.
    """
    contents = list(_read_all(pictures.examples))
    key = _key(pictures.examples, contents, settings, family.encoder_fingerprint())
    tensors_path, report_path = folder / f"{key}.safetensors", folder / f"{key}.json"
    if not (tensors_path.is_file() and report_path.is_file()):
        _build(pictures.examples, settings, family, tensors_path, report_path)
    report = json.loads(report_path.read_text(encoding="utf-8"))
    tensors = load_file(tensors_path)
    features = {name.removeprefix("text."): value for name, value in tensors.items() if name.startswith("text.")}
    return EncodedPictures(
        latents=tensors["latents"],
        caption_rows=tensors["caption_rows"],
        features=features,
        captions=tuple(report["captions"]),
        skipped=(*pictures.skipped, *(Skipped(pictures.examples[i].place, why) for i, why in report["skipped"])),
        key=key,
    )


def to_pixels(picture: Image.Image, resolution: int) -> Tensor:
    """Resize the shorter side, crop the centre: ``(3, resolution, resolution)`` fp32 in [-1, 1]."""
    fitted = ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).float() / 127.5 - 1


def _read_all(examples: tuple[Example, ...]) -> Iterator[bytes]:
    for example in examples:
        try:
            yield hashlib.sha256(example.read()).digest()
        except OSError as error:
            yield repr(error).encode()


def _key(examples: tuple[Example, ...], contents: list[bytes], settings: PictureSettings, encoders: str) -> str:
    digest = hashlib.sha256(repr((_CACHE_VERSION, settings, encoders)).encode())
    for example, content in zip(examples, contents, strict=True):
        digest.update(content)
        digest.update(json.dumps(example.caption).encode())
    return digest.hexdigest()[:32]


def _build(
    examples: tuple[Example, ...], settings: PictureSettings, family: Family, tensors_path: Path, report_path: Path
) -> None:
    pixels, kept, skipped = [], [], []
    for row, example in enumerate(tqdm(examples, desc="decoding pictures", unit="picture", leave=False)):
        try:
            pixels.append(to_pixels(example.open(), settings.resolution))
            kept.append(example)
        except OSError as error:
            skipped.append((row, str(error)))  # by row, for files may be renamed
    if not kept:
        listed = [Skipped(examples[row].place, why) for row, why in skipped]
        raise ValueError(f"none of {len(examples)} pictures can be decoded{list_skipped(listed)}")
    captions = sorted({example.caption for example in kept})
    row_of = {caption: row for row, caption in enumerate(captions)}
    caption_rows = torch.tensor([row_of[example.caption] for example in kept])
    stacked = torch.stack(pixels)
    if settings.flip:
        stacked, caption_rows = torch.cat([stacked, stacked.flip(-1)]), caption_rows.repeat(2)
    latents = _in_batches("encoding pictures", len(stacked), lambda rows: family.encode_media(stacked[rows]).cpu())
    features = _encode_captions(family, [*captions, ""])
    write_tensors(
        tensors_path,
        {"latents": latents, "caption_rows": caption_rows, **{f"text.{n}": value for n, value in features.items()}},
    )
    write_json(report_path, {"captions": captions, "skipped": skipped})


def _encode_captions(family: Family, captions: list[str]) -> dict[str, Tensor]:
    starts = tqdm(range(0, len(captions), _BATCH), desc="encoding captions", unit="batch", leave=False)
    parts = [family.encode_captions(captions[start : start + _BATCH]) for start in starts]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def _in_batches(what: str, count: int, encode: Callable[[slice], Tensor]) -> Tensor:
    starts = tqdm(range(0, count, _BATCH), desc=what, unit="batch", leave=False)
    return torch.cat([encode(slice(start, start + _BATCH)) for start in starts])
