"""VideoCrafter and Wan: their encoders, noise and predictions against the pipelines, and what VideoCrafter2 adds."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    WanPipeline,
)
from torch import Tensor, nn

from conftest import max_error, normal, randomise, scales
from families.tiny_video import tiny_fps_unet, tiny_video_crafter, tiny_wan
from timestep_experts.formats.video_crafter import (
    PREFIX,
    to_checkpoint,
    to_checkpoint_key,
    to_diffusers,
    to_diffusers_key,
)
from timestep_experts.intervals import Interval
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.models.family import Family
from timestep_experts.models.video_crafter import (
    FPS,
    FpsUNet3DConditionModel,
    ScaledSignalDDIMScheduler,
    VideoCrafter,
    checkpoint_blocks,
    fold_fps,
    signal_scale,
    uncheckpoint_blocks,
)
from timestep_experts.models.wan import Wan

CAPTIONS = ["a red star moves", "a blue cross", ""]
BOUNDARY = 0.875


@pytest.fixture(scope="module")
def crafter() -> VideoCrafter:
    return VideoCrafter(tiny_video_crafter())


@pytest.fixture(scope="module")
def wan() -> Wan:
    return Wan(tiny_wan())


@pytest.fixture(scope="module")
def wan22() -> Wan:
    return Wan(tiny_wan(BOUNDARY))


@pytest.fixture(params=["crafter", "wan", "wan22"])
def family(request: pytest.FixtureRequest) -> Family:
    return request.getfixturevalue(request.param)


def clips(num_clips: int, family: Family, seed: int = 0) -> Tensor:
    size = (5, 32, 32) if isinstance(family, Wan) else (3, 16, 16)
    return normal(num_clips, 3, *size, seed=seed).clamp(-1, 1)


def repeat_conditioning(family: Family, count: int) -> dict[str, Tensor]:
    return family.encode_captions((CAPTIONS * count)[:count])


# Both families


def test_the_mixed_timesteps_of_a_batch_are_each_samples_own(family: Family) -> None:
    noisy = normal(*family.encode_pixels(clips(4, family)).shape)
    t = torch.tensor([3, 999, 875, 874])
    conditioning = repeat_conditioning(family, 4)
    with torch.no_grad():
        together = family.predict(noisy, t, conditioning)
        alone = [
            family.predict(noisy[i : i + 1], t[i : i + 1], {"encoder_hidden_states": text[i : i + 1]})
            for text in conditioning.values()
            for i in range(4)
        ]
        shuffled = family.predict(noisy, t.flip(0), conditioning)
    assert together.shape == noisy.shape
    assert max_error(together, torch.cat(alone)) <= 1e-5
    assert max_error(together, shuffled) > 1e-3


def test_the_same_clip_gives_the_same_latents_in_any_batch(family: Family) -> None:
    pixels = clips(2, family)
    assert max_error(family.encode_pixels(pixels)[1:], family.encode_pixels(pixels[1:])) <= 1e-6
    assert family.encode_pixels(pixels).dtype == torch.float32


def test_everything_is_frozen_and_knows_that_it_is_video(family: Family) -> None:
    modules = [part for part in family.parts.components.values() if isinstance(part, nn.Module)]
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert family.is_video


# VideoCrafter: encoders and noise


def test_text_features_are_those_of_the_video_crafter_pipeline(crafter: VideoCrafter) -> None:
    wanted = crafter.parts.encode_prompt(CAPTIONS, crafter.device, 1, False)[0]
    assert max_error(crafter.encode_captions(CAPTIONS)["encoder_hidden_states"], wanted) == 0


def test_one_text_layer_less_is_the_last_but_one_through_the_final_norm(crafter: VideoCrafter) -> None:
    tokens = crafter.tokenize(CAPTIONS)["input_ids"]
    shorter = copy.deepcopy(crafter.parts.text_encoder)
    layers = next(module for module in shorter.modules() if isinstance(module, nn.ModuleList))
    del layers[-1]
    norm = next(module for name, module in shorter.named_modules() if name.endswith("final_layer_norm"))
    with torch.no_grad():
        states = crafter.parts.text_encoder(tokens, output_hidden_states=True).hidden_states
        assert max_error(shorter(tokens)[0], norm(states[-2])) <= 1e-6


def test_frames_are_encoded_one_by_one(crafter: VideoCrafter) -> None:
    pixels = clips(2, crafter)
    latents = crafter.encode_pixels(pixels)
    assert latents.shape == (2, 4, 3, 8, 8)
    vae = crafter.parts.vae
    with torch.no_grad():
        for clip, frame in np.ndindex(2, 3):
            mean = vae.encode(pixels[clip, None, :, frame]).latent_dist.mean * vae.config.scaling_factor
            assert max_error(latents[clip, None, :, frame], mean) <= 1e-6


def test_the_signal_fades_to_seven_tenths_in_400_steps() -> None:
    scale = signal_scale()
    wanted = np.concatenate([np.linspace(1, 0.7, 400), np.full(600, 0.7)])
    assert max_error(scale, torch.from_numpy(wanted)) <= 1e-7
    assert scale[0] == 1
    assert scale[200].item() == pytest.approx(1 - 0.3 * 200 / 399, abs=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_is_added_to_a_faded_signal(prediction_type: str) -> None:
    noise = VideoCrafter(tiny_video_crafter(prediction_type)).noise
    latents, added, t = normal(3, 4, 2, 8, 8), normal(3, 4, 2, 8, 8, seed=1), torch.tensor([0, 150, 900])
    alpha = DDPMScheduler.from_config(noise.scheduler.config).alphas_cumprod[t].double().view(3, 1, 1, 1, 1)
    signal = torch.tensor([1, 1 - 0.3 * 150 / 399, 0.7], dtype=torch.double).view(3, 1, 1, 1, 1) * latents
    assert max_error(noise.add_noise(latents, added, t), alpha.sqrt() * signal + (1 - alpha).sqrt() * added) <= 1e-5
    wanted = added if prediction_type == "epsilon" else alpha.sqrt() * added - (1 - alpha).sqrt() * signal
    assert max_error(noise.target(latents, added, t), wanted) <= 1e-5


# VideoCrafter: sampling


def scheduler(num_steps: int, **changes: Any) -> ScaledSignalDDIMScheduler:
    made = ScaledSignalDDIMScheduler.from_config(tiny_video_crafter().scheduler.config, **changes)
    made.set_timesteps(num_steps)
    return made


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_true_noise_leads_back_to_the_clip(prediction_type: str) -> None:
    steps = scheduler(10, prediction_type=prediction_type)
    assert steps.timesteps[0] == 901
    process = VideoCrafter(tiny_video_crafter(prediction_type)).noise
    clean, noise = normal(1, 4, 2, 8, 8), normal(1, 4, 2, 8, 8, seed=1)
    noisy = process.add_noise(clean, noise, steps.timesteps[:1])
    for t, following in zip(steps.timesteps, [*steps.timesteps[1:], None], strict=True):
        said = process.target(clean, noise, t[None])
        noisy, predicted = steps.step(said, t, noisy, return_dict=False)
        assert max_error(predicted, clean) <= 1e-4
        wanted = clean if following is None else process.add_noise(clean, noise, following[None])
        assert max_error(noisy, wanted) <= 1e-4
        assert max_error(noisy, clean if following is None else steps.add_noise(clean, noise, following[None])) <= 1e-4


def test_fresh_noise_is_that_of_ddim() -> None:
    steps = scheduler(10)
    clean, noise, fresh = (normal(1, 4, 2, 8, 8, seed=seed) for seed in range(3))
    noisy = steps.add_noise(clean, noise, torch.tensor([301]))
    a, b = (steps.alphas_cumprod[t].item() for t in (301, 201))
    deviation = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    wanted = b**0.5 * signal_scale()[201] * clean + (1 - b - deviation**2) ** 0.5 * noise + deviation * fresh
    made = steps.step(noise, 301, noisy, eta=1.0, variance_noise=fresh)
    assert max_error(made.prev_sample, wanted) <= 1e-5
    assert max_error(made.pred_original_sample, clean) <= 1e-5


def test_without_fading_it_is_ddim() -> None:
    mine, theirs = scheduler(10), DDIMScheduler.from_config(scheduler(10).config)
    mine.register_to_config(least_signal=1)
    theirs.set_timesteps(10)
    said, noisy = normal(1, 4, 2, 8, 8), normal(1, 4, 2, 8, 8, seed=1)
    for t in (901, 1):
        assert max_error(mine.step(said, t, noisy).prev_sample, theirs.step(said, t, noisy).prev_sample) <= 1e-6


def test_a_base_whose_signal_does_not_fade_keeps_the_pipelines_own_noise_and_sampler() -> None:
    pipeline = tiny_video_crafter()
    pipeline.scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    family = VideoCrafter(pipeline)
    assert family.pipeline() is pipeline
    clean, noise = normal(2, 4, 2, 8, 8), normal(2, 4, 2, 8, 8, seed=1)
    t = torch.tensor([100, 900])
    assert torch.equal(family.noise.add_noise(clean, noise, t), pipeline.scheduler.add_noise(clean, noise, t))


def test_latents_are_not_clipped() -> None:
    with pytest.raises(ValueError, match="set clip_sample and thresholding to False"):
        scheduler(10, clip_sample=True).step(normal(1, 4, 2, 8, 8), 901, normal(1, 4, 2, 8, 8))


def test_the_pipeline_draws_with_the_faded_signal(crafter: VideoCrafter) -> None:
    drawing = crafter.pipeline()
    assert isinstance(drawing, TextToVideoSDPipeline)
    assert isinstance(drawing.scheduler, ScaledSignalDDIMScheduler)
    assert type(crafter.parts.scheduler) is DDIMScheduler
    assert drawing.unet is crafter.denoiser
    settings = {"height": 16, "width": 16, "num_frames": 2, "num_inference_steps": 2, "output_type": "pt"}
    frames = [
        pipeline("a red star", generator=torch.manual_seed(0), **settings).frames
        for pipeline in (drawing, crafter.parts)
    ]
    assert frames[0].shape == (1, 2, 3, 16, 16)
    assert max_error(frames[0], frames[1]) > 1e-3


# VideoCrafter: frames per second


def unet_call(unet: nn.Module, t: Tensor | None = None) -> Tensor:
    t = torch.tensor([3, 700]) if t is None else t
    return unet(normal(2, 4, 3, 8, 8), t, normal(2, 5, 8, seed=1)).sample


@torch.no_grad()
def test_a_folded_frame_rate_is_the_embedded_one() -> None:
    unet = tiny_fps_unet()
    assert unet.fps == FPS
    unet.fps = 8
    folded = fold_fps(unet, 8)
    assert type(folded) is UNet3DConditionModel
    assert not folded.training
    for t in (0, 500, 999):
        assert max_error(unet_call(folded, torch.tensor([t, t])), unet_call(unet, torch.tensor([t, t]))) <= 1e-5
    assert max_error(unet_call(fold_fps(unet, 24)), unet_call(unet)) > 1e-3
    assert folded.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()


@torch.no_grad()
def test_the_frame_rate_is_added_to_the_time_embedding() -> None:
    unet = tiny_fps_unet()
    plain = UNet3DConditionModel.from_config(unet.config).eval()
    plain.load_state_dict({k: v for k, v in unet.state_dict().items() if not k.startswith("fps_embedding.")})
    added = unet.embed_fps(torch.tensor([FPS, FPS]))
    plain.time_embedding.register_forward_hook(lambda module, args, output: output + added)
    assert max_error(unet_call(unet), unet_call(plain)) == 0


@torch.no_grad()
def test_an_fps_network_is_saved_and_copied_as_any_other(tmp_path: Path) -> None:
    unet = tiny_fps_unet()
    unet.save_pretrained(tmp_path)
    loaded = FpsUNet3DConditionModel.from_pretrained(tmp_path)
    assert max_error(unet_call(loaded), unet_call(unet)) == 0
    copied = copy.deepcopy(unet)
    copied.fps = 4
    assert max_error(unet_call(loaded), unet_call(unet)) == 0
    assert max_error(unet_call(copied), unet_call(unet)) > 1e-3


@torch.no_grad()
def test_the_frame_rate_is_saved_with_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = tiny_fps_unet()
    unet.fps = 8
    unet.save_pretrained(tmp_path / "unet")
    loaded = FpsUNet3DConditionModel.from_pretrained(tmp_path / "unet")
    assert loaded.fps == 8
    assert max_error(unet_call(loaded), unet_call(unet)) <= 1e-5
    assert FpsUNet3DConditionModel.from_config(loaded.config).fps == 8
    assert FpsUNet3DConditionModel(**{**tiny_config(), "fps": 12}).fps == 12
    assert FpsUNet3DConditionModel(**tiny_config()).fps == FPS
    pipeline = tiny_video_crafter()
    pipeline.unet = unet
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert VideoCrafter.load(str(tmp_path / "pipeline"), torch.device("cpu")).fps == 8
    fold_fps(unet, 8)
    assert not [record for record in caplog.records if "'fps'" in record.message]


def tiny_config() -> dict[str, Any]:
    return {name: value for name, value in tiny_fps_unet().config.items() if not name.startswith("_") and name != "fps"}


def test_the_family_says_the_frame_rate() -> None:
    pipeline = tiny_video_crafter()
    assert VideoCrafter(pipeline).fps == FPS
    assert VideoCrafter(pipeline, fps=8).fps == pipeline.unet.fps == 8
    pipeline.unet = fold_fps(pipeline.unet, 8)
    assert VideoCrafter(pipeline).fps is None
    with pytest.raises(ValueError, match="a UNet3DConditionModel takes no fps; got 8"):
        VideoCrafter(pipeline, fps=8)


@pytest.mark.parametrize("is_folded", [True, False])
def test_video_crafter_is_loaded_from_a_folder(is_folded: bool, tmp_path: Path) -> None:
    pipeline = tiny_video_crafter()
    if is_folded:
        pipeline.unet = fold_fps(pipeline.unet, FPS)
    pipeline.save_pretrained(tmp_path)
    loaded = VideoCrafter.load(str(tmp_path), torch.device("cpu"))
    assert loaded.fps == (None if is_folded else FPS)
    with torch.no_grad():
        assert max_error(unet_call(loaded.denoiser), unet_call(pipeline.unet)) <= 1e-5


# VideoCrafter: gradient checkpointing


def gradients(unet: nn.Module, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Of two forward passes at different timesteps, backward after both, with the dropout of training."""
    torch.manual_seed(0)
    outputs = [unet_call(unet, torch.tensor(t)) for t in ([3, 700], [900, 250])]
    loss = sum((output * normal(*output.shape, seed=9)).sum() for output in outputs)
    return list(torch.autograd.grad(loss, parameters))


def assert_equal_gradients(one: list[Tensor], other: list[Tensor]) -> None:
    largest = max(gradient.abs().max().item() for gradient in other)
    assert max(max_error(a, b) for a, b in zip(one, other, strict=True)) <= 1e-6 * largest


def count_runs(unet: nn.Module) -> Counter[str]:
    seen: Counter[str] = Counter()
    for name in ("down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.norm", "transformer_in.norm"):
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.update([name]))
    return seen


def test_checkpointing_changes_no_gradient() -> None:
    unet = tiny_fps_unet().train()
    parameters = list(unet.parameters())
    seen = count_runs(unet)
    wanted = gradients(unet, parameters)
    assert set(seen.values()) == {2}
    before = {name: set(vars(module)) for name, module in unet.named_modules()}
    checkpoint_blocks(unet)
    seen.clear()
    assert_equal_gradients(gradients(unet, parameters), wanted)
    assert set(seen.values()) == {4}
    seen.clear()
    with torch.no_grad():
        unet_call(unet)
    assert set(seen.values()) == {1}
    uncheckpoint_blocks(unet)
    assert {name: set(vars(module)) for name, module in unet.named_modules()} == before
    seen.clear()
    assert_equal_gradients(gradients(unet, parameters), wanted)
    assert set(seen.values()) == {2}


@pytest.mark.parametrize("attached_first", [True, False])
def test_recomputed_experts_see_the_timesteps_of_their_own_pass(attached_first: bool) -> None:
    unet = tiny_fps_unet().requires_grad_(False)

    def attach() -> Mixture:
        mixture = randomise(
            Mixture.attach(unet, MixtureSpec(scales(8, 2)), ["to_k", "to_v", "time_emb_proj", "conv_shortcut"])
        )
        mixture.mode = "route"
        return mixture

    mixture = attach()
    wanted = gradients(unet, list(mixture.parameters()))
    if not attached_first:
        mixture.detach()
    checkpoint_blocks(unet)
    if not attached_first:
        mixture = attach()
    assert_equal_gradients(gradients(unet, list(mixture.parameters())), wanted)
    uncheckpoint_blocks(unet)
    mixture.detach()
    assert not any(getattr(module, "_gradient_checkpointing_func", None) for module in unet.modules())


def test_a_copy_of_a_checkpointed_network_runs_itself() -> None:
    unet = tiny_fps_unet()
    checkpoint_blocks(unet)
    copied = copy.deepcopy(unet)
    with torch.no_grad():
        for parameter in copied.mid_block.parameters():
            parameter.zero_()
    assert max_error(unet_call(copied), unet_call(unet)) > 1e-3


# VideoCrafter2's checkpoint


def test_every_tensor_of_video_crafter_2_has_one_name_on_each_side() -> None:
    with torch.device("meta"):
        plain, whole = (kind().state_dict() for kind in (UNet3DConditionModel, FpsUNet3DConditionModel))
    assert len(plain) == 1480
    assert len(whole) == 1484
    renamed = {key: to_checkpoint_key(key) for key in whole}
    assert len(set(renamed.values())) == 1484
    assert {to_diffusers_key(name): name for name in renamed.values()} == renamed
    assert {to_diffusers_key(name.removeprefix(PREFIX)) for name in renamed.values()} == set(whole)
    there = to_checkpoint(whole)
    assert {key for key, value in there.items() if value.shape != whole[to_diffusers_key(key)].shape} == {
        f"{PREFIX}init_attn.0.proj_in.weight",
        f"{PREFIX}init_attn.0.proj_out.weight",
    }
    assert there[f"{PREFIX}init_attn.0.proj_in.weight"].shape == (512, 320, 1)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("time_embed.2.bias", "time_embedding.linear_2.bias"),
        ("fps_embedding.0.weight", "fps_embedding.linear_1.weight"),
        ("input_blocks.0.0.weight", "conv_in.weight"),
        ("input_blocks.2.0.in_layers.0.weight", "down_blocks.0.resnets.1.norm1.weight"),
        ("input_blocks.4.0.skip_connection.weight", "down_blocks.1.resnets.0.conv_shortcut.weight"),
        ("input_blocks.8.0.temopral_conv.conv1.2.weight", "down_blocks.2.temp_convs.1.conv1.2.weight"),
        ("input_blocks.7.1.transformer_blocks.0.attn2.to_k.weight",
         "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        ("input_blocks.1.2.transformer_blocks.0.ff.net.0.proj.weight",
         "down_blocks.0.temp_attentions.0.transformer_blocks.0.ff.net.0.proj.weight"),
        ("input_blocks.6.0.op.bias", "down_blocks.1.downsamplers.0.conv.bias"),
        ("input_blocks.11.0.emb_layers.1.weight", "down_blocks.3.resnets.1.time_emb_proj.weight"),
        ("init_attn.0.transformer_blocks.0.norm1.weight", "transformer_in.transformer_blocks.0.norm1.weight"),
        ("middle_block.0.out_layers.3.weight", "mid_block.resnets.0.conv2.weight"),
        ("middle_block.3.temopral_conv.conv4.3.bias", "mid_block.temp_convs.1.conv4.3.bias"),
        ("middle_block.2.proj_in.weight", "mid_block.temp_attentions.0.proj_in.weight"),
        ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("output_blocks.8.3.conv.weight", "up_blocks.2.upsamplers.0.conv.weight"),
        ("output_blocks.11.2.norm.weight", "up_blocks.3.temp_attentions.2.norm.weight"),
        ("out.2.weight", "conv_out.weight"),
    ],
)  # fmt: skip
def test_names_are_those_of_the_public_checkpoint(there: str, here: str) -> None:
    assert to_diffusers_key(PREFIX + there) == here
    assert to_checkpoint_key(here) == PREFIX + there


@torch.no_grad()
def test_a_network_survives_the_way_there_and_back() -> None:
    unet = tiny_fps_unet()
    state = unet.state_dict()
    autoencoder = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1), "scale_arr": torch.zeros(1400)}
    back = to_diffusers({**to_checkpoint(state), **autoencoder})
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) and back[key].dtype == state[key].dtype for key in state)
    loaded = tiny_fps_unet(seed=1)
    assert max_error(unet_call(loaded), unet_call(unet)) > 1e-3
    loaded.load_state_dict(back)
    assert max_error(unet_call(loaded), unet_call(unet)) <= 1e-5


@pytest.mark.parametrize(
    ("rename", "key"),
    [
        (to_diffusers_key, "input_blocks.12.0.in_layers.0.weight"),
        (to_diffusers_key, "first_stage_model.encoder.conv_in.weight"),
        (to_checkpoint_key, "down_blocks.3.attentions.0.norm.weight"),
    ],
)
def test_a_foreign_tensor_is_named(rename: Callable[[str], str], key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' is no tensor of a"):
        rename(key)


# Wan


def test_text_features_are_those_of_the_wan_pipeline(wan: Wan) -> None:
    captions = [*CAPTIONS, "  a  red &amp;amp; blue\nstar "]
    wanted = wan.parts.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    features = wan.encode_captions(captions)["encoder_hidden_states"]
    assert features.shape == (4, 512, 8)
    assert max_error(features, wanted) == 0
    assert not features[1, 4:].any()  # three words and the end


def test_latents_are_normalised_as_the_pipeline_undoes_it(wan: Wan) -> None:
    pixels = clips(2, wan)
    latents = wan.encode_pixels(pixels)
    assert latents.shape == (2, 16, 2, 4, 4)
    config = wan.parts.vae.config
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        assert max_error(latents * std + mean, wan.parts.vae.encode(pixels).latent_dist.mean) <= 1e-5


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [
        (4, 32, 32, "clips of 4 frames do not fit; a number of frames less 1 must divide by 4"),
        (5, 24, 32, "a size of 32 x 24 pixels does not fit; width and height must divide by 16"),
        (5, 32, 40, "a size of 40 x 32 pixels does not fit; width and height must divide by 16"),
    ],
)
def test_clips_that_would_be_cut_are_refused(frames: int, height: int, width: int, message: str, wan: Wan) -> None:
    with pytest.raises(ValueError, match=message):
        wan.encode_pixels(torch.zeros(1, 3, frames, height, width))


def test_noise_is_a_straight_flow_with_the_schedulers_shift(wan: Wan) -> None:
    latents, noise = normal(2, 16, 2, 4, 4), normal(2, 16, 2, 4, 4, seed=1)
    t = torch.tensor([250.0, 1000.0])
    wanted = torch.stack([0.75 * latents[0] + 0.25 * noise[0], noise[1]])
    assert max_error(wan.noise.add_noise(latents, noise, t), wanted) <= 1e-6
    assert max_error(wan.noise.target(latents, noise, t), noise - latents) == 0
    median = wan.noise.density.icdf(torch.tensor([0.5])).item()
    assert median == pytest.approx(1000 * 3 * 0.5 / (1 + 2 * 0.5))
    euler = Wan(tiny_wan(scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0)))
    assert euler.noise.density.icdf(torch.tensor([0.5])).item() == pytest.approx(1000 * 5 * 0.5 / (1 + 4 * 0.5))


@pytest.mark.parametrize("kind", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)])
def test_a_scheduler_without_a_fixed_flow_shift_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"a {type(kind).__name__} without a fixed flow shift"):
        Wan(tiny_wan(scheduler=kind))


def test_one_transformer_owns_everything(wan: Wan) -> None:
    assert wan.denoisers == {"transformer": wan.parts.transformer}
    assert wan.owned_intervals == {}


def test_two_transformers_share_out_the_timesteps(wan22: Wan) -> None:
    assert list(wan22.denoisers) == ["transformer", "transformer_2"]
    assert wan22.owned_intervals == {"transformer": Interval(875, 1000), "transformer_2": Interval(0, 875)}
    noisy, conditioning = normal(4, 16, 2, 4, 4), repeat_conditioning(wan22, 4)
    t = torch.tensor([874.99, 1000, 0, 875])
    owners = ("transformer_2", "transformer", "transformer_2", "transformer")
    with torch.no_grad():
        predicted = wan22.predict(noisy, t, conditioning)
        for i, owner in enumerate(owners):
            text = conditioning["encoder_hidden_states"][i : i + 1]
            alone = wan22.denoisers[owner](noisy[i : i + 1], t[i : i + 1], text).sample
            assert max_error(predicted[i : i + 1], alone) <= 1e-5


def test_gradients_reach_the_owner_alone(wan22: Wan) -> None:
    family = Wan(copy.deepcopy(wan22.parts))
    for module in family.denoisers.values():
        module.requires_grad_(True)
    family.predict(normal(1, 16, 2, 4, 4), torch.tensor([10.0]), repeat_conditioning(family, 1)).sum().backward()
    assert family.parts.transformer.proj_out.weight.grad is None
    assert family.parts.transformer_2.proj_out.weight.grad.abs().sum() > 0


def test_the_pipeline_asks_the_owner_of_each_step(wan22: Wan) -> None:
    asked: list[tuple[str, float]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _module, _args, kwargs, name=name: asked.append((name, kwargs["timestep"][0].item())),
            with_kwargs=True,
        )
        for name, module in wan22.denoisers.items()
    ]
    wan22.pipeline()(
        "a red star", height=32, width=32, num_frames=5, num_inference_steps=6, guidance_scale=1.0, output_type="latent"
    )
    for hook in hooks:
        hook.remove()
    assert len(asked) == 6
    assert {name for name, _ in asked} == set(wan22.denoisers)
    assert all(t in wan22.owned_intervals[name] for name, t in asked)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_two_transformers_need_a_boundary(ratio: float) -> None:
    with pytest.raises(ValueError, match="two transformers need a boundary_ratio between 0 and 1"):
        _ = Wan(tiny_wan(ratio)).owned_intervals


def test_wan_is_loaded_from_a_folder(tmp_path: Path, wan22: Wan) -> None:
    wan22.parts.save_pretrained(tmp_path)
    loaded = Wan.load(str(tmp_path), torch.device("cpu"))
    assert isinstance(loaded.parts, WanPipeline)
    assert loaded.owned_intervals == wan22.owned_intervals
    for name, module in wan22.denoisers.items():
        theirs = loaded.denoisers[name].state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in module.state_dict().items())
    noisy, conditioning = normal(1, 16, 2, 4, 4), repeat_conditioning(wan22, 1)
    t = torch.tensor([900.0])
    with torch.no_grad():  # mapped files are aligned otherwise, and so are sums ordered
        assert max_error(loaded.predict(noisy, t, conditioning), wan22.predict(noisy, t, conditioning)) <= 1e-6
