"""Channel-wise projections: where they sit, what they weigh, and when they fold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from tiny import PIPELINES
from tiny_video import tiny_fps_unet
from torch import Tensor, nn

from conftest import max_error, tiny_unet, unet_inputs
from timestep_experts.merging import (
    Projections,
    find_places,
    fold,
    folded_layers,
    merge_linear,
    project,
    unfold,
)

CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
CHURCH = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}
DDPM = {"layers_per_block": 2, "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False}


@pytest.mark.parametrize("placement", ["paper", "foldable"])
@pytest.mark.parametrize(
    ("build", "parameters", "projections", "percent"),
    [
        (lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768), 859_520_964, 9_216_000, 1.061),
        (lambda: UNet2DModel(**CIFAR10, **DDPM), 35_746_307, 491_520, 1.36),
        (lambda: UNet2DModel(**CHURCH, **DDPM), 113_673_219, 1_638_400, 1.42),
    ],
    ids=["sd-v1-4", "ddpm-cifar10-32", "ddpm-ema-church-256"],
)
def test_projections_weigh_what_the_paper_says(
    build: Callable[[], nn.Module], parameters: int, projections: int, percent: float, placement: str
) -> None:
    with torch.device("meta"):
        denoiser = build()
        made = Projections(denoiser, find_places(denoiser, placement))
    own = sum(p.numel() for p in denoiser.parameters())
    added = sum(p.numel() for p in made.parameters())
    assert (own, added) == (parameters, projections)
    digits = 3 if percent == 1.061 else 2
    assert round(100 * added / (own + added), digits) == percent


# A denoiser of every kind, and inputs that reach all of it


def ddpm() -> tuple[nn.Module, dict[str, Tensor]]:
    return PIPELINES["ddpm"]().unet, {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 700])}


def sd() -> tuple[nn.Module, dict[str, Tensor]]:
    sample, text = unet_inputs(2)
    return tiny_unet(), {"sample": sample, "timestep": torch.tensor([3, 700]), "encoder_hidden_states": text}


def video() -> tuple[nn.Module, dict[str, Tensor]]:
    return tiny_fps_unet(), {
        "sample": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": torch.randn(1, 5, 8),
    }


def dit() -> tuple[nn.Module, dict[str, Tensor]]:
    return PIPELINES["sd3"]().transformer, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 24),
    }


KINDS = {"ddpm": ddpm, "sd": sd, "video": video, "dit": dit}
PLACED = [
    (kind, placement) for kind in KINDS for placement in ("paper", "foldable") if (kind, placement) != ("dit", "paper")
]


def say(denoiser: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return denoiser(**inputs).sample


def made(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    denoiser, inputs = KINDS[kind]()
    return denoiser.eval(), inputs


def randomise(projections: Projections, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    for delta in projections.deltas:
        delta.data = scale * torch.randn(delta.shape, generator=generator) / len(delta) ** 0.5


@pytest.mark.parametrize(("kind", "placement"), PLACED)
def test_identity_changes_nothing_and_detaching_leaves_no_trace(kind: str, placement: str) -> None:
    denoiser, inputs = made(kind)
    before, names = say(denoiser, inputs), set(denoiser.state_dict())
    projections = Projections(denoiser, find_places(denoiser, placement))
    assert torch.equal(say(denoiser, inputs), before)
    assert set(denoiser.state_dict()) == names
    randomise(projections)
    assert max_error(say(denoiser, inputs), before) > 1e-4  # they are in the path
    projections.detach_hooks()
    assert torch.equal(say(denoiser, inputs), before)


@pytest.mark.parametrize(("kind", "placement"), PLACED)
def test_every_projection_has_a_gradient(kind: str, placement: str) -> None:
    denoiser, inputs = made(kind)
    projections = Projections(denoiser, find_places(denoiser, placement))
    denoiser(**inputs).sample.square().sum().backward()
    assert all(delta.grad is not None and delta.grad.any() for delta in projections.deltas)


@pytest.mark.parametrize(("kind", "placement"), PLACED)
def test_what_folds_folds_exactly(kind: str, placement: str) -> None:
    denoiser, inputs = made(kind)
    places = find_places(denoiser, placement)
    if placement == "foldable":
        assert all(place.folds_into for place in places)
    foldable = [place for place in places if place.folds_into]
    assert foldable
    projections = Projections(denoiser, foldable)
    randomise(projections)
    expected, deltas = say(denoiser, inputs), projections.named_deltas()
    projections.detach_hooks()
    state = denoiser.state_dict()
    for layer, projection in folded_layers(foldable).items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in state:
                state[name].copy_(fold(state[name], deltas[projection].data))
    # one rounding of weights in place of two of activations: some 1e-7 of the largest value per layer
    assert max_error(say(denoiser, inputs), expected) < 1e-5 * expected.abs().max().item()


@pytest.mark.parametrize("kind", ["ddpm", "sd", "video"])
def test_paper_projections_leave_the_skips_alone(kind: str) -> None:
    denoiser, inputs = made(kind)
    skips: list[list[Tensor]] = []

    def note(_: nn.Module, args: object, output: object) -> None:
        if isinstance(output, tuple):
            skips[-1] += [output[0], *output[1]]

    handle = denoiser.down_blocks[0].register_forward_hook(note)
    skips.append([])
    say(denoiser, inputs)
    handle.remove()
    projections = Projections(denoiser, find_places(denoiser, "paper"))
    randomise(projections)
    denoiser.down_blocks[0].register_forward_hook(note)  # after the projection's own
    skips.append([])
    say(denoiser, inputs)
    (main, *before), (projected, *after) = skips
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert max_error(projected, project(main, projections.deltas[0].data, channels_last=False)) == 0


def test_only_up_blocks_of_the_paper_fold() -> None:
    places = {place.module: place.folds_into for place in find_places(PIPELINES["ddpm"]().unet, "paper")}
    assert places == {
        "down_blocks.0": (),
        "down_blocks.1": (),
        "mid_block": (),
        "up_blocks.0": ("up_blocks.0.upsamplers.0.conv",),
        "up_blocks.1": ("up_blocks.1.resnets.1.conv2", "up_blocks.1.resnets.1.conv_shortcut"),
    }


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 3, 3)])
def test_unfolding_undoes_folding(shape: tuple[int, ...]) -> None:
    tensor, delta = torch.randn(shape, dtype=torch.double), 0.1 * torch.randn(6, 6)
    assert max_error(unfold(fold(tensor, delta), delta), tensor) < 1e-12  # fp64
    assert torch.equal(fold(tensor.float(), torch.zeros(6, 6)), tensor.float())
    with pytest.raises(ValueError, match="a projection of 6 channels has no inverse"):
        unfold(tensor, -torch.eye(6))


def test_the_order_of_merging_and_folding_matters_in_second_order() -> None:
    """Changes eps times as large make a difference eps^2 times as large."""
    torch.manual_seed(0)
    base, weights = torch.randn(6, 4, dtype=torch.double), (0.7, 0.5)
    changes = [(torch.randn(6, 4).double(), torch.randn(6, 6).double()) for _ in weights]

    def difference(eps: float) -> Tensor:
        tensors = [base + eps * change for change, _ in changes]
        deltas = [eps * delta for _, delta in changes]
        zero = torch.zeros_like(deltas[0])
        apart = fold(merge_linear(base, tensors, weights), merge_linear(zero, deltas, weights))
        folded = [fold(tensor, delta) for tensor, delta in zip(tensors, deltas, strict=True)]
        return apart - merge_linear(base, folded, weights)

    large, small = difference(1e-2), difference(1e-3)
    assert large.abs().max() > 1e-5
    # exactly quadratic, for both factors are linear in eps; fp64 leaves 1e-16 / 1e-6 of it
    assert max_error(large / 100, small) < 1e-9 * large.abs().max().item()


def test_what_has_no_place_for_projections_is_said() -> None:
    message = "projection 'foldable' needs a UNet's blocks or a transformer's, which a Linear has not"
    with pytest.raises(ValueError, match=message):
        find_places(nn.Linear(2, 2), "foldable")
    with pytest.raises(ValueError, match="unknown placement 'middle' of projections: allowed are off, paper, foldable"):
        find_places(tiny_unet(), "middle")
