"""Laws of what routers share: each input is averaged once while it lives, and never one average too old."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from conftest import TARGETS, max_error, normal, randomise, scales, tiny_unet, unet_inputs
from timestep_experts.mixture import Mixture, MixtureSpec
from timestep_experts.mixture.fast import pooled
from timestep_experts.mixture.fast.pooled import PooledInputs
from timestep_experts.mixture.plain import mean_pool


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of all inputs that are averaged from here on."""
    shapes: list[torch.Size] = []
    average = pooled.mean_pool

    def count(x, is_convolution):
        shapes.append(x.shape)
        return average(x, is_convolution)

    monkeypatch.setattr(pooled, "mean_pool", count)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "channels_first"), [((2, 6), False), ((2, 5, 6), False), ((2, 3, 4, 6), False), ((2, 6, 3, 4), True)]
)
def test_averages_are_over_positions_in_fp32(shape, channels_first, dtype):
    x = normal(*shape).to(dtype)
    middle = tuple(range(2, len(shape))) if channels_first else tuple(range(1, len(shape) - 1))
    averaged = PooledInputs().of(x, is_convolution=channels_first)
    assert averaged.dtype == torch.float32
    assert averaged.shape == (2, 6)
    expected = x.float().mean(middle) if middle else x.float()
    assert max_error(averaged, expected) <= 1e-6
    assert averaged is not x


def test_a_prompt_is_averaged_once_for_all_layers_and_steps(counted):
    unet = tiny_unet()
    mixture = randomise(Mixture.attach(unet, MixtureSpec(scales(8, 1)), ["attn2.to_k", "attn2.to_v"]))
    mixture.mode = "route"
    latents, text = unet_inputs(2)
    with torch.no_grad():
        for t in (999, 640, 130):
            unet(latents, t, text)
    assert counted == [text.shape]
    with torch.no_grad():
        unet(latents, 130, text.clone())
    assert counted == [text.shape] * 2


def test_queries_keys_and_values_share_one_average(counted):
    unet = tiny_unet()
    mixture = randomise(Mixture.attach(unet, MixtureSpec(scales(8, 1)), ["attn1.to_q", "attn1.to_k", "attn1.to_v"]))
    mixture.mode = "route"
    latents, text = unet_inputs(2)
    with torch.no_grad():
        unet(latents, 640, text)
    assert len(counted) == len(mixture.layers) / 3


@pytest.mark.parametrize("has_gradients", [False, True])
def test_nothing_is_said_that_would_not_be_said_without_sharing(has_gradients, monkeypatch):
    unet = tiny_unet()
    mixture = randomise(Mixture.attach(unet, MixtureSpec(scales(8, 4, 1)), TARGETS))
    mixture.mode = "route"
    latents, text = unet_inputs(2)

    def answers():
        found = []
        for t in (999, 640):
            unet.zero_grad()
            y = unet(latents, t, text).sample
            if has_gradients:
                y.square().mean().backward()
            found += [y.detach(), *(p.grad.clone() for p in unet.parameters() if p.grad is not None)]
        return found

    with torch.set_grad_enabled(has_gradients):
        shared = answers()
        monkeypatch.setattr(PooledInputs, "of", lambda _, x, is_convolution: mean_pool(x, is_convolution))
        alone = answers()
    assert len(shared) == len(alone)
    # fp32: gradients of one shared average are summed before they reach the input, not after
    assert all(max_error(a, b) <= 1e-5 * max(1, b.abs().max().item()) for a, b in zip(shared, alone, strict=True))
    if not has_gradients:
        assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))


def test_what_is_overwritten_is_averaged_anew():
    averages, x = PooledInputs(), normal(2, 5, 6)
    before = averages.of(x, is_convolution=False)
    x.mul_(2)
    assert torch.equal(averages.of(x, is_convolution=False), before * 2)
    with torch.inference_mode():
        seen = normal(2, 5, 6)
        before = averages.of(seen, is_convolution=False)
        seen.mul_(2)
        assert torch.equal(averages.of(seen, is_convolution=False), before * 2)


def test_one_tensor_may_be_read_by_a_linear_layer_and_by_a_convolution():
    averages, x = PooledInputs(), normal(2, 6, 6, 6)
    for channels_first, middle in ((False, (1, 2)), (True, (2, 3)), (False, (1, 2))):
        assert max_error(averages.of(x, is_convolution=channels_first), x.mean(middle)) <= 1e-6


def test_an_average_without_gradients_serves_no_call_with_them():
    averages, x = PooledInputs(), normal(2, 5, 6).requires_grad_()
    with torch.no_grad():
        averages.of(x, is_convolution=False)
    averages.of(x, is_convolution=False).sum().backward()
    assert max_error(x.grad, torch.full_like(x, 1 / 5)) <= 1e-7


def test_inputs_are_not_kept_alive():
    averages, x = PooledInputs(), normal(2, 5, 6)
    averages.of(x, is_convolution=False)
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None
    assert len(averages._kept) == 0


def test_gradients_of_a_second_call_are_its_own():
    """The text is a leaf that learns, as embeddings do: two calls, two backward passes."""
    unet = tiny_unet()
    mixture = randomise(Mixture.attach(unet, MixtureSpec(scales(8, 1)), ["attn2.to_k", "attn2.to_v"]))
    mixture.mode = "route"
    latents, text = unet_inputs(2)
    text.requires_grad_()
    found = []
    for _ in range(2):
        text.grad = None
        unet(latents, 640, text).sample.square().mean().backward()
        found.append(text.grad.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_shares_no_averages(duplicate):
    unet = tiny_unet()
    mixture = randomise(Mixture.attach(unet, MixtureSpec(scales(8, 1)), ["attn2.to_k"]))
    mixture.mode = "route"
    latents, text = unet_inputs(2)
    with torch.no_grad():
        expected = unet(latents, 640, text).sample
        other = duplicate(unet)
        assert torch.equal(other(latents, 640, text).sample, expected)
    states = [next(m for m in network.modules() if hasattr(m, "state")).state for network in (unet, other)]
    assert states[0].kernels.pooled is not states[1].kernels.pooled
