"""Latents and text features, encoded once and kept as safetensors under a key of content and settings."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from timestep_experts.data.sources import Dataset, Example, Skipped, list_skipped
from timestep_experts.errors import UserError
from timestep_experts.formats.locks import only_process_in
from timestep_experts.formats.sealed import (
    DamagedError,
    read_sealed_json,
    read_sealed_tensors,
    write_sealed_json,
    write_sealed_tensors,
)
from timestep_experts.models import Family
from timestep_experts.models.encoding import CutCaptions

_CACHE_VERSION = 4
_BATCH = 64
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class DecodeSettings(Protocol):
    """How an example becomes pixels; its ``repr`` is part of the cache's key."""

    kind: ClassVar[str]

    @property
    def flip(self) -> bool:
        """Whether a mirrored copy of everything is a further training row."""
        ...

    def decode(self, example: Example) -> Tensor:
        """Pixels in [-1, 1], fp32, of the same shape for all examples.

        Raises:
            OSError: this example cannot be used; says why.
        """
        ...


@dataclass(frozen=True)
class PictureSettings:
    """How a picture becomes pixels.

    Args:
        height: in pixels.
        width: in pixels; a picture is resized to cover both, then its centre is cropped.
        flip: keep a mirrored copy of every picture as a further training row.
    """

    kind: ClassVar[str] = "picture"

    height: int
    width: int
    flip: bool = False

    def decode(self, example: Example) -> Tensor:
        """``(3, height, width)``; see `DecodeSettings`."""
        return to_pixels(example.open(), self.height, self.width)


@dataclass(frozen=True)
class EncodedDataset:
    """A dataset as training sees it.

    Args:
        latents: ``(N, c, h, w)``, of clips ``(N, c, f, h, w)``, fp32, scaled; mirrored copies follow the originals.
        caption_rows: ``(N,)`` int64, each picture's row in ``features``.
        features: text features by denoiser argument, ``(M + 1, ...)``; the last row is the empty caption.
        captions: M different captions.
        is_tokenised: ``features`` holds token ids, for text encoders that carry experts; `Family.features_at` encodes.
        skipped: what was left out, and why.
        cut: captions that are longer than text encoders read.
        key: hash of contents and settings; empty for data made by hand.
    """

    latents: Tensor
    caption_rows: Tensor
    features: dict[str, Tensor]
    captions: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    cut: tuple[CutCaptions, ...] = ()
    key: str = ""
    is_tokenised: bool = False

    def __len__(self) -> int:
        return len(self.latents)

    def conditioning(self, rows: Tensor, device: torch.device, dropped: Tensor | None = None) -> dict[str, Tensor]:
        """Text features of pictures, with the empty caption where ``dropped`` (``(B,)`` bool) says so."""
        wanted = self.caption_rows[rows]
        if dropped is not None:
            wanted = torch.where(dropped, len(self.captions), wanted)
        return {name: values[wanted].to(device) for name, values in self.features.items()}

    def features_at(self, family: Family, rows: Tensor, t: Tensor, dropped: Tensor | None = None) -> dict[str, Tensor]:
        """What the denoiser is given: the kept features, or those of the text encoders' experts of ``t (B,)``."""
        kept = self.conditioning(rows, t.device, dropped)
        return family.features_at(kept, t) if self.is_tokenised else kept


def encode_dataset(
    dataset: Dataset, settings: DecodeSettings, family: Family, folder: Path, *, as_tokens: bool = False
) -> EncodedDataset:
    """Encode pictures or clips, or take it from the cache if neither content nor settings have changed.

    The key covers every file's bytes and caption, the settings, and the weights of the encoders.

    Args:
        dataset: what to encode.
        settings: see `DecodeSettings`.
        family: its encoders are used.
        folder: the folder of the cache.
        as_tokens: keep captions as token ids, for text encoders that are to change.

    Raises:
        UserError: none can be decoded.
    """
    contents = list(_read_all(dataset.examples))
    key = _key(dataset.examples, contents, settings, f"{family.encoder_fingerprint()}{as_tokens}")
    tensors_path, report_path = folder / f"{key}.safetensors", folder / f"{key}.json"
    with only_process_in(folder, waits=True):
        found = _read(tensors_path, report_path)
        if found is None:
            _build(dataset.examples, settings, family, as_tokens, tensors_path, report_path)
            found = read_sealed_tensors(tensors_path), read_sealed_json(report_path)
    tensors, report = found
    features = {name.removeprefix("text."): value for name, value in tensors.items() if name.startswith("text.")}
    return EncodedDataset(
        latents=tensors["latents"],
        caption_rows=tensors["caption_rows"],
        features=features,
        captions=tuple(report["captions"]),
        skipped=(*dataset.skipped, *(Skipped(dataset.examples[i].place, why) for i, why in report["skipped"])),
        cut=tuple(CutCaptions(**found) for found in report["cut"]),
        key=key,
        is_tokenised=as_tokens,
    )


def _read(tensors_path: Path, report_path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What was encoded earlier; ``None`` if nothing was, or if it is damaged."""
    if not (tensors_path.is_file() and report_path.is_file()):
        return None
    try:
        return read_sealed_tensors(tensors_path), read_sealed_json(report_path)
    except DamagedError as error:
        warnings.warn(f"{error}. It is encoded again", stacklevel=3)
        return None


def halves_by_caption(dataset: EncodedDataset, seed: int) -> tuple[EncodedDataset, EncodedDataset]:
    """Two halves that share no caption, to choose something on one and confirm it on the other.

    Args:
        dataset: of at least two pictures.
        seed: decides which half a caption goes to or, where all have the same caption, which half a picture goes to.

    Raises:
        UserError: there is only one picture.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = dataset.caption_rows
    labels = rows if bool((rows != rows[0]).any()) else torch.arange(len(dataset))
    kinds: Tensor = torch.unique(labels)
    chosen = kinds[torch.randperm(len(kinds), generator=generator)][: len(kinds) // 2]
    is_first = torch.isin(labels, chosen)
    if not is_first.any():
        raise UserError(f"{len(dataset)} validation pictures cannot be halved: at least two are needed")
    return _rows(dataset, is_first), _rows(dataset, ~is_first)


def _rows(dataset: EncodedDataset, wanted: Tensor) -> EncodedDataset:
    return replace(dataset, latents=dataset.latents[wanted], caption_rows=dataset.caption_rows[wanted], key="")


def to_pixels(picture: Image.Image, height: int, width: int) -> Tensor:
    """Resize to cover ``height x width``, crop the centre: ``(3, H, W)`` fp32 in [-1, 1]."""
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).float() / 127.5 - 1


def decode_all(examples: Sequence[Example], settings: DecodeSettings) -> NDArray[np.uint8]:
    """Pictures ``(N, H, W, 3)`` or clips ``(N, F, H, W, 3)`` for people and metrics; unusable examples are left out."""
    decoded = []
    for example in examples:
        try:
            pixels = settings.decode(example)
        except OSError:
            continue  # listed among the skipped ones since the latents were made
        decoded.append(((pixels + 1) * 127.5).round().byte().movedim(0, -1).numpy())
    return np.stack(decoded)


def _read_all(examples: tuple[Example, ...]) -> Iterator[bytes]:
    for example in examples:
        try:
            yield hashlib.sha256(example.read()).digest()
        except OSError as error:
            yield repr(error).encode()


def _key(examples: tuple[Example, ...], contents: list[bytes], settings: DecodeSettings, encoders: str) -> str:
    digest = hashlib.sha256(repr((_CACHE_VERSION, settings, encoders)).encode())
    for example, content in zip(examples, contents, strict=True):
        digest.update(content)
        digest.update(json.dumps(example.caption).encode())
    return digest.hexdigest()[:32]


def _build(
    examples: tuple[Example, ...],
    settings: DecodeSettings,
    family: Family,
    as_tokens: bool,
    tensors_path: Path,
    report_path: Path,
) -> None:
    kept: list[Example] = []
    skipped: list[tuple[int, str]] = []
    latents, mirrored = [], []
    decoded = _decode_all(examples, settings, kept, skipped)
    while batch := list(islice(decoded, 1 if family.is_video else _BATCH)):  # a clip is a batch of frames already
        pixels = torch.stack(batch)
        latents.append(family.encode_pixels(pixels).cpu())
        _require_finite(latents[-1], [example.place for example in kept[-len(batch) :]], "latents", family)
        if settings.flip:
            mirrored.append(family.encode_pixels(pixels.flip(-1)).cpu())
    if not kept:
        listed = [Skipped(examples[row].place, why) for row, why in skipped]
        raise UserError(f"none of {len(examples)} {settings.kind}s can be decoded{list_skipped(listed)}")
    captions = sorted({example.caption for example in kept})
    row_of = {caption: row for row, caption in enumerate(captions)}
    caption_rows = torch.tensor([row_of[example.caption] for example in kept])
    features = _in_parts([*captions, family.no_caption], family.tokenize if as_tokens else family.encode_captions)
    for value in features.values():
        _require_finite(value, [f"caption {caption!r}" for caption in [*captions, ""]], "text features", family)
    write_sealed_tensors(
        tensors_path,
        {
            "latents": torch.cat([*latents, *mirrored]),
            "caption_rows": caption_rows.repeat(2) if settings.flip else caption_rows,
            **{f"text.{name}": value for name, value in features.items()},
        },
    )
    cut = [asdict(found) for found in family.cut_captions(captions)]
    write_sealed_json(report_path, {"captions": captions, "skipped": skipped, "cut": cut})


def _require_finite(values: Tensor, places: Sequence[str], what: str, family: Family) -> None:
    wrong = [place for place, value in zip(places, values, strict=True) if not value.isfinite().all()]
    if wrong:
        raise UserError(
            f"{wrong[0]}: its {what} are not finite"
            + f", and {len(wrong) - 1} more" * (len(wrong) > 1)
            + f" ({family.source})."
            " Half precision overflows in some encoders, in the autoencoder of SDXL in fp16 for one: load the base in"
            " fp32 or bf16"
        )


def _decode_all(
    examples: tuple[Example, ...], settings: DecodeSettings, kept: list[Example], skipped: list[tuple[int, str]]
) -> Iterator[Tensor]:
    """Pixels one by one; each example ends up among the kept or, by its row, for files may be renamed, the skipped."""
    for row, example in enumerate(tqdm(examples, f"encoding {settings.kind}s", unit=settings.kind, leave=False)):
        try:
            pixels = settings.decode(example)
        except OSError as error:
            skipped.append((row, _ADDRESS.sub("", str(error))))  # else no two runs would say the same
        else:
            kept.append(example)
            yield pixels


def _in_parts(captions: list[str], encode: Callable[[list[str]], dict[str, Tensor]]) -> dict[str, Tensor]:
    starts = tqdm(range(0, len(captions), _BATCH), desc="encoding captions", unit="batch", leave=False)
    parts = [encode(captions[start : start + _BATCH]) for start in starts]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
