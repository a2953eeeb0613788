"""Where pictures come from, what is wrong with them, and what is kept of them."""

from __future__ import annotations

import csv
import io
import json
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants
from PIL import Image, ImageOps

from conftest import max_error, random_pictures
from timestep_experts.data import (
    Dataset,
    EncodedDataset,
    Example,
    PictureSettings,
    Skipped,
    encode_dataset,
    open_dataset,
    split_by_caption,
)
from timestep_experts.data.cache import to_pixels
from timestep_experts.models import StableDiffusion
from timestep_experts.models.encoding import CutCaptions
from timestep_experts.world.scenes import parse_caption

SMALL = PictureSettings(16, 16)


def picture(seed: int = 0, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A picture of random pixels; ``size`` is width and height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_pair(folder: Path, name: str, caption: str, seed: int = 0) -> None:
    put(folder / f"{name}.png", encoded(picture(seed)))
    put(folder / f"{name}.txt", caption)


def find(path: Path | str, max_samples: int | None = None) -> Dataset:
    return open_dataset(str(path), max_samples=max_samples, seed=0)


def names(folder: Path, items: Iterable[Example | Skipped]) -> list[str]:
    return [str(Path(item.place).relative_to(folder)) for item in items]


def captions(pictures: Dataset) -> list[str]:
    return [example.caption for example in pictures.examples]


# Sources


def test_a_folder_of_pairs_is_read_in_order_and_nested(tmp_path: Path) -> None:
    put_pair(tmp_path, "b", "a cat")
    put_pair(tmp_path, "sub/deep/a.1", "a dog", seed=1)
    put(tmp_path / "A.JPG", encoded(picture(2), "JPEG"))
    put(tmp_path / "A.txt", "a bird")
    put(tmp_path / "notes.md", "not a picture")
    found = find(tmp_path)
    assert names(tmp_path, found.examples) == ["A.JPG", "b.png", "sub/deep/a.1.png"]
    assert captions(found) == ["a bird", "a cat", "a dog"]
    assert found.skipped == ()
    assert np.array_equal(np.asarray(found.examples[2].open()), np.asarray(picture(1)))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"])
def test_every_listed_kind_of_picture_opens(suffix: str, tmp_path: Path) -> None:
    picture().save(tmp_path / f"a{suffix}")
    put(tmp_path / "a.txt", "a cat")
    opened = find(tmp_path).examples[0].open()
    assert (opened.mode, opened.size) == ("RGB", (20, 16))


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_metadata_file_names_pictures_and_captions(kind: str, column: str, tmp_path: Path) -> None:
    put(tmp_path / "sub" / "b.png", encoded(picture()))
    put(tmp_path / "a.png", encoded(picture(1)))
    rows = [("sub/b.png", 'a cat, with "quotes"'), ("a.png", "eine Kätzin")]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, column: text, "other": 1}, ensure_ascii=False) for name, text in rows]
        put(tmp_path / "metadata.jsonl", "\n\n".join(lines))
    else:
        lines = [f"file_name,other,{column}", 'sub/b.png,1,"a cat, with ""quotes"""', "a.png,1,eine Kätzin"]
        put(tmp_path / "metadata.csv", "\ufeff" + "\r\n".join(lines))  # as spreadsheets write it
    found = find(tmp_path)
    assert names(tmp_path, found.examples) == [name for name, _ in rows]
    assert captions(found) == [text for _, text in rows]
    assert found.skipped == ()


def test_captions_are_normalised(tmp_path: Path) -> None:
    put_pair(tmp_path, "a", "\ufeff  a cat,\r\n\tasleep \n")
    assert captions(find(tmp_path)) == ["a cat, asleep"]


def test_max_samples_takes_the_first(tmp_path: Path) -> None:
    for name in "cab":
        put_pair(tmp_path, name, f"a {name}")
    assert captions(find(tmp_path, 2)) == ["a a", "a b"]


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_saved_dataset_is_read_and_its_unusable_rows_are_listed(as_dict: bool, tmp_path: Path) -> None:
    on_disk = put(tmp_path / "b.png", encoded(picture(1)))
    gone = put(tmp_path / "gone.png", encoded(picture(2)))
    columns = {
        "image": [{"bytes": encoded(picture()), "path": None}, str(on_disk), str(gone), str(on_disk), None],
        "caption": ["a  cat", "a dog", "a ghost", None, "nothing"],
    }
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict(columns, kinds)
    folder = str(tmp_path / "saved")
    (datasets.DatasetDict({"train": table}) if as_dict else table).save_to_disk(folder)
    found = find(folder)
    assert captions(found) == ["a cat", "a dog", "a ghost", "nothing"]
    assert [e.place for e in found.examples] == [f"{folder}[{row}]" for row in (0, 1, 2, 4)]
    assert found.skipped == (Skipped(f"{folder}[3]", "empty caption"),)
    assert [e.open().tobytes() for e in found.examples[:2]] == [picture(seed).tobytes() for seed in (0, 1)]


def test_a_row_without_a_picture_is_skipped_not_fatal(family: StableDiffusion, tmp_path: Path) -> None:
    columns = {"image": [{"bytes": encoded(picture()), "path": None}, None], "text": ["a cat", "nothing"]}
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, kinds).save_to_disk(str(tmp_path / "saved"))
    kept = encode_dataset(find(tmp_path / "saved"), SMALL, family, tmp_path / "cache")
    assert kept.captions == ("a cat",)
    assert [item.place for item in kept.skipped] == [f"{tmp_path / 'saved'}[1]"]


def test_a_dataset_without_pictures_or_captions_says_what_it_has(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"label": [1], "text": ["a cat"]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"needs an image column and one of text, caption, prompt; it has label, text"):
        find(tmp_path / "saved")


def test_a_home_folder_is_expanded_for_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    go_offline(monkeypatch)
    put_pair(tmp_path / "plain", "a", "a cat")
    columns = {"image": [{"bytes": encoded(picture()), "path": None}], "text": ["a dog"]}
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, kinds).save_to_disk(str(tmp_path / "saved"))
    assert captions(find("~/plain")) == ["a cat"]
    assert captions(find("~/saved")) == ["a dog"]


@pytest.mark.parametrize("domain", ["flat", "neon"])
def test_the_embedded_world_gives_captioned_scenes(domain: str) -> None:
    found = open_dataset(f"world/{domain}", max_samples=6, seed=3)
    assert len(found.examples) == 6
    assert found.skipped == ()
    for example in found.examples:
        assert parse_caption(example.caption).caption == example.caption
        assert not parse_caption(example.caption).is_held_out
        assert example.open().size == (64, 64)
    again = open_dataset(f"world/{domain}", max_samples=6, seed=3)
    assert [e.read() for e in again.examples] == [e.read() for e in found.examples]
    held_out = open_dataset(f"world/{domain}", max_samples=6, seed=3, held_out=True)
    assert all(parse_caption(example.caption).is_held_out for example in held_out.examples)


def test_an_unknown_domain_of_the_world_is_named() -> None:
    with pytest.raises(ValueError, match=r"no domain 'flatt': allowed are flat, neon"):
        find("world/flatt")


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1, which the libraries read when they are imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_hub_id_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    with pytest.raises(ValueError, match=r"'nobody/nothing-here' is no folder, and cannot be loaded as a dataset: "):
        find("nobody/nothing-here")


# Pictures


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    grey = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    grey.paste((60, 60, 60, 255), (0, 0, 2, 4))
    grey.paste((0, 0, 0, 102), (2, 0, 3, 4))
    image = grey
    if mode == "LA":
        image = grey.convert("LA")
    elif mode == "P":  # one transparent colour; no half tones
        image = Image.new("P", (4, 4), 1)
        image.putpalette([60, 60, 60, 9, 9, 9])
        image.paste(0, (0, 0, 2, 4))
        image.info["transparency"] = 1
    shown = np.asarray(Example("", "a", lambda: encoded(image)).open())
    assert (shown[:, :2] == 60).all()
    assert (shown[:, 3] == 255).all()
    if mode != "P":
        assert abs(int(shown[0, 2, 0]) - 153) <= 1  # 255 * (1 - 102 / 255)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P", "I;16"])
def test_every_mode_becomes_rgb_of_the_same_brightness(mode: str) -> None:
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    image = Image.fromarray(ramp)
    if mode == "1":
        ramp = np.where(ramp > 127, 255, 0).astype(np.uint8)
        image = Image.fromarray(ramp)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    shown = np.asarray(Example("", "a", lambda: encoded(image, "TIFF")).open())
    assert np.abs(shown.astype(int) - ramp[..., None]).max() <= 1


def test_the_orientation_that_cameras_write_is_obeyed() -> None:
    image = picture()
    turned = image.transpose(Image.Transpose.ROTATE_90)  # as a camera held upright stores it
    notes = Image.Exif()
    notes[0x0112] = 6  # turn by 90 degrees clockwise to view
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=notes)
    assert np.array_equal(np.asarray(Example("", "a", buffer.getvalue).open()), np.asarray(image))


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (16, 16), (5, 3)])
def test_pixels_are_the_centre_square(size: tuple[int, int]) -> None:
    image = picture(size=size)
    pixels = to_pixels(image, 16, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert -1 <= pixels.min() < pixels.max() <= 1
    if min(size) == 16:
        left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
        cut = np.asarray(image)[top : top + 16, left : left + 16]
        assert max_error(pixels, torch.tensor(cut).permute(2, 0, 1) / 127.5 - 1) == 0


def test_pixels_need_not_be_square() -> None:
    image = picture(size=(40, 16))
    cut = np.asarray(image)[:, 8:32]
    assert max_error(to_pixels(image, 16, 24), torch.tensor(cut).permute(2, 0, 1) / 127.5 - 1) == 0


# Faults


def broken(kind: str) -> bytes:
    whole = encoded(picture(size=(64, 64)), "JPEG" if kind.endswith("jpeg") else "PNG")
    if kind.startswith("truncated"):
        return whole[: len(whole) // 2]
    if kind == "corrupt png":
        return whole[:60] + bytes(20) + whole[80:]
    return {"text": b"<html>404</html>", "empty": b""}[kind]


@pytest.mark.parametrize("kind", ["truncated png", "truncated jpeg", "corrupt png", "text", "empty"])
def test_a_broken_picture_is_listed_and_the_others_are_kept(kind: str, family: StableDiffusion, tmp_path: Path) -> None:
    for name in "ac":
        put_pair(tmp_path / "in", name, f"a {name}")
    put_pair(tmp_path / "in", "b", "a broken one")
    bad = put(tmp_path / "in" / "b.png", broken(kind))
    for _ in range(2):  # from the pictures, then from the cache
        kept = encode_dataset(find(tmp_path / "in"), SMALL, family, tmp_path / "cache")
        assert kept.captions == ("a a", "a c")
        assert [item.place for item in kept.skipped] == [str(bad)]
        assert kept.skipped[0].reason


def test_faults_of_a_folder_of_pairs_are_all_listed(family: StableDiffusion, tmp_path: Path) -> None:
    put_pair(tmp_path, "good", "a cat")
    put_pair(tmp_path, "blank", " \n")
    put_pair(tmp_path, "latin", "")
    put(tmp_path / "latin.txt", "eine Kätzin".encode("latin-1"))
    put(tmp_path / "sub" / "alone.png", encoded(picture()))
    (tmp_path / "folder.png").mkdir()
    found = find(tmp_path)
    assert names(tmp_path, found.examples) == ["good.png"]
    assert {(Path(s.place).name, s.reason) for s in found.skipped} == {
        ("blank.png", "empty caption"),
        ("latin.txt", "not UTF-8 text"),
        ("alone.png", "no caption file alone.txt"),
        ("folder.png", "no caption file folder.txt"),
    }
    assert len(found.skipped) == 4
    kept = encode_dataset(found, SMALL, family, tmp_path / "cache")
    assert kept.skipped == found.skipped


def test_faults_of_a_metadata_file_are_all_listed(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(picture()))
    lines = [
        '{"file_name": "a.png", "text": "a cat"}',
        '{"file_name": "a.png", "text": ',
        '["a.png", "a cat"]',
        '{"text": "a cat"}',
        '{"file_name": "a.png", "label": "a cat"}',
        '{"file_name": "a.png", "text": " "}',
        '{"file_name": "gone.png", "text": "a ghost"}',
        '{"file_name": "a.png", "text": null}',
    ]
    table = put(tmp_path / "metadata.jsonl", "\n".join(lines))
    found = find(tmp_path)
    assert captions(found) == ["a cat"]
    a, gone = str(tmp_path / "a.png"), str(tmp_path / "gone.png")
    assert [(s.place, s.reason.partition(":")[0]) for s in found.skipped] == [
        (f"{table}:2", "not JSON"),
        (f"{table}:3", "not a JSON object"),
        (f"{table}:4", "no file_name"),
        (f"{table}:5", "no caption column; one of text, caption, prompt is needed"),
        (a, "empty caption"),
        (gone, "missing file"),
        (a, "empty caption"),
    ]


def test_faults_of_a_spreadsheet_are_all_listed(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(picture()))
    table = put(tmp_path / "metadata.csv", "file_name,text\na.png,a cat\n,a dog\na.png\ngone.png,a ghost\n")
    found = find(tmp_path)
    assert captions(found) == ["a cat"]
    assert [(s.place, s.reason) for s in found.skipped] == [
        (f"{table}:3", "no file_name"),
        (str(tmp_path / "a.png"), "empty caption"),
        (str(tmp_path / "gone.png"), "missing file"),
    ]
    put(tmp_path / "metadata.csv", "file_name,label\na.png,a cat\n")
    with pytest.raises(ValueError, match=r"skipped 1:\n  .*metadata\.csv:2: no caption column"):
        find(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_row_that_is_not_utf8_is_skipped_alone(kind: str, tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(picture()))
    rows = {
        "jsonl": '{"file_name": "a.png", "text": "eine Kätzin"}\n{"file_name": "a.png", "text": "a cat"}\n',
        "csv": "file_name,text\na.png,eine Kätzin\na.png,a cat\n",
    }
    table = put(tmp_path / f"metadata.{kind}", rows[kind].encode("latin-1"))
    found = find(tmp_path)
    assert captions(found) == ["a cat"]
    line = 1 if kind == "jsonl" else 2
    assert [(s.place, s.reason) for s in found.skipped] == [(f"{table}:{line}", "not UTF-8 text")]


def test_a_picture_that_no_row_names_is_listed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / f"{name}.png", encoded(picture()))
    put(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "a cat"}')
    assert [(s.place, s.reason) for s in find(tmp_path).skipped] == [
        (str(tmp_path / "b.png"), "no row in metadata.jsonl")
    ]


@pytest.mark.parametrize("value", [["a cat", "a kitten"], {"en": "a cat"}])
def test_a_caption_that_is_no_text_is_skipped(value: object, tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(picture()))
    rows = [{"file_name": "a.png", "text": value}, {"file_name": "a.png", "text": "a cat"}]
    put(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    found = find(tmp_path)
    assert captions(found) == ["a cat"]
    assert [s.reason for s in found.skipped] == ["the caption is not text"]


def test_captions_of_a_saved_dataset_that_are_no_text_are_skipped(tmp_path: Path) -> None:
    image = {"bytes": encoded(picture()), "path": None}
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    table = datasets.Dataset.from_dict({"image": [image], "caption": [["a cat", "a kitten"]]}, kinds)
    table.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"skipped 1:\n  .*saved\[0\]: the caption is not text"):
        find(tmp_path / "saved")


def test_nothing_usable_is_an_error_that_lists(tmp_path: Path) -> None:
    for i in range(12):
        put(tmp_path / f"{i:02}.png", encoded(picture()))
    with pytest.raises(ValueError, match="no usable captioned picture in") as caught:
        find(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("; skipped 12:")
    assert lines[1] == f"  {tmp_path / '00.png'}: no caption file 00.txt"
    assert lines[-1] == "  ... and 2 more"
    assert len(lines) == 12


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable captioned picture in"):
        find(tmp_path)


def test_pictures_that_all_fail_to_open_are_an_error_that_lists(family: StableDiffusion, tmp_path: Path) -> None:
    put_pair(tmp_path, "a", "a cat")
    put(tmp_path / "a.png", b"no picture")
    with pytest.raises(ValueError, match=r"none of 1 pictures can be decoded; skipped 1:\n  .*a\.png: not a readable"):
        encode_dataset(find(tmp_path), SMALL, family, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("[!.]*"))


# Splitting


def texts(count: int, copies: int = 1) -> Dataset:
    examples = (Example(f"{i}.{j}", f"a thing {i}", bytes) for j in range(copies) for i in range(count))
    return Dataset(tuple(examples), (Skipped("x", "y"),))


def test_all_pictures_of_a_caption_fall_on_one_side() -> None:
    whole = texts(400, copies=3)
    train, validation = split_by_caption(whole, 0.25, seed=1)
    assert set(captions(train)).isdisjoint(captions(validation))
    assert sorted(e.place for e in train.examples + validation.examples) == sorted(e.place for e in whole.examples)
    share = len(set(captions(validation))) / 400
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    assert train.skipped + validation.skipped == whole.skipped


def test_adding_pictures_moves_none() -> None:
    small, large = (split_by_caption(texts(n), 0.3, seed=5) for n in (30, 200))
    for before, after in zip(small, large, strict=True):
        assert set(captions(before)) <= set(captions(after))


def test_another_seed_splits_otherwise() -> None:
    assert captions(split_by_caption(texts(50), 0.5, 0)[0]) != captions(split_by_caption(texts(50), 0.5, 1)[0])


@pytest.mark.parametrize(("share", "side"), [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_an_empty_side_is_an_error(share: float, side: str) -> None:
    with pytest.raises(ValueError, match=f"of 3 pictures leaves no {side} picture"):
        split_by_caption(texts(3), share, seed=0)


# Encoding


class Counting(StableDiffusion):
    """A family that counts what it encodes."""

    def __init__(self, parts: StableDiffusionPipeline) -> None:
        super().__init__(parts)
        self.seen: Counter[str] = Counter()

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen["pictures"] += len(pixels)
        return super().encode_pixels(pixels)

    def encode_captions(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        self.seen["captions"] += len(captions)
        return super().encode_captions(captions)


@pytest.fixture
def counting(family: StableDiffusion) -> Counting:
    return Counting(family.parts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures of three captions."""
    for seed, (name, caption) in enumerate([("a", "a star"), ("b", "a red star"), ("c", "a star"), ("d", "a cross")]):
        put_pair(tmp_path / "in", name, caption, seed)
    return tmp_path / "in"


def encode(folder: Path, family: StableDiffusion, settings: PictureSettings = SMALL) -> EncodedDataset:
    return encode_dataset(find(folder), settings, family, folder.parent / "cache")


def assert_equal(one: EncodedDataset, other: EncodedDataset) -> None:
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(one.caption_rows, other.caption_rows)
    assert one.captions == other.captions
    assert one.features.keys() == other.features.keys()
    assert all(torch.equal(one.features[name], other.features[name]) for name in one.features)


def test_rows_belong_to_their_pictures_and_captions(folder: Path, counting: Counting) -> None:
    kept = encode(folder, counting)
    assert len(kept) == 4
    assert kept.latents.shape == (4, 4, 8, 8)
    assert [kept.captions[row] for row in kept.caption_rows] == ["a star", "a red star", "a star", "a cross"]
    assert counting.seen == {"pictures": 4, "captions": 4}  # three captions and the empty one


def test_latents_are_the_scaled_means_of_the_posterior(folder: Path, family: StableDiffusion) -> None:
    kept = encode(folder, family)
    vae = family.parts.vae
    pixels = torch.stack([to_pixels(example.open(), 16, 16) for example in find(folder).examples])
    with torch.no_grad():
        means = vae.encode(pixels).latent_dist.mean
    assert kept.latents.dtype == torch.float32
    assert max_error(kept.latents, means * vae.config.scaling_factor) == 0


def test_features_are_those_of_the_pipeline(folder: Path, family: StableDiffusion) -> None:
    kept = encode(folder, family)
    for row, caption in enumerate([*kept.captions, ""]):
        wanted = family.parts.encode_prompt(caption, family.device, 1, False)[0]
        assert max_error(kept.features["encoder_hidden_states"][row : row + 1], wanted) <= 1e-6  # another batch size


def test_caption_dropout_takes_the_empty_captions_row(family: StableDiffusion) -> None:
    pictures = random_pictures(3, family)
    dropped = torch.tensor([False, True, True])
    given = pictures.conditioning(torch.tensor([2, 0, 1]), family.device, dropped)["encoder_hidden_states"]
    stored = pictures.features["encoder_hidden_states"]
    assert torch.equal(given, stored[[2, 3, 3]])
    kept = pictures.conditioning(torch.tensor([2, 0, 1]), family.device)["encoder_hidden_states"]
    assert torch.equal(kept, stored[[2, 0, 1]])
    empty = family.encode_captions([""])["encoder_hidden_states"][0]
    assert max_error(given[1], empty) <= 1e-6
    assert max_error(given[0], empty) > 1e-3


def test_mirrored_copies_follow_the_originals(folder: Path, family: StableDiffusion) -> None:
    plain, flipped = encode(folder, family), encode(folder, family, PictureSettings(16, 16, flip=True))
    assert len(flipped) == 8
    assert max_error(flipped.latents[:4], plain.latents) <= 1e-6  # another batch size
    assert torch.equal(flipped.caption_rows, plain.caption_rows.repeat(2))
    mirrored = torch.stack([to_pixels(example.open(), 16, 16).flip(-1) for example in find(folder).examples])
    assert max_error(flipped.latents[4:], family.encode_pixels(mirrored)) <= 1e-6
    assert max_error(flipped.latents[4:], plain.latents) > 1e-2


def test_a_second_run_encodes_nothing(folder: Path, counting: Counting) -> None:
    first = encode(folder, counting)
    before = dict(counting.seen)
    again = encode(folder, counting)
    assert counting.seen == before
    assert_equal(first, again)


def test_renaming_and_touching_encode_nothing(folder: Path, counting: Counting) -> None:
    first = encode(folder, counting)
    before = dict(counting.seen)
    for path in list(folder.iterdir()):
        path.rename(path.with_name(f"new-{path.name}"))
    for path in folder.iterdir():
        path.touch()
    moved = folder.rename(folder.parent / "moved")
    assert_equal(first, encode(moved, counting))
    assert counting.seen == before


def test_the_list_of_skipped_pictures_follows_a_renaming(folder: Path, family: StableDiffusion) -> None:
    put_pair(folder, "e", "a broken one")
    put(folder / "e.png", b"no picture")
    encode(folder, family)
    for suffix in (".png", ".txt"):
        (folder / f"e{suffix}").rename(folder / f"f{suffix}")
    assert [s.place for s in encode(folder, family).skipped] == [str(folder / "f.png")]


@pytest.mark.parametrize("what", ["bytes", "caption", "resolution", "flip", "autoencoder", "text encoder", "order"])
def test_whatever_decides_the_encoding_rebuilds_it(what: str, folder: Path, counting: Counting) -> None:
    first = encode(folder, counting)
    counting.seen.clear()
    settings = SMALL
    if what == "bytes":
        put(folder / "b.png", encoded(picture(9)))
    elif what == "caption":
        put(folder / "b.txt", "a blue star")
    elif what == "order":
        for suffix in (".png", ".txt"):
            (folder / f"a{suffix}").rename(folder / f"z{suffix}")
    elif what in ("autoencoder", "text encoder"):
        module = counting.parts.vae if what == "autoencoder" else counting.parts.text_encoder
        with torch.no_grad():
            next(module.parameters()).add_(0.5)
    else:
        settings = PictureSettings(24, 24) if what == "resolution" else PictureSettings(16, 16, flip=True)
    second = encode(folder, counting, settings)
    assert counting.seen["pictures"] == len(second)
    with pytest.raises(AssertionError):
        assert_equal(first, second)
    counting.seen.clear()
    assert_equal(second, encode(folder, counting, settings))
    assert not counting.seen


def test_leftovers_in_the_cache_are_harmless(folder: Path, counting: Counting) -> None:
    first = encode(folder, counting)
    cache = folder.parent / "cache"
    (tensors,) = cache.glob("*.safetensors")
    (report,) = cache.glob("*.json")
    for path in (tensors, report):
        put(cache / f".{path.name}.draft-1", b"half a file")
    counting.seen.clear()
    assert_equal(first, encode(folder, counting))
    assert not counting.seen
    report.unlink()  # killed between the two files
    assert_equal(first, encode(folder, counting))
    assert counting.seen["pictures"] == 4


def test_a_failure_while_encoding_leaves_no_cache(folder: Path, family: StableDiffusion) -> None:
    class Failing(StableDiffusion):
        def encode_captions(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        encode(folder, Failing(family.parts))
    assert not list((folder.parent / "cache").glob("[!.]*"))
    assert len(encode(folder, family)) == 4


# Folders and tables as people have them


def test_linked_folders_are_read_and_loops_are_listed(tmp_path: Path) -> None:
    put_pair(tmp_path / "set", "1", "one")
    put_pair(tmp_path / "elsewhere", "2", "two")
    (tmp_path / "set/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set", target_is_directory=True)
    found = find(tmp_path / "set")
    assert captions(found) == ["one", "two"]
    assert found.skipped == (Skipped(str(tmp_path / "set/link/back"), "a link back to a folder above it"),)


def test_two_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    put_pair(tmp_path / "a", "1", "one")
    put_pair(tmp_path / "b", "2", "two")
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b/to_a").symlink_to(tmp_path / "a", target_is_directory=True)
    found = find(tmp_path)
    assert sorted(captions(found)) == ["one", "one", "two", "two"]
    assert names(tmp_path, found.skipped) == ["a/to_b/to_a", "b/to_a/to_b"]


def test_unreadable_kinds_with_captions_are_listed(tmp_path: Path) -> None:
    put_pair(tmp_path, "1", "one")
    put(tmp_path / "2.heic", b"?")
    put(tmp_path / "2.txt", "two")
    put(tmp_path / "1.json", "{}")
    put(tmp_path / "README.md", "no example")
    assert find(tmp_path).skipped == (Skipped(str(tmp_path / "2.heic"), "files of type .heic cannot be read"),)


def test_lines_of_json_end_at_newlines_alone(tmp_path: Path) -> None:
    put(tmp_path / "1.png", encoded(picture()))
    put(tmp_path / "metadata.jsonl", '{"file_name": "1.png", "text": "a\u2028b\u0085c"}\n')
    assert captions(find(tmp_path)) == ["a b c"]


def test_fields_of_a_table_may_be_long(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    put(tmp_path / "1.png", encoded(picture()))
    put(tmp_path / "metadata.csv", f"file_name,text\n1.png,{'x' * (limit + 1)}\n")
    assert captions(find(tmp_path)) == ["x" * (limit + 1)]
    assert csv.field_size_limit() == limit


def test_one_caption_for_all_pictures_is_split_by_picture(tmp_path: Path) -> None:
    for seed in range(40):
        put_pair(tmp_path, str(seed), "sks dog", seed)
    train, validation = split_by_caption(find(tmp_path), 0.2, seed=0)
    assert len(train.examples) + len(validation.examples) == 40
    assert {e.place for e in train.examples}.isdisjoint(e.place for e in validation.examples)
    assert 1 <= len(validation.examples) <= 20
    put_pair(tmp_path, "new", "sks dog", 40)
    _, again = split_by_caption(find(tmp_path), 0.2, seed=0)
    assert {e.place for e in validation.examples} <= {e.place for e in again.examples}  # adding pictures moves none


@pytest.mark.parametrize("error", [TypeError("bad operand"), struct.error("unpack"), RuntimeError("decoder")])
def test_whatever_a_decoder_raises_the_picture_is_listed(
    error: Exception, tmp_path: Path, family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        put_pair(tmp_path / "set", str(seed), f"thing {seed}", seed)
    transpose, calls = ImageOps.exif_transpose, iter(range(3))

    def fail_once(image: Image.Image) -> Image.Image:
        if next(calls) == 1:
            raise error
        return transpose(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", fail_once)
    kept = encode_dataset(find(tmp_path / "set"), SMALL, family, tmp_path / "cache")
    assert [(Path(item.place).name, item.reason) for item in kept.skipped] == [
        ("1.png", f"not a readable picture: {error}")
    ]
    assert len(kept) == 2


def test_reasons_hold_no_address_in_memory() -> None:
    with pytest.raises(OSError, match=r"^not a readable picture: no known format$"):
        Example("here", "a cat", lambda: b"no picture").open()


def test_captions_that_are_cut_are_counted(tmp_path: Path, family: StableDiffusion) -> None:
    limit = family.parts.tokenizer.model_max_length
    long = " ".join("a" * (limit + 10))  # a token per letter, and two for beginning and end
    put_pair(tmp_path / "set", "1", long)
    put_pair(tmp_path / "set", "2", "a")
    for _ in range(2):  # the second time from the cache
        kept = encode_dataset(find(tmp_path / "set"), SMALL, family, tmp_path / "cache")
        assert kept.cut == (CutCaptions("tokenizer", limit, count=1, longest=limit + 12),)
