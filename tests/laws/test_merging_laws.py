"""Merging tensors: what must hold whatever the numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import max_error, normal
from timestep_experts.merging import (
    MergeSettings,
    mask_seed,
    merge_dare,
    merge_linear,
    merge_tensor,
    merge_ties,
    methods,
    task_vector,
    trim,
)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = st.lists(st.floats(-2, 2, allow_subnormal=False), min_size=1, max_size=4)
SIGNED_ZERO = -0.0
Merge = Callable[[Tensor, Sequence[Tensor], Sequence[float]], Tensor]


def ties_at_density_one(base: Tensor, experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return merge_ties(base, experts, weights, 1.0)


def dare_at_density_one(base: Tensor, experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return merge_dare(base, experts, weights, 1.0, range(len(weights)))


AT_DENSITY_ONE = pytest.mark.parametrize("merge", [merge_linear, ties_at_density_one, dare_at_density_one])


def model(dtype: torch.dtype = torch.float32, num_experts: int = 3, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and experts near it; their first elements are zeros of both signs."""
    base = normal(6, 5, seed=seed)
    experts = [base + 0.1 * normal(6, 5, seed=seed + 1 + i) for i in range(num_experts)]
    for number, tensor in enumerate([base, *experts]):
        tensor[0, :2] = SIGNED_ZERO if number % 2 else 0.0
    return base.to(dtype), [expert.to(dtype) for expert in experts]


def exact(base: Tensor, experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Equation 8 in fp64."""
    wide = base.double()
    return wide + sum(w * (expert.double() - wide) for w, expert in zip(weights, experts, strict=True))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@AT_DENSITY_ONE
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_weight_is_the_base_to_the_bit(merge: Merge, dtype: torch.dtype) -> None:
    base, experts = model(dtype)
    assert bits(merge(base, experts, [0, 0.0, SIGNED_ZERO])) == bits(base)


@AT_DENSITY_ONE
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chosen", range(3))
def test_one_weight_of_one_is_that_expert_to_the_bit(merge: Merge, dtype: torch.dtype, chosen: int) -> None:
    base, experts = model(dtype)
    assert bits(merge(base, experts, [float(i == chosen) for i in range(3)])) == bits(experts[chosen])


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_experts_that_equal_the_base_change_nothing(dtype: torch.dtype, density: float) -> None:
    base, _ = model(dtype)
    base[0, :2] = 0.0  # -0.0 + 0.0 is 0.0
    weights = [0.3, -1.7]
    assert bits(merge_linear(base, [base, base], weights)) == bits(base)
    assert bits(merge_ties(base, [base, base], weights, density)) == bits(base)
    assert bits(merge_dare(base, [base, base], weights, density, [0, 1])) == bits(base)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_keep_the_bases_value(dtype: torch.dtype) -> None:
    base, other = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 1, 0]).to(dtype)
    assert torch.equal(merge_linear(base, [other], [1.0]), base)
    assert torch.equal(merge_ties(base, [other, other], [1.0, 2.0], 0.5), base)
    assert torch.equal(merge_dare(base, [other], [1.0], 0.5, [0]), base)


@given(weights=WEIGHTS, seed=st.integers(0, 1000), dtype=st.sampled_from(FLOATS[1:]))
def test_linear_is_rounded_once(weights: list[float], seed: int, dtype: torch.dtype) -> None:
    base, experts = model(dtype, len(weights), seed)
    expected = exact(base, experts, weights)
    terms = base.double().abs() + sum(
        abs(w) * (e.double() - base.double()).abs() for w, e in zip(weights, experts, strict=True)
    )
    kind = torch.finfo(dtype)
    exponent = torch.frexp(expected.abs().clamp(min=kind.smallest_normal)).exponent - 1
    half_ulp = torch.ldexp(torch.full_like(expected, kind.eps / 2), exponent)
    # fp32 rounds each of the terms on the way.
    on_the_way = 3 * (len(weights) + 1) * torch.finfo(torch.float32).eps / 2 * terms
    error = (merge_linear(base, experts, weights).double() - expected).abs()
    assert (error <= half_ulp + on_the_way).all()


@given(weights=WEIGHTS, seed=st.integers(0, 1000), data=st.data())
def test_order_of_experts_does_not_matter(weights: list[float], seed: int, data: st.DataObject) -> None:
    base, experts = model(torch.float32, len(weights), seed)
    order = data.draw(st.permutations(range(len(weights))))
    shuffled, moved = [experts[i] for i in order], [weights[i] for i in order]
    assert max_error(merge_linear(base, shuffled, moved), merge_linear(base, experts, weights)) < 1e-5
    seeds = list(range(len(weights)))
    thinned = merge_dare(base, shuffled, moved, 0.5, [seeds[i] for i in order])
    assert max_error(thinned, merge_dare(base, experts, weights, 0.5, seeds)) < 1e-5


def test_order_of_experts_does_not_matter_to_ties() -> None:
    base, experts = model(torch.float64)
    weights = [0.5, -0.25, 0.75]
    expected = merge_ties(base, experts, weights, 0.4)
    assert max_error(merge_ties(base, experts[::-1], weights[::-1], 0.4), expected) < 1e-14


@given(weights=WEIGHTS, seed=st.integers(0, 1000), dtype=st.sampled_from(FLOATS))
def test_dare_at_density_one_is_linear(weights: list[float], seed: int, dtype: torch.dtype) -> None:
    base, experts = model(dtype, len(weights), seed)
    assert bits(dare_at_density_one(base, experts, weights)) == bits(merge_linear(base, experts, weights))


@given(weights=WEIGHTS, seed=st.integers(0, 1000), dtype=st.sampled_from(FLOATS))
def test_ties_at_density_one_is_linear_where_signs_agree(weights: list[float], seed: int, dtype: torch.dtype) -> None:
    base, experts = model(dtype, len(weights), seed)
    parts = [task_vector(e, base) * w for e, w in zip(experts, weights, strict=True) if w != 0]
    if not parts:
        return
    signs = torch.stack(parts).sign()
    agree = (signs == signs[0]).all(0) & (signs[0] != 0)
    ties, linear = ties_at_density_one(base, experts, weights), merge_linear(base, experts, weights)
    assert bits(ties[agree]) == bits(linear[agree])


def test_ties_by_hand() -> None:
    base = torch.tensor([10.0, 10.0, 10.0, 10.0])
    first = base + torch.tensor([4.0, -3.0, 2.0, 0.5])
    second = base + torch.tensor([2.0, 4.0, 0.5, -3.0])
    # Half is kept: (4, -3, 0, 0) and (0, 4, 0, -3); weights .5 are the paper's lambda = 1, a mean of what agrees.
    assert merge_ties(base, [first, second], [0.5, 0.5], 0.5).tolist() == [14.0, 14.0, 10.0, 7.0]
    # At weights .75 and .25 the second element is elected by -2.25 + 1 < 0.
    assert merge_ties(base, [first, second], [0.75, 0.25], 0.5).tolist() == [14.0, 7.0, 10.0, 7.0]


@pytest.mark.parametrize(("density", "kept"), [(0.5, 3), (0.01, 1), (1.0, 6), (0.6, 4)])
def test_trim_keeps_the_largest(density: float, kept: int) -> None:
    vector = torch.tensor([0.1, -6.0, 5.0, -0.2, 3.0, 4.0])
    trimmed = trim(vector, density)
    largest = vector.abs().sort(descending=True).values[:kept]
    assert trimmed[trimmed != 0].abs().sort(descending=True).values.tolist() == largest.tolist()
    assert trim(torch.zeros(0), 0.5).shape == (0,)
    assert trim(torch.tensor(3.0), 0.1) == 3.0


def test_dare_keeps_its_expectation() -> None:
    base, expert = torch.zeros(200_000), torch.ones(200_000)
    merged = merge_dare(base, [expert], [0.5], 0.25, [7])
    assert merged.unique().tolist() == [0.0, 2.0]
    # Six standard errors of a Bernoulli mean.
    assert abs(merged.mean().item() - 0.5) < 6 * 2 * math.sqrt(0.25 * 0.75 / 200_000)


def test_masks_depend_on_name_expert_and_seed_only() -> None:
    seeds = {mask_seed(s, name, key) for s in (0, 1) for name in ("a", "b") for key in ("x", "y")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    base, experts = model()
    settings = MergeSettings((0.5, 0.5, 1.0), "dare", density=0.5, seed=3)
    first = merge_tensor("a", base, experts, settings.weights, settings, "xyz")
    assert bits(merge_tensor("a", base, experts, settings.weights, settings, "xyz")) == bits(first)
    assert bits(merge_tensor("b", base, experts, settings.weights, settings, "xyz")) != bits(first)


def test_an_expert_of_no_weight_may_hold_anything() -> None:
    base, (first, second, _) = model()
    broken = torch.full_like(base, math.nan)
    for merge in (merge_linear, ties_at_density_one, dare_at_density_one):
        together = merge(base, [first, broken, second], [0.25, 0, 0.5])
        assert bits(together) == bits(merge(base, [first, second], [0.25, 0.5]))


def test_linear_reads_one_expert_at_a_time() -> None:
    base, experts = model()
    assert bits(merge_linear(base, iter(experts), [0.1, 0.2, 0.3])) == bits(
        merge_linear(base, experts, [0.1, 0.2, 0.3])
    )


def test_block_weights_first_match_wins() -> None:
    settings = MergeSettings((0.5,), block_weights={r"up\..*": (1.0,), r".*bias": (0.0,)})
    chosen = settings.weights_by_tensor(["up.bias", "mid.bias", "mid.weight"])
    assert chosen == {"up.bias": (1.0,), "mid.bias": (0.0,), "mid.weight": (0.5,)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MergeSettings(()), "at least one expert"),
        (lambda: MergeSettings((1.0, math.nan)), "weights must be finite numbers; got nan"),
        (lambda: MergeSettings((1.0,), "slerp"), "unknown merge method 'slerp': allowed are linear, ties, dare"),  # type: ignore[arg-type]
        (lambda: MergeSettings((1.0,), "ties", density=0), "density must be above 0 and at most 1; got 0"),
        (lambda: MergeSettings((1.0,), density=0.5), "density 0.5 has no meaning for method linear"),
        (lambda: MergeSettings((1.0,), "ties", seed=1), "seed 1 has no meaning for method ties"),
        (
            lambda: MergeSettings((1.0,), block_weights={"a": (1.0, 2.0)}),
            r"block_weights\['a'\] has 2 numbers; there are 1",
        ),
        (lambda: MergeSettings((1.0,), block_weights={"(": (1.0,)}), r"'\(' is no regular expression"),
        (lambda: MergeSettings((1.0,), block_weights={"b": (1.0,)}).weights_by_tensor(["ab"]), "'b' decides no tensor"),
        (
            lambda: MergeSettings((1.0,), block_weights={".*": (1.0,), "ab": (1.0,)}).weights_by_tensor(["ab"]),
            "'ab' decides no tensor",
        ),
        (lambda: merge_linear(torch.ones(2), [torch.ones(3)], [1.0]), r"shape \(3,\), its base's \(2,\)"),
        (lambda: merge_linear(torch.ones(2), [torch.ones(2)], [1.0, 1.0]), "2 weights for 1 experts"),
        (lambda: merge_linear(torch.ones(2), [torch.ones(2)] * 2, [1.0]), r"more experts than weights \(1\)"),
        (lambda: merge_linear(torch.ones(2), [torch.ones(2).int()], [1.0]), "got torch.int32"),
        (lambda: merge_linear(torch.ones(2, dtype=torch.complex64), [torch.ones(2)], [1.0]), "complex"),
        (lambda: merge_dare(torch.ones(2), [torch.ones(2)], [1.0], 0.5, []), "one seed per expert; got 0 for 1"),
        (lambda: merge_dare(torch.ones(2), [torch.ones(2)], [1.0], 1.5, [0]), "density"),
    ],
)
def test_what_cannot_be_merged_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Speed must not show


@given(
    magnitudes=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40]), st.floats(width=32, allow_nan=False)),
        min_size=1,
        max_size=40,
    ),
    density=st.floats(0.01, 1),
)
def test_trimming_keeps_what_a_sort_would_keep(magnitudes: list[float], density: float) -> None:
    vector = torch.tensor(magnitudes, dtype=torch.float32)
    num_kept = max(1, round(density * len(vector)))
    least = vector.abs().sort(descending=True).values[num_kept - 1]
    expected = vector if density == 1 else torch.where(vector.abs() >= least, vector, 0.0)
    assert torch.equal(trim(vector, density), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_blocks_are_no_part_of_the_result(dtype: torch.dtype, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = model(dtype)
    weights = [0.3, -1.2, 0.7]
    whole = [bits(merge_linear(base, experts, weights)), bits(merge_ties(base, experts, weights, density))]
    monkeypatch.setattr(methods, "_BLOCK", 7)
    assert [bits(merge_linear(base, experts, weights)), bits(merge_ties(base, experts, weights, density))] == whole


@pytest.mark.parametrize("dtype", FLOATS)
def test_merging_leaves_what_it_merges_alone(dtype: torch.dtype) -> None:
    base, experts = model(dtype)
    before = [bits(tensor) for tensor in (base, *experts)]
    merge_linear(base, experts, [0.3, -1.2, 0.7])
    merge_ties(base, experts, [0.3, -1.2, 0.7], 0.5)
    merge_dare(base, experts, [0.3, -1.2, 0.7], 0.5, [0, 1, 2])
    assert [bits(tensor) for tensor in (base, *experts)] == before
