"""Laws of intervals: who owns a timestep, what it means in other units, and how it is drawn."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from conftest import normal
from timestep_experts.intervals import (
    Interval,
    LogitNormalDensity,
    Partition,
    UniformDensity,
    draw_timesteps,
    inference_timesteps,
    log_snr_of,
    mass_per_interval,
    sigma_of,
    step_of,
    steps_per_interval,
    t_of_log_snr,
    t_of_sigma,
)

T = 1000
partitions = st.sets(st.integers(1, 8 * T - 1), max_size=12).map(
    lambda inner: Partition((0.0, *(eighth / 8 for eighth in sorted(inner)), float(T)))
)
timesteps = st.integers(0, 8 * T).map(lambda eighths: eighths / 8)
densities = [
    UniformDensity(),
    LogitNormalDensity(),
    LogitNormalDensity(0.5, 0.8, shift=3),
    LogitNormalDensity(shift=12),
]


def ddim() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=T, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def flow(shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=shift)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Ownership


@given(
    num_intervals=st.integers(1, 300), num_timesteps=st.integers(1, 4096), place=st.fractions(0, 1, max_denominator=999)
)
def test_uniform_owner_is_the_clamped_floor(num_intervals, num_timesteps, place):
    # Eighths are exact floats, and never closer than 1/8n to a boundary that they are not on.
    t = math.floor(place * 8 * num_timesteps) / 8
    expected = min(math.floor(Fraction(t) * num_intervals / num_timesteps), num_intervals - 1)
    assert Partition.uniform(num_intervals, num_timesteps).index_of(t) == expected


@pytest.mark.parametrize("n", [n for n in range(1, T + 1) if T % n == 0])
def test_owner_equals_the_paper_where_n_divides_the_timesteps(n):
    one_based = torch.arange(1, T + 1)
    paper = (one_based * n + T - 1) // T - 1  # ceil(t n / T) - 1 in whole numbers
    assert torch.equal(Partition.uniform(n).index_of(one_based - 1), paper)


@pytest.mark.parametrize("n", [3, 6, 7, 12, 30, 999])
def test_owner_differs_from_the_paper_only_on_timesteps_cut_by_a_boundary(n):
    one_based = torch.arange(1, T + 1)
    paper = (one_based * n + T - 1) // T - 1
    differs = one_based[Partition.uniform(n).index_of(one_based - 1) != paper].tolist()
    fractional = [Fraction(i * T, n) for i in range(1, n) if (i * T) % n]
    assert set(differs) == {math.ceil(boundary) for boundary in fractional}


@given(partition=partitions, t=timesteps)
def test_every_timestep_has_exactly_one_owner(partition, t):
    owners = [i for i, interval in enumerate(partition.intervals) if t in interval]
    expected = owners if t < T else [len(partition) - 1]
    assert [partition.index_of(t)] == expected


@given(partition=partitions)
def test_last_interval_owns_the_upper_end(partition):
    last = len(partition) - 1
    assert partition.index_of(T) == partition.index_of(float(T)) == last
    assert partition.index_of(torch.tensor([T, float(T)])).tolist() == [last, last]


@given(partition=partitions, values=st.lists(timesteps, min_size=6, max_size=6))
def test_number_and_tensor_of_any_dtype_and_shape_agree(partition, values):
    expected = torch.tensor([partition.index_of(t) for t in values])
    for shape in [(6,), (2, 3), (1, 6, 1)]:
        for dtype in [torch.float32, torch.float64]:
            index = partition.index_of(torch.tensor(values, dtype=dtype).view(shape))
            assert index.dtype == torch.int64
            assert torch.equal(index, expected.view(shape))
    whole = [int(t) for t in values]
    expected = [partition.index_of(t) for t in whole]
    assert [partition.index_of(float(t)) for t in whole] == expected
    for dtype in [torch.int32, torch.int64]:
        assert partition.index_of(torch.tensor(whole, dtype=dtype)).tolist() == expected
    assert partition.index_of(torch.tensor(whole[0])).shape == ()


@pytest.mark.parametrize("n", [3, 6, 7, 9, 11, 13])
def test_number_and_float32_tensor_agree_around_a_fractional_boundary(n):
    partition = Partition.uniform(n)
    on = torch.tensor(partition.boundaries[1:-1], dtype=torch.float32)
    for t in (on, torch.nextafter(on, torch.tensor(0.0)), torch.nextafter(on, torch.tensor(2000.0))):
        assert partition.index_of(t).tolist() == [partition.index_of(value) for value in t.tolist()]


def test_values_outside_belong_to_the_nearest_interval():
    partition = Partition.uniform(4)
    assert partition.index_of(-1.0) == 0
    assert partition.index_of(1500.0) == 3
    assert partition.index_of(torch.tensor([-1.0, 1500.0])).tolist() == [0, 3]


# Partitions together


@given(one=partitions, other=partitions, t=timesteps)
def test_refining_keeps_both_owners_known(one, other, t):
    refined = one.refine(other)
    assert refined == other.refine(one)
    assert set(refined.boundaries) == {*one.boundaries, *other.boundaries}
    interval = refined[refined.index_of(t)]
    for partition in (one, other):
        assert partition.coarsens(refined)
        assert [i for i, outer in enumerate(partition.intervals) if outer.covers(interval)] == [partition.index_of(t)]


@given(one=partitions, other=partitions)
def test_coarsens_means_that_every_interval_is_covered(one, other):
    covered = all(any(outer.covers(inner) for outer in one.intervals) for inner in other.intervals)
    assert one.coarsens(other) == covered
    assert one.coarsens(one)
    assert one.refine(one) == one


def test_uniform_partitions_coarsen_by_divisibility():
    for n in range(1, 13):
        for m in range(1, 13):
            assert Partition.uniform(n).coarsens(Partition.uniform(m)) == (m % n == 0)


# Conversions


def test_ddpm_sigma_and_log_snr_are_those_of_the_scheduler():
    scheduler = ddim()
    alphas, t = scheduler.alphas_cumprod.double(), torch.arange(T)
    # fp64 on both sides; log and exp cost a few ulp.
    assert ((sigma_of(t, scheduler) / ((1 - alphas) / alphas).sqrt()).log().abs().max()) < 1e-12
    assert (log_snr_of(t, scheduler) - (alphas / (1 - alphas)).log()).abs().max() < 1e-12


def test_flow_sigma_is_that_of_the_scheduler():
    scheduler = flow()
    scheduler.set_timesteps(20)
    # The scheduler keeps fp32: half an ulp at 1 is 6e-8.
    assert (sigma_of(scheduler.timesteps, scheduler) - scheduler.sigmas[:-1]).abs().max() < 2e-7
    t = torch.tensor([1.0, 250.0, 500.0, 999.0], dtype=torch.double)
    assert (log_snr_of(t, scheduler) - 2 * ((1 - t / T) / (t / T)).log()).abs().max() < 1e-12


@pytest.mark.parametrize("scheduler", [ddim(), flow(1.0), flow()], ids=["ddim", "flow", "shifted-flow"])
def test_timestep_survives_the_round_trip(scheduler):
    t = torch.linspace(0, T - 1, 3997, dtype=torch.double)
    # fp64, and no schedule is flatter than .003 log-SNR per timestep: errors stay near 1e-11.
    assert (t_of_sigma(sigma_of(t, scheduler), scheduler) - t).abs().max() < 1e-9
    assert (t_of_log_snr(log_snr_of(t, scheduler), scheduler) - t).abs().max() < 1e-9
    assert (sigma_of(t, scheduler).diff() > 0).all()
    assert (log_snr_of(t, scheduler).diff() < 0).all()


@pytest.mark.parametrize("scheduler", [ddim(), flow()], ids=["ddim", "flow"])
def test_conversions_take_numbers_as_well_as_tensors(scheduler):
    assert sigma_of(300, scheduler).item() == sigma_of(torch.tensor([300.0]), scheduler)[0].item()
    assert abs(t_of_sigma(sigma_of(300.5, scheduler).item(), scheduler).item() - 300.5) < 1e-9  # fp64


def test_conversions_are_clamped_to_the_ends_of_the_schedule():
    scheduler = ddim()
    assert t_of_sigma(1e9, scheduler) == T - 1
    assert t_of_sigma(1e-9, scheduler) == 0
    assert sigma_of(T, scheduler) == sigma_of(T - 1, scheduler)
    assert log_snr_of(0.0, flow()) == math.inf
    assert log_snr_of(float(T), flow()) == -math.inf
    assert t_of_log_snr(math.inf, flow()) == 0
    assert t_of_log_snr(-math.inf, flow()) == T


@pytest.mark.parametrize("scheduler", [ddim(), flow()], ids=["ddim", "flow"])
def test_inference_timesteps_are_the_schedulers(scheduler):
    for num_steps in (4, 50):
        steps = inference_timesteps(scheduler, num_steps)
        assert steps == scheduler.timesteps.tolist()
        assert len(steps) == num_steps
        assert steps == sorted(steps, reverse=True)


def test_first_step_of_a_flow_run_is_owned_by_the_last_interval():
    steps = inference_timesteps(flow(), 10)
    assert steps[0] == T
    assert 0 in steps_per_interval(Partition.uniform(8), steps)[7]


@given(partition=partitions, values=st.lists(timesteps, max_size=20))
def test_every_step_falls_into_exactly_one_interval(partition, values):
    steps = steps_per_interval(partition, values)
    assert len(steps) == len(partition)
    assert sorted(step for own in steps for step in own) == list(range(len(values)))
    for index, own in enumerate(steps):
        assert all(partition.index_of(values[step]) == index for step in own)


# Densities


@pytest.mark.parametrize("density", densities, ids=str)
@given(partition=partitions)
def test_masses_sum_to_one(density, partition):
    masses = mass_per_interval(partition, density)
    assert len(masses) == len(partition)
    assert min(masses) >= 0
    assert abs(math.fsum(masses) - 1) < 1e-12  # fp64


@pytest.mark.parametrize("density", densities, ids=str)
def test_cdf_and_icdf_are_inverse(density):
    probability = torch.linspace(0.001, 0.999, 999, dtype=torch.double)
    assert (density.cdf(density.icdf(probability)) - probability).abs().max() < 1e-9  # fp64
    t = torch.linspace(50, 990, 941, dtype=torch.double)
    # 1 - cdf falls to 1e-5 at the ends, where fp64 leaves 1e-16 / density of precision in t.
    assert (density.icdf(density.cdf(t)) - t).abs().max() < 1e-6
    ends = torch.tensor([0.0, float(T)], dtype=torch.double)
    assert density.cdf(ends).tolist() == [0, 1]


@pytest.mark.parametrize(("shift", "mass"), [(1, 0.026), (3, 0.20), (5, 0.37), (12, 0.71)])
def test_known_masses_of_the_top_eighth(shift, mass):
    top = mass_per_interval(Partition.uniform(8), LogitNormalDensity(shift=shift))[-1]
    assert abs(top - mass) < 0.005  # the reference values have two digits


def ks_distance(samples, cdf_at_sorted):
    """Largest distance between the empirical distribution and the given one."""
    size = len(samples)
    above = (torch.arange(1, size + 1) / size - cdf_at_sorted).abs().max()
    below = (torch.arange(size) / size - cdf_at_sorted).abs().max()
    return max(above.item(), below.item())


@pytest.mark.parametrize(("mean", "std", "shift"), [(0, 1, 1), (0.5, 0.8, 3), (-1, 1.5, 0.5)])
def test_logit_normal_is_a_shifted_sigmoid_of_a_normal(mean, std, shift):
    sigma = torch.sigmoid(mean + std * normal(4000, dtype=torch.double))
    t = (T * shift * sigma / (1 + (shift - 1) * sigma)).sort().values
    distance = ks_distance(t, LogitNormalDensity(mean, std, shift).cdf(t))
    assert distance * math.sqrt(len(t)) < 1.63  # the 1 % point of Kolmogorov's distribution


# Draws


@pytest.mark.parametrize("density", densities, ids=str)
@pytest.mark.parametrize("bounds", [(0, 1000), (0, 125), (333.3, 400), (875, 1000)], ids=str)
def test_draws_follow_the_truncated_density(density, bounds):
    interval = Interval(*bounds)
    t = draw_timesteps(interval, density, 4000, generator(), integer=False)
    assert t.dtype == torch.float32
    assert t.shape == (4000,)
    assert all(value in interval for value in t.tolist())
    low, high = density.cdf(torch.tensor(bounds, dtype=torch.double))
    ordered = t.sort().values
    distance = ks_distance(ordered, (density.cdf(ordered) - low) / (high - low))
    assert distance * math.sqrt(len(t)) < 1.63  # the 1 % point of Kolmogorov's distribution


@pytest.mark.parametrize("bounds", [(0, 10), (332.5, 346.2), (990, 1000)], ids=str)
def test_whole_draws_are_uniform_over_the_whole_timesteps_of_the_interval(bounds):
    interval = Interval(*bounds)
    t = draw_timesteps(interval, UniformDensity(), 20000, generator(), integer=True)
    assert t.dtype == torch.int64
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [value for value in range(T + 1) if value in interval]
    expected = len(t) / len(values)
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 36  # the .1 % point at the largest number of degrees of freedom here, 13, is 34.5


@pytest.mark.parametrize("density", densities, ids=str)
def test_whole_draws_give_each_timestep_its_share_of_the_density(density):
    t = draw_timesteps(Interval(250, 1000), density, 4000, generator(), integer=True)
    inside = density.cdf(torch.tensor([250.0, 1000.0]))
    values, counts = t.unique(return_counts=True)
    empirical = counts.cumsum(0) / len(t)
    exact = (density.cdf(values + 1) - inside[0]) / inside.diff()
    assert (empirical - exact).abs().max().item() * math.sqrt(len(t)) < 1.63  # as above


@pytest.mark.parametrize("bounds", [(0, 0.01), (124.99, 125), (5000 / 7, 714.29), (999.99, 1000)], ids=str)
def test_draws_stay_inside_after_rounding_to_float32(bounds):
    interval = Interval(*bounds)
    t = draw_timesteps(interval, UniformDensity(), 20000, generator(), integer=False)
    assert [value for value in t.tolist() if value not in interval] == []


def test_draws_depend_on_the_generator_alone():
    def draw(seed):
        return draw_timesteps(Interval(0, 500), UniformDensity(), 50, generator(seed), integer=False)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# Wrong input


@pytest.mark.parametrize("bounds", [(5, 5), (6, 5), (-1, 5), (0, math.inf), (math.nan, 5), (0, math.nan)], ids=str)
def test_interval_refuses(bounds):
    with pytest.raises(ValueError, match="0 <= lo < hi"):
        Interval(*bounds)


@pytest.mark.parametrize(
    "boundaries", [(), (0,), (1, 1000), (0, 500, 500, 1000), (0, 600, 500, 1000), (0, math.nan, 1000), (0, math.inf)]
)
def test_partition_refuses(boundaries):
    with pytest.raises(ValueError, match="ascend from 0"):
        Partition(boundaries)


@pytest.mark.parametrize("n", [0, -1])
def test_uniform_partition_refuses(n):
    with pytest.raises(ValueError, match="a partition has 1 to 10,000 intervals"):
        Partition.uniform(n)


def test_refining_different_ranges_is_refused():
    with pytest.raises(ValueError, match="T = 1000 and T = 500"):
        Partition.uniform(2).refine(Partition.uniform(2, 500))


def test_whole_draws_need_a_whole_timestep():
    with pytest.raises(ValueError, match="no whole timestep"):
        draw_timesteps(Interval(0.25, 0.75), UniformDensity(), 3, generator(), integer=True)


def test_step_of_finds_each_step_and_the_nearest_in_between():
    timesteps = [999, 749, 499, 249]
    assert [step_of(t, timesteps) for t in timesteps] == [0, 1, 2, 3]
    assert [step_of(t, timesteps) for t in (1000, 900, 874, 870, 0)] == [0, 0, 0, 1, 3]
