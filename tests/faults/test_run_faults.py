"""A run meets damage, signals, another process or another base: it says so, and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import normal, random_pictures, scales
from test_cli import call, write_recipe
from timestep_experts.data import EncodedDataset, PictureSettings, encode_dataset, open_dataset
from timestep_experts.errors import UserError
from timestep_experts.formats.atomic import atomic_path, check_output_folder, write_text
from timestep_experts.formats.locks import only_process_in
from timestep_experts.formats.sealed import (
    DamagedError,
    read_sealed_json,
    read_sealed_tensors,
    write_sealed_json,
    write_sealed_tensors,
)
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.models import StableDiffusion
from timestep_experts.models.sources import pipeline_sha256
from timestep_experts.training import FosterSettings, LoopSettings, OptimiserSettings, foster
from timestep_experts.training.log import RunLog, read_log
from timestep_experts.training.loop import RESULT, run_stage
from timestep_experts.training.stage import Training

STEPS = 6


def train(family: StableDiffusion, folder: Path, observe: Any = None, **options: Any) -> dict[str, Tensor]:
    """The result of a stage of six steps in this folder, from where it stands."""
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(2, rank=2)), ["to_q"])
    settings = FosterSettings("independent", 2, {"n2": [0.05] * 2}, {"n2": [STEPS] * 2}, caption_dropout=0.1, seed=5)
    loop = LoopSettings(
        OptimiserSettings("AdamW"), checkpointing_steps=2, checkpoints_total_limit=None, logging_steps=1, **options
    )
    try:
        stage = foster(mixture, settings)[0]
        run_stage(Training(stage, mixture, family), random_pictures(6, family), loop, folder, {"run": "x"}, observe)
        return {name: value.clone() for name, value in mixture.state_dict().items()}
    finally:
        mixture.detach()


@pytest.fixture
def whole(family: StableDiffusion, tmp_path: Path) -> Path:
    """The folder of a run that nothing happened to."""
    train(family, tmp_path / "whole")
    return tmp_path / "whole"


def cut_short(whole: Path, folder: Path) -> Path:
    """A copy of a run as it was before its last step."""
    shutil.copytree(whole, folder)
    (folder / RESULT).unlink()
    return folder


# Seals


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(place: float, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sealed")
    write_sealed_tensors(folder / "a", {"x": normal(3, 2), "y": torch.arange(5), "z": torch.tensor([True])})
    write_sealed_json(folder / "b", {"step": 7, "optimizer": {"0.lr": 1e-4}, "words": ["a", None]})
    for name, read in (("a", read_sealed_tensors), ("b", read_sealed_json)):
        path = folder / name
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        before = read(path)
        path.write_bytes(bytes(content))
        try:
            after = read(path)  # white space may change between keys
        except DamagedError:
            continue
        assert repr(after) == repr(before)


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda _: b"", lambda c: bytes(len(c))])
def test_truncated_empty_and_zeroed_files_are_damaged(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    write_sealed_tensors(tmp_path / "a", {"x": normal(3, 2)})
    write_sealed_json(tmp_path / "b", {"step": 7})
    for name, read in (("a", read_sealed_tensors), ("b", read_sealed_json)):
        path = tmp_path / name
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(DamagedError, match=name):
            read(path)


FILES = ("experts.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "gone", "edited"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(
    name: str, damage: str, whole: Path, family: StableDiffusion, tmp_path: Path
) -> None:
    folder = cut_short(whole, tmp_path / "cut")
    path = folder / "checkpoint-4" / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "edited" and name == "state.json":
        path.write_text(path.read_text().replace('"step": 4', '"step": 5', 1))
    elif damage == "edited":
        save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        path.write_bytes({"flip": flipped, "truncate": content[:-10], "empty": b""}[damage])
    with pytest.warns(UserWarning, match=r"checkpoint-4.*renamed to checkpoint-4.damaged"):
        result = train(family, folder)
    assert (folder / "checkpoint-4.damaged").is_dir()
    assert (folder / RESULT).read_bytes() == (whole / RESULT).read_bytes()
    assert result.keys() == load_file(whole / RESULT).keys()


def test_where_all_checkpoints_are_damaged_the_run_begins_anew(
    whole: Path, family: StableDiffusion, tmp_path: Path
) -> None:
    folder = cut_short(whole, tmp_path / "cut")
    for path in folder.glob("checkpoint-*/experts.safetensors"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="renamed"):
        train(family, folder)
    assert (folder / RESULT).read_bytes() == (whole / RESULT).read_bytes()


def test_a_damaged_result_is_trained_again_from_the_last_checkpoint(whole: Path, family: StableDiffusion) -> None:
    content = (whole / RESULT).read_bytes()
    (whole / RESULT).write_bytes(content[:-3] + b"\0\0\0")
    with pytest.warns(UserWarning, match=r"result.safetensors.damaged"):
        train(family, whole)
    assert (whole / RESULT).read_bytes() == content


@pytest.mark.parametrize("name", ["checkpoint-7 (copy)", "checkpoint-", "checkpoint-x", "checkpoint-4.damaged"])
def test_folders_of_other_names_are_let_be(name: str, whole: Path, family: StableDiffusion, tmp_path: Path) -> None:
    folder = cut_short(whole, tmp_path / "cut")
    (folder / name).mkdir()
    train(family, folder)
    assert (folder / name).is_dir()
    assert (folder / RESULT).read_bytes() == (whole / RESULT).read_bytes()


def test_a_damaged_log_is_no_reason_to_stop(whole: Path, family: StableDiffusion, tmp_path: Path) -> None:
    folder = cut_short(whole, tmp_path / "cut")
    log = folder / "log.jsonl"
    log.write_bytes(b'{"step": 1}\n\xff\xfe{]\n[1]\n{"step": "a"}\n' + log.read_bytes()[:-9])
    train(family, folder)
    assert (folder / RESULT).read_bytes() == (whole / RESULT).read_bytes()
    assert read_log(folder)[-1]["step"] == STEPS


def test_a_damaged_cache_is_encoded_again(family: StableDiffusion, data: Path, tmp_path: Path) -> None:
    def encode() -> EncodedDataset:
        found = open_dataset(str(data), max_samples=None, seed=0)
        return encode_dataset(found, PictureSettings(16, 16), family, tmp_path)

    first = encode()
    for path in tmp_path.glob(f"{first.key}.*"):
        content = path.read_bytes()
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 4]) + content[-19:])
        with pytest.warns(UserWarning, match="encoded again"):
            again = encode()
        assert torch.equal(again.latents, first.latents)
        assert path.read_bytes() == content


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_step_saves_and_then_has_its_usual_effect(
    number: signal.Signals, whole: Path, family: StableDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    def ask(step: int, _: RunLog) -> None:
        if step == 3:
            signal.raise_signal(number)

    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stopped):
            train(family, tmp_path / "run", ask, validation_steps=1)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    # the signal came after step 3 was looked at, so step 4 ended and was saved
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert "stopped after step 4 of 6" in capsys.readouterr().err
    train(family, tmp_path / "run", None, validation_steps=1)
    assert (tmp_path / "run" / RESULT).read_bytes() == (whole / RESULT).read_bytes()


def test_a_second_signal_is_obeyed_at_once(family: StableDiffusion, tmp_path: Path) -> None:
    def ask_twice(step: int, _: RunLog) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one should have been obeyed")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(family, tmp_path, ask_twice, validation_steps=1)
    finally:
        signal.signal(signal.SIGINT, before)


# Numbers


def test_weights_that_are_not_finite_stop_training(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(1, rank=2)), ["to_q"])
    stage = foster(mixture, FosterSettings("independent", 2, {"n1": [1e38]}, {"n1": [1]}, caption_dropout=0, seed=5))[0]
    loop = LoopSettings(OptimiserSettings("SGD", {"weight_decay": 1e30}, max_grad_norm=None))
    with pytest.raises(UserError, match=r"not finite:\n  the weights of n1.0"):
        run_stage(Training(stage, mixture, family), random_pictures(6, family), loop, tmp_path, {})
    assert not (tmp_path / RESULT).exists()


@pytest.mark.parametrize("broken", [1, 20])
def test_updates_that_are_not_finite_are_skipped_and_counted(
    broken: int, family: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = family.predict, []

    def predict(noisy: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        calls.append(1)
        wrong = (t < 500) & (2 <= len(calls) < 2 + broken)
        return own(noisy, t, conditioning) * torch.where(wrong, torch.nan, 1.0).view(-1, 1, 1, 1)

    monkeypatch.setattr(family, "predict", predict)
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(2, rank=2)), ["to_q"])
    stage = foster(mixture, FosterSettings("independent", 2, {"n2": [0.05] * 2}, {"n2": [14] * 2}, 0.0, seed=5))[0]
    loop = LoopSettings(OptimiserSettings("AdamW"), logging_steps=1, not_finite="skip")
    run: Callable[[], None] = lambda: run_stage(  # noqa: E731 - it may or may not raise
        Training(stage, mixture, family), random_pictures(6, family), loop, tmp_path, {}
    )
    if broken > 10:  # in a row
        with pytest.raises(UserError, match=r"the gradient of n2.0, since step 12"):
            run()
        return
    run()
    assert [record["skipped_updates"] for record in read_log(tmp_path)] == [0, *[1] * 13]
    assert all(value.isfinite().all() for value in mixture.state_dict().values())


# Processes


HOLD = """
import sys
from pathlib import Path
from timestep_experts.formats.locks import only_process_in
with only_process_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A folder in which another process works."""
    folder = tmp_path / "held"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield folder
    process.communicate("\n")


def test_two_processes_do_not_train_in_one_folder(held: Path, family: StableDiffusion) -> None:
    with pytest.raises(UserError, match=rf"another run works in {held} \(process \d+ on .*\); wait"):
        train(family, held)


def test_a_lock_goes_with_its_process(held: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another run"), only_process_in(held):
        pass
    with only_process_in(tmp_path / "mine"), only_process_in(tmp_path / "other"):
        pass
    with only_process_in(tmp_path / "mine"):
        pass


def test_several_processes_are_refused(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = call("run", write_recipe(tmp_path, base, data))
    assert outcome.code == 2
    assert "was started in 2 processes" in outcome.err
    assert not (tmp_path / "out").exists()


def test_drafts_of_killed_processes_are_removed_and_others_are_not(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = os.uname().nodename[:40]
    dead = tmp_path / f".a.json.draft-{host}-{int(killed.stdout)}-0123"
    alive = tmp_path / f".a.json.draft-{host}-{os.getpid()}-0123"
    elsewhere = tmp_path / f".a.json.draft-other-{int(killed.stdout)}-0123"
    for path in (dead, alive, elsewhere):
        path.touch()
    write_text(tmp_path / "a.json", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", alive.name, elsewhere.name}


def test_a_folder_that_a_killed_process_was_replacing_comes_back(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    old = tmp_path / f".bundle.old-{os.uname().nodename[:40]}-{int(killed.stdout)}-0123"
    old.mkdir()
    (old / "kept").touch()
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "bundle"):
        raise RuntimeError
    assert (tmp_path / "bundle" / "kept").exists()


# Outputs


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "file", "file is a file"),
        (tmp_path / "file" / "below", "file is a file"),
        (tmp_path / ("x" * 300), "a name has at most 255 bytes"),
        (tmp_path / "a\0b", "null byte"),
        (Path("/proc/nothing"), "cannot write to /proc/nothing"),
    ):
        with pytest.raises(UserError, match=message):
            check_output_folder(path, makes=True)
    check_output_folder(tmp_path / "new" / "folder", makes=False)
    assert not (tmp_path / "new").exists()
    check_output_folder(tmp_path / "new" / "folder", makes=True)
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_folder_is_not_replaced_by_a_file_nor_a_file_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "kept").touch()
    (tmp_path / "bundle").touch()
    with pytest.raises(UserError, match=r"report.html: a folder of that name is in the way"):
        write_text(tmp_path / "report.html", "x")
    with pytest.raises(UserError, match="bundle: a file of that name"), atomic_path(tmp_path / "bundle") as draft:
        draft.mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "bundle"}
    assert (tmp_path / "report.html" / "kept").exists()


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_sealed_tensors(tmp_path / "a", {"x": normal(2)})
        write_sealed_json(tmp_path / "b", {})
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "ab"} == {0o640}


# Who a base is


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    home = tmp_path_factory.mktemp("finished")
    assert call("run", write_recipe(home, base, data, variants={})).code == 0
    return home / "out"


@pytest.fixture
def run(finished: Path, base: Path, data: Path, tmp_path: Path) -> Path:
    """The recipe of a run that is finished, on a base of its own."""
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(finished, tmp_path / "out")
    return write_recipe(tmp_path, tmp_path / "base", data, variants={})


def change_base(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path, {"format": "pt"})


def test_another_base_at_the_same_path_is_noticed(run: Path, data: Path) -> None:
    change_base(run.parent / "base")
    for command in ("run", "evaluate", "foster"):
        outcome = call(command, run)
        assert outcome.code == 2
        assert "base: stored" in outcome.err


def test_the_same_base_at_another_path_is_the_same(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run.parent / "out").rglob("result.*")}
    (run.parent / "base").rename(run.parent / "moved")
    assert call("run", run, f"pretrained_model_name_or_path={run.parent / 'moved'}").code == 0
    assert before == {path: path.stat().st_mtime_ns for path in (run.parent / "out").rglob("result.*")}


def test_hashes_are_remembered_until_a_file_changes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    first = pipeline_sha256(str(folder), tmp_path / "known.json")
    with monkeypatch.context() as patch:
        patch.setattr("timestep_experts.models.sources.file_sha256", lambda _: pytest.fail("it was hashed already"))
        assert pipeline_sha256(str(folder), tmp_path / "known.json") == first
    (folder / "README.md").write_text("what it is")
    assert pipeline_sha256(str(folder), tmp_path / "known.json") == first
    change_base(folder)
    second = pipeline_sha256(str(folder), tmp_path / "known.json")
    assert second not in (first, None)
    (tmp_path / "known.json").write_text("[")
    assert pipeline_sha256(str(folder), tmp_path / "known.json") == second


# Records


def test_a_refused_run_changes_no_record(run: Path) -> None:
    out = run.parent / "out"
    records = [path for path in out.rglob("*") if path.is_file() and path.name != "hashes.json"]  # of a moved base
    before = {path: path.read_bytes() for path in records}
    for command in ("run", "evaluate", "foster", "assemble"):
        outcome = call(command, run, "method.learning_rate=0.5")
        assert outcome.code == 2
        lines = [line.strip() for line in outcome.err.splitlines() if "stored" in line]
        assert lines == ["learning_rate: stored 0.01, now 0.5"], outcome.err
    assert before == {path: path.read_bytes() for path in records}


def test_measurements_are_refused_for_a_recipe_that_did_not_train(run: Path) -> None:
    assert call("evaluate", run).code == 0
    assert "seed: stored 0, now 3" in call("evaluate", run, "seed=3").err


def test_a_damaged_measurement_is_made_again(run: Path) -> None:
    path = run.parent / "out" / "evaluation" / "main-switch" / "result.json"
    document = json.loads(path.read_text())
    document["result"]["frechet"] = 0.0
    path.write_text(json.dumps(document))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert call("evaluate", run).code == 0
    assert json.loads(path.read_text())["result"]["frechet"] != 0.0


def test_pictures_are_not_overwritten(run: Path, tmp_path: Path) -> None:
    bundle, output = run.parent / "out" / "variants" / "main" / "bundle", tmp_path / "drawn"
    sample = ("sample", bundle, "--prompt", "a", "--steps", 2, "--output", output)
    assert call(*sample).code == 0
    first = (output / "000000.png").read_bytes()
    assert call(*sample, "--guidance", 1).code == 0
    assert {path.name for path in output.iterdir()} == {"000000.png", "sheet.png", "000000-2.png", "sheet-2.png"}
    assert (output / "000000.png").read_bytes() == first
    (tmp_path / "file").touch()
    for arguments, message in (
        (("--output", tmp_path / "file"), "file is a file"),
        (("--height", 65), "must divide by 8"),
        (("--steps", 1001), "cannot take 1001 steps"),
        (("--seed", 2**63), "2**63"),
    ):
        outcome = call("sample", bundle, "--prompt", "a", *arguments)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        assert message in outcome.err or arguments[0] == "--seed"


# Planning


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resolution=20", "a size of 20 x 20 pixels does not fit; width and height must divide by 8"),
        ("resolution=[16,33]", "a size of 33 x 16 pixels"),
        ("method.optimizer.lr_scheduler=step", "lr_scheduler: 'step' cannot be used here"),
        ("method.optimizer.lr_scheduler=piecewise_constant", "lr_scheduler: 'piecewise_constant' cannot be used here"),
        ("method.optimizer.lr_warmup_steps=2", "a warm-up of 2 steps does not fit into 2 steps"),
        ("method.optimizer={name: LBFGS, options: {}}", "LBFGS"),
        ("method.optimizer={name: SparseAdam, options: {}}", "SparseAdam cannot train"),
        ("evaluation.scheduler=EDMEulerScheduler", "EDMEulerScheduler"),
        ("evaluation.num_inference_steps=1001", "cannot take 1001 steps"),
        ("evaluation.prompts=/nowhere/prompts.txt", "no file /nowhere/prompts.txt"),
        ("data.path=/nowhere/pictures", "recipe.data.path: there is no file or folder /nowhere/pictures"),
        ("data.validation_path=/nowhere/pictures", "recipe.data.validation_path: there is no file or folder"),
        ("pretrained_model_name_or_path=/nowhere/base", "there is no such file or folder"),
        ("device=nonsense", "nonsense"),
        ("method.experts.scales.0.rank=4096", "rank"),
    ],
)
@pytest.mark.parametrize("flags", [("--dry-run",), ()], ids=["dry", "real"])
def test_what_cannot_end_does_not_begin(
    override: str, message: str, flags: tuple[str, ...], base: Path, data: Path, tmp_path: Path
) -> None:
    outcome = call("run", write_recipe(tmp_path, base, data), *flags, override)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_pipeline_of_another_kind_is_refused_by_name(data: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "KolorsPipeline"))
    outcome = call("run", write_recipe(tmp_path, tmp_path / "base", data), "--dry-run")
    assert "'KolorsPipeline'; supported are StableDiffusionPipeline" in outcome.err


def test_twelve_pictures_and_two_prompts_end_without_a_crash(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        Image.fromarray(np.full((16, 16, 3), 20 * index, np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"thing {index}")
    recipe = write_recipe(tmp_path, base, folder, variants={})
    assert call("run", recipe, "data.validation_share=0.05", "evaluation.num_prompts=2").code == 0
