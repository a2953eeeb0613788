"""The examples run, and show what they claim."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from timestep_experts.formats import Bundle, save_bundle
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale
from timestep_experts.models import resolve_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_any_network_learns_high_noise_alone(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "attach_to_any_network.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    loss, change = (float(line.rpartition(" ")[2]) for line in lines[:2])
    assert loss < 0.01
    assert change == 0


@pytest.mark.filterwarnings("ignore")  # of third parties, while a pipeline loads in a script of its own
def test_a_bundle_draws_and_comes_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(resolve_model("world/base"), subfolder="unet")
    spec = MixtureSpec((Scale("n2", Partition.uniform(2), 2, 2),))
    mixture = Mixture.attach(unet, spec, ["to_q"])
    bundle = Bundle(
        spec, tuple(mixture.layers), mixture.state_dict(), "switch", "world/base", "UNet2DConditionModel", {}
    )
    save_bundle(bundle, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["use_a_bundle.py", str(tmp_path / "bundle")])
    runpy.run_path(str(EXAMPLES / "use_a_bundle.py"), run_name="__main__")
    base, switched = ((tmp_path / f"{name}.png").read_bytes() for name in ("base", "switch"))
    assert base == switched  # experts that have learned nothing change nothing
