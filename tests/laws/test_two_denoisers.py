"""Two denoisers that share out the timesteps: each carries the experts of its own share, and no others."""

from __future__ import annotations

import pytest
import torch
from tiny_video import tiny_wan

from conftest import max_error, normal, randomise
from timestep_experts.formats import Bundle
from timestep_experts.inference import attach, detach
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale
from timestep_experts.models import Wan
from timestep_experts.training import FosterSettings, foster

pytestmark = pytest.mark.usefixtures("either_kernels")


BOUNDARY = 875  # of the tiny pipeline: a boundary of the eighths, but not of the quarters
SPEC = MixtureSpec((Scale("n8", Partition.uniform(8), 2, 2), Scale("n4", Partition.uniform(4), 2, 2, gated=True)))
TARGETS = ("to_q", "to_v")
T = torch.tensor([3.0, 874.0, 876.0, 1000.0, 400.0])


@pytest.fixture
def wan() -> Wan:
    family = Wan(tiny_wan(BOUNDARY / 1000))
    assert family.owned_intervals["transformer"].lo == BOUNDARY
    return family


def attach_to(family: Wan) -> Mixture:
    mixture = Mixture.attach(family.denoisers, SPEC, TARGETS, owned=family.owned_intervals)
    return randomise(mixture)


def test_each_denoiser_holds_the_experts_of_its_share(wan: Wan) -> None:
    mixture = attach_to(wan)
    held = {
        (name.partition(".")[0], scale): (stack.first, len(stack.A))
        for name, layer in mixture.layers.items()
        for scale, stack in layer.experts.items()
    }
    assert held == {
        ("transformer", "n8"): (7, 1),
        ("transformer", "n4"): (3, 1),  # [750, 1000) lies on both sides: each denoiser has one of its own
        ("transformer_2", "n8"): (0, 7),
        ("transformer_2", "n4"): (0, 4),
    }


@pytest.mark.parametrize("mode", ["switch", "route"])
def test_a_mixed_batch_equals_the_loop(mode: str, wan: Wan) -> None:
    mixture = attach_to(wan)
    mixture.mode = mode
    text = {"encoder_hidden_states": wan.encode_captions(["a red star"])["encoder_hidden_states"].expand(5, -1, -1)}
    channels = wan.denoiser.config.in_channels
    noisy = normal(5, channels, 3, 8, 8)
    with torch.no_grad():
        joint = wan.predict(noisy, T, text)
        rows = [{name: value[i : i + 1] for name, value in text.items()} for i in range(5)]
        alone = torch.cat([wan.predict(noisy[i : i + 1], T[i : i + 1], rows[i]) for i in range(5)])
        mixture.mode = "off"
        silent = wan.predict(noisy, T, text)
    assert max_error(joint, alone) <= 1e-5
    assert ((joint - silent).flatten(1).abs().amax(1) > 1e-4).all()


def test_an_expert_learns_where_it_is_held(wan: Wan) -> None:
    mixture = attach_to(wan)
    rates, steps = {"n8": [0.1] * 8, "n4": [0.1] * 4}, {"n8": [1] * 8, "n4": [1] * 4}
    stages = foster(mixture, FosterSettings("independent", 1, rates, steps, 0.0, 0))
    held = {param_group.name: len(param_group.slices) for stage in stages for param_group in stage.param_groups}
    layers = len(mixture.layers) // 2
    assert held == {
        **{f"n8.{i}": 2 * layers for i in range(8)},
        **{f"n4.{i}": 2 * layers for i in range(3)},
        "n4.3": 4 * layers,
    }


def test_a_bundle_finds_both_denoisers(wan: Wan) -> None:
    mixture = attach_to(wan)
    tensors = {key: value.clone() for key, value in mixture.state_dict().items()}
    bundle = Bundle(SPEC, tuple(mixture.layers), tensors, "route", "tiny", "WanTransformer3DModel", {})
    pipeline = tiny_wan(BOUNDARY / 1000)
    attached = attach(pipeline, bundle)
    assert set(attached.networks) == {"transformer", "transformer_2"}
    assert all(torch.equal(value, tensors[key]) for key, value in attached.state_dict().items())
    detach(pipeline)
    assert not any(".experts." in key for key in pipeline.transformer_2.state_dict())
