"""What is measured is what is meant: common random numbers, analytic distances, gates and verdicts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import max_error, normal, random_pictures, randomise, scales
from timestep_experts.data import EncodedDataset
from timestep_experts.evaluation import (
    LossCurve,
    LossSettings,
    frechet_distance,
    gate_map,
    judge_features,
    judge_pictures,
    loss_curve,
)
from timestep_experts.evaluation.fidelity import to_judge_input
from timestep_experts.evaluation.loss import evaluation_batches
from timestep_experts.intervals import Interval, Partition
from timestep_experts.mixture import Mixture, MixtureSpec, RouterForm
from timestep_experts.models import Conditioning, StableDiffusion
from timestep_experts.world.render import DOMAINS, render
from timestep_experts.world.scenes import draw_scenes

PARTITION = Partition((0, 100, 400, 1000))
SETTINGS = LossSettings(PARTITION, bins_per_interval=2, num_pictures=6, batch_size=4, seed=3)
TARGETS = ("to_q", "conv1")


@pytest.fixture
def pictures(family: StableDiffusion) -> EncodedDataset:
    return random_pictures(5, family)


# Loss per timestep


def test_the_same_numbers_are_drawn_every_time(family: StableDiffusion, pictures: EncodedDataset) -> None:
    torch.manual_seed(1)
    first = loss_curve(family, pictures, SETTINGS)
    torch.manual_seed(2)
    assert loss_curve(family, pictures, SETTINGS) == first
    assert loss_curve(family, pictures, replace(SETTINGS, seed=4)).loss != first.loss


def test_the_batch_size_changes_no_more_than_rounding(family: StableDiffusion, pictures: EncodedDataset) -> None:
    first = loss_curve(family, pictures, SETTINGS)
    for batch_size in (1, 5, 100):
        other = loss_curve(family, pictures, replace(SETTINGS, batch_size=batch_size))
        assert max(abs(a - b) for a, b in zip(first.loss, other.loss, strict=True)) <= 1e-6  # losses near 1
        assert other.bins == first.bins


def test_a_bin_does_not_depend_on_the_others(family: StableDiffusion, pictures: EncodedDataset) -> None:
    fine = loss_curve(family, pictures, LossSettings(Partition.uniform(4), 2, 6, 4, seed=3))
    coarse = loss_curve(family, pictures, LossSettings(Partition.uniform(2), 4, 6, 4, seed=3))
    assert fine == coarse  # both have the eight bins of 125 timesteps


def test_silent_experts_meet_the_same_samples(family: StableDiffusion, pictures: EncodedDataset) -> None:
    base = loss_curve(family, pictures, SETTINGS)
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(4, 1, base_gate=1)), TARGETS)
    for mode in ("off", "switch", "route"):
        mixture.mode = mode
        assert loss_curve(family, pictures, SETTINGS) == base
    randomise(mixture)
    assert loss_curve(family, pictures, SETTINGS) != base
    mixture.detach()


def test_every_bin_is_sampled_from_its_own_timesteps(family: StableDiffusion, pictures: EncodedDataset) -> None:
    batches = list(evaluation_batches(family, pictures, SETTINGS))
    assert [interval for interval, _ in batches] == list(SETTINGS.bins.intervals)
    assert SETTINGS.bins.boundaries == (0, 50, 100, 250, 400, 700, 1000)
    for interval, parts in batches:
        assert sum(len(part) for part in parts) == 6
        assert max(len(part) for part in parts) <= SETTINGS.batch_size
        assert all(t in interval for part in parts for t in part.t.tolist())
        assert not any(part.dropped.any() for part in parts)
        rows = torch.cat([part.indices for part in parts])
        assert set(rows[:5].tolist()) == set(range(5))  # every picture before one comes again


def test_intervals_are_means_of_their_bins(family: StableDiffusion, pictures: EncodedDataset) -> None:
    curve = loss_curve(family, pictures, SETTINGS)
    for index, interval in enumerate(PARTITION.intervals):
        assert math.isclose(curve.within(interval), sum(curve.loss[2 * index : 2 * index + 2]) / 2, rel_tol=1e-12)
    widths = [50, 50, 150, 150, 300, 300]
    mean = sum(w * value for w, value in zip(widths, curve.loss, strict=True)) / 1000
    assert math.isclose(curve.mean, mean, rel_tol=1e-12)


def test_a_mean_over_bins_by_hand() -> None:
    curve = LossCurve(Partition((0, 100, 400, 1000)).intervals, (1.0, 2.0, 4.0), (0.0, 0.0, 0.0))
    assert curve.mean == (100 * 1 + 300 * 2 + 600 * 4) / 1000
    assert curve.within(Interval(0, 400)) == (100 * 1 + 300 * 2) / 400
    assert curve.within(Interval(100, 1000)) == (300 * 2 + 600 * 4) / 900


class Oracle(StableDiffusion):
    """Knows that every picture is black: ``noise = noisy / sqrt(1 - a_t)``, plus a mistake."""

    mistake = 0.0

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        spread = (1 - self.noise.scheduler.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
        return noisy / spread + self.mistake


@pytest.mark.parametrize("mistake", [0.0, 0.5])
def test_a_perfect_denoiser_loses_nothing_and_a_constant_mistake_its_square(
    mistake: float, family: StableDiffusion, pictures: EncodedDataset
) -> None:
    black = replace(pictures, latents=torch.zeros_like(pictures.latents))
    oracle = Oracle(family.parts)
    oracle.mistake = mistake
    curve = loss_curve(oracle, black, SETTINGS)
    assert all(abs(value - mistake**2) <= 1e-6 for value in curve.loss)
    assert all(error <= 1e-6 for error in curve.standard_error)


class Silent(StableDiffusion):
    """Always predicts zero, so that losses are those of the noise itself."""

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.zeros_like(noisy)


def test_means_and_errors_are_those_of_the_samples(family: StableDiffusion, pictures: EncodedDataset) -> None:
    settings = replace(SETTINGS, num_pictures=50, batch_size=16)
    curve = loss_curve(Silent(family.parts), pictures, settings)
    for index, (_, parts) in enumerate(evaluation_batches(family, pictures, settings)):
        losses = torch.cat([part.noise for part in parts]).square().mean((1, 2, 3)).double()
        assert abs(curve.loss[index] - losses.mean().item()) <= 1e-6
        assert abs(curve.standard_error[index] - losses.std().item() / 50**0.5) <= 1e-6
        # 256 squares of normal numbers have a mean of 1 and a variance of 2 / 256
        assert abs(curve.loss[index] - 1) < 5 * (2 / 256 / 50) ** 0.5
        assert 0.5 < curve.standard_error[index] / (2 / 256 / 50) ** 0.5 < 1.5


def test_one_picture_per_bin_is_enough(family: StableDiffusion, pictures: EncodedDataset) -> None:
    curve = loss_curve(family, pictures, replace(SETTINGS, num_pictures=1))
    assert all(math.isfinite(value) for value in (*curve.loss, *curve.standard_error))


# Frechet distance


def gaussian(mean: Tensor, covariance: Tensor, seed: int = 0, count: int = 50) -> Tensor:
    """Samples whose mean and covariance are these exactly, in float64."""
    sample = normal(count, len(mean), seed=seed, dtype=torch.float64)
    sample = sample - sample.mean(0)
    white = sample @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(sample.T))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def random_covariance(size: int, seed: int) -> Tensor:
    root = normal(size, size, seed=seed, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


def near(actual: float, expected: float) -> bool:
    return math.isclose(actual, expected, rel_tol=1e-9, abs_tol=1e-9)


def test_distance_of_diagonal_gaussians() -> None:
    m1, m2 = torch.tensor([0.0, 1, -2]).double(), torch.tensor([0.5, 1, 3]).double()
    s1, s2 = torch.tensor([1.0, 2, 0.5]).double(), torch.tensor([3.0, 2, 0.1]).double()
    distance = frechet_distance(gaussian(m1, s1.square().diag()), gaussian(m2, s2.square().diag(), seed=1, count=70))
    assert near(distance, ((m1 - m2).square() + (s1 - s2).square()).sum().item())


def test_distance_of_gaussians_that_share_their_axes() -> None:
    axes = torch.linalg.qr(normal(4, 4, dtype=torch.float64)).Q
    s1, s2 = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([2.0, 0.5, 1, 8]).double()
    first, second = (axes @ s.square().diag() @ axes.T for s in (s1, s2))
    zero = torch.zeros(4, dtype=torch.float64)
    assert near(frechet_distance(gaussian(zero, first), gaussian(zero, second, seed=1)), (s1 - s2).square().sum())


def test_distance_of_any_two_gaussians_of_the_plane() -> None:
    """For 2 x 2 matrices, tr (C1 C2)^(1/2) = sqrt(tr C1 C2 + 2 sqrt(det C1 C2))."""
    zero = torch.zeros(2, dtype=torch.float64)
    for seed in range(5):
        first, second = random_covariance(2, seed), random_covariance(2, seed + 10)
        product = first @ second
        root = (product.trace() + 2 * product.det().sqrt()).sqrt()
        expected = (first.trace() + second.trace() - 2 * root).item()
        assert near(frechet_distance(gaussian(zero, first), gaussian(zero, second, seed=1)), expected)


def test_distance_is_that_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    one, other = gaussian(normal(8), random_covariance(8, 1)), gaussian(normal(8, seed=5), random_covariance(8, 2))
    first, second = (torch.cov(x.T).numpy() for x in (one, other))
    gap = (one.mean(0) - other.mean(0)).square().sum().item()
    expected = gap + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert math.isclose(frechet_distance(one, other), expected, rel_tol=1e-7)
    assert near(frechet_distance(other, one), frechet_distance(one, other))


def test_a_shift_adds_its_square() -> None:
    sample, shift = gaussian(torch.zeros(3).double(), random_covariance(3, 0)), torch.tensor([1.0, -2, 0.5]).double()
    assert near(frechet_distance(sample, sample + shift), shift.square().sum().item())


@pytest.mark.parametrize("count", [2, 12, 300])
def test_a_set_has_no_distance_to_itself(count: int) -> None:
    """Fewer samples than the 128 features leave a singular covariance, and still no distance, let alone a negative."""
    sample = 10 * normal(count, 128, seed=1)
    assert -1e-9 < frechet_distance(sample, sample) < 1e-6
    assert -1e-9 < frechet_distance(sample, sample.flip(0)) < 1e-6


# Pictures of the embedded world


def test_one_feature_has_a_distance_too() -> None:
    one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [9.0]])  # variances 2 and 32, means 1 and 5
    assert math.isclose(frechet_distance(one, other), 16 + 2 + 32 - 2 * math.sqrt(64), rel_tol=1e-9)


@pytest.mark.parametrize(("first", "second"), [(1, 5), (5, 1), (0, 5)])
def test_a_single_picture_has_no_frechet_distance(first: int, second: int) -> None:
    with pytest.raises(ValueError, match=f"got {first} and {second}"):
        frechet_distance(normal(first, 4), normal(second, 4))


def test_real_pictures_keep_their_promises_and_others_do_not() -> None:
    scenes = draw_scenes(60, seed=1, held_out=True)
    captions = [scene.caption for scene in scenes]
    for domain in DOMAINS:
        pictures = render(scenes, domain, seed=2)
        verdict = judge_pictures(pictures, captions)
        assert min(vars(verdict).values()) >= 0.98
        wrong = judge_pictures(pictures, [*captions[1:], captions[0]])
        assert max(wrong.colour, wrong.shape) < 0.6
        assert wrong.relation < 0.6
    large = judge_pictures(render(scenes, "flat", seed=2, resolution=96), captions)
    assert min(vars(large).values()) >= 0.95


def test_a_verdict_is_the_mean_over_pictures() -> None:
    scenes = draw_scenes(4, seed=1, held_out=True)
    pictures = render(scenes, "flat", seed=2)
    each = [judge_pictures(pictures[i : i + 1], [scenes[0].caption]) for i in range(4)]
    whole = judge_pictures(pictures, [scenes[0].caption] * 4)
    for name, value in vars(whole).items():
        assert math.isclose(value, np.mean([getattr(verdict, name) for verdict in each]))


def test_what_cannot_be_judged_is_an_error() -> None:
    pictures = render(draw_scenes(2, seed=0, held_out=False), "flat", seed=0)
    with pytest.raises(ValueError, match="not a caption of the embedded world: 'a cat'"):
        judge_pictures(pictures, ["a cat", "a dog"])
    with pytest.raises(ValueError, match=r"zip\(\)"):
        judge_pictures(pictures, [draw_scenes(1, seed=0, held_out=False)[0].caption])


def test_the_judge_sees_pictures_of_any_size_in_its_own() -> None:
    pictures = render(draw_scenes(3, seed=0, held_out=False), "neon", seed=0)
    exact = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    assert max_error(to_judge_input(pictures), exact) == 0
    for size in (16, 40, 128):
        resized = to_judge_input(render(draw_scenes(3, seed=0, held_out=False), "neon", seed=0, resolution=size))
        assert resized.shape == (3, 3, 64, 64)
        assert -1 <= resized.min() < resized.max() <= 1


def test_pictures_of_one_domain_are_nearer_than_those_of_two() -> None:
    sides = {
        (domain, seed): judge_features(render(draw_scenes(80, seed=seed, held_out=False), domain, seed=seed))
        for domain, seed in (("flat", 0), ("flat", 1), ("neon", 2))
    }
    assert {tuple(features.shape) for features in sides.values()} == {(80, 128)}
    first, same, other = sides.values()
    assert 0 < frechet_distance(first, same) < frechet_distance(first, other)


# Gates


def attach(family: StableDiffusion, resting: float, **options: object) -> Mixture:
    spec = MixtureSpec(scales(4, 2, 1, base_gate=resting), **options)
    return Mixture.attach(family.denoiser, spec, TARGETS)


def routers(mixture: Mixture, part: str) -> list[Tensor]:
    return [value for key, value in mixture.state_dict().items() if key.endswith(f"router.{part}")]


@pytest.mark.parametrize("resting", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["sample", "token"])
def test_constant_routers_give_constant_gates(
    gate: str, resting: float, family: StableDiffusion, pictures: EncodedDataset
) -> None:
    targets = ("to_q",) if gate == "token" else TARGETS
    spec = MixtureSpec(scales(4, 2, 1, base_gate=resting), RouterForm(positions=gate))
    mixture = Mixture.attach(family.denoiser, spec, targets)
    for index, bias in enumerate(routers(mixture, "bias")):
        bias.copy_(torch.tensor([0.25, -0.5]) * (index + 1))
    mixture.mode = "switch"
    maps = gate_map(family, mixture, pictures, SETTINGS)
    assert mixture.mode == "switch"
    assert [found.scale for found in maps] == ["n2", "n1"]
    for found, constant in zip(maps, (0.25, -0.5), strict=True):
        assert found.modules == tuple(mixture.layers)
        assert found.t == (25, 75, 175, 325, 550, 850)
        wanted = resting + constant * (1 + torch.arange(len(mixture.layers)))[:, None].expand(-1, 6)
        assert max_error(torch.tensor(found.mean), wanted) <= 1e-6
        assert max_error(torch.tensor(found.spread), torch.zeros_like(wanted)) <= 1e-6


def test_gates_follow_the_table_over_t(family: StableDiffusion, pictures: EncodedDataset) -> None:
    mixture = attach(family, 0.0, router=RouterForm(inputs="t"))
    for table in routers(mixture, "E"):
        table.copy_(torch.arange(1000)[:, None] * torch.tensor([1e-3, -2e-3]))
    settings = replace(SETTINGS, batch_size=6)
    rising, falling = gate_map(family, mixture, pictures, settings)
    for index, (interval, (batch,)) in enumerate(evaluation_batches(family, pictures, settings)):
        t = batch.t.double() / 1000
        for row in range(len(mixture.layers)):
            assert math.isclose(rising.mean[row][index], t.mean().item(), rel_tol=1e-5)
            assert math.isclose(falling.mean[row][index], -2 * t.mean().item(), rel_tol=1e-5)
            assert math.isclose(rising.spread[row][index], t.std(correction=0).item(), rel_tol=1e-4)
        assert interval.lo <= 1000 * rising.mean[0][index] <= interval.hi


def test_a_mixture_without_contexts_has_no_gates(family: StableDiffusion, pictures: EncodedDataset) -> None:
    mixture = Mixture.attach(family.denoiser, MixtureSpec(scales(4)), TARGETS)
    assert gate_map(family, mixture, pictures, SETTINGS) == []
