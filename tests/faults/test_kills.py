"""Real processes are killed, disks are full, two start at once: the same command goes on to the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from test_cli import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.faults]
STEPS = 40


def command(recipe: Path, *overrides: str) -> list[str]:
    code = "from timestep_experts.cli import main; main()"
    return [sys.executable, "-c", code, "run", str(recipe), *overrides]


def start(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(recipe, *overrides), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def recipe_of(home: Path, base: Path, data: Path, **changes: Any) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    method = {
        "kind": "foster",
        "experts": {"target_modules": ["to_q", "to_k"], "scales": [{"intervals": 4, "rank": 2}, {"intervals": 1}]},
        "max_train_steps": STEPS,
        "train_batch_size": 2,
        "assemble": {"max_train_steps": STEPS, "train_batch_size": 4},
    }
    training = {"checkpointing_steps": 3, "logging_steps": 5}
    return write_recipe(home, base, data, method=method, training=training, variants={}, **changes)


def results_of(home: Path) -> dict[str, bytes]:
    """The bytes of everything that was trained."""
    found = [*home.glob("out/variants/*/*/result.safetensors"), *home.glob("out/variants/*/bundle/*.safetensors")]
    return {str(path.relative_to(home)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def expected(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run gives that nothing happens to."""
    home = tmp_path_factory.mktemp("expected")
    process = start(recipe_of(home, base, data))
    _, error = process.communicate()
    assert process.returncode == 0, error
    return results_of(home)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    name: str, seed: int, base: Path, data: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    draw, number = random.Random(f"{name}{seed}"), getattr(signal, name)
    recipe, kills = recipe_of(tmp_path, base, data), 0
    while True:
        process = start(recipe)
        limit = draw.uniform(4, 16) if kills < 4 else 600
        try:
            _, error = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            _, error = process.communicate(timeout=60)
            kills += 1
            if process.returncode == 0:  # it had just ended
                break
            if process.returncode != -number:  # as if nobody handled it: before the command began, or after its end
                assert process.returncode == 128 + number, error
                assert f"stopped by {name}; the same command goes on" in error
                assert "Traceback" not in error
            continue
        assert process.returncode == 0, error
        break
    assert results_of(tmp_path) == expected
    hidden = {path.name for path in (tmp_path / "out").rglob(".*")}
    assert hidden <= {".lock", ".lock-owner"} or name == "SIGKILL"


def test_of_two_that_start_at_once_one_ends_and_one_is_refused(
    base: Path, data: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    recipe = recipe_of(tmp_path, base, data)
    first, second = start(recipe), start(recipe)
    errors = [process.communicate(timeout=600)[1] for process in (first, second)]
    codes = sorted((first.returncode, second.returncode))
    assert codes in ([0, 2], [0, 0]), errors  # the slower one may find everything finished
    if codes == [0, 2]:
        refused = errors[0] if first.returncode else errors[1]
        assert "another run works in" in refused
        assert "Traceback" not in refused
    assert results_of(tmp_path) == expected


def test_a_full_disk_is_one_sentence_and_a_larger_one_goes_on(
    base: Path, data: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs rights that this process has not")
    try:
        recipe = recipe_of(tmp_path / "home", base, data, output_dir=str(disk / "out"))
        for size in ("200k", "400k", "800k", "1600k", "64m", ""):
            process = start(recipe)
            _, error = process.communicate(timeout=600)
            assert "Traceback" not in error
            if process.returncode == 0:
                break
            assert process.returncode == 2, error
            assert "No space left on device" in error
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
        assert process.returncode == 0
        assert results_of(disk) == expected
    finally:
        time.sleep(0.1)
        subprocess.run(["umount", str(disk)], check=False)
