"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from rich.console import Console

from conftest import scales, tiny_unet, write_pictures
from timestep_experts import cli
from timestep_experts.build import build_prompts
from timestep_experts.config import load_recipe
from timestep_experts.data import Dataset
from timestep_experts.formats import load_bundle
from timestep_experts.mixture import Mixture, MixtureSpec

# of numpy, met in the schedulers of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TARGETS = ["to_q", "conv1"]


@dataclass(frozen=True)
class Outcome:
    """What a call left: its exit code, and what it printed with runs of blanks made one."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Outcome:
    """Run the command in this process; tables get room enough not to wrap."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["timestep-experts", *map(str, arguments)])
        patch.setattr(cli, "console", Console(width=300))
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    printed, complained = (re.sub(r" +", " ", text.getvalue()) for text in (out, err))
    return Outcome(code, printed, complained)


def refused(*arguments: object) -> str:
    """The one message of a call that must fail as a user's error."""
    outcome = call(*arguments)
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.splitlines() if "error:" in line]  # progress bars may stand before it
    assert len(lines) == 1, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    return outcome.err[outcome.err.index("error:") :].removeprefix("error: ").strip()


def row(outcome: Outcome, *starts: str) -> list[str]:
    """The cells of the table row that begins with these cells."""
    assert outcome.code == 0, outcome.err
    rows = ([cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in outcome.out.splitlines())
    (found,) = (cells for cells in rows if cells[: len(starts)] == list(starts))
    return found


# Parsing and failing


@pytest.mark.parametrize(
    "command",
    [
        *(None, "run", "foster", "distill", "assemble", "decouple", "evaluate", "sample", "show", "explain"),
        *("merge", "search", "merge-lora", "extract-lora", "analyse"),
    ],
)
def test_every_command_has_help(command: str | None) -> None:
    outcome = call(*([command] if command else []), "--help")
    assert outcome.code == 0
    assert "Usage" in outcome.out


@pytest.mark.parametrize("arguments", [["fly"], ["run"], ["explain", "--steps", "0"], ["show", "--what"]])
def test_wrong_usage_is_a_users_error(arguments: Sequence[str]) -> None:
    outcome = call(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_an_error_of_our_own_keeps_its_traceback() -> None:
    code = (
        "import sys; from timestep_experts import cli\n"
        "def fail(*_): raise KeyError('ours')\n"
        "cli._load = fail; sys.argv = ['x', 'run', 'recipe.yaml']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'ours'" in done.stderr


def test_a_value_error_of_a_library_is_not_blamed_on_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        math.sqrt(-1)

    monkeypatch.setattr(cli, "_load", fail)
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        call("run", "recipe.yaml")


def test_an_unexpected_value_error_of_our_own_is_not_blamed_on_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"__name__": "timestep_experts.anywhere"}
    exec("def fail(*_): raise ValueError('a bug')", ours)
    monkeypatch.setattr(cli, "_load", ours["fail"])
    with pytest.raises(ValueError, match="a bug"):
        call("run", "recipe.yaml")


# Explaining


SD = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.double).square()
SIGMA = (1 / (1 - SD).cumprod(0) - 1).sqrt()


def test_intervals_are_explained_in_every_unit() -> None:
    outcome = call("explain", "--intervals", 4, "--steps", 8)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(8)
    timesteps = scheduler.timesteps.tolist()
    for index in range(4):
        lo, hi = 250 * index, 250 * (index + 1)
        cells = row(outcome, str(index), f"[{lo}, {hi})")
        start, end = SIGMA[lo], SIGMA[min(hi, 999)]
        assert cells[2] == f"{start:.3g} to {end:.3g}"
        assert cells[3] == f"{-2 * start.log():.3g} to {-2 * end.log():.3g}"
        assert cells[4] == "25.0%"
        assert cells[5] == ", ".join(f"{step} ({t})" for step, t in enumerate(timesteps) if lo <= t < hi)


def test_an_expert_that_no_step_meets_is_said_to_be_unused() -> None:
    outcome = call("explain", "--boundaries", "0,10,11.5,1000", "--steps", 5)
    assert row(outcome, "1", "[10, 11.5)")[-1] == "none: this expert is never used"
    assert row(outcome, "1", "[10, 11.5)")[4] == "0.1%"


def test_flow_models_train_most_where_the_shift_puts_them() -> None:
    flow = ("--scheduler", "FlowMatchEulerDiscreteScheduler", "--shift", 5, "--steps", 10)
    outcome = call("explain", "--boundaries", "0,875,1000", *flow)
    high = row(outcome, "1", "[875, 1000)")
    # logit-normal: sigma = .875 after the shift is .5833 before it, and P(normal > logit .5833) = .368
    assert high[4] == "36.8%"
    assert row(outcome, "0", "[0, 875)")[4] == "63.2%"
    assert high[2] == "0.875 to 1"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps.tolist()
    assert high[5] == ", ".join(f"{step} ({t:g})" for step, t in enumerate(timesteps) if t >= 875)


def test_one_interval_is_said_in_other_trainers_words() -> None:
    outcome = call("explain", "--interval", "200,400")
    assert row(outcome, "1", "[200, 400)")[4] == "20.0%"
    assert row(outcome, "kohya sd-scripts")[1] == "--min_timestep 200 --max_timestep 400"
    assert row(outcome, "diffusion-pipe")[1].startswith("min_t = 0.2, max_t = 0.4")
    shifted = call("explain", "--interval", "875,1000", "--scheduler", "FlowMatchEulerDiscreteScheduler", "--shift", 5)
    assert row(shifted, "OneTrainer")[1].startswith("min_noising_strength 0.5833, max 1 ")
    assert row(shifted, "DiffSynth-Studio")[1].startswith("--min_timestep_boundary 0 --max_timestep_boundary 0.4167")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give exactly one of --intervals, --boundaries and --interval"),
        (["--intervals", 4, "--boundaries", "0,1000"], "give exactly one of"),
        (["--intervals", 4, "--interval", "0,1000"], "give exactly one of"),
        (["--interval", "200"], "--interval takes 2 numbers; got '200'"),
        (["--interval", "1,2,3"], "--interval takes 2 numbers; got '1,2,3'"),
        (["--interval", "a,b"], "--interval takes numbers separated by commas; got 'a,b'"),
        (["--boundaries", ""], "--boundaries takes numbers separated by commas; got ''"),
        (["--interval", "400,200"], "an interval needs 0 <= lo < hi"),
        (["--interval", "nan,200"], "--interval takes finite numbers; got 'nan,200'"),
        (["--interval", "900,1100"], "beyond t = 1000"),
        (["--boundaries", "100,1000"], "must ascend from 0"),
        (["--boundaries", "0,500"], "1000"),
        (["--boundaries", "0,500,2000"], "1000"),
        (["--intervals", 2, "--scheduler", "Nope"], "no scheduler 'Nope'; it has "),
        (["--intervals", 2, "--shift", 3], "--shift"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[object], message: str) -> None:
    assert message in refused("explain", *options)


# A whole run


def write_recipe(home: Path, base: Path, data: Path, /, **changes: Any) -> Path:
    """The recipe of a run of seconds, in ``home``; its output is ``home / "out"``."""
    document: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "output_dir": str(home / "out"),
        "resolution": 16,
        "device": "cpu",
        "data": {"path": str(data), "validation_share": 0.4},
        "method": {
            "kind": "foster",
            "experts": {
                "target_modules": TARGETS,
                "scales": [{"intervals": 4, "rank": 2}, {"intervals": 1, "rank": 2}],
            },
            "max_train_steps": 2,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "assemble": {"max_train_steps": 2, "train_batch_size": 3, "learning_rate": 1e-3},
        },
        "evaluation": {
            "num_pictures": 3,
            "bins_per_interval": 2,
            "num_prompts": 3,
            "num_inference_steps": 2,
            "batch_size": 2,
        },
        "variants": {"lora": {"method": {"experts": {"scales": [{"intervals": 1, "rank": 2}]}}}},
    }
    method = changes.pop("method", {})
    if "kind" in method:  # another way of training
        document["method"] = method
    else:
        document["method"] |= method
    home.mkdir(exist_ok=True)
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(document | changes, sort_keys=False))
    return path


@dataclass(frozen=True)
class Run:
    recipe: Path
    data: Path
    outcome: Outcome

    @property
    def out(self) -> Path:
        return self.recipe.parent / "out"

    @property
    def results(self) -> list[dict[str, Any]]:
        return json.loads((self.out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has been run once; its files are not to be changed."""
    home = tmp_path_factory.mktemp("run")
    data = write_pictures(home / "data")
    (data / "broken.png").write_bytes(b"no picture")
    (data / "broken.txt").write_text("thing 0")  # beside a caption of the training side or of the other
    recipe = write_recipe(home, base, data)
    return Run(recipe, data, call("run", recipe))


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    """A copy of that run, to be changed."""
    shutil.copytree(finished.recipe.parent, tmp_path / "run")
    document = yaml.safe_load(finished.recipe.read_text())
    document["output_dir"] = str(tmp_path / "run" / "out")
    document["data"]["path"] = str(tmp_path / "run" / "data")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    return Run(recipe, tmp_path / "run" / "data", finished.outcome)


def test_a_run_leaves_everything_there_is_to_keep(finished: Run) -> None:
    assert finished.outcome.code == 0, finished.outcome.err
    out = finished.out
    for path in ("recipe.yaml", "results.json", "report.html"):
        assert (out / path).stat().st_size > 0
    assert load_bundle(out / "variants" / "main" / "bundle").mode == "route"
    assert load_bundle(out / "variants" / "lora" / "bundle").mode == "switch"
    measured = ["base-off", "lora-switch", "main-route", "main-switch"]
    assert sorted(path.name for path in (out / "evaluation").glob("[!.]*")) == measured
    for name in measured:
        assert len(list((out / "evaluation" / name / "pictures").glob("*.png"))) == 3
    assert {path.name for path in out.rglob(".*")} == {".lock"}  # and no drafts


def test_a_run_says_what_it_did_and_skipped(finished: Run) -> None:
    out = finished.outcome.out
    assert re.search(r"\d+ training and \d+ validation pictures, 1 skipped; 3 prompts", out)
    assert f"skipped {finished.data / 'broken.png'}: not a readable picture" in out
    assert f"report: {finished.out / 'report.html'}" in out
    assert "broken.png" in (finished.out / "report.html").read_text(encoding="utf-8")


def test_the_results_are_whole_and_add_up(finished: Run) -> None:
    rows = {(r["variant"], r["mode"]): r for r in finished.results}
    assert list(rows) == [("base", "off"), ("main", "switch"), ("main", "route"), ("lora", "switch")]
    for result in rows.values():
        assert len(result["interval_losses"]) == 4
        assert len(result["curve"]["loss"]) == 8
        assert all(math.isfinite(value) and value > 0 for value in result["curve"]["loss"])
        means = np.array(result["curve"]["loss"]).reshape(4, 2).mean(1)
        assert np.abs(means - result["interval_losses"]).max() < 1e-6
        assert result["verdict"] is None  # no captions of the embedded world
        assert result["frechet"] > 0
    assert len({tuple(result["interval_losses"]) for result in rows.values()}) == 4
    counts = {key: (r["parameters"]["trainable"], r["num_images_seen"]) for key, r in rows.items()}
    experts, routers = attached_parameters(4, 1)
    assert counts[("base", "off")] == (0, 0)
    assert counts[("main", "switch")] == (experts, 2 * 4 * 2)
    assert counts[("main", "route")] == (experts + routers, 2 * 4 * 2 + 2 * 3)
    assert counts[("lora", "switch")] == (attached_parameters(1)[0], 2 * 2)
    assert [len(rows[key]["gates"]) for key in rows] == [0, 0, 1, 0]


def attached_parameters(*numbers: int) -> tuple[int, int]:
    """Parameters of experts and of routers of rank 2 on the tiny UNet."""
    mixture = Mixture.attach(tiny_unet(), MixtureSpec(scales(*numbers, rank=2)), TARGETS)
    state = mixture.state_dict()
    return tuple(sum(v.numel() for k, v in state.items() if part in k) for part in (".experts.", ".router."))


def states(run: Run) -> dict[str, tuple[int, int]]:
    """Time of change and size of whatever training and measuring wrote."""
    kept = [*run.out.glob("variants/*/*/result.safetensors"), *run.out.glob("evaluation/*/result.json")]
    kept += [*run.out.glob("evaluation/*/pictures/*.png"), *run.out.glob("cache/*.safetensors")]
    kept += run.out.glob("variants/*/*/log.jsonl")
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in kept}


@pytest.mark.parametrize("command", ["run", "evaluate", "foster", "assemble"])
def test_the_same_command_again_trains_and_measures_nothing(command: str, finished: Run) -> None:
    before, results = states(finished), (finished.out / "results.json").read_bytes()
    bundles = {path: path.read_bytes() for path in finished.out.glob("variants/*/bundle/*")}
    assert len(before) == 3 + 3 + 4 + 12 + 2
    again = call(command, finished.recipe)
    assert again.code == 0, again.err
    assert states(finished) == before
    assert (finished.out / "results.json").read_bytes() == results
    assert {path: path.read_bytes() for path in finished.out.glob("variants/*/bundle/*")} == bundles


def test_the_stages_one_by_one_are_a_run(base: Path, finished: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "staged", base, finished.data)
    for command in ("foster", "assemble", "evaluate"):
        outcome = call(command, recipe)
        assert outcome.code == 0, outcome.err
        if command == "foster":
            assert load_bundle(tmp_path / "staged" / "out" / "variants" / "main" / "bundle").mode == "switch"

    def timeless(run: Run) -> list[dict[str, Any]]:
        return [{key: value for key, value in result.items() if key != "seconds"} for result in run.results]

    assert timeless(Run(recipe, finished.data, outcome)) == timeless(finished)


def test_a_bundle_is_shown(finished: Run) -> None:
    bundle = finished.out / "variants" / "main" / "bundle"
    outcome = call("show", bundle)
    assert row(outcome, "n4") == ["n4", "core", "1", "2", "2", "4", "[0, 250) [250, 500) [500, 750) [750, 1000)"]
    assert row(outcome, "n1")[1:3] == ["context (gated)", "1"]
    stored = sum(attached_parameters(4, 1))
    assert f"{stored:,} parameters stored; meant to be used in mode route" in outcome.out
    assert "for a UNet2DConditionModel" in outcome.out
    assert '"max_train_steps": 2' in outcome.out
    assert '"base_dtype": "fp32"' in outcome.out


def test_paths_are_printed_as_they_are(finished: Run, tmp_path: Path) -> None:
    bundle = tmp_path / "a [bold] name" / "bundle"
    shutil.copytree(finished.out / "variants" / "main" / "bundle", bundle)
    document = json.loads((bundle / "mixture.json").read_text())
    document["base_model"] = "models/[v1] base [/v1]"
    (bundle / "mixture.json").write_text(json.dumps(document))
    outcome = call("show", bundle)
    assert outcome.code == 0, outcome.err
    assert "a [bold] name" in outcome.out
    assert "(models/[v1] base [/v1])" in outcome.out


def test_pictures_are_drawn_with_a_bundle(finished: Run, tmp_path: Path) -> None:
    bundle = finished.out / "variants" / "main" / "bundle"
    drawn = {}
    for mode in (None, "route", "switch", "off"):
        folder = tmp_path / str(mode)
        options = ["--prompt", "a thing", "--prompt", "two things", "--output", folder, "--steps", 2, "--seed", 7]
        outcome = call("sample", bundle, *options, *(["--mode", mode] if mode else []))
        assert outcome.code == 0, outcome.err
        assert f"2 pictures and sheet.png in {folder}; 2 denoiser calls" in outcome.out
        assert sorted(path.name for path in folder.iterdir()) == ["000007.png", "000008.png", "sheet.png"]
        drawn[mode] = [np.asarray(Image.open(folder / f"00000{seed}.png")) for seed in (7, 8)]
        assert {picture.shape for picture in drawn[mode]} == {(16, 16, 3)}
    assert np.array_equal(drawn[None], drawn["route"])
    assert not np.array_equal(drawn["off"], drawn["switch"])
    options[options.index("--output") + 1] = tmp_path / "fused"
    assert call("sample", bundle, *options, "--mode", "switch", "--fused").code == 0
    for seed, picture in zip((7, 8), drawn["switch"], strict=True):
        fused = np.asarray(Image.open(tmp_path / "fused" / f"00000{seed}.png"))
        assert abs(fused.astype(int) - picture).max() <= 1  # fp32 sums in another order, then whole numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "swap"], "unknown mode 'swap': allowed are switch, route and off"),
        (["--mode", "foster"], "unknown mode 'foster'"),
        (["--fused", "--mode", "off"], "--fused has no meaning in mode off"),
        (["--scheduler", "Nope"], "no scheduler 'Nope'"),
        (["--model", "/nowhere/at/all"], "cannot load a pipeline from '/nowhere/at/all'"),
    ],
)
def test_pictures_that_cannot_be_drawn(options: list[str], message: str, finished: Run, tmp_path: Path) -> None:
    bundle = finished.out / "variants" / "main" / "bundle"
    output = tmp_path / "pictures"
    assert message in refused("sample", bundle, "--prompt", "a thing", "--output", output, *options)
    assert not output.exists()


def test_text_experts_are_previewed_and_drawn_with_their_cost(base: Path, finished: Run, tmp_path: Path) -> None:
    experts = {"target_modules": TARGETS, "text_target_modules": ["q_proj"], "scales": [{"intervals": 4, "rank": 2}]}
    training = {"preview_pictures": 2, "checkpointing_steps": None}
    method = {"experts": experts, "assemble": None}
    recipe = write_recipe(tmp_path, base, finished.data, method=method, training=training, variants={})
    outcome = call("run", recipe)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / "variants" / "main" / "foster-joint" / "previews" / "step-000002.png").is_file()
    options = ["--output", tmp_path / "pictures", "--steps", 8, "--guidance", 3]
    drawn = call(
        "sample", tmp_path / "out" / "variants" / "main" / "bundle", "--prompt", "a", "--prompt", "b", *options
    )
    assert "; 5 text passes (2.5 per picture), 8 denoiser calls" in drawn.out, drawn.err
    silent = call(
        "sample", tmp_path / "out" / "variants" / "main" / "bundle", "--prompt", "a", "--mode", "off", *options
    )
    assert "; 1 text passes (1.0 per picture), 8 denoiser calls" in silent.out, silent.err


@pytest.mark.parametrize("command", [["show"], ["sample", "--prompt", "x"]])
def test_what_is_no_bundle_is_refused(command: list[str], tmp_path: Path) -> None:
    assert f"no bundle at {tmp_path}" in refused(command[0], tmp_path, *command[1:])


# Order, and changes of mind


def test_assembling_before_fostering_is_refused(base: Path, finished: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, finished.data)
    assert "variant 'main' is not fostered yet (" in refused("assemble", recipe)


def test_assembling_a_variant_of_one_scale_is_refused_when_asked_for(copied: Run) -> None:
    assert "no routers to train" in refused("assemble", copied.recipe, "--variant", "lora")


def test_evaluating_before_training_is_refused_at_once(base: Path, finished: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, finished.data)
    assert "no bundle at" in refused("evaluate", recipe)
    assert not (tmp_path / "out" / "evaluation").exists()  # not after minutes of drawing with the base


@pytest.mark.parametrize("command", ["foster", "assemble"])
@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_an_unknown_variant_is_named(command: str, option: list[str], finished: Run) -> None:
    message = refused(command, finished.recipe, "--variant", "lorra", *option)
    assert "no variant 'lorra' in this recipe: it has main, lora" in message


def test_one_variant_alone(base: Path, finished: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, finished.data)
    assert call("foster", recipe, "--variant", "lora").code == 0
    assert [path.name for path in (tmp_path / "out" / "variants").iterdir()] == ["lora"]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("method.learning_rate=2.0e-2", "learning_rate"),
        ("seed=1", "seed"),
        ("method.experts.scales.0.rank=3", "experts"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_says_what_differs(override: str, what: str, copied: Run) -> None:
    before = states(copied)
    assert what in refused("run", copied.recipe, override)
    assert states(copied).items() >= {k: v for k, v in before.items() if "/cache/" not in k}.items()


@pytest.mark.parametrize("what", ["picture", "caption"])
def test_a_finished_stage_does_not_pass_for_one_of_other_data(what: str, base: Path, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    validation = shutil.copytree(data, tmp_path / "validation")
    command = ("foster", write_recipe(tmp_path, base, data), f"data.validation_path={validation}", "--variant", "lora")
    assert call(*command).code == 0
    if what == "caption":
        (data / "03.txt").write_text("another thing")
    else:
        Image.new("RGB", (16, 16), "red").save(data / "03.png")
    assert "train_pictures" in refused(*command)


def test_other_intervals_are_measured_anew(copied: Run) -> None:
    shutil.rmtree(copied.out / "variants")
    outcome = call("run", copied.recipe, "method.experts.scales.0.intervals=2")
    assert outcome.code == 0, outcome.err
    assert {len(result["interval_losses"]) for result in copied.results} == {2}


# What is checked before anything is trained


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.max_step=3"], "recipe.method.max_step: unknown key; did you mean 'max_train_steps'?"),
        (["method.experts.scales.5.rank=3"], "override 'method.experts.scales.5.rank=3'"),
        (["seed"], "an override reads key=value; got 'seed'"),
        (["pretrained_model_name_or_path=/nowhere/at/all"], "cannot load a pipeline from '/nowhere/at/all'"),
        (["device=banana"], "recipe.device: "),
        (["data.path={empty}"], "no usable captioned picture in"),
        (["data.validation_share=0.00001"], "leaves no validation picture"),
        (["method.experts.target_modules=[to_nowhere]"], "target modules ['to_nowhere'] match no layer"),
        (["variants.lora.method.experts.target_modules=[to_nowhere]"], "target modules ['to_nowhere'] match no layer"),
        (["method.experts.scales.0={{boundaries: [0, 500]}}"], "end at 500; this base model has 1000 timesteps"),
        (
            ["variants.lora.method.experts.scales.0={{boundaries: [0, 500]}}"],
            "end at 500; this base model has 1000 timesteps",
        ),
        (["evaluation.scheduler=Nope"], "no scheduler 'Nope'"),
        (["evaluation.prompts={empty}/prompts.txt"], "recipe.evaluation.prompts: no file"),
        (["evaluation.prompts={empty}/latin.txt"], "latin.txt is not UTF-8 text"),
        (["evaluation.judge=scenes"], "not a caption of the embedded world"),
    ],
)
def test_a_run_that_cannot_end_well_does_not_start(
    overrides: list[str], message: str, base: Path, finished: Run, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/latin.txt").write_bytes("café".encode("latin-1"))
    recipe = write_recipe(tmp_path, base, finished.data)
    assert message in refused("run", recipe, *(text.format(empty=tmp_path / "empty") for text in overrides))
    assert not (tmp_path / "out" / "variants").exists()


def test_prompts_are_lines_whatever_editors_put_into_them(base: Path, finished: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\u2028by day\r\n\n  a dog\n".encode())
    recipe = load_recipe(write_recipe(tmp_path, base, finished.data), [f"evaluation.prompts={tmp_path}/prompts.txt"])
    assert build_prompts(recipe, Dataset((), ())) == ("a cat\u2028by day", "a dog")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_a_users_error(base: Path, finished: Run, tmp_path: Path) -> None:
    assert "recipe.device" in refused("run", write_recipe(tmp_path, base, finished.data), "device=cuda")


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    assert refused("run", tmp_path / "gone.yaml") == f"no recipe at {tmp_path / 'gone.yaml'}"


# The plan


def test_a_dry_run_prints_what_training_would_train(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, data)
    outcome = call("run", recipe, "--dry-run")
    experts, routers = attached_parameters(4, 1)
    stages = [cells[:7] for cells in (row(outcome, "main", name) for name in ("foster-joint", "assemble"))]
    # columns: variant, stage, experts, trained, steps, samples per expert, samples; the one context meets all samples
    assert stages[0] == ["main", "foster-joint", "5", f"{experts:,}", "2", "4 to 16", "16"]
    assert stages[1][3:5] == [f"{routers:,}", "2"]
    assert row(outcome, "lora")[2:7] == ["1", f"{attached_parameters(1)[0]:,}", "2", "4", "4"]
    assert "estimated memory of training on" in outcome.out
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    sizes = [cell.split(" ") for cell in row(outcome, "lora")[7:]]
    base, experts, activations, peak = (float(number) * units[unit] for number, unit in sizes)
    assert min(base, experts, activations) > 0
    assert abs(base + experts + activations - peak) < 0.1 * peak  # each is rounded to a tenth of its unit
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_every_scale_by_itself(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, data, variants={})
    outcome = call(
        "foster", recipe, "--dry-run", "method.schedule=independent", "method.experts.scales.0.max_train_steps=5"
    )
    for number, steps in ((4, 5), (1, 2)):
        cells = row(outcome, "main", f"foster-n{number}")
        assert cells[2:5] == [str(number), f"{attached_parameters(number)[0]:,}", str(steps)]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_one_variant(base: Path, data: Path, tmp_path: Path) -> None:
    outcome = call("foster", write_recipe(tmp_path, base, data), "--variant", "lora", "--dry-run")
    assert row(outcome, "lora")[4] == "2"
    assert "main" not in outcome.out


def test_a_dry_run_needs_a_base_it_can_read(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tmp_path / "nowhere", tmp_path)
    assert f"cannot load a pipeline from '{tmp_path / 'nowhere'}'" in refused("run", recipe, "--dry-run")
    recipe = write_recipe(tmp_path, base, data)
    assert "match no layer" in refused("run", recipe, "--dry-run", "method.experts.target_modules=[to_nowhere]")
