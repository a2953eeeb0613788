"""What decoupling must hold: who is sampled, what is minimised, what is frozen, and what survives a kill."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import PIPELINES
from tiny_video import tiny_video_crafter
from torch import Tensor, nn

from conftest import max_error, random_pictures, tiny_pipeline
from timestep_experts.data import EncodedDataset
from timestep_experts.intervals import Interval, LogitNormalDensity, Partition, UniformDensity, mirror_timesteps
from timestep_experts.models import DiscreteNoise, Family, FlowNoise, StableDiffusion, load_family
from timestep_experts.objectives import SNR_WEIGHTINGS, loss_weight, noise_loss_weight, uncertainty_weighted
from timestep_experts.training import Decoupled, DecoupleSettings, LoopSettings, OptimiserSettings, decouple
from timestep_experts.training.batches import generator_for
from timestep_experts.training.decouple import DecouplePlan, Decoupling, Uncertainty
from timestep_experts.training.ema import MovingAverage, ema_decay_at
from timestep_experts.training.full_copy import FullCopy
from timestep_experts.training.loop import Observer, run_stage

ADAMW = OptimiserSettings("AdamW", {"weight_decay": 1e-6, "betas": (0.95, 0.999)})
SGD = OptimiserSettings("SGD", {}, max_grad_norm=None)
QUARTERS = Partition.uniform(4)
FAMILIES = {name: PIPELINES[name] for name in ("sd", "ddpm", "pixart", "sd3")} | {"video": tiny_video_crafter}


def settings(steps: int = 3, **options: object) -> DecoupleSettings:
    chosen = {"learning_rate": 1e-3, "train_batch_size": 4, "caption_dropout": 0.25, "seed": 5} | options
    return DecoupleSettings(QUARTERS, (steps,) * 4, **chosen)


def run(
    made: Decoupled,
    folder: Path,
    optimiser: OptimiserSettings = ADAMW,
    observe: Observer | None = None,
    **loop: object,
) -> dict[str, Tensor]:
    pictures = random_pictures(6, made.family)
    run_stage(made, pictures, LoopSettings(optimiser, **loop), folder, {"run": "law"}, observe)
    return {name: value.clone() for name, value in made.trainee.state_dict().items()}


def state_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def any_family(name: str, tmp_path: Path) -> Family:
    FAMILIES[name]().save_pretrained(tmp_path / name)
    return load_family(str(tmp_path / name), torch.device("cpu"))


def pictures_of(family: Family, count: int = 4) -> EncodedDataset:
    shape = (3, 2, 16, 16) if family.is_video else (3, 16, 16)
    pixels = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    return EncodedDataset(
        latents=family.encode_pixels(pixels).float(),
        caption_rows=torch.arange(count),
        features=family.encode_captions(["a red star"] * count + [""]),
        captions=("a red star",) * count,
        skipped=(),
    )


# Who is sampled


def drawn(interval: Interval, p: float, noise: DiscreteNoise | FlowNoise, count: int = 20_000, **options: object):
    plan = DecouplePlan(
        0, "law", QUARTERS, interval, count, 0.0, p, **{"sampling": "sample", "antithetic": False} | options
    )
    return plan.draw_timesteps(noise, 3)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("index", range(4))
def test_the_mass_in_range_is_what_p_says(p: float, antithetic: bool, index: int, family: StableDiffusion) -> None:
    t = drawn(QUARTERS[index], p, family.noise, antithetic=antithetic)
    counts = torch.bincount(QUARTERS.index_of(t), minlength=4).double()
    expected = torch.full((4,), p / 4).double()
    expected[index] += 1 - p
    # Five standard deviations of a binomial count; pairs fall into the same range more often than two single draws,
    # which at most doubles the variance. One in a million draws would fail, and the draw is seeded.
    bound = 5 * (2 * len(t) * expected * (1 - expected)).sqrt()
    assert ((counts - len(t) * expected).abs() <= bound).all()


def test_p_of_1_is_uniform(family: StableDiffusion) -> None:
    t = drawn(QUARTERS[2], 1.0, family.noise, count=100_000)
    counts = torch.bincount(t, minlength=1000).double()
    chi_square = ((counts - 100).square() / 100).sum()
    # of 999 degrees of freedom: mean 999, variance 1998; five standard deviations
    assert abs(chi_square - 999) < 5 * math.sqrt(1998)


def test_a_batch_is_thrown_for_as_one(family: StableDiffusion) -> None:
    plan = DecouplePlan(0, "law", QUARTERS, QUARTERS[3], 16, 0.0, 0.3, "batch", antithetic=False)
    outside = [(plan.draw_timesteps(family.noise, step) < 750).sum().item() for step in range(400)]
    full = sum(count > 4 for count in outside)  # of 16 uniform draws, 12 are expected outside; 4 or fewer are 1 in 1e5
    assert all(count == 0 or count > 4 for count in outside)
    assert abs(full - 0.3 * 400) < 5 * math.sqrt(400 * 0.3 * 0.7)


@pytest.mark.parametrize("batch_size", [8, 7])
def test_antithetic_pairs_mirror_in_where_they_were_drawn(batch_size: int, family: StableDiffusion) -> None:
    for p, lo, hi in ((0.0, 250, 500), (1.0, 0, 1000)):
        t = drawn(QUARTERS[1], p, family.noise, count=batch_size, antithetic=True)
        half = -(-batch_size // 2)
        assert len(t) == batch_size
        assert torch.equal(t[half:], lo + hi - 1 - t[: batch_size - half])


def test_mirrored_timesteps_of_odd_bounds_stay_whole_and_inside() -> None:
    interval = Interval(333.3, 666.6)
    t = torch.arange(334, 667)
    mirrored = mirror_timesteps(t, interval, UniformDensity(), integer=True)
    assert torch.equal(mirrored.sort().values, t)


@pytest.mark.parametrize("density", [UniformDensity(), LogitNormalDensity(shift=3.0)])
def test_continuous_mirrors_keep_the_density(density: UniformDensity | LogitNormalDensity) -> None:
    interval = Interval(250, 500)
    low, high = density.cdf(torch.tensor([250.0, 500.0])).tolist()
    t = density.icdf(torch.linspace(low, high, 33, dtype=torch.double)[1:-1])
    mirrored = mirror_timesteps(t, interval, density, integer=False)
    # in fp64; the inverse of the normal distribution keeps about nine digits
    assert max_error(density.cdf(t) + density.cdf(mirrored), torch.full_like(t, low + high)) < 1e-8
    if isinstance(density, UniformDensity):
        assert max_error(t + mirrored, torch.full_like(t, 750)) < 1e-9
    ends = mirror_timesteps(torch.tensor([250.0]), interval, density, integer=False)
    assert ends.item() in interval


def test_a_draw_is_a_function_of_seed_stage_and_step(family: StableDiffusion) -> None:
    plan = DecouplePlan(0, "law", QUARTERS, QUARTERS[1], 8, 0.1, 0.3, "sample", antithetic=False)
    pictures = random_pictures(5, family)
    first, again = plan.draw(pictures, family, 7), plan.draw(pictures, family, 7)
    assert all(torch.equal(getattr(first, n), getattr(again, n)) for n in ("indices", "t", "noise", "dropped"))
    for other in (replace(plan, seed=1), replace(plan, stage="other")):
        assert not torch.equal(other.draw(pictures, family, 7).noise, first.noise)
    assert not torch.equal(plan.draw(pictures, family, 8).noise, first.noise)


# What is minimised


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("projection", ["off", "foldable"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_at_first_the_distance_to_the_base_is_exactly_0(
    name: str, projection: str, precision: str, tmp_path: Path
) -> None:
    family = any_family(name, tmp_path)
    made = decouple(family, settings(projection=projection), 1)
    pictures = pictures_of(family)
    batch = made.stage.plan.draw(pictures, family, 0) if family.has_empty_caption else None
    assert batch is not None
    objective = made.stage.objective
    made.trainee.denoiser.eval()
    _, distance = objective.losses(made.family, pictures, batch, precision)
    assert torch.equal(distance, torch.zeros(4))
    # in training mode diffusers makes a tensor contiguous, and a convolution over it sums in another order
    made.trainee.denoiser.train()
    _, distance = objective.losses(made.family, pictures, batch, precision)
    eps = torch.finfo(torch.bfloat16 if precision == "bf16" else torch.float32).eps
    assert (distance < 16 * eps**2).all()


class Constant(nn.Module):
    """A denoiser that says one learned number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


class ToyFamily:
    """A family whose denoiser predicts its number, and whose target is 1."""

    device = torch.device("cpu")
    denoise = Family.denoise

    def __init__(self, denoiser: Constant) -> None:
        self.denoiser, self.noise = denoiser, self

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(noise)

    def predict(self, noisy: Tensor, t: Tensor, conditioning: object) -> Tensor:
        return self.denoiser.value.expand_as(noisy)


@pytest.mark.parametrize("consistency", [0.5, 1.0, 3.0])
def test_the_fixed_point_lies_between_target_and_teacher(consistency: float, family: StableDiffusion) -> None:
    student, teacher = ToyFamily(Constant(0.0)), ToyFamily(Constant(-2.0))
    objective = Decoupling(teacher, consistency, lambda _, losses: losses, 4)
    pictures = random_pictures(6, family)
    batch = DecouplePlan(0, "law", QUARTERS, QUARTERS[0], 4, 0.0, 0.0, "sample", antithetic=False).draw(
        pictures, family, 0
    )
    value = student.denoiser.value
    for _ in range(200):
        value.grad = None
        objective.backward(0, student, pictures, batch, "no")
        with torch.no_grad():
            value -= 0.1 * value.grad  # contracts by 1 - 0.2 (1 + lambda) per step: below 1e-19 after 200
    assert abs(value.item() - (1 + consistency * -2.0) / (1 + consistency)) < 1e-6  # fp32
    assert teacher.denoiser.value.grad is None


def test_without_lambda_the_base_is_not_asked(family: StableDiffusion, tmp_path: Path) -> None:
    without, beside = decouple(family, settings(consistency=0.0), 0), decouple(family, settings(), 0)
    calls: list[str] = []
    family.denoiser.register_forward_hook(lambda *_: calls.append("base"))
    run(without, tmp_path / "off")
    assert calls == []
    run(beside, tmp_path / "on")
    assert len(calls) == 3  # once per step


@pytest.mark.parametrize("weighting", SNR_WEIGHTINGS)
@pytest.mark.parametrize("kind", ["velocity", "flow"])
def test_weights_pull_alike_on_any_target(weighting: str, kind: str) -> None:
    """The weighted error of an implied noise is the weighted error of the target that implies it."""
    noise: DiscreteNoise | FlowNoise = FlowNoise()
    if kind == "velocity":
        noise = DiscreteNoise(tiny_pipeline("v_prediction").scheduler, "law")
    t = torch.tensor([1, 100, 500, 900])
    x, n = (torch.randn(4, 1, generator=torch.Generator().manual_seed(s), dtype=torch.double) for s in (0, 1))
    noisy, wrong = noise.add_noise(x, n, t), torch.full_like(n, 0.3)
    # the clean sample that the noisy one and a wrong noise imply
    signal, spread = (
        noise.add_noise(torch.ones(4, 1).double() * a, torch.ones(4, 1).double() * b, t) for a, b in ((1, 0), (0, 1))
    )
    implied = noise.target((noisy - spread * (n + wrong)) / signal, n + wrong, t)
    ratio = ((implied - noise.target(x, n, t)) / wrong).abs()[:, 0]
    assert max_error(noise.error_ratio(t) / ratio, torch.ones(4)) < 1e-5  # the scheduler's tables are fp32
    assert max_error(noise.snr(t) / (signal / spread).square()[:, 0], torch.ones(4)) < 1e-4
    if weighting != "none":
        weights = loss_weight(weighting, noise.snr(t), ratio)
        assert max_error(weights * ratio**2 / noise_loss_weight(weighting, noise.snr(t)), torch.ones(4)) < 1e-12


def test_weightings_are_the_papers() -> None:
    snr = torch.tensor([0.01, 0.5, 1.0, 4.0, 5.0, 100.0], dtype=torch.double)
    expected = {
        "none": [1, 1, 1, 1, 1, 1],
        "snr_plus_one": [101, 3, 2, 1.25, 1.2, 1.01],
        "truncated": [100, 2, 1, 1, 1, 1],
        "min_snr": [1, 1, 1, 1, 1, 0.05],
        "p2": [1 / 1.01, 1 / 1.5, 0.5, 0.2, 1 / 6, 1 / 101],
    }
    for name, values in expected.items():
        assert max_error(noise_loss_weight(name, snr), torch.tensor(values, dtype=torch.double)) < 1e-12
    with pytest.raises(ValueError, match="unknown weighting 'snr': allowed are none, snr_plus_one"):
        noise_loss_weight("snr", snr)


def test_weights_are_finite_where_a_schedule_ends_in_noise() -> None:
    flow = FlowNoise()
    t = torch.tensor([1e-3, 999.99994])
    for weighting in SNR_WEIGHTINGS:
        assert loss_weight(weighting, flow.snr(t), flow.error_ratio(t)).isfinite().all()


def test_uncertainty_learns_the_logarithm_of_the_loss() -> None:
    weigh = Uncertainty(Partition.uniform(2))
    t, losses = torch.tensor([10, 700]), torch.tensor([0.5, 0.01])
    assert torch.equal(weigh(t, losses), losses)  # at first it is the plain loss
    optimiser = torch.optim.Adam(weigh.parameters(), lr=0.05)
    for _ in range(600):
        optimiser.zero_grad()
        weigh(t, losses).sum().backward()
        optimiser.step()
    assert max_error(weigh.log_variance.detach(), losses.log()) < 1e-3
    assert max_error(uncertainty_weighted(losses, losses.log()), 1 + losses.log()) < 1e-6


@pytest.mark.parametrize("weighting", ["min_snr", "uncertainty"])
def test_a_full_finetune_is_one_range_without_lambda(weighting: str, family: StableDiffusion, tmp_path: Path) -> None:
    whole = DecoupleSettings(
        Partition.uniform(1), (3,), consistency=0.0, full_range_probability=0.0, weighting=weighting, ema_decay=None
    )
    state = run(decouple(family, whole, 0), tmp_path)
    extra = {name for name in state if not name.startswith("trained.")}
    assert extra == ({"extra.uncertainty.log_variance"} if weighting == "uncertainty" else set())
    for name in extra:
        assert state[name].all()  # every quarter was met, and moved


# What is frozen


@pytest.mark.parametrize("name", FAMILIES)
def test_the_base_keeps_its_bytes(name: str, tmp_path: Path) -> None:
    family = any_family(name, tmp_path)
    before = state_hash(family.denoiser)
    made = decouple(family, settings(2, projection="foldable", caption_dropout=0.0), 2)
    start = {key: value.clone() for key, value in made.trainee.state_dict().items()}

    def preview(step: int, log: object) -> None:
        with made.trainee.as_expert(), torch.no_grad():
            batch = made.stage.plan.draw(pictures, family, 0)
            made.family.predict(
                pictures.latents[batch.indices], batch.t, pictures.conditioning(batch.indices, family.device)
            )

    pictures = pictures_of(family)
    run_stage(made, pictures, LoopSettings(ADAMW, validation_steps=1), tmp_path / "run", {}, preview)
    assert state_hash(family.denoiser) == before
    assert not any(p.requires_grad or p.grad is not None for p in family.denoiser.parameters())
    assert family.denoiser is family.pipeline().components[family.denoiser_name]
    moved = made.trainee.state_dict()
    assert all(
        not torch.equal(moved[key], start[key]) for key in start if key.endswith(("conv2.weight", "to_out.0.weight"))
    )


def test_only_what_is_chosen_learns(family: StableDiffusion, tmp_path: Path) -> None:
    made = decouple(family, settings(trainable=r".*\.attn\d\..*"), 0)
    base = family.denoiser.state_dict()
    state = run(made, tmp_path)
    assert state
    assert all(".attn" in name for name in state)
    for name, value in made.trainee.denoiser.state_dict().items():
        assert torch.equal(value, base[name]) == (".attn" not in name), name


def test_updates_are_optimiser_updates(family: StableDiffusion, tmp_path: Path) -> None:
    updates: list[int] = []
    states = []
    for parts in (1, 4):
        made = decouple(family, settings(5), 0)
        stage = replace(
            made.stage, after_step=lambda step, made=made: (updates.append(step), made.trainee.follow(step))
        )
        states.append(run(replace(made, stage=stage), tmp_path / str(parts), SGD, gradient_accumulation_steps=parts))
    assert updates == [1, 2, 3, 4, 5] * 2
    # sums in another order: 1e-7 per step
    assert max(max_error(states[0][key], states[1][key]) for key in states[0]) < 2e-6


@pytest.mark.parametrize("name", ["sd", "video", "pixart"])
def test_gradient_checkpointing_trains_the_copy_alike(name: str, tmp_path: Path) -> None:
    FAMILIES[name]().save_pretrained(tmp_path / name)
    states = []
    for checkpointed in (False, True):
        family = load_family(str(tmp_path / name), torch.device("cpu"))
        if checkpointed:
            family.checkpoint_gradients()
        made = decouple(family, settings(2, projection="foldable", caption_dropout=0.0), 1)
        pictures, folder = pictures_of(family), tmp_path / str(checkpointed)
        run_stage(made, pictures, LoopSettings(SGD), folder, {})
        states.append(made.trainee.state_dict())
        assert not any(p.grad is not None for p in family.denoiser.parameters())
    # the same operations on the same numbers, run twice
    assert max(max_error(states[0][key], states[1][key]) for key in states[0]) < 1e-6


def test_a_base_in_bf16_is_copied_in_fp32(tmp_path: Path) -> None:
    FAMILIES["sd"]().save_pretrained(tmp_path)
    family = load_family(str(tmp_path), torch.device("cpu"), torch.bfloat16)
    made = decouple(family, settings(), 0)
    assert {p.dtype for p in made.trainee.denoiser.parameters()} == {torch.float32}
    state = run(made, tmp_path / "run", mixed_precision="bf16")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert {p.dtype for p in family.denoiser.parameters()} == {torch.bfloat16}


# Averages


def test_averages_follow_the_formula() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage({"p": parameter}, 0.99)
    expected = 1.0
    for step in range(1, 2000):
        parameter.data.fill_(float(step % 7))
        average.update(step)
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * float(step % 7)
        assert average.decay >= ema_decay_at(step, 0.99, warmup=True)
    assert abs(average.averages["p"].item() - expected) < 1e-5  # fp32 over 2000 updates, each forgetting 1 %
    assert ema_decay_at(1, 0.99, warmup=False) == 0.99


def test_an_expert_in_place_goes_back_to_the_byte(family: StableDiffusion) -> None:
    trainee = FullCopy(family.denoiser, ema_decay=0.5)
    with torch.no_grad():
        for parameter in trainee.expert.values():
            parameter.add_(1.0)
    before, base = state_hash(trainee.denoiser), state_hash(family.denoiser)
    with trainee.as_expert():
        assert state_hash(trainee.denoiser) == base  # the averages are still those of the start
    assert state_hash(trainee.denoiser) == before


class PowerCutError(Exception):
    """What a test raises in place of a power cut."""


@pytest.mark.parametrize("weighting", ["none", "uncertainty"])
def test_a_killed_range_resumes_to_the_same_bytes(weighting: str, family: StableDiffusion, tmp_path: Path) -> None:
    def kill(step: int, log: object) -> None:
        if step == 5:
            raise PowerCutError

    def train(folder: Path, observe: Observer | None = None) -> None:
        made = decouple(family, settings(8, projection="paper", weighting=weighting, ema_decay=0.9), 2)
        run(made, folder, ADAMW, observe, validation_steps=1, checkpointing_steps=2)

    train(tmp_path / "whole")
    with pytest.raises(PowerCutError):
        train(tmp_path / "killed", kill)
    assert not (tmp_path / "killed" / "result.safetensors").exists()
    train(tmp_path / "killed")
    train(tmp_path / "again")
    contents = [(tmp_path / name / "result.safetensors").read_bytes() for name in ("whole", "killed", "again")]
    assert contents[0] == contents[1] == contents[2]


def test_generators_of_ranges_differ() -> None:
    seeds = {generator_for(0, f"decouple-{index}", "timesteps", 0).initial_seed() for index in range(4)}
    assert len(seeds) == 4


# Bad input


@pytest.mark.parametrize(
    ("options", "index", "message"),
    [
        ({"trainable": "nothing"}, 0, "trainable: 'nothing' matches no parameter of this UNet2DConditionModel"),
        ({"trainable": "conv_in"}, 0, "it must match a whole name, such as 'conv_in.weight'"),
        ({"trainable": "("}, 0, "is no regular expression"),
        ({}, 4, "there is no range 4: this recipe has 4, from 0 to 3"),
        ({}, -1, "there is no range -1"),
        ({"partition": Partition((0, 500, 900))}, 0, "the ranges end at 900; this base model has 1000 timesteps"),
        ({"partition": Partition((0, 0.5, 0.7, 1000))}, 1, r"contains no whole timestep"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(
    options: dict[str, object], index: int, message: str, family: StableDiffusion
) -> None:
    chosen = replace(settings(), **options)
    chosen = replace(chosen, max_train_steps=(3,) * len(chosen.partition))
    with pytest.raises(ValueError, match=message):
        decouple(family, chosen, index)


def test_a_paper_projection_needs_blocks(tmp_path: Path) -> None:
    family = any_family("pixart", tmp_path)
    message = "projection 'paper' needs down, mid and up blocks, which a PixArtTransformer2DModel has not"
    with pytest.raises(ValueError, match=message):
        decouple(family, settings(projection="paper"), 0)


def test_a_base_with_two_denoisers_is_refused(tmp_path: Path) -> None:
    from tiny_video import tiny_wan

    tiny_wan(0.875).save_pretrained(tmp_path)
    family = load_family(str(tmp_path), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"has several denoisers \(transformer, transformer_2\)"):
        decouple(family, settings(), 0)
