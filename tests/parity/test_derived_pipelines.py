"""Pipelines made from the one that carries the experts: image to image and inpainting, from any strength."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tiny_video import tiny_wan
from torch import Tensor

from conftest import max_error, normal, randomise, scales
from timestep_experts.formats import Bundle
from timestep_experts.inference import Reencoder, attach, detach
from timestep_experts.inference.attach import denoiser_of
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec

# of numpy, met in the schedulers of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SPEC = MixtureSpec(scales(4, 1))
QUARTERS = Partition.uniform(4)
PROMPTS = ["a red star", "a blue cross"]
MAKERS: dict[str, Callable[..., Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
}
Deriver = Callable[[Any], Any]


def by_components(kind: type[Any]) -> Deriver:
    def derive(pipeline: Any) -> Any:
        taken = inspect.signature(kind.__init__).parameters
        options = {"requires_safety_checker": False} if "requires_safety_checker" in taken else {}
        return kind(**{k: v for k, v in pipeline.components.items() if k in taken}, **options)

    return derive


WAYS: dict[str, tuple[str, Deriver]] = {
    "sd img2img": ("sd", diffusers.StableDiffusionImg2ImgPipeline.from_pipe),
    "sd img2img by components": ("sd", by_components(diffusers.StableDiffusionImg2ImgPipeline)),
    "sd img2img by auto": ("sd", diffusers.AutoPipelineForImage2Image.from_pipe),
    "sd inpainting": ("sd", diffusers.StableDiffusionInpaintPipeline.from_pipe),
    "sd inpainting by auto": ("sd", diffusers.AutoPipelineForInpainting.from_pipe),
    "sdxl img2img": ("sdxl", diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe),
    "sdxl inpainting": ("sdxl", diffusers.StableDiffusionXLInpaintPipeline.from_pipe),
    "sd3 img2img": ("sd3", diffusers.StableDiffusion3Img2ImgPipeline.from_pipe),
    "flux img2img": ("flux", diffusers.FluxImg2ImgPipeline.from_pipe),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


def make(way: str) -> tuple[Any, Deriver]:
    name, derive = WAYS[way]
    pipeline = MAKERS[name]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipeline, derive


def make_bundle(pipeline_name: str, *, speaking: bool = True, text: bool = False) -> Bundle:
    """Random experts; silent ones have B = 0."""
    pipeline = MAKERS[pipeline_name]()
    denoiser = denoiser_of(pipeline)
    targets: dict[str, tuple[str, ...]] = {"unet" if hasattr(pipeline, "unet") else "transformer": ("to_q", "to_v")}
    targets |= {"text_encoder": ("q_proj", "v_proj")} if text else {}
    networks = {name: getattr(pipeline, name) for name in targets}
    mixture = randomise(Mixture.attach(networks, SPEC, targets))
    tensors = {key: value * (speaking or not key.endswith(".B")) for key, value in mixture.state_dict().items()}
    return Bundle(SPEC, tuple(mixture.layers), tensors, "route", "tiny", type(denoiser).__name__, {})


def draw(pipeline: Any, **options: Any) -> NDArray[np.float32]:
    """Two pictures over two pictures; as floats, so that a bit of difference shows."""
    taken = inspect.signature(type(pipeline).__call__).parameters
    wanted = {
        "prompt": PROMPTS,
        "image": normal(2, 3, 16, 16, seed=4).sigmoid(),
        "mask_image": (normal(2, 1, 16, 16, seed=5) > 0).float(),
        "height": 16,
        "width": 16,
        "strength": 0.6,
        "guidance_scale": 3.0,
        "num_inference_steps": 10,
        "output_type": "np",
        "generator": [torch.Generator().manual_seed(seed) for seed in range(2)],
    }
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**{key: value for key, value in (wanted | options).items() if key in taken}).images


def test_silent_experts_change_no_bit(way: str) -> None:
    pipeline, derive = make(way)
    without = draw(derive(pipeline))
    assert without.std() > 0.05
    mixture = attach(pipeline, make_bundle(WAYS[way][0], speaking=False))
    for mode in ("off", "switch", "route"):
        mixture.mode = mode
        assert np.array_equal(draw(derive(pipeline)), without), mode


def test_experts_follow_and_are_gone_after_detaching(way: str) -> None:
    pipeline, derive = make(way)
    before = derive(pipeline)
    without = draw(before)
    attach(pipeline, make_bundle(WAYS[way][0]), "switch")
    for derived in (before, derive(pipeline)):  # made before or after makes no difference
        assert abs(draw(derived) - without).max() > 1e-3
    assert np.array_equal(draw(before), draw(derive(pipeline)))
    detach(pipeline)
    assert np.array_equal(draw(before), without)
    assert np.array_equal(draw(derive(pipeline)), without)


@pytest.mark.parametrize("strength", [0.4, 0.6, 1.0])
def test_sampling_that_starts_in_the_middle_meets_the_experts_of_its_timesteps(strength: float, way: str) -> None:
    pipeline, derive = make(way)
    mixture = attach(pipeline, make_bundle(WAYS[way][0]), "switch")
    seen: list[tuple[Tensor, Tensor]] = []

    def note(*_: object) -> None:
        seen.append(
            (
                mixture.state.step.t.clone(),
                mixture.state.step.expert_index["n4"].expand_as(mixture.state.step.t).clone(),
            )
        )

    next(iter(mixture.layers.values())).base_layer.register_forward_hook(note)
    derived = derive(pipeline)
    draw(derived, strength=strength)
    expected = derived.scheduler.timesteps.tolist()[-len(seen) :]
    assert len(seen) == int(10 * strength)
    for (t, owners), one in zip(seen, expected, strict=True):
        assert max_error(t, torch.full_like(t, one)) <= 1e-3
        assert owners.tolist() == [QUARTERS.index_of(one)] * len(t)
    if strength < 0.5 and WAYS[way][0] in ("sd", "sdxl"):  # flow schedules are shifted towards noise
        assert max(owners.max().item() for _, owners in seen) <= 1


# Text experts


@pytest.mark.parametrize("mode", ["switch", "route"])
def test_prompts_of_a_followed_pipeline_are_encoded_anew(mode: str, way: str) -> None:
    name = WAYS[way][0]
    bundle = make_bundle(name, text=True)
    pipeline, derive = make(way)
    without = draw(derive(pipeline))
    attach(pipeline, bundle, mode)
    reencoder, derived = Reencoder.of(pipeline), derive(pipeline)
    reencoder.follow(derived)
    before = reencoder.num_text_passes
    drawn = draw(derived)
    assert reencoder.num_text_passes >= before + 3  # the pipeline's own, and at least two intervals
    reencoder.when = "off"
    assert abs(draw(derived) - drawn).max() > 1e-4
    detach(pipeline)
    assert "encode_prompt" not in vars(derived)
    assert np.array_equal(draw(derived), without)

    fresh, derive = make(way)
    direct = derive(fresh)
    attach(direct, bundle, mode)
    assert abs(draw(direct) - drawn).max() <= 1e-6
    detach(direct)
    assert np.array_equal(draw(direct), without)


def test_a_pipeline_that_is_not_followed_is_refused() -> None:
    pipeline, derive = make("sd img2img")
    mixture = attach(pipeline, make_bundle("sd", text=True), "switch")
    derived = derive(pipeline)
    for _ in range(2):  # before and after the denoiser has met a timestep
        with pytest.raises(ValueError, match=r"this CLIPTextModel carries timestep experts.*follow\(other\)"):
            draw(derived)
        draw(pipeline, strength=None)
    mixture.mode = "off"
    draw(derived)
    mixture.mode = "switch"
    reencoder = Reencoder.of(pipeline)
    reencoder.follow(derived)
    with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline are encoded anew already"):
        reencoder.follow(derived)
    with pytest.raises(ValueError, match="StableDiffusionPipeline does not share text_encoder with"):
        reencoder.follow(stable_diffusion())


def test_a_text_encoder_does_not_take_the_denoisers_latest_timestep() -> None:
    pipeline, _ = make("sd img2img")
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    mixture = randomise(Mixture.attach(networks, SPEC, {"unet": ["to_q"], "text_encoder": ["q_proj"]}))
    mixture.mode = "switch"
    tokens = torch.zeros(1, 4, dtype=torch.long)
    pipeline.unet(normal(1, 4, 8, 8), 300, normal(1, 4, 8))
    with pytest.raises(RuntimeError, match=r"q_proj: the experts know no timestep"):
        pipeline.text_encoder(tokens)
    with mixture.at(torch.tensor([300])):
        pipeline.text_encoder(tokens)


# The first step of a flow


def wan() -> Any:
    return tiny_wan(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


def wan_of_two() -> Any:
    return tiny_wan(0.9, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.mark.parametrize("make_pipeline", [stable_diffusion_3, flux, wan, wan_of_two])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_pure_noise_at_t_1000_belongs_to_the_last_interval(count: int, make_pipeline: Callable[..., Any]) -> None:
    pipeline = make_pipeline()
    spec = MixtureSpec(scales(count))
    mixture = Mixture.attach(pipeline.transformer, spec, ["to_q"])
    mixture.mode = "switch"
    seen: list[tuple[Tensor, Tensor]] = []

    def note(*_: object) -> None:
        seen.append(
            (
                mixture.state.step.t.clone(),
                mixture.state.step.expert_index[f"n{count}"].expand_as(mixture.state.step.t).clone(),
            )
        )

    next(iter(mixture.layers.values())).base_layer.register_forward_hook(note)
    pipeline.set_progress_bar_config(disable=True)
    size = {"num_frames": 5} if "Wan" in type(pipeline).__name__ else {}
    pipeline(prompt="a red star", height=16, width=16, num_inference_steps=3, output_type="latent", **size)
    t, owners = seen[0]
    assert set(t.tolist()) == {1000.0}
    assert set(owners.tolist()) == {count - 1}
