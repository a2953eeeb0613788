"""Experts that are not merged, on a pipeline: who is asked at which t, how often, and what stays of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny import PIPELINES
from torch import Tensor

from conftest import tiny_pipeline, tiny_unet, unet_inputs
from timestep_experts.formats.experts import StoredProjections, write_projections
from timestep_experts.inference import attach_ensemble
from timestep_experts.intervals import Partition
from timestep_experts.merging import Projections, find_places

# of numpy, met in the schedulers of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

HALVES = Partition.uniform(2)
RESIDENTS = ("one", "all")


def folders(tmp_path: Path, *seeds: int) -> list[Path]:
    for seed in seeds:
        tiny_unet(seed).save_pretrained(tmp_path / str(seed))
    return [tmp_path / str(seed) for seed in seeds]


def say(unet: UNet2DConditionModel, t: Any) -> Tensor:
    sample, text = unet_inputs(2)
    with torch.no_grad():
        return unet(sample, t, text).sample


def draw(pipeline: StableDiffusionPipeline, steps: int = 4, **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline("red star", num_inference_steps=steps, generator=generator, output_type="np", **options).images


@pytest.mark.parametrize("resident", RESIDENTS)
def test_every_timestep_has_one_owner(resident: str, tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    partition = Partition((0, 250, 600, 1000))
    ensemble = attach_ensemble(pipeline, folders(tmp_path, 1, 2, 3), partition, resident)
    for t, seed in ((0, 1), (249, 1), (250, 2), (599, 2), (600, 3), (999, 3), (1000, 3), (249.9, 1)):
        assert torch.equal(say(pipeline.unet, torch.tensor(t)), say(tiny_unet(seed), torch.tensor(t))), t
    assert ensemble.active == 0
    assert ensemble.num_swaps == 4  # 0, 1, 2, 0


@pytest.mark.parametrize("resident", RESIDENTS)
def test_experts_that_equal_the_base_change_nothing(
    resident: str, tmp_path: Path, pipeline: StableDiffusionPipeline
) -> None:
    before = draw(pipeline)
    attach_ensemble(pipeline, folders(tmp_path, 0) * 2, HALVES, resident)
    assert np.array_equal(draw(pipeline), before)


@pytest.mark.parametrize("resident", RESIDENTS)
def test_one_range_is_the_expert(resident: str, tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    other = tiny_pipeline()
    other.unet = tiny_unet(3)
    attach_ensemble(pipeline, folders(tmp_path, 3), Partition.uniform(1), resident)
    assert np.array_equal(draw(pipeline), draw(other))


@pytest.mark.parametrize("resident", RESIDENTS)
def test_detaching_gives_the_bytes_back(resident: str, tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    picture = draw(pipeline)
    ensemble = attach_ensemble(pipeline, folders(tmp_path, 1, 2), HALVES, resident)
    assert not np.array_equal(draw(pipeline), picture)
    ensemble.detach()
    after = pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert np.array_equal(draw(pipeline), picture)
    with pytest.raises(ValueError, match="not attached"):
        ensemble.detach()


def test_experts_are_chosen_by_t_and_not_by_step(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    """A tenth of the timesteps is a third of the steps of an uneven schedule."""
    pipeline.scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True)
    ensemble = attach_ensemble(pipeline, folders(tmp_path, 1, 2), Partition((0, 100, 1000)))
    asked: list[tuple[float, int | None]] = []
    pipeline.unet.register_forward_hook(lambda module, args, output: asked.append((float(args[1]), ensemble.active)))
    draw(pipeline, steps=6)
    assert len(asked) == 6  # one call per step
    assert [active for _, active in asked] == [1, 1, 1, 1, 0, 0]
    assert all(active == (t >= 100) for t, active in asked)
    assert ensemble.num_swaps == 2


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_denoiser_runs_once_per_step(guidance: float, tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    attach_ensemble(pipeline, folders(tmp_path, 1, 2), HALVES, "all")
    calls: list[int] = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    draw(pipeline, steps=5, guidance_scale=guidance)
    assert len(calls) == 5


def test_a_start_in_the_middle_takes_the_expert_of_its_t(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    ensemble = attach_ensemble(pipeline, folders(tmp_path, 1, 2), HALVES)
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    used: list[int | None] = []
    pipeline.unet.register_forward_hook(lambda *_: used.append(ensemble.active))
    picture = torch.zeros(1, 3, 16, 16)
    generator = torch.Generator().manual_seed(0)
    other("red star", image=picture, strength=0.4, num_inference_steps=10, generator=generator, output_type="np")
    assert used == [0] * 4  # t of 301 and below


def test_one_call_has_one_expert(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    attach_ensemble(pipeline, folders(tmp_path, 1, 2), HALVES)
    with pytest.raises(ValueError, match="timesteps of the ranges 0, 1"):
        say(pipeline.unet, torch.tensor([10, 900]))


def test_projections_beside_the_weights_come_along(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    expected = []
    for seed, folder in zip((1, 2), folders(tmp_path, 1, 2), strict=True):
        unet = tiny_unet(seed)
        places = [place for place in find_places(unet, "paper") if not place.folds_into]
        projections = Projections(unet, places)
        for delta in projections.deltas:
            delta.data.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
        deltas = {name: delta.detach() for name, delta in projections.named_deltas().items()}
        write_projections(folder / "projection.safetensors", StoredProjections(tuple(places), deltas))
        expected.append(say(unet, torch.tensor(100 + 700 * (seed - 1))))
    before = say(pipeline.unet, torch.tensor(100))
    ensemble = attach_ensemble(pipeline, folders(tmp_path, 1, 2), HALVES)
    assert torch.equal(say(pipeline.unet, torch.tensor(100)), expected[0])
    assert torch.equal(say(pipeline.unet, torch.tensor(800)), expected[1])
    ensemble.detach()
    assert torch.equal(say(pipeline.unet, torch.tensor(100)), before)


def test_a_base_without_text_has_ensembles_too(tmp_path: Path) -> None:
    first, second = PIPELINES["ddpm"](), PIPELINES["ddpm"](add_attention=False)
    first.unet.save_pretrained(tmp_path)
    attach_ensemble(first, [tmp_path, tmp_path], HALVES)
    first.set_progress_bar_config(disable=True)
    assert first(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match=r"is no expert of this UNet2DModel: \d+ tensors differ in name or shape"):
        attach_ensemble(second, [tmp_path, tmp_path], HALVES)


@pytest.mark.parametrize(
    ("count", "partition", "resident", "message"),
    [
        (1, HALVES, "one", "there are 1 experts for 2 ranges"),
        (2, Partition((0, 500, 900)), "one", "the ranges end at 900; this pipeline has 1000 timesteps"),
        (2, HALVES, "some", "unknown resident 'some': allowed are one, all"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(
    count: int,
    partition: Partition,
    resident: str,
    message: str,
    tmp_path: Path,
    pipeline: StableDiffusionPipeline,
) -> None:
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=message):
        attach_ensemble(pipeline, folders(tmp_path, 1, 2)[:count], partition, resident)


def test_a_second_ensemble_is_refused(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    attach_ensemble(pipeline, folders(tmp_path, 1, 2), HALVES)
    with pytest.raises(ValueError, match="carries an ensemble already"):
        attach_ensemble(pipeline, folders(tmp_path, 1, 2), HALVES)


def test_an_expert_that_cannot_be_read_leaves_a_way_back(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    before = say(pipeline.unet, torch.tensor(100))
    places = folders(tmp_path, 1, 2)
    ensemble = attach_ensemble(pipeline, places, HALVES)
    say(pipeline.unet, torch.tensor(900))
    file = places[0] / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is truncated"):
        say(pipeline.unet, torch.tensor(100))
    assert ensemble.active is None
    ensemble.detach()
    assert torch.equal(say(pipeline.unet, torch.tensor(100)), before)
