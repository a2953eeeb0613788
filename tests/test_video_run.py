"""A whole run on a video base: clips in, clips out; the command line of ``test_cli``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from families.tiny_video import tiny_video_crafter
from test_cli import Run, call, refused, write_recipe
from timestep_experts.data import ClipSettings, Example, decode_all
from timestep_experts.formats import load_bundle
from timestep_experts.inference import write_mp4

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def write_clips(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = ["video,caption"]
    for index in range(4):
        write_mp4(folder / f"{index}.mp4", generator.integers(0, 256, (5, 16, 24, 3), dtype=np.uint8), 8)
        rows.append(f"{index}.mp4,a star moves {index}")
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("video")
    base = home / "base"
    pipeline = tiny_video_crafter()
    pipeline.unet.fps = 10.0
    pipeline.save_pretrained(base)
    data = write_clips(home / "data")
    recipe = write_recipe(
        home,
        base,
        data,
        resolution=[16, 24],
        data={
            "path": str(data),
            "validation_path": str(data),
            "max_validation_samples": 2,
            "clips": {"num_frames": 2, "fps": 8, "stride": 2},
        },
        method={
            "experts": {
                "target_modules": ["to_k", "to_v"],
                "text_target_modules": ["out_proj"],
                "scales": [{"intervals": 2, "rank": 2}, {"intervals": 1, "rank": 2}],
            }
        },
        evaluation={
            "num_pictures": 2,
            "bins_per_interval": 1,
            "num_prompts": 2,
            "num_inference_steps": 2,
            "batch_size": 2,
        },
        variants={},
    )
    return Run(recipe, data, call("run", recipe))


def test_a_run_measures_and_keeps_clips(finished: Run) -> None:
    assert finished.outcome.code == 0, finished.outcome.err
    assert "4 training and 2 validation clips, 0 skipped; 2 prompts" in finished.outcome.out
    rows = {(row["variant"], row["mode"]): row for row in finished.results}
    assert list(rows) == [("base", "off"), ("main", "switch"), ("main", "route")]
    assert len({row["curve"]["loss"][0] for row in rows.values()}) == 3
    for row in ("base-off", "main-switch", "main-route"):
        folder = finished.out / "evaluation" / row
        kept = sorted((folder / "pictures").glob("*.mp4"))
        assert len(kept) == 2
        examples = [Example(str(path), "drawn", path.read_bytes) for path in kept]
        assert decode_all(examples, ClipSettings(2, 16, 24)).shape == (2, 2, 16, 24, 3)
        with Image.open(folder / "sheet.png") as sheet:
            assert sheet.width > 2 * 160


def test_its_report_shows_clips_that_move(finished: Run) -> None:
    page = (finished.out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") == 2 * 4  # of 2 prompts: real, base, switch and route
    assert "frame by frame" in page


def test_clips_are_drawn_as_they_were_trained_unless_told_otherwise(finished: Run, tmp_path: Path) -> None:
    bundle = finished.out / "variants" / "main" / "bundle"
    assert load_bundle(bundle).provenance["recipe"]["resolution"] == [16, 24]
    outcome = call("sample", bundle, "--prompt", "a star", "--output", tmp_path / "a", "--steps", "2")
    assert outcome.code == 0, outcome.err
    assert "1 clips and sheet.png" in outcome.out
    assert "text passes" in outcome.out
    read = (tmp_path / "a" / "000000.mp4").read_bytes
    assert decode_all([Example("a", "drawn", read)], ClipSettings(2, 16, 24)).shape == (1, 2, 16, 24, 3)
    other = ["--num-frames", "3", "--height", "8", "--width", "16", "--fps", "5"]
    call("sample", bundle, "--prompt", "a star", "--output", tmp_path / "b", "--steps", "2", *other)
    read = (tmp_path / "b" / "000000.mp4").read_bytes
    assert decode_all([Example("b", "drawn", read)], ClipSettings(3, 8, 16)).shape == (1, 3, 8, 16, 3)


def test_a_second_run_measures_nothing_anew(finished: Run) -> None:
    stored = sorted((finished.out / "evaluation").glob("*/result.json"))
    before = [path.stat().st_mtime_ns for path in stored]
    assert call("run", finished.recipe).code == 0
    assert [path.stat().st_mtime_ns for path in stored] == before


def test_a_base_of_pictures_takes_no_clips(finished: Run) -> None:
    message = refused("run", finished.recipe, "pretrained_model_name_or_path=world/base", "output_dir=elsewhere")
    assert "recipe.data.clips: world/base generates pictures, not clips" in message
