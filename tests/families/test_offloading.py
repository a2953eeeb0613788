"""Which encoders leave the accelerator while training, and that they come back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import PIPELINES
from torch import nn

from timestep_experts.config import TrainingConfig
from timestep_experts.jobs.stages import encoders_away
from timestep_experts.models import FAMILIES, Family

CPU, ACCELERATOR = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

Moves = list[tuple[str, torch.device]]


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Family:
    pipeline = PIPELINES[request.param]()
    return FAMILIES[type(pipeline).__name__](pipeline)


def record_moves(family: Family, monkeypatch: pytest.MonkeyPatch) -> Moves:
    """Every part of a pipeline says where it is sent in place of going there."""
    moves: Moves = []
    names = {id(part): name for name, part in family.parts.components.items() if isinstance(part, nn.Module)}

    def to(self: nn.Module, device: torch.device) -> nn.Module:
        moves.append((names[id(self)], device))
        return self

    for part in family.parts.components.values():
        if isinstance(part, nn.Module):
            monkeypatch.setattr(type(part), "to", to)
    return moves


@pytest.mark.parametrize(
    ("family", "text_encoders"),
    [
        ("sd", ["text_encoder"]),
        ("sdxl", ["text_encoder", "text_encoder_2"]),
        ("pixart", ["text_encoder"]),
        ("sd3", ["text_encoder", "text_encoder_2", "text_encoder_3"]),
        ("flux", ["text_encoder", "text_encoder_2"]),
    ],
    indirect=["family"],
)
def test_encoders_leave_for_a_while_and_the_denoiser_stays(
    family: Family, text_encoders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = record_moves(family, monkeypatch)
    with family.encoders_on(ACCELERATOR):
        assert moves == [(name, ACCELERATOR) for name in ("vae", *text_encoders)]
        moves.clear()
    assert moves == [(name, CPU) for name in ("vae", *text_encoders)]  # where they were
    moves.clear()
    with family.encoders_on(ACCELERATOR, with_text=False):
        pass
    assert moves == [("vae", ACCELERATOR), ("vae", CPU)]


@pytest.mark.parametrize("family", ["ddpm"], indirect=True)
def test_a_base_without_encoders_moves_nothing(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = record_moves(family, monkeypatch)
    with family.encoders_on(ACCELERATOR):
        pass
    assert moves == []


@pytest.mark.parametrize("family", ["sd"], indirect=True)
def test_encoders_come_back_after_an_error(family: Family) -> None:
    features = family.encode_captions(["a red star"])
    vae = family.parts.vae

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), family.encoders_on(CPU):
        fail()
    assert family.parts.vae is vae
    assert all(torch.equal(features[name], value) for name, value in family.encode_captions(["a red star"]).items())


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
@pytest.mark.parametrize(
    ("offloads", "is_tokenised", "expected"),
    [
        (True, False, {"vae", "text_encoder", "text_encoder_2"}),
        (True, True, {"vae"}),  # experts on one text encoder: each step encodes captions by both
        (False, False, set()),
    ],
)
def test_training_sends_away_what_it_does_not_need(
    offloads: bool, is_tokenised: bool, expected: set[str], family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Any = SimpleNamespace(training=TrainingConfig(offload_encoders=offloads))
    context: Any = SimpleNamespace(family=family, train=SimpleNamespace(is_tokenised=is_tokenised))
    moves = record_moves(family, monkeypatch)
    with encoders_away(recipe, context):
        assert {name for name, device in moves if device == CPU} == expected
