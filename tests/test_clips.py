"""Where clips come from, which of their frames are used, what is wrong with them, and how they are written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from conftest import max_error
from families.tiny_video import tiny_video_crafter
from timestep_experts.data import ClipSettings, Dataset, encode_dataset, open_clips
from timestep_experts.data.clips import choose_frames, read_frames
from timestep_experts.inference.video import write_mp4
from timestep_experts.models.video_crafter import VideoCrafter
from timestep_experts.report.clips import save_clip_sheet

KINDS = {
    ".mp4": ("libx264", "yuv420p"),
    ".webm": ("libvpx", "yuv420p"),
    ".gif": ("gif", "gray"),
    ".mov": ("mpeg4", "yuv420p"),
    ".mkv": ("libx264", "yuv420p"),
}
SMALL = ClipSettings(num_frames=3, height=16, width=16)


def level(number: int) -> int:
    """The grey of a clip's frame, by which it is known."""
    return 20 + 10 * number


def put_clip(path: Path, num_frames: int = 8, fps: float = 8, size: tuple[int, int] = (32, 24), **options: str) -> Path:
    """A clip of grey frames; ``size`` is width and height. Its left edge is white, its right edge black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, pix_fmt = KINDS[path.suffix]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.bit_rate = 2_000_000
        for i in range(num_frames):
            frame = np.full((size[1], size[0], 3), level(i), np.uint8)
            frame[:, :2], frame[:, -2:] = 255, 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def put_pair(folder: Path, name: str, caption: str, num_frames: int = 8) -> Path:
    path = put_clip(folder / name, num_frames)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def numbers(pixels: torch.Tensor) -> list[int]:
    """Which frames a decoded clip holds, by the grey in their middle."""
    middle = (pixels[:, :, pixels.shape[2] // 2, pixels.shape[3] // 2].mean(0) + 1) * 127.5
    return [round((grey - level(0)) / 10) for grey in middle.tolist()]


def read(path: Path, settings: ClipSettings) -> torch.Tensor:
    path.with_suffix(".txt").write_text("a clip", encoding="utf-8")
    return settings.decode(open_clips(str(path.parent)).examples[0])


def captions(found: Dataset) -> list[str]:
    return [example.caption for example in found.examples]


# Sources


def test_a_folder_of_pairs_is_read_in_order_and_nested(tmp_path: Path) -> None:
    put_pair(tmp_path, "b.mp4", "a  cat\n")
    put_pair(tmp_path, "sub/a.webm", "a dog")
    put_pair(tmp_path, "a.gif", "a bird")
    (tmp_path / "notes.md").write_text("no clip")
    found = open_clips(str(tmp_path))
    assert [Path(e.place).relative_to(tmp_path).as_posix() for e in found.examples] == ["a.gif", "b.mp4", "sub/a.webm"]
    assert captions(found) == ["a bird", "a cat", "a dog"]
    assert found.skipped == ()
    assert captions(open_clips(str(tmp_path), max_samples=2)) == ["a bird", "a cat"]


@pytest.mark.parametrize("as_file", [False, True])
def test_a_table_like_openvids_names_clips_anywhere_below(as_file: bool, tmp_path: Path) -> None:
    for place in ("part0/a.mp4", "part1/b.mp4", "part0/twice.mp4", "part1/twice.mp4", "part1/unnamed.mp4"):
        put_clip(tmp_path / place, 2)
    table = tmp_path / "OpenVid.csv"
    table.write_text(
        "video,caption,aesthetic score,fps\n"
        'b.mp4,"A cat, asleep",5.1,30.0\n'
        "part0/a.mp4,A dog,4.9,24.0\n"
        "twice.mp4,Two,1,1\n"
        "gone.mp4,A ghost,1,1\n"
        ",Nobody,1,1\n"
        "a.mp4, ,1,1\n",
        encoding="utf-8",
    )
    found = open_clips(str(table if as_file else tmp_path))
    assert [Path(e.place).name for e in found.examples] == ["b.mp4", "a.mp4"]
    assert captions(found) == ["A cat, asleep", "A dog"]
    assert [(Path(s.place).name, s.reason) for s in found.skipped] == [
        ("OpenVid.csv:4", "2 clips are called twice.mp4"),
        ("gone.mp4", "missing file"),
        ("OpenVid.csv:6", "no video or file_name"),
        ("a.mp4", "empty caption"),
        ("twice.mp4", "no row in OpenVid.csv"),
        ("twice.mp4", "no row in OpenVid.csv"),
        ("unnamed.mp4", "no row in OpenVid.csv"),
    ]


def test_a_metadata_file_names_clips_too(tmp_path: Path) -> None:
    put_clip(tmp_path / "a.mp4", 2)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "a cat"}\nnot JSON\n', encoding="utf-8")
    found = open_clips(str(tmp_path))
    assert captions(found) == ["a cat"]
    assert [s.reason.partition(":")[0] for s in found.skipped] == ["not JSON"]


def test_clips_without_captions_are_listed(tmp_path: Path) -> None:
    put_clip(tmp_path / "a.mp4", 2)
    with pytest.raises(ValueError, match=r"no usable captioned clip in .*skipped 1:\n.*a\.mp4: no caption file a\.txt"):
        open_clips(str(tmp_path))


def test_what_is_no_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither a folder of clips nor a"):
        open_clips(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is neither a folder of clips nor a"):
        open_clips(str(put_clip(tmp_path / "a.mp4", 2)))
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("video,caption\n")
    with pytest.raises(ValueError, match=r"holds 2 tables: one\.csv, two\.csv; name the one to use"):
        open_clips(str(tmp_path))


# Frames


@pytest.mark.parametrize("suffix", KINDS)
def test_frames_come_from_the_middle(suffix: str, tmp_path: Path) -> None:
    pixels = read(put_clip(tmp_path / f"a{suffix}", 9), SMALL)
    assert pixels.shape == (3, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert numbers(pixels) == [3, 4, 5]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_a_clip_is_read_at_another_rate(suffix: str, tmp_path: Path) -> None:
    path = put_clip(tmp_path / f"a{suffix}", 20, fps=20)
    assert numbers(read(path, ClipSettings(3, 16, 16, fps=5))) == [4, 8, 12]
    assert numbers(read(path, ClipSettings(3, 16, 16, fps=10, stride=3))) == [2, 8, 14]
    assert numbers(read(path, ClipSettings(3, 16, 16, stride=4))) == [5, 9, 13]


def evenly(num_frames: int, fps: float) -> list[float]:
    """Times as containers round them: to whole milliseconds."""
    return [round(i / fps, 3) for i in range(num_frames)]


@pytest.mark.parametrize(
    ("times", "settings", "wanted"),
    [
        (evenly(30, 30), ClipSettings(4, 1, 1, fps=30), [13, 14, 15, 16]),
        (evenly(90, 30), ClipSettings(3, 1, 1, fps=10), [39, 42, 45]),
        (evenly(16, 8), ClipSettings(16, 1, 1, fps=8), list(range(16))),
        (evenly(300, 24000 / 1001), ClipSettings(3, 1, 1, fps=24), [148, 149, 150]),
        ([0, 0.1, 0.2, 1.0, 1.1, 1.2], ClipSettings(2, 1, 1, fps=2), [0, 2]),
        ([5.0], ClipSettings(1, 1, 1), [0]),
        (evenly(7, 8), ClipSettings(2, 1, 1, stride=6), [0, 6]),
    ],
)
def test_the_nearest_frames_are_chosen(times: list[float], settings: ClipSettings, wanted: list[int]) -> None:
    assert choose_frames(times, settings) == wanted


@pytest.mark.parametrize(
    ("times", "settings", "message"),
    [
        (evenly(15, 8), ClipSettings(16, 1, 1), "too short: 15 frames, 16 are needed"),
        (
            evenly(60, 30),
            ClipSettings(16, 1, 1, fps=8, stride=2),
            "too short: 16 frames at 8 per second, 31 are needed",
        ),
        (evenly(16, 8), ClipSettings(16, 1, 1, fps=24), "too slow: 8 frames per second, read at 24"),
        ([], ClipSettings(1, 1, 1), "too short: 0 frames, 1 are needed"),
        ([5.0], ClipSettings(1, 1, 1, fps=8), "too short: 0 frames at 8 per second, 1 are needed"),
    ],
)
def test_unfit_clips_say_why(times: list[float], settings: ClipSettings, message: str) -> None:
    with pytest.raises(OSError, match=f"^{message}$"):
        choose_frames(times, settings)


def test_frames_are_covered_and_cropped_in_the_centre(tmp_path: Path) -> None:
    path = put_clip(tmp_path / "a.mp4", size=(64, 24))
    assert read(path, ClipSettings(1, 24, 24)).std() < 0.01  # without the edges
    wide = read(path, ClipSettings(1, 12, 32))
    assert wide.shape == (3, 1, 12, 32)
    assert wide[..., 0].min() > 0.8
    assert wide[..., -1].max() < -0.8


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (16, 16), (255, 0, 0, 255)) for _ in range(3)]
    for frame in frames:
        frame.paste((0, 0, 0, 0), (8, 0, 16, 16))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    shown = read_frames((tmp_path / "a.gif").read_bytes(), ClipSettings(1, 16, 16))[0]
    assert shown.getpixel((2, 8)) == (255, 0, 0)
    assert shown.getpixel((13, 8)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["num_frames", "height", "width", "fps", "stride"])
def test_settings_are_positive(name: str) -> None:
    values = {"num_frames": 1, "height": 1, "width": 1, name: 0}
    with pytest.raises(ValueError, match=f"clips need a positive {name}; got 0"):
        ClipSettings(**values)


# Encoding


@pytest.fixture(scope="module")
def family() -> VideoCrafter:
    return VideoCrafter(tiny_video_crafter())


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def halve_behind_the_index(path: Path) -> None:
    cut_in_half(put_clip(path, 20, size=(256, 256), movflags="faststart"))


def cut_off_the_frames(path: Path) -> None:
    """Keeps a WebM's header and some frames, more than are needed."""
    path.write_bytes(path.read_bytes()[:900])


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "short": ("a.mp4", lambda path: put_clip(path, 2), "too short: 2 frames, 3 are needed"),
    "empty": ("a.mp4", lambda path: path.write_bytes(b""), "not a readable clip: "),
    "text": ("a.webm", lambda path: path.write_bytes(b"no clip"), "not a readable clip: "),
    "halved": ("a.mp4", cut_in_half, "not a readable clip: "),
    "halved behind the index": ("a.mp4", halve_behind_the_index, "cut off: "),
    "cut": ("a.webm", cut_off_the_frames, "cut off: "),
    "gone": ("a.gif", Path.unlink, "[Errno 2]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_clips_are_listed_and_skipped(fault: str, family: VideoCrafter, tmp_path: Path) -> None:
    name, damage, reason = FAULTS[fault]
    put_pair(tmp_path / "in", "good.mp4", "a star")
    bad = put_pair(tmp_path / "in", name, "a cross", num_frames=20)
    found = open_clips(str(tmp_path / "in"))
    damage(bad)
    kept = encode_dataset(found, SMALL, family, tmp_path / "cache")
    assert len(kept) == 1
    assert kept.captions == ("a star",)
    assert [(s.place, s.reason[: len(reason)]) for s in kept.skipped] == [(str(bad), reason)]


def test_frames_that_cannot_be_decoded_are_a_fault(tmp_path: Path) -> None:
    path = put_clip(tmp_path / "a.mp4", 20, size=(128, 96))
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 900  # behind the first frame
    content[start : start + 4000] = bytes(len(content[start : start + 4000]))
    with pytest.raises(OSError, match=r"not a readable clip|damaged: \d+ of 20 frames cannot be decoded"):
        read_frames(bytes(content), ClipSettings(20, 16, 16))


def test_sound_without_pictures_is_no_clip(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(OSError, match="not a readable clip: it has no video"):
        read_frames((tmp_path / "a.mp4").read_bytes(), SMALL)


def test_no_readable_clip_is_an_error_that_lists(family: VideoCrafter, tmp_path: Path) -> None:
    put_pair(tmp_path / "in", "a.mp4", "a star", num_frames=2)
    found = open_clips(str(tmp_path / "in"))
    with pytest.raises(ValueError, match=r"none of 1 clips can be decoded; skipped 1:\n.*a\.mp4: too short"):
        encode_dataset(found, SMALL, family, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_latents_are_those_of_the_family_and_kept(
    family: VideoCrafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, caption in (("a.mp4", "a star"), ("b.gif", "a cross"), ("c.webm", "a star")):
        put_pair(tmp_path / "in", name, caption)
    found = open_clips(str(tmp_path / "in"))
    settings = ClipSettings(3, 16, 16, flip=True)
    kept = encode_dataset(found, settings, family, tmp_path / "cache")
    pixels = torch.stack([settings.decode(example) for example in found.examples])
    assert kept.latents.shape == (6, 4, 3, 8, 8)
    assert max_error(kept.latents[:3], family.encode_pixels(pixels)) <= 1e-6
    assert max_error(kept.latents[3:], family.encode_pixels(pixels.flip(-1))) <= 1e-6
    assert max_error(kept.latents[3:], kept.latents[:3]) > 1e-2
    assert [kept.captions[row] for row in kept.caption_rows] == ["a star", "a cross", "a star"] * 2
    monkeypatch.setattr(VideoCrafter, "encode_pixels", None)
    for path in (tmp_path / "in").iterdir():
        path.rename(path.with_name(f"new-{path.name}"))
    found = open_clips(str(tmp_path / "in"))
    again = encode_dataset(found, settings, family, tmp_path / "cache")
    assert torch.equal(again.latents, kept.latents)
    with pytest.raises(TypeError, match="not callable"):
        encode_dataset(found, ClipSettings(3, 16, 16, fps=4, flip=True), family, tmp_path / "cache")


# Writing


def ramp(num_frames: int, size: int = 32) -> NDArray[np.uint8]:
    return np.stack([np.full((size, size, 3), level(i), np.uint8) for i in range(num_frames)])


@pytest.mark.parametrize("fps", [8, 23.976])
def test_a_written_clip_is_read_back(fps: float, tmp_path: Path) -> None:
    path = tmp_path / "out" / "a.mp4"
    write_mp4(path, ramp(6), fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.frames) == ("h264", "yuv420p", 6)
        assert float(stream.average_rate) == pytest.approx(fps, abs=1e-3)
    frames = read_frames(path.read_bytes(), ClipSettings(6, 32, 32))
    assert np.abs(np.stack([np.asarray(frame, int) for frame in frames]) - ramp(6)).max() <= 3
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


def test_a_failed_write_leaves_the_old_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, ramp(2), 8)
    before = path.read_bytes()
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", None)
    with pytest.raises(TypeError):
        write_mp4(path, ramp(3), 8)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (ramp(2, 31), 8, "even H and W; got (2, 31, 31, 3)"),
        (ramp(2)[0], 8, "got (32, 32, 3)"),
        (ramp(2)[:0], 8, "got (0, 32, 32, 3)"),
        (ramp(2), 0, "a positive number of frames per second; got 0"),
    ],
)
def test_what_is_no_clip_is_not_written(frames: NDArray[np.uint8], fps: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a clip needs") as caught:
        write_mp4(tmp_path / "a.mp4", frames, fps)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'timestep-experts\[video\]'"):
        write_mp4(tmp_path / "a.mp4", ramp(2), 8)
    with pytest.raises(ValueError, match=r"pip install 'timestep-experts\[video\]'"):
        read_frames(b"", SMALL)


def test_a_sheet_shows_a_row_per_clip(tmp_path: Path) -> None:
    clips = np.stack([ramp(9, 160), 255 - ramp(9, 160)])
    save_clip_sheet(tmp_path / "a.png", clips, ["a star", "a cross"], columns=3)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    row = 16 + 80
    assert [sheet[row, 16 + 80 + i * 176, 0] for i in range(3)] == [level(i) for i in (0, 4, 8)]
    below = next(y for y in range(200, len(sheet)) if (sheet[y, 96] != 255).any() and (sheet[y, 272] != 255).any())
    assert [sheet[below + 80, 16 + 80 + i * 176, 0] for i in range(3)] == [255 - level(i) for i in (0, 4, 8)]
    under = sheet[16 + 160 : below]
    assert (under[:, 16:176] != 255).any()  # the caption
    assert (under[:, 192:] == 255).all()


@pytest.mark.parametrize(
    ("clips", "texts", "columns", "message"),
    [
        (ramp(3), ["a"], 3, "clips of shape"),
        (ramp(3)[None], [], 3, "one caption per clip; got 0 for 1"),
        (ramp(3)[None], ["a"], 0, "at least 1 column"),
    ],
)
def test_a_sheet_needs_clips(
    clips: NDArray[np.uint8], texts: list[str], columns: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_clip_sheet(tmp_path / "a.png", clips, texts, columns)
