"""Variants that would train the same train it once, and what they take from each other is what they would have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TARGETS, scales, tiny_unet
from test_cli import Outcome, call, write_recipe
from timestep_experts.formats import load_bundle
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.training.log import training_cost

FEW = {"num_pictures": 2, "bins_per_interval": 1, "num_prompts": 0}
SCALES = {n: {"intervals": n, "rank": 2} for n in (4, 2, 1)}


def method(*intervals: int, **changes: Any) -> dict[str, Any]:
    experts = {"target_modules": ["to_q", "to_v"], "scales": [SCALES[n] for n in intervals]}
    return {
        "kind": "foster",
        "experts": experts,
        "schedule": "independent",
        "max_train_steps": 2,
        "train_batch_size": 2,
        "assemble": {"max_train_steps": 1, "train_batch_size": 2},
        **changes,
    }


def variant(*intervals: int, **changes: Any) -> dict[str, Any]:
    return {"method": method(*intervals, **changes)}


def run(home: Path, base: Path, data: Path, main: dict[str, Any], **variants: Any) -> Outcome:
    home.mkdir()
    outcome = call("run", write_recipe(home, base, data, method=main, variants=variants, evaluation=FEW))
    assert outcome.code == 0, outcome.err
    return outcome


def tensors(home: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(load_bundle(home / "out" / "variants" / name / "bundle").tensors)


def test_a_scale_that_two_variants_foster_is_fostered_once_with_the_same_bytes(
    base: Path, data: Path, tmp_path: Path
) -> None:
    order = {"both": variant(4, 1), "other": variant(4, 2), "alone": variant(1)}
    together = run(tmp_path / "together", base, data, method(4, 1), **order)
    taken = [line for line in together.err.splitlines() if "taken from" in line]
    # main fosters 4 and 1; both takes 4, 1 and its routers, other takes 4, alone takes 1
    assert len(taken) == 5
    results = json.loads((tmp_path / "together" / "out" / "results.json").read_text())
    seen = {(result["variant"], result["mode"]): result["num_images_seen"] for result in results}
    # 2 steps of 2 samples for each expert, and 1 step of 2 samples for the routers; contexts do not switch
    assert (seen["both", "switch"], seen["both", "route"], seen["alone", "switch"]) == (16, 16 + 4 + 2, 4)
    for name, own in (("both", method(4, 1)), ("other", method(4, 2)), ("alone", method(1))):
        apart = run(tmp_path / name, base, data, own)
        assert "taken from" not in apart.err
        ours, theirs = tensors(tmp_path / "together", name), tensors(tmp_path / name, "main")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    folders = (tmp_path / "together" / "out" / "variants").glob("*/foster-n4")
    assert [training_cost([folder])[0] for folder in folders] == [16, 16, 16]


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 1e-3}, {"schedule": "joint"}, {"optimizer": {"lr_scheduler": "cosine"}}]
)
def test_what_differs_is_trained(changes: dict[str, Any], base: Path, data: Path, tmp_path: Path) -> None:
    outcome = run(tmp_path / "home", base, data, method(4, 1), other=variant(4, 1, **changes))
    assert "taken from" not in outcome.err


def test_experts_begin_the_same_whatever_else_there_is() -> None:
    one = Mixture.attach(tiny_unet(), MixtureSpec(scales(4, 1)), TARGETS, seed=3).state_dict()
    for spec, targets in (
        (scales(4), TARGETS),
        (scales(4, 2, 1), list(reversed(TARGETS))),
        (scales(4, 1), TARGETS[:1]),
    ):
        other = Mixture.attach(tiny_unet(), MixtureSpec(spec), targets, seed=3).state_dict()
        shared = [key for key in other if key in one and key.endswith(".experts.n4.A")]
        assert shared
        assert all(torch.equal(one[key], other[key]) for key in shared)
    downs = [value.flatten() for key, value in one.items() if key.endswith(".A")]
    assert len({tuple(value[:4].tolist()) for value in downs}) == len(downs)  # and no two of them alike
