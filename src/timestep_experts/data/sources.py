"""Where captioned pictures come from: a folder, a metadata file, a Hugging Face dataset, or the embedded world.

Whatever cannot be used is kept as a `Skipped` with its place and the reason; nothing is dropped silently.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from timestep_experts.errors import UserError
from timestep_experts.world.render import DOMAINS, render
from timestep_experts.world.scenes import draw_scenes

PICTURE_SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
})  # fmt: skip
CAPTION_COLUMNS = ("text", "caption", "prompt")
WORLD_PREFIX = "world/"

_COMPANIONS = frozenset({".txt", ".caption", ".json", ".jsonl", ".csv", ".yaml", ".toml", ".npz", ".safetensors"})
"""Files that trainers put beside a picture and that are no pictures."""
_LONGEST_FIELD = 2**31 - 1  # of a table; the csv module allows 128 KiB unless it is told otherwise


@dataclass(frozen=True)
class Example:
    """One captioned picture or clip.

    Args:
        place: where it is, for people: a path, or a row of a dataset.
        caption: never empty.
        read: gives the encoded file's bytes; called when the picture is needed.
    """

    place: str
    caption: str
    read: Callable[[], bytes]

    def open(self) -> Image.Image:
        """Decode a picture to RGB; transparency is laid on white.

        Raises:
            OSError: missing, truncated or not a picture.
        """
        content = self.read()
        try:
            picture: Image.Image = Image.open(io.BytesIO(content))
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
        except MemoryError:
            raise
        except UnidentifiedImageError as error:  # its text holds an address in memory
            raise OSError("not a readable picture: no known format") from error
        except Exception as error:  # a decoder may raise anything on a damaged file: TypeError, struct.error, ...
            raise OSError(f"not a readable picture: {error or type(error).__name__}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # which convert() would clip, not scale
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


@dataclass(frozen=True)
class Skipped:
    """Something found that cannot be used, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Usable examples in a fixed order, and what was skipped on the way."""

    examples: tuple[Example, ...]
    skipped: tuple[Skipped, ...]


def open_dataset(path: str, *, max_samples: int | None, seed: int, held_out: bool = False) -> Dataset:
    """Find captioned pictures.

    Args:
        path: ``world/flat`` or ``world/neon`` (the embedded world); a folder with ``metadata.jsonl`` or
            ``metadata.csv`` (column ``file_name`` and one of ``text``, ``caption``, ``prompt``) or with a same-stem
            ``.txt`` beside each picture; a dataset saved by ``datasets``, or the id of one on the hub.
        max_samples: use the first so many; ``None`` means all (2,048 of an endless world).
        seed: of the embedded world's pictures.
        held_out: draw the embedded world's held-out captions; other sources have no such set.

    Raises:
        UserError: nothing usable is there; names what was skipped.
    """
    if path.startswith(WORLD_PREFIX):
        return _world(path.removeprefix(WORLD_PREFIX), max_samples or 2048, seed, held_out)
    folder = Path(path).expanduser()
    is_plain_folder = folder.is_dir() and not _is_saved_dataset(folder)
    found = list(_folder(folder) if is_plain_folder else _hugging_face(str(folder) if folder.exists() else path))
    examples = tuple(item for item in found if isinstance(item, Example))[:max_samples]
    skipped = tuple(item for item in found if isinstance(item, Skipped))
    if not examples:
        raise UserError(f"no usable captioned picture in {path!r}{list_skipped(skipped)}")
    return Dataset(examples, skipped)


def split_by_caption(dataset: Dataset, held_out_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Set aside a share of the captions, with all their pictures: (training, validation).

    A caption's side depends on its text and the seed alone, so adding pictures moves none. That may leave one side
    empty, as it does where every caption is the same trigger word. Then a share of the pictures is set aside instead,
    and a picture's side depends on its bytes and the seed.

    Raises:
        UserError: one of the sides would be empty either way.
    """
    for label_of in (_caption_of, _content_of):
        sides: tuple[list[Example], list[Example]] = ([], [])
        for example in dataset.examples:
            digest = hashlib.sha256(f"{seed}:".encode() + label_of(example)).digest()
            sides[int.from_bytes(digest[:4], "big") < held_out_share * 2**32].append(example)
        if all(sides):
            return Dataset(tuple(sides[0]), dataset.skipped), Dataset(tuple(sides[1]), ())
    raise UserError(
        f"setting aside {held_out_share:.0%} of {len(dataset.examples)} pictures leaves no"
        f" {'training' if not sides[0] else 'validation'} picture, by their captions or one by one; set"
        " recipe.data.validation_share to another share, or recipe.data.validation_path to a validation set of its own"
    )


def _caption_of(example: Example) -> bytes:
    return example.caption.encode()


def _content_of(example: Example) -> bytes:
    try:
        return hashlib.sha256(example.read()).digest()
    except OSError:  # it is skipped when it is decoded
        return example.place.encode()


def list_skipped(skipped: Sequence[Skipped], limit: int = 10) -> str:
    """A listing for messages: count, then places and reasons, at most ``limit`` of them."""
    if not skipped:
        return ""
    lines = [f"\n  {item.place}: {item.reason}" for item in skipped[:limit]]
    rest = len(skipped) - limit
    return f"; skipped {len(skipped)}:" + "".join(lines) + (f"\n  ... and {rest} more" if rest > 0 else "")


def find_files(folder: Path, suffixes: Collection[str]) -> tuple[list[Path], list[Skipped]]:
    """All files with these suffixes below a folder, linked folders included, in the order of their paths.

    Args:
        folder: where to look.
        suffixes: in lower case, with their dots.

    Returns:
        The files, and what was left out: files of another kind with a caption beside them, links that lead back to a
        folder above them, and folders that cannot be read.
    """
    found: list[Path] = []
    skipped: list[Skipped] = []

    def note(error: OSError) -> None:
        skipped.append(Skipped(str(error.filename), f"cannot be read: {error.strerror}"))

    for place, folders, names in os.walk(folder, onerror=note, followlinks=True):
        here = Path(place)
        looping = [name for name in folders if (here / name).is_symlink() and _leads_back(here / name, folder)]
        skipped += [Skipped(str(here / name), "a link back to a folder above it") for name in looping]
        folders[:] = [name for name in folders if name not in looping]
        captioned = {Path(name).stem for name in names if name.endswith(".txt")}
        for path in map(here.joinpath, names):
            suffix = path.suffix.lower()
            if suffix in suffixes:
                found.append(path)
            elif suffix not in _COMPANIONS and path.stem in captioned:
                skipped.append(Skipped(str(path), f"files of type {suffix or 'unknown'} cannot be read"))
        found += [here / name for name in folders if Path(name).suffix.lower() in suffixes]  # called like a picture
    return sorted(found), sorted(skipped, key=lambda item: item.place)


def _leads_back(link: Path, top: Path) -> bool:
    """Whether a linked folder below ``top`` holds one of the folders through which it was reached."""
    target = link.resolve()
    reached = [place for place in link.parents if place == top or top in place.parents]
    return any(place.resolve().is_relative_to(target) for place in reached)


def _folder(folder: Path) -> Iterator[Example | Skipped]:
    pictures, skipped = find_files(folder, PICTURE_SUFFIXES)
    yield from skipped
    table = next((folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()), None)
    if table is None:
        yield from map(pair_with_text, pictures)
        return
    named = set()
    for place, row in read_table(table):
        named.add(folder / str(row.get("file_name")) if isinstance(row, Mapping) else None)
        yield _listed(folder, place, row)
    for path in pictures:
        if path not in named:
            yield Skipped(str(path), f"no row in {table.name}")


def read_table(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Each row of a ``.csv`` or ``.jsonl`` with its place; a row that cannot be read is the reason why."""
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    if path.suffix == ".csv":
        for number, fields in enumerate(_csv_rows(text), 2):
            is_text = isinstance(fields, str) or _is_utf8("".join(map(str, fields.values())))
            yield f"{path}:{number}", fields if is_text else "not UTF-8 text"
        return
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold what splitlines() takes for an end of line
        if line.strip():
            yield f"{path}:{number}", _parse_row(line)


def _csv_rows(text: str) -> list[Mapping[str, Any] | str]:
    """The rows of a ``.csv``; a row that cannot be parsed is the reason why."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows: list[Mapping[str, Any] | str] = []
    with _fields_of_any_length():
        while True:
            try:
                rows.append(next(reader))
            except csv.Error as error:
                rows.append(f"not CSV: {error}")
            except StopIteration:
                return rows


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parse_row(line: str) -> Mapping[str, Any] | str:
    if not _is_utf8(line):
        return "not UTF-8 text"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else "not a JSON object"


def _is_utf8(text: str) -> bool:
    return not any("\udc80" <= letter <= "\udcff" for letter in text)


def _listed(folder: Path, place: str, row: Mapping[str, Any] | str) -> Example | Skipped:
    if isinstance(row, str):
        return Skipped(place, row)
    if not row.get("file_name"):
        return Skipped(place, "no file_name")
    return check_row(folder / str(row["file_name"]), place, row)


def check_row(path: Path, place: str, row: Mapping[str, Any]) -> Example | Skipped:
    """A file with the caption in a row of a table."""
    column = next((name for name in CAPTION_COLUMNS if name in row), None)
    if column is None:
        return Skipped(place, f"no caption column; one of {', '.join(CAPTION_COLUMNS)} is needed")
    if not isinstance(row[column], str | None):
        return Skipped(place, "the caption is not text")
    return check_file(path, row[column] or "")


def pair_with_text(path: Path) -> Example | Skipped:
    """A file with the caption in the same-stem ``.txt`` beside it."""
    text = path.with_suffix(".txt")
    if not text.is_file():
        return Skipped(str(path), f"no caption file {text.name}")
    try:
        return check_file(path, text.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        return Skipped(str(text), "not UTF-8 text")


def check_file(path: Path, caption: str) -> Example | Skipped:
    """A file with its caption, unless one of them is missing."""
    if not path.is_file():
        return Skipped(str(path), "missing file")
    if not caption.strip():
        return Skipped(str(path), "empty caption")
    return Example(str(path), " ".join(caption.split()), path.read_bytes)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _hugging_face(path: str) -> Iterator[Example | Skipped]:
    import datasets  # a heavy import that folders do not need

    try:
        if _is_saved_dataset(Path(path)):
            loaded = datasets.load_from_disk(path)
            table = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            table = datasets.load_dataset(path, split="train")
    except Exception as error:  # the library raises many kinds; all mean "not there"
        raise UserError(f"{path!r} is no folder, and cannot be loaded as a dataset: {error}") from error
    picture = next((name for name, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    column = next((name for name in CAPTION_COLUMNS if name in table.features), None)
    if picture is None or column is None:
        raise UserError(
            f"dataset {path!r} needs an image column and one of {', '.join(CAPTION_COLUMNS)};"
            f" it has {', '.join(table.features)}"
        )
    table = table.cast_column(picture, datasets.Image(decode=False))
    for row, caption in enumerate(table[column]):
        if not isinstance(caption, str) or not caption.strip():
            yield Skipped(
                f"{path}[{row}]",
                "the caption is not text" if caption and not isinstance(caption, str) else "empty caption",
            )
        else:
            yield Example(f"{path}[{row}]", " ".join(caption.split()), _row_reader(table, row, picture))


def _row_reader(table: Any, row: int, column: str) -> Callable[[], bytes]:
    def read() -> bytes:
        stored = table[row][column]
        if stored is None:
            raise OSError("no picture in this row")
        content: bytes = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
        return content

    return read


def _world(domain: str, num_samples: int, seed: int, held_out: bool) -> Dataset:
    if domain not in DOMAINS:
        raise UserError(f"the embedded world has no domain {domain!r}: allowed are {', '.join(DOMAINS)}")
    scenes = draw_scenes(num_samples, seed=seed, held_out=held_out)
    pictures = render(scenes, domain, seed=seed)

    def reader(row: int) -> Callable[[], bytes]:
        def read() -> bytes:
            buffer = io.BytesIO()
            Image.fromarray(pictures[row]).save(buffer, "PNG")
            return buffer.getvalue()

        return read

    examples = (Example(f"{WORLD_PREFIX}{domain}[{i}]", scene.caption, reader(i)) for i, scene in enumerate(scenes))
    return Dataset(tuple(examples), ())
