"""Every family against its pipeline and against closed forms, on whole pipelines of random weights."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import PIPELINES, VARIANTS, ddpm, flux, pixart, stable_diffusion_3
from torch import Tensor, nn
from torch._dynamo.utils import counters

from conftest import max_error, normal, randomise, scales
from timestep_experts.formats import Bundle, load_bundle, save_bundle
from timestep_experts.inference import SampleSettings, attach, detach, sample
from timestep_experts.intervals import LogitNormalDensity, Partition, UniformDensity
from timestep_experts.mixture import Mixture, MixtureSpec, timestep_input_of
from timestep_experts.models import (
    DDPM,
    FAMILIES,
    Family,
    Flux,
    PixArt,
    PixArtSigma,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    load_family,
)
from timestep_experts.objectives import squared_error

# of numpy, met in the schedulers of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CPU = torch.device("cpu")
PROMPTS = ["a red star", "a blue plain cross"]
CAPTIONS = [*PROMPTS, "", "  A Dark STAR ", "a cross in the dark " * 200]
MIXED_T = torch.tensor([0, 130, 499, 500, 999])
SPEC = MixtureSpec(scales(4, 2, 1, base_gate=0.5))
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "sd": (*ATTENTION, "conv1", "time_emb_proj"),
    "sdxl": (*ATTENTION, "conv1", "add_embedding.linear_1"),
    "ddpm": (*ATTENTION, "conv1", "downsamplers.0.conv"),
    "pixart": (*ATTENTION, "ff.net.2", "adaln_single.linear"),
    "sd3": (*ATTENTION, "add_k_proj", "ff.net.2"),
    "flux": (*ATTENTION, "add_k_proj", "proj_mlp", "proj_out"),
}
CLASSES = {
    "sd": StableDiffusion,
    "sdxl": StableDiffusionXL,
    "ddpm": DDPM,
    "pixart": PixArt,
    "sd3": StableDiffusion3,
    "flux": Flux,
    "pixart of 1024 pixels": PixArt,
    "pixart sigma": PixArtSigma,
    "sd3 without t5": StableDiffusion3,
    "flux without guidance": Flux,
}
FLOWS = ("sd3", "flux")


@pytest.fixture(params=PIPELINES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family(name: str) -> Family:
    return make_family(name)


def make_family(name: str) -> Family:
    return CLASSES[name](VARIANTS[name]())


def equip(name: str, family: Family, mode: str = "route") -> Mixture:
    """Random experts on a family's denoiser."""
    mixture = Mixture.attach(family.denoiser, SPEC, TARGETS[name])
    randomise(mixture).mode = mode
    return mixture


def make_bundle(name: str, *, speaking: bool = True) -> Bundle:
    """Random experts and routers; silent ones have B = 0."""
    family = make_family(name)
    mixture = equip(name, family)
    state = mixture.state_dict()
    tensors = {key: value * (speaking or not key.endswith(".B")) for key, value in state.items()}
    return Bundle(
        spec=mixture.spec,
        target_modules=tuple(mixture.layers),
        tensors=tensors,
        mode="route",
        base_model=f"tiny {name}",
        denoiser_class=type(family.denoiser).__name__,
        provenance={},
    )


def inputs_of(family: Family, count: int = len(MIXED_T)) -> tuple[Tensor, dict[str, Tensor]]:
    """Noisy latents and text features."""
    channels = 3 if family.autoencoder_name is None else 4
    captions = [CAPTIONS[row % len(PROMPTS)] for row in range(count)]
    return normal(count, channels, 8, 8), family.encode_captions(captions)


def draw(pipeline: Any, **options: Any) -> NDArray[np.float32]:
    """Two pictures in four steps; as floats, so that a bit of difference shows."""
    taken = inspect.signature(type(pipeline).__call__).parameters
    wanted = {
        "prompt": PROMPTS,
        "height": 16,
        "width": 16,
        "guidance_scale": 3.0,
        "clean_caption": False,
        "use_resolution_binning": False,
        "output_type": "np",
        "num_inference_steps": 4,
        "generator": [torch.Generator().manual_seed(seed) for seed in range(2)],
    }
    if "prompt" not in taken:
        wanted["batch_size"] = 2
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**{key: value for key, value in (wanted | options).items() if key in taken}).images


# Text


PEERS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "sd": lambda pipe: {"encoder_hidden_states": pipe.encode_prompt(CAPTIONS, CPU, 1, False)[0]},
    "sdxl": lambda pipe: dict(
        zip(
            ("encoder_hidden_states", "text_embeds"),
            pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)[::2],
            strict=True,
        )
    ),
    "pixart": lambda pipe: dict(
        zip(
            ("encoder_hidden_states", "encoder_attention_mask"),
            pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, clean_caption=False)[:2],
            strict=True,
        )
    ),
    "sd3": lambda pipe: dict(
        zip(
            ("encoder_hidden_states", "pooled_projections"),
            pipe.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)[::2],
            strict=True,
        )
    ),
    "flux": lambda pipe: dict(
        zip(("encoder_hidden_states", "pooled_projections"), pipe.encode_prompt(CAPTIONS)[:2], strict=True)
    ),
}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "ddpm"])
def test_text_features_are_those_of_the_pipeline(variant: str) -> None:
    family = make_family(variant)
    features = family.encode_captions(CAPTIONS)
    with torch.no_grad():
        peers = PEERS[variant.split()[0]](family.pipeline())
    assert features.keys() == peers.keys()
    for key, peer in peers.items():
        assert torch.equal(features[key], peer), key
        assert features[key].dtype == peer.dtype, key


def test_captions_of_pixart_are_lowercased_and_stripped() -> None:
    features = PixArt(pixart()).encode_captions(["  A Red STAR ", "a red star"])
    assert all(torch.equal(*value) for value in features.values())


@pytest.mark.parametrize("variant", ["pixart", "pixart of 1024 pixels", "pixart sigma"])
def test_pixart_draws_for_the_text_and_the_size_that_it_is_trained_on(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = make_family(variant)
    pipeline = family.pipeline()
    module = sys.modules[type(pipeline).__module__]
    monkeypatch.setattr(module, "is_bs4_available", lambda: True)  # as where the libraries for cleaning are installed
    monkeypatch.setattr(module, "is_ftfy_available", lambda: True)
    monkeypatch.setattr(type(pipeline), "_clean_caption", lambda _, text: f"dark {text}")
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0].clone(), kwargs["encoder_hidden_states"].clone()))

    family.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    settings = SampleSettings(None, 2, 1.0, (16, 32), 2, 0)
    assert sample(pipeline, PROMPTS, settings, progress=None).shape == (2, 16, 32, 3)
    noisy, text = calls[0]
    assert noisy.shape[-2:] == (8, 16)
    assert torch.equal(text, family.encode_captions(PROMPTS)["encoder_hidden_states"])


@pytest.mark.parametrize(("variant", "length"), [("pixart", 120), ("pixart sigma", 300), ("sd3", 280), ("flux", 512)])
def test_text_is_as_long_as_the_pipeline_makes_it(variant: str, length: int) -> None:
    assert make_family(variant).encode_captions([""])["encoder_hidden_states"].shape[1] == length


@pytest.mark.parametrize(("variant", "fixed"), [("pixart", 0), ("sd3", 24), ("sd3 without t5", 24), ("flux", 0)])
def test_a_text_length_holds_in_training_and_drawing(variant: str, fixed: int) -> None:
    family = make_family(variant)
    family.set_max_sequence_length(7)
    features = family.encode_captions(PROMPTS)
    assert features["encoder_hidden_states"].shape[1] == fixed + 7
    given: list[Tensor] = []

    def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        given.append(kwargs["encoder_hidden_states"].clone())

    family.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    size = family.default_size
    sample(family.pipeline(), PROMPTS, SampleSettings(None, 2, 1.0, size, 2, 0, None, 7), progress=None)
    assert torch.equal(given[0], features["encoder_hidden_states"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_captions_are_cut_where_tokenizers_cut_them(variant: str) -> None:
    family = make_family(variant)
    short, long = ["a", "b"], "a cross in the dark " * 200
    ids = [value for name, value in family.tokenize(short).items() if name.startswith("input_ids")]
    limits = list(family.token_limits.values())
    assert limits == [value.shape[1] for value in ids]
    cut = family.cut_captions([*short, long])
    assert [(found.limit, found.count) for found in cut] == [(limit, 1) for limit in limits]
    assert all(found.longest > found.limit for found in cut)
    assert family.cut_captions(short) == []


@pytest.mark.parametrize("variant", ["pixart", "sd3", "flux"])
def test_encoders_with_another_text_length_are_others(variant: str) -> None:
    family = make_family(variant)
    before = family.encoder_fingerprint()
    family.set_max_sequence_length(7)
    assert family.encoder_fingerprint() != before
    assert make_family(variant).encoder_fingerprint() == before


@pytest.mark.parametrize(
    ("variant", "length", "message"),
    [("sd", 7, "takes no max_sequence_length"), ("flux", 0, "must be positive; got 0")],
)
def test_a_text_length_that_cannot_be_is_refused(variant: str, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_family(variant).set_max_sequence_length(length)


def test_captions_of_ddpm_are_ignored_or_class_numbers() -> None:
    assert DDPM(ddpm()).encode_captions(CAPTIONS)["nothing"].shape == (len(CAPTIONS), 0)
    family = DDPM(ddpm(num_class_embeds=3))
    features = family.encode_captions(["2", "", " 1 "])
    assert features["class_labels"].tolist() == [2, 0, 1]
    noisy = normal(1, 3, 8, 8).expand(3, -1, -1, -1)
    with torch.no_grad():
        said = family.predict(noisy, torch.tensor([5, 5, 5]), features)
        assert torch.equal(said, family.parts.unet(noisy, torch.tensor(5), torch.tensor([2, 0, 1])).sample)
    assert max_error(said[0], said[1]) > 1e-3
    for wrong in ("3", "a star"):
        with pytest.raises(ValueError, match=rf"class numbers from 0 to 2; got '{wrong}'"):
            family.encode_captions([wrong])


# Noise


def test_noise_and_targets_are_the_closed_forms(family: Family) -> None:
    latents, noise = normal(5, 4, 8, 8), normal(5, 4, 8, 8, seed=1)
    if family.noise.has_integer_timesteps:
        t = MIXED_T
        kept = family.parts.scheduler.alphas_cumprod.double()[t]
        signal, spread, target = kept.sqrt(), (1 - kept).sqrt(), noise
        assert family.noise.density == UniformDensity(1000)
    else:
        t = torch.tensor([0, 0.25, 412.5, 999, 1000])
        signal, spread, target = 1 - t.double() / 1000, t.double() / 1000, noise - latents
        assert isinstance(family.noise.density, LogitNormalDensity)
    assert family.noise.num_train_timesteps == 1000
    expected = signal.view(-1, 1, 1, 1) * latents + spread.view(-1, 1, 1, 1) * noise
    assert max_error(family.noise.add_noise(latents, noise, t).double(), expected) <= 1e-6
    assert max_error(family.noise.target(latents, noise, t), target) == 0


@pytest.mark.parametrize(
    ("pipeline", "shift"),
    [
        (lambda: stable_diffusion_3(), 3.0),
        (lambda: stable_diffusion_3(shift=1.5), 1.5),
        (lambda: flux(), math.exp(1.15)),  # of 1024 pixels, in 4096 tokens
        (lambda: flux(max_shift=1.5), math.exp(1.5)),
        (lambda: flux(max_shift=1.5, time_shift_type="linear"), 1.5),
        (lambda: flux(use_dynamic_shifting=False, shift=1.0), 1.0),
    ],
)
def test_training_draws_t_with_the_shift_of_the_scheduler(pipeline: Callable[[], Any], shift: float) -> None:
    made = pipeline()
    density = FAMILIES[type(made).__name__](made).noise.density
    assert (density.mean, density.std, density.num_train_timesteps) == (0, 1, 1000)
    assert density.shift == pytest.approx(shift, abs=1e-12)
    peer = diffusers.FlowMatchEulerDiscreteScheduler.from_config(made.scheduler.config)
    sigmas = np.linspace(1, 0.1, 10)
    options = {"mu": math.log(shift) if peer.config.time_shift_type == "exponential" else shift}
    peer.set_timesteps(sigmas=sigmas, **(options if peer.config.use_dynamic_shifting else {}))
    quantile = torch.special.ndtr(torch.logit(torch.from_numpy(sigmas)))
    assert max_error(density.icdf(quantile), peer.timesteps.double()) <= 1e-3


@pytest.mark.parametrize("name", FLOWS)
def test_a_scheduler_that_is_no_flow_is_refused(name: str) -> None:
    pipeline = PIPELINES[name]()
    pipeline.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(
        ValueError, match="somewhere: a DDIMScheduler is no scheduler of a flow model; allowed are Flow"
    ):
        CLASSES[name](pipeline, "somewhere")


def test_a_flow_is_refused_by_a_family_that_predicts_noise() -> None:
    pipeline = pixart()
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="prediction_type is 'flow_prediction'; allowed are epsilon, v_prediction"):
        PixArt(pipeline)


# Predictions


class Calls(list[tuple[Tensor, Tensor, Tensor]]):
    """Every call of a denoiser: noisy latents, t, output; unpacked, and without a learned variance."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        self.handle = family.denoiser.register_forward_hook(self.note, with_kwargs=True)

    def note(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
        noisy, said = next(iter(given.values())), output[0]
        if isinstance(self.family, Flux):
            noisy, said = (diffusers.FluxPipeline._unpack_latents(x, 16, 16, 2) for x in (noisy, said))
        t = timestep_input_of(denoiser).t_of(given["timestep"].reshape(-1).expand(len(noisy)))
        self.append((noisy.clone(), t.clone(), said[:, : noisy.shape[1]].clone()))

    def stop(self) -> None:
        self.handle.remove()


@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_are_those_that_the_pipeline_asks_for(variant: str) -> None:
    family = make_family(variant)
    calls = Calls(family)
    draw(family.pipeline(), guidance_scale=1.0)
    calls.stop()
    assert len(calls) >= 4
    features = family.encode_captions(PROMPTS)
    for noisy, t, said in calls:
        with torch.no_grad():
            assert max_error(family.predict(noisy, t, features), said) <= 1e-6
        assert said.std() > 0.05


@pytest.mark.parametrize("variant", ["pixart of 1024 pixels", "sdxl", "flux"])
def test_what_else_the_pipeline_tells_the_denoiser_matters(variant: str) -> None:
    """A size that the latents do not have, or another guidance, changes the prediction: they are not ignored."""
    family = make_family(variant)
    noisy, features = inputs_of(family, 2)
    with torch.no_grad():
        said = family.predict(noisy, torch.tensor([3, 700]), features)
        if isinstance(family, Flux):
            family.guidance = 3.5
        else:
            family.parts.vae_scale_factor = 64
        assert max_error(family.predict(noisy, torch.tensor([3, 700]), features), said) > 1e-3


@pytest.mark.parametrize("shape", [(8, 8), (4, 8), (8, 6)])
def test_a_batch_of_mixed_timesteps_is_its_samples(shape: tuple[int, int], name: str, family: Family) -> None:
    equip(name, family)
    _, features = inputs_of(family)
    noisy = normal(len(MIXED_T), 3 if name == "ddpm" else 4, *shape)
    with torch.no_grad():
        batch = family.predict(noisy, MIXED_T, features)
        assert batch.shape == noisy.shape
        for row in range(len(MIXED_T)):
            one = slice(row, row + 1)
            alone = family.predict(noisy[one], MIXED_T[one], {key: value[one] for key, value in features.items()})
            assert max_error(batch[one], alone) <= 1e-5
        assert max_error(batch, family.predict(noisy, MIXED_T.flip(0), features)) > 1e-3


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # FLUX's norms keep fp32
def test_bf16_under_autocast_stays_close(name: str, family: Family) -> None:
    equip(name, family)
    noisy, features = inputs_of(family)
    with torch.no_grad():
        exact = family.predict(noisy, MIXED_T, features)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = family.predict(noisy, MIXED_T, features)
    assert 0 < (rounded.float() - exact).norm() <= 0.03 * exact.norm()


# Experts


def test_silent_experts_change_no_bit_of_a_picture(name: str) -> None:
    pipeline = PIPELINES[name]()
    without = draw(pipeline)
    assert without.std() > 0.05
    mixture = attach(pipeline, make_bundle(name, speaking=False))
    for mode in ("off", "switch", "route"):
        mixture.mode = mode
        assert np.array_equal(draw(pipeline), without), mode


def test_random_experts_change_every_picture(name: str) -> None:
    pipeline = PIPELINES[name]()
    drawn = {"none": draw(pipeline)}
    mixture = attach(pipeline, make_bundle(name))
    for mode in ("switch", "route"):
        mixture.mode = mode
        drawn[mode] = draw(pipeline)
    for one, other in (("none", "switch"), ("none", "route"), ("switch", "route")):
        assert all(abs(a - b).max() > 1e-3 for a, b in zip(drawn[one], drawn[other], strict=True)), (one, other)
    detach(pipeline)
    assert np.array_equal(draw(pipeline), drawn["none"])


def test_a_saved_bundle_draws_the_same_picture(name: str, family: Family, tmp_path: Path) -> None:
    bundle = make_bundle(name)
    mixture = equip(name, family)
    drawn = draw(family.pipeline())
    assert all(torch.equal(value, bundle.tensors[key]) for key, value in mixture.state_dict().items())
    save_bundle(bundle, tmp_path / "bundle")
    fresh = make_family(name).pipeline()  # frozen as well: weights that need gradients go through other kernels
    attach(fresh, load_bundle(tmp_path / "bundle"))
    assert np.array_equal(draw(fresh), drawn)


@pytest.mark.parametrize("mode", ["switch", "route"])
def test_each_step_calls_the_expert_that_owns_its_timestep(mode: str, name: str) -> None:
    pipeline = PIPELINES[name]()
    mixture = attach(pipeline, make_bundle(name), mode)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(*_: object) -> None:
        seen.append(
            (
                mixture.state.step.t.clone(),
                mixture.state.step.expert_index["n4"].expand_as(mixture.state.step.t).clone(),
            )
        )

    next(iter(mixture.layers.values())).base_layer.register_forward_hook(note)
    draw(pipeline, num_inference_steps=8)
    timesteps = pipeline.scheduler.timesteps
    assert len(seen) == len(timesteps)
    partition = Partition.uniform(4)
    for (t, owners), expected in zip(seen, timesteps.tolist(), strict=True):
        assert max_error(t, torch.full_like(t, expected)) <= 1e-3
        assert owners.tolist() == [partition.index_of(expected)] * len(t)
    assert {owners[0].item() for _, owners in seen} == {0, 1, 2, 3}
    if name in FLOWS:
        t, owners = seen[0]
        assert set(t.tolist()) == {1000}
        assert set(owners.tolist()) == {3}


@pytest.mark.parametrize(("name", "other"), list(itertools.permutations(PIPELINES, 2)))
def test_a_bundle_of_another_family_is_refused(other: str, name: str) -> None:
    pipeline = PIPELINES[name]()
    bundle = make_bundle(other)
    with pytest.raises(ValueError, match=r"(lacks \d+ of its \d+ modules|do not fit the model):\n  ") as refusal:
        attach(pipeline, bundle)
    listed = str(refusal.value).split("\n  ")[1:]
    assert listed
    assert all(line.removeprefix("missing: ").startswith(bundle.target_modules) for line in listed)
    with pytest.raises(ValueError, match="carries no mixture"):
        detach(pipeline)


# Training


def test_fostering_lowers_the_loss(name: str, family: Family) -> None:
    noise = family.noise
    mixture = Mixture.attach(family.denoiser, SPEC, TARGETS[name])
    mixture.foster("n4")
    latents, features = inputs_of(family, 4)
    t, drawn = torch.tensor([100, 300, 600, 900]), normal(*latents.shape, seed=1)
    experts = [p for stack in mixture.stacks("n4") for p in (stack.A, stack.B)]
    optimiser = torch.optim.AdamW(experts, lr=1e-2)
    losses = []
    for _ in range(50):
        said = family.predict(noise.add_noise(latents, drawn, t), t, features)
        each = squared_error(said, noise.target(latents, drawn, t))
        optimiser.zero_grad()
        each.sum().backward()
        optimiser.step()
        losses.append(each.detach())
    assert (losses[-1] < 0.9 * losses[0]).all(), (losses[0], losses[-1])
    assert {id(p) for p in mixture.parameters() if p.grad is not None} == {id(p) for p in experts}
    assert not any(p.grad is not None for p in family.denoiser.parameters())


def test_gradient_checkpointing_changes_no_gradient(name: str, family: Family) -> None:
    denoiser: Any = family.denoiser
    if not denoiser._supports_gradient_checkpointing:
        pytest.skip(f"{type(denoiser).__name__} supports no gradient checkpointing")
    mixture = equip(name, family)
    noisy, features = inputs_of(family)

    def gradients() -> list[Tensor]:
        said = family.predict(noisy, MIXED_T, features)
        family.predict(noisy, MIXED_T.flip(0), features)  # recomputation must not see these timesteps
        parameters = [p for stack in mixture.stacks("n4") for p in (stack.A, stack.B)]
        return list(torch.autograd.grad(said.square().sum(), parameters))

    plain = gradients()
    denoiser.enable_gradient_checkpointing()
    checkpointed = gradients()
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in denoiser.modules())
    assert any("Checkpoint" in type(function).__name__ for function in functions)
    for one, other in zip(plain, checkpointed, strict=True):
        assert max_error(one, other) <= 1e-5 * max(1, one.abs().max().item())
    assert all(gradient.abs().max() > 0 for gradient in plain)


# Loading


def test_the_fingerprint_follows_the_encoders(family: Family) -> None:
    before = family.encoder_fingerprint()
    with torch.no_grad():
        next(family.denoiser.parameters()).add_(1)
    assert family.encoder_fingerprint() == before
    names = [*family.text_encoder_names, *([family.autoencoder_name] if family.autoencoder_name else [])]
    for part in names:
        weight = list(getattr(family.parts, part).parameters())[-1]
        kept = weight.clone()
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
        assert family.encoder_fingerprint() != before, part
        weight.data.copy_(kept)
    assert family.encoder_fingerprint() == before


def test_the_fingerprint_follows_the_tokenizers() -> None:
    family = PixArt(pixart())
    before = family.encoder_fingerprint()
    family.parts.tokenizer.add_tokens(["nebula"])
    assert family.encoder_fingerprint() != before


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_pipeline_is_loaded_by_its_family(variant: str, tmp_path: Path) -> None:
    saved = VARIANTS[variant]()
    saved.save_pretrained(tmp_path)
    family = load_family(str(tmp_path), CPU)
    assert type(family) is CLASSES[variant]
    assert type(family.pipeline()) is type(saved)
    assert family.source == str(tmp_path)
    assert not any(p.requires_grad for p in family.denoiser.parameters())
    peer = CLASSES[variant](saved)
    assert family.text_encoders.keys() == peer.text_encoders.keys()
    assert family.encoder_fingerprint() == peer.encoder_fingerprint()
    assert abs(draw(family.pipeline()) - draw(saved)).max() <= 1e-5  # loaded weights lie elsewhere in memory


def test_a_ddim_folder_is_of_the_family_of_ddpm(tmp_path: Path) -> None:
    parts = ddpm()
    diffusers.DDIMPipeline(unet=parts.unet, scheduler=diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    family = load_family(str(tmp_path), CPU, torch.bfloat16)
    assert type(family) is DDPM
    assert family.parts.unet.dtype == torch.bfloat16


def test_a_single_file_is_a_stable_diffusion(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"cannot load a StableDiffusionPipeline from '.*model\.safetensors': "):
        load_family(str(tmp_path / "model.safetensors"), CPU)


def test_an_unknown_pipeline_is_refused_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"from '{tmp_path}': .* names 'DiTPipeline'; supported are .*FluxPipeline"):
        load_family(str(tmp_path), CPU)


@pytest.mark.parametrize("content", [None, "no json", "[]"])
def test_a_folder_without_an_index_is_refused_with_what_there_is(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model_index.json").write_text(content, encoding="utf-8")
    supported = "supported are .*StableDiffusion3Pipeline"
    with pytest.raises(ValueError, match=rf"from '{tmp_path}': it has no readable model_index\.json; {supported}"):
        load_family(str(tmp_path), CPU)


def test_sizes_are_those_of_the_pipelines() -> None:
    sizes = {name: make_family(name).default_size for name in VARIANTS}
    assert sizes.pop("pixart of 1024 pixels") == (256, 256)
    assert sizes.pop("flux") == sizes.pop("flux without guidance") == (256, 256)
    assert sizes.pop("ddpm") == (8, 8)
    assert set(sizes.values()) == {(16, 16)}


# Compilation


class Predictor(nn.Module):
    """The denoiser as a family calls it."""

    def __init__(self, family: Family, features: dict[str, Tensor]) -> None:
        super().__init__()
        self.denoiser = family.denoiser
        self.predict, self.features = family.predict, features

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        return self.predict(noisy, t, self.features)


@pytest.mark.slow
def test_a_compiled_denoiser_is_not_recompiled_as_t_changes(name: str, family: Family) -> None:
    equip(name, family)
    noisy, features = inputs_of(family, 2)
    predictor = Predictor(family, features)
    torch._dynamo.reset()
    compiled = torch.compile(predictor, backend="eager")
    with torch.no_grad():
        for t in (3, 990):
            compiled(noisy, torch.tensor([t, 999 - t]))
        graphs = counters["stats"]["unique_graphs"]
        assert graphs > 0
        for t in (130, 400, 612, 999, 0):
            pair = torch.tensor([t, 999 - t])
            assert max_error(compiled(noisy, pair), predictor(noisy, pair)) <= 1e-6
    assert counters["stats"]["unique_graphs"] == graphs
