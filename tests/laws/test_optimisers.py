"""Optimisers of torch, bitsandbytes and torchao: found by name, resumed to the byte, counted as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from conftest import max_error, random_pictures, scales
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.models import StableDiffusion
from timestep_experts.training import FosterSettings, LoopSettings, OptimiserSettings, foster
from timestep_experts.training.loop import Observer, run_stage
from timestep_experts.training.optimiser import find_optimiser, make_optimiser, set_learning_rate, state_bytes
from timestep_experts.training.stage import Training

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")

# leaves of tests are small: every one is to be quantised, not only those of 4096 values and more
SMALL = {"min_8bit_size": 16}
LOW_BIT = [
    pytest.param(OptimiserSettings("bitsandbytes.AdamW8bit", SMALL), marks=needs_bitsandbytes),
    pytest.param(OptimiserSettings("bitsandbytes.PagedAdamW8bit", SMALL), marks=needs_bitsandbytes),
    pytest.param(OptimiserSettings("bitsandbytes.Lion8bit", SMALL, "cosine"), marks=needs_bitsandbytes),
    pytest.param(OptimiserSettings("bitsandbytes.AdamW8bit", {}), marks=needs_bitsandbytes, id="mostly in full"),
    pytest.param(OptimiserSettings("torchao.AdamW8bit", {"block_size": 16}, "cosine"), marks=needs_torchao),
    pytest.param(OptimiserSettings("torchao.AdamW4bit", {"block_size": 16}), marks=needs_torchao),
    pytest.param(OptimiserSettings("torchao.AdamWFp8", {"block_size": 16}), marks=needs_torchao),
]
# the fall-back of paged optimisers on the CPU, and what torchao's compilation says
pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning"),
]


class PowerCutError(Exception):
    """What a test raises in place of a power cut."""


@pytest.fixture(autouse=True)
def _uncompiled() -> None:
    """torchao compiles its step for every shape; the same operations run one by one here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def train(family: StableDiffusion, folder: Path, optimiser: OptimiserSettings, observe: Observer | None = None) -> None:
    """Four steps of experts of which the largest leaf has 4608 values."""
    spec = MixtureSpec(scales(2, 1, rank=32, alpha=32))
    mixture = Mixture.attach(family.denoiser, spec, ("to_q", "conv1"), seed=3)
    rates = {scale.name: [1e-3] * len(scale.partition) for scale in spec.scales}
    budgets = {name: [4] * len(rate) for name, rate in rates.items()}
    stage = foster(mixture, FosterSettings("joint", 2, rates, budgets, caption_dropout=0.25, seed=5))[0]
    settings = LoopSettings(optimiser, validation_steps=1, checkpointing_steps=2, logging_steps=1)
    try:
        run_stage(Training(stage, mixture, family), random_pictures(6, family), settings, folder, {}, observe)
    finally:
        mixture.detach()


@pytest.mark.parametrize("optimiser", LOW_BIT)
def test_a_killed_run_with_state_of_few_bits_resumes_to_the_same_bytes(
    optimiser: OptimiserSettings, family: StableDiffusion, tmp_path: Path
) -> None:
    def kill(step: int, log: object) -> None:
        if step == 3:
            raise PowerCutError

    train(family, tmp_path / "whole", optimiser)
    with pytest.raises(PowerCutError):
        train(family, tmp_path / "killed", optimiser, kill)
    assert (tmp_path / "killed" / "checkpoint-2").is_dir()
    train(family, tmp_path / "killed", optimiser)
    whole, resumed = ((tmp_path / name / "result.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed


@pytest.mark.parametrize("name", ["bitsandbytes.AdamW8bit", "torchao.AdamW8bit"])
def test_views_of_a_stack_are_updated_in_place_and_close_to_full_precision(name: str) -> None:
    pytest.importorskip(name.partition(".")[0])

    def trained(name: str, options: dict[str, float]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        stack = torch.randn(2, 8, 1024, generator=generator)
        leaves = [stack[index] for index in range(2)]
        optimiser = make_optimiser(name, options, [{"params": [leaf], "lr": 1e-2} for leaf in leaves])
        for _ in range(5):
            leaves[1].grad = torch.randn(8, 1024, generator=generator)
            optimiser.step()
        return stack

    before = torch.randn(2, 8, 1024, generator=torch.Generator().manual_seed(0))
    few, full = trained(name, {"weight_decay": 0.0}), trained("AdamW", {"weight_decay": 0.0})
    assert torch.equal(few[0], before[0])  # without a gradient
    change = (full[1] - before[1]).abs().mean().item()
    assert (few[1] - full[1]).abs().mean().item() < 0.1 * change


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Adamm", "torch.optim has no optimiser 'Adamm'; the nearest are .*Adam"),
        pytest.param("AdamW8bit", "the nearest are bitsandbytes.AdamW8bit, torchao.AdamW8bit", marks=needs_torchao),
        pytest.param("bitsandbytes.Lyon8bit", "the nearest are bitsandbytes.Lion8bit", marks=needs_bitsandbytes),
        ("apex.FusedAdam", "a name is a class of torch.optim, or bitsandbytes.<class>, torchao.<class>"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_optimiser(name)


def test_a_library_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'timestep-experts\[bitsandbytes\]'"):
        find_optimiser("bitsandbytes.AdamW8bit")


@needs_bitsandbytes
@pytest.mark.parametrize(("options", "message"), [({"beta": 0.5}, "takes no beta"), ({}, "cannot be made with")])
def test_what_an_optimiser_does_not_take_is_said(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):  # this one refuses to go without momentum
        make_optimiser("bitsandbytes.SGD8bit", options, [{"params": [torch.zeros(4)], "lr": 0.1}])


@pytest.mark.parametrize(
    ("name", "options", "bytes_per_value"),
    [
        ("AdamW", {}, 8),
        ("SGD", {}, 0),
        ("SGD", {"momentum": 0.9}, 4),
        pytest.param("bitsandbytes.AdamW8bit", {}, 2, marks=needs_bitsandbytes),
        pytest.param("bitsandbytes.Lion8bit", {}, 1, marks=needs_bitsandbytes),
        pytest.param("bitsandbytes.AdamW8bit", {"min_8bit_size": 1 << 20}, 8, marks=needs_bitsandbytes),
        pytest.param("torchao.AdamW8bit", {}, 2, marks=needs_torchao),
        pytest.param("torchao.AdamW4bit", {}, 1, marks=needs_torchao),
    ],
)
def test_state_is_counted_as_it_is_kept(name: str, options: dict[str, float], bytes_per_value: float) -> None:
    values = 64 * 1024
    counted = state_bytes(name, options, [(64, 1024)] * 3)
    assert 3 * bytes_per_value * values <= counted <= 3 * (1.06 * bytes_per_value * values + 3000)  # scales, tables


def test_a_rate_kept_in_a_tensor_is_changed_in_place() -> None:
    rate = torch.tensor(0.5)
    for group in ({"lr": 0.5}, {"lr": rate}):
        set_learning_rate(group, 0.25)
        assert float(group["lr"]) == 0.25
    assert max_error(rate, torch.tensor(0.25)) == 0
