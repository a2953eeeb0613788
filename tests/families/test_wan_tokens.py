"""Wan 2.2 TI2V: its pipelines give every token a timestep; a sample's own is the greatest of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from PIL import Image
from tiny_video import tiny_wan
from torch import Tensor

from conftest import max_error, normal, randomise, scales
from timestep_experts.formats import Bundle
from timestep_experts.inference import attach, detach
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.models import Wan

SPEC = MixtureSpec(scales(4, 1))


def text_to_video() -> Any:
    family = Wan(tiny_wan(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)))  # drops nothing out
    return WanPipeline(**family.parts.components, expand_timesteps=True)


def image_to_video() -> Any:
    components = text_to_video().components
    return WanImageToVideoPipeline(**components, image_encoder=None, image_processor=None, expand_timesteps=True)


def bundle(*, speaking: bool = True) -> Bundle:
    mixture = randomise(Mixture.attach(text_to_video().transformer, SPEC, ["to_q", "to_v"]))
    tensors = {key: value * (speaking or not key.endswith(".B")) for key, value in mixture.state_dict().items()}
    return Bundle(SPEC, tuple(mixture.layers), tensors, "route", "tiny", "WanTransformer3DModel", {})


def draw(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {}
    if isinstance(pipeline, WanImageToVideoPipeline):
        options["image"] = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
    return pipeline(
        prompt="a red star",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).frames


@pytest.mark.parametrize("make", [text_to_video, image_to_video])
def test_each_step_meets_the_expert_of_its_timestep(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)  # it needs ftfy, for odd letters
    pipeline = make()
    without = draw(pipeline)
    attach(pipeline, bundle(speaking=False))
    assert torch.equal(draw(pipeline), without)
    detach(pipeline)
    mixture = attach(pipeline, bundle(), "switch")
    seen: list[tuple[list[float], list[int]]] = []
    shapes: set[tuple[int, ...]] = set()

    def note(*_: object) -> None:
        seen.append(
            (
                mixture.state.step.t.tolist(),
                mixture.state.step.expert_index["n4"].expand_as(mixture.state.step.t).tolist(),
            )
        )

    next(iter(mixture.layers.values())).base_layer.register_forward_hook(note)
    pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.add(tuple(kwargs["timestep"].shape)), with_kwargs=True
    )
    assert max_error(draw(pipeline), without) > 1e-3
    assert shapes == {(1, 2 * 2 * 2)}  # frames, rows and columns of patches
    expected = pipeline.scheduler.timesteps.tolist()
    partition = Partition.uniform(4)
    assert seen[::2] == seen[1::2] == [([t], [partition.index_of(t)]) for t in expected]  # with and without the prompt


def test_one_timestep_per_sample_says_the_same_as_one_per_token() -> None:
    family = Wan(text_to_video())
    mixture = randomise(Mixture.attach(family.denoiser, SPEC, ["to_q", "to_v"]))
    mixture.mode = "route"
    channels = family.denoiser.config.in_channels
    noisy, t = normal(2, channels, 2, 4, 4), torch.tensor([300.0, 900.0])
    text = family.encode_captions(["a red star", "a blue cross"])
    with torch.no_grad():
        alone = family.predict(noisy, t, text)
        tokens = family.denoiser(noisy, t[:, None].expand(-1, 8), text["encoder_hidden_states"]).sample
        given = torch.cat([torch.zeros(2, 4), t[:, None].expand(-1, 4)], 1)  # the first frame is no noise
        family.denoiser(noisy, given, text["encoder_hidden_states"])
    assert max_error(tokens, alone) <= 1e-5
    assert mixture.timesteps.tolist() == [300, 900]
