"""Text encoders whose experts depend on the denoising timestep: training batches that mix t, and re-encoding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from conftest import max_error, normal, random_pictures, randomise, scales, tiny_pipeline
from timestep_experts.build import build_foster_settings, build_mixture
from timestep_experts.config import parse_recipe
from timestep_experts.data import EncodedDataset
from timestep_experts.evaluation import LossSettings, loss_curve
from timestep_experts.formats import Bundle
from timestep_experts.inference import Reencoder, attach, detach
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.models import StableDiffusion
from timestep_experts.training import FosterSettings, LoopSettings, OptimiserSettings, foster
from timestep_experts.training.loop import run_stage
from timestep_experts.training.stage import Training

pytestmark = pytest.mark.usefixtures("either_kernels")


SPEC = MixtureSpec(scales(4, 1))
TARGETS = {"unet": ("to_q", "conv1"), "text_encoder": ("q_proj", "v_proj")}
PROMPTS = ["a red star", "a blue plain cross"]
T = torch.tensor([10, 400, 990])


def networks(pipeline: StableDiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


def bundle(*, is_zero: bool = False) -> Bundle:
    """Experts on the UNet and the text encoder of the tiny pipeline; random, or as attached."""
    mixture = Mixture.attach(networks(tiny_pipeline()), SPEC, TARGETS)
    if not is_zero:
        randomise(mixture)
    tensors = {key: value.clone() for key, value in mixture.state_dict().items()}
    return Bundle(SPEC, tuple(mixture.layers), tensors, "route", "tiny", "UNet2DConditionModel", {})


def draw(pipeline: StableDiffusionPipeline, **options: object) -> Tensor:
    drawn = pipeline(
        PROMPTS,
        negative_prompt=["", "a blue star"],
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
        output_type="pt",
        **options,
    )
    return drawn.images


@pytest.fixture
def quiet(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("mode", ["switch", "route"])
@pytest.mark.parametrize("text_experts", ["step", "interval", "off", None])
def test_zero_experts_change_nothing(mode: str, text_experts: str | None, quiet: StableDiffusionPipeline) -> None:
    before = draw(quiet)
    attach(quiet, bundle(is_zero=True), mode, text_experts=text_experts)
    assert torch.equal(draw(quiet), before)


@pytest.mark.parametrize(("mode", "text_experts"), [("route", "step"), ("switch", "step"), ("switch", "interval")])
def test_sampling_is_the_loop_that_encodes_at_every_step(
    mode: str, text_experts: str, quiet: StableDiffusionPipeline
) -> None:
    mixture = attach(quiet, bundle(), mode, text_experts=text_experts)
    actual = draw(quiet, return_dict=True)
    encode = partial(type(quiet).encode_prompt, quiet)
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    quiet.scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in quiet.scheduler.timesteps:
            with mixture.at(t):
                wanted, unwanted = encode(PROMPTS, quiet.device, 1, True, ["", "a blue star"])
            noise = quiet.unet(latents.repeat(2, 1, 1, 1), t, torch.cat([unwanted, wanted])).sample
            low, high = noise.chunk(2)
            latents = quiet.scheduler.step(low + 3.0 * (high - low), t, latents).prev_sample
        decoded = quiet.vae.decode(latents / quiet.vae.config.scaling_factor).sample
    assert max_error(actual, (decoded / 2 + 0.5).clamp(0, 1)) <= 1e-5


def test_text_experts_matter_and_off_silences_them(quiet: StableDiffusionPipeline) -> None:
    attach(quiet, bundle(), "switch")
    switched = draw(quiet)
    Reencoder.of(quiet).when = "off"
    silent = draw(quiet)
    assert max_error(switched, silent) > 1e-4
    detach(quiet)
    without = replace(bundle(), target_modules=tuple(n for n in bundle().target_modules if n.startswith("unet.")))
    without = replace(without, tensors={k: v for k, v in bundle().tensors.items() if k.startswith("unet.")})
    attach(quiet, without, "switch")
    assert Reencoder.of(quiet) is None
    assert torch.equal(draw(quiet), silent)


def test_prompts_are_encoded_once_per_interval_and_kept(quiet: StableDiffusionPipeline) -> None:
    attach(quiet, bundle(), "switch")
    reencoder = Reencoder.of(quiet)
    draw(quiet)
    quiet.scheduler.set_timesteps(5)
    met = {SPEC.strata.index_of(int(t)) for t in quiet.scheduler.timesteps}
    assert reencoder.num_text_passes == 1 + len(met)
    draw(quiet)  # the same prompts: nothing but the pipeline's own pass
    assert reencoder.num_text_passes == 2 + len(met)
    reencoder.when = "step"
    draw(quiet)
    assert reencoder.num_text_passes == 3 + len(met) + 5


def test_detaching_gives_the_pipeline_back(quiet: StableDiffusionPipeline) -> None:
    before = draw(quiet)
    states = {name: network.state_dict() for name, network in networks(quiet).items()}
    attach(quiet, bundle())
    detach(quiet)
    assert "encode_prompt" not in vars(quiet)
    for name, network in networks(quiet).items():
        assert network.state_dict().keys() == states[name].keys()
        assert all(torch.equal(value, states[name][key]) for key, value in network.state_dict().items())
    assert torch.equal(draw(quiet), before)


def test_mixed_timesteps_encode_like_the_loop(family: StableDiffusion) -> None:
    mixture = randomise(Mixture.attach(networks(family.parts), SPEC, TARGETS))
    tokens = family.tokenize(["a red star", "a blue cross", "a red plain star"])
    for mode in ("switch", "route"):
        mixture.mode = mode
        joint = family.features_at(tokens, T)["encoder_hidden_states"]
        alone = [
            family.features_at({name: ids[i : i + 1] for name, ids in tokens.items()}, T[i : i + 1]) for i in range(3)
        ]
        assert max_error(joint, torch.cat([each["encoder_hidden_states"] for each in alone])) <= 1e-6
    mixture.mode = "off"
    silent = family.features_at(tokens, T)["encoder_hidden_states"]
    assert max_error(silent, joint) > 1e-3


def tokenised(family: StableDiffusion) -> EncodedDataset:
    pictures = random_pictures(6, family)
    return replace(pictures, features=family.tokenize([*pictures.captions, ""]), is_tokenised=True)


def test_silent_text_experts_give_the_kept_features(family: StableDiffusion) -> None:
    rows, dropped = torch.tensor([3, 1, 5]), torch.tensor([False, True, False])
    kept = random_pictures(6, family).features_at(family, rows, T, dropped)
    fresh = tokenised(family).features_at(family, rows, T, dropped)
    assert max_error(fresh["encoder_hidden_states"], kept["encoder_hidden_states"]) <= 1e-6


def test_fostering_teaches_each_text_expert_its_own_interval(family: StableDiffusion, tmp_path: Path) -> None:
    mixture = Mixture.attach(networks(family.parts), MixtureSpec(scales(4, rank=2)), TARGETS, seed=3)
    rates = {"n4": [0.05, 0.05, 1e-12, 0.05]}  # the third expert all but stands still
    settings = FosterSettings("independent", 2, rates, {"n4": [4] * 4}, caption_dropout=0.25, seed=5)
    (stage,) = foster(mixture, settings)
    optimiser = OptimiserSettings("SGD", {"momentum": 0.9})
    training = Training(stage, mixture, family)
    run_stage(training, tokenised(family), LoopSettings(optimiser), tmp_path, {"run": "text"})
    for name, layer in mixture.layers.items():
        moved = layer.experts["n4"].B.abs().amax((1, 2))
        assert (moved[[0, 1, 3]] > 1e-5).all(), name
        assert moved[2] < 1e-9, name


def test_losses_are_measured_with_text_experts(family: StableDiffusion) -> None:
    settings = LossSettings(Partition.uniform(2), 1, 3, 2, seed=1)
    silent, fresh = random_pictures(6, family), tokenised(family)
    mixture = randomise(Mixture.attach(networks(family.parts), SPEC, TARGETS))
    mixture.mode = "switch"
    spoken = loss_curve(family, fresh, settings)
    kept = loss_curve(family, silent, settings)
    assert spoken.loss != kept.loss


def test_text_encoders_checkpoint_with_their_own_timesteps(family: StableDiffusion) -> None:
    mixture = randomise(Mixture.attach(networks(family.parts), SPEC, TARGETS))
    mixture.mode = "route"
    encoder = family.parts.text_encoder.train()
    tokens = family.tokenize(["a red star", "a blue cross", "a red plain star"])
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            encoder.activation_checkpointing_enable()
        for parameter in mixture.layers["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"].parameters():
            parameter.requires_grad_(True).grad = None
        noise = normal(3, 4, 8, 8)
        family.predict(noise, T, family.features_at(tokens, T)).square().mean().backward()
        layer = mixture.layers["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
        gradients.append(layer.experts["n4"].A.grad.clone())
    assert gradients[0].abs().max() > 0
    assert max_error(*gradients) <= 1e-7


# Settings of their own


def test_text_experts_have_a_rate_a_decay_and_a_dropout_of_their_own(family: StableDiffusion, tmp_path: Path) -> None:
    document = {
        "output_dir": tmp_path,
        "data": {"path": "world/flat"},
        "method": {
            "kind": "foster",
            "experts": {
                "target_modules": ["to_q"],
                "text_target_modules": ["q_proj"],
                "scales": [{"intervals": 2}],
                "dropout": 0.5,
                "text_dropout": 0.0,
            },
            "learning_rate": 1e-3,
            "text_learning_rate": 1e-4,
            "text_weight_decay": 0.3,
        },
    }
    recipe = parse_recipe(document)
    mixture = build_mixture(recipe, recipe.method, family)
    dropouts = {name.partition(".")[0]: layer.dropout for name, layer in mixture.layers.items()}
    assert dropouts == {"unet": 0.5, "text_encoder": 0.0}
    (stage,) = foster(mixture, build_foster_settings(recipe, recipe.method, family.text_encoders))
    assert [param_group.name for param_group in stage.param_groups] == [
        "n2.0.unet",
        "n2.0.text_encoder",
        "n2.1.unet",
        "n2.1.text_encoder",
    ]
    optimiser = OptimiserSettings("AdamW", {"weight_decay": 0.01}).build(stage.param_groups)
    settings = [(round(group["lr"], 9), group["weight_decay"]) for group in optimiser.param_groups]
    assert settings == [(1e-3, 0.01), (1e-4, 0.3)] * 2
