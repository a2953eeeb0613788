"""Parity with diffusers: a pipeline with experts is the pipeline, until they have something to say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from conftest import max_error, normal, randomise, scales, tiny_pipeline
from timestep_experts.formats import Bundle
from timestep_experts.inference import SampleSettings, attach, detach, sample
from timestep_experts.inference.sample import make_scheduler
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale
from timestep_experts.models import StableDiffusion

# of numpy, met in the schedulers of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TARGETS = ("to_q", "to_k", "to_out.0", "conv1", "time_emb_proj", "downsamplers.0.conv")
SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler")
PROMPTS = ["a red star", "a blue plain cross"]
Drawer = Callable[[StableDiffusionPipeline], NDArray[np.float32]]


def make_bundle(*, speaking: bool = True, spec: MixtureSpec | None = None) -> Bundle:
    """Random experts and routers for the tiny pipeline; silent ones have B = 0."""
    unet = tiny_pipeline().unet
    mixture = randomise(Mixture.attach(unet, spec or MixtureSpec(scales(4, 2, 1, base_gate=0.5)), TARGETS))
    tensors = {key: value.clone() for key, value in mixture.state_dict().items()}
    if not speaking:
        tensors = {key: torch.zeros_like(value) if key.endswith(".B") else value for key, value in tensors.items()}
    return Bundle(mixture.spec, tuple(mixture.layers), tensors, "route", "tiny", "UNet2DConditionModel", {})


@contextmanager
def experts(pipeline: Any, bundle: Bundle, mode: str) -> Iterator[Mixture]:
    yield attach(pipeline, bundle, mode)
    detach(pipeline)


def draw(pipeline: Any, prompts: list[str] | str | None = None, **options: Any) -> NDArray[np.float32]:
    """Pictures, each from a seed of its own, in three steps; as floats, so that a bit of difference shows."""
    given = PROMPTS if prompts is None else prompts
    count = len(given) if isinstance(given, list) else 1
    count *= options.get("num_images_per_prompt", 1)
    defaults = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipeline(prompt=given, generator=generator, **(defaults | options)).images


def draw_from_embeddings(pipeline: StableDiffusionPipeline) -> NDArray[np.float32]:
    wanted, empty = pipeline.encode_prompt(PROMPTS, pipeline.device, 1, True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=wanted,
        negative_prompt_embeds=empty,
        generator=generator,
        num_inference_steps=3,
        output_type="np",
    ).images


def draw_over_pictures(pipeline: StableDiffusionPipeline) -> NDArray[np.float32]:
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    pictures = normal(2, 3, 16, 16, seed=4).sigmoid()
    return draw(other, image=pictures, strength=0.75, num_inference_steps=4)


def draw_with_callback(pipeline: StableDiffusionPipeline) -> NDArray[np.float32]:
    steps = []

    def shrink(pipe: Any, step: int, t: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(int(t))
        return {"latents": state["latents"] * 0.9}

    drawn = draw(pipeline, callback_on_step_end=shrink)
    assert steps == pipeline.scheduler.timesteps.tolist()
    return drawn


USES: dict[str, Drawer] = {
    "prompts": draw,
    "one prompt": lambda pipe: draw(pipe, "a red star"),
    "negative prompts": lambda pipe: draw(pipe, negative_prompt=["a star", "blue"]),
    "no guidance": lambda pipe: draw(pipe, guidance_scale=1.0),
    "rescaled guidance": lambda pipe: draw(pipe, guidance_rescale=0.7),
    "two per prompt": lambda pipe: draw(pipe, num_images_per_prompt=2),
    "embeddings": draw_from_embeddings,
    "image to image": draw_over_pictures,
    "callback": draw_with_callback,
}


@pytest.mark.parametrize(
    ("use", "scheduler"),
    [*((use, SCHEDULERS[0]) for use in USES), *itertools.product(["prompts", "image to image"], SCHEDULERS[1:])],
)
def test_silent_experts_change_no_bit_of_a_picture(use: str, scheduler: str, pipeline: StableDiffusionPipeline) -> None:
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    without = USES[use](pipeline)
    assert without.std() > 0.05
    silent = make_bundle(speaking=False)
    with experts(pipeline, silent, "off") as mixture:
        for mode in ("off", "switch", "route"):
            mixture.mode = mode
            assert np.array_equal(USES[use](pipeline), without), mode


@pytest.mark.parametrize("use", ["prompts", "no guidance", "image to image"])
def test_random_experts_change_every_picture(use: str, pipeline: StableDiffusionPipeline) -> None:
    without = USES[use](pipeline)
    drawn = {}
    for mode in ("off", "switch", "route"):
        with experts(pipeline, make_bundle(), mode):
            drawn[mode] = USES[use](pipeline)
    assert np.array_equal(drawn["off"], without)
    for one, other in (("off", "switch"), ("off", "route"), ("switch", "route")):
        assert all(abs(a - b).max() > 1e-3 for a, b in zip(drawn[one], drawn[other], strict=True)), (one, other)


def test_another_pipeline_over_the_same_network_is_specialised_too(pipeline: StableDiffusionPipeline) -> None:
    without = draw_over_pictures(pipeline)
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    with experts(other, make_bundle(), "switch"):
        assert abs(draw_over_pictures(pipeline) - without).max() > 1e-3
    assert np.array_equal(draw_over_pictures(pipeline), without)


def test_the_mode_may_change_between_and_within_runs(pipeline: StableDiffusionPipeline) -> None:
    with experts(pipeline, make_bundle(), "switch") as mixture:
        switched = draw(pipeline)
        mixture.mode = "route"
        routed = draw(pipeline)
        mixture.mode = "switch"
        assert np.array_equal(draw(pipeline), switched)

        def route_from_the_second_step(pipe: Any, step: int, t: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
            mixture.mode = "route"
            return {}

        mixed = draw(pipeline, callback_on_step_end=route_from_the_second_step)
    assert abs(mixed - switched).max() > 1e-3
    assert abs(mixed - routed).max() > 1e-3


# Batches


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", ["switch", "route"])
def test_prompts_of_a_batch_do_not_mix(mode: str, scheduler: str, pipeline: StableDiffusionPipeline) -> None:
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)

    def latents(prompts: list[str], negative: list[str], seeds: list[int]) -> Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(
            prompt=prompts,
            negative_prompt=negative,
            generator=generator,
            guidance_scale=3.0,
            num_inference_steps=4,
            output_type="latent",
        ).images

    pipeline.set_progress_bar_config(disable=True)
    negative = ["a star", "blue"]
    with experts(pipeline, make_bundle(), mode):
        both = latents(PROMPTS, negative, [0, 1])
        for i in range(2):
            alone = latents(PROMPTS[i : i + 1], negative[i : i + 1], [i])
            # products over another batch size round differently; this net's latents grow to 80
            assert max_error(both[i : i + 1], alone) <= 2e-6 * alone.abs().max()
    assert max_error(both[:1], both[1:]) > 0.1


class Calls(list[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """Every call of a denoiser: sample, timestep, text features, output."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.handle = unet.register_forward_hook(self.note, with_kwargs=True)

    def note(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.append((args[0].clone(), args[1].clone(), kwargs["encoder_hidden_states"].clone(), output[0].clone()))

    def stop(self) -> None:
        self.handle.remove()


@pytest.mark.parametrize("mode", ["switch", "route"])
def test_the_halves_of_guidance_do_not_mix(mode: str, pipeline: StableDiffusionPipeline) -> None:
    with experts(pipeline, make_bundle(), mode), torch.no_grad():
        calls = Calls(pipeline.unet)
        draw(pipeline, negative_prompt=["a star", "blue"])
        calls.stop()
        assert len(calls) == 3
        for latents, t, text, output in calls:
            halves = zip(latents.chunk(2), text.chunk(2), output.chunk(2), strict=True)
            for half, words, said in halves:
                assert max_error(said, pipeline.unet(half, t, encoder_hidden_states=words).sample) <= 1e-5
            assert max_error(*output.chunk(2)) > 1e-4


# Switching


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_step_calls_the_expert_that_owns_its_timestep(scheduler: str, pipeline: StableDiffusionPipeline) -> None:
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    partition = Partition((0, 125.5, 400, 800, 1000))
    bundle = make_bundle(spec=MixtureSpec((Scale("n4", partition, rank=4, alpha=8),)))
    with experts(pipeline, bundle, "switch") as mixture:
        owners: dict[str, list[list[int]]] = {name: [] for name in mixture.layers}

        def note(name: str) -> Callable[..., None]:
            return lambda *_: owners[name].append(
                mixture.state.step.expert_index["n4"].expand_as(mixture.state.step.t).tolist()
            )

        handles = [layer.base_layer.register_forward_hook(note(name)) for name, layer in mixture.layers.items()]
        draw(pipeline, num_inference_steps=8)
        for handle in handles:
            handle.remove()
    timesteps = pipeline.scheduler.timesteps.tolist()
    wanted = [[partition.index_of(t)] * 4 for t in timesteps]  # two prompts, two halves
    assert {index for step in wanted for index in step} == {0, 1, 2, 3}
    assert all(seen == wanted for seen in owners.values())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("alone", [0, 2])
def test_an_expert_speaks_in_its_own_steps_and_in_no_others(
    alone: int, scheduler: str, pipeline: StableDiffusionPipeline
) -> None:
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    partition = Partition((0, 125.5, 400, 800, 1000))
    bundle = make_bundle(spec=MixtureSpec((Scale("n4", partition, rank=4, alpha=8),)))
    silent = torch.arange(4) != alone
    tensors = {key: value.clone() for key, value in bundle.tensors.items()}
    for key, value in tensors.items():
        if key.endswith(".B"):
            value[silent] = 0
    with experts(pipeline, replace(bundle, tensors=tensors), "switch") as mixture, torch.no_grad():
        calls = Calls(pipeline.unet)
        draw(pipeline, num_inference_steps=8)
        calls.stop()
        assert len(calls) == 8
        mixture.mode = "off"
        for latents, t, text, output in calls:
            changed = max_error(output, pipeline.unet(latents, t, encoder_hidden_states=text).sample)
            owned = partition.boundaries[alone] <= t.item() < partition.boundaries[alone + 1]
            assert changed > 1e-4 if owned else changed == 0, t


def test_detaching_restores_bytes_and_pictures(pipeline: StableDiffusionPipeline) -> None:
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    without = draw(pipeline)
    for mode in ("switch", "route"):
        with experts(pipeline, make_bundle(), mode):
            draw(pipeline)
            assert pipeline.unet.state_dict().keys() == before.keys()
        after = pipeline.unet.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert np.array_equal(draw(pipeline), without)


# Sampling


SETTINGS = SampleSettings("EulerDiscreteScheduler", 3, 3.0, size=(16, 16), batch_size=3, seed=10)


def sampled(pipeline: StableDiffusionPipeline, prompts: list[str], **changes: Any) -> NDArray[np.uint8]:
    return sample(pipeline, prompts, replace(SETTINGS, **changes), progress=None)


@pytest.fixture
def quiet(family: StableDiffusion) -> StableDiffusionPipeline:
    return family.pipeline()


@pytest.mark.parametrize("mode", ["off", "switch", "route"])
def test_a_picture_depends_on_its_own_seed_and_prompt(mode: str, quiet: StableDiffusionPipeline) -> None:
    prompts = [*PROMPTS, "a star", PROMPTS[0]]
    with experts(quiet, make_bundle(), mode):
        at_once = sampled(quiet, prompts)
        assert at_once.shape == (4, 16, 16, 3)
        assert at_once.dtype == np.uint8
        for batch_size in (1, 2):
            other = sampled(quiet, prompts, batch_size=batch_size)
            # a rounding of fp32 may fall on the other side of a grey level
            assert np.abs(other.astype(int) - at_once).max() <= 1
        last = sampled(quiet, prompts[3:], seed=13)
        assert np.abs(last.astype(int) - at_once[3:]).max() <= 1
        assert not np.array_equal(at_once[0], at_once[3])  # same prompt, another seed
        assert np.array_equal(sampled(quiet, prompts), at_once)


def test_sampling_is_the_pipeline_with_the_named_scheduler(quiet: StableDiffusionPipeline) -> None:
    drawn = sampled(quiet, PROMPTS)
    quiet.scheduler = diffusers.EulerDiscreteScheduler.from_config(quiet.scheduler.config)
    generator = [torch.Generator().manual_seed(seed) for seed in (10, 11)]
    peer = quiet(PROMPTS, 16, 16, 3, guidance_scale=3.0, generator=generator, output_type="pil").images
    assert np.array_equal(drawn, np.stack([np.asarray(picture) for picture in peer]))


def test_no_prompts_give_no_pictures(quiet: StableDiffusionPipeline) -> None:
    assert sampled(quiet, []).shape == (0, 16, 16, 3)


def test_the_scheduler_is_put_back(quiet: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    own, config = quiet.scheduler, dict(quiet.scheduler.config)
    sampled(quiet, PROMPTS)
    assert quiet.scheduler is own

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(quiet.vae, "decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sampled(quiet, PROMPTS)
    assert quiet.scheduler is own
    assert dict(own.config) == config


@pytest.mark.parametrize("name", ["EulerScheduler", "DDIM", "StableDiffusionPipeline", "", "scheduler"])
def test_an_unknown_scheduler_is_named_with_those_there_are(name: str, quiet: StableDiffusionPipeline) -> None:
    own = quiet.scheduler
    with pytest.raises(ValueError, match=rf"no scheduler '{name}'; it has .*DDIMScheduler, .*EulerDiscreteScheduler"):
        sampled(quiet, PROMPTS, scheduler=name)
    assert quiet.scheduler is own


@pytest.mark.parametrize("name", ["VQDiffusionScheduler", "DPMSolverSDEScheduler"])
def test_a_scheduler_that_cannot_be_made_is_an_error_that_says_why(
    name: str, quiet: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NeedsTorchsde:
        """What diffusers puts in the place of a scheduler whose library is not installed."""

        @classmethod
        def from_config(cls, config: object) -> None:
            raise ImportError("DPMSolverSDEScheduler requires the torchsde library")

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", NeedsTorchsde)
    with pytest.raises(ValueError, match=rf"{name}.*(num_vec_classes|torchsde)"):
        sampled(quiet, PROMPTS, scheduler=name)


# The family


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_ddpm(prediction: str) -> None:
    family = StableDiffusion(tiny_pipeline(prediction))
    peer = DDPMScheduler.from_config(family.parts.scheduler.config)
    assert family.noise.num_train_timesteps == 1000
    latents, noise = normal(5, 4, 8, 8), normal(5, 4, 8, 8, seed=1)
    t = torch.tensor([0, 1, 500, 998, 999])
    assert max_error(family.noise.add_noise(latents, noise, t), peer.add_noise(latents, noise, t)) == 0
    target = family.noise.target(latents, noise, t)
    assert max_error(target, noise if prediction == "epsilon" else peer.get_velocity(latents, noise, t)) == 0
    signal = peer.alphas_cumprod.double()[t].sqrt().view(-1, 1, 1, 1)
    spread = (1 - peer.alphas_cumprod.double()[t]).sqrt().view(-1, 1, 1, 1)
    assert max_error(family.noise.add_noise(latents, noise, t), signal * latents + spread * noise) <= 1e-6
    if prediction == "v_prediction":
        assert max_error(target, signal * noise - spread * latents) <= 1e-6


def test_predictions_are_those_of_the_unet(family: StableDiffusion) -> None:
    noisy, t = normal(2, 4, 8, 8), torch.tensor([3, 700])
    text = family.encode_captions(PROMPTS)
    with torch.no_grad():
        peer = family.parts.unet(noisy, t, text["encoder_hidden_states"]).sample
    assert max_error(family.predict(noisy, t, text), peer) == 0


@pytest.mark.parametrize("prediction", ["sample", "flow_prediction"])
def test_other_predictions_are_refused(prediction: str) -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler(prediction_type=prediction)
    with pytest.raises(ValueError, match=rf"prediction_type is '{prediction}'; allowed are epsilon, v_prediction"):
        StableDiffusion(pipeline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_pipeline_is_loaded_as_it_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = tiny_pipeline()
    saved.save_pretrained(tmp_path)
    family = StableDiffusion.load(str(tmp_path), torch.device("cpu"), dtype)
    assert {family.parts.unet.dtype, family.parts.vae.dtype, family.parts.text_encoder.dtype} == {dtype}
    assert family.source == str(tmp_path)
    assert not any(p.requires_grad for p in family.denoiser.parameters())
    assert not family.denoiser.training
    if dtype == torch.float32:
        assert abs(draw(family.pipeline()) - draw(saved)).max() <= 1e-6  # loaded weights lie elsewhere in memory


def test_what_is_no_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    for source in (tmp_path, tmp_path / "nowhere", tmp_path / "weights.safetensors"):
        with pytest.raises(ValueError, match=rf"cannot load a StableDiffusionPipeline from '{source}': "):
            StableDiffusion.load(str(source), torch.device("cpu"))
