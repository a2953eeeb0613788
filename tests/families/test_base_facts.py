"""Facts that a base's own pipeline obeys are read from its configuration, or the base is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from tiny import flow_scheduler, flux, pixart, stable_diffusion, stable_diffusion_xl
from torch import Tensor, nn

from conftest import max_error, normal, randomise
from timestep_experts.errors import UserError
from timestep_experts.formats import Bundle
from timestep_experts.inference import attach
from timestep_experts.inference.sample import choose_scheduler
from timestep_experts.intervals import Partition, is_flow
from timestep_experts.jobs.explain import load_scheduler
from timestep_experts.mixture import Mixture, MixtureSpec, Scale, TimestepInput, asymmetric, timestep_input_of
from timestep_experts.models import StableDiffusion, StableDiffusionXL
from timestep_experts.models.noise import flow_shift

SPEC = MixtureSpec((Scale("n4", Partition.uniform(4), rank=2, alpha=2.0),))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# Noise schedules


@pytest.mark.parametrize("name", ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"])
def test_a_base_with_edm_noise_is_refused(name: str) -> None:
    pipeline = stable_diffusion_xl()
    pipeline.scheduler = getattr(diffusers, name)()
    with pytest.raises(UserError, match=f"a {name} does not add noise as DDPM does"):
        StableDiffusionXL(pipeline)


def test_a_base_whose_scheduler_has_another_schedule_than_its_betas_say_is_refused() -> None:
    pipeline = stable_diffusion()
    pipeline.scheduler = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0, prediction_type="epsilon")
    with pytest.raises(UserError, match="does not add noise as DDPM does"):
        StableDiffusion(pipeline)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_any_sampler_of_the_base_tells_its_noise(name: str) -> None:
    pipeline = stable_diffusion()
    pipeline.scheduler = getattr(diffusers, name)(**BETAS)
    noise = StableDiffusion(pipeline).noise
    betas = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000).double().square()
    kept = (1 - betas).cumprod(0)
    t = torch.tensor([0, 500, 999])
    assert torch.allclose(noise.snr(t), kept[t] / (1 - kept[t]), rtol=1e-4)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(
    "name",
    [n for n in dir(diffusers) if n.endswith("Scheduler") and n not in ("DPMSolverSDEScheduler",)],
)
def test_a_sampler_has_the_noise_of_the_base_or_is_refused(name: str, rescaled: bool) -> None:
    own = diffusers.DDIMScheduler(
        **BETAS,
        prediction_type="v_prediction" if rescaled else "epsilon",
        rescale_betas_zero_snr=rescaled,
        timestep_spacing="trailing",
    )
    try:
        chosen = choose_scheduler(name, own)
    except UserError:
        assert name not in ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler")
        return
    assert torch.allclose(chosen.alphas_cumprod, own.alphas_cumprod, atol=1e-5)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_multistep_samplers_of_a_flow_base_are_told_of_the_flow_and_its_shift(name: str) -> None:
    chosen = choose_scheduler(name, flow_scheduler(shift=3.0))
    assert is_flow(chosen)
    assert chosen.config.prediction_type == "flow_prediction"
    assert flow_shift(chosen) == 3
    back = choose_scheduler("FlowMatchEulerDiscreteScheduler", chosen)
    assert back.config.shift == 3


def test_an_option_that_a_sampler_does_not_read_makes_it_no_flow_sampler() -> None:
    own = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    with pytest.raises(UserError, match="flow-matching ones"):
        choose_scheduler("EulerDiscreteScheduler", own)


def test_flow_through_a_multistep_sampler_is_explained_as_flow(tmp_path: Any) -> None:
    own = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    own.save_pretrained(tmp_path / "scheduler")
    loaded = load_scheduler(str(tmp_path), None)
    assert is_flow(loaded)
    assert flow_shift(loaded) == 3
    with pytest.raises(UserError, match="has its own"):
        load_scheduler(str(tmp_path), 5.0)
    assert flow_shift(load_scheduler("DPMSolverMultistepScheduler", 5.0)) == 5
    with pytest.raises(UserError, match="--shift is of flow schedulers"):
        load_scheduler("EulerDiscreteScheduler", 5.0)


# Latents and text


def test_statistics_of_latents_are_undone_as_the_pipeline_applies_them() -> None:
    pipeline = stable_diffusion_xl()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = pipeline.vae.encode(pixels).latent_dist.mean.detach()
    pipeline.vae.register_to_config(latents_mean=[-1.6, 1.1, 0.3, 0.2], latents_std=[8.4, 5.9, 9.3, 5.2])
    latents = StableDiffusionXL(pipeline).encode_pixels(pixels)
    config = pipeline.vae.config
    channels = (1, 4, 1, 1)  # what follows is the pipeline's own line before it decodes
    std, centre = torch.tensor(config.latents_std).view(channels), torch.tensor(config.latents_mean).view(channels)
    assert torch.allclose(latents * std / config.scaling_factor + centre, mean, atol=1e-5)


def test_an_autoencoder_that_overflows_in_half_precision_encodes_in_single() -> None:
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipeline = stable_diffusion_xl()
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.vae.half()
    weights = {name: value.clone() for name, value in pipeline.vae.state_dict().items()}
    with torch.no_grad():
        expected = pipeline.vae.float().encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    pipeline.vae.half()
    latents = StableDiffusionXL(pipeline).encode_pixels(pixels)
    assert torch.equal(latents, expected)
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.vae.state_dict().items())


@pytest.mark.parametrize("forces_zeros", [True, False])
def test_a_dropped_caption_is_what_the_pipeline_takes_for_no_prompt(forces_zeros: bool) -> None:
    pipeline = stable_diffusion_xl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=forces_zeros)
    family = StableDiffusionXL(pipeline)
    with torch.no_grad():
        wanted, none, pooled, none_pooled = pipeline.encode_prompt("a red star", do_classifier_free_guidance=True)
    features = family.encode_captions(["a red star", family.no_caption])
    assert torch.allclose(features["encoder_hidden_states"], torch.cat([wanted, none]), atol=1e-5)
    assert torch.allclose(features["text_embeds"], torch.cat([pooled, none_pooled]), atol=1e-5)
    assert bool(none.any()) != forces_zeros


def test_what_stands_for_no_caption_decides_the_cache() -> None:
    pipeline = stable_diffusion_xl()
    prints = []
    for forces_zeros in (True, False):
        pipeline.register_to_config(force_zeros_for_empty_prompt=forces_zeros)
        prints.append(StableDiffusionXL(pipeline).encoder_fingerprint())
    assert prints[0] != prints[1]


# How denoisers are told the timestep


class Told(nn.Module):
    """A denoiser of one layer that is called with anything."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.to_q(x) + 0 * timestep.reshape(-1, *(1,) * (x.dim() - 1))  # type: ignore[no-any-return]


def called_with(values: Callable[[Tensor], Tensor], **options: Any) -> list[float]:
    denoiser = Told()
    mixture = Mixture.attach(denoiser, SPEC, ["to_q"], **options)
    mixture.mode = "switch"
    seen = []
    for t in torch.linspace(1000, 1, 6):
        denoiser(torch.ones(2, 4), values(t))
        assert mixture.timesteps is not None
        seen.append(mixture.timesteps[0].item())
    return seen


@pytest.mark.parametrize("values", [lambda t: t / 1000, lambda t: 1 - t / 1000], ids=["noise", "signal"])
def test_shares_instead_of_timesteps_are_refused_unless_they_are_announced(values: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UserError, match="called with shares of noise or signal"):
        called_with(values)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (lambda t: t, TimestepInput()),
        (lambda t: t / 1000, TimestepInput(scale=1000)),
        (lambda t: 1 - t / 1000, TimestepInput(scale=-1000, offset=1000)),
        (lambda t: 1000 - t, TimestepInput(scale=-1, offset=1000)),
    ],
    ids=["t", "noise", "signal", "backwards"],
)
def test_announced_timesteps_are_read(values: Callable[[Tensor], Tensor], told: TimestepInput) -> None:
    expected = torch.linspace(1000, 1, 6)
    assert torch.allclose(torch.tensor(called_with(values, timestep=told)), expected, atol=1e-2)
    assert torch.allclose(told.t_of(told.value_of(expected)), expected, atol=1e-3)


def test_small_timesteps_at_the_end_of_a_run_are_timesteps() -> None:
    denoiser = Told()
    Mixture.attach(denoiser, SPEC, ["to_q"]).mode = "switch"
    for t in (900.0, 0.5, 0.25, 0.0, 0.1):
        denoiser(torch.ones(2, 4), torch.tensor([t]))


@pytest.mark.parametrize("told", [TimestepInput(scale=-1000, offset=1000), TimestepInput(scale=1000)])
def test_announced_shares_may_mean_small_timesteps(told: TimestepInput) -> None:
    denoiser = Told()
    mixture = Mixture.attach(denoiser, SPEC, ["to_q"], timestep=told)
    mixture.mode = "switch"
    for t in (0.5, 0.25, 0.75):
        denoiser(torch.ones(2, 4), torch.tensor([told.value_of(t)], dtype=torch.double))
        assert mixture.timesteps is not None
        assert mixture.timesteps[0].item() == pytest.approx(t, abs=1e-3)


def test_flux_is_called_as_its_pipeline_calls_it() -> None:
    pipeline = flux()
    given: list[float] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: given.append(kwargs["timestep"][0].item()), with_kwargs=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a red star", height=16, width=16, num_inference_steps=3, output_type="latent")
    told = timestep_input_of(pipeline.transformer)
    assert [told.t_of(value) for value in given] == pytest.approx(pipeline.scheduler.timesteps.tolist(), rel=1e-5)


def test_sana_tells_its_scale_in_its_configuration() -> None:
    with torch.device("meta"):
        denoiser = diffusers.SanaTransformer2DModel(num_layers=1, timestep_scale=0.001)
    assert timestep_input_of(denoiser) == TimestepInput(scale=1000)


def test_every_class_with_an_own_way_is_one_of_diffusers() -> None:
    from timestep_experts.mixture.timesteps import _BY_CLASS

    assert [name for name in _BY_CLASS if not hasattr(diffusers, name)] == []


# Padding


class Masked(nn.Module):
    """A text encoder of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.q_proj(tokens)  # type: ignore[no-any-return]


ROUTED = MixtureSpec(asymmetric([Scale("n4", Partition.uniform(4), 2, 2.0), Scale("n1", Partition.uniform(1), 2, 2.0)]))


@pytest.mark.parametrize("by_name", [True, False])
def test_gates_of_a_text_encoder_do_not_see_padding(by_name: bool) -> None:
    encoder = Masked()
    mixture = randomise(Mixture.attach(encoder, ROUTED, ["q_proj"]))
    mixture.mode = "route"
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    tokens = normal(2, 5, 4)
    other = torch.where(mask[..., None] == 1, tokens, 100.0)

    def call(tokens: Tensor, mask: Tensor | None) -> Tensor:
        with mixture.at(torch.tensor([600.0])), torch.no_grad():
            return encoder(tokens, attention_mask=mask) if by_name else encoder(tokens, mask)

    with mixture.recorded_gates() as log:
        first, second = call(tokens, mask), call(other, mask)
    router = mixture.layers["q_proj"].router
    assert router is not None
    assert router.F is not None
    assert router.bias is not None
    assert router.E is not None
    own = torch.stack([tokens[0, :3].mean(0), tokens[1, :2].mean(0)])
    expected = own @ router.F.T + router.bias + router.E[600]
    assert torch.allclose(log["q_proj"][0], expected, atol=1e-6)
    assert torch.allclose(log["q_proj"][1], expected, atol=1e-6)
    assert torch.allclose(first[mask == 1], second[mask == 1], atol=1e-5)
    assert max_error(call(tokens, None), first) > 1e-4


@pytest.mark.parametrize("kind", [diffusers.PixArtAlphaPipeline, diffusers.PixArtSigmaPipeline])
def test_gates_of_cross_attention_do_not_see_padding(kind: type[Any]) -> None:
    denoiser = pixart(kind=kind).transformer
    targets = ["attn2.to_k", "attn2.to_v", "attn1.to_q", "caption_projection.linear_1"]
    mixture = randomise(Mixture.attach(denoiser, ROUTED, targets))
    mixture.mode = "route"
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    text = normal(2, 6, 16)

    @torch.no_grad()
    def call(text: Tensor) -> Tensor:
        added = {"resolution": None, "aspect_ratio": None}
        given = {"added_cond_kwargs": added, "encoder_attention_mask": mask}
        return denoiser(normal(2, 4, 8, 8), text, timestep=torch.tensor([600, 10]), **given).sample

    garbage = torch.where(mask[..., None] == 1, text, 10 * normal(2, 6, 16, seed=1))
    assert max_error(call(garbage), call(text)) <= 1e-5
    assert max_error(call(text.flip(1)), call(text)) > 1e-3


# A specification that trains nothing


def routed_loss(mixture: Mixture, denoiser: Told) -> Tensor:
    mixture.mode = "route"
    return denoiser(torch.ones(2, 4), torch.tensor([300.0, 900.0])).square().mean()


def test_a_context_that_cannot_learn_is_named_at_the_first_backward() -> None:
    denoiser = Told()
    mixture = Mixture.attach(denoiser, ROUTED, ["to_q"])
    loss = routed_loss(mixture, denoiser)
    with pytest.warns(UserWarning, match=r"context 'n1' cannot learn.*mixture.foster\('n1'\)"):
        loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routed_loss(mixture, denoiser).backward()  # it is said once


@pytest.mark.parametrize("remedy", ["fostered", "base gate", "frozen"])
def test_a_context_that_can_learn_is_not_named(remedy: str) -> None:
    denoiser = Told()
    gate = 1.0 if remedy == "base gate" else 0.0
    spec = replace(ROUTED, scales=tuple(replace(s, base_gate=gate) if s.gated else s for s in ROUTED.scales))
    mixture = Mixture.attach(denoiser, spec, ["to_q"])
    mixture.layers["to_q"].experts["n4"].B.data.fill_(0.1)  # type: ignore[union-attr]
    if remedy == "fostered":
        mixture.foster("n1")
        optimiser = torch.optim.SGD(mixture.parameters(), lr=0.1)
        denoiser(torch.ones(2, 4), torch.tensor([300.0, 900.0])).square().mean().backward()
        optimiser.step()
    if remedy == "frozen":
        for layer in mixture.layers.values():
            layer.experts.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routed_loss(mixture, denoiser).backward()


# Names


def test_layers_of_clip_have_the_names_of_lora_files() -> None:
    pipeline = stable_diffusion_xl()
    for name in ("text_encoder", "text_encoder_2"):
        mixture = Mixture.attach(getattr(pipeline, name), SPEC, ["q_proj"])
        assert all(layer.startswith("text_model.encoder.layers.") for layer in mixture.layers)
        mixture.detach()


@pytest.mark.parametrize("prefix", ["text_encoder.", "text_encoder.text_model."])
def test_a_bundle_fits_whatever_transformers_calls_the_layers(prefix: str) -> None:
    pipeline = stable_diffusion()
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    mixture = randomise(Mixture.attach(networks, SPEC, {"unet": ["to_q"], "text_encoder": ["q_proj"]}))
    tensors = {name: value.clone() for name, value in mixture.state_dict().items()}
    paths = tuple(mixture.layers)
    mixture.detach()

    def renamed(name: str) -> str:
        return name.replace("text_encoder.text_model.", prefix)

    bundle = Bundle(
        SPEC, tuple(map(renamed, paths)), {renamed(n): v for n, v in tensors.items()}, "switch", "a base", "a UNet", {}
    )
    attached = attach(pipeline, bundle)
    assert {name: value.tolist() for name, value in attached.state_dict().items()} == {
        name: value.tolist() for name, value in tensors.items()
    }
