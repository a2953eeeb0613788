"""What distillation must hold, whatever it learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PIPELINES
from torch import nn

from conftest import max_error, normal, random_pictures, scales, tiny_pipeline, zero_routers
from timestep_experts.inference import SampleSettings
from timestep_experts.inference.sample import choose_scheduler
from timestep_experts.intervals import Partition
from timestep_experts.mixture import Mixture, MixtureSpec, Scale
from timestep_experts.models import StableDiffusion, StableDiffusionXL
from timestep_experts.models.registry import FAMILIES
from timestep_experts.objectives import (
    clean_from_noise,
    discriminator_loss,
    generator_adversarial_loss,
    guided,
    matching_gradient,
    matching_loss,
)
from timestep_experts.training import AssembleSettings, LoopSettings, OptimiserSettings, RouterRates
from timestep_experts.training.discriminator import DiscriminatorHead, middle_features, middle_shape
from timestep_experts.training.distill import (
    DistillSettings,
    DistillStage,
    PhaseSettings,
    distill,
    distill_router,
)
from timestep_experts.training.generator import SAMPLER, Generator, alphas_at
from timestep_experts.training.loop import Observer, run_stage
from timestep_experts.training.matching import Adversary, Distilling

TARGETS = ("to_q", "to_v", "conv1")
TIMESTEPS = (999, 749, 499, 249)
ADAMW = OptimiserSettings("AdamW", {"weight_decay": 0.01}, max_grad_norm=10.0)


def phase(steps: int, adversary: Adversary | None = None, batch: int = 2, rate: float = 1e-2) -> PhaseSettings:
    numbers = {"n1": 1, "n2": 2, "n4": 4}
    budgets, rates = ({name: [value] * n for name, n in numbers.items()} for value in (steps, rate))
    return PhaseSettings(budgets, rates, rate, batch, adversary)


def settings(steps: int = 2, gan_steps: int = 0, **changes: Any) -> DistillSettings:
    phases = {"": phase(steps)} | ({"-gan": phase(gan_steps, Adversary(0.5, 0.5))} if gan_steps else {})
    own: dict[str, Any] = {"inputs": "backsim", "guidance_scale": 1.75, "generator_interval": 1, **changes}
    return DistillSettings(
        **{"timesteps": TIMESTEPS, "phases": phases, "caption_dropout": 0.25, "latent_size": (8, 8), "seed": 5, **own}
    )


def attach(family: Any, *counts: int, **options: Any) -> Mixture:
    networks = {family.denoiser_name: family.denoiser}
    spec = MixtureSpec(scales(*counts, rank=2, alpha=2), **options)
    return Mixture.attach(networks, spec, TARGETS, seed=3)


@pytest.fixture
def mixture(family: StableDiffusion) -> Iterator[Mixture]:
    attached = attach(family, 4, 1)
    yield attached
    attached.detach()


def shake(mixture: Mixture, seed: int = 0) -> None:
    """Experts that say something, and not too loudly: B is zero otherwise."""
    with torch.no_grad():
        for index, value in enumerate(mixture.state_dict().values()):
            value.add_(0.05 * normal(*value.shape, seed=seed + index))


def run(made: DistillStage, family: Any, folder: Path, observe: Observer | None = None, **loop: Any) -> None:
    options = LoopSettings(**{"optimiser": ADAMW, "logging_steps": 1, **loop})
    run_stage(made, random_pictures(6, family), options, folder, {"run": "law"}, observe)


def experts(mixture: Mixture) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in mixture.state_dict().items()}


def backward(made: DistillStage, family: Any, step: int = 0) -> torch.Tensor:
    """The gradients of one step, left on the parameters, which require them by hand."""
    for module in made.trainee.trained_modules():
        module.requires_grad_(False)
    for parameter in made.stage.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    pictures = random_pictures(6, family)
    made.stage.set_mode()
    return made.stage.objective.backward(step, family, pictures, made.stage.plan.draw(pictures, family, step), "no")


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


# Formulas


def test_x0_undoes_noise(family: StableDiffusion) -> None:
    clean, noise, t = normal(5, 4, 8, 8), normal(5, 4, 8, 8, seed=1), torch.tensor([0, 20, 249, 980, 999])
    noisy = family.noise.add_noise(clean, noise, t)
    # fp32 noisy latents are wrong by 1e-7, and divided by sqrt(a_999) = .068
    assert max_error(clean_from_noise(noisy, noise, alphas_at(family, t)), clean) < 1e-5


def test_x0_is_computed_in_fp64() -> None:
    alpha = torch.tensor([0.0047], dtype=torch.double)
    clean, noise = normal(1, 64, dtype=torch.double), normal(1, 64, seed=1, dtype=torch.double)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    assert max_error(clean_from_noise(noisy, noise, alpha), clean.float()) == 0


def test_guidance_of_scale_1_is_the_conditional_prediction() -> None:
    conditional, empty = normal(2, 4), normal(2, 4, seed=1)
    assert guided(conditional, empty, 1) is conditional
    assert max_error(guided(conditional, empty, 1.75), empty + 1.75 * (conditional - empty)) < 1e-6


def test_the_matching_gradient_is_scaled_per_sample() -> None:
    clean, fake, real = (normal(3, 4, 2, 2, seed=seed) for seed in range(3))
    gradient = matching_gradient(clean, fake, real)
    for index in range(3):
        expected = (fake[index] - real[index]) / (clean[index] - real[index]).abs().mean()
        assert max_error(gradient[index], expected) < 1e-6
    assert max_error(matching_gradient(10 * clean, 10 * fake, 10 * real), gradient) < 1e-5


def test_where_x_is_real_to_the_bit_there_is_no_gradient() -> None:
    clean, fake = normal(2, 4), normal(2, 4, seed=1)
    assert matching_gradient(clean, clean, clean).abs().max() == 0
    assert matching_gradient(clean, fake, clean).abs().max() == 0


def test_the_surrogate_gives_the_gradient_over_the_elements() -> None:
    clean, gradient = normal(3, 4, 2, 2).requires_grad_(), normal(3, 4, 2, 2, seed=1)
    losses = matching_loss(clean, gradient)
    assert max_error(losses.detach(), 0.5 * gradient.square().flatten(1).mean(1)) < 1e-6
    (found,) = torch.autograd.grad(losses.mean(), clean)
    assert max_error(found, gradient / gradient.numel()) < 1e-7


def test_adversarial_losses_are_those_of_a_logistic_game() -> None:
    logits, real = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([1.0, 0.0, -1.0])
    doubt = -torch.log(torch.sigmoid(-logits)) - torch.log(torch.sigmoid(real))
    assert max_error(discriminator_loss(logits, real), doubt) < 1e-6
    assert max_error(generator_adversarial_loss(logits), -torch.log(torch.sigmoid(logits))) < 1e-6


@pytest.mark.parametrize(("sign", "is_reached"), [(1, True), (-1, False)])
def test_distribution_matching_moves_a_gaussians_mean_to_the_real_one(sign: int, is_reached: bool) -> None:
    """Scores of normal distributions are known: of N(m, 1) made noisy, ``x0 = m + s (z - sqrt(a) m)``."""
    mean, real_mean = torch.tensor([-1.0, 0.5], requires_grad=True), torch.tensor([1.0, 2.0])
    optimiser = torch.optim.SGD([mean], lr=0.2)

    def denoised(noisy: torch.Tensor, alpha: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return mean + alpha.sqrt() * (noisy - alpha.sqrt() * mean)  # unit variance stays unit variance

    for step in range(300):
        clean = mean + normal(64, 2, seed=3 * step)
        alpha = torch.rand(64, 1, generator=torch.Generator().manual_seed(step)).clamp(0.05, 0.95)
        noisy = alpha.sqrt() * clean.detach() + (1 - alpha).sqrt() * normal(64, 2, seed=3 * step + 1)
        fake, real = (denoised(noisy, alpha, m.detach()) for m in (mean, real_mean))
        loss = matching_loss(clean, sign * matching_gradient(clean.detach(), fake, real)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # the normalised gradient keeps its size until the mean is there, as far as 64 samples know it
    assert (max_error(mean.detach(), real_mean) < 0.1) == is_reached


# Networks


def test_the_fake_score_is_the_base_to_the_bit(family: StableDiffusion, mixture: Mixture) -> None:
    shake(mixture)
    made = distill(mixture, family, settings())[0]
    fake = made.trainee.fake
    noisy, t, text = normal(2, 4, 8, 8), torch.tensor([7, 900]), normal(2, 8, 8, seed=1)
    said = fake(noisy, t, text).sample
    assert torch.equal(said, family.denoiser(noisy, t, text).sample)  # in mode off
    assert not any(module._forward_hooks for module in fake.modules())
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.add_(1.0)
    made.stage.prepare()
    assert torch.equal(said, fake(noisy, t, text).sample)
    mixture.mode = "switch"
    assert not torch.equal(said, family.denoiser(noisy, t, text).sample)


@pytest.mark.parametrize(
    ("channels", "side", "kinds"),
    [
        (1280, 8, [4, 4, 1]),  # Stable Diffusion 1.5: latents of 64, features of 8
        (64, 16, [4, 4, 4, 1]),
        (16, 4, [4, 1]),
        (6, 1, [1, 1]),
    ],
)
def test_the_head_halves_until_4_pixels_and_then_sees_all(channels: int, side: int, kinds: list[int]) -> None:
    with torch.device("meta"):
        head = DiscriminatorHead(channels, side, side, seed=0)
        logits = head(torch.empty(3, channels, side, side))
    assert [layer.kernel_size[0] for layer in head if isinstance(layer, nn.Conv2d)] == kinds
    assert logits.shape == (3,)
    assert {layer.num_groups for layer in head if isinstance(layer, nn.GroupNorm)} == {
        {1280: 32, 64: 16}.get(channels, 4 if channels == 16 else 1)
    }


def test_the_middle_block_has_the_shape_that_the_head_expects(family: StableDiffusion) -> None:
    for side in (8, 6, 5):
        noisy, features = normal(2, 4, side, side), {"encoder_hidden_states": normal(2, 8, 8)}
        found = middle_features(family, noisy, torch.tensor([3, 4]), features)
        assert tuple(found.shape[1:]) == middle_shape(family.denoiser, side, side)
    assert not family.denoiser.mid_block._forward_hooks


def test_the_head_tells_features_apart() -> None:
    head = DiscriminatorHead(16, 8, 8, seed=0)
    features = normal(4, 16, 8, 8)
    assert head(features).std() > 1e-3
    assert torch.equal(head(features), DiscriminatorHead(16, 8, 8, seed=0)(features))


# Who learns from what


def test_losses_reach_only_those_they_are_for(family: StableDiffusion, mixture: Mixture) -> None:
    shake(mixture)
    _, made = distill(mixture, family, settings(gan_steps=2))[:2]
    own = [p for p, _ in made.stage.param_groups[0].slices]
    fake, head = made.trainee.fake, made.trainee.head
    assert head is not None
    objective = made.stage.objective
    assert isinstance(objective, Distilling)
    calls = []
    teach = objective._teach_generator

    def look(*arguments: Any) -> None:
        teach(*arguments)
        calls.append((len(gradients(fake)), len(gradients(head)), sum(p.grad is not None for p in own)))

    objective._teach_generator = look
    backward(made, family)
    assert calls == [(0, 0, len(own))]  # the generator's losses
    reached = {id(p): p.grad.clone() for p in own}
    assert gradients(fake)
    assert len(gradients(head)) == len(list(head.parameters()))
    objective._teach_generator = lambda *_: None
    backward(made, family)
    assert all(p.grad is None for p in own)  # the others
    assert all(gradient.abs().max() > 0 for key, gradient in reached.items() if gradient.dim() == 3)


def test_the_adversarial_pull_adds_to_the_generators_gradient(family: StableDiffusion, mixture: Mixture) -> None:
    shake(mixture)
    found = []
    for weight in (0.0, 1.0, 2.0):
        gan = {"": phase(2, Adversary(weight, 0.5))}
        made = distill(mixture, family, settings(phases=gan))[0]
        backward(made, family)
        found.append(torch.cat([p.grad.flatten() for p, _ in made.stage.param_groups[0].slices]))
    assert (found[1] - found[0]).norm() > 1e-3 * found[0].norm()
    assert max_error(found[2] - found[0], 2 * (found[1] - found[0])) < 1e-5  # linear in its weight


def test_equal_scores_leave_the_generators_bytes_alone(family: StableDiffusion, mixture: Mixture) -> None:
    """F is R without guidance, so nothing is to be learned."""
    shake(mixture)
    made = distill(mixture, family, settings(guidance_scale=1.0))[0]
    backward(made, family)
    assert all(p.grad.abs().max() == 0 for p, _ in made.stage.param_groups[0].slices)
    guided_one = distill(mixture, family, settings(guidance_scale=1.75))[0]
    backward(guided_one, family)
    assert any(p.grad.abs().max() > 0 for p, _ in guided_one.stage.param_groups[0].slices)


def test_micro_batches_add_up(family: StableDiffusion, mixture: Mixture) -> None:
    shake(mixture)
    made = distill(mixture, family, settings(gan_steps=1, phases={"": phase(1, Adversary(), batch=4)}))[0]
    pictures = random_pictures(6, family)
    batch = made.stage.plan.draw(pictures, family, 3)
    found = []
    for count in (1, 3):
        backward(made, family)  # asks for gradients
        for parameter in made.stage.parameters():
            parameter.grad = None
        losses = [made.stage.objective.backward(3, family, pictures, part, "no") for part in batch.chunks(count)]
        gathered = [p.grad.flatten() for p in made.stage.parameters() if p.grad is not None]
        found.append((torch.cat(losses), torch.cat(gathered)))
    assert max_error(found[0][0], found[1][0]) < 1e-5
    assert max_error(found[0][1], found[1][1]) < 1e-5


@pytest.mark.parametrize("kind", ["expert", "router"])
def test_checkpointing_and_autocast_leave_the_gradients(kind: str, mixture: Mixture, family: StableDiffusion) -> None:
    shake(mixture)
    own = settings(gan_steps=2, guidance_scale=1.0, phases={"": phase(2, Adversary(0.5, 0.5))})
    router = AssembleSettings(RouterRates(1e-2, 0.5), 2, 4, caption_dropout=0, seed=5)
    pictures, found = random_pictures(6, family), []
    for precision, is_checkpointed in (("no", False), ("no", True), ("bf16", False)):
        if is_checkpointed:
            family.checkpoint_gradients()
        else:
            family.denoiser.disable_gradient_checkpointing()
        made = distill_router(mixture, family, own, router) if kind == "router" else distill(mixture, family, own)[-1]
        backward(made, family)
        for parameter in made.stage.parameters():
            parameter.grad = None
        made.stage.objective.backward(0, family, pictures, made.stage.plan.draw(pictures, family, 0), precision)
        assert all(p.grad is not None for p, _ in made.stage.param_groups[0].slices)
        found.append(torch.cat([p.grad.flatten() for p, _ in made.stage.param_groups[-1].slices if p.grad is not None]))
    assert max_error(found[0], found[1]) < 1e-6
    assert (found[0] - found[2]).norm() < 0.1 * found[0].norm()


def test_the_generator_learns_every_tenth_step_only(family: StableDiffusion, mixture: Mixture, tmp_path: Path) -> None:
    made = distill(mixture, family, settings(steps=20, generator_interval=10))[0]
    shake(mixture)
    seen = [(experts(mixture), {k: v.clone() for k, v in made.trainee.fake.state_dict().items()})]

    def look(step: int, log: object) -> None:
        seen.append((experts(mixture), {k: v.clone() for k, v in made.trainee.fake.state_dict().items()}))

    run(made, family, tmp_path, look, validation_steps=1)
    changed = [
        any(not torch.equal(before[0][key], after[0][key]) for key in before[0]) for before, after in pairwise(seen)
    ]
    assert [step for step, is_changed in enumerate(changed, 1) if is_changed] == [10, 20]
    assert all(not torch.equal(a[1]["conv_in.weight"], b[1]["conv_in.weight"]) for a, b in pairwise(seen))


def test_an_experts_training_leaves_the_others_bytes_alone(
    family: StableDiffusion, mixture: Mixture, tmp_path: Path
) -> None:
    shake(mixture)
    base = {key: value.clone() for key, value in family.denoiser.state_dict().items() if "experts" not in key}
    before = experts(mixture)
    made = next(item for item in distill(mixture, family, settings(gan_steps=2)) if item.expert == "n4.2")
    made.stage.prepare()
    run(made, family, tmp_path)
    after = experts(mixture)
    for key, value in before.items():
        if ".n4." not in key:
            assert torch.equal(value, after[key]), key
            continue
        same = [torch.equal(value[index], after[key][index]) for index in range(4)]
        assert same == [True, True, False, True], key
    now = family.denoiser.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in base.items())


def test_routers_are_distilled_over_frozen_experts(family: StableDiffusion, mixture: Mixture, tmp_path: Path) -> None:
    shake(mixture)
    zero_routers(mixture)  # as they begin; a weight decays in rows that no sample hits, too
    before = experts(mixture)
    made = distill_router(
        mixture,
        family,
        settings(gan_steps=2),
        AssembleSettings(RouterRates(1e-2, 0.5), 2, 4, caption_dropout=0, seed=5),
    )
    run(made, family, tmp_path)
    after = experts(mixture)
    assert all(torch.equal(before[key], after[key]) for key in before if ".experts." in key)
    rows = torch.cat([(before[k] != after[k]).any(1).nonzero() for k in before if k.endswith("router.E")]).unique()
    assert set(rows.tolist()) <= set(TIMESTEPS)
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith("router.F"))


# Batches and inputs


def test_the_order_is_from_high_noise_to_low_and_cores_first(family: StableDiffusion, mixture: Mixture) -> None:
    made = distill(mixture, family, settings(gan_steps=1))
    assert [item.stage.name for item in made] == [
        f"distill-{expert}{ending}" for expert in ("n4.3", "n4.2", "n4.1", "n4.0", "n1.0") for ending in ("", "-gan")
    ]
    assert [item.stage.plan.batch_size for item in made] == [2] * 8 + [8] * 2  # one LoRA of all steps: four times


def test_random_numbers_are_functions_of_the_step(family: StableDiffusion, mixture: Mixture) -> None:
    pictures = random_pictures(6, family)
    made = distill(mixture, family, settings(gan_steps=1))
    plan = made[3].stage.plan  # n4.2, with a discriminator
    one, same, other = (plan.draw(pictures, family, step) for step in (3, 3, 4))
    assert torch.equal(one.renoise, same.renoise)
    assert not torch.equal(one.renoise, other.renoise)
    assert not torch.equal(one.renoise, made[1].stage.plan.draw(pictures, family, 3).renoise[:, :2])
    assert list(one.renoisings) == ["match", "fake", "adversarial", "generated", "real"]
    noises = [one.noise, *(item.noise for item in one.renoisings.values())]
    assert all(not torch.equal(a, b) for index, a in enumerate(noises) for b in noises[index + 1 :])
    assert one.t.tolist() == [749, 749]
    assert one.renoise.shape[1] == 2  # the start, and one more
    drawn = torch.cat(
        [replace(plan, batch_size=512).draw(pictures, family, s).renoisings["match"].t for s in range(20)]
    )
    assert (drawn.min(), drawn.max()) == (20, 980)
    anywhere = torch.cat(
        [replace(plan, batch_size=512).draw(pictures, family, s).renoisings["fake"].t for s in range(20)]
    )
    assert (anywhere.min(), anywhere.max()) == (0, 999)


def test_the_first_expert_sees_pure_noise_and_the_second_what_the_first_draws(
    family: StableDiffusion, mixture: Mixture
) -> None:
    shake(mixture)
    generator = Generator(family, TIMESTEPS)
    noises, text = normal(3, 4, 4, 8, 8), {"encoder_hidden_states": normal(3, 8, 8)}
    mixture.foster("n4")
    first = generator.input_at(torch.zeros(3, dtype=torch.long), noises, lambda places: text)
    assert torch.equal(first, noises[:, 0])
    second = generator.input_at(torch.ones(3, dtype=torch.long), noises, lambda places: text)
    said = family.denoiser(noises[:, 0], torch.full((3,), 999), text["encoder_hidden_states"]).sample
    alphas = family.noise.scheduler.alphas_cumprod
    clean = (noises[:, 0] - (1 - alphas[999]).sqrt() * said) / alphas[999].sqrt()
    expected = alphas[749].sqrt() * clean + (1 - alphas[749]).sqrt() * noises[:, 1]
    assert max_error(second, expected) < 1e-5


def test_samples_of_different_steps_are_simulated_each_as_if_alone(family: StableDiffusion, mixture: Mixture) -> None:
    shake(mixture)
    mixture.foster("n1")
    generator = Generator(family, TIMESTEPS)
    noises, text = normal(4, 4, 4, 8, 8), normal(4, 8, 8)
    steps = torch.tensor([2, 0, 3, 1])
    mixed = generator.input_at(steps, noises, lambda places: {"encoder_hidden_states": text[places]})
    for index, step in enumerate(steps):
        own = slice(index, index + 1)
        alone = generator.input_at(
            step[None], noises[own], lambda places, own=own: {"encoder_hidden_states": text[own]}
        )
        assert max_error(mixed[own], alone) < 1e-4  # products over batches of another size, through four passes


def test_real_inputs_are_training_pictures_but_for_the_first_step(family: StableDiffusion, mixture: Mixture) -> None:
    seen = []
    handle = family.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    pictures = random_pictures(6, family)
    made = {item.expert: item for item in distill(mixture, family, settings(inputs="real"))}
    for expert, t in (("n4.3", 999), ("n4.1", 499)):
        seen.clear()
        backward(made[expert], family)
        batch = made[expert].stage.plan.draw(pictures, family, 0)
        noise = batch.renoise[:, -1]
        expected = noise if t == 999 else family.noise.add_noise(pictures.latents[batch.indices], noise, batch.t)
        assert max_error(seen[0], expected) < 1e-6
    handle.remove()


# The sampler


def test_drawing_equals_diffusers_lcm_scheduler(family: StableDiffusion, mixture: Mixture) -> None:
    shake(mixture)
    mixture.mode = "switch"
    pipeline = family.pipeline()
    pipeline.scheduler = choose_scheduler(SAMPLER, pipeline.scheduler)
    settings = SampleSettings(SAMPLER, 4, 1.0, (16, 16), 2, 0, timesteps=TIMESTEPS)
    prompts = ["a red star", "a blue cross"]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    drawn = pipeline(prompt=prompts, generator=generators, output_type="latent", **settings.call_options).images
    again = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    noises = torch.stack([torch.cat([torch.randn(1, 4, 8, 8, generator=g) for _ in TIMESTEPS]) for g in again])
    own = Generator(family, TIMESTEPS).sample(noises, family.encode_captions(prompts))
    assert max_error(own, drawn) < 1e-5 * drawn.abs().max().item()  # untrained: latents of 50 and more


# Resuming


class PowerCutError(Exception):
    """What a test raises in place of a power cut."""


@pytest.mark.parametrize("index", [1, 2])
def test_a_killed_distillation_resumes_to_the_same_bytes(index: int, family: StableDiffusion, tmp_path: Path) -> None:
    def kill(step: int, log: object) -> None:
        if step == 5:
            raise PowerCutError

    def train(folder: Path, observe: Observer | None) -> None:
        mixture = attach(family, 2, 1, dropout=0.2)
        stages = distill(mixture, family, settings(steps=7, gan_steps=7, generator_interval=3))
        try:
            for made in stages[: index + 1]:
                at_end = observe if made is stages[index] else None
                run(made, family, folder / made.stage.name, at_end, validation_steps=1, checkpointing_steps=2)
        finally:
            mixture.detach()

    train(tmp_path / "whole", None)
    with pytest.raises(PowerCutError):
        train(tmp_path / "killed", kill)
    train(tmp_path / "killed", None)
    names = sorted(path.parent.name for path in (tmp_path / "whole").glob("*/result.safetensors"))
    assert len(names) == index + 1
    for name in names:
        whole, resumed = ((tmp_path / run / name / "result.safetensors").read_bytes() for run in ("whole", "killed"))
        assert whole == resumed, name


def test_checkpoints_of_another_distillation_do_not_fit(family: StableDiffusion, mixture: Mixture) -> None:
    first, second = distill(mixture, family, settings())[:2]
    state = first.trainee.state_dict()
    second.trainee.load_state_dict(state)  # of the same shape, and told apart by their folders
    with pytest.raises(ValueError, match="do not fit the model"):
        first.trainee.load_state_dict(
            {key: value for key, value in state.items() if not key.startswith("fake.conv_in")}
        )


# What is refused


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ((1000, 749, 499, 249), "must descend from at most 999 to at least 1"),
        ((999, 749, 499, 0), "must descend from at most 999 to at least 1"),
        ((249, 499, 749, 999), "must descend"),
        ((999, 749, 749, 249), "must descend"),
        ((), "must descend"),
        ((999, 749, 499, 251), r"expert n4.0 of \[0, 250\) would never be used"),
        ((999, 249), r"expert n4.2 of \[500, 750\) would never be used"),
    ],
)
def test_timesteps_that_no_generator_can_have(
    timesteps: tuple[int, ...], message: str, family: StableDiffusion, mixture: Mixture
) -> None:
    with pytest.raises(ValueError, match=message):
        distill(mixture, family, settings(timesteps=timesteps))


def test_bases_that_do_not_predict_noise_are_refused() -> None:
    family = StableDiffusion(tiny_pipeline("v_prediction"))
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction'; only bases that predict noise"):
        Generator(family, TIMESTEPS)


@pytest.mark.parametrize("name", ["sd3", "pixart", "flux", "ddpm"])
def test_bases_without_a_conditional_unet_are_refused(name: str) -> None:
    pipeline = PIPELINES[name]()
    family = FAMILIES[type(pipeline).__name__](pipeline)
    with pytest.raises(ValueError, match="cannot be distilled; allowed are bases with a UNet2DConditionModel"):
        Generator(family, TIMESTEPS)


def test_experts_on_text_encoders_are_refused(family: StableDiffusion) -> None:
    networks = {"unet": family.denoiser, "text_encoder": family.parts.text_encoder}
    mixture = Mixture.attach(networks, MixtureSpec(scales(4)), {"unet": TARGETS, "text_encoder": ["q_proj"]})
    with pytest.raises(ValueError, match="experts of the denoiser alone, and text_encoder carry some too"):
        distill(mixture, family, settings())


def test_stable_diffusion_xl_is_distilled_too(tmp_path: Path) -> None:
    family = StableDiffusionXL(PIPELINES["sdxl"]())
    mixture = attach(family, 4)
    made = distill(mixture, family, settings(gan_steps=2))[1]
    assert backward(made, family).isfinite().all()
    assert all(p.grad is not None for p, _ in made.stage.param_groups[0].slices)


def test_two_steps_of_one_interval_share_their_expert(family: StableDiffusion) -> None:
    scale = Scale("n2", Partition.uniform(2), 2, 2)
    mixture = Mixture.attach({"unet": family.denoiser}, MixtureSpec((scale,)), TARGETS)
    made = distill(mixture, family, settings())
    pictures = random_pictures(6, family)
    assert [sorted(set(item.stage.plan.draw(pictures, family, 0).t.tolist())) for item in made] == [
        [749, 999],
        [249, 499],
    ]
